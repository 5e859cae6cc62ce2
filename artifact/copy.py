"""Moving content: parallel resumable fetches into a Disk, the walk over a manifest graph, and the progress line.

Everything fetched is verified before it has a name; a manifest is stored after all it points at, so that a stored graph is a whole one.
Must not: know a protocol (callers hand over a stream or a Registry), fetch a durable piece again, or keep more than a buffer per stream in memory.
"""

from __future__ import annotations

import contextlib
import logging
import random
import threading
import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TextIO, cast

from artifact.digest import PIECE
from artifact.disk import Disk, Partial
from artifact.errors import AirlockError, Mismatch, NotFound, TooLarge, Unavailable, Unsupported
from artifact.manifest import MANIFEST_TYPES, MAX_MANIFEST_BYTES, digest_of, is_digest, parse_manifest
from artifact.remote import NOBODY_CALL
from artifact.store import Call, Descriptor, Page

log = logging.getLogger("airlock.copy")
CHECKPOINT = 16 * 1024 * 1024
SMALL = 4 * 1024 * 1024
MAX_GRAPH = 10_000
ATTEMPTS = 6  # without a byte of progress between them
Ranges = Callable[[int, int], Iterator[bytes]]


class Source(Protocol):
    """What copy_graph reads from: RemoteRegistry and every mirror source are one."""

    def read_manifest(self, repo: str, ref: str) -> tuple[Descriptor, bytes]: ...

    def stream(self, repo: str, digest: str, lo: int, hi: int) -> Iterator[bytes]: ...

    def referrers(self, call: Call, repo: str, digest: str, kind: str = "", after: str = "") -> Page: ...


class Progress:
    """Bytes, rate and time left: one redrawn line on a terminal, a line every ten seconds elsewhere; safe for several threads."""

    def __init__(self, total: int, label: str, stream: TextIO | None = None) -> None:
        self.total, self.label, self.done = total, label, 0
        self._stream, self._lock = stream, threading.Lock()
        self._tty = bool(stream and stream.isatty())
        self._begun = self._shown = time.monotonic()
        self._first = 0

    def add(self, count: int) -> None:
        """Counts bytes."""
        with self._lock:
            self.done += count
            now = time.monotonic()
            if self._stream and now - self._shown >= (0.2 if self._tty else 10):
                self._shown = now
                self._show(now, "\r" if self._tty else "\n")

    def close(self) -> None:
        """Shows the last state and ends the line."""
        with self._lock:
            if self._stream:
                self._show(time.monotonic(), "\n")
                self._stream = None

    def line(self, now: float) -> str:
        """The line as it is shown at a moment of the monotonic clock."""
        seconds = max(now - self._begun, 0.001)
        rate = self.done / seconds
        left = f"{(self.total - self.done) / rate:.0f} s left" if 0 < self.done < self.total else f"{seconds:.1f} s"
        part = f"{100 * self.done // self.total}%" if self.total else "100%"
        return f"{self.label}: {self.done / 1e6:.1f}/{self.total / 1e6:.1f} MB {part} {rate / 1e6:.1f} MB/s {left}"

    def _show(self, now: float, end: str) -> None:
        if self._stream:
            with contextlib.suppress(BrokenPipeError, ValueError):
                self._stream.write(("\r\x1b[K" if self._tty else "") + self.line(now) + ("\n" if end == "\n" else ""))
                self._stream.flush()


class Retry:
    """Backoff that forgives once bytes have moved: 0.2 s doubling to 10 s, with jitter; gives the error up after ATTEMPTS idle tries."""

    def __init__(self, stop: threading.Event) -> None:
        self._stop, self._idle = stop, 0

    def moved(self) -> None:
        self._idle = 0

    def failed(self, error: AirlockError) -> None:
        self._idle += 1
        if self._idle >= ATTEMPTS:
            raise error
        pause = min(0.2 * 2 ** (self._idle - 1), 10) * random.uniform(0.5, 1.5)  # noqa: S311 - jitter, no secret
        log.info("retry %d after %s", self._idle, error.what)
        self._stop.wait(pause)


def fetch(open_range: Ranges, digest: str, size: int, disk: Disk, progress: Progress | None = None, workers: int = 4) -> Path:
    """Brings an object into the disk by parallel ranged streams, resuming what an earlier process made durable.

    Raises Mismatch when the whole does not have the digest, Unavailable after idle retries, and whatever open_range raises for good.
    """
    if disk.size(digest) == size:
        if progress:
            progress.add(size)
        return disk.path(digest)
    if size <= SMALL and digest.startswith("sha256:"):
        return _small(open_range, digest, size, disk, progress)
    partial = disk.partial(digest, size)
    with _filling(open_range, partial, progress, workers):
        return partial.finish()


def fetch_unknown(
    open_range: Ranges, key: str, size: int, check: Callable[[Path], None], disk: Disk, progress: Progress | None = None, workers: int = 4
) -> str:
    """Brings an object whose digest nobody told into the disk and returns it; resumes under `key`, a digest of all that is known of the object.

    `check` looks at the whole file before it gets its name and raises where it is not what was meant: then nothing is kept. Raises as fetch does.
    """
    partial = disk.partial(key, size, known=False)
    with _filling(open_range, partial, progress, workers):
        try:
            check(partial.path)
        except Mismatch:
            partial.abort()
            raise
        partial.finish()
        return partial.digest


@contextlib.contextmanager
def _filling(open_range: Ranges, partial: Partial, progress: Progress | None, workers: int) -> Iterator[None]:
    """Fetches what is missing; afterwards, and where that fails, the bytes are kept unless they were published or dropped."""
    if progress:
        progress.add(partial.size - partial.missing_bytes())
    try:
        try:
            _parallel(open_range, partial, progress, workers)
        except Unsupported as error:
            if error.reason != "range_ignored":
                raise
            _sequential(open_range, partial, progress)
        yield
    finally:
        partial.abort(keep=True)  # nothing to do after finish


def _small(open_range: Ranges, digest: str, size: int, disk: Disk, progress: Progress | None) -> Path:
    """An object that fits into memory: one request, one write, no journal."""
    retry = Retry(threading.Event())
    raw = b""
    while True:
        try:
            raw = b"".join(bounded(open_range(0, size), size, digest)) if size else b""
            if len(raw) == size:
                break
            retry.failed(Unavailable(f"the source of {digest} ended after {len(raw)} of {size} bytes", do="try again"))
        except (Unavailable, OSError) as error:
            retry.failed(error if isinstance(error, Unavailable) else Unavailable(f"the connection broke ({type(error).__name__})", do="try again"))
    if digest_of(raw) != digest:
        what = f"{size} bytes have the digest {digest_of(raw)}"
        raise Mismatch(what, expected=digest, do="the source or the path to it is damaged; nothing was kept", digest=digest)
    disk.put(raw)
    if progress:
        progress.add(size)
    return disk.path(digest)


def bounded(parts: Iterator[bytes], size: int, digest: str) -> Iterator[bytes]:
    """The same parts; raises Mismatch as soon as they are more than `size` bytes."""
    have = 0
    for part in parts:
        have += len(part)
        if have > size:
            raise Mismatch(f"more than the {size} bytes of {digest}", expected=str(size), digest=digest)
        yield part


def _parallel(open_range: Ranges, partial: Partial, progress: Progress | None, workers: int) -> None:
    waiting = partial.missing()
    ranges = iter(waiting)
    lock, stop = threading.Lock(), threading.Event()
    failures: list[BaseException] = []

    def work() -> None:
        while not stop.is_set():
            with lock:
                lo, hi = next(ranges, (0, 0))
            if lo == hi:
                return
            try:
                _piece(open_range, partial, lo, hi, progress, stop)
            except BaseException as error:  # noqa: BLE001 - handed to the thread that waits, which raises it
                failures.append(error)
                stop.set()

    count = min(workers, len(waiting))
    if count <= 1:
        work()
    else:  # daemons, which an executor's threads are not: a program's end would wait for all that a thread of its own still fetches
        threads = [threading.Thread(target=work, daemon=True, name=f"fetch-{i}") for i in range(count)]
        for thread in threads:
            thread.start()
        try:
            for thread in threads:
                thread.join()
        finally:  # Ctrl-C: the file must not be closed below a thread that writes
            stop.set()
            for thread in threads:
                thread.join()
    if failures:
        raise failures[0]


def _piece(open_range: Ranges, partial: Partial, lo: int, hi: int, progress: Progress | None, stop: threading.Event) -> None:
    at, safe, retry = lo, lo, Retry(stop)
    while at < hi and not stop.is_set():
        try:
            with contextlib.closing(_generator(open_range(at, hi))) as parts:
                for part in parts:
                    if at + len(part) > hi:
                        raise Mismatch(f"more bytes than asked for of {partial.digest}", expected=f"{hi - lo}")
                    partial.write(at, part)
                    at += len(part)
                    retry.moved()
                    if progress:
                        progress.add(len(part))
                    if at - safe >= CHECKPOINT and at < hi:
                        partial.checkpoint(safe, at)
                        safe = at
                    if stop.is_set():
                        break
            if at < hi and not stop.is_set():
                retry.failed(Unavailable(f"the source of {partial.digest} ended after {at} of {hi} bytes", do="try again: it resumes"))
        except (Unavailable, OSError) as error:
            if isinstance(error, Unavailable) and error.reason == "disk_full":
                raise
            retry.failed(error if isinstance(error, Unavailable) else Unavailable(f"the connection broke ({type(error).__name__})", do="try again"))
    if at == hi:
        partial.piece_done(safe, hi)
    elif at > safe:
        partial.checkpoint(safe, at)


def _generator(parts: Iterator[bytes]) -> Generator[bytes, None, None]:
    """Any iterator as a generator, so that leaving early closes the stream below."""
    try:
        yield from parts
    finally:
        close = getattr(parts, "close", None)
        if close:
            close()


def _sequential(open_range: Ranges, partial: Partial, progress: Progress | None) -> None:
    """One stream from the first byte, for a server without ranges; what is durable is read past, not written again."""
    retry = Retry(threading.Event())
    while wanted := partial.missing():
        try:
            _pour(open_range(0, partial.size), partial, wanted, progress)
        except (Unavailable, OSError) as error:
            if partial.missing() != wanted:
                retry.moved()
            retry.failed(error if isinstance(error, Unavailable) else Unavailable(f"the connection broke ({type(error).__name__})", do="try again"))


def _pour(parts: Iterator[bytes], partial: Partial, wanted: list[tuple[int, int]], progress: Progress | None) -> None:
    at, queue, safe = 0, list(wanted), wanted[0][0]
    for part in parts:
        view = memoryview(part)
        while view and queue:
            lo, hi = queue[0]
            skip = min(max(lo - at, 0), len(view))
            at, view = at + skip, view[skip:]
            take = view[: hi - at]
            if not take:
                continue
            partial.write(at, take)
            at, view = at + len(take), view[len(take) :]
            if progress:
                progress.add(len(take))
            safe = max(safe, lo)
            if at == hi:
                partial.piece_done(safe, hi)
                queue.pop(0)
            elif at - safe >= CHECKPOINT:
                partial.checkpoint(safe, at)
                safe = at
                queue[0] = (at, hi)
        if not queue:
            return
    raise Unavailable(f"the source of {partial.digest} ended after {at} bytes", expected=str(partial.size), do="try again")


@dataclass(frozen=True)
class Copied:
    """A graph that is whole in the disk: root, every manifest copied, and extra names (signature tags; digests of referrers) with their manifests."""

    root: Descriptor
    manifests: tuple[Descriptor, ...]
    extra: tuple[tuple[str, Descriptor], ...]


def copy_graph(source: Source, repo: str, ref: str, disk: Disk, progress: Progress | None = None, workers: int = 4) -> Copied:
    """Copies a manifest with all it reaches inside its repository, leaves first, then its referrers and cosign `sha256-<hex>.sig` tags.

    What the disk holds is not fetched again; manifests are stored beside blobs by digest. Raises NotFound, Mismatch, TooLarge, Unsupported.
    """
    seen: dict[str, Descriptor] = {}
    root = _copy_manifest(source, repo, ref, disk, progress, workers, seen)
    extras: dict[str, Descriptor] = {}
    queue = list(seen)
    for digest in queue:
        page = source.referrers(NOBODY_CALL, repo, digest)
        names = [cast(Descriptor, d).digest for d in page.items] + [f"{digest.replace(':', '-')}.sig"]
        for name in names:
            if name in seen:
                continue
            before = len(seen)
            try:
                extras[name] = _copy_manifest(source, repo, name, disk, progress, workers, seen)
            except NotFound:
                if is_digest(name):
                    raise
            queue += list(seen)[before:]  # a signature of a referrer counts as well
    return Copied(root, tuple(seen.values()), tuple(extras.items()))


def _copy_manifest(
    source: Source, repo: str, ref: str, disk: Disk, progress: Progress | None, workers: int, seen: dict[str, Descriptor], depth: int = 0
) -> Descriptor:
    if depth > 8 or len(seen) > MAX_GRAPH:
        raise TooLarge(f"{repo} {ref} reaches too many manifests", expected=f"at most {MAX_GRAPH}, nested at most 8 deep")
    if is_digest(ref) and disk.size(ref) is not None:
        raw = disk.read(ref, MAX_MANIFEST_BYTES)
        manifest = parse_manifest(raw)
    else:
        found, raw = source.read_manifest(repo, ref)
        manifest = parse_manifest(raw, found.media_type)
    if is_digest(ref) and manifest.digest != ref:
        raise Unsupported(f"a manifest named by {ref[:6]}", expected="sha256", do="name it by its tag or its sha256 digest")
    descriptor = Descriptor(manifest.media_type, manifest.digest, len(raw), manifest.artifact_type, manifest.annotations)
    if manifest.digest in seen:
        return descriptor
    for child in manifest.manifests:
        if child.media_type in MANIFEST_TYPES and child.digest not in seen:
            _copy_manifest(source, repo, child.digest, disk, progress, workers, seen, depth + 1)
    blobs = {d.digest: d for d in manifest.blobs()}
    _copy_blobs(source, repo, list(blobs.values()), disk, progress, workers)
    disk.put(raw)
    seen[manifest.digest] = descriptor
    return descriptor


def _copy_blobs(source: Source, repo: str, blobs: list[Descriptor], disk: Disk, progress: Progress | None, workers: int) -> None:
    """Objects of one piece side by side, larger ones one after another with all streams on their pieces."""

    def one(blob: Descriptor, streams: int) -> None:
        fetch(lambda lo, hi: source.stream(repo, blob.digest, lo, hi), blob.digest, blob.size, disk, progress, streams)

    with ThreadPoolExecutor(max_workers=workers, thread_name_prefix="copy") as pool:
        waiting = [pool.submit(one, b, 1) for b in blobs if b.size <= PIECE]
        try:
            for task in waiting:
                task.result()
        finally:
            pool.shutdown(cancel_futures=True)
    for blob in blobs:
        if blob.size > PIECE:
            one(blob, workers)
