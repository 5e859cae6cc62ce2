"""Throw-away authorities, certificates and a TLS server that answers `{}` to everything; imports no project code."""

from __future__ import annotations

import datetime
import ipaddress
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

PEM = serialization.Encoding.PEM


@dataclass(frozen=True)
class Authority:
    """A certificate authority and the file that clients trust."""

    cert: x509.Certificate
    key: ec.EllipticCurvePrivateKey
    file: Path


def _sign(
    subject: x509.Name,
    issuer: x509.Name,
    public: ec.EllipticCurvePublicKey,
    key: ec.EllipticCurvePrivateKey,
    ca: bool,
    days: tuple[datetime.datetime, ...],
) -> x509.CertificateBuilder:
    builder = x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).public_key(public).serial_number(x509.random_serial_number())
    return builder.not_valid_before(days[0]).not_valid_after(days[1]).add_extension(x509.BasicConstraints(ca, None), True)


def authority(base: Path) -> Authority:
    """A new authority of ten days, its certificate at `base`.pem."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, base.name)])
    now = datetime.datetime.now(datetime.UTC)
    ten = datetime.timedelta(days=10)
    cert = _sign(name, name, key.public_key(), key, True, (now - ten, now + ten)).sign(key, hashes.SHA256())
    file = base.with_suffix(".pem")
    file.write_bytes(cert.public_bytes(PEM))
    return Authority(cert, key, file)


def leaf(
    ca: Authority, base: Path, holds: ipaddress.IPv4Address | ipaddress.IPv6Address, begin: datetime.datetime, end: datetime.datetime
) -> tuple[Path, Path]:
    """A certificate for one address and its key, as files."""
    key = ec.generate_private_key(ec.SECP256R1())
    builder = _sign(x509.Name([]), ca.cert.subject, key.public_key(), ca.key, False, (begin, end))
    cert = builder.add_extension(x509.SubjectAlternativeName([x509.IPAddress(holds)]), True).sign(ca.key, hashes.SHA256())
    pair = base.with_suffix(".crt"), base.with_suffix(".key")
    pair[0].write_bytes(cert.public_bytes(PEM))
    pair[1].write_bytes(key.private_bytes(PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()))
    return pair


@contextmanager
def serving_tls(pair: tuple[Path, Path]) -> Iterator[int]:
    """An https server on a free port of the loopback with this certificate."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"{}")

        def log_message(self, *_: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_: object) -> None:
            pass

    server = Server(("127.0.0.1", 0), Handler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*pair)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()
