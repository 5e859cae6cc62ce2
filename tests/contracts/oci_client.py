"""An OCI client that shows every byte of an answer: repeated headers stay repeated, nothing is followed, decoded or tried again.

Here because the conformance facts are about the wire itself, and an HTTP library hides a body after HEAD, a second header line or a re-encoded query.
It imports nothing of what it tests.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote, urlencode, urlsplit

IMAGE = "application/vnd.oci.image.manifest.v1+json"
INDEX = "application/vnd.oci.image.index.v1+json"
CONFIG = "application/vnd.oci.image.config.v1+json"
LAYER = "application/vnd.oci.image.layer.v1.tar"
EMPTY = "application/vnd.oci.empty.v1+json"
ACCEPT = (("Accept", INDEX), ("Accept", IMAGE))
ALGORITHMS = ("sha256", "sha512")
WAIT_S = 60
Pairs = Sequence[tuple[str, str]]


def digest(data: bytes, algorithm: str = "sha256") -> str:
    return f"{algorithm}:{hashlib.new(algorithm, data).hexdigest()}"


@dataclass(frozen=True)
class Reply:
    """One answer: the head as it was on the wire, and all bytes that followed until the connection was closed."""

    status: int
    headers: tuple[tuple[str, str], ...]
    body: bytes

    def get(self, name: str) -> str:
        """The value of a header that may come once at most; empty when absent."""
        found = [v for k, v in self.headers if k.lower() == name.lower()]
        assert len(found) <= 1, f"{name} came {len(found)} times"
        return found[0] if found else ""

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def codes(self) -> list[str]:
        return [e["code"] for e in self.json()["errors"]]


def join(place: str, **query: str) -> str:
    """The path of a Location, relative or absolute, with more query behind what it already has."""
    parts = urlsplit(place)
    old = f"{parts.query}&" if parts.query else ""
    return f"{parts.path}?{old}{urlencode(query)}" if query else parts.path + (f"?{parts.query}" if parts.query else "")


def challenge(header: str) -> dict[str, str]:
    """The parameters of a `Bearer` challenge; empty for another scheme."""
    kind, _, rest = header.partition(" ")
    return dict(re.findall(r'([a-z_]+)="([^"]*)"', rest)) if kind == "Bearer" else {}


def parse(raw: bytes, method: str) -> Reply:
    """Splits one answer and checks its framing and what holds for every answer of the registry."""
    head, mark, body = raw.partition(b"\r\n\r\n")
    assert mark, f"no end of the head in {raw[:200]!r}"
    first, *lines = head.decode("latin-1").split("\r\n")
    version, status, _reason = first.split(" ", 2)
    assert version == "HTTP/1.1", first
    headers = tuple((k, v.strip()) for k, _, v in (line.partition(":") for line in lines))
    reply = Reply(int(status), headers, body)
    assert not reply.get("transfer-encoding") and not reply.get("content-encoding"), headers
    if method == "HEAD" or reply.status == 204:
        assert body == b"", f"{method} {status} has a body"
    else:
        assert len(body) == int(reply.get("content-length") or 0), f"{len(body)} bytes, but {headers}"
    assert reply.status < 500, raw[:2000]
    if reply.status >= 400 and method != "HEAD":
        assert reply.get("content-type") == "application/json"
        errors = reply.json()["errors"]
        assert errors and all(re.fullmatch("[A-Z_]+", e["code"]) and isinstance(e["message"], str) and "detail" in e for e in errors), body
    assert reply.status != 429 or reply.get("retry-after")
    assert all(re.match(r'299 (-|\S+) "[^"]+"$', v) for k, v in headers if k.lower() == "warning"), headers
    return reply


@dataclass
class Client:
    """Requests to one registry with one key, presented as `basic`, as `bearer`, by the `token` endpoint, or not at all (`none`)."""

    port: int
    key: str = field(repr=False)
    mode: str = "basic"
    tokens: dict[str, str] = field(default_factory=dict, repr=False)

    def raw(self, method: str, target: str, headers: Pairs = (), body: bytes | Iterable[bytes] = b"") -> Reply:
        """One request on one connection; a body that is not bytes is sent chunked; GET, HEAD and DELETE send no length."""
        chunked = not isinstance(body, bytes)
        lines = [f"{method} {target} HTTP/1.1", f"Host: 127.0.0.1:{self.port}", "Connection: close", *(f"{k}: {v}" for k, v in headers)]
        if chunked:
            lines.append("Transfer-Encoding: chunked")
        elif body or method in ("POST", "PUT", "PATCH"):
            lines.append(f"Content-Length: {len(body)}")  # type: ignore[arg-type]
        with socket.create_connection(("127.0.0.1", self.port), timeout=WAIT_S) as sock:
            sock.sendall("\r\n".join([*lines, "", ""]).encode())
            if chunked:
                for piece in body:
                    assert isinstance(piece, bytes)
                    sock.sendall(b"%x\r\n%s\r\n" % (len(piece), piece) if piece else b"")
                sock.sendall(b"0\r\n\r\n")
            elif body:
                sock.sendall(body)  # type: ignore[arg-type]
            found = bytearray()
            while piece := sock.recv(1 << 20):
                found += piece
        return parse(bytes(found), method)

    def authorization(self, method: str, target: str) -> list[tuple[str, str]]:
        basic = "Basic " + base64.b64encode(f"$oauthtoken:{self.key}".encode()).decode()
        given = {"basic": basic, "bearer": f"Bearer {self.key}", "none": ""}.get(self.mode)
        if given is None:
            given = "Bearer " + self.token(scopes(method, target), basic)
        return [("Authorization", given)] if given else []

    def token(self, wanted: Sequence[str], basic: str) -> str:
        """A token for these scopes, asked at the realm that `/v2/` names, once for each set of scopes."""
        name = " ".join(wanted)
        if name not in self.tokens:
            said = challenge(self.raw("GET", "/v2/").get("www-authenticate"))
            realm = urlsplit(said["realm"])
            assert realm.netloc == f"127.0.0.1:{self.port}", said
            query = urlencode([("account", "$oauthtoken"), ("service", said["service"]), *(("scope", s) for s in wanted)])
            reply = self.raw("GET", f"{realm.path}?{query}", [("Authorization", basic)])
            assert reply.status == 200, reply.body
            assert reply.json()["token"] == reply.json()["access_token"]
            self.tokens[name] = reply.json()["token"]
        return self.tokens[name]

    def ask(self, method: str, target: str, body: bytes | Iterable[bytes] = b"", headers: Pairs = ()) -> Reply:
        """A request to a path or to a whole Location, with authorization."""
        path = join(target)
        return self.raw(method, path, [*self.authorization(method, path), *headers], body)

    # what most facts begin with

    def start(self, repo: str, query: str = "") -> str:
        """A new upload's Location."""
        reply = self.ask("POST", f"/v2/{repo}/blobs/uploads/{query}")
        assert reply.status == 202 and reply.get("location"), reply
        return reply.get("location")

    def blob(self, repo: str, data: bytes, algorithm: str = "sha256") -> str:
        """Pushes a blob and returns its digest."""
        name = digest(data, algorithm)
        assert self.ask("PUT", join(self.start(repo), digest=name), data).status == 201
        return name

    def put(self, repo: str, ref: str, raw: bytes, media_type: str = IMAGE) -> Reply:
        """PUT of a manifest, which must be taken."""
        reply = self.ask("PUT", f"/v2/{repo}/manifests/{quote(ref, safe=':?=&')}", raw, [("Content-Type", media_type)])
        assert reply.status == 201, reply.body
        return reply

    def manifest(self, repo: str, ref: str, method: str = "GET") -> Reply:
        return self.ask(method, f"/v2/{repo}/manifests/{ref}", headers=ACCEPT)


def scopes(method: str, target: str) -> list[str]:
    """The scopes that docker asks for such a request."""
    found = re.match(r"/v2/(.+)/(?:blobs|manifests|tags|referrers)/", target)
    if not found:
        return ["registry:catalog:*"] if target.startswith("/v2/_catalog") else []
    actions = (
        "pull"
        if method in ("GET", "HEAD") and "/uploads/" not in target
        else "delete"
        if method == "DELETE" and "/uploads/" not in target
        else "pull,push"
    )
    source = re.search(r"[?&]from=([^&]+)", target)
    return [f"repository:{found[1]}:{actions}", *([f"repository:{source[1]}:pull"] if source else [])]


def descriptor(data: bytes, media_type: str, algorithm: str = "sha256", /, **extra: Any) -> dict[str, Any]:
    return {"mediaType": media_type, "digest": digest(data, algorithm), "size": len(data), **extra}


def image(config: bytes, layers: Sequence[bytes], algorithm: str = "sha256", /, **extra: Any) -> bytes:
    """An image manifest over these bytes; `extra` adds or replaces fields."""
    doc = {
        "schemaVersion": 2,
        "mediaType": IMAGE,
        "config": descriptor(config, CONFIG, algorithm),
        "layers": [descriptor(layer, LAYER, algorithm) for layer in layers],
    }
    return json.dumps(doc | extra, indent=1).encode()


def index(children: Sequence[dict[str, Any]], **extra: Any) -> bytes:
    return json.dumps({"schemaVersion": 2, "mediaType": INDEX, "manifests": list(children), **extra}, indent=1).encode()


# the four forms of an upload (distribution-spec, "Pushing a blob"); each returns the answer that closes it


def post_only(client: Client, repo: str, data: bytes, name: str, query: str = "") -> Reply:
    return client.ask("POST", f"/v2/{repo}/blobs/uploads/?digest={name}{query}", data, [("Content-Type", "application/octet-stream")])


def post_put(client: Client, repo: str, data: bytes, name: str, query: str = "") -> Reply:
    return client.ask("PUT", join(client.start(repo, query), digest=name), data, [("Content-Type", "application/octet-stream")])


def chunks(client: Client, repo: str, data: bytes, name: str, query: str = "", last_by_put: bool = False) -> Reply:
    """Three chunks or more, each as large as the registry wants at least, with a `Range` after each that is true."""
    opened = client.ask("POST", f"/v2/{repo}/blobs/uploads/{query}")
    assert opened.status == 202
    size = max(int(opened.get("oci-chunk-min-length") or 0), -(-len(data) // 3), 1)
    place, spans = opened.get("location"), [(lo, min(lo + size, len(data))) for lo in range(0, len(data), size)]
    for lo, hi in spans[:-1] if last_by_put else spans:
        moved = client.ask("PATCH", place, data[lo:hi], [("Content-Range", f"{lo}-{hi - 1}"), ("Content-Type", "application/octet-stream")])
        assert (moved.status, moved.get("range")) == (202, f"0-{hi - 1}"), moved
        place = moved.get("location")
    if last_by_put and spans:
        lo, hi = spans[-1]
        return client.ask("PUT", join(place, digest=name), data[lo:hi], [("Content-Range", f"{lo}-{hi - 1}")])
    return client.ask("PUT", join(place, digest=name))


def chunks_put(client: Client, repo: str, data: bytes, name: str, query: str = "") -> Reply:
    return chunks(client, repo, data, name, query, last_by_put=True)


def streamed(client: Client, repo: str, data: bytes, name: str, query: str = "") -> Reply:
    """As docker does: one PATCH of unknown length without Content-Type and Content-Range, and an empty PUT with the digest before the query."""
    moved = client.ask("PATCH", client.start(repo, query), [data[i : i + 100_000] for i in range(0, len(data), 100_000)])
    assert moved.status == 202 and (not data or moved.get("range") == f"0-{len(data) - 1}"), moved
    parts = urlsplit(moved.get("location"))
    behind = f"&{parts.query}" if parts.query else ""
    return client.ask("PUT", f"{parts.path}?digest={quote(name, safe='')}{behind}")


Form = Callable[..., Reply]
FORMS: dict[str, Form] = {"post": post_only, "post-put": post_put, "chunks": chunks, "chunks-put": chunks_put, "streamed": streamed}
