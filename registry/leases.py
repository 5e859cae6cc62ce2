"""Rows of leases: a new one in the place of what the same GPUs held, how many GPUs are leased, and which leases end early.

Functions over a connection, below the verbs (registry/leasing.py); the caller holds the organisation's row, chooses the transaction and records it.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, and_, delete, func, insert, or_, select, tuple_, update

from artifact.errors import NotFound
from artifact.grant import date
from registry import tables as t
from registry.database import alone
from registry.people import Facts, moment


@dataclass(frozen=True)
class Wish:
    """What a lease is asked for, already checked: the model, the profile and where it is to run."""

    model: str
    model_digest: str
    profile_digest: str
    profile_id: str
    host: str
    gpus: tuple[str, ...]


def hold(conn: Connection, org: str) -> tuple[int, int]:
    """Counts the organisation's lease serial up, which holds its row to the end of the transaction; returns its id and the serial."""
    o = t.org.c
    counted = update(t.org).where(o.name == org).values(lease_serial=o.lease_serial + 1).returning(o.id, o.lease_serial)
    org_id, serial = conn.execute(counted).one()
    return int(org_id), int(serial)


def gpus_leased(conn: Connection, org_id: int, now: float, wish: Wish, *, grant_id: str = "") -> int:
    """GPUs (host and GPU, each once) of the organisation's leases that are neither over nor returned, but for those wished: they are counted anew.

    Under that grant, or with none under any entitlement. A revoked lease counts to its end: what it let start may still run.
    """
    g, lease = t.lease_gpu.c, t.lease.c
    living = (lease.org_id == org_id, lease.exp > now, lease.returned_at == 0)
    under = lease.grant_id == grant_id if grant_id else lease.ent_jti != ""
    found = select(g.host, g.gpu_uuid).select_from(t.lease_gpu.join(t.lease, lease.jti == g.jti)).where(*living, under)
    others = found.where(or_(g.host != wish.host, g.gpu_uuid.not_in(wish.gpus))).distinct().subquery()
    return int(conn.execute(select(func.count()).select_from(others)).scalar_one())


def add(conn: Connection, org_id: int, serial: int, wish: Wish, **columns: Any) -> None:
    """A lease's row, replacing the model's own one on the same (host, GPU), or on a CPU node what that host held for the same model and key.

    Another model's lease of the same GPU stands on: its right is in use until it is returned or over.
    """
    jti, lease = columns["jti"], t.lease.c
    values = {name: getattr(wish, name) for name in ("model", "model_digest", "profile_digest", "profile_id", "host")}
    conn.execute(insert(t.lease).values(org_id=org_id, serial=serial, gpus=json.dumps(wish.gpus), **values, **columns))
    alone(conn, "lease", wish.host)
    if not wish.gpus:
        same = (lease.org_id == org_id, lease.host == wish.host, lease.gpus == "[]", lease.model == wish.model, lease.key_id == columns["key_id"])
        conn.execute(update(t.lease).where(*same, lease.exp > columns["iat"], lease.replaced_by == "", lease.jti != jti).values(replaced_by=jti))
        return
    g = t.lease_gpu
    here = (g.c.host == wish.host, g.c.gpu_uuid.in_(wish.gpus))
    mine = (lease.org_id == org_id, lease.model == wish.model)
    conn.execute(update(t.lease).where(lease.jti.in_(select(g.c.jti).where(*here)), *mine).values(replaced_by=jti))
    gone = or_(and_(*mine), lease.exp <= columns["iat"], lease.returned_at != 0)
    conn.execute(delete(g).where(*here, select(lease.jti).where(lease.jti == g.c.jti, gone).exists()))
    conn.execute(insert(g), [{"host": wish.host, "gpu_uuid": gpu, "jti": jti} for gpu in wish.gpus])


def end(conn: Connection, jti: str, column: str, at: float) -> bool:
    """Marks one lease as revoked or returned (`revoked_at`, `returned_at`); False where it was before."""
    ended = t.lease.c[column]
    return conn.execute(update(t.lease).where(t.lease.c.jti == jti, ended == 0).values({column: at})).rowcount == 1


def revoke_under(
    conn: Connection, at: float, *, key_ids: Collection[str] = (), grant_ids: Collection[str] = (), documents: Collection[str] = ()
) -> int:
    """Revokes the leases that are not over and were given under one of these keys, grants or entitlements; returns how many."""
    lease, of = t.lease.c, []
    for column, values in ((lease.key_id, key_ids), (lease.grant_id, grant_ids), (lease.ent_jti, documents)):
        if values:
            of.append(column.in_(values))
    if not of:
        return 0
    return conn.execute(update(t.lease).where(or_(*of), lease.exp > at, lease.revoked_at == 0).values(revoked_at=at)).rowcount


def lease_of(conn: Connection, jti: str, org: str = "") -> Any:
    """One lease with the name of its organisation, of `org` where that is given; raises NotFound."""
    found = select(t.lease, t.org.c.name.label("org")).join(t.org, t.org.c.id == t.lease.c.org_id).where(t.lease.c.jti == jti)
    row = conn.execute(found.where(t.org.c.name == org) if org else found).first()
    if row is None:
        raise NotFound(f"there is no lease {jti[:80]!r}", do="airlock lease list", reason="lease")
    return row


def leases(conn: Connection, org: str, after: tuple[int, int], limit: int, *, living: float | None = None) -> list[Any]:
    """Leases behind (organisation's row, serial), in that order: of an organisation or of all; with `living` those that stand at that time."""
    lease = t.lease.c
    found = select(t.lease, t.org.c.name.label("org")).join(t.org, t.org.c.id == lease.org_id)
    if org:
        found = found.where(t.org.c.name == org)
    if living is not None:
        found = found.where(lease.exp > living, lease.replaced_by == "", lease.returned_at == 0)
    behind = tuple_(lease.org_id, lease.serial) > tuple_(*after)
    return list(conn.execute(found.where(behind).order_by(lease.org_id, lease.serial).limit(limit)))


def lease_facts(row: Any, now: float) -> Facts:
    """A lease as lists show it."""
    ended = (("returned", row.returned_at), ("revoked", row.revoked_at), ("replaced", row.replaced_by), ("expired", row.exp <= now))
    facts: Facts = {
        name: getattr(row, name) for name in ("jti", "org", "serial", "host", "model", "model_digest", "profile_id", "key_id", "grant_id")
    }
    facts |= {
        "gpus": json.loads(row.gpus),
        "entitlement": row.ent_jti,
        "environment": row.environment,
        "begins": date(row.iat),
        "ends": date(row.exp),
    }
    facts |= {"state": next((word for word, is_so in ended if is_so), "valid"), "replaced_by": row.replaced_by}
    return facts | {"revoked": moment(row.revoked_at), "returned": moment(row.returned_at)}
