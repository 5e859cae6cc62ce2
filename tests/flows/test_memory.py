"""Push, sync, pack, import and runtime pull of 5 GiB of random bytes over HTTP: each process and its children stay under 200 MiB."""

from __future__ import annotations

import re
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import RegistryServer
from tests.flows.story import Story, forget, random_model

LIMIT = 200 * 1024 * 1024


def family(pid: int) -> list[int]:
    """A process and all its descendants."""
    kids = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True, check=False).stdout.split()
    return [pid, *(p for kid in kids for p in family(int(kid)))]


def resident(pid: int) -> int:
    """Resident bytes of a process, mapped files included (proc(5): RssAnon + RssFile + RssShmem), 0 when it is gone."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return sum(int(n) * 1024 for n in re.findall(r"Rss(?:Anon|File|Shmem):\s+(\d+) kB", text))


class Peak(threading.Thread):
    """Samples the summed resident memory of process trees until stopped; `peaks` holds the highest of each."""

    def __init__(self, pids: dict[str, int]) -> None:
        super().__init__(daemon=True)
        self.pids, self.peaks, self.ended = pids, dict.fromkeys(pids, 0), threading.Event()

    def run(self) -> None:
        while not self.ended.wait(0.05):
            for name, pid in self.pids.items():
                self.peaks[name] = max(self.peaks[name], sum(resident(p) for p in family(pid)))


@pytest.mark.full
@pytest.mark.timeout(3600)
def test_five_gib_under_200_mib(tmp_path: Path, start_registry: Callable[..., RegistryServer]) -> None:
    story = Story(tmp_path / "story", random_model(tmp_path / "model" / "files", 5 * 1024**3), start_registry)
    shown = {}
    for step in story.steps():
        process = story.spawn(step, tmp_path / "steps.log")
        servers = {n: s.process.pid for n, s in (("connected registry", story.connected), ("closed registry", story.closed)) if s}
        peak = Peak({step.name: process.pid, **servers})
        began = time.monotonic()
        peak.start()
        assert process.wait() == 0, (tmp_path / "steps.log").read_text()[-4000:]
        peak.ended.set()
        peak.join()
        shown[step.name] = {n: f"{b / 2**20:.0f} MiB" for n, b in peak.peaks.items()} | {"seconds": f"{time.monotonic() - began:.0f}"}
        print(step.name, shown[step.name])
        assert min(peak.peaks.values()) > 10 * 2**20 and max(peak.peaks.values()) < LIMIT, shown
    forget(story)
