"""Under what conditions of the law a repository may be read here: a licence that somebody must have accepted, and a block; the changes, in SQL.

An administrator says both. That a licence was accepted is known from the records that came with a bundle, or said by an administrator. It decides
nothing: artifact/grant.py does.
"""

from __future__ import annotations

from sqlalchemy import Connection, select, update

from artifact.errors import Invalid, NotFound
from artifact.store import Call
from registry import tables as t
from registry.audit import Audit

R, U = t.repository, t.upstream_record
MOST = {"license": 200, "accepted_by": 200, "blocked": 300}


def check(value: object, key: str) -> str:
    """A text on one line; raises Invalid."""
    if not isinstance(value, str) or len(value) > MOST[key] or not value.isprintable() or value != value.strip():
        raise Invalid(f"{key} is not text on one line", expected=f"at most {MOST[key]} printable characters", reason="body")
    return value


def set_terms(
    conn: Connection, audit: Audit, call: Call, name: str, licence: str | None, accepted_by: str | None, blocked: str | None
) -> dict[str, object]:
    """Sets what is given of a repository's licence, who accepted it, and why nobody may read it; None leaves that part, empty takes it away.

    Another licence begins unaccepted, unless a bundle told who accepted that one for this name. Raises NotFound, Invalid.
    """
    row = conn.execute(select(R.c.license, R.c.license_by, R.c.license_at, R.c.blocked).where(R.c.name == name).with_for_update(of=R)).first()
    if row is None:
        raise NotFound(f"there is no repository {name}", do="airlock catalog list", reason="repo")
    terms = {"license": row.license, "license_by": row.license_by, "license_at": row.license_at, "blocked": row.blocked}
    if licence is not None and licence != row.license:
        told = select(U.c.accepted_by, U.c.accepted_at).where(U.c.name == name, U.c.license == licence, U.c.accepted_by != "", U.c.accepted_at > 0)
        known = conn.execute(told.order_by(U.c.accepted_at).limit(1)).first() if licence else None
        terms |= {"license": licence, "license_by": known.accepted_by if known else "", "license_at": known.accepted_at if known else 0.0}
    if accepted_by is not None:
        if not terms["license"]:
            raise Invalid(f"{name} has no licence to accept", do="say which: --license TEXT", reason="license")
        terms |= {"license_by": accepted_by, "license_at": call.now if accepted_by else 0.0}
    if blocked is not None:
        terms["blocked"] = blocked
    conn.execute(update(R).where(R.c.name == name).values(terms))
    audit.change(conn, call, "terms", name, **terms, before_license=row.license, before_by=row.license_by, before_blocked=row.blocked)
    shown = {"name": name, "license": terms["license"], "accepted_by": terms["license_by"], "blocked": terms["blocked"]}
    return shown | {"accepted_at": terms["license_at"]}
