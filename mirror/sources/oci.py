"""An OCI registry as a source: a manifest graph by tag or digest, its profile manifest, and what that refers to across repositories (D5).

It copies bytes and makes nothing: manifests are stored as they came, names follow docs/format.md section 2. A reference is followed by digest only,
so that an upstream can never move a name that is not its own.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from artifact import copy
from artifact.disk import Disk
from artifact.errors import Denied, Invalid, NotFound, TooLarge, Unauthenticated
from artifact.manifest import MAX_MANIFEST_BYTES, MODEL_TYPE, PROFILES_TYPE, Manifest, digest_of, is_digest, parse_manifest
from artifact.profile import Pin, references
from artifact.remote import RemoteRegistry
from artifact.store import Call, Descriptor, Page
from mirror.plan import Item

MAX_REFERENCES = 64
MAX_DEPTH = 4


_ADVICE = {
    "401": "set key_env of the item to a variable that holds a valid key of that registry",
    "402": "the key's account has no subscription that covers it: subscribe that account, or use a key of one that is",
    "403": "set key_env to a key that may read it: of the organisation that owns it, or whose account was given access",
    "412": "accept its licence or terms at the vendor's site with the key's account, then record it: airlock mirror accept SOURCE --by WHO",
    "451": "it is refused for legal reasons, such as a region where it is not offered: ask its vendor",
}


@contextmanager
def advised() -> Iterator[None]:
    """Says of an upstream's refusal for which right, licence or region what helps; nvcr.io answers so at its token endpoint or at the manifest."""
    try:
        yield
    except (Denied, Unauthenticated, Invalid) as error:
        status = error.ids.get("status", "")
        if status not in _ADVICE:
            raise
        kind = Unauthenticated if status == "401" else Denied
        raise kind(error.what, expected=error.expected, do=error.do or _ADVICE[status], reason=f"upstream_{status}", status=status) from error


class Metered:
    """A registry as copy_graph reads it: counts what really crosses the wire, and never asks twice for a manifest."""

    def __init__(self, remote: RemoteRegistry, disk: Disk) -> None:
        self._remote, self._disk = remote, disk
        self._raw: dict[tuple[str, str], tuple[Descriptor, bytes]] = {}
        self._lock = threading.Lock()
        self.received = 0

    def read_manifest(self, repo: str, ref: str) -> tuple[Descriptor, bytes]:
        """A manifest from the store if it is there by digest, else from the registry; raises NotFound."""
        if (repo, ref) in self._raw:
            return self._raw[(repo, ref)]
        if is_digest(ref) and self._disk.size(ref) is not None:
            raw = self._disk.read(ref, MAX_MANIFEST_BYTES)
            found = Descriptor(parse_manifest(raw).media_type, ref, len(raw)), raw
        else:
            with advised():
                found = self._remote.read_manifest(repo, ref)
            if self._disk.size(found[0].digest) is None:
                self.received += len(found[1])
        self._raw[(repo, ref)] = self._raw[(repo, found[0].digest)] = found
        return found

    def stream(self, repo: str, digest: str, lo: int, hi: int) -> Iterator[bytes]:
        """Bytes [lo, hi) of a blob, counted."""
        with advised():
            for part in self._remote.stream(repo, digest, lo, hi):
                with self._lock:
                    self.received += len(part)
                yield part

    def referrers(self, call: Call, repo: str, digest: str, kind: str = "", after: str = "") -> Page:
        """The referrers of a manifest, as the registry lists them."""
        with advised():
            return self._remote.referrers(call, repo, digest, kind, after)


def graph_size(source: Metered, repo: str, ref: str, depth: int = 0) -> int:
    """Bytes of all blobs that a manifest reaches inside its repository; raises NotFound, Invalid, TooLarge for an index of indexes without end."""
    if depth > MAX_DEPTH:
        raise TooLarge(f"{repo} nests indexes deeper than {MAX_DEPTH}", expected=f"at most {MAX_DEPTH}")
    manifest = parse_manifest(source.read_manifest(repo, ref)[1])
    return sum({b.digest: b.size for b in manifest.blobs()}.values()) + sum(graph_size(source, repo, m.digest, depth + 1) for m in manifest.manifests)


def kind_of(manifest: Manifest) -> str:
    """model, profiles or image."""
    return {MODEL_TYPE: "model", PROFILES_TYPE: "profiles"}.get(manifest.artifact_type, "image")


def find_profiles(source: Metered, item: Item, ref: str) -> Manifest | None:
    """The profile manifest beside a model under the same ref; None where there is none, or something else bears that name."""
    repo = f"{item.repository}/profiles"
    try:
        _, raw = source.read_manifest(repo, ref)
    except NotFound:
        return None
    manifest = parse_manifest(raw)
    return manifest if manifest.artifact_type == PROFILES_TYPE else None


def pins(source: Metered, repo: str, manifest: Manifest, disk: Disk) -> tuple[Pin, ...]:
    """The models and images that a profile manifest refers to (its document is fetched for that); raises Invalid, TooLarge."""
    found: dict[Pin, None] = {}
    for layer in manifest.layers:
        if layer.media_type != PROFILES_TYPE:
            continue
        if layer.size > MAX_MANIFEST_BYTES:
            raise TooLarge(f"the profile document of {repo} has {layer.size} bytes", expected=f"at most {MAX_MANIFEST_BYTES}")
        if disk.size(layer.digest) is None:
            copy.fetch(partial(source.stream, repo, layer.digest), layer.digest, layer.size, disk)
        found.update(dict.fromkeys(references(disk.read(layer.digest, MAX_MANIFEST_BYTES), layer.media_type)))
    if len(found) > MAX_REFERENCES:
        raise TooLarge(f"the profiles of {repo} refer to {len(found)} things", expected=f"at most {MAX_REFERENCES}")
    return tuple(found)


def check_whole(disk: Disk, digest: str, depth: int = 0) -> Manifest:
    """The stored manifest, once everything it reaches lies in the store in full; raises NotFound, Invalid."""
    raw = disk.read(digest, MAX_MANIFEST_BYTES)
    manifest = parse_manifest(raw)
    for blob in manifest.blobs():
        if disk.size(blob.digest) != blob.size:
            raise NotFound(f"{blob.digest} of {digest} is not in the store in full", expected=f"{blob.size} bytes", do="run again")
    for child in manifest.manifests if depth <= MAX_DEPTH else ():
        check_whole(disk, child.digest, depth + 1)
    if digest_of(raw) != digest and digest.startswith("sha256:"):
        raise Invalid(f"{digest} is stored under a wrong name", expected=digest_of(raw))
    return manifest
