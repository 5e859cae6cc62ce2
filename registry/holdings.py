"""What repositories and organisations hold, in SQL: facts for retention, who names what across repositories, usage, history, search, removal.

Beside registry/catalog.py, which answers pulls. It judges no right; every write is a function over the caller's transaction.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

from sqlalchemy import Connection, Engine, and_, case, delete, func, or_, select, update

from artifact.errors import AirlockError, Conflict, Invalid, Mismatch, NotFound, Unavailable
from artifact.grant import PROFILES, date
from artifact.manifest import PROFILES_TYPE, digest_of, is_digest, parse_manifest
from artifact.profile import references
from registry import tables as t
from registry.database import reading
from registry.library import Library
from registry.links import chunks, delete_ref, replace_duplicates, set_ref, unlink_manifest
from registry.retention import Removal, Rule, Tag, Version, check_rule
from registry.rows import used_by
from registry.statements import COLUMNS, HAS_POLICY, M, O, P, R, Repo, V, as_repo
from registry.sweep import sweep_blobs, sweep_manifests
from registry.uploads import pieces_of

MAX_DOCUMENT = 4 * 1024 * 1024
Pins = Mapping[tuple[str, str], Sequence[str]]


# ---- retention: rules and facts


def rules(conn: Connection) -> list[Rule]:
    """The retention rules, by pattern."""
    rows = conn.execute(select(t.retention).order_by(t.retention.c.pattern)).all()
    return [Rule(r.pattern, r.keep_last, r.keep_days, r.untagged_days, tuple(g for g in r.keep_tags.split(",") if g)) for r in rows]


def set_rule(conn: Connection, rule: Rule, at: float) -> None:
    """Makes or replaces the rule of a pattern; raises Invalid."""
    check_rule(rule)
    columns = ("keep_last", "keep_days", "untagged_days", "keep_tags", "at")
    values = {"pattern": rule.pattern, "keep_last": rule.keep_last, "keep_days": rule.keep_days, "untagged_days": rule.untagged_days}
    conn.execute(replace_duplicates(conn, t.retention, ("pattern",), columns).values(**values, keep_tags=",".join(rule.keep_tags), at=at))


def drop_rule(conn: Connection, pattern: str) -> bool:
    """Removes the rule of a pattern; False where there is none."""
    return conn.execute(delete(t.retention).where(t.retention.c.pattern == pattern)).rowcount > 0


def stamp(conn: Connection, repo_id: int, now: float) -> None:
    """Gives a repository's manifests and refs without a time (of an older version or bundle) this one, so that retention counts from here."""
    for table in (t.repo_manifest, t.ref):
        conn.execute(update(table).where(table.c.repo_id == repo_id, table.c.at == 0).values(at=now))


def unstamped(conn: Connection, repo_id: int) -> bool:
    """Whether a repository has manifests or refs without a time."""
    return any(
        conn.execute(select(table.c.repo_id).where(table.c.repo_id == repo_id, table.c.at == 0).limit(1)).first() is not None
        for table in (t.repo_manifest, t.ref)
    )


def facts(conn: Connection, repo: Repo, now: float, pins: Pins) -> tuple[list[Tag], list[Version]]:
    """The tags and manifests of a repository, as retention wants to know them."""
    ref, link, edge, past = t.ref.c, t.repo_manifest.c, t.edge.c, t.ref_history.c
    named = select(ref.name, M.c.digest, ref.at, ref.kind).join(M, M.c.id == ref.manifest_id).where(ref.repo_id == repo.id).order_by(ref.name)
    tags = [Tag(r.name, r.digest, r.at or now, r.kind) for r in conn.execute(named)]
    lost = select(past.old_digest, func.max(past.at).label("at")).where(past.repo_id == repo.id, past.old_digest != "").group_by(past.old_digest)
    left = {r.old_digest: r.at for r in conn.execute(lost)}
    below = select(edge.parent_id, edge.child_digest).join(t.repo_manifest, link.manifest_id == edge.parent_id)
    children: dict[int, list[str]] = {}
    for parent, child in conn.execute(below.where(link.repo_id == repo.id, edge.kind == "manifest")):
        children.setdefault(parent, []).append(child)
    newest = select(V.c.manifest_id).where(V.c.repo_id == repo.id).order_by(V.c.at.desc(), V.c.manifest_id.desc()).limit(1)
    main = conn.execute(newest).scalar_one_or_none()  # what `main` names where no ref says otherwise
    held = select(M.c.id, M.c.digest, M.c.subject, link.at).join(t.repo_manifest, link.manifest_id == M.c.id).where(link.repo_id == repo.id)
    versions = []
    for row in conn.execute(held.order_by(M.c.digest)):
        kept = "the newest revision" if row.id == main else " ".join(pins.get((repo.name, row.digest), ()))
        since = max(row.at, left.get(row.digest, 0.0)) if row.at else now
        versions.append(Version(row.digest, since, tuple(children.get(row.id, ())), row.subject or "", kept))
    return tags, versions


class Profiles:
    """The cross-repository references of all profile documents; a document is read once, since its digest names it.

    One that is missing, damaged or unreadable names nobody knows what: that is an error each time, and never no reference.
    """

    def __init__(self, library: Library) -> None:
        self._library = library
        self._read: dict[str, tuple[tuple[str, str], ...]] = {}

    def pins(self, conn: Connection, of: Repo | None = None) -> Pins:
        """(name, digest) of each model and image that profiles name, those in `of` only if it is given, with the repositories of the profiles.

        A profile in another organisation's repository names nothing that this one could not let go of; what the site owns is everybody's to name.
        Raises Unavailable `pins` for a document that cannot be read: what it names is not known, so nothing may go.
        """
        link = t.repo_manifest
        found = select(R.c.name, R.c.org_id, M.c.digest).join(link, link.c.repo_id == R.c.id).join(M, M.c.id == link.c.manifest_id)
        found = found.where(M.c.artifact_type == PROFILES_TYPE)
        if of is not None:
            own = select(R.c.org_id).where(R.c.id == of.id).scalar_subquery()
            found = found.where(or_(R.c.org_id.is_(None), own.is_(None), R.c.org_id == own))
        named: dict[tuple[str, str], dict[str, int | None]] = {}
        for row in conn.execute(found.order_by(R.c.name, M.c.digest)).all():
            for pin in self._of_manifest(conn, row.digest, row.name):
                if of is None or pin[0] == of.name:
                    named.setdefault(pin, {})[row.name] = row.org_id
        owners = _owners(conn, {name for name, _ in named})
        out = {pin: [where for where, org in by.items() if _counts(org, owners.get(pin[0]))] for pin, by in named.items()}
        return {pin: by for pin, by in out.items() if by}

    def _of_manifest(self, conn: Connection, digest: str, name: str) -> tuple[tuple[str, str], ...]:
        if digest not in self._read:
            row = conn.execute(select(M.c.raw, M.c.media_type).where(M.c.digest == digest)).one()
            layers = [d for d in parse_manifest(bytes(row.raw), row.media_type).layers if d.media_type == PROFILES_TYPE and d.size <= MAX_DOCUMENT]
            self._read[digest] = tuple(pin for layer in layers for pin in self._references(conn, layer.digest, name))
        return self._read[digest]

    def _references(self, conn: Connection, digest: str, name: str) -> tuple[tuple[str, str], ...]:
        try:
            raw = self._whole(conn, digest)
        except (AirlockError, OSError) as error:
            raise Unavailable(
                f"the profile document {digest} of {name} cannot be read, so what it names is not known",
                do="push it again, or import the bundle that brought it",
                reason="pins",
            ) from error
        try:
            pins = references(raw, PROFILES_TYPE)
        except Invalid:
            pins = ()  # these are the bytes that were pushed, and no runtime can read them either
        return tuple((pin.name, pin.digest) for pin in pins)

    def _whole(self, conn: Connection, digest: str) -> bytes:
        """The bytes of a document, which have its digest; raises NotFound, Mismatch, Unavailable, OSError."""
        alias = select(t.blob_alias.c.blob).where(t.blob_alias.c.digest == digest).scalar_subquery()
        location = conn.execute(select(t.blob.c.location).where(or_(t.blob.c.digest == digest, t.blob.c.digest == alias))).scalar_one_or_none()
        if not location:
            raise NotFound(f"{digest} is not in the store", reason="bytes")
        raw = b"".join(pieces_of(self._library.blobs.open(location)))
        if digest_of(raw, digest.partition(":")[0]) != digest:
            raise Mismatch("the stored bytes have another digest", expected=digest, reason="digest")
        return raw


def _owners(conn: Connection, names: Collection[str]) -> dict[str, int | None]:
    """The organisation of each of these repositories."""
    out: dict[str, int | None] = {}
    for part in chunks(sorted(names)):
        out.update((row.name, row.org_id) for row in conn.execute(select(R.c.name, R.c.org_id).where(R.c.name.in_(part))))
    return out


def _counts(org: int | None, owner: int | None) -> bool:
    """Whether a profile of `org` holds what is `owner`'s; the site is None."""
    return org is None or owner is None or org == owner


def repositories(conn: Connection, profiles: bool) -> list[str]:
    """Names of all repositories that hold anything: those of profile manifests, or the others."""
    of_profiles = R.c.name.like("%" + PROFILES)
    return list(conn.execute(select(R.c.name).where(R.c.kind != "", of_profiles if profiles else ~of_profiles).order_by(R.c.name)).scalars())


def orphans(conn: Connection, limit: int) -> list[dict[str, str]]:
    """Referrers whose subject their repository does not hold: nothing but a rule takes them, so they are told."""
    link, other, subject = t.repo_manifest, t.repo_manifest.alias("other"), M.alias("subject")
    there = select(other.c.repo_id).join(subject, subject.c.id == other.c.manifest_id)
    there = there.where(other.c.repo_id == link.c.repo_id, subject.c.digest == M.c.subject)
    found = select(R.c.name, M.c.digest, M.c.subject).join(link, link.c.repo_id == R.c.id).join(M, M.c.id == link.c.manifest_id)
    found = found.where(M.c.subject.is_not(None), ~there.exists()).order_by(R.c.name, M.c.digest).limit(limit)
    return [{"name": row.name, "digest": row.digest, "subject": row.subject} for row in conn.execute(found)]


def upload_ids(engine: Engine) -> set[str]:
    """Uploads that may still be continued: their staged bytes stay."""
    with reading(engine) as conn:
        return set(conn.execute(select(t.upload.c.id)).scalars())


# ---- organisations


def quota_of(conn: Connection, org: str) -> dict[str, object]:
    """Bytes of an organisation (blobs and manifests, each once, and unfinished uploads), its blobs, and its bound (0: none); raises NotFound."""
    found = conn.execute(select(t.org.c.id, t.org.c.quota_bytes).where(t.org.c.name == org)).first()
    if found is None:
        raise NotFound(f"there is no organisation {org[:100]}", do="airlock key create --org NAME makes one", reason="org")
    held = select(t.repo_blob.c.digest).join(R, R.c.id == t.repo_blob.c.repo_id).where(R.c.org_id == found.id)
    count = conn.execute(select(func.count()).select_from(t.blob).where(t.blob.c.digest.in_(held))).scalar_one()
    return {"org": org, "used_bytes": used_by(conn, found.id, org), "blobs": int(count), "quota_bytes": int(found.quota_bytes)}


def set_quota(conn: Connection, org: str, size: int) -> bool:
    """Sets an organisation's bound; False where there is no such organisation."""
    return conn.execute(update(t.org).where(t.org.c.name == org).values(quota_bytes=size)).rowcount > 0


# ---- names


def search(conn: Connection, text: str, after: str, limit: int, org: str) -> list[Repo]:
    """Repositories that hold anything, with `text` in their name or display name, that a key of `org` might see, in byte order."""
    policy = P.c.name == case((R.c.name.like("%" + PROFILES), func.substr(R.c.name, 1, func.length(R.c.name) - len(PROFILES))), else_=R.c.name)
    source = R.outerjoin(P, policy).outerjoin(O, O.c.id == case((HAS_POLICY, P.c.org_id), else_=R.c.org_id))
    pattern = "%" + text.lower().replace("\\", "\\\\").replace("%", "\\%").replace("_", "\\_") + "%"
    like = or_(R.c.name.like(pattern, escape="\\"), func.lower(R.c.display).like(pattern, escape="\\"))
    seen = or_(O.c.name.is_(None), O.c.name == org, R.c.visibility == "public")
    found = select(*COLUMNS).select_from(source).where(R.c.name > after, R.c.kind != "", seen, like).order_by(R.c.name).limit(limit)
    return [as_repo(row) for row in conn.execute(found)]


def set_immutable(conn: Connection, repo_id: int, on: bool) -> None:
    """Says whether the tags of a repository may move and go."""
    conn.execute(update(R).where(R.c.id == repo_id).values(immutable=on))


def history(conn: Connection, repo_id: int, tag: str, before: int, limit: int) -> list[dict[str, object]]:
    """Moves and removals of a repository's tags, or of one, newest first, with whether the manifest it had before is still there."""
    past = t.ref_history.c
    found = select(t.ref_history).where(past.repo_id == repo_id)
    if tag:
        found = found.where(past.name == tag)
    if before:
        found = found.where(past.id < before)
    rows = conn.execute(found.order_by(past.id.desc()).limit(limit)).all()
    here = linked(conn, repo_id, {r.old_digest for r in rows if r.old_digest})
    return [
        {"id": r.id, "tag": r.name, "from": r.old_digest, "to": r.new_digest, "at": date(r.at), "key_id": r.key_id, "kept": r.old_digest in here}
        for r in rows
    ]


def linked(conn: Connection, repo_id: int, digests: Collection[str]) -> dict[str, int]:
    """Of these digests the manifests that the repository links, with their ids."""
    out: dict[str, int] = {}
    link = t.repo_manifest.c
    for part in chunks(sorted(digests)):
        found = select(M.c.digest, M.c.id).join(t.repo_manifest, link.manifest_id == M.c.id).where(link.repo_id == repo_id, M.c.digest.in_(part))
        out.update((row.digest, row.id) for row in conn.execute(found))
    return out


def roll_back(conn: Connection, repo: Repo, tag: str, digest: str, at: float, key_id: str) -> str:
    """Points a tag at a manifest that it or another one named before, and returns what it named; raises NotFound, Conflict, Invalid."""
    if not is_digest(digest):
        raise Invalid(f"{digest[:100]!r} is not a digest", expected="sha256:<64 hex>", reason="digest")
    target = linked(conn, repo.id, [digest]).get(digest)
    if target is None:
        known = select(t.ref_history.c.at).where(t.ref_history.c.repo_id == repo.id, t.ref_history.c.old_digest == digest).limit(1)
        was = conn.execute(known).first()
        words = f"{repo.name} held {digest} once, and it was deleted since" if was else f"{repo.name} never held {digest}"
        raise NotFound(words, expected="a manifest that is still here", do=f"airlock catalog history {repo.name} {tag}", reason="manifest")
    old = select(M.c.digest).join(t.ref, t.ref.c.manifest_id == M.c.id).where(t.ref.c.repo_id == repo.id, t.ref.c.name == tag)
    before = conn.execute(old).scalar_one_or_none()
    set_ref(conn, repo.id, tag, target, at=at, key_id=key_id)
    return str(before or "")


# ---- removal, and what it frees


def remove(conn: Connection, repo: Repo, wish: Removal, at: float, key_id: str) -> None:
    """Takes away the tags and manifests of a removal; raises Conflict where the repository is immutable."""
    if repo.immutable and wish.tags:
        raise Conflict(
            f"the tags of {repo.name} are immutable", do=f"airlock catalog immutable {repo.name} --off, which is recorded", reason="immutable"
        )
    for tag in wish.tags:
        delete_ref(conn, repo.id, tag, at=at, key_id=key_id)
    for digest in wish.versions:
        unlink_manifest(conn, repo.id, digest, at, key_id=key_id)


def empty(conn: Connection, repo_id: int, at: float) -> None:
    """Hides a repository without manifests from listings and makes its blobs candidates; what is leased stays for whoever pushes now."""
    link = t.repo_blob.c
    if conn.execute(select(t.repo_manifest.c.manifest_id).where(t.repo_manifest.c.repo_id == repo_id).limit(1)).first() is None:
        conn.execute(update(R).where(R.c.id == repo_id).values(kind=""))
        held = select(t.blob.c.digest).where(t.blob.c.digest.in_(select(link.digest).where(link.repo_id == repo_id))).order_by(t.blob.c.digest)
        for part in chunks(conn.execute(held.with_for_update(key_share=True)).scalars().all()):
            conn.execute(update(t.blob).where(t.blob.c.digest.in_(part)).values(gc_after=at))


def blobs_of(conn: Connection, digests: Iterable[str]) -> set[str]:
    """The blobs that manifests name."""
    out: set[str] = set()
    for part in chunks(sorted(digests)):
        found = select(t.edge.c.blob).join(M, M.c.id == t.edge.c.parent_id).where(M.c.digest.in_(part), t.edge.c.blob.is_not(None))
        out.update(conn.execute(found).scalars())
    return out


def linked_blobs(conn: Connection, repo_id: int) -> set[str]:
    """All blobs that a repository links."""
    return set(conn.execute(select(t.repo_blob.c.digest).where(t.repo_blob.c.repo_id == repo_id)).scalars())


def freed(conn: Connection, repo_id: int, manifests: Sequence[str], blobs: Collection[str], now: float) -> tuple[list[tuple[str, int]], float]:
    """The blobs, with sizes, that go with manifests just unlinked once this repository's own leases are over, and when that is.

    It is the sweep itself, run in a part of the caller's transaction that is taken back: what it says is what will be.
    """
    link, b = t.repo_blob, t.blob.c
    gone: list[tuple[str, int]] = []
    until = 0.0
    trial = conn.begin_nested()
    try:
        for part in chunks(sorted(blobs)):
            own = and_(link.c.repo_id == repo_id, link.c.digest.in_(part))
            conn.execute(update(link).where(own).values(lease_until=0))
            others = select(func.coalesce(func.max(link.c.lease_until), 0)).where(link.c.digest == b.digest).correlate(t.blob).scalar_subquery()
            until = max(until, conn.execute(select(func.max(b.lease_until)).where(b.digest.in_(part))).scalar_one_or_none() or 0.0)
            conn.execute(update(t.blob).where(b.digest.in_(part)).values(lease_until=others, gc_after=now))
        while any([sweep_manifests(conn, now, only=part).seen for part in chunks(sorted(manifests))]):
            pass  # again while something went: a child after its index
        for part in chunks(sorted(blobs)):
            while (batch := sweep_blobs(conn, now, 0, only=part)).seen:
                gone += batch.blobs
    finally:
        trial.rollback()
    return gone, until
