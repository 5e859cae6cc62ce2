"""Every blob backend over a place of its own, for the contract suite and the tests of S3: one entry for each module of registry/blobs/."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import registry.blobs
from artifact.store import BlobStore, Content
from registry.blobs.file import FileBlobs
from registry.blobs.s3 import S3Blobs
from registry.bucket import MIB, Options
from tests.services import rgw

BACKENDS = sorted(p.stem for p in Path(registry.blobs.__path__[0]).glob("[a-z]*.py"))
SMALL_PARTS = ((1 << 62, 5 * MIB),)  # S3's smallest, so that a test's object has several
Open = Callable[[], BlobStore]


def credentials(folder: Path, access: str = rgw.ACCESS, secret: str = rgw.SECRET) -> Path:
    """A credentials file, as operators write it."""
    path = folder / "credentials.ini"
    path.write_text(f"[default]\naws_access_key_id = {access}\naws_secret_access_key = {secret}\n")
    return path


def s3_url(folder: Path, *, tls: bool = False, bucket: str = "", **more: str) -> str:
    """The URL of a new bucket of the run's gateway."""
    server = rgw.shared()
    options = {"endpoint": server.https if tls else server.http, "ca": str(server.ca), "credentials": str(credentials(folder)), **more}
    return f"s3://{bucket or server.bucket()}/air/lock?" + "&".join(f"{k}={v}" for k, v in options.items())


def s3_store(url: str, folder: Path, **more: Any) -> S3Blobs:
    """A store over a URL, with small parts and short waits."""
    return S3Blobs(replace(Options.parse(url), **{"steps": SMALL_PARTS, "read_s": 20.0, **more}), folder)


def _file(root: Path) -> Open:
    return lambda: FileBlobs(root)


def _s3(tls: bool) -> Callable[[Path], Open]:
    def place(root: Path) -> Open:
        url = s3_url(root, tls=tls)
        return lambda: s3_store(url, root)

    return place


PLACES: dict[str, list[Any]] = {
    "file": [pytest.param(_file, id="file")],
    "s3": [
        pytest.param(_s3(False), id="s3-http", marks=pytest.mark.server),
        pytest.param(_s3(True), id="s3-https", marks=pytest.mark.server),
    ],
}


def class_of(name: str) -> type[BlobStore]:
    """The subclass of BlobStore that a backend's module defines."""
    module = importlib.import_module(f"registry.blobs.{name}")
    found = [c for c in vars(module).values() if isinstance(c, type) and issubclass(c, BlobStore) and c.__module__ == module.__name__]
    assert len(found) == 1, "one backend, one file"
    return found[0]


def whole(content: Content) -> bytes:
    """All bytes of a content, however it is to be sent."""
    if content.path is not None:
        with content.path.open("rb") as file:
            file.seek(content.lo)
            return file.read(content.hi - content.lo)
    return content.data if content.data is not None else b"".join(content.chunks or ())
