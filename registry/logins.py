"""Failed logins counted by source network, so that a host that guesses is slowed; a valid key is never counted and never refused here.

In memory and bounded: what is forgotten only means that a guesser is counted anew. It must not see a key.
"""

from __future__ import annotations

import threading

WINDOW_S = 60.0
ALLOWED = 300
MAX_NETWORKS = 10_000


class FailedLogins:
    """Counts of one process over windows of a minute."""

    def __init__(self, allowed: int = ALLOWED, window_s: float = WINDOW_S, most: int = MAX_NETWORKS) -> None:
        self._allowed, self._window_s, self._most = allowed, window_s, most
        self._seen: dict[str, tuple[float, int]] = {}
        self._lock = threading.Lock()

    def wait_s(self, network: str, now: float) -> int:
        """Counts one failure and returns how many seconds the network is to wait; 0 while it may go on."""
        with self._lock:
            since, count = self._seen.get(network, (now, 0))
            if not 0 <= now - since < self._window_s:
                since, count = now, 0
            if network not in self._seen and len(self._seen) >= self._most:
                self._seen = {k: v for k, v in self._seen.items() if 0 <= now - v[0] < self._window_s}
                if len(self._seen) >= self._most:
                    return 0
            self._seen[network] = (since, count + 1)
            return 0 if count < self._allowed else max(1, int(since + self._window_s - now))
