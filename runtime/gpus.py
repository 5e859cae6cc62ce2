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
from contextlib import suppress
from typing import Any

from artifact.errors import AirlockError, Invalid, Unavailable
from runtime.node import Facts, Gpu

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


def detect(deadline_s: float = 30.0, visible_cuda: str | None = None, visible_nvidia: str | None = None) -> Facts:
    """The node's GPUs that CUDA_VISIBLE_DEVICES and NVIDIA_VISIBLE_DEVICES leave; raises Unavailable (reason gpu), Invalid."""
    simulated = bool(os.environ.get("FAKE_NVML_CONFIG"))
    answer = _ask(deadline_s)
    if answer.get("library") is False:
        return Facts(cpu=True, simulated=simulated)
    gpus = tuple(Gpu(**{**item, "capability": tuple(item["capability"])}) for item in answer["gpus"])
    left = narrow(gpus, visible_cuda, visible_nvidia)
    hidden = ""
    if len(left) < len(gpus):
        hidden = f"{len(gpus) - len(left)} of {len(gpus)} GPU(s) are hidden by CUDA_VISIBLE_DEVICES or NVIDIA_VISIBLE_DEVICES"
    return Facts(False, left, answer["driver"], answer["cuda"], simulated, hidden)


def _ask(deadline_s: float) -> dict[str, Any]:
    """What the child told; a forked one, since a container's interpreter is not always ours to execute again."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.close(reading)
            _tell(writing, json.dumps(_query(writing)))
            status = 0
        finally:
            os._exit(status)  # nothing of the parent's (handlers, buffers, temporary files) may run twice
    os.close(writing)
    lines, whole = _listen(reading, time.monotonic() + deadline_s)
    last = next((line for line in reversed(lines) if line.startswith("nvml")), "nvmlInit")
    if not whole:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    _reap(pid)
    if not whole:
        raise Unavailable(
            f"the GPU query did not answer within {deadline_s:g} s; the last call was {last}",
            expected="an answer from the NVIDIA driver",
            do="look at dmesg for Xid messages; AIRLOCK_GPU_DEADLINE_S changes the limit",
            reason="gpu",
        )
    try:
        answer: dict[str, Any] = json.loads(lines[-1] if lines else "")
    except ValueError:
        what = f"the GPU query ended without an answer in {last}"
        raise Unavailable(what, expected="an answer from the NVIDIA driver", do="run nvidia-smi on this host", reason="gpu") from None
    if "error" in answer:
        raise _failure(answer)
    return answer


def _tell(fd: int, line: str) -> None:
    raw = line.encode() + b"\n"
    while raw:
        raw = raw[os.write(fd, raw) :]


def _listen(fd: int, until: float) -> tuple[list[str], bool]:
    """The child's lines, and whether it came to its end before the deadline."""
    raw = b""
    with open(fd, "rb", buffering=0) as stream:
        while True:
            left = until - time.monotonic()
            if left <= 0 or not select.select([stream], [], [], left)[0]:
                return raw.decode("utf-8", "replace").splitlines(), False
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


def narrow(gpus: tuple[Gpu, ...], visible_cuda: str | None, visible_nvidia: str | None) -> tuple[Gpu, ...]:
    """The GPUs that the two variables leave, in the order CUDA_VISIBLE_DEVICES gives; raises Invalid for an entry that names none."""
    left = gpus
    text = (visible_nvidia or "").strip()
    if text == "none":
        return ()
    # `void` is what the container toolkit sets when it injected the devices itself (CDI). Fewer devices than entries also means that
    # the toolkit has applied the list: the indices in it are the host's and no longer ours.
    if text not in ("", "all", "void"):
        entries = _entries(text)
        if len(gpus) > len(entries):
            left = tuple(_find(gpus, e, "NVIDIA_VISIBLE_DEVICES") for e in entries)
    if visible_cuda is not None:
        entries = _entries(visible_cuda)
        if entries in ([], ["-1"], ["NoDevFiles"]):
            return ()
        left = tuple(_find(left, e, "CUDA_VISIBLE_DEVICES") for e in entries)
    return tuple(dict.fromkeys(left))


def _entries(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _find(gpus: tuple[Gpu, ...], entry: str, variable: str) -> Gpu:
    if entry.isascii() and entry.isdigit() and len(entry) < 5 and int(entry) < len(gpus):
        return gpus[int(entry)]
    found = [g for g in gpus if g.uuid.startswith(entry)] if entry.startswith("GPU-") else []
    if len(found) == 1:
        return found[0]
    have = ", ".join(f"{i}={g.uuid}" for i, g in enumerate(gpus)) or "none"
    raise Invalid(f"{variable} names {entry[:60]!r}, which is no GPU of this node", expected=f"indices or UUIDs of: {have}", reason="gpu")


def _query(fd: int) -> dict[str, Any]:
    """Runs in the child: every fact, or the first failure with the call's name."""
    import pynvml as nvml

    call = "nvmlInit"

    def ask(name: str, *args: Any, label: str = "", absent: Any = None) -> Any:
        nonlocal call
        call = name + (f" of {label}" if label else "")
        _tell(fd, call)  # at once: what the parent reads if this call never returns
        try:
            return getattr(nvml, name)(*args)
        except nvml.NVMLError as error:
            if error.value in TOLERATED:
                return absent
            raise

    try:
        ask("nvmlInit")
        driver, cuda = ask("nvmlSystemGetDriverVersion", absent=""), ask("nvmlSystemGetCudaDriverVersion_v2", absent=0)
        gpus = [_gpu(ask, i) for i in range(ask("nvmlDeviceGetCount", absent=0))]
    except nvml.NVMLError as error:
        if error.value == LIBRARY_NOT_FOUND and call == "nvmlInit":
            words = _unloadable()
            return {"error": LIBRARY_NOT_FOUND, "words": words, "call": call} if words else {"library": False}
        return {"error": error.value, "words": str(error), "call": call}
    except nvml.NVMLLibraryMismatchError as error:
        return {"error": 18, "words": str(error), "call": call}
    return {"driver": driver, "cuda": f"{cuda // 1000}.{cuda % 1000 // 10}", "gpus": gpus}


def _unloadable() -> str:
    """Why a library that is present does not load, empty when there is none: the binding calls both "not found"."""
    try:
        ctypes.CDLL("libnvidia-ml.so.1")
    except OSError as error:
        # glibc and musl name first what they lack: the library itself, or one that it needs.
        absent = re.match(r"(Error loading shared library )?libnvidia-ml\.so\.1: .*No such file or directory", str(error))
        return "" if absent else str(error)
    return "the library says that it is not there"


def _gpu(ask: Any, index: int) -> dict[str, Any]:
    label = f"GPU {index}"
    handle = ask("nvmlDeviceGetHandleByIndex", index, label=label)
    uuid = ask("nvmlDeviceGetUUID", handle, label=label, absent="")
    label = f"GPU {index} ({uuid})"
    pci = ask("nvmlDeviceGetPciInfo", handle, label=label)
    memory = ask("nvmlDeviceGetMemoryInfo", handle, label=label)
    mig = ask("nvmlDeviceGetMigMode", handle, label=label, absent=(0, 0))
    return {
        "index": index,
        "uuid": uuid,
        "name": ask("nvmlDeviceGetName", handle, label=label, absent=""),
        "device": f"{pci.pciDeviceId >> 16:04x}:{pci.pciDeviceId & 0xFFFF:04x}" if pci else "",
        "capability": list(ask("nvmlDeviceGetCudaComputeCapability", handle, label=label, absent=(0, 0))),
        "total": memory.total if memory else 0,
        "free": memory.free if memory else 0,
        "mig": bool(mig[0]),
    }
