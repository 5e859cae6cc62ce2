"""The bounds of a front and whether it asks for its callers' keys, with their variables; pure, it reads no file and knows no engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

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


def asks_callers(environ: Mapping[str, str]) -> bool:
    """Whether AIRLOCK_CALLER_KEYS asks for keys; raises Invalid for any other word: a misspelt yes must not mean no."""
    text = environ.get("AIRLOCK_CALLER_KEYS", "").strip().lower()
    if text not in ("", "0", "false", "no", "off", "1", "true", "yes", "on"):
        raise Invalid(f"AIRLOCK_CALLER_KEYS is {text[:40]!r}", expected="1 or 0")
    return text in ("1", "true", "yes", "on")
