"""What this mirror knows of its upstreams: whose key each one is, what its account has bought and until when, who accepted which licence when.

Records of the mirror's home, told by its operator; the keys themselves stay in their variables. It must never hold a key: a key's id is an HMAC
with a secret of this mirror, the same at every run, from which nobody gets the key or compares it with other mirrors'.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import secrets
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from artifact.errors import AirlockError, Conflict, Invalid, NotFound, TooLarge
from artifact.manifest import hub_name, ngc_name, parse_json
from artifact.medium import replace_file
from artifact.upstream import LATEST, TEXTS, check_product, check_tier
from mirror.home import MirrorHome

_T = TypeVar("_T", bound="Key | Acceptance")
SOURCES = ("hf", "oci", "ngc")
FILE = "upstream.json"
SECRET = "key-id.secret"  # noqa: S105 - a file's name
MAX_BYTES = 16 * 1024 * 1024
MAX_EVIDENCE = 16 * 1024 * 1024
MAX_WORDS = 1000


@dataclass(frozen=True)
class Key:
    """One key of an upstream: `key_id` and the variable it lies in, never the key; the declared facts, and who the upstream says it is."""

    name: str
    key_id: str
    variable: str
    source: str
    org: str
    products: tuple[str, ...] = ()
    tier: str = ""
    subscription_end: int = 0
    key_end: int = 0
    added: int = 0
    user: str = ""
    role: str = ""
    checked: int = 0


@dataclass(frozen=True)
class Acceptance:
    """Who accepted the licence or terms of a source (without its revision), when, and by what that is shown."""

    source: str
    license: str
    by: str
    at: int
    evidence: str = ""


class Records:
    """The records of one mirror's home; changes are whole or not at all, one writer at a time."""

    def __init__(self, home: MirrorHome) -> None:
        self._home, self._path = home, home.path / FILE

    def key_id(self, key: str) -> str:
        """The id of a key: 16 hex digits of HMAC-SHA256 with this mirror's secret, empty for no key; raises Invalid."""
        return hmac.new(self._secret(), key.encode(), hashlib.sha256).hexdigest()[:16] if key else ""

    def _secret(self) -> bytes:
        path = self._home.path / SECRET
        if not path.exists():
            with self._home.lock("secret"):
                if not path.exists():
                    fresh = path.with_name(f".{SECRET}.{os.getpid()}")
                    fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
                    with os.fdopen(fd, "w") as out:
                        out.write(secrets.token_hex(32))
                        out.flush()
                        os.fsync(out.fileno())
                    fresh.replace(path)
        text = path.read_text().strip()
        if len(text) != 64:
            raise Invalid(f"{path} is damaged", expected="64 hex digits", do="take it from the backup of the mirror's home", reason="records")
        return text.encode()

    def keys(self) -> list[Key]:
        """The recorded keys, by name; raises Invalid."""
        return sorted(self._read("keys", Key), key=lambda k: k.name)

    def find(self, key: str) -> Key | None:
        """The record of a key; None where there is none."""
        key_id = self.key_id(key)
        return next((k for k in self.keys() if key_id and k.key_id == key_id), None)

    def named(self, name: str) -> Key:
        """The record of that name; raises NotFound."""
        for key in self.keys():
            if key.name == name:
                return key
        raise NotFound(f"there is no record of an upstream's key {name[:100]!r}", do="airlock mirror key list", reason="upstream_key")

    def put(self, key: Key) -> None:
        """Adds a key, or replaces the record of its name; raises Conflict where the same key is recorded under another name."""
        with self._home.lock("upstream"):
            others = [k for k in self.keys() if k.name != key.name]
            twin = next((k for k in others if k.key_id == key.key_id), None)
            if twin:
                raise Conflict(f"this key is recorded as {twin.name} already", do=f"airlock mirror key remove {twin.name}", reason="upstream_key")
            self._write("keys", [*others, key])

    def remove(self, name: str) -> Key:
        """Forgets a key's record; what was fetched with it keeps its facts; raises NotFound."""
        with self._home.lock("upstream"):
            gone = self.named(name)
            self._write("keys", [k for k in self.keys() if k.name != name])
            return gone

    def checked(self, key: Key, user: str, role: str, now: float) -> Key:
        """Notes who the upstream says that a key is."""
        seen = replace(key, user=user, role=role, checked=int(now))
        self.put(seen)
        return seen

    def accepted(self) -> list[Acceptance]:
        """Every acceptance, oldest first; none is ever removed; raises Invalid."""
        return self._read("accepted", Acceptance)

    def accept(self, acceptance: Acceptance) -> None:
        """Adds an acceptance; the latest of a source and licence counts."""
        with self._home.lock("upstream"):
            self._write("accepted", [*self.accepted(), acceptance])

    def acceptance(self, source: str, license_: str = "") -> Acceptance | None:
        """The latest acceptance of a source, of that licence where one is named; None where there is none."""
        wanted = source_of(source)
        fitting = [a for a in self.accepted() if a.source == wanted and (not license_ or a.license.casefold() == license_.casefold())]
        return fitting[-1] if fitting else None

    def keep(self, evidence: str) -> str:
        """The words of an evidence; a file's bytes are kept in the home and named by digest; raises Invalid, TooLarge."""
        path = Path(evidence)
        if evidence and len(evidence) < 4096 and path.is_file():
            if path.stat().st_size > MAX_EVIDENCE:
                raise TooLarge(f"{path.name} has {path.stat().st_size} bytes", expected=f"at most {MAX_EVIDENCE}")
            raw = path.read_bytes()
            digest = hashlib.sha256(raw).hexdigest()
            folder = self._home.path / "evidence"
            folder.mkdir(mode=0o700, exist_ok=True)
            with self._home.lock("evidence"):
                replace_file(folder / digest, raw)
            evidence = f"sha256:{digest} {path.name}"
        return words(evidence, "the evidence", MAX_WORDS)

    def _read(self, what: str, kind: type[_T]) -> list[_T]:
        try:
            doc = parse_json(self._path.read_bytes(), FILE, MAX_BYTES)
        except FileNotFoundError:
            return []
        items = doc.get(what, [])
        try:
            if doc.get("schema") != 1 or not isinstance(items, list):
                raise TypeError(FILE)
            return [_parsed(kind, item) for item in items]
        except (TypeError, ValueError, AirlockError) as error:
            raise Invalid(f"{self._path} is damaged", expected="the records as airlock mirror key and accept write them", reason="records") from error

    def _write(self, what: str, items: list[_T]) -> None:
        both: dict[str, list[Any]] = {"keys": list(self.keys()), "accepted": list(self.accepted())}
        both[what] = list(items)
        doc = {"schema": 1, "keys": [asdict(k) for k in both["keys"]], "accepted": [asdict(a) for a in both["accepted"]]}
        replace_file(self._path, json.dumps(doc, indent=1, sort_keys=True).encode() + b"\n")


def _parsed(kind: type[_T], item: object) -> _T:
    if not isinstance(item, Mapping) or not all(isinstance(key, str) for key in item):
        raise TypeError("no record")
    values: dict[str, Any] = {str(key): tuple(value) if isinstance(value, list) else value for key, value in item.items()}
    made = kind(**values)
    for name, value in asdict(made).items():
        if name == "products":
            for product in value:
                check_product(product)
        elif name in ("subscription_end", "key_end", "added", "checked", "at"):
            if type(value) is not int or not 0 <= value < LATEST:
                raise ValueError(name)
        elif not isinstance(value, str):
            raise ValueError(name)
    if isinstance(made, Key):
        check_tier(made.tier)
    return made


def words(text: str, what: str, most: int) -> str:
    """Text on one line that a record may hold; raises Invalid."""
    if len(text) > most or not text.isprintable():
        raise Invalid(f"{what} is not text on one line", expected=f"at most {most} printable characters", reason="records")
    return text


def source_of(text: str) -> str:
    """The source that an acceptance is about, without tag, digest, version, revision or letter case of the Hub and NGC; raises Invalid."""
    kind, _, rest = text.partition("://")
    rest = rest.partition("@")[0]
    host, _, path = rest.partition("/")
    if kind == "hf":
        hub_name(rest)
        return f"hf://{rest.lower()}"
    if kind == "ngc":
        ngc_name(*rest.partition(":")[0].split("/"))
        return f"ngc://{rest.partition(':')[0].lower()}"
    if kind not in ("oci", "nim") or not host or not path or len(text) > TEXTS["source"] or not text.isascii() or not text.isprintable():
        expected = "hf://namespace/name, oci://host/name, ngc://org[/team]/model or nim://host/name"
        raise Invalid(f"{text[:120]!r} is no source", expected=expected, reason="source")
    return f"{kind}://{host.lower()}/{path.partition(':')[0]}"
