"""References, descriptors and manifests: parsing and building; raw bytes are kept, nothing is ever re-serialised; no I/O.

The grammar of names is docs/format.md section 2; the model revision (D1, D2) is section 3.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from artifact.errors import Invalid, TooLarge
from artifact.store import Descriptor, File

MANIFEST = "application/vnd.oci.image.manifest.v1+json"
INDEX = "application/vnd.oci.image.index.v1+json"
DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_LIST = "application/vnd.docker.distribution.manifest.list.v2+json"
MANIFEST_TYPES = (MANIFEST, INDEX, DOCKER_MANIFEST, DOCKER_LIST)
EMPTY_CONFIG = "application/vnd.oci.empty.v1+json"
EMPTY_BYTES = b"{}"
EMPTY_DIGEST = "sha256:44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"
MODEL_TYPE = "application/vnd.cncf.model.manifest.v1+json"
FACTS_TYPE = "application/vnd.airlock.model.facts.v1+json"
PROFILES_TYPE = "application/vnd.airlock.profiles.v1+json"
TITLE = "org.opencontainers.image.title"
FILEPATH = "org.cncf.model.filepath"
LFS = "dev.airlock.lfs"
SOURCE = "dev.airlock.source"
COMMIT = "dev.airlock.commit"
PARENT = "dev.airlock.parent"
MAX_MANIFEST_BYTES = 4 * 1024 * 1024
MAX_FILES = 10_000
RESERVED_SEGMENTS = frozenset({"airlock", "api", "healthz", "livez", "metrics", "proxy_auth", "readyz", "token", "v1", "v2", "v3"})

_NAME = re.compile(r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*(?:/[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*)*\Z")
_TAG = re.compile(r"[a-zA-Z0-9_][a-zA-Z0-9._-]{0,127}\Z")
_DIGEST = re.compile(r"(?:sha256:[0-9a-f]{64}|sha512:[0-9a-f]{128})\Z")
_HUB_ID = re.compile(r"(?:[A-Za-z0-9_.\-]{1,96}/)?[A-Za-z0-9_.\-]{1,96}\Z")
_NGC_PART = re.compile(r"[A-Za-z0-9_.\-]{1,128}\Z")
_COMMIT = re.compile(r"[0-9a-f]{40}\Z")
_WEIGHTS = (".safetensors", ".gguf", ".onnx", ".onnx_data", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".npz", ".npy", ".engine")
_DOCS = (".md", ".txt", ".rst", ".pdf", ".png", ".jpg", ".jpeg", ".gif", ".svg")
_CODE = (".py", ".sh", ".ipynb", ".js", ".ts", ".c", ".cc", ".cpp", ".cu")


@dataclass(frozen=True)
class Reference:
    """A repository with a ref or a digest: `name:ref` or `name@digest`."""

    name: str
    ref: str

    def __str__(self) -> str:
        return f"{self.name}@{self.ref}" if is_digest(self.ref) else f"{self.name}:{self.ref}"


def is_digest(text: str) -> bool:
    """Whether the text is a digest this product accepts (sha256 or sha512, lower-case hex)."""
    return bool(_DIGEST.match(text))


def is_tag(text: str) -> bool:
    """Whether the text is in the OCI tag grammar."""
    return bool(_TAG.match(text))


def is_name(text: str) -> bool:
    """Whether the text is a canonical repository name."""
    return len(text) <= 255 and bool(_NAME.match(text)) and text.split("/", 1)[0] not in RESERVED_SEGMENTS


def is_commit(text: str) -> bool:
    """Whether the text is a 40-hex commit id."""
    return bool(_COMMIT.match(text))


def check_digest(text: str) -> str:
    """The digest itself; raises Invalid."""
    if not is_digest(text):
        raise Invalid(f"{text[:100]!r} is not a digest", expected="sha256: and 64, or sha512: and 128 lower-case hex digits", reason="digest")
    return text


def check_name(text: str) -> str:
    """The canonical repository name itself; raises Invalid (OCI distribution-spec grammar, at most 255 bytes, no reserved first segment)."""
    if len(text) > 255 or not _NAME.match(text):
        raise Invalid(
            f"{text[:100]!r} is not a repository name",
            expected="lower-case segments of letters, digits and . _ - separated by /, at most 255 characters",
            reason="name",
        )
    if text.split("/", 1)[0] in RESERVED_SEGMENTS:
        raise Invalid(f"the first segment of {text!r} is reserved", expected="another first segment", do="see docs/format.md", reason="name")
    return text


def check_pattern(pattern: str) -> str:
    """A grant pattern itself: a repository name in which * is a part of a segment, and ** as the last one any rest; raises Invalid."""
    segments = pattern.split("/")
    plain = "/".join("x" if s == "**" and i == len(segments) - 1 else s.replace("*", "x") for i, s in enumerate(segments))
    if "**" in "/".join(segments[:-1]) or ("**" in segments[-1] and segments[-1] != "**"):
        raise Invalid(f"the pattern {pattern[:100]!r} has ** where it means nothing", expected="** as the last segment only", reason="pattern")
    check_name(plain)
    return pattern


def hub_name(repo_id: str) -> str:
    """The canonical name `hf/<id>` of a Hub id: lower case, what the grammar refuses escaped (docs/format.md section 2); raises Invalid."""
    if not _HUB_ID.match(repo_id) or "--" in repo_id or ".." in repo_id or repo_id.endswith(".git"):
        raise Invalid(
            f"{repo_id[:100]!r} is not a Hub id", expected="namespace/name of letters, digits and - _ . without '--' or '..'", reason="name"
        )
    return check_name("/".join(("hf", *(_hub_segment(part) for part in repo_id.lower().split("/")))))


def ngc_name(*parts: str) -> str:
    """The canonical name `ngc/<org>[/<team>]/<model>` of an NGC model: lower case, escaped as a Hub id is; raises Invalid."""
    if not 2 <= len(parts) <= 3 or not all(_NGC_PART.match(part) for part in parts):
        raise Invalid(f"{'/'.join(parts)[:100]!r} is not an NGC name", expected="org/model or org/team/model", reason="name")
    return check_name("/".join(("ngc", *(_hub_segment(part.lower()) for part in parts))))


def _hub_segment(part: str) -> str:
    def escape(match: re.Match[str]) -> str:
        run, start, end = match.group(), match.start() == 0, match.end() == len(part)
        if not (start or end) and run in (".", "_", "__", "-"):
            return run
        code = "x" + run.encode().hex()
        # A Hub id holds no '--', so two dashes mark an escape; three mark one at the start, where no dash may stand first, and four a whole segment.
        return code + "----0" if start and end else code + "---" if start else "--" + code + ("" if end else "-")

    return re.sub(r"[._\-]+", escape, part)


def check_ref(text: str) -> str:
    """A ref name itself: UTF-8 of at most 255 bytes without control characters; raises Invalid."""
    raw = text.encode("utf-8", "surrogatepass")
    if not 0 < len(raw) <= 255 or any(ord(c) < 32 or ord(c) == 127 or 0xD800 <= ord(c) <= 0xDFFF for c in text):
        raise Invalid(f"{text[:100]!r} is not a ref name", expected="1 to 255 bytes of UTF-8 without control characters", reason="ref")
    return text


def check_path(text: str) -> str:
    """A file path of a model: relative POSIX, at most 1,024 bytes, no empty, `.`, `..` or `.git` part, no backslash or control character."""
    parts = text.split("/")
    bad = any(p in ("", ".", "..") or p.casefold() == ".git" for p in parts)
    if (
        bad
        or "\\" in text
        or any(ord(c) < 32 or ord(c) == 127 or 0xD800 <= ord(c) <= 0xDFFF for c in text)
        or len(text.encode("utf-8", "replace")) > 1024
    ):
        raise Invalid(f"{text[:100]!r} is not a model file path", expected="a relative path without empty, '.', '..' or '.git' parts", reason="path")
    return text


def parse_reference(text: str, default_ref: str = "latest") -> Reference:
    """`name[:ref]` or `name@digest` as a Reference; raises Invalid."""
    if "@" in text:
        name, _, digest = text.partition("@")
        return Reference(check_name(name), check_digest(digest))
    slash = text.rfind("/")
    colon = text.find(":", slash + 1)
    if colon < 0:
        return Reference(check_name(text), default_ref)
    return Reference(check_name(text[:colon]), check_ref(text[colon + 1 :]))


def canonical_json(value: object) -> bytes:
    """Compact JSON with sorted keys, UTF-8, as hashed and signed here (docs/format.md section 1)."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode("utf-8")


def digest_of(raw: bytes, algorithm: str = "sha256") -> str:
    """The digest of small bytes that are in memory (manifests, documents); files go through artifact.digest."""
    return f"{algorithm}:{hashlib.new(algorithm, raw).hexdigest()}"


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):  # 1e400: what no JSON of ours could say again
        raise ValueError(f"{text[:40]} is out of range")
    return value


def no_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """The object of a JSON text, as object_pairs_hook; raises ValueError for a key that is there twice."""
    out = dict(pairs)
    if len(out) != len(pairs):
        raise ValueError("duplicate key")
    return out


def _no_constant(name: str) -> object:
    raise ValueError(f"{name} is not JSON")


def parse_json(raw: bytes, what: str, limit: int = MAX_MANIFEST_BYTES) -> dict[str, object]:
    """A JSON object from untrusted bytes: bounded size and depth, no duplicate keys, NaN or BOM; raises Invalid, TooLarge."""
    if len(raw) > limit:
        raise TooLarge(f"{what} has {len(raw)} bytes", expected=f"at most {limit}")
    depth = deepest = 0
    for byte in raw if raw.count(b"[") + raw.count(b"{") > 512 else b"":
        if byte in b"[{":
            depth += 1
            deepest = max(deepest, depth)
        elif byte in b"]}":
            depth -= 1
    if deepest > 512:  # a bound on brackets, strings included: safe for the recursive parser, generous for real documents
        raise Invalid(f"{what} is nested too deeply", expected="a depth of at most 512")
    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=no_duplicates, parse_constant=_no_constant, parse_float=_finite)
        if b"\\u" in raw:
            json.dumps(value, ensure_ascii=False).encode("utf-8")  # an escaped lone surrogate is text that no file system or database takes
    except (ValueError, RecursionError) as error:
        raise Invalid(f"{what} is not valid JSON: {error}", expected="one UTF-8 JSON object without duplicate keys") from error
    if not isinstance(value, dict):
        raise Invalid(f"{what} is not a JSON object", expected="an object")
    return value


def parse_descriptor(value: object, what: str) -> Descriptor:
    """An OCI descriptor from untrusted JSON; raises Invalid."""
    if not isinstance(value, Mapping):
        raise Invalid(f"{what} is not a descriptor", expected="an object with mediaType, digest and size")
    media, digest, size = value.get("mediaType"), value.get("digest"), value.get("size")
    if not isinstance(media, str) or not isinstance(digest, str) or type(size) is not int or not 0 <= size < 1 << 63:
        raise Invalid(f"{what} is not a descriptor", expected="mediaType and digest as strings, size as a whole number from 0")
    notes = value.get("annotations") or {}
    kind = value.get("artifactType") or ""
    if not isinstance(notes, Mapping) or not all(isinstance(k, str) and isinstance(v, str) for k, v in notes.items()) or not isinstance(kind, str):
        raise Invalid(f"the annotations of {what} are not text", expected="an object of strings")
    return Descriptor(media, check_digest(digest), size, kind, dict(notes))


@dataclass(frozen=True)
class Manifest:
    """A parsed manifest or index beside its raw bytes, which alone are stored and served."""

    raw: bytes
    digest: str
    media_type: str
    artifact_type: str
    config: Descriptor | None
    layers: tuple[Descriptor, ...]
    manifests: tuple[Descriptor, ...]
    subject: Descriptor | None
    annotations: dict[str, str]

    def own(self) -> tuple[Descriptor, ...]:
        """The blobs that this manifest points at, config first; neither its manifests nor its subject."""
        return (*((self.config,) if self.config else ()), *self.layers)

    def blobs(self) -> tuple[Descriptor, ...]:
        """Those of `own` that must be there; layers that need not be pushed, since their licence may forbid it, are left out."""
        return tuple(d for d in self.own() if "nondistributable" not in d.media_type and ".foreign." not in d.media_type)


def parse_manifest(raw: bytes, media_type: str = "", algorithm: str = "sha256") -> Manifest:
    """A manifest or index from untrusted bytes; raises Invalid, TooLarge (OCI image-spec v1.1 manifest.md, image-index.md)."""
    doc = parse_json(raw, "the manifest")
    stated = doc.get("mediaType", media_type or (INDEX if "manifests" in doc else MANIFEST))
    if not isinstance(stated, str) or (media_type and stated != media_type):
        raise Invalid("the Content-Type differs from the manifest's mediaType", expected=str(stated)[:100], reason="manifest")
    if stated not in MANIFEST_TYPES:
        raise Invalid(f"manifests of type {stated[:100]!r} are not accepted", expected=", ".join(MANIFEST_TYPES), reason="manifest")
    if doc.get("schemaVersion") != 2:
        raise Invalid("schemaVersion is not 2", expected="2", reason="manifest")
    is_index = stated in (INDEX, DOCKER_LIST)
    if ("manifests" in doc) != is_index or (is_index and ("layers" in doc or "config" in doc)):
        raise Invalid("the manifest mixes the fields of an index and an image", expected="manifests, or config and layers", reason="manifest")
    children = _descriptors(doc, "manifests" if is_index else "layers")
    config = None if is_index else parse_descriptor(doc.get("config"), "config")
    subject = parse_descriptor(doc["subject"], "subject") if doc.get("subject") is not None else None
    notes = doc.get("annotations") or {}
    if not isinstance(notes, dict) or not all(isinstance(v, str) for v in notes.values()):
        raise Invalid("the annotations are not text", expected="an object of strings", reason="manifest")
    kind = doc.get("artifactType") or (config.media_type if config else "")
    if not isinstance(kind, str):
        raise Invalid("artifactType is not text", expected="a string", reason="manifest")
    if any("\0" in value for value in (kind, *notes.values())):
        raise Invalid("the manifest has a NUL in artifactType or an annotation", expected="text that a database holds", reason="manifest")
    layers, manifests = ((), children) if is_index else (children, ())
    return Manifest(raw, digest_of(raw, algorithm), stated, kind, config, layers, manifests, subject, notes)


def own_type(manifest: Manifest) -> str:
    """The type that a manifest's bytes have by themselves: their mediaType, else OCI's, since Docker's must state it (image-spec v1.1, v2-2.md)."""
    return manifest.media_type if manifest.media_type in (MANIFEST, INDEX) else parse_manifest(manifest.raw).media_type


def _descriptors(doc: Mapping[str, object], key: str) -> tuple[Descriptor, ...]:
    values = doc.get(key)
    if not isinstance(values, list):
        raise Invalid(f"{key} is not a list", expected="a list of descriptors", reason="manifest")
    return tuple(parse_descriptor(v, f"{key}[{i}]") for i, v in enumerate(values))


def content_kind(path: str) -> str:
    """The ModelPack layer media type of a model file, a pure function of its path (docs/format.md section 3)."""
    lower = path.lower()
    name = lower.rsplit("/", 1)[-1]
    if lower.endswith(_WEIGHTS):
        kind = "weight"
    elif lower.endswith(_CODE):
        kind = "code"
    elif name.startswith(("readme", "license", "licence", "notice", "use_policy")) or (
        lower.endswith(_DOCS) and name not in ("vocab.txt", "merges.txt")
    ):
        kind = "doc"
    else:
        kind = "weight.config"
    return f"application/vnd.cncf.model.{kind}.v1.raw"


def build_model(files: Iterable[File], facts: Descriptor, annotations: Mapping[str, str]) -> bytes:
    """The raw model manifest of D1: files sorted by UTF-8 bytes of their path, the facts layer last; raises TooLarge, Invalid."""
    ordered = sorted(files, key=lambda f: f.path.encode())
    if len(ordered) > MAX_FILES:
        raise TooLarge(f"the model has {len(ordered)} files", expected=f"at most {MAX_FILES} files")
    seen: set[str] = set()
    layers: list[dict[str, object]] = []
    for file in ordered:
        folded = check_path(file.path).casefold()
        if folded in seen:
            raise Invalid(f"two files are named {file.path!r} but for letter case", expected="names that differ on every file system", reason="path")
        seen.add(folded)
        notes = {TITLE: file.path, FILEPATH: file.path} | ({LFS: "1"} if file.lfs else {})
        layers.append(Descriptor(content_kind(file.path), file.digest, file.size, annotations=notes).as_json())
    layers.append(facts.as_json())
    return build_manifest(MODEL_TYPE, layers, annotations)


def build_manifest(artifact_type: str, layers: list[dict[str, object]], annotations: Mapping[str, str], subject: Descriptor | None = None) -> bytes:
    """An OCI image manifest with the empty config, in canonical JSON; raises TooLarge beyond 4 MiB."""
    doc: dict[str, object] = {
        "schemaVersion": 2,
        "mediaType": MANIFEST,
        "artifactType": artifact_type,
        "config": {"mediaType": EMPTY_CONFIG, "digest": EMPTY_DIGEST, "size": 2},
        "layers": layers,
    }
    if subject:
        doc["subject"] = subject.as_json()
    if annotations:
        doc["annotations"] = dict(annotations)
    raw = canonical_json(doc)
    if len(raw) > MAX_MANIFEST_BYTES:
        raise TooLarge(f"the manifest has {len(raw)} bytes", expected=f"at most {MAX_MANIFEST_BYTES} (about 10,000 files)")
    return raw


def files_of(manifest: Manifest) -> tuple[File, ...]:
    """The files of a model manifest, from its titled layers; raises Invalid for a hostile path, two paths of one layer or a case clash."""
    out: list[File] = []
    seen: set[str] = set()
    for layer in manifest.layers:
        given, title = layer.annotations.get(FILEPATH), layer.annotations.get(TITLE)
        if given is not None and title is not None and given != title:  # two readers would see two different trees
            raise Invalid(f"a layer is titled {title[:100]!r} and has the path {given[:100]!r}", expected="one and the same", reason="path")
        path = given or title
        if path is None:
            continue
        if check_path(path).casefold() in seen:
            raise Invalid(f"two files are named {path!r} but for letter case", expected="one file of each name", reason="path")
        seen.add(path.casefold())
        out.append(File(path, layer.digest, layer.size, layer.annotations.get(LFS) == "1"))
    return tuple(out)


def derived_commit(parent: str, root: str, message: str, author: str) -> str:
    """The 40-hex commit id of a revision whose source has none: a pure function of its content (decisions.md D2)."""
    return hashlib.sha256(b"airlock commit v1\0" + canonical_json([parent, root, message, author])).hexdigest()[:40]


def files_root(files: Iterable[File]) -> str:
    """One digest over the sorted (path, digest, size) of a model's files: the `root` of derived_commit."""
    return digest_of(canonical_json([[f.path, f.digest, f.size] for f in sorted(files, key=lambda f: f.path.encode())]))
