"""Release signatures against published vectors, signed documents against each rule of RFC 8725 that we rely on."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json

import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from artifact import trust
from artifact.errors import AirlockError, Denied, Invalid, Mismatch
from artifact.manifest import MANIFEST, canonical_json, digest_of, parse_manifest
from artifact.store import Descriptor

DIGEST = "sha256:" + "ab" * 32
REFERENCE = "nvcr.io/nim/meta/x:1.8.3"
PUBLIC = """-----BEGIN PUBLIC KEY-----
MFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAEn62Erq4Iu+9/AQAU2CzvagneKwz4
cbXODE8dE6WaWTQHy0V2nxBw4sJHD+Wxv+YxM8CwzcZOpL83kajsKgf9Tw==
-----END PUBLIC KEY-----
"""
SUBJECT = Descriptor(MANIFEST, DIGEST, 100)
CLAIMS: dict[str, object] = {"iss": "site", "sub": "org:acme", "jti": "1", "iat": 1000, "nbf": 1000, "exp": 2000, "aud": "node1"}


def pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())


KEY = pem(ec.derive_private_key(0x1234567890ABCDEF, ec.SECP256R1()))
KEYS = {trust.kid(PUBLIC): PUBLIC}
OTHER = trust.generate_key()


def test_public_half_and_hint() -> None:
    assert trust.public_pem(KEY) == PUBLIC
    assert trust.hint(PUBLIC) == "KiKpH9dKybn0ssH7kvEQlpsAjYowThNELKz6FZnSEGk="
    assert trust.kid(PUBLIC) == base64.b64decode(trust.hint(PUBLIC)).hex()[:16]


def test_legacy_payload_vector() -> None:
    raw = trust.payload(REFERENCE, DIGEST)
    assert (len(raw), hashlib.sha256(raw).hexdigest()) == (240, "f6fc43fc52266ff243542b41da9076fb0959d5dccee74cdbd9d986ece9d92795")
    expected = "MEUCIBtptNfU2Tf+wcBn9hTiaGYtKTM0vGA81LYnNfzzPzEsAiEA+C+yoo6YcCPDEit8QNsI7H1yZbr20xpwrN1NpcfPdWE="
    assert base64.b64encode(trust.sign(KEY, raw)).decode() == expected
    trust.verify(PUBLIC, base64.b64decode(expected), raw)


def test_bundle_statement_vector() -> None:
    raw = trust.statement(DIGEST)
    assert len(raw) == 213
    assert hashlib.sha256(trust.pae(raw)).hexdigest() == "cc06fe7b0e6205ac2e84b149fd7dc7d5d18afcab2d875569c1b9872ff2761c5b"
    expected = "MEUCIQDNgfOfA7BiJjCLuj6PL5lFF2bA87W9FsvCG0+m2Cf+hgIgfmU+Ui2nydb/HAGN6VKnlkUO7HDLUtMn7nFTnqQxqX8="
    trust.verify(PUBLIC, base64.b64decode(expected), trust.pae(raw))
    assert base64.b64encode(trust.sign(KEY, trust.pae(raw))).decode() == expected


def test_release_artifacts_verify_in_both_forms_and_repeat_unchanged() -> None:
    made = trust.release_artifacts(KEY, REFERENCE, SUBJECT)
    assert made.sig_tag == "sha256-" + "ab" * 32 + ".sig"
    trust.verify_release(made.sig_manifest, made.blobs.__getitem__, KEYS, REFERENCE, DIGEST)
    referrer = parse_manifest(made.referrer_manifest)
    assert referrer.subject == SUBJECT and referrer.artifact_type == trust.BUNDLE_TYPE
    trust.verify_bundle(made.blobs[referrer.layers[0].digest], KEYS, DIGEST)
    for manifest in (referrer, parse_manifest(made.sig_manifest)):
        for blob in manifest.blobs():
            assert digest_of(made.blobs[blob.digest]) == blob.digest and len(made.blobs[blob.digest]) == blob.size
    again = trust.release_artifacts(KEY, REFERENCE, SUBJECT, made.sig_manifest)
    assert (again.sig_manifest, again.referrer_manifest) == (made.sig_manifest, made.referrer_manifest)


def test_a_second_signer_is_added_and_the_config_lists_every_payload() -> None:
    first = trust.release_artifacts(OTHER, REFERENCE, SUBJECT)
    both = trust.release_artifacts(KEY, REFERENCE, SUBJECT, first.sig_manifest)
    manifest = parse_manifest(both.sig_manifest)
    assert manifest.layers[0] == parse_manifest(first.sig_manifest).layers[0] and len(manifest.layers) == 2
    assert manifest.config is not None
    assert json.loads(both.blobs[manifest.config.digest])["rootfs"]["diff_ids"] == [d.digest for d in manifest.layers]
    trust.verify_release(both.sig_manifest, both.blobs.__getitem__, KEYS, REFERENCE, DIGEST)


@pytest.mark.parametrize(
    ("keys", "reference", "digest"),
    [
        ({}, REFERENCE, DIGEST),
        ({"x": trust.public_pem(OTHER)}, REFERENCE, DIGEST),
        (KEYS, "nvcr.io/nim/meta/x:2", DIGEST),
        (KEYS, "nvcr.io/nim/meta/y:1.8.3", DIGEST),
        (KEYS, REFERENCE, "sha256:" + "cd" * 32),
    ],
)
def test_release_of_another_key_name_version_or_digest_is_refused(keys: dict[str, str], reference: str, digest: str) -> None:
    made = trust.release_artifacts(KEY, REFERENCE, SUBJECT)
    with pytest.raises(Mismatch) as caught:
        trust.verify_release(made.sig_manifest, made.blobs.__getitem__, keys, reference, digest)
    assert caught.value.reason == "not_promoted"


@pytest.mark.parametrize("change", ["payload", "base64", "type", "unsigned", "other_claim"])
def test_altered_release_is_refused(change: str) -> None:
    made = trust.release_artifacts(KEY, REFERENCE, SUBJECT)
    doc = json.loads(made.sig_manifest)
    layer, blobs = doc["layers"][0], dict(made.blobs)
    if change == "payload":
        blobs[layer["digest"]] = blobs[layer["digest"]].replace(b"1.8.3", b"1.8.4")
    elif change == "base64":
        layer["annotations"][trust.SIGNATURE] = "!" + layer["annotations"][trust.SIGNATURE]
    elif change == "type":
        layer["mediaType"] = "application/octet-stream"
    elif change == "unsigned":
        doc["layers"] = []
    else:  # signed by the right key, but not a claim about an image
        raw = canonical_json({"critical": {"type": "something else"}})
        layer |= {"digest": digest_of(raw), "size": len(raw), "annotations": {trust.SIGNATURE: base64.b64encode(trust.sign(KEY, raw)).decode()}}
        blobs[digest_of(raw)] = raw
    with pytest.raises(Mismatch):
        trust.verify_release(canonical_json(doc), blobs.__getitem__, KEYS, REFERENCE, DIGEST)


@pytest.mark.parametrize("change", ["payload", "two", "kind", "digest"])
def test_altered_bundle_is_refused(change: str) -> None:
    made = trust.release_artifacts(KEY, REFERENCE, SUBJECT)
    doc = json.loads(made.blobs[parse_manifest(made.referrer_manifest).layers[0].digest])
    envelope = doc["dsseEnvelope"]
    digest = DIGEST
    if change == "payload":
        envelope["payload"] = base64.b64encode(trust.statement("sha256:" + "cd" * 32)).decode()
        digest = "sha256:" + "cd" * 32
    elif change == "two":
        envelope["signatures"] *= 2
    elif change == "kind":
        doc["mediaType"] = "application/json"
    else:
        digest = "sha256:" + "cd" * 32
    with pytest.raises((Mismatch, Invalid)):
        trust.verify_bundle(json.dumps(doc).encode(), KEYS, digest)


def test_other_curves_are_refused_clearly() -> None:
    wide = ec.generate_private_key(ec.SECP384R1())
    with pytest.raises(Invalid, match="P-256"):
        trust.sign(pem(wide), b"x")


# ---- JWS ----


def token(header: dict[str, object] | None = None, claims: dict[str, object] | None = None, drop: str = "") -> str:
    head = {"typ": "lease+jwt", "kid": trust.kid(PUBLIC)} | (header or {})
    body = {k: v for k, v in (CLAIMS | (claims or {})).items() if k != drop}
    return jwt.encode(body, KEY, algorithm="ES256", headers=head)


def test_document_round_trip() -> None:
    made = trust.sign_jws(KEY, "lease+jwt", CLAIMS)
    assert trust.verify_jws(made, "lease+jwt", KEYS, 1500.0, "node1") == CLAIMS
    assert jwt.get_unverified_header(made) == {"alg": "ES256", "typ": "lease+jwt", "kid": trust.kid(PUBLIC)}


@pytest.mark.parametrize("name", ["jwk", "jku", "x5u", "x5c", "crit"])
def test_header_with_a_key_or_crit_is_refused(name: str) -> None:
    with pytest.raises(Invalid):
        trust.verify_jws(token({name: ["b64"] if name == "crit" else "x"}), "lease+jwt", KEYS, 1500.0)


@pytest.mark.parametrize("name", ["iss", "sub", "jti", "iat", "nbf", "exp"])
def test_missing_claim_is_refused(name: str) -> None:
    with pytest.raises(Invalid):
        trust.verify_jws(token(drop=name), "lease+jwt", KEYS, 1500.0)
    with pytest.raises(Invalid):
        trust.sign_jws(KEY, "lease+jwt", {k: v for k, v in CLAIMS.items() if k != name})


@pytest.mark.parametrize(
    ("made", "error"),
    [
        (lambda: token({"typ": "receipt+jwt"}), Invalid),
        (lambda: token({"typ": "LEASE+JWT"}), Invalid),
        (lambda: token({"kid": "0" * 16}), Mismatch),
        (lambda: jwt.encode(CLAIMS, OTHER, algorithm="ES256", headers={"typ": "lease+jwt", "kid": trust.kid(PUBLIC)}), Mismatch),
        (lambda: token(claims={"must_understand": ["quota"]}), Invalid),
        (lambda: token(claims={"exp": True}), Invalid),
        (lambda: token(claims={"nbf": "1000"}), Invalid),
        (lambda: token(claims={"iss": ""}), Invalid),
        (lambda: token()[:-2], AirlockError),
        (lambda: "", Invalid),
        (lambda: "a.b.c", Invalid),
        (lambda: "x" * 100_000, Invalid),
    ],
)
def test_refused_documents(made: object, error: type[AirlockError]) -> None:
    assert callable(made)
    with pytest.raises(error):
        trust.verify_jws(made(), "lease+jwt", KEYS, 1500.0)


def test_algorithms_none_and_hmac_with_the_public_key_are_refused() -> None:
    for header in ({"alg": "none"}, {"alg": "HS256"}):
        head = base64.urlsafe_b64encode(json.dumps(header | {"typ": "lease+jwt", "kid": trust.kid(PUBLIC)}).encode()).rstrip(b"=")
        body = base64.urlsafe_b64encode(json.dumps(CLAIMS).encode()).rstrip(b"=")
        signature = base64.urlsafe_b64encode(hmac.new(PUBLIC.encode(), head + b"." + body, "sha256").digest()).rstrip(b"=")
        for end in (b"", signature):
            with pytest.raises(Invalid):
                trust.verify_jws((head + b"." + body + b"." + end).decode(), "lease+jwt", KEYS, 1500.0)


@pytest.mark.parametrize(
    ("now", "audience", "reason"), [(999.0, "", "not_yet_valid"), (2000.0, "", "expired"), (9e18, "", "expired"), (1500.0, "node2", "audience")]
)
def test_time_comes_from_the_argument(now: float, audience: str, reason: str) -> None:
    with pytest.raises(Denied) as caught:
        trust.verify_jws(token(), "lease+jwt", KEYS, now, audience)
    assert caught.value.reason == reason


def test_every_flipped_character_is_refused() -> None:
    made = token()
    for i in range(0, len(made), 3):
        other = made[:i] + ("A" if made[i] != "A" else "B") + made[i + 1 :]
        if i == len(made) - 1 and base64.urlsafe_b64decode(other.rsplit(".", 1)[1] + "==") == base64.urlsafe_b64decode(made.rsplit(".", 1)[1] + "=="):
            continue  # the unused bits of the last character
        with pytest.raises(AirlockError):
            trust.verify_jws(other, "lease+jwt", KEYS, 1500.0)


# ---- site trust ----


def test_site_trust_round_trip_and_refusals() -> None:
    made = trust.SiteTrust("site", KEYS, {trust.kid(trust.public_pem(OTHER)): trust.public_pem(OTHER)})
    raw = json.dumps(made.as_json()).encode()
    assert trust.SiteTrust.parse(raw) == made
    for key, value in (
        ("schema", 2),
        ("instance", ""),
        ("release_keys", []),
        ("lease_keys", [{"kid": "0", "pem": PUBLIC}]),
        ("revocation_serial", -1),
    ):
        with pytest.raises(Invalid):
            trust.SiteTrust.parse(json.dumps(made.as_json() | {key: value}).encode())
    with pytest.raises(Invalid):
        trust.SiteTrust.parse(b"\xff")
