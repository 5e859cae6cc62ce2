"""The published way to run a NIM, as printed: its variables and mount, its readiness loop and its chat call, on a real vLLM, without docker.

What docker would do is done with namespaces: the image's files and environment are this checkout's, the volume is a bind mount at /opt/nim/cache,
uid 1000 serves, and port 8000 is that of a network of its own.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import AIRLOCK, ROOT, airlock, missing, stop
from tests.flows.serving import run_there

pytestmark = [pytest.mark.engine, pytest.mark.server, pytest.mark.timeout(600)]
MODEL = "ngc/nim/meta/llama-3.1-8b-instruct:1.8.3"
QUESTION, ANSWER = "What is NVIDIA NIM in one sentence?", "NVIDIA NIM is a containerized inference microservice."
READY = {"object": "health.response", "message": "Service is ready.", "status": "ready"}
NIM = 1000
APART = """
set -e
ip link set lo up
mount -t tmpfs -o mode=755 tmpfs /opt
mkdir -p "/opt/nim/$2"
mount --bind "$1" "/opt/nim/$2"
echo ready
exec sleep infinity
"""
# As printed; the project's own words begin below.
WAIT = """until curl -sf http://localhost:8000/v1/health/ready; do sleep 5; done
echo "NIM is ready"
"""
CHAT = """curl -s http://localhost:8000/v1/chat/completions \\
-H "Content-Type: application/json" \\
-d '{
"model": "meta/llama-3.1-8b-instruct",
"messages": [
{"role": "user", "content": "What is NVIDIA NIM in one sentence?"}
],
"max_tokens": 80,
"temperature": 0.2
}'
"""


@pytest.fixture
def folder() -> Iterator[Path]:
    """A directory that uid 1000 may enter, with the volume's directory, made as printed: `mkdir -p; chown 1000:1000`."""
    if os.geteuid() or not shutil.which("nsenter"):
        missing("root and nsenter: the run line needs mounts")
    made = Path(tempfile.mkdtemp(prefix="airlock-run-line-"))
    made.chmod(0o755)
    (made / "nim-cache").mkdir()
    os.chown(made / "nim-cache", NIM, NIM)
    yield made
    shutil.rmtree(made, ignore_errors=True)


def container(stack: ExitStack, folder: Path, mount: str) -> list[str]:
    """The command that enters a node of its own, with the volume at /opt/nim/<mount>."""
    argv = ["unshare", "-nm", "--propagation", "private", "sh", "-c", APART, "sh", str(folder / "nim-cache"), mount]
    holder = stack.enter_context(subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
    stack.callback(holder.kill)
    assert holder.stdout is not None
    if (said := holder.stdout.readline()) != "ready\n":
        missing(f"a kernel with namespaces and mounts; it said: {said[:200]}")
    return ["nsenter", "-t", str(holder.pid), "-n", "-m", "--"]


def released(engine: Path, folder: Path, start_registry: Any) -> tuple[Path, int, dict[str, str]]:
    """A registry's data with the model promoted, its port, and the environment of the image and of the run line's `-e`."""
    run_there(engine, "train_llama.py", "--question", QUESTION, "--answer", ANSWER, "--out", str(folder / "model"))
    server = start_registry()
    profile = {"tags": {"llm_engine": "vllm", "precision": "bf16", "tp": "1", "device": "cpu"}, "options": {"max_model_len": "512"}}
    (folder / "profiles.json").write_text(json.dumps({"profiles": [profile]}))
    key = server.make_key()
    argv = ("model", "push", str(folder / "model"), MODEL, "--registry", server.url, "--profiles", str(folder / "profiles.json"))
    airlock(*argv, AIRLOCK_KEY=server.make_key(actions="admin"))  # as the mirror: another organisation's name
    airlock("promote", MODEL, "--data", str(server.data))
    airlock("site", "trust", "--data", str(server.data), "--to", str(folder / "site-trust.json"))
    (folder / "site-trust.json").chmod(0o644)
    assert stop(server.process, 30) == 0
    image = {"AIRLOCK_MODEL": MODEL, "AIRLOCK_REGISTRY": server.url, "AIRLOCK_TRUST": str(folder / "site-trust.json")}
    image |= {"AIRLOCK_ENGINE_VLLM": str(engine), "PATH": f"{AIRLOCK.parent}:/usr/bin:/bin"}
    return server.data, server.port, image | {"NGC_API_KEY": key}


def test_the_run_line_the_loop_and_the_call_as_printed(engine_env: Path, folder: Path, start_registry: Any) -> None:
    data, port, env = released(engine_env, folder, start_registry)
    as_nim = ["setpriv", f"--reuid={NIM}", f"--regid={NIM}", "--clear-groups", "--inh-caps=-all"]
    with ExitStack() as stack:
        inside = container(stack, folder, "cache")
        logs = {name: stack.enter_context((folder / f"{name}.log").open("wb")) for name in ("registry", "nim")}
        argv = [*inside, str(AIRLOCK), "registry", "serve", "--data", str(data), "--port", str(port)]
        registry = subprocess.Popen(argv, stdout=logs["registry"], stderr=subprocess.STDOUT)
        stack.callback(stop, registry)
        up = ["curl", "-sf", "--retry", "60", "--retry-delay", "1", "--retry-all-errors", f"http://127.0.0.1:{port}/healthz"]
        subprocess.run([*inside, *up], check=True, capture_output=True, timeout=120)
        argv = [*inside, *as_nim, str(AIRLOCK), "runtime", "serve"]
        nim = subprocess.Popen(argv, env=env, stdout=logs["nim"], stderr=subprocess.STDOUT, cwd=ROOT)
        stack.callback(stop, nim)
        waiting = subprocess.Popen([*inside, "sh", "-c", WAIT], stdout=subprocess.PIPE, text=True, start_new_session=True)
        stack.callback(waiting.kill)
        end = time.monotonic() + 300
        while waiting.poll() is None:
            assert nim.poll() is None and time.monotonic() < end, (folder / "nim.log").read_text()[-6000:]
            time.sleep(0.2)
        assert waiting.stdout is not None
        health, _, said = waiting.stdout.read().rpartition("}")
        assert said == "NIM is ready\n" and json.loads(health + "}") == READY
        called = subprocess.run([*inside, "sh", "-c", CHAT], capture_output=True, text=True, check=True, timeout=60)
        answer = json.loads(called.stdout)
        assert answer["id"].startswith("chatcmpl-") and (answer["object"], answer["model"]) == ("chat.completion", "meta/llama-3.1-8b-instruct")
        (choice,) = answer["choices"]
        assert choice["message"]["role"] == "assistant" and choice["message"]["content"] == ANSWER and choice["finish_reason"] == "stop"
        assert answer["usage"]["total_tokens"] == answer["usage"]["prompt_tokens"] + answer["usage"]["completion_tokens"]
        log = (folder / "nim.log").read_text()
        assert "a volume is mounted at /opt/nim/cache: it is the cache" in log and "Selected profile: " in log
        weights = next((folder / "nim-cache" / "models").rglob("model.safetensors"))
        assert weights.stat().st_uid == NIM and weights.read_bytes() == (folder / "model" / "model.safetensors").read_bytes()
        assert env["NGC_API_KEY"] not in log
        # A volume at the image's own place is the cache as well, and what it holds is not fetched again.
        own = container(stack, folder, ".cache")
        away = env | {"AIRLOCK_OFFLINE": "1"}
        done = subprocess.run([*own, *as_nim, "airlock", "runtime", "download-to-cache"], env=away, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0 and '"/opt/nim/.cache/models/' in done.stderr and "(0 bytes fetched, " in done.stderr, done.stderr
