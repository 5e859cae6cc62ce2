"""Entitlements and revocation lists as text: every claim that is missing, out of its bounds or of another kind is refused, and nothing widens."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Callable
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from hypothesis import given, settings
from hypothesis import strategies as st

from artifact import documents as d
from artifact import trust
from artifact.errors import AirlockError, Denied, Invalid, Mismatch, TooLarge

KEY, OTHER = trust.generate_key(), trust.generate_key()
PEM, KID = trust.public_pem(KEY), trust.kid(trust.public_pem(KEY))
ISSUERS = {KID: PEM}
SITE, NOW = "site-1", 1_800_000_000
ABSENT = object()
RIGHTS: dict[str, object] = {"tier": "enterprise", "models": ["hf/**", "acme/*"], "actions": ["pull", "run"], "products": ["nv-ai-enterprise"]}
RIGHTS |= {"environments": ["dev", "production"], "gpus": 64, "max_keys": 50, "grace_s": 2592000}
REVOKED = {"jti": ["a" * 32], "key_id": ["key-" + "b" * 16], "kid": ["c" * 16]}


def licence(**change: object) -> dict[str, object]:
    claims = d.entitlement_claims("vendor", SITE, "acme", 7, NOW, RIGHTS, NOW - 10, NOW + 86400) | change
    return {name: value for name, value in claims.items() if value is not ABSENT}


def revocations(**change: object) -> dict[str, object]:
    claims = d.revocation_claims("vendor", 12, NOW, REVOKED, None, NOW + 86400) | change
    return {name: value for name, value in claims.items() if value is not ABSENT}


def signed(claims: dict[str, object], typ: str = d.ENTITLEMENT, key: bytes = KEY, **header: object) -> str:
    """A JWS of whatever claims, as an issuer with other software could sign it."""
    private: Any = serialization.load_pem_private_key(key, None)
    headers = {"typ": typ, "kid": trust.kid(trust.public_pem(key)), **header}
    return jwt.encode(claims, private, algorithm="ES256", headers={k: v for k, v in headers.items() if v is not ABSENT})


def read(token: str) -> d.Document:
    return d.read(token, ISSUERS, SITE)


def test_what_is_made_is_read() -> None:
    made = d.sign(KEY, d.ENTITLEMENT, licence())
    found = read(made.head.token)
    assert isinstance(found, d.Licence) and found == made
    given_ = found.entitlement
    assert (given_.jti, given_.serial, given_.tier, given_.gpus, given_.grace_s, found.max_keys) == (found.head.jti, 7, "enterprise", 64, 2592000, 50)
    assert (given_.models, given_.actions, given_.products) == (("hf/**", "acme/*"), ("pull", "run"), ("nv-ai-enterprise",))
    assert (given_.not_before, given_.expires, given_.environments) == (NOW - 10, NOW + 86400, ("dev", "production"))
    assert (found.org, found.site, found.head.issuer, found.head.kid, found.head.iat) == ("acme", SITE, "vendor", KID, NOW)
    listed = read(d.sign(KEY, d.REVOCATIONS, revocations()).head.token)
    assert isinstance(listed, d.Revocations) and listed.revoked == {k: tuple(v) for k, v in REVOKED.items()} and listed.head.serial == 12
    assert d.unverified(made.head.token) == made and d.unverified(listed.head.token) == listed


def test_armour() -> None:
    token = d.sign(KEY, d.ENTITLEMENT, licence()).head.token
    text = d.armour(token, d.ENTITLEMENT)
    lines = text.splitlines()
    assert lines[0] == "-----BEGIN AIRLOCK ENTITLEMENT-----" and lines[-1] == "-----END AIRLOCK ENTITLEMENT-----"
    assert all(len(line) <= 64 for line in lines[1:-1]) and d.unarmour(text) == d.unarmour(text.replace("\n", "\r\n")) == token
    assert d.unarmour(f"\n {token}\n") == token and read(text).head.jti == read(token).head.jti


@pytest.mark.parametrize(
    "text",
    [
        "",
        "hello",
        "a.b",
        "a.b.c.d",
        "-----BEGIN AIRLOCK ENTITLEMENT-----",
        "-----BEGIN AIRLOCK ENTITLEMENT-----\na.b.c\n-----END AIRLOCK REVOCATIONS-----",
        "-----BEGIN CERTIFICATE-----\na.b.c\n-----END CERTIFICATE-----",
        "-----BEGIN AIRLOCK ENTITLEMENT-----\na.b.c\n-----END AIRLOCK ENTITLEMENT-----\nmore",
        "a.b.c\n\n-----BEGIN AIRLOCK ENTITLEMENT-----",
        "x" * 200_000,
        "\ud800.a.b",
        "a\0.b.c",
    ],
)
def test_what_is_no_document(text: str) -> None:
    with pytest.raises(Invalid) as caught:
        d.unarmour(text)
    assert caught.value.reason == "document" and caught.value.expected


def test_the_first_line_must_name_what_is_inside() -> None:
    token = d.sign(KEY, d.REVOCATIONS, revocations()).head.token
    with pytest.raises(Invalid, match="another kind"):
        d.unarmour(d.armour(token, d.ENTITLEMENT))


BIG = 1 << 60
REFUSED: list[tuple[str, object]] = [
    *((name, ABSENT) for name in ("iss", "sub", "aud", "jti", "iat", "nbf", "exp", "serial", "tier", "models", "actions")),
    *((name, ABSENT) for name in ("products", "environments", "gpus", "max_keys", "grace_s")),
    *((name, None) for name in ("sub", "aud", "jti", "iat", "nbf", "exp", "serial", "tier", "models", "gpus", "max_keys", "grace_s")),
    *((name, bad) for name in ("iat", "nbf", "exp", "serial", "gpus", "max_keys", "grace_s") for bad in (-1, 1.5, "1", True, BIG, float("inf"))),
    ("serial", 0),
    ("exp", 0),
    ("exp", NOW - 10),
    ("exp", NOW),  # over before it was made
    ("grace_s", 367 * 86400),
    ("gpus", 1_000_001),
    ("iss", ""),
    ("iss", "x" * 101),
    ("iss", "a\nb"),
    ("sub", "acme"),
    ("sub", "org:"),
    ("sub", "org:a/b"),
    ("sub", "org:Acme"),
    ("sub", "org:" + "a" * 101),
    ("aud", ["site-1"]),
    ("jti", "A" * 32),
    ("jti", "a" * 31),
    ("jti", "a" * 32 + "\n"),
    ("tier", "trial"),
    ("tier", []),
    ("models", []),
    ("models", "hf/**"),
    ("models", ["hf/**", 5]),
    ("models", ["hf/**/x"]),
    ("models", ["HF/**"]),
    ("models", ["x" * 256]),
    ("models", [f"m/{i}" for i in range(101)]),
    ("actions", []),
    ("actions", ["push"]),
    ("actions", ["pull", "admin"]),
    ("products", ["a b"]),
    ("products", [""]),
    ("environments", []),
    ("environments", ["staging"]),
    ("must_understand", ["quota"]),
    ("must_understand", "gpus"),
    ("must_understand", [5]),
    ("must_understand", {"gpus": 1}),
]


@pytest.mark.parametrize(("name", "value"), REFUSED, ids=[f"{n}-{'absent' if v is ABSENT else str(v)[:20]}" for n, v in REFUSED])
def test_an_entitlement_with_a_bad_claim_is_refused(name: str, value: object) -> None:
    claims = licence(**{name: value})
    with pytest.raises(Invalid) as caught:
        read(signed(claims))
    assert caught.value.expected
    if name != "must_understand":  # whoever signs with our software is told before it signs
        with pytest.raises(Invalid):
            d.sign(KEY, d.ENTITLEMENT, claims)


REFUSED_LISTS: list[tuple[str, object]] = [
    *((name, ABSENT) for name in ("iss", "sub", "jti", "iat", "nbf", "exp", "serial", "next_update", "revoked")),
    ("next_update", NOW - 1),
    ("next_update", BIG),
    ("revoked", []),
    ("revoked", {"jti": "a" * 32}),
    ("revoked", {"jti": ["a"]}),
    ("revoked", {"key_id": ["nvapi-x"]}),
    ("revoked", {"kid": [5]}),
    ("revoked", {"orgs": []}),
    ("revoked", {"jti": [f"{i:032x}" for i in range(701)]}),
    ("must_understand", ["gpus"]),
]


@pytest.mark.parametrize(("name", "value"), REFUSED_LISTS, ids=[f"{n}-{i}" for i, (n, _) in enumerate(REFUSED_LISTS)])
def test_a_list_with_a_bad_claim_is_refused(name: str, value: object) -> None:
    with pytest.raises(Invalid):
        read(signed(revocations(**{name: value}), d.REVOCATIONS))


def test_what_is_named_and_known_is_understood() -> None:
    assert read(signed(licence(must_understand=["gpus", "models"], later="ignored"))).head.serial == 7


def hs256_with_the_public_key() -> str:
    head = base64.urlsafe_b64encode(json.dumps({"alg": "HS256", "typ": d.ENTITLEMENT, "kid": KID}).encode()).rstrip(b"=").decode()
    body = base64.urlsafe_b64encode(json.dumps(licence()).encode()).rstrip(b"=").decode()
    import hashlib
    import hmac

    mac = hmac.new(PEM.encode(), f"{head}.{body}".encode(), hashlib.sha256).digest()
    return f"{head}.{body}.{base64.urlsafe_b64encode(mac).rstrip(b'=').decode()}"


def alg_none() -> str:
    head = base64.urlsafe_b64encode(json.dumps({"alg": "none", "typ": d.ENTITLEMENT, "kid": KID}).encode()).rstrip(b"=").decode()
    return f"{head}.{signed(licence()).split('.')[1]}.AAAA"


JWK = {"kty": "EC", "crv": "P-256", "x": "AA", "y": "AA"}
CONFUSED: list[tuple[str, Callable[[], str], type[AirlockError], str]] = [
    ("alg none", alg_none, Invalid, "document"),
    ("HS256 with the public key", hs256_with_the_public_key, Invalid, "document"),
    ("an embedded key", lambda: signed(licence(), jwk=JWK), Invalid, "document"),
    ("a URL of keys", lambda: signed(licence(), jku="https://attacker.example/keys"), Invalid, "document"),
    ("a critical header", lambda: signed(licence(), crit=["exp"], exp=1), Invalid, "document"),
    ("a lease", lambda: signed(licence(), "lease+jwt"), Invalid, "document"),
    ("an access token", lambda: signed(licence(), "at+jwt"), Invalid, "document"),
    ("no type", lambda: signed(licence(), typ=ABSENT), Invalid, "document"),
    ("an entitlement as a list", lambda: signed(licence(), d.REVOCATIONS), Invalid, "claims"),
    ("a list as an entitlement", lambda: signed(revocations(), d.ENTITLEMENT), Invalid, "claims"),
    ("another issuer's key", lambda: signed(licence(), key=OTHER), Denied, "issuer_unknown"),
    ("another issuer's key under our kid", lambda: signed(licence(), key=OTHER, kid=KID), Mismatch, "signature"),
    ("no kid", lambda: signed(licence(), kid=ABSENT), Denied, "issuer_unknown"),
    ("a kid that is a path", lambda: signed(licence(), kid="../../secrets/lease"), Denied, "issuer_unknown"),
    ("another site", lambda: signed(licence(aud="site-2")), Denied, "audience"),
    ("deep nesting", lambda: base64.urlsafe_b64encode(b"[" * 40_000).decode().rstrip("=") + ".e30.AA", Invalid, ""),
]


@pytest.mark.parametrize(("make", "error", "reason"), [row[1:] for row in CONFUSED], ids=[row[0] for row in CONFUSED])
def test_confusion_is_refused(make: Callable[[], str], error: type[AirlockError], reason: str) -> None:
    with pytest.raises((error, TooLarge)) as caught:
        read(make())
    assert not reason or caught.value.reason == reason


def test_every_edited_character_is_refused() -> None:
    token = d.sign(KEY, d.ENTITLEMENT, licence()).head.token
    for at in range(0, len(token) - 1, 7):  # the last character of a signature may carry bits that mean nothing
        if token[at] == ".":
            continue
        other = "A" if token[at] != "A" else "B"
        with pytest.raises(AirlockError):
            read(token[:at] + other + token[at + 1 :])


def test_time_and_revoked_keys() -> None:
    found = read(d.sign(KEY, d.ENTITLEMENT, licence()).head.token)
    d.check(found, NOW, ())
    d.check(found, NOW + 86399, ())
    d.check(found, NOW - 86400, ())  # not yet: it takes over when it begins
    for now, revoked, reason in ((NOW + 86400, (), "expired"), (NOW, (KID,), "issuer_revoked"), (NOW - 86401, (), "clock")):
        with pytest.raises(Denied) as caught:
            d.check(found, now, revoked)
        assert caught.value.reason == reason and caught.value.do


def test_a_new_list_keeps_what_the_one_before_held_and_fits_into_a_document() -> None:
    first = d.sign(KEY, d.REVOCATIONS, revocations())
    assert isinstance(first, d.Revocations)
    more = {"jti": ["d" * 32, "a" * 32], "kid": ["e" * 16]}
    second = d.sign(KEY, d.REVOCATIONS, d.revocation_claims("vendor", 13, NOW, more, first, NOW + 1))
    assert isinstance(second, d.Revocations)
    assert second.revoked == {"jti": ("a" * 32, "d" * 32), "key_id": ("key-" + "b" * 16,), "kid": ("c" * 16, "e" * 16)}
    full = {"jti": [f"{i:032x}" for i in range(900)], "key_id": [f"key-{i:016x}" for i in range(900)], "kid": [f"{i:016x}" for i in range(900)]}
    largest = d.sign(KEY, d.REVOCATIONS, d.revocation_claims("x" * 100, d.MAX_SERIAL, NOW, full, second, NOW + 1))
    assert isinstance(largest, d.Revocations) and {k: len(v) for k, v in largest.revoked.items()} == d.MAX_REVOKED
    assert largest.revoked["jti"][-1] == f"{899:032x}" and d.unarmour(d.armour(largest.head.token, d.REVOCATIONS)) == largest.head.token


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@given(st.sampled_from(sorted(licence())), json_values)
@settings(max_examples=300, deadline=None)
def test_any_value_of_any_claim_is_read_in_its_bounds_or_refused(name: str, value: object) -> None:
    """Whatever stands there, what is read gives no more than what the other claims say, and nothing but our errors comes out."""
    try:
        found = d.parse(d.ENTITLEMENT, KID, licence(**{name: value}))
    except Invalid:
        return
    assert isinstance(found, d.Licence)
    assert found.entitlement.expires <= d.MAX_TIME and 0 <= found.entitlement.gpus <= d.MAX_COUNT and found.entitlement.actions
    for claim in ("models", "actions", "products", "environments"):
        assert list(getattr(found.entitlement, claim)) == (list(dict.fromkeys(value)) if name == claim and isinstance(value, list) else RIGHTS[claim])


@given(st.binary(max_size=200) | st.text(max_size=200))
@settings(max_examples=300, deadline=None)
def test_no_bytes_are_a_document(raw: bytes | str) -> None:
    text = raw.decode("utf-8", "replace") if isinstance(raw, bytes) else raw
    for attempt in (text, f"-----BEGIN AIRLOCK ENTITLEMENT-----\n{text}\n-----END AIRLOCK ENTITLEMENT-----"):
        with pytest.raises(AirlockError):
            read(attempt)


def test_reading_takes_little_time() -> None:
    token = d.sign(KEY, d.ENTITLEMENT, licence(models=[f"m{i}/" + "x" * 200 for i in range(100)])).head.token
    begin = time.process_time()
    for _ in range(20):
        read(token)
    assert (time.process_time() - begin) / 20 < 0.05
