"""One server seen from a client's place, step by step: name, connection, handshake, clock; each with a deadline, none with a key of its own.

Here for `airlock doctor`; the words of a fault are artifact.faults'. Nothing that is read is kept, and no certificate that is not trusted is ever
spoken to beyond what it shows.
"""

from __future__ import annotations

import datetime
import ipaddress
import os
import socket
import ssl
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from contextlib import suppress
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import TypeVar

import urllib3
from cryptography import x509
from cryptography.hazmat.primitives import hashes

from artifact.errors import AirlockError, Unavailable
from artifact.faults import unreachable
from artifact.surroundings import FAIL, OK, WARN, Line
from artifact.transport import clean, origin

MAX_BODY = 64 * 1024
SKEW_WARN_S, SKEW_FAIL_S = 30, 300
ENDS_SOON_S = 14 * 86400
T = TypeVar("T")


def within(seconds: float, work: Callable[[], T]) -> T:
    """What `work` gives, or TimeoutError when that takes longer; what it raises is raised here.

    A resolver knows no deadline, so the work has a thread of its own: a daemon, which an executor's is not, or the program's end would wait for it.
    """
    given: Future[T] = Future()

    def run() -> None:
        try:
            given.set_result(work())
        except Exception as error:  # noqa: BLE001 - the top of a thread: raised again where it is waited for
            given.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    wait([given], seconds)
    if not given.done():
        raise TimeoutError(f"not within {seconds:g} s")
    return given.result()


@dataclass
class Reached:
    """How far a server let itself be reached, and what was found on the way."""

    lines: list[Line] = field(default_factory=list)
    up: bool = False

    def add(self, check: str, state: str, what: str, do: str = "", reason: str = "") -> None:
        """Notes one line."""
        self.lines.append(Line(check, state, what, do, reason))

    def broken(self, check: str, error: AirlockError) -> Reached:
        """Notes a fault in the words that everything of ours has for it."""
        self.add(check, FAIL, error.what, error.do, error.reason)
        return self


def reach(url: str, ca_file: str, timeout_s: float, prefix: str = "") -> Reached:
    """Resolves, connects and shakes hands with the server of a URL, with a line for each; raises Invalid for what is no URL."""
    scheme, host, port = origin(url)
    out = Reached()
    name = f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"
    try:
        infos = within(timeout_s, lambda: socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
    except (OSError, UnicodeError) as error:
        return out.broken(f"{prefix}dns", unreachable(error if isinstance(error, OSError) else socket.gaierror(), name, host, port, timeout_s))
    addresses = list(dict.fromkeys(str(info[4][0]) for info in infos))
    out.add(f"{prefix}dns", OK, f"{host} is {', '.join(addresses[:4])}")
    sock: socket.socket | None = None
    failed: dict[str, Exception] = {}
    for address in addresses[:4]:
        try:
            found = socket.create_connection((address, port), timeout_s)
        except OSError as error:
            failed[address] = error
        else:
            if sock is None:
                sock = found
            else:
                found.close()
    if sock is None:
        return out.broken(f"{prefix}tcp", unreachable(next(iter(failed.values())), name, host, port, timeout_s))
    if failed:
        do = "correct the name's addresses, or what blocks them: clients that try these first wait"
        out.add(f"{prefix}tcp", WARN, f"{', '.join(failed)} of {host} cannot be reached", do)
    else:
        out.add(f"{prefix}tcp", OK, f"connected to port {port}")
    with sock:
        out.up = _handshake(out, sock, name, ca_file, timeout_s, prefix) if scheme == "https" else _plain(out, host, prefix)
    return out


def _plain(out: Reached, host: str, prefix: str) -> bool:
    with suppress(ValueError):
        if ipaddress.ip_address(host).is_loopback:
            return True
    out.add(f"{prefix}tls", WARN, "plain http: keys and models can be read on the way", "give the registry a certificate (docs/operations.md, TLS)")
    return True


def _handshake(out: Reached, sock: socket.socket, name: str, ca_file: str, timeout_s: float, prefix: str) -> bool:
    _, host, port = origin(name)
    try:
        context = ssl.create_default_context(cafile=ca_file or None)
    except (OSError, ValueError) as error:
        why = "no PEM" if isinstance(error, ssl.SSLError | ValueError) or not error.errno else os.strerror(error.errno)
        do = "let --ca or AIRLOCK_CA_FILE name the PEM file of this site's authority"
        out.add(f"{prefix}tls", FAIL, f"the authority's file {ca_file} cannot be used ({why})", do, "environment")
        return False
    try:
        sock.settimeout(timeout_s)
        tls = within(timeout_s * 2, lambda: context.wrap_socket(sock, server_hostname=host))
    except (OSError, ValueError) as error:
        fault = unreachable(error, name, host, port, timeout_s)
        shown = _shown(host, port, timeout_s) if fault.reason == "tls" else None
        if shown:
            fault.what += f"; {_told(shown)}"
            _clock_of_validity(fault, shown, name, timeout_s)
        out.broken(f"{prefix}tls", fault)
        return False
    with tls:
        version, der = tls.version(), tls.getpeercert(binary_form=True)
    cert = x509.load_der_x509_certificate(der) if der else None
    left = (cert.not_valid_after_utc.timestamp() - time.time()) if cert else ENDS_SOON_S
    if left < ENDS_SOON_S:
        out.add(f"{prefix}tls", WARN, f"the certificate ends in {left / 86400:.1f} days", "renew it (docs/operations.md, TLS)")
    else:
        out.add(f"{prefix}tls", OK, f"{version}, {_told(cert)}" if cert else str(version))
    return True


def _shown(host: str, port: int, timeout_s: float) -> x509.Certificate | None:
    """The certificate of a server that is not trusted, to be told about and for nothing else."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE

    def look() -> bytes | None:
        with socket.create_connection((host, port), timeout_s) as plain, context.wrap_socket(plain, server_hostname=host) as tls:
            return tls.getpeercert(binary_form=True)

    with suppress(OSError, ValueError):
        der = within(timeout_s * 2, look)
        return x509.load_der_x509_certificate(der) if der else None
    return None


def trusts(url: str, ca_file: str, timeout_s: float) -> bool:
    """Whether the authorities of a file vouch for the server of a URL, under the name that the URL says."""
    _, host, port = origin(url)

    def shake() -> bool:
        context = ssl.create_default_context(cafile=ca_file)
        with socket.create_connection((host, port), timeout_s) as plain, context.wrap_socket(plain, server_hostname=host):
            return True

    try:
        return within(timeout_s * 2, shake)
    except (OSError, ValueError):
        return False


def _told(cert: x509.Certificate) -> str:
    names: list[str] = []
    with suppress(x509.ExtensionNotFound, ValueError):
        found = cert.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        names = [clean(n) for n in (*found.get_values_for_type(x509.DNSName), *found.get_values_for_type(x509.IPAddress))]
    until = f"{cert.not_valid_before_utc:%Y-%m-%d} to {cert.not_valid_after_utc:%Y-%m-%d}"
    return f"for {', '.join(names[:5]) or 'no name'}, valid {until}, SHA-256 {cert.fingerprint(hashes.SHA256()).hex()[:16]}…"


def _clock_of_validity(fault: Unavailable, cert: x509.Certificate, name: str, timeout_s: float) -> None:
    """Whether a certificate out of its time is so by the server's clock too; asked without trust, so it only chooses between two advices."""
    now = datetime.datetime.now(datetime.UTC)
    if cert.not_valid_before_utc <= now <= cert.not_valid_after_utc:
        return
    urllib3.disable_warnings(urllib3.exceptions.InsecureRequestWarning)  # that it is not verified is the point here
    pool = urllib3.PoolManager(cert_reqs="CERT_NONE", retries=False, timeout=timeout_s, assert_hostname=False)
    with suppress(urllib3.exceptions.HTTPError, OSError, ValueError, TypeError):
        answer = within(timeout_s * 2, lambda: pool.request("HEAD", name, redirect=False))
        theirs = parsedate_to_datetime(answer.headers.get("Date", ""))
        if abs((theirs - now).total_seconds()) > SKEW_FAIL_S and cert.not_valid_before_utc <= theirs <= cert.not_valid_after_utc:
            fault.reason, fault.do = "clock", f"correct this machine's clock: it says {now:%Y-%m-%d %H:%M}Z, the server {theirs:%Y-%m-%d %H:%M}Z"


def clock(date: str, prefix: str = "") -> Line:
    """This machine's clock against the Date of an answer (RFC 9110 section 6.6.1)."""
    try:
        theirs = parsedate_to_datetime(date).timestamp()
    except (ValueError, TypeError):
        return Line(f"{prefix}clock", WARN, "the server tells no time")
    skew = time.time() - theirs
    if abs(skew) < SKEW_WARN_S:
        return Line(f"{prefix}clock", OK, f"within {SKEW_WARN_S} s of the server's")
    state = FAIL if abs(skew) > SKEW_FAIL_S else WARN
    way = "ahead of" if skew > 0 else "behind"
    return Line(f"{prefix}clock", state, f"this machine's clock is {abs(skew):.0f} s {way} the server's", "set it right (NTP)", "clock")


@dataclass(frozen=True)
class Answer:
    """Status, headers in small letters and at most 64 KiB of an answer."""

    status: int
    headers: dict[str, str]
    body: bytes


def ask(method: str, url: str, ca_file: str, timeout_s: float, headers: dict[str, str] | None = None) -> Answer:
    """One request with these headers alone, and without following; raises Unavailable as artifact.faults says it."""
    scheme, host, port = origin(url)
    pool = urllib3.PoolManager(
        retries=False, timeout=urllib3.Timeout(connect=timeout_s, read=timeout_s), ca_certs=ca_file or None, cert_reqs="CERT_REQUIRED"
    )

    def work() -> Answer:
        response = pool.request(
            method, url, headers={"User-Agent": "airlock", "Accept-Encoding": "identity", **(headers or {})}, redirect=False, preload_content=False
        )
        body = response.read(MAX_BODY, decode_content=False)
        response.close()
        return Answer(response.status, {k.lower(): v for k, v in response.headers.items()}, body)

    try:
        return within(timeout_s * 2, work)
    except (urllib3.exceptions.HTTPError, OSError, ValueError) as error:
        raise unreachable(error, f"{method} {scheme}://{host}:{port}", host, port, timeout_s) from None
