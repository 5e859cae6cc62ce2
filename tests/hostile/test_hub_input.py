"""Bad input at the Hub door: paths, commits that would fill the memory, batches, upload URLs and names; refused in the Hub's shapes, never a 500."""

from __future__ import annotations

import http.client
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.contracts.doors import Door, new_site, serving
from tests.contracts.test_hub_writing import actions, batch, commit, make, names, oid_of, path_of, post, put_lfs, regular

pytestmark = pytest.mark.server


@pytest.fixture(scope="module")
def door(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Door]:
    data = tmp_path_factory.mktemp("hub-input") / "data"
    with serving(data, new_site(data)) as found:
        yield found
        lines = [json.loads(line) for line in found.log.read_text().splitlines() if line.startswith("{")]
        assert not [line for line in lines if line["level"] == "error"], "an unexpected failure was logged"


def peak_kib(door: Door) -> int:
    status = Path(f"/proc/{door.process.pid}/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])


@pytest.mark.parametrize("path", ["/", "/v1", "/v1/hf", "/v1/hf/", "/v1/hf/api", "/api", "/api/", "/api/models/", "/api/repos", "/acme/api/models/"])
def test_places_that_name_nothing_are_told_so(door: Door, path: str) -> None:
    assert door.ask("GET", path).status in (404, 501)


@pytest.mark.parametrize("name", ["acme/\u212aelvin", "\u212aelvin/m", "acme/%E2%84%AAelvin", "acme/\u0130"])
def test_letters_that_only_look_like_ours_are_no_name(door: Door, name: str) -> None:
    if door.ask("GET", "/api/models/acme/kelvin").status == 404:
        make(door, "acme/kelvin")
    org, _, last = name.partition("/")
    assert post(door, "/api/repos/create", {"name": last, "organization": org}).status == 404
    if name.isascii():
        assert door.ask("GET", f"/api/models/{name}").status == 404 and door.ask("HEAD", f"/{name}/resolve/main/x").status == 404


def test_a_commit_of_nothing_but_line_ends_holds_no_memory(door: Door) -> None:
    repo = make(door, "acme/lines")
    before = peak_kib(door)
    link = http.client.HTTPConnection("127.0.0.1", door.port, timeout=120)
    link.putrequest("POST", f"/api/models/{repo}/commit/main")
    for header in (("Authorization", f"Bearer {door.keys['acme']}"), ("Content-Type", "application/x-ndjson"), ("Content-Length", str(64 << 20))):
        link.putheader(*header)
    link.endheaders()
    for _ in range(64):
        link.send(b"\n" * (1 << 20))
    answer = link.getresponse()
    assert answer.status == 400 and b"header" in answer.read()
    assert peak_kib(door) - before < 100 * 1024  # 64 Mi references alone would be 512 MiB


def test_paths_to_remove_are_paths(door: Door) -> None:
    repo = make(door, "acme/removal")
    for key, path in (("deletedFile", "x" * 5000), ("deletedFile", "../x"), ("deletedFolder", "y" * 5000 + "/"), ("deletedFolder", "/")):
        assert commit(door, repo, (key, {"path": path})).status == 400, path[:9]


def test_a_card_that_no_json_holds_is_no_card(door: Door) -> None:
    repo = make(door, "acme/card")
    for head in ("x: 0x" + "f" * 5000, '"\\ud800": 1'):
        found = commit(door, repo, regular("README.md", f"---\n{head}\n---\n".encode()))
        assert found.status == 200, found.body
    assert names(door, repo) == ["README.md"] and post(door, "/api/validate-yaml", {"content": f"---\n{head}\n---\n"}).status == 200


def test_a_batch_of_more_parts_than_an_answer_may_hold(door: Door) -> None:
    repo = make(door, "acme/parts")
    objects = [{"oid": f"{n:064x}", "size": 1 << 61} for n in range(60)]
    assert batch(door, repo, *objects).status == 413 and batch(door, repo, *objects[:2]).status == 200
    assert batch(door, repo, *objects, transfers=["basic"]).status == 200


@pytest.mark.parametrize("part", ["%C2%B2", "%D9%A1", "0", "-1", "1e3", "9" * 30, "complete2"])
def test_parts_that_are_no_numbers(door: Door, part: str) -> None:
    repo = "acme/numbers"
    if door.ask("GET", f"/api/models/{repo}").status == 404:
        make(door, repo)
    size = {"oid": "1" * 64, "size": 200 << 20}
    href = path_of(batch(door, repo, size).json()["objects"][0]["actions"]["upload"]["header"]["1"])
    assert door.ask("PUT", href.replace("/1?", f"/{part}?"), b"x", who=None).status == 404


def test_no_body_is_judged_for_who_may_not_push(door: Door) -> None:
    repo = make(door, "acme/unread")
    routes = [f"/{repo}.git/info/lfs/objects/{'0' * 64}/verify", f"/{repo}.git/info/lfs/objects/batch", f"/api/models/{repo}/commit/main"]
    routes += [f"/api/models/{repo}/preupload/main", f"/api/models/{repo}/branch/b", "/api/repos/create", "/api/validate-yaml"]
    for route in routes:
        assert door.ask("POST", route, "{", who=None).status == 401, route


def test_a_whole_upload_that_is_cut_leaves_nothing(door: Door) -> None:
    repo, data = make(door, "acme/cut"), os.urandom(600_000)
    href = path_of(actions(door, repo, data)["upload"]["href"])
    link = http.client.HTTPConnection("127.0.0.1", door.port, timeout=30)
    link.putrequest("PUT", href)
    link.putheader("Content-Length", str(len(data)))
    link.endheaders()
    link.send(data[:400_000])
    link.close()
    end = time.monotonic() + 30
    while list((door.data / "partial").glob("upload-*")) and time.monotonic() < end:
        time.sleep(0.05)
    assert not list((door.data / "partial").glob("upload-*"))
    put_lfs(door, repo, data)
    assert "actions" not in batch(door, repo, oid_of(data)).json()["objects"][0]


def test_what_is_made_private_is_seen_by_grants_alone(door: Door) -> None:
    for name, more, code in (("open", {}, 403), ("shut", {"private": True}, 404), ("shut2", {"visibility": "private"}, 404)):
        assert post(door, "/api/repos/create", {"name": name, "organization": "hf"} | more).status == 200
        assert door.ask("GET", f"/api/models/hf/{name}", who="reader").status == code, name
        assert door.ask("GET", f"/api/models/hf/{name}").json()["private"] is bool(more)


def test_a_line_in_many_pieces_is_one_line(door: Door) -> None:
    repo, raw = make(door, "acme/long"), os.urandom(9 << 20)
    assert commit(door, repo, regular("a.txt", b"a"), regular("large.txt", raw), regular("b.txt", b"b")).status == 200
    assert door.ask("GET", f"/{repo}/resolve/main/large.txt").body == raw and names(door, repo) == ["a.txt", "b.txt", "large.txt"]
    assert commit(door, repo, regular("larger.txt", os.urandom(12 << 20))).status == 413
