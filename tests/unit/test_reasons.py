"""Every documented reason of a refusal is reached, says what is wrong and what would help, and stands in docs/operations.md word for word."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from artifact.errors import AirlockError, Denied, NotFound, Unauthenticated
from artifact.grant import (
    Decision,
    Entitlement,
    GpuBounds,
    Grant,
    Lease,
    Principal,
    Subject,
    authenticate,
    date,
    decide,
    decide_gpus,
    decide_lease,
    decide_open,
    gpu_bounds,
    refused,
    run_ways,
)
from artifact.reasons import DEAD, REASONS
from registry.entitlements import new_key
from runtime.settings import EXIT_CODES
from tests.conftest import ROOT
from tests.site import running_site

NOW, DAY = 1_800_000_000.0, 86400.0
G = Grant(("nim/**", "acme/*"), ("pull", "run"), id="grant-1")
DOC = Entitlement(
    "doc-1", 7, "enterprise", ("nim/**",), ("pull", "run"), NOW - DAY, NOW + 400 * DAY, 0, 8, ("nv-ai-enterprise",), ("dev", "production")
)
KEY = Principal("key-1", "acme", "enterprise", grants=(G,), entitlement=DOC)
NIM = Subject("nim/meta/llama", "", "public", "enterprise", "nv-ai-enterprise")
OWN = Subject("acme/tiny", "acme")


def doc(**changes: object) -> Principal:
    return replace(KEY, entitlement=dataclasses.replace(DOC, **changes))  # type: ignore[arg-type]


def grant(**changes: object) -> Principal:
    return replace(KEY, grants=(dataclasses.replace(G, **changes),))  # type: ignore[arg-type]


def ask(who: Principal, what: Subject = NIM, action: str = "pull", profile: tuple[str, str] | None = None) -> Callable[[], Decision]:
    return lambda: decide(who, what, action, NOW, profile)


DEV = replace(NIM, requires_tier="developer")
CASES: list[tuple[str, Callable[[], Decision]]] = [
    ("key_absent", ask(Principal())),
    ("key_expired", ask(replace(KEY, expires=NOW))),
    ("key_revoked", ask(replace(KEY, revoked_at=NOW))),
    ("org_closed", ask(replace(KEY, closed_at=NOW))),
    ("member_disabled", ask(replace(KEY, disabled_at=NOW))),
    ("not_visible", ask(KEY, Subject("beta/x", "beta"))),
    ("no_grant", ask(KEY, Subject("hf/x/y", "", "public"))),
    ("action_missing", ask(KEY, NIM, "push")),
    ("grant_not_yet", ask(grant(not_before=NOW + 1))),
    ("grant_expired", ask(grant(expires=NOW - 5, grace_s=5))),
    ("tier_missing", ask(replace(KEY, tier="developer"))),
    ("tier_missing", ask(replace(KEY, tier=""), DEV)),
    ("tier_missing", ask(replace(KEY, tier="developer"), DEV)),  # the grant's environment is production
    ("tier_missing", ask(doc(tier="developer"))),  # the document cuts the key's tier
    ("tier_missing", ask(doc(tier="gold"))),
    ("tier_missing", ask(KEY, replace(NIM, requires_tier="gold"))),
    ("entitlement_absent", ask(replace(KEY, entitlement=None, entitled_only=True))),
    ("entitlement_not_yet", ask(doc(not_before=NOW + 1))),
    ("entitlement_expired", ask(doc(expires=NOW - 9, grace_s=9))),
    ("entitlement_expired", ask(doc(expires=0.0))),  # a missing end is the past
    ("entitlement_revoked", ask(doc(revoked_at=NOW))),
    ("entitlement_models", ask(doc(models=("nim/google/*",)))),
    ("entitlement_actions", ask(doc(actions=("pull",)), NIM, "run")),
    ("product_missing", ask(doc(products=("private-registry",)))),
    ("environment", ask(doc(environments=("dev",)))),
    ("environment", ask(replace(grant(environment="dev"), entitlement=replace(DOC, environments=("production",))))),
    ("profile_not_granted", ask(grant(profiles=("vllm-fp8-*",)), NIM, "run", ("ab" * 32, "vllm-bf16-tp1"))),
    ("license_unaccepted", ask(KEY, replace(NIM, unaccepted="a licence"))),
    ("license_unaccepted", ask(KEY, replace(OWN, unaccepted="a licence"), "run")),
    ("legal_block", ask(KEY, replace(NIM, blocked="export control"))),
    ("legal_block", ask(grant(actions=("admin",)), replace(NIM, blocked="export control", unaccepted="a licence"), "run")),
    ("gpus_exceeded", lambda: decide_gpus(GpuBounds(2, None), 1, 2, 0)),
    ("gpus_exceeded", lambda: decide_gpus(GpuBounds(None, 8), 3, 0, 6)),
    ("lease_absent", lambda: decide_lease(None, NOW)),
    ("lease_expired", lambda: decide_lease(Lease(NOW - 5, 5), NOW)),
    ("lease_expired", lambda: decide_lease(Lease(0.0), NOW)),
    ("lease_revoked", lambda: decide_lease(Lease(NOW + 5, 5, revoked_at=NOW - 5), NOW)),
    ("lease_returned", lambda: decide_lease(Lease(NOW + 5, 5, returned_at=NOW - 5), NOW)),
]


@pytest.mark.parametrize(("reason", "case"), CASES)
def test_each_reason(reason: str, case: Callable[[], Decision]) -> None:
    found = case()
    assert (found.allow, found.reason) == (False, reason)
    assert found.words and found.remedy and "{" not in found.words + found.remedy
    assert found.visible == (REASONS[reason].status == 403)


def test_a_guessed_key_is_invalid_and_told_what_an_absent_one_is(tmp_path: Path) -> None:
    told = []
    with running_site(tmp_path) as site:
        for text in (new_key(), "", None):
            with pytest.raises(Unauthenticated) as caught:
                site.guard.caller(text, "r", NOW)
            told.append((caught.value.reason, caught.value.what, caught.value.do))
    assert [reason for reason, *_ in told] == ["key_invalid", "key_absent", "key_absent"]
    assert {words for _, *words in map(tuple, told) for words in [tuple(words)]} == {(REASONS["key_invalid"].words, REASONS["key_invalid"].remedy)}


def documented() -> dict[str, tuple[str, ...]]:
    """The rows of the table of reasons in docs/operations.md."""
    text = (ROOT / "docs" / "operations.md").read_text()
    part = text.split("### Reasons of a refusal", 1)[1].split("\n#", 1)[0]
    rows = re.findall(r"^\| `(\w+)` \| (.*) \| (.*) \| (.*) \| (.*) \|$", part, re.MULTILINE)
    return {code: tuple(rest) for code, *rest in rows}


def test_every_documented_reason_is_reached() -> None:
    reached = {reason for reason, _ in CASES} | {"key_invalid"}
    assert reached == set(documented()) == set(REASONS)


def test_the_documented_table_is_the_one_of_the_code() -> None:
    kinds: dict[int, type[AirlockError]] = {401: Unauthenticated, 403: Denied, 404: NotFound}
    for code, (status, words, remedy, exits) in documented().items():
        reason = REASONS[code]
        assert (status, words, remedy) == (str(reason.status), reason.words, reason.remedy), code
        assert exits == str(EXIT_CODES.get(code, kinds[reason.status].exit_code)), code
        assert (code in DEAD) == (reason.status == 401)


def test_words_hold_what_they_are_given_as_it_is() -> None:
    assert "{org}" in refused("no_grant", name="{org}").words


@pytest.mark.parametrize(
    ("who", "what", "action"),
    [
        (KEY, NIM, "pull"),
        (KEY, NIM, "run"),
        (replace(KEY, entitlement=None), NIM, "run"),  # no document: the grant decides
        (doc(revoked_at=NOW), OWN, "pull"),  # an organisation's own weights need no document
        (replace(KEY, entitlement=None, entitled_only=True), OWN, "run"),
        (replace(grant(environment="dev"), tier="developer"), DEV, "run"),
        (grant(actions=("push",)), OWN, "push"),
        (replace(grant(models=("**",), actions=("admin",)), entitlement=None, entitled_only=True), NIM, "push"),  # the site's own work
        (replace(grant(models=("**",), actions=("auditor",)), entitlement=None, entitled_only=True), NIM, "auditor"),
        (doc(expires=NOW - 5, grace_s=6), NIM, "run"),
        (doc(environments=("production",)), NIM, "run"),
    ],
)
def test_what_is_allowed(who: Principal, what: Subject, action: str) -> None:
    assert decide(who, what, action, NOW).allow


@pytest.mark.parametrize(
    ("who", "reason"),
    [
        (replace(KEY, revoked_at=NOW + 1), "key_revoked"),
        (replace(KEY, closed_at=NOW + 1), "org_closed"),
        (replace(KEY, disabled_at=NOW + 1), "member_disabled"),
        (doc(revoked_at=NOW + 1), "entitlement_revoked"),
    ],
)
def test_what_was_taken_back_by_a_clock_that_is_ahead_is_gone_at_once(who: Principal, reason: str) -> None:
    assert decide(who, NIM, "pull", NOW).reason == reason


def test_required_own_weights_need_the_document_too() -> None:
    owned = replace(OWN, requires_product="nv-ai-enterprise")
    assert decide(KEY, owned, "pull", NOW).reason == "entitlement_models"
    assert decide(doc(models=("acme/*",)), owned, "pull", NOW).allow
    look = Subject("acme-x/tiny", "acme")  # owned in the database, but not called so: not its own
    assert decide(replace(grant(models=("**",)), entitlement=DOC), look, "pull", NOW).reason == "entitlement_models"


def test_nobody_reads_what_asks_for_something() -> None:
    free, nobody = Subject("hf/x/y", "", "public"), Principal(anonymous=True)
    assert decide(nobody, free, "pull", NOW).allow
    assert not decide(nobody, replace(free, requires_product="x"), "pull", NOW).allow
    assert not decide(nobody, replace(free, blocked="x"), "pull", NOW).allow and not decide(nobody, replace(free, unaccepted="x"), "pull", NOW).allow
    assert not decide(replace(nobody, entitled_only=True), free, "pull", NOW).allow
    assert decide_open(doc(revoked_at=NOW), free, "pull", NOW).allow
    assert not decide_open(replace(KEY, entitlement=None, entitled_only=True), free, "pull", NOW).allow


def test_ids_name_what_allowed_it() -> None:
    assert decide(KEY, NIM, "pull", NOW).ids == {"grant": "grant-1", "entitlement": "doc-1"}
    assert decide(KEY, OWN, "pull", NOW).ids == {"grant": "grant-1"}
    assert decide(grant(expires=NOW), NIM, "pull", NOW).ids == {"grant": "grant-1"}
    assert decide(doc(revoked_at=NOW), NIM, "pull", NOW).ids == {"entitlement": "doc-1"}


@pytest.mark.parametrize(
    ("who", "until", "words"),
    [
        (KEY, NOW + 400 * DAY, ""),
        (doc(expires=NOW + 60 * DAY), NOW + 60 * DAY, "the entitlement of acme ends on {}, in 60 days"),
        (doc(expires=NOW + 60 * DAY + 1), NOW + 60 * DAY + 1, ""),
        (doc(expires=NOW + 60.0, grace_s=60), NOW + 120.0, "the entitlement of acme ends on {}, in less than a day"),
        (grant(expires=NOW + 3 * DAY), NOW + 3 * DAY, "the grant on nim/meta/llama ends on {}, in 3 days"),
        (replace(KEY, expires=NOW + 2 * DAY), NOW + 2 * DAY, "the API key ends on {}, in 2 days"),
        (replace(grant(expires=NOW + 9 * DAY), expires=NOW + 2 * DAY), NOW + 2 * DAY, "the API key ends on {}, in 2 days"),
    ],
)
def test_an_end_within_sixty_days_is_told(who: Principal, until: float, words: str) -> None:
    found = decide(who, NIM, "run", NOW)
    end = min(e for e in (who.expires, who.grants[0].expires, DOC.expires if who.entitlement is None else who.entitlement.expires) if e)
    assert (found.reason, found.until, found.warning) == ("ok", until, words.format(date(end)))


def test_grace_is_told_with_its_end() -> None:
    found = decide(doc(expires=NOW - 5, grace_s=30), NIM, "run", NOW)
    assert (found.reason, found.until) == ("grace", NOW + 25)
    assert found.warning == f"the entitlement of acme expired on {date(NOW - 5)}; grace ends on {date(NOW + 25)}"
    cut = decide(replace(doc(expires=NOW - 5, grace_s=30), expires=NOW + 7), NIM, "run", NOW)
    assert date(NOW + 7) in cut.warning and cut.until == NOW + 7, "the key ends before the grace does"
    lease = decide_lease(Lease(NOW - 5, 30), NOW)
    assert (lease.allow, lease.reason, lease.until) == (True, "grace", NOW + 25) and date(NOW + 25) in lease.warning


def test_the_widest_grant_comes_first() -> None:
    grants = (replace(G, id="a", gpus=2), replace(G, id="b", expires=NOW - 1, grace_s=9), replace(G, id="c", gpus=4), replace(G, id="d", gpus=2))
    who = replace(KEY, grants=grants)
    assert [d.ids["grant"] for d in run_ways(who, NIM, NOW)] == ["c", "a", "d", "b"]
    assert decide(who, NIM, "run", NOW).ids["grant"] == "c"
    no = run_ways(who, Subject("beta/x", "beta"), NOW)
    assert [d.reason for d in no] == ["not_visible"]


def test_gpu_bounds() -> None:
    def bounds(who: Principal, what: Subject = NIM) -> GpuBounds:
        return gpu_bounds(who, decide(who, what, "run", NOW))

    assert bounds(KEY) == GpuBounds(None, 8) and bounds(grant(gpus=2)) == GpuBounds(2, 8)
    assert bounds(replace(KEY, entitlement=None)) == GpuBounds() and bounds(KEY, OWN) == GpuBounds()
    assert bounds(doc(gpus=0)) == GpuBounds(None, 0)
    decision = decide(grant(gpus=2), NIM, "run", NOW)
    gone = gpu_bounds(replace(KEY, grants=(), entitlement=replace(DOC, jti="doc-2")), decision)
    assert gone == GpuBounds(0, 0), "what gave it is gone: it gives none"
    assert decide_gpus(GpuBounds(2, 8), 2, 0, 6).allow and decide_gpus(GpuBounds(0, 0), 0, 0, 0).allow
    assert not decide_gpus(GpuBounds(None, 0), 1, 0, 0).allow and decide_gpus(GpuBounds(), 64, 10**6, 10**6).allow


@pytest.mark.parametrize(
    ("patterns", "allowed"),
    [((), True), (("vllm-*",), True), (("ab*",), True), (("trtllm-*", "*-tp1"), True), (("VLLM-*",), False), (("vllm",), False), (("",), False)],
)
def test_profiles_of_a_grant(patterns: tuple[str, ...], allowed: bool) -> None:
    who = grant(profiles=patterns)
    assert decide(who, NIM, "run", NOW, ("ab" * 32, "vllm-bf16-tp1")).allow is allowed
    assert decide(who, NIM, "pull", NOW, ("ab" * 32, "vllm-bf16-tp1")).allow, "weights are not those of one profile"


def test_absurd_times_are_told_not_raised() -> None:
    assert date(1e300) == date(float("inf")) == "9999-12-31T23:59:59Z" and date(-1e300) == "1970-01-01T00:00:00Z"
    assert authenticate(replace(KEY, revoked_at=-1e300), NOW).reason == "key_revoked"
