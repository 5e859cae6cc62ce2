"""What one source did in a minute: failed logins by network, so that a host that guesses is slowed, and changes by key, so that none floods the rows.

In memory and bounded: what is forgotten only means that a source is counted anew. It must not see a key.
"""

from __future__ import annotations

import threading

WINDOW_S = 60.0
FAILED_LOGINS = 300
CHANGES = 3000  # a site whose nodes all start at once under one key stays below it
MOST = 10_000


class Pace:
    """Counts of one process, by source, over windows of a minute."""

    def __init__(self, allowed: int, window_s: float = WINDOW_S, most: int = MOST) -> None:
        self._allowed, self._window_s, self._most = allowed, window_s, most
        self._seen: dict[str, tuple[float, int]] = {}
        self._lock = threading.Lock()

    def wait_s(self, source: str, now: float) -> int:
        """Counts one event and returns how many seconds its source is to wait; 0 while it may go on."""
        with self._lock:
            since, count = self._seen.get(source, (now, 0))
            if not 0 <= now - since < self._window_s:
                since, count = now, 0
            if source not in self._seen and len(self._seen) >= self._most:
                self._seen = {k: v for k, v in self._seen.items() if 0 <= now - v[0] < self._window_s}
                if len(self._seen) >= self._most:
                    return 0
            self._seen[source] = (since, count + 1)
            return 0 if count < self._allowed else max(1, int(since + self._window_s - now))
