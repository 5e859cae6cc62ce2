"""The metrics page: the engine's own text, then the front's, the cache's, the key's and the GPUs'; and a look now and then at what they say.

The look is a task of the front: it keeps the peak of each GPU's memory, and warns once when the KV cache runs full.
"""

from __future__ import annotations

import asyncio
import logging
import re
import shutil
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Sequence

from artifact.errors import AirlockError
from runtime.front.gate import Gate
from runtime.front.pipe import Pipe
from runtime.front.settings import ServeSettings
from runtime.front.stored import Stored
from runtime.launch import Launch
from runtime.node import Gpu

BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
KV_USED = {"vllm": "vllm:kv_cache_usage_perc", "sglang": "sglang:token_usage", "tensorrt_llm": "trtllm_kv_cache_utilization"}
FULL, EASY = 0.9, 0.75  # of the KV cache: from the first on requests wait or are computed again; below the second the warning is over
TYPE = "text/plain; version=0.0.4; charset=utf-8"

log = logging.getLogger("airlock.runtime")


class Figures:
    """What is counted, and the page of it."""

    def __init__(
        self, settings: ServeSettings, gate: Gate, stored: Stored, gpus: Callable[[], Sequence[Gpu]] | None, idle: Sequence[Gpu] = ()
    ) -> None:
        self._settings, self._gate, self._stored, self._gpus = settings, gate, stored, gpus
        self.requests: Counter[tuple[str, int]] = Counter()
        self._first = [0] * (len(BUCKETS) + 1)
        self._first_sum = 0.0
        self._idle = {g.uuid: _used(g) for g in idle}
        self._now: dict[str, Gpu] = {}
        self._peak: dict[str, int] = {}
        self._kv: float | None = None
        self.kv_low = False

    def first(self, seconds: float) -> None:
        """The time to the first byte of one answer."""
        self._first[bisect_left(BUCKETS, seconds)] += 1
        self._first_sum += seconds

    async def watch(self, pipe: Pipe, launch: Callable[[], Launch], ready: Callable[[], bool]) -> None:
        """Looks at engine and GPUs until it is cancelled."""
        while True:
            if ready():
                self._look((await pipe.read(launch().metrics_path)).decode("utf-8", "replace"), launch().engine)
            await self._measure()
            await asyncio.sleep(self._settings.watch_s)

    async def _measure(self) -> None:
        if self._gpus is None:
            return
        try:
            found = await asyncio.to_thread(self._gpus)
        except AirlockError as error:
            log.warning("the GPUs' memory cannot be read: %s", error.what)
            return
        for gpu in found:
            self._now[gpu.uuid] = gpu
            self._peak[gpu.uuid] = max(self._peak.get(gpu.uuid, 0), _used(gpu))

    def _look(self, text: str, engine: str) -> None:
        used = re.findall(rf"^{re.escape(KV_USED.get(engine, 'none'))}(?:\{{[^\n]*\}})? ([0-9.eE+-]+)$", text, re.MULTILINE)
        if not used:
            return
        self._kv = min(1.0, max(map(float, used)))
        if self._kv >= FULL and not self.kv_low:
            log.warning("KV headroom: %.0f %% of the KV cache is in use; more requests wait, or are computed again", 100 * self._kv)
        self.kv_low = self._kv >= (EASY if self.kv_low else FULL)

    def page(self, engine_text: str, engine: str, *, ready: bool, restarts: int, in_flight: int, slow: int, key: Sequence[str]) -> str:
        """The whole page as Prometheus text."""
        self._look(engine_text, engine)
        own = ["# TYPE airlock_requests_total counter"]
        own += [f'airlock_requests_total{{route="{route}",status="{status}"}} {n}' for (route, status), n in sorted(self.requests.items())]
        single = (
            ("airlock_requests_in_flight", "gauge", in_flight),
            ("airlock_requests_waiting", "gauge", self._gate.waiting),
            ("airlock_requests_refused_total", "counter", self._gate.refused),
            ("airlock_body_bytes", "gauge", self._gate.bytes),
            ("airlock_clients_cut_total", "counter", slow),
            ("airlock_responses_stored", "gauge", len(self._stored)),
            ("airlock_responses_stored_bytes", "gauge", self._stored.bytes),
            ("airlock_engine_ready", "gauge", int(ready)),
            ("airlock_engine_restarts_total", "counter", restarts),
        )
        for name, kind, value in single:
            own += [f"# TYPE {name} {kind}", f"{name} {value}"]
        return "\n".join([engine_text.rstrip("\n"), *own, *self._histogram(), *self._cache(), *self._memory(), *key]).lstrip("\n") + "\n"

    def _histogram(self) -> list[str]:
        name, total, lines = "airlock_first_byte_seconds", 0, ["# TYPE airlock_first_byte_seconds histogram"]
        for bound, count in zip((*map(str, BUCKETS), "+Inf"), self._first, strict=True):
            total += count
            lines.append(f'{name}_bucket{{le="{bound}"}} {total}')
        return [*lines, f"{name}_sum {self._first_sum:.6f}", f"{name}_count {total}"]

    def _cache(self) -> list[str]:
        lines = []
        if self._settings.cache:
            lines.append("# TYPE airlock_cache_bytes gauge")
            lines += [f'airlock_cache_bytes{{of="{word}"}} {n}' for word, n in sorted(self._settings.cache.items())]
        if self._settings.cache_folder:
            try:
                free = shutil.disk_usage(self._settings.cache_folder).free
            except OSError:
                return lines
            lines += ["# TYPE airlock_cache_free_bytes gauge", f"airlock_cache_free_bytes {free}"]
        return lines

    def _memory(self) -> list[str]:
        lines = []
        if self._kv is not None:
            lines += ["# TYPE airlock_kv_cache_used_ratio gauge", f"airlock_kv_cache_used_ratio {self._kv:.4f}"]
            lines += ["# TYPE airlock_kv_headroom_low gauge", f"airlock_kv_headroom_low {int(self.kv_low)}"]
        if not self._now:
            return lines
        lines.append("# TYPE airlock_gpu_memory_bytes gauge")
        for uuid, gpu in sorted(self._now.items()):
            kinds = {"total": gpu.total, "used": _used(gpu), "peak": self._peak[uuid]} | ({"idle": self._idle[uuid]} if uuid in self._idle else {})
            lines += [f'airlock_gpu_memory_bytes{{gpu="{gpu.index}",uuid="{uuid}",of="{kind}"}} {n}' for kind, n in kinds.items()]
        return lines


def _used(gpu: Gpu) -> int:
    return max(0, gpu.total - gpu.free)
