"""A scripted engine: speaks vLLM's routes on a unix socket and can be late, die, stall or lie on command; imports no project code.

`python engine.py serve MODEL --served-model-name A [B] --uds PATH [--fake-…]`. Arguments it does not know end it with status 2, as vLLM does.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from aiohttp import web

WORDS = ["The", " answer", " is", " forty", "-two", "."]


def parse() -> argparse.Namespace:
    """vLLM's flags that the product passes, and the script."""
    p = argparse.ArgumentParser(prog="vllm")
    p.add_argument("command", choices=["serve"])
    p.add_argument("model")
    p.add_argument("--served-model-name", nargs="+", required=True)
    p.add_argument("--uds", required=True)
    p.add_argument("--dtype")
    p.add_argument("--disable-uvicorn-access-log", action="store_true")
    p.add_argument("--allowed-media-domains", nargs="+")
    p.add_argument("--max-model-len", type=int, default=512)
    p.add_argument("--enforce-eager", action="store_true")
    p.add_argument("--load-format")
    p.add_argument("--runner")
    p.add_argument("--convert")
    p.add_argument("--fake-load-s", type=float, default=0.0, help="seconds before it listens")
    p.add_argument("--fake-start-log", default="", help="printed at start; with --fake-start-rc it ends then")
    p.add_argument("--fake-start-rc", type=int, default=-1)
    p.add_argument("--fake-fail-times", default="", help="file that counts: dies at start so often as it says, then works")
    p.add_argument("--fake-needs-len", type=int, default=0, help="refuses a longer --max-model-len in vLLM's words")
    p.add_argument("--fake-frames", type=int, default=len(WORDS))
    p.add_argument("--fake-frame-s", type=float, default=0.0, help="pause before each frame")
    p.add_argument("--fake-die-after", type=int, default=-1, help="frames after which the process ends with status 0")
    p.add_argument("--fake-stall-after", type=int, default=-1, help="frames after which nothing more comes")
    p.add_argument("--fake-no-done", action="store_true", help="ends streams without [DONE]")
    p.add_argument("--fake-health", default="", help="file; while it exists /health is 503")
    p.add_argument("--fake-ignore-term", action="store_true")
    p.add_argument("--fake-child", default="", help="starts a child that ignores SIGTERM and writes its pid here")
    p.add_argument("--fake-garbage", choices=["html", "redirect", "text", "cut", "reset", "noend", "silent"], help="what every inference answer is")
    p.add_argument("--fake-up", default="", help="file that gets the time at which it listens")
    p.add_argument("--fake-record", default="", help="file that gets one JSON line per request, with `aborted` where the client went away")
    return p.parse_args()


class Fake:
    """The routes; state is the arguments and the record file."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.names: list[str] = args.served_model_name
        self.ended: dict[str, int] = {"stop": 0, "abort": 0}

    def app(self) -> web.Application:
        """Generate routes, or embedding routes with --runner pooling, and dangerous ones that a front must never reach."""
        app = web.Application(client_max_size=64 << 20)
        app.router.add_get("/health", self.health)
        app.router.add_get("/v1/models", self.models)
        app.router.add_get("/metrics", self.metrics)
        app.router.add_post("/invocations", self.danger)
        if self.args.runner == "pooling":
            app.router.add_post("/v1/embeddings", self.embeddings)
            app.router.add_post("/rerank", self.rerank)
        else:
            app.router.add_post("/v1/responses", self.responses)
            app.router.add_post("/tokenize", self.tokenize)
            app.router.add_post("/detokenize", self.tokenize)
            app.router.add_post("/v1/chat/completions", self.generate)
            app.router.add_post("/v1/completions", self.generate)
        app.middlewares.append(self.not_found)
        return app

    @web.middleware
    async def not_found(self, request: web.Request, handler):  # type: ignore[no-untyped-def]
        """FastAPI's words for an absent route."""
        try:
            return await handler(request)
        except web.HTTPNotFound:
            self.record(request, None)
            return web.json_response({"detail": "Not Found"}, status=404)

    def record(self, request: web.Request, body: object, **more: object) -> None:
        """One line per request."""
        if self.args.fake_record:
            line = {"path": request.raw_path, "method": request.method, "headers": dict(request.headers), "body": body, **more}
            with Path(self.args.fake_record).open("a") as out:
                out.write(json.dumps(line) + "\n")

    async def health(self, request: web.Request) -> web.Response:
        """200, or 503 while the file is there."""
        return web.Response(status=503 if self.args.fake_health and Path(self.args.fake_health).exists() else 200)

    async def models(self, request: web.Request) -> web.Response:
        """With the local path as root: a leak that a front must close."""
        data = [{"id": n, "object": "model", "root": self.args.model, "max_model_len": self.args.max_model_len} for n in self.names]
        return web.json_response({"object": "list", "data": data})

    async def metrics(self, request: web.Request) -> web.Response:
        """Prometheus text with vLLM's names."""
        lines = [f'vllm:request_success_total{{finished_reason="{k}",model_name="{self.names[0]}"}} {v}' for k, v in self.ended.items()]
        return web.Response(text="\n".join(lines) + "\n")

    async def danger(self, request: web.Request) -> web.Response:
        """As strong as chat in the real one."""
        self.record(request, None)
        return web.json_response({"reached": True})

    async def embeddings(self, request: web.Request) -> web.Response:
        """Constant vectors; refuses what the real one refuses."""
        body = await request.json()
        self.record(request, body)
        if "input_type" in body or ("encoding_format" in body and body["encoding_format"] is None):
            return web.json_response({"error": {"message": "bad field", "type": "Bad Request", "param": None, "code": 400}}, status=400)
        texts = body["input"] if isinstance(body["input"], list) else [body["input"]]
        data = [{"object": "embedding", "index": i, "embedding": [1.0, 0.0]} for i in range(len(texts))]
        return web.json_response({"object": "list", "data": data, "model": self.names[0], "usage": {"prompt_tokens": 1, "total_tokens": 1}})

    async def rerank(self, request: web.Request) -> web.Response:
        """Scores that grow with the length of the text, in the order of the documents."""
        body = await request.json()
        self.record(request, body)
        results = [{"index": i, "document": {"text": t}, "relevance_score": len(t) / 10} for i, t in enumerate(body["documents"])]
        usage = {"prompt_tokens": 3, "total_tokens": 3}
        return web.json_response({"id": "score-1", "model": self.names[0], "usage": usage, "results": results})

    async def tokenize(self, request: web.Request) -> web.Response:
        """One token a character, and back."""
        body = await request.json()
        self.record(request, body)
        if request.path == "/detokenize":
            return web.json_response({"prompt": "".join(map(chr, body["tokens"]))})
        return web.json_response({"count": len(body["prompt"]), "max_model_len": 512, "tokens": [ord(c) for c in body["prompt"]], "token_strs": None})

    async def responses(self, request: web.Request) -> web.StreamResponse:
        """vLLM's response object, whole or as events; one that is cut counts as aborted."""
        body = await request.json()
        self.record(request, body)
        text = "".join(WORDS)
        output = [{"id": "msg_1", "type": "message", "role": "assistant", "status": "completed", "content": [{"type": "output_text", "text": text}]}]
        done = {"id": "resp_engine", "object": "response", "created_at": 1, "model": self.names[0], "status": "completed", "output": output}
        try:
            if not body.get("stream"):
                await asyncio.sleep(self.args.fake_frame_s * self.args.fake_frames)
                return web.json_response(done)
            out = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
            await out.prepare(request)
            began = {"type": "response.created", "response": {**done, "status": "in_progress", "output": []}}
            deltas = [{"type": "response.output_text.delta", "delta": w, "item_id": "msg_1"} for w in WORDS]
            for event in (began, *deltas, {"type": "response.completed", "response": done}):
                await asyncio.sleep(self.args.fake_frame_s)
                await out.write(f"event: {event['type']}\ndata: {json.dumps(event)}\n\n".encode())
            await out.write_eof()
        except (ConnectionError, asyncio.CancelledError):
            self.ended["abort"] += 1
            self.record(request, None, aborted=True)
            raise
        return out

    async def garbage(self, request: web.Request) -> web.StreamResponse:
        """What no engine should say."""
        kind = self.args.fake_garbage
        if kind == "redirect":
            return web.Response(status=307, headers={"Location": "http://127.0.0.1:9/"})
        if kind in ("html", "text"):
            return web.Response(text="<html>" if kind == "html" else "{broken", content_type="text/html" if kind == "html" else "text/plain")
        if kind == "silent":
            await asyncio.sleep(3600)
        assert request.transport is not None
        head = b"HTTP/1.1 200 OK\r\nContent-Type: "
        if kind == "reset":
            request.transport.write(b"\x00\x01garbage\r\n\r\n")
        elif kind == "cut":
            request.transport.write(head + b'application/json\r\nContent-Length: 1000\r\n\r\n{"id":')
        else:
            request.transport.write(head + b"text/event-stream\r\n\r\ndata: " + b"x" * (3 << 20))
        await asyncio.sleep(0.2)
        request.transport.close()
        return web.Response()

    async def generate(self, request: web.Request) -> web.StreamResponse:
        """Chat or completion, whole or streamed."""
        raw = await request.read()
        body = json.loads(raw)
        self.record(request, body)
        if self.args.fake_garbage:
            return await self.garbage(request)
        if body.get("model") not in self.names:
            error = {"message": f"The model `{body.get('model')}` does not exist.", "type": "NotFoundError", "param": "model", "code": 404}
            return web.json_response({"error": error}, status=404)
        chat = request.path.endswith("chat/completions")
        if ("messages" if chat else "prompt") not in body:
            error = {"message": f"1 validation error in {self.args.model}", "type": "Bad Request", "param": "body.messages", "code": 400}
            return web.json_response({"error": error}, status=400)
        text = "".join(WORDS)
        if not body.get("stream"):
            if self.args.fake_die_after == 0:
                os._exit(0)
            await asyncio.sleep(self.args.fake_frame_s * self.args.fake_frames)
            choice = {"index": 0, "finish_reason": "stop", **({"message": {"role": "assistant", "content": text}} if chat else {"text": text})}
            kind = "chat.completion" if chat else "text_completion"
            return web.json_response({"id": "x-1", "object": kind, "created": 1, "model": self.names[0], "choices": [choice], "usage": None})
        out = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
        await out.prepare(request)
        try:
            await self.frames(out, chat)
        except (ConnectionError, asyncio.CancelledError):
            self.ended["abort"] += 1
            self.record(request, None, aborted=True)
            raise
        self.ended["stop"] += 1
        return out

    async def frames(self, out: web.StreamResponse, chat: bool) -> None:
        """The scripted stream."""
        for i in range(self.args.fake_frames):
            if i == self.args.fake_die_after:
                os._exit(0)
            if i == self.args.fake_stall_after:
                await asyncio.sleep(3600)
            await asyncio.sleep(self.args.fake_frame_s)
            word = WORDS[i % len(WORDS)]
            last = "stop" if i == self.args.fake_frames - 1 else None
            choice = {"index": 0, "finish_reason": last, **({"delta": {"content": word}} if chat else {"text": word})}
            kind = "chat.completion.chunk" if chat else "text_completion"
            frame = {"id": "x-1", "object": kind, "created": 1, "model": self.names[0], "choices": [choice]}
            await out.write(b"data: " + json.dumps(frame, separators=(",", ":")).encode() + b"\n\n")
        if not self.args.fake_no_done:
            await out.write(b"data: [DONE]\n\n")
        await out.write_eof()


def start_script(args: argparse.Namespace) -> None:
    """What happens before it listens: words, deaths, children."""
    if args.fake_start_log:
        print(args.fake_start_log, flush=True)
    if args.fake_start_rc >= 0:
        sys.exit(args.fake_start_rc)
    if args.fake_needs_len and args.max_model_len > args.fake_needs_len:
        print(f"ValueError: To serve at least one request ... the estimated maximum model length is {args.fake_needs_len}. Try", flush=True)
        sys.exit(1)
    if args.fake_fail_times:
        left = int(Path(args.fake_fail_times).read_text())
        if left:
            Path(args.fake_fail_times).write_text(str(left - 1))
            print("something broke", flush=True)
            sys.exit(1)
    if args.fake_child:
        code = "import signal,time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
        Path(args.fake_child).write_text(str(subprocess.Popen([sys.executable, "-c", code]).pid))
    if args.fake_ignore_term:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(args.fake_load_s)


async def serve(args: argparse.Namespace) -> None:
    """Listens until SIGTERM; cuts what is running then, as vLLM does."""
    runner = web.AppRunner(Fake(args).app(), access_log=None, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    await web.UnixSite(runner, args.uds).start()
    if args.fake_up:
        Path(args.fake_up).write_text(str(time.time()))
    print("Application startup complete.", flush=True)
    stop = asyncio.Event()
    if not args.fake_ignore_term:
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    await stop.wait()
    os._exit(0)


if __name__ == "__main__":
    arguments = parse()
    start_script(arguments)
    asyncio.run(serve(arguments))
