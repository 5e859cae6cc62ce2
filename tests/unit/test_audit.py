"""First reads that commit together: stored before they return, in order, bounded, and never lost when the database refuses."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import event, func, select

from artifact.errors import Unavailable
from artifact.grant import Decision, Principal
from artifact.store import Call
from registry import audit as a
from registry import tables as t
from registry.wiring import Site
from tests.site import BACKENDS, SQLITE_ONLY, running_site

WRITERS = 8
EACH = 50


@pytest.fixture(params=BACKENDS)
def site(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Site]:
    with running_site(tmp_path, request.param) as opened:
        yield opened


def call(key_id: str, now: float = 1000.0) -> Call:
    return Call(Principal(key_id), Decision(True, ""), "r", now)


def stored(site: Site) -> list[dict[str, object]]:
    with site.catalog.reading() as conn:
        return [json.loads(body) for body in conn.execute(select(t.audit_pending.c.body).order_by(t.audit_pending.c.id)).scalars()]


def together(*works: object) -> list[BaseException]:
    """Runs all at once and returns what they raised."""
    raised: list[BaseException] = []

    def one(work: object) -> None:
        try:
            work()  # type: ignore[operator]
        except BaseException as error:
            raised.append(error)

    threads = [threading.Thread(target=one, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    return raised


@pytest.mark.slow
def test_first_reads_of_many_threads_share_transactions_and_keep_their_order(site: Site) -> None:
    commits: list[int] = []
    event.listen(site.engine, "commit", lambda _conn: commits.append(1))
    missing: list[str] = []

    def reader(n: int) -> None:
        for i in range(EACH):
            site.audit.read(call(f"k{n}"), "acme/x", f"sha256:{i:064}", 1)
            with site.catalog.reading() as conn:  # on another connection: it is committed when read() returns
                found = conn.execute(select(func.count()).where(t.audit_pending.c.body.contains(f'"k{n}"'))).scalar_one()
            if found != i + 1:
                missing.append(f"{n}/{i}: {found}")

    assert together(*(lambda n=n: reader(n) for n in range(WRITERS))) == [] and missing == []
    rows = stored(site)
    assert len(rows) == WRITERS * EACH and len(commits) <= len(rows)
    for n in range(WRITERS):
        assert [r["ref"] for r in rows if r["key_id"] == f"k{n}"] == [f"acme/x@sha256:{i:064}" for i in range(EACH)]


def test_the_second_of_two_equal_reads_waits_for_the_row_of_the_first(site: Site) -> None:
    assert together(*(lambda: site.audit.read(call("k"), "acme/x", "sha256:1", 1) for _ in range(20))) == []
    assert len(stored(site)) == 1
    assert site.audit.flush() == 1


@SQLITE_ONLY
def test_nobody_is_let_through_while_the_row_cannot_be_stored(site: Site) -> None:
    with site.catalog.writing() as conn:
        conn.exec_driver_sql("ALTER TABLE audit_pending RENAME TO away")
    raised = together(*(lambda: site.audit.read(call("k"), "acme/x", "sha256:1", 1) for _ in range(10)))
    assert len(raised) == 10 and all(isinstance(error, Unavailable) for error in raised)
    with site.catalog.writing() as conn:
        conn.exec_driver_sql("ALTER TABLE away RENAME TO audit_pending")
    site.audit.read(call("k"), "acme/x", "sha256:1", 1)
    assert len(stored(site)) == 1


@pytest.mark.slow
@SQLITE_ONLY
def test_a_read_waits_no_longer_than_its_bound(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(a, "WAIT_S", 1.0)
    with site.catalog.writing():  # holds SQLite's one write lock, so that the first waits in the database and the second for the first
        first = threading.Thread(target=lambda: site.audit.read(call("one"), "acme/x", "sha256:1", 1))
        first.start()
        while not site.audit._group._writing:
            time.sleep(0.01)
        began = time.monotonic()
        with pytest.raises(Unavailable, match="in time"):
            site.audit.read(call("two"), "acme/x", "sha256:1", 1)
        assert time.monotonic() - began < 25
    first.join(60)
    assert [r["key_id"] for r in stored(site)] == ["one"]  # whoever was refused left no row behind
    site.audit.read(call("two"), "acme/x", "sha256:1", 1)
    assert len(stored(site)) == 2


def test_forged_sources_cannot_fill_the_database(site: Site) -> None:
    for i in range(3000):
        site.audit.denied(call("", 1000 + i / 1000), "login", "", "unauthenticated", f"10.{i // 250}.{i % 250}.1")
    assert len(stored(site)) == a.NETWORKS_PER_MINUTE + 1
    assert {r["network"] for r in stored(site)} >= {"many"}
    site.audit.flush()
    with site.catalog.reading() as conn:
        counted = conn.execute(select(func.sum(t.audit_count.c.n))).scalar_one()
    assert int(counted) == 3000 - a.NETWORKS_PER_MINUTE


def test_windows_end_by_the_clock_also_when_it_jumps(site: Site) -> None:
    for at in (1000.0, 1001.0, 500.0, 2000.0):  # back, then more than 15 minutes ahead: a row each, never a lost fact
        site.audit.read(call("k", at), "acme/x", "sha256:1", 1)
    assert [r["ts"] for r in stored(site)] == [1000.0, 500.0, 2000.0]
    site.audit.flush()
