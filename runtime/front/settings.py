"""What the front is told, and its bounds, with their variables; it reads no file and knows no engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from artifact.errors import Invalid


@dataclass(frozen=True)
class Limits:
    """Bounds of one front: bytes of a body and of all bodies at once, requests at the engine, requests and seconds in the queue, images a request."""

    body_bytes: int = 32 << 20
    bodies_bytes: int = 1 << 30
    requests: int = 256
    queued: int = 256
    queue_s: float = 30.0
    images: int = 16
    stored: int = 1000
    stored_bytes: int = 64 << 20
    stored_s: float = 3600.0


# Variable, field of Limits, factor to the field's unit, least and most in the variable's unit; docs/operations.md has the same table.
VARIABLES = (
    ("AIRLOCK_MAX_BODY_MB", "body_bytes", 1 << 20, 1, 1024),
    ("AIRLOCK_MAX_BODIES_MB", "bodies_bytes", 1 << 20, 1, 1 << 20),
    ("AIRLOCK_MAX_REQUESTS", "requests", 1, 1, 100_000),
    ("AIRLOCK_MAX_QUEUED", "queued", 1, 0, 100_000),
    ("AIRLOCK_QUEUE_S", "queue_s", 1, 0, 3600),
    ("AIRLOCK_MAX_IMAGES", "images", 1, 0, 1000),
    ("AIRLOCK_STORED_RESPONSES", "stored", 1, 0, 1_000_000),
    ("AIRLOCK_STORED_S", "stored_s", 1, 1, 30 * 86400),
)


def limits(environ: Mapping[str, str]) -> Limits:
    """The bounds of one front from its variables; raises Invalid naming the variable."""
    found: dict[str, int] = {}
    for name, word, factor, least, most in VARIABLES:
        text = environ.get(name, "").strip()
        if not text:
            continue
        if not (text.isascii() and text.isdigit() and len(text) < 12 and least <= int(text) <= most):
            raise Invalid(f"{name} is {text[:40]!r}", expected=f"a whole number from {least} to {most}", do=f"correct or unset {name}")
        found[word] = int(text) * factor
    made = Limits(**found)
    if made.bodies_bytes < made.body_bytes:
        raise Invalid("AIRLOCK_MAX_BODIES_MB is below AIRLOCK_MAX_BODY_MB", expected="room for one body at least", do="raise AIRLOCK_MAX_BODIES_MB")
    return made


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
