"""Documents on both databases: which one counts, what serials refuse, what a revocation list does, and two administrators at once."""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from artifact import documents as d
from artifact import trust
from artifact.errors import AirlockError, Conflict, Denied, Invalid, Mismatch, NotFound, Unauthenticated
from artifact.grant import Principal, Subject, decide, decide_gpus, gpu_bounds, run_ways
from artifact.store import Call
from registry import tables as t
from registry.library import local_call
from registry.watch import Watch
from registry.wiring import Site, open_site
from tests.site import BACKENDS, call_of, make_key, running_site

NOW = float(int(time.time())) + 7200  # of when the run began: its end, where the clock's floor stands, must lie before it
DAY = 86400.0
KEY = trust.generate_key()
PEM = trust.public_pem(KEY)
KID = trust.kid(PEM)
RIGHTS: dict[str, object] = {
    "tier": "enterprise",
    "models": ["**"],
    "actions": ["pull", "run"],
    "products": [],
    "environments": ["dev", "production"],
}
RIGHTS |= {"gpus": 8, "max_keys": 0, "grace_s": 0}


@pytest.fixture(params=BACKENDS)
def site(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Site]:
    with running_site(tmp_path, request.param) as opened:
        opened.home.pin_issuer(PEM, trust.spki_sha256(PEM).hex())
        yield opened


def licence(
    site: Site, serial: int, *, org: str = "acme", begins: float = NOW, ends: float = NOW + 365 * DAY, key: bytes = KEY, **change: Any
) -> str:
    claims = d.entitlement_claims(change.pop("iss", "vendor"), site.home.instance, org, serial, NOW - DAY, RIGHTS, begins, ends) | change
    return d.sign(key, d.ENTITLEMENT, claims).head.token


def listed(serial: int, *, key: bytes = KEY, iss: str = "vendor", now: float = NOW, **revoked: list[str]) -> str:
    return d.sign(key, d.REVOCATIONS, d.revocation_claims(iss, serial, now, revoked, None, now + 30 * DAY)).head.token


def take(site: Site, token: str, now: float = NOW) -> dict[str, Any]:
    return site.documents.take(local_call(now), {"document": token})


def refusal(site: Site, token: str, error: type[AirlockError] = Denied, now: float = NOW) -> str:
    """The reason for which it is refused; nothing but the record of that changed."""
    before = rows(site)
    with pytest.raises(error) as caught:
        take(site, token, now)
    assert rows(site) == before
    last = audit(site)[-1]
    assert (last["event"], last["result"], last["reason"]) == ("document_refused", "denied", caught.value.reason)
    return caught.value.reason


def rows(site: Site) -> list[Any]:
    with site.catalog.reading() as conn:
        return [conn.execute(select(table).order_by(*table.primary_key)).all() for table in (t.entitlement, t.revocation, t.revocation_list, t.org)]


def audit(site: Site) -> list[dict[str, Any]]:
    with site.catalog.reading() as conn:
        return [json.loads(body) for body in conn.execute(select(t.audit_pending.c.body).order_by(t.audit_pending.c.id)).scalars()]


def jti_of(token: str) -> str:
    return d.unverified(token).head.jti


def counting(site: Site, org: str = "acme") -> str:
    with site.catalog.reading() as conn:
        found = select(t.entitlement.c.jti).join(t.org, t.org.c.entitlement_id == t.entitlement.c.id).where(t.org.c.name == org)
        return str(conn.execute(found).scalar() or "")


def states(site: Site, now: float = NOW) -> dict[int, str]:
    return {row["serial"]: row["state"] for row in site.documents.entitlements(local_call(now))["items"]}  # type: ignore[attr-defined]


def test_serials(site: Site) -> None:
    seven, eight = licence(site, 7), licence(site, 8)
    assert take(site, seven)["state"] == "applied" and counting(site) == jti_of(seven)
    assert take(site, seven)["state"] == take(site, d.armour(seven, d.ENTITLEMENT))["state"] == "known"
    assert refusal(site, licence(site, 7), Conflict) == "document_conflict"
    assert refusal(site, licence(site, 9, jti=jti_of(seven)), Conflict) == "document_conflict"
    assert take(site, eight)["state"] == "applied" and counting(site) == jti_of(eight)
    assert refusal(site, licence(site, 7)) == refusal(site, licence(site, 6)) == "serial"
    assert take(site, seven)["state"] == "known" and counting(site) == jti_of(eight), "what is known changes nothing"
    assert take(site, licence(site, 1, org="beta"))["state"] == "applied", "serials are of one organisation"
    assert take(site, licence(site, 1, iss="reseller"))["state"] == "applied", "and of one issuer"
    with site.catalog.reading() as conn:
        assert seven in conn.execute(select(t.entitlement.c.token)).scalars().all(), "kept as it was signed"
    events = [(row["event"], row["ref"]) for row in audit(site) if row["event"] == "entitlement_import"]
    assert events[:2] == [("entitlement_import", jti_of(seven)), ("entitlement_import", jti_of(eight))]


def test_what_is_refused(site: Site) -> None:
    other = trust.generate_key()
    own = site.home.entitlement_key()
    assert refusal(site, licence(site, 1, key=other)) == "issuer_unknown"
    assert refusal(site, licence(site, 1, aud="another-site")) == "audience"
    assert refusal(site, licence(site, 1, begins=NOW - 3 * DAY, ends=NOW - DAY + 1, iat=int(NOW - 3 * DAY))) == "expired"
    assert refusal(site, licence(site, 1), now=NOW - 3 * DAY) == "clock"
    assert refusal(site, licence(site, 1, iss=site.home.instance)) == "issuer", "nobody else signs for this site's root"
    assert refusal(site, licence(site, 1, key=own)) == "issuer", "nor the root for others"
    assert refusal(site, licence(site, 1, org="hf"), Invalid) == "org"
    token = licence(site, 1)
    altered = token[:-10] + ("A" if token[-10] != "A" else "B") + token[-9:]
    assert refusal(site, altered, Mismatch) == "signature"
    lease = trust.sign_jws(KEY, "lease+jwt", {"iss": "vendor", "sub": "org:acme", "jti": "x", "iat": 1, "nbf": 1, "exp": 9_999_999_999})
    assert refusal(site, lease, Invalid) == "document"
    assert refusal(site, "\ud800", Invalid) == refusal(site, "x\0", Invalid) == "document"
    for body in ({}, {"document": 5}, {"document": token, "org": "acme"}):
        with pytest.raises(Invalid):
            site.documents.take(local_call(NOW), body)
    with site.catalog.reading() as conn:
        assert conn.execute(select(t.org.c.name)).all() == [], "a refused document makes no organisation"


def test_a_document_takes_over_when_it_begins(site: Site) -> None:
    now_, next_ = licence(site, 7), licence(site, 8, begins=NOW + 10 * DAY)
    take(site, now_)
    assert take(site, next_)["state"] == "later" and counting(site) == jti_of(now_)
    assert states(site) == {7: "valid", 8: "later"}
    assert site.documents.activate(NOW + 10 * DAY - 1) == [] and counting(site) == jti_of(now_)
    assert site.documents.activate(NOW + 10 * DAY) == [jti_of(next_)] and counting(site) == jti_of(next_)
    assert site.documents.activate(NOW + 11 * DAY) == [] and states(site, NOW + 11 * DAY) == {7: "replaced", 8: "valid"}
    assert site.documents.activate(NOW) == [] and counting(site) == jti_of(next_), "a clock that was set back brings nothing back"
    take(site, licence(site, 9, begins=NOW + 30 * DAY), NOW + 12 * DAY)
    assert counting(site) == jti_of(next_)
    assert [row["ref"] for row in audit(site) if row["event"] == "entitlement_begin"] == [jti_of(next_)]


def test_a_clock_that_is_far_ahead_lets_nothing_take_over(site: Site) -> None:
    """What took over stays, so one bad minute must not put a document in force that begins next year (section 8: forward 10 years, then back)."""
    held, next_ = licence(site, 7), licence(site, 8, begins=NOW + 40 * DAY)
    take(site, held)
    take(site, next_)
    failed = list[object]()
    Watch(site).round(NOW + 3650 * DAY, lambda *error: failed.append(error))
    take(site, licence(site, 9, begins=NOW + 50 * DAY, ends=NOW + 5000 * DAY), NOW + 3650 * DAY)
    assert not failed and counting(site) == jti_of(held) and states(site) == {7: "valid", 8: "later", 9: "later"}
    site.floor.raise_to(NOW + 45 * DAY)  # as a signed document does
    Watch(site).round(NOW + 45 * DAY, lambda *error: failed.append(error))
    assert not failed and counting(site) == jti_of(next_)


def test_one_that_was_overtaken_never_takes_over(site: Site) -> None:
    later, newer = licence(site, 7, begins=NOW + 10 * DAY), licence(site, 8)
    take(site, later)
    assert counting(site) == "", "without a document of its time the organisation is as before"
    take(site, newer)
    assert counting(site) == jti_of(newer) and states(site) == {7: "replaced", 8: "valid"}
    assert site.documents.activate(NOW + 20 * DAY) == [] and counting(site) == jti_of(newer)


def test_of_several_issuers_the_one_counts_that_took_effect_last(site: Site) -> None:
    vendor, reseller = licence(site, 7), licence(site, 1, iss="reseller", begins=NOW - 5 * DAY)
    take(site, vendor, NOW)
    take(site, reseller, NOW + 5)
    assert counting(site) == jti_of(reseller), "imported last, though its time began before"
    renewed = licence(site, 8, begins=NOW + DAY)
    take(site, renewed, NOW + 10)
    assert counting(site) == jti_of(reseller)
    site.documents.activate(NOW + DAY)
    assert counting(site) == jti_of(renewed)


@pytest.mark.slow
def test_any_order_of_documents_and_days(site: Site) -> None:
    """Drawn histories of two issuers against the rule told in other words: nothing but a document's own time or its import changes what counts."""
    seed = random.randrange(1 << 32)
    draw = random.Random(seed)
    for n in range(25):
        org, day, taken, counts = f"org{n}", 0, [], ""
        for _ in range(7):
            iss, serial, begins = draw.choice(("vendor", "reseller")), draw.randrange(1, 9), draw.randrange(0, 8)
            token = licence(site, serial, org=org, iss=iss, begins=NOW + begins * DAY)
            fits = all(serial > other[1] for other in taken if other[0] == iss)
            if draw.random() < 0.7 and fits:
                take(site, token, NOW + day * DAY)
                taken.append((iss, serial, begins, day, jti_of(token)))
            else:
                day += draw.randrange(0, 3)
                site.documents.activate(NOW + day * DAY)
            counts, before = "", counts
            for at in range(day + 1):  # day after day: what begins then takes over, unless a newer one of its issuer has begun
                for doc in taken:
                    newer = any(o[0] == doc[0] and o[1] > doc[1] and max(o[2], o[3]) <= at for o in taken)
                    if max(doc[2], doc[3]) == at and not newer:
                        counts = doc[4]
            assert counting(site, org) == counts, (seed, n, day, taken, before)


def test_the_site_itself_issues(site: Site) -> None:
    body = {"org": "acme", "tier": "enterprise", "models": ["hf/**"], "gpus": 4, "expires": "365d", "grace": "30d", "max_keys": 2}
    made = site.documents.issue(local_call(NOW), body)
    assert (made["serial"], made["state"], made["issuer"]) == (1, "applied", site.home.instance) and counting(site) == made["jti"]
    assert take(site, str(made["text"]))["state"] == "known"
    assert site.documents.issue(local_call(NOW), body | {"tier": "developer"})["serial"] == 2
    item = site.documents.entitlements(local_call(NOW))["items"][-1]  # type: ignore[index]
    assert item["environments"] == ["dev"] and item["grace_ends"] > item["ends"] and item["counts"] is True
    for change in (
        {"expires": "never"},
        {"gpus": None},
        {"models": []},
        {"models": ["**/x"]},
        {"actions": ["push"]},
        {"tier": "trial"},
        {"org": "hf"},
    ):
        with pytest.raises(Invalid):
            site.documents.issue(local_call(NOW), body | change)
    before, after = site.home.keys.rotate("entitlement")
    assert before != after and site.documents.issue(local_call(NOW), body)["serial"] == 3
    assert take(site, str(made["text"]))["state"] == "known", "documents of the old root stay"


def test_max_keys_of_the_document_that_counts(site: Site) -> None:
    make_key(site, "acme")
    take(site, licence(site, 1, max_keys=2))
    make_key(site, "acme")
    with pytest.raises(Conflict) as caught:
        make_key(site, "acme")
    assert caught.value.reason == "max_keys"


def test_a_list_revokes_entitlements_keys_and_signing_keys(site: Site) -> None:
    key = make_key(site, "acme", "**")
    call = call_of(site, key, NOW)
    token = site.guard._admission.sign(call, ())[0]
    entitled = licence(site, 7)
    take(site, entitled)
    who = site.entitlements.principal(key)
    assert who is not None and decide(who, Subject("hf/a/b"), "pull", NOW + 1).allow
    done = take(site, listed(1, jti=[jti_of(entitled)], key_id=[who.key_id], kid=["0" * 16]), NOW + 1)
    assert (done["state"], done["entitlements"], done["keys"], done["leases"]) == ("applied", 1, 1, 0)
    who = site.entitlements.principal(key)
    assert who is not None and who.revoked_at == NOW + 1 and who.entitlement is not None and who.entitlement.revoked_at == NOW + 1
    for presented in (key, token):  # a token is worth no more than its key
        with pytest.raises(Unauthenticated) as caught:
            site.guard.caller(presented, "r", NOW + 2, "127.0.0.1")
        assert caught.value.reason == "key_revoked"
    no = decide(replace(who, revoked_at=0.0), Subject("hf/a/b"), "pull", NOW + 2)
    assert (no.reason, no.ids) == ("entitlement_revoked", {"entitlement": jti_of(entitled)})
    events = {row["event"]: row for row in audit(site)}
    assert events["entitlement_revoke"]["ref"] == jti_of(entitled) and events["key_revoke"]["ref"] == who.key_id
    assert states(site, NOW + 2) == {7: "revoked"} and counting(site) == jti_of(entitled), "an older one does not come back"


def test_a_revoked_document_is_refused_before_it_arrives(site: Site) -> None:
    token = licence(site, 7)
    take(site, listed(1, jti=[jti_of(token)]))
    assert refusal(site, token) == "revoked"


@pytest.mark.slow
def test_documents_of_a_revoked_signing_key_are_refused_from_then_on(site: Site) -> None:
    known, other = licence(site, 7), trust.generate_key()
    pem = trust.public_pem(other)
    site.home.pin_issuer(pem, trust.spki_sha256(pem).hex())
    take(site, known)
    take(site, listed(1, key=other, iss="second", kid=[KID]))
    assert refusal(site, licence(site, 8)) == refusal(site, listed(2)) == "issuer_revoked"
    assert take(site, known)["state"] == "known" and counting(site) == jti_of(known), "what was taken in before stays"
    own = trust.kid(trust.public_pem(site.home.entitlement_key()))
    assert refusal(site, listed(2, key=other, iss="second", kid=[own])) == "issuer", "the site's root is its own to revoke"


def test_serials_of_lists(site: Site) -> None:
    assert site.documents.revocation_serial() == 0
    first, second = listed(5, jti=["1" * 32]), listed(6, jti=["2" * 32])
    take(site, second)
    assert refusal(site, first) == "serial", "an older list"
    assert take(site, second)["state"] == "known" and refusal(site, listed(6), Conflict) == "document_conflict"
    assert site.documents.revocation_serial() == 6
    made = site.documents.revoke(local_call(NOW), {"jti": ["3" * 32]})
    assert made["serial"] == 1 and site.documents.revocation_serial() == 7, "each list that is taken raises the site's serial"
    again = site.documents.revoke(local_call(NOW), {"kid": ["4" * 16], "next_update": "10d"})
    assert again["serial"] == 2 and site.documents.revocation_serial() == 8
    own = [x for x in site.documents.revocations(local_call(NOW))["items"] if x["issuer"] == site.home.instance]  # type: ignore[attr-defined]
    assert own[0]["revoked"] == {"jti": ["3" * 32], "key_id": [], "kid": ["4" * 16]} and own[0]["serial"] == 2
    with site.catalog.reading() as conn:
        assert sorted(conn.execute(select(t.revocation.c.value)).scalars()) == ["2" * 32, "3" * 32, "4" * 16]
    root = trust.kid(trust.public_pem(site.home.entitlement_key()))
    with pytest.raises(Conflict):
        site.documents.revoke(local_call(NOW), {"kid": [root]})
    for body in ({}, {"jti": ["x"]}, {"key_id": ["nvapi-secret"]}, {"jti": []}):
        with pytest.raises(Invalid):
            site.documents.revoke(local_call(NOW), body)


def both(work: Callable[[int], object], count: int = 2) -> list[object]:
    """What each of several threads got, begun at once."""
    start, out = threading.Barrier(count), [None] * count

    def run(n: int) -> None:
        start.wait()
        try:
            out[n] = work(n)  # type: ignore[call-overload]
        except AirlockError as error:
            out[n] = error  # type: ignore[call-overload]

    threads = [threading.Thread(target=run, args=(n,)) for n in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return list(out)


def test_administrators_at_once(site: Site) -> None:
    body = {"org": "acme", "tier": "enterprise", "models": ["**"], "gpus": 4, "expires": "365d"}
    made = both(lambda n: site.documents.issue(local_call(NOW), body)["serial"], 6)
    assert sorted(made) == [1, 2, 3, 4, 5, 6]  # type: ignore[type-var]
    same = licence(site, 7)
    found = both(lambda n: take(site, same)["state"], 6)
    assert sorted(map(str, found)) == ["applied", *["known"] * 5]
    differ = [licence(site, 8) for _ in range(4)]
    found = both(lambda n: take(site, differ[n])["state"], 4)
    assert sorted(str(getattr(x, "reason", x)) for x in found) == ["applied", *["document_conflict"] * 3]
    lists = both(lambda n: site.documents.revoke(local_call(NOW), {"jti": [f"{n:032x}"]})["serial"], 4)
    assert sorted(lists) == [1, 2, 3, 4]  # type: ignore[type-var]
    own = site.documents.revocations(local_call(NOW))["items"][0]  # type: ignore[index]
    assert sorted(own["revoked"]["jti"]) == [f"{n:032x}" for n in range(4)], "no administrator's entry is lost"


def test_a_document_and_the_list_that_revokes_it_at_once(site: Site) -> None:
    for n in range(1, 7):
        token = licence(site, n, org=f"org{n}")
        revoking = listed(n, jti=[jti_of(token)])
        both(lambda i, pair=(token, revoking): take(site, pair[i]))  # type: ignore[misc]
        with site.catalog.reading() as conn:
            left = conn.execute(select(t.entitlement.c.revoked_at).where(t.entitlement.c.jti == jti_of(token))).scalars().all()
        assert left in ([], [NOW]), "never in force"


def test_who_sees_what(site: Site) -> None:
    take(site, licence(site, 7))
    take(site, licence(site, 7, org="beta"))
    lead = call_of(site, make_key(site, "acme", "acme/**", actions=("admin",)))
    reader = call_of(site, make_key(site, "acme", "acme/*", actions=("pull",)))
    g = site.guard.documents
    assert [x["org"] for x in g.entitlements(lead)["items"]] == ["acme"]  # type: ignore[attr-defined]
    mine, theirs = (x["jti"] for x in site.documents.entitlements(local_call(NOW))["items"])  # type: ignore[attr-defined]
    assert str(g.entitlement(lead, mine)["text"]).startswith("-----BEGIN AIRLOCK ENTITLEMENT-----")
    with pytest.raises(NotFound):
        g.entitlement(lead, theirs)
    refused: list[Callable[[], object]] = [
        lambda: g.entitlements(lead, "beta"),
        lambda: g.entitlements(reader),
        lambda: g.revocations(lead),
        lambda: g.take(lead, {"document": licence(site, 9)}),
        lambda: g.issue(lead, {"org": "acme", "tier": "enterprise", "models": ["**"], "gpus": 4, "expires": "365d"}),
        lambda: g.revoke(lead, {"jti": ["1" * 32]}),
    ]
    for ask in refused:
        with pytest.raises(Denied):
            ask()


def test_standing(site: Site) -> None:
    key = make_key(site, "acme", "hf/**", expires=NOW + 90 * DAY)
    call = call_of(site, key, NOW)
    alone = site.guard.standing(call)
    assert alone["entitlement"] is None and alone["warnings"] == [] and alone["revocation_serial"] == 0
    take(site, licence(site, 7, ends=NOW + 10 * DAY + 600, grace_s=int(5 * DAY)))
    take(site, listed(5))
    for at, words in ((NOW, "in 10 days"), (NOW + 12 * DAY, "grace ends on"), (NOW + 20 * DAY, "expired on")):
        found = site.guard.standing(call_of(site, key, at))
        assert found["revocation_serial"] == 5 and found["org"] == "acme"
        assert any("the entitlement of acme" in text and words in text for text in found["warnings"]), found["warnings"]  # type: ignore[attr-defined]
    shown = found["entitlement"]
    assert isinstance(shown, dict) and set(shown) == {"jti", "serial", "ends", "grace_ends", "revoked_at"}
    assert json.loads(json.dumps(found))["grants"][0]["models"] == ["hf/**"]
    with pytest.raises(Unauthenticated):
        site.guard.standing(Call(Principal(), None, "r", NOW))


def test_an_entitlement_is_a_ceiling_and_its_gpus_are_counted(site: Site) -> None:
    key = make_key(site, "acme", "**", tier="enterprise")
    take(site, licence(site, 7, models=["hf/**"], gpus=2))
    who = site.entitlements.principal(key)
    assert who is not None
    (way,) = run_ways(who, Subject("hf/a/b"), NOW)
    assert way.ids["entitlement"] == who.entitlement.jti if who.entitlement else False
    assert decide_gpus(gpu_bounds(who, way), 3, 0, 0).reason == "gpus_exceeded"
    assert run_ways(who, Subject("ngc/a/b"), NOW)[0].reason == "entitlement_models"


def test_a_site_that_is_opened_lets_documents_take_over(tmp_path: Path) -> None:
    with running_site(tmp_path) as site:
        site.home.pin_issuer(PEM, trust.spki_sha256(PEM).hex())
        past = time.time() - 2 * DAY
        token = licence(site, 1, begins=past + DAY, iat=int(past))
        assert site.documents.take(replace(local_call(past)), {"document": token})["state"] == "later" and counting(site) == ""
        with open_site(site.settings, background=False) as again:
            assert counting(again) == jti_of(token)


def test_pinning_an_issuer(tmp_path: Path) -> None:
    with running_site(tmp_path) as site:
        key = trust.generate_key()
        pem = trust.public_pem(key)
        with pytest.raises(Mismatch) as caught:
            site.home.pin_issuer(pem, "0" * 64)
        assert caught.value.reason == "issuer" and trust.kid(pem) not in site.home.issuers()
        for bad in ("", "no pem", key.decode()):
            with pytest.raises(Invalid):
                site.home.pin_issuer(bad, "0" * 64)
        assert site.home.pin_issuer("text around\n" + pem, trust.spki_sha256(pem).hex()) == trust.kid(pem)
        assert site.home.issuers()[trust.kid(pem)] == pem and site.home.pin_issuer(pem, trust.spki_sha256(pem).hex())
