"""The audit log with 1,000,000 entries: an inclusion proof, a monthly report, and the memory of a whole export and of its verification.

The entries are a year's, written by bulk past the sequencer, with the same hashes and tiles that it makes; SQLite and PostgreSQL.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import sqlite3
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
from sqlalchemy import insert

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from _servers import Server, scratch
from _table import Report, arguments

from artifact import tlog
from registry import tables as t
from registry.database import reading
from registry.gather import report as gathered
from registry.home import Home
from registry.ledger import Ledger
from registry.report import DAY_S, Period
from registry.settings import Settings
from registry.wiring import Site, open_site
from tests.services.postgres import Postgres

START = 1_767_225_600.0  # 2026-01-01
YEAR_S = 365 * DAY_S
COLUMNS = ("idx", "leaf_hash", "body", "class", "ts", "event", "org", "key_id", "ref", "result", "reason")
PROOF_MS, REPORT_S = 50.0, 5.0
FLAT_MIB = 16.0


def rows(count: int, log: tlog.Range, tiles: dict[tuple[int, int], bytearray]) -> Iterator[tuple[object, ...]]:
    """Entries as they are recorded: pulls of 60 models by 300 keys, every third a counter's row, some denials; `log` and `tiles` grow with them."""
    dice = random.Random(1)
    for i in range(count):
        at = START + i * YEAR_S / count
        org, key = f"org{i % 20}", f"key-{i % 300:016x}"
        digest = "blob" if dice.random() < 0.6 else "sha256:" + hashlib.sha256(str(dice.randrange(200)).encode()).hexdigest()
        result, reason = ("denied", dice.choice(("no_grant", "entitlement_expired", "key_expired"))) if i % 50 == 7 else ("granted", "")
        doc: dict[str, object] = {"v": 1, "ts": round(at, 3), "event": "pull", "org": org, "key_id": key, "ref": f"nim/meta/m{i % 60}@{digest}"}
        doc |= {"grant": f"grant-{i % 300:016x}", "entitlement": f"{i % 20:032x}", "result": result, "reason": reason, "bytes": 12345}
        doc |= {"instance": "00000000-0000-0000-0000-000000000000", "request_id": f"{i:032x}"}
        if i % 3 == 0:
            doc |= {"counted": True, "n": 7, "first": round(at, 3), "last": round(at, 3)}
        body = json.dumps(doc, sort_keys=True, separators=(",", ":"))
        leaf = tlog.leaf_hash(body.encode())
        ended = log.append(leaf)
        for height in range(tlog.HEIGHT, len(ended), tlog.HEIGHT):
            index = (log.size >> height) - 1
            tiles.setdefault((height // tlog.HEIGHT, index // tlog.TILE), bytearray()).extend(ended[height])
        yield i, leaf, body, "C" if reason else "B", at, "pull", org, key, doc["ref"], result, reason


def fill(site: Site, url: str, count: int) -> None:
    """Puts the log into the database."""
    log, tiles = tlog.Range(), dict[tuple[int, int], bytearray]()
    names = ", ".join(f'"{name}"' for name in COLUMNS)
    if url.startswith("sqlite"):
        with sqlite3.connect(url.removeprefix("sqlite:///"), isolation_level=None) as db:
            db.execute("PRAGMA synchronous=OFF")
            db.execute("BEGIN IMMEDIATE")
            db.execute("DELETE FROM audit_pending")
            db.executemany(f"INSERT INTO audit_leaf ({names}) VALUES ({', '.join('?' * len(COLUMNS))})", rows(count, log, tiles))
            db.execute("COMMIT")
    else:
        with psycopg.connect(url.replace("postgresql+psycopg", "postgresql")) as pg:
            pg.execute("DELETE FROM audit_pending")
            with pg.cursor().copy(f"COPY audit_leaf ({names}) FROM STDIN".encode()) as copy:
                for row in rows(count, log, tiles):
                    copy.write_row(row)
            pg.commit()
            pg.autocommit = True
            pg.execute("VACUUM ANALYZE")
    with site.catalog.writing() as conn:
        conn.execute(insert(t.audit_head).values(id=1, size=log.size, nodes=log.nodes(), epoch=1))
        conn.execute(insert(t.audit_tile), [{"level": level, "n": n, "hashes": bytes(raw)} for (level, n), raw in tiles.items()])
    site.log.sign(time.time())


@contextmanager
def opened(folder: Path, database: Postgres | None, count: int) -> Iterator[tuple[Site, dict[str, str]]]:
    """A site of one of the two databases with its log, and the environment in which commands find it."""
    Home.open(folder / "data", create=True)
    env = {"AIRLOCK_DATABASE": database.database()} if database else {}
    settings = Settings.load(folder / "data", environ=env)
    with open_site(settings, background=False) as site:
        fill(site, settings.database_url, count)
        yield site, env


def proofs(site: Site, count: int) -> list[float]:
    """Milliseconds of proofs of entries all over the log, each with its checkpoint opened, as the verb makes them."""
    book, dice = Ledger(site.engine, site.log), random.Random(2)
    note, vkey, head = book.signed(time.time())
    out = []
    for _ in range(count):
        index, began = dice.randrange(head.size), time.perf_counter()
        book.proof(index, note, vkey)
        out.append((time.perf_counter() - began) * 1000)
    return out


def report_s(site: Site, start: float, end: float) -> tuple[float, float, int]:
    """Seconds of a report, CPU-seconds of this process, and its entries."""
    began, cpu = time.perf_counter(), time.process_time()
    with reading(site.engine) as conn:
        found = gathered(conn, Period(start, end, now=end))
    return time.perf_counter() - began, time.process_time() - cpu, int(str(found["entries"]))


def command(env: dict[str, str], *argv: str) -> tuple[float, float]:
    """Seconds and peak MiB of one command in a process of its own."""
    began, peak = time.perf_counter(), 0.0
    process = subprocess.Popen([sys.executable, "-m", "artifact.cli", "audit", *argv], env={**os.environ, **env}, stdout=subprocess.DEVNULL)
    server = Server("audit", 0, [process.pid])
    while process.poll() is None:  # what the kernel counts for a child that has ended begins with its parent's peak
        peak = max(peak, server.rss_mib(peak=True))
        time.sleep(0.05)
    if process.returncode:
        raise RuntimeError(f"airlock audit {argv[0]} ended with {process.returncode}")
    return time.perf_counter() - began, peak


def measure(report: Report, database: Postgres | None, count: int, asked: int) -> None:
    """The rows of one database."""
    name = "PostgreSQL" if database else "SQLite"
    with scratch() as folder, opened(folder, database, count) as (site, env):
        cpu = time.process_time()
        took = sorted(proofs(site, asked))
        cpu, most = (time.process_time() - cpu) * 1000 / asked, took[asked * 95 // 100]
        what = f"{statistics.median(took):.1f}, {most:.1f}, {took[-1]:.1f}, {cpu:.1f}"
        report.row(name, f"{count:,}", "inclusion proof, ms: median, 95th percentile, slowest, CPU", what, "")
        report.at_most(f"{name}: inclusion proof, 95th percentile of {asked}, ms", most, PROOF_MS)
        for what, days in (("month", 30), ("quarter", 91), ("year", 365)):
            seconds, cpu, entries = report_s(site, START, START + days * DAY_S)
            report.row(name, f"{entries:,}", f"report of a {what}, s: on the wall, CPU", f"{seconds:.2f}, {cpu:.2f}", "")
            if what == "month":
                report.at_most(f"{name}: report of a month of {count:,} entries a year, s", seconds, REPORT_S)
        data, key = str(site.home.path), site.log.verifier(1)
        files = [str(folder / name) for name in ("part", "whole")]
        part, small = command(env, "export", files[0], "--first", str(count * 9 // 10), "--data", data)
        whole, large = command(env, "export", files[1], "--data", data)
        report.row(name, f"{count // 10:,}", "export, s", part, small)
        report.row(name, f"{count:,}", "export, s", whole, large)
        report.at_most(f"{name}: export of {count:,} entries above one of a tenth, MiB", large - small, FLAT_MIB)
        part, small = command({}, "verify", files[0], "--key", key)
        whole, large = command({}, "verify", files[1], "--key", key)
        report.row("no database", f"{count:,}", "verify, s", whole, large)
        report.at_most(f"verify of {count:,} entries above one of a tenth, MiB", large - small, FLAT_MIB)


def main() -> None:
    """Measures, prints."""
    args = arguments(__doc__.splitlines()[0])
    count, asked = (100_000, 100) if args.quick else (1_000_000, 300)
    report = Report("The audit log", ("database", "entries", "what", "figure", "peak MiB"))
    measure(report, None, count, asked)
    database = Postgres.make()
    try:
        measure(report, database, count, asked)
    finally:
        database.remove()
    report.show(args.json)


if __name__ == "__main__":
    main()
