"""`airlock registry config`: every setting with its value and where the value came from; passwords are masked."""

from __future__ import annotations

import argparse
import json

from registry.settings import PREFIX, Settings


def main(argv: list[str]) -> int:
    """Prints the settings that `airlock registry serve` would use; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="airlock registry config",
        description="Prints every setting with its value and source: argument, environment, file or default.",
        epilog="example: AIRLOCK_CONFIG=/etc/airlock/registry.yaml airlock registry config --json",
    )
    parser.add_argument("--data", help="data directory (AIRLOCK_DATA)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    given = parser.parse_args(argv)
    rows = Settings.load(given.data).rows()
    if given.json:
        print(json.dumps({name: {"value": value, "source": source, "environment": PREFIX + name.upper()} for name, value, source, _ in rows}))
        return 0
    wide = [max(len(row[i]) for row in rows) for i in range(3)]
    for name, value, source, about in rows:
        print(f"{name:{wide[0]}}  {value:{wide[1]}}  {source:{wide[2]}}  {about}")
    return 0
