"""Reading the signed log: pages of entries with their checkpoints, proofs of single entries, and the end of bodies that an export keeps.

Memory is bounded by a page. Who may read is decided by registry/auditor.py; the log itself is written by registry/sequencer.py alone.
Sources: docs/format.md section 9, RFC 6962 section 2.1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import Connection, Engine, func, insert, select, update

from artifact import tlog
from artifact.errors import Conflict, Invalid, Mismatch, NotFound
from artifact.evidence import Entry, Head, encode, proof_of
from registry import tables as t
from registry.database import reading, retried
from registry.sequencer import Sequencer, head_of, reader

PAGE, PAGE_BYTES = 1000, 1 << 20
CLEARED = 5000
MAX_FOUND = 20
_L, _C = t.audit_leaf.c, t.audit_checkpoint.c
_GONE = {"body": None, **dict.fromkeys(("event", "org", "key_id", "ref", "result", "reason"), "")}


@dataclass(frozen=True)
class Page:
    """Entries in their order, behind which signed checkpoints stand (size and note), and the number to go on from; 0 at the end."""

    entries: list[tuple[int, bytes, str | None]]
    checkpoints: list[tuple[int, str]]
    after: int


@dataclass(frozen=True)
class Sealed:
    """The entries that an export keeps from now on."""

    first: int
    size: int
    digest: str
    cleared: int

    def as_json(self) -> dict[str, object]:
        """The same as a JSON object."""
        return dict(vars(self))


class Ledger:
    """The log of one site, to be read."""

    def __init__(self, engine: Engine, log: Sequencer) -> None:
        self.engine, self._log = engine, log

    def size(self) -> int:
        """How many entries there are."""
        with reading(self.engine) as conn:
            return head_of(conn).size

    def signed(self, now: float) -> tuple[str, str, Head]:
        """The newest checkpoint over all that was recorded before this, its verifier key, and the head over it.

        Raises Conflict `audit_fork`, Unavailable.
        """
        self._log.settle()
        note = self._log.sign(now)
        with reading(self.engine) as conn:
            epoch = head_of(conn).epoch
        vkey = self._log.verifier(epoch)
        found = tlog.open_checkpoint(note, vkey)
        return note, vkey, Head(found.origin, 0, found.size)

    def before(self, first: int) -> bytes:
        """The compact range over the entries before `first`; raises Invalid."""
        with reading(self.engine) as conn:
            read, at, nodes = reader(conn), 0, b""
            for height in reversed(range(first.bit_length())):
                if first >> height & 1:
                    nodes, at = nodes + read(height, at >> height), at + (1 << height)
        return nodes

    def page(self, after: int, size: int, limit: int = PAGE) -> Page:
        """Entries from number `after` below `size`, bounded in number and bytes, and the checkpoints over them; raises Mismatch for a gap."""
        with reading(self.engine) as conn:
            epoch = head_of(conn).epoch
            wanted = select(_L.idx, _L.leaf_hash, _L.body).where(_L.idx >= after, _L.idx < size).order_by(_L.idx).limit(min(limit, PAGE))
            entries, held = list[tuple[int, bytes, str | None]](), 0
            for row in conn.execute(wanted):
                if row.idx != after + len(entries):
                    break
                held += len(row.body or "") + 100
                if entries and held > PAGE_BYTES:
                    break
                entries.append((row.idx, bytes(row.leaf_hash), row.body))
            end = after + len(entries)
            if not entries and after < size:
                raise Mismatch(f"entry {after} of the audit log is missing in the database", expected=f"entries 0 to {size - 1}", index=after)
            signed = select(_C.size, _C.note).where(_C.epoch == epoch, _C.size > after, _C.size <= end).order_by(_C.size)
            checkpoints = [(row.size, row.note) for row in conn.execute(signed)]
        return Page(entries, checkpoints, end if end < size else 0)

    def items(self, head: Head) -> Iterator[Entry | str]:
        """What artifact.evidence.lines takes: all entries of the head with their checkpoints, page after page."""
        after = head.first
        while after < head.size:
            page = self.page(after, head.size)
            yield from woven(page.entries, page.checkpoints)
            after = page.after or head.size

    def index_of(self, *, request_id: str = "", jti: str = "", org: str = "") -> list[int]:
        """The numbers of the entries of a request, or of the lease `jti`, of one organisation where it is given; the first 20."""
        found = select(_L.idx).order_by(_L.idx).limit(MAX_FOUND)
        if jti:
            with reading(self.engine) as conn:
                iat = conn.execute(select(t.lease.c.iat).where(t.lease.c.jti == jti)).scalar_one_or_none()
            if iat is None:
                return []
            found = found.where(_L.ts >= iat - 60, _L.ts <= iat + 60, _L.event == "lease", _L.body.contains(f'"{jti}"', autoescape=True))
        else:
            found = found.where(_L.body.contains(f'"{request_id}"', autoescape=True))
        if org:
            found = found.where(_L.org == org)
        with reading(self.engine) as conn:
            return list(conn.execute(found).scalars())

    def proof(self, index: int, note: str, vkey: str, org: str = "") -> bytes:
        """The file that proves the entry `index` under a checkpoint, of one organisation where it is given; raises NotFound, Invalid."""
        size = tlog.open_checkpoint(note, vkey).size
        with reading(self.engine) as conn:
            row = conn.execute(select(_L.leaf_hash, _L.body, _L.org).where(_L.idx == index)).first()
            if row is None or index >= size or (org and row.org != org):
                raise NotFound(f"there is no entry {index} in the audit log", expected="a number as GET audit shows it, less one", reason="log")
            nodes = tlog.inclusion(reader(conn), index, size)
        return proof_of((bytes(row.leaf_hash), row.body), index, nodes, note)

    # ---- sealing

    def sealed(self) -> int:
        """Up to which entry bodies are kept by exports alone."""
        with reading(self.engine) as conn:
            return int(conn.execute(select(func.max(t.audit_seal.c.size))).scalar() or 0)

    def sealable(self, until: float) -> Head:
        """What a seal of all entries before a time would hold: from the last seal to the last checkpoint before it; raises Invalid."""
        first = self.sealed()
        with reading(self.engine) as conn:
            head = head_of(conn)
            late = conn.execute(select(func.min(_L.idx)).where(_L.idx >= first, _L.ts >= until)).scalar()
            most = head.size if late is None else int(late)
            size = conn.execute(select(func.max(_C.size)).where(_C.epoch == head.epoch, _C.size <= most)).scalar() or 0
        if size <= first:
            raise Invalid(
                "there is nothing to seal: no checkpoint over further entries is older than that",
                expected=f"a time behind that of entry {first}",
                do="choose a later --until",
                reason="seal",
            )
        return Head(self._log.name_of(head.epoch), first, int(size), self.before(first))

    def seal(self, head: Head, file: Path, digest: str, key_id: str, now: float, row: Callable[[Connection, Sealed], None]) -> Sealed:
        """Records that `file`, which the caller has written, synced and verified, keeps these entries, and removes their bodies here.

        What was killed half-way is finished by `clear`. Raises Conflict where another seal was faster.
        """
        found = Sealed(head.first, head.size, digest, 0)

        def record(conn: Connection) -> None:
            if int(conn.execute(select(func.max(t.audit_seal.c.size))).scalar() or 0) != head.first:
                raise Conflict("another seal was made meanwhile", do=f"remove {file}, then seal again", reason="seal")
            conn.execute(insert(t.audit_seal).values(size=head.size, digest=digest, key_id=key_id, at=now))
            row(conn, found)

        retried(self.engine, record)
        return Sealed(head.first, head.size, digest, self.clear())

    def clear(self) -> int:
        """Removes the bodies of sealed entries, and what the columns beside them said; returns how many; again is a no-op."""
        cleared, at = 0, 0

        def work(conn: Connection) -> tuple[int, int]:
            size = conn.execute(select(func.max(t.audit_seal.c.size))).scalar() or 0
            some = select(_L.idx).where(_L.idx >= at, _L.idx < size, _L.body.is_not(None)).order_by(_L.idx).limit(CLEARED).subquery()
            lo, hi = conn.execute(select(func.min(some.c.idx), func.max(some.c.idx))).one()
            if lo is None:
                return 0, 0
            gone = update(t.audit_leaf).where(_L.idx >= lo, _L.idx <= hi, _L.body.is_not(None)).values(**_GONE)
            return conn.execute(gone).rowcount, hi + 1

        while True:
            found, at = retried(self.engine, work)
            cleared += found
            if not found:
                return cleared


def woven(entries: list[tuple[int, bytes, str | None]], checkpoints: list[tuple[int, str]]) -> Iterator[Entry | str]:
    """Entries, each with the checkpoint behind it that covers just what came so far."""
    notes = dict(checkpoints)
    for index, leaf, body in entries:
        yield leaf, body
        if index + 1 in notes:
            yield notes[index + 1]


def page_json(page: Page) -> dict[str, object]:
    """A page as the admin door answers it."""
    entries = [{"i": i, "hash": encode(leaf)} | ({"body": body} if body is not None else {}) for i, leaf, body in page.entries]
    return {"items": entries, "checkpoints": [{"size": size, "note": note} for size, note in page.checkpoints], "after": page.after}
