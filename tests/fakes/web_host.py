"""What the stand-ins of the Hub and of NGC share: hosts that answer, refuse and log alike; standard library only, no code of the project.

The stand-ins lie beside it and are run as programs (`python tests/fakes/hub.py`), so that they find it by its bare name.
"""

from __future__ import annotations

import json
import ssl
import threading
import time
from abc import ABC, abstractmethod
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import BinaryIO
from urllib.parse import parse_qs, unquote, urlsplit

SLICE = 256 * 1024


class Refused(Exception):
    """An answer other than success: status, words, error code, further headers."""

    def __init__(self, status: int, words: str, code: str = "", **headers: str) -> None:
        super().__init__(words)
        self.status, self.words, self.code = status, words, code
        self.headers = {k.replace("_", "-"): v for k, v in headers.items()}


class Shared:
    """What all hosts of one stand-in share: the log file, and the bytes a second of all connections together."""

    def __init__(self, log: str, throttle: int) -> None:
        self.log, self.throttle = log, throttle
        self.lock, self.due = threading.Lock(), time.monotonic()

    def note(self, entry: dict) -> None:
        if self.log:
            with self.lock, open(self.log, "a") as out:
                out.write(json.dumps(entry) + "\n")

    def pace(self, count: int) -> None:
        if self.throttle:
            with self.lock:
                self.due = max(self.due, time.monotonic()) + count / self.throttle
                wait = self.due - time.monotonic()
            time.sleep(max(0.0, wait))


class Server(ThreadingHTTPServer):
    """One host of a stand-in."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, port: int, handler: type, shared: Shared) -> None:
        super().__init__(("127.0.0.1", port), handler)
        self.shared = shared

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hung up is not worth a traceback."""


class Host(BaseHTTPRequestHandler, ABC):
    """Reading, answering and logging; a host of its own says its name, its routes and what a refusal looks like."""

    protocol_version = "HTTP/1.1"
    server: Server
    host = ""
    sent, status = 0, 0

    def log_message(self, *args: object) -> None:
        """The log file is written at the end of each request instead."""

    def answer(self) -> None:
        self.sent = self.status = 0
        url = urlsplit(self.path)
        self.parts = [unquote(p) for p in url.path.split("/") if p]
        self.query = parse_qs(url.query, keep_blank_values=True)
        try:
            self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            try:
                self.route()
            except Refused as refused:
                self.refuse(refused)
        except (ConnectionError, TimeoutError, ssl.SSLError):
            self.close_connection = True
        finally:
            entry = {"host": self.host, "method": self.command, "path": unquote(url.path), "query": url.query}
            self.server.shared.note(entry | {"range": self.headers.get("Range"), "status": self.status, "sent": self.sent} | self.noted())

    do_GET = do_HEAD = do_POST = answer

    @abstractmethod
    def route(self) -> None:
        """Answers a request; raises Refused."""

    @abstractmethod
    def refuse(self, refused: Refused) -> None:
        """Answers what was refused in the form that this host has for it."""

    @abstractmethod
    def noted(self) -> dict:
        """What the log says of a request besides."""

    def start(self, status: int, length: int | None, headers: dict[str, str]) -> None:
        self.status = status
        self.send_response(status)
        for key, value in ({"Content-Type": "application/json"} | headers).items():
            self.send_header(key, value)
        if length is None:
            self.send_header("Connection", "close")
            self.close_connection = True
        else:
            self.send_header("Content-Length", str(length))
        self.end_headers()

    def reply(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.start(status, len(body), headers or {})
        if self.command != "HEAD":
            self.wfile.write(body)
            self.sent += len(body)

    def pour(self, source: BinaryIO, count: int, endless: bool = False, stalling: bool = False) -> None:
        """Sends `count` bytes of a file at the common pace, endlessly with zeros behind them, or stalling with one of them a second."""
        size = 1 if stalling else SLICE
        while self.sent < count or endless:
            block = source.read(min(size, count - self.sent)) if self.sent < count else bytes(size)
            if stalling:
                time.sleep(1.0)
            self.server.shared.pace(len(block))
            self.wfile.write(block)
            self.sent += len(block)
