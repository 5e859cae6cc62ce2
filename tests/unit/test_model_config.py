"""What a model directory tells: real shapes of config.json and quantisation, the profiles made of it, and directories that are hostile."""

from __future__ import annotations

import json
import os
import resource
import struct
import time
from dataclasses import replace
from pathlib import Path

import pytest

from artifact import model_dir, profile
from artifact.errors import AirlockError, Invalid, NotFound, TooLarge
from artifact.model_config import MAX_HEADER, read_config, tensor_bytes
from artifact.profile import Memory, Quantization
from runtime import checkpoint
from runtime.commands import profile_make

LLAMA: dict[str, object] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "hidden_size": 4096,
    "max_position_embeddings": 131072,
    "torch_dtype": "bfloat16",
}
SHAPE = Memory(layers=32, kv_heads=8, head_dim=128, context=131072)


def safetensors(tensors: dict[str, tuple[str, list[int], int]], *, extra: bytes = b"") -> bytes:
    """A safetensors file of tensors (dtype, shape, bytes), packed one after another."""
    at, header = 0, {}
    for name, (dtype, shape, size) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    raw = json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + bytes(at) + extra


def directory(top: Path, config: dict[str, object], **files: bytes) -> Path:
    """A model directory with one small tensor, unless the files say otherwise; `__` in a name is a dot."""
    (top / "config.json").write_text(json.dumps(config))
    for name, raw in ({"model__safetensors": safetensors({"w": ("BF16", [4, 8], 64)})} | files).items():
        if raw:
            (top / name.replace("__", ".")).write_bytes(raw)
    return top


@pytest.mark.parametrize(
    ("more", "memory"),
    [
        ({}, SHAPE),
        ({"head_dim": 64}, Memory(layers=32, kv_heads=8, head_dim=64, context=131072)),
        ({"num_key_value_heads": None}, Memory(layers=32, kv_heads=32, head_dim=128, context=131072)),
        ({"kv_lora_rank": 512, "qk_rope_head_dim": 64}, Memory(layers=32, kv_heads=8, head_dim=128, latent=576, context=131072)),
        ({"sliding_window": 4096}, Memory(kv_heads=8, head_dim=128, sliding_layers=32, window=4096, context=131072)),
        ({"sliding_window": 4096, "use_sliding_window": False}, SHAPE),
        (
            {"sliding_window": 128, "layer_types": ["sliding_attention", "full_attention"] * 16},
            Memory(layers=16, kv_heads=8, head_dim=128, sliding_layers=16, window=128, context=131072),
        ),
        (
            {"sliding_window": 1024, "sliding_window_pattern": 6},
            Memory(layers=5, kv_heads=8, head_dim=128, sliding_layers=27, window=1024, context=131072),
        ),
        ({"sliding_window": 4096, "model_type": "gemma2"}, replace(SHAPE, layers=16, sliding_layers=16, window=4096)),
        ({"sliding_window": 4096, "model_type": "qwen2"}, SHAPE),
        (
            {"sliding_window": 4096, "model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 24},
            replace(SHAPE, layers=24, sliding_layers=8, window=4096),
        ),
        ({"multi_query": True, "num_kv_heads": 71, "num_key_value_heads": None}, replace(SHAPE, kv_heads=1)),
        ({"multi_query": True, "new_decoder_architecture": True, "num_kv_heads": 8, "num_key_value_heads": None}, SHAPE),
        ({"layer_types": ["linear_attention"] * 24 + ["full_attention"] * 8}, Memory(layers=8, kv_heads=8, head_dim=128, context=131072)),
        ({"hybrid_override_pattern": "M-M*-M*"}, Memory(layers=2, kv_heads=8, head_dim=128, context=131072)),
        (
            {"max_position_embeddings": 32768, "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}},
            SHAPE,
        ),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192}}, SHAPE),
        ({"model_type": "bert"}, Memory(context=131072)),
    ],
)
def test_shapes_of_configs(more: dict[str, object], memory: Memory) -> None:
    assert read_config(json.dumps(LLAMA | more).encode()).memory == memory


def test_a_vision_model_has_its_shape_one_level_down() -> None:
    found = read_config(json.dumps({"architectures": ["X"], "model_type": "x", "text_config": {**LLAMA, "dtype": "float16"}}).encode())
    assert (found.memory, found.precision, found.architecture) == (SHAPE, "fp16", "X")


def test_words_of_a_model_steer_no_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    esc = "\x1b[2J\nFORGED"
    quantization = {"quant_method": f"own{esc}", "bits": 8, "ignore": [f"a{esc}"], "dynamic": {f"-:b{esc}": {}}}
    bad = {"architectures": [f"X{esc}"], "auto_map": {"AutoConfig": f"x{esc}"}, "quantization_config": quantization}
    assert profile_make.main([str(directory(tmp_path, LLAMA | bad)), "--gpu", "h100"]) == 0
    told = capsys.readouterr()
    assert "\x1b" not in told.err + told.out and "\nFORGED" not in told.err and "\\u001b" not in told.out and "X?[2J?FORGED" in told.err
    entry = {"id": "1", "tags": {}, "model": {"name": "a/b", "digest": "sha256:" + "0" * 64}}
    for bad_block in ({"method": f"own{esc}"}, {"method": "own", "excluded": [f"a{esc}"]}):
        with pytest.raises(Invalid, match="quantization of profile 0"):
            profile.parse(json.dumps({"schema": 1, "model": "a/b", "profiles": [entry | {"quantization": bad_block}]}).encode())


COMPRESSED = {"quant_method": "compressed-tensors", "format": "pack-quantized", "ignore": ["lm_head", "re:.*gate$"]}


def groups(**weights: object) -> dict[str, object]:
    """A compressed-tensors scheme with one group."""
    return COMPRESSED | {"config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}}


@pytest.mark.parametrize(
    ("stated", "word", "scheme"),
    [
        (
            {"quant_method": "awq", "bits": 4, "group_size": 128, "modules_to_not_convert": ["lm_head"]},
            "int4",
            Quantization("awq", 4, 128, ("lm_head",)),
        ),
        (
            {"quant_method": "gptq", "bits": 4, "group_size": -1, "dynamic": {"-:lm_head": {}, "+:x": {}}},
            "int4",
            Quantization("gptq", 4, 0, ("lm_head",)),
        ),
        ({"quant_method": "gptq", "bits": 8, "group_size": 32}, "int8", Quantization("gptq", 8, 32)),
        (groups(num_bits=4, type="int", group_size=128), "int4", Quantization("compressed-tensors", 4, 128, ("lm_head", "re:.*gate$"))),
        (groups(num_bits=8, type="int", group_size=None), "int8", Quantization("compressed-tensors", 8, 0, ("lm_head", "re:.*gate$"))),
        (groups(num_bits=8, type="float"), "fp8", Quantization("compressed-tensors", 8, 0, ("lm_head", "re:.*gate$"))),
        (
            groups(num_bits=4, type="float", group_size=16) | {"format": "nvfp4-pack-quantized"},
            "nvfp4",
            Quantization("compressed-tensors", 4, 16, ("lm_head", "re:.*gate$")),
        ),
        ({"quant_method": "fp8", "weight_block_size": [128, 128], "ignored_layers": ["a.b"]}, "fp8", Quantization("fp8", 8, 0, ("a.b",))),
        ({"quant_method": "mxfp4", "modules_to_not_convert": ["a", "b", "a"]}, "mxfp4", Quantization("mxfp4", 4, 0, ("a", "b"))),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head"]}, "nvfp4", Quantization("modelopt", 4, 0, ("lm_head",))),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "int4", Quantization("bitsandbytes", 4)),
        ({"quant_method": "auto-round", "bits": 4, "group_size": 128}, "int4", Quantization("auto-round", 4, 128)),
    ],
)
def test_quantised_checkpoints_keep_the_layers_they_leave_out(stated: dict[str, object], word: str, scheme: Quantization) -> None:
    found = read_config(json.dumps(LLAMA | {"quantization_config": stated}).encode())
    assert (found.precision, found.quantization) == (word, scheme)
    assert checkpoint.precision({"quantization_config": stated}, {}) == word  # what a start demands is what `profile make` writes


def test_modelopts_own_file() -> None:
    own = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": None, "exclude_modules": ["lm_head"]}}
    found = read_config(json.dumps(LLAMA).encode(), json.dumps(own).encode())
    assert (found.precision, found.quantization) == ("fp8", Quantization("modelopt", 8, 0, ("lm_head",)))


@pytest.mark.parametrize(
    "stated", [{"quant_method": "aqlm"}, {"quant_method": "gptq", "bits": 3}, {"bits": 4}, groups(num_bits=2), COMPRESSED | {"config_groups": 7}]
)
def test_an_unknown_scheme_is_told(stated: dict[str, object]) -> None:
    with pytest.raises(Invalid, match="is not known"):
        read_config(json.dumps(LLAMA | {"quantization_config": stated}).encode())


def test_profiles_of_a_directory_are_what_push_and_explain_take(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stated = {"quant_method": "awq", "bits": 4, "group_size": 128, "modules_to_not_convert": ["lm_head"]}
    directory(tmp_path, LLAMA | {"quantization_config": stated, "auto_map": {"AutoModel": "x.Y"}}, pytorch_model__bin=b"\x80\x04")
    assert profile_make.main([str(tmp_path), "--gpu", "h100", "--gpu", "t4", "--max-model-len", "8192"]) == 0
    out, err = capsys.readouterr()
    made = profile.read(out.encode()).profiles
    assert [p.description for p in made] == [f"vllm-int4-tp{n}" for n in (1, 2, 4, 8)]
    assert made[0].memory == Memory(64, 32, 8, 128, context=131072) and made[0].options == {"max_model_len": "8192"}
    assert made[0].quantization == Quantization("awq", 4, 128, ("lm_head",))
    assert "1 module(s) stay as they were: lm_head" in err and "pytorch_model.bin is a pickle" in err and "names code (x.Y): it is never run" in err
    assert list(json.loads(out)) == ["profiles"]
    assert profile_make.main([str(tmp_path), "--gpu", "h100", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["estimates"][0]["gpu"] == "h100"


@pytest.mark.parametrize(
    ("flags", "what"),
    [
        (["--tp", "3"], "--tp 3 cannot be"),
        (["--tp", "0"], "--tp 0 cannot be"),
        (["--tp", "65"], "--tp 65 cannot be"),
        (["--max-model-len", "-1"], "--max-model-len -1 cannot be"),
        (["--gpu", "h100x8"], "--gpu 'h100x8' is no GPU"),
        (["--gpu", ""], "--gpu '' is no GPU"),
    ],
)
def test_a_wish_that_cannot_be_is_told_by_its_own_name(tmp_path: Path, flags: list[str], what: str) -> None:
    with pytest.raises(Invalid) as refused:
        profile_make.main([str(directory(tmp_path, LLAMA)), *flags])
    assert refused.value.what.startswith(what) and refused.value.expected


def test_facts_are_taken_where_the_author_says_none(tmp_path: Path) -> None:
    directory(tmp_path, LLAMA)
    tags = {"llm_engine": "vllm"}
    files = {p.name: p for p in tmp_path.iterdir()}
    found, untold = model_dir.with_facts([{"tags": tags}], files, "m")
    assert found[0]["memory"] == profile.block(Memory(64, 32, 8, 128, context=131072)) and not untold
    own: dict[str, object] = {"tags": tags, "memory": {"layers": 1}}
    assert model_dir.with_facts([own, {"tags": tags}], files, "m")[0][0]["memory"] == {"layers": 1}
    assert model_dir.with_facts([7], files, "m") == ([7], "")  # type: ignore[list-item]
    (tmp_path / "model.safetensors").write_bytes(b"not one")
    assert model_dir.with_facts([{"tags": tags}], files, "m")[0] == [{"tags": tags}]
    assert "tell no memory facts" in model_dir.with_facts([{"tags": tags}], files, "m")[1]


def test_an_embedding_model_and_a_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory(tmp_path, {**LLAMA, "model_type": "bert", "architectures": ["BertModel"], "torch_dtype": "float32"}, modules__json=b"[]")
    assert profile_make.main([str(tmp_path), "--cpu", "--json"]) == 0
    made = profile.read(capsys.readouterr().out.encode()).profiles
    assert [(p.description, p.options["task"]) for p in made] == [("vllm-fp32-tp1", "embed"), ("vllm-cpu-fp32-tp1", "embed")]


def _header(length: int, raw: bytes = b"{}") -> bytes:
    return struct.pack("<Q", length) + raw


def _one(entry: object, data: int = 64) -> bytes:
    raw = json.dumps({"w": entry}).encode()
    return struct.pack("<Q", len(raw)) + raw + bytes(data)


HOSTILE = {
    "length 2^63": _header(1 << 63),
    "length of the format's limit and one": _header(100_000_001),
    "larger than the file": _header(1000),
    "empty": b"",
    "seven bytes": b"1234567",
    "no header": _header(0),
    "not JSON": _header(4, b"abcd"),
    "a list": _header(2, b"[]"),
    "deep": _header(200_000, b"[" * 200_000),
    "a key twice": _header(13, b'{"a":1,"a":1}'),
    "no dtype": _one({"shape": [1], "data_offsets": [0, 64]}),
    "a dtype of nobody": _one({"dtype": "PICKLE", "shape": [32], "data_offsets": [0, 64]}),
    "shape x dtype differs": _one({"dtype": "F32", "shape": [32], "data_offsets": [0, 64]}),
    "shape overflows": _one({"dtype": "F32", "shape": [1 << 59] * 64, "data_offsets": [0, 64]}),
    "negative shape": _one({"dtype": "F32", "shape": [-1, -16], "data_offsets": [0, 64]}),
    "offsets of three": _one({"dtype": "F32", "shape": [16], "data_offsets": [0, 64, 1]}),
    "offsets backwards": _one({"dtype": "F32", "shape": [16], "data_offsets": [64, 0]}),
    "gap": _one({"dtype": "F32", "shape": [16], "data_offsets": [1, 65]}, 65),
    "behind the last tensor": safetensors({"w": ("F32", [16], 64)}, extra=b"PK\x03\x04zip"),
    "true for a number": _one({"dtype": "U8", "shape": [True], "data_offsets": [0, 1]}, 1),
}


@pytest.mark.parametrize("name", list(HOSTILE))
def test_hostile_safetensors_are_refused(tmp_path: Path, name: str) -> None:
    directory(tmp_path, LLAMA, model__safetensors=HOSTILE[name] or b"\0")
    with pytest.raises((Invalid, TooLarge), match=r"model\.safetensors"):
        model_dir.read(tmp_path)


def test_overlapping_tensors_are_refused() -> None:
    header = {n: {"dtype": "U8", "shape": [4], "data_offsets": [b, b + 4]} for n, b in (("a", 0), ("b", 2))}
    with pytest.raises(Invalid, match="overlap"):
        tensor_bytes(json.dumps(header).encode(), 6, "x")


@pytest.mark.slow
def test_a_header_of_a_hundred_thousand_tensors_is_refused_soon_and_small(tmp_path: Path) -> None:
    many = safetensors({f"layer.{i}.w": ("U8", [1], 1) for i in range(100_000)})
    large = tmp_path / "large"
    large.mkdir()
    directory(large, LLAMA, model__safetensors=struct.pack("<Q", MAX_HEADER + 1) + bytes(MAX_HEADER + 2))
    directory(tmp_path, LLAMA, model__safetensors=many)
    began, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for top in (tmp_path, large):
        with pytest.raises(TooLarge):
            model_dir.read(top)
    assert time.process_time() - began < 5 and resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "a/b.safetensors", "x.bin", "..%2fx.safetensors/../y", "", "C:\\x.safetensors"])
def test_an_index_leads_nowhere_else(tmp_path: Path, name: str) -> None:
    directory(tmp_path, LLAMA)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": name}}))
    with pytest.raises(AirlockError):
        model_dir.read(tmp_path)


def test_shards_are_counted_by_the_index_alone(tmp_path: Path) -> None:
    directory(tmp_path, LLAMA, model__safetensors=b"", consolidated__safetensors=safetensors({"w": ("U8", [9], 9)}))
    for n in (1, 2):
        (tmp_path / f"model-{n}.safetensors").write_bytes(safetensors({"w": ("BF16", [4], 8)}))
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors", "c": "model-1.safetensors"}}))
    assert model_dir.read(tmp_path).config.memory.weights_bytes == 16
    (tmp_path / "model-2.safetensors").unlink()
    with pytest.raises(NotFound, match=r"model-2\.safetensors, which .* \(1 of 2 missing"):
        model_dir.read(tmp_path)


def test_links_fifos_and_pickles(tmp_path: Path) -> None:
    top = tmp_path / "m"
    top.mkdir()
    directory(top, LLAMA)
    file = top / "model.safetensors"
    (tmp_path / "outside").write_bytes(file.read_bytes())
    file.unlink()
    file.symlink_to(tmp_path / "outside")
    with pytest.raises(Invalid, match="a link that leaves"):
        model_dir.read(top)
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(Invalid, match="no plain file"):
        model_dir.read(top)
    file.unlink()
    (top / "pytorch_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(Invalid, match="the weights are pickles"):
        model_dir.read(top)
    (top / "pytorch_model.bin").unlink()
    with pytest.raises(Invalid, match="there are no weights") as empty:
        model_dir.read(top)
    assert "convert" not in empty.value.do
    (top / "there").symlink_to("back")
    (top / "back").symlink_to("there")  # a circle, which is no fault of ours to tell
    with pytest.raises(Invalid, match="there are no weights"):
        model_dir.read(top)
    (top / "config.json").unlink()
    with pytest.raises(NotFound, match=r"no config\.json"):
        model_dir.read(top)
    with pytest.raises(NotFound):
        model_dir.read(tmp_path / "absent")


@pytest.mark.parametrize(
    "config",
    [
        b"",
        b"[]",
        b"{" * 5000,
        b'{"num_hidden_layers": 1e400}',
        b'{"num_hidden_layers": -1}',
        b'{"num_hidden_layers": true}',
        b'{"num_attention_heads": "32"}',
        b'{"max_position_embeddings": 99999999999999999999}',
        b'{"a": "' + b"x" * (4 << 20) + b'"}',
    ],
)
def test_hostile_configs(config: bytes) -> None:
    with pytest.raises((Invalid, TooLarge)):
        read_config(config)


@pytest.mark.parametrize("stated", ["awq", ["awq"], 4])
def test_a_quantisation_that_is_no_object_is_not_passed_over(stated: object) -> None:
    with pytest.raises(Invalid, match=r"quantization_config of config\.json is"):
        read_config(json.dumps(LLAMA | {"quantization_config": stated}).encode())


def test_a_dtype_without_a_word_is_told(tmp_path: Path) -> None:
    with pytest.raises(Invalid, match="no dtype that profiles have a word for"):
        profile_make.main([str(directory(tmp_path, LLAMA | {"torch_dtype": "float8_e4m3fn"}))])


def test_odd_but_harmless_configs_are_read() -> None:
    odd = {"architectures": 7, "auto_map": [1], "rope_scaling": "x", "layer_types": {}, "text_config": 3, "quantization_config": None, "dtype": 5}
    assert read_config(json.dumps(odd).encode()).memory == Memory()


def test_no_more_names_than_the_bound(tmp_path: Path) -> None:
    excluded = [f"layer.{i}" for i in range(5000)]
    with pytest.raises(TooLarge, match="leaves out 5000 modules"):
        read_config(json.dumps(LLAMA | {"quantization_config": {"quant_method": "awq", "modules_to_not_convert": excluded}}).encode())
