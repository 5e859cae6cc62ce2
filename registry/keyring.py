"""The secrets of one site by name, from its data directory or from the environment, and what they replaced; here so that nothing else opens them.

A value leaves only as a return value: no text of an error, a log or a list holds one. What was replaced stays for verification alone: of a signing
key the public half, of the pepper the pepper. It opens no database and decides nothing about keys.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from artifact import trust
from artifact.errors import AirlockError, Conflict, Invalid, Unavailable

PEPPER_BYTES = 32
MAX_BYTES = 64 * 1024
PREVIOUS, NEXT = "previous", "next"
PEPPER = "pepper"
FILES = {PEPPER: "pepper", "release": "release.pem", "lease": "lease.pem", "audit": "audit.pem", "entitlement": "entitlement.pem"}
FIRST = (PEPPER, "release", "lease")  # what every site had from the beginning; the others are made where an older site lacks them
ROTATED = (PEPPER, "lease", "release", "entitlement")  # the audit key's change is a new log (airlock audit key)


def _variable(name: str) -> str:
    return "AIRLOCK_PEPPER" if name == PEPPER else f"AIRLOCK_{name.upper()}_KEY"


def pepper_id(pepper: bytes) -> str:
    """A pepper's public name: tells which one an HMAC was made with, and nothing about it."""
    return hmac.new(pepper, b"AIRLOCK pepper id", hashlib.sha256).hexdigest()[:16]


def _ed25519() -> bytes:
    key = Ed25519PrivateKey.generate()
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())


def fresh(name: str) -> bytes:
    """A new secret of that name."""
    if name == PEPPER:
        return secrets.token_bytes(PEPPER_BYTES)
    return _ed25519() if name == "audit" else trust.generate_key()


def _audit_id(raw: bytes) -> str:
    try:
        key = serialization.load_pem_private_key(raw, None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise Invalid("the audit key cannot be read", expected="PKCS#8 PEM of an Ed25519 key without a passphrase", reason="key") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise Invalid("the audit key is of another kind", expected="PKCS#8 PEM of an Ed25519 key", reason="key")
    der = key.public_key().public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(der).hexdigest()[:16]


def public_id(name: str, raw: bytes) -> str:
    """The public id of a secret: the kid of a signing key, the name of a pepper; raises Invalid."""
    if name == PEPPER:
        return pepper_id(raw)
    return _audit_id(raw) if name == "audit" else trust.kid(trust.public_pem(raw))


@dataclass(frozen=True)
class Keyring:
    """The secrets below one directory; `environ` wins over the files."""

    folder: Path
    environ: Mapping[str, str] = field(default_factory=lambda: os.environ, repr=False)

    def path(self, name: str) -> Path:
        """Where the file of that secret lies, or would."""
        return self.folder / FILES[name]

    def source(self, name: str) -> str:
        """Where the secret comes from: the variable that is set, or the file."""
        for variable in (f"{_variable(name)}_FILE", _variable(name)):
            if self.environ.get(variable):
                return f"environment {variable}"
        return f"secrets/{FILES[name]}"

    def given(self, name: str) -> bool:
        """Whether the environment gives it, so that no file of the data directory counts."""
        return self.source(name).startswith("environment")

    def read(self, name: str) -> bytes:
        """The secret of that name now; raises Unavailable."""
        raw = self._raw(name)
        if name == PEPPER and len(raw) != PEPPER_BYTES:
            raise Unavailable(f"the secret pepper has {len(raw)} bytes", expected=f"{PEPPER_BYTES}", do="restore secrets/ from the backup")
        return raw

    def _raw(self, name: str) -> bytes:
        variable = _variable(name)
        named, value = self.environ.get(f"{variable}_FILE"), self.environ.get(variable)
        if value and not named:
            if name != PEPPER:
                return value.encode("utf-8", "surrogateescape")
            try:
                return bytes.fromhex(value)
            except ValueError:
                raise Unavailable(f"{variable} is no hexadecimal text", expected=f"{2 * PEPPER_BYTES} digits of 0-9 and a-f") from None
        try:
            with Path(named or self.path(name)).open("rb") as source:
                return source.read(MAX_BYTES)
        except (OSError, ValueError) as error:  # ValueError: a zero byte in the path
            do = f"check {variable}_FILE" if named else "restore the data directory's secrets/ from the backup"
            words = getattr(error, "strerror", None) or "no such path"
            raise Unavailable(f"the secret {FILES[name]} cannot be read: {words}", do=do) from error

    def absent(self, name: str) -> bool:
        """Whether neither the environment nor a file gives it."""
        return not self.given(name) and not os.path.lexists(self.path(name))

    def make(self, name: str) -> bool:
        """Makes a secret that is absent, once whoever else does the same; says whether it did; raises Unavailable."""
        if not self.absent(name):
            return False
        try:
            write_new(self.path(name), fresh(name), 0o600)
        except OSError as error:
            raise Unavailable(f"the secret {FILES[name]} cannot be made: {error.strerror}", do=f"let this user write {self.folder}") from error
        return True

    def previous_peppers(self) -> tuple[bytes, ...]:
        """The peppers that were replaced and may still have keys, the newest first; raises Unavailable."""
        return tuple(raw for raw in self._previous(PEPPER) if len(raw) == PEPPER_BYTES)

    def next_peppers(self) -> tuple[bytes, ...]:
        """The pepper that is to come, where one was prepared; raises Unavailable."""
        return tuple(self._next(PEPPER))

    def _next(self, name: str) -> list[bytes]:
        path = self.folder / NEXT / FILES[name]
        try:
            return [path.read_bytes()[:MAX_BYTES]]
        except FileNotFoundError:
            return []
        except OSError as error:
            raise Unavailable(f"secrets/{NEXT} cannot be read: {error.strerror}", do="let this user read it") from error

    def public_keys(self, name: str) -> dict[str, str]:
        """The public halves, id to PEM, of a signing key, of the next one and of those that it replaced; raises Invalid, Unavailable."""
        coming = self._next(name)  # first: a rotation at this moment makes it the current one
        pems = [trust.public_pem(raw) for raw in (self.read(name), *coming)]
        pems += [raw.decode("ascii", "replace") for raw in self._previous(name)]
        return {trust.kid(pem): pem for pem in pems}

    def _previous(self, name: str) -> list[bytes]:
        found: list[tuple[float, str, bytes]] = []
        try:
            for path in (self.folder / PREVIOUS).glob(f"{name}.*"):
                with suppress(FileNotFoundError):  # removed since it was listed
                    found.append((-path.stat().st_mtime, path.name, path.read_bytes()[:MAX_BYTES]))
        except OSError as error:
            raise Unavailable(f"secrets/{PREVIOUS} cannot be read: {error.strerror}", do="let this user read it") from error
        return [raw for _, file, raw in sorted(found) if not file.endswith(".partial")]

    def prepare(self, name: str) -> str:
        """Makes the secret that is to come, accepted from now on and used by nobody yet; returns its id; raises Conflict, Unavailable."""
        self._own(name)
        try:
            write_new(self.folder / NEXT / FILES[name], fresh(name), 0o600)
        except OSError as error:
            raise Unavailable(f"the next {name} cannot be made: {error.strerror}", do=f"let this user write {self.folder}") from error
        return public_id(name, self._next(name)[0])

    def _own(self, name: str) -> None:
        if self.given(name):
            raise Conflict(
                f"the {name} comes from the {self.source(name)}",
                expected="a secret of the data directory",
                do=f"replace it there, and first put the old {'pepper' if name == PEPPER else 'public key'} into secrets/{PREVIOUS}/{name}.<id>",
                reason="secret",
            )

    def rotate(self, name: str) -> tuple[str, str]:
        """Puts the prepared secret, or a new one, in place of the current one, of which it keeps what verification needs.

        Returns the old and the new public id; raises Conflict, Unavailable.
        """
        self._own(name)
        old, new = self.read(name), next(iter(self._next(name)), b"") or fresh(name)
        before, after = public_id(name, old), public_id(name, new)
        kept = old if name == PEPPER else trust.public_pem(old).encode()
        temporary = self.path(name).with_name(f".{FILES[name]}.{os.getpid()}.{secrets.token_hex(4)}.new")
        try:
            write_new(self.folder / PREVIOUS / f"{name}.{before}", kept, 0o600)  # first: whatever ends here loses nothing
            write_new(temporary, new, 0o600)
            temporary.replace(self.path(name))
            (self.folder / NEXT / FILES[name]).unlink(missing_ok=True)
            _sync(self.folder)
        except OSError as error:
            raise Unavailable(f"the {name} cannot be replaced: {error.strerror}", do=f"let this user write {self.folder}, free space") from error
        finally:
            temporary.unlink(missing_ok=True)
        return before, after

    def rows(self) -> list[dict[str, object]]:
        """Each secret by what may be known of it: name, public id, source, ids of those that it replaced."""
        return [{"name": name, "id": self._id(name), "source": self.source(name), "previous": self._previous_ids(name)} for name in FILES]

    def _id(self, name: str) -> str:
        try:
            return public_id(name, self.read(name))
        except AirlockError:
            return ""

    def _previous_ids(self, name: str) -> list[str]:
        return sorted(path.name.removeprefix(f"{name}.") for path in (self.folder / PREVIOUS).glob(f"{name}.*") if path.suffix != ".partial")


def _sync(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_new(path: Path, raw: bytes, mode: int) -> None:
    """Writes a file that appears whole or not at all and never replaces one: those who create at once agree on the first."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.partial")  # containers that share the folder may share the pid
    try:
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode), "wb") as out:
            out.write(raw)
            out.flush()
            os.fsync(out.fileno())
        with suppress(FileExistsError):
            os.link(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
