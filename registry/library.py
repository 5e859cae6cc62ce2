"""The verbs of Registry and Files over the catalog and a blob store: content by name and digest, each change in one transaction with its audit row.

It checks no right: a call whose decision is absent or a refusal is refused outright, and registry/guard.py is what makes the decision.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace

from artifact.card import MAX_CARD, README, facts_of
from artifact.errors import Conflict, Denied, Invalid, Mismatch, NotFound, RangeInvalid, TooLarge
from artifact.grant import PROFILES, Decision, Principal
from artifact.manifest import (
    COMMIT,
    EMPTY_BYTES,
    FACTS_TYPE,
    PARENT,
    SOURCE,
    TITLE,
    Manifest,
    build_model,
    check_digest,
    check_ref,
    files_of,
    is_commit,
    is_digest,
    own_type,
    parse_manifest,
)
from artifact.store import BlobStore, Call, Change, Content, Descriptor, File, Files, Page, Registry, Revision, Upload
from registry import catalog as c
from registry.audit import Audit
from registry.catalog import Catalog, Located, Repo
from registry.revising import Head, commit_of, revised, title_of
from registry.uploads import OCTETS, Uploads, ensure_repository
from registry.uploads import pieces_of as pieces_of

MAX_PAGE = 1000
URL_LIFE_S = 600  # a location waits longer than this for its removal
MAX_REFERRERS, MAX_REFERRER_BYTES = 1000, 4 * 1024 * 1024  # of one answer; the bytes are those of the manifests, which are read for it
GIT_FACT_BYTES = 10 * 1024 * 1024
MAIN = "main"
COMMIT_TRIES = 5  # of a commit on whatever a branch names, when others move it meanwhile


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


def damaged(repo: str, digest: str) -> NotFound:
    """The error for a blob whose bytes are missing or failed their verification."""
    words = f"the bytes of {digest} in {repo} are missing or failed verification, and are not served"
    return NotFound(words, do="push the file again, or import the bundle that brought it", reason="damaged")


def demand_model_name(repo: str) -> None:
    """Raises Invalid where a model's profiles have their place."""
    if repo.endswith(PROFILES):
        raise Invalid(f"{repo} is the place of a profile manifest", expected="a model under another name", reason="name")


class Library(Registry, Files):
    """This site's content; `call.decision` must be a yes for every verb."""

    def __init__(self, catalog: Catalog, blobs: BlobStore, audit: Audit, upload_ttl_s: float = 7 * 86400, blob_lease_s: float = 86400) -> None:
        self.catalog = catalog
        self.blobs = blobs
        self.audit = audit
        self.blob_lease_s = blob_lease_s
        self.uploads = Uploads(catalog, blobs, audit, upload_ttl_s, blob_lease_s)

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

    def content(self, repo: str, digest: str, found: Located | None, lo: int = 0, hi: int | None = None, *, redirect: bool = False) -> Content:
        """The bytes of what the catalog found, or where `redirect` allows it a URL of the store's own; raises NotFound, RangeInvalid."""
        if found is None or not found.digest:
            raise absent(repo, digest, found, "blob")
        end = found.size if hi is None else min(hi, found.size)
        if not 0 <= lo <= end or (lo == found.size and found.size and (lo, hi) != (found.size, found.size)):
            raise RangeInvalid(f"bytes {lo} to {hi} of an object of {found.size}", expected="a range inside the object")
        if found.raw is not None:
            return Content(digest, found.media_type, found.size, lo, end, data=found.raw[lo:end])
        if not found.location:
            raise damaged(repo, digest)
        url = self.blobs.url(found.location, URL_LIFE_S, "") if redirect else None
        if url is not None:
            return Content(digest, OCTETS, found.size, lo, end, url=url)
        got = self.blobs.open(found.location, lo, end)
        return Content(digest, OCTETS, found.size, lo, end, path=got.path, url=got.url, chunks=got.chunks, data=got.data)

    def upload(self, call: Call, repo: str, *, digest: str | None = None, size: int | None = None, algorithm: str = "sha256") -> Upload:
        """Starts an upload, hashed by SHA-256 and by the algorithm announced; raises Unsupported, Denied `quota` where the size is known."""
        self._demand(call)
        return self.uploads.begin(call, repo, digest=digest, size=size, algorithm=algorithm)

    def resume(self, call: Call, repo: str, upload_id: str) -> Upload:
        """Continues a suspended upload of the same caller; raises NotFound."""
        self._demand(call)
        return self.uploads.resume(call, repo, upload_id)

    def sweep_uploads(self, now: float) -> int:
        """Forgets uploads that nobody continued in time, with their bytes; one that is being written stays; returns how many went."""
        return self.uploads.sweep(now)

    def put(self, call: Call, repo: str, raw: bytes) -> Descriptor:
        """Stores one small blob at once; raises Unavailable."""
        upload = self.upload(call, repo)
        upload.write(raw)
        return upload.commit("sha256:" + hashlib.sha256(raw).hexdigest(), len(raw))

    def push(
        self, call: Call, repo: str, raw: bytes, media_type: str, *, refs: Sequence[str] = (), expect: str | None = None, over: str | None = None
    ) -> Descriptor:
        """Stores a manifest byte for byte and moves `refs` to it; `expect` is the digest it must have, `over` that which the refs name.

        Raises Invalid, Mismatch, NotFound `manifest_blob` for what was not pushed before, TooLarge, Conflict: `moved` where they name another one
        than `over`, `immutable`, `signatures` where a `.sig` tag would lose one without `over`.
        """
        self._demand(call)
        manifest = parse_manifest(raw, media_type, check_digest(expect).partition(":")[0] if expect else "sha256")
        if expect is not None and manifest.digest != expect:
            raise Mismatch(f"the manifest has digest {manifest.digest}", expected=expect, do="send it again", reason="digest")
        if own_type(manifest) != manifest.media_type:  # whoever pushed it first would decide what everybody else is served
            raise Invalid("the manifest has no mediaType", expected=f"one that says {manifest.media_type}, as Docker's must", reason="manifest")
        if c.kind_of(manifest) == "model":
            demand_model_name(repo)
            self.fill_facts(manifest)

        def work(conn: c.Connection) -> Descriptor:
            repo_id = ensure_repository(conn, call, repo)
            c.check_quota(conn, repo, manifest.digest, len(raw))
            rule = c.Rule(call.decision is not None and call.decision.action == "create", over, keeps=True)
            out = c.add_manifest(conn, repo_id, manifest, refs=refs, at=call.now, name=repo, key_id=call.principal.key_id, rule=rule)
            self.audit.change(conn, call, "push", f"{repo}@{manifest.digest}", refs=[*refs][:20])
            return out

        return self.catalog.change(work)

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
        return b"".join(pieces_of(self.blobs.open(location)))

    def mount(self, call: Call, repo: str, digest: str, source: str) -> Descriptor | None:
        """Links a blob of `source` into `repo`; None when it is not there."""
        self._demand(call)
        found = self.catalog.find(source, check_digest(digest))
        if found is None or not found.location:
            return None

        def work(conn: c.Connection) -> None:
            repo_id = ensure_repository(conn, call, repo)
            c.check_quota(conn, repo, found.digest, found.size)
            c.link_blob(conn, repo_id, found.digest, lease_until=call.now + self.blob_lease_s)
            self.audit.change(conn, call, "mount", f"{repo}@{digest}", source=source)

        try:
            self.catalog.change(work)
        except NotFound:  # the sweep took it in this moment
            return None
        return Descriptor(OCTETS, digest, found.size)

    def leasable(self, call: Call, found: Located) -> bool:
        """Whether this is a blob of whose lease less than half is left."""
        return bool(found.location) and found.lease_until - call.now < self.blob_lease_s / 2

    def lease(self, call: Call, found: Located) -> bool:
        """Leases a blob again; False where the sweep took it."""
        with self.catalog.writing() as conn:
            return c.refresh_lease(conn, found.repo.id, found.digest, call.now + self.blob_lease_s)

    def delete(self, call: Call, repo: str, ref: str, check: Callable[[c.Connection, Repo], None] = lambda conn, found: None) -> None:
        """Removes a ref, or a manifest or blob link by digest; the bytes stay until they are swept; raises NotFound, Conflict, as `check` does."""
        self._demand(call)
        found = self.catalog.repository(repo)
        if found is None:
            raise absent(repo, ref, None)
        who = call.principal.key_id

        def work(conn: c.Connection) -> None:
            if is_digest(ref):
                check(conn, found)
                done = c.unlink_manifest(conn, found.id, ref, call.now, key_id=who) or c.unlink_blob(conn, found.id, ref, call.now)
            else:
                done = c.delete_ref(conn, found.id, ref, at=call.now, key_id=who)
            if not done:
                raise NotFound(f"{repo} has no {ref}", reason="blob" if is_digest(ref) else "manifest")
            self.audit.change(conn, call, "delete", f"{repo}@{ref}")

        self.catalog.change(work)

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
        """A page of referrers in what the catalog found, bounded in number and in bytes; raises NotFound, Invalid."""
        if found is None:
            raise absent(repo, digest, None)
        rows = self.catalog.referrers(found.id, check_digest(digest), kind, after, MAX_REFERRERS + 1)
        shown: list[str] = []
        size = 0
        for name, length in rows[:MAX_REFERRERS]:
            size += length
            if shown and size > MAX_REFERRER_BYTES:
                break
            shown.append(name)
        found_ = self.catalog.manifests(shown) if shown else []
        items = tuple(replace(d, annotations=parse_manifest(raw, d.media_type).annotations) for d, raw in found_)
        return Page(items, shown[-1] if shown and len(shown) < len(rows) else "")

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

    # ---- commits

    def commit(self, call: Call, repo: str, branch: str, parent: str | None, changes: Sequence[Change], title: str = "") -> Revision:
        """Puts a new revision on a branch, in one transaction with its audit row (artifact/store.py, Files.commit)."""
        self._demand(call)
        check_ref(branch)
        demand_model_name(repo)
        sized = [self._sized(repo, change) if change.digest and change.size is None else change for change in changes]
        tries = COMMIT_TRIES if parent is None else 1
        while True:
            tries -= 1
            try:
                return self._commit(call, repo, branch, parent, sized, title_of(title))
            except Conflict as error:
                if error.reason != "moved" or not tries:
                    raise

    def _sized(self, repo: str, change: Change) -> Change:
        found = self.catalog.find(repo, change.digest)
        if found is None or not found.location:
            raise NotFound(f"{repo} does not hold {change.digest}", expected="every file uploaded before", reason="manifest_blob")
        return replace(change, size=found.size)

    def _commit(self, call: Call, repo: str, branch: str, parent: str | None, changes: Sequence[Change], title: str) -> Revision:
        head = self._branch(repo, branch)
        if parent is not None and parent != head.commit:
            if head.parent == parent and self._repeats(repo, head, changes, title):
                return self._revision(repo, head.commit, branch)
            raise Conflict(f"{branch} is at {head.commit or 'nothing'} now", expected=parent or "no revision", do="look at it again", reason="moved")
        try:
            files = revised(head.files, changes)
        except NotFound:
            if head.parent and self._repeats(repo, head, changes, title):
                return self._revision(repo, head.commit, branch)
            raise
        if head.commit and files == head.files:
            return self._revision(repo, head.commit, branch)
        commit = commit_of(head.commit, files, title)
        manifest = parse_manifest(self._built(call, repo, files, head.commit, commit, title))
        self.fill_facts(manifest)

        def work(conn: c.Connection) -> None:
            repo_id = ensure_repository(conn, call, repo)
            c.check_quota(conn, repo, manifest.digest, len(manifest.raw))
            rule = c.Rule(call.decision is not None and call.decision.action == "create", head.own)
            who = call.principal.key_id
            c.add_manifest(conn, repo_id, manifest, refs=[branch], ref_kind="branch", at=call.now, name=repo, key_id=who, rule=rule)
            self.audit.change(conn, call, "push", f"{repo}@{manifest.digest}", refs=[branch], commit=commit)

        self.catalog.change(work)
        return self._revision(repo, commit, branch)

    def _revision(self, repo: str, commit: str, branch: str) -> Revision:
        found = self.catalog.locate(repo, commit)
        if found is None or not found.digest:
            raise absent(repo, commit, found, "revision")
        return replace(as_revision(found, branch), ref=branch)

    def _branch(self, repo: str, branch: str) -> Head:
        """What a branch names, nothing where the repository has none yet; raises NotFound `revision`, Invalid for what is no branch."""
        found = self.catalog.locate(repo, branch)
        if found is None or not found.digest:
            if branch == MAIN:
                return Head()
            raise NotFound(f"{repo} has no branch {branch[:100]}", do="create the branch first", reason="revision")
        own, kind = self.catalog.ref(found.repo.id, branch)
        if (not own and is_commit(branch)) or (kind == "tag" and branch != MAIN):
            raise Invalid(f"{branch[:100]} is no branch", expected="a branch", do="commit to main, or create a branch", reason="ref")
        return replace(self.head(repo, as_revision(found, branch)), own=own)

    def head(self, repo: str, revision: Revision) -> Head:
        """A revision with its files, read from its manifest."""
        found = self.catalog.find(repo, revision.digest)
        if found is None or found.raw is None:
            raise absent(repo, revision.digest, found, "revision")
        manifest = parse_manifest(found.raw, found.media_type)
        return Head(revision.commit, manifest.annotations.get(PARENT, ""), files_of(manifest))

    def _repeats(self, repo: str, head: Head, changes: Sequence[Change], title: str) -> bool:
        """Whether these changes of the head's parent are what made the head: the request came before, and its answer was lost."""
        before = self.catalog.locate(repo, head.parent) if head.parent else None
        if head.parent and (before is None or not before.digest):
            return False
        files = self.head(repo, as_revision(before, head.parent)).files if before else ()
        try:
            return commit_of(head.parent, revised(files, changes), title) == head.commit
        except NotFound:
            return False

    def _built(self, call: Call, repo: str, files: Sequence[File], parent: str, commit: str, title: str) -> bytes:
        """The manifest of a new revision, its facts layer and config stored; raises TooLarge `files`, Invalid."""
        source = f"push://{repo}"
        facts = facts_of(source, self._beginning(repo, next((f for f in files if f.path == README), None)))
        notes = {SOURCE: source, COMMIT: commit} | ({PARENT: parent} if parent else {}) | ({TITLE: title} if title else {})
        stored = self.put(call, repo, facts)
        self.put(call, repo, EMPTY_BYTES)
        try:
            return build_model(files, Descriptor(FACTS_TYPE, stored.digest, stored.size), notes)
        except TooLarge as error:
            raise TooLarge(error.what, expected=error.expected, reason="files") from error

    def _beginning(self, repo: str, readme: File | None) -> bytes:
        found = self.catalog.find(repo, readme.digest) if readme else None
        if found is None or not found.location:
            return b""  # a README that is not there is refused with the manifest
        return b"".join(pieces_of(self.blobs.open(found.location, 0, min(found.size, MAX_CARD))))


def _limit(limit: int) -> int:
    return max(0, min(limit, MAX_PAGE))


def as_revision(found: Located, ref: str) -> Revision:
    """The revision of a located manifest; raises NotFound `revision` where it is no model's."""
    if not found.commit:
        raise NotFound(f"{found.repo.name} at {ref} is not a model revision", reason="revision")
    repo = found.repo
    return Revision(repo.name, repo.display, found.commit, found.digest, ref, repo.gated, repo.subject.visibility != "public", found.at)
