"""HTTP to one origin with one key, for artifact.remote: authentication, redirects, bounded answers and the way from a status to an error.

The key goes to that origin and to nobody else: not behind a redirect, not to a token realm elsewhere, not into an error.
Must not: know what a path means, retry, or read an answer without a bound.
"""

from __future__ import annotations

import base64
import contextlib
import json
import re
import threading
import time
from collections.abc import Mapping, Sequence
from typing import IO
from urllib.parse import urlencode, urljoin, urlsplit

import urllib3
from urllib3.exceptions import HTTPError
from urllib3.response import BaseHTTPResponse

from artifact.errors import (
    AirlockError,
    Conflict,
    Denied,
    Invalid,
    Mismatch,
    NotFound,
    RangeInvalid,
    TooLarge,
    Unauthenticated,
    Unavailable,
    Unsupported,
)
from artifact.faults import unreachable
from artifact.manifest import parse_json

CHUNK = 512 * 1024
ERROR_BYTES = 64 * 1024
_MAX_REDIRECTS = 5
_TOKEN_HOSTS = {"nvcr.io": "authn.nvidia.com", "registry-1.docker.io": "auth.docker.io"}  # realms beside the registry's own origin
_STATUS: dict[int, type[AirlockError]] = {
    401: Unauthenticated,
    402: Denied,
    403: Denied,
    404: NotFound,
    409: Conflict,
    413: TooLarge,
    416: RangeInvalid,
}
_PARAM = re.compile(r'([a-zA-Z_]+)="((?:[^"\\]|\\.)*)"')
_RANGE = re.compile(r"bytes ([0-9]{1,19})-([0-9]{1,19})/([0-9]{1,19}|\*)\Z")
Origin = tuple[str, str, int]


def origin(url: str) -> Origin:
    """Scheme, host and port of a URL; raises Invalid."""
    try:
        parts = urlsplit(url)
        port = parts.port or {"http": 80, "https": 443}[parts.scheme]
    except (ValueError, KeyError) as error:
        raise Invalid("not an http or https URL", expected="http://HOST[:PORT] or https://HOST[:PORT]", reason="url") from error
    if not parts.hostname:
        raise Invalid("a URL without a host", expected="http://HOST[:PORT] or https://HOST[:PORT]", reason="url")
    return parts.scheme, parts.hostname, port


def joined(base: str, target: str) -> str:
    """A URL from another place as seen from `base`; raises Invalid."""
    try:
        return urljoin(base, target)
    except ValueError as error:
        raise Invalid("the server names a place that is no URL", expected="http://HOST[:PORT]/…", reason="url") from error


def clean(text: object) -> str:
    """Words of a server for our error text: one line, no control characters, bounded."""
    return "".join(c if c.isprintable() else " " for c in str(text))[:400].strip()


class Transport:
    """Requests to one origin; safe for several threads."""

    def __init__(self, base_url: str, key: str = "", *, username: str = "$oauthtoken", ca_file: str | None = None, timeout_s: float = 30) -> None:
        self.origin = origin(base_url)
        parts = urlsplit(base_url)
        if parts.username or parts.query or parts.fragment:
            raise Invalid("the registry's URL holds a user name or a query", expected="http[s]://HOST[:PORT]", reason="url")
        self.base_url = base_url.rstrip("/")
        if not key.isascii() or not key.isprintable() or " " in key:
            raise Unauthenticated(
                "the API key holds characters that no key has", expected="one printable word", do="set the key again", reason="key_invalid"
            )
        self._key, self._username = key, username
        self._basic = "Basic " + base64.b64encode(f"{username}:{key}".encode()).decode() if key else ""
        self._tokens: dict[str, tuple[str, float]] = {}
        self._lock = threading.Lock()
        self.timeout_s = timeout_s
        self._pool = urllib3.PoolManager(
            num_pools=8,
            maxsize=16,
            retries=False,
            timeout=urllib3.Timeout(connect=timeout_s, read=timeout_s),
            ca_certs=ca_file,
            cert_reqs="CERT_REQUIRED",
            blocksize=256 * 1024,
        )

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.base_url!r})"

    def close(self) -> None:
        """Closes idle connections."""
        self._pool.clear()

    def request(
        self,
        method: str,
        path: str,
        *,
        headers: Mapping[str, str] | None = None,
        body: bytes | IO[bytes] | None = None,
        scope: str = "",
        bearer: bool = False,
        follow: bool = True,
    ) -> BaseHTTPResponse:
        """One request with authentication; 2xx comes back unread for the caller to read and release, everything else raises (artifact.errors)."""
        url = urljoin(self.base_url + "/", path)
        if origin(url) != self.origin:
            raise Unsupported("the registry sends us to another host for a write", expected=self.base_url, reason="location")
        for attempt in (0, 1):
            ours = self._authorization(scope, bearer)
            response = self._send(method, url, {**(headers or {}), **ours}, body, follow)
            challenge = response.headers.get("WWW-Authenticate", "")
            had_token = ours.get("Authorization", "").startswith("Bearer ")
            if response.status == 401 and not attempt and not bearer and ours and (had_token or "error=" in challenge):
                challenge = self._first_challenge(challenge)
            if response.status != 401 or attempt or not challenge.lower().startswith("bearer ") or not self._fetch_token(response, challenge, scope):
                break
            if body is not None and not isinstance(body, bytes):
                body.seek(0)
        if 200 <= response.status < 300:
            return response
        raise self._error(method, url, response)

    def _send(self, method: str, url: str, headers: dict[str, str], body: bytes | IO[bytes] | None, follow: bool) -> BaseHTTPResponse:
        for _ in range(_MAX_REDIRECTS + 1):
            try:
                response = self._pool.request(
                    method,
                    url,
                    headers={"Accept-Encoding": "identity", "User-Agent": "airlock", **headers},
                    body=body,
                    redirect=False,
                    preload_content=False,
                )
            except (HTTPError, OSError) as error:
                doing = "{} {}://{}:{}{}".format(method, *origin(url), urlsplit(url).path)
                raise self.broken(doing, url, error) from None  # the cause may quote a signed URL
            target = response.headers.get("Location", "")
            if response.status not in (301, 302, 303, 307, 308) or not target or not follow or method not in ("GET", "HEAD"):
                return response
            self._drop(response)
            there = joined(url, target)
            here_origin, there_origin = origin(url), origin(there)
            if here_origin[0] == "https" and there_origin[0] == "http":
                raise Unsupported("a redirect from https to http", expected="https all the way", reason="redirect")
            if there_origin != here_origin:
                headers = {k: v for k, v in headers.items() if k.lower() != "authorization"}
            url = there
        raise Unsupported(f"more than {_MAX_REDIRECTS} redirects", expected="at most 5", reason="redirect")

    def broken(self, doing: str, url: str, error: Exception) -> Unavailable:
        """What a connection that failed or broke off stands for (artifact.faults)."""
        _, host, port = there = origin(url)
        found = unreachable(error, doing, host, port, self.timeout_s)
        if there != self.origin:
            found.do = (
                f"the registry sends us on to {host}:{port}: make that reachable and trusted from here, or set AIRLOCK_STREAM_TO at the registry"
            )
        return found

    def _authorization(self, scope: str, bearer: bool) -> dict[str, str]:
        with self._lock:
            token, until = self._tokens.get(scope, ("", 0.0))
        if token and time.monotonic() < until:
            return {"Authorization": f"Bearer {token}"}
        if not self._key:
            return {}
        return {"Authorization": f"Bearer {self._key}" if bearer else self._basic}

    def _first_challenge(self, challenge: str) -> str:
        """What the registry asks of those who have no token: nvcr.io sends the holder of one that ended to a realm that is of no use to it."""
        response = self._send("GET", self.base_url + "/v2/", {}, None, follow=False)
        self._drop(response)
        return response.headers.get("WWW-Authenticate", "") or challenge

    def _fetch_token(self, refused: BaseHTTPResponse, challenge: str, scope: str) -> bool:
        """Distribution's token authentication (RFC 6750 challenge, GET with Basic); False leaves the 401 as it is."""
        params = {k.lower(): v for k, v in _PARAM.findall(challenge)}
        realm = params.get("realm", "")
        if "://" not in realm:
            return False  # a label, not a token endpoint: the 401 stands
        self._check_realm(realm)
        self._drop(refused)
        query = [("service", params["service"])] if params.get("service") else []
        query += [("scope", scope or params["scope"])] if scope or params.get("scope") else []
        query += [("account", self._username)] if self._key else []
        url = realm + ("&" if "?" in realm else "?") + urlencode(query)
        headers = {"Authorization": self._basic} if self._basic else {}
        response = self._send("GET", url, headers, None, follow=False)
        if response.status != 200:
            raise self._error("GET", realm, response)
        doc = parse_json(self.take(response, 1024 * 1024), "the token answer")
        token, life = doc.get("token") or doc.get("access_token"), doc.get("expires_in", 60)
        if not isinstance(token, str) or not token.isascii() or not token.isprintable():
            raise Unauthenticated("the token endpoint gave no token", expected="a field token", reason="token")
        seconds = life if type(life) is int and 0 < life < 86_400 else 60
        with self._lock:
            self._tokens[scope] = (token, time.monotonic() + max(seconds * 0.8, 5))
        return True

    def _drop(self, response: BaseHTTPResponse) -> None:
        """Reads a body that nobody needs, within bounds, so that the connection can be used again."""
        with contextlib.suppress(AirlockError):
            self.take(response, ERROR_BYTES)

    def _check_realm(self, realm: str) -> None:
        theirs = origin(realm)
        if theirs != self.origin and not (theirs == ("https", _TOKEN_HOSTS.get(self.origin[1], ""), 443) and self.origin[0] == "https"):
            what = f"the registry {self.origin[1]} sends its key holders to {theirs[1]} for a token"
            raise Unsupported(what, expected="a token realm on the registry's own scheme, host and port", reason="realm")

    def take(self, response: BaseHTTPResponse, limit: int) -> bytes:
        """The body of an answer, at most `limit` bytes; raises TooLarge, Unavailable."""
        parts, have = [], 0
        try:
            for part in response.stream(CHUNK, decode_content=False):
                have += len(part)
                if have > limit:
                    response.close()
                    raise TooLarge(f"an answer of more than {limit} bytes", expected=f"at most {limit}")
                parts.append(part)
        except (HTTPError, OSError) as error:
            response.close()
            raise self.broken("the answer broke off", self.base_url, error) from None
        response.release_conn()
        return b"".join(parts)

    def _error(self, method: str, url: str, response: BaseHTTPResponse) -> AirlockError:
        """The error class of a status, with the server's own words and reason where it gives them."""
        try:
            raw = self.take(response, ERROR_BYTES) if method != "HEAD" else b""
        except AirlockError:
            raw = b""
        finally:
            response.release_conn()
        status = response.status
        kind = _STATUS.get(status, Unavailable if status >= 500 or status in (408, 429) else Invalid)
        where = f"{method} {urlsplit(url).netloc}{urlsplit(url).path} answered {status}"
        code, reason, words, expected, do = _told(raw)
        if code == "DIGEST_INVALID":
            kind = Mismatch
        elif code == "UNSUPPORTED" or status in (405, 501):
            kind = Unsupported
        key = self._key
        what = f"{words} ({where})" if words else where
        if do and do in words:
            do = ""  # the door has put it into the one text that its protocol has
        if key and len(key) > 7:
            what, expected, do = (t.replace(key, "[key]") for t in (what, expected, do))
        return kind(what, expected=expected, do=do, reason=reason or code.lower(), status=status)


def check_range(status: int, headers: Mapping[str, str], lo: int, hi: int) -> None:
    """Demands exactly bytes [lo, hi) of an answer; raises Unsupported with reason range_ignored for a 200, Unavailable for a wrong range."""
    if headers.get("Content-Encoding", "identity").lower() != "identity":
        raise Unsupported("the answer is encoded", expected="the bytes as they are", reason="encoding")
    if status == 200 and lo == 0 and headers.get("Content-Length") == str(hi):
        return  # the whole object was meant
    if status == 200:
        raise Unsupported("the server ignores Range", expected="206 and a Content-Range", do="fetch it as one stream", reason="range_ignored")
    match = _RANGE.match(headers.get("Content-Range", ""))
    if status != 206 or not match or (int(match[1]), int(match[2])) != (lo, hi - 1) or (match[3] != "*" and int(match[3]) < hi):
        raise Unavailable(
            f"status {status} with range {clean(headers.get('Content-Range', 'none'))}", expected=f"206 with bytes {lo}-{hi - 1}", reason="range"
        )


def _told(raw: bytes) -> tuple[str, str, str, str, str]:
    """Code, reason, words, expectation and advice of an error body: the OCI form, ours, the Hub's, or nothing."""
    nothing = ("", "", "", "", "")
    try:
        doc = json.loads(raw)
    except (ValueError, RecursionError):
        return nothing
    if not isinstance(doc, dict):
        return nothing
    code, errors = "", doc.get("errors")
    if isinstance(errors, Sequence) and errors and isinstance(errors[0], dict):
        code, detail = clean(errors[0].get("code") or ""), errors[0].get("detail")
        doc = {"what": errors[0].get("message"), **(detail if isinstance(detail, dict) else {})}
    envelope = doc.get("requestStatus")  # of the NGC door
    words = (
        doc.get("what") or doc.get("details") or doc.get("error") or (envelope.get("statusDescription") if isinstance(envelope, dict) else "") or ""
    )
    return code, clean(doc.get("reason") or ""), clean(words), clean(doc.get("expected") or ""), clean(doc.get("do") or "")
