"""The product's own door, `/airlock/v1/…` (the table of registry/verbs.py) and `/healthz`; refusals carry every word of the error."""

from __future__ import annotations

from collections.abc import Callable

from artifact import errors
from artifact.manifest import parse_json
from registry import refusals
from registry.exchange import Exchange
from registry.verbs import GETS, NAMED, POSTS

_BODY_BYTES = 80 * 1024  # a signed document of 64 KiB in lines
_PREFIX = "/airlock/v1/"


class AdminDoor:
    """Dispatches one admin exchange; `check` raises where the site cannot serve."""

    def __init__(self, check: Callable[[], None]) -> None:
        self.check = check

    async def __call__(self, x: Exchange) -> None:
        """Answers in JSON."""
        await x.serve(self._serve(x), lambda error: self._refuse(x, error))

    async def _refuse(self, x: Exchange, error: errors.AirlockError) -> None:
        status = refusals.form(refusals.STATUS, error, 500)
        headers = refusals.headers(status, error)
        if status == 401:
            headers["www-authenticate"] = 'Basic realm="airlock"'
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


def _no_route(x: Exchange) -> errors.AirlockError:
    path = x.path.removeprefix(_PREFIX) if x.path.startswith(_PREFIX) else ""
    reads = x.path == "/healthz" or path in GETS or (path.partition("/")[0] in NAMED and "/" in path)
    allowed = ["GET", "HEAD"] * reads + ["POST"] * (path in POSTS)
    if allowed:
        told = ", ".join(allowed)
        return errors.Unsupported(f"{x.method} is not served here", expected=told, allow=told)
    words = ", ".join(sorted({path.split("/")[0] for path in (*POSTS, *GETS, *NAMED)}))
    return errors.NotFound(f"no route {x.method} {x.path[:200]!r}", expected=f"{words} below /airlock/v1/")
