"""Puts waiting audit rows into the signed log: leaves in one order, the tree above them, checkpoints; what is in the log is never changed here.

Any process may do it: a transaction moves a batch and compares the size it began from, so two at once cannot fork the tree.
A checkpoint is signed after its leaves are durable, and kept in a file beside the database first: a database that is put back to an older state
contradicts it, and then nothing more is signed until an administrator says so.
Sources: RFC 6962 section 2.1, C2SP tlog-checkpoint; docs/format.md section 9.
"""

from __future__ import annotations

import json
import logging
import os
import re
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import Connection, Engine, delete, func, insert, select, text, update

from artifact import tlog
from artifact.errors import AirlockError, Conflict, Invalid, NotFound, Unavailable
from registry import tables as t
from registry.database import reading, retried

BATCH = 500
EVERY_S = 1.0
SIGN_S, SIGN_EVENTS = 60.0, 1000
LATE_S = 300.0  # an event that waits longer is told: something holds the database's oldest transaction open
FILE = "audit.checkpoint"
ONE_AT_A_TIME = 0x6169726C6F67  # the advisory lock of PostgreSQL that one batch holds; any number that is always the same
LOG = logging.getLogger("airlock.audit")
# Numbers are given before the commit: a row is taken only when no transaction that might still bring an earlier one is running. One that is seen
# and is of a transaction to come was restored by hand from another server, whose numbers are not this one's.
_SETTLED = text(
    'SELECT id, "class" AS kind, ts, body FROM audit_pending '
    "WHERE xid < pg_snapshot_xmin(pg_current_snapshot()) OR xid >= pg_snapshot_xmax(pg_current_snapshot()) ORDER BY id LIMIT :batch"
)


@dataclass(frozen=True)
class Head:
    """How far the log is: its entries, the compact range over them, and which life of it this is (1, and one more after each accepted fork)."""

    size: int
    nodes: bytes
    epoch: int


@dataclass(frozen=True)
class Kept:
    """The checkpoint outside the database: which life of the log it is of, what it says, and its text."""

    epoch: int
    checkpoint: tlog.Checkpoint
    note: str


def head_of(conn: Connection) -> Head:
    """The log's head, that of no entry where there is none yet."""
    row = conn.execute(select(t.audit_head.c.size, t.audit_head.c.nodes, t.audit_head.c.epoch).where(t.audit_head.c.id == 1)).first()
    return Head(row.size, bytes(row.nodes), row.epoch) if row is not None else Head(0, b"", 1)


def reader(conn: Connection) -> tlog.Reader:
    """The stored hashes of one database, each block of 256 by one statement at most; raises Invalid where one is missing."""
    blocks: dict[tuple[int, int], dict[int, bytes]] = {}

    def fetched(level: int, n: int) -> dict[int, bytes]:
        first = n * tlog.TILE
        if level == 0:
            leaf = t.audit_leaf.c
            rows = conn.execute(select(leaf.idx, leaf.leaf_hash).where(leaf.idx >= first, leaf.idx < first + tlog.TILE))
            return {row.idx: bytes(row.leaf_hash) for row in rows}
        tile = t.audit_tile.c
        raw = bytes(conn.execute(select(tile.hashes).where(tile.level == level, tile.n == n)).scalar_one_or_none() or b"")
        return {first + i // tlog.HASH: raw[i : i + tlog.HASH] for i in range(0, len(raw), tlog.HASH)}

    def read(height: int, index: int) -> bytes:
        level, rest = divmod(height, tlog.HEIGHT)
        wanted = range(index << rest, (index + 1) << rest)
        at = (level, wanted.start // tlog.TILE)
        if at not in blocks or wanted[-1] not in blocks[at]:
            blocks[at] = fetched(*at)
        hashes = [blocks[at][i] for i in wanted if i in blocks[at]]
        if len(hashes) != len(wanted):
            what = f"{len(wanted)} from {wanted.start} at level {level}"
            raise Invalid("hashes of the log are missing", expected=what, do="restore the newest backup of the database", reason="log")
        return tlog.root_of(hashes)

    return read


def root_at(conn: Connection, size: int) -> bytes:
    """The root over the first `size` entries; raises Invalid."""
    return tlog.subtree(reader(conn), 0, size) if size else tlog.Range().root()


class Sequencer:
    """The log of one site; `name` and `key` sign its checkpoints, `folder` keeps the newest one outside the database."""

    def __init__(self, engine: Engine, folder: Path, name: str, key: Callable[[], bytes]) -> None:
        self._engine, self._file, self._name, self._key = engine, folder / FILE, name, key
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self.fork = ""  # why nothing is signed any more

    def name_of(self, epoch: int) -> str:
        """The log's name, which is its key's: another one after each accepted fork, since one name signs one history."""
        return self._name if epoch == 1 else f"{self._name}/{epoch}"

    def verifier(self, epoch: int) -> str:
        """The line that auditors pin; raises Unavailable."""
        return tlog.verifier_key(self.name_of(epoch), self._key())

    # ---- leaves

    def step(self) -> int:
        """Moves one batch of waiting rows into the log and returns how many; raises Unavailable, Conflict."""
        return retried(self._engine, self._batch)

    def settle(self) -> int:
        """Moves what waits now, batch after batch; returns how many; raises Unavailable."""
        moved = 0
        while found := self.step():
            moved += found
            if found < BATCH:
                break
        return moved

    def _batch(self, conn: Connection) -> int:
        if conn.dialect.name == "postgresql":
            if not conn.execute(text("SELECT pg_try_advisory_xact_lock(:n)"), {"n": ONE_AT_A_TIME}).scalar_one():
                return 0  # another process is at it
            rows = conn.execute(_SETTLED, {"batch": BATCH}).all()
        else:
            p = t.audit_pending.c
            rows = conn.execute(select(p.id, p["class"].label("kind"), p.ts, p.body).order_by(p.id).limit(BATCH)).all()
        if not rows:
            return 0
        head = head_of(conn)
        if head.size == 0 and conn.execute(select(t.audit_head.c.id)).first() is None:
            conn.execute(insert(t.audit_head).values(id=1, size=0, nodes=b"", epoch=head.epoch))
        log = tlog.Range(head.size, head.nodes)
        leaves, tiles = [], _Tiles(conn)
        for row in rows:
            leaf = tlog.leaf_hash(row.body.encode())
            leaves.append(_leaf(log.size, leaf, row.kind, row.ts, row.body))
            tiles.add(log.append(leaf), log.size)
        moved = update(t.audit_head).where(t.audit_head.c.id == 1, t.audit_head.c.size == head.size)
        if not conn.execute(moved.values(size=log.size, nodes=log.nodes())).rowcount:
            raise Conflict("the audit log grew meanwhile", do="nothing: the next step goes on from there", reason="log_moved")
        conn.execute(insert(t.audit_leaf), leaves)
        tiles.store()
        conn.execute(delete(t.audit_pending).where(t.audit_pending.c.id.in_([row.id for row in rows])))
        return len(rows)

    # ---- checkpoints

    def newest(self) -> str:
        """The newest signed checkpoint; empty before the first."""
        with reading(self._engine) as conn:
            return _newest(conn, head_of(conn).epoch)

    def sign(self, now: float) -> str:
        """Signs a checkpoint over all that is in the log, unless there is one, and returns it; raises Conflict `audit_fork`, Unavailable."""
        kept = self._kept()
        with reading(self._engine) as conn:
            head = head_of(conn)
            self._demand_history(conn, head, kept)
            found = _newest(conn, head.epoch)
        signed = bool(found) and tlog.open_checkpoint(found, self.verifier(head.epoch)).size == head.size
        name = self.name_of(head.epoch)
        checkpoint = tlog.Checkpoint(name, head.size, tlog.Range(head.size, head.nodes).root())
        note = found if signed else tlog.sign_checkpoint(checkpoint, name, self._key())
        kept = self._kept()  # again: another process that signed more meanwhile must not be set back
        if kept is None or (kept.epoch, kept.checkpoint.size) < (head.epoch, head.size):
            self._keep(note)
        if signed:
            return note

        def store(conn: Connection) -> None:
            known = select(t.audit_checkpoint.c.size).where(t.audit_checkpoint.c.epoch == head.epoch, t.audit_checkpoint.c.size == head.size)
            if conn.execute(known).first() is None:
                conn.execute(insert(t.audit_checkpoint).values(epoch=head.epoch, size=head.size, note=note, created=now))

        retried(self._engine, store)
        return note

    def _demand_history(self, conn: Connection, head: Head, kept: Kept | None) -> None:
        """Returns only where the database holds all that was signed; raises Conflict `audit_fork`.

        `kept` was read before the head: another process may sign a longer log at any moment.
        """
        fork = ""
        if kept is not None and kept.epoch >= head.epoch:  # of an earlier life the database was given up
            size = kept.checkpoint.size
            try:
                whole = kept.epoch == head.epoch and size <= head.size and root_at(conn, size) == kept.checkpoint.root
            except Invalid:
                whole = False
            fork = "" if whole else f"a checkpoint over {size} entries was signed, and the database has another history of {head.size}"
        self.fork = fork
        if fork:
            raise Conflict(
                f"the audit log was put back: {fork}",
                expected=f"the log that {self._file} vouches for",
                do="restore the newest backup of the database; what is lost for good is accepted by airlock audit accept-fork",
                reason="audit_fork",
            )

    def _kept(self) -> Kept | None:
        """The checkpoint outside the database, None before the first; a damaged file is an error, never no checkpoint; raises Unavailable."""
        try:
            note = self._file.read_text("utf-8")
        except FileNotFoundError:
            return None
        except (OSError, UnicodeError) as error:
            raise Unavailable(f"{self._file} cannot be read", do="restore it from the backup of the data directory", reason="log") from error
        found = re.fullmatch(re.escape(self._name) + "(?:/([1-9][0-9]{0,8}))?", note.split("\n", 1)[0])
        if found is None:
            do = "put the newest checkpoint that an auditor kept there under that name"
            raise Unavailable(f"{self._file} holds no checkpoint of this site's log", expected=f"one of {self._name}", do=do, reason="log")
        epoch = int(found[1] or 1)
        return Kept(epoch, tlog.open_checkpoint(note, self.verifier(epoch)), note)

    def _keep(self, note: str) -> None:
        """Replaces the file outside the database."""
        temporary = self._file.with_name(f".{FILE}.{os.getpid()}.{secrets.token_hex(4)}.partial")
        try:
            fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
            with os.fdopen(fd, "wb") as out:
                out.write(note.encode())
                out.flush()
                os.fsync(out.fileno())
            temporary.replace(self._file)
        except OSError as error:
            do = "free space, or let this user write there"
            raise Unavailable(f"{self._file} cannot be written: {error.strerror}", do=do, reason="log") from error
        finally:
            temporary.unlink(missing_ok=True)

    def accept_fork(self, row: Callable[[Connection, str], None]) -> int:
        """Begins the log's next life from what the database holds and returns its number; `row` records which checkpoint was given up.

        Raises NotFound where nothing contradicts the database.
        """
        kept = self._kept()

        def begin(conn: Connection) -> int:
            head = head_of(conn)
            try:
                self._demand_history(conn, head, kept)
            except Conflict:
                row(conn, kept.note if kept else "")
                epoch = max(head.epoch, kept.epoch if kept else 0) + 1  # a backup from before an accepted fork must not take that one's name
                if not conn.execute(update(t.audit_head).where(t.audit_head.c.id == 1).values(epoch=epoch)).rowcount:
                    conn.execute(insert(t.audit_head).values(id=1, size=0, nodes=b"", epoch=epoch))
                return epoch
            raise NotFound("the audit log is whole: there is no fork to accept", do="airlock audit verify", reason="log")

        epoch = retried(self._engine, begin)
        self.fork = ""
        return epoch

    # ---- the thread

    def start(self, on_error: Callable[[Exception], None]) -> None:
        """Sequences every second and signs every 60 s or 1000 events until close(); raises nothing: a fork at start is told by the log."""
        self._thread = threading.Thread(target=self._run, args=(on_error,), name="audit-sequencer", daemon=True)
        self._thread.start()

    def _run(self, on_error: Callable[[Exception], None]) -> None:
        signed_at: float | None = None  # at first there is a look at the history, also where nothing is new
        told = ""
        while not self._stop.wait(EVERY_S):
            try:
                self.settle()
                unsigned = self._unsigned()
                if signed_at is None or unsigned >= SIGN_EVENTS or (unsigned and time.monotonic() - signed_at >= SIGN_S):
                    self.sign(time.time())
                    signed_at = time.monotonic()
                told = ""
            except Exception as error:  # noqa: BLE001 - the top of a thread: rows wait, and the next round tries again
                reason = error.reason if isinstance(error, AirlockError) else type(error).__name__
                if reason != told and reason != "log_moved":
                    told = reason
                    on_error(error)

    def _unsigned(self) -> int:
        """How many entries no checkpoint covers, whichever process put them into the log."""
        with reading(self._engine) as conn:
            head = head_of(conn)
            newest = conn.execute(select(func.max(t.audit_checkpoint.c.size)).where(t.audit_checkpoint.c.epoch == head.epoch)).scalar()
        return head.size - int(newest or 0)

    def close(self) -> None:
        """Ends the thread; what waits is sequenced and signed, unless the log is forked or the database away."""
        self._stop.set()
        if self._thread is None:
            return
        self._thread.join(timeout=10)
        try:
            self.settle()
            self.sign(time.time())
        except AirlockError as error:
            LOG.warning("the last checkpoint was not signed: %s", error)

    def waiting(self, now: float) -> tuple[int, float]:
        """How many rows wait and since how many seconds the oldest does."""
        p = t.audit_pending.c
        with reading(self._engine) as conn:
            oldest = conn.execute(select(p.ts).order_by(p.id).limit(1)).scalar_one_or_none()
            count = len(conn.execute(select(p.id).limit(10 * BATCH)).all())
        return count, max(now - oldest, 0.0) if oldest is not None else 0.0


class _Tiles:
    """The hashes above the leaves that one batch adds, a row for each 256 of a level."""

    def __init__(self, conn: Connection) -> None:
        self._conn = conn
        self._tiles: dict[tuple[int, int], bytes] = {}
        self._known: set[tuple[int, int]] = set()

    def add(self, ended: list[bytes], size: int) -> None:
        """Takes the roots that ended with the newest of `size` entries."""
        for height in range(tlog.HEIGHT, len(ended), tlog.HEIGHT):
            level, index = height // tlog.HEIGHT, (size >> height) - 1
            at = (level, index // tlog.TILE)
            if at not in self._tiles:
                tile = t.audit_tile.c
                raw = self._conn.execute(select(tile.hashes).where(tile.level == level, tile.n == at[1])).scalar_one_or_none()
                self._tiles[at] = bytes(raw or b"")
                if raw is not None:
                    self._known.add(at)
            self._tiles[at] += ended[height]

    def store(self) -> None:
        """Writes them."""
        for (level, n), hashes in self._tiles.items():
            if (level, n) in self._known:
                tile = t.audit_tile.c
                self._conn.execute(update(t.audit_tile).where(tile.level == level, tile.n == n).values(hashes=hashes))
            else:
                self._conn.execute(insert(t.audit_tile).values(level=level, n=n, hashes=hashes))


def _leaf(index: int, leaf: bytes, kind: str, ts: float, body: str) -> dict[str, object]:
    try:
        doc = json.loads(body)
    except ValueError:
        doc = {}
    doc = doc if isinstance(doc, dict) else {}
    shown = {name: str(doc.get(name) or "") for name in ("event", "org", "key_id", "ref", "result", "reason")}
    return {"idx": index, "leaf_hash": leaf, "body": body, "class": kind, "ts": ts, **shown}


def _newest(conn: Connection, epoch: int) -> str:
    c = t.audit_checkpoint.c
    return conn.execute(select(c.note).where(c.epoch == epoch).order_by(c.size.desc()).limit(1)).scalar_one_or_none() or ""
