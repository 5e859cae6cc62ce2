"""`airlock mirror sync PLAN --home DIR [--json]`: fetches what a plan names into the mirror's staging, verified; run again it transfers nothing."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from artifact.copy import Progress
from mirror.home import MirrorHome
from mirror.plan import load
from mirror.sync import exit_code, sync


def main(argv: list[str]) -> int:
    """Entry point; exit status 0 only if every item is in staging."""
    parser = argparse.ArgumentParser(
        prog="airlock mirror sync",
        description="fetch what a plan names into the mirror's staging, verified",
        epilog="example: airlock mirror sync plan.yaml --home /srv/mirror",
    )
    parser.add_argument("plan", type=Path, help="plan.yaml (docs: mirror plan)")
    parser.add_argument("--home", type=Path, default=os.environ.get("AIRLOCK_MIRROR"), help="the mirror's home (AIRLOCK_MIRROR)")
    parser.add_argument("--dry-run", action="store_true", help="say what each item is and how many bytes it has, and fetch none of them")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    chosen = parser.parse_args(argv)
    if chosen.home is None:
        parser.error("--home DIR or AIRLOCK_MIRROR is needed")
    report = sync(
        MirrorHome.open(chosen.home),
        load(chosen.plan),
        lambda total: Progress(total, "sync", sys.stderr),
        warn=lambda words: print(f"warning: {words}", file=sys.stderr, flush=True),
        dry=chosen.dry_run,
    )
    print(json.dumps(report, indent=1, sort_keys=True) if chosen.json else _text(report))
    return exit_code(report)


def _text(report: dict[str, object]) -> str:
    items = report["items"]
    assert isinstance(items, list)
    lines = []
    for item in items:
        count = f"{item['size']} bytes in all" if item["status"] == "planned" else f"{item['transferred']} bytes"
        lines.append(f"{item['status']:9} {item['source']}  {count}")
        for c in item.get("chosen", []):
            what = f"profile {c['profile']} ({c['description']})" if "profile" in c else f"model {c['model']}"
            lines.append(f"          {what}: {c['files']} files, {c['bytes']} bytes")
        lines += [f"          {n['name']}:{n['ref']} -> {n['digest']}" for n in item["names"]]
        if "error" in item:
            error = item["error"]
            lines += [f"          {part}: {error[part]}" for part in ("what", "expected", "do") if error[part]]
    lines.append(f"{report['transferred']} bytes transferred, {report['failed']} of {len(items)} items failed")
    return "\n".join(lines)
