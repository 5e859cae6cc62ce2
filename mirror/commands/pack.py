"""`airlock bundle pack`: the next bundle onto a medium, or the rest of one that was begun."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

from artifact.copy import Progress
from mirror import pack
from mirror.home import MirrorHome

EXAMPLE = "example: airlock bundle pack --to /media/usb/airlock --home /srv/airlock-mirror"


def main(argv: list[str]) -> int:
    """Packs and prints what was written; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="airlock bundle pack", description="Write everything in staging as a bundle; interrupted, the same command goes on.", epilog=EXAMPLE
    )
    home_default = os.environ.get("AIRLOCK_MIRROR")
    parser.add_argument("--to", type=Path, required=True, help="a directory on the medium that holds nothing but the bundle")
    parser.add_argument("--home", type=Path, default=home_default, required=not home_default, help="the mirror's home (env AIRLOCK_MIRROR)")
    parser.add_argument("--receipt", type=Path, help="receipt.json of a receiver: what it holds is left out")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    given = parser.parse_args(argv)
    home = MirrorHome.open(Path(given.home))
    bars: list[Progress] = []
    try:
        report = pack.pack(
            home,
            given.to,
            time.time(),
            lambda n: bars[0].add(n),
            lambda total: bars.append(Progress(total, "pack", sys.stderr)),
            given.receipt,
        )
    finally:
        for bar in bars:
            bar.close()
    if given.json:
        print(json.dumps(report))
    elif report["changed"]:
        print(
            f"bundle {report['sequence']} of sender {report['sender']} in {report['directory']}: "
            f"{report['names']} names, {report['documents']} documents, {report['objects']} objects, "
            f"{report['bytes']} bytes ({report['copied']} objects, {report['copied_bytes']} bytes copied now)"
        )
    else:
        print(f"nothing new: {report['directory']} holds bundle {report['sequence']} whole ({report['objects']} objects, {report['bytes']} bytes)")
    return 0
