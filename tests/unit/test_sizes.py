"""The size check finds what is too large and nothing else."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

TOOL = Path(__file__).resolve().parents[2] / "tools" / "sizes.py"


def sizes(*paths: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(TOOL), *map(str, paths)], capture_output=True, text=True, check=False)


def function(lines: int) -> str:
    return "def f() -> None:\n" + "    x = 1\n" * (lines - 1)


def test_a_file_at_the_limit_passes_and_one_line_more_fails(tmp_path: Path) -> None:
    file = tmp_path / "a.py"
    file.write_text("x = 1\n\n" * 400)
    assert sizes(tmp_path).returncode == 0
    file.write_text("x = 1\n\n" * 401)
    done = sizes(tmp_path)
    assert done.returncode == 1 and "401 non-blank lines, at most 400" in done.stdout


def test_a_function_at_the_limit_passes_and_one_line_more_fails(tmp_path: Path) -> None:
    file = tmp_path / "a.py"
    file.write_text(function(80))
    assert sizes(tmp_path).returncode == 0
    file.write_text(function(81).replace("def", "async def"))
    done = sizes(tmp_path)
    assert done.returncode == 1 and "f has 81 lines, at most 80" in done.stdout


def test_what_cannot_be_read_is_told_beside_the_others(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_bytes(b"x = 1\n# \xff\n")
    (tmp_path / "b.py").write_text("def f(:\n")
    (tmp_path / "c.py").write_text(function(81))
    done = sizes(tmp_path)
    assert done.returncode == 1 and done.stderr == ""
    assert "a.py: no Python in UTF-8" in done.stdout and "b.py: no Python in UTF-8" in done.stdout and "c.py:1: f has 81 lines" in done.stdout


def test_without_a_file_to_look_at_nothing_passes(tmp_path: Path) -> None:
    for paths in ((), (tmp_path,), (tmp_path / "absent",)):
        done = sizes(*paths)
        assert done.returncode == 2 and "usage: sizes.py FOLDER" in done.stderr


def test_tests_may_be_larger(tmp_path: Path) -> None:
    file = tmp_path / "tests" / "a.py"
    file.parent.mkdir()
    file.write_text(function(120) + "x = 1\n" * 480)
    assert sizes(tmp_path).returncode == 0
    file.write_text(function(121) + "x = 1\n" * 480)
    done = sizes(tmp_path)
    assert done.returncode == 1 and "at most 600" in done.stdout and "at most 120" in done.stdout
