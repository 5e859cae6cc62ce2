"""Rows of organisations, repositories, blobs, garbage and uploads: their changes, as functions over a connection.

Below registry/links.py, which ties manifests and refs to them: callers choose the transaction. It moves no bytes and judges no right.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from sqlalchemy import Connection, Insert, Row, Select, Table, and_, case, delete, func, or_, select, update
from sqlalchemy.dialects import postgresql, sqlite

from artifact.errors import Conflict, Denied, Invalid, NotFound
from artifact.manifest import check_name
from registry import tables as t
from registry.database import alone
from registry.statements import M, R, UploadRow

CHUNK = 2000


def ignore_duplicates(conn: Connection, table: Table) -> Insert:
    """An INSERT of which rows that exist are left as they are, in the connection's dialect."""
    dialect = postgresql if conn.dialect.name == "postgresql" else sqlite
    statement: Insert = dialect.insert(table).on_conflict_do_nothing()
    return statement


def replace_duplicates(conn: Connection, table: Table, keys: Sequence[str], columns: Sequence[str]) -> Insert:
    """An INSERT that overwrites `columns` of a row with the same `keys`."""
    dialect = postgresql if conn.dialect.name == "postgresql" else sqlite
    statement = dialect.insert(table)
    merged: Insert = statement.on_conflict_do_update(index_elements=list(keys), set_={c: statement.excluded[c] for c in columns})
    return merged


def chunks(values: Sequence[str]) -> Iterator[Sequence[str]]:
    """The values in parts that fit into one statement."""
    for i in range(0, len(values), CHUNK):
        yield values[i : i + CHUNK]


def _later(column: Any, other: Any) -> Any:
    """The greater of the two: the databases name that function differently."""
    return case((column > other, column), else_=other)


# ---- organisations and repositories


def ensure_org(conn: Connection, name: str, at: float) -> int:
    """The id of an organisation, made where it is new."""
    conn.execute(ignore_duplicates(conn, t.org).values(name=name, display=name, created=at))
    return int(conn.execute(select(t.org.c.id).where(t.org.c.name == name)).scalar_one())


def org_exists(conn: Connection, name: str) -> bool:
    """Whether an organisation of that name exists."""
    return conn.execute(select(t.org.c.id).where(t.org.c.name == name)).first() is not None


def owner_of(name: str) -> str:
    """The organisation that a name's first segment says; none where that is an origin (hf, ngc, a registry's host)."""
    first, _, rest = name.partition("/")
    return "" if not rest or first in ("hf", "ngc") or "." in first or first.startswith("localhost") else first


def owning_org(conn: Connection, name: str, *, make_at: float | None = None) -> str:
    """The organisation that owns a name: its first segment, unless that is an origin; made where `make_at` is given."""
    first = owner_of(name)
    if not first:
        return ""
    if make_at is not None:
        conn.execute(ignore_duplicates(conn, t.org).values(name=first, created=make_at))
    return first if org_exists(conn, first) else ""


def ensure_repository(
    conn: Connection, name: str, *, display: str = "", kind: str = "", org: str = "", visibility: str = "org", at: float = 0.0
) -> int:
    """The id of a repository, made with these values where it is new; raises Invalid, and Conflict where two names would be one model at a door."""
    found = conn.execute(select(R.c.id).where(R.c.name == check_name(name))).scalar_one_or_none()
    if found is not None:
        return int(found)
    alone(conn, "repository", re.sub(r"^(?:hf/|ngc/)+", "", name))
    twins = [name.removeprefix(origin) if name.startswith(origin) else origin + name for origin in ("hf/", "ngc/")]
    twin = conn.execute(select(R.c.name).where(R.c.name.in_(twins)).limit(1)).scalar_one_or_none()
    if twin is not None:
        raise Conflict(f"{twin} exists, and {name} would be the same model at another door", expected="another name", reason="name")
    org_id = conn.execute(select(t.org.c.id).where(t.org.c.name == org)).scalar_one_or_none() if org else None
    if org and org_id is None:
        raise Invalid(f"there is no organisation {org}", do=f"airlock key create --org {org}", reason="org")
    values = {"name": name, "display": display or name, "kind": kind, "org_id": org_id, "visibility": visibility, "created": at}
    conn.execute(ignore_duplicates(conn, R).values(values))  # another push may make it in this moment
    return int(conn.execute(select(R.c.id).where(R.c.name == name)).scalar_one())


def used_by(conn: Connection, org_id: int, org: str, upload: str = "") -> int:
    """Bytes of an organisation: its blobs and manifests, each once, and what its unfinished uploads staged, but for one."""
    link = t.repo_manifest
    manifests = select(link.c.manifest_id).join(R, R.c.id == link.c.repo_id).where(R.c.org_id == org_id)
    blobs = conn.execute(select(func.sum(t.blob.c.size)).where(t.blob.c.digest.in_(_held_by(org_id)))).scalar_one()
    texts = conn.execute(select(func.sum(M.c.size)).where(M.c.id.in_(manifests))).scalar_one()
    return int(blobs or 0) + int(texts or 0) + _staged_by(conn, org_id, org, upload)


def _held_by(org_id: int) -> Select[tuple[str]]:
    return select(t.repo_blob.c.digest).join(R, R.c.id == t.repo_blob.c.repo_id).where(R.c.org_id == org_id)


def _staged_by(conn: Connection, org_id: int, org: str, upload: str) -> int:
    """Bytes that the unfinished uploads of an organisation staged or were promised, but for one."""
    u = t.upload.c
    own = or_(u.repo.in_(select(R.c.name).where(R.c.org_id == org_id)), and_(u.repo.startswith(org + "/", autoescape=True), _unmade(u.repo)))
    staged = select(func.sum(_later(u.offset, func.coalesce(u.size, 0)))).where(own, u.id != upload)
    return int(conn.execute(staged).scalar_one() or 0)


def _unmade(name: Any) -> Any:
    return ~select(R.c.id).where(R.c.name == name).exists()


def _bounded(conn: Connection, repo: str) -> Row[Any, Any, Any] | None:
    """The organisation of a repository, or of one that its first push would make, where it has a bound; its row stays locked."""
    org, own = t.org.c, select(R.c.org_id).where(R.c.name == repo).scalar_subquery()
    named = and_(org.name == owner_of(repo), _unmade(repo))
    found = select(org.id, org.name, org.quota_bytes).where(org.quota_bytes > 0, or_(org.id == own, named))
    return conn.execute(found.with_for_update()).first()


def _over(org: Row[Any, Any, Any], used: int, what: str, size: int) -> Denied:
    return Denied(
        f"organisation {org.name} has {used} bytes {what}of {org.quota_bytes} allowed, and {size} more are asked for",
        expected=f"at most {org.quota_bytes} bytes",
        do="delete what is not needed, or ask the administrator for a larger quota",
        reason="quota",
    )


def check_quota(conn: Connection, repo: str, digest: str, size: int, *, upload: str = "") -> None:
    """Raises Denied `quota` where these bytes would bring the repository's organisation above its bound; the organisation's row stays locked.

    A blob or manifest that the organisation holds already costs nothing; what `upload` staged is what the size stands for.
    """
    org = _bounded(conn, repo)
    if org is None or (digest and _has(conn, org.id, digest)):
        return
    used = used_by(conn, org.id, org.name, upload)
    if used + size > org.quota_bytes:
        raise _over(org, used, "", size)


def check_staging(conn: Connection, repo: str, upload: str, size: int) -> int | None:
    """How many bytes this upload may have while its organisation's unfinished ones stay within the bound; None where there is none.

    What is held is not added before the upload's end: only then is it known whether it brings anything new. Raises Denied `quota`.
    """
    org = _bounded(conn, repo)
    if org is None:
        return None
    staged = _staged_by(conn, org.id, org.name, upload)
    if staged + size > org.quota_bytes:
        raise _over(org, staged, "in unfinished uploads ", size)
    return int(org.quota_bytes) - staged


def _has(conn: Connection, org_id: int, digest: str) -> bool:
    """Whether a repository of the organisation holds this blob or manifest."""
    link = t.repo_manifest
    manifest = select(M.c.id).join(link, link.c.manifest_id == M.c.id).join(R, R.c.id == link.c.repo_id)
    found = (_held_by(org_id).where(t.repo_blob.c.digest == digest), manifest.where(R.c.org_id == org_id, M.c.digest == digest))
    return any(conn.execute(part.limit(1)).first() is not None for part in found)


# ---- blobs: rows, links, leases


def add_blob(conn: Connection, digest: str, size: int, location: str, *, lease_until: float = 0.0, dead: str = "") -> str:
    """The location of a blob's bytes: that of its row, which is locked and leased, else the one given, in a new row or for a location `dead`."""
    dialect = postgresql if conn.dialect.name == "postgresql" else sqlite
    b = t.blob.c
    made = dialect.insert(t.blob).values(digest=digest, size=size, location=location, lease_until=lease_until, gc_after=lease_until)
    until = _later(b.lease_until, made.excluded.lease_until)
    # Bytes that are missing or damaged (registry/scrub.py, registry/rebuild.py; `dead`: just found so) are replaced by these.
    whole = and_(b.state == "ready", b.location != dead)
    place, length = case((whole, b.location), else_=made.excluded.location), case((whole, b.size), else_=made.excluded.size)
    merged = made.on_conflict_do_update(
        index_elements=["digest"], set_={"lease_until": until, "gc_after": until, "location": place, "size": length, "state": "ready"}
    )
    return str(conn.execute(merged.returning(b.location)).scalar_one())


def link_blob(conn: Connection, repo_id: int, digest: str, *, lease_until: float = 0.0) -> None:
    """Links a blob into a repository: kept while a manifest names it and until the lease is over; raises NotFound `blob` without its row."""
    b, dialect = t.blob.c, postgresql if conn.dialect.name == "postgresql" else sqlite
    until = _later(b.lease_until, lease_until)
    if not conn.execute(update(t.blob).where(b.digest == digest).values(lease_until=until, gc_after=until)).rowcount:
        raise NotFound(f"there is no blob {digest}", reason="blob")
    made = dialect.insert(t.repo_blob).values(repo_id=repo_id, digest=digest, lease_until=lease_until)
    kept = _later(t.repo_blob.c.lease_until, made.excluded.lease_until)
    conn.execute(made.on_conflict_do_update(index_elements=["repo_id", "digest"], set_={"lease_until": kept}))
    # A layer that need not be pushed may come after the manifest that names it: from now on it is kept like any other.
    e, link = t.edge.c, t.repo_manifest.c
    aliases = conn.execute(select(t.blob_alias.c.digest).where(t.blob_alias.c.blob == digest)).scalars().all()
    here = select(link.manifest_id).where(link.repo_id == repo_id, link.manifest_id == e.parent_id).exists()
    late = update(t.edge).where(e.child_digest.in_([digest, *aliases]), e.kind.in_(("config", "layer")), e.blob.is_(None), here)
    conn.execute(late.values(blob=digest))


def refresh_lease(conn: Connection, repo_id: int, digest: str, lease_until: float) -> bool:
    """Leases a linked blob again; False where the sweep took it."""
    b, link = t.blob.c, t.repo_blob.c
    until = _later(b.lease_until, lease_until)
    if not conn.execute(update(t.blob).where(b.digest == digest).values(lease_until=until, gc_after=until)).rowcount:
        return False
    held = update(t.repo_blob).where(link.repo_id == repo_id, link.digest == digest)
    return conn.execute(held.values(lease_until=_later(link.lease_until, lease_until))).rowcount == 1


def add_alias(conn: Connection, digest: str, blob: str) -> None:
    """Makes a blob known by the digest of another algorithm too."""
    conn.execute(ignore_duplicates(conn, t.blob_alias).values(algorithm=digest.partition(":")[0], digest=digest, blob=blob))


def in_garbage(conn: Connection, locations: Sequence[str]) -> set[str]:
    """Those of the locations whose bytes wait for their removal."""
    return set(conn.execute(select(t.garbage.c.location).where(t.garbage.c.location.in_(list(locations)))).scalars())


def add_garbage(conn: Connection, location: str, size: int, delete_after: float) -> None:
    """Leaves bytes that no row names to the sweep."""
    conn.execute(ignore_duplicates(conn, t.garbage).values(location=location, size=size, delete_after=delete_after))


def blob_locations(conn: Connection, digests: Sequence[str]) -> dict[str, str]:
    """Where the bytes of these blobs lie; without those that have no row, and those that are missing or damaged."""
    b, out = t.blob.c, dict[str, str]()
    for part in chunks(digests):
        rows = conn.execute(select(b.digest, b.location).where(b.digest.in_(part), b.state == "ready"))
        out |= {row.digest: str(row.location) for row in rows}
    return out


def blob_location(conn: Connection, digest: str) -> str:
    """Where a blob's bytes lie; empty without its row, or where they are missing or damaged."""
    found = select(t.blob.c.location).where(t.blob.c.digest == digest, t.blob.c.state == "ready")
    return str(conn.execute(found).scalar_one_or_none() or "")


def add_fact(conn: Connection, digest: str, git_oid: str) -> None:
    """A blob's git object id (SHA-1 of `blob <size>\\0` and the bytes)."""
    conn.execute(replace_duplicates(conn, t.blob_fact, ("digest",), ("git_oid",)).values(digest=digest, git_oid=git_oid))


def add_blake3(conn: Connection, digest: str, value: str) -> None:
    """A blob's BLAKE3 (256 bits, hexadecimal)."""
    conn.execute(replace_duplicates(conn, t.blob_fact, ("digest",), ("blake3",)).values(digest=digest, blake3=value))


# ---- uploads


def add_upload(conn: Connection, row: UploadRow, *, digest: str, size: int | None, at: float, ttl_s: float) -> None:
    """The row of a new upload; one of that id stays as it is."""
    values = {"id": row.id, "repo": row.repo, "key_id": row.key_id, "algorithm": row.algorithm, "digest": digest, "size": size, "state": b""}
    conn.execute(ignore_duplicates(conn, t.upload).values(**values, created=at, expires=at + ttl_s))


def advance_upload(conn: Connection, row: UploadRow, offset: int, state: bytes, expires: float) -> bool:
    """Stores that bytes [0, offset) are durable; False where another request advanced the upload since `row` was read."""
    u = t.upload
    moved = update(u).where(u.c.id == row.id, u.c.generation == row.generation, u.c.offset == row.offset)
    return conn.execute(moved.values(offset=offset, size=None, state=state, generation=row.generation + 1, expires=expires)).rowcount == 1


def promise_upload(conn: Connection, upload_id: str, size: int) -> None:
    """Notes how long an upload will be, as far as is known: its organisation's quota counts that."""
    conn.execute(update(t.upload).where(t.upload.c.id == upload_id).values(size=size))


def claim_upload(conn: Connection, row: UploadRow, expires: float) -> bool:
    """Takes an upload over by its generation; False where another request was faster than since `row` was read."""
    u = t.upload
    mine = update(u).where(u.c.id == row.id, u.c.generation == row.generation, u.c.offset == row.offset)
    return conn.execute(mine.values(generation=row.generation + 1, expires=expires)).rowcount == 1


def drop_upload(conn: Connection, upload_id: str, *, expired: float | None = None) -> bool:
    """Forgets an upload's row, with `expired` only while it still is at that time; False where there was none."""
    gone = delete(t.upload).where(t.upload.c.id == upload_id)
    return conn.execute(gone if expired is None else gone.where(t.upload.c.expires < expired)).rowcount == 1
