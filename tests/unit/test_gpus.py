"""GPU detection through the unmodified NVML binding, against a stand-in library that a C compiler builds here."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from artifact.errors import Invalid
from runtime import gpus, hosts, visible
from runtime.node import Gpu
from tests.fakes.nvml import BROKEN, HOSTS, LATE

TWO = """driver=550.163.01
cuda=12040
gpu
uuid=GPU-01000100-0000-0000-0000-000000000000
total=85520809984
free=84900000000
device_id=0x233010DE
mig=0
gpu
name=NVIDIA L40S
cc=8.9
total=48305799168
free=47700000000
device_id=0x26B910DE
"""
PROBE = """import json, sys
from artifact.errors import AirlockError
from runtime import gpus, hosts, visible
try:
    told = []
    facts = gpus.detect(float(sys.argv[1]), patience_s=float(sys.argv[2]), say=told.append)
    print(json.dumps({**vars(facts), "gpus": [vars(g) for g in facts.gpus], "told": told}))
except AirlockError as error:
    print(json.dumps(error.as_dict()))
"""
Node = Callable[..., dict[str, Any]]


def probe(env: dict[str, str], deadline: float = 20, patience: float = 0) -> dict[str, Any]:
    """What a fresh process detects: the loader reads LD_LIBRARY_PATH only when a process starts."""
    command = [sys.executable, "-c", PROBE, str(deadline), str(patience)]
    out: dict[str, Any] = json.loads(subprocess.run(command, env=env, capture_output=True, check=True, timeout=60).stdout)
    return out


@pytest.fixture
def node(nvml: Path, tmp_path: Path) -> Node:
    """Detection on a node with the stand-in and a configuration (None: no file, as a driver that is not loaded)."""

    def detect(config: str | None, deadline: float = 20, patience: float = 0) -> dict[str, Any]:
        path = tmp_path / "gpus.cfg"
        if config is not None:
            path.write_text(config)
        return probe({"LD_LIBRARY_PATH": str(nvml), "FAKE_NVML_CONFIG": str(path)}, deadline, patience)

    return detect


def test_facts_of_two_gpus(node: Node) -> None:
    facts = node(TWO)
    assert (facts["cpu"], facts["simulated"], facts["driver"], facts["cuda"]) == (False, True, "550.163.01", "12.4")
    h100, l40s = facts["gpus"]
    assert (h100["uuid"], h100["device"]) == ("GPU-01000100-0000-0000-0000-000000000000", "2330:10de")
    assert (h100["capability"], h100["total"], h100["mig"]) == ([9, 0], 85520809984, False)
    assert (l40s["name"], l40s["device"], l40s["capability"], l40s["free"]) == ("NVIDIA L40S", "26b9:10de", [8, 9], 47700000000)


HELD = """import os, socket, sys, threading, time
from artifact.errors import AirlockError
from runtime import gpus
client, ours = socket.socketpair()
def ask():
    try:
        gpus.detect(8)
    except AirlockError as error:
        print(error.what)
asking = threading.Thread(target=ask)
asking.start()
time.sleep(0.5)
ours.close()
client.settimeout(3)
print(client.recv(1), asking.is_alive(), flush=True)
os._exit(0)
"""


@pytest.mark.slow
def test_a_driver_that_hangs_holds_no_connection_of_the_front(nvml: Path, tmp_path: Path) -> None:
    (tmp_path / "gpus.cfg").write_text(LATE.format(ms=8000))
    env = {"LD_LIBRARY_PATH": str(nvml), "FAKE_NVML_CONFIG": str(tmp_path / "gpus.cfg")}
    done = subprocess.run([sys.executable, "-c", HELD], env=env, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "b'' True", done.stderr


@pytest.mark.skipif(Path("/dev/nvidiactl").exists(), reason="this machine has a GPU")
def test_no_library_is_a_cpu_node() -> None:
    facts = probe({})
    assert facts["cpu"] and not facts["simulated"] and facts["gpus"] == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "words", "advice"),
    [
        (None, "error 9", "driver is not loaded"),
        ("init_error=18\n", "error 18", "differ in version"),
        ("init_error=999\n", "error 999", "nvidia-smi"),
        ("gpu\nerror=15\n", "GPU 0", "fallen off the bus"),
    ],
)
def test_a_failing_library_is_an_error_and_never_a_cpu_node(node: Node, config: str | None, words: str, advice: str) -> None:
    told = node(config)
    assert told["reason"] == "gpu" and words in told["what"] and advice in told["do"]


@pytest.mark.slow
@pytest.mark.usefixtures("nvml")  # it needs a compiler too
@pytest.mark.parametrize("kind", ["damaged", "incomplete", "unreadable"])
def test_a_library_that_does_not_load_is_no_cpu_node(tmp_path: Path, kind: str) -> None:
    file = tmp_path / "libnvidia-ml.so.1"
    if kind == "incomplete":  # one that it needs is not there
        other = tmp_path / "libother.so"
        subprocess.run(["cc", "-shared", "-o", other, "-x", "c", "/dev/null"], check=True)
        subprocess.run(["cc", "-shared", "-Wl,--no-as-needed", "-o", file, "-x", "c", "/dev/null", f"-L{tmp_path}", "-lother"], check=True)
        other.unlink()
    else:
        file.mkdir() if kind == "unreadable" else file.write_bytes(b"no library")
    told = probe({"LD_LIBRARY_PATH": str(tmp_path), "PATH": os.environ["PATH"]})
    assert told["reason"] == "gpu" and "NVML failed: " in told["what"] and "cannot be loaded" in told["do"]


@pytest.mark.slow
def test_a_hanging_gpu_ends_at_the_deadline_and_is_named(node: Node) -> None:
    began = time.monotonic()
    told = node("gpu\ngpu\ndelay_ms=60000\n", 1)
    assert "within 1 s; the last call was nvmlDeviceGetPciInfo of GPU 1" in told["what"]
    assert time.monotonic() - began < 20


@pytest.mark.slow
def test_a_late_gpu_is_named_and_with_a_longer_wait_all_are_there(node: Node) -> None:
    late = LATE.format(ms=2500)
    told = node(late, 1)
    assert (
        "within 1 s; the last call was nvmlDeviceGetMemoryInfo of GPU 7 (GPU-00000000-0000-0000-0000-000000000007, 00000000:17:00.0)" in told["what"]
    )
    assert "AIRLOCK_GPU_DEADLINE_S" in told["do"] and told["reason"] == "gpu"
    facts = node(late, 1, patience=60)
    assert len(facts["gpus"]) == 8 and "still waiting for nvmlDeviceGetMemoryInfo of GPU 7" in facts["told"][0]


@pytest.mark.slow
def test_a_gpu_in_error_is_named_and_never_left_out(node: Node) -> None:
    told = node(BROKEN)
    assert "GPU is lost (error 15) in nvmlDeviceGetMemoryInfo of GPU 7 (GPU-00000000-0000-0000-0000-000000000007, 00000000:17:00.0)" in told["what"]
    assert "error 15" in node("gpu\ngpu\nlost=1\n")["what"]


@pytest.mark.slow
@pytest.mark.parametrize("name", list(HOSTS))
def test_each_host_is_seen_as_it_is_described(node: Node, name: str) -> None:
    facts, described = node(HOSTS[name]), hosts.named(name)
    assert facts["simulated"] and len(facts["gpus"]) == len(described.gpus)
    for seen, told in zip(facts["gpus"], described.gpus, strict=True):
        assert (seen["index"], seen["name"].split(" MIG")[0], seen["device"]) == (told.index, told.name.split(" MIG")[0], told.device)
        assert (tuple(seen["capability"]), seen["links"], tuple(sorted(seen["peers"]))) == (told.capability, told.links, told.peers)
        assert (seen["slice"], seen["unified"], bool(seen["parent"])) == (told.slice, told.unified, bool(told.parent))
        assert seen["unified"] or (seen["total"], seen["free"]) == (told.total, told.free)


def test_unified_memory_is_the_hosts_and_says_so(node: Node) -> None:
    (gpu,) = node(HOSTS["gb10x1"])["gpus"]
    total = int(re.search(r"MemTotal:\s+(\d+)", Path("/proc/meminfo").read_text())[1]) * 1024  # type: ignore[index]
    assert gpu["unified"] and 0 < gpu["total"] <= total
    assert gpu["free"] == 0 or gpu["free"] <= gpu["total"] - (8 << 30)
    assert "unified memory: NVML tells no size" in gpu["notices"][0]


@pytest.mark.parametrize(("limit", "sizes"), [(0, (4096, 2048)), (3072, (3072, 2048)), (1024, (1024, 1024))])
def test_host_memory_is_bounded_by_a_containers_limit(limit: int, sizes: tuple[int, int]) -> None:
    assert gpus.host_memory("MemTotal:  4 kB\nMemFree: 1 kB\nMemAvailable:   2 kB\n", limit) == sizes


@pytest.mark.slow
@pytest.mark.parametrize("call", ["nvmlDeviceGetTotalEccErrors", "nvmlDeviceGetNvLinkState", "nvmlDeviceGetP2PStatus", "nvmlDeviceGetNumGpuCores"])
def test_a_fact_that_nothing_depends_on_is_no_failure_unless_the_gpu_is_lost(node: Node, call: str) -> None:
    config = "gpu\nnvlinks=2\ntotal=9\nfree=9\n" * 2 + f"error_call={call}\nerror="
    assert len(node(config + "999\n")["gpus"]) == 2
    assert "error 15" in node(config + "15\n")["what"] and call in node(config + "15\n")["what"]


def test_mig_slices_are_devices_with_their_memory(node: Node) -> None:
    config = HOSTS["h100-migx1"] + "gpu\nmig=0\ntotal=1000\nfree=900\n"
    first, second, whole = node(config)["gpus"]
    assert (first["uuid"], first["parent"], first["slice"]) == (
        "MIG-00000000-0000-0000-0000-000000000000",
        "GPU-" + "0" * 8 + "-0000-0000-0000-" + "0" * 12,
        "1/0",
    )
    assert (second["slice"], second["total"], second["mig"]) == ("2/0", 40448 << 20, False) and second["name"].endswith("MIG 3g.40gb")
    assert whole["index"] == 1 and not whole["parent"]


@pytest.mark.slow
def test_health_tells_what_is_wrong_and_what_is_slow(node: Node) -> None:
    lines = "total=1000\nfree=900\n"
    config = f"gpu\n{lines}ecc=3\nretired_pending=1\nremap_pending=1\nremap_failure=1\ngpu\n{lines}throttle=0x44\ngpu\n{lines}throttle=0x5\n"
    ill, hot, idle = node(config)["gpus"]
    assert len(ill["faults"]) == 4 and ill["faults"][0] == "3 uncorrected ECC error(s) since the driver was loaded"
    assert (hot["faults"], hot["notices"]) == ([], ["clocks are slowed now: hardware thermal limit"])
    assert (idle["faults"], idle["notices"]) == ([], [])


def test_memory_that_is_not_told_and_mig(node: Node) -> None:
    (gpu,) = node("gpu\nmig=1\n")["gpus"]
    assert gpu["total"] == 0 and gpu["mig"]


def test_no_gpu_behind_a_working_library_is_no_cpu_node(node: Node) -> None:
    facts = node("driver=1\n")
    assert facts["gpus"] == [] and not facts["cpu"]


def _four() -> tuple[Gpu, ...]:
    return tuple(Gpu(i, f"GPU-{i}000", "NVIDIA L4", "27b8:10de") for i in range(4))


@pytest.mark.parametrize(
    ("cuda", "nvidia", "left"),
    [
        (None, None, [0, 1, 2, 3]),
        (None, "all", [0, 1, 2, 3]),
        (None, "void", [0, 1, 2, 3]),
        (None, "none", []),
        ("", None, []),
        ("-1", None, []),
        ("2,0", None, [2, 0]),
        ("GPU-3", None, [3]),
        ("1,1", None, [1]),
        (None, "1,GPU-3000", [1, 3]),
        ("0", "1,3", [1]),
        (None, "4,5,6,7", [0, 1, 2, 3]),
    ],
)
def test_visible_devices(cuda: str | None, nvidia: str | None, left: list[int]) -> None:
    assert [g.index for g in visible.narrow(_four(), cuda, nvidia)] == left


def _split() -> tuple[Gpu, ...]:
    board = Gpu(0, "GPU-a", "NVIDIA H100", "2330:10de", mig=True)
    parts = [Gpu(0, f"MIG-{n}", "NVIDIA H100 MIG", "2330:10de", parent="GPU-a", slice=f"{n + 1}/0") for n in range(2)]
    return (board, *parts, Gpu(1, "GPU-b", "NVIDIA H100", "2330:10de"))


@pytest.mark.parametrize(
    ("cuda", "nvidia", "left"),
    [
        (None, None, ["MIG-0", "MIG-1", "GPU-b"]),
        ("MIG-1", None, ["MIG-1"]),
        ("MIG-GPU-a/2/0", None, ["MIG-1"]),
        ("0", None, ["MIG-0", "MIG-1"]),
        ("GPU-a,GPU-b", None, ["MIG-0", "MIG-1", "GPU-b"]),
        (None, "0:1", ["MIG-1"]),
        (None, "MIG-0,1", ["MIG-0", "GPU-b"]),
        ("1,MIG-0", "MIG-0,1", ["GPU-b", "MIG-0"]),
    ],
)
def test_visible_mig_slices(cuda: str | None, nvidia: str | None, left: list[str]) -> None:
    assert [g.uuid for g in visible.narrow(_split(), cuda, nvidia)] == left


@pytest.mark.parametrize("entry", ["MIG-2", "MIG-GPU-a/9/0", "MIG-", "0:2", "0:x"])
def test_a_slice_that_is_not_there_is_an_error(entry: str) -> None:
    with pytest.raises(Invalid, match="which is no GPU"):
        visible.narrow(_split(), entry, None)


def test_indices_count_as_cuda_counts() -> None:
    slow, fast = Gpu(0, "GPU-s", "NVIDIA L4", "27b8:10de", speed=10), Gpu(1, "GPU-f", "NVIDIA L40S", "26b9:10de", speed=40)
    assert visible.narrow((slow, fast), "0", None) == (fast,) == visible.narrow((slow, fast), "0", None, "FASTEST_FIRST")
    assert visible.narrow((slow, fast), "0", None, "PCI_BUS_ID") == (slow,)
    assert visible.narrow((slow, fast), None, None) == (slow, fast)
    with pytest.raises(Invalid, match="CUDA_DEVICE_ORDER"):
        visible.narrow((slow, fast), None, None, "SLOWEST")


@pytest.mark.parametrize("entry", ["4", "GPU-9", "GPU-", "x", "-2", "٣"])
def test_an_entry_that_names_no_gpu_is_an_error(entry: str) -> None:
    with pytest.raises(Invalid, match="CUDA_VISIBLE_DEVICES"):
        visible.narrow(_four(), entry, None)
