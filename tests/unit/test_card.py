"""The facts layer of a README, and what is told of files that hub clients do not take."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from artifact.card import HUB_LARGEST, card_of, facts_of, hub_warnings
from artifact.manifest import canonical_json
from artifact.store import File
from tests.conftest import AIRLOCK


@pytest.mark.slow
@pytest.mark.parametrize(
    ("readme", "card"),
    [
        (b"---\nlicense: mit\ntags: [a, 7]\n---\n# hi", {"license": "mit", "tags": ["a", 7]}),
        (b"---\r\nlicense: mit\r\n---\r\n", {"license": "mit"}),
        (b"---\nreleased: 2026-01-02\n---\n", {"released": "2026-01-02"}),  # a date stays what was written
        (b"# no head", {}),
        (b"---\nlicense: mit", {}),
        (b"---\na: &x [1]\nb: *x\n---\n", {}),
        (b"---\na: 1\na: 2\n---\n", {}),
        (b"---\n- a list\n---\n", {}),
        (b"---\n" + b"[" * 5000 + b"\n---\n", {}),
        (b"---\nx: !!python/object:os.system {}\n---\n", {}),
        (b"---\nx: .nan\n---\n", {"x": "nan"}),
        (b"---\nx: 0x" + b"f" * 5000 + b"\n---\n", {}),
        (b"---\n0x" + b"f" * 5000 + b": x\n---\n", {}),
        (b'---\n"\\ud800": "\\udfff"\n---\n', {"?": "?"}),
        (b"\xff\xfe", {}),
        (b"", {}),
    ],
)
def test_a_card_is_plain_values_or_absent(readme: bytes, card: dict[str, object]) -> None:
    assert card_of(readme) == card
    facts = facts_of("push://a/b", readme)
    shown = {"card": card} if card else {}
    licensed = {"license": card["license"]} if isinstance(card.get("license"), str) else {}
    tags = {"tags": [t for t in card["tags"] if isinstance(t, str)]} if isinstance(card.get("tags"), list) else {}  # type: ignore[union-attr]
    assert facts == canonical_json({"schema": 1, "source": "push://a/b"} | shown | licensed | tags)


def test_files_above_fifty_gigabytes_are_told_with_the_way_out() -> None:
    files = [File("a.safetensors", "", HUB_LARGEST), File("b.safetensors", "", HUB_LARGEST + 1), File("c.json", "", 7)]
    assert [words.split(" ")[0] for words in hub_warnings(files)] == ["b.safetensors"]
    assert "50000000001 bytes" in hub_warnings(files)[0] and "smaller shards" in hub_warnings(files)[0]


def test_a_push_says_so_before_it_reads_the_file(tmp_path: Path) -> None:
    with (tmp_path / "huge.safetensors").open("wb") as file:
        file.truncate(HUB_LARGEST + 1)  # its bytes are never read here
    argv = [str(AIRLOCK), "model", "push", str(tmp_path), "acme/huge:1", "--registry", "http://127.0.0.1:9"]
    process = subprocess.Popen(argv, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env={**os.environ, "AIRLOCK_KEY": "nvapi-x"})
    try:
        assert process.stderr is not None
        line = process.stderr.readline()
        assert line.startswith("warning: huge.safetensors has 50000000001 bytes") and process.poll() is None
    finally:
        process.kill()
        process.communicate()
