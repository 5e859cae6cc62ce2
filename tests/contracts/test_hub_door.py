"""The Hugging Face Hub door over HTTP to a real process, on a model that was pushed as an OCI manifest."""

from __future__ import annotations

import hashlib
import json
import os
import re
import socket
from pathlib import Path
from urllib.parse import urlencode, urlsplit

import pytest

from artifact.errors import Invalid
from artifact.manifest import COMMIT, FACTS_TYPE, SOURCE, build_model, canonical_json, digest_of, hub_name
from artifact.store import Descriptor, File
from mirror import plan
from tests.contracts.doors import MANIFEST, Answer, Door, new_site, serving
from tests.contracts.stores import s3_url
from tests.services import rgw

pytestmark = pytest.mark.server
COMMIT_ID = "0123456789abcdef0123456789abcdef01234567"
FILES = {"config.json": b'{"a":1}', "model.safetensors": os.urandom(300_000), "sub/deep/x.txt": b"deep", "sub/y.txt": b"why", "README.md": b"# hi"}


def push(door: Door, name: str, files: dict[str, bytes], ref: str = "main", commit: str = COMMIT_ID) -> str:
    facts = canonical_json({"schema": 1, "tags": ["base_model:x/mistralai"], "card": {"pipeline_tag": "text-generation"}})
    for data in [facts, b"{}", *files.values()]:
        door.blob(name, data)
    listed = [File(p, digest_of(d), len(d), p.endswith(".safetensors")) for p, d in files.items()]
    raw = build_model(listed, Descriptor(FACTS_TYPE, digest_of(facts), len(facts)), {SOURCE: f"hf://{name}", COMMIT: commit})
    done = door.ask("PUT", f"/v2/{name}/manifests/{ref}", raw, Content_Type=MANIFEST)
    assert done.status == 201, done.body
    return digest_of(raw)


@pytest.fixture(scope="module")
def model(door: Door) -> str:
    push(door, "hf/acme/m", FILES)
    return "acme/m"


def sha1(raw: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(raw) + raw).hexdigest()


def test_the_two_sides_of_the_gap_name_a_hub_model_alike() -> None:
    for repo_id in ("Acme/M", "gpt2", "a/b.c", "a/_b", "a/b_", "_/x", "A/b__c", "a/b___c", "a/b-.c", "a/..", "a--b/c", "a/b.git", "a/b/c", ""):
        found = []
        for name in (plan.hub_name, hub_name):
            try:
                found.append(name(repo_id))
            except Invalid:
                found.append("")
        assert found[0] == found[1], repo_id


def test_whoami(door: Door) -> None:
    me = door.ask("GET", "/api/whoami-v2").json()
    assert me["name"] == "acme" and me["auth"]["accessToken"]["displayName"].startswith("key-")
    refused = door.ask("GET", "/api/whoami-v2", who=None)
    assert (refused.status, refused.headers["x-error-message"]) == (401, "Invalid credentials in Authorization header")


@pytest.mark.parametrize("path", ["", "/revision/main", f"/revision/{COMMIT_ID}", "?revision=main", "/revision/main?expand=xetEnabled&expand=sha"])
def test_model_info(door: Door, model: str, path: str) -> None:
    found = door.ask("GET", f"/api/models/{model}{path}").json()
    assert (found["sha"], found["gated"], found["pipeline_tag"]) == (COMMIT_ID, False, "text-generation")
    assert found["tags"] == ["base_model:x/mistralai"] and found["siblings"] == [{"rfilename": p} for p in sorted(FILES)]


def test_model_info_with_blobs(door: Door, model: str) -> None:
    found = {s["rfilename"]: s for s in door.ask("GET", f"/api/models/{model}?blobs=true").json()["siblings"]}
    weights = FILES["model.safetensors"]
    assert found["config.json"] == {"rfilename": "config.json", "size": 7, "blobId": sha1(FILES["config.json"])}
    assert found["model.safetensors"]["lfs"]["sha256"] == hashlib.sha256(weights).hexdigest()


def test_tree(door: Door, model: str) -> None:
    base = f"/api/models/{model}/tree/main"
    whole = door.ask("GET", f"{base}?recursive=True&expand=false").json()
    assert [(n["type"], n["path"]) for n in whole] == [
        ("file", "README.md"),
        ("file", "config.json"),
        ("file", "model.safetensors"),
        ("directory", "sub"),
        ("directory", "sub/deep"),
        ("file", "sub/deep/x.txt"),
        ("file", "sub/y.txt"),
    ]
    pointer = f"version https://git-lfs.github.com/spec/v1\noid {digest_of(FILES['model.safetensors'])}\nsize 300000\n".encode()
    assert whole[2]["oid"] == sha1(pointer) and whole[2]["lfs"]["pointerSize"] == len(pointer)
    assert [n["path"] for n in door.ask("GET", base).json()] == ["README.md", "config.json", "model.safetensors", "sub"]
    assert [n["path"] for n in door.ask("GET", f"{base}/sub").json()] == ["sub/deep", "sub/y.txt"]
    missing = door.ask("GET", f"{base}/none")
    assert (missing.status, missing.headers["x-error-code"], missing.headers["x-repo-commit"]) == (404, "EntryNotFound", COMMIT_ID)


def pages(door: Door, url: str, prefix: str = "") -> list[str]:
    """The paths on all pages of a listing, each under the endpoint that the first was asked at."""
    seen: list[str] = []
    while url:
        found = door.ask("GET", url)
        assert found.status == 200, (url, found.body)
        seen += [n["path"] for n in found.json()]
        told = found.headers.get("link", "")
        link = re.match(rf'<{re.escape(door.url)}({re.escape(prefix)}/api/[^>]+)>; rel="next"$', told)
        assert link or not told, told
        url = link.group(1) if link else ""
    return seen


def test_tree_by_pages(door: Door, model: str) -> None:
    seen = pages(door, f"/api/models/{model}/tree/main?recursive=true&limit=3")
    assert len(seen) == 7 and len(set(seen)) == 7


PLACES = [("/acme", "acme/placed"), ("/acme", "placed"), ("/v1/hf", "acme/placed"), ("/v1/hf/acme", "acme/placed"), ("/v1/hf/acme", "placed")]


@pytest.fixture(scope="module")
def placed(door: Door) -> str:
    """A model with a branch whose name has a slash and with names that need encoding."""
    push(door, "acme/placed", {**FILES, "a b%25/\u00fc+.txt": b"1", "a b%25/z#?.txt": b"2"}, commit="b" * 40)
    assert door.ask("POST", "/api/models/acme/placed/branch/dev%2Fx", "{}", Content_Type="application/json").status == 200
    return "acme/placed"


@pytest.mark.parametrize(("prefix", "repo_id"), PLACES)
def test_an_endpoint_with_a_path_answers_as_the_root_does(door: Door, placed: str, prefix: str, repo_id: str) -> None:
    def told(method: str, before: str, name: str, path: str, body: str | None, who: str) -> tuple[int, bytes, dict[str, str]]:
        found: Answer = door.ask(method, f"{before}{path.format(name)}", body, who, **({"Content_Type": "application/json"} if body else {}))
        return found.status, found.body, {k: v for k, v in found.headers.items() if k not in ("date", "x-request-id")}

    base, paths = "/api/models/{}", json.dumps({"paths": ["config.json", "sub", "none"]})
    asked: list[tuple[str, str, str | None]] = [("GET", base + path, None) for path in ("", "?blobs=true", "/auth-check", "/commits/dev%2Fx")]
    asked += [("GET", base + path, None) for path in ("/refs", "/refs?include_prs=1", "/commits/main", f"/commits/{'b' * 40}", "/commits/none")]
    asked += [("GET", base + path, None) for path in ("/tree/main", "/tree/dev%2Fx/sub", "/tree/main?recursive=true&expand=true", "/tree/main/none")]
    asked += [("POST", base + f"/paths-info/{ref}", paths) for ref in ("main", "dev%2Fx", "none")]
    files = ("main/config.json", "dev%2Fx/model.safetensors", f"{'b' * 40}/a%20b%2525/%C3%BC%2B.txt", "main/none.txt", "none/config.json")
    asked += [(method, "/{}/resolve/" + path, None) for method in ("GET", "HEAD") for path in files]
    statuses = set()
    for method, path, body in asked:
        for who in ("acme", "other"):
            here = told(method, prefix, repo_id, path, body, who)
            assert here == told(method, "", placed, path, body, who), (method, path, who)
            statuses.add(here[0])
    assert statuses == {200, 404}
    sent = door.ask("GET", f"{prefix}/api/models/{repo_id}/xet-write-token/main")
    assert sent.status == 307 and sent.headers["location"].startswith(f"{door.url}{prefix}/api/")


@pytest.mark.parametrize(("prefix", "repo_id"), [("", "acme/placed"), *PLACES])
@pytest.mark.parametrize("ref", ["main", "dev%2Fx", "refs%2Fheads%2Fdev%2Fx", "b" * 40])
def test_the_next_page_is_below_the_same_endpoint(door: Door, placed: str, prefix: str, repo_id: str, ref: str) -> None:
    url = f"{prefix}/api/models/{repo_id}/tree/{ref}"
    whole = pages(door, f"{url}?recursive=true")
    assert len(whole) == 10 and pages(door, f"{url}?recursive=true&limit=4", prefix) == whole
    assert pages(door, f"{url}/a%20b%2525?limit=1&expand=true", prefix) == ["a b%25/z#?.txt", "a b%25/\u00fc+.txt"]
    models = door.ask("GET", f"{prefix}/api/models?limit=1&search=plac").headers["link"]
    assert models.startswith(f"<{door.url}{prefix}/api/models?search=plac&limit=1&cursor=")


def test_the_store_is_where_every_endpoint_leads(tmp_path: Path) -> None:
    env = {"AIRLOCK_BLOBS": s3_url(tmp_path, public=rgw.shared().http.replace("127.0.0.1", "localhost"))}
    with serving(tmp_path / "data", new_site(tmp_path / "data", **env), **env) as door:
        push(door, "acme/placed", FILES)
        seen = set()
        for prefix, repo_id in (("", "acme/placed"), *PLACES):
            sent = door.ask("GET", f"{prefix}/{repo_id}/resolve/main/model.safetensors")
            assert (sent.status, sent.headers["x-repo-commit"], sent.body) == (307, COMMIT_ID, b"")
            seen.add((urlsplit(sent.headers["location"]).netloc, urlsplit(sent.headers["location"]).path, sent.headers["etag"]))
            head = door.ask("HEAD", f"{prefix}/{repo_id}/resolve/main/model.safetensors")
            assert head.status == 200 and head.headers["etag"] == sent.headers["etag"] and "location" not in head.headers
        assert len(seen) == 1 and next(iter(seen))[0].startswith("localhost:")


def test_paths_info(door: Door, model: str) -> None:
    url = f"/api/models/{model}/paths-info/main"
    form = urlencode([("paths", "config.json"), ("paths", "nothing"), ("expand", "False")])
    by_form = door.ask("POST", url, form, Content_Type="application/x-www-form-urlencoded").json()
    by_json = door.ask("POST", url, json.dumps({"paths": ["config.json", "sub"]}), Content_Type="application/json").json()
    assert [n["path"] for n in by_form] == ["config.json"] and [n["path"] for n in by_json] == ["config.json", "sub"]
    assert door.ask("POST", url, "[" * 5000, Content_Type="application/json").status == 400


@pytest.mark.parametrize(("who", "status"), [(None, b"401"), ("other", b"403")])
def test_paths_info_reads_no_body_for_nobody(door: Door, model: str, who: str | None, status: bytes) -> None:
    key = f"Authorization: Bearer {door.keys[who]}\r\n" if who else ""
    head = f"POST /api/models/{model}/paths-info/main HTTP/1.1\r\nHost: x\r\n{key}Content-Type: application/json\r\nExpect: 100-continue\r\n"
    with socket.create_connection(("127.0.0.1", door.port), 30) as sock:
        sock.sendall(f"{head}Content-Length: 4000000\r\n\r\n".encode())  # whoever reads the body asks for it first
        assert sock.recv(12, socket.MSG_WAITALL) == b"HTTP/1.1 " + status


def test_small_routes(door: Door, model: str) -> None:
    refs = door.ask("GET", f"/api/models/{model}/refs?include_prs=1").json()
    assert refs["branches"] == [{"name": "main", "ref": "refs/heads/main", "targetCommit": COMMIT_ID}]
    assert refs["tags"] == refs["converts"] == refs["pullRequests"] == []
    assert door.ask("GET", f"/api/models/{model}/commits/main").json()[0]["id"] == COMMIT_ID
    assert door.ask("GET", f"/api/models/{model}/auth-check").status == 200
    assert door.ask("GET", "/api/agent-harnesses", who=None).json() == {"standardEnvVars": [], "harnesses": {}}
    assert door.ask("HEAD", "/api/telemetry/x/y", who=None).status == 200
    assert door.ask("GET", "/api/datasets/acme/m").headers["x-error-code"] == "RepoNotFound"


@pytest.mark.parametrize("path", sorted(FILES))
@pytest.mark.parametrize("ref", ["main", COMMIT_ID])
def test_resolve(door: Door, model: str, ref: str, path: str) -> None:
    data = FILES[path]
    etag = hashlib.sha256(data).hexdigest() if path.endswith(".safetensors") else sha1(data)
    head, read = (door.ask(m, f"/{model}/resolve/{ref}/{path}", Accept_Encoding="gzip, deflate") for m in ("HEAD", "GET"))
    assert (head.status, head.body, read.status, read.body) == (200, b"", 200, data)
    for found in (head, read):
        assert found.headers["x-repo-commit"] == COMMIT_ID and found.headers["etag"] == found.headers["x-linked-etag"] == f'"{etag}"'
        assert found.headers["content-length"] == found.headers["x-linked-size"] == str(len(data))
        assert found.headers["accept-ranges"] == "bytes" and "content-encoding" not in found.headers


def test_resolve_ranges(door: Door, model: str) -> None:
    url, data = f"/{model}/resolve/main/model.safetensors", FILES["model.safetensors"]
    part = door.ask("GET", url, Range="bytes=100000-")
    assert (part.status, part.headers["content-range"], part.body) == (206, "bytes 100000-299999/300000", data[100_000:])
    head = door.ask("GET", url, Range="bytes=0-100")
    assert head.body == data[:101]
    refused = door.ask("GET", url, Range="bytes=300000-")
    assert (refused.status, refused.headers["content-range"]) == (416, "bytes */300000")


def test_ranges_at_the_edges(door: Door) -> None:
    push(door, "hf/acme/edges", {"empty": b"", "four": b"1234"}, commit="e" * 40)
    for value, status, body, told in (
        ("bytes=0-", 206, b"1234", "bytes 0-3/4"),
        ("bytes=-2", 206, b"34", "bytes 2-3/4"),
        ("bytes=-9", 206, b"1234", "bytes 0-3/4"),
        ("bytes=3-99", 206, b"4", "bytes 3-3/4"),
        ("bytes=4-", 416, None, "bytes */4"),
        ("bytes=-0", 416, None, "bytes */4"),
        ("bytes=3-1", 416, None, "bytes */4"),
        ("bytes=0-0,2-3", 200, b"1234", None),  # several parts: the whole, as RFC 9110 allows
        ("bytes=x-", 200, b"1234", None),
        ("lines=0-1", 200, b"1234", None),
    ):
        found = door.ask("GET", "/acme/edges/resolve/main/four", Range=value)
        assert (found.status, found.headers.get("content-range")) == (status, told) and body in (None, found.body), value
        assert door.ask("HEAD", "/acme/edges/resolve/main/four", Range=value).status == 200  # a range is for GET alone
    assert door.ask("GET", "/acme/edges/resolve/main/empty").headers["content-length"] == "0"
    none = door.ask("GET", "/acme/edges/resolve/main/empty", Range="bytes=0-")
    assert (none.status, none.headers["content-range"]) == (416, "bytes */0")


def test_nothing_tells_of_xet(door: Door, model: str) -> None:
    for path in (
        f"/api/models/{model}?blobs=true&expand=xetEnabled",
        f"/api/models/{model}/tree/main?recursive=true&expand=true",
        f"/{model}/resolve/main/a",
    ):
        found = door.ask("GET", path)
        assert b"xetHash" not in found.body and not [k for k in found.headers if "xet" in k]
    for path in FILES:
        assert not [k for k in door.ask("HEAD", f"/{model}/resolve/main/{path}").headers if "xet" in k or k == "link"]


def test_a_tree_with_more_told(door: Door, model: str) -> None:
    found = door.ask("GET", f"/api/models/{model}/tree/main?expand=True").json()
    assert {n["lastCommit"]["id"] for n in found} == {COMMIT_ID} and found[0]["securityFileStatus"]["status"] == "unscanned"
    assert "lastCommit" not in door.ask("GET", f"/api/models/{model}/tree/main?expand=false").json()[0]


def test_models_are_listed_to_who_sees_them(door: Door, model: str) -> None:
    def ids(query: str, who: str = "acme") -> list[str]:
        return [m["id"] for m in door.ask("GET", f"/api/models{query}", who=who).json()]

    assert model in ids("?author=ACME&limit=1000") and model in ids("?search=CME/m") and ids("?search=nothing") == []
    page = door.ask("GET", "/api/models?limit=1")
    assert page.headers["link"].startswith(f"<{door.url}/api/models?limit=1&cursor=") and page.headers["link"].endswith('>; rel="next"')
    assert door.ask("GET", "/api/models", who=None).status == 401


@pytest.mark.parametrize(
    "path", ["%2e%2e/x", "..%2fx", "a%00b", "%2fetc/passwd", ".git/config", "a%5cb", "%ff", "a%0ab", "x" * 1100, "%ed%a0%80", "config.json/"]
)
def test_hostile_paths_are_absent_entries(door: Door, model: str, path: str) -> None:
    for method in ("HEAD", "GET"):
        found = door.ask(method, f"/{model}/resolve/main/{path}")
        assert (found.status, found.headers["x-error-code"], found.headers["x-repo-commit"]) == (404, "EntryNotFound", COMMIT_ID)


@pytest.mark.parametrize(
    "ref", ["..%2f..%2fx", "a%00b", "%ff", "refs%2Fpr%2F1", "x" * 300, "sha256:" + "0" * 64, "%ed%a0%80", "HEAD", "refs%2Fheads%2F"]
)
def test_hostile_revisions_are_absent_revisions(door: Door, model: str, ref: str) -> None:
    found = door.ask("GET", f"/{model}/resolve/{ref}/config.json")
    assert (found.status, found.headers["x-error-code"]) == (404, "RevisionNotFound")
    assert door.ask("GET", f"/api/models/{model}/revision/{ref}").status == 404


@pytest.mark.parametrize(
    "repo", ["a--b/c", "..%2f..", "acme%00/m", "%ff/m", "acme/m.git", "a" * 97 + "/m", "acme/../m", "acme//m", ".%2f.", "v2/x", "airlock%2fv1/x"]
)
def test_hostile_ids_are_absent_repositories(door: Door, model: str, repo: str) -> None:
    for path in (f"/api/models/{repo}", f"/api/models/{repo}/tree/main", f"/api/models/{repo}/resolve/main/x"):
        found = door.ask("GET", path)
        assert (found.status, found.headers["x-error-code"]) == (404, "RepoNotFound"), path


def test_gated_and_private_by_key(door: Door, model: str) -> None:
    """One who sees the name and may not read it is told that it is gated; to who does not see it, it is not there; listing a page changes nothing."""
    push(door, "acme/inner", {"a.txt": b"x"}, commit="d" * 40)
    for path in ("/api/models/acme/inner", "/api/models/acme/inner/auth-check", "/acme/inner/resolve/main/a.txt", "/api/models/acme/inner/tree/main"):
        for who, status, code in (
            ("acme", 200, None),
            ("reader", 403, "GatedRepo"),
            ("other", 404, "RepoNotFound"),
            (None, 401, None),
            ("expired", 401, None),
        ):
            for method in ("GET", "HEAD"):
                found = door.ask(method, path, who=who)
                assert (found.status, found.headers.get("x-error-code")) == (status, code), (path, who)
    assert door.ask("PUT", "/api/models/acme/inner").status == 405 and door.ask("POST", "/api/models/acme/inner/settings").status == 501


def test_refusals_have_the_code_that_clients_know(door: Door, model: str) -> None:
    cases = [
        (f"/{model}/resolve/main/none.json", "acme", 404, "EntryNotFound"),
        (f"/{model}/resolve/main/../x", "acme", 404, "EntryNotFound"),
        (f"/{model}/resolve/none/config.json", "acme", 404, "RevisionNotFound"),
        (f"/api/models/{model}/revision/refs%2Fpr%2F1", "acme", 404, "RevisionNotFound"),
        ("/api/models/acme/none", "acme", 404, "RepoNotFound"),
        ("/api/models/a--b/c", "acme", 404, "RepoNotFound"),
        ("/acme/none/resolve/main/config.json", "acme", 404, "RepoNotFound"),
        (f"/{model}/resolve/main/config.json", "other", 403, "GatedRepo"),
        (f"/{model}/resolve/main/config.json", None, 401, None),
        (f"/{model}/resolve/main/config.json", "expired", 401, None),
    ]
    for path, who, status, code in cases:
        found = door.ask("GET", path, who=who)
        assert (found.status, found.headers.get("x-error-code")) == (status, code), path
        if code == "EntryNotFound":
            assert found.headers["x-repo-commit"] == COMMIT_ID
    assert "expired on 20" in door.ask("GET", f"/{model}/resolve/main/config.json", who="expired").json()["error"]
    assert "no grant of this key covers hf/acme/m" in door.ask("GET", f"/api/models/{model}", who="other").headers["x-error-message"]


def test_names_in_other_case_and_the_exact_name_first(door: Door, model: str) -> None:
    assert door.ask("GET", "/api/models/ACME/M").json()["sha"] == COMMIT_ID
    assert door.ask("GET", "/hf/acme/m/resolve/main/config.json").body == FILES["config.json"]
    own = "f" * 40
    push(door, "acme/own", {"a.txt": b"own"}, ref="1", commit=own)
    assert door.ask("GET", "/api/models/acme/own/revision/1").json()["sha"] == own
    assert door.ask("GET", "/acme/own/resolve/main/a.txt").body == b"own"


def test_admin_routes(door: Door, model: str) -> None:
    assert door.ask("GET", "/healthz", who=None).json() == {"status": "ok"}
    me = door.ask("GET", "/airlock/v1/whoami").json()
    assert me["org"] == "acme" and set(me) == {"key_id", "org", "tier", "expires"}
    refused = door.ask("GET", "/airlock/v1/whoami", who="expired")
    assert refused.status == 401 and refused.json()["reason"] == "key_expired" and refused.json()["error"] == "unauthenticated"
    names = [i["name"] for i in door.ask("GET", "/airlock/v1/catalog?limit=1000").json()["items"]]
    assert "hf/acme/m" in names
    shown = door.ask("GET", "/airlock/v1/catalog/hf/acme/m").json()
    assert shown["refs"][0]["files"] == len(FILES)
    assert door.ask("GET", "/airlock/v1/catalog/acme/own", who="other").status == 404
    assert door.ask("POST", "/airlock/v1/leases", "{", Content_Type="application/json").json()["error"] == "invalid"
    assert door.ask("POST", "/airlock/v1/leases", "{}", who=None).status == 401
    assert door.ask("GET", "/airlock/v1/none").status == 404
