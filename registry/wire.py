"""uvicorn's HTTP protocol with two more abilities, offered as ASGI scope extensions; it knows no route, no key and no store.

`airlock.sendfile`: the message {"type": "airlock.sendfile", "file": f, "offset": lo, "count": n} is the whole body of a started response,
sent by the kernel. `airlock.body`: an application that sets scope["extensions"]["airlock.body"]["pieces"] = True receives `pieces`, a list
of bytes, in place of one joined `body`. Its `lend` is a context manager in which the application reads the rest of the body from the socket itself.
uvicorn is pinned, since the class below repeats one of its methods (docs/adr/0001-wire.md); both abilities are absent on TLS and on other servers.
"""

from __future__ import annotations

import asyncio
import os
import socket
import struct
import urllib.parse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

import httptools
from uvicorn.protocols.http.flow_control import service_unavailable
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from registry.crowd import Crowd
from registry.intake import Loan

SENDFILE = "airlock.sendfile"
BODY = "airlock.body"
SLICE = 8 * 1024 * 1024
HIGH_WATER = 256 * 1024
MAX_HEAD_BYTES = 64 * 1024
MAX_FIELDS = 200
STALL_S = 60.0
HEAD_S = 30.0
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
    """One request and its answer: request pieces are kept as a list or read by the application, and a file may be the answer's body."""

    def __init__(self, *args: Any, stall_s: float = STALL_S, go_on: Callable[[int], None], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.pieces: list[bytes] = []
        self.held = self.fed = 0
        self.stall_s = stall_s
        self.go_on = go_on

    def feed(self, piece: bytes) -> None:
        """Keeps one piece of the request body and stops reading when enough is held."""
        self.pieces.append(piece)
        self.held += len(piece)
        self.fed += len(piece)
        if self.held > HIGH_WATER:
            self.flow.pause_reading()
        self.message_event.set()

    def _length(self) -> int:
        """The Content-Length; 0 where the end of the body is told otherwise. The parser has refused what contradicts itself."""
        fields = {k: v for k, v in self.scope["headers"] if k in (b"content-length", b"transfer-encoding")}
        length = fields.get(b"content-length", b"").decode("latin-1").strip()
        return int(length) if length.isascii() and length.isdigit() and len(fields) == 1 else 0

    @contextmanager
    def lend(self) -> Iterator[Loan | None]:
        """Lends the rest of the body; None where its length is not told or all of it is here. What is not read from the loan comes by receive()."""
        left = self._length() - self.fed
        if left <= 0 or not self.more_body or self.disconnected or self.response_started or self.transport.is_closing():
            yield None
            return
        if self.waiting_for_100_continue:
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            self.waiting_for_100_continue = False
        self.flow.pause_reading()
        sock = socket.socket(fileno=os.dup(self.transport.get_extra_info("socket").fileno()))
        sock.setblocking(False)
        loan = Loan(self.pieces, sock, left)
        self.pieces, self.held = [], 0
        try:
            yield loan
        finally:
            sock.close()
            if not self.disconnected and not self.transport.is_closing():
                self.go_on(loan.left)
                self.flow.resume_reading()

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
    """HttpToolsProtocol that builds our Cycle, bounds the request head in size and in time, and never upgrades."""

    stall_s = STALL_S
    head_s = HEAD_S  # from the first moment of a connection, or the first byte of a next request, to the end of the head
    seeding = False  # while a new parser is brought to where the old one would be
    head_bytes = -1  # received since the piece in which an unfinished request head began; -1 between heads
    field_bytes = 0  # of the header fields of this request so far

    number = -1  # of the connection in the crowd
    head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        sock = transport.get_extra_info("socket")
        self.number = sock.fileno() if sock is not None else -1
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._head_came()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        # uvicorn's method, which loses the body, or what follows it, of a request that asks for an upgrade (RFC 9110 section 7.8: to be ignored).
        self._unset_keepalive_if_required()
        before = self.head_bytes
        try:
            self._parse(data)
        except httptools.HttpParserError:
            self.logger.warning("Invalid HTTP request received.")
            self.send_400_response("Invalid HTTP request received.")
            return
        if before >= 0 and self.head_bytes >= 0:
            self.head_bytes += len(data)
            if self.head_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
                self.send_400_response("The request head is too long.")
        if self.head_bytes >= 0 or self.cycle is None or self.cycle.response_complete:
            self._await_head()

    def _parse(self, data: bytes) -> None:
        """Feeds the parser; at the end of a head that asks for an upgrade, where the parser leaves HTTP, another goes on with what follows."""
        while True:
            try:
                self.parser.feed_data(data)
                return
            except httptools.HttpParserUpgrade as found:
                data = data[found.args[0] :]
                fields = [(k, v) for k, v in self.headers if k in (b"content-length", b"transfer-encoding")]
                self._seed(b"".join(k + b": " + v + b"\r\n" for k, v in fields))
                if not data:
                    return

    def _go_on(self, left: int) -> None:
        """A parser inside the body of the present request with `left` bytes to come: the old one does not know of those that were read past it."""
        self._seed(b"Content-Length: %d\r\n" % left)

    def _seed(self, framing: bytes) -> None:
        """A new parser behind the head of the present request, whose body is framed so."""
        keep = b"keep-alive" if self.cycle.keep_alive else b"close"
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
        self.seeding = True
        try:
            self.parser.feed_data(b"POST / HTTP/1.1\r\nConnection: " + keep + b"\r\n" + framing + b"\r\n")
        finally:
            self.seeding = False

    def _await_head(self) -> None:
        if self.head_timer is None and not self.transport.is_closing():
            self.head_timer = self.loop.call_later(self.head_s, self._head_late)

    def _head_came(self) -> None:
        if self.head_timer is not None:
            self.head_timer.cancel()
            self.head_timer = None

    def _head_late(self) -> None:
        """Closes a connection on which no head was completed in time; one that is still being answered keeps its answer."""
        self.head_timer = None
        if self.cycle is not None and not self.cycle.response_complete:
            self._await_head()
        elif self.transport.get_write_buffer_size():
            self.transport.abort()  # it takes nothing either, and a close would wait for it
        else:
            self.transport.close()

    def on_message_begin(self) -> None:
        if self.seeding:
            return
        super().on_message_begin()
        self.head_bytes = self.field_bytes = 0

    def on_url(self, url: bytes) -> None:
        if not self.seeding:
            super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        if self.seeding:
            return
        super().on_header(name, value)
        self.field_bytes += len(name) + len(value) + 4
        self._bound()

    def _bound(self) -> None:
        """Ends the parse of a head, or of trailers, over the limits even where all of it came in one read: the server answers 400."""
        if len(self.url) + self.field_bytes > MAX_HEAD_BYTES or len(self.headers) > MAX_FIELDS:
            raise httptools.HttpParserError("the request head is too long")

    def _should_upgrade(self) -> bool:
        return False

    def on_message_complete(self) -> None:
        if not self.parser.should_upgrade():  # else it is not: the body is read by the next parser
            super().on_message_complete()

    def on_response_complete(self) -> None:
        idle = not self.pipeline
        super().on_response_complete()
        if idle and isinstance(self.server_state, Crowd) and not self.transport.is_closing():
            self.server_state.idle(self.number)

    def on_headers_complete(self) -> None:
        # The body of uvicorn 0.54.0's method without its WebSocket branch; it names its cycle class itself, so it cannot be parametrised.
        if self.seeding:
            return
        self._bound()
        if self.parser.get_method() == b"CONNECT":
            raise httptools.HttpParserError("a tunnel is not served, and what follows such a head is no request")
        self.head_bytes = -1
        self._head_came()
        if isinstance(self.server_state, Crowd):
            self.server_state.busy(self.number)
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
            go_on=self._go_on,
        )
        if self.transport.get_extra_info("sslcontext") is None:
            scope["extensions"] = {BODY: {"lend": self.cycle.lend}, SENDFILE: {}}
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
