"""The pure parts of the front: any JSON gives a checked request or a refusal; the gate; the store; the callers' verdicts."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from artifact.errors import Denied, Invalid, Unauthenticated, Unavailable
from runtime.bounds import Limits, asks_callers, limits
from runtime.front import callers
from runtime.front.controls import parse_body, prepare, ranked, renamed, written
from runtime.front.errors import Refused, read_error
from runtime.front.figures import Figures
from runtime.front.gate import Gate
from runtime.front.settings import ServeSettings
from runtime.front.stored import Kept, Stored
from runtime.front.vocabulary import CHAT, COMPLETIONS, FIELDS, GUIDED, POSTED
from runtime.node import Gpu

MODELS = {"m": {"model": "engine"}, "lora": {"model": "engine", "lora_path": "x"}}
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(max_size=8)
    | st.sampled_from(["m", "NONE", "data:image/png;base64,"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["type", "text", "url", "image_url", "content", "role", "a"]), inner, max_size=4)
    ),
    max_leaves=8,
)
WORDS = sorted({w for routes in FIELDS.values() for known in routes.values() for w in known} | set(GUIDED) | {"nvext", "truncate", "input_type"})


@pytest.mark.slow
@settings(max_examples=600, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(st.sampled_from(WORDS), JSON, max_size=6), st.sampled_from(POSTED), st.sampled_from(sorted(FIELDS)))
def test_any_json_is_refused_or_becomes_a_request(body: dict[str, Any], route: str, engine: str) -> None:
    body.pop("model", None)
    with suppress(Refused):
        asked = prepare(route, parse_body(json.dumps(body).encode()), MODELS, engine)
        assert json.loads(written(asked.body))["model"] == "engine" and set(asked.body) - {"model", "store", "documents", "use_activation"} <= FIELDS[
            engine
        ][route] | {
            "truncate_prompt_tokens",
            "truncation_side",
            "query",
        }


def test_another_engine_gets_its_own_words() -> None:
    asked = prepare(COMPLETIONS, {"prompt": "x", "guided_choice": ["a.b", "c"]}, MODELS, "sglang")
    assert asked.body["regex"] == r"(a\.b|c)"
    schema = prepare(CHAT, {"messages": [], "guided_json": '{"type":"object"}'}, MODELS, "tensorrt_llm").body["response_format"]
    assert schema == {"type": "json_schema", "json_schema": {"name": "guided", "schema": {"type": "object"}}}
    with pytest.raises(Refused, match="one guided"):
        prepare(CHAT, {"guided_json": {}, "guided_regex": "x"}, MODELS, "sglang")
    with pytest.raises(Refused, match="guided_json is no schema: it is not valid JSON"):
        prepare(CHAT, {"guided_json": "{"}, MODELS, "sglang")
    for asks in ({"max_thinking_tokens": 3}, {"nvext": {"max_thinking_tokens": 3}}):
        with pytest.raises(Refused, match="'max_thinking_tokens' is not supported by sglang"):  # as the caller spelt it
            prepare(CHAT, asks, MODELS, "sglang")
    with pytest.raises(Refused, match="does not support /tokenize"):
        prepare("/tokenize", {}, MODELS, "tensorrt_llm")


def test_an_adapters_name_is_put_into_the_engines_words() -> None:
    assert prepare(CHAT, {"model": "lora", "messages": []}, MODELS).body == {"model": "engine", "lora_path": "x", "messages": []}
    assert renamed(b'{"model":"engine","text":"\\"model\\":\\"engine\\""}', "engine", "m") == b'{"model":"m","text":"\\"model\\":\\"engine\\""}'


@pytest.mark.parametrize("raw", [b"{}", b'{"results":[{"index":"x"}]}', b"nope", b"[1]", b'{"results":7}'])
def test_a_ranking_that_is_none(raw: bytes) -> None:
    with pytest.raises(Refused) as refused:
        ranked(raw)
    assert refused.value.status == 502


@pytest.mark.parametrize(
    ("status", "raw", "told"),
    [
        (404, b'{"detail":"Not Found"}', "does not support this route"),
        (401, b'{"error":"Unauthorized"}', "Unauthorized"),
        (400, b'{"message":"bad /w/x","type":"T","code":400}', "bad there"),
        (400, b'{"error":{"message":"m"}}', "m"),
        (400, b"[" * 100_000, "refused"),
        (200 + 6, b"", "status 206"),
        (500, b"<html>", "no error of its API"),
    ],
)
def test_each_shape_of_an_engines_error(status: int, raw: bytes, told: str) -> None:
    found = read_error(status, raw, "m", lambda text: text.replace("/w/x", "there"))
    assert told in str(found) and found.status >= 400


def test_the_gate_gives_places_in_order_and_counts_bytes() -> None:
    async def story() -> list[str]:
        gate, said, go = Gate(Limits(requests=1, queued=3, queue_s=5, bodies_bytes=100)), list[str](), asyncio.Event()

        async def one(name: str) -> None:
            async with gate.place():
                said.append(name)
                await go.wait()

        first, *rest = [asyncio.create_task(one(name)) for name in ("a", "b", "c", "d")]
        await asyncio.sleep(0)
        assert gate.waiting == 3
        with pytest.raises(Refused, match="full"):
            await one("e")
        rest[0].cancel()
        go.set()
        await asyncio.gather(first, *rest, return_exceptions=True)
        assert (gate.active, gate.waiting, gate.refused) == (0, 0, 1)
        one_body, another = gate.hold(), gate.hold()
        one_body.more(60)
        another.more(40)
        with pytest.raises(Refused, match="bodies"):
            another.more(1)
        one_body.free()
        one_body.free()
        another.more(1)
        assert gate.bytes == 41
        return said

    assert asyncio.run(story()) == ["a", "c", "d"]


def test_the_store_forgets_the_oldest_but_nothing_that_runs() -> None:
    stored = Stored(Limits(stored=2, stored_bytes=1 << 20))
    for i, status in enumerate(("in_progress", "completed", "completed", "completed")):
        stored.put(Kept("me", {"id": f"r{i}", "status": status}, []))
    for key, there in (("r0", True), ("r1", False), ("r2", False), ("r3", True)):
        if there:
            assert stored.get(key, "me").body["id"] == key
        else:
            with pytest.raises(Refused):
                stored.get(key, "me")
    with pytest.raises(Refused) as other:
        stored.get("r3", "you")
    assert other.value.status == 404
    stored.remove("r3", "me")
    assert len(stored) == 1 and stored.bytes > 0


def _standing(**more: object) -> dict[str, object]:
    grant = {"grant_id": "g", "models": ["acme/*"], "actions": ["run"], "ends": "2027-01-01T00:00:00Z"}
    return {"org": "acme", "key_id": "k", "tier": "x", "now": "2026-01-01T00:00:00Z", "revocation_serial": 0, "grants": [grant], **more}


KEY = "Bearer nvapi-" + "x" * 30


def test_guessed_keys_hold_up_no_good_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(callers, "KNOWN", 4)
    held = threading.Event()

    def ask(key: str) -> Mapping[str, object]:
        if key.startswith("slow"):
            held.wait(10)
        if key != KEY.partition(" ")[2]:
            raise Unauthenticated("no")
        return _standing()

    async def story() -> None:
        kept = callers.Callers(ask, "acme/m")

        async def guess(key: str) -> None:
            with suppress(Refused):
                await kept.check(f"Bearer {key}")

        who = await kept.check(KEY)
        for i in range(8):
            await guess(f"guessed-{i:020}")
        assert who in kept._good, "a flood of guesses pushed a good verdict out"
        monkeypatch.setattr(callers, "GOOD_S", 0.0)
        flood = [asyncio.create_task(guess(f"slow-{i:020}")) for i in range(20)]
        await asyncio.sleep(0.05)
        assert await asyncio.wait_for(kept.check(KEY), 5) == who
        held.set()
        await asyncio.gather(*flood)

    asyncio.run(story())


def test_verdicts_on_callers() -> None:
    asked: list[str] = []
    answers: list[Mapping[str, object] | Exception] = []

    def ask(key: str) -> Mapping[str, object]:
        asked.append(key)
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def verdict(answer: Mapping[str, object] | Exception, model: str = "acme/m") -> int:
        answers[:] = [answer]
        try:
            return 200 if await callers.Callers(ask, model).check(KEY) else 0
        except Refused as e:
            return e.status

    async def story() -> None:
        assert await verdict(_standing()) == 200
        assert await verdict(_standing(), "other/m") == 403
        assert await verdict(_standing(key_ends="2025-01-01T00:00:00Z")) == 403
        assert await verdict(_standing(grants=[])) == 403
        assert await verdict(Unauthenticated("no")) == 401
        assert await verdict(Denied("no")) == 403
        assert await verdict(Unavailable("away")) == 503
        kept = callers.Callers(ask, "acme/m")
        answers[:] = [_standing(), Unavailable("away")]
        who = await kept.check(KEY)
        before = len(asked)
        assert await kept.check(KEY) == who and len(asked) == before and "nvapi" not in who
        kept._good[who] = (kept._good[who][0] - 100, 200)  # past its time, and the registry is away: it stands
        assert await kept.check(KEY) == who and len(asked) == before + 1
        for bad in ("", "Basic abc", "Bearer short", "Bearer " + "ü" * 40):
            with pytest.raises(Refused) as e:
                await kept.check(bad)
            assert e.value.status == 401

    asyncio.run(story())


def test_kv_headroom_and_gpu_memory_on_the_page(caplog: pytest.LogCaptureFixture) -> None:
    bounds = Limits()
    gpus = [Gpu(0, "GPU-1", "H100", "", total=80 << 30, free=8 << 30)]
    idle = [Gpu(0, "GPU-1", "H100", "", total=80 << 30, free=79 << 30)]
    figures = Figures(ServeSettings("", 0, ("m",), "", "", ""), Gate(bounds), Stored(bounds), lambda: gpus, idle)
    asyncio.run(figures._measure())
    gpus[:] = [Gpu(0, "GPU-1", "H100", "", total=80 << 30, free=20 << 30)]
    asyncio.run(figures._measure())

    def page(used: float) -> str:
        text = f'vllm:kv_cache_usage_perc{{engine="0",model_name="m"}} {used}\n'
        return figures.page(text, "vllm", ready=True, restarts=0, in_flight=0, slow=0, key=())

    assert "airlock_kv_headroom_low 0" in page(0.5) and "airlock_kv_headroom_low 1" in page(0.95) and "airlock_kv_headroom_low 1" in page(0.8)
    assert "airlock_kv_headroom_low 0" in page(0.7) and caplog.text.count("KV headroom") == 1
    for of, gib in (("total", 80), ("idle", 1), ("used", 60), ("peak", 72)):
        assert f'airlock_gpu_memory_bytes{{gpu="0",uuid="GPU-1",of="{of}"}} {gib << 30}\n' in page(0.1)


def test_bounds_from_the_environment() -> None:
    assert limits({"AIRLOCK_MAX_BODY_MB": "2", "AIRLOCK_QUEUE_S": "0"}) == Limits(body_bytes=2 << 20, queue_s=0)
    for name, text in (("AIRLOCK_MAX_BODY_MB", "0"), ("AIRLOCK_MAX_REQUESTS", "x"), ("AIRLOCK_MAX_BODIES_MB", "1")):
        with pytest.raises(Invalid, match=name):
            limits({name: text})
    assert asks_callers({"AIRLOCK_CALLER_KEYS": "1"}) and not asks_callers({})
    with pytest.raises(Invalid):
        asks_callers({"AIRLOCK_CALLER_KEYS": "enabled"})
