"""A registry that is never asked: with AIRLOCK_OFFLINE each question ends here, before a socket is made, and the start goes on with the cache."""

from __future__ import annotations

from typing import IO

from urllib3.response import BaseHTTPResponse

from artifact.errors import Unavailable
from artifact.remote import RemoteRegistry


class Offline(RemoteRegistry):
    """RemoteRegistry whose one way out is closed."""

    def _send(self, method: str, url: str, headers: dict[str, str], body: bytes | IO[bytes] | None, follow: bool) -> BaseHTTPResponse:
        raise Unavailable(
            "AIRLOCK_OFFLINE is set: no connection is opened",
            expected="release, lease and weights in the cache",
            do="start once without AIRLOCK_OFFLINE while the registry answers: it fills the cache",
            reason="offline",
        )
