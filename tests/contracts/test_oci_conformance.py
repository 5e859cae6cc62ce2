"""The facts of the public OCI conformance suite, ported as a black box with auth on: ping, reading blobs, tags, deletes, listings."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

import pytest

from tests.contracts.doors import Door
from tests.contracts.oci_client import ALGORITHMS, IMAGE, INDEX, WAIT_S, Client, challenge, digest, image, index, join

pytestmark = [pytest.mark.server, pytest.mark.timeout(300)]
BLOB = bytes(i * i % 251 for i in range(2048))
RANDOM = digest(b"never pushed by anybody")


def tagged(client: Client, repo: str, *tags: str, layer: bytes = b"tagged") -> tuple[str, bytes]:
    """One image under these tags."""
    client.blob(repo, b"{}")
    client.blob(repo, layer)
    raw = image(b"{}", [layer])
    for tag in tags:
        client.put(repo, tag, raw)
    return digest(raw), raw


# ---- 4.1 ping and empty repository


def test_ping(client: Client) -> None:
    assert client.ask("GET", "/v2/").status == 200
    refused = Client(client.port, "", "none").raw("GET", "/v2/")
    assert refused.status == 401 and refused.get("www-authenticate") and refused.codes == ["UNAUTHORIZED"]


@pytest.mark.parametrize(
    ("method", "path", "actions"),
    [
        ("GET", "manifests/1", "pull"),
        ("HEAD", "manifests/1", "pull"),
        ("HEAD", f"blobs/{RANDOM}", "pull"),
        ("GET", "tags/list", "pull"),
        ("POST", "blobs/uploads/", "pull,push"),
        ("PUT", "manifests/1", "pull,push"),
        ("DELETE", "manifests/1", "delete"),
    ],
)
def test_the_challenge_says_where_and_for_what(server: Door, method: str, path: str, actions: str) -> None:
    refused = Client(server.port, "", "none").raw(method, f"/v2/acme/app/{path}")
    said = challenge(refused.get("www-authenticate"))
    assert refused.status == 401 and said["service"], refused
    assert urlsplit(said["realm"]).netloc == f"127.0.0.1:{server.port}"
    kind, name, asked = said["scope"].split(":")
    assert (kind, name) == ("repository", "acme/app") and (set(asked.split(",")) >= set(actions.split(",")) or asked == "*")
    assert "scope" not in challenge(Client(server.port, "", "none").raw("GET", "/v2/").get("www-authenticate"))


def test_an_empty_repository(client: Client, repo: str) -> None:
    assert client.ask("GET", f"/v2/{repo}/tags/list").status in (200, 404)
    client.blob(repo, b"no manifest yet")
    listed = client.ask("GET", f"/v2/{repo}/tags/list")
    assert listed.status in (200, 404) and (listed.status == 404 or not listed.json()["tags"])


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_referrers_of_nothing(client: Client, repo: str, algorithm: str) -> None:
    for known in (False, True):
        if known:
            client.blob(repo, b"{}")
        found = client.ask("GET", f"/v2/{repo}/referrers/{digest(b'random', algorithm)}")
        assert (found.status, found.get("content-type")) == (200, INDEX)
        assert found.json() == {"schemaVersion": 2, "mediaType": INDEX, "manifests": []}


# ---- 4.2 blob read


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("data", [b"", b"{}", BLOB], ids=["empty", "small", "2048"])
def test_a_blob_is_read_whole(client: Client, repo: str, algorithm: str, data: bytes) -> None:
    name = digest(data, algorithm)
    path = f"/v2/{repo}/blobs/{name}"
    for method in ("GET", "HEAD"):
        assert client.ask(method, path).status == 404
    assert client.ask("GET", path).codes[0] in ("BLOB_UNKNOWN", "NAME_UNKNOWN")
    assert client.blob(repo, data, algorithm) == name
    for asked in (path, path.replace(":", "%3A")):
        for method, body in (("GET", data), ("HEAD", b"")):
            found = client.ask(method, asked, headers=[("Accept-Encoding", "gzip")])
            assert (found.status, found.get("content-length"), found.get("docker-content-digest")) == (200, str(len(data)), name)
            assert found.body == body and not found.get("content-encoding")


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_blob_is_read_under_the_digest_that_was_asked(client: Client, repo: str, algorithm: str) -> None:
    """Both names may be served for the same bytes; whichever is, says the algorithm that was asked for."""
    data = b"two names of one blob " + algorithm.encode() + repo.encode()
    client.blob(repo, data, algorithm)
    other = next(a for a in ALGORITHMS if a != algorithm)
    found = client.ask("GET", f"/v2/{repo}/blobs/{digest(data, other)}")
    assert found.status in (200, 404) and (found.status == 404 or found.get("docker-content-digest") == digest(data, other))
    client.blob(repo, data, other)
    for name in (digest(data, algorithm), digest(data, other)):
        again = client.ask("GET", f"/v2/{repo}/blobs/{name}")
        assert (again.status, again.body, again.get("docker-content-digest")) == (200, data, name)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize(("asked", "lo", "hi"), [("500-1499", 500, 1500), ("500-", 500, 2048), ("-500", 1548, 2048), ("2000-5000", 2000, 2048)])
def test_ranges(client: Client, repo: str, algorithm: str, asked: str, lo: int, hi: int) -> None:
    path = f"/v2/{repo}/blobs/{client.blob(repo, BLOB, algorithm)}"
    part = client.ask("GET", path, headers=[("Range", f"bytes={asked}")])
    assert (part.status, part.body, part.get("content-length")) == (206, BLOB[lo:hi], str(hi - lo))
    assert part.get("content-range") in (f"bytes {lo}-{hi - 1}/2048", f"bytes {lo}-{hi - 1}/*")


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("asked", ["500-0", "5000-10000"])
def test_ranges_that_cannot_be_met(client: Client, repo: str, algorithm: str, asked: str) -> None:
    path = f"/v2/{repo}/blobs/{client.blob(repo, BLOB, algorithm)}"
    assert client.ask("GET", path, headers=[("Range", f"bytes={asked}")]).status == 416
    assert client.ask("GET", path).body == BLOB


# ---- 4.7 tags


def test_tags_in_order_and_behind_one(client: Client, repo: str) -> None:
    tags = ["b", "a", "B", "1.10", "1.9", "_x", "a.b-c"]
    tagged(client, repo, *tags)
    found = client.ask("GET", f"/v2/{repo}/tags/list")
    assert found.status == 200 and found.json() == {"name": repo, "tags": found.json()["tags"]} and not found.get("link")
    listed = found.json()["tags"]
    assert listed in (sorted(tags), sorted(tags, key=lambda t: (t.lower(), t)))
    for at, tag in enumerate(listed):
        assert client.ask("GET", f"/v2/{repo}/tags/list?last={tag}").json()["tags"] == listed[at + 1 :]


def test_tags_by_pages(client: Client, repo: str) -> None:
    tags = [f"t{i:02}" for i in range(25)]
    tagged(client, repo, *tags)
    pages, path = [], f"/v2/{repo}/tags/list?n=10"
    while path:
        found = client.ask("GET", path)
        pages.append(found.json()["tags"])
        link = re.fullmatch(r'<([^>]+)>; ?rel="next"', found.get("link"))
        assert bool(link) == bool(found.get("link"))
        path = join(link[1]) if link else ""
        assert not path or (path.startswith(f"/v2/{repo}/tags/list?") and {"n=10", f"last={pages[-1][-1]}"} == set(path.split("?")[1].split("&")))
    assert [len(p) for p in pages] == [10, 10, 5] and [t for page in pages for t in page] == tags
    none = client.ask("GET", f"/v2/{repo}/tags/list?n=0")
    assert none.status == 200 and none.json()["tags"] == [] and not none.get("link")
    assert not client.ask("GET", f"/v2/{repo}/tags/list?n=25").get("link")
    page = client.ask("GET", f"/v2/{repo}/tags/list?n=3&last=t10")
    assert page.json()["tags"] == ["t11", "t12", "t13"] and page.get("link")
    assert client.ask("GET", f"/v2/{repo}/tags/list?n=-1").status in (200, 400)


def test_the_catalog_by_pages(client: Client, repo: str) -> None:
    names = [f"{repo}/{c}" for c in "abcde"]
    for name in names:
        tagged(client, name, "1")
    found: list[str] = []
    path = f"/v2/_catalog?n=2&last={repo}"
    while path and len(found) < len(names):
        page = client.ask("GET", path)
        assert page.status == 200 and len(page.json()["repositories"]) <= 2
        found += page.json()["repositories"]
        link = re.fullmatch(r'<([^>]+)>; ?rel="next"', page.get("link"))
        path = join(link[1]) if link else ""
    assert found[: len(names)] == names and found == sorted(found)


# ---- 4.8 deletes


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_deleted_blob_is_gone_at_once(client: Client, repo: str, algorithm: str) -> None:
    name = client.blob(repo, b"deleted " + repo.encode(), algorithm)
    path = f"/v2/{repo}/blobs/{name}"
    assert client.ask("HEAD", path).status == 200
    assert client.ask("DELETE", path).status == 202
    assert client.ask("HEAD", path).status == 404 and client.ask("GET", path).status == 404
    client.blob(repo, b"deleted " + repo.encode(), algorithm)
    assert client.ask("GET", path).body == b"deleted " + repo.encode()


def test_a_deleted_tag_leaves_the_others_and_the_digest(client: Client, repo: str) -> None:
    name, raw = tagged(client, repo, "a", "b", "c")
    assert client.ask("DELETE", f"/v2/{repo}/manifests/a").status == 202
    assert client.manifest(repo, "a", "HEAD").status == 404 and client.manifest(repo, "a").codes == ["MANIFEST_UNKNOWN"]
    for ref in ("b", "c", name):
        assert client.manifest(repo, ref).body == raw
    assert client.ask("GET", f"/v2/{repo}/tags/list").json()["tags"] == ["b", "c"]
    assert client.ask("DELETE", f"/v2/{repo}/manifests/a").status in (404, 202)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_deleted_manifest_takes_its_tags(client: Client, repo: str, algorithm: str) -> None:
    """The tags that were pushed for that digest; a manifest under another algorithm's name is another one and may stay."""
    other, _ = tagged(client, repo, "kept", layer=b"another")
    client.blob(repo, b"tagged")
    raw = image(b"{}", [b"tagged"])
    name = digest(raw, algorithm)
    client.put(repo, f"{name}?tag=a&tag=b", raw)
    assert client.manifest(repo, "a").body == client.manifest(repo, "b").body == raw
    assert client.ask("DELETE", f"/v2/{repo}/manifests/{name}").status == 202
    for ref in ("a", "b", name):
        assert client.manifest(repo, ref, "HEAD").status == 404 and client.manifest(repo, ref).status == 404
    assert client.ask("GET", f"/v2/{repo}/tags/list").json()["tags"] == ["kept"]
    assert client.manifest(repo, other).status == 200
    client.put(repo, "a", raw)
    assert client.manifest(repo, "a").body == raw


def test_a_manifest_deleted_from_an_index_leaves_the_index(client: Client, repo: str) -> None:
    child, raw = tagged(client, repo, "child")
    parent = index([{"mediaType": IMAGE, "digest": child, "size": len(raw)}])
    client.put(repo, "parent", parent, INDEX)
    assert client.ask("DELETE", f"/v2/{repo}/manifests/parent").status == 202
    assert client.manifest(repo, "child").body == raw


# ---- what section 13 adds: routes, methods, concurrency of heads


@pytest.mark.parametrize(
    "path", ["/v2/acme", "/v2/acme/app/nothing/1", "/v2/_nothing", "/v2/acme/app/blobs", "/v2//manifests/1", "/v2/ACME/x/manifests/1"]
)
def test_unknown_routes_answer_in_the_error_form(client: Client, path: str) -> None:
    assert client.ask("GET", path).status in (400, 404, 405)


def test_methods_that_are_not_served(client: Client, repo: str) -> None:
    tagged(client, repo, "1")
    for method, path in (("POST", "manifests/1"), ("PATCH", "manifests/1"), ("PUT", "tags/list"), ("PUT", f"blobs/{RANDOM}")):
        refused = client.ask(method, f"/v2/{repo}/{path}", b"x")
        assert (refused.status, refused.codes) == (405, ["UNSUPPORTED"]), path
        allowed = (refused.get("allow") or "").split(", ")  # RFC 9110 section 15.5.6
        assert method not in allowed and {"GET", "HEAD"} <= set(allowed), path
    for method in client.ask("OPTIONS", f"/v2/{repo}/manifests/1").get("allow").split(", "):
        assert client.ask(method, f"/v2/{repo}/manifests/never").status != 405


def test_a_pull_through_a_mirror_name(client: Client, repo: str) -> None:
    _, raw = tagged(client, repo, "1")
    found = client.ask("GET", f"/v2/{repo}/manifests/1?ns=registry.example")
    assert found.status in (200, 404)
    if found.get("oci-namespace"):
        assert found.get("oci-namespace") == "registry.example"
    if found.status == 200:
        assert found.body == raw


def test_one_connection_carries_many_requests(client: Client, repo: str) -> None:
    """Keep-alive with a HEAD, an error and a body between: a body after HEAD or a wrong length would break the next answer."""
    import http.client

    _, raw = tagged(client, repo, "1")
    connection = http.client.HTTPConnection("127.0.0.1", client.port, timeout=WAIT_S)
    for method, ref, status in (("HEAD", "1", 200), ("GET", "none", 404), ("HEAD", "none", 404), ("GET", "1", 200)):
        path = f"/v2/{repo}/manifests/{ref}"
        connection.request(method, path, headers=dict(client.authorization(method, path)))
        answer = connection.getresponse()
        body = answer.read()
        assert answer.status == status and (body == raw if status == 200 and method == "GET" else True)
    connection.close()
