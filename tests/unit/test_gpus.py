"""GPU detection through the unmodified NVML binding, against a stand-in library that a C compiler builds here."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from artifact.errors import Invalid, Unavailable
from runtime import gpus
from runtime.settings import Gpu

SOURCE = Path(__file__).parents[1] / "fakes" / "nvml" / "fake_nvml.c"
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
Node = Callable[[str | None], None]


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the stand-in libnvidia-ml.so.1."""
    compiler = shutil.which("cc")
    if compiler is None:
        if os.environ.get("CI"):
            pytest.fail("no C compiler for the NVML stand-in")
        pytest.skip("no C compiler")
    folder = tmp_path_factory.mktemp("nvml")
    out = folder / "libnvidia-ml.so.1"
    subprocess.run([compiler, "-Wall", "-Werror", "-shared", "-fPIC", "-Wl,-soname,libnvidia-ml.so.1", "-o", out, SOURCE], check=True)
    return folder


@pytest.fixture
def node(library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Node:
    """Makes this process' children a node with the stand-in and a configuration (None: no file, as a driver that is not loaded)."""

    def make(config: str | None) -> None:
        path = tmp_path / "gpus.cfg"
        if config is not None:
            path.write_text(config)
        monkeypatch.setenv("LD_LIBRARY_PATH", str(library))
        monkeypatch.setenv("FAKE_NVML_CONFIG", str(path))

    return make


def test_facts_of_two_gpus(node: Node) -> None:
    node(TWO)
    facts = gpus.detect(20)
    assert (facts.cpu, facts.simulated, facts.driver, facts.cuda) == (False, True, "550.163.01", "12.4")
    h100, l40s = facts.gpus
    assert (h100.uuid, h100.device, h100.capability, h100.total) == ("GPU-01000100-0000-0000-0000-000000000000", "2330:10de", (9, 0), 85520809984)
    assert (l40s.name, l40s.device, l40s.capability, l40s.free, l40s.mig) == ("NVIDIA L40S", "26b9:10de", (8, 9), 47700000000, False)


@pytest.mark.skipif(Path("/dev/nvidiactl").exists(), reason="this machine has a GPU")
def test_no_library_is_a_cpu_node(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FAKE_NVML_CONFIG", raising=False)
    monkeypatch.delenv("LD_LIBRARY_PATH", raising=False)
    assert gpus.detect(20) == gpus.Facts(cpu=True)


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
    node(config)
    with pytest.raises(Unavailable) as caught:
        gpus.detect(20)
    assert words in caught.value.what and advice in caught.value.do and caught.value.reason == "gpu"


def test_a_hanging_gpu_ends_at_the_deadline_and_is_named(node: Node) -> None:
    node("gpu\ngpu\ndelay_ms=60000\n")
    began = time.monotonic()
    with pytest.raises(Unavailable, match="within 2 s; the last call was nvmlDeviceGetUUID of GPU 1"):
        gpus.detect(2)
    assert time.monotonic() - began < 8


def test_memory_that_is_not_told_and_mig(node: Node) -> None:
    node("gpu\nmig=1\n")
    (gpu,) = gpus.detect(20).gpus
    assert gpu.total == 0 and gpu.mig


def test_no_gpu_behind_a_working_library_is_no_cpu_node(node: Node) -> None:
    node("driver=1\n")
    assert gpus.detect(20).gpus == () and not gpus.detect(20).cpu


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
