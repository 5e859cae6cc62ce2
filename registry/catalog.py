"""Names, manifests, files and links in SQL: one statement a read; the writes, functions over a connection, are registry/links.py's.

It decides nothing about who may see what, writes no audit row and touches no bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any, TypeVar

from sqlalchemy import Connection as Connection
from sqlalchemy import Engine, Select, and_, bindparam, case, cast, func, or_, select

from artifact.grant import model_of
from artifact.manifest import is_digest
from artifact.store import Descriptor, File
from registry import tables as t
from registry.links import IMAGE_CONFIGS as IMAGE_CONFIGS
from registry.links import Rule as Rule
from registry.links import add_alias as add_alias
from registry.links import add_blob as add_blob
from registry.links import add_fact as add_fact
from registry.links import add_garbage as add_garbage
from registry.links import add_manifest as add_manifest
from registry.links import add_upload as add_upload
from registry.links import advance_upload as advance_upload
from registry.links import blob_location as blob_location
from registry.links import blob_locations as blob_locations
from registry.links import check_quota as check_quota
from registry.links import check_staging as check_staging
from registry.links import chunks as chunks
from registry.links import claim_upload as claim_upload
from registry.links import delete_ref as delete_ref
from registry.links import drop_upload as drop_upload
from registry.links import edges_of as edges_of
from registry.links import ensure_org as ensure_org
from registry.links import ensure_repository as ensure_repository
from registry.links import ignore_duplicates as ignore_duplicates
from registry.links import in_garbage as in_garbage
from registry.links import kind_of as kind_of
from registry.links import link_blob as link_blob
from registry.links import org_exists as org_exists
from registry.links import owning_org as owning_org
from registry.links import promise_upload as promise_upload
from registry.links import refresh_lease as refresh_lease
from registry.links import replace_duplicates as replace_duplicates
from registry.links import set_ref as set_ref
from registry.links import unlink_blob as unlink_blob
from registry.links import unlink_manifest as unlink_manifest
from registry.statements import (
    BY_DIGEST,
    BY_REF,
    COLUMNS,
    FILE_BY_DIGEST,
    FILE_BY_REF,
    HAS_POLICY,
    MODEL,
    OBJECT,
    OBJECT_BY_ALIAS,
    REPOSITORY,
    M,
    O,
    P,
    R,
    V,
    as_file,
    as_located,
    as_object,
    as_repo,
)
from registry.statements import Located as Located
from registry.statements import Repo as Repo
from registry.statements import UploadRow as UploadRow

T = TypeVar("T")


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

    def change(self, work: Callable[[Connection], T]) -> T:
        """What `work` returns in one write transaction, run again where the database ended it for another's sake."""
        return t.retried(self.engine, work)

    def _one(self, statement: Select[Any], **values: object) -> Any:
        if not all(storable(value) for value in values.values()):
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
        own = digest.startswith("sha256:")
        row = self._one(OBJECT if own else OBJECT_BY_ALIAS, name=name, model=model_of(name), digest=digest)
        return as_object(row) if row else None

    def file(self, name: str, ref: str, path: str) -> Located | None:
        """One file of a revision; `file` is None where the revision has none of that path."""
        row = self._one(FILE_BY_DIGEST if is_digest(ref) else FILE_BY_REF, name=name, model=model_of(name), ref=ref, path=path)
        return as_file(row) if row else None

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
        source = R.outerjoin(P, P.c.name == MODEL).outerjoin(O, O.c.id == case((HAS_POLICY, P.c.org_id), else_=R.c.org_id))
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

    def ref(self, repo_id: int, name: str) -> tuple[str, str]:
        """The digest and the kind of a ref itself, without what `main` or a commit may mean beside it; empty where there is none."""
        found = select(M.c.digest, t.ref.c.kind).join(M, M.c.id == t.ref.c.manifest_id).where(t.ref.c.repo_id == repo_id)
        row = self._one(found.where(t.ref.c.name == bindparam("ref")), ref=name)
        return (row.digest, row.kind) if row else ("", "")

    def branches(self, repo_id: int, limit: int) -> list[tuple[str, str, str]]:
        """Name, kind and commit of each ref that names a model revision, in byte order."""
        r = t.ref.c
        found = select(r.name, r.kind, V.c.commit).join(V, and_(V.c.repo_id == r.repo_id, V.c.manifest_id == r.manifest_id))
        with self.reading() as conn:
            rows = conn.execute(found.where(r.repo_id == repo_id).order_by(r.name, V.c.commit).limit(limit)).all()
        return [(row.name, row.kind, row.commit) for row in rows]

    def commits(self, repo_id: int, limit: int) -> list[tuple[str, str, str, float]]:
        """Commit, parent, title and time of the newest revisions."""
        found = select(V.c.commit, V.c.parent, V.c.title, V.c.at).where(V.c.repo_id == repo_id).order_by(V.c.at.desc()).limit(limit)
        with self.reading() as conn:
            return [(row.commit, row.parent, row.title, row.at) for row in conn.execute(found)]

    def details(self, repo_id: int, limit: int = 1000, *, dated: bool = False) -> list[dict[str, object]]:
        """Each ref with its manifest's digest, type, size, and the number and bytes of its files; `dated` also when it was set, as `at`."""
        files, size = func.count(t.file.c.path), cast(func.coalesce(func.sum(t.file.c.size), 0), t.Id)  # PostgreSQL sums to numeric
        source = t.ref.join(M, M.c.id == t.ref.c.manifest_id).outerjoin(t.file, t.file.c.manifest_id == M.c.id)
        source = source.outerjoin(V, and_(V.c.repo_id == t.ref.c.repo_id, V.c.manifest_id == M.c.id))
        columns = (t.ref.c.name, M.c.digest, M.c.media_type, M.c.artifact_type, M.c.size, *((t.ref.c.at,) if dated else ()))
        found = select(*columns, func.max(V.c.commit).label("commit"), files.label("files"), size.label("bytes")).select_from(source)
        found = found.where(t.ref.c.repo_id == repo_id).group_by(*columns).order_by(t.ref.c.name).limit(limit)
        with self.reading() as conn:
            rows = conn.execute(found).mappings().all()
        return [{("ref" if k == "name" else k): (v if v is not None else "") for k, v in row.items()} for row in rows]

    def referrers(self, repo_id: int, digest: str, kind: str, after: str, limit: int) -> list[tuple[str, int]]:
        """Digests and sizes of the repository's manifests whose subject is `digest`, in byte order, from behind `after`."""
        link = t.repo_manifest
        found = select(M.c.digest, M.c.size).join(link, link.c.manifest_id == M.c.id)
        found = found.where(link.c.repo_id == repo_id, M.c.subject == digest, M.c.digest > after)
        if kind:
            found = found.where(M.c.artifact_type == kind)
        with self.reading() as conn:
            return [(row.digest, row.size) for row in conn.execute(found.order_by(M.c.digest).limit(limit))]

    def subjects(self, repo_id: int, kinds: Iterable[str]) -> set[str]:
        """The digests that a manifest of one of these artifact types has as its subject in this repository."""
        link = t.repo_manifest
        found = select(M.c.subject).join(link, link.c.manifest_id == M.c.id).where(link.c.repo_id == repo_id, M.c.artifact_type.in_(list(kinds)))
        with self.reading() as conn:
            return {digest for digest in conn.execute(found).scalars() if digest}

    def manifests(self, digests: Iterable[str]) -> list[tuple[Descriptor, bytes]]:
        """These manifests with their bytes, in byte order of their digests."""
        found = select(M.c.digest, M.c.media_type, M.c.artifact_type, M.c.size, M.c.raw).where(M.c.digest.in_(list(digests)))
        with self.reading() as conn:
            rows = conn.execute(found.order_by(M.c.digest)).all()
        return [(Descriptor(r.media_type, r.digest, r.size, r.artifact_type), bytes(r.raw)) for r in rows]

    def unknown_facts(self, digests: Iterable[str]) -> list[tuple[str, str]]:
        """Blobs among `digests` whose git object id is not known yet, with their locations."""
        out: list[tuple[str, str]] = []
        with self.reading() as conn:
            for part in chunks(sorted(set(digests))):
                known = select(t.blob_fact.c.digest).where(t.blob_fact.c.digest == t.blob.c.digest, t.blob_fact.c.git_oid != "")
                found = select(t.blob.c.digest, t.blob.c.location).where(t.blob.c.digest.in_(part), ~known.exists())
                out.extend((r.digest, r.location) for r in conn.execute(found))
        return out

    def blake3(self, digests: Iterable[str]) -> dict[str, str]:
        """The BLAKE3 of those of these blobs for which it is known."""
        f, out = t.blob_fact.c, dict[str, str]()
        with self.reading() as conn:
            for part in chunks(sorted(set(digests))):
                out |= {row.digest: row.blake3 for row in conn.execute(select(f.digest, f.blake3).where(f.digest.in_(part), f.blake3 != ""))}
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


def storable(value: object) -> bool:
    """Whether a value can be in the database at all: text with a lone surrogate or a NUL is in none, and drivers fail on it."""
    if not isinstance(value, str) or value.isascii():
        return not isinstance(value, str) or "\0" not in value
    return not any(ch == "\0" or 0xD800 <= ord(ch) <= 0xDFFF for ch in value)
