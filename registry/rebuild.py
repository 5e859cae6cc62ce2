"""The index over content made again from what it was made of: manifests' own bytes and the objects in the store.

Here for the day on which a database from a backup meets a store of another day. It takes away no name, no manifest, no object and no grant: it
adopts objects without a row, derives edges, files and links again, and reports rows without bytes. What only the database knows (names, keys,
grants, audit) it cannot bring back.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field

from sqlalchemy import Connection, Table, delete, insert, select, update

from artifact.digest import new
from artifact.errors import AirlockError, Invalid, NotFound
from artifact.manifest import Manifest, files_of, parse_manifest
from artifact.store import BlobStore
from registry import catalog as c
from registry import links
from registry import tables as t
from registry.audit import Audit
from registry.library import local_call, pieces_of

PAGE = 200
MISSING, READY = "missing", "ready"
MAX_LISTED = 1000


@dataclass
class Report:
    """What a rebuild read and changed.

    `damaged` names manifests and objects that are not what their digest says, `missing` digests without bytes and the repositories that need them.
    """

    objects: int = 0
    bytes: int = 0
    adopted: int = 0
    manifests: int = 0
    repaired: int = 0
    damaged: list[str] = field(default_factory=list)
    missing: dict[str, list[str]] = field(default_factory=dict)
    missing_count: int = 0
    found_again: int = 0

    def as_json(self) -> dict[str, object]:
        """The report as a JSON object."""
        return dict(vars(self))


class Rebuild:
    """One run; safe beside a running server on either database."""

    def __init__(self, catalog: c.Catalog, blobs: BlobStore, audit: Audit, lease_s: float, progress: Callable[[int], None] = lambda n: None) -> None:
        self._catalog, self._blobs, self._audit = catalog, blobs, audit
        self._lease_s, self._progress = lease_s, progress

    def run(self, now: float) -> Report:
        """Objects first, then manifests, then what is missing; raises Unavailable when store or database does not answer."""
        report = Report()
        self._objects(report, now)
        self._manifests(report)
        self._bytes(report)
        with self._catalog.writing() as conn:
            facts = {"objects": report.objects, "adopted": report.adopted, "repaired": report.repaired, "missing": report.missing_count}
            self._audit.change(conn, local_call(now), "rebuild", "", **facts)
        return report

    def _objects(self, report: Report, now: float) -> None:
        """Rows for objects that the store holds and the database does not know: leased, so that the sweep takes what nobody claims."""
        page: list[tuple[str, int]] = []
        for location, size in self._blobs.walk():
            page.append((location, size))
            if len(page) == PAGE:
                self._adopt(report, page, now)
                page = []
        if page:
            self._adopt(report, page, now)

    def _adopt(self, report: Report, page: list[tuple[str, int]], now: float) -> None:
        """Takes up what no row names or a row misses, each hashed before: an interrupted copy lies under the right name too."""
        b = t.blob.c
        digests = {location: self._blobs.digest_of(location) for location, _ in page}
        with self._catalog.reading() as conn:
            waiting = links.in_garbage(conn, list(digests))
            found = conn.execute(select(b.digest, b.state, b.size).where(b.digest.in_(set(digests.values()))))
            rows = {row.digest: (row.state, row.size) for row in found}
        for location, size in page:
            report.objects += 1
            report.bytes += size
            self._progress(size)
            digest = digests[location]
            state, wanted = rows.get(digest, ("", size))
            if location in waiting or state == READY:
                continue
            if size != wanted or not self._whole(location, digest):
                report.damaged.append(f"{digest} at {location}")
                continue
            self._take(report, digest, size, location, now)

    def _whole(self, location: str, digest: str) -> bool:
        hasher = new(digest.partition(":")[0])
        try:
            for piece in pieces_of(self._blobs.open(location)):
                hasher.update(piece)
        except (NotFound, FileNotFoundError):
            return False
        return hasher.digest() == digest

    def _take(self, report: Report, digest: str, size: int, location: str, now: float) -> None:
        until = now + self._lease_s
        row = {"digest": digest, "size": size, "location": location, "lease_until": until, "gc_after": until}
        with self._catalog.writing() as conn:
            if links.in_garbage(conn, [location]):
                return
            report.adopted += _added(conn, t.blob, row)
            again = (t.blob.c.digest == digest, t.blob.c.state != READY)
            report.found_again += conn.execute(update(t.blob).where(*again).values(state=READY, location=location)).rowcount

    def _manifests(self, report: Report) -> None:
        m, after = t.manifest.c, 0
        while True:
            with self._catalog.reading() as conn:
                rows = conn.execute(select(m.id, m.digest, m.media_type, m.raw).where(m.id > after).order_by(m.id).limit(PAGE)).all()
            if not rows:
                return
            for row in rows:
                after = row.id
                report.manifests += 1
                algorithm, _, text = row.digest.partition(":")
                try:
                    if hashlib.new(algorithm, row.raw).hexdigest() != text:
                        raise Invalid("the bytes do not match the digest")
                    manifest = parse_manifest(row.raw, row.media_type)
                except AirlockError:
                    report.damaged.append(row.digest)
                    continue
                with self._catalog.writing() as conn:
                    report.repaired += _derive(conn, row.id, manifest)

    def _bytes(self, report: Report) -> None:
        """Rows whose bytes are not there: marked, so that a HEAD says so and a push of the same digest brings them back."""
        b, after = t.blob.c, ""
        while True:
            with self._catalog.reading() as conn:
                rows = conn.execute(select(b.digest, b.size, b.location, b.state).where(b.digest > after).order_by(b.digest).limit(PAGE)).all()
            if not rows:
                return
            for row in rows:
                after = row.digest
                if self._here(row.location, row.size):
                    continue
                with self._catalog.writing() as conn:
                    held = (b.digest == row.digest, b.location == row.location)
                    same = conn.execute(select(b.digest).where(*held).with_for_update()).first()
                    if not same or self._here(row.location, row.size):  # removed since it was read, or published: the bytes come before the row
                        continue
                    conn.execute(update(t.blob).where(*held, b.state == READY).values(state=MISSING))
                    report.missing_count += 1
                    if len(report.missing) < MAX_LISTED:
                        report.missing[row.digest] = _needed_by(conn, row.digest)

    def _here(self, location: str, size: int) -> bool:
        return bool(location) and self._blobs.stat(location) == size


def _added(conn: Connection, table: Table, row: dict[str, object]) -> int:
    """1 where the row is new; the count of rows of such an INSERT is unknown to PostgreSQL's driver."""
    return int(conn.execute(c.ignore_duplicates(conn, table).values(row).returning(table.c.digest)).first() is not None)


def _needed_by(conn: Connection, digest: str) -> list[str]:
    r, link = t.repository, t.repo_blob
    found = select(r.c.name).join(link, link.c.repo_id == r.c.id).where(link.c.digest == digest).order_by(r.c.name).limit(20)
    return list(conn.execute(found).scalars())


def _derive(conn: Connection, manifest_id: int, manifest: Manifest) -> int:
    """Edges, files and links of one manifest as its bytes say; 1 where anything differed."""
    named = sorted({d.digest for d in manifest.blobs()})
    held: dict[str, str] = {digest: digest for digest in conn.execute(select(t.blob.c.digest).where(t.blob.c.digest.in_(named))).scalars()}
    alias = t.blob_alias.c
    held |= {row.digest: row.blob for row in conn.execute(select(alias.digest, alias.blob).where(alias.digest.in_(named)))}
    loose = sorted({d.digest for d in manifest.own()} - set(named))  # need not be there: no row is made for them, and no link
    linked_here = select(t.repo_blob.c.digest).join(t.repo_manifest, t.repo_manifest.c.repo_id == t.repo_blob.c.repo_id)
    linked_here = linked_here.where(t.repo_manifest.c.manifest_id == manifest_id)
    kept = {d: d for d in conn.execute(linked_here.where(t.repo_blob.c.digest.in_(loose))).scalars()}
    far = select(alias.digest, alias.blob).where(alias.digest.in_(loose), alias.blob.in_(linked_here))
    kept |= {row.digest: row.blob for row in conn.execute(far)}
    for blob in (d for d in manifest.blobs() if d.digest not in held and d.digest.startswith("sha256:")):
        # A row without bytes stands for the link; the last step marks it missing, and a push or import fills it.
        row = {"digest": blob.digest, "size": blob.size, "location": "", "state": MISSING}
        conn.execute(c.ignore_duplicates(conn, t.blob).values(row))
        held[blob.digest] = blob.digest
    changed = _same_edges(conn, manifest_id, manifest, kept | held) + _same_files(conn, manifest_id, manifest)
    linked = list(conn.execute(select(t.repo_manifest.c.repo_id).where(t.repo_manifest.c.manifest_id == manifest_id)).scalars())
    for repo_id in linked:
        for digest in sorted(set(held.values())):
            changed += _added(conn, t.repo_blob, {"repo_id": repo_id, "digest": digest})
    return int(bool(changed))


def _same_edges(conn: Connection, manifest_id: int, manifest: Manifest, held: dict[str, str]) -> int:
    e = t.edge.c
    found = {(r.child_digest, r.kind, r.blob) for r in conn.execute(select(e.child_digest, e.kind, e.blob).where(e.parent_id == manifest_id))}
    wanted = links.edges_of(manifest, held)
    if found == {(digest, kind, blob) for (digest, kind), blob in wanted.items()}:
        return 0
    conn.execute(delete(t.edge).where(e.parent_id == manifest_id))
    rows = [{"parent_id": manifest_id, "child_digest": digest, "kind": kind, "blob": blob} for (digest, kind), blob in sorted(wanted.items())]
    if rows:
        conn.execute(insert(t.edge), rows)
    subject = manifest.subject.digest if manifest.subject else None
    facts = {"artifact_type": manifest.artifact_type, "subject": subject, "size": len(manifest.raw)}
    conn.execute(update(t.manifest).where(t.manifest.c.id == manifest_id).values(**facts))
    return 1


def _same_files(conn: Connection, manifest_id: int, manifest: Manifest) -> int:
    f = t.file.c
    files = files_of(manifest) if c.kind_of(manifest) == "model" else ()
    wanted = {(x.path, x.digest, x.size, x.lfs) for x in files}
    found = {
        (r.path, r.digest, r.size, bool(r.lfs)) for r in conn.execute(select(f.path, f.digest, f.size, f.lfs).where(f.manifest_id == manifest_id))
    }
    if found == wanted:
        return 0
    conn.execute(delete(t.file).where(f.manifest_id == manifest_id))
    conn.execute(insert(t.file), [{"manifest_id": manifest_id, "path": p, "digest": d, "size": s, "lfs": lfs} for p, d, s, lfs in sorted(wanted)])
    return 1
