"""The audit report as a pure function: entries of the log, leases, keys and grants in; who pulled what, GPUs against licences, denials out.

It reads no database and knows no layout. Memory is that of the answer: entries are taken one after the other and none is kept.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from artifact.grant import date

DAY_S = 86400.0
MAX_DAYS = 366
MAX_PULLS, MAX_ROWS, MAX_UPSTREAM, PLOTTED = 1500, 500, 300, 4  # so that an answer stays below 4 MiB
MAX_LISTED = 5
POINTS = 400
SOON_S = 90 * DAY_S
DENIALS_WITH_ROWS = {True: 10, False: 1}  # of one counter's window, with a key and without (registry/audit.py)
Row = dict[str, object]


class Event(NamedTuple):
    """One entry of the log: its columns, and the parsed body."""

    ts: float
    event: str
    org: str
    key_id: str
    ref: str
    result: str
    reason: str
    body: Mapping[str, object]


class Lease(NamedTuple):
    """A lease: under which licence, with how many GPUs bought (0: no bound), where, which GPUs, from when to when it counted."""

    licence: str
    org: str
    bound: int
    host: str
    gpus: tuple[str, ...]
    start: float
    end: float


@dataclass(frozen=True)
class Period:
    """From when (inclusive) to when (exclusive) a report looks, of which organisation (all: empty), and when it is made."""

    start: float
    end: float
    org: str = ""
    now: float = 0.0

    @property
    def days(self) -> int:
        """How many days it touches."""
        return max(1, -int((self.start - self.end) // DAY_S))

    def day(self, at: float) -> int:
        """Which of its days a moment lies in."""
        return min(max(int((at - self.start) // DAY_S), 0), self.days - 1)


@dataclass
class _Pull:
    granted: int = 0
    served: int = 0
    served_bytes: int = 0
    verified: int = 0
    verified_bytes: int = 0
    first: float = 0.0
    last: float = 0.0
    grants: dict[str, None] = field(default_factory=dict)
    digests: dict[str, None] = field(default_factory=dict)


@dataclass
class _Denial:
    attempts: int = 0
    first: float = 0.0
    last: float = 0.0
    ref: str = ""


def _whole(value: object) -> int:
    return value if type(value) is int and value > 0 else 0


def times(event: Event) -> int:
    """How many events an entry stands for beside those that have entries of their own: a counter's row repeats its window's first ones."""
    if event.body.get("counted") is not True:
        return 1
    n = _whole(event.body.get("n"))
    if event.result == "served":
        return n
    return max(n - (DENIALS_WITH_ROWS[bool(event.key_id)] if event.result == "denied" else 1), 0)


class Tally:
    """Counts the entries of one period."""

    def __init__(self, period: Period) -> None:
        self.period = period
        self._pulls: dict[tuple[str, str, str], _Pull] = {}
        self._denials: dict[tuple[str, str, str, str], _Denial] = {}
        self._changes: Counter[str] = Counter()
        self._per_day = [0] * period.days
        self._refused = dict[str, list[int]]()
        self.events = self.leases = 0

    def add(self, e: Event) -> None:
        """Takes one entry of the period."""
        self.events += 1
        n = times(e)
        if e.result == "denied":
            self._deny(e, n)
        elif e.event == "pull" or e.event == "verified":
            self._pull(e, n)
        elif e.event == "lease":
            self.leases += 1
        elif e.result == "granted" and e.event not in ("token", "audit"):
            self._changes[e.event] += n

    def _pull(self, e: Event, n: int) -> None:
        name, _, digest = e.ref.partition("@")
        digest = str(e.body.get("digest") or digest) if e.event == "verified" else digest
        found = self._pulls.setdefault((e.org, e.key_id, name), _Pull())
        found.first, found.last = min(found.first or e.ts, e.ts), max(found.last, e.ts)
        size = _whole(e.body.get("bytes"))
        grant = e.body.get("grant")
        if grant and len(found.grants) <= MAX_LISTED:
            found.grants[str(grant)] = None
        if e.event == "verified":
            found.verified, found.verified_bytes = found.verified + 1, found.verified_bytes + size
        elif e.result == "served":
            found.served, found.served_bytes = found.served + n, found.served_bytes + size
            return
        else:
            found.granted += n
            self._per_day[self.period.day(e.ts)] += n
        if digest not in ("", "blob") and len(found.digests) <= MAX_LISTED:
            found.digests[digest] = None

    def _deny(self, e: Event, n: int) -> None:
        who = e.key_id or str(e.body.get("network") or "unknown")
        found = self._denials.setdefault((e.org, who, e.event, e.reason), _Denial())
        found.attempts += n
        found.first, found.last, found.ref = min(found.first or e.ts, e.ts), max(found.last, e.ts), e.ref or found.ref
        self._refused.setdefault(e.reason, [0] * self.period.days)[self.period.day(e.ts)] += n

    def result(self) -> Row:
        """The tables of what was counted, the busiest first, and the sums by day."""
        pulls: list[Row] = [
            {
                "org": org,
                "key_id": key,
                "name": name,
                "grants": _some(p.grants),
                "digests": _some(p.digests),
                "granted": p.granted,
                "served": p.served,
                "served_bytes": p.served_bytes,
                "verified": p.verified,
                "verified_bytes": p.verified_bytes,
                "first": _moment(p.first),
                "last": _moment(p.last),
            }
            for (org, key, name), p in sorted(self._pulls.items(), key=lambda item: (-item[1].granted, item[0]))
        ]
        denials: list[Row] = [
            {
                "org": org,
                "who": who,
                "action": action,
                "reason": reason,
                "attempts": d.attempts,
                "ref": d.ref,
                "first": _moment(d.first),
                "last": _moment(d.last),
            }
            for (org, who, action, reason), d in sorted(self._denials.items(), key=lambda item: (-item[1].attempts, item[0]))
        ]
        return {
            "entries": self.events,
            "totals": {name: sum(_whole(row[name]) for row in pulls) for name in ("granted", "served", "served_bytes", "verified", "verified_bytes")}
            | {"denied": sum(_whole(row["attempts"]) for row in denials), "keys": len({row["key_id"] for row in pulls})},
            "per_day": self._per_day,
            "denied_per_day": {reason: days for reason, days in sorted(self._refused.items(), key=lambda item: -sum(item[1]))},
            "pulls": bounded(pulls, MAX_PULLS),
            "denials": bounded(denials),
            "changes": bounded([{"event": name, "count": n} for name, n in self._changes.most_common()]),
        }


def _some(found: Mapping[str, None]) -> list[str]:
    names = list(found)
    return [*names[:MAX_LISTED], "…"] if len(names) > MAX_LISTED else names


def _moment(at: float) -> str:
    return date(at) if at else ""


def bounded(rows: list[Row], most: int = MAX_ROWS) -> Row:
    """A table: its first rows, and how many there are."""
    return {"rows": rows[:most], "total": len(rows)}


# ---- GPUs


def gpus(leases: Iterable[Lease], period: Period) -> list[Row]:
    """For each licence its peak of GPUs in use at once against the bought number, the highest first, and of the first four their course."""
    of: dict[tuple[str, str, int], list[Lease]] = {}
    for lease in leases:
        if lease.gpus and lease.end > period.start and lease.start < period.end and lease.end > lease.start:
            of.setdefault((lease.licence, lease.org, lease.bound), []).append(lease)
    rows = sorted((_licence(*key, found, period) for key, found in of.items()), key=lambda row: (-_whole(row["peak"]), str(row["licence"])))
    return [row if i < PLOTTED else row | {"course": []} for i, row in enumerate(rows)]


def _licence(licence: str, org: str, bound: int, leases: list[Lease], period: Period) -> Row:
    course = _course(leases, period)
    peak, peak_at = max(((n, -at) for at, n in course), default=(0, 0.0))
    ends = [at for at, _ in course[1:]] + [period.end]
    over = sum(end - at for (at, n), end in zip(course, ends, strict=True) if bound and n > bound)
    used = sum(n * (end - at) for (at, n), end in zip(course, ends, strict=True))
    return {
        "licence": licence,
        "org": org,
        "bound": bound,
        "peak": peak,
        "peak_at": _moment(-peak_at) if peak else "",
        "over_s": round(over),
        "gpu_hours": round(used / 3600, 1),
        "leases": len(leases),
        "hosts": len({lease.host for lease in leases}),
        "course": _thinned(course, period),
    }


def _course(leases: list[Lease], period: Period) -> list[tuple[float, int]]:
    """From when how many distinct GPUs were in use: one on which two leases lie counts once, and an end comes before a beginning at its moment."""
    steps: list[tuple[float, int, str, tuple[str, ...]]] = []
    for lease in leases:
        steps.append((max(lease.start, period.start), 1, lease.host, lease.gpus))
        if lease.end < period.end:
            steps.append((lease.end, -1, lease.host, lease.gpus))
    held: Counter[tuple[str, str]] = Counter()
    count = 0
    out = [(period.start, 0)]
    for at, sign, host, names in sorted(steps, key=lambda step: step[:2]):
        for name in names:
            was = held[(host, name)] > 0
            held[(host, name)] += sign
            count += (held[(host, name)] > 0) - was
        if out[-1][0] == at:
            out[-1] = (at, count)
        else:
            out.append((at, count))
    return out


def _thinned(course: list[tuple[float, int]], period: Period) -> list[list[float]]:
    """The course for a plot: the highest number of each of POINTS slices of the period."""
    if len(course) <= POINTS:
        return [[round(at), n] for at, n in course]
    width, out, now = (period.end - period.start) / POINTS, [], 0
    rest = iter([*course, (period.end + 1, 0)])
    step = next(rest)
    for i in range(POINTS):
        end, high = period.start + (i + 1) * width, now
        while step[0] < end:
            now = step[1]
            high = max(high, now)
            step = next(rest)
        out.append([float(round(end - width)), high])
    return out
