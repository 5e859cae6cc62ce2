"""The NGC door over HTTP to a real process, by the shapes and sequences that NGC's clients expect."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import time
import urllib.request
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from blake3 import blake3

from registry.home import Home
from registry.tickets import Ticket, Tickets
from tests.contracts.doors import sha
from tests.contracts.ngc import BUNDLE, FILES, GATED, MIRRORED, OWN, PLUS, NgcDoor, door, fill, new_ngc_site, ngc_serving, push_image
from tests.contracts.stores import s3_url

__all__ = ["door"]  # a fixture
pytestmark = pytest.mark.server
DEMO = "/v2/org/acme/team/vision/models/demo"
LLAMA = "/v2/org/nim/team/meta/models/llama"
PAID = "/v2/org/nim/team/meta/models/paid"


def ask_caller(door: NgcDoor, key: str | None, **headers: str) -> tuple[int, Any]:
    body = f"credentials={quote(key)}" if key is not None else ""
    found = door.ask("POST", "/v3/keys/get-caller-info", body, None, Content_Type="application/x-www-form-urlencoded", **headers)
    return found.status, found.json()


# ---- who calls


def test_caller_info_of_a_service_key(door: NgcDoor) -> None:
    status, value = ask_caller(door, door.main.keys["acme"])
    assert status == 200 and value["type"] == "SERVICE_KEY" and value["orgName"] == "acme" and value["user"] is None
    assert value["keyId"].startswith("key-") and value["products"] == [] and value["requestStatus"]["statusCode"] == "SUCCESS"


def test_caller_info_of_a_personal_key_names_the_open_teams(door: NgcDoor) -> None:
    status, value = ask_caller(door, door.main.keys["person"])
    assert status == 200 and value["type"] == "PERSONAL_KEY" and value["userId"] == "ada"
    roles = value["user"]["roles"]
    assert [role["team"]["name"] for role in roles if "team" in role] == ["audio", "vision"]
    assert {role["org"]["name"] for role in roles} == {"acme"} and "closed" not in json.dumps(value)


def test_caller_info_takes_the_key_as_bearer_too(door: NgcDoor) -> None:
    assert ask_caller(door, None, Authorization=f"Bearer {door.main.keys['acme']}")[0] == 200


@pytest.mark.parametrize("key", ["", "nvapi-x", "Zm9vOmJhcg==", "nvapi-" + "0" * 64, "\u00e9", "a.b.c", None])
def test_caller_info_of_no_key_of_ours(door: NgcDoor, key: str | None) -> None:
    status, value = ask_caller(door, key)
    assert (status, value["requestStatus"]["statusCode"]) == (401, "UNAUTHORIZED") and value["requestStatus"]["statusDescription"]


def test_caller_info_of_an_expired_key_tells_the_date(door: NgcDoor) -> None:
    status, value = ask_caller(door, door.main.keys["expired"])
    assert status == 401 and "expired on 20" in value["requestStatus"]["statusDescription"]


def test_caller_info_is_asked_by_post(door: NgcDoor) -> None:
    found = door.ask("GET", "/v3/keys/get-caller-info")
    assert (found.status, found.headers["allow"]) == (405, "POST")


@pytest.mark.parametrize(
    "query", ["service=ngc&", "service=ngc&scope=group/ngc:acme", "service=ngc&scope=group%2Fngc%3Aacme&scope=group/ngc:acme/vision"]
)
def test_token_reads_and_does_nothing_else(door: NgcDoor, query: str) -> None:
    basic = base64.b64encode(f"$oauthtoken:{door.main.keys['acme']}".encode()).decode()
    found = door.ask("GET", f"/token?{query}", None, None, Authorization=f"Basic {basic}")
    assert found.status == 200 and found.json()["expires_in"] >= 900
    bearer = {"Authorization": f"Bearer {found.json()['token']}"}
    assert door.get(DEMO, None, **bearer)["model"]["name"] == "demo"
    assert door.get("/v2/orgs?page-size=500", None, **bearer)["organizations"][0]["name"] == "acme"
    pushed = door.main.ask("POST", f"/v2/{OWN}/blobs/uploads/", b"", None, **bearer)
    admin = door.main.ask("POST", "/airlock/v1/orgs", b"{}", None, **bearer)
    again = door.ask("GET", f"/token?{query}", None, None, **bearer)
    assert (pushed.status, again.status) == (401, 401) and admin.status in (401, 403)


@pytest.mark.parametrize("credential", ["", "Basic " + base64.b64encode(b"$oauthtoken:nvapi-bad").decode(), "Basic !", "Bearer"])
def test_token_for_nobody(door: NgcDoor, credential: str) -> None:
    found = door.ask("GET", "/token?service=ngc", None, None, **({"Authorization": credential} if credential else {}))
    assert (found.status, found.json()["requestStatus"]["statusCode"]) == (401, "UNAUTHORIZED")


def test_organisation_routes(door: NgcDoor) -> None:
    assert [team["name"] for team in door.get("/v2/org/acme/teams?page-size=500", "person")["teams"]] == ["audio", "vision"]
    assert door.get("/v2/users/me", "person")["user"]["name"] == "ada"
    assert door.get("/v2/products")["products"] == [] and door.get("/roles?show-hidden=true")["roles"][0]["name"] == "REGISTRY_READ"
    assert door.ask("GET", "/v2/org/other/teams").status == 404
    assert door.ask("GET", "/v2/resources/nvidia/ngc-apps/ngc_cli").json()["requestStatus"]["statusCode"] == "NOT_FOUND"


# ---- models


def test_model(door: NgcDoor) -> None:
    value = door.get(f"{DEMO}?resolve-labels=false")["model"]
    assert (value["name"], value["orgName"], value["teamName"], value["latestVersionIdStr"]) == ("demo", "acme", "vision", "1.10")
    assert value["latestVersionSizeInBytes"] == sum(map(len, FILES.values())) and not value["isPublic"] and not value["canGuestDownload"]


def test_versions_are_in_the_order_of_their_numbers(door: NgcDoor) -> None:
    value = door.get(f"{DEMO}/versions?page-size=1000&sort-order=SEMVER_DESC")
    assert [(v["versionId"], v["isSigned"]) for v in value["modelVersions"]] == [("1.10", True), ("1.0", False)] and value["paginationInfo"][
        "totalResults"
    ] == 2


@pytest.mark.parametrize(("path", "name"), [(f"{LLAMA}/versions/fp16", "llama"), ("/v2/org/hf/team/acme/models/m/versions/main", "m")])
def test_a_model_of_another_origin_has_its_ngc_name(door: NgcDoor, path: str, name: str) -> None:
    value = door.get(path, "root")
    assert value["model"]["name"] == name and value["modelVersion"]["totalFileCount"] == len(FILES)


def test_a_version_that_is_no_tag(door: NgcDoor) -> None:
    for spelled in (PLUS, quote(PLUS)):
        assert door.get(f"{LLAMA}/versions/{spelled}", "root")["modelVersion"]["versionId"] == PLUS
        assert len(door.get(f"{LLAMA}/{spelled}/files", "root")["urls"]) == len(FILES)
    assert door.ask("GET", f"{LLAMA}/versions/hf-e9f8eff-nim1.5%20", None, "root").status == 404
    assert [v["versionId"] for v in door.get(f"{LLAMA}/versions", "root")["modelVersions"]] == [PLUS, "fp16"]


def test_version(door: NgcDoor) -> None:
    value = door.get(f"{DEMO}/versions/1.0")["modelVersion"]
    assert (value["versionId"], value["status"], value["isSigned"], value["totalFileCount"]) == ("1.0", "UPLOAD_COMPLETE", False, len(FILES) + 1)
    assert door.get(f"{DEMO}/versions/1.10")["modelVersion"]["isSigned"] is True


def test_files(door: NgcDoor) -> None:
    value = door.get(f"{DEMO}/versions/1.10/files?page-size=1000")
    assert {f["path"]: f["sizeInBytes"] for f in value["modelFiles"]} == {path: len(data) for path, data in FILES.items()}
    for file in value["modelFiles"]:
        assert base64.b64decode(file["sha256_base64"]) == hashlib.sha256(FILES[file["path"]]).digest()


def test_files_by_pages(door: NgcDoor) -> None:
    paths: list[str] = []
    first = door.get(f"{DEMO}/versions/1.0/files?page-size=2")
    paths += [f["path"] for f in first["modelFiles"]]
    for page in range(1, first["paginationInfo"]["totalPages"]):
        paths += [f["path"] for f in door.get(f"{DEMO}/versions/1.0/files?page-size=2&page-number={page}")["modelFiles"]]
    assert paths == sorted([*FILES, "old.txt"], key=str.encode)
    assert door.get(f"{DEMO}/versions/1.10/files?page-size=500&page-number=1")["paginationInfo"]["index"] == 0, "one page, counted from 1"
    assert door.get(f"{DEMO}/versions/1.10/files?page-number=9")["modelFiles"] == []
    assert door.ask("GET", f"{DEMO}/versions/1.10/files?page-size=x").status == 400


@pytest.mark.parametrize("query", ["", "?page-size=500&page-number=1", "?page-size=1&page-number=0"])
def test_urls_are_one_page_and_need_no_key(door: NgcDoor, query: str) -> None:
    value = door.get(f"{DEMO}/1.10/files{query}")
    assert value["paginationInfo"] == {"index": 0, "size": len(FILES), "totalPages": 1, "totalResults": len(FILES)}
    got = {path: door.bytes_of(url) for path, url in zip(value["filepath"], value["urls"], strict=True)}
    assert {path: found.body for path, found in got.items()} == FILES
    assert all("content-encoding" not in found.headers for found in got.values())


def test_one_url(door: NgcDoor) -> None:
    value = door.get(f"{DEMO}/1.10/files?path={quote('sub/deep/ranks 0+1 ü%25.bin')}")
    assert value["filepath"] == ["sub/deep/ranks 0+1 ü%25.bin"] and len(value["urls"]) == 1
    assert door.bytes_of(value["urls"][0]).body == FILES["sub/deep/ranks 0+1 ü%25.bin"]
    assert door.ask("GET", f"{DEMO}/1.10/files?path=nothing").status == 404


def url_of(door: NgcDoor, path: str, who: str = "acme") -> str:
    return str(door.get(f"{DEMO}/1.10/files?path={quote(path)}", who)["urls"][0])


def test_ranges(door: NgcDoor) -> None:
    weights, url = FILES["model.safetensors"], url_of(door, "model.safetensors")
    part = door.bytes_of(url, Range="bytes=1000-2999999", Accept_Encoding="gzip, deflate")
    assert (part.status, part.headers["content-range"], part.body) == (206, "bytes 1000-2999999/3000000", weights[1000:])
    assert "content-encoding" not in part.headers
    beyond = door.bytes_of(url, Range="bytes=3000000-")
    assert (beyond.status, beyond.headers["content-range"]) == (416, "bytes */3000000")
    empty = door.bytes_of(url_of(door, "empty.txt"), Range="bytes=0--1")
    assert empty.status in (200, 206) and empty.body == b""
    assert door.bytes_of(url_of(door, "empty.txt"), Range="bytes=0-0").status == 416
    head = door.ask("HEAD", url.removeprefix(door.url), None, None)
    assert (head.status, head.headers["content-length"], head.body) == (200, "3000000", b"")


@pytest.mark.parametrize("path", list(FILES))
def test_a_file_by_its_path(door: NgcDoor, path: str) -> None:
    found = door.ask("GET", f"{DEMO}/versions/1.10/files/{quote(path)}")
    assert (found.status, found.body) == (200, FILES[path])


@pytest.mark.parametrize("base", [f"{DEMO}/versions/1.10", f"{LLAMA}/versions/fp16"])
def test_checksums_of_every_file(door: NgcDoor, base: str) -> None:
    found = door.ask("GET", f"{base}/files/checksums.blake3", None, "root")
    assert found.status == 200
    lines = dict(reversed(line.split("  ", 1)) for line in found.body.decode().splitlines())
    assert lines == {path: blake3(data).hexdigest() for path, data in FILES.items()}
    assert lines["empty.txt"] == "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262"


def test_checksums_that_came_with_a_version_are_given_as_they_are(door: NgcDoor) -> None:
    own = b"00  of the vendor\n"
    door.push("ngc/nim/meta/summed", "1", {"a": b"a", "checksums.blake3": own})
    assert door.ask("GET", "/v2/org/nim/team/meta/models/summed/versions/1/files/checksums.blake3", None, "root").body == own


def test_signature(door: NgcDoor) -> None:
    url = door.get(f"{DEMO}/versions/1.10/signature")["url"]
    assert door.bytes_of(url).body == BUNDLE
    assert door.ask("GET", f"{DEMO}/versions/1.0/signature").status == 404


def test_public_key(door: NgcDoor) -> None:
    place = "/v2/catalog/models/public-key"
    absent = door.ask("GET", place, None, None)
    assert absent.status == 404 and "ngc-models.pem" in absent.json()["requestStatus"]["statusDescription"]
    folder = door.main.data / "trust" / "vendors"
    folder.mkdir()
    (folder / "ngc-models.pem").write_text("-----BEGIN CERTIFICATE-----\n")
    found = door.ask("GET", place, None, None)
    assert found.body == b"-----BEGIN CERTIFICATE-----\n" and found.headers["content-type"].startswith("text/plain")
    assert [door.ask("GET", f"/v2/catalog/{kind}/public-key", None, None).status for kind in ("containers", "charts", "..%2f..")] == [404] * 3


def test_double_slashes_are_one(door: NgcDoor) -> None:
    assert door.get(f"/{DEMO}/1.10/files")["filepath"] == door.get(f"{DEMO}/1.10/files")["filepath"]


# ---- tickets


def altered(door: NgcDoor, change: str) -> str:
    url = url_of(door, "config.json")
    base, _, text = url.rpartition("/")
    if change == "signature":
        return f"{base}/{text[:-2]}{'AA' if text[-2:] != 'AA' else 'BB'}"
    if change == "claims":
        return f"{base}/{text[:20]}{'A' if text[20] != 'A' else 'B'}{text[21:]}"
    if change == "unsigned":
        return f"{base}/{text.rpartition('.')[0]}"
    home = Home.open(door.main.data)
    call = door.main.ask("GET", "/airlock/v1/whoami").json()["key_id"]
    ticket = Ticket(call, OWN, sha(FILES["config.json"]), int(time.time()) - (1 if change == "expired" else -1000))
    pepper, instance = home.pepper(), home.instance
    if change == "foreign":
        instance = "another-site"
    if change == "pepper":
        pepper = os.urandom(32)
    if change == "nobody":
        ticket = Ticket("", OWN, ticket.digest, ticket.exp)
    if change == "gone":
        ticket = Ticket("key-0000000000000000", OWN, ticket.digest, ticket.exp)
    if change == "object":
        ticket = Ticket(call, "other/secret", ticket.digest, ticket.exp)
    return f"{base}/{Tickets(pepper, instance).sign(ticket)}"


@pytest.mark.parametrize(
    ("change", "status"),
    [
        ("none", 200),
        ("signature", 403),
        ("claims", 403),
        ("unsigned", 403),
        ("expired", 403),
        ("foreign", 403),
        ("pepper", 403),
        ("gone", 403),
        ("nobody", 401),
        ("object", 404),
    ],
)
def test_a_ticket_that_is_not_ours(door: NgcDoor, change: str, status: int) -> None:
    found = door.bytes_of(altered(door, change))
    assert found.status == status, found.body
    if status != 200:
        assert found.json()["requestStatus"]["statusDescription"]


def test_a_ticket_is_no_key(door: NgcDoor) -> None:
    ticket = url_of(door, "config.json").rpartition("/")[2]
    bearer = {"Authorization": f"Bearer {ticket}"}
    assert door.ask("GET", DEMO, None, None, **bearer).status == 401
    assert door.main.ask("GET", f"/v2/{OWN}/blobs/{sha(FILES['config.json'])}", None, None, **bearer).status == 401


def test_a_revoked_key_ends_its_tickets_and_every_route(door: NgcDoor) -> None:
    made = door.main.ask(
        "POST", "/airlock/v1/keys", json.dumps({"org": "acme", "tier": "enterprise", "models": ["acme/**"], "actions": ["pull"]}), "root"
    )
    assert made.status in (200, 201), made.body
    door.main.keys["brief"] = made.json()["key"]
    url = url_of(door, "config.json", "brief")
    assert door.bytes_of(url).status == 200
    gone = door.main.ask("POST", "/airlock/v1/keys/revoke", json.dumps({"key_id": made.json()["key_id"]}), "root")
    assert gone.status == 200, gone.body
    refused = door.bytes_of(url)
    assert refused.status == 401 and "revoked on 20" in refused.json()["requestStatus"]["statusDescription"]
    for path in (f"{DEMO}/1.10/files", f"{DEMO}/versions/1.10/files/checksums.blake3", f"{DEMO}/versions/1.10/files/config.json"):
        assert door.ask("GET", path, None, "brief").status == 401
    assert ask_caller(door, door.main.keys["brief"])[0] == 401


def test_reads_by_a_ticket_and_tokens_are_recorded(door: NgcDoor) -> None:
    key = door.main.ask("GET", "/airlock/v1/whoami", None, "person").json()["key_id"]
    assert door.bytes_of(url_of(door, "config.json", "person")).status == 200
    assert door.ask("GET", "/token?service=ngc", None, "person").status == 200
    rows: list[Any] = []
    after = 0
    while True:
        page = door.main.ask("GET", f"/airlock/v1/audit?limit=1000&after={after}", None, "root").json()
        rows += page["items"]
        if not page["items"] or page["after"] == after or not page["after"]:
            break
        after = page["after"]
    mine = {(row.get("event") or row.get("action"), str(row.get("ref", ""))) for row in rows if row.get("key_id") == key}
    assert any(OWN in ref for _, ref in mine) and any("group:ngc" in ref for _, ref in mine), mine


def test_no_ticket_is_logged(door: NgcDoor) -> None:
    url = url_of(door, "config.json")
    assert door.bytes_of(url).status == 200
    assert any(line["path"].startswith("/dl/") for line in door.lines()) and url.rpartition("/")[2] not in door.main.log.read_text()


# ---- who may


@pytest.mark.parametrize(
    "rest", ["", "/versions", "/versions/1", "/versions/1/files", "/1/files", "/versions/1/files/config.json", "/versions/1/signature"]
)
@pytest.mark.parametrize(
    ("who", "base", "status", "code"),
    [
        (None, DEMO, 401, "UNAUTHORIZED"),
        ("expired", DEMO, 401, "UNAUTHORIZED"),
        ("nothing", DEMO, 403, "FORBIDDEN"),
        ("low", PAID, 402, "PAYMENT_REQUIRED"),
        ("acme", "/v2/org/other/models/secret", 404, "NOT_FOUND"),
        ("acme", "/v2/org/other/models/absent", 404, "NOT_FOUND"),
        ("acme", LLAMA, 404, "NOT_FOUND"),
        ("acme", PAID, 403, "FORBIDDEN"),
    ],
)
def test_refusals(door: NgcDoor, rest: str, who: str | None, base: str, status: int, code: str) -> None:
    found = door.ask("GET", base + rest, None, who)
    told = found.json()["requestStatus"]
    assert (found.status, told["statusCode"]) == (status, code) and told["statusDescription"] and told["requestId"] and "urls" not in found.json()


def test_a_hidden_name_and_an_absent_one_are_told_alike(door: NgcDoor) -> None:
    words = [door.ask("GET", f"/v2/org/other/models/{name}").json()["requestStatus"]["statusDescription"] for name in ("secret", "absent")]
    assert words[0] == words[1]


@pytest.mark.parametrize(
    "path", [f"{DEMO}/versions/9.9", f"{DEMO}/9.9/files", f"{DEMO}/versions/1.10/files/none", "/v2/org/acme/models/none", "/v2", "/", "/v2/_catalog"]
)
def test_what_is_not_there(door: NgcDoor, path: str) -> None:
    found = door.ask("GET", path)
    assert (found.status, found.json()["requestStatus"]["statusCode"]) == (404, "NOT_FOUND")


def test_what_ends_soon_is_told(door: NgcDoor) -> None:
    for path in (DEMO, "/v2/orgs", f"{DEMO}/1.10/files"):
        said = door.ask("GET", path, None, "soon").headers["nv-ngc-response-warning-message"]
        assert re.search(r"\bkey expires in 7 days, on 20\S+Z", said), said
    assert "nv-ngc-response-warning-message" not in door.ask("GET", DEMO, None, "root").headers


def test_headers_of_the_client_give_no_right(door: NgcDoor) -> None:
    found = door.ask("GET", "/v2/org/other/models/secret", None, "acme", nv_ngc_org="other", nv_ngc_team="x", operation_name="y")
    assert found.status == 404


def test_nothing_is_written_here(door: NgcDoor) -> None:
    for method in ("POST", "PUT", "PATCH", "DELETE"):
        found = door.ask(method, DEMO, b"{}")
        assert (found.status, found.headers["allow"]) == (405, "GET, HEAD")


def test_the_main_listener_has_none_of_it(door: NgcDoor) -> None:
    assert door.main.ask("GET", DEMO).status == 404
    assert door.main.ask("POST", "/v3/keys/get-caller-info", b"credentials=x").status == 404
    assert door.ask("GET", f"/v2/{OWN}/manifests/1.10").status == 404


# ---- images and search


@pytest.fixture(scope="module")
def image(door: NgcDoor) -> str:
    return push_image(door, "nvcr.io/nim/meta/app")


def test_images(door: NgcDoor, image: str) -> None:
    base = "/v2/org/nim/team/meta/repos/app"
    tags = {tag["tag"]: tag for tag in door.get(f"{base}/images", "root")["images"]}
    assert list(tags) == ["1.1", "1.0"] and tags["1.0"]["digest"] == image
    assert [(v["architecture"], v["os"]) for tag in tags.values() for v in tag["architectureVariants"]] == [("arm64", "linux")] * 2
    info = door.get(f"{base}?resolve-labels=false", "root")
    assert (info["name"], info["orgName"], info["latestTag"]) == ("app", "nim", "1.1") and info["latestImageSize"] > 0
    assert door.get(f"{base}/images/1.0", "root")["architecture"] == "arm64"
    assert door.get(f"{base}/tags/1.0", "root")["digest"] == image
    assert door.ask("GET", f"{base}/tags/9", None, "root").status == 404 and door.ask("GET", base).status == 403
    assert door.ask("GET", "/v2/org/acme/team/vision/repos/demo").status == 404, "a model is no image"


def search(door: NgcDoor, place: str, text: str, who: str | None = "acme", kind: str = "MODEL", **more: Any) -> list[str]:
    value = door.get(f"/v2/search/{place}/resources/{kind}?q={quote(json.dumps({'query': text, 'page': 0, 'pageSize': 100} | more))}", who)
    found = [item["resourceId"] for group in value["results"] for item in group["resources"]]
    assert len(found) <= value["resultTotal"]
    return found


def test_search_has_each_thing_in_one_place(door: NgcDoor, image: str) -> None:
    assert [name for name in search(door, "catalog", "resourceId:*") if "summed" not in name] == ["acme/open/free", "hf/acme/m", "nim/meta/paid"]
    assert search(door, "org/acme/team/vision", "resourceId:acme/vision/*") == ["acme/vision/demo"]
    assert search(door, "subscriber/catalog", "resourceId:*") == [], "a key sees what its grants cover"
    assert search(door, "subscriber/catalog", "resourceId:nim/*", "low") == ["nim/meta/llama"]
    assert search(door, "catalog", "orgName:nim", "root", "CONTAINER") == ["nim/meta/app"]
    assert search(door, "org/other", "resourceId:*") == [] and search(door, "org/acme", "zzz") == []
    assert search(door, "org/acme", "demo", page=1) == [] and search(door, "catalog", "[", "acme") == []
    assert door.ask("GET", "/v2/search/catalog/resources/MODEL?q={").status == 400


# ---- guests


def test_guests_read_what_is_public_where_the_site_says_so(tmp_path: Path) -> None:
    data = tmp_path / "data"
    with ngc_serving(data, new_ngc_site(data), AIRLOCK_ANONYMOUS="on") as door:
        fill(door, data)
        base, guest = "/v2/models/acme/open/free", {"X_NGC_Guest_Token": "00000000-0000-4000-8000-000000000000"}
        assert door.get(f"{base}?resolve-labels=false", None, **guest)["model"]["canGuestDownload"] is True
        assert door.get(f"{base}/versions/1", None, **guest)["modelVersion"]["status"] == "UPLOAD_COMPLETE"
        assert len(door.get(f"{base}/versions/1/files?page-size=1000", None, **guest)["modelFiles"]) == len(FILES)
        value = door.get("/v2/models/org/acme/team/open/free/1/files", None, **guest)
        assert {p: door.bytes_of(u).body for p, u in zip(value["filepath"], value["urls"], strict=True)} == FILES
        assert search(door, "catalog", "resourceId:acme/*", None) == ["acme/open/free"]
        assert door.ask("GET", "/v2/models/acme/vision/demo", None, None, **guest).status == 401
        assert door.ask("GET", f"/v2/models/{MIRRORED.removeprefix('ngc/')}", None, None, **guest).status == 401, "private"
        assert door.ask("GET", f"/v2/models/{GATED.removeprefix('ngc/')}/versions/1", None, None).status == 401


def test_a_ticket_leads_to_the_object_store(tmp_path: Path) -> None:
    """Where bytes may be redirected a ticket answers 307, which needs no key either."""
    data, env = tmp_path / "data", {"AIRLOCK_BLOBS": s3_url(tmp_path)}
    with ngc_serving(data, new_ngc_site(data, **env), **env) as door:
        door.push(OWN, "1.10")
        for path in FILES:
            found = door.bytes_of(url_of(door, path))
            assert found.status == 307 and found.headers["location"].startswith("http://") and found.body == b""
            with urllib.request.urlopen(found.headers["location"], timeout=30) as answer:
                assert answer.read() == FILES[path]
        lines = door.ask("GET", f"{DEMO}/versions/1.10/files/checksums.blake3").body.decode().splitlines()
        assert dict(reversed(line.split("  ", 1)) for line in lines) == {path: blake3(raw).hexdigest() for path, raw in FILES.items()}


def test_behind_a_proxy_urls_are_those_that_clients_are_told(tmp_path: Path) -> None:
    data = tmp_path / "data"
    told = {"AIRLOCK_NGC": "0.0.0.0:0", "AIRLOCK_NGC_URL": "https://ngc.site.test:8443/", "AIRLOCK_PUBLIC_URL": "https://registry.site.test"}
    with ngc_serving(data, new_ngc_site(data), **told) as door:
        door.push("acme/open/free", "1")
        urls = door.get("/v2/org/acme/team/open/models/free/1/files")["urls"]
        assert all(url.startswith("https://ngc.site.test:8443/dl/atk1.") for url in urls)
        assert door.main.ask("GET", "/v2/org/acme/team/open/models/free/1/files").status == 404, "a listener on every address is known by its port"
