"""The registry's data directory: instance id, secrets, pinned senders; everything here but the pins belongs in a backup.

It opens no database and reads no blob. Secrets are 0600 in a 0700 directory and leave this module only as values, never in a text or a log.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import uuid
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from artifact import trust
from artifact.errors import Conflict, Invalid, Mismatch, NotFound, Unavailable
from artifact.manifest import parse_json

SITE = "site.json"
ROOT = "1.root.json"
DATABASE = "registry.db"
PEPPER_BYTES = 32
MAX_ROOT_BYTES = 512_000


@dataclass(frozen=True)
class Home:
    """One data directory (docs/format.md section 5)."""

    path: Path
    instance: str
    created: str
    database: bool = False  # whether registry.db was made once: from then on its absence is a loss, never a reason to make another
    elsewhere: bool = False  # whether the site's rows lie in PostgreSQL: then no command may make a registry.db beside it

    @classmethod
    def open(cls, data: Path, create: bool = False) -> Home:
        """The data directory, made with new secrets where `create` says so; raises NotFound, Invalid, Unavailable."""
        site = data / SITE
        try:
            if create and not site.exists():
                _create(data)
            raw = site.read_bytes()
        except FileNotFoundError as error:
            raise NotFound(
                f"{data} is no data directory of a registry", expected=f"a directory with {SITE}", do=f"airlock site init --data {data}"
            ) from error
        except OSError as error:
            raise Unavailable(f"{data} cannot be used: {error.strerror}", expected="a directory that this user may write") from error
        doc = parse_json(raw, f"{SITE} of {data}", 65536)
        instance, created = doc.get("instance"), doc.get("created")
        if doc.get("schema") != 1 or not isinstance(instance, str) or not isinstance(created, str):
            raise Invalid(f"{site} is of another version", expected="schema 1", do="update Airlock, or restore the file from the backup")
        return cls(data, instance, created, doc.get("database") is True, doc.get("database") == "postgresql")

    @property
    def database_path(self) -> Path:
        """Where registry.db lies."""
        return self.path / DATABASE

    def check_database(self) -> None:
        """Returns where registry.db is there, or was never made yet; raises Unavailable, and Conflict where the rows lie in PostgreSQL."""
        if self.elsewhere:
            raise Conflict(
                "this site's database is PostgreSQL, and none was named",
                expected="AIRLOCK_DATABASE as its server has it",
                do="set AIRLOCK_DATABASE, or AIRLOCK_CONFIG to the server's file",
                reason="database",
            )
        if not self.database:
            return
        try:
            size = self.database_path.stat().st_size
        except FileNotFoundError:
            size = 0
        except OSError as error:
            raise Unavailable(f"{DATABASE} cannot be read: {error.strerror}", do=f"let this user read and write {self.path}") from error
        if not size:
            raise Unavailable(
                f"{DATABASE} is missing",
                expected="the database with this site's keys, grants and audit",
                do="restore the backup of the data directory",
            )

    def check_elsewhere(self) -> None:
        """Returns where the rows may lie in PostgreSQL; raises Conflict for a site that began with registry.db."""
        if self.database:
            raise Conflict(
                f"this site's database is {DATABASE}, and AIRLOCK_DATABASE names another",
                do="unset AIRLOCK_DATABASE, or make a new site over PostgreSQL",
                reason="database",
            )

    def record_database(self, elsewhere: bool = False) -> None:
        """Notes in site.json that registry.db was made, or that the rows lie in PostgreSQL; raises Unavailable."""
        if self.elsewhere if elsewhere else self.database:
            return
        if elsewhere and not os.access(self.path, os.W_OK):
            return  # a directory of secrets that is mounted read-only; the database itself knows its site
        kind: object = "postgresql" if elsewhere else True
        site: dict[str, object] = {"schema": 1, "instance": self.instance, "created": self.created, "database": kind}
        temporary = self.path / f".{SITE}.{os.getpid()}.{secrets.token_hex(4)}.partial"
        try:
            _write_new(temporary, _line(site), 0o600)
            temporary.replace(self.path / SITE)
        except OSError as error:
            raise Unavailable(f"{SITE} cannot be written: {error.strerror}", do=f"let this user write {self.path}, free space") from error
        finally:
            temporary.unlink(missing_ok=True)

    def pepper(self) -> bytes:
        """The secret under which API keys are stored as HMAC; raises Unavailable."""
        raw = self._secret("pepper")
        if len(raw) != PEPPER_BYTES:
            raise Unavailable(f"the secret pepper has {len(raw)} bytes", expected=f"{PEPPER_BYTES}", do="restore secrets/ from the backup")
        return raw

    def release_key(self) -> bytes:
        """PEM of the key that signs what is released here; raises Unavailable."""
        return self._secret("release.pem")

    def lease_key(self) -> bytes:
        """PEM of the key that signs leases; raises Unavailable."""
        return self._secret("lease.pem")

    def _secret(self, name: str) -> bytes:
        try:
            return (self.path / "secrets" / name).read_bytes()
        except OSError as error:
            raise Unavailable(
                f"the secret {name} cannot be read: {error.strerror}", do="restore the data directory's secrets/ from the backup"
            ) from error

    def site_trust(self) -> trust.SiteTrust:
        """What runtimes of this site pin: the public halves of the release and lease keys."""
        release, lease = trust.public_pem(self.release_key()), trust.public_pem(self.lease_key())
        return trust.SiteTrust(self.instance, {trust.kid(release): release}, {trust.kid(lease): lease})

    def senders(self) -> dict[str, str]:
        """The pinned senders: id to SHA-256 (hex) of their first root."""
        out: dict[str, str] = {}
        for path in sorted((self.path / "trust").glob(f"*/{ROOT}")):
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            if path.parent.name != digest[:16]:
                raise Invalid(
                    f"{path} was altered", expected=f"SHA-256 beginning with {path.parent.name}", do="restore it and compare with the paper"
                )
            out[path.parent.name] = digest
        return out

    def trust_dir(self, sender: str) -> Path:
        """Where the TUF client state of a pinned sender lies."""
        return self.path / "trust" / sender

    def pinned_root(self, sender: str) -> bytes:
        """The first root of a pinned sender, byte for byte; raises NotFound."""
        if sender not in self.senders():
            raise NotFound(f"no sender {sender} is pinned here", do=f"airlock site init --data {self.path} --trust-root 1.root.json")
        return (self.trust_dir(sender) / ROOT).read_bytes()

    @staticmethod
    def check_root(raw: bytes, sha256: str = "") -> str:
        """The SHA-256 in hex of a sender's first root that may be pinned; raises Mismatch, Invalid."""
        digest = hashlib.sha256(raw).hexdigest()
        if sha256 and digest != sha256.lower().removeprefix("sha256:"):
            raise Mismatch(
                f"the trust root has SHA-256 {digest}",
                expected=sha256,
                do="compare with the line that airlock mirror init printed",
                reason="trust_root",
            )
        if len(raw) > MAX_ROOT_BYTES or parse_json(raw, "the trust root", MAX_ROOT_BYTES).get("signed") is None:
            raise Invalid("the file is no TUF root", expected="1.root.json as airlock mirror init wrote it", reason="trust_root")
        return digest

    def pin_root(self, raw: bytes, sha256: str = "") -> str:
        """Pins the first root of a sender and returns its SHA-256 in hex; again with the same is a no-op; raises Mismatch, Conflict, Invalid."""
        digest = self.check_root(raw, sha256)
        pinned = self.senders()
        if pinned and digest not in pinned.values():
            raise Conflict(
                "another trust root is pinned here", expected=next(iter(pinned.values())), do="use a new data directory for another sender"
            )
        if not pinned:
            _write_new(self.trust_dir(digest[:16]) / ROOT, raw, 0o644)
        return digest


def _create(data: Path) -> None:
    data.mkdir(mode=0o700, parents=True, exist_ok=True)
    data.chmod(0o700)
    (data / "secrets").mkdir(mode=0o700, exist_ok=True)
    (data / "trust").mkdir(mode=0o700, exist_ok=True)
    _write_new(data / "secrets" / "pepper", secrets.token_bytes(PEPPER_BYTES), 0o600)
    _write_new(data / "secrets" / "release.pem", trust.generate_key(), 0o600)
    _write_new(data / "secrets" / "lease.pem", trust.generate_key(), 0o600)
    site: dict[str, object] = {"schema": 1, "instance": str(uuid.uuid4()), "created": datetime.now(UTC).isoformat(timespec="seconds")}
    _write_new(data / SITE, _line(site), 0o600)  # last: a directory with it is whole


def free_bytes(folder: Path) -> int:
    """Bytes that this user may still write on the file system of a folder; 0 where it does not say."""
    try:
        info = os.statvfs(folder)
    except OSError:
        return 0
    return info.f_bavail * info.f_frsize


def _line(doc: dict[str, object]) -> bytes:
    return json.dumps(doc).encode() + b"\n"


def _write_new(path: Path, raw: bytes, mode: int) -> None:
    """Writes a file that appears whole or not at all and never replaces one: two processes that create at once agree on the first."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, mode)
    try:
        with os.fdopen(fd, "wb") as out:
            out.write(raw)
            out.flush()
            os.fsync(out.fileno())
        try:
            os.link(temporary, path)
        except FileExistsError:
            return
    finally:
        temporary.unlink(missing_ok=True)
