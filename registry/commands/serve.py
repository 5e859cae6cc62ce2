"""`airlock registry serve|migrate`: one process that holds the data directory, serves every door, and stops by suspending what is open."""

from __future__ import annotations

import argparse
import fcntl
import json
import logging
import os
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import uvicorn

from artifact.errors import Conflict, Invalid, NotFound, Unavailable
from registry.app import create_app
from registry.settings import Settings
from registry.wire import WireProtocol
from registry.wiring import migrate, open_site

BACKLOG = 2048
KEEP_ALIVE_S = 30


class _Server(uvicorn.Server):
    """uvicorn's server that says once, on stdout, that it accepts connections."""

    ready = ""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            print(self.ready, flush=True)


class _JsonLines(logging.Formatter):
    """One JSON object a line; a record that is one already passes as it is."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as JSON, with the traceback of an unexpected failure."""
        out: dict[str, object] = {"at": round(record.created, 3), "level": record.levelname.lower(), "log": record.name}
        text = record.getMessage()
        if record.name == "airlock.access":
            return json.dumps(out | json.loads(text))
        out["message"] = text
        if record.exc_info:
            out["trace"] = self.formatException(record.exc_info)
        return json.dumps(out)


def _log_to_stderr(level: str) -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonLines())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    for quiet in ("uvicorn.error", "uvicorn.access", "alembic", "asyncio"):
        logging.getLogger(quiet).setLevel(logging.WARNING)


@contextmanager
def _sole_server(data: Path) -> Iterator[None]:
    """Holds the data directory's server lock; raises Conflict when another server has it."""
    if not data.is_dir():
        raise NotFound(f"{data} is not a data directory", do="airlock site init --data DIR --trust-root FILE")
    lock = os.open(data / "serve.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise Conflict(f"another server is using {data}", expected="one server process per data directory", do="stop the other one") from error
        yield
    finally:
        os.close(lock)


def _listen(host: str, port: int) -> socket.socket:
    """A bound socket; raises Unavailable when the address is taken or not ours."""
    if not 0 <= port <= 65535:
        raise Invalid(f"{port} is not a port", expected="0 to 65535")
    try:
        family, kind, proto, _name, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        sock = socket.socket(family, kind, proto)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(BACKLOG)
    except (OSError, OverflowError, UnicodeError) as error:
        text = f"cannot listen on {host}:{port}: {getattr(error, 'strerror', None) or error}"
        raise Unavailable(text, expected="a free port of this host", do="choose another with --port, or stop what uses it") from error
    return sock


def _serve(settings: Settings, as_json: bool) -> int:
    with _sole_server(settings.data):
        sock = _listen(settings.host, settings.port)
        port = sock.getsockname()[1]
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        site = open_site(settings)
        try:
            config = uvicorn.Config(
                create_app(site, settings),
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
            )
            server = _Server(config)
            url = f"http://{host}:{port}"
            server.ready = json.dumps({"listening": url}) if as_json else f"listening on {url}"
            for stop in (signal.SIGTERM, signal.SIGINT):
                signal.signal(stop, lambda *_: None)  # uvicorn raises the signal again once it has stopped; stopping when told to is success
            server.run(sockets=[sock])
        finally:
            site.close()
            sock.close()
    return 0


def main(argv: list[str]) -> int:
    """Entry point of `airlock registry`."""
    parser = argparse.ArgumentParser(
        prog="airlock registry",
        description="Serves the registry, or brings its database to this version.",
        epilog="example: airlock registry serve --data /srv/airlock --port 5000",
    )
    parser.add_argument("action", choices=("serve", "migrate"))
    parser.add_argument("--data", help="data directory (AIRLOCK_DATA)")
    parser.add_argument("--host", help="address to listen on (AIRLOCK_HOST, 127.0.0.1)")
    parser.add_argument("--port", type=int, help="port to listen on, 0 for any free one (AIRLOCK_PORT, 5000)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args(argv)
    settings = Settings.load(args.data, host=args.host, port=args.port)
    _log_to_stderr(settings.log_level)
    if args.action == "serve":
        return _serve(settings, args.json)
    with _sole_server(settings.data):
        migrate(settings)
    print(json.dumps({"migrated": str(settings.data)}) if args.json else f"the database in {settings.data} is at this version")
    return 0
