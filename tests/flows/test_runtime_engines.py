"""`airlock runtime` with engines that are installed and those that are not: the choice, its reasons, and a whole start with SGLang's stand-in."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT, need_root
from tests.flows.test_runtime_cache import Node, node

__all__ = ["node"]
pytestmark = pytest.mark.server

STAND_IN = ROOT / "tests" / "fakes" / "engines" / "sglang.py"


@pytest.fixture
def several(node: Node, tmp_path: Path) -> Node:
    """One profile for each engine, and SGLang alone installed."""
    node.profiles = [{"tags": {"llm_engine": e, "precision": "bf16", "tp": "1", "device": "cpu"}} for e in ("tensorrt_llm", "vllm", "sglang")]
    node.publish()
    root = tmp_path / "sglang"
    (root / "bin").mkdir(parents=True)
    (root / "bin" / "python3").write_text(f'#!/bin/sh\nexec {sys.executable} {STAND_IN} {root} "$@"\n')
    (root / "bin" / "python3").chmod(0o755)
    node.env.pop("AIRLOCK_ENGINE_VLLM")
    node.env["AIRLOCK_ENGINE_SGLANG"] = str(root)
    return node


def ask(port: str, path: str, body: object = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    with urllib.request.urlopen(urllib.request.Request(f"http://127.0.0.1:{port}{path}", data), timeout=10) as answer:
        return json.load(answer)


def test_the_engine_that_is_installed_is_chosen_started_and_ended(several: Node) -> None:
    port = several.env["NIM_HTTP_API_PORT"]
    process = subprocess.Popen(several.command("serve"), env=several.env, stderr=subprocess.PIPE, text=True)
    try:
        end = time.monotonic() + 40
        while True:
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < end
            try:
                ask(port, "/v1/health/ready")
                break
            except OSError:
                time.sleep(0.1)
        chat = {"model": "acme/tiny", "messages": [{"role": "user", "content": "hi"}]}
        assert ask(port, "/v1/chat/completions", chat)["choices"][0]["message"]["content"] == "The answer is forty-two."
    finally:
        process.send_signal(signal.SIGTERM)
        _, text = process.communicate(timeout=30)
    assert process.returncode == 0, text
    assert "Selected profile:" in text and "(sglang-cpu-bf16-tp1)" in text
    assert "its engine vllm cannot be started here: AIRLOCK_ENGINE_VLLM is not set" in text
    assert "its engine tensorrt_llm cannot be started here: AIRLOCK_ENGINE_TENSORRT_LLM is not set" in text


def test_without_any_engine_the_start_is_refused_with_each_reason_and_weights_can_still_be_fetched(several: Node) -> None:
    several.env["AIRLOCK_ENGINE_SGLANG"] = "/nonexistent"
    refused = several.run("serve")
    assert refused.returncode == 30, refused.stderr
    assert "its engine sglang cannot be started here: there is no sglang at /nonexistent/bin/python3" in refused.stderr
    fetched = several.run("download-to-cache")
    assert fetched.returncode == 0 and several.model_digest in fetched.stdout, fetched.stderr


@pytest.fixture
def of_1000(node: Node) -> Iterator[Node]:
    """The node's files where uid 1000 reads them: below pytest's own no other user gets."""
    need_root()
    folder = Path(tempfile.mkdtemp(prefix="airlock-node-", dir="/var/tmp"))
    shutil.copytree(node.folder, folder, dirs_exist_ok=True)
    for path in (folder, *folder.rglob("*")):
        os.chown(path, 1000, 1000)
    old = str(node.folder)
    node.env = {k: v.replace(old, str(folder)) for k, v in node.env.items()} | {"TMPDIR": str(folder)}
    node.folder = folder
    yield node
    shutil.rmtree(folder)


def test_an_argument_that_may_not_pass_is_told_before_anything_is_fetched(node: Node) -> None:
    done = node.run("serve", NIM_PASSTHROUGH_ARGS="--trust-remote-code")
    assert done.returncode == 6 and "may not be passed to vllm" in done.stderr, done.stderr
    assert "Preparing model workspace" not in done.stderr and not node.blob("model.safetensors").exists()


SPY = """#!/bin/sh
g=$(cut -d' ' -f4 /proc/$PPID/stat)
for p in $PPID $g; do tr '\\0' '\\n' < /proc/$p/environ | sed "s/^/saw: /"; done
echo "error: unrecognized arguments: --stand-in"
exit 2
"""


def test_an_engine_reads_no_key_in_the_processes_above_it(of_1000: Node) -> None:
    engine = Path(of_1000.env["AIRLOCK_ENGINE_VLLM"]) / "bin" / "vllm"
    engine.write_text(SPY)
    user: dict[str, Any] = {"user": 1000, "group": 1000, "extra_groups": []}
    done = subprocess.run(of_1000.command("serve"), env=of_1000.env, capture_output=True, text=True, timeout=60, cwd=ROOT, check=False, **user)
    assert done.returncode == 36 and "saw: HF_HUB_OFFLINE=1" in done.stderr, done.stderr  # the guardian's, which is the engine's own
    assert of_1000.env["NGC_API_KEY"] not in done.stderr and "saw: NGC_API_KEY" not in done.stderr
