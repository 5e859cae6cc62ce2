"""`airlock registry rebuild`: makes the index over content again after a restore, and says which bytes are missing."""

from __future__ import annotations

import argparse
import json
import time

from artifact.errors import Mismatch
from registry.rebuild import Rebuild, Report
from registry.settings import Settings
from registry.wiring import open_site


def main(argv: list[str]) -> int:
    """Rebuilds and prints what changed; returns 0, or the status of Mismatch when bytes are missing or manifests damaged."""
    parser = argparse.ArgumentParser(
        prog="airlock registry rebuild",
        description="Derive the index over content again from manifests and objects. Removes nothing. Names, keys and audit come from a backup.",
        epilog="example: airlock registry rebuild --data /srv/airlock",
    )
    parser.add_argument("--data", help="the data directory (env AIRLOCK_DATA)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    given = parser.parse_args(argv)
    settings = Settings.load(given.data)
    with open_site(settings, background=False) as site:
        report = Rebuild(site.catalog, site.blobs, site.audit, settings.blob_lease_s).run(time.time())
    print(json.dumps(report.as_json()) if given.json else _words(report))
    return Mismatch.exit_code if report.missing_count or report.damaged else 0


def _words(report: Report) -> str:
    lines = [f"missing: {digest} ({', '.join(names) or 'named by no repository'})" for digest, names in report.missing.items()]
    lines += [f"damaged manifest: {digest}" for digest in report.damaged]
    lines.append(f"{report.objects} objects ({report.bytes} bytes), {report.adopted} adopted, {report.found_again} found again")
    lines.append(f"{report.manifests} manifests, {report.repaired} with repaired entries; {report.missing_count} objects missing")
    if report.missing_count:
        lines.append("do: copy the objects back from any copy of the store, push the files again, or import the bundles that brought them")
    return "\n".join(lines)
