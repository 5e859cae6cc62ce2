"""The rule by which the flows say that no probe of a client went unanswered, held against a real server: what nobody serves is named, each time."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.contracts.ngc import fill, new_ngc_site
from tests.contracts.s3 import S3Door, s3_serving
from tests.flows.answered import unanswered

pytestmark = pytest.mark.server
MODEL, DEMO = "/api/models/acme/m", "/v2/org/acme/team/vision/models/demo"
# What no door serves: by listener, method and path.
GAPS: list[tuple[str, str, str]] = [
    *(
        ("main", "GET", path)
        for path in (
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
        )
    ),
    ("main", "PUT", f"{MODEL}/tree/main"),
    ("main", "PUT", MODEL),
    ("main", "POST", "/acme/m/resolve/main/config.json"),
    ("main", "PATCH", "/v2/acme/m/manifests/1"),
    ("main", "POST", "/v2/acme/m/tags/list"),
    ("main", "DELETE", "/v2/_catalog"),
    ("main", "DELETE", "/airlock/v1/whoami"),
    ("main", "PUT", "/token"),
    *(
        ("ngc", "GET", path)
        for path in (
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
        )
    ),
    ("ngc", "POST", DEMO),
    ("ngc", "GET", "/v3/keys/get-caller-info"),
    ("ngc", "DELETE", f"{DEMO}/versions/1.10"),
    ("s3", "PUT", "/models/x"),
    ("s3", "POST", "/models?delete"),
    ("s3", "DELETE", "/models/x"),
    ("s3", "GET", "/models?acl"),
    ("s3", "GET", "/models/acme/vision/demo:1.10/config.json?tagging"),
]
# What is answered, by a refusal: a known route, and nothing there, not allowed, or no range.
ANSWERS: list[tuple[str, str, str]] = [
    ("main", "GET", "/acme/m/resolve/main/nothing"),
    ("main", "HEAD", "/acme/m/resolve/main/nothing"),
    ("main", "GET", "/acme/m/resolve/nothing/config.json"),
    ("main", "GET", "/acme/absent/resolve/main/sub/config.json"),
    ("main", "GET", "/v1/hf/acme/absent/resolve/main/config.json"),
    ("main", "GET", "/acme/acme/absent/resolve/main/config.json"),
    ("main", "GET", "/absent/resolve/main/config.json"),
    ("main", "GET", "/api/models/absent"),
    ("main", "GET", "/api/models/acme/absent"),
    ("main", "GET", "/api/models/acme/absent/refs"),
    ("main", "GET", f"{MODEL}/tree/nothing"),
    ("main", "GET", f"{MODEL}/tree/main/nothing"),
    ("main", "GET", f"{MODEL}/revision/refs%2Fpr%2F1"),
    ("main", "GET", f"/v1/hf{MODEL}/revision/nothing"),
    ("main", "GET", f"/acme{MODEL}/commits/nothing"),
    ("main", "POST", f"{MODEL}/paths-info/nothing"),
    ("main", "DELETE", "/api/repos/delete"),
    ("main", "GET", "/v2/acme/absent/tags/list"),
    ("main", "GET", "/v2/acme/absent/manifests/1"),
    ("main", "HEAD", f"/v2/acme/absent/blobs/sha256:{'0' * 64}"),
    ("main", "GET", "/v2/acme/absent/blobs/uploads/none"),
    ("main", "GET", "/airlock/v1/catalog/acme/absent"),
    ("ngc", "GET", "/v2/org/acme/models/absent"),
    ("ngc", "GET", f"{DEMO}/9/files"),
    ("ngc", "GET", f"{DEMO}/versions/1.10/files/none/x"),
    ("ngc", "GET", f"/{DEMO}/versions/9/files/checksums.blake3"),
    ("ngc", "GET", f"{DEMO}/versions/1.0/signature"),
    ("ngc", "GET", "/v2/org/other/teams"),
    ("ngc", "GET", "/v2/models/acme/absent/versions/1"),
    ("ngc", "GET", "/v2/models/org/acme/team/vision/absent/1/files"),
    ("ngc", "GET", "/v2/org/acme/repos/absent/images/1"),
    ("ngc", "GET", "/v2/repos/acme/absent/tags/1"),
    ("ngc", "GET", "/v2/catalog/models/public-key"),
    ("ngc", "GET", "/dl/none"),
    ("ngc", "GET", "/nim/meta/absent:1?file=config.json"),
    ("ngc", "GET", "/nim%2Fmeta%2Fabsent%3A1%3Ffile%3Dconfig.json"),
    ("ngc", "GET", "/nim%252Fmeta%252Fabsent%253A1%253Ffile%253Dconfig.json"),
    ("s3", "GET", "/models/acme/absent:1/config.json"),
    ("s3", "GET", "/elsewhere"),
]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Door]:
    data = tmp_path_factory.mktemp("answered") / "data"
    with s3_serving(data, new_ngc_site(data)) as found:
        fill(found.ngc, data)
        yield found


def ask(site: S3Door, listener: str, method: str, path: str) -> list[dict[str, Any]]:
    """Sends one request with a key that may everything, and returns its access line, in a list."""
    key, before = {"Authorization": f"Bearer {site.main.keys['root']}"}, len(lines(site))
    door = {"main": site.main, "ngc": site.ngc.ngc}.get(listener)
    body = b"{}" if method in ("POST", "PUT", "PATCH", "DELETE") else None
    if door is None:
        client = site.client("root")
        found = site.ask(method, signed(client, method, path), body)
    else:
        found = door.ask(method, path, body, None, Content_Type="application/json", **key)
    assert 400 <= found.status < 600, (method, path, found.status)
    for _ in range(200):
        told = lines(site)[before:]
        if told:
            break
        time.sleep(0.01)
    wanted = [line for line in told if line["method"] == method]
    assert [line["status"] for line in wanted] == [found.status], (method, path, told)
    return wanted


def signed(client: Any, method: str, path: str) -> str:
    """A signed URL's path and query of a request to the S3 face."""
    from botocore.auth import S3SigV4QueryAuth
    from botocore.awsrequest import AWSRequest

    request = AWSRequest(method, client.meta.endpoint_url + path)
    S3SigV4QueryAuth(client._request_signer._credentials, "s3", "us-east-1", expires=60).add_auth(request)
    return str(request.url).removeprefix(client.meta.endpoint_url)


def lines(site: S3Door) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in Path(site.main.log).read_text().splitlines() if line.startswith("{")]
    return [line for line in found if line.get("log") == "airlock.access" and not line["path"].startswith("/airlock/v1/keys/s3")]


def test_what_nobody_serves_is_named(site: S3Door) -> None:
    missed = []
    for listener, method, path in GAPS:
        told = ask(site, listener, method, path)
        expected = [f"{method} {told[0]['path']} -> {told[0]['status']}"]
        if unanswered(told) != expected:
            missed.append((listener, *expected))
    assert missed == []


def test_a_refusal_of_a_known_route_is_an_answer(site: S3Door) -> None:
    named = []
    for listener, method, path in ANSWERS:
        told = ask(site, listener, method, path)
        named += [(listener, said) for said in unanswered(told)]
    assert named == []


def test_gaps_are_found_among_answers(site: S3Door) -> None:
    """All lines at once, as the flows give them: each gap is named, and nothing else."""
    told = [line for each in (GAPS[1], ANSWERS[0], GAPS[-1], ANSWERS[-1]) for line in ask(site, *each)]
    assert [said.rpartition(" -> ")[2] for said in unanswered(told)] == ["404", "501"] and unanswered(told)[0] == "GET /favicon.ico -> 404"
    assert unanswered([]) == []
