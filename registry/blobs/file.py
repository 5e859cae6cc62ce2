"""Blobs as files of one data directory: the registry's default backend; a location is `<algorithm>/<2 hex>/<hex>[.g<generation>]` below `blobs/`.

A public file appears by rename after fsync and is never written again. It knows no repository, no key and no SQL.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import tempfile
from collections.abc import Collection, Iterator
from contextlib import suppress
from pathlib import Path

from artifact.digest import Hasher, new, update_fd
from artifact.errors import Conflict, Invalid, Mismatch, NotFound, RangeInvalid, Unavailable, Unsupported
from artifact.manifest import check_digest
from artifact.store import BlobStore, BlobWriter, Content
from registry.home import free_bytes

_LOCATION = re.compile(r"(sha256|sha512)/([0-9a-f]{2})/([0-9a-f]{64}|[0-9a-f]{128})(?:\.g[0-9]+)?\Z")
RESERVE, RESERVE_PART = 64 * 1024 * 1024, 50  # what uploads leave free, and on a small disk one in so many bytes: the database needs room
_UPLOAD = re.compile(r"[0-9a-zA-Z_-]{8,64}\Z")
OCTETS = "application/octet-stream"


def location_of(digest: str, generation: int = 0) -> str:
    """The location of a digest's bytes (docs/format.md section 5)."""
    algorithm, _, text = check_digest(digest).partition(":")
    return f"{algorithm}/{text[:2]}/{text}" + (f".g{generation}" if generation else "")


def open_blobs(url: str, data: Path) -> FileBlobs:
    """The store of a URL `file:`, which lies in the data directory; raises Invalid for another."""
    if url != "file:":
        raise Invalid(f"{url[:100]!r} is no place for blobs", expected="file: (the data directory), or s3://BUCKET")
    return FileBlobs(data)


class FileBlobs(BlobStore):
    """The BlobStore over a directory that holds `blobs/` and `partial/` on one file system."""

    exclusive = True

    def __init__(self, root: Path) -> None:
        self._blobs = root / "blobs"
        self._partial = root / "partial"
        for folder in (self._blobs, self._partial):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    def _path(self, location: str) -> Path:
        if not _LOCATION.match(location):
            raise Invalid(f"{location[:100]!r} is not a location", expected="<algorithm>/<2 hex>/<hex>[.g<generation>]")
        return self._blobs / location

    def stat(self, location: str) -> int | None:
        """Size in bytes, None when absent."""
        try:
            return _size(self._path(location))
        except OSError as error:
            raise _unavailable(error, "read", self._blobs) from error

    def open(self, location: str, lo: int = 0, hi: int | None = None) -> Content:
        """Bytes [lo, hi) as a path to send from; raises NotFound, RangeInvalid."""
        total = self.stat(location)
        if total is None:
            raise NotFound(
                "the bytes of this object are not in the store", do="restore blobs/ from the backup, or import the bundle again", reason="bytes"
            )
        end = total if hi is None else min(hi, total)
        if not 0 <= lo <= end:
            raise RangeInvalid(f"bytes {lo} to {hi} of an object of {total}", expected="a range inside the object")
        digest = location.split("/", 1)[0] + ":" + location.rsplit("/", 1)[1].split(".", 1)[0]
        return Content(digest, OCTETS, total, lo, end, path=self._path(location))

    def writer(self, upload_id: str, digest_hint: str | None = None, *, algorithm: str = "sha256", offset: int = 0, state: bytes = b"") -> FileWriter:
        """Opens or continues the staging file of an upload; bytes behind `offset` are dropped; raises Conflict, Unavailable, NotFound."""
        if not _UPLOAD.match(upload_id):
            raise Invalid(f"{upload_id[:80]!r} is not an upload id", expected="8 to 64 letters, digits, - and _")
        return FileWriter(self._blobs, self._partial / f"upload-{upload_id}", algorithm, offset, state)

    def delete(self, location: str) -> None:
        """Removes an object; absent is not an error."""
        self._path(location).unlink(missing_ok=True)

    def discard(self, upload_id: str) -> None:
        """Removes the staging file of an upload that nobody writes; absent is not an error."""
        if _UPLOAD.match(upload_id):
            (self._partial / f"upload-{upload_id}").unlink(missing_ok=True)

    def walk(self, after: str = "") -> Iterator[tuple[str, int]]:
        """Locations with sizes, in byte order, from behind `after`; raises Unavailable where the whole store is gone, which is no empty one."""
        if not self._blobs.is_dir():
            raise Unavailable(f"{self._blobs} is not there", do="look whether the disk of the data directory is mounted")
        for algorithm in ("sha256", "sha512"):  # a probe's file, or a file system's lost+found, may lie beside them
            for shard in _names(self._blobs / algorithm):
                if f"{algorithm}/{shard}/\U0010ffff" <= after:
                    continue
                for name in _names(self._blobs / algorithm / shard):
                    location = f"{algorithm}/{shard}/{name}"
                    if location > after and _LOCATION.match(location) and (size := self.stat(location)) is not None:  # None: deleted since
                        yield location, size

    def probe(self) -> dict[str, object]:
        """That bytes can be staged and published, and the room for them; raises Unavailable."""
        try:
            fd, name = tempfile.mkstemp(dir=self._partial, prefix="probe-")
            try:
                os.write(fd, b"probe")
                Path(name).rename(self._blobs / ".probe")
            finally:
                os.close(fd)
                for left in (Path(name), self._blobs / ".probe"):
                    left.unlink(missing_ok=True)
        except OSError as error:
            raise _unavailable(error, "write", self._partial) from error
        return {"backend": "file", "free_bytes": free_bytes(self._partial)}

    def sweep(self, keep: Collection[str], older_than: float) -> int:
        """Removes staging files last written before `older_than` (seconds since 1970) of uploads not in `keep`; returns how many went."""
        gone = 0
        for path in sorted(self._partial.glob("upload-*")):
            upload_id = path.name.removeprefix("upload-")
            with suppress(Conflict, Mismatch, FileNotFoundError):  # one that is being written stays; another was published or removed since
                if upload_id not in keep and path.stat().st_mtime < older_than:
                    fd = _open_locked(path, create=False)
                    path.unlink(missing_ok=True)
                    os.close(fd)
                    gone += 1
        return gone

    def url(self, location: str, ttl_s: int, name: str) -> str | None:
        """None: a file has no URL of its own."""
        return None


class FileWriter(BlobWriter):
    """One staging file, held under a lock so that two requests never write one upload."""

    def __init__(self, blobs: Path, path: Path, algorithm: str, offset: int, state: bytes) -> None:
        self._blobs, self._path = blobs, path
        self._fd = _open_locked(path, create=offset == 0)
        try:
            self._hasher = self._continue(algorithm, offset, state)
        except OSError as error:
            self._close()
            raise _unavailable(error, "continue", self._path.parent) from error
        except (Mismatch, Invalid, Unsupported):
            self._close()
            raise
        self.offset = offset
        self._durable = (algorithm, offset, state)  # what the upload's row knows
        self._trimmed = False

    def _trim(self) -> None:
        """Drops what lies behind the offset, not before the first change: whoever opened with an outdated row must harm nothing."""
        if not self._trimmed:
            os.ftruncate(self._fd, self.offset)
            self._trimmed = True

    def _continue(self, algorithm: str, offset: int, state: bytes) -> Hasher:
        if os.fstat(self._fd).st_size < offset:
            raise Mismatch("the staged bytes of this upload are gone", expected=f"{offset} bytes", do="start the upload again", reason="upload")
        if state:
            try:
                return new(algorithm, state, offset)
            except (Unsupported, Invalid):
                state = b""  # exported by another libcrypto: hash the staged bytes again
        hasher = new(algorithm)
        update_fd(hasher, self._fd, 0, offset)
        return hasher

    def write(self, view: bytes | memoryview) -> None:
        """Appends and hashes; raises Unavailable when the disk is full."""
        rest = memoryview(view).cast("B")
        self._demand_staged()
        try:
            self._trim()
            _demand_room(self._fd, len(rest))
            while len(rest):
                done = os.pwrite(self._fd, rest, self.offset)
                self._hasher.update(rest[:done])
                self.offset += done
                rest = rest[done:]
        except OSError as error:
            failed = _unavailable(error, "write", self._path.parent)
            self._give_back()
            raise failed from error

    def _demand_staged(self) -> None:
        if self._fd < 0:
            raise Unavailable("the staged bytes of this upload were given back to the disk", do="start the upload again", reason="disk_full")

    def _give_back(self) -> None:
        """Frees what this request took: nobody was told that those bytes are here, and a full disk would keep them until the upload expires."""
        algorithm, offset, state = self._durable
        if not offset:
            self.discard()
            return
        with suppress(OSError, Mismatch):
            os.ftruncate(self._fd, offset)
            self._hasher, self.offset = self._continue(algorithm, offset, state), offset

    def state(self) -> bytes:
        """The exported hash state of bytes [0, offset); empty when the library cannot export it."""
        return self._hasher.state()

    def digest(self) -> str:
        """The digest of the bytes [0, offset)."""
        return self._hasher.digest()

    def sync(self) -> None:
        """Makes all written bytes durable."""
        self._demand_staged()
        try:
            os.fsync(self._fd)
            _sync_folder(self._path.parent)
        except OSError as error:
            failed = _unavailable(error, "sync", self._path.parent)
            self._give_back()
            raise failed from error
        self._durable = (self._durable[0], self.offset, self._hasher.state())

    def close(self) -> None:
        """Lets go of the staging file; its bytes stay for the next request."""
        self._close()

    def publish(self, digest: str, generation: int = 0) -> str:
        """Verifies the digest, makes the bytes durable under their public location and returns it; raises Mismatch and keeps nothing."""
        self._demand_staged()
        if self._hasher.digest() != check_digest(digest):
            found = self._hasher.digest()
            self.discard()
            raise Mismatch(f"the uploaded bytes have digest {found}", expected=digest, do="send them again", reason="digest")
        location = location_of(digest, generation)
        target = self._blobs / location
        try:
            if _size(target) == self.offset:
                self.discard()  # an existing object is a valid object: one digest, one copy
                return location
            self._trim()
            os.fchmod(self._fd, 0o444)
            os.fsync(self._fd)
            if not target.parent.exists():
                target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                _sync_folder(target.parent.parent)
                _sync_folder(self._blobs)
            self._path.rename(target)
            _sync_folder(target.parent)
        except OSError as error:
            raise _unavailable(error, "publish", self._path.parent) from error
        self._close()
        return location

    def discard(self) -> None:
        """Removes the staging file."""
        self._path.unlink(missing_ok=True)
        self._close()

    def _close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return None


def _names(folder: Path) -> list[str]:
    """The names in a folder, sorted; none in what is no folder."""
    try:
        return sorted(path.name for path in folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []


def _open_locked(path: Path, create: bool) -> int:
    try:
        fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | (os.O_CREAT if create else 0), 0o600)
    except FileNotFoundError as error:
        raise Mismatch("the staged bytes of this upload are gone", do="start the upload again", reason="upload") from error
    except OSError as error:
        raise _unavailable(error, "open", path.parent) from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(fd)
        raise Conflict("another request writes this upload now", do="retry when it has ended", reason="upload") from error
    return fd


def _demand_room(fd: int, size: int) -> None:
    """Raises OSError ENOSPC where a write would go into the reserve."""
    disk = os.fstatvfs(fd)
    reserve = min(RESERVE, disk.f_blocks * disk.f_frsize // RESERVE_PART)
    if disk.f_bavail * disk.f_frsize - size < reserve:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _sync_folder(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _unavailable(error: OSError, verb: str, folder: Path) -> Unavailable:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return Unavailable(f"the disk of the data directory is full: {free_bytes(folder)} bytes free", do="free space and retry", reason="disk_full")
    if error.errno == errno.EXDEV:
        words = "blobs/ and partial/ lie on different file systems"
        return Unavailable(
            words, expected="one, since objects appear by rename", do="mount the disk as the data directory itself, or link both to it"
        )
    return Unavailable(f"the store cannot {verb}: {error.strerror}", do="look at the data directory's disk and permissions")
