"""TensorRT-LLM's server (`trtllm-serve`): prebuilt engines, checked before the start, and checkpoints by its PyTorch backend; starts nothing.

Options are those of engines.md 9.3. It has no socket and no key of its own, so it answers on a port of the loopback interface: its container must
not share its network (docs/adr/0008-engine-address.md). Its served name is the last part of a path, so the weights are linked under that name.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from artifact.errors import Invalid
from runtime import checkpoint, launch, tuning
from runtime.engines import Installation, Launch, Start
from runtime.node import Gpu
from runtime.settings import Settings

BUILT = "trtllm_engine"  # where a NIM's profile puts the prebuilt engine inside of the model directory
GUIDED = ("xgrammar", "llguidance")
LEVELS = {"DEBUG": "debug", "TRACE": "verbose", "WARNING": "warning", "ERROR": "error", "CRITICAL": "error"}
PASSTHROUGH = {
    "--max_batch_size": True,
    "--max_num_tokens": True,
    "--max_beam_width": True,
    "--ep_size": True,
    "--num_postprocess_workers": True,
    "--reasoning_parser": True,
    "--tool_parser": True,
    "--enable_chunked_prefill": False,
    "--fail_fast_on_attention_window_too_large": False,
}
# Compute capability by the first part of the name that an engine remembers of the GPU it was built on (build_config's cluster_key).
BUILT_ON = {
    **dict.fromkeys(("A100", "A30", "A800"), (8, 0)),
    **dict.fromkeys(("A10", "A10G", "A40"), (8, 6)),
    **dict.fromkeys(("L2", "L4", "L20", "L40", "L40S"), (8, 9)),
    **dict.fromkeys(("H20", "H100", "H200", "H800"), (9, 0)),
    "B200": (10, 0),
    "V100": (7, 0),
}


def find(settings: Settings) -> Installation:
    """The TensorRT-LLM environment that AIRLOCK_ENGINE_TENSORRT_LLM names; raises NotFound saying what is missing."""
    return launch.find(settings, "tensorrt_llm", "bin/trtllm-serve", "tensorrt_llm")


def plan(start: Start) -> Launch:
    """The start of one trtllm-serve; raises Invalid for what it cannot do, and for a prebuilt engine that would not load here."""
    profile, settings, wish = start.profile, start.settings, start.settings.tuning
    launch.task(profile, "tensorrt_llm", ("generate",))
    launch.require_unset(start, "tensorrt_llm", tokenizer_mode="NIM_TOKENIZER_MODE", max_cpu_loras="NIM_MAX_CPU_LORAS")
    tp, pp = launch.parallel(start)
    built = prebuilt(start, int(tp) * int(pp))
    link = start.folder / "served" / engine_name(settings.names[0])
    options = start.folder / "options.yaml"
    argv = [str(start.installation.program), str(link), "--backend", "tensorrt" if built else "pytorch", "--host", "127.0.0.1", "--port", "0"]
    argv += ["--tokenizer", str(start.model), "--tp_size", tp, "--pp_size", pp]
    for flag, value in (
        ("--max_seq_len", settings.max_model_len or checkpoint.whole(profile, "max_model_len")),
        ("--max_batch_size", checkpoint.whole(profile, "max_num_seqs")),
        ("--max_num_tokens", checkpoint.whole(profile, "max_num_batched_tokens")),
    ):
        argv += [flag, str(value)] if value else []
    parser, reasoning = wish.tool_parser or checkpoint.word(profile, "tool_call_parser"), checkpoint.word(profile, "reasoning_parser")
    argv += ["--tool_parser", parser] if parser else []
    argv += ["--reasoning_parser", reasoning] if reasoning else []
    chat = checkpoint.template(start.model, settings)
    argv += ["--chat_template", chat] if chat else []
    argv += ["--trust_remote_code"] if checkpoint.trusted(profile, start.model, settings) else []
    argv += ["--log_level", LEVELS[settings.log_level]] if settings.log_level in LEVELS else []
    argv += tuning.allowed(wish.passthrough, PASSTHROUGH, "tensorrt_llm")
    found = checkpoint.adapters(profile, settings)
    argv += ["--config", str(options)]
    served = engine_name(settings.names[0])
    models: dict[str, dict[str, object]] = {name: {"model": served} for name in settings.names}
    for number, a in enumerate(found, 1):
        models[a.name] = {"model": served, "lora_request": {"lora_name": a.name, "lora_int_id": number, "lora_path": str(a.path)}}
    return Launch(
        tuple(argv),
        launch.environment(start, {"TRTLLM_NO_USAGE_STATS": "1"}),
        "/health",
        None,
        engine="tensorrt_llm",
        cwd=start.folder,
        metrics_path="/prometheus/metrics",  # its /metrics is another thing: reading that drains a queue
        length_flag="--max_seq_len",
        models=models,
        files={options: json.dumps(_options(start, found), indent=1, sort_keys=True)},
        links={link: built or start.model},
    )


def engine_name(name: str) -> str:
    """A name as the last part of a path."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip(".") or "model"


def prebuilt(start: Start, world: int) -> Path | None:
    """The directory of a prebuilt engine, None for a checkpoint; raises Invalid where it would not load: version, world size, ranks, GPU."""
    folder = next((d for d in (start.model / BUILT, start.model) if any(d.glob("rank*.engine"))), None)
    if folder is None:
        if start.profile.tags.get("trtllm_buildable") != "true" and not (start.model / "config.json").is_file():
            raise Invalid("the model has neither a prebuilt engine nor a checkpoint", expected="rank0.engine or config.json", reason="model_content")
        checkpoint.demand_precision(start.profile, start.model)
        return None
    config = checkpoint.read_json(folder / "config.json")
    wanted, have = str(config.get("version") or ""), start.installation.version
    if not wanted or wanted != have:
        raise _mismatch(f"TensorRT-LLM {wanted or '(not told)'} built it, and {have or 'an unknown version'} is installed", "the same version")
    size = _field(config, "pretrained_config", "mapping", "world_size")
    ranks = sorted(int(m[1]) for p in folder.iterdir() if (m := re.fullmatch(r"rank(\d{1,5})\.engine", p.name)))
    if size != world:
        raise _mismatch(f"it was built for {size} GPU(s), and the profile spreads over {world}", "tp x pp as it was built")
    if ranks != list(range(world)):
        raise _mismatch(f"its ranks are {ranks}", f"rank0.engine to rank{world - 1}.engine")
    _demand_gpu(start, config)
    if checkpoint.draft(start.profile, start.model, start.settings)[0]:
        raise Invalid("a draft model is named, and a prebuilt engine takes none", expected="a checkpoint (trtllm_buildable)", reason="variable")
    return folder


def _demand_gpu(start: Start, config: dict[str, object]) -> None:
    """An engine holds the code of one compute capability: that of the tag, else of the GPU that its build remembers."""
    tag = start.profile.tags.get("compute_capability", "")
    key = str(_field(config, "build_config", "auto_parallel_config", "cluster_key") or "")
    digits = re.fullmatch(r"(\d+)\.?(\d)", tag)
    built = (int(digits[1]), int(digits[2])) if digits else BUILT_ON.get(key.partition("-")[0])
    other: list[Gpu] = [g for g in start.gpus if built and g.capability not in ((0, 0), built)]
    if built and other:
        here = ".".join(map(str, other[0].capability))
        raise _mismatch(f"it was built for compute capability {built[0]}.{built[1]}, and {other[0].name} has {here}", "a GPU of that capability")


def _mismatch(why: str, expected: str) -> Invalid:
    do = "choose a profile for this node, or one that TensorRT-LLM builds from the checkpoint (trtllm_buildable)"
    return Invalid(f"the prebuilt engine does not load here: {why}", expected=expected, do=do, reason="model_content")


def _field(config: object, *names: str) -> object:
    for name in names:
        config = config.get(name) if isinstance(config, dict) else None
    return config


def _options(start: Start, found: tuple[checkpoint.Adapter, ...]) -> dict[str, object]:
    """What only the file can say; it wins over the command line, so that a key stands there whole."""
    wish, settings = start.settings.tuning, start.settings
    options: dict[str, object] = {"return_perf_metrics": True}
    cache: dict[str, object] = {}
    if wish.kv_cache_reuse is not None:
        cache["enable_block_reuse"] = wish.kv_cache_reuse
    if settings.kv_percent:
        cache["free_gpu_memory_fraction"] = settings.kv_percent  # of what the weights leave, not of the whole as with the others
    if kind := checkpoint.word(start.profile, "kv_cache_dtype"):
        cache["dtype"] = kind
    if cache:
        options["kv_cache_config"] = cache
    if wish.disable_cuda_graph:
        options["cuda_graph_config"] = None
    if wish.guided_backend:
        backend = {"guidance": "llguidance"}.get(wish.guided_backend, wish.guided_backend)
        if backend not in GUIDED:
            raise Invalid(f"NIM_GUIDED_DECODING_BACKEND is {wish.guided_backend!r}", expected=f"{', '.join(GUIDED)} with tensorrt_llm")
        options["guided_decoding_backend"] = backend
    if found:
        most = {"max_loras": wish.max_gpu_loras} if wish.max_gpu_loras else {}
        rank = checkpoint.lora_rank(start.profile, settings)
        options["lora_config"] = {"lora_dir": [str(a.path) for a in found], "max_lora_rank": rank, **most}
    draft, tokens = checkpoint.draft(start.profile, start.model, settings)
    if draft:
        options["speculative_config"] = {"decoding_type": "Draft_Target", "max_draft_len": tokens, "speculative_model_dir": draft}
    return options
