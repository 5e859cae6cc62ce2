"""The one console script: usage, unknown words, lazily loaded commands, expected failures without a traceback."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from artifact.cli import run
from artifact.errors import Invalid, NotFound

AIRLOCK = str(Path(sys.executable).parent / "airlock")


def airlock(*argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([AIRLOCK, *argv], capture_output=True, text=True, check=False, timeout=60)


def test_without_a_command_the_usage_lists_all() -> None:
    done = airlock()
    assert done.returncode == 0
    for word in ("bundle import", "bundle pack", "catalog", "key", "mirror init", "mirror sync", "model", "promote", "registry", "runtime", "site"):
        assert f"airlock {word}\n" in done.stdout


def test_an_unknown_command_is_a_usage_error() -> None:
    done = airlock("frobnicate")
    assert done.returncode == 2 and "usage: airlock" in done.stderr and "Traceback" not in done.stderr


def test_half_a_command_shows_its_family_only() -> None:
    done = airlock("bundle")
    assert done.returncode == 2
    assert "airlock bundle pack" in done.stderr and "airlock promote" not in done.stderr


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("list-model-profiles", "list-model-profiles"),
        ("nim_list_model_profiles", "list-model-profiles"),
        ("nim_download_to_cache", "download-to-cache"),
        ("download-to-cache", "download-to-cache"),
        ("nim-serve", "serve"),
    ],
)
def test_a_link_named_as_in_an_image_of_a_nim_is_that_command(tmp_path: Path, name: str, word: str) -> None:
    (tmp_path / name).symlink_to(AIRLOCK)
    done = subprocess.run([str(tmp_path / name), "--help"], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0 and done.stdout.startswith(f"usage: airlock runtime {word} "), done


def test_a_link_of_another_name_is_airlock(tmp_path: Path) -> None:
    (tmp_path / "key").symlink_to(AIRLOCK)
    done = subprocess.run([str(tmp_path / "key"), "--help"], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0 and done.stdout.startswith("usage: airlock COMMAND")


def test_importing_the_dispatcher_loads_no_program() -> None:
    programs = ("registry", "mirror", "runtime", "sqlalchemy", "tuf", "aiohttp")
    code = f"import sys, artifact.cli; print([m for m in sys.modules if m.split('.')[0] in {programs}])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_an_expected_failure_is_one_line_and_its_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    def fails(argv: list[str]) -> int:
        raise Invalid("the name is wrong", expected="lower case", do="rename it")

    assert run(fails, []) == 6
    assert capsys.readouterr().err == "airlock: the name is wrong; expected: lower case; do: rename it\n"


def test_an_expected_failure_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    def fails(argv: list[str]) -> int:
        raise NotFound("no such name", name="acme/x")

    assert run(fails, ["--json"]) == 3
    answer = json.loads(capsys.readouterr().err)
    assert answer["error"] == "not_found" and answer["ids"] == {"name": "acme/x"}


def test_ctrl_c_says_that_the_command_resumes(capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(argv: list[str]) -> int:
        raise KeyboardInterrupt

    assert run(interrupted, []) == 130
    assert "resumes" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    "argv", [["key"], ["mirror", "init"], ["mirror", "sync"], ["bundle", "pack"], ["bundle", "import"], ["promote"], ["catalog"], ["runtime"]]
)
def test_every_command_has_help(argv: list[str]) -> None:
    done = airlock(*argv, "--help")
    assert done.returncode == 0 and "usage" in done.stdout.lower()
