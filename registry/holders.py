"""Who holds a presented key and what it may, by one indexed statement: the key, its organisation, member and document, and the grants of all kinds.

Here because both the keys (registry/entitlements.py) and the joint statements (registry/lookup.py) need the same rows. It decides nothing.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, CompoundSelect, Select, bindparam, literal_column, null, select, type_coerce, union_all

from artifact.grant import Entitlement, Grant, Principal
from registry import tables as t

K, O, E, M, G = t.api_key.alias("k"), t.org.alias("o"), t.entitlement.alias("e"), t.member.alias("m"), t.key_grant.alias("g")  # noqa: E741
T, U = t.team.alias("t"), t.team_member.alias("u")
NONE: ColumnElement[int] = literal_column("0")
_HOLDER = (
    K.c.tier.label("key_tier"),
    K.c.expires.label("ends"),
    K.c.revoked_at.label("revoked"),
    O.c.name.label("holder"),
    O.c.closed_at,
    O.c.entitlement_id.label("document"),
    M.c.disabled_at,
    E.c.tier,
    E.c.revoked_at,
)
# What a document and a grant both have stands in the same columns: a driver's work grows with their number, and each row is the one or the other.
_DOCUMENT = (E.c.serial, E.c.jti, E.c.models, E.c.actions, E.c.not_before, E.c.expires, E.c.grace_s, E.c.gpus, E.c.environments, E.c.products)
_GRANT = (G.c.id, G.c.grant_id, G.c.models, G.c.actions, G.c.not_before, G.c.expires, G.c.grace_s, G.c.gpus, G.c.environment, G.c.profiles)


@dataclass(frozen=True)
class Badge:
    """Whose a key is, for listings that tell a caller about itself: its type, its member (empty: none) and that member's open teams."""

    kind: str
    member: str = ""
    teams: tuple[str, ...] = ()


@functools.cache
def badge(by: str) -> Select[Any]:
    """The rows of a key's badge, found by its `hmac` or `key_id`: one for each team of its member, at least one."""
    source = K.outerjoin(M, M.c.id == K.c.member_id).outerjoin(U, U.c.member_id == K.c.member_id)
    source = source.outerjoin(T, (T.c.id == U.c.team_id) & (T.c.closed_at == NONE))
    columns = (K.c.type.label("key_type"), M.c.name.label("person"), T.c.name.label("team"))
    return select(*columns).select_from(source).where((K.c.hmac if by == "hmac" else K.c.key_id) == bindparam(by))


def as_badge(rows: Sequence[Any]) -> Badge:
    """A Badge from the rows of `badge`."""
    return Badge(rows[0].key_type, rows[0].person or "", tuple(sorted(row.team for row in rows if row.team)))


@functools.cache
def caller(by: str) -> CompoundSelect[Any]:
    """The rows of one key, found by its `hmac` or `key_id`: itself, then one for each grant that is not revoked.

    An arm for each kind of grant, each from the key's row by an index: one join with OR would read all grants of the organisation on some databases.
    """
    column = K.c.hmac if by == "hmac" else K.c.key_id
    # The document of another organisation is none, and a grant of another one is none: `+ 0` keeps that from choosing the index.
    itself = K.join(O, O.c.id == K.c.org_id).outerjoin(M, M.c.id == K.c.member_id)
    itself = itself.outerjoin(E, (E.c.id == O.c.entitlement_id) & (E.c.org_id + NONE == O.c.id))
    of_team = K.join(U, U.c.member_id == K.c.member_id).join(T, (T.c.id == U.c.team_id) & (T.c.closed_at == NONE)).join(G, G.c.team_id == U.c.team_id)
    whole = (G.c.org_id == K.c.org_id) & G.c.api_key_id.is_(None) & G.c.member_id.is_(None) & G.c.team_id.is_(None)
    kinds = (K.join(G, G.c.api_key_id == K.c.id), K.join(G, G.c.member_id == K.c.member_id), of_team, K.join(G, whole))
    mine = column == bindparam(by)
    first: Select[Any] = select(K.c.key_id, *_HOLDER, *_DOCUMENT).select_from(itself).where(mine)
    rights = select(K.c.key_id, *_nulls(_HOLDER), *_GRANT).where(mine, G.c.revoked_at == NONE, G.c.org_id + NONE == K.c.org_id)
    return union_all(first, *(rights.select_from(kind) for kind in kinds))


def _nulls(columns: Sequence[Any]) -> list[Any]:
    return [type_coerce(null(), c.type) for c in columns]


def principal_of(rows: Sequence[Any]) -> Principal | None:
    """The principal of the rows of `caller`; None of no rows."""
    own = next((row for row in rows if row.holder is not None), None)
    if own is None:
        return None
    grants = tuple(_grant(row) for row in sorted((row for row in rows if row is not own), key=lambda row: row.serial))
    return Principal(
        own.key_id,
        own.holder,
        own.key_tier,
        own.ends,
        own.revoked,
        grants,
        entitlement=None if own.document is None else _document(own),
        closed_at=own.closed_at,
        disabled_at=own.disabled_at or 0.0,
    )


@functools.lru_cache(maxsize=4096)
def _texts(text: str) -> tuple[str, ...]:
    return tuple(json.loads(text))


def _grant(row: Any) -> Grant:
    texts = _texts(row.models), _texts(row.actions)
    return Grant(*texts, row.not_before, row.expires, row.grace_s, row.jti, row.environments, row.gpus, _texts(row.products))


def _document(row: Any) -> Entitlement:
    """The organisation's document; where its row is gone, one that gives nothing: what was cut once is never widened by a loss."""
    if row.jti is None:
        return Entitlement("", 0, "", (), (), 0.0, 0.0)
    texts, lists = (_texts(row.models), _texts(row.actions)), (_texts(row.products), _texts(row.environments))
    return Entitlement(row.jti, row.serial, row.tier, *texts, row.not_before, row.expires, row.grace_s, row.gpus, *lists, row.revoked_at)
