"""airlock runtime smoke against a scripted engine behind the front: reached, half the speed, a profile's promise, failures, nobody there."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
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


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--slo", "ttft_p95=500"), "there is no target 'ttft_p95=500'"),
        (("--slo", "ttft_p95_ms:500"), "there is no target 'ttft_p95_ms:500'"),
        (("--slo", "ttft_p95_ms=500ms"), "the target ttft_p95_ms is '500ms'"),
        (("--slo", ""), "there is no target ''"),  # of a variable that is not set: it would judge nothing, and pass
        (("--levels", "0"), "--levels '0'"),
        (("--levels", "\u00b2"), "--levels"),
        (("--at", "3"), "--at 3 is no level"),
        (("--at", "-1"), "--at -1 is no level"),
        (("--each", "1" + "0" * 400), "--each 1000"),
        (("--timeout-s", "nan"), "--timeout-s nan"),
        (("--url", "127.0.0.1:8000"), "not an http or https URL"),
        (("--key-env", "NOT_SET_HERE"), "--key-env NOT_SET_HERE"),
        (("--baseline", "/nonexistent"), "the baseline /nonexistent"),
    ],
)
def test_wrong_words_are_named(flags: tuple[str, ...], said: str) -> None:
    status, _, err = _smoke(find_port(), *flags)
    assert status == 6 and said in err and "expected: " in err, err


def test_nobody_there_and_a_baseline_that_is_nested_without_end(tmp_path: Path) -> None:
    assert _smoke(find_port())[0] == 9
    (tmp_path / "deep").write_text("[" * 100_000)
    assert _smoke(find_port(), "--baseline", str(tmp_path / "deep"))[0] == 6


TOKEN = b'data: {"choices":[{"delta":{"content":"x"}}]%s}\n\n'
NO_CHUNKS = [
    b"data: []\n\n",
    b'data: {"choices":[7]}\n\n',
    b'data: {"choices":[{"delta":[1]}]}\n\n',
    b"data: " + b"[" * 60_000 + b"\n\n",
    b"data: " + b"x" * (3 << 20) + b"\n\n",
    *(TOKEN % b',"usage":{"completion_tokens":%s}' % n for n in (b"1e999", b"-5", b"9" * 400, b"9" * 5000)),
]


@pytest.fixture
def strange() -> Iterator[tuple[int, dict[str, bytes]]]:
    """The port of a server of somebody else, and what it answers on each path."""
    answers = {"/v1/models": b'{"data":[{"id":"m"}]}', "/v1/chat/completions": TOKEN % b""}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = answers.get(self.path, b"{}")
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_GET

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever)
    thread.start()
    yield server.server_port, answers
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize("frames", NO_CHUNKS, ids=lambda raw: raw[:60].decode())
def test_an_answer_that_is_no_chat_is_a_failed_request(strange: tuple[int, dict[str, bytes]], frames: bytes) -> None:
    port, answers = strange
    answers["/v1/chat/completions"] = frames
    status, out, err = _smoke(port, "--slo", "tok_s=1", "--levels", "1")
    assert status == 52 and "3 of 3 requests failed" in out and "no stream of a chat's chunks" in out, out + err


def test_a_server_of_somebody_else_steers_nothing(strange: tuple[int, dict[str, bytes]]) -> None:
    port, answers = strange
    memory = b'airlock_gpu_memory_bytes{gpu="0",uuid="%s",of="peak"} %s\n'
    answers |= {"/metrics": memory % (b"G", b"9" * 5000) + memory % (b"G\x1b[31m", b"5") + memory % (b"GPU-1", b"5"), "/v1/metadata": b"[" * 60_000}
    status, out, err = _smoke(port, "--levels", "1", "--url", f"http://127.0.0.1:{port}/v1/")  # as OpenAI's clients want it
    assert status == 0 and "GPU GPU-1: peak" in out and "\x1b" not in out + err, out + err
    for models in (b"[" * 60_000, b"7", b'{"data":[{"id":[1]}]}', b'{"data":[{"id":"\\u001b[31m"}]}', b'{"data":[{"id":"\\ud800"}]}'):
        answers["/v1/models"] = models
        status, _, err = _smoke(port)
        assert status == 6 and "names no model" in err, err
