"""Access control verb by verb: who sees what, in which words, what is on record, and how many statements it costs."""

from __future__ import annotations

import contextlib
import inspect
import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event, select

from artifact import manifest as m
from artifact.errors import AirlockError, Denied, Invalid, NotFound, Throttled, Unauthenticated, Unavailable
from artifact.grant import Access, Principal
from artifact.store import Call, Change, Files, Registry
from artifact.trust import verify_jws
from registry import catalog as c
from registry import tables as t
from registry.entitlements import new_key
from registry.guard import Guard
from registry.library import Library
from registry.pace import CHANGES
from registry.wiring import Site
from tests.site import BACKENDS, SQLITE_ONLY, Pushed, call_of, make_key, push_model, put, running_site


@pytest.fixture(params=BACKENDS)
def site(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Site]:
    with running_site(tmp_path, request.param) as opened:
        yield opened


@pytest.fixture
def pushed(site: Site) -> Pushed:
    return push_model(site, call_of(site, make_key(site, "acme")), "acme/tiny", "1")


def verbs(site: Site, pushed: Pushed) -> dict[str, Callable[[Call], object]]:
    """Every verb of the guard on one repository."""
    g, name, digest = site.guard, pushed.name, pushed.model.digest
    body: dict[str, object] = {
        "model": name,
        "ref": "1",
        "profile_digest": pushed.profiles.digest,
        "profile_id": pushed.profile_id,
        "host": "h",
        "gpu_uuids": [],
    }
    return {
        "resolve": lambda call: g.resolve(call, name, "1"),
        "stat": lambda call: g.stat(call, name, digest),
        "read": lambda call: g.read(call, name, digest),
        "upload": lambda call: g.upload(call, name),
        "resume": lambda call: g.resume(call, name, "upload-none"),
        "demand_push": lambda call: g.demand_push(call, name),
        "push": lambda call: g.push(call, name, b"{}", m.MANIFEST, refs=["2"]),
        "mount": lambda call: g.mount(call, name, digest, name),
        "delete": lambda call: g.delete(call, name, "1"),
        "refs": lambda call: g.refs(call, name),
        "referrers": lambda call: g.referrers(call, name, digest),
        "revision": lambda call: g.revision(call, name, "1"),
        "file": lambda call: g.file(call, name, "1", "config.json"),
        "files": lambda call: g.files(call, name, "1"),
        "commit": lambda call: g.commit(call, name, "main", None, [Change("x.txt", m.EMPTY_DIGEST, 2)]),
        "catalog_show": lambda call: g.catalog_show(call, name),
        "lease": lambda call: g.lease(call, body),
    }


def audit(site: Site, kind: str = "") -> list[dict[str, Any]]:
    with site.catalog.reading() as conn:
        rows = conn.execute(select(t.audit_pending).order_by(t.audit_pending.c.id)).mappings().all()
    return [json.loads(row["body"]) for row in rows if not kind or row["class"] == kind]


def counters(site: Site) -> list[tuple[str, int, dict[str, Any]]]:
    site.audit.flush()
    with site.catalog.reading() as conn:
        return [(r["class"], r["n"], json.loads(r["body"])) for r in conn.execute(select(t.audit_count)).mappings()]


def test_every_verb_of_the_interfaces_is_written_out() -> None:
    for interface in (Registry, Files):
        for name in interface.__abstractmethods__:
            assert name in vars(Guard) and name in vars(Library), name
    assert "__getattr__" not in vars(Guard)


def test_every_public_verb_is_in_the_table(site: Site, pushed: Pushed) -> None:
    public = {n for n, f in inspect.getmembers(Guard, inspect.isfunction) if not n.startswith("_")}
    assert public - set(verbs(site, pushed)) == {
        *("caller", "attach", "recorded", "token", "ping", "whoami", "paced", "standing", "list", "catalog_list", "served"),
        *("beside_store", "open_log"),
    }


def test_no_verb_leaks_another_organisations_name(site: Site, pushed: Pushed) -> None:
    call = call_of(site, make_key(site, "beta", "beta/*", "acme/*", "**"))
    absent = Pushed("acme/absent", pushed.model, pushed.profiles, pushed.profile_id, {})
    for name, verb in verbs(site, pushed).items():
        told = []
        for use in (verb, verbs(site, absent)[name]):
            with pytest.raises(NotFound) as caught:
                use(call)
            told.append((caught.value.reason, str(caught.value)))
        assert told[0] == told[1] and told[0][0] == "not_visible", name
    assert site.guard.list(call).items == () and site.guard.catalog_list(call)["items"] == []
    assert site.guard.list(call_of(site, make_key(site, "acme"))).items == ("acme/tiny", "acme/tiny/profiles")


def test_visible_but_not_entitled(site: Site, pushed: Pushed) -> None:
    call = call_of(site, make_key(site, "acme", "acme/other"))
    for name, verb in verbs(site, pushed).items():
        if name == "catalog_show":
            assert site.guard.catalog_show(call, pushed.name)["entitled"] is False
            continue
        with pytest.raises(Denied) as caught:
            verb(call)
        assert caught.value.reason == "no_grant" and caught.value.do, name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("actions", "allowed"),
    [
        (("pull",), {"resolve", "stat", "read", "refs", "referrers", "revision", "file", "files", "catalog_show"}),
        (("push",), {"resolve", "stat", "refs", "referrers", "upload", "resume", "demand_push", "push", "commit", "mount", "delete", "catalog_show"}),
        (("create",), {"resolve", "stat", "refs", "referrers", "upload", "resume", "demand_push", "push", "commit", "mount", "catalog_show"}),
        (("auditor",), {"refs", "referrers", "catalog_show"}),
        (("run",), {"lease", "catalog_show"}),
    ],
)
def test_actions(site: Site, pushed: Pushed, actions: tuple[str, ...], allowed: set[str]) -> None:
    call = call_of(site, make_key(site, "acme", actions=actions))
    for name, verb in verbs(site, pushed).items():
        try:
            verb(call)
            refused = False
        except Denied as error:
            assert error.reason == "action_missing"
            refused = True
        except (NotFound, Invalid):
            refused = False  # allowed, and then without its object
        assert refused == (name not in allowed), name


def test_profiles_are_decided_as_their_model(site: Site, pushed: Pushed) -> None:
    call = call_of(site, make_key(site, "acme", "acme/tiny"))
    assert site.guard.resolve(call, "acme/tiny/profiles", "1").digest == pushed.profiles.digest
    with site.catalog.writing() as conn:
        conn.execute(t.repository.update().where(t.repository.c.name == "acme/tiny").values(visibility="private", requires_tier="enterprise"))
    with pytest.raises(Denied) as caught:
        site.guard.resolve(call, "acme/tiny/profiles", "1")
    assert caught.value.reason == "tier_missing"
    with pytest.raises(NotFound):
        site.guard.resolve(call_of(site, make_key(site, "acme", "acme/x")), "acme/tiny/profiles", "1")
    assert site.guard.list(call_of(site, make_key(site, "acme", "acme/x"))).items == ()


def test_keys_that_prove_nothing_and_keys_that_died(site: Site) -> None:
    now = time.time()
    told = {}
    for name, key in (("absent", None), ("empty", ""), ("garbage", "nvapi-x"), ("unknown", new_key())):
        with pytest.raises(Unauthenticated) as caught:
            site.guard.caller(key, "r", now)
        told[name] = str(caught.value)
        assert caught.value.reason == ("key_invalid" if name in ("garbage", "unknown") else "key_absent")
    assert len(set(told.values())) == 1, "one text for all"
    expired, revoked = make_key(site, "acme", expires=now - 10), make_key(site, "acme")
    principal = site.entitlements.principal(revoked)
    assert principal is not None
    with site.catalog.writing() as conn:
        site.entitlements.revoke(conn, principal.key_id, now - 5)
    for key, reason in ((expired, "key_expired"), (revoked, "key_revoked")):
        with pytest.raises(Unauthenticated) as caught:
            site.guard.caller(key, "r", now)
        assert caught.value.reason == reason and "T" in caught.value.what and key not in str(caught.value.as_dict())


def test_a_call_that_outlived_its_key_is_refused(site: Site, pushed: Pushed) -> None:
    now = time.time()
    call = call_of(site, make_key(site, "acme", expires=now + 60))
    later = Call(call.principal, None, "r", now + 61)
    for verb in [*verbs(site, pushed).values(), site.guard.list, site.guard.catalog_list]:
        with pytest.raises((Unauthenticated, NotFound)):
            verb(later)
    with pytest.raises((Unauthenticated, NotFound)):
        site.guard.list(Call(Principal()))


@pytest.mark.slow
def test_a_key_that_floods_is_slowed_and_no_other(site: Site) -> None:
    flood, other = (call_of(site, make_key(site, "acme", "acme/**")) for _ in range(2))
    for _ in range(CHANGES):
        site.guard.paced(flood)
    with pytest.raises(Throttled, match="too many changes") as refused:
        site.guard.paced(flood)
    assert 0 < int(refused.value.ids["retry_after"]) <= 60
    site.guard.paced(other)
    site.guard.paced(replace(flood, now=flood.now + 60))


def test_whoami(site: Site) -> None:
    call = call_of(site, make_key(site, "acme", tier="enterprise", expires=4_000_000_000))
    assert site.guard.whoami(call) == {"key_id": call.principal.key_id, "org": "acme", "tier": "enterprise", "expires": "2096-10-02T07:06:40Z"}


def test_who_may_push_under_a_new_name(site: Site) -> None:
    make_key(site, "beta")
    acme = call_of(site, make_key(site, "acme", "**"))
    assert put(site, acme, "acme/new", b"x").size == 1
    for name, error, reason in (
        ("beta/new", NotFound, "not_visible"),
        ("hf/meta/x", Denied, "no_org"),
        ("tiny", Denied, "no_org"),
        ("acme", Denied, "no_org"),
    ):
        with pytest.raises(error) as caught:
            site.guard.upload(acme, name)
        assert caught.value.reason == reason, name
    with pytest.raises(Invalid):
        site.guard.upload(acme, "v2/x")
    admin = call_of(site, make_key(site, "acme", "hf/**", actions=("admin",)))
    put(site, admin, "hf/meta/x", b"x")
    found = site.catalog.repository("hf/meta/x")
    assert found is not None and (found.subject.org, found.subject.visibility) == ("", "public")


def test_a_push_does_not_tell_which_organisations_there_are(site: Site) -> None:
    make_key(site, "beta")
    for models, actions in ((("**",), ("push",)), (("acme/*",), ("push",)), (("**",), ("pull",)), (("acme/*",), ("create",))):
        call = call_of(site, make_key(site, "acme", *models, actions=actions))
        told = []
        for name in ("beta/probe", "nobd/probe"):
            with pytest.raises(NotFound) as caught:
                site.guard.upload(call, name)
            told.append((caught.value.reason, str(caught.value)))
            asked = [Access("repository", name, ("pull", "push"))]
            assert site.guard.token(call, asked, "r", time.time())[1] == ()
        assert told[0] == told[1] and told[0][0] == "not_visible"
    put(site, call_of(site, make_key(site, "acme", "**", actions=("admin",))), "nobd/probe", b"x")


def test_a_key_sees_no_less_than_nobody(tmp_path: Path) -> None:
    with running_site(tmp_path, AIRLOCK_ANONYMOUS="on") as site:
        found = push_model(site, call_of(site, make_key(site, "acme")), "acme/tiny", "1")
        calls = [site.guard.caller(None, "r", time.time()), call_of(site, make_key(site, "beta")), call_of(site, make_key(site, "acme", "acme/x"))]

        def reads(call: Call) -> list[str]:
            out = []
            for name, verb in verbs(site, found).items():
                with contextlib.suppress(AirlockError):
                    verb(call)
                    out.append(name)
            return out

        with site.catalog.writing() as conn:
            conn.execute(t.repository.update().values(visibility="public"))
        for call in calls:
            assert {"resolve", "stat", "read", "refs", "file"} <= set(reads(call)) and "upload" not in reads(call) and "delete" not in reads(call)
        given = site.guard.token(calls[1], [Access("repository", "acme/tiny", ("pull", "push"))], "r", time.time())[1]
        assert [a.actions for a in given] == [("pull", "list")]
        shown = site.guard.catalog_show(calls[1], "acme/tiny")
        assert shown["entitled"] and shown["refs"] and shown["profiles"]
        with site.catalog.writing() as conn:
            conn.execute(t.repository.update().values(requires_tier="enterprise"))
        assert [reads(call) for call in calls[:2]] == [[], ["catalog_show"]]


def test_the_catalog_lists_refs_for_who_may_list_them(site: Site, pushed: Pushed) -> None:
    for actions, listed in ((("pull",), True), (("create",), True), (("auditor",), True), (("run",), False)):
        shown = site.guard.catalog_show(call_of(site, make_key(site, "acme", actions=actions)), "acme/tiny")
        assert (bool(shown["refs"]), bool(shown["profiles"])) == (listed, listed), actions


def test_mount_needs_the_right_to_pull_the_source(site: Site, pushed: Pushed) -> None:
    _, file = site.guard.file(call_of(site, make_key(site, "acme")), "acme/tiny", "1", "config.json")
    beta = call_of(site, make_key(site, "beta", "**"))
    assert site.guard.mount(beta, "beta/x", file.digest, "acme/tiny") is None
    assert site.guard.mount(beta, "beta/x", file.digest, "acme/absent") is None
    narrow = call_of(site, make_key(site, "acme", "acme/x"))
    assert site.guard.mount(narrow, "acme/x", file.digest, "acme/tiny") is None
    wide = call_of(site, make_key(site, "acme"))
    mounted = site.guard.mount(wide, "acme/x", file.digest, "acme/tiny")
    assert mounted is not None and mounted.size == file.size
    assert site.guard.mount(wide, "acme/x", m.digest_of(b"none"), "acme/tiny") is None


@pytest.mark.slow
def test_a_blob_is_read_through_its_own_repository_only(site: Site, pushed: Pushed) -> None:
    _, file = site.guard.file(call_of(site, make_key(site, "acme")), "acme/tiny", "1", "config.json")
    beta = call_of(site, make_key(site, "beta"))
    put(site, beta, "beta/x", b"own")
    for digest in (file.digest, pushed.model.digest):
        with pytest.raises(NotFound):
            site.guard.read(beta, "beta/x", digest)
    with pytest.raises(NotFound):
        site.guard.resolve(beta, "beta/x", pushed.model.digest)


def test_lists_are_paged_over_what_is_hidden(site: Site) -> None:
    with site.catalog.writing() as conn:
        c.ensure_org(conn, "beta", 0)
        for i in range(60):
            name, org = (f"beta/m{i:02}", "beta") if i % 3 else (f"hf/x/m{i:02}", "")
            c.ensure_repository(conn, name, kind="model", org=org, visibility="org" if org else "public")
    seen: list[object] = []
    call, after = call_of(site, make_key(site, "acme")), ""
    while True:
        page = site.guard.list(call, "", after, 7)
        seen += page.items
        after = page.after
        if not after:
            break
    assert seen == [f"hf/x/m{i:02}" for i in range(0, 60, 3)]
    assert site.guard.list(call, limit=0).items == () and site.guard.list(call, limit=-5).items == ()


def test_statements_of_each_read(site: Site, pushed: Pushed) -> None:
    key = make_key(site, "acme")
    seen: list[str] = []
    event.listen(site.engine, "before_cursor_execute", lambda _c, _cur, text, *_: seen.append(text))

    def cost(use: Callable[[Call], object]) -> int:
        for _ in range(2):  # the first read of 15 minutes also writes its audit row
            seen.clear()
            use(call_of(site, key))
        return len(seen)

    def manifest_get(call: Call) -> None:
        site.guard.read(call, "acme/tiny", site.guard.resolve(call, "acme/tiny", "1").digest)

    def hub_file(call: Call) -> None:
        _, file = site.guard.file(call, "acme/tiny", "main", "config.json")
        site.guard.read(call, "acme/tiny", file.digest)

    assert cost(manifest_get) == 3
    assert cost(hub_file) == 3
    assert cost(lambda call: site.guard.resolve(call, "acme/tiny", "1")) == 2
    assert cost(lambda call: site.guard.stat(call, "acme/tiny", pushed.model.digest)) == 2
    assert cost(lambda call: site.guard.revision(call, "acme/tiny", "main")) == 2
    assert cost(lambda call: site.guard.files(call, "acme/tiny", "1")) == 3
    assert cost(lambda call: site.guard.refs(call, "acme/tiny")) == 3
    assert cost(site.guard.whoami) == 1


@SQLITE_ONLY
def test_no_statement_scans_a_table(site: Site, pushed: Pushed) -> None:
    call, seen = call_of(site, make_key(site, "acme")), {}
    event.listen(site.engine, "before_cursor_execute", lambda _c, _cur, text, values, *_: seen.setdefault(text, values))
    for verb in verbs(site, pushed).values():
        with contextlib.suppress(AirlockError):
            verb(call)
    site.guard.list(call)
    with site.engine.connect() as conn:
        reads = {text: values for text, values in seen.items() if text.startswith(("SELECT", "UPDATE", "DELETE"))}
        plans = {text: conn.exec_driver_sql("EXPLAIN QUERY PLAN " + text, values).all() for text, values in reads.items()}
    assert len(plans) >= 12
    small = ("CONSTANT", "SCAN revocation_list")  # that one has a row an issuer
    assert [text for text, plan in plans.items() if any("SCAN" in step[3] and not any(w in step[3] for w in small) for step in plan)] == []


def test_rows_of_reads_are_written_once_and_then_counted(site: Site, pushed: Pushed) -> None:
    key = make_key(site, "acme")
    for at in (0.0, 10.0, 20.0, 901.0):
        site.guard.read(call_of(site, key, 2_000_000_000 + at), "acme/tiny", pushed.model.digest)
    rows = audit(site, "B")
    assert [r["ts"] for r in rows] == [2_000_000_000, 2_000_000_901]
    assert rows[0]["ref"] == f"acme/tiny@{pushed.model.digest}" and rows[0]["result"] == "granted" and rows[0]["event"] == "pull"
    assert set(rows[0]) == {"v", "ts", "event", "org", "key_id", "ref", "result", "reason", "instance", "request_id", "bytes", "grant"}
    assert [(n, body["event"]) for kind, n, body in counters(site) if kind == "B"] == [(3, "pull")]
    site.guard.served(call_of(site, key), "acme/tiny", pushed.model.digest, 700)
    assert [body["bytes"] for _, _, body in counters(site) if body["result"] == "served"] == [700]


def test_a_read_that_cannot_be_recorded_is_refused(site: Site, pushed: Pushed) -> None:
    call = call_of(site, make_key(site, "acme"))
    with site.catalog.writing() as conn:
        conn.exec_driver_sql("ALTER TABLE audit_pending RENAME TO away")
    for _ in range(2):
        with pytest.raises(Unavailable):
            site.guard.read(call, "acme/tiny", pushed.model.digest)
    with site.catalog.writing() as conn:
        conn.exec_driver_sql("ALTER TABLE away RENAME TO audit_pending")
    site.guard.read(call, "acme/tiny", pushed.model.digest)
    assert len(audit(site, "B")) == 1


def test_denials_are_recorded_and_then_counted(site: Site, pushed: Pushed) -> None:
    call = call_of(site, make_key(site, "beta", "acme/*"))
    for _ in range(25):
        with pytest.raises(NotFound):
            site.guard.read(call, "acme/tiny", pushed.model.digest)
    rows = audit(site, "C")
    assert len(rows) == 10 and rows[0]["reason"] == "not_visible" and rows[0]["result"] == "denied" and rows[0]["key_id"] == call.principal.key_id
    for i in range(20):
        with pytest.raises(Unauthenticated):
            site.guard.caller(new_key(), "r", time.time(), f"10.1.2.{i}")
    rows = audit(site, "C")[10:]
    assert len(rows) == 1 and rows[0]["network"] == "10.1.2.0/24" and rows[0]["key_id"] == ""
    assert sorted(n for kind, n, _ in counters(site) if kind == "C") == [20, 25]


def test_changes_are_recorded_with_their_change(site: Site, pushed: Pushed) -> None:
    events = [r["event"] for r in audit(site, "A")]
    assert events.count("push") == 2 and events.count("upload") == 7
    before = len(audit(site, "A"))
    call = call_of(site, make_key(site, "acme"))
    with pytest.raises(NotFound):
        site.guard.delete(call, "acme/tiny", "none")
    assert len(audit(site, "A")) == before
    site.guard.delete(call, "acme/tiny", "1")
    assert audit(site, "A")[-1]["event"] == "delete"


def test_no_key_text_is_ever_recorded(site: Site) -> None:
    key = new_key()
    with pytest.raises(Unauthenticated):
        site.guard.caller(key, "r", time.time(), "10.0.0.1")
    assert all(key[:20] not in json.dumps(row) for row in audit(site))


def lease_body(pushed: Pushed, **more: object) -> dict[str, object]:
    body = {"model": pushed.name, "ref": "1", "profile_digest": pushed.profiles.digest, "profile_id": pushed.profile_id, "host": "node-1"}
    return {**body, "gpu_uuids": ["GPU-1"], **more}


@pytest.mark.slow
def test_lease(site: Site, pushed: Pushed) -> None:
    now = float(int(time.time()))
    call = call_of(site, make_key(site, "acme"), now)
    claims = []
    for _ in range(2):
        told = site.guard.lease(call, lease_body(pushed))
        keys = site.home.site_trust().lease_keys
        claims.append(verify_jws(str(told["lease"]), "lease+jwt", keys, now, "node-1"))
    first, second = claims
    assert first["model"] == {"name": "acme/tiny", "ref": "1", "digest": pushed.model.digest}
    assert (first["iss"], first["sub"], first["aud"]) == (site.home.instance, "org:acme", "node-1")
    assert (first["profile_digest"], first["profile_id"], first["gpu_uuids"]) == (pushed.profiles.digest, pushed.profile_id, ["GPU-1"])
    assert first["exp"] == now + 86400 and first["iat"] == now and first["revocation_serial"] == 0 and first["key_id"] == call.principal.key_id
    assert (first["lease_serial"], second["lease_serial"]) == (1, 2) and first["jti"] != second["jti"]
    assert "nonce" not in first
    told = site.guard.lease(call, lease_body(pushed, nonce="0f" * 16))
    assert verify_jws(str(told["lease"]), "lease+jwt", keys, now, "node-1")["nonce"] == "0f" * 16
    rows = [r for r in audit(site, "A") if r["event"] == "lease"]
    assert [r["serial"] for r in rows] == [1, 2, 3] and rows[0]["jti"] == first["jti"]


def test_a_lease_ends_with_its_key(site: Site, pushed: Pushed) -> None:
    now = float(int(time.time()))
    call = call_of(site, make_key(site, "acme", expires=now + 100), now)
    claims = verify_jws(str(site.guard.lease(call, lease_body(pushed))["lease"]), "lease+jwt", site.home.site_trust().lease_keys, now, "node-1")
    assert claims["exp"] == now + 100


def test_a_lease_is_for_a_granted_profile(site: Site, pushed: Pushed) -> None:
    key = make_key(site, "acme")
    for patterns, allowed in (("[]", True), ('["vllm-*"]', True), (json.dumps([pushed.profile_id[:8] + "*"]), True), ('["trtllm-*","x"]', False)):
        with site.catalog.writing() as conn:
            conn.execute(t.key_grant.update().where(t.key_grant.c.org_id.is_not(None)).values(profiles=patterns))
        call = call_of(site, key)
        if allowed:
            assert site.guard.lease(call, lease_body(pushed))["lease"]
            continue
        with pytest.raises(Denied) as caught:
            site.guard.lease(call, lease_body(pushed))
        assert caught.value.reason == "profile_not_granted" and audit(site, "C")[-1]["reason"] == "profile_not_granted"
    row = next(row for row in audit(site, "A") if row["event"] == "lease")
    assert row["grant"] == call.principal.grants[0].id


REFUSED_LEASES: list[tuple[dict[str, object], type[Exception]]] = [
    ({"model": None}, Invalid),
    ({"model": "../x"}, Invalid),
    ({"model": "acme/none"}, NotFound),
    ({"ref": ""}, Invalid),
    ({"host": ""}, Invalid),
    ({"host": "a\nb"}, Invalid),
    ({"host": 5}, Invalid),
    ({"gpu_uuids": None}, Invalid),
    ({"gpu_uuids": "GPU-1"}, Invalid),
    ({"gpu_uuids": [1]}, Invalid),
    ({"gpu_uuids": ["x"] * 65}, Invalid),
    ({"profile_digest": "sha256:x"}, Invalid),
    ({"profile_digest": "sha256:" + "0" * 64}, NotFound),
    ({"profile_id": "other"}, NotFound),
    *(({"nonce": nonce}, Invalid) for nonce in (None, "", "0" * 65, "xyz", 5, "\u0661")),
]


def test_lease_requests_that_are_refused(site: Site, pushed: Pushed) -> None:
    call = call_of(site, make_key(site, "acme"))
    for change, error in REFUSED_LEASES:
        with pytest.raises(error):
            site.guard.lease(call, lease_body(pushed, **change))
    with site.catalog.reading() as conn:
        assert conn.execute(select(t.lease)).all() == [] and conn.execute(select(t.org.c.lease_serial)).scalars().all() == [0]


def test_a_model_manifest_is_no_profile_manifest(site: Site, pushed: Pushed) -> None:
    call = call_of(site, make_key(site, "acme"))
    with pytest.raises(NotFound):
        site.guard.lease(call, lease_body(pushed, profile_digest=pushed.model.digest))


@pytest.mark.slow
def test_parallel_pushes_and_reads(site: Site, pushed: Pushed) -> None:
    calls = {org: call_of(site, make_key(site, org)) for org in ("acme", "beta")}
    failed: list[Exception] = []

    def work(org: str, n: int) -> None:
        try:
            for i in range(3):
                push_model(site, calls[org], f"{org}/m{n}", str(i))
                assert len(site.guard.refs(calls[org], f"{org}/m{n}").items) == i + 1
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(org, n)) for org in calls for n in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
