"""Leases on both databases: GPUs counted under the organisation's lock, renewal, return, revocation, receipts, and what stands in a lease."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select, update

from artifact import documents as d
from artifact import trust
from artifact.errors import AirlockError, Denied, Invalid, NotFound, Unauthenticated
from artifact.grant import Grant
from artifact.store import Call
from registry import leases
from registry import tables as t
from registry.commands.reach import _local
from registry.leases import Wish
from registry.library import local_call
from registry.people import add_grant
from registry.wiring import Site
from tests.site import BACKENDS, Pushed, call_of, make_key, push_model, push_profiles, running_site

NOW = float(int(time.time()))
RIGHTS: dict[str, Any] = {"org": "acme", "tier": "enterprise", "models": ["**"], "gpus": 8, "expires": "365d"}


@pytest.fixture(autouse=True, scope="module")
def begun() -> None:
    """The tests' now is when they begin: the collection may be an hour ago, and the clock's floor stands at their site's making."""
    global NOW
    NOW = float(int(time.time()))


@pytest.fixture(params=BACKENDS)
def site(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Site]:
    with running_site(tmp_path, request.param) as opened:
        yield opened


@pytest.fixture
def pushed(site: Site) -> Pushed:
    """A model that its organisation does not own, so that an entitlement is asked."""
    return push_model(site, call_of(site, make_key(site, "site", "**", actions=("admin",))), "hf/acme/tiny", "1")


def key_of(site: Site, org: str = "acme", **more: Any) -> str:
    return make_key(site, org, "**", actions=("pull", "run"), tier="enterprise", **more)


def body(pushed: Pushed, host: str = "node-1", gpus: tuple[str, ...] = ("GPU-1",), **more: object) -> dict[str, object]:
    facts = {"model": pushed.name, "ref": "1", "profile_digest": pushed.profiles.digest, "profile_id": pushed.profile_id, "host": host}
    return {**facts, "gpu_uuids": list(gpus), **more}


def claims_of(site: Site, answer: dict[str, object]) -> dict[str, Any]:
    return trust.signed_claims(str(answer["lease"]), "lease+jwt", site.home.site_trust().lease_keys)


def lease(site: Site, call: Call, pushed: Pushed, host: str = "node-1", gpus: tuple[str, ...] = ("GPU-1",)) -> dict[str, Any]:
    return claims_of(site, site.guard.lease(call, body(pushed, host, gpus)))


def row(site: Site, jti: str) -> Any:
    with site.catalog.reading() as conn:
        return conn.execute(select(t.lease).where(t.lease.c.jti == jti)).one()


def audit(site: Site, event: str) -> list[dict[str, Any]]:
    with site.catalog.reading() as conn:
        found = [json.loads(text) for text in conn.execute(select(t.audit_pending.c.body).order_by(t.audit_pending.c.id)).scalars()]
    return [x for x in found if x["event"] == event]


def issue(site: Site, **change: object) -> str:
    return str(site.documents.issue(local_call(NOW), RIGHTS | change)["jti"])


def test_what_a_lease_says(site: Site, pushed: Pushed) -> None:
    key = key_of(site)
    plain = lease(site, call_of(site, key), pushed)
    assert (plain["ent_jti"], plain["ent_serial"], plain["revocation_serial"], plain["environment"]) == ("", 0, 0, "production")
    jti = issue(site)
    site.documents.revoke(local_call(NOW), {"jti": ["0" * 32]})
    call = call_of(site, key)
    found, stored = lease(site, call, pushed), row(site, lease(site, call, pushed)["jti"])
    grant = call.principal.grants[0].id
    assert (found["ent_jti"], found["ent_serial"], found["grant_id"], found["environment"]) == (jti, 1, grant, "production")
    assert found["revocation_serial"] == 1 and found["lease_serial"] == 2 and found["sub"] == "org:acme"
    assert (stored.ent_jti, stored.grant_id, stored.environment, stored.serial) == (jti, grant, "production", 3)
    event = audit(site, "lease")[-1]
    assert (event["entitlement"], event["grant"], event["gpus"], event["host"], event["serial"]) == (jti, grant, 1, "node-1", 3)
    assert event["exp"] == found["exp"] == found["iat"] + 86400


@pytest.mark.slow
def test_twenty_at_once_get_eight(site: Site, pushed: Pushed) -> None:
    """gpus=8 and twenty requests of one GPU: exactly eight get one, the others are told what is in use, and no serial is missing (A37)."""
    key = key_of(site)
    issue(site)
    calls = [call_of(site, key) for _ in range(20)]
    start, out = threading.Barrier(20), list[Any]()

    def ask(n: int) -> None:
        start.wait()
        try:
            out.append(lease(site, calls[n], pushed, f"node-{n}"))
        except AirlockError as error:
            out.append(error)

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    given = [x for x in out if isinstance(x, dict)]
    refused = [x for x in out if not isinstance(x, dict)]
    assert len(given) == 8 and all(isinstance(x, Denied) and x.reason == "gpus_exceeded" for x in refused), refused[:2]
    assert "8 of 8" in str(refused[0]) and "the entitlement" in str(refused[0])
    assert sorted(x["lease_serial"] for x in given) == list(range(1, 9))
    assert audit(site, "run")[-1]["reason"] == "gpus_exceeded" and audit(site, "run")[-1]["ref"] == pushed.name
    with pytest.raises(Denied):
        lease(site, calls[0], pushed, "another", ("GPU-1", "GPU-2"))
    assert lease(site, calls[0], pushed, "a-cpu-node", ())["gpu_uuids"] == [], "no GPU is none"


def test_a_renewal_counts_once_and_replaces(site: Site, pushed: Pushed) -> None:
    call = call_of(site, key_of(site))
    issue(site, gpus=2)
    first = lease(site, call, pushed, gpus=("GPU-1", "GPU-2"))
    again = [lease(site, call, pushed, gpus=("GPU-1", "GPU-2")) for _ in range(5)]
    assert row(site, first["jti"]).replaced_by == again[0]["jti"] and [x["lease_serial"] for x in again] == [2, 3, 4, 5, 6]
    with pytest.raises(Denied):
        lease(site, call, pushed, "node-2")
    lease(site, call, pushed, gpus=("GPU-1",))  # the other one stays leased to its end
    with pytest.raises(Denied):
        lease(site, call, pushed, "node-2")
    later = replace(call, now=again[-1]["exp"] + 1.0)
    assert lease(site, later, pushed, "node-2", ("GPU-1", "GPU-2"))


def test_gpus_of_a_grant_are_counted_by_themselves(site: Site, pushed: Pushed) -> None:
    key = key_of(site)
    with site.catalog.writing() as conn:
        conn.execute(update(t.key_grant).where(t.key_grant.c.models == '["**"]', t.key_grant.c.actions.like("%run%")).values(gpus=1))
        org_id = conn.execute(select(t.org.c.id).where(t.org.c.name == "acme")).scalar_one()
        second = add_grant(conn, org_id, Grant(("hf/**",), ("run",), gpus=2, environment="dev"), NOW)
    call = call_of(site, key)
    first = [lease(site, call, pushed, f"node-{n}") for n in range(3)]
    assert [x["grant_id"] == second for x in first].count(True) == 2 and {x["environment"] for x in first} == {"dev", "production"}
    with pytest.raises(Denied) as caught:
        lease(site, call, pushed, "node-4")
    assert "the grant" in caught.value.what and caught.value.reason == "gpus_exceeded"


def test_another_name_for_the_weights_frees_no_gpu(site: Site, pushed: Pushed) -> None:
    """A profile below an own name that runs somebody else's weights is counted under what gives those: entitlement and grant."""
    own_key = make_key(site, "acme", "acme/**", actions=("push", "pull", "run"), tier="enterprise")
    with site.catalog.writing() as conn:
        org_id = conn.execute(select(t.org.c.id).where(t.org.c.name == "acme")).scalar_one()
        narrow = add_grant(conn, org_id, Grant(("hf/**",), ("pull", "run"), gpus=2), NOW)
    call = call_of(site, own_key)
    push_model(site, call, "acme/mine", "1")
    profiles, profile_id = push_profiles(site, call, "acme/mine", "2", pushed.name, pushed.model)
    mine = replace(pushed, name="acme/mine", profiles=profiles, profile_id=profile_id)
    assert {lease(site, call, mine, f"node-{n}")["grant_id"] for n in range(2)} == {narrow}
    with pytest.raises(Denied) as caught:
        lease(site, call, mine, "node-3")
    assert caught.value.reason == "gpus_exceeded" and "the grant" in caught.value.what
    jti = issue(site, gpus=1)
    with pytest.raises(Denied):
        lease(site, call, pushed, "node-3")
    later = replace(call_of(site, own_key), now=NOW + 2 * 86400)
    assert lease(site, later, mine, "node-4")["ent_jti"] == jti
    with pytest.raises(Denied) as caught:
        lease(site, later, mine, "node-5")
    assert "the entitlement" in caught.value.what


def test_a_shared_gpu_stays_counted(site: Site, pushed: Pushed) -> None:
    """Own weights, or another organisation's runtime, on the same host and GPU take no lease of an entitlement out of the count."""
    key, other = make_key(site, "acme", "**", actions=("pull", "push", "run"), tier="enterprise"), key_of(site, "beta")
    own = push_model(site, call_of(site, key), "acme/mine", "1")
    issue(site, gpus=1)
    call = call_of(site, key)
    first = lease(site, call, pushed)
    assert lease(site, call, own)["ent_jti"] == "" and lease(site, call_of(site, other), pushed)["ent_jti"] == ""
    assert not row(site, first["jti"]).replaced_by
    with pytest.raises(Denied) as caught:
        lease(site, call, pushed, "node-2")
    assert "1 of 1" in caught.value.what
    again = lease(site, call, pushed)
    assert row(site, first["jti"]).replaced_by == again["jti"], "its own model's renewal does replace it"
    site.guard.leasing.give_back(call, {"jti": again["jti"]})
    assert lease(site, call, pushed, "node-2")


@pytest.mark.slow
def test_return_frees_and_is_final(site: Site, pushed: Pushed) -> None:
    key = key_of(site)
    call = call_of(site, key)
    issue(site, gpus=1)
    first = lease(site, call, pushed)
    with pytest.raises(Denied):
        lease(site, call, pushed, "node-2")
    other, foreign = call_of(site, key_of(site)), call_of(site, key_of(site, "beta"))
    with pytest.raises(NotFound):
        site.guard.leasing.give_back(foreign, {"jti": first["jti"]})
    with pytest.raises(Denied):
        site.guard.leasing.give_back(other, {"jti": first["jti"]})
    assert site.guard.leasing.give_back(call, {"jti": first["jti"]})["state"] == "returned"
    assert site.guard.leasing.give_back(call, {"jti": first["jti"]})["state"] == "was returned before"
    assert row(site, first["jti"]).returned_at and len(audit(site, "lease_return")) == 1
    second = lease(site, call, pushed, "node-2")
    lead = call_of(site, make_key(site, "acme", "acme/**", actions=("admin",)))
    assert site.guard.leasing.give_back(lead, {"jti": second["jti"]})["state"] == "returned", "its administrator, for a runtime that is gone"


def test_revocation_marks_and_counts_to_the_end(site: Site, pushed: Pushed) -> None:
    call = call_of(site, key_of(site))
    issue(site, gpus=1)
    given = lease(site, call, pushed)
    with pytest.raises(Denied):
        site.guard.leasing.revoke(call, {"jti": given["jti"]})
    lead = call_of(site, make_key(site, "acme", "acme/**", actions=("admin",)))
    assert site.guard.leasing.revoke(lead, {"jti": given["jti"]})["state"] == "revoked"
    with pytest.raises(Denied) as caught:
        lease(site, call, pushed, "node-2")
    assert caught.value.reason == "gpus_exceeded", "what it let start may still run"
    assert site.guard.leasing.leases(lead)["items"][0]["state"] == "revoked"  # type: ignore[index]


@pytest.mark.slow
@pytest.mark.parametrize("what", ["key", "grant", "entitlement", "list"])
def test_what_is_revoked_takes_its_leases_along(site: Site, pushed: Pushed, what: str) -> None:
    key = key_of(site)
    document = issue(site)
    call = call_of(site, key)
    given, other = lease(site, call, pushed), lease(site, call_of(site, key_of(site, "beta")), pushed, "node-b")
    local = local_call(time.time())
    if what == "key":
        _local(site, "POST", "keys/revoke", {"key_id": call.principal.key_id}, {})
    elif what == "grant":
        _local(site, "POST", "grants/revoke", {"grant_id": given["grant_id"]}, {})
    elif what == "entitlement":
        assert site.documents.revoke(local, {"jti": [document]})["leases"] == 1
    else:
        assert site.documents.revoke(local, {"key_id": [call.principal.key_id]})["leases"] == 1
    assert row(site, given["jti"]).revoked_at and not row(site, other["jti"]).revoked_at
    with pytest.raises((Denied, Unauthenticated)) as caught:
        lease(site, call, pushed)  # by a call that was admitted before: it is read once more under the lock
    assert caught.value.reason == {"grant": "no_grant", "entitlement": "entitlement_revoked"}.get(what, "key_revoked")
    assert row(site, given["jti"]).replaced_by == ""


def test_a_lease_and_the_revocation_of_its_key_at_once(site: Site, pushed: Pushed) -> None:
    """Whoever comes first: no lease stands under a key that is revoked."""
    for n in range(6):
        call = call_of(site, key_of(site))
        start = threading.Barrier(2)

        def ask(call: Call = call, start: threading.Barrier = start, n: int = n) -> None:
            start.wait()
            with suppress(AirlockError):
                lease(site, call, pushed, f"node-{n}")

        thread = threading.Thread(target=ask)
        thread.start()
        start.wait()
        site.documents.revoke(local_call(time.time()), {"key_id": [call.principal.key_id]})
        thread.join()
        with site.catalog.reading() as conn:
            left = conn.execute(select(t.lease.c.revoked_at).where(t.lease.c.key_id == call.principal.key_id)).scalars().all()
        assert all(left), left


def test_lists_of_leases(site: Site, pushed: Pushed) -> None:
    call = call_of(site, key_of(site))
    lead = call_of(site, make_key(site, "acme", "acme/**", actions=("auditor",)))
    jtis = [lease(site, call, pushed, f"node-{n}")["jti"] for n in range(5)]
    lease(site, call_of(site, key_of(site, "beta")), pushed, "node-b")
    again = lease(site, call, pushed, "node-0")["jti"]
    cpu = [lease(site, call, pushed, "node-c", ())["jti"] for _ in range(3)]
    listed = site.guard.leasing.leases(lead)["items"]
    assert isinstance(listed, list)
    assert [x["jti"] for x in listed] == [*jtis[1:], again, cpu[-1]] and {x["state"] for x in listed} == {"valid"}
    pages, after = list[Any](), ""
    while True:
        page = _local(site, "GET", "leases", None, {"after": after, "limit": 2, "every": 1})
        pages += page["items"]
        after = str(page["after"])
        if not after:
            break
    assert [x["serial"] for x in pages if x["org"] == "acme"] == list(range(1, 10)) and len(pages) == 10
    assert {x["state"] for x in pages} == {"valid", "replaced"}
    for ask in (lambda: site.guard.leasing.leases(lead, "beta"), lambda: site.guard.leasing.leases(call)):
        with pytest.raises(Denied):
            ask()
    for after in ("x", "1", "-1.0", "1.2.3", "9" * 30 + ".1"):
        with pytest.raises(Invalid):
            site.guard.leasing.leases(lead, after=after)


def test_a_receipt_of_what_was_verified(site: Site, pushed: Pushed) -> None:
    key = key_of(site)
    call = call_of(site, key)
    given = lease(site, call, pushed)
    receipt: dict[str, object] = {"lease": given["jti"], "digest": pushed.model.digest, "bytes": 5000, "files": 3}
    assert site.guard.leasing.verified(call, receipt) == {"lease": given["jti"], "digest": pushed.model.digest}
    (event,) = audit(site, "verified")
    assert (event["result"], event["ref"], event["lease"], event["bytes"]) == ("verified", f"hf/acme/tiny@{pushed.model.digest}", given["jti"], 5000)
    assert event["grant"] == given["grant_id"] and event["key_id"] == call.principal.key_id and event["org"] == "acme"
    wrong: list[tuple[dict[str, object], type[AirlockError]]] = [
        ({"digest": "sha256:" + "0" * 64}, Invalid),
        ({"lease": "0" * 32}, NotFound),
        ({"bytes": -1}, Invalid),
        ({"bytes": 1.5}, Invalid),
        ({"files": 1 << 62}, Invalid),
        ({"more": 1}, Invalid),
    ]
    for change, error in wrong:
        with pytest.raises(error):
            site.guard.leasing.verified(call, receipt | change)
    for other in (key_of(site), key_of(site, "beta")):
        with pytest.raises(NotFound):
            site.guard.leasing.verified(call_of(site, other), receipt)
    assert len(audit(site, "verified")) == 1


def test_a_lease_ends_with_the_first_of_its_rights(site: Site, pushed: Pushed) -> None:
    call = call_of(site, key_of(site), NOW)
    ends = d.date(NOW + 600)
    issue(site, expires=ends, grace="0s")
    assert lease(site, call, pushed)["exp"] == NOW + 600
    issue(site, expires=ends, grace="1h")
    assert lease(site, call, pushed)["exp"] == NOW + 4200, "grace is still a right, with a warning"


def test_a_clock_that_is_far_ahead_signs_no_time_of_its_own(site: Site, pushed: Pushed) -> None:
    """A runtime's lowest time rises by a lease's `iat` for good: two bad months here must not end every start there."""
    key = key_of(site)
    near = lease(site, call_of(site, key, NOW + 20 * 86400), pushed)
    assert near["iat"] == NOW + 20 * 86400
    call = call_of(site, key, NOW + 60 * 86400)
    far = lease(site, call, pushed)
    assert NOW - 3600 < far["iat"] <= NOW + 3600 and far["exp"] == int(call.now) + 86400 and far["renew_after"] - far["iat"] == 12960
    assert far["nbf"] < far["iat"] and site.floor.at < NOW + 3600


def test_rows(site: Site) -> None:
    make_key(site, "acme")
    wish = Wish("acme/tiny", "sha256:m", "sha256:p", "p1", "h1", ("GPU-1",))

    def add(wish: Wish, jti: str, ent_jti: str = "e") -> int:
        with site.catalog.writing() as conn:
            org_id, serial = leases.hold(conn, "acme")
            leases.add(conn, org_id, serial, wish, jti=jti, key_id="k", iat=0.0, exp=100.0, ent_jti=ent_jti, grant_id="g", environment="dev")
            return serial

    def leased(wish: Wish, now: float = 50, grant_id: str = "") -> int:
        with site.catalog.writing() as conn:
            return leases.gpus_leased(conn, leases.hold(conn, "acme")[0], now, wish, grant_id=grant_id)

    none = replace(wish, host="", gpus=())
    assert [add(wish, f"j{i}") for i in range(3)] == [1, 2, 3] and leased(none) == 1 and leased(wish) == 0
    add(replace(wish, host="h2"), "k1")  # the same text on another host is another GPU
    add(replace(wish, gpus=("GPU-1", "GPU-2")), "k2")
    add(replace(wish, host="h3", gpus=()), "k3")  # a CPU node counts 0
    add(replace(wish, host="h4"), "k4", ent_jti="")  # of own weights: no entitlement is used up
    assert (leased(none), leased(wish), leased(none, 100), leased(none, grant_id="g"), leased(none, grant_id="x")) == (3, 2, 0, 4, 0)
    assert row(site, "j2").replaced_by == "k2"
    with site.catalog.writing() as conn:
        assert leases.end(conn, "k2", "returned_at", 50) and not leases.end(conn, "k2", "returned_at", 60)
    assert leased(none) == 1
