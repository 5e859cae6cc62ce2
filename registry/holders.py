"""Who holds a presented key and what it may, by one indexed statement: the key, its organisation, member and document, and the grants of all kinds.

Here because both the keys (registry/entitlements.py) and the joint statements (registry/lookup.py) need the same rows. It decides nothing.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from typing import Any

from sqlalchemy import ColumnElement, CompoundSelect, Select, bindparam, literal_column, null, select, type_coerce, union_all

from artifact.grant import Entitlement, Grant, Principal
from registry import tables as t

K, O, E, M, G = t.api_key, t.org, t.entitlement, t.member, t.key_grant  # noqa: E741 - the letters that the statement below uses
NONE: ColumnElement[int] = literal_column("0")
_HOLDER = (
    K.c.tier,
    K.c.expires,
    K.c.revoked_at,
    O.c.name.label("holder"),
    O.c.closed_at,
    O.c.entitlement_id,
    M.c.disabled_at,
    E.c.jti,
    E.c.serial,
    E.c.tier.label("ent_tier"),
    E.c.models.label("ent_models"),
    E.c.actions.label("ent_actions"),
    E.c.products,
    E.c.environments,
    E.c.gpus.label("ent_gpus"),
    E.c.not_before.label("ent_not_before"),
    E.c.expires.label("ent_expires"),
    E.c.grace_s.label("ent_grace_s"),
    E.c.revoked_at.label("ent_revoked_at"),
)
_GRANT = (
    G.c.id.label("row"),
    G.c.grant_id,
    G.c.models,
    G.c.actions,
    G.c.not_before,
    G.c.expires.label("grant_expires"),
    G.c.grace_s,
    G.c.environment,
    G.c.gpus,
    G.c.profiles,
)


@functools.cache
def caller(by: str) -> CompoundSelect[Any]:
    """The rows of one key, found by its `hmac` or `key_id`: itself, then one for each grant that is not revoked.

    An arm for each kind of grant, each from the key's row by an index: one join with OR would read all grants of the organisation on some databases.
    """
    column = K.c.hmac if by == "hmac" else K.c.key_id
    # The document of another organisation is none, and a grant of another one is none: `+ 0` keeps that from choosing the index.
    document = (E.c.id == O.c.entitlement_id) & (E.c.org_id + NONE == O.c.id)
    itself = K.join(O, O.c.id == K.c.org_id).outerjoin(E, document).outerjoin(M, M.c.id == K.c.member_id)
    team = t.team_member.join(t.team, (t.team.c.id == t.team_member.c.team_id) & (t.team.c.closed_at == NONE))
    of_team = K.join(team, t.team_member.c.member_id == K.c.member_id).join(G, G.c.team_id == t.team_member.c.team_id)
    whole = (G.c.org_id == K.c.org_id) & G.c.api_key_id.is_(None) & G.c.member_id.is_(None) & G.c.team_id.is_(None)
    kinds = (K.join(G, G.c.api_key_id == K.c.id), K.join(G, G.c.member_id == K.c.member_id), of_team, K.join(G, whole))
    mine = column == bindparam(by)
    first: Select[Any] = select(K.c.key_id, *_HOLDER, *_nulls(_GRANT)).select_from(itself).where(mine)
    rights = select(K.c.key_id, *_nulls(_HOLDER), *_GRANT).where(mine, G.c.revoked_at == NONE, G.c.org_id + NONE == K.c.org_id)
    return union_all(first, *(rights.select_from(kind) for kind in kinds))


def _nulls(columns: Sequence[Any]) -> list[Any]:
    return [type_coerce(null(), c.type).label(c.name) for c in columns]


def principal_of(rows: Sequence[Any]) -> Principal | None:
    """The principal of the rows of `caller`; None of no rows."""
    own = next((row for row in rows if row.holder is not None), None)
    if own is None:
        return None
    grants = tuple(_grant(row) for row in sorted((row for row in rows if row.row is not None), key=lambda row: row.row))
    document = None if own.entitlement_id is None else _document(own)
    return Principal(
        own.key_id,
        own.holder,
        own.tier,
        own.expires,
        own.revoked_at,
        grants,
        entitlement=document,
        closed_at=own.closed_at,
        disabled_at=own.disabled_at or 0.0,
    )


@functools.lru_cache(maxsize=4096)
def _texts(text: str) -> tuple[str, ...]:
    return tuple(json.loads(text))


def _grant(row: Any) -> Grant:
    return Grant(
        _texts(row.models),
        _texts(row.actions),
        row.not_before,
        row.grant_expires,
        row.grace_s,
        row.grant_id,
        row.environment,
        row.gpus,
        _texts(row.profiles),
    )


def _document(row: Any) -> Entitlement:
    """The organisation's document; where its row is gone, one that gives nothing: what was cut once is never widened by a loss."""
    if row.jti is None:
        return Entitlement("", 0, "", (), (), 0.0, 0.0)
    return Entitlement(
        row.jti,
        row.serial,
        row.ent_tier,
        _texts(row.ent_models),
        _texts(row.ent_actions),
        row.ent_not_before,
        row.ent_expires,
        row.ent_grace_s,
        row.ent_gpus,
        _texts(row.products),
        _texts(row.environments),
        row.ent_revoked_at,
    )
