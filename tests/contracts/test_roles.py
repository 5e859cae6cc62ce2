"""Every route by every kind of key, each presented as Bearer, as Basic and through the token flow: the table of who gets which status.

The table is the specification (docs/operations.md, Authentication and roles); what a refusal left behind is checked as well.
"""

from __future__ import annotations

import base64
import json
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from urllib.parse import urlencode

import pytest

from artifact.grant import Grant
from registry import tables as t
from registry.catalog import ensure_org
from registry.home import Home
from registry.settings import Settings
from registry.wiring import open_site
from tests.contracts.doors import EMPTY, MANIFEST, Answer, Door, serving, sha
from tests.contracts.test_hub_door import FILES, push

pytestmark = pytest.mark.server
R, MODEL, PRIVATE, NEW = "acme/app", "acme/model", "acme/private", "acme/new"
LAYER = b"the layer"
KEYS: dict[str, tuple[str, tuple[str, ...], tuple[str, ...], float]] = {
    "acme": ("acme", ("acme/**",), ("admin",), 86400),  # the tests' own hand
    "other": ("other", ("**",), ("pull", "push", "run"), 86400),
    "narrow": ("acme", ("acme/elsewhere",), ("pull", "push", "run"), 86400),
    "puller": ("acme", ("acme/**",), ("pull",), 86400),
    "creator": ("acme", ("acme/**",), ("create",), 86400),
    "pusher": ("acme", ("acme/**",), ("pull", "push"), 86400),
    "runner": ("acme", ("acme/**",), ("run",), 86400),
    "admin": ("acme", ("acme/**",), ("admin",), 86400),
    "auditor": ("acme", ("acme/elsewhere",), ("auditor",), 86400),
    "expired": ("acme", ("acme/**",), ("pull", "push"), -60),
    "revoked": ("acme", ("acme/**",), ("pull", "push"), 86400),
}
CALLERS = ("none", "other", "narrow", "puller", "creator", "pusher", "runner", "admin", "auditor", "expired", "revoked")


@dataclass(frozen=True)
class Route:
    """One request, with `{who}` where each caller needs a thing of its own, and the status for each of CALLERS."""

    method: str
    path: str
    statuses: str
    body: str = ""

    def expected(self, who: str) -> int:
        return int(self.statuses.split()[CALLERS.index(who)])


# the columns:                                                               none oth nar pul cre psh run adm aud exp rev
ROUTES = [
    Route("GET", "/v2/",                                                    "401 200 200 200 200 200 200 200 200 401 401"),
    Route("GET", "/v2/_catalog",                                            "401 200 200 200 200 200 200 200 200 401 401"),
    Route("GET", f"/v2/{R}/manifests/1",                                    "401 404 403 200 403 200 403 200 403 401 401"),
    Route("HEAD", f"/v2/{R}/manifests/1",                                   "401 404 403 200 200 200 403 200 403 401 401"),
    Route("GET", f"/v2/{R}/blobs/{sha(LAYER)}",                             "401 404 403 200 403 200 403 200 403 401 401"),
    Route("HEAD", f"/v2/{R}/blobs/{sha(LAYER)}",                            "401 404 403 200 200 200 403 200 403 401 401"),
    Route("GET", f"/v2/{R}/tags/list",                                      "401 404 403 200 200 200 403 200 200 401 401"),
    Route("GET", f"/v2/{R}/referrers/{sha(LAYER)}",                         "401 200 403 200 200 200 403 200 200 401 401"),
    Route("GET", f"/v2/{PRIVATE}/manifests/1",                              "401 404 404 200 403 200 403 200 403 401 401"),
    Route("GET", f"/v2/{PRIVATE}/tags/list",                                "401 404 404 200 200 200 403 200 200 401 401"),
    Route("GET", "/v2/acme/absent/tags/list",                               "401 404 404 404 404 404 404 404 404 401 401"),
    Route("GET", "/v2/beta/absent/manifests/1",                             "401 404 404 404 404 404 404 404 404 401 401"),
    Route("POST", f"/v2/{R}/blobs/uploads/",                                "401 404 403 403 202 202 403 202 403 401 401"),
    Route("POST", f"/v2/{NEW}/blobs/uploads/",                              "401 404 403 403 202 202 403 202 403 401 401"),
    Route("POST", f"/v2/{R}/blobs/uploads/?digest={sha(b'new')}",           "401 404 403 403 201 201 403 201 403 401 401", "new"),
    Route("POST", f"/v2/{R}/blobs/uploads/?mount={sha(LAYER)}&from={R}",    "401 404 403 403 202 201 403 201 403 401 401"),
    Route("PATCH", f"/v2/{R}/blobs/uploads/{{upload}}",                     "401 404 403 403 404 404 403 404 403 401 401", "x"),
    Route("GET", f"/v2/{R}/blobs/uploads/{{upload}}",                       "401 404 403 403 404 404 403 404 403 401 401"),
    Route("PUT", f"/v2/{R}/blobs/uploads/{{upload}}?digest={sha(b'x')}",    "401 404 403 403 404 404 403 404 403 401 401", "x"),
    Route("DELETE", f"/v2/{R}/blobs/uploads/{{upload}}",                    "401 404 403 403 404 404 403 404 403 401 401"),
    Route("PUT", f"/v2/{R}/manifests/new-{{who}}-{{how}}",                  "401 404 403 403 201 201 403 201 403 401 401", "manifest"),
    Route("PUT", f"/v2/{R}/manifests/{{digest}}",                           "401 404 403 403 201 201 403 201 403 401 401", "manifest"),
    Route("PUT", f"/v2/{R}/manifests/moving-{{who}}-{{how}}",               "401 404 403 403 403 201 403 201 403 401 401", "manifest"),
    Route("DELETE", f"/v2/{R}/manifests/moving-{{who}}-{{how}}",            "401 404 403 403 403 202 403 202 403 401 401"),
    Route("DELETE", f"/v2/{R}/blobs/{{own}}",                               "401 404 403 403 403 202 403 202 403 401 401"),
    Route("GET", "/airlock/v1/search?q=acme",                               "401 200 200 200 200 200 200 200 200 401 401"),
    Route("GET", "/airlock/v1/audit",                                       "401 403 403 403 403 403 403 403 200 401 401"),
    Route("GET", f"/airlock/v1/history/{R}",                                "401 404 403 403 403 403 403 200 403 401 401"),
    Route("GET", "/airlock/v1/gc",                                          "401 403 403 403 403 403 403 403 403 401 401"),
    Route("GET", "/airlock/v1/whoami",                                      "401 200 200 200 200 200 200 200 200 401 401"),
    Route("GET", "/airlock/v1/catalog",                                     "401 200 200 200 200 200 200 200 200 401 401"),
    Route("GET", f"/airlock/v1/catalog/{R}",                                "401 404 200 200 200 200 200 200 200 401 401"),
    Route("GET", f"/airlock/v1/catalog/{PRIVATE}",                          "401 404 404 200 200 200 200 200 200 401 401"),
    Route("POST", "/airlock/v1/leases",                                     "401 404 403 403 403 403 404 404 403 401 401", "lease"),
    Route("GET", "/api/whoami-v2",                                          "401 200 200 200 200 200 200 200 200 401 401"),
    Route("GET", f"/api/models/{MODEL}/revision/main",                      "401 404 403 200 403 200 403 200 403 401 401"),
    Route("GET", f"/api/models/{MODEL}/tree/main",                          "401 404 403 200 403 200 403 200 403 401 401"),
    Route("HEAD", f"/{MODEL}/resolve/main/config.json",                     "401 404 403 200 403 200 403 200 403 401 401"),
    Route("GET", f"/{MODEL}/resolve/main/config.json",                      "401 404 403 200 403 200 403 200 403 401 401"),
    Route("GET", "/token",                                                  "200 200 200 200 200 200 200 200 200 401 401"),
    Route("GET", "/proxy_auth",                                             "200 200 200 200 200 200 200 200 200 401 401"),
]  # fmt: skip


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Door]:
    data = tmp_path_factory.mktemp("roles") / "data"
    Home.open(data, create=True)
    keys, now = {}, time.time()
    with open_site(Settings.load(data), background=False) as opened, opened.catalog.writing() as conn:
        for name, (org, models, actions, life) in KEYS.items():
            org_id = ensure_org(conn, org, now)
            grant, made = Grant(models, actions), now + min(life, 0) - 1
            key_id, keys[name] = opened.entitlements.add_key(conn, org_id, tier="enterprise", grant=grant, expires=now + life, at=made)
            if name == "revoked":
                opened.entitlements.revoke(conn, key_id, now)
        ensure_org(conn, "beta", now)
    with serving(data, keys) as door:
        door.image(R, "1", [LAYER])
        door.image(PRIVATE, "1", [b"private"])
        push(door, MODEL, FILES)
        with open_site(Settings.load(data), background=False) as opened, opened.catalog.writing() as conn:
            conn.execute(t.repository.update().where(t.repository.c.name == PRIVATE).values(visibility="private"))
        yield door


def manifest(note: str) -> bytes:
    config = {"mediaType": EMPTY, "digest": sha(b"{}"), "size": 2}
    return json.dumps({"schemaVersion": 2, "mediaType": MANIFEST, "config": config, "layers": [], "annotations": {"note": note}}).encode()


def credentials(door: Door, who: str, how: str, route: Route, path: str) -> tuple[dict[str, str], Answer | None]:
    """The Authorization of a caller in one form; in the token flow also the refusal that the token endpoint gave."""
    if how == "token" and path.startswith("/v2/"):
        refused = door.ask(route.method, path, who=None)
        scope = re.search(r'scope="([^"]*)"', refused.headers["www-authenticate"])
        query = urlencode([("service", "x"), *([("scope", s) for s in scope[1].split(" ")] if scope else [])])
        answer = door.ask("GET", f"/token?{query}", who=None if who == "none" else who, basic=True)
        return ({"Authorization": f"Bearer {answer.json()['token']}"}, None) if answer.status == 200 else ({}, answer)
    if who == "none":
        return {}, None
    key = door.keys[who]
    value = f"Bearer {key}" if how == "bearer" else "Basic " + base64.b64encode(f"$oauthtoken:{key}".encode()).decode()
    return {"Authorization": value}, None


@pytest.mark.parametrize("how", ["bearer", "basic", "token"])
@pytest.mark.parametrize("route", ROUTES, ids=lambda r: f"{r.method} {r.path[:60]}")
def test_who_may_do_what(site: Door, route: Route, how: str) -> None:
    found: dict[str, int] = {}
    for who in CALLERS:
        raw = manifest(f"{who} {how} {route.path}")
        values = {"who": who, "how": how, "digest": sha(raw), "upload": "", "own": ""}
        if "{upload}" in route.path:
            values["upload"] = site.ask("POST", f"/v2/{R}/blobs/uploads/").headers["docker-upload-uuid"]
        if "{own}" in route.path:
            values["own"] = site.blob(R, f"{who} {how}".encode())
        moving = f"/v2/{R}/manifests/moving-{who}-{how}"
        if "moving-" in route.path:
            assert site.ask("PUT", moving, manifest("before"), Content_Type=MANIFEST).status == 201
        path = route.path.format(**values)
        lease = {"model": MODEL, "ref": "1", "profile_digest": sha(b"none"), "profile_id": "p", "host": "h", "gpu_uuids": []}
        body = {"": None, "manifest": raw, "lease": json.dumps(lease).encode()}.get(route.body, route.body.encode())
        headers, refused = credentials(site, who, how, route, path)
        answer = refused or site.ask(route.method, path, body, who=None, Content_Type=MANIFEST, **headers)
        found[who] = answer.status
        assert not any(key.encode() in answer.body for key in site.keys.values())
        if "moving-" in route.path and answer.status > 299:
            assert site.ask("GET", moving).body == manifest("before"), who
        if route.path.endswith("{who}-{how}") and "new-" in route.path and answer.status > 299:
            assert site.ask("GET", path).status == 404, who
        if "{own}" in route.path and answer.status > 299:
            assert site.ask("HEAD", path).status == 200, who
    assert found == {who: route.expected(who) for who in CALLERS}


def test_an_auditor_reads_what_was_recorded_about_its_own(site: Door) -> None:
    site.image("acme/audited", "1", [b"audited"])
    assert site.ask("GET", "/v2/acme/audited/manifests/1", who="other").status == 404
    found: list[dict[str, object]] = []
    after = 0
    while True:
        page = site.ask("GET", f"/airlock/v1/audit?limit=50&after={after}", who="auditor").json()
        found += page["items"]
        after = page["after"]
        if not after:
            break
    assert {row["org"] for row in found} == {"acme"}
    assert len({row["id"] for row in found}) == len(found) > 3
    assert any(row["event"] == "push" and str(row["ref"]).startswith("acme/audited@") for row in found)
    assert not any(key in json.dumps(found) for key in site.keys.values())


def test_a_listing_shows_each_key_its_own(site: Door) -> None:
    def names(who: str) -> set[str]:
        return set(site.ask("GET", "/v2/_catalog", who=who).json()["repositories"]) - {NEW, "acme/audited"}

    assert names("auditor") == names("puller") == {R, MODEL, PRIVATE}
    assert names("narrow") == {R, MODEL} and names("other") == set()


def test_a_creator_may_send_the_same_again(site: Door) -> None:
    place = f"/v2/{R}/manifests/again"
    for _ in range(2):  # an answer that was lost is asked for again
        assert site.ask("PUT", place, manifest("again"), who="creator", Content_Type=MANIFEST).status == 201
    refused = site.ask("PUT", place, manifest("changed"), who="creator", Content_Type=MANIFEST)
    assert (refused.status, refused.code) == (403, "DENIED") and "again exists" in refused.json()["errors"][0]["message"]
    several = f"/v2/{R}/manifests/{sha(manifest('changed'))}?tag=fresh&tag=again"
    assert site.ask("PUT", several, manifest("changed"), who="creator", Content_Type=MANIFEST).status == 403
    assert site.ask("HEAD", f"/v2/{R}/manifests/fresh").status == 404, "all of the tags or none"
    assert site.ask("GET", place).body == manifest("again")


def test_every_route_of_the_door_is_in_the_table() -> None:
    """A route that is added to the OCI door without a line above fails here."""
    import inspect

    from registry.protocols.oci import OciDoor

    served = set(re.findall(r'"((?:GET|PUT|POST|PATCH|DELETE) [a-z]+)": self\.', inspect.getsource(OciDoor)))
    kinds = {"manifests": "manifests", "blobs": "blobs", "tags": "tags", "referrers": "referrers"}
    listed = set()
    for route in ROUTES:
        if route.path.startswith("/v2/"):
            rest = "uploads" if "/uploads/" in route.path else next((k for k in kinds if f"/{k}/" in route.path), route.path[4:])
            rest = {"": "ping", "_catalog": "catalog"}.get(rest, rest)
            rest = "upload" if "{upload}" in route.path else rest
            listed.add(f"{route.method} {rest}")
    assert {s for s in served if not s.startswith("HEAD")} <= listed
