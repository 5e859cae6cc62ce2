"""Pins three defects of PyPI oras 0.2.43, the reason why it is an interop client of the tests and never on the trusted path (adr/0004).

A test here that fails after an update is good news: the defect is mended, and the ADR can be read again.
"""

from __future__ import annotations

import base64
import hashlib
import http.server
import io
import json
import tarfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import oras.client
import pytest
from oras.utils import extract_targz

Answer = tuple[int, dict[str, str], bytes]


@contextmanager
def serving(answer: Callable[[http.server.BaseHTTPRequestHandler], Answer]) -> Iterator[str]:
    """An HTTP server on a free loopback port; yields host:port."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, headers, body = answer(self)
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body if self.command == "GET" else b"")

        do_HEAD = do_GET

        def log_message(self, format: str, *args: object) -> None:
            return

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_extract_targz_follows_a_symlink_out_of_the_directory(tmp_path: Path) -> None:
    outside, inside, archive = tmp_path / "outside", tmp_path / "inside", tmp_path / "a.tar.gz"
    outside.mkdir()
    inside.mkdir()
    with tarfile.open(archive, "w:gz") as tar:
        link = tarfile.TarInfo("ln")
        link.type, link.linkname = tarfile.SYMTYPE, str(outside)
        tar.addfile(link)
        member = tarfile.TarInfo("ln/pwn")
        member.size = 4
        tar.addfile(member, io.BytesIO(b"EVIL"))
    extract_targz(str(archive), str(inside))
    assert (outside / "pwn").read_bytes() == b"EVIL"


@pytest.mark.slow
def test_basic_credentials_go_to_whatever_realm_the_registry_names() -> None:
    seen: list[str] = []

    def realm(request: http.server.BaseHTTPRequestHandler) -> Answer:
        seen.append(request.headers.get("Authorization", ""))
        return 200, {"Content-Type": "application/json"}, b'{"token": "t"}'

    with serving(realm) as elsewhere:

        def registry(request: http.server.BaseHTTPRequestHandler) -> Answer:
            if request.headers.get("Authorization", "").startswith("Bearer"):
                return 200, {"Content-Type": "application/json"}, b'{"tags": ["1"]}'
            return 401, {"WWW-Authenticate": f'Bearer realm="http://{elsewhere}/token",service="x"'}, b"{}"

        with serving(registry) as host:
            client = oras.client.OrasClient(hostname=host, insecure=True, auth_backend="token")
            client.auth.set_basic_auth("user", "secret")
            client.get_tags(f"{host}/acme/tiny")
    assert "Basic " + base64.b64encode(b"user:secret").decode() in seen


@pytest.mark.slow
def test_pull_writes_bytes_that_do_not_match_their_digest(tmp_path: Path) -> None:
    layer = {
        "mediaType": "application/octet-stream",
        "digest": "sha256:" + "1" * 64,
        "size": 4,
        "annotations": {"org.opencontainers.image.title": "weights.bin"},
    }
    empty = {"mediaType": "application/vnd.oci.empty.v1+json", "digest": "sha256:" + hashlib.sha256(b"{}").hexdigest(), "size": 2}
    manifest = json.dumps(
        {"schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json", "config": empty, "layers": [layer]}
    ).encode()

    def registry(request: http.server.BaseHTTPRequestHandler) -> Answer:
        if "/manifests/" in request.path:
            return 200, {"Content-Type": "application/vnd.oci.image.manifest.v1+json"}, manifest
        if "/blobs/" in request.path:
            return 200, {"Content-Type": "application/octet-stream"}, b"EVIL"
        return 200, {}, b"{}"

    with serving(registry) as host:
        client = oras.client.OrasClient(hostname=host, insecure=True)
        files = client.pull(target=f"{host}/acme/tiny:1", outdir=str(tmp_path))
    assert [Path(f).read_bytes() for f in files] == [b"EVIL"]
