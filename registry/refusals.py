"""What the refusals of all doors have in common: their words, the headers that HTTP asks for, the status of a class of errors; pure.

Here because these are HTTP's and not a protocol's. The codes are each protocol's own, and so is the status where its table says another.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from artifact import errors

T = TypeVar("T")
STATUS: dict[type[errors.AirlockError], int] = {
    errors.Unauthenticated: 401,
    errors.Denied: 403,
    errors.NotFound: 404,
    errors.Invalid: 400,
    errors.Mismatch: 400,
    errors.Conflict: 409,
    errors.RangeInvalid: 416,
    errors.TooLarge: 413,
    errors.Unsupported: 405,
    errors.Throttled: 429,
    errors.Unavailable: 503,
}


def form(table: Mapping[type[errors.AirlockError], T], error: errors.AirlockError, otherwise: T) -> T:
    """What a table has for the class of an error: its first row that fits."""
    return next((found for cls, found in table.items() if isinstance(error, cls)), otherwise)


def words(error: errors.AirlockError) -> str:
    """What was wrong, and what to do where something is known, in one line."""
    return error.what + (f"; {error.do}" if error.do else "")


def headers(status: int, error: errors.AirlockError) -> dict[str, str]:
    """When to come again (RFC 9110 section 10.2.3), the length of what has a range (14.4), what is served there (15.5.6; empty for nothing)."""
    if status == 405:
        return {"allow": error.ids.get("allow", "")}
    if status in (429, 503):
        return {"retry-after": error.ids.get("retry_after", "5")}
    if status == 416 and "total" in error.ids:
        return {"content-range": f"bytes */{error.ids['total']}"}
    return {}
