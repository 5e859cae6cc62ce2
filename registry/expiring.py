"""The rows of what ends, as items of the calendar (registry/calendar.py), and the verb that shows them to who may look.

It is a part of the guard (registry/guard.py) beside registry/issuance.py; the watch reads the same. It changes nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sqlalchemy import ColumnElement, Connection, Engine, Select, and_, func, or_, select, tuple_

from artifact.errors import AirlockError
from artifact.grant import date
from artifact.store import Call
from registry import tables as t
from registry import tls, upstream
from registry.audit import Audit
from registry.calendar import DAY_S, KEPT_S, Item, behind, page
from registry.database import reading
from registry.desk import Desk, Gate, Refuse, local_office, never
from registry.entitlements import Entitlements
from registry.people import Facts
from registry.rows import chunks

MOST = 100_000  # of a kind, the nearest, where all are asked for
MAX_DAYS = 36_500
K, G, E, L, O = t.api_key.c, t.key_grant.c, t.entitlement.c, t.lease.c, t.org.c  # noqa: E741


@dataclass(frozen=True)
class Wanted:
    """Which ends: up to `until`, of one organisation or of the site, behind a place of the order, so many of each kind."""

    now: float
    until: float
    org: str = ""
    after: tuple[float, str, str] | None = None
    limit: int = MOST

    def rows(self, kind: str, found: Select[Any], ends: ColumnElement[float], item: ColumnElement[str]) -> Select[Any]:
        """The rows of a kind that are asked for, in their order."""
        found = found.where(ends <= self.until, ends > 0).order_by(ends, item).limit(self.limit)
        if self.org:
            found = found.where(O.name == self.org)
        if self.after is None:
            return found
        at, other, last = self.after
        if kind == other:
            return found.where(or_(ends > at, and_(ends == at, item > last)))
        return found.where(ends >= at if kind > other else ends > at)


def items(conn: Connection, wanted: Wanted, certificate: Path | None) -> list[Item]:
    """What ends; of each kind at most `limit`, the nearest."""
    out: list[Item] = []
    for kind in (_keys, _grants, _documents, _leases, _upstreams):
        out += kind(conn, wanted)
    if not wanted.org:
        out += [*_lists(conn), *_certificate(certificate)]
    return [item for item in out if item.ends <= wanted.until]


def _keys(conn: Connection, wanted: Wanted) -> list[Item]:
    joined = t.api_key.join(t.org, O.id == K.org_id).outerjoin(t.member, t.member.c.id == K.member_id)
    columns = (K.key_id, K.expires, K.created, K.note, K.type, O.name.label("org"), t.member.c.name.label("member"))
    alive = (K.revoked_at == 0, O.closed_at == 0, func.coalesce(t.member.c.disabled_at, 0.0) == 0, K.expires > wanted.now - KEPT_S)
    rows = conn.execute(wanted.rows("api_key", select(*columns).select_from(joined).where(*alive), K.expires, K.key_id)).all()
    after: dict[str, str] = {}
    for part in chunks([row.key_id for row in rows]):
        after |= dict(conn.execute(select(K.replaces, K.key_id).where(K.replaces.in_(part), K.revoked_at == 0)).all())
    return [
        Item(
            "api_key",
            row.key_id,
            row.org,
            row.expires,
            begun=row.created,
            name=row.note or row.member or "",
            notes=f"{row.type} key" + (f" of {row.member}" if row.member else "") + (f"; {after[row.key_id]} follows" if row.key_id in after else ""),
            quiet=row.key_id in after,
        )
        for row in rows
    ]


def _grants(conn: Connection, wanted: Wanted) -> list[Item]:
    joined = t.key_grant.join(t.org, O.id == G.org_id).outerjoin(t.api_key, K.id == G.api_key_id)
    joined = joined.outerjoin(t.member, t.member.c.id == G.member_id).outerjoin(t.team, t.team.c.id == G.team_id)
    columns = (G.grant_id, G.expires, G.grace_s, G.created, G.note, G.models, G.actions, O.name.label("org"))
    to = (K.key_id.label("key"), t.member.c.name.label("member"), t.team.c.name.label("team"))
    ended = (K.revoked_at, t.member.c.disabled_at, t.team.c.closed_at)
    alive = [func.coalesce(column, 0.0) == 0 for column in ended]
    alive += [G.revoked_at == 0, O.closed_at == 0, G.expires + G.grace_s > wanted.now - KEPT_S]
    alive += [or_(func.coalesce(K.expires, 0.0) == 0, K.expires > wanted.now)]
    rows = conn.execute(wanted.rows("grant", select(*columns, *to).select_from(joined).where(*alive), G.expires, G.grant_id)).all()
    out = []
    for row in rows:
        whom = next((f"{kind} {name}" for kind, name in (("key", row.key), ("member", row.member), ("team", row.team)) if name), "everybody")
        notes = f"{','.join(json.loads(row.actions))} on {', '.join(json.loads(row.models))[:200]} for {whom}"
        item = Item("grant", row.grant_id, row.org, row.expires, row.expires + row.grace_s, row.created, row.note, notes)
        out.append(item)
    return out


def _documents(conn: Connection, wanted: Wanted) -> list[Item]:
    """The documents that count; one whose successor is here and begins in time is quiet."""
    joined = t.entitlement.join(t.org, O.entitlement_id == E.id)
    columns = (E.jti, E.org_id, E.expires, E.grace_s, E.iat, E.tier, E.gpus, O.name.label("org"))
    alive = (E.revoked_at == 0, O.closed_at == 0)
    rows = conn.execute(wanted.rows("entitlement", select(*columns).select_from(joined).where(*alive), E.expires, E.jti)).all()
    follow: dict[int, float] = {}
    for part in chunks([row.org_id for row in rows]):
        later = select(E.org_id, func.min(E.not_before)).where(E.org_id.in_(part), E.not_before > wanted.now, E.replaced_at == 0, E.revoked_at == 0)
        follow |= dict(conn.execute(later.group_by(E.org_id)).all())
    out = []
    for row in rows:
        begins = follow.get(row.org_id)
        notes = f"tier {row.tier}, {row.gpus} GPUs" + (f"; one that begins on {date(begins)} follows" if begins else "")
        quiet = begins is not None and begins <= row.expires
        item = Item("entitlement", row.jti, row.org, row.expires, row.expires + row.grace_s, row.iat, f"of {row.org}", notes, quiet)
        out.append(item)
    return out


def _living(now: float) -> tuple[ColumnElement[bool], ...]:
    """Leases of runtimes that were seen: not over, not given back, not revoked, not followed by another one on the same GPUs."""
    return (L.exp > now, L.replaced_by == "", L.revoked_at == 0, L.returned_at == 0)


def _leases(conn: Connection, wanted: Wanted) -> list[Item]:
    """The newest lease of each runtime."""
    newest = select(L.org_id, func.max(L.serial)).where(*_living(wanted.now)).group_by(L.org_id, L.host, L.model, L.profile_id)
    columns = (L.jti, L.exp, L.iat, L.host, L.model, L.key_id, O.name.label("org"))
    found = select(*columns).join(t.org, O.id == L.org_id).where(*_living(wanted.now), tuple_(L.org_id, L.serial).in_(newest))
    return [
        Item(
            "lease",
            row.jti,
            row.org,
            row.exp,
            begun=row.iat,
            name=row.host,
            notes=f"renewed by itself, under {row.key_id}",
            quiet=True,
            stops=((row.host, row.model),),
        )
        for row in conn.execute(wanted.rows("lease", found, L.exp, L.jti))
    ]


def _lists(conn: Connection) -> list[Item]:
    r = t.revocation_list.c
    notes = "nothing stops by itself; what was revoked since is not known here"
    rows = conn.execute(select(r.issuer, r.next_update, r.iat, r.serial).where(r.next_update > 0)).all()
    return [Item("revocation_list", row.issuer, "", row.next_update, begun=row.iat, name=f"serial {row.serial}", notes=notes) for row in rows]


def _upstreams(conn: Connection, wanted: Wanted) -> Iterator[Item]:
    """Ends upstream; an organisation is shown those that names of its own came with, and its own names alone."""
    for end in upstream.ending(conn):
        names = [name for name in end.names if not wanted.org or name.startswith(f"{wanted.org}/")]
        if not wanted.org or (wanted.org in end.orgs and names):
            item = Item(end.kind, end.item, end.org, end.ends, notes="what was fetched with it stays; nothing newer comes")
            yield replace(item, stops=tuple(("", name) for name in names))


def _certificate(path: Path | None) -> Iterator[Item]:
    if path is None:
        return
    try:
        found, begins, ends = tls.validity(path)
    except AirlockError:  # told where it is loaded
        return
    yield Item("certificate", found, "", ends, begun=begins, name=path.name, notes="clients that check it connect no more")


def with_stops(conn: Connection, found: list[Item], now: float) -> list[Item]:
    """The items with the runtimes that were seen under them: a runtime goes on to the end of its lease and grace, and gets no other."""
    columns: dict[str, Any] = {"api_key": L.key_id, "grant": L.grant_id, "entitlement": L.ent_jti}
    seen: dict[tuple[str, str], set[tuple[str, str]]] = {}
    for kind, column in columns.items():
        for part in chunks(sorted({item.id for item in found if item.kind == kind})):
            rows = select(column.label("under"), L.host, L.model).where(*_living(now), column.in_(part)).distinct()
            for row in conn.execute(rows.limit(MOST)):
                seen.setdefault((kind, row.under), set()).add((row.host, row.model))
    if any(item.kind == "certificate" for item in found):
        every = {(row.host, row.model) for row in conn.execute(select(L.host, L.model).where(*_living(now)).distinct().limit(MOST))}
        seen |= {("certificate", item.id): every for item in found if item.kind == "certificate"}
    return [item.with_stops(seen.get((item.kind, item.id), item.stops)) for item in found]


class Expiring(Desk):
    """The calendar of one site; `certificate` is what its listener serves by TLS, if any."""

    def __init__(
        self,
        engine: Engine,
        entitlements: Entitlements,
        audit: Audit,
        gate: Gate = local_office,
        refuse: Refuse = never,
        *,
        certificate: Path | None = None,
    ) -> None:
        super().__init__(engine, entitlements, audit, gate, refuse)
        self._certificate = certificate

    def every(self, now: float, until: float) -> list[Item]:
        """All that ends up to a time, in its order, without what stops; raises Unavailable."""
        with reading(self._engine) as conn:
            return sorted(items(conn, Wanted(now, until), self._certificate), key=lambda item: item.place)

    def stopped(self, found: list[Item], now: float) -> list[Item]:
        """The same items with what stops; raises Unavailable."""
        with reading(self._engine) as conn:
            return with_stops(conn, found, now)

    def expiring(self, call: Call, days: int, org: str = "", after: str = "", limit: int = 100) -> Facts:
        """A page of what ends within so many days, the nearest first: for the site's administrator all or of `org`, else of the own organisation.

        Raises Denied, Invalid.
        """
        held = self._gate(call)
        org = org or ("" if held.site else call.principal.org)
        if not held.site:
            self._reader(call, org)
        wanted = Wanted(call.now, call.now + min(days, MAX_DAYS) * DAY_S, org, behind(after), limit + 1)
        with reading(self._engine) as conn:
            shown, onward = page(items(conn, wanted, self._certificate), wanted.after, limit)
            shown = with_stops(conn, shown, call.now)
        return {"now": date(call.now), "items": [item.as_json(call.now) for item in shown], "after": onward}
