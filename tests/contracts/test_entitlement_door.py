"""Entitlements, revocations, leases and standing over HTTP and by the commands: each route with each kind of key."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from artifact import documents as d
from artifact import trust
from artifact.grant import Grant
from registry.catalog import ensure_org
from registry.home import Home
from registry.settings import Settings
from registry.wiring import open_site
from tests.conftest import airlock
from tests.contracts.doors import Answer, Door, new_site, serving
from tests.site import Pushed, call_of, push_model

pytestmark = pytest.mark.server
ROOT = "/airlock/v1"
KINDS = ("site", "lead", "auditor", "reader", "other")
KEY = trust.generate_key()
PEM = trust.public_pem(KEY)


@dataclass(frozen=True)
class Place:
    """A server, and a model that a runtime could start."""

    door: Door
    pushed: Pushed
    instance: str


def post(door: Door, who: str | None, path: str, **body: object) -> Answer:
    return door.ask("POST", f"{ROOT}/{path}", json.dumps(body).encode(), who=who)


def get(door: Door, who: str | None, path: str) -> Answer:
    return door.ask("GET", f"{ROOT}/{path}", who=who)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """Keys of the site's administration, of acme's, of its auditor, of two runtimes and of another organisation."""
    data = tmp_path_factory.mktemp("entitlement") / "data"
    keys, now = new_site(data), time.time()
    more = {"site": ("site", ("**",), ("admin",)), "lead": ("acme", ("acme/**",), ("admin",)), "auditor": ("acme", ("acme/**",), ("auditor",))}
    more |= {"runtime": ("acme", ("**",), ("pull", "run")), "second": ("acme", ("**",), ("pull", "run")), "beta": ("beta", ("**",), ("pull", "run"))}
    with open_site(Settings.load(data), background=False) as site:
        with site.catalog.writing() as conn:
            for name, (org, models, actions) in more.items():
                org_id = ensure_org(conn, org, now)
                made = site.entitlements.add_key(conn, org_id, tier="enterprise", grant=Grant(models, actions), expires=now + 86400, at=now)
                keys[name] = made[1]
        pushed = push_model(site, call_of(site, keys["site"]), "hf/acme/tiny", "1")
    Home.open(data).pin_issuer(PEM, trust.spki_sha256(PEM).hex())
    with serving(data, keys) as found:
        yield Place(found, pushed, Home.open(data).instance)
        log = found.log.read_text()
        assert "Traceback" not in log and not any(key in log for key in keys.values())


def licence(place: Place, serial: int, org: str = "other", **change: Any) -> str:
    rights: dict[str, object] = {"tier": "enterprise", "models": ["**"], "actions": ["pull", "run"], "products": [], "environments": ["production"]}
    rights |= {"gpus": 8, "max_keys": 0, "grace_s": 0}
    now = time.time()
    claims = d.entitlement_claims("vendor", place.instance, org, serial, now, rights, now, now + 86400) | change
    return d.armour(d.sign(KEY, d.ENTITLEMENT, claims).head.token, d.ENTITLEMENT)


def wish(place: Place, host: str, *gpus: str) -> dict[str, object]:
    p = place.pushed
    facts = {"model": p.name, "ref": "1", "profile_digest": p.profiles.digest, "profile_id": p.profile_id, "host": host}
    return {**facts, "gpu_uuids": list(gpus), "nonce": "0f" * 16}


ISSUE: dict[str, object] = {"org": "gamma", "tier": "enterprise", "models": ["hf/**"], "gpus": 8, "expires": "30d"}
UNSIGNED: dict[str, object] = {
    "model": "local/tuned:local",
    "digest": "sha256:" + "0" * 64,
    "profile": "vllm-bf16-tp1",
    "reason": "bench, J. Doe",
    "host": "node-1",
    "at": 1_790_000_000,
}
CHANGES: list[tuple[str, dict[str, object], str]] = [
    ("entitlements/issue", ISSUE, "200 403 403 403 403"),
    ("entitlements/issue", ISSUE | {"is_admin": True}, "400 403 403 403 403"),
    ("entitlements/issue", {k: v for k, v in ISSUE.items() if k != "gpus"}, "400 403 403 403 403"),
    ("entitlements/revoke", {"jti": ["0" * 32]}, "200 403 403 403 403"),
    ("entitlements/revoke", {}, "400 403 403 403 403"),
    ("entitlements", {"document": "hello"}, "400 403 403 403 403"),
    ("entitlements", {"document": 5}, "400 403 403 403 403"),
    ("leases/return", {"jti": "0" * 32}, "404 404 404 404 404"),
    ("leases/revoke", {"jti": "0" * 32}, "404 404 404 404 404"),
    ("leases/return", {}, "400 400 400 400 400"),
    ("verified", {"lease": "0" * 32, "digest": "sha256:" + "0" * 64, "bytes": 1, "files": 1}, "404 404 404 404 404"),
    ("verified", {"lease": "0" * 32}, "400 400 400 400 400"),
    ("unsigned", UNSIGNED, "200 200 200 200 200"),
    ("unsigned", UNSIGNED | {"reason": ""}, "400 400 400 400 400"),
    ("unsigned", UNSIGNED | {"digest": "sha256:x"}, "400 400 400 400 400"),
    ("unsigned", UNSIGNED | {"at": -1}, "400 400 400 400 400"),
]


@pytest.mark.parametrize(("path", "body", "statuses"), CHANGES, ids=[f"{i}-{row[0]}" for i, row in enumerate(CHANGES)])
def test_changes(place: Place, path: str, body: dict[str, object], statuses: str) -> None:
    answers = {who: post(place.door, who, path, **body) for who in KINDS}
    assert {who: str(a.status) for who, a in answers.items()} == dict(zip(KINDS, statuses.split(), strict=True))
    assert all(a.status == 200 or (a.json()["what"] and a.json()["reason"]) for a in answers.values())
    assert post(place.door, None, path, **body).status == 401


LOOKS = [
    ("standing", "200 200 200 200 200"),
    ("entitlements", "200 200 200 403 403"),
    ("entitlements?org=acme", "200 200 200 403 403"),
    ("entitlements?org=other", "200 403 403 403 403"),
    (f"entitlements/{'0' * 32}", "404 404 404 403 403"),
    ("revocations", "200 403 403 403 403"),
    ("leases", "200 200 200 403 403"),
    ("leases?org=other", "200 403 403 403 403"),
    ("leases?after=x", "400 400 400 403 403"),
]


@pytest.mark.parametrize(("path", "statuses"), LOOKS, ids=[row[0] for row in LOOKS])
def test_looks(place: Place, path: str, statuses: str) -> None:
    answers = {who: get(place.door, who, path) for who in KINDS}
    assert {who: str(a.status) for who, a in answers.items()} == dict(zip(KINDS, statuses.split(), strict=True))
    assert get(place.door, None, path).status == 401


def test_the_life_of_a_document(place: Place) -> None:
    door = place.door
    taken = post(door, "site", "entitlements", document=licence(place, 7))
    assert (taken.status, taken.json()["state"]) == (200, "applied")
    refused = {
        "serial": licence(place, 6),
        "document_conflict": licence(place, 7),
        "audience": licence(place, 8, aud="another"),
        "expired": licence(place, 8, exp=int(time.time()) - 1, nbf=1, iat=1),
    }
    for reason, text in refused.items():
        answer = post(door, "site", "entitlements", document=text)
        assert (answer.status, answer.json()["reason"]) == (409 if reason == "document_conflict" else 403, reason)
    standing = get(door, "other", "standing").json()
    assert standing["entitlement"]["jti"] == taken.json()["jti"] and standing["entitlement"]["serial"] == 7
    shown = get(door, "site", f"entitlements/{taken.json()['jti']}").json()
    assert shown["counts"] is True and d.unarmour(shown["text"]) == d.unarmour(d.armour(d.unarmour(shown["text"]), d.ENTITLEMENT))
    listed = post(door, "site", "entitlements/revoke", jti=[taken.json()["jti"]])
    assert listed.json()["entitlements"] == 1
    assert get(door, "other", "standing").json()["entitlement"]["revoked_at"]
    assert get(door, "site", "revocations").json()["serial"] >= listed.json()["serial"]


def test_the_life_of_leases(place: Place) -> None:
    door = place.door
    assert post(door, "site", "entitlements/issue", **(ISSUE | {"org": "acme", "models": ["**"]})).status == 200

    def ask(n: int) -> Answer:
        return post(door, "runtime", "leases", **wish(place, f"node-{n}", "GPU-1"))

    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(ask, range(20)))
    given = [a.json() for a in answers if a.status == 200]
    assert len(given) == 8 and all(set(a) == {"lease", "now"} and type(a["now"]) is int for a in given)
    refused = [a.json() for a in answers if a.status != 200]
    assert {(a["reason"], "8 of 8" in a["what"]) for a in refused} == {("gpus_exceeded", True)}
    items = get(door, "lead", "leases").json()["items"]
    assert len(items) == 8 and sorted(x["serial"] for x in items) == list(range(items[0]["serial"], items[0]["serial"] + 8))
    one = items[0]["jti"]
    assert post(door, "second", "leases/return", jti=one).status == 403, "another key's"
    assert post(door, "beta", "leases/return", jti=one).status == 404
    receipt = {"lease": one, "digest": place.pushed.model.digest, "bytes": 5000, "files": 3}
    assert post(door, "runtime", "verified", **receipt).status == 200 and post(door, "second", "verified", **receipt).status == 404
    assert post(door, "runtime", "leases/return", jti=one).json()["state"] == "returned"
    assert post(door, "runtime", "leases", **wish(place, "node-x", "GPU-1")).status == 200
    assert post(door, "lead", "leases/revoke", jti=items[1]["jti"]).json()["state"] == "revoked"
    recorded = get(door, "auditor", "audit?limit=1000").json()
    rows = recorded["items"]
    while recorded["after"]:
        recorded = get(door, "auditor", f"audit?limit=1000&after={recorded['after']}").json()
        rows += recorded["items"]
    found = {row["event"]: row for row in rows}
    assert found["verified"]["result"] == "verified" and found["lease_return"]["jti"] == one
    assert any(row["reason"] == "gpus_exceeded" and row["result"] == "denied" for row in rows)


def test_commands(place: Place, tmp_path: Path) -> None:
    """As somebody types them: an issuer on the connected side, a site that pins it, and the same verbs over HTTP."""
    door, key = place.door, {"AIRLOCK_KEY": place.door.keys["site"]}
    issuer = json.loads(airlock("entitlement", "issuer", "--to", str(tmp_path / "issuer.pem"), "--json").stdout)
    assert (tmp_path / "issuer.pem").stat().st_mode & 0o777 == 0o600 and trust.kid(issuer["pem"]) == issuer["kid"]
    assert airlock("entitlement", "issuer", "--to", str(tmp_path / "issuer.pem"), check=False).returncode == 8
    argv = ("entitlement", "issue", "--org", "delta", "--tier", "enterprise", "--models", "hf/**", "--gpus", "2", "--expires", "30d")
    alone = ("--issuer-key", str(tmp_path / "issuer.pem"), "--site", place.instance, "--to", str(tmp_path / "delta.pem"))
    airlock(*argv, *alone)
    remote = ("--registry", door.url)
    refused = airlock("entitlement", "import", str(tmp_path / "delta.pem"), *remote, check=False, **key)
    assert refused.returncode == 4 and "airlock site issuer" in refused.stderr
    wrong = airlock("site", "issuer", issuer["public"], "--sha256", "0" * 64, "--data", str(door.data), check=False)
    assert wrong.returncode == 7 and issuer["sha256"] in wrong.stderr
    airlock("site", "issuer", issuer["public"], "--sha256", issuer["sha256"], "--data", str(door.data))
    taken = json.loads(airlock("entitlement", "import", str(tmp_path / "delta.pem"), *remote, "--json", **key).stdout)
    assert (taken["org"], taken["state"]) == ("delta", "applied"), "a running server learns of a pinned issuer at once"
    assert taken["jti"] in airlock("entitlement", "list", "--org", "delta", *remote, **key).stdout
    shown = airlock("entitlement", "show", taken["jti"], *remote, **key).stdout
    assert "-----END AIRLOCK ENTITLEMENT-----" in shown and "delta" in shown
    before = json.loads(airlock("site", "trust", "--data", str(door.data), "--to", str(tmp_path / "t.json"), "--json").stdout)["revocation_serial"]
    listed = airlock("entitlement", "revoke", taken["jti"], *remote, "--to", str(tmp_path / "list.pem"), **key).stdout
    assert "revoked 1 entitlements" in listed and "BEGIN AIRLOCK REVOCATIONS" in (tmp_path / "list.pem").read_text()
    airlock("site", "trust", "--data", str(door.data), "--to", str(tmp_path / "t.json"))
    assert json.loads((tmp_path / "t.json").read_text())["revocation_serial"] == before + 1
    assert airlock("entitlement", "import", str(tmp_path / "list.pem"), *remote, **key).stdout.rstrip().endswith("known")
    leases = json.loads(airlock("lease", "list", "--all", *remote, "--json", **key).stdout)["items"]
    for verb, state in (("revoke", "revoked"), ("return", "returned")):
        assert state in airlock("lease", verb, leases[-1]["jti"], *remote, **key).stdout
    usage: list[tuple[tuple[str, ...], int]] = [
        ((*argv, "--site", "x"), 6),
        ((*argv, "--issuer-key", str(tmp_path / "issuer.pem")), 6),
        ((*argv, "--issuer-key", str(tmp_path / "absent"), "--site", "x"), 3),
        ((*argv, *alone, "--data", str(door.data)), 6),
        (("entitlement", "import", str(tmp_path / "absent"), *remote), 3),
        (("entitlement", "import", str(tmp_path / "issuer.pem"), *remote), 6),
        (("entitlement", "show", "0" * 32, *remote), 3),
        (("entitlement", "revoke", *remote), 6),
        (("entitlement", "issue"), 2),
    ]
    for words, status in usage:
        done = airlock(*words, check=False, **key)
        assert done.returncode == status and "Traceback" not in done.stderr, (words, done.stderr)
