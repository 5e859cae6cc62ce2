"""When keys were used last, and their HMACs under the pepper of now: noted in memory, written together outside of requests, never a right.

Here because a read of the hot path must write nothing. What a crash loses is an hour of `last_used`, and a rewriting that the next use notes again.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from sqlalchemy import Engine, bindparam, update

from registry import tables as t

EVERY_S = 3600.0
FLUSH_S = 10.0
MAX_TRACKED = 100_000
_K = t.api_key.c
_USED = update(t.api_key).where(_K.key_id == bindparam("key"), _K.last_used < bindparam("at")).values(last_used=bindparam("at"))
_RENEWED = (
    update(t.api_key)
    .where(_K.key_id == bindparam("key"), _K.pepper_id.not_in(bindparam("kept", expanding=True)))
    .values(hmac=bindparam("digest"), pepper_id=bindparam("pepper"))
)


class Usage:
    """The notes of one process; `pepper_id` is the current pepper's public name, `coming` are those of peppers that are to follow it."""

    def __init__(self, engine: Engine, pepper_id: str, coming: tuple[str, ...] = ()) -> None:
        self._engine, self._pepper_id, self._kept = engine, pepper_id, [pepper_id, *coming]
        self._seen: dict[str, float] = {}
        self._used: dict[str, float] = {}
        self._renewed: dict[str, bytes] = {}
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def due(self, key_id: str, now: float) -> bool:
        """Whether this use is to be noted: the first of an hour."""
        return not 0 <= now - self._seen.get(key_id, -EVERY_S) < EVERY_S

    def note(self, key_id: str, now: float, digest: bytes | None = None) -> None:
        """Notes a use, and with `digest` what is to be stored in place of the key under the current pepper."""
        with self._lock:
            if len(self._seen) >= MAX_TRACKED:
                self._seen.clear()  # the next uses are noted again
            self._seen[key_id] = self._used[key_id] = now
            if digest is not None:
                self._renewed[key_id] = digest

    def flush(self) -> int:
        """Writes what was noted and returns how many keys that were; raises Unavailable (the notes are kept)."""
        with self._lock:
            used, renewed = dict(self._used), dict(self._renewed)
        if used:
            with t.writing(self._engine) as conn:
                conn.execute(_USED, [{"key": key, "at": at} for key, at in sorted(used.items())])
                for key, digest in sorted(renewed.items()):
                    conn.execute(_RENEWED, {"key": key, "digest": digest, "pepper": self._pepper_id, "kept": self._kept})
        with self._lock:
            self._used = {key: at for key, at in self._used.items() if used.get(key) != at}
            self._renewed = {key: digest for key, digest in self._renewed.items() if key not in renewed}
        return len(used)

    def start(self, on_error: Callable[[Exception], None]) -> None:
        """Writes every 10 s until close()."""
        self._thread = threading.Thread(target=self._run, args=(on_error,), name="key-usage", daemon=True)
        self._thread.start()

    def _run(self, on_error: Callable[[Exception], None]) -> None:
        while not self._stop.wait(FLUSH_S):
            try:
                self.flush()
            except Exception as error:  # noqa: BLE001 - the top of a thread: the notes stay and the next round tries again
                on_error(error)

    def close(self) -> None:
        """Ends the thread and writes the last notes."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout=FLUSH_S)
        self.flush()
