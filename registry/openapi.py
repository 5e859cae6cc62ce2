"""The OpenAPI 3.1 document of the product's own API, `/airlock/v1/…`: what the admin door takes and answers; pure, and checked against it by tests.

Here because the door reads its paths itself (names hold slashes), so no framework can derive it. It serves nothing and decides nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from registry.openapi_shapes import (
    COUNT,
    DIGEST,
    FLAG,
    NAME,
    OBJECT,
    ORG,
    PERSON,
    PRINTABLE,
    REFUSALS,
    TEXT,
    TEXTS,
    WORD,
    Schema,
    json_body,
    list_of,
    object_of,
    only,
    operation,
    path,
    query,
)
from registry.terms import MOST as TERMS
from registry.upkeep import MAX_QUOTA

VERSION = "1"
_PAGE = (query("limit", {"type": "integer", "minimum": 0, "maximum": 10**15}), query("after", {"type": "string", "maxLength": 1024}))
_LIMIT = _PAGE[:1]
_SUMMARY: Mapping[str, Schema] = {
    "name": TEXT,
    "display": TEXT,
    "kind": TEXT,
    "org": TEXT,
    "visibility": TEXT,
    "gated": FLAG,
    "entitled": FLAG,
    "reason": TEXT,
    "requires_tier": TEXT,
    "requires_product": TEXT,
    "unaccepted": TEXT,
    "blocked": TEXT,
}
_REF: Mapping[str, Schema] = {
    "ref": TEXT,
    "digest": DIGEST,
    "media_type": TEXT,
    "artifact_type": TEXT,
    "size": COUNT,
    "commit": TEXT,
    "files": COUNT,
    "bytes": COUNT,
}
_QUOTA = object_of("*", org=TEXT, used_bytes=COUNT, blobs=COUNT, quota_bytes=COUNT)
_RULE_FIELDS: Mapping[str, Schema] = {"pattern": TEXT, "keep_last": COUNT, "keep_days": COUNT, "untagged_days": COUNT, "keep_tags": TEXTS}
_REMOVED = object_of(
    "*",
    name=TEXT,
    ref=TEXT,
    tags=TEXTS,
    manifests=TEXTS,
    bytes=COUNT,
    blobs=COUNT,
    shared_blobs=COUNT,
    leased_until=TEXT,
    referrers=TEXTS,
    profiles=TEXTS,
    holders=TEXTS,
    dry_run=FLAG,
)
_ENDS: Mapping[str, Schema] = {**dict.fromkeys(("kind", "item", "org", "name", "ends", "grace_ends", "notes"), TEXT), "days": {"type": "number"}}
_EXPIRING = object_of(
    "*", now=TEXT, items=list_of(**_ENDS, quiet=FLAG, stops={"type": "array", "items": object_of("model", host=TEXT, model=TEXT)}), after=TEXT
)
_MOVE: Mapping[str, Schema] = {"id": COUNT, "tag": TEXT, "from": TEXT, "to": TEXT, "at": TEXT, "key_id": TEXT, "kept": FLAG}


_TIME: Schema = {"type": "number", "minimum": 0}
_TERMS = (
    object_of("name", name=NAME, **{key: {"type": "string", "maxLength": most} for key, most in TERMS.items()}),
    object_of("*", name=TEXT, license=TEXT, accepted_by=TEXT, blocked=TEXT, accepted_at=_TIME),
)
_UPSTREAM: Mapping[str, Schema] = {
    **dict.fromkeys(("name", "ref", "source", "upstream_org", "key_id", "product", "tier", "license", "accepted_by", "evidence", "sender"), TEXT),
    **dict.fromkeys(("key_end", "subscription_end", "accepted_at", "fetched", "at"), _TIME),
    **{"id": COUNT, "digest": DIGEST, "gated": FLAG, "sequence": COUNT},
}


def _everybody() -> dict[str, dict[str, Any]]:
    """Paths for every key."""
    catalog = object_of("*", items=list_of(**_SUMMARY), after=TEXT)
    shown = object_of("*", **_SUMMARY, refs=list_of(**_REF), profiles=list_of(**_REF))
    found = object_of("*", items=list_of(name=TEXT, display=TEXT, kind=TEXT, org=TEXT, immutable=FLAG), after=TEXT)
    term = query("q", {"type": "string", "minLength": 1, "maxLength": 255}, required=True)
    row = object_of("id class event org key_id ref result reason ts", id=COUNT, event=TEXT, org=TEXT, key_id=TEXT, ref=TEXT)
    rows = object_of("*", items={"type": "array", "items": row}, after=COUNT)
    behind = query("after", {"type": "integer", "minimum": 0, "maximum": 10**15})
    me = object_of("key_id org tier expires", key_id=TEXT, org=TEXT, tier=TEXT, expires=TEXT)
    return {
        "/airlock/v1/whoami": {"get": operation("keys", "The public facts of the presented key", me)},
        "/airlock/v1/catalog": {"get": operation("catalog", "What this key may see, a page", catalog, params=_PAGE)},
        "/airlock/v1/catalog/{name}": {"get": operation("catalog", "One repository with its refs and profiles", shown, params=(path("name", NAME),))},
        "/airlock/v1/audit": {
            "get": operation("audit", "What is recorded about the key's organisation, for its auditor", rows, params=(*_LIMIT, behind))
        },
        **_log(),
        "/airlock/v1/search": {"get": operation("catalog", "Repositories with a text in their name", found, params=(term, *_PAGE))},
    }


def _log() -> dict[str, dict[str, Any]]:
    """Paths for auditors, over the signed log."""
    count: Schema = {"type": "integer", "minimum": 0, "maximum": 10**15}
    head = object_of("*", log=TEXT, size=COUNT, checkpoint=TEXT, key=TEXT, first=COUNT, before=TEXT, sealed=COUNT)
    entry, signed = object_of("i hash", i=COUNT, hash=TEXT, body=TEXT), object_of("*", size=COUNT, note=TEXT)
    page = object_of("*", items={"type": "array", "items": entry}, checkpoints={"type": "array", "items": signed}, after=COUNT)
    proof = object_of("*", index=COUNT, also={"type": "array", "items": COUNT}, proof=OBJECT, key=TEXT)
    found = (*(query(name, {"type": "string", "maxLength": 64}) for name in ("index", "request_id", "jti")),)
    when = {"type": "string", "minLength": 1, "maxLength": 40, "pattern": PRINTABLE}
    span = (query("from", when, required=True), query("to", when, required=True), query("org", {"type": "string", "maxLength": 100}))
    tables = dict.fromkeys(("pulls", "denials", "changes", "gpus", "unused_keys", "grants", "upstream"), object_of("rows total", total=COUNT))
    report = object_of("*", **tables, totals=OBJECT, evidence=OBJECT, entries=COUNT, sealed=COUNT, organisation=TEXT)
    root = "/airlock/v1/audit"
    return {
        f"{root}/checkpoint": {"get": operation("audit", "Signs over all that is recorded so far", head, params=(query("first", count),))},
        f"{root}/entries": {
            "get": operation(
                "audit",
                "A page of the log with its checkpoints, for the site's auditors",
                page,
                params=(_LIMIT[0], query("after", count), query("size", count)),
            )
        },
        f"{root}/proof": {"get": operation("audit", "The proof of one entry", proof, params=found)},
        f"{root}/report": {"get": operation("audit", "Who pulled what, GPUs against licences, denials of a period", report, params=span)},
    }


def _administrators() -> dict[str, dict[str, Any]]:
    """Paths for keys with the action admin."""
    remove = object_of("name", name=NAME, ref={"type": "string", "maxLength": 255}, dry_run=FLAG, referrers=FLAG, force=FLAG)
    back = object_of("name tag digest", name=NAME, tag=WORD, digest=DIGEST)
    rule = object_of(
        "pattern",
        pattern={"type": "string", "minLength": 1, "maxLength": 255, "pattern": "^[a-z0-9*][a-z0-9._*/-]*$"},
        keep_last={"type": "integer", "minimum": 0, "maximum": 1_000_000},
        keep_days={"type": "integer", "minimum": 0, "maximum": 36_500},
        untagged_days={"type": "integer", "minimum": 0, "maximum": 36_500},
        keep_tags={"type": "array", "items": {"type": "string", "pattern": "^[A-Za-z0-9._*?-]{1,128}$"}, "maxItems": 50},
        remove=FLAG,
    )
    bound = object_of("org bytes", org=WORD, bytes={"type": "integer", "minimum": 0, "maximum": MAX_QUOTA})
    state = object_of("*", running=FLAG, started=TEXT, ended=TEXT, phase=TEXT, done=COUNT, report=OBJECT)
    span = (query("days", {"type": "integer", "minimum": 0, "maximum": 10**15}), query("org", {"type": "string", "maxLength": 100}))
    past = (path("name", NAME), query("tag", TEXT), query("before", COUNT), *_LIMIT)
    history = object_of("*", name=TEXT, items=list_of(**_MOVE), before=COUNT)
    changed = object_of("*", name=TEXT, immutable=FLAG)
    moved = object_of("*", **{"name": TEXT, "tag": TEXT, "from": TEXT, "to": DIGEST})
    set_rule = {"anyOf": [object_of("*", **_RULE_FIELDS), object_of("*", removed=TEXT)]}
    flag = object_of("name immutable", name=NAME, immutable=FLAG)
    needed, told = object_of("*", name=TEXT, tier=TEXT, product=TEXT), object_of("*", items=list_of(**_UPSTREAM), after=COUNT)
    product = {"type": "string", "pattern": "^([A-Za-z0-9][A-Za-z0-9._:/+-]{0,99})?$"}
    needs = object_of("name", name=NAME, tier={"enum": ["", "developer", "enterprise"]}, product=product)
    behind = query("after", {"type": "integer", "minimum": 0, "maximum": 10**15})
    return {
        "/airlock/v1/remove": {
            "post": operation("held", "Removes a tag, a manifest or a repository, or tells what that frees", _REMOVED, body=remove)
        },
        "/airlock/v1/history/{name}": {"get": operation("tags", "Where the tags of a repository pointed", history, params=past)},
        "/airlock/v1/rollback": {"post": operation("tags", "Points a tag at a manifest that is still here", moved, body=back)},
        "/airlock/v1/immutable": {"post": operation("tags", "Says whether the tags of a repository may move and go", changed, body=flag)},
        "/airlock/v1/require": {"post": operation("held", "Says which product and tier a repository requires", needed, body=needs)},
        "/airlock/v1/terms": {
            "post": operation(
                "held", "Says which licence must be accepted, who did, and whether the law blocks a repository", _TERMS[1], body=_TERMS[0]
            )
        },
        "/airlock/v1/upstream": {
            "get": operation("audit", "What bundles told of the upstreams, for auditors", told, params=(query("name", TEXT), *_LIMIT, behind))
        },
        "/airlock/v1/quota/{org}": {"get": operation("held", "Bytes of an organisation and its bound", _QUOTA, params=(path("org", WORD),))},
        "/airlock/v1/quota": {"post": operation("held", "Sets the bound of an organisation; 0 is none", _QUOTA, body=bound)},
        "/airlock/v1/retention": {
            "get": operation("held", "The retention rules", object_of("*", items=list_of(**_RULE_FIELDS))),
            "post": operation("held", "Makes, replaces or removes a retention rule", set_rule, body=rule),
        },
        "/airlock/v1/expiring": {
            "get": operation("entitlement", "What ends within so many days, and what stops then", _EXPIRING, params=(*span, *_PAGE))
        },
        "/airlock/v1/gc": {
            "get": operation("held", "The state of the garbage collection", state),
            "post": operation("held", "Starts a collection, or tells what one would do", OBJECT, body=object_of(dry_run=FLAG)),
        },
    }


def _people() -> dict[str, dict[str, Any]]:
    """Paths for the administrators of the site and of an organisation, over people."""
    name = PERSON
    short: Schema = {"type": "string", "maxLength": 200, "pattern": PRINTABLE}
    org = object_of("*", name=TEXT, display=TEXT, created=TEXT, closed=TEXT, entitlement=TEXT, keys=COUNT, members=COUNT)
    orgs = object_of("*", items={"type": "array", "items": org}, after=TEXT)
    teams = object_of("*", items=list_of(name=TEXT, created=TEXT, closed=TEXT, members=TEXTS), after=TEXT)
    member: dict[str, Schema] = {"name": TEXT, "kind": TEXT, "role": TEXT, "note": TEXT, "created": TEXT, "disabled": TEXT}
    of = (query("org", {"type": "string", "maxLength": 100}), *_PAGE)
    team, both = only("name", org=name, name=name), only("name member", org=name, name=name, member=name)
    told, roled = object_of("*", org=TEXT, name=TEXT), object_of("*", org=TEXT, name=TEXT, kind=TEXT, role=TEXT, grant_id=TEXT)
    joined, role = object_of("*", org=TEXT, name=TEXT, member=TEXT), {"enum": ["member", "auditor", "admin"]}
    person = only("name", org=name, name=name, kind={"enum": ["person", "robot"]}, role=role, note=short)
    new = only("name", name=ORG, display=short)
    change, gone = only("name role", org=name, name=name, role=role), object_of("*", org=TEXT, name=TEXT, disabled=TEXT)
    root = "/airlock/v1"
    return {
        f"{root}/orgs": {
            "get": operation("people", "The organisations that this key may look at", orgs, params=_PAGE),
            "post": operation("people", "Makes an organisation", org, body=new),
        },
        f"{root}/orgs/{{name}}": {"get": operation("people", "One organisation", org, params=(path("name", NAME),))},
        f"{root}/orgs/close": {"post": operation("people", "Closes an organisation", org, body=only("name", name=ORG))},
        f"{root}/orgs/open": {"post": operation("people", "Opens a closed organisation again", org, body=only("name", name=ORG))},
        f"{root}/teams": {
            "get": operation("people", "The teams of an organisation", teams, params=of),
            "post": operation("people", "Makes a team", told, body=team),
        },
        f"{root}/teams/close": {"post": operation("people", "Closes a team", told, body=team)},
        f"{root}/teams/add": {"post": operation("people", "Takes a member into a team", joined, body=both)},
        f"{root}/teams/remove": {"post": operation("people", "Takes a member out of a team", joined, body=both)},
        f"{root}/members": {
            "get": operation("people", "The members of an organisation", object_of("*", items=list_of(**member), after=TEXT), params=of),
            "post": operation("people", "Makes a member, a person or a robot", roled, body=person),
        },
        f"{root}/members/role": {"post": operation("people", "Gives a member another role", roled, body=change)},
        f"{root}/members/enable": {"post": operation("people", "Enables a disabled member again", gone, body=team)},
        f"{root}/members/disable": {"post": operation("people", "Disables a member", gone, body=team)},
    }


def _rights() -> dict[str, dict[str, Any]]:
    """Paths for the administrators of the site and of an organisation, over keys and grants."""
    short: Schema = {"type": "string", "maxLength": 200, "pattern": PRINTABLE}
    moment: Schema = {"type": "string", "maxLength": 40, "pattern": PRINTABLE}
    public: Schema = {"type": "string", "minLength": 1, "maxLength": 40, "pattern": "^(key|grant|role)-[0-9a-f]{16}$"}
    wish: dict[str, Schema] = {
        "models": {"type": "array", "items": {"type": "string", "pattern": "^[a-z0-9*][a-z0-9._*/-]{0,200}$"}, "maxItems": 100},
        "actions": {"type": "array", "items": {"enum": ["pull", "create", "push", "run", "admin", "auditor"]}, "maxItems": 6},
        "not_before": moment,
        "grace": moment,
        "environment": {"enum": ["", "dev", "production"]},
        "gpus": {"type": "integer", "minimum": 0, "maximum": 1_000_000},
        "profiles": {"type": "array", "items": {"type": "string", "minLength": 1, "maxLength": 255}, "maxItems": 100},
        "expires": moment,
        "note": short,
        "org": PERSON,
    }
    kinds: Schema = {"enum": ["personal", "service", "runtime"]}
    optional: Schema = {"type": "string", "maxLength": 100, "pattern": PRINTABLE}
    prefix: Schema = {"type": "string", "pattern": "^nvapi-([a-z0-9]{1,20}-)?$"}
    tier: Schema = {"enum": ["developer", "enterprise"]}
    key = only("", **wish, tier=tier, type=kinds, member=optional, prefix=prefix)
    grant = only("models", **wish, key=optional, member=optional, team=optional)
    made: dict[str, Schema] = {n: TEXT for n in ("key", "key_id", "org", "tier", "type", "member", "expires")}
    shown = {
        n: TEXT for n in ("key_id", "org", "tier", "type", "member", "state", "created", "expires", "revoked_at", "last_used", "replaces", "note")
    }
    shown |= {"models": TEXTS, "actions": TEXTS}
    right: dict[str, Schema] = {
        n: TEXT for n in ("grant_id", "org", "key", "member", "team", "environment", "not_before", "expires", "revoked", "created", "note")
    }
    right |= {"models": TEXTS, "actions": TEXTS, "profiles": TEXTS, "gpus": COUNT, "grace_s": COUNT}
    behind = (query("org", {"type": "string", "maxLength": 100}), query("after", {"type": "integer", "minimum": 0, "maximum": 10**15}), *_LIMIT)
    turn = only("key_id", key_id=public, overlap=moment, expires=moment, prefix=prefix)
    one, one_grant = only("key_id", key_id=public), only("grant_id", grant_id=public)
    extend = only("grant_id expires", grant_id=public, expires=moment, grace=moment)
    root, gone = "/airlock/v1", object_of("*", grant_id=TEXT, state=TEXT)
    return {
        f"{root}/keys": {
            "get": operation(
                "keys",
                "Keys that this key may look at, at least itself",
                object_of("*", items=list_of(**shown, grants=TEXTS), after=COUNT),
                params=behind,
            ),
            "post": operation("keys", "Makes a key; the answer alone holds it", object_of("*", **made), body=key),
        },
        f"{root}/keys/{{key}}": {
            "get": operation(
                "keys", "One key with all that it is granted", object_of("*", **shown, grants=list_of(**right)), params=(path("key", public),)
            )
        },
        f"{root}/keys/revoke": {"post": operation("keys", "Revokes a key", object_of("*", key_id=TEXT, state=TEXT), body=one)},
        f"{root}/keys/rotate": {
            "post": operation("keys", "Makes a successor of a key", object_of("*", **made, replaces=TEXT, old_ends=TEXT), body=turn)
        },
        f"{root}/keys/s3": {
            "post": operation(
                "keys",
                "What an S3 client signs with as a key; each showing is recorded",
                object_of("*", **dict.fromkeys(("key_id", "org", "expires", "secret"), TEXT)),
                body=only("", key_id=public),
            )
        },
        f"{root}/grants": {
            "get": operation(
                "keys", "Grants that this key may look at, at least its own", object_of("*", items=list_of(**right), after=COUNT), params=behind
            ),
            "post": operation("keys", "Grants a right to a key, a member, a team or an organisation", object_of("*", **right), body=grant),
        },
        f"{root}/grants/revoke": {"post": operation("keys", "Revokes a grant", gone, body=one_grant)},
        f"{root}/grants/extend": {"post": operation("keys", "Gives a grant another end", object_of("*", **right), body=extend)},
    }


_LEASE_END = only("jti", jti={"type": "string", "minLength": 1, "maxLength": 40, "pattern": "^[0-9a-f]+$"})


def _documents() -> dict[str, dict[str, Any]]:
    """Paths over entitlements, revocation lists and leases."""
    moment: Schema = {"type": "string", "maxLength": 40, "pattern": PRINTABLE}
    texts: Schema = {"type": "array", "items": {"type": "string", "minLength": 1, "maxLength": 100, "pattern": PRINTABLE}, "maxItems": 100}
    count: Schema = {"type": "integer", "minimum": 0, "maximum": 1_000_000}
    words = ("jti", "org", "issuer", "kid", "tier", "source", "issued", "begins", "ends", "grace_ends", "imported", "state", "revoked", "replaced")
    shown: dict[str, Schema] = dict.fromkeys(words, TEXT) | dict.fromkeys(("models", "actions", "products", "environments"), TEXTS)
    shown |= {"serial": COUNT, "gpus": COUNT, "max_keys": COUNT, "counts": FLAG}
    told = {name: TEXT for name in ("document", "jti", "org", "issuer", "begins", "ends", "state")} | {"serial": COUNT}
    wish = {name: texts for name in ("models", "actions", "products", "environments")} | {"not_before": moment, "expires": moment, "grace": moment}
    licence = only("org tier models gpus expires", org=ORG, tier={"enum": ["developer", "enterprise"]}, gpus=count, max_keys=count, **wish)
    ended = only("", jti=texts, key_id=texts, kid=texts, next_update=moment)
    listed = {"issuer": TEXT, "serial": COUNT, "issued": TEXT, "next_update": TEXT, "imported": TEXT, "revoked": OBJECT, "text": TEXT}
    by_row = (query("org", {"type": "string", "maxLength": 100}), query("after", {"type": "integer", "minimum": 0, "maximum": 10**15}), *_LIMIT)
    texts_of = ("jti", "org", "host", "model", "model_digest", "profile_id", "key_id", "grant_id", "entitlement", "environment")
    lease = dict.fromkeys((*texts_of, "begins", "ends", "state", "replaced_by", "revoked", "returned"), TEXT) | {"serial": COUNT, "gpus": TEXTS}
    page = query("after", {"type": "string", "pattern": "^([0-9]{1,18}[.][0-9]{1,18})?$"})
    of = (query("org", {"type": "string", "maxLength": 100}), query("every", {"enum": ["0", "1"]}), *_LIMIT, page)
    receipt = only("lease digest bytes files", lease=_LEASE_END["properties"]["jti"], digest=DIGEST, bytes=COUNT, files=count)
    unsigned = only("model digest profile reason host at", model=WORD, digest=DIGEST, profile=WORD, reason=WORD, host=WORD, at=COUNT)
    lease_body = object_of(
        "model ref profile_digest profile_id host gpu_uuids",
        model=NAME,
        ref=WORD,
        profile_digest=DIGEST,
        profile_id=WORD,
        host=WORD,
        gpu_uuids={"type": "array", "items": {"type": "string", "minLength": 1, "maxLength": 100}, "maxItems": 64},
        nonce={"type": "string", "pattern": "^[0-9a-fA-F]{1,64}$"},
    )
    root, gone = "/airlock/v1", object_of("*", jti=TEXT, state=TEXT)
    mine = {name: TEXT for name in ("key_id", "org", "tier", "key_ends", "now")} | {"grants": {"type": "array", "items": OBJECT}}
    standing = object_of("*", **mine, entitlement={"type": ["object", "null"]}, revocation_serial=COUNT, warnings=TEXTS)
    return {
        f"{root}/standing": {"get": operation("keys", "What the presented key has now, and what of it ends soon", standing)},
        f"{root}/entitlements": {
            "get": operation(
                "entitlement", "Entitlements that this key may look at", object_of("*", items=list_of(**shown), after=COUNT), params=by_row
            ),
            "post": operation(
                "entitlement", "Takes in an entitlement or a revocation list", object_of("*", **told), body=only("document", document=TEXT)
            ),
        },
        f"{root}/entitlements/{{name}}": {
            "get": operation("entitlement", "One entitlement with its document", object_of("*", **shown, text=TEXT), params=(path("name", NAME),))
        },
        f"{root}/entitlements/issue": {
            "post": operation("entitlement", "Makes an entitlement by the site's own root", object_of("*", **told, text=TEXT), body=licence)
        },
        f"{root}/entitlements/revoke": {
            "post": operation("entitlement", "Makes the next revocation list of the site's own root", object_of("*", **told, text=TEXT), body=ended)
        },
        f"{root}/revocations": {
            "get": operation("entitlement", "The revocation lists of this site", object_of("*", items=list_of(**listed), serial=COUNT))
        },
        f"{root}/leases/return": {"post": operation("runtime", "Returns a lease: its GPUs are free", gone, body=_LEASE_END)},
        f"{root}/leases/revoke": {"post": operation("runtime", "Revokes a lease", gone, body=_LEASE_END)},
        f"{root}/verified": {
            "post": operation("runtime", "A runtime's receipt of what it verified", object_of("*", lease=TEXT, digest=DIGEST), body=receipt)
        },
        f"{root}/unsigned": {
            "post": operation("runtime", "A runtime's record that it runs what this site did not sign", object_of("*", ref=TEXT), body=unsigned)
        },
        f"{root}/leases": {
            "get": operation("runtime", "Leases that this key may look at", object_of("*", items=list_of(**lease), after=TEXT), params=of),
            "post": operation(
                "runtime", "A signed lease for one model, profile and set of GPUs", object_of("*", lease=TEXT, now=COUNT), body=lease_body
            ),
        },
    }


def _unlocked() -> dict[str, dict[str, Any]]:
    """Paths that need no key."""
    healthy = operation("site", "Whether the database is there", object_of("*", status=TEXT))
    document_ = operation("site", "This document", OBJECT)
    return {"/healthz": {"get": healthy | {"security": []}}, "/airlock/v1/openapi.json": {"get": document_ | {"security": []}}}


def document() -> dict[str, Any]:
    """The whole document (OpenAPI Specification 3.1.0)."""
    error = object_of("error what", error=TEXT, reason=TEXT, what=TEXT, expected=TEXT, do=TEXT, request_id=TEXT)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Airlock registry, its own API",
            "version": VERSION,
            "description": "The other doors speak the protocols of others: docs/format.md.",
        },
        "paths": {**_everybody(), **_administrators(), **_people(), **_rights(), **_documents(), **_unlocked()},
        "components": {
            "schemas": {"Error": error},
            "responses": {s: {"description": words, "content": json_body({"$ref": "#/components/schemas/Error"})} for s, words in REFUSALS.items()},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}, "password": {"type": "http", "scheme": "basic"}},
        },
        "security": [{"key": []}, {"password": []}],
    }
