"""`airlock registry serve`: one process that holds the data directory, serves every door, and stops by suspending what is open."""

from __future__ import annotations

import argparse
import asyncio
import datetime
import json
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from types import FrameType, MappingProxyType
from typing import Any

import uvicorn

from artifact.errors import AirlockError, Unavailable
from registry import health, telemetry, tls
from registry.app import create_app
from registry.crowd import Crowd, Listener, bound, raise_limit
from registry.front import Front
from registry.issuance import Issuance
from registry.library import local_call
from registry.logs import log_to_stderr
from registry.metrics import Metrics
from registry.settings import Settings
from registry.watch import Watch
from registry.wire import WireProtocol
from registry.wiring import Site, open_site, sole_server

BACKLOG = 2048
KEEP_ALIVE_S = 30
TICK_S = 0.2
TELL_S = 10.0  # between two lines that tell that no connection can be accepted
WATCH_S = 2.0
END_S = 10.0  # how long after a second SIGTERM an orderly end may take
APART = ("ngc", "s3")  # settings of the listeners that are one door's
WHAT = {"ngc": "NGC API", "s3": "S3 API", "metrics": "health and metrics"}
LOG = logging.getLogger("airlock.registry")


class _Server(uvicorn.Server):
    """uvicorn's server with our own stop: not ready first, then no more connections, uploads suspended, pulls to their end."""

    def __init__(self, config: uvicorn.Config, front: Front, state: health.Health, settings: Settings, crowd: Crowd) -> None:
        super().__init__(config)
        self.server_state = crowd
        self.front, self.state, self.settings = front, state, settings
        self.certificate: tls.Certificate | None = None
        self.ready: Callable[[], None] = lambda: None
        self.stops = 0
        self._tasks: list[asyncio.Task[None]] = []
        self._complained = -TELL_S

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.state.loop = asyncio.get_running_loop()
        self.state.loop.set_exception_handler(self._complain)
        self.state.loop.add_signal_handler(signal.SIGHUP, self._reload)
        if self.certificate is not None:
            self._tasks.append(asyncio.create_task(self._watch(self.certificate)))
        if self.started:
            self.ready()

    def _complain(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """Logs what failed in the loop; that descriptors are short only once in a while, as it is found at each try to accept."""
        if "socket.accept()" not in str(context.get("message")):
            loop.default_exception_handler(context)
        elif time.monotonic() - self._complained >= TELL_S:
            self._complained = time.monotonic()
            reason = getattr(context.get("exception"), "strerror", None)
            LOG.error("no connection can be accepted", extra={"facts": {"reason": reason, "do": "raise the limit of open files (LimitNOFILE)"}})

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal drains, the second ends at once; it is not raised again, as stopping when told to is success."""
        self.stops += 1
        loop = self.state.loop
        if self.stops == 1 and loop is not None:
            loop.call_soon_threadsafe(self._begin_to_stop)
        else:
            self.should_exit = self.force_exit = True
            signal.signal(signal.SIGALRM, lambda *_: os._exit(128 + sig))
            signal.setitimer(signal.ITIMER_REAL, END_S)

    def _begin_to_stop(self) -> None:
        self._tasks.append(asyncio.create_task(self._drain()))

    async def _drain(self) -> None:
        self.state.draining = True
        LOG.info("draining", extra={"facts": {"delay_s": self.settings.drain_delay_s, "timeout_s": self.settings.drain_timeout_s}})
        end = asyncio.get_running_loop().time() + self.settings.drain_delay_s
        while not self.force_exit and asyncio.get_running_loop().time() < end:
            await asyncio.sleep(TICK_S)
        self.should_exit = True
        suspended = 0
        while True:  # until the loop ends: a request that was let in late may begin to pour yet
            found = self.front.suspend_uploads()
            suspended += found
            if found:
                LOG.info("uploads suspended", extra={"facts": {"uploads": suspended}})
            await asyncio.sleep(TICK_S)

    async def _watch(self, certificate: tls.Certificate) -> None:
        while True:
            await asyncio.sleep(WATCH_S)
            if certificate.changed():
                self._reload()

    def _reload(self) -> None:
        if self.certificate is None:
            return  # nothing else is read again, and a signal that says "read again" must not end the server
        try:
            LOG.info("certificate loaded", extra={"facts": {"sha256": self.certificate.reload()}})
        except AirlockError as error:
            LOG.error("the certificate was not loaded, the old one stays: %s", error)


def _listen(host: str, port: int) -> Listener:
    """A bound socket; raises Unavailable when the address is taken or not ours."""
    try:
        family, kind, proto, _name, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        sock = Listener(family, kind, proto)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(BACKLOG)
    except (OSError, OverflowError, UnicodeError) as error:
        text = f"cannot listen on {host}:{port}: {getattr(error, 'strerror', None) or error}"
        raise Unavailable(
            text, expected="a free port of this host", do="choose another (--port, AIRLOCK_NGC, AIRLOCK_S3), or stop what uses it"
        ) from error
    return sock


def _certificate(settings: Settings) -> tuple[tls.Certificate | None, bool]:
    """The certificate where the listener speaks TLS, and whether it was made now."""
    if not settings.secure:
        return None, False
    made = settings.tls == "self-signed" and tls.make_self_signed(settings, datetime.datetime.now(datetime.UTC))
    return tls.Certificate(tls.files(settings)), made


def _config(front: Front, settings: Settings, certificate: tls.Certificate | None) -> uvicorn.Config:
    return uvicorn.Config(
        front,
        http=WireProtocol,
        loop="asyncio",
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        backlog=BACKLOG,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=settings.drain_timeout_s,
        ssl_context_factory=(lambda _config, _default: certificate.context) if certificate else None,
    )


def _first_key(site: Site) -> dict[str, object]:
    """The one-time key of a site that has no other; empty where it has; raises Unavailable where stdout, its only way out, cannot be used."""
    if sys.stdout is None or sys.stdout.closed:
        if site.entitlements.any_key():
            return {}
        raise Unavailable("this site has no key yet, and its first one cannot be shown", expected="a standard output", do="airlock key create")
    return Issuance(site.engine, site.entitlements, site.audit).first_key(local_call(site.floor.now(time.time())))


def _tell(
    as_json: bool,
    url: str,
    others: Mapping[str, str],
    certificate: tls.Certificate | None,
    trust: list[str],
    limits: dict[str, int],
    first: Mapping[str, object] = MappingProxyType({}),
) -> None:
    """What an operator must know once the server listens; the one-time key goes to stdout alone, never to the log."""
    facts = {"listening": url, **others, "certificate_sha256": certificate.fingerprint if certificate else ""}
    facts = {name: value for name, value in facts.items() if value}
    if as_json:
        print(json.dumps({**facts, **({"admin_key": first["key"]} if first else {})}), flush=True)
    else:
        if first:
            trust = [*trust, f"one-time key of the administrator, until {first['expires']} or the first key that it makes: {first['key']}"]
        lines = [f"listening on {url}", *(f"{WHAT[name]} on {at}" for name, at in others.items())]
        lines += [f"certificate SHA-256 {certificate.fingerprint}"] if certificate else []
        print("\n".join([*lines, *trust]), flush=True)
    LOG.info("started", extra={"facts": {**facts, **limits}})


def _told(error: Exception) -> object:
    return error if isinstance(error, AirlockError) else type(error).__name__


def _serve(settings: Settings, as_json: bool) -> int:
    files = raise_limit()
    crowd = Crowd(bound(files))
    with ExitStack() as stack:
        stack.enter_context(sole_server(settings))
        certificate, made = _certificate(settings)
        sock = stack.enter_context(_listen(settings.host, settings.port))
        sock.crowd = crowd
        port = sock.getsockname()[1]
        sockets, others = [sock], dict[str, str]()
        scheme = "https" if certificate else "http"
        apart: dict[str, tuple[str, int]] = {}
        for name in APART:
            if place := getattr(settings, name):
                host, _, number = place.rpartition(":")
                sockets.append(stack.enter_context(_listen(host.strip("[]"), int(number))))
                sockets[-1].crowd = crowd
                apart[name] = sockets[-1].getsockname()[:2]
                others[name] = f"{scheme}://{host}:{apart[name][1]}"
        site = stack.enter_context(open_site(settings))
        site.log.start(lambda error: LOG.error("the audit log: %s", _told(error)))
        stack.callback(site.collector.start(settings.gc_every_s, lambda error: LOG.error("the collection failed: %s", error)))
        watch = Watch(site)
        stack.callback(watch.start(lambda step, error: LOG.error("the watch: %s: %s", step, _told(error))))
        metrics, tracing = Metrics(), telemetry.start(os.environ)
        if tracing is not None:
            stack.callback(tracing.close)
        state = health.Health(site, metrics, watch)
        if settings.metrics:
            others["metrics"], end = health.listen(settings.metrics, state)
            stack.callback(end)
        front = create_app(site, settings, metrics, tracing, apart)
        server = _Server(_config(front, settings, certificate), front, state, settings, crowd)
        server.certificate = certificate
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        url = f"{scheme}://{host}:{port}"
        trust = tls.trust_commands(settings, port) if made else []
        first = _first_key(site)
        server.ready = lambda: _tell(as_json, url, others, certificate, trust, {"files": files, "connections": crowd.most}, first)
        for stop in (signal.SIGTERM, signal.SIGINT):
            signal.signal(stop, lambda *_: None)  # what the server puts back when it has stopped: a late signal must not cut the end short
        server.run(sockets=[*sockets])
        LOG.info("stopped", extra={"facts": {"forced": server.force_exit}})
    return 0


def main(argv: list[str]) -> int:
    """Entry point of `airlock registry`."""
    parser = argparse.ArgumentParser(
        prog="airlock registry",
        description="Serves the registry. Its other words: config, csr, migrate, backup, restore, verify, rebuild.",
        epilog="example: airlock registry serve --data /srv/airlock --port 5000",
    )
    parser.add_argument("action", choices=("serve",))
    parser.add_argument("--data", help="data directory (AIRLOCK_DATA)")
    parser.add_argument("--host", help="address to listen on (AIRLOCK_HOST, 127.0.0.1)")
    parser.add_argument("--port", type=int, help="port to listen on, 0 for any free one (AIRLOCK_PORT, 5000)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args(argv)
    settings = Settings.load(args.data, host=args.host, port=args.port)
    log_to_stderr(settings.log_level)
    return _serve(settings, args.json)
