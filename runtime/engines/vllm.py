"""Arguments, environment and health path of a vLLM server (0.32: `vllm serve`); pure but for find(), starts nothing and never imports vLLM.

A model directory is data: no flag that lets it bring code is ever passed, and the engine inherits nothing but an allow-list.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from artifact.errors import Invalid, NotFound
from artifact.profile import TASKS, Profile
from runtime.engines import Launch
from runtime.node import Gpu
from runtime.settings import GPU_SHARE, Settings

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
ALLOWED_DTYPES = ("auto", "bfloat16", "float16", "float32", "half", "float")
SOCKET_LIMIT = 107  # sun_path of Linux without its final zero byte


@dataclass(frozen=True)
class Installation:
    """An engine's own environment: its program, and the directory of metadata aliases where the build has one."""

    program: Path
    meta: Path | None = None


def find(settings: Settings) -> Installation:
    """The vLLM environment that AIRLOCK_ENGINE_VLLM names; raises NotFound saying what is missing."""
    root = settings.engine_vllm
    do = "build it with the command in docs/operations.md and set AIRLOCK_ENGINE_VLLM to its directory (the one that holds bin/vllm)"
    if root is None:
        raise NotFound("AIRLOCK_ENGINE_VLLM is not set", expected="the directory of an environment with vLLM", do=do, reason="engine_absent")
    program = root / "bin" / "vllm"
    if not program.is_file():
        raise NotFound(f"there is no vLLM at {program}", expected="an executable file", do=do, reason="engine_absent")
    if not os.access(program, os.X_OK):
        raise NotFound(f"{program} is not executable for uid {os.geteuid()}", expected="an executable file", do=do, reason="engine_absent")
    meta = root / "meta"
    return Installation(program, meta if meta.is_dir() else None)


def launch(
    profile: Profile,
    model_dir: Path,
    socket: Path,
    settings: Settings,
    *,
    installation: Installation,
    gpus: tuple[Gpu, ...] = (),
    share: float = GPU_SHARE,
) -> Launch:
    """The start of one engine for a profile on the given GPUs (none: the CPU); raises Invalid for options outside the known words."""
    cpu = profile.tags.get("device") == "cpu"
    task = profile.options.get("task", "generate")
    if task not in TASKS:
        raise Invalid(f"option task of profile {profile.id} is {task[:40]!r}", expected=" or ".join(TASKS))
    if len(os.fsencode(socket)) > SOCKET_LIMIT:
        raise Invalid(f"the socket path {socket} is too long", expected=f"at most {SOCKET_LIMIT} bytes", do="set TMPDIR to a shorter directory")
    argv = [str(installation.program), "serve", str(model_dir), "--served-model-name", *settings.names, "--uds", str(socket)]
    argv += ["--disable-uvicorn-access-log"]  # the health polls alone would be two lines a second
    if task == "embed":
        argv += ["--runner", "pooling", "--convert", "embed"]
    argv += ["--dtype", dtype(profile)]
    length = _length(profile, settings)
    if length:
        argv += ["--max-model-len", str(length)]
    tp, pp = profile.tags.get("tp", "1"), profile.tags.get("pp", "1")
    if tp != "1":
        argv += ["--tensor-parallel-size", tp]
    if pp != "1":
        argv += ["--pipeline-parallel-size", pp]
    if cpu:
        argv += ["--enforce-eager"]
    elif (settings.kv_percent or share) != GPU_SHARE:
        argv += ["--gpu-memory-utilization", f"{settings.kv_percent or share:.3f}"]
    return Launch(tuple(argv), _environment(settings, installation, gpus, cpu), "/health", socket, cwd=socket.parent)


def dtype(profile: Profile) -> str:
    """The --dtype of a profile; raises Invalid for a word vLLM does not know."""
    stated = profile.options.get("dtype", "")
    if stated:
        if stated not in ALLOWED_DTYPES:
            raise Invalid(f"option dtype of profile {profile.id} is {stated[:40]!r}", expected=", ".join(ALLOWED_DTYPES))
        return stated
    if profile.tags.get("device") == "cpu" and profile.options.get("task") == "embed":
        return "float32"  # `auto` becomes float16, which a CPU runs 2 to 5 times slower (measured)
    # 8 and 4 bit checkpoints say themselves how they are quantised: auto reads it from config.json.
    return DTYPES.get(profile.tags.get("precision", ""), "auto")


def _length(profile: Profile, settings: Settings) -> int:
    if settings.max_model_len:
        return settings.max_model_len
    text = profile.options.get("max_model_len", "")
    if not text:
        return 0
    if not (text.isascii() and text.isdigit() and 0 < len(text) < 10 and int(text)):
        raise Invalid(f"option max_model_len of profile {profile.id} is {text[:40]!r}", expected="a whole number of tokens")
    return int(text)


def _environment(settings: Settings, installation: Installation, gpus: tuple[Gpu, ...], cpu: bool) -> dict[str, str]:
    home = settings.cache / "home"
    env = dict(settings.inherited)
    env.setdefault("PATH", "/usr/local/bin:/usr/bin:/bin")
    env["PATH"] = f"{installation.program.parent}:{env['PATH']}"
    env |= {
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "VLLM_CACHE_ROOT": str(settings.cache / "vllm"),
        "VLLM_CONFIG_ROOT": str(home / "vllm-config"),
        "HF_HOME": str(home / "huggingface"),
        "HOME": str(home),
        "XDG_CACHE_HOME": str(home / "cache"),
        # A container's uid often has no passwd entry; torch asks for a user name and would stop without one.
        "USER": "nim",
        "LOGNAME": "nim",
        "PYTHONUNBUFFERED": "1",
    }
    if settings.log_level in ("DEBUG", "WARNING", "ERROR", "CRITICAL"):
        env["VLLM_LOGGING_LEVEL"] = settings.log_level
    if installation.meta:
        env["PYTHONPATH"] = str(installation.meta)
    if cpu:
        env.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        env["CUDA_VISIBLE_DEVICES"] = ""
    else:
        # NVML and CUDA count differently unless told so; UUIDs leave no doubt which device the lease was for.
        env["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"
        env["CUDA_VISIBLE_DEVICES"] = ",".join(g.uuid for g in gpus)
    return env
