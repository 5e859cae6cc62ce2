"""First start and leaks (attacks.md A20, A21): no default secret exists, and no planted one appears in a log, error, audit row, figure or span."""

from __future__ import annotations

import base64
import http.client
import itertools
import json
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from registry.entitlements import new_key
from registry.logs import redacted
from tests.conftest import airlock
from tests.contracts.doors import new_site
from tests.fakes.otlp import Receiver
from tests.operated import operated, wait_for

HF = "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"
SIGNATURE = "9b1c4f6a0d7e2b3c5a8f9e0d1c2b3a495867fedcba9876543210aabbccddeeff"
SIGNED = f"https://s3.example/b/k?X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Credential=AKIAPLANTED%2F20260101&X-Amz-Signature={SIGNATURE}"
JWT = "eyJhbGciOiJFUzI1NiJ9.eyJzdWIiOiJwbGFudGVkIn0.c2lnbmF0dXJlc2lnbmF0dXJl"


@pytest.mark.server
def test_no_default_secret_lets_anybody_in(tmp_path: Path) -> None:
    """A20: a fresh site has no key but the printed one-time one; the guesses of every manual get the same refusal; no two sites share one"""
    for name in ("one", "two"):
        airlock("site", "init", "--data", str(tmp_path / name))
    secrets = [{p.name: p.read_bytes() for p in (tmp_path / name / "secrets").iterdir()} for name in ("one", "two")]
    assert secrets[0].keys() == secrets[1].keys() and not set(secrets[0].values()) & set(secrets[1].values())
    assert all(p.stat().st_mode & 0o077 == 0 for p in (tmp_path / "one" / "secrets").iterdir())
    words = ("", "admin", "password", "airlock", "changeme", "Harbor12345", "admin123", "nvapi-", "$oauthtoken", "root", "default")
    with operated(tmp_path / "one", {}) as server:
        answers = set()
        for user, password in itertools.product(("admin", "$oauthtoken", "airlock", ""), words):
            basic = "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()
            for path in ("/v2/", "/airlock/v1/catalog", "/airlock/v1/whoami", "/api/whoami-v2"):
                answers.add(server.ask("GET", path, who=None, Authorization=basic).status)
        assert answers <= {401, 429}, answers
        (only,) = json.loads(airlock("key", "list", "--data", str(server.data), "--json").stdout)["items"]
        assert only["expires"] and only["note"], "it ends by itself, and says what it is"


@pytest.mark.server
def test_a_server_without_a_site_does_not_start(tmp_path: Path) -> None:
    tmp_path.joinpath("empty").mkdir()
    for where in ("empty", "absent"):
        done = airlock("registry", "serve", "--data", str(tmp_path / where), "--port", "0", check=False)
        assert done.returncode == 3 and "airlock site init" in done.stderr, done.stderr


@pytest.mark.server
def test_planted_secrets_appear_nowhere(tmp_path: Path) -> None:
    """A21, at the most talkative log level, with requests that succeed, are refused, and fail for us."""
    keys = new_site(tmp_path / "data")
    planted = [*keys.values(), HF, SIGNATURE, JWT, "AKIAPLANTED", new_key()]
    bodies: list[bytes] = []
    receiver = Receiver()
    env = {"AIRLOCK_LOG_LEVEL": "debug", "OTEL_EXPORTER_OTLP_ENDPOINT": receiver.url, "AIRLOCK_PUBLIC_URL": "http://127.0.0.1:1"}
    with operated(tmp_path / "data", keys, **env) as server:
        server.image("acme/m", "1", [b"layer"])
        paths = (
            "/v2/acme/m/manifests/1",
            "/v2/other/x/manifests/1",
            "/token?service=airlock",
            "/airlock/v1/whoami",
            "/acme/m/resolve/main/a",
            "/x",
        )
        for path, secret in itertools.product(paths, planted):
            basic = base64.b64encode(f"$oauthtoken:{secret}".encode()).decode()
            planted_here = {"Cookie": f"s={secret}", "Referer": SIGNED, "User-Agent": secret, "traceparent": secret}
            planted_here |= {"X-Request-ID": secret} if secret not in (SIGNATURE, "AKIAPLANTED") else {}  # by themselves these look like an id
            for authorization in (f"Bearer {secret}", f"Basic {basic}", secret):
                connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
                join = "&" if "?" in path else "?"
                connection.request(
                    "GET", f"{path}{join}token={secret}&{SIGNED.split('?')[1]}", headers={"Authorization": authorization, **planted_here}
                )
                answer = connection.getresponse()
                bodies.append((answer.read() if "token?" not in path or answer.status != 200 else b"") + str(answer.getheaders()).encode())
                connection.close()
        server.ask("POST", "/airlock/v1/leases", json.dumps({"model": keys["acme"], "nonce": HF}))
        server.ask("GET", f"/v2/acme/m/manifests/{keys['acme'][:100]}", who=None)
        (tmp_path / "data" / "blobs").rename(tmp_path / "away")
        for _ in range(2):
            bodies.append(server.ask("POST", f"/v2/acme/m/blobs/uploads/?digest=sha256:{'0' * 64}", keys["acme"].encode()).body)
        (tmp_path / "away").rename(tmp_path / "data" / "blobs")
        figures = server.operator("/metrics")[1]
        server.process.terminate()
        assert server.ended() == 0
    wait_for(lambda: receiver.bodies, "spans")
    receiver.close()
    with sqlite3.connect(tmp_path / "data" / "registry.db") as db:
        rows = "\n".join(db.iterdump())
    for where, text in (
        ("log", server.log.read_text()),
        ("answers", b"\n".join(bodies).decode("latin-1")),
        ("database", rows),
        ("figures", figures),
        ("spans", b"".join(receiver.bodies).decode("latin-1")),
    ):
        hits = [secret[:12] for secret in planted if secret in text or base64.b64encode(f"$oauthtoken:{secret}".encode()).decode() in text]
        assert not hits, (where, hits)


@pytest.mark.parametrize(
    "text",
    [
        f"GET {SIGNED} failed",
        f"headers {{'Authorization': 'Bearer {JWT}'}}",
        f"Authorization: Basic {base64.b64encode(b'$oauthtoken:planted').decode()}",
        f"postgresql://airlock:{SIGNATURE}@db/airlock",
        f"AWS4-HMAC-SHA256 Credential=x, Signature={SIGNATURE}",
        f"token {HF}.",
        f"body {JWT} end",
        f"body alt1.{JWT[3:20]}.{SIGNATURE} end",
    ],
)
def test_the_last_line_of_defence(text: str) -> None:
    shown = redacted(text)
    assert "[secret]" in shown
    for secret in (SIGNATURE, "AKIAPLANTED", HF, JWT, base64.b64encode(b"$oauthtoken:planted").decode()):
        assert secret not in shown


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.text(max_size=40), st.text(max_size=40))
def test_a_key_between_any_texts_is_hidden(before: str, after: str) -> None:
    key = new_key()
    assert key not in redacted(json.dumps({"message": before + key + after}))


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.text(max_size=10), st.text(max_size=30), max_size=5))
def test_a_line_stays_json(doc: dict[str, str]) -> None:
    assert set(json.loads(redacted(json.dumps(doc | {"path": SIGNED, "key": new_key()})))) >= set(doc)


def test_the_process_list_shows_no_key() -> None:
    """Keys travel in the environment, never as an argument: no command takes one."""
    for words in (["model", "push"], ["key", "create"], ["registry", "serve"]):
        done = subprocess.run(
            [str(Path(sys.executable).parent / "airlock"), *words, "--help"], capture_output=True, text=True, timeout=60, check=True
        )
        assert "--key " not in done.stdout and "--password" not in done.stdout
