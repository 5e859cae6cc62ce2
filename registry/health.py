"""The operator's listener beside the registry's own: /healthz, /readyz and /metrics, answered by threads that no request of a client can hold.

Here because it must answer while the doors are busy or drained. It has no key, so it tells no name, no path and no text of a client.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as Late
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from sqlalchemy import func, select

from artifact.errors import AirlockError, Unavailable
from registry.metrics import Jobs, Metrics
from registry.sequencer import LATE_S
from registry.tables import job, reading, upload
from registry.watch import Watch
from registry.wiring import Site

BOUND_S = 3.0
FRESH_S = 1.0
HEAD_S = 5.0  # for the whole of a request, from the connection's first moment
CLIENT_S = 20.0  # for a connection in all; the checks take two bounds at most
MOST_CLIENTS = 32
MOST_JOBS = 20
METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"
LOG = logging.getLogger("airlock.registry")


def uploads_open(site: Site, now: float) -> int:
    """Uploads that were begun and neither ended nor expired; raises Unavailable."""
    with reading(site.engine) as connection:
        return int(connection.execute(select(func.count()).select_from(upload).where(upload.c.expires > now)).scalar_one())


def job_figures(site: Site) -> Jobs:
    """Begin, end and the numbers of the report of each job's last run; raises Unavailable."""
    with reading(site.engine) as connection:
        rows = connection.execute(select(job.c.name, job.c.started, job.c.ended, job.c.report).order_by(job.c.name).limit(MOST_JOBS)).all()
    out = {}
    for name, started, ended, report in rows:
        try:
            doc = json.loads(report) if report else {}
        except ValueError:
            doc = {}
        numbers = {k: float(v) for k, v in doc.items() if type(v) in (int, float)} if isinstance(doc, dict) else {}
        out[name] = {**numbers, "started_seconds": started, "ended_seconds": ended}
    return out


def _database(site: Site) -> None:
    site.check()
    with reading(site.engine) as connection:
        connection.execute(select(1))


def _store(site: Site) -> None:
    if not site.settings.blobs_url.startswith("file:"):
        site.blobs.stat(f"sha256/00/{'0' * 64}")  # absent is an answer too
        return
    writer = site.blobs.writer(f"readyz-{os.getpid()}")
    try:
        writer.write(b"readyz")
    finally:
        writer.discard()


class Bounded:
    """One piece of work that is asked for often: answered within a bound, never run twice at once, and not again while it is fresh."""

    def __init__(self, work: Callable[[], object]) -> None:
        self._work = work
        self._lock = threading.Lock()
        self._running: Future[object] | None = None
        self._at = 0.0

    def ask(self, bound_s: float = BOUND_S) -> object:
        """The result; raises Unavailable where there is none within the bound, and what the work raised."""
        with self._lock:
            now = time.monotonic()
            if self._running is None or (self._running.done() and now - self._at > FRESH_S):
                self._running, self._at = Future(), now
                threading.Thread(target=self._run, args=(self._running,), name="health", daemon=True).start()  # may hang; the exit does not
            running = self._running
        try:
            return running.result(bound_s)
        except Late as error:
            raise Unavailable(f"no answer within {bound_s:g} s") from error

    def _run(self, into: Future[object]) -> None:
        try:
            into.set_result(self._work())
        except BaseException as error:  # noqa: BLE001 - handed to whoever asked
            into.set_exception(error)


class Health:
    """What the listener tells about one open site; `draining` is set by who stops the server."""

    def __init__(self, site: Site, metrics: Metrics, watch: Watch) -> None:
        self.draining = False
        self._site, self._watch = site, watch
        self.loop: asyncio.AbstractEventLoop | None = None
        self._metrics = metrics
        self._checks = {"database": Bounded(lambda: _database(site)), "store": Bounded(lambda: _store(site))}
        self._uploads = Bounded(lambda: uploads_open(site, time.time()))
        self._jobs = Bounded(lambda: job_figures(site))

    def alive(self) -> tuple[int, dict[str, object]]:
        """200 where the event loop of the doors turns within the bound, else 503."""
        turned = threading.Event()
        if self.loop is not None:
            with suppress(RuntimeError):  # a loop that ended with the server
                self.loop.call_soon_threadsafe(turned.set)
        alive = self.loop is None or turned.wait(BOUND_S)
        return (200, {"status": "ok"}) if alive else (503, {"status": "the event loop does not turn"})

    def ready(self) -> tuple[int, dict[str, object]]:
        """200 where requests should be sent here, else 503; each check by its name."""
        found = {"draining": "yes" if self.draining else "ok"}
        for name, check in self._checks.items():
            try:
                check.ask()
                found[name] = "ok"
            except AirlockError as error:
                found[name] = str(error.reason or "unavailable")
                LOG.warning("not ready: %s", name, extra={"facts": {"check": name, "error": error.code, "reason": error.reason}})
            except Exception:  # the top of a check: a load balancer needs an answer in any case
                found[name] = "failed"
                LOG.exception("the check %s failed", name)
        good = all(value == "ok" for value in found.values())
        return (200 if good else 503), {"status": "ready" if good else "not ready", "checks": found, "warnings": self._warnings()}

    def _warnings(self) -> list[str]:
        """What somebody must look at while requests are served: the clock, the audit log, documents; from memory, no name in it."""
        late = self._watch.audit.get("oldest_seconds", 0.0) > LATE_S
        lists = self._watch.figures.get("revocation_list", (0.0, 0))[1]
        found = {"audit_forked": bool(self._site.log.fork), "audit_late": late, "revocations_late": lists > 0}
        return [*filter(None, (self._site.floor.doubt(time.time()),)), *(name for name, is_so in found.items() if is_so)]

    def metrics(self) -> bytes:
        """The exposition; figures of a database that does not answer are left out."""
        uploads, jobs = self._figure(self._uploads), self._figure(self._jobs)
        state = {f"airlock_audit_{name}": value for name, value in self._watch.audit.items()}
        state |= {"airlock_audit_forked": float(bool(self._site.log.fork))}
        state |= {"airlock_clock_behind_seconds": max(self._site.floor.at - time.time(), 0.0)}
        given = (uploads if isinstance(uploads, int) else None, jobs if isinstance(jobs, dict) else {})
        return self._metrics.text(*given, self._watch.figures, state)

    def _figure(self, source: Bounded) -> object:
        try:
            return source.ask()
        except AirlockError as error:
            LOG.warning("a figure could not be read", extra={"facts": {"error": error.code, "reason": error.reason}})
            return None


class _Handler(BaseHTTPRequestHandler):
    timeout = CLIENT_S
    server: _Listener

    def do_GET(self) -> None:
        """Answers one of the three paths."""
        self.server.asked(self.connection)
        health, path = self.server.health, self.path.split("?")[0]
        if path == "/metrics":
            self._send(200, METRICS_TYPE, health.metrics())
        elif path in ("/healthz", "/readyz"):
            status, body = health.alive() if path == "/healthz" else health.ready()
            self._send(status, "application/json", json.dumps(body).encode())
        else:
            self._send(404, "application/json", b'{"status": "no such path", "paths": ["/healthz", "/readyz", "/metrics"]}')

    do_HEAD = do_GET

    def _send(self, status: int, kind: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def version_string(self) -> str:
        """No version in a header that anybody may read."""
        return "airlock"

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 (the base class names it so)
        """Nothing: probes are no events."""


class _Listener(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self, address: tuple[str, int], health: Health) -> None:
        self.health = health
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        self._lock = threading.Lock()
        self._open: dict[socket.socket, float] = {}  # since when, the oldest first
        self._asking: set[socket.socket] = set()  # those of them whose request is not here yet
        super().__init__(address, _Handler)

    def asked(self, request: socket.socket) -> None:
        """The request is here whole: its connection gives way to no other."""
        with self._lock:
            self._asking.discard(request)

    def process_request(self, request: socket.socket | tuple[bytes, socket.socket], client_address: object) -> None:
        """Hands a connection to a thread of its own; where too many are open, the oldest that has asked nothing yet ends, or else this one."""
        assert isinstance(request, socket.socket)
        with self._lock:
            late = next((r for r in self._open if r in self._asking), None) if len(self._open) >= MOST_CLIENTS else None
            if late is not None:
                self._end(late)
            room = len(self._open) < MOST_CLIENTS
            if room:
                self._open[request] = time.monotonic()
                self._asking.add(request)
        if room:
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def service_actions(self) -> None:
        """Ends what has been open for too long; called several times a second."""
        now = time.monotonic()
        with self._lock:
            for request, since in list(self._open.items()):
                if now - since > (HEAD_S if request in self._asking else CLIENT_S):
                    self._end(request)

    def _end(self, request: socket.socket) -> None:
        """Ends a connection, whose thread finds it ended; the lock is held."""
        self._open.pop(request, None)
        self._asking.discard(request)
        with suppress(OSError):  # it ended by itself
            request.shutdown(socket.SHUT_RDWR)

    def process_request_thread(self, request: socket.socket | tuple[bytes, socket.socket], client_address: object) -> None:
        """Serves one connection."""
        assert isinstance(request, socket.socket)
        try:
            super().process_request_thread(request, client_address)
        finally:
            with self._lock:
                self._open.pop(request, None)
                self._asking.discard(request)

    def handle_error(self, request: object, client_address: object) -> None:
        """Nothing: a probe that left early is no event."""


def listen(place: str, health: Health) -> tuple[str, Callable[[], None]]:
    """Serves on `host:port`; the URL and a function that ends it; raises Unavailable."""
    host, _, port = place.rpartition(":")
    host = host.strip("[]")
    try:
        server = _Listener((host, int(port)), health)
    except (OSError, OverflowError, UnicodeError) as error:
        text = f"cannot listen on {place}: {getattr(error, 'strerror', None) or error}"
        raise Unavailable(text, expected="a free port of this host", do="choose another with AIRLOCK_METRICS") from error
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.2}, name="health", daemon=True)
    thread.start()

    def stop() -> None:
        server.shutdown()
        server.server_close()

    return f"http://{f'[{host}]' if ':' in host else host}:{server.server_address[1]}", stop
