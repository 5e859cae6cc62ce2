"""The responses API over an engine that keeps nothing: ids, states and conversations are ours, the engine answers one request at a time."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import replace

from runtime.front.controls import Asked
from runtime.front.errors import Json, Refused
from runtime.front.stored import Kept, Stored, new_id

ENDS = ("response.completed", "response.incomplete", "response.failed", "response.cancelled")
Answer = Callable[[], Awaitable[bytes]]


def conversation(asked: Asked, stored: Stored, owner: str) -> Asked:
    """The request with the conversation before it in its input; raises Refused (404 for one that is not the caller's, 400 for one not done)."""
    given = asked.body.get("input")
    items: list[object] = (
        [{"type": "message", "role": "user", "content": given}] if isinstance(given, str) else list(given) if isinstance(given, list) else []
    )
    if not items:
        raise Refused(400, "input holds nothing to answer", param="input")
    if asked.previous:
        before = stored.get(asked.previous, owner)
        if before.body.get("status") not in ("completed", "incomplete"):
            raise Refused(400, f"the previous response is {before.body.get('status')}", param="previous_response_id")
        output = before.body.get("output")
        items = [*before.items, *(output if isinstance(output, list) else []), *items]
        return replace(asked, body={**asked.body, "input": items})
    return asked


def items_of(asked: Asked) -> list[object]:
    """What the next turn must repeat of this one."""
    given = asked.body["input"]
    return given if isinstance(given, list) else [{"type": "message", "role": "user", "content": given}]


def ours(body: Json, key: str, asked: Asked) -> Json:
    """The engine's response object under our id, with what it does not know of our store."""
    return body | {
        "id": key,
        "model": asked.model,
        "store": asked.store,
        "background": asked.background,
        "previous_response_id": asked.previous or None,
    }


def read(data: bytes, key: str, asked: Asked) -> Json:
    """The engine's answer as a response of ours; raises Refused (502)."""
    try:
        body = json.loads(data)
    except (ValueError, RecursionError) as e:
        raise Refused(502, "the engine's answer is no JSON", "BadGateway") from e
    if not isinstance(body, dict) or body.get("object") != "response" or not isinstance(body.get("status"), str):
        raise Refused(502, "the engine's answer is no response", "BadGateway")
    return ours(body, key, asked)


def keep(data: bytes, asked: Asked, stored: Stored, owner: str) -> Json:
    """The engine's answer as a response of ours, kept where the request asks for it; raises Refused (502)."""
    body = read(data, new_id(), asked)
    if asked.store:
        stored.put(Kept(owner, body, items_of(asked)))
    return body


class Listening:
    """Reads a stream of events: puts our id into those that hold the response, and keeps its states."""

    def __init__(self, asked: Asked, stored: Stored, owner: str) -> None:
        self.ended = False
        self._asked, self._stored, self._key = asked, stored, new_id()
        self._kept = Kept(owner, {"id": self._key}, items_of(asked))

    def __call__(self, frames: bytes) -> bytes:
        """The frames with our id."""
        return b"".join(self._frame(frame) + b"\n\n" for frame in frames.split(b"\n\n") if frame)

    def _frame(self, frame: bytes) -> bytes:
        if b'"response"' not in frame or b"\ndata: " not in b"\n" + frame:
            return frame
        head, _, data = (b"\n" + frame).partition(b"\ndata: ")
        try:
            event = json.loads(data)
            body = event["response"]
        except (ValueError, KeyError, TypeError):
            return frame  # a text of the model that says "response"
        if not isinstance(body, dict):
            return frame
        event["response"] = body = ours(body, self._key, self._asked)
        self.ended = self.ended or event.get("type") in ENDS
        self._keep(body)
        return (head + b"\ndata: " + json.dumps(event).encode()).lstrip(b"\n")

    def close(self) -> None:
        """After the stream: what the client or the engine cut is told as such."""
        if not self.ended and self._kept.body.get("status"):
            self._keep({**self._kept.body, "status": "cancelled"})

    def _keep(self, body: Json) -> None:
        if self._asked.store and ("status" not in self._kept.body or self._key in self._stored):  # one that was removed meanwhile stays so
            self._kept.body = body
            self._stored.put(self._kept)


def start(asked: Asked, stored: Stored, owner: str, answer: Answer) -> tuple[Json, asyncio.Task[None]]:
    """Begins a response in the background and gives its first state and its task; `answer` waits for a place and asks the engine."""
    key = new_id()
    told = {k: asked.body.get(k) for k in ("instructions", "metadata", "temperature", "top_p", "max_output_tokens", "text")}
    body: Json = ours({**told, "object": "response", "created_at": int(time.time()), "status": "queued", "output": [], "error": None}, key, asked)
    body |= {"tools": asked.body.get("tools", []), "tool_choice": asked.body.get("tool_choice", "auto"), "parallel_tool_calls": True}
    kept = Kept(owner, body, items_of(asked), background=True)
    stored.put(kept)

    async def work() -> None:
        kept.body = {**kept.body, "status": "in_progress"}
        stored.put(kept)
        try:
            found = read(await answer(), key, asked)
        except Refused as e:
            found = {**kept.body, "status": "failed", "error": {"code": "server_error" if e.status >= 500 else "invalid_prompt", "message": str(e)}}
        if kept.body["status"] == "in_progress":
            kept.body = found
            with suppress(ValueError):
                stored.put(kept)

    kept.task = asyncio.create_task(work())
    return body, kept.task
