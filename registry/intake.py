"""An upload's bytes on their way from the socket to the store: received, hashed and written by one thread for as long as they keep coming.

Here because the HTTP parser and a hop to a thread for each piece cost more than half of what an upload takes. A thread never waits for a client:
it ends where the socket is dry or its turn is over, and the event loop waits. It knows no HTTP, no route and no store.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

BUFFER = 512 * 1024  # stays in a core's cache between receiving, writing and hashing; also what an upload holds of memory
TURN = 8 * 1024 * 1024
Write = Callable[[bytes | memoryview], None]
Run = Callable[[Callable[[], int]], Awaitable[int]]


@dataclass
class Loan:
    """A request's body in the hands of the application: what had arrived, the socket to read the rest from, and how much is left there.

    Whoever reads `n` bytes from the socket, which never blocks, takes `n` off `left` and reads no more than that: behind it is the next request.
    """

    pieces: list[bytes]
    sock: socket.socket
    left: int


async def take(loan: Loan, write: Write, run: Run, stall_s: float) -> bool:
    """Writes the whole body, `run` putting work into a thread; False when the client left or sent nothing for `stall_s`: what came is written."""
    loop = asyncio.get_running_loop()
    await run(lambda: _pieces(loan, write))
    buffer, have = memoryview(bytearray(min(BUFFER, loan.left))), 0
    while loan.left:
        room = buffer[have : have + loan.left]
        try:
            async with asyncio.timeout(stall_s):
                got = await loop.sock_recv_into(loan.sock, room)
        except (TimeoutError, OSError):
            got = 0
        loan.left -= got
        have += got
        if not got or have == len(buffer) or not loan.left:
            ready = have
            have = await run(lambda: _turn(loan, write, buffer, ready))  # noqa: B023 - it runs to its end before the next round
        if not got:
            return False
    return True


def _pieces(loan: Loan, write: Write) -> int:
    pieces, loan.pieces = loan.pieces, []
    if pieces:
        write(b"".join(pieces))
    return 0


def _turn(loan: Loan, write: Write, buffer: memoryview, have: int) -> int:
    """Writes the filled part of the buffer and goes on receiving until the socket is dry; returns how much is filled and not yet written."""
    written = 0
    while have:
        write(buffer[:have])
        written, have = written + have, 0
        if written >= TURN:
            break
        while have < len(buffer) and loan.left:
            try:
                got = loan.sock.recv_into(buffer[have : have + loan.left])
            except OSError:  # dry; or broken, which the next wait finds
                got = 0
            if not got:
                return have
            loan.left -= got
            have += got
    return have
