"""The OCI door against the facts of the conformance suite, over HTTP to a real process."""

from __future__ import annotations

import hashlib
import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from artifact.grant import Grant
from registry import holdings, tables
from registry.catalog import ensure_org
from registry.library import local_call
from registry.settings import Settings
from registry.wiring import Site, open_site
from tests.contracts.doors import EMPTY, INDEX, MANIFEST, Door, new_site, serving, sha

pytestmark = pytest.mark.server
R = "acme/app"
NO_DIGEST = "sha256:" + "0" * 64


def start(door: Door, repo: str = R, who: str = "acme") -> str:
    found = door.ask("POST", f"/v2/{repo}/blobs/uploads/", who=who)
    assert found.status == 202
    return found.headers["location"]


def test_ping_wants_a_key_and_says_how(door: Door) -> None:
    refused = door.ask("GET", "/v2/", who=None)
    told = f'Bearer realm="{door.url}/token",service="127.0.0.1:{door.port}"'
    assert (refused.status, refused.headers["www-authenticate"], refused.code) == (401, told, "UNAUTHORIZED")
    assert door.ask("GET", "/v2/").status == 200
    assert door.ask("GET", "/v2/", basic=True).status == 200


def test_an_expired_key_is_told_so(door: Door) -> None:
    refused = door.ask("GET", "/v2/", who="expired")
    assert refused.status == 401
    assert "expired on 20" in refused.json()["errors"][0]["message"] and refused.json()["errors"][0]["detail"]["reason"] == "key_expired"


def test_every_answer_has_a_request_id(door: Door) -> None:
    assert all(re.fullmatch("[0-9a-f]{32}", door.ask("GET", p, who=None).headers["x-request-id"]) for p in ("/v2/", "/healthz", "/x/y"))


@pytest.mark.parametrize("size", [0, 1, 2048, 700_000])
def test_monolithic_forms(door: Door, size: int) -> None:
    for form in ("post", "put", "patch"):
        data = os.urandom(size)
        if form == "post":
            done = door.ask("POST", f"/v2/{R}/blobs/uploads/?digest={sha(data)}", data)
        else:
            place = start(door)
            if form == "patch":
                moved = door.ask("PATCH", place, iter([data[:1000], data[1000:]]), Transfer_Encoding="chunked")
                assert moved.status == 202 and moved.headers["range"] == f"0-{max(size - 1, 0)}"
                done = door.ask("PUT", f"{moved.headers['location']}?digest={sha(data).replace(':', '%3A')}")
            else:
                done = door.ask("PUT", f"{place}?digest={sha(data)}", data)
        assert done.status == 201 and done.headers["docker-content-digest"] == sha(data)
        read = door.ask("GET", done.headers["location"])
        assert (read.status, read.body, read.headers["content-length"]) == (200, data, str(size))
        head = door.ask("HEAD", done.headers["location"])
        assert (head.status, head.body, head.headers["content-length"]) == (200, b"", str(size))
        assert head.headers["docker-content-digest"] == sha(data)


def test_chunks_in_and_out_of_order(door: Door) -> None:
    data = os.urandom(3000)
    place = start(door)
    ahead = door.ask("PATCH", place, data[1000:2000], Content_Range="1000-1999")
    assert (ahead.status, ahead.code) == (416, "BLOB_UPLOAD_INVALID")
    first = door.ask("PATCH", place, data[:1000], Content_Range="0-999")
    assert (first.status, first.headers["range"]) == (202, "0-999")
    for bad in ("0-999", "1500-2499", "bytes 1000-1999", "x"):
        refused = door.ask("PATCH", first.headers["location"], data[:1000], Content_Range=bad)
        assert (refused.status, refused.headers["range"]) == (416, "0-999")
    state = door.ask("GET", place)
    assert (state.status, state.headers["range"]) == (204, "0-999")
    second = door.ask("PATCH", state.headers["location"], data[1000:2000], Content_Range="1000-1999")
    assert second.headers["range"] == "0-1999"
    assert door.ask("PUT", f"{place}?digest={sha(data)}", data[:1000], Content_Range="0-999").status == 416
    done = door.ask("PUT", f"{place}?digest={sha(data)}", data[2000:], Content_Range="2000-2999")
    assert done.status == 201
    assert door.ask("GET", done.headers["location"]).body == data
    assert door.ask("GET", place).code == "BLOB_UPLOAD_UNKNOWN"


def test_a_wrong_digest_keeps_nothing(door: Door) -> None:
    data = os.urandom(5000)
    for path in (f"/v2/{R}/blobs/uploads/?digest={NO_DIGEST}", ""):
        done = door.ask("POST", path, data) if path else door.ask("PUT", f"{start(door)}?digest={NO_DIGEST}", data)
        assert (done.status, done.code) == (400, "DIGEST_INVALID")
    assert door.ask("HEAD", f"/v2/{R}/blobs/{sha(data)}").status == 404
    assert door.ask("GET", f"/v2/{R}/blobs/{NO_DIGEST}").code == "BLOB_UNKNOWN"


def test_cancel(door: Door) -> None:
    place = start(door)
    assert door.ask("PATCH", place, b"abc").status == 202
    assert door.ask("DELETE", place).status == 204
    gone = door.ask("PATCH", place, b"abc")
    assert (gone.status, gone.code) == (404, "BLOB_UPLOAD_UNKNOWN")


@pytest.mark.parametrize(
    ("asked", "lo", "hi"),
    [("500-1499", 500, 1500), ("500-", 500, 2048), ("-500", 1548, 2048), ("2000-5000", 2000, 2048), ("500-0", 0, 0), ("5000-10000", 0, 0)],
)
def test_blob_ranges(door: Door, asked: str, lo: int, hi: int) -> None:
    data = bytes(range(256)) * 8
    place = f"/v2/{R}/blobs/{door.blob(R, data)}"
    found = door.ask("GET", place, Range=f"bytes={asked}")
    if not hi:
        assert (found.status, found.headers["content-range"]) == (416, "bytes */2048")
        return
    assert (found.status, found.body, found.headers["content-range"]) == (206, data[lo:hi], f"bytes {lo}-{hi - 1}/2048")


def test_mount(door: Door) -> None:
    digest = door.blob(R, b"mounted bytes")
    done = door.ask("POST", f"/v2/acme/second/blobs/uploads/?mount={digest}&from={R}")
    assert done.status == 201 and door.ask("GET", done.headers["location"]).body == b"mounted bytes"
    assert door.ask("POST", f"/v2/acme/second/blobs/uploads/?mount={NO_DIGEST}&from={R}").status == 202
    assert door.ask("POST", f"/v2/acme/second/blobs/uploads/?mount={digest}").status == 202
    assert door.ask("POST", f"/v2/other/second/blobs/uploads/?mount={digest}&from={R}", who="other").status == 202


def test_manifests_byte_for_byte(door: Door) -> None:
    digest, raw = door.image(R, "v1", [b"layer one"], unknown={"kept": [1, 2]}, annotations={"a": "b"})
    for ref in ("v1", digest):
        for method in ("GET", "HEAD"):
            found = door.ask(method, f"/v2/{R}/manifests/{ref}", Accept="text/nothing", Accept_Encoding="gzip")
            assert found.status == 200 and found.body == (raw if method == "GET" else b"")
            assert found.headers["content-type"] == MANIFEST and found.headers["docker-content-digest"] == digest
            assert found.headers["content-length"] == str(len(raw)) and "content-encoding" not in found.headers
    missing = door.ask("GET", f"/v2/{R}/manifests/none")
    assert (missing.status, missing.code) == (404, "MANIFEST_UNKNOWN")
    assert door.ask("PUT", f"/v2/{R}/manifests/{NO_DIGEST}", raw, Content_Type=MANIFEST).code == "DIGEST_INVALID"


def test_a_large_manifest_and_one_that_lacks_blobs(door: Door) -> None:
    notes = {f"key{i}": "x" * 10_000 for i in range(390)}
    digest, raw = door.image(R, "large", [b"a"], annotations=notes)
    assert len(raw) > 3_900_000 and door.ask("GET", f"/v2/{R}/manifests/{digest}").body == raw
    config = {"mediaType": EMPTY, "digest": sha(b"{}"), "size": 2}
    doc: dict[str, Any] = {"schemaVersion": 2, "mediaType": MANIFEST, "config": config}
    doc["layers"] = [{"mediaType": "x/y", "digest": NO_DIGEST, "size": 3}]
    refused = door.ask("PUT", f"/v2/{R}/manifests/lacks", json.dumps(doc).encode(), Content_Type=MANIFEST)
    assert (refused.status, refused.code) == (404, "MANIFEST_BLOB_UNKNOWN")
    doc["layers"][0]["mediaType"] = "application/vnd.oci.image.layer.nondistributable.v1.tar"
    assert door.ask("PUT", f"/v2/{R}/manifests/foreign", json.dumps(doc).encode(), Content_Type=MANIFEST).status == 201


def test_index_and_several_tags(door: Door) -> None:
    digest, raw = door.image(R, "", [b"in the index"])
    child = {"mediaType": MANIFEST, "digest": digest, "size": len(raw)}
    index = json.dumps({"schemaVersion": 2, "mediaType": INDEX, "manifests": [child]}).encode()
    tags = [f"many{i}" for i in range(12)]
    query = "&".join(f"tag={t}" for t in tags)
    done = door.ask("PUT", f"/v2/{R}/manifests/{sha(index)}?{query}", index, Content_Type=INDEX)
    assert (done.status, done.headers["oci-tag"]) == (201, ", ".join(tags))
    assert all(door.ask("GET", f"/v2/{R}/manifests/{t}").body == index for t in tags)


def test_referrers(door: Door) -> None:
    repo = "acme/subjects"
    unknown = door.ask("GET", f"/v2/acme/nowhere/referrers/{NO_DIGEST}")
    assert (unknown.status, unknown.headers["content-type"], unknown.json()["manifests"]) == (200, INDEX, [])
    assert door.ask("GET", f"/v2/{repo}/referrers/sha256:bad").status == 400
    digest, raw = door.image(repo, "1", [b"subject"])
    subject = {"mediaType": MANIFEST, "digest": digest, "size": len(raw)}
    made = [door.image(repo, "", [b"sbom %d" % i], subject=subject, artifactType=f"t/{i % 2}", annotations={"n": str(i)})[0] for i in range(3)]
    found = door.ask("GET", f"/v2/{repo}/referrers/{digest}")
    assert {d["digest"] for d in found.json()["manifests"]} == set(made) and "oci-filters-applied" not in found.headers
    some = door.ask("GET", f"/v2/{repo}/referrers/{digest}?artifactType=t%2F1")
    assert some.headers["oci-filters-applied"] == "artifactType"
    assert [(d["artifactType"], d["annotations"]) for d in some.json()["manifests"]] == [("t/1", {"n": "1"})]
    ghost = {"mediaType": MANIFEST, "digest": NO_DIGEST, "size": 5}
    doc = {"schemaVersion": 2, "mediaType": MANIFEST, "config": {"mediaType": EMPTY, "digest": sha(b"{}"), "size": 2}, "layers": [], "subject": ghost}
    done = door.ask("PUT", f"/v2/{repo}/manifests/ghost", json.dumps(doc).encode(), Content_Type=MANIFEST)
    assert (done.status, done.headers["oci-subject"]) == (201, NO_DIGEST)


def test_tags_by_pages(door: Door) -> None:
    repo = "acme/tags"
    _digest, raw = door.image(repo, "t00", [b"tagged"])
    for i in range(1, 25):
        door.ask("PUT", f"/v2/{repo}/manifests/t{i:02}", raw, Content_Type=MANIFEST)
    seen: list[list[str]] = []
    path = f"/v2/{repo}/tags/list?n=10"
    while path:
        found = door.ask("GET", path)
        seen.append(found.json()["tags"])
        link = re.match(r'<([^>]+)>; rel="next"$', found.headers.get("link", ""))
        path = link.group(1) if link else ""
    assert [len(s) for s in seen] == [10, 10, 5] and [t for page in seen for t in page] == [f"t{i:02}" for i in range(25)]
    none = door.ask("GET", f"/v2/{repo}/tags/list?n=0")
    assert none.json()["tags"] == [] and "link" not in none.headers
    assert door.ask("GET", f"/v2/{repo}/tags/list?last=t22").json()["tags"] == ["t23", "t24"]
    assert "link" not in door.ask("GET", f"/v2/{repo}/tags/list?n=25").headers


def test_deletes(door: Door) -> None:
    repo = "acme/deletes"
    digest, raw = door.image(repo, "a", [b"deleted"])
    door.ask("PUT", f"/v2/{repo}/manifests/b", raw, Content_Type=MANIFEST)
    assert door.ask("DELETE", f"/v2/{repo}/manifests/a").status == 202
    assert door.ask("HEAD", f"/v2/{repo}/manifests/a").status == 404 and door.ask("HEAD", f"/v2/{repo}/manifests/b").status == 200
    assert door.ask("DELETE", f"/v2/{repo}/manifests/{digest}").status == 202
    assert door.ask("HEAD", f"/v2/{repo}/manifests/b").status == 404 and door.ask("HEAD", f"/v2/{repo}/manifests/{digest}").status == 404
    blob = f"/v2/{repo}/blobs/{sha(b'deleted')}"
    assert door.ask("DELETE", blob).status == 202 and door.ask("HEAD", blob).status == 404


def test_catalog_shows_only_what_a_key_sees(door: Door) -> None:
    door.image("other/secret", "1", [b"secret"], who="other")
    for repo in ("acme/seen", "acme/seen/too"):
        door.image(repo, "1", [b"seen"])
    acme, other = (door.ask("GET", "/v2/_catalog", who=w).json()["repositories"] for w in ("acme", "other"))
    assert "acme/seen" in acme and "other/secret" not in acme
    assert other == ["other/secret"] or "acme/seen" not in other
    first = door.ask("GET", "/v2/_catalog?n=1")
    assert len(first.json()["repositories"]) == 1 and first.headers["link"].startswith("</v2/_catalog?n=1&last=")
    none = door.ask("GET", "/v2/_catalog?n=0")
    assert none.json()["repositories"] == [] and "link" not in none.headers
    seen: list[str] = []
    path = "/v2/_catalog?n=2"
    while path:
        page = door.ask("GET", path)
        seen += page.json()["repositories"]
        path = page.headers.get("link", "").partition(">")[0].removeprefix("<")
    assert seen == sorted(acme) and door.ask("GET", f"/v2/_catalog?last={seen[-2]}").json()["repositories"] == seen[-1:]
    assert door.ask("GET", "/v2/_catalog", who=None).status == 401


def test_another_organisation_sees_nothing_and_a_reader_writes_nothing(door: Door) -> None:
    digest, _raw = door.image("acme/open/tool", "1", [b"tool"])
    for path in ("manifests/1", f"manifests/{digest}", f"blobs/{sha(b'tool')}", "tags/list"):
        refused = door.ask("GET", f"/v2/acme/open/tool/{path}", who="other")
        assert (refused.status, refused.code) == (404, "NAME_UNKNOWN"), path
        assert door.ask("GET", f"/v2/acme/open/tool/{path}", who="reader").status == 200
    for method, path in (("POST", "blobs/uploads/"), ("PUT", "manifests/1"), ("DELETE", "manifests/1")):
        refused = door.ask(method, f"/v2/acme/open/tool/{path}", b"{}", who="reader", Content_Type=MANIFEST)
        assert refused.status in (400, 403), path
    assert door.ask("POST", "/v2/acme/open/tool/blobs/uploads/", who="reader").code == "DENIED"
    assert door.ask("GET", "/v2/acme/app/tags/list", who="reader").code == "DENIED"


def test_an_upload_belongs_to_its_key(door: Door) -> None:
    place = start(door)
    assert door.ask("PATCH", place, b"x", who="other").status == 404
    assert door.ask("GET", place, who=None).status == 401


def sha512(data: bytes) -> str:
    return "sha512:" + hashlib.sha512(data).hexdigest()


@contextmanager
def behind(door: Door) -> Iterator[Site]:
    """The running registry's own site, for what an administrator changes beside it."""
    with open_site(Settings.load(door.data), background=False) as site:
        yield site


def test_uploads_by_sha512_announced_or_not(door: Door) -> None:
    for form in ("post", "announced", "unannounced", "parts"):
        data = os.urandom(40_000)
        if form == "post":
            done = door.ask("POST", f"/v2/{R}/blobs/uploads/?digest={sha512(data)}", data)
        else:
            begun = door.ask("POST", f"/v2/{R}/blobs/uploads/" + ("?digest-algorithm=sha512" if form == "announced" else ""))
            assert begun.status == 202 and int(begun.headers["oci-chunk-min-length"]) > 0
            place = begun.headers["location"]
            if form == "parts":
                for lo in (0, 10_000):
                    assert door.ask("PATCH", place, data[lo : lo + 10_000], Content_Range=f"{lo}-{lo + 9_999}").status == 202
            done = door.ask("PUT", f"{place}?digest={sha512(data)}", data[20_000:] if form == "parts" else data)
        assert (done.status, done.headers.get("docker-content-digest")) == (201, sha512(data)), form
        for digest in (sha512(data), sha(data)):
            read = door.ask("GET", f"/v2/{R}/blobs/{digest}")
            assert (read.status, read.body, read.headers["docker-content-digest"]) == (200, data, digest)
        assert door.ask("HEAD", done.headers["location"]).headers["docker-content-digest"] == sha512(data)
        assert len([p for p in (door.data / "blobs").rglob(sha(data)[7:] + "*")]) == 1
        wrong = door.ask("POST", f"/v2/{R}/blobs/uploads/?digest={sha512(data + b'x')}", data)
        assert (wrong.status, wrong.code) == (400, "DIGEST_INVALID")
    refused = door.ask("POST", f"/v2/{R}/blobs/uploads/?digest-algorithm=md5")
    assert (refused.status, refused.code) == (400, "DIGEST_INVALID")


def test_manifests_by_sha512_with_tags_and_referrers(door: Door) -> None:
    repo = "acme/sha512"
    door.blob(repo, b"{}")
    layer = b"layer by sha512"
    assert door.ask("POST", f"/v2/{repo}/blobs/uploads/?digest={sha512(layer)}", layer).status == 201
    config = {"mediaType": EMPTY, "digest": sha(b"{}"), "size": 2}
    doc: dict[str, Any] = {"schemaVersion": 2, "mediaType": MANIFEST, "config": config}
    doc["layers"] = [{"mediaType": "x/y", "digest": sha512(layer), "size": len(layer)}]
    raw = json.dumps(doc).encode()
    done = door.ask("PUT", f"/v2/{repo}/manifests/{sha512(raw)}?tag=a&tag=b", raw, Content_Type=MANIFEST)
    assert (done.status, done.headers["oci-tag"], done.headers["docker-content-digest"]) == (201, "a, b", sha512(raw))
    for ref in ("a", "b", sha512(raw)):
        for method in ("GET", "HEAD"):
            found = door.ask(method, f"/v2/{repo}/manifests/{ref}")
            assert (found.status, found.headers["docker-content-digest"], found.headers["content-type"]) == (200, sha512(raw), MANIFEST)
    assert door.ask("GET", done.headers["location"]).body == raw
    refused = door.ask("PUT", f"/v2/{repo}/manifests/{sha512(raw)}", raw + b" ", Content_Type=MANIFEST)
    assert (refused.status, refused.code) == (400, "DIGEST_INVALID")
    subject = {"mediaType": MANIFEST, "digest": sha512(raw), "size": len(raw)}
    made = json.dumps({**doc, "layers": [], "artifactType": "t/x", "subject": subject}).encode()
    done = door.ask("PUT", f"/v2/{repo}/manifests/{sha512(made)}", made, Content_Type=MANIFEST)
    assert (done.status, done.headers["oci-subject"]) == (201, sha512(raw))
    found = door.ask("GET", f"/v2/{repo}/referrers/{sha512(raw)}")
    assert [d["digest"] for d in found.json()["manifests"]] == [sha512(made)]
    assert door.ask("DELETE", f"/v2/{repo}/manifests/{sha512(raw)}").status == 202
    assert door.ask("HEAD", f"/v2/{repo}/manifests/a").status == 404
    blob = f"/v2/{repo}/blobs/{sha512(layer)}"
    assert door.ask("DELETE", blob).status == 202 and door.ask("HEAD", blob).status == 404


DOCKER = "application/vnd.docker.distribution.manifest.v2+json"


def test_docker_types_are_kept_and_schema_1_is_refused(door: Door) -> None:
    door.blob(R, b"{}")
    config = {"mediaType": "application/vnd.docker.container.image.v1+json", "digest": sha(b"{}"), "size": 2}
    foreign = {"mediaType": "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip", "digest": NO_DIGEST, "size": 5, "urls": ["http://x/"]}
    image = json.dumps({"schemaVersion": 2, "mediaType": DOCKER, "config": config, "layers": [foreign]}).encode()
    entry = {"mediaType": DOCKER, "digest": sha(image), "size": len(image), "platform": {"architecture": "amd64", "os": "linux"}}
    fat_type = "application/vnd.docker.distribution.manifest.list.v2+json"
    fat = json.dumps({"schemaVersion": 2, "mediaType": fat_type, "manifests": [entry]}).encode()
    for tag, raw, kind in (("docker", image, DOCKER), ("fat", fat, fat_type)):
        assert door.ask("PUT", f"/v2/{R}/manifests/{tag}", raw, Content_Type=kind + "; charset=utf-8").status == 201
        found = door.ask("GET", f"/v2/{R}/manifests/{tag}", Accept=MANIFEST)
        assert (found.status, found.body, found.headers["content-type"]) == (200, raw, kind)
    for kind in ("application/vnd.docker.distribution.manifest.v1+json", "application/vnd.docker.distribution.manifest.v1+prettyjws"):
        old = json.dumps({"schemaVersion": 1, "name": R, "tag": "old", "fsLayers": [], "history": []}).encode()
        refused = door.ask("PUT", f"/v2/{R}/manifests/old", old, Content_Type=kind)
        assert (refused.status, refused.code) == (400, "MANIFEST_INVALID")
    assert door.ask("GET", f"/v2/{R}/manifests/old").status == 404


def test_bytes_without_a_type_have_the_same_type_for_everybody(door: Door) -> None:
    door.blob(R, b"{}")
    raw = json.dumps({"schemaVersion": 2, "config": {"mediaType": EMPTY, "digest": sha(b"{}"), "size": 2}, "layers": [], "x": "typeless"}).encode()
    assert door.ask("PUT", f"/v2/{R}/manifests/typeless", raw, Content_Type=MANIFEST).status == 201
    for repo, who in ((R, "acme"), ("other/typeless", "other")):
        door.blob(repo, b"{}", who)
        for data in (raw, raw + b" "):
            again = door.ask("PUT", f"/v2/{repo}/manifests/typeless", data, who, Content_Type=DOCKER)
            assert (again.status, again.code) == (400, "MANIFEST_INVALID"), "the same whether somebody has it or not"
    assert door.ask("PUT", "/v2/other/typeless/manifests/typeless", raw, "other").status == 201
    assert door.ask("GET", f"/v2/{R}/manifests/typeless").headers["content-type"] == MANIFEST


def test_immutable_tags_refuse_admins_in_words(door: Door) -> None:
    repo = "acme/frozen"
    digest, _raw = door.image(repo, "v1", [b"frozen"])
    with behind(door) as site, site.catalog.writing() as conn:
        conn.execute(tables.repository.update().where(tables.repository.c.name == repo).values(immutable=True))
    _other, raw = door.image(repo, "v2", [b"moved"])
    answers = [door.ask("PUT", f"/v2/{repo}/manifests/v1", raw, Content_Type=MANIFEST)]
    answers += [door.ask("DELETE", f"/v2/{repo}/manifests/{ref}") for ref in ("v1", digest)]
    for refused in answers:
        assert (refused.status, refused.code) == (403, "DENIED") and "immutable" in refused.json()["errors"][0]["message"]
    assert door.ask("HEAD", f"/v2/{repo}/manifests/v1").headers["docker-content-digest"] == digest


def test_a_conditional_push_loses_against_a_newer_one(door: Door) -> None:
    repo = "acme/conditional"
    first, _raw = door.image(repo, "v", [b"one"])
    second, raw = door.image(repo, "", [b"two"])
    etag = door.ask("HEAD", f"/v2/{repo}/manifests/v").headers["etag"]
    path = f"/v2/{repo}/manifests/v"
    assert door.ask("PUT", path, raw, Content_Type=MANIFEST, If_None_Match="*").status == 412
    assert door.ask("PUT", path, raw, Content_Type=MANIFEST, If_Match=etag).status == 201
    late = door.ask("PUT", path, raw, Content_Type=MANIFEST, If_Match=etag)
    assert (late.status, late.code) == (412, "PRECONDITION_FAILED") and first in etag
    assert door.ask("HEAD", path).headers["docker-content-digest"] == second
    assert door.ask("PUT", path, raw, Content_Type=MANIFEST, If_Match="W/x").status == 400


def test_referrers_in_pages_by_their_bytes(door: Door) -> None:
    repo = "acme/many"
    digest, raw = door.image(repo, "1", [b"subject of many"])
    subject = {"mediaType": MANIFEST, "digest": digest, "size": len(raw)}
    notes = {f"key{i}": "x" * 10_000 for i in range(150)}
    made = [door.image(repo, "", [], subject=subject, artifactType="t/large", annotations={**notes, "n": str(i)})[0] for i in range(5)]
    seen: list[str] = []
    path, pages = f"/v2/{repo}/referrers/{digest}?artifactType=t%2Flarge", 0
    while path:
        found = door.ask("GET", path)
        assert found.status == 200 and len(found.body) < 5_000_000 and found.headers["oci-filters-applied"] == "artifactType"
        seen += [d["digest"] for d in found.json()["manifests"]]
        link = re.match(r'<([^>]+)>; rel="next"$', found.headers.get("link", ""))
        path, pages = link.group(1) if link else "", pages + 1
    assert pages == 3 and seen == sorted(made)


def test_fallback_tags_are_referrers_too_and_stay(door: Door) -> None:
    """What a client pushes that found no referrers API elsewhere: its artifacts, and an index of them under the subject's digest as a tag."""
    repo = "acme/fallback"
    digest, raw = door.image(repo, "1", [b"the subject"])
    subject = {"mediaType": MANIFEST, "digest": digest, "size": len(raw)}
    made, size = door.image(repo, "", [b"signature"], subject=subject, artifactType="t/sig")
    entry = {"mediaType": MANIFEST, "digest": made, "size": len(size), "artifactType": "t/sig"}
    index = json.dumps({"schemaVersion": 2, "mediaType": INDEX, "manifests": [entry]}).encode()
    tag = digest.replace(":", "-")
    assert door.ask("PUT", f"/v2/{repo}/manifests/{tag}", index, Content_Type=INDEX).status == 201
    assert [d["digest"] for d in door.ask("GET", f"/v2/{repo}/referrers/{digest}").json()["manifests"]] == [made]
    assert door.ask("GET", f"/v2/{repo}/manifests/{tag}").body == index
    assert tag in door.ask("GET", f"/v2/{repo}/tags/list").json()["tags"]


def test_the_namespace_of_another_registry(door: Door) -> None:
    with behind(door) as site:
        call = local_call(time.time())
        for raw in (b"{}", b"mirrored"):
            site.library.put(call, "nvcr.io/acme/mirrored", raw)
        layer = {"mediaType": "x/y", "digest": sha(b"mirrored"), "size": 8}
        raw = json.dumps(
            {"schemaVersion": 2, "mediaType": MANIFEST, "config": {"mediaType": EMPTY, "digest": sha(b"{}"), "size": 2}, "layers": [layer]}
        ).encode()
        site.library.push(call, "nvcr.io/acme/mirrored", raw, MANIFEST, refs=["1"])
        now = time.time()
        with site.catalog.writing() as conn:
            grant = Grant(("nvcr.io/**", "acme/**"), ("pull",))
            org = ensure_org(conn, "acme", now)
            door.keys["mirror"] = site.entitlements.add_key(conn, org, tier="enterprise", grant=grant, expires=0, at=now)[1]
    door.image("acme/plain", "1", [b"plain"])
    for path in ("manifests/1", f"blobs/{sha(b'mirrored')}", "tags/list"):
        for method in ("GET", "HEAD") if path != "tags/list" else ("GET",):
            found = door.ask(method, f"/v2/acme/mirrored/{path}?ns=nvcr.io", who="mirror")
            assert (found.status, found.headers["oci-namespace"]) == (200, "nvcr.io"), path
        assert door.ask("GET", f"/v2/acme/mirrored/{path}", who="mirror").status == 404
    own = door.ask("GET", "/v2/acme/plain/manifests/1?ns=nvcr.io", who="mirror")
    assert own.status == 200 and "oci-namespace" not in own.headers
    assert door.ask("GET", "/v2/acme/plain/manifests/1?ns=..%2F..", who="mirror").status == 200
    none = door.ask("GET", "/v2/acme/plain/manifests/2?ns=nvcr.io", who="mirror")
    assert (none.status, none.code) == (404, "MANIFEST_UNKNOWN")


def test_a_grant_in_grace_warns_in_the_header(door: Door) -> None:
    door.image("acme/graced", "1", [b"graced"])
    now = time.time()
    with behind(door) as site, site.catalog.writing() as conn:
        grant = Grant(("acme/graced",), ("pull",), expires=now - 60, grace_s=3600)
        org = ensure_org(conn, "acme", now)
        door.keys["graced"] = site.entitlements.add_key(conn, org, tier="enterprise", grant=grant, expires=0, at=now - 120)[1]
    for path in ("manifests/1", f"blobs/{sha(b'graced')}"):
        found = door.ask("GET", f"/v2/acme/graced/{path}", who="graced")
        assert found.status == 200 and re.fullmatch(r'299 - "the grant on acme/graced expired on [^"]+"', found.headers["warning"])
        assert "grant" not in door.ask("GET", f"/v2/acme/graced/{path}").headers.get("warning", "")


def test_a_quota_is_told_with_its_figures(door: Door) -> None:
    with behind(door) as site, site.catalog.writing() as conn:
        bound = int(str(holdings.quota_of(conn, "other")["used_bytes"])) + 1000
        conn.execute(tables.org.update().where(tables.org.c.name == "other").values(quota_bytes=bound))
    door.blob("other/bounded", b"q" * 700, who="other")
    for method, data in (("POST", b"r" * 400), ("PUT", b"r" * 400)):
        path = (
            f"/v2/other/bounded/blobs/uploads/?digest={sha(data)}"
            if method == "POST"
            else f"{start(door, 'other/bounded', 'other')}?digest={sha(data)}"
        )
        refused = door.ask(method, path, data, who="other")
        assert (refused.status, refused.code, refused.json()["errors"][0]["detail"]["reason"]) == (403, "DENIED", "quota")
        assert all(word in refused.json()["errors"][0]["message"] for word in (str(bound), "400"))
        assert door.ask("HEAD", f"/v2/other/bounded/blobs/{sha(data)}", who="other").status == 404


def cut(door: Door, place: str, data: bytes) -> None:
    """Sends a part of an announced body and goes away."""
    with socket.create_connection(("127.0.0.1", door.port)) as sock:
        head = f"PATCH {place} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {door.keys['acme']}\r\nContent-Length: {len(data) * 2}\r\n\r\n"
        sock.sendall(head.encode() + data)
        time.sleep(0.5)


def stored(door: Door, place: str) -> int:
    until = time.monotonic() + 10
    while time.monotonic() < until:
        found = door.ask("GET", place)
        if found.status == 204 and found.headers["range"] != "0-0":
            return int(found.headers["range"].split("-")[1]) + 1
        time.sleep(0.1)
    return 0


def test_a_stopping_server_suspends_what_is_being_sent(tmp_path: Path) -> None:
    data = os.urandom(3_000_000)
    keys = new_site(tmp_path / "data")
    with serving(tmp_path / "data", keys, AIRLOCK_DRAIN_TIMEOUT_S="1") as found:
        place = start(found)
        with socket.create_connection(("127.0.0.1", found.port), timeout=20) as sock:
            head = f"PATCH {place} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {keys['acme']}\r\nContent-Length: {len(data)}\r\n\r\n"
            sock.sendall(head.encode() + data[:2_000_000])
            time.sleep(0.5)
            found.process.terminate()
            assert sock.recv(12) == b"HTTP/1.1 503"
        assert found.process.wait(20) == 0
    with serving(tmp_path / "data", keys) as again:
        at = stored(again, place)
        assert 1_000_000 < at <= 2_000_000
        assert again.ask("PUT", f"{place}?digest={sha(data)}", data[at:], Content_Range=f"{at}-{len(data) - 1}").status == 201
    assert "Traceback" not in found.log.read_text()


def test_a_cut_upload_goes_on_where_it_stopped_also_in_another_process(door: Door, tmp_path: Path) -> None:
    data = os.urandom(3_000_000)
    place = start(door)
    cut(door, place, data[:1_500_000])
    at = stored(door, place)
    assert at == 1_500_000
    door.process.terminate()
    assert door.process.wait(20) == 0
    with serving(door.data, door.keys) as again:
        door.process, door.port = again.process, again.port
        try:
            moved = again.ask("PATCH", place, data[at:], Content_Range=f"{at}-{len(data) - 1}")
            assert moved.status == 202, moved.body
            done = again.ask("PUT", f"{place}?digest={sha(data)}")
            assert done.status == 201 and again.ask("GET", done.headers["location"]).body == data
            command = [str(Path(sys.executable).parent / "airlock"), "registry", "serve", "--data", str(door.data), "--port", "0"]
            if (door.data / "registry.db").exists():  # over PostgreSQL there may be any number
                second = subprocess.run(command, capture_output=True, text=True, timeout=60)
                assert second.returncode == 8 and "another server is using" in second.stderr
            taken = subprocess.run([*command[:-3], str(tmp_path), "--port", str(again.port)], capture_output=True, text=True, timeout=60)
            assert taken.returncode == 9 and "cannot listen" in taken.stderr
        finally:
            log = door.log.read_text()
    lines = [json.loads(line) for line in log.splitlines() if line.startswith("{")]
    access = [line for line in lines if line["log"] == "airlock.access"]
    assert {"request_id", "key_id", "method", "path", "status", "bytes", "seconds"} <= set(access[0])
    assert not any(key in log for key in door.keys.values()) and "uthorization" not in log
    assert not [line for line in lines if line["level"] == "error"]
