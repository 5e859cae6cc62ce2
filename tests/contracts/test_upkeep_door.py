"""The administrator's routes and commands, and leases beside a collection, against a real server; every route is refused to whoever may not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select, update

from artifact.grant import Grant
from registry import tables as t
from registry.catalog import ensure_org
from registry.settings import Settings
from registry.wiring import open_site
from tests.contracts.doors import INDEX, MANIFEST, Door, new_site, serving, sha

AIRLOCK = Path(sys.executable).parent / "airlock"
GC = {"AIRLOCK_GC_EVERY_S": "0", "AIRLOCK_GARBAGE_DELAY_S": "0"}


@pytest.fixture(scope="module")
def door(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Door]:
    data = tmp_path_factory.mktemp("site") / "data"
    keys = new_site(data)
    now = time.time()
    with open_site(Settings.load(data), background=False) as site, site.catalog.writing() as conn:
        org_id = ensure_org(conn, "acme", now)
        grant = Grant(("**",), ("admin",))
        keys["root"] = site.entitlements.add_key(conn, org_id, tier="enterprise", grant=grant, expires=0.0, at=now)[1]
    with serving(data, keys, **GC) as found:
        yield found


def ask(door: Door, method: str, path: str, body: dict[str, Any] | None = None, who: str | None = "root", status: int = 200) -> Any:
    found = door.ask(method, f"/airlock/v1/{path}", json.dumps(body) if body is not None else None, who)
    assert found.status == status, (found.status, found.body)
    return found.json()


def collect(door: Door) -> dict[str, Any]:
    """A collection by the admin API, to its end."""
    before = ask(door, "GET", "gc")["ended"]
    ask(door, "POST", "gc", {})
    end = time.monotonic() + 120
    while time.monotonic() < end:
        found = ask(door, "GET", "gc")
        if not found["running"] and (found["ended"] != before or found["report"]):
            return dict(found["report"])
        time.sleep(0.1)
    pytest.fail("the collection did not end")


def end_leases(door: Door, *digests: str) -> None:
    """Makes the server's leases of these blobs (of all without any) over, as if a day had passed."""
    with open_site(Settings.load(door.data), background=False) as site, site.catalog.writing() as conn:
        for table in (t.repo_blob, t.blob):
            change = update(table).values(lease_until=1.0)
            conn.execute(change.where(table.c.digest.in_(digests)) if digests else change)
        conn.execute(update(t.blob).values(gc_after=1.0))


def held(door: Door, digest: str) -> bool:
    with open_site(Settings.load(door.data), background=False) as site, site.catalog.reading() as conn:
        return conn.execute(select(t.blob.c.digest).where(t.blob.c.digest == digest)).first() is not None


def run(door: Door, *argv: str, who: str = "root", code: int = 0) -> str:
    env = os.environ | {"AIRLOCK_REGISTRY": door.url, "AIRLOCK_KEY": door.keys[who]}
    done = subprocess.run([str(AIRLOCK), *argv], env=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == code, (argv, done.returncode, done.stdout, done.stderr)
    return done.stdout if code == 0 else done.stderr


def manifest(*layers: bytes) -> bytes:
    doc: dict[str, Any] = {"schemaVersion": 2, "mediaType": MANIFEST, "artifactType": "application/x-test"}
    doc["config"] = {"mediaType": "application/octet-stream", "digest": sha(layers[0]), "size": len(layers[0])}
    doc["layers"] = [{"mediaType": "application/octet-stream", "digest": sha(raw), "size": len(raw)} for raw in layers]
    return json.dumps(doc).encode()


def test_push_that_pauses_between_blob_and_manifest(door: Door) -> None:
    door.blob("acme/lease/pause", b"paused")
    assert collect(door)["blobs"] == 0
    assert door.ask("PUT", "/v2/acme/lease/pause/manifests/v1", manifest(b"paused"), Content_Type=MANIFEST).status == 201


def test_head_by_a_pusher_renews_the_lease_and_a_missing_blob_is_told(door: Door) -> None:
    kept, lost = door.blob("acme/lease/head", b"asked for"), door.blob("acme/lease/head", b"not asked for")
    end_leases(door, kept, lost)
    assert door.ask("HEAD", f"/v2/acme/lease/head/blobs/{kept}").status == 200
    assert collect(door)["blobs"] == 1
    assert door.ask("PUT", "/v2/acme/lease/head/manifests/v1", manifest(b"asked for"), Content_Type=MANIFEST).status == 201
    assert door.ask("HEAD", f"/v2/acme/lease/head/blobs/{lost}").status == 404
    found = door.ask("PUT", "/v2/acme/lease/head/manifests/v2", manifest(b"not asked for"), Content_Type=MANIFEST)
    assert found.code == "MANIFEST_BLOB_UNKNOWN"
    door.blob("acme/lease/head", b"not asked for")
    assert door.ask("PUT", "/v2/acme/lease/head/manifests/v2", manifest(b"not asked for"), Content_Type=MANIFEST).status == 201


def test_blob_of_two_repositories_deleted_in_one(door: Door) -> None:
    one, _ = door.image("acme/share/one", "v1", [b"both"])
    door.image("acme/share/two", "v1", [b"both"])
    end_leases(door)
    assert door.ask("DELETE", f"/v2/acme/share/one/manifests/{one}").status == 202
    collect(door)
    assert door.ask("GET", f"/v2/acme/share/two/blobs/{sha(b'both')}").body == b"both"
    assert door.ask("GET", f"/v2/acme/share/one/blobs/{sha(b'both')}").status == 404


def test_rm_says_what_it_frees_and_then_frees_it(door: Door) -> None:
    shared, own = b"s" * 1000, b"o" * 300
    old, _ = door.image("acme/free/a", "v1", [shared, own])
    door.image("acme/free/b", "v1", [shared])
    subject = {"mediaType": MANIFEST, "digest": old, "size": len(door.ask("GET", f"/v2/acme/free/a/manifests/{old}").body)}
    signature, _ = door.image("acme/free/a", "", [b"signature"], subject=subject)
    found = json.loads(run(door, "catalog", "rm", "acme/free/a:v1", "--dry-run", "--json"))
    assert (found["bytes"], found["blobs"], found["referrers"], found["tags"], found["manifests"]) == (300, 1, [signature], ["v1"], [old])
    assert door.ask("HEAD", "/v2/acme/free/a/manifests/v1").status == 200
    along = json.loads(run(door, "catalog", "rm", "acme/free/a:v1", "--dry-run", "--referrers", "--json"))
    assert (along["bytes"], set(along["manifests"])) == (309, {old, signature})
    whole = json.loads(run(door, "catalog", "rm", "acme/free/a", "--dry-run", "--json"))
    assert whole["bytes"] == 309
    assert "frees 300 B in 1 blobs" in run(door, "catalog", "rm", "acme/free/a:v1")
    end_leases(door)
    assert {(item["digest"]) for item in ask(door, "POST", "gc", {"dry_run": True})["items"]} >= {old, sha(own)}
    before = collect(door)
    assert before["bytes"] >= 300
    assert not held(door, sha(own))
    assert door.ask("GET", f"/v2/acme/free/b/blobs/{sha(shared)}").status == 200
    run(door, "catalog", "rm", "acme/free/a")
    assert door.ask("HEAD", f"/v2/acme/free/a/manifests/{signature}").status == 404
    assert "acme/free/a" not in run(door, "catalog", "list")
    assert "no v1" in run(door, "catalog", "rm", "acme/free/a:v1", code=3)


def test_rm_is_refused_while_an_index_names_it(door: Door) -> None:
    child, raw = door.image("acme/free/index", "", [b"leaf"])
    doc = {"schemaVersion": 2, "mediaType": INDEX, "manifests": [{"mediaType": MANIFEST, "digest": child, "size": len(raw)}]}
    assert door.ask("PUT", "/v2/acme/free/index/manifests/multi", json.dumps(doc), Content_Type=INDEX).status == 201
    assert "still names" in run(door, "catalog", "rm", f"acme/free/index@{child}", code=8)
    found = json.loads(run(door, "catalog", "rm", "acme/free/index:multi", "--json"))
    assert child in found["manifests"]


def test_history_and_rollback(door: Door) -> None:
    first, _ = door.image("acme/past", "latest", [b"one"])
    second, _ = door.image("acme/past", "latest", [b"two"])
    lines = run(door, "catalog", "history", "acme/past", "latest").splitlines()
    assert [first in line and second in line for line in lines] == [True, False]
    assert json.loads(run(door, "catalog", "rollback", "acme/past:latest", "--to", first, "--json"))["from"] == second
    assert door.ask("HEAD", "/v2/acme/past/manifests/latest").headers["docker-content-digest"] == first
    assert door.ask("DELETE", f"/v2/acme/past/manifests/{second}").status == 202
    assert "deleted since" in run(door, "catalog", "rollback", "acme/past:latest", "--to", second, code=3)
    assert "never held" in run(door, "catalog", "rollback", "acme/past:latest", "--to", sha(b"?"), code=3)
    run(door, "catalog", "immutable", "acme/past", "--on")
    assert "immutable" in run(door, "catalog", "rm", "acme/past:latest", code=8)
    assert door.ask("DELETE", "/v2/acme/past/manifests/latest").code == "DENIED"
    run(door, "catalog", "immutable", "acme/past", "--off")
    run(door, "catalog", "rm", "acme/past:latest")


def test_quota_search_and_retention(door: Door) -> None:
    _, raw = door.image("other/thing", "v1", [b"x" * 500], who="other")
    used = 502 + len(raw)
    assert json.loads(run(door, "catalog", "quota", "other", "--json"))["used_bytes"] == used
    assert f"uses {used} B" in run(door, "catalog", "quota", "other", "--bytes", "1K")
    found = door.ask("POST", f"/v2/other/thing/blobs/uploads/?digest={sha(b'y' * 600)}", b"y" * 600, "other")
    assert (found.status, found.code) == (403, "DENIED")
    assert str(used) in found.body.decode()
    run(door, "catalog", "quota", "other", "--bytes", "0")
    assert run(door, "catalog", "quota", "nobody", code=3)
    assert run(door, "catalog", "search", "PAUSE", who="acme").split() == ["acme/lease/pause", "artifact"]
    assert run(door, "catalog", "search", "pause", who="other").split() == []
    assert "2 newest" in run(door, "catalog", "retention", "acme/none/*", "--keep-last", "2", "--untagged-days", "7", "--keep-tags", "v*")
    assert "tags like v*" in run(door, "catalog", "retention")
    run(door, "catalog", "retention", "acme/none/*", "--remove")
    assert run(door, "catalog", "retention").strip() == "no rule: everything is kept"
    assert run(door, "catalog", "retention", "acme/none/*", "--remove", code=3)


def test_a_quota_counts_what_is_not_finished_and_manifests(door: Door) -> None:
    door.image("bound/thing", "v1", [b"x" * 500], who="root")
    used = ask(door, "GET", "quota/other")["used_bytes"]
    ask(door, "POST", "quota", {"org": "other", "bytes": used + 100_000})
    begun = []
    for size, chunked, status in ((5_000_000, False, 403), (5_000_000, True, 403), (60_000, False, 202), (60_000, True, 403)):
        place = door.ask("POST", "/v2/other/thing/blobs/uploads/", None, "other").headers["location"]
        begun.append(place)
        body = iter([b"y" * 10_000] * (size // 10_000)) if chunked else b"y" * size
        extra = {"Transfer_Encoding": "chunked"} if chunked else {"Content_Type": "application/octet-stream"}
        try:
            found = door.ask("PATCH", place, body, "other", **extra).status
        except OSError:  # refused and closed while the client still sent
            found = 403
        assert found == status, (size, chunked)
    assert ask(door, "GET", "quota/other")["used_bytes"] == used + 60_000
    ask(door, "POST", "quota", {"org": "other", "bytes": used + 60_000 + 10})
    raw = manifest(b"{}")
    door.blob("other/thing", b"{}", who="other")
    found = door.ask("PUT", "/v2/other/thing/manifests/v2", raw, "other", Content_Type=MANIFEST)
    assert (found.status, found.code) == (403, "DENIED")
    for place in begun:
        door.ask("DELETE", place, None, "other")
    assert ask(door, "GET", "quota/other")["used_bytes"] == used
    ask(door, "POST", "quota", {"org": "other", "bytes": 0})


@pytest.mark.parametrize(
    "kind", ["application/vnd.oci.image.layer.nondistributable.v1.tar", "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip"]
)
@pytest.mark.parametrize("late", [False, True])
def test_a_layer_that_need_not_be_pushed_is_kept_where_it_was(door: Door, kind: str, late: bool) -> None:
    repo, layer = f"acme/windows{len(kind)}{late:d}", f"{kind}{late}".encode()
    config = door.blob(repo, b"{}")
    doc: dict[str, Any] = {"schemaVersion": 2, "mediaType": MANIFEST, "artifactType": "application/x-test"}
    doc["config"] = {"mediaType": "application/octet-stream", "digest": config, "size": 2}
    doc["layers"] = [{"mediaType": kind, "digest": sha(layer), "size": len(layer)}]
    raw = json.dumps(doc).encode()
    steps = [lambda: door.blob(repo, layer), lambda: door.ask("PUT", f"/v2/{repo}/manifests/v1", raw, Content_Type=MANIFEST)]
    for step in reversed(steps) if late else steps:
        step()
    end_leases(door, config, sha(layer))
    collect(door)
    assert door.ask("GET", f"/v2/{repo}/blobs/{sha(layer)}").body == layer
    assert door.ask("DELETE", f"/v2/{repo}/blobs/{sha(layer)}").status in (405, 409)
    assert door.ask("DELETE", f"/v2/{repo}/manifests/{sha(raw)}").status == 202
    collect(door)
    assert not held(door, sha(layer))


def test_command_beside_the_server(door: Door) -> None:
    lonely = door.blob("acme/command", b"lonely")
    end_leases(door, lonely)
    dry = json.loads(run(door, "gc", "--data", str(door.data), "--dry-run", "--json"))
    assert lonely in {item["digest"] for item in dry["items"]}
    assert held(door, lonely)
    assert "blobs with" in run(door, "gc", "--data", str(door.data))
    assert not held(door, lonely)
    for words in (("gc",), ("catalog", "rm"), ("catalog", "history"), ("catalog", "retention")):
        assert "example: airlock" in run(door, *words, "--help")


CHANGES: list[tuple[str, dict[str, Any]]] = [
    ("remove", {"name": "acme/lease/pause", "ref": "v1"}),
    ("rollback", {"name": "acme/lease/pause", "tag": "v1", "digest": sha(b"")}),
    ("immutable", {"name": "acme/lease/pause", "immutable": True}),
    ("quota", {"org": "acme", "bytes": 1}),
    ("retention", {"pattern": "**", "keep_last": 1}),
    ("gc", {}),
]


@pytest.mark.parametrize(("path", "body"), CHANGES, ids=[path for path, _ in CHANGES])
def test_changes_are_the_administrators(door: Door, path: str, body: dict[str, Any]) -> None:
    ask(door, "POST", path, body, None, 401)
    ask(door, "POST", path, body, "expired", 401)
    assert door.ask("POST", f"/airlock/v1/{path}", json.dumps(body), "reader").status in (403, 404)
    assert door.ask("POST", f"/airlock/v1/{path}", json.dumps(body), "other").status in (403, 404)
    if path in ("quota", "retention", "gc"):
        assert "site administrator" in ask(door, "POST", path, body, "acme", 403)["what"]
    for wrong in ("", "[]", "{", '{"name": 7}', '{"name": "acme/x\\u0000"}', '{"pattern": "A B"}', '{"dry_run": 1}', '{"bytes": -1, "org": "acme"}'):
        if path != "gc" or "dry_run" in wrong or not wrong.startswith('{"'):
            status = door.ask("POST", f"/airlock/v1/{path}", wrong, "root").status
            assert status in (400, 404), (path, wrong, status)
    assert door.ask("HEAD", "/v2/acme/lease/pause/manifests/v1").status == 200


@pytest.mark.parametrize("path", ["history/acme/lease/pause", "quota/acme", "retention", "gc"])
def test_questions_are_the_administrators(door: Door, path: str) -> None:
    for who, status in ((None, {401}), ("expired", {401}), ("reader", {403, 404}), ("other", {403, 404}), ("root", {200})):
        assert door.ask("GET", f"/airlock/v1/{path}", None, who).status in status, who


@pytest.mark.parametrize(
    "path", ["search", "search?q=", "history/", "history/A", "quota/%00", "gc/x", "search/x?q=a", "nothing", "history/x?before=-1"]
)
def test_wrong_questions(door: Door, path: str) -> None:
    assert door.ask("GET", f"/airlock/v1/{path}", None, "root").status in (400, 404)


@pytest.mark.parametrize(
    ("method", "path", "allow"),
    [("GET", "quota", "POST"), ("POST", "quota/acme", "GET, HEAD"), ("DELETE", "gc", "GET, HEAD, POST"), ("PUT", "org", "")],
)
def test_wrong_verbs(door: Door, method: str, path: str, allow: str) -> None:
    """RFC 9110 section 15.5.6: what a path has is told; a path that has nothing is not found."""
    found = door.ask(method, f"/airlock/v1/{path}", {} if method != "GET" else None, "root")
    assert (found.status, found.headers.get("allow", "")) == (405 if allow else 404, allow)
