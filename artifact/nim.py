"""The model manifest inside a NIM image: its three published shapes read into one form, and the URIs that it names files by; no I/O.

An image's manifest is shipped as it is, byte for byte; this only reads it. Shapes, tags and URIs as operators and users of NIM know them: the parsers
of NVIDIA/k8s-nim-operator (internal/nimparser) and NVIDIA's page "NIM repository override". YAML is read as text alone: no tag makes an object.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from artifact.errors import Invalid, NotFound, TooLarge, Unsupported
from artifact.manifest import MAX_FILES, check_path, check_ref, hub_name, ngc_name, parse_json
from artifact.profile import Pin, Profile

MAX_BYTES = 16 * 1024 * 1024  # published ones exceed 1 MiB
MAX_NODES = 1_000_000
MAX_DEPTH = 32
MAX_PROFILES = 10_000
SCHEMES = ("ngc", "hf", "s3", "gs", "modelscope", "local")
_ID = re.compile(r"[^\s\x00-\x1f\x7f/\\]{1,256}\Z")
_PART = re.compile(r"[A-Za-z0-9_.\-]{1,128}\Z")
_SUM = re.compile(r"(?:([a-z0-9_-]{1,16}):)?([0-9a-fA-F]{16,128})\Z")
_PLAIN_TAGS = ("str", "int", "float", "bool", "null", "seq", "map")


@dataclass(frozen=True)
class NimUri:
    """`ngc://org[/team]/model[:version][?file=path]` taken apart, and its like of the other schemes; `org` is a bucket's name, `file` its key."""

    scheme: str
    org: str
    team: str
    model: str
    version: str
    file: str

    @property
    def target(self) -> str:
        """What is before the version: `org/team/model`."""
        return "/".join(part for part in (self.org, self.team, self.model) if part)

    @property
    def repository(self) -> str:
        """The canonical name under which the model is kept here; raises Unsupported for a scheme whose models have none, Invalid."""
        if self.scheme == "ngc":
            return ngc_name(*self.target.split("/"))
        if self.scheme == "hf":
            return hub_name(self.target)
        raise Unsupported(f"{str(self)[:200]} names no model of NGC or the Hub", expected="ngc:// or hf://", reason="scheme")

    def __str__(self) -> str:
        if self.scheme in ("s3", "gs", "local"):
            return f"{self.scheme}://{'/'.join(p for p in (self.org, self.file) if p)}"
        return f"{self.scheme}://{self.target}{f':{self.version}' if self.version else ''}{f'?file={self.file}' if self.file else ''}"


@dataclass(frozen=True)
class NimFile:
    """One file of a profile: where it comes from, its path in the workspace, and its checksums by algorithm in lower-case hex.

    A URI without a file is all of that version, laid out below `path`; an empty URI says nothing of where the file comes from.
    """

    uri: str
    path: str
    checksums: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class NimProfile:
    """One way to run the image's model: opaque id, tags (all text), the description that people write, and its files in the manifest's order."""

    id: str
    tags: dict[str, str]
    description: str
    files: tuple[NimFile, ...]

    def answers_to(self, name: str) -> bool:
        """Whether a name means this profile: its id, or its description in either of the spellings that NIM prints."""
        if name in (self.id, self.description):
            return True
        return bool(self.tags.get("llm_engine")) and Profile(self.id, self.tags, Pin("", "")).answers_to(name)

    def places(self) -> tuple[NimUri, ...]:
        """The model versions that its files come from, each once, without the files; raises Invalid where a file says nothing of its place."""
        found: dict[NimUri, None] = {}
        for file in self.files:
            if not file.uri:
                raise Invalid(f"profile {self.id} does not say where {file.path[:200]} comes from", expected="repo_id or uri", reason="nim_manifest")
            at = parse_uri(file.uri)
            found[NimUri(at.scheme, at.org, at.team, at.model, at.version, "")] = None
        return tuple(found)


@dataclass(frozen=True)
class NimManifest:
    """A model manifest: its shape (0, 1 or 2) and its profiles in the published order."""

    shape: int
    profiles: tuple[NimProfile, ...]

    def find(self, name: str) -> NimProfile:
        """The one profile that an id or a description means; raises NotFound with what there is, Invalid where two bear the description."""
        found = [p for p in self.profiles if p.id == name] or [p for p in self.profiles if p.answers_to(name)]
        if len(found) == 1:
            return found[0]
        listed = "; ".join(f"{p.id} ({p.description})" for p in (found or self.profiles)[:50])
        if found:
            raise Invalid(f"{len(found)} profiles are called {name[:200]!r}", expected=f"one of the ids: {listed}", reason="profile")
        raise NotFound(f"the image has no profile {name[:200]!r}", expected=f"an id or a description: {listed or 'it has none'}", reason="profile")


def parse_uri(text: str) -> NimUri:
    """A URI of a model manifest, with or without a file; raises Invalid for another scheme, a `.` or `..` part and what is no name."""
    scheme, mark, rest = text.partition("://")
    if not mark or scheme not in SCHEMES:
        raise _bad_uri(text, "a scheme of " + ", ".join(SCHEMES))
    if scheme in ("s3", "gs", "local"):
        bucket, _, key = rest.partition("/") if scheme != "local" else ("", "", rest.removeprefix("/"))
        if (bucket and not _PART.match(bucket)) or (scheme != "local" and not bucket):
            raise _bad_uri(text, f"{scheme}://bucket/key")
        return NimUri(scheme, bucket, "", "", "", _file(key, text) if key else "")
    place, query, file = rest.partition("?")
    if query and not file.startswith("file="):
        raise _bad_uri(text, "?file= and nothing else behind the version")
    target, _, version = place.partition(":")
    parts = target.split("/")
    if not all(_PART.match(part) and part not in (".", "..") for part in parts):
        raise _bad_uri(text, "segments of letters, digits and . _ -")
    if scheme == "ngc" and not version and len(parts) in (4, 5):  # org/team/name/version and org/team/type/name/version, as ModelExpress takes them
        parts, version = [*parts[:2], parts[-2]], parts[-1]
    if len(parts) not in ((2, 3) if scheme == "ngc" else (1, 2)):
        raise _bad_uri(text, "ngc://org[/team]/model:version" if scheme == "ngc" else f"{scheme}://namespace/model:revision")
    if version and (check_ref(version) != version or any(part in ("", ".", "..") for part in version.split("/"))):
        raise _bad_uri(text, "a version without empty, . or .. parts")
    name = file.removeprefix("file=")
    team = parts[1] if len(parts) == 3 else ""
    return NimUri(scheme, parts[0] if len(parts) > 1 else "", team, parts[-1], version, _file(name, text) if query else "")


def _file(name: str, text: str) -> str:
    try:
        return check_path(name)
    except Invalid:
        raise _bad_uri(text, "a file without empty, . or .. parts") from None


def _bad_uri(text: str, expected: str) -> Invalid:
    return Invalid(f"{text[:200]!r} is not a URI of a model manifest", expected=expected, reason="uri")


def parse(raw: bytes) -> NimManifest:
    """A model manifest from untrusted bytes, YAML or JSON; raises Invalid or TooLarge naming the place, Unsupported for YAML without PyYAML."""
    doc = _load(raw)
    if "schema_version" in doc:
        shape, entries = 2, _listed(doc.get("profiles"), "profiles")
    elif isinstance(doc.get("model_profile"), str) and isinstance(doc.get("manifest"), list):
        shape, entries = 0, _listed(doc["manifest"], "manifest")
        if not entries:
            raise _bad("manifest", "at least one profile")
    else:
        shape, entries = 1, [(key, value, key[:80]) for key, value in doc.items()]
    if len(entries) > MAX_PROFILES:
        raise TooLarge(f"the model manifest has {len(entries)} profiles", expected=f"at most {MAX_PROFILES}")
    profiles = tuple(_profile(name, entry, at) for name, entry, at in entries)
    seen: set[str] = set()
    for profile in profiles:
        if profile.id in seen:
            raise _bad(f"profile {profile.id[:80]}", "each id once")
        seen.add(profile.id)
    return NimManifest(shape, profiles)


def _listed(value: object, where: str) -> list[tuple[str, object, str]]:
    """Entries of a list of profiles, either `id: X` with more keys or one key that is the id."""
    if not isinstance(value, list):
        raise _bad(where, "a list of profiles")
    out: list[tuple[str, object, str]] = []
    for i, entry in enumerate(value):
        at = f"{where}[{i}]"
        if not isinstance(entry, dict) or not entry:
            raise _bad(at, "an object with an id")
        if "id" in entry:
            out.append((_text(entry["id"], f"{at}.id"), entry, at))
        elif len(entry) == 1:
            [(name, inner)] = entry.items()
            out.append((name, inner, at))
        else:
            raise _bad(at, "an object with an id")
    return out


def _profile(name: str, entry: object, at: str) -> NimProfile:
    if not isinstance(entry, dict):
        raise _bad(at, "an object")
    if not _ID.match(name) or not name.isprintable() or name in (".", ".."):
        raise _bad(f"{at}: its id {name[:80]!r}", "1 to 256 characters without blanks, / and \\")
    tags = entry.get("tags") or {}
    if not isinstance(tags, dict):
        raise _bad(f"{at}.tags", "an object of words")
    told = {_text(key, f"{at}.tags.{key[:80]}"): _text(value, f"{at}.tags.{key[:80]}") for key, value in tags.items()}
    files = _files(entry.get("workspace") or {}, f"{at}.workspace")
    if len(files) > MAX_FILES:
        raise TooLarge(f"{at} has {len(files)} files", expected=f"at most {MAX_FILES}")
    return NimProfile(name, told, _description(name, told), files)


def _description(name: str, tags: Mapping[str, str]) -> str:
    """The words that NIM prints for a profile, from its tags; of those that run no LLM engine their own name, or what they run on."""
    if tags.get("llm_engine"):
        return Profile(name, dict(tags), Pin("", "")).description
    words = (tags.get("backend") or tags.get("model_type", ""), tags.get("key", ""), tags.get("gpu", "").lower(), tags.get("precision", ""))
    return tags.get("profile_name") or tags.get("name") or "-".join(dict.fromkeys(w for w in words if w)) or name


def _files(workspace: object, at: str) -> tuple[NimFile, ...]:
    if not isinstance(workspace, dict):
        raise _bad(at, "an object with files or components")
    found: dict[tuple[str, str], NimFile] = {}
    files, components = workspace.get("files") or {}, workspace.get("components") or []
    if not isinstance(files, dict) or not isinstance(components, list):
        raise _bad(at, "files as an object, components as a list")
    for path, entry in files.items():
        here = f"{at}.files.{path[:200]}"
        if not isinstance(entry, dict):
            raise _bad(here, "an object with a uri")
        found[path, ""] = NimFile(_uri(entry.get("uri"), here), _path(path, here), _checksums(entry, here))
    for i, component in enumerate(components):
        for file in _component(component, f"{at}.components[{i}]"):
            found[file.path, file.uri] = file
    return tuple(found.values())


def _component(component: object, at: str) -> Iterable[NimFile]:
    if not isinstance(component, dict) or not isinstance(component.get("src") or {}, dict):
        raise _bad(at, "an object with dst and src")
    src: dict[str, Any] = component.get("src") or {}
    dst = _text(component.get("dst") or "", f"{at}.dst").removeprefix("./").rstrip("/")
    base = _text(src.get("repo_id") or "", f"{at}.src.repo_id")
    base = f"ngc://{base}" if base and "://" not in base else base
    if "?" in base:
        raise _bad(f"{at}.src.repo_id", "a model without a file")
    names = src.get("files") or []
    if not isinstance(names, list):
        raise _bad(f"{at}.src.files", "a list of names")
    if dst not in ("", "."):
        _path(dst, f"{at}.dst")
    below = "" if dst in ("", ".") else f"{dst}/"
    for i, value in enumerate(names):
        here = f"{at}.src.files[{i}]"
        name = _text(value, here)
        yield NimFile(_uri(f"{base}?file={name}", here) if base else "", _path(below + name, here))
    if base and not names:
        yield NimFile(_uri(base, f"{at}.src.repo_id"), below.rstrip("/"))


def _uri(value: object, at: str) -> str:
    text = _text(value, f"{at}.uri")
    try:
        parse_uri(text)
    except Invalid as error:
        raise Invalid(f"the model manifest at {at}: {error.what}", expected=error.expected, reason="nim_manifest") from None
    return text


def _path(text: str, at: str) -> str:
    try:
        return check_path(_text(text, at))
    except Invalid:
        raise _bad(at, "a relative path without empty, '.', '..' or '.git' parts") from None


def _checksums(entry: Mapping[str, object], at: str) -> dict[str, str]:
    """`checksum` as hex, BLAKE3 where nothing says another algorithm, or `checksums` by algorithm."""
    several = entry.get("checksums") or {}
    if not isinstance(several, dict):
        raise _bad(f"{at}.checksums", "an object of algorithms")
    told = [f"{key}:{_text(value, f'{at}.checksums.{key[:40]}')}" for key, value in several.items()]
    if entry.get("checksum"):
        told.append(_text(entry["checksum"], f"{at}.checksum"))
    out: dict[str, str] = {}
    for text in told:
        match = _SUM.match(text)
        if not match:
            raise _bad(f"{at}.checksum", "hex digits, with or without an algorithm and a colon before them")
        out[match[1] or {32: "md5", 40: "sha1"}.get(len(match[2]), "blake3")] = match[2].lower()
    return out


def _text(value: object, at: str) -> str:
    # It is printed in tables and errors: nothing that steers a terminal or forges a line.
    if not isinstance(value, str) or len(value) > 4096 or not value.isprintable():
        raise _bad(at, "printable text of at most 4096 characters")
    return value


def _bad(at: str, expected: str) -> Invalid:
    return Invalid(f"the model manifest is not accepted at {at if at.isprintable() else ascii(at)}", expected=expected, reason="nim_manifest")


def _load(raw: bytes) -> dict[str, Any]:
    """The document as objects, lists and text: a number or true is the text that was written, nothing at all is the empty one."""
    if len(raw) > MAX_BYTES:
        raise TooLarge(f"the model manifest has {len(raw)} bytes", expected=f"at most {MAX_BYTES}")
    json = raw.lstrip()[:1] == b"{"
    if json and raw.count(b",") > MAX_NODES:  # parsed, small values take many times their bytes
        raise TooLarge(f"the model manifest has more than {MAX_NODES} values", expected=f"at most {MAX_NODES}")
    value = _plain(parse_json(raw, "the model manifest", MAX_BYTES)) if json else _yaml(raw)
    if not isinstance(value, dict) or not value:
        raise Invalid("the model manifest has no profile", expected="an object of profiles, or one with a list of them", reason="nim_manifest")
    return value


def _plain(value: object, depth: int = 0) -> object:
    if depth > MAX_DEPTH:
        raise _bad(f"depth {MAX_DEPTH}", f"a depth of at most {MAX_DEPTH}")
    if isinstance(value, dict):
        return {key: _plain(inner, depth + 1) for key, inner in value.items()}
    if isinstance(value, list):
        return [_plain(inner, depth + 1) for inner in value]
    return "" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _yaml(raw: bytes) -> object:
    """One YAML document from untrusted bytes, by its events: no recursion, nothing constructed, what an alias stands for counted each time."""
    try:
        import yaml  # the base installation reads JSON alone
    except ImportError:
        do = "pip install 'airlock[mirror]' or 'airlock[registry]'"
        raise Unsupported("a model manifest in YAML needs the module yaml", expected="PyYAML", do=do) from None
    build = _Builder()
    try:
        text = raw.decode("utf-8-sig")
        for event in yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
            build.take(event, yaml)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        told = " ".join(str(error).split())[:300]
        raise Invalid(f"the model manifest is not accepted as YAML: {told}", expected="one YAML document", reason="nim_manifest") from None
    return build.root


class _Builder:
    """Objects, lists and text from YAML events."""

    def __init__(self) -> None:
        self.root: object = ""
        self._open: list[tuple[object, str, list[str]]] = []  # a collection, its anchor, the key that waits for its value
        self._begun: list[int] = []  # how many values there were when it was opened
        self._anchors: dict[str, tuple[object, int]] = {}  # a value and how many it is made of
        self._nodes = self._documents = 0

    def take(self, event: Any, yaml: Any) -> None:
        """The next event; raises Invalid naming its line."""
        line = event.start_mark.line + 1
        if isinstance(event, yaml.DocumentStartEvent):
            self._documents += 1
            if self._documents > 1:
                raise _bad(f"line {line}", "one document")
        elif isinstance(event, yaml.AliasEvent):
            if event.anchor not in self._anchors:
                raise _bad(f"line {line}: the alias {event.anchor[:40]!r}", "an anchor before it, and not around it")
            value, weight = self._anchors[event.anchor]
            self._count(weight, line)
            self._put(value, line)
        elif isinstance(event, yaml.ScalarEvent):
            self._tag(event.tag, line)
            self._count(1, line)
            empty = event.implicit[0] and not event.style and event.value in ("~", "null", "Null", "NULL")
            value = "" if empty else event.value
            if event.anchor:
                self._anchors[event.anchor] = value, 1
            self._put(value, line)
        elif isinstance(event, yaml.CollectionStartEvent):
            self._tag(event.tag, line)
            if len(self._open) >= MAX_DEPTH:
                raise _bad(f"line {line}", f"a depth of at most {MAX_DEPTH}")
            self._open.append(({} if isinstance(event, yaml.MappingStartEvent) else [], event.anchor or "", []))
            self._begun.append(self._nodes)
            self._count(1, line)
        elif isinstance(event, yaml.CollectionEndEvent):
            value, anchor, _ = self._open.pop()
            weight = self._nodes - self._begun.pop()
            if anchor:
                self._anchors[anchor] = value, weight
            self._put(value, line)

    def _count(self, nodes: int, line: int) -> None:
        self._nodes += nodes
        if self._nodes > MAX_NODES:
            raise TooLarge(
                f"the model manifest has more than {MAX_NODES} values at line {line}", expected=f"at most {MAX_NODES}, aliases spelled out"
            )

    def _tag(self, tag: str | None, line: int) -> None:
        """Tags of the manifest's own (`!workspace`, `!name`) say nothing more; one that would make an object is refused."""
        if tag and not (tag.startswith("!") or tag.removeprefix("tag:yaml.org,2002:") in _PLAIN_TAGS):
            raise _bad(f"line {line}: the tag {tag[:60]!r}", "plain values")

    def _put(self, value: object, line: int) -> None:
        if not self._open:
            self.root = value
            return
        into, _, key = self._open[-1]
        if isinstance(into, list):
            into.append(value)
        elif not key:
            if not isinstance(value, str) or value == "<<" or value in into:  # type: ignore[operator]
                raise _bad(f"line {line}: the key {str(value)[:60]!r}", "each key once, as a word, and no merge")
            key.append(value)
        else:
            into[key.pop()] = value  # type: ignore[index]
