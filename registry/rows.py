"""Rows of organisations, repositories, blobs, garbage and uploads: their changes, as functions over a connection.

Below registry/links.py, which ties manifests and refs to them: callers choose the transaction. It moves no bytes and judges no right.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from sqlalchemy import Connection, Insert, Table, and_, case, delete, func, insert, or_, select, update
from sqlalchemy.dialects import postgresql, sqlite

from artifact.errors import Conflict, Denied, Invalid, NotFound
from artifact.manifest import check_name
from registry import tables as t
from registry.database import alone
from registry.statements import R, UploadRow

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


def _owner(name: str) -> str:
    """The organisation that a name's first segment says; none where that is an origin (hf, ngc, a registry's host)."""
    first, _, rest = name.partition("/")
    return "" if not rest or first in ("hf", "ngc") or "." in first or first.startswith("localhost") else first


def owning_org(conn: Connection, name: str, *, make_at: float | None = None) -> str:
    """The organisation that owns a name: its first segment, unless that is an origin; made where `make_at` is given."""
    first = _owner(name)
    if not first:
        return ""
    if make_at is not None:
        conn.execute(ignore_duplicates(conn, t.org).values(name=first, created=make_at))
    return first if org_exists(conn, first) else ""


def ensure_repository(
    conn: Connection, name: str, *, display: str = "", kind: str = "", org: str = "", visibility: str = "org", at: float = 0.0
) -> int:
    """The id of a repository, made with these values where it is new; raises Invalid, and Conflict where `hf/<name>` and `<name>` would both be."""
    found = conn.execute(select(R.c.id).where(R.c.name == check_name(name))).scalar_one_or_none()
    if found is not None:
        return int(found)
    alone(conn, "repository", name.removeprefix("hf/"))
    twin = name[3:] if name.startswith("hf/") else f"hf/{name}"
    if conn.execute(select(R.c.id).where(R.c.name == twin)).first() is not None:
        raise Conflict(f"{twin} exists, and {name} would be the same model at the Hub door", expected="another name", reason="name")
    org_id = conn.execute(select(t.org.c.id).where(t.org.c.name == org)).scalar_one_or_none() if org else None
    if org and org_id is None:
        raise Invalid(f"there is no organisation {org}", do=f"airlock key create --org {org}", reason="org")
    values = {"name": name, "display": display or name, "kind": kind, "org_id": org_id, "visibility": visibility, "created": at}
    conn.execute(ignore_duplicates(conn, R).values(values))  # another push may make it in this moment
    return int(conn.execute(select(R.c.id).where(R.c.name == name)).scalar_one())


def check_quota(conn: Connection, repo: str, digest: str, size: int) -> None:
    """Raises Denied `quota` where the blob would bring the repository's organisation above its bound; the organisation's row stays locked."""
    own = select(R.c.org_id).where(R.c.name == repo).scalar_subquery()
    named = and_(t.org.c.name == _owner(repo), ~select(R.c.id).where(R.c.name == repo).exists())
    org = conn.execute(
        select(t.org.c.id, t.org.c.name, t.org.c.quota_bytes).where(t.org.c.quota_bytes > 0, or_(t.org.c.id == own, named)).with_for_update()
    ).first()
    if org is None:
        return
    link = t.repo_blob
    held = select(link.c.digest).join(R, R.c.id == link.c.repo_id).where(R.c.org_id == org.id)
    if digest and conn.execute(held.where(link.c.digest == digest).limit(1)).first() is not None:
        return
    used = conn.execute(select(func.coalesce(func.sum(t.blob.c.size), 0)).where(t.blob.c.digest.in_(held))).scalar_one()
    if int(used) + size > org.quota_bytes:
        raise Denied(
            f"organisation {org.name} has {int(used)} bytes of {org.quota_bytes} allowed, and {size} more are asked for",
            expected=f"at most {org.quota_bytes} bytes",
            do="delete what is not needed, or ask the administrator for a larger quota",
            reason="quota",
        )


# ---- blobs: rows, links, leases


def add_blob(conn: Connection, digest: str, size: int, location: str, *, lease_until: float = 0.0) -> str:
    """The location of a blob's bytes: that of its row, which is locked and leased, else the one given, in a new row."""
    dialect = postgresql if conn.dialect.name == "postgresql" else sqlite
    b = t.blob.c
    made = dialect.insert(t.blob).values(digest=digest, size=size, location=location, lease_until=lease_until, gc_after=lease_until)
    until = _later(b.lease_until, made.excluded.lease_until)
    # Bytes that are missing or damaged (registry/scrub.py, registry/rebuild.py) are replaced by these.
    place = case((b.state == "ready", b.location), else_=made.excluded.location)
    merged = made.on_conflict_do_update(
        index_elements=["digest"], set_={"lease_until": until, "gc_after": until, "location": place, "state": "ready"}
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


# ---- uploads


def add_upload(conn: Connection, row: UploadRow, *, digest: str, size: int | None, at: float, ttl_s: float) -> None:
    """The row of a new upload."""
    values = {"id": row.id, "repo": row.repo, "key_id": row.key_id, "algorithm": row.algorithm, "digest": digest, "size": size, "state": b""}
    conn.execute(insert(t.upload).values(**values, created=at, expires=at + ttl_s))


def advance_upload(conn: Connection, row: UploadRow, offset: int, state: bytes, expires: float) -> bool:
    """Stores that bytes [0, offset) are durable; False where another request advanced the upload since `row` was read."""
    u = t.upload
    moved = update(u).where(u.c.id == row.id, u.c.generation == row.generation, u.c.offset == row.offset)
    return conn.execute(moved.values(offset=offset, state=state, generation=row.generation + 1, expires=expires)).rowcount == 1


def claim_upload(conn: Connection, row: UploadRow, expires: float) -> bool:
    """Takes an upload over by its generation; False where another request was faster than since `row` was read."""
    u = t.upload
    mine = update(u).where(u.c.id == row.id, u.c.generation == row.generation, u.c.offset == row.offset)
    return conn.execute(mine.values(generation=row.generation + 1, expires=expires)).rowcount == 1


def drop_upload(conn: Connection, upload_id: str, *, expired: float | None = None) -> bool:
    """Forgets an upload's row, with `expired` only while it still is at that time; False where there was none."""
    gone = delete(t.upload).where(t.upload.c.id == upload_id)
    return conn.execute(gone if expired is None else gone.where(t.upload.c.expires < expired)).rowcount == 1
