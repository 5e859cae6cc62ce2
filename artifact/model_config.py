"""What the documents of a model directory say of its memory and precision: config.json, hf_quant_config.json, safetensors headers and index; pure.

All of it comes from outside: sizes are bounded, numbers are checked, and nothing in it is ever run. A field that is not there is not known.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from artifact.errors import Invalid, TooLarge
from artifact.manifest import check_path, no_duplicates, parse_json
from artifact.profile import MAX_EXCLUDED, Memory, Quantization

CONFIG, MODELOPT, INDEX = "config.json", "hf_quant_config.json", "model.safetensors.index.json"
MAX_CONFIG = 4 << 20
MAX_INDEX = 64 << 20
MAX_HEADER = 16 << 20  # the format allows 100 MB; the largest header of a known model is below 2 MB
MAX_TENSORS = 65_536  # of one file
_NESTED = ("text_config", "llm_config", "language_config")
_ENCODERS = ("bert", "roberta", "xlm-roberta", "distilbert", "mpnet", "nomic_bert", "modernbert", "deberta", "deberta-v2", "albert", "electra")
# Each so many-th layer sees the whole context where config.json says nothing of it (the defaults of transformers 5).
_PATTERNS = {"gemma2": 2, "gemma3": 6, "gemma3_text": 6, "cohere2": 4}
# Half bytes of one element: F4 takes half a byte.
_HALF_BYTES = {"F4": 1} | dict.fromkeys(("F8_E5M2", "F8_E4M3", "F8_E8M0", "BOOL", "U8", "I8"), 2) | dict.fromkeys(("U16", "I16", "F16", "BF16"), 4)
_HALF_BYTES |= dict.fromkeys(("U32", "I32", "F32"), 8) | dict.fromkeys(("U64", "I64", "F64", "C64"), 16)
_DTYPES = {"bfloat16": "bf16", "float16": "fp16", "half": "fp16", "float32": "fp32", "float": "fp32"}
_MODELOPT_WORDS = (("NVFP4", "nvfp4"), ("MXFP4", "mxfp4"), ("W4A", "int4"), ("INT4", "int4"), ("FP8", "fp8"), ("INT8", "int8"))
_EXCLUSIONS = ("modules_to_not_convert", "ignore", "ignored_layers", "exclude_modules", "exclude")


@dataclass(frozen=True)
class ModelConfig:
    """What config.json says: architecture, precision, memory (weights 0), quantisation, whether it embeds, attention heads, code that it names."""

    architecture: str
    precision: str
    memory: Memory
    quantization: Quantization | None = None
    embeds: bool = False
    heads: int = 0
    code: tuple[str, ...] = ()


def read_config(raw: bytes, modelopt: bytes = b"") -> ModelConfig:
    """The facts of a config.json, and of ModelOpt's hf_quant_config.json where there is one; raises Invalid, TooLarge."""
    top = parse_json(raw, CONFIG, MAX_CONFIG)
    nested = next((top[k] for k in _NESTED if isinstance(top.get(k), dict)), {})
    doc: Mapping[str, object] = {**nested, **{k: v for k, v in top.items() if k not in nested}} if isinstance(nested, dict) else top
    names = top.get("architectures")
    architecture = _plain(names[0], 100) if isinstance(names, list) and names else ""
    kind = str(doc.get("model_type", ""))
    heads = _whole(doc, "num_attention_heads", "n_head", "num_heads")
    stated = stated_scheme(doc, parse_json(modelopt, MODELOPT, MAX_CONFIG) if modelopt else {})
    quantization, precision = scheme(stated) if stated else (None, "")
    word = str(doc.get("dtype") or doc.get("torch_dtype") or "").removeprefix("torch.")
    code = top.get("auto_map")
    encoder = kind in _ENCODERS
    return ModelConfig(
        architecture,
        precision or _DTYPES.get(word, ""),
        Memory(context=_context(doc)) if encoder else _memory(doc, heads),
        quantization,
        encoder or architecture.endswith(("ForSequenceClassification", "EmbeddingModel")),
        heads,
        tuple(sorted(_plain(v, 200) for v in code.values())) if isinstance(code, dict) else (),
    )


def _memory(doc: Mapping[str, object], heads: int) -> Memory:
    layers, sliding = _layers(doc, _whole(doc, "num_hidden_layers", "n_layer", "num_layers", "n_layers"))
    hidden = _whole(doc, "hidden_size", "n_embd", "d_model")
    latent = _whole(doc, "kv_lora_rank") + _whole(doc, "qk_rope_head_dim") if _whole(doc, "kv_lora_rank") else 0
    window = _whole(doc, "sliding_window", "attention_chunk_size") if sliding else 0
    return Memory(
        layers=layers,
        kv_heads=1
        if doc.get("multi_query") is True and not doc.get("new_decoder_architecture")
        else _whole(doc, "num_key_value_heads", "num_kv_heads", "n_head_kv") or heads,
        head_dim=_whole(doc, "head_dim") or (hidden // heads if heads else 0),
        latent=latent,
        sliding_layers=sliding if window else 0,
        window=window,
        context=_context(doc),
    )


def _layers(doc: Mapping[str, object], every: int) -> tuple[int, int]:
    """How many layers keep the keys and values of the whole context, and how many those of a window; Mamba and linear layers keep none."""
    kinds = doc.get("layer_types") or doc.get("layers_block_type")
    if isinstance(kinds, list) and 0 < len(kinds) <= 4096:
        sliding = sum(1 for k in kinds if k in ("sliding_attention", "chunked_attention"))
        return sum(1 for k in kinds if k in ("full_attention", "attention", "hybrid")), sliding
    pattern = doc.get("hybrid_override_pattern")
    if isinstance(pattern, str) and pattern:
        return pattern.count("*"), 0
    kind = str(doc.get("model_type", ""))
    if not _whole(doc, "sliding_window") or not doc.get("use_sliding_window", not kind.startswith("qwen")):
        return every, 0
    if "max_window_layers" in doc:
        full = min(every, _whole(doc, "max_window_layers"))
        return full, every - full
    step = _whole(doc, "sliding_window_pattern") or _PATTERNS.get(kind, 0)
    full = every // step if step else 0
    return full, every - full


def _context(doc: Mapping[str, object]) -> int:
    length = _whole(doc, "max_position_embeddings", "n_positions", "max_sequence_length", "seq_length", "max_seq_len")
    scaling = doc.get("rope_scaling") or doc.get("rope_parameters")
    if isinstance(scaling, dict) and "yarn" in (scaling.get("rope_type"), scaling.get("type")):
        original, factor = _whole(scaling, "original_max_position_embeddings"), scaling.get("factor")
        if original and isinstance(factor, int | float) and 1 <= factor <= 1024:
            return max(length, int(original * factor))
    return length


def stated_scheme(config: Mapping[str, object], modelopt: Mapping[str, object]) -> Mapping[str, object] | None:
    """What config.json, else ModelOpt's own file, says of quantisation; None for nothing; raises Invalid for what is no object."""
    stated = config.get("quantization_config") or config.get("compression_config")
    if stated and not isinstance(stated, dict):
        raise Invalid(f"quantization_config of {CONFIG} is {_plain(stated, 40)!r}", expected="an object with quant_method", reason="model_content")
    if isinstance(stated, dict) and stated:
        return stated
    own = modelopt.get("quantization")
    return {"quant_method": "modelopt", **own} if isinstance(own, dict) and own.get("quant_algo") else None


def scheme(doc: Mapping[str, object]) -> tuple[Quantization, str]:
    """The scheme with the layers that it leaves out, and the precision word of profiles; raises Invalid for a method that is not known."""
    method = _plain(doc.get("quant_method", ""), 64).lower()
    bits, group = _whole(doc, "bits", "w_bit", "num_bits"), _group(doc, "group_size", "q_group_size")
    word = {"awq": "int4", "gptq": "int4", "fp8": "fp8", "fbgemm_fp8": "fp8", "mxfp4": "mxfp4"}.get(method, "")
    if method in ("awq", "gptq") and bits not in (0, 4):
        word = "int8" if bits == 8 else ""
    if method == "bitsandbytes":
        word = "int4" if doc.get("load_in_4bit") or doc.get("_load_in_4bit") else "int8"
    if method == "compressed-tensors":
        word, bits, group = _compressed(doc)
    if method == "modelopt" or "quant_algo" in doc:
        algorithm = str(doc.get("quant_algo", "")).upper()
        word = next((word for part, word in _MODELOPT_WORDS if part in algorithm), "")
        method = method or "modelopt"
    if not word and method and method not in ("awq", "gptq") and bits in (4, 8):
        word = f"int{bits}"  # a method of its own that at least says how wide its weights are
    if not word:
        raise Invalid(
            f"quantisation method {method or '(none)'!r} of config.json is not known",
            expected="awq, gptq, compressed-tensors, fp8, fbgemm_fp8, mxfp4, modelopt or bitsandbytes, of 4 or 8 bits",
            do="write the profile by hand, with tags precision and the block memory",
        )
    width = 4 if word in ("int4", "nvfp4", "mxfp4") else 8
    return Quantization(method, bits or width, group, _excluded(doc)), word


def _compressed(doc: Mapping[str, object]) -> tuple[str, int, int]:
    """Precision, bits and group size of the first group of a compressed-tensors scheme."""
    groups = doc.get("config_groups")
    first = next((g for g in groups.values() if isinstance(g, dict)), {}) if isinstance(groups, dict) else {}
    weights = first.get("weights")
    if not isinstance(weights, dict):
        return "", 0, 0
    bits, form = _whole(weights, "num_bits"), f"{doc.get('format', '')} {first.get('format', '')}"
    if weights.get("type") == "float":
        word = {8: "fp8", 4: "mxfp4" if "mxfp4" in form else "nvfp4"}.get(bits, "")
    else:
        word = {8: "int8", 4: "int4"}.get(bits, "")
    return word, bits, _group(weights, "group_size")


def _excluded(doc: Mapping[str, object]) -> tuple[str, ...]:
    """The modules that are left in 16 bit, as the checkpoint spells them; raises TooLarge."""
    found: list[str] = []
    for key in _EXCLUSIONS:
        value = doc.get(key)
        found += [_plain(v, 512) for v in value if isinstance(v, str)] if isinstance(value, list) else []
    dynamic = doc.get("dynamic")  # GPTQModel's: "-:REGEX" takes layers out
    found += [_plain(k[2:], 512) for k in dynamic if k.startswith("-:")] if isinstance(dynamic, dict) else []
    if len(found) > MAX_EXCLUDED:
        raise TooLarge(f"the quantisation of config.json leaves out {len(found)} modules by name", expected=f"at most {MAX_EXCLUDED}")
    return tuple(dict.fromkeys(found))


def _plain(value: object, most: int) -> str:
    """A word of the document as it may be printed: nothing in it steers a terminal or begins a line."""
    return "".join(c if c.isprintable() else "?" for c in str(value)[:most])


def _group(doc: Mapping[str, object], *keys: str) -> int:
    """A group size; -1 and null mean that there are no groups."""
    return _whole({k: v for k, v in doc.items() if v != -1}, *keys)


def _whole(doc: Mapping[str, object], *keys: str) -> int:
    """The first of the keys that is there, 0 for none; raises Invalid for what is no sensible number."""
    for key in keys:
        value = doc.get(key)
        if value is None:
            continue
        if type(value) is not int or not 0 <= value < 1 << 31:
            raise Invalid(f"{key} of {CONFIG} is {str(value)[:40]!r}", expected="a whole number from 0 to 2147483647")
        return value
    return 0


def read_index(raw: bytes) -> tuple[str, ...]:
    """The weight files that an index names, sorted; raises Invalid for a name that is no plain file beside it, TooLarge."""
    found = _json(raw, INDEX, MAX_INDEX).get("weight_map")
    if not isinstance(found, dict) or not found or not all(isinstance(v, str) for v in found.values()):
        raise Invalid(f"{INDEX} has no weight_map", expected="an object of tensor names to file names")
    names = sorted(set(found.values()))
    for name in names:
        check_path(name)
        if "/" in name or not name.endswith(".safetensors"):
            raise Invalid(f"{INDEX} names {name[:100]!r}", expected="safetensors files beside the index", reason="path")
    return tuple(names)


def header_size(first: bytes, size: int, name: str) -> int:
    """Length of a safetensors header by a file's first 8 bytes and size; raises Invalid, TooLarge."""
    length = int.from_bytes(first[:8], "little") if len(first) >= 8 else 0
    if not 2 <= length <= size - 8:
        raise Invalid(f"{name} is no safetensors file: its header would have {length} bytes, the file has {size}", expected="a header in the file")
    if length > MAX_HEADER:
        raise TooLarge(f"the header of {name} has {length} bytes", expected=f"at most {MAX_HEADER}")
    return length


def tensor_bytes(header: bytes, data: int, name: str) -> int:
    """Bytes of all tensors of one safetensors file whose data part has `data` bytes, each byte in exactly one; raises Invalid, TooLarge.

    Source: the safetensors format (offsets without gap or overlap, length = shape x dtype).
    """
    doc = _json(header, f"the header of {name}", MAX_HEADER)
    doc.pop("__metadata__", None)
    if len(doc) > MAX_TENSORS:
        raise TooLarge(f"{name} has {len(doc)} tensors", expected=f"at most {MAX_TENSORS} in one file")
    end = 0
    for begin, stop in sorted(_spans(doc, name)):
        if begin != end:
            raise Invalid(f"tensors of {name} overlap or leave a gap at byte {min(begin, end)}", expected="each byte in one tensor")
        end = stop
    if end != data:
        raise Invalid(f"{name} has {data} bytes of data, and its tensors end at {end}", expected="nothing behind the last tensor")
    return end


def _spans(doc: Mapping[str, object], name: str) -> Iterable[tuple[int, int]]:
    for key, entry in doc.items():
        fields: Mapping[str, object] = entry if isinstance(entry, dict) else {}
        dtype, shape, span = fields.get("dtype"), _numbers(fields.get("shape"), 64), _numbers(fields.get("data_offsets"), 2)
        if not isinstance(dtype, str) or shape is None or span is None or len(span) != 2:
            raise Invalid(f"tensor {key[:100]!r} of {name} is not described", expected="dtype, shape and two data_offsets")
        size = _HALF_BYTES.get(dtype)
        if size is None:
            raise Invalid(f"tensor {key[:100]!r} of {name} has dtype {dtype[:20]!r}", expected=", ".join(_HALF_BYTES))
        for n in shape:
            size = min(size * n, 1 << 61)  # a product of 64 large numbers is not worth computing
        if span[1] - span[0] != -(-size // 2):
            raise Invalid(f"tensor {key[:100]!r} of {name} has {span[1] - span[0]} bytes", expected="the bytes of its shape and dtype")
        yield span[0], span[1]


def _numbers(value: object, most: int) -> list[int] | None:
    fits = isinstance(value, list) and len(value) <= most and all(type(n) is int and 0 <= n < 1 << 60 for n in value)
    return value if fits and isinstance(value, list) else None


def _json(raw: bytes, what: str, limit: int) -> dict[str, object]:
    """A flat JSON object of many entries: parse_json's rules but its count of brackets, which costs a second here; the parser bounds depth itself."""
    if len(raw) > limit:
        raise TooLarge(f"{what} has {len(raw)} bytes", expected=f"at most {limit}")
    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=no_duplicates)
    except (ValueError, RecursionError) as error:
        raise Invalid(f"{what} is not valid JSON: {str(error)[:120]}", expected="one UTF-8 JSON object without duplicate keys") from error
    if not isinstance(value, dict):
        raise Invalid(f"{what} is not a JSON object", expected="an object")
    return value
