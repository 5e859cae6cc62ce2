"""The mirror's home directory: its TUF keys, its staging of verified bytes, and the names that point into it.

It fetches nothing and packs nothing. The offline keys are made here once and are meant to be moved away; nothing but `mirror init` writes them.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from artifact import bundle
from artifact.disk import Disk
from artifact.errors import Conflict, Invalid, NotFound, Unavailable
from artifact.manifest import check_digest, check_name, check_ref, parse_json
from artifact.medium import replace_file

HOME = "home.json"
NAMES = "names.json"
MAX_NAMES_BYTES = 256 * 1024 * 1024


@dataclass(frozen=True)
class Named:
    """One name in staging: repository, ref, manifest digest and media type, display form, kind model|image|profiles, and facts of its upstream."""

    name: str
    ref: str
    digest: str
    media_type: str
    display: str = ""
    kind: str = "image"
    upstream: dict[str, object] = field(default_factory=dict)


class MirrorHome:
    """One mirror: `id` is also the sender id of its bundles, the first 16 hex digits of the SHA-256 of 1.root.json."""

    def __init__(self, path: Path, root: bytes) -> None:
        self.path = path
        self.root = root
        self.root_sha256 = hashlib.sha256(root).hexdigest()
        self.id = self.root_sha256[:16]
        self.disk = Disk(path / "staging")

    @classmethod
    def init(cls, path: Path) -> MirrorHome:
        """Makes a new home with its TUF root and keys; raises Conflict when there is one, Unavailable."""
        if (path / HOME).exists():
            raise Conflict(f"{path} is a mirror's home already", expected="an empty or absent directory", do="use it as it is, or choose another")
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            path.chmod(0o700)
            bundle.create_root(path / "tuf", time.time())
            replace_file(path / HOME, json.dumps({"schema": 1}).encode() + b"\n")
        except OSError as error:
            raise Unavailable(f"{path} cannot be written: {error.strerror}", expected="a directory that this user may write") from error
        return cls.open(path)

    @classmethod
    def open(cls, path: Path) -> MirrorHome:
        """The home at a path; raises NotFound, Invalid."""
        try:
            doc = parse_json((path / HOME).read_bytes(), HOME, 65536)
            root = (path / "tuf" / "metadata" / "1.root.json").read_bytes()
        except OSError as error:
            raise NotFound(f"{path} is no mirror's home", expected=f"a directory with {HOME}", do=f"airlock mirror init --home {path}") from error
        if doc.get("schema") != 1:
            raise Invalid(f"{path / HOME} is of another version", expected="schema 1", do="update Airlock")
        return cls(path, root)

    @property
    def root_file(self) -> Path:
        """The file that the closed side pins."""
        return self.path / "tuf" / "metadata" / "1.root.json"

    @property
    def offline_keys(self) -> Path:
        """Where the root keys lie until somebody moves them."""
        return self.path / "tuf" / "offline"

    def names(self) -> list[Named]:
        """All names in staging, in byte order of name and ref; raises Invalid."""
        try:
            raw = (self.path / NAMES).read_bytes()
        except FileNotFoundError:
            return []
        items = parse_json(raw, NAMES, MAX_NAMES_BYTES).get("names")
        if not isinstance(items, list):
            raise Invalid(f"{NAMES} of the mirror is damaged", expected="a list of names", do="run airlock mirror sync again")
        try:
            out = [Named(**item) for item in items]
        except TypeError as error:
            raise Invalid(
                f"{NAMES} of the mirror is damaged", expected="fields name, ref, digest, media_type", do="run airlock mirror sync again"
            ) from error
        for named in out:
            check_name(named.name)
            check_ref(named.ref)
            check_digest(named.digest)
        return out

    def record(self, named: Iterable[Named]) -> None:
        """Adds or moves names, all at once; one writer at a time."""
        with self.lock():
            known = {(n.name, n.ref): n for n in self.names()}
            known.update({(n.name, n.ref): n for n in named})
            ordered = [asdict(known[key]) for key in sorted(known)]
            replace_file(self.path / NAMES, json.dumps({"names": ordered}, sort_keys=True).encode())

    @contextmanager
    def lock(self, name: str = "names") -> Iterator[None]:
        """Holds one of the home's locks; waits for another process to finish."""
        fd = os.open(self.path / f".{name}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)
