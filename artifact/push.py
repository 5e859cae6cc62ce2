"""Pushing one file as a blob, resumable across processes: a journal of the upload's location, then 64 MiB chunks from where the registry says it is.

Must not: hold a chunk in memory, or trust an upload that another process began more than once (its digest decides).
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import threading
from pathlib import Path
from typing import IO, cast

from artifact.copy import SMALL, Progress, Retry
from artifact.digest import PIECE
from artifact.errors import Conflict, Invalid, Mismatch, NotFound, RangeInvalid, Unavailable, Unsupported
from artifact.manifest import check_digest
from artifact.remote import NOBODY_CALL, RemoteRegistry, RemoteUpload


class _Shown:
    """How far one push has been shown: a broken chunk takes the line back."""

    def __init__(self, progress: Progress | None) -> None:
        self._progress, self._at = progress, 0

    def at(self, offset: int) -> None:
        if self._progress:
            self._progress.add(offset - self._at)
        self._at = offset


class _Window:
    """Bytes [lo, hi) of an open file as the body of one request."""

    def __init__(self, fd: int, lo: int, hi: int, shown: _Shown, stop: threading.Event) -> None:
        self._fd, self._lo, self._hi, self._at, self._shown, self._stop = fd, lo, hi, lo, shown, stop

    def read(self, count: int = -1) -> bytes:
        if self._stop.is_set():
            raise Unavailable("the push was stopped", do="run it again: it resumes")
        left = self._hi - self._at
        part = os.pread(self._fd, left if count < 0 else min(count, left), self._at)
        if left and not part:
            raise Mismatch("the file became shorter while it was pushed", expected="a file that stays as it is")
        self._at += len(part)
        self._shown.at(self._at)
        return part

    def tell(self) -> int:
        return self._at - self._lo

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = self._lo + offset
        return offset


class _Slot:
    """The journal of one upload across processes: its location, under a lock; a second process on the same blob works without one."""

    def __init__(self, folder: Path, key: str) -> None:
        self._path = folder / f"{hashlib.sha256(key.encode()).hexdigest()[:40]}.json"
        self._fd, self._ours = -1, False
        # No place for a journal, or another push holds it: then this one cannot be resumed, and is right all the same.
        with contextlib.suppress(OSError):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._ours = os.fstat(self._fd).st_ino == os.lstat(self._path).st_ino

    def location(self) -> str:
        """Where the upload was, empty when none is known."""
        if not self._ours:
            return ""
        try:
            value = json.loads(os.pread(self._fd, 65_536, 0) or b"null")
        except ValueError:  # torn by a kill: start anew
            return ""
        found = value.get("location") if isinstance(value, dict) else None
        return found if isinstance(found, str) and found.startswith("/") else ""

    def note(self, location: str) -> None:
        """Remembers where the upload is."""
        if self._ours:
            raw = json.dumps({"location": location}).encode()
            os.pwrite(self._fd, raw.ljust(4096), 0)  # one block: never half old, half new in the page cache
            os.ftruncate(self._fd, max(4096, len(raw)))

    def close(self, done: bool) -> None:
        """Lets go; a finished upload leaves nothing."""
        if done and self._ours:
            self._path.unlink(missing_ok=True)
        if self._fd >= 0:
            os.close(self._fd)


def push_blob(
    remote: RemoteRegistry,
    repo: str,
    path: Path,
    digest: str,
    size: int,
    state_dir: Path,
    progress: Progress | None = None,
    stop: threading.Event | None = None,
) -> int:
    """Pushes a file as a blob unless the registry has it, continuing an upload that an earlier process began; returns the bytes sent.

    `stop` ends it between two buffers.
    Raises Mismatch when the file is not what `digest` says, Unavailable after idle retries, and what the registry refuses for good.
    """
    check_digest(digest)
    if remote.blob_size(repo, digest) is not None:
        if progress:
            progress.add(size)
        return 0
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    slot, done = _Slot(state_dir, f"{remote.base_url}\0{repo}\0{digest}"), False
    try:
        if os.fstat(fd).st_size != size:
            raise Mismatch(f"{path.name} changed its size while it was pushed", expected=f"{size} bytes")
        sent = _push(remote, repo, fd, digest, size, slot, _Shown(progress), stop or threading.Event())
        done = True
        return sent
    finally:
        slot.close(done)
        os.close(fd)


def _push(remote: RemoteRegistry, repo: str, fd: int, digest: str, size: int, slot: _Slot, shown: _Shown, stop: threading.Event) -> int:
    retry = Retry(stop)
    location, sent = slot.location(), 0
    continued = bool(location)
    while True:
        try:
            upload = remote.resume(NOBODY_CALL, repo, location) if location else remote.upload(NOBODY_CALL, repo)
        except (Unavailable, Conflict) as error:
            retry.failed(error)
            continue
        except (NotFound, Invalid, Unsupported, RangeInvalid):
            if not location:
                raise
            location = ""  # the registry has dropped that upload
            continue
        try:
            sent += _send_rest(upload, fd, digest, size, slot, retry, shown, stop)
            return sent
        except Mismatch:
            if not continued:
                raise Mismatch(
                    f"the file is no longer what was hashed as {digest}", expected=digest, do="push again, with files that stay as they are"
                ) from None
            location, continued = "", False  # an earlier process may have sent other bytes: once more from the first byte
        except (Unavailable, Conflict, RangeInvalid, NotFound, Invalid) as error:
            if stop.is_set():
                raise
            with contextlib.suppress(Unavailable):
                if remote.blob_size(repo, digest) is not None:
                    shown.at(size)
                    return sent  # the commit arrived, its answer did not
            retry.failed(error)
            keeps = isinstance(error, Unavailable | Conflict | RangeInvalid) and upload.offset <= size
            location = upload.id if keeps else ""


def _send_rest(upload: RemoteUpload, fd: int, digest: str, size: int, slot: _Slot, retry: Retry, shown: _Shown, stop: threading.Event) -> int:
    """What the registry does not hold yet, in chunks of 64 MiB, then the commit; small files go with the commit."""
    if upload.offset > size:
        raise RangeInvalid(f"the upload holds {upload.offset} bytes", expected=f"at most {size}")
    begun = upload.offset
    shown.at(begun)
    if size > SMALL:
        slot.note(upload.id)
        while upload.offset < size:
            lo, hi = upload.offset, min(upload.offset + PIECE, size)
            upload.send(cast(IO[bytes], _Window(fd, lo, hi, shown, stop)), hi - lo)
            slot.note(upload.id)
            shown.at(upload.offset)
            if upload.offset <= lo:
                raise RangeInvalid("the registry kept nothing of a chunk", expected=f"{hi} bytes")
            retry.moved()
    last = os.pread(fd, size - upload.offset, upload.offset)
    upload.commit(digest, size, last)
    shown.at(size)
    return size - begun
