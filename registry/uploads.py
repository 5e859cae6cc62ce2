"""Uploads: their rows, staging objects and digests, and the one transaction that makes their bytes a leased blob of a repository.

Apart from registry/library.py since it alone writes bytes. Bytes are kept under SHA-256; another algorithm's digest is an alias of that blob.
It checks no right: the library's verbs, which call it, demand a decision.
"""

from __future__ import annotations

import hashlib
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial

from artifact.errors import AirlockError, Conflict, Denied, Mismatch, NotFound, RangeInvalid, Unavailable, Unsupported
from artifact.manifest import check_digest, check_name
from artifact.store import BlobStore, BlobWriter, Call, Content, Descriptor, Upload
from registry import catalog as c
from registry.audit import Audit
from registry.catalog import Catalog, UploadRow

OCTETS = "application/octet-stream"
ALGORITHMS = ("sha256", "sha512")
QUOTA_STEP = 64 * 1024 * 1024  # how far an upload of unknown length goes on before its organisation's quota is looked at again
SURPLUS_S = 3600.0  # longer than any request needs from the publication of bytes to their record
PATIENCE_S = 6.0  # for a database that restarts just when a blob's bytes are in their place


def pieces_of(content: Content) -> Iterator[bytes]:
    """The bytes of stored content, piece by piece."""
    if content.path is None:
        yield from (content.data,) if content.data is not None else content.chunks or ()
        return
    with content.path.open("rb") as file:
        file.seek(content.lo)
        left = content.hi - content.lo
        while left and (piece := file.read(min(left, 1024 * 1024))):
            left -= len(piece)
            yield piece


def ensure_repository(conn: c.Connection, call: Call, repo: str) -> int:
    """The repository's id, made by its first push: the first segment's organisation owns it, none owns an origin's name."""
    org = c.owning_org(conn, repo)
    return c.ensure_repository(conn, repo, org=org, visibility="org" if org else "public", at=call.now)


class _Swept(Exception):
    """Rolls a transaction back: the bytes that it names wait for their removal."""


class Uploads:
    """The uploads of one site: each becomes a blob, is cancelled, or expires."""

    def __init__(self, catalog: Catalog, blobs: BlobStore, audit: Audit, ttl_s: float, lease_s: float) -> None:
        self.catalog, self.blobs, self.audit = catalog, blobs, audit
        self.ttl_s, self.lease_s = ttl_s, lease_s

    def begin(self, call: Call, repo: str, *, digest: str | None, size: int | None, algorithm: str, upload_id: str | None = None) -> StoredUpload:
        """Starts an upload, hashed by SHA-256 and by the algorithm announced; raises Unsupported, Denied `quota` where the size is known."""
        if algorithm not in ALGORITHMS:
            raise Unsupported(f"uploads by {algorithm[:20]} are not accepted", expected=" or ".join(ALGORITHMS), reason="digest")
        row = UploadRow(upload_id or secrets.token_urlsafe(24), check_name(repo), call.principal.key_id, algorithm, 0, b"", 0)
        with self.catalog.writing() as conn:
            if size is not None:
                c.check_quota(conn, repo, digest or "", size)
            c.add_upload(conn, row, digest=check_digest(digest) if digest else "", size=size, at=call.now, ttl_s=self.ttl_s)
        return StoredUpload(self, call, row)

    def resume(self, call: Call, repo: str, upload_id: str) -> StoredUpload:
        """Continues a suspended upload of the same caller; raises NotFound."""
        row = self.catalog.upload(upload_id)
        if row is None or row.repo != repo or row.key_id != call.principal.key_id:
            raise NotFound("there is no such upload", do="start it again", reason="upload")
        return StoredUpload(self, call, row)

    def sweep(self, now: float) -> int:
        """Forgets uploads that nobody continued in time, with their bytes; one that is being written stays; returns how many went."""
        gone = 0
        for upload_id in self.catalog.expired_uploads(now):
            try:
                writer = self.blobs.writer(upload_id)
            except Conflict:
                continue
            with self.catalog.writing() as conn:
                dropped = c.drop_upload(conn, upload_id, expired=now)  # False: another replica continues it since the list was read
            if dropped:
                writer.discard()
            else:
                writer.close()
            gone += dropped
        return gone

    def publish(self, call: Call, repo: str, upload: StoredUpload, writer: BlobWriter, digest: str) -> Descriptor:
        """Makes an upload's bytes a blob of the repository, leased; raises Mismatch, Denied `quota`, Unavailable."""
        own, total = digest if digest.startswith("sha256:") else writer.digest(), writer.offset
        try:
            with self.catalog.reading() as conn:  # before the bytes are moved; once more below, where it counts
                c.check_quota(conn, repo, own, total, upload=upload.id)
        except Denied:
            writer.discard()
            raise
        generation = self.generation(own)
        location, dead = self._held(own, writer)
        if location:
            writer.discard()
        else:
            location = writer.publish(own, generation)
        try:
            if own != digest and not upload.proves(digest) and self._digest(location, "sha512") != digest:
                raise Mismatch("the uploaded bytes have another digest", expected=digest, do="send them again", reason="digest")
            while not self._patiently(partial(self._record, call, repo, upload.id, own, digest, total, location, dead)):
                generation += 1
                location = self.store(self.blobs.open(location), own, generation)
        except (Mismatch, Denied):
            self._leave(own, total, location, dead)
            raise
        except AirlockError:
            upload.let_go()  # its bytes have left the staging place: there is nothing to suspend, and the same bytes sent again find them
            raise
        return Descriptor(OCTETS, digest, total)

    def _held(self, digest: str, writer: BlobWriter) -> tuple[str, str]:
        """Where the store holds these very bytes already, else where the blob's row says so though they are gone; empty for neither."""
        with self.catalog.reading() as conn:
            location = c.blob_location(conn, digest)
        if not location or writer.digest() != digest:
            return "", ""
        return (location, "") if self.blobs.stat(location) == writer.offset else ("", location)

    def generation(self, digest: str) -> int:
        """The generation of the blob's row, else the first of which no bytes wait for their removal."""
        start = 0
        with self.catalog.reading() as conn:
            held = c.blob_location(conn, digest)
            while True:
                places = [self.blobs.location(digest, n) for n in range(start, start + 8)]
                taken = c.in_garbage(conn, places) if held not in places else set(places) - {held}
                free = next((n for n, place in enumerate(places) if place not in taken), None)
                if free is not None:
                    return start + free
                start += len(places)

    @staticmethod
    def _patiently(work: Callable[[], bool]) -> bool:
        """What `work` returns, tried for some seconds while the database is away: the whole blob would have to be sent again otherwise."""
        end = time.monotonic() + PATIENCE_S
        while True:
            try:
                return work()
            except Unavailable:
                if time.monotonic() > end:
                    raise
            time.sleep(0.25)

    def _record(self, call: Call, repo: str, upload_id: str, own: str, digest: str, total: int, location: str, dead: str) -> bool:
        """The one transaction of an upload; False, with nothing changed, where the bytes at the location wait for their removal.

        A row that still names the place `dead` gets the new one: what is left at the old place goes to the sweep.
        """
        until = call.now + self.lease_s
        with suppress(_Swept), self.catalog.writing() as conn:
            repo_id = ensure_repository(conn, call, repo)
            c.check_quota(conn, repo, own, total, upload=upload_id)
            held = c.add_blob(conn, own, total, location, lease_until=until, dead=dead)
            if held != location:
                c.add_garbage(conn, location, total, call.now + SURPLUS_S)  # another upload of these bytes was first
            elif c.in_garbage(conn, [location]):
                raise _Swept
            if dead and dead != held:
                c.add_garbage(conn, dead, 0, call.now + SURPLUS_S)
            if own != digest:
                c.add_alias(conn, digest, own)
            c.link_blob(conn, repo_id, own, lease_until=until)
            c.drop_upload(conn, upload_id)
            self.audit.change(conn, call, "upload", f"{repo}@{digest}", bytes=total)
            return True
        return False

    def _leave(self, digest: str, total: int, location: str, dead: str) -> None:
        """Leaves published bytes that nobody may have to the sweep: a row without link or lease."""
        with suppress(_Swept), self.catalog.writing() as conn:
            if c.add_blob(conn, digest, total, location, dead=dead) == location and c.in_garbage(conn, [location]):
                raise _Swept

    def _digest(self, location: str, algorithm: str) -> str:
        """The digest of stored bytes by another algorithm."""
        hasher = hashlib.new(algorithm)
        for piece in pieces_of(self.blobs.open(location)):
            hasher.update(piece)
        return f"{algorithm}:{hasher.hexdigest()}"

    def store(self, content: Content, digest: str, generation: int) -> str:
        """Publishes bytes that are at hand under a digest and a generation and returns the location, without a row; raises Mismatch, Unavailable."""
        writer = self.blobs.writer(secrets.token_urlsafe(24), None if generation else digest)  # the digest names a place of generation 0
        try:
            for piece in pieces_of(content):
                writer.write(piece)
        except (AirlockError, OSError):
            writer.discard()
            raise
        return writer.publish(digest, generation)


class StoredUpload(Upload):
    """An upload over its row and staging object, opened at the first write."""

    def __init__(self, uploads: Uploads, call: Call, row: UploadRow) -> None:
        self._uploads, self._call, self._row = uploads, call, row
        self._writer: BlobWriter | None = None
        # Its state cannot be stored: an upload that goes on in another request is read again at its end.
        self._announced = hashlib.new(row.algorithm) if row.algorithm != "sha256" and row.offset == 0 else None
        self.id = row.id
        self.offset = row.offset
        self._granted = row.offset  # how far the organisation's quota lets it go on for now

    def _open(self) -> BlobWriter:
        if self._writer is None:
            row = self._row
            fresh = self._uploads.catalog.upload(row.id)
            if fresh is None:
                raise NotFound("there is no such upload", do="start it again", reason="upload")
            if not self._uploads.blobs.exclusive:
                self._row = row = self._claim(row)
            try:
                writer = self._uploads.blobs.writer(row.id, offset=row.offset, state=row.state)
            except Mismatch as error:
                self._forget()
                raise NotFound("the bytes of this upload are gone", do="start it again", reason="upload") from error
            current = self._uploads.catalog.upload(row.id)  # read under the writer's lock: nobody can move it any more
            if current is None or (current.offset, current.generation) != (row.offset, row.generation):
                if current is None:
                    writer.discard()
                writer.close()
                raise RangeInvalid("another request moved this upload on", do="ask for its offset and continue there", reason="upload")
            self._writer = writer
        return self._writer

    def _claim(self, row: UploadRow) -> UploadRow:
        """The row as this request holds it: a slower one of another replica is told so here, or when it ends; raises RangeInvalid."""
        with self._uploads.catalog.writing() as conn:
            if not c.claim_upload(conn, row, self._call.now + self._uploads.ttl_s):
                raise RangeInvalid("another request moved this upload on", do="ask for its offset and continue there", reason="upload")
        return replace(row, generation=row.generation + 1)

    def expect(self, size: int) -> None:
        """Says that this request brings so many bytes; raises Denied `quota` before any of them is read."""
        self._grant(self.offset + size)

    def _grant(self, end: int) -> None:
        """Makes sure that the upload may have `end` bytes; raises Denied `quota`."""
        catalog, repo = self._uploads.catalog, self._row.repo
        with catalog.reading() as conn:
            most = c.check_staging(conn, repo, self.id, end)
        if most is not None:
            with catalog.writing() as conn:  # uploads beside this one see what it was granted
                most = c.check_staging(conn, repo, self.id, end)
                c.promise_upload(conn, self.id, end)
        self._granted = end + QUOTA_STEP if most is None else max(end, min(end + QUOTA_STEP, most))

    def write(self, view: bytes | memoryview) -> None:
        """Appends bytes at `offset`; raises Unavailable, Conflict while another request writes, RangeInvalid when one has written, Denied `quota`."""
        writer = self._open()
        end = writer.offset + memoryview(view).nbytes
        if end > self._granted:
            try:
                self._grant(end)
            except Denied:
                writer.discard()
                self._forget()
                raise
        writer.write(view)
        if self._announced is not None:
            self._announced.update(view)
        self.offset = writer.offset

    def commit(self, digest: str, size: int | None = None) -> Descriptor:
        """Makes the bytes visible under `digest`, or raises Mismatch and keeps nothing."""
        check_digest(digest)
        writer = self._open()
        try:
            if size is not None and size != writer.offset:
                writer.discard()
                raise Mismatch(f"the upload has {writer.offset} bytes", expected=f"{size} bytes", do="send them again", reason="size")
            if self._announced and self._announced.name == digest.partition(":")[0] and not self.proves(digest):
                writer.discard()
                raise Mismatch("the uploaded bytes have another digest", expected=digest, do="send them again", reason="digest")
            made = self._uploads.publish(self._call, self._row.repo, self, writer, digest)
        except (Mismatch, Denied):
            self._forget()
            raise
        self._writer = None
        return made

    def proves(self, digest: str) -> bool:
        """Whether the hash of an announced algorithm saw all bytes and found this digest."""
        hasher = self._announced
        return hasher is not None and digest == f"{hasher.name}:{hasher.hexdigest()}"

    def let_go(self) -> None:
        """Forgets the staging object, which was published or is gone."""
        self._writer = None

    def suspend(self) -> None:
        """Makes the bytes so far durable and lets go; raises Conflict when another request took the upload over."""
        if self._writer is None:
            return
        writer, self._writer = self._writer, None
        try:
            self._sync(writer)
            with self._uploads.catalog.writing() as conn:
                state = writer.state()
                if not c.advance_upload(conn, self._row, writer.offset, state, self._call.now + self._uploads.ttl_s):
                    raise Conflict("another request took this upload over", do="ask for its offset and continue there", reason="upload")
            self._row = replace(self._row, offset=writer.offset, state=state, generation=self._row.generation + 1)
        finally:
            writer.close()

    def _sync(self, writer: BlobWriter) -> None:
        try:
            writer.sync()
        except Unavailable:
            with suppress(AirlockError), self._uploads.catalog.writing() as conn:
                c.promise_upload(conn, self.id, self._row.offset)  # what did not come counts against no quota
            raise

    def cancel(self) -> None:
        """Forgets the upload and its bytes."""
        if self._writer is None:
            try:
                self._writer = self._open()
            except NotFound:
                self._writer = None  # gone already
        if self._writer is not None:
            self._writer.discard()
        self._forget()

    def _forget(self) -> None:
        self._writer = None
        with self._uploads.catalog.writing() as conn:
            c.drop_upload(conn, self.id)
