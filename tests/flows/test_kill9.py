"""kill -9 at byte offsets drawn from a printed seed, in each step of the story: the same command again ends as an unbroken run does."""

from __future__ import annotations

import itertools
import json
import os
import random
import re
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import RegistryServer
from tests.flows.story import PIECE, Step, Story, forget, random_model, rows, tree


def written(pid: int) -> int:
    """Bytes that a process has passed to write calls so far (proc(5), io: wchar)."""
    try:
        return int(re.search(r"wchar: (\d+)", Path(f"/proc/{pid}/io").read_text())[1])  # type: ignore[index]
    except (FileNotFoundError, ProcessLookupError):
        return -1


def kill_at(story: Story, step: Step, offset: int, log: Path) -> bool:
    """Starts the step, kills its group once `offset` bytes are written; True when it was alive and its result not there."""
    before = written(step.watched) if step.watched else 0
    process = story.spawn(step, log)
    pid = step.watched or process.pid
    while process.poll() is None and written(pid) - before < offset:
        time.sleep(0.0005)
    alive = process.poll() is None
    partial = step.unfinished()
    if alive:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return alive and partial


def pieces_sent(log: Path) -> Counter[tuple[str, int]]:
    """How often each whole 64 MiB piece of each blob was sent in full, from the registry's request log."""
    sent: Counter[tuple[str, int]] = Counter()
    for line in log.read_text().splitlines():
        if not line.startswith("{"):
            continue
        entry = json.loads(line)
        span = re.match(r"bytes=(\d+)-(\d+)$", entry.get("range") or "")
        if entry.get("method") == "GET" and "/blobs/" in entry.get("path", ""):
            lo = int(span[1]) if span else 0
            for piece in range(-(-lo // PIECE), (lo + int(entry.get("bytes") or 0)) // PIECE):
                sent[(entry["path"], piece)] += 1
    return sent


def play(tmp_path: Path, start: Callable[..., RegistryServer], size: int, kills: int) -> None:
    seed = int(os.environ.get("AIRLOCK_TEST_SEED", time.time_ns() % 1_000_000))
    print(f"seed {seed}")
    draw = random.Random(seed)
    model = random_model(tmp_path / "model" / "files", size)
    whole = Story(tmp_path / "whole", model, start)
    for step in whole.steps():
        whole.run(step)
    broken = Story(tmp_path / "broken", model, start)
    proven: Counter[str] = Counter()
    for step in broken.steps():
        points = [0, *sorted(draw.randrange(1, size * 9 // 10) for _ in range(kills))]
        for lo, hi in itertools.pairwise(points):  # each run goes on where the killed one was, so every kill hits an unfinished state
            proven[step.name] += kill_at(broken, step, hi - lo, tmp_path / "killed.log")
        broken.run(step)
    assert proven == dict.fromkeys(("push", "sync", "pack", "import", "pull"), kills), "a kill came after the end"
    print(f"killed alive and unfinished: {dict(proven)}")
    pairs = [(story.home / "staging", story.medium, story.data, story.cache) for story in (whole, broken)]
    own = signed(whole.data) | signed(broken.data)
    for left, right in zip(*pairs, strict=True):
        assert tree(left)
        assert {k: v for k, v in tree(left).items() if "sha256:" + v not in own} == {k: v for k, v in tree(right).items() if "sha256:" + v not in own}
    assert whole.connected and broken.connected and broken.closed
    for store in (broken.home / "staging", broken.connected.data, broken.data, broken.cache):
        assert not list((store / "partial").iterdir()), f"{store} keeps what the killed runs left"
    assert not list(broken.medium.rglob("*.partial"))
    assert content(whole.connected.data) == content(broken.connected.data)
    assert content(whole.data) == content(broken.data)
    for server in (broken.connected, broken.closed):
        sent = pieces_sent(server.log)
        assert '"range": "bytes=' in server.log.read_text()
        assert max(sent.values(), default=0) <= 1, f"whole pieces fetched twice: {[k for k, n in sent.items() if n > 1]}"
    forget(whole)
    forget(broken)


def signed(data: Path) -> set[str]:
    """Digests of the release signature's manifests and blobs: made by the site's own key, so they differ from run to run."""
    own: set[str] = set()
    for digest, _, _, _, raw in rows(data)["manifest"]:
        if b"cosign" in bytes(raw) or b"sigstore" in bytes(raw):  # type: ignore[call-overload]
            own |= {str(digest), *re.findall(r"sha256:[0-9a-f]{64}", json.dumps(json.loads(raw)["layers"]))}  # type: ignore[arg-type]
    return own


def content(data: Path) -> dict[str, list[tuple[object, ...]]]:
    """The database's content without the release signature."""
    own = signed(data)
    return {table: [r for r in lines if not own & {str(c) for c in r}] for table, lines in rows(data).items()}


@pytest.mark.server
@pytest.mark.timeout(900)
def test_three_kills_of_each_step_on_256_mib(tmp_path: Path, start_registry: Callable[..., RegistryServer]) -> None:
    play(tmp_path, start_registry, 256 * 1024 * 1024, 3)


@pytest.mark.full
@pytest.mark.timeout(3600)
def test_twenty_kills_of_each_step_on_1_gib(tmp_path: Path, start_registry: Callable[..., RegistryServer]) -> None:
    play(tmp_path, start_registry, 1024 * 1024 * 1024, 20)
