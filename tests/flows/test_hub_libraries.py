"""transformers, sentence-transformers and vLLM, unmodified, by repository id over TLS: the real all-MiniLM weights from our door, what is asked."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT, find_port, stop
from tests.contracts.doors import Door, new_site, sha
from tests.flows.test_clients import contents
from tests.flows.test_clients import hf as dev_hf
from tests.operated import operated
from tests.services.clients import client

pytestmark = [pytest.mark.server, pytest.mark.engine, pytest.mark.full, pytest.mark.timeout(900)]
DRIVER = ROOT / "tests" / "fakes" / "hub_library.py"
REFERENCE = ROOT / "tests" / "fakes" / "minilm_reference.py"
REPO = "acme/all-MiniLM-L6-v2"
TEXTS = ("the cat sits on the mat", "a registry behind an air gap")
START_S = 400


@pytest.fixture(scope="module")
def minilm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("minilm") / "model"
    subprocess.run([sys.executable, str(ROOT / "tools" / "minilm.py"), str(folder)], check=True, timeout=300)
    return folder


@pytest.fixture(scope="module")
def door(tmp_path_factory: pytest.TempPathFactory, minilm: Path) -> Iterator[Door]:
    """A registry that was given the weights by `hf upload`."""
    data = tmp_path_factory.mktemp("libraries") / "data"
    with operated(data, new_site(data), AIRLOCK_TLS="self-signed") as found:
        given = {"HF_ENDPOINT": found.url, "HF_TOKEN": found.keys["acme"], "HF_HOME": str(data.parent / "up"), "SSL_CERT_FILE": authority(found)}
        given |= {"HF_HUB_DISABLE_UPDATE_CHECK": "1", "HF_HUB_DISABLE_XET": "1"}
        argv = [str(Path(sys.executable).parent / "hf"), "upload", REPO, str(minilm), "."]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=300, env={**os.environ, **given}, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        yield found


def authority(door: Door) -> str:
    return str(door.data / "tls" / "cert.pem")


def lines(door: Door) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in door.log.read_text().splitlines() if line.startswith("{")]
    return [e for e in found if e["log"] == "airlock.access"]


def environment(door: Door, home: Path, engine: Path, *paths: Path) -> dict[str, str]:
    """What a user of the gap sets (docs/operations.md), and where the engine's environment lies."""
    given = {"PATH": f"{engine / 'bin'}:/usr/bin:/bin", "HOME": str(home), "HF_HOME": str(home / "hf"), "HF_ENDPOINT": door.url}
    given |= {"HF_TOKEN": door.keys["acme"], "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "DISABLE_SAFETENSORS_CONVERSION": "1"}
    given |= {"SSL_CERT_FILE": authority(door)}
    return given | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": ":".join(map(str, (*paths, engine / "meta"))), "USER": "nim"}


def play(door: Door, engine: Path, home: Path, *argv: str, paths: tuple[Path, ...] = ()) -> tuple[Any, list[tuple[str, int]]]:
    """What the driver printed, and the requests that it sent."""
    home.mkdir(exist_ok=True)
    before = len(lines(door))
    python = str(engine / "bin" / "python")
    env = environment(door, home, engine, *paths)
    done = subprocess.run([python, "-P", str(DRIVER), *argv], capture_output=True, text=True, timeout=400, env=env, check=False)
    told = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert told, done.stdout + done.stderr
    asked = [(f"{e['method']} {e['path']}", int(e["status"])) for e in lines(door)[before:]]
    return json.loads(told[0].removeprefix("RESULT ")), asked


def answered(door: Door, asked: list[tuple[str, int]]) -> None:
    """No probe without an answer that the client understands: found, or an entry that is not there."""
    wrong = [(what, status) for what, status in asked if status not in (200, 206, 404)]
    absent = [what for what, status in asked if status == 404]
    assert not wrong, wrong
    for what in absent:
        method, path = what.split(" ", 1)
        assert door.ask(method, path).headers["x-error-code"] == "EntryNotFound", what


def test_transformers_by_repo_id(door: Door, engine_env: Path, tmp_path: Path, minilm: Path) -> None:
    kind, asked = play(door, engine_env, tmp_path / "home", "config", REPO)
    answered(door, asked)
    assert kind == "bert" and len(asked) <= 4  # agent-harnesses, model info, HEAD and GET of config.json
    ours, asked = play(door, engine_env, tmp_path / "fresh", "tokens", REPO, *TEXTS)
    answered(door, asked)
    local, _ = play(door, engine_env, tmp_path / "local", "tokens", str(minilm), *TEXTS)
    assert ours == local and len(asked) <= 20
    again, asked = play(door, engine_env, tmp_path / "fresh", "tokens", REPO, *TEXTS)
    assert again == ours and len(asked) <= 3, asked  # what was absent is remembered, since each 404 told the commit


def test_sentence_transformers_gives_the_vectors_of_the_reference(door: Door, engine_env: Path, tmp_path: Path, minilm: Path) -> None:
    site_packages = next((client("sentence-transformers").parent.parent / "lib").glob("python3*/site-packages"))
    ours, asked = play(door, engine_env, tmp_path / "home", "sentences", REPO, *TEXTS, paths=(site_packages,))
    answered(door, asked)
    python = str(engine_env / "bin" / "python")
    env = {**os.environ, "PYTHONPATH": str(engine_env / "meta")}
    done = subprocess.run([python, str(REFERENCE), str(minilm), *TEXTS], capture_output=True, text=True, timeout=300, env=env, check=True)
    wanted = json.loads(done.stdout)["embeddings"]
    for mine, theirs in zip(ours, wanted, strict=True):
        assert math.isclose(sum(a * b for a, b in zip(mine, theirs, strict=True)), 1.0, abs_tol=1e-4)


def test_push_to_hub_makes_a_model_that_all_doors_serve(door: Door, engine_env: Path, tmp_path: Path, minilm: Path) -> None:
    _, asked = play(door, engine_env, tmp_path / "home", "push", "acme/pushed", str(minilm))
    assert not [what for what, status in asked if status >= 500]
    done = dev_hf(door, tmp_path / "pull", "acme", "download", "acme/pushed", "--local-dir", str(tmp_path / "model"))
    assert done.returncode == 0, done.stderr
    found = contents(tmp_path / "model")
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(found)
    layers = door.ask("GET", "/v2/acme/pushed/manifests/main").json()["layers"]
    assert {d["annotations"]["org.opencontainers.image.title"]: d["digest"] for d in layers if "annotations" in d} == {
        p: sha(d) for p, d in found.items()
    }


def test_vllm_by_repo_id(door: Door, engine_env: Path, tmp_path: Path) -> None:
    """vLLM starts on the id alone: HF_ENDPOINT, HF_TOKEN and its own downloads, nothing of ours in it."""
    home, port = tmp_path / "home", find_port()
    home.mkdir()
    before = len(lines(door))
    argv = [str(engine_env / "bin" / "vllm"), "serve", REPO, "--host", "127.0.0.1", "--port", str(port), "--enforce-eager", "--runner", "pooling"]
    env = environment(door, home, engine_env) | {
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CACHE_ROOT": str(home / "v"),
    }
    with (tmp_path / "vllm.log").open("wb") as log:
        process = subprocess.Popen(argv, env=env, stdout=log, stderr=log, cwd=home)
    try:
        end = time.monotonic() + START_S
        while True:
            assert process.poll() is None and time.monotonic() < end, (tmp_path / "vllm.log").read_text()[-5000:]
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2).close()
                break
            except OSError:
                time.sleep(0.5)
        body = json.dumps({"model": REPO, "input": list(TEXTS)}).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{port}/v1/embeddings", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=120) as answer:
            vectors = [item["embedding"] for item in json.load(answer)["data"]]
        assert len(vectors) == 2 and len(vectors[0]) == 384
    finally:
        stop(process, 60)
    asked = [(f"{e['method']} {e['path']}", int(e["status"])) for e in lines(door)[before:]]
    answered(door, asked)
    assert any(f"/{REPO}/resolve/" in what and what.endswith("model.safetensors") and status == 200 for what, status in asked)
