"""Handing on rights: nobody gives more than it has, however the wish is written (attacks.md A16)."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from artifact.grant import Access, Grant, Principal, matches
from registry.delegation import above, covers, latest, office, wider

NOW = 1_000_000.0
ADMIN = Grant(("acme/**",), ("admin",))
READ = Grant(("hf/meta/*",), ("pull", "run"), expires=NOW + 1000, gpus=8, profiles=("tp1",))
LEADER = Principal("key-1", "acme", "developer", NOW + 5000, grants=(ADMIN, READ))
SITE = Principal("key-2", "site", "enterprise", grants=(Grant(("**",), ("admin",)),))


@pytest.mark.parametrize(
    ("own", "wish", "covered"),
    [
        ("acme/**", "acme/m", True),
        ("acme/**", "acme/a/b", True),
        ("acme/**", "acme/*", True),
        ("acme/**", "acme/**", True),
        ("acme/**", "acme/a/**", True),
        ("acme/**", "acme", False),
        ("acme/**", "*/m", False),
        ("acme/**", "**", False),
        ("acme/**", "acme2/m", False),
        ("acme/**", "ac*/m", False),
        ("acme/*", "acme/**", False),
        ("acme/*", "acme/a/b", False),
        ("acme/a*", "acme/ab", True),
        ("acme/a*", "acme/ab*", False),
        ("acme/*", "acme/ab*", True),
        ("**", "**", True),
        ("**", "a/b", True),
        ("*", "**", False),
        ("*/**", "**", False),
    ],
)
def test_patterns(own: str, wish: str, covered: bool) -> None:
    assert covers(own, wish) == covered


SEGMENT = st.text("ab*", min_size=1, max_size=3).filter(lambda s: "**" not in s)
PATTERN = st.builds(lambda parts, rest: "/".join(parts + rest), st.lists(SEGMENT, min_size=1, max_size=3), st.sampled_from([[], ["**"]]))
NAME = st.lists(st.text("ab", min_size=1, max_size=3), min_size=1, max_size=4).map("/".join)


@given(PATTERN, PATTERN, NAME)
def test_what_is_covered_matches_no_name_that_the_own_pattern_does_not(own: str, wish: str, name: str) -> None:
    if covers(own, wish) and matches(wish, name):
        assert matches(own, name)


def test_offices() -> None:
    assert office(SITE, NOW).site
    held = office(LEADER, NOW)
    assert (held.site, held.administers, held.audits) == (False, "acme", "acme")
    looker = replace(LEADER, grants=(Grant(("acme/**",), ("auditor",)),))
    assert (office(looker, NOW).administers, office(looker, NOW).audits) == ("", "acme")


@pytest.mark.parametrize(
    "principal",
    [
        Principal(),
        replace(SITE, access=(Access("repository", "acme/m", ("pull",)),)),  # a token
        replace(SITE, grants=(Grant(("**",), ("push", "pull", "run", "create")),)),
        replace(SITE, grants=(Grant(("*/**", "*", "acme/**", "every.name/**"), ("admin",)),)),
        replace(SITE, grants=(Grant(("**",), ("admin",), not_before=NOW + 1),)),
        replace(SITE, grants=(Grant(("**",), ("admin",), expires=NOW - 1, grace_s=1000),)),
    ],
)
def test_no_office_of_the_site(principal: Principal) -> None:
    assert not office(principal, NOW).site


@pytest.mark.parametrize("models", [("acme/*",), ("acme/a/**",), ("other/**",), ("acme",)])
def test_no_office_of_an_organisation_for_less_than_all_of_it(models: tuple[str, ...]) -> None:
    assert not office(replace(LEADER, grants=(Grant(models, ("admin",)),)), NOW).administers


FITS = [
    (Grant(("acme/m", "acme/**"), ("pull", "push", "create", "run", "admin", "auditor"), expires=NOW + 4000), 0.0),
    (Grant(("acme/m",), ("pull",)), NOW + 5000),  # the key's end bounds it
    (Grant(("hf/meta/llama",), ("pull",), expires=NOW + 1000, gpus=8, profiles=("tp1",)), 0.0),
    (Grant(("hf/meta/llama",), ("run",), gpus=1, profiles=("tp1",)), NOW + 900),
]


@pytest.mark.parametrize(("wish", "ends"), FITS)
def test_what_an_administrator_may_hand_on(wish: Grant, ends: float) -> None:
    assert wider(LEADER, wish, NOW, ends) == ""


INSIDE = Grant(("hf/meta/llama",), ("pull",), expires=NOW + 1000, gpus=8, profiles=("tp1",))


@pytest.mark.parametrize(
    "wish",
    [
        replace(INSIDE, models=("**",)),
        replace(INSIDE, models=("*/meta/llama",)),
        replace(INSIDE, models=("hf/meta/**",)),
        replace(INSIDE, models=("hf/other/llama",)),
        replace(INSIDE, models=("hf/meta/llama", "other/m")),
        replace(INSIDE, actions=("push",)),
        replace(INSIDE, actions=("pull", "admin")),
        replace(INSIDE, expires=0.0),
        replace(INSIDE, expires=NOW + 1001),
        replace(INSIDE, grace_s=1),
        replace(INSIDE, gpus=0),
        replace(INSIDE, gpus=9),
        replace(INSIDE, profiles=()),
        replace(INSIDE, profiles=("tp1", "tp8")),
        replace(INSIDE, environment="dev"),
        Grant(("acme/m",), ("pull",)),  # for ever, and the caller's key ends
        Grant(("acme/m",), ("pull",), expires=NOW + 5001),
        Grant(("other/m",), ("auditor",), expires=NOW + 10),
    ],
)
def test_what_it_may_not(wish: Grant) -> None:
    assert wider(LEADER, wish, NOW) != ""


def test_two_grants_do_not_add_up() -> None:
    """One gives the action and the other the time: together they are no right to both."""
    both = replace(LEADER, expires=0.0, grants=(Grant(("a/**",), ("pull",), expires=NOW + 10), Grant(("a/**",), ("push",))))
    assert wider(both, Grant(("a/m",), ("pull",)), NOW) and not wider(both, Grant(("a/m",), ("push",)), NOW)
    assert wider(both, Grant(("a/m",), ("pull", "push")), NOW)


@pytest.mark.parametrize(("tier", "ends", "fits"), [("developer", NOW + 5000, True), ("developer", NOW + 5001, False), ("developer", 0.0, False)])
def test_keys_end_with_their_author_at_the_latest(tier: str, ends: float, fits: bool) -> None:
    assert (above(LEADER, tier, ends) == "") == fits


def test_no_higher_tier() -> None:
    assert above(LEADER, "enterprise", NOW + 1) and not above(SITE, "enterprise", 0.0) and above(replace(LEADER, tier=""), "developer", NOW + 1)


def test_a_role_ends_with_its_author() -> None:
    assert latest(LEADER, NOW) == NOW + 5000
    assert latest(replace(LEADER, expires=0.0), NOW) == 0.0
    assert latest(replace(LEADER, grants=(replace(ADMIN, expires=NOW + 7),)), NOW) == NOW + 7


WISH = st.builds(
    Grant,
    st.lists(PATTERN, min_size=1, max_size=2).map(tuple),
    st.lists(st.sampled_from(["pull", "push", "run", "admin"]), min_size=1, max_size=2).map(tuple),
    expires=st.sampled_from([0.0, NOW + 10, NOW + 20]),
    gpus=st.sampled_from([0, 1, 2]),
    environment=st.sampled_from(["", "dev"]),
)


@given(st.lists(WISH, max_size=3).map(tuple), WISH, NAME)
def test_nothing_that_is_not_wider_gives_a_name_or_action_more(own: tuple[Grant, ...], wish: Grant, name: str) -> None:
    who = Principal("key-1", "a", "developer", grants=own)
    if wider(who, wish, NOW) == "" and any(matches(p, name) for p in wish.models):
        for action in wish.actions:
            best = [g for g in own if any(matches(p, name) for p in g.models) and (action in g.actions or "admin" in g.actions)]
            assert any((not g.expires or 0 < wish.expires <= g.expires) and (not g.gpus or 0 < wish.gpus <= g.gpus) for g in best)
