"""One small OCI image, made from nothing as an image layout: the upstream content that skopeo pushes to the demo's docker-registry."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import tarfile
from pathlib import Path

MANIFEST = "application/vnd.oci.image.manifest.v1+json"


def _put(layout: Path, raw: bytes, media_type: str) -> dict[str, object]:
    digest = hashlib.sha256(raw).hexdigest()
    (layout / "blobs" / "sha256" / digest).write_bytes(raw)
    return {"mediaType": media_type, "digest": f"sha256:{digest}", "size": len(raw)}


def make(layout: Path, text: str) -> str:
    """Writes an OCI image layout with one layer of one file and the tag `1`; returns the manifest's digest."""
    (layout / "blobs" / "sha256").mkdir(parents=True)
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w") as archive:
        member = tarfile.TarInfo("hello.txt")
        member.size = len(text.encode())
        archive.addfile(member, io.BytesIO(text.encode()))
    layer = _put(layout, gzip.compress(tar.getvalue(), mtime=0), "application/vnd.oci.image.layer.v1.tar+gzip")
    diff = "sha256:" + hashlib.sha256(tar.getvalue()).hexdigest()
    about = {"architecture": "amd64", "os": "linux", "config": {"Cmd": ["/hello.txt"]}, "rootfs": {"type": "layers", "diff_ids": [diff]}}
    config = _put(layout, json.dumps(about).encode(), "application/vnd.oci.image.config.v1+json")
    manifest = {"schemaVersion": 2, "mediaType": MANIFEST, "config": config, "layers": [layer]}
    root = _put(layout, json.dumps(manifest).encode(), MANIFEST)
    named = {**root, "annotations": {"org.opencontainers.image.ref.name": "1"}}
    (layout / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [named]}))
    (layout / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
    return str(root["digest"])
