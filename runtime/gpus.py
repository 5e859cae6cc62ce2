"""GPU facts through NVML, read in a child process with a deadline: a blocked driver call cannot be interrupted otherwise.

The one place that imports pynvml. Only a missing library means a CPU node; any other NVML failure is an error that names it, since a broken driver
must never look like a machine without GPUs.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import select
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from artifact.errors import AirlockError, Unavailable
from runtime.node import Facts, Gpu
from runtime.visible import narrow

# NVML return codes (nvml.h); the words are what an operator can act on.
LIBRARY_NOT_FOUND = 12
HINTS = {
    4: "the container has no access to the device; start it with the NVIDIA container toolkit",
    9: "the NVIDIA library is present but the driver is not loaded; load it (modprobe nvidia) or reboot the host",
    10: "a GPU does not answer; look at dmesg for Xid messages",
    12: "the NVIDIA library is present but cannot be loaded; install it again, or correct the container toolkit",
    15: "a GPU has fallen off the bus; reset it or reboot the host",
    16: "a GPU requires a reset; run nvidia-smi --gpu-reset or reboot the host",
    18: "driver and library differ in version; reboot, or correct the container toolkit",
}
TOLERATED = (3, 13)  # not supported, function not found: the fact is absent, which is no failure
# Of facts that nothing depends on, what a container or a virtual GPU may answer besides: a link beyond the last one, no permission, another version
# of the structure, unknown. A GPU that is lost or late is none of these.
OPTIONAL = (*TOLERATED, 2, 4, 25, 999)
NO_SLICE = (*TOLERATED, 4, 6)  # a slice that is another container's; a hole among the slices
# nvmlClocksEventReason* (nvml.h): those that cost speed and are nobody's wish.
SLOWED = {0x8: "hardware slowdown", 0x20: "software thermal limit", 0x40: "hardware thermal limit", 0x80: "power brake"}
MODULE = Path("/proc/driver/nvidia/gpus")  # the kernel module's list by bus, in NVML's order; readable when a GPU answers nothing
HOST_RESERVE = 8 << 30  # bytes of unified memory that are left to the host


def detect(
    deadline_s: float = 30.0,
    visible_cuda: str | None = None,
    visible_nvidia: str | None = None,
    *,
    order: str | None = None,
    patience_s: float = 0.0,
    say: Callable[[str], None] | None = None,
) -> Facts:
    """The node's GPUs that the visible-devices variables leave, all of which answered; raises Unavailable (reason gpu), Invalid.

    An answer is waited for until deadline_s, or with a longer patience_s until that one, while `say` is told every deadline_s what is waited for.
    """
    simulated = bool(os.environ.get("FAKE_NVML_CONFIG"))
    answer = _ask(deadline_s, max(deadline_s, patience_s), say or (lambda _: None))
    if answer.get("library") is False:
        return Facts(cpu=True, simulated=simulated)
    gpus = tuple(_as_gpu(item) for item in answer["gpus"])
    left = narrow(gpus, visible_cuda, visible_nvidia, order)
    every = narrow(gpus, None, None)
    hidden = ""
    if len(left) < len(every):
        hidden = f"{len(every) - len(left)} of {len(every)} GPU(s) are hidden by CUDA_VISIBLE_DEVICES or NVIDIA_VISIBLE_DEVICES"
    return Facts(False, left, answer["driver"], answer["cuda"], simulated, hidden)


def _as_gpu(item: dict[str, Any]) -> Gpu:
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in item.items()}
    gpu = Gpu(**values)
    if gpu.total or gpu.mig or gpu.parent:
        return gpu
    total, free = host_memory(Path("/proc/meminfo").read_text(), _limit())
    note = f"unified memory: NVML tells no size, the host's {total / 2**30:.1f} GiB are used, {HOST_RESERVE / 2**30:g} GiB of them left to the host"
    return replace(gpu, unified=True, total=total, free=max(0, free - HOST_RESERVE), notices=(*gpu.notices, note))


def host_memory(meminfo: str, limit: int = 0) -> tuple[int, int]:
    """Total and available bytes of the host by the text of /proc/meminfo, bounded by a container's limit (0: none)."""
    found = {m[1]: int(m[2]) * 1024 for m in re.finditer(r"^(MemTotal|MemAvailable):\s+(\d+) kB", meminfo, re.MULTILINE)}
    total, free = found.get("MemTotal", 0), found.get("MemAvailable", 0)
    return (min(total, limit), min(free, limit)) if limit else (total, free)


def _limit() -> int:
    try:
        text = Path("/sys/fs/cgroup/memory.max").read_text().strip()
    except OSError:
        return 0
    return int(text) if text.isdigit() else 0


def _ask(wait_s: float, limit_s: float, say: Callable[[str], None]) -> dict[str, Any]:
    """What the child told; a forked one, since a container's interpreter is not always ours to execute again."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            # Of the parent's files it keeps its own pipe: connections and the port of a front would live as long as a call that hangs.
            os.closerange(3, writing)
            os.closerange(writing + 1, 1 << 20)
            _tell(writing, json.dumps(_query(writing)))
            status = 0
        finally:
            os._exit(status)  # nothing of the parent's (handlers, buffers, temporary files) may run twice
    os.close(writing)
    lines, whole = _listen(reading, wait_s, limit_s, say)
    if not whole:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    _reap(pid)
    if not whole:
        raise Unavailable(
            f"the GPU query did not answer within {limit_s:g} s; the last call was {_last(lines)}",
            expected="an answer from the NVIDIA driver for every GPU: none is left out, since that would choose a smaller profile",
            do="look at dmesg for Xid messages; AIRLOCK_GPU_DEADLINE_S changes the limit, and with NIM_MODEL_PROFILE set the start waits longer",
            reason="gpu",
        )
    try:
        answer: dict[str, Any] = json.loads(lines[-1] if lines else "")
    except ValueError:
        what = f"the GPU query ended without an answer in {_last(lines)}"
        raise Unavailable(what, expected="an answer from the NVIDIA driver", do="run nvidia-smi on this host", reason="gpu") from None
    if "error" in answer:
        raise _failure(answer)
    return answer


def _last(lines: list[str]) -> str:
    """The last call with its GPU; where the driver told neither UUID nor bus yet, with the bus that its module lists for that index."""
    call = next((line for line in reversed(lines) if line.startswith("nvml")), "nvmlInit")
    match = re.search(r" of GPU (\d+)\Z", call)
    try:
        buses = sorted(p.name for p in MODULE.iterdir()) if match else []
    except OSError:
        buses = []
    return f"{call} ({buses[int(match[1])]})" if match and int(match[1]) < len(buses) else call


def _tell(fd: int, line: str) -> None:
    raw = line.encode() + b"\n"
    while raw:
        raw = raw[os.write(fd, raw) :]


def _listen(fd: int, wait_s: float, limit_s: float, say: Callable[[str], None]) -> tuple[list[str], bool]:
    """The child's lines, and whether it came to its end before the limit."""
    raw, began = b"", time.monotonic()
    due, end = began + wait_s, began + limit_s
    with open(fd, "rb", buffering=0) as stream:
        while True:
            now = time.monotonic()
            if now >= end:
                return raw.decode("utf-8", "replace").splitlines(), False
            if now >= due:
                due += wait_s
                say(f"still waiting for {_last(raw.decode('utf-8', 'replace').splitlines())}: {now - began:.0f} of at most {limit_s:g} s")
            if not select.select([stream], [], [], max(0.0, min(due, end) - now))[0]:
                continue
            part = stream.read(65536)
            if not part:
                return raw.decode("utf-8", "replace").splitlines(), True
            raw += part


def _reap(pid: int) -> None:
    """Collects the child; one that a driver call holds in the kernel cannot even be killed and is left behind, not waited for."""
    for _ in range(100):
        if os.waitpid(pid, os.WNOHANG)[0]:
            return
        time.sleep(0.01)


def _failure(answer: dict[str, Any]) -> AirlockError:
    number = int(answer["error"])
    return Unavailable(
        f"NVML failed: {answer['words']} (error {number}) in {answer['call']}",
        expected="a working NVIDIA driver, or no NVIDIA library at all on a CPU node",
        do=HINTS.get(number, "run nvidia-smi on this host"),
        reason="gpu",
    )


class _Driver:
    """The child's way to NVML: each call is told before it is made, and an absent fact is no failure."""

    def __init__(self, fd: int) -> None:
        import pynvml

        self.nvml: Any = pynvml
        self.call = "nvmlInit"
        self._fd = fd

    def ask(self, name: str, *args: Any, label: str = "", absent: Any = None, tolerated: tuple[int, ...] = TOLERATED) -> Any:
        """The answer of one NVML function; what is not supported, or not there in an old driver, is `absent`."""
        self.call = name + (f" of {label}" if label else "")
        _tell(self._fd, self.call)  # at once: what the parent reads if this call never returns
        try:
            return getattr(self.nvml, name)(*args)
        except self.nvml.NVMLError as error:
            if error.value in tolerated:
                return absent
            raise


def _query(fd: int) -> dict[str, Any]:
    """Runs in the child: every fact, or the first failure with the call's name."""
    driver = _Driver(fd)
    nvml, ask = driver.nvml, driver.ask
    try:
        ask("nvmlInit")
        version, cuda = ask("nvmlSystemGetDriverVersion", absent=""), ask("nvmlSystemGetCudaDriverVersion_v2", absent=0)
        gpus = [board for i in range(ask("nvmlDeviceGetCount", absent=0)) for board in _gpu(driver, i)]
        _peers(driver, [g for g in gpus if g["links"]])
    except nvml.NVMLError as error:
        if error.value == LIBRARY_NOT_FOUND and driver.call == "nvmlInit":
            words = _unloadable()
            return {"error": LIBRARY_NOT_FOUND, "words": words, "call": driver.call} if words else {"library": False}
        return {"error": error.value, "words": str(error), "call": _last([driver.call])}
    except nvml.NVMLLibraryMismatchError as error:
        return {"error": 18, "words": str(error), "call": driver.call}
    return {"driver": version, "cuda": f"{cuda // 1000}.{cuda % 1000 // 10}", "gpus": gpus}


def _unloadable() -> str:
    """Why a library that is present does not load, empty when there is none: the binding calls both "not found"."""
    try:
        ctypes.CDLL("libnvidia-ml.so.1")
    except OSError as error:
        # glibc and musl name first what they lack: the library itself, or one that it needs.
        absent = re.match(r"(Error loading shared library )?libnvidia-ml\.so\.1: .*No such file or directory", str(error))
        return "" if absent else str(error)
    return "the library says that it is not there"


def _gpu(driver: _Driver, index: int) -> list[dict[str, Any]]:
    """The facts of one GPU, and of the slices it is split into; what names it is asked first, so that a later call that hangs names it."""
    ask, label = driver.ask, f"GPU {index}"
    handle = ask("nvmlDeviceGetHandleByIndex", index, label=label)
    pci = ask("nvmlDeviceGetPciInfo", handle, label=label)
    bus = pci.busId if pci else ""
    bus = bus.decode() if isinstance(bus, bytes) else bus
    label = f"GPU {index} ({bus})" if bus else label
    uuid = ask("nvmlDeviceGetUUID", handle, label=label, absent="")
    label = f"GPU {index} ({', '.join(filter(None, (uuid, bus)))})"
    memory = ask("nvmlDeviceGetMemoryInfo", handle, label=label)
    mig = ask("nvmlDeviceGetMigMode", handle, label=label, absent=(0, 0))
    cores = ask("nvmlDeviceGetNumGpuCores", handle, label=label, absent=0, tolerated=OPTIONAL)
    clock = ask("nvmlDeviceGetMaxClockInfo", handle, driver.nvml.NVML_CLOCK_SM, label=label, absent=0, tolerated=OPTIONAL)
    faults, notices = _health(driver, handle, label)
    board = {
        "index": index,
        "uuid": uuid,
        "name": ask("nvmlDeviceGetName", handle, label=label, absent=""),
        "device": f"{pci.pciDeviceId >> 16:04x}:{pci.pciDeviceId & 0xFFFF:04x}" if pci else "",
        "capability": list(ask("nvmlDeviceGetCudaComputeCapability", handle, label=label, absent=(0, 0))),
        "total": memory.total if memory else 0,
        "free": memory.free if memory else 0,
        "mig": bool(mig[0]),
        "bus": bus,
        "speed": cores * clock,
        "links": _links(driver, handle, label),
        "faults": faults,
        "notices": notices,
    }
    return [board, *(_slices(driver, handle, board, label) if mig[0] else [])]


def _slices(driver: _Driver, handle: Any, board: dict[str, Any], label: str) -> list[dict[str, Any]]:
    """The MIG slices of one GPU; the driver counts them with holes."""
    ask, found = driver.ask, []
    for i in range(ask("nvmlDeviceGetMaxMigDeviceCount", handle, label=label, absent=0)):
        mig = ask("nvmlDeviceGetMigDeviceHandleByIndex", handle, i, label=f"slice {i} of {label}", tolerated=NO_SLICE)
        if mig is None:
            continue
        where = f"slice {i} of {label}"
        memory = ask("nvmlDeviceGetMemoryInfo", mig, label=where)
        size = ask("nvmlDeviceGetAttributes", mig, label=where) if memory is None else None
        total = memory.total if memory else size.memorySizeMB << 20 if size else 0
        gi, ci = ask("nvmlDeviceGetGpuInstanceId", mig, label=where, absent=0), ask("nvmlDeviceGetComputeInstanceId", mig, label=where, absent=0)
        found.append(
            board
            | {
                "uuid": ask("nvmlDeviceGetUUID", mig, label=where, absent=""),
                "name": ask("nvmlDeviceGetName", mig, label=where, absent="") or f"{board['name']} MIG",
                "total": total,
                "free": memory.free if memory else total,
                "mig": False,
                "parent": board["uuid"],
                "slice": f"{gi}/{ci}",
                "links": 0,
            }
        )
    return found


def _links(driver: _Driver, handle: Any, label: str) -> int:
    """How many NVLinks are up."""
    up = 0
    for link in range(driver.nvml.NVML_NVLINK_MAX_LINKS):
        state = driver.ask("nvmlDeviceGetNvLinkState", handle, link, label=label, tolerated=OPTIONAL)
        if state is None:
            break
        up += bool(state)
    return up


def _peers(driver: _Driver, boards: list[dict[str, Any]]) -> None:
    """Adds to each GPU which others NVLink reaches."""
    handles = [driver.ask("nvmlDeviceGetHandleByIndex", b["index"], label=f"GPU {b['index']}") for b in boards]
    for i, a in enumerate(boards):
        for j, b in enumerate(boards[:i]):
            where = f"GPU {a['index']} ({a['uuid']}, {a['bus']}) to GPU {b['index']}"
            if (
                driver.ask("nvmlDeviceGetP2PStatus", handles[i], handles[j], driver.nvml.NVML_P2P_CAPS_INDEX_NVLINK, label=where, tolerated=OPTIONAL)
                == 0
            ):
                a.setdefault("peers", []).append(b["index"])
                b.setdefault("peers", []).append(a["index"])


def _health(driver: _Driver, handle: Any, label: str) -> tuple[list[str], list[str]]:
    """What is wrong with a GPU that answers, and what only slows it; Xid messages are not NVML's to tell, dmesg has them."""
    nvml, faults, notices = driver.nvml, [], []
    ask = partial(driver.ask, label=label, tolerated=OPTIONAL)
    errors = ask("nvmlDeviceGetTotalEccErrors", handle, nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, nvml.NVML_VOLATILE_ECC, absent=0)
    if errors:
        faults.append(f"{errors} uncorrected ECC error(s) since the driver was loaded")
    if ask("nvmlDeviceGetRetiredPagesPendingStatus", handle, absent=0):
        faults.append("memory pages wait to be retired: reset the GPU or reboot the host")
    rows = ask("nvmlDeviceGetRemappedRows", handle, absent=(0, 0, 0, 0))
    if rows[2]:
        faults.append("memory rows wait to be remapped: reset the GPU or reboot the host")
    if rows[3]:
        faults.append("remapping of memory rows failed: the GPU has to be replaced")
    slowed = ask("nvmlDeviceGetCurrentClocksEventReasons", handle)
    if slowed is None:  # the name before driver 535
        slowed = ask("nvmlDeviceGetCurrentClocksThrottleReasons", handle, absent=0)
    words = [text for bit, text in SLOWED.items() if slowed & bit]
    if words:
        notices.append(f"clocks are slowed now: {', '.join(words)}")
    return faults, notices
