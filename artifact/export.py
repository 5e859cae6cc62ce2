"""A NIM profile's files as a container finds them without a network: the tree of NIM_CACHE_PATH, or a plain model directory.

A name appears by rename, once its bytes are whole and verified; what is unfinished lies in one folder of its own and is continued by the next run.
The layout is that of NIM's and the Hub's own caches (adr/0009). Must not: follow a link that lies in the target, or leave a file that is not
what the registry has.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import secrets
import shutil
import stat
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from artifact.copy import Progress, fetch
from artifact.digest import BUFFER, hash_fd
from artifact.disk import Disk
from artifact.errors import Conflict, Invalid, Mismatch, Unavailable
from artifact.presence import Held, Presence
from artifact.remote import RemoteRegistry

STAGING = ".airlock-export"
UID, GID = 1000, 2000  # of the container's user, and of the group that the NIM Operator runs it with
DIR_MODE, FILE_MODE = 0o2775, 0o664


@dataclass
class Exported:
    """What was done: files in the tree, of them already there, and bytes that were fetched."""

    files: int = 0
    kept: int = 0
    fetched: int = 0
    owned: bool = True


@dataclass
class _Place:
    """One file's place: the link that a container opens, and the folder of bytes that it points into (none in a plain directory)."""

    held: Held
    link: Path
    blobs: Path | None
    git: bool = False  # whether its bytes are named as the Hub's client names them


@dataclass
class Target:
    """The directory that is filled, with the owner and modes of all that is made in it."""

    root: Path
    uid: int = UID
    gid: int = GID
    owned: bool = field(init=False)
    _made: set[Path] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.owned = os.geteuid() == 0 or (os.geteuid() == self.uid and self.gid in {os.getegid(), *os.getgroups()})

    def folder(self, path: Path) -> Path:
        """A folder at or below the root, made where it is not, with mode and owner; raises Invalid where a link or a file lies on the way."""
        for part in [*reversed(path.relative_to(self.root).parents), path.relative_to(self.root)]:
            at = self.root / part
            if at in self._made:
                continue
            with contextlib.suppress(FileExistsError):
                at.mkdir(parents=at == self.root)
            if not stat.S_ISDIR(at.lstat().st_mode):
                raise Invalid(f"{at} is a link or a file", expected="a directory", do="name an empty directory", reason="target")
            if at != self.root or {p.name for p in at.iterdir()} <= {STAGING, "ngc", "huggingface", "lost+found"}:
                self.settle(at, DIR_MODE)  # not a root that is something else's too, such as /srv or a home
            self._made.add(at)
        return path

    def settle(self, path: Path, mode: int) -> None:
        """Gives a file or folder its owner and mode, never through a link that somebody put in its place."""
        with contextlib.suppress(PermissionError):  # another's directory, which is used as it is
            fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                if self.owned:
                    os.fchown(fd, self.uid, self.gid)
                os.fchmod(fd, mode)
            finally:
                os.close(fd)

    def link(self, path: Path, target: str) -> None:
        """Puts a symbolic link in place, whole or not at all."""
        self.folder(path.parent)
        temporary = path.with_name(f".{secrets.token_hex(8)}.linking")
        temporary.symlink_to(target)
        if self.owned:
            os.chown(temporary, self.uid, self.gid, follow_symlinks=False)
        temporary.replace(path)


def cache_places(root: Path, presence: Presence) -> list[_Place]:
    """Where each file of a profile lies in NIM_CACHE_PATH; raises Invalid for a version that cannot be a folder."""
    out = []
    for held in presence.held:
        at = held.at
        if at.scheme == "hf":
            repo = root / "huggingface" / "hub" / f"models--{at.target.replace('/', '--')}"
            version = held.commit or at.version
        else:
            repo, version = root / "ngc" / "hub" / f"models--{at.target.replace('/', '--')}", at.version
        if "/" in version:
            raise Invalid(f"{at} has a version that is no folder's name", expected="a version without /", reason="uri")
        out.append(_Place(held, repo / "snapshots" / version / held.file.path, repo / "blobs", at.scheme == "hf"))
    return out


def directory_places(root: Path, presence: Presence) -> list[_Place]:
    """Where each file of a profile lies in a plain directory: at its path in the workspace; raises Invalid where two different ones share one."""
    found: dict[str, Held] = {}
    for held in presence.held:
        before = found.setdefault(held.path, held)
        if before.file.digest != held.file.digest:
            what = f"{held.path} of profile {presence.profile.id} comes from {before.at} and from {held.at}"
            raise Invalid(what, expected="one file of each name", do="export it with --form cache", reason="profile")
    return [_Place(held, root / path, None) for path, held in found.items()]


def export_cache(remote: RemoteRegistry, presence: Presence, target: Target, progress: Progress, workers: int = 4) -> Exported:
    """Fills NIM_CACHE_PATH with a profile; what is there of it, or of others, stays. Raises Unavailable, Mismatch, Invalid.

    The profile's own snapshot folders appear whole where they are new; each file of the others does.
    """
    places = cache_places(target.root, presence)
    done = Exported(files=len(places), owned=target.owned)
    target.folder(target.root)
    with _staged(target.root / STAGING) as disk:
        waiting = _fetch(remote, places, disk, target.root, progress, workers, done)
        named = [(place, _named(disk, place.held, place.git)) for place in waiting]  # the long part first: what follows is renames
        uses = Counter(place.held.file.digest for place in waiting)
        fresh: dict[Path, Target] = {}
        for place, name in named:
            assert place.blobs is not None
            path = target.folder(place.blobs) / name
            _move(disk, place.held.file.digest, path, uses)
            target.settle(path, FILE_MODE)
            kind, version, *inside = place.link.relative_to(place.blobs.parent).parts
            snapshot = place.blobs.parent / kind / version
            if snapshot not in fresh and not os.path.lexists(snapshot):
                fresh[snapshot] = Target(disk.root / secrets.token_hex(8), target.uid, target.gid)
            into = fresh.get(snapshot)
            (into or target).link((into.root if into else snapshot).joinpath(*inside), "../" * (len(inside) + 1) + f"blobs/{name}")
        for snapshot, made in fresh.items():
            target.folder(snapshot.parent)
            made.root.rename(snapshot)
        for place in places:
            if place.git and place.held.at.version != place.held.commit:
                assert place.blobs is not None
                _reference(target, place.blobs.parent / "refs" / place.held.at.version, place.held.commit or place.held.at.version)
        for hub in {place.blobs.parents[1] for place in places if place.blobs and not place.git}:
            target.folder(hub / "tmp")  # where the container's client keeps what it has not finished
    return done


def export_directory(remote: RemoteRegistry, presence: Presence, target: Target, progress: Progress, workers: int = 4) -> Exported:
    """Makes a plain model directory, which appears whole; raises Conflict where another is there, else as export_cache does."""
    root = target.root
    places = directory_places(root, presence)
    done = Exported(files=len(places), owned=target.owned)
    if os.path.lexists(root):
        there = root.is_dir() and not root.is_symlink() and all(_same(place.link, place.held) for place in places)
        if there:
            done.kept = len(places)
            progress.add(presence.size)
            return done
        if not root.is_dir() or root.is_symlink() or any(root.iterdir()):
            raise Conflict(f"{root} is there, with other content", expected="no directory, or an empty one", do="name another", reason="target")
    if root.is_mount():
        raise Invalid(f"{root} is a mount, which no directory can replace", expected="a directory below it", do="name another", reason="target")
    root.absolute().parent.mkdir(parents=True, exist_ok=True)
    aside = root.absolute().with_name(f"{STAGING}-{root.name}")
    with _staged(aside) as disk:
        waiting = _fetch(remote, places, disk, aside, progress, workers, done)
        for place in waiting:
            if place.held.checksums:
                _named(disk, place.held)
        uses = Counter(place.held.file.digest for place in waiting)
        tree = Target(aside / secrets.token_hex(8), target.uid, target.gid)
        for place in waiting:
            path = tree.folder(tree.root / place.link.parent.relative_to(root)) / place.link.name
            _move(disk, place.held.file.digest, path, uses)
            tree.settle(path, FILE_MODE)
        tree.folder(tree.root).rename(root)  # an empty directory gives way
    return done


@contextlib.contextmanager
def _staged(folder: Path) -> Iterator[Disk]:
    """The store of what is unfinished, for one process; gone once all is in place, kept for the next run where that fails."""
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    try:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        raise Invalid(f"{folder} is a link or a file", expected="a directory of ours", do="remove it", reason="target") from None
    try:
        if os.fstat(fd).st_uid != os.geteuid():
            raise Invalid(f"{folder} is somebody else's", expected="a directory of ours", do="remove it", reason="target")
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise Conflict(f"another export fills {folder.parent} now", expected="one at a time", do="wait for it", reason="busy") from None
        os.fchmod(fd, 0o700)
        for stale in folder.iterdir():
            if stale.name not in ("blobs", "partial"):
                shutil.rmtree(stale)
        yield Disk(folder)
        shutil.rmtree(folder)
    finally:
        os.close(fd)


def _fetch(remote: RemoteRegistry, places: list[_Place], disk: Disk, on: Path, progress: Progress, workers: int, done: Exported) -> list[_Place]:
    """Brings what is not in place yet into the staging store, after a look at the free space; returns what is to be put into place."""
    waiting = [place for place in places if not _same(place.link, place.held)]
    done.kept = len(places) - len(waiting)
    wanted = {place.held.file.digest: place.held for place in waiting}
    progress.add(sum({p.held.file.digest: p.held.file.size for p in places if p.held.file.digest not in wanted}.values()))
    begun = 0  # what it takes up is not free any more
    for path in (disk.root / "partial").glob("*"):
        with contextlib.suppress(FileNotFoundError):  # another export published it since
            begun += path.stat().st_blocks * 512
    need = max(sum(held.file.size for digest, held in wanted.items() if disk.size(digest) != held.file.size) - begun, 0)
    free = shutil.disk_usage(on).free
    if need > free:
        what = f"no room in {on} for the profile: {need} bytes are to be fetched, {free} are free"
        raise Unavailable(what, expected="free space", do="free space, then run again: it resumes", reason="disk_full")
    for digest, held in wanted.items():
        fetch(lambda lo, hi, h=held: remote.stream(h.repo, h.file.digest, lo, hi), digest, held.file.size, disk, progress, workers)  # type: ignore[misc]
    done.fetched = need
    return waiting


def _same(path: Path, held: Held) -> bool:
    """Whether a path leads to the file's bytes already: each is read again, since a name proves nothing."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        found = os.fstat(fd)
        algorithm = held.file.digest.split(":", 1)[0]
        return stat.S_ISREG(found.st_mode) and found.st_size == held.file.size and hash_fd(fd, 0, found.st_size, algorithm) == held.file.digest
    finally:
        os.close(fd)


def _move(disk: Disk, digest: str, path: Path, uses: Counter[str]) -> None:
    """The last use takes the staged file itself, those before a hard link to it (a copy where there are none)."""
    uses[digest] -= 1
    if uses[digest]:
        disk.link(digest, path)
    else:
        disk.path(digest).replace(path)


def _named(disk: Disk, held: Held, git: bool = False) -> str:
    """What a cache calls a file's bytes, from one reading that also holds them against the manifest's own checksums; raises Mismatch.

    The Hub's client: the SHA-256 of an LFS file, else git's blob id. NIM's: 32 hex digits, taken to be the MD5 as of an S3 ETag (not proven).
    """
    sums: dict[str, Any] = {"md5": hashlib.md5(usedforsecurity=False), "git": hashlib.sha1(b"blob %d\0" % held.file.size, usedforsecurity=False)}
    sums |= {name: hashlib.new(name, usedforsecurity=False) for name in held.checksums if name in ("sha1", "sha256", "sha512")}
    if "blake3" in held.checksums:
        with contextlib.suppress(ImportError):  # the base is without; the mirror held it against this sum on the way in
            from blake3 import blake3

            sums["blake3"] = blake3()
    fd = disk.open(held.file.digest)
    with os.fdopen(fd, "rb", buffering=0) as file:
        while part := file.read(BUFFER):
            for one in sums.values():
                one.update(part)
    for name, wanted in held.checksums.items():
        if name in sums and sums[name].hexdigest() != wanted:
            what = f"{held.at} has the {name} {sums[name].hexdigest()} here"
            raise Mismatch(what, expected=f"{wanted}, as the model manifest says", do="mirror the model again", reason="checksum")
    if git:
        return held.file.digest.split(":", 1)[1] if held.file.lfs else str(sums["git"].hexdigest())
    return str(sums["md5"].hexdigest())


def _reference(target: Target, path: Path, commit: str) -> None:
    """What the Hub's client reads to find the snapshot of a branch or tag."""
    target.folder(path.parent)
    temporary = path.with_name(f".{secrets.token_hex(8)}.writing")
    temporary.write_text(commit)
    target.settle(temporary, FILE_MODE)
    temporary.replace(path)
