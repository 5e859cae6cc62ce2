"""The outermost layer of every request: request id, figures, span, one access line, and a bare 500 for what nobody expected.

Here because it must see every answer, the refused ones too. It knows no door and reads no body.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from artifact.errors import Unavailable
from registry.exchange import LENT, POURING, SENDFILE, Message, Receive, Scope, Send
from registry.logs import redacted
from registry.metrics import Metrics
from registry.routes import route
from registry.telemetry import Tracing

ACCESS = logging.getLogger("airlock.access")
ERRORS = logging.getLogger("airlock.errors")
_REQUEST_ID = re.compile(rb"[A-Za-z0-9][A-Za-z0-9._-]{7,63}\Z")
_FAILURES = ("error", "reason", "fault")  # what a door's work left in the note; it counts only where the answer is a refusal


def request_id(headers: list[tuple[bytes, bytes]]) -> str:
    """The client's X-Request-ID where it is well formed and holds nothing like a key, else a new one."""
    given = next((v for k, v in headers if k == b"x-request-id"), b"")
    text = given.decode("latin-1") if _REQUEST_ID.match(given) else ""
    return text if text and redacted(text) == text else uuid.uuid4().hex


class Front:
    """The ASGI application that the server is given; `app` holds the doors."""

    def __init__(
        self, app: Callable[[Scope, Receive, Send], Awaitable[None]], metrics: Metrics | None = None, tracing: Tracing | None = None
    ) -> None:
        self.app, self.metrics, self.tracing = app, metrics, tracing
        self._open: dict[asyncio.Task[Any], Scope] = {}

    def suspend_uploads(self) -> int:
        """Ends every request that is receiving an upload, whose bytes so far are kept for a resume; how many there were."""
        pouring = [task for task, scope in self._open.items() if scope.get(POURING)]
        for task in pouring:
            task.cancel()
        return len(pouring)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began = time.time_ns(), time.monotonic()
        note: dict[str, Any] = {"request_id": request_id(scope["headers"]), "key_id": ""}
        scope["airlock"] = note
        seen = {"status": 0, "bytes": 0}
        received = 0
        own_id = (b"x-request-id", note["request_id"].encode())

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                seen["status"] = message["status"]
                message = {**message, "headers": [*message.get("headers", []), own_id]}
            await send(message)
            seen["bytes"] += message.get("sent", message["count"]) if message["type"] == SENDFILE else len(message.get("body", b""))

        async def taken() -> Message:
            nonlocal received
            message = await receive()
            received += sum(map(len, message.get("pieces") or (message.get("body", b""),)))
            return message

        task = asyncio.current_task()
        if task is not None:
            self._open[task] = scope
        try:
            await self._answer(scope, taken, counted, seen)
        except Exception:  # what comes here broke an answer that had begun: counted, and raised to the server, which cuts the connection
            note |= {"error": "internal", "fault": note.get("fault") or "internal"}
            raise
        finally:
            if task is not None:
                self._open.pop(task, None)
            self._told(scope, note, seen, received + scope.get(LENT, 0), began)

    async def _answer(self, scope: Scope, receive: Receive, send: Send, seen: Mapping[str, int]) -> None:
        request = scope["airlock"]["request_id"]
        try:
            # `GET *` is a request line, but names nothing here
            if not scope["path"].startswith("/") or not scope.get("raw_path", b"/").startswith(b"/"):
                await _bare(send, 400, {"error": "invalid", "what": "the request target is not a path", "do": "ask for a path that begins with /"})
                return
            await self.app(scope, receive, send)
        except asyncio.CancelledError:  # the server stops: what was poured in is suspended by now
            if seen["status"]:
                raise
            await _bare(send, 503, {"error": "unavailable", "what": "the server is stopping", "do": "try again later; an upload goes on where it is"})
        except Exception as error:  # the top of the program: logged with the request id, never shown
            if seen["status"] and isinstance(error, Unavailable):  # in the middle of a body: its length tells the client, who asks for the rest
                scope["airlock"] |= {"cut": error.what, "fault": scope["airlock"].get("fault") or "store"}
                return
            ERRORS.exception("request %s failed", request)
            if seen["status"]:
                raise
            scope["airlock"] |= {"error": "internal", "fault": "internal"}
            await _bare(send, 500, {"error": "internal", "what": "the server failed", "do": f"quote request id {request}", "request_id": request})

    def _told(self, scope: Scope, note: dict[str, Any], seen: Mapping[str, int], received: int, began: tuple[int, float]) -> None:
        took = time.monotonic() - began[1]
        status, method = seen["status"], scope["method"]
        failure = {name: note.pop(name, "") for name in _FAILURES}
        if self.metrics is not None or self.tracing is not None:
            found = route(scope["path"], note.get("door", ""))
            if self.metrics is not None:
                self.metrics.observe(found, method, status, took, received, seen["bytes"])
                if status in (401, 402, 403) or failure["reason"] == "not_visible":
                    self.metrics.denied(failure["reason"] or "unauthenticated")
                if failure["fault"] and (status >= 500 or not status or failure["fault"] == "internal" or "cut" in note):
                    self.metrics.failed(failure["fault"])
            if self.tracing is not None:
                parent = next((v.decode("latin-1") for k, v in scope["headers"] if k == b"traceparent"), "")
                self.tracing.record(found, method, status, note["request_id"], parent, began[0], began[0] + int(took * 1e9))
        shown = {k: v for k, v in failure.items() if v} if status >= 400 or not status or "cut" in note else {}
        wanted = next((v.decode("latin-1")[:64] for k, v in scope["headers"] if k == b"range"), "")
        line = {**note, "method": method, "path": scope["path"][:1024], "range": wanted, **seen, "received": received, "seconds": round(took, 6)}
        ACCESS.info(json.dumps(line | shown))


async def _bare(send: Send, status: int, value: Mapping[str, str]) -> None:
    body = json.dumps(value).encode()
    head = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": status, "headers": head})
    await send({"type": "http.response.body", "body": body, "more_body": False})
