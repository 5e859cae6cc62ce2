"""What a precision asks of a GPU: its rank, the compute capability that has it in hardware, and the lowest on which an engine runs it at all; pure.

vLLM's lowest capabilities are those that its quantisation methods state (0.32, `get_min_capability`); those of TensorRT-LLM and SGLang are from
their support tables and were not run here. Below the hardware's capability the weights are expanded in each step: it fits, but is no faster.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

Capability = tuple[int, int]


@dataclass(frozen=True)
class Precision:
    """Bits of a weight, the capability with hardware for it, and the lowest capability by engine ("" stands for any other)."""

    bits: int
    native: Capability
    lowest: Mapping[str, Capability] = field(default_factory=dict)


# In the order of preference: a lower precision goes first (nim-container.md 7.1), and of one width the one that Blackwell computes in.
TABLE: dict[str, Precision] = {
    "nvfp4": Precision(4, (10, 0), {"vllm": (7, 5), "tensorrt_llm": (10, 0), "sglang": (10, 0)}),
    "mxfp4": Precision(4, (10, 0), {"vllm": (8, 0), "tensorrt_llm": (9, 0), "sglang": (9, 0)}),
    "int4": Precision(4, (7, 5), {"vllm": (7, 5), "tensorrt_llm": (8, 0), "sglang": (8, 0)}),
    "fp8": Precision(8, (8, 9), {"vllm": (7, 5), "tensorrt_llm": (8, 9), "sglang": (8, 0)}),
    "int8": Precision(8, (7, 5), {"vllm": (7, 5), "tensorrt_llm": (8, 0), "sglang": (7, 5)}),
    "bf16": Precision(16, (8, 0), {"": (8, 0)}),
    "fp16": Precision(16, (7, 0), {"": (7, 0)}),
    "fp32": Precision(32, (0, 0)),
}
# Other words for the same, in tags and checkpoints. `16 bit` is one rank: bf16 and fp16 are told apart by the later rules.
ALIASES = {
    "bfloat16": "bf16",
    "float16": "fp16",
    "half": "fp16",
    "float32": "fp32",
    "float": "fp32",
    "awq": "int4",
    "gptq": "int4",
    "int4_awq": "int4",
    "int4_gptq": "int4",
    "w4a16": "int4",
    "w4a16_awq": "int4",
    "w4a8": "int4",
    "w8a8": "int8",
    "w8a16": "int8",
    "int8_sq": "int8",
    "fp4": "nvfp4",
    "w4a4_nvfp4": "nvfp4",
}
_RANK = {name: i for i, name in enumerate(TABLE)} | {"fp16": list(TABLE).index("bf16")}
UNKNOWN_RANK = 99


def named(text: str) -> str:
    """The word of TABLE for a tag's value, else the value itself in lower case."""
    word = text.strip().lower().replace("-", "_")
    return ALIASES.get(word, word)


def rank(text: str) -> int:
    """The place of a precision in the order of preference, lowest first; 99 for a word that is not known."""
    return _RANK.get(named(text), UNKNOWN_RANK)


def refusal(text: str, engine: str, capability: Capability) -> str:
    """The sentence that refuses a precision on a GPU, empty where the engine runs it or the capability is not told."""
    known = TABLE.get(named(text))
    if known is None or capability == (0, 0):
        return ""
    least = known.lowest.get(engine, known.lowest.get("", (0, 0)))
    if capability >= least:
        return ""
    return f"{named(text)} with {engine or 'its engine'} needs compute capability {dotted(least)}; this GPU has {dotted(capability)}"


def remark(text: str, capability: Capability) -> str:
    """What to say of a precision that the GPU runs without hardware for it, empty where it has that."""
    known = TABLE.get(named(text))
    if known is None or capability == (0, 0) or capability >= known.native:
        return ""
    word, native = named(text), dotted(known.native)
    return f"{word} runs weight-only here: hardware for it begins with compute capability {native}, this GPU has {dotted(capability)}"


def dotted(capability: Capability) -> str:
    """`9.0`, as NVIDIA writes it."""
    return f"{capability[0]}.{capability[1]}"
