"""What the front is told: what is served and why, where, and its time limits; values only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from runtime.bounds import Limits


@dataclass(frozen=True)
class ServeSettings:
    """What the front is told: address, names of the model (the first is the engine's), what is served and why, and its time limits.

    `manifest` and `license` are whole texts; `cache` are bytes by what was done with them; `expected` is the profile's own promise.
    """

    host: str
    port: int
    model_names: tuple[str, ...]
    profile_id: str
    profile_digest: str
    model_digest: str
    drain_s: float = 20.0
    model_ref: str = "latest"
    simulated: bool = False
    idle_s: float = 300.0
    answer_s: float = 1800.0
    ready_s: float = 1200.0
    backoff_s: float = 1.0
    stop_s: float = 10.0
    engine_log: Path | None = None
    why: str = ""
    manifest: str = ""
    license: tuple[str, bytes] = ("", b"")
    cache: Mapping[str, int] = field(default_factory=dict)
    cache_folder: Path | None = None
    expected: Mapping[str, object] = field(default_factory=dict)
    limits: Limits = field(default_factory=Limits)
    watch_s: float = 15.0
    quiet_s: float = 75.0  # a connection without a whole request head is closed then: each costs a file descriptor
