"""The OpenAPI 3.1 document of the product's own API, `/airlock/v1/…`: what the admin door takes and answers; pure, and checked against it by tests.

Here because the door reads its paths itself (names hold slashes), so no framework can derive it. It serves nothing and decides nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from registry.upkeep import MAX_QUOTA

VERSION = "1"
Schema = Mapping[str, Any]
_TEXT: Schema = {"type": "string"}
_FLAG: Schema = {"type": "boolean"}
_COUNT: Schema = {"type": "integer", "minimum": 0}
_DIGEST: Schema = {"type": "string", "pattern": "^(sha256:[0-9a-f]{64}|sha512:[0-9a-f]{128})$"}
_NAME: Schema = {"type": "string", "minLength": 1, "maxLength": 255, "pattern": "^[a-z0-9]+([._/-][a-z0-9]+)*$"}
_WORD: Schema = {"type": "string", "minLength": 1, "maxLength": 255, "pattern": "^[^\\x00-\\x1f\\ud800-\\udfff]+$"}
_TEXTS: Schema = {"type": "array", "items": _TEXT}
_OBJECT: Schema = {"type": "object"}
_REFUSALS = {
    "400": "The input breaks a grammar or a limit",
    "401": "No key, or one that proves nothing, is expired or revoked",
    "403": "The key may not do this; the reason says what would allow it",
    "404": "It does not exist for this key",
    "409": "Somebody else holds or changed it, or a rule forbids it now",
    "413": "The body is too large",
    "429": "Too many failed logins from this network; see Retry-After",
    "503": "The database or the store does not answer now; retry",
}


def _object(_required: str = "", **properties: Schema) -> Schema:
    """An object schema; the fields named in `_required` (with spaces between) must be there, all of them for `*`."""
    names = list(properties) if _required == "*" else _required.split()
    return {"type": "object", "properties": properties, **({"required": names} if names else {})}


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
_MOVE: Mapping[str, Schema] = {"id": _COUNT, "tag": _TEXT, "from": _TEXT, "to": _TEXT, "at": _TEXT, "key_id": _TEXT, "kept": _FLAG}


_TIME: Schema = {"type": "number", "minimum": 0}
_UPSTREAM: Mapping[str, Schema] = {
    **dict.fromkeys(("name", "ref", "source", "upstream_org", "key_id", "product", "tier", "license", "accepted_by", "evidence", "sender"), _TEXT),
    **dict.fromkeys(("key_end", "subscription_end", "accepted_at", "fetched", "at"), _TIME),
    **{"id": _COUNT, "digest": _DIGEST, "gated": _FLAG, "sequence": _COUNT},
}


def _everybody() -> dict[str, dict[str, Any]]:
    """Paths for every key."""
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
        "/airlock/v1/leases": {
            "post": _operation(
                "runtime", "A signed lease for one model, profile and set of GPUs", _object("*", lease=_TEXT, now=_COUNT), body=lease_body
            )
        },
        "/airlock/v1/catalog": {"get": _operation("catalog", "What this key may see, a page", catalog, params=_PAGE)},
        "/airlock/v1/catalog/{name}": {
            "get": _operation("catalog", "One repository with its refs and profiles", shown, params=(_path("name", _NAME),))
        },
        "/airlock/v1/audit": {
            "get": _operation("audit", "What is recorded about the key's organisation, for its auditor", rows, params=(*_LIMIT, behind))
        },
        "/airlock/v1/search": {"get": _operation("catalog", "Repositories with a text in their name", found, params=(term, *_PAGE))},
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
        "/airlock/v1/upstream": {
            "get": _operation("audit", "What bundles told of the upstreams, for auditors", told, params=(_query("name", _TEXT), *_LIMIT, behind))
        },
        "/airlock/v1/quota/{org}": {"get": _operation("held", "Bytes of an organisation and its bound", _QUOTA, params=(_path("org", _WORD),))},
        "/airlock/v1/quota": {"post": _operation("held", "Sets the bound of an organisation; 0 is none", _QUOTA, body=bound)},
        "/airlock/v1/retention": {
            "get": _operation("held", "The retention rules", _object("*", items=_list(**_RULE_FIELDS))),
            "post": _operation("held", "Makes, replaces or removes a retention rule", set_rule, body=rule),
        },
        "/airlock/v1/gc": {
            "get": _operation("held", "The state of the garbage collection", state),
            "post": _operation("held", "Starts a collection, or tells what one would do", _OBJECT, body=_object(dry_run=_FLAG)),
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
        "paths": {**_everybody(), **_administrators(), **_unlocked()},
        "components": {
            "schemas": {"Error": error},
            "responses": {s: {"description": words, "content": _json({"$ref": "#/components/schemas/Error"})} for s, words in _REFUSALS.items()},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}, "password": {"type": "http", "scheme": "basic"}},
        },
        "security": [{"key": []}, {"password": []}],
    }
