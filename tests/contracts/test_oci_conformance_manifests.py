"""The facts of the public OCI conformance suite on manifests: byte for byte, of every shape, with the tag parameters of its next version; auth on."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any

import pytest

from tests.contracts.oci_client import ALGORITHMS, CONFIG, EMPTY, IMAGE, INDEX, LAYER, Client, Reply, descriptor, digest, image, index

pytestmark = [pytest.mark.server, pytest.mark.timeout(300)]
DOCKER = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_LIST = "application/vnd.docker.distribution.manifest.list.v2+json"
DOCKER_CONFIG = "application/vnd.docker.container.image.v1+json"
DOCKER_LAYER = "application/vnd.docker.image.rootfs.diff.tar.gzip"
FOREIGN = [f"application/vnd.oci.image.layer.nondistributable.v1.tar{z}" for z in ("", "+gzip", "+zstd")]
FOREIGN.append("application/vnd.docker.image.rootfs.foreign.diff.tar.gzip")


class Maker:
    """Pushes blobs and inner manifests into one repository under one algorithm and gives their descriptors."""

    def __init__(self, client: Client, repo: str, algorithm: str) -> None:
        self.client, self.repo, self.algorithm = client, repo, algorithm

    def blob(self, data: bytes, media_type: str = LAYER, /, **extra: Any) -> dict[str, Any]:
        self.client.blob(self.repo, data, self.algorithm)
        return descriptor(data, media_type, self.algorithm, **extra)

    def pushed(self, raw: bytes, media_type: str = IMAGE, **extra: Any) -> dict[str, Any]:
        self.client.put(self.repo, digest(raw, self.algorithm), raw, media_type)
        return descriptor(raw, media_type, self.algorithm, **extra)

    def image(self, *layers: bytes, **extra: Any) -> bytes:
        """An image whose blobs are there."""
        for data in (b'{"os":"linux"}', *layers):
            self.blob(data)
        return image(b'{"os":"linux"}', layers, self.algorithm, **extra)

    def empty(self) -> dict[str, Any]:
        return self.blob(b"{}", EMPTY)


Shape = Callable[[Maker], tuple[bytes, str]]


def _nested(m: Maker) -> bytes:
    inner = index([m.pushed(m.image(b"a"), platform={"os": "linux", "architecture": "amd64"})])
    return index([m.pushed(inner, INDEX), m.pushed(m.image(b"b"))])


def _docker(m: Maker) -> bytes:
    doc = {"schemaVersion": 2, "mediaType": DOCKER, "config": m.blob(b'{"a":1}', DOCKER_CONFIG), "layers": [m.blob(b"gz", DOCKER_LAYER)]}
    return json.dumps(doc, indent=3).encode()


def _docker_list(m: Maker) -> bytes:
    entry = m.pushed(_docker(m), DOCKER, platform={"architecture": "amd64", "os": "linux"})
    return json.dumps({"schemaVersion": 2, "mediaType": DOCKER_LIST, "manifests": [entry]}).encode()


def _untyped(m: Maker) -> bytes:
    doc = json.loads(m.image(b"untyped"))
    del doc["mediaType"]
    return json.dumps(doc).encode()


def _odd_bytes(m: Maker) -> bytes:
    """White space, escapes and key order that a re-serialisation would lose, and fields that nobody knows."""
    raw = m.image(b"odd", unknown={"z": [1.0, 1e3, None, "\u00e9"], "a": {"deep": [[]]}}, annotations={"k": "v", "": "empty key"})
    return b"\n  " + raw.replace(b'"k"', rb'"\u006b"') + b"\n\n"


SHAPES: dict[str, Shape] = {
    "image": lambda m: (m.image(b"layer one", b"layer two"), IMAGE),
    "uncompressed": lambda m: (m.image(os.urandom(5000)), IMAGE),
    "large": lambda m: (m.image(b"l", annotations={f"key{i:03}": "x" * 10_000 for i in range(390)}), IMAGE),
    "index": lambda m: (index([m.pushed(m.image(b"a")), m.pushed(m.image(b"b"))]), INDEX),
    "nested index": lambda m: (_nested(m), INDEX),
    "empty index": lambda m: (index([]), INDEX),
    "artifact": lambda m: (m.image(artifactType="application/vnd.example.a", config=m.empty(), layers=[m.blob(b"text", "text/plain")]), IMAGE),
    "artifact index": lambda m: (index([m.pushed(m.image(b"a"))], artifactType="application/vnd.example.list"), INDEX),
    "artifact without layers": lambda m: (m.image(artifactType="application/vnd.example.b", config=m.empty(), layers=[m.empty()]), IMAGE),
    "no layers": lambda m: (m.image(), IMAGE),
    "zero bytes": lambda m: (m.image(b""), IMAGE),
    "data field": lambda m: (m.image(layers=[m.blob(b"{}", EMPTY, data="e30=")], config=m.blob(b"{}", EMPTY, data="e30=")), IMAGE),
    "unknown fields": lambda m: (_odd_bytes(m), IMAGE),
    "the same layer twice": lambda m: (m.image(b"twice", b"twice"), IMAGE),
    "docker": lambda m: (_docker(m), DOCKER),
    "docker list": lambda m: (_docker_list(m), DOCKER_LIST),
    "subject": lambda m: (m.image(b"s", subject=m.pushed(m.image(b"the subject"))), IMAGE),
    "index with subject": lambda m: (index([m.pushed(m.image(b"s"))], subject=m.pushed(m.image(b"the subject"))), INDEX),
}


def check(client: Client, repo: str, ref: str, raw: bytes, media_type: str, name: str) -> None:
    """HEAD and GET of a manifest give exactly what was pushed."""
    for method, body in (("HEAD", b""), ("GET", raw)):
        found = client.manifest(repo, ref, method)
        assert (found.status, found.body == body, found.get("content-length")) == (200, True, str(len(raw))), (method, ref, found.status)
        assert (found.get("content-type"), found.get("docker-content-digest")) == (media_type, name)


def follow(client: Client, reply: Reply, raw: bytes, media_type: str) -> None:
    found = client.ask("GET", reply.get("location"))
    assert (found.status, found.body == raw, found.get("content-type"), found.get("content-length")) == (200, True, media_type, str(len(raw)))


# ---- 4.5


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape(client: Client, repo: str, shape: str, algorithm: str) -> None:
    raw, media_type = SHAPES[shape](Maker(client, repo, algorithm))
    assert shape != "large" or 3_900_000 < len(raw) < 4_194_304
    name = digest(raw, algorithm)
    done = client.put(repo, name, raw, media_type)
    assert done.get("docker-content-digest") in ("", name)
    follow(client, done, raw, media_type)
    check(client, repo, name, raw, media_type, name)
    done = client.put(repo, "tag", raw, media_type)
    follow(client, done, raw, media_type)
    subject = json.loads(raw).get("subject", {}).get("digest", "")
    assert done.get("oci-subject") == subject
    named = client.manifest(repo, "tag").get("docker-content-digest")
    assert named in {digest(raw, a) for a in ALGORITHMS}
    check(client, repo, "tag", raw, media_type, named)
    check(client, repo, name, raw, media_type, name)


@pytest.mark.parametrize("stated", [f"{IMAGE}; charset=utf-8", f"{IMAGE};a=b;c=d", f"  {IMAGE} "])
def test_parameters_of_the_type_are_ignored_and_not_sent_back(client: Client, repo: str, stated: str) -> None:
    raw = Maker(client, repo, "sha256").image(b"typed")
    reply = client.ask("PUT", f"/v2/{repo}/manifests/t", raw, [("Content-Type", stated)])
    assert reply.status == 201, reply.body
    assert client.manifest(repo, "t").get("content-type") == IMAGE


def test_a_manifest_without_a_type_takes_the_requests(client: Client, repo: str) -> None:
    raw = _untyped(Maker(client, repo, "sha256"))
    client.put(repo, "t", raw, IMAGE)
    check(client, repo, "t", raw, IMAGE, digest(raw))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("media_type", FOREIGN)
def test_layers_that_are_never_pushed(client: Client, repo: str, media_type: str, algorithm: str) -> None:
    maker = Maker(client, repo, algorithm)
    far = descriptor(b"far away" + os.urandom(4), media_type, algorithm, urls=["https://files.example/layer"])
    raw = maker.image(layers=[maker.blob(b"near"), far])
    client.put(repo, digest(raw, algorithm), raw)
    client.put(repo, "t", raw)
    assert client.manifest(repo, digest(raw, algorithm)).body == raw
    assert client.ask("HEAD", f"/v2/{repo}/blobs/{far['digest']}").status == 404


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_manifest_that_lacks_a_blob(client: Client, repo: str, algorithm: str) -> None:
    """The specification lets us take or refuse it; we refuse, and say which."""
    maker = Maker(client, repo, algorithm)
    lacking = descriptor(b"not pushed" + os.urandom(4), LAYER, algorithm)
    for raw in (maker.image(layers=[lacking]), maker.image(b"ok", config=lacking)):
        for ref in ("t", digest(raw, algorithm)):
            refused = client.ask("PUT", f"/v2/{repo}/manifests/{ref}", raw, [("Content-Type", IMAGE)])
            assert refused.status in (400, 404) and refused.codes == ["MANIFEST_BLOB_UNKNOWN"]
            assert lacking["digest"] in refused.body.decode()
            assert client.manifest(repo, ref).status == 404


def test_a_blob_of_another_repository_is_not_this_ones(client: Client, repo: str) -> None:
    data = os.urandom(100)
    client.blob(f"{repo}/from", data)
    client.blob(repo, b"{}")
    refused = client.ask("PUT", f"/v2/{repo}/manifests/t", image(b"{}", [data]), [("Content-Type", IMAGE)])
    assert refused.status in (400, 404) and refused.codes == ["MANIFEST_BLOB_UNKNOWN"]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_other_bytes_than_the_digest_says(client: Client, repo: str, algorithm: str) -> None:
    raw = Maker(client, repo, algorithm).image(b"bad digest")
    wrong = digest(raw + b" ", algorithm)
    refused = client.ask("PUT", f"/v2/{repo}/manifests/{wrong}", raw, [("Content-Type", IMAGE)])
    assert (refused.status, refused.codes) == (400, ["DIGEST_INVALID"])
    for name in (wrong, digest(raw, algorithm)):
        assert client.manifest(repo, name).status == 404


@pytest.mark.parametrize(
    "ref", ["sha256:baddigeststring", "sha512:0", "sha256:", "md5:" + "0" * 32, "sha256:" + "G" * 64, "a:b:c", "t%C3%A9", "-x", ".x", "a" * 129]
)
def test_references_that_are_none(client: Client, repo: str, ref: str) -> None:
    raw = Maker(client, repo, "sha256").image(b"x")
    refused = client.ask("PUT", f"/v2/{repo}/manifests/{ref}", raw, [("Content-Type", IMAGE)])
    assert refused.status == 400 and refused.codes[0] in ("DIGEST_INVALID", "MANIFEST_INVALID", "TAG_INVALID")
    assert client.manifest(repo, ref).status in (400, 404) and client.manifest(repo, ref, "HEAD").status in (400, 404)
    assert client.ask("DELETE", f"/v2/{repo}/manifests/{ref}").status in (400, 404)


def test_missing_ones(client: Client, repo: str) -> None:
    Maker(client, repo, "sha256").image(b"x")
    for ref in ("none", digest(b"none"), digest(b"none", "sha512")):
        found = client.manifest(repo, ref)
        assert (found.status, found.codes) == (404, ["MANIFEST_UNKNOWN"])
        assert client.manifest(repo, ref, "HEAD").status == 404
    assert client.manifest(f"{repo}/nowhere", "1").codes[0] in ("NAME_UNKNOWN", "MANIFEST_UNKNOWN")


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"x"',
        b'{"schemaVersion":1}',
        b"\xff\xfe",
        b'{"schemaVersion":2,"mediaType":"%s"}' % IMAGE.encode(),
        b"[" * 100_000,
    ],
)
def test_bodies_that_are_no_manifest(client: Client, repo: str, raw: bytes) -> None:
    client.blob(repo, b"{}")
    refused = client.ask("PUT", f"/v2/{repo}/manifests/t", raw, [("Content-Type", IMAGE)])
    assert (refused.status, refused.codes) == (400, ["MANIFEST_INVALID"])


def test_a_manifest_over_the_limit(client: Client, repo: str) -> None:
    maker = Maker(client, repo, "sha256")
    raw = maker.image(b"x", annotations={"k": "x" * (4 * 1024 * 1024 + 100_000)})
    refused = client.ask("PUT", f"/v2/{repo}/manifests/t", raw, [("Content-Type", IMAGE)])
    assert refused.status == 413 and client.manifest(repo, "t").status == 404


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_subject_that_does_not_exist(client: Client, repo: str, algorithm: str) -> None:
    raw = Maker(client, repo, algorithm).image(b"x", subject=descriptor(b"never", IMAGE, algorithm))
    assert client.put(repo, digest(raw, algorithm), raw).get("oci-subject") == digest(b"never", algorithm)


def test_a_tag_moves(client: Client, repo: str) -> None:
    maker = Maker(client, repo, "sha256")
    first, second = maker.image(b"1"), maker.image(b"2")
    for raw in (first, second, first):
        client.put(repo, "t", raw)
        check(client, repo, "t", raw, IMAGE, digest(raw))
    for raw in (first, second):
        check(client, repo, digest(raw), raw, IMAGE, digest(raw))


ACCEPTS = {
    "six lines": [("Accept", t) for t in (DOCKER, DOCKER_LIST, INDEX, IMAGE, "application/vnd.docker.distribution.manifest.v1+json", CONFIG)],
    "ours first": [("Accept", t) for t in (IMAGE, DOCKER_LIST, DOCKER, INDEX, "application/json", CONFIG)],
    "one line": [("Accept", f"{DOCKER}, {DOCKER_LIST}, {INDEX}, {IMAGE}")],
    "containerd": [("Accept", f"{IMAGE}, */*")],
    "another": [("Accept", DOCKER)],
    "none": [],
    "gzip": [("Accept", IMAGE), ("Accept-Encoding", "gzip")],
}


@pytest.mark.parametrize("accept", ACCEPTS)
def test_accept_never_changes_what_is_served(client: Client, repo: str, accept: str) -> None:
    """Rows 20 and 21: many Accept lines in any order, and a wish for compression."""
    raw = Maker(client, repo, "sha256").image(b"accepted")
    client.put(repo, "t", raw)
    for method, body in (("HEAD", b""), ("GET", raw)):
        found = client.ask(method, f"/v2/{repo}/manifests/t", headers=ACCEPTS[accept])
        assert (found.status, found.body, found.get("content-type"), found.get("content-length")) == (200, body, IMAGE, str(len(raw)))


# ---- 4.9 tag parameters


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("count", [1, 12])
def test_tags_as_parameters(client: Client, repo: str, algorithm: str, count: int) -> None:
    """Row 17: the manifest under its digest and under all tags, and OCI-Tag names them."""
    raw = Maker(client, repo, algorithm).image(b"many")
    name, tags = digest(raw, algorithm), [f"v1.{i}" for i in range(count)]
    done = client.put(repo, f"{name}?{'&'.join(f'tag={t}' for t in tags)}", raw)
    assert [t.strip() for k, v in done.headers if k.lower() == "oci-tag" for t in v.split(",")] == tags
    assert done.get("docker-content-digest") in ("", name)
    follow(client, done, raw, IMAGE)
    for ref in (name, *tags):
        check(client, repo, ref, raw, IMAGE, name)
    assert client.ask("GET", f"/v2/{repo}/tags/list").json()["tags"] == sorted(tags)


def test_tags_as_parameters_that_are_none(client: Client, repo: str) -> None:
    raw = Maker(client, repo, "sha256").image(b"bad tags")
    refused = client.ask("PUT", f"/v2/{repo}/manifests/{digest(raw)}?tag=good&tag=-bad", raw, [("Content-Type", IMAGE)])
    assert refused.status == 400
    assert client.manifest(repo, "good").status == 404 and client.manifest(repo, digest(raw)).status == 404
    many = "&".join(f"tag=t{i}" for i in range(150))
    assert client.ask("PUT", f"/v2/{repo}/manifests/{digest(raw)}?{many}", raw, [("Content-Type", IMAGE)]).status in (201, 400, 413, 414)
