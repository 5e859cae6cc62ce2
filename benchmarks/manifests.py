"""Manifest GET with authentication: requests per CPU-second of the server beside docker-registry, and whether 1,000,000 manifests cost more than 10.

Both databases, filled by bulk SQL. The manifests asked for are the first and the last of the catalog. PostgreSQL's own processes are counted with
ours. Reads are repeated, as the first read of a manifest by a key also writes an audit row; what first reads cost is a row of its own.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import sqlite3
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from _load import Connection, Figure, expect, measured
from _servers import Server, airlock, docker_registry, scratch
from _table import Report, arguments

from tests.services.postgres import Postgres

TYPE = "application/vnd.oci.image.manifest.v1+json"
EMPTY = "sha256:" + hashlib.sha256(b"{}").hexdigest()
PER_REPO, CLIENTS = 100, 2
FLAT = 0.7  # the band for noise


def manifest(i: int) -> tuple[str, bytes]:
    """Digest and bytes of the i-th manifest, about 500 bytes."""
    part = {"mediaType": "application/vnd.oci.empty.v1+json", "digest": EMPTY, "size": 2}
    raw = json.dumps(
        {"schemaVersion": 2, "mediaType": TYPE, "config": part, "layers": [part], "annotations": {"n": str(i), "text": "x" * 60}}
    ).encode()
    return "sha256:" + hashlib.sha256(raw).hexdigest(), raw


def place(i: int) -> str:
    """Path of the i-th manifest by its tag."""
    return f"/v2/bench/r{i // PER_REPO:07d}/manifests/t{i}"


def fill(url: str, count: int) -> None:
    """Puts `count` manifests into the database, 100 a repository, each under a tag; past the server's own checks, since those are not measured."""
    repos = -(-count // PER_REPO)
    r_rows = ((n + 1, f"bench/r{n:07d}", f"bench/r{n:07d}", 1) for n in range(repos))
    m_rows = ((i + 1, digest, TYPE, len(raw), raw) for i in range(count) for digest, raw in [manifest(i)])
    l_rows = ((i // PER_REPO + 1, i + 1) for i in range(count))
    t_rows = ((i // PER_REPO + 1, f"t{i}", i + 1) for i in range(count))
    tables = (
        ("repository (id, name, display, org_id)", r_rows, 4),
        ("manifest (id, digest, media_type, size, raw)", m_rows, 5),
        ("repo_manifest (repo_id, manifest_id)", l_rows, 2),
        ("ref (repo_id, name, manifest_id)", t_rows, 3),
    )
    if url.startswith("sqlite"):
        with sqlite3.connect(url.removeprefix("sqlite:///"), isolation_level=None) as db:
            db.execute("PRAGMA synchronous=OFF")
            db.execute("BEGIN IMMEDIATE")
            for table, rows, width in tables:
                db.executemany(f"INSERT INTO {table} VALUES ({', '.join('?' * width)})", rows)
            db.execute("COMMIT")
        return
    with psycopg.connect(url.replace("postgresql+psycopg", "postgresql")) as pg:
        for table, rows, _width in tables:
            with pg.cursor().copy(f"COPY {table} FROM STDIN".encode()) as copy:
                for row in rows:
                    copy.write_row(row)
        pg.commit()
        pg.autocommit = True
        pg.execute("VACUUM ANALYZE")  # as autovacuum does within minutes; SQLite keeps no statistics unless told, so it gets none here either


def ask(server: Server, paths: list[str], count: int) -> int:
    """`count` GETs over the paths in turn, on a few kept-alive connections."""
    failed: list[BaseException] = []

    def work(share: int) -> None:
        try:
            with Connection(server) as connection:
                for path in itertools.islice(itertools.cycle(paths), share):
                    connection.sock.sendall(connection.head("GET", path, {"Accept": TYPE}))
                    expect(connection.answer(), 200)
        except (OSError, RuntimeError) as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(count // CLIENTS,)) for _ in range(CLIENTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]
    return count // CLIENTS * CLIENTS


def rate(server: Server, paths: list[str], count: int) -> Figure:
    """The figure of `count` repeated reads, behind a warm-up."""
    ask(server, paths, 200)
    return measured(server, lambda: ask(server, paths, count))


@contextmanager
def docker(folder: Path, password: bool) -> Iterator[tuple[Server, list[str]]]:
    """docker-registry with ten manifests, pushed as a client does."""
    with docker_registry(folder, password) as server, Connection(server) as connection:
        where = expect(connection.ask("POST", "/v2/bench/r/blobs/uploads/"), 202).headers["location"]
        expect(connection.ask("PUT", "/" + where.split("/", 3)[3] + f"&digest={EMPTY}", {"Content-Type": "application/octet-stream"}, b"{}"), 201)
        for i in range(10):
            expect(connection.ask("PUT", f"/v2/bench/r/manifests/t{i}", {"Content-Type": TYPE}, manifest(i)[1]), 201)
        yield server, [f"/v2/bench/r/manifests/t{i}" for i in range(10)]


@contextmanager
def ours(folder: Path, count: int, postgres: bool) -> Iterator[tuple[Server, list[str]]]:
    """The registry over `count` manifests, and the paths of the five first and five last."""
    ends = [place(i) for i in (*range(5), *range(count - 5, count))]
    if not postgres:
        with airlock(folder, fill=lambda url: fill(url, count)) as server:
            yield server, ends
        return
    database = Postgres.make()
    try:
        with airlock(folder, fill=lambda url: fill(url, count), AIRLOCK_DATABASE=database.database()) as server:
            server.pids.append(database.pid)
            yield server, ends
    finally:
        database.remove()


def main() -> None:
    """Measures, prints."""
    args = arguments(__doc__.splitlines()[0])
    many, asks = (20_000, 1_000) if args.quick else (1_000_000, 4_000)
    report = Report("Manifest GET with authentication", ("server", "manifests", "requests per CPU-second", "requests/s", "peak MiB"))
    best: dict[str, float] = {}
    first: dict[str, float] = {}

    def note(name: str, count: int, server: Server, figure: Figure) -> None:
        key = f"{name} {count}"
        best[key] = max(best.get(key, 0.0), figure.per_cpu_s)
        report.row(name, f"{count:,}", f"{figure.per_cpu_s:.0f}", f"{figure.count / figure.seconds:.0f}", f"{server.rss_mib(peak=True):.0f}")

    for _round in range(args.rounds):
        for password in (True, False):
            with scratch() as folder, docker(folder, password) as (server, paths):
                note("docker-registry, " + ("htpasswd cost 4" if password else "no auth"), 10, server, rate(server, paths, asks))
    for postgres in (False, True):
        name = "airlock on " + ("PostgreSQL" if postgres else "SQLite")
        with scratch() as folder, ours(folder / "few", 10, postgres) as (small, few), ours(folder / "many", many, postgres) as (large, ends):
            for _round in range(args.rounds):  # in turns, so that both have the same neighbours on this machine
                note(name, 10, small, rate(small, few, asks))
                note(name, many, large, rate(large, ends, asks))
            fresh = [place(i) for i in range(1000, many, many // 500)][:400]
            first[name] = measured(large, functools.partial(ask, large, fresh, len(fresh))).per_cpu_s
        report.row(f"{name}, first reads (each writes an audit row)", f"{many:,}", f"{first[name]:.0f}", "", "")
        low, high = best[f"{name} 10"], best[f"{name} {many}"]
        report.at_least(f"{name} / docker-registry with htpasswd, per CPU-second", low / best["docker-registry, htpasswd cost 4 10"], 1.3)
        report.at_least(f"{name} / docker-registry without auth, per CPU-second", low / best["docker-registry, no auth 10"], 1.3)
        report.at_least(f"{name}: {many:,} manifests / 10 manifests, per CPU-second", high / low, FLAT)
    report.show(args.json)


if __name__ == "__main__":
    main()
