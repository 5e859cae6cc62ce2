"""`airlock mirror check`: days that upstreams' keys and subscriptions have left, as recorded; for people, cron and monitoring; it asks no network."""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass

from artifact.grant import date
from mirror.commands.key import home_argument
from mirror.home import MirrorHome
from mirror.records import Key, Records

EXAMPLE = "example: airlock mirror check --home /srv/mirror --nagios --warning 30 --critical 7"
STATES = ("OK", "WARNING", "CRITICAL", "UNKNOWN")
DAY = 86400.0


@dataclass(frozen=True)
class Ending:
    """One end: of a key or of its account's subscription, and the names that were fetched with it."""

    kind: str
    key: Key
    ends: int
    days: float
    names: tuple[str, ...]

    def as_json(self) -> dict[str, object]:
        """The item as GET /airlock/v1/expiring shows one."""
        what: dict[str, object] = {"kind": self.kind, "item": self.key.key_id, "org": self.key.org, "name": self.key.name}
        when: dict[str, object] = {"ends": date(self.ends), "grace_ends": "", "days": round(self.days, 2)}
        return what | when | {"quiet": False, "stops": [{"model": name} for name in self.names], "notes": ""}


def endings(home: MirrorHome, now: float) -> list[Ending]:
    """What ends, the nearest first; raises Invalid."""
    used: dict[str, set[str]] = {}
    for named in home.names():
        used.setdefault(str(named.upstream.get("key_id", "")), set()).add(named.name)
    out, keys = [], Records(home).keys()
    for key in keys:
        for kind, ends in (("upstream_key", key.key_end), ("upstream_subscription", key.subscription_end)):
            if ends:
                out.append(Ending(kind, key, ends, (ends - now) / DAY, tuple(sorted(used.get(key.key_id, ())))))
    return sorted(out, key=lambda e: (e.ends, e.kind, e.key.name))


def main(argv: list[str]) -> int:
    """Prints the ends; returns 0, or with --nagios the state 0 to 3."""
    parser = argparse.ArgumentParser(prog="airlock mirror check", description="Days left of upstreams' keys and subscriptions.", epilog=EXAMPLE)
    home_argument(parser)
    parser.add_argument("--nagios", action="store_true", help="one status line with figures; exit status 0 OK, 1 WARNING, 2 CRITICAL, 3 UNKNOWN")
    parser.add_argument("--warning", type=float, default=30.0, metavar="DAYS", help="WARNING below so many days (30)")
    parser.add_argument("--critical", type=float, default=7.0, metavar="DAYS", help="CRITICAL below so many days (7)")
    given = parser.parse_args(argv)
    home, now = MirrorHome.open(given.home), time.time()
    found = endings(home, now)
    if given.nagios:
        return _nagios(found, given.warning, given.critical)
    if given.json:
        print(json.dumps({"now": int(now), "items": [e.as_json() for e in found]}))
        return 0
    rows = [("KEY", "WHAT", "ACCOUNT", "ENDS", "DAYS", "NAMES")]
    rows += [(e.key.name, e.kind, e.key.org, date(e.ends), f"{e.days:.1f}" if e.days > 0 else "ended", str(len(e.names))) for e in found]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    print("\n".join(lines) if found else "no end of a key or subscription is recorded")
    return 0


def _nagios(found: list[Ending], warning: float, critical: float) -> int:
    if not found:
        print("UNKNOWN: no end of an upstream's key or subscription is recorded")
        return 3
    state = max(2 if e.days < critical else 1 if e.days < warning else 0 for e in found)
    first = found[0]
    words = f"{first.kind} {first.key.name} of {first.key.org} " + (
        f"ends in {first.days:.1f} days" if first.days > 0 else f"ended {date(first.ends)}"
    )
    figures = " ".join(f"'{e.key.name} {e.kind}'={e.days:.2f};{warning:g}:;{critical:g}:" for e in found)
    print(f"{STATES[state]}: {words}, names fetched with it: {len(first.names)} | {figures}")
    return state
