"""A load client that costs little CPU beside the servers: plain sockets, bodies by sendfile, answers read into one buffer and thrown away.

Here because a client in Python's http.client would be the slower half of what is measured. It speaks just the HTTP/1.1 that the benchmarks need.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from _servers import Server

TIMEOUT_S = 120
GIB = 1024**3


@dataclass(frozen=True)
class Answer:
    """Status, header fields by lower-case name, and the length of the body that was read away."""

    status: int
    headers: dict[str, str]
    body: bytes
    size: int


class Connection:
    """One kept-alive connection to a server."""

    def __init__(self, server: Server, rcvbuf: int = 0) -> None:
        self.server = server
        self.sock = socket.socket()
        if rcvbuf:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, rcvbuf)
        self.sock.settimeout(TIMEOUT_S)
        self.sock.connect(("127.0.0.1", server.port))
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.buffer = bytearray(1024 * 1024)
        self.rest = b""

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.sock.close()

    def head(self, method: str, path: str, headers: dict[str, str] | None = None) -> bytes:
        """The bytes of a request's head with this server's authorization."""
        fields = {"Host": f"127.0.0.1:{self.server.port}", **({"Authorization": self.server.auth} if self.server.auth else {}), **(headers or {})}
        return (f"{method} {path} HTTP/1.1\r\n" + "".join(f"{k}: {v}\r\n" for k, v in fields.items()) + "\r\n").encode()

    def ask(self, method: str, path: str, headers: dict[str, str] | None = None, body: bytes = b"") -> Answer:
        """One request with a small body."""
        fields = dict(headers or {})
        if body or method in ("PUT", "POST", "PATCH"):
            fields["Content-Length"] = str(len(body))
        self.sock.sendall(self.head(method, path, fields) + body)
        return self.answer(keep=method != "HEAD", bodyless=method == "HEAD")

    def send_file(self, method: str, path: str, file: Path, headers: dict[str, str] | None = None) -> Answer:
        """One request whose body is a whole file with Content-Length."""
        size = file.stat().st_size
        self.sock.sendall(self.head(method, path, {**(headers or {}), "Content-Length": str(size), "Content-Type": "application/octet-stream"}))
        with file.open("rb") as source:
            self.sock.sendfile(source)
        return self.answer(keep=True)

    def send_chunked(self, method: str, path: str, file: Path, piece: int = 32 * 1024) -> Answer:
        """One request whose body is a file in chunks, as docker sends its layers."""
        self.sock.sendall(self.head(method, path, {"Transfer-Encoding": "chunked", "Content-Type": "application/octet-stream"}))
        with file.open("rb", buffering=0) as source:
            while data := source.read(piece):
                self.sock.sendall(b"%x\r\n%b\r\n" % (len(data), data))
        self.sock.sendall(b"0\r\n\r\n")
        return self.answer(keep=True)

    def answer(self, keep: bool = False, bodyless: bool = False, pause: Callable[[int], None] | None = None) -> Answer:
        """Reads one answer; the body is kept only where asked for; `pause` is called with each piece's length."""
        while b"\r\n\r\n" not in self.rest:
            got = self.sock.recv(65536)
            if not got:
                raise ConnectionError("the server closed the connection")
            self.rest += got
        raw, _, self.rest = self.rest.partition(b"\r\n\r\n")
        lines = raw.decode("latin-1").split("\r\n")
        headers = {k.lower(): v.strip() for k, _, v in (line.partition(":") for line in lines[1:])}
        status, size = int(lines[0].split()[1]), 0 if bodyless else int(headers.get("content-length", "0"))
        held, left = [self.rest[:size]], max(0, size - len(self.rest))
        self.rest = self.rest[size:]
        view = memoryview(self.buffer)
        while left:
            got_n = self.sock.recv_into(view[: min(left, len(view))])
            if not got_n:
                raise ConnectionError("the answer ended early")
            left -= got_n
            if keep:
                held.append(bytes(view[:got_n]))
            if pause:
                pause(got_n)
        return Answer(status, headers, b"".join(held) if keep else b"", size)


def expect(answer: Answer, *statuses: int) -> Answer:
    """The answer; raises RuntimeError for another status."""
    if answer.status not in statuses:
        raise RuntimeError(f"status {answer.status}: {answer.body[:500]!r}")
    return answer


def push(connection: Connection, repo: str, file: Path, digest: str, chunked: bool = False) -> None:
    """One blob by POST and PUT with its bytes; `chunked` by POST, one PATCH in chunks, and PUT, as docker does."""
    place = expect(connection.ask("POST", f"/v2/{repo}/blobs/uploads/"), 202).headers["location"]
    path = "/" + place.split("/", 3)[3] if place.startswith("http") else place
    if chunked:
        place = expect(connection.send_chunked("PATCH", path, file), 202).headers["location"]
        path = "/" + place.split("/", 3)[3] if place.startswith("http") else place
        expect(connection.ask("PUT", f"{path}{'&' if '?' in path else '?'}digest={digest}"), 201)
    else:
        expect(connection.send_file("PUT", f"{path}{'&' if '?' in path else '?'}digest={digest}", file), 201)


def pull(connection: Connection, path: str, span: tuple[int, int] | None = None) -> int:
    """One GET, of a range or whole; returns the bytes read."""
    headers = {"Range": f"bytes={span[0]}-{span[1] - 1}"} if span else {}
    connection.sock.sendall(connection.head("GET", path, headers))
    return expect(connection.answer(), 200, 206).size


def pull_in_parts(server: Server, path: str, size: int, parts: int) -> int:
    """One object in `parts` ranges at once; returns the bytes read."""
    step = -(-size // parts)
    got: list[int] = []

    def work(lo: int) -> None:
        with Connection(server) as connection:
            got.append(pull(connection, path, (lo, min(size, lo + step))))

    threads = [threading.Thread(target=work, args=(lo,)) for lo in range(0, size, step)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT_S)
    if sum(got) != size:
        raise RuntimeError(f"{sum(got)} of {size} bytes came")
    return size


@dataclass(frozen=True)
class Figure:
    """One measurement: wall seconds and the server's CPU-seconds for `count` bytes or requests."""

    seconds: float
    cpu: float
    count: int

    @property
    def mb_s(self) -> float:
        """Megabytes (10^6) a second."""
        return self.count / self.seconds / 1e6

    @property
    def cpu_per_gib(self) -> float:
        """CPU-seconds per GiB."""
        return self.cpu / (self.count / GIB)

    @property
    def per_cpu_s(self) -> float:
        """Requests per CPU-second of the server."""
        return self.count / max(self.cpu, 0.01)


def measured(server: Server, work: Callable[[], int]) -> Figure:
    """Runs work and counts what it took of the server."""
    cpu, began = server.cpu(), time.monotonic()
    count = work()
    return Figure(time.monotonic() - began, server.cpu() - cpu, count)


def random_file(path: Path, size: int) -> Path:
    """A file of random bytes that no two calls share, in the page cache."""
    with path.open("wb", buffering=0) as out:
        left = size
        while left:
            piece = os.urandom(min(left, 4 * 1024 * 1024))
            out.write(piece)
            left -= len(piece)
    with suppress(OSError):
        os.sync()
    return path
