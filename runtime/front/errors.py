"""One error body for every client: OpenAI's shape and both generations of NIM's at once, and the engine's errors in that shape; pure."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping

from aiohttp import web

Json = dict[str, object]
TYPES = {
    400: "BadRequestError",
    401: "AuthenticationError",
    403: "PermissionDeniedError",
    404: "NotFoundError",
    405: "MethodNotAllowed",
    413: "RequestTooLarge",
    429: "RateLimitError",
    501: "NotImplementedError",
}


def error_body(status: int, message: str, kind: str = "", param: str | None = None) -> Json:
    """One body that OpenAI's clients and both generations of NIM clients read."""
    kind = kind or TYPES.get(status, "InternalServerError" if status >= 500 else "BadRequestError")
    inner: Json = {"message": message, "type": kind, "param": param, "code": status}
    return {"object": "error", **inner, "error": inner}


def failure(status: int, message: str, kind: str = "", param: str | None = None, headers: Mapping[str, str] | None = None) -> web.Response:
    """An error answer in both shapes."""
    return web.json_response(error_body(status, message, kind, param), status=status, headers=headers)


class Refused(Exception):
    """A request that is answered with an error of ours."""

    def __init__(self, status: int, message: str, kind: str = "", param: str | None = None, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.kind, self.param, self.headers = status, kind, param, headers

    @property
    def answer(self) -> web.Response:
        """The answer to send."""
        return failure(self.status, str(self), self.kind, self.param, self.headers)


def read_error(status: int, raw: bytes, model: str, scrub: Callable[[str], str]) -> Refused:
    """An engine's error in any of its shapes, as ours; a status that is no error of HTTP (a redirect, a 2xx that is not 200) is a bad gateway."""
    if not 400 <= status < 600:
        return Refused(502, f"the engine answered with status {status}", "BadGateway")
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError):
        body = None
    found = body.get("error", body) if isinstance(body, dict) else None
    if status in (404, 405) and isinstance(body, dict) and isinstance(body.get("detail"), str):
        return Refused(404, f"The model `{model}` does not support this route.", "NotFoundError")
    if isinstance(found, str):
        return Refused(status, scrub(found))
    if isinstance(found, dict):
        message = found.get("message") or found.get("detail") or "the engine refused the request"
        kind, param = found.get("type"), found.get("param")
        return Refused(status, scrub(str(message)), kind if isinstance(kind, str) else "", param if isinstance(param, str) else None)
    return Refused(
        status if status < 500 else 502, "the engine refused the request" if status < 500 else "the engine answered with what is no error of its API"
    )
