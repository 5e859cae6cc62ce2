"""What an administrator may hand on: never rights wider than its own; pure, the clock is an argument, no I/O.

Here because keys, grants and memberships must all ask the same question. Where two patterns cannot be compared for certain, the answer is no.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from artifact.grant import TIERS, Grant, Principal, date, includes, matches

EVERYTHING = "**"


@dataclass(frozen=True)
class Office:
    """What a caller may do about people, keys and grants: as the site's administrator all of it, else in the organisations named."""

    principal: Principal
    site: bool = False
    administers: str = ""  # its own organisation, where it holds admin on all of it
    audits: str = ""  # its own organisation, where it may look
    surveys: bool = False  # whether it may look at what is recorded of all of the site


def live(grants: Sequence[Grant], now: float) -> list[Grant]:
    """The grants that give something now; one in its grace gives nothing that could be handed on."""
    return [g for g in grants if g.not_before <= now and (not g.expires or g.expires > now)]


def office(principal: Principal, now: float) -> Office:
    """What this caller's grants make it: site administrator by admin on `**`, its organisation's by admin on `ORG/**`; a token makes it nothing."""
    if not principal.key_id or principal.access is not None:
        return Office(principal)
    own = live(principal.grants, now)
    admin = [g for g in own if "admin" in g.actions]
    whole = f"{principal.org}/{EVERYTHING}"
    site = any(EVERYTHING in g.models for g in admin)
    leads = bool(principal.org) and any(covers(p, whole) for g in admin for p in g.models)
    looks = leads or any("auditor" in g.actions and any(covers(p, whole) for p in g.models) for g in own)
    surveys = site or any("auditor" in g.actions and EVERYTHING in g.models for g in own)
    return Office(principal, site, principal.org if leads else "", principal.org if looks else "", surveys)


def covers(own: str, wish: str) -> bool:
    """Whether every name that the pattern `wish` matches is matched by `own` too."""
    mine, theirs = own.split("/"), wish.split("/")
    if mine[-1] == EVERYTHING:
        mine = mine[:-1]
        if len(theirs) <= len(mine):
            return False
        theirs = theirs[: len(mine)]
    elif len(mine) != len(theirs) or theirs[-1] == EVERYTHING:
        return False
    return all(t != EVERYTHING and _part(m, t) for m, t in zip(mine, theirs, strict=True))


def _part(own: str, wish: str) -> bool:
    if own in ("*", wish):
        return True
    return "*" not in wish and matches(own, wish)


def wider(principal: Principal, wish: Grant, now: float, ends: float = 0.0) -> str:
    """What of a wished grant is wider than this caller's own rights, in words; empty where nothing is.

    `ends` is when the key that gets it ends (0: never), as no right outlives its key.
    """
    for pattern in wish.models:
        if "*" in pattern.split("/")[0]:
            return f"the pattern {pattern} is not of one organisation"
        for action in wish.actions:
            if not any(_within(g, principal, pattern, action, wish, ends) for g in live(principal.grants, now)):
                return f"no grant of this key gives '{action}' on {pattern} for as long, as many GPUs, that environment and those profiles"
    return ""


def _within(own: Grant, principal: Principal, pattern: str, action: str, wish: Grant, ends: float) -> bool:
    """Whether one grant alone holds one action on one pattern at least as wide as it is wished."""
    return (
        includes(own.actions, action)
        and any(covers(p, pattern) for p in own.models)
        and _sooner(min(_end(wish.expires, wish.grace_s), _end(ends)), min(_end(own.expires, own.grace_s), _end(principal.expires)))
        and (not own.gpus or 0 < wish.gpus <= own.gpus)
        and (not own.profiles or (bool(wish.profiles) and set(wish.profiles) <= set(own.profiles)))
        and (own.environment or "production") == (wish.environment or "production")
    )


def _end(expires: float, grace_s: int = 0) -> float:
    return expires + grace_s if expires else float("inf")


def _sooner(wish: float, own: float) -> bool:
    return wish <= own


def above(principal: Principal, tier: str, ends: float) -> str:
    """What of a wished key is above this caller's own: its tier, or its end (0: never); empty where nothing is."""
    if TIERS.index(tier) > (TIERS.index(principal.tier) if principal.tier in TIERS else -1):
        return f"this key's tier is {principal.tier or 'none'}"
    if principal.expires and not (0 < ends <= principal.expires):
        return f"this key ends on {date(principal.expires)}"
    return ""


def latest(principal: Principal, now: float) -> float:
    """When the last of the caller's grants that make it an administrator ends, at most with its key; 0 for never."""
    whole = f"{principal.org}/{EVERYTHING}"
    ends = [_end(g.expires) for g in live(principal.grants, now) if "admin" in g.actions and any(covers(p, whole) for p in g.models)]
    last = min(max(ends, default=now), _end(principal.expires))
    return 0.0 if last == float("inf") else last
