"""How many requests are at the engine at once, and a first-come queue before it with a bounded length and a bounded wait; it knows no HTTP."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from runtime.bounds import Limits
from runtime.front.errors import Refused


class Gate:
    """Places for requests and for the bytes of their bodies."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()
        self.active = 0
        self.bytes = 0
        self.refused = 0

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return len(self._waiting)

    @asynccontextmanager
    async def place(self, size: int) -> AsyncIterator[None]:
        """A place for one request with a body of at most so many bytes; raises Refused (429) where queue or wait are used up."""
        await self._enter(size)
        try:
            yield
        finally:
            self._leave(size)

    def _fits(self, size: int) -> bool:
        return self.active < self._limits.requests and self.bytes + size <= self._limits.bodies_bytes

    async def _enter(self, size: int) -> None:
        if not self._waiting and self._fits(size):
            self._take(size)
            return
        if len(self._waiting) >= self._limits.queued:
            raise self._no(f"{self.active} requests are running and {len(self._waiting)} wait: the queue is full")
        turn = asyncio.get_running_loop().create_future()
        entry = (size, turn)
        self._waiting.append(entry)
        try:
            async with asyncio.timeout(self._limits.queue_s):
                await turn
        except BaseException as error:
            if turn.done() and not turn.cancelled():  # it came at the same moment: given on
                self._leave(size)
            else:
                with suppress(ValueError):
                    self._waiting.remove(entry)
                self._wake()  # a big one at the head that gives up must not hold up those behind it
            if isinstance(error, TimeoutError):
                raise self._no(f"no place came free within {self._limits.queue_s:.0f} s") from error
            raise

    def _take(self, size: int) -> None:
        self.active += 1
        self.bytes += size

    def _leave(self, size: int) -> None:
        self.active -= 1
        self.bytes -= size
        self._wake()

    def _wake(self) -> None:
        while self._waiting and self._fits(self._waiting[0][0]):
            size, turn = self._waiting.popleft()
            if turn.cancelled():
                continue
            self._take(size)
            turn.set_result(None)

    def _no(self, message: str) -> Refused:
        self.refused += 1
        return Refused(429, f"{message}; try again", headers={"Retry-After": "1"})
