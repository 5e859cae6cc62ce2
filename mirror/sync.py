"""One mirror run: pins every item of a plan, brings its bytes into staging, verified, and only then records its names and its upstream's facts.

An item that fails never stops the others, and never leaves a name behind. The key itself appears nowhere: not in a result, a name or an error.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from artifact import copy, profile
from artifact.card import hub_warnings
from artifact.errors import AirlockError
from artifact.manifest import EMPTY_DIGEST, is_commit
from mirror import jobs, nim
from mirror.home import MirrorHome, Named
from mirror.plan import Item, Plan
from mirror.records import Records
from mirror.rights import right
from mirror.sources import oci

EXIT_CODES = {kind.code: kind.exit_code for kind in AirlockError.__subclasses__()}


@dataclass
class Result:
    """What became of one item."""

    item: Item
    status: str = "failed"
    names: list[Named] = field(default_factory=list)
    received: int = 0
    error: AirlockError | None = None
    warnings: list[str] = field(default_factory=list)
    chosen: list[dict[str, object]] = field(default_factory=list)
    size: int = 0

    def as_dict(self) -> dict[str, object]:
        """The result for the report; an error in its usual form."""
        names = [{"name": n.name, "ref": n.ref, "digest": n.digest, "kind": n.kind} for n in self.names]
        out: dict[str, object] = {"source": self.item.source, "status": self.status, "transferred": self.received, "names": names}
        if self.names:
            out["upstream"] = self.names[0].upstream
        out |= {"size": self.size} if self.size else {}
        out |= {"chosen": self.chosen} if self.chosen else {}
        if self.warnings:
            out["warnings"] = self.warnings
        return out | ({"error": self.error.as_dict()} if self.error else {})


def sync(
    home: MirrorHome,
    plan: Plan,
    bar: Callable[[int], copy.Progress] | None = None,
    environ: Mapping[str, str] = os.environ,
    warn: Callable[[str], None] = lambda words: None,
    dry: bool = False,
) -> dict[str, object]:
    """Brings all items into the home's staging and returns the report; failures of items are in the report, only those of the home are raised.

    Whether the upstream's entitlement covers it is asked for every item before the first byte of any (mirror/rights.py); an item that it does not
    cover is not fetched. A dry run ends before the first byte (of a NIM's image the layers with its model manifest are fetched) and names nothing.
    """
    results = [Result(item) for item in plan.items]
    made: dict[int, jobs.Job] = {}
    with home.lock("sync"):
        records, now = Records(home), time.time()
        choice = nim.Choice(place for item in plan.items if item.kind != "nim" for place in _places(item))
        for i, result in enumerate(results):
            with _failing(result):
                made[i] = _job(result.item, home, records, now, environ, choice, bar)
        _each(made, results, lambda job: job.follow())
        _each(made, results, lambda job: job.settle())
        for i, job in made.items():
            results[i].chosen, results[i].size, results[i].received = job.chosen(), job.size, job.received
            results[i].warnings = hub_warnings(job.files)
            for words in results[i].warnings:
                warn(words)  # before the first byte
            results[i].status = "planned" if dry else "failed"
        if dry:
            made.clear()
        progress = bar(sum(job.size for job in made.values())) if bar and made else None
        try:
            for i, job in made.items():
                _run(results[i], job, home, progress)
        finally:
            if progress:
                progress.close()
    failed = sum(r.status == "failed" for r in results)
    return {"items": [r.as_dict() for r in results], "transferred": sum(r.received for r in results), "failed": failed}


def _places(item: Item) -> Iterator[nim.Place]:
    """The names that an item is known to give before it is looked up: its ref, and the commit that it asks for."""
    yield item.name, item.ref
    if is_commit(item.wanted):
        yield item.name, item.wanted


def _each(made: dict[int, jobs.Job], results: list[Result], step: Callable[[jobs.Job], None]) -> None:
    """One step of all jobs; those that it ends are left out from then on."""
    for i in list(made):
        with _failing(results[i]):
            step(made[i])
        results[i].received = made[i].received
        if results[i].error:
            del made[i]


@contextmanager
def _failing(result: Result) -> Iterator[None]:
    """Notes what ends an item, so that the others go on."""
    try:
        yield
    except AirlockError as error:
        result.status, result.error, result.names = "failed", error, []


def exit_code(report: Mapping[str, object]) -> int:
    """The exit status for a report: 0, or that of the first failure."""
    items = report["items"]
    failures = [item["error"]["error"] for item in items if "error" in item] if isinstance(items, list) else []
    return EXIT_CODES.get(failures[0], 1) if failures else 0


def _run(result: Result, job: jobs.Job, home: MirrorHome, progress: copy.Progress | None) -> None:
    with _failing(result):
        named = job.run(progress)
        for each in named:
            oci.check_whole(home.disk, each.digest)
        before = {(n.name, n.ref): n for n in home.names()}
        result.names = [_steady(n, before.get((n.name, n.ref))) for n in named]
        if any(before.get((n.name, n.ref)) != n for n in result.names):
            home.record(result.names)
            result.status = "synced"
        else:
            result.status = "unchanged"
    result.received = job.received


def _steady(new: Named, old: Named | None) -> Named:
    """The name as recorded before, where nothing but the time differs: a run that brings nothing new changes nothing."""
    if old is None or {**old.upstream, "fetched": 0} != {**new.upstream, "fetched": 0}:
        return new
    return old if (old.digest, old.media_type, old.kind, old.display) == (new.digest, new.media_type, new.kind, new.display) else new


def _job(item: Item, home: MirrorHome, records: Records, now: float, environ: Mapping[str, str], choice: nim.Choice, bar: nim.Bar | None) -> jobs.Job:
    """What an item needs, pinned and entitled, with metadata alone."""
    if item.profiles:
        profile.build(item.name, EMPTY_DIGEST, jobs.wanted_profiles(item), 0)  # a mistake in it shows before bytes move
    key = jobs.key_of(item, environ)
    granted = right(item, key, records, now)  # before the upstream is asked for anything
    if item.kind == "nim":
        return nim.NimJob(granted, key, home, choice, lambda other, its: right(other, its, records, now), environ, bar)
    return jobs.JOBS[item.kind](granted, key, home.disk)
