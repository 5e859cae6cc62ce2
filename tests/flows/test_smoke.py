"""airlock runtime smoke against a scripted engine behind the front: reached, half the speed, a profile's promise, failures, nobody there."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import AIRLOCK, find_port
from tests.contracts.fronts import Serve, serve

pytestmark = pytest.mark.server
__all__ = ["serve"]


def _smoke(port: int, *flags: str) -> tuple[int, str, str]:
    argv = [str(AIRLOCK), "runtime", "smoke", "--url", f"http://127.0.0.1:{port}", "--levels", "1,4", "--each", "3", *flags]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=120, check=False)
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout, done.stderr


def test_a_run_is_recorded_and_half_its_speed_is_named(serve: Serve, tmp_path: Path) -> None:
    record, svg = tmp_path / "run.json", tmp_path / "run.svg"
    fast = serve("--fake-frames", "12", "--fake-frame-s", "0.05")  # pauses that a loaded machine adds little to
    status, out, err = _smoke(fast.port, "--slo", "ttft_p95_ms=2000,tok_s=8", "--record", str(record), "--svg", str(svg))
    assert status == 0 and "target reached at 4 streams" in out and "expected: none recorded in this profile" in out, out + err
    assert "GPU memory: not told" in out and svg.read_text().startswith("<svg")
    doc: dict[str, Any] = json.loads(record.read_text())
    levels = doc["levels"]
    assert [x["concurrency"] for x in levels] == [1, 4] and [x["requests"] for x in levels] == [3, 12] and levels[1]["tokens"] == 12 * 12
    assert levels[1]["tok_s"] > 2 * levels[0]["tok_s"] and 40 < levels[0]["itl_p50_ms"] < 150 and doc["profile"] == "ab" * 32
    slow = serve("--fake-frames", "12", "--fake-frame-s", "0.1")
    status, out, _ = _smoke(slow.port, "--baseline", str(record))
    assert status == 53 and "REGRESSION: tok_s at 4 streams" in out and "REGRESSION: itl_p95_ms at 1 streams" in out, out
    bar = 0.8 * levels[1]["tok_s"]
    status, out, _ = _smoke(slow.port, "--slo", f"tok_s={bar:.1f}", "--baseline", str(record))
    assert status == 52 and "BELOW TARGET: tok_s at 4 streams" in out, out


def test_a_profiles_promise_is_compared_and_never_guessed(serve: Serve) -> None:
    promise = {"tok_s": 100_000, "concurrency": 1, "hardware": "8x H100", "source": "a data sheet"}
    served = serve(expected=promise)
    status, out, _ = _smoke(served.port)
    assert status == 53 and "BELOW EXPECTED: tok_s at 1 streams" in out and "source: a data sheet" in out, out
    status, out, _ = _smoke(served.port, "--json")
    doc = json.loads(out)
    assert status == 53 and doc["expected"] == promise and doc["at"] == 1 and doc["below_expected"]


def test_the_concurrency_of_a_promise_is_measured_too(serve: Serve) -> None:
    status, out, err = _smoke(serve(expected={"tok_s": 1.0, "concurrency": 2}).port, "--slo", "tok_s=1")
    assert status == 0 and "target reached at 2 streams" in out, out + err


@pytest.mark.parametrize(
    "told", [{"concurrency": "many", "tok_s": [1]}, {"concurrency": 1e300, "ttft_p95_ms": "x"}, {"concurrency": -1, "tok_s": True}]
)
def test_a_promise_that_is_none_is_none(serve: Serve, told: dict[str, object]) -> None:
    status, out, err = _smoke(serve(expected=told).port, "--slo", "tok_s=1")
    assert status == 0 and "target reached at 4 streams" in out, out + err


def test_a_file_that_cannot_be_written_is_told_first(tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "absent" / "x"):
        for flag in ("--record", "--svg"):
            status, _, err = _smoke(find_port(), flag, str(place))
            assert status == 6 and "cannot be written" in err, err


def test_requests_that_fail_are_a_miss(serve: Serve) -> None:
    served = serve("--fake-no-done", "--fake-garbage", "html")
    status, out, _ = _smoke(served.port, "--slo", "tok_s=1")
    assert status == 52 and "12 of 12 requests failed" in out and "failed: 502" in out, out


def test_wrong_words_and_nobody_there() -> None:
    for flags in (
        ("--slo", "speed=1"),
        ("--levels", "0"),
        ("--at", "3"),
        ("--at", "-1"),
        ("--key-env", "NOT_SET_HERE"),
        ("--baseline", "/nonexistent"),
    ):
        status, _, err = _smoke(find_port(), *flags)
        assert status in (6, 9), err
    assert _smoke(find_port())[0] == 9
