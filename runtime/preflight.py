"""What a start needs of its node, looked at before anything is fetched: cache, file system, space, speed, shared memory, GPUs, driver, port.

Each look gives lines with a state, words and the fix; none raises for what it finds, and none takes longer than its deadline. What decides is pure
(runtime.mounts, and the functions here that take facts); what measures is short.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
import socket
import stat
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from artifact.errors import AirlockError, Conflict, Unavailable
from runtime.mounts import Mount, here, of, probe, size, speed_words
from runtime.node import Facts, Gpu, describe
from runtime.settings import EXIT_CODES, Settings

NIM_UID = 1000
GIB = 1 << 30
SHM = "/dev/shm"  # noqa: S108 - the mount itself, nothing is written
SHM_PER_GPU = 1 * GIB  # NCCL's and the workers' segments; vendors' run lines say 16 GiB for eight
SAMPLE = 64 << 20  # bytes that are read to measure
SAMPLE_S = 2.0
BLOCK = 4 << 20
RESERVE = 1 * GIB  # space that stays free behind the weights: compiled code, leases
FREE_SHARE = 0.9  # of a GPU's memory; less is told


@dataclass(frozen=True)
class Line:
    """One finding: what was looked at, `ok`, `warn` or `fail`, the words, the fix, the reason that gives the exit status, else that status."""

    check: str
    state: str
    text: str
    fix: str = ""
    reason: str = ""
    exit_code: int = 0

    def words(self) -> str:
        """The line for a terminal or a log."""
        return f"{self.state:4} {self.check}: {self.text}" + (f" (fix: {self.fix})" if self.fix else "")


def of_error(check: str, error: AirlockError) -> Line:
    """An expected failure as a line."""
    told = f"{error.what}; expected: {error.expected}" if error.do and error.expected else error.what
    return Line(check, "fail", told, error.do or error.expected, error.reason, EXIT_CODES.get(error.reason, error.exit_code))


def require(lines: Iterable[Line]) -> None:
    """Raises Unavailable with the first failure's reason, words and fix."""
    for line in lines:
        if line.state == "fail":
            raise Unavailable(f"{line.check}: {line.text}", do=line.fix, reason=line.reason)


def node_lines(
    settings: Settings,
    facts: Facts | None,
    gpus: Sequence[Gpu],
    tags: Mapping[str, str],
    total: int,
    missing: int,
    files: Sequence[Path] | None,
    who: tuple[int, int] | None = None,
) -> list[Line]:
    """All lines of the node for `total` bytes of weights, `missing` of which have to be fetched (-1: not known), run as `tags` say.

    `files` are read to measure the speed (None: it is not measured); `who` will serve (None: we).
    """
    there = here()
    lines = cache_lines(settings, there, who or (os.geteuid(), os.getegid()), total, missing)
    if files is not None:
        speed = measured(files, settings.cache if lines[0].state == "ok" else None)
        lines.append(speed_line(total, speed, of(str((files[0] if files else settings.cache).resolve()), there)))
    tp = tags.get("tp", "1")
    lines.append(memory_line(shm_bytes(), int(tp) if tp.isdecimal() and facts and not facts.cpu else 1))
    if facts:
        lines += [*gpu_lines(facts, gpus), driver_line(facts, engine_cuda(settings.engine(tags.get("llm_engine", ""))))]
    return [*lines, port_line(settings.host, settings.port)]


# ---- cache


def write_fault(folder: Path, uid: int, gid: int) -> int:
    """0 where that user can make, write and remove a file in `folder`, else the errno; for another user than ours in a child that becomes it."""
    if (uid, gid) == (os.geteuid(), os.getegid()) or os.geteuid() != 0:
        return probe(folder)
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.setgroups([])
            os.setgid(gid)
            os.setuid(uid)
            status = probe(folder)
        finally:
            os._exit(status & 0xFF)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def not_writable(cache: Path, fault: int, owner: tuple[int, int, int], who: tuple[int, int], mount: Mount | None) -> Line:
    """The line for a cache that cannot be written: who owns it, who we are, and what to do, on NFS at the server; pure.

    `owner` is uid, gid and mode of the directory, `who` uid and gid of what will serve.
    """
    uid, gid = who
    reason = os.strerror(fault)
    facts = f"{cache} cannot be written: {reason}; owner {owner[0]}:{owner[1]}, mode {owner[2]:04o}, serving as {uid}:{gid}"
    if (mount and mount.read_only) or fault == errno.EROFS:
        return Line(
            "cache", "fail", f"{facts}; it is mounted read-only", "mount it writable, or fill it completely first: it is served as it is", "cache"
        )
    if fault in (errno.ENOSPC, errno.EDQUOT):
        return Line("cache", "fail", f"{cache} cannot be written: {reason}", "free space, or raise the quota", "disk_full")
    target = f"{uid or NIM_UID}:{gid or NIM_UID}"
    if mount and mount.nfs and fault in (errno.EACCES, errno.EPERM):
        server, _, export = mount.source.rpartition(":")
        inside = export.rstrip("/") + str(cache).removeprefix(mount.at.rstrip("/"))
        return Line(
            "cache",
            "fail",
            f"{facts}; it is on NFS ({mount.source}), whose server maps root to nobody (root_squash), so nobody can chown it from here",
            f"on {server}: chown {target} {inside}",
            "cache",
        )
    return Line("cache", "fail", facts, f"on the host: chown {target} the directory that is mounted at {cache}", "cache")


def cache_lines(settings: Settings, mounts: Sequence[Mount], who: tuple[int, int], total: int, missing: int) -> list[Line]:
    """Cache, file system and space, for weights of `total` bytes of which `missing` are not there (-1: not known)."""
    cache = settings.cache
    try:
        cache.mkdir(mode=0o755, parents=True, exist_ok=True)
        found = cache.stat()
    except (FileExistsError, NotADirectoryError):
        return [Line("cache", "fail", f"{cache} is no directory", "set NIM_CACHE_PATH to one", "cache")]
    except OSError as error:
        return [Line("cache", "fail", f"{cache} cannot be made: {error.strerror}", f"mount a volume at {cache}, or set NIM_CACHE_PATH", "cache")]
    mount = of(str(cache.resolve()), tuple(mounts))
    fault = write_fault(cache, *who)
    lines: list[Line] = []
    if fault:
        line = not_writable(cache, fault, (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)), who, mount)
        if missing == 0 and line.reason == "cache":  # a read-only cache that is complete is served as it is
            line = Line("cache", "warn", f"{line.text}; it is complete and served as it is", line.fix)
        lines.append(line)
    else:
        lines.append(Line("cache", "ok", f"{cache} can be written by {who[0]}:{who[1]}"))
    if mount is None:
        return lines
    if mount.layer and missing != 0:
        text = f"{cache} is no volume but the container's own layer ({mount.kind}): what is fetched is lost with the container"
        fix = f"mount one: -v /opt/nim-cache:{cache} (AIRLOCK_EPHEMERAL_CACHE=1 where that is meant)"
        lines.append(Line("file system", "warn" if settings.ephemeral else "fail", text, fix, "cache"))
    else:
        state = "warn" if mount.network else "ok"
        lines.append(Line("file system", state, mount.words(), "a local disk, best NVMe, loads weights faster" if mount.network else ""))
    if missing >= 0:
        lines.append(space_line(cache, total, missing, shutil.disk_usage(cache).free))
    return lines


def space_line(cache: Path, total: int, missing: int, free: int) -> Line:
    """Whether what is missing fits; pure."""
    if missing == 0:
        return Line("space", "ok", f"all {size(total)} of the weights are there; {size(free)} free")
    words = f"{size(missing)} of {size(total)} have to be fetched, {size(free)} free in {cache}"
    if free < missing:
        return Line("space", "fail", words, f"free {size(missing - free)} (airlock runtime cache evict), or use a larger volume", "disk_full")
    if free < missing + RESERVE:
        return Line("space", "warn", words, f"leave {size(RESERVE)} for compiled code")
    return Line("space", "ok", words)


# ---- speed


def measured(files: Iterable[Path], scratch: Path | None) -> float:
    """Bytes per second that reading gives past the page cache: of files that are there, else of one written into `scratch`; else 0."""
    read, began = 0, time.monotonic()
    for path in files:
        with suppress(OSError):
            read += _read(path, SAMPLE - read, began + SAMPLE_S)
        if read >= SAMPLE or time.monotonic() - began > SAMPLE_S:
            break
    if read >= BLOCK:
        return read / max(time.monotonic() - began, 1e-6)
    if scratch is None:
        return 0.0
    path = scratch / f".preflight.{os.getpid()}.{secrets.token_hex(4)}"
    try:
        with path.open("xb", buffering=0) as out:
            until = time.monotonic() + SAMPLE_S
            written, block = 0, os.urandom(BLOCK)
            while written < SAMPLE and time.monotonic() < until:
                written += out.write(block)
                os.fsync(out.fileno())  # each: memory takes at once what a slow disk then needs a minute for
        began = time.monotonic()
        read = _read(path, written, began + SAMPLE_S)
        return read / max(time.monotonic() - began, 1e-6)
    except OSError:
        return 0.0
    finally:
        with suppress(OSError):
            path.unlink()


def _read(path: Path, limit: int, until: float) -> int:
    """Reads up to `limit` bytes that the page cache does not hold, until the moment; how many came."""
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        os.posix_fadvise(fd, 0, limit, os.POSIX_FADV_DONTNEED)
        done = 0
        while done < limit and time.monotonic() < until:
            part = os.pread(fd, min(BLOCK, limit - done), done)
            if not part:
                break
            done += len(part)
        return done
    finally:
        os.close(fd)


def speed_line(total: int, bytes_per_s: float, mount: Mount | None) -> Line:
    """The measured speed against the weights' size; pure."""
    if bytes_per_s <= 0:
        return Line("read speed", "warn", "not measured: nothing is there to read, and nothing can be written")
    if not total:
        return Line("read speed", "ok", f"{bytes_per_s / 1e6:.0f} MB/s")
    slow, words = speed_words(total, bytes_per_s, mount)
    return Line("read speed", "warn" if slow else "ok", words)


# ---- node


def memory_line(shm: int, tp: int) -> Line:
    """Shared memory for so many GPUs of one process group; pure. `shm` is the size of /dev/shm in bytes, 0 without one."""
    need = SHM_PER_GPU * max(tp, 1)
    words = f"{SHM} has {shm / GIB:.1f} GiB"
    if tp > 1 and shm < need:
        fix = f"docker: --shm-size=16g; Kubernetes: an emptyDir with medium: Memory of {need // GIB} GiB or more at {SHM}"
        return Line("shared memory", "fail", f"{words}; {tp} GPUs need {need // GIB} GiB", fix, "shared_memory")
    return Line("shared memory", "ok", words)


def shm_bytes() -> int:
    """The size of /dev/shm, 0 where there is none."""
    try:
        found = os.statvfs(SHM)
    except OSError:
        return 0
    return found.f_blocks * found.f_frsize


def gpu_lines(facts: Facts, chosen: Sequence[Gpu]) -> list[Line]:
    """GPUs healthy, alike and free: those of the choice, or all where none was made; pure."""
    if facts.cpu:
        return [Line("GPUs", "ok", "no NVIDIA library on this node: CPU profiles only")]
    gpus = tuple(chosen) or facts.gpus
    if not gpus:
        return [Line("GPUs", "warn", f"none is visible{'; ' + facts.hidden if facts.hidden else ''}", "start the container with --gpus all")]
    lines = [Line("GPUs", "fail", f"{g.label}: {fault}", "drain the node; look at dmesg for Xid messages", "gpu") for g in gpus for fault in g.faults]
    lines += [Line("GPUs", "warn", f"{g.label}: {notice}") for g in gpus for notice in g.notices]
    if len({g.name for g in gpus}) > 1:
        lines.append(Line("GPUs", "warn", f"they are not alike: {describe(gpus)}", "choose those of one kind with NVIDIA_VISIBLE_DEVICES"))
    busy = [g for g in gpus if g.total and g.free < FREE_SHARE * g.total]
    lines += [Line("GPUs", "warn", f"{g.label} has {size(g.free)} of {size(g.total)} free", "see what else runs on it: nvidia-smi") for g in busy]
    return lines or [Line("GPUs", "ok", f"{describe(gpus)}, healthy, alike and free{' (SIMULATED)' if facts.simulated else ''}")]


def driver_line(facts: Facts, engine_cuda: str) -> Line:
    """The driver's CUDA version against the one that the engine was built for (empty: for CPUs, or not known); pure."""
    if facts.cpu or not facts.cuda:
        return Line("driver", "ok", "none is needed for a CPU profile" if facts.cpu else f"driver {facts.driver}")
    have, want = _version(facts.cuda), _version(engine_cuda)
    words = f"driver {facts.driver} with CUDA {facts.cuda}{' (SIMULATED)' if facts.simulated else ''}"
    if not want:
        return Line("driver", "ok", words)
    words += f"; the engine was built for CUDA {engine_cuda}"
    if have[:1] < want[:1]:
        return Line("driver", "fail", words, f"install a driver for CUDA {want[0]} or later, or an engine for CUDA {have[0]}", "gpu")
    if have < want:
        return Line("driver", "warn", f"{words}: minor version compatibility only", f"a driver for CUDA {engine_cuda}")
    return Line("driver", "ok", words)


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", text)[:2])


def engine_cuda(engine: Path | None) -> str:
    """The CUDA version that the engine's torch was built for, from its own version file; empty where it says none."""
    for path in engine.glob("lib/python3*/site-packages/torch/version.py") if engine else ():
        with suppress(OSError, UnicodeError):
            found = re.search(r"^cuda[^=\n]*= *['\"]([0-9.]+)['\"]", path.read_text(), re.MULTILINE)
            return found[1] if found else ""
    return ""


def port_line(host: str, port: int) -> Line:
    """Whether the API's port can be bound now."""
    try:
        check_port(host, port)
    except AirlockError as error:
        return of_error("port", error)
    return Line("port", "ok", f"{port} of {host} is free")


def check_port(host: str, port: int) -> None:
    """The port can be bound now; raises Conflict (reason port_taken). Before weights and engine: a start of minutes must not end with this."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except (OSError, TypeError, ValueError) as error:  # the latter for bytes that are no text, and a label too long
            number, why = (error.errno, error.strerror) if isinstance(error, OSError) else (0, "no name of a host")
            what, do = f"port {port} of {host[:260]} cannot be used: {why}", "set AIRLOCK_HOST to an address of this machine, such as 0.0.0.0"
            if number == errno.EADDRINUSE:
                what = f"port {port} of {host} is not free: {why}"
                do = f"stop what listens there, or set NIM_HTTP_API_PORT (with Docker: map another one, -p OTHER:{port})"
            elif number in (errno.EACCES, errno.EPERM):
                do = "set NIM_HTTP_API_PORT to 1024 or more: those below are for root"
            raise Conflict(what, expected="a free port of this machine for the API", do=do, reason="port_taken") from error
