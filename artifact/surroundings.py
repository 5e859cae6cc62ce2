"""What a client's own place gets wrong before it sends anything: variables of the Hub's and NGC's clients, files of authorities, proxies, caches.

Here for `airlock doctor`. It reads the environment and looks at paths, writes nothing and connects to nobody. It never quotes a key or a password.
"""

from __future__ import annotations

import ipaddress
import os
import shutil
import ssl
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from artifact.clients import TRUST

OK, WARN, FAIL = "ok", "warn", "fail"
KEYS = ("AIRLOCK_KEY", "HF_TOKEN", "NGC_API_KEY", "NGC_CLI_API_KEY")
CA_FILES = ("AIRLOCK_CA_FILE", "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "AWS_CA_BUNDLE")
CACHES = ("HF_HOME", "HF_HUB_CACHE", "NIM_CACHE_PATH", "NGC_CLI_HOME")
LOW_BYTES = 1 << 30


@dataclass(frozen=True)
class Line:
    """What one look found: the check, ok, warn or fail, in words, the fix, and the reason that an exit code stands for."""

    check: str
    state: str
    what: str
    do: str = ""
    reason: str = ""


def wrong(what: str, do: str) -> Line:
    """A variable whose value no client can work with."""
    return Line("environment", FAIL, what, do, "environment")


def look(environ: Mapping[str, str], registry: str, ngc: str) -> list[Line]:
    """Everything that the environment says, against the URLs of registry and NGC listener; one ok line where nothing is wrong."""
    found = [*_hub(environ, registry), *_ngc(environ, ngc), *_keys(environ), *_authorities(environ), *_caches(environ)]
    return found or [Line("environment", OK, "no variable of the Hub's or NGC's clients is set wrongly")]


def _host(url: str) -> str:
    try:
        return urlsplit(url if "://" in url else f"//{url}").netloc.rpartition("@")[2]
    except ValueError:
        return ""


def _hub(environ: Mapping[str, str], registry: str) -> Iterator[Line]:
    given = environ.get("HF_ENDPOINT", "")
    if given:
        try:
            parts = urlsplit(given)
        except ValueError:
            parts = urlsplit("")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            yield wrong("HF_ENDPOINT is no URL", f"export HF_ENDPOINT={registry}")
        elif parts.path.rstrip("/").endswith("/api"):
            yield wrong("HF_ENDPOINT ends with /api: clients put that behind it themselves", f"export HF_ENDPOINT={registry}")
        elif parts.netloc.rpartition("@")[2] != _host(registry) or parts.scheme != urlsplit(registry).scheme:
            yield Line(
                "environment",
                WARN,
                f"HF_ENDPOINT is {parts.scheme}://{_host(given)}, another place than {registry}",
                f"export HF_ENDPOINT={registry}",
            )
    if environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON"):
        yield Line("environment", WARN, "HF_HUB_OFFLINE is set: hub clients ask nobody and read their cache alone", "unset HF_HUB_OFFLINE")


def _ngc(environ: Mapping[str, str], ngc: str) -> Iterator[Line]:
    place = _host(ngc) or "HOST:PORT"
    for name in ("NGC_API_ENDPOINT", "NGC_AUTH_ENDPOINT"):
        given = environ.get(name, "")
        if given.endswith("/"):
            yield Line(
                "environment", WARN, f"{name} ends with a slash: clients ask for //v2/…, which not every proxy passes on", f"export {name}={place}"
            )
        elif "://" in given:
            do = f"export {name}={place}, and NGC_API_SCHEME={urlsplit(given).scheme}"
            yield Line("environment", WARN, f"{name} has a scheme: ModelExpress wants one, a NIM none", do)
        if given and ngc and _host(given) != place:
            yield Line("environment", WARN, f"{name} is {_host(given)}, another place than {place}", f"export {name}={place}")
    scheme = environ.get("NGC_API_SCHEME", "")
    if scheme and (scheme not in ("http", "https") or (ngc and scheme != urlsplit(ngc).scheme)):
        yield wrong("NGC_API_SCHEME is not the scheme of the NGC listener", f"export NGC_API_SCHEME={urlsplit(ngc).scheme or 'https'}")
    if environ.get("NGC_API_ENDPOINT") and environ.get("SSL_CERT_FILE") and environ.get("NIM_SDK_USE_NATIVE_TLS") != "1":
        yield Line("environment", WARN, "a NIM reads SSL_CERT_FILE only with NIM_SDK_USE_NATIVE_TLS=1", "export NIM_SDK_USE_NATIVE_TLS=1")
    for name in ("NGC_CLI_API_URL", "NGC_CLI_AUTH_URL"):
        given = environ.get(name, "")
        if given.startswith("http://"):
            yield wrong(f"{name} begins with http://: the NGC clients make https of it", f"export {name}=https://{place}")
        elif given and ":" not in _host(given).rpartition("]")[2]:
            yield wrong(f"{name} has no port: the NGC clients want one", f"export {name}=https://{_host(given)}:443")
        elif given and ngc and _host(given) != place:
            yield Line("environment", WARN, f"{name} is {_host(given)}, another place than {place}", f"export {name}=https://{place}")


def _keys(environ: Mapping[str, str]) -> Iterator[Line]:
    given = {name: environ[name] for name in KEYS if environ.get(name)}
    for name, key in given.items():
        if not key.isascii() or not key.isprintable() or " " in key:
            yield wrong(f"{name} holds characters that no key has (a blank or a line end)", f"set {name} again, without them")
    if len(set(given.values())) > 1:
        yield Line("environment", WARN, f"{', '.join(given)} hold different keys", "give each client the key that it is to use")


def _authorities(environ: Mapping[str, str]) -> Iterator[Line]:
    for name in CA_FILES:
        given = environ.get(name, "")
        if given and Path(given).is_dir() and name != "AIRLOCK_CA_FILE":
            continue  # a directory of hashed names is for OpenSSL to judge
        if given:
            try:
                ssl.create_default_context(cafile=given)
            except (OSError, ValueError) as error:
                why = os.strerror(error.errno) if isinstance(error, OSError) and not isinstance(error, ssl.SSLError) and error.errno else "no PEM"
                yield wrong(f"the file that {name} names cannot be used ({why})", f"let {name} name the PEM file of this site's authority")


def _caches(environ: Mapping[str, str]) -> Iterator[Line]:
    for name in CACHES:
        given = environ.get(name, "")
        if not given:
            continue
        place = next(p for p in (Path(given).absolute(), *Path(given).absolute().parents) if p.exists())
        if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
            yield Line("environment", FAIL, f"{name}: uid {os.geteuid()} cannot write {place}", f"chown or chmod it, or set {name}", "cache")
        elif shutil.disk_usage(place).free < LOW_BYTES:
            yield Line("environment", WARN, f"{name}: less than 1 GiB is free there", "make room, or name another place")


def proxy(environ: Mapping[str, str], url: str) -> str:
    """The proxy that clients send requests for this URL to, as host:port; empty where they go straight (NO_PROXY, or none is set)."""
    parts = urlsplit(url)
    names = (f"{parts.scheme}_proxy", "all_proxy")
    given = next((environ[n] for name in names for n in (name, name.upper()) if environ.get(n)), "")
    if not given:
        return ""
    if any(_left_out(parts.hostname or "", entry.strip()) for entry in (environ.get("no_proxy") or environ.get("NO_PROXY") or "").split(",")):
        return ""
    there = urlsplit(given if "://" in given else f"http://{given}")
    try:
        return f"{there.hostname or ''}:{there.port or {'https': 443, 'socks5': 1080, 'socks5h': 1080}.get(there.scheme, 80)}"
    except ValueError:
        return ":0"


def _left_out(host: str, entry: str) -> bool:
    """Whether an entry of NO_PROXY means this host: a name and all below it, an address, a network, or `*`."""
    if not entry:
        return False
    try:
        return ipaddress.ip_address(host) in ipaddress.ip_network(entry, strict=False)
    except ValueError:
        name = entry.lower().rpartition(":")[0] if entry.count(":") == 1 else entry.lower()
        return entry == "*" or host == name.lstrip(".") or host.endswith("." + name.lstrip("."))


def untold(environ: Mapping[str, str]) -> Line:
    """Which clients know nothing of a private authority yet, and the variables that tell them; for a certificate that this system does not trust."""
    unset = {row.client: row.works[0] for row in TRUST if not row.works[0].startswith("/") and not any(environ.get(v) for v in row.works)}
    if not unset:
        return Line("authority", OK, "every client that reads a variable is told of the authority")
    variables = ", ".join(dict.fromkeys(unset.values()))
    what = f"signed by a private authority, and no variable tells {', '.join(unset)}"
    return Line("authority", WARN, what, f"set {variables} to its PEM file (docs/operations.md, Authorities of clients)")
