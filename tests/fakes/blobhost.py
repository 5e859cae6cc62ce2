"""A small OCI registry in memory on real sockets, with faults on request: what a hostile or tired upstream does.

It imports no project code. `faults` is a list that blob GETs and upload PATCHes pop from: cut, short, 503, whole (ignores Range), wrong_range, flip.
"""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import re
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit


class BlobHost:
    def __init__(self, key: str = "", token: str = "", realm: str = "") -> None:
        self.blobs: dict[str, bytes] = {}
        self.manifests: dict[tuple[str, str], tuple[str, bytes]] = {}
        self.uploads: dict[str, bytearray] = {}
        self.counter = itertools.count()  # one step of the interpreter: two requests at once never share a number
        self.faults: list[str] = []
        self.log: list[tuple[str, str, str, str]] = []  # method, path, Range or Content-Range, Authorization
        self.sent: list[tuple[int, int]] = []  # byte ranges that were sent in full
        self.key, self.token, self.realm, self.redirect, self.referrers = key, token, realm, "", True
        self.lock = threading.Lock()
        self.delay_s = 0.0
        host = self

        class Handler(_Handler):
            owner = host

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def add(self, data: bytes) -> str:
        digest = "sha256:" + hashlib.sha256(data).hexdigest()
        self.blobs[digest] = data
        return digest

    def manifest(self, repo: str, doc: dict[str, object], *tags: str) -> str:
        raw = json.dumps(doc).encode()
        digest = "sha256:" + hashlib.sha256(raw).hexdigest()
        for ref in (digest, *tags):
            self.manifests[(repo, ref)] = (str(doc["mediaType"]), raw)
        return digest

    def fault(self) -> str:
        with self.lock:
            return self.faults.pop(0) if self.faults else ""

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    owner: BlobHost

    def log_message(self, *args: object) -> None:
        return

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        if "Content_Length" not in headers:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def cut(self) -> None:
        self.close_connection = True
        self.wfile.flush()
        self.connection.shutdown(socket.SHUT_RDWR)

    def allowed(self) -> bool:
        host, given = self.owner, self.headers.get("Authorization", "")
        basic = "Basic " + base64.b64encode(f"$oauthtoken:{host.key}".encode()).decode()
        if host.token:
            if given == f"Bearer {host.token}":
                return True
            realm = host.realm or f"{host.url}/proxy_auth"
            self.answer(401, b"<html>", WWW_Authenticate=f'Bearer realm="{realm}"')
            return False
        if host.key and given not in (basic, f"Bearer {host.key}"):
            body = {"errors": [{"code": "UNAUTHORIZED", "message": "the API key expired on 2026-01-01", "detail": {"reason": "key_expired"}}]}
            self.answer(401, json.dumps(body).encode(), WWW_Authenticate='Basic realm="airlock"')
            return False
        return True

    def handle_any(self) -> None:
        host = self.owner
        url = urlsplit(self.path)
        span = self.headers.get("Range") or self.headers.get("Content-Range") or ""
        host.log.append((self.command, self.path, span, self.headers.get("Authorization", "")))
        if url.path == "/proxy_auth":
            basic = "Basic " + base64.b64encode(f"$oauthtoken:{host.key}".encode()).decode()
            good = self.headers.get("Authorization") == basic
            return self.answer(200, json.dumps({"token": host.token}).encode()) if good else self.answer(401, b"no")
        if url.path.startswith("/plain/"):
            return self.blob(url.path.removeprefix("/plain/"))
        if not self.allowed():
            return None
        if match := re.fullmatch(r"/v2/(.+)/blobs/(sha256:\w+)", url.path):
            if host.redirect and self.command == "GET":
                return self.answer(307, Location=f"{host.redirect}/plain/{match[2]}")
            return self.blob(match[2])
        if match := re.fullmatch(r"/v2/(.+)/manifests/(.+)", url.path):
            return self.manifest(match[1], match[2])
        if match := re.fullmatch(r"/v2/(.+)/referrers/(.+)", url.path):
            return self.referrers(match[1], match[2])
        if match := re.fullmatch(r"/v2/(.+)/blobs/uploads/(\w*)", url.path):
            return self.upload(match[1], match[2], parse_qs(url.query))
        return self.answer(404, b'{"errors":[{"code":"NAME_UNKNOWN","message":"no such path"}]}')

    do_GET = do_HEAD = do_PUT = do_POST = do_PATCH = do_DELETE = handle_any

    def blob(self, digest: str) -> None:
        data = self.owner.blobs.get(digest)
        if data is None:
            return self.answer(404, b'{"errors":[{"code":"BLOB_UNKNOWN","message":"blob unknown"}]}')
        if self.command == "HEAD":
            return self.answer(200, Content_Length=str(len(data)))
        fault = self.owner.fault()
        lo, hi = 0, len(data)
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        ranged = bool(match) and fault != "whole"
        if match and ranged:
            lo, hi = int(match[1]), int(match[2]) + 1
        body = data[lo:hi]
        if fault == "503":
            return self.answer(503, b"busy")
        if fault == "flip":
            body = bytes([body[0] ^ 1]) + body[1:]
        stated = f"bytes {lo + (fault == 'wrong_range')}-{hi - 1}/{len(data)}"
        self.send_response(206 if ranged else 200)
        if ranged:
            self.send_header("Content-Range", stated)
        length = len(body) // 2 if fault == "short" else len(body)
        self.send_header("Content-Length", str(length))
        self.end_headers()
        if fault in ("cut", "short"):
            self.wfile.write(body[: len(body) // 2])
            return self.cut() if fault == "cut" else None
        for at in range(0, len(body), 65_536):
            self.wfile.write(body[at : at + 65_536])
            time.sleep(self.owner.delay_s)
        self.owner.sent.append((lo, hi))
        return None

    def manifest(self, repo: str, ref: str) -> None:
        if self.command == "PUT":
            raw = self.rfile.read(int(self.headers["Content-Length"]))
            digest = "sha256:" + hashlib.sha256(raw).hexdigest()
            for name in (ref, digest):
                self.owner.manifests[(repo, name)] = (self.headers["Content-Type"], raw)
            return self.answer(201, Docker_Content_Digest=digest)
        found = self.owner.manifests.get((repo, ref))
        if not found:
            return self.answer(404, b'{"errors":[{"code":"MANIFEST_UNKNOWN","message":"manifest unknown"}]}')
        return self.answer(200, found[1], Content_Type=found[0])

    def referrers(self, repo: str, digest: str) -> None:
        if not self.owner.referrers:
            return self.answer(404, b"404 page not found")
        entries = []
        for (name, ref), (kind, raw) in self.owner.manifests.items():
            doc = json.loads(raw)
            if name == repo and ref.startswith("sha256:") and (doc.get("subject") or {}).get("digest") == digest:
                entries.append({"mediaType": kind, "digest": ref, "size": len(raw)})
        index = {"schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json", "manifests": entries}
        return self.answer(200, json.dumps(index).encode(), Content_Type=str(index["mediaType"]))

    def upload(self, repo: str, name: str, query: dict[str, list[str]]) -> None:
        host, length = self.owner, int(self.headers.get("Content-Length") or 0)
        if self.command == "POST":
            name = f"u{next(host.counter)}"
            host.uploads[name] = bytearray()
            return self.answer(202, Location=f"/v2/{repo}/blobs/uploads/{name}?state=x")
        store = host.uploads.get(name)
        if store is None:
            self.rfile.read(length)
            return self.answer(404, b'{"errors":[{"code":"BLOB_UPLOAD_UNKNOWN","message":"upload unknown"}]}')
        place = f"/v2/{repo}/blobs/uploads/{name}?state=x"
        if self.command == "GET":
            return self.answer(204, Location=place, Range=f"0-{max(len(store) - 1, 0)}")
        first = re.fullmatch(r"(\d+)-(\d+)", self.headers.get("Content-Range", ""))
        if first and int(first[1]) != len(store):
            self.rfile.read(length)
            return self.answer(416, b"", Location=place, Range=f"0-{max(len(store) - 1, 0)}")
        fault = host.fault() if self.command == "PATCH" else ""
        want = length // 2 if fault == "cut" else length
        while want:
            part = self.rfile.read1(min(want, 65_536))
            if not part:
                self.close_connection = True
                return None
            store += part
            want -= len(part)
            time.sleep(host.delay_s)
        if fault == "cut":
            return self.cut()
        if self.command == "PATCH":
            return self.answer(202, Location=place, Range=f"0-{max(len(store) - 1, 0)}")
        digest = query["digest"][0]
        del host.uploads[name]
        if "sha256:" + hashlib.sha256(store).hexdigest() != digest:
            return self.answer(400, b'{"errors":[{"code":"DIGEST_INVALID","message":"digest did not match"}]}')
        host.blobs[digest] = bytes(store)
        return self.answer(201, Location=f"/v2/{repo}/blobs/{digest}")
