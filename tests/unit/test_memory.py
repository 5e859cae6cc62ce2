"""Memory estimates: the worked numbers of the formula, heads that are replicated, latents, windows; and what a precision asks of a GPU."""

from __future__ import annotations

import json
from dataclasses import fields, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from artifact.errors import Conflict, Invalid
from artifact.manifest import canonical_json
from artifact.profile import Memory, Pin, Profile, parse, spelling
from runtime import precision
from runtime.commands.explain import as_json, as_text
from runtime.filters import IDENTITY, Wanted, families, product
from runtime.hosts import named
from runtime.memory import need
from runtime.profiles import check_expected, select
from runtime.settings import from_environment
from runtime.tuning import parse_selector

GIB = 1 << 30
L40S, H100 = 48_305_799_168, 85_520_809_984
P8, P70 = 8_030_261_248, 70_553_706_496
SHAPE8, SHAPE70 = {"layers": 32, "kv_heads": 8, "head_dim": 128}, {"layers": 80, "kv_heads": 8, "head_dim": 128}


def made(memory: Memory, id_: str = "p", **tags: str) -> Profile:
    """A profile with these memory facts and tags."""
    return Profile(id_, {"llm_engine": "vllm", "precision": "bf16"} | tags, Pin("a/b", "sha256:" + "0" * 64), memory=memory)


@pytest.mark.parametrize(
    ("memory", "tp", "total", "weights", "per_token", "tokens"),
    [
        (Memory(2 * P8, **SHAPE8), 1, L40S, 14.96, 131_072, 200_144),
        (Memory(2 * P8, **SHAPE8), 1, H100, 14.96, 131_072, 461_344),
        (Memory(2 * P70, **SHAPE70), 2, H100, 68.34, 163_840, 19_248),
        (Memory(2 * P70, **SHAPE70), 4, H100, 34.17, 81_920, 486_368),
        (Memory(2 * P70, **SHAPE70), 8, H100, 17.08, 40_960, 1_420_592),
        (Memory(P70, **SHAPE70), 2, H100, 34.17, 163_840, 243_184),
        (Memory(1, layers=61, latent=576), 8, H100, 0.0, 70_272, 0),
        (Memory(724_288, layers=2, kv_heads=2, head_dim=32), 1, H100, 0.0, 512, 0),
    ],
)
def test_the_worked_numbers(memory: Memory, tp: int, total: int, weights: float, per_token: int, tokens: int) -> None:
    found = need(made(memory), tp, 1, length=10_000_000)
    assert found and round(found.weights / GIB, 2) == weights and found.per_token == per_token
    if tokens:
        assert found.longest(0.92 * total) == tokens


def test_one_gib_of_cache_of_the_tiny_model_holds_what_vllm_says() -> None:
    found = need(made(Memory(1, layers=2, kv_heads=2, head_dim=32)), 1, 1, length=2_097_152)
    assert found and found.kv == GIB  # vLLM prints "CPU KV cache size: 2,097,152 tokens" for 1 GiB


def test_heads_are_replicated_and_layers_divided() -> None:
    each = {(tp, pp): need(made(Memory(1, **SHAPE70)), tp, pp, length=16) for tp, pp in ((8, 1), (16, 1), (1, 3))}
    assert each[16, 1].per_token == each[8, 1].per_token  # type: ignore[union-attr]
    assert each[1, 3].per_token == 27 * 2 * 8 * 128 * 2  # type: ignore[union-attr]


def test_a_window_bounds_its_layers_and_whole_blocks_are_taken() -> None:
    found = need(made(Memory(1, layers=1, kv_heads=1, head_dim=1, sliding_layers=10, window=32)), 1, 1, length=1000)
    assert found and found.kv == 1008 * 4 + 32 * 40
    assert found.kv_of(17) == 32 * 4 + 32 * 40


def test_the_cache_has_the_width_that_the_engine_runs_with() -> None:
    """32 bit is never halved: vLLM keeps keys and values in the type that it computes in, unless the profile says fp8."""
    memory, pin = Memory(1, layers=1, kv_heads=1, head_dim=1), Pin("a/b", "d")
    cases = [({"precision": "fp32"}, {}, 8), ({"precision": "fp32"}, {"dtype": "bfloat16"}, 4), ({}, {"dtype": "float"}, 8)]
    cases += [({"precision": "fp32"}, {"kv_cache_dtype": "fp8_e4m3"}, 2), ({"precision": "fp16"}, {}, 4)]
    for tags, options, size in cases:
        assert need(Profile("p", tags, pin, options=options, memory=memory), 1, 1, length=16).per_token == size  # type: ignore[union-attr]


def test_weights_beyond_any_model_are_refused_by_the_document() -> None:
    entry = {"id": "1", "tags": {"tp": "2"}, "model": {"name": "a/b", "digest": "sha256:" + "0" * 64}, "weights_bytes": 10**400}
    with pytest.raises(Invalid, match="weights_bytes"):
        parse(json.dumps({"schema": 1, "model": "a/b", "profiles": [entry]}).encode())


def test_the_length_is_the_operators_then_the_profiles_then_the_models() -> None:
    profile = Profile("p", {}, Pin("a/b", "d"), None, {"max_model_len": "512"}, 5, Memory(context=4096, layers=1, kv_heads=1, head_dim=1))
    assert [need(profile, 1, 1, length=n).length for n in (0, 64)] == [512, 64]  # type: ignore[union-attr]
    assert need(Profile("p", {}, Pin("a/b", "d")), 1, 1) is None


def test_sequences_count_and_a_plan_that_does_not_fit_is_refused() -> None:
    profile = made(Memory(2 * P8, **SHAPE8, context=131072))
    assert select([profile], named("l40s"), Wanted(sequences=1)).length == 0
    refused = select([profile], named("l40s"), Wanted(sequences=2)).verdicts[0]
    assert refused.rule == "memory" and "32.0 GiB KV (2 x 131072 tokens)" in refused.reason and "NIM_MAX_MODEL_LEN=100064" in refused.reason


@pytest.mark.parametrize(
    ("text", "engine", "capability", "refused"),
    [
        ("nvfp4", "vllm", (9, 0), ""),
        ("nvfp4", "tensorrt_llm", (9, 0), "nvfp4 with tensorrt_llm needs compute capability 10.0; this GPU has 9.0"),
        ("mxfp4", "vllm", (7, 5), "mxfp4 with vllm needs compute capability 8.0; this GPU has 7.5"),
        ("awq", "vllm", (7, 0), "int4 with vllm needs compute capability 7.5; this GPU has 7.0"),
        ("fp8", "tensorrt_llm", (8, 0), "fp8 with tensorrt_llm needs compute capability 8.9; this GPU has 8.0"),
        ("fp8", "vllm", (8, 0), ""),
        ("BF16", "sglang", (7, 5), "bf16 with sglang needs compute capability 8.0; this GPU has 7.5"),
        ("fp16", "vllm", (7, 5), ""),
        ("bf16", "vllm", (0, 0), ""),
        ("whatever", "vllm", (1, 0), ""),
    ],
)
def test_what_a_precision_asks(text: str, engine: str, capability: tuple[int, int], refused: str) -> None:
    assert precision.refusal(text, engine, capability) == refused


def test_the_order_of_precisions() -> None:
    words = ["fp16", "int8", "mxfp4", "int4", "nvfp4", "fp8", "fp32", "other"]
    assert sorted(words, key=precision.rank) == ["nvfp4", "mxfp4", "int4", "fp8", "int8", "fp16", "fp32", "other"]
    assert precision.rank("bf16") == precision.rank("fp16") and precision.rank("gptq") == precision.rank("w4a16")
    found = select([made(Memory(), w, precision=w) for w in ("bf16", "fp8", "awq", "nvfp4")], named("t4"))
    assert [p.id for p in found.order] == ["nvfp4", "awq", "fp8"] and found.verdicts[-1].rule == "capability"


@pytest.mark.parametrize(
    "name",
    [
        "trtllm-h100-fp8-tp2-throughput",
        "tensorrt_llm-h100-fp8-tp2-throughput",
        "TensorRT-LLM-H100-fp8-tp2-pp1-throughput",
        "tensorrt_llm-h100-fp8-tp2-pp1-throughput-2330:10de-abc-2",
        "trt_llm-h100-fp8-tp2-throughput",
    ],
)
def test_names_in_every_spelling(name: str) -> None:
    tags = {"llm_engine": "tensorrt_llm", "gpu": "H100", "precision": "fp8", "tp": "2", "profile": "throughput"}
    more = {"gpu_device": "2330:10de", "nim_workspace_hash_v1": "abc", "number_of_gpus": "2"}
    profile = Profile("x", tags | more, Pin("a/b", "d"))
    assert profile.answers_to(name) and profile.short == "trtllm-h100-fp8-tp2-throughput"
    assert not profile.answers_to(name[:-1]) and not profile.answers_to("")


def test_pp_is_kept_where_it_is_more_than_one() -> None:
    assert spelling("vllm-bf16-tp2-pp12") == "vllm-bf16-tp2-pp12" and spelling("vllm-bf16-tp2-pp1-lora") == "vllm-bf16-tp2-lora"


def test_a_selector_filters_and_one_that_nothing_has_is_an_error() -> None:
    both = [made(Memory(), "a", tp="1"), made(Memory(), "b", precision="fp8", tp="1")]
    found = select(both, named("h100"), Wanted(selector=parse_selector("precision=bfloat16, tp=1", "X")))
    assert [p.id for p in found.order] == ["a"] and found.verdicts[1].reason == "NIM_TAGS_SELECTOR asks for precision=bfloat16; it has fp8"
    with pytest.raises(Invalid, match="Could not match a profile in manifest"):
        select(both, named("h100"), Wanted(selector=(("tp", "7"),)))
    for text in ("tp", "=1", "tp="):
        with pytest.raises(Invalid, match="NIM_TAGS_SELECTOR"):
            from_environment({"NIM_TAGS_SELECTOR": text}, "a/b")


@pytest.mark.parametrize("expect", ["a", "vllm-bf16-tp1", "vllm-bf16-tp1-pp1", "precision=bf16,tp=1", ""])
def test_what_is_expected_passes(expect: str) -> None:
    check_expected(select([made(Memory(), "a")], named("h100")), expect)


def test_anything_else_than_expected_is_a_conflict_that_says_why() -> None:
    selection = select([made(Memory(), "a"), made(Memory(), "b", tp="2")], named("h100"))
    with pytest.raises(Conflict, match=r"b \(vllm-bf16-tp2\): it needs 2 GPU\(s\)") as caught:
        check_expected(selection, "vllm-bf16-tp2")
    assert caught.value.reason == "profile_unexpected"
    with pytest.raises(Conflict, match="No profile of the manifest"):
        check_expected(selection, "vllm-bf16-tp3")


def test_standing() -> None:
    trt = {"llm_engine": "tensorrt_llm", "gpu": "H100", "precision": "fp8", "tp": "1"}
    plain, built = made(Memory(), "v"), Profile("t", trt, Pin("a/b", "d"))
    assert select([plain], named("a100-80")).standing == "expected"
    assert select([plain, built], named("a100-80")).why.startswith("fallback: no tensorrt_llm profile for A100 in this manifest: ")
    assert select([plain, built], named("h100-nvl")).standing == "fallback: no tensorrt_llm profile for H100 NVL in this manifest"
    assert select([plain, built], named("h100")).standing == "expected"
    assert select([plain, built], named("h100"), Wanted(pin="v")).standing == "pinned"
    engines = Wanted(engines=frozenset({"vllm"}))
    assert select([plain, built], named("h100"), engines).standing.startswith("fallback: tensorrt_llm-h100-fp8-tp1 is refused (its engine")
    shape = Memory(16 * GIB, **SHAPE8, context=1 << 20)
    short, wide = Profile("t", trt | {"gpu": "L40S"}, Pin("a/b", "d"), memory=shape), made(shape, "v", tp="8")
    cut = "fallback: tensorrt_llm-l40s-fp8-tp1 would hold 191600 of the 1048576 tokens wanted"
    assert select([short, wide], named("l40sx8")).standing == cut
    large = made(Memory(90 * GIB), "l", precision="fp8")
    assert select([plain, large], named("h100")).standing == "fallback: vllm-fp8-tp1 is short by 18.7 GiB per GPU"


@pytest.mark.parametrize(
    ("pattern", "name", "same"),
    [
        ("^NVIDIA-A10(?!0).*", "NVIDIA A10G", True),
        ("^NVIDIA-A10(?!0).*", "NVIDIA A100-SXM4-80GB", False),
        ("^NVIDIA-L4(?!0S).*", "NVIDIA L40S", False),
        ("NVIDIA L4", "NVIDIA L4", True),
        ("(.|.|.|.)*x", "NVIDIA L4" * 5, False),
        ("a" * 300, "a" * 300, False),
    ],
)
def test_product_patterns_of_other_nims(pattern: str, name: str, same: bool) -> None:
    assert product(pattern, name) is same


def test_slices_take_profiles_that_were_built_for_no_product() -> None:
    node = named("h100-mig")
    assert select([made(Memory(2 * P8, **SHAPE8, context=8192))], node).gpus == node.gpus[:1]
    assert select([made(Memory(), gpu="H100")], node).verdicts[0].rule == "identity"
    assert select([made(Memory(), tp="2")], node).verdicts[0].rule == "mig"
    assert "rtx6000ada" in families("NVIDIA RTX 6000 Ada Generation")


def test_linked_gpus_go_together() -> None:
    node = named("h100-nvlx4")
    pair = select([made(Memory(), tp="2")], node)
    assert [g.index for g in pair.gpus] == [0, 1] and not pair.notes
    four = select([made(Memory(), tp="4")], node)
    assert any("no NVLink joins" in note for note in four.notes)
    crossed = {0: (), 1: (3,), 2: (), 3: (1,)}
    gpus = tuple(replace(g, peers=crossed[g.index]) for g in node.gpus)
    assert [g.index for g in select([made(Memory(), tp="2")], replace(node, gpus=gpus)).gpus] == [1, 3]


WORDS = st.sampled_from(["", "1", "0", "8", "fp8", "vllm", "H100", "true", "cpu", "gpu", "(((", "9" * 50, "ö", "2330:10de", "^(a|b)*", "9.0"])
TAGS = st.dictionaries(st.sampled_from(["tp", "pp", "precision", "profile", "device", "llm_engine", "feat_lora", "number_of_gpus", *IDENTITY]), WORDS)
NUMBERS = st.sampled_from([0, 1, 7, 4096, (1 << 31) - 1])
FACTS = st.fixed_dictionaries({f.name: NUMBERS for f in fields(Memory) if f.name != "kv_bytes"})
OPTIONS = st.fixed_dictionaries({}, optional={"max_model_len": st.sampled_from(["1", "0", "9" * 5000])})


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(TAGS, st.none() | FACTS, OPTIONS), min_size=1, max_size=4), st.sampled_from(["h100x8", "h100-mig", "gb10", "l4x1,l40s", "cpu"])
)
def test_no_document_breaks_the_choice(items: list[tuple[dict[str, str], dict[str, int] | None, dict[str, str]]], host: str) -> None:
    entries = [
        {"id": str(i), "tags": t, "model": {"name": "a/b", "digest": "sha256:" + "0" * 64}, "options": o} | ({"memory": m} if m is not None else {})
        for i, (t, m, o) in enumerate(items)
    ]
    found = parse(canonical_json({"schema": 1, "model": "a/b", "profiles": entries})).profiles
    selection = select(found, named(host))
    assert len(selection.verdicts) == len(found) and {p.id for p, _ in selection.rejected} | {p.id for p in selection.order[:1]} == {
        p.id for p in found
    }
    assert as_text(selection, named(host), "x") and as_json(selection, named(host), "x")
