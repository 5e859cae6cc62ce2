"""A strict stand-in of `trtllm-serve` (near 1.2): the recorded options, its routes, error shapes and ends; no GPU, no project code.

`python trtllm_serve.py ROOT MODEL [OPTION…]`, where ROOT is the stand-in's environment. An option outside the table ends it with status 2 and
click's words; a prebuilt engine that does not match ends it as the real one would.
"""

from __future__ import annotations

import asyncio
import json
import socket
import sys
from pathlib import Path
from typing import Any

from aiohttp import web

sys.path.insert(0, str(Path(__file__).resolve().parent))
from server import Script, answer, serve, stream  # type: ignore[import-not-found]

VERSION = "1.2.1"
# From tensorrt_llm/commands/serve.py: name -> takes a value, and the values where they are limited.
OPTIONS: dict[str, tuple[str, ...] | None] = {
    "--tokenizer": (),
    "--custom_tokenizer": (),
    "--host": (),
    "--port": (),
    "--backend": ("pytorch", "tensorrt", "trt", "_autodeploy"),
    "--custom_module_dirs": (),
    "--log_level": ("internal_error", "error", "warning", "info", "verbose", "debug", "trace"),
    "--max_beam_width": (),
    "--max_batch_size": (),
    "--max_num_tokens": (),
    "--max_seq_len": (),
    "--tensor_parallel_size": (),
    "--tp_size": (),
    "--pipeline_parallel_size": (),
    "--pp_size": (),
    "--context_parallel_size": (),
    "--cp_size": (),
    "--moe_expert_parallel_size": (),
    "--ep_size": (),
    "--moe_cluster_parallel_size": (),
    "--cluster_size": (),
    "--gpus_per_node": (),
    "--free_gpu_memory_fraction": (),
    "--kv_cache_free_gpu_memory_fraction": (),
    "--num_postprocess_workers": (),
    "--trust_remote_code": None,
    "--revision": (),
    "--config": (),
    "--extra_llm_api_options": (),
    "--reasoning_parser": ("deepseek-r1", "qwen3", "nano-v3"),
    "--tool_parser": ("hermes", "qwen3", "qwen3_coder", "deepseek_v3", "kimi_k2"),
    "--metadata_server_config_file": (),
    "--server_role": (),
    "--fail_fast_on_attention_window_too_large": None,
    "--otlp_traces_endpoint": (),
    "--disagg_cluster_uri": (),
    "--enable_chunked_prefill": None,
    "--media_io_kwargs": (),
    "--chat_template": (),
}
KEYS = {"kv_cache_config", "cuda_graph_config", "return_perf_metrics", "lora_config", "speculative_config", "guided_decoding_backend", "quant"}
CACHE_KEYS = {"enable_block_reuse", "free_gpu_memory_fraction", "dtype", "max_tokens", "max_attention_window"}


def refuse(words: str) -> None:
    """As click does."""
    sys.stderr.write(f"Usage: trtllm-serve [OPTIONS] MODEL\nTry 'trtllm-serve --help' for help.\n\nError: {words}\n")
    sys.exit(2)


def parse(argv: list[str]) -> tuple[str, dict[str, str]]:
    """The model and the options; click takes whole names only."""
    models, found = [], {}
    words = list(argv)
    while words:
        word = words.pop(0)
        if not word.startswith("-"):
            models.append(word)
            continue
        name, sep, value = word.partition("=")
        if name not in OPTIONS:
            refuse(f"No such option: {name}")
        choices = OPTIONS[name]
        if choices is None:
            found[name] = "1"
            continue
        if not sep:
            if not words:
                refuse(f"Option '{name}' requires an argument.")
            value = words.pop(0)
        if choices and value not in choices:
            refuse(f"Invalid value for '{name}': {value!r} is not one of {', '.join(map(repr, choices))}.")
        if name.endswith(("_size", "_len", "_tokens", "--port", "_width")) and not value.isdigit():
            refuse(f"Invalid value for '{name}': {value!r} is not a valid integer.")
        found[name] = value
    if not models:
        refuse("Missing argument 'MODEL'.")
    if len(models) > 1:
        refuse(f"Got unexpected extra argument ({models[1]})")
    return models[0], found


def load(model: Path, options: dict[str, str], extra: dict[str, Any]) -> None:
    """What loading finds out: unknown keys, an engine for another version or world."""
    unknown = set(extra) - KEYS or set(extra.get("kv_cache_config") or {}) - CACHE_KEYS
    if unknown:
        raise ValueError(f"pydantic_core._pydantic_core.ValidationError: Extra inputs are not permitted: {', '.join(sorted(unknown))}")
    if options.get("--backend", "pytorch") == "pytorch":
        if not (model / "config.json").exists():
            raise FileNotFoundError(f"{model}/config.json")
        return
    config = json.loads((model / "config.json").read_text())
    if config["version"] != VERSION:
        what = "The engine plan file is not compatible with this version of TensorRT"
        raise RuntimeError(f"[TRT] IRuntime::deserializeCudaEngine: Error Code 6: API Usage Error ({what})")
    world = int(options.get("--tp_size", "1")) * int(options.get("--pp_size", "1"))
    assert config["pretrained_config"]["mapping"]["world_size"] == world, "world size"
    assert all((model / f"rank{i}.engine").exists() for i in range(world)), "rank"


class Server:
    """The routes of openai_server.py."""

    def __init__(self, name: str, extra: dict[str, Any], script: Any) -> None:
        self.name, self.extra, self.script, self.statistics = name, extra, script, [{"iter": 0}]

    def app(self) -> web.Application:
        """All of them, the dangerous ones too."""
        app = web.Application(client_max_size=64 << 20)
        app.router.add_get("/health", self.health)
        app.router.add_get("/version", self.version)
        app.router.add_get("/v1/models", self.models)
        app.router.add_get("/metrics", self.drain)
        if self.extra.get("return_perf_metrics"):
            app.router.add_get("/prometheus/metrics", self.prometheus)
        app.router.add_post("/v1/chat/completions", self.generate)
        app.router.add_post("/v1/completions", self.generate)
        for path in ("/update_weights", "/release_memory", "/resume_memory", "/kv_cache_events"):
            app.router.add_post(path, self.danger)
        return app

    async def health(self, request: web.Request) -> web.Response:
        """200, or its 503 text."""
        sick = self.script.unhealthy and Path(self.script.unhealthy).exists()
        return web.Response(status=503, text="LLM is unavailable. Please check the server logs for more details.") if sick else web.Response()

    async def version(self, request: web.Request) -> web.Response:
        """The version."""
        return web.json_response({"version": VERSION})

    async def models(self, request: web.Request) -> web.Response:
        """One entry without a length."""
        return web.json_response({"object": "list", "data": [{"id": self.name, "object": "model", "created": 1, "owned_by": "tensorrt_llm"}]})

    async def drain(self, request: web.Request) -> web.Response:
        """JSON statistics that are gone once they are read."""
        self.script.record("/metrics", None)
        taken, self.statistics = self.statistics, []
        return web.json_response(taken)

    async def prometheus(self, request: web.Request) -> web.Response:
        """Prometheus text."""
        return web.Response(text="# TYPE trtllm_request_success_total counter\ntrtllm_request_success_total 1\n")

    async def danger(self, request: web.Request) -> web.Response:
        """Must never be reached through a front."""
        self.script.record(request.path, None)
        return web.json_response({"reached": True})

    async def generate(self, request: web.Request) -> web.StreamResponse:
        """Chat or completion; validation errors are a string, others not wrapped."""
        body = await request.json()
        self.script.record(request.path, body)
        chat = request.path.endswith("chat/completions")
        if ("messages" if chat else "prompt") not in body:
            return web.json_response({"error": "[{'type': 'missing', 'loc': ('body', 'messages'), 'msg': 'Field required'}]"}, status=400)
        if int(body.get("max_tokens", 1)) > 4096:
            words = "The sum of prompt length and max_tokens should not exceed max_num_tokens"
            return web.json_response({"object": "error", "message": words, "type": "BadRequestError", "param": None, "code": 400}, status=400)
        if body.get("stream"):
            streamed: web.StreamResponse = await stream(request, body | {"model": self.name}, chat, self.script)
            return streamed
        return web.json_response(answer(body | {"model": self.name}, chat))


def main() -> None:
    """Binds, loads, serves: in this order, so that a taken port is found at once."""
    root, argv = Path(sys.argv[1]), sys.argv[2:]
    model, options = parse(argv)
    script = Script(root)
    listener = socket.socket()
    where = (options.get("--host", "localhost"), int(options.get("--port", "8000")))
    assert where[1] > 0, "Port must be specified if disagg cluster config is not provided"
    try:
        listener.bind(where)
    except OSError as e:
        raise RuntimeError(f"Failed to bind socket to {where[0]}:{where[1]}: {e}") from e
    extra = json.loads(Path(options["--config"]).read_text()) if "--config" in options else {}
    load(Path(model), options, extra)
    script.begin()
    asyncio.run(serve(Server(Path(model).name, extra, script).app(), listener, script, after=None))


if __name__ == "__main__":
    main()
