"""A strict stand-in of `python -m sglang.launch_server` (0.5.23): the recorded options, its routes, key, error shapes and ends; no project code.

`python sglang.py ROOT -m sglang.launch_server [OPTION…]`, where ROOT is the stand-in's environment. As the real one it reads `--config`, prints
all its settings at the start (its key too), guards everything but health and metrics, and has children that an end must take along.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from aiohttp import web

sys.path.insert(0, str(Path(__file__).resolve().parent))
from server import Script, answer, serve, stream  # type: ignore[import-not-found]

WORKER = "import sys, time; time.sleep(3600)"


def parse(argv: list[str]) -> argparse.Namespace:
    """The options of engines.md 9.4 and of its arg_groups/fields, with argparse's own words for anything else."""
    p = argparse.ArgumentParser(prog="launch_server.py", allow_abbrev=False)
    text = "--model-path --served-model-name --tokenizer-path --host --quantization --kv-cache-dtype --model-loader-extra-config --api-key"
    text += " --admin-api-key --chat-template --tool-call-parser --reasoning-parser --device --speculative-draft-model-path --attention-backend"
    for name in text.split():
        p.add_argument(name)
    numbers = "--port --tp-size --pp-size --context-length --max-running-requests --max-lora-rank --max-loras-per-batch --max-loaded-loras"
    numbers += " --base-gpu-id --watchdog-timeout --speculative-num-steps --speculative-eagle-topk --speculative-num-draft-tokens --max-total-tokens"
    numbers += " --chunked-prefill-size --max-prefill-tokens --page-size --random-seed --stream-interval"
    for name in numbers.split():
        p.add_argument(name, type=int)
    for name in ["--mem-fraction-static", "--schedule-conservativeness"]:
        p.add_argument(name, type=float)
    switches = "--is-embedding --enable-metrics --enable-lora --trust-remote-code --skip-server-warmup --disable-radix-cache --disable-cuda-graph"
    for name in (switches + " --enable-mixed-chunk --enable-cache-report").split():
        p.add_argument(name, action="store_true")
    p.add_argument("--dtype", choices=["auto", "half", "float16", "bfloat16", "float", "float32"])
    p.add_argument("--load-format", choices=["auto", "pt", "safetensors", "npcache", "dummy", "sharded_state", "gguf", "runai_streamer"])
    p.add_argument("--lora-paths", nargs="*")
    p.add_argument("--log-level", choices=["debug", "info", "warning", "error", "critical"])
    p.add_argument("--grammar-backend", choices=["xgrammar", "outlines", "llguidance", "none"])
    p.add_argument("--tokenizer-mode", choices=["auto", "slow"])
    p.add_argument("--schedule-policy", choices=["lpm", "random", "fcfs", "dfs-weight", "lof", "priority"])
    p.add_argument("--speculative-algorithm", choices=["EAGLE", "EAGLE3", "NEXTN", "STANDALONE", "NGRAM"])
    if "--config" in argv:
        at = argv.index("--config")
        path = Path(argv[at + 1])
        if path.suffix not in (".yaml", ".yml"):
            raise ValueError(f"Config file must be YAML format, got: {path.suffix}")
        assert path.stat().st_mode & 0o077 == 0, "the key can be read by others"
        more = [word for key, value in json.loads(path.read_text()).items() for word in (f"--{key}", str(value))]
        argv = more + argv[:at] + argv[at + 2 :]
    return p.parse_args(argv)


class Server:
    """The routes of http_server.py."""

    def __init__(self, args: argparse.Namespace, script: Any) -> None:
        self.args, self.script = args, script

    def app(self) -> web.Application:
        """All of them, the dangerous ones too, behind the key."""
        app = web.Application(client_max_size=64 << 20, middlewares=[self.guard])
        for path in ("/ready", "/health", "/health_generate"):
            app.router.add_get(path, self.health)
        app.router.add_get("/v1/models", self.models)
        if self.args.enable_metrics:
            app.router.add_get("/metrics", self.metrics)
        if self.args.is_embedding:
            app.router.add_post("/v1/embeddings", self.embeddings)
        else:
            app.router.add_post("/v1/chat/completions", self.generate)
            app.router.add_post("/v1/completions", self.generate)
        for path in ("/flush_cache", "/load_lora_adapter", "/invocations", "/generate"):
            app.router.add_post(path, self.danger)
        return app

    @web.middleware
    async def guard(self, request: web.Request, handler):  # type: ignore[no-untyped-def]
        """As its API-key middleware does."""
        free = request.path.startswith(("/health", "/ready", "/metrics"))
        if self.args.api_key and not free and request.headers.get("Authorization") != f"Bearer {self.args.api_key}":
            return web.json_response({"error": "Unauthorized"}, status=401)
        try:
            return await handler(request)
        except web.HTTPNotFound:
            return web.json_response({"detail": "Not Found"}, status=404)

    async def health(self, request: web.Request) -> web.Response:
        """200 or 503 without a body; a generation of a second where that is not switched off."""
        if request.path.startswith("/health") and os.environ.get("SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION", "1") != "0":
            await asyncio.sleep(1)
        return web.Response(status=503 if self.script.unhealthy and Path(self.script.unhealthy).exists() else 200)

    async def metrics(self, request: web.Request) -> web.Response:
        """Prometheus text."""
        return web.Response(text="# TYPE sglang:num_running_reqs gauge\nsglang:num_running_reqs 0\n")

    async def models(self, request: web.Request) -> web.Response:
        """The path as root: a leak that a front must close."""
        entry = {"id": self.args.served_model_name, "object": "model", "created": 1, "owned_by": "sglang", "root": self.args.model_path}
        return web.json_response({"object": "list", "data": [entry | {"max_model_len": self.args.context_length or 8192}]})

    async def danger(self, request: web.Request) -> web.Response:
        """Must never be reached through a front."""
        self.script.record(request.path, None)
        return web.json_response({"reached": True})

    async def embeddings(self, request: web.Request) -> web.Response:
        """Constant vectors."""
        body = await request.json()
        self.script.record(request.path, body)
        texts = body["input"] if isinstance(body["input"], list) else [body["input"]]
        data = [{"object": "embedding", "index": i, "embedding": [1.0, 0.0]} for i in range(len(texts))]
        return web.json_response({"object": "list", "data": data, "model": body["model"], "usage": {"prompt_tokens": 1, "total_tokens": 1}})

    async def generate(self, request: web.Request) -> web.StreamResponse:
        """Chat or completion; errors are not wrapped."""
        body = await request.json()
        self.script.record(request.path, body)
        chat = request.path.endswith("chat/completions")
        _, _, adapter = str(body.get("model", "")).partition(":")
        adapter = adapter or body.get("lora_path") or ""
        if adapter and adapter not in [p.partition("=")[0] for p in self.args.lora_paths or ()]:
            words = f"LoRA adapter '{adapter}' was requested, but LoRA is not enabled."
            return web.json_response({"object": "error", "message": words, "type": "BadRequestError", "param": None, "code": 400}, status=400)
        if ("messages" if chat else "prompt") not in body:
            words = f"1 validation error for ChatCompletionRequest in {self.args.model_path}"
            return web.json_response({"object": "error", "message": words, "type": "Bad Request", "param": "messages", "code": 400}, status=400)
        return await stream(request, body, chat, self.script) if body.get("stream") else web.json_response(answer(body, chat))


def watch(scheduler: subprocess.Popen[bytes]) -> None:
    """A dead scheduler takes the server along, by SIGQUIT as in the real one."""
    print(f"Scheduler exited with status {scheduler.wait()}. It usually means the child failed.", flush=True)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.kill(os.getpid(), signal.SIGQUIT)


def main() -> None:
    """Parses, tells its settings, starts a scheduler, loads, binds, serves."""
    root, argv = Path(sys.argv[1]), sys.argv[2:]
    assert argv[:2] == ["-m", "sglang.launch_server"], argv
    args = parse(argv[2:])
    script = Script(root)
    print("server_args=ServerArgs(" + ", ".join(f"{k}={v!r}" for k, v in vars(args).items()) + ")", flush=True)
    scheduler = subprocess.Popen([sys.executable, "-c", WORKER, "sglang::scheduler"])
    threading.Thread(target=watch, args=(scheduler,), daemon=True).start()
    script.begin()
    listener = socket.socket()
    try:
        listener.bind((args.host or "127.0.0.1", args.port or 30000))
    except OSError as e:
        print(f"[Errno {e.errno}] error while attempting to bind on address ({args.host!r}, {args.port}): address already in use", flush=True)
        sys.exit(1)
    asyncio.run(serve(Server(args, script).app(), listener, script, after=0))


if __name__ == "__main__":
    main()
