"""What ends when and what stops working then: items, their order and pages, and which notice is due; pure, the clock is an argument, no I/O.

Here because the watch, the API and the command must agree on it. The rows behind it are read in registry/expiring.py.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from artifact.errors import Invalid
from artifact.grant import date

DAY_S = 86400.0
THRESHOLDS = (60, 30, 14, 7, 1, 0)  # days before an end at which a notice is due; 0 is the end itself
HORIZON_S = THRESHOLDS[0] * DAY_S
KEPT_S = 30 * DAY_S  # how long a key or grant that ended is shown
KINDS = ("api_key", "certificate", "entitlement", "grant", "lease", "revocation_list", "upstream_key", "upstream_subscription")
MAX_STOPS = 100


@dataclass(frozen=True)
class Item:
    """One end: of what (kind, public id), whose, when and until when grace lasts (0: none), since when it lives (0: unknown).

    `name` is what people call it, `notes` one line about it, `stops` the names and runtimes (host and model) that stop working then.
    A quiet one is shown, and no notice is given of it: it is renewed by itself, or what follows it is there.
    """

    kind: str
    id: str
    org: str
    ends: float
    grace_ends: float = 0.0
    begun: float = 0.0
    name: str = ""
    notes: str = ""
    quiet: bool = False
    stops: tuple[tuple[str, str], ...] = field(default=())

    @property
    def place(self) -> tuple[float, str, str]:
        """Where the item stands in the order of all: the nearest end first."""
        return (self.ends, self.kind, self.id)

    def days(self, now: float) -> float:
        """Days left; negative once it ended."""
        return (self.ends - now) / DAY_S

    def with_stops(self, found: Iterable[tuple[str, str]]) -> Item:
        """The item with what stops working, bounded."""
        every = sorted(set(found))
        more = f"{len(every) - MAX_STOPS} more stop" if len(every) > MAX_STOPS else ""
        return replace(self, stops=tuple(every[:MAX_STOPS]), notes="; ".join(filter(None, (self.notes, more))))

    def as_json(self, now: float) -> dict[str, object]:
        """The item as the API, the webhook and the command show it (docs/format.md section 10); times RFC 3339, empty for none."""
        stops = [{k: v for k, v in (("host", host), ("model", model)) if v} for host, model in self.stops]
        facts: dict[str, object] = {"kind": self.kind, "item": self.id, "org": self.org, "name": self.name, "ends": date(self.ends)}
        facts |= {"grace_ends": date(self.grace_ends) if self.grace_ends > self.ends else "", "days": round(self.days(now), 2)}
        return facts | {"quiet": self.quiet, "stops": stops, "notes": self.notes}


def due(item: Item, now: float) -> int | None:
    """The threshold whose notice is due: the smallest that is reached; None where none is, or where the item never lived that long."""
    life, days = item.ends - item.begun, item.days(now)
    reached = [t for t in THRESHOLDS if days <= t and (not item.begun or life > max(t, 1) * DAY_S)]
    return None if item.quiet or not reached else min(reached)


def page(items: Iterable[Item], after: tuple[float, str, str] | None, limit: int) -> tuple[list[Item], str]:
    """The items behind a cursor in their order, and the cursor of the next page, empty where there is none."""
    rest = sorted((item for item in items if after is None or item.place > after), key=lambda item: item.place)
    return rest[:limit], cursor(rest[limit - 1]) if len(rest) > limit else ""


def cursor(item: Item) -> str:
    """The text behind which a listing goes on."""
    return f"{item.ends!r} {item.kind} {item.id}"


def behind(text: str) -> tuple[float, str, str] | None:
    """The place that a cursor names, None for the beginning; raises Invalid."""
    if not text:
        return None
    ends, _, rest = text.partition(" ")
    kind, _, item = rest.partition(" ")
    try:
        found = (float(ends), kind, item)
    except ValueError:
        found = (float("nan"), "", "")
    if not 0 <= found[0] < 1e12 or kind not in KINDS:
        raise Invalid("after is no cursor of this listing", expected="after as the last page gave it", reason="cursor")
    return found


def figures(items: Iterable[Item], now: float) -> dict[str, tuple[float, int]]:
    """For each kind the days that the nearest end which is still ahead is away, and how many ended; infinite days where none is ahead."""
    out: dict[str, tuple[float, int]] = {}
    for item in items:
        days, ended = out.get(item.kind, (float("inf"), 0))
        left = item.days(now)
        out[item.kind] = (min(days, left), ended) if left > 0 else (days, ended + 1)
    return out
