"""What changes between two requests of a client: a listing, then files that were replaced, at the Hub, NGC and S3 doors of one registry.

Whoever names what the listing named gets the old bytes; whoever names the branch, version or key gets the new ones, never the name of one with the
bytes of the other. And ranges of objects without a byte, which each door has a protocol's own word for.
"""

from __future__ import annotations

import base64
import hashlib
import re
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from blake3 import blake3

from tests.contracts.doors import Answer, sha
from tests.contracts.ngc import new_ngc_site
from tests.contracts.s3 import BUCKET, S3Door, key_of, refused, s3_serving
from tests.contracts.test_hub_door import sha1
from tests.contracts.test_hub_writing import commit, large, make, put_lfs, regular

pytestmark = pytest.mark.server
OLD = {"config.json": b'{"a":1}', "gone.txt": b"only the old one has it", "same.txt": b"same", "sub/weights.bin": b"old weights" * 1000}
NEW = {"config.json": b'{"a":22}', "more.txt": b"only the new one has it", "same.txt": b"same", "sub/weights.bin": b"new weights" * 900}


@pytest.fixture(scope="module")
def door(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Door]:
    data = tmp_path_factory.mktemp("moving") / "data"
    with s3_serving(data, new_ngc_site(data)) as found:
        yield found


def put(door: S3Door, repo: str, files: dict[str, bytes], gone: tuple[str, ...] = ()) -> str:
    """Commits files to `main` as hub clients do, and says which commit it is at."""
    put_lfs(door.main, repo, files["sub/weights.bin"])
    lines = [large(path, raw) if path.endswith(".bin") else regular(path, raw) for path, raw in files.items()]
    done = commit(door.main, repo, *lines, *(("deletedFile", {"path": path}) for path in gone))
    assert done.status == 200, done.body
    return str(done.json()["commitOid"])


def etag_of(path: str, raw: bytes) -> str:
    return f'"{hashlib.sha256(raw).hexdigest() if path.endswith(".bin") else sha1(raw)}"'


def resolved(door: S3Door, repo: str, ref: str, at: str, files: dict[str, bytes]) -> None:
    """A revision has exactly these files, by HEAD and by GET."""
    for path, raw in files.items():
        head, got = (door.main.ask(method, f"/{repo}/resolve/{ref}/{path}") for method in ("HEAD", "GET"))
        assert got.body == raw and head.headers["content-length"] == str(len(raw)), (ref, path)
        for found in (head, got):
            assert (found.headers["x-repo-commit"], found.headers["etag"]) == (at, etag_of(path, raw)), (ref, path)
    for path in {*OLD, *NEW} - {*files}:
        found = door.main.ask("HEAD", f"/{repo}/resolve/{ref}/{path}")
        assert (found.status, found.headers["x-error-code"], found.headers["x-repo-commit"]) == (404, "EntryNotFound", at)


# ---- the Hub door


def test_a_branch_that_moves_between_tree_and_resolve(door: S3Door) -> None:
    repo = make(door.main, "acme/moved")
    first = put(door, repo, OLD)
    info = door.main.ask("GET", f"/api/models/{repo}").json()
    page = door.main.ask("GET", f"/api/models/{repo}/tree/main?recursive=true&limit=2")
    listed = page.json()
    assert info["sha"] == page.headers["x-repo-commit"] == first
    second = put(door, repo, NEW, ("gone.txt",))
    assert second != first
    while link := re.match(rf'<{re.escape(door.main.url)}([^>]+)>; rel="next"$', page.headers.get("link", "")):
        page = door.main.ask("GET", link[1])  # of what was begun with
        assert page.headers["x-repo-commit"] == first
        listed += page.json()
    told = {node["path"]: node["lfs"]["oid"] if "lfs" in node else node["oid"] for node in listed if node["type"] == "file"}
    assert told == {path: etag_of(path, raw).strip('"') for path, raw in OLD.items()}
    resolved(door, repo, first, first, OLD)
    resolved(door, repo, "main", second, NEW)
    resolved(door, repo, second, second, NEW)
    part = door.main.ask("GET", f"/{repo}/resolve/main/config.json", Range="bytes=2-", If_Range=etag_of("config.json", OLD["config.json"]))
    assert (part.status, part.body) == (200, NEW["config.json"]), "a download that is continued begins anew"
    asked = '{"paths": ["config.json", "gone.txt"]}'
    for ref, at, files in ((first, first, OLD), ("main", second, NEW)):
        found = door.main.ask("POST", f"/api/models/{repo}/paths-info/{ref}", asked, Content_Type="application/json")
        assert found.headers["x-repo-commit"] == at
        assert {n["path"]: n["size"] for n in found.json()} == {p: len(files[p]) for p in ("config.json", "gone.txt") if p in files}


def test_no_answer_names_one_commit_and_gives_another(door: S3Door) -> None:
    """While a branch moves again and again, each answer is whole: commit, ETag, length and bytes are of the same revision."""
    repo = make(door.main, "acme/races")
    bytes_at = {put(door, repo, OLD): OLD["config.json"]}
    seen: list[Answer] = []
    stop = threading.Event()

    def read() -> None:
        while not stop.is_set():
            seen.append(door.main.ask("GET", f"/{repo}/resolve/main/config.json"))
            seen.append(door.main.ask("HEAD", f"/{repo}/resolve/main/config.json"))

    readers = [threading.Thread(target=read) for _ in range(3)]
    for reader in readers:
        reader.start()
    try:
        for n in range(40):
            raw = b'{"n":"%s"}' % (b"x" * (n * 7))
            done = commit(door.main, repo, regular("config.json", raw))
            bytes_at[done.json()["commitOid"]] = raw
    finally:
        stop.set()
        for reader in readers:
            reader.join()
    assert len({found.headers["x-repo-commit"] for found in seen}) > 5, "nothing was met"
    for found in seen:
        raw = bytes_at[found.headers["x-repo-commit"]]
        assert found.status == 200 and found.body in (raw, b"") and found.headers["content-length"] == str(len(raw))
        assert found.headers["etag"] == etag_of("config.json", raw)


# ---- the NGC door

VERSION = "/v2/org/acme/team/vision/models/moved"


def test_a_version_whose_files_are_replaced_after_its_listing(door: S3Door) -> None:
    name, ngc = "acme/vision/moved", door.ngc

    def listed() -> tuple[dict[str, str], dict[str, str]]:
        value = ngc.get(f"{VERSION}/latest/files")
        files = ngc.get(f"{VERSION}/versions/latest/files")["modelFiles"]
        return dict(zip(value["filepath"], value["urls"], strict=True)), {f["path"]: f["sha256_base64"] for f in files}

    def sums(files: dict[str, bytes]) -> dict[str, str]:
        return {path: base64.b64encode(hashlib.sha256(raw).digest()).decode() for path, raw in files.items()}

    before = ngc.push(name, "latest", OLD)
    assert [v["versionId"] for v in ngc.get(f"{VERSION}/versions")["modelVersions"]] == ["latest"]
    urls, told = listed()
    assert told == sums(OLD)
    assert ngc.push(name, "latest", NEW) != before
    assert {path: ngc.bytes_of(url).body for path, url in urls.items()} == OLD, "the URLs of a listing give what it listed"
    assert ngc.bytes_of(urls["gone.txt"], Range="bytes=5-8").body == OLD["gone.txt"][5:9]
    urls, told = listed()
    assert told == sums(NEW) and {path: ngc.bytes_of(url).body for path, url in urls.items()} == NEW
    for path, raw in NEW.items():
        found = ngc.ask("GET", f"{VERSION}/versions/latest/files/{path}")
        assert (found.body, found.headers["etag"]) == (raw, f'"{hashlib.sha256(raw).hexdigest()}"')
    assert ngc.ask("GET", f"{VERSION}/versions/latest/files/gone.txt").status == 404
    text = ngc.ask("GET", f"{VERSION}/versions/latest/files/checksums.blake3").body.decode()
    assert dict(reversed(line.split("  ", 1)) for line in text.splitlines()) == {path: blake3(raw).hexdigest() for path, raw in NEW.items()}


# ---- the S3 door


def test_an_object_that_is_replaced_after_its_listing(door: S3Door) -> None:
    client, name = door.client("root"), "acme/vision/kept"
    prefix = f"{name}:latest/"

    def listed() -> dict[str, str]:
        found = client.list_objects_v2(Bucket="models", Prefix=prefix)["Contents"]
        return {item["Key"].removeprefix(prefix): item["ETag"] for item in found}

    def keys(path: str) -> tuple[dict[str, str], dict[str, str]]:
        return {"Bucket": "models", "Key": prefix + path}, {"Bucket": BUCKET, "Key": key_of(name, "latest", path)}

    door.ngc.push(name, "latest", OLD, commit="1" * 40)
    before = listed()
    assert before == {path: f'"{hashlib.sha256(raw).hexdigest()}"' for path, raw in OLD.items()}
    door.ngc.push(name, "latest", NEW, commit="2" * 40)
    for path in ("config.json", "sub/weights.bin"):
        for key in keys(path):
            more: dict[str, Any]
            for more in ({}, {"Range": "bytes=1-"}):
                assert refused(client.get_object, **key, **more, IfMatch=before[path])[:2] == (412, "PreconditionFailed")
                assert refused(client.head_object, **key, **more, IfMatch=before[path])[0] == 412
                assert client.get_object(**key, **more, IfNoneMatch=before[path])["Body"].read() == NEW[path][1 if more else 0 :]
            found = client.get_object(**key)
            assert found["Body"].read() == NEW[path] and found["ETag"] == listed()[path] != before[path]
            assert client.head_object(**key, IfMatch=found["ETag"])["ContentLength"] == len(NEW[path])
    for key in keys("gone.txt"):
        assert refused(client.get_object, **key, IfMatch=before["gone.txt"])[:2] == (404, "NoSuchKey")
    for key in keys("same.txt"):
        assert client.get_object(**key, IfMatch=before["same.txt"])["Body"].read() == b"same", "it is the same object"
    for at, files in (("1" * 40, OLD), ("2" * 40, NEW)):
        for path, raw in files.items():
            assert client.get_object(Bucket="models", Key=f"{name}:{at}/{path}")["Body"].read() == raw, "a commit is what it was"


def test_what_a_condition_refused_was_not_read(door: S3Door) -> None:
    name = "acme/vision/refused"
    door.ngc.push(name, "latest", OLD)
    client, key = door.client("soon"), {"Bucket": "models", "Key": f"{name}:latest/gone.txt"}

    def reads() -> int:
        rows = door.main.ask("GET", "/airlock/v1/audit?limit=1000", None, "root").json()["items"]  # the latest
        return sum(row["event"] == "pull" and name in str(row["ref"]) for row in rows)

    assert refused(client.get_object, **key, IfMatch='"another"')[:2] == (412, "PreconditionFailed") and reads() == 0
    assert client.get_object(**key)["Body"].read() == OLD["gone.txt"] and reads() == 1


# ---- objects without a byte


@pytest.mark.parametrize("wanted", ["0-", "0-0", "5-9", "-1", "-0", "-99"])
def test_no_range_fits_an_empty_object(door: S3Door, wanted: str) -> None:
    """A suffix neither, as object stores have it, to which a client may be sent for the bytes; of the S3 door see tests/contracts/test_s3_door.py."""
    main, ngc = door.main, door.ngc
    repo = "acme/vision/empty"
    ngc.push(repo, "1", {"empty.txt": b""})
    base = "/v2/org/acme/team/vision/models/empty"
    url = ngc.get(f"{base}/1/files")["urls"][0].removeprefix(ngc.url)
    places = [(main, f"/v2/{repo}/blobs/{sha(b'')}", "acme"), (main, f"/{repo}/resolve/1/empty.txt", "acme")]
    places += [(ngc.ngc, url, None), (ngc.ngc, f"{base}/versions/1/files/empty.txt", "acme")]
    for of, path, who in places:
        found = of.ask("GET", path, None, who, Range=f"bytes={wanted}")
        assert (found.status, found.headers["content-range"]) == (416, "bytes */0"), path
        for method in ("GET", "HEAD"):
            whole = of.ask(method, path, None, who)
            assert (whole.status, whole.headers["content-length"], whole.body) == (200, "0", b"") and "content-range" not in whole.headers
        assert of.ask("GET", path, None, who, Range="bytes=0--1").status == 200, "as ngcsdk asks for an empty file"
