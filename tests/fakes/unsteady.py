"""A loopback proxy of one HTTP server that does what networks and loaded servers do: drops, delays, 503, half answers, flipped bytes.

It changes nothing that it was not told to, and writes down every request, so that a test can count what was tried again.
"""

from __future__ import annotations

import re
import socket
import threading
from contextlib import suppress
from dataclasses import dataclass
from typing import BinaryIO

BUSY = b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>please reduce your rate</Message></Error>"


@dataclass
class Fault:
    """What happens to the next `times` requests whose line matches: refuse, lose_request, lose_answer, half, busy, flip, hang, slow (5 s)."""

    kind: str
    match: str = ""
    times: int = 1


class Unsteady:
    """The proxy, listening from its start to close()."""

    def __init__(self, port: int) -> None:
        self.upstream = port
        self.faults: list[Fault] = []
        self.seen: list[str] = []
        self.heads: list[bytes] = []
        self._lock, self._over = threading.Lock(), threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.port}"

    def plan(self, kind: str, match: str = "", times: int = 1) -> None:
        """Adds a fault."""
        with self._lock:
            self.faults.append(Fault(kind, match, times))

    def count(self, match: str) -> int:
        """How many requests matched."""
        return sum(bool(re.search(match, line)) for line in self.seen)

    def close(self) -> None:
        """Stops listening and lets go of what hangs."""
        self._over.set()
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while not self._over.is_set():
                client, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _fault(self, line: str) -> str:
        with self._lock:
            self.seen.append(line)
            for fault in self.faults:
                if fault.times and re.search(fault.match, line):
                    fault.times -= 1
                    return fault.kind
        return ""

    def _serve(self, client: socket.socket) -> None:
        with client, suppress(OSError), client.makefile("rb") as stream:
            while head := _head(stream):
                line = head.split(b"\r\n", 1)[0].decode("latin-1").rsplit(" ", 1)[0]
                if b"expect: 100-continue" in head.lower():
                    client.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
                found = re.search(rb"(?i)\r\ncontent-length: *(\d+)", head)
                body = stream.read(int(found.group(1))) if found else b""
                self.heads.append(head)
                if not self._answer(client, self._fault(line), head, body):
                    return

    def _answer(self, client: socket.socket, kind: str, head: bytes, body: bytes) -> bool:
        """Whether the connection goes on."""
        if kind in ("refuse", "lose_request"):
            return False
        if kind == "hang":
            self._over.wait(60)
            return False
        if kind == "slow":
            self._over.wait(5)
        if kind == "busy":
            client.sendall(b"HTTP/1.1 503 Slow Down\r\nContent-Type: application/xml\r\nContent-Length: %d\r\n\r\n%s" % (len(BUSY), BUSY))
            return True
        if kind == "flip" and body:
            body = body[: len(body) // 2] + bytes([body[len(body) // 2] ^ 1]) + body[len(body) // 2 + 1 :]
        answer = self._forward(head, body)
        if kind == "lose_answer":
            return False
        client.sendall(answer[: len(answer) - max(1, len(answer) // 3)] if kind == "half" else answer)
        return False

    def _forward(self, head: bytes, body: bytes) -> bytes:
        head = re.sub(rb"(?i)\r\n(?:connection|expect):[^\r]*", b"", head).removesuffix(b"\r\n\r\n") + b"\r\nConnection: close\r\n\r\n"
        with socket.create_connection(("127.0.0.1", self.upstream), timeout=60) as server:
            server.sendall(head + body)
            pieces = []
            while piece := server.recv(1 << 20):
                pieces.append(piece)
        return b"".join(pieces)


def _head(stream: BinaryIO) -> bytes:
    """One request head up to its empty line; empty at the end of the connection."""
    lines = []
    while line := stream.readline(65536):
        lines.append(line)
        if line == b"\r\n":
            return b"".join(lines)
    return b""
