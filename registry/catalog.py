"""Names, manifests, files and links in SQL: one statement a read; writes are functions over a connection, so that callers choose the transaction.

It decides nothing about who may see what, writes no audit row and touches no bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

from sqlalchemy import Connection as Connection
from sqlalchemy import Engine, Insert, Select, Table, and_, bindparam, case, delete, func, insert, or_, select, update
from sqlalchemy.dialects import postgresql, sqlite

from artifact.errors import Conflict, Invalid, NotFound, TooLarge
from artifact.grant import PROFILES, model_of
from artifact.manifest import (
    COMMIT,
    MAX_FILES,
    MODEL_TYPE,
    PARENT,
    PROFILES_TYPE,
    SOURCE,
    TITLE,
    Manifest,
    check_name,
    check_ref,
    derived_commit,
    files_of,
    files_root,
    is_commit,
    is_digest,
    parse_manifest,
)
from artifact.store import Descriptor, File
from registry import tables as t
from registry.statements import (
    BY_DIGEST,
    BY_REF,
    COLUMNS,
    FILE_BY_DIGEST,
    FILE_BY_REF,
    HAS_POLICY,
    OBJECT,
    REPOSITORY,
    M,
    O,
    P,
    R,
    V,
    as_located,
    as_repo,
)
from registry.statements import Located as Located
from registry.statements import Repo as Repo
from registry.statements import UploadRow as UploadRow

IMAGE_CONFIGS = ("application/vnd.oci.image.config.v1+json", "application/vnd.docker.container.image.v1+json")
CHUNK = 2000
KINDS = ("", "artifact", "image", "profiles", "model")  # a repository is of the strongest kind that it holds: signatures come in any order


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


class Catalog:
    """The reads, each one statement on a connection of its own."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def reading(self) -> AbstractContextManager[Connection]:
        """A connection for reads."""
        return t.reading(self.engine)

    def writing(self) -> AbstractContextManager[Connection]:
        """One write transaction."""
        return t.writing(self.engine)

    def _one(self, statement: Select[Any], **values: object) -> Any:
        if not all(_storable(value) for value in values.values()):
            return None
        with self.reading() as conn:
            return conn.execute(statement, values).first()

    def repository(self, name: str) -> Repo | None:
        """The repository of a canonical name or alias."""
        row = self._one(REPOSITORY, name=name, model=model_of(name))
        return as_repo(row) if row else None

    def org_exists(self, name: str) -> bool:
        """Whether an organisation of that name exists."""
        with self.reading() as conn:
            return org_exists(conn, name)

    def locate(self, name: str, ref: str) -> Located | None:
        """The manifest that a ref, commit or digest names; None without the repository, digest empty without the manifest."""
        row = self._one(BY_DIGEST if is_digest(ref) else BY_REF, name=name, model=model_of(name), ref=ref)
        return as_located(row) if row else None

    def find(self, name: str, digest: str) -> Located | None:
        """The manifest (with raw bytes) or blob (with its location) of a digest that is linked into the repository."""
        row = self._one(OBJECT, name=name, model=model_of(name), digest=digest)
        if row is None:
            return None
        if row.mid is None:
            return Located(as_repo(row), digest=row.bdigest or "", size=row.bsize or 0, location=row.location or "")
        return Located(as_repo(row), row.mid, row.digest, row.media_type, row.artifact_type, row.size, row.raw)

    def file(self, name: str, ref: str, path: str) -> Located | None:
        """One file of a revision; `file` is None where the revision has none of that path."""
        row = self._one(FILE_BY_DIGEST if is_digest(ref) else FILE_BY_REF, name=name, model=model_of(name), ref=ref, path=path)
        if row is None:
            return None
        found = as_located(row)
        if row.path is None:
            return found
        file = File(row.path, row.fdigest, row.fsize, bool(row.lfs), row.git_oid or "")
        return Located(
            found.repo, found.manifest_id, found.digest, found.media_type, found.artifact_type, found.size, None, "", found.commit, found.at, file
        )

    def files(self, manifest_id: int, prefix: str, after: str, limit: int) -> list[File]:
        """Files of a manifest below a prefix, in byte order, from behind `after`."""
        f, facts = t.file, t.blob_fact
        found = select(f.c.path, f.c.digest, f.c.size, f.c.lfs, facts.c.git_oid).select_from(f.outerjoin(facts, facts.c.digest == f.c.digest))
        found = found.where(f.c.manifest_id == manifest_id, f.c.path > after)
        if prefix:
            found = found.where(f.c.path >= prefix, f.c.path < prefix + "\U0010ffff")
        with self.reading() as conn:
            rows = conn.execute(found.order_by(f.c.path).limit(limit)).all()
        return [File(r.path, r.digest, r.size, bool(r.lfs), r.git_oid or "") for r in rows]

    def repositories(self, prefix: str, after: str, limit: int, org: str) -> list[Repo]:
        """Repositories that hold a manifest and that a key of `org` might see, in byte order of their names."""
        kind = R.c.name.like("%" + PROFILES)
        policy = P.c.name == case((kind, func.substr(R.c.name, 1, func.length(R.c.name) - len(PROFILES))), else_=R.c.name)
        source = R.outerjoin(P, policy).outerjoin(O, O.c.id == case((HAS_POLICY, P.c.org_id), else_=R.c.org_id))
        found = (
            select(*COLUMNS)
            .select_from(source)
            .where(R.c.name > after, R.c.kind != "", or_(O.c.name.is_(None), O.c.name == org, R.c.visibility == "public"))
        )
        if prefix:
            found = found.where(R.c.name >= prefix, R.c.name < prefix + "\U0010ffff")
        with self.reading() as conn:
            return [as_repo(row) for row in conn.execute(found.order_by(R.c.name).limit(limit))]

    def refs(self, repo_id: int, after: str, limit: int) -> list[str]:
        """Ref names in byte order."""
        found = select(t.ref.c.name).where(t.ref.c.repo_id == repo_id, t.ref.c.name > after).order_by(t.ref.c.name).limit(limit)
        with self.reading() as conn:
            return list(conn.execute(found).scalars())

    def details(self, repo_id: int, limit: int = 1000) -> list[dict[str, object]]:
        """Each ref with its manifest's digest, type, size, and the number and bytes of its files."""
        files, size = func.count(t.file.c.path), func.coalesce(func.sum(t.file.c.size), 0)
        source = t.ref.join(M, M.c.id == t.ref.c.manifest_id).outerjoin(t.file, t.file.c.manifest_id == M.c.id)
        source = source.outerjoin(V, and_(V.c.repo_id == t.ref.c.repo_id, V.c.manifest_id == M.c.id))
        columns = (t.ref.c.name, M.c.digest, M.c.media_type, M.c.artifact_type, M.c.size, func.max(V.c.commit).label("commit"))
        found = select(*columns, files.label("files"), size.label("bytes")).select_from(source).where(t.ref.c.repo_id == repo_id)
        found = found.group_by(t.ref.c.name, M.c.digest, M.c.media_type, M.c.artifact_type, M.c.size).order_by(t.ref.c.name).limit(limit)
        with self.reading() as conn:
            rows = conn.execute(found).mappings().all()
        return [{("ref" if k == "name" else k): (v if v is not None else "") for k, v in row.items()} for row in rows]

    def referrers(self, repo_id: int, digest: str, kind: str, after: str, limit: int) -> list[tuple[str, str, str, int, bytes]]:
        """Manifests of the repository whose subject is `digest`: digest, media type, artifact type, size, raw."""
        link = t.repo_manifest
        found = select(M.c.digest, M.c.media_type, M.c.artifact_type, M.c.size, M.c.raw).join(link, link.c.manifest_id == M.c.id)
        found = found.where(link.c.repo_id == repo_id, M.c.subject == digest, M.c.digest > after)
        if kind:
            found = found.where(M.c.artifact_type == kind)
        with self.reading() as conn:
            return [tuple(row) for row in conn.execute(found.order_by(M.c.digest).limit(limit))]

    def unknown_facts(self, digests: Iterable[str]) -> list[tuple[str, str]]:
        """Blobs among `digests` whose git object id is not known yet, with their locations."""
        out: list[tuple[str, str]] = []
        with self.reading() as conn:
            for part in _chunks(sorted(set(digests))):
                known = select(t.blob_fact.c.digest).where(t.blob_fact.c.git_oid != "")
                found = select(t.blob.c.digest, t.blob.c.location).where(t.blob.c.digest.in_(part), t.blob.c.digest.not_in(known))
                out.extend((r.digest, r.location) for r in conn.execute(found))
        return out

    def expired_uploads(self, now: float, limit: int = 1000) -> list[str]:
        """Ids of uploads that nobody continued in time."""
        with self.reading() as conn:
            return list(conn.execute(select(t.upload.c.id).where(t.upload.c.expires < now).limit(limit)).scalars())

    def upload(self, upload_id: str) -> UploadRow | None:
        """A stored upload."""
        u = t.upload.c
        row = self._one(
            select(u.id, u.repo, u.key_id, u.algorithm, u.offset, u.state, u.generation).where(u.id == bindparam("upload")), upload=upload_id
        )
        return UploadRow(*row) if row else None


def _storable(value: object) -> bool:
    """Whether a value can be in the database at all: text with a lone surrogate or a NUL is in none, and drivers fail on it."""
    return not isinstance(value, str) or not any(ch == "\0" or 0xD800 <= ord(ch) <= 0xDFFF for ch in value)


def _chunks(values: Sequence[str]) -> Iterator[Sequence[str]]:
    for i in range(0, len(values), CHUNK):
        yield values[i : i + CHUNK]


def ensure_org(conn: Connection, name: str, at: float) -> int:
    """The id of an organisation, made where it is new."""
    conn.execute(ignore_duplicates(conn, t.org).values(name=name, display=name, created=at))
    return int(conn.execute(select(t.org.c.id).where(t.org.c.name == name)).scalar_one())


def org_exists(conn: Connection, name: str) -> bool:
    """Whether an organisation of that name exists."""
    return conn.execute(select(t.org.c.id).where(t.org.c.name == name)).first() is not None


def owning_org(conn: Connection, name: str, *, make_at: float | None = None) -> str:
    """The organisation that owns a name: its first segment, unless that is an origin (hf, ngc, a registry's host); made where `make_at` is given."""
    first, _, rest = name.partition("/")
    if not rest or first in ("hf", "ngc") or "." in first or first.startswith("localhost"):
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
    twin = name[3:] if name.startswith("hf/") else f"hf/{name}"
    if conn.execute(select(R.c.id).where(R.c.name == twin)).first() is not None:
        raise Conflict(f"{twin} exists, and {name} would be the same model at the Hub door", expected="another name", reason="name")
    org_id = conn.execute(select(t.org.c.id).where(t.org.c.name == org)).scalar_one_or_none() if org else None
    if org and org_id is None:
        raise Invalid(f"there is no organisation {org}", do=f"airlock key create --org {org}", reason="org")
    values = {"name": name, "display": display or name, "kind": kind, "org_id": org_id, "visibility": visibility, "created": at}
    conn.execute(insert(R).values(values))
    return int(conn.execute(select(R.c.id).where(R.c.name == name)).scalar_one())


def add_blob(conn: Connection, digest: str, size: int, location: str) -> None:
    """A blob's row; one that exists stays as it is."""
    conn.execute(ignore_duplicates(conn, t.blob).values(digest=digest, size=size, location=location))


def link_blob(conn: Connection, repo_id: int, digest: str) -> None:
    """Links a blob into a repository; the bytes are kept while a link exists."""
    conn.execute(ignore_duplicates(conn, t.repo_blob).values(repo_id=repo_id, digest=digest))
    conn.execute(update(t.blob).where(t.blob.c.digest == digest, t.blob.c.gc_after.is_not(None)).values(gc_after=None))


def add_fact(conn: Connection, digest: str, git_oid: str) -> None:
    """A blob's git object id (SHA-1 of `blob <size>\\0` and the bytes)."""
    conn.execute(replace_duplicates(conn, t.blob_fact, ("digest",), ("git_oid",)).values(digest=digest, git_oid=git_oid))


def kind_of(manifest: Manifest) -> str:
    """model, profiles, image or artifact, from the artifact type."""
    if manifest.artifact_type == MODEL_TYPE:
        return "model"
    if manifest.artifact_type == PROFILES_TYPE:
        return "profiles"
    return "image" if manifest.manifests or manifest.artifact_type in IMAGE_CONFIGS else "artifact"


def _missing_children(conn: Connection, repo_id: int, manifest: Manifest) -> list[str]:
    """Children that the repository does not hold; raises Invalid where the manifest states another size than the blob has."""
    blobs = sorted({d.digest for d in manifest.blobs()})
    sizes: dict[str, int] = {}
    children = sorted({d.digest for d in manifest.manifests})
    have: set[str] = set()
    for part in _chunks(blobs):
        held = select(t.blob.c.digest, t.blob.c.size).join(t.repo_blob, t.repo_blob.c.digest == t.blob.c.digest)
        sizes.update((row.digest, row.size) for row in conn.execute(held.where(t.repo_blob.c.repo_id == repo_id, t.repo_blob.c.digest.in_(part))))
    have.update(sizes)
    for child in manifest.blobs():
        if sizes.get(child.digest, child.size) != child.size:
            raise Invalid(
                f"the manifest states {child.size} bytes for {child.digest}", expected=f"{sizes[child.digest]}, which it has", reason="manifest"
            )
    link = t.repo_manifest
    for part in _chunks(children):
        found = select(M.c.digest).join(link, link.c.manifest_id == M.c.id).where(link.c.repo_id == repo_id, M.c.digest.in_(part))
        have.update(conn.execute(found).scalars())
    return [d for d in (*blobs, *children) if d not in have]


def add_manifest(
    conn: Connection,
    repo_id: int,
    raw: bytes | Manifest,
    media_type: str = "",
    *,
    refs: Sequence[str] = (),
    at: float = 0.0,
    ref_kind: str = "tag",
    name: str = "",
) -> Descriptor:
    """Stores a manifest with edges, files, revision and refs, its children linked; raises NotFound `manifest_blob`, Conflict, Invalid, TooLarge.

    The repository is created by ensure_repository and blobs are linked by link_blob before, in the same transaction or earlier.
    """
    manifest = parse_manifest(raw, media_type) if isinstance(raw, bytes) else raw
    missing = _missing_children(conn, repo_id, manifest)
    if missing:
        raise NotFound(
            f"the manifest refers to {missing[0]}, which {name or 'this repository'} does not hold",
            expected="every blob and child manifest pushed before",
            reason="manifest_blob",
            digest=missing[0],
            missing=len(missing),
        )
    kind = kind_of(manifest)
    files = files_of(manifest) if kind == "model" else ()
    if len(files) > MAX_FILES:
        raise TooLarge(f"the model has {len(files)} files", expected=f"at most {MAX_FILES} files")
    values = {
        "digest": manifest.digest,
        "media_type": manifest.media_type,
        "artifact_type": manifest.artifact_type,
        "subject": manifest.subject.digest if manifest.subject else None,
        "size": len(manifest.raw),
        "raw": manifest.raw,
    }
    is_new = conn.execute(ignore_duplicates(conn, M).values(values)).rowcount == 1
    manifest_id = int(conn.execute(select(M.c.id).where(M.c.digest == manifest.digest)).scalar_one())
    if is_new:
        _add_edges(conn, manifest_id, manifest)
        if files:
            conn.execute(
                insert(t.file), [{"manifest_id": manifest_id, "path": f.path, "digest": f.digest, "size": f.size, "lfs": f.lfs} for f in files]
            )
    conn.execute(ignore_duplicates(conn, t.repo_manifest).values(repo_id=repo_id, manifest_id=manifest_id))
    if kind == "model":
        _add_revision(conn, repo_id, manifest_id, manifest, files, at)
    conn.execute(update(R).where(R.c.id == repo_id, R.c.kind.in_(KINDS[: KINDS.index(kind)])).values(kind=kind))
    for name_ in refs:
        set_ref(conn, repo_id, name_, manifest_id, kind=ref_kind, at=at)
    return Descriptor(manifest.media_type, manifest.digest, len(manifest.raw), manifest.artifact_type, dict(manifest.annotations))


def _add_edges(conn: Connection, manifest_id: int, manifest: Manifest) -> None:
    stored = {d.digest for d in manifest.blobs()}
    edges: dict[tuple[str, str], str | None] = {}
    if manifest.config:
        edges[manifest.config.digest, "config"] = manifest.config.digest
    for layer in manifest.layers:
        edges[layer.digest, "layer"] = layer.digest if layer.digest in stored else None
    for child in manifest.manifests:
        edges[child.digest, "manifest"] = None
    if manifest.subject:
        edges[manifest.subject.digest, "subject"] = None
    rows = [{"parent_id": manifest_id, "child_digest": digest, "kind": kind, "blob": blob} for (digest, kind), blob in sorted(edges.items())]
    if rows:
        conn.execute(insert(t.edge), rows)


def _add_revision(conn: Connection, repo_id: int, manifest_id: int, manifest: Manifest, files: Sequence[File], at: float) -> None:
    notes: Mapping[str, str] = manifest.annotations
    parent = notes.get(PARENT, "")
    commit = notes.get(COMMIT, "")
    if not is_commit(commit):
        commit = derived_commit(parent, files_root(files), "", "")
    values = {
        "repo_id": repo_id,
        "commit": commit,
        "manifest_id": manifest_id,
        "parent": parent,
        "title": notes.get(TITLE, notes.get(SOURCE, "")),
        "at": at,
    }
    # Without a time (an older bundle) the revision comes in as the oldest and an existing one stays: `main` never goes back.
    write = replace_duplicates(conn, V, ("repo_id", "commit"), ("manifest_id", "at")) if at else ignore_duplicates(conn, V)
    conn.execute(write.values(values))


def set_ref(conn: Connection, repo_id: int, name: str, manifest_id: int, *, kind: str = "tag", at: float = 0.0) -> None:
    """Moves a ref to a manifest; raises Invalid, and Conflict where the repository is immutable and the ref points elsewhere."""
    check_ref(name)
    if is_digest(name):
        raise Invalid(f"{name} is a digest, not a ref name", expected="a tag or branch name", reason="ref")
    old = conn.execute(
        select(t.ref.c.manifest_id, R.c.immutable).join(R, R.c.id == t.ref.c.repo_id).where(R.c.id == repo_id, t.ref.c.name == name)
    ).first()
    if old and old.immutable and old.manifest_id != manifest_id:
        raise Conflict(f"the ref {name} is immutable here", do="push under another version", reason="immutable")
    values = {"repo_id": repo_id, "name": name, "kind": kind, "manifest_id": manifest_id, "at": at}
    conn.execute(replace_duplicates(conn, t.ref, ("repo_id", "name"), ("manifest_id", "kind", "at")).values(values))


def delete_ref(conn: Connection, repo_id: int, name: str) -> bool:
    """Removes a ref; False where there is none."""
    return conn.execute(delete(t.ref).where(t.ref.c.repo_id == repo_id, t.ref.c.name == name)).rowcount > 0


def unlink_manifest(conn: Connection, repo_id: int, digest: str, at: float) -> bool:
    """Takes a manifest out of a repository with its refs and revisions; its blobs become candidates of the sweep; False where it is not there."""
    manifest_id = conn.execute(select(M.c.id).where(M.c.digest == digest)).scalar_one_or_none()
    link = t.repo_manifest
    if manifest_id is None or not conn.execute(delete(link).where(link.c.repo_id == repo_id, link.c.manifest_id == manifest_id)).rowcount:
        return False
    for table in (t.ref, V):
        conn.execute(delete(table).where(table.c.repo_id == repo_id, table.c.manifest_id == manifest_id))
    children = select(t.edge.c.blob).where(t.edge.c.parent_id == manifest_id, t.edge.c.blob.is_not(None))
    conn.execute(update(t.blob).where(t.blob.c.digest.in_(children)).values(gc_after=at))
    return True


def unlink_blob(conn: Connection, repo_id: int, digest: str, at: float) -> bool:
    """Takes a blob out of a repository; False where it is not there; raises Conflict while a manifest of the repository needs it."""
    link = t.repo_manifest
    used = (
        select(t.edge.c.parent_id)
        .join(link, link.c.manifest_id == t.edge.c.parent_id)
        .where(link.c.repo_id == repo_id, t.edge.c.blob == digest)
        .limit(1)
    )
    if conn.execute(used).first() is not None:
        raise Conflict(f"a manifest of this repository refers to {digest}", do="delete the manifest first", reason="in_use")
    if not conn.execute(delete(t.repo_blob).where(t.repo_blob.c.repo_id == repo_id, t.repo_blob.c.digest == digest)).rowcount:
        return False
    conn.execute(update(t.blob).where(t.blob.c.digest == digest).values(gc_after=at))
    return True


def add_upload(conn: Connection, row: UploadRow, *, digest: str, size: int | None, at: float, ttl_s: float) -> None:
    """The row of a new upload."""
    values = {"id": row.id, "repo": row.repo, "key_id": row.key_id, "algorithm": row.algorithm, "digest": digest, "size": size, "state": b""}
    conn.execute(insert(t.upload).values(**values, created=at, expires=at + ttl_s))


def advance_upload(conn: Connection, row: UploadRow, offset: int, state: bytes, expires: float) -> bool:
    """Stores that bytes [0, offset) are durable; False where another request advanced the upload since `row` was read."""
    u = t.upload
    moved = update(u).where(u.c.id == row.id, u.c.generation == row.generation, u.c.offset == row.offset)
    return conn.execute(moved.values(offset=offset, state=state, generation=row.generation + 1, expires=expires)).rowcount == 1


def drop_upload(conn: Connection, upload_id: str) -> None:
    """Forgets an upload's row."""
    conn.execute(delete(t.upload).where(t.upload.c.id == upload_id))
