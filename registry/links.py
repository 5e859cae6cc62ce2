"""Every change of names, manifests, blobs, links, leases and uploads, as functions over a connection: callers choose the transaction.

Beside registry/catalog.py, which reads. Row locks are taken in one order (blob, manifest, ref), so that on PostgreSQL neither two pushes nor a push
and the sweep block each other for ever, and what the sweep took is seen as missing instead of failing. It moves no bytes and judges no right.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sqlalchemy import Connection, delete, insert, select, update

from artifact.errors import Conflict, Denied, Invalid, NotFound, TooLarge
from artifact.manifest import (
    COMMIT,
    MAX_FILES,
    MODEL_TYPE,
    PARENT,
    PROFILES_TYPE,
    SOURCE,
    TITLE,
    Manifest,
    check_ref,
    derived_commit,
    files_of,
    files_root,
    is_commit,
    is_digest,
    own_type,
    parse_manifest,
)
from artifact.store import Descriptor, File
from artifact.trust import SIGNATURE, is_sig_tag
from registry import tables as t
from registry.rows import add_alias as add_alias
from registry.rows import add_blob as add_blob
from registry.rows import add_fact as add_fact
from registry.rows import add_garbage as add_garbage
from registry.rows import add_upload as add_upload
from registry.rows import advance_upload as advance_upload
from registry.rows import blob_location as blob_location
from registry.rows import blob_locations as blob_locations
from registry.rows import check_quota as check_quota
from registry.rows import check_staging as check_staging
from registry.rows import chunks as chunks
from registry.rows import claim_upload as claim_upload
from registry.rows import drop_upload as drop_upload
from registry.rows import ensure_org as ensure_org
from registry.rows import ensure_repository as ensure_repository
from registry.rows import ignore_duplicates as ignore_duplicates
from registry.rows import in_garbage as in_garbage
from registry.rows import link_blob as link_blob
from registry.rows import org_exists as org_exists
from registry.rows import owning_org as owning_org
from registry.rows import promise_upload as promise_upload
from registry.rows import refresh_lease as refresh_lease
from registry.rows import replace_duplicates as replace_duplicates
from registry.statements import M, R, V

IMAGE_CONFIGS = ("application/vnd.oci.image.config.v1+json", "application/vnd.docker.container.image.v1+json")
KINDS = ("", "artifact", "image", "profiles", "model")  # a repository is of the strongest kind that it holds: signatures come in any order


@dataclass(frozen=True)
class Rule:
    """What a push may do with refs: only make new ones, only where they name the digest `over` now (empty: where there are none).

    With `keeps`, a `.sig` tag only gets a manifest with every signature that it has, unless `over` says that the caller knows what it replaces.
    """

    only_new: bool = False
    over: str | None = None
    keeps: bool = False


# ---- manifests and what they name


def unlink_blob(conn: Connection, repo_id: int, digest: str, at: float) -> bool:
    """Takes a blob out of a repository; False where it is not there; raises Conflict while a manifest of the repository needs it."""
    if not digest.startswith("sha256:"):
        aliased = select(t.blob_alias.c.blob).where(t.blob_alias.c.digest == digest)
        digest = conn.execute(aliased).scalar_one_or_none() or digest
    link = t.repo_manifest
    used = (
        select(t.edge.c.parent_id)
        .join(link, link.c.manifest_id == t.edge.c.parent_id)
        .where(link.c.repo_id == repo_id, t.edge.c.blob == digest)
        .limit(1)
    )
    if conn.execute(used).first() is not None:
        raise Conflict(f"a manifest of this repository refers to {digest}", do="delete the manifest first", reason="in_use")
    conn.execute(update(t.blob).where(t.blob.c.digest == digest).values(gc_after=at))
    return conn.execute(delete(t.repo_blob).where(t.repo_blob.c.repo_id == repo_id, t.repo_blob.c.digest == digest)).rowcount > 0


def kind_of(manifest: Manifest) -> str:
    """model, profiles, image or artifact, from the artifact type."""
    if manifest.artifact_type == MODEL_TYPE:
        return "model"
    if manifest.artifact_type == PROFILES_TYPE:
        return "profiles"
    return "image" if manifest.manifests or manifest.artifact_type in IMAGE_CONFIGS else "artifact"


def _held_blobs(conn: Connection, repo_id: int, digests: Sequence[str]) -> dict[str, tuple[str, int]]:
    """Of these digests the linked blobs, each with its sha256 digest and size; their rows stay locked against the sweep."""
    out: dict[str, tuple[str, int]] = {}
    b, link, alias = t.blob.c, t.repo_blob, t.blob_alias
    for part in chunks([d for d in digests if d.startswith("sha256:")]):
        held = select(b.digest, b.size).join(link, link.c.digest == b.digest).where(link.c.repo_id == repo_id, b.digest.in_(part), b.state == "ready")
        rows = conn.execute(held.order_by(b.digest).with_for_update(read=True, key_share=True, of=(t.blob, link)))
        out |= {row.digest: (row.digest, row.size) for row in rows}
    for part in chunks([d for d in digests if not d.startswith("sha256:")]):
        source = alias.join(t.blob, b.digest == alias.c.blob).join(link, link.c.digest == b.digest)
        other = select(alias.c.digest.label("named"), b.digest, b.size).select_from(source).order_by(b.digest)
        other = other.where(link.c.repo_id == repo_id, b.state == "ready", alias.c.algorithm == "sha512", alias.c.digest.in_(part))
        rows = conn.execute(other.with_for_update(read=True, key_share=True, of=(t.blob, link)))
        out |= {row.named: (row.digest, row.size) for row in rows}
    return out


def _held_manifests(conn: Connection, repo_id: int, digests: Sequence[str]) -> set[str]:
    link = t.repo_manifest
    have: set[str] = set()
    for part in chunks(digests):
        found = select(M.c.digest).join(link, link.c.manifest_id == M.c.id).where(link.c.repo_id == repo_id, M.c.digest.in_(part))
        have.update(conn.execute(found.order_by(M.c.digest).with_for_update(read=True, key_share=True, of=(M, link))).scalars())
    return have


def _children(conn: Connection, repo_id: int, manifest: Manifest, name: str) -> dict[str, str]:
    """Each blob that the manifest names with its sha256 digest; raises NotFound `manifest_blob` for what is missing, Invalid for a wrong size."""
    blobs, children = sorted({d.digest for d in manifest.blobs()}), sorted({d.digest for d in manifest.manifests})
    held = _held_blobs(conn, repo_id, sorted({d.digest for d in manifest.own()}))  # what need not be pushed is kept where it was
    have = _held_manifests(conn, repo_id, children)
    missing = [d for d in (*blobs, *children) if d not in held and d not in have]
    for child in manifest.own():
        size = held[child.digest][1] if child.digest in held else child.size
        if size != child.size:
            raise Invalid(f"the manifest states {child.size} bytes for {child.digest}", expected=f"{size}, which it has", reason="manifest")
    if missing:
        raise NotFound(
            f"the manifest refers to {missing[0]}, which {name or 'this repository'} does not hold",
            expected="every blob and child manifest pushed before",
            reason="manifest_blob",
            digest=missing[0],
            missing=len(missing),
        )
    return {digest: blob for digest, (blob, _) in held.items()}


def _add_row(conn: Connection, manifest: Manifest) -> tuple[int, bool]:
    """The id of a manifest's row and whether it is new; one that waited for the sweep is kept."""
    values = {
        "digest": manifest.digest,
        "media_type": manifest.media_type,
        "artifact_type": manifest.artifact_type,
        "subject": manifest.subject.digest if manifest.subject else None,
        "size": len(manifest.raw),
        "raw": manifest.raw,
    }
    while True:
        made = conn.execute(ignore_duplicates(conn, M).values(values).returning(M.c.id)).scalar_one_or_none()
        if made is not None:
            return int(made), True
        again = update(M).where(M.c.digest == manifest.digest).values(gc_after=None, media_type=manifest.media_type)
        kept = conn.execute(again.returning(M.c.id)).scalar_one_or_none()
        if kept is not None:  # else the sweep took it between the two statements
            return int(kept), False


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
    key_id: str = "",
    rule: Rule = Rule(),
) -> Descriptor:
    """Stores a manifest with edges, files, revision and refs, its children linked; raises NotFound `manifest_blob`, Conflict, Invalid, TooLarge.

    The repository is created by ensure_repository and blobs are linked by link_blob before, in the same transaction or earlier. A ref that
    `rule` keeps raises Denied or Conflict.
    """
    manifest = parse_manifest(raw, media_type) if isinstance(raw, bytes) else raw
    manifest = replace(manifest, media_type=own_type(manifest))  # one row for all repositories: its type must be the bytes' own
    blobs = _children(conn, repo_id, manifest, name)
    kind = kind_of(manifest)
    files = files_of(manifest) if kind == "model" else ()
    if kind == "model" and manifest.blobs() != manifest.own():  # nothing would prove that this repository holds what its files name
        raise Invalid("a model has a layer that need not be pushed", expected="layers of types that are stored here", reason="manifest")
    if len(files) > MAX_FILES:
        raise TooLarge(f"the model has {len(files)} files, at most {MAX_FILES} are kept", expected=f"at most {MAX_FILES} files", reason="files")
    manifest_id, is_new = _add_row(conn, manifest)
    if is_new:
        _add_edges(conn, manifest_id, manifest, blobs)
        if files:
            conn.execute(
                insert(t.file), [{"manifest_id": manifest_id, "path": f.path, "digest": f.digest, "size": f.size, "lfs": f.lfs} for f in files]
            )
    else:
        fill_edges(conn, manifest_id, blobs)
    link = replace_duplicates(conn, t.repo_manifest, ("repo_id", "manifest_id"), ("at",))  # the time of the last push: retention counts from it
    conn.execute(link.values(repo_id=repo_id, manifest_id=manifest_id, at=at))
    if kind == "model":
        _add_revision(conn, repo_id, manifest_id, manifest, files, at, rule)
    conn.execute(update(R).where(R.c.id == repo_id, R.c.kind.in_(KINDS[: KINDS.index(kind)])).values(kind=kind))
    for name_ in sorted(set(refs)):
        set_ref(conn, repo_id, name_, manifest_id, kind=ref_kind, at=at, key_id=key_id, rule=rule)
    return Descriptor(manifest.media_type, manifest.digest, len(manifest.raw), manifest.artifact_type, dict(manifest.annotations))


def edges_of(manifest: Manifest, blobs: Mapping[str, str]) -> dict[tuple[str, str], str | None]:
    """What a manifest names: (digest, kind) to the blob that holds it, None where it is no blob of the store."""
    edges: dict[tuple[str, str], str | None] = {}
    if manifest.config:
        edges[manifest.config.digest, "config"] = blobs.get(manifest.config.digest)
    for layer in manifest.layers:
        edges[layer.digest, "layer"] = blobs.get(layer.digest)
    for child in manifest.manifests:
        edges[child.digest, "manifest"] = None
    if manifest.subject:
        edges[manifest.subject.digest, "subject"] = None
    return edges


def _add_edges(conn: Connection, manifest_id: int, manifest: Manifest, blobs: Mapping[str, str]) -> None:
    edges = edges_of(manifest, blobs)
    rows = [{"parent_id": manifest_id, "child_digest": digest, "kind": kind, "blob": blob} for (digest, kind), blob in sorted(edges.items())]
    if rows:
        conn.execute(insert(t.edge), rows)


def fill_edges(conn: Connection, manifest_id: int, blobs: Mapping[str, str]) -> None:
    """Names the blobs of layers that were not there when the manifest was first pushed: what is held and named is not swept."""
    e = t.edge.c
    bare = select(e.child_digest).where(e.parent_id == manifest_id, e.blob.is_(None), e.kind.in_(("config", "layer"))).order_by(e.child_digest)
    for digest in conn.execute(bare).scalars().all():
        if digest in blobs:
            conn.execute(update(t.edge).where(e.parent_id == manifest_id, e.child_digest == digest, e.blob.is_(None)).values(blob=blobs[digest]))


def _add_revision(conn: Connection, repo_id: int, manifest_id: int, manifest: Manifest, files: Sequence[File], at: float, rule: Rule) -> None:
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
    if conn.execute(ignore_duplicates(conn, V).values(values).returning(V.c.commit)).first() is not None or not at:
        return  # without a time (an older bundle) the revision comes in as the oldest and an existing one stays: `main` never goes back
    held = select(M.c.digest, R.c.immutable).select_from(V.join(M, M.c.id == V.c.manifest_id).join(R, R.c.id == V.c.repo_id))
    other = conn.execute(held.where(V.c.repo_id == repo_id, V.c.commit == commit, V.c.manifest_id != manifest_id)).first()
    if other is not None:  # whoever pinned the commit would be given other files: as strict as a ref that moves
        _demand_allowed(replace(rule, over=None), commit, other.digest)
        _demand_mutable(other.immutable, commit)
    conn.execute(replace_duplicates(conn, V, ("repo_id", "commit"), ("manifest_id", "at")).values(values))


def unlink_manifest(conn: Connection, repo_id: int, digest: str, at: float, *, key_id: str = "") -> bool:
    """Takes a manifest out of a repository with its refs and revisions; False where it is not there.

    Its blobs become candidates of the sweep, and without a link left the manifest itself. Raises Conflict `immutable` for an immutable tag, and in
    an immutable repository while an index there names it: a tag that never moves keeps what is below it.
    """
    manifest_id = conn.execute(select(M.c.id).where(M.c.digest == digest).with_for_update()).scalar_one_or_none()
    link, refs = t.repo_manifest, t.ref
    if manifest_id is None or not conn.execute(delete(link).where(link.c.repo_id == repo_id, link.c.manifest_id == manifest_id)).rowcount:
        return False
    _demand_unnamed(conn, repo_id, digest)
    named = select(refs.c.name, R.c.immutable).join(R, R.c.id == refs.c.repo_id)
    named = named.where(refs.c.repo_id == repo_id, refs.c.manifest_id == manifest_id).order_by(refs.c.name).with_for_update(of=refs)
    gone = conn.execute(named).all()
    for row in gone:
        _demand_mutable(row.immutable, row.name)
    if gone:
        conn.execute(insert(t.ref_history), [_moved(repo_id, row.name, digest, "", at, key_id) for row in gone])
    for table in (refs, V):
        conn.execute(delete(table).where(table.c.repo_id == repo_id, table.c.manifest_id == manifest_id))
    children = select(t.edge.c.blob).where(t.edge.c.parent_id == manifest_id, t.edge.c.blob.is_not(None))
    conn.execute(select(t.blob.c.digest).where(t.blob.c.digest.in_(children)).order_by(t.blob.c.digest).with_for_update(key_share=True))
    conn.execute(update(t.blob).where(t.blob.c.digest.in_(children)).values(gc_after=at))
    conn.execute(
        update(M).where(M.c.id == manifest_id, ~select(link.c.repo_id).where(link.c.manifest_id == manifest_id).exists()).values(gc_after=at)
    )
    return True


def _demand_unnamed(conn: Connection, repo_id: int, digest: str) -> None:
    link, edge = t.repo_manifest.c, t.edge.c
    above = (
        select(M.c.digest).join(t.edge, edge.parent_id == M.c.id).join(t.repo_manifest, link.manifest_id == M.c.id).join(R, R.c.id == link.repo_id)
    )
    found = above.where(link.repo_id == repo_id, R.c.immutable, edge.child_digest == digest, edge.kind == "manifest").limit(1)
    parent = conn.execute(found).scalar_one_or_none()
    if parent is not None:
        raise Conflict(
            f"{digest} is a part of {parent}, and this repository is immutable", do="delete that first, if it has no tag", reason="immutable"
        )


# ---- refs


def _moved(repo_id: int, name: str, old: Any, new: Any, at: float, key_id: str) -> dict[str, Any]:
    return {"repo_id": repo_id, "name": name, "old_digest": old, "new_digest": new, "at": at, "key_id": key_id}


def _demand_mutable(immutable: object, name: str) -> None:
    if immutable:
        raise Conflict(f"the ref {name} is immutable here", do="push under another version", reason="immutable")


def _demand_allowed(rule: Rule, name: str, old: str) -> None:
    if rule.over is not None and rule.over != old:
        raise Conflict(f"the ref {name} names {old or 'nothing'} now", expected=rule.over or "no such ref", do="look at it again", reason="moved")
    if rule.only_new and old:
        raise Denied(f"the key may create refs, and {name} exists", do="push under another version, or use a key with action push", reason="exists")


def _demand_kept(conn: Connection, name: str, old_id: int, new_id: int) -> None:
    """Raises Conflict where the new `.sig` manifest lacks a signature of the old one.

    cosign reads the tag, appends its layer and pushes: of two signers that read it at once, the second is told so instead of undoing the first.
    """
    rows = conn.execute(select(M.c.id, M.c.raw, M.c.media_type).where(M.c.id.in_((old_id, new_id))))
    held = {r.id: {(d.digest, d.annotations.get(SIGNATURE)) for d in parse_manifest(bytes(r.raw), r.media_type).layers} for r in rows}
    lost = held[old_id] - held[new_id]
    if lost:
        raise Conflict(
            f"{name} has {len(lost)} signatures that this manifest lacks: another signature was added meanwhile",
            expected="every signature of the tag, and the new one",
            do="read the tag again and add yours",
            reason="signatures",
        )


def set_ref(
    conn: Connection,
    repo_id: int,
    name: str,
    manifest_id: int,
    *,
    kind: str = "tag",
    at: float = 0.0,
    key_id: str = "",
    rule: Rule = Rule(),
) -> None:
    """Moves a ref to a manifest and notes it in the history.

    Raises Invalid, Conflict where the ref is immutable and points elsewhere, Denied or Conflict where `rule` keeps it, Conflict `signatures`.
    """
    check_ref(name)
    if is_digest(name):
        raise Invalid(f"{name} is a digest, not a ref name", expected="a tag or branch name", reason="ref")
    named = select(V.c.commit).where(V.c.repo_id == repo_id, V.c.commit == name, V.c.manifest_id != manifest_id)
    if is_commit(name) and conn.execute(named).first() is not None:
        raise Conflict(f"{name} is the commit of another revision here", expected="a ref of another name", reason="ref")
    refs, new = t.ref, select(M.c.digest).where(M.c.id == manifest_id).scalar_subquery()
    values = {"repo_id": repo_id, "name": name, "kind": kind, "manifest_id": manifest_id, "at": at}
    held = select(refs.c.manifest_id, M.c.digest, R.c.immutable).join(R, R.c.id == refs.c.repo_id).join(M, M.c.id == refs.c.manifest_id)
    held = held.where(refs.c.repo_id == repo_id, refs.c.name == name).with_for_update(of=refs)
    old = None
    while old is None:
        if conn.execute(ignore_duplicates(conn, refs).values(values).returning(refs.c.name)).first() is not None:
            _demand_allowed(rule, name, "")
            conn.execute(insert(t.ref_history).values(_moved(repo_id, name, "", new, at, key_id)))
            return
        old = conn.execute(held).first()  # None: it was deleted between the two statements
    if old.manifest_id != manifest_id or rule.over is not None:
        _demand_allowed(rule, name, old.digest)
    if old.manifest_id != manifest_id:
        _demand_mutable(old.immutable, name)
        if rule.keeps and rule.over is None and is_sig_tag(name):
            _demand_kept(conn, name, old.manifest_id, manifest_id)
        conn.execute(insert(t.ref_history).values(_moved(repo_id, name, old.digest, new, at, key_id)))
    conn.execute(update(refs).where(refs.c.repo_id == repo_id, refs.c.name == name).values(kind=kind, manifest_id=manifest_id, at=at))


def delete_ref(conn: Connection, repo_id: int, name: str, *, at: float = 0.0, key_id: str = "") -> bool:
    """Removes a ref and notes it in the history; False where there is none; raises Conflict for an immutable one."""
    refs = t.ref
    held = select(M.c.digest, R.c.immutable).select_from(refs.join(R, R.c.id == refs.c.repo_id).join(M, M.c.id == refs.c.manifest_id))
    old = conn.execute(held.where(refs.c.repo_id == repo_id, refs.c.name == name).with_for_update(of=refs)).first()
    if old is None:
        return False
    _demand_mutable(old.immutable, name)
    conn.execute(delete(refs).where(refs.c.repo_id == repo_id, refs.c.name == name))
    conn.execute(insert(t.ref_history).values(_moved(repo_id, name, old.digest, "", at, key_id)))
    return True
