"""What an old registry without the referrers API keeps under fallback tags appears in ours, after the mirror and a bundle brought it."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import RegistryServer, airlock
from tests.contracts.oci_client import EMPTY, IMAGE, INDEX, Client, descriptor, digest, image, index
from tests.fakes.registry import Running, registry

pytestmark = [pytest.mark.server, pytest.mark.timeout(600)]
R = "library/app"
SBOM = "application/vnd.example.sbom.v1"
NOTES = {"made.by": "an old client"}


def send(peer: Running, method: str, path: str, body: bytes = b"", media_type: str = "application/octet-stream") -> str:
    """One request to the peer, which must succeed; returns the Location."""
    url = path if path.startswith("http") else peer.url + path
    request = urllib.request.Request(url, data=body if method != "GET" else None, method=method, headers={"Content-Type": media_type})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return str(answer.headers.get("Location", ""))


def fill(peer: Running) -> tuple[bytes, bytes]:
    """An image and an SBOM that refers to it, listed under the fallback tag only; returns both manifests."""
    config, layer, note = b'{"architecture":"amd64","os":"linux","rootfs":{"type":"layers","diff_ids":[]}}', b"layer", b"{}"
    for data in (config, layer, note):
        place = send(peer, "POST", f"/v2/{R}/blobs/uploads/")
        host = peer.url if place.startswith("/") else ""
        send(peer, "PUT", host + place + ("&" if "?" in place else "?") + f"digest={digest(data)}", data)
    raw = image(config, [layer])
    send(peer, "PUT", f"/v2/{R}/manifests/1", raw, IMAGE)
    sbom = image(note, [], config=descriptor(note, EMPTY), artifactType=SBOM, subject=descriptor(raw, IMAGE), annotations=NOTES)
    send(peer, "PUT", f"/v2/{R}/manifests/{digest(sbom)}", sbom, IMAGE)
    listed = index([descriptor(sbom, IMAGE, artifactType=SBOM, annotations=NOTES)])
    send(peer, "PUT", f"/v2/{R}/manifests/{digest(raw).replace(':', '-')}", listed, INDEX)
    return raw, sbom


def shown(server: RegistryServer, repo: str, raw: bytes, sbom: bytes) -> None:
    """The registry's own API lists the SBOM, filtered and not, and serves it."""
    client = Client(server.port, server.make_key(), "token")
    path = f"/v2/{repo}/referrers/{digest(raw)}"
    for query in ("", f"?artifactType={SBOM}"):
        found = client.ask("GET", path + query)
        assert (found.status, found.get("content-type")) == (200, INDEX)
        assert found.json()["manifests"] == [descriptor(sbom, IMAGE, artifactType=SBOM, annotations=NOTES)]
    assert client.manifest(repo, digest(sbom)).body == sbom and client.manifest(repo, "1").body == raw


def test_by_the_mirror_and_a_bundle(tmp_path: Path, start_registry: Callable[..., RegistryServer]) -> None:
    home, medium, data, plan = tmp_path / "mirror", tmp_path / "medium", tmp_path / "closed", tmp_path / "plan.yaml"
    airlock("mirror", "init", "--home", str(home))
    with registry(tmp_path / "peer") as peer:
        raw, sbom = fill(peer)
        plan.write_text(json.dumps({"items": [{"source": f"oci://{peer.host}/{R}:1", "as": "acme/app", "plain_http": True}]}))
        airlock("mirror", "sync", str(plan), "--home", str(home))
    airlock("bundle", "pack", "--to", str(medium), "--home", str(home))
    airlock("site", "init", "--data", str(data), "--trust-root", str(next(iter(home.rglob("1.root.json")))))
    airlock("bundle", "import", str(medium), "--data", str(data))
    shown(start_registry(data), "acme/app", raw, sbom)
