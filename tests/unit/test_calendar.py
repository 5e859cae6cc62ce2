"""What ends when: which notice is due, the order and pages of items, what is shown to whom, and what stops then; rows on both databases."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import insert, select, update

from artifact.errors import Denied, Invalid
from artifact.grant import date
from registry import tables as t
from registry.calendar import DAY_S, KINDS, MAX_STOPS, THRESHOLDS, Item, behind, cursor, due, figures, page
from registry.catalog import ensure_org
from registry.expiring import Expiring
from registry.library import local_call
from registry.wiring import Site
from tests.site import BACKENDS, call_of, make_key, running_site

NOW = 2_000_000_000.0


@pytest.fixture(params=BACKENDS)
def site(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Site]:
    with running_site(tmp_path, request.param) as opened:
        yield opened


def item(days: float, **more: object) -> Item:
    return Item(**({"kind": "api_key", "id": "key-1", "org": "acme", "ends": NOW + days * DAY_S} | more))  # type: ignore[arg-type]


# ---- pure


@pytest.mark.parametrize(
    ("days", "notice"),
    [(61, None), (60.01, None), (60, 60), (31, 60), (30, 30), (14.5, 30), (14, 14), (7.01, 14), (7, 7), (1.5, 7), (1, 1), (0.01, 1), (0, 0), (-5, 0)],
)
def test_the_threshold_that_is_due(days: float, notice: int | None) -> None:
    assert due(item(days), NOW) == notice
    assert due(item(days, quiet=True), NOW) is None


def test_a_short_life_is_no_news() -> None:
    for life, days, notice in ((90, 59, 60), (50, 40, None), (50, 29, 30), (1, 0.5, None), (1, -0.1, None), (1.5, 0.5, 1), (1.5, -0.1, 0), (8, 7, 7)):
        assert due(item(days, begun=NOW + (days - life) * DAY_S), NOW) == notice, (life, days)


@given(st.floats(-100, 100), st.floats(0, 100))
def test_later_is_never_a_larger_threshold(days: float, later: float) -> None:
    first, then = due(item(days), NOW), due(item(days), NOW + later * DAY_S)
    assert first is None or (then is not None and then <= first)
    assert first is None or first in THRESHOLDS


@given(
    st.lists(st.tuples(st.sampled_from([1.0, 2.5, 1e9 + 1 / 3]), st.sampled_from(KINDS), st.text("abc -", max_size=3)), max_size=30),
    st.integers(1, 7),
)
def test_pages_hold_everything_once(places: list[tuple[float, str, str]], size: int) -> None:
    every = [Item(kind, name, "", ends) for ends, kind, name in set(places)]
    seen: list[Item] = []
    after = ""
    while True:
        part, after = page(every, behind(after), size)
        seen += part
        if not after:
            break
        assert len(part) == size
    assert seen == sorted(every, key=lambda i: i.place)


@pytest.mark.parametrize("text", ["x", "1.0", "nan api_key x", "inf api_key x", "-1 api_key x", "1.0 nothing x", "1e300 lease x", " api_key x"])
def test_a_cursor_of_nobody_is_refused(text: str) -> None:
    with pytest.raises(Invalid):
        behind(text)
    assert behind(cursor(item(1))) == item(1).place


def test_figures_count_what_is_ahead_and_what_ended() -> None:
    found = figures([item(5), item(2), item(-3), item(-4, kind="grant"), item(7, kind="lease")], NOW)
    assert found == {"api_key": (2.0, 1), "grant": (float("inf"), 1), "lease": (7.0, 0)}


def test_what_stops_is_bounded_and_told() -> None:
    found = item(1).with_stops((f"host{i}", "acme/m") for i in range(MAX_STOPS + 5))
    assert len(found.stops) == MAX_STOPS and "5 more stop" in found.notes
    shown = dataclasses.replace(item(1, grace_ends=NOW + 2 * DAY_S), stops=(("n1", "acme/m"), ("", "hf/x"))).as_json(NOW)
    assert shown["stops"] == [{"host": "n1", "model": "acme/m"}, {"model": "hf/x"}]
    assert (shown["ends"], shown["grace_ends"], shown["days"]) == (date(NOW + DAY_S), date(NOW + 2 * DAY_S), 1.0)


# ---- rows


def lease(site: Site, serial: int, host: str, model: str = "acme/m", **more: object) -> None:
    now = time.time()
    with site.catalog.writing() as conn:
        org = ensure_org(conn, str(more.pop("org", "acme")), now)
        texts: dict[str, object] = dict.fromkeys(("model_digest", "profile_digest", "profile_id"), "x") | {"gpus": "[]", "key_id": "k"}
        values = texts | {"jti": f"jti{serial}", "org_id": org, "serial": serial, "host": host, "model": model, "iat": now, "exp": now + 3600} | more
        conn.execute(insert(t.lease).values(values))


def grant(site: Site, org: str, name: str, ends: float, **more: object) -> None:
    with site.catalog.writing() as conn:
        rest = {"models": '["hf/**"]', "actions": '["pull", "run"]', "org_id": ensure_org(conn, org, 1.0), "created": 1.0, "note": "n"}
        conn.execute(insert(t.key_grant).values({"grant_id": name, "expires": ends} | rest | more))


def document(site: Site, org: str, jti: str, serial: int, begins: float, ends: float, *, counts: bool = True) -> None:
    with site.catalog.writing() as conn:
        org_id = ensure_org(conn, org, 1.0)
        rights = {"tier": "enterprise", "models": '["hf/**"]', "actions": '["run"]', "gpus": 8, "issuer": "x", "kid": "y", "token": ""}
        times = {"iat": begins, "not_before": begins, "expires": ends, "grace_s": 86400, "at": begins}
        conn.execute(insert(t.entitlement).values(org_id=org_id, jti=jti, serial=serial, **rights, **times))
        if counts:
            row = select(t.entitlement.c.id).where(t.entitlement.c.jti == jti).scalar_subquery()
            conn.execute(update(t.org).where(t.org.c.id == org_id).values(entitlement_id=row))


def key_ids(site: Site, org: str) -> list[str]:
    with site.catalog.reading() as conn:
        found = select(t.api_key.c.key_id).join(t.org, t.org.c.id == t.api_key.c.org_id).where(t.org.c.name == org).order_by(t.api_key.c.id)
        return list(conn.execute(found).scalars())


def shown(site: Site, key: str | None, days: int = 60, **more: object) -> list[dict[str, object]]:
    desk = site.guard.expiring if key else Expiring(site.engine, site.entitlements, site.audit)
    found = desk.expiring(call_of(site, key) if key else local_call(time.time()), days, **more)["items"]  # type: ignore[arg-type]
    assert isinstance(found, list)
    return found


def lead(site: Site, org: str, *, actions: tuple[str, ...] = ("admin",)) -> str:
    return make_key(site, org, f"{org}/**", actions=actions)


def test_all_kinds_with_what_stops(site: Site) -> None:
    now = time.time()
    make_key(site, "acme", expires=now + 5 * DAY_S)
    mine = key_ids(site, "acme")[0]
    grant(site, "acme", "grant-1", now + 3 * DAY_S, grace_s=86400)
    document(site, "acme", "doc1", 1, now - DAY_S, now + 10 * DAY_S)
    lease(site, 1, "node1", key_id=mine, grant_id="grant-1")
    lease(site, 2, "node2", model="acme/n", key_id=mine, ent_jti="doc1")
    lease(site, 3, "node3", key_id=mine, returned_at=now)
    lease(site, 4, "node4", key_id=mine, exp=now - 1)
    lease(site, 5, "node5", key_id=mine, replaced_by="jti1")
    lease(site, 6, "node6", key_id=mine, revoked_at=now)
    with site.catalog.writing() as conn:
        conn.execute(insert(t.revocation_list).values(issuer="root", serial=4, iat=now, next_update=now + 20 * DAY_S, token="", at=now))
        conn.execute(insert(t.repository).values(repository()))
        conn.execute(insert(t.upstream_record).values(upstream(now)))
    found = {str(i["kind"]): i for i in shown(site, root(site))}
    assert list(found) == ["lease", "grant", "api_key", "entitlement", "revocation_list", "upstream_key", "upstream_subscription"]
    one, two = {"host": "node1", "model": "acme/m"}, {"host": "node2", "model": "acme/n"}
    assert found["api_key"]["stops"] == [one, two] and found["api_key"]["item"] == mine
    assert found["grant"]["stops"] == [one] and found["grant"]["notes"] == "pull,run on hf/** for everybody"
    assert found["grant"]["grace_ends"] == date(now + 4 * DAY_S) and found["grant"]["days"] == pytest.approx(3, abs=0.02)
    assert found["entitlement"]["stops"] == [two] and not found["entitlement"]["quiet"]
    assert found["upstream_key"]["stops"] == [{"model": "hf/acme/m"}] and found["upstream_key"]["org"] == "acme-upstream"
    assert found["lease"]["quiet"] and found["revocation_list"]["item"] == "root"
    leases = [i["name"] for i in shown(site, root(site)) if i["kind"] == "lease"]
    assert sorted(map(str, leases)) == ["node1", "node2"]


def repository() -> dict[str, object]:
    return {"name": "hf/acme/m", "kind": "model", "org_id": None}


def upstream(now: float) -> dict[str, object]:
    facts = {"name": "hf/acme/m", "ref": "main", "digest": "sha256:1", "source": "hf://acme/m", "upstream_org": "acme-upstream", "key_id": "upkey"}
    return facts | {"key_end": now + 30 * DAY_S, "subscription_end": now + 40 * DAY_S, "fetched": now, "at": now}


def root(site: Site) -> str:
    return make_key(site, "site", "**", actions=("admin",))


def test_everybody_sees_their_own(site: Site) -> None:
    now = time.time()
    for org in ("acme", "beta"):
        grant(site, org, f"grant-{org}", now + 3 * DAY_S)
        lease(site, 1 if org == "acme" else 2, org, org=org)
    with site.catalog.writing() as conn:
        conn.execute(insert(t.revocation_list).values(issuer="root", serial=4, iat=now, next_update=now + 20 * DAY_S, token="", at=now))
        conn.execute(insert(t.repository).values(repository()))
        conn.execute(insert(t.upstream_record).values(upstream(now)))
    own = [("lease", "acme"), ("grant", "acme")]
    for actions in (("admin",), ("auditor",)):
        key = lead(site, "acme", actions=actions)
        assert [(i["kind"], i["org"]) for i in shown(site, key)] == own, "neither another's nor the site's"
        assert [(i["kind"], i["org"]) for i in shown(site, key, org="acme")] == own
        with pytest.raises(Denied):
            shown(site, key, org="beta")
    reader = make_key(site, "acme", "acme/**", actions=("pull", "run"))
    with pytest.raises(Denied):
        shown(site, reader)
    every = shown(site, root(site))
    assert {i["org"] for i in every} == {"acme", "beta", "", "acme-upstream"}
    assert [i["item"] for i in every] == [i["item"] for i in shown(site, None)]
    assert [(i["kind"], i["org"]) for i in shown(site, root(site), org="beta")] == [("lease", "beta"), ("grant", "beta")]


def test_what_is_over_or_does_not_count_is_left_out(site: Site) -> None:
    now = time.time()
    soon, living = now + DAY_S, make_key(site, "acme", expires=now + 2 * DAY_S)
    ids = key_ids(site, "acme")
    grant(site, "acme", "grant-revoked", soon, revoked_at=now)
    grant(site, "acme", "grant-long-over", now - 40 * DAY_S)
    grant(site, "acme", "grant-in-grace", now - 40 * DAY_S, grace_s=50 * 86400)
    grant(site, "acme", "grant-over", now - DAY_S)
    grant(site, "acme", "grant-far", now + 90 * DAY_S)
    grant(site, "acme", "grant-never", 0.0)
    make_key(site, "closed", expires=soon)
    document(site, "closed", "doc-closed", 1, now, soon)
    document(site, "acme", "doc-old", 1, now - 9, soon)
    document(site, "acme", "doc-new", 2, now - 5, now + 20 * DAY_S)
    document(site, "acme", "doc-next", 3, now + 10 * DAY_S, now + 300 * DAY_S, counts=False)
    with site.catalog.writing() as conn:
        conn.execute(update(t.org).where(t.org.c.name == "closed").values(closed_at=now))
    found = {str(i["item"]): i for i in shown(site, None)}
    assert set(found) == {ids[0], "grant-in-grace", "grant-over", "doc-new"} and living
    assert found["doc-new"]["quiet"] and "follows" in str(found["doc-new"]["notes"]), "its successor begins in time"
    assert set(map(str, (i["item"] for i in shown(site, None, days=365)))) == {*found, "grant-far"}
    new = site.guard.issuance.rotate_key(call_of(site, root(site)), {"key_id": ids[0], "overlap": "1h"})
    again = {str(i["item"]): i for i in shown(site, None)}
    assert again[ids[0]]["quiet"] and str(new["key_id"]) in str(again[ids[0]]["notes"])
    assert not again[str(new["key_id"])]["quiet"]


def test_pages_over_the_rows(site: Site) -> None:
    now = round(time.time())
    for n in range(23):
        grant(site, "acme", f"grant-{n:02}", now + (n % 3) * DAY_S + 3600.25)
        lease(site, n + 1, f"node{n}", exp=now + 3600.25)
    key = root(site)
    every = shown(site, key, limit=1000)
    seen: list[dict[str, object]] = []
    after = ""
    while True:
        answer = site.guard.expiring.expiring(call_of(site, key), 60, "", after, 5)
        assert isinstance(answer["items"], list)
        seen += answer["items"]
        after = str(answer["after"])
        if not after:
            break
    assert [i["item"] for i in seen] == [i["item"] for i in every] and len(seen) == 46
    assert json.dumps(seen)
