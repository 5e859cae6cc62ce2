"""A plain stand-in for a site's registry, for runtime tests: tables of manifests and blobs, one key, a lease function; imports no project code."""

from __future__ import annotations

import base64
import contextlib
import json
import socket
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Site:
    """Serves what the tables hold; `log` has every request, `state` is what the key is worth now: ok, invalid, expired, revoked or foreign."""

    def __init__(self, key: str) -> None:
        self.key, self.state = key, "ok"
        self.manifests: dict[tuple[str, str], tuple[str, bytes]] = {}
        self.blobs: dict[str, bytes] = {}
        self.lease: Callable[[dict], tuple[int, dict]] = lambda body: (403, {"reason": "no_grant", "what": "no grant of this key covers it"})
        self.standing: dict | None = None  # the answer of /airlock/v1/standing; None: this registry has no such route
        self.taken: list[tuple[str, dict]] = []  # receipts and returned leases
        self.refused: set[str] = set()  # reasons of records that are answered with 400
        self.log: list[str] = []
        self.cut_after = -1  # bytes of blobs until every connection is cut; -1: never
        self._open: list[socket.socket] = []
        site = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def setup(self) -> None:
                super().setup()
                site._open.append(self.connection)

            def do_GET(self) -> None:
                site._answer(self, b"")

            def do_POST(self) -> None:
                site._answer(self, self.rfile.read(int(self.headers.get("Content-Length", 0))))

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        for connection in self._open:  # as when the process ends: also those that wait for their next request
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def _answer(self, request: BaseHTTPRequestHandler, body: bytes) -> None:
        self.log.append(f"{request.command} {request.path} {request.headers.get('Range', '')}".strip())
        given = request.headers.get("Authorization", "")
        wanted = (f"Bearer {self.key}", "Basic " + base64.b64encode(f"$oauthtoken:{self.key}".encode()).decode())
        if given not in wanted or self.state not in ("ok", "foreign"):
            words = {
                "expired": ("key_expired", "the API key expired on 2026-01-01T00:00:00Z"),
                "revoked": ("key_revoked", "the API key was revoked on 2026-01-01"),
            }
            reason, what = words.get(self.state, ("key_absent", "no API key was given, or it is not valid here"))
            self._json(request, 401, {"error": "unauthenticated", "reason": reason, "what": what})
        elif request.path == "/airlock/v1/whoami":
            self._json(request, 200, {"key_id": "k1", "org": "acme", "tier": "developer", "expires": 0})
        elif request.path == "/airlock/v1/leases":
            self._json(request, *self.lease(json.loads(body)))
        elif request.path == "/airlock/v1/standing" and self.standing is not None:
            self._json(request, 200, self.standing)
        elif request.path in ("/airlock/v1/verified", "/airlock/v1/leases/return") and self.standing is not None:
            self.taken.append((request.path.removeprefix("/airlock/v1/"), json.loads(body)))
            self._json(request, 200, {})
        elif request.path == "/airlock/v1/unsigned":
            fact = json.loads(body)
            if fact["reason"] in self.refused:
                self._json(request, 400, {"error": "invalid", "reason": "invalid", "what": "no record"})
            else:
                self.taken.append(("unsigned", fact))
                self._json(request, 200, {})
        elif "/manifests/" in request.path and self.state == "ok":
            repo, ref = request.path.removeprefix("/v2/").split("/manifests/")
            found = self.manifests.get((repo, ref))
            unknown = {"errors": [{"code": "MANIFEST_UNKNOWN", "message": "no such manifest", "detail": {"reason": "manifest"}}]}
            self._send(request, 200, found[1], found[0]) if found else self._json(request, 404, unknown)
        elif request.path.split("?")[0].endswith("/tags/list") and self.state == "ok":
            repo = request.path.removeprefix("/v2/").split("/tags/list")[0]
            self._json(request, 200, {"name": repo, "tags": sorted(ref for name, ref in self.manifests if name == repo and ":" not in ref)})
        elif "/blobs/" in request.path and self.state == "ok":
            self._blob(request, self.blobs.get(request.path.split("/blobs/")[1]))
        else:
            self._json(request, 404, {"errors": [{"code": "NAME_UNKNOWN"}]})

    def _blob(self, request: BaseHTTPRequestHandler, raw: bytes | None) -> None:
        if raw is None:
            self._json(request, 404, {"errors": [{"code": "BLOB_UNKNOWN"}]})
            return
        lo, hi = (int(n) for n in request.headers["Range"].removeprefix("bytes=").split("-"))
        part = raw[lo : hi + 1]
        request.send_response(206)
        request.send_header("Content-Range", f"bytes {lo}-{hi}/{len(raw)}")
        request.send_header("Content-Length", str(len(part)))
        request.end_headers()
        if (cut := self.cut_after) >= 0:
            part, left = part[:cut], max(0, cut - len(part))
            if self.cut_after == cut:  # unless the test has lifted it meanwhile
                self.cut_after = left
            request.close_connection = True
        request.wfile.write(part)

    def _json(self, request: BaseHTTPRequestHandler, status: int, doc: dict) -> None:
        self._send(request, status, json.dumps(doc).encode(), "application/json")

    def _send(self, request: BaseHTTPRequestHandler, status: int, raw: bytes, kind: str) -> None:
        request.send_response(status)
        if status == 401:
            request.send_header("WWW-Authenticate", 'Basic realm="airlock"')
        request.send_header("Content-Type", kind)
        request.send_header("Content-Length", str(len(raw)))
        request.end_headers()
        request.wfile.write(raw)
