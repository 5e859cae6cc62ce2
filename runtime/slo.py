"""What a run of requests was worth: percentiles, levels of concurrency, and whether a target, a baseline or a profile's promise is kept; pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from artifact.errors import Invalid

LEAST = ("tok_s", "stream_tok_s")  # a target of these is a floor, of all others a ceiling
TARGETS = ("ttft_p50_ms", "ttft_p95_ms", "ttft_p99_ms", "itl_p50_ms", "itl_p95_ms", "itl_p99_ms", "tok_s", "stream_tok_s")
SCHEMA = 1


@dataclass(frozen=True)
class Sample:
    """One streamed request: seconds from its start to its first token, between tokens, and to its end; tokens; the error, empty for none."""

    first_s: float = 0.0
    gaps_s: tuple[float, ...] = ()
    whole_s: float = 0.0
    tokens: int = 0
    error: str = ""


@dataclass(frozen=True)
class Level:
    """The figures of one concurrency: ms to the first token and between tokens, tokens a second (all streams, one), failures."""

    concurrency: int
    requests: int
    failed: int
    seconds: float
    tokens: int
    ttft_p50_ms: float
    ttft_p95_ms: float
    ttft_p99_ms: float
    itl_p50_ms: float
    itl_p95_ms: float
    itl_p99_ms: float
    tok_s: float
    stream_tok_s: float


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that so large a share of all is not above (nearest rank); 0 of nothing."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else 0.0


def level(concurrency: int, samples: Sequence[Sample], seconds: float) -> Level:
    """The figures of the requests of one level, which took so many seconds together."""
    good = [s for s in samples if not s.error]
    first = [s.first_s * 1000 for s in good]
    gaps = [g * 1000 for s in good for g in s.gaps_s]
    tokens = sum(s.tokens for s in good)
    rates = [(s.tokens - 1) / (s.whole_s - s.first_s) for s in good if s.tokens > 1 and s.whole_s > s.first_s]
    ttft = [percentile(first, share) for share in (0.5, 0.95, 0.99)]
    itl = [percentile(gaps, share) for share in (0.5, 0.95, 0.99)]
    rate = tokens / seconds if seconds else 0.0
    failed = len(samples) - len(good)
    return Level(concurrency, len(samples), failed, seconds, tokens, ttft[0], ttft[1], ttft[2], itl[0], itl[1], itl[2], rate, percentile(rates, 0.5))


def parse_targets(text: str) -> dict[str, float]:
    """`ttft_p95_ms=500,tok_s=1000`; raises Invalid, also where nothing is asked for: a check that judges nothing would always pass."""
    found: dict[str, float] = {}
    for part in text.split(","):
        name, sep, value = (piece.strip() for piece in part.partition("="))
        if not sep or name not in TARGETS:
            raise Invalid(f"there is no target {part[:60]!r}", expected="NAME=NUMBER, with a name of " + ", ".join(TARGETS))
        try:
            number = float(value)
        except ValueError:
            number = -1.0
        if not 0 < number < 1e12:
            raise Invalid(f"the target {name} is {value[:40]!r}", expected="a number above 0, without its unit")
        if name in found:
            raise Invalid(f"the target {name} stands twice", expected="each once")
        found[name] = number
    return found


def missed(found: Level, targets: Mapping[str, float]) -> list[str]:
    """Which targets a level does not reach, in words; a request that failed is a miss of its own."""
    out = [f"{found.failed} of {found.requests} requests failed at {found.concurrency} streams"] if found.failed else []
    for name, bar in targets.items():
        value = float(getattr(found, name))
        if value < bar if name in LEAST else value > bar:
            out.append(f"{name} at {found.concurrency} streams is {value:.1f}, the target {'at least' if name in LEAST else 'at most'} {bar:g}")
    return out


def regressions(now: Sequence[Level], before: Sequence[Level], tolerance: float) -> list[str]:
    """What became worse than a recorded run by more than a share (0.2: a fifth), at each concurrency that both have; in words."""
    past, out = {b.concurrency: b for b in before}, []
    for found in now:
        old = past.get(found.concurrency)
        if old is None:
            continue
        for name in ("ttft_p95_ms", "itl_p95_ms", "tok_s"):
            value, was = float(getattr(found, name)), float(getattr(old, name))
            worse = value < was * (1 - tolerance) if name in LEAST else value > was * (1 + tolerance)
            if was > 0 and worse:
                out.append(f"{name} at {found.concurrency} streams is {value:.1f}, recorded {was:.1f} ({100 * (value / was - 1):+.0f} %)")
    return out


def document(levels: Sequence[Level], facts: Mapping[str, object]) -> dict[str, object]:
    """What a run is recorded as."""
    return {"schema": SCHEMA, **facts, "levels": [asdict(found) for found in levels]}


def parse(doc: Mapping[str, object]) -> list[Level]:
    """The levels of a recorded run; raises Invalid."""
    entries, out = doc.get("levels"), []
    if doc.get("schema") != SCHEMA or not isinstance(entries, list):
        raise Invalid("the baseline is no recorded run", expected=f"a file that --record wrote, of schema {SCHEMA}")
    for entry in entries:
        values: dict[str, Any] = {f.name: entry.get(f.name) if isinstance(entry, dict) else None for f in fields(Level)}
        if not all(isinstance(v, int | float) and math.isfinite(v) and v >= 0 for v in values.values()):
            raise Invalid("the baseline holds a level that is none", expected="a file that --record wrote")
        out.append(Level(**values))
    return out
