"""What every engine adapter takes and gives: one start to plan, and the frozen description of a process; it starts nothing itself."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from artifact.errors import Invalid, NotFound
from artifact.profile import TASKS, Profile
from runtime.node import Gpu
from runtime.settings import GPU_SHARE, Settings


@dataclass(frozen=True)
class Installation:
    """An engine's own environment: its program, its version where that is told, and the directory of metadata aliases where the build has one."""

    program: Path
    meta: Path | None = None
    version: str = ""


@dataclass(frozen=True)
class Start:
    """One start to plan: what to run, on which GPUs (none: the CPU) with which share of their memory, our private folder, and a random key."""

    profile: Profile
    model: Path
    folder: Path
    settings: Settings
    installation: Installation
    gpus: tuple[Gpu, ...] = ()
    share: float = GPU_SHARE
    key: str = field(default="", repr=False)


@dataclass(frozen=True)
class Launch:
    """How to start an engine and where it answers.

    With a socket it listens there; without one on a port of the loopback interface that the supervisor picks at each start (`--port` in argv).
    `models` maps each name that clients may use to what their request's body must say instead. `files` and `links` are made in our private
    folder before the start; `key` must stand in a file there, never in argv or the environment.
    """

    argv: tuple[str, ...]
    env: Mapping[str, str]
    health_path: str
    socket: Path | None
    engine: str = "vllm"
    cwd: Path | None = None
    alive_path: str = ""
    metrics_path: str = "/metrics"
    port: int = 0
    length_flag: str = "--max-model-len"
    models: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    files: Mapping[Path, str] = field(default_factory=dict, repr=False)
    links: Mapping[Path, Path] = field(default_factory=dict)
    key: str = field(default="", repr=False)

    def url(self, path: str) -> str:
        """Where a path of the engine is asked; the host is only a word where a unix socket is connected."""
        return f"http://engine{path}" if self.socket else f"http://127.0.0.1:{self.port}{path}"

    @property
    def headers(self) -> dict[str, str]:
        """What opens the engine."""
        return {"Authorization": f"Bearer {self.key}"} if self.key else {}

    def moved(self, port: int) -> Launch:
        """The same on another port of the loopback interface."""
        return replace(self, argv=_with(self.argv, "--port", str(port)), port=port)

    def smaller(self, share: float) -> Launch:
        """The same with a smaller share of its GPUs' memory; only vLLM tells which would do (exits.RULES), so this is its flag."""
        return replace(self, argv=_with(self.argv, "--gpu-memory-utilization", f"{share:.3f}"))

    def shortened(self, length: int) -> Launch:
        """The same with a context of at most so many tokens."""
        return replace(self, argv=_with(self.argv, self.length_flag, str(length)))


def find(settings: Settings, engine: str, program: str, *distributions: str) -> Installation:
    """The environment that AIRLOCK_ENGINE_<NAME> names, with the version of the first distribution in it; raises NotFound saying what is missing."""
    variable, root = f"AIRLOCK_ENGINE_{engine.upper()}", settings.engine(engine)
    do = f"build it with the command in docs/operations.md and set {variable} to its directory (the one that holds {program})"
    if root is None:
        raise NotFound(f"{variable} is not set", expected=f"the directory of an environment with {engine}", do=do, reason="engine_absent")
    path, meta = root / program, root / "meta"
    if not path.is_file():
        raise NotFound(f"there is no {engine} at {path}", expected="an executable file", do=do, reason="engine_absent")
    if not os.access(path, os.X_OK):
        raise NotFound(f"{path} is not executable for uid {os.geteuid()}", expected="an executable file", do=do, reason="engine_absent")
    names = [n for d in distributions for n in root.glob(f"lib/python3*/*-packages/{d}-*.dist-info")]
    version = names[0].name.removesuffix(".dist-info").rpartition("-")[2] if names else ""
    return Installation(path, meta if meta.is_dir() else None, version)


def environment(start: Start, more: Mapping[str, str]) -> dict[str, str]:
    """The whole environment of an engine: the allow-list, offline switches, places in our cache, the GPUs by UUID, and what the engine adds."""
    settings, cpu = start.settings, start.profile.tags.get("device") == "cpu"
    home = settings.cache / "home"
    env = dict(settings.inherited)
    env.setdefault("PATH", "/usr/local/bin:/usr/bin:/bin")
    env["PATH"] = f"{start.installation.program.parent}:{env['PATH']}"
    env |= {
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "DO_NOT_TRACK": "1",
        "HF_HOME": str(home / "huggingface"),
        "HOME": str(home),
        "XDG_CACHE_HOME": str(home / "cache"),
        # A container's uid often has no passwd entry; torch asks for a user name and would stop without one.
        "USER": "nim",
        "LOGNAME": "nim",
        "PYTHONUNBUFFERED": "1",
    }
    if start.installation.meta:
        env["PYTHONPATH"] = str(start.installation.meta)
    if cpu:
        env["CUDA_VISIBLE_DEVICES"] = ""
    else:
        # NVML and CUDA count differently unless told so; UUIDs leave no doubt which device the lease was for.
        env["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"
        env["CUDA_VISIBLE_DEVICES"] = ",".join(g.uuid for g in start.gpus)
    return env | dict(more)


def task(profile: Profile, engine: str, able: tuple[str, ...] = TASKS) -> str:
    """The task of a profile; raises Invalid where it is unknown or the engine has no such routes."""
    found = profile.options.get("task", "generate")
    if found not in able:
        raise Invalid(f"option task of profile {profile.id} is {found[:40]!r}", expected=f"{' or '.join(able)} with {engine}")
    return found


def parallel(start: Start) -> tuple[str, str]:
    """Tensor and pipeline parallelism of a profile; raises Invalid where they contradict the GPUs that it gets."""
    tags = start.profile.tags
    tp, pp = tags.get("tp", "1"), tags.get("pp", "1")
    if not all(t.isascii() and t.isdigit() and 0 < int(t) <= 4096 for t in (tp[:5], pp[:5])):
        raise Invalid(f"tp={tp[:20]!r} pp={pp[:20]!r} of profile {start.profile.id} are no sizes", expected="whole numbers")
    if start.gpus and int(tp) * int(pp) != len(start.gpus):
        raise Invalid(f"profile {start.profile.id} spreads over {tp} x {pp} GPUs, but {len(start.gpus)} are given", expected="as many GPUs")
    return tp, pp


def require_unset(start: Start, engine: str, **variables: str) -> None:
    """Raises Invalid for a setting that was given and that an engine cannot follow: it is told, never dropped. Keys are fields of Tuning."""
    for field_name, variable in variables.items():
        if getattr(start.settings.tuning, field_name):
            raise Invalid(f"{variable} is set, and {engine} has no such setting", expected=f"{variable} unset", reason="variable")


def _with(argv: tuple[str, ...], flag: str, value: str) -> tuple[str, ...]:
    if flag in argv:
        at = argv.index(flag)
        return (*argv[: at + 1], value, *argv[at + 2 :])
    return (*argv, flag, value)
