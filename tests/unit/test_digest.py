"""SHA-256 whose state travels: vectors, odd offsets, other processes, hostile states, and the fallback."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import threading

import pytest

from artifact import digest
from artifact.errors import Invalid, Mismatch, Unsupported
from tests.conftest import missing


@pytest.fixture
def exporting() -> None:
    """For what carries a state on."""
    if not digest.can_export():
        missing("a libcrypto with SHA256_* symbols in this Python")


@pytest.mark.parametrize("data", [b"", b"abc", b"x" * 63, b"x" * 64, b"x" * 65, os.urandom(100_003)])
def test_agrees_with_hashlib(data: bytes) -> None:
    for view in (data, bytearray(data), memoryview(data), memoryview(bytearray(data))):
        hasher = digest.new()
        hasher.update(view)
        assert hasher.hexdigest() == hashlib.sha256(data).hexdigest()
        assert hasher.digest() == "sha256:" + hasher.hexdigest()
        assert hasher.offset == len(data)


@pytest.mark.usefixtures("exporting")
def test_continues_at_every_offset_of_two_blocks() -> None:
    data = os.urandom(500)
    for cut in range(200):
        first = digest.new()
        first.update(data[:cut])
        second = digest.new(state=first.state(), offset=cut)
        second.update(data[cut:])
        assert second.hexdigest() == hashlib.sha256(data).hexdigest()


@pytest.mark.usefixtures("exporting")
def test_the_state_is_the_documented_one() -> None:
    hasher = digest.new()
    hasher.update(b"a" * 64 + b"rest")
    state = hasher.state()
    assert len(state) == 32 + 8 + 4
    assert int.from_bytes(state[32:40], "big") == 68
    assert state[40:] == b"rest"
    assert digest.new().state()[:4].hex() == "6a09e667"


@pytest.mark.usefixtures("exporting")
def test_another_process_continues() -> None:
    hasher = digest.new()
    hasher.update(b"a" * 1000)
    script = (
        f"from artifact import digest; h = digest.new(state=bytes.fromhex('{hasher.state().hex()}'), offset=1000)\n"
        "h.update(b'b' * 77); print(h.hexdigest())"
    )
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == hashlib.sha256(b"a" * 1000 + b"b" * 77).hexdigest()


@pytest.mark.usefixtures("exporting")
@pytest.mark.parametrize("change", [lambda s: s[:39], lambda s: s + b"x", lambda s: s[:-1], lambda s: s[:32] + b"\xff" * 8 + s[40:]])
def test_hostile_states_are_refused(change) -> None:  # type: ignore[no-untyped-def]
    hasher = digest.new()
    hasher.update(b"a" * 70)
    with pytest.raises(Invalid):
        digest.new(state=change(hasher.state()), offset=70)


@pytest.mark.usefixtures("exporting")
def test_a_state_of_another_offset_is_refused() -> None:
    hasher = digest.new()
    hasher.update(b"a" * 70)
    with pytest.raises(Invalid):
        digest.new(state=hasher.state(), offset=71)
    with pytest.raises(Invalid):
        digest.new(offset=1)


def test_sha512_and_strangers() -> None:
    hasher = digest.new("sha512")
    hasher.update(b"abc")
    assert hasher.digest() == "sha512:" + hashlib.sha512(b"abc").hexdigest()
    assert hasher.state() == b""
    with pytest.raises(Unsupported):
        digest.new("md5")
    with pytest.raises(Unsupported):
        digest.new("sha512", b"x", 1)


@pytest.mark.slow
def test_counts_beyond_four_gib_of_bits() -> None:
    # 2^32 bits are 512 MiB: the carry into the high word; hashed from one small buffer
    block = bytes(1024 * 1024)
    ours, theirs = digest.new(), hashlib.sha256()
    for _ in range(513):
        ours.update(block)
        theirs.update(block)
    if digest.can_export():
        ours = digest.new(state=ours.state(), offset=ours.offset)
    assert ours.hexdigest() == theirs.hexdigest()


def test_hash_fd(tmp_path) -> None:  # type: ignore[no-untyped-def]
    data = os.urandom(3_000_001)
    path = tmp_path / "f"
    path.write_bytes(data)
    fd = os.open(path, os.O_RDONLY)
    try:
        assert digest.hash_fd(fd, 0, len(data)) == "sha256:" + hashlib.sha256(data).hexdigest()
        assert digest.hash_fd(fd, 7, 2_000_000) == "sha256:" + hashlib.sha256(data[7:2_000_000]).hexdigest()
        with pytest.raises(Mismatch):
            digest.hash_fd(fd, 0, len(data) + 1)
    finally:
        os.close(fd)


def test_several_threads_hash_at_once() -> None:
    data = os.urandom(4_000_000)
    want, found = hashlib.sha256(data).hexdigest(), []

    def work() -> None:
        hasher = digest.new()
        for at in range(0, len(data), 65_537):
            hasher.update(memoryview(data)[at : at + 65_537])
        found.append(hasher.hexdigest())

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [want] * 4


def test_without_the_symbols_hashlib_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digest, "_CRYPTO", None)
    hasher = digest.new()
    hasher.update(b"abc")
    assert hasher.hexdigest() == hashlib.sha256(b"abc").hexdigest()
    assert hasher.state() == b""
    assert not digest.can_export()
    with pytest.raises(Unsupported):
        digest.new(state=b"x" * 40, offset=0)
