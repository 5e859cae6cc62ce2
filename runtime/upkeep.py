"""The cache after the download: what it holds, whether its bytes are still right, what may go; and the scrub beside a running model.

Nothing here needs a registry, except to fetch again what was damaged. A model that runs is held by a shared lock on its directory; where a file
system has no locks, one that was used in the last hours is left alone. What is removed while somebody has it open lives until it is closed.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from artifact.digest import new
from artifact.disk import Disk
from artifact.errors import AirlockError, Unavailable
from artifact.manifest import MAX_MANIFEST_BYTES, files_of, parse_manifest
from artifact.store import File
from runtime import cache as place

log = logging.getLogger("airlock")
BLOCK = 1 << 20
YOUNG_S = 86400.0  # what no model names and is younger may belong to a download that goes on
RECENT_S = 4 * 3600.0  # of use, where no lock can tell
PASS_S = 6 * 3600.0  # between two passes of the scrub
FIRST_S = 60.0


@dataclass(frozen=True)
class Held:
    """A model in the cache: name, digest, directory, its files (none where its manifest is gone), when it was last used."""

    name: str
    digest: str
    path: Path
    files: tuple[File, ...]
    used: float

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes by digest, each once."""
        return {f.digest: f.size for f in self.files}


def models(cache: Path) -> list[Held]:
    """The models whose directories the cache holds, the one used longest ago first; links are passed over."""
    disk, top, found = Disk(cache), cache / "models", []
    for folder, folders, _ in os.walk(top):
        path = Path(folder)
        folders[:] = [name for name in folders if not (path / name).is_symlink() and not name.startswith(".")]
        if path != top and _begins(path.name):
            folders.clear()
            digest, files = _manifest(disk, path.name)
            with suppress(FileNotFoundError):  # another container evicted it since
                found.append(Held(str(path.parent.relative_to(top)), digest, path, files, path.stat().st_mtime))
    return sorted(found, key=lambda held: held.used)


def _begins(name: str) -> bool:
    """Whether a model's directory has this name: what its digest begins with."""
    return len(name) == 12 and set(name) <= set("0123456789abcdef")


def _manifest(disk: Disk, begins: str) -> tuple[str, tuple[File, ...]]:
    """The digest that begins so, and the files that its manifest names."""
    for algorithm in ("sha256", "sha512"):
        for path in (disk.root / "blobs" / algorithm / begins[:2]).glob(f"{begins}*"):
            digest = f"{algorithm}:{path.name}"
            with suppress(AirlockError):
                return digest, files_of(parse_manifest(disk.read(digest, MAX_MANIFEST_BYTES)))
    return begins, ()


@contextlib.contextmanager
def holding(path: Path) -> Iterator[None]:
    """Says for its life that a model is in use."""
    fd = -1
    try:
        with suppress(OSError):
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        yield
    finally:
        if fd >= 0:
            os.close(fd)


def in_use(held: Held, now: float) -> bool:
    """Whether a process holds the model, on this host or, where the file system carries locks, on another; or used it since it was listed."""
    try:
        fd = os.open(held.path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        if os.fstat(fd).st_mtime > held.used:  # by a start, which holds it once its engine is planned
            return True
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return now - held.used < RECENT_S
    finally:
        os.close(fd)
    return False


@dataclass(frozen=True)
class Evicted:
    """What was removed (or would be): models by name and digest, bytes given back, and those that stayed since they are in use."""

    models: tuple[str, ...]
    bytes: int
    busy: tuple[str, ...] = ()


def evict(cache: Path, enough: Callable[[int], bool], *, dry: bool = False) -> Evicted:
    """Removes what no model needs, then models, longest unused first, until `enough`(bytes given back so far); raises Unavailable (reason cache)."""
    if not os.access(cache, os.W_OK):
        raise Unavailable(f"{cache} cannot be written", expected="a cache that we may write", do="run it as the user that serves", reason="cache")
    disk, now = Disk(cache), time.time()
    left = models(cache)
    gone, busy, freed = [], [], 0
    if not enough(freed):
        freed += _orphans(disk, {d for held in left for d in (held.digest, *held.sizes)}, now, dry) + _leftovers(cache / "models", now, dry)
    for held in list(left):
        if enough(freed):
            break
        if in_use(held, now):
            busy.append(f"{held.name}@{held.digest}")
            continue
        if not dry:
            aside = held.path.with_name(f".{held.path.name}.{os.getpid()}.{secrets.token_hex(4)}.old")
            try:
                held.path.rename(aside)
            except FileNotFoundError:  # another container evicted it, or a start builds it anew: then its objects are still needed
                continue
            shutil.rmtree(aside, ignore_errors=True)
        left.remove(held)
        needed = {d for other in left for d in (other.digest, *other.sizes)}
        mine = held.sizes | {held.digest: disk.size(held.digest) or 0} if held.files else {}
        for digest in mine.keys() - needed:
            freed += disk.size(digest) or 0
            if not dry:
                disk.delete(digest)
                (cache / "stamps" / f"{digest.replace(':', '-')}.json").unlink(missing_ok=True)
        gone.append(f"{held.name}@{held.digest}")
    return Evicted(tuple(gone), freed, tuple(busy))


def _orphans(disk: Disk, needed: set[str], now: float, dry: bool) -> int:
    """Unfinished downloads that nobody goes on with, and large objects that no model names, both older than a day."""
    freed = 0
    for path in (disk.root / "partial").glob("*"):
        with suppress(OSError):
            found = path.lstat()
            if now - found.st_mtime > YOUNG_S and not _locked(path):
                freed += found.st_size
                if not dry:
                    path.unlink()
    for digest, size in list(disk.walk()):
        with suppress(OSError):
            if digest not in needed and size > MAX_MANIFEST_BYTES and now - disk.path(digest).lstat().st_mtime > YOUNG_S:
                freed += size
                if not dry:
                    disk.delete(digest)
    return freed


def _leftovers(top: Path, now: float, dry: bool) -> int:
    """Directories of a day ago that a killed start or eviction left beside a model's: their links hold bytes of objects that are gone."""
    freed = 0
    for folder, folders, _ in os.walk(top):
        hidden = [Path(folder, name) for name in folders if name.startswith(".") and _begins(name[1:13])]
        folders[:] = [name for name in folders if not name.startswith(".") and not _begins(name)]  # a model's own folders may be hidden ones
        for path in hidden:
            with suppress(OSError):
                if path.is_symlink() or now - path.stat().st_mtime < YOUNG_S:
                    continue
                found = [file.lstat() for file in path.rglob("*") if not file.is_dir()]
                freed += sum(file.st_size for file in found if file.st_nlink == 1)
                if not dry:
                    shutil.rmtree(path)
    return freed


def _locked(path: Path) -> bool:
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(fd)
    return False


def damaged(disk: Disk, digest: str, size: int, rest: Callable[[int], None] = lambda count: None) -> bool:
    """Whether an object's bytes are not those of its digest, read from the disk and not from memory; `rest` is told each block. Gone is damaged.

    Raises Unavailable where this process can open no more files: that says nothing of the object.
    """
    try:
        fd = disk.open(digest)
    except AirlockError as error:
        if isinstance(error.__cause__, OSError) and error.__cause__.errno in (errno.EMFILE, errno.ENFILE):
            raise
        return True
    try:
        if os.fstat(fd).st_size != size:
            return True
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        hasher = new(digest.split(":", 1)[0])
        while block := os.read(fd, BLOCK):
            hasher.update(block)
            rest(len(block))
        return hasher.digest() != digest
    except OSError:  # a sector that cannot be read any more
        return True
    finally:
        os.close(fd)


@dataclass
class Scrub:
    """A thread that reads a running model's files again, slowly, tells what is damaged and has it fetched again (`repair`, which raises)."""

    cache: Path
    held: Path
    files: tuple[File, ...]
    bytes_s: int
    repair: Callable[[File], None]
    first_s: float = FIRST_S
    pass_s: float = PASS_S
    read: int = 0
    passes: int = 0
    repaired: set[str] = field(default_factory=set)
    broken: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="airlock-scrub", daemon=True)

    def start(self) -> None:
        """Begins, unless the rate is 0."""
        if self.bytes_s:
            self._thread.start()

    def stop(self) -> None:
        """Ends it within a block."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(1.0)

    def _run(self) -> None:
        wait = self.first_s
        while not self._stopping.wait(wait):
            try:
                self.once()
            except Exception:  # whatever it is: what serves goes on, and the log has it
                log.exception("the scrub of the weights failed; it goes on")
            wait = self.pass_s

    def once(self) -> None:
        """One pass over all files."""
        disk = Disk(self.cache)
        for file in {f.digest: f for f in self.files}.values():
            if self._stopping.is_set():
                return
            if not damaged(disk, file.digest, file.size, self._rest):
                if not self._stopping.is_set():
                    self.broken.discard(file.path)
                continue
            if self._stopping.is_set():
                return
            log.error("the scrub found %s damaged on the disk (%s); it is fetched again", file.path, disk.path(file.digest))
            try:
                self.repair(file)
            except AirlockError as error:
                self.broken.add(file.path)
                log.error("%s cannot be fetched again: %s", file.path, error)
            else:
                self.broken.discard(file.path)
                self.repaired.add(file.path)
                log.warning("%s is whole again on the disk; what runs may have read the damaged bytes: restart it", file.path)
        self.passes += 1
        place.touch(self.held)

    def _rest(self, count: int) -> None:
        """Sleeps so that the reading keeps to its rate; ends the wait when stopped."""
        self.read += count
        self._stopping.wait(count / self.bytes_s)

    # ---- for the front, from any thread

    def warning(self) -> str:
        """What a client's operator should know, without names; empty when all is well."""
        if self.broken:
            return f"{len(self.broken)} file(s) of the weights are damaged on the disk and cannot be fetched again"
        if self.repaired:
            return f"{len(self.repaired)} file(s) of the weights were damaged on the disk and fetched again; restart this runtime"
        return ""

    def metrics(self) -> list[str]:
        """Lines of Prometheus text."""
        return [
            "# TYPE airlock_scrub_bytes_total counter",
            f"airlock_scrub_bytes_total {self.read}",
            "# TYPE airlock_scrub_passes_total counter",
            f"airlock_scrub_passes_total {self.passes}",
            "# TYPE airlock_scrub_damaged_files gauge",
            f'airlock_scrub_damaged_files{{state="repaired"}} {len(self.repaired)}',
            f'airlock_scrub_damaged_files{{state="broken"}} {len(self.broken)}',
        ]
