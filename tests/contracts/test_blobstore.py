"""The contract of every blob store: one suite, run over each module found in registry/blobs/."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

import registry.blobs
from artifact.digest import can_export
from artifact.errors import Conflict, Invalid, Mismatch, NotFound, RangeInvalid
from artifact.manifest import digest_of
from artifact.store import BlobStore, Content

BACKENDS = sorted(p.stem for p in Path(registry.blobs.__path__[0]).glob("[a-z]*.py"))


def open_store(name: str, root: Path) -> BlobStore:
    """The backend's own class: the subclass of BlobStore that its module defines; each takes where to keep things."""
    module = importlib.import_module(f"registry.blobs.{name}")
    found = [c for c in vars(module).values() if isinstance(c, type) and issubclass(c, BlobStore) and c.__module__ == module.__name__]
    assert len(found) == 1, "one backend, one file"
    return found[0](root)


@pytest.fixture(params=BACKENDS)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> BlobStore:
    return open_store(request.param, tmp_path)


def whole(content: Content) -> bytes:
    if content.path is not None:
        with content.path.open("rb") as file:
            file.seek(content.lo)
            return file.read(content.hi - content.lo)
    return content.data if content.data is not None else b"".join(content.chunks or ())


def keep(store: BlobStore, upload: str, raw: bytes) -> str:
    writer = store.writer(upload)
    writer.write(raw)
    return writer.publish(digest_of(raw))


def test_backends_are_found() -> None:
    assert "file" in BACKENDS


def test_what_is_published_is_read_back(store: BlobStore) -> None:
    raw = os.urandom(100_003)
    location = keep(store, "upload-0001", raw)
    assert store.stat(location) == len(raw)
    assert whole(store.open(location)) == raw
    assert whole(store.open(location, 7, 99)) == raw[7:99]
    assert whole(store.open(location, 99_999, 10**9)) == raw[99_999:]
    assert list(store.walk()) == [(location, len(raw))]


def test_empty_object(store: BlobStore) -> None:
    location = keep(store, "upload-0001", b"")
    assert store.stat(location) == 0 and whole(store.open(location)) == b""


def test_absent_and_out_of_range(store: BlobStore) -> None:
    location = keep(store, "upload-0001", b"abc")
    with pytest.raises(RangeInvalid):
        store.open(location, 4)
    store.delete(location)
    store.delete(location)
    assert store.stat(location) is None
    with pytest.raises(NotFound):
        store.open(location)


@pytest.mark.parametrize(
    "location", ["", "../x", "sha256/../../etc/passwd", "/etc/passwd", "sha256/ab/" + "a" * 63, "sha256/ab/" + "A" * 64, "sha256/ab/x\0"]
)
def test_hostile_location(store: BlobStore, location: str) -> None:
    for use in (store.stat, store.open, store.delete):
        with pytest.raises(Invalid):
            use(location)


@pytest.mark.parametrize("upload", ["", "short", "../../etc/passwd", "a/b/c/d/e/f", "x" * 65, "upload\n001"])
def test_hostile_upload_id(store: BlobStore, upload: str) -> None:
    with pytest.raises(Invalid):
        store.writer(upload)


def test_wrong_digest_keeps_nothing(store: BlobStore) -> None:
    writer = store.writer("upload-0001")
    writer.write(b"abc")
    with pytest.raises(Mismatch):
        writer.publish(digest_of(b"abd"))
    assert list(store.walk()) == []
    with pytest.raises(Mismatch):
        store.writer("upload-0001", offset=3)


def test_nothing_is_visible_before_publish(store: BlobStore) -> None:
    writer = store.writer("upload-0001")
    writer.write(b"abc")
    writer.sync()
    assert list(store.walk()) == []
    writer.publish(digest_of(b"abc"))
    assert len(list(store.walk())) == 1


def test_two_uploads_of_one_digest_are_one_object(store: BlobStore) -> None:
    raw = os.urandom(1000)
    first, second = store.writer("upload-0001"), store.writer("upload-0002")
    for writer in (first, second):
        writer.write(raw)
    assert first.publish(digest_of(raw)) == second.publish(digest_of(raw))
    assert len(list(store.walk())) == 1


@pytest.mark.parametrize("with_state", [True, False])
@pytest.mark.parametrize("cut", [0, 1, 63, 64, 65, 4097])
def test_resumes_at_any_offset(store: BlobStore, cut: int, with_state: bool) -> None:
    raw = os.urandom(9001)
    writer = store.writer("upload-0001")
    writer.write(raw[:cut])
    writer.sync()
    state = writer.state() if with_state else b""
    assert bool(state) == (with_state and can_export())
    writer.close()
    writer = store.writer("upload-0001", offset=cut, state=state)
    writer.write(memoryview(raw)[cut:])
    assert whole(store.open(writer.publish(digest_of(raw)))) == raw


def test_bytes_behind_the_durable_offset_are_dropped_at_the_next_write(store: BlobStore) -> None:
    writer = store.writer("upload-0001")
    writer.write(b"durable and then lost")
    writer.close()
    stale = store.writer("upload-0001", offset=7)
    stale.close()  # opened with an outdated row and let go: harms nothing
    assert store.writer("upload-0001", offset=21) is not None


def test_dropped_bytes_do_not_reach_the_object(store: BlobStore) -> None:
    writer = store.writer("upload-0001")
    writer.write(b"durable and then lost")
    writer.close()
    writer = store.writer("upload-0001", offset=7)
    location = writer.publish(digest_of(b"durable"))
    assert whole(store.open(location)) == b"durable" and store.stat(location) == 7


def test_one_writer_at_a_time(store: BlobStore) -> None:
    writer = store.writer("upload-0001")
    with pytest.raises(Conflict):
        store.writer("upload-0001")
    writer.discard()
    store.writer("upload-0001").discard()


def test_walk_goes_on_behind_a_location(store: BlobStore) -> None:
    for i in range(40):
        keep(store, f"upload-{i:04}", str(i).encode())
    everything = list(store.walk())
    assert everything == sorted(everything) and len(everything) == 40
    for i in (0, 17, 39):
        assert list(store.walk(everything[i][0])) == everything[i + 1 :]


def test_a_killed_writer_leaves_what_was_synced(tmp_path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path; from registry.blobs.file import FileBlobs\n"
        "w = FileBlobs(Path(sys.argv[1])).writer('upload-0001'); w.write(b'a' * 100000); w.sync(); print(w.state().hex(), flush=True)\n"
        "w.write(b'b' * 50000); os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert done.returncode == -9
    store = open_store("file", tmp_path)
    assert list(store.walk()) == []
    writer = store.writer("upload-0001", offset=100_000, state=bytes.fromhex(done.stdout.strip()))
    writer.write(b"c")
    assert store.stat(writer.publish(digest_of(b"a" * 100_000 + b"c"))) == 100_001


def test_public_files_are_read_only(tmp_path: Path) -> None:
    store = open_store("file", tmp_path)
    path = store.open(keep(store, "upload-0001", b"abc")).path
    assert path is not None and path.stat().st_mode & 0o777 == 0o444
