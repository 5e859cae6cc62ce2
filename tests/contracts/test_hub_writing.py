"""The Hub door's writing routes over HTTP to a real process: each refusal with the code that clients know, and nothing kept of what is refused."""

from __future__ import annotations

import base64
import hashlib
import json
import os
from typing import Any
from urllib.parse import urlsplit

import pytest

from artifact.manifest import MODEL_TYPE, digest_of, parse_manifest
from tests.contracts.doors import Answer, Door, sha
from tests.contracts.test_hub_door import sha1

pytestmark = pytest.mark.server
PART = 64 * 1024 * 1024


def post(door: Door, path: str, body: object, who: str | None = "acme", method: str = "POST", **headers: str) -> Answer:
    return door.ask(method, path, json.dumps(body), who, Content_Type="application/json", **headers)


def commit(
    door: Door, repo: str, *lines: tuple[str, dict[str, Any]], who: str = "acme", ref: str = "main", parent: str = "", prefix: str = ""
) -> Answer:
    header: dict[str, Any] = {"summary": "words", "description": ""} | ({"parentCommit": parent} if parent else {})
    text = "\n".join(json.dumps({"key": k, "value": v}) for k, v in (("header", header), *lines))
    return door.ask("POST", f"{prefix}/api/models/{repo}/commit/{ref}", text, who, Content_Type="application/x-ndjson")


def regular(path: str, raw: bytes) -> tuple[str, dict[str, Any]]:
    return "file", {"path": path, "content": base64.b64encode(raw).decode(), "encoding": "base64"}


def large(path: str, raw: bytes, **more: Any) -> tuple[str, dict[str, Any]]:
    return "lfsFile", {"path": path, "algo": "sha256", "oid": hashlib.sha256(raw).hexdigest(), "size": len(raw)} | more


def batch(door: Door, repo: str, *objects: dict[str, Any], who: str | None = "acme", **more: Any) -> Answer:
    body = {"operation": "upload", "transfers": ["basic", "multipart"], "objects": list(objects), "hash_algo": "sha256"} | more
    return door.ask("POST", f"/{repo}.git/info/lfs/objects/batch", json.dumps(body), who, Content_Type="application/vnd.git-lfs+json")


def oid_of(raw: bytes) -> dict[str, Any]:
    return {"oid": hashlib.sha256(raw).hexdigest(), "size": len(raw)}


def path_of(href: str) -> str:
    return href.split("/", 3)[3].join(("/", ""))


def actions(door: Door, repo: str, raw: bytes) -> dict[str, Any]:
    found = batch(door, repo, oid_of(raw)).json()["objects"][0]
    return dict(found["actions"])


def put_lfs(door: Door, repo: str, raw: bytes) -> None:
    href = actions(door, repo, raw)["upload"]["href"]
    assert door.ask("PUT", path_of(href), raw, who=None).status == 200


def make(door: Door, repo: str) -> str:
    org, name = repo.split("/")
    made = post(door, "/api/repos/create", {"name": name, "organization": org, "type": "model"})
    assert made.status == 200, made.body
    return repo


def names(door: Door, repo: str, ref: str = "main") -> list[str]:
    return [s["rfilename"] for s in door.ask("GET", f"/api/models/{repo}/revision/{ref}").json()["siblings"]]


def test_create(door: Door) -> None:
    made = post(door, "/api/repos/create", {"name": "First-Model", "organization": "acme", "visibility": "private", "surprise": 1})
    assert made.json() == {"url": f"{door.url}/acme/First-Model", "name": "acme/First-Model", "id": "0"}
    again = post(door, "/api/repos/create", {"name": "first-model", "organization": "Acme", "type": "model"})
    assert (again.status, again.json()["url"]) == (409, f"{door.url}/Acme/first-model") and "You already created" in again.json()["error"]
    info = door.ask("GET", "/api/models/ACME/first-model").json()
    assert (info["id"], info["siblings"], info["private"], len(info["sha"])) == ("acme/First-Model", [], True, 40)
    own = post(door, "/api/repos/create", {"name": "mine", "organization": None})
    assert own.json()["name"] == "acme/mine"
    for body, status in (
        ({"name": "a--b", "organization": "acme"}, 404),
        ({"name": "..", "organization": "acme"}, 404),
        ({"name": "x", "organization": "acme", "type": "dataset"}, 501),
        ({"name": 7}, 400),
        ({"name": "x", "organization": "nobody"}, 404),
        ({"name": "x", "organization": "other"}, 404),
        ({"name": "x", "organization": "api"}, 400),
    ):
        assert post(door, "/api/repos/create", body).status == status, body
    assert post(door, "/api/repos/create", {"name": "x"}, who=None).status == 401
    assert post(door, "/api/repos/create", {"name": "x"}, who="reader").status == 403
    assert door.ask("POST", "/api/repos/create", "{", Content_Type="application/json").status == 400
    assert post(door, "/api/repos/move", {"fromRepo": "acme/mine", "toRepo": "acme/yours"}).status == 501


def test_validate_yaml(door: Door) -> None:
    def said(content: object) -> Any:
        return post(door, "/api/validate-yaml", {"content": content, "repoType": "model"}).json()

    assert said("---\nlicense: mit\n---\n# hi") == {"errors": [], "warnings": []} == said("no head") == said(7)
    assert said("---\na: [\n---\n")["errors"] == [] and "YAML" in said("---\na: [\n---\n")["warnings"][0]["message"]


def test_preupload_tells_modes_and_what_is_there(door: Door) -> None:
    repo = make(door, "acme/pre")
    weights = os.urandom(2000)
    put_lfs(door, repo, weights)
    assert commit(door, repo, regular("config.json", b"{}"), large("model.safetensors", weights)).status == 200
    asked = [
        {"path": p, "sample": "", "size": s} for p, s in (("config.json", 2), ("model.safetensors", 2000), ("big.json", 11 << 20), ("new.bin", 0))
    ]
    found = post(door, f"/api/models/{repo}/preupload/main", {"files": asked, "gitIgnore": "*.tmp"}).json()["files"]
    assert [(f["uploadMode"], f["oid"], f["shouldIgnore"]) for f in found] == [
        ("regular", sha1(b"{}"), False),
        ("lfs", hashlib.sha256(weights).hexdigest(), False),
        ("lfs", None, False),
        ("lfs", None, False),
    ]
    for body in (
        {},
        {"files": 7},
        {"files": [7]},
        {"files": [{"path": 1}]},
        {"files": [{"path": "x", "size": -1}]},
        {"files": [{"path": "../x", "size": 1}]},
    ):
        assert post(door, f"/api/models/{repo}/preupload/main", body).status == 400, body
    huge = post(door, f"/api/models/{repo}/preupload/main", {"files": [{"path": "w.safetensors", "size": 50_000_000_001}]})
    assert "files above 50 GB" in huge.headers["x-hf-warning"] and "shards" in huge.headers["x-hf-warning"]
    assert post(door, "/api/models/acme/absent/preupload/main", {"files": []}).headers["x-error-code"] == "RepoNotFound"
    assert post(door, f"/api/models/{repo}/preupload/none", {"files": []}).headers["x-error-code"] == "RevisionNotFound"


def test_what_is_committed_is_the_same_model_at_every_door(door: Door) -> None:
    repo, weights = make(door, "acme/same"), os.urandom(300_000)
    put_lfs(door, repo, weights)
    made = commit(
        door, repo, regular("config.json", b'{"a":1}'), regular("sub/a b.txt", b"x"), regular("empty", b""), large("w.safetensors", weights)
    )
    assert made.status == 200, made.body
    oid = made.json()["commitOid"]
    assert made.json() == {"success": True, "commitOid": oid, "commitUrl": f"{door.url}/{repo}/commit/{oid}", "hookOutput": ""}
    raw = door.ask("GET", f"/v2/{repo}/manifests/main").body
    manifest = parse_manifest(raw)
    assert manifest.artifact_type == MODEL_TYPE and [d.digest for d in manifest.layers[:-1]] == [sha(b'{"a":1}'), sha(b""), sha(b"x"), sha(weights)]
    assert door.ask("GET", f"/v2/{repo}/blobs/{sha(weights)}").body == weights
    for path, data in (("config.json", b'{"a":1}'), ("w.safetensors", weights), ("sub/a%20b.txt", b"x"), ("empty", b"")):
        found = door.ask("GET", f"/{repo}/resolve/{oid}/{path}")
        assert found.body == data and found.headers["x-linked-etag"].strip('"') == (
            hashlib.sha256(data).hexdigest() if data == weights else sha1(data)
        )
    assert commit(door, repo, regular("config.json", b'{"a":1}')).json()["commitOid"] == oid  # nothing new
    shown = door.ask("GET", f"/airlock/v1/catalog/{repo}").json()
    assert [(r["ref"], r["files"], r["commit"]) for r in shown["refs"]] == [("main", 4, oid)]
    gone = commit(door, repo, ("deletedFolder", {"path": "sub/"}), ("deletedFile", {"path": "empty"}), parent=oid)
    assert gone.status == 200 and names(door, repo) == ["config.json", "w.safetensors"] and len(names(door, repo, oid)) == 4
    again = commit(door, repo, ("deletedFolder", {"path": "sub/"}), ("deletedFile", {"path": "empty"}), parent=oid)
    assert again.json()["commitOid"] == gone.json()["commitOid"]
    listed = door.ask("GET", f"/api/models/{repo}/commits/main").json()
    assert [c["id"] for c in listed][:2] == [gone.json()["commitOid"], oid] and listed[0]["title"] == "words" and len(listed) == 3
    copied = commit(door, repo, ("lfsFile", {"path": "copy.safetensors", "algo": "sha256", "oid": hashlib.sha256(weights).hexdigest()}))
    assert copied.status == 200 and door.ask("GET", f"/{repo}/resolve/main/copy.safetensors").body == weights


def test_commits_that_are_refused(door: Door) -> None:
    repo = make(door, "acme/refused")
    first = commit(door, repo, regular("a.txt", b"a")).json()["commitOid"]
    second = commit(door, repo, regular("b.txt", b"b")).json()["commitOid"]
    moved = commit(door, repo, regular("c.txt", b"c"), parent=first)
    assert moved.status == 412 and second in moved.headers["x-error-message"]
    cases: list[tuple[tuple[tuple[str, Any], ...], int, str | None]] = [
        ((("deletedFile", {"path": "none.txt"}),), 404, "EntryNotFound"),
        ((large("w.bin", b"never sent"),), 404, "RepoNotFound"),
        ((regular("../x", b""),), 400, None),
        ((regular(".git/config", b""),), 400, None),
        ((regular("A.txt", b"case"),), 400, None),
        ((regular("a.txt/b", b"folder"),), 400, None),
        ((("file", {"path": "x", "content": "%%%"}),), 400, None),
        ((("file", {"path": "x", "content": "aGk=", "encoding": "utf-8"}),), 400, None),
        ((("file", {"content": ""}),), 400, None),
        ((("lfsFile", {"path": "x", "oid": "zz", "size": 1}),), 400, None),
        ((("surprise", {"path": "x"}),), 400, None),
    ]
    for lines, status, code in cases:
        found = commit(door, repo, *lines)
        assert (found.status, found.headers.get("x-error-code")) == (status, code), (lines, found.body)
    url = f"/api/models/{repo}/commit/main"
    for text in ("", "{", "[]", '{"key":"file"}', '{"key":"header","value":{"summary":7}}', "\n\n"):
        assert door.ask("POST", url, text, Content_Type="application/x-ndjson").status == 400, text
    assert commit(door, repo, regular("x", b""), ref="none").headers["x-error-code"] == "RevisionNotFound"
    assert commit(door, "acme/absent2", regular("x", b"")).headers["x-error-code"] == "RepoNotFound"
    assert post(door, url + "?create_pr=1", {}).status == 501
    reader = commit(door, repo, regular("x", b""), who="reader")
    assert reader.status == 403 and "x-error-code" not in reader.headers
    assert commit(door, repo, regular("x", b""), who="other").status == 404
    assert names(door, repo) == ["a.txt", "b.txt"]


def test_ten_thousand_files_are_taken_and_one_more_is_refused_with_the_number(door: Door) -> None:
    repo = make(door, "acme/many")
    assert commit(door, repo, regular("f/0.txt", b"same")).status == 200
    lines = [large(f"f/{n}.txt", b"same") for n in range(1, 10_000)]
    assert commit(door, repo, *lines).status == 200
    seen, url = 0, f"/api/models/{repo}/tree/main?recursive=true"
    while url:
        page = door.ask("GET", url)
        seen += len([n for n in page.json() if n["type"] == "file"])
        url = path_of(page.headers["link"][1:].split(">")[0]) if "link" in page.headers else ""
    assert seen == 10_000
    refused = commit(door, repo, regular("one.more", b""))
    assert refused.status == 422 and "10001 files" in refused.headers["x-error-message"]


def test_a_basic_upload(door: Door) -> None:
    repo, data = make(door, "acme/basic"), os.urandom(100_000)
    offered = actions(door, repo, data)
    href = path_of(offered["upload"]["href"])
    for wrong in (data[:-1], data + b"x", os.urandom(100_000)):
        assert door.ask("PUT", href, wrong, who=None).status == 400
    assert "actions" in batch(door, repo, oid_of(data)).json()["objects"][0]  # nothing of them was kept
    assert commit(door, repo, large("w.bin", data)).status == 404
    verify = path_of(offered["verify"]["href"])
    assert post(door, verify, oid_of(data)).status == 404
    for _ in range(2):  # a repeated PUT is no error
        assert door.ask("PUT", href, data, who=None).status == 200
    assert post(door, verify, oid_of(data)).status == 200 and post(door, verify, oid_of(data) | {"size": 1}).status == 400
    assert post(door, verify, oid_of(data), who=None).status == 401 and post(door, verify, oid_of(data), who="reader").status == 403
    assert "actions" not in batch(door, repo, oid_of(data)).json()["objects"][0]
    assert batch(door, repo, oid_of(data) | {"size": 1}).json()["objects"][0]["error"]["code"] == 422
    token = urlsplit(offered["upload"]["href"]).query
    for path in (href.replace(repo, "acme/other", 1), href):
        assert door.ask("PUT", path.replace(oid_of(data)["oid"], "0" * 64), b"", who=None).status == 404
    assert door.ask("PUT", href.replace(token, token[:-2]), data, who=None).status == 401
    assert door.ask("PUT", href.split("?")[0], data, who="acme").status == 404
    assert door.ask("GET", href, who=None).status == 404
    assert door.keys["acme"] not in door.log.read_text() and "upl1." not in door.log.read_text()


def test_batches_that_are_refused(door: Door) -> None:
    repo = make(door, "acme/batch")
    one = oid_of(b"one")
    assert batch(door, repo, one, operation="download").status == 501 and batch(door, repo, one, hash_algo="sha1").status == 501
    for wrong in (
        {"oid": "x", "size": 1},
        {"oid": "A" * 64, "size": 1},
        {"oid": one["oid"]},
        {"oid": one["oid"], "size": -1},
        {"oid": one["oid"], "size": 1 << 63},
    ):
        assert batch(door, repo, wrong).status == 400, wrong
    assert batch(door, repo, *[one] * 1001).status == 400 and batch(door, repo, one, objects=7).status == 400
    assert batch(door, repo, one, who=None).status == 401 and batch(door, repo, one, who="reader").status == 403
    assert batch(door, repo, one, who="other").status == 404 and batch(door, "acme/absent3", one).status == 404
    assert batch(door, repo, one, transfers=["basic", "multipart", "xet"]).json()["transfer"] == "basic"


def test_an_upload_in_parts_goes_on_where_it_was(door: Door) -> None:
    repo, data = make(door, "acme/parts"), os.urandom(PART) + os.urandom(PART) + b"the rest"
    upload = actions(door, repo, data)["upload"]
    assert upload["header"]["chunk_size"] == str(PART) and [k for k in upload["header"] if k.isdigit()] == ["1", "2", "3"]
    urls = {int(k): path_of(v) for k, v in upload["header"].items() if k.isdigit()}
    parts = {1: data[:PART], 2: data[PART : 2 * PART], 3: data[2 * PART :]}
    assert door.ask("PUT", urls[2], parts[2], who=None).status == 409  # the first one is missing
    assert door.ask("PUT", urls[1], parts[1][:-1], who=None).status == 400
    assert door.ask("POST", path_of(upload["href"]), "{}", who=None).status == 400
    upload = actions(door, repo, data)["upload"]
    urls = {int(k): path_of(v) for k, v in upload["header"].items() if k.isdigit()}
    for number in (1, 1, 2, 1, 2, 3, 3):  # each may come again
        found = door.ask("PUT", urls[number], parts[number], who=None)
        assert found.status == 200 and found.headers["etag"], (number, found.body)
    for _ in range(2):
        assert door.ask("POST", path_of(upload["href"]), json.dumps({"oid": oid_of(data)["oid"], "parts": []}), who=None).status == 200
    assert commit(door, repo, large("w.safetensors", data)).status == 200
    assert digest_of(door.ask("GET", f"/{repo}/resolve/main/w.safetensors").body) == digest_of(data)


def test_branches_and_tags(door: Door) -> None:
    repo = make(door, "acme/refs")
    first = commit(door, repo, regular("a.txt", b"a")).json()["commitOid"]
    base = f"/api/models/{repo}"
    assert post(door, f"{base}/branch/dev%2Fx", {"startingPoint": first}).status == 200
    assert post(door, f"{base}/branch/dev%2Fx", {}).status == 409 and post(door, f"{base}/branch/bad", {"startingPoint": "none"}).status == 404
    assert (
        post(door, f"{base}/tag/main", {"tag": "v1", "message": "words"}).status == 200
        and post(door, f"{base}/tag/main", {"tag": "v1"}).status == 409
    )
    second = commit(door, repo, regular("b.txt", b"b"), ref="dev%2Fx").json()["commitOid"]
    refs = door.ask("GET", f"{base}/refs").json()
    assert refs["branches"] == [
        {"name": "dev/x", "ref": "refs/heads/dev/x", "targetCommit": second},
        {"name": "main", "ref": "refs/heads/main", "targetCommit": first},
    ]
    assert refs["tags"] == [{"name": "v1", "ref": "refs/tags/v1", "targetCommit": first}]
    assert door.ask("GET", f"/{repo}/resolve/refs%2Fheads%2Fdev%2Fx/b.txt").body == b"b"
    assert post(door, f"{base}/branch/main", {"startingPoint": "dev/x", "overwrite": True}).status == 200 and names(door, repo) == ["a.txt", "b.txt"]
    assert commit(door, repo, regular("c.txt", b"c"), ref="v1").status == 400  # a tag is no branch
    assert door.ask("DELETE", f"{base}/tag/dev%2Fx").status == 404 and door.ask("DELETE", f"{base}/branch/main").status == 409
    assert door.ask("DELETE", f"{base}/branch/dev%2Fx").status == 200 and door.ask("DELETE", f"{base}/tag/v1").status == 200
    assert door.ask("DELETE", f"{base}/tag/v1").status == 404 and door.ask("PUT", f"{base}/tag/v1").status == 405
    assert [b["name"] for b in door.ask("GET", f"{base}/refs").json()["branches"]] == ["main"]


def test_a_repository_is_removed_by_its_administrator(door: Door) -> None:
    repo = make(door, "acme/gone")
    assert commit(door, repo, regular("a.txt", b"a")).status == 200
    body = {"name": "gone", "organization": "acme", "type": "model"}
    assert post(door, "/api/repos/delete", body, who="reader", method="DELETE").status == 403
    assert post(door, "/api/repos/delete", body, method="DELETE").status == 200
    assert door.ask("GET", f"/api/models/{repo}").headers["x-error-code"] in ("RepoNotFound", "RevisionNotFound")
    assert post(door, "/api/repos/delete", body | {"name": "never"}, method="DELETE").headers["x-error-code"] == "RepoNotFound"


def test_xet_clients_are_told_what_to_set(door: Door) -> None:
    repo = make(door, "acme/xet")
    told = door.ask("GET", f"/api/models/{repo}/xet-write-token/main")
    assert told.status == 307 and "HF_HUB_DISABLE_XET=1" in told.headers["location"]
    assert door.ask("GET", path_of(told.headers["location"])).status == 404
    assert door.ask("GET", f"/api/models/{repo}/xet-read-token/main").status == 404


@pytest.mark.parametrize("prefix", ["/acme", "/v1/hf", "/v1/hf/acme"])
def test_endpoints_with_a_path(door: Door, prefix: str) -> None:
    repo = "Path" + prefix.replace("/", "-").replace(".", "")
    made = post(door, f"{prefix}/api/repos/create", {"name": repo, "organization": None}).json()
    assert made["url"] == f"{door.url}{prefix}/acme/{repo}"
    short = repo if prefix.endswith("acme") else f"acme/{repo}"
    done = commit(door, short, regular("a.txt", b"a"), prefix=prefix).json()
    assert done["commitUrl"].startswith(f"{door.url}{prefix}/acme/{repo}/commit/")
    for repo_id in {short, f"acme/{repo}"}:
        info = door.ask("GET", f"{prefix}/api/models/{repo_id}").json()
        assert info["id"] == f"acme/{repo}" and door.ask("GET", f"{prefix}/{repo_id}/resolve/main/a.txt").body == b"a"
        page = door.ask("GET", f"{prefix}/api/models/{repo_id}/tree/main?limit=1&recursive=true")
        assert [n["path"] for n in page.json()] == ["a.txt"]
    offered = door.ask("POST", f"{prefix}/{short}.git/info/lfs/objects/batch", json.dumps({"operation": "upload", "objects": [oid_of(b"w")]}))
    href = offered.json()["objects"][0]["actions"]["upload"]["href"]
    assert href.startswith(f"{door.url}{prefix}/{short}.git/") and door.ask("PUT", path_of(href), b"w", who=None).status == 200
    assert door.ask("GET", f"{prefix}/api/whoami-v2").json()["auth"]["accessToken"]["role"] == "write"
    assert door.ask("GET", f"{prefix}/api/agent-harnesses", who=None).status == 200


def test_an_organisations_copy_comes_first_below_its_endpoint_alone(door: Door) -> None:
    from tests.contracts.test_hub_door import push

    push(door, "hf/maker/tiny", {"a.txt": b"the maker's"})
    push(door, "acme/maker/tiny", {"a.txt": b"our copy"}, commit="c" * 40)
    push(door, "hf/solo", {"a.txt": b"solo"})
    assert door.ask("GET", "/maker/tiny/resolve/main/a.txt").body == b"the maker's"
    assert door.ask("GET", "/acme/maker/tiny/resolve/main/a.txt").body == b"our copy"
    assert door.ask("GET", "/acme/api/models/maker/tiny").json()["sha"] == "c" * 40 != door.ask("GET", "/api/models/maker/tiny").json()["sha"]
    assert door.ask("GET", "/solo/resolve/main/a.txt").body == b"solo"
    assert door.ask("GET", "/acme/solo/resolve/main/a.txt").status == 404  # an id of two parts is never another's of one
