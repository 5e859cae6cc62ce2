"""The secrets of a site: where they come from, what an older site gets, and how each is replaced without a gap."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from artifact import trust
from artifact.errors import Conflict, Invalid, NotFound, Unavailable
from registry.commands import site as command
from registry.home import Home
from registry.keyring import FILES, Keyring, pepper_id, public_id
from registry.settings import Settings
from registry.tokens import Claims, Tokens
from registry.wiring import open_site
from tests.site import call_of, make_key, make_site

NOW = 1_000_000.0


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home.open(tmp_path / "data", create=True)


def secret(home: Home, name: str) -> Path:
    return home.path / "secrets" / FILES[name]


def test_a_new_site_has_every_secret_and_shows_none(home: Home, capsys: pytest.CaptureFixture[str]) -> None:
    assert {p.name for p in (home.path / "secrets").iterdir()} == set(FILES.values())
    assert command.main(["secrets", "--data", str(home.path), "--json"]) == 0
    out = capsys.readouterr().out
    rows = {row["name"]: row for row in json.loads(out)["items"]}
    assert all(row["id"] and not row["previous"] and row["source"].startswith("secrets/") for row in rows.values())
    for name in FILES:
        raw = secret(home, name).read_bytes()
        assert raw.hex() not in out and "PRIVATE" not in out and rows[name]["id"] == public_id(name, raw)
    assert home.audit_key().startswith(b"-----BEGIN PRIVATE KEY-----") and " " not in home.audit_name and "+" not in home.audit_name


def test_an_older_site_gets_what_it_lacks_once_and_loses_nothing_in_silence(tmp_path: Path) -> None:
    with make_site(tmp_path) as found:
        data = found.settings.data
    doc = json.loads((data / "site.json").read_text())
    del doc["made"]
    (data / "site.json").write_text(json.dumps(doc))
    for name in ("audit", "entitlement"):
        (data / "secrets" / FILES[name]).unlink()
    with pytest.raises(Unavailable):
        Home.open(data).audit_key()
    open_site(Settings.load(data, environ={}), background=False).close()
    home = Home.open(data)
    made = home.audit_key(), home.entitlement_key()
    assert set(home.made) == {"audit", "entitlement"} and home.database
    open_site(Settings.load(data, environ={}), background=False).close()
    assert (home.audit_key(), home.entitlement_key()) == made
    (data / "secrets" / "audit.pem").unlink()
    open_site(Settings.load(data, environ={}), background=False).close()  # lost, not lacking: nothing makes another
    assert Home.open(data, create=True) and not (data / "secrets" / "audit.pem").exists()
    with pytest.raises(Unavailable, match=r"audit\.pem") as caught:
        home.audit_key()
    assert "backup" in caught.value.do


def test_a_server_beside_others_makes_no_key_of_its_own(tmp_path: Path, home: Home) -> None:
    """Each of several servers with copies of secrets/ would make another: there it is `airlock site init`, once, that does."""
    home.record_database(elsewhere=True)
    secret(home, "audit").unlink()
    assert Home.open(home.path).elsewhere
    with pytest.raises(Unavailable):
        Home.open(home.path).audit_key()


def test_secrets_of_a_secret_manager(tmp_path: Path, home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in FILES:
        path = tmp_path / f"managed-{name}"
        path.write_bytes(os.urandom(32) if name == "pepper" else home.audit_key() if name == "audit" else trust.generate_key())
        variable = "AIRLOCK_PEPPER_FILE" if name == "pepper" else f"AIRLOCK_{name.upper()}_KEY_FILE"
        monkeypatch.setenv(variable, str(path))
        secret(home, name).unlink()
        assert home.keys.read(name) == path.read_bytes() and home.keys.source(name) == f"environment {variable}"
        if name != "audit":
            with pytest.raises(Conflict, match="environment"):
                home.keys.rotate(name)
        path.unlink()
        with pytest.raises(Unavailable) as caught:
            home.keys.read(name)
        assert caught.value.do == f"check {variable}"
    assert {p.name for p in Home.open(home.path, create=True).keys.folder.iterdir()} == set()
    assert Home.open(tmp_path / "managed", create=True).keys.source("lease").startswith("environment")


def test_secrets_as_values(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    pem, pepper = trust.generate_key(), os.urandom(32)
    monkeypatch.setenv("AIRLOCK_LEASE_KEY", pem.decode())
    monkeypatch.setenv("AIRLOCK_PEPPER", pepper.hex())
    assert (home.lease_key(), home.pepper()) == (pem, pepper)
    for bad in ("zz" * 32, "00" * 31, "plain"):
        monkeypatch.setenv("AIRLOCK_PEPPER", bad)
        with pytest.raises(Unavailable) as caught:
            home.pepper()
        assert bad not in str(caught.value)
    assert pem.decode() not in repr(home.keys)


@pytest.mark.parametrize("name", ["lease", "release"])
def test_what_was_signed_by_the_key_before_still_verifies(home: Home, name: str) -> None:
    first = home.keys.read(name)
    token = trust.sign_jws(first, "lease+jwt", {"iss": "i", "sub": "s", "jti": "j", "iat": 1, "nbf": 1, "exp": 2_000_000_000})
    coming = home.keys.prepare(name)
    assert home.keys.read(name) == first and home.keys.prepare(name) == coming
    pinned = trust.SiteTrust.parse(json.dumps(home.site_trust().as_json()).encode())  # what runtimes get before the key is used
    assert home.keys.rotate(name) == (public_id(name, first), coming)
    second = home.keys.read(name)
    assert public_id(name, second) == coming and second != first
    keys = {"lease": pinned.lease_keys, "release": pinned.release_keys}[name]
    later = home.site_trust()
    assert keys == {"lease": later.lease_keys, "release": later.release_keys}[name] and set(keys) == {coming, public_id(name, first)}
    for raw in (token, trust.sign_jws(second, "lease+jwt", {"iss": "i", "sub": "s", "jti": "j", "iat": 1, "nbf": 1, "exp": 2_000_000_000})):
        assert trust.verify_jws(raw, "lease+jwt", keys, NOW)
    kept = next((home.path / "secrets" / "previous").glob(f"{name}.*"))
    assert b"PUBLIC KEY" in kept.read_bytes() and kept.stat().st_mode & 0o777 == 0o600
    kept.unlink()
    assert set(home.keys.public_keys(name)) == {coming}


def test_issuers_are_the_own_roots_and_the_pinned_ones(home: Home) -> None:
    own = public_id("entitlement", home.entitlement_key())
    home.keys.rotate("entitlement")
    pem = trust.public_pem(trust.generate_key())
    folder = home.path / "trust" / "issuers"
    folder.mkdir()
    (folder / f"{trust.kid(pem)}.pem").write_text(pem)
    assert set(home.issuers()) == {own, public_id("entitlement", home.entitlement_key()), trust.kid(pem)}
    (folder / f"{own}.pem").write_text(pem)
    with pytest.raises(Invalid, match="altered"):
        home.issuers()


def test_tokens_outlive_the_pepper_that_signed_them() -> None:
    old, new = os.urandom(32), os.urandom(32)
    token = Tokens(old, "site").sign(Claims("key-1", int(NOW) + 60, ()))
    assert Tokens(new, "site", (old,)).verify(token, NOW).key_id == "key-1"
    assert Tokens(old, "site", (new,)).verify(Tokens(new, "site", (old,)).sign(Claims("key-2", int(NOW) + 60, ())), NOW).key_id == "key-2"


def test_servers_are_started_again_one_by_one_while_the_pepper_is_replaced(tmp_path: Path) -> None:
    """One that knows only what is prepared and one that uses it accept each other's keys, and neither takes the other's rewriting back."""
    with make_site(tmp_path) as first:
        old = make_key(first, "acme")
        first.home.keys.prepare("pepper")
    with make_site_again(tmp_path) as before:
        before.home.keys.rotate("pepper")
        with make_site_again(tmp_path) as after:
            fresh, key = make_key(after, "acme"), make_key(before, "acme")
            for server in (before, after, before):
                for text in (old, fresh, key):
                    assert call_of(server, text).principal.org == "acme"
                server.entitlements.usage.flush()
            assert pepper_id(after.home.pepper()) != pepper_id(after.home.keys.previous_peppers()[0])
    for path in (tmp_path / "data/secrets/previous").iterdir():
        path.unlink()
    with make_site_again(tmp_path) as alone:
        assert [call_of(alone, text).principal.org for text in (old, fresh, key)] == ["acme"] * 3


def make_site_again(path: Path):  # type: ignore[no-untyped-def]
    return open_site(Settings.load(path / "data", environ={}), background=False)


def test_the_command_replaces_and_prepares(home: Home, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("pepper", "lease", "release", "entitlement"):
        before = public_id(name, home.keys.read(name))
        assert command.main(["rotate", name, "--prepare", "--data", str(home.path), "--json"]) == 0
        made = json.loads(capsys.readouterr().out)["next"]
        assert command.main(["rotate", name, "--data", str(home.path), "--json"]) == 0
        assert json.loads(capsys.readouterr().out) == {"name": name, "before": before, "after": made}
        assert command.main(["rotate", name, "--data", str(home.path)]) == 0
        assert "again" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        command.main(["rotate", "audit", "--data", str(home.path)])
    with pytest.raises(NotFound):
        command.main(["secrets", "--data", str(home.path / "none")])
    assert not list((home.path / "secrets").glob(".*"))


def test_a_second_maker_agrees_with_the_first(tmp_path: Path) -> None:
    one, other = Keyring(tmp_path, {}), Keyring(tmp_path, {})
    assert [one.make("lease"), other.make("lease")] == [True, False] and one.read("lease") == other.read("lease")
