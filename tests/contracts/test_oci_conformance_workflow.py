"""The four workflows of the older OCI conformance checks, in their order, each in one repository from empty to torn down; auth on."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest

from tests.contracts.oci_client import ACCEPT, ALGORITHMS, CONFIG, EMPTY, IMAGE, INDEX, Client, Reply, descriptor, digest, image, join

pytestmark = [pytest.mark.server, pytest.mark.timeout(300)]
BAD = "sha256:baddigeststring"
DELETED = (202, 400, 405)


@dataclass
class Flow:
    """One image's parts in one repository, and requests of its kind."""

    client: Client
    repo: str
    algorithm: str
    config: bytes
    layer: bytes
    more: list[bytes] = field(default_factory=list)

    @property
    def raw(self) -> bytes:
        return image(self.config, [self.layer], self.algorithm)

    def name(self, data: bytes) -> str:
        return digest(data, self.algorithm)

    def blob(self, method: str, name: str) -> Reply:
        return self.client.ask(method, f"/v2/{self.repo}/blobs/{name}")

    def manifest(self, method: str, ref: str, raw: bytes = b"") -> Reply:
        headers = [("Content-Type", IMAGE)] if method == "PUT" else ACCEPT
        return self.client.ask(method, f"/v2/{self.repo}/manifests/{ref}", raw, headers)

    def push(self, *tags: str) -> str:
        """Sets up the image under its digest and the tags."""
        for data in (self.config, self.layer):
            self.client.blob(self.repo, data, self.algorithm)
        name = self.name(self.raw)
        assert self.manifest("PUT", "&".join([f"{name}?", *(f"tag={t}" for t in tags)]), self.raw).status == 201
        return name


@pytest.fixture(params=ALGORITHMS)
def flow(request: pytest.FixtureRequest, client: Client, repo: str) -> Iterator[Flow]:
    """The flow, torn down by the registry's own deletes; afterwards nothing of it is served."""
    made = Flow(client, repo, request.param, b'{"architecture":"amd64","os":"linux"}', os.urandom(3000))
    yield made
    for raw in (*made.more, made.raw):
        assert made.manifest("DELETE", made.name(raw)).status in (202, 404)
        assert made.manifest("GET", made.name(raw)).status == 404
    for data in (made.config, made.layer):
        assert made.blob("DELETE", made.name(data)).status in (202, 404)
        assert made.blob("HEAD", made.name(data)).status == 404


def test_pull(flow: Flow) -> None:
    name = flow.push("tagtest0")
    absent = flow.name(b"dummy")
    assert flow.blob("HEAD", absent).status == 404 and flow.blob("GET", absent).status == 404
    for data in (flow.config, flow.layer):
        head, read = (flow.blob(method, flow.name(data)) for method in ("HEAD", "GET"))
        assert (head.status, read.status, read.body) == (200, 200, data)
        assert head.get("docker-content-digest") == read.get("docker-content-digest") == flow.name(data)
    for ref in ("INVALID-none", flow.name(b"no manifest")):
        assert flow.manifest("HEAD", ref).status == 404 and flow.manifest("GET", ref).status == 404
    for ref in (name, "tagtest0"):
        head, read = (flow.manifest(method, ref) for method in ("HEAD", "GET"))
        assert (head.status, read.status, read.body, read.get("content-type")) == (200, 200, flow.raw, IMAGE)
    refused = flow.manifest("PUT", BAD, flow.raw)
    assert refused.status == 400 and refused.codes
    assert flow.manifest("GET", BAD).status in (400, 404)


def test_push(flow: Flow) -> None:
    client, repo, layer = flow.client, flow.repo, flow.layer
    moved = client.ask("PATCH", client.start(repo), [flow.config], [("Content-Type", "application/octet-stream")])
    assert moved.status == 202
    done = client.ask("PUT", join(moved.get("location"), digest=flow.name(flow.config)))
    assert done.status == 201 and done.get("location")
    whole = client.ask("POST", f"/v2/{repo}/blobs/uploads/?digest={flow.name(layer)}", layer, [("Content-Type", "application/octet-stream")])
    assert whole.status in (201, 202)
    assert client.ask("PUT", join(client.start(repo), digest=flow.name(layer)), layer).status == 201
    for data in (flow.config, layer):
        assert flow.blob("GET", flow.name(data)).body == data
    chunked = os.urandom(2 * 1500)
    place = client.start(repo)

    def chunk(place: str, lo: int, hi: int) -> Reply:
        return client.ask("PATCH", place, chunked[lo:hi], [("Content-Range", f"{lo}-{hi - 1}"), ("Content-Type", "application/octet-stream")])

    assert chunk(place, 1500, 3000).status == 416
    first = chunk(place, 0, 1500)
    assert first.status == 202
    assert chunk(first.get("location"), 0, 1500).status == 416
    stale = client.ask("GET", place)
    assert (stale.status, stale.get("range")) == (204, "0-1499") and stale.get("location")
    second = chunk(stale.get("location"), 1500, 3000)
    assert second.status == 202
    assert client.ask("PUT", join(second.get("location"), digest=flow.name(chunked))).status == 201
    other = f"{repo}/other"
    for query, allowed in ((f"?mount={flow.name(layer)}&from={repo}", (201, 202)), (f"?mount={flow.name(b'dummy')}&from={repo}", (202,))):
        mounted = client.ask("POST", f"/v2/{other}/blobs/uploads/{query}")
        assert mounted.status in allowed and mounted.get("location")
    assert flow.manifest("GET", flow.name(flow.raw)).status == 404
    for ref in ("test", "v1", flow.name(flow.raw)):
        assert flow.manifest("PUT", ref, flow.raw).status == 201
    if flow.algorithm != "sha256":  # by tag alone it was taken under the first algorithm's name, which is another manifest
        assert flow.manifest("DELETE", digest(flow.raw)).status == 202
    bare = image(flow.config, [], flow.algorithm)
    flow.more.append(bare)
    assert flow.manifest("PUT", f"{flow.name(bare)}?tag=emptylayer", bare).status == 201
    assert flow.manifest("GET", flow.name(flow.raw)).body == flow.raw
    assert flow.manifest("DELETE", "emptylayer").status in DELETED


def test_discovery(flow: Flow) -> None:
    client, repo = flow.client, flow.repo
    tags = [f"test{i}" for i in range(4)]
    name = flow.push(*tags)
    whole = client.ask("GET", f"/v2/{repo}/tags/list").json()["tags"]
    assert whole == tags
    assert len(client.ask("GET", f"/v2/{repo}/tags/list?n=2").json()["tags"]) == 2
    assert client.ask("GET", f"/v2/{repo}/tags/list?n=2&last={whole[0]}").json()["tags"] == whole[1:3]
    empty = client.ask("GET", f"/v2/{repo}/referrers/{flow.name(b'nothing')}")
    assert (empty.status, empty.json()["manifests"], empty.get("content-type")) == (200, [], INDEX)
    client.blob(repo, b"{}", flow.algorithm)
    for kind in ("a", "b"):
        raw = image(
            b"{}",
            [],
            flow.algorithm,
            config=descriptor(b"{}", EMPTY, flow.algorithm),
            subject=descriptor(flow.raw, IMAGE, flow.algorithm),
            artifactType=f"application/vnd.example.{kind}",
        )
        flow.more.append(raw)
        assert client.put(repo, flow.name(raw), raw).get("oci-subject") == name
    assert len(client.ask("GET", f"/v2/{repo}/referrers/{name}").json()["manifests"]) == 2
    some = client.ask("GET", f"/v2/{repo}/referrers/{name}?artifactType=application/vnd.example.b")
    assert [d["artifactType"] for d in some.json()["manifests"]] == ["application/vnd.example.b"]
    assert some.get("oci-filters-applied") == "artifactType"
    ghost = image(flow.config, [], flow.algorithm, subject=descriptor(b"missing", CONFIG, flow.algorithm))
    flow.more.append(ghost)
    assert client.put(repo, flow.name(ghost), ghost).get("oci-subject") == flow.name(b"missing")
    assert len(client.ask("GET", f"/v2/{repo}/referrers/{flow.name(b'missing')}").json()["manifests"]) == 1


def test_management(flow: Flow) -> None:
    client, repo = flow.client, flow.repo
    name = flow.push("a", "b")
    assert flow.manifest("DELETE", "a").status in DELETED
    assert client.ask("GET", f"/v2/{repo}/tags/list").json()["tags"] == ["b"]
    assert flow.manifest("DELETE", name).status == 202
    assert flow.manifest("GET", name).status == 404 and flow.manifest("GET", "b").status == 404
    listed = client.ask("GET", f"/v2/{repo}/tags/list")
    assert listed.status == 404 or listed.json()["tags"] == []
    for data in (flow.config, flow.layer):
        assert flow.blob("DELETE", flow.name(data)).status == 202
        assert flow.blob("GET", flow.name(data)).status == 404
