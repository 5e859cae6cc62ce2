"""The fields of a JSON request of the administration: each is read once, by its kind, or refused; pure, here so that every verb refuses alike."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from datetime import UTC, datetime

from artifact.errors import Invalid

Body = Mapping[str, object]
UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
MAX_LIFE_S = 3660 * 86400
MAX_TIME = 4_000_000_000
MAX_TEXTS = 100
_TIME = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}Z\Z")


def only(body: Body, *known: str) -> None:
    """Returns where the body has these fields alone: what this verb does not know could be a right that somebody hopes for; raises Invalid."""
    unknown = sorted(str(key) for key in body if key not in known)
    if unknown:
        raise Invalid(f"the field {unknown[0][:60]!r} is not taken here", expected=", ".join(known), reason="body")


def text(body: Body, key: str, default: str | None = None, most: int = 255) -> str:
    """A printable text, not empty unless `default` is; raises Invalid."""
    value = body.get(key, default)
    bad = not isinstance(value, str) or len(value) > most or any(ord(c) < 32 or ord(c) == 127 or 0xD800 <= ord(c) <= 0xDFFF for c in value)
    if bad or not isinstance(value, str) or not (value or default == ""):
        raise Invalid(f"{key} is missing or not text", expected=f"1 to {most} characters", reason="body")
    return value


def word(body: Body, key: str, words: tuple[str, ...], default: str | None = None) -> str:
    """One of some words; raises Invalid."""
    value = text(body, key, default)
    if value not in words:
        raise Invalid(f"{key} is not known", expected=" or ".join(w or "nothing" for w in words), reason="body")
    return value


def whole(body: Body, key: str, most: int, default: int = 0) -> int:
    """A whole number from 0; raises Invalid."""
    value = body.get(key, default)
    if type(value) is not int or not 0 <= value <= most:
        raise Invalid(f"{key} is no whole number", expected=f"0 to {most}", reason="body")
    return value


def texts(body: Body, key: str) -> tuple[str, ...]:
    """A list of texts, each once; none where it is absent; raises Invalid."""
    value = body.get(key, [])
    if not isinstance(value, list) or len(value) > MAX_TEXTS or not all(isinstance(v, str) and 0 < len(v) <= 255 and v.isprintable() for v in value):
        raise Invalid(f"{key} is no list of texts", expected=f"at most {MAX_TEXTS} of 1 to 255 characters", reason="body")
    return tuple(dict.fromkeys(value))


def seconds(given: str) -> float:
    """A life such as `90d`, `12h` or `never` (0) in seconds; raises Invalid."""
    if given == "never":
        return 0.0
    found = re.fullmatch(r"([0-9]{1,9})([smhdw])", given)
    if not found or not 0 < int(found[1]) * UNITS[found[2]] <= MAX_LIFE_S:
        raise Invalid(f"{given[:40]!r} is not a life", expected="a number and s, m, h, d or w (at most ten years), or never", do="--expires 90d")
    return float(int(found[1]) * UNITS[found[2]])


def moment(body: Body, key: str, now: float, default: str | None = "") -> float:
    """A time: RFC 3339 in UTC, a life from now such as `90d`, or empty and `never` for 0; raises Invalid."""
    given = text(body, key, default, 40)
    if given in ("", "never"):
        return 0.0
    if _TIME.match(given):
        try:
            at = datetime.strptime(given, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC).timestamp()
        except ValueError:
            at = math.inf
        if 0 < at <= MAX_TIME:
            return at
    elif re.fullmatch(r"[0-9]{1,9}[smhdw]", given):
        return math.floor(now + seconds(given))
    raise Invalid(f"{key} is no time", expected="2030-01-31T00:00:00Z, a life such as 90d, or never", reason="body")


def life(body: Body, key: str, default: str) -> int:
    """A length of time such as `7d`, at most ten years; 0 for `0s`; raises Invalid."""
    given = text(body, key, default, 40)
    return 0 if re.fullmatch(r"0[smhdw]", given) else int(seconds("" if given == "never" else given))
