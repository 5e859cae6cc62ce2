"""The rule by which the flows say that no probe of a client went unanswered, held against a real server: what nobody serves is named, each time."""

from __future__ import annotations

import time
from typing import Any

import pytest

from tests.contracts.s3 import S3Door, door, signed
from tests.flows.answered import access_lines, gaps, unanswered

pytestmark = pytest.mark.server
__all__ = ["door"]  # a fixture
MODEL, DEMO = "/api/models/acme/m", "/v2/org/acme/team/vision/models/demo"


def requests(listener: str, method: str, *paths: str) -> list[tuple[str, str, str]]:
    return [(listener, method, path) for path in paths]


# What no door serves: by listener, method and path.
GAPS = [
    *requests(
        "main",
        "GET",
        "/",
        "/favicon.ico",
        "/login",
        "/acme/m",
        "/acme/m/raw/main/config.json",
        "/acme/m/blob/main/config.json",
        "/acme/m/tree/main",
        "/acme/m.git/info/refs",
        "/acme/m.git/info/lfs/locks",
        "/datasets/acme/m/resolve/main/x",
        "/spaces/acme/m/resolve/main/x",
        "/v1/hf",
        "/v1/models",
        "/v3/whoami",
        "/api",
        "/api/nothing",
        "/api/whoami",
        "/api/datasets/acme/m",
        "/api/spaces/acme/m/refs",
        "/api/models-tags-by-type",
        "/api/repos/move",
        "/api/organizations/acme/members",
        "/acme/api/datasets/acme/m",
        "/v1/hf/api/datasets/acme/m",
        "/v1/hf/api/nothing",
        "/api/models/acme/m/resolve/main/x",
        f"{MODEL}/nothing",
        f"{MODEL}/nothing/main",
        f"{MODEL}/treesize/main/sub",
        f"{MODEL}/resolve-cache/main",
        f"{MODEL}/settings",
        f"{MODEL}/likers",
        f"{MODEL}/safetensors-metadata",
        f"/v1/hf{MODEL}/nothing",
        f"/acme{MODEL}/nothing",
        "/v2/acme/m",
        "/v2/acme/m/nothing/x",
        "/v2/acme/m/tags",
        "/v2/_nothing",
        "/v2/acme/m/_trust/tuf/root.json",
        "/airlock",
        "/airlock/v2/whoami",
        "/airlock/v1/nothing",
    ),
    *requests("main", "PUT", f"{MODEL}/tree/main", MODEL, "/token"),
    *requests("main", "POST", "/acme/m/resolve/main/config.json", "/v2/acme/m/tags/list"),
    *requests("main", "PATCH", "/v2/acme/m/manifests/1"),
    *requests("main", "DELETE", "/v2/_catalog", "/airlock/v1/whoami"),
    *requests(
        "ngc",
        "GET",
        "/",
        "/v2",
        "/v2/",
        "/v2/_catalog",
        "/v1/orgs",
        "/v3/orgs",
        "/v2/users/me/keys",
        "/v2/resources/nvidia/ngc-apps/ngc_cli",
        "/v2/org/acme",
        "/v2/org/acme/labels",
        "/v2/org/acme/team/vision/models",
        "/v2/org/acme/team/vision/charts/x",
        "/v2/org/acme/resources/x",
        f"{DEMO}/nothing",
        f"{DEMO}/1.10/nothing",
        f"{DEMO}/versions/1.10/nothing",
        "/v2/org/acme/team/vision/repos/demo/nothing/1",
        "/v2/models/org/acme/team/vision/demo/1.10",
        "/v2/search/catalog/nothing/MODEL",
        "/v2/catalog/nothing/public-key",
        "/dl/a/b",
        "/nothing",
        "/v3/keys/get-caller-info",
    ),
    *requests("ngc", "POST", DEMO),
    *requests("ngc", "DELETE", f"{DEMO}/versions/1.10"),
    *requests("s3", "PUT", "/models/x"),
    *requests("s3", "POST", "/models?delete"),
    *requests("s3", "DELETE", "/models/x"),
    *requests("s3", "GET", "/models?acl", "/models/acme/vision/demo:1.10/config.json?tagging"),
]
# What is answered, by a refusal: a known route, and nothing there, not allowed, or no range.
ANSWERS = [
    *requests(
        "main",
        "GET",
        "/acme/m/resolve/main/nothing",
        "/acme/m/resolve/nothing/config.json",
        "/acme/absent/resolve/main/sub/config.json",
        "/v1/hf/acme/absent/resolve/main/config.json",
        "/acme/acme/absent/resolve/main/config.json",
        "/absent/resolve/main/config.json",
        "/api/models/absent",
        "/api/models/acme/absent",
        "/api/models/acme/absent/refs",
        f"{MODEL}/tree/nothing",
        f"{MODEL}/tree/main/nothing",
        f"{MODEL}/revision/refs%2Fpr%2F1",
        f"/v1/hf{MODEL}/revision/nothing",
        f"/acme{MODEL}/commits/nothing",
        "/v2/acme/absent/tags/list",
        "/v2/acme/absent/manifests/1",
        "/v2/acme/absent/blobs/uploads/none",
        "/airlock/v1/catalog/acme/absent",
    ),
    *requests("main", "HEAD", "/acme/m/resolve/main/nothing", f"/v2/acme/absent/blobs/sha256:{'0' * 64}"),
    *requests("main", "POST", f"{MODEL}/paths-info/nothing"),
    *requests("main", "DELETE", "/api/repos/delete"),
    *requests(
        "ngc",
        "GET",
        "/v2/org/acme/models/absent",
        f"{DEMO}/9/files",
        f"{DEMO}/versions/1.10/files/none/x",
        f"/{DEMO}/versions/9/files/checksums.blake3",
        f"{DEMO}/versions/1.0/signature",
        "/v2/org/other/teams",
        "/v2/models/acme/absent/versions/1",
        "/v2/models/org/acme/team/vision/absent/1/files",
        "/v2/org/acme/repos/absent/images/1",
        "/v2/repos/acme/absent/tags/1",
        "/v2/catalog/models/public-key",
        "/dl/none",
        "/nim/meta/absent:1?file=config.json",
        "/nim%2Fmeta%2Fabsent%3A1%3Ffile%3Dconfig.json",
        "/nim%252Fmeta%252Fabsent%253A1%253Ffile%253Dconfig.json",
    ),
    *requests("s3", "GET", "/models/acme/absent:1/config.json", "/elsewhere"),
]


def ask(door: S3Door, listener: str, method: str, path: str) -> list[dict[str, Any]]:
    """Sends one request with a key that may everything, and returns its access line, in a list."""
    key, before = {"Authorization": f"Bearer {door.main.keys['root']}"}, len(lines(door))
    at = {"main": door.main, "ngc": door.ngc.ngc}.get(listener)
    body = b"{}" if method in ("POST", "PUT", "PATCH", "DELETE") else None
    if at is None:
        found = door.ask(method, signed(door, path, method=method, pair=door.pair("root"), url=60)[0], body)
    else:
        found = at.ask(method, path, body, None, Content_Type="application/json", **key)
    assert 400 <= found.status < 600, (method, path, found.status)
    for _ in range(200):
        told = lines(door)[before:]
        if told:
            break
        time.sleep(0.01)
    wanted = [line for line in told if line["method"] == method]
    assert [line["status"] for line in wanted] == [found.status], (method, path, told)
    return wanted


def lines(door: S3Door) -> list[dict[str, Any]]:
    return [line for line in access_lines(door.main.log) if not line["path"].startswith("/airlock/v1/keys/s3")]


def test_what_nobody_serves_is_named(door: S3Door) -> None:
    missed = []
    for listener, method, path in GAPS:
        told = ask(door, listener, method, path)
        expected = [f"{method} {told[0]['path']} -> {told[0]['status']}"]
        if unanswered(told) != expected:
            missed.append((listener, *expected))
    assert missed == []


def test_a_refusal_of_a_known_route_is_an_answer(door: S3Door) -> None:
    named = []
    for listener, method, path in ANSWERS:
        told = ask(door, listener, method, path)
        named += [(listener, said) for said in unanswered(told)]
    assert named == []


def test_gaps_are_found_among_answers(door: S3Door) -> None:
    """All lines at once, as the flows give them: each gap is named, and nothing else."""
    told = [line for each in (GAPS[1], ANSWERS[0], GAPS[-1], ANSWERS[-1]) for line in ask(door, *each)]
    assert [said.rpartition(" -> ")[2] for said in unanswered(told)] == ["404", "501"] and unanswered(told)[0] == "GET /favicon.ico -> 404"
    assert unanswered([]) == [] and {"GET /favicon.ico -> 404", unanswered(told)[1]} <= set(gaps(door.main.log))
