"""BLAKE3 of stored blobs, which NGC clients check by: computed once by one thread in the background, kept in `blob_fact`.

Here because reading a large model again takes minutes, which no request may hold a thread for. It decides nothing and serves nothing.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable

from blake3 import blake3

from artifact.errors import AirlockError
from artifact.store import BlobStore
from registry.catalog import Catalog, blob_location
from registry.rows import add_blake3
from registry.uploads import pieces_of

LOG = logging.getLogger("airlock.registry")


class Fingerprints:
    """The thread and its queue; what was asked for is forgotten with the process, and asked for again."""

    def __init__(self, catalog: Catalog, blobs: BlobStore) -> None:
        self._catalog, self._blobs = catalog, blobs
        self._wanted: dict[str, None] = {}  # in order, each once
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closed = False

    def of(self, digests: Iterable[str]) -> tuple[dict[str, str], int]:
        """What is known of these blobs, and how many of them are still to come; those are computed from now on."""
        asked = set(digests)
        known = self._catalog.blake3(asked)
        missing = asked - known.keys()
        if missing:
            with self._changed:
                self._wanted |= dict.fromkeys(sorted(missing))
                if self._thread is None and not self._closed:
                    self._thread = threading.Thread(target=self._run, name="fingerprints", daemon=True)
                    self._thread.start()
                self._changed.notify_all()
        return known, len(missing)

    def close(self) -> None:
        """Ends the thread at its next piece; what it did not finish is computed when it is asked for again."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._wanted)
                if self._closed:
                    return
                digest = next(iter(self._wanted))
            try:
                self._compute(digest)
            except Exception as error:  # noqa: BLE001 - the top of a thread: a later ask tries again
                words = str(error) if isinstance(error, AirlockError | OSError) else type(error).__name__
                LOG.error("the BLAKE3 of %s could not be computed: %s", digest, words)
            with self._changed:
                self._wanted.pop(digest, None)

    def _compute(self, digest: str) -> None:
        with self._catalog.reading() as conn:
            location = blob_location(conn, digest)
        if not location:
            return
        state = blake3()
        for piece in pieces_of(self._blobs.open(location)):
            if self._closed:
                return
            state.update(piece)
        value = state.hexdigest()
        self._catalog.change(lambda conn: add_blake3(conn, digest, value))
