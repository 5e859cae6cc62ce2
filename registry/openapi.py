"""The OpenAPI 3.1 document of the product's own API, `/airlock/v1/…`: what the admin door takes and answers; pure, and checked against it by tests.

Here because the door reads its paths itself (names hold slashes), so no framework can derive it. It serves nothing and decides nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from registry.terms import MOST as TERMS
from registry.upkeep import MAX_QUOTA

VERSION = "1"
Schema = Mapping[str, Any]
_TEXT: Schema = {"type": "string"}
_FLAG: Schema = {"type": "boolean"}
_COUNT: Schema = {"type": "integer", "minimum": 0}
_DIGEST: Schema = {"type": "string", "pattern": "^(sha256:[0-9a-f]{64}|sha512:[0-9a-f]{128})$"}
_NAME: Schema = {"type": "string", "minLength": 1, "maxLength": 255, "pattern": "^[a-z0-9]+([._/-][a-z0-9]+)*$"}
_WORD: Schema = {"type": "string", "minLength": 1, "maxLength": 255, "pattern": "^[^\\x00-\\x1f\\ud800-\\udfff]+$"}
_PRINTABLE = "^[^\\x00-\\x1f\\x7f\\ud800-\\udfff]*$"
_ORG: Schema = {"type": "string", "minLength": 1, "maxLength": 100, "pattern": "^[a-z0-9]+([_-][a-z0-9]+)*$"}
_PERSON: Schema = {"type": "string", "minLength": 1, "maxLength": 100, "pattern": _PRINTABLE}
_TEXTS: Schema = {"type": "array", "items": _TEXT}
_OBJECT: Schema = {"type": "object"}
_REFUSALS = {
    "400": "The input breaks a grammar or a limit",
    "401": "No key, or one that proves nothing, is expired or revoked",
    "403": "The key may not do this; the reason says what would allow it",
    "404": "It does not exist for this key",
    "409": "Somebody else holds or changed it, or a rule forbids it now",
    "413": "The body is too large",
    "429": "Too many failed logins from this network, or changes by this key; see Retry-After",
    "503": "The database or the store does not answer now; retry",
}


def _object(_required: str = "", **properties: Schema) -> Schema:
    """An object schema; the fields named in `_required` (with spaces between) must be there, all of them for `*`."""
    names = list(properties) if _required == "*" else _required.split()
    return {"type": "object", "properties": properties, **({"required": names} if names else {})}


def _only(_required: str = "", **properties: Schema) -> Schema:
    """An object schema that takes no other fields."""
    return {**_object(_required, **properties), "additionalProperties": False}


def _list(**properties: Schema) -> Schema:
    return {"type": "array", "items": _object("*", **properties)}


def _query(name: str, schema: Schema, required: bool = False) -> dict[str, Any]:
    return {"name": name, "in": "query", "required": required, "schema": schema}


def _path(name: str, schema: Schema) -> dict[str, Any]:
    return {"name": name, "in": "path", "required": True, "schema": schema, "description": "Slashes may be sent as they are."}


def _operation(tag: str, summary: str, answer: Schema, *, params: tuple[dict[str, Any], ...] = (), body: Schema | None = None) -> dict[str, Any]:
    out: dict[str, Any] = {"tags": [tag], "summary": summary, "responses": {"200": {"description": "Done", "content": _json(answer)}}}
    out["responses"] |= {status: {"$ref": f"#/components/responses/{status}"} for status in _REFUSALS}
    if params:
        out["parameters"] = list(params)
    if body is not None:
        out["requestBody"] = {"required": True, "content": _json(body)}
    return out


def _json(schema: Schema) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}


_PAGE = (_query("limit", {"type": "integer", "minimum": 0, "maximum": 10**15}), _query("after", {"type": "string", "maxLength": 1024}))
_LIMIT = _PAGE[:1]
_SUMMARY: Mapping[str, Schema] = {
    "name": _TEXT,
    "display": _TEXT,
    "kind": _TEXT,
    "org": _TEXT,
    "visibility": _TEXT,
    "gated": _FLAG,
    "entitled": _FLAG,
    "reason": _TEXT,
    "requires_tier": _TEXT,
    "requires_product": _TEXT,
    "unaccepted": _TEXT,
    "blocked": _TEXT,
}
_REF: Mapping[str, Schema] = {
    "ref": _TEXT,
    "digest": _DIGEST,
    "media_type": _TEXT,
    "artifact_type": _TEXT,
    "size": _COUNT,
    "commit": _TEXT,
    "files": _COUNT,
    "bytes": _COUNT,
}
_QUOTA = _object("*", org=_TEXT, used_bytes=_COUNT, blobs=_COUNT, quota_bytes=_COUNT)
_RULE_FIELDS: Mapping[str, Schema] = {"pattern": _TEXT, "keep_last": _COUNT, "keep_days": _COUNT, "untagged_days": _COUNT, "keep_tags": _TEXTS}
_REMOVED = _object(
    "*",
    name=_TEXT,
    ref=_TEXT,
    tags=_TEXTS,
    manifests=_TEXTS,
    bytes=_COUNT,
    blobs=_COUNT,
    shared_blobs=_COUNT,
    leased_until=_TEXT,
    referrers=_TEXTS,
    profiles=_TEXTS,
    holders=_TEXTS,
    dry_run=_FLAG,
)
_ENDS: Mapping[str, Schema] = {**dict.fromkeys(("kind", "item", "org", "name", "ends", "grace_ends", "notes"), _TEXT), "days": {"type": "number"}}
_EXPIRING = _object(
    "*", now=_TEXT, items=_list(**_ENDS, quiet=_FLAG, stops={"type": "array", "items": _object("model", host=_TEXT, model=_TEXT)}), after=_TEXT
)
_MOVE: Mapping[str, Schema] = {"id": _COUNT, "tag": _TEXT, "from": _TEXT, "to": _TEXT, "at": _TEXT, "key_id": _TEXT, "kept": _FLAG}


_TIME: Schema = {"type": "number", "minimum": 0}
_TERMS = (
    _object("name", name=_NAME, **{key: {"type": "string", "maxLength": most} for key, most in TERMS.items()}),
    _object("*", name=_TEXT, license=_TEXT, accepted_by=_TEXT, blocked=_TEXT, accepted_at=_TIME),
)
_UPSTREAM: Mapping[str, Schema] = {
    **dict.fromkeys(("name", "ref", "source", "upstream_org", "key_id", "product", "tier", "license", "accepted_by", "evidence", "sender"), _TEXT),
    **dict.fromkeys(("key_end", "subscription_end", "accepted_at", "fetched", "at"), _TIME),
    **{"id": _COUNT, "digest": _DIGEST, "gated": _FLAG, "sequence": _COUNT},
}


def _everybody() -> dict[str, dict[str, Any]]:
    """Paths for every key."""
    catalog = _object("*", items=_list(**_SUMMARY), after=_TEXT)
    shown = _object("*", **_SUMMARY, refs=_list(**_REF), profiles=_list(**_REF))
    found = _object("*", items=_list(name=_TEXT, display=_TEXT, kind=_TEXT, org=_TEXT, immutable=_FLAG), after=_TEXT)
    term = _query("q", {"type": "string", "minLength": 1, "maxLength": 255}, required=True)
    row = _object("id class event org key_id ref result reason ts", id=_COUNT, event=_TEXT, org=_TEXT, key_id=_TEXT, ref=_TEXT)
    rows = _object("*", items={"type": "array", "items": row}, after=_COUNT)
    behind = _query("after", {"type": "integer", "minimum": 0, "maximum": 10**15})
    me = _object("key_id org tier expires", key_id=_TEXT, org=_TEXT, tier=_TEXT, expires=_TEXT)
    return {
        "/airlock/v1/whoami": {"get": _operation("keys", "The public facts of the presented key", me)},
        "/airlock/v1/catalog": {"get": _operation("catalog", "What this key may see, a page", catalog, params=_PAGE)},
        "/airlock/v1/catalog/{name}": {
            "get": _operation("catalog", "One repository with its refs and profiles", shown, params=(_path("name", _NAME),))
        },
        "/airlock/v1/audit": {
            "get": _operation("audit", "What is recorded about the key's organisation, for its auditor", rows, params=(*_LIMIT, behind))
        },
        **_log(),
        "/airlock/v1/search": {"get": _operation("catalog", "Repositories with a text in their name", found, params=(term, *_PAGE))},
    }


def _log() -> dict[str, dict[str, Any]]:
    """Paths for auditors, over the signed log."""
    count: Schema = {"type": "integer", "minimum": 0, "maximum": 10**15}
    head = _object("*", log=_TEXT, size=_COUNT, checkpoint=_TEXT, key=_TEXT, first=_COUNT, before=_TEXT, sealed=_COUNT)
    entry, signed = _object("i hash", i=_COUNT, hash=_TEXT, body=_TEXT), _object("*", size=_COUNT, note=_TEXT)
    page = _object("*", items={"type": "array", "items": entry}, checkpoints={"type": "array", "items": signed}, after=_COUNT)
    proof = _object("*", index=_COUNT, also={"type": "array", "items": _COUNT}, proof=_OBJECT, key=_TEXT)
    found = (*(_query(name, {"type": "string", "maxLength": 64}) for name in ("index", "request_id", "jti")),)
    when = {"type": "string", "minLength": 1, "maxLength": 40, "pattern": _PRINTABLE}
    span = (_query("from", when, required=True), _query("to", when, required=True), _query("org", {"type": "string", "maxLength": 100}))
    tables = dict.fromkeys(("pulls", "denials", "changes", "gpus", "unused_keys", "grants", "upstream"), _object("rows total", total=_COUNT))
    report = _object("*", **tables, totals=_OBJECT, evidence=_OBJECT, entries=_COUNT, sealed=_COUNT, organisation=_TEXT)
    root = "/airlock/v1/audit"
    return {
        f"{root}/checkpoint": {"get": _operation("audit", "Signs over all that is recorded so far", head, params=(_query("first", count),))},
        f"{root}/entries": {
            "get": _operation(
                "audit",
                "A page of the log with its checkpoints, for the site's auditors",
                page,
                params=(_LIMIT[0], _query("after", count), _query("size", count)),
            )
        },
        f"{root}/proof": {"get": _operation("audit", "The proof of one entry", proof, params=found)},
        f"{root}/report": {"get": _operation("audit", "Who pulled what, GPUs against licences, denials of a period", report, params=span)},
    }


def _administrators() -> dict[str, dict[str, Any]]:
    """Paths for keys with the action admin."""
    remove = _object("name", name=_NAME, ref={"type": "string", "maxLength": 255}, dry_run=_FLAG, referrers=_FLAG, force=_FLAG)
    back = _object("name tag digest", name=_NAME, tag=_WORD, digest=_DIGEST)
    rule = _object(
        "pattern",
        pattern={"type": "string", "minLength": 1, "maxLength": 255, "pattern": "^[a-z0-9*][a-z0-9._*/-]*$"},
        keep_last={"type": "integer", "minimum": 0, "maximum": 1_000_000},
        keep_days={"type": "integer", "minimum": 0, "maximum": 36_500},
        untagged_days={"type": "integer", "minimum": 0, "maximum": 36_500},
        keep_tags={"type": "array", "items": {"type": "string", "pattern": "^[A-Za-z0-9._*?-]{1,128}$"}, "maxItems": 50},
        remove=_FLAG,
    )
    bound = _object("org bytes", org=_WORD, bytes={"type": "integer", "minimum": 0, "maximum": MAX_QUOTA})
    state = _object("*", running=_FLAG, started=_TEXT, ended=_TEXT, phase=_TEXT, done=_COUNT, report=_OBJECT)
    span = (_query("days", {"type": "integer", "minimum": 0, "maximum": 10**15}), _query("org", {"type": "string", "maxLength": 100}))
    past = (_path("name", _NAME), _query("tag", _TEXT), _query("before", _COUNT), *_LIMIT)
    history = _object("*", name=_TEXT, items=_list(**_MOVE), before=_COUNT)
    changed = _object("*", name=_TEXT, immutable=_FLAG)
    moved = _object("*", **{"name": _TEXT, "tag": _TEXT, "from": _TEXT, "to": _DIGEST})
    set_rule = {"anyOf": [_object("*", **_RULE_FIELDS), _object("*", removed=_TEXT)]}
    flag = _object("name immutable", name=_NAME, immutable=_FLAG)
    needed, told = _object("*", name=_TEXT, tier=_TEXT, product=_TEXT), _object("*", items=_list(**_UPSTREAM), after=_COUNT)
    product = {"type": "string", "pattern": "^([A-Za-z0-9][A-Za-z0-9._:/+-]{0,99})?$"}
    needs = _object("name", name=_NAME, tier={"enum": ["", "developer", "enterprise"]}, product=product)
    behind = _query("after", {"type": "integer", "minimum": 0, "maximum": 10**15})
    return {
        "/airlock/v1/remove": {
            "post": _operation("held", "Removes a tag, a manifest or a repository, or tells what that frees", _REMOVED, body=remove)
        },
        "/airlock/v1/history/{name}": {"get": _operation("tags", "Where the tags of a repository pointed", history, params=past)},
        "/airlock/v1/rollback": {"post": _operation("tags", "Points a tag at a manifest that is still here", moved, body=back)},
        "/airlock/v1/immutable": {"post": _operation("tags", "Says whether the tags of a repository may move and go", changed, body=flag)},
        "/airlock/v1/require": {"post": _operation("held", "Says which product and tier a repository requires", needed, body=needs)},
        "/airlock/v1/terms": {
            "post": _operation(
                "held", "Says which licence must be accepted, who did, and whether the law blocks a repository", _TERMS[1], body=_TERMS[0]
            )
        },
        "/airlock/v1/upstream": {
            "get": _operation("audit", "What bundles told of the upstreams, for auditors", told, params=(_query("name", _TEXT), *_LIMIT, behind))
        },
        "/airlock/v1/quota/{org}": {"get": _operation("held", "Bytes of an organisation and its bound", _QUOTA, params=(_path("org", _WORD),))},
        "/airlock/v1/quota": {"post": _operation("held", "Sets the bound of an organisation; 0 is none", _QUOTA, body=bound)},
        "/airlock/v1/retention": {
            "get": _operation("held", "The retention rules", _object("*", items=_list(**_RULE_FIELDS))),
            "post": _operation("held", "Makes, replaces or removes a retention rule", set_rule, body=rule),
        },
        "/airlock/v1/expiring": {
            "get": _operation("entitlement", "What ends within so many days, and what stops then", _EXPIRING, params=(*span, *_PAGE))
        },
        "/airlock/v1/gc": {
            "get": _operation("held", "The state of the garbage collection", state),
            "post": _operation("held", "Starts a collection, or tells what one would do", _OBJECT, body=_object(dry_run=_FLAG)),
        },
    }


def _people() -> dict[str, dict[str, Any]]:
    """Paths for the administrators of the site and of an organisation, over people."""
    name = _PERSON
    short: Schema = {"type": "string", "maxLength": 200, "pattern": _PRINTABLE}
    org = _object("*", name=_TEXT, display=_TEXT, created=_TEXT, closed=_TEXT, entitlement=_TEXT, keys=_COUNT, members=_COUNT)
    orgs = _object("*", items={"type": "array", "items": org}, after=_TEXT)
    teams = _object("*", items=_list(name=_TEXT, created=_TEXT, closed=_TEXT, members=_TEXTS), after=_TEXT)
    member: dict[str, Schema] = {"name": _TEXT, "kind": _TEXT, "role": _TEXT, "note": _TEXT, "created": _TEXT, "disabled": _TEXT}
    of = (_query("org", {"type": "string", "maxLength": 100}), *_PAGE)
    team, both = _only("name", org=name, name=name), _only("name member", org=name, name=name, member=name)
    told, roled = _object("*", org=_TEXT, name=_TEXT), _object("*", org=_TEXT, name=_TEXT, kind=_TEXT, role=_TEXT, grant_id=_TEXT)
    joined, role = _object("*", org=_TEXT, name=_TEXT, member=_TEXT), {"enum": ["member", "auditor", "admin"]}
    person = _only("name", org=name, name=name, kind={"enum": ["person", "robot"]}, role=role, note=short)
    new = _only("name", name=_ORG, display=short)
    change, gone = _only("name role", org=name, name=name, role=role), _object("*", org=_TEXT, name=_TEXT, disabled=_TEXT)
    root = "/airlock/v1"
    return {
        f"{root}/orgs": {
            "get": _operation("people", "The organisations that this key may look at", orgs, params=_PAGE),
            "post": _operation("people", "Makes an organisation", org, body=new),
        },
        f"{root}/orgs/{{name}}": {"get": _operation("people", "One organisation", org, params=(_path("name", _NAME),))},
        f"{root}/orgs/close": {"post": _operation("people", "Closes an organisation", org, body=_only("name", name=_ORG))},
        f"{root}/orgs/open": {"post": _operation("people", "Opens a closed organisation again", org, body=_only("name", name=_ORG))},
        f"{root}/teams": {
            "get": _operation("people", "The teams of an organisation", teams, params=of),
            "post": _operation("people", "Makes a team", told, body=team),
        },
        f"{root}/teams/close": {"post": _operation("people", "Closes a team", told, body=team)},
        f"{root}/teams/add": {"post": _operation("people", "Takes a member into a team", joined, body=both)},
        f"{root}/teams/remove": {"post": _operation("people", "Takes a member out of a team", joined, body=both)},
        f"{root}/members": {
            "get": _operation("people", "The members of an organisation", _object("*", items=_list(**member), after=_TEXT), params=of),
            "post": _operation("people", "Makes a member, a person or a robot", roled, body=person),
        },
        f"{root}/members/role": {"post": _operation("people", "Gives a member another role", roled, body=change)},
        f"{root}/members/enable": {"post": _operation("people", "Enables a disabled member again", gone, body=team)},
        f"{root}/members/disable": {"post": _operation("people", "Disables a member", gone, body=team)},
    }


def _rights() -> dict[str, dict[str, Any]]:
    """Paths for the administrators of the site and of an organisation, over keys and grants."""
    short: Schema = {"type": "string", "maxLength": 200, "pattern": _PRINTABLE}
    moment: Schema = {"type": "string", "maxLength": 40, "pattern": _PRINTABLE}
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
        "org": _PERSON,
    }
    kinds: Schema = {"enum": ["personal", "service", "runtime"]}
    optional: Schema = {"type": "string", "maxLength": 100, "pattern": _PRINTABLE}
    prefix: Schema = {"type": "string", "pattern": "^nvapi-([a-z0-9]{1,20}-)?$"}
    tier: Schema = {"enum": ["developer", "enterprise"]}
    key = _only("", **wish, tier=tier, type=kinds, member=optional, prefix=prefix)
    grant = _only("models", **wish, key=optional, member=optional, team=optional)
    made: dict[str, Schema] = {n: _TEXT for n in ("key", "key_id", "org", "tier", "type", "member", "expires")}
    shown = {
        n: _TEXT for n in ("key_id", "org", "tier", "type", "member", "state", "created", "expires", "revoked_at", "last_used", "replaces", "note")
    }
    shown |= {"models": _TEXTS, "actions": _TEXTS}
    right: dict[str, Schema] = {
        n: _TEXT for n in ("grant_id", "org", "key", "member", "team", "environment", "not_before", "expires", "revoked", "created", "note")
    }
    right |= {"models": _TEXTS, "actions": _TEXTS, "profiles": _TEXTS, "gpus": _COUNT, "grace_s": _COUNT}
    behind = (_query("org", {"type": "string", "maxLength": 100}), _query("after", {"type": "integer", "minimum": 0, "maximum": 10**15}), *_LIMIT)
    turn = _only("key_id", key_id=public, overlap=moment, expires=moment, prefix=prefix)
    one, one_grant = _only("key_id", key_id=public), _only("grant_id", grant_id=public)
    extend = _only("grant_id expires", grant_id=public, expires=moment, grace=moment)
    root, gone = "/airlock/v1", _object("*", grant_id=_TEXT, state=_TEXT)
    return {
        f"{root}/keys": {
            "get": _operation(
                "keys",
                "Keys that this key may look at, at least itself",
                _object("*", items=_list(**shown, grants=_TEXTS), after=_COUNT),
                params=behind,
            ),
            "post": _operation("keys", "Makes a key; the answer alone holds it", _object("*", **made), body=key),
        },
        f"{root}/keys/{{key}}": {
            "get": _operation(
                "keys", "One key with all that it is granted", _object("*", **shown, grants=_list(**right)), params=(_path("key", public),)
            )
        },
        f"{root}/keys/revoke": {"post": _operation("keys", "Revokes a key", _object("*", key_id=_TEXT, state=_TEXT), body=one)},
        f"{root}/keys/rotate": {
            "post": _operation("keys", "Makes a successor of a key", _object("*", **made, replaces=_TEXT, old_ends=_TEXT), body=turn)
        },
        f"{root}/keys/s3": {
            "post": _operation(
                "keys",
                "What an S3 client signs with as a key; each showing is recorded",
                _object("*", **dict.fromkeys(("key_id", "org", "expires", "secret"), _TEXT)),
                body=_only("", key_id=public),
            )
        },
        f"{root}/grants": {
            "get": _operation(
                "keys", "Grants that this key may look at, at least its own", _object("*", items=_list(**right), after=_COUNT), params=behind
            ),
            "post": _operation("keys", "Grants a right to a key, a member, a team or an organisation", _object("*", **right), body=grant),
        },
        f"{root}/grants/revoke": {"post": _operation("keys", "Revokes a grant", gone, body=one_grant)},
        f"{root}/grants/extend": {"post": _operation("keys", "Gives a grant another end", _object("*", **right), body=extend)},
    }


_LEASE_END = _only("jti", jti={"type": "string", "minLength": 1, "maxLength": 40, "pattern": "^[0-9a-f]+$"})


def _documents() -> dict[str, dict[str, Any]]:
    """Paths over entitlements, revocation lists and leases."""
    moment: Schema = {"type": "string", "maxLength": 40, "pattern": _PRINTABLE}
    texts: Schema = {"type": "array", "items": {"type": "string", "minLength": 1, "maxLength": 100, "pattern": _PRINTABLE}, "maxItems": 100}
    count: Schema = {"type": "integer", "minimum": 0, "maximum": 1_000_000}
    words = ("jti", "org", "issuer", "kid", "tier", "source", "issued", "begins", "ends", "grace_ends", "imported", "state", "revoked", "replaced")
    shown: dict[str, Schema] = dict.fromkeys(words, _TEXT) | dict.fromkeys(("models", "actions", "products", "environments"), _TEXTS)
    shown |= {"serial": _COUNT, "gpus": _COUNT, "max_keys": _COUNT, "counts": _FLAG}
    told = {name: _TEXT for name in ("document", "jti", "org", "issuer", "begins", "ends", "state")} | {"serial": _COUNT}
    wish = {name: texts for name in ("models", "actions", "products", "environments")} | {"not_before": moment, "expires": moment, "grace": moment}
    licence = _only("org tier models gpus expires", org=_ORG, tier={"enum": ["developer", "enterprise"]}, gpus=count, max_keys=count, **wish)
    ended = _only("", jti=texts, key_id=texts, kid=texts, next_update=moment)
    listed = {"issuer": _TEXT, "serial": _COUNT, "issued": _TEXT, "next_update": _TEXT, "imported": _TEXT, "revoked": _OBJECT, "text": _TEXT}
    by_row = (_query("org", {"type": "string", "maxLength": 100}), _query("after", {"type": "integer", "minimum": 0, "maximum": 10**15}), *_LIMIT)
    texts_of = ("jti", "org", "host", "model", "model_digest", "profile_id", "key_id", "grant_id", "entitlement", "environment")
    lease = dict.fromkeys((*texts_of, "begins", "ends", "state", "replaced_by", "revoked", "returned"), _TEXT) | {"serial": _COUNT, "gpus": _TEXTS}
    page = _query("after", {"type": "string", "pattern": "^([0-9]{1,18}[.][0-9]{1,18})?$"})
    of = (_query("org", {"type": "string", "maxLength": 100}), _query("every", {"enum": ["0", "1"]}), *_LIMIT, page)
    receipt = _only("lease digest bytes files", lease=_LEASE_END["properties"]["jti"], digest=_DIGEST, bytes=_COUNT, files=count)
    unsigned = _only("model digest profile reason host at", model=_WORD, digest=_DIGEST, profile=_WORD, reason=_WORD, host=_WORD, at=_COUNT)
    lease_body = _object(
        "model ref profile_digest profile_id host gpu_uuids",
        model=_NAME,
        ref=_WORD,
        profile_digest=_DIGEST,
        profile_id=_WORD,
        host=_WORD,
        gpu_uuids={"type": "array", "items": {"type": "string", "minLength": 1, "maxLength": 100}, "maxItems": 64},
        nonce={"type": "string", "pattern": "^[0-9a-fA-F]{1,64}$"},
    )
    root, gone = "/airlock/v1", _object("*", jti=_TEXT, state=_TEXT)
    mine = {name: _TEXT for name in ("key_id", "org", "tier", "key_ends", "now")} | {"grants": {"type": "array", "items": _OBJECT}}
    standing = _object("*", **mine, entitlement={"type": ["object", "null"]}, revocation_serial=_COUNT, warnings=_TEXTS)
    return {
        f"{root}/standing": {"get": _operation("keys", "What the presented key has now, and what of it ends soon", standing)},
        f"{root}/entitlements": {
            "get": _operation(
                "entitlement", "Entitlements that this key may look at", _object("*", items=_list(**shown), after=_COUNT), params=by_row
            ),
            "post": _operation(
                "entitlement", "Takes in an entitlement or a revocation list", _object("*", **told), body=_only("document", document=_TEXT)
            ),
        },
        f"{root}/entitlements/{{name}}": {
            "get": _operation("entitlement", "One entitlement with its document", _object("*", **shown, text=_TEXT), params=(_path("name", _NAME),))
        },
        f"{root}/entitlements/issue": {
            "post": _operation("entitlement", "Makes an entitlement by the site's own root", _object("*", **told, text=_TEXT), body=licence)
        },
        f"{root}/entitlements/revoke": {
            "post": _operation("entitlement", "Makes the next revocation list of the site's own root", _object("*", **told, text=_TEXT), body=ended)
        },
        f"{root}/revocations": {
            "get": _operation("entitlement", "The revocation lists of this site", _object("*", items=_list(**listed), serial=_COUNT))
        },
        f"{root}/leases/return": {"post": _operation("runtime", "Returns a lease: its GPUs are free", gone, body=_LEASE_END)},
        f"{root}/leases/revoke": {"post": _operation("runtime", "Revokes a lease", gone, body=_LEASE_END)},
        f"{root}/verified": {
            "post": _operation("runtime", "A runtime's receipt of what it verified", _object("*", lease=_TEXT, digest=_DIGEST), body=receipt)
        },
        f"{root}/unsigned": {
            "post": _operation("runtime", "A runtime's record that it runs what this site did not sign", _object("*", ref=_TEXT), body=unsigned)
        },
        f"{root}/leases": {
            "get": _operation("runtime", "Leases that this key may look at", _object("*", items=_list(**lease), after=_TEXT), params=of),
            "post": _operation(
                "runtime", "A signed lease for one model, profile and set of GPUs", _object("*", lease=_TEXT, now=_COUNT), body=lease_body
            ),
        },
    }


def _unlocked() -> dict[str, dict[str, Any]]:
    """Paths that need no key."""
    healthy = _operation("site", "Whether the database is there", _object("*", status=_TEXT))
    document_ = _operation("site", "This document", _OBJECT)
    return {"/healthz": {"get": healthy | {"security": []}}, "/airlock/v1/openapi.json": {"get": document_ | {"security": []}}}


def document() -> dict[str, Any]:
    """The whole document (OpenAPI Specification 3.1.0)."""
    error = _object("error what", error=_TEXT, reason=_TEXT, what=_TEXT, expected=_TEXT, do=_TEXT, request_id=_TEXT)
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
            "responses": {s: {"description": words, "content": _json({"$ref": "#/components/schemas/Error"})} for s, words in _REFUSALS.items()},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}, "password": {"type": "http", "scheme": "basic"}},
        },
        "security": [{"key": []}, {"password": []}],
    }
