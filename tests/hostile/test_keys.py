"""Guessing keys: what a guess has in common with a real key does not show in the time that its refusal takes (attacks.md A19)."""

from __future__ import annotations

import random
import statistics
import time
from pathlib import Path

import pytest

from registry.entitlements import ALPHABET, BODY, PREFIX, checksum, new_key, well_formed
from tests.site import make_key, running_site

TRIES = 10_000
COMMON = 24  # characters in common, of 43; more would leave too few different guesses
TRIM = 0.8  # of the sorted times: what the scheduler adds to the rest says nothing about keys


def like(key: str, common: int, rng: random.Random) -> str:
    """A well-formed guess that begins with the first characters of a real key's body."""
    body = key[len(PREFIX) : len(PREFIX) + BODY]
    text = PREFIX + body[:common] + "".join(rng.choice(ALPHABET) for _ in range(BODY - common))
    return text + checksum(text)


def welch(a: list[float], b: list[float]) -> float:
    """Welch's t of two samples."""
    spread = statistics.variance(a) / len(a) + statistics.variance(b) / len(b)
    return abs(statistics.fmean(a) - statistics.fmean(b)) / spread**0.5


@pytest.mark.full
@pytest.mark.parametrize("backend", ["sqlite", pytest.param("postgresql", marks=pytest.mark.server)])
def test_right_first_characters_make_no_difference_in_time(tmp_path: Path, backend: str) -> None:
    """Both kinds of guesses take turns, so that whatever else the machine does meets both; |t| < 10 and 5 % are far above noise, far below a leak."""
    rng = random.Random(19)
    with running_site(tmp_path, backend) as site:
        key = make_key(site, "acme")
        assert site.entitlements.principal(key) is not None
        times: dict[int, list[float]] = {0: [], COMMON: []}
        guesses = [(common, like(key, common, rng)) for _ in range(TRIES) for common in rng.sample(sorted(times), 2)]  # all made before
        assert all(well_formed(guess) for _, guess in guesses) and len({guess for _, guess in guesses}) == 2 * TRIES
        for common, guess in guesses:
            begun = time.perf_counter()
            found = site.entitlements.principal(guess)
            times[common].append(time.perf_counter() - begun)
            assert found is None
    strange, near = (sorted(values)[: int(TRIES * TRIM)] for values in times.values())
    assert welch(strange, near) < 10
    assert abs(statistics.fmean(strange) - statistics.fmean(near)) < 0.05 * statistics.fmean(strange)


def test_what_no_key_can_be_costs_no_statement(tmp_path: Path) -> None:
    with running_site(tmp_path) as site:
        site.engine.dispose()
        path = site.home.database_path
        hidden = path.rename(path.with_suffix(".away"))  # any statement would fail, or make a new file
        key = new_key()
        for text in (
            "",
            "nvapi-",
            "x" * 10_000,
            key[:-1],
            key + "0",
            key[:-1] + ("0" if key[-1] != "0" else "1"),
            key.swapcase(),
            "nvapi-" + "é" * 49,
        ):
            assert site.entitlements.principal(text) is None
        assert not path.exists()
        hidden.rename(path)
