"""The connections of one server: a bound that leaves descriptors for files and the database, and which of them give way when it is reached.

Here because asyncio accepts without end: whoever opens connections and says nothing would take every descriptor of the process. It knows sockets
and nothing that is said over them; who is busy is told to it.
"""

from __future__ import annotations

import errno
import resource
import socket
import time
from contextlib import suppress
from typing import Any

from uvicorn.server import ServerState

MOST = 16384
KEPT = 128  # descriptors that are never spent on connections: database, logs, the store, the operator's listener
EACH = 3  # what one request may hold: its connection, the copy that its upload is read from, a file
LEAVING = 32  # told to go and not yet gone, before others are let in
PAUSE_S = 1.0
_SPENT = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


def raise_limit() -> int:
    """Raises the soft limit of open files to the hard one where the system lets us; the limit that holds, -1 for none."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        soft = hard
    return soft


def bound(files: int) -> int:
    """How many connections may be open where that many files may be."""
    return MOST if files < 0 else max(8, min(MOST, (files - KEPT) // EACH))


class Crowd(ServerState):
    """The open connections by descriptor, and those among them that wait for a request, the longest first."""

    def __init__(self, most: int = MOST) -> None:
        super().__init__()
        self.most = most
        self.held: dict[int, socket.socket] = {}
        self._waiting: dict[int, None] = {}
        self._leaving: set[int] = set()
        self._told = 0.0

    def admit(self, conn: socket.socket) -> None:
        """A connection that was accepted; it waits for its first request."""
        self.held[conn.fileno()] = conn
        self._waiting[conn.fileno()] = None

    def busy(self, number: int) -> None:
        """A request came; the connection gives way to nobody until it is idle again."""
        self._waiting.pop(number, None)

    def idle(self, number: int) -> None:
        """The request was answered and no other is there."""
        if number in self.held and number not in self._leaving:
            self._waiting[number] = None

    def gone(self, number: int) -> None:
        """The connection is closed."""
        self.held.pop(number, None)
        self._waiting.pop(number, None)
        self._leaving.discard(number)

    def make_room(self) -> bool:
        """Ends the longest idle connection where the bound is reached; False where all are busy. Raises BlockingIOError: ask again soon."""
        if len(self.held) < self.most:
            return True
        now = time.monotonic()
        if len(self._leaving) >= LEAVING and now - self._told < PAUSE_S:
            raise BlockingIOError(errno.EAGAIN, "those that were told to go have not gone yet")
        number = next(iter(self._waiting), None)
        if number is None or len(self._leaving) >= LEAVING:
            return False
        self.busy(number)
        self._leaving.add(number)
        self._told = now
        with suppress(OSError):  # it left by itself
            self.held[number].shutdown(socket.SHUT_RDWR)  # its transport finds the end and closes it, in a handshake too
        return True


class _Connection(socket.socket):
    """An accepted socket that tells when it is closed."""

    crowd: Crowd | None = None

    def close(self) -> None:
        if self.crowd is not None:
            self.crowd.gone(self.fileno())
            self.crowd = None
        super().close()


class Listener(socket.socket):
    """A listening socket that admits no more than the crowd's bound."""

    crowd: Crowd | None = None
    _blind_until = 0.0

    def accept(self) -> tuple[socket.socket, Any]:
        """The next connection; raises BlockingIOError, ConnectionAbortedError for one that was refused, and OSError where no descriptor is left."""
        if time.monotonic() < self._blind_until:  # asyncio asks at once again, thousands of times, where it was told that nothing is left
            raise BlockingIOError(errno.EAGAIN, "no descriptor is left")
        room = self.crowd is None or self.crowd.make_room()
        try:
            plain, address = super().accept()
        except OSError as error:
            if error.errno in _SPENT:
                self._blind_until = time.monotonic() + PAUSE_S / 2
            raise
        if not room:
            plain.close()
            raise ConnectionAbortedError(errno.ECONNABORTED, "every connection is busy")
        conn = _Connection(self.family, self.type, self.proto, fileno=plain.detach())
        conn.crowd = self.crowd
        if self.crowd is not None:
            self.crowd.admit(conn)
        return conn, address
