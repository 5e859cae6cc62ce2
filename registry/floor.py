"""The lowest time that it can be, so that a clock that was set back brings no key, grant or document back to life.

It is raised by the times of signed documents, and by the wall clock only while that is near it: one bad minute of a clock must not end everything
for ever. In memory it is one number, which every admission compares with; `tick` stores it, a minute apart. It decides nothing.
"""

from __future__ import annotations

import json
import logging
import socket
from contextlib import suppress
from datetime import datetime

from sqlalchemy import Connection, Engine, func, select, update

from artifact.errors import AirlockError
from artifact.grant import MAX_DATE, Decision, Principal, date
from artifact.store import Call
from registry import tables as t
from registry.audit import Audit
from registry.database import reading, retried
from registry.links import ignore_duplicates

NEAR_S = 30 * 86400.0  # a wall clock further ahead raises nothing
BACK_S = 600.0  # one that is further behind was set back
EVERY_S = 60.0
RECORD_S = 3600.0
LOOK_BACK = 100_000  # newest entries of the log among which a lost floor is looked for
FLOOR, RECORDED, ROLLBACK = "floor", "recorded", "rollback "  # rows of the table; the last one for each host
EVENT = "clock_floor"
LOG = logging.getLogger("airlock.clock")


class Floor:
    """The floor of one site, as this process knows it; seconds since 1970."""

    def __init__(self, engine: Engine, audit: Audit, at: float, stored: float = 0.0) -> None:
        self._engine, self._audit, self._at, self._stored = engine, audit, at, stored
        self._signed = False  # whether something signed raised it since it was stored

    @classmethod
    def load(cls, engine: Engine, audit: Audit, created: str) -> Floor:
        """The stored floor, raised by the site's documents; where it is lost, made again from all that tells a time, at least `created` (ISO 8601).

        Raises Unavailable.
        """
        with reading(engine) as conn:
            stored = float(conn.execute(select(t.clock.c.at).where(t.clock.c.name == FLOOR)).scalar_one_or_none() or 0.0)
            return cls(engine, audit, max(stored or _rebuilt(conn, created), _documents(conn)), stored)

    @property
    def at(self) -> float:
        """The floor itself."""
        return self._at

    def now(self, wall: float) -> float:
        """The time that ends are judged by: the wall clock's, never below the floor."""
        return wall if wall > self._at else self._at

    def sure(self, now: float) -> float:
        """The time by which is done what is not taken back: that one, or the floor where it is too far ahead to be believed."""
        return self._at if self.doubt(now) == "clock_ahead" else now

    def raise_to(self, signed: float) -> None:
        """Takes a time that a verified signature vouches for, such as a document's `iat`."""
        if self._at < signed <= MAX_DATE:
            self._at, self._signed = float(signed), True

    def doubt(self, wall: float) -> str:
        """What is wrong with the wall clock: clock_rollback, clock_ahead, or nothing that can be told."""
        if wall < self._at - BACK_S:
            return "clock_rollback"
        return "clock_ahead" if wall > self._at + NEAR_S else ""

    def tick(self, wall: float) -> None:
        """Raises the floor by a near wall clock, stores it, learns what other processes stored, and records what an auditor asks for.

        Once for each episode of a clock set back, of each host, and the floor itself at most hourly; raises Unavailable.
        """
        self._near(wall)
        begun = retried(self._engine, lambda conn: self._store(conn, wall))
        self._stored, self._signed = self._at, False
        if begun:
            facts = {"wall": date(max(wall, 0.0)), "floor": date(self._at), "do": "set the clock right; ends are judged by the floor until then"}
            LOG.error("the clock was set back", extra={"facts": facts})

    def close(self, wall: float) -> None:
        """Stores what was gained since the last time; a database that is away loses at most a minute of it."""
        self._near(wall)
        if not self._signed and self._at - self._stored < EVERY_S:
            return
        try:
            retried(self._engine, lambda conn: self._claim(conn, FLOOR, self._at, self._at))
        except AirlockError as error:
            LOG.warning("the clock's floor was not stored: %s", error)

    def _near(self, wall: float) -> None:
        if 0 < wall - self._at <= NEAR_S:
            self._at = wall

    def _store(self, conn: Connection, wall: float) -> bool:
        rows = {row.name: row.at for row in conn.execute(select(t.clock))}
        self._at = max(self._at, rows.get(FLOOR, 0.0))
        self._claim(conn, FLOOR, self._at, self._at)
        host = ROLLBACK + socket.gethostname()
        back = self.doubt(wall) == "clock_rollback"
        begun = back and not rows.get(host) and self._claim(conn, host, self._at, 0.0)
        if begun:
            self._record(conn, wall, "clock_rollback", clock=round(wall, 3), behind_s=round(self._at - wall, 3), host=socket.gethostname())
        elif not back and rows.get(host):
            self._claim(conn, host, 0.0, MAX_DATE)
        if self._at - rows.get(RECORDED, 0.0) >= RECORD_S and self._claim(conn, RECORDED, self._at, self._at - RECORD_S):
            self._record(conn, wall, EVENT)
        return begun

    @staticmethod
    def _claim(conn: Connection, name: str, at: float, most: float) -> bool:
        """Writes a row that is at most `most` now; of two processes one does, and the other is told no."""
        conn.execute(ignore_duplicates(conn, t.clock).values(name=name, at=0.0))
        row = (t.clock.c.name == name, t.clock.c.at <= most)
        return conn.execute(update(t.clock).where(*row).values(at=at)).rowcount == 1

    def _record(self, conn: Connection, wall: float, event: str, **more: object) -> None:
        call = Call(Principal(key_id="site"), Decision(True, "local"), "clock", self.now(wall))
        self._audit.change(conn, call, event, "", floor=round(self._at, 3), **more)


def _documents(conn: Connection) -> float:
    """The newest time that a document of this site was signed at; 0 for none."""
    newest = [conn.execute(select(func.max(table.c.iat))).scalar_one_or_none() for table in (t.entitlement, t.revocation_list)]
    return max(float(at or 0.0) for at in newest)


def _rebuilt(conn: Connection, created: str) -> float:
    """The floor of a site whose row is lost: the one that the log holds, and what came after it as far as it is near; without one the newest time."""
    leaf, waits = t.audit_leaf.c, t.audit_pending.c
    size = conn.execute(select(func.max(leaf.idx))).scalar_one_or_none() or 0
    told = select(leaf.body).where(leaf.event == EVENT, leaf.idx > size - LOOK_BACK).order_by(leaf.idx.desc()).limit(1)
    comes = select(waits.body).where(waits.body.contains(f'"event":"{EVENT}"')).order_by(waits.id.desc()).limit(1)
    floor = max(_told(conn.execute(found).scalar_one_or_none()) for found in (told, comes))
    seen = [
        conn.execute(found).scalar_one_or_none() or 0.0
        for found in (
            select(leaf.ts).order_by(leaf.idx.desc()).limit(1),
            select(waits.ts).order_by(waits.id.desc()).limit(1),
            select(func.max(t.audit_checkpoint.c.created)),
            select(func.max(t.lease.c.iat)),
        )
    ]
    if not floor:
        with suppress(ValueError):  # of a file that somebody edited
            seen.append(datetime.fromisoformat(created).timestamp())
        return max(seen)
    for at in sorted(seen):
        floor = max(floor, at) if at - floor <= NEAR_S else floor
    return floor


def _told(body: str | None) -> float:
    try:
        value = json.loads(body or "{}").get("floor")
    except (ValueError, AttributeError):
        return 0.0
    return float(value) if isinstance(value, int | float) else 0.0
