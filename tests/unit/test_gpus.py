"""GPU detection through the unmodified NVML binding, against a stand-in library that a C compiler builds here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from artifact.errors import Invalid
from runtime import gpus
from runtime.node import Gpu
from tests.fakes.nvml import build

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
from runtime import gpus
try:
    facts = gpus.detect(float(sys.argv[1]))
    print(json.dumps({**vars(facts), "gpus": [vars(g) for g in facts.gpus]}))
except AirlockError as error:
    print(json.dumps(error.as_dict()))
"""
Node = Callable[..., dict[str, Any]]


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the stand-in libnvidia-ml.so.1."""
    folder = build(tmp_path_factory.mktemp("nvml"))
    if folder is None:
        pytest.fail("no C compiler for the NVML stand-in") if os.environ.get("CI") else pytest.skip("no C compiler")
    return folder


def probe(env: dict[str, str], deadline: float = 20) -> dict[str, Any]:
    """What a fresh process detects: the loader reads LD_LIBRARY_PATH only when a process starts."""
    command = [sys.executable, "-c", PROBE, str(deadline)]
    out: dict[str, Any] = json.loads(subprocess.run(command, env=env, capture_output=True, check=True, timeout=60).stdout)
    return out


@pytest.fixture
def node(library: Path, tmp_path: Path) -> Node:
    """Detection on a node with the stand-in and a configuration (None: no file, as a driver that is not loaded)."""

    def detect(config: str | None, deadline: float = 20) -> dict[str, Any]:
        path = tmp_path / "gpus.cfg"
        if config is not None:
            path.write_text(config)
        return probe({"LD_LIBRARY_PATH": str(library), "FAKE_NVML_CONFIG": str(path)}, deadline)

    return detect


def test_facts_of_two_gpus(node: Node) -> None:
    facts = node(TWO)
    assert (facts["cpu"], facts["simulated"], facts["driver"], facts["cuda"]) == (False, True, "550.163.01", "12.4")
    h100, l40s = facts["gpus"]
    assert (h100["uuid"], h100["device"]) == ("GPU-01000100-0000-0000-0000-000000000000", "2330:10de")
    assert (h100["capability"], h100["total"], h100["mig"]) == ([9, 0], 85520809984, False)
    assert (l40s["name"], l40s["device"], l40s["capability"], l40s["free"]) == ("NVIDIA L40S", "26b9:10de", [8, 9], 47700000000)


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
@pytest.mark.usefixtures("library")  # it needs a compiler too
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
    assert "within 1 s; the last call was nvmlDeviceGetUUID of GPU 1" in told["what"]
    assert time.monotonic() - began < 20


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
    assert [g.index for g in gpus.narrow(_four(), cuda, nvidia)] == left


@pytest.mark.parametrize("entry", ["4", "GPU-9", "GPU-", "x", "-2", "٣"])
def test_an_entry_that_names_no_gpu_is_an_error(entry: str) -> None:
    with pytest.raises(Invalid, match="CUDA_VISIBLE_DEVICES"):
        gpus.narrow(_four(), entry, None)
