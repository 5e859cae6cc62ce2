"""The watch on both databases: each notice once, whoever tells it and however often it starts; the receiver of notices and its faults; figures."""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select, update

from artifact.errors import Invalid, Unavailable
from registry import tables as t
from registry import watch as module
from registry import webhook
from registry.calendar import DAY_S
from registry.job import Job
from registry.settings import Settings
from registry.watch import Watch
from registry.wiring import Site
from tests.fakes.receiver import Receiver, receiving, refusing
from tests.site import BACKENDS, running_site
from tests.unit.test_calendar import document, grant, lease

SECRET = b"0123456789abcdef0123456789abcdef"


@pytest.fixture(params=BACKENDS)
def site(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Site]:
    with running_site(tmp_path, request.param) as opened:
        yield opened


def hooked(site: Site, url: str, secret: Path | None = None) -> Site:
    """The same site with a receiver of notices."""
    return replace(site, settings=replace(site.settings, webhook=url, webhook_secret_file=str(secret or "")))


def notices(site: Site) -> list[tuple[str, str, int, bool]]:
    with site.catalog.reading() as conn:
        n = t.notice.c
        return [(row.kind, row.item, row.days, row.sent_at > 0) for row in conn.execute(select(t.notice).order_by(n.due, n.item, n.days.desc()))]


def told(caplog: pytest.LogCaptureFixture) -> list[tuple[str, int]]:
    """Item and threshold of every notice that was logged since the last time."""
    found = [getattr(r, "facts", {}) for r in caplog.records if r.name == "airlock.watch"]
    caplog.clear()
    return [(str(f["item"]), int(f["threshold"])) for f in found if "threshold" in f]


def items(receiver: Receiver) -> list[tuple[str, int]]:
    return [(i["item"], i["threshold"]) for got in receiver.got for i in json.loads(got.body)["items"]]


# ---- once


@pytest.mark.slow
def test_each_threshold_once_across_restarts(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    now = time.time()
    end = now + 70 * DAY_S
    grant(site, "acme", "grant-1", end)
    said: list[tuple[str, int]] = []
    for day in range(-1, 75):
        for _ in range(2):  # each round by a process that was just started
            Watch(site).notify(now + day * DAY_S + 1)
        said += told(caplog)
    assert said == [("grant-1", days) for days in (60, 30, 14, 7, 1, 0)]
    assert notices(site) == [("grant", "grant-1", days, False) for days in (60, 30, 14, 7, 1, 0)]
    site.log.settle()
    with site.catalog.reading() as conn:
        bodies = conn.execute(select(t.audit_leaf.c.body).where(t.audit_leaf.c.event == "notice")).scalars()
        assert [json.loads(str(b))["days"] for b in bodies] == [60, 30, 14, 7, 1, 0], "the auditor sees that it was told"


def test_another_end_is_told_anew_and_a_late_start_tells_only_the_nearest(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    now = time.time()
    grant(site, "acme", "grant-1", now + 5 * DAY_S)
    Watch(site).notify(now)
    assert told(caplog) == [("grant-1", 7)]
    with site.catalog.writing() as conn:
        conn.execute(update(t.key_grant).values(expires=now + 25 * DAY_S))
    assert Watch(site).notify(now) == 1 and told(caplog) == [("grant-1", 30)]
    with site.catalog.writing() as conn:
        conn.execute(update(t.key_grant).values(expires=now + 90 * DAY_S))
    assert Watch(site).notify(now) == 0 and told(caplog) == []


def test_leases_and_what_has_a_successor_are_no_news(site: Site) -> None:
    now = time.time()
    lease(site, 1, "node1")
    document(site, "acme", "doc1", 1, now - DAY_S, now + 5 * DAY_S)
    document(site, "acme", "doc2", 2, now + 4 * DAY_S, now + 500 * DAY_S, counts=False)
    watch = Watch(site)
    assert watch.notify(now) == 0 and not notices(site)
    assert watch.figures["lease"][1] == 0 and watch.figures["entitlement"][0] == pytest.approx(5, abs=0.01)


def test_two_at_once_tell_each_notice_once(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    now = time.time()
    for n in range(40):
        grant(site, "acme", f"grant-{n:02}", now + 5 * DAY_S)
    with receiving() as receiver:
        start = threading.Barrier(4)

        def work() -> None:
            start.wait()
            Watch(hooked(site, receiver.url)).notify(now)

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        Watch(hooked(site, receiver.url)).notify(now)
        every = [(f"grant-{n:02}", 7) for n in range(40)]
        assert sorted(told(caplog)) == every and sorted(items(receiver)) == every


def test_while_another_process_tells_it_nobody_else_does(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    now = time.time()
    grant(site, "acme", "grant-1", now + 5 * DAY_S)
    held = Job.take(site.engine, module.NAME, now)
    assert Watch(site).notify(now) == 0 and told(caplog) == []
    held.end({}, now)
    assert Watch(site).notify(now) == 1 and told(caplog) == [("grant-1", 7)]


# ---- the receiver


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    path = tmp_path / "hook.secret"
    path.write_bytes(SECRET + b"\n")
    return path


def test_a_receiver_gets_a_signed_body(site: Site, secret: Path) -> None:
    now = time.time()
    grant(site, "acme", "grant-1", now + 5 * DAY_S)
    lease(site, 1, "node1", grant_id="grant-1")
    with receiving() as receiver:
        watch = Watch(hooked(site, receiver.url, secret))
        watch.notify(now)
        watch.notify(now + 61)
        assert len(receiver.got) == 1 and notices(site) == [("grant", "grant-1", 7, True)]
        got = receiver.got[0]
    assert got.headers["x-airlock-signature"] == "sha256=" + hmac.new(SECRET, got.body, hashlib.sha256).hexdigest()
    assert got.headers["content-type"] == "application/json" and got.path == "/hooks/a-secret-path"
    doc = json.loads(got.body)
    assert (doc["schema"], doc["event"], doc["instance"]) == (1, "expiring", site.home.instance)
    item = doc["items"][0]
    assert (item["kind"], item["item"], item["org"], item["threshold"]) == ("grant", "grant-1", "acme", 7)
    assert item["stops"] == [{"host": "node1", "model": "acme/m"}]


def test_without_a_secret_there_is_no_signature(site: Site) -> None:
    grant(site, "acme", "grant-1", time.time() + 5 * DAY_S)
    with receiving() as receiver:
        Watch(hooked(site, receiver.url)).notify(time.time())
        assert "x-airlock-signature" not in receiver.got[0].headers


@pytest.mark.slow
@pytest.mark.parametrize(
    ("answers", "reason", "tries"),
    [((500,), "status", 3), ((404,), "status", 3), (("redirect",), "redirect", 3), (("slow",), "timeout", 3), (("drip",), "timeout", 3)],
)
def test_a_receiver_that_fails_is_told_and_tried_again_later(
    site: Site, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, answers: tuple[Any, ...], reason: str, tries: int
) -> None:
    monkeypatch.setattr(module, "PAUSE_S", 0.01)
    monkeypatch.setattr(webhook.deliver, "__defaults__", (1.0,))  # the time-out of a try
    now = time.time()
    grant(site, "acme", "grant-1", now + 5 * DAY_S)
    with receiving(*answers) as receiver:
        watch = Watch(hooked(site, receiver.url), every_s=600)
        begun = time.monotonic()
        assert watch.notify(now) == 1
        assert time.monotonic() - begun < 20
        assert len(receiver.got) == tries and {got.path for got in receiver.got} == {"/hooks/a-secret-path"}, "nobody is sent elsewhere"
        failed = [getattr(r, "facts") for r in caplog.records if getattr(r, "facts", {}).get("reason") == reason]  # noqa: B009
        assert len(failed) == 1 and failed[0]["tries"] == tries
        assert "a-secret-path" not in caplog.text + json.dumps(failed)
        assert notices(site) == [("grant", "grant-1", 7, False)]
        assert watch.notify(now) == 0 and len(receiver.got) == tries, "not yet"
        receiver.answers = [200]
        monkeypatch.setattr(watch, "_not_before", time.monotonic())  # the ten minutes are over
        watch.notify(now)
        assert notices(site) == [("grant", "grant-1", 7, True)] and len(receiver.got) == tries + 1


@pytest.mark.slow
def test_a_receiver_that_is_away(site: Site, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PAUSE_S", 0.01)
    grant(site, "acme", "grant-1", time.time() + 5 * DAY_S)
    waits = []
    watch = Watch(hooked(site, refusing()))
    for _ in range(8):
        watch._not_before = 0.0  # the time has come
        watch.notify(time.time())
        waits.append(watch._wait_s)
    assert waits == [60, 120, 240, 480, 960, 1920, 3600, 3600]
    assert len([r for r in caplog.records if getattr(r, "facts", {}).get("reason") == "connection_refused"]) == 8
    for url, reason in (("http://no-such-host.invalid/x", "dns"), (refusing().replace("http:", "https:"), "connection_refused")):
        with pytest.raises(Unavailable) as caught:
            webhook.deliver(url, b"{}", b"")
        assert caught.value.reason == reason
    with receiving() as receiver, pytest.raises(Unavailable) as caught:
        webhook.deliver(receiver.url.replace("http:", "https:"), b"{}", b"")
    assert caught.value.reason == "tls"


def test_one_failure_and_then_taken_within_a_round(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PAUSE_S", 0.01)
    grant(site, "acme", "grant-1", time.time() + 5 * DAY_S)
    with receiving(503, 200) as receiver:
        Watch(hooked(site, receiver.url)).notify(time.time())
        assert len(receiver.got) == 2 and notices(site)[0][3]


def test_what_no_longer_ends_is_not_sent_late_and_old_news_is_no_news(site: Site) -> None:
    now = time.time()
    grant(site, "acme", "grant-1", now + 5 * DAY_S)
    grant(site, "acme", "grant-2", now + 5 * DAY_S)
    Watch(site).notify(now)
    with site.catalog.writing() as conn:
        conn.execute(update(t.key_grant).where(t.key_grant.c.grant_id == "grant-1").values(revoked_at=now))
        conn.execute(update(t.notice).where(t.notice.c.item == "grant-2").values(at=now - 8 * DAY_S))
    with receiving() as receiver:
        Watch(hooked(site, receiver.url)).notify(now)
        assert not receiver.got
    assert notices(site) == [("grant", "grant-1", 7, True), ("grant", "grant-2", 7, False)]


@pytest.mark.slow
def test_many_are_sent_in_parts(site: Site) -> None:
    now = time.time()
    for n in range(module.BATCH + 5):
        grant(site, "acme", f"grant-{n:03}", now + 5 * DAY_S)
    with receiving(200, 500) as receiver:
        Watch(hooked(site, receiver.url)).notify(now)
        assert len(json.loads(receiver.got[0].body)["items"]) == module.BATCH
        receiver.answers = [200]
        Watch(hooked(site, receiver.url)).notify(now)
        assert len(json.loads(receiver.got[-1].body)["items"]) == 5


@pytest.mark.slow
@pytest.mark.parametrize("content", [None, b"", b"short", b"x" * 5000])
def test_a_secret_that_is_none_is_told_and_nothing_is_sent_unsigned(
    site: Site, secret: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, content: bytes | None
) -> None:
    monkeypatch.setattr(module, "PAUSE_S", 0.01)
    if content is None:
        secret.unlink()
    else:
        secret.write_bytes(content)
    grant(site, "acme", "grant-1", time.time() + 5 * DAY_S)
    with receiving() as receiver:
        Watch(hooked(site, receiver.url, secret)).notify(time.time())
        assert not receiver.got and "secret" in caplog.text


# ---- rounds and settings


def test_a_step_that_fails_does_not_keep_the_others(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise Unavailable("away")

    grant(site, "acme", "grant-1", time.time() + 5 * DAY_S)
    monkeypatch.setattr(site.floor, "tick", broken)
    monkeypatch.setattr(site.log, "waiting", broken)
    failed: list[tuple[str, str]] = []
    watch = Watch(site)
    watch.audit = {"waiting": 3.0}
    watch.round(time.time(), lambda step, error: failed.append((step, repr(error))))
    assert failed == [("the clock", "Unavailable('away')"), ("the audit log", "Unavailable('away')")]
    assert watch.audit == {} and len(notices(site)) == 1


def test_it_watches_at_once_and_ends_when_told(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    grant(site, "acme", "grant-1", time.time() + 5 * DAY_S)
    failed: list[object] = []
    stop = Watch(site).start(lambda *found: failed.append(found))
    end = time.monotonic() + 60
    while not notices(site) and time.monotonic() < end:
        time.sleep(0.05)
    begun = time.monotonic()
    stop()
    took = time.monotonic() - begun
    assert not failed and len(notices(site)) == 1
    assert took < 30, "half of the time between two rounds"


@pytest.mark.parametrize(
    "url", ["ftp://x/y", "http://", "http://u:p@h/x", "http://h:99999/x", "http://h:0x/", "https://h/ä", "http://h /x", "h/x", "http://h:0/"]
)
def test_a_webhook_that_is_no_url_is_refused(tmp_path: Path, url: str) -> None:
    with pytest.raises(Invalid) as caught:
        Settings.load(tmp_path, environ={"AIRLOCK_WEBHOOK": url})
    assert "u:p" not in str(caught.value)


def test_settings_show_no_path_of_a_webhook(tmp_path: Path) -> None:
    found = Settings.load(tmp_path, environ={"AIRLOCK_WEBHOOK": "https://hooks.example.com:8443/T0/B1?x=secret"})
    assert found.webhook.endswith("secret")
    shown = {name: value for name, value, _, _ in found.rows()}
    assert shown["webhook"] == "https://hooks.example.com:8443/***" and "T0" not in repr(found)


logging.getLogger("airlock.watch").setLevel(logging.INFO)
