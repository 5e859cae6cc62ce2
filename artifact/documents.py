"""Entitlements and revocation lists: what the signed documents say, made and read in the same bounds (docs/format.md section 8).

Pure: keys and the clock are arguments, there is no I/O, and nothing is decided about anybody's request (artifact.grant does). A document is read
whole or refused: a claim that is missing, out of its bounds or of another kind never means "no limit". Sources: RFC 7515, RFC 8725.
"""

from __future__ import annotations

import base64
import binascii
import re
import secrets
import textwrap
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from artifact import trust
from artifact.errors import Denied, Invalid
from artifact.grant import TIERS, Entitlement, date
from artifact.manifest import check_name, check_pattern, parse_json
from artifact.upstream import check_product

ENTITLEMENT, REVOCATIONS = "entitlement+jwt", "revocations+jwt"
LABELS = {ENTITLEMENT: "AIRLOCK ENTITLEMENT", REVOCATIONS: "AIRLOCK REVOCATIONS"}
ACTIONS, ENVIRONMENTS = ("pull", "run"), ("dev", "production")
KINDS = {"jti": re.compile(r"[0-9a-f]{32}\Z"), "key_id": re.compile(r"key-[0-9a-f]{16}\Z"), "kid": re.compile(r"[0-9a-f]{16}\Z")}
MAX_DOCUMENTS = 1000  # of one bundle
MAX_TEXTS = 100
MAX_REVOKED = {"jti": 700, "key_id": 700, "kid": 100}  # together they fit into one document
MAX_COUNT = 1_000_000
MAX_SERIAL = (1 << 53) - 1  # what every JSON reader keeps exactly
MAX_GRACE_S = 366 * 86400
MAX_TIME = 4_000_000_000  # the year 2096
MAX_AHEAD_S = 86400  # how far an issuer's clock may be ahead of ours
LIST_LIFE_S = 10 * 365 * 86400
EXPECTED = "an entitlement or a revocation list, as airlock entitlement issue and revoke write them"
COMPACT = re.compile(r"[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\Z")
_ARMOUR = re.compile(r"-----BEGIN ([A-Z ]{1,40})-----([A-Za-z0-9_.\s-]+?)-----END \1-----\s*\Z")
_ALWAYS = {"iss", "sub", "jti", "iat", "nbf", "exp", "serial", "must_understand"}
_OF_ENTITLEMENT = {"aud", "grace_s", "tier", "models", "actions", "products", "environments", "gpus", "max_keys"}
CLAIMS = {ENTITLEMENT: frozenset(_ALWAYS | _OF_ENTITLEMENT), REVOCATIONS: frozenset(_ALWAYS | {"next_update", "revoked"})}


@dataclass(frozen=True)
class Head:
    """What every document says of itself; `begins` is nbf, `ends` exp, in seconds since 1970; `kid` names the key that signed it."""

    kind: str
    issuer: str
    kid: str
    jti: str
    serial: int
    iat: int
    begins: int
    ends: int
    token: str


@dataclass(frozen=True)
class Licence:
    """An entitlement document: what the decision reads of it, whose it is, for which site, and how many living keys it allows (0: any)."""

    head: Head
    org: str
    site: str
    entitlement: Entitlement
    max_keys: int


@dataclass(frozen=True)
class Revocations:
    """A revocation list: until when the next one is due, and per kind (jti, key_id, kid) what is revoked."""

    head: Head
    next_update: int
    revoked: dict[str, tuple[str, ...]]


Document = Licence | Revocations


def _invalid(what: str, expected: str, reason: str = "claims") -> Invalid:
    return Invalid(what, expected=expected, reason=reason)


# ---- the text


def armour(token: str, kind: str) -> str:
    """The document as a file: its compact JWS in lines of 64 between BEGIN and END."""
    label = LABELS[kind]
    return "\n".join([f"-----BEGIN {label}-----", *textwrap.wrap(token, 64, break_on_hyphens=False), f"-----END {label}-----", ""])


def unarmour(text: str) -> str:
    """The compact JWS of an armoured file, or of one that holds nothing else; raises Invalid."""
    found, label = text.strip(), ""
    if len(text) > 2 * trust.MAX_DOCUMENT_BYTES:
        raise _invalid("the document is too large", f"at most {trust.MAX_DOCUMENT_BYTES} bytes", "document")
    if found.startswith("-----"):
        match = _ARMOUR.match(found)
        if not match or match[1] not in LABELS.values():
            raise _invalid("the text is no armoured document", EXPECTED, "document")
        label, found = match[1], "".join(match[2].split())
    if len(found) > trust.MAX_DOCUMENT_BYTES or not COMPACT.match(found):
        raise _invalid("the text is no signed document", EXPECTED, "document")
    if label and LABELS.get(_header(found)[0]) != label:
        raise _invalid("the document is of another kind than its first line says", label, "document")
    return found


def _header(token: str) -> tuple[str, str]:
    """Type and kid that a token claims."""
    header = parse_json(_part(token, 0), "the document's header", trust.MAX_DOCUMENT_BYTES)
    typ, kid = header.get("typ"), header.get("kid")
    return (typ if isinstance(typ, str) else "", kid if isinstance(kid, str) else "")


def _part(token: str, index: int) -> bytes:
    try:
        part = token.split(".")[index]
        return base64.b64decode(part + "=" * (-len(part) % 4), altchars=b"-_", validate=True)
    except (IndexError, ValueError, binascii.Error) as error:
        raise _invalid("the text is no signed document", EXPECTED, "document") from error


# ---- reading


def read(token: str, issuers: Mapping[str, str], site: str) -> Document:
    """A document by a pinned issuer (kid to PEM) for this site, whatever the time; the type in its header says which kind it is.

    Raises Denied `issuer_unknown`, `audience`; Mismatch `signature` (altered); Invalid `document`, `claims`.
    """
    token = unarmour(token)
    kind, kid = _header(token)
    if kind not in LABELS:
        raise _invalid(f"a document of type {kind[:40]!r} gives no right", " or ".join(LABELS), "document")
    if kid not in issuers:
        raise Denied(
            f"the document is signed by the key {kid[:40]!r}, which is not pinned here",
            expected="one of " + ", ".join(sorted(issuers)),
            do="if you trust who signed it: airlock site issuer FILE --sha256 HEX",
            reason="issuer_unknown",
        )
    found = parse(kind, kid, trust.signed_claims(token, kind, issuers, CLAIMS[kind]), token)
    if isinstance(found, Licence) and found.site != site:
        raise Denied(f"the document was made for the site {found.site}", expected=f"aud {site}, this site", reason="audience")
    return found


def unverified(token: str) -> Document:
    """What a document says, in its bounds, whoever signed it: for who only carries it; raises Invalid."""
    token = unarmour(token)
    kind, kid = _header(token)
    if kind not in LABELS or not KINDS["kid"].match(kid):
        raise _invalid("the text is no entitlement and no revocation list", " or ".join(LABELS), "document")
    return parse(kind, kid, parse_json(_part(token, 1), "the document", trust.MAX_DOCUMENT_BYTES), token)


def check(found: Document, now: float, revoked: Collection[str]) -> None:
    """Returns where the document is not over and its kid not among the `revoked`; raises Denied `expired`, `issuer_revoked`, `clock`.

    One that begins later is no error: it takes over then.
    """
    if found.head.iat > now + MAX_AHEAD_S:
        what = f"the document was made on {date(found.head.iat)}, and the clock here says {date(now)}"
        raise Denied(what, expected="a clock that is right, here and at the issuer", do="set the clock right, then import it again", reason="clock")
    if found.head.kid in revoked:
        what = f"the document is signed by the key {found.head.kid}, which was revoked"
        raise Denied(what, do="ask for one by the issuer's new key", reason="issuer_revoked")
    if found.head.ends <= now:
        raise Denied(f"the document expired on {date(found.head.ends)}", do="ask its issuer for a newer one", reason="expired")


def parse(kind: str, kid: str, claims: Mapping[str, object], token: str = "") -> Document:
    """A document from its claims, each of them in its bounds; raises Invalid `claims`."""
    iat, begins, ends = (_whole(claims, name, 0, MAX_TIME) for name in ("iat", "nbf", "exp"))
    jti, serial = _matching(claims.get("jti"), "jti", "jti"), _whole(claims, "serial", 1, MAX_SERIAL)
    head = Head(kind, _text(claims, "iss", 100), kid, jti, serial, iat, begins, ends, token)
    if not max(head.iat, head.begins) < head.ends:
        raise _invalid("the document ends before it begins, or before it was made", "iat and nbf below exp")
    if kind == REVOCATIONS:
        return Revocations(head, _whole(claims, "next_update", head.iat, MAX_TIME), _revoked(claims.get("revoked")))
    return _licence(head, claims)


def _licence(head: Head, claims: Mapping[str, object]) -> Licence:
    subject, tier = _text(claims, "sub", 104), claims.get("tier")
    org = check_name(subject.removeprefix("org:"))
    if subject != f"org:{org}" or "/" in org:
        raise _invalid("the claim sub is no organisation", "org: and its name")
    if not isinstance(tier, str) or tier not in TIERS:
        raise _invalid("the claim tier is none that is known", " or ".join(TIERS))
    models, products = _texts(claims, "models", 1), _texts(claims, "products", 0)
    for pattern in models:
        check_pattern(pattern)
    for product in products:
        check_product(product)
    actions, environments = _texts(claims, "actions", 1), _texts(claims, "environments", 1)
    for name, values, known in (("actions", actions, ACTIONS), ("environments", environments, ENVIRONMENTS)):
        if not set(values) <= set(known):
            raise _invalid(f"the claim {name} holds what is not known", ", ".join(known))
    gpus, grace_s = _whole(claims, "gpus", 0, MAX_COUNT), _whole(claims, "grace_s", 0, MAX_GRACE_S)
    lists = (models, actions, head.begins, head.ends, grace_s, gpus, products, environments)
    return Licence(head, org, _text(claims, "aud", 100), Entitlement(head.jti, head.serial, tier, *lists), _whole(claims, "max_keys", 0, MAX_COUNT))


def _revoked(value: object) -> dict[str, tuple[str, ...]]:
    if not isinstance(value, Mapping) or not set(value) <= set(KINDS):
        raise _invalid("the claim revoked is no list of what is revoked", ", ".join(KINDS))
    out: dict[str, tuple[str, ...]] = {}
    for kind in KINDS:
        items = value.get(kind, [])
        if not isinstance(items, list) or len(items) > MAX_REVOKED[kind]:
            raise _invalid(f"the claim revoked has no list of {kind}", f"at most {MAX_REVOKED[kind]}")
        out[kind] = tuple(dict.fromkeys(_matching(item, kind, f"revoked {kind}") for item in items))
    return out


def _matching(value: object, kind: str, name: str) -> str:
    if not isinstance(value, str) or not KINDS[kind].match(value):
        raise _invalid(
            f"the claim {name} is of another form", {"jti": "32 hex digits", "key_id": "key- and 16 hex digits", "kid": "16 hex digits"}[kind]
        )
    return value


def _text(claims: Mapping[str, object], name: str, most: int) -> str:
    value = claims.get(name)
    if not isinstance(value, str) or not 0 < len(value) <= most or not value.isprintable():
        raise _invalid(f"the claim {name} is missing or no text on one line", f"1 to {most} printable characters")
    return value


def _texts(claims: Mapping[str, object], name: str, least: int) -> tuple[str, ...]:
    value = claims.get(name)
    if not isinstance(value, list) or not least <= len(value) <= MAX_TEXTS or not all(isinstance(v, str) and 0 < len(v) <= 255 for v in value):
        raise _invalid(f"the claim {name} is missing or no list of texts", f"{least} to {MAX_TEXTS} of 1 to 255 characters")
    return tuple(dict.fromkeys(value))


def _whole(claims: Mapping[str, object], name: str, least: int, most: int) -> int:
    value = claims.get(name)
    if type(value) is not int or not least <= value <= most:
        raise _invalid(f"the claim {name} is missing or no whole number", f"{least} to {most}")
    return value


# ---- making


def sign(private_pem: bytes, kind: str, claims: Mapping[str, object]) -> Document:
    """The signed document of these claims, which its reader would take; raises Invalid."""
    kid = trust.kid(trust.public_pem(private_pem))
    parse(kind, kid, claims)
    token = trust.sign_jws(private_pem, kind, claims)
    if len(token) > trust.MAX_DOCUMENT_BYTES:
        raise _invalid("the document is too large", f"at most {trust.MAX_DOCUMENT_BYTES} bytes")
    return parse(kind, kid, claims, token)


def entitlement_claims(
    issuer: str, site: str, org: str, serial: int, now: float, rights: Mapping[str, object], begins: float = 0.0, ends: float = 0.0
) -> dict[str, object]:
    """The claims of an entitlement: `rights` are tier, models, actions, products, environments, gpus, max_keys, grace_s."""
    claims: dict[str, object] = {
        "iss": issuer,
        "sub": f"org:{org}",
        "aud": site,
        "jti": secrets.token_hex(16),
        "serial": serial,
        "must_understand": [],
    }
    return claims | {"iat": int(now), "nbf": int(begins or now), "exp": int(ends), **rights}


def revocation_claims(
    issuer: str, serial: int, now: float, revoked: Mapping[str, Collection[str]], before: Revocations | None, next_update: float
) -> dict[str, object]:
    """The claims of the list behind `before`, which holds what that one held too: of each kind the latest MAX_REVOKED."""
    held = {kind: [*(before.revoked[kind] if before else ()), *revoked.get(kind, ())] for kind in KINDS}
    return {
        "iss": issuer,
        "sub": "revocations",
        "jti": secrets.token_hex(16),
        "serial": serial,
        "iat": int(now),
        "nbf": int(now),
        "exp": int(now) + LIST_LIFE_S,
        "next_update": int(next_update),
        "must_understand": [],
        "revoked": {kind: list(dict.fromkeys(items))[-MAX_REVOKED[kind] :] for kind, items in held.items()},
    }
