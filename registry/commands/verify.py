"""`airlock registry verify`: reads the whole store against its digests, at a bounded rate, and takes out of service what rotted."""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from contextlib import suppress

from artifact.copy import Progress
from artifact.errors import Mismatch
from registry.scrub import Report, Scrub
from registry.settings import Settings
from registry.wiring import open_site

MAX_MINUTES = 10_000_000
UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def _rate(text: str) -> int:
    found = re.fullmatch(r"([0-9]{1,12})([KMG]?)", text.upper())
    if not found:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is no rate; expected: bytes a second, for example 200M; 0 is unbounded")
    return int(found[1]) * UNITS[found[2]]


def _minutes(text: str) -> float:
    with suppress(ValueError):
        if 0 < float(text) < MAX_MINUTES:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text[:40]!r} is no time to run for; expected: more than 0, below {MAX_MINUTES}; without it, to the end")


def main(argv: list[str]) -> int:
    """Verifies and prints what was found; returns 0, or the status of Mismatch when anything is not whole."""
    parser = argparse.ArgumentParser(
        prog="airlock registry verify",
        description="Read every object and compare it with its digest. Damaged ones are quarantined: not served until pushed or imported again.",
        epilog="example: airlock registry verify --data /srv/airlock --rate 200M --minutes 60",
    )
    parser.add_argument("--data", help="the data directory (env AIRLOCK_DATA)")
    parser.add_argument("--rate", type=_rate, default=0, help="bytes a second at most, with K, M or G; 0 (the default) is unbounded")
    parser.add_argument("--minutes", type=_minutes, help="stop after so long, where the next run goes on; without it, at the end")
    parser.add_argument("--restart", action="store_true", help="begin at the first object, not where the last run stopped")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    given = parser.parse_args(argv)
    end = time.monotonic() + given.minutes * 60 if given.minutes else 0.0
    with open_site(Settings.load(given.data), background=False) as site:
        progress = None if given.json else Progress(Scrub(site.catalog, site.blobs, site.audit).total(), "verify", sys.stderr)
        scrub = Scrub(site.catalog, site.blobs, site.audit, given.rate, progress.add if progress else lambda n: None)
        report = scrub.run(time.time(), restart=given.restart, stop=lambda: bool(end) and time.monotonic() > end)
        if progress:
            progress.close()
    print(json.dumps(report.as_json()) if given.json else _words(report))
    return Mismatch.exit_code if report.findings else 0


def _words(report: Report) -> str:
    lines = [f"{f.digest} {f.problem}; quarantined ({', '.join(f.repositories) or 'named by no repository'})" for f in report.findings]
    lines += [f"{digest} is whole again and served" for digest in report.healed]
    lines.append(f"{report.objects} objects, {report.bytes} bytes and {report.manifests} manifests read; {len(report.findings)} damaged")
    if not report.complete:
        lines.append("not all was read: the next run goes on from here")
    if report.findings:
        lines.append("do: push the files again, or import the bundle that brought them; the damaged bytes are kept for 30 days")
    return "\n".join(lines)
