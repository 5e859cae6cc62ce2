"""Why an engine ended: the classes of engines.md 5.3 for vLLM, and those of TensorRT-LLM and SGLang; pure."""

from __future__ import annotations

import re
import signal
from dataclasses import dataclass

MARGIN = 0.02  # kept below what is free, as in the selection
LEAST_SHARE = 0.1
NEVER, ONCE, BACKOFF, NONE = "never", "once", "back-off", "none"


@dataclass(frozen=True)
class Exit:
    """Why an engine ended: class, status, one sentence for people, what to do next, what would fit (0: not told): context, share of a GPU."""

    kind: str
    rc: int
    detail: str
    retry: str
    max_model_len: int = 0
    share: float = 0.0


# First match wins; the whole log is searched, as a child prints the cause before the parent's general words.
RULES: tuple[tuple[str, str, str, str], ...] = (
    (
        r"unrecognized arguments|error: argument|Error: No such option|Error: Invalid value",
        "bad_config",
        NEVER,
        "the engine does not know an argument",
    ),
    (r"the engine's program cannot be executed", "bad_config", NEVER, "the engine environment is incomplete or for another system"),
    (r"No package metadata was found for vllm", "bad_config", NEVER, "the engine environment lacks the metadata alias `vllm`: build it again"),
    (r"Unable to find interface for: \[127", "no_loopback", NEVER, "the loopback interface is down (do: ip link set lo up)"),
    (r"estimated maximum model length is (\d+)", "does_not_fit", ONCE, "the context length does not fit into the memory left"),
    (
        r"No available memory for the cache blocks|Not enough memory\. Please try to increase --mem-fraction-static",
        "does_not_fit",
        NEVER,
        "the weights leave no memory for the KV cache",
    ),
    (
        r"Free memory on device \S+ (?:\(([\d.]{1,9})/([\d.]{1,9}) GiB\))?.*is less than desired GPU memory utilization",
        "gpu_busy",
        ONCE,
        "another process holds memory of the GPU",
    ),
    (r"Cannot find any model weights", "bad_weights", NEVER, "there are no weights as safetensors; a pickle is not read"),
    (r"SafetensorError", "bad_weights", NEVER, "the engine cannot read the weights: a verified file means a wrong artefact"),
    (
        r"engine plan file is not compatible with this version|engine plan file is generated on an incompatible device",
        "wrong_engine",
        NEVER,
        "the prebuilt engine is for another TensorRT or another GPU",
    ),
    (r"No GPU devices found on the node|No CUDA GPUs are available", "no_gpu", NEVER, "the engine sees no GPU (do: start the container with --gpus)"),
    (
        r"(?:pass the argument|set the option) .?trust_remote_code=True",
        "needs_code",
        NEVER,
        "the model needs code of its own, which its promoted profile does not allow",
    ),
    (
        r"HFValidationError|is greater than the derived (?:max_model_len|context_length)|must be divisible by tensor parallel size|ValidationError",
        "bad_config",
        NEVER,
        "the engine refuses the configuration",
    ),
    (
        r"(?i)address already in use|Failed to bind socket to|port \d+ is (?:not available|already in use)",
        "port",
        ONCE,
        "the engine's address is in use",
    ),
    (
        r"CUDA out of memory|OutOfMemoryError|CUDA error: out of memory|Cuda Runtime \(out of memory\)",
        "does_not_fit",
        NEVER,
        "the GPU's memory is too small",
    ),
    (r"_C::.*expected at most|quantization.*not supported|not supported.*quantization", "unsupported", NEVER, "this engine build cannot do that"),
)


def classify(rc: int, log: str, *, asked: bool = False, was_ready: bool = False) -> Exit:
    """The class of an exit from its status and the whole kept log; pure."""
    if asked:
        return Exit("stopped", rc, "stopped on request", NONE)
    if rc in (-signal.SIGKILL, 137):
        return Exit("oom_kill", rc, "killed, probably out of memory", BACKOFF)
    if rc == 0 or was_ready:
        return Exit("engine_died", rc, f"the engine ended by itself with status {rc}", BACKOFF)
    if rc == 2:
        return Exit("bad_config", rc, f"the engine refused its arguments: {_last(log)}", NEVER)
    for pattern, kind, retry, words in RULES:
        found = re.search(pattern, log)
        if found:
            detail = f"{words}: {_line_of(log, found.start())}"
            if kind == "gpu_busy":
                share = _share(found.group(1), found.group(2))
                return Exit(kind, rc, detail, retry if share else NEVER, share=share)
            length = int(found.group(1)) if found.re.groups and len(found.group(1)) < 10 else 0
            return Exit(kind, rc, detail, NEVER if found.re.groups and not length else retry, length)
    return Exit("unknown", rc, f"the engine ended with status {rc}:\n" + "\n".join(log.splitlines()[-40:]), BACKOFF)


def _share(free: str | None, total: str | None) -> float:
    """The share of a GPU that its free memory allows, 0 where that is not worth a try."""
    try:
        share = float(free or 0) / float(total or 0) - MARGIN
    except (ValueError, ZeroDivisionError):
        return 0.0
    return round(share, 3) if LEAST_SHARE <= share < 1 else 0.0


def _last(log: str) -> str:
    lines = [line for line in log.splitlines() if "error" in line.lower()] or log.splitlines() or [""]
    return lines[-1].strip()[:500]


def _line_of(log: str, at: int) -> str:
    start = log.rfind("\n", 0, at) + 1
    end = log.find("\n", at)
    return log[start : end if end >= 0 else len(log)].strip()[:500]
