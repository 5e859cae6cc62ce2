"""A receiver of webhooks that does what it is told: takes, fails, is slow, drips, sends elsewhere; it keeps what came. Imports no project code."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from tests.conftest import find_port


@dataclass
class Got:
    """One request that came."""

    path: str
    headers: dict[str, str]
    body: bytes


@dataclass
class Receiver:
    """What is to be answered next (200, any other status, "slow", "drip" or "redirect"; the last one for ever) and what came so far."""

    url: str = ""
    answers: list[int | str] = field(default_factory=lambda: [200])
    got: list[Got] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def take(self, got: Got) -> int | str:
        with self.lock:
            self.got.append(got)
            return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]


@contextmanager
def receiving(*answers: int | str) -> Iterator[Receiver]:
    """A receiver on a free port of this host."""
    state = Receiver(answers=list(answers) or [200])

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
            answer = state.take(Got(self.path, {k.lower(): v for k, v in self.headers.items()}, body))
            with suppress(OSError):  # whoever asked has left
                self.reply(answer)

        def do_GET(self) -> None:
            state.take(Got("GET " + self.path, {}, b""))
            self.send_error(405)

        def reply(self, answer: int | str) -> None:
            if answer == "slow":
                time.sleep(60)
            elif answer == "drip":  # a byte every half second: each in time, and never all of them
                self.wfile.write(b"HTTP/1.1 200 OK\r\nx-fill: ")
                for _ in range(120):
                    time.sleep(0.5)
                    self.wfile.write(b"x")
            elif answer == "redirect":
                self.send_response(307)
                self.send_header("Location", state.url + "/elsewhere")
                self.end_headers()
            else:
                self.send_response(int(answer))
                self.send_header("Content-Length", "0")
                self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads, server.block_on_close = True, False
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    state.url = f"http://127.0.0.1:{server.server_address[1]}/hooks/a-secret-path"
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()


def refusing() -> str:
    """A URL where nothing listens."""
    return f"http://127.0.0.1:{find_port()}/hooks/a-secret-path"
