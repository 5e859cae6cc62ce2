"""Audit rows in three classes: changes in their own transaction (A), first reads before the first byte (B), denials (C); repeats are counters.

Rows wait in `audit_pending` for the signed log. Nothing secret enters a row: keys appear by their public id, callers without a key by their network.
"""

from __future__ import annotations

import ipaddress
import json
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from sqlalchemy import Connection, Engine, insert, update

from artifact.errors import Unavailable
from artifact.store import Call
from registry import tables as t

VERSION = 1
FIRST_EVERY_S = 900.0
DENIALS_PER_MINUTE = 10
FLUSH_S = 5.0
MAX_TRACKED = 100_000


@dataclass
class _Counter:
    """One repeated event that was already recorded once: how often since, and when last."""

    kind: str
    since: float
    last: float
    n: int = 0
    flushed: int = 0
    body: dict[str, object] = field(default_factory=dict)


def network_of(address: str) -> str:
    """The source network that counters are kept by, of an address or a network: /24 of IPv4, /48 of IPv6, `unknown` otherwise."""
    try:
        ip = ipaddress.ip_interface(address).ip
    except ValueError:
        return "unknown"
    return str(ipaddress.ip_network(f"{ip}/{24 if ip.version == 4 else 48}", strict=False))


class Audit:
    """Writes rows and counters; `flush` runs every 5 s on a thread of its own, so a crash loses counts, never a fact."""

    def __init__(self, engine: Engine, instance: str) -> None:
        self._engine = engine
        self._instance = instance
        self._counters: dict[str, _Counter] = {}
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def body(self, call: Call, event: str, ref: str, result: str, reason: str = "", more: Mapping[str, object] | None = None) -> dict[str, object]:
        """The fields of a row: v, ts, event, org, key_id, ref (name@digest), result, reason, instance, request_id."""
        who = call.principal
        row: dict[str, object] = {"v": VERSION, "ts": round(call.now, 3), "event": event, "org": who.org, "key_id": who.key_id, "ref": ref[:600]}
        return row | {"result": result, "reason": reason, "instance": self._instance, "request_id": call.request_id[:64]} | dict(more or {})

    def change(self, conn: Connection, call: Call, event: str, ref: str, **more: object) -> None:
        """Class A: a change, in the transaction that makes it."""
        self._insert(conn, "A", call.now, self.body(call, event, ref, "granted", more=more))

    def read(self, call: Call, name: str, digest: str, size: int, action: str = "pull") -> None:
        """Class B: the first of (key, repository, digest or `blob`, action) in 15 minutes is stored before this returns; raises Unavailable."""
        key = f"{call.principal.key_id}\0{name}\0{digest}\0{action}"
        row = self.body(call, action, f"{name}@{digest}", "granted", more={"bytes": size})
        if not self._repeated("B", key, call.now, FIRST_EVERY_S, 1, row):
            try:
                with t.writing(self._engine) as conn:
                    self._insert(conn, "B", call.now, row)
            except Unavailable:
                with self._lock:
                    self._counters.pop("B" + key, None)  # the fact is not stored: the next attempt is a first one again
                raise

    def served(self, call: Call, name: str, digest: str, size: int) -> None:
        """Counts bytes that this process streamed itself; stored with the next flush."""
        row = self.body(call, "pull", f"{name}@{digest}", "served")
        with self._lock:
            counter = self._counter(f"S{call.principal.key_id}\0{name}\0{digest}", "B", call.now, FIRST_EVERY_S, row)
            counter.n += 1
            counter.last = call.now
            total = counter.body.get("bytes", 0)
            counter.body["bytes"] = size + (total if isinstance(total, int) else 0)

    def denied(self, call: Call, action: str, ref: str, reason: str, network: str = "") -> None:
        """Class C: with a key up to 10 a minute for each reason, then counted; without one the first from a network, then counted."""
        known = call.principal.key_id
        key = f"{known}\0{reason}" if known else f"{network_of(network)}\0{reason}"
        row = self.body(call, action, ref if known else "", "denied", reason)
        if not known:
            row["network"] = network_of(network)
        life, allowed = (60.0, DENIALS_PER_MINUTE) if known else (FIRST_EVERY_S, 1)
        if not self._repeated("C", key, call.now, life, allowed, row):
            with t.writing(self._engine) as conn:
                self._insert(conn, "C", call.now, row)

    def _repeated(self, kind: str, key: str, now: float, life: float, allowed: int, row: dict[str, object]) -> bool:
        """Counts the event; False while it is among the first `allowed` of its window, which are to be stored as rows."""
        with self._lock:
            counter = self._counter(kind + key, kind, now, life, row)
            counter.n += 1
            counter.last = now
            if counter.n <= allowed:
                counter.flushed = counter.n  # these have rows of their own
                return False
            return True

    def _counter(self, key: str, kind: str, now: float, life: float, row: dict[str, object]) -> _Counter:
        counter = self._counters.get(key)
        if counter is None or now - counter.since >= life or now < counter.since:
            if counter is not None:
                self._counters[f"{key}\0ended {counter.since}"] = counter  # still to be flushed
            counter = self._counters[key] = _Counter(kind, now, now, body=row)
        return counter

    @staticmethod
    def _insert(conn: Connection, kind: str, at: float, row: dict[str, object]) -> None:
        conn.execute(insert(t.audit_pending).values({"class": kind, "ts": at, "body": json.dumps(row, sort_keys=True)}))

    def flush(self) -> int:
        """Stores what the counters gained since the last flush and returns how many did; raises Unavailable (the counts are kept)."""
        with self._lock:
            dirty = [(key.split("\0ended ")[0], c, c.n, c.last, dict(c.body)) for key, c in self._counters.items() if c.n > c.flushed]
        if dirty:
            with t.writing(self._engine) as conn:
                for key, counter, n, last, body in dirty:
                    _store_counter(conn, key, counter.kind, counter.since, last, n, body)
        with self._lock:
            for _, counter, n, _, _ in dirty:
                counter.flushed = max(counter.flushed, n)
            newest = max((c.last for c in self._counters.values()), default=0.0)
            old = [k for k, c in self._counters.items() if c.n <= c.flushed and ("\0ended " in k or newest - c.since >= FIRST_EVERY_S)]
            if len(self._counters) > MAX_TRACKED:  # forgetting one only means that its next read is a row again
                old = [k for k, c in self._counters.items() if c.n <= c.flushed]
            for key in old:
                del self._counters[key]
        return len(dirty)

    def start(self, on_error: Callable[[Exception], None]) -> None:
        """Flushes every 5 s until close()."""
        self._thread = threading.Thread(target=self._run, args=(on_error,), name="audit-flush", daemon=True)
        self._thread.start()

    def _run(self, on_error: Callable[[Exception], None]) -> None:
        while not self._stop.wait(FLUSH_S):
            try:
                self.flush()
            except Exception as error:  # noqa: BLE001 - the top of a thread: the counts stay and the next round tries again
                on_error(error)

    def close(self) -> None:
        """Ends the thread and stores the last counts."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout=FLUSH_S)
        self.flush()


def _store_counter(conn: Connection, key: str, kind: str, since: float, last: float, n: int, body: dict[str, object]) -> None:
    c = t.audit_count
    same = (c.c["class"] == kind, c.c.key == key, c.c.since == since)
    text = json.dumps(body, sort_keys=True)
    if not conn.execute(update(c).where(*same).values(n=n, last=last, body=text)).rowcount:
        conn.execute(insert(c).values({"class": kind, "key": key, "since": since, "last": last, "n": n, "body": text}))
