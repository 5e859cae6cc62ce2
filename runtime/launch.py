"""What every engine adapter takes and gives: one start to plan, and the frozen description of a process; it starts nothing itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from artifact.profile import Profile
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

    def shortened(self, length: int) -> Launch:
        """The same with a context of at most so many tokens."""
        return replace(self, argv=_with(self.argv, self.length_flag, str(length)))


def _with(argv: tuple[str, ...], flag: str, value: str) -> tuple[str, ...]:
    if flag in argv:
        at = argv.index(flag)
        return (*argv[: at + 1], value, *argv[at + 2 :])
    return (*argv, flag, value)
