"""Responses that are kept: one bounded, expiring store of this process, in which a caller finds its own only; it speaks to no engine.

Ours and not the engine's: vLLM's store never forgets and knows no caller.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections import OrderedDict
from dataclasses import dataclass, field

from runtime.bounds import Limits
from runtime.front.errors import Json, Refused

ACTIVE = ("queued", "in_progress")


def new_id() -> str:
    """An id that nobody can guess."""
    return "resp_" + secrets.token_hex(16)


@dataclass
class Kept:
    """One response: its owner, its body, the conversation up to it (input items), its task while it runs in the background."""

    owner: str
    body: Json
    items: list[object]
    background: bool = False
    at: float = field(default_factory=time.monotonic)
    size: int = 0
    task: asyncio.Task[None] | None = None


class Stored:
    """Responses by id, the oldest forgotten first; one that still runs is never forgotten, so those are bounded by the gate."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._kept: OrderedDict[str, Kept] = OrderedDict()
        self.bytes = 0

    def __len__(self) -> int:
        return len(self._kept)

    def __contains__(self, key: str) -> bool:
        return key in self._kept

    def put(self, kept: Kept) -> None:
        """Keeps a response, or its newer state, under the id in its body."""
        key = str(kept.body["id"])
        if old := self._kept.pop(key, None):
            self.bytes -= old.size
        kept.size = len(json.dumps(kept.items)) + len(json.dumps(kept.body))
        self._kept[key] = kept
        self.bytes += kept.size
        self._forget()

    def get(self, key: str, owner: str) -> Kept:
        """The caller's response; raises Refused (404) for one that is not there, too old, or another's."""
        self._forget()
        kept = self._kept.get(key)
        if kept is None or kept.owner != owner:
            raise Refused(404, f"Response with id {key[:80]!r} not found.", "NotFoundError", "response_id")
        return kept

    def remove(self, key: str, owner: str) -> None:
        """Forgets the caller's response, and stops it where it runs."""
        kept = self.get(key, owner)
        if kept.task:
            kept.task.cancel()
        del self._kept[key]
        self.bytes -= kept.size

    def cancel(self, key: str, owner: str) -> Json:
        """Stops a response that runs in the background; raises Refused (404, 400 for one that does not run there)."""
        kept = self.get(key, owner)
        if not kept.background:
            raise Refused(400, "Cannot cancel a synchronous response: end its connection.", param="response_id")
        if kept.body["status"] in ACTIVE:
            kept.body = {**kept.body, "status": "cancelled"}
            self.put(kept)
            if kept.task:
                kept.task.cancel()
        return kept.body

    def stop(self) -> None:
        """Ends everything that runs in the background."""
        for kept in self._kept.values():
            if kept.task:
                kept.task.cancel()

    def running(self) -> list[asyncio.Task[None]]:
        """The tasks in the background that are not over."""
        return [k.task for k in self._kept.values() if k.task and not k.task.done()]

    def _forget(self) -> None:
        oldest, limits = time.monotonic() - self._limits.stored_s, self._limits
        for key, kept in list(self._kept.items()):
            if kept.body.get("status") in ACTIVE:
                continue
            if len(self._kept) <= limits.stored and self.bytes <= limits.stored_bytes and kept.at >= oldest:
                return
            del self._kept[key]
            self.bytes -= kept.size
