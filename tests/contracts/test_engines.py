"""Every engine behind the front: vLLM's scripted engine and the strict stand-ins of trtllm-serve and SGLang, started as their adapters say.

Routes, names, keys, error shapes, streams, drains, deaths of each process, restarts and what a hostile engine leaves behind (nothing).
"""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT, find_port
from tests.contracts import fronts

pytestmark = pytest.mark.server

FAKES = ROOT / "tests" / "fakes" / "engines"
PROGRAMS = {"tensorrt_llm": ("trtllm-serve", "trtllm_serve.py"), "sglang": ("python3", "sglang.py")}
NAMES = ("meta/llama:1", "short")
CHAT = fronts.CHAT | {"model": NAMES[0]}
DRIVER = """
import json, logging, sys
from pathlib import Path
from artifact.errors import AirlockError
from artifact.profile import Pin, Profile
from runtime import engines, serve
from runtime.settings import from_environment
logging.basicConfig(level="INFO")
args = json.loads(sys.argv[1])
folder = Path(args["folder"])
settings = from_environment(args["env"], "meta/llama:1")
engine = engines.load(args["tags"]["llm_engine"])
profile = Profile("ab" * 32, args["tags"], Pin("meta/llama", "sha256:" + "1" * 64), options=args["options"])
more = {"engine_log": folder / "engine.log", "backoff_s": 0.1, **args["front"]}
front = serve.ServeSettings("127.0.0.1", args["port"], settings.names, profile.id, "", "", **more)
try:
    key = "key-of-the-engine-" + "x" * 30
    plan = engine.plan(engines.Start(profile, folder / "model", folder / "private", settings, engine.find(settings), key=key))
    sys.exit(serve.run(front, plan))
except AirlockError as e:
    print(json.dumps(e.as_dict()), flush=True)
    sys.exit(36)
"""


@dataclass
class Served(fronts.Served):
    """A front with an engine behind it, and the processes of that engine that were seen."""

    model: str = NAMES[0]
    seen: set[int] = field(default_factory=set)

    def ready(self) -> bool:
        """Whether it takes requests now; remembers the processes of the engine."""
        self.seen |= set(descendants(self.process.pid))
        return super().ready()

    def end(self, seconds: float = 30) -> tuple[int, dict[str, Any]]:
        """The status, and the error that was printed, of a front that ends by itself."""
        status = self.process.wait(seconds)
        assert self.process.stdout
        lines = [line for line in self.process.stdout.read().splitlines() if line.startswith("{")]
        return status, json.loads(lines[-1]) if lines else {}

    def gone(self) -> bool:
        """Whether none of the engine's processes that were seen lives."""
        return not any(alive(pid) for pid in self.seen)


def descendants(pid: int) -> list[int]:
    """The processes under one."""
    try:
        own = [int(c) for c in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []
    return own + [g for c in own for g in descendants(c)]


def alive(pid: int) -> bool:
    """Whether a process runs, zombies not counted."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (OSError, IndexError):
        return False


def find(served: Served, words: bytes) -> int:
    """The one process of the engine with these words in its command line, the guardian left out."""
    found = []
    for pid in descendants(served.process.pid):
        line = Path(f"/proc/{pid}/cmdline").read_bytes()
        if words in line and (b"guardian.py" in line) == (words == b"guardian.py"):
            found.append(pid)
    assert len(found) == 1, found
    return found[0]


Serve = Callable[..., Served]


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    """A function that starts a front over a stand-in; at the end nothing of it may live."""
    running: list[Served] = []

    def start(engine: str, script: dict[str, Any] | None = None, *, wait: bool = True, **more: Any) -> Served:
        program, file = PROGRAMS[engine]
        root = tmp_path / "env"
        (root / "bin").mkdir(parents=True, exist_ok=True)
        (root / "bin" / program).write_text(f'#!/bin/sh\nexec {sys.executable} {FAKES / file} {root} "$@"\n')
        (root / "bin" / program).chmod(0o755)
        (root / "lib" / "python3.12" / "site-packages" / f"{engine}-1.2.1.dist-info").mkdir(parents=True, exist_ok=True)
        (root / "script.json").write_text(json.dumps({"record": str(tmp_path / "record"), **(script or {})}))
        (tmp_path / "model").mkdir(exist_ok=True)
        for name, text in ({"config.json": "{}"} | more.pop("files", {})).items():
            (tmp_path / "model" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "model" / name).write_text(text)
        tags = {"llm_engine": engine, "precision": "bf16", "tp": "1", "trtllm_buildable": "true", **more.pop("tags", {})}
        env = {f"AIRLOCK_ENGINE_{engine.upper()}": str(root), "NIM_SERVED_MODEL_NAME": ",".join(NAMES), "PATH": os.environ["PATH"]}
        port = find_port()
        args = {
            "folder": str(tmp_path),
            "port": port,
            "tags": tags,
            "env": env | more.pop("env", {}),
            "options": more.pop("options", {}),
            "front": more,
        }
        (tmp_path / "private").mkdir(exist_ok=True)
        driver = [sys.executable, "-c", DRIVER, json.dumps(args)]
        with (tmp_path / "front.log").open("wb") as out:
            served = Served(port, subprocess.Popen(driver, cwd=ROOT, stdout=subprocess.PIPE, stderr=out, text=True), tmp_path)
        running.append(served)
        if wait:
            served.wait(served.ready)
        return served

    yield start
    for served in running:
        served.seen |= set(descendants(served.process.pid))
        if served.process.poll() is None:
            served.process.send_signal(signal.SIGTERM)
            assert served.process.wait(30) == 0
        end = time.monotonic() + 20
        while not served.gone():
            assert time.monotonic() < end, [Path(f"/proc/{p}/cmdline").read_bytes() for p in served.seen if alive(p)]
            time.sleep(0.02)


@pytest.mark.parametrize("engine", PROGRAMS)
class TestEachEngine:
    """What holds whatever the engine is."""

    def test_it_answers_under_every_name_and_is_told_its_own(self, engine: str, serve: Serve) -> None:
        served = serve(engine)
        for name in NAMES:
            status, answer, _ = served.ask("POST", "/v1/chat/completions", {**CHAT, "model": name})
            assert status == 200 and answer["model"] == name and answer["choices"][0]["message"]["content"] == "The answer is forty-two."
            frames = served.stream(model=name).decode()
            assert frames.endswith("data: [DONE]\n\n") and frames.count(f'"model": "{name}"') == 6, frames
        own = {"tensorrt_llm": "meta-llama-1", "sglang": "meta/llama-1"}[engine]
        assert {r["body"]["model"] for r in served.records()} == {own}
        status, listed, _ = served.ask("GET", "/v1/models")
        assert status == 200 and [m["id"] for m in listed["data"]] == list(NAMES) and str(served.folder) not in json.dumps(listed)
        assert served.ask("POST", "/v1/chat/completions", {**CHAT, "model": "other"})[0] == 404

    def test_its_errors_have_the_one_shape(self, engine: str, serve: Serve) -> None:
        served = serve(engine)
        status, body, _ = served.ask("POST", "/v1/chat/completions", {"model": NAMES[0]})
        assert status == 400 and body["error"]["code"] == 400 and body["message"] and str(served.folder) not in json.dumps(body)

    def test_dangerous_routes_are_not_reached(self, engine: str, serve: Serve) -> None:
        served = serve(engine)
        for path in ("/update_weights", "/release_memory", "/flush_cache", "/load_lora_adapter", "/invocations", "/generate", "//v1/../flush_cache"):
            assert served.ask("POST", path, {})[0] in (404, 405)
        assert served.records() == []

    def test_its_figures_are_on_our_page_and_its_queue_is_not_drained(self, engine: str, serve: Serve) -> None:
        served = serve(engine)
        status, text, _ = served.ask("GET", "/v1/metrics")
        words = {"tensorrt_llm": "trtllm_request_success_total 1", "sglang": "sglang:num_running_reqs 0"}[engine]
        assert status == 200 and words in text and "airlock_engine_ready 1" in text
        assert served.records() == []

    def test_nobody_else_gets_in_and_the_key_is_nowhere_to_be_read(self, engine: str, serve: Serve) -> None:
        served = serve(engine)
        pids = descendants(served.process.pid)
        for pid in pids:
            for name in ("cmdline", "environ"):
                assert b"key-of-the-engine" not in Path(f"/proc/{pid}/{name}").read_bytes()
        assert "key-of-the-engine" not in served.log()
        port = next(int(line.split()[1].rpartition(":")[2], 16) for line in _listening(pids))
        with socket.create_connection(("127.0.0.1", port), 2):
            pass
        if engine == "sglang":
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
            connection.request("POST", "/generate", "{}")
            assert connection.getresponse().status == 401 and "[key]" in (served.folder / "engine.log").read_text()
            assert [p.stat().st_mode & 0o777 for p in (served.folder / "private").glob("*.yaml")] == [0o600]

    def test_loading_takes_its_time(self, engine: str, serve: Serve) -> None:
        served = serve(engine, {"load_s": 1.0}, wait=False)
        served.wait(lambda: _live(served))
        assert not served.ready()
        served.wait(served.ready)

    def test_a_stop_finishes_running_streams(self, engine: str, serve: Serve) -> None:
        served = serve(engine, {"frames": 20, "frame_s": 0.05})
        connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=20)
        connection.request("POST", "/v1/chat/completions", json.dumps({**CHAT, "stream": True}))
        answer = connection.getresponse()
        first = answer.read1(64)
        served.process.send_signal(signal.SIGTERM)
        assert (first + answer.read()).endswith(b"data: [DONE]\n\n")
        assert served.process.wait(20) == 0

    def test_a_stop_that_is_not_followed_is_bounded(self, engine: str, serve: Serve) -> None:
        served = serve(engine, {"ignore_term": True, "frames": 1000, "frame_s": 0.05}, drain_s=0.5, stop_s=0.5)
        connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=20)
        connection.request("POST", "/v1/chat/completions", json.dumps({**CHAT, "stream": True}))
        answer = connection.getresponse()
        answer.read1(64)
        began = time.monotonic()
        served.process.send_signal(signal.SIGTERM)
        rest = answer.read()
        assert served.process.wait(20) == 0 and time.monotonic() - began < 20  # the stream alone would last 50 s
        assert b"data: [DONE]" not in rest and b'"error"' in rest

    def test_its_process_killed_mid_stream_is_told_and_it_comes_back_elsewhere(self, engine: str, serve: Serve) -> None:
        served = serve(engine, {"die_after": 3})
        before = set(descendants(served.process.pid))
        text = served.stream()
        assert text.count(b"data: {") == 4 and b"[DONE]" not in text and b"the engine ended during the answer" in text
        served.wait(lambda: not before & set(descendants(served.process.pid)))
        served.wait(served.ready)
        assert "airlock_engine_restarts_total 1" in served.ask("GET", "/metrics")[1]

    def test_a_runtime_killed_leaves_nothing(self, engine: str, serve: Serve, tmp_path: Path) -> None:
        served = serve(engine, {"child": str(tmp_path / "child"), "ignore_term": True})
        served.seen |= {int((tmp_path / "child").read_text()), *descendants(served.process.pid)}
        served.process.kill()
        served.process.wait()
        end = time.monotonic() + 2  # as docs/operations.md says
        while not served.gone():
            assert time.monotonic() < end
            time.sleep(0.02)
        served.process = subprocess.Popen(["/bin/true"], text=True)
        served.process.wait()

    def test_a_child_that_hides_dies_with_the_engine(self, engine: str, serve: Serve, tmp_path: Path) -> None:
        served = serve(engine, {"child": str(tmp_path / "child")})
        child = int((tmp_path / "child").read_text())
        assert alive(child) and os.getsid(child) == child
        served.process.send_signal(signal.SIGTERM)
        assert served.process.wait(20) == 0 and not alive(child)

    def test_a_stalled_stream_ends_with_an_error(self, engine: str, serve: Serve) -> None:
        served = serve(engine, {"stall_after": 2}, idle_s=0.5)
        text = served.stream()
        assert b"the engine sent nothing for" in text and b"[DONE]" not in text
        assert served.ask("POST", "/v1/chat/completions", CHAT)[0] == 200  # the others go on

    def test_garbage_is_no_health(self, engine: str, serve: Serve) -> None:
        status, error = serve(engine, {"garbage": True}, wait=False, ready_s=2.0).end()
        assert status == 36 and error["reason"] == "engine_failed" and "start_timeout" in error["what"]

    def test_one_that_never_gets_ready_is_ended_with_its_children(self, engine: str, serve: Serve, tmp_path: Path) -> None:
        served = serve(engine, {"load_s": 600, "child": str(tmp_path / "child")}, wait=False, ready_s=5.0)
        served.wait((tmp_path / "child").exists)
        served.seen |= set(descendants(served.process.pid))
        status, error = served.end()
        assert status == 36 and "was not ready within 5 s" in error["what"]
        assert served.gone() and not alive(int((tmp_path / "child").read_text()))

    def test_a_flood_of_log_hinders_nobody(self, engine: str, serve: Serve) -> None:
        served = serve(engine, {"flood_s": 2.0}, wait=False)
        served.wait(lambda: _live(served))
        worst = 0.0
        while not served.ready():
            began = time.monotonic()
            assert served.ask("GET", "/v1/health/live")[0] == 200
            worst = max(worst, time.monotonic() - began)
        memory = int(Path(f"/proc/{served.process.pid}/statm").read_text().split()[1]) * 4096
        assert worst < 1.0 and memory < 300 << 20 and (served.folder / "engine.log").stat().st_size < 80 << 20

    def test_a_flood_of_log_does_not_hold_up_a_stream(self, engine: str, serve: Serve) -> None:
        served = serve(engine, {"chatter_s": 600, "frames": 200, "frame_s": 0.005})
        began = time.monotonic()
        text = served.stream()
        assert text.endswith(b"data: [DONE]\n\n") and text.count(b"data: {") == 200
        assert time.monotonic() - began < 60  # 1 s of pauses, 600 s of log; each of 400 writes waits for at most a few reads of the log
        files = sorted(p.stat().st_size for p in served.folder.glob("engine.log*"))
        assert len(files) <= 2 and sum(files) < 200 << 20

    def test_a_sick_engine_is_started_again(self, engine: str, serve: Serve, tmp_path: Path) -> None:
        served = serve(engine, {"unhealthy": str(tmp_path / "sick")})
        before = set(descendants(served.process.pid))
        (tmp_path / "sick").write_text("")
        served.wait(lambda: not before & set(descendants(served.process.pid)))
        (tmp_path / "sick").unlink()
        served.wait(served.ready)

    def test_a_start_that_fails_twice_is_tried_again(self, engine: str, serve: Serve, tmp_path: Path) -> None:
        (tmp_path / "left").write_text("2")
        serve(engine, {"fail_times": str(tmp_path / "left")})

    @pytest.mark.parametrize(
        ("log", "kind"),
        [
            ("ValueError: No GPU devices found on the node", "no_gpu"),
            ("RuntimeError: Not enough memory. Please try to increase --mem-fraction-static.", "does_not_fit"),
            ("torch.OutOfMemoryError: CUDA out of memory.", "does_not_fit"),
            ("(The engine plan file is not compatible with this version of TensorRT, expecting library version", "wrong_engine"),
            ("Please pass the argument `trust_remote_code=True` to allow custom code to be run.", "needs_code"),
        ],
    )
    def test_a_failed_start_is_classified_and_not_tried_again(self, engine: str, log: str, kind: str, serve: Serve) -> None:
        status, error = serve(engine, {"start_log": log, "start_rc": 1}, wait=False).end()
        assert status == 36 and f"({kind})" in error["what"] and log in error["what"]

    def test_an_option_that_it_does_not_know_is_told(self, engine: str, serve: Serve) -> None:
        env, words = {
            "tensorrt_llm": ({"NIM_TOOL_CALL_PARSER": "nosuch"}, "Invalid value for '--tool_parser'"),
            "sglang": ({"NIM_PASSTHROUGH_ARGS": "--page-size large"}, "argument --page-size: invalid int value"),
        }[engine]
        status, error = serve(engine, wait=False, env=env).end()
        assert status == 36 and "bad_config" in error["what"] and words in error["what"]


def _live(served: Served) -> bool:
    try:
        return served.ask("GET", "/v1/health/live")[0] == 200
    except OSError:
        return False


def _listening(pids: list[int]) -> list[str]:
    inodes = set()
    for pid in pids:
        for link in Path(f"/proc/{pid}/fd").iterdir():
            name = os.readlink(link) if link.is_symlink() else ""
            if name.startswith("socket:["):
                inodes.add(name[8:-1])
    return [line for line in Path("/proc/net/tcp").read_text().splitlines()[1:] if line.split()[9] in inodes and line.split()[3] == "0A"]


def test_a_prebuilt_engine_is_served_by_its_backend(serve: Serve) -> None:
    config = json.dumps({"version": "1.2.1", "pretrained_config": {"mapping": {"world_size": 1}}})
    served = serve("tensorrt_llm", files={"trtllm_engine/config.json": config, "trtllm_engine/rank0.engine": "x"})
    argv = Path(f"/proc/{find(served, b'trtllm_serve.py')}/cmdline").read_bytes().split(b"\0")
    assert argv[argv.index(b"--backend") + 1] == b"tensorrt"


@pytest.mark.parametrize(
    ("engine", "words", "kind"),
    [
        ("tensorrt_llm", b"trtllm_serve.py", "oom_kill"),
        ("sglang", b"sglang.launch_server", "oom_kill"),
        ("sglang", b"sglang::scheduler", "engine_died"),
        ("sglang", b"guardian.py", "oom_kill"),
    ],
)
def test_a_process_of_it_killed_is_classified_and_it_comes_back(engine: str, words: bytes, kind: str, serve: Serve) -> None:
    served = serve(engine)
    before = set(descendants(served.process.pid))
    os.kill(find(served, words), signal.SIGKILL)
    served.wait(lambda: not any(map(alive, before)))
    served.wait(served.ready)
    assert f"engine ended ({kind})" in (served.folder / "front.log").read_text()
    assert served.ask("POST", "/v1/chat/completions", CHAT)[0] == 200


def test_embeddings_of_sglang(serve: Serve) -> None:
    served = serve("sglang", options={"task": "embed"})
    status, answer, _ = served.ask("POST", "/v1/embeddings", {"model": "short", "input": ["a", "b"]})
    assert status == 200 and len(answer["data"]) == 2 and answer["model"] == "short"


@pytest.mark.parametrize("engine", PROGRAMS)
def test_adapters_are_models_of_their_own(engine: str, serve: Serve, tmp_path: Path) -> None:
    (tmp_path / "peft" / "sql").mkdir(parents=True)
    (tmp_path / "peft" / "sql" / "adapter_config.json").write_text('{"r": 8}')
    (tmp_path / "peft" / "sql" / "adapter_model.safetensors").write_text("")
    env = {"NIM_PEFT_SOURCE": str(tmp_path / "peft"), "AIRLOCK_ALLOW_UNSIGNED": "our own adapter"}
    served = serve(engine, tags={"feat_lora": "true"}, env=env)
    status, answer, _ = served.ask("POST", "/v1/chat/completions", {**CHAT, "model": "sql"})
    body = served.records()[-1]["body"]
    own = {"lora_name": "sql", "lora_int_id": 1, "lora_path": str(tmp_path / "peft" / "sql")}
    assert body.get("lora_path") == "sql" if engine == "sglang" else body["lora_request"] == own
    assert status == 200 and answer["model"] == "sql" and str(tmp_path) not in json.dumps(answer)
    for given in ({"lora_request": {**own, "lora_path": "/etc"}}, {"lora_path": "/etc"}):  # a caller names no path
        assert served.ask("POST", "/v1/chat/completions", {**CHAT, **given})[0] == 400 and len(served.records()) == 1
    listed = served.ask("GET", "/v1/models")[1]["data"]
    assert [(m["id"], m["parent"]) for m in listed] == [(NAMES[0], None), ("short", None), ("sql", NAMES[0])]
    assert [m["id"] for m in listed if m["root"] == m["id"]] == [NAMES[0]]  # the operator's way to the base model's name
