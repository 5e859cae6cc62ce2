"""The product's own door, `/airlock/v1/…` and `/healthz`: who am I, leases, the catalog; refusals carry every word of the error."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from artifact import errors
from artifact.manifest import check_name, parse_json
from artifact.store import Call
from registry.exchange import Exchange, Gone
from registry.upkeep import Upkeep

_STATUS: dict[type[errors.AirlockError], int] = {
    errors.Unauthenticated: 401,
    errors.Denied: 403,
    errors.NotFound: 404,
    errors.Invalid: 400,
    errors.Mismatch: 400,
    errors.Conflict: 409,
    errors.RangeInvalid: 416,
    errors.TooLarge: 413,
    errors.Unsupported: 405,
    errors.Throttled: 429,
    errors.Unavailable: 503,
}
_LEASE_BYTES = 64 * 1024
_BODY_BYTES = 64 * 1024
_PREFIX = "/airlock/v1/"
# What an administrator changes, by the last word of the path: a JSON object in, a JSON object out (docs/format.md, the admin API).
_CHANGES: dict[str, Callable[[Upkeep, Call, Mapping[str, object]], dict[str, object]]] = {
    "remove": Upkeep.remove,
    "rollback": Upkeep.roll_back,
    "immutable": Upkeep.set_immutable,
    "quota": Upkeep.set_quota,
    "retention": Upkeep.set_rule,
    "gc": Upkeep.collect,
}


class AdminDoor:
    """Dispatches one admin exchange; `check` raises where the site cannot serve."""

    def __init__(self, check: Callable[[], None]) -> None:
        self.check = check

    async def __call__(self, x: Exchange) -> None:
        """Answers in JSON."""
        try:
            await self._serve(x)
        except Gone:
            await x.gone()
        except errors.AirlockError as error:
            if x.started:
                raise
            status = next((s for cls, s in _STATUS.items() if isinstance(error, cls)), 500)
            headers = {401: {"www-authenticate": 'Basic realm="airlock"'}, 503: {"retry-after": "5"}}.get(status, {})
            if isinstance(error, errors.Throttled):
                headers = {"retry-after": error.ids["retry_after"]}
            body = {"error": error.code, "reason": error.reason, "what": error.what, "expected": error.expected, "do": error.do}
            await x.json(status, body | {"request_id": x.note["request_id"]}, headers)

    async def _serve(self, x: Exchange) -> None:
        route = ("GET" if x.method == "HEAD" else x.method, x.path)
        if route == ("GET", "/healthz"):
            await x.io(self.check)
            await x.json(200, {"status": "ok"})
        elif route == ("GET", "/airlock/v1/whoami"):
            await x.json(200, await x.call(x.guard.whoami))
        elif route == ("POST", "/airlock/v1/leases"):
            await x.call(x.guard.whoami)  # a body is read for nobody who has no key
            raw = await x.read_body(_LEASE_BYTES, "the lease request")

            def lease(call: Call) -> dict[str, object]:
                return {**x.guard.lease(call, parse_json(raw, "the lease request")), "now": int(call.now)}

            await x.json(200, await x.call(lease))
        elif route == ("GET", "/airlock/v1/catalog"):
            after, limit = x.cursor("after"), max(1, x.number("limit", 100, 1000))
            await x.json(200, await x.call(lambda call: x.guard.catalog_list(call, after, limit)))
        elif route[0] == "GET" and x.path.startswith("/airlock/v1/catalog/"):
            name = check_name(x.path[len("/airlock/v1/catalog/") :])
            await x.json(200, await x.call(lambda call: x.guard.catalog_show(call, name)))
        elif route[0] == "POST" and x.path.removeprefix(_PREFIX) in _CHANGES:
            change = _CHANGES[x.path.removeprefix(_PREFIX)]
            await x.call(x.guard.whoami)  # a body is read for nobody who has no key
            body = parse_json(await x.read_body(_BODY_BYTES, "the request"), "the request")
            await x.json(200, await x.call(lambda call: change(x.guard.upkeep, call, body)))
        elif route[0] == "GET":
            await self._look(x)
        else:
            raise _no_route(x)

    async def _look(self, x: Exchange) -> None:
        """Answers the questions of an administrator, and the search of everybody."""
        word, _, rest = x.path.removeprefix(_PREFIX).partition("/")
        upkeep, limit = x.guard.upkeep, max(1, x.number("limit", 100, 1000))
        if not x.path.startswith(_PREFIX) or (word in ("search", "audit", "retention", "gc")) == bool(rest):
            raise _no_route(x)
        if word == "search":
            text, after = x.param("q"), x.cursor("after")
            await x.json(200, await x.call(lambda call: upkeep.search(call, text, after, limit)))
        elif word == "audit":
            behind = x.number("after", 0, 1 << 62)
            await x.json(200, await x.call(lambda call: x.guard.recorded(call, behind, limit)))
        elif word == "history":
            tag, before, name = x.param("tag"), x.number("before", 0, 1 << 62), check_name(rest)
            await x.json(200, await x.call(lambda call: upkeep.history(call, name, tag, before, limit)))
        elif word == "quota":
            await x.json(200, await x.call(lambda call: upkeep.quota(call, rest)))
        elif word == "retention":
            await x.json(200, await x.call(upkeep.rules))
        elif word == "gc":
            await x.json(200, await x.call(upkeep.collection))
        else:
            raise _no_route(x)


def _no_route(x: Exchange) -> errors.NotFound:
    words = "whoami, leases, catalog, search, audit, history, quota, retention, gc, remove, rollback or immutable below /airlock/v1/"
    return errors.NotFound(f"no route {x.method} {x.path[:200]!r}", expected=words)
