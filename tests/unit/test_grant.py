"""The pure decision as a table, and its properties: nothing that takes a right away, and no other name, ever widens it."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from artifact.grant import (
    ACTIONS,
    PARTS,
    TIERS,
    Access,
    Grant,
    Principal,
    Subject,
    authenticate,
    date,
    decide,
    includes,
    matches,
    model_of,
    scoped,
    visible,
)

NOW = 1_000_000.0
ACME = Principal("key-1", "acme", "developer", grants=(Grant(("acme/*",)),))
TINY = Subject("acme/tiny", "acme")
BETA = Subject("beta/tiny", "beta")
PUBLIC = Subject("hf/meta/llama", "", "public")


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ("acme/*", "acme/tiny", True),
        ("acme/*", "acme/tiny/profiles", True),  # decided as the model
        ("acme/*", "acme/a/b", False),
        ("acme/*", "acme", False),
        ("acme/*", "acmeco/tiny", False),
        ("acme/*", "xacme/tiny", False),
        ("acme/**", "acme/a/b/c", True),
        ("acme/**", "acme/a", True),
        ("acme/**", "acme", False),
        ("**", "acme/a", True),
        ("*", "acme/a", False),
        ("*", "tiny", True),
        ("acme/tiny-*", "acme/tiny-8b", True),
        ("acme/tiny-*", "acme/tiny", False),
        ("acme/*-8b", "acme/tiny-8b", True),
        ("acme/a*b*c", "acme/axbxc", True),
        ("acme/a*b*c", "acme/axcxb", False),
        ("acme/ab*ba", "acme/aba", False),  # the two ends must not share letters
        ("acme/tiny", "acme/tiny", True),
        ("acme/tiny", "acme/tiny2", False),
        ("acme/tiny/profiles", "acme/tiny", False),
        ("*/tiny", "acme/tiny", True),
        ("acme/t.ny", "acme/tiny", False),
        ("", "acme/tiny", False),
    ],
)
def test_patterns(pattern: str, name: str, expected: bool) -> None:
    assert matches(pattern, name) is expected


def test_model_of() -> None:
    assert [model_of(n) for n in ("acme/tiny", "acme/tiny/profiles", "acme/profiles-x")] == ["acme/tiny", "acme/tiny", "acme/profiles-x"]


@pytest.mark.parametrize(
    ("principal", "subject", "action", "allow", "reason", "seen"),
    [
        (ACME, TINY, "pull", True, "ok", True),
        (ACME, TINY, "run", True, "ok", True),
        (ACME, TINY, "push", False, "action_missing", True),
        (ACME, TINY, "admin", False, "action_missing", True),
        (ACME, Subject("acme/tiny/profiles", "acme"), "pull", True, "ok", True),
        (ACME, BETA, "pull", False, "not_visible", False),
        (ACME, PUBLIC, "pull", False, "no_grant", True),
        (ACME, Subject("acme/a/b", "acme"), "pull", False, "no_grant", True),
        (replace(ACME, grants=()), TINY, "pull", False, "no_grant", True),
        (replace(ACME, grants=(Grant(("**",)),)), BETA, "pull", False, "not_visible", False),  # a grant crosses no organisation
        (replace(ACME, grants=(Grant(("hf/**",)),)), PUBLIC, "pull", True, "ok", True),
        (ACME, replace(TINY, visibility="private"), "pull", True, "ok", True),  # the grant covers it
        (replace(ACME, grants=()), replace(TINY, visibility="private"), "pull", False, "not_visible", False),
        (ACME, replace(TINY, requires_tier="enterprise"), "pull", False, "tier_missing", True),
        (replace(ACME, tier="enterprise"), replace(TINY, requires_tier="enterprise"), "pull", True, "ok", True),
        (replace(ACME, grants=(Grant(("acme/*",), ("admin",)),)), TINY, "push", True, "ok", True),
        (replace(ACME, grants=(Grant(("acme/*",), not_before=NOW + 1),)), TINY, "pull", False, "grant_not_yet", True),
        (replace(ACME, grants=(Grant(("acme/*",), not_before=NOW),)), TINY, "pull", True, "ok", True),
        (replace(ACME, grants=(Grant(("acme/*",), expires=NOW),)), TINY, "pull", False, "grant_expired", True),
        (replace(ACME, grants=(Grant(("acme/*",), expires=NOW + 1),)), TINY, "pull", True, "ok", True),
        (replace(ACME, grants=(Grant(("acme/*",), expires=NOW, grace_s=10),)), TINY, "pull", True, "grace", True),
        (replace(ACME, grants=(Grant(("acme/*",), expires=NOW - 10, grace_s=10),)), TINY, "pull", False, "grant_expired", True),
        (replace(ACME, expires=NOW), TINY, "pull", False, "key_expired", False),
        (replace(ACME, expires=NOW + 1), TINY, "pull", True, "ok", True),
        (replace(ACME, revoked_at=NOW), TINY, "pull", False, "key_revoked", False),
        (replace(ACME, revoked_at=NOW + 1), TINY, "pull", False, "key_revoked", False),  # by a clock that was ahead
        (replace(ACME, revoked_at=NOW - 5, expires=NOW - 9), TINY, "pull", False, "key_revoked", False),
        (replace(ACME, grants=(Grant(("acme/*",), ("push",)),)), TINY, "create", True, "ok", True),
        (replace(ACME, grants=(Grant(("acme/*",), ("push",)),)), TINY, "delete", True, "ok", True),
        (replace(ACME, grants=(Grant(("acme/*",), ("push",)),)), TINY, "pull", False, "action_missing", True),
        (replace(ACME, grants=(Grant(("acme/*",), ("create",)),)), TINY, "create", True, "ok", True),
        (replace(ACME, grants=(Grant(("acme/*",), ("create",)),)), TINY, "push", False, "action_missing", True),
        (replace(ACME, grants=(Grant(("acme/*",), ("create",)),)), TINY, "delete", False, "action_missing", True),
        (replace(ACME, grants=(Grant(("acme/x",), ("auditor",)),)), TINY, "auditor", True, "ok", True),
        (replace(ACME, grants=(Grant(("acme/x",), ("auditor",)),)), replace(TINY, visibility="private"), "auditor", True, "ok", True),
        (replace(ACME, grants=(Grant(("acme/x",), ("auditor",)),)), TINY, "pull", False, "no_grant", True),
        (replace(ACME, grants=(Grant(("acme/*",), ("auditor",)),)), TINY, "pull", False, "action_missing", True),
        (replace(ACME, grants=(Grant(("**",), ("auditor",)),)), BETA, "auditor", False, "not_visible", False),
        (replace(ACME, grants=(Grant(("**",), ("auditor",)),)), PUBLIC, "auditor", True, "ok", True),
        (replace(ACME, grants=(Grant(("acme/*",), ("create",)),)), TINY, "stat", True, "ok", True),
        (replace(ACME, grants=(Grant(("acme/*",), ("auditor",)),)), TINY, "stat", False, "action_missing", True),
        (replace(ACME, grants=(Grant(("acme/*",), ("auditor",)),)), replace(TINY, requires_tier="enterprise"), "list", True, "ok", True),
        (ACME, replace(TINY, requires_tier="enterprise"), "list", False, "tier_missing", True),
        (replace(ACME, grants=(Grant(("acme/*",), ("run",)),)), TINY, "list", False, "action_missing", True),
        (Principal(anonymous=True), PUBLIC, "list", True, "ok", True),
        (Principal(anonymous=True), PUBLIC, "pull", True, "ok", True),
        (Principal(anonymous=True), PUBLIC, "push", False, "key_absent", False),
        (Principal(anonymous=True), PUBLIC, "run", False, "key_absent", False),
        (Principal(anonymous=True), TINY, "pull", False, "key_absent", False),
        (Principal(anonymous=True), replace(PUBLIC, requires_tier="enterprise"), "pull", False, "key_absent", False),
        (Principal(), TINY, "pull", False, "key_absent", False),
        (Principal(), PUBLIC, "pull", False, "key_absent", False),
        (Principal(grants=(Grant(("**",)),), org="acme"), TINY, "pull", False, "key_absent", False),
    ],
)
def test_decisions(principal: Principal, subject: Subject, action: str, allow: bool, reason: str, seen: bool) -> None:
    found = decide(principal, subject, action, NOW)
    assert (found.allow, found.reason, found.visible) == (allow, reason, seen)
    assert found.allow or (found.words and found.remedy), "a refusal says what was wrong and what to do"


def test_grace_warns() -> None:
    found = decide(replace(ACME, grants=(Grant(("acme/*",), expires=NOW - 1, grace_s=10),)), TINY, "run", NOW)
    assert found.allow and date(NOW - 1) in found.warning and date(NOW + 9) in found.warning


def test_dead_keys_say_when() -> None:
    assert date(NOW - 5) in authenticate(replace(ACME, expires=NOW - 5), NOW).words
    assert date(NOW - 5) in authenticate(replace(ACME, revoked_at=NOW - 5), NOW).words


def test_a_token_cuts_down_and_never_adds() -> None:
    wide = replace(ACME, grants=(Grant(("acme/*",), ("pull", "push", "run")),))
    cut = replace(wide, access=(Access("repository", "acme/tiny", ("pull",)),))
    assert decide(cut, TINY, "pull", NOW).allow
    for action in ("push", "create", "delete", "run", "admin"):
        assert not decide(cut, TINY, action, NOW).allow
    assert decide(cut, TINY, "push", NOW).reason == decide(cut, Subject("acme/tiny2", "acme"), "pull", NOW).reason == "insufficient_scope"
    assert decide(cut, Subject("acme/tiny/profiles", "acme"), "pull", NOW).reason == "insufficient_scope", "a scope names one repository"
    assert decide(cut, BETA, "pull", NOW).reason == "not_visible", "the words are those of the key"
    assert decide(replace(cut, access=()), TINY, "pull", NOW).reason == "insufficient_scope"
    assert decide(replace(ACME, access=(Access("repository", "acme/tiny", ("pull", "push", "*")),)), TINY, "push", NOW).reason == "action_missing"
    assert decide(replace(cut, access=(Access("registry", "acme/tiny", ("pull",)),)), TINY, "pull", NOW).reason == "insufficient_scope"
    assert not scoped(cut, "registry", "catalog", "catalog") and scoped(wide, "registry", "catalog", "catalog")


segments = st.sampled_from(["acme", "beta", "hf", "tiny", "tiny-8b", "a", "profiles", "x1"])
names = st.lists(segments, min_size=1, max_size=4).map("/".join)
patterns = st.lists(st.sampled_from(["acme", "beta", "*", "t*", "*y", "tiny", "t*-*b", "x1"]), min_size=1, max_size=3).flatmap(
    lambda parts: st.sampled_from(["/".join(parts), "/".join([*parts, "**"])])
)
times = st.sampled_from([0.0, NOW - 100, NOW - 1, NOW, NOW + 1, NOW + 100])
grants = st.builds(
    Grant,
    st.lists(patterns, max_size=3).map(tuple),
    st.lists(st.sampled_from(ACTIONS), unique=True).map(tuple),
    times,
    times,
    st.sampled_from([0, 1, 50, 1000]),
)
orgs = st.sampled_from(["", "acme", "beta"])
principals = st.builds(
    Principal, st.sampled_from(["", "key-1"]), orgs, st.sampled_from(["", *TIERS]), times, times, st.lists(grants, max_size=3).map(tuple)
)
subjects = st.builds(Subject, names, orgs, st.sampled_from(["public", "org", "private"]), st.sampled_from(["", "enterprise"]))
actions = st.sampled_from((*ACTIONS, "delete", "stat", "list"))


def denials(p: Principal, s: Subject) -> list[tuple[Principal, Subject]]:
    """Everything that takes something away from a case: from the key, from one grant, or by a stricter subject."""
    out = [
        (replace(p, revoked_at=NOW), s),
        (replace(p, expires=NOW), s),
        (replace(p, key_id=""), s),
        (replace(p, tier=""), s),
        (p, replace(s, requires_tier="enterprise")),
        (p, replace(s, visibility="private")),
    ]
    for i, grant in enumerate(p.grants):
        rest = p.grants[:i], p.grants[i + 1 :]
        out.append((replace(p, grants=(*rest[0], *rest[1])), s))
        for j in range(len(grant.models)):
            out.append((replace(p, grants=(*rest[0], replace(grant, models=grant.models[:j] + grant.models[j + 1 :]), *rest[1])), s))
        for action in grant.actions:
            out.append((replace(p, grants=(*rest[0], replace(grant, actions=tuple(a for a in grant.actions if a != action)), *rest[1])), s))
        out.append((replace(p, grants=(*rest[0], replace(grant, not_before=NOW + 1), *rest[1])), s))
        out.append((replace(p, grants=(*rest[0], replace(grant, expires=1.0, grace_s=0), *rest[1])), s))
    return out


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(principals, subjects, actions)
def test_adding_a_denial_never_widens(p: Principal, s: Subject, action: str) -> None:
    before = decide(p, s, action, NOW)
    for less, stricter in denials(p, s):
        after = decide(less, stricter, action, NOW)
        assert before.allow or not after.allow, (less, stricter)
        assert visible(p, s) or not visible(less, stricter), (less, stricter)


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(principals, subjects, names, actions)
def test_renaming_never_widens_beyond_the_patterns(p: Principal, s: Subject, name: str, action: str) -> None:
    after = decide(p, replace(s, name=name), action, NOW)
    covered = [g for g in p.grants if any(matches(pattern, name) for pattern in g.models)]
    if action in ("auditor", "list") and s.org and s.org == p.org:
        return  # an auditor lists its own organisation whole, whatever the patterns
    if after.allow:
        assert any(includes(g.actions, part) for g in covered for part in PARTS.get(action, (action,))), (
            "allowed under a name that no grant of that action covers"
        )
    if not covered:
        assert not after.allow


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(principals, names.filter(lambda n: not n.endswith("/profiles") and n != "profiles"), orgs, actions)
def test_a_profile_manifest_is_decided_as_its_model(p: Principal, name: str, org: str, action: str) -> None:
    model, beside = (decide(p, Subject(n, org), action, NOW) for n in (name, name + "/profiles"))
    assert (model.allow, model.reason, model.visible) == (beside.allow, beside.reason, beside.visible)


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(principals, subjects, actions)
def test_a_yes_is_complete(p: Principal, s: Subject, action: str) -> None:
    found = decide(p, s, action, NOW)
    if found.allow:
        assert p.key_id and authenticate(p, NOW).allow and visible(p, s)
        assert s.requires_tier in ("", p.tier) or action in ("auditor", "list")
    if not found.visible:
        assert not found.allow
    if s.org and p.org != s.org and s.visibility != "public":
        assert not found.allow, "another organisation's content"


@settings(max_examples=150, deadline=None)
@given(patterns, names)
def test_a_pattern_without_stars_is_equality(pattern: str, name: str) -> None:
    if "*" not in pattern:
        assert matches(pattern, name) == (pattern == model_of(name))


def test_an_allowed_decision_says_until_when() -> None:
    subject = Subject("acme/m", "acme")

    def until(*grants: Grant) -> float:
        decision = decide(Principal("k", "acme", "developer", grants=grants), subject, "run", 100.0)
        assert decision.allow
        return decision.until

    assert until(Grant(("acme/*",))) == 0.0
    assert until(Grant(("acme/*",), expires=200.0, grace_s=50)) == 250.0
    assert until(Grant(("acme/*",), expires=90.0, grace_s=50)) == 140.0
    assert until(Grant(("acme/*",), expires=200.0), Grant(("acme/*",))) == 0.0
