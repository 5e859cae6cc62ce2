"""The clock's floor on both databases: what raises it, what does not, what is recorded, and that an end stays an end."""

from __future__ import annotations

import itertools
import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import Connection, delete, event, insert, select, update

from artifact.errors import Unauthenticated
from artifact.grant import Decision, Principal
from artifact.store import Call
from registry import tables as t
from registry.catalog import ensure_org
from registry.floor import BACK_S, FLOOR, NEAR_S, Floor
from registry.settings import Settings
from registry.wiring import Site, open_site
from tests.site import BACKENDS, call_of, make_key, running_site

DAY = 86400.0
YEAR = 365 * DAY


@pytest.fixture(params=BACKENDS)
def site(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Site]:
    with running_site(tmp_path, request.param) as opened:
        yield opened


def rows(site: Site) -> dict[str, float]:
    with site.catalog.reading() as conn:
        return {row.name: row.at for row in conn.execute(select(t.clock))}


def events(site: Site, name: str) -> list[dict[str, object]]:
    site.log.settle()
    with site.catalog.reading() as conn:
        found = conn.execute(select(t.audit_leaf.c.body).where(t.audit_leaf.c.event == name).order_by(t.audit_leaf.c.idx)).scalars()
        return [json.loads(str(body)) for body in found]


def again(site: Site) -> Floor:
    """The floor as another process, or the next start, finds it."""
    return Floor.load(site.engine, site.audit, site.home.created)


def lose(site: Site) -> None:
    with site.catalog.writing() as conn:
        conn.execute(delete(t.clock))


def test_a_clock_set_back_a_year_brings_no_key_back(site: Site) -> None:
    now = time.time()
    key = make_key(site, "acme", expires=now - 1)
    site.floor.tick(now)
    for wall in (now, now - BACK_S - 1, now - YEAR, 0.0, -1e9):
        with pytest.raises(Unauthenticated) as caught:
            call_of(site, key, wall)
        assert caught.value.reason == "key_expired", wall
    living = make_key(site, "acme", expires=now + 100)
    assert call_of(site, living, now - YEAR).now == site.floor.at, "a call is of the time that counts"
    with pytest.raises(Unauthenticated):
        site.guard.caller(site.guard.token(call_of(site, living), ())[0], "r", now + 700, "")


def test_a_clock_ten_years_ahead_and_back_ends_nothing_for_ever(site: Site) -> None:
    now = time.time()
    key = make_key(site, "acme", expires=now + 30 * DAY)
    site.floor.tick(now)
    floor = site.floor.at
    with pytest.raises(Unauthenticated):
        call_of(site, key, now + 10 * YEAR)
    for _ in range(3):
        site.floor.tick(now + 10 * YEAR)
        site.floor.close(now + 10 * YEAR)
    assert site.floor.doubt(now + 10 * YEAR) == "clock_ahead"
    assert site.floor.at == floor == rows(site)[FLOOR] == again(site).at
    assert call_of(site, key, now).principal.key_id and site.floor.doubt(now) == ""


def test_what_raises_it(site: Site) -> None:
    now = time.time()
    floor = site.floor.at
    site.floor.tick(floor + NEAR_S - 1)
    assert site.floor.at == floor + NEAR_S - 1, "a near wall clock"
    site.floor.tick(site.floor.at + NEAR_S + 1)
    assert site.floor.at == floor + NEAR_S - 1, "not a far one"
    site.floor.raise_to(now + 2 * YEAR)
    assert site.floor.at == now + 2 * YEAR, "a signed time, however far"
    for nothing in (now, 0.0, -1.0, float("nan"), float("inf"), 1e300):
        site.floor.raise_to(nothing)
    assert site.floor.at == now + 2 * YEAR
    site.floor.close(now)
    assert again(site).at == now + 2 * YEAR == rows(site)[FLOOR]


def test_nothing_is_asked_of_the_database_on_the_way(site: Site) -> None:
    seen: list[str] = []
    event.listen(site.engine, "before_cursor_execute", lambda _conn, _cursor, text, *_: seen.append(text))
    for wall in (time.time(), 0.0, time.time() + YEAR):
        site.floor.now(wall)
        site.floor.doubt(wall)
    site.floor.raise_to(time.time())
    assert not seen


def test_a_rollback_is_recorded_once_for_each_episode(site: Site) -> None:
    now = time.time()
    site.floor.tick(now)
    site.floor.tick(now - BACK_S + 60)
    assert not events(site, "clock_rollback") and site.floor.doubt(now - BACK_S + 60) == ""
    for back in (YEAR, YEAR - 60, YEAR - 120):
        site.floor.tick(now - back)
        again(site).tick(now - back)  # a restart, or another process of this host
    found = events(site, "clock_rollback")
    assert len(found) == 1 and site.floor.doubt(now - YEAR) == "clock_rollback"
    assert (found[0]["host"], found[0]["floor"]) == (socket.gethostname(), round(now, 3))
    assert found[0]["clock"] == round(now - YEAR, 3) and found[0]["ts"] == round(now, 3)
    site.floor.tick(now + 1)
    site.floor.tick(now - YEAR)
    assert len(events(site, "clock_rollback")) == 2, "the next episode"


def test_it_is_recorded_hourly_while_it_moves(site: Site) -> None:
    now = site.floor.at
    for minute in range(200):
        site.floor.tick(now + 60 * minute)
        if minute % 50 == 0:
            again(site).tick(now + 60 * minute)
    found = [float(str(e["floor"])) for e in events(site, "clock_floor")]
    assert len(found) == 4 and all(b - a >= 3600 for a, b in itertools.pairwise(found))
    for _ in range(3):
        site.floor.tick(now)
    assert len(events(site, "clock_floor")) == 4, "it does not move"


def test_processes_learn_from_each_other(site: Site) -> None:
    other = again(site)
    site.floor.raise_to(time.time() + YEAR)
    site.floor.tick(time.time())
    other.tick(time.time())
    assert other.at == site.floor.at
    other.tick(time.time())
    assert rows(site)[FLOOR] == site.floor.at, "nobody lowers it"


def test_a_lost_state_is_made_again(site: Site) -> None:
    now = time.time()
    for name, seconds in (("leaf", 10.0), ("waits", 20.0), ("signed", 30.0), ("lease", 40.0)):
        lose(site)
        at = now + seconds * DAY
        with site.catalog.writing() as conn:
            if name == "waits":
                conn.execute(insert(t.audit_pending).values({"class": "A", "ts": at, "body": "{}"}))
            elif name == "leaf":
                conn.execute(insert(t.audit_leaf).values({"idx": 0, "leaf_hash": b"x" * 32, "body": "{}", "class": "A", "ts": at}))
            elif name == "signed":
                conn.execute(insert(t.audit_checkpoint).values(size=1, note="", created=at))
            else:
                _lease(conn, at)
        assert again(site).at == at, name
    with site.catalog.writing() as conn:
        conn.execute(insert(t.revocation_list).values(issuer="x", serial=1, iat=now + YEAR, next_update=0, token="", at=0.0))
    assert again(site).at == now + YEAR, "a document, whether the state is lost or not"


def _lease(conn: Connection, at: float) -> None:
    texts = dict.fromkeys(("key_id", "model", "model_digest", "profile_digest", "profile_id", "host"), "x") | {"gpus": "[]"}
    conn.execute(insert(t.lease).values(jti="lease", org_id=ensure_org(conn, "acme", 1.0), serial=1, iat=at, exp=at + 1, **texts))


@pytest.mark.parametrize("waiting", [False, True])
def test_a_lost_state_does_not_believe_a_clock_that_was_ahead(site: Site, waiting: bool) -> None:
    """What was recorded while the clock was ten years ahead is no witness where the log holds the floor itself, or where that waits to enter it."""
    now = site.floor.at + 7200
    site.floor.tick(now)
    if not waiting:
        site.log.settle()
    with site.catalog.writing() as conn:
        call = Call(Principal(key_id="k"), Decision(True, ""), "r", now + 10 * YEAR)
        site.audit.change(conn, call, "something", "")
    if not waiting:
        site.log.settle()
    lose(site)
    assert again(site).at == pytest.approx(now, abs=0.01)
    site.log.settle()
    with site.catalog.writing() as conn:
        conn.execute(update(t.audit_leaf).where(t.audit_leaf.c.event == "clock_floor").values(body=None))
    assert again(site).at == pytest.approx(now + 10 * YEAR, abs=1), "sealed away: the newest time is the only one"


def test_a_new_site_begins_with_its_own_time_and_a_restart_keeps_the_floor(tmp_path: Path) -> None:
    with running_site(tmp_path) as site:
        assert 0 <= time.time() - site.floor.at < DAY
        site.floor.raise_to(time.time() + 5 * DAY)
        at = site.floor.at
    with open_site(Settings.load(site.settings.data, environ={}), background=False) as opened:
        assert opened.floor.at == at
