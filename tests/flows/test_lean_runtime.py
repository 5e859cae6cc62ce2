"""`pip install .[runtime]` alone: nothing of a server comes with it, and the command line answers at once."""

from __future__ import annotations

import json
import os
import resource
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOREIGN = ("sqlalchemy", "boto3", "fastapi", "alembic", "huggingface-hub", "tuf", "uvicorn", "pyyaml")
HELP_S = 0.5
RUNS = 10  # three suffice on a quiet machine; more only ask again under load

pytestmark = pytest.mark.server


@pytest.fixture(scope="module")
def lean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of a fresh virtual environment with the runtime extra and nothing else."""
    home = tmp_path_factory.mktemp("lean")
    source = home / "source"
    keep_out = shutil.ignore_patterns(".venv", ".git", "build", "dist", "demo-out", "*.egg-info", "__pycache__", "tests")
    shutil.copytree(ROOT, source, ignore=keep_out)
    subprocess.run([sys.executable, "-m", "venv", str(home / "venv")], check=True)
    pip = [str(home / "venv/bin/pip"), "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "-c", str(ROOT / "requirements/dev.lock"), f"{source}[runtime]"], check=True, timeout=300)
    return home / "venv" / "bin"


def clean() -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}


def test_no_server_library_comes_along(lean: Path) -> None:
    rows = json.loads(subprocess.run([str(lean / "pip"), "list", "--format", "json"], capture_output=True, text=True, check=True).stdout)
    names = {row["name"].lower().replace("_", "-") for row in rows}
    assert {"airlock", "aiohttp", "nvidia-ml-py"} <= names
    assert not names & set(FOREIGN)


def test_help_answers_in_half_a_second(lean: Path) -> None:
    took = []
    for _ in range(RUNS):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([str(lean / "airlock"), "runtime", "--help"], capture_output=True, text=True, env=clean(), cwd="/", check=False)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        took.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)  # it waits for nothing: this is its time when alone
        assert done.returncode == 0, done.stderr
        assert "usage" in done.stdout.lower()
        if len(took) >= 3 and min(took) < HELP_S:
            break
    assert min(took) < HELP_S, f"best of {len(took)} was {min(took):.2f} s"


def test_a_command_of_another_program_names_the_extra(lean: Path) -> None:
    done = subprocess.run([str(lean / "airlock"), "registry", "serve"], capture_output=True, text=True, env=clean(), cwd="/", check=False)
    assert done.returncode == 2 and "airlock[registry]" in done.stderr and "Traceback" not in done.stderr


def test_the_check_for_monitoring_needs_no_more(lean: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    argv = [str(lean / "airlock"), "entitlement", "check", "--registry", f"http://127.0.0.1:{port}", "--nagios"]
    done = subprocess.run(argv, capture_output=True, text=True, env=clean() | {"NGC_API_KEY": "nvapi-x"}, cwd="/", check=False)
    assert done.returncode == 3 and done.stdout.startswith("UNKNOWN: connection_refused: "), done
