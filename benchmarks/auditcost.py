"""What the audit log costs the manifest GET: the same server with and without it, in turns, on PostgreSQL with 8 clients at once.

"Without" is the same program in which recording a read does nothing (a patch of this file, no setting of the product). Measured are repeated reads,
whose audit is a counter, and first reads, each of which stores a row before its answer and is put into the signed log behind it: the worst case.
What the sequencer still has to do when the answers are there is waited for and counted. PostgreSQL's processes are counted with ours.
"""

from __future__ import annotations

import functools
import itertools
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psycopg

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from _load import Connection, Figure, expect, measured
from _servers import Server, airlock, scratch
from _table import Report, arguments
from manifests import TYPE, fill, place

from tests.services.postgres import Postgres

CLIENTS = 8
KEPT = 0.8
PATCH = "import registry.audit\nregistry.audit.Audit.read = lambda *args, **kwargs: None\n"


def ask(server: Server, url: str, paths: list[str]) -> int:
    """GETs of the paths by 8 clients at once, until the log holds what they recorded."""
    failed: list[BaseException] = []
    queue = iter(paths)
    lock = threading.Lock()

    def work() -> None:
        try:
            with Connection(server) as connection:
                while True:
                    with lock:
                        part = list(itertools.islice(queue, 20))
                    if not part:
                        return
                    for path in part:
                        connection.sock.sendall(connection.head("GET", path, {"Accept": TYPE}))
                        expect(connection.answer(), 200)
        except (OSError, RuntimeError) as error:
            failed.append(error)

    threads = [threading.Thread(target=work) for _ in range(CLIENTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]
    with psycopg.connect(url, autocommit=True) as pg:
        while pg.execute("SELECT EXISTS (SELECT FROM audit_pending)").fetchone() == (True,):
            time.sleep(0.2)
    return len(paths)


def demand(url: str, audited: bool, least: int) -> None:
    """Returns where the log holds what it should: `least` pulls, or none without the audit."""
    with psycopg.connect(url, autocommit=True) as pg:
        row = pg.execute("SELECT COUNT(*) FROM audit_leaf WHERE event = 'pull'").fetchone()
    found = int(row[0]) if row else 0
    if (found < least) if audited else found:
        raise RuntimeError(f"{found} pulls are in the log {'with' if audited else 'without'} the audit")


@contextmanager
def serving(folder: Path, database: Postgres, count: int, audited: bool) -> Iterator[tuple[Server, str]]:
    """A server over `count` manifests, with its audit or without."""
    url, env = database.database(), {}
    folder.mkdir(parents=True)
    if not audited:
        (folder / "patch").mkdir()
        (folder / "patch" / "sitecustomize.py").write_text(PATCH)
        env["PYTHONPATH"] = str(folder / "patch")
    with airlock(folder, fill=lambda place: fill(place, count), AIRLOCK_DATABASE=url, **env) as server:
        server.pids.append(database.pid)
        yield server, url


def main() -> None:
    """Measures, prints."""
    args = arguments(__doc__.splitlines()[0])
    count, asks = (6_000, 1_000) if args.quick else (60_000, 8_000)
    report = Report("Cost of the audit log", ("reads", "audit", "requests per CPU-second", "requests/s, the log's end included"))
    best: dict[tuple[str, bool], Figure] = {}
    database = Postgres.make()
    try:
        with ExitStack() as stack:
            folder = stack.enter_context(scratch())
            servers = {audited: stack.enter_context(serving(folder / str(audited), database, count, audited)) for audited in (True, False)}
            for server, url in servers.values():
                ask(server, url, [place(i) for i in range(200)])
            for turn in range(args.rounds):
                fresh = [place(i) for i in range(200 + turn * asks, 200 + (turn + 1) * asks)]
                for what, paths in (("first", fresh), ("repeated", [place(i % 50) for i in range(asks)])):
                    for audited, (server, url) in servers.items():
                        figure = measured(server, functools.partial(ask, server, url, paths))
                        best[what, audited] = max(best.get((what, audited), figure), figure, key=lambda f: f.per_cpu_s)
                        demand(url, audited, asks * (turn + 1))
                        report.row(what, "yes" if audited else "no", f"{figure.per_cpu_s:.0f}", f"{figure.count / figure.seconds:.0f}")
    finally:
        database.remove()
    for what in ("first", "repeated"):
        report.at_least(f"{what} reads with audit / without, per CPU-second", best[what, True].per_cpu_s / best[what, False].per_cpu_s, KEPT)
    report.show(args.json)


if __name__ == "__main__":
    main()
