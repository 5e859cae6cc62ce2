"""uvicorn's HTTP protocol with two more abilities, offered as ASGI scope extensions; it knows no route, no key and no store.

`airlock.sendfile`: the message {"type": "airlock.sendfile", "file": f, "offset": lo, "count": n} is the whole body of a started response,
sent by the kernel. `airlock.body`: an application that sets scope["extensions"]["airlock.body"]["pieces"] = True receives `pieces`, a list
of bytes, in place of one joined `body`.
uvicorn is pinned, since the class below repeats one of its methods (docs/adr/0001-wire.md); both abilities are absent on TLS and on other servers.
"""

from __future__ import annotations

import asyncio
import socket
import struct
import urllib.parse
from typing import Any, BinaryIO

import httptools
from uvicorn.protocols.http.flow_control import service_unavailable
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

SENDFILE = "airlock.sendfile"
BODY = "airlock.body"
SLICE = 8 * 1024 * 1024
HIGH_WATER = 256 * 1024
MAX_HEAD_BYTES = 64 * 1024
MAX_FIELDS = 200
STALL_S = 60.0
_BYTES_ACKED = 120  # offset of tcpi_bytes_acked in Linux' struct tcp_info


def _acknowledged(transport: asyncio.Transport) -> int:
    """Bytes that the peer's kernel took so far; -1 where the socket cannot say."""
    sock = transport.get_extra_info("socket")
    try:
        info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _BYTES_ACKED + 8)
        return int(struct.unpack_from("=Q", info, _BYTES_ACKED)[0])
    except (OSError, struct.error, AttributeError):
        return -1


class Cycle(RequestResponseCycle):
    """One request and its answer: request pieces are kept as a list, and a file may be the answer's body."""

    def __init__(self, *args: Any, stall_s: float = STALL_S, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.pieces: list[bytes] = []
        self.held = 0
        self.stall_s = stall_s

    def feed(self, piece: bytes) -> None:
        """Keeps one piece of the request body and stops reading when enough is held."""
        self.pieces.append(piece)
        self.held += len(piece)
        if self.held > HIGH_WATER:
            self.flow.pause_reading()
        self.message_event.set()

    async def receive(self) -> Any:
        if self.disconnected and self.pieces and not self.response_complete:
            message: Any = {"type": "http.request", "more_body": self.more_body}  # what arrived before the client left
        else:
            message = await super().receive()
        if message["type"] != "http.request":
            return message
        pieces, self.pieces, self.held = self.pieces, [], 0
        if self.scope["extensions"][BODY].get("pieces"):
            message["pieces"] = pieces
        else:
            message["body"] = b"".join(pieces)
        return message

    async def send(self, message: Any) -> None:
        if message["type"] != SENDFILE:
            await super().send(message)
            return
        message["sent"] = 0  # what truly left, for those who count
        if self.disconnected:
            return
        if not self.response_started or self.response_complete or self.chunked_encoding or message["count"] != self.expected_content_length:
            raise RuntimeError("airlock.sendfile needs a started answer whose Content-Length is the count")
        if await self._send_file(message, message["offset"], message["count"]):
            self.expected_content_length = 0
            await super().send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send_file(self, message: Any, at: int, left: int) -> bool:
        """Sends [at, at + left) in slices; False when the connection had to be broken, as the length was already promised."""
        while left:
            try:
                sent = await self._slice(message["file"], at, min(SLICE, left))
            except asyncio.CancelledError:
                self.transport.abort()
                raise
            except (OSError, RuntimeError, asyncio.SendfileNotAvailableError):
                sent = 0
            if not sent:  # the client is gone or stalled, or the file is shorter than promised: never pad
                self.disconnected = True
                self.transport.abort()
                return False
            at, left = at + sent, left - sent
            message["sent"] += sent
        return True

    async def _slice(self, file: BinaryIO, at: int, count: int) -> int:
        """One sendfile; a client that acknowledges nothing for a whole stall time is given up, a slow one is not."""
        loop = asyncio.get_running_loop()
        task = asyncio.ensure_future(loop.sendfile(self.transport, file, at, count, fallback=False))
        before = _acknowledged(self.transport)
        try:
            while not (await asyncio.wait({task}, timeout=self.stall_s))[0]:
                now = _acknowledged(self.transport)
                if now <= before:
                    return 0
                before = now
            return task.result()
        finally:
            if not task.done():
                task.cancel()
                await asyncio.wait({task})


class WireProtocol(HttpToolsProtocol):
    """HttpToolsProtocol that builds our Cycle, bounds the request head and never upgrades."""

    stall_s = STALL_S
    head_bytes = -1  # received since the piece in which an unfinished request head began; -1 between heads
    field_bytes = 0  # of the header fields of this request so far

    def data_received(self, data: bytes) -> None:
        before = self.head_bytes
        super().data_received(data)
        if before >= 0 and self.head_bytes >= 0:
            self.head_bytes += len(data)
            if self.head_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
                self.send_400_response("The request head is too long.")

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.head_bytes = self.field_bytes = 0

    def on_header(self, name: bytes, value: bytes) -> None:
        super().on_header(name, value)
        self.field_bytes += len(name) + len(value) + 4
        self._bound()

    def _bound(self) -> None:
        """Ends the parse of a head, or of trailers, over the limits even where all of it came in one read: the server answers 400."""
        if len(self.url) + self.field_bytes > MAX_HEAD_BYTES or len(self.headers) > MAX_FIELDS:
            raise httptools.HttpParserError("the request head is too long")

    def _should_upgrade(self) -> bool:
        return False

    def on_headers_complete(self) -> None:
        # The body of uvicorn 0.54.0's method without its WebSocket branch; it names its cycle class itself, so it cannot be parametrised.
        self._bound()
        self.head_bytes = -1
        version = self.parser.get_http_version()
        scope: Any = self.scope
        scope["method"] = self.parser.get_method().decode("ascii")
        if version != "1.1":
            scope["http_version"] = version
        url = httptools.parse_url(self.url)
        path = url.path.decode("ascii")
        scope["path"] = self.root_path + (urllib.parse.unquote(path) if "%" in path else path)
        scope["raw_path"] = self.root_path.encode("ascii") + url.path
        scope["query_string"] = url.query or b""
        scope["extensions"] = {BODY: {}}
        if self.transport.get_extra_info("sslcontext") is None:
            scope["extensions"][SENDFILE] = {}
        limit = self.limit_concurrency
        busy = limit is not None and (len(self.connections) >= limit or len(self.tasks) >= limit)
        existing = self.cycle
        self.cycle = Cycle(
            scope=scope,
            transport=self.transport,
            flow=self.flow,
            logger=self.logger,
            access_logger=self.access_logger,
            access_log=self.access_log,
            default_headers=self.server_state.default_headers,
            message_event=asyncio.Event(),
            expect_100_continue=self.expect_100_continue,
            keep_alive=version != "1.0" and self.parser.should_keep_alive(),
            on_response=self.on_response_complete,
            stall_s=self.stall_s,
        )
        app: Any = service_unavailable if busy else self.app
        if existing is None or existing.response_complete:
            self._start_asgi_task(self.cycle, app)
        else:  # pipelined: answered in order
            self.flow.pause_reading()
            self.pipeline.appendleft((self.cycle, app))

    def on_body(self, body: bytes) -> None:
        cycle = self.cycle
        if isinstance(cycle, Cycle) and not cycle.response_complete:
            cycle.feed(body)
