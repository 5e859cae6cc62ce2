"""The content-addressed directory: publication, resume from the journal, two writers, damage, hostile paths, full disks."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from artifact import digest as digest_module
from artifact import disk as disk_module
from artifact.digest import PIECE
from artifact.disk import Disk
from artifact.errors import Invalid, Mismatch, NotFound, TooLarge, Unavailable

SMALL = 1000


@pytest.fixture
def pieces(monkeypatch: pytest.MonkeyPatch) -> int:
    """Small pieces, so that many fit into a fast test."""
    monkeypatch.setattr(disk_module, "PIECE", SMALL)
    return SMALL


def named(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


def test_put_read_walk_link(tmp_path: Path) -> None:
    disk = Disk(tmp_path / "store")
    assert list(disk.walk()) == []
    digests = sorted(disk.put(f"object {i}".encode()) for i in range(20))
    assert disk.put(b"object 1") in digests
    assert [d for d, _ in disk.walk()] == digests
    one = named(b"object 1")
    assert disk.read(one, 100) == b"object 1"
    assert disk.size(one) == 8
    assert disk.path(one).stat().st_mode & 0o777 == 0o444
    assert list((tmp_path / "store/partial").iterdir()) == []
    target = tmp_path / "model" / "a" / "weights"
    disk.link(one, target)
    disk.link(one, target)
    assert target.stat().st_ino == disk.path(one).stat().st_ino
    assert [p.name for p in target.parent.iterdir()] == ["weights"]
    with pytest.raises(TooLarge):
        disk.read(one, 7)
    with pytest.raises(NotFound):
        disk.read(named(b"absent"), 10)
    with pytest.raises(NotFound):
        disk.link(named(b"absent"), target)
    disk.delete(one)
    disk.delete(one)
    assert disk.size(one) is None


def test_link_replaces_a_symlink_and_copies_where_links_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Disk(tmp_path / "store")
    one = disk.put(b"bytes")
    outside = tmp_path / "outside"
    outside.write_bytes(b"untouched")
    (tmp_path / "target").symlink_to(outside)

    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError(errno.EXDEV, "another file system")

    monkeypatch.setattr(os, "link", refuse)
    disk.link(one, tmp_path / "target")
    assert outside.read_bytes() == b"untouched"
    assert (tmp_path / "target").read_bytes() == b"bytes"
    assert not (tmp_path / "target").is_symlink()


@pytest.mark.parametrize("bad", ["sha256:../../etc/passwd", "sha256:" + "A" * 64, "md5:" + "0" * 32, "", "sha256:" + "0" * 63 + "\n"])
def test_paths_come_only_from_digests(tmp_path: Path, bad: str) -> None:
    with pytest.raises(Invalid):
        Disk(tmp_path).path(bad)
    with pytest.raises(Invalid):
        Disk(tmp_path).partial(bad, 1)


def test_symlinks_and_rot_are_not_objects(tmp_path: Path) -> None:
    disk = Disk(tmp_path)
    one = disk.put(b"good bytes")
    other = named(b"secret")
    (tmp_path / "secret").write_bytes(b"secret")
    disk.path(other).parent.mkdir(parents=True, exist_ok=True)
    disk.path(other).symlink_to(tmp_path / "secret")
    assert disk.size(other) is None
    with pytest.raises(Unavailable):
        disk.read(other, 100)
    disk.path(one).chmod(0o644)
    disk.path(one).write_bytes(b"rots bytes")
    with pytest.raises(Mismatch):
        disk.read(one, 100)


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 2, 1, 0], [1, 3, 0, 2]])
def test_pieces_in_any_order(tmp_path: Path, pieces: int, order: list[int]) -> None:
    data = os.urandom(3 * pieces + 17)
    disk = Disk(tmp_path)
    partial = disk.partial(named(data), len(data))
    ranges = partial.missing()
    assert ranges == [(0, 1000), (1000, 2000), (2000, 3000), (3000, 3017)]
    for i in order:
        lo, hi = ranges[i]
        for at in range(lo, hi, 300):
            partial.write(at, memoryview(data)[at : min(at + 300, hi)])
        partial.piece_done(lo, hi)
    assert partial.missing() == []
    assert partial.finish().read_bytes() == data
    assert list((tmp_path / "partial").iterdir()) == []


def test_an_empty_object(tmp_path: Path) -> None:
    disk = Disk(tmp_path)
    partial = disk.partial(named(b""), 0)
    assert partial.missing() == []
    assert partial.finish().read_bytes() == b""


def test_resumes_from_the_journal_without_hashing_again(tmp_path: Path, pieces: int) -> None:
    data = os.urandom(5 * pieces)
    disk = Disk(tmp_path)
    partial = disk.partial(named(data), len(data))
    for lo, hi in partial.missing()[:3]:
        partial.write(lo, data[lo:hi])
        partial.piece_done(lo, hi)
    partial.write(3000, data[3000:3500])
    partial.checkpoint(3000, 3400)
    partial.abort(keep=True)
    again = disk.partial(named(data), len(data))
    assert again.missing() == [(3400, 4000), (4000, 5000)]
    if digest_module.can_export():
        assert again._hasher.offset == 3000
    for lo, hi in again.missing():
        again.write(lo, data[lo:hi])
        again.piece_done(lo, hi)
    assert again.finish().read_bytes() == data


def test_without_exported_states_stored_bytes_are_hashed_again(tmp_path: Path, pieces: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digest_module, "_CRYPTO", None)
    test_resumes_from_the_journal_without_hashing_again(tmp_path, pieces)


@pytest.mark.parametrize(
    "damage",
    [
        b"",
        b"\x00\xff\n",
        b'{"size":5000}\n{"done":0}\n',
        b'[1]\n{"done":0}\n',
        b'{"done":0}\n',
    ],
)
def test_a_damaged_journal_means_starting_anew(tmp_path: Path, pieces: int, damage: bytes) -> None:
    data = os.urandom(2 * pieces)
    disk = Disk(tmp_path)
    partial = disk.partial(named(data), len(data))
    partial.write(0, data)
    partial.piece_done(0, 1000)
    journal = partial._journal_path
    partial.abort(keep=True)
    journal.write_bytes(damage)
    again = disk.partial(named(data), len(data))
    assert again.missing_bytes() == 2000
    again.write(0, data)
    again.piece_done(0, 1000)
    again.piece_done(1000, 2000)
    assert again.finish().read_bytes() == data


@pytest.mark.parametrize(
    "line",
    [
        {"done": 99},
        {"done": -1},
        {"done": True},
        {"part": 1, "to": 10**9},
        {"part": 1, "to": "x"},
        {"hashed": 1000, "state": "zz"},
        {"hashed": 10**9, "state": ""},
    ],
)
def test_records_that_do_not_fit_are_ignored(tmp_path: Path, pieces: int, line: dict[str, object]) -> None:
    data = os.urandom(2 * pieces)
    disk = Disk(tmp_path)
    partial = disk.partial(named(data), len(data))
    partial.write(0, data[:1000])
    partial.piece_done(0, 1000)
    with partial._journal_path.open("ab") as out:
        out.write(json.dumps(line).encode() + b"\n" + b'{"done":1')
    partial.abort(keep=True)
    again = disk.partial(named(data), len(data))
    assert again.missing() == [(1000, 2000)]
    again.write(1000, data[1000:])
    again.piece_done(1000, 2000)
    assert again.finish().read_bytes() == data


def test_a_mismatch_keeps_nothing(tmp_path: Path, pieces: int) -> None:
    data = os.urandom(1500)
    disk = Disk(tmp_path)
    partial = disk.partial(named(data), len(data))
    partial.write(0, data[:-1] + bytes([data[-1] ^ 1]))
    partial.piece_done(0, 1000)
    with pytest.raises(Invalid):
        partial.finish()
    partial.piece_done(1000, 1500)
    with pytest.raises(Mismatch):
        partial.finish()
    assert disk.size(named(data)) is None
    assert list((tmp_path / "partial").iterdir()) == []


def test_bytes_written_again_are_hashed_again(tmp_path: Path, pieces: int) -> None:
    data = os.urandom(3000)
    disk = Disk(tmp_path)
    partial = disk.partial(named(data), len(data))
    partial.write(0, data[:1000])
    partial.piece_done(0, 1000)
    partial.write(1000, b"w" * 700)  # a stream that broke, then another that gives other bytes
    partial.write(1000, data[1000:2000])
    partial.piece_done(1000, 2000)
    partial.write(0, data[:1000])
    partial.write(2000, data[2000:])
    partial.piece_done(2000, 3000)
    assert partial.finish().read_bytes() == data


def test_wrong_offsets_are_refused(tmp_path: Path, pieces: int) -> None:
    partial = Disk(tmp_path).partial(named(b"x"), 1500)
    for call in (
        lambda: partial.write(1400, b"x" * 101),
        lambda: partial.write(-1, b"x"),
        lambda: partial.piece_done(0, 999),
        lambda: partial.checkpoint(10, 20),
        lambda: partial.checkpoint(0, 1001),
    ):
        with pytest.raises(Invalid):
            call()


def test_two_writers_do_not_disturb_each_other(tmp_path: Path, pieces: int) -> None:
    data = os.urandom(1500)
    first, second = (Disk(tmp_path).partial(named(data), len(data)) for _ in range(2))
    assert first.path != second.path
    second.write(0, data[:1000])
    first.write(0, data)
    second.write(1000, data[1000:])
    for partial in (first, second):
        partial.piece_done(0, 1000)
        partial.piece_done(1000, 1500)
        assert partial.finish().read_bytes() == data
    assert list((tmp_path / "partial").iterdir()) == []


def test_a_dead_process_leaves_a_partial_that_the_next_one_continues(tmp_path: Path) -> None:
    data = bytes(range(256)) * 4 * 1024  # 1 MiB: one piece, checkpointed in the middle
    script = (
        "import sys, time; from pathlib import Path; from artifact.disk import Disk\n"
        f"p = Disk(Path(sys.argv[1])).partial('{named(data)}', {len(data)})\n"
        "q = Disk(Path(sys.argv[1])).partial(p.digest, p.size)\n"
        "p.write(0, bytes(range(256)) * 2048); p.checkpoint(0, 524288); print('ready', flush=True); time.sleep(60)"
    )
    child = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    assert child.poll() is None
    assert len(list((tmp_path / "partial").glob("*.private"))) == 1
    child.send_signal(signal.SIGKILL)
    child.wait()
    partial = Disk(tmp_path).partial(named(data), len(data))
    assert partial.missing() == [(524288, 1048576)]
    assert list((tmp_path / "partial").glob("*.private*")) == []
    partial.write(524288, data[524288:])
    partial.piece_done(524288, 1048576)
    assert partial.finish().read_bytes() == data


def test_a_partial_left_read_only_is_continued(tmp_path: Path, pieces: int) -> None:
    data = os.urandom(10)
    partial = Disk(tmp_path).partial(named(data), 10)
    partial.path.chmod(0o444)
    partial.abort(keep=True)
    partial = Disk(tmp_path).partial(named(data), 10)
    partial.write(0, data)
    partial.piece_done(0, 10)
    assert partial.finish().read_bytes() == data


def test_no_room_names_needed_and_free(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match=r"1125899906842624 bytes needed, \d+ free"):
        Disk(tmp_path).partial(named(b"x"), 1 << 50)


def test_a_disk_that_fills_up_says_so(tmp_path: Path, pieces: int, monkeypatch: pytest.MonkeyPatch) -> None:
    partial = Disk(tmp_path).partial(named(b"x"), 1500)

    def full(*args: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(Unavailable, match="1500 bytes needed"):
        partial.write(0, b"x")
    with pytest.raises(Unavailable, match="full"):
        Disk(tmp_path).put(b"y")


def test_a_whole_piece_of_the_real_size(tmp_path: Path) -> None:
    size = PIECE + 5
    block = os.urandom(1024 * 1024)
    want = hashlib.sha256(block * 64 + b"tail!")
    partial = Disk(tmp_path).partial("sha256:" + want.hexdigest(), size)
    begun = time.monotonic()
    for i in range(64):
        partial.write(i * len(block), block)
    partial.piece_done(0, PIECE)
    partial.write(PIECE, b"tail!")
    partial.piece_done(PIECE, size)
    assert partial.finish().stat().st_size == size
    assert time.monotonic() - begun < 60
