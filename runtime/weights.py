"""Released profiles and verified weights in the cache: what the registry sent or the cache holds is believed only after signature and digest.

Nothing here decides who may run what. A file that is present is hashed unless a stamp proves that it is the one that was hashed before; what that
does not catch (root of this host, who can set any time stamp) is said in docs/operations.md. Extra or changed files in a model directory make it be
built anew. Nothing is read, written or removed through a link in the cache: it would lead out of it.
"""

from __future__ import annotations

import os
import secrets
import shutil
import stat
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

from artifact import copy, trust
from artifact.digest import hash_fd
from artifact.disk import Disk
from artifact.errors import AirlockError, Invalid, Mismatch, NotFound, Unavailable
from artifact.manifest import (
    MAX_MANIFEST_BYTES,
    MODEL_TYPE,
    PROFILES_TYPE,
    canonical_json,
    digest_of,
    files_of,
    is_digest,
    parse_json,
    parse_manifest,
)
from artifact.profile import Pin, ProfileSet
from artifact.profile import parse as parse_profiles
from artifact.store import Descriptor, File
from runtime import cache as place
from runtime import content

PROFILES = "/profiles"
MAX_PAYLOAD = 1 << 20
Log = Callable[[str], None]


class Source(Protocol):
    """The part of artifact.remote.RemoteRegistry that is needed here."""

    def read_manifest(self, repo: str, ref: str) -> tuple[Descriptor, bytes]:
        """The manifest that a tag or digest names, with its raw bytes; raises NotFound, Denied, Unauthenticated, Unavailable."""

    def stream(self, repo: str, digest: str, lo: int, hi: int) -> Iterator[bytes]:
        """Bytes [lo, hi) of a blob; raises NotFound, Unavailable, RangeInvalid."""


@dataclass(frozen=True)
class Released:
    """A profile manifest with this site's release signature: its digest and the profiles in it."""

    digest: str
    profiles: ProfileSet


@dataclass(frozen=True)
class ModelDir:
    """A directory of verified files for an engine, and how many bytes were fetched, hashed again or trusted by a stamp."""

    path: Path
    digest: str
    files: int
    bytes: int
    fetched: int
    hashed: int
    stamped: int
    listed: tuple[File, ...] = ()


def released(source: Source | None, cache: Path, name: str, ref: str, keys: Mapping[str, str]) -> Released:
    """The promoted profile manifest of a model, from the registry or (source None) as it was cached; the signature is checked in both cases.

    Raises NotFound (reason not_visible is for the caller to say), Mismatch with reason not_promoted, Unavailable when nothing is cached.
    """
    disk, repo = Disk(cache), name + PROFILES
    note = cache / "refs" / f"{digest_of(canonical_json([repo, ref]))[7:39]}.json"
    if source:
        raw = source.read_manifest(repo, ref)[1]
        digest = digest_of(raw)
        try:
            signature = source.read_manifest(repo, trust.sig_tag(digest))[1]
        except NotFound as error:
            raise _not_promoted(name, ref, digest) from error
    else:
        digest, signature_digest = _noted(note, repo, ref)
        place.blob(disk, digest)
        place.blob(disk, signature_digest)
        raw, signature = disk.read(digest, MAX_MANIFEST_BYTES), disk.read(signature_digest, MAX_MANIFEST_BYTES)

    manifest = parse_manifest(raw)
    sizes = {layer.digest: layer.size for layer in (*parse_manifest(signature).layers, *manifest.layers)}

    def small(of: str) -> bytes:
        return _small(source, disk, repo, of, sizes[of])

    trust.verify_release(signature, small, keys, f"{repo}:{ref}", digest)
    layers = [layer for layer in manifest.layers if layer.media_type == PROFILES_TYPE]
    if manifest.artifact_type != PROFILES_TYPE or len(layers) != 1:
        raise Invalid(f"{repo}:{ref} is no profile manifest", expected=f"one layer of {PROFILES_TYPE}", reason="no_profiles")
    profiles = parse_profiles(small(layers[0].digest))
    if source:
        place.keep(lambda: _note(note, disk, repo, ref, raw, signature))
    return Released(digest, profiles)


def _not_promoted(name: str, ref: str, digest: str) -> Mismatch:
    return Mismatch(
        f"{name}:{ref} is not promoted: its profile manifest {digest} has no release signature",
        expected="a model that this site has released",
        do=f"an administrator runs: airlock promote {name}:{ref}",
        reason="not_promoted",
    )


def _note(note: Path, disk: Disk, repo: str, ref: str, raw: bytes, signature: bytes) -> None:
    digest, signature_digest = disk.put(raw), disk.put(signature)
    place.write(note, canonical_json({"name": repo, "ref": ref, "digest": digest, "signature": signature_digest}))


def _noted(note: Path, repo: str, ref: str) -> tuple[str, str]:
    """What the cache says the name was; believed only because the release signature names it too."""
    try:
        if not stat.S_ISREG(mode := os.lstat(note).st_mode):
            raise place.planted(note, mode, "file")
        doc = parse_json(note.read_bytes(), "the cached name", MAX_PAYLOAD)
    except OSError as error:
        raise Unavailable(
            f"the registry does not answer, and the cache holds no profile manifest of {repo}:{ref}",
            expected="a registry that answers, or a cache that was filled before",
            do="check AIRLOCK_REGISTRY, or run `airlock runtime download-to-cache` while it answers",
        ) from error
    digest, signature = doc.get("digest"), doc.get("signature")
    if doc.get("name") != repo or doc.get("ref") != ref or not (isinstance(digest, str) and is_digest(digest) and isinstance(signature, str)):
        raise Mismatch(f"the cached name {note} was changed", expected=f"{repo}:{ref}", do="remove the file and start while the registry answers")
    return digest, signature


def _small(source: Source | None, disk: Disk, repo: str, digest: str, size: int) -> bytes:
    """A small blob by digest: from the cache, else from the registry, verified in both cases."""
    place.blob(disk, digest)
    try:
        return disk.read(digest, MAX_MANIFEST_BYTES)
    except NotFound as error:
        if source is None:
            raise NotFound(
                f"{digest} of {repo} is not in the cache", expected="a cache that was filled completely", do="start while the registry answers"
            ) from error
    except Mismatch:
        if source is None:
            raise
        _drop(disk, digest)
    if size > MAX_MANIFEST_BYTES:
        raise Invalid(f"{digest} of {repo} is too large", expected=f"at most {MAX_MANIFEST_BYTES} bytes")
    raw = bytearray()
    for chunk in source.stream(repo, digest, 0, size):
        raw += chunk
    if digest_of(bytes(raw)) != digest:
        raise Mismatch(
            f"the bytes of {digest} in {repo} have another digest", expected=digest, do="the registry or the path to it is damaged", reason="weights"
        )
    place.keep(lambda: disk.put(bytes(raw)))
    return bytes(raw)


def materialise(source: Source | None, cache: Path, model: Pin, log: Log, *, workers: int = 4, show: bool = True, code: bool = False) -> ModelDir:
    """The model directory of a pinned model, every file verified; missing pieces are fetched, with source None they are an error naming the file.

    `code`: the promoted profile lets the model's own code run. Raises NotFound, Mismatch (reason weights), Unavailable (also a full disk, with the
    bytes needed and free), Invalid (reason model_content) for what hides a pickle.
    """
    disk = Disk(cache)
    target = cache / "models" / model.name / model.digest.split(":", 1)[1][:12]
    place.folders(cache, target.parent)
    raw = _model_manifest(source, disk, model)
    manifest = parse_manifest(raw)
    if manifest.artifact_type != MODEL_TYPE:
        raise Invalid(f"{model.name}@{model.digest} is no model", expected=MODEL_TYPE, reason="weights")
    files = files_of(manifest)
    stamps = place.Stamps(cache / "stamps")
    hashed = stamped = 0
    lacking: list[File] = []
    for file in {f.digest: f for f in files}.values():
        verdict = _present(disk, file, stamps)
        hashed += file.size if verdict == "hashed" else 0
        stamped += file.size if verdict == "stamped" else 0
        if verdict == "absent":
            lacking.append(file)
    fetched = {f.digest for f in lacking}
    for file in files:
        if file.digest not in fetched:
            log(f'File: {file.path} found in cache: "{disk.path(file.digest)}"')
    _fetch(source, disk, model, lacking, log, workers, show)
    place.folders(cache, target.parent)  # again: the download may have taken hours
    seen, left_out = content.allowed(files, disk, code=code)
    for line in left_out:
        log(line)
    kept = tuple(seen)
    if not _intact(target, kept, disk):
        try:
            _build(target, kept, disk)
        except Unavailable:
            if not _intact(target, kept, disk):  # unless another start on the same cache was faster
                raise
        log(f"Model workspace {target} built from {len(kept)} files")
    for file in kept:
        if file.digest not in fetched:
            log(f'Skipping download, using cached copy of file: {file.path} at path: "{target / file.path}"')
    place.touch(target)
    stamps.record({f.digest: disk.path(f.digest) for f in files})
    return ModelDir(target, model.digest, len(files), sum(f.size for f in files), sum(f.size for f in lacking), hashed, stamped, kept)


def again(source: Source | None, cache: Path, model: Pin, target: Path, file: File, log: Log) -> None:
    """Fetches one damaged file of a model again and puts it into its directory; raises Unavailable without a registry, and what a fetch raises."""
    disk = Disk(cache)
    disk.delete(file.digest)
    _fetch(source, disk, model, [file], log, 1, False)
    disk.link(file.digest, target / file.path)
    place.Stamps(cache / "stamps").record({file.digest: disk.path(file.digest)})


def missing(source: Source | None, cache: Path, model: Pin) -> tuple[int, int]:
    """Bytes of a model's files, and of those that the cache lacks, by size alone; (0, -1) where its manifest cannot be had.

    Raises Invalid (reason cache) for what is no file where one belongs.
    """
    disk = Disk(cache)
    try:
        files = {f.digest: f.size for f in files_of(parse_manifest(_model_manifest(source, disk, model)))}
    except AirlockError:
        return 0, -1
    for digest in files:
        place.blob(disk, digest)
    return sum(files.values()), sum(size for digest, size in files.items() if disk.size(digest) != size)


def largest(cache: Path, model: Pin) -> list[Path]:
    """The model's files that the cache holds, largest first."""
    disk = Disk(cache)
    try:
        files = {f.digest: f.size for f in files_of(parse_manifest(_model_manifest(None, disk, model)))}
    except AirlockError:
        return []
    return [disk.path(digest) for digest in sorted(files, key=lambda d: -files[d]) if disk.size(digest) == files[digest]]


def _model_manifest(source: Source | None, disk: Disk, model: Pin) -> bytes:
    place.blob(disk, model.digest)
    try:
        return disk.read(model.digest, MAX_MANIFEST_BYTES)
    except (NotFound, Mismatch) as error:
        if source is None:
            raise Unavailable(
                f"the registry does not answer, and the cache does not hold the manifest of {model.name}@{model.digest}", do="start while it answers"
            ) from error
        _drop(disk, model.digest)
    raw = source.read_manifest(model.name, model.digest)[1]
    if digest_of(raw) != model.digest:
        raise Mismatch(f"the registry sent another manifest for {model.name}@{model.digest}", expected=model.digest, reason="weights")
    place.keep(lambda: disk.put(raw))
    return raw


def _present(disk: Disk, file: File, stamps: place.Stamps) -> str:
    """`stamped` or `hashed` when the cache holds the right bytes, else `absent` with wrong ones removed; raises Invalid for what is no file."""
    place.blob(disk, file.digest)
    size = disk.size(file.digest)
    if size is None:
        return "absent"
    path = disk.path(file.digest)
    if size == file.size and stamps.holds(file.digest, path):
        return "stamped"
    if size == file.size:
        try:
            fd = disk.open(file.digest)
        except NotFound:  # another start on this cache found it damaged, or an eviction took it
            return "absent"
        try:
            if hash_fd(fd, 0, size, file.digest.split(":", 1)[0]) == file.digest:
                return "hashed"
        finally:
            os.close(fd)
    _drop(disk, file.digest)
    return "absent"


def _drop(disk: Disk, digest: str) -> None:
    """Removes a damaged object; in a cache that is not ours to write it stays, and is told where it is needed."""
    with suppress(OSError):
        disk.delete(digest)


def _fetch(source: Source | None, disk: Disk, model: Pin, files: list[File], log: Log, workers: int, show: bool) -> None:
    if not files:
        return
    if source is None:
        first = files[0]
        more = f" and {len(files) - 1} more" if len(files) > 1 else ""
        raise Unavailable(
            f"nothing can be fetched now, and the cache lacks or holds damaged {first.path} of {model.name} ({first.size} bytes){more}",
            expected="every file of the pinned model, whole",
            do="start while the registry answers: only what is missing is fetched",
            reason="weights",
        )
    if not os.access(disk.root, os.W_OK):
        raise place.unusable(disk.root, "written, and files are missing in it")
    total = sum(f.size for f in files)
    log(f"Downloading {len(files)} file(s), {total} bytes, of {model.name}@{model.digest}")
    progress = copy.Progress(total, model.name, sys.stderr) if show else None
    try:
        for file in files:
            copy.fetch(partial(source.stream, model.name, file.digest), file.digest, file.size, disk, progress, workers)
            log(f'Downloaded filename: {file.path} to blob: "{disk.path(file.digest)}"')
    finally:
        if progress:
            progress.close()


def _intact(target: Path, files: tuple[File, ...], disk: Disk) -> bool:
    """Whether a model directory holds exactly the files, each the very inode of its verified blob, or a copy that is verified now."""
    if target.is_symlink():
        return False
    found: set[str] = set()
    for folder, folders, names in os.walk(target):
        if any(Path(folder, name).is_symlink() for name in folders):
            return False
        found.update(str(Path(folder, name).relative_to(target)) for name in names)
    if found != {f.path for f in files}:
        return False
    for file in files:
        try:
            have, want = os.lstat(target / file.path), os.lstat(disk.path(file.digest))
        except FileNotFoundError:  # evicted at this moment
            return False
        if (have.st_dev, have.st_ino) != (want.st_dev, want.st_ino) and not _copied(target / file.path, file):
            return False
    return True


def _copied(path: Path, file: File) -> bool:
    """Whether a plain file holds the right bytes: a copy, where no hard link could be made (another's blob, a file system without them)."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        found = os.fstat(fd)
        whole = stat.S_ISREG(found.st_mode) and found.st_size == file.size
        return whole and hash_fd(fd, 0, file.size, file.digest.split(":", 1)[0]) == file.digest
    finally:
        os.close(fd)


def _build(target: Path, files: tuple[File, ...], disk: Disk) -> None:
    """Makes the directory beside its place and swaps it in: an engine never sees half of one."""
    fresh = target.with_name(f".{target.name}.{os.getpid()}.{secrets.token_hex(4)}")
    try:
        fresh.mkdir(parents=True)
        for file in files:
            disk.link(file.digest, fresh / file.path)
        if not _intact(fresh, files, disk):  # a copy of what changed after it was verified
            raise Mismatch(f"files of {target} changed while they were copied", expected="the bytes of their digests", reason="weights")
        if target.is_symlink() or target.is_file():
            target.unlink()
        elif target.is_dir():
            target.rename(old := target.with_name(f"{fresh.name}.old"))
            shutil.rmtree(old, ignore_errors=True)
        fresh.rename(target)
    except OSError as error:
        what = f"the model directory {target} cannot be built: {error.strerror}"
        raise Unavailable(what, expected="a cache that we may write", do=f"check owner and mode of {target.parent}", reason="cache") from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
