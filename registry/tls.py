"""TLS of the registry's listener: a certificate from files or made at the first start, replaced without a restart, and how clients trust it.

Here because the server only needs a context. Private keys are 0600 and leave this module in no text.
"""

from __future__ import annotations

import datetime
import hashlib
import ipaddress
import socket
import ssl
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, EllipticCurvePrivateKey, generate_private_key
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from artifact.errors import Invalid, NotFound, Unavailable
from registry.keyring import write_new
from registry.settings import Settings

DAYS = 397  # the longest that common clients accept
FOLDER = "tls"
Key = EllipticCurvePrivateKey | RSAPrivateKey | Ed25519PrivateKey
_EVERYWHERE = ("0.0.0.0", "::", "")  # noqa: S104 (compared with, not listened on)


@dataclass(frozen=True)
class Files:
    """Where certificate chain and key lie, PEM."""

    cert: Path
    key: Path


def files(settings: Settings) -> Files:
    """The files of these settings: those that are named, else those of the data directory."""
    if settings.tls_cert:
        return Files(Path(settings.tls_cert), Path(settings.tls_key))
    folder = settings.data / FOLDER
    return Files(folder / "cert.pem", folder / "key.pem")


def served(settings: Settings) -> Path | None:
    """The certificate chain that the listener serves, if it speaks TLS."""
    return files(settings).cert if settings.secure else None


def names(settings: Settings) -> list[str]:
    """The host names and addresses that a certificate of this registry must hold, the most telling first."""
    listened = [settings.host, *(place.rpartition(":")[0].strip("[]") for place in (settings.ngc, settings.s3) if place)]
    found = [urlsplit(url).hostname or "" for url in (settings.public_url, settings.ngc_url)]
    found += [settings.s3_domain, f"*.{settings.s3_domain}"] if settings.s3_domain else []  # each bucket is a host below it
    found += [host if host not in _EVERYWHERE else socket.gethostname() for host in listened]
    if set(listened) & {*_EVERYWHERE, "127.0.0.1", "::1", "localhost"}:
        found += ["localhost", "127.0.0.1"]
    return list(dict.fromkeys(name for name in found if name))


def _alternative(given: list[str]) -> x509.SubjectAlternativeName:
    out: list[x509.GeneralName] = []
    for name in given:
        try:
            out.append(x509.IPAddress(ipaddress.ip_address(name)))
        except ValueError:
            try:
                out.append(x509.DNSName("*." * name.startswith("*.") + name.removeprefix("*.").encode("idna").decode()))
            except UnicodeError as error:
                raise Invalid(f"{name[:60]!r} is no host name for a certificate", expected="a name or an address in AIRLOCK_PUBLIC_URL") from error
    return x509.SubjectAlternativeName(out)


def make_self_signed(settings: Settings, now: datetime.datetime) -> bool:
    """Makes a P-256 key and a certificate in the data directory where there is none; whether it did; raises Invalid, Unavailable."""
    at = files(settings)
    if at.cert.exists() and at.key.exists():
        return False
    given = names(settings)
    key = _own_key(at.key)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, given[0][:64])])
    identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(minutes=5))
        .not_valid_after(now + datetime.timedelta(days=DAYS))
        .add_extension(_alternative(given), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(identifier, critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier), critical=False)
    )
    _write(at.cert, builder.sign(key, _hash(key)).public_bytes(serialization.Encoding.PEM), 0o644)
    return True


def request(settings: Settings) -> bytes:
    """A certificate request, PEM, for the key of these settings, which is made in the data directory where there is none."""
    at = files(settings)
    key = _key(at.key) if settings.tls_cert else _own_key(at.key)
    given = names(settings)
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, given[0][:64])]))
    builder = builder.add_extension(_alternative(given), critical=False).add_extension(_usage(), critical=True)
    return builder.sign(key, _hash(key)).public_bytes(serialization.Encoding.PEM)


def _usage() -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=False,
        crl_sign=False,
        encipher_only=False,
        decipher_only=False,
    )


def _hash(key: Key) -> hashes.SHA256 | None:
    return None if isinstance(key, Ed25519PrivateKey) else hashes.SHA256()


def _own_key(path: Path) -> Key:
    if path.exists():
        return _key(path)
    key = generate_private_key(SECP256R1())
    raw = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    _write(path, raw, 0o600)
    return _key(path)


def _key(path: Path) -> Key:
    try:
        key = serialization.load_pem_private_key(_read(path, "key"), None)
    except TypeError as error:
        raise Invalid(f"the TLS key {path} is encrypted", expected="a key without a passphrase, readable by this user only") from error
    except ValueError as error:
        raise Invalid(f"the TLS key {path} is no private key", expected="PEM") from error
    if not isinstance(key, Key):
        raise Invalid(f"the TLS key {path} is of a kind that signs no certificate", expected="an EC, RSA or Ed25519 key")
    return key


def _read(path: Path, what: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise NotFound(f"the TLS {what} {path} cannot be read: {error.strerror}", expected="a PEM file that this user may read") from error


def _write(path: Path, raw: bytes, mode: int) -> None:
    """Writes a file that never replaces one: two servers that start at once agree on the first."""
    try:
        write_new(path, raw, mode)
    except OSError as error:
        raise Unavailable(f"{path} cannot be written: {error.strerror}", do="let this user write the data directory") from error


class Certificate:
    """The certificate that new connections see; `context` stays the same while the files behind it change."""

    def __init__(self, at: Files) -> None:
        self.at = at
        self._seen = self._stat()
        self._current = self._load()
        self.context = _context()
        self.context.sni_callback = self._choose
        self._load_into(self.context)  # a handshake needs one from the start; the callback gives the current

    def _choose(self, connection: ssl.SSLObject | ssl.SSLSocket, _name: str | None, _context: ssl.SSLContext) -> None:
        connection.context = self._current

    def _load(self) -> ssl.SSLContext:
        context = _context()
        self._load_into(context)
        return context

    def _load_into(self, context: ssl.SSLContext) -> None:
        """Loads the pair; raises NotFound, Invalid, with the old pair still served."""
        fingerprint(_read(self.at.cert, "certificate"), self.at.cert)
        _key(self.at.key)
        try:
            context.load_cert_chain(self.at.cert, self.at.key, password="")  # never asks for a passphrase
        except ssl.SSLError as error:
            if error.reason == "KEY_VALUES_MISMATCH":
                raise Invalid(
                    f"{self.at.key} is not the key of {self.at.cert}", expected="the private key that the certificate was made for", reason="tls"
                ) from error
            raise Invalid(f"{self.at.cert} or {self.at.key} cannot be used: {error.reason}", expected="PEM", reason="tls") from error
        except OSError as error:
            raise NotFound(f"{self.at.cert} or {self.at.key} cannot be read: {error.strerror}") from error

    def _stat(self) -> tuple[tuple[int, int, int], ...]:
        try:
            return tuple((s.st_ino, s.st_size, s.st_mtime_ns) for s in (self.at.cert.stat(), self.at.key.stat()))
        except OSError:
            return ()

    def reload(self) -> str:
        """Takes the files as they are now for new connections and returns the fingerprint; raises NotFound, Invalid and keeps the old pair."""
        self._seen = self._stat()
        self._current = self._load()
        return self.fingerprint

    def changed(self) -> bool:
        """Whether the files are others than when they were last read."""
        return self._stat() != self._seen

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the certificate in the file, hexadecimal with colons."""
        return fingerprint(_read(self.at.cert, "certificate"), self.at.cert)


def _context() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context


def fingerprint(pem: bytes, path: Path) -> str:
    """SHA-256 of the first certificate of a PEM file as `openssl x509 -fingerprint -sha256` writes it; raises Invalid."""
    digest = hashlib.sha256(_chain(pem, path)[0].public_bytes(serialization.Encoding.DER)).hexdigest().upper()
    return ":".join(digest[i : i + 2] for i in range(0, len(digest), 2))


def _chain(pem: bytes, path: Path) -> list[x509.Certificate]:
    try:
        return x509.load_pem_x509_certificates(pem)
    except ValueError as error:
        raise Invalid(f"{path} holds no certificate", expected="PEM, the server's certificate first", reason="tls") from error


def validity(path: Path) -> tuple[str, float, float]:
    """Fingerprint of a chain's first certificate, its beginning, and the first end of all; raises NotFound, Invalid."""
    pem = _read(path, "certificate")
    chain = _chain(pem, path)
    return fingerprint(pem, path), chain[0].not_valid_before_utc.timestamp(), min(c.not_valid_after_utc.timestamp() for c in chain)


def trust_commands(settings: Settings, port: int) -> list[str]:
    """How each client is made to trust a certificate that no public authority signed; `ca.crt` is a copy of cert.pem."""
    parts = urlsplit(settings.public_url)
    host = parts.hostname or names(settings)[0]
    place = parts.netloc or f"{f'[{host}]' if ':' in host else host}:{port}"
    return [
        f"copy        scp THIS-HOST:{files(settings).cert} ca.crt    and compare: openssl x509 -in ca.crt -noout -fingerprint -sha256",
        f"docker      install -D -m 644 ca.crt /etc/docker/certs.d/{place}/ca.crt",
        f"podman      install -D -m 644 ca.crt /etc/containers/certs.d/{place}/ca.crt    (skopeo and buildah too)",
        f"containerd  install -D -m 644 ca.crt /etc/containerd/certs.d/{place}/ca.crt, and hosts.toml beside it:",
        f'              server = "https://{place}"',
        f'              [host."https://{place}"]',
        f'                ca = "/etc/containerd/certs.d/{place}/ca.crt"',
        f"curl        curl --cacert ca.crt https://{place}/healthz",
        "hf, pip     export SSL_CERT_FILE=ca.crt REQUESTS_CA_BUNDLE=ca.crt PIP_CERT=ca.crt    (whole paths)",
        "airlock     export AIRLOCK_CA_FILE=ca.crt    (runtime, model, catalog), or ca_file: ca.crt in a mirror plan",
    ]
