"""Keys, their checksum and HMAC, and the key commands."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from sqlalchemy import event, select

from artifact.cli import run
from artifact.errors import Conflict, Invalid, NotFound
from artifact.grant import Grant
from registry import tables as t
from registry.commands.key import main, seconds
from registry.entitlements import ALPHABET, checksum, new_key, well_formed
from registry.people import check_org
from registry.wiring import Site, open_site
from tests.site import BACKENDS, SQLITE_ONLY, make_key, running_site


@pytest.fixture(params=BACKENDS)
def site(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Site]:
    with running_site(tmp_path, request.param) as opened:
        yield opened


def statements(site: Site) -> list[str]:
    seen: list[str] = []
    event.listen(site.engine, "before_cursor_execute", lambda _c, _cur, text, *_: seen.append(text))
    return seen


def test_keys_look_as_documented() -> None:
    keys = {new_key() for _ in range(200)}
    assert len(keys) == 200
    for key in keys:
        assert key.startswith("nvapi-") and len(key) == 6 + 43 + 6 and well_formed(key)
        assert set(key[6:]) <= set(ALPHABET)


def test_a_known_checksum() -> None:
    import zlib

    body = "nvapi-" + "0" * 43
    value, digits = zlib.crc32(body.encode()), ""
    while value:
        value, digit = divmod(value, 62)
        digits = ALPHABET[digit] + digits
    assert checksum(body) == digits.rjust(6, "0")


@pytest.mark.parametrize("bad", ["", "nvapi-", "x", "nvapi-" + "a" * 49, "ключ" * 20, "a" * 10_000, "nvapi-" + "0" * 48 + "\n", "' OR 1=1 --"])
def test_garbage_costs_no_statement(site: Site, bad: str) -> None:
    seen = statements(site)
    assert site.entitlements.principal(bad) is None and seen == []


def test_any_changed_character_is_noticed_without_a_statement(site: Site) -> None:
    key = make_key(site, "acme")
    seen = statements(site)
    for i in range(6, len(key)):
        other = key[:i] + ("a" if key[i] != "a" else "b") + key[i + 1 :]
        assert not well_formed(other) and site.entitlements.principal(other) is None
    assert seen == []


@SQLITE_ONLY
def test_one_indexed_statement_finds_key_organisation_and_grants(site: Site) -> None:
    key = make_key(site, "acme", "acme/*", "hf/**", tier="enterprise")
    seen = statements(site)
    found = site.entitlements.principal(key)
    assert len(seen) == 1 and found is not None
    assert (found.org, found.tier) == ("acme", "enterprise") and found.grants[0].id
    assert [replace(grant, id="") for grant in found.grants] == [Grant(("acme/*", "hf/**"), ("pull", "push", "run"))]
    with site.catalog.reading() as conn:
        plan = conn.exec_driver_sql("EXPLAIN QUERY PLAN " + seen[0], (b"",) * seen[0].count("?")).all()
    assert all("SCAN" not in str(step) for step in plan), plan
    assert site.entitlements.principal(new_key()) is None


def test_the_key_is_nowhere_on_disk(site: Site) -> None:
    key = make_key(site, "acme")
    site.engine.dispose()
    for path in site.settings.data.rglob("*"):
        if path.is_file():
            assert key.encode() not in path.read_bytes(), path


def test_another_pepper_is_told_at_once(site: Site) -> None:
    (site.settings.data / "secrets" / "pepper").write_bytes(os.urandom(32))
    with pytest.raises(Conflict) as caught:
        open_site(site.settings, background=False)
    assert caught.value.reason == "pepper"


@pytest.mark.parametrize("name", ["hf", "ngc", "nvcr.io", "a/b", "Acme", "", "v2", "api", "x" * 101, "docker.io", "localhost"])
def test_organisations_that_are_refused(name: str) -> None:
    with pytest.raises(Invalid):
        check_org(name)


@pytest.mark.parametrize("pattern", ["", "/", "a//b", "**/a", "a**", "a/**b", "Acme/*", "v2/*", "a b/*"])
def test_patterns_that_are_refused(site: Site, pattern: str) -> None:
    with pytest.raises(Invalid):
        make_key(site, "acme", pattern)


@pytest.mark.slow
@pytest.mark.parametrize("pattern", ["*", "**", "acme/*", "acme/**", "hf/meta/llama-*", "*/tiny"])
def test_patterns_that_are_accepted(site: Site, pattern: str) -> None:
    assert well_formed(make_key(site, "acme", pattern))


def test_wrong_tier_action_and_expiry(site: Site) -> None:
    for use in (
        lambda: make_key(site, "acme", tier="gold"),
        lambda: make_key(site, "acme", actions=("fly",)),
        lambda: make_key(site, "acme", actions=()),
    ):
        with pytest.raises(Invalid):
            use()
    assert not site.entitlements.any_key()


@pytest.mark.parametrize(("text", "expected"), [("90d", 90 * 86400), ("12h", 43200), ("5m", 300), ("2w", 14 * 86400), ("1s", 1), ("never", 0)])
def test_lives(text: str, expected: float) -> None:
    assert seconds(text) == expected


@pytest.mark.parametrize("text", ["", "90", "d", "-1d", "0d", "1.5d", "9999999d", "٣d", "1d "])
def test_lives_that_are_refused(text: str) -> None:
    with pytest.raises(Invalid):
        seconds(text)


@dataclass(frozen=True)
class Done:
    returncode: int
    stdout: str
    stderr: str


def airlock(site: Site, *argv: str) -> Done:
    """The command in this process, through the same mapping of failures to exit statuses as the console script."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.MonkeyPatch.context() as patch:
        patch.setenv("AIRLOCK_DATABASE", site.settings.database)
        try:
            status = run(main, [*argv, "--data", str(site.settings.data)])
        except SystemExit as end:
            status = int(end.code or 0)
    return Done(status, out.getvalue(), err.getvalue())


@pytest.mark.slow
def test_the_console_script(site: Site) -> None:
    env = {k: v for k, v in os.environ.items() if not k.startswith("AIRLOCK")} | {"AIRLOCK_DATA": str(site.settings.data)}
    env["AIRLOCK_DATABASE"] = site.settings.database
    argv = [sys.executable, "-m", "artifact.cli", "key", "create", "--org", "acme", "--models", "acme/*"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=120, env=env)
    assert done.returncode == 0 and well_formed(done.stdout.strip()), done.stderr
    assert done.stdout.strip() not in done.stderr
    assert site.entitlements.principal(done.stdout.strip()) is not None


def test_key_commands(site: Site) -> None:
    made = airlock(site, "create", "--org", "acme", "--tier", "enterprise", "--models", "acme/*", "--models", "hf/**", "--expires", "90d", "--json")
    assert made.returncode == 0, made.stderr
    facts = json.loads(made.stdout)
    found = site.entitlements.principal(facts["key"])
    assert found is not None and found.grants[0].models == ("acme/*", "hf/**") and found.grants[0].actions == ("pull", "run")
    assert abs(found.expires - time.time() - 90 * 86400) < 120
    listed = airlock(site, "list", "--json")
    assert facts["key"] not in listed.stdout and json.loads(listed.stdout)["items"][0]["state"] == "active"
    plain = airlock(site, "create", "--org", "acme", "--models", "acme/*")
    assert well_formed(plain.stdout.strip()) and plain.stdout.strip() not in plain.stderr
    assert airlock(site, "revoke", facts["key_id"]).returncode == 0
    assert "before" in airlock(site, "revoke", facts["key_id"]).stdout
    assert "revoked" in airlock(site, "list").stdout
    found = site.entitlements.principal(facts["key"])
    assert found is not None and found.revoked_at > 0


def test_key_commands_refuse(site: Site) -> None:
    assert airlock(site, "revoke", "key-none").returncode == NotFound.exit_code
    for argv in (
        ("create", "--org", "hf", "--models", "x"),
        ("create", "--org", "a", "--models", "//"),
        ("create", "--org", "a", "--models", "x", "--expires", "x"),
    ):
        done = airlock(site, *argv)
        assert done.returncode == Invalid.exit_code and "Traceback" not in done.stderr
    assert airlock(site).returncode == 2
    assert run(main, ["create", "--data", "/nowhere", "--org", "a", "--models", "x"]) == NotFound.exit_code
    with site.catalog.reading() as conn:
        assert conn.execute(select(t.org.c.name)).all() == []


def test_changes_of_keys_are_on_record(site: Site) -> None:
    facts = json.loads(airlock(site, "create", "--org", "acme", "--models", "acme/*", "--json").stdout)
    airlock(site, "revoke", facts["key_id"])
    with site.catalog.reading() as conn:
        bodies = list(conn.execute(select(t.audit_pending.c.body)).scalars())
    assert [json.loads(b)["event"] for b in bodies] == ["key_create", "key_revoke"]
    assert all(facts["key"] not in b for b in bodies)
