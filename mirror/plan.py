"""The plan of a mirror run: strict YAML to frozen items, and the canonical name of every source (docs/format.md section 2); no network here.

An item's `requires: {product, tier, license}` says what its vendor asks for: the run is refused without it (mirror/rights.py), and the closed site
asks its own keys for product and tier. It must accept nothing it does not know: a misspelt key that is silently ignored mirrors the wrong thing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import urlsplit

from artifact.card import load_yaml as load_yaml
from artifact.errors import Invalid, NotFound, TooLarge
from artifact.manifest import check_digest, check_name, check_ref, hub_name, is_commit, is_digest, is_tag, ngc_name
from artifact.upstream import TEXTS, check_product, check_tier

HUB_ENDPOINT = "https://huggingface.co"
NGC_ENDPOINT, NGC_AUTH = "https://api.ngc.nvidia.com", "https://authn.nvidia.com"
MAX_PLAN_BYTES = 1024 * 1024
COMMON_KEYS = ("source", "profiles", "key_env", "ca_file", "requires")
OWN_KEYS = {
    "hf": ("endpoint", "allow", "ignore", "ref"),
    "oci": ("as", "plain_http"),
    "ngc": ("endpoint", "auth_endpoint", "allow", "ignore", "ref"),
    "nim": ("as", "plain_http", "endpoint", "auth_endpoint", "hub_endpoint", "hub_key_env"),
}
KEYS = {kind: (*COMMON_KEYS, *own) for kind, own in OWN_KEYS.items()}

RESERVED_VERSIONS = ("versions", "files", "signature")  # words of NGC's own paths

_ENV = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,127}\Z")
_NGC = re.compile(r"((?:[A-Za-z0-9_.\-]{1,128}/){1,2}[A-Za-z0-9_.\-]{1,128}):([A-Za-z0-9_][A-Za-z0-9_.+\-]{0,127})\Z")
_HOST = re.compile(r"(?:[A-Za-z0-9](?:[A-Za-z0-9.\-]*[A-Za-z0-9])?)(?::[0-9]{1,5})?\Z")


@dataclass(frozen=True)
class Requires:
    """What the vendor of an item asks for: a product that the upstream's key must have, its tier at least, a licence that somebody has accepted."""

    product: str = ""
    tier: str = ""
    license: str = ""


@dataclass(frozen=True)
class Item:
    """One thing to mirror: where from, as which canonical name and ref, with which key variable and profiles.

    What a NIM's image chooses: `files` (these, and those of `also` that there are), with the BLAKE3 that it tells of some in `sums`;
    of the image itself `selectors` and `models`.
    """

    kind: str
    source: str
    base_url: str
    repository: str
    wanted: str
    name: str
    ref: str
    profiles: Path | None = None
    allow: tuple[str, ...] = ("*",)
    ignore: tuple[str, ...] = ()
    key_env: str = ""
    ca_file: str = ""
    requires: Requires = Requires()
    auth_url: str = ""
    files: tuple[str, ...] = ()
    also: tuple[str, ...] = ()
    sums: tuple[tuple[str, str], ...] = ()
    selectors: tuple[str, ...] = ()
    models: Models | None = None


@dataclass(frozen=True)
class Models:
    """Where the models that a NIM names come from: NGC's endpoints, the Hub's and the variable of its key."""

    ngc: str
    auth: str
    hub: str
    hub_key_env: str = ""


@dataclass(frozen=True)
class Plan:
    """All items of a plan file, in its order."""

    items: tuple[Item, ...]


def read_limited(path: Path, what: str) -> str:
    """A small text file; raises NotFound, TooLarge, Invalid."""
    try:
        raw = path.read_bytes() if path.stat().st_size <= MAX_PLAN_BYTES else None
    except OSError as error:
        raise NotFound(f"{what} {path} cannot be read: {error.strerror}", do="check the path", reason="file") from error
    if raw is None:
        raise TooLarge(f"{what} {path} is larger than {MAX_PLAN_BYTES} bytes", expected=f"at most {MAX_PLAN_BYTES} bytes")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise Invalid(f"{what} {path} is not UTF-8", expected="UTF-8 text", reason="plan") from error


def oci_name(host: str, repository: str) -> str:
    """The canonical name of an image of another registry: its host as first segment, `host_port` where there is a port; raises Invalid."""
    if "." not in host and not host.startswith("localhost"):
        raise Invalid(
            f"the registry's host {host!r} has no dot, so its first segment would read as an organisation",
            expected="a full host name",
            do="say `as: <name>` in the plan",
            reason="plan",
        )
    return check_name(f"{host.lower().replace(':', '_')}/{repository}")


def load(path: Path) -> Plan:
    """The plan in a YAML file; raises NotFound, TooLarge, Invalid naming the item and the key."""
    return parse(read_limited(path, "the plan"), path.parent)


def parse(text: str, base: Path) -> Plan:
    """The plan in YAML text, file names relative to `base`; raises Invalid."""
    doc = load_yaml(text, "the plan")
    if not isinstance(doc, Mapping):
        raise Invalid("the plan is not a mapping", expected="the key items with a list", reason="plan")
    _known(doc, ("items",), "the plan")
    entries = doc.get("items")
    if not isinstance(entries, list) or not entries:
        raise Invalid("the plan has no items", expected="items: a list with at least one source", reason="plan")
    items = tuple(_item(entry, f"item {i}", base) for i, entry in enumerate(entries, 1))
    seen: dict[tuple[str, str], int] = {}
    asked: dict[str, tuple[int, Requires]] = {}
    for i, item in enumerate(items, 1):
        first, requires = asked.setdefault(item.name, (i, item.requires))
        if (requires.product, requires.tier) != (item.requires.product, item.requires.tier):
            raise Invalid(
                f"items {first} and {i} require different things for {item.name}", expected="one product and tier for each name", reason="plan"
            )
        other = seen.setdefault((item.name, item.ref), i)
        if other != i:
            raise Invalid(f"items {other} and {i} would both be {item.name}:{item.ref}", expected="one item for each name and ref", reason="plan")
    return Plan(items)


def _known(entry: Mapping[object, object], known: tuple[str, ...], where: str) -> None:
    unknown = sorted(str(k)[:60] for k in entry if k not in known)
    if unknown:
        raise Invalid(f"{where} has unknown keys: {', '.join(unknown)}", expected="known keys: " + ", ".join(sorted(known)), reason="plan")


def _item(entry: object, where: str, base: Path) -> Item:
    if not isinstance(entry, Mapping):
        raise Invalid(f"{where} is not a mapping", expected="a mapping with source", reason="plan")
    source = _text(entry, "source", where)
    kind = source.partition("://")[0]
    if kind not in KEYS:
        raise Invalid(
            f"the source of {where} is {source[:120]!r}",
            expected="hf://namespace/name[@commit or ref], oci://host/name[:tag or @digest], ngc://org[/team]/model:version or nim://host/name:tag",
            reason="plan",
        )
    _known(entry, KEYS[kind], where)
    profiles, key_env = "" if kind == "nim" else _text(entry, "profiles", where), _variable(entry, "key_env", where)
    item = {"hf": _hub_item, "oci": _oci_item, "ngc": _ngc_item, "nim": _nim_item}[kind](entry, source, where)
    item = replace(item, requires=_requires(entry.get("requires", {}), where))
    return replace(item, profiles=base / profiles if profiles else None, key_env=key_env, ca_file=_text(entry, "ca_file", where))


def _requires(entry: object, where: str) -> Requires:
    where = f"requires of {where}"
    if not isinstance(entry, Mapping):
        raise Invalid(f"{where} is not a mapping", expected="product, tier and license, each where the vendor asks for it", reason="plan")
    _known(entry, ("product", "tier", "license"), where)
    license_ = _text(entry, "license", where)
    if len(license_) > TEXTS["license"] or not license_.isprintable():
        raise Invalid(f"the license in {where} is no name of one", expected=f"at most {TEXTS['license']} characters", reason="plan")
    try:
        return Requires(check_product(entry.get("product", "")), check_tier(entry.get("tier", "")), license_)
    except Invalid as error:
        raise Invalid(f"{where}: {error.what}", expected=error.expected, reason="plan") from error


def _hub_item(entry: Mapping[object, object], source: str, where: str) -> Item:
    repo_id, _, wanted = source.removeprefix("hf://").partition("@")
    wanted = check_ref(wanted or "main")
    name = hub_name(repo_id)
    if name.rsplit("/", 1)[-1] == "profiles":
        raise Invalid(f"{where} ends in /profiles, which is reserved", expected="another repository", reason="name")
    ref = check_ref(_text(entry, "ref", where) or ("main" if is_commit(wanted) else wanted))
    endpoint = _url(_text(entry, "endpoint", where) or HUB_ENDPOINT, where)
    allow, ignore = _patterns(entry, "allow", where) or ("*",), _patterns(entry, "ignore", where)
    return Item("hf", source, endpoint, repo_id, wanted, name, ref, allow=allow, ignore=ignore)


def ngc_item(source: str, where: str, endpoint: str, auth: str) -> Item:
    """The item for a version of an NGC model; raises Invalid."""
    found = _NGC.match(source.removeprefix("ngc://"))
    if not found or found[2] in RESERVED_VERSIONS or {".", ".."} & set(found[1].split("/")):
        raise Invalid(f"{where} names no version of an NGC model", expected="ngc://org/model:version or ngc://org/team/model:version", reason="plan")
    name = ngc_name(*found[1].split("/"))
    if name.rsplit("/", 1)[-1] == "profiles":
        raise Invalid(f"{where} ends in /profiles, which is reserved", expected="another model", reason="name")
    return Item("ngc", source, endpoint, found[1], found[2], name, found[2], auth_url=auth)


def _ngc_places(entry: Mapping[object, object], where: str) -> tuple[str, str]:
    """NGC's API and its token service: where one is named that is not NVIDIA's, it is both unless the other is named too."""
    endpoint = _url(_text(entry, "endpoint", where) or NGC_ENDPOINT, where)
    return endpoint, _url(_text(entry, "auth_endpoint", where) or (NGC_AUTH if endpoint == NGC_ENDPOINT else endpoint), where)


def _ngc_item(entry: Mapping[object, object], source: str, where: str) -> Item:
    item = ngc_item(source, where, *_ngc_places(entry, where))
    allow, ignore = _patterns(entry, "allow", where) or ("*",), _patterns(entry, "ignore", where)
    return replace(item, ref=check_ref(_text(entry, "ref", where) or item.ref), allow=allow, ignore=ignore)


def _nim_item(entry: Mapping[object, object], source: str, where: str) -> Item:
    item = _oci_item(entry, "oci://" + source.removeprefix("nim://"), where)
    wanted = entry.get("profiles")
    if not isinstance(wanted, list) or not wanted or not all(isinstance(w, str) and w and w.isprintable() and len(w) <= 300 for w in wanted):
        raise Invalid(
            f"profiles of {where} is no list of profiles",
            expected='ids, descriptions or tags of the profiles to bring, such as ["vllm-bf16-tp1", "llm_engine=vllm,tp=2"], or ["all"]',
            reason="plan",
        )
    hub = _url(_text(entry, "hub_endpoint", where) or HUB_ENDPOINT, where)
    models = Models(*_ngc_places(entry, where), hub, _variable(entry, "hub_key_env", where))
    return replace(item, kind="nim", source=source, selectors=tuple(wanted), models=models)


def _variable(entry: Mapping[object, object], key: str, where: str) -> str:
    value = _text(entry, key, where)
    if value and not _ENV.match(value):
        # What stands there may be the key itself: it is not repeated.
        raise Invalid(
            f"{key} of {where} is not the name of an environment variable", expected="a name such as HF_TOKEN, never the key", reason="plan"
        )
    return value


def _oci_item(entry: Mapping[object, object], source: str, where: str) -> Item:
    rest, at, digest = source.removeprefix("oci://").partition("@")
    host, _, path = rest.partition("/")
    repository, _, tag = path.partition(":")
    if not _HOST.match(host):
        raise Invalid(f"{where} names no registry host", expected="oci://host[:port]/name[:tag or @digest], without user or key", reason="plan")
    if at and not is_digest(digest):
        check_digest(digest)
    if tag and not is_tag(tag):
        raise Invalid(f"{tag[:100]!r} of {where} is not a tag", expected="letters, digits and _ . - (at most 128)", reason="ref")
    check_name(repository)
    plain = entry.get("plain_http", False)
    if not isinstance(plain, bool):
        raise Invalid(f"plain_http of {where} is not true or false", expected="true or false", reason="plan")
    wanted_name = _text(entry, "as", where)
    name = check_name(wanted_name) if wanted_name else oci_name(host, repository)
    base_url = f"{'http' if plain else 'https'}://{host}"
    return Item("oci", source, base_url, repository, digest or tag or "latest", name, tag or "latest")


def _text(entry: Mapping[object, object], key: str, where: str) -> str:
    value = entry.get(key, "")
    if not isinstance(value, str) or any(ord(c) < 32 for c in value):
        raise Invalid(f"{key} of {where} is not text", expected="text on one line", reason="plan")
    return value


def _patterns(entry: Mapping[object, object], key: str, where: str) -> tuple[str, ...]:
    value = entry.get(key, [])
    if not isinstance(value, list) or not all(isinstance(v, str) and v for v in value):
        raise Invalid(f"{key} of {where} is not a list of patterns", expected='a list such as ["*.json"]', reason="plan")
    # `dir/` means everything below it, as the Hub's own clients read it.
    return tuple(v + "*" if v.endswith("/") else v for v in value)


def _url(text: str, where: str) -> str:
    try:
        parts = urlsplit(text)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and not parts.query and not parts.fragment and (parts.port or 1) > 0
    except ValueError:
        valid = False
    if not valid or "@" in text or "\\" in text:
        # A user part may hold a password, so the text is not repeated.
        raise Invalid(
            f"the endpoint of {where} is not a plain http or https URL",
            expected="http(s)://host[:port][/prefix] without user, query or fragment",
            reason="plan",
        )
    return text.rstrip("/")
