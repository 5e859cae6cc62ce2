"""Profile choice: the real lists of NIM 1.1.2 and 1.3 (nim-container.md section 6) and each filter with its sentence."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from artifact.errors import Invalid, NotFound
from artifact.manifest import canonical_json
from artifact.profile import Pin, Profile, build, parse
from registry.commands import model
from runtime.filters import families
from runtime.node import Facts, Gpu
from runtime.profiles import SEED_LINE, Wanted, require, select

DIGEST = "sha256:" + "1" * 64
GIB = 1 << 30

L40S_LIST = """
0494aafce0df9eeaea49bbca6b25fc3013d0e8a752ebcf191a2ddeaab19481ee tensorrt_llm-l40s-bf16-tp2-latency
a534b0f5e885d747e819fa8b1ad7dc1396f935425a6e0539cb29b0e0ecf1e669 tensorrt_llm-l40s-bf16-tp2-throughput
3807be802a8ab1d999bf280c96dcd8cf77ac44c0a4d72edb9083f0abb89b6a19 tensorrt_llm-l40s-bf16-tp1-throughput
6a3ba475d3215ca28f1a8c8886ab4a56b5626d1c98adbfe751025e8ff3d9886d vllm-fp16-tp2
3bb4e8fe78e5037b05dd618cebb1053347325ad6a1e709e0eb18bb8558362ac5 vllm-fp16-tp1
6b89dc22ba60a07df3051451b7dc4ef418d205e52e19cb0845366dc18dd61bd6 tensorrt_llm-l40s-bf16-tp2-throughput-lora
a95e5c7221dae587b4fc32448df265320ce79064a970297649d97a84eb9dc3ba vllm-fp16-tp2-lora
dfd9bee71abb7582246f7fb8c2aedd9119909b9639e1b4b0260ef6865545ede7 vllm-fp16-tp1-lora
0bc4cc784e55d0a88277f5d1aeab9f6ecb756b9049dd07c1835035211fcfe77e tensorrt_llm-h100-fp8-tp2-latency
2959f7f0dfeb14631352967402c282e904ff33e1d1fa015f603d9890cf92ca0f tensorrt_llm-h100-fp8-tp1-throughput
4829bb6204dd994f8448ae7fb2cec9d4c6933c382f84463176a5b5cd76cb73c8 tensorrt_llm-a100-fp16-tp2-latency
e45b4b991bbc51d0df3ce53e87060fc3a7f76555406ed534a8479c6faa706987 tensorrt_llm-a10g-bf16-tp4-latency
7f98797c334a8b7205d4cbf986558a2b8a181570b46abed9401f7da6d236955e tensorrt_llm-h100-bf16-tp2-latency
ba515cc44a34ae4db8fe375bd7e5ad30e9a760bd032230827d8a54835a69c409 tensorrt_llm-a10g-bf16-tp2-throughput
7ea3369b85d7aee24e0739df829da8832b6873803d5f5aca490edad7360830c8 tensorrt_llm-a100-bf16-tp1-throughput
9cff0915527166b2e93c08907afd4f74e168562992034a51db00df802e86518c tensorrt_llm-h100-bf16-tp1-throughput
ec13a06451be8a6e1d8aa4e7a6010f970e0d150a44ce6e6012149c9e60ae3529 vllm-fp16-tp8
407c6c5d1e29be9929f41b9a2e3193359b8ebfa512353de88cefbf1e0f0b194e vllm-fp16-tp4
fcfdd389299632ae51e5560b3368d18c4774441ef620aa1abf80d7077b2ced2b tensorrt_llm-a10g-bf16-tp4-throughput-lora
a506c5bed39ba002797d472eb619ef79b1ffdf8fb96bb54e2ff24d5fc421e196 tensorrt_llm-a100-bf16-tp1-throughput-lora
40543df47628989c7ef5b16b33bd1f55165dddeb608bf3ccb56cdbb496ba31b0 tensorrt_llm-h100-bf16-tp1-throughput-lora
d3711d1ebdbe7798834c684c01c10b1091ebef28d1e609b971ecbe6b8c02e05a vllm-fp16-tp8-lora
678e6dbe53dd6fe7dc508d22eb0672743ba0b7e735007cfd0b0d2a9e05911fb9 vllm-fp16-tp4-lora
"""
L4_LIST = """
4e0d43c3245d0232d32bcca05648c98a70e9692518701cdd0cfd987acf5a3cfa tensorrt_llm-trtllm_buildable-bf16-tp4
b7b6fa584441d9536091ce5cf80ccc31765780b8a46540da4e7bada5c5108ed9 tensorrt_llm-trtllm_buildable-bf16-tp2
7cc8597690a35aba19a3636f35e7f1c7e7dbc005fe88ce9394cad4a4adeed414 tensorrt_llm-trtllm_buildable-bf16-tp1
96e7cd0991f4ab5cf47a08cce8d1169daa8a431485be805fb00de0638bdeed9d vllm-bf16-tp4
395082aa40085d35f004dd3056d7583aea330417ed509b4315099a66cfc72bdd vllm-bf16-tp2
193649a2eb95e821309d6023a2cabb31489d3b690a9973c7ab5d1ff58b0aa7eb vllm-bf16-tp1
"""


def profile(id_: str, description: str, weights: int = 0, **more: str) -> Profile:
    """A profile with the tags that its NIM description states."""
    tags = {"llm_engine": description.split("-")[0]}
    for word in description.split("-")[1:]:
        if match := re.fullmatch(r"(tp|pp)(\d+)", word):
            tags[match[1]] = match[2]
        elif word in ("bf16", "fp16", "fp8", "nvfp4"):
            tags["precision"] = word
        elif word in ("latency", "throughput"):
            tags["profile"] = word
        elif word == "lora":
            tags["feat_lora"] = "true"
        elif word == "trtllm_buildable":
            tags["trtllm_buildable"] = "true"
        elif word == "cpu":
            tags["device"] = "cpu"
        else:
            tags["gpu"] = word.upper()
    return Profile(id_, tags | more, Pin("acme/tiny", DIGEST), weights_bytes=weights)


def listed(text: str, weights: int = 0) -> list[Profile]:
    rows = [line.split() for line in text.split("\n") if line]
    out = [profile(i, d, weights) for i, d in rows]
    assert [p.description for p in out] == [d for _, d in rows]
    return list(reversed(out))  # the order of the manifest must not matter


def node(*gpus: tuple[str, str, float], free: float = 0.99) -> Facts:
    made = (Gpu(i, f"GPU-{i}", name, device, (9, 0), int(gib * GIB), int(gib * GIB * free)) for i, (name, device, gib) in enumerate(gpus))
    return Facts(False, tuple(made), "550.163.01", "12.4")


L40S = ("NVIDIA L40S", "26b9:10de", 45.0)
L4 = ("NVIDIA L4", "27b8:10de", 22.5)
H100 = ("NVIDIA H100 80GB HBM3", "2330:10de", 79.6)


def test_two_l40s_give_the_list_that_nim_1_1_2_prints() -> None:
    chosen = select(listed(L40S_LIST), node(L40S, L40S))
    ids = [line.split()[0] for line in L40S_LIST.split("\n") if line]
    assert [p.id for p in chosen.order] == ids[:5]
    assert chosen.selected and chosen.selected.id == ids[0]
    assert chosen.line == f"Selected profile: {ids[0]} (tensorrt_llm-l40s-bf16-tp2-latency)"
    assert {p.id for p, _ in chosen.rejected} == set(ids[1:])
    reasons = {p.description: r for p, r in chosen.rejected}
    assert reasons["vllm-fp16-tp8"] == "it needs 8 GPU(s) (tp x pp); 2 present"
    assert "built for H100; this node has NVIDIA L40S [26b9:10de]" in reasons["tensorrt_llm-h100-fp8-tp1-throughput"]
    assert "LoRA is not enabled" in reasons["vllm-fp16-tp1-lora"]
    assert "optimised for throughput, latency goes first" in reasons["tensorrt_llm-l40s-bf16-tp2-throughput"]


def test_lora_is_two_way() -> None:
    chosen = select(listed(L40S_LIST), node(L40S, L40S), Wanted(lora=True))
    assert [p.id[:8] for p in chosen.order] == ["6b89dc22", "a95e5c72", "dfd9bee7"]


def test_four_l4_give_the_order_that_nim_1_3_logs() -> None:
    ids = [line.split()[0] for line in L4_LIST.split("\n") if line]
    everything = listed(L4_LIST)
    assert [p.id for p in select(everything, node(L4, L4, L4, L4)).order] == ids
    assert select(everything, node(L4, L4)).selected.id == ids[1]  # type: ignore[union-attr]
    assert select(everything, node(L4, L4, L4, L4), Wanted(engines=frozenset({"vllm"}))).selected.id == ids[3]  # type: ignore[union-attr]


def test_memory_is_judged_with_numbers() -> None:
    big = [profile("a" * 64, "vllm-bf16-tp1", 131 * GIB), profile("b" * 64, "vllm-bf16-tp4", 131 * GIB)]
    alone = select(big, node(("NVIDIA A100-SXM4-40GB", "20b0:10de", 40.0)))
    with pytest.raises(NotFound) as caught:
        require(alone)
    assert caught.value.reason == "no_profile"
    assert caught.value.what.startswith(SEED_LINE)
    text = dict((p.description, r) for p, r in alone.rejected)["vllm-bf16-tp1"]
    assert "133.0 GiB per GPU needed" in text and "36.8 GiB usable (0.92 of 40.0 GiB); short by 96.2 GiB" in text
    four = select(big, node(H100, H100, H100, H100))
    assert (
        four.selected
        and four.selected.tags["tp"] == "4"
        and "36.1 GiB per GPU needed (34.1 GiB weights (1/4 and 4%) + 2.0 GiB overhead), 73.2 GiB usable" in four.why
    )
    assert select(big, node(H100), Wanted(relax_memory=True)).selected is big[0]


def test_a_busy_gpu_is_passed_over_or_named() -> None:
    small = [profile("a" * 64, "vllm-bf16-tp1", 20 * GIB)]
    busy = node(H100, free=0.2)
    assert "low free GPU memory: 22.0 GiB per GPU needed, at most 15.9 GiB free" in select(small, busy).rejected[0][1]
    half = select(small, node(H100, free=0.5))
    assert half.selected and half.share == pytest.approx(0.48, abs=0.001)
    mixed = Facts(False, (busy.gpus[0], node(H100, H100).gpus[1]))
    assert [g.index for g in select(small, mixed).gpus] == [1]


def test_mixed_gpus_offer_no_profile_over_several() -> None:
    chosen = select(listed(L4_LIST), node(L4, L40S))
    assert [p.tags["tp"] for p in chosen.order] == ["1", "1"]
    assert any("must be alike; this node mixes 1x NVIDIA L4, 1x NVIDIA L40S" in r for _, r in chosen.rejected)


def test_cpu_profiles_only_without_a_library_and_last() -> None:
    both = [profile("c" * 64, "vllm-cpu-bf16-tp1"), profile("d" * 64, "vllm-bf16-tp1")]
    on_cpu = select(both, Facts(cpu=True))
    assert on_cpu.selected is both[0] and on_cpu.gpus == ()
    assert on_cpu.rejected == ((both[1], "it needs 1 GPU(s); this node has no NVIDIA library and so 0 GPUs"),)
    assert select(both, node(H100)).selected is both[1]
    empty = select(both, Facts(cpu=False, hidden="1 of 1 GPU(s) are hidden by CUDA_VISIBLE_DEVICES or NVIDIA_VISIBLE_DEVICES"))
    assert empty.selected is None and "hidden by CUDA_VISIBLE_DEVICES" in empty.rejected[0][1]


@pytest.mark.parametrize("pin", ["tensorrt_llm-l40s-bf16-tp1-throughput", "trtllm-l40s-bf16-tp1-throughput"])
def test_a_pin_by_description_in_both_spellings_equals_the_id(pin: str) -> None:
    everything, facts = listed(L40S_LIST), node(L40S, L40S)
    by_id = select(everything, facts, Wanted(pin="3807be802a8ab1d999bf280c96dcd8cf77ac44c0a4d72edb9083f0abb89b6a19"))
    assert select(everything, facts, Wanted(pin=pin)).selected is by_id.selected


@pytest.mark.parametrize("pin", ["auto", "vllm-fp16-tp", "0494aafc", "vllm-fp16-tp3"])
def test_a_pin_that_names_nothing_lists_the_valid_values(pin: str) -> None:
    with pytest.raises(Invalid) as caught:
        select(listed(L40S_LIST), node(L40S, L40S), Wanted(pin=pin))
    assert "407c6c5d1e29be9929f41b9a2e3193359b8ebfa512353de88cefbf1e0f0b194e (vllm-fp16-tp4)" in caught.value.expected


def test_a_pinned_profile_that_does_not_fit_is_never_replaced() -> None:
    chosen = select(listed(L40S_LIST), node(L40S, L40S), Wanted(pin="vllm-fp16-tp8"))
    assert chosen.selected is None and chosen.order


def test_a_description_of_two_profiles_is_refused_with_both() -> None:
    twins = [profile("a" * 64, "vllm-bf16-tp1"), profile("b" * 64, "vllm-bf16-tp1")]
    with pytest.raises(Invalid, match=f"{'a' * 64}, {'b' * 64}"):
        select(twins, node(H100), Wanted(pin="vllm-bf16-tp1"))


@pytest.mark.parametrize("tags", [{"tp": "0"}, {"tp": "x"}, {"tp": "9" * 9}, {"number_of_gpus": "3"}, {"device": "tpu"}, {"gpu_device": "2331:10de"}])
def test_senseless_or_foreign_tags_are_refused_with_a_sentence(tags: dict[str, str]) -> None:
    chosen = select([profile("a" * 64, "vllm-bf16-tp1", **tags)], node(H100))
    assert chosen.selected is None and len(chosen.rejected[0][1]) > 20


def test_families_tell_similar_products_apart() -> None:
    assert "h100" in families("NVIDIA H100 80GB HBM3") and "h100" not in families("NVIDIA H100 NVL")
    assert "h100nvl" in families("NVIDIA H100 NVL") and "a10" not in families("NVIDIA A10G")
    assert "a100" in families("NVIDIA A100-SXM4-80GB") and "l4" not in families("NVIDIA L40S")


DIGEST = "sha256:" + "a" * 64
TAGS: dict[str, object] = {"llm_engine": "vllm"}


@pytest.mark.parametrize(
    "wanted",
    [
        {"id": "../x"},
        {"id": "a b"},
        {"id": "x" * 129},
        {"id": 10**5000},
        {"id": ["x"]},
        {"options": {"dtype": "--trust-remote-code"}},
        {"tags": {"llm_engine": "vllm", "gpu": "\x1b[2J"}},
        {"tags": {"llm_engine": "vllm", "gpu": "H100\nSelected profile: x"}},
        {"options": {"max_model_len": "12k"}},
        {"options": {"max_model_len": "٣"}},
        {"options": {"max_model_len": ""}},
        {"options": {"max_model_len": 10**5000}},
    ],
)
def test_ids_and_options_that_a_command_line_could_misread_are_refused(wanted: dict[str, object]) -> None:
    with pytest.raises(Invalid):
        build("acme/tiny", DIGEST, [{"tags": TAGS, **wanted}], 1)
    if not any(isinstance(v, int) for v in (wanted.get("id"), *dict(wanted.get("options") or {}).values())):  # type: ignore[call-overload]
        entry = {"id": "x", "tags": TAGS, "model": {"name": "acme/tiny", "digest": DIGEST}, **wanted}
        with pytest.raises(Invalid):
            parse(canonical_json({"schema": 1, "model": "acme/tiny", "profiles": [entry]}))


@pytest.mark.parametrize(
    ("wanted", "word"),
    [
        ({"option": {"task": "embed"}}, "option"),
        ({"options": {"max_model_length": 512}}, "max_model_length"),
        ({"options": {"task": "embedd"}}, "generate or embed"),
        ({7: "x"}, "7"),
    ],
)
def test_a_misspelt_word_of_an_author_is_refused_naming_what_is_known(wanted: dict[object, object], word: str) -> None:
    with pytest.raises(Invalid) as refused:
        build("acme/tiny", DIGEST, [{"tags": TAGS, **wanted}], 1)  # type: ignore[dict-item]
    assert word in str(refused.value)


def test_ids_and_options_that_are_accepted() -> None:
    found = parse(build("acme/tiny", DIGEST, [{"id": 7, "tags": TAGS, "options": {"max_model_len": 512, "task": "embed"}}], 1)).profiles[0]
    assert (found.id, found.options) == ("7", {"max_model_len": "512", "task": "embed"})


@pytest.mark.parametrize(
    "text", ["x: 2001-13-45", "x: " + "9" * 6000, "x: !!timestamp y", "x: !!bool y", "x: 0001-01-01 00:00:00 +05:00", "[", "x: \x00"]
)
def test_an_authors_file_that_is_no_profile_list_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "p.yaml").write_text(text)
    with pytest.raises(Invalid, match=r"p\.yaml"):
        model.main(["push", str(tmp_path), "acme/tiny:1", "--registry", "http://127.0.0.1:1", "--profiles", str(tmp_path / "p.yaml")])
