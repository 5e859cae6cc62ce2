"""The table of docs/operations.md, "Faults of a start": each is provoked for real, ends with its code and words, and goes away as the table says."""

from __future__ import annotations

import random
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from artifact import trust
from runtime.settings import EXIT_CODES
from tests.conftest import ROOT
from tests.flows.test_cache_upkeep import rot
from tests.flows.test_preflight import inside
from tests.flows.test_runtime_cache import LEASES, Node, blobs_asked, node  # noqa: F401 - the fixture

pytestmark = pytest.mark.server
SIZE = 256 << 20
AWAY = "http://127.0.0.1:9"
STARTED = 36  # through everything up to the stand-in's refusal


def lease_for(node: Node, seconds: int) -> None:  # noqa: F811
    """From now on the registry gives leases of that life, without grace."""

    def give(body: dict[str, Any]) -> tuple[int, dict[str, object]]:
        claims = node.claims(body) | {"exp": int(time.time()) + seconds, "grace_s": 0}
        return 200, {"lease": trust.sign_jws(LEASES, "lease+jwt", claims), "now": int(time.time())}

    node.site.lease = give


def expired(node: Node) -> Callable[[], object]:  # noqa: F811
    lease_for(node, 6)  # time enough for a start on a loaded machine
    assert node.run("serve").returncode == STARTED
    time.sleep(6.1)
    return lambda: lease_for(node, 86400)


def revoked(node: Node) -> Callable[[], object]:  # noqa: F811
    assert node.run("serve").returncode == STARTED
    node.site.state = "revoked"
    assert node.run("serve").returncode == 23
    assert node.run("serve", AIRLOCK_REGISTRY=AWAY).returncode == 28, "and no lease outlives it here"
    return lambda: setattr(node.site, "state", "ok")


def set_back(node: Node) -> Callable[[], object]:  # noqa: F811
    """The wall clock was an hour further once: the lease that it calls valid ended half an hour ago."""
    lease_for(node, 1800)
    assert node.run("serve").returncode == STARTED
    (node.cache / "leases" / "clock").write_text(str(int(time.time()) + 3600))
    return lambda: lease_for(node, 86400)


def empty(node: Node) -> Callable[[], object]:  # noqa: F811
    return lambda: None


def poisoned(node: Node) -> Callable[[], object]:  # noqa: F811
    """Same size, modification time set back."""
    assert node.run("serve").returncode == STARTED
    rot(node.blob("model.safetensors"))
    return lambda: None


# fault, what provokes it, whether the registry is away for the failing start, its reason, and words of its text
FAULTS = {
    "lease expired": (expired, True, "lease_expired", "the lease expired on"),
    "key revoked": (revoked, False, "key_revoked", "the API key was revoked on"),
    "clock set back": (set_back, True, "lease_expired", "the lease expired on"),
    "registry down, nothing cached": (empty, True, "connection_refused", "127.0.0.1:9 refuses the connection"),
    "cache poisoned, registry down": (poisoned, True, "weights", "lacks or holds damaged model.safetensors"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_has_its_code_its_words_and_its_way_back(node: Node, fault: str) -> None:  # noqa: F811
    provoke, away, reason, words = FAULTS[fault]
    recover = provoke(node)
    failed = node.run("serve", **({"AIRLOCK_REGISTRY": AWAY} if away else {}))
    assert failed.returncode == EXIT_CODES[reason] and words in failed.stderr and "Traceback" not in failed.stderr, failed.stderr
    assert "fix: " in failed.stderr or fault == "key revoked"  # what the stand-in leaves out of its answer
    recover()
    again = node.run("serve")
    assert again.returncode == STARTED, again.stderr
    assert (node.model_dir() / "model.safetensors").read_bytes() == node.files["model.safetensors"]


def test_a_registry_that_is_down_hinders_no_warm_start(node: Node) -> None:  # noqa: F811
    assert node.run("serve").returncode == STARTED
    warm = node.run("serve", AIRLOCK_REGISTRY=AWAY)
    assert warm.returncode == STARTED and "connection_refused" in warm.stderr and "this start uses what the cache holds" in warm.stderr


def test_a_disk_that_fills_while_weights_come_keeps_what_came(node: Node) -> None:  # noqa: F811
    """A neighbour fills the disk in the middle of the download; once it is gone, the rest is fetched, and only the rest."""
    node.files["model.safetensors"] = b"".join(random.Random(n).randbytes(16 << 20) for n in range(SIZE >> 24))
    node.publish()
    node.cache.mkdir()
    fill = f"dd if=/dev/zero of={node.cache}/neighbour bs=1M >/dev/null 2>&1"
    come = f'[ "$(du -sm {node.cache} | cut -f1)" -ge 40 ]'
    script = f"mount -t tmpfs -o size=330m tmpfs {node.cache}\n(while ! {come}; do sleep 0.01; done; {fill}) &"
    pull, mark = " ".join(node.command("download-to-cache")), node.folder / "second"
    then = (
        f"{pull}; echo first $?; wait; rm {node.cache}/neighbour; date +%s.%N > {mark}; {pull}; echo second $?; cp -r {node.cache}/models {mark}.copy"
    )
    sizes: list[int] = []
    thread = threading.Thread(target=lambda: sizes.append(asked_at(node, mark)))
    thread.start()
    out = inside(node, script, "sh", "-c", then)
    thread.join(5)
    assert f"first {EXIT_CODES['disk_full']}" in out.stdout and "the disk is full: " in out.stderr, (out.stdout, out.stderr[-2000:])
    assert "second 0" in out.stdout, out.stderr[-2000:]
    ranges = [line.rsplit("bytes=", 1)[1].split("-") for line in blobs_asked(node)[sizes[0] :]]
    assert 0 < sum(int(hi) - int(lo) + 1 for lo, hi in ranges) < SIZE, "what had come is not fetched again"
    (model,) = Path(f"{mark}.copy").rglob("model.safetensors")
    assert model.read_bytes() == node.files["model.safetensors"]


def asked_at(node: Node, mark: Path) -> int:  # noqa: F811
    """How many requests for bytes there were when the file came to be."""
    until = time.monotonic() + 100
    while not mark.exists() and time.monotonic() < until:
        time.sleep(0.01)
    return len(blobs_asked(node))


def test_the_table_names_each_fault_with_its_code() -> None:
    text = (ROOT / "docs" / "operations.md").read_text().split("### Faults of a start", 1)[1].split("\n## ", 1)[0]
    rows = {m[1]: int(m[2]) for m in re.finditer(r"^\| ([^|]+?) \| (\d+) \|", text, re.MULTILINE)}
    for fault, (_, _, reason, _) in FAULTS.items():
        assert rows.get(fault) == EXIT_CODES[reason], fault
    assert rows["disk full while pulling"] == EXIT_CODES["disk_full"]
