"""File answers over a real socket, by the kernel's sendfile and by reads in a thread: the same bytes, the same failures."""

from __future__ import annotations

import asyncio
import hashlib
import os
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from artifact.errors import AirlockError, Unavailable
from artifact.store import Content, Descriptor, Upload
from registry import exchange, intake, wire
from registry.exchange import Exchange, Gone, Pools
from registry.front import Front
from tests.conftest import missing

pytestmark = pytest.mark.server
SIZE = 20 * 1024 * 1024 + 17


class Quick(wire.WireProtocol):
    """The wire with a short stall time."""

    stall_s = 0.5


class Sink(Upload):
    """Takes what is poured in; full at 1 MiB where it is told so."""

    id = "sink"

    def __init__(self, room: int | None = None) -> None:
        self.offset, self.room, self.suspended, self.hash = 0, room, False, hashlib.sha256()

    def write(self, view: bytes | memoryview) -> None:
        assert not self.suspended
        if self.room is not None and self.offset + len(view) > self.room:
            raise Unavailable("the disk is full", reason="disk_full")
        self.hash.update(view)
        self.offset += len(view)

    def commit(self, digest: str, size: int | None = None) -> Descriptor:
        raise AssertionError

    def suspend(self) -> None:
        self.suspended = True

    def cancel(self) -> None:
        raise AssertionError


@dataclass
class Site:
    """A running server over one file, and what its application saw."""

    port: int
    path: Path
    data: bytes
    kind: str
    bodies: list[tuple[int, bool]] = field(default_factory=list)
    sinks: list[Sink] = field(default_factory=list)

    def connect(self, rcvbuf: int = 0) -> socket.socket:
        sock = socket.socket()
        if rcvbuf:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, rcvbuf)
        sock.settimeout(20)
        sock.connect(("127.0.0.1", self.port))
        return sock

    def open_files(self) -> int:
        return sum(os.path.realpath(f"/proc/self/fd/{fd}") == str(self.path) for fd in os.listdir("/proc/self/fd"))


def application(site: Site) -> Any:
    pools = Pools(2, 2)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        x = Exchange(None, pools, scope, receive, send)  # type: ignore[arg-type]
        try:
            if x.path == "/before":
                raise RuntimeError("nobody expected this")
            if x.path == "/body":
                total = 0
                async for found in x.pieces():
                    total += sum(map(len, found))
                site.bodies.append((total, "airlock.body" in scope.get("extensions", {})))
                await x.answer(200, {}, str(total).encode())
                return
            if x.path == "/small":
                await x.answer(200, {}, await x.read_body(1 << 20, "the body"))
                return
            if x.path in ("/upload", "/full"):
                sink = Sink(1 << 20 if x.path == "/full" else None)
                site.sinks.append(sink)
                await x.pour(sink, int(x.param("most")) if x.param("most") else None)
                await x.answer(201, {"sha256": sink.hash.hexdigest()})
                return
            total = SIZE + 5 if x.path == "/long" else SIZE
            content = Content("sha256:x", "", total, 0, total, path=site.path)
            if x.path == "/after":
                await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"100")]})
                await send({"type": "http.response.body", "body": b"x" * 10, "more_body": True})
                raise RuntimeError("nobody expected this either")
            if x.path == "/shrinks":
                content = Content("sha256:x", "", SIZE, 0, SIZE, path=site.path.with_suffix(".shrinks"))

            async def again(_lo: int, _hi: int) -> Content:
                raise AssertionError

            await x.content(content, {"content-type": "application/octet-stream"}, again)
        except AirlockError as error:
            await x.answer(416 if error.code == "range_invalid" else 503, {}, error.what.encode())
        except Gone:
            await x.gone()

    return Front(app)


@pytest.fixture(params=["sendfile", "pread"])
def site(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Site]:
    data = os.urandom(1 << 20) * 21
    path = (tmp_path / "blob").resolve()
    path.write_bytes(data[:SIZE])
    path.with_suffix(".shrinks").write_bytes(data[:SIZE])
    sock = socket.socket()
    sock.bind(("127.0.0.1", 0))
    sock.listen(64)
    found = Site(sock.getsockname()[1], path, data[:SIZE], request.param)
    protocol: Any = Quick if request.param == "sendfile" else "httptools"
    config = uvicorn.Config(
        application(found), http=protocol, loop="asyncio", ws="none", lifespan="off", log_config=None, timeout_graceful_shutdown=1
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([sock])))
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield found
    server.should_exit = True
    thread.join(20)
    sock.close()


def ask(sock: socket.socket, path: str = "/", method: str = "GET", **headers: str) -> None:
    lines = "".join(f"{k.replace('_', '-')}: {v}\r\n" for k, v in headers.items())
    sock.sendall(f"{method} {path} HTTP/1.1\r\nHost: x\r\n{lines}\r\n".encode())


class Reader:
    """Reads answers off one connection."""

    def __init__(self, sock: socket.socket) -> None:
        self.file = sock.makefile("rb")

    def head(self) -> tuple[int, dict[str, str]]:
        line = self.file.readline()
        if not line:
            raise EOFError
        headers = {}
        while (row := self.file.readline().strip()) != b"":
            name, _, value = row.partition(b":")
            headers[name.decode().lower()] = value.strip().decode()
        return int(line.split()[1]), headers

    def answer(self) -> tuple[int, dict[str, str], bytes]:
        status, headers = self.head()
        return status, headers, self.file.read(int(headers.get("content-length", "0")))


def settled(check: Any) -> bool:
    until = time.monotonic() + 10
    while time.monotonic() < until:
        if check():
            return True
        time.sleep(0.02)
    return False


def test_whole_file_then_another_request_on_the_connection(site: Site) -> None:
    with site.connect() as sock:
        reader = Reader(sock)
        for _ in range(3):
            ask(sock)
            status, headers, body = reader.answer()
            assert (status, headers["content-length"], body) == (200, str(SIZE), site.data)
            assert len(headers["x-request-id"]) == 32
    assert settled(lambda: site.open_files() == 0)


@pytest.mark.parametrize(
    ("asked", "lo", "hi"),
    [
        ("bytes=500-1499", 500, 1500),
        ("bytes=500-", 500, SIZE),
        ("bytes=-500", SIZE - 500, SIZE),
        (f"bytes={SIZE - 48}-{SIZE + 900}", SIZE - 48, SIZE),
        ("bytes=0-0", 0, 1),
        ("bytes=8388600-8388700", 8388600, 8388701),
    ],
)
def test_ranges(site: Site, asked: str, lo: int, hi: int) -> None:
    with site.connect() as sock:
        ask(sock, Range=asked)
        status, headers, body = Reader(sock).answer()
    assert (status, headers["content-range"], headers["content-length"]) == (206, f"bytes {lo}-{hi - 1}/{SIZE}", str(hi - lo))
    assert body == site.data[lo:hi]


@pytest.mark.parametrize("asked", ["bytes=500-0", f"bytes={SIZE}-", "bytes=-0"])
def test_ranges_that_do_not_fit(site: Site, asked: str) -> None:
    with site.connect() as sock:
        ask(sock, Range=asked)
        assert Reader(sock).answer()[0] == 416


def test_several_ranges_are_answered_by_the_whole(site: Site) -> None:
    with site.connect() as sock:
        ask(sock, Range="bytes=0-1,5-6")
        status, _headers, body = Reader(sock).answer()
    assert (status, len(body)) == (200, SIZE)


def test_head_has_the_length_and_no_body(site: Site) -> None:
    with site.connect() as sock:
        reader = Reader(sock)
        ask(sock, method="HEAD")
        status, headers = reader.head()
        assert (status, headers["content-length"]) == (200, str(SIZE))
        ask(sock, Range="bytes=0-9")
        assert reader.answer()[2] == site.data[:10]


def test_a_client_that_leaves_closes_the_file(site: Site) -> None:
    sock = site.connect(rcvbuf=65536)
    ask(sock)
    assert len(sock.recv(1000)) > 0
    assert settled(lambda: site.open_files() == 1)
    sock.close()
    assert settled(lambda: site.open_files() == 0)


def test_pipelined_requests_are_answered_in_order(site: Site) -> None:
    asked = [(0, 9), (100, 5_000_000), (7, 7), (SIZE - 3, SIZE - 1)]
    with site.connect() as sock:
        sock.sendall(b"".join(f"GET / HTTP/1.1\r\nHost: x\r\nRange: bytes={lo}-{hi}\r\n\r\n".encode() for lo, hi in asked))
        reader = Reader(sock)
        for lo, hi in asked:
            assert reader.answer()[2] == site.data[lo : hi + 1]


def test_an_error_before_the_answer_is_a_bare_500(site: Site) -> None:
    with site.connect() as sock:
        ask(sock, "/before")
        status, headers, body = Reader(sock).answer()
    assert status == 500
    assert b"nobody expected" not in body and headers["x-request-id"].encode() in body


def test_an_error_after_the_start_breaks_the_connection(site: Site) -> None:
    with site.connect() as sock:
        ask(sock, "/after")
        reader = Reader(sock)
        assert reader.head()[0] == 200
        assert len(reader.file.read(100)) == 10


def test_a_file_that_is_too_short_from_the_start_is_an_error(site: Site) -> None:
    with site.connect() as sock:
        ask(sock, "/long")
        assert Reader(sock).answer()[0] == 503


def test_a_file_that_is_cut_while_it_is_sent_breaks_the_connection(site: Site) -> None:
    short = site.path.with_suffix(".shrinks")
    with site.connect(rcvbuf=65536) as sock:
        ask(sock, "/shrinks")
        reader = Reader(sock)
        assert reader.head()[0] == 200
        assert len(reader.file.read(65536)) == 65536
        os.truncate(short, SIZE - 1_000_000)
        got = 65536
        try:
            while piece := reader.file.read(1 << 20):
                got += len(piece)
        except ConnectionResetError:
            pass
    assert got < SIZE


@pytest.mark.parametrize("site", ["sendfile"], indirect=True)  # only our own protocol has the stall time
def test_a_stalled_client_is_given_up(site: Site) -> None:
    with site.connect(rcvbuf=65536) as sock:
        ask(sock)
        assert settled(lambda: site.open_files() == 1)
        assert settled(lambda: site.open_files() == 0)


def test_a_slow_client_is_not_given_up(site: Site) -> None:
    with site.connect(rcvbuf=262144) as sock:
        ask(sock, Range="bytes=0-8388607")
        reader = Reader(sock)
        reader.head()
        got = bytearray()
        began = time.monotonic()
        while len(got) < 8388608 and time.monotonic() - began < 2.0:
            got += reader.file.read(65536)
            time.sleep(0.02)
        got += reader.file.read(8388608 - len(got))
    assert bytes(got) == site.data[:8388608]


def test_bodies_arrive_whole_and_in_pieces(site: Site) -> None:
    data = os.urandom(3_000_001)
    with site.connect() as sock:
        reader = Reader(sock)
        ask(sock, "/body", "PUT", Content_Length=str(len(data)))
        sock.sendall(data)
        assert reader.answer()[2] == str(len(data)).encode()
        ask(sock, "/body", "PUT", Transfer_Encoding="chunked")
        for at in range(0, len(data), 100_000):
            part = data[at : at + 100_000]
            sock.sendall(b"%x\r\n" % len(part) + part + b"\r\n")
        sock.sendall(b"0\r\n\r\n")
        assert reader.answer()[2] == str(len(data)).encode()
    assert site.bodies == [(len(data), site.kind == "sendfile")] * 2


@pytest.mark.parametrize("site", ["sendfile"], indirect=True)  # the bound is our own protocol's
def test_a_request_head_has_a_bound(site: Site) -> None:
    with site.connect() as sock:
        try:
            sock.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n" + b"A: " + b"x" * 1_000_000)
            assert Reader(sock).head()[0] == 400
        except (ConnectionResetError, BrokenPipeError):
            pass


@pytest.mark.parametrize("site", ["sendfile"], indirect=True)  # the bound is our own protocol's
@pytest.mark.parametrize(
    "head",
    [b"GET / HTTP/1.1\r\n" + b"X: a\r\n" * 201, b"GET / HTTP/1.1\r\nX: " + b"a" * 70_000 + b"\r\n", b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\n"],
)
def test_a_whole_head_over_the_bound_is_refused_however_it_arrives(site: Site, head: bytes) -> None:
    class Transport(asyncio.Transport):
        def __init__(self) -> None:
            super().__init__()
            self.sent, self.shut = b"", False

        def write(self, data: bytes | bytearray | memoryview) -> None:
            self.sent += bytes(data)

        def close(self) -> None:
            self.shut = True

        def is_closing(self) -> bool:
            return self.shut

    async def one_read() -> Transport:
        config = uvicorn.Config(application(site), http=Quick, ws="none", lifespan="off", log_config=None)
        config.load()
        protocol, transport = Quick(config, uvicorn.server.ServerState(), {}), Transport()
        protocol.connection_made(transport)
        protocol.data_received(head + b"Host: x\r\n\r\n")  # all of it in one read, as a fast client's head may come
        return transport

    found = asyncio.run(one_read())
    assert found.shut and found.sent.startswith(b"HTTP/1.1 400")
    with site.connect() as sock:
        sock.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n" + b"X: a\r\n" * 150 + b"\r\n")
        assert Reader(sock).head()[0] == 200


# ---- uploads: by a loan of the socket, and by pieces


@pytest.mark.parametrize("size", [1, 70_000, 700_001, 9_000_003])
@pytest.mark.parametrize("pause", [False, True])
def test_an_upload_arrives_whole_and_the_next_request_behind_it_too(site: Site, size: int, pause: bool) -> None:
    data, small = os.urandom(size), os.urandom(100_000)
    with site.connect() as sock:
        reader = Reader(sock)
        head = b"PUT /upload HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n"
        both = head % size + data + head % len(small) + small + b"GET / HTTP/1.1\r\nHost: x\r\nRange: bytes=5-9\r\n\r\n"
        sender = threading.Thread(target=send_all, args=(sock, both, len(both) // 7 + 77 if pause else len(both)))
        sender.start()
        for body in (data, small):
            status, headers, _ = reader.answer()
            assert (status, headers["sha256"]) == (201, hashlib.sha256(body).hexdigest())
        assert reader.answer()[2] == site.data[5:10]
        sender.join(20)
        for _ in range(2):  # and the connection goes on
            ask(sock, "/upload", "PUT", Content_Length="3")
            sock.sendall(b"abc")
            assert reader.answer()[1]["sha256"] == hashlib.sha256(b"abc").hexdigest()


def send_all(sock: socket.socket, data: bytes, step: int) -> None:
    for at in range(0, len(data), step):
        sock.sendall(data[at : at + step])
        time.sleep(0.2)


def test_a_chunked_upload_arrives_whole(site: Site) -> None:
    data = os.urandom(2_500_000)
    with site.connect() as sock:
        ask(sock, "/upload", "PATCH", Transfer_Encoding="chunked")
        for at in range(0, len(data), 32768):
            part = data[at : at + 32768]
            sock.sendall(b"%x\r\n" % len(part) + part + b"\r\n")
        sock.sendall(b"0\r\n\r\nGET / HTTP/1.1\r\nHost: x\r\nRange: bytes=0-1\r\n\r\n")
        reader = Reader(sock)
        assert reader.answer()[1]["sha256"] == hashlib.sha256(data).hexdigest()
        assert reader.answer()[2] == site.data[:2]


@pytest.mark.parametrize("sent", [10, 3_000_000])
@pytest.mark.parametrize("how", ["close", "half", "reset"])
def test_a_client_that_leaves_in_its_upload_leaves_what_came(site: Site, sent: int, how: str) -> None:
    data = os.urandom(sent)
    sock = site.connect()
    ask(sock, "/upload", "PUT", Content_Length="9000000")
    sock.sendall(data)
    assert settled(lambda: site.sinks)
    if how == "half":
        sock.shutdown(socket.SHUT_WR)
    elif how == "reset":
        assert settled(lambda: site.sinks[0].offset >= sent - 600_000)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        sock.close()
    else:
        sock.close()
    assert settled(lambda: site.sinks[0].suspended)
    assert site.sinks[0].offset <= sent
    if how != "reset":  # a reset may take what the kernel still held
        assert site.sinks[0].hash.hexdigest() == hashlib.sha256(data).hexdigest()
    sock.close()
    with site.connect() as other:
        ask(other, Range="bytes=0-9")
        assert Reader(other).answer()[2] == site.data[:10]


def test_a_stalled_upload_is_ended_and_told(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange, "STALL_S", 3.0)
    with site.connect() as sock:
        ask(sock, "/upload", "PUT", Content_Length="9000000")
        sock.sendall(b"x" * 2_000_000)
        status, headers, _ = Reader(sock).answer()
        assert (status, headers["connection"]) == (408, "close")
    assert site.sinks[0].suspended and site.sinks[0].offset == 2_000_000


def test_a_small_body_may_not_come_byte_by_byte_for_ever(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """No pause is long enough to be a stall, yet all of it together takes too long; what comes in time is read."""
    monkeypatch.setattr(exchange, "SMALL_BODY_S", 4.0)
    with site.connect() as sock:
        ask(sock, "/small", "PUT", Content_Length="3")
        sock.sendall(b"abc")
        assert Reader(sock).answer()[2] == b"abc"
    with site.connect() as sock:
        ask(sock, "/small", "PUT", Content_Length="100000")
        begun = time.monotonic()
        sock.settimeout(0.2)
        got = b""
        while not got and time.monotonic() - begun < 40:
            sock.sendall(b"x")
            try:
                got = sock.recv(65536)
            except TimeoutError:
                continue
        assert got.startswith(b"HTTP/1.1 408 ") and b"connection: close" in got.lower()
        assert 3 < time.monotonic() - begun < 40


def test_slow_uploads_hold_no_thread(site: Site) -> None:
    socks = [site.connect() for _ in range(12)]  # the server of this test has two byte threads
    for sock in socks:
        ask(sock, "/upload", "PUT", Content_Length="1000000")
        sock.sendall(b"y" * 400_000)
    assert settled(lambda: len(site.sinks) == 12)
    with site.connect() as other:
        ask(other, "/upload", "PUT", Content_Length="5000000")
        other.sendall(b"z" * 5_000_000)
        assert Reader(other).answer()[0] == 201
    for sock in socks:
        sock.sendall(b"y" * 600_000)
        assert Reader(sock).answer()[1]["sha256"] == hashlib.sha256(b"y" * 1_000_000).hexdigest()
        sock.close()


def test_a_full_disk_is_told_and_the_connection_goes_on(site: Site) -> None:
    with site.connect() as sock:
        reader = Reader(sock)
        ask(sock, "/full", "PUT", Content_Length="5000000")
        sock.sendall(b"x" * 5_000_000)
        status, _headers, body = reader.answer()
        assert (status, body) == (503, b"the disk is full")
        assert site.sinks[0].suspended
        ask(sock, Range="bytes=0-9")
        assert reader.answer()[2] == site.data[:10]


def test_a_body_of_another_length_than_its_range_is_refused_unread(site: Site) -> None:
    with site.connect() as sock:
        reader = Reader(sock)
        ask(sock, "/upload?most=1000000", "PATCH", Content_Length="2000000")
        sock.sendall(b"x" * 2_000_000)
        assert reader.answer()[0] == 416
        ask(sock, Range="bytes=0-9")
        assert reader.answer()[2] == site.data[:10]


def test_a_client_that_expects_100_is_told_to_go_on(site: Site) -> None:
    data = os.urandom(2_000_000)
    with site.connect() as sock:
        reader = Reader(sock)
        ask(sock, "/upload", "PUT", Content_Length=str(len(data)), Expect="100-continue")
        assert reader.head()[0] == 100
        sock.sendall(data)
        assert reader.answer()[1]["sha256"] == hashlib.sha256(data).hexdigest()
        ask(sock, Range="bytes=0-9")
        assert reader.answer()[2] == site.data[:10]


@pytest.mark.parametrize("head", ["HTTP/1.1\r\nConnection: close", "HTTP/1.0\r\nX: y"])
def test_an_upload_on_a_connection_that_ends_with_it(site: Site, head: str) -> None:
    data = os.urandom(2_000_000)
    with site.connect() as sock:
        sock.sendall(f"PUT /upload {head}\r\nHost: x\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data)
        reader = Reader(sock)
        assert reader.answer()[1]["sha256"] == hashlib.sha256(data).hexdigest()
        assert reader.file.read() == b""


@pytest.mark.parametrize("site", ["sendfile"], indirect=True)
def test_a_turn_is_bounded(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intake, "TURN", 1)
    monkeypatch.setattr(intake, "BUFFER", 1000)
    data = os.urandom(1_500_017)
    with site.connect() as sock:
        reader = Reader(sock)
        ask(sock, "/upload", "PUT", Content_Length=str(len(data)))
        sock.sendall(data)
        assert reader.answer()[1]["sha256"] == hashlib.sha256(data).hexdigest()
        ask(sock, Range="bytes=0-9")
        assert reader.answer()[2] == site.data[:10]


# ---- requests that ask for an upgrade, which is never done (RFC 9110 section 7.8), and heads that do not end

UPGRADE = b"Host: x\r\nUpgrade: h2c\r\nConnection: Upgrade, HTTP2-Settings\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\n"
HIDDEN = b"GET / HTTP/1.1\r\nHost: x\r\nRange: bytes=0-0\r\n\r\n"  # a body that would be a request, were it not read as a body


def framed(body: bytes, chunked: bool) -> tuple[bytes, bytes]:
    if not chunked:
        return b"Content-Length: %d\r\n\r\n" % len(body), body
    parts = [body[at : at + 50_000] for at in range(0, len(body), 50_000)]
    return b"Transfer-Encoding: chunked\r\n\r\n", b"".join(b"%x\r\n" % len(p) + p + b"\r\n" for p in parts) + b"0\r\n\r\n"


@pytest.mark.parametrize("site", ["sendfile"], indirect=True)
@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("path", [b"/upload", b"/body"])
@pytest.mark.parametrize("how", ["together", "head first", "in the head", "last byte"])
@pytest.mark.parametrize("body", [HIDDEN, HIDDEN * 20_000], ids=["small", "large"])
def test_a_body_behind_an_upgrade_is_read_as_a_body(site: Site, chunked: bool, path: bytes, how: str, body: bytes) -> None:
    fields, sent = framed(body, chunked)
    head = b"PUT " + path + b" HTTP/1.1\r\n" + UPGRADE + fields
    behind = b"GET / HTTP/1.1\r\nHost: x\r\nRange: bytes=5-9\r\n\r\n"
    everything = head + sent + behind
    cut = {"together": 0, "head first": len(head), "in the head": len(head) - 3, "last byte": len(everything) - 1}[how]
    with site.connect() as sock:
        for part in (everything[:cut], everything[cut:]):
            sock.sendall(part)
            time.sleep(0.1 if cut else 0)
        reader = Reader(sock)
        status, headers, told = reader.answer()
        if path == b"/upload":
            assert (status, headers["sha256"]) == (201, hashlib.sha256(body).hexdigest())
        else:
            assert (status, told) == (200, str(len(body)).encode())
        status, headers, told = reader.answer()
        assert (status, told, headers["content-range"]) == (206, site.data[5:10], f"bytes 5-9/{SIZE}")
        ask(sock, "/body", "PUT", Content_Length="0")
        assert reader.answer()[2] == b"0", "nothing but the three was answered"


@pytest.mark.parametrize("site", ["sendfile"], indirect=True)
def test_what_follows_an_upgrade_without_a_body_is_answered_and_a_tunnel_is_not(site: Site) -> None:
    with site.connect() as sock:
        asked = b"GET / HTTP/1.1\r\nRange: bytes=1-1\r\n" + UPGRADE + b"\r\n"
        sock.sendall(asked + asked + b"GET / HTTP/1.1\r\nHost: x\r\nRange: bytes=2-3\r\n\r\n")
        reader = Reader(sock)
        assert [reader.answer()[2] for _ in range(3)] == [site.data[1:2], site.data[1:2], site.data[2:4]]
    for head in (b"CONNECT x:80 HTTP/1.1\r\nHost: x\r\n", b"PUT /upload HTTP/1.1\r\n" + UPGRADE + b"Transfer-Encoding: gzip\r\n"):
        with site.connect() as sock:
            sock.sendall(head + b"Content-Length: %d\r\n\r\n" % len(HIDDEN) + HIDDEN)
            reader = Reader(sock)
            assert reader.answer()[0] == 400 and reader.file.read() == b""


@pytest.mark.parametrize("site", ["sendfile"], indirect=True)
def test_curl_that_would_like_http2_loses_nothing(site: Site, tmp_path: Path) -> None:
    curl = shutil.which("curl")
    if curl is None:
        missing("curl")
    body = tmp_path / "body"
    body.write_bytes(os.urandom(700_001))
    for more in ([], ["-H", "Transfer-Encoding: chunked"]):
        argv = [str(curl), "-sS", "--http2", "-m", "60", "-X", "PATCH", "--data-binary", f"@{body}", "-H", "Expect:", *more]
        done = subprocess.run([*argv, f"http://127.0.0.1:{site.port}/body"], capture_output=True, timeout=90, check=False)
        assert (done.stdout, done.stderr) == (b"700001", b"")


@pytest.mark.parametrize("site", ["sendfile"], indirect=True)
def test_a_head_has_a_time_from_the_first_moment_and_from_the_first_byte_of_the_next(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Quick, "head_s", 2.0)
    one = b"GET / HTTP/1.1\r\nHost: x\r\nRange: bytes=0-9\r\n\r\n"
    began = {b"": b"", b"half": b"GET / HTTP/1.1\r\nX: ", b"next": one + b"GET /", b"blank": one}
    socks = {site.connect(): (name, first) for name, first in began.items()}
    for sock, (_name, first) in socks.items():
        sock.sendall(first)
    ended: set[bytes] = set()
    until = time.monotonic() + 20  # the time of a connection that was answered and says nothing is 5 s here, and longer where it trickles
    while len(ended) < len(socks) and time.monotonic() < until:
        for sock, (name, first) in socks.items():
            if name not in ended:
                try:
                    if first:
                        sock.sendall(b"\r\n" if name == b"blank" else b"a")
                    sock.settimeout(0.2)
                    if not sock.recv(65536):
                        ended.add(name)
                except TimeoutError:
                    pass
                except OSError:
                    ended.add(name)
    assert ended == set(began)
    with site.connect(rcvbuf=65536) as sock:  # and an answer in progress outlives the time of the head behind it
        sock.sendall(one.replace(b"0-9", b"0-8388607") + b"GET / HT")
        reader = Reader(sock)
        reader.head()
        got = b""
        for _ in range(12):
            got += reader.file.read(262144)
            time.sleep(0.3)
        assert got + reader.file.read(8388608 - len(got)) == site.data[:8388608]
