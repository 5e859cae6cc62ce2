"""What the front's routes take, refuse and keep, against a scripted engine: one front for the cases that change nothing."""

from __future__ import annotations

import contextlib
import http.client
import json
import resource
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.contracts.fronts import CHAT, Fronts, Serve, Served, in_both_shapes, serve

pytestmark = pytest.mark.server
__all__ = ["serve"]

PIXEL = "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="


@pytest.fixture(scope="module")
def front(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A front over an engine that generates."""
    fronts = Fronts(tmp_path_factory.mktemp("front"))
    yield fronts.start(licence="Apache License, Version 2.0", manifest='{"schema":1}', why="the only one", expected={"tok_s": 10.0})
    fronts.stop()


@pytest.fixture(scope="module")
def pooling(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A front over an engine that embeds."""
    fronts = Fronts(tmp_path_factory.mktemp("pooling"))
    yield fronts.start("--runner", "pooling")
    fronts.stop()


def _chat(front: Served, **more: object) -> tuple[int, Any]:
    status, body, _ = front.ask("POST", "/v1/chat/completions", {**CHAT, **more})
    return status, body


def _sent(front: Served) -> dict[str, Any]:
    body = front.records()[-1]["body"]
    assert isinstance(body, dict)
    return body


def _seen(content: object) -> dict[str, object]:
    return {"messages": [{"role": "user", "content": [{"type": "text", "text": "What is it?"}, content]}]}


def test_management_bodies(front: Served) -> None:
    status, found, _ = front.ask("GET", "/v1/metadata")
    assert status == 200 and found["profile_id"] == found["selectedModelProfileId"] == "ab" * 32
    assert found["airlock"]["selected"] == "the only one" and found["airlock"]["model_digest"].startswith("sha256:1")
    assert found["airlock"]["expected"] == {"tok_s": 10.0} and found["modelInfo"][0]["shortName"] == "acme/tiny:latest"
    assert front.ask("GET", "/v1/manifest")[1] == {"manifest_file": '{"schema":1}', "repository_override": ""}
    licence = front.ask("GET", "/v1/license")[1]
    assert licence["size"] == len(licence["content"]) == 27 and len(licence["sha"]) == 40 and found["licenseInfo"] == licence
    assert set(front.ask("GET", "/v1/version")[1]) == {"release", "api", "openapi_spec"}


@pytest.mark.parametrize("place", ["top", "nvext"])
def test_older_spellings_reach_the_engine_as_newer_ones(front: Served, place: str) -> None:
    asked = {"guided_json": {"type": "object"}, "max_thinking_tokens": 7, "ignore_eos": True, "repetition_penalty": 1.1}
    assert _chat(front, **(asked if place == "top" else {"nvext": asked}))[0] == 200
    sent = _sent(front)
    assert sent["structured_outputs"] == {"json": {"type": "object"}} and sent["thinking_token_budget"] == 7
    assert (
        sent["ignore_eos"] is True and sent["repetition_penalty"] == 1.1 and not {"nvext", *asked} - {"ignore_eos", "repetition_penalty"} & set(sent)
    )


@pytest.mark.parametrize("word", ["regex", "choice", "grammar"])
def test_each_guided_field(front: Served, word: str) -> None:
    value = ["a", "b"] if word == "choice" else "x+"
    assert _chat(front, **{f"guided_{word}": value})[0] == 200
    assert _sent(front)["structured_outputs"] == {word: value}


@pytest.mark.parametrize(
    "more",
    [
        {"guided_decoding_backend": "outlines"},
        {"nvext": {"agent_hints": {"latency": 1}}},
        {"nvext": {"no_such_control": 1}},
        {"functions": [{"name": "f"}]},
        {"modalities": ["text", "audio"]},
        {"store": True},
        {"service_tier": "priority"},
        {"web_search_options": {}},
        {"prediction": {"type": "content", "content": "x"}},
        {"chat_template": "{{ 1 }}"},
        {"kv_transfer_params": {}},
        {"mm_processor_kwargs": {}},
        {"request_id": "x"},
        {"no_such_field": 0},
    ],
)
def test_an_unsupported_control_is_refused_by_name(front: Served, more: dict[str, Any]) -> None:
    before = len(front.records())
    status, body = _chat(front, **more)
    word = next(iter(more.get("nvext", more)))
    assert status == 400 and repr(word) in body["message"] and body["error"]["param"] == word
    in_both_shapes(body, 400)
    assert len(front.records()) == before


@pytest.mark.parametrize(
    ("path", "more", "word"),
    [
        ("/v1/chat/completions", {"stream": True, "stream_options": {"no_such": 1}}, "stream_options.no_such"),
        ("/v1/chat/completions", {"stream": True, "stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation"),
        ("/v1/chat/completions", {"structured_outputs": {"json": {}, "whitespace_pattern": " "}}, "structured_outputs.whitespace_pattern"),
        ("/v1/chat/completions", {"guided_json": {}, "guided_whitespace_pattern": " "}, "guided_whitespace_pattern"),
        ("/v1/chat/completions", {"tool_choice": {"type": "allowed_tools", "allowed_tools": {}}}, "tool_choice"),
        ("/v1/completions", {"stream": True, "stream_options": 7}, "stream_options"),
        ("/v1/responses", {"reasoning": {"effort": "low", "summary": "auto"}}, "reasoning.summary"),
        ("/v1/responses", {"text": {"verbosity": "low"}}, "text.verbosity"),
        ("/v1/responses", {"text": "json"}, "text"),
        ("/v1/responses", {"include": ["reasoning.encrypted_content"]}, "include"),
        ("/v1/responses", {"include": 7}, "include"),
        ("/v1/responses", {"tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": []}}, "tool_choice"),
    ],
)
def test_an_unsupported_control_inside_of_a_field_is_refused_by_name(front: Served, path: str, more: dict[str, Any], word: str) -> None:
    before = len(front.records())
    given = {"input": "x"} if path == "/v1/responses" else CHAT if "chat" in path else {"prompt": "x"}
    status, body, _ = front.ask("POST", path, {**given, **more})
    assert status == 400 and word in body["message"] and body["error"]["param"] == word, body
    in_both_shapes(body, 400)
    assert len(front.records()) == before


def test_what_asks_for_nothing_inside_of_a_field_is_passed_over(front: Served) -> None:
    asked = {"text": {"verbosity": "medium", "format": {"type": "text"}}, "reasoning": {"summary": None}, "include": ["message.output_text.logprobs"]}
    assert front.ask("POST", "/v1/responses", {"input": "x", **asked})[0] == 200
    assert {k: _sent(front)[k] for k in asked} == {**asked, "text": {"format": {"type": "text"}}, "reasoning": {}}


@pytest.mark.parametrize(
    "more",
    [{"user": "me"}, {"store": False}, {"service_tier": "auto"}, {"modalities": ["text"]}, {"metadata": {"a": "b"}}, {"no_such_field": None}],
)
def test_what_asks_for_nothing_is_passed_over(front: Served, more: dict[str, Any]) -> None:
    assert _chat(front, **more)[0] == 200
    assert set(_sent(front)) <= {"model", "messages", "user"}


@pytest.mark.parametrize(
    "raw",
    [
        b'{"temperature": NaN, "messages": []}',
        b'{"temperature": Infinity, "messages": []}',
        b'{"temperature": 1e999, "messages": []}',
        b'{"seed": 99999999999999999999999, "messages": []}',
        b'{"max_tokens": ' + b"9" * 5000 + b', "messages": []}',
        b'{"n": 100000, "messages": []}',
        b'{"n": 0, "messages": []}',
        b'{"stream": "yes", "messages": []}',
        b'{"messages": [], "messages": [1]}',
        b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"messages": [], "chat_template_kwargs": {"chat_template": "{{ 1 }}"}}',
        b'{"messages": [], "chat_template_kwargs": {"a": {"b": 1}}}',
        b'{"messages": [], "response_format": "' + b"x" * 300_000 + b'"}',
        b'{"nvext": [], "messages": []}',
        b'{"guided_regex": "a", "nvext": {"guided_regex": "b"}, "messages": []}',
        b'{"guided_regex": "a", "response_format": {"type": "json_object"}, "messages": []}',
    ],
    ids=lambda raw: raw[:40].decode(),
)
def test_hostile_parameters_are_refused_before_the_engine(front: Served, raw: bytes) -> None:
    before = len(front.records())
    status, body, _ = front.ask("POST", "/v1/chat/completions", raw=raw)
    assert status == 400, body
    in_both_shapes(body, 400)
    assert len(front.records()) == before


@pytest.mark.parametrize(
    ("raw", "what"),
    [
        (b'{"prompt":[' + b"1," * 1_000_001 + b"1]}", "values"),
        (b'{"prompt":{' + b",".join(b'"%d":1' % i for i in range(300_001)) + b"}}", "keys"),
        (b'{"prompt":[' + b"{}," * 200_001 + b"1]}", "objects"),
    ],
)
def test_a_body_of_too_many_values_is_refused(front: Served, raw: bytes, what: str) -> None:
    status, body, _ = front.ask("POST", "/v1/completions", raw=raw)
    assert status == 413 and what in body["message"]


@pytest.mark.parametrize("more", [{"prompt": ["x"] * 2049}, {"prompt": ["x"] * 1025, "n": 2}, {"prompt": [[1]] * 2049}, {"n": 129}])
def test_one_request_does_not_take_the_whole_engine(front: Served, more: dict[str, object]) -> None:
    before = len(front.records())
    status, body, _ = front.ask("POST", "/v1/completions", {"prompt": "x", **more})
    assert status == 400 and len(front.records()) == before
    in_both_shapes(body, 400)
    assert front.ask("POST", "/v1/completions", {"prompt": [1] * 2049})[0] == 200  # one prompt as tokens


@pytest.mark.parametrize("head", [b"Transfer-Encoding: chunked", b"Content-Length: 30000000"])
def test_slow_senders_hold_up_nobody(serve: Serve, head: bytes) -> None:
    served = serve(limits={"requests": 2, "queued": 2, "queue_s": 1.0, "bodies_bytes": 32 << 20})
    with contextlib.ExitStack() as slow:
        for _ in range(40):
            sender = slow.enter_context(socket.create_connection(("127.0.0.1", served.port)))
            sender.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\n" + head + b"\r\n\r\n")
        time.sleep(0.3)
        assert served.ask("POST", "/v1/chat/completions", CHAT)[0] == 200
        assert "airlock_requests_in_flight 0\n" in served.ask("GET", "/metrics")[1]


def test_all_bodies_together_are_bounded(serve: Serve) -> None:
    served = serve("--fake-frame-s", "0.3", limits={"bodies_bytes": 1 << 20})
    large = {**CHAT, "messages": [{"role": "user", "content": "x" * (700 << 10)}]}
    with ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(lambda _: served.ask("POST", "/v1/chat/completions", large), range(2)))
    assert sorted(a[0] for a in answers) == [200, 429]
    in_both_shapes(next(a[1] for a in answers if a[0] == 429), 429)
    begun = served.ask("POST", "/v1/responses", {"input": "x" * (700 << 10), "background": True})[1]
    assert served.ask("POST", "/v1/chat/completions", large)[0] == 429  # what runs in the background still holds its body
    assert served.ask("POST", f"/v1/responses/{begun['id']}/cancel")[0] == 200
    served.wait(lambda: "airlock_body_bytes 0\n" in served.ask("GET", "/metrics")[1], 5)


@pytest.mark.parametrize(
    "head",
    [
        b"Authorization: Bearer nvapi-secret" + b"a" * 20_000,
        b"Authorization: Bearer nvapi-secret\x01",
        b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\nA: nvapi-secret",
        b"Content-Length: 2\r\nContent-Length: nvapi-secret",
        b"Transfer-Encoding: chunked\r\n\r\nnvapi-secret",
    ],
)
def test_what_is_no_http_is_refused_and_not_logged(serve: Serve, capfd: pytest.CaptureFixture[str], head: bytes) -> None:
    served = serve()
    with socket.create_connection(("127.0.0.1", served.port)) as odd:
        odd.settimeout(10)
        odd.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\n" + head + b"\r\n\r\n")
        assert b" 400 " in odd.recv(64)
    assert served.ready() and not served.records()
    served.process.terminate()
    served.process.wait(15)
    logged = capfd.readouterr().err
    assert "Service is ready" in logged and "Traceback" not in logged and "nvapi-secret" not in logged


def test_more_connections_than_the_soft_limit_of_files(serve: Serve) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (128, hard))  # what the front inherits
    try:
        served = serve()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    with contextlib.ExitStack() as idle:
        for _ in range(200):
            idle.enter_context(socket.create_connection(("127.0.0.1", served.port)))
        assert served.ask("GET", "/v1/health/live")[0] == 200


def test_a_connection_that_asks_nothing_is_closed(serve: Serve) -> None:
    served = serve(quiet_s=1.0)
    for begun in (b"", b"POST /v1/chat/completions HTTP/1.1\r\nHost:"):
        with socket.create_connection(("127.0.0.1", served.port)) as idle:
            idle.sendall(begun)
            idle.settimeout(10)
            assert idle.recv(100) == b""


@pytest.mark.parametrize(
    "content",
    [
        {"type": "image_url", "image_url": {"url": "http://169.254.169.254/latest"}},
        {"type": "image_url", "image_url": {"url": "https://example.org/x.png"}},
        {"type": "image_url", "image_url": {"url": "file:///etc/passwd"}},
        {"type": "image_url", "image_url": {"url": "DATA:text/html;base64,AAAA"}},
        {"type": "image_url", "image_url": "//169.254.169.254/"},
        {"type": "image_url", "image_url": {"url": PIXEL, "uuid": "of another"}},
        {"type": "image_url", "image_url": {"url": PIXEL}, "uuid": "of another"},
        {"type": "video_url", "video_url": {"url": "http://169.254.169.254/"}},
        {"type": "audio_url", "audio_url": {"url": "http://169.254.169.254/"}},
        {"type": "image_embeds", "image_embeds": "gASV"},
        {"type": "input_file", "file_url": "http://169.254.169.254/"},
        {"image_url": "http://169.254.169.254/"},
        {"type": ["image_url"]},
        7,
    ],
)
def test_nothing_is_fetched_for_a_caller(front: Served, content: object) -> None:
    before = len(front.records())
    status, body = _chat(front, **_seen(content))
    assert status == 400
    in_both_shapes(body, 400)
    asked = {"input": [{"role": "user", "content": [content]}]}
    assert front.ask("POST", "/v1/responses", asked)[0] == 400 and len(front.records()) == before


@pytest.mark.parametrize(
    "turn",
    [
        {"role": "user", "content": {"type": "image_url", "image_url": {"url": "http://169.254.169.254/"}}},
        {"role": "user", "content": "x", "output": [{"type": "image_url", "image_url": {"url": "http://169.254.169.254/"}}]},
        {"type": "computer_call_output", "output": {"type": "computer_screenshot", "image_url": "http://169.254.169.254/"}},
        {"type": "input_image", "image_url": "http://169.254.169.254/"},
    ],
)
def test_nothing_is_fetched_wherever_it_stands(front: Served, turn: dict[str, object]) -> None:
    before = len(front.records())
    for path, word in (("/v1/chat/completions", "messages"), ("/v1/responses", "input")):
        assert front.ask("POST", path, {word: [turn]})[0] == 400
    for bad in ({"messages": {"role": "user"}}, {"messages": ["x"]}, {"messages": "x"}, {"messages": [[turn]]}):
        assert front.ask("POST", "/v1/chat/completions", bad)[0] == 400
    assert front.ask("POST", "/v1/responses", {"input": [[turn]]})[0] == 400
    assert len(front.records()) == before


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_no_conversation_hides_in_an_input(pooling: Served, depth: int) -> None:
    given: object = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://169.254.169.254/"}}]}
    for _ in range(depth):
        given = [given]  # vLLM takes a conversation, and a list of them, for an embedding's input
    before = len(pooling.records())
    for more in ({"input": given}, {"input": ["x", given]}, {"input": {"role": "user"}}, {"input": [1.5]}):
        status, body, _ = pooling.ask("POST", "/v1/embeddings", {"model": "acme/tiny", **more})
        assert status == 400 and len(pooling.records()) == before
        in_both_shapes(body, 400)


def test_an_input_of_tokens_is_taken(pooling: Served) -> None:
    for given in ([1, 2, 3], [[1, 2], [3]]):
        assert pooling.ask("POST", "/v1/embeddings", {"model": "acme/tiny", "input": given})[0] == 200 and _sent(pooling)["input"] == given


def test_data_images_pass_and_are_counted(front: Served) -> None:
    image = {"type": "image_url", "image_url": {"url": PIXEL, "detail": "low"}}
    assert _chat(front, **_seen(image))[0] == 200 and _sent(front)["messages"][0]["content"][1] == image
    shown = {"type": "input_image", "image_url": PIXEL, "detail": "low"}
    assert front.ask("POST", "/v1/responses", {"input": [{"role": "user", "content": [shown]}]})[0] == 200
    assert _sent(front)["input"][0]["content"] == [shown]
    status, body = _chat(front, messages=[{"role": "user", "content": [image] * 17}])
    assert status == 400 and "17 images" in body["message"]


def test_ranking_in_nims_form(pooling: Served) -> None:
    asked = {"model": "acme/tiny", "query": {"text": "q"}, "passages": [{"text": "aa"}, {"text": "aaaa"}, {"text": "a"}], "truncate": "END"}
    status, body, _ = pooling.ask("POST", "/v1/ranking", asked)
    assert status == 200 and [r["index"] for r in body["rankings"]] == [1, 0, 2] and body["rankings"][0]["logit"] == 0.4
    sent = _sent(pooling)
    assert sent["documents"] == ["aa", "aaaa", "a"] and sent["truncate_prompt_tokens"] == -1 and sent["use_activation"] is False
    for bad in (
        {"passages": []},
        {"passages": [{"text": "a"}] * 513},
        {"query": "q"},
        {"query": {"text": "q", "image": PIXEL}},
        {"passages": [{"text": "a", "image": PIXEL}]},
        {"truncate": "X"},
    ):
        status, body, _ = pooling.ask("POST", "/v1/ranking", asked | bad)
        assert status == 400
        in_both_shapes(body, 400)


@pytest.mark.parametrize(
    "more",
    [
        {"input": ""},
        {"input": []},
        {"input": None},
        {"input": ["a", ""]},
        {"input_type": "other"},
        {"truncate": "END", "truncate_prompt_tokens": 5},
        {"no_such": 1},
    ],
)
def test_embedding_input_that_makes_no_sense(pooling: Served, more: dict[str, Any]) -> None:
    status, body, _ = pooling.ask("POST", "/v1/embeddings", {"model": "acme/tiny", "input": "a", **more})
    assert status == 400
    in_both_shapes(body, 400)


def test_tokens_there_and_back(front: Served) -> None:
    tokens = front.ask("POST", "/tokenize", {"model": "acme/tiny", "prompt": "hé"})[1]["tokens"]
    assert front.ask("POST", "/detokenize", {"model": "acme/tiny", "tokens": tokens})[1] == {"prompt": "hé"}


def test_a_route_that_an_engine_lacks_is_told(serve: Serve) -> None:
    served = serve(engine="tensorrt_llm")
    status, body, _ = served.ask("POST", "/tokenize", {"prompt": "x"})
    assert status == 501 and "tensorrt_llm" in body["message"]
    status, body, _ = served.ask("POST", "/v1/chat/completions", {**CHAT, "guided_regex": "a+", "structured_outputs": None})
    assert status == 200 and served.records()[-1]["body"]["response_format"] == {"type": "regex", "regex": "a+"}
    assert served.ask("POST", "/v1/chat/completions", {**CHAT, "bad_words": ["x"]})[0] == 400


def test_responses_are_kept_and_continued(front: Served) -> None:
    client = front.client()
    first = client.responses.create(model="acme/tiny", input="hi")
    assert first.output_text == "The answer is forty-two." and first.id != "resp_engine" and first.store is True  # type: ignore[attr-defined]
    assert front.client().responses.retrieve(first.id).output_text == first.output_text  # another connection
    second = client.responses.create(model="acme/tiny", input="and?", previous_response_id=first.id)
    sent = _sent(front)
    assert [i.get("role") for i in sent["input"]] == ["user", "assistant", "user"] and sent["store"] is False and "previous_response_id" not in sent
    assert second.previous_response_id == first.id
    with pytest.raises(openai.BadRequestError, match="'stream' is not supported"):
        client.responses.retrieve(first.id, stream=True)
    with pytest.raises(openai.BadRequestError, match="'starting_after' is not supported"):
        client.responses.retrieve(first.id, starting_after=3)
    client.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(first.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.create(model="acme/tiny", input="x", previous_response_id="resp_of_somebody_else")
    with pytest.raises(openai.BadRequestError):
        client.responses.cancel(second.id)
    unkept = client.responses.create(model="acme/tiny", input="x", store=False)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(unkept.id)


def test_a_streamed_response_is_kept_under_the_id_that_the_stream_told(front: Served) -> None:
    client = front.client()
    events = list(client.responses.create(model="acme/tiny", input='say "response"', stream=True))
    assert events[0].type == "response.created" and events[-1].type == "response.completed"
    assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == "The answer is forty-two."
    assert events[0].response.id == events[-1].response.id
    assert client.responses.retrieve(events[0].response.id).status == "completed"


def test_a_streamed_response_that_is_removed_meanwhile_stays_so(serve: Serve) -> None:
    served = serve("--fake-frame-s", "0.1")
    client = served.client()
    events = iter(client.responses.create(model="acme/tiny", input="hi", stream=True))
    key = next(e.response.id for e in events if e.type == "response.created")
    client.responses.delete(key)
    assert list(events)[-1].type == "response.completed"
    assert served.ask("GET", f"/v1/responses/{key}")[0] == 404


def test_cancel_stops_the_generation_of_a_background_response(serve: Serve) -> None:
    served = serve("--fake-frame-s", "3")
    client = served.client()
    begun = client.responses.create(model="acme/tiny", input="hi", background=True)
    assert begun.status == "queued"
    served.wait(lambda: client.responses.retrieve(begun.id).status == "in_progress" and bool(served.records()), 5)
    assert client.responses.cancel(begun.id).status == "cancelled"
    served.wait(lambda: any(r.get("aborted") for r in served.records()), 5)
    assert client.responses.retrieve(begun.id).status == "cancelled"


def test_a_background_response_is_finished_before_the_end(serve: Serve) -> None:
    served = serve("--fake-frame-s", "0.3", "--fake-ignore-term", stop_s=1.0)
    client = served.client()
    begun = client.responses.create(model="acme/tiny", input="hi", background=True)
    served.wait(lambda: client.responses.retrieve(begun.id).status == "completed", 10)
    assert client.responses.retrieve(begun.id).output_text == "The answer is forty-two."
    for asked in ({"background": True, "stream": True}, {"background": True, "store": False}, {"tools": [{"type": "mcp", "server_url": "http://x"}]}):
        assert served.ask("POST", "/v1/responses", {"input": "x", **asked})[0] == 400
    begun = client.responses.create(model="acme/tiny", input="hi", background=True)
    served.wait(lambda: len(served.records()) == 2, 5)
    served.process.send_signal(signal.SIGTERM)  # while it runs, and nobody waits for it
    seen = [begun.status]
    with contextlib.suppress(OSError, http.client.HTTPException):  # until the port closes, a while after the engine was told to stop
        while True:
            seen.append(served.ask("GET", f"/v1/responses/{begun.id}")[1]["status"])
            time.sleep(0.02)
    assert seen[-1] == "completed" and served.process.wait(20) == 0, set(seen)


def test_the_store_of_responses_is_bounded(serve: Serve) -> None:
    served = serve(limits={"stored": 3})
    ids = [served.ask("POST", "/v1/responses", {"input": "x"})[1]["id"] for _ in range(5)]
    assert [served.ask("GET", f"/v1/responses/{i}")[0] for i in ids] == [404, 404, 200, 200, 200]
    assert "airlock_responses_stored 3" in served.ask("GET", "/metrics")[1]


def test_the_queue_is_bounded_in_length_and_time(serve: Serve) -> None:
    served = serve("--fake-frame-s", "0.5", limits={"requests": 1, "queued": 1, "queue_s": 1.0})
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: served.ask("POST", "/v1/chat/completions", CHAT), range(4)))
    assert sorted(a[0] for a in answers) == [200, 429, 429, 429]
    refused = [a for a in answers if a[0] == 429]
    assert all(a[2]["Retry-After"] == "1" for a in refused) and sum("queue is full" in a[1]["message"] for a in refused) == 2
    in_both_shapes(refused[0][1], 429)
    assert served.ask("POST", "/v1/chat/completions", CHAT)[0] == 200
    assert "airlock_requests_refused_total 3" in served.ask("GET", "/metrics")[1]


def test_those_who_wait_come_first_and_leave_no_place_taken(serve: Serve) -> None:
    served = serve("--fake-frame-s", "0.1", limits={"requests": 1, "queued": 8, "queue_s": 20.0})
    with socket.create_connection(("127.0.0.1", served.port)) as gone, ThreadPoolExecutor(3) as pool:
        raw = json.dumps(CHAT).encode()
        gone.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(raw) + raw)
        running = [pool.submit(served.ask, "POST", "/v1/chat/completions", CHAT) for _ in range(3)]
        time.sleep(0.2)
        gone.close()
        assert [r.result()[0] for r in running] == [200, 200, 200]
    assert "airlock_requests_waiting 0\n" in served.ask("GET", "/metrics")[1]


@pytest.mark.parametrize(("kind", "status"), [("html", 502), ("text", 502), ("redirect", 502), ("cut", 503), ("reset", 502), ("silent", 504)])
@pytest.mark.parametrize("stream", [False, True])
def test_an_engine_that_answers_garbage(serve: Serve, kind: str, status: int, stream: bool) -> None:
    served = serve("--fake-garbage", kind, idle_s=1.0, answer_s=1.0)
    found, body, _ = served.ask("POST", "/v1/chat/completions", {**CHAT, "stream": stream})
    assert found == (502 if stream and kind == "cut" else status), body
    in_both_shapes(body, found)
    assert "127.0.0.1:9" not in str(body) and served.ready()


def test_a_frame_without_an_end_takes_no_memory(serve: Serve) -> None:
    served = serve("--fake-garbage", "noend", names=("acme/tiny", "short"))
    data = served.stream(model="short")
    assert b"frame without an end" in data and len(data) < 2000


def test_a_prompt_of_100_mb_is_refused_and_the_others_go_on(serve: Serve) -> None:
    served = serve("--fake-frames", "200", "--fake-frame-s", "0.01")
    body = b'{"messages":[{"role":"user","content":"' + b"x" * (100 << 20) + b'"}]}'
    gaps: list[float] = []

    def listen() -> None:
        connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=20)
        connection.request("POST", "/v1/chat/completions", json.dumps({**CHAT, "stream": True}))
        answer, last = connection.getresponse(), time.monotonic()
        while answer.readline():
            gaps.append(time.monotonic() - last)
            last = time.monotonic()

    before = _memory(served)
    other = threading.Thread(target=listen)
    other.start()
    for _ in range(3):
        connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=20)
        with contextlib.suppress(OSError):  # the answer may come, and the connection end, before all is sent
            connection.request("POST", "/v1/chat/completions", body)
        with contextlib.suppress(OSError, http.client.HTTPException):
            assert connection.getresponse().status == 413
        connection.close()
    other.join()
    assert len(gaps) >= 200 and max(gaps) < 2.0
    assert _memory(served) - before < 64 << 20


def _memory(served: Served) -> int:
    return int(Path(f"/proc/{served.process.pid}/statm").read_text().split()[1]) * 4096


def test_a_client_that_takes_nothing_is_cut(serve: Serve) -> None:
    served = serve("--fake-frames", "200000", idle_s=1.0)
    raw = json.dumps({**CHAT, "stream": True}).encode()
    with socket.socket() as lazy:
        lazy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        lazy.connect(("127.0.0.1", served.port))
        lazy.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(raw) + raw)
        served.wait(lambda: "airlock_clients_cut_total 1" in served.ask("GET", "/metrics")[1], 20)
        served.wait(lambda: any(r.get("aborted") for r in served.records()), 5)
    assert served.ask("POST", "/v1/chat/completions", CHAT)[0] == 200


def test_compressed_and_cut_bodies(front: Served) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", front.port, timeout=20)
    connection.request("POST", "/v1/chat/completions", b"\x1f\x8b" + b"0" * 100, {"Content-Encoding": "gzip"})
    assert connection.getresponse().status == 415
    with socket.create_connection(("127.0.0.1", front.port)) as cut:
        cut.sendall(b'POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{"me')
    front.wait(lambda: "airlock_requests_in_flight 0\n" in front.ask("GET", "/metrics")[1], 5)
    assert _chat(front)[0] == 200


def test_live_while_the_engine_loads_and_ready_soon_after_it(serve: Serve, tmp_path: Path) -> None:
    def took(number: int) -> tuple[float, float]:
        up = tmp_path / f"up{number}"
        served = serve("--fake-load-s", "1.5", "--fake-up", str(up), wait=False)
        waits = []
        for _ in range(20):
            began = time.monotonic()
            assert served.ask("GET", "/v1/health/live")[0] == 200
            waits.append(time.monotonic() - began)
        served.wait(served.ready)
        return sorted(waits)[10], time.time() - float(up.read_text())

    # Whatever else the machine does holds up one start, and not each of three; half a second is the test's own.
    assert any(live < 0.05 and late < 1.0 + 0.5 for live, late in map(took, range(3)))


def test_one_page_of_metrics(front: Served) -> None:
    _chat(front)
    status, page, headers = front.ask("GET", "/metrics")
    assert status == 200 and headers["Content-Type"].startswith("text/plain; version=0.0.4")
    for name in (
        "vllm:request_success_total",
        'airlock_requests_total{route="/v1/chat/completions",status="200"}',
        "airlock_first_byte_seconds_count",
    ):
        assert name in page
    assert page.count("# TYPE airlock_requests_total") == 1 and not page.startswith("\n") and "\n\n" not in page
