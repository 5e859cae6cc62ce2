"""Audit rows in three classes: changes in their own transaction (A), first reads before the first byte (B), denials (C); repeats are counters.

Rows wait in `audit_pending` for the signed log. Nothing secret enters a row: keys appear by their public id, callers without a key by their network.
"""

from __future__ import annotations

import ipaddress
import json
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from sqlalchemy import Connection, Engine, delete, insert, select, text, update

from artifact.errors import Unavailable
from artifact.store import Call
from registry import tables as t
from registry.database import retried
from registry.sequencer import Sequencer

VERSION = 1
FIRST_EVERY_S = 900.0
DENIALS_PER_MINUTE = 10
FLUSH_S = 5.0
MAX_TRACKED = 100_000
NETWORKS_PER_MINUTE = 100  # first denials of new networks that get rows of their own; the rest share one counter
BATCH = 500
MAX_WAITING = 5000
WAIT_S = 20.0
SEP = "\n"  # between the parts of a counter's key: in no name, and PostgreSQL stores no NUL
ENDED = SEP + SEP
_MANY = text(
    "INSERT INTO audit_pending (class, ts, body) "
    "SELECT * FROM unnest(CAST(:kinds AS text[]), CAST(:times AS double precision[]), CAST(:bodies AS text[]))"
)


@dataclass(eq=False)
class _Waiting:
    """One row on its way into the database; `done` once it is committed or failed with `error`."""

    kind: str
    at: float
    body: str
    done: bool = False
    error: Unavailable | None = None


@dataclass
class _Counter:
    """One repeated event that was already recorded once: how often since, and when last."""

    kind: str
    since: float
    last: float
    n: int = 0
    flushed: int = 0
    body: dict[str, object] = field(default_factory=dict)
    first: _Waiting | None = None  # the row of the window's first event: whoever comes second waits for it too


class _Group:
    """Commits rows of many threads together: one of those that wait writes for all, in the order in which they came."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._queue: deque[_Waiting] = deque()
        self._changed = threading.Condition()
        self._writing = False

    def wait(self, row: _Waiting, *, queued: bool = False) -> None:
        """Returns once the row is committed, putting it into the queue unless it is there; raises Unavailable when it cannot be, or not in time."""
        end = time.monotonic() + WAIT_S
        with self._changed:
            if not queued:
                if len(self._queue) >= MAX_WAITING:
                    row.done, row.error = True, _late("too many wait for the audit log")
                else:
                    self._queue.append(row)
        while True:
            with self._changed:
                while self._writing and not row.done:
                    rest = end - time.monotonic()
                    if rest <= 0:
                        raise self._given_up(row)
                    self._changed.wait(rest)
                if row.done:
                    if row.error is not None:
                        raise _late(row.error.what, row.error)
                    return
                self._writing = True
                batch = [self._queue.popleft() for _ in range(min(BATCH, len(self._queue)))]
            self._write(batch)

    def _given_up(self, row: _Waiting) -> Unavailable:
        if row in self._queue:  # nobody took it yet, so it will not be stored after its caller was refused
            self._queue.remove(row)
            row.done, row.error = True, _late("the audit log did not take a row in time")
        return _late("the audit log did not take a row in time")

    def _write(self, batch: list[_Waiting]) -> None:
        error: Unavailable | None = _late("the audit log failed")
        try:
            if self._engine.dialect.name == "postgresql":
                with t.reading(self._engine) as conn:  # one statement commits by itself: one round trip where a transaction takes three
                    conn.execute(_MANY, {"kinds": [r.kind for r in batch], "times": [r.at for r in batch], "bodies": [r.body for r in batch]})
            else:
                with t.writing(self._engine) as conn:
                    conn.execute(insert(t.audit_pending), [{"class": row.kind, "ts": row.at, "body": row.body} for row in batch])
            error = None
        except Unavailable as unavailable:
            error = unavailable
        finally:
            with self._changed:
                self._writing = False
                for row in batch:
                    row.done, row.error = True, error
                self._changed.notify_all()


def _late(what: str, cause: Unavailable | None = None) -> Unavailable:
    """An error of its own for each that waited: one exception raised in two threads would mix their tracebacks."""
    return Unavailable(what, do=cause.do if cause else "retry", reason=cause.reason if cause else "audit")


def network_of(address: str) -> str:
    """The source network that counters are kept by, of an address or a network: /24 of IPv4, /48 of IPv6, `unknown` otherwise."""
    try:
        ip = ipaddress.ip_interface(address).ip
    except ValueError:
        return "unknown"
    return str(ipaddress.ip_network(f"{ip}/{24 if ip.version == 4 else 48}", strict=False))


class Audit:
    """Writes rows and counters; `flush` runs every 5 s on a thread of its own, so a crash loses counts, never a fact."""

    def __init__(self, engine: Engine, instance: str, log: Sequencer | None = None) -> None:
        self._engine = engine
        self._instance = instance
        self._log = log
        self._group = _Group(engine)
        self._counters: dict[str, _Counter] = {}
        self._new_networks: deque[float] = deque()
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def body(self, call: Call, event: str, ref: str, result: str, reason: str = "", more: Mapping[str, object] | None = None) -> dict[str, object]:
        """The fields of a row: v, ts, event, org, key_id, ref (name@digest), result, reason, instance, request_id; grant, entitlement if known."""
        who = call.principal
        row: dict[str, object] = {"v": VERSION, "ts": round(call.now, 3), "event": event, "org": who.org, "key_id": who.key_id, "ref": ref[:600]}
        row |= call.decision.ids if call.decision else {}
        return row | {"result": result, "reason": reason, "instance": self._instance, "request_id": call.request_id[:64]} | dict(more or {})

    def change(self, conn: Connection, call: Call, event: str, ref: str, **more: object) -> None:
        """Class A: a change, in the transaction that makes it."""
        self._insert(conn, "A", call.now, self.body(call, event, ref, "granted", more=more))

    def read(self, call: Call, name: str, digest: str, size: int, action: str = "pull") -> None:
        """Class B: the first of (key, repository, digest or `blob`, action, grant) in 15 minutes is stored before this ends; raises Unavailable."""
        under = call.decision.ids.values() if call.decision else ()  # what is read under another grant is another fact
        key = SEP.join((call.principal.key_id, name, digest, action, *under))
        self._record("B", key, call.now, FIRST_EVERY_S, 1, self.body(call, action, f"{name}@{digest}", "granted", more={"bytes": size}))

    def served(self, call: Call, name: str, digest: str, size: int) -> None:
        """Counts bytes that this process streamed itself; stored with the next flush."""
        row = self.body(call, "pull", f"{name}@{digest}", "served")
        with self._lock:
            counter = self._counter("S" + SEP.join((call.principal.key_id, name, digest)), "B", call.now, FIRST_EVERY_S, row)
            counter.n += 1
            counter.last = call.now
            total = counter.body.get("bytes", 0)
            counter.body["bytes"] = size + (total if isinstance(total, int) else 0)

    def denied(self, call: Call, action: str, ref: str, reason: str, network: str = "") -> None:
        """Class C: with a key up to 10 a minute for each reason, then counted; without one the first from a network, then counted."""
        known = call.principal.key_id
        row = self.body(call, action, ref if known else "", "denied", reason)
        if known:
            self._record("C", SEP.join((known, reason)), call.now, 60.0, DENIALS_PER_MINUTE, row)
            return
        source = self._source(network_of(network), reason, call.now)
        self._record("C", SEP.join((source, reason)), call.now, FIRST_EVERY_S, 1, row | {"network": source})

    def _source(self, network: str, reason: str, now: float) -> str:
        """The network to count by: `many` while more new ones come than rows are made for, so that forged sources cannot fill the database."""
        with self._lock:
            found = self._counters.get("C" + SEP.join((network, reason)))
            if found is not None and 0 <= now - found.since < FIRST_EVERY_S:
                return network
            while self._new_networks and not 0 <= now - self._new_networks[0] < 60.0:
                self._new_networks.popleft()
            if len(self._new_networks) >= NETWORKS_PER_MINUTE:
                return "many"
            self._new_networks.append(now)
            return network

    def _record(self, kind: str, key: str, now: float, life: float, allowed: int, row: dict[str, object]) -> None:
        """Counts the event; the first `allowed` of its window are stored as rows before this returns, and the next ones wait for the first."""
        with self._lock:
            counter = self._counter(kind + key, kind, now, life, row)
            counter.n += 1
            counter.last = now
            mine: _Waiting | None = None
            if counter.n <= allowed:
                counter.flushed = counter.n  # these have rows of their own
                mine = _Waiting(kind, now, _canonical(row))
                counter.first = counter.first or mine
            first = counter.first
        if first is None or (mine is None and first.done and first.error is None):
            return
        try:
            self._group.wait(mine or first, queued=mine is None)
        except Unavailable:
            with self._lock:
                if self._counters.get(kind + key) is counter:
                    del self._counters[kind + key]  # the fact is not stored: the next attempt is a first one again
            raise
        if mine is first:
            counter.first = None

    def _counter(self, key: str, kind: str, now: float, life: float, row: dict[str, object]) -> _Counter:
        counter = self._counters.get(key)
        if counter is None or now - counter.since >= life or now < counter.since:
            if counter is not None:
                self._counters[f"{key}{ENDED}{counter.since}"] = counter  # still to be flushed
            counter = self._counters[key] = _Counter(kind, now, now, body=row)
        return counter

    @staticmethod
    def _insert(conn: Connection, kind: str, at: float, row: dict[str, object]) -> None:
        conn.execute(insert(t.audit_pending).values({"class": kind, "ts": at, "body": _canonical(row)}))

    def rows(self, org: str, after: int, limit: int) -> tuple[list[dict[str, object]], int]:
        """Rows of one organisation's keys behind the cursor `after`, in the log's order, and the cursor to go on from; 0 where there are no more.

        What waits is put into the log first; `id` is one more than the row's index there.
        """
        if self._log is not None:
            self._log.settle()
        leaf = t.audit_leaf
        with t.reading(self._engine) as conn:
            wanted = select(leaf).where(leaf.c.org == org, leaf.c.idx >= after).order_by(leaf.c.idx).limit(limit + 1)
            found = conn.execute(wanted).mappings().all()
        out = [{"id": row["idx"] + 1, "class": row["class"], **json.loads(row["body"] or "{}")} for row in found[:limit]]
        return out, int(found[limit - 1]["idx"]) + 1 if len(found) > limit else 0

    def flush(self) -> int:
        """Stores what the counters gained since the last flush and returns how many did; raises Unavailable (the counts are kept)."""
        with self._lock:
            dirty = [(key.split(ENDED)[0], c, c.n, c.last, dict(c.body)) for key, c in self._counters.items() if c.n > c.flushed]
        if dirty:
            with t.writing(self._engine) as conn:
                for key, counter, n, last, body in dirty:
                    _store_counter(conn, key, counter.kind, counter.since, last, n, body)
        with self._lock:
            for _, counter, n, _, _ in dirty:
                counter.flushed = max(counter.flushed, n)
            newest = max((c.last for c in self._counters.values()), default=0.0)
            old = [k for k, c in self._counters.items() if c.n <= c.flushed and (ENDED in k or newest - c.since >= FIRST_EVERY_S)]
            if len(self._counters) > MAX_TRACKED:  # forgetting one only means that its next read is a row again
                old = [k for k, c in self._counters.items() if c.n <= c.flushed]
            for key in old:
                del self._counters[key]
        return len(dirty)

    def retire(self, now: float) -> int:
        """Turns counters whose window is over into rows, with `n` of all that they counted, `first` and `last`; returns how many."""

        def work(conn: Connection) -> int:
            c = t.audit_count
            found = conn.execute(select(c).where(c.c.since < now - 2 * FIRST_EVERY_S).order_by(c.c.id).limit(BATCH)).mappings().all()
            rows = []
            for row in found:
                if conn.execute(delete(c).where(c.c.id == row["id"], c.c.n == row["n"])).rowcount:
                    counted = {"counted": True, "n": row["n"], "first": round(row["since"], 3), "last": round(row["last"], 3)}
                    body = _canonical(json.loads(row["body"]) | counted)
                    rows.append({"class": row["class"], "ts": row["last"], "body": body})
            if rows:
                conn.execute(insert(t.audit_pending), rows)
            return len(rows)

        return retried(self._engine, work)

    def start(self, on_error: Callable[[Exception], None]) -> None:
        """Flushes every 5 s until close()."""
        self._thread = threading.Thread(target=self._run, args=(on_error,), name="audit-flush", daemon=True)
        self._thread.start()

    def _run(self, on_error: Callable[[Exception], None]) -> None:
        while not self._stop.wait(FLUSH_S):
            try:
                self.flush()
                self.retire(time.time())
            except Exception as error:  # noqa: BLE001 - the top of a thread: the counts stay and the next round tries again
                on_error(error)

    def close(self) -> None:
        """Ends the thread and stores the last counts."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout=FLUSH_S)
        self.flush()


def _canonical(row: Mapping[str, object]) -> str:
    """A row's text as it is hashed (docs/format.md section 9)."""
    return json.dumps(row, sort_keys=True, separators=(",", ":"))


def _store_counter(conn: Connection, key: str, kind: str, since: float, last: float, n: int, body: dict[str, object]) -> None:
    c = t.audit_count
    same = (c.c["class"] == kind, c.c.key == key, c.c.since == since)
    line = json.dumps(body, sort_keys=True)
    if not conn.execute(update(c).where(*same).values(n=n, last=last, body=line)).rowcount:
        conn.execute(insert(c).values({"class": kind, "key": key, "since": since, "last": last, "n": n, "body": line}))
