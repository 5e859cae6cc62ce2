"""Organisations, people, keys and grants by the verbs of the guard, on both databases."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import insert, select, update

from artifact.errors import AirlockError, Conflict, Denied, Invalid, NotFound, Unauthenticated
from artifact.store import Call
from registry import tables as t
from registry.issuance import Issuance
from registry.library import local_call
from registry.settings import Settings
from registry.wiring import Site, open_site
from tests.site import BACKENDS, call_of, running_site

NOW = time.time()


class Acts:
    """The verbs as one caller uses them; `call` is made anew for each, as each request makes it."""

    def __init__(self, site: Site, key: str = "") -> None:
        desk = (site.engine, site.entitlements, site.audit)
        self.site, self.key = site, key
        self.roster = site.guard.roster if key else type(site.guard.roster)(*desk)
        self.issuance = site.guard.issuance if key else Issuance(*desk)

    @property
    def call(self) -> Call:
        return call_of(self.site, self.key) if self.key else local_call(time.time())

    def __call__(self, verb: str, **body: object) -> dict[str, Any]:
        part = self.roster if hasattr(self.roster, verb) else self.issuance
        return getattr(part, verb)(self.call, body)

    def new_key(self, **body: object) -> tuple[str, str]:
        made = self("create_key", **body)
        return str(made["key_id"]), str(made["key"])

    def list(self, verb: str, *args: object) -> list[dict[str, Any]]:
        part = self.roster if hasattr(self.roster, verb) else self.issuance
        return getattr(part, verb)(self.call, *args)["items"]


@pytest.fixture(params=BACKENDS)
def site(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Site]:
    with running_site(tmp_path, request.param) as found:
        yield found


@pytest.fixture
def root(site: Site) -> Acts:
    return Acts(site)


@pytest.fixture
def lead(root: Acts) -> Acts:
    """An administrator of acme with a personal key for 90 days, which has its rights by the role alone."""
    root("create_org", name="acme")
    root("create_org", name="other")
    root("create_member", org="acme", name="ann", role="admin")
    return Acts(root.site, root.new_key(org="acme", member="ann", tier="developer")[1])


def refused(kind: type[AirlockError], reason: str, act: Callable[[], object]) -> AirlockError:
    with pytest.raises(kind) as caught:
        act()
    assert caught.value.reason == reason, caught.value
    return caught.value


def events(site: Site) -> list[dict[str, Any]]:
    with site.catalog.reading() as conn:
        return [json.loads(row.body) | {"class": row[1]} for row in conn.execute(select(t.audit_pending).order_by(t.audit_pending.c.id))]


def test_a_role_is_a_grant_and_the_key_of_a_member_has_it(lead: Acts) -> None:
    assert lead.call.principal.grants[0].models == ("acme/**",)
    lead("create_team", name="research")
    lead("create_member", name="bob")
    lead("join", name="research", member="bob")
    assert lead.list("teams", "acme")[0]["members"] == ["bob"]
    lead("create_grant", team="research", models=["acme/m"], actions=["pull"], expires="30d")
    bob = Acts(lead.site, lead.new_key(member="bob", expires="30d")[1])
    assert [g.models for g in bob.call.principal.grants] == [("acme/m",)]
    lead("leave", name="research", member="bob")
    assert bob.call.principal.grants == ()
    lead("join", name="research", member="bob")
    lead("close_team", name="research")
    assert bob.call.principal.grants == ()
    lead("disable", name="bob")
    refused(Unauthenticated, "member_disabled", lambda: bob.call)


def test_a_role_that_changes_leaves_its_grant_revoked(root: Acts, lead: Acts) -> None:
    root("set_role", org="acme", name="ann", role="auditor")
    refused(Denied, "action_missing", lambda: lead("create_team", name="x"))
    assert [m["role"] for m in lead.list("members", "acme")] == ["auditor"]
    root("set_role", org="acme", name="ann", role="member")
    assert lead.call.principal.grants == ()
    refused(Denied, "action_missing", lambda: lead.list("members", "acme"))
    roles = [g for g in root.list("grants", "acme") if g["grant_id"].startswith("role-")]
    assert len(roles) == 2 and all(g["revoked"] for g in roles)


ESCAPES: list[tuple[str, Mapping[str, object]]] = [
    ("create_org", {"name": "mine"}),
    ("close_org", {"name": "acme"}),
    ("create_team", {"org": "other", "name": "x"}),
    ("create_member", {"org": "other", "name": "x"}),
    ("create_member", {"org": "site", "name": "x", "role": "admin"}),
    ("create_key", {"org": "other", "models": ["other/m"], "expires": "1d"}),
    ("create_key", {"models": ["**"], "expires": "1d"}),
    ("create_key", {"models": ["*/**"], "expires": "1d"}),
    ("create_key", {"models": ["other/m"], "expires": "1d"}),
    ("create_key", {"models": ["acme/m"], "expires": "never"}),
    ("create_key", {"models": ["acme/m"], "expires": "91d"}),
    ("create_key", {"models": ["acme/m"], "expires": "1d", "tier": "enterprise"}),
    ("create_key", {"models": ["acme/m"], "expires": "1d", "environment": "dev"}),
    ("create_grant", {"models": ["**"], "expires": "1d"}),
    ("create_grant", {"models": ["hf/**"], "expires": "1d", "member": "ann"}),
    ("create_grant", {"models": ["acme/**"], "actions": ["admin"]}),
    ("create_grant", {"org": "other", "models": ["acme/**"], "expires": "1d"}),
]


@pytest.mark.slow
@pytest.mark.parametrize(("verb", "body"), ESCAPES)
def test_an_administrator_of_one_organisation_stays_inside(lead: Acts, verb: str, body: dict[str, object]) -> None:
    before = len(Acts(lead.site).list("keys")) + len(Acts(lead.site).list("grants"))
    refused(Denied, "action_missing", lambda: lead(verb, **body))
    assert len(Acts(lead.site).list("keys")) + len(Acts(lead.site).list("grants")) == before
    lead.site.audit.flush()
    assert [e for e in events(lead.site) if e["class"] == "C" and e["reason"] == "action_missing"]


@pytest.mark.slow
@pytest.mark.parametrize("field", ["is_admin", "role", "hmac", "org_id", "revoked_at", "actions ", "member_id"])
def test_fields_that_a_body_has_no_business_with_are_refused(lead: Acts, field: str) -> None:
    refused(Invalid, "body", lambda: lead("create_key", models=["acme/m"], expires="1d", **{field: True}))


def test_rights_that_others_gave_are_no_way_out(root: Acts, lead: Acts) -> None:
    """A team, a member and a key with more than the administrator has: none of it can be taken over."""
    root("create_team", org="acme", name="wide")
    root("create_grant", org="acme", team="wide", models=["hf/**"])
    refused(Denied, "action_missing", lambda: lead("join", name="wide", member="ann"))
    root("create_member", org="acme", name="bob")
    root("create_grant", org="acme", member="bob", models=["hf/**"])
    refused(Denied, "action_missing", lambda: lead("create_key", member="bob", expires="1d"))
    key_id, _ = root.new_key(org="acme", models=["**"], actions=["admin"])
    refused(Denied, "action_missing", lambda: lead("rotate_key", key_id=key_id, expires="1d"))
    own = root("create_grant", org="acme", models=["hf/x"], expires="1d")
    refused(Denied, "action_missing", lambda: lead("extend_grant", grant_id=own["grant_id"], expires="2d"))
    foreign, _ = root.new_key(org="other", models=["other/m"])
    for verb in ("revoke_key", "rotate_key"):
        refused(NotFound, "key", lambda verb=verb: lead(verb, key_id=foreign))
    strange = root("create_grant", org="other", models=["other/m"])["grant_id"]
    refused(NotFound, "grant", lambda: lead("revoke_grant", grant_id=strange))
    refused(NotFound, "key", lambda: lead.issuance.key(lead.call, foreign))
    refused(NotFound, "key", lambda: lead("create_grant", models=["acme/m"], expires="1d", key=foreign))


def test_an_organisation_called_like_a_name_of_ours_does_not_make_the_site(root: Acts) -> None:
    root("create_org", name="every")
    root("create_member", org="every", name="eve", role="admin")
    eve = Acts(root.site, root.new_key(org="every", member="eve")[1])
    refused(Denied, "action_missing", lambda: eve("create_org", name="mine"))
    with pytest.raises(Denied):
        root.site.guard.upkeep.rules(eve.call)


def test_what_an_administrator_of_one_organisation_does(lead: Acts) -> None:
    lead("create_member", name="robot", kind="robot")
    refused(Invalid, "type", lambda: lead("create_key", member="robot", type="personal", expires="1d"))
    key_id, key = lead.new_key(member="robot", models=["acme/m"], expires="1d", type="runtime")
    robot = Acts(lead.site, key)
    assert [k["key_id"] for k in robot.list("keys")] == [key_id] and robot.list("keys")[0]["member"] == "robot"
    assert [g["models"] for g in robot.list("grants")] == [["acme/m"]]
    refused(Denied, "action_missing", lambda: robot.list("keys", "acme-else"))
    refused(Denied, "action_missing", lambda: robot.list("members", "acme"))
    assert {k["key_id"] for k in lead.list("keys")} > {key_id}
    grant = lead("create_grant", key=key_id, models=["acme/n"], actions=["pull", "run"], expires="2d", gpus=2)
    assert {g["grant_id"] for g in lead.issuance.key(lead.call, key_id)["grants"]} > {grant["grant_id"]}
    assert lead("extend_grant", grant_id=grant["grant_id"], expires="3d", grace="1d")["grace_s"] == 86400
    assert lead("revoke_grant", grant_id=grant["grant_id"])["state"] == "revoked"
    assert lead("revoke_grant", grant_id=grant["grant_id"])["state"] == "was revoked before"
    assert [g.models for g in robot.call.principal.grants] == [("acme/m",)]
    assert lead("revoke_key", key_id=key_id)["state"] == "revoked"
    refused(Unauthenticated, "key_revoked", lambda: robot.call)
    names = [e["event"] for e in events(lead.site) if e["class"] == "A" and e["key_id"] != "local"]
    assert names == ["member_create", "key_create", "grant_create", "grant_extend", "grant_revoke", "key_revoke"]


def test_nothing_twice_and_nothing_in_what_was_ended(root: Acts, lead: Acts) -> None:
    refused(Conflict, "exists", lambda: root("create_org", name="acme"))
    root("create_team", org="acme", name="t")
    refused(Conflict, "exists", lambda: root("create_team", org="acme", name="t"))
    refused(Conflict, "exists", lambda: root("create_member", org="acme", name="ann"))
    root("join", org="acme", name="t", member="ann")
    refused(Conflict, "exists", lambda: root("join", org="acme", name="t", member="ann"))
    root("close_team", org="acme", name="t")
    refused(Conflict, "ended", lambda: root("close_team", org="acme", name="t"))
    refused(Conflict, "team_closed", lambda: root("join", org="acme", name="t", member="ann"))
    root("disable", org="acme", name="ann")
    refused(Conflict, "member_disabled", lambda: root("create_key", org="acme", member="ann"))
    for verb, body in [("leave", {"name": "t", "member": "bob"}), ("close_team", {"name": "no"}), ("disable", {"name": "no"})]:
        with pytest.raises(NotFound):
            root(verb, org="acme", **body)
    root("close_org", name="acme")
    refused(Conflict, "ended", lambda: root("close_org", name="acme"))
    refused(Conflict, "org_closed", lambda: root("create_key", org="acme", models=["acme/m"]))
    assert root.roster.org(root.call, "acme")["closed"]


def test_what_was_closed_or_disabled_by_mistake_comes_back(root: Acts, lead: Acts) -> None:
    root("close_org", name="acme")
    refused(Unauthenticated, "org_closed", lambda: lead.call)
    root("open_org", name="acme")
    refused(Conflict, "not_ended", lambda: root("open_org", name="acme"))
    lead("create_member", name="bob")
    lead("disable", name="bob")
    assert lead("enable", name="bob")["disabled"] == ""
    lead("disable", name="bob")
    with root.site.catalog.writing() as conn:  # what it was given before it was disabled
        conn.execute(update(t.member).where(t.member.c.name == "bob").values(disabled_at=0.0))
    root("create_grant", org="acme", member="bob", models=["hf/**"])
    lead("disable", name="bob")
    refused(Denied, "action_missing", lambda: lead("enable", name="bob"))
    assert [m["disabled"] != "" for m in lead.list("members", "acme")] == [False, True]
    root("enable", org="acme", name="bob")


def test_two_administrators_at_once(root: Acts) -> None:
    """Every verb is run by eight threads at once: one is first, the others are told so, and nothing breaks."""
    outcomes: list[object] = []

    def at_once(act: Callable[[], object]) -> list[object]:
        outcomes.clear()
        start = threading.Barrier(8)

        def one() -> None:
            start.wait()
            try:
                outcomes.append(act())
            except AirlockError as error:
                outcomes.append(error)

        threads = [threading.Thread(target=one) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return [o for o in outcomes if isinstance(o, dict)]

    assert len(at_once(lambda: root("create_org", name="acme"))) == 1
    assert len(at_once(lambda: root("create_member", org="acme", name="ann", role="admin"))) == 1
    key_id, _ = root.new_key(org="acme", models=["acme/m"])
    assert len(at_once(lambda: root("rotate_key", key_id=key_id))) == 1
    assert all(isinstance(o, dict | Conflict) for o in outcomes)
    assert len(at_once(lambda: root("close_org", name="acme"))) == 1
    assert all(isinstance(o, dict | Conflict) for o in outcomes)


def document(site: Site, max_keys: int) -> None:
    """A document of acme as the import of one leaves it."""
    texts = {name: "[]" for name in ("models", "actions", "products", "environments")}
    row = {"jti": "j", "issuer": "i", "kid": "k", "serial": 1, "tier": "enterprise", "max_keys": max_keys, "iat": 0.0, "not_before": 0.0}
    with site.catalog.writing() as conn:
        org_id = conn.execute(select(t.org.c.id).where(t.org.c.name == "acme")).scalar_one()
        conn.execute(insert(t.entitlement).values(org_id=org_id, expires=NOW + 1e6, token="", at=0.0, **texts, **row))
        found = conn.execute(select(t.entitlement.c.id)).scalar_one()
        conn.execute(update(t.org).where(t.org.c.id == org_id).values(entitlement_id=found))


def test_no_more_keys_than_the_document_allows(root: Acts) -> None:
    root("create_org", name="acme")
    document(root.site, 2)
    first, _ = root.new_key(org="acme", models=["acme/m"])
    made: list[object] = []

    def one() -> None:
        try:
            made.append(root("create_key", org="acme", models=["acme/m"]))
        except Conflict as error:
            made.append(error.reason)

    threads = [threading.Thread(target=one) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(m for m in made if isinstance(m, str)) == ["max_keys"] * 5
    successor = root("rotate_key", key_id=first)  # the one that it replaces ends
    refused(Conflict, "rotated", lambda: root("rotate_key", key_id=str(successor["key_id"])))
    root("revoke_key", key_id=first)
    refused(Conflict, "max_keys", lambda: root("create_key", org="acme", models=["acme/m"]))
    root("revoke_key", key_id=str(successor["key_id"]))
    root.new_key(org="acme", models=["acme/m"])


def test_rotation_overlaps_and_keeps_every_right(root: Acts) -> None:
    root("create_org", name="acme")
    root("create_member", org="acme", name="bot", kind="robot")
    key_id, key = root.new_key(org="acme", member="bot", models=["acme/m"], gpus=3, profiles=["tp*"], expires="30d", note="ci")
    root("create_grant", org="acme", member="bot", models=["acme/n"])
    refused(Invalid, "overlap", lambda: root("rotate_key", key_id=key_id, overlap="91d"))
    made = root("rotate_key", key_id=key_id, overlap="7d", expires="90d", prefix="nvapi-acme-")
    old, new = call_of(root.site, key).principal, call_of(root.site, str(made["key"])).principal
    assert sorted((g.models, g.gpus, g.profiles) for g in old.grants) == sorted((g.models, g.gpus, g.profiles) for g in new.grants)
    assert str(made["key"]).startswith("nvapi-acme-") and made["replaces"] == key_id
    assert 6.9 * 86400 < old.expires - time.time() <= 7 * 86400 < new.expires - time.time()
    with pytest.raises(Unauthenticated, match="expired"):
        call_of(root.site, key, time.time() + 8 * 86400)
    call_of(root.site, str(made["key"]), time.time() + 8 * 86400)
    refused(Conflict, "rotated", lambda: root("rotate_key", key_id=key_id))
    other, other_key = root.new_key(org="acme", models=["acme/m"])
    root("rotate_key", key_id=other, overlap="0s")
    refused(Unauthenticated, "key_revoked", lambda: call_of(root.site, other_key, time.time() + 1))
    refused(Conflict, "key_revoked", lambda: root("rotate_key", key_id=other))


@pytest.mark.slow
def test_the_pepper_is_replaced_under_the_keys(root: Acts) -> None:
    """Keys of the old pepper are accepted, rewritten outside of the read, and outlive the old one's removal; new ones never needed it."""
    site = root.site
    key_id, key = root.new_key(org="acme", models=["acme/m"])
    _, unused = root.new_key(org="acme", models=["acme/m"])
    before = {path.name: path.read_bytes() for path in (site.home.path / "secrets").iterdir() if path.is_file()}
    site.home.keys.rotate("pepper")
    site.home.keys.rotate("pepper")
    assert len(site.home.peppers()) == 3
    again = open_site(site.settings, background=False)  # its database learns the new pepper here
    try:
        assert call_of(again, key).principal.key_id == key_id
        assert again.guard.caller(key, "r", time.time(), "127.0.0.1", ("manifest", "acme/m", "1")).principal.key_id == key_id
        assert again.entitlements.usage.flush() == 1 and again.entitlements.usage.flush() == 0
        _, fresh = Acts(again).new_key(org="acme", models=["acme/m"])
    finally:
        again.close()
    for path in (site.home.path / "secrets" / "previous").glob("pepper.*"):
        path.unlink()
    alone = open_site(site.settings, background=False)
    try:
        assert call_of(alone, key).principal.key_id == key_id and call_of(alone, fresh)
        refused(Unauthenticated, "key_invalid", lambda: call_of(alone, unused))
        shown = Acts(alone).list("keys")[0]
        assert shown["last_used"] and shown["state"] == "active"
    finally:
        alone.close()
    (site.home.path / "secrets" / "pepper").write_bytes(before["pepper"])
    refused(Conflict, "pepper", lambda: open_site(site.settings, background=False))


def test_a_dump_of_the_database_holds_no_key_and_no_pepper(root: Acts) -> None:
    keys = [root.new_key(org="acme", models=["acme/m"])[1] for _ in range(3)]
    keys.append(str(root("rotate_key", key_id=root.list("keys")[0]["key_id"])["key"]))
    keys.append(str(Acts(root.site).issuance.first_key(root.call).get("key", "nvapi-none")))
    site = root.site
    site.audit.flush()
    with site.catalog.reading() as conn:
        rows = [tuple(row) for table in t.metadata.sorted_tables for row in conn.execute(select(table))]
    dump = repr(rows).encode() + b"".join(value for row in rows for value in row if isinstance(value, bytes))
    pepper = site.home.pepper()
    for secret in (*(key.encode() for key in keys), *(key[6:30].encode() for key in keys), pepper, pepper.hex().encode()):
        assert secret not in dump
    assert dump.count(b"key-") > 3


def test_the_first_key_ends_with_what_it_makes(site: Site) -> None:
    acts = Acts(site)
    first = acts.issuance.first_key(acts.call)
    second = acts.issuance.first_key(acts.call)  # another server process, or a start after one whose output was lost
    admin = Acts(site, str(first["key"]))
    admin("create_org", name="acme")
    refused(Conflict, "first", lambda: admin("rotate_key", key_id=str(first["key_id"])))
    made = admin("create_key", org="site", models=["**"], actions=["admin"], expires="never")
    for key in (first["key"], second["key"]):
        refused(Unauthenticated, "key_revoked", lambda key=key: call_of(site, str(key), time.time() + 1))
    assert Acts(site, str(made["key"])).list("orgs") and acts.issuance.first_key(acts.call) == {}


def test_pages(root: Acts) -> None:
    for i in range(5):
        root("create_org", name=f"org{i}")
        root.new_key(org="org0", models=["org0/m"])
    names, after = [], ""
    while True:
        found = root.roster.orgs(root.call, after, 2)
        names += [item["name"] for item in found["items"]]
        after = str(found["after"])
        if not after:
            break
    assert names == [f"org{i}" for i in range(5)]
    first = root.issuance.keys(root.call, "org0", 0, 3)
    rest = root.issuance.keys(root.call, "org0", int(str(first["after"])), 3)
    assert len(first["items"]) == 3 and len(rest["items"]) == 2 and rest["after"] == 0
    assert {k["key_id"] for k in first["items"]} & {k["key_id"] for k in rest["items"]} == set()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("verb", "body"),
    [
        ("create_org", {}),
        ("create_org", {"name": "Acme"}),
        ("create_org", {"name": "hf"}),
        ("create_org", {"name": "a/b"}),
        ("create_org", {"name": 7}),
        ("create_member", {"org": "acme", "name": "a b"}),
        ("create_member", {"org": "acme", "name": "a@b@c"}),
        ("create_member", {"org": "acme", "name": "a", "kind": "ghost"}),
        ("create_member", {"org": "acme", "name": "a", "role": "root"}),
        ("create_key", {"org": "acme"}),
        ("create_key", {"org": "acme", "models": "acme/*"}),
        ("create_key", {"org": "acme", "models": ["acme/**/x"]}),
        ("create_key", {"org": "acme", "models": ["acme/x"], "actions": ["fly"]}),
        ("create_key", {"org": "acme", "models": ["acme/x"], "tier": "gold"}),
        ("create_key", {"org": "acme", "models": ["acme/x"], "type": "first"}),
        ("create_key", {"org": "acme", "models": ["acme/x"], "type": "personal"}),
        ("create_key", {"org": "acme", "models": ["acme/x"], "prefix": "acme-"}),
        ("create_key", {"org": "acme", "models": ["acme/x"], "expires": "2020-01-01T00:00:00Z"}),
        ("create_key", {"org": "acme", "models": ["acme/x"], "expires": "2030-13-01T00:00:00Z"}),
        ("create_key", {"org": "acme", "models": ["acme/x"], "gpus": -1}),
        ("create_key", {"org": "acme", "models": ["acme/x"], "gpus": True}),
        ("create_key", {"org": "acme", "models": ["acme/x"], "environment": "moon"}),
        ("create_key", {"org": "acme", "models": ["acme/x"], "note": "a\nb"}),
        ("create_key", {"org": "acme", "models": ["acme/x"], "note": "\ud800"}),
        ("create_grant", {"org": "acme", "models": []}),
        ("create_grant", {"org": "acme", "models": ["acme/x"], "member": "a", "team": "b"}),
        ("create_grant", {"org": "acme", "models": ["acme/x"], "expires": "1d", "not_before": "2d"}),
    ],
)
def test_input_that_is_refused(root: Acts, verb: str, body: dict[str, object]) -> None:
    if verb != "create_org":
        root("create_org", name="acme")
    with pytest.raises(Invalid):
        root(verb, **body)
    assert root.list("keys") == [] and root.list("grants") == []


def test_the_prefix_is_a_setting(tmp_path: Path) -> None:
    with running_site(tmp_path, AIRLOCK_KEY_PREFIX="nvapi-lab7-") as site:
        key = Acts(site).new_key(org="acme", models=["acme/m"])[1]
        assert key.startswith("nvapi-lab7-") and call_of(site, key).principal.org == "acme"
    for bad in ("acme-", "nvapi", "nvapi-A-", "NVAPI-", "nvapi--", "nvapi-a b-", "alt1."):
        refused(Invalid, "setting", lambda bad=bad: Settings.load(tmp_path, environ={**os.environ, "AIRLOCK_KEY_PREFIX": bad}))
