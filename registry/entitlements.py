"""Organisations, API keys, grants and leases in SQL; the decision itself is artifact.grant, and no key is ever stored or logged.

A key's checksum is tested before any statement, so that garbage costs no query (docs/format.md section 6).
"""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from string import hexdigits

from sqlalchemy import Connection, Engine, delete, insert, select, update

from artifact.errors import Invalid, NotFound
from artifact.grant import ACTIONS, TIERS, Grant, Principal
from artifact.manifest import check_name
from registry import tables as t
from registry.database import alone
from registry.holders import caller, principal_of

PREFIX = "nvapi-"
ALPHABET = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
BODY, CHECK = 43, 6
MAX_KEY = 200
MAX_GPUS = 64
MAX_NONCE = 64
ORIGINS = ("hf", "ngc", "nvcr.io", "localhost")


@dataclass(frozen=True)
class LeaseWish:
    """What a lease is asked for, already checked: the model, the profile and where it is to run."""

    model: str
    model_digest: str
    profile_digest: str
    profile_id: str
    host: str
    gpus: tuple[str, ...]


def lease_nonce(body: dict[str, object]) -> dict[str, object]:
    """The claim by which a runtime tells that a lease was signed for its request; absent for a runtime that sends none; raises Invalid."""
    if "nonce" not in body:
        return {}
    value = body["nonce"]
    if not isinstance(value, str) or not 0 < len(value) <= MAX_NONCE or not set(value) <= set(hexdigits):
        raise Invalid("nonce is no hexadecimal text", expected=f"1 to {MAX_NONCE} characters of 0-9 and a-f", reason="body")
    return {"nonce": value}


def lease_gpus(value: object) -> tuple[str, ...]:
    """The GPUs that a lease is asked for, each once; raises Invalid."""
    if not isinstance(value, list) or len(value) > MAX_GPUS or not all(isinstance(v, str) and 0 < len(v) <= 100 and v.isprintable() for v in value):
        raise Invalid("gpu_uuids is not a list of GPU ids", expected=f"at most {MAX_GPUS} texts, none on a CPU node", reason="body")
    return tuple(dict.fromkeys(value))


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
    if not BODY + CHECK < len(key) <= MAX_KEY or not key.isascii() or any(c not in ALPHABET for c in key[-BODY - CHECK :]):
        return False
    return checksum(key[:-CHECK]) == key[-CHECK:]


def check_org(name: str) -> str:
    """An organisation's name itself: one segment of a repository name without dots, and no origin's; raises Invalid."""
    if "/" in name or "." in name or name in ORIGINS or name.startswith("localhost") or len(name) > 100:
        raise Invalid(
            f"{name[:100]!r} cannot be an organisation", expected="one lower-case segment without / and ., not " + ", ".join(ORIGINS), reason="org"
        )
    return check_name(name)


class Entitlements:
    """Keys and grants of this site; `pepper` keys the HMAC under which keys are stored, `older` are those that it replaced."""

    def __init__(self, engine: Engine, pepper: bytes, older: Sequence[bytes] = (), prefix: str = PREFIX) -> None:
        self._engine = engine
        self._pepper, self._older, self._prefix = pepper, tuple(older), prefix

    def hmac(self, key: str) -> bytes:
        """What is stored in place of a key."""
        return hmac.new(self._pepper, key.encode(), hashlib.sha256).digest()

    def principal(self, key: str) -> Principal | None:
        """The principal of a presented key with all its grants, by one indexed statement; None when nothing proves possession."""
        if not well_formed(key):
            return None
        with t.reading(self._engine) as conn:
            return principal_of(conn.execute(caller("hmac"), {"hmac": self.hmac(key)}).all())

    def holder(self, key_id: str) -> Principal | None:
        """The principal of the key that a token stands for, as it is now, by one indexed statement; None once there is no such key."""
        if not key_id.isascii() or "\0" in key_id:  # signed by us, but no key of ours is called so
            return None
        with t.reading(self._engine) as conn:
            return principal_of(conn.execute(caller("key_id"), {"key_id": key_id}).all())

    def add_key(self, conn: Connection, org_id: int, *, tier: str, grant: Grant, expires: float, at: float, note: str = "") -> tuple[str, str]:
        """Makes a key with one grant in the given transaction; returns (key id, key): the key is shown once; raises Invalid."""
        if tier not in TIERS:
            raise Invalid(f"there is no tier {tier[:40]!r}", expected=" or ".join(TIERS))
        unknown = [a for a in grant.actions if a not in ACTIONS]
        if unknown or not grant.actions:
            raise Invalid(f"there is no action {', '.join(unknown)[:80]!r}", expected=", ".join(ACTIONS))
        for pattern in grant.models:
            _check_pattern(pattern)
        if not grant.models:
            raise Invalid("the key is granted nothing", expected="at least one model pattern", do="--models 'acme/*'")
        if expires and expires <= at:
            raise Invalid("the key would be expired from the start", expected="an expiry in the future")
        key, key_id = new_key(), "key-" + secrets.token_hex(8)
        values = {"key_id": key_id, "hmac": self.hmac(key), "org_id": org_id, "tier": tier, "note": note[:200], "created": at, "expires": expires}
        conn.execute(insert(t.api_key).values(values))
        row_id = conn.execute(select(t.api_key.c.id).where(t.api_key.c.key_id == key_id)).scalar_one()
        rights = {"models": json.dumps(grant.models), "actions": json.dumps(grant.actions), "not_before": grant.not_before, "expires": grant.expires}
        own = {"grant_id": "grant-" + secrets.token_hex(8), "org_id": org_id, "created": at}
        conn.execute(insert(t.key_grant).values(api_key_id=row_id, grace_s=grant.grace_s, **own, **rights))
        return key_id, key

    def keys(self, org: str = "") -> list[dict[str, object]]:
        """All keys by their public facts, oldest first; never the key or its HMAC."""
        k, g = t.api_key.c, t.key_grant.c
        source = t.api_key.join(t.org, t.org.c.id == k.org_id).outerjoin(t.key_grant, g.api_key_id == k.id)
        columns = (k.key_id, t.org.c.name.label("org"), k.tier, k.created, k.expires, k.revoked_at, k.note, g.models, g.actions)
        found = select(*columns).select_from(source).order_by(k.id)
        if org:
            found = found.where(t.org.c.name == org)
        with t.reading(self._engine) as conn:
            rows = conn.execute(found).mappings().all()
        return [{**row, "models": json.loads(row["models"] or "[]"), "actions": json.loads(row["actions"] or "[]")} for row in rows]

    def revoke(self, conn: Connection, key_id: str, at: float) -> bool:
        """Revokes a key from now on; False when it was revoked before; raises NotFound."""
        if conn.execute(select(t.api_key.c.id).where(t.api_key.c.key_id == key_id)).first() is None:
            raise NotFound(f"there is no key {key_id[:80]!r}", do="airlock key list")
        return conn.execute(update(t.api_key).where(t.api_key.c.key_id == key_id, t.api_key.c.revoked_at == 0).values(revoked_at=at)).rowcount == 1

    def add_lease(self, conn: Connection, who: Principal, wish: LeaseWish, *, jti: str, iat: float, exp: float) -> int:
        """A lease's row under the organisation's next serial, replacing what the same (host, GPU) held; returns the serial."""
        conn.execute(update(t.org).where(t.org.c.name == who.org).values(lease_serial=t.org.c.lease_serial + 1))
        org_id, serial = conn.execute(select(t.org.c.id, t.org.c.lease_serial).where(t.org.c.name == who.org)).one()
        values = {
            "jti": jti,
            "org_id": org_id,
            "serial": serial,
            "key_id": who.key_id,
            "model": wish.model,
            "model_digest": wish.model_digest,
            "profile_digest": wish.profile_digest,
            "profile_id": wish.profile_id,
            "host": wish.host,
            "gpus": json.dumps(wish.gpus),
            "iat": iat,
            "exp": exp,
        }
        conn.execute(insert(t.lease).values(values))
        if wish.gpus:
            alone(conn, "lease", wish.host)
            g = t.lease_gpu
            taken = (g.c.host == wish.host, g.c.gpu_uuid.in_(wish.gpus))
            conn.execute(update(t.lease).where(t.lease.c.jti.in_(select(g.c.jti).where(*taken))).values(replaced_by=jti))
            conn.execute(delete(g).where(*taken))
            conn.execute(insert(g), [{"host": wish.host, "gpu_uuid": gpu, "jti": jti} for gpu in wish.gpus])
        return int(serial)

    def gpus_in_use(self, org: str, now: float) -> int:
        """Distinct (host, GPU) pairs over the organisation's unexpired leases; leases without a GPU count 0."""
        g, lease = t.lease_gpu, t.lease
        source = g.join(lease, lease.c.jti == g.c.jti).join(t.org, t.org.c.id == lease.c.org_id)
        found = select(g.c.host, g.c.gpu_uuid).select_from(source).where(t.org.c.name == org, lease.c.exp > now).distinct()
        with t.reading(self._engine) as conn:
            return len(conn.execute(found).all())


def _check_pattern(pattern: str) -> None:
    """A grant pattern: a repository name in which * stands for a part of a segment, and ** as the last segment for any rest."""
    segments: Sequence[str] = pattern.split("/")
    plain = "/".join("x" if s == "**" and i == len(segments) - 1 else s.replace("*", "x") for i, s in enumerate(segments))
    if "**" in "/".join(segments[:-1]) or ("**" in segments[-1] and segments[-1] != "**"):
        raise Invalid(f"the pattern {pattern[:100]!r} has ** where it means nothing", expected="** as the last segment only", reason="pattern")
    check_name(plain)
