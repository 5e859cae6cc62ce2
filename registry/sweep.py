"""Garbage collection: online, incremental, in short transactions of a bounded number of rows.

Three steps, as decisions.md section 3 has them: candidates are locked (rows that somebody uses at this moment are passed over); a second statement,
which on PostgreSQL sees what was committed meanwhile, finds those that nothing holds; their location goes to `garbage`, and the bytes are removed
only after a delay that outlives every URL, the row after the bytes. Whatever is cut off at any point is finished by the next run.
It decides no right and never marks the world: who lets go of something sets `gc_after` on it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Connection, Select, bindparam, delete, func, or_, select, tuple_, update

from registry import tables as t
from registry.links import add_garbage, ignore_duplicates
from registry.statements import M, V

BATCH = 200
RETRY_S = 60.0


@dataclass
class Batch:
    """What one batch did: how many candidates it looked at, what went, and whether there may be more."""

    seen: int = 0
    manifests: list[str] = field(default_factory=list)
    blobs: list[tuple[str, int]] = field(default_factory=list)
    links: int = 0


def _due(found: Select[Any], column: Any, only: Collection[str] | None, key: Any, limit: int) -> Select[Any]:
    if only is not None:
        found = found.where(key.in_(only))
    return found.order_by(column).limit(limit)


def sweep_manifests(conn: Connection, now: float, *, limit: int = BATCH, only: Collection[str] | None = None) -> Batch:
    """Removes manifests that no repository links and no index names; what they named becomes a candidate in its turn."""
    due = _due(select(M.c.id, M.c.digest).where(M.c.gc_after <= now), M.c.gc_after, only, M.c.digest, limit)
    rows = conn.execute(due.with_for_update(skip_locked=True)).all()
    if not rows:
        return Batch()
    ids = [row.id for row in rows]
    above = t.edge.alias("above")
    holders = (
        select(t.repo_manifest.c.repo_id).where(t.repo_manifest.c.manifest_id == M.c.id).exists(),
        select(t.ref.c.repo_id).where(t.ref.c.manifest_id == M.c.id).exists(),
        select(V.c.repo_id).where(V.c.manifest_id == M.c.id).exists(),
        select(above.c.parent_id).where(above.c.child_digest == M.c.digest, above.c.kind == "manifest").exists(),
    )
    held = set(conn.execute(select(M.c.id).where(M.c.id.in_(ids), or_(*holders))).scalars())  # the second statement
    if held:
        conn.execute(update(M).where(M.c.id.in_(held)).values(gc_after=None))
    doomed = [row.id for row in rows if row.id not in held]
    if doomed:
        _let_go(conn, doomed, now)
        for table, column in ((t.file, t.file.c.manifest_id), (t.edge, t.edge.c.parent_id), (M, M.c.id)):
            conn.execute(delete(table).where(column.in_(doomed)))
    return Batch(len(rows), [row.digest for row in rows if row.id not in held])


def _let_go(conn: Connection, manifest_ids: Sequence[int], now: float) -> None:
    """Makes candidates of what these manifests name. Rows that are locked are passed over: who changes one at this moment notes it himself."""
    named = select(t.edge.c.blob).where(t.edge.c.parent_id.in_(manifest_ids), t.edge.c.blob.is_not(None))
    blobs = select(t.blob.c.digest).where(t.blob.c.digest.in_(named)).order_by(t.blob.c.digest)
    free = conn.execute(blobs.with_for_update(key_share=True, skip_locked=True)).scalars().all()
    for part in _parts(free):
        conn.execute(update(t.blob).where(t.blob.c.digest.in_(part)).values(gc_after=now))
    below = select(t.edge.c.child_digest).where(t.edge.c.parent_id.in_(manifest_ids), t.edge.c.kind == "manifest")
    children = select(M.c.id).where(M.c.digest.in_(below), M.c.id.not_in(manifest_ids)).order_by(M.c.digest)
    found = conn.execute(children.with_for_update(key_share=True, skip_locked=True)).scalars().all()
    for some in _parts(found):
        conn.execute(update(M).where(M.c.id.in_(some)).values(gc_after=now))


def _parts(values: Sequence[Any]) -> Iterable[Sequence[Any]]:
    return (values[i : i + BATCH] for i in range(0, len(values), BATCH))


def sweep_blobs(conn: Connection, now: float, delay_s: float, *, limit: int = BATCH, only: Collection[str] | None = None) -> Batch:
    """Removes links that nothing uses and whose lease is over, and blobs without edge, link or lease; their bytes go `delay_s` later."""
    b, link = t.blob.c, t.repo_blob.c
    due = _due(select(b.digest, b.size, b.location, b.lease_until).where(b.gc_after <= now), b.gc_after, only, b.digest, limit)
    rows = conn.execute(due.with_for_update(skip_locked=True)).all()
    free = [row.digest for row in rows if row.lease_until <= now]
    _look_again(conn, {row.digest: row.lease_until for row in rows if row.lease_until > now})
    if not free:
        return Batch(len(rows))
    loose = select(link.repo_id, link.digest).where(link.digest.in_(free), link.lease_until <= now)
    locked = conn.execute(loose.with_for_update(skip_locked=True)).all()
    dropped = 0
    for part in _parts([tuple(row) for row in locked]):
        dropped += conn.execute(delete(t.repo_blob).where(tuple_(link.repo_id, link.digest).in_(part), ~_used())).rowcount
    named = select(t.edge.c.parent_id).where(t.edge.c.blob == b.digest).exists()
    linked = select(link.repo_id).where(link.digest == b.digest).exists()
    held = set(conn.execute(select(b.digest).where(b.digest.in_(free), or_(named, linked))).scalars())  # the second statement
    _look_again(conn, _next(conn, held, now))
    doomed = [row for row in rows if row.lease_until <= now and row.digest not in held]
    if doomed:
        gone = [row.digest for row in doomed]
        conn.execute(delete(t.blob_alias).where(t.blob_alias.c.blob.in_(gone)))
        conn.execute(delete(t.blob_fact).where(t.blob_fact.c.digest.in_(gone)))
        conn.execute(delete(t.blob).where(b.digest.in_(gone)))
        for row in doomed:
            add_garbage(conn, row.location, row.size, now + delay_s)
        wanted = [{"place": row.location, "named": row.digest} for row in doomed]
        conn.execute(update(t.garbage).where(t.garbage.c.location == bindparam("place")).values(digest=bindparam("named")), wanted)
    return Batch(len(rows), [], [(row.digest, row.size) for row in doomed], dropped)


def _used() -> Any:
    """Whether a manifest of the link's repository names the link's blob."""
    held, edge = t.repo_manifest, t.edge
    found = select(held.c.repo_id).join(edge, edge.c.parent_id == held.c.manifest_id)
    return found.where(held.c.repo_id == t.repo_blob.c.repo_id, edge.c.blob == t.repo_blob.c.digest).correlate(t.repo_blob).exists()


def _next(conn: Connection, held: Collection[str], now: float) -> dict[str, float | None]:
    """When to look at blobs again that stay: at the end of a link's lease, soon where a link was locked, else when somebody lets go."""
    link = t.repo_blob.c
    out: dict[str, float | None] = dict.fromkeys(held)
    leased = select(link.digest, func.min(link.lease_until).label("at")).where(link.digest.in_(held), link.lease_until > now).group_by(link.digest)
    out |= {row.digest: row.at for row in conn.execute(leased)}
    out |= dict.fromkeys(conn.execute(select(link.digest).where(link.digest.in_(held), link.lease_until <= now, ~_used())).scalars(), now + RETRY_S)
    return out


def _look_again(conn: Connection, when: dict[str, float | None] | dict[str, float]) -> None:
    if when:
        moved = update(t.blob).where(t.blob.c.digest == bindparam("named")).values(gc_after=bindparam("at"))
        conn.execute(moved, [{"named": digest, "at": at} for digest, at in sorted(when.items())])


def adopt(conn: Connection, places: Sequence[tuple[str, int, str]], until: float) -> int:
    """Gives a row, leased until then, to stored bytes (location, size, digest) that no row names, and returns how many those were.

    So that what a killed upload left behind is taken by the sweep in its time, while whoever is just about to make that row finds it made.
    """
    known = select(t.blob.c.location).where(t.blob.c.digest.in_([digest for _, _, digest in places]))
    waiting = select(t.garbage.c.location).where(t.garbage.c.location.in_([place for place, _, _ in places]))
    named = {*conn.execute(known).scalars(), *conn.execute(waiting).scalars()}
    strange = [found for found in places if found[0] not in named]
    for location, size, digest in strange:
        # Nobody hashed these bytes here: not served until verify or rebuild did, and replaced by whoever publishes the digest.
        row = {"digest": digest, "size": size, "location": location, "state": "unverified", "lease_until": until, "gc_after": until}
        if conn.execute(ignore_duplicates(conn, t.blob).values(row)).rowcount != 1:
            held = conn.execute(select(t.blob.c.location).where(t.blob.c.digest == digest).with_for_update()).scalar_one_or_none()
            if held is not None and held != location:
                add_garbage(conn, location, size, until)  # the same bytes a second time
    return len(strange)


def due_garbage(conn: Connection, now: float, limit: int = BATCH) -> list[tuple[str, int]]:
    """Locations whose bytes may go now, with sizes. One that a blob names after all loses its row instead and is not among them."""
    g = t.garbage.c
    again = select(t.blob.c.digest).where(t.blob.c.digest == g.digest, t.blob.c.location == g.location).exists()
    conn.execute(delete(t.garbage).where(g.delete_after <= now, g.digest != "", again))
    found = select(g.location, g.size).where(g.delete_after <= now).order_by(g.delete_after, g.location).limit(limit)
    return [(row.location, row.size) for row in conn.execute(found)]


def forget_garbage(conn: Connection, locations: Sequence[str]) -> None:
    """Removes the rows of locations whose bytes are gone: from now on they may be used again."""
    for part in _parts(locations):
        conn.execute(delete(t.garbage).where(t.garbage.c.location.in_(part)))


def postpone(conn: Connection, locations: Sequence[str], until: float) -> None:
    """Leaves locations whose bytes could not be removed to a later run."""
    if locations:
        conn.execute(update(t.garbage).where(t.garbage.c.location.in_(locations)).values(delete_after=until))
