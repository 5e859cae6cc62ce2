"""Reads what the store holds and compares it with its digests, at a bounded rate; what rotted is quarantined: no longer served, kept as evidence.

Here because no client of this field verifies what it downloads. It repairs nothing itself: a push or an import of the same digest does, under another
location. It must not call bytes rotten that it could not read: a store that does not answer ends the run, and the next one goes on there.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from sqlalchemy import and_, delete, func, select, update

from artifact.digest import new
from artifact.errors import NotFound
from artifact.store import BlobStore, Content
from registry import catalog as c
from registry import tables as t
from registry.audit import Audit
from registry.library import local_call

JOB = "verify"
PAGE = 200
BUFFER = 1024 * 1024
EVIDENCE_S = 30 * 86400
MAX_NAMES = 20
QUARANTINED, READY = "quarantined", "ready"


@dataclass(frozen=True)
class Finding:
    """One object that is not what its digest says: what is wrong with it, where it lies, and which repositories name it (at most 20)."""

    digest: str
    location: str
    problem: str
    repositories: tuple[str, ...] = ()

    def as_json(self) -> dict[str, object]:
        """The finding as a JSON object."""
        return {"digest": self.digest, "location": self.location, "problem": self.problem, "repositories": list(self.repositories)}


@dataclass
class Report:
    """What a run read and found; `complete` once the whole store was read."""

    objects: int = 0
    bytes: int = 0
    manifests: int = 0
    complete: bool = False
    findings: list[Finding] = field(default_factory=list)
    healed: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, object]:
        """The report as a JSON object."""
        facts: dict[str, object] = {"objects": self.objects, "bytes": self.bytes, "manifests": self.manifests, "complete": self.complete}
        return facts | {"findings": [f.as_json() for f in self.findings], "healed": self.healed}


class Pace:
    """Sleeps so that no more than `rate` bytes a second pass on average; 0 is unbounded."""

    def __init__(self, rate: int, clock: Callable[[], float] = time.monotonic, sleep: Callable[[float], None] = time.sleep) -> None:
        self._rate, self._clock, self._sleep = rate, clock, sleep
        self._due = clock()

    def passed(self, count: int) -> None:
        """Accounts for bytes that were read."""
        if self._rate:
            self._due = max(self._due, self._clock() - 1.0) + count / self._rate
            if (late := self._due - self._clock()) > 0:
                self._sleep(late)


class Scrub:
    """One run over the store of a site, from where the last one ended."""

    def __init__(self, catalog: c.Catalog, blobs: BlobStore, audit: Audit, rate: int = 0, progress: Callable[[int], None] = lambda n: None) -> None:
        self._catalog, self._blobs, self._audit = catalog, blobs, audit
        self._pace = Pace(rate)
        self._progress = progress

    def total(self) -> int:
        """Bytes that a whole run reads."""
        with self._catalog.reading() as conn:
            return int(conn.execute(select(func.coalesce(func.sum(t.blob.c.size), 0))).scalar_one())

    def run(self, now: float, *, restart: bool = False, stop: Callable[[], bool] = lambda: False) -> Report:
        """Verifies manifests and blobs until the end or until `stop` says so; raises Unavailable when database or store does not answer."""
        report = Report()
        cursor = "" if restart else self._begin(now)
        if not cursor:
            self._manifests(report)
        while not stop():
            page = self._page(cursor)
            if not page:
                report.complete = True
                break
            for digest, size, location, state in page:
                self._one(report, digest, size, location, state, now)
                cursor = digest
                if stop():
                    break
            self._note(cursor, now)
        self._end(report, "" if report.complete else cursor, now)
        return report

    def _begin(self, now: float) -> str:
        with self._catalog.writing() as conn:
            conn.execute(c.ignore_duplicates(conn, t.job).values(name=JOB, started=now))
            return str(conn.execute(select(t.job.c.cursor).where(t.job.c.name == JOB)).scalar_one())

    def _note(self, cursor: str, now: float) -> None:
        with self._catalog.writing() as conn:
            row = {"name": JOB, "cursor": cursor, "started": now}
            conn.execute(c.replace_duplicates(conn, t.job, ("name",), ("cursor",)).values(row))

    def _end(self, report: Report, cursor: str, now: float) -> None:
        found = {"objects": report.objects, "bytes": report.bytes, "findings": len(report.findings), "complete": report.complete}
        with self._catalog.writing() as conn:
            row = {"name": JOB, "cursor": cursor, "started": now, "ended": time.time(), "report": json.dumps(found)}
            conn.execute(c.replace_duplicates(conn, t.job, ("name",), ("cursor", "ended", "report")).values(row))

    def _page(self, after: str) -> list[tuple[str, int, str, str]]:
        b = t.blob.c
        with self._catalog.reading() as conn:
            rows = conn.execute(select(b.digest, b.size, b.location, b.state).where(b.digest > after).order_by(b.digest).limit(PAGE)).all()
        return [(r.digest, r.size, r.location, r.state) for r in rows]

    def _one(self, report: Report, digest: str, size: int, location: str, state: str, now: float) -> None:
        problem = self._judge(digest, size, location)
        report.objects += 1
        report.bytes += size
        if problem and state == READY:
            finding = self._quarantine(digest, location, size, problem, now)
            if finding:
                report.findings.append(finding)
        elif problem:
            report.findings.append(Finding(digest, location, f"{problem} ({state} before)", self._named(digest)))
        elif state != READY and self._heal(digest, location, now):
            report.healed.append(digest)

    def _judge(self, digest: str, size: int, location: str) -> str:
        """What is wrong with the bytes at a location; empty when they are whole; raises Unavailable."""
        if not location:
            return "the bytes are missing"
        try:
            content = self._blobs.open(location)
        except NotFound:
            return "the bytes are missing"
        if content.total != size:
            return f"{content.total} bytes instead of {size}"
        hasher = new(digest.partition(":")[0])
        try:
            for piece in _pieces(content):
                hasher.update(piece)
                self._pace.passed(len(piece))
                self._progress(len(piece))
        except (NotFound, FileNotFoundError):
            return "the bytes are missing"
        except OSError as error:
            return f"the disk cannot read them: {error.strerror}"  # a bad sector is rot too
        return "" if hasher.digest() == digest else f"the bytes have digest {hasher.digest()}"

    def _quarantine(self, digest: str, location: str, size: int, problem: str, now: float) -> Finding | None:
        """Takes the object out of service and records it; None when a delete or another publication was faster."""
        b = t.blob.c
        with self._catalog.writing() as conn:
            held = and_(b.digest == digest, b.location == location, b.state == READY)
            if not conn.execute(update(t.blob).where(held).values(state=QUARANTINED)).rowcount:
                return None
            c.add_garbage(conn, location, size, now + EVIDENCE_S)  # so that who publishes the digest again takes another location
            self._audit.change(conn, local_call(now), "quarantine", digest, location=location, problem=problem)
        return Finding(digest, location, problem, self._named(digest))

    def _heal(self, digest: str, location: str, now: float) -> bool:
        """Puts an object back into service whose bytes an administrator restored in place."""
        b = t.blob.c
        with self._catalog.writing() as conn:
            held = and_(b.digest == digest, b.location == location, b.state != READY)
            if not conn.execute(update(t.blob).where(held).values(state=READY)).rowcount:
                return False
            conn.execute(delete(t.garbage).where(t.garbage.c.location == location))
            self._audit.change(conn, local_call(now), "heal", digest, location=location)
        return True

    def _named(self, digest: str) -> tuple[str, ...]:
        r, link = t.repository, t.repo_blob
        found = select(r.c.name).join(link, link.c.repo_id == r.c.id).where(link.c.digest == digest).order_by(r.c.name).limit(MAX_NAMES)
        with self._catalog.reading() as conn:
            return tuple(conn.execute(found).scalars())

    def _manifests(self, report: Report) -> None:
        """Compares each manifest's stored bytes with its digest; nothing can be quarantined here, as the database itself is damaged."""
        m, after = t.manifest.c, 0
        while True:
            with self._catalog.reading() as conn:
                rows = conn.execute(select(m.id, m.digest, m.raw).where(m.id > after).order_by(m.id).limit(PAGE)).all()
            if not rows:
                return
            for row in rows:
                after = row.id
                report.manifests += 1
                algorithm, _, text = row.digest.partition(":")
                if hashlib.new(algorithm, row.raw).hexdigest() != text:
                    report.findings.append(Finding(row.digest, "manifest", "the manifest's bytes in the database do not match its digest"))


def _pieces(content: Content) -> Iterator[bytes]:
    """The bytes of an object, at most 1 MiB at a time; raises OSError, AirlockError."""
    if content.path is not None:
        with content.path.open("rb", buffering=0) as file:
            while piece := file.read(BUFFER):
                yield piece
    elif content.data is not None:
        yield content.data
    else:
        yield from content.chunks or ()
