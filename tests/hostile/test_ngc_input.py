"""Bad input at the NGC listener, paths, keys, tickets, ranges and bodies: the right code in NGC's envelope, never a 500."""

from __future__ import annotations

import json
import socket
import string
from urllib.parse import quote

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.contracts.doors import Answer
from tests.contracts.ngc import FILES, NgcDoor, door

__all__ = ["door"]  # a fixture
pytestmark = pytest.mark.server
BASE = "/v2/org/acme/team/vision/models/demo"
WORDS = ["v2", "v3", "org", "acme", "team", "vision", "models", "demo", "versions", "1.10", "files", "repos", "images", "tags", "search", "catalog"]
WORDS += [
    "resources",
    "MODEL",
    "dl",
    "token",
    "keys",
    "get-caller-info",
    "signature",
    "checksums.blake3",
    "public-key",
    "..",
    ".",
    "",
    "%2e%2e",
    "%00",
]
WORDS += ["%ff", "%2f", "%5c", "\u00fc", "a" * 300, "%252e", "users", "me", "subscriber", "nim%2fm%3a1%3ffile=x", "*"]
CODES = {400, 401, 402, 403, 404, 405, 413, 416}


def refused(found: Answer, *codes: int) -> None:
    assert found.status in (codes or CODES), (found.status, found.body)
    told = found.json()["requestStatus"]
    assert told["statusCode"] != "SUCCESS" and told["statusDescription"] and told["requestId"] == found.headers["x-request-id"]
    assert "Traceback" not in found.body.decode()


@pytest.mark.parametrize(
    "path",
    [
        f"{BASE}/versions/1.10/files/../../../../../etc/passwd",
        f"{BASE}/versions/1.10/files/%2e%2e/%2e%2e/registry.db",
        f"{BASE}/versions/1.10/files/..%2f..%2fsecrets%2fpepper",
        f"{BASE}/versions/1.10/files/%252e%252e/x",
        f"{BASE}/versions/1.10/files//config.json",
        f"{BASE}/versions/1.10/files/sub%5cdeep",
        f"{BASE}/versions/1.10/files/config.json%00",
        f"{BASE}/versions/1.10/files/.git/config",
        f"{BASE}/versions/1.10/files/CONFIG.json",
        f"{BASE}/versions/1.10/files/{'a/' * 600}b",
        f"{BASE}/1.10/files?path=../config.json",
        f"{BASE}/1.10/files?path=%00",
        f"{BASE}/1.10/files?path=config.json/",
        f"{BASE}/versions/%00",
        f"{BASE}/versions/{'1' * 300}",
        f"{BASE}/versions/1.10%0a",
        f"{BASE}/versions/sha256:{'0' * 64}",
        "/v2/org/acme%2fvision/models/demo",
        "/v2/org/acme/team/..%2fvision/models/demo",
        "/v2/org/acme/team//models/demo",
        "/v2/org/acme/team/vision/models/demo%2fprofiles",
        "/v2/models/org/acme/team/vision/demo",
        "/v2/models/org",
        "/v2/models/acme/b/c/d/e/versions/1",
        "/nim%2F..%2Fm%3A1%3Ffile%3Dx",
        "/acme%2Fvision%2Fdemo%3A1.10%3Ffile%3D..%2Fconfig.json",
        "/acme/vision/demo:1.10?file=/config.json",
        "/dl/",
        "/dl/a/b",
        "/dl/atk1.",
        f"/dl/{'a' * 20000}",
        "/v2/org",
        "/v2/org/acme/team/vision/models",
    ],
)
def test_path_tricks(door: NgcDoor, path: str) -> None:
    refused(door.ask("GET", path, None, "root"), 400, 403, 404)


def test_the_profiles_of_a_model_are_no_model(door: NgcDoor) -> None:
    refused(door.ask("GET", "/v2/org/acme/team/demo/models/profiles", None, "root"), 404)


@pytest.mark.parametrize(
    "credential", ["Bearer ", "Bearer a.b.c", "Bearer eyJ.eyJ.x", "Basic", "Basic " + "A" * 5000, "Digest x", "Bearer alt1.x.y", "Bearer hf_x"]
)
def test_keys_of_the_wrong_kind(door: NgcDoor, credential: str) -> None:
    for path in (BASE, f"{BASE}/1.10/files", "/v2/orgs", "/token?service=ngc"):
        refused(door.ask("GET", path, None, None, Authorization=credential), 401)


@pytest.mark.parametrize("wanted", ["bytes=7-", "bytes=9999999999999999999-", "bytes=7-8", "bytes=-0"])
@pytest.mark.parametrize("path", ["config.json", "empty.txt"])
def test_ranges_beyond_the_end(door: NgcDoor, path: str, wanted: str) -> None:
    url = door.get(f"{BASE}/1.10/files?path={quote(path)}")["urls"][0]
    found = door.bytes_of(url, Range=wanted)
    refused(found, 416)
    assert found.headers["content-range"] == f"bytes */{len(FILES[path])}"


@pytest.mark.parametrize("wanted", ["bytes=0--1", "bytes=-", "bytes=x", "items=0-1", "bytes=2-1x", "bytes=0-1,3-4", "bytes=" + "9" * 200])
def test_ranges_that_are_none_give_the_whole(door: NgcDoor, wanted: str) -> None:
    for path in ("config.json", "empty.txt"):
        found = door.bytes_of(door.get(f"{BASE}/1.10/files?path={quote(path)}")["urls"][0], Range=wanted)
        assert (found.status, found.body) == (200, FILES[path])


@pytest.mark.parametrize("body", [b"", b"x" * 100_000, b"\xff\xfe", b"credentials", b"credentials=&credentials=", b"a=1&" * 100, b"%00=%00", b"{}"])
def test_bodies_of_caller_info(door: NgcDoor, body: bytes) -> None:
    refused(door.ask("POST", "/v3/keys/get-caller-info", body, None), 400, 401, 413)


SETTINGS = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@SETTINGS
@given(
    st.sampled_from(["GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH"]),
    st.lists(st.sampled_from(WORDS), min_size=1, max_size=9),
    st.sampled_from(["", "?page-size=0", "?page-number=99999999999999999999", "?q={}", "?q=[", "?path=..", "?" + "a&" * 300, "?page-size=-1"]),
    st.sampled_from(["root", None, "nothing", "expired"]),
)
def test_any_path_is_answered_in_the_envelope(door: NgcDoor, method: str, parts: list[str], query: str, who: str | None) -> None:
    found = door.ask(method, "/" + "/".join(quote(part, safe=string.punctuation) for part in parts) + query, b"" if method == "POST" else None, who)
    assert found.status < 500, (found.status, found.body)
    if method != "HEAD" and found.status != 200:
        refused(found)


def test_raw_requests_that_are_none(door: NgcDoor) -> None:
    for raw in (
        b"GET * HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET http://x/v2/orgs HTTP/1.1\r\nHost: x\r\n\r\n",
        b"POST /v3/keys/get-caller-info HTTP/1.1\r\nHost: x\r\n\r\n",
    ):
        with socket.create_connection(("127.0.0.1", door.ngc.port), 10) as s:
            s.sendall(raw)
            assert s.recv(100).split()[1][:1] == b"4"


def test_a_host_header_of_a_client_makes_no_foreign_url(door: NgcDoor) -> None:
    for host in ("evil.test/x", "a b", "x@y", "\u00fc"):
        found = door.ask("GET", f"{BASE}/1.10/files", None, "acme", Host=host.encode("latin-1", "replace").decode("latin-1"))
        assert found.status in (200, 400)
        if found.status == 200:
            assert all(url.startswith(f"{door.url}/dl/") for url in found.json()["urls"])


def test_a_configuration_of_another_organisation_is_not_read(door: NgcDoor) -> None:
    theirs = b'{"architecture":"theirs","os":"theirs-too"}'
    digest = door.main.blob("other/secret", theirs, "other")
    config = {"mediaType": "application/x.foreign.config", "digest": digest, "size": len(theirs)}  # of a type that need not be pushed
    door.main.image("acme/vision/borrowed", "1", [b"layer"], "root", config=config)
    found = door.get("/v2/org/acme/team/vision/repos/borrowed/images", "root")
    assert found["images"][0]["architectureVariants"] and "theirs" not in json.dumps(found)


@pytest.mark.parametrize("path", ["/v2/org/%E2%84%AAelvin/models/demo", "/v2/org/acme/repos/%E2%84%AA", "/v2/models/acme/%E2%84%AA"])
def test_letters_that_only_look_like_ours_are_no_name(door: NgcDoor, path: str) -> None:
    found = door.ask("GET", path)
    refused(found, 404)
    assert "is no name of an artefact" in found.json()["requestStatus"]["statusDescription"]
