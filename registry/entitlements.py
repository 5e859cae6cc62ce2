"""Organisations, API keys, grants and leases in SQL; the decision itself is artifact.grant, and no key is ever stored or logged.

A key's checksum is tested before any statement, so that garbage costs no query (docs/format.md section 6).
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import zlib
from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection, Engine, func, insert, select, update

from artifact.errors import Conflict, Invalid, NotFound
from artifact.grant import TIERS, Grant, Principal
from registry import tables as t
from registry.holders import caller, principal_of
from registry.keyring import pepper_id
from registry.people import add_grant, check_grant, rights_of
from registry.sigv4 import secret_of
from registry.usage import Usage

PREFIX = "nvapi-"
ALPHABET = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
_LETTERS = frozenset(ALPHABET)  # a set: no character of a guess takes longer than another
BODY, CHECK = 43, 6
MAX_KEY = 200


def _base62(value: int, width: int) -> str:
    out = ""
    for _ in range(width):
        value, digit = divmod(value, 62)
        out = ALPHABET[digit] + out
    return out


def checksum(text: str) -> str:
    """CRC-32 of prefix and body in six base62 characters."""
    return _base62(zlib.crc32(text.encode()), CHECK)


def new_key(prefix: str = PREFIX) -> str:
    """A fresh API key of 256 random bits."""
    text = prefix + _base62(int.from_bytes(secrets.token_bytes(32), "big"), BODY)
    return text + checksum(text)


def well_formed(key: str) -> bool:
    """Whether the text can be a key at all: length, alphabet and checksum, without any query."""
    if not BODY + CHECK < len(key) <= MAX_KEY or not key.isascii() or not _LETTERS.issuperset(key[-BODY - CHECK :]):
        return False
    return checksum(key[:-CHECK]) == key[-CHECK:]


class Entitlements:
    """Keys and grants of this site; `pepper` keys the HMAC under which keys are stored, `others` are accepted beside it.

    Those of `kept` among them are to come: what is stored under them stays as it is.
    """

    def __init__(self, engine: Engine, pepper: bytes, others: Sequence[bytes] = (), kept: Sequence[bytes] = (), prefix: str = PREFIX) -> None:
        self._engine = engine
        self._pepper, self._others, self._prefix = pepper, tuple(others), prefix
        self._pepper_id = pepper_id(pepper)
        self.usage = Usage(engine, self._pepper_id, tuple(map(pepper_id, kept)))

    def any_key(self) -> bool:
        """Whether the site has a key at all."""
        with t.reading(self._engine) as conn:
            return conn.execute(select(t.api_key.c.id).limit(1)).first() is not None

    def hmac(self, key: str) -> bytes:
        """What is stored in place of a key."""
        return hmac.new(self._pepper, key.encode(), hashlib.sha256).digest()

    def hmacs(self, key: str) -> tuple[bytes, ...]:
        """What a key may be stored as: under the current pepper, then under the others."""
        return (self.hmac(key), *(hmac.new(pepper, key.encode(), hashlib.sha256).digest() for pepper in self._others))

    def s3_secrets(self, key_id: str) -> tuple[str, ...]:
        """What an S3 client may sign with for a key: under the current pepper, then under the others."""
        return tuple(secret_of(pepper, key_id) for pepper in (self._pepper, *self._others))

    def principal(self, key: str) -> Principal | None:
        """The principal of a presented key with all its grants, by one indexed statement; None when nothing proves possession.

        A key of a pepper that was replaced takes a statement more, until its use was written (registry/usage.py).
        """
        if not well_formed(key):
            return None
        for digest in self.hmacs(key):
            with t.reading(self._engine) as conn:
                found = principal_of(conn.execute(caller("hmac"), {"hmac": digest}).all())
            if found is not None:
                return found
        return None

    def holder(self, key_id: str) -> Principal | None:
        """The principal of the key that a token stands for, as it is now, by one indexed statement; None once there is no such key."""
        if not key_id.isascii() or "\0" in key_id:  # signed by us, but no key of ours is called so
            return None
        with t.reading(self._engine) as conn:
            return principal_of(conn.execute(caller("key_id"), {"key_id": key_id}).all())

    def add_key(
        self,
        conn: Connection,
        org_id: int,
        *,
        tier: str,
        grant: Grant | None,
        expires: float,
        at: float,
        note: str = "",
        kind: str = "service",
        member_id: int | None = None,
        prefix: str = "",
        replaces: str = "",
    ) -> tuple[str, str]:
        """Makes a key, with a grant of its own or none, in the given transaction; returns (key id, key): the key is shown once.

        Raises Invalid, and Conflict `max_keys` where the organisation's document allows no further one.
        """
        if tier not in TIERS:
            raise Invalid(f"there is no tier {tier[:40]!r}", expected=" or ".join(TIERS))
        if grant is not None:
            check_grant(grant, at)
        if expires and expires <= at:
            raise Invalid("the key would be expired from the start", expected="an expiry in the future")
        if not replaces:
            self._room(conn, org_id, at)
        key, key_id = new_key(prefix or self._prefix), "key-" + secrets.token_hex(8)
        values = {"key_id": key_id, "hmac": self.hmac(key), "org_id": org_id, "tier": tier, "note": note[:200], "created": at, "expires": expires}
        values |= {"type": kind, "member_id": member_id, "replaces": replaces, "pepper_id": self._pepper_id}
        conn.execute(insert(t.api_key).values(values))
        if grant is not None:
            row_id = conn.execute(select(t.api_key.c.id).where(t.api_key.c.key_id == key_id)).scalar_one()
            add_grant(conn, org_id, grant, at, api_key_id=row_id)
        return key_id, key

    def _room(self, conn: Connection, org_id: int, at: float) -> None:
        """Returns where the organisation's document allows one more living key; the row is held, so that two at once cannot both be the last."""
        k, o, e = t.api_key.c, t.org.c, t.entitlement.c
        most = conn.execute(select(e.max_keys).join(t.org, o.entitlement_id == e.id).where(o.id == org_id)).scalar()
        if not most:
            return
        conn.execute(select(o.id).where(o.id == org_id).with_for_update(key_share=True))
        alive = (k.org_id == org_id, k.revoked_at == 0, (k.expires == 0) | (k.expires > at))
        if conn.execute(select(func.count()).select_from(t.api_key).where(*alive)).scalar_one() >= most:
            raise Conflict(
                f"the organisation has {most} living keys, as many as its entitlement allows",
                do="revoke one, or ask the issuer for more",
                reason="max_keys",
            )

    def rotate(self, conn: Connection, row: Any, *, until: float, expires: float, at: float, prefix: str = "") -> tuple[str, str]:
        """A successor of a living key with the same grants, and the end of the old one at `until`; returns (key id, key).

        A key and its predecessor are the most that live at once; raises Conflict `key_revoked`, `key_expired`, `rotated` or `changed`.
        """
        k = t.api_key.c
        if row.revoked_at or 0 < row.expires <= at:
            state = "revoked" if row.revoked_at else "expired"
            raise Conflict(f"{row.key_id} is {state}", do="airlock key create", reason=f"key_{state}")
        beside = (k.replaces == row.key_id) | (k.key_id == row.replaces)
        living = select(k.key_id).where(beside, k.revoked_at == 0, (k.expires == 0) | (k.expires > at))
        other = conn.execute(living).scalar()
        if other:
            words = f"{row.key_id} is in the overlap of a rotation with {other}"
            raise Conflict(words, do="wait for its end, or revoke one of the two", reason="rotated")
        key_id, key = self.add_key(
            conn,
            row.org_id,
            tier=row.tier,
            grant=None,
            expires=expires,
            at=at,
            note=row.note,
            kind=row.type,
            member_id=row.member_id,
            prefix=prefix,
            replaces=row.key_id,
        )
        new = conn.execute(select(k.id).where(k.key_id == key_id)).scalar_one()
        for grant in (g for g in rights_of(conn, key_id=row.id) if not g.expires or g.expires + g.grace_s > at):
            add_grant(conn, row.org_id, grant, at, api_key_id=new)
        end = min(until, row.expires) if row.expires else until
        values = {"expires": end} if end > at else {"revoked_at": at}
        if not conn.execute(update(t.api_key).where(k.id == row.id, k.revoked_at == 0, k.expires == row.expires).values(values)).rowcount:
            raise Conflict(f"{row.key_id} was revoked or changed meanwhile", do="read it again", reason="changed")
        return key_id, key

    def used(self, key_id: str, key: str, now: float) -> None:
        """Notes that a key was presented, or with none signed with, for `last_used` and, while a pepper is being replaced, for its new HMAC."""
        if self.usage.due(key_id, now):
            self.usage.note(key_id, now, self.hmac(key) if key and self._others else None)

    def revoke(self, conn: Connection, key_id: str, at: float) -> bool:
        """Revokes a key from now on; False when it was revoked before; raises NotFound."""
        if conn.execute(select(t.api_key.c.id).where(t.api_key.c.key_id == key_id)).first() is None:
            raise NotFound(f"there is no key {key_id[:80]!r}", do="airlock key list")
        return conn.execute(update(t.api_key).where(t.api_key.c.key_id == key_id, t.api_key.c.revoked_at == 0).values(revoked_at=at)).rowcount == 1
