"""The bundle's medium without its trust: names of its files, its index, plain-file checks, verified copies (docs/format.md section 7).

Why beside artifact.bundle: what bytes lie where is one question, whether they may enter is another. It must judge no signature and follow no link.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from artifact import digest as digests
from artifact.documents import COMPACT, MAX_DOCUMENTS
from artifact.errors import Invalid, Mismatch, NotFound, TooLarge, Unavailable
from artifact.manifest import (
    MAX_MANIFEST_BYTES,
    PROFILES_TYPE,
    Manifest,
    check_digest,
    check_name,
    check_ref,
    parse_json,
    parse_manifest,
)
from artifact.profile import references
from artifact.trust import MAX_DOCUMENT_BYTES
from artifact.upstream import check_fact

ROLE = "bundles"
MAX_INDEX_BYTES = 128 * 1024 * 1024
CHUNK = 1024 * 1024
KINDS = ("model", "image", "profiles")
RECEIPT = "receipt.json"
MAX_DEPTH = 16
MAX_FACT_BYTES = 16 * 1024
ALLOWED = re.compile(
    r"(?:metadata/(?:timestamp|[1-9][0-9]{0,8}\.(?:root|snapshot|targets|bundles))\.json|targets/bundles/[0-9a-f]{64}\.[1-9][0-9]{0,8}\.json"
    r"|blobs/sha256/(?P<two>[0-9a-f]{2})/(?P=two)[0-9a-f]{62}|receipt\.json)\Z"
)
_DIRECTORY = re.compile(r"(?:metadata|targets(?:/bundles)?|blobs(?:/sha256(?:/[0-9a-f]{2})?)?)\Z")


@dataclass(frozen=True)
class BundleName:
    """One name that a bundle moves: repository, ref, manifest digest and media type, display form, kind model|image|profiles."""

    name: str
    ref: str
    digest: str
    media_type: str
    display: str = ""
    kind: str = "image"

    def as_json(self) -> dict[str, object]:
        """The entry of the index."""
        return dict(vars(self))


@dataclass(frozen=True)
class BundleIndex:
    """A verified index: what the bundle says, and whether the receiver has stored it (`known`) or something newer (`older`)."""

    names: tuple[BundleName, ...]
    objects: dict[str, int]
    upstream: tuple[dict[str, object], ...]
    sequence: int
    sender: str
    created: float = 0.0
    older: bool = False
    known: bool = False
    digest: str = ""
    listed: tuple[int, ...] = ()
    documents: tuple[str, ...] = ()
    scratch: Path | None = field(default=None, repr=False)
    state: Path | None = field(default=None, repr=False)

    def commit(self) -> None:
        """Moves the receiver's TUF state forward; called after the content is in, never for an older bundle."""
        if self.older or self.scratch is None or self.state is None:
            return
        self.state.mkdir(parents=True, exist_ok=True)
        roots = sorted((self.scratch / "root_history").iterdir())
        (self.state / "root_history").mkdir(exist_ok=True)
        for source in roots:
            replace_file(self.state / "root_history" / source.name, source.read_bytes())
        for name in ("targets.json", f"{ROLE}.json", "snapshot.json", "timestamp.json"):
            replace_file(self.state / name, (self.scratch / name).read_bytes())


def object_path(directory: Path, digest: str) -> Path:
    """Where an object lies on the medium; raises Invalid."""
    hexadecimal = check_digest(digest).removeprefix("sha256:")
    if len(hexadecimal) != 64:
        raise Invalid(f"{digest} cannot travel in a bundle", expected="a sha256 digest", reason="digest")
    return directory / "blobs" / "sha256" / hexadecimal[:2] / hexadecimal


def replace_file(path: Path, raw: bytes) -> None:
    """Puts small bytes under a name, whole or not at all, durable; raises OSError."""
    temporary = path.with_name(f"{path.name}.partial")
    with temporary.open("wb") as out:
        out.write(raw)
        out.flush()
        os.fsync(out.fileno())
    temporary.replace(path)


def load_index(raw: bytes) -> BundleIndex:
    """An index from untrusted bytes whose hash TUF has vouched for; raises Invalid."""
    doc = parse_json(raw, "the bundle's index", MAX_INDEX_BYTES)
    if doc.get("schema") != 1:
        raise Invalid(f"the bundle's index is of schema {doc.get('schema')!r}", expected="1", do="update Airlock")
    sequence, sender, created = doc.get("sequence"), doc.get("sender"), doc.get("created")
    names, objects, upstream = doc.get("names"), doc.get("objects"), doc.get("upstream", [])
    if type(sequence) is not int or sequence < 1 or not isinstance(sender, str) or not isinstance(created, int | float):
        raise Invalid("the bundle's index lacks its sequence, sender or time", expected="sequence from 1, sender, created")
    if (
        not isinstance(names, list)
        or not isinstance(objects, list)
        or not isinstance(upstream, list)
        or not all(isinstance(u, dict) for u in upstream)
    ):
        raise Invalid("the bundle's index lacks its lists", expected="names, objects and upstream")
    sizes: dict[str, int] = {}
    for item in objects:
        size, text = (item.get("size"), item.get("digest")) if isinstance(item, Mapping) else (None, None)
        if not isinstance(text, str) or type(size) is not int or size < 0 or text in sizes:
            raise Invalid("an object of the index is no digest and size, or stands there twice", expected="each digest once, with its size in bytes")
        object_path(Path(), text)
        sizes[text] = size
    if any(len(json.dumps(u, ensure_ascii=False).encode()) > MAX_FACT_BYTES for u in upstream):
        raise TooLarge("the upstream facts of a name are too long", expected=f"at most {MAX_FACT_BYTES} bytes each")
    moved = tuple(_name(item) for item in names)
    if len({(n.name, n.ref) for n in moved}) != len(moved):
        raise Invalid("the bundle's index gives one name twice", expected="each name and ref once")
    if not {(f.name, f.ref, f.digest) for f in map(check_fact, upstream)} <= {(n.name, n.ref, n.digest) for n in moved}:
        # What an artefact requires is told by the bundle that brings it: nobody says it of a name that is not here.
        raise Invalid("the index tells facts of a name that it does not move", expected="facts of its own names only", reason="upstream")
    digest = "sha256:" + hashlib.sha256(raw).hexdigest()
    documents = _documents(doc.get("documents", []))
    return BundleIndex(moved, sizes, tuple(upstream), sequence, sender, float(created), digest=digest, documents=documents)


def _documents(value: object) -> tuple[str, ...]:
    """Signed documents that travel with the names, as text: what they say is judged by who takes them in."""
    if not isinstance(value, list) or len(value) > MAX_DOCUMENTS:
        raise Invalid("the documents of the index are no list", expected=f"at most {MAX_DOCUMENTS} compact JWS", reason="documents")
    for token in value:
        if not isinstance(token, str) or len(token) > MAX_DOCUMENT_BYTES or not COMPACT.match(token):
            raise Invalid("a document of the index is no compact JWS", expected=f"at most {MAX_DOCUMENT_BYTES} bytes", reason="documents")
    if len(set(value)) != len(value):
        raise Invalid("the index holds one document twice", expected="each once", reason="documents")
    return tuple(value)


def _name(item: object) -> BundleName:
    fields = ("name", "ref", "digest", "media_type", "display", "kind")
    values = [item.get(k, "") for k in fields] if isinstance(item, Mapping) else []
    texts = [v for v in values if isinstance(v, str)]
    if len(texts) != len(fields) or texts[5] not in KINDS or len(texts[4]) > 300 or not texts[4].isprintable():
        raise Invalid("a name of the index is incomplete", expected="name, ref, digest, media_type, display and kind " + "|".join(KINDS))
    return BundleName(check_name(texts[0]), check_ref(texts[1]), check_digest(texts[2]), *texts[3:])


def inventory(directory: Path, finished: bool = True) -> dict[str, int]:
    """Every file of a medium with its size; raises Invalid for a link, a device, a foreign name, and (if finished) an unfinished file."""
    out: dict[str, int] = {}
    pending = [""]
    while pending:
        base = pending.pop()
        with os.scandir(directory / base) as entries:
            for entry in entries:
                path = f"{base}/{entry.name}".lstrip("/")
                info = entry.stat(follow_symlinks=False)
                if stat.S_ISDIR(info.st_mode) and _DIRECTORY.match(path):
                    pending.append(path)
                elif not finished and path.endswith(".partial") and stat.S_ISREG(info.st_mode):
                    out[path] = -1
                elif stat.S_ISREG(info.st_mode) and ALLOWED.match(path):
                    out[path] = info.st_size
                else:
                    kind = "" if stat.S_ISREG(info.st_mode) else "link, folder or device "
                    raise Invalid(
                        f"the {kind}{path[:200]!r} does not belong to a bundle",
                        expected="the files of docs/format.md section 7 only",
                        reason="foreign_file",
                    )
    return out


def check_objects(present: Mapping[str, int], index: BundleIndex) -> None:
    wanted = {str(object_path(Path(), d)): size for d, size in index.objects.items()}
    for path in sorted(p for p in present if p.startswith("blobs/")):
        if path not in wanted:
            raise Mismatch(f"{path} is named by no list", expected="only objects of the index", reason="foreign_file")
        if present[path] != wanted[path]:
            raise Mismatch(
                f"{path} has {present[path]} bytes", expected=f"{wanted[path]} bytes", do="copy it again from the mirror", reason="bundle_object"
            )


def check_space(directory: Path, need: int) -> None:
    """Returns if `need` bytes fit onto the file system of the directory; raises Unavailable with both numbers."""
    free = shutil.disk_usage(directory).free
    if need > free:
        raise Unavailable(
            f"{directory} has {free} bytes free, {need} are needed",
            expected=f"at least {need} bytes free",
            do="use a larger medium, or free space",
            reason="space",
        )


def copy_object(source: Path, target: Path, digest: str, size: int, progress: Callable[[int], None]) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(target.name + ".partial")
    hasher = digests.new()
    try:
        with source.open("rb", buffering=0) as read, temporary.open("wb", buffering=0) as out:
            buffer = memoryview(bytearray(CHUNK))
            while n := read.readinto(buffer):
                hasher.update(buffer[:n])
                out.write(buffer[:n])
                progress(n)
            if hasher.offset != size or hasher.digest() != digest:
                raise Mismatch(f"{digest} in staging does not match its digest", do="run airlock mirror sync again", reason="staging")
            os.fsync(out.fileno())
        temporary.replace(target)
    except FileNotFoundError as error:
        raise NotFound(f"{digest} is not in staging", do="run airlock mirror sync again") from error
    except OSError as error:
        raise Unavailable(
            f"{target.name} cannot be copied: {error.strerror}", expected="a writable medium", do="run the same command again"
        ) from error
    except Mismatch:
        temporary.unlink(missing_ok=True)
        raise


def sync_directories(directory: Path) -> None:
    for base in (directory, *(p for p in directory.rglob("*") if p.is_dir())):
        fd = os.open(base, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


# ---- what names reach ----


@dataclass
class Closure:
    """What a set of names reaches: manifests by repository, children first; blobs with sizes; digests that nobody could give."""

    manifests: dict[tuple[str, str], Manifest] = field(default_factory=dict)
    blobs: dict[str, int] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)

    def objects(self) -> dict[str, int]:
        """Every digest reached, with its size in bytes."""
        return self.blobs | {digest: len(m.raw) for (_, digest), m in self.manifests.items()}


def closure(names: Iterable[tuple[str, str, str]], read: Callable[[str, int], bytes | None]) -> Closure:
    """Follows (name, digest, media type) through OCI edges and profile references (D5); raises Invalid, TooLarge.

    `read(digest, limit)` gives verified bytes of a manifest or document, or None where it is absent: then the digest is listed as missing.
    """
    out = Closure()
    for name, digest, media_type in names:
        _reach(out, name, digest, media_type, read, 0)
    return out


def _reach(out: Closure, name: str, digest: str, media_type: str, read: Callable[[str, int], bytes | None], depth: int) -> None:
    if (name, digest) in out.manifests or digest in out.missing:
        return
    if depth > MAX_DEPTH:
        raise Invalid(f"the manifests below {name} are nested deeper than {MAX_DEPTH}", expected="a shallow graph", reason="manifest")
    raw = read(digest, MAX_MANIFEST_BYTES)
    if raw is None:
        out.missing[digest] = f"manifest of {name}"
        return
    manifest = parse_manifest(raw, media_type)
    for child in manifest.manifests:
        _reach(out, name, child.digest, child.media_type, read, depth + 1)
    for blob in manifest.blobs():
        if out.blobs.setdefault(blob.digest, blob.size) != blob.size:
            raise Invalid(f"{blob.digest} is given two sizes", expected="one size for one digest", reason="manifest")
        if blob.media_type != PROFILES_TYPE:
            continue
        document = read(blob.digest, MAX_MANIFEST_BYTES)
        if document is None:
            out.missing[blob.digest] = f"profile document of {name}"
            continue
        for pin in references(document, PROFILES_TYPE):
            _reach(out, pin.name, pin.digest, "", read, depth + 1)
    out.manifests[name, digest] = manifest  # after its children: the order in which a store can take them
