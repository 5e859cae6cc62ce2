"""The tables of a report for a terminal and as CSV; pure."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from typing import Any

from artifact.grant import date
from registry.commands.reach import table

TABLES: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "pulls": (
        "Who pulled what",
        ("org", "key_id", "name", "grants", "granted", "served", "served_bytes", "verified", "verified_bytes", "first", "last", "digests"),
    ),
    "gpus": ("GPUs at once against what was bought", ("licence", "org", "bound", "peak", "peak_at", "over_s", "gpu_hours", "leases", "hosts")),
    "denials": ("Denied attempts", ("org", "who", "action", "reason", "attempts", "ref", "first", "last")),
    "unused_keys": ("Keys not used since the beginning", ("key_id", "org", "type", "note", "created", "last_used", "expires")),
    "grants": ("Grants that end", ("grant_id", "org", "to", "models", "actions", "expires", "days")),
    "upstream": (
        "Upstream entitlements",
        ("name", "ref", "source", "upstream_org", "product", "tier", "license", "accepted_by", "evidence", "subscription_end"),
    ),
    "changes": ("Changes", ("event", "count")),
}
SHOWN = 40


def as_csv(report: Mapping[str, Any], name: str) -> str:
    """One table with a header line; lists with spaces between. A cell that a spreadsheet would compute gets an apostrophe before it."""
    out = io.StringIO()
    columns = TABLES[name][1]
    sheet = csv.writer(out, lineterminator="\n")
    sheet.writerow(columns)
    for row in report[name]["rows"]:
        sheet.writerow([_cell(row[column]) for column in columns])
    return out.getvalue()


def _cell(value: object) -> object:
    if isinstance(value, list):
        value = " ".join(map(str, value))
    return "'" + value if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r") else value


def as_text(report: Mapping[str, Any]) -> str:
    """All tables that have rows, the first 40 of each, for a terminal."""
    totals, evidence = report["totals"], report["evidence"]
    out = [
        f"{report['organisation'] or 'the whole site'}, {date(report['from'])} to {date(report['to'])}",
        f"granted {totals['granted']}, served {totals['served']} ({totals['served_bytes']} bytes), "
        f"verified {totals['verified']} ({totals['verified_bytes']} bytes), denied {totals['denied']}",
        f"out of {evidence['log']}, {evidence['size']} entries, root {evidence['root']}",
    ]
    if report["sealed"]:
        out.append(f"{report['sealed']} entries of the period were sealed into exports and are not counted")
    elif report["leases_recorded"] != report["leases_stored"]:
        out.append(f"the log records {report['leases_recorded']} leases, the database holds {report['leases_stored']}: see why")
    for name, (title, columns) in TABLES.items():
        rows, total = report[name]["rows"], report[name]["total"]
        if rows:
            shown = [column for column in columns if column != "digests"]
            more = f"\n({total - SHOWN} more: --csv {name}, or --html)" if total > SHOWN else ""
            out.append(f"\n{title}\n{table(rows[:SHOWN], *shown)}{more}")
    return "\n".join(out)
