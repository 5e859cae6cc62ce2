"""Key check and lease against a stand-in registry over real HTTP: the lines of each refusal, and what a stored lease is worth."""

from __future__ import annotations

import base64
import json
import logging
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from artifact import trust
from artifact.errors import AirlockError, Denied, Invalid, Mismatch, NotFound, Unavailable
from artifact.faults import FAULTS
from artifact.reasons import REASONS
from artifact.remote import RemoteRegistry
from runtime import entitlement, leases
from runtime.entitlement import AUTH_LINE, NO_KEY_LINE, PERMISSION_LINE, SEED_LINE, Choice, check_key, obtain_lease, require_key, stored_lease
from runtime.settings import EXIT_CODES, from_environment
from tests.conftest import ROOT
from tests.fakes.site import Site

KEY = "nvapi-" + "k" * 49
LEASE_KEY = trust.generate_key()
PEM = trust.public_pem(LEASE_KEY)
TRUST = trust.SiteTrust("site-1", {}, {trust.kid(PEM): PEM}, 0)
CHOICE = Choice("acme/tiny", "1", "sha256:" + "a" * 64, "p1", ("GPU-2", "GPU-1"), "host-1", "sha256:" + "b" * 64)


def claims(body: dict[str, Any], **changed: Any) -> dict[str, Any]:
    now = int(time.time())
    model = {"name": body["model"], "ref": body["ref"], "digest": CHOICE.model_digest}
    out = {"iss": "site-1", "sub": "org:acme", "aud": body["host"], "jti": "j1", "iat": now, "nbf": now - 60, "exp": now + 86400, "model": model}
    out |= {k: body[k] for k in ("profile_digest", "profile_id", "gpu_uuids", "nonce")} | {"key_id": "k1", "lease_serial": 1, "revocation_serial": 0}
    return out | changed


@pytest.fixture
def site() -> Iterator[Site]:
    made = Site(KEY)
    made.lease = lambda body: (200, {"lease": trust.sign_jws(LEASE_KEY, "lease+jwt", claims(body)), "now": int(time.time())})
    yield made
    made.close()


def refusal(site: Site, key: str) -> AirlockError:
    settings = from_environment({"NGC_API_KEY": key}, "acme/tiny:1")
    with pytest.raises(AirlockError) as caught:
        require_key(settings)
        check_key(RemoteRegistry(site.url, key))
    return caught.value


@pytest.mark.parametrize(
    ("key", "state", "reason", "line", "status"),
    [
        ("", "ok", "key_absent", NO_KEY_LINE, 20),
        ("nvapi-wrong", "ok", "key_invalid", AUTH_LINE, 21),
        ("two words", "ok", "key_invalid", AUTH_LINE, 21),
        (KEY, "expired", "key_expired", AUTH_LINE, 22),
        (KEY, "revoked", "key_revoked", AUTH_LINE, 23),
    ],
)
def test_each_refused_key_has_its_cause_and_status(site: Site, key: str, state: str, reason: str, line: str, status: int) -> None:
    site.state = state
    error = refusal(site, key)
    lines, code = entitlement.report(error)
    assert (error.reason, code) == (reason, status)
    assert lines[:2] == [SEED_LINE, line] and lines[2].startswith("cause: ")
    if state in ("expired", "revoked"):
        assert "2026-01-01" in lines[2]
    assert not key or key == "two words" or key not in "\n".join(lines)


def test_a_name_of_another_organisation_reads_like_an_absent_one() -> None:
    lines, code = entitlement.report(entitlement.invisible("acme/tiny:1"))
    assert lines[:2] == [SEED_LINE, PERMISSION_LINE] and code == 24
    assert "this key sees no model of that name (absent, or another organisation's)" in lines[2]


def test_a_registry_that_is_down_is_no_refusal(site: Site) -> None:
    assert check_key(RemoteRegistry(site.url, KEY)) is None
    site.close()
    assert isinstance(check_key(RemoteRegistry(site.url, KEY, timeout_s=2)), Unavailable)


def test_a_lease_is_verified_and_starts_again_without_the_registry(site: Site, tmp_path: Path) -> None:
    fresh = obtain_lease(RemoteRegistry(site.url, KEY), CHOICE, TRUST, tmp_path)
    assert fresh["gpu_uuids"] == ["GPU-1", "GPU-2"]
    assert stored_lease(CHOICE, TRUST, tmp_path)["jti"] == "j1"


@pytest.mark.parametrize(
    "changed",
    [
        {"profile_id": "p2"},
        {"profile_digest": "sha256:" + "c" * 64},
        {"gpu_uuids": ["GPU-1"]},
        {"gpu_uuids": "GPU-1"},
        {"aud": "host-2"},
        {"iss": "site-2"},
        {"model": {"name": "acme/other", "ref": "1"}},
        {"model": {"name": "acme/tiny", "ref": "1", "digest": "sha256:" + "d" * 64}},
        {"model": "acme/tiny"},
        {"exp": 1},
        {"revocation_serial": True},
    ],
)
def test_a_lease_for_anything_else_is_refused_and_not_stored(site: Site, tmp_path: Path, changed: dict[str, Any]) -> None:
    site.lease = lambda body: (200, {"lease": trust.sign_jws(LEASE_KEY, "lease+jwt", claims(body, **changed)), "now": int(time.time())})
    with pytest.raises(AirlockError):
        obtain_lease(RemoteRegistry(site.url, KEY), CHOICE, TRUST, tmp_path)
    assert not list(tmp_path.glob("*.json"))


def test_a_foreign_key_signs_no_lease(site: Site, tmp_path: Path) -> None:
    site.lease = lambda body: (200, {"lease": trust.sign_jws(trust.generate_key(), "lease+jwt", claims(body)), "now": 0})
    with pytest.raises(AirlockError, match="not pinned"):
        obtain_lease(RemoteRegistry(site.url, KEY), CHOICE, TRUST, tmp_path)


def test_a_refused_lease_says_why(site: Site, tmp_path: Path) -> None:
    site.lease = lambda body: (403, {"reason": "tier_missing", "what": "acme/tiny requires the enterprise tier; this key has developer"})
    with pytest.raises(Denied) as caught:
        obtain_lease(RemoteRegistry(site.url, KEY), CHOICE, TRUST, tmp_path)
    lines, code = entitlement.report(caught.value)
    assert lines[:2] == [SEED_LINE, PERMISSION_LINE] and "enterprise tier" in lines[2] and code == 26
    site.lease = lambda body: (404, {"reason": "not_visible", "what": "x"})
    with pytest.raises(NotFound, match="sees no model"):
        obtain_lease(RemoteRegistry(site.url, KEY), CHOICE, TRUST, tmp_path)
    site.lease = lambda body: (503, {"what": "busy"})
    with pytest.raises(Unavailable):
        obtain_lease(RemoteRegistry(site.url, KEY), CHOICE, TRUST, tmp_path)


def stored(site: Site, folder: Path, **changed: Any) -> Path:
    site.lease = lambda body: (
        200,
        {"lease": trust.sign_jws(LEASE_KEY, "lease+jwt", claims(body, **changed)), "now": changed.get("iat", int(time.time()))},
    )
    obtain_lease(RemoteRegistry(site.url, KEY), CHOICE, TRUST, folder)
    return next(folder.glob("*.json"))


def test_a_deleted_edited_or_expired_lease_starts_nothing(site: Site, tmp_path: Path) -> None:
    path = stored(site, tmp_path)
    raw = path.read_bytes()
    for damaged in (
        raw[:-10],
        raw.replace(b".", b"x", 1),
        b"[]",
        b"\xff",
        b"x" * 200_000,
        json.dumps({"lease": 5}).encode(),
        raw[:-20] + (b"B" if raw[-20:-19] == b"A" else b"A") + raw[-19:],
    ):
        path.write_bytes(damaged)
        with pytest.raises(Denied) as caught:
            stored_lease(CHOICE, TRUST, tmp_path)
        assert EXIT_CODES[caught.value.reason] == 28
    path.write_bytes(b"x" * 200_000)
    assert stored(site, tmp_path) == path and stored_lease(CHOICE, TRUST, tmp_path)["jti"] == "j1"  # nothing damaged keeps a fresh one out
    path.unlink()
    with pytest.raises(Denied, match="holds no lease") as caught:
        stored_lease(CHOICE, TRUST, tmp_path)
    assert caught.value.reason == "lease_absent"
    long_ago = int(time.time()) - 200_000
    stored(site, tmp_path / "old", iat=long_ago, nbf=long_ago, exp=long_ago + 86400)
    with pytest.raises(Denied, match="the lease expired on") as caught:
        stored_lease(CHOICE, TRUST, tmp_path / "old")
    assert EXIT_CODES[caught.value.reason] == 29


@pytest.mark.parametrize("age", [60, 60 * 86400])
@pytest.mark.parametrize("floor", [True, False])
def test_a_replayed_lease_is_refused_whatever_time_the_answer_tells(site: Site, tmp_path: Path, age: int, floor: bool) -> None:
    then = int(time.time()) - age
    old = json.loads(stored(site, tmp_path / "then", iat=then, nbf=then, exp=then + 86400).read_bytes())["lease"]
    here = tmp_path / "now"
    before = stored(site, here).read_bytes() if floor else b""
    site.lease = lambda body: (200, {"lease": old, "now": then + 10})
    with pytest.raises((Mismatch, Denied), match=r"not made for this request|expired at") as caught:
        obtain_lease(RemoteRegistry(site.url, KEY), CHOICE, TRUST, here)
    assert entitlement.report(caught.value)[1] == 28
    assert [p.read_bytes() for p in here.glob("*.json")] == ([before] if floor else [])


@pytest.mark.parametrize("nonce", [None, "", "0" * 32, 5])
def test_a_lease_without_the_nonce_of_the_request_is_refused(site: Site, tmp_path: Path, nonce: object) -> None:
    token = lambda body: trust.sign_jws(LEASE_KEY, "lease+jwt", claims(body, nonce=nonce))  # noqa: E731
    site.lease = lambda body: (200, {"lease": token(body), "now": int(time.time())})
    with pytest.raises(Mismatch, match="not made for this request"):
        obtain_lease(RemoteRegistry(site.url, KEY), CHOICE, TRUST, tmp_path)


@pytest.mark.parametrize("now", [10**400, 10**11, -1, True, "0", None, [1]])
def test_a_time_that_is_none_is_told_plainly(site: Site, tmp_path: Path, now: object) -> None:
    site.lease = lambda body: (200, {"lease": trust.sign_jws(LEASE_KEY, "lease+jwt", claims(body)), "now": now})
    with pytest.raises(Invalid):
        obtain_lease(RemoteRegistry(site.url, KEY), CHOICE, TRUST, tmp_path)


def test_the_time_of_an_answer_counts_only_upward_from_the_floor(site: Site, tmp_path: Path) -> None:
    (tmp_path / "clock").write_text(f"{time.time() + 2 * 86400:.0f}")
    with pytest.raises(Denied, match="expired at"):
        stored(site, tmp_path)


@pytest.mark.timeout(20)
def test_a_stored_lease_that_is_no_regular_file_is_refused_at_once(site: Site, tmp_path: Path) -> None:
    path = stored(site, tmp_path)
    kept = path.rename(tmp_path / "kept")
    for plant in (lambda: os.mkfifo(path), lambda: path.symlink_to(kept), path.mkdir):
        plant()
        with pytest.raises(Denied, match="cannot be read") as caught:
            stored_lease(CHOICE, TRUST, tmp_path)
        assert entitlement.report(caught.value)[1] == 28 and str(path) in caught.value.what
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()


@pytest.mark.timeout(20)
@pytest.mark.parametrize("damage", ["deleted", "nonsense", "pipe"])
def test_a_lost_clock_is_told_and_never_goes_below_the_stored_lease(
    site: Site, tmp_path: Path, damage: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    token = json.loads(stored(site, tmp_path).read_bytes())["lease"]
    signed = json.loads(base64.urlsafe_b64decode(token.split(".")[1] + "=="))["iat"]
    clock = tmp_path / "clock"
    clock.unlink()
    clock.write_bytes(b"\xffx") if damage == "nonsense" else os.mkfifo(clock) if damage == "pipe" else None
    monkeypatch.setattr(time, "time", lambda: signed - 90_000)
    with caplog.at_level(logging.WARNING, "airlock"):
        assert stored_lease(CHOICE, TRUST, tmp_path)["jti"] == "j1"
    assert f"{clock} is gone or damaged" in caplog.text
    assert leases.floor(tmp_path) == signed


def test_a_first_start_misses_no_clock(site: Site, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "airlock"):
        stored(site, tmp_path)
    assert "gone or damaged" not in caplog.text


def test_a_clock_wound_back_gains_nothing(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored(site, tmp_path)
    later = time.time() + 90_000
    monkeypatch.setattr(time, "time", lambda: later)
    with pytest.raises(Denied, match="expired"):
        stored_lease(CHOICE, TRUST, tmp_path)
    (tmp_path / "clock").write_text(f"{later:.0f}")  # as a later signed document would have left it
    monkeypatch.setattr(time, "time", lambda: later - 90_000)
    with pytest.raises(Denied, match="expired"):
        stored_lease(CHOICE, TRUST, tmp_path)


def test_the_floor_follows_signed_time_and_a_near_clock_only(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.time()
    stored(site, tmp_path)
    assert abs(leases.floor(tmp_path) - now) < 30
    monkeypatch.setattr(time, "time", lambda: now + 90 * 86400)
    stored(site, tmp_path, iat=int(now) + 5, nbf=int(now), exp=int(now) + 86400)
    assert abs(leases.floor(tmp_path) - now) < 30
    for nonsense in (b"x", b"nan", b"-1", b"1e300", b"\xff"):
        (tmp_path / "clock").write_bytes(nonsense)
        assert leases.floor(tmp_path) == 0.0


@pytest.mark.parametrize(
    ("age", "grace", "reason", "status"),
    [
        (80_000, 0, "", 0),
        (90_000, 86400, "", 0),  # 25 h after the start: behind the end, within the grace
        (86_400 * 2 - 60, 86400, "", 0),
        (86_400 * 2 + 60, 86400, "lease_expired", 29),
        (90_000, 0, "lease_expired", 29),
        (90_000, True, "lease_expired", 29),
        (90_000, -5, "lease_expired", 29),
        (90_000, "86400", "lease_expired", 29),
        (90_000, 10**400, "lease_expired", 29),  # no number within reason is no grace
        (86_400 * 500, 10**10, "lease_expired", 29),  # and more than a year of it is cut
    ],
)
def test_a_stored_lease_has_a_grace_with_a_warning(
    site: Site, tmp_path: Path, age: int, grace: object, reason: str, status: int, caplog: pytest.LogCaptureFixture
) -> None:
    then = int(time.time()) - age
    stored(site, tmp_path, iat=then, nbf=then, exp=then + 86400, grace_s=grace)
    if not reason:
        with caplog.at_level(logging.WARNING, "airlock"):
            assert stored_lease(CHOICE, TRUST, tmp_path)["jti"] == "j1"
        assert ("grace ends on" in caplog.text) == (age > 86400)
        return
    with pytest.raises(Denied, match="the lease expired on") as caught:
        stored_lease(CHOICE, TRUST, tmp_path)
    assert (caught.value.reason, EXIT_CODES[caught.value.reason]) == (reason, status)


def test_a_clock_wound_back_into_the_grace_gains_nothing(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    then = int(time.time()) - 90_000
    stored(site, tmp_path, iat=then, nbf=then, exp=then + 86400, grace_s=3600)
    with pytest.raises(Denied, match="expired"):
        monkeypatch.setattr(time, "time", lambda: then + 86400 + 3601)
        stored_lease(CHOICE, TRUST, tmp_path)
    (tmp_path / "clock").write_text(f"{then + 86400 + 3601}")
    monkeypatch.setattr(time, "time", lambda: then + 10)
    with pytest.raises(Denied, match="expired"):
        stored_lease(CHOICE, TRUST, tmp_path)


def test_a_returned_or_refused_lease_starts_nothing_until_a_new_one(site: Site, tmp_path: Path) -> None:
    stored(site, tmp_path)
    (kept,) = leases.kept(tmp_path, "acme/tiny", "1", "host-1")
    assert not leases.kept(tmp_path, "acme/other") and not leases.kept(tmp_path, host="host-2") and kept.jti == "j1"
    assert leases.mark(kept, returned_at=1_800_000_000)
    with pytest.raises(Denied, match="returned on 2027-01-15") as caught:
        stored_lease(CHOICE, TRUST, tmp_path)
    assert (caught.value.reason, EXIT_CODES[caught.value.reason]) == ("lease_returned", 28)
    stored(site, tmp_path)
    assert stored_lease(CHOICE, TRUST, tmp_path)["jti"] == "j1"
    for reason in ("gpus_exceeded", "grant_expired", "key_invalid", "unavailable", "profile"):
        assert entitlement.refuse_kept(tmp_path, "acme/tiny", "1", "host-1", reason) == 0
    assert entitlement.refuse_kept(tmp_path, "acme/tiny", "1", "host-2", "key_revoked") == 0
    assert entitlement.refuse_kept(tmp_path, "acme/tiny", "1", "host-1", "key_revoked") == 1
    with pytest.raises(Denied) as caught:
        stored_lease(CHOICE, TRUST, tmp_path)
    assert (caught.value.reason, EXIT_CODES[caught.value.reason]) == ("lease_revoked", 28)


def test_marks_that_are_damaged_only_make_it_stricter(site: Site, tmp_path: Path) -> None:
    path = stored(site, tmp_path)
    doc = json.loads(path.read_bytes())
    path.write_text(json.dumps(doc | {"returned_at": "x", "revoked_at": -1, "told": 1}))
    assert stored_lease(CHOICE, TRUST, tmp_path)["jti"] == "j1"
    path.write_text(json.dumps(doc | {"returned_at": 1}))
    with pytest.raises(Denied, match="returned"):
        stored_lease(CHOICE, TRUST, tmp_path)
    (tmp_path / "0.json").write_bytes(b"\xff")
    (tmp_path / "1.json").mkdir()
    assert [k.path for k in leases.kept(tmp_path)] == [path]


def test_a_lease_older_than_the_pinned_revocation_serial_starts_nothing(site: Site, tmp_path: Path) -> None:
    stored(site, tmp_path, revocation_serial=6)
    newer = trust.SiteTrust("site-1", {}, TRUST.lease_keys, 7)
    assert stored_lease(CHOICE, TRUST, tmp_path)["jti"] == "j1"
    with pytest.raises(Denied, match="older than the pinned revocation serial") as caught:
        stored_lease(CHOICE, newer, tmp_path)
    assert EXIT_CODES[caught.value.reason] == 28
    stored(site, tmp_path, revocation_serial=7)
    assert stored_lease(CHOICE, newer, tmp_path)["jti"] == "j1"


@pytest.mark.parametrize("reason", ["connection_refused", "dns", "tls", "timeout", "connection", "unavailable"])
def test_without_a_stored_lease_the_fault_is_the_cause(tmp_path: Path, reason: str, caplog: pytest.LogCaptureFixture) -> None:
    trouble = Unavailable("GET http://r:1/x: why", expected="e", do="d", reason=reason)
    with caplog.at_level(logging.WARNING, "airlock"):
        entitlement.tell(trouble)
    assert [r.levelno for r in caplog.records] == [logging.ERROR if reason == "tls" else logging.WARNING]
    assert (reason in caplog.text or (reason == "tls" and "TLS" in caplog.text)) and "GET http://r:1/x: why" in caplog.text
    with pytest.raises(Unavailable, match="the cache holds no lease") as caught:
        entitlement.fall_back(trouble, CHOICE, TRUST, tmp_path)
    lines, status = entitlement.report(caught.value)
    assert status == EXIT_CODES.get(reason, 9) and SEED_LINE not in lines and lines[-1] == "fix: d"


def test_the_clock_of_a_long_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, began, ticked = leases.Clock(tmp_path, 1000.0), time.monotonic(), 0.0
    monkeypatch.setattr(time, "monotonic", lambda: began + ticked)
    clock = leases.Clock(tmp_path, 1_900_000_000.0)
    monkeypatch.setattr(time, "time", lambda: 1_800_000_000.0)  # a wall clock far behind what was signed
    assert clock.now() == clock.least() == 1_900_000_000.0
    ticked = 3600.0
    assert clock.now() == 1_900_003_600.0, "the monotonic clock goes on where the wall clock was set back"
    clock.save()
    assert leases.floor(tmp_path) == 1_900_003_600.0
    monkeypatch.setattr(time, "time", lambda: 1_900_007_200.0)
    assert clock.now() == 1_900_007_200.0
    clock.save()
    assert leases.floor(tmp_path) == 1_900_007_200.0
    monkeypatch.setattr(time, "time", lambda: 1_900_000_000.0 + 10 * 365 * 86400)
    clock.save()
    assert leases.floor(tmp_path) == 1_900_007_200.0, "a wall clock ten years ahead raises no floor"
    clock.signed(1_900_100_000.0)
    assert clock.least() == 1_900_100_000.0
    clock.signed(5.0)
    assert clock.least() == 1_900_100_000.0


def test_every_reason_has_an_exit_code_above_those_of_all_commands() -> None:
    assert set(REASONS) <= set(EXIT_CODES) and set(FAULTS) <= set(EXIT_CODES)
    assert min(EXIT_CODES.values()) > 11
    assert len({EXIT_CODES[r] for r in (*FAULTS, "entitlement_expired", "gpus_exceeded")}) == 6
    text = (ROOT / "docs" / "operations.md").read_text().split("## Exit codes of airlock runtime", 1)[1].split("\n## ", 1)[0]
    told = {r: int(m[1]) for m in re.finditer(r"^\| (\d+) \| ((?:`\w+` ?)+)\|", text, re.MULTILINE) for r in re.findall(r"`(\w+)`", m[2])}
    assert told == dict(EXIT_CODES)


def test_every_documented_status_is_told_apart() -> None:
    assert len({EXIT_CODES[r] for r in ("key_absent", "key_invalid", "key_expired", "key_revoked", "not_visible", "no_profile", "port_taken")}) == 7
    assert min(EXIT_CODES.values()) > 11
