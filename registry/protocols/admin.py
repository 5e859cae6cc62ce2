"""The product's own door, `/airlock/v1/…` and `/healthz`: who am I, leases, the catalog; refusals carry every word of the error."""

from __future__ import annotations

from collections.abc import Callable

from artifact import errors
from artifact.manifest import check_name, parse_json
from artifact.store import Call
from registry.exchange import Exchange, Gone

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
    errors.Unavailable: 503,
}
_LEASE_BYTES = 64 * 1024


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
            body = {"error": error.code, "reason": error.reason, "what": error.what, "expected": error.expected, "do": error.do}
            await x.json(status, body, headers)

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
        else:
            raise errors.NotFound(f"no route {x.method} {x.path[:200]!r}", expected="whoami, leases or catalog below /airlock/v1/")
