"""Runs the garbage collection: uploads nobody continued, retention, manifests, blobs, at last the bytes; in steps that others wait little for.

One run at a time by the row of the job, for economy only: every step is right beside another run, beside pushes, and after a kill at any point.
A dry run is the same code in one transaction that is taken back; on SQLite in a copy, so that nobody waits for it.
A run whose clock is far from where the last run left it takes nothing: every step goes by age.
"""

from __future__ import annotations

import logging
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import islice
from typing import Any

from sqlalchemy import Connection, Engine, StaticPool, create_engine, select

from artifact.errors import AirlockError, Conflict, Unavailable
from artifact.grant import date, model_of
from registry import holdings, job
from registry.database import retried, writing
from registry.library import Library, local_call
from registry.links import delete_ref, unlink_manifest
from registry.retention import Goes, Plan, Rule, Version, parts, plan, rule_for
from registry.statements import M, Repo
from registry.sweep import BATCH, Batch, adopt, due_garbage, forget_garbage, postpone, sweep_blobs, sweep_manifests

NAME = "gc"
PART = 200  # tags and manifests that retention takes in one transaction
BYTES_BATCH = 100
CLAIM_S = 30.0  # a run that slept longer asks again what it may remove
WALK = "gc-walk"
WALK_S = 86400.0
STAGED_S = 86400.0  # what no upload's row names and nobody wrote to for so long
DRY_S = 20.0  # a dry run takes no longer than this, and on PostgreSQL its row locks
CLOCK = "gc-clock"
AHEAD_S = 7 * 86400.0  # a clock further ahead of the last run's, and of ten periods, or further behind it, is not believed
AHEAD_PERIODS = 10
BEHIND_S = 3600.0
LISTED = 10_000
TOLD = 200
LOOK_S = 30.0
LOG = logging.getLogger("airlock.jobs")
Progress = Callable[[str, int], None]


@dataclass
class Report:
    """What a run did, or would do: counts, the bytes let go of, the bytes removed from the store, and single things with their reasons."""

    at: float
    dry_run: bool = False
    complete: bool = True
    uploads: int = 0
    staging: int = 0
    adopted: int = 0
    tags: int = 0
    manifests: int = 0
    links: int = 0
    blobs: int = 0
    bytes: int = 0
    removed: int = 0
    removed_bytes: int = 0
    failed: int = 0
    retained: list[dict[str, object]] = field(default_factory=list)
    items: list[dict[str, object]] = field(default_factory=list)
    orphans: list[dict[str, str]] = field(default_factory=list)
    error: str = ""
    warning: str = ""
    unjudged: str = ""  # why retention took nothing, or not all: what the rules may take was not to be known

    def count(self, batch: Batch) -> None:
        """Adds what a batch did."""
        self.links += batch.links
        self.manifests += len(batch.manifests)
        self.blobs += len(batch.blobs)
        self.bytes += sum(size for _, size in batch.blobs)
        if self.dry_run:
            room = LISTED - len(self.items)
            found: list[dict[str, object]] = [{"kind": "manifest", "digest": digest} for digest in batch.manifests]
            found += [{"kind": "blob", "digest": digest, "bytes": size} for digest, size in batch.blobs]
            self.items += found[: max(room, 0)]

    def as_json(self, told: int = LISTED) -> dict[str, object]:
        """The report as a JSON object, its lists cut to `told` items."""
        out: dict[str, Any] = asdict(self)
        return out | {key: out[key][:told] for key in ("retained", "items", "orphans")}


class _Undo(Exception):
    """Takes a dry run's transaction back."""


@contextmanager
def _trial(engine: Engine) -> Iterator[Connection]:
    """A transaction that is taken back. SQLite has one writer, so there it is a copy of this moment; raises Unavailable."""
    if engine.dialect.name != "sqlite":
        with suppress(_Undo), writing(engine) as conn:
            yield conn
            raise _Undo
        return
    with closing(sqlite3.connect("", check_same_thread=False, isolation_level=None)) as copy:  # a file that is gone with its connection
        try:
            copy.execute("PRAGMA foreign_keys=ON")
            with closing(engine.raw_connection()) as source:
                source.driver_connection.backup(copy)  # type: ignore[union-attr]
        except sqlite3.Error as error:
            words = f"the database cannot be copied for a look: {error}"
            raise Unavailable(words, do="free as much space as registry.db takes in /var/tmp, or set SQLITE_TMPDIR", reason="disk_full") from error
        with create_engine("sqlite://", creator=lambda: copy, poolclass=StaticPool).connect() as conn:
            yield conn


def _silent(phase: str, done: int) -> None:
    """No progress is shown."""


class Collector:
    """Collects for one site; `garbage_delay_s` is how long bytes outlive the last row that named them, `every_s` the time between its runs."""

    def __init__(self, library: Library, garbage_delay_s: float, batch: int = BATCH, *, every_s: float = 0) -> None:
        self._library, self._delay, self._batch = library, garbage_delay_s, batch
        self._ahead_s = max(AHEAD_S, AHEAD_PERIODS * every_s)
        self._engine = library.catalog.engine
        self.profiles = holdings.Profiles(library)
        self._stop = threading.Event()
        self._threads: list[threading.Thread] = []

    # ---- runs

    def run(self, now: float, *, progress: Progress = _silent, held: job.Job | None = None, clock_is_right: bool = False) -> Report:
        """One collection, which takes nothing and warns where `now` is not to be believed; raises Conflict `running`, Unavailable."""
        mine = held or job.Job.take(self._engine, NAME, now)
        report = Report(now, complete=False)

        def told(phase: str, done: int) -> None:
            progress(phase, done)
            mine.beat(phase, done)

        try:
            report.warning = "" if clock_is_right else self._doubt(now)
            if report.warning:
                LOG.warning("the collection takes nothing: %s", report.warning)
            else:
                job.note(self._engine, CLOCK, {}, now)
                self._run(report, told)
        except (AirlockError, OSError) as error:
            report.error = error.what if isinstance(error, AirlockError) else f"{error.filename}: {error.strerror}"
            raise
        finally:
            with suppress(Conflict):  # taken over: it is another run's by now
                mine.end(report.as_json(TOLD), time.time())
            figures = {k: v for k, v in asdict(report).items() if type(v) in (int, bool) or k in ("error", "warning", "unjudged")}
            LOG.info("job ended", extra={"facts": {"job": NAME, **figures, "seconds": round(time.time() - report.at, 3)}})
        return report

    def _doubt(self, now: float) -> str:
        """Why the clock is not to be believed, compared with the last run that believed it, or where there was none the server's first start."""
        last = job.last_ended(self._engine, CLOCK)
        if not last or -BEHIND_S <= now - last <= self._ahead_s:
            return ""
        size = abs(now - last)
        far = f"{size / 86400:.0f} days" if size >= 2 * 86400 else f"{size / 3600:.1f} hours"
        return f"the clock ({date(now)}) is {far} {'ahead of' if now > last else 'behind'} the last run ({date(last)})"

    def _run(self, report: Report, progress: Progress) -> None:
        now = report.at
        report.uploads = self._library.sweep_uploads(now)
        report.staging = self._library.blobs.sweep(holdings.upload_ids(self._engine), now - STAGED_S)
        progress("uploads", report.uploads)
        self._adopt(report, progress)
        self._retention(report, progress)
        for phase, step in (
            ("manifests", lambda conn: sweep_manifests(conn, now, limit=self._batch)),
            ("blobs", lambda conn: sweep_blobs(conn, now, self._delay, limit=self._batch)),
        ):
            seen = 1
            while seen and not self._stop.is_set():
                batch = retried(self._engine, step)
                seen = batch.seen
                report.count(batch)
                progress(phase, report.manifests if phase == "manifests" else report.blobs)
        self._remove_bytes(report, progress)
        with writing(self._engine) as conn:
            report.orphans = holdings.orphans(conn, TOLD)
            if report.manifests or report.blobs or report.removed or report.tags:
                totals = {k: v for k, v in asdict(report).items() if type(v) is int}
                self._library.audit.change(conn, local_call(now), NAME, "", **totals)
        report.complete = not self._stop.is_set()

    def _adopt(self, report: Report, progress: Progress) -> None:
        """Once a day looks through the store for bytes without a row, which a killed upload leaves; they are leased as long as an upload lives."""
        if 0 <= report.at - job.last_ended(self._engine, WALK) < WALK_S:
            return
        walk, until, seen = self._library.blobs.walk(), report.at + self._library.uploads.ttl_s, 0
        while page := [(place, size, self._library.blobs.digest_of(place)) for place, size in islice(walk, BATCH)]:
            report.adopted += retried(self._engine, partial(adopt, places=page, until=until))
            seen += len(page)
            progress("store", seen)
            if self._stop.is_set():
                return
        job.note(self._engine, WALK, {"seen": seen, "adopted": report.adopted}, report.at)

    def _remove_bytes(self, report: Report, progress: Progress) -> None:
        """Removes bytes whose delay is over; their rows go last, so that whoever publishes the same digest meanwhile takes another place."""
        while not self._stop.is_set():
            due = retried(self._engine, lambda conn: due_garbage(conn, report.at, BYTES_BATCH))
            if not due:
                return
            claimed = time.monotonic()
            gone: list[str] = []
            stuck: list[str] = []
            for location, size in due:
                if time.monotonic() - claimed > CLAIM_S:
                    break
                try:
                    self._library.blobs.delete(location)
                except (AirlockError, OSError):
                    stuck.append(location)  # tried again by a later run; the others do not wait for it
                    continue
                gone.append(location)
                report.removed_bytes += size
            progress("unlinked", len(gone))
            retried(self._engine, partial(_settle, gone=gone, stuck=stuck, now=report.at))
            report.removed += len(gone)
            report.failed += len(stuck)
            progress("bytes", report.removed)

    # ---- retention

    def _retention(self, report: Report, progress: Progress) -> None:
        rules = retried(self._engine, holdings.rules)
        if not rules:
            return
        for profiles in (True, False):  # profile manifests first: what they name may go when they have gone
            with self._library.catalog.reading() as conn:
                names = holdings.repositories(conn, profiles)
                pins = self._pins(conn, report)
            if pins is None:
                return
            for name in names:
                rule = rule_for(rules, model_of(name))
                repo = self._library.catalog.repository(name) if rule else None
                while rule and repo and not self._stop.is_set() and self._wanted(repo, rule, pins, report.at):
                    done = retried(self._engine, partial(self._retain, repo=repo, rule=rule, pins=pins, now=report.at))
                    report.retained += [_told(name, item, None) for item in done]
                    report.tags += sum(1 for item in done if item.tag)
                    progress("retention", len(report.retained))
                    if not done:
                        break

    def _pins(self, conn: Connection, report: Report) -> holdings.Pins | None:
        """What profiles name; None, which the report tells, where one of them cannot be read: not sure means kept."""
        try:
            return self.profiles.pins(conn)
        except Unavailable as error:
            if error.reason != "pins":
                raise
            report.unjudged = error.what
            LOG.warning("retention is skipped: %s", error.what)
            return None

    def _wanted(self, repo: Repo, rule: Rule, pins: holdings.Pins, now: float) -> bool:
        """Whether the rule may take anything: looked at without a write transaction, since most repositories have nothing to give."""
        with self._library.catalog.reading() as conn:
            return bool(self._plan(conn, repo, rule, pins, now)[0].goes) or holdings.unstamped(conn, repo.id)

    def _retain(self, conn: Connection, repo: Repo, rule: Rule, pins: holdings.Pins, now: float) -> list[Goes]:
        """Applies the rule to one repository, at most about PART tags and manifests; the plan counts only for rows that nobody else uses now."""
        holdings.stamp(conn, repo.id, now)
        wish, _ = self._plan(conn, repo, rule, pins, now)
        digests = sorted({item.digest for item in wish.goes})
        if not digests:
            return []
        locked: set[str] = set()
        for i in range(0, len(digests), BATCH):
            rows = select(M.c.digest).where(M.c.digest.in_(digests[i : i + BATCH])).order_by(M.c.digest)
            locked.update(conn.execute(rows.with_for_update(skip_locked=True)).scalars())
        wish, versions = self._plan(conn, repo, rule, pins, now)  # once more, of what was committed before the locks
        whole = [item for group in parts(wish.goes, versions, 1) if all(g.digest in locked for g in group) for item in group]
        for group in parts(whole, versions, PART)[:1]:
            self._apply(conn, repo, group, now)
            return group
        return []

    def _plan(self, conn: Connection, repo: Repo, rule: Rule, pins: holdings.Pins, now: float) -> tuple[Plan, list[Version]]:
        tags, versions = holdings.facts(conn, repo, now, pins)
        return plan(tags, versions, rule, now, immutable=repo.immutable), versions

    def _apply(self, conn: Connection, repo: Repo, group: list[Goes], now: float) -> None:
        call = local_call(now)
        for item in sorted(group, key=lambda g: not g.tag):
            if item.tag:
                delete_ref(conn, repo.id, item.tag, at=now, key_id=NAME)
            else:
                unlink_manifest(conn, repo.id, item.digest, now, key_id=NAME)
            label = f"{repo.name}:{item.tag}@{item.digest}" if item.tag else f"{repo.name}@{item.digest}"
            self._library.audit.change(conn, call, "retention", label, why=item.why)

    # ---- dry runs

    def dry_run(self, now: float, *, progress: Progress = _silent, clock_is_right: bool = False) -> Report:
        """What a run would do now, of what is there now; nothing is changed, and after 20 s the answer is incomplete; raises Unavailable."""
        report = Report(now, dry_run=True, warning="" if clock_is_right else self._doubt(now))
        if report.warning:
            report.complete = False
            return report
        report.uploads = len(self._library.catalog.expired_uploads(now))
        with self._library.catalog.reading() as conn:
            self._pins(conn, report)  # reads the documents before the transaction begins
        with _trial(self._engine) as conn:
            self._try(conn, report, progress, time.monotonic() + DRY_S)
        return report

    def _try(self, conn: Connection, report: Report, progress: Progress, end: float) -> None:
        now = report.at
        due = due_garbage(conn, now, LISTED)
        report.removed, report.removed_bytes = len(due), sum(size for _, size in due)
        self._try_retention(conn, report, end)
        for phase, step in (("manifests", sweep_manifests), ("blobs", lambda c, n, limit: sweep_blobs(c, n, self._delay, limit=limit))):
            seen = 1
            while seen and time.monotonic() < end:
                batch = step(conn, now, limit=self._batch)
                seen = batch.seen
                report.count(batch)
                progress(phase, report.manifests if phase == "manifests" else report.blobs)
        report.orphans = holdings.orphans(conn, TOLD)
        report.complete = time.monotonic() < end

    def _try_retention(self, conn: Connection, report: Report, end: float) -> None:
        rules = holdings.rules(conn)
        for profiles in (True, False) if rules else ():
            pins = self._pins(conn, report)
            if pins is None:
                return
            for name in holdings.repositories(conn, profiles):
                rule = rule_for(rules, model_of(name))
                repo = self._library.catalog.repository(name) if rule else None
                if rule is None or repo is None:
                    continue
                wish, versions = self._plan(conn, repo, rule, pins, report.at)
                for group in parts(wish.goes, versions, 1):
                    if time.monotonic() > end:
                        return
                    self._try_group(conn, report, repo, group)

    def _try_group(self, conn: Connection, report: Report, repo: Repo, group: list[Goes]) -> None:
        """Takes one tree of manifests away and looks what it frees, before the next one is looked at."""
        digests = [item.digest for item in group if not item.tag]
        blobs = sorted(holdings.blobs_of(conn, digests))
        self._apply(conn, repo, group, report.at)
        before = report.bytes
        while (batch := sweep_manifests(conn, report.at, only=digests)).seen:
            report.count(batch)
        for i in range(0, len(blobs), BATCH):
            while (batch := sweep_blobs(conn, report.at, self._delay, only=blobs[i : i + BATCH])).seen:
                report.count(batch)
        freed = report.bytes - before
        report.tags += sum(1 for item in group if item.tag)
        for item in sorted(group, key=lambda g: bool(g.tag)):
            report.retained.append(_told(repo.name, item, freed))
            freed = 0  # told once, at the first of the tree

    # ---- in the background

    def begin(self, now: float) -> None:
        """Starts a run on a thread; raises Conflict `running`."""
        held = job.Job.take(self._engine, NAME, now)
        self._spawn(lambda: self.run(now, held=held), "gc")

    def start(self, every_s: float, on_error: Callable[[Exception], None]) -> Callable[[], None]:
        """Runs every `every_s` seconds by the time of the last run, whoever made it, until the function returned is called; 0 starts nothing."""

        def work() -> None:
            while not self._stop.wait(min(every_s, LOOK_S)):
                try:
                    now = time.time()
                    if not 0 <= now - job.last_ended(self._engine, NAME) < every_s:
                        self.run(now)
                except Conflict:
                    continue  # another process runs it
                except Exception as error:  # noqa: BLE001 - the top of a thread: the next round tries again
                    on_error(error)

        try:
            if not job.last_ended(self._engine, CLOCK):
                job.note(self._engine, CLOCK, {}, time.time())  # so that the first run has a time to compare with
        except AirlockError as error:
            on_error(error)
        if every_s > 0:
            self._spawn(work, "gc-schedule")
        return self.close

    def _spawn(self, work: Callable[[], object], name: str) -> None:
        def top() -> None:
            try:
                work()
            except Exception as error:  # noqa: BLE001 - the top of a thread: the words are in the report too
                LOG.error("the collection failed: %s %s", type(error).__name__, error)

        thread = threading.Thread(target=top, name=name, daemon=True)
        self._threads = [t for t in self._threads if t.is_alive()] + [thread]
        thread.start()

    def close(self) -> None:
        """Asks a run of this process to end after its batch, and waits for it."""
        self._stop.set()
        for thread in self._threads:
            thread.join(timeout=CLAIM_S)

    def status(self) -> dict[str, object]:
        """Whether a collection runs, how far it is, and the report of the last one."""
        return job.status(self._engine, NAME)


def _settle(conn: Connection, gone: list[str], stuck: list[str], now: float) -> None:
    forget_garbage(conn, gone)
    postpone(conn, stuck, now + 3600)


def _told(name: str, item: Goes, freed: int | None) -> dict[str, object]:
    out: dict[str, object] = {"name": name, "tag": item.tag, "digest": item.digest, "why": item.why}
    return out if freed is None else out | {"bytes": freed}
