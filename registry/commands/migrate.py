"""`airlock registry migrate`: brings the database of a site to the schema of this version, or back down to an older one."""

from __future__ import annotations

import argparse
import json

from registry.schema import newest
from registry.settings import Settings
from registry.wiring import migrate, sole_server


def main(argv: list[str]) -> int:
    """Entry point of `airlock registry migrate`."""
    parser = argparse.ArgumentParser(
        prog="airlock registry migrate",
        description="Brings the database to this version's schema, in one transaction. Servers do it themselves at their start.",
        epilog="example: airlock registry migrate --data /srv/airlock --to 0001 (back, before an older version is started again)",
    )
    parser.add_argument("--data", help="data directory (AIRLOCK_DATA)")
    parser.add_argument("--to", default="head", metavar="REVISION", help="the revision, the newest without it; an older one drops what came later")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args(argv)
    settings = Settings.load(args.data)
    with sole_server(settings):
        before = migrate(settings, args.to)
    now = newest() if args.to == "head" else args.to
    print(json.dumps({"from": before, "to": now}) if args.json else f"the database is at revision {now}" + (f", was {before}" if before else ""))
    return 0
