"""What an earlier run found out about files in staging, so that the next one fetches and reads less; correctness never depends on it."""

from __future__ import annotations

import contextlib
import threading
from pathlib import Path

from artifact.manifest import is_digest


class Hints:
    """A file of lines `<key> <digest>`, the last one of a key counting; safe for several threads."""

    def __init__(self, path: Path) -> None:
        self._path, self._lock = path, threading.Lock()
        try:
            lines = path.read_text(encoding="ascii", errors="replace").splitlines()
        except FileNotFoundError:
            lines = []
        self._known = {key: digest for key, _, digest in (line.partition(" ") for line in lines) if is_digest(digest)}

    def find(self, key: str) -> str:
        """The digest that was noted for a key, empty where there is none."""
        return self._known.get(key, "")

    def add(self, key: str, digest: str) -> None:
        """Notes a digest; one that cannot be kept only costs the next run the same work."""
        with self._lock, contextlib.suppress(OSError):
            self._known[key] = digest
            with self._path.open("a", encoding="ascii") as out:
                out.write(f"{key} {digest}\n")
