"""A content-addressed directory: the registry's default backend, the mirror's staging and the runtime's cache (docs/format.md section 5).

A public name exists only for whole, verified, durable bytes; it appears by rename. Unfinished bytes lie under `partial/` beside a journal of what is
durable. Must not: trust a lock for correctness (two processes on one object only waste work), follow a symlink as an object, or read another writer's
partial bytes.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import secrets
import shutil
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

from artifact.digest import BUFFER, PIECE, Hasher, can_export, new, update_fd
from artifact.errors import AirlockError, Invalid, Mismatch, NotFound, TooLarge, Unavailable
from artifact.manifest import check_digest, digest_of

_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
_WRITE = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
_HEX = re.compile(r"[0-9a-f]{64}(?:[0-9a-f]{64})?\Z")
_FULL = (errno.ENOSPC, errno.EDQUOT)


def _sync_dir(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _write_all(fd: int, view: bytes | bytearray | memoryview, offset: int) -> None:
    rest = memoryview(view).cast("B")
    while rest:
        done = os.pwrite(fd, rest, offset)
        offset += done
        rest = rest[done:]


class Disk:
    """Objects by digest below one root directory."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def path(self, digest: str) -> Path:
        """The public path of a digest, whether or not it exists; raises Invalid."""
        algorithm, text = check_digest(digest).split(":", 1)
        return self.root / "blobs" / algorithm / text[:2] / text

    def size(self, digest: str) -> int | None:
        """Bytes of an object that is present and verified, else None; raises Invalid."""
        try:
            found = os.lstat(self.path(digest))
        except (FileNotFoundError, NotADirectoryError):
            return None
        return found.st_size if (found.st_mode & 0o170000) == 0o100000 else None

    def open(self, digest: str) -> int:
        """A read-only file descriptor of an object, for the caller to close; raises NotFound, Invalid."""
        path = self.path(digest)
        try:
            return os.open(path, _READ)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise NotFound(f"{digest} is not in the store", expected="an object that was fetched or imported", digest=digest) from error
        except OSError as error:
            raise Unavailable(f"{digest} cannot be opened: {error.strerror}", expected="a plain file", digest=digest) from error

    def read(self, digest: str, limit: int) -> bytes:
        """A small object's verified bytes; raises NotFound, TooLarge, Mismatch (the file rotted)."""
        fd = self.open(digest)
        try:
            size = os.fstat(fd).st_size
            if size > limit:
                raise TooLarge(f"{digest} has {size} bytes", expected=f"at most {limit}", digest=digest)
            raw = b"".join(iter(lambda: os.read(fd, BUFFER), b""))
            hasher = new(digest.split(":", 1)[0])
            hasher.update(raw)
            if hasher.digest() != digest:
                raise Mismatch(
                    f"the stored bytes of {digest} are damaged", expected="the digest", do="remove the file and fetch again", digest=digest
                )
            return raw
        except OSError as error:
            raise self.trouble(error, digest, 0, "reading") from error
        finally:
            os.close(fd)

    def put(self, raw: bytes) -> str:
        """Stores small bytes that are in memory and returns their digest; raises Unavailable when the disk is full."""
        digest = digest_of(raw)
        if self.size(digest) == len(raw):
            return digest
        folder = self._partials(digest, len(raw))
        temporary = folder / f"put.{os.getpid()}.{secrets.token_hex(8)}"
        fd = -1
        try:
            fd = os.open(temporary, _WRITE | os.O_EXCL, 0o600)
            _write_all(fd, raw, 0)
            self._publish(fd, temporary, digest)
        except OSError as error:
            raise self.trouble(error, digest, len(raw)) from error
        finally:
            if fd >= 0:
                os.close(fd)
                temporary.unlink(missing_ok=True)
        return digest

    def partial(self, digest: str, size: int, known: bool = True) -> Partial:
        """Opens or continues the unfinished object; raises Unavailable when the free space cannot hold what is missing.

        Where nobody told the digest (`known` false), `digest` is only the key of the unfinished one, and what it hashes to is its name.
        """
        check_digest(digest)
        folder = self._partials(digest, 0)
        partial = Partial(self, folder, digest, size, known)
        need, free = partial.missing_bytes(), shutil.disk_usage(folder).free
        if need > free:
            partial.abort(keep=True)
            raise Unavailable(
                f"no room for {digest}: {need} bytes needed, {free} free", expected="free space on the store's disk", do="free space, then run again"
            )
        return partial

    def link(self, digest: str, target: Path) -> None:
        """Puts an object at `target`: a hard link, or a copy where the file system refuses one; raises NotFound, Unavailable."""
        source = self.path(digest)
        if self.size(digest) is None:
            raise NotFound(f"{digest} is not in the store", digest=digest)
        temporary = target.with_name(f".{secrets.token_hex(8)}.linking")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(source, temporary, follow_symlinks=False)
            except OSError as error:
                if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP, errno.EACCES):
                    raise
                shutil.copyfile(source, temporary, follow_symlinks=False)
                temporary.chmod(0o444)
            temporary.replace(target)
        except OSError as error:
            raise self.trouble(error, digest, self.size(digest) or 0) from error
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink()  # still there after a failure, and after a rename onto another link to the same inode

    def walk(self) -> Iterator[tuple[str, int]]:
        """Digests with sizes, in byte order; names that are not digests (later generations, strangers) are passed over."""
        for algorithm in ("sha256", "sha512"):
            top = self.root / "blobs" / algorithm
            for folder in sorted(top.iterdir()) if top.is_dir() else ():
                for name in sorted(p.name for p in folder.iterdir()) if folder.is_dir() else ():
                    size = self.size(f"{algorithm}:{name}") if _HEX.match(name) else None
                    if size is not None and name.startswith(folder.name):
                        yield f"{algorithm}:{name}", size

    def delete(self, digest: str) -> None:
        """Removes an object; absent is not an error."""
        self.path(digest).unlink(missing_ok=True)

    def trouble(self, error: OSError, digest: str, need: int, verb: str = "writing") -> AirlockError:
        """The error a caller gets for a failed write or read: bytes needed and free when the disk is full."""
        if error.errno in _FULL:
            free = shutil.disk_usage(self.root).free
            what = f"the disk is full: {need} bytes needed for {digest}, {free} free"
            return Unavailable(
                what, expected="free space on the store's disk", do="free space, then run again: it resumes", reason="disk_full", digest=digest
            )
        return Unavailable(
            f"{verb} {digest} failed: {error.strerror or error}", expected="a store that works", do=f"check {self.root}", digest=digest
        )

    def _partials(self, digest: str, need: int) -> Path:
        folder = self.root / "partial"
        try:
            folder.mkdir(mode=0o755, parents=True, exist_ok=True)
        except OSError as error:
            raise self.trouble(error, digest, need) from error
        return folder

    def _publish(self, fd: int, temporary: Path, digest: str) -> Path:
        """fsync, mode 0444, rename, fsync of the directories: after this the name means whole and verified."""
        path = self.path(digest)
        fresh = not path.parent.is_dir()
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        os.fchmod(fd, 0o444)
        os.fsync(fd)
        temporary.replace(path)
        _sync_dir(path.parent)
        if fresh:
            for parent in list(path.parents)[1:4]:
                _sync_dir(parent)
        return path


class Partial:
    """One unfinished object: pieces are written in any order, recorded when durable, hashed in order, published whole. Safe for several threads."""

    def __init__(self, disk: Disk, folder: Path, digest: str, size: int, known: bool = True) -> None:
        if size < 0:
            raise Invalid(f"{digest} cannot have {size} bytes", expected="a size from 0")
        self.digest, self.size, self._disk, self._known = digest, size, disk, known
        self._algorithm = digest.split(":", 1)[0]
        self._durable: dict[int, int] = {}  # piece number -> bytes [start, value) of it are durable
        self._lock = threading.Lock()
        self._hasher: Hasher = new(self._algorithm)
        self._safe = (0, b"")  # the newest journalled (offset, state)
        self._fd = self._journal = -1
        key = digest.replace(":", "-")
        try:
            self._sweep(folder, key)
            self._fd, self.path = self._claim(folder, key)
            self._journal_path = self.path.with_name(self.path.name + ".journal")
            self._load()
            self._journal = self._rewrite()
        except OSError as error:
            self._close()
            raise disk.trouble(error, digest, size) from error

    def missing(self) -> list[tuple[int, int]]:
        """Ranges [lo, hi) that are not durable, each inside one 64 MiB piece, in order."""
        with self._lock:
            starts = ((i, max(i * PIECE, self._durable.get(i, 0))) for i in range(-(-self.size // PIECE)))
            return [(lo, self._end(i)) for i, lo in starts if lo < self._end(i)]

    def missing_bytes(self) -> int:
        """How many bytes are still to be written."""
        with self._lock:  # counted, not listed: a stranger may state any size
            return self.size - sum(to - i * PIECE for i, to in self._durable.items())

    def write(self, offset: int, view: bytes | bytearray | memoryview) -> None:
        """Writes bytes at an offset; they count only after checkpoint or piece_done. Raises Invalid, Unavailable when the disk is full."""
        length = memoryview(view).nbytes
        if offset < 0 or offset + length > self.size:
            raise Invalid(f"bytes up to {offset + length} of {self.digest}", expected=f"at most {self.size}")
        try:
            _write_all(self._fd, view, offset)
        except OSError as error:
            raise self._disk.trouble(error, self.digest, self.missing_bytes()) from error
        # Only the thread that owns this range can make the hash pass `offset` (other pieces end elsewhere), so the look without the lock is safe.
        if offset <= self._hasher.offset:
            with self._lock:
                if offset < self._hasher.offset:
                    self._rewind(offset)
                if offset == self._hasher.offset:
                    self._hasher.update(view)  # the bytes are in hand; what came out of order is read back from the page cache later

    def checkpoint(self, lo: int, to: int) -> None:
        """Makes bytes [lo, to) of one piece durable and records it, so that a resumed piece goes on from there."""
        piece = lo // PIECE
        start = max(piece * PIECE, self._durable.get(piece, 0))
        if lo > start or not lo <= to <= self._end(piece):
            raise Invalid(f"a checkpoint of [{lo}, {to}) that does not continue its piece at {start}", expected="bytes in order inside one piece")
        try:
            os.fdatasync(self._fd)
            with self._lock:
                self._durable[piece] = max(to, self._durable.get(piece, 0))
                done = self._durable[piece] == self._end(piece)
                self._note({"done": piece} if done else {"part": piece, "to": to})
                if done:
                    self._catch_up()
        except OSError as error:
            raise self._disk.trouble(error, self.digest, 0) from error

    def piece_done(self, lo: int, hi: int) -> None:
        """Makes a whole range of missing() durable (fdatasync) and records it in the journal."""
        if hi != self._end(lo // PIECE):
            raise Invalid(f"{hi} is not the end of a piece of {self.digest}", expected=str(self._end(lo // PIECE)))
        self.checkpoint(lo, hi)

    def finish(self) -> Path:
        """Verifies the whole digest and publishes; raises Invalid while pieces are missing, Mismatch after removing the bytes."""
        if self.missing():
            raise Invalid(f"{self.digest} is not complete", expected=f"{self.missing_bytes()} more bytes")
        try:
            with self._lock:
                if os.fstat(self._fd).st_size == self.size:
                    update_fd(self._hasher, self._fd, self._hasher.offset, self.size)
            if not self._known and self._hasher.offset == self.size:
                self.digest = self._hasher.digest()
            if self._hasher.digest() != self.digest or self._hasher.offset != self.size:
                self.abort()
                what = f"{self.size} bytes have the digest {self._hasher.digest()}"
                raise Mismatch(what, expected=self.digest, do="the source or the path to it is damaged; nothing was kept", digest=self.digest)
            path = self._disk._publish(self._fd, self.path, self.digest)
            self._journal_path.unlink(missing_ok=True)
        except OSError as error:
            raise self._disk.trouble(error, self.digest, 0) from error
        self._close()
        return path

    def abort(self, keep: bool = False) -> None:
        """Lets go of the object; its bytes are removed unless `keep`."""
        if self._fd < 0:
            return
        if not keep:
            self._journal_path.unlink(missing_ok=True)
            self.path.unlink(missing_ok=True)
        self._close()

    def _end(self, piece: int) -> int:
        return min((piece + 1) * PIECE, self.size)

    def _close(self) -> None:
        for fd in (self._journal, self._fd):
            if fd >= 0:
                os.close(fd)
        self._fd = self._journal = -1

    def _claim(self, folder: Path, key: str) -> tuple[int, Path]:
        """The shared partial if its lock is free, else a private one: then this process fetches for itself and the rename decides."""
        path = folder / key
        try:
            fd = os.open(path, _WRITE, 0o600)
        except PermissionError:  # a process died between mode 0444 and the rename
            fd = os.open(path, _READ)
            os.fchmod(fd, 0o600)
            os.close(fd)
            fd = os.open(path, _WRITE, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            ours, named = os.fstat(fd), os.lstat(path)
            if (ours.st_dev, ours.st_ino) == (named.st_dev, named.st_ino):
                return fd, path
        except OSError:
            pass  # held, published meanwhile, or a file system without locks: all of them mean a private name
        os.close(fd)
        while True:
            private = folder / f"{key}.{socket.gethostname()[:40].replace('/', '_')}.{os.getpid()}.{secrets.token_hex(4)}.private"
            fd = os.open(private, _WRITE | os.O_EXCL, 0o600)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                mine = os.fstat(fd).st_nlink > 0
            except BlockingIOError:  # another process sweeps, and took this one, not locked yet, for one that was left behind
                mine = False
            except OSError:
                mine = True  # a file system without locks, on which nobody sweeps
            if mine:
                return fd, private
            os.close(fd)

    @staticmethod
    def _sweep(folder: Path, key: str) -> None:
        """Removes private partials of this object whose writer on this host is gone (their locks died with it)."""
        for path in folder.glob(f"{key}.{socket.gethostname()[:40].replace('/', '_')}.*.private"):
            with contextlib.suppress(OSError):
                fd = os.open(path, _READ)
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    path.unlink()
                    path.with_name(path.name + ".journal").unlink(missing_ok=True)
                finally:
                    os.close(fd)

    def _load(self) -> None:
        """Reads the journal: what it says is durable counts, anything that does not fit means starting anew."""
        try:
            lines = self._journal_path.read_bytes().split(b"\n")[:-1]  # a torn last line is no record
        except FileNotFoundError:
            lines = []
        records = [r for r in map(_record, lines) if r]
        head = {"size": self.size, "digest": self.digest, "piece": PIECE}
        length = os.fstat(self._fd).st_size
        if not records or records[0] != head or length > self.size:
            os.ftruncate(self._fd, 0)
            return
        pieces = -(-self.size // PIECE)
        for record in records[1:]:
            piece, to = record.get("done", record.get("part")), record.get("to")
            if type(piece) is int and 0 <= piece < pieces:
                end = self._end(piece) if "done" in record else to
                if type(end) is int and piece * PIECE <= end <= min(self._end(piece), length):
                    self._durable[piece] = max(end, self._durable.get(piece, 0))
        prefix = self._prefix()
        for record in reversed(records):
            offset, state = record.get("hashed"), record.get("state")
            if type(offset) is int and isinstance(state, str) and 0 < offset <= prefix and can_export():
                with contextlib.suppress(AirlockError, ValueError):  # an unreadable state only costs hashing again
                    raw = bytes.fromhex(state)
                    self._hasher, self._safe = new(self._algorithm, raw, offset), (offset, raw)
                    return

    def _rewrite(self) -> int:
        """Writes the journal afresh, compact and whole, and opens it for appending."""
        records: list[dict[str, object]] = [{"size": self.size, "digest": self.digest, "piece": PIECE}]
        records += [{"done": i} if to == self._end(i) else {"part": i, "to": to} for i, to in sorted(self._durable.items())]
        if self._safe[1]:
            records.append({"hashed": self._safe[0], "state": self._safe[1].hex()})
        temporary = self._journal_path.with_name(self._journal_path.name + ".new")
        temporary.unlink(missing_ok=True)
        fd = os.open(temporary, _WRITE | os.O_EXCL | os.O_APPEND, 0o600)
        os.write(fd, b"".join(json.dumps(r, separators=(",", ":")).encode() + b"\n" for r in records))
        os.fdatasync(fd)
        temporary.replace(self._journal_path)
        return fd

    def _note(self, record: dict[str, object]) -> None:
        os.write(self._journal, json.dumps(record, separators=(",", ":")).encode() + b"\n")

    def _prefix(self) -> int:
        """How many bytes from the first on are durable, in whole pieces."""
        piece = 0
        while piece * PIECE < self.size and self._durable.get(piece, 0) == self._end(piece):
            piece += 1
        return min(piece * PIECE, self.size)

    def _catch_up(self) -> None:
        """Hashes up to the durable prefix, reading back what was written out of order, and journals the state."""
        prefix = self._prefix()
        if self._hasher.offset < prefix:
            update_fd(self._hasher, self._fd, self._hasher.offset, prefix)
        state = self._hasher.state() if self._hasher.offset == prefix else b""
        if state and prefix > self._safe[0]:
            self._safe = (prefix, state)
            self._note({"hashed": prefix, "state": state.hex()})

    def _rewind(self, offset: int) -> None:
        """Bytes that were already hashed are written again: go back to a state from before them."""
        if offset < self._safe[0] or not self._safe[1]:
            self._safe = (0, b"")
            self._hasher = new(self._algorithm)
        else:
            self._hasher = new(self._algorithm, self._safe[1], self._safe[0])


def _record(line: bytes) -> dict[str, object] | None:
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None
