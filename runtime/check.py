"""`airlock entitlement check`: what the key has, what of it ends when, and what stops then; for people, cron and monitoring.

It asks the registry once, and with --cache looks at the leases that would carry a start while the registry is away. It changes nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from artifact.errors import AirlockError, Denied, Invalid, NotFound, Unauthenticated
from artifact.grant import date
from artifact.manifest import parse_reference
from artifact.remote import RemoteRegistry
from runtime import entitlement, leases, standing
from runtime.settings import EXIT_CODES, Settings, from_environment
from runtime.standing import End, Standing

EXAMPLE = "example: NGC_API_KEY=nvapi-… airlock entitlement check --registry https://registry:5000 --nagios --warning 30 --critical 7"
STATES = ("OK", "WARNING", "CRITICAL", "UNKNOWN")
OK, WARNING, CRITICAL, UNKNOWN = range(4)
REFUSED = (Unauthenticated, Denied, NotFound)
# What is over, by kind: the reason whose exit code the command ends with.
OVER = {"key": "key_expired", "grant": "grant_expired", "entitlement": "entitlement_expired", "lease": "lease_expired"}
TAKEN = {"key": "key_revoked", "entitlement": "entitlement_revoked", "lease": "lease_revoked"}


@dataclass(frozen=True)
class Report:
    """What was found: ends in their order, the moment by which they were judged, and the error that kept the registry from telling."""

    now: float
    registry: str
    ends: tuple[End, ...]
    told: Standing | None = None
    error: AirlockError | None = None

    def reason(self) -> str:
        """Why something stops already, ok if nothing does."""
        if self.error is not None:
            return self.error.reason
        over = [e for e in self.ends if e.over(self.now)]
        return next((TAKEN[e.kind] if e.revoked_at else OVER[e.kind] for e in over), "ok")

    def exit_code(self) -> int:
        """The documented exit status without --nagios."""
        reason = self.reason()
        return 0 if reason == "ok" else EXIT_CODES.get(reason, self.error.exit_code if self.error else 1)

    def as_json(self) -> dict[str, object]:
        """The same for machines; times RFC 3339, empty for none, days null without an end."""
        items = [
            {
                "kind": e.kind,
                "item": e.item,
                "ends": date(e.ends) if e.ends else "",
                "grace_ends": date(e.last) if e.last else "",
                "revoked_at": date(e.revoked_at) if e.revoked_at else "",
                "days": round(e.days(self.now), 2) if e.days(self.now) != float("inf") else None,
                "over": e.over(self.now),
                "stops": e.stops,
            }
            for e in self.ends
        ]
        told = self.told
        who = {"key_id": told.key_id, "org": told.org, "tier": told.tier, "revocation_serial": told.revocation_serial} if told else {}
        error = self.error.as_dict() if self.error else None
        return {"registry": self.registry, "now": date(self.now), **who, "items": items, "error": error, "reason": self.reason()}


def examine(settings: Settings, model: str, cache: Path | None) -> Report:
    """Asks the registry, and looks into the cache; raises nothing but what a wrong setting raises (Invalid, Unauthenticated key_absent)."""
    entitlement.require_key(settings)
    if not settings.registry:
        raise Invalid("no registry is named", expected="--registry URL or AIRLOCK_REGISTRY", do="say --registry URL")
    remote = RemoteRegistry(
        settings.registry, settings.key, ca_file=str(settings.ca_file) if settings.ca_file else None, timeout_s=settings.timeout_s
    )
    error: AirlockError | None = None
    told: Standing | None = None
    ends: tuple[End, ...] = ()
    now = time.time()
    try:
        told = standing.parse(remote.api("GET", "/airlock/v1/standing"))
        now = told.now or now
        before = leases.kept(cache / "leases", model, settings.ref) if cache and model else []
        own = bool(before) and all(leases.own(k.claims) for k in before)
        ends = told.running(model, own=own) if model else told.counting()
        if model and not any(e.kind == "grant" for e in ends):
            error = _no_grant(told, model)
    except Unauthenticated as found:
        error = entitlement.known(found)
    except AirlockError as found:
        error = found
    if cache is not None:
        now = max(now, leases.floor(cache / "leases"))
        kept = _leases(cache / "leases", model, settings.ref, now)
        ends += kept
        if model and not kept and error is None:
            what = f"the cache {cache} holds no lease of {settings.name_ref}: nothing of it starts while the registry is away"
            error = Denied(what, expected="a lease of an earlier start", do="start it once, with this cache", reason="lease_absent")
    return Report(now, settings.registry, tuple(sorted(ends, key=lambda e: (e.days(now), e.kind, e.item))), told, error)


def _no_grant(told: Standing, model: str) -> Denied:
    words = f"no grant of this key lets it run {model}"
    grants = [e for e in told.ends if e.kind == "grant"]
    return Denied(words, expected="; ".join(e.stops for e in grants[:5]) or "a grant", do=f"ask for a key granted on '{model}'", reason="no_grant")


def _leases(folder: Path, model: str, ref: str, now: float) -> tuple[End, ...]:
    """Of each model and instance the lease that goes on longest; without a model asked for, none that is over: those are the past of the cache."""
    out: dict[tuple[str, str], End] = {}
    for kept in leases.kept(folder, model, ref if model else ""):
        lease, place = kept.lease, (kept.name_ref, leases.text(kept.claims, "aud"))
        end = End("lease", kept.jti, lease.expires, "a start of {} on {} while the registry is away".format(*place), lease.expires + lease.grace_s)
        end = replace(end, revoked_at=lease.returned_at or lease.revoked_at)
        if (model or not end.over(now)) and end.days(now) > (out[place].days(now) if place in out else float("-inf")):
            out[place] = end
    return tuple(out.values())


def nagios(found: Report, warning: float, critical: float) -> tuple[int, str]:
    """State and line of a Nagios plugin: a refusal and an end below its bound are CRITICAL or WARNING, a registry that is away is UNKNOWN."""

    def bounds(end: End) -> tuple[float, float]:
        # A lease lives for a day: it warns in its grace, and is critical behind it.
        return (0.0, (end.ends - end.last) / standing.DAY) if end.kind == "lease" else (warning, critical)

    def judged(end: End) -> int:
        warn, crit = bounds(end)
        days = end.days(found.now)
        return CRITICAL if end.over(found.now) or days < crit else WARNING if days < warn else OK

    ends = [e for e in found.ends if e.days(found.now) != float("inf")]
    worst = max(ends, key=lambda e: (judged(e), -e.days(found.now)), default=None)
    state = judged(worst) if worst else OK
    if found.error is not None:
        state = CRITICAL if isinstance(found.error, REFUSED) or state == CRITICAL else UNKNOWN
        words = f"{found.error.reason}: {found.error.what}"
    elif worst:
        words = f"{worst.words(found.now)}: that {'has stopped' if worst.over(found.now) else 'stops'} {worst.stops}"
    else:
        words = "nothing of this key ends"
    figures = " ".join("'{} {}'={:.2f};{:g}:;{:g}:".format(e.kind, e.item[:40].replace("'", ""), e.days(found.now), *bounds(e)) for e in ends)
    return state, f"{STATES[state]}: {words.replace('|', '/')}" + (f" | {figures}" if figures else "")  # behind the bar stand figures only


def text(found: Report) -> str:
    """The table for people, and after it what is wrong, as the runtime says it."""
    lines = []
    if found.told:
        told = found.told
        lines.append(f"{found.registry}: key {told.key_id} of {told.org}, tier {told.tier or 'none'}, at {date(found.now)}")
    rows = [("WHAT", "ITEM", "ENDS", "DAYS", "THEN STOPS")]
    for e in found.ends:
        days, end = e.days(found.now), e.revoked_at or e.ends
        state = (
            "never"
            if days == float("inf")
            else f"{days:.1f}"
            if days > 0
            else "revoked"
            if e.revoked_at
            else "over"
            if e.over(found.now)
            else "grace"
        )
        rows.append((e.kind, e.item or "-", date(end) if end else "never", state, e.stops))
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    if found.ends:
        lines += ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    if found.error is not None:
        lines += entitlement.explained(found.error)
    return "\n".join(lines) + "\n"


def _days(given: str) -> float:
    found = float(given)
    if not 0 <= found <= 36500:
        raise argparse.ArgumentTypeError("a number of days from 0 to 36500")
    return found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="airlock entitlement check",
        description="Says what this key has, what of it ends when and what stops then.",
        epilog=f"{EXAMPLE}\nThe key comes from NGC_API_KEY or AIRLOCK_KEY. Exit codes: docs/operations.md, airlock entitlement check.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--registry", default="", metavar="URL", help="the registry to ask (AIRLOCK_REGISTRY)")
    parser.add_argument("--model", default="", metavar="NAME[:VERSION]", help="only what a start of this model depends on")
    parser.add_argument("--cache", type=Path, metavar="DIR", help="also the leases in this runtime's cache (NIM_CACHE_PATH)")
    parser.add_argument("--nagios", action="store_true", help="one status line with figures; exit status 0 OK, 1 WARNING, 2 CRITICAL, 3 UNKNOWN")
    parser.add_argument("--warning", type=_days, default=30.0, metavar="DAYS", help="WARNING below so many days (30)")
    parser.add_argument("--critical", type=_days, default=7.0, metavar="DAYS", help="CRITICAL below so many days (7)")
    parser.add_argument("--json", action="store_true", help="machine-readable output and errors")
    return parser


def _settings(environ: Mapping[str, str], args: argparse.Namespace) -> Settings:
    """The runtime's settings, as far as they say how a registry is reached; raises Invalid."""
    given = dict(environ)
    if args.registry:
        given["AIRLOCK_REGISTRY"] = args.registry
    given["NGC_API_KEY"] = environ.get("NGC_API_KEY") or environ.get("AIRLOCK_KEY") or ""
    return from_environment(given, args.model or "any")


def main(argv: list[str] | None = None) -> int:
    """Entry point of `airlock entitlement check`; returns the documented exit status."""
    args = _parser().parse_args(argv)
    try:
        settings = _settings(os.environ, args)
        found = examine(settings, parse_reference(args.model).name if args.model else "", args.cache)
    except AirlockError as error:
        if args.nagios:
            sys.stdout.write(f"UNKNOWN: {error.reason}: {error.what}\n")
            return UNKNOWN
        status = EXIT_CODES.get(error.reason, error.exit_code)
        sys.stderr.write((json.dumps(error.as_dict() | {"exit_code": status}) if args.json else "\n".join(entitlement.explained(error))) + "\n")
        return status
    if args.nagios:
        state, line = nagios(found, args.warning, args.critical)
        sys.stdout.write(line + "\n")
        return state
    sys.stdout.write(json.dumps(found.as_json() | {"exit_code": found.exit_code()}) + "\n" if args.json else text(found))
    return found.exit_code()
