"""One signed POST to the receiver of notices: bounded in time, no redirect followed, nothing of the answer read but its status.

Here because a receiver is somebody else's machine: it may be slow, away, or send us elsewhere. What went wrong is told without the URL's path, which
may hold a secret.
"""

from __future__ import annotations

import hashlib
import hmac
import http.client
import socket
import ssl
import threading
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

from artifact import faults
from artifact.errors import Invalid, Unavailable

TIMEOUT_S = 10.0  # for all of one try
SIGNATURE = "x-airlock-signature"
MAX_SECRET = 4096


def secret(path: str) -> bytes:
    """The secret of the signature, read anew so that it can be replaced; empty where no file is named; raises Invalid."""
    if not path:
        return b""
    try:
        with Path(path).open("rb") as source:
            found = source.read(MAX_SECRET + 1).strip()
    except OSError as error:
        raise Invalid(
            f"the webhook's secret file {path} cannot be read: {error.strerror}", do="let this user read it", reason="secret_file"
        ) from error
    if not 16 <= len(found) <= MAX_SECRET:
        raise Invalid(f"{path} holds no secret", expected=f"16 to {MAX_SECRET} bytes", do="openssl rand -hex 32", reason="secret_file")
    return found


def signature(key: bytes, body: bytes) -> str:
    """What the receiver compares with: HMAC-SHA256 over the body's bytes."""
    return "sha256=" + hmac.new(key, body, hashlib.sha256).hexdigest()


def deliver(url: str, body: bytes, key: bytes, timeout_s: float = TIMEOUT_S) -> None:
    """Hands a JSON body to the receiver; raises Unavailable with the reason where it does not answer 2xx in time."""
    parts = urlsplit(url)
    headers = {"content-type": "application/json", "user-agent": "airlock"} | ({SIGNATURE: signature(key, body)} if key else {})
    secure, host = parts.scheme == "https", parts.hostname or ""
    connection = (http.client.HTTPSConnection if secure else http.client.HTTPConnection)(host, parts.port, timeout=timeout_s)
    late = threading.Event()

    def end() -> None:
        late.set()
        with suppress(OSError, AttributeError):  # each byte may be in time, and all of them not
            connection.sock.shutdown(socket.SHUT_RDWR)

    timer = threading.Timer(timeout_s, end)
    timer.daemon = True
    timer.start()
    try:
        _connect(connection, secure, timeout_s)
        connection.request("POST", f"{parts.path or '/'}{f'?{parts.query}' if parts.query else ''}", body=body, headers=headers)
        status = connection.getresponse().status
        if late.is_set():  # the end that was made of it looks like one of the answer's head
            raise TimeoutError
    except (OSError, http.client.HTTPException) as error:
        reason = "timeout" if late.is_set() else faults.unreachable(error, "", host, connection.port, timeout_s).reason
        do = "check the receiver, and AIRLOCK_WEBHOOK; an authority of its own goes into SSL_CERT_FILE"
        raise Unavailable(f"the webhook at {host} was not reached: {reason}", do=do, reason=reason) from error
    finally:
        timer.cancel()
        connection.close()
    if not 200 <= status < 300:
        reason = "redirect" if 300 <= status < 400 else "status"
        raise Unavailable(f"the webhook at {host} answered {status}", expected="2xx; redirects are not followed", reason=reason)


def _connect(connection: http.client.HTTPConnection, secure: bool, timeout_s: float) -> None:
    """Connects so that the socket can be ended from outside at any moment, the handshake too."""
    connection.sock = socket.create_connection((connection.host, connection.port), timeout_s)
    if secure:
        context = ssl.create_default_context()
        connection.sock = context.wrap_socket(connection.sock, server_hostname=connection.host, do_handshake_on_connect=False)
        connection.sock.do_handshake()
