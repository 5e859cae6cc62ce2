"""One indexed statement gives the key with its grants of all four kinds, its organisation, member and document, and nothing of anybody else's."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from sqlalchemy import event, insert, select, update

from artifact.errors import AirlockError, Denied, NotFound, Unauthenticated
from artifact.grant import Access, Entitlement, Grant, Principal
from artifact.manifest import digest_of
from registry import tables as t
from registry.entitlements import new_key
from registry.holders import caller
from registry.lookup import Lookup
from registry.wiring import Site
from tests.site import BACKENDS, call_of, make_key, push_model, running_site


@pytest.fixture(params=BACKENDS)
def site(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Site]:
    with running_site(tmp_path, request.param) as opened:
        yield opened


class People:
    """Rows of organisations, members, teams, grants and documents, made as directly as they are stored."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.key = make_key(site, "acme", "acme/own")
        self.key_id = self._holder().key_id
        with site.catalog.writing() as conn:
            self.row, self.org = conn.execute(select(t.api_key.c.id, t.api_key.c.org_id).where(t.api_key.c.key_id == self.key_id)).one()
            self.member = self.add(conn, t.member, org_id=self.org, name="ann", created=0.0)
            conn.execute(update(t.api_key).where(t.api_key.c.id == self.row).values(member_id=self.member))

    @staticmethod
    def add(conn: object, table: object, **values: object) -> int:
        done = conn.execute(insert(table).values(**values))  # type: ignore[attr-defined, arg-type]
        return int(done.inserted_primary_key[0])

    def team(self, name: str, *, org: int = 0, closed_at: float = 0.0, member: int = 0) -> int:
        with self.site.catalog.writing() as conn:
            team = self.add(conn, t.team, org_id=org or self.org, name=name, created=0.0, closed_at=closed_at)
            conn.execute(insert(t.team_member).values(team_id=team, member_id=member or self.member))
            return team

    def grant(self, model: str, **values: object) -> str:
        grant_id = "grant-" + secrets.token_hex(8)
        row = {"grant_id": grant_id, "org_id": self.org, "models": json.dumps([model]), "actions": '["pull"]', **values}
        with self.site.catalog.writing() as conn:
            conn.execute(insert(t.key_grant).values(**row))
        return grant_id

    def document(self, org: int = 0, **values: object) -> int:
        row: dict[str, object] = {
            "org_id": org or self.org,
            "jti": secrets.token_hex(8),
            "issuer": "i",
            "kid": "k",
            "serial": 3,
            "tier": "enterprise",
        }
        row |= {"models": '["nim/**"]', "actions": '["pull"]', "products": '["p"]', "environments": '["dev"]', "gpus": 8, "iat": 1.0}
        row |= {"not_before": 2.0, "expires": 3.5, "grace_s": 4, "token": "x", "at": 0.0, **values}
        with self.site.catalog.writing() as conn:
            return self.add(conn, t.entitlement, **row)

    def entitle(self, document: int) -> None:
        with self.site.catalog.writing() as conn:
            conn.execute(update(t.org).where(t.org.c.id == self.org).values(entitlement_id=document))

    def _holder(self) -> Principal:
        """The principal, which every way of asking gives alike."""
        hmac = self.site.entitlements.hmac(self.key)
        found = self.site.entitlements.principal(self.key)
        assert found is not None
        assert self.site.entitlements.holder(found.key_id) == found
        for ask in (("head", "acme/x", "1"), ("file", "acme/x", "1", "p"), ("object", "acme/x", digest_of(b""))):
            assert Lookup(self.site.engine).seek(ask, hmac=hmac)[0] == Lookup(self.site.engine).seek(ask, key_id=found.key_id)[0] == found
        return found

    def models(self) -> list[str]:
        return [m for g in self._holder().grants for m in g.models]

    def holder(self) -> Principal:
        return self._holder()


@pytest.fixture
def people(site: Site) -> People:
    return People(site)


def test_grants_of_all_four_kinds_and_of_nobody_else(site: Site, people: People) -> None:
    team, closed = people.team("red"), people.team("blue", closed_at=5.0)
    with site.catalog.writing() as conn:
        other = people.add(conn, t.member, org_id=people.org, name="bob", created=0.0)
        foreign = people.add(conn, t.org, name="beta", created=0.0)
        foreign_member = people.add(conn, t.member, org_id=foreign, name="eve", created=0.0)
    theirs = people.team("green", member=other)
    people.grant("acme/member", member_id=people.member)
    people.grant("acme/team", team_id=team)
    people.grant("acme/whole")
    expected = ["acme/own", "acme/member", "acme/team", "acme/whole"]
    assert people.models() == expected
    people.grant("acme/closed", team_id=closed)
    people.grant("acme/other", member_id=other)
    people.grant("acme/theirs", team_id=theirs)
    for holder in ({"member_id": people.member}, {"team_id": team}, {"api_key_id": people.row}, {}):
        people.grant("beta/x", **{"org_id": foreign, **holder})  # another organisation's, whomever it names
        people.grant("acme/revoked", **{"revoked_at": 5.0, **holder})
    people.grant("beta/member", org_id=foreign, member_id=foreign_member)
    assert people.models() == expected
    make_key(site, "acme", "acme/neighbour")
    assert people.models() == expected


def test_every_column_of_a_grant_and_of_the_document(people: People) -> None:
    values: dict[str, object] = {"not_before": 1.25, "expires": 4e9, "grace_s": 7, "environment": "dev", "gpus": 3, "profiles": '["vllm-*","x"]'}
    grant_id = people.grant("nim/**", **values)
    wanted = Grant(("nim/**",), ("pull",), 1.25, 4e9, 7, grant_id, "dev", 3, ("vllm-*", "x"))
    assert people.holder().grants[-1] == wanted and people.holder().entitlement is None
    people.entitle(people.document(jti="doc-1", revoked_at=9.5))
    found = people.holder()
    assert found.entitlement == Entitlement("doc-1", 3, "enterprise", ("nim/**",), ("pull",), 2.0, 3.5, 4, 8, ("p",), ("dev",), 9.5)
    assert found.grants[-1] == wanted
    people.entitle(people.document(serial=4, jti="doc-2"))
    assert people.holder().entitlement is not None and people.holder().entitlement.jti == "doc-2"  # type: ignore[union-attr]


def test_a_document_that_is_gone_or_of_another_organisation_gives_nothing(site: Site, people: People) -> None:
    with site.catalog.writing() as conn:
        foreign = people.add(conn, t.org, name="beta", created=0.0)
    for document in (people.document(foreign), 10**6):
        people.entitle(document)
        assert people.holder().entitlement == Entitlement("", 0, "", (), (), 0.0, 0.0)


def test_a_closed_organisation_and_a_disabled_member_end_their_keys_and_tokens(site: Site, people: People) -> None:
    token = site.guard.token(call_of(site, people.key), ())[0]
    org, member = t.org.c.id == people.org, t.member.c.id == people.member
    for table, row, column, reason in ((t.org, org, "closed_at", "org_closed"), (t.member, member, "disabled_at", "member_disabled")):
        for at, dead in ((time.time() - 5, True), (time.time() + 500, True), (0.0, False)):  # the second one by a clock that was ahead
            with site.catalog.writing() as conn:
                conn.execute(update(table).where(row).values({column: at}))
            for credential in (people.key, token):
                if not dead:
                    call_of(site, credential)
                    continue
                with pytest.raises(Unauthenticated) as caught:
                    call_of(site, credential)
                assert caught.value.reason == reason and "20" in caught.value.what


def refusal(use: Callable[[], object]) -> str:
    try:
        use()
    except AirlockError as error:
        return error.reason
    return "ok"


def test_required_entitlements_at_the_guard(tmp_path: Path) -> None:
    with running_site(tmp_path, AIRLOCK_ENTITLEMENTS="required", AIRLOCK_ANONYMOUS="on") as site:
        people = People(site)
        people.grant("**", actions='["pull","push","run"]')
        admin = call_of(site, make_key(site, "ops", "**", actions=("admin",)))
        found = push_model(site, admin, "hf/meta/llama", "1")
        own = push_model(site, call_of(site, people.key), "acme/tiny", "1")
        with site.catalog.writing() as conn:
            conn.execute(update(t.repository).where(t.repository.c.name.like("hf/%")).values(visibility="public"))

        def pull(key: str | None, name: str, digest: str) -> str:
            return refusal(lambda: site.guard.read(site.guard.caller(key, "r", time.time()), name, digest))

        assert pull(people.key, found.name, found.model.digest) == "entitlement_absent"
        assert pull(None, found.name, found.model.digest) == "key_absent"
        token = site.guard.token(site.guard.caller(None, "r", time.time()), ())[0]
        assert pull(token, found.name, found.model.digest) == "insufficient_scope"
        assert pull(people.key, own.name, own.model.digest) == "ok"
        people.entitle(people.document(models='["hf/**"]', expires=4e9, environments='["production"]'))
        assert pull(people.key, found.name, found.model.digest) == "ok"
        rows = [json.loads(body) for body in audited(site)]
        read = [row for row in rows if row["result"] == "granted" and row["event"] == "pull"]
        assert read[-1]["entitlement"] and read[-1]["grant"].startswith("grant-") and "entitlement" not in read[0]


def audited(site: Site) -> list[str]:
    with site.catalog.reading() as conn:
        return list(conn.execute(select(t.audit_pending.c.body).order_by(t.audit_pending.c.id)).scalars())


def test_ids_are_in_the_rows_of_reads_tokens_and_denials(site: Site, people: People) -> None:
    grant_id = people.grant("acme/tiny", member_id=people.member, actions='["pull","push"]')
    call = call_of(site, people.key)
    pushed = push_model(site, call_of(site, make_key(site, "acme")), "acme/tiny", "1")
    site.guard.read(call, "acme/tiny", pushed.model.digest)
    site.guard.token(call, [Access("repository", "acme/tiny", ("pull",))], "r", call.now)
    with site.catalog.writing() as conn:
        conn.execute(update(t.key_grant).where(t.key_grant.c.grant_id == grant_id).values(expires=5.0))
    with pytest.raises(Denied) as caught:
        site.guard.read(call_of(site, people.key), "acme/tiny", pushed.model.digest)
    assert caught.value.reason == "grant_expired"
    mine = [row for row in map(json.loads, audited(site)) if row["key_id"] == people.key_id]
    assert [(row["event"], row["result"], row.get("grant")) for row in mine] == [
        ("pull", "granted", grant_id),
        ("token", "granted", grant_id),
        ("pull", "denied", grant_id),
    ]


@pytest.mark.slow
def test_the_same_read_under_another_grant_is_another_row(site: Site, people: People) -> None:
    pushed = push_model(site, call_of(site, make_key(site, "acme")), "acme/own", "1")
    with site.catalog.writing() as conn:
        conn.execute(update(t.key_grant).where(t.key_grant.c.api_key_id == people.row).values(expires=time.time() + 9e6))
    for _ in range(2):
        site.guard.read(call_of(site, people.key), "acme/own", pushed.model.digest)
    people.grant("acme/own")  # without end: the wider one
    for _ in range(2):
        site.guard.read(call_of(site, people.key), "acme/own", pushed.model.digest)
    rows = [row for row in map(json.loads, audited(site)) if row["key_id"] == people.key_id]
    assert len(rows) == 2 and rows[0]["grant"] != rows[1]["grant"]


def test_an_alias_is_decided_as_what_it_stands_for(site: Site, people: People) -> None:
    pushed = push_model(site, call_of(site, make_key(site, "acme")), "acme/tiny", "1")
    repo = site.catalog.repository("acme/tiny")
    assert repo is not None
    with site.catalog.writing() as conn:
        conn.execute(update(t.repository).where(t.repository.c.id == repo.id).values(visibility="private", requires_product="p"))
        conn.execute(t.alias.insert().values(name="acme/own", repo_id=repo.id))  # a name that the key has a grant on
    with pytest.raises(NotFound):
        site.guard.read(call_of(site, people.key), "acme/own", pushed.model.digest)
    people.grant("acme/tiny")
    assert site.guard.read(call_of(site, people.key), "acme/own", pushed.model.digest).total
    subject = site.catalog.repository("acme/tiny/profiles")
    assert subject is not None and subject.subject.requires_product == "p" and subject.subject.visibility == "private"


def crowd(site: Site, people: People) -> None:
    """An organisation of 3,000 keys with a grant each, a member of 200 teams and 300 others: where a scan would cost."""
    keys = [{"key_id": f"k{i}", "hmac": secrets.token_bytes(32), "org_id": people.org, "tier": "developer", "created": 0.0} for i in range(3000)]
    own = {"org_id": people.org, "models": '["acme/x"]', "actions": '["pull"]'}
    with site.catalog.writing() as conn:
        conn.execute(insert(t.api_key), keys)
        rows = conn.execute(select(t.api_key.c.id).where(t.api_key.c.key_id.like("k%"), t.api_key.c.id != people.row)).scalars().all()
        grants = [{"grant_id": f"g{i}", "api_key_id": row, **own} for i, row in enumerate(rows)]
        conn.execute(insert(t.key_grant), grants)
        members = [{"org_id": people.org, "name": f"m{i}", "created": 0.0} for i in range(300)]
        conn.execute(insert(t.member), members)
        conn.execute(insert(t.team), [{"org_id": people.org, "name": f"t{i}", "created": 0.0} for i in range(300)])
        teams = conn.execute(select(t.team.c.id).order_by(t.team.c.id)).scalars().all()
        others = conn.execute(select(t.member.c.id)).scalars().all()
        pairs = {(team, member) for team in teams[:3] for member in others} | {(team, people.member) for team in teams[:200]}
        conn.execute(insert(t.team_member), [{"team_id": team, "member_id": member} for team, member in pairs])
        conn.execute(insert(t.key_grant), [{"grant_id": f"t{i}", "team_id": team, **own} for i, team in enumerate(teams)])
        conn.execute(insert(t.key_grant), [{"grant_id": f"m{i}", "member_id": member, **own} for i, member in enumerate(others)])
    if site.engine.dialect.name == "postgresql":  # as autovacuum does; SQLite keeps no statistics unless told
        with site.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as conn:
            conn.exec_driver_sql("ANALYZE")


def asked(site: Site, people: People) -> list[tuple[str, object]]:
    """The statements, with their values, of one key alone and of one key with what it asks for."""
    seen: list[tuple[str, object]] = []

    def note(_conn: object, _cursor: object, text: str, values: object, *_: object) -> None:
        seen.append((text, values))

    event.listen(site.engine, "before_cursor_execute", note)
    assert site.entitlements.principal(people.key) is not None
    assert Lookup(site.engine).seek(("manifest", "acme/x", "1"), hmac=site.entitlements.hmac(people.key))[0] is not None
    event.remove(site.engine, "before_cursor_execute", note)
    return seen


def test_the_statement_is_one_and_indexed_in_a_crowd(site: Site, people: People) -> None:
    people.grant("acme/whole")
    crowd(site, people)
    statements = asked(site, people)
    assert len(statements) == 2 and len(people.holder().grants) == 203
    for text, values in statements:
        steps = plan(site, text, values)
        assert [step for step in steps if scans(step)] == []
        assert any("ix_key_grant_whole" in step for step in steps), "grants of the whole organisation: not by way of all that are no key's"


def plan(site: Site, text: str, values: object) -> list[str]:
    with site.engine.connect() as conn:
        if site.engine.dialect.name == "sqlite":
            return [row[3] for row in conn.exec_driver_sql("EXPLAIN QUERY PLAN " + text, values).all()]  # type: ignore[arg-type]
        return [row[0] for row in conn.exec_driver_sql("EXPLAIN " + text, values).all()]  # type: ignore[arg-type]


def scans(step: str) -> bool:
    """Whether this step of a plan reads a whole table of those that grow with the site."""
    if step.startswith("SCAN"):  # SQLite; what was found is no table
        return step not in ("SCAN holder", "SCAN sought", "SCAN CONSTANT ROW")
    return "Seq Scan on" in step and any(f"Seq Scan on {name}" in step for name in ("api_key", "key_grant", "team_member"))


@pytest.mark.slow
def test_a_scan_would_be_noticed(site: Site, people: People) -> None:
    """The test above is able to fail: the same plans without the indexes by which grants are found."""
    crowd(site, people)
    with site.catalog.writing() as conn:
        for column in ("whole", "org_id", "api_key_id", "member_id", "team_id"):  # each of the others would serve, too, if worse
            conn.exec_driver_sql(f"DROP INDEX ix_key_grant_{column}")
    for text, values in asked(site, people):
        assert [step for step in plan(site, text, values) if scans(step)] != []


def test_nobody_is_found_for_what_is_no_key(site: Site, people: People) -> None:
    assert site.entitlements.principal(new_key()) is None and site.entitlements.holder("key-none") is None
    assert caller("hmac") is caller("hmac"), "made once a process"
    assert replace(people.holder(), grants=()).grants == ()
