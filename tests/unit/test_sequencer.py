"""The signed log on both databases: every committed row once and in one order, proofs out of what is stored, and a history that was put back."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection, delete, func, insert, select, text, update

from artifact import tlog
from artifact.errors import Conflict, Invalid, Mismatch, NotFound, Unavailable
from registry import sequencer
from registry import tables as t
from registry.sequencer import BATCH, FILE, Head, Sequencer, head_of, reader, root_at
from registry.wiring import Site
from tests.site import BACKENDS, SQLITE_ONLY, running_site


@pytest.fixture(params=BACKENDS)
def site(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Site]:
    with running_site(tmp_path, request.param) as opened:
        yield opened


def wait_for(site: Site, *bodies: str) -> None:
    """Rows that wait, as other processes leave them."""
    with site.catalog.writing() as conn:
        conn.execute(insert(t.audit_pending), [{"class": "B", "ts": 1.0 + i, "body": body} for i, body in enumerate(bodies)])


def fill(site: Site, count: int) -> None:
    first = len(bodies_of(site))
    wait_for(site, *(json.dumps({"event": "pull", "org": "acme", "n": first + i}, sort_keys=True) for i in range(count)))
    site.log.settle()


def bodies_of(site: Site) -> list[str]:
    with site.catalog.reading() as conn:
        rows = conn.execute(select(t.audit_leaf.c.idx, t.audit_leaf.c.body).order_by(t.audit_leaf.c.idx)).all()
    assert [row.idx for row in rows] == list(range(len(rows))), "no gap"
    return [str(row.body) for row in rows]


def opened(site: Site, note: str = "") -> tlog.Checkpoint:
    with site.catalog.reading() as conn:
        epoch = head_of(conn).epoch
    return tlog.open_checkpoint(note or site.log.newest(), site.log.verifier(epoch))


def test_the_log_is_the_tree_over_its_bodies(site: Site) -> None:
    assert site.log.settle() == 0 and site.log.newest() == ""
    fill(site, 2 * BATCH + 37)
    bodies = bodies_of(site)
    root = tlog.root_of(tlog.leaf_hash(body.encode()) for body in bodies)
    assert [json.loads(b)["n"] for b in bodies] == list(range(len(bodies)))
    note = site.log.sign(time.time())
    assert opened(site) == opened(site, note) == tlog.Checkpoint(site.home.audit_name, len(bodies), root)
    assert (site.home.path / FILE).read_text() == note
    assert site.log.sign(time.time()) == note, "nothing new, no second one"
    with site.catalog.reading() as conn:
        assert conn.execute(select(func.count()).select_from(t.audit_pending)).scalar_one() == 0
        assert conn.execute(select(t.audit_leaf.c.org, t.audit_leaf.c.event).where(t.audit_leaf.c.idx == 5)).one() == ("acme", "pull")


def test_proofs_out_of_what_is_stored(site: Site) -> None:
    sizes = (1, 255, 1, 1, 255, 700)  # around whole tiles, batches and neither
    signed = []
    for size in sizes:
        fill(site, size)
        signed.append(opened(site, site.log.sign(time.time())))
    bodies = bodies_of(site)
    with site.catalog.reading() as conn:
        read = reader(conn)
        for index in (0, 254, 255, 256, 511, 512, len(bodies) - 1):
            proof = tlog.inclusion(read, index, len(bodies))
            tlog.verify_inclusion(tlog.leaf_hash(bodies[index].encode()), index, len(bodies), proof, signed[-1].root)
        for old in signed:
            tlog.verify_consistency(old.size, signed[-1].size, old.root, signed[-1].root, tlog.consistency(read, old.size, signed[-1].size))
            assert root_at(conn, old.size) == old.root


def test_eight_writers_that_commit_late_lose_nothing(site: Site) -> None:
    """A number is given before the commit: whoever takes `id > last` skips the late ones, which the last lines show for PostgreSQL."""
    stop, seen, skipped = threading.Event(), list[str](), set[str]()

    def write(worker: int) -> None:
        dice = random.Random(worker)
        for i in range(15):
            with site.catalog.writing() as conn:
                conn.execute(insert(t.audit_pending).values(**{"class": "A", "ts": 1.0, "body": f'{{"w": {worker}, "i": {i}}}'}))
                if site.engine.dialect.name == "postgresql":
                    time.sleep(dice.random() / 20)

    def naive() -> None:
        last = 0
        while not stop.is_set():
            with site.catalog.reading() as conn:
                rows = conn.execute(select(t.audit_pending.c.id, t.audit_pending.c.body).where(t.audit_pending.c.id > last)).all()
            seen.extend(row.body for row in rows)
            last = max([last, *(row.id for row in rows)])

    workers = [threading.Thread(target=write, args=(n,)) for n in range(8)]
    watcher = threading.Thread(target=naive)
    late = site.engine.dialect.name == "postgresql"
    if late:
        watcher.start()
    for worker in workers:
        worker.start()
    while any(worker.is_alive() for worker in workers):
        if not late:
            site.log.settle()
        time.sleep(0.005)
    stop.set()
    if late:
        watcher.join()
        with site.catalog.reading() as conn:
            skipped = set(conn.execute(select(t.audit_pending.c.body)).scalars()) - set(seen)
        assert skipped, "the naive form loses events here, so this test can fail"
    site.log.settle()
    assert sorted(bodies_of(site)) == sorted(f'{{"w": {w}, "i": {i}}}' for w in range(8) for i in range(15))


@pytest.mark.server
@pytest.mark.parametrize("site", [BACKENDS[1]], indirect=True)
def test_an_older_transaction_holds_the_log_back(site: Site) -> None:
    late = site.engine.connect()
    late.execute(insert(t.audit_pending).values(**{"class": "A", "ts": 1.0, "body": '{"n": 1}'}))
    wait_for(site, '{"n": 2}')
    assert site.log.settle() == 0 and bodies_of(site) == [], "what began before it may still come"
    late.commit()
    late.close()
    assert site.log.settle() == 2 and bodies_of(site) == ['{"n": 1}', '{"n": 2}']
    with site.engine.connect() as undone:
        undone.execute(insert(t.audit_pending).values(**{"class": "A", "ts": 1.0, "body": '{"n": 3}'}))
        undone.rollback()
    assert site.log.settle() == 0 and len(bodies_of(site)) == 2


def test_two_sequencers_at_once(site: Site) -> None:
    expected = []
    for turn in range(6):
        part = [json.dumps({"n": turn * 400 + i}) for i in range(400)]
        expected += part
        wait_for(site, *part)
        errors: list[BaseException] = []

        def work(errors: list[BaseException] = errors) -> None:
            try:
                site.log.settle()
                site.log.sign(time.time())
            except Conflict as error:
                assert error.reason == "log_moved"
            except BaseException as error:
                errors.append(error)

        both = [threading.Thread(target=work) for _ in range(2)]
        for thread in both:
            thread.start()
        for thread in both:
            thread.join()
        assert not errors
    site.log.settle()
    assert sorted(bodies_of(site)) == sorted(expected)
    assert opened(site, site.log.sign(time.time())).root == tlog.root_of(tlog.leaf_hash(b.encode()) for b in bodies_of(site))


_KILLED = """
import os, signal, sys, time
from pathlib import Path
from sqlalchemy import event
from registry.settings import Settings
from registry.wiring import open_site
site = open_site(Settings.load(Path(sys.argv[1])), background=False)
left = int(sys.argv[2])
def count(*_):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
for name in ("before_cursor_execute", "after_cursor_execute", "commit"):
    event.listen(site.engine, name, count)
replaced = Path.replace
def replace(self, to):
    count()
    done = replaced(self, to)
    count()
    return done
Path.replace = replace
site.log.settle(); site.log.sign(time.time())
print("whole", flush=True)
"""


@pytest.mark.server
def test_killed_at_every_step(site: Site) -> None:
    env = {**os.environ, "AIRLOCK_DATABASE": site.settings.database}
    fill(site, 300)
    site.log.sign(time.time())
    expected = bodies_of(site)
    for step in range(1, 100):
        more = [json.dumps({"step": step, "n": i}) for i in range(3)]
        wait_for(site, *more)
        expected += more
        argv = [sys.executable, "-c", _KILLED, str(site.home.path), str(step)]
        done = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=120, cwd=Path(__file__).parents[2])
        assert done.returncode in (0, -signal.SIGKILL), done.stderr
        kept = tlog.open_checkpoint((site.home.path / FILE).read_text(), site.log.verifier(1))
        with site.catalog.reading() as conn:
            assert kept.size <= head_of(conn).size and root_at(conn, kept.size) == kept.root
        if done.returncode == 0:
            break
    else:
        pytest.fail("the run never came to its end")
    assert step > 15, "each statement, commit and rename was a step"
    site.log.settle()
    assert bodies_of(site) == expected
    assert opened(site, site.log.sign(time.time())).size == len(expected)


@SQLITE_ONLY
def test_a_database_that_was_put_back_signs_nothing_more(site: Site, tmp_path: Path) -> None:
    fill(site, 10)
    site.log.sign(time.time())
    with site.engine.connect() as conn:
        conn.exec_driver_sql(f"VACUUM INTO '{tmp_path / 'monday.db'}'")
    fill(site, 5)
    lost = opened(site, site.log.sign(time.time()))
    site.engine.dispose()
    for suffix in ("", "-wal", "-shm"):
        (site.home.path / f"registry.db{suffix}").unlink(missing_ok=True)
    shutil.copy(tmp_path / "monday.db", site.home.path / "registry.db")
    for more in (0, 5, 20):  # smaller, of the same size, and larger than what was signed
        if more:
            wait_for(site, *(json.dumps({"other": i}) for i in range(more)))
        with pytest.raises(Conflict, match="audit log was put back") as told:
            site.log.settle()
            site.log.sign(time.time())
        assert told.value.reason == "audit_fork" and site.log.fork and opened(site, (site.home.path / FILE).read_text()) == lost
    given_up: list[str] = []

    def row(conn: Any, note: str) -> None:
        given_up.append(note)
        conn.execute(insert(t.audit_pending).values(**{"class": "A", "ts": 1.0, "body": json.dumps({"event": "audit_fork", "given_up": note})}))

    assert site.log.accept_fork(row) == 2 and opened_old(site, given_up[0]) == lost
    site.log.settle()
    begun = opened(site, site.log.sign(time.time()))
    assert begun.origin == site.home.audit_name + "/2" and begun.size == len(bodies_of(site)) and "given_up" in bodies_of(site)[-1]
    with pytest.raises(NotFound):
        site.log.accept_fork(row)


@SQLITE_ONLY
def test_a_backup_from_before_an_accepted_fork_is_a_fork_too(site: Site) -> None:
    """Else a second history would be signed under the first name, or under that of the accepted one."""
    fill(site, 10)
    site.log.sign(time.time())
    with site.catalog.writing() as conn:
        conn.execute(update(t.audit_head).values(epoch=2))
    fill(site, 3)
    second = opened(site, site.log.sign(time.time()))
    assert second.origin == site.home.audit_name + "/2" and second.size == 13
    with site.catalog.writing() as conn:
        conn.execute(update(t.audit_head).values(epoch=1))
    with pytest.raises(Conflict) as told:
        site.log.sign(time.time())
    assert told.value.reason == "audit_fork" and tlog.open_checkpoint((site.home.path / FILE).read_text(), site.log.verifier(2)) == second
    assert site.log.accept_fork(lambda conn, note: None) == 3 and not site.log.fork
    assert opened(site, site.log.sign(time.time())).origin == site.home.audit_name + "/3"


def test_another_process_that_signs_at_this_moment_is_no_fork(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(site, 10)
    site.log.sign(time.time())
    other = Sequencer(site.engine, site.home.path, site.home.audit_name, site.home.audit_key)

    def slow(conn: Connection) -> Head:
        found = head_of(conn)
        monkeypatch.undo()
        fill(site, 5)
        other.sign(time.time())
        return found

    wait_for(site, '{"n": "x"}')
    site.log.settle()
    monkeypatch.setattr(sequencer, "head_of", slow)
    assert opened(site, site.log.sign(time.time())).size == 11 and not site.log.fork
    assert opened(site, (site.home.path / FILE).read_text()).size == 16, "the longer one is kept"
    assert opened(site, site.log.sign(time.time())).size == 16


@pytest.mark.server
@pytest.mark.parametrize("site", [BACKENDS[1]], indirect=True)
def test_rows_of_another_server_that_were_restored_by_hand_enter_the_log(site: Site) -> None:
    wait_for(site, '{"n": 1}')
    with site.catalog.writing() as conn:
        conn.execute(text("UPDATE audit_pending SET xid = '4000000000000'"))  # as a dump of a server that is years older says
    wait_for(site, '{"n": 2}')
    assert site.log.settle() == 2 and bodies_of(site) == ['{"n": 1}', '{"n": 2}']


def opened_old(site: Site, note: str) -> tlog.Checkpoint:
    return tlog.open_checkpoint(note, site.log.verifier(1))


def test_rows_that_were_altered_contradict_what_was_signed(site: Site) -> None:
    fill(site, 300)
    site.log.sign(time.time())
    with site.catalog.writing() as conn:
        conn.execute(update(t.audit_leaf).where(t.audit_leaf.c.idx == 290).values(leaf_hash=b"\0" * 32))
    with pytest.raises(Conflict, match="audit log was put back"):
        site.log.sign(time.time())
    with site.catalog.writing() as conn:
        conn.execute(delete(t.audit_leaf).where(t.audit_leaf.c.idx == 290))
    with pytest.raises(Invalid, match="hashes of the log are missing"), site.catalog.reading() as conn:
        root_at(conn, 300)


def test_counters_whose_window_is_over_become_rows(site: Site) -> None:
    values = {"class": "B", "key": "k", "since": 100.0, "last": 160.0, "n": 7, "body": '{"event": "pull", "org": "acme"}'}
    with site.catalog.writing() as conn:
        conn.execute(insert(t.audit_count), [values, values | {"key": "young", "since": 90_000.0}])
    assert site.audit.retire(91_000.0) == 1 and site.audit.retire(91_000.0) == 0
    site.log.settle()
    assert [json.loads(b) for b in bodies_of(site)] == [{"event": "pull", "org": "acme", "counted": True, "n": 7, "first": 100.0, "last": 160.0}]
    with site.catalog.reading() as conn:
        assert conn.execute(select(t.audit_count.c.key)).scalars().all() == ["young"]


@SQLITE_ONLY
def test_a_damaged_checkpoint_file_is_no_missing_one(site: Site) -> None:
    fill(site, 3)
    site.log.sign(time.time())
    text_ = (site.home.path / FILE).read_text()
    (site.home.path / FILE).write_text(text_.replace("\n3\n", "\n2\n"))
    with pytest.raises(Mismatch, match="does not verify"):
        site.log.sign(time.time())
    for damaged in ("", text_[:3], text_.replace("airlock-", "another-")):
        (site.home.path / FILE).write_text(damaged)
        with pytest.raises(Unavailable, match="no checkpoint of this site's log"):
            site.log.sign(time.time())
    (site.home.path / FILE).unlink()
    assert opened(site, site.log.sign(time.time())).size == 3
    assert opened(site, (site.home.path / FILE).read_text()).size == 3, "kept again, also where nothing is new"


def test_the_thread_signs_what_another_put_into_the_log(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sequencer, "EVERY_S", 0.02)
    monkeypatch.setattr(sequencer, "SIGN_S", 0.05)
    errors: list[Exception] = []
    fill(site, 1)
    site.log.start(errors.append)
    for size in (1, 4):
        end = time.monotonic() + 60
        while (not site.log.newest() or opened(site).size < size) and time.monotonic() < end:
            time.sleep(0.02)
        assert opened(site).size == size and not errors
        wait_for(site, *(json.dumps({"n": i}) for i in range(3)))
        Sequencer(site.engine, site.home.path, site.home.audit_name, site.home.audit_key).settle()
    site.log.close()


@pytest.mark.slow
def test_the_thread_sequences_and_signs_at_its_end(site: Site) -> None:
    errors: list[Exception] = []
    site.log.start(errors.append)
    wait_for(site, *(json.dumps({"n": i}) for i in range(5)))
    end = time.monotonic() + 60
    while len(bodies_of(site)) < 5 and time.monotonic() < end:
        time.sleep(0.1)
    site.log.close()
    assert opened(site).size == 5 and not errors
    with site.catalog.reading() as conn:
        assert conn.execute(text("SELECT COUNT(*) FROM audit_pending")).scalar_one() == 0
