"""The watch of one server: every minute what ends is counted, told by log lines and the webhook, and the clock and documents are moved on.

Here so that nothing lapses unseen between two restarts. Several servers tell each notice once: the table `notice` knows what was told. It never
serves and never blocks who does; a receiver that is away is tried again later.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence

from sqlalchemy import Connection, delete, select, update

from artifact.errors import AirlockError, Conflict
from artifact.grant import Decision, Principal, date
from artifact.store import Call
from registry import tables as t
from registry import webhook
from registry.calendar import HORIZON_S, Item, due, figures
from registry.database import reading, retried
from registry.job import Job
from registry.rows import ignore_duplicates
from registry.wiring import Site

NAME = "watch"
EVERY_S = 60.0
MOST = 500  # notices of one round; the rest come with the next
BATCH = 100  # items of one POST
TRIES, PAUSE_S = 3, 1.0  # of one round; the pause doubles
BACK_OFF_S = 3600.0  # the longest time between two rounds that try a receiver which failed
GIVE_UP_S = 7 * 86400.0
FORGET_S = 400 * 86400.0
LOG = logging.getLogger("airlock.watch")
N = t.notice.c
Notice = tuple[Item, int]  # what ends, and the threshold of days that was reached


class Watch:
    """The watch of one process; `figures` are the last counts for each kind, days to the nearest end and how many ended."""

    def __init__(self, site: Site, every_s: float = EVERY_S) -> None:
        self._site, self._every_s = site, every_s
        self.figures: Mapping[str, tuple[float, int]] = {}
        self.audit: Mapping[str, float] = {}
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._wait_s, self._not_before = 0.0, 0.0

    def start(self, on_error: Callable[[str, Exception], None]) -> Callable[[], None]:
        """Watches from now on, until the function returned is called."""
        self._thread = threading.Thread(target=self._run, args=(on_error,), name="watch", daemon=True)
        self._thread.start()
        return self.close

    def close(self) -> None:
        """Ends the thread; a POST under way is not waited for longer than a moment."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout=2.0)

    def _run(self, on_error: Callable[[str, Exception], None]) -> None:
        while True:
            self.round(time.time(), on_error)
            if self._stop.wait(self._every_s):
                return

    def round(self, wall: float, on_error: Callable[[str, Exception], None]) -> None:
        """One round; a step that fails does not keep the others from their turn."""
        floor = self._site.floor
        steps: tuple[tuple[str, Callable[[], object]], ...] = (
            ("the clock", lambda: floor.tick(wall)),
            ("documents", lambda: self._site.guard.documents.activate(floor.sure(floor.now(wall)))),
            ("the audit log", lambda: self._look(floor.now(wall))),
            ("notices", lambda: self.notify(floor.now(wall))),
        )
        for name, step in steps:
            try:
                step()
            except Exception as error:  # noqa: BLE001 - the top of a thread: the next round tries again
                on_error(name, error)

    def _look(self, now: float) -> None:
        """How far the log is behind, and whether it is another one than was signed."""
        self.audit = {}  # not known, should the next line fail
        rows, oldest_s = self._site.log.waiting(now)
        self.audit = {"waiting": float(rows), "oldest_seconds": oldest_s}

    def notify(self, now: float) -> int:
        """Counts what ends, and tells what was not told yet; how many notices that were; raises Unavailable."""
        found = self._site.guard.expiring.every(now, now + HORIZON_S)
        self.figures = figures(found, now)
        wanted = {(item.kind, item.id, item.ends, days): item for item in found if (days := due(item, now)) is not None}
        sending = bool(self._site.settings.webhook) and time.monotonic() >= self._not_before
        if not self._new(wanted) and not (sending and self._unsent(now)):
            return 0
        try:
            job = Job.take(self._site.engine, NAME, now)
        except Conflict:
            return 0  # another process tells it
        report: dict[str, object] = {"error": "stopped"}
        try:
            told = self._tell(wanted, now)
            report = {"notices": told, "sent": self._send({key[:3]: item for key, item in wanted.items()}, now) if sending else 0}
        finally:
            job.end(report, now)
        return told

    def _new(self, wanted: Mapping[tuple[str, str, float, int], Item]) -> list[tuple[str, str, float, int]]:
        if not wanted:
            return []
        with reading(self._site.engine) as conn:
            known = {tuple(row) for row in conn.execute(select(N.kind, N.item, N.due, N.days).where(N.due >= min(key[2] for key in wanted)))}
        return [key for key in wanted if key not in known]

    def _tell(self, wanted: Mapping[tuple[str, str, float, int], Item], now: float) -> int:
        """Notes the notices that are new, each with an audit row, then logs them; what was noted is never told again."""
        new = self._new(wanted)[:MOST]
        call = Call(Principal(key_id="site"), Decision(True, "local"), NAME, now)

        def work(conn: Connection) -> list[tuple[str, str, float, int]]:
            mine = []
            for kind, item, ends, days in new:
                row = ignore_duplicates(conn, t.notice).values(kind=kind, item=item, due=ends, days=days, at=now)
                if conn.execute(row.returning(N.item)).first() is not None:
                    mine.append((kind, item, ends, days))
                    self._site.audit.change(conn, call, "notice", item, kind=kind, ends=ends, days=days, owner=wanted[kind, item, ends, days].org)
            conn.execute(delete(t.notice).where(N.due < self._site.floor.at - FORGET_S))
            return mine

        mine = retried(self._site.engine, work)
        stopped = self._site.guard.expiring.stopped([wanted[key] for key in mine], now)
        for (*_, days), item in zip(mine, stopped, strict=True):
            words = f"{item.kind} {item.id} " + (f"ends in {item.days(now):.1f} days" if item.ends > now else f"ended on {date(item.ends)}")
            LOG.log(logging.WARNING if item.ends > now else logging.ERROR, "%s", words, extra={"facts": item.as_json(now) | {"threshold": days}})
        return len(mine)

    # ---- the receiver

    def _unsent(self, now: float) -> list[tuple[str, str, float, int]]:
        """What was told here and not to the receiver yet, the oldest first; not for ever."""
        columns = (N.kind, N.item, N.due, N.days)
        with reading(self._site.engine) as conn:
            found = conn.execute(select(*columns).where(N.sent_at == 0, N.at > now - GIVE_UP_S).order_by(N.at, N.due).limit(MOST))
            return [(row.kind, row.item, row.due, row.days) for row in found]

    def _send(self, known: Mapping[tuple[str, str, float], Item], now: float) -> int:
        """Hands over what is not sent yet; what does not end then any more is not told."""
        rows, sent = self._unsent(now), 0
        gone = [row for row in rows if row[:3] not in known]
        self._sent(gone, now)
        items = {(i.kind, i.id, i.ends): i for i in self._site.guard.expiring.stopped([known[row[:3]] for row in rows if row[:3] in known], now)}
        left = [row for row in rows if row[:3] in known]
        for at in range(0, len(left), BATCH):
            part = left[at : at + BATCH]
            if not self._deliver([(items[row[:3]], row[3]) for row in part], now):
                break
            self._sent(part, now)
            sent += len(part)
        return sent

    def _sent(self, rows: Sequence[tuple[str, str, float, int]], now: float) -> None:
        def work(conn: Connection) -> None:
            for kind, item, ends, days in rows:
                conn.execute(update(t.notice).where(N.kind == kind, N.item == item, N.due == ends, N.days == days).values(sent_at=now))

        if rows:
            retried(self._site.engine, work)

    def _deliver(self, notices: Sequence[Notice], now: float) -> bool:
        """Whether the receiver took them, within a few tries; a failure is logged, and the next rounds wait longer and longer."""
        settings = self._site.settings
        body = payload(self._site.home.instance, notices, now)
        for turn in range(1, TRIES + 1):
            try:
                webhook.deliver(settings.webhook, body, webhook.secret(settings.webhook_secret_file))
                self._wait_s = self._not_before = 0.0
                return True
            except AirlockError as error:
                if turn < TRIES and not self._stop.wait(PAUSE_S * 2**turn / 2):
                    continue
                self._wait_s = min(max(2 * self._wait_s, self._every_s), BACK_OFF_S)
                self._not_before = time.monotonic() + self._wait_s
                facts = {"reason": error.reason, "notices": len(notices), "tries": turn, "again_in_s": round(self._wait_s), "do": error.do}
                LOG.error("%s", error.what, extra={"facts": facts})
                return False
        return False


def payload(instance: str, notices: Sequence[Notice], now: float) -> bytes:
    """The body of one POST (docs/format.md section 10): ids and names, never a secret."""
    items = [item.as_json(now) | {"threshold": days} for item, days in notices]
    return json.dumps({"schema": 1, "event": "expiring", "instance": instance, "at": date(now), "items": items}).encode()
