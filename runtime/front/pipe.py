"""Bytes between a client and the engine: one request each way, streams as they come; closing our side is what aborts the engine's work."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Protocol

import aiohttp
from aiohttp import web

from runtime.front.controls import renamed, written
from runtime.front.errors import Json, Refused, error_body, read_error
from runtime.launch import Launch
from runtime.supervisor import connector

ERROR_LIMIT = 1 << 20  # of an engine's error body that is read to be rewritten
ANSWER_LIMIT = 256 << 20  # of an answer that is not streamed: embeddings of a full batch fit, an engine gone mad does not
DONE = b"data: [DONE]"
PAGE_LIMIT = 16 << 20  # of an engine's metrics
SWEEP_S = 1.0


class Listener(Protocol):
    """Reads whole frames (each up to its blank line), gives what is sent for them, and knows when the last one came."""

    ended: bool

    def __call__(self, frames: bytes) -> bytes:
        """What is sent in place of the frames."""


class Pipe:
    """The connections to one engine, whose Launch may change with each of its starts."""

    def __init__(self, launch: Callable[[], Launch], scrub: Callable[[str], str], idle_s: float, answer_s: float) -> None:
        self._launch, self._scrub, self._idle_s, self._answer_s = launch, scrub, idle_s, answer_s
        self._session: aiohttp.ClientSession | None = None
        self._blocked: dict[web.StreamResponse, tuple[float, asyncio.Transport]] = {}
        self._sweeper: asyncio.Task[None] | None = None
        self.slow = 0

    async def open(self) -> None:
        """Before the first request."""
        launch, timeout = self._launch(), aiohttp.ClientTimeout(total=None, sock_connect=5)
        self._session = aiohttp.ClientSession(
            connector=connector(launch), timeout=timeout, headers=launch.headers, auto_decompress=False, cookie_jar=aiohttp.DummyCookieJar()
        )
        self._sweeper = asyncio.create_task(self._sweep())

    async def close(self) -> None:
        """After the last."""
        if self._sweeper:
            self._sweeper.cancel()
        if self._session:
            await self._session.close()

    async def read(self, path: str, most_s: float = 5.0) -> bytes:
        """What a GET of the engine answers with 200; empty otherwise."""
        assert self._session is not None
        with suppress(aiohttp.ClientError, TimeoutError, OSError):
            async with self._session.get(self._launch().url(path), timeout=aiohttp.ClientTimeout(total=most_s), allow_redirects=False) as answer:
                if answer.status == 200:
                    return await _all(answer, PAGE_LIMIT)
        return b""

    async def _post(self, path: str, body: bytes, request_id: str, model: str, silent_s: float) -> aiohttp.ClientResponse:
        assert self._session is not None
        headers = {"Content-Type": "application/json", "Accept": "*/*", "Accept-Encoding": "identity", "X-Request-Id": request_id}
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=5, sock_read=silent_s)
        upstream = await self._session.post(self._launch().url(path), data=body, headers=headers, timeout=timeout, allow_redirects=False)
        if upstream.status != 200:
            try:
                raise read_error(upstream.status, await _all(upstream, ERROR_LIMIT), model, self._scrub)
            finally:
                upstream.close()
        return upstream

    async def ask(self, path: str, body: Json, request_id: str, model: str) -> bytes:
        """The whole JSON answer of the engine; raises Refused: the engine's own error, 502 for what is no answer, 503, 504."""
        upstream = None
        try:
            upstream = await self._post(path, written(body), request_id, model, self._answer_s)
            data = await _all(upstream, ANSWER_LIMIT)
            if len(data) >= ANSWER_LIMIT:
                raise Refused(502, f"the engine's answer is longer than {ANSWER_LIMIT} bytes", "BadGateway")
            if upstream.content_type != "application/json" or data[:1] not in (b"{", b"["):
                raise Refused(502, "the engine's answer is no JSON", "BadGateway")
            return data
        except TimeoutError as e:
            raise Refused(504, f"the engine sent nothing for {self._answer_s:.0f} s", "GatewayTimeout") from e
        except (aiohttp.ClientError, OSError) as e:
            raise _gone(e) from e
        finally:
            # Closing, not releasing: the engine sees the end of the connection, aborts the request and frees its cache.
            if upstream is not None:
                upstream.close()

    async def stream(
        self,
        request: web.Request,
        path: str,
        body: Json,
        names: tuple[str, str],
        listener: Listener | None = None,
        first: Callable[[], None] = lambda: None,
    ) -> web.StreamResponse:
        """Server-sent events as they come, under the name asked for (`names`: the engine's, the caller's); a cut stream ends with an error frame."""
        upstream = None
        try:
            upstream = await self._post(path, written(body), str(request["id"]), names[1], self._idle_s)
            if upstream.content_type != "text/event-stream":
                raise Refused(502, "the engine's answer is no stream of events", "BadGateway")
            first()
            return await self._copy(request, upstream, names, listener)
        except TimeoutError as e:
            raise Refused(504, f"the engine sent nothing for {self._idle_s:.0f} s", "GatewayTimeout") from e
        except (aiohttp.ClientError, OSError) as e:
            if upstream is None and request.transport is None:
                raise
            raise _gone(e) from e
        finally:
            if upstream is not None:
                upstream.close()

    async def _copy(
        self, request: web.Request, upstream: aiohttp.ClientResponse, names: tuple[str, str], listener: Listener | None
    ) -> web.StreamResponse:
        out = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        out.headers["X-Request-Id"] = str(request["id"])
        await out.prepare(request)
        tail = rest = b""
        whole_frames = listener is not None or names[0] != names[1]
        why, transport, clock = "the engine ended during the answer", request.transport, time.monotonic
        try:
            async for chunk in upstream.content.iter_any():
                if whole_frames:
                    # Only whole frames are rewritten, so that a name is never cut in two.
                    whole, end, rest = (rest + chunk).rpartition(b"\n\n")
                    if len(rest) > ERROR_LIMIT:
                        why = "the engine sent a frame without an end"
                        break
                    chunk = renamed(whole + end, *names) if names[0] != names[1] else whole + end
                    chunk = listener(chunk) if listener else chunk
                    if not chunk:
                        continue
                tail = (tail + chunk)[-64:]
                try:
                    if transport is not None:
                        self._blocked[out] = (clock(), transport)
                    await out.write(chunk)
                except (ConnectionError, aiohttp.ClientConnectionResetError):
                    return out
                finally:
                    self._blocked.pop(out, None)
        except TimeoutError:
            why = f"the engine sent nothing for {self._idle_s:.0f} s"
        except (aiohttp.ClientError, OSError):
            pass
        if not (listener.ended if listener else DONE in tail):
            frame = b"data: " + json.dumps(error_body(500, why)).encode() + b"\n\n"
            with suppress(ConnectionError, aiohttp.ClientConnectionResetError):
                await out.write((b"" if tail.endswith(b"\n\n") or not tail else b"\n\n") + frame)
            out.force_close()
        with suppress(ConnectionError, aiohttp.ClientConnectionResetError):
            await out.write_eof()
        return out

    async def _sweep(self) -> None:
        """Cuts clients that take nothing for as long as an engine may send nothing: each holds a place and the engine's memory."""
        while True:
            await asyncio.sleep(SWEEP_S)
            late = time.monotonic() - self._idle_s
            for since, transport in list(self._blocked.values()):
                if since < late and not transport.is_closing():
                    self.slow += 1
                    transport.abort()


async def _all(answer: aiohttp.ClientResponse, limit: int) -> bytes:
    """The whole body, but no more than `limit` bytes of it."""
    data = bytearray()
    async for chunk in answer.content.iter_any():
        data += chunk[: limit - len(data)]
        if len(data) >= limit:
            break
    return bytes(data)


def _gone(error: Exception) -> Refused:
    if isinstance(error, aiohttp.ServerDisconnectedError | aiohttp.ClientConnectorError | ConnectionError | aiohttp.ClientPayloadError):
        return Refused(503, "the engine ended or does not answer; retry later", "ServiceUnavailable", headers={"Retry-After": "5"})
    return Refused(502, "the engine's answer is no HTTP", "BadGateway")
