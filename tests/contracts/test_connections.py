"""Connections that say nothing: a registry with few descriptors goes on serving, and says once that it is short of them."""

from __future__ import annotations

import json
import os
import resource
import selectors
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from registry import crowd as crowd_module
from registry.crowd import EACH, KEPT, LEAVING, MOST, Crowd, Listener, bound
from tests.contracts.doors import new_site
from tests.operated import Operated, wait_for

pytestmark = pytest.mark.server
FILES = 300


@contextmanager
def limited(data: Path, keys: dict[str, str], soft: int, hard: int, **env: str) -> Iterator[Operated]:
    """A registry under limits of open files."""
    log = data.parent / "limited.log"
    serve = [str(Path(sys.executable).parent / "airlock"), "registry", "serve", "--data", str(data), "--port", "0", "--json"]
    argv = ["bash", "-c", f'ulimit -Sn {soft} && ulimit -Hn {hard} && exec "$@"', "bash", *serve]
    given = {k: v for k, v in os.environ.items() if not k.startswith(("AIRLOCK_", "OTEL_"))}
    given |= {"AIRLOCK_METRICS": "127.0.0.1:0", "AIRLOCK_DRAIN_TIMEOUT_S": "2", **env}
    with log.open("a") as err:
        process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=err, text=True, env=given)
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        assert line.startswith("{"), line + log.read_text()
        told = json.loads(line)
        yield Operated(data, process, int(urlsplit(told["listening"]).port or 0), keys, log, told=told)
    finally:
        process.terminate()
        process.wait(60)
        process.stdout.close()


def say(port: int, text: bytes) -> socket.socket:
    sock = socket.create_connection(("127.0.0.1", port), 30)
    sock.sendall(text)
    return sock


@pytest.mark.parametrize("tls", [False, True])
def test_silent_connections_take_nothing_from_anybody(tmp_path: Path, tls: bool) -> None:
    data = tmp_path / "data"
    with limited(data, new_site(data), 100, FILES, **({"AIRLOCK_TLS": "self-signed"} if tls else {})) as server:
        limits = Path(f"/proc/{server.process.pid}/limits").read_text()
        assert next(line for line in limits.splitlines() if "open files" in line).split()[3:5] == [str(FILES), str(FILES)]
        began = wait_for(lambda: [x for x in server.lines() if x.get("message") == "started"], "the line of the start")[0]
        assert (began["files"], began["connections"]) == (FILES, (FILES - KEPT) // EACH)
        silent = [say(server.port, text) for _ in range(150) for text in (b"", b"\x16\x03\x01" if tls else b"GET / HTTP/1.1\r\nX: ")]
        for _ in range(5):
            if tls:
                assert over_tls(server.port) == b"HTTP/1.1 200"
            else:
                assert server.ask("GET", "/v2/").status == 200
            assert server.operator("/readyz")[0] == 200
            silent += [say(server.port, b"") for _ in range(40)]
        assert len(os.listdir(f"/proc/{server.process.pid}/fd")) < FILES - EACH
        kept = say(server.port, b"")
        assert len(server.log.read_bytes()) < 100_000 and all(server.lines())
        for sock in [*silent, kept]:
            sock.close()


def test_spent_descriptors_are_told_once_and_survived(tmp_path: Path) -> None:
    data = tmp_path / "data"
    with limited(data, new_site(data), FILES, FILES) as server:
        assert server.ask("GET", "/v2/").status == 200
        resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE, (5, FILES))
        waiting = [say(server.port, b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n") for _ in range(50)]

        def complaints() -> list[str]:
            return [x["reason"] for x in server.lines() if x.get("message") == "no connection can be accepted"]

        wait_for(complaints, "the line that tells of it")
        time.sleep(4)
        assert len(server.log.read_bytes()) < 20_000 and len(complaints()) <= 2  # it is tried every second
        resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE, (FILES, FILES))
        for sock in waiting:
            assert sock.recv(12, socket.MSG_WAITALL) == b"HTTP/1.1 200"
            sock.close()


def over_tls(port: int) -> bytes:
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with socket.create_connection(("127.0.0.1", port), 30) as plain, context.wrap_socket(plain) as sock:
        sock.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        return sock.recv(12)


@contextmanager
def listening(most: int) -> Iterator[tuple[Listener, Crowd]]:
    with Listener(socket.AF_INET, socket.SOCK_STREAM) as sock:
        sock.crowd = Crowd(most)
        sock.bind(("127.0.0.1", 0))
        sock.listen(256)
        sock.setblocking(False)
        yield sock, sock.crowd


def accepted(sock: Listener) -> socket.socket:
    with selectors.DefaultSelector() as ready:
        ready.register(sock, selectors.EVENT_READ)
        assert ready.select(30)
    return sock.accept()[0]


def test_the_longest_idle_gives_way_and_the_newest_where_all_are_busy() -> None:
    with listening(3) as (sock, crowd):
        port = sock.getsockname()[1]
        clients = [say(port, b"") for _ in range(3)]
        conns = [accepted(sock) for _ in clients]
        crowd.busy(conns[0].fileno())
        clients.append(say(port, b""))
        conns.append(accepted(sock))
        assert (conns[1].recv(1), clients[1].recv(1)) == (b"", b"")
        conns[1].close()
        assert len(crowd.held) == 3
        for conn in conns[2:]:
            crowd.busy(conn.fileno())
        clients.append(say(port, b""))
        with pytest.raises(ConnectionAbortedError):
            accepted(sock)
        assert clients[4].recv(1) == b""
        crowd.idle(conns[0].fileno())
        clients.append(say(port, b""))
        conns.append(accepted(sock))
        assert clients[0].recv(1) == b""
        for one in [*conns, *clients]:
            one.close()
        assert not crowd.held


def test_no_more_are_let_in_than_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crowd_module, "PAUSE_S", 60.0)
    with listening(LEAVING) as (sock, crowd):
        clients = [say(sock.getsockname()[1], b"") for _ in range(2 * LEAVING + 1)]
        conns = [accepted(sock) for _ in range(2 * LEAVING)]
        with pytest.raises(BlockingIOError):
            accepted(sock)
        assert len(crowd.held) == 2 * LEAVING
        for one in conns[:LEAVING]:
            one.close()
        conns.append(accepted(sock))
        for one in [*conns, *clients]:
            one.close()


def test_a_spent_limit_is_found_once_a_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crowd_module, "PAUSE_S", 8.0)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with listening(MOST) as (sock, _crowd), say(sock.getsockname()[1], b""):
        lowest = os.dup(0)
        os.close(lowest)
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))
        try:
            found = []
            for _ in range(3):
                try:
                    sock.accept()
                except OSError as error:
                    found.append(type(error))
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert found == [OSError, BlockingIOError, BlockingIOError]
        time.sleep(4.5)
        sock.accept()[0].close()


def test_the_bound_leaves_descriptors() -> None:
    assert (bound(-1), bound(1 << 30), bound(1024), bound(20)) == (MOST, MOST, (1024 - KEPT) // EACH, 8)
