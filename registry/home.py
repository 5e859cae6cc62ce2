"""The registry's data directory: instance id, secrets, pinned senders; everything here but the pins belongs in a backup.

It opens no database and reads no blob. Secrets are 0600 in a 0700 directory and leave this module only as values, never in a text or a log.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
import uuid
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from artifact import trust
from artifact.errors import Conflict, Invalid, Mismatch, NotFound, Unavailable
from artifact.manifest import parse_json
from registry.keyring import FILES, FIRST, PEPPER, Keyring, write_new

SITE = "site.json"
ROOT = "1.root.json"
ISSUERS = "issuers"
DATABASE = "registry.db"
MAX_ROOT_BYTES = 512_000


@dataclass(frozen=True)
class Home:
    """One data directory (docs/format.md section 5)."""

    path: Path
    instance: str
    created: str
    database: bool = False  # whether registry.db was made once: from then on its absence is a loss, never a reason to make another
    elsewhere: bool = False  # whether the site's rows lie in PostgreSQL: then no command may make a registry.db beside it
    made: tuple[str, ...] = ()  # secrets that were made once beside those of the beginning: their absence is a loss too

    @classmethod
    def open(cls, data: Path, create: bool = False) -> Home:
        """The data directory, made with new secrets where `create` says so; raises NotFound, Invalid, Unavailable."""
        site = data / SITE
        try:
            if create and not site.exists():
                _create(data)
            home = cls._read(data)
        except FileNotFoundError as error:
            raise NotFound(
                f"{data} is no data directory of a registry", expected=f"a directory with {SITE}", do=f"airlock site init --data {data}"
            ) from error
        except OSError as error:
            raise Unavailable(f"{data} cannot be used: {error.strerror}", expected="a directory that this user may write") from error
        return home.completed() if create else home

    @classmethod
    def _read(cls, data: Path) -> Home:
        site = data / SITE
        doc = parse_json(site.read_bytes(), f"{SITE} of {data}", 65536)
        instance, created = doc.get("instance"), doc.get("created")
        if doc.get("schema") != 1 or not isinstance(instance, str) or not isinstance(created, str):
            raise Invalid(f"{site} is of another version", expected="schema 1", do="update Airlock, or restore the file from the backup")
        listed = doc.get("made")
        made = tuple(name for name in listed if isinstance(name, str)) if isinstance(listed, list) else ()
        return cls(data, instance, created, doc.get("database") is True, doc.get("database") == "postgresql", made)

    def completed(self) -> Home:
        """This site with the secrets that one of an earlier version lacks, made once; one that was lost is never made anew; raises Unavailable."""
        new = [name for name in FILES if name not in (*FIRST, *self.made) and not self.keys.given(name)]
        if not new:
            return self
        for name in new:
            self.keys.make(name)
        self._note(made=[*self.made, *new])
        return self._read(self.path)

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
        self._note(database="postgresql" if elsewhere else True)

    def _note(self, **changes: object) -> None:
        """Replaces site.json by one with these fields changed; raises Unavailable."""
        temporary = self.path / f".{SITE}.{os.getpid()}.{secrets.token_hex(4)}.partial"
        try:
            now = parse_json((self.path / SITE).read_bytes(), f"{SITE} of {self.path}", 65536)
            write_new(temporary, _line({**now, **changes}), 0o600)
            temporary.replace(self.path / SITE)
        except OSError as error:
            raise Unavailable(f"{SITE} cannot be written: {error.strerror}", do=f"let this user write {self.path}, free space") from error
        finally:
            temporary.unlink(missing_ok=True)

    @property
    def keys(self) -> Keyring:
        """The secrets of this site by name."""
        return Keyring(self.path / "secrets")

    def pepper(self) -> bytes:
        """The secret under which API keys are stored as HMAC; raises Unavailable."""
        return self.keys.read(PEPPER)

    def peppers(self) -> tuple[bytes, ...]:
        """The pepper, and behind it the prepared one and those that it replaced; raises Unavailable."""
        coming = self.keys.next_peppers()  # first: a rotation at this moment makes it the current one
        return (self.pepper(), *coming, *self.keys.previous_peppers())

    def release_key(self) -> bytes:
        """PEM of the key that signs what is released here; raises Unavailable."""
        return self.keys.read("release")

    def lease_key(self) -> bytes:
        """PEM of the key that signs leases; raises Unavailable."""
        return self.keys.read("lease")

    def audit_key(self) -> bytes:
        """PEM (PKCS#8, Ed25519) of the key that signs the checkpoints of the audit log; raises Unavailable."""
        return self.keys.read("audit")

    @property
    def audit_name(self) -> str:
        """The origin of this site's audit log and the name of its key in checkpoints (C2SP signed-note: no space and no +)."""
        return f"airlock-{self.instance}"

    def entitlement_key(self) -> bytes:
        """PEM of the site's own root of entitlements and revocations; raises Unavailable."""
        return self.keys.read("entitlement")

    def issuers(self) -> dict[str, str]:
        """Who may say what an organisation is entitled to, kid to public PEM: the site's own roots and those pinned; raises Invalid, Unavailable."""
        out = self.keys.public_keys("entitlement")
        for path in sorted((self.path / "trust" / ISSUERS).glob("*.pem")):
            try:
                pem = path.read_text("ascii", "replace")
            except FileNotFoundError:  # removed since it was listed: from now on it vouches for nothing
                continue
            if trust.kid(pem) != path.stem:
                raise Invalid(f"{path} was altered", expected=f"the public key {path.stem}", do="restore it, or pin the issuer again")
            out[path.stem] = pem
        return out

    def pin_issuer(self, pem: str, sha256: str) -> str:
        """Pins the public key of an issuer of entitlements, compared with the SHA-256 on paper, and returns its kid; again is a no-op.

        Raises Invalid, Mismatch, Unavailable.
        """
        digest, kid = trust.spki_sha256(pem).hex(), trust.kid(pem)
        if digest != sha256.lower().removeprefix("sha256:"):
            raise Mismatch(
                f"the issuer's key has SHA-256 {digest}",
                expected=sha256,
                do="compare with the line that airlock entitlement issuer printed",
                reason="issuer",
            )
        path = self.path / "trust" / ISSUERS / f"{kid}.pem"
        try:
            write_new(path, trust.plain_pem(pem).encode(), 0o644)
        except OSError as error:
            raise Unavailable(f"{path} cannot be written: {error.strerror}", do=f"let this user write {path.parent}") from error
        return kid

    def vendor_key(self, kind: str) -> bytes | None:
        """The PEM with which a vendor's signatures of a kind of NGC artefact verify, as the operator put it here; None without one."""
        path = self.path / "trust" / "vendors" / f"ngc-{kind}.pem"
        return path.read_bytes()[:65536] if path.is_file() else None

    def site_trust(self, revocation_serial: int = 0) -> trust.SiteTrust:
        """What runtimes of this site pin: the public halves of the release and lease keys, and of those that they replaced."""
        return trust.SiteTrust(self.instance, self.keys.public_keys("release"), self.keys.public_keys("lease"), revocation_serial)

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
            write_new(self.trust_dir(digest[:16]) / ROOT, raw, 0o644)
        return digest


def _create(data: Path) -> None:
    data.mkdir(mode=0o700, parents=True, exist_ok=True)
    data.chmod(0o700)
    (data / "secrets").mkdir(mode=0o700, exist_ok=True)
    (data / "trust").mkdir(mode=0o700, exist_ok=True)
    keys = Keyring(data / "secrets")
    for name in FILES:
        keys.make(name)

    site: dict[str, object] = {"schema": 1, "instance": str(uuid.uuid4()), "created": datetime.now(UTC).isoformat(timespec="seconds")}
    site["made"] = [name for name in FILES if name not in FIRST and not keys.given(name)]
    write_new(data / SITE, _line(site), 0o600)  # last: a directory with it is whole


def free_bytes(folder: Path) -> int:
    """Bytes that this user may still write on the file system of a folder; 0 where it does not say."""
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return 0


def _line(doc: dict[str, object]) -> bytes:
    return json.dumps(doc).encode() + b"\n"
