"""TLS of the registry's own listener: first start, trust, a request for the site's authority, replacement while transfers run, wrong files."""

from __future__ import annotations

import datetime
import hashlib
import http.client
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from artifact.errors import Unavailable
from artifact.remote import RemoteRegistry
from tests.conftest import airlock
from tests.contracts.doors import new_site, sha
from tests.flows.test_clients import HF, layout, run, skopeo
from tests.flows.test_operating import MIB, noise
from tests.operated import LONG_S, Operated, operated, wait_for

pytestmark = pytest.mark.server
PEM = serialization.Encoding.PEM
Site = tuple[Path, dict[str, str]]


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return tmp_path / "data", new_site(tmp_path / "data")


@pytest.fixture
def server(site: Site) -> Iterator[Operated]:
    with operated(*site, AIRLOCK_TLS="self-signed") as found:
        yield found


def pem_key(key: ec.EllipticCurvePrivateKey, passphrase: bytes = b"") -> bytes:
    locked = serialization.BestAvailableEncryption(passphrase) if passphrase else serialization.NoEncryption()
    return key.private_bytes(PEM, serialization.PrivateFormat.PKCS8, locked)


def authority() -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "site authority")])
    return signed(name, name, key.public_key(), key, ca=True), key


def signed(
    subject: x509.Name,
    issuer: x509.Name,
    public: object,
    key: ec.EllipticCurvePrivateKey,
    *more: x509.Extension[x509.SubjectAlternativeName],
    ca: bool,
) -> x509.Certificate:
    now = datetime.datetime.now(datetime.UTC)
    builder = x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).public_key(public).serial_number(x509.random_serial_number())  # type: ignore[arg-type]
    builder = builder.not_valid_before(now - datetime.timedelta(hours=1)).not_valid_after(now + datetime.timedelta(days=30))
    builder = builder.add_extension(x509.BasicConstraints(ca, None), True)
    for extension in more:
        builder = builder.add_extension(extension.value, extension.critical)
    return builder.sign(key, hashes.SHA256())


def pair(folder: Path, name: str = "127.0.0.1") -> tuple[Path, Path]:
    """A throw-away certificate for an address and its key, replaced in place if they are there."""
    import ipaddress

    ca, ca_key = authority()
    key = ec.generate_private_key(ec.SECP256R1())
    san = x509.Extension(x509.SubjectAlternativeName.oid, False, x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(name))]))
    leaf = signed(x509.Name([]), ca.subject, key.public_key(), ca_key, san, ca=False)
    for path, raw in ((folder / "ca.pem", ca.public_bytes(PEM)), (folder / "cert.pem", leaf.public_bytes(PEM)), (folder / "key.pem", pem_key(key))):
        path.with_suffix(".new").write_bytes(raw)
        path.with_suffix(".new").replace(path)
    return folder / "cert.pem", folder / "key.pem"


def seen(port: int) -> str:
    """The fingerprint that a new handshake shows."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with socket.create_connection(("127.0.0.1", port), 30) as plain, context.wrap_socket(plain) as secure:
        der = secure.getpeercert(True)
        assert der
        return hashlib.sha256(der).hexdigest()


def of(cert: Path) -> str:
    return x509.load_pem_x509_certificate(cert.read_bytes()).fingerprint(hashes.SHA256()).hex()


def get(connection: http.client.HTTPConnection, path: str, key: str, **headers: str) -> http.client.HTTPResponse:
    connection.request("GET", path, headers={"Authorization": f"Bearer {key}", **headers})
    return connection.getresponse()


def test_the_first_start_makes_a_certificate_and_tells_how_to_trust_it(site: Site) -> None:
    argv = [str(Path(sys.executable).parent / "airlock"), "registry", "serve", "--data", str(site[0]), "--port", "0"]
    env = {**os.environ, "AIRLOCK_TLS": "self-signed", "AIRLOCK_PUBLIC_URL": "https://registry.site.example:8443"}
    told = []
    for _ in range(2):
        process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=env)
        assert process.stdout
        first = process.stdout.readline()
        assert first.startswith("listening on https://127.0.0.1:")
        process.send_signal(signal.SIGTERM)
        told.append(first + process.stdout.read())
        assert process.wait(LONG_S) == 0
    folder = site[0] / "tls"
    cert, mode = x509.load_pem_x509_certificate((folder / "cert.pem").read_bytes()), (folder / "key.pem").stat().st_mode & 0o777
    assert mode == 0o600 and folder.stat().st_mode & 0o777 == 0o700
    assert isinstance(cert.public_key(), ec.EllipticCurvePublicKey)
    assert (cert.not_valid_after_utc - cert.not_valid_before_utc).days == 397
    names = cert.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["registry.site.example", "localhost"]
    assert [str(a) for a in names.get_values_for_type(x509.IPAddress)] == ["127.0.0.1"]
    shown = ":".join(re.findall("..", of(folder / "cert.pem").upper()))
    assert f"certificate SHA-256 {shown}" in told[0]
    place = "registry.site.example:8443"
    for words in (
        f"/etc/docker/certs.d/{place}/ca.crt",
        f"/etc/containers/certs.d/{place}",
        f'[host."https://{place}"]',
        "SSL_CERT_FILE",
        "AIRLOCK_CA_FILE",
    ):
        assert words in told[0], words
        assert words not in told[1], "the second start found its certificate"


def test_the_same_bytes_over_tls(server: Operated, tmp_path: Path) -> None:
    """Whole pulls, ranges and keep-alive on the path without sendfile."""
    body, key = noise(9 * MIB + 17, "tls"), server.keys["acme"]
    connection = server.secured(server.data / "tls" / "cert.pem")
    connection.request("POST", f"/v2/acme/m/blobs/uploads/?digest={sha(body)}", body, {"Authorization": f"Bearer {key}"})
    assert connection.getresponse().read() == b""
    for _ in range(2):
        assert get(connection, f"/v2/acme/m/blobs/{sha(body)}", key).read() == body
    part = get(connection, f"/v2/acme/m/blobs/{sha(body)}", key, Range="bytes=1000000-9000000")
    assert (part.status, part.read()) == (206, body[1000000:9000001])
    connection.close()
    with pytest.raises(ssl.SSLCertVerificationError):
        http.client.HTTPSConnection("127.0.0.1", server.port, timeout=30).request("GET", "/healthz")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tls_1_1_and_plain_http_get_nothing(server: Operated) -> None:
    old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    old.check_hostname, old.verify_mode = False, ssl.CERT_NONE
    old.set_ciphers("ALL:@SECLEVEL=0")
    old.minimum_version, old.maximum_version = ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1
    with socket.create_connection(("127.0.0.1", server.port), 30) as plain, pytest.raises(OSError, match=r"."):
        old.wrap_socket(plain)
    with socket.create_connection(("127.0.0.1", server.port), 30) as plain:
        plain.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
        assert b"200" not in plain.recv(100)


def test_skopeo_with_its_certificate_directory(server: Operated, tmp_path: Path) -> None:
    digest, raw = layout(tmp_path / "from")
    trust = tmp_path / "certs.d"
    trust.mkdir()
    (trust / "ca.crt").write_bytes((server.data / "tls" / "cert.pem").read_bytes())
    user, there = f"$oauthtoken:{server.keys['acme']}", f"docker://127.0.0.1:{server.port}/acme/image:1"
    pushed = skopeo("copy", "--preserve-digests", f"--dest-cert-dir={trust}", f"--dest-creds={user}", f"oci:{tmp_path}/from:1", there)
    assert pushed.returncode == 0, pushed.stderr
    pulled = skopeo("copy", "--preserve-digests", f"--src-cert-dir={trust}", f"--src-creds={user}", there, f"oci:{tmp_path}/to:1")
    assert pulled.returncode == 0, pulled.stderr
    assert (tmp_path / "to" / "blobs" / "sha256" / digest[7:]).read_bytes() == raw
    distrusted = skopeo("copy", f"--src-creds={user}", there, f"oci:{tmp_path}/not:1")
    assert distrusted.returncode != 0 and "certificate" in distrusted.stderr


def test_our_clients_with_the_ca_file(server: Operated, tmp_path: Path) -> None:
    ca = str(server.data / "tls" / "cert.pem")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "weights.bin").write_bytes(noise(3 * MIB, "weights"))
    env = {"AIRLOCK_KEY": server.keys["acme"]}
    airlock("model", "push", str(folder), "acme/model:1", "--registry", server.url, "--ca-file", ca, **env)
    assert "acme/model" in airlock("catalog", "list", "--registry", server.url, AIRLOCK_CA_FILE=ca, **env).stdout
    remote = RemoteRegistry(server.url, server.keys["acme"], ca_file=ca)
    assert remote.read_manifest("acme/model", "1")[0].size > 0
    data = (folder / "weights.bin").read_bytes()
    assert b"".join(remote.stream("acme/model", sha(data), 0, len(data))) == data
    hub = {"HF_ENDPOINT": server.url, "HF_TOKEN": server.keys["acme"], "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    there = ["download", "acme/model", "--revision", "1", "--local-dir", str(tmp_path / "got")]
    done = run(str(HF), *there, **hub, SSL_CERT_FILE=ca)
    assert done.returncode == 0 and (tmp_path / "got" / "weights.bin").read_bytes() == data, done.stderr
    with pytest.raises(Unavailable, match="certificate"):
        RemoteRegistry(server.url, server.keys["acme"]).read_manifest("acme/model", "1")
    refused = airlock("model", "push", str(folder), "acme/model:2", "--registry", server.url, check=False, **env)
    assert refused.returncode == 9 and "certificate" in refused.stderr and "Traceback" not in refused.stderr


def test_a_request_signed_by_the_sites_authority(site: Site, tmp_path: Path) -> None:
    done = airlock("registry", "csr", "--data", str(site[0]))
    csr = x509.load_pem_x509_csr(done.stdout.encode())
    assert csr.is_signature_valid and "PRIVATE" not in done.stdout + done.stderr
    again = x509.load_pem_x509_csr(airlock("registry", "csr", "--data", str(site[0])).stdout.encode())
    assert again.public_key() == csr.public_key(), "the key is made once"
    ca, ca_key = authority()
    san = csr.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    leaf = signed(csr.subject, ca.subject, csr.public_key(), ca_key, san, ca=False)
    (tmp_path / "chain.pem").write_bytes(leaf.public_bytes(PEM) + ca.public_bytes(PEM))
    (tmp_path / "ca.pem").write_bytes(ca.public_bytes(PEM))
    env = {"AIRLOCK_TLS_CERT": str(tmp_path / "chain.pem"), "AIRLOCK_TLS_KEY": str(site[0] / "tls" / "key.pem")}
    with operated(*site, **env) as server:
        assert get(server.secured(tmp_path / "ca.pem"), "/v2/", site[1]["acme"]).status == 200
        assert server.told and server.told["certificate_sha256"].replace(":", "").lower() == of(tmp_path / "chain.pem")


def test_a_new_certificate_is_shown_without_a_restart_and_a_transfer_goes_on(site: Site, tmp_path: Path) -> None:
    cert, key = pair(tmp_path)
    body = noise(48 * MIB, "reload")
    with operated(*site, AIRLOCK_TLS_CERT=str(cert), AIRLOCK_TLS_KEY=str(key)) as server:
        old = of(cert)
        assert seen(server.port) == old
        first = server.secured(tmp_path / "ca.pem")
        first.request("POST", f"/v2/acme/m/blobs/uploads/?digest={sha(body)}", body, {"Authorization": f"Bearer {site[1]['acme']}"})
        assert first.getresponse().read() == b""
        pull = get(first, f"/v2/acme/m/blobs/{sha(body)}", site[1]["acme"])
        start = pull.read(MIB)
        pair(tmp_path)
        new = of(cert)
        wait_for(lambda: seen(server.port) == new, "the changed files are noticed")
        assert start + pull.read() == body, "the pull that began under the old certificate is whole"
        assert get(first, "/v2/", site[1]["acme"]).status == 200, "its connection lives on"
        pair(tmp_path)
        server.process.send_signal(signal.SIGHUP)
        wait_for(lambda: seen(server.port) == of(cert), "the signal")
        last = seen(server.port)
        key.write_bytes(pem_key(ec.generate_private_key(ec.SECP256R1())))
        server.process.send_signal(signal.SIGHUP)
        wait_for(lambda: "is not the key of" in server.log.read_text(), "words in the log")
        assert seen(server.port) == last and server.operator("/readyz")[0] == 200, "a wrong pair changes nothing"
        assert "PRIVATE" not in server.log.read_text()


@pytest.mark.parametrize(
    ("which", "raw", "words"),
    [
        ("key", pem_key(ec.generate_private_key(ec.SECP256R1())), "is not the key of"),
        ("key", pem_key(ec.generate_private_key(ec.SECP256R1()), b"passphrase"), "is encrypted"),
        ("key", b"no key", "is no private key"),
        ("key", None, "cannot be read"),
        ("cert", b"no certificate", "holds no certificate"),
        ("cert", b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n", "holds no certificate"),
        ("cert", b"", "holds no certificate"),
        ("cert", None, "cannot be read"),
    ],
)
def test_wrong_files_are_refused_with_words(site: Site, tmp_path: Path, which: str, raw: bytes | None, words: str) -> None:
    cert, key = pair(tmp_path)
    path = cert if which == "cert" else key
    path.unlink()
    if raw is not None:
        path.write_bytes(raw)
    done = airlock("registry", "serve", "--data", str(site[0]), "--port", "0", check=False, AIRLOCK_TLS_CERT=str(cert), AIRLOCK_TLS_KEY=str(key))
    assert done.returncode in (3, 6) and words in done.stderr and str(path) in done.stderr, done.stderr
    assert "Traceback" not in done.stderr and done.stdout == ""
