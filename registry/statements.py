"""The rows that reads give, and the select statements that find them in one round trip; executed by registry/catalog.py only.

They decide nothing and change nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from sqlalchemy import Select, and_, bindparam, case, func, literal, select

from artifact.grant import PROFILES, Subject
from artifact.store import Descriptor, File
from registry import tables as t

R, P, O, M, V = t.repository, t.repository.alias("policy"), t.org, t.manifest, t.revision  # noqa: E741 - the letters that the statements below use


@dataclass(frozen=True)
class Repo:
    """A repository's row with the policy that decides about it: its own, or its model's for `<name>/profiles`."""

    id: int
    name: str
    display: str
    kind: str
    subject: Subject
    gated: bool = False
    immutable: bool = False


@dataclass(frozen=True)
class Located:
    """What one statement finds for (name, ref or digest): the repository, and the manifest or blob where it has one."""

    repo: Repo
    manifest_id: int = 0
    digest: str = ""
    media_type: str = ""
    artifact_type: str = ""
    size: int = 0
    raw: bytes | None = None
    location: str = ""
    commit: str = ""
    at: float = 0.0
    file: File | None = None
    lease_until: float = 0.0  # of a blob: until when the sweep leaves it alone without a manifest that names it

    def descriptor(self) -> Descriptor:
        """The manifest as a descriptor."""
        return Descriptor(self.media_type, self.digest, self.size, self.artifact_type)


@dataclass(frozen=True)
class UploadRow:
    """A stored upload: bytes [0, offset) are durable, `state` is their hash state; `generation` fences take-overs."""

    id: str
    repo: str
    key_id: str
    algorithm: str
    offset: int
    state: bytes
    generation: int


HAS_POLICY = P.c.id.is_not(None)
COLUMNS = (
    R.c.id,
    R.c.name,
    R.c.display,
    R.c.kind,
    R.c.gated,
    R.c.immutable,
    O.c.name.label("org"),
    case((HAS_POLICY, P.c.visibility), else_=R.c.visibility).label("visibility"),
    case((HAS_POLICY, P.c.requires_tier), else_=R.c.requires_tier).label("requires_tier"),
    case((HAS_POLICY, P.c.requires_product), else_=R.c.requires_product).label("requires_product"),
    case((P.c.license_at == 0, P.c.license), (HAS_POLICY, ""), (R.c.license_at == 0, R.c.license), else_="").label("unaccepted"),
    case((HAS_POLICY, P.c.blocked), else_=R.c.blocked).label("blocked"),
)
_OWNER = O.c.id == case((HAS_POLICY, P.c.org_id), else_=R.c.org_id)
_FROM = R.outerjoin(P, P.c.name == bindparam("model")).outerjoin(O, _OWNER)
MODEL = case((R.c.name.like("%" + PROFILES), func.substr(R.c.name, 1, func.length(R.c.name) - len(PROFILES))), else_=R.c.name)
HUB_NAMES = ("name0", "name1", "name2")


def _named() -> Any:
    own = t.repository.alias("named")
    by_name = select(own.c.id).where(own.c.name == bindparam("name")).scalar_subquery()
    by_alias = select(t.alias.c.repo_id).where(t.alias.c.name == bindparam("name")).scalar_subquery()
    return R.c.id == func.coalesce(by_name, by_alias)


def _first_named() -> Any:
    """The first of the names that exists: what a Hub id may mean (registry/hub.py)."""
    found: list[Any] = []
    for word in HUB_NAMES:
        own = t.repository.alias(word)
        found.append(select(own.c.id).where(own.c.name == bindparam(word)).scalar_subquery())
        found.append(select(t.alias.c.repo_id).where(t.alias.c.name == bindparam(word)).scalar_subquery())
    return R.c.id == func.coalesce(*found)


def _by_ref() -> Any:
    """The manifest id of a ref: the ref's own, else the commit's, else for `main` the newest revision's (docs/format.md section 2)."""
    of_ref = select(t.ref.c.manifest_id).where(t.ref.c.repo_id == R.c.id, t.ref.c.name == bindparam("ref")).scalar_subquery()
    own, newest = V.alias("by_commit"), V.alias("newest")
    of_commit = select(own.c.manifest_id).where(own.c.repo_id == R.c.id, own.c.commit == bindparam("ref")).scalar_subquery()
    last = select(newest.c.manifest_id).where(newest.c.repo_id == R.c.id).order_by(newest.c.at.desc(), newest.c.manifest_id.desc()).limit(1)
    of_main = case((literal("main") == bindparam("ref"), last.scalar_subquery()), else_=None)
    return M.c.id == func.coalesce(of_ref, of_commit, of_main)


def _linked(column: Any) -> Any:
    link = t.repo_manifest
    return and_(column, select(link.c.manifest_id).where(link.c.repo_id == R.c.id, link.c.manifest_id == M.c.id).exists())


_HEAD = (M.c.id.label("mid"), M.c.digest, M.c.media_type, M.c.artifact_type, M.c.size)
_VERSION = and_(V.c.repo_id == R.c.id, V.c.manifest_id == M.c.id)
REPOSITORY = select(*COLUMNS).select_from(_FROM).where(_named())


def _manifest(join: Any) -> Select[Any]:
    found = _FROM.outerjoin(M, join).outerjoin(V, _VERSION)
    return select(*COLUMNS, *_HEAD, V.c.commit, V.c.at).select_from(found).where(_named()).limit(1)


def _file(join: Any, start: Any = _FROM, named: Any = None) -> Select[Any]:
    path = and_(t.file.c.manifest_id == M.c.id, t.file.c.path == bindparam("path"))
    found = start.outerjoin(M, join).outerjoin(V, _VERSION).outerjoin(t.file, path)
    found = found.outerjoin(t.blob_fact, t.blob_fact.c.digest == t.file.c.digest)
    columns = (t.file.c.path, t.file.c.digest.label("fdigest"), t.file.c.size.label("fsize"), t.file.c.lfs, t.blob_fact.c.git_oid)
    return select(*COLUMNS, *_HEAD, V.c.commit, V.c.at, *columns).select_from(found).where(_named() if named is None else named).limit(1)


BY_REF, BY_DIGEST = _manifest(_by_ref()), _manifest(_linked(M.c.digest == bindparam("ref")))
FILE_BY_REF, FILE_BY_DIGEST = _file(_by_ref()), _file(_linked(M.c.digest == bindparam("ref")))
HUB_FILE = _file(_by_ref(), R.outerjoin(P, P.c.name == MODEL).outerjoin(O, _OWNER), _first_named())


def _object(held: Any) -> Select[Any]:
    """The manifest of the asked digest, or the blob whose own digest is `held`."""
    link, b = t.repo_blob, t.blob
    until = case((link.c.lease_until < b.c.lease_until, link.c.lease_until), else_=b.c.lease_until).label("lease_until")
    source = _FROM.outerjoin(M, _linked(M.c.digest == bindparam("digest")))
    source = source.outerjoin(link, and_(link.c.repo_id == R.c.id, link.c.digest == held))
    source = source.outerjoin(b, b.c.digest == link.c.digest)
    place = case((b.c.state == "ready", b.c.location), else_="").label("location")  # missing or damaged: told so, served never
    columns = (b.c.digest.label("bdigest"), b.c.size.label("bsize"), place, until)
    return select(*COLUMNS, *_HEAD, M.c.raw, *columns).select_from(source).where(_named()).limit(1)


OBJECT = _object(bindparam("digest"))
OBJECT_BY_ALIAS = _object(
    select(t.blob_alias.c.blob).where(t.blob_alias.c.algorithm == "sha512", t.blob_alias.c.digest == bindparam("digest")).scalar_subquery()
)


def as_repo(row: Any) -> Repo:
    """A Repo from a row of COLUMNS."""
    subject = Subject(row.name, row.org or "", row.visibility, row.requires_tier, row.requires_product, row.unaccepted, row.blocked)
    return Repo(row.id, row.name, row.display, row.kind, subject, bool(row.gated), bool(row.immutable))


def as_located(row: Any, raw: bytes | None = None) -> Located:
    """A Located from a row of BY_REF, BY_DIGEST or a file statement, with the manifest's bytes where they were read as well."""
    if row.mid is None:
        return Located(as_repo(row))
    return Located(as_repo(row), row.mid, row.digest, row.media_type, row.artifact_type, row.size, raw, "", row.commit or "", row.at or 0.0)


def as_object(row: Any) -> Located:
    """A Located from a row of OBJECT or OBJECT_BY_ALIAS: a manifest with its bytes, or a blob with its location."""
    if row.mid is not None:
        return Located(as_repo(row), row.mid, row.digest, row.media_type, row.artifact_type, row.size, row.raw)
    lease = row.lease_until or 0.0
    return Located(as_repo(row), digest=row.bdigest or "", size=row.bsize or 0, location=row.location or "", lease_until=lease)


def as_file(row: Any) -> Located:
    """A Located from a row of a file statement, without a file where the revision has none of that path."""
    found = as_located(row)
    return found if row.path is None else replace(found, file=File(row.path, row.fdigest, row.fsize, bool(row.lfs), row.git_oid or ""))
