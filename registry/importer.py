"""A bundle into the store: trust first, then every byte once, then all manifests, names and audit rows in one transaction.

Writes straight into the blob directory and the database, as no client of a door could. Nothing becomes visible before the last step; what an
interrupted run copied is kept and not read again. It must not judge a signature itself (artifact.bundle does) nor move a name back.
"""

from __future__ import annotations

import fcntl
import json
import os
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Protocol

from sqlalchemy import Connection, select, update

from artifact import medium, trust
from artifact.bundle import forget_scratch, open_bundle
from artifact.disk import Disk
from artifact.documents import MAX_AHEAD_S
from artifact.errors import Conflict, Mismatch, NotFound
from artifact.grant import Principal
from artifact.manifest import Manifest, check_name, digest_of, is_digest, parse_manifest
from artifact.store import Call, Content
from registry import catalog, upstream
from registry import tables as t
from registry.audit import Audit
from registry.blobs.file import location_of
from registry.database import alone
from registry.documents import Documents, Found
from registry.floor import Floor
from registry.home import Home
from registry.library import Library
from registry.uploads import OCTETS, SURPLUS_S, pieces_of

BUFFER = 1024 * 1024
RECEIPT_LIFE_S = 10 * 365 * 86400
MAX_TOLD = 100  # refused documents that a receipt names
Report = dict[str, object]


class Site(Protocol):
    """What an import needs of an open site (registry.wiring makes it)."""

    @property
    def home(self) -> Home:
        """The data directory."""

    @property
    def catalog(self) -> catalog.Catalog:
        """Names and manifests."""

    @property
    def audit(self) -> Audit:
        """The log of changes."""

    @property
    def floor(self) -> Floor:
        """The lowest time that it can be."""

    @property
    def documents(self) -> Documents:
        """Entitlements and revocation lists."""

    @property
    def library(self) -> Library:
        """The verbs over both."""


def import_bundle(
    site: Site, directory: Path, now: float, progress: Callable[[int], None] = lambda n: None, begin: Callable[[int], None] = lambda n: None
) -> Report:
    """Imports a bundle and reports what it did; again with the same bundle changes nothing.

    `begin` is told the bytes to copy, `progress` each number copied. Raises Mismatch (altered or foreign bytes, naming the file), Invalid,
    NotFound (a digest that is neither on the medium nor in the store), Unavailable (space), Conflict (another import runs).
    """
    with _lock(site.home.path):
        sender = _sender(site)
        state = site.home.trust_dir(sender) / "state"
        try:
            return _import(site, directory, state, now, progress, begin)
        finally:
            forget_scratch(state)


def _import(site: Site, directory: Path, state: Path, now: float, progress: Callable[[int], None], begin: Callable[[int], None]) -> Report:
    index = open_bundle(directory, state, site.home.pinned_root(state.parent.name), now)
    papers = site.documents.intake.read(index.documents)
    done = state.parent / "imported" / str(index.sequence)
    report: Report = {"sequence": index.sequence, "sender": index.sender, "names": len(index.names), "objects": len(index.objects)}
    report |= {"older": index.older, "copied": 0, "copied_bytes": 0, "lost": _lost(done.parent, index)}
    if (index.known or index.older) and done.exists() and done.read_text().strip() == index.digest and _held(site, index):
        if not papers:
            return report | {"imported": False, "documents": []}
        with site.catalog.writing() as conn:  # one that was refused may be taken now: its issuer was pinned meanwhile
            return report | {"imported": False, "documents": _take(site, conn, index, papers, now)}
    disk = Disk(site.home.path)
    reached, places, dead = _reach(site, disk, directory, index)
    blobs = {d: s for d, s in reached.blobs.items() if d in index.objects and d not in places and (d in dead or disk.size(d) != s)}
    need = sum(blobs.values())
    medium.check_space(site.home.path, need)
    begin(need)
    copied = sum(_copy(disk, directory, digest, blobs[digest], progress) for digest in sorted(blobs))
    places |= {d: _place(site, disk, d, reached.blobs[d]) for d in sorted(reached.blobs.keys() - places.keys())}
    kept, taken = _store(site, index, reached, places, dead, now, papers)
    for manifest in reached.manifests.values():
        if catalog.kind_of(manifest) == "model":
            site.library.fill_facts(manifest)
    index.commit()
    if index.created <= now + MAX_AHEAD_S:  # signed by the sender, whose clock may be wrong
        site.floor.raise_to(index.created)
    done.parent.mkdir(mode=0o700, exist_ok=True)
    medium.replace_file(done, index.digest.encode() + b"\n")
    with suppress(OSError):  # a medium that is write-protected brings no receipt home
        (directory / medium.RECEIPT).write_text(_receipt(site, index, now, taken))
    return report | {"imported": True, "copied": len(blobs), "copied_bytes": copied, "requires_kept": kept, "documents": taken}


def _held(site: Site, index: medium.BundleIndex) -> bool:
    """Whether the database knows what the record says was imported: it may have been restored from an older backup, or bytes may be damaged."""
    known = all((found := site.catalog.find(n.name, n.digest)) is not None and found.digest for n in index.names)
    return known and not _places(site, index.objects)[1]


@contextmanager
def _lock(home: Path) -> Iterator[None]:
    fd = os.open(home / "trust" / ".import.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise Conflict("another import runs on this data directory", expected="one at a time", do="wait for it to end") from error
    finally:
        os.close(fd)


def _sender(site: Site) -> str:
    """The pinned sender, whose bundle open_bundle proves this to be; a data directory has one."""
    sender = next(iter(site.home.senders()), "")
    if not sender:
        raise NotFound(
            "this site pins no sender", do=f"airlock site init --data {site.home.path} --trust-root 1.root.json --sha256 HEX", reason="trust_root"
        )
    return sender


def _lost(imported: Path, index: medium.BundleIndex) -> list[int]:
    """Sequences that the sender signed before this one and that never arrived here; each bundle is complete for its names, so none is needed."""
    return [n for n in index.listed if n < index.sequence and not (imported / str(n)).exists()]


def _places(site: Site, blobs: Mapping[str, int]) -> tuple[dict[str, str], dict[str, str]]:
    """Where those of the blobs lie that the store holds whole; and those whose row says so no more, or wrongly: then with that location."""
    places, dead = dict[str, str](), dict[str, str]()
    b = t.blob.c
    with site.catalog.reading() as conn:
        for part in catalog.chunks(sorted(blobs)):
            for row in conn.execute(select(b.digest, b.location, b.state).where(b.digest.in_(part))):
                ready = row.state == "ready"
                if ready and site.library.blobs.stat(row.location) == blobs[row.digest]:
                    places[row.digest] = row.location
                else:
                    dead[row.digest] = row.location if ready else ""
    return places, dead


def _place(site: Site, disk: Disk, digest: str, size: int) -> str:
    """Where a copied blob lies in the store: where it was copied to, or published anew where the store is elsewhere or waits to remove that place."""
    uploads, location = site.library.uploads, location_of(digest)
    generation = uploads.generation(digest)
    own = site.library.blobs.stat(location) == size
    if own and not generation:
        return location
    location = uploads.store(Content(digest, OCTETS, size, 0, size, path=disk.path(digest)), digest, generation)
    if not own:
        disk.delete(digest)
    return location


def _reach(site: Site, disk: Disk, directory: Path, index: medium.BundleIndex) -> tuple[medium.Closure, dict[str, str], dict[str, str]]:
    """What the names reach, read and verified, and where the store holds it or does no more; raises NotFound naming every digest that is nowhere."""

    def read(digest: str, limit: int) -> bytes | None:
        if digest in index.objects:
            return _read_verified(directory, digest, index.objects[digest], limit)
        with site.catalog.reading() as conn:
            raw = conn.execute(select(t.manifest.c.raw).where(t.manifest.c.digest == digest)).scalar_one_or_none()
        if raw is not None:
            return bytes(raw)
        return _stored(site, disk, digest, limit)

    reached = medium.closure([(n.name, n.digest, n.media_type) for n in index.names], read)
    missing, (places, dead) = dict(reached.missing), _places(site, reached.blobs)
    for digest, size in reached.blobs.items():
        if index.objects.get(digest, size) != size:
            raise Mismatch(f"the index gives {digest} another size than its manifest", expected=f"{size} bytes", reason="bundle_object")
        if digest in places or (digest not in dead and disk.size(digest) == size):
            continue
        if digest not in index.objects:
            missing[digest] = "blob"
        elif not medium.object_path(directory, digest).exists():
            raise Mismatch(f"the bundle lacks {medium.object_path(Path(), digest)}", do="copy it again from the mirror", reason="bundle_incomplete")
    if missing:
        shown = ", ".join(f"{d} ({what})" for d, what in sorted(missing.items())[:5])
        raise NotFound(
            f"{len(missing)} digests are neither in the bundle nor in the store: {shown}",
            do="import the bundle before this one first, or ask the sender for a full one",
            reason="missing_objects",
        )
    strangers = sorted(index.objects.keys() - reached.objects().keys())
    if strangers:
        raise Mismatch(
            f"{medium.object_path(Path(), strangers[0])} is reached by no name", expected="only what the names need", reason="foreign_file"
        )
    return reached, places, dead


def _stored(site: Site, disk: Disk, digest: str, limit: int) -> bytes | None:
    """A document that the store holds, or that an interrupted import copied."""
    with site.catalog.reading() as conn:
        location = catalog.blob_location(conn, digest)
    size = site.library.blobs.stat(location) if location else None
    if size is not None and size <= limit:
        return b"".join(pieces_of(site.library.blobs.open(location)))
    return disk.read(digest, limit) if disk.size(digest) is not None else None


def _open(directory: Path, digest: str) -> int:
    path = medium.object_path(directory, digest)
    try:
        return os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        what = f"the bundle lacks {path.relative_to(directory)}, or it cannot be read: {error.strerror}"
        raise Mismatch(what, do="copy it again from the mirror", reason="bundle_incomplete") from error


def _altered(digest: str) -> Mismatch:
    name = medium.object_path(Path(), digest)
    return Mismatch(
        f"{name} was altered: its bytes do not match its digest",
        expected=digest,
        do="copy it again from the mirror; nothing was imported",
        reason="bundle_object",
    )


def _read_verified(directory: Path, digest: str, size: int, limit: int) -> bytes:
    """A manifest or document from the medium, in memory; raises Mismatch naming its file."""
    if size > limit:
        raise Mismatch(f"{medium.object_path(Path(), digest)} has {size} bytes", expected=f"at most {limit} for a manifest", reason="bundle_object")
    with os.fdopen(_open(directory, digest), "rb") as source:
        raw = source.read(size + 1)
    if len(raw) != size or digest_of(raw) != digest:
        raise _altered(digest)
    return raw


def _copy(disk: Disk, directory: Path, digest: str, size: int, progress: Callable[[int], None]) -> int:
    """One blob into the store, hashed while it is copied; what an earlier run made durable is not read again; the bytes read."""
    partial = disk.partial(digest, size)
    fd = _open(directory, digest)
    try:
        buffer = memoryview(bytearray(BUFFER))
        left = partial.missing()
        progress(size - sum(hi - lo for lo, hi in left))
        for lo, hi in left:
            at = lo
            while at < hi:
                n = os.preadv(fd, [buffer[: min(BUFFER, hi - at)]], at)
                if n == 0:
                    raise _altered(digest)
                partial.write(at, buffer[:n])
                at += n
                progress(n)
            partial.piece_done(lo, hi)
        partial.finish()
        return sum(hi - lo for lo, hi in left)
    except Mismatch as error:
        partial.abort()
        raise _altered(digest) from error
    except OSError as error:
        partial.abort(keep=True)
        raise Mismatch(
            f"{medium.object_path(Path(), digest)} cannot be read: {error.strerror}", do="check the medium", reason="bundle_object"
        ) from error
    finally:
        os.close(fd)
        partial.abort(keep=True)


# ---- the one transaction ----


def _add(conn: Connection, digest: str, size: int, location: str, dead: str = "", now: float = 0.0) -> None:
    """The row of a blob of which the bytes are stored; raises Conflict where the sweep is about to remove them.

    A row that still names the place `dead` gets the new one: what is left at the old place goes to the sweep.
    """
    held = catalog.add_blob(conn, digest, size, location, dead=dead)
    if catalog.in_garbage(conn, [held]):
        raise Conflict(f"{digest} was let go of in this moment", do="run the same command again", reason="swept")
    if dead and dead != held:
        catalog.add_garbage(conn, dead, 0, now + SURPLUS_S)


def _call(index: medium.BundleIndex, now: float) -> Call:
    return Call(Principal(key_id="site", org=""), None, f"import-{index.sender}-{index.sequence}", now)


def _take(site: Site, conn: Connection, index: medium.BundleIndex, papers: list[Found], now: float) -> list[Report]:
    """What became of the documents of the index; one that is refused stops nothing else, and serials decide whatever the bundle's age."""
    return site.documents.intake.take_all(conn, _call(index, now), papers, f"bundle {index.sender}/{index.sequence}")


def _store(
    site: Site,
    index: medium.BundleIndex,
    reached: medium.Closure,
    places: dict[str, str],
    dead: dict[str, str],
    now: float,
    papers: list[Found],
) -> tuple[list[str], list[Report]]:
    """All of it or nothing; the names whose requirements an administrator has set otherwise, and what became of the documents."""
    call = _call(index, now)
    kinds = {n.name: n for n in index.names}
    with site.catalog.writing() as conn:
        kept = upstream.left(conn, kinds)
        for digest in sorted(reached.blobs):
            _add(conn, digest, reached.blobs[digest], places[digest], dead.get(digest, ""), now)
        repos: dict[str, int] = {}
        for (name, _), manifest in reached.manifests.items():
            if name not in repos:
                named = kinds.get(name)
                repos[name] = _repository(conn, name, named.display if named else "", now)
            for blob in sorted({d.digest for d in manifest.blobs()}):
                catalog.link_blob(conn, repos[name], blob)
            catalog.add_manifest(conn, repos[name], manifest, at=0.0 if index.older else now, name=name)
        moved = 0
        for named in () if index.older else index.names:
            if not is_digest(named.ref):  # a digest as ref: the manifest travels without a tag (a referrer)
                moved += _move(site, conn, repos[named.name], named, reached.manifests[named.name, named.digest], now)
        site.audit.change(
            conn,
            call,
            "bundle_import",
            f"{index.sender}/{index.sequence}@{index.digest}",
            names=len(index.names),
            moved=moved,
            objects=len(index.objects),
            older=index.older,
        )
        said = upstream.add(conn, site.audit, call, index.upstream, index.sender, index.sequence, older=index.older, kept=kept)
        return said, _take(site, conn, index, papers, now)


def _repository(conn: Connection, name: str, display: str, now: float) -> int:
    """The repository of an imported name: of the organisation that its first segment says, else of the site and visible to every valid key."""
    org = catalog.owning_org(conn, check_name(name), make_at=now)
    return catalog.ensure_repository(conn, name, display=display, org=org, visibility="org" if org else "public", at=now)


def _move(site: Site, conn: Connection, repo_id: int, named: medium.BundleName, manifest: Manifest, now: float) -> int:
    """Points a ref at an imported manifest, a `.sig` tag at the union of both sides' signatures; 1 if it moved."""
    old = ref_of(conn, repo_id, named.ref)
    if old is not None and old.digest == named.digest:
        return 0
    if old is not None and trust.is_sig_tag(named.ref):
        manifest = _union(site, conn, repo_id, old, manifest)
        if manifest.digest == old.digest:
            return 0
    rule = catalog.Rule(over=old.digest if old else "")  # a push that comes in between is not overwritten: the import is run again
    catalog.add_manifest(conn, repo_id, manifest, refs=(named.ref,), at=now, name=named.name, rule=rule)
    return 1


def ref_of(conn: Connection, repo_id: int, ref: str) -> Manifest | None:
    """The manifest that a ref of a repository names, read inside the caller's transaction, which no other one of these reads joins before its end."""
    alone(conn, "ref", str(repo_id), ref)
    found = select(t.manifest.c.raw, t.manifest.c.media_type).join(t.ref, t.ref.c.manifest_id == t.manifest.c.id)
    row = conn.execute(found.where(t.ref.c.repo_id == repo_id, t.ref.c.name == ref)).first()
    return parse_manifest(bytes(row.raw), row.media_type) if row is not None else None


def judged(conn: Connection, repo_id: int, digest: str, verdict: str) -> bool:
    """Stores the verdict over a manifest in a repository; False where it stood there already."""
    link = t.repo_manifest
    ids = select(t.manifest.c.id).where(t.manifest.c.digest == digest).scalar_subquery()
    changed = update(link).where(link.c.repo_id == repo_id, link.c.manifest_id == ids, link.c.verdict != verdict).values(verdict=verdict)
    return conn.execute(changed).rowcount > 0


def _union(site: Site, conn: Connection, repo_id: int, ours: Manifest, theirs: Manifest) -> Manifest:
    """The `.sig` manifest with both sides' signatures; theirs byte for byte where it holds all of ours."""
    have = {(d.digest, d.annotations.get(trust.SIGNATURE)) for d in theirs.layers}
    if all((d.digest, d.annotations.get(trust.SIGNATURE)) in have for d in ours.layers):
        return theirs
    merged = trust.merge_signatures(ours.raw, trust.signature_layers(theirs))
    add_small(site, conn, repo_id, merged.blobs)
    return parse_manifest(merged.manifest)


def add_small(site: Site, conn: Connection, repo_id: int, blobs: dict[str, bytes]) -> None:
    """Stores small blobs that are in memory and links them into a repository, in the caller's transaction."""
    for digest, raw in sorted(blobs.items()):
        uploads = site.library.uploads
        location = uploads.store(Content(digest, OCTETS, len(raw), 0, len(raw), data=raw), digest, uploads.generation(digest))
        _add(conn, digest, len(raw), location)
        catalog.link_blob(conn, repo_id, digest)


def _receipt(site: Site, index: medium.BundleIndex, now: float, taken: list[Report]) -> str:
    refused = [{"digest": one["digest"], "reason": one["reason"]} for one in taken if one["state"] == "refused"]
    claims: dict[str, object] = {
        "iss": site.home.instance,
        "sub": f"sender:{index.sender}",
        "jti": str(uuid.uuid4()),
        "iat": int(now),
        "nbf": int(now),
        "exp": int(now) + RECEIPT_LIFE_S,
        "sequence": index.sequence,
        "index": index.digest,
        "documents": {"taken": len(taken) - len(refused), "refused": refused[:MAX_TOLD]},
    }
    key = site.home.release_key()
    pem = trust.public_pem(key)
    document = {"schema": 1, "receipt": trust.sign_jws(key, "receipt+jwt", claims), "key": {"kid": trust.kid(pem), "pem": pem}}
    return json.dumps(document, sort_keys=True) + "\n"
