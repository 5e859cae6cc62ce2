"""Nothing that takes away, no later hour and no other name ever widens a decision; each property is also shown to catch a decision that is wrong.

The wrong ones (`weak_…`) are mistakes that are easily made; a property that finds none of them in as many examples would prove nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from artifact.grant import (
    ACTIONS,
    PARTS,
    TIERS,
    Decision,
    Entitlement,
    GpuBounds,
    Grant,
    Lease,
    Principal,
    Subject,
    decide,
    decide_gpus,
    decide_lease,
    model_of,
)

NOW = 1_000_000.0
Decide = Callable[[Principal, Subject, str, float], Decision]
Case = tuple[Principal, Subject, str]

texts = st.sampled_from
NAMES = ("acme/tiny", "acme/tiny/profiles", "acme-x/tiny", "nim/meta/llama", "nim/meta/llama-8b", "hf/meta/llama", "beta/tiny")
PATTERNS = ("acme/*", "acme/tiny", "**", "nim/**", "nim/meta/*", "nim/meta/llama", "hf/**", "*/tiny", "nim/google/*")
ENDS = (NOW - 100, NOW - 1, NOW, NOW + 1, NOW + 100)


def some(values: tuple[str, ...], least: int = 0) -> st.SearchStrategy[tuple[str, ...]]:
    return st.lists(texts(values), min_size=least, max_size=3, unique=True).map(tuple)


grants = st.builds(
    Grant,
    some(PATTERNS, 1),
    st.one_of(st.just(("pull", "run")), some(ACTIONS)),
    texts((0.0, *ENDS)),
    texts((0.0, *ENDS)),
    texts((0, 50)),
    st.just("grant"),
    texts(("", "dev", "production")),
    texts((0, 2)),
)
documents = st.builds(
    Entitlement,
    st.just("doc"),
    st.just(1),
    texts(("", *TIERS)),
    some(PATTERNS, 1),
    st.one_of(st.just(("pull", "run")), some(ACTIONS)),
    texts((0.0, NOW - 100, NOW + 1)),
    texts(ENDS),
    texts((0, 50)),
    texts((0, 4)),
    some(("p1", "p2")),
    some(("dev", "production")),
    texts((0.0, 0.0, NOW)),
)
principals = st.builds(
    Principal,
    st.just("key-1"),
    texts(("acme", "acme", "beta")),
    texts(("developer", "enterprise", "enterprise")),
    texts((0.0, *ENDS)),
    texts((0.0, 0.0, NOW + 50)),
    st.lists(grants, min_size=1, max_size=3).map(tuple),
    entitlement=st.one_of(st.none(), documents),
    entitled_only=st.booleans(),
)
subjects = st.builds(
    Subject, texts(NAMES), texts(("", "", "acme")), texts(("public", "org")), texts(("", "", "developer", "enterprise")), texts(("", "", "p1"))
)
cases = st.tuples(principals, subjects, texts(("pull", "pull", "run", "run", *ACTIONS, "delete", "stat", "list")))


def less(grant: Grant) -> list[Grant]:
    """Everything that one grant can lose."""
    out = [replace(grant, models=tuple(m for m in grant.models if m != gone)) for gone in grant.models]
    out += [replace(grant, actions=tuple(a for a in grant.actions if a != gone)) for gone in grant.actions]
    out += [replace(grant, models=tuple("nim/meta/llama" if m == wide else m for m in grant.models)) for wide in ("nim/**", "nim/meta/*", "**")]
    ends = [NOW - 1] if not grant.expires else [grant.expires - 60]
    return [*out, replace(grant, not_before=max(grant.not_before, NOW + 1)), replace(grant, grace_s=0), replace(grant, expires=ends[0])]


def lower(document: Entitlement) -> list[Entitlement]:
    """Everything that one document can lose."""
    out = [replace(document, models=tuple(m for m in document.models if m != gone)) for gone in document.models]
    out += [replace(document, actions=tuple(a for a in document.actions if a != gone)) for gone in document.actions]
    out += [replace(document, products=()), replace(document, environments=()), replace(document, environments=document.environments[:1])]
    out += [replace(document, tier=tier) for tier in ("", "developer") if document.tier != ""]
    out += [replace(document, revoked_at=NOW - 1), replace(document, expires=document.expires - 60), replace(document, grace_s=0)]
    return [*out, replace(document, not_before=NOW + 1), replace(document, expires=0.0)]


def denials(p: Principal, s: Subject) -> list[tuple[Principal, Subject]]:
    """The case with one thing taken away, every way there is."""
    out = [(replace(p, revoked_at=NOW), s), (replace(p, expires=min(p.expires or NOW, NOW)), s), (replace(p, tier=""), s)]
    out += [
        (replace(p, closed_at=NOW), s),
        (replace(p, disabled_at=NOW), s),
        (replace(p, entitled_only=True), s),
        (p, replace(s, visibility="private")),
    ]
    if p.tier == "enterprise":
        out.append((replace(p, tier="developer"), s))
    out += [(p, replace(s, blocked="b")), (p, replace(s, unaccepted="l"))]
    if not s.requires_product:
        out += [(p, replace(s, requires_product=product)) for product in ("p1", "p3")]
    if not s.requires_tier:
        out += [(p, replace(s, requires_tier=tier)) for tier in (*TIERS, "gold")]
    if s.requires_tier == "developer":
        out.append((p, replace(s, requires_tier="enterprise")))
    for i, grant in enumerate(p.grants):
        out += [(replace(p, grants=(*p.grants[:i], *changed, *p.grants[i + 1 :])), s) for changed in ([], *([g] for g in less(grant)))]
    found = p.entitlement
    if found is not None:
        out += [(replace(p, entitlement=document), s) for document in lower(found)]
    elif not p.entitled_only:
        full = Entitlement("doc", 1, "enterprise", ("**",), ACTIONS, 0.0, NOW + 9, products=("p1", "p3"), environments=("dev", "production"))
        out += [(replace(p, entitlement=document), s) for document in (full, *lower(full))]
    return out


def a_denial_never_widens(judge: Decide, case: Case) -> None:
    p, s, action = case
    before = judge(p, s, action, NOW)
    for changed, stricter in denials(p, s):
        assert before.allow or not judge(changed, stricter, action, NOW).allow, (changed, stricter)


def later_never_widens(judge: Decide, case: Case) -> None:
    """What has begun: an hour that passes takes rights away only."""
    p, s, action = case
    begun = replace(p, grants=tuple(replace(g, not_before=0.0) for g in p.grants))
    if begun.entitlement is not None:
        begun = replace(begun, entitlement=replace(begun.entitlement, not_before=0.0))
    answers = [judge(begun, s, action, NOW + step).allow for step in (-200, -51, -1, 0, 1, 49, 50, 51, 99, 100, 151, 10**9)]
    assert answers == sorted(answers, reverse=True), answers


def back_never_widens(judge: Decide, case: Case, walls: tuple[float, ...]) -> None:
    """A clock that is set back: once something has ended it stays so, since what is asked with is the highest time that was known."""
    p, s, action = case
    ended, floor = False, 0.0
    for wall in walls:
        floor = max(floor, wall)
        found = judge(p, s, action, floor if judge is not weak_wall else wall)
        assert not (ended and found.allow), (walls, wall)
        ended = ended or found.reason.endswith(("_expired", "_revoked"))


def alike(name: str) -> list[str]:
    """Other names that a careless comparison takes for this one."""
    first, _, rest = name.partition("/")
    out = [
        name.upper(),
        name.title(),
        f"{first}x/{rest}",
        f"x{name}",
        f"{first}-{rest}",
        name.replace("-", "_"),
        name.replace("a", "\u0430"),
        name + ".",
    ]
    return [
        *out,
        name + "/profiles/x",
        name + "/profiles/profiles",
        "/" + name,
        name + "/",
        name.replace("/", "//", 1),
        f"{name}/../x",
        name + "\0",
        name + " ",
    ]


def covered(patterns: tuple[str, ...], name: str) -> bool:
    """The meaning of patterns once more, as regular expressions."""
    rules = ("/".join("[^/]*(/[^/]*)*" if part == "**" else re.escape(part).replace(r"\*", "[^/]*") for part in p.split("/")) for p in patterns)
    return any(re.fullmatch(rule, model_of(name), re.DOTALL) for rule in rules)


def another_name_never_widens(judge: Decide, case: Case) -> None:
    """Any other name is allowed only where a pattern of grant and document covers that name itself."""
    p, s, action = case
    if action in ("auditor", "list", "stat"):
        return  # these open an auditor's whole organisation, and are not about what is read
    for name in (s.name, *alike(s.name)):
        found = judge(p, replace(s, name=name), action, NOW)
        assert not found.allow or covered(tuple(m for g in p.grants for m in g.models), name), name
        document, own = p.entitlement, s.org == p.org == name.split("/")[0] and not s.requires_tier and not s.requires_product
        if found.allow and action in ("pull", "run") and document is not None and not own:
            assert covered(document.models, name), name


def test_the_profiles_of_a_model_are_decided_as_the_model() -> None:
    who = Principal("key-1", "acme", "enterprise", grants=(Grant(("nim/meta/llama",)),))
    assert decide(who, Subject("nim/meta/llama/profiles", "", "public"), "pull", NOW).allow
    for name in ("nim/meta/llama/profiles/profiles", "nim/meta/profiles", "nim/meta/llama/Profiles", "nim/meta/llama/profiles/"):
        assert not decide(who, Subject(name, "", "public"), "pull", NOW).allow, name


def weak_document(p: Principal, s: Subject, action: str, now: float) -> Decision:
    """A revoked or expired document counts as none, and then the grants alone decide."""
    d = p.entitlement
    gone = d is not None and (d.revoked_at or d.expires + d.grace_s <= now)
    return decide(replace(p, entitlement=None) if gone else p, s, action, now)


def weak_tier(p: Principal, s: Subject, action: str, now: float) -> Decision:
    """The tier of the document in place of the lower one of document and key."""
    return decide(replace(p, tier=p.entitlement.tier) if p.entitlement else p, s, action, now)


def weak_union(p: Principal, s: Subject, action: str, now: float) -> Decision:
    """The document gives rights of its own."""
    d = p.entitlement
    more = (Grant(d.models, d.actions, d.not_before, d.expires, d.grace_s),) if d else ()
    return decide(replace(p, grants=(*p.grants, *more)), s, action, now)


def weak_end(p: Principal, s: Subject, action: str, now: float) -> Decision:
    """An end in the past is no end: it was compared the wrong way round."""
    return decide(replace(p, grants=tuple(replace(g, expires=0.0) if 0 < g.expires < now - 40 else g for g in p.grants)), s, action, now)


def weak_case(p: Principal, s: Subject, action: str, now: float) -> Decision:
    """Names are compared in lower case and without what is around them."""
    return decide(p, replace(s, name=s.name.lower().strip(" ./\0")), action, now)


def weak_prefix(p: Principal, s: Subject, action: str, now: float) -> Decision:
    """A pattern that ends with a star covers all that begins like it, segments or none."""
    wide = tuple(replace(g, models=tuple(s.name if s.name.startswith(m.rstrip("*/")) else m for m in g.models)) for g in p.grants)
    return decide(replace(p, grants=wide), s, action, now)


def weak_profiles(p: Principal, s: Subject, action: str, now: float) -> Decision:
    """`/profiles` is taken off twice, once by each of two who think that it is theirs."""
    return decide(p, replace(s, name=model_of(s.name)), action, now)


def weak_wall(p: Principal, s: Subject, action: str, now: float) -> Decision:
    """The wall clock in place of the floor: see back_never_widens."""
    return decide(p, s, action, now)


FEW = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
MANY = settings(max_examples=3000, deadline=None, database=None, derandomize=True, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
walls = st.lists(texts((*ENDS, NOW + 151, NOW - 500)), min_size=2, max_size=6).map(tuple)


@pytest.mark.slow
@FEW
@given(cases)
def test_a_denial_never_widens(case: Case) -> None:
    a_denial_never_widens(decide, case)


@pytest.mark.slow
@FEW
@given(cases)
def test_a_later_hour_never_widens(case: Case) -> None:
    later_never_widens(decide, case)


@pytest.mark.slow
@FEW
@given(cases, walls)
def test_a_clock_that_is_set_back_never_widens(case: Case, times: tuple[float, ...]) -> None:
    back_never_widens(decide, case, times)


@pytest.mark.slow
@FEW
@given(cases)
def test_another_name_never_widens(case: Case) -> None:
    another_name_never_widens(decide, case)


@pytest.mark.slow
@pytest.mark.parametrize("weak", [weak_document, weak_tier, weak_union, weak_end])
def test_the_denials_catch_a_weak_decision(weak: Decide) -> None:
    with pytest.raises(AssertionError):
        MANY(given(cases)(lambda case: a_denial_never_widens(weak, case)))()


@pytest.mark.slow
@pytest.mark.parametrize("weak", [weak_document, weak_end])
def test_the_hours_catch_a_weak_decision(weak: Decide) -> None:
    with pytest.raises(AssertionError):
        MANY(given(cases)(lambda case: later_never_widens(weak, case)))()


def test_the_clock_catches_a_decision_by_the_wall() -> None:
    with pytest.raises(AssertionError):
        MANY(given(cases, walls)(lambda case, times: back_never_widens(weak_wall, case, times)))()


@pytest.mark.parametrize("weak", [weak_case, weak_prefix, weak_profiles])
def test_the_names_catch_a_weak_decision(weak: Decide) -> None:
    with pytest.raises(AssertionError):
        MANY(given(cases)(lambda case: another_name_never_widens(weak, case)))()


bounds = st.one_of(st.none(), st.integers(0, 6))


def lower_bounds_never_widen(judge: Callable[[GpuBounds, int, int, int], Decision], bound: GpuBounds, used: tuple[int, int, int]) -> None:
    before = judge(bound, *used).allow
    for grant in (bound.grant, 0, 3 if bound.grant is None else max(bound.grant - 1, 0)):
        for document in (bound.entitlement, 0, 3 if bound.entitlement is None else max(bound.entitlement - 1, 0)):
            assert before or not judge(GpuBounds(grant, document), *used).allow
    assert before or not judge(bound, used[0], used[1] + 1, used[2] + 1).allow


def weak_gpus(bound: GpuBounds, wanted: int, of_grant: int, of_entitlement: int) -> Decision:
    """Zero is taken for no bound, as it is in the database's column of a grant."""
    return decide_gpus(GpuBounds(bound.grant or None, bound.entitlement or None), wanted, of_grant, of_entitlement)


uses = st.tuples(st.integers(0, 4), st.integers(0, 8), st.integers(0, 8))


@pytest.mark.slow
@FEW
@given(st.builds(GpuBounds, bounds, bounds), uses)
def test_lower_gpu_bounds_never_widen(bound: GpuBounds, used: tuple[int, int, int]) -> None:
    lower_bounds_never_widen(decide_gpus, bound, used)


def test_the_gpu_bounds_catch_a_weak_decision() -> None:
    with pytest.raises(AssertionError):
        MANY(given(st.builds(GpuBounds, bounds, bounds), uses)(lambda bound, used: lower_bounds_never_widen(weak_gpus, bound, used)))()


leases = st.builds(Lease, texts((0.0, *ENDS)), texts((0, 50, -5)), texts((0.0, NOW - 5, NOW + 5)), texts((0.0, NOW - 5, NOW + 5)))


def leases_only_lose(judge: Callable[[Lease | None, float], Decision], lease: Lease) -> None:
    taken = (replace(lease, revoked_at=NOW), replace(lease, returned_at=NOW), replace(lease, expires=lease.expires - 60), replace(lease, grace_s=0))
    before = judge(lease, NOW).allow
    assert all(before or not judge(changed, NOW).allow for changed in taken if changed.grace_s <= max(lease.grace_s, 0))
    answers = [judge(lease, NOW + step).allow for step in (-200, -1, 0, 1, 50, 51, 99, 100, 151)]
    assert answers == sorted(answers, reverse=True)


def weak_lease(lease: Lease | None, now: float) -> Decision:
    """A lease whose end is not known has none."""
    return decide_lease(replace(lease, expires=now + 1) if lease and lease.expires <= 0 else lease, now)


@FEW
@given(leases)
def test_leases_only_lose(lease: Lease) -> None:
    leases_only_lose(decide_lease, lease)


def test_a_lease_without_end_is_over() -> None:
    assert not decide_lease(Lease(0.0), NOW).allow and weak_lease(Lease(0.0), NOW).allow


def test_every_action_is_asked_for() -> None:
    """So that no action is added without these properties over it."""
    assert set(PARTS) == {"stat", "list"} and set(ACTIONS) == {"pull", "create", "push", "run", "admin", "auditor"}
