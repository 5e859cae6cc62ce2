"""A front over a scripted engine, both real processes: how the tests of the front start, ask and end them."""

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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.conftest import ROOT, find_port

FAKE = ROOT / "tests" / "fakes" / "engine.py"
MODEL = "/srv/private/place/of/weights"
SECRET = "airlock-key-that-must-not-travel"
DRIVER = """
import json, logging, sys
from pathlib import Path
from artifact.errors import AirlockError
from runtime import serve
from runtime.bounds import Limits
from runtime.launch import Launch
logging.basicConfig(level="INFO")
args = json.loads(sys.argv[1])
more = dict(args["settings"])
limits = more.pop("limits", {})
more["license"] = ("LICENSE", more.pop("licence").encode()) if "licence" in more else ("", b"")
sock = Path(args["socket"])
settings = serve.ServeSettings("127.0.0.1", args["port"], tuple(args["names"]), "ab" * 32, "sha256:" + "0" * 64, "sha256:" + "1" * 64,
    engine_log=Path(args["log"]), backoff_s=0.1, limits=Limits(**limits), **more)
try:
    launch = Launch(tuple(args["argv"]), {"PATH": "/usr/bin:/bin", "FAKE_ONLY": "1"}, "/health", sock, args.get("engine", "vllm"))
    sys.exit(serve.run(settings, launch))
except AirlockError as e:
    print(json.dumps(e.as_dict()), flush=True)
    sys.exit(36)
"""


@dataclass
class Served:
    """A running front: port, process, and the files of the engine behind it."""

    port: int
    process: subprocess.Popen[str]
    folder: Path
    model: str = "acme/tiny"

    def ask(self, method: str, path: str, body: object = None, raw: bytes | None = None, key: str = SECRET) -> tuple[int, Any, dict[str, str]]:
        """One request, its status, its JSON (or text) and headers."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        data = raw if raw is not None else json.dumps(body).encode() if body is not None else None
        connection.request(method, path, data, {"Authorization": f"Bearer {key}", "Cookie": "a=b"})
        answer = connection.getresponse()
        text = answer.read()
        connection.close()
        try:
            return answer.status, json.loads(text), dict(answer.getheaders())
        except ValueError:
            return answer.status, text.decode(), dict(answer.getheaders())

    def ready(self) -> bool:
        """Whether /v1/health/ready is 200."""
        try:
            return self.ask("GET", "/v1/health/ready")[0] == 200
        except OSError:
            return False

    def wait(self, wanted: Callable[[], bool], seconds: float = 20) -> None:
        """Polls until `wanted` holds."""
        end = time.monotonic() + seconds
        while not wanted():
            assert self.process.poll() is None, (self.process.stdout and self.process.stdout.read(), self.log())
            assert time.monotonic() < end, (f"not within {seconds} s", self.log())
            time.sleep(0.02)

    def log(self) -> str:
        """What the engine printed."""
        path = self.folder / "engine.log"
        return path.read_text(errors="replace")[-4000:] if path.exists() else ""

    def records(self) -> list[dict[str, Any]]:
        """The requests that reached the engine."""
        path = self.folder / "record"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def client(self) -> openai.OpenAI:
        """The unmodified SDK, without retries."""
        return openai.OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key="none", max_retries=0)

    def stream(self, **more: object) -> bytes:
        """A chat stream's bytes as they came."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        connection.request("POST", "/v1/chat/completions", json.dumps({**CHAT, "model": self.model, "stream": True, **more}))
        return connection.getresponse().read()


CHAT = {"model": "acme/tiny", "messages": [{"role": "user", "content": "hi"}]}
Serve = Callable[..., Served]


class Fronts:
    """Starts fronts with folders under one directory, and ends them all."""

    def __init__(self, place: Path) -> None:
        self._place = place
        self._running: list[Served] = []

    def start(self, *flags: str, wait: bool = True, names: tuple[str, ...] = ("acme/tiny",), engine: str = "vllm", **settings: object) -> Served:
        """A front with a scripted engine; waits until it is ready."""
        port = find_port()
        folder = self._place / str(port)
        folder.mkdir()
        sock = str(folder / "e.sock")
        argv = [
            sys.executable,
            str(FAKE),
            "serve",
            MODEL,
            "--served-model-name",
            *names,
            "--uds",
            sock,
            "--fake-record",
            str(folder / "record"),
            *flags,
        ]
        args = {"socket": sock, "port": port, "names": names, "log": str(folder / "engine.log"), "argv": argv, "settings": settings, "engine": engine}
        env = {**os.environ, "NGC_API_KEY": SECRET}
        process = subprocess.Popen([sys.executable, "-c", DRIVER, json.dumps(args)], cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True)
        served = Served(port, process, folder)
        self._running.append(served)
        served.wait(served.ready if wait else lambda: _listens(port))
        return served

    def stop(self) -> None:
        """Ends them as an operator does; one that does not end is killed, and told."""
        for served in self._running:
            if served.process.poll() is None:
                served.process.send_signal(signal.SIGTERM)
                try:
                    served.process.wait(15)
                except subprocess.TimeoutExpired:
                    served.process.kill()
                    served.process.wait()
                    raise


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    """A function that starts a front of one test."""
    fronts = Fronts(tmp_path)
    yield fronts.start
    fronts.stop()


def _listens(port: int) -> bool:
    with socket.socket() as s:
        return s.connect_ex(("127.0.0.1", port)) == 0


def in_both_shapes(body: Any, code: int) -> None:
    """An error body that OpenAI's and NIM's clients read."""
    assert body["object"] == "error" and body["code"] == code and body["error"]["code"] == code and body["message"] == body["error"]["message"], body
