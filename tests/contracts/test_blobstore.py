"""The contract of every blob store: one suite, run over each module found in registry/blobs/, S3 on a real gateway by http and https."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from artifact import digest as hashing
from artifact.digest import can_export
from artifact.errors import AirlockError, Conflict, Invalid, Mismatch, NotFound, RangeInvalid, Unavailable
from artifact.manifest import digest_of
from artifact.store import BlobStore, BlobWriter
from tests.conftest import missing
from tests.contracts.stores import BACKENDS, PLACES, Open, class_of, whole

MIB = 1024 * 1024
SEVERAL_PARTS = 11 * MIB + 13


@pytest.fixture(params=[param for name in BACKENDS for param in PLACES[name]])
def again(request: pytest.FixtureRequest, tmp_path: Path) -> Open:
    """Opens the same place once more, as another process would."""
    found: Open = request.param(tmp_path)
    return found


@pytest.fixture
def store(again: Open) -> BlobStore:
    return again()


def keep(store: BlobStore, upload: str, raw: bytes, generation: int = 0) -> str:
    writer = store.writer(upload)
    writer.write(raw)
    return writer.publish(digest_of(raw), generation)


def test_every_backend_is_here() -> None:
    assert set(BACKENDS) == set(PLACES) >= {"file", "s3"}
    assert all(issubclass(class_of(name), BlobStore) for name in BACKENDS)


def test_the_probe_passes_and_leaves_nothing(store: BlobStore) -> None:
    assert store.probe()["backend"] in BACKENDS
    assert list(store.walk()) == [] and store.sweep((), time.time() + 60) == 0


@pytest.mark.parametrize("size", [100_003, SEVERAL_PARTS])
def test_what_is_published_is_read_back(store: BlobStore, size: int) -> None:
    raw = os.urandom(size)
    location = keep(store, "upload-0001", raw)
    assert store.stat(location) == len(raw) and store.digest_of(location) == digest_of(raw)
    assert whole(store.open(location)) == raw
    assert whole(store.open(location, 7, 99)) == raw[7:99]
    assert whole(store.open(location, 0, 0)) == b"" and whole(store.open(location, size - 1)) == raw[-1:]
    assert whole(store.open(location, 99_999, 10**9)) == raw[99_999:]
    assert list(store.walk()) == [(location, len(raw))]


def test_empty_object(store: BlobStore) -> None:
    location = keep(store, "upload-0001", b"")
    assert store.stat(location) == 0 and whole(store.open(location)) == b""
    assert list(store.walk()) == [(location, 0)]


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


@pytest.mark.parametrize("raw", [b"abc", b"x" * SEVERAL_PARTS])
def test_wrong_digest_keeps_nothing(store: BlobStore, again: Open, raw: bytes) -> None:
    for hint in (None, digest_of(b"abd")):
        writer = store.writer("upload-0001", hint)
        writer.write(raw)
        with pytest.raises(Mismatch):
            writer.publish(digest_of(b"abd"))
        assert list(store.walk()) == []
        with pytest.raises(Mismatch):
            store.writer("upload-0001", offset=3)
    assert again().sweep((), time.time() + 60) == 0  # nothing was left for it


def test_a_discarded_upload_leaves_nothing(store: BlobStore, again: Open) -> None:
    writer = store.writer("upload-0001")
    writer.write(b"x" * SEVERAL_PARTS)
    writer.sync()
    state = writer.state()
    writer.close()
    again().writer("upload-0001").discard()  # by one who knows only its id
    with pytest.raises(Mismatch):
        store.writer("upload-0001", offset=SEVERAL_PARTS, state=state)
    assert list(store.walk()) == [] and store.sweep((), time.time() + 60) == 0


def test_nothing_is_visible_before_publish(store: BlobStore) -> None:
    for hint in (None, digest_of(b"a" * SEVERAL_PARTS)):
        writer = store.writer("upload-0001", hint)
        writer.write(b"a" * SEVERAL_PARTS)
        writer.sync()
        assert list(store.walk()) == []
        location = writer.publish(digest_of(b"a" * SEVERAL_PARTS))
        assert [found for found, _ in store.walk()] == [location]
        store.delete(location)
        assert list(store.walk()) == []


@pytest.mark.parametrize("size", [1000, SEVERAL_PARTS])
def test_two_uploads_of_one_digest_are_one_object(store: BlobStore, size: int) -> None:
    raw = os.urandom(size)
    first, second = store.writer("upload-0001"), store.writer("upload-0002")
    for writer in (first, second):
        writer.write(raw)
    assert first.publish(digest_of(raw)) == second.publish(digest_of(raw))
    assert len(list(store.walk())) == 1 and store.sweep((), time.time() + 60) == 0


@pytest.mark.parametrize("hinted", [False, True])
@pytest.mark.parametrize("size", [1000, SEVERAL_PARTS])
def test_two_writers_of_one_digest_at_once(again: Open, size: int, hinted: bool) -> None:
    raw = os.urandom(size)
    start, places, stores = threading.Barrier(4), list[str](), [again() for _ in range(4)]

    def work(number: int) -> None:
        writer = stores[number].writer(f"upload-000{number}", digest_of(raw) if hinted else None)
        writer.write(raw)
        start.wait(60)
        places.append(writer.publish(digest_of(raw)))

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert len(places) == 4 and len(set(places)) == 1
    assert list(stores[0].walk()) == [(places[0], size)] and whole(stores[0].open(places[0])) == raw


@pytest.mark.parametrize("cut", [0, 1, 63, 64, 65, 4097, 5 * MIB, 5 * MIB + 1, 10 * MIB + 4097])
def test_resumes_at_any_offset_by_another_instance(store: BlobStore, again: Open, cut: int) -> None:
    raw = os.urandom(SEVERAL_PARTS if cut > MIB else 9001)
    writer = store.writer("upload-0001")
    writer.write(raw[:cut])
    writer.sync()
    state = writer.state()
    writer.close()
    other = again()
    writer = other.writer("upload-0001", offset=cut, state=state)
    assert writer.offset == cut
    writer.write(memoryview(raw)[cut:])
    assert writer.digest() == digest_of(raw)
    assert whole(other.open(writer.publish(digest_of(raw)))) == raw
    assert other.sweep((), time.time() + 60) == 0


@pytest.mark.parametrize("cut", [1000, SEVERAL_PARTS - 1])
def test_resumes_where_a_hash_state_cannot_be_exported(again: Open, cut: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hashing, "_CRYPTO", None)
    assert not can_export()
    raw = os.urandom(SEVERAL_PARTS)
    for wrong in (True, False):
        writer = again().writer("upload-0001")
        writer.write(raw[:cut])
        writer.sync()
        state = writer.state()
        writer.close()
        store = again()
        writer = store.writer("upload-0001", offset=cut, state=state)
        writer.write(raw[cut:])
        if wrong:
            with pytest.raises(Mismatch):
                writer.publish(digest_of(b"another"))
            assert list(store.walk()) == [] and store.sweep((), time.time() + 60) == 0
        else:
            assert whole(store.open(writer.publish(digest_of(raw)))) == raw


def test_one_writer_at_a_time_where_the_store_can_lock(store: BlobStore) -> None:
    writer = store.writer("upload-0001")
    if store.exclusive:
        with pytest.raises(Conflict):
            store.writer("upload-0001")
    writer.discard()
    store.writer("upload-0001").discard()


def test_two_writers_of_one_upload_never_mix(again: Open) -> None:
    """Two replicas that both believe to hold an upload: what is published is one's bytes whole, or nothing."""
    first = again()
    if first.exclusive:
        return  # the lock above keeps the second one out
    base, mine, theirs = os.urandom(6 * MIB), os.urandom(6 * MIB), os.urandom(6 * MIB)
    writer = first.writer("upload-0001")
    writer.write(base)
    writer.sync()
    state = writer.state()
    writer.close()
    a, b = first.writer("upload-0001", offset=len(base), state=state), again().writer("upload-0001", offset=len(base), state=state)
    a.write(mine)
    b.write(theirs)
    for writer, raw in ((a, mine), (b, theirs)):
        try:
            assert whole(first.open(writer.publish(digest_of(base + raw)))) == base + raw
        except AirlockError:
            continue
    for location, _ in first.walk():
        assert digest_of(whole(first.open(location))) == first.digest_of(location)


def test_walk_goes_on_behind_a_location(store: BlobStore) -> None:
    for i in range(24):
        keep(store, f"upload-{i:04}", str(i).encode() if i % 6 else os.urandom(6 * MIB), generation=i % 3)
    everything = list(store.walk())
    assert everything == sorted(everything) and len(everything) == 24
    for i in (0, 11, 23):
        assert list(store.walk(everything[i][0])) == everything[i + 1 :]


def test_a_walk_passes_over_what_goes_meanwhile(store: BlobStore) -> None:
    raw = os.urandom(1000)
    places = [keep(store, f"upload-000{i}", raw, generation=i) for i in range(3)]  # of one digest, and so side by side
    walk = store.walk()
    assert next(walk) == (places[0], 1000)
    store.delete(places[1])
    store.delete(places[2])
    assert [place for place, _ in walk if store.stat(place) is not None] == []
    assert list(store.walk()) == [(places[0], 1000)]


class Ending:
    """Uploads that are kept (or none of them); each is at its end, published or discarded, in the moment between being found and being judged."""

    def __init__(self, writers: dict[str, BlobWriter], raw: bytes, kept: bool = False) -> None:
        self.writers, self.raw, self.kept = writers, raw, kept

    def __contains__(self, upload_id: object) -> bool:
        writer = self.writers.pop(str(upload_id), None)
        if writer is not None and len(self.writers) % 2:
            writer.publish(digest_of(self.raw), len(self.writers))
        elif writer is not None:
            writer.discard()
        return self.kept

    def __iter__(self) -> Iterator[str]:
        return iter(())

    def __len__(self) -> int:
        return 0


def test_a_sweep_passes_over_uploads_that_end_meanwhile(store: BlobStore) -> None:
    """Found by the soak: a collection failed where an upload was published between the sweep's look at the folder and its look at the file."""
    raw, writers = os.urandom(1000), {}
    for i in range(4):
        writers[f"upload-000{i}"] = store.writer(f"upload-000{i}")
        writers[f"upload-000{i}"].write(raw)
        writers[f"upload-000{i}"].sync()
    store.sweep(Ending(writers, raw), time.time() + 60)
    assert len(list(store.walk())) == 2 and store.sweep((), time.time() + 60) == 0
    for place, size in store.walk():
        assert size == 1000 and whole(store.open(place)) == raw


def test_a_sweep_passes_over_kept_uploads_that_end_meanwhile(store: BlobStore) -> None:
    """Each was announced by its digest and has sent parts: on S3 a note tells whose they are, and goes with the upload."""
    raws = [os.urandom(SEVERAL_PARTS) for _ in range(2)]
    writers: dict[str, BlobWriter] = {}
    for i, raw in enumerate(raws):
        writers[f"upload-000{i}"] = store.writer(f"upload-000{i}", digest_of(raw))
        writers[f"upload-000{i}"].write(raw)
    assert store.sweep(Ending(writers, raws[0], kept=True), time.time() + 60) == 0 and not writers
    assert {store.digest_of(place) for place, _ in store.walk()} == {digest_of(raws[0])}


@pytest.mark.parametrize("size", [1000, SEVERAL_PARTS])
def test_a_late_delete_never_hits_a_new_generation(store: BlobStore, size: int) -> None:
    raw = os.urandom(size)
    old = keep(store, "upload-0001", raw)
    new = keep(store, "upload-0002", raw, generation=1)
    assert old != new and whole(store.open(new)) == raw
    store.delete(old)
    assert whole(store.open(new)) == raw and list(store.walk()) == [(new, size)]


@pytest.mark.parametrize("hinted", [False, True])
def test_a_new_generation_of_parts(store: BlobStore, hinted: bool) -> None:
    raw = os.urandom(SEVERAL_PARTS)
    writer = store.writer("upload-0001", digest_of(raw) if hinted else None)
    writer.write(raw)
    location = writer.publish(digest_of(raw), 2)
    store.delete(store.location(digest_of(raw)))  # the delayed delete of generation 0
    assert ".g2" in location and whole(store.open(location)) == raw


def test_sweep_takes_what_no_upload_owns_and_is_old(store: BlobStore, again: Open) -> None:
    public = [keep(store, f"upload-000{n}", os.urandom(size)) for n, size in enumerate((10, SEVERAL_PARTS))]
    raw = os.urandom(SEVERAL_PARTS)
    states = {}
    for upload, hint in (
        ("upload-gone", None),
        ("upload-hint", digest_of(b"what nobody finished")),
        ("upload-kept", None),
        ("upload-khin", digest_of(raw)),
    ):
        writer = store.writer(upload, hint)
        writer.write(raw)
        writer.sync()
        states[upload] = writer.state()
        writer.close()
    kept = ("upload-kept", "upload-khin")
    assert again().sweep((), time.time() - 3600) == 0  # too young
    assert again().sweep(kept, time.time() + 60) >= 2
    assert again().sweep(kept, time.time() + 60) == 0
    for upload in ("upload-gone", "upload-hint"):
        with pytest.raises(Mismatch):
            store.writer(upload, offset=len(raw), state=states[upload])
    made = {store.writer(upload, offset=len(raw), state=states[upload]).publish(digest_of(raw)) for upload in reversed(kept)}
    assert len(made) == 1 and [found for found, _ in store.walk()] == sorted([*public, *made])
    assert store.sweep((), time.time() + 60) == 0


_KILLED = """
import os, sys
from dataclasses import replace
from pathlib import Path
from registry.wiring import open_blobs
store = open_blobs(sys.argv[1], Path(sys.argv[2]))
if hasattr(store, "options"):
    store.options = replace(store.options, steps=((1 << 62, 5 * 1024 * 1024),))
w = store.writer("upload-0001"); w.write(b"a" * 6_000_000); w.sync(); print(w.state().hex(), flush=True)
w.write(b"b" * 6_000_000); os.kill(os.getpid(), 9)
"""


def test_a_killed_writer_leaves_what_was_synced(store: BlobStore, again: Open, tmp_path: Path) -> None:
    options = getattr(store, "options", None)
    where = (
        "file:"
        if options is None
        else (f"s3://{options.bucket}/{options.prefix}?endpoint={options.endpoint}&ca={options.ca}&credentials={options.credentials}")
    )
    done = subprocess.run([sys.executable, "-c", _KILLED, where, str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert done.returncode == -9, done.stderr
    assert list(store.walk()) == []
    writer = again().writer("upload-0001", offset=6_000_000, state=bytes.fromhex(done.stdout.strip()))
    writer.write(b"c")
    assert whole(store.open(writer.publish(digest_of(b"a" * 6_000_000 + b"c")))) == b"a" * 6_000_000 + b"c"
    assert store.sweep((), time.time() + 60) == 0


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.integers(1, MIB), min_size=1, max_size=9), st.integers(0, 8), st.randoms(use_true_random=False))
def test_any_pieces_give_the_same_object(again: Open, sizes: list[int], cut: int, rng: object) -> None:
    pieces = [os.urandom(size) for size in sizes]
    raw = b"".join(pieces)
    store = again()
    upload = f"upload-{os.urandom(8).hex()}"
    writer = store.writer(upload)
    for number, piece in enumerate(pieces):
        if number == cut:
            writer.sync()
            state, offset = writer.state(), writer.offset
            writer.close()
            writer = again().writer(upload, offset=offset, state=state)
        writer.write(piece)
    assert writer.offset == len(raw)
    location = writer.publish(digest_of(raw))
    assert whole(store.open(location)) == raw
    store.delete(location)


# ---- what only a directory has


@pytest.fixture
def folder(tmp_path: Path) -> BlobStore:
    return class_of("file")(tmp_path)  # type: ignore[call-arg]


def test_bytes_behind_the_durable_offset_are_dropped_at_the_next_write(folder: BlobStore) -> None:
    writer = folder.writer("upload-0001")
    writer.write(b"durable and then lost")
    writer.close()
    stale = folder.writer("upload-0001", offset=7)
    stale.close()  # opened with an outdated row and let go: harms nothing
    assert folder.writer("upload-0001", offset=21) is not None


def test_dropped_bytes_do_not_reach_the_object(folder: BlobStore) -> None:
    writer = folder.writer("upload-0001")
    writer.write(b"durable and then lost")
    writer.close()
    writer = folder.writer("upload-0001", offset=7)
    location = writer.publish(digest_of(b"durable"))
    assert whole(folder.open(location)) == b"durable" and folder.stat(location) == 7


def test_public_files_are_read_only(folder: BlobStore) -> None:
    path = folder.open(keep(folder, "upload-0001", b"abc")).path
    assert path is not None and path.stat().st_mode & 0o777 == 0o444


FULL_DISK = """
import os, sys
from pathlib import Path
from artifact.errors import Unavailable
from artifact.manifest import digest_of
from registry.blobs.file import FileBlobs

root, raw = Path(sys.argv[1]), b"x" * 100000
store = FileBlobs(root)

def fill(writer):
    try:
        for _ in range(1000):
            writer.write(raw)
    except Unavailable as error:
        print(error.reason, writer.offset)
    free = os.statvfs(root).f_bavail * os.statvfs(root).f_frsize
    print(len(list((root / "partial").iterdir())), free > 3_000_000)

first = store.writer("upload-0001")
fill(first)  # nothing of it was ever acknowledged: nothing stays
for use in (first.sync, lambda: first.write(b"x"), lambda: first.publish(digest_of(b""))):
    try:
        use()
    except Unavailable as error:
        print(error.reason)
first.close()
second = store.writer("upload-0002")
second.write(raw * 2)
second.sync()
state = second.state()
fill(second)  # what was acknowledged stays, and goes on
second.close()
second = store.writer("upload-0002", offset=200000, state=state)
second.write(raw)
place = second.publish(digest_of(raw * 3))
print(store.stat(place))
disk = os.statvfs(root)
(root / "filler").write_bytes(b"f" * (disk.f_bavail * disk.f_frsize - 50000))
third = store.writer("upload-0003")
try:
    third.write(b"y")
except Unavailable as error:
    print(error.reason)  # the rest is the database's
store.delete(place)
print(store.stat(place))
"""


def test_a_full_disk_frees_what_nobody_was_told_of_and_keeps_a_reserve(tmp_path: Path) -> None:
    if not shutil.which("unshare"):
        missing("unshare")
    shell = 'mount -t tmpfs -o size=4m none "$1" && exec "$2" -c "$3" "$1"'
    argv = ["unshare", "-Urm", "sh", "-c", shell, "sh", str(tmp_path), sys.executable, FULL_DISK]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, cwd=Path(__file__).parents[2])
    if "unshare" in done.stderr or "mount:" in done.stderr:
        missing(f"a user namespace with a file system of its own ({done.stderr.strip()[:80]})")
    told = ["disk_full 0", "0 True", *["disk_full"] * 3, "disk_full 200000", "1 True", "300000", "disk_full", "None"]
    assert done.stdout.splitlines()[1:] == told[1:] and done.stdout.startswith("disk_full "), done.stderr
    assert Unavailable.code == "unavailable"
