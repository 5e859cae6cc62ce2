"""Company on one server: the memory that 200 slow pulls take, and how long small requests wait while four clients push.

The pushing clients are processes of their own, so that what waits is the server and not the client that measures.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path

from _load import GIB, Connection, expect, push, random_file
from _servers import Server, airlock, docker_registry, scratch
from _table import Report, arguments

PULLS, PUSHES, PROBE_S = 200, 4, 0.005


def blob(server: Server, folder: Path, size: int) -> str:
    """Pushes a random blob and returns its path."""
    file = random_file(folder / "source", size)
    with file.open("rb") as source:
        digest = "sha256:" + hashlib.file_digest(source, "sha256").hexdigest()
    with Connection(server) as connection:
        push(connection, "bench/slow", file, digest)
    file.unlink()
    return f"/v2/bench/slow/blobs/{digest}"


def slow_pulls(server: Server, path: str, seconds: float) -> float:
    """The most MiB above idle while 200 clients read one blob at 64 KiB a turn."""
    with ExitStack() as stack:
        with Connection(server) as connection:
            expect(connection.ask("HEAD", path), 200)
        idle = server.rss_mib()
        clients = [stack.enter_context(Connection(server, rcvbuf=65536)) for _ in range(PULLS)]
        for client in clients:
            client.sock.sendall(client.head("GET", path))
        most, until = 0.0, time.monotonic() + seconds
        while time.monotonic() < until:
            for client in clients:
                if not client.sock.recv_into(client.buffer, 65536):
                    raise RuntimeError("the server ended a slow pull")
            most = max(most, server.rss_mib() - idle)
    return most


def pushing(server: Server, folder: str, number: int, size: int, ready: object, go: object) -> None:
    """One pushing process: makes its blob, waits for the others, pushes."""
    file = random_file(Path(folder) / f"push-{number}", size)
    with file.open("rb") as source:
        digest = "sha256:" + hashlib.file_digest(source, "sha256").hexdigest()
    ready.release()  # type: ignore[attr-defined]
    go.wait()  # type: ignore[attr-defined]
    with Connection(server) as connection:
        push(connection, f"bench/p{number}", file, digest)


def probes(server: Server, path: str, folder: Path, size: int) -> list[float]:
    """Seconds that each HEAD took while four clients pushed, in order of length."""
    context = multiprocessing.get_context("spawn")
    ready, go = context.Semaphore(0), context.Event()
    pushers = [context.Process(target=pushing, args=(server, str(folder), n, size, ready, go)) for n in range(PUSHES)]
    for process in pushers:
        process.start()
    for _ in pushers:
        ready.acquire()
    took: list[float] = []
    with Connection(server) as connection:
        expect(connection.ask("HEAD", path), 200)
        go.set()
        while any(process.is_alive() for process in pushers):
            began = time.monotonic()
            expect(connection.ask("HEAD", path), 200)
            took.append(time.monotonic() - began)
            time.sleep(PROBE_S)
    for process in pushers:
        process.join()
        if process.exitcode:
            raise RuntimeError("a push failed")
    return sorted(took)


def main() -> None:
    """Measures, prints."""
    args = arguments(__doc__.splitlines()[0])
    size, seconds = (GIB // 8, 5.0) if args.quick else (GIB // 2, 15.0)
    report = Report("Company", ("server", "round", "200 slow pulls: MiB above idle", "4 pushes: p50 ms", "p99 ms", "most ms", "requests"))
    memory: dict[str, list[float]] = {}
    waits: dict[str, list[float]] = {}
    servers: tuple[tuple[str, Callable[[Path], AbstractContextManager[Server]]], ...] = (("airlock", airlock), ("docker-registry", docker_registry))
    for round_ in range(1, args.rounds + 1):
        for name, start in servers:
            with scratch() as folder, start(folder / "server") as server:
                path = blob(server, folder, GIB // 4)
                above = slow_pulls(server, path, seconds)
                took = probes(server, path, folder, size)
            p50, p99 = took[len(took) // 2] * 1000, took[len(took) * 99 // 100] * 1000
            memory.setdefault(name, []).append(above)
            waits.setdefault(name, []).append(p99)
            report.row(name, str(round_), above, p50, p99, took[-1] * 1000, str(len(took)))
    report.at_most("200 slow pulls: MiB above idle", max(memory["airlock"]), 100)
    report.at_most("4 parallel pushes: p99 of other requests in ms", max(waits["airlock"]), 100)
    report.show(args.json)


if __name__ == "__main__":
    main()
