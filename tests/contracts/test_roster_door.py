"""The administration over HTTP and by the commands: each route with each kind of key, the first key of a site, and what no refusal may tell."""

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

from registry.home import Home
from tests.conftest import airlock
from tests.contracts.doors import Door, new_site, serving

pytestmark = pytest.mark.server
ROOT = "/airlock/v1"
KINDS = ("site", "lead", "auditor", "reader", "other", "token")


def post(door: Door, who: str | None, path: str, **body: object) -> Any:
    return door.ask("POST", f"{ROOT}/{path}", json.dumps(body).encode(), who=who)


def made(door: Door, who: str, path: str, **body: object) -> dict[str, Any]:
    answer = post(door, who, path, **body)
    assert answer.status == 200, answer.body
    return dict(answer.json())


@pytest.fixture(scope="module")
def door(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Door]:
    """A server with keys of every kind: of the site's administration, of acme's, of its auditor, of a reader, of another organisation, a token."""
    data = tmp_path_factory.mktemp("roster") / "data"
    keys = new_site(data)
    argv = ("key", "create", "--data", str(data), "--org", "site", "--models", "**", "--actions", "admin", "--expires", "never", "--json")
    keys["site"] = json.loads(airlock(*argv).stdout)["key"]
    with serving(data, keys) as found:
        made(found, "site", "members", org="acme", name="ann", role="admin")
        made(found, "site", "members", org="acme", name="aud", role="auditor")
        found.keys["lead"] = made(found, "site", "keys", org="acme", member="ann", expires="30d")["key"]
        found.keys["auditor"] = made(found, "site", "keys", org="acme", member="aud", expires="30d")["key"]
        answer = found.ask("GET", "/token?scope=repository:acme/m:pull,push", who="site", basic=True)
        found.keys["token"] = answer.json()["token"]
        yield found
        log = found.log.read_text()
        assert "Traceback" not in log and not any(key in log for key in found.keys.values() if len(key) > 20)


# Path, body, and the status for each of KINDS; 200 of a change is asked for once only.
CHANGES: list[tuple[str, dict[str, object], str]] = [
    ("orgs", {"name": "fresh"}, "200 403 403 403 403 403"),
    ("orgs", {"name": "fresh"}, "409 403 403 403 403 403"),
    ("orgs/close", {"name": "fresh"}, "200 403 403 403 403 403"),
    ("orgs/open", {"name": "fresh"}, "200 403 403 403 403 403"),
    ("orgs/close", {"name": "nothing"}, "404 403 403 403 403 403"),
    ("teams", {"org": "acme", "name": "one"}, "200 409 403 403 403 403"),
    ("teams/add", {"org": "acme", "name": "one", "member": "aud"}, "200 409 403 403 403 403"),
    ("teams/remove", {"org": "acme", "name": "one", "member": "aud"}, "200 404 403 403 403 403"),
    ("teams/close", {"org": "acme", "name": "one"}, "200 409 403 403 403 403"),
    ("members", {"org": "acme", "name": "bob"}, "200 409 403 403 403 403"),
    ("members/role", {"org": "acme", "name": "bob", "role": "auditor"}, "200 200 403 403 403 403"),
    ("members/disable", {"org": "acme", "name": "bob"}, "200 409 403 403 403 403"),
    ("members/enable", {"org": "acme", "name": "bob"}, "200 409 403 403 403 403"),
    ("keys", {"org": "acme", "models": ["acme/x"], "expires": "1d"}, "200 200 403 403 403 403"),
    ("keys", {"org": "acme", "models": ["other/x"], "expires": "1d"}, "200 403 403 403 403 403"),
    ("keys", {"org": "acme", "models": ["acme/x"], "expires": "1d", "is_admin": True}, "400 400 400 400 400 400"),
    ("keys/revoke", {"key_id": "key-0000000000000000"}, "404 404 403 403 403 403"),
    ("keys/rotate", {"key_id": "key-0000000000000000"}, "404 404 403 403 403 403"),
    ("keys/s3", {"key_id": "key-0000000000000000"}, "404 404 403 403 403 403"),
    ("keys/s3", {}, "200 200 200 200 200 403"),
    ("grants", {"org": "acme", "models": ["acme/x"], "expires": "1d"}, "200 200 403 403 403 403"),
    ("grants", {"org": "other", "models": ["other/x"], "expires": "1d"}, "200 403 403 403 403 403"),
    ("grants/revoke", {"grant_id": "grant-0000000000000000"}, "404 404 403 403 403 403"),
    ("grants/extend", {"grant_id": "grant-0000000000000000", "expires": "1d"}, "404 404 403 403 403 403"),
]


@pytest.mark.parametrize(("path", "body", "statuses"), CHANGES, ids=[f"{i}-{row[0]}" for i, row in enumerate(CHANGES)])
def test_changes(door: Door, path: str, body: dict[str, object], statuses: str) -> None:
    answers = {who: post(door, who, path, **body) for who in KINDS}
    assert {who: str(answer.status) for who, answer in answers.items()} == dict(zip(KINDS, statuses.split(), strict=True))
    for answer in answers.values():
        facts = answer.json()
        assert answer.status == 200 or (facts["what"] and facts["reason"])
    assert post(door, None, path, **body).status == 401


LOOKS: list[tuple[str, str]] = [
    ("orgs", "200 200 200 403 403 403"),
    ("orgs/acme", "200 200 200 403 403 403"),
    ("orgs/nothing", "404 403 403 403 403 403"),
    ("teams?org=acme", "200 200 200 403 403 403"),
    ("members?org=acme", "200 200 200 403 403 403"),
    ("members?org=other", "200 403 403 403 403 403"),
    ("keys", "200 200 200 200 200 200"),
    ("keys?org=acme", "200 200 200 200 403 403"),
    ("keys?org=other", "200 403 403 403 200 403"),
    ("keys/key-0000000000000000", "404 404 404 404 404 404"),
    ("grants", "200 200 200 200 200 200"),
    ("grants?org=other", "200 403 403 403 200 403"),
]


@pytest.mark.parametrize(("path", "statuses"), LOOKS, ids=[row[0] for row in LOOKS])
def test_looks(door: Door, path: str, statuses: str) -> None:
    answers = {who: door.ask("GET", f"{ROOT}/{path}", who=who) for who in KINDS}
    assert {who: str(answer.status) for who, answer in answers.items()} == dict(zip(KINDS, statuses.split(), strict=True))
    assert door.ask("GET", f"{ROOT}/{path}", who=None).status == 401


def test_nobody_is_shown_the_s3_secret_of_a_key_that_may_more(door: Door) -> None:
    """It signs as that key, so an organisation's administrator gets it where a successor would be given, and nowhere else."""
    given: dict[str, Any] = {"org": "acme", "actions": ["pull"], "expires": "1d"}
    wide = made(door, "site", "keys", models=["hf/**"], **given)["key_id"]
    narrow = made(door, "site", "keys", models=["acme/x"], **given)["key_id"]
    refused = post(door, "lead", "keys/s3", key_id=wide)
    assert (refused.status, b"secret" in refused.body) == (403, False) and "nobody hands on more than it has" in refused.json()["what"]
    assert post(door, "lead", "keys/rotate", key_id=wide).status == 403
    assert made(door, "lead", "keys/s3", key_id=narrow)["secret"] and made(door, "site", "keys/s3", key_id=wide)["secret"]


def test_an_ordinary_key_sees_itself_and_nothing_else(door: Door) -> None:
    me = door.ask("GET", f"{ROOT}/whoami", who="reader").json()["key_id"]
    assert [k["key_id"] for k in door.ask("GET", f"{ROOT}/keys", who="reader").json()["items"]] == [me]
    assert door.ask("GET", f"{ROOT}/keys/{me}", who="reader").json()["grants"][0]["models"] == ["acme/open/*"]
    assert door.ask("GET", f"{ROOT}/keys/{me}", who="other").status == 404
    assert {k["org"] for k in door.ask("GET", f"{ROOT}/keys", who="auditor").json()["items"]} == {"acme"}
    assert {k["org"] for k in door.ask("GET", f"{ROOT}/keys", who="site").json()["items"]} >= {"acme", "other", "site"}


def test_no_answer_shows_a_key_or_what_is_stored_for_it(door: Door) -> None:
    bodies = [door.ask("GET", f"{ROOT}/{path}", who="site").body for path in ("keys?limit=1000", "grants?limit=1000", "members?org=acme", "orgs")]
    for key in door.keys.values():
        assert not any(key.encode() in body or b'"hmac"' in body for body in bodies)


def test_refusals_of_login_are_one_text(door: Door) -> None:
    """No key, nonsense, and a well-formed key that nobody has differ in nothing but the request's id; a revoked one proves itself."""
    from registry.entitlements import new_key

    door.keys |= {"nobody": new_key(), "nonsense": "nvapi-nonsense", "empty": "x"}
    made_key = made(door, "site", "keys", org="acme", models=["acme/x"], expires="1d")
    door.keys["gone"] = made_key["key"]
    made(door, "site", "keys/revoke", key_id=made_key["key_id"])
    texts = set()
    for who in (None, "nobody", "nonsense", "empty"):
        answer = door.ask("GET", f"{ROOT}/orgs", who=who)
        facts = answer.json()
        texts.add((answer.status, answer.headers.get("www-authenticate"), facts["what"], facts["do"], facts["error"]))
    assert len(texts) == 1
    gone = door.ask("GET", f"{ROOT}/orgs", who="gone")
    assert (gone.status, gone.json()["reason"]) == (401, "key_revoked")


def test_the_commands_do_the_same_over_http_and_on_the_directory(door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, where, key in (("http", ("--registry", door.url), door.keys["site"]), ("here", ("--data", str(door.data)), "")):
        env = {"AIRLOCK_KEY": key}

        def run(*argv: str, where: tuple[str, ...] = where, env: dict[str, str] = env) -> Any:
            done = airlock(*argv, *where, "--json", **env)
            return json.loads(done.stdout)

        run("org", "create", name, "--display", "Name Inc.")
        assert run("org", "show", name)["display"] == "Name Inc." and name in {o["name"] for o in run("org", "list")["items"]}
        run("org", "member", "create", "bot", "--org", name, "--kind", "robot")
        run("org", "team", "create", "ops", "--org", name)
        run("org", "team", "add", "ops", "bot", "--org", name)
        assert run("org", "team", "list", "--org", name)["items"][0]["members"] == ["bot"]
        grant = run("grant", "create", "--org", name, "--team", "ops", "--models", f"{name}/**", "--gpus", "4", "--expires", "30d", "--grace", "7d")
        found = run("key", "create", "--org", name, "--member", "bot", "--type", "runtime", "--prefix", "nvapi-bot-", "--expires", "10d")
        assert found["key"].startswith("nvapi-bot-") and found["type"] == "runtime"
        listed = run("key", "list", "--org", name)["items"]
        assert [(k["key_id"], k["state"], k["member"]) for k in listed] == [(found["key_id"], "active", "bot")]
        successor = run("key", "rotate", found["key_id"], "--overlap", "1d")
        assert successor["replaces"] == found["key_id"] and successor["old_ends"]
        assert run("grant", "extend", grant["grant_id"], "--expires", "60d")["grace_s"] == 7 * 86400
        assert run("grant", "revoke", grant["grant_id"])["state"] == "revoked"
        assert run("grant", "list", "--org", name)["items"][0]["revoked"]
        assert run("key", "revoke", found["key_id"])["state"] == "revoked"
        run("org", "team", "remove", "ops", "bot", "--org", name)
        run("org", "team", "close", "ops", "--org", name)
        assert run("org", "member", "role", "bot", "auditor", "--org", name)["role"] == "auditor"
        run("org", "member", "disable", "bot", "--org", name)
        assert run("org", "member", "list", "--org", name)["items"][0]["disabled"]
        assert run("org", "close", name)["closed"]


def test_a_command_says_what_the_registry_refused(door: Door) -> None:
    done = airlock("org", "create", "mine", "--registry", door.url, check=False, AIRLOCK_KEY=door.keys["lead"])
    assert done.returncode == 4 and "'**'" in done.stderr and "Traceback" not in done.stderr
    done = airlock("key", "rotate", "key-0000000000000000", "--registry", door.url, check=False, AIRLOCK_KEY=door.keys["lead"])
    assert done.returncode == 3


def start(data: Path, *argv: str, **kwargs: Any) -> subprocess.Popen[str]:
    command = [str(Path(sys.executable).parent / "airlock"), "registry", "serve", "--data", str(data), "--port", "0", *argv]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "AIRLOCK_DRAIN_TIMEOUT_S": "1"}, **kwargs)


def test_the_first_start_prints_one_key_that_ends_with_the_next(tmp_path: Path) -> None:
    Home.open(tmp_path / "data", create=True)
    process = start(tmp_path / "data", "--json", stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    try:
        told = json.loads(process.stdout.readline())
        url, env = told["listening"], {"AIRLOCK_KEY": told["admin_key"]}
        done = airlock("key", "create", "--org", "site", "--models", "**", "--actions", "admin", "--registry", url, "--json", **env)
        assert airlock("org", "list", "--registry", url, check=False, **env).returncode == 5
        key = json.loads(done.stdout)["key"]
        airlock("org", "list", "--registry", url, AIRLOCK_KEY=key)
    finally:
        process.terminate()
        log = process.stderr.read()
        process.wait(20)
    assert told["admin_key"] not in log and "nvapi-" not in log
    again = start(tmp_path / "data", "--json", stdout=subprocess.PIPE)
    assert again.stdout is not None and again.stderr is not None
    try:
        assert "admin_key" not in json.loads(again.stdout.readline())
    finally:
        again.terminate()
        again.stderr.read()
        again.wait(20)


def test_a_first_start_that_cannot_print_is_refused(tmp_path: Path) -> None:
    Home.open(tmp_path / "data", create=True)
    process = start(tmp_path / "data", preexec_fn=lambda: os.close(1))
    assert process.stderr is not None
    try:
        end = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < end:
            time.sleep(0.1)
        assert process.returncode == 9
        assert "no key yet" in process.stderr.read()
    finally:
        process.kill()
        process.wait(20)
