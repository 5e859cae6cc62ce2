"""Bytes of an upstream over HTTP with the rules for a peer that may be hostile: where a redirect may lead, who sees the key, how much and how long.

The key goes to the endpoint's own origin only. A redirect elsewhere must not weaken https, and reaches a private address only if the endpoint is
private itself; the address that was checked is the one connected to. It never stores anything.
"""

from __future__ import annotations

import ipaddress
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from urllib.parse import urljoin, urlsplit

import urllib3
from urllib3.exceptions import HTTPError

from artifact.errors import AirlockError, Denied, Invalid, Mismatch, NotFound, TooLarge, Unauthenticated, Unavailable, Unsupported

MAX_HOPS = 5
MAX_WAITS = 4
LONGEST_WAIT_S = 300  # the Hub's window for its rate limits
CHUNK = 1024 * 1024
SLOWEST = 1024  # bytes a second, on average, after the first minute
METADATA_SECONDS = 120.0

_RANGE = re.compile(r"bytes (\d{1,19})-(\d{1,19})/(\d{1,19})\Z")
_NOTHING = re.compile(r"bytes \*/(\d{1,19})\Z")


def origin(url: str) -> tuple[str, str, int]:
    """Scheme, host and port of an http or https URL; raises Invalid."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port = None, None
    if not host or parts.scheme not in ("http", "https") or "\\" in url or "@" in parts.netloc or any(c <= " " or c == "\x7f" for c in url):
        raise Invalid(
            "the upstream sends us to something that is no plain http or https address", expected="http(s)://host[:port]/path", reason="redirect"
        )
    return parts.scheme, host.lower(), port or (443 if parts.scheme == "https" else 80)


def joined(base: str, target: str) -> str:
    """Where a redirect leads; raises Invalid."""
    try:
        return urljoin(base, target)
    except ValueError as error:
        raise Invalid("the upstream redirects to something that is no URL", expected="http(s)://host[:port]/path", reason="redirect") from error


def addresses(host: str, port: int) -> list[str]:
    """All addresses of a host; raises Unavailable."""
    try:
        return sorted({str(entry[4][0]) for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)})
    except (OSError, UnicodeError) as error:
        raise Unavailable(f"the host {host[:100]!r} has no address", do="check the name and this machine's DNS") from error


def _mark(response: urllib3.BaseHTTPResponse) -> str:
    """What tells one state of a file from another: a strong ETag, else the time of the last change."""
    tag = response.headers.get("ETag", "")
    return tag if tag.startswith('"') else response.headers.get("Last-Modified", "")


def _kind(address: str) -> str:
    ip = ipaddress.ip_address(address.split("%", 1)[0])
    ip = getattr(ip, "ipv4_mapped", None) or ip
    if ip.is_loopback:
        return "private"
    if ip.is_link_local or ip.is_multicast or ip.is_unspecified or (ip.is_reserved and not ip.is_global):
        return "never"
    return "public" if ip.is_global else "private"


class Fetcher:
    """GETs below one endpoint, with its key or with `headers` that are asked for at each request; safe for several threads."""

    def __init__(
        self,
        endpoint: str,
        key: str = "",
        ca_file: str = "",
        timeout_s: float = 30.0,
        slow_after_s: float = 60.0,
        headers: Callable[[], Mapping[str, str]] | None = None,
    ) -> None:
        self.endpoint = endpoint
        self._own_headers = headers or (lambda: {"Authorization": f"Bearer {key}"} if key else {})
        self._origin = origin(endpoint)
        self._ca_file = ca_file or None
        self._timeout = urllib3.Timeout(connect=timeout_s, read=timeout_s)
        self._slow_after_s = slow_after_s
        self._pools: dict[tuple[str, str, int], urllib3.HTTPConnectionPool] = {}
        self._lock = threading.Lock()
        self.received = 0

    def stream(self, path: str, lo: int, hi: int, url: str = "", total: int = -1, mark: str = "") -> Iterator[bytes]:
        """Bytes [lo, hi) of a path below the endpoint, exactly; raises Unavailable, NotFound, Denied, Unauthenticated, Mismatch, Invalid.

        With `url`, a signed URL for that path: it gets no key, wherever it leads, and appears in no error. `total` and `mark` are what `look` said.
        """
        response = self._follow(url or self.endpoint + path, {"Range": f"bytes={lo}-{hi - 1}"}, bool(url))
        try:
            all_of_it = response.status == 200 and lo == 0 and response.headers.get("Content-Length") == str(hi)
            if response.status == 200 and not all_of_it:
                raise Unsupported(f"the upstream ignores Range for {path[:200]}", expected="206 and a Content-Range", reason="range_ignored")
            self._check(response, 200 if all_of_it else 206, path)
            found = _RANGE.match(response.headers.get("Content-Range", ""))
            if not all_of_it and (not found or (int(found[1]), int(found[2]) + 1) != (lo, hi)):
                raise Mismatch(f"asked for bytes {lo}-{hi - 1} of {path[:200]}, got another range", expected="exactly the range asked for")
            if found and total >= 0 and int(found[3]) != total:
                raise Mismatch(
                    f"{path[:200]} has {found[3]} bytes", expected=f"{total} bytes", do="the listing or the file is wrong; nothing was kept"
                )
            if mark and _mark(response) != mark:
                raise Mismatch(f"{path[:200]} is another file than when it was begun", expected="one that does not change", do="run again")
            yield from self._body(response, hi - lo, path)
        finally:
            response.close()

    def whole(self, path: str, size: int, url: str = "") -> bytes:
        """A small file of a known size; raises as stream does."""
        response = self._follow(url or self.endpoint + path, {}, bool(url))
        try:
            self._check(response, 200, path)
            return b"".join(self._body(response, size, path))
        finally:
            response.close()

    def look(self, path: str, url: str = "") -> tuple[int, str]:
        """A file's bytes and its host's mark of their state (RFC 9110 8.8, empty without one), by asking for the first; raises as stream does."""
        response = self._follow(url or self.endpoint + path, {"Range": "bytes=0-0"}, bool(url))
        try:
            stated = response.headers.get("Content-Range", "")
            if response.status == 416 and (nothing := _NOTHING.match(stated)):
                return int(nothing[1]), _mark(response)
            length = response.headers.get("Content-Length", "")
            if response.status == 200 and re.fullmatch(r"[0-9]{1,19}", length):
                return int(length), _mark(response)
            self._check(response, 206, path)
            found = _RANGE.match(stated)
            if not found or found[1] != "0" or found[2] != "0":
                raise Invalid(f"the upstream tells no size of {path[:200]}", expected="206 and a Content-Range", reason="upstream")
            return int(found[3]), _mark(response)
        finally:
            response.close()

    def document(self, path: str, limit: int, url: str = "", form: str = "") -> bytes:
        """A small answer of unknown size, from the endpoint itself unless `url` is signed; `form` is posted; raises TooLarge and as stream."""
        response = self._follow(url or self.endpoint + path, {}, bool(url), not url, form)
        started, body = time.monotonic(), bytearray()
        try:
            self._check(response, 200, path)
            while block := response.read1(CHUNK, decode_content=False):
                body += block
                if len(body) > limit:
                    raise TooLarge(f"the upstream's answer about {path[:200]} is longer than {limit} bytes", expected=f"at most {limit}")
                if time.monotonic() - started > METADATA_SECONDS:
                    raise Unavailable(f"the upstream's answer about {path[:200]} took more than {METADATA_SECONDS:.0f} s", do="run again later")
        except (HTTPError, OSError) as error:
            raise Unavailable(f"the upstream's answer about {path[:200]} broke off", do="run again") from error
        finally:
            response.close()
        length = response.headers.get("Content-Length", "")
        if length.isascii() and length.isdigit() and int(length[:19]) != len(body):
            raise Unavailable(f"the upstream sent {len(body)} of {length[:19]} bytes about {path[:200]}", do="run again")
        return bytes(body)

    def _body(self, response: urllib3.BaseHTTPResponse, size: int, path: str) -> Iterator[bytes]:
        started, got = time.monotonic(), 0
        try:
            while got <= size:
                # One byte more than expected is asked for, so that an endless body shows at once; read1 keeps a trickle from blocking the clock.
                block = response.read1(min(CHUNK, size - got + 1), decode_content=False)
                if not block:
                    break
                got += len(block)
                with self._lock:
                    self.received += len(block)
                if got > size:
                    raise Mismatch(f"{path[:200]} is longer than announced", expected=f"{size} bytes")
                if time.monotonic() - started > self._slow_after_s + got / SLOWEST:
                    raise Unavailable(f"{path[:200]} comes too slowly", expected=f"at least {SLOWEST} bytes a second", do="run again: it resumes")
                yield block
        except (HTTPError, OSError) as error:
            raise Unavailable(f"the upstream broke off after {got} of {size} bytes of {path[:200]}", do="run again: it resumes") from error
        if got < size:
            raise Unavailable(f"the upstream sent {got} of {size} bytes of {path[:200]}", do="run again: it resumes")

    def _check(self, response: urllib3.BaseHTTPResponse, wanted: int, path: str) -> None:
        if response.status != wanted:
            raise self.refused(response, path)
        if response.headers.get("Content-Encoding", "identity").lower() not in ("", "identity"):
            raise Mismatch(f"{path[:200]} came compressed, though identity was asked for", expected="the file's bytes as they are", reason="encoding")

    def refused(self, response: urllib3.BaseHTTPResponse, what: str) -> AirlockError:
        """The error for an answer that is none of those that were asked for."""
        return refusal(response.status, response.headers.get("X-Error-Code", ""), what)

    def _follow(self, url: str, headers: dict[str, str], signed: bool = False, home: bool = False, form: str = "") -> urllib3.BaseHTTPResponse:
        for _ in range(MAX_WAITS):
            response = self._hops(url, headers, signed, home, form)
            pause = response.headers.get("Retry-After", "")
            if response.status not in (429, 503) or not pause.isascii() or not pause.isdigit():
                return response
            response.close()
            time.sleep(min(int(pause[:6]), LONGEST_WAIT_S))
        return self._hops(url, headers, signed, home, form)

    def _hops(self, url: str, headers: dict[str, str], signed: bool = False, home: bool = False, form: str = "") -> urllib3.BaseHTTPResponse:
        posted = {"Content-Type": "application/x-www-form-urlencoded"} if form else {}
        for _ in range(MAX_HOPS + 1):
            where = origin(url)
            own = where == self._origin
            if home and not own:
                raise Denied("the upstream sends metadata requests to another host", expected="answers from the endpoint itself", reason="redirect")
            sent = {"Accept-Encoding": "identity", "User-Agent": "airlock-mirror"} | headers | posted
            if own and not signed:
                sent |= self._own_headers()
            parts = urlsplit(url)
            target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
            default = 443 if where[0] == "https" else 80
            sent["Host"] = (f"[{where[1]}]" if ":" in where[1] else where[1]) + (f":{where[2]}" if where[2] != default else "")
            try:
                pool = self._pool(where, own)
                verb, body = ("POST", form.encode()) if form else ("GET", None)
                response = pool.urlopen(verb, target, body, sent, redirect=False, retries=False, preload_content=False, timeout=self._timeout)
            except (HTTPError, OSError) as error:
                raise Unavailable(
                    f"{where[0]}://{where[1]}:{where[2]} does not answer", do="check the network, then run again: it resumes"
                ) from error
            location = response.headers.get("Location")
            if response.status not in (301, 302, 303, 307, 308) or not location:
                return response
            response.close()
            url = joined(url, location)
        raise Invalid(f"the upstream redirects more than {MAX_HOPS} times", expected=f"at most {MAX_HOPS} redirects", reason="redirect")

    def _pool(self, where: tuple[str, str, int], own: bool) -> urllib3.HTTPConnectionPool:
        known = self._pools.get(where)
        if known is not None:
            return known
        scheme, host, port = where
        address = host
        if not own:
            if self._origin[0] == "https" and scheme != "https":
                raise Denied(f"the upstream redirects from https to http ({host[:100]})", expected="https all the way", reason="redirect")
            address = self._allowed(host, port)
        if scheme == "https":
            named = None if own else host  # the certificate is checked for the name, while the address is the one that was checked
            pool: urllib3.HTTPConnectionPool = urllib3.HTTPSConnectionPool(
                address, port, maxsize=16, ca_certs=self._ca_file, server_hostname=named, assert_hostname=named
            )
        else:
            pool = urllib3.HTTPConnectionPool(address, port, maxsize=16)
        return self._pools.setdefault(where, pool)

    def _allowed(self, host: str, port: int) -> str:
        found = addresses(host, port)
        at_home = any(_kind(a) == "private" for a in addresses(self._origin[1], self._origin[2]))
        if not all(_kind(a) == "public" or (at_home and _kind(a) == "private") for a in found):
            do = "if this host is right, name a mirror inside your network as the item's endpoint"
            raise Denied(
                f"the upstream redirects to an address inside a private network ({host[:100]})", expected="a public host", do=do, reason="redirect"
            )
        return found[0]


def refusal(status: int, code: str, what: str) -> AirlockError:
    """The error for an upstream's status and X-Error-Code; its own words are not repeated, since they are untrusted."""
    what = what[:200]
    if status == 401:
        return Unauthenticated(
            f"the upstream asks for a valid key for {what} (401)",
            do="set key_env of the item to a variable that holds the key",
            reason="upstream_401",
        )
    if status == 403 and code == "GatedRepo":
        return Denied(f"{what} is gated and this key's user was not admitted", do="accept the terms at the upstream with that user", reason="gated")
    if status == 403:
        return Denied(f"the upstream refuses {what} (403)", do="check what the key may read", reason="upstream_403")
    if status == 404:
        return NotFound(
            f"the upstream has no {what} for this key",
            do="check name, revision and key",
            reason={"RevisionNotFound": "revision", "EntryNotFound": "entry"}.get(code, "repo"),
        )
    if status == 429 or status >= 500:
        return Unavailable(f"the upstream answers {status} for {what}", do="run again later: it resumes")
    return Invalid(f"the upstream answers {status} for {what}", expected="the file", reason="upstream")
