"""What another thread, process or container takes away, brings or uses between a look and the next is no failure and no harm."""

from __future__ import annotations

from pathlib import Path

from artifact.manifest import digest_of
from registry.blobs.file import FileBlobs, location_of


def stored(blobs: FileBlobs, raw: bytes) -> str:
    writer = blobs.writer("upload-0001")
    writer.write(raw)
    return writer.publish(digest_of(raw))


def test_a_walk_passes_over_what_is_no_folder_of_objects(tmp_path: Path) -> None:
    blobs = FileBlobs(tmp_path)
    assert list(blobs.walk()) == []
    place = stored(blobs, b"abc")
    (tmp_path / "blobs" / ".probe").write_bytes(b"probe")  # there for a moment of each health check
    (tmp_path / "blobs" / "lost+found").mkdir(mode=0o000)
    (tmp_path / "blobs" / "sha256" / "note").write_text("of the operator")
    assert list(blobs.walk()) == [(place, 3)] and place == location_of(digest_of(b"abc"))
