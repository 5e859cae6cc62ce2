"""`airlock gc`: one garbage collection on a data directory, also beside a running server; `--dry-run` lists what would go and changes nothing."""

from __future__ import annotations

import argparse
import json
import sys
import time

from artifact.errors import Conflict
from artifact.grant import date
from registry.collector import Report
from registry.commands.catalog import size_text
from registry.settings import Settings
from registry.wiring import open_site


def _progress(phase: str, done: int) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[K{phase}: {done}", end="", file=sys.stderr, flush=True)


def _lines(report: Report) -> list[str]:
    would = "would go" if report.dry_run else "went"
    if report.warning:
        return [f"nothing {would}: {report.warning}", "set the clock right, or say that it is: airlock gc --clock-is-right"]
    lines = [f"as of {date(report.at)}"] if report.dry_run else []
    for item in report.retained:
        name = f"{item['name']}:{item['tag']}" if item["tag"] else f"{item['name']}@{item['digest']}"
        freed = f", {size_text(int(str(item['bytes'])))}" if item.get("bytes") else ""
        lines.append(f"{name} {would}: {item['why']}{freed}")
    lines += [
        f"{item['kind']} {item['digest']} {size_text(int(str(item.get('bytes', 0)))) if 'bytes' in item else ''}".rstrip() for item in report.items
    ]
    for orphan in report.orphans:
        lines.append(f"{orphan['name']}@{orphan['digest']} refers to {orphan['subject']}, which is not there; a rule with untagged_days takes it")
    lines.append(f"{report.tags} tags, {report.manifests} manifests and {report.blobs} blobs with {size_text(report.bytes)} {would}")
    lines.append(f"{report.removed} objects with {size_text(report.removed_bytes)} {'would be' if report.dry_run else 'were'} removed from the store")
    if report.uploads or report.staging:
        lines.append(f"{report.uploads} uploads that nobody continued {would}, {report.staging} stale pieces")
    if report.unjudged:
        lines.append(f"no retention rule was followed: {report.unjudged}")
    if report.failed:
        lines.append(f"{report.failed} objects could not be removed from the store and are tried again later")
    if not report.complete:
        lines.append(
            "this is not all: there is more than one look may take" if report.dry_run else "stopped before the end; the same command again goes on"
        )
    return lines


def main(argv: list[str]) -> int:
    """Entry point of `airlock gc`."""
    parser = argparse.ArgumentParser(
        prog="airlock gc",
        description="Removes what no tag, manifest, lease or rule keeps; safe while the registry serves. The bytes go AIRLOCK_GARBAGE_DELAY_S later.",
        epilog="example: airlock gc --data /srv/airlock --dry-run",
    )
    parser.add_argument("--data", help="data directory (AIRLOCK_DATA)")
    parser.add_argument("--dry-run", action="store_true", help="list what would go, with bytes and reasons; change nothing")
    parser.add_argument("--clock-is-right", action="store_true", help="go on although the clock is far from where the last run left it")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args(argv)
    with open_site(Settings.load(args.data), background=False) as site:
        work = site.collector.dry_run if args.dry_run else site.collector.run
        report = work(time.time(), progress=_progress, clock_is_right=args.clock_is_right)
        if args.clock_is_right and not args.dry_run:
            site.floor.raise_to(time.time())
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr)
    print(json.dumps(report.as_json()) if args.json else "\n".join(_lines(report)))
    return Conflict.exit_code if report.warning else 0
