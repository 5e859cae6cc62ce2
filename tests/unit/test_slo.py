"""Figures of a smoke run: percentiles, targets, regressions, recorded runs, the picture, and what a profile promises."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from typing import Any

import pytest

from artifact import profile
from artifact.errors import Invalid
from runtime import plot, slo

DIGEST = "sha256:" + "1" * 64


def _level(streams: int, speed: float) -> slo.Level:
    samples = [slo.Sample(0.1 / speed + i / 1000, (0.01 / speed,) * 9, 0.2 / speed, 10) for i in range(20)]
    return slo.level(streams, samples, 2.0 / speed)


def test_percentiles_by_nearest_rank() -> None:
    assert [slo.percentile(range(1, 101), s) for s in (0.5, 0.95, 0.99, 1.0)] == [50, 95, 99, 100]
    assert slo.percentile([], 0.5) == 0 and slo.percentile([7.0], 0.01) == 7


def test_a_level_of_known_samples() -> None:
    found = slo.level(4, [slo.Sample(0.1, (0.01, 0.03), 0.14, 3), slo.Sample(0.3, (0.02,), 0.32, 2), slo.Sample(error="cut")], 0.5)
    assert (found.requests, found.failed, found.tokens, found.tok_s) == (3, 1, 5, 10.0)
    assert round(found.ttft_p50_ms) == 100 and round(found.ttft_p95_ms) == 300 and round(found.itl_p50_ms) == 20 and round(found.itl_p99_ms) == 30
    assert round(found.stream_tok_s) == 50


def test_targets_are_floors_or_ceilings() -> None:
    targets = slo.parse_targets(" ttft_p95_ms=150, tok_s=90 ")
    assert slo.missed(_level(2, 1.0), targets) == []
    slow = slo.missed(_level(2, 0.5), targets)
    assert len(slow) == 2 and "ttft_p95_ms at 2 streams is 218.0, the target at most 150" in slow and "tok_s at 2 streams is 50.0" in slow[1]
    failed = slo.level(1, [slo.Sample(error="x")], 1.0)
    assert slo.missed(failed, {}) == ["1 of 1 requests failed at 1 streams"]


@pytest.mark.parametrize(
    "text", ["x=1", "tok_s", "tok_s=", "tok_s=-1", "tok_s=nan", "tok_s=1e99", "tok_s=inf", "=5", "", ",", "tok_s=1,", "tok_s=1,tok_s=2"]
)
def test_a_target_that_is_none(text: str) -> None:
    with pytest.raises(Invalid):
        slo.parse_targets(text)


def test_half_the_speed_is_a_regression_with_its_name() -> None:
    before = slo.parse(json.loads(json.dumps(slo.document([_level(1, 1.0), _level(8, 1.0)], {"model": "m"}))))
    assert slo.regressions([_level(1, 0.9), _level(2, 0.1)], before, 0.2) == []
    named = slo.regressions([_level(8, 0.5)], before, 0.2)
    assert [n.split(" ")[0] for n in named] == ["ttft_p95_ms", "itl_p95_ms", "tok_s"] and "recorded 100.0 (-50 %)" in named[2]


@pytest.mark.parametrize(
    "doc", [{}, {"schema": 1}, {"schema": 2, "levels": []}, {"schema": 1, "levels": [7]}, {"schema": 1, "levels": [{"concurrency": "x"}]}]
)
def test_a_baseline_that_is_none(doc: dict[str, Any]) -> None:
    with pytest.raises(Invalid):
        slo.parse(doc)


@pytest.mark.parametrize("levels", [[1], [1, 2, 64]])
def test_the_picture_is_xml_and_escapes(levels: list[int]) -> None:
    text = plot.svg([_level(n, 1.0) for n in levels], [_level(n, 2.0) for n in levels], {"tok_s": 50.0}, "<script>&")
    root = ET.fromstring(text)
    assert root.tag.endswith("svg") and "<script>" not in text and "target" in text and text.count("<polyline") == 5
    assert "nan" not in text and "inf" not in text.replace("info", "")


def _build(expected: object) -> profile.Profile:
    made = profile.build("acme/tiny", DIGEST, [{"tags": {"llm_engine": "vllm"}, "expected": expected}], 1)
    return profile.parse(made).profiles[0]


def test_what_a_profile_promises() -> None:
    found = _build({"ttft_p95_ms": 300, "tok_s": 2500, "concurrency": 16, "hardware": "1x H100", "source": "our bench, 2026-08"}).expected
    assert found == profile.Expected(300, 2500, 16, "1x H100", "our bench, 2026-08")
    assert profile.parse(profile.build("acme/tiny", DIGEST, [{"tags": {"llm_engine": "vllm"}}], 1)).profiles[0].expected is None


@pytest.mark.parametrize(
    "bad",
    [{}, {"tok_s": 1}, {"source": "x"}, {"tok_s": -1, "source": "x"}, {"tok_s": 1.5, "source": "x"}, {"tok_s": 1, "source": "x\n"}, {"toks": 1}, []],
)
def test_a_promise_that_is_none(bad: object) -> None:
    with pytest.raises(Invalid):
        _build(bad)
