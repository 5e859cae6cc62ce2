"""Why there was no answer: refused, unresolved, not trusted, too late or broken off, each told in its own words and with its own way out.

Here once, so that runtime, mirror and monitoring tell the same fault alike (docs/operations.md, The five faults). Pure: it looks at an error and asks
nobody. It must never quote a URL's query or a text of the library that might hold one.
"""

from __future__ import annotations

import os
import socket
import ssl
from collections.abc import Iterator

from urllib3 import exceptions as u3

from artifact.errors import Unavailable

FAULTS = ("connection_refused", "dns", "tls", "timeout")  # whatever else broke is `connection`
# X509_V_ERR_… of OpenSSL's x509_vfy.h
_EARLY, _EXPIRED = 9, 10
_STRANGER = (18, 19, 20, 21, 27)
_OTHER_NAME = (62, 63, 64)


def unreachable(error: Exception, doing: str, host: str, port: int, timeout_s: float) -> Unavailable:
    """The error that a failed connection, or one that broke off, stands for; `doing` is the request without its query."""
    at = f"{host}:{port}"
    causes = list(_causes(error))
    if any(isinstance(e, ssl.SSLError | u3.SSLError | ssl.CertificateError) for e in causes):
        return _tls(causes, doing, host, port)
    if any(isinstance(e, u3.NameResolutionError | socket.gaierror) for e in causes):
        return Unavailable(
            f"{doing}: the name {host} does not resolve",
            expected="a name that the resolver of this host knows",
            do="correct the host name in AIRLOCK_REGISTRY, or make it known here (the site's DNS, /etc/hosts)",
            reason="dns",
        )
    if any(isinstance(e, ConnectionRefusedError) for e in causes):
        return Unavailable(
            f"{doing}: {at} refuses the connection: nothing listens there",
            expected=f"a registry that listens on {at}",
            do="start the registry, or correct host and port in AIRLOCK_REGISTRY (a firewall that rejects looks the same)",
            reason="connection_refused",
        )
    if any(isinstance(e, u3.TimeoutError | TimeoutError) for e in causes):
        return Unavailable(
            f"{doing}: {at} did not answer within {timeout_s:g} s",
            expected="an answer in time (AIRLOCK_TIMEOUT_S)",
            do=f"see whether the registry is overloaded, and whether the network or a firewall swallows what goes to {at}",
            reason="timeout",
        )
    told = next((os.strerror(e.errno) for e in causes if isinstance(e, OSError) and e.errno), "")
    return Unavailable(
        f"{doing}: no answer ({told or type(error).__name__})",
        expected=f"a registry that answers on {at}",
        do="check AIRLOCK_REGISTRY (http or https, host, port) and the network, then try again",
        reason="connection",
    )


def _tls(causes: list[BaseException], doing: str, host: str, port: int) -> Unavailable:
    """The words of a handshake that failed: unknown authority, another name, out of its time, a CA file that is none, no TLS at all."""
    at = f"{host}:{port}"
    code = next((e.verify_code for e in causes if isinstance(e, ssl.SSLCertVerificationError) and hasattr(e, "verify_code")), 0)
    library, reason = next(((e.library or "", e.reason or "") for e in causes if isinstance(e, ssl.SSLError)), ("", ""))
    ours = next((e for e in causes if isinstance(e, OSError) and not isinstance(e, ssl.SSLError)), None)
    if code in _STRANGER:
        what = f"the certificate of {at} is signed by an authority that is not trusted here"
        expected = "a certificate of the authority whose PEM file AIRLOCK_CA_FILE names"
        do = f"set AIRLOCK_CA_FILE to the file of this site's authority; if it is that, find out what else answers on {at}"
    elif code in _OTHER_NAME:
        what = f"the certificate of {at} is for another name than {host}"
        expected = f"a certificate that holds {host}"
        do = f"write the name that the certificate holds into AIRLOCK_REGISTRY, or give the registry a certificate that holds {host}"
    elif code == _EXPIRED:
        what, expected = f"the certificate of {at} has expired", "a certificate that is valid now"
        do = "renew it at the registry (docs/operations.md, TLS); if it is fresh, correct this node's clock"
    elif code == _EARLY:
        what, expected = f"the certificate of {at} is not valid yet", "a certificate that is valid now"
        do = "correct this node's clock, or that of whoever signed the certificate"
    elif library == "X509" or isinstance(ours, FileNotFoundError | PermissionError | IsADirectoryError):
        why = os.strerror(ours.errno) if ours is not None and ours.errno else "it holds no PEM certificate"
        what, expected, do = f"the CA file cannot be used ({why})", "a PEM file that we may read", "correct AIRLOCK_CA_FILE"
    elif reason in ("WRONG_VERSION_NUMBER", "HTTP_REQUEST", "RECORD_LAYER_FAILURE"):
        what, expected = f"{at} does not speak TLS", "https where the registry has a certificate, else http"
        do = "write http:// into AIRLOCK_REGISTRY, or the port that speaks TLS"
    else:
        why = reason.replace("_", " ").lower() or "the connection ended in the handshake"
        what, expected, do = (
            f"TLS with {at} failed ({why})",
            "a TLS 1.2 or 1.3 server",
            "see the registry's log, and check AIRLOCK_REGISTRY and AIRLOCK_CA_FILE",
        )
    return Unavailable(f"{doing}: {what}", expected=expected, do=do, reason="tls")


def _causes(error: BaseException) -> Iterator[BaseException]:
    """An error and all that it came from, as urllib3 keeps them: as cause, as context or among the arguments."""
    todo: list[object] = [error]
    seen: set[int] = set()
    while todo and len(seen) < 50:
        found = todo.pop(0)
        if isinstance(found, BaseException) and id(found) not in seen:
            seen.add(id(found))
            yield found
            todo += [*found.args, found.__cause__, None if found.__suppress_context__ else found.__context__]
