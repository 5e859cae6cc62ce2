"""Who comes in and how: networks that get bytes streamed, failed logins counted within bounds, and what the entrance costs."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import event

from artifact.errors import Invalid, Throttled, Unauthenticated
from artifact.grant import Access, Principal
from registry.admission import Admission, Policy
from registry.entitlements import new_key
from registry.lookup import Lookup
from registry.pace import Pace
from registry.tokens import parse_scopes
from registry.wiring import Site
from tests.site import BACKENDS, call_of, make_key, push_model, running_site

NOW = 2_000_000_000.0  # ahead of any floor


@pytest.fixture(params=BACKENDS)
def site(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Site]:
    with running_site(tmp_path, request.param) as opened:
        yield opened


def admission(site: Site, **policy: object) -> Admission:
    return Admission(site.entitlements, Lookup(site.engine), site.audit, site.home, replace(Policy(), **policy), site.floor)  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("redirect", "networks", "address", "expected"),
    [
        (True, (), "10.1.2.3", True),
        (True, (), "", True),
        (False, (), "10.1.2.3", False),
        (False, ("10.0.0.0/8",), "192.0.2.1", False),
        (True, ("10.0.0.0/8",), "10.1.2.3", False),
        (True, ("10.0.0.0/8",), "11.1.2.3", True),
        (True, ("10.0.0.0/8",), "::ffff:10.1.2.3", False),
        (True, ("10.0.0.0/8", "fd00::/8"), "fd00::1", False),
        (True, ("10.0.0.0/8", "fd00::/8"), "fe80::1", True),
        (True, ("10.1.2.3",), "10.1.2.3", False),
        (True, ("10.0.0.0/8",), "", False),
        (True, ("10.0.0.0/8",), "unix", False),
    ],
)
def test_who_may_be_sent_to_the_store(site: Site, redirect: bool, networks: tuple[str, ...], address: str, expected: bool) -> None:
    call = admission(site, redirect=redirect, stream_to=networks).caller(make_key(site, "acme"), "r", NOW, address)
    assert call.redirect is expected


@pytest.mark.parametrize("wrong", ["10.0.0.1/8", "x", "10.0.0.0/33", ""])
def test_a_network_that_is_none_is_told_at_the_start(site: Site, wrong: str) -> None:
    with pytest.raises(Invalid):
        admission(site, stream_to=(wrong,))


def test_a_token_costs_what_its_key_costs(site: Site) -> None:
    key = make_key(site, "acme")
    seen: list[str] = []
    event.listen(site.engine, "before_cursor_execute", lambda _c, _cur, text, *_: seen.append(text))
    call = call_of(site, key)
    assert len(seen) == 1
    token = site.guard.token(call, parse_scopes(["repository:acme/x:pull"]))[0]
    seen.clear()
    cut = call_of(site, token)
    assert len(seen) == 1 and cut.principal.key_id == call.principal.key_id and cut.principal.access is not None
    seen.clear()
    for wrong in ("nvapi-x", token[:-1] + ("A" if token[-1] != "A" else "B"), "", "alt1."):
        with pytest.raises(Unauthenticated):
            site.guard.caller(wrong, "r", time.time(), "10.0.0.1")
    assert [s for s in seen if s.startswith("SELECT")] == [], "what cannot be a key or token of ours costs no lookup"


def test_a_token_opens_an_alias_as_what_it_stands_for_now(site: Site) -> None:
    from registry import tables as t

    key = make_key(site, "acme")
    push_model(site, call_of(site, key), "acme/tiny", "1")
    with site.catalog.writing() as conn:
        repo = site.catalog.repository("acme/tiny")
        assert repo is not None
        conn.execute(t.alias.insert().values(name="acme/old", repo_id=repo.id))
    token, given_, _ = site.guard.token(call_of(site, key), parse_scopes(["repository:acme/old:pull"]))
    assert given_ == (Access("repository", "acme/tiny", ("pull", "list")),)
    for name in ("acme/old", "acme/tiny"):
        assert site.guard.resolve(call_of(site, token), name, "1").size


def test_nobody_is_somebody_only_where_the_site_says_so(site: Site) -> None:
    open_, closed = admission(site, anonymous=True), admission(site)
    assert open_.caller(None, "r", NOW, "").principal == Principal(anonymous=True)
    for door, text in ((closed, None), (closed, ""), (open_, "")):
        with pytest.raises(Unauthenticated) as caught:
            door.caller(text, "r", NOW, "10.0.0.1")
        assert caught.value.reason == "key_absent"
    for wrong in ("x", new_key()):
        with pytest.raises(Unauthenticated) as caught:
            open_.caller(wrong, "r", NOW, "10.0.0.1")
        assert caught.value.reason == "key_invalid"
    token, life = open_.sign(open_.nobody("r", NOW), ())
    assert life == 600 and open_.caller(token, "r", NOW, "").principal == Principal(access=(), anonymous=True)
    with pytest.raises(Unauthenticated) as caught:
        closed.caller(token, "r", NOW, "")
    assert caught.value.reason == "insufficient_scope", "a token that was made before the setting was taken back"


def test_guesses_are_slowed_by_network(site: Site) -> None:
    door, key = admission(site), make_key(site, "acme")
    told: list[type[Exception]] = []
    for _ in range(400):
        with pytest.raises((Unauthenticated, Throttled)) as caught:
            door.caller("nvapi-x", "r", NOW, "10.0.0.9")
        told.append(type(caught.value))
    assert told == [Unauthenticated] * 300 + [Throttled] * 100
    assert door.caller(key, "r", NOW, "10.0.0.9").principal.key_id, "never a valid key"
    with pytest.raises(Unauthenticated):
        door.caller(None, "r", NOW, "10.0.0.9")
    with pytest.raises(Unauthenticated):
        door.caller("nvapi-x", "r", NOW, "10.0.1.9")
    with pytest.raises(Unauthenticated):
        door.caller("nvapi-x", "r", NOW + 61, "10.0.0.9")


def test_counts_of_failed_logins() -> None:
    seen = Pace(allowed=2, window_s=10, most=3)
    assert [seen.wait_s("a", at) for at in (0, 1, 2, 9.9, 10, 11, 12)] == [0, 0, 8, 1, 0, 0, 8]
    assert [seen.wait_s("a", 3)] == [0], "a clock that was set back starts anew"
    for other in "bc":
        assert seen.wait_s(other, 12) == 0
    assert [seen.wait_s("d", 12) for _ in range(9)] == [0] * 9, "full: not counted, never refused"
    assert [seen.wait_s("d", 40) for _ in range(3)] == [0, 0, 10], "room again"


@given(st.lists(st.tuples(st.sampled_from("abcd"), st.floats(0, 100)), max_size=200))
def test_counts_are_bounded(events: list[tuple[str, float]]) -> None:
    seen = Pace(allowed=3, window_s=10, most=2)
    for network, at in events:
        assert 0 <= seen.wait_s(network, at) <= 10
        assert len(seen._seen) <= 2
