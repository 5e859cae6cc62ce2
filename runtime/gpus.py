"""GPU facts through NVML, read in a child process with a deadline: a blocked driver call cannot be interrupted otherwise.

The one place that imports pynvml. Only a missing library means a CPU node; any other NVML failure is an error that names it, since a broken driver
must never look like a machine without GPUs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

from artifact.errors import AirlockError, Invalid, Unavailable
from runtime.settings import Facts, Gpu

# NVML return codes (nvml.h); the words are what an operator can act on.
LIBRARY_NOT_FOUND = 12
HINTS = {
    4: "the container has no access to the device; start it with the NVIDIA container toolkit",
    9: "the NVIDIA library is present but the driver is not loaded; load it (modprobe nvidia) or reboot the host",
    10: "a GPU does not answer; look at dmesg for Xid messages",
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
    # -P keeps the current directory out of the child's import path: a file pynvml.py lying there would run.
    child = subprocess.Popen([sys.executable, "-P", "-m", "runtime.gpus"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL)
    try:
        out, trace = child.communicate(timeout=deadline_s)
    except subprocess.TimeoutExpired:
        child.kill()
        _, trace = child.communicate()
        raise Unavailable(
            f"the GPU query did not answer within {deadline_s:g} s; the last call was {_last_call(trace)}",
            expected="an answer from the NVIDIA driver",
            do="look at dmesg for Xid messages; AIRLOCK_GPU_DEADLINE_S changes the limit",
            reason="gpu",
        ) from None
    try:
        answer: dict[str, Any] = json.loads(out)
    except ValueError:
        raise Unavailable(
            f"the GPU query ended with status {child.returncode} in {_last_call(trace)}",
            expected="an answer from the NVIDIA driver",
            do="run nvidia-smi on this host",
            reason="gpu",
        ) from None
    if "error" in answer:
        raise _failure(answer)
    return answer


def _last_call(trace: bytes) -> str:
    lines = [line for line in trace.decode("utf-8", "replace").splitlines() if line.startswith("nvml")]
    return lines[-1] if lines else "nvmlInit"


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


def _query() -> dict[str, Any]:
    """Runs in the child: every fact, or the first failure with the call's name."""
    import pynvml as nvml

    call = "nvmlInit"

    def ask(name: str, *args: Any, label: str = "", absent: Any = None) -> Any:
        nonlocal call
        call = name + (f" of {label}" if label else "")
        os.write(2, call.encode() + b"\n")  # unbuffered: what the parent reads after it killed us
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
            return {"library": False}
        return {"error": error.value, "words": str(error), "call": call}
    except nvml.NVMLLibraryMismatchError as error:
        return {"error": 18, "words": str(error), "call": call}
    return {"driver": driver, "cuda": f"{cuda // 1000}.{cuda % 1000 // 10}", "gpus": gpus}


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


if __name__ == "__main__":
    sys.stdout.write(json.dumps(_query()))
