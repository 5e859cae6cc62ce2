"""Signatures: release signatures in cosign's two forms, signed documents (JWS), and what a site tells its runtimes to trust.

Pure functions of bytes, keys and an explicit clock; it must do no I/O, and no error text holds a key. Everything is ECDSA P-256 with SHA-256,
the only choice that cosign, skopeo, podman and JWT libraries all accept. Sources: cosign SIGNATURE_SPEC.md and BUNDLE_SPEC.md, RFC 7515, RFC 8725.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime

import jwt
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from artifact.errors import AirlockError, Denied, Invalid, Mismatch
from artifact.manifest import (
    EMPTY_BYTES,
    EMPTY_CONFIG,
    EMPTY_DIGEST,
    MANIFEST,
    Manifest,
    canonical_json,
    check_digest,
    digest_of,
    parse_json,
    parse_manifest,
)
from artifact.store import Descriptor
from artifact.upstream import LATEST

SIGNATURE = "dev.cosignproject.cosign/signature"
SIMPLE_SIGNING = "application/vnd.dev.cosign.simplesigning.v1+json"
IMAGE_CONFIG = "application/vnd.oci.image.config.v1+json"
BUNDLE_TYPE = "application/vnd.dev.sigstore.bundle.v0.3+json"
INTOTO = "application/vnd.in-toto+json"
PREDICATE = "https://sigstore.dev/cosign/sign/v1"
STATEMENT = "https://in-toto.io/Statement/v1"
CLAIM_TYPE = "cosign container image signature"
MAX_SIGNATURES = 100
MAX_DOCUMENT_BYTES = 64 * 1024
REQUIRED_CLAIMS = ("iss", "sub", "jti", "iat", "nbf", "exp")
_EMBEDDED_KEYS = ("jwk", "jku", "x5u", "x5c", "crit")
_EPOCH = "1970-01-01T00:00:00Z"


def generate_key() -> bytes:
    """A new P-256 private key as PKCS#8 PEM."""
    key = ec.generate_private_key(ec.SECP256R1())
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())


def _private(pem: bytes) -> ec.EllipticCurvePrivateKey:
    try:
        key = serialization.load_pem_private_key(pem, None)
    except (ValueError, TypeError) as error:
        raise Invalid("the private key cannot be read", expected="PKCS#8 PEM of a P-256 key without a passphrase", reason="key") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP256R1):
        raise Invalid("the private key is of another kind", expected="ECDSA P-256 (stock clients verify no other curve)", reason="key")
    return key


def _public(pem: str) -> ec.EllipticCurvePublicKey:
    try:
        key = serialization.load_pem_public_key(pem.encode())
    except (ValueError, TypeError) as error:
        raise Invalid("the public key cannot be read", expected="SPKI PEM of a P-256 key", reason="key") from error
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise Invalid("the public key is of another kind", expected="ECDSA P-256", reason="key")
    return key


def _spki(key: ec.EllipticCurvePublicKey, encoding: serialization.Encoding) -> bytes:
    return key.public_bytes(encoding, serialization.PublicFormat.SubjectPublicKeyInfo)


def public_pem(private_pem: bytes) -> str:
    """The SPKI PEM of a private key; raises Invalid."""
    return _spki(_private(private_pem).public_key(), serialization.Encoding.PEM).decode()


def plain_pem(pem: str) -> str:
    """A public key's PEM and nothing that stood around it; raises Invalid."""
    return _spki(_public(pem), serialization.Encoding.PEM).decode()


def spki_sha256(pem: str) -> bytes:
    """The SHA-256 of a public key's SPKI DER; raises Invalid."""
    return hashlib.sha256(_spki(_public(pem), serialization.Encoding.DER)).digest()


def kid(pem: str) -> str:
    """The key id of a public PEM: first 16 hex digits of the SHA-256 of its SPKI DER; raises Invalid (docs/format.md section 8)."""
    return spki_sha256(pem).hex()[:16]


def hint(pem: str) -> str:
    """The key hint that cosign's bundles carry: base64 of the SHA-256 of the SPKI DER; never security."""
    return base64.b64encode(spki_sha256(pem)).decode()


def sign(private_pem: bytes, data: bytes) -> bytes:
    """An ASN.1 DER ECDSA signature over SHA-256 of the data, the same for the same input (RFC 6979); raises Invalid."""
    return _private(private_pem).sign(data, ec.ECDSA(hashes.SHA256(), deterministic_signing=True))


def verify(pem: str, signature: bytes, data: bytes) -> None:
    """Returns only if the signature is this key's over exactly these bytes; raises Mismatch, Invalid."""
    try:
        _public(pem).verify(signature, data, ec.ECDSA(hashes.SHA256()))
    except InvalidSignature as error:
        raise Mismatch("the signature does not verify", expected="a signature by a pinned key over these bytes", reason="signature") from error


# ---- release signatures (cosign) ----


@dataclass(frozen=True)
class ReleaseArtifacts:
    """What one release signature adds to a repository: the `.sig` tag with its manifest, the bundle referrer, and the blobs of both."""

    sig_tag: str
    sig_manifest: bytes
    referrer_manifest: bytes
    blobs: dict[str, bytes] = field(repr=False)


def sig_tag(digest: str) -> str:
    """The tag under which cosign's legacy form keeps the signatures of a manifest; raises Invalid."""
    return check_digest(digest).replace(":", "-") + ".sig"


def is_sig_tag(ref: str) -> bool:
    """Whether a ref is such a tag, whose manifests merge as a set."""
    return ref.startswith("sha256-") and ref.endswith(".sig") and len(ref) == len("sha256-.sig") + 64


def _compact(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()


def payload(docker_reference: str, digest: str) -> bytes:
    """The exact bytes that cosign's legacy form signs, in its key order (SIGNATURE_SPEC.md)."""
    identity = {"docker-reference": docker_reference}
    return _compact(
        {"critical": {"identity": identity, "image": {"docker-manifest-digest": check_digest(digest)}, "type": CLAIM_TYPE}, "optional": None}
    )


def statement(digest: str) -> bytes:
    """The in-toto statement that cosign's bundle form signs (BUNDLE_SPEC.md)."""
    algorithm, _, hexadecimal = check_digest(digest).partition(":")
    return _compact({"_type": STATEMENT, "subject": [{"digest": {algorithm: hexadecimal}}], "predicateType": PREDICATE, "predicate": {}})


def pae(body: bytes, payload_type: str = INTOTO) -> bytes:
    """DSSE's pre-authentication encoding of a payload (secure-systems-lab/dsse protocol.md)."""
    kind = payload_type.encode()
    return b"DSSEv1 %d %s %d %s" % (len(kind), kind, len(body), body)


def release_artifacts(
    private_pem: bytes, docker_reference: str, subject: Descriptor, existing_sig_manifest: bytes | None = None, created: str = _EPOCH
) -> ReleaseArtifacts:
    """Both cosign forms of a signature over a manifest, added to those that its `.sig` tag holds; again changes nothing; raises Invalid."""
    blobs: dict[str, bytes] = {EMPTY_DIGEST: EMPTY_BYTES}
    claim = payload(docker_reference, subject.digest)
    blobs[digest_of(claim)] = claim
    signature = base64.b64encode(sign(private_pem, claim)).decode()
    layer = Descriptor(SIMPLE_SIGNING, digest_of(claim), len(claim), annotations={SIGNATURE: signature})
    legacy = merge_signatures(existing_sig_manifest, (layer,))
    blobs |= legacy.blobs
    body = statement(subject.digest)
    envelope = {
        "payload": base64.b64encode(body).decode(),
        "payloadType": INTOTO,
        "signatures": [{"sig": base64.b64encode(sign(private_pem, pae(body))).decode()}],
    }
    bundle = _compact(
        {"mediaType": BUNDLE_TYPE, "verificationMaterial": {"publicKey": {"hint": hint(public_pem(private_pem))}}, "dsseEnvelope": envelope}
    )
    blobs[digest_of(bundle)] = bundle
    plain_subject = Descriptor(subject.media_type, subject.digest, subject.size)
    referrer = canonical_json(
        {
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "artifactType": BUNDLE_TYPE,
            "config": {"mediaType": EMPTY_CONFIG, "digest": EMPTY_DIGEST, "size": 2},
            "layers": [Descriptor(BUNDLE_TYPE, digest_of(bundle), len(bundle)).as_json()],
            "subject": plain_subject.as_json(),
            "annotations": {
                "dev.sigstore.bundle.content": "dsse-envelope",
                "dev.sigstore.bundle.predicateType": PREDICATE,
                "org.opencontainers.image.created": created,
            },
        }
    )
    return ReleaseArtifacts(sig_tag(subject.digest), legacy.manifest, referrer, blobs)


@dataclass(frozen=True)
class MergedSignatures:
    """A `.sig` manifest and the blobs that it adds (its config)."""

    manifest: bytes
    blobs: dict[str, bytes] = field(repr=False)


def merge_signatures(existing: bytes | None, added: tuple[Descriptor, ...]) -> MergedSignatures:
    """The `.sig` manifest with the union of signature layers, existing ones first; unchanged bytes if nothing is new; raises Invalid, TooLarge."""
    old = parse_manifest(existing, MANIFEST).layers if existing else ()
    seen = {(d.digest, d.annotations.get(SIGNATURE, "")) for d in old}
    fresh: list[Descriptor] = []
    for layer in added:
        mark = (layer.digest, layer.annotations.get(SIGNATURE, ""))
        if mark not in seen:
            seen.add(mark)
            fresh.append(layer)
    if existing and not fresh:
        return MergedSignatures(existing, {})
    layers = [*old, *fresh]
    if len(layers) > MAX_SIGNATURES:
        raise Invalid(f"{len(layers)} signatures on one manifest", expected=f"at most {MAX_SIGNATURES}", reason="signature")
    config = _compact(
        {
            "architecture": "",
            "created": "0001-01-01T00:00:00Z",
            "history": [{"created": "0001-01-01T00:00:00Z"}],
            "os": "",
            "rootfs": {"type": "layers", "diff_ids": [d.digest for d in layers]},
            "config": {},
        }
    )
    manifest = canonical_json(
        {
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "config": {"mediaType": IMAGE_CONFIG, "size": len(config), "digest": digest_of(config)},
            "layers": [d.as_json() for d in layers],
        }
    )
    return MergedSignatures(manifest, {digest_of(config): config})


def _strict_base64(text: object, what: str) -> bytes:
    if not isinstance(text, str) or len(text) > MAX_DOCUMENT_BYTES:
        raise Invalid(f"{what} is not base64 text", expected="standard base64 with padding", reason="signature")
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise Invalid(f"{what} is not base64", expected="standard base64 with padding", reason="signature") from error


def verify_release(sig_manifest_raw: bytes, payloads: Callable[[str], bytes], keys: Mapping[str, str], docker_reference: str, digest: str) -> None:
    """Returns only if one signature of a `.sig` manifest is by a pinned key and claims exactly this reference and digest; raises Mismatch.

    Steps, per signature layer: 1 media type and size limit; 2 payload bytes match their digest; 3 strict base64;
    4 ECDSA by one of `keys` (kid to PEM) over the payload bytes; 5 only then parse them; 6 type; 7 manifest digest; 8 docker reference.
    `payloads` reads a blob by digest (SIGNATURE_SPEC.md).
    """
    manifest = parse_manifest(sig_manifest_raw, MANIFEST)
    if len(manifest.layers) > MAX_SIGNATURES:
        raise Invalid(f"{len(manifest.layers)} signatures on one manifest", expected=f"at most {MAX_SIGNATURES}", reason="signature")
    reasons: list[str] = []
    for layer in manifest.layers:
        try:
            _verify_claim(layer, payloads, keys, docker_reference, digest)
        except AirlockError as error:
            reasons.append(error.what)
            continue
        return
    told = "; ".join(dict.fromkeys(reasons)) or "it holds no signature"
    raise Mismatch(
        f"no release signature of {docker_reference} at {digest} is valid: {told}",
        expected="a signature by this site's release key over exactly this name, version and digest",
        do="promote it: airlock promote NAME:VERSION",
        reason="not_promoted",
    )


def _verify_claim(layer: Descriptor, payloads: Callable[[str], bytes], keys: Mapping[str, str], docker_reference: str, digest: str) -> None:
    if layer.media_type != SIMPLE_SIGNING or layer.size > MAX_DOCUMENT_BYTES:
        raise Invalid("a layer is not a cosign payload", expected=SIMPLE_SIGNING, reason="signature")
    raw = payloads(layer.digest)
    if len(raw) != layer.size or digest_of(raw) != layer.digest:
        raise Mismatch("a payload's bytes do not match its digest", reason="signature")
    signature = _strict_base64(layer.annotations.get(SIGNATURE), "a signature")
    if not _signed_by_any(keys, signature, raw):
        raise Mismatch("a signature is by no pinned key", expected="the release key", reason="signature")
    critical = parse_json(raw, "the signed payload", MAX_DOCUMENT_BYTES).get("critical")
    if not isinstance(critical, Mapping) or critical.get("type") != CLAIM_TYPE:
        raise Invalid("a signed payload is of another type", expected=CLAIM_TYPE, reason="signature")
    image, identity = critical.get("image"), critical.get("identity")
    if not isinstance(image, Mapping) or image.get("docker-manifest-digest") != digest:
        raise Mismatch("a signature is of another digest", expected=digest, reason="signature")
    if not isinstance(identity, Mapping) or identity.get("docker-reference") != docker_reference:
        raise Mismatch("a signature is of another name or version", expected=docker_reference, reason="signature")


def _signed_by_any(keys: Mapping[str, str], signature: bytes, data: bytes) -> bool:
    for pem in keys.values():
        try:
            verify(pem, signature, data)
        except Mismatch:
            continue
        return True
    return False


def verify_bundle(raw: bytes, keys: Mapping[str, str], digest: str) -> None:
    """Returns only if a sigstore bundle blob is by a pinned key over exactly this digest; raises Mismatch, Invalid (BUNDLE_SPEC.md).

    It binds no name or version: where those matter, verify_release judges.
    """
    doc = parse_json(raw, "the signature bundle", MAX_DOCUMENT_BYTES)
    envelope = doc.get("dsseEnvelope")
    if doc.get("mediaType") != BUNDLE_TYPE or not isinstance(envelope, Mapping) or envelope.get("payloadType") != INTOTO:
        raise Invalid("the signature bundle is of another kind", expected=f"{BUNDLE_TYPE} holding {INTOTO}", reason="signature")
    signatures = envelope.get("signatures")
    if not isinstance(signatures, list) or len(signatures) != 1 or not isinstance(signatures[0], Mapping):
        raise Invalid("the signature bundle does not hold exactly one signature", expected="one", reason="signature")
    signature = _strict_base64(signatures[0].get("sig"), "the signature")
    body = _strict_base64(envelope.get("payload"), "the payload")
    if not _signed_by_any(keys, signature, pae(body)):
        raise Mismatch("the signature is by no pinned key", expected="the release key", reason="signature")
    said = parse_json(body, "the signed statement", MAX_DOCUMENT_BYTES)
    subjects = said.get("subject")
    if said.get("_type") != STATEMENT or said.get("predicateType") != PREDICATE or not isinstance(subjects, list) or len(subjects) != 1:
        raise Invalid("the signed statement is of another type", expected=f"{STATEMENT} with {PREDICATE} and one subject", reason="signature")
    algorithm, _, hexadecimal = check_digest(digest).partition(":")
    named = subjects[0].get("digest") if isinstance(subjects[0], Mapping) else None
    if not isinstance(named, Mapping) or dict(named) != {algorithm: hexadecimal}:
        raise Mismatch("the signature is of another digest", expected=digest, reason="signature")


def signature_layers(manifest: Manifest) -> tuple[Descriptor, ...]:
    """The layers of a `.sig` manifest that are cosign payloads."""
    return tuple(d for d in manifest.layers if d.media_type == SIMPLE_SIGNING and SIGNATURE in d.annotations)


# ---- signed documents (JWS) ----


def sign_jws(private_pem: bytes, typ: str, claims: Mapping[str, object]) -> str:
    """A compact JWS, ES256, header alg, typ and kid; raises Invalid where a required claim is missing (RFC 7515)."""
    absent = [c for c in REQUIRED_CLAIMS if c not in claims]
    if absent:
        raise Invalid(f"the document lacks {', '.join(absent)}", expected=", ".join(REQUIRED_CLAIMS), reason="claims")
    key = _private(private_pem)
    headers = {"typ": typ, "kid": kid(public_pem(private_pem))}
    return jwt.encode(dict(claims), key, algorithm="ES256", headers=headers)


def verify_jws(token: str, typ: str, keys: Mapping[str, str], now: float, audience: str = "") -> dict[str, object]:
    """The claims of a signed document of exactly this type by a pinned key (kid to PEM), judged at `now` (seconds since 1970).

    Raises Invalid (not such a document), Mismatch (signature), Denied with reason expired, not_yet_valid or audience (RFC 8725).
    """
    claims = signed_claims(token, typ, keys)
    _check_claims(claims, now, audience)
    return claims


def signed_claims(token: str, typ: str, keys: Mapping[str, str], understood: Collection[str] = ()) -> dict[str, object]:
    """The same whatever the time and whomever it was made for: what names a claim beyond `understood` in must_understand is refused."""
    if len(token) > MAX_DOCUMENT_BYTES:
        raise Invalid("the signed document is too large", expected=f"at most {MAX_DOCUMENT_BYTES} bytes", reason="document")
    try:
        header = jwt.get_unverified_header(token)
    except jwt.InvalidTokenError as error:
        raise Invalid("the text is no signed document", expected=f"a compact JWS of type {typ}", reason="document") from error
    embedded = [h for h in _EMBEDDED_KEYS if h in header]
    if embedded:
        raise Invalid(
            f"the document's header holds {', '.join(embedded)}", expected="alg, typ and kid only: keys come from the pins", reason="document"
        )
    if header.get("alg") != "ES256" or header.get("typ") != typ:
        raise Invalid("the document is of another type or algorithm", expected=f"{typ} signed with ES256", reason="document")
    name = header.get("kid")
    pem = keys.get(name) if isinstance(name, str) else None
    if pem is None:
        raise Mismatch(
            "the document names a key that is not pinned", expected="one of: " + (", ".join(sorted(keys)) or "none pinned"), reason="signature"
        )
    checks = {f"verify_{name}": False for name in ("exp", "nbf", "iat", "aud", "iss", "sub", "jti")}
    try:
        claims = jwt.decode(token, _public(pem), algorithms=["ES256"], options={**checks, "require": list(REQUIRED_CLAIMS)})  # type: ignore[arg-type]
    except jwt.MissingRequiredClaimError as error:
        raise Invalid("the document lacks a required claim", expected=", ".join(REQUIRED_CLAIMS), reason="claims") from error
    except jwt.InvalidSignatureError as error:
        raise Mismatch("the document's signature does not verify", expected="an unaltered document", reason="signature") from error
    except jwt.InvalidTokenError as error:
        raise Invalid("the text is no signed document", expected=f"a compact JWS of type {typ}", reason="document") from error
    demanded = claims.get("must_understand") or []
    if not isinstance(demanded, list) or not all(isinstance(name, str) and name in understood for name in demanded):
        known = ", ".join(sorted(understood)) or "nothing"
        raise Invalid(
            "the document demands rules that this version does not know", expected=f"{known} in must_understand", do="update Airlock", reason="claims"
        )
    return claims


def _check_claims(claims: Mapping[str, object], now: float, audience: str) -> None:
    times: dict[str, float] = {}
    for name in ("iat", "nbf", "exp"):
        value = claims[name]
        if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) < LATEST:
            raise Invalid(f"the claim {name} is no time", expected="seconds since 1970", reason="claims")
        times[name] = float(value)
    if not all(isinstance(claims[n], str) and claims[n] for n in ("iss", "sub", "jti")):
        raise Invalid("the claims iss, sub or jti are not text", expected="non-empty text", reason="claims")
    if now >= times["exp"]:
        raise Denied(f"the document expired at {_date(times['exp'])}", expected="one that is valid now", reason="expired")
    if now < times["nbf"]:
        raise Denied(
            f"the document is not valid before {_date(times['nbf'])}", expected="one that is valid now", do="check the clock", reason="not_yet_valid"
        )
    if audience:
        named = claims.get("aud")
        if audience not in (named if isinstance(named, list) else [named]):
            raise Denied("the document was made for somebody else", expected=f"audience {audience}", reason="audience")


def _date(when: float) -> str:
    try:
        return datetime.fromtimestamp(when, UTC).isoformat(timespec="seconds")
    except (ValueError, OverflowError, OSError):
        return "a time out of range"


# ---- what a site tells its runtimes ----


@dataclass(frozen=True)
class SiteTrust:
    """The one file a runtime is given: site id, release and lease keys (kid to PEM), lowest revocation serial (docs/format.md section 8)."""

    instance: str
    release_keys: dict[str, str]
    lease_keys: dict[str, str]
    revocation_serial: int = 0

    @classmethod
    def parse(cls, raw: bytes) -> SiteTrust:
        """From the bytes of site-trust.json; raises Invalid."""
        doc = parse_json(raw, "the site trust file", MAX_DOCUMENT_BYTES)
        instance, serial = doc.get("instance"), doc.get("revocation_serial")
        if doc.get("schema") != 1 or not isinstance(instance, str) or not instance or type(serial) is not int or serial < 0:
            raise Invalid(
                "the site trust file is of another kind",
                expected="schema 1 with instance and revocation_serial",
                do="airlock site trust",
                reason="trust",
            )
        return cls(instance, _keys(doc.get("release_keys")), _keys(doc.get("lease_keys")), serial)

    def as_json(self) -> dict[str, object]:
        """The document as a JSON object."""
        keys = [[{"kid": k, "pem": p} for k, p in sorted(m.items())] for m in (self.release_keys, self.lease_keys)]
        head: dict[str, object] = {"schema": 1, "instance": self.instance, "revocation_serial": self.revocation_serial}
        return head | {"release_keys": keys[0], "lease_keys": keys[1]}


def _keys(value: object) -> dict[str, str]:
    if not isinstance(value, list) or not value:
        raise Invalid("the site trust file pins no key", expected="a list of kid and pem", do="airlock site trust", reason="trust")
    out: dict[str, str] = {}
    for item in value:
        pem = item.get("pem") if isinstance(item, Mapping) else None
        if not isinstance(pem, str) or kid(pem) != item.get("kid"):
            raise Invalid(
                "a key of the site trust file does not match its kid",
                expected="kid and pem of one P-256 key",
                do="airlock site trust",
                reason="trust",
            )
        out[kid(pem)] = pem
    return out
