"""The period of a report, out of a month or two days: RFC 3339 texts in UTC."""

from __future__ import annotations

import re
from datetime import UTC, datetime

from artifact.errors import Invalid
from artifact.grant import date


def when(text: str, option: str) -> float:
    """The moment of a day or an RFC 3339 text in UTC; raises Invalid."""
    for form in ("%Y-%m-%d", "%Y-%m-%dT%H:%M:%SZ"):
        try:
            return datetime.strptime(text, form).replace(tzinfo=UTC).timestamp()
        except ValueError:
            continue
    raise Invalid(f"{option} {text[:40]!r} is no day or moment", expected="2026-11-01 or 2026-11-01T00:00:00Z", reason="period")


def span(month: str | None, start: str | None, end: str | None, now: float) -> tuple[str, str]:
    """From when to when: a month, or from and to (now), or this month so far; raises Invalid."""
    if month and (start or end):
        raise Invalid("--month and --from or --to are two periods", expected="one of them", reason="period")
    if end and not start:
        raise Invalid("--to without --from", expected="both, or --month", reason="period")
    if start:
        return date(when(start, "--from")), date(when(end, "--to") if end else now + 1)
    text = month or datetime.fromtimestamp(now, UTC).strftime("%Y-%m")
    if not re.fullmatch(r"[0-9]{4}-[0-9]{2}", text):
        raise Invalid(f"--month {text[:40]!r} is no month", expected="2026-11", reason="period")
    first = when(f"{text}-01", "--month")
    year, number = divmod(int(text[:4]) * 12 + int(text[5:]), 12)
    last = when(f"{year:04}-{number + 1:02}-01", "--month")
    return date(first), date(last if month else now + 1)  # texts are whole seconds, and this one belongs to the period
