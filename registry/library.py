"""The verbs of Registry and Files over the catalog and a blob store: content by name and digest, each change in one transaction with its audit row.

It checks no right: a call whose decision is absent or a refusal is refused outright, and registry/guard.py is what makes the decision.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Sequence
from dataclasses import replace

from artifact.errors import Conflict, Denied, Invalid, Mismatch, NotFound, RangeInvalid, Unsupported
from artifact.grant import PROFILES, Decision, Principal
from artifact.manifest import Manifest, check_digest, check_name, files_of, is_digest, parse_manifest
from artifact.store import BlobStore, BlobWriter, Call, Content, Descriptor, File, Files, Page, Registry, Revision, Upload
from registry import catalog as c
from registry.audit import Audit
from registry.catalog import Catalog, Located, Repo, UploadRow

OCTETS = "application/octet-stream"
MAX_PAGE = 1000
GIT_FACT_BYTES = 10 * 1024 * 1024


def local_call(now: float, request_id: str = "") -> Call:
    """The call of a command that an administrator runs on the data directory itself."""
    return Call(Principal(key_id="local"), Decision(True, "local"), request_id, now)


def lfs_pointer_oid(digest: str, size: int) -> str:
    """The git object id of the LFS pointer file that stands for bytes of this SHA-256 (git-lfs specification, pointer format v1)."""
    text = f"version https://git-lfs.github.com/spec/v1\noid {digest}\nsize {size}\n".encode()
    return hashlib.sha1(b"blob %d\0" % len(text) + text, usedforsecurity=False).hexdigest()


def git_oid(raw: bytes) -> str:
    """The git object id of a file's bytes."""
    return hashlib.sha1(b"blob %d\0" % len(raw) + raw, usedforsecurity=False).hexdigest()


def with_oid(file: File) -> File:
    """The file as git knows it: an LFS file by its pointer's object id."""
    if not file.lfs or not file.digest.startswith("sha256:"):
        return file
    return File(file.path, file.digest, file.size, True, lfs_pointer_oid(file.digest, file.size))


def absent(repo: str, ref: str, located: Located | None, reason: str = "manifest") -> NotFound:
    """The error for a repository or a manifest that is not there."""
    if located is None:
        return NotFound(f"there is no repository {repo}", do="check the name", reason="repo")
    return NotFound(f"{repo} has no {ref}", do="airlock catalog show " + repo, reason=reason)


class Library(Registry, Files):
    """This site's content; `call.decision` must be a yes for every verb."""

    def __init__(self, catalog: Catalog, blobs: BlobStore, audit: Audit, upload_ttl_s: float = 7 * 86400) -> None:
        self.catalog = catalog
        self.blobs = blobs
        self.audit = audit
        self.upload_ttl_s = upload_ttl_s

    @staticmethod
    def _demand(call: Call) -> None:
        if call.decision is None or not call.decision.allow:
            raise Denied("nothing was decided about this request", do="go through the guard", reason="undecided")

    def _located(self, call: Call, repo: str, ref: str, reason: str = "manifest") -> Located:
        self._demand(call)
        found = self.catalog.locate(repo, ref)
        if found is None or not found.digest:
            raise absent(repo, ref, found, reason)
        return found

    def resolve(self, call: Call, repo: str, ref: str) -> Descriptor:
        """The manifest that a tag, commit or digest names; raises NotFound."""
        return self._located(call, repo, ref).descriptor()

    def read(self, call: Call, repo: str, digest: str, lo: int = 0, hi: int | None = None) -> Content:
        """Bytes [lo, hi) of a blob or manifest that is linked into the repository; raises NotFound, RangeInvalid."""
        self._demand(call)
        return self.content(repo, digest, self.catalog.find(repo, digest), lo, hi)

    def content(self, repo: str, digest: str, found: Located | None, lo: int = 0, hi: int | None = None) -> Content:
        """The bytes of what the catalog found; raises NotFound, RangeInvalid."""
        if found is None or not found.digest:
            raise absent(repo, digest, found, "blob")
        end = found.size if hi is None else min(hi, found.size)
        if not 0 <= lo <= end or (lo == found.size and found.size and (lo, hi) != (found.size, found.size)):
            raise RangeInvalid(f"bytes {lo} to {hi} of an object of {found.size}", expected="a range inside the object")
        if found.raw is not None:
            return Content(digest, found.media_type, found.size, lo, end, data=found.raw[lo:end])
        got = self.blobs.open(found.location, lo, end)
        return Content(digest, OCTETS, found.size, lo, end, path=got.path, url=got.url, chunks=got.chunks, data=got.data)

    def upload(self, call: Call, repo: str, *, digest: str | None = None, size: int | None = None, algorithm: str = "sha256") -> Upload:
        """Starts an upload; raises Unsupported for another algorithm than sha256."""
        self._demand(call)
        if algorithm != "sha256":
            raise Unsupported(f"uploads by {algorithm[:20]} are not accepted", expected="sha256", reason="digest")
        row = UploadRow(secrets.token_urlsafe(24), check_name(repo), call.principal.key_id, algorithm, 0, b"", 0)
        with self.catalog.writing() as conn:
            c.add_upload(conn, row, digest=check_digest(digest) if digest else "", size=size, at=call.now, ttl_s=self.upload_ttl_s)
        return StoredUpload(self, call, row)

    def resume(self, call: Call, repo: str, upload_id: str) -> Upload:
        """Continues a suspended upload of the same caller; raises NotFound."""
        self._demand(call)
        row = self.catalog.upload(upload_id)
        if row is None or row.repo != repo or row.key_id != call.principal.key_id:
            raise NotFound("there is no such upload", do="start it again", reason="upload")
        return StoredUpload(self, call, row)

    def sweep_uploads(self, now: float) -> int:
        """Forgets uploads that nobody continued in time, with their bytes; one that is being written stays; returns how many went."""
        gone = 0
        for upload_id in self.catalog.expired_uploads(now):
            try:
                self.blobs.writer(upload_id).discard()
            except Conflict:
                continue
            with self.catalog.writing() as conn:
                c.drop_upload(conn, upload_id)
            gone += 1
        return gone

    def put(self, call: Call, repo: str, raw: bytes) -> Descriptor:
        """Stores one small blob at once; raises Unavailable."""
        upload = self.upload(call, repo)
        upload.write(raw)
        return upload.commit("sha256:" + hashlib.sha256(raw).hexdigest(), len(raw))

    def push(self, call: Call, repo: str, raw: bytes, media_type: str, *, refs: Sequence[str] = (), expect: str | None = None) -> Descriptor:
        """Stores a manifest byte for byte and moves `refs` to it; `expect` is the digest it must have.

        Raises Invalid, Mismatch, NotFound `manifest_blob` for what was not pushed before, Conflict, TooLarge.
        """
        self._demand(call)
        manifest = parse_manifest(raw, media_type)
        if expect is not None and manifest.digest != check_digest(expect):
            if expect.startswith("sha512:"):
                raise Unsupported("manifests by sha512 are not accepted", expected="sha256", reason="digest")
            raise Mismatch(f"the manifest has digest {manifest.digest}", expected=expect, do="send it again", reason="digest")
        if c.kind_of(manifest) == "model":
            if repo.endswith(PROFILES):
                raise Invalid(f"{repo} is the place of a profile manifest", expected="a model under another name", reason="name")
            self.fill_facts(manifest)
        with self.catalog.writing() as conn:
            repo_id = self._ensure(conn, call, repo)
            out = c.add_manifest(conn, repo_id, manifest, refs=refs, at=call.now, name=repo)
            self.audit.change(conn, call, "push", f"{repo}@{manifest.digest}", refs=[*refs][:20])
        return out

    def fill_facts(self, manifest: Manifest) -> int:
        """Learns the git object ids of a model's plain files of at most 10 MiB, reading each once; returns how many were new."""
        wanted = {f.digest for f in files_of(manifest) if not f.lfs and f.size <= GIT_FACT_BYTES}
        unknown = self.catalog.unknown_facts(wanted) if wanted else []
        facts: list[tuple[str, str]] = []
        for digest, location in unknown:
            size = self.blobs.stat(location)
            if size is not None and size <= GIT_FACT_BYTES:  # the manifest's own word is not trusted with our memory
                facts.append((digest, git_oid(self._whole(location))))
        if facts:
            with self.catalog.writing() as conn:
                for digest, oid in facts:
                    c.add_fact(conn, digest, oid)
        return len(facts)

    def small(self, found: Located) -> bytes:
        """The whole bytes of a small blob that the catalog found."""
        return self._whole(found.location)

    def _whole(self, location: str) -> bytes:
        got = self.blobs.open(location)
        if got.path is not None:
            return got.path.read_bytes()
        return got.data if got.data is not None else b"".join(got.chunks or ())

    def _ensure(self, conn: c.Connection, call: Call, repo: str) -> int:
        """The repository's id, made by its first push: the first segment's organisation owns it, none owns an origin's name."""
        org = c.owning_org(conn, repo)
        return c.ensure_repository(conn, repo, org=org, visibility="org" if org else "public", at=call.now)

    def mount(self, call: Call, repo: str, digest: str, source: str) -> Descriptor | None:
        """Links a blob of `source` into `repo`; None when it is not there."""
        self._demand(call)
        found = self.catalog.find(source, check_digest(digest))
        if found is None or not found.location:
            return None
        with self.catalog.writing() as conn:
            c.link_blob(conn, self._ensure(conn, call, repo), digest)
            self.audit.change(conn, call, "mount", f"{repo}@{digest}", source=source)
        return Descriptor(OCTETS, digest, found.size)

    def delete(self, call: Call, repo: str, ref: str) -> None:
        """Removes a ref, or a manifest or blob link by digest; the bytes stay until they are swept; raises NotFound, Conflict."""
        self._demand(call)
        found = self.catalog.repository(repo)
        if found is None:
            raise absent(repo, ref, None)
        with self.catalog.writing() as conn:
            if is_digest(ref):
                done = c.unlink_manifest(conn, found.id, ref, call.now) or c.unlink_blob(conn, found.id, ref, call.now)
            else:
                done = c.delete_ref(conn, found.id, ref)
            if not done:
                raise NotFound(f"{repo} has no {ref}", reason="blob" if is_digest(ref) else "manifest")
            self.audit.change(conn, call, "delete", f"{repo}@{ref}")

    def list(self, call: Call, prefix: str = "", after: str = "", limit: int = 100) -> Page:
        """Repository names in byte order; the caller of this verb filters what may be seen."""
        self._demand(call)
        size = _limit(limit)
        names = [r.name for r in self.catalog.repositories(prefix, after, size, call.principal.org)]
        return Page(tuple(names), names[-1] if len(names) == size else "")

    def refs(self, call: Call, repo: str, after: str = "", limit: int = 100) -> Page:
        """Ref names of a repository, in byte order; raises NotFound."""
        self._demand(call)
        return self.refs_of(repo, self.catalog.repository(repo), after, limit)

    def refs_of(self, repo: str, found: Repo | None, after: str, limit: int) -> Page:
        """Ref names of what the catalog found; raises NotFound."""
        if found is None:
            raise absent(repo, "", None)
        size = _limit(limit)
        names = self.catalog.refs(found.id, after, size) if size else []
        return Page(tuple(names), names[-1] if names and len(names) == size else "")

    def referrers(self, call: Call, repo: str, digest: str, kind: str = "", after: str = "") -> Page:
        """Descriptors whose `subject` is `digest`, with artifact type and annotations; raises NotFound without the repository."""
        self._demand(call)
        return self.referrers_of(repo, self.catalog.repository(repo), digest, kind, after)

    def referrers_of(self, repo: str, found: Repo | None, digest: str, kind: str, after: str) -> Page:
        """Referrers in what the catalog found; raises NotFound, Invalid."""
        if found is None:
            raise absent(repo, digest, None)
        rows = self.catalog.referrers(found.id, check_digest(digest), kind, after, 100)
        items = tuple(Descriptor(media, d, size, kind_, parse_manifest(raw).annotations) for d, media, kind_, size, raw in rows)
        return Page(items, items[-1].digest if len(items) == 100 else "")

    def revision(self, call: Call, repo: str, ref: str) -> Revision:
        """The revision that a branch, tag, commit id or digest names; raises NotFound `repo` or `revision`."""
        return as_revision(self._located(call, repo, ref, "revision"), ref)

    def file(self, call: Call, repo: str, ref: str, path: str) -> tuple[Revision, File]:
        """One file of a revision, by one statement; raises NotFound `repo`, `revision` or `entry`."""
        self._demand(call)
        return self.file_of(repo, ref, path, self.catalog.file(repo, ref, path))

    def file_of(self, repo: str, ref: str, path: str, found: Located | None) -> tuple[Revision, File]:
        """The file of what the catalog found; raises NotFound `repo`, `revision` or `entry`."""
        if found is None or not found.digest:
            raise absent(repo, ref, found, "revision")
        if found.file is None:
            raise NotFound(f"{repo} has no file {path[:200]!r} at {ref}", reason="entry")
        return as_revision(found, ref), with_oid(found.file)

    def files(self, call: Call, repo: str, ref: str, prefix: str = "", after: str = "", limit: int = 1000) -> tuple[Revision, Page]:
        """Files of a revision below `prefix`, in byte order; raises NotFound `repo` or `revision`."""
        found = self._located(call, repo, ref, "revision")
        return as_revision(found, ref), self.files_page(found, prefix, after, limit)

    def files_page(self, found: Located, prefix: str, after: str, limit: int) -> Page:
        """A page of the files of what the catalog found."""
        size = _limit(limit)
        items = tuple(with_oid(f) for f in self.catalog.files(found.manifest_id, prefix, after, size))
        return Page(items, items[-1].path if items and len(items) == size else "")


def _limit(limit: int) -> int:
    return max(0, min(limit, MAX_PAGE))


def as_revision(found: Located, ref: str) -> Revision:
    """The revision of a located manifest; raises NotFound `revision` where it is no model's."""
    if not found.commit:
        raise NotFound(f"{found.repo.name} at {ref} is not a model revision", reason="revision")
    repo = found.repo
    return Revision(repo.name, repo.display, found.commit, found.digest, ref, repo.gated, repo.subject.visibility != "public", found.at)


class StoredUpload(Upload):
    """An upload over its row and staging object, opened at the first write."""

    def __init__(self, library: Library, call: Call, row: UploadRow) -> None:
        self._library, self._call, self._row = library, call, row
        self._writer: BlobWriter | None = None
        self.id = row.id
        self.offset = row.offset

    def _open(self) -> BlobWriter:
        if self._writer is None:
            row = self._row
            fresh = self._library.catalog.upload(row.id)
            if fresh is None:
                raise NotFound("there is no such upload", do="start it again", reason="upload")
            try:
                writer = self._library.blobs.writer(row.id, None, algorithm=row.algorithm, offset=row.offset, state=row.state)
            except Mismatch as error:
                self._forget()
                raise NotFound("the bytes of this upload are gone", do="start it again", reason="upload") from error
            current = self._library.catalog.upload(row.id)  # read under the writer's lock: nobody can move it any more
            if current is None or (current.offset, current.generation) != (row.offset, row.generation):
                if current is None:
                    writer.discard()
                writer.close()
                raise RangeInvalid("another request moved this upload on", do="ask for its offset and continue there", reason="upload")
            self._writer = writer
        return self._writer

    def write(self, view: bytes | memoryview) -> None:
        """Appends bytes at `offset`; raises Unavailable, Conflict while another request writes, RangeInvalid when one has written."""
        writer = self._open()
        writer.write(view)
        self.offset = writer.offset

    def commit(self, digest: str, size: int | None = None) -> Descriptor:
        """Makes the bytes visible under `digest`, or raises Mismatch and keeps nothing."""
        library, call, repo = self._library, self._call, self._row.repo
        check_digest(digest)
        if not digest.startswith("sha256:"):
            raise Unsupported("uploads by sha512 are not accepted", expected="sha256", reason="digest")
        writer = self._open()
        total = writer.offset
        try:
            if size is not None and size != total:
                writer.discard()
                raise Mismatch(f"the upload has {total} bytes", expected=f"{size} bytes", do="send them again", reason="size")
            location = writer.publish(digest)
        except Mismatch:
            self._forget()
            raise
        self._writer = None
        with library.catalog.writing() as conn:
            repo_id = library._ensure(conn, call, repo)
            c.add_blob(conn, digest, total, location)
            c.link_blob(conn, repo_id, digest)
            c.drop_upload(conn, self.id)
            library.audit.change(conn, call, "upload", f"{repo}@{digest}", bytes=total)
        return Descriptor(OCTETS, digest, total)

    def suspend(self) -> None:
        """Makes the bytes so far durable and lets go; raises Conflict when another request took the upload over."""
        if self._writer is None:
            return
        writer, self._writer = self._writer, None
        try:
            writer.sync()
            with self._library.catalog.writing() as conn:
                state = writer.state()
                if not c.advance_upload(conn, self._row, writer.offset, state, self._call.now + self._library.upload_ttl_s):
                    raise Conflict("another request took this upload over", do="ask for its offset and continue there", reason="upload")
            self._row = replace(self._row, offset=writer.offset, state=state, generation=self._row.generation + 1)
        finally:
            writer.close()

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
        with self._library.catalog.writing() as conn:
            c.drop_upload(conn, self.id)
