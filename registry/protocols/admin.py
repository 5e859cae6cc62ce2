"""The product's own door, `/airlock/v1/…` (the table of registry/verbs.py) and `/healthz`; refusals carry every word of the error."""

from __future__ import annotations

from collections.abc import Callable

from artifact import errors
from artifact.manifest import parse_json
from registry.exchange import Exchange, Gone
from registry.verbs import GETS, NAMED, POSTS

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
_BODY_BYTES = 80 * 1024  # a signed document of 64 KiB in lines
_PREFIX = "/airlock/v1/"


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
        elif not x.path.startswith(_PREFIX):
            raise _no_route(x)
        elif x.method == "POST":
            await self._change(x, x.path.removeprefix(_PREFIX))
        elif route[0] == "GET":
            await self._look(x, x.path.removeprefix(_PREFIX))
        else:
            raise _no_route(x)

    async def _change(self, x: Exchange, path: str) -> None:
        verb = POSTS.get(path)
        if verb is None:
            raise _no_route(x)
        await x.call(x.guard.paced)  # a body is read for nobody who has no key
        body = parse_json(await x.read_body(_BODY_BYTES, "the request"), "the request")
        await x.json(200, await x.call(lambda call: verb(x.guard, call, body)))

    async def _look(self, x: Exchange, path: str) -> None:
        word, slash, rest = path.partition("/")
        verb, named = GETS.get(path), NAMED.get(word)
        if verb is not None:
            await x.json(200, await x.call(lambda call: verb(x.guard, call, x)))
        elif named is not None and slash:
            await x.json(200, await x.call(lambda call: named(x.guard, call, x, rest)))
        else:
            raise _no_route(x)


def _no_route(x: Exchange) -> errors.NotFound:
    words = ", ".join(sorted({path.split("/")[0] for path in (*POSTS, *GETS, *NAMED)}))
    return errors.NotFound(f"no route {x.method} {x.path[:200]!r}", expected=f"{words} below /airlock/v1/")
