"""What the stand-ins of trtllm-serve and SGLang share: a scripted life and OpenAI streams; imports no project code.

A `script.json` in the directory of the environment (the one that holds `bin`) says what goes wrong: `load_s` before it listens, `start_log`
and `start_rc` (it ends then), `fail_times` (a file that counts down), `frames`, `frame_s`, `die_after`, `stall_after` (frames), `garbage` (answers
that are no HTTP), `flood_s` (seconds of log as fast as it can, before it listens), `chatter_s` (the same in short lines, while it serves),
`unhealthy` (a file; while it exists health is 503), `ignore_term`, `record` (a file of JSON lines), `child` (a file that gets the pid of a child
which leaves the process group, clears its environment and ignores SIGTERM).
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from aiohttp import web

WORDS = ["The", " answer", " is", " forty", "-two", "."]


class Script:
    """The wanted misbehaviour of one stand-in."""

    def __init__(self, root: Path) -> None:
        path = root / "script.json"
        self.all: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}

    def __getattr__(self, name: str) -> Any:
        return self.all.get(name)

    def begin(self) -> None:
        """What happens before it listens: words, floods, children, deaths, slowness."""
        if self.start_log:
            print(self.start_log, flush=True)
        if self.start_rc is not None:
            sys.exit(self.start_rc)
        if self.fail_times:
            left = int(Path(self.fail_times).read_text())
            if left:
                Path(self.fail_times).write_text(str(left - 1))
                print("something broke", flush=True)
                sys.exit(1)
        if self.child:
            code = "import os,signal,time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
            argv = [sys.executable, "-I", "-c", code]
            Path(self.child).write_text(str(subprocess.Popen(argv, start_new_session=True, env={"PATH": "/bin"}).pid))
        if self.ignore_term:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        end = time.monotonic() + (self.flood_s or 0)
        while time.monotonic() < end:
            os.write(1, b"flood " * 10_000 + b"\n" + b"\xff\x00garbage without an end " * 1000)
        time.sleep(self.load_s or 0)

    def chatter(self) -> None:
        """Short lines as fast as the pipe takes them."""
        end = time.monotonic() + (self.chatter_s or 0)
        while time.monotonic() < end:
            os.write(1, b"x\n" * 16_000)

    def record(self, path: str, body: object, **more: object) -> None:
        """One line per request."""
        if "record" in self.all:
            with Path(self.all["record"]).open("a") as out:
                out.write(json.dumps({"path": path, "body": body, **more}) + "\n")


def answer(body: dict[str, Any], chat: bool) -> dict[str, Any]:
    """A whole completion; the model's name is what the request said."""
    choice: dict[str, Any] = {"index": 0, "finish_reason": "stop"}
    choice |= {"message": {"role": "assistant", "content": "".join(WORDS)}} if chat else {"text": "".join(WORDS)}
    kind = "chat.completion" if chat else "text_completion"
    return {"id": "x-1", "object": kind, "created": 1, "model": body.get("model"), "choices": [choice], "usage": {"completion_tokens": len(WORDS)}}


async def stream(request: web.Request, body: dict[str, Any], chat: bool, script: Script) -> web.StreamResponse:
    """A completion as server-sent events, cut or stalled where the script says so."""
    out = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
    await out.prepare(request)
    frames = script.frames or len(WORDS)
    for i in range(frames):
        if i == script.die_after:
            os.kill(os.getpid(), signal.SIGKILL)
        if i == script.stall_after:
            await asyncio.sleep(3600)
        await asyncio.sleep(script.frame_s or 0)
        word = WORDS[i % len(WORDS)]
        choice = {"index": 0, "finish_reason": "stop" if i == frames - 1 else None, **({"delta": {"content": word}} if chat else {"text": word})}
        kind = "chat.completion.chunk" if chat else "text_completion"
        frame = {"id": "x-1", "object": kind, "created": 1, "model": body.get("model"), "choices": [choice]}
        await out.write(b"data: " + json.dumps(frame).encode() + b"\n\n")
    await out.write(b"data: [DONE]\n\n")
    await out.write_eof()
    return out


async def serve(app: web.Application, listener: Any, script: Script, *, after: int | None) -> None:
    """Listens until SIGTERM, ends what runs, and then itself: `after` is the exit status, None means by the signal again."""
    runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=5.0)
    await runner.setup()
    if script.garbage:

        async def rubbish(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.read(100)
            writer.write(b"\x00\xff" * 500 + b"HTTP/9.9 abc\r\n\r\n")
            writer.close()

        await asyncio.start_server(rubbish, sock=listener)
    else:
        await web.SockSite(runner, listener).start()
    print("Application startup complete.", flush=True)
    threading.Thread(target=script.chatter, daemon=True).start()
    stop = asyncio.Event()
    if not script.ignore_term:
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    await stop.wait()
    await runner.cleanup()
    sys.stdout.flush()
    if after is None:
        asyncio.get_running_loop().remove_signal_handler(signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
    os._exit(after or 0)
