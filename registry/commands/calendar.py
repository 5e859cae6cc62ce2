"""`airlock entitlement calendar`: what ends when and what stops working then, for people, cron and monitoring."""

from __future__ import annotations

import argparse
import time
from datetime import datetime
from typing import Any

from artifact.errors import AirlockError
from registry.commands.reach import arguments, everything, reached, table, tell

EXAMPLE = "airlock entitlement calendar --days 90 --data /srv/airlock"
MONITOR = "airlock entitlement calendar --nagios --warning 30 --critical 7 --registry https://registry.example.com"
STATES = ("OK", "WARNING", "CRITICAL", "UNKNOWN")
UNKNOWN = 3
MOST_FIGURES = 20


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="airlock entitlement calendar",
        description="What ends when: keys, grants, entitlements, upstream keys and subscriptions, revocation lists, leases, the certificate.",
        epilog=f"example: {EXAMPLE}; for monitoring: {MONITOR}",
    )
    parser.add_argument("--days", type=int, default=60, metavar="N", help="ends within so many days (60), and what ended up to 30 days ago")
    parser.add_argument("--org", default="", help="of one organisation only")
    parser.add_argument("--nagios", action="store_true", help="one status line with figures; exit status 0 OK, 1 WARNING, 2 CRITICAL, 3 UNKNOWN")
    parser.add_argument("--warning", type=float, default=30.0, metavar="DAYS", help="WARNING below so many days (30)")
    parser.add_argument("--critical", type=float, default=7.0, metavar="DAYS", help="CRITICAL below so many days (7)")
    arguments(parser)
    return parser


def main(argv: list[str]) -> int:
    """Prints the calendar; returns 0, or with --nagios the state 0 to 3."""
    args = _parser().parse_args(argv)
    if args.days < 0:
        _parser().error("--days is below 0")
    try:
        with reached(args) as ask:
            items = everything(ask, "expiring", days=args.days or "0", org=args.org)
    except AirlockError as error:
        if not args.nagios:
            raise
        print(f"{STATES[UNKNOWN]}: {error}".replace("|", "/").replace("\n", " "))
        return UNKNOWN
    if args.nagios:
        return _nagios(items, args.warning, args.critical)
    shown = [{**item, "days": _left(item), "stops": _stops(item)} for item in items]
    text = table(shown, "kind", "item", "name", "org", "ends", "days", "stops", "notes") if items else f"nothing ends within {args.days} days"
    return tell(args, {"now": int(time.time()), "items": items}, text)


def _left(item: dict[str, Any]) -> str:
    if item["days"] > 0:
        return f"{item['days']:.1f}"
    grace = item["grace_ends"]
    return f"grace until {grace}" if grace and datetime.fromisoformat(grace).timestamp() > time.time() else "ended"


def _stops(item: dict[str, Any]) -> list[str]:
    """The first names and runtimes that stop, and how many more."""
    every = [f"{stop['model']} on {stop['host']}" if stop.get("host") else str(stop["model"]) for stop in item["stops"]]
    return every[:2] + ([f"{len(every) - 2} more"] if len(every) > 2 else [])


def _nagios(items: list[dict[str, Any]], warning: float, critical: float) -> int:
    """One line in the form of monitoring plugins; what is renewed by itself or has a successor counts for nothing."""
    counted = [item for item in items if not item["quiet"]]
    state = max((2 if item["days"] < critical else 1 if item["days"] < warning else 0 for item in counted), default=0)
    figures = " ".join(f"'{item['kind']} {item['item']}'={item['days']:.2f};{warning:g}:;{critical:g}:" for item in counted[:MOST_FIGURES])
    if not counted:
        print("OK: nothing ends | ends=0")
        return 0
    first = counted[0]
    words = f"ends in {first['days']:.1f} days" if first["days"] > 0 else f"ended {first['ends']}"
    name = f"{first['kind']} {first['item']}" + (f" of {first['org']}" if first["org"] else "")
    print(f"{STATES[state]}: {name} {words}, what stops then: {len(first['stops'])}; ends in all: {len(counted)} | ends={len(counted)} {figures}")
    return state
