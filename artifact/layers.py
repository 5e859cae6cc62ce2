"""Reading one file out of an image's layers as a registry has them: a merged view without unpacking (OCI image-spec v1.1, layer.md).

The topmost entry of a path wins, whiteouts hide what lies below them, links are followed inside the image. Every byte of a layer is hashed before
anything that was found in it is believed. Must not: write a file, keep more of a layer in memory than one block and the files that are sought, or go
on reading beyond its limits.
"""

from __future__ import annotations

import tarfile
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

from artifact.archive import MAX_ENTRIES, Head, Reader, entries, parts_of, unpacked
from artifact.copy import Retry
from artifact.digest import new
from artifact.errors import Invalid, Mismatch, NotFound, TooLarge, Unavailable
from artifact.manifest import DOCKER_LIST, INDEX, MAX_MANIFEST_BYTES, digest_of, parse_json, parse_manifest
from artifact.nim import MAX_BYTES
from artifact.store import Descriptor

PLACES = ("/opt/nim/etc/default/model_manifest.yaml", "/etc/nim/config/model_manifest.yaml")
PATH_VARIABLE = "NIM_MANIFEST_PATH"
PROTOCOL_LABEL = "com.nvidia.nim.model_download_protocol"
DEFAULT_PLATFORM = "linux/amd64"
CONFIG_TYPES = ("application/vnd.oci.image.config.v1+json", "application/vnd.docker.container.image.v1+json")
MAX_LINKS = 8  # each may cost a reading of all layers
MAX_NESTED = 4
_WHITEOUT, _OPAQUE = ".wh.", ".wh..wh..opq"


class Source(Protocol):
    """What is read from: RemoteRegistry, every mirror source and a store on disk behind the same two verbs."""

    def read_manifest(self, repo: str, ref: str) -> tuple[Descriptor, bytes]:
        """A manifest's descriptor and verified bytes."""

    def stream(self, repo: str, digest: str, lo: int, hi: int) -> Iterator[bytes]:
        """Bytes [lo, hi) of a blob; they need not be verified."""


@dataclass(frozen=True)
class Image:
    """One platform's image: repository, manifest digest, layers from the topmost down, and what its config says."""

    repo: str
    digest: str
    layers: tuple[Descriptor, ...]
    env: dict[str, str]
    labels: dict[str, str]


@dataclass(frozen=True)
class Found:
    """A file as it lies in an image: its bytes, the absolute path that was asked for, and the digest of the layer that it came from."""

    raw: bytes
    path: str
    layer: str
    image: str = ""


def find_manifest(source: Source, repo: str, ref: str, platform: str = "") -> Found:
    """The NIM model manifest of an image by tag or digest; raises NotFound `manifest_file` where it has none, `native` where its kind never has.

    Raises what `open_image` and `find` raise besides. `platform` is os/architecture of an index, Linux on x86-64 first where it is empty.
    """
    image = open_image(source, repo, ref, platform)
    protocol = image.labels.get(PROTOCOL_LABEL, "")
    told = image.env.get(PATH_VARIABLE, "")
    places = tuple(dict.fromkeys(p for p in (told, *PLACES) if p.startswith("/") and p.isprintable()))
    if protocol.startswith("native"):
        what = f"{repo} {ref} downloads its model itself ({PROTOCOL_LABEL}={protocol[:40]})"
        raise NotFound(what, expected="an image with a model manifest", do="mirror its model by its own name", reason="native")
    found = find(source, image, places, MAX_BYTES)
    if found is None:
        what = f"{repo} {ref} has no model manifest"
        raise NotFound(what, expected="one of " + ", ".join(places), do="check that it is a NIM image", reason="manifest_file")
    return found


def open_image(source: Source, repo: str, ref: str, platform: str = "") -> Image:
    """An image's manifest and config, of an index the wanted platform's; raises NotFound, Invalid for what is no image, Mismatch."""
    _, raw = source.read_manifest(repo, ref)
    for _ in range(MAX_NESTED):
        manifest = parse_manifest(raw)
        if manifest.media_type not in (INDEX, DOCKER_LIST):
            break
        _, raw = source.read_manifest(repo, _choose(raw, platform, f"{repo} {ref}"))
    else:
        raise TooLarge(f"{repo} {ref} nests indexes deeper than {MAX_NESTED}", expected=f"at most {MAX_NESTED}")
    if manifest.config is None or manifest.config.media_type not in CONFIG_TYPES:
        raise Invalid(f"{repo} {ref} is no container image", expected="a manifest with an image config", do="name the image", reason="image")
    if manifest.config.size > MAX_MANIFEST_BYTES:
        raise TooLarge(f"the config of {repo} {ref} has {manifest.config.size} bytes", expected=f"at most {MAX_MANIFEST_BYTES}")
    config = parse_json(b"".join(_blob(source, repo, manifest.config)), "the image config")
    inner = config.get("config")
    inner = inner if isinstance(inner, dict) else {}
    env, labels = inner.get("Env"), inner.get("Labels")
    pairs = [e.partition("=") for e in env if isinstance(e, str)] if isinstance(env, list) else []
    notes = {str(k): v for k, v in labels.items() if isinstance(v, str)} if isinstance(labels, dict) else {}
    layers = tuple(reversed(manifest.layers))
    return Image(repo, digest_of(raw), layers, {name: value for name, _, value in pairs}, notes)


def _choose(raw: bytes, platform: str, what: str) -> str:
    """The digest of the entry of an index that is for a platform; attestations are none."""
    entries = parse_json(raw, "the index")["manifests"]  # parse_manifest saw that each is a descriptor
    told: list[tuple[str, str]] = []
    for entry in entries if isinstance(entries, list) else []:
        on = entry.get("platform")
        place = f"{on.get('os')}/{on.get('architecture')}" if isinstance(on, dict) else ""
        if "vnd.docker.reference.type" not in (entry.get("annotations") or {}) and place != "unknown/unknown":
            told.append((place, entry["digest"]))
    wanted = (platform,) if platform else (DEFAULT_PLATFORM, "")
    for place in wanted:
        for have, digest in told:
            if have == place:
                return digest
    if not platform and told:
        return told[0][1]
    there = ", ".join(dict.fromkeys(place or "unnamed" for place, _ in told)) or "nothing"
    raise NotFound(f"{what} has no image for {platform or DEFAULT_PLATFORM}", expected=f"one of: {there}"[:300], reason="platform")


def find(source: Source, image: Image, paths: Sequence[str], limit: int) -> Found | None:
    """The first of some absolute paths that is a regular file in the image's merged view, None where none is.

    Raises Invalid for a layer that is no sound tar or that says two things of a path, TooLarge beyond a limit (`limit` bytes for the file), Mismatch
    for bytes that are not the layer's, Unsupported for zstd.
    """
    return _Search(source, image.repo, limit, image.digest).run(image.layers, paths)


class _Search:
    """One search: its limits hold over all layers and links."""

    def __init__(self, source: Source, repo: str, limit: int, image: str) -> None:
        self._source, self._repo, self._limit, self._image = source, repo, limit, image
        self._links = 0

    def run(self, layers: Sequence[Descriptor], paths: Sequence[str]) -> Found | None:
        seekers = [_Seeker(path) for path in paths]
        for i, layer in enumerate(layers):
            active = [s for s in seekers if s.end is None]
            if active:
                _scan(self._source, self._repo, layer, active, self._limit)
            for seeker in active:
                seeker.settle(layer.digest, self._limit)
                seeker.below = layers[i:]
            last = i == len(layers) - 1  # what no layer has is absent
            while seekers and (seekers[0].end is not None or last):
                first = seekers.pop(0)
                found = self._end(first.below, layers, first)
                if found:
                    return found
            if not seekers:
                return None
        return None

    def _end(self, below: Sequence[Descriptor], layers: Sequence[Descriptor], seeker: _Seeker) -> Found | None:
        """What a path came to: a file, nothing, or another path (a hard link is one of its own layer or one below)."""
        entry = seeker.end
        if entry is None or entry.kind == "absent":
            return None
        if entry.kind == "file":
            return Found(bytes(entry.data), seeker.path, entry.layer, self._image)
        self._links += 1
        if self._links > MAX_LINKS:
            raise Invalid(f"{_shown(seeker.parts)} is behind more than {MAX_LINKS} links", expected="a file", reason="layer")
        found = self.run(below if entry.kind == "hard" else layers, [entry.target])
        return Found(found.raw, seeker.path, found.layer, found.image) if found else None


@dataclass
class _Entry:
    """What a layer, and in the end the image, has at a path: dir, file, link, hard, other or absent."""

    kind: str
    target: str = ""
    size: int = 0
    data: bytearray = field(default_factory=bytearray)
    layer: str = ""


class _Seeker:
    """One path on its way down through the layers. Depth k is its first k parts."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.parts = _walk((), path)
        self.end: _Entry | None = None
        self.below: Sequence[Descriptor] = ()  # the layer that was read last and those below it
        self._hidden = len(self.parts) + 1  # what lies at this depth and deeper is hidden in the layers below
        self._dirs: set[int] = set()
        self._hits: dict[int, _Entry] = {}
        self._next = self._hidden

    def take(self, parts: tuple[str, ...], make: Callable[[], _Entry]) -> _Entry | None:
        """Looks at an entry of the layer that is being read and returns it where its bytes are wanted."""
        depth = len(parts)
        name = parts[-1] if parts else ""
        if name.startswith(_WHITEOUT):
            mine = depth <= len(self.parts) and name[len(_WHITEOUT) :] == self.parts[depth - 1]
            if (mine or name == _OPAQUE) and parts[:-1] == self.parts[: depth - 1]:
                self._next = min(self._next, depth)
            return None
        if not 0 < depth <= len(self.parts) or parts != self.parts[:depth]:
            return None
        entry = make()
        before = self._hits.get(depth)
        if before and not before.kind == entry.kind == "dir":
            raise Invalid(f"a layer has {_shown(parts)} twice", expected="each path once", reason="layer")
        self._hits[depth] = entry
        return entry if depth == len(self.parts) and entry.kind == "file" else None

    def settle(self, layer: str, limit: int) -> None:
        """Takes the layer that was read into account; raises Invalid, TooLarge for what the path came to."""
        hits, self._hits = self._hits, {}
        hidden, self._hidden = self._hidden, min(self._hidden, self._next)
        self._next = self._hidden
        for depth in sorted(k for k in hits if k < hidden):
            entry = hits[depth]
            if entry.kind == "dir":
                self._dirs.add(depth)
                continue
            if any(k > depth for k in hits):
                raise Invalid(f"a layer has things below {_shown(self.parts[:depth])}, which is no directory", reason="layer")
            if depth in self._dirs:  # a directory above took its place
                self._hidden = min(self._hidden, depth)
                break
            self._decide(depth, entry, layer, limit)
            return
        if self._hidden <= len(self.parts) or len(self.parts) in self._dirs or not self.parts:
            self.end = _Entry("absent")

    def _decide(self, depth: int, entry: _Entry, layer: str, limit: int) -> None:
        rest = self.parts[depth:]
        if entry.kind == "link":
            self.end = _Entry("link", "/" + "/".join((*_walk(self.parts[: depth - 1], entry.target), *rest)))
        elif rest:
            self.end = _Entry("absent")  # a part of the way is no directory
        elif entry.kind == "hard":
            self.end = _Entry("hard", "/" + entry.target)
        elif entry.kind != "file":
            raise Invalid(f"{_shown(self.parts)} is no regular file in its image", expected="a file", reason="layer")
        elif entry.size > limit:
            raise TooLarge(f"{_shown(self.parts)} has {entry.size} bytes in its image", expected=f"at most {limit}")
        else:
            entry.layer = layer
            self.end = entry


def _shown(parts: Sequence[str]) -> str:
    """A path in words: an image may say any bytes, and links lead anywhere."""
    text = "/" + "/".join(parts)[:200]
    return text if text.isprintable() else repr(text)


def _walk(base: tuple[str, ...], target: str) -> tuple[str, ...]:
    """Where a path leads from a directory, never above the image's root."""
    out = [] if target.startswith("/") else list(base)
    for part in target.split("/"):
        if part == "..":
            del out[-1:]
        elif part not in ("", "."):
            out.append(part)
    return tuple(out)


def _scan(source: Source, repo: str, layer: Descriptor, seekers: Sequence[_Seeker], limit: int) -> None:
    """Reads one layer whole and shows its entries to the seekers; the layer's digest holds when this returns."""
    reader = Reader(unpacked(_blob(source, repo, layer), layer), layer.digest)
    for count, (head, parts) in enumerate(entries(reader)):
        if count >= MAX_ENTRIES:
            raise TooLarge(f"the layer {layer.digest} has more than {MAX_ENTRIES} entries", expected=f"at most {MAX_ENTRIES}")
        wanted = [w for s in seekers if (w := s.take(parts, partial(_entry, head))) is not None]
        if wanted and head.size <= limit:
            raw = reader.take(head.size)
            for entry in wanted:
                entry.data += raw
        else:
            reader.skip(head.size)
        reader.pad(head.size)
    reader.drain()


def _entry(head: Head) -> _Entry:
    if head.kind in (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE) and not head.sparse:
        return _Entry("dir" if head.name.endswith("/") else "file", size=head.size)
    if head.kind == tarfile.LNKTYPE:
        return _Entry("hard", "/".join(parts_of(head.target)))
    kinds = {tarfile.DIRTYPE: "dir", tarfile.SYMTYPE: "link"}
    return _Entry(kinds.get(head.kind, "other"), head.target)


def _blob(source: Source, repo: str, blob: Descriptor) -> Iterator[bytes]:
    """A blob's bytes, fetched on after a break; raises Mismatch at the end where they are not what its digest says."""
    hasher, at, retry = new(blob.digest.split(":", 1)[0]), 0, Retry(threading.Event())
    while at < blob.size:
        try:
            for part in source.stream(repo, blob.digest, at, blob.size):
                if at + len(part) > blob.size:
                    raise Mismatch(f"more than the {blob.size} bytes of {blob.digest}", expected=str(blob.size), digest=blob.digest)
                hasher.update(part)
                at += len(part)
                retry.moved()
                yield part
            if at < blob.size:
                raise Unavailable(f"the source of {blob.digest} ended after {at} of {blob.size} bytes", do="try again")
        except Unavailable as error:
            retry.failed(error)
    if hasher.digest() != blob.digest:
        what = f"{blob.size} bytes have the digest {hasher.digest()}"
        raise Mismatch(what, expected=blob.digest, do="the source or the path to it is damaged", digest=blob.digest)
