"""What the presented key has and when each part of it ends, as the registry tells it, and the words for it; pure, shared by watch and check.

The registry's answer is a told one, not signed: it warns and decides nothing. Ids of keys and grants are for the operator, never for a client.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

from artifact.errors import Invalid
from artifact.grant import date, includes, matches

DAY = 86400.0
THRESHOLDS = (60, 30, 14, 7, 1)  # days before an end at which it is told
MAX_GRANTS = 1000
MAX_TIME = 1e11
NOUNS = {"lease": "the lease", "key": "the API key", "grant": "the grant", "entitlement": "the entitlement"}


@dataclass(frozen=True)
class End:
    """One thing that ends: when (0: never), until when its grace goes, what stops then; `revoked_at` is the end of one that was taken back."""

    kind: str
    item: str
    ends: float
    stops: str
    last: float = 0.0
    revoked_at: float = 0.0

    def days(self, now: float) -> float:
        """Days until the end, below 0 behind it; infinite without one."""
        end = self.revoked_at or self.ends
        return (end - now) / DAY if end else float("inf")

    def over(self, now: float) -> bool:
        """Whether it gives nothing any more: behind end and grace, or taken back."""
        end = self.revoked_at or max(self.ends, self.last)
        return bool(end) and end <= now

    def words(self, now: float) -> str:
        """What ends when, without a name or an id."""
        what = NOUNS[self.kind]
        if self.revoked_at:
            return f"{what} was revoked on {date(self.revoked_at)}"
        if self.over(now):
            return f"{what} ended on {date(self.ends)}"
        if self.ends <= now:
            return f"{what} ended on {date(self.ends)}; its grace ends on {date(self.last)}"
        days = int(self.days(now))
        left = "1 day" if days == 1 else f"{days} days" if days else "less than a day"
        return f"{what} ends on {date(self.ends)}, in {left}"


@dataclass(frozen=True)
class Standing:
    """The registry's answer: key, organisation, tier, what ends (key, entitlement, grants), revocation serial, the registry's time."""

    key_id: str
    org: str
    tier: str
    now: float
    revocation_serial: int
    ends: tuple[End, ...]
    patterns: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]]

    def running(self, model: str, *, own: bool = False) -> tuple[End, ...]:
        """The ends that a start of this model depends on: key, entitlement (not for `own` weights), the run grant that goes on longest."""
        grants = [e for e in self.ends if e.kind == "grant" and self.lets_run(e, model)]
        longest = max(grants, key=lambda e: (e.ends == 0, e.last), default=None)
        others = ("key",) if own else ("key", "entitlement")
        return tuple(e for e in self.ends if e.kind in others) + ((longest,) if longest else ())

    def lets_run(self, grant: End, model: str) -> bool:
        """Whether a grant covers the model and the action run, whatever the time."""
        models, actions = self.patterns[grant.item]
        return includes(actions, "run") and any(matches(p, model) for p in models)

    def counting(self) -> tuple[End, ...]:
        """All ends but those of grants that another one, which goes on longer, covers whole: a renewed grant must not warn for ever."""
        return tuple(e for e in self.ends if e.kind != "grant" or not any(self._covers(o, e) for o in self.ends if o.kind == "grant"))

    def _covers(self, other: End, grant: End) -> bool:
        (models, actions), (theirs, more) = self.patterns[grant.item], self.patterns[other.item]
        longer = (other.ends == 0, other.last) > (grant.ends == 0, grant.last)
        return longer and set(models) <= set(theirs) and all(includes(more, a) for a in actions)


def parse(doc: Mapping[str, object]) -> Standing:
    """The answer of GET /airlock/v1/standing; raises Invalid."""
    org = _text(doc.get("org"))
    ends = [End("key", _text(doc.get("key_id")), at := moment(doc.get("key_ends")), "every pull and every start with this key", at)]
    document, grants = doc.get("entitlement"), doc.get("grants")
    if document is not None:
        found = _object(document, "entitlement")
        stops = f"pulls and starts of what is not {org}'s own"
        ends.append(_end("entitlement", _text(found.get("jti")), found, stops))
    if not isinstance(grants, list) or len(grants) > MAX_GRANTS:
        raise Invalid("the registry's answer holds no list of grants", expected=f"at most {MAX_GRANTS}", reason="standing")
    patterns = {}
    for entry in grants:
        found = _object(entry, "grant")
        models, actions, item = _texts(found.get("models")), _texts(found.get("actions")), _text(found.get("grant_id"))
        patterns[item] = (models, actions)
        ends.append(_end("grant", item, found, f"{', '.join(actions)} of {', '.join(models[:3])}{', …' if len(models) > 3 else ''}"))
    serial = doc.get("revocation_serial")
    return Standing(
        _text(doc.get("key_id")),
        org,
        _text(doc.get("tier")),
        moment(doc.get("now")),
        serial if type(serial) is int and serial >= 0 else 0,
        tuple(ends),
        patterns,
    )


def moment(value: object) -> float:
    """Seconds since 1970 of an RFC 3339 text or a number; 0 of nothing; raises Invalid."""
    if value in (None, ""):
        return 0.0
    try:
        found = datetime.fromisoformat(value) if isinstance(value, str) and len(value) < 40 else value
        at = found.replace(tzinfo=found.tzinfo or UTC).timestamp() if isinstance(found, datetime) else float(found)  # type: ignore[arg-type]
    except (ValueError, TypeError, OverflowError) as error:
        raise Invalid("the registry's answer holds what is no time", expected="RFC 3339", reason="standing") from error
    if not 0 <= at < MAX_TIME:
        raise Invalid("the registry's answer holds a time beyond all reason", expected="RFC 3339", reason="standing")
    return at


def threshold(days: float) -> int | None:
    """The nearest of the days at which an end is told that so many days have reached, 0 behind the end; None before all of them."""
    return 0 if days <= 0 else min((t for t in THRESHOLDS if days <= t), default=None)


def first(ends: Iterable[End], now: float) -> End | None:
    """The one that ends next, or ended first."""
    return min((e for e in ends if e.days(now) != float("inf")), key=lambda e: e.days(now), default=None)


def _end(kind: str, item: str, found: Mapping[str, object], stops: str) -> End:
    ends = moment(found.get("ends"))
    return End(kind, item, ends, stops, max(ends, moment(found.get("grace_ends"))), moment(found.get("revoked_at")))


def _object(value: object, what: str) -> Mapping[str, object]:
    if not isinstance(value, Mapping):
        raise Invalid(f"the registry's answer holds what is no {what}", expected="an object", reason="standing")
    return value


def _text(value: object) -> str:
    return "".join(c for c in value if c.isprintable())[:300] if isinstance(value, str) else ""


def _texts(value: object) -> tuple[str, ...]:
    return tuple(_text(v) for v in value[:1000]) if isinstance(value, list) else ()
