"""The cache directory of the runtime: its folders, what may lie in them, and stamps of files that were hashed (docs/operations.md, what it trusts).

Nothing is read, written or removed through a link in the cache: it would lead out of it. Correctness never depends on a lock: several containers may
use one cache, and what appears in it appears whole, by rename.
"""

from __future__ import annotations

import json
import os
import secrets
import stat
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from artifact.disk import Disk
from artifact.errors import AirlockError, Invalid, Unavailable
from runtime import mounts

ANSWER_S = 20.0
FOLDERS = ("blobs", "blobs/sha256", "blobs/sha512", "partial", "refs", "leases", "models", "stamps", "home")


def answers(cache: Path, most_s: float = ANSWER_S) -> None:
    """The file system of the cache answers a look and a write; raises Unavailable (reason cache) naming it.

    A hard NFS mount whose server is away waits for ever, and a look is answered from memory for a while.
    """
    done = threading.Event()

    def look() -> None:
        with suppress(OSError):
            os.stat(cache)  # noqa: PTH116 - as plain as it can be
            mounts.probe(cache)
        done.set()

    threading.Thread(target=look, daemon=True).start()
    if not done.wait(most_s):
        mount = mounts.of(os.path.normpath(cache), mounts.here())
        raise Unavailable(
            f"{cache} did not answer within {most_s:.0f} s" + (f": {mount.words()}" if mount else ""),
            expected="a file system that answers",
            do="see whether its server can be reached from this node; umount -f -l frees what waits",
            reason="cache",
        )


def check(cache: Path) -> None:
    """The cache directory exists and can be used, and its own folders are no links; raises Unavailable with owner and mode, or Invalid."""
    answers(cache)
    try:
        cache.mkdir(mode=0o755, parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise Unavailable(f"NIM_CACHE_PATH {cache} is no directory", expected="a directory", do="set NIM_CACHE_PATH", reason="cache") from error
    except OSError as error:
        what = f"NIM_CACHE_PATH {cache} cannot be made: {error.strerror} (we are uid {os.geteuid()}, gid {os.getegid()})"
        raise Unavailable(what, expected="a directory that we may write", do=f"chown {os.geteuid()} it on the host", reason="cache") from error
    if not os.access(cache, os.R_OK | os.X_OK):
        raise unusable(cache, "read")
    for name in FOLDERS:
        folders(cache, cache / name)


def folders(cache: Path, path: Path) -> None:
    """Every step below the cache down to `path` is a directory or absent; raises Invalid (reason cache) naming the step that is a link or a file.

    The cache's own path may be a link: the operator names it. What lies in it, others may have planted.
    """
    for step in (*reversed(path.relative_to(cache).parents[:-1]), path.relative_to(cache)):
        try:
            found = os.lstat(cache / step)
        except (FileNotFoundError, NotADirectoryError):
            return
        if not stat.S_ISDIR(found.st_mode):
            raise planted(cache / step, found.st_mode, "directory")


def blob(disk: Disk, digest: str) -> None:
    """At a blob's path lies a regular file or nothing, in directories of this cache; raises Invalid (reason cache) naming what does not belong."""
    path = disk.path(digest)
    folders(disk.root, path.parent)
    with suppress(FileNotFoundError):
        found = os.lstat(path)
        if not stat.S_ISREG(found.st_mode):
            raise planted(path, found.st_mode, "file")


def planted(path: Path, mode: int, wanted: str) -> Invalid:
    """The refusal of what somebody put where ours belongs."""
    kind = "a symbolic link" if stat.S_ISLNK(mode) else "a directory" if stat.S_ISDIR(mode) else f"no {wanted}"
    return Invalid(
        f"{path} in the cache is {kind}",
        expected=f"a plain {wanted} or nothing",
        do="look at who put it there, remove it and start again",
        reason="cache",
    )


def unusable(cache: Path, verb: str) -> Unavailable:
    """Names path, owner, mode and our uid: what a person needs for the chown."""
    found = cache.stat()
    mode = f"owner {found.st_uid}:{found.st_gid}, mode {found.st_mode & 0o7777:04o}"
    return Unavailable(
        f"NIM_CACHE_PATH {cache} cannot be {verb}: {mode}; we are {os.geteuid()}:{os.getegid()}",
        expected="a directory that we may read and write",
        do=f"on the host: chown {os.geteuid()}:{os.getegid()} it; on NFS without root squash, or by its owner",
        reason="cache",
    )


class Stamps:
    """What a blob's inode looked like when its bytes were last hashed; counted only from a directory that nobody else can write."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        with suppress(OSError):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            found = os.lstat(folder)
            self._ours = stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & 0o022
        except OSError:
            self._ours = False

    def _path(self, digest: str) -> Path:
        return self._folder / f"{digest.replace(':', '-')}.json"

    @staticmethod
    def _facts(path: Path, digest: str) -> list[object]:
        found = os.lstat(path)
        return [found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns, digest]

    def holds(self, digest: str, path: Path) -> bool:
        """Whether the file at `path` is the one that was hashed, untouched."""
        if not self._ours:
            return False
        try:
            found = os.lstat(self._path(digest))
            if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid():
                return False
            return bool(json.loads(self._path(digest).read_bytes()[:4096]) == self._facts(path, digest))
        except (OSError, ValueError):
            return False

    def record(self, paths: Mapping[str, Path]) -> None:
        """Notes files whose bytes were verified in this run. After linking: a new hard link changes the inode's ctime."""
        if not self._ours:
            return
        for digest, path in paths.items():
            if not self.holds(digest, path):
                with suppress(OSError):
                    write(self._path(digest), json.dumps(self._facts(path, digest)).encode())


def touch(target: Path) -> None:
    """Notes that a model is used now: eviction takes the one that was used longest ago."""
    with suppress(OSError):
        os.utime(target, follow_symlinks=False)


def write(path: Path, raw: bytes) -> None:
    """A small file, whole or not at all."""
    path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    try:
        temporary.write_bytes(raw)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def keep(write: Callable[[], object]) -> None:
    """A read-only cache is served as it is: what cannot be kept is verified again at the next start."""
    with suppress(OSError, AirlockError):
        write()
