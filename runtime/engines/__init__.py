"""What an engine adapter hands to the supervisor: one frozen description of a process to start; it starts nothing itself.

Every engine is one file beside this one; none imports another.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Launch:
    """How to start an engine and where it answers: argument vector, whole environment, health path, unix socket, working directory."""

    argv: tuple[str, ...]
    env: Mapping[str, str]
    health_path: str
    socket: Path
    engine: str = "vllm"
    cwd: Path | None = None
