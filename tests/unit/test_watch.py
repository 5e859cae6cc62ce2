"""The watch over a running model against a stand-in registry over real HTTP: renewal, refusal, absence, thresholds, clock, receipt, what it shows."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from artifact import trust
from artifact.errors import Denied, Invalid
from artifact.grant import date
from artifact.remote import RemoteRegistry
from runtime import leases, standing
from runtime.entitlement import obtain_lease, stored_lease
from runtime.watch import Watch
from tests.fakes.site import Site
from tests.unit.test_runtime_entitlement import CHOICE, KEY, LEASE_KEY, TRUST, claims

DAY = 86400
RECEIPT = {"digest": CHOICE.model_digest, "bytes": 5000, "files": 3}


def has(site: Site, **changed: Any) -> None:
    """What the registry says that the key has; ends in days from now."""
    now = time.time()
    ends = {k: date(now + v * DAY) if v is not None else "" for k, v in ({"key": 300, "grant": 200, "grace": 214} | changed).items() if k != "serial"}
    grants = [
        {"grant_id": "grant-1", "models": ["acme/*"], "actions": ["pull", "run"], "ends": ends["grant"], "grace_ends": ends["grace"]},
        {"grant_id": "grant-2", "models": ["hf/**"], "actions": ["pull", "run"], "ends": date(now + DAY / 2), "grace_ends": date(now + DAY / 2)},
        {"grant_id": "grant-3", "models": ["acme/*"], "actions": ["pull"], "ends": date(now + DAY / 2), "grace_ends": date(now + DAY / 2)},
    ]
    site.standing = {"key_id": "key-1", "org": "acme", "tier": "enterprise", "key_ends": ends["key"], "entitlement": None, "grants": grants}
    site.standing |= {"revocation_serial": changed.get("serial", 0), "now": date(now), "warnings": []}


@pytest.fixture
def site() -> Iterator[Site]:
    made = Site(KEY)
    gives(made)
    has(made)
    yield made
    made.close()


def gives(site: Site, life_s: int = 86400, after_s: float = 12960, **changed: Any) -> None:
    """Leases of that life, each with another id."""

    def lease(body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        now = int(time.time())
        said = {"exp": now + life_s, "renew_after": now + after_s, "grace_s": 3 * DAY, "jti": f"lease-{len(site.log)}"} | changed
        return 200, {"lease": trust.sign_jws(LEASE_KEY, "lease+jwt", claims(body, **said)), "now": time.time()}

    site.lease = lease


def watching(site: Site, folder: Path, **settings: Any) -> Watch:
    remote = RemoteRegistry(site.url, KEY, timeout_s=2)
    given = obtain_lease(remote, CHOICE, TRUST, folder)
    return Watch(remote, CHOICE, TRUST, folder, given, **settings)


def asked(site: Site, path: str) -> int:
    return sum(path in line for line in site.log)


def test_all_is_well(site: Site, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    watch = watching(site, tmp_path)
    with caplog.at_level(logging.INFO, "airlock"):
        assert 890 < watch.step() <= 900
    assert (watch.state(), watch.warning(), caplog.text) == ("valid", "", "")
    assert asked(site, "/leases") == 1


def test_the_lease_is_renewed_when_it_is_due_and_not_before(site: Site, tmp_path: Path) -> None:
    gives(site, after_s=1)
    watch = watching(site, tmp_path)
    first = leases.kept(tmp_path)[0].jti
    assert watch.step() <= 1
    assert asked(site, "POST /airlock/v1/leases") == 1
    time.sleep(1.1)
    watch.step()
    assert asked(site, "POST /airlock/v1/leases") == 2
    assert leases.kept(tmp_path)[0].jti != first and watch.known.renewed_at > 0 and 'renewals_total{result="ok"} 1' in "\n".join(watch.metrics())


def test_a_wall_clock_far_ahead_does_not_make_it_hurry(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watch = watching(site, tmp_path)
    true = time.time
    monkeypatch.setattr(time, "time", lambda: true() + 2 * DAY)
    watch.step()
    assert asked(site, "POST /airlock/v1/leases") == 1


def test_a_lease_from_the_cache_is_renewed_as_soon_as_the_registry_answers(site: Site, tmp_path: Path) -> None:
    watch = watching(site, tmp_path, fresh=False)
    watch.step()
    assert asked(site, "POST /airlock/v1/leases") == 2


def test_an_absent_registry_is_told_once_with_the_date_and_the_lease_runs_down(
    site: Site, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch = watching(site, tmp_path)
    watch.step()
    site.close()
    with caplog.at_level(logging.INFO, "airlock"):
        waits = [watch.step() for _ in range(9)]
    assert waits[0] < 6 and waits[:8] == sorted(waits[:8]) and 800 < waits[8] < 1000, "the waits grow to the period"
    last = leases.kept(tmp_path)[0].lease
    after = date(last.expires + 3 * DAY)
    (told,) = [r.message for r in caplog.records if "does not answer as it should" in r.message]
    assert "connection_refused" in told and f"no new start of this model after {after}" in told and "what runs goes on" in told
    assert watch.warning().startswith(f"the lease is not renewed (connection_refused); no new start of this model after {after}")
    assert watch.state() == "valid"
    true = time.time
    for hours, state in ((25, "grace"), (97, "over")):
        monkeypatch.setattr(time, "time", lambda hours=hours: true() + hours * 3600)
        caplog.clear()
        with caplog.at_level(logging.INFO, "airlock"):
            watch.step()
        assert watch.state() == state and "does not answer as it should" in caplog.text
    assert "until the registry gives a lease" in watch.warning()
    assert "airlock_start_days_left 0.0000" in watch.metrics()


def test_a_wall_clock_that_is_set_back_extends_nothing(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gives(site, life_s=2, grace_s=0)
    watch = watching(site, tmp_path)
    site.close()
    true = time.time
    monkeypatch.setattr(time, "time", lambda: true() - 365 * DAY)
    assert watch.state() == "valid"
    time.sleep(2.1)
    watch.step()
    assert watch.state() == "over", "the monotonic clock went on"
    assert leases.floor(tmp_path) >= true() - 2, "and the next start knows"


@pytest.mark.parametrize(("state", "reason"), [("revoked", "key_revoked"), ("expired", "key_expired")])
def test_a_refusal_is_told_with_its_reason_and_what_was_taken_back_starts_nothing(
    site: Site, tmp_path: Path, caplog: pytest.LogCaptureFixture, state: str, reason: str
) -> None:
    watch = watching(site, tmp_path)
    watch.step()
    site.state = state
    with caplog.at_level(logging.INFO, "airlock"):
        watch.step()
        watch.step()
    (told,) = [r.message for r in caplog.records if "is refused" in r.message]
    assert f"({reason})" in told and "2026-01-01" in told and "what runs goes on" in told
    assert watch.state() == "refused" and f"({reason})" in watch.warning() and KEY not in caplog.text + watch.warning()
    if state == "revoked":
        with pytest.raises(Denied, match="the lease was revoked"):
            stored_lease(CHOICE, TRUST, tmp_path)
    else:
        assert stored_lease(CHOICE, TRUST, tmp_path)["iss"] == "site-1", "an end that was reached is the lease's own"
    site.state = "ok"
    watch.step()
    assert watch.state() == "valid" and watch.warning() == "" and stored_lease(CHOICE, TRUST, tmp_path)


def test_gpus_in_use_elsewhere_take_nothing_back(site: Site, tmp_path: Path) -> None:
    gives(site, after_s=1)
    watch = watching(site, tmp_path)
    site.lease = lambda body: (403, {"reason": "gpus_exceeded", "what": "1 more GPUs are asked for"})
    time.sleep(1.1)
    watch.step()
    assert watch.known.refused == "gpus_exceeded" and stored_lease(CHOICE, TRUST, tmp_path)


@pytest.mark.parametrize("answer", [(200, {"lease": "x", "now": 1}), (200, {}), (503, {"what": "busy"}), (500, {})])
def test_an_answer_that_makes_no_sense_takes_nothing_back(site: Site, tmp_path: Path, answer: tuple[int, dict[str, Any]]) -> None:
    watch = watching(site, tmp_path, fresh=False)
    site.lease = lambda body: answer
    watch.step()
    assert watch.known.away and not watch.known.refused and stored_lease(CHOICE, TRUST, tmp_path)


def test_an_end_is_told_once_with_what_it_stops(site: Site, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    watch = watching(site, tmp_path)
    has(site, grant=6.5, grace=10)
    with caplog.at_level(logging.WARNING, "airlock"):
        watch.step()
        watch.step()
        watch.step()
    (line,) = [r.message for r in caplog.records]
    assert re.match(r"the grant ends on \S+, in 6 days: that stops pull, run of acme/\*; what runs goes on", line)
    assert re.match(r"the grant ends on \S+Z, in 6 days$", watch.warning())


def test_one_end_is_told_at_each_level_as_time_goes(
    site: Site, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    has(site, key=61, grant=None, grace=None)
    watch = watching(site, tmp_path)
    gives(site, life_s=400 * DAY)
    true, told = time.time, []
    for passed in (0, 1.5, 2, 31.5, 32, 47.5, 54.5, 55, 60.5, 60.8, 61.5, 70):
        monkeypatch.setattr(time, "time", lambda passed=passed: true() + passed * DAY)
        caplog.clear()
        with caplog.at_level(logging.WARNING, "airlock"):
            watch.step()
        told += [passed] if "the API key" in caplog.text else []
    assert told == [1.5, 31.5, 47.5, 54.5, 60.5, 61.5]
    assert "the API key ended on" in watch.warning()


def test_only_what_this_model_depends_on_counts(site: Site, tmp_path: Path) -> None:
    watch = watching(site, tmp_path)
    watch.step()
    assert {e.item for e in watch.known.ends} == {"key-1", "grant-1"}


def test_a_rising_revocation_serial_renews_at_once(site: Site, tmp_path: Path) -> None:
    watch = watching(site, tmp_path)
    has(site, serial=5)
    gives(site, revocation_serial=5)
    watch.step()
    watch.step()
    assert asked(site, "POST /airlock/v1/leases") == 2
    assert stored_lease(CHOICE, trust.SiteTrust("site-1", {}, TRUST.lease_keys, 5), tmp_path)


def test_the_receipt_is_sent_once_and_later_where_the_registry_is_away(site: Site, tmp_path: Path) -> None:
    watch = watching(site, tmp_path, receipt=RECEIPT)
    watch.step()
    watch.step()
    jti = leases.kept(tmp_path)[0].jti
    assert site.taken == [("verified", {"lease": jti, **RECEIPT})]
    site.standing = None  # an older registry: neither standing nor receipts
    older = watching(site, tmp_path, receipt=RECEIPT)
    for _ in range(3):
        older.step()
    assert older.state() == "valid" and asked(site, "/verified") == 2 and older.warning() == ""


def test_metrics_have_no_names(site: Site, tmp_path: Path) -> None:
    has(site, key=None, grant=20, grace=21)
    watch = watching(site, tmp_path)
    watch.step()
    text = "\n".join(watch.metrics())
    labels = set(re.findall(r"\{(.*?)\}", text))
    assert labels == {'of="lease"', 'of="grant"', *(f'state="{s}"' for s in ("valid", "grace", "over", "refused"))} | {
        f'result="{r}"' for r in ("ok", "failed", "refused")
    }
    assert re.search(r'airlock_days_left\{of="grant"\} (19\.99\d\d|20\.0000)$', text, re.MULTILINE)
    assert 'airlock_lease_state{state="valid"} 1' in text and re.search(r"airlock_start_days_left (3\.99\d\d|4\.0000)$", text, re.MULTILINE)
    assert not re.search(r"acme|grant-1|key-1|host-1|nvapi", text)


def test_the_thread_begins_and_ends(site: Site, tmp_path: Path) -> None:
    watch = watching(site, tmp_path, every_s=0.1, receipt=RECEIPT)
    watch.start()
    end = time.monotonic() + 10
    while asked(site, "/standing") < 3:
        assert time.monotonic() < end
        time.sleep(0.02)
    watch.stop()
    seen = asked(site, "/standing")
    time.sleep(0.4)
    assert asked(site, "/standing") == seen


@pytest.mark.parametrize(
    "changed",
    [
        {"grants": None},
        {"grants": ["x"]},
        {"grants": [{}] * 1001},
        {"key_ends": "soon"},
        {"key_ends": "9999-12-31T00:00:00Z"},
        {"key_ends": -1},
        {"key_ends": [1]},
        {"entitlement": 5},
        {"now": "x" * 50},
    ],
)
def test_a_standing_that_is_none_is_refused(site: Site, changed: dict[str, Any]) -> None:
    assert site.standing is not None
    standing.parse(site.standing)
    with pytest.raises(Invalid):
        standing.parse(site.standing | changed)


def test_a_grant_that_a_longer_one_covers_counts_no_more() -> None:
    def grant(number: int, models: list[str], actions: list[str], ends: float) -> dict[str, Any]:
        return {"grant_id": f"g{number}", "models": models, "actions": actions, "ends": date(ends) if ends else "", "grace_ends": ""}

    now = 1_800_000_000.0
    given = [
        grant(1, ["acme/*"], ["pull"], now - DAY),
        grant(2, ["acme/*", "hf/**"], ["pull", "run"], now + DAY),
        grant(3, ["acme/*"], ["admin"], 0),
        grant(4, ["hf/**"], ["push"], now - DAY),
        grant(5, ["hf/**"], ["push"], now - DAY),
    ]
    doc = {"key_id": "k", "org": "acme", "tier": "", "key_ends": "", "entitlement": None, "grants": given, "revocation_serial": 0, "now": date(now)}
    found = standing.parse(doc)
    assert [e.item for e in found.counting() if e.kind == "grant"] == ["g2", "g3", "g4", "g5"]
    assert [e.item for e in found.running("acme/x") if e.kind == "grant"] == ["g3"]
    assert [e.item for e in found.running("hf/x/y") if e.kind == "grant"] == ["g2"]
    assert [e.item for e in found.running("beta/x") if e.kind == "grant"] == []


def test_words_of_an_end() -> None:
    now = 1_800_000_000.0
    end = standing.End("entitlement", "j", now + 2.5 * DAY, "x", now + 10 * DAY)
    assert end.words(now).endswith(", in 2 days") and end.words(now + 2 * DAY).endswith(", in less than a day")
    assert "its grace ends on" in end.words(now + 3 * DAY) and end.over(now + 10 * DAY) and not end.over(now + 9 * DAY)
    assert "was revoked on" in standing.End("entitlement", "j", now + DAY, "x", now + DAY, now - 5).words(now)
    assert [standing.threshold(d) for d in (61, 60, 30.01, 30, 14, 7, 1, 0.1, 0, -5)] == [None, 60, 60, 30, 14, 7, 1, 1, 0, 0]
    assert standing.End("key", "k", 0.0, "x").days(now) == float("inf") and not standing.End("key", "k", 0.0, "x").over(now)
