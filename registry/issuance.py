"""The administrator's verbs over keys and grants: make, list, revoke, rotate, extend; a JSON object in, a JSON object out, each recorded.

It is a part of the guard (registry/guard.py) beside registry/roster.py. A key leaves here once, in the answer that made it, and enters no record.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection, Row, update

from artifact.errors import Conflict, Invalid, NotFound
from artifact.grant import TIERS, Grant
from artifact.store import Call
from registry import leases, people
from registry import tables as t
from registry.bodies import Body, life, moment, only, text, texts, whole, word
from registry.database import alone, reading
from registry.delegation import Office
from registry.desk import Desk
from registry.people import Facts
from registry.rows import ensure_org
from registry.settings import key_prefix

TYPES = ("personal", "service", "runtime")
FIRST = "first"  # the type of the key that a site without any prints at its first start
FIRST_LIFE_S = 86400
SITE_ORG = "site"
ENVIRONMENTS = ("", "dev", "production")
RIGHTS = ("models", "actions", "not_before", "grace", "environment", "gpus", "profiles")
DEFAULT_LIFE = "90d"
MAX_OVERLAP_S = 90 * 86400  # while it lasts there is one key more than max_keys counts


def _prefix(body: Body) -> str:
    given = text(body, "prefix", "", 40)
    try:
        return key_prefix(given) if given else ""
    except ValueError:
        raise Invalid("the prefix cannot begin a key", expected="nvapi-, or nvapi-WORD- with up to 20 letters and digits", reason="prefix") from None


def _rights(body: Body, now: float, expires: float) -> Grant:
    """The grant that a body wishes for; raises Invalid."""
    wish = Grant(
        texts(body, "models"),
        texts(body, "actions") or ("pull", "run"),
        moment(body, "not_before", now),
        expires,
        min(life(body, "grace", "0s"), people.MAX_GRACE_S),
        "",
        word(body, "environment", ENVIRONMENTS, ""),
        whole(body, "gpus", people.MAX_GPUS),
        texts(body, "profiles"),
    )
    return people.check_grant(wish, now)


def _current(grants: list[Grant], now: float) -> list[Grant]:
    return [g for g in grants if not g.expires or g.expires + g.grace_s > now]


class Issuance(Desk):
    """Keys and grants."""

    # ---- keys

    def create_key(self, call: Call, body: Body) -> Facts:
        """Makes a key of `org`, maybe a member's, with a grant of its own where `models` are given; the answer alone holds the key.

        Raises Denied, Invalid, NotFound, Conflict `max_keys`, `org_closed`, `member_disabled`.
        """
        only(body, "org", "tier", "type", "member", "expires", "note", "prefix", *RIGHTS)
        org, tier, who = text(body, "org", call.principal.org), word(body, "tier", TIERS, "developer"), text(body, "member", "")
        expires, note, prefix = moment(body, "expires", call.now, DEFAULT_LIFE), text(body, "note", "", 200), _prefix(body)
        wish = _rights(body, call.now, 0.0) if body.get("models") or not who else None
        given = word(body, "type", ("", *TYPES), "")
        held = self._admin(call, org)
        people.check_org(org)

        def work(conn: Connection) -> Facts:
            if held.site:
                ensure_org(conn, org, call.now)
            owner = people.open_org(conn, org)
            member = people.member_of(conn, owner, who) if who else None
            kind = _kind(given, member)
            rights = [wish] if wish else []
            rights += _current(people.rights_of(conn, member_id=member.id), call.now) if member else []
            self._bounded(held, call.now, rights, expires, tier)
            ids: dict[str, Any] = {"kind": kind, "member_id": member.id if member else None, "prefix": prefix, "note": note}
            key_id, key = self._entitlements.add_key(conn, owner.id, tier=tier, grant=wish, expires=expires, at=call.now, **ids)
            facts = {"models": [*wish.models], "actions": [*wish.actions]} if wish else {"models": [], "actions": []}
            self._audit.change(conn, call, "key_create", key_id, owner=org, tier=tier, type=kind, member=who, expires=expires, **facts)
            self._end_first(conn, call)
            return {"key": key, "key_id": key_id, "org": org, "tier": tier, "type": kind, "member": who, "expires": people.moment(expires)}

        return self._change(call, org, work)

    def _end_first(self, conn: Connection, call: Call) -> None:
        """Revokes the keys of the first start once one of them made another key."""
        k = t.api_key.c
        mine = people.keys(conn, 0, 1, key_id=call.principal.key_id)
        if not mine or mine[0].type != FIRST:
            return
        conn.execute(update(t.api_key).where(k.type == FIRST, k.revoked_at == 0).values(revoked_at=call.now))
        self._audit.change(conn, call, "key_revoke", call.principal.key_id, first=True)

    def first_key(self, call: Call) -> Facts:
        """A key of the site's own administration for a day, where the site has no other key; empty where it has one."""

        def work(conn: Connection) -> Facts:
            alone(conn, "first key")
            if conn.execute(t.api_key.select().where(t.api_key.c.type != FIRST).limit(1)).first() is not None:
                return {}
            org_id, expires = ensure_org(conn, SITE_ORG, call.now), call.now + FIRST_LIFE_S
            wish, note = Grant(("**",), ("admin",)), "printed at the first start"
            made = self._entitlements.add_key(conn, org_id, tier=TIERS[-1], grant=wish, expires=expires, at=call.now, note=note, kind=FIRST)
            self._audit.change(conn, call, "key_create", made[0], owner=SITE_ORG, type=FIRST, expires=expires)
            return {"key": made[1], "key_id": made[0], "expires": people.moment(expires)}

        return self._change(call, SITE_ORG, work)

    def keys(self, call: Call, org: str = "", after: int = 0, limit: int = 100) -> Facts:
        """Keys by their public facts, oldest first: of an organisation, for the site's administrator of all; an ordinary key sees itself."""
        held = self._gate(call)
        org = org or ("" if held.site else call.principal.org)
        ordinary = not held.site and not held.audits and org == call.principal.org
        if org and not ordinary:
            self._reader(call, org)
        with reading(self._engine) as conn:
            rows = people.keys(conn, after, limit, org=org, key_id=call.principal.key_id if ordinary else "")
            own = people.grants(conn, 0, 1 << 31, keys=[row.id for row in rows]) if rows else []
        return {"items": [people.key_facts(row, own, call.now) for row in rows], "after": rows[-1].id if len(rows) == limit else 0}

    def key(self, call: Call, key_id: str) -> Facts:
        """One key by its public facts with all grants that it has, by whatever; raises NotFound for one that the caller may not see."""
        held = self._gate(call)
        with reading(self._engine) as conn:
            row = people.key_of(conn, key_id if key_id.isprintable() else "")
            if not held.site and row.org != held.audits and row.key_id != call.principal.key_id:
                raise NotFound(f"there is no key {key_id[:80]!r}", do="airlock key list", reason="key")
            has = people.grants(conn, 0, 1 << 31, key=row.id)
        return people.key_facts(row, has, call.now) | {"grants": [people.grant_facts(g) for g in has if not g.revoked_at]}

    def _mine(self, conn: Connection, held: Office, key_id: str) -> Any:
        """A key that the caller administers, its organisation's row held; raises NotFound."""
        row = people.key_of(conn, key_id)
        if not held.site and row.org != held.administers:
            raise NotFound(f"there is no key {key_id[:80]!r}", do="airlock key list", reason="key")
        people.org_of(conn, row.org)
        return people.key_of(conn, key_id)

    def revoke_key(self, call: Call, body: Body) -> Facts:
        """Revokes the key `key_id` from now on; again is no error; raises Denied, NotFound."""
        only(body, "key_id")
        key_id, held = text(body, "key_id"), self._admin(call, call.principal.org)

        def work(conn: Connection) -> Facts:
            self._mine(conn, held, key_id)
            new = self._entitlements.revoke(conn, key_id, call.now)
            if new:
                self._audit.change(conn, call, "key_revoke", key_id, leases=leases.revoke_under(conn, call.now, key_ids=[key_id]))
            return {"key_id": key_id, "state": "revoked" if new else "was revoked before"}

        return self._change(call, call.principal.org, work)

    def rotate_key(self, call: Call, body: Body) -> Facts:
        """Makes a successor of `key_id` with the same grants; the old one ends after `overlap`, 7d unless it says otherwise.

        Raises Denied where the key may more than the caller, NotFound, Conflict `rotated`, `key_revoked`, `key_expired`, `org_closed`.
        """
        only(body, "key_id", "overlap", "expires", "prefix")
        key_id, overlap, prefix = text(body, "key_id"), life(body, "overlap", "7d"), _prefix(body)
        ends = moment(body, "expires", call.now) if "expires" in body else None
        if overlap > MAX_OVERLAP_S:
            raise Invalid("the overlap is too long", expected="at most 90d", do="two keys, where two are wanted for long", reason="overlap")
        held = self._admin(call, call.principal.org)

        def work(conn: Connection) -> Facts:
            row = self._mine(conn, held, key_id)
            people.open_org(conn, row.org)
            if row.type == FIRST:
                raise Conflict("the key of the first start has no successor", do="airlock key create, with it", reason="first")
            expires = row.expires if ends is None else ends
            has = _current(people.rights_of(conn, key_id=row.id, member_id=row.member_id), call.now)
            self._bounded(held, call.now, has, expires, row.tier)
            new_id, key = self._entitlements.rotate(conn, row, until=call.now + overlap, expires=expires, at=call.now, prefix=prefix)
            self._audit.change(conn, call, "key_rotate", key_id, owner=row.org, successor=new_id, overlap_s=overlap, expires=expires)
            old = people.key_of(conn, key_id)
            facts: Facts = {"key": key, "key_id": new_id, "org": row.org, "tier": row.tier, "type": row.type, "member": row.member or ""}
            return facts | {"expires": people.moment(expires), "replaces": key_id, "old_ends": people.moment(old.revoked_at or old.expires)}

        return self._change(call, call.principal.org, work)

    def s3_secret(self, call: Call, body: Body) -> Facts:
        """What an S3 client signs with as `key_id`, the caller's own key where it is absent; each showing is recorded, without the secret.

        Raises Denied where the key may more than the caller, NotFound, Conflict `key_revoked`, `key_expired`.
        """
        only(body, "key_id")
        key_id, held = text(body, "key_id", call.principal.key_id), self._gate(call)
        own = key_id == call.principal.key_id and call.principal.access is None
        held = held if own else self._admin(call, call.principal.org)

        def work(conn: Connection) -> Facts:
            row = people.key_of(conn, key_id) if own else self._mine(conn, held, key_id)
            if row.revoked_at or 0 < row.expires <= call.now:
                state = "revoked" if row.revoked_at else "expired"
                raise Conflict(f"{key_id} is {state}", do="airlock key create", reason=f"key_{state}")
            if not own:  # the secret signs as that key: it is no less than a successor
                has = _current(people.rights_of(conn, key_id=row.id, member_id=row.member_id), call.now)
                self._bounded(held, call.now, has, row.expires, row.tier)
            self._audit.change(conn, call, "key_s3", key_id, owner=row.org)
            return {"key_id": key_id, "org": row.org, "expires": people.moment(row.expires), "secret": self._entitlements.s3_secrets(key_id)[0]}

        return self._change(call, call.principal.org, work)

    # ---- grants

    def create_grant(self, call: Call, body: Body) -> Facts:
        """Grants `models` to one of `key`, `member` and `team` of `org`, or with none to the whole organisation; raises Denied, Invalid, NotFound."""
        only(body, "org", "key", "member", "team", "expires", "note", *RIGHTS)
        org, note = text(body, "org", call.principal.org), text(body, "note", "", 200)
        to = {name: text(body, name, "") for name in ("key", "member", "team")}
        if sum(map(bool, to.values())) > 1:
            raise Invalid("a grant is of one", expected="one of key, member and team, or none for the whole organisation", reason="body")
        wish = _rights(body, call.now, moment(body, "expires", call.now))
        held = self._admin(call, org)

        def work(conn: Connection) -> Facts:
            owner = people.open_org(conn, org)
            self._bounded(held, call.now, [wish])
            key = self._key_of(conn, owner, to["key"]).id if to["key"] else None
            member = people.member_of(conn, owner, to["member"]).id if to["member"] else None
            team = people.team_of(conn, owner, to["team"]).id if to["team"] else None
            grant_id = people.add_grant(conn, owner.id, wish, call.now, note=note, api_key_id=key, member_id=member, team_id=team)
            facts = people.grant_facts(people.grant_of(conn, grant_id))
            shown = {name: facts[name] for name in ("models", "actions", "expires", "gpus", "environment", "key", "member", "team")}
            self._audit.change(conn, call, "grant_create", grant_id, owner=org, **shown)
            return facts

        return self._change(call, org, work)

    @staticmethod
    def _key_of(conn: Connection, owner: Row[Any], key_id: str) -> Any:
        row = people.key_of(conn, key_id)
        if row.org_id != owner.id:
            raise NotFound(f"there is no key {key_id[:80]!r}", do="airlock key list", reason="key")
        return row

    def grants(self, call: Call, org: str = "", after: int = 0, limit: int = 100) -> Facts:
        """Grants, oldest first: of an organisation, for the site's administrator of all; an ordinary key sees those that it has."""
        held = self._gate(call)
        org = org or ("" if held.site else call.principal.org)
        ordinary = not held.site and not held.audits and org == call.principal.org
        if org and not ordinary:
            self._reader(call, org)
        with reading(self._engine) as conn:
            if ordinary:
                rows = people.grants(conn, after, limit, key=people.key_of(conn, call.principal.key_id).id)
            else:
                rows = people.grants(conn, after, limit, org_id=people.org_of(conn, org, held=False).id if org else None)
        return {"items": [people.grant_facts(row) for row in rows], "after": rows[-1].id if len(rows) == limit else 0}

    def _grant(self, conn: Connection, held: Office, grant_id: str) -> Row[Any]:
        row = people.grant_of(conn, grant_id)
        if not held.site and row.org != held.administers:
            raise NotFound(f"there is no grant {grant_id[:80]!r}", do="airlock grant list", reason="grant")
        people.org_of(conn, row.org)
        return people.grant_of(conn, grant_id)

    def revoke_grant(self, call: Call, body: Body) -> Facts:
        """Revokes the grant `grant_id` from now on; again is no error; raises Denied, NotFound."""
        only(body, "grant_id")
        grant_id, held = text(body, "grant_id"), self._admin(call, call.principal.org)

        def work(conn: Connection) -> Facts:
            row = self._grant(conn, held, grant_id)
            new = people.revoke_grant(conn, row, call.now)
            if new:
                ended = leases.revoke_under(conn, call.now, grant_ids=[grant_id])
                self._audit.change(conn, call, "grant_revoke", grant_id, owner=row.org, leases=ended)
            return {"grant_id": grant_id, "state": "revoked" if new else "was revoked before"}

        return self._change(call, call.principal.org, work)

    def extend_grant(self, call: Call, body: Body) -> Facts:
        """Gives the grant `grant_id` another end (`expires`, and `grace`); raises Denied, Invalid, NotFound, Conflict `changed`, `org_closed`."""
        only(body, "grant_id", "expires", "grace")
        grant_id, expires = text(body, "grant_id"), moment(body, "expires", call.now, None)
        held = self._admin(call, call.principal.org)

        def work(conn: Connection) -> Facts:
            row = self._grant(conn, held, grant_id)
            people.open_org(conn, row.org)
            was = people.as_grant(row)
            grace_s = min(life(body, "grace", "0s"), people.MAX_GRACE_S) if "grace" in body else was.grace_s
            models = (was.models, was.actions, was.not_before, expires, grace_s, "", was.environment, was.gpus, was.profiles)
            self._bounded(held, call.now, [people.check_grant(Grant(*models), call.now)])
            people.extend_grant(conn, row, expires, grace_s)
            self._audit.change(conn, call, "grant_extend", grant_id, owner=row.org, before=was.expires, expires=expires, grace_s=grace_s)
            return people.grant_facts(people.grant_of(conn, grant_id))

        return self._change(call, call.principal.org, work)


def _kind(given: str, member: Row[Any] | None) -> str:
    """The type of a key: a personal one is a person's, a robot has the others; raises Invalid."""
    person = member is not None and member.kind == "person"
    kind = given or ("personal" if person else "service")
    if kind == "personal" and not person:
        raise Invalid("a personal key is a person's", expected="a member of kind person", do="--member NAME, or --type service", reason="type")
    return kind
