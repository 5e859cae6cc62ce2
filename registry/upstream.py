"""What bundles told of the upstreams of names: rows at import, what a repository requires, what of an upstream ends when.

An import sets what a repository requires, until an administrator says otherwise: then only an administrator changes it, and imports say what
they left. A name that an organisation had here before it came by a bundle is left as well. It decides nothing: artifact/grant.py does.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from sqlalchemy import Connection, select, update

from artifact.errors import NotFound
from artifact.grant import TIERS
from artifact.store import Call
from artifact.upstream import Upstream, check_fact, check_product, check_tier
from registry import tables as t
from registry.audit import Audit
from registry.links import chunks, ignore_duplicates, replace_duplicates

R, U = t.repository, t.upstream_record
FIELDS = tuple(f.name for f in fields(Upstream))
KEY = ("name", "ref", "digest", "source")
IMPORT, ADMIN = "import", "admin"
MAX_STOPS = 100


@dataclass(frozen=True)
class Ending:
    """The end of an upstream's key or subscription: `item` is the key's id, `org` the account upstream, `orgs` whose names were fetched with it."""

    kind: str
    item: str
    org: str
    ends: float
    names: tuple[str, ...]
    orgs: tuple[str, ...]


def left(conn: Connection, names: Iterable[str]) -> set[str]:
    """Those of the names whose requirements an import must not touch; asked before it adds anything."""
    out = set()
    for part in chunks(sorted(set(names))):
        for row in conn.execute(select(R.c.name, R.c.kind, R.c.org_id, R.c.requires_from).where(R.c.name.in_(part))):
            own = row.org_id is not None and row.kind != "" and not row.requires_from
            if row.requires_from == ADMIN or own:
                out.add(row.name)
    return out


def add(
    conn: Connection,
    audit: Audit,
    call: Call,
    told: Sequence[Mapping[str, object]],
    sender: str,
    sequence: int,
    *,
    older: bool,
    kept: set[str],
) -> list[str]:
    """Records what an index tells of its upstreams, and sets what its names require; the names in `kept` that would require something else.

    An older bundle adds what is not there, and changes nothing. Entries of before requirements travelled say nothing about them.
    """
    facts = [check_fact(item) for item in told]
    if not facts:
        return []
    columns = [name for name in FIELDS if name not in KEY] + ["sender", "sequence", "at"]
    statement = ignore_duplicates(conn, U) if older else replace_duplicates(conn, U, KEY, columns)
    conn.execute(statement, [asdict(fact) | {"sender": sender, "sequence": sequence, "at": call.now} for fact in facts])
    for fact in facts:
        audit.change(conn, call, "upstream", f"{fact.name}@{fact.digest}", upstream=asdict(fact))
    wanted: dict[str, tuple[str, str]] = {}
    for item, fact in zip(told, facts, strict=True):
        if "tier" in item or "product" in item:
            tier, product = wanted.get(fact.name, ("", ""))
            wanted[fact.name] = (max(tier, fact.tier, key=_rank), max(product, fact.product))  # of several refs the most that one requires
    return [name for name, both in sorted(wanted.items()) if not _set(conn, audit, call, name, *both, older=older, keep=name in kept)]


def _rank(tier: str) -> int:
    return TIERS.index(tier) + 1 if tier else 0


def _set(conn: Connection, audit: Audit, call: Call, name: str, tier: str, product: str, *, older: bool, keep: bool) -> bool:
    """What an import says that a name requires; False where another setting was left as it is."""
    now = conn.execute(select(R.c.requires_tier, R.c.requires_product, R.c.requires_from).where(R.c.name == name)).one()
    if older and now.requires_from:
        return True
    same = (now.requires_tier, now.requires_product) == (tier, product)
    if keep:
        if not same:
            audit.change(conn, call, "require_kept", name, tier=now.requires_tier, product=now.requires_product, told_tier=tier, told_product=product)
        return same
    if not same or now.requires_from != IMPORT:
        conn.execute(update(R).where(R.c.name == name).values(requires_tier=tier, requires_product=product, requires_from=IMPORT))
    if not same:
        audit.change(conn, call, "require", name, tier=tier, product=product, by=IMPORT)
    return True


def set_by(conn: Connection, name: str) -> str:
    """Who said what a repository requires: import, admin, or empty for nobody."""
    return str(conn.execute(select(R.c.requires_from).where(R.c.name == name)).scalar_one_or_none() or "")


def require(conn: Connection, audit: Audit, call: Call, name: str, tier: str | None, product: str | None) -> dict[str, object]:
    """Sets what a repository requires, None leaving that part; from now on no import changes it; raises NotFound, Invalid."""
    row = conn.execute(select(R.c.requires_tier, R.c.requires_product).where(R.c.name == name)).first()
    if row is None:
        raise NotFound(f"there is no repository {name}", do="airlock catalog list", reason="repo")
    tier = row.requires_tier if tier is None else check_tier(tier)
    product = row.requires_product if product is None else check_product(product)
    conn.execute(update(R).where(R.c.name == name).values(requires_tier=tier, requires_product=product, requires_from=ADMIN))
    before = {"before_tier": row.requires_tier, "before_product": row.requires_product}
    audit.change(conn, call, "require", name, tier=tier, product=product, by=ADMIN, **before)
    return {"name": name, "tier": tier, "product": product}


def page(conn: Connection, after: int, limit: int, name: str = "") -> list[dict[str, object]]:
    """Rows from behind the number `after`, oldest first, of one name where it is given: the fields of the index, bundle and time of the import."""
    found = select(U).where(U.c.id > after).order_by(U.c.id).limit(limit)
    if name:
        found = found.where(U.c.name == name)
    columns = ("id", *FIELDS, "sender", "sequence", "at")
    return [{column: row[column] for column in columns} for row in conn.execute(found).mappings()]


def ending(conn: Connection) -> list[Ending]:
    """When the upstreams' keys and subscriptions end that names of this site came with last, as their newest rows say; the nearest first."""
    columns = (U.c.name, U.c.key_id, U.c.upstream_org, U.c.key_end, U.c.subscription_end, t.org.c.name.label("owner"))
    found = select(*columns).join(R, R.c.name == U.c.name).outerjoin(t.org, t.org.c.id == R.c.org_id).where(R.c.kind != "")
    keys, last = dict[str, Any](), dict[str, Any]()
    for row in conn.execute(found.order_by(U.c.fetched, U.c.id)):
        keys[row.key_id] = last[row.name] = row
    out = []
    for key_id, row in keys.items():
        fetched = [r for r in last.values() if r.key_id == key_id]  # a name that came again with another key depends on this one no more
        names, orgs = tuple(sorted(r.name for r in fetched)), tuple(sorted({r.owner for r in fetched if r.owner}))
        for kind, ends in (("upstream_key", row.key_end), ("upstream_subscription", row.subscription_end)):
            if key_id and ends and names:
                out.append(Ending(kind, key_id, row.upstream_org, ends, names[:MAX_STOPS], orgs))
    return sorted(out, key=lambda e: (e.ends, e.kind, e.item))
