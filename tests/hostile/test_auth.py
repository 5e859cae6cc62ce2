"""Keys and tokens under attack: no time tells how much of a key was right, no token is told to anybody but its owner (attacks.md A16 to A19, A21)."""

from __future__ import annotations

import base64
import hashlib
import hmac
import http.client
import json
import random
import socket
import sqlite3
import statistics
import string
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlencode

import jwt
import pytest
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from registry.entitlements import BODY, checksum, new_key
from tests.contracts.doors import Door, new_site, serving

R = "acme/app"
FORM = "application/x-www-form-urlencoded"
TRIES = 10_000
pytestmark = pytest.mark.server


@pytest.fixture(scope="module")
def door(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Door]:
    data = tmp_path_factory.mktemp("auth") / "data"
    keys = new_site(data)
    with serving(data, keys) as found:
        found.image(R, "1", [b"layer"])
        yield found


def guess(real: str, right: int, rng: random.Random) -> str:
    """A well-formed key of which the first characters are those of a real one."""
    body = real[len("nvapi-") :][:right]
    text = "nvapi-" + body + "".join(rng.choices(string.ascii_letters + string.digits, k=BODY - len(body)))
    return text + checksum(text)


@pytest.mark.full
def test_no_time_tells_how_much_of_a_key_was_right(door: Door) -> None:
    """A19: guesses that share most of a real key take as long as random ones, by Welch's t over the faster half of interleaved tries."""
    rng = random.Random(19)
    took: dict[int, list[float]] = {0: [], BODY - 8: []}
    connection = http.client.HTTPConnection("127.0.0.1", door.port, timeout=60)
    for _ in range(TRIES):
        for right in rng.sample(list(took), 2):
            headers = {"Authorization": f"Bearer {guess(door.keys['acme'], right, rng)}"}
            began = time.perf_counter()
            connection.request("GET", "/v2/", headers=headers)
            answer = connection.getresponse()
            answer.read()
            took[right].append(time.perf_counter() - began)
            assert answer.status in (401, 429)
    cold, near = (sorted(values)[: TRIES // 2] for values in took.values())  # the slower half is the machine's, not the check's
    means, spread = (statistics.mean(cold), statistics.mean(near)), statistics.variance(cold) / len(cold) + statistics.variance(near) / len(near)
    t = (means[0] - means[1]) / spread**0.5
    assert abs(t) < 8 or abs(means[0] - means[1]) < 0.02 * min(means), f"t = {t:.1f}, means {means[0] * 1e6:.1f} and {means[1] * 1e6:.1f} us"


def ask(door: Door, method: str, path: str, authorization: str, body: bytes | None = None, **headers: str) -> tuple[int, bytes]:
    answer = door.ask(method, path, body, who=None, Authorization=authorization, **headers)
    return answer.status, answer.body + str(answer.headers).encode()


def test_a_token_is_told_to_its_owner_only(door: Door) -> None:
    scopes = urlencode({"scope": f"repository:{R}:pull,push"})
    basic = "Basic " + base64.b64encode(f"$oauthtoken:{door.keys['acme']}".encode()).decode()
    made = door.ask("GET", f"/token?{scopes}", who=None, Authorization=basic).json()["token"]
    said = []
    for path in (
        f"/v2/{R}/manifests/1",
        f"/v2/{R}/manifests/none",
        "/v2/other/x/manifests/1",
        "/v2/_catalog",
        "/token",
        "/x/y",
        f"/v2/{R}/blobs/bad",
    ):
        for authorization in (f"Bearer {made}", f"Bearer {made[:-1]}", f"Basic {base64.b64encode(f'u:{made}'.encode()).decode()}", made):
            said.append(ask(door, "GET", path, authorization)[1])
    form = urlencode({"grant_type": "password", "username": "u", "password": made}).encode()
    said.append(ask(door, "POST", "/token", "", form, Content_Type=FORM)[1])
    form = urlencode({"grant_type": "password", "username": "u", "password": door.keys["acme"][:-1]}).encode()
    said.append(ask(door, "POST", "/token", "", form, Content_Type=FORM)[1])
    with sqlite3.connect(door.data / "registry.db") as db:
        rows = "\n".join(db.iterdump())
    for where, text in (("answers", b"\n".join(said).decode("latin-1")), ("log", door.log.read_text()), ("database", rows)):
        for secret in (made, made[:-1], made.rsplit(".", 1)[1], door.keys["acme"], door.keys["acme"][:-1]):
            assert secret not in text, where


def test_a_token_is_judged_when_a_request_begins(door: Door, tmp_path: Path) -> None:
    """A transfer that runs while its key is revoked is carried to its end; the next request is refused (oci-distribution.md section 7.2)."""
    from registry.settings import Settings
    from registry.wiring import open_site

    keys = new_site(tmp_path / "data")
    with serving(tmp_path / "data", keys) as found:
        data = random.Random(7).randbytes(40_000_000)
        digest = found.blob(R, data)
        made = found.ask("GET", f"/token?scope=repository:{R}:pull", who="acme").json()["token"]
        key_id = str(found.ask("GET", "/airlock/v1/whoami").json()["key_id"])
        with socket.create_connection(("127.0.0.1", found.port), timeout=60) as sock:
            sock.sendall(f"GET /v2/{R}/blobs/{digest} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nAuthorization: Bearer {made}\r\n\r\n".encode())
            got = sock.recv(4096)
            with open_site(Settings.load(found.data), background=False) as site, site.catalog.writing() as conn:
                assert site.entitlements.revoke(conn, key_id, time.time())
            parts = [got]
            while part := sock.recv(1 << 20):
                parts.append(part)
        assert b"".join(parts).partition(b"\r\n\r\n")[2] == data
        assert found.ask("GET", f"/v2/{R}/blobs/{digest}", who=None, Authorization=f"Bearer {made}").status == 401


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(["acme/app", "acme/app2", "acme/app/x", "acme", "acme/app/profiles", "other/secret", "hf/acme/m", "acme/ap"]),
    st.sampled_from(["pull", "push", "delete", "pull,push", "*", "", "admin", "pull,push,delete,admin"]),
    st.sampled_from(
        [("GET", "manifests/1"), ("HEAD", "manifests/1"), ("GET", "tags/list"), ("POST", "blobs/uploads/"), ("DELETE", "manifests/none")]
    ),
)
def test_a_token_never_opens_more_than_it_was_asked_for(door: Door, name: str, actions: str, request_: tuple[str, str]) -> None:
    """A16 with its neighbours: whatever a token was made for, on acme/app it opens nothing that was not in its scope."""
    made = door.ask("GET", f"/token?{urlencode({'scope': f'repository:{name}:{actions}'})}", who="acme").json()["token"]
    status = ask(door, request_[0], f"/v2/{R}/{request_[1]}", f"Bearer {made}")[0]
    need = {"GET": "pull", "HEAD": "pull", "POST": "push", "DELETE": "delete"}[request_[0]]
    asked = ("pull", "push", "delete") if actions == "*" else actions.split(",")
    looks = request_[0] == "HEAD" or request_[1] == "tags/list"
    opened = name == R and (need in asked or (looks and ("pull" in asked or "push" in asked)))
    assert (status in (200, 202, 404)) is opened, (status, opened)
    assert opened or status == 401


class Listener:
    """Counts who connects."""

    def __init__(self) -> None:
        self.sock = socket.create_server(("127.0.0.1", 0))
        self.sock.setblocking(False)
        self.url = f"http://127.0.0.1:{self.sock.getsockname()[1]}/keys"

    def came(self) -> bool:
        try:
            self.sock.accept()[0].close()
        except BlockingIOError:
            return False
        return True


def b64(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


@pytest.fixture(scope="module")
def listener() -> Iterator[Listener]:
    found = Listener()
    yield found
    found.sock.close()


WORDS = st.sampled_from(["", "JWT", "at+jwt", "lease+jwt", "entitlement+jwt", "revocations+jwt", "jwt"])


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(["none", "None", "HS256", "HS512", "ES256", "RS256", ""]),
    WORDS,
    st.sets(st.sampled_from(["jku", "x5u", "jwk", "kid", "crit", "b64"])),
    st.sampled_from(["lease", "release", "entitlement"]),
    st.booleans(),
    st.sampled_from([f"/v2/{R}/manifests/1", "/v2/", "/token", "/airlock/v1/whoami"]),
)
def test_no_document_is_a_token(door: Door, listener: Listener, alg: str, typ: str, more: set[str], name: str, ours: bool, path: str) -> None:
    """A17 with its neighbours: every algorithm and header over keys of this site, what it really signed too, is refused; nobody is asked."""
    pem = (door.data / "secrets" / f"{name}.pem").read_bytes()
    public = load_pem_private_key(pem, None).public_key()
    shown = public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    values = {"jku": listener.url, "x5u": listener.url, "jwk": {"kty": "oct", "k": b64(b"x")}, "kid": name, "crit": ["exp"], "b64": False}
    head = {"alg": alg, "typ": typ, **{k: values[k] for k in more}}
    access = [{"type": "repository", "name": R, "actions": ["pull", "push", "*"]}]
    claims = {"iss": "airlock", "aud": "x", "sub": "key", "exp": int(time.time()) + 600, "access": access, "is_admin": True}
    text = f"{b64(json.dumps(head).encode())}.{b64(json.dumps(claims).encode())}"
    mac = hmac.new(shown, text.encode(), hashlib.sha512 if alg == "HS512" else hashlib.sha256).digest()
    held = jwt.encode(claims, pem, "ES256", {"typ": typ, "kid": name}) if ours else f"{text}.{b64(mac) if alg.lower() != 'none' else ''}"
    for presented in (held, f"alt1.{held}"):
        status, said = ask(door, "GET", path, f"Bearer {presented}")
        assert status in (401, 429) and presented.encode() not in said, (status, said)
    assert not listener.came()


def test_garbage_as_a_credential_is_a_refusal(door: Door) -> None:
    rng = random.Random(3)
    for _ in range(150):
        raw = rng.randbytes(rng.randrange(60))
        for kind in ("Bearer", "Basic", "bearer alt1.", "Negotiate", ""):
            text = f"{kind} {rng.choice([base64.b64encode(raw).decode(), raw.hex(), new_key()])}"
            status, said = ask(door, "GET", f"/v2/{R}/tags/list", text)
            assert status in (401, 429) and b"errors" in said
    for head in (b"Basic \xe9\xff", b"Bearer \xff\xfe", b"Basic " + b"A" * 60_000, b"Bearer alt1." + b"A" * 60_000, b"\xff"):
        for path in ("/v2/", "/token", "/airlock/v1/whoami", "/api/whoami-v2"):
            with socket.create_connection(("127.0.0.1", door.port), timeout=60) as sock:
                sock.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nAuthorization: ".encode() + head + b"\r\n\r\n")
                answer = sock.recv(4096)
            assert answer.split(b" ")[1] in (b"400", b"401", b"429", b"431"), (head[:20], path, answer[:200])
    assert "Traceback" not in door.log.read_text()
