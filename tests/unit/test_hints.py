"""What the mirror notes beside its staging, for the next run: never needed, never a reason to fail."""

from __future__ import annotations

from pathlib import Path

from artifact.manifest import digest_of
from mirror.hints import Hints

ONE, OTHER = digest_of(b"1"), digest_of(b"2")


def test_the_next_run_finds_the_last_that_was_noted(tmp_path: Path) -> None:
    for digest in (ONE, OTHER):
        Hints(tmp_path / "noted").add("key", digest)
    with (tmp_path / "noted").open("ab") as file:
        file.write(b"key sha256:12\n\xff\nkey")  # edited, and torn by a full disk
    assert Hints(tmp_path / "noted").find("key") == OTHER and Hints(tmp_path / "noted").find("other") == ""


def test_what_cannot_be_kept_is_known_to_this_run(tmp_path: Path) -> None:
    hints = Hints(tmp_path / "absent" / "noted")
    hints.add("key", ONE)
    assert hints.find("key") == ONE and list(tmp_path.iterdir()) == []
