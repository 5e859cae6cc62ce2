"""HEAD of a file by the Hub door while the catalog knows 1,000,000 files: waiting times and requests per CPU-second, on SQLite and PostgreSQL.

Both databases are filled by bulk SQL, 10,000 files a model. The files asked for are drawn over all models, by branch and by commit, each once, on one
connection after the other's answer: what a client's `snapshot_download` does for each of its files.
"""

from __future__ import annotations

import hashlib
import random
import sqlite3
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from _load import Connection, expect, measured
from _servers import Server, airlock, scratch
from _table import Report, arguments

from tests.services.postgres import Postgres

TYPE = "application/vnd.oci.image.manifest.v1+json"
MODEL = "application/vnd.cncf.model.manifest.v1+json"
PER_MODEL = 10_000
P99_MS = 10.0


def digest(text: str) -> str:
    """A digest that stands for a file's or a manifest's bytes: a HEAD asks for none."""
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


def commit(model: int) -> str:
    """The commit id of a model's one revision."""
    return digest(f"commit {model}")[7:47]


def fill(url: str, count: int) -> None:
    """Puts models with `count` files in all into the database, past the server's own checks, since those are not measured."""
    models = -(-count // PER_MODEL)
    rows = (
        ("repository (id, name, display, kind, org_id)", ((n + 1, f"bench/m{n}", f"bench/m{n}", "model", 1) for n in range(models)), 5),
        (
            "manifest (id, digest, media_type, artifact_type, size, raw)",
            ((n + 1, digest(f"manifest {n}"), TYPE, MODEL, 2, b"{}") for n in range(models)),
            6,
        ),
        ("repo_manifest (repo_id, manifest_id)", ((n + 1, n + 1) for n in range(models)), 2),
        ("ref (repo_id, name, manifest_id)", ((n + 1, "main", n + 1) for n in range(models)), 3),
        ('revision (repo_id, "commit", manifest_id, at)', ((n + 1, commit(n), n + 1, 1.0) for n in range(models)), 4),
        (
            "file (manifest_id, path, digest, size, lfs)",
            ((i // PER_MODEL + 1, f"shards/f{i}.safetensors", digest(f"file {i}"), i, True) for i in range(count)),
            5,
        ),
    )
    if url.startswith("sqlite"):
        with sqlite3.connect(url.removeprefix("sqlite:///"), isolation_level=None) as db:
            db.execute("PRAGMA synchronous=OFF")
            db.execute("BEGIN IMMEDIATE")
            for table, values, width in rows:
                db.executemany(f"INSERT INTO {table} VALUES ({', '.join('?' * width)})", values)
            db.execute("COMMIT")
        return
    with psycopg.connect(url.replace("postgresql+psycopg", "postgresql")) as pg:
        for table, values, _width in rows:
            with pg.cursor().copy(f"COPY {table} FROM STDIN".encode()) as copy:
                for row in values:
                    copy.write_row(row)
        pg.commit()
        pg.autocommit = True
        pg.execute("VACUUM ANALYZE")


def ask(server: Server, paths: list[str], waits: list[float]) -> int:
    """One HEAD of each path, noting how long each answer took."""
    with Connection(server) as connection:
        for path in paths:
            begun = time.perf_counter()
            expect(connection.ask("HEAD", path), 200)
            waits.append((time.perf_counter() - begun) * 1000)
    return len(paths)


@contextmanager
def ours(folder: Path, count: int, postgres: bool) -> Iterator[Server]:
    """The registry over so many files."""
    if not postgres:
        with airlock(folder, fill=lambda url: fill(url, count)) as server:
            yield server
        return
    database = Postgres.make()
    try:
        with airlock(folder, fill=lambda url: fill(url, count), AIRLOCK_DATABASE=database.database()) as server:
            server.pids.append(database.pid)
            yield server
    finally:
        database.remove()


def main() -> None:
    """Measures, prints."""
    args = arguments(__doc__.splitlines()[0])
    many, asks = (50_000, 1_000) if args.quick else (1_000_000, 5_000)
    report = Report("HEAD of a file by the Hub door", ("server", "files", "p50 ms", "p99 ms", "requests per CPU-second"))
    drawn = random.Random(7)  # the same files in each run
    for postgres in (False, True):
        name = "airlock on " + ("PostgreSQL" if postgres else "SQLite")
        with scratch() as folder, ours(folder, many, postgres) as server:
            worst = 0.0
            for _round in range(args.rounds):
                files = drawn.sample(range(many), asks)
                refs = ("main", "")
                paths = [f"/bench/m{i // PER_MODEL}/resolve/{refs[i % 2] or commit(i // PER_MODEL)}/shards/f{i}.safetensors" for i in files]
                ask(server, paths[:200], [])
                waits: list[float] = []
                figure = measured(server, lambda paths=paths, waits=waits: ask(server, paths, waits))  # type: ignore[misc]
                waits.sort()
                worst = max(worst, waits[int(len(waits) * 0.99)])
                report.row(name, f"{many:,}", f"{waits[len(waits) // 2]:.2f}", f"{waits[int(len(waits) * 0.99)]:.2f}", f"{figure.per_cpu_s:.0f}")
            report.at_most(f"{name}: p99 of a HEAD at {many:,} files, ms", worst, P99_MS)
    report.show(args.json)


if __name__ == "__main__":
    main()
