"""The rows of a presented key and of what it asks for, in one statement: what the hot reads of every door need, found in one round trip.

Here because neither the keys (registry/entitlements.py) nor the names (registry/catalog.py) may know the other. It decides nothing: the guard runs
the same decision on the same rows as if they had been asked for one after the other.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

from sqlalchemy import CompoundSelect, Engine, Select, null, select, type_coerce, union_all

from artifact.grant import Principal, model_of
from artifact.manifest import is_digest
from artifact.store import Call
from registry import tables as t
from registry.catalog import storable
from registry.holders import Badge, as_badge, badge, caller, principal_of
from registry.statements import (
    BY_DIGEST,
    BY_REF,
    FILE_BY_DIGEST,
    FILE_BY_REF,
    HUB_FILE,
    HUB_NAMES,
    OBJECT,
    OBJECT_BY_ALIAS,
    Located,
    M,
    as_file,
    as_located,
    as_object,
)

Found = Located | Badge | None
# ("manifest", name, ref), the same without its bytes ("head", …), ("object", name, digest), ("file", name, ref, path), ("badge",), or the same file
# and, with an empty path, revision of the first of three names that exists: ("hub", ref, path, name, name, name)
Ask = tuple[str, ...]
USED = {"manifest": ("name", "model", "ref"), "object": ("name", "model", "digest"), "file": ("name", "model", "ref", "path")}
USED |= {"head": USED["manifest"], "badge": (), "hub": ("ref", "path", *HUB_NAMES)}


@dataclass(frozen=True)
class Sought(Call):
    """A call whose key was looked up together with what its request asks for; None where there is no such repository."""

    ask: Ask = ()
    found: Located | None = None
    badge: Badge | None = None

    def of_hub(self, name: str, ref: str, path: str | None = None) -> bool:
        """Whether `found` is this revision or file of that repository, which was asked for by several names."""
        same = self.ask[:2] == ("hub", ref) and path in (None, *self.ask[2:3])
        return same and self.found is not None and self.found.repo.name == name

    def object(self, name: str, digest: str) -> bool:
        """Whether `found` is this manifest or blob whole, with its bytes or their location."""
        if self.ask[:1] == ("object",):
            return self.ask[1:] == (name, digest)
        return self.ask[:2] == ("manifest", name) and self.found is not None and self.found.digest == digest and self.found.raw is not None


class Lookup:
    """The joint statements over one database."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def seek(self, ask: Ask, *, hmac: bytes = b"", key_id: str = "") -> tuple[Principal | None, Found]:
        """The holder of a key, by its HMAC or its id, and what was found for `ask`, by one statement."""
        kind, ref = ask[0], ask[2] if len(ask) > 2 and ask[0] != "hub" else ""
        if kind == "hub":
            values: dict[str, object] = dict(zip(USED["hub"], ask[1:], strict=True))
        else:
            name, path = (*ask[1:2], "")[0], (*ask[3:4], "")[0]
            values = {"name": name, "model": model_of(name), "ref": ref, "digest": ref, "path": path}
        if not all(storable(value) for value in values.values()):
            ref, values = "", dict.fromkeys(values, "")  # names nothing, as it would in the catalog
        values = {k: values[k] for k in USED[kind]} | ({"hmac": hmac} if hmac else {"key_id": key_id if storable(key_id) else ""})
        statement = _joint("hmac" if hmac else "key_id", kind, is_digest(ref), not ref.startswith("sha512:"))
        with t.reading(self._engine) as conn:
            rows = conn.execute(statement, values).all()
        principal = principal_of([row for row in rows if row.key_id is not None])
        sought = [row for row in rows if row.key_id is None]
        if not sought:
            return principal, None
        row = sought[0]
        if kind in ("object", "badge"):
            return principal, as_object(row) if kind == "object" else as_badge(sought)
        return principal, as_file(row) if kind in ("file", "hub") else as_located(row, getattr(row, "raw", None))


@functools.cache
def _joint(by: str, kind: str, digest: bool, own: bool) -> CompoundSelect[Any]:
    """The rows of the key, one a grant, and the row of the object, told apart by key_id: each side has nulls where the other has columns."""
    objects: dict[str, Select[Any]] = {
        "head": BY_DIGEST if digest else BY_REF,
        "manifest": (BY_DIGEST if digest else BY_REF).add_columns(M.c.raw),
        "object": OBJECT if own else OBJECT_BY_ALIAS,
        "file": FILE_BY_DIGEST if digest else FILE_BY_REF,
        "hub": HUB_FILE,
        "badge": badge(by),
    }
    left, right = caller(by).subquery("holder"), objects[kind].subquery("sought")
    no_key = [type_coerce(null(), c.type).label(c.name) for c in left.c]
    no_object = [type_coerce(null(), c.type).label(c.name) for c in right.c]
    return union_all(select(*left.c, *no_object), select(*no_key, *right.c))
