"""Which file system a path lies on, from the text of /proc/self/mountinfo (proc_pid_mountinfo(5)), and what a measured
speed means; pure but for `here` and `probe`.
"""

from __future__ import annotations

import os
import re
import secrets
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

NETWORK = ("nfs", "nfs4", "cifs", "smb3", "ceph", "glusterfs", "lustre", "fuse.glusterfs", "fuse.ceph", "9p", "beegfs", "gpfs")
LAYERS = ("overlay", "aufs", "fuse-overlayfs", "fuse.fuse-overlayfs")
SLOW_S = 120.0  # a read of all weights that takes longer is told
_OCTAL = re.compile(r"\\([0-7]{3})")


@dataclass(frozen=True)
class Mount:
    """One mount: where, what kind, what is mounted (a device, or server:export), its options."""

    at: str
    kind: str
    source: str
    options: tuple[str, ...] = ()

    @property
    def network(self) -> bool:
        """Whether its bytes come over a network."""
        return self.kind in NETWORK

    @property
    def nfs(self) -> bool:
        """Whether it is NFS, whose server may map our uid to another (root_squash, all_squash)."""
        return self.kind in ("nfs", "nfs4")

    @property
    def read_only(self) -> bool:
        """Whether it was mounted read-only."""
        return "ro" in self.options

    @property
    def layer(self) -> bool:
        """Whether it is a container's own writable layer: what is written there goes with the container."""
        return self.at == "/" and self.kind in LAYERS

    def words(self) -> str:
        """`nfs4 of filer:/export/nim at /opt/nim/.cache` for a line."""
        return f"{self.kind} of {self.source} at {self.at}" if self.source not in ("", "none", self.kind) else f"{self.kind} at {self.at}"


def parse(text: str) -> tuple[Mount, ...]:
    """The mounts in their order; lines that do not fit the format are passed over."""
    found = []
    for line in text.splitlines():
        head, dash, tail = line.partition(" - ")
        fields, rest = head.split(" "), tail.split(" ")
        if not dash or len(fields) < 6 or len(rest) < 2:
            continue
        found.append(
            Mount(_plain(fields[4]), rest[0], _plain(rest[1]), tuple(fields[5].split(",")) + tuple(rest[2].split(",") if len(rest) > 2 else ()))
        )
    return tuple(found)


def here() -> tuple[Mount, ...]:
    """The mounts that this process sees; none where there is no /proc."""
    try:
        return parse(Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape"))
    except OSError:
        return ()


def probe(folder: Path) -> int:
    """0 where we can make, write and remove a file in `folder`, else the errno."""
    path = folder / f".preflight.{os.getpid()}.{secrets.token_hex(4)}"
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            os.write(fd, b"preflight")
        finally:
            os.close(fd)
            path.unlink()
    except OSError as error:
        return error.errno or 1
    return 0


def _plain(text: str) -> str:
    return _OCTAL.sub(lambda m: chr(int(m[1], 8)), text)


def of(path: str, mounts: tuple[Mount, ...]) -> Mount | None:
    """The mount that a resolved absolute path lies on: the longest mount point above it, the last one of equals."""
    here = PurePosixPath(path)
    best: Mount | None = None
    for mount in mounts:
        at = PurePosixPath(mount.at)
        if (at == here or at in here.parents) and (best is None or len(at.parts) >= len(PurePosixPath(best.at).parts)):
            best = mount
    return best


def seconds(weights: int, bytes_per_s: float) -> float:
    """How long reading the weights once takes; infinite where nothing came."""
    return weights / bytes_per_s if bytes_per_s > 0 else float("inf")


def speed_words(weights: int, bytes_per_s: float, mount: Mount | None) -> tuple[bool, str]:
    """Whether reading the weights is slow, and the line that says it: `90 MB/s: 26 min for 140.0 GB; local NVMe is advised`."""
    took = seconds(weights, bytes_per_s)
    slow = took > SLOW_S
    rate = f"{bytes_per_s / 1e6:.0f} MB/s"
    line = f"{rate}: {span(took)} for {size(weights)}"
    if slow:
        line += "; local NVMe is advised" if mount is None or mount.network else "; a faster disk is advised"
    return slow, line


def span(seconds: float) -> str:
    """`40 s`, `26 min`, `3.5 h` for a line."""
    if seconds == float("inf"):
        return "for ever"
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 100 * 60 else f"{seconds / 3600:.1f} h"


def size(count: int) -> str:
    """Bytes for a line, decimal units as disks are sold."""
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= factor:
            return f"{count / factor:.1f} {unit}"
    return f"{count} bytes"
