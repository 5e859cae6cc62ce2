"""AWS Signature Version 4 as an S3 server reads it: what a request carries, and whether its holder's secret made it; pure, the clock is an argument.

Here because the door that gets such a request and the admission that knows the secrets must agree. It knows no key's rights and no store.
Source: AWS, "Authenticating Requests (AWS Signature Version 4)" of the S3 API reference, header and query forms; chunked payloads are refused.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from urllib.parse import quote, unquote_to_bytes

from artifact.errors import Invalid, Unauthenticated, Unsupported

ALGORITHM = "AWS4-HMAC-SHA256"
UNSIGNED = "UNSIGNED-PAYLOAD"
EMPTY = hashlib.sha256(b"").hexdigest()
SKEW_S = 900
MOST_LIFE_S = 7 * 86400
PURPOSE = b"AIRLOCK S3 secret v1"
_KEY_ID = re.compile(r"key-[0-9a-f]{16}\Z")
_HEX = re.compile(r"[0-9a-f]{64}\Z")
_QUERY = ("X-Amz-Algorithm", "X-Amz-Credential", "X-Amz-Date", "X-Amz-Expires", "X-Amz-SignedHeaders", "X-Amz-Signature")
Headers = Sequence[tuple[bytes, bytes]]


def secret_of(pepper: bytes, key_id: str) -> str:
    """The secret access key of an API key's public id under one pepper, derived on demand, stored nowhere (docs/format.md section 6)."""
    own = hmac.new(pepper, PURPOSE, hashlib.sha256).digest()
    return base64.urlsafe_b64encode(hmac.new(own, key_id.encode(), hashlib.sha256).digest()).rstrip(b"=").decode("ascii")


@dataclass(frozen=True)
class Signed:
    """What a signed request says: key, day, region, time (seconds since 1970), `life_s` of a URL (0: none), and what was signed."""

    key_id: str
    day: str
    region: str
    at: float
    life_s: int
    texts: tuple[bytes, ...] = field(repr=False)  # of the path as it came and as AWS would spell it: clients differ in what they escape
    signature: str = field(repr=False)

    def verify(self, secrets: Iterable[str], now: float) -> None:
        """Returns where one of the secrets made the signature and it holds at `now`; raises Unauthenticated.

        The reasons are time_skewed, url_expired and signature_invalid, whether the key exists or not.
        """
        if self.at - now > SKEW_S or (not self.life_s and now - self.at > SKEW_S):
            raise Unauthenticated("the request's time is too far from the registry's", do="set the clock of this host", reason="time_skewed")
        if self.life_s and now >= self.at + self.life_s:
            raise Unauthenticated("the signed URL is over", do="sign a new one", reason="url_expired")
        made = [self._made(secret, text) for secret in secrets for text in self.texts]
        if not any([hmac.compare_digest(text, self.signature) for text in made]):
            do = "compare the secret, and see that no proxy changes the Host header or the path"
            raise Unauthenticated("the signature is not that of this key and request", do=do, reason="signature_invalid")

    def _made(self, secret: str, text: bytes) -> str:
        key = b"AWS4" + secret.encode()
        for part in (self.day, self.region, "s3", "aws4_request"):
            key = hmac.new(key, part.encode(), hashlib.sha256).digest()
        return hmac.new(key, text, hashlib.sha256).hexdigest()


def parse(method: str, raw_path: bytes, query: bytes, headers: Headers) -> Signed | None:
    """The signature that a request carries in its header or its query; None where it carries none; raises Invalid, Unsupported, Unauthenticated.

    Reasons: authorization_malformed, query_malformed, signature_version, session_token, payload_streamed, payload_hash, date_absent,
    headers_unsigned, access_key.
    """
    fields = _fields(query)
    given = [value for name, value in headers if name.lower() == b"authorization"]
    in_query = any(name == b"X-Amz-Algorithm" for name, _ in fields)
    if any(name in (b"AWSAccessKeyId", b"Signature") for name, _ in fields) and not in_query:
        raise _version()
    if in_query and given:
        raise Invalid("the request is signed twice", expected="the header or the query", reason="query_malformed")
    if in_query:
        return _of_query(method, raw_path, fields, headers)
    if not given:
        return None
    if len(given) > 1:
        raise _malformed("there are several Authorization headers")
    return _of_header(method, raw_path, fields, headers, given[0].decode("latin-1"))


def _version() -> Invalid:
    return Invalid(
        "the authorization mechanism is not served", expected=ALGORITHM, do="sign with Signature Version 4 (s3v4)", reason="signature_version"
    )


def _malformed(words: str) -> Invalid:
    return Invalid(words, expected=f"{ALGORITHM} Credential=…, SignedHeaders=…, Signature=…", reason="authorization_malformed")


def _fields(query: bytes) -> list[tuple[bytes, bytes]]:
    """Names and values of a query, each unescaped once; a plus is a plus."""
    parts = [part.partition(b"=") for part in query.split(b"&") if part]
    return [(unquote_to_bytes(name), unquote_to_bytes(value)) for name, _, value in parts]


def _of_header(method: str, raw_path: bytes, fields: list[tuple[bytes, bytes]], headers: Headers, text: str) -> Signed:
    kind, _, rest = text.strip().partition(" ")
    if kind != ALGORITHM:
        raise _version()
    named = dict(part.strip().partition("=")[::2] for part in rest.split(","))
    if set(named) != {"Credential", "SignedHeaders", "Signature"}:
        raise _malformed("the Authorization header is incomplete")
    sent = _joined(headers)
    date = sent.get("x-amz-date", b"").decode("latin-1")
    if not date:
        raise Unauthenticated("a signed request needs the header x-amz-date", reason="date_absent")
    hashed = sent.get("x-amz-content-sha256", b"").decode("latin-1")
    _check_payload(hashed, sent)
    canonical = (method, fields, sent, named["SignedHeaders"], hashed)
    return _signed(raw_path, canonical, named["Credential"], date, named["Signature"], 0, _malformed)


def _of_query(method: str, raw_path: bytes, fields: list[tuple[bytes, bytes]], headers: Headers) -> Signed:
    def bad(words: str) -> Invalid:
        return Invalid(words, expected=", ".join(_QUERY), do="sign the URL again", reason="query_malformed")

    texts: dict[str, str] = {}
    for name, value in fields:
        key = name.decode("latin-1")
        if key in texts and key in _QUERY:
            raise bad(f"{key} stands there twice")
        texts[key] = value.decode("latin-1")
    if not all(texts.get(name) for name in _QUERY):
        raise bad("the query's signature is incomplete")
    if texts["X-Amz-Algorithm"] != ALGORITHM:
        raise _version()
    if "X-Amz-Security-Token" in texts:
        raise _session()
    life = texts["X-Amz-Expires"]
    if not life.isascii() or not life.isdigit() or len(life) > 6 or not 1 <= int(life) <= MOST_LIFE_S:
        raise bad(f"X-Amz-Expires is not from 1 to {MOST_LIFE_S} seconds")
    sent = _joined(headers)
    hashed = texts.get("X-Amz-Content-Sha256", UNSIGNED)
    _check_payload(hashed, sent)
    signed = [(name, value) for name, value in fields if name != b"X-Amz-Signature"]
    canonical = (method, signed, sent, texts["X-Amz-SignedHeaders"], hashed)
    return _signed(raw_path, canonical, texts["X-Amz-Credential"], texts["X-Amz-Date"], texts["X-Amz-Signature"], int(life), bad)


def _session() -> Invalid:
    return Invalid("there are no session tokens here", expected="an access key and its secret alone", reason="session_token")


def _check_payload(hashed: str, sent: dict[str, bytes]) -> None:
    """Returns where the payload is nothing, as that of whoever only reads."""
    if "x-amz-security-token" in sent:
        raise _session()
    if hashed.startswith("STREAMING-"):
        raise Unsupported("payloads in signed chunks are not served", expected="reading only", reason="payload_streamed")
    if hashed not in (UNSIGNED, EMPTY):
        raise Invalid("x-amz-content-sha256 is not that of an empty body", expected=f"{EMPTY} or {UNSIGNED}", reason="payload_hash")


def _joined(headers: Headers) -> dict[str, bytes]:
    """Headers as they are signed: names in lower case, values trimmed with single blanks, those of one name with commas between."""
    out: dict[str, bytes] = {}
    for name, value in headers:
        key, text = name.decode("latin-1").lower(), b" ".join(value.split())
        out[key] = out[key] + b"," + text if key in out else text
    return out


def _signed(
    raw_path: bytes,
    canonical: tuple[str, list[tuple[bytes, bytes]], dict[str, bytes], str, str],
    credential: str,
    date: str,
    signature: str,
    life_s: int,
    bad: object,
) -> Signed:
    assert callable(bad)
    method, fields, sent, names, hashed = canonical
    key_id, *scope = credential.split("/")
    if len(scope) != 4 or scope[2:] != ["s3", "aws4_request"] or not scope[1]:
        raise bad("the credential is not KEY/DAY/REGION/s3/aws4_request")
    day, region = scope[:2]
    at = _moment(date)
    if at is None or not date.startswith(day) or len(day) != 8:
        raise bad("the date is not that of the credential, or no date")
    if not _HEX.match(signature):
        raise bad("the signature is not 64 hexadecimal digits")
    listed = names.split(";")
    if listed != sorted(set(listed)) or "host" not in listed:
        raise bad("SignedHeaders is not a sorted list with host in it")
    unsigned = sorted(name for name in sent if name.startswith("x-amz-") and name not in listed)
    if unsigned:
        raise Unauthenticated(f"the header {unsigned[0][:60]} was sent and not signed", do="sign every x-amz- header", reason="headers_unsigned")
    if not _KEY_ID.match(key_id):
        raise Unauthenticated("the access key id is none of this registry", expected="key- and 16 digits", reason="access_key")
    escaped = sorted((quote(name, safe=""), quote(value, safe="")) for name, value in fields)
    head = b"\n".join(name.encode("latin-1") + b":" + sent.get(name, b"") for name in listed)
    rest = ["&".join(f"{name}={value}" for name, value in escaped).encode(), head + b"\n", names.encode("latin-1"), hashed.encode("latin-1")]
    texts = []
    for path in dict.fromkeys((quote(unquote_to_bytes(raw_path), safe="/").encode(), raw_path or b"/")):
        digest = hashlib.sha256(b"\n".join([method.encode(), path or b"/", *rest])).hexdigest()
        texts.append(f"{ALGORITHM}\n{date}\n{'/'.join(scope)}\n{digest}".encode("latin-1"))
    return Signed(key_id, day, region, at, life_s, tuple(texts), signature)


def _moment(text: str) -> float | None:
    try:
        return datetime.strptime(text, "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC).timestamp()
    except ValueError:
        return None
