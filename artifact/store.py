"""The abstract classes that every store, client, wrapper and test double implements: no HTTP, no SQL, no paths of a backend in them.

A wrapper lists its verbs explicitly; a verb added here must make it refuse, never leak.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Self

from artifact.grant import Decision, Principal


@dataclass(frozen=True)
class Call:
    """Who asks, what was decided, under which request id, at what time (seconds since 1970): the first argument of every verb."""

    principal: Principal
    decision: Decision | None = None
    request_id: str = ""
    now: float = 0.0
    redirect: bool = False  # whether this caller may be sent to the store's own URL
    warnings: set[str] = field(default_factory=set, compare=False)  # what its decisions say beside their yes; all copies of a call share it

    def under(self, decision: Decision) -> Self:
        """This call, allowed by a decision."""
        if decision.warning:
            self.warnings.add(decision.warning)
        return replace(self, decision=decision)


@dataclass(frozen=True)
class Descriptor:
    """An OCI content descriptor: media type, digest `alg:hex`, size in bytes (OCI image-spec, descriptor.md)."""

    media_type: str
    digest: str
    size: int
    artifact_type: str = ""
    annotations: dict[str, str] = field(default_factory=dict)

    def as_json(self) -> dict[str, object]:
        """The descriptor as a JSON object, absent fields left out."""
        out: dict[str, object] = {"mediaType": self.media_type, "digest": self.digest, "size": self.size}
        if self.artifact_type:
            out["artifactType"] = self.artifact_type
        if self.annotations:
            out["annotations"] = self.annotations
        return out


@dataclass(frozen=True)
class Content:
    """Bytes [lo, hi) of one object: exactly one of path, url, chunks or data says how they are to be sent."""

    digest: str
    media_type: str
    total: int
    lo: int
    hi: int
    path: Path | None = None
    url: str | None = None
    chunks: Iterator[bytes] | None = None
    data: bytes | None = None


@dataclass(frozen=True)
class Revision:
    """One commit of a model: repository name, commit id (40 hex), manifest digest, and the ref that led to it."""

    name: str
    display: str
    commit: str
    digest: str
    ref: str
    gated: bool = False
    private: bool = True
    at: float = 0.0


@dataclass(frozen=True)
class File:
    """One file of a revision: path, sha256 digest, bytes; git_oid is the git blob sha1 where known."""

    path: str
    digest: str
    size: int
    lfs: bool = False
    git_oid: str = ""


@dataclass(frozen=True)
class Change:
    """One change of a commit: a file put under a path by its digest, or with an empty digest removed; a path with a last `/` is a folder removed."""

    path: str
    digest: str = ""
    size: int | None = None  # None: that of the stored bytes
    lfs: bool = False


@dataclass(frozen=True)
class Page:
    """A bounded page of a listing; `after` is the cursor of the next page, empty at the end."""

    items: tuple[object, ...]
    after: str = ""


class Poured(ABC):
    """What a request's body is poured into."""

    def expect(self, size: int) -> None:
        """Says how many bytes this request brings, before they are read; raises Denied where they may not come."""
        return None

    @abstractmethod
    def write(self, view: bytes | memoryview) -> None:
        """Appends bytes; raises Unavailable when the disk is full."""

    @abstractmethod
    def suspend(self) -> None:
        """Makes the bytes so far durable, so that another process can go on behind them."""


class Upload(Poured):
    """A resumable write of one blob from `offset` on; every request ends by commit or suspend."""

    id: str
    offset: int

    @abstractmethod
    def commit(self, digest: str, size: int | None = None) -> Descriptor:
        """Makes the bytes visible under `digest`, or raises Mismatch and keeps nothing."""

    @abstractmethod
    def cancel(self) -> None:
        """Forgets the upload and its bytes."""


class Registry(ABC):
    """Content by name and digest (OCI distribution-spec v1.1 without HTTP)."""

    @abstractmethod
    def resolve(self, call: Call, repo: str, ref: str) -> Descriptor:
        """The manifest that a tag, branch or digest names; raises NotFound."""

    @abstractmethod
    def read(self, call: Call, repo: str, digest: str, lo: int = 0, hi: int | None = None) -> Content:
        """Bytes [lo, hi) of a blob or manifest; raises NotFound, RangeInvalid."""

    @abstractmethod
    def upload(self, call: Call, repo: str, *, digest: str | None = None, size: int | None = None, algorithm: str = "sha256") -> Upload:
        """Starts an upload."""

    @abstractmethod
    def resume(self, call: Call, repo: str, upload_id: str) -> Upload:
        """Continues a suspended upload of the same caller; raises NotFound."""

    @abstractmethod
    def push(
        self, call: Call, repo: str, raw: bytes, media_type: str, *, refs: Sequence[str] = (), expect: str | None = None, over: str | None = None
    ) -> Descriptor:
        """Stores a manifest byte for byte and moves `refs` to it, all or nothing; raises Invalid, NotFound for missing blobs, Conflict.

        With `over` each ref must name that digest now, or with an empty one nothing; else Conflict `moved`.
        """

    @abstractmethod
    def mount(self, call: Call, repo: str, digest: str, source: str) -> Descriptor | None:
        """Links a blob of `source` into `repo`; None when it is not there for this caller."""

    @abstractmethod
    def delete(self, call: Call, repo: str, ref: str) -> None:
        """Removes a ref, or a manifest or blob link by digest; raises NotFound."""

    @abstractmethod
    def list(self, call: Call, prefix: str = "", after: str = "", limit: int = 100) -> Page:
        """Repository names this caller may see, in byte order."""

    @abstractmethod
    def refs(self, call: Call, repo: str, after: str = "", limit: int = 100) -> Page:
        """Ref names of a repository, in byte order; raises NotFound."""

    @abstractmethod
    def referrers(self, call: Call, repo: str, digest: str, kind: str = "", after: str = "") -> Page:
        """Descriptors whose `subject` is `digest`, with artifact type and annotations pulled up."""


class Files(ABC):
    """A model's files by path: what the Hub and NGC doors need in one query."""

    @abstractmethod
    def revision(self, call: Call, repo: str, ref: str) -> Revision:
        """The revision that a branch, tag or commit id names; raises NotFound with reason `repo` or `revision`."""

    @abstractmethod
    def file(self, call: Call, repo: str, ref: str, path: str) -> tuple[Revision, File]:
        """One file of a revision; raises NotFound with reason `repo`, `revision` or `entry`."""

    @abstractmethod
    def files(self, call: Call, repo: str, ref: str, prefix: str = "", after: str = "", limit: int = 1000) -> tuple[Revision, Page]:
        """Files of a revision below `prefix`, in byte order."""

    @abstractmethod
    def commit(self, call: Call, repo: str, branch: str, parent: str | None, changes: Sequence[Change], title: str = "") -> Revision:
        """Puts a new revision on a branch: the parent's files with the changes; None is whatever the branch names, "" nothing.

        What changes nothing is the parent itself, so that a request may be repeated. Raises NotFound `revision`, `entry` or `manifest_blob`,
        Conflict `moved` or `immutable`, Denied, Invalid, TooLarge.
        """


class BlobStore(ABC):
    """Bytes by location, not by digest: a location carries a generation, so a late delete never hits a re-upload."""

    exclusive = False  # whether `writer` keeps a second one out by a lock; without it a request claims an upload by its row's generation

    @abstractmethod
    def stat(self, location: str) -> int | None:
        """Size in bytes, None when absent."""

    @abstractmethod
    def open(self, location: str, lo: int = 0, hi: int | None = None) -> Content:
        """Bytes [lo, hi) of an object; raises NotFound."""

    @abstractmethod
    def writer(self, upload_id: str, digest_hint: str | None = None, *, algorithm: str = "sha256", offset: int = 0, state: bytes = b"") -> BlobWriter:
        """Opens or continues the staging object of an upload at the offset and hash state of its row; raises Conflict while another holds it."""

    @abstractmethod
    def delete(self, location: str) -> None:
        """Removes an object; absent is not an error."""

    @abstractmethod
    def walk(self, after: str = "") -> Iterator[tuple[str, int]]:
        """Locations with sizes, in byte order, from behind `after`."""

    @abstractmethod
    def probe(self) -> dict[str, object]:
        """What the store can do, tried on it; raises Unavailable where it cannot be used."""

    @abstractmethod
    def sweep(self, keep: Collection[str], older_than: float) -> int:
        """Removes what uploads not in `keep` left behind before `older_than` (seconds since 1970); returns how many things went."""

    @abstractmethod
    def url(self, location: str, ttl_s: int, name: str) -> str | None:
        """A presigned URL, or None where the backend has none."""

    def beside(self, host: str) -> bool:
        """Whether its URLs are of this host or below it: Go's clients take `Authorization` along there, and a store refuses two proofs."""
        return False

    def location(self, digest: str, generation: int = 0) -> str:
        """Where publish puts a digest, unless the backend keeps the staging object as it is."""
        algorithm, _, text = digest.partition(":")
        return f"{algorithm}/{text[:2]}/{text}" + (f".g{generation}" if generation else "")

    def digest_of(self, location: str) -> str:
        """The digest that a location's bytes were published under: it is part of every location."""
        algorithm, _, rest = location.partition("/")
        return f"{algorithm}:{re.split('[.+]', rest.rpartition('/')[2], maxsplit=1)[0]}"


class BlobWriter(ABC):
    """The staging object of one upload: append, then publish under a digest."""

    offset: int

    @abstractmethod
    def write(self, view: bytes | memoryview) -> None:
        """Appends and hashes; raises Unavailable when the disk is full."""

    @abstractmethod
    def state(self) -> bytes:
        """What `writer` needs to continue at `offset`, opaque, at most 64 KiB, kept in the upload row; empty where nothing is needed."""

    @abstractmethod
    def digest(self) -> str:
        """The digest of the bytes [0, offset)."""

    @abstractmethod
    def sync(self) -> None:
        """Makes all written bytes durable."""

    @abstractmethod
    def publish(self, digest: str, generation: int = 0) -> str:
        """Verifies the digest, makes the bytes durable under their public location and returns it; raises Mismatch and keeps nothing.

        `generation` is another than 0 while an older location of the digest waits for its delayed delete.
        """

    @abstractmethod
    def discard(self) -> None:
        """Removes the staging object."""

    @abstractmethod
    def close(self) -> None:
        """Lets go of the staging object, which stays for the next request."""
