"""Bad input at the Hub door: keys, paths, commits that would fill the memory, batches, upload URLs and names.

Refused in the Hub's shapes, never a 500.
"""

from __future__ import annotations

import base64
import http.client
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

from artifact.grant import Grant
from registry.catalog import ensure_org
from registry.entitlements import new_key
from registry.settings import Settings
from registry.wiring import open_site
from tests.contracts.doors import Door, new_site, serving
from tests.contracts.test_hub_writing import actions, batch, commit, make, names, oid_of, path_of, post, put_lfs, regular
from tests.operated import wait_for

pytestmark = pytest.mark.server


@pytest.fixture(scope="module")
def door(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Door]:
    data = tmp_path_factory.mktemp("hub-input") / "data"
    keys, now = new_site(data), time.time()
    with open_site(Settings.load(data), background=False) as site, site.catalog.writing() as conn:
        grant, org = Grant(("acme/**",), ("pull", "push")), ensure_org(conn, "acme", now)
        key_id, keys["revoked"] = site.entitlements.add_key(conn, org, tier="enterprise", grant=grant, expires=0.0, at=now)
        site.entitlements.revoke(conn, key_id, now)
    with serving(data, keys) as found:
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


# ---- keys of the wrong kind


def basic(text: str) -> bytes:
    return b"Basic " + base64.b64encode(text.encode())


STRANGE = new_key()
SECRET = "hf_" + "QwErTyUiOpAsDfGh" * 2
CREDENTIALS: dict[str, Callable[[Door], bytes]] = {
    "a key of NVIDIA's": lambda door: b"Bearer nvapi-" + b"Zk3-x_9" * 9,
    "a well-formed key that nobody has": lambda door: f"Bearer {STRANGE}".encode(),
    "a key of the Hub's": lambda door: f"Bearer {SECRET}".encode(),
    "a password": lambda door: basic("ada:correct horse battery"),
    "the key as the user": lambda door: basic(f"{door.keys['acme']}:"),
    "the key alone": lambda door: basic(door.keys["acme"]),
    "Basic that is no base64": lambda door: b"Basic " + door.keys["acme"].encode() + b"!",
    "the key without a scheme": lambda door: door.keys["acme"].encode(),
    "another scheme": lambda door: b"Digest " + door.keys["acme"].encode(),
    "an empty Bearer": lambda door: b"Bearer ",
    "a Bearer without its blank": lambda door: b"Bearer",
    "nothing": lambda door: b"",
    "a long key": lambda door: b"Bearer " + door.keys["acme"].encode() + b"k" * 50_000,
    "no ASCII": lambda door: b"Bearer " + door.keys["acme"].encode() + b"\xc3\xa9\xff",
    "two keys in one": lambda door: f"Bearer {door.keys['acme']}, Bearer {door.keys['other']}".encode(),
    "a key behind a wrong one": lambda door: b"Bearer nvapi-wrong\r\nAuthorization: Bearer " + door.keys["acme"].encode(),
    "an altered key": lambda door: b"Bearer " + door.keys["acme"][:-1].encode() + (b"0" if door.keys["acme"][-1] != "0" else b"1"),
    "a token of ours": lambda door: b"Bearer alt1." + b"eyJhIjoxfQ." * 3 + b"c2ln",
    "an expired key": lambda door: f"Bearer {door.keys['expired']}".encode(),
    "a revoked key": lambda door: f"Bearer {door.keys['revoked']}".encode(),
    "a revoked key as a password": lambda door: basic(f"hf_user:{door.keys['revoked']}"),
}
ROUTES = [(method, f"/acme/keyed/resolve/main/{path}") for method in ("GET", "HEAD") for path in ("a.txt", "none.txt")]
ROUTES += [("GET", path) for path in ("/api/whoami-v2", "/api/models", "/v1/hf/acme/api/models/keyed")]
ROUTES += [("GET", f"/api/models/acme/keyed{path}") for path in ("", "/tree/main", "/refs", "/commits/main", "/auth-check", "/xet-write-token/main")]
ROUTES += [("POST", f"/api/models/acme/keyed/{word}/main") for word in ("paths-info", "preupload", "commit")]
ROUTES += [("POST", "/api/repos/create"), ("POST", "/acme/keyed.git/info/lfs/objects/batch"), ("POST", "/api/validate-yaml")]


@pytest.fixture(scope="module")
def keyed(door: Door) -> str:
    repo = make(door, "acme/keyed")
    assert commit(door, repo, regular("a.txt", b"a")).status == 200
    return repo


def spoken(door: Door, method: str, path: str, authorization: bytes, source: int) -> tuple[int, dict[str, str], bytes]:
    """One request with a header that no client library would send, from a network of its own: guesses are counted by network."""
    with socket.create_connection(("127.0.0.1", door.port), 30, (f"127.0.{source}.1", 0)) as sock:
        head = f"{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nAuthorization: ".encode()
        sock.sendall(head + authorization + b"\r\n\r\n")
        answer = http.client.HTTPResponse(sock, method=method)
        answer.begin()
        return answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read()


@pytest.mark.parametrize("kind", CREDENTIALS)
def test_a_key_of_the_wrong_kind(door: Door, keyed: str, kind: str) -> None:
    """One answer at every route: the words that make clients say it is the token, not that the repository is not there; ours are in the body."""
    sent = CREDENTIALS[kind](door)
    begun = door.log.stat().st_size
    for method, path in ROUTES:
        status, headers, body = spoken(door, method, path, sent, 2 + list(CREDENTIALS).index(kind))
        assert (status, headers["www-authenticate"]) == (401, "Bearer"), (path, body)
        assert headers["x-error-message"] == "Invalid credentials in Authorization header" and "x-error-code" not in headers
        told = json.loads(body) if method != "HEAD" else {}
        words = {"an expired key": "expired on 20", "a revoked key": "revoked on 20", "a revoked key as a password": "revoked on 20"}
        assert method == "HEAD" or words.get(kind, "not valid here") in told["error"], body
        for secret in (*door.keys.values(), SECRET, STRANGE):
            assert secret[:20] not in str(headers) + body.decode()
    wait_for(lambda: door.log.read_bytes()[begun:].count(b'"status": 401') == len(ROUTES), "a line of each request")
    logged = door.log.read_bytes()[begun:]
    assert b"Traceback" not in logged
    for secret in (*(key.encode() for key in door.keys.values()), STRANGE.encode(), SECRET.encode(), b"Zk3-x_9", b"correct horse", sent[-30:]):
        assert len(secret) < 12 or (secret not in logged and base64.b64encode(secret)[:16] not in logged)


@pytest.mark.parametrize(
    "tail",
    [b"\0", b"\x01", b"\x1b[2J", b"\x7f", b"\rX-Other: 1", b"\n folded", b"k" * 100_000],
    ids=["nul", "soh", "esc", "del", "cr", "lf", "100 kB"],
)
def test_a_header_that_http_has_no_place_for_ends_the_request(door: Door, keyed: str, tail: bytes) -> None:
    begun = door.log.stat().st_size
    for method, path in ROUTES:
        try:
            status, headers, _ = spoken(door, method, path, f"Bearer {door.keys['acme']}".encode() + tail, 1)
        except (ConnectionResetError, BrokenPipeError):
            assert len(tail) > 65536, "only one that is too long may meet a closed connection"
            continue
        assert (status, headers["connection"]) == (400, "close"), path
    logged = door.log.read_text()[begun:]
    assert door.keys["acme"] not in logged and "Traceback" not in logged


def test_of_two_keys_the_first_counts(door: Door, keyed: str) -> None:
    both = f"Bearer {door.keys['acme']}\r\nAuthorization: Bearer {door.keys['other']}"
    status, _, body = spoken(door, "GET", "/api/whoami-v2", both.encode(), 1)
    assert status == 200 and json.loads(body)["name"] == "acme"
    status, _, body = spoken(door, "GET", f"/api/models/{keyed}", basic(f"anything:{door.keys['acme']}"), 1)
    assert status == 200 and json.loads(body)["id"] == keyed, "a key as the password of Basic is a key, as git and netrc send it"


@pytest.mark.parametrize(("who", "words"), [("expired", "expired on 20"), ("revoked", "revoked on 20")])
def test_hub_clients_say_that_it_is_the_key(door: Door, keyed: str, who: str, words: str) -> None:
    with pytest.raises(HfHubHTTPError) as caught:
        HfApi(endpoint=door.url, token=door.keys[who]).model_info(keyed)
    assert not isinstance(caught.value, RepositoryNotFoundError | GatedRepoError)
    assert caught.value.response.status_code == 401 and "Invalid credentials" in str(caught.value) and words in str(caught.value)
    assert door.keys[who] not in str(caught.value)
