"""The report's arithmetic by hand-made entries and leases, the same by brute force, and its page: whole, alone, and with every text escaped."""

from __future__ import annotations

import csv
import io
import json
import random
import re
from html.parser import HTMLParser
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from artifact.errors import Invalid
from artifact.manifest import MAX_MANIFEST_BYTES
from registry.commands.period import span
from registry.commands.tables import TABLES, as_csv, as_text
from registry.page import SHOWN, page
from registry.plots import bars, nice, stacked, steps
from registry.report import DAY_S, MAX_PULLS, MAX_ROWS, MAX_UPSTREAM, POINTS, Event, Lease, Period, Tally, bounded, gpus, times

START = 1_700_000_000.0 // DAY_S * DAY_S
PERIOD = Period(START, START + 10 * DAY_S, now=START + 10 * DAY_S)


def event(at: float = 0.0, what: str = "pull", result: str = "granted", **more: object) -> Event:
    columns = {"org": "acme", "key_id": "key-1", "ref": "acme/m@blob", "reason": ""} | {k: more.pop(k) for k in list(more) if k in Event._fields}
    return Event(START + at, what, result=result, body=more, **columns)  # type: ignore[arg-type]


def tallied(*events: Event) -> dict[str, Any]:
    tally = Tally(PERIOD)
    for e in events:
        tally.add(e)
    return tally.result()


def test_granted_served_and_verified_are_told_apart() -> None:
    found = tallied(
        event(0, ref="acme/m@sha256:" + "a" * 64, grant="grant-1"),
        event(DAY_S, ref="acme/m@blob", grant="grant-1", counted=True, n=7),
        event(DAY_S, ref="acme/m@sha256:" + "b" * 64, grant="grant-2"),
        event(2 * DAY_S, result="served", ref="acme/m@sha256:" + "c" * 64, counted=True, n=4, bytes=1000),
        event(3 * DAY_S, "verified", digest="sha256:" + "a" * 64, bytes=700),
        event(3 * DAY_S, key_id="key-2"),
        event(3 * DAY_S, "token"),
        event(3 * DAY_S, "audit", ref="acme@report"),
        event(3 * DAY_S, "key_create", ref="key-9"),
    )
    first, second = found["pulls"]["rows"]
    assert (first["granted"], first["served"], first["served_bytes"], first["verified"], first["verified_bytes"]) == (8, 4, 1000, 1, 700)
    assert (first["grants"], first["digests"]) == (["grant-1", "grant-2"], ["sha256:" + "a" * 64, "sha256:" + "b" * 64])
    assert (first["first"], first["last"]) == ("2023-11-14T00:00:00Z", "2023-11-17T00:00:00Z") and second["key_id"] == "key-2"
    assert found["per_day"] == [1, 7, 0, 1, 0, 0, 0, 0, 0, 0]
    assert found["totals"]["granted"] == 9 and found["changes"]["rows"] == [{"event": "key_create", "count": 1}]


def test_what_a_counter_repeats_counts_once() -> None:
    assert times(event(counted=True, n=7)) == 6, "the first has an entry of its own"
    assert times(event(result="served", counted=True, n=7)) == 7, "served bytes have counters alone"
    assert times(event(result="denied", counted=True, n=25)) == 15, "ten a minute have entries"
    assert times(event(result="denied", key_id="", counted=True, n=25)) == 24
    assert times(event(counted=True, n="many")) == 0 and times(event(n=7)) == 1


def test_denials_by_who_and_why() -> None:
    denied = [event(i, result="denied", reason="no_grant", ref="x/y@1") for i in range(3)]
    login = event(DAY_S, "login", "denied", key_id="", org="", ref="", reason="key_invalid", network="10.0.0.0/24", counted=True, n=41)
    found = tallied(*denied, login)
    assert [(d["who"], d["action"], d["reason"], d["attempts"]) for d in found["denials"]["rows"]] == [
        ("10.0.0.0/24", "login", "key_invalid", 40),
        ("key-1", "pull", "no_grant", 3),
    ]
    assert list(found["denied_per_day"]) == ["key_invalid", "no_grant"] and found["denied_per_day"]["no_grant"][0] == 3
    assert found["totals"]["denied"] == 43 and not found["pulls"]["rows"]


def test_tables_are_bounded() -> None:
    rows: list[dict[str, object]] = [{"n": i} for i in range(MAX_PULLS + 3)]
    assert len(bounded(rows, MAX_PULLS)["rows"]) == MAX_PULLS and bounded(rows)["total"] == MAX_PULLS + 3  # type: ignore[arg-type]
    many = tallied(*(event(i, ref="acme/m@sha256:" + f"{i:064x}", grant=f"grant-{i}") for i in range(50)))
    assert many["pulls"]["rows"][0]["digests"][-1] == "…" and len(many["pulls"]["rows"][0]["grants"]) == 6


# ---- GPUs


def lease(start: float, end: float, *names: str, host: str = "h", bound: int = 4, licence: str = "entitlement e") -> Lease:
    return Lease(licence, "acme", bound, host, names, START + start, START + end)


def test_the_peak_of_gpus_against_the_bound() -> None:
    found = gpus(
        [
            lease(0, 100, "a", "b"),
            lease(100, 200, "a", "b"),  # renewed at the moment of its end: never four
            lease(50, 150, "a", "b", "c", host="other"),
            lease(60, 70, "a", host="other"),  # on a GPU that is leased already
            lease(0, 10, licence="grant g"),  # a CPU node
            lease(-50, -10, "a"),
            lease(80, 80, "z"),
        ],
        PERIOD,
    )
    (row,) = found
    assert (row["peak"], row["bound"], row["peak_at"], row["over_s"], row["leases"], row["hosts"]) == (5, 4, "2023-11-14T00:00:50Z", 100, 4, 2)
    assert row["course"] == [[START, 2], [START + 50, 5], [START + 60, 5], [START + 70, 5], [START + 100, 5], [START + 150, 2], [START + 200, 0]]
    assert gpus([lease(0, 100, "a", bound=0)], PERIOD)[0]["over_s"] == 0, "without a bound nothing is above it"
    assert gpus([], PERIOD) == []


def test_what_began_before_and_ends_behind_the_period_is_cut() -> None:
    (row,) = gpus([lease(-5000, 20 * DAY_S, "a")], PERIOD)
    assert (row["peak"], row["gpu_hours"], row["course"]) == (1, 240.0, [[START, 1]])


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 60), st.integers(1, 30), st.sampled_from("ab"), st.sets(st.sampled_from("xyz"), min_size=1)), max_size=12))
def test_the_peak_by_brute_force(spans: list[tuple[int, int, str, set[str]]]) -> None:
    leases = [lease(at, at + length, *sorted(names), host=host) for at, length, host, names in spans]
    at_second = [len({(x.host, g) for x in leases if x.start <= START + second < x.end for g in x.gpus}) for second in range(100)]
    found = gpus(leases, PERIOD)
    assert (found[0]["peak"] if found else 0) == max(at_second)
    if found:
        assert found[0]["over_s"] == sum(n > 4 for n in at_second)


def test_a_long_course_is_thinned_and_keeps_its_peak() -> None:
    dice = random.Random(5)
    leases = [lease(at := dice.random() * 9 * DAY_S, at + 2000, f"g{i}", bound=1) for i in range(3000)]
    (row,) = gpus(leases, PERIOD)
    course: Any = row["course"]
    assert len(course) == POINTS and max(n for _, n in course) == row["peak"]


# ---- periods, tables, the page


def test_periods() -> None:
    now = START + 5 * DAY_S + 7
    assert span("2026-12", None, None, now) == ("2026-12-01T00:00:00Z", "2027-01-01T00:00:00Z")
    assert span(None, None, None, now) == ("2023-11-01T00:00:00Z", "2023-11-19T00:00:08Z")
    assert span(None, "2023-11-03", None, now) == ("2023-11-03T00:00:00Z", "2023-11-19T00:00:08Z")
    assert span(None, "2023-11-03T01:02:03Z", "2023-11-04", now)[0] == "2023-11-03T01:02:03Z"
    for bad in (("2026-13", None, None), ("26-1", None, None), ("2026-01", "2026-01-01", None), (None, None, "2026-01-01"), (None, "now", None)):
        with pytest.raises(Invalid):
            span(*bad, now)


NASTY = "</title><script>alert(1)</script>\"'&\u202e=1+1"


def report(rows: int = 3, words: str = NASTY) -> dict[str, Any]:
    """A report with the same text in every field that comes from outside."""
    events = [event(i * 1000, org=words, key_id=f"{words}{i}", ref=f"{words}@blob", grant=words) for i in range(rows)]
    events += [event(i * 90_000, result="denied", key_id=f"{i}{words}", reason=f"{words}{i % 9}", ref=words) for i in range(rows)]
    found = tallied(*events) | {"organisation": words, "from": PERIOD.start, "to": PERIOD.end, "made": PERIOD.now, "days": PERIOD.days}
    leases = [Lease(f"{words}{i}", words, 2, "h", ("a", "b", "c"), START + 10 * i, START + 90_000) for i in range(rows)]
    key = dict.fromkeys(("key_id", "org", "type", "note", "created", "last_used", "expires"), words)
    grant = dict.fromkeys(("grant_id", "org", "to", "expires"), words) | {"models": [words], "actions": [words], "days": 3.5}
    fetched = dict.fromkeys((*TABLES["upstream"][1], "fetched", "digest"), words)
    return found | {
        "sealed": 5,
        "leases_recorded": 1,
        "leases_stored": 2,
        "evidence": {"log": words, "size": 9, "root": "ab", "key": words, "checkpoint": words},
        "gpus": bounded(gpus(leases, PERIOD)),
        "unused_keys": bounded([key] * rows),
        "grants": bounded([grant] * rows),
        "upstream": bounded([fetched] * rows),
    }


class _Reader(HTMLParser):
    """Which elements and attributes a browser would see."""

    VOID = ("meta", "br", "line", "rect", "polygon", "polyline")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: set[str] = set()
        self.attributes: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)
        self.attributes |= {name for name, _ in attrs}
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag


def test_the_page_stands_alone_and_escapes_every_text() -> None:
    html = page(report())
    found = _Reader()
    found.feed(html)
    assert not found.open and "svg" in found.seen
    assert not found.seen & {"script", "link", "img", "iframe", "object", "style script"} and found.seen >= {"table", "figure"}
    assert not {a for a in found.attributes if a.startswith("on") or a in ("src", "href")}
    assert "alert(1)</script" not in html and "http" not in html.replace("http-equiv", "") and "url(" not in html and "@import" not in html
    assert html.count("<svg") == 1 + 3 + 1, "pulls, GPUs of each licence, denials"


def test_long_tables_are_cut_and_say_so() -> None:
    html = page(report(rows=SHOWN + 20, words="x"))
    assert f"{SHOWN} of {SHOWN + 20} rows" in html and html.count("<tr>") < 7 * (SHOWN + 2)
    assert f"4 of {SHOWN + 20} licences" in html


def test_an_empty_report_is_a_page_too() -> None:
    empty = report(rows=0) | {"sealed": 0, "leases_stored": 1}
    found = _Reader()
    found.feed(page(empty))
    assert not found.open and "None." in page(empty)
    assert "granted 0" in as_text(empty)


def test_tables_as_text_and_csv() -> None:
    made = report()
    assert "5 entries of the period were sealed" in as_text(made)
    assert "the log records 1 leases, the database holds 2" in as_text(made | {"sealed": 0})
    for name, (_, columns) in TABLES.items():
        rows = list(csv.reader(io.StringIO(as_csv(made, name))))
        assert tuple(rows[0]) == columns and len(rows) == len(made[name]["rows"]) + 1
    spoiled = report(words="=cmd|' /C calc'!A0")
    cells = [cell for row in csv.reader(io.StringIO(as_csv(spoiled, "upstream"))) for cell in row]
    assert not [cell for cell in cells if cell[:1] in "=+-@"], "no cell is a formula"
    json.dumps(made)


def test_plots_stay_within_their_frame() -> None:
    for n in (0, 1, 3, 9, 10, 17, 99, 127, 1001, 10**9):
        assert nice(n) >= n
    drawn = bars([0, 5, 10**9], START, START + 3 * DAY_S, "t")
    drawn += stacked([(f"r{i}", [i, 2, 3]) for i in range(20)], START, START + 3 * DAY_S, "t")
    drawn += steps([[START, 3], [START + 50_000, 900]], 100, START, START + 2 * DAY_S, "t", START + 3 * DAY_S)
    numbers = [float(n) for n in re.findall(r'(?:x|y|x1|x2|y1|y2|height|width)="([0-9.-]+)"', drawn)]
    assert numbers and all(0 <= n <= 720 for n in numbers)


@pytest.mark.slow
def test_the_largest_report_fits_an_answer() -> None:
    """What a client reads of one answer is bounded (artifact/remote.py): names, references and evidence as long as they may be."""
    tally = Tally(PERIOD)
    for i in range(MAX_PULLS + 100):
        for n in range(7):
            tally.add(event(i, org="o" * 100, key_id=f"key-{i:016x}", ref=f"{'n' * 255}@sha256:{n:064x}", grant=f"grant-{n:016x}"))
        tally.add(event(i, result="denied", key_id=f"key-{i:016x}", org="o" * 100, reason="entitlement_expired", ref="r" * 600))
    made = report(rows=MAX_ROWS + 5, words="w" * 60) | tally.result()
    made["upstream"] = bounded([dict.fromkeys(TABLES["upstream"][1], "u" * 200) | {"evidence": "e" * 2000}] * MAX_UPSTREAM)
    assert len(json.dumps(made)) < MAX_MANIFEST_BYTES
