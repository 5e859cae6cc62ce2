"""A scripted engine that streams frames of a chat answer at a set pace on a unix socket: what an engine costs the front, without an engine.

`python _engine.py SOCKET TOKENS PER_S` (PER_S 0: as fast as it goes); each frame is a write of its own, as vLLM's are. Imports no project code.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time

FRAME = {
    "id": "chatcmpl-0123456789abcdef0123456789abcdef",
    "object": "chat.completion.chunk",
    "created": 1700000000,
    "model": "acme/tiny",
    "choices": [{"index": 0, "delta": {"content": " word"}, "logprobs": None, "finish_reason": None, "token_ids": None}],
}
DATA = b"data: " + json.dumps(FRAME, separators=(",", ":")).encode() + b"\n\n"
CHUNK = b"%x\r\n%b\r\n" % (len(DATA), DATA)
END = b"data: [DONE]\n\n"
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\nTransfer-Encoding: chunked\r\n\r\n"
TICK_S = 0.002


async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """One request: health, or a stream."""
    tokens, per_s = int(sys.argv[2]), float(sys.argv[3])
    head = await reader.readuntil(b"\r\n\r\n")
    if not head.startswith(b"POST"):
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        writer.close()
        return
    writer.write(HEAD)
    began, sent = time.perf_counter(), 0
    while sent < tokens:
        due = min(tokens, int((time.perf_counter() - began) * per_s) + 1 if per_s else sent + 64)
        for _ in range(due - sent):
            writer.write(CHUNK)
        sent = due
        await writer.drain()
        await asyncio.sleep(TICK_S if per_s else 0)
    writer.write(b"%x\r\n%b\r\n0\r\n\r\n" % (len(END), END))
    writer.close()


async def main() -> None:
    """Listens until it is ended."""
    server = await asyncio.start_unix_server(answer, sys.argv[1], limit=1 << 20)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())
