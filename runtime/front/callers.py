"""Who may ask: optional keys of callers, checked at this site's registry against grants and remembered for a while; keys are kept as hashes only.

Off by default, as a NIM asks nobody. It answers who, and never sees a request's content.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor

from artifact.errors import AirlockError, Denied, NotFound, Unauthenticated
from runtime import standing
from runtime.front.errors import Refused

GOOD_S, BAD_S = 60.0, 10.0  # how long a verdict stands; a revoked key is noticed within the first
STALE_S = 3600.0  # a good one stands so long while the registry is away
KNOWN = 4096
ASKING = 8  # questions to the registry at once: a flood of guessed keys must not become its flood, nor push out or hold up the good ones
Ask = Callable[[str], Mapping[str, object]]

log = logging.getLogger("airlock.runtime")


class Callers:
    """The check; `ask` takes a key and gives the registry's /airlock/v1/standing for it (called in a thread; raises AirlockError)."""

    def __init__(self, ask: Ask, model: str, *, own: bool = False) -> None:
        self._ask, self._model, self._own = ask, model, own
        self._good: OrderedDict[str, tuple[float, int]] = OrderedDict()
        self._bad: OrderedDict[str, tuple[float, int]] = OrderedDict()
        self._asking = {good: ThreadPoolExecutor(ASKING, "callers") for good in (True, False)}

    async def check(self, authorization: str) -> str:
        """The caller as an opaque text; raises Refused: 401 without a known key, 403 without a grant to run the model, 503 while nobody can say."""
        scheme, _, key = authorization.partition(" ")
        key = key.strip()
        if scheme.lower() != "bearer" or not 16 <= len(key) <= 512 or not key.isascii():
            raise Refused(401, "no API key: send Authorization: Bearer KEY", headers={"WWW-Authenticate": "Bearer"})
        who = hashlib.sha256(key.encode()).hexdigest()
        at, status = self._good.get(who) or self._bad.get(who, (0.0, 0))
        if not at or time.monotonic() - at > (GOOD_S if status == 200 else BAD_S):
            status = await self._learn(key, who, at, status)
        if status == 401:
            raise Refused(401, "the registry of this site does not know this API key, or it is over", headers={"WWW-Authenticate": "Bearer"})
        if status == 403:
            raise Refused(403, "no grant lets this API key run the model")
        return who

    async def _learn(self, key: str, who: str, at: float, before: int) -> int:
        now = time.monotonic()
        try:
            found = standing.parse(await asyncio.get_running_loop().run_in_executor(self._asking[before == 200], self._ask, key))
            ends = found.running(self._model, own=self._own)
            runs = any(e.kind == "grant" for e in ends) and not any(e.over(found.now) for e in ends)
            status = 200 if runs else 403
        except Unauthenticated:
            status = 401
        except (Denied, NotFound):
            status = 403
        except AirlockError as error:
            if before == 200 and now - at < STALE_S:
                return 200
            log.warning("a caller's key cannot be checked: %s", error.what)
            raise Refused(503, "the registry that checks API keys does not answer", "ServiceUnavailable", headers={"Retry-After": "5"}) from error
        for kept in (self._good, self._bad):
            kept.pop(who, None)
        kept = self._good if status == 200 else self._bad
        kept[who] = (now, status)
        while len(kept) > KNOWN:
            kept.popitem(last=False)
        return status
