"""The registry client against real sockets: authentication, redirects, ranges, errors as they are told, uploads."""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Iterator

import pytest

from artifact.errors import (
    AirlockError,
    Conflict,
    Denied,
    Invalid,
    Mismatch,
    NotFound,
    RangeInvalid,
    TooLarge,
    Unauthenticated,
    Unavailable,
    Unsupported,
)
from artifact.manifest import MANIFEST, digest_of
from artifact.remote import NOBODY_CALL, RemoteRegistry, stored
from artifact.transport import clean, origin
from tests.fakes.blobhost import BlobHost

KEY = "nvapi-" + "k" * 43
IMAGE = {"schemaVersion": 2, "mediaType": MANIFEST, "config": {"mediaType": "a/b", "digest": "sha256:" + "0" * 64, "size": 2}, "layers": []}


@pytest.fixture
def host() -> Iterator[BlobHost]:
    server = BlobHost()
    yield server
    server.close()


def joined(parts: Iterator[bytes]) -> bytes:
    return b"".join(parts)


def test_ranges(host: BlobHost) -> None:
    data = os.urandom(3_000_000)
    digest = host.add(data)
    remote = RemoteRegistry(host.url)
    assert remote.blob_size("a/b", digest) == len(data)
    assert joined(remote.stream("a/b", digest, 0, len(data))) == data
    assert joined(remote.stream("a/b", digest, 7, 2_000_001)) == data[7:2_000_001]
    assert joined(remote.stream("a/b", digest, 5, 5)) == b""
    content = remote.read(NOBODY_CALL, "a/b", digest, 10, 20)
    assert content.chunks is not None
    assert joined(content.chunks) == data[10:20]
    with pytest.raises(RangeInvalid):
        remote.read(NOBODY_CALL, "a/b", digest, 10, len(data) + 1)
    assert remote.blob_size("a/b", "sha256:" + "1" * 64) is None
    with pytest.raises(NotFound):
        joined(remote.stream("a/b", "sha256:" + "1" * 64, 0, 1))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "error", "reason"),
    [
        ("whole", Unsupported, "range_ignored"),
        ("wrong_range", Unavailable, "range"),
        ("cut", Unavailable, "connection"),
        ("short", Unavailable, "short_body"),
        ("503", Unavailable, "unavailable"),
    ],
)
def test_faults_of_a_range(host: BlobHost, fault: str, error: type[AirlockError], reason: str) -> None:
    digest = host.add(os.urandom(1_000_000))
    host.faults = [fault]
    with pytest.raises(error) as caught:
        joined(RemoteRegistry(host.url).stream("a/b", digest, 10, 900_000))
    assert caught.value.reason == reason


def test_a_whole_answer_to_a_whole_range_is_taken(host: BlobHost) -> None:
    data = os.urandom(1000)
    digest = host.add(data)
    host.faults = ["whole"]
    assert joined(RemoteRegistry(host.url).stream("a/b", digest, 0, 1000)) == data


@pytest.mark.slow
def test_a_manifest_is_named_by_its_bytes(host: BlobHost) -> None:
    digest = host.manifest("a/b", IMAGE, "1")
    remote = RemoteRegistry(host.url)
    found, raw = remote.read_manifest("a/b", "1")
    assert (found.digest, found.size, found.media_type) == (digest, len(raw), MANIFEST)
    assert remote.resolve(NOBODY_CALL, "a/b", digest).digest == digest
    host.manifests[("a/b", digest)] = (MANIFEST, raw + b" ")
    with pytest.raises(Mismatch):
        remote.read_manifest("a/b", digest)
    with pytest.raises(NotFound):
        remote.resolve(NOBODY_CALL, "a/b", "absent")
    host.manifests[("a/b", "big")] = (MANIFEST, b" " * (4 * 1024 * 1024 + 1))
    with pytest.raises(TooLarge):
        remote.read_manifest("a/b", "big")
    for hostile in (b"[]", b"\xff", b'{"schemaVersion":2,"mediaType":7}', b"{" * 1000):
        host.manifests[("a/b", "bad")] = (MANIFEST, hostile)
        with pytest.raises(Invalid):
            remote.read_manifest("a/b", "bad")


def test_names_never_become_other_paths(host: BlobHost) -> None:
    remote = RemoteRegistry(host.url)
    for repo, ref in (("a/../b", "1"), ("a", "1/../2"), ("a?x", "1"), ("a", "x?y"), ("A", "1"), ("a", ""), ("v2/x", "1")):
        with pytest.raises(Invalid):
            remote.read_manifest(repo, ref)
    assert host.log == []


def test_keys_are_sent_as_basic_and_refusals_keep_their_reason() -> None:
    host = BlobHost(key=KEY)
    digest = host.add(b"x")
    assert RemoteRegistry(host.url, KEY).blob_size("a/b", digest) == 1
    for key in ("", "nvapi-" + "w" * 43):
        with pytest.raises(Unauthenticated, match="expired on 2026-01-01") as caught:
            joined(RemoteRegistry(host.url, key).stream("a/b", digest, 0, 1))
        assert caught.value.reason == "key_expired"
        assert not key or key not in json.dumps(caught.value.as_dict())
    host.close()


@pytest.mark.slow
def test_the_token_of_nvcr_io() -> None:
    host = BlobHost(key=KEY, token="t" * 20)
    digest = host.add(b"xyz")
    remote = RemoteRegistry(host.url, KEY)
    for _ in range(3):
        assert joined(remote.stream("a/b", digest, 0, 3)) == b"xyz"
    asked = [path for _, path, _, _ in host.log if path.startswith("/proxy_auth")]
    assert len(asked) == 1
    assert "scope=repository%3Aa%2Fb%3Apull" in asked[0]
    host.token = "u" * 20  # expired: the same realm again
    assert joined(remote.stream("a/b", digest, 0, 3)) == b"xyz"
    with pytest.raises(Unauthenticated):
        joined(RemoteRegistry(host.url, "nvapi-" + "w" * 43).stream("a/b", digest, 0, 3))
    host.close()


def test_a_realm_elsewhere_gets_no_key() -> None:
    thief = BlobHost()
    host = BlobHost(key=KEY, token="t", realm=f"{thief.url}/proxy_auth")
    with pytest.raises(Unsupported) as caught:
        RemoteRegistry(host.url, KEY).blob_size("a/b", host.add(b"x"))
    assert caught.value.reason == "realm"
    assert thief.log == []
    host.close()
    thief.close()


def test_a_redirect_to_another_host_gets_no_key() -> None:
    other, host = BlobHost(), BlobHost(key=KEY)
    data = os.urandom(100_000)
    digest = host.add(data)
    other.add(data)
    host.redirect = other.url
    assert joined(RemoteRegistry(host.url, KEY).stream("a/b", digest, 5, 90_000)) == data[5:90_000]
    assert other.log[0][3] == ""
    assert other.log[0][2] == "bytes=5-89999"
    host.close()
    other.close()


def test_redirects_end(host: BlobHost) -> None:
    digest = host.add(b"x")
    host.redirect = f"{host.url}/v2/a/b/blobs/{digest}?"
    with pytest.raises(Unsupported, match="redirects"):
        joined(RemoteRegistry(host.url).stream("a/b", digest, 0, 1))
    assert len(host.log) == 6


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (400, Invalid),
        (401, Unauthenticated),
        (402, Denied),
        (403, Denied),
        (404, NotFound),
        (405, Unsupported),
        (409, Conflict),
        (429, Unavailable),
        (500, Unavailable),
    ],
)
@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"<html>",
        b"\x00\xff",
        b"[" * 10_000,
        b'{"errors":7}',
        b'{"errors":[7]}',
        b'{"errors":[{"code":["x"],"message":{}}]}',
        b'{"error":"denied","what":"no\\u001b[31m grant","reason":"no_grant","do":"ask"}',
    ],
)
def test_every_status_has_one_error(status: int, error: type[AirlockError], body: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            peer, _ = server.accept()
            with peer:
                peer.recv(65_536)
                peer.sendall(f"HTTP/1.1 {status} X\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body)

        thread = threading.Thread(target=serve)
        thread.start()
        with pytest.raises(error) as caught:
            RemoteRegistry(f"http://127.0.0.1:{server.getsockname()[1]}", KEY).api("GET", "/airlock/v1/whoami")
        thread.join()
    assert str(status) in caught.value.what
    assert "\x1b" not in str(caught.value)
    if b"no_grant" in body:
        assert (caught.value.reason, caught.value.do) == ("no_grant", "ask")


def test_nobody_there() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(Unavailable, match="refuses the connection"):
        RemoteRegistry(f"http://127.0.0.1:{port}", KEY, timeout_s=2).blob_size("a/b", "sha256:" + "0" * 64)


@pytest.mark.parametrize("url", ["ftp://x", "x", "http://", "http://u:p@h", "http://h?x=1", "http://[", "http://h:99999999"])
def test_urls_that_are_none(url: str) -> None:
    with pytest.raises(Invalid):
        RemoteRegistry(url)


def test_an_upload_and_a_manifest(host: BlobHost) -> None:
    data = os.urandom(200_000)
    digest = digest_of(data)
    remote = RemoteRegistry(host.url)
    upload = remote.upload(NOBODY_CALL, "a/b")
    upload.write(data[:100_000])
    again = remote.resume(NOBODY_CALL, "a/b", upload.id)
    assert again.offset == 100_000
    again.write(memoryview(data)[100_000:])
    with pytest.raises(RangeInvalid):
        upload.write(b"x")  # another writer is further
    assert again.commit(digest).digest == digest
    assert host.blobs[digest] == data
    with pytest.raises(NotFound):
        remote.resume(NOBODY_CALL, "a/b", upload.id)
    wrong = remote.upload(NOBODY_CALL, "a/b")
    with pytest.raises(Mismatch):
        wrong.commit(digest, 1, b"x")
    raw = json.dumps(IMAGE).encode()
    pushed = remote.push(NOBODY_CALL, "a/b", raw, MANIFEST, refs=("1", "2"))
    assert host.manifests[("a/b", "2")] == (MANIFEST, raw)
    assert remote.resolve(NOBODY_CALL, "a/b", "1").digest == pushed.digest


@pytest.mark.parametrize("key", ["nvapi-é", "nvapi-a\r\nX: y", "a b", "\x00"])
def test_keys_that_are_none_are_not_sent_and_not_shown(key: str) -> None:
    with pytest.raises(Unauthenticated) as caught:
        RemoteRegistry("http://127.0.0.1:1", key)
    assert key not in str(caught.value)


@pytest.mark.parametrize("place", ["http://[", "http://h:x/", "file:///etc/passwd", "https://127.0.0.2/", "//evil/x"])
def test_a_hostile_location(place: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            for status in (202, 307):
                peer, _ = server.accept()
                with peer:
                    peer.recv(65_536)
                    peer.sendall(f"HTTP/1.1 {status} X\r\nLocation: {place}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".encode())

        thread = threading.Thread(target=serve)
        thread.start()
        remote = RemoteRegistry(f"http://127.0.0.1:{server.getsockname()[1]}", KEY, timeout_s=2)
        with pytest.raises((Invalid, Unsupported)):
            remote.upload(NOBODY_CALL, "a/b")
        with pytest.raises((Invalid, Unsupported, Unavailable)):
            joined(remote.stream("a/b", "sha256:" + "0" * 64, 0, 1))
        thread.join()


def test_small_parsers() -> None:
    assert [stored({"Range": r}) for r in ("0-0", "", "0-9", "bytes=0-9", "5-9", "x")] == [0, 0, 10, 10, 0, 0]
    assert origin("https://h") == ("https", "h", 443)
    assert clean("a\r\nb\x1b[0m") == "a  b [0m"
