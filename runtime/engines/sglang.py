"""SGLang's server (0.5: `python -m sglang.launch_server`), generation and embedding; starts nothing and never imports SGLang.

Options are those of engines.md 9.4 and of its `arg_groups/fields`. It has no socket: it answers on a port of the loopback interface and takes a
random key, which stands in a file for this user alone (docs/adr/0008-engine-address.md).
"""

from __future__ import annotations

import json

from artifact.errors import Invalid
from runtime import checkpoint, launch, tuning
from runtime.engines import Installation, Launch, Start
from runtime.settings import GPU_SHARE, Settings

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
ALLOWED_DTYPES = ("auto", "half", "float16", "bfloat16", "float", "float32")
GUIDED = ("xgrammar", "outlines", "llguidance", "none")
PASSTHROUGH = {
    **dict.fromkeys(
        (
            "--max-running-requests",
            "--max-total-tokens",
            "--chunked-prefill-size",
            "--max-prefill-tokens",
            "--schedule-policy",
            "--schedule-conservativeness",
            "--kv-cache-dtype",
            "--attention-backend",
            "--page-size",
            "--random-seed",
            "--stream-interval",
            "--reasoning-parser",
            "--tool-call-parser",
        ),
        True,
    ),
    **dict.fromkeys(("--disable-radix-cache", "--disable-cuda-graph", "--enable-mixed-chunk", "--enable-cache-report"), False),
}


def find(settings: Settings) -> Installation:
    """The SGLang environment that AIRLOCK_ENGINE_SGLANG names; raises NotFound saying what is missing."""
    return launch.find(settings, "sglang", "bin/python3", "sglang")


def plan(start: Start) -> Launch:
    """The start of one SGLang server; raises Invalid for options outside the known words and for a model that is not what it says."""
    profile, settings, wish = start.profile, start.settings, start.settings.tuning
    secret = start.folder / "server.yaml"
    # A colon in a request's model would be read as BASE:ADAPTER, and refused: the engine gets a name without one, the front turns it back.
    first = settings.names[0].replace(":", "-")
    checkpoint.demand_precision(profile, start.model)
    tp, pp = launch.parallel(start)
    argv = [str(start.installation.program), "-m", "sglang.launch_server", "--model-path", str(start.model)]
    argv += ["--served-model-name", first, "--host", "127.0.0.1", "--port", "0", "--enable-metrics"]
    argv += ["--load-format", "safetensors", "--dtype", _dtype(start), "--tp-size", tp, "--pp-size", pp]
    argv += ["--is-embedding"] if launch.task(profile, "sglang") == "embed" else []
    for option in ("quantization", "kv_cache_dtype"):
        value = checkpoint.word(profile, option)
        argv += [f"--{option.replace('_', '-')}", value] if value else []
    for flag, number in (
        ("--context-length", settings.max_model_len or checkpoint.whole(profile, "max_model_len")),
        ("--max-running-requests", checkpoint.whole(profile, "max_num_seqs")),
        ("--max-prefill-tokens", checkpoint.whole(profile, "max_num_batched_tokens")),
    ):
        argv += [flag, str(number)] if number else []
    share = min(settings.kv_percent or start.share, start.share)  # less than asked where others use the GPU
    argv += ["--mem-fraction-static", f"{share:.3f}"] if share != GPU_SHARE else []
    argv += _features(start)
    found = checkpoint.adapters(profile, settings)
    if found:
        argv += ["--enable-lora", "--max-lora-rank", str(checkpoint.lora_rank(profile, settings))]
        argv += ["--lora-paths", *(f"{a.name}={a.path}" for a in found)]
        argv += ["--max-loras-per-batch", str(wish.max_gpu_loras)] if wish.max_gpu_loras else []
        argv += ["--max-loaded-loras", str(wish.max_cpu_loras)] if wish.max_cpu_loras else []
    argv += tuning.allowed(wish.passthrough, PASSTHROUGH, "sglang")
    argv += ["--config", str(secret)]
    models: dict[str, dict[str, object]] = {name: {"model": first} for name in settings.names}
    models |= {a.name: {"model": first, "lora_path": a.name} for a in found}
    if not start.key:
        raise Invalid("no key for the engine was given", expected="a random one: it listens where others of this host may ask")
    return Launch(
        tuple(argv),
        # A cheap health path: by default each poll generates a token. Requests are drained by the front, so its own wait without end is skipped.
        launch.environment(start, {"SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION": "0", "SGL_FORCE_SHUTDOWN": "1"}),
        "/ready",
        None,
        engine="sglang",
        cwd=start.folder,
        alive_path="/health",
        length_flag="--context-length",
        models=models,
        files={secret: json.dumps({"api-key": start.key})},
        key=start.key,
    )


def _dtype(start: Start) -> str:
    stated = start.profile.options.get("dtype", "")
    if stated and stated not in ALLOWED_DTYPES:
        raise Invalid(f"option dtype of profile {start.profile.id} is {stated[:40]!r}", expected=", ".join(ALLOWED_DTYPES))
    return stated or DTYPES.get(start.profile.tags.get("precision", ""), "auto")


def _features(start: Start) -> list[str]:
    """What the operator and the profile say of caching, structured output, tools, templates, speculation and code."""
    profile, wish = start.profile, start.settings.tuning
    argv = ["--disable-radix-cache"] if wish.kv_cache_reuse is False else []
    argv += ["--disable-cuda-graph"] if wish.disable_cuda_graph else []
    if wish.guided_backend:
        backend = {"guidance": "llguidance"}.get(wish.guided_backend, wish.guided_backend)
        if backend not in GUIDED:
            raise Invalid(f"NIM_GUIDED_DECODING_BACKEND is {wish.guided_backend!r}", expected=f"{', '.join(GUIDED)} with sglang")
        argv += ["--grammar-backend", backend]
    if wish.tokenizer_mode:
        if wish.tokenizer_mode not in ("auto", "slow"):
            raise Invalid(f"NIM_TOKENIZER_MODE is {wish.tokenizer_mode!r}", expected="auto or slow with sglang")
        argv += ["--tokenizer-mode", wish.tokenizer_mode]
    parser, reasoning = wish.tool_parser or checkpoint.word(profile, "tool_call_parser"), checkpoint.word(profile, "reasoning_parser")
    argv += ["--tool-call-parser", parser] if parser else []
    argv += ["--reasoning-parser", reasoning] if reasoning else []
    chat = checkpoint.template(start.model, start.settings)
    argv += ["--chat-template", chat] if chat else []
    draft, tokens = checkpoint.draft(profile, start.model, start.settings)
    if draft:
        argv += ["--speculative-algorithm", "STANDALONE", "--speculative-draft-model-path", draft]
        argv += ["--speculative-num-steps", str(tokens), "--speculative-eagle-topk", "1", "--speculative-num-draft-tokens", str(tokens + 1)]
    level = start.settings.log_level
    argv += ["--log-level", level.lower()] if level in ("DEBUG", "WARNING", "ERROR", "CRITICAL") else []
    return argv + (["--trust-remote-code"] if checkpoint.trusted(profile, start.model, start.settings) else [])
