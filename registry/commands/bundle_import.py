"""`airlock bundle import DIR`: a bundle from a medium into this site's store."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

from artifact.copy import Progress
from registry.importer import import_bundle
from registry.settings import Settings
from registry.wiring import open_site


def main(argv: list[str]) -> int:
    """Imports and prints what came in; returns the exit status (7: something on the medium was altered)."""
    parser = argparse.ArgumentParser(
        prog="airlock bundle import",
        description="Verify a bundle and take it in; interrupted, the same command goes on; nothing is visible before all of it is.",
        epilog="example: airlock bundle import /media/usb/airlock --data /srv/airlock",
    )
    parser.add_argument("directory", metavar="DIR", type=Path, help="the bundle's directory on the medium")
    parser.add_argument("--data", help="the data directory (env AIRLOCK_DATA)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    given = parser.parse_args(argv)
    site = open_site(Settings.load(given.data))
    bars: list[Progress] = []
    try:
        report = import_bundle(
            site,
            given.directory,
            site.floor.now(time.time()),
            lambda n: bars[0].add(n),
            lambda total: bars.append(Progress(total, "import", sys.stderr)),
        )
    finally:
        for bar in bars:
            bar.close()
        site.close()
    if given.json:
        print(json.dumps(report))
        return 0
    what = f"bundle {report['sequence']} of sender {report['sender']}"
    taken = report["documents"] if isinstance(report["documents"], list) else []
    if not report["imported"]:
        print(f"{what} was already imported: nothing to do")
        print(*map(_document, taken), sep="\n", end="\n" if taken else "")
        return 0
    print(f"imported {what}: {report['names']} names, {report['objects']} objects, {report['copied_bytes']} bytes copied")
    print(*map(_document, taken), sep="\n", end="\n" if taken else "")
    if report["older"]:
        print("it is older than what was imported before: its content was added, no name was moved")
    for name in report["requires_kept"] if isinstance(report["requires_kept"], list) else []:
        print(f"{name} keeps what an administrator of this site says it requires; the bundle says something else (airlock catalog show {name})")
    if report["lost"]:
        print(f"never imported here: bundles {', '.join(map(str, report['lost'] if isinstance(report['lost'], list) else []))}")
    return 0


def _document(one: dict[str, object]) -> str:
    """What became of a document that came along."""
    if one["state"] == "refused":
        return f"refused {one['document']} {one.get('jti', one['digest'])}: {one['what']}"
    whose = f" of {one['org']}" if one["org"] else ""
    state = f"takes over on {one['begins']}" if one["state"] == "later" else one["state"]
    return f"{one['document']} {one['jti']}{whose} by {one['issuer']}, serial {one['serial']}: {state}"
