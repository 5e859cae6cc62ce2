"""Rows of organisations, teams, members and grants: their changes and lists as functions over a connection, below the keys.

Callers choose the transaction and record it; nothing is judged here but the state that is found. Nothing that the audit names is deleted: rows are
closed, disabled or revoked. Whoever changes an organisation's people first holds its row, so that two administrators come one after the other.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection, Row, Select, Table, and_, delete, func, insert, or_, select, update

from artifact.errors import Conflict, Invalid, NotFound
from artifact.grant import ACTIONS, Grant, date
from artifact.manifest import check_name, check_pattern
from registry import tables as t
from registry.rows import ignore_duplicates

ROLE = "role-"  # what the public ids of grants begin with that a member's role made
ROLES = {"member": "", "auditor": "auditor", "admin": "admin"}
MAX_GPUS = 1_000_000
MAX_GRACE_S = 366 * 86400
ORIGINS = ("hf", "ngc", "nvcr.io", "localhost")
Facts = dict[str, object]


def moment(at: float) -> str:
    """A time as lists show it; empty for none."""
    return date(at) if at else ""


def check_org(name: str) -> str:
    """An organisation's name itself: one segment of a repository name without dots, and no origin's; raises Invalid."""
    if "/" in name or "." in name or name in ORIGINS or name.startswith("localhost") or len(name) > 100:
        raise Invalid(
            f"{name[:100]!r} cannot be an organisation", expected="one lower-case segment without / and ., not " + ", ".join(ORIGINS), reason="org"
        )
    return check_name(name)


def check_person(name: str) -> str:
    """The name of a team or a member itself: a segment of a repository name, or an address of mail; raises Invalid."""
    if len(name) > 100 or name.count("@") > 1 or "/" in name:
        raise Invalid(f"{name[:100]!r} cannot be a team or a member", expected="lower-case letters, digits and . _ - and one @", reason="person")
    for part in name.split("@"):
        check_name(part)
    return name


def check_grant(grant: Grant, at: float) -> Grant:
    """A grant that gives something to somebody, itself; raises Invalid."""
    unknown = [a for a in grant.actions if a not in ACTIONS]
    if unknown or not grant.actions:
        raise Invalid(f"there is no action {', '.join(unknown)[:80]!r}", expected=", ".join(ACTIONS), reason="actions")
    for pattern in grant.models:
        check_pattern(pattern)
    if not grant.models:
        raise Invalid("nothing is granted", expected="at least one model pattern", do="--models 'acme/*'", reason="models")
    if grant.expires and (grant.expires <= at or grant.expires <= grant.not_before):
        raise Invalid("the grant would be expired from the start", expected="an expiry in the future, behind its beginning", reason="expires")
    return grant


# ---- organisations


def org_of(conn: Connection, name: str, *, held: bool = True) -> Row[Any]:
    """An organisation's row, held to the end of a transaction that changes it; raises NotFound."""
    statement = select(t.org).where(t.org.c.name == name)
    found = conn.execute(statement.with_for_update(key_share=True) if held else statement).first()
    if found is None:
        raise NotFound(f"there is no organisation {name[:100]!r}", do="airlock org list", reason="org")
    return found


def open_org(conn: Connection, name: str) -> Row[Any]:
    """The same of one that was not closed; raises NotFound, Conflict."""
    found = org_of(conn, name)
    if found.closed_at:
        raise Conflict(f"{name} was closed on {date(found.closed_at)}", do="use another organisation", reason="org_closed")
    return found


def create_org(conn: Connection, name: str, display: str, at: float) -> None:
    """A new organisation; raises Conflict where there is one of that name."""
    _create(conn, t.org, f"an organisation {name}", name=check_org(name), display=display or name, created=at)


def _create(conn: Connection, table: Table, what: str, **values: object) -> None:
    if conn.execute(ignore_duplicates(conn, table).values(**values).returning(*table.primary_key)).first() is None:
        raise Conflict(f"there is {what} already", do="choose another name", reason="exists")


def _end(conn: Connection, table: Table, row_id: int, column: str, what: str, at: float) -> None:
    """Compare-and-set of the moment at which something ends; raises Conflict where somebody else was first."""
    ended = table.c[column]
    if not conn.execute(update(table).where(table.c.id == row_id, ended == 0).values({column: at})).rowcount:
        raise Conflict(f"{what} was ended before", do="read it again", reason="ended")


def _again(conn: Connection, table: Table, row_id: int, column: str, what: str) -> None:
    """Takes the end of something back; raises Conflict where it has none."""
    ended = table.c[column]
    if not conn.execute(update(table).where(table.c.id == row_id, ended != 0).values({column: 0.0})).rowcount:
        raise Conflict(f"{what} was not ended", do="read it again", reason="not_ended")


def open_again(conn: Connection, org: Row[Any]) -> None:
    """Opens a closed organisation: its keys are accepted again; raises Conflict."""
    _again(conn, t.org, org.id, "closed_at", org.name)


def enable_member(conn: Connection, org: Row[Any], name: str) -> Row[Any]:
    """Enables a disabled member, whose keys are accepted again, and returns it; raises NotFound, Conflict."""
    found = _named(conn, t.member, org, name, "member")
    _again(conn, t.member, found.id, "disabled_at", name)
    return found


def close_org(conn: Connection, org: Row[Any], at: float) -> None:
    """Closes an organisation: none of its keys is accepted from now on; raises Conflict."""
    _end(conn, t.org, org.id, "closed_at", org.name, at)


def _page(statement: Select[Any], column: Any, after: str | int, limit: int) -> Select[Any]:
    return statement.where(column > after).order_by(column).limit(limit)


def orgs(conn: Connection, after: str, limit: int, only: str = "") -> list[Facts]:
    """Organisations in the order of their names, behind `after`."""
    live = select(func.count()).where(t.api_key.c.org_id == t.org.c.id, t.api_key.c.revoked_at == 0).scalar_subquery()
    people = select(func.count()).where(t.member.c.org_id == t.org.c.id, t.member.c.disabled_at == 0).scalar_subquery()
    found = select(t.org, t.entitlement.c.jti, live.label("keys"), people.label("members"))
    found = found.select_from(t.org.outerjoin(t.entitlement, t.entitlement.c.id == t.org.c.entitlement_id))
    if only:
        found = found.where(t.org.c.name == only)
    return [
        {
            "name": row.name,
            "display": row.display,
            "created": date(row.created),
            "closed": moment(row.closed_at),
            "entitlement": row.jti or "",
            "keys": row.keys,
            "members": row.members,
        }
        for row in conn.execute(_page(found, t.org.c.name, after, limit))
    ]


# ---- teams and members


def _named(conn: Connection, table: Table, org: Row[Any], name: str, what: str) -> Row[Any]:
    found = conn.execute(select(table).where(table.c.org_id == org.id, table.c.name == name)).first()
    if found is None:
        raise NotFound(f"{org.name} has no {what} {name[:100]!r}", do=f"airlock org {what} list --org {org.name}", reason=what)
    return found


def team_of(conn: Connection, org: Row[Any], name: str) -> Row[Any]:
    """A team that was not closed; raises NotFound, Conflict."""
    found = _named(conn, t.team, org, name, "team")
    if found.closed_at:
        raise Conflict(f"the team {name} was closed on {date(found.closed_at)}", do="make another", reason="team_closed")
    return found


def member_of(conn: Connection, org: Row[Any], name: str) -> Row[Any]:
    """A member that was not disabled; raises NotFound, Conflict."""
    found = _named(conn, t.member, org, name, "member")
    if found.disabled_at:
        raise Conflict(f"{name} was disabled on {date(found.disabled_at)}", do="make another member", reason="member_disabled")
    return found


def create_team(conn: Connection, org: Row[Any], name: str, at: float) -> None:
    """A new team; raises Conflict."""
    _create(conn, t.team, f"a team {name} of {org.name}", org_id=org.id, name=check_person(name), created=at)


def close_team(conn: Connection, org: Row[Any], name: str, at: float) -> None:
    """Closes a team: what it was granted, nobody has by it any more; raises NotFound, Conflict."""
    _end(conn, t.team, _named(conn, t.team, org, name, "team").id, "closed_at", f"the team {name}", at)


def create_member(conn: Connection, org: Row[Any], name: str, kind: str, note: str, at: float) -> None:
    """A new member, a person or a robot, without a role; raises Conflict."""
    _create(conn, t.member, f"a member {name} of {org.name}", org_id=org.id, name=check_person(name), kind=kind, note=note, created=at)


def disable_member(conn: Connection, org: Row[Any], name: str, at: float) -> None:
    """Disables a member: none of its keys is accepted from now on; raises NotFound, Conflict."""
    _end(conn, t.member, _named(conn, t.member, org, name, "member").id, "disabled_at", name, at)


def set_role(conn: Connection, org: Row[Any], member: Row[Any], role: str, expires: float, at: float) -> str:
    """Gives a member its role: the grant of the one before is revoked, that of the new one made; returns its public id, empty for none."""
    conn.execute(update(t.member).where(t.member.c.id == member.id).values(role=role))
    g = t.key_grant.c
    mine = (g.member_id == member.id, g.revoked_at == 0, g.grant_id.like(f"{ROLE}%"))
    conn.execute(update(t.key_grant).where(*mine).values(revoked_at=at))
    if not ROLES[role]:
        return ""
    return add_grant(conn, org.id, Grant((f"{org.name}/**",), (ROLES[role],), expires=expires), at, member_id=member.id, kind=ROLE)


def join_team(conn: Connection, team: Row[Any], member: Row[Any]) -> None:
    """Takes a member into a team; raises Conflict where it is in it."""
    _create(conn, t.team_member, f"{member.name} in {team.name}", team_id=team.id, member_id=member.id)


def leave_team(conn: Connection, org: Row[Any], team: str, member: str) -> None:
    """Takes a member out of a team; raises NotFound."""
    of = _named(conn, t.team, org, team, "team"), _named(conn, t.member, org, member, "member")
    both = (t.team_member.c.team_id == of[0].id, t.team_member.c.member_id == of[1].id)
    if not conn.execute(delete(t.team_member).where(*both)).rowcount:
        raise NotFound(f"{member} is not in {team}", do=f"airlock org team list --org {org.name}", reason="member")


def teams(conn: Connection, org_id: int, after: str, limit: int) -> list[Facts]:
    """The teams of an organisation in the order of their names, with the names of their members."""
    found = conn.execute(_page(select(t.team).where(t.team.c.org_id == org_id), t.team.c.name, after, limit)).all()
    who: dict[int, list[str]] = {row.id: [] for row in found}
    both = t.team_member.join(t.member, t.member.c.id == t.team_member.c.member_id)
    listed = select(t.team_member.c.team_id, t.member.c.name).select_from(both).where(t.team_member.c.team_id.in_(who)).order_by(t.member.c.name)
    for row in conn.execute(listed):
        who[row.team_id].append(row.name)
    return [{"name": r.name, "created": date(r.created), "closed": moment(r.closed_at), "members": who[r.id]} for r in found]


def members(conn: Connection, org_id: int, after: str, limit: int) -> list[Facts]:
    """The members of an organisation in the order of their names."""
    found = conn.execute(_page(select(t.member).where(t.member.c.org_id == org_id), t.member.c.name, after, limit))
    return [
        {"name": r.name, "kind": r.kind, "role": r.role, "note": r.note, "created": date(r.created), "disabled": moment(r.disabled_at)} for r in found
    ]


# ---- grants


def add_grant(
    conn: Connection,
    org_id: int,
    grant: Grant,
    at: float,
    *,
    note: str = "",
    kind: str = "grant-",
    api_key_id: int | None = None,
    member_id: int | None = None,
    team_id: int | None = None,
) -> str:
    """A new grant to one of `api_key_id`, `member_id` and `team_id`, or with none to the whole organisation; returns its public id."""
    grant_id = kind + secrets.token_hex(8)
    rights = {name: json.dumps(getattr(grant, name)) for name in ("models", "actions", "profiles")}
    rest = {name: getattr(grant, name) for name in ("not_before", "expires", "grace_s", "environment", "gpus")}
    holder = {"api_key_id": api_key_id, "member_id": member_id, "team_id": team_id}
    values = {"grant_id": grant_id, "org_id": org_id, "created": at, "note": note, **rights, **rest, **holder}
    conn.execute(insert(t.key_grant).values(values))
    return grant_id


def as_grant(row: Any) -> Grant:
    """The grant of a row of key_grant."""
    models, actions, profiles = (tuple(json.loads(text)) for text in (row.models, row.actions, row.profiles))
    return Grant(models, actions, row.not_before, row.expires, row.grace_s, row.grant_id, row.environment, row.gpus, profiles)


def rights_of(conn: Connection, *, member_id: int | None = None, team_id: int | None = None, key_id: int | None = None) -> list[Grant]:
    """The grants, not revoked, that a key has by itself, a member by itself and its teams, or a team: never those of the whole organisation."""
    g = t.key_grant.c
    mine = []
    if member_id is not None:
        mine += [g.member_id == member_id, g.team_id.in_(select(t.team_member.c.team_id).where(t.team_member.c.member_id == member_id))]
    if team_id is not None:
        mine.append(g.team_id == team_id)
    if key_id is not None:
        mine.append(g.api_key_id == key_id)
    return [as_grant(row) for row in conn.execute(select(t.key_grant).where(or_(*mine), g.revoked_at == 0).order_by(g.id))] if mine else []


_G = (
    t.key_grant.outerjoin(t.api_key, t.api_key.c.id == t.key_grant.c.api_key_id)
    .outerjoin(t.member, t.member.c.id == t.key_grant.c.member_id)
    .outerjoin(t.team, t.team.c.id == t.key_grant.c.team_id)
    .join(t.org, t.org.c.id == t.key_grant.c.org_id)
)
_GRANTS = select(
    t.key_grant,
    t.api_key.c.key_id.label("to_key"),
    t.member.c.name.label("to_member"),
    t.team.c.name.label("to_team"),
    t.org.c.name.label("org"),
).select_from(_G)


def grants(conn: Connection, after: int, limit: int, *, org_id: int | None = None, key: int | None = None, keys: Sequence[int] = ()) -> list[Any]:
    """Rows of grants behind the row `after`, oldest first: of an organisation, of keys themselves, or all that one key has (`key`)."""
    g = t.key_grant.c
    found = _GRANTS
    if org_id is not None:
        found = found.where(g.org_id == org_id)
    if keys:
        found = found.where(g.api_key_id.in_(keys))
    if key is not None:
        of = select(t.api_key).where(t.api_key.c.id == key).subquery()
        in_team = select(t.team_member.c.team_id).join(of, of.c.member_id == t.team_member.c.member_id)
        whole = and_(g.org_id == select(of.c.org_id).scalar_subquery(), g.api_key_id.is_(None), g.member_id.is_(None), g.team_id.is_(None))
        found = found.where(or_(g.api_key_id == key, g.member_id == select(of.c.member_id).scalar_subquery(), g.team_id.in_(in_team), whole))
    return list(conn.execute(_page(found, g.id, after, limit)))


def grant_of(conn: Connection, grant_id: str) -> Row[Any]:
    """One grant by its public id, as lists have it; raises NotFound."""
    found = conn.execute(_GRANTS.where(t.key_grant.c.grant_id == grant_id)).first()
    if found is None:
        raise NotFound(f"there is no grant {grant_id[:80]!r}", do="airlock grant list", reason="grant")
    return found


def revoke_grant(conn: Connection, row: Row[Any], at: float) -> bool:
    """Revokes a grant from now on; False where it was revoked before."""
    g = t.key_grant.c
    return conn.execute(update(t.key_grant).where(g.id == row.id, g.revoked_at == 0).values(revoked_at=at)).rowcount == 1


def extend_grant(conn: Connection, row: Row[Any], expires: float, grace_s: int) -> None:
    """Gives a grant another end, where its end is still the one that was read; raises Conflict."""
    g = t.key_grant.c
    same = (g.id == row.id, g.revoked_at == 0, g.expires == row.expires, g.grace_s == row.grace_s)
    if not conn.execute(update(t.key_grant).where(*same).values(expires=expires, grace_s=grace_s)).rowcount:
        raise Conflict(f"{row.grant_id} was revoked or changed meanwhile", do="read it again", reason="changed")


def grant_facts(row: Any) -> Facts:
    """A grant as lists show it."""
    own = as_grant(row)
    to = {"key": row.to_key or "", "member": row.to_member or "", "team": row.to_team or ""}
    rights = {"models": [*own.models], "actions": [*own.actions], "profiles": [*own.profiles], "gpus": own.gpus, "environment": own.environment}
    ends = {"not_before": moment(own.not_before), "expires": moment(own.expires), "grace_s": own.grace_s, "revoked": moment(row.revoked_at)}
    return {"grant_id": own.id, "org": row.org, **to, **rights, **ends, "created": moment(row.created), "note": row.note}


# ---- keys, as lists show them; never the key or what is stored in its place


_KEY = ("id", "key_id", "org_id", "tier", "note", "created", "expires", "revoked_at", "type", "member_id", "last_used", "replaces")
_KEYS = select(*(t.api_key.c[name] for name in _KEY), t.org.c.name.label("org"), t.member.c.name.label("member")).select_from(
    t.api_key.join(t.org, t.org.c.id == t.api_key.c.org_id).outerjoin(t.member, t.member.c.id == t.api_key.c.member_id)
)


def keys(conn: Connection, after: int, limit: int, *, org: str = "", key_id: str = "") -> list[Any]:
    """Rows of keys behind the row `after`, oldest first: all, of an organisation, or one."""
    found = _KEYS
    if org:
        found = found.where(t.org.c.name == org)
    if key_id:
        found = found.where(t.api_key.c.key_id == key_id)
    return list(conn.execute(_page(found, t.api_key.c.id, after, limit)))


def key_of(conn: Connection, key_id: str) -> Any:
    """One key by its public id; raises NotFound."""
    found = keys(conn, 0, 1, key_id=key_id) if key_id else []
    if not found:
        raise NotFound(f"there is no key {key_id[:80]!r}", do="airlock key list", reason="key")
    return found[0]


def key_facts(row: Any, own: Sequence[Any], now: float) -> Facts:
    """A key as lists show it, with the grants of its own that are not revoked; `models` and `actions` are those of all of them."""
    living = [as_grant(g) for g in own if g.api_key_id == row.id and not g.revoked_at]
    state = "revoked" if row.revoked_at else "expired" if 0 < row.expires <= now else "active"
    facts: Facts = {"key_id": row.key_id, "org": row.org, "tier": row.tier, "type": row.type, "member": row.member or "", "state": state}
    facts |= {name: moment(getattr(row, name)) for name in ("created", "expires", "revoked_at", "last_used")}
    facts |= {name: sorted({text for g in living for text in getattr(g, name)}) for name in ("models", "actions")}
    return facts | {"replaces": row.replaces, "note": row.note, "grants": [g.id for g in living]}
