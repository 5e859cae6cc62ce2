"""The profiles that a model directory gives by its own documents: one for each number of GPUs that its attention heads allow; pure."""

from __future__ import annotations

from artifact.errors import Invalid
from artifact.model_dir import ModelDir
from artifact.profile import block
from runtime.hosts import MAX_GPUS

SIZES = (1, 2, 4, 8)


def items(found: ModelDir, engine: str, sizes: tuple[int, ...], length: int, *, cpu: bool) -> list[dict[str, object]]:
    """The author's list of profiles: one for each number of GPUs, and one for a CPU where it is asked for; raises Invalid."""
    config = found.config
    if not config.precision:
        raise Invalid(
            "config.json tells no dtype that profiles have a word for, and no quantisation",
            expected="dtype (torch_dtype) bfloat16, float16 or float32, or quantization_config",
            do="add what it was stored in",
        )
    if wrong := [n for n in sizes if n not in range(1, MAX_GPUS + 1) or (config.heads and config.heads % n)]:
        heads = f" that divides the model's {config.heads} attention heads" if config.heads else ""
        raise Invalid(f"--tp {wrong[0]} cannot be", expected=f"a number from 1 to {MAX_GPUS}{heads}")
    if not 0 <= length < 1 << 31:
        raise Invalid(f"--max-model-len {length} cannot be", expected="a number of tokens; 0 for the model's own")
    every = sizes or tuple(n for n in SIZES if n == 1 or (config.heads and config.heads % n == 0 and not (config.embeds and n > 1)))
    common: dict[str, object] = {"memory": block(config.memory)}
    if config.quantization:
        common["quantization"] = block(config.quantization)
    options = ({"task": "embed"} if config.embeds else {}) | ({"max_model_len": str(length)} if length else {})
    if options:
        common["options"] = options
    tags = {"llm_engine": engine, "precision": config.precision, "pp": "1"} | ({"trtllm_buildable": "true"} if engine == "tensorrt_llm" else {})
    out = [{"tags": {**tags, "tp": str(n)}, **common} for n in every]
    if cpu and config.quantization:
        raise Invalid(f"{config.precision} is not run on a CPU here", expected="a checkpoint of 16 or 32 bit for --cpu", do="leave --cpu out")
    if cpu:
        out.append({"tags": {"llm_engine": "vllm", "precision": config.precision, "tp": "1", "device": "cpu"}, **common})
    return out
