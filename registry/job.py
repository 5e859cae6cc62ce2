"""One long job of a site at a time: its row says who runs it, how far it is and how the last one ended; a holder that died is followed at once.

The row only saves double work: what a job does must be right even when two run. It knows nothing of what jobs do.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import time
from collections.abc import Mapping

from sqlalchemy import Connection, Engine, select, update

from artifact.errors import Conflict
from artifact.grant import date
from registry import tables as t
from registry.database import reading, retried
from registry.links import ignore_duplicates

STALE_S = 300.0  # how long a holder of another machine may be silent
BEAT_S = 5.0
MAX_REPORT = 200_000


class Job:
    """A job that this process holds; `beat` shows that it is alive and ends it where another took it over."""

    def __init__(self, engine: Engine, name: str, cursor: str, started: float) -> None:
        self._engine, self._name, self._cursor, self._started = engine, name, cursor, started
        self._beaten = time.monotonic()

    @classmethod
    def take(cls, engine: Engine, name: str, now: float) -> Job:
        """Takes the job; raises Conflict `running` while another process is at it, Unavailable."""
        cursor = _cursor("", 0)

        def work(conn: Connection) -> None:
            conn.execute(ignore_duplicates(conn, t.job).values(name=name))
            held = conn.execute(select(t.job.c.cursor, t.job.c.started).where(t.job.c.name == name).with_for_update()).one()
            if held.cursor and _alive(str(held.cursor)):
                raise Conflict(
                    f"{name} runs since {date(held.started)}, by {_holder(str(held.cursor))}",
                    do="wait for it to end; see its status",
                    reason="running",
                )
            conn.execute(update(t.job).where(t.job.c.name == name).values(cursor=cursor, started=now))

        retried(engine, work)
        return cls(engine, name, cursor, now)

    def beat(self, phase: str, done: int) -> None:
        """Notes how far the job is, at most every 5 s; raises Conflict `taken_over`."""
        if time.monotonic() - self._beaten < BEAT_S:
            return
        fresh = _cursor(phase, done, _holder(self._cursor))
        self._write(fresh, {})
        self._cursor, self._beaten = fresh, time.monotonic()

    def end(self, report: Mapping[str, object], now: float) -> None:
        """Lets go of the job and leaves its report; raises Conflict `taken_over`."""
        text = json.dumps(report)
        self._write("", {"ended": max(now, self._started), "report": text if len(text) <= MAX_REPORT else json.dumps({"error": "too_large"})})

    def _write(self, cursor: str, more: dict[str, object]) -> None:
        def work(conn: Connection) -> int:
            row = update(t.job).where(t.job.c.name == self._name, t.job.c.cursor == self._cursor)
            return conn.execute(row.values(cursor=cursor, **more)).rowcount

        if not retried(self._engine, work):
            raise Conflict(f"another process took {self._name} over", do="nothing: it goes on there", reason="taken_over")


def _cursor(phase: str, done: int, holder: str = "") -> str:
    mark = holder or f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(4)}"
    return json.dumps({"holder": mark, "beat": round(time.time(), 3), "phase": phase, "done": done})


def _holder(cursor: str) -> str:
    return str(json.loads(cursor).get("holder", ""))


def _alive(cursor: str) -> bool:
    """Whether the holder still lives, as far as can be told: a process of this machine by its pid, another one by its last beat."""
    doc = json.loads(cursor)
    if abs(time.time() - float(doc["beat"])) > STALE_S:
        return False
    host, pid, _ = str(doc["holder"]).rsplit(":", 2)
    if host != socket.gethostname():
        return True
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def status(engine: Engine, name: str) -> dict[str, object]:
    """Whether the job runs, since when and how far, and the last report; empty times before the first run."""
    with reading(engine) as conn:
        row = conn.execute(select(t.job.c.cursor, t.job.c.started, t.job.c.ended, t.job.c.report).where(t.job.c.name == name)).first()
    if row is None:
        return {"running": False, "started": "", "ended": "", "phase": "", "done": 0, "report": {}}
    running = bool(row.cursor) and _alive(str(row.cursor))
    now = json.loads(row.cursor) if row.cursor else {}
    facts: dict[str, object] = {
        "running": running,
        "started": date(row.started) if row.started else "",
        "ended": date(row.ended) if row.ended else "",
    }
    return facts | {"phase": now.get("phase", ""), "done": now.get("done", 0), "report": json.loads(row.report) if row.report else {}}


def note(engine: Engine, name: str, report: Mapping[str, object], at: float) -> None:
    """Notes that something which needs no holder was done, and when."""

    def work(conn: Connection) -> None:
        conn.execute(ignore_duplicates(conn, t.job).values(name=name))
        conn.execute(update(t.job).where(t.job.c.name == name).values(started=at, ended=at, report=json.dumps(report)))

    retried(engine, work)


def last_ended(engine: Engine, name: str) -> float:
    """When the job ended last; 0 for never."""
    with reading(engine) as conn:
        return float(conn.execute(select(t.job.c.ended).where(t.job.c.name == name)).scalar_one_or_none() or 0.0)
