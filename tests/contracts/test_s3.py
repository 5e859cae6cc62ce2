"""What only S3 has, on a real gateway: faults of the network, credentials, the probe, large objects; the contract itself is test_blobstore.py."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from artifact.errors import Mismatch, NotFound, Unavailable
from artifact.manifest import digest_of
from registry.blobs.s3 import S3Blobs, open_blobs
from registry.bucket import GIB, MIB, Options
from tests.contracts.stores import credentials, s3_store, s3_url, whole
from tests.fakes.unsteady import Unsteady
from tests.services import rgw

pytestmark = pytest.mark.server
PARTS = os.urandom(12 * MIB)


@pytest.fixture
def proxy() -> Iterator[Unsteady]:
    """A network between the store and the gateway that a test can disturb."""
    made = Unsteady(rgw.shared().port)
    yield made
    made.close()


@pytest.fixture
def store(proxy: Unsteady, tmp_path: Path) -> S3Blobs:
    return s3_store(s3_url(tmp_path, endpoint=proxy.url), tmp_path, read_s=5.0)


def uploads(store: S3Blobs) -> list[Any]:
    """Unfinished multipart uploads, as the server itself tells them."""
    return list(rgw.shared().client().list_multipart_uploads(Bucket=store.options.bucket).get("Uploads", ()))


def keys(store: S3Blobs) -> list[str]:
    found = rgw.shared().client().list_objects_v2(Bucket=store.options.bucket).get("Contents", ())
    return [item["Key"] for item in found]


# ---- faults


@pytest.mark.parametrize("kind", ["lose_request", "lose_answer", "busy", "half", "flip"])
@pytest.mark.parametrize("match", ["POST .*uploads$", "PUT .*partNumber=1", "PUT .*partNumber=3", "POST .*uploadId", "PUT .*pointers", "PUT .*blobs"])
def test_one_fault_is_passed_over(store: S3Blobs, proxy: Unsteady, kind: str, match: str) -> None:
    proxy.plan(kind, match)
    raw = PARTS if "blobs" not in match else PARTS[:1000]
    writer = store.writer("upload-0001")
    writer.write(raw)
    location = writer.publish(digest_of(raw))
    assert whole(store.open(location)) == raw and list(store.walk()) == [(location, len(raw))]
    store.sweep((), time.time() + 60)  # a lost answer to "begin a multipart upload" leaves one that nobody knows
    assert uploads(store) == []


@pytest.mark.parametrize("kind", ["lose_request", "lose_answer", "busy", "half"])
def test_one_fault_while_reading(store: S3Blobs, proxy: Unsteady, kind: str) -> None:
    writer = store.writer("upload-0001")
    writer.write(PARTS)
    location = writer.publish(digest_of(PARTS))
    for match in ("HEAD", "GET", "list-type"):
        proxy.plan(kind, match)
        assert whole(store.open(location, 3, 5 * MIB)) == PARTS[3 : 5 * MIB] and len(list(store.walk())) == 1
        assert proxy.count(match) >= 2


def test_answers_that_are_always_cut_off_are_told(store: S3Blobs, proxy: Unsteady) -> None:
    store.options = replace(store.options, tries=2)
    writer = store.writer("upload-0001")
    writer.write(PARTS)
    location = writer.publish(digest_of(PARTS))
    content = store.open(location)
    proxy.plan("half", "GET", 1000)
    for use in (lambda: whole(content), lambda: list(store.walk())):
        with pytest.raises(Unavailable) as told:
            use()
        assert told.value.reason == "s3_connection" and proxy.count("GET") >= 2


@pytest.mark.parametrize(("kind", "reason"), [("lose_request", "s3_connection"), ("busy", "s3_busy"), ("hang", "s3_timeout")])
def test_a_lasting_fault_is_told_and_the_upload_goes_on_after_it(store: S3Blobs, proxy: Unsteady, kind: str, reason: str) -> None:
    store.options = replace(store.options, tries=2)
    writer = store.writer("upload-0001")
    writer.write(PARTS[: 6 * MIB])
    writer.sync()
    state = writer.state()
    proxy.plan(kind, "PUT", 1000)
    with pytest.raises(Unavailable) as told:
        writer.write(PARTS[6 * MIB :])
        writer.publish(digest_of(PARTS))
    assert told.value.reason == reason and told.value.do and len(told.value.what) > 20
    writer.close()
    assert list(store.walk()) == []
    proxy.faults.clear()
    writer = store.writer("upload-0001", offset=6 * MIB, state=state)
    writer.write(PARTS[6 * MIB :])
    assert whole(store.open(writer.publish(digest_of(PARTS)))) == PARTS
    store.sweep((), time.time() + 60)
    assert uploads(store) == []


def test_a_part_that_arrives_altered_is_sent_again_and_never_kept(store: S3Blobs, proxy: Unsteady) -> None:
    proxy.plan("flip", "partNumber=1", 1000)
    writer = store.writer("upload-0001")
    with pytest.raises(Unavailable) as told:
        writer.write(PARTS)
    assert told.value.reason == "s3_corrupt" and proxy.count("PUT .*partNumber=1") == store.options.tries
    assert uploads(store) == [] and keys(store) == []
    for use in (lambda: writer.write(b"x"), writer.sync, lambda: writer.publish(digest_of(b"x"))):
        with pytest.raises(NotFound):
            use()


def test_what_fails_after_the_object_is_public_is_no_failure(store: S3Blobs, proxy: Unsteady) -> None:
    store.options = replace(store.options, tries=2)
    for upload in ("upload-0001", "upload-0002"):  # the second finds the first's object
        writer = store.writer(upload)
        writer.write(PARTS)
        proxy.plan("busy", "DELETE|prefix=.*partial", 1000)
        location = writer.publish(digest_of(PARTS))
        proxy.faults.clear()
        assert whole(store.open(location)) == PARTS and [found for found, _ in store.walk()] == [location]
    store.sweep((), time.time() + 60)
    assert uploads(store) == [] and whole(store.open(location)) == PARTS and len(keys(store)) == 2  # the object and its pointer


def test_a_second_try_finds_what_the_first_made_public(store: S3Blobs, proxy: Unsteady) -> None:
    """The answer of Complete is lost more often than is tried: the upload goes on where it stood and finds its own object."""
    store.options = replace(store.options, tries=1)
    writer = store.writer("upload-0001")
    writer.write(PARTS)
    writer.sync()
    state = writer.state()
    proxy.plan("lose_answer", "POST .*uploadId")
    with pytest.raises(Unavailable):
        writer.publish(digest_of(PARTS))
    writer.close()
    writer = store.writer("upload-0001", offset=len(PARTS), state=state)
    assert whole(store.open(writer.publish(digest_of(PARTS)))) == PARTS and uploads(store) == []


def test_an_upload_that_somebody_ended_is_not_found(tmp_path: Path) -> None:
    store = s3_store(s3_url(tmp_path), tmp_path)
    writer = store.writer("upload-0001")
    writer.write(PARTS[: 6 * MIB])
    writer.sync()
    state = writer.state()
    store.discard("upload-0001")
    with pytest.raises(NotFound):
        writer.write(PARTS)
    with pytest.raises(Mismatch):
        store.writer("upload-0001", offset=6 * MIB, state=state)
    assert uploads(store) == []


def test_bytes_are_not_overwritten_by_an_announcement_that_lies(store: S3Blobs) -> None:
    digest = digest_of(PARTS)
    writer = store.writer("upload-0001", digest)
    writer.write(PARTS)
    location = writer.publish(digest)
    other = os.urandom(len(PARTS))
    liar = store.writer("upload-0002", digest)
    liar.write(other)
    with pytest.raises(Mismatch):
        liar.publish(digest_of(other))
    assert whole(store.open(location)) == PARTS and uploads(store) == []


# ---- who may, and where


def refused(url: str, folder: Path, **more: Any) -> Unavailable:
    with pytest.raises(Unavailable) as told:
        s3_store(url, folder, tries=1, **more).probe()
    assert rgw.SECRET not in str(told.value) and told.value.do
    return told.value


def test_what_is_wrong_with_the_place_is_told_apart(tmp_path: Path) -> None:
    url = s3_url(tmp_path)
    bucket = url.split("/")[2]
    other = tmp_path / "other"
    other.mkdir()
    wrong = f"&credentials={credentials(other, secret='wrong')}"
    right = f"&credentials={tmp_path / 'credentials.ini'}"
    plain = url.replace(right, "")
    port = Unsteady(1)
    port.close()
    tls, known = rgw.shared().https, f"&ca={rgw.shared().ca}"
    assert "credentials refused" in refused(plain + wrong, tmp_path).what
    assert refused(url.replace(bucket, "nosuchbucket"), tmp_path).reason == "s3_bucket"
    assert refused(url.replace(rgw.shared().http, "http://no-such-host.invalid"), tmp_path).reason == "s3_dns"
    assert refused(url.replace(rgw.shared().http, port.url), tmp_path).reason == "s3_connection"
    assert refused(url.replace(rgw.shared().http, tls).replace(known, ""), tmp_path).reason == "s3_tls"


def test_a_wrong_secret_is_never_taken_for_an_absent_object(tmp_path: Path) -> None:
    store = s3_store(s3_url(tmp_path), tmp_path)
    credentials(tmp_path, secret="wrong")
    for use in (lambda: store.stat(store.location(digest_of(b""))), lambda: list(store.walk()), lambda: store.open(store.location(digest_of(b"")))):
        with pytest.raises(Unavailable) as told:
            use()
        assert told.value.reason == "s3_credentials"


def test_credentials_change_under_a_running_store(tmp_path: Path) -> None:
    store = s3_store(s3_url(tmp_path), tmp_path)
    writer = store.writer("upload-0001")
    writer.write(b"abc")
    location = writer.publish(digest_of(b"abc"))
    before = str(store.url(location, 60, ""))
    access = f"rotated{os.urandom(4).hex()}"
    rgw.shared().add_key(access, "anothersecret")
    credentials(tmp_path, access, "anothersecret")
    assert store.stat(location) == 3
    assert access in str(store.url(location, 60, "")) and access not in before
    (tmp_path / "credentials.ini").write_text("[defa")  # half written: the pair that worked goes on
    assert store.stat(location) == 3
    (tmp_path / "credentials.ini").unlink()
    assert store.stat(location) == 3
    credentials(tmp_path)
    assert store.stat(location) == 3


def test_checksums_of_the_sdk_are_named_when_the_server_has_none(tmp_path: Path) -> None:
    url = s3_url(tmp_path, tls=True, checksums="on")
    store = s3_store(url, tmp_path)
    with pytest.raises(Unavailable) as told:
        store.probe()
    assert "checksums unsupported" in told.value.what and "checksums=on" in told.value.do
    assert keys(store) == [] and uploads(store) == []


def test_the_probe_tells_what_this_server_can_do(tmp_path: Path) -> None:
    for tls in (False, True):
        store = s3_store(s3_url(tmp_path, tls=tls), tmp_path)
        found = store.probe()
        assert found["altered_bytes_refused"] == "XAmzContentSHA256Mismatch" and found["conditional_put"] is True
        assert keys(store) == [] and uploads(store) == []


# ---- size


@pytest.mark.parametrize("tls", [False, True])
def test_the_driver_as_operators_get_it(tmp_path: Path, tls: bool) -> None:
    """The default part sizes and options, 3 MiB and 100 MiB, each within the memory that parts may take."""
    store = open_blobs(s3_url(tmp_path, tls=tls), tmp_path)
    for size in (3 * MIB, 100 * MIB):
        raw = os.urandom(MIB) * (size // MIB)
        writer = store.writer(f"upload-{size}")
        for lo in range(0, size, 256 * 1024):
            writer.write(memoryview(raw)[lo : lo + 256 * 1024])
        assert digest_of(whole(store.open(writer.publish(digest_of(raw))))) == digest_of(raw)
    assert store.memory.used == 0


def test_a_copy_larger_than_one_request_may_copy(tmp_path: Path) -> None:
    store = s3_store(s3_url(tmp_path), tmp_path, copy_limit=6 * MIB)
    writer = store.writer("upload-0001", digest_of(PARTS))
    writer.write(PARTS)
    assert whole(store.open(writer.publish(digest_of(PARTS), 1))) == PARTS and uploads(store) == []


def test_tails_go_to_disk_when_memory_is_in_use(tmp_path: Path) -> None:
    store = s3_store(s3_url(tmp_path), tmp_path)
    store.memory.total = 7 * MIB
    writers = [store.writer(f"upload-000{n}") for n in range(4)]
    for lo in range(0, len(PARTS), MIB):
        for writer in writers:
            writer.write(PARTS[lo : lo + MIB])
        assert store.memory.used <= store.memory.total
    assert {writer.publish(digest_of(PARTS)) for writer in writers} == {location for location, _ in store.walk()}
    assert store.memory.used == 0


def test_a_spool_that_fails_is_told_and_nothing_is_lost(tmp_path: Path) -> None:
    store = s3_store(s3_url(tmp_path), tmp_path)
    writer = store.writer("upload-0001")
    writer.write(b"a" * 1000)
    store.memory.total = 1000
    shutil.rmtree(store.spool)
    with pytest.raises(Unavailable):
        writer.write(b"b" * 1000)
    assert writer.offset == 1000
    store.spool.mkdir()
    writer.write(b"b" * 1000)
    assert whole(store.open(writer.publish(digest_of(b"a" * 1000 + b"b" * 1000)))) == b"a" * 1000 + b"b" * 1000


_LARGE = """
import hashlib, os, re, sys, time
from pathlib import Path
from dataclasses import replace
from registry.blobs.s3 import S3Blobs
from registry.bucket import Options, MIB
store = S3Blobs(replace(Options.parse(sys.argv[1]), steps=((1 << 62, 5 * MIB),)), Path(sys.argv[2]))
total, block, hasher = 5 * 1024 * MIB + 77 * MIB + 3, os.urandom(MIB), hashlib.sha256()
writer, left, began, state = store.writer("upload-0001"), total, time.monotonic(), b""
while left:
    piece = memoryview(block)[: min(left, MIB)]
    writer.write(piece); hasher.update(piece); left -= len(piece)
    if left and left // MIB % 1000 == 0:
        writer.sync(); state, offset = writer.state(), writer.offset; writer.close()
        writer = store.writer("upload-0001", offset=offset, state=state)
parts = len(writer._parts)
location = writer.publish("sha256:" + hasher.hexdigest())
back = hashlib.sha256()
for piece in store.open(location).chunks:
    back.update(piece)
print(parts, store.stat(location) == total, back.hexdigest() == hasher.hexdigest(), len(state),
      int(re.search("VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) // 1024, round(time.monotonic() - began))
"""


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_more_than_5_gib_in_more_than_1000_parts_in_little_memory(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", _LARGE, s3_url(tmp_path), str(tmp_path)], capture_output=True, text=True, timeout=1700)
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    parts, stored, same, state, peak, _seconds = done.stdout.split()
    assert int(parts) > 1000 and (stored, same) == ("True", "True")
    assert int(state) < 65536 and int(peak) < 200


def test_hash_and_sizes_are_ours(tmp_path: Path) -> None:
    """An ETag of a joined object is no digest, and Complete may tell none: the location holds our SHA-256 only."""
    store = s3_store(s3_url(tmp_path), tmp_path)
    writer = store.writer("upload-0001")
    writer.write(PARTS)
    location = writer.publish(digest_of(PARTS))
    assert hashlib.sha256(PARTS).hexdigest() in location and store.digest_of(location) == digest_of(PARTS)
    assert Options.parse(s3_url(tmp_path)).copy_limit == 5 * GIB
