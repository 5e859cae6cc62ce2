"""Unmodified clients through the token flow, each request seen by a listener in between: login, push, inspect, list, pull, delete."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from artifact.errors import Denied, NotFound, Unauthenticated
from artifact.remote import NOBODY_CALL, RemoteRegistry
from mirror.home import MirrorHome
from tests.conftest import AIRLOCK, missing
from tests.contracts.doors import MANIFEST, Door, new_site, serving, sha
from tests.flows.test_clients import contents, layout

pytestmark = pytest.mark.server
MAX_S = 180
USER = "$oauthtoken"


@pytest.fixture(scope="module")
def door(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Door]:
    data = tmp_path_factory.mktemp("tokens") / "data"
    keys = new_site(data)
    with serving(data, keys) as found:
        yield found


@pytest.fixture(scope="module")
def public(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Door]:
    data = tmp_path_factory.mktemp("public") / "data"
    keys = new_site(data)
    with serving(data, keys, AIRLOCK_ANONYMOUS="on") as found:
        yield found


def asked(door: Door) -> list[str]:
    """The requests that the server saw, by method, path and status, from its own access log."""
    lines = [json.loads(line) for line in door.log.read_text().splitlines() if line.startswith("{")]
    return [f"{line['method']} {line['path']} {line['status']}" for line in lines if line.get("log") == "airlock.access"]


def skopeo(*argv: str, home: Path, given: str = "") -> subprocess.CompletedProcess[str]:
    if not shutil.which("skopeo"):
        missing("skopeo")
    env = {**os.environ, "HOME": str(home), "REGISTRY_AUTH_FILE": str(home / "auth.json")}
    return subprocess.run(["skopeo", "--insecure-policy", *argv], input=given, capture_output=True, text=True, timeout=MAX_S, env=env, check=False)


def place(door: Door, name: str) -> str:
    return f"docker://127.0.0.1:{door.port}/{name}"


def test_skopeo_by_a_stored_login(door: Door, tmp_path: Path) -> None:
    digest, raw = layout(tmp_path / "from")
    host = f"127.0.0.1:{door.port}"
    wrong = skopeo("login", "--tls-verify=false", "-u", USER, "--password-stdin", host, home=tmp_path, given=door.keys["expired"])
    assert wrong.returncode != 0 and "invalid username/password" in wrong.stderr
    inside = skopeo("login", "--tls-verify=false", "-u", USER, "--password-stdin", host, home=tmp_path, given=door.keys["acme"])
    assert inside.returncode == 0, inside.stderr
    for argv in (
        ("copy", "--preserve-digests", "--dest-tls-verify=false", f"oci:{tmp_path}/from:1", place(door, "acme/image:1")),
        ("inspect", "--tls-verify=false", place(door, "acme/image:1")),
        ("list-tags", "--tls-verify=false", place(door, "acme/image")),
        ("copy", "--src-tls-verify=false", "--dest-tls-verify=false", place(door, "acme/image:1"), place(door, "acme/copied:2")),
        ("copy", "--preserve-digests", "--src-tls-verify=false", place(door, "acme/copied:2"), f"oci:{tmp_path}/to:1"),
        ("delete", "--tls-verify=false", place(door, "acme/copied:2")),
    ):
        done = skopeo(*argv, home=tmp_path)
        assert done.returncode == 0, (argv[0], done.stderr)
        assert argv[0] != "list-tags" or json.loads(done.stdout)["Tags"] == ["1"]
    assert (tmp_path / "to" / "blobs" / "sha256" / digest[7:]).read_bytes() == raw
    assert door.ask("GET", "/v2/acme/copied/manifests/2").status == 404
    seen = asked(door)
    assert len([s for s in seen if s.startswith("GET /token 200")]) >= 6, "each command took a token"
    assert door.keys["acme"] not in door.log.read_text()


def test_skopeo_reads_without_a_key_what_is_public_only(public: Door, tmp_path: Path) -> None:
    digest, raw = layout(tmp_path / "from")
    user = f"--dest-creds={USER}:{public.keys['acme']}"
    for name in ("hf/acme/open:1", "acme/closed:1"):
        pushed = skopeo("copy", "--preserve-digests", "--dest-tls-verify=false", user, f"oci:{tmp_path}/from:1", place(public, name), home=tmp_path)
        assert pushed.returncode == 0, pushed.stderr
    argv = ("copy", "--preserve-digests", "--src-tls-verify=false", "--src-no-creds")
    pulled = skopeo(*argv, place(public, "hf/acme/open:1"), f"oci:{tmp_path}/to:1", home=tmp_path)
    assert pulled.returncode == 0, pulled.stderr
    assert (tmp_path / "to" / "blobs" / "sha256" / digest[7:]).read_bytes() == raw
    refused = skopeo(*argv, place(public, "acme/closed:1"), f"oci:{tmp_path}/no:1", home=tmp_path)
    assert refused.returncode != 0 and "no API key was given" in refused.stderr, refused.stderr


ORAS = """
import sys, time, oras.client
time.sleep = lambda _s: None
action, host, name, key, folder, *files = sys.argv[1:]
client = oras.client.OrasClient(hostname=host, insecure=True, auth_backend="token")
if key:
    client.auth.set_basic_auth("$oauthtoken", key)
if action == "push":
    client.push(target=f"{host}/{name}", files=files, disable_path_validation=True)
else:
    client.pull(target=f"{host}/{name}", outdir=folder)
"""


def oras(door: Door, action: str, name: str, who: str | None, folder: Path, *files: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-c", ORAS, action, f"127.0.0.1:{door.port}", name, door.keys[who] if who else "", str(folder), *files]
    return subprocess.run(argv, capture_output=True, text=True, timeout=MAX_S, cwd=folder, check=False, env={**os.environ, "HOME": str(folder)})


def test_oras_by_tokens(door: Door, tmp_path: Path) -> None:
    source, target = tmp_path / "from", tmp_path / "to"
    source.mkdir()
    target.mkdir()
    files = {"weights.bin": os.urandom(3_000_000), "notes.txt": b"notes"}
    for name, raw in files.items():
        (source / name).write_bytes(raw)
    pushed = oras(door, "push", "acme/artifact:1", "acme", source, *files)
    assert pushed.returncode == 0, pushed.stderr
    pulled = oras(door, "pull", "acme/artifact:1", "acme", target)
    assert pulled.returncode == 0, pulled.stderr
    assert contents(target) == files
    assert [s for s in asked(door) if s.startswith("GET /token 200")]
    for who in ("reader", "other", "expired", None):
        folder = tmp_path / f"no-{who}"
        folder.mkdir()
        (folder / "a.txt").write_text("a")
        assert oras(door, "pull", "acme/artifact:1", who, folder).returncode != 0
        assert oras(door, "push", "acme/stolen:1", who, folder, "a.txt").returncode != 0
        assert contents(folder) == {"a.txt": b"a"}
    assert door.ask("GET", "/v2/acme/stolen/tags/list").status == 404


def synced(home: Path, plan: Path, key: str) -> dict[str, Any]:
    argv = [str(AIRLOCK), "mirror", "sync", str(plan), "--home", str(home), "--json"]
    env = {"PATH": os.environ["PATH"], "HOME": str(home.parent), **({"UPSTREAM_KEY": key} if key else {})}
    done = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=MAX_S, check=False)
    assert "Traceback" not in done.stderr and (not key or key not in done.stdout + done.stderr)
    found = json.loads(done.stdout)
    assert isinstance(found, dict)
    return found


def test_a_mirror_syncs_from_an_airlock(door: Door, public: Door, tmp_path: Path) -> None:
    """With a key, and without one from a site that lets everybody read."""
    home = tmp_path / "mirror"
    MirrorHome.init(home)
    plan = tmp_path / "plan.yaml"
    for where, name, key in ((door, "acme/upstream", door.keys["acme"]), (public, "hf/acme/upstream", "")):
        digest, _raw = where.image(name, "1", [os.urandom(300_000), b"two"])
        item = {"source": f"oci://127.0.0.1:{where.port}/{name}:1", "as": f"copy/{name}", "plain_http": True}
        plan.write_text(json.dumps({"items": [item | ({"key_env": "UPSTREAM_KEY"} if key else {})]}))
        report = synced(home, plan, key)
        assert [i["status"] for i in report["items"]] == ["synced"], report
        assert synced(home, plan, key)["items"][0]["status"] == "unchanged"
        assert {(n.name, n.ref): n.digest for n in MirrorHome.open(home).names()}[(f"copy/{name}", "1")] == digest
    plan.write_text(json.dumps({"items": [{"source": f"oci://127.0.0.1:{door.port}/acme/upstream:1", "plain_http": True}]}))
    refused = synced(home, plan, "")
    assert refused["failed"] == 1 and refused["items"][0]["error"]["error"] == "unauthenticated"


class TokensOnly(RemoteRegistry):
    """Our client as it is towards a registry that takes a key at its token endpoint only."""

    def _authorization(self, scope: str, bearer: bool) -> dict[str, str]:
        found = super()._authorization(scope, bearer)
        return found if found.get("Authorization", "").startswith("Bearer") else {}


def test_our_own_client_follows_the_challenge(public: Door, door: Door) -> None:
    public.image("hf/acme/own", "1", [b"own"])
    public.image("acme/hidden", "1", [b"hidden"])
    remote, mark = RemoteRegistry(public.url), len(asked(public))
    assert remote.read_manifest("hf/acme/own", "1") and not [s for s in asked(public)[mark:] if "/token" in s], "what is public is served at once"
    with pytest.raises(Unauthenticated):
        remote.read_manifest("acme/hidden", "1")
    assert [s for s in asked(public)[mark:] if s == "GET /token 200"]
    _digest, raw = door.image("acme/keyed", "1", [b"keyed"])
    mark = len(asked(door))
    assert RemoteRegistry(door.url, door.keys["acme"]).read_manifest("acme/keyed", "1")[1] == raw
    assert not [s for s in asked(door)[mark:] if "/token" in s], "a key needs no token"
    for who, error, reason in (("other", NotFound, "not_visible"), ("reader", Denied, "no_grant"), ("expired", Unauthenticated, "key_expired")):
        for client in (RemoteRegistry, TokensOnly):
            with pytest.raises(error) as caught:
                client(door.url, door.keys[who]).read_manifest("acme/keyed", "1")
            assert caught.value.reason == reason and door.keys[who] not in str(caught.value)
    by_tokens = TokensOnly(door.url, door.keys["acme"])
    mark = len(asked(door))
    for _ in range(5):
        assert by_tokens.read_manifest("acme/keyed", "1")[1] == raw
        assert b"".join(by_tokens.stream("acme/keyed", sha(b"keyed"), 0, 5)) == b"keyed"
    assert len([s for s in asked(door)[mark:] if "/token" in s]) == 1, "one token for one scope"
    upload = by_tokens.upload(NOBODY_CALL, "acme/keyed")
    upload.write(b"pushed by tokens")
    assert upload.commit(sha(b"pushed by tokens")).digest and by_tokens.push(NOBODY_CALL, "acme/keyed", raw, MANIFEST, refs=("2",))
    assert by_tokens.refs(NOBODY_CALL, "acme/keyed").items == ("1", "2") and "acme/keyed" in by_tokens.list(NOBODY_CALL).items
    by_tokens.delete(NOBODY_CALL, "acme/keyed", "2")
    assert by_tokens.refs(NOBODY_CALL, "acme/keyed").items == ("1",)
