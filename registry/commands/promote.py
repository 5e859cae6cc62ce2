"""`airlock promote NAME:VERSION`: releases what was imported or pushed, so that runtimes of this site start from it."""

from __future__ import annotations

import argparse
import json
import time

from artifact.manifest import parse_reference
from registry.promote import promote
from registry.settings import Settings
from registry.wiring import open_site


def main(argv: list[str]) -> int:
    """Signs and prints what was signed; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="airlock promote",
        description="Sign the profile manifest of a model version with this site's release key.",
        epilog="example: airlock promote acme/tiny:1 --data /srv/airlock",
    )
    parser.add_argument("model", metavar="NAME:VERSION", help="a model that this store holds with its profiles")
    parser.add_argument("--data", help="the data directory (env AIRLOCK_DATA)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    given = parser.parse_args(argv)
    wanted = parse_reference(given.model)
    site = open_site(Settings.load(given.data))
    try:
        report = promote(site, wanted, site.floor.now(time.time()))
    finally:
        site.close()
    if given.json:
        print(json.dumps(report))
        return 0
    done = "promoted" if report["changed"] else "was promoted already:"
    print(f"{done} {report['name']}:{report['ref']} ({report['profiles']}@{report['digest']}) with release key {report['key']}")
    return 0
