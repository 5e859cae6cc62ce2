"""What an audit report is made of, out of SQL: entries of a period page after page, leases, keys, grants and upstream records.

It counts nothing (registry/report.py does) and decides nothing (registry/auditor.py does).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import chain
from typing import Any

from sqlalchemy import Connection, Select, func, or_, select

from artifact.grant import date
from registry import tables as t
from registry.report import MAX_UPSTREAM, SOON_S, Event, Lease, Period, Row, Tally, bounded, gpus

PAGE = 5000
_L, _O, _K, _G, _E, _U = t.audit_leaf.c, t.org.c, t.api_key.c, t.key_grant.c, t.entitlement.c, t.upstream_record.c


def report(conn: Connection, period: Period) -> Row:
    """The report of a period but for its evidence (docs/operations.md, "Audit")."""
    tally = Tally(period)
    for event in chain(events(conn, period), waiting(conn, period)):
        tally.add(event)
    found = tally.result()
    found |= {"sealed": sealed(conn, period), "leases_recorded": tally.leases, "leases_stored": _leases_stored(conn, period), "days": period.days}
    return found | {
        "gpus": bounded(gpus(leases(conn, period), period)),
        "unused_keys": bounded(unused_keys(conn, period)),
        "grants": bounded(ending_grants(conn, period)),
        "upstream": bounded(upstream(conn, period)),
    }


def _of(statement: Select[Any], period: Period) -> Select[Any]:
    return statement.where(_O.name == period.org) if period.org else statement


def sealed(conn: Connection, period: Period) -> int:
    """How many entries of a period were sealed, of all organisations: whose they were is in their export alone."""
    gone = (_L.ts >= period.start, _L.ts < period.end, _L.body.is_(None))
    return int(conn.execute(select(func.count()).select_from(t.audit_leaf).where(*gone)).scalar_one())


def events(conn: Connection, period: Period) -> Iterator[Event]:
    """The entries of a period that have their text, in the log's order."""
    within = (_L.ts >= period.start, _L.ts < period.end)
    at, last = conn.execute(select(func.min(_L.idx), func.max(_L.idx)).where(*within)).one()
    if at is None:
        return
    columns = (_L.idx, _L.ts, _L.event, _L.org, _L.key_id, _L.ref, _L.result, _L.reason, _L.body)
    wanted = select(*columns).where(*within, _L.body.is_not(None)).order_by(_L.idx).limit(PAGE)
    if period.org:
        wanted = wanted.where(_L.org == period.org)
    while True:
        rows = conn.execute(wanted.where(_L.idx >= at, _L.idx <= last)).all()
        for row in rows:
            yield _event(row[1:-1], row.body)
        if len(rows) < PAGE:
            return
        at = rows[-1].idx + 1


def waiting(conn: Connection, period: Period) -> Iterator[Event]:
    """Counters whose window is not over: what they counted so far, as their rows will tell it."""
    c = t.audit_count.c
    for row in conn.execute(select(c.last, c.n, c.body).where(c.last >= period.start, c.last < period.end)):
        doc = json.loads(row.body)
        event = _event((row.last, *(str(doc.get(name) or "") for name in ("event", "org", "key_id", "ref", "result", "reason"))), row.body)
        if not period.org or event.org == period.org:
            yield event._replace(body={**event.body, "counted": True, "n": row.n})


def _event(columns: Any, body: str) -> Event:
    try:
        doc = json.loads(body)
    except ValueError:
        doc = {}
    return Event._make([*columns, doc if isinstance(doc, dict) else {}])


def leases(conn: Connection, period: Period) -> Iterator[Lease]:
    """The leases that counted within a period, each to its end, its return or the one that took its place.

    A revoked one counts to its end, as where GPUs are bounded (registry/leases.py): what it let start may still run.
    """
    lease, after = t.lease.c, t.lease.alias()
    source = t.lease.join(t.org, _O.id == lease.org_id).outerjoin(after, after.c.jti == lease.replaced_by)
    source = source.outerjoin(t.entitlement, _E.jti == lease.ent_jti).outerjoin(t.key_grant, _G.grant_id == lease.grant_id)
    columns = (lease.host, lease.gpus, lease.iat, lease.exp, lease.returned_at, lease.ent_jti, lease.grant_id)
    wanted = select(*columns, _O.name, after.c.iat.label("replaced_at"), _E.gpus.label("bought"), _G.gpus.label("granted")).select_from(source)
    for row in conn.execute(_of(wanted.where(lease.iat < period.end, lease.exp > period.start).order_by(lease.iat), period)):
        cuts = [at for at in (row.returned_at, row.replaced_at) if at]
        licence = f"entitlement {row.ent_jti}" if row.ent_jti else f"grant {row.grant_id}" if row.grant_id else "without a document"
        bound = row.bought if row.ent_jti else row.granted if row.grant_id else 0
        yield Lease(licence, row.name, int(bound or 0), row.host, tuple(json.loads(row.gpus)), row.iat, min([row.exp, *cuts]))


def _leases_stored(conn: Connection, period: Period) -> int:
    lease = t.lease.c
    wanted = select(func.count()).select_from(t.lease.join(t.org, _O.id == lease.org_id)).where(lease.iat >= period.start, lease.iat < period.end)
    return int(conn.execute(_of(wanted, period)).scalar_one())


def unused_keys(conn: Connection, period: Period) -> list[Row]:
    """Keys that live, were made before the end of the period and were not used since its beginning, the oldest first."""
    alive = (_K.revoked_at == 0, or_(_K.expires == 0, _K.expires > period.now))
    wanted = select(_K.key_id, _O.name, _K.type, _K.note, _K.created, _K.last_used, _K.expires).join(t.org, _O.id == _K.org_id)
    wanted = wanted.where(*alive, _K.created < period.end, _K.last_used < period.start).order_by(_K.last_used, _K.id)
    return [
        {
            "key_id": row.key_id,
            "org": row.name,
            "type": row.type,
            "note": row.note,
            "created": date(row.created),
            "last_used": _moment(row.last_used),
            "expires": _moment(row.expires),
        }
        for row in conn.execute(_of(wanted, period))
    ]


def ending_grants(conn: Connection, period: Period) -> list[Row]:
    """Grants whose end lies between the beginning of the period and 90 days from now, the nearest first."""
    until = max(period.end, period.now + SOON_S)
    wanted = select(t.key_grant, _O.name, _K.key_id, t.member.c.name.label("member"), t.team.c.name.label("team"))
    source = t.key_grant.join(t.org, _O.id == _G.org_id).outerjoin(t.api_key, _K.id == _G.api_key_id)
    source = source.outerjoin(t.member, t.member.c.id == _G.member_id).outerjoin(t.team, t.team.c.id == _G.team_id)
    wanted = wanted.select_from(source).where(_G.revoked_at == 0, _G.expires >= period.start, _G.expires < until, _G.expires > 0)
    return [
        {
            "grant_id": row.grant_id,
            "org": row.name,
            "to": row.key_id or row.member or row.team or "everybody",
            "models": json.loads(row.models),
            "actions": json.loads(row.actions),
            "expires": date(row.expires),
            "days": round((row.expires - period.now) / 86400, 1),
        }
        for row in conn.execute(_of(wanted.order_by(_G.expires, _G.id), period))
    ]


def upstream(conn: Connection, period: Period) -> list[Row]:
    """The newest upstream record of each artefact, for an organisation those of its own repositories."""
    newest = select(func.max(_U.id)).group_by(_U.name, _U.ref)
    wanted = select(t.upstream_record).where(_U.id.in_(newest)).order_by(_U.name, _U.ref).limit(MAX_UPSTREAM)
    if period.org:
        owned = select(t.repository.c.name).join(t.org, _O.id == t.repository.c.org_id).where(_O.name == period.org)
        wanted = wanted.where(_U.name.in_(owned))
    texts = ("name", "ref", "digest", "source", "upstream_org", "key_id", "product", "tier", "license", "accepted_by", "evidence")
    return [
        {name: row[name] for name in texts}
        | {name: _moment(row[name]) for name in ("key_end", "subscription_end", "accepted_at", "fetched")}
        | {"gated": row["gated"]}
        for row in conn.execute(wanted).mappings()
    ]


def _moment(at: float) -> str:
    return date(at) if at else ""
