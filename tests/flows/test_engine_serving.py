"""The serving surface on a real vLLM: the unmodified openai SDK through the front, and the parameters that an engine must never meet."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.conftest import AIRLOCK
from tests.flows.serving import ask, minilm, run_there, served

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

QUESTION = "What is the code word of this run?"
ANSWER = "The code word of this run is wintergreen."
ASKED: Any = [{"role": "user", "content": QUESTION}]
FORM = {"type": "object", "properties": {"far": {"type": "boolean"}}, "required": ["far"], "additionalProperties": False}
TOOL: Any = {"type": "function", "function": {"name": "look", "strict": True, "parameters": FORM}}
FLAGS = ("--dtype", "bfloat16", "--max-model-len", "512", "--enable-auto-tool-choice", "--tool-call-parser", "hermes")
# So small a model writes blanks for ever wherever a grammar lets it.
TIGHT = ("--structured-outputs-config.backend", "xgrammar", "--structured-outputs-config.disable_any_whitespace", "true")


@pytest.fixture(scope="module")
def llama(engine_env: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama trained to answer one question."""
    folder = tmp_path_factory.mktemp("llama") / "model"
    run_there(engine_env, "train_llama.py", "--question", QUESTION, "--answer", ANSWER, "--out", str(folder))
    return folder


@pytest.fixture(scope="module")
def client(engine_env: Path, tmp_path_factory: pytest.TempPathFactory, llama: Path) -> Iterator[openai.OpenAI]:
    """It behind the front."""
    folder = tmp_path_factory.mktemp("serving")
    with served(engine_env, folder, llama, *FLAGS, *TIGHT) as base:
        yield openai.OpenAI(base_url=base + "/v1", api_key="none", max_retries=0)


def _ask(client: openai.OpenAI, path: str, body: object = None) -> tuple[int, Any]:
    return ask(str(client.base_url).removesuffix("/").removesuffix("/v1"), path, body)


def test_responses_are_a_conversation(client: openai.OpenAI) -> None:
    first = client.responses.create(model="acme/tiny", input=QUESTION, temperature=0)
    assert first.output_text == ANSWER and client.responses.retrieve(first.id).output_text == ANSWER
    second = client.responses.create(model="acme/tiny", input=QUESTION, previous_response_id=first.id, temperature=0, max_output_tokens=8)
    assert second.previous_response_id == first.id and second.status in ("completed", "incomplete")
    assert second.usage is not None and first.usage is not None and second.usage.input_tokens > first.usage.input_tokens + 20
    events = list(client.responses.create(model="acme/tiny", input=QUESTION, temperature=0, stream=True))
    assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == ANSWER
    assert events[-1].type == "response.completed" and client.responses.retrieve(events[-1].response.id).output_text == ANSWER


def test_a_background_response_is_cancelled_in_the_engine(client: openai.OpenAI) -> None:
    before, many = _generated(client), 24
    more = {"ignore_eos": True, "temperature": 0}
    ids = [
        client.responses.create(model="acme/tiny", input=QUESTION, background=True, max_output_tokens=480, extra_body=more).id for _ in range(many)
    ]
    assert {client.responses.cancel(i).status for i in ids[many // 2 :]} == {"cancelled"}
    _until(lambda: _running(client) == 0)
    assert _generated(client) - before < many * 480 * 0.9
    assert {client.responses.retrieve(i).status for i in ids[many // 2 :]} == {"cancelled"}


def test_a_client_that_leaves_frees_the_engine(client: openai.OpenAI) -> None:
    before = _generated(client)
    stream = client.chat.completions.create(model="acme/tiny", messages=ASKED, stream=True, n=128, max_tokens=480, extra_body={"ignore_eos": True})
    next(iter(stream))
    stream.close()
    _until(lambda: _running(client) == 0)
    assert _generated(client) - before < 128 * 480 * 0.8


def _metric(client: openai.OpenAI, prefix: str) -> float:
    page = _ask(client, "/metrics")[1]
    return sum(float(line.rsplit(" ", 1)[1]) for line in page.splitlines() if line.startswith(prefix))


def _running(client: openai.OpenAI) -> float:
    return _metric(client, "vllm:num_requests_running")


def _generated(client: openai.OpenAI) -> float:
    """Tokens so far; this vLLM counts no aborted requests, but it makes no tokens for them either."""
    return _metric(client, "vllm:generation_tokens_total")


def _until(wanted: Any) -> None:
    end = time.monotonic() + 30
    while not wanted():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.parametrize(
    "more",
    [
        {"guided_choice": ["left", "right"]},
        {"nvext": {"guided_choice": ["left", "right"]}},
        {"guided_regex": "left|right"},
        {"nvext": {"guided_grammar": 'root ::= "left" | "right"'}},
        {"structured_outputs": {"choice": ["left", "right"]}},
    ],
    ids=str,
)
def test_each_way_to_guide_an_answer_constrains_it(client: openai.OpenAI, more: dict[str, object]) -> None:
    answer = client.chat.completions.create(model="acme/tiny", messages=ASKED, temperature=0, max_tokens=20, extra_body=more)
    assert answer.choices[0].message.content in ("left", "right")


def test_json_by_schema(client: openai.OpenAI) -> None:
    form: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": FORM, "strict": True}}
    asked = {"model": "acme/tiny", "messages": ASKED, "temperature": 0, "max_tokens": 60}
    answer = client.chat.completions.create(**asked, response_format=form)
    assert isinstance(json.loads(answer.choices[0].message.content or "")["far"], bool)
    answer = client.chat.completions.create(**asked, extra_body={"nvext": {"guided_json": FORM}})
    assert isinstance(json.loads(answer.choices[0].message.content or "")["far"], bool)
    text: Any = {"format": {"type": "json_schema", "name": "x", "schema": FORM, "strict": True}, "verbosity": "medium"}
    said = client.responses.create(model="acme/tiny", input=QUESTION, temperature=0, max_output_tokens=60, text=text).output_text
    assert isinstance(json.loads(said)["far"], bool)


def test_a_named_tool_is_called(client: openai.OpenAI) -> None:
    blanks = {
        str(t)
        for text in ("\n", "\n\n", " ", "\t", "\r")
        for t in _ask(client, "/tokenize", {"prompt": text, "add_special_tokens": False})[1]["tokens"]
    }
    bias = dict.fromkeys(blanks, -100)  # the grammar lets it write blanks for ever, and so small a model does
    for choice in ({"type": "function", "function": {"name": "look"}}, "required"):
        asked: Any = {"tools": [TOOL], "tool_choice": choice, "logit_bias": bias}
        answer = client.chat.completions.create(model="acme/tiny", messages=ASKED, temperature=0, max_tokens=120, **asked)
        (call,) = answer.choices[0].message.tool_calls or []
        assert call.function.name == "look" and isinstance(json.loads(call.function.arguments)["far"], bool)


def test_tokens_there_and_back(client: openai.OpenAI) -> None:
    status, found = _ask(client, "/tokenize", {"model": "acme/tiny", "prompt": "The code", "add_special_tokens": False})
    assert status == 200 and found["count"] == len(found["tokens"]) > 0
    assert _ask(client, "/detokenize", {"model": "acme/tiny", "tokens": found["tokens"]})[1] == {"prompt": "The code"}
    assert _ask(client, "/tokenize", {"model": "acme/tiny", "messages": ASKED})[1]["count"] > found["count"]


@pytest.mark.parametrize(
    "more",
    [
        {"temperature": -5},
        {"temperature": 1e300},
        {"top_p": 7},
        {"top_k": 1 << 62},
        {"seed": (1 << 63) - 1},
        {"max_tokens": 1 << 60},
        {"max_tokens": -1},
        {"logit_bias": {"999999999": 1}},
        {"logit_bias": {"x": 1}},
        {"stop": [""]},
        {"stop": ["a"] * 10_000},
        {"stop_token_ids": [1 << 40]},
        {"allowed_token_ids": [1 << 40]},
        {"top_logprobs": 1 << 40, "logprobs": True},
        {"guided_regex": "(" * 2000},
        {"guided_json": {"$ref": "#/nowhere"}},
        {"guided_choice": []},
        {"response_format": {"type": "json_schema"}},
        {"messages": []},
        {"messages": [{"role": "user", "content": None}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}]}]},
        {"messages": [{"role": "{{ x }}", "content": "{% for i in range(10**9) %}x{% endfor %}"}]},
        {"messages": "x"},
        {"tools": [{}]},
        {"tools": "x"},
        {"stream_options": {"include_usage": True}},
        {"chat_template_kwargs": {"add_generation_prompt": 7}},
        {"min_tokens": 1 << 40},
        {"thinking_token_budget": -9},
        {"truncate_prompt_tokens": 1 << 40},
        {"prompt_logprobs": 1 << 40},
        {"repetition_penalty": 0},
        {"frequency_penalty": 1e30},
    ],
    ids=lambda more: str(more)[:60],
)
def test_hostile_parameters_on_a_real_engine(client: openai.OpenAI, more: dict[str, object]) -> None:
    status, body = _ask(client, "/v1/chat/completions", {"model": "acme/tiny", "messages": ASKED, "max_tokens": 4, **more})
    assert status in (200, 400, 404, 422), body
    assert "Traceback" not in str(body) and "/serving" not in str(body)
    answer = client.chat.completions.create(model="acme/tiny", messages=ASKED, temperature=0)
    assert answer.choices[0].message.content == ANSWER


def test_smoke_measures_a_real_engine(client: openai.OpenAI, tmp_path: Path) -> None:
    base, record = str(client.base_url).removesuffix("/v1/"), tmp_path / "run.json"
    argv = [str(AIRLOCK), "runtime", "smoke", "--url", base, "--levels", "1,4", "--each", "2", "--max-tokens", "64", "--prompt-words", "20"]
    done = subprocess.run([*argv, "--slo", "ttft_p95_ms=20000,tok_s=5", "--record", str(record)], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "target reached at 4 streams" in done.stdout, done.stdout + done.stderr
    levels = json.loads(record.read_text())["levels"]
    assert [x["tokens"] for x in levels] == [2 * 64, 8 * 64] and not any(x["failed"] for x in levels)
    done = subprocess.run([*argv, "--slo", "tok_s=100000000"], capture_output=True, text=True, check=False)
    assert done.returncode == 52 and "BELOW TARGET: tok_s at 4 streams" in done.stdout


HOSTILE = (
    "{% set w = messages[-1]['content'] %}{% if 'raise' in w %}{{ raise_exception('no such turn') }}"
    "{% elif 'escape' in w %}{{ ''.__class__.__mro__[1].__subclasses__() }}"
    "{% elif 'range' in w %}{% for i in range(10000000000) %}x{% endfor %}"
    "{% elif 'loop' in w %}{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    "{% elif 'big' in w %}{{ 'x' * 100000000 }}{% endif %}"
)


def test_a_hostile_chat_template_ends_with_its_request(engine_env: Path, tmp_path: Path, llama: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(llama, model)
    template = model / "chat_template.jinja"
    template.write_text(HOSTILE + template.read_text())
    with served(engine_env, tmp_path, model, *FLAGS) as base:
        for word in ("raise", "escape", "range", "big", "loop", QUESTION):
            began = time.monotonic()
            status, body = ask(base, "/v1/chat/completions", {"messages": [{"role": "user", "content": word}], "temperature": 0})
            assert status == (200 if word == QUESTION else 500 if word == "loop" else 400), body
            assert time.monotonic() - began < 20 and "/model" not in str(body)
        assert body["choices"][0]["message"]["content"] == ANSWER


def test_embeddings_and_ranking(engine_env: Path, tmp_path: Path) -> None:
    flags = ("--runner", "pooling", "--convert", "embed", "--dtype", "float32")
    model = tmp_path / "model"
    shutil.copytree(minilm(), model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"matryoshka_dimensions": [64, 384]}))  # what lets an engine shorten vectors
    with served(engine_env, tmp_path, model, *flags) as base:
        made = openai.OpenAI(base_url=base + "/v1", api_key="none", max_retries=0)
        passages = [{"text": t} for t in ("The cat sleeps.", "GPUs multiply matrices.", "Cats like to sleep on the sofa.")]
        status, found = _ask(
            made, "/v1/ranking", {"model": "acme/tiny", "query": {"text": "Where does the cat sleep?"}, "passages": passages, "truncate": "END"}
        )
        assert status == 200, found
        order = [r["index"] for r in found["rankings"]]
        assert sorted(order) == [0, 1, 2] and order[-1] == 1
        logits = [r["logit"] for r in found["rankings"]]
        assert logits == sorted(logits, reverse=True)
        long = "word " * 2000
        with pytest.raises(openai.BadRequestError):
            made.embeddings.create(model="acme/tiny", input=long, extra_body={"truncate": "NONE", "input_type": "query"})
        ends = [
            made.embeddings.create(model="acme/tiny", input="first " + long + "last", extra_body={"truncate": side}).data[0].embedding
            for side in ("END", "START")
        ]
        assert all(len(e) == 384 for e in ends) and ends[0] != ends[1]
        with pytest.raises(openai.BadRequestError):
            made.embeddings.create(model="acme/tiny", input="x", dimensions=7)
        whole, short = (made.embeddings.create(model="acme/tiny", input="x", dimensions=n).data[0].embedding for n in (384, 64))
        norm = math.hypot(*whole[:64])
        assert len(short) == 64 and max(abs(a - b / norm) for a, b in zip(short, whole, strict=False)) < 1e-3
        for hostile in (
            {"input": [[1 << 40]]},
            {"input": {"a": 1}},
            {"input": [1, "a"]},
            {"input": "x", "dimensions": -1},
            {"input": "x", "encoding_format": "hex"},
        ):
            assert _ask(made, "/v1/embeddings", {"model": "acme/tiny", **hostile})[0] in (400, 422), hostile
        assert len(made.embeddings.create(model="acme/tiny", input=["a"] * 64).data) == 64
