"""A report as one printable page: HTML with its style and plots inside, no script and nothing from elsewhere; pure.

Every text of the report is escaped: names, notes and reasons come from outside. Long tables are cut, and the page says so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

from artifact.grant import date
from registry.plots import bars, legend, short, stacked, steps
from registry.report import PLOTTED

SHOWN = 60
STYLE = """
@page { size: A4; margin: 14mm 12mm; }
* { box-sizing: border-box; }
body { font: 10pt/1.4 system-ui, "DejaVu Sans", "Liberation Sans", sans-serif; color: #222; max-width: 186mm; margin: 8mm auto; padding: 0 4mm; }
@media print { body { margin: 0; padding: 0; max-width: none; } }
h1 { font-size: 18pt; margin: 0; } h2 { font-size: 12.5pt; margin: 8mm 0 1mm; border-bottom: 1px solid #bbb; break-after: avoid; }
h3 { font-size: 10pt; margin: 4mm 0 0; font-weight: 600; break-after: avoid; overflow-wrap: anywhere; }
p { margin: 1.5mm 0; } .dim { color: #666; } .bad { color: #c53030; font-weight: 600; }
.facts { display: grid; grid-template-columns: repeat(4, 1fr); gap: 3mm; margin: 5mm 0; }
.facts div { border: 1px solid #ddd; border-radius: 2mm; padding: 2mm 3mm; } .facts b { display: block; font-size: 15pt; line-height: 1.2; }
figure { margin: 2mm 0; break-inside: avoid; } svg { width: 100%; height: auto; display: block; } svg text { font-size: 10px; }
.legend span { margin-right: 5mm; white-space: nowrap; } .legend i { display: inline-block; width: 3mm; height: 3mm; margin-right: 1.5mm; }
table { border-collapse: collapse; width: 100%; font-size: 7.5pt; margin: 2mm 0; } thead { display: table-header-group; }
th { text-align: left; border-bottom: 1.5px solid #888; vertical-align: bottom; } tr { break-inside: avoid; }
td, th { padding: .8mm 1.2mm; } td { border-bottom: 1px solid #e5e5e5; overflow-wrap: anywhere; vertical-align: top; }
.n { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; } .t { white-space: nowrap; } .w { min-width: 34mm; }
code { font: 8pt/1.3 "DejaVu Sans Mono", "Liberation Mono", monospace; overflow-wrap: anywhere; }
td code { font-size: 6.5pt; overflow-wrap: normal; }
"""
Row = Mapping[str, Any]
Cell = Callable[[Row], str]


def page(report: Row) -> str:
    """The page of what GET /airlock/v1/audit/report answers."""
    whole = str(report["organisation"] or "the whole site")
    title = f"Audit report: {whole}, {_day(report['from'])} to {_day(report['to'])}"
    sections = (_plots, _pulls, _gpus, _denials, _rights, _upstream, _changes, _words)
    parts = [_top(report, whole), *(section(report) for section in sections)]
    head = f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title><style>{STYLE}</style></head>'
    return f"{head}<body>{''.join(parts)}</body></html>\n"


def _day(at: float) -> str:
    return date(at)[:10]


def _moment(text: object) -> str:
    return escape(str(text)[:16]).replace("T", " ") or "–"


def _names(values: Sequence[object]) -> str:
    return escape(", ".join(map(str, values))) or "–"


def _text(name: str) -> Cell:
    return lambda row: escape(str(row[name])) or "–"


def _number(name: str) -> Cell:
    return lambda row: f"{row[name]:,}" if row[name] else "–"


def _bytes(count: str, size: str) -> Cell:
    return lambda row: f"{row[count]:,} · {short(row[size])}B" if row[count] else "–"


def _table(found: Row, *columns: tuple[str, str, Cell]) -> str:
    """The first rows of a table; each column by its title, the class of its cells and what they show."""
    rows, total = found["rows"], found["total"]
    if not rows:
        return '<p class="dim">None.</p>'
    head = "".join(f'<th class="{kind}">{escape(title)}</th>' for title, kind, _ in columns)
    lines = ("<tr>" + "".join(f'<td class="{kind}">{cell(row)}</td>' for _, kind, cell in columns) + "</tr>" for row in rows[:SHOWN])
    cut = f'<p class="dim">{SHOWN} of {total:,} rows; the others are in the CSV and JSON of the same report.</p>' if total > SHOWN else ""
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>{cut}"


def _top(report: Row, whole: str) -> str:
    totals, found = report["totals"], report["gpus"]["rows"]
    peak = max((row["peak"] for row in found), default=0)
    over = sum(row["over_s"] > 0 for row in found)
    facts = (
        (f"{totals['granted']:,}", f"pulls granted, to {totals['keys']:,} keys"),
        (f"{short(totals['served_bytes'])}B", f"served here, {short(totals['verified_bytes'])}B verified by runtimes"),
        (f"{peak:,}", "GPUs at once under one licence" + (f", {over} above the bound" if over else "")),
        (f"{totals['denied']:,}", "attempts denied"),
    )
    boxes = "".join(f"<div><b>{value}</b>{escape(words)}</div>" for value, words in facts)
    notes = []
    if report["sealed"]:
        notes.append(f"{report['sealed']:,} entries of this period were sealed into exports: they are not counted here.")
    if report["leases_recorded"] != report["leases_stored"] and not report["sealed"]:
        notes.append(f"The log records {report['leases_recorded']:,} leases of this period, the database holds {report['leases_stored']:,}.")
    warned = "".join(f'<p class="bad">{words}</p>' for words in notes)
    made = f"Made {_moment(date(report['made']))} UTC out of {report['entries']:,} entries of the period. Times are UTC."
    of = f"{escape(whole)} · {_day(report['from'])} to {_day(report['to'])}"
    return f'<h1>Audit report</h1><p>{of}</p><p class="dim">{made}</p>{warned}<div class="facts">{boxes}</div>'


def _plots(report: Row) -> str:
    """The three courses over the period; of more licences than fit the busiest."""
    start, end = report["from"], report["from"] + report["days"] * 86400
    out = [f"<h3>Pulls granted per day</h3><figure>{bars(report['per_day'], start, end, 'Pulls granted per day')}</figure>"]
    for row in report["gpus"]["rows"][:PLOTTED]:
        name = f"GPUs in use: {row['licence']}, {row['org']}"
        out.append(f"<h3>{escape(name)}</h3><figure>{steps(row['course'], row['bound'], start, report['to'], name, end)}</figure>")
    if report["gpus"]["total"] > PLOTTED:
        out.append(f'<p class="dim">{PLOTTED} of {report["gpus"]["total"]:,} licences, those with the highest peaks; all are in the table.</p>')
    days = list(report["denied_per_day"].items())
    if days:
        plot = stacked(days, start, end, "Denied attempts per day, by reason")
        shown = legend([(reason, sum(found)) for reason, found in days])
        out.append(f"<h3>Denied attempts per day, by reason</h3><figure>{plot}{shown}</figure>")
    return "".join(out)


def _pulls(report: Row) -> str:
    found = _table(
        report["pulls"],
        ("Organisation", "", _text("org")),
        ("Key", "", lambda row: f"<code>{escape(row['key_id'])}</code>"),
        ("What", "w", _text("name")),
        ("Under grant", "", lambda row: f"<code>{_names(row['grants'])}</code>"),
        ("Granted", "n", _number("granted")),
        ("Served", "n", _bytes("served", "served_bytes")),
        ("Verified", "n", _bytes("verified", "verified_bytes")),
        ("First and last", "t", lambda row: f"{_moment(row['first'])}<br>{_moment(row['last'])}"),
    )
    words = "Granted: the decision, bytes were offered. Served: answers with bytes that the registry sent itself; a redirect to the store is none. "
    words += "Verified: a runtime's own receipt that it holds the bytes and that their digests fit."
    return f'<h2>Who pulled what</h2><p class="dim">{words}</p>{found}'


def _gpus(report: Row) -> str:
    found = _table(
        report["gpus"],
        ("Licence", "", lambda row: f"<code>{escape(row['licence'])}</code>"),
        ("Organisation", "", _text("org")),
        ("Bought", "n", lambda row: f"{row['bound']:,}" if row["bound"] else "no bound"),
        ("Peak", "n", lambda row: f'<span class="{"bad" if row["over_s"] else ""}">{row["peak"]:,}</span>'),
        ("At", "t", lambda row: _moment(row["peak_at"])),
        ("Above it", "n", lambda row: f"{row['over_s'] / 3600:.1f} h" if row["over_s"] else "–"),
        ("GPU hours", "n", lambda row: f"{row['gpu_hours']:,.1f}"),
        ("Leases", "n", _number("leases")),
        ("Hosts", "n", _number("hosts")),
    )
    words = "Distinct GPUs at once, of leases that were neither over, returned nor replaced, against the number bought."
    return f'<h2>GPUs against licences</h2><p class="dim">{words}</p>{found}'


def _denials(report: Row) -> str:
    found = _table(
        report["denials"],
        ("Organisation", "", _text("org")),
        ("Key or network", "", lambda row: f"<code>{escape(row['who'])}</code>"),
        ("Action", "", _text("action")),
        ("Reason", "t", _text("reason")),
        ("Attempts", "n", _number("attempts")),
        ("Last asked for", "w", _text("ref")),
        ("First and last", "t", lambda row: f"{_moment(row['first'])}<br>{_moment(row['last'])}"),
    )
    return f"<h2>Denied attempts</h2>{found}"


def _rights(report: Row) -> str:
    keys = _table(
        report["unused_keys"],
        ("Key", "", lambda row: f"<code>{escape(row['key_id'])}</code>"),
        ("Organisation", "", _text("org")),
        ("Type", "", _text("type")),
        ("Note", "", _text("note")),
        ("Made", "t", lambda row: _moment(row["created"])),
        ("Last used", "t", lambda row: _moment(row["last_used"]) if row["last_used"] else "never"),
        ("Ends", "t", lambda row: _moment(row["expires"]) if row["expires"] else "never"),
    )
    grants = _table(
        report["grants"],
        ("Grant", "", lambda row: f"<code>{escape(row['grant_id'])}</code>"),
        ("Organisation", "", _text("org")),
        ("Of", "", _text("to")),
        ("What", "", lambda row: _names(row["models"])),
        ("Actions", "", lambda row: _names(row["actions"])),
        ("Ends", "t", lambda row: _moment(row["expires"])),
        ("Days left", "n", lambda row: f"{row['days']:,.1f}"),
    )
    first = f"<h2>Keys not used since the beginning of the period</h2>{keys}"
    return f'{first}<h2>Grants that end</h2><p class="dim">In the period, or within 90 days of this report.</p>{grants}'


def _upstream(report: Row) -> str:
    found = _table(
        report["upstream"],
        ("Name", "", lambda row: escape(f"{row['name']}:{row['ref']}")),
        ("Account upstream", "", _text("upstream_org")),
        ("Product", "", _text("product")),
        ("Tier", "", _text("tier")),
        ("Licence", "", _text("license")),
        ("Accepted by", "", _text("accepted_by")),
        ("Evidence", "w", _text("evidence")),
        ("Subscription ends", "t", lambda row: _moment(row["subscription_end"])),
        ("Fetched", "t", lambda row: _moment(row["fetched"])),
    )
    return f'<h2>Upstream entitlements</h2><p class="dim">What the mirror recorded when it fetched each artefact.</p>{found}'


def _changes(report: Row) -> str:
    rows = report["changes"]["rows"]
    listed = ", ".join(f"{escape(str(row['event']))} {row['count']:,}" for row in rows[:SHOWN]) or "None."
    return f"<h2>Changes</h2><p>{listed}</p>"


def _words(report: Row) -> str:
    e = report["evidence"]
    cannot = (
        "This page is a summary and no proof. The proof is the export of the log under the checkpoint below: "
        "<code>airlock audit export FILE</code>, then <code>airlock audit verify FILE --key VKEY --since CHECKPOINT</code>. "
        "The log cannot show what was never recorded, nor entries that were taken away before a checkpoint over them was kept by somebody else; "
        "counts of repeated reads may lack the last five seconds before a crash."
    )
    facts = f"{e['log']}\nentries {e['size']}\nroot {e['root']}\nkey {e['key']}"
    lines = "<br>".join(escape(line) for line in facts.split("\n"))
    return f"<h2>Evidence</h2><p>{cannot}</p><p><code>{lines}</code></p>"
