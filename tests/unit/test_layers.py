"""Every import rule bites: a violation of each is injected into a copy of the tree, and lint-imports must fail naming that rule."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LINT = str(Path(sys.executable).parent / "lint-imports")
PACKAGES = ("artifact", "registry", "mirror", "runtime")

# contract id -> file that gets one line more (made when absent), and the line
VIOLATIONS = {
    "artifact-layers": ("artifact/errors.py", "import artifact.store"),
    "registry-layers": ("registry/settings.py", "import registry.app"),
    "mirror-layers": ("mirror/plan.py", "import mirror.sync"),
    "runtime-layers": ("runtime/profiles.py", "import runtime.serve"),
    "artifact-alone": ("artifact/store.py", "import registry.settings"),
    "programs-apart": ("runtime/weights.py", "import registry.settings"),
    "protocols-apart": ("registry/protocols/oci.py", "import registry.protocols.huggingface"),
    "blobs-apart": ("registry/blobs/extra.py", "import registry.blobs.file"),
    "sources-apart": ("mirror/sources/oci.py", "import mirror.sources.huggingface"),
    "engines-apart": ("runtime/engines/extra.py", "import runtime.engines.vllm"),
    "protocols-blind": ("registry/protocols/admin.py", "import registry.catalog"),
    "sqlalchemy-home": ("registry/guard.py", "import sqlalchemy"),
    "boto3-home": ("registry/library.py", "import boto3"),
    "hub-home": ("mirror/sync.py", "import huggingface_hub"),
    "pynvml-home": ("runtime/profiles.py", "import pynvml"),
    "tuf-home": ("artifact/trust.py", "import tuf"),
    "runtime-lean": ("runtime/serve.py", "import yaml"),
    "acyclic": ("registry/guard.py", "import registry.app"),
}


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what the rules look at."""
    copy = tmp_path_factory.mktemp("tree")
    for name in PACKAGES:
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", copy)
    return copy


def lint(tree: Path, *contracts: str) -> subprocess.CompletedProcess[str]:
    chosen = [part for c in contracts for part in ("--contract", c)]
    return subprocess.run([LINT, "--no-logo", *chosen], cwd=tree, capture_output=True, text=True, check=False)


def rules() -> dict[str, str]:
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    return {c["id"]: c["name"] for c in tool["contracts"]}


def test_the_tree_as_it_is_breaks_no_rule(tree: Path) -> None:
    done = lint(tree)
    assert done.returncode == 0, done.stdout


def test_every_rule_has_a_violation_here() -> None:
    assert set(rules()) == set(VIOLATIONS)


@pytest.mark.slow
@pytest.mark.parametrize("contract", VIOLATIONS)
def test_a_violation_is_seen(tree: Path, contract: str) -> None:
    path, line = VIOLATIONS[contract]
    file = tree / path
    before = file.read_text() if file.exists() else None
    file.write_text((before or "") + f"\n{line}\n")
    try:
        done = lint(tree, contract)
    finally:
        file.write_text(before) if before is not None else file.unlink()
    assert done.returncode == 1, done.stdout + done.stderr
    assert f"{rules()[contract]} BROKEN" in done.stdout


def test_a_module_that_no_layer_names_is_seen(tree: Path) -> None:
    file = tree / "runtime" / "surprise.py"
    file.write_text("")
    try:
        done = lint(tree, "runtime-layers")
    finally:
        file.unlink()
    assert done.returncode == 1 and "surprise" in done.stdout
