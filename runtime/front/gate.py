"""How many requests are at the engine at once, and a first-come queue before it with a bounded length and a bounded wait; it knows no HTTP."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from runtime.bounds import Limits
from runtime.front.errors import Refused


class Gate:
    """Places for requests at the engine, and room for the bytes of their bodies."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._waiting: deque[asyncio.Future[None]] = deque()
        self.active = 0
        self.bytes = 0
        self.refused = 0

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return len(self._waiting)

    def hold(self) -> Held:
        """Room for the bytes of one body, taken as they come: who announces much and sends nothing takes none."""
        return Held(self)

    def check(self) -> None:
        """Raises Refused (429) where a request would find the queue full."""
        if not self._free() and len(self._waiting) >= self._limits.queued:
            raise self._no(f"{self.active} requests are running and {len(self._waiting)} wait: the queue is full")

    def take(self, size: int) -> None:
        """So many more bytes of a body; raises Refused (429) where all bodies together are too many."""
        if self.bytes + size > self._limits.bodies_bytes:
            raise self._no(f"the bodies of all requests together are more than {self._limits.bodies_bytes} bytes")
        self.bytes += size

    @asynccontextmanager
    async def place(self) -> AsyncIterator[None]:
        """A place for one request; raises Refused (429) where queue or wait are used up."""
        await self._enter()
        try:
            yield
        finally:
            self._leave()

    def _free(self) -> bool:
        return not self._waiting and self.active < self._limits.requests

    async def _enter(self) -> None:
        if self._free():
            self.active += 1
            return
        self.check()
        turn = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        try:
            async with asyncio.timeout(self._limits.queue_s):
                await turn
        except BaseException as error:  # a client that left too must keep no turn
            if turn.done() and not turn.cancelled():  # it came at the same moment: given on
                self._leave()
            else:
                with suppress(ValueError):
                    self._waiting.remove(turn)
            if isinstance(error, TimeoutError):
                raise self._no(f"no place came free within {self._limits.queue_s:.0f} s") from error
            raise

    def _leave(self) -> None:
        self.active -= 1
        while self._waiting and self.active < self._limits.requests:
            turn = self._waiting.popleft()
            if not turn.cancelled():
                self.active += 1
                turn.set_result(None)

    def _no(self, message: str) -> Refused:
        self.refused += 1
        return Refused(429, f"{message}; try again", headers={"Retry-After": "1"})


class Held:
    """The bytes of one body that are in work."""

    def __init__(self, gate: Gate) -> None:
        self._gate, self._size = gate, 0

    def more(self, size: int) -> None:
        """Takes more; raises Refused (429) where there is no room."""
        self._gate.take(size)
        self._size += size

    def free(self) -> None:
        """Gives all of them back."""
        self._gate.bytes -= self._size
        self._size = 0
