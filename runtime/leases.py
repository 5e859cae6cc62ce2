"""What the cache keeps: leases, what became of each, and the lowest time it can be (docs/format.md section 8); nothing here verifies a signature.

Files of the cache can be altered by who owns the host: a lease proves itself by its signature, a mark (`returned_at`, `revoked_at`) is our memory,
and who removes it gains a start only until the lease's end, and only while the registry is away. Times only ever make a check stricter.
"""

from __future__ import annotations

import base64
import errno
import json
import logging
import os
import secrets
import stat
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from artifact.errors import AirlockError, Invalid
from artifact.grant import Lease, date
from artifact.manifest import parse_json

MAX_LEASE = 64 * 1024
MAX_FILES = 1000  # of leases that are looked at
MAX_TIME = 1e11  # seconds since 1970: what is beyond is nonsense, and too large for a date
MAX_GRACE_S = 366 * 86400
MAX_WALL_STEP = 30 * 86400  # a wall clock further ahead of signed time than this raises no floor: one bad NTP minute must not expire everything
log = logging.getLogger("airlock")


@dataclass(frozen=True)
class Kept:
    """A lease's file: the token, what it says (unverified), when it was returned or refused (0: not), whether the registry knows of the return."""

    path: Path
    token: str
    returned_at: float = 0.0
    revoked_at: float = 0.0
    told: bool = False
    claims: dict[str, object] = field(default_factory=dict)

    @property
    def jti(self) -> str:
        """The lease's id."""
        return text(self.claims, "jti")

    @property
    def lease(self) -> Lease:
        """The lease as artifact.grant decides it."""
        return Lease(number(self.claims, "exp"), grace_of(self.claims), self.revoked_at, self.returned_at)

    @property
    def name_ref(self) -> str:
        """The model that it is for, as people write it."""
        model = self.claims.get("model")
        return f"{text(model, 'name')}:{text(model, 'ref')}" if isinstance(model, Mapping) else ""


def number(claims: Mapping[str, object], name: str) -> float:
    """A claim that is a time or a number within reason, else 0."""
    value = claims.get(name)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < MAX_TIME else 0.0


def text(claims: Mapping[str, object], name: str) -> str:
    """A claim that is text, cut to what a line holds, else empty."""
    value = claims.get(name)
    return value[:300] if isinstance(value, str) and value.isprintable() else ""


def grace_of(claims: Mapping[str, object]) -> int:
    """The grace that a lease gives for a start behind its end, in seconds."""
    return int(min(number(claims, "grace_s"), MAX_GRACE_S))


def own(claims: Mapping[str, object]) -> bool:
    """Whether a lease was given without the organisation's entitlement, whose end then stops nothing of that model."""
    return claims.get("ent_jti") == ""


def read(path: Path) -> Kept:
    """A kept lease; raises OSError for what is no regular file, Invalid or TooLarge for what is no lease."""
    doc = parse_json(read_file(path, MAX_LEASE + 1), "the stored lease", MAX_LEASE)
    token = doc.get("lease")
    if not isinstance(token, str):
        raise Invalid("the stored lease holds no text `lease`", expected="the file as it was written")
    return Kept(path, token, number(doc, "returned_at"), number(doc, "revoked_at"), doc.get("told") is True, claims_of(token))


def kept(folder: Path, model: str = "", ref: str = "", host: str = "") -> list[Kept]:
    """The leases in the cache of one model, version and instance (empty: any), by file name; what is none is passed over."""
    out: list[Kept] = []
    if folder.is_symlink():
        return out  # as runtime.weights has it: nothing is read or written through a link in the cache
    with suppress(OSError):
        for path in sorted(folder.glob("[0-9a-f]*.json"))[:MAX_FILES]:
            with suppress(OSError, AirlockError):
                found = read(path)
                name, _, version = found.name_ref.rpartition(":")
                if (model or name, ref or version, host or found.claims.get("aud")) == (name, version, found.claims.get("aud")):
                    out.append(found)
    return out


def until(found: Kept) -> str:
    """When a kept lease ends, for a line."""
    return date(number(found.claims, "exp"))


def keep(path: Path, token: str) -> None:
    """Stores a lease in the place of the one before."""
    store(path, json.dumps({"lease": token}).encode())


def mark(found: Kept, *, returned_at: float = 0.0, revoked_at: float = 0.0, told: bool = False) -> bool:
    """Notes what became of a lease, so that no start uses it again; whether that could be stored."""
    marks = {"returned_at": int(returned_at), "revoked_at": int(revoked_at), "told": told}
    return store(found.path, json.dumps({"lease": found.token} | {k: v for k, v in marks.items() if v}).encode())


def claims_of(token: str) -> dict[str, object]:
    """What a lease says, whoever signed it: for its dates and its name, never for a right; empty where it says nothing."""
    try:
        return parse_json(base64.urlsafe_b64decode(token.split(".")[1] + "=="), "the stored lease", MAX_LEASE)
    except (IndexError, ValueError, AirlockError):
        return {}


def floor(folder: Path) -> float:
    """The lowest time it can be, from the cache; 0 without one."""
    try:
        value = float(read_file(folder / "clock", 100))
    except (OSError, ValueError):
        return 0.0
    return value if 0 <= value < MAX_TIME else 0.0


def lowest(folder: Path, token: str) -> float:
    """The floor; where the clock file is gone or damaged, the time at which the stored lease was signed, with a warning."""
    value = floor(folder)
    if value or not (token or os.path.lexists(folder / "clock")):
        return value
    value = number(claims_of(token), "iat")
    log.warning("%s is gone or damaged: the lowest time is now that of the stored lease (%s)", folder / "clock", date(value) if value else "none")
    return value


def raise_floor(folder: Path, signed: float, wall: float) -> None:
    """Signed time always counts; the wall clock only while it is near it, so that winding it back between two starts gains nothing."""
    before = floor(folder)
    after = max(before, signed)
    if 0 <= wall - after <= MAX_WALL_STEP:
        after = wall
    if after > before:
        store(folder / "clock", f"{after:.0f}".encode())


class Clock:
    """The time of a process that runs long: never below the floor, which goes on with the monotonic clock whatever the wall clock is set to."""

    def __init__(self, folder: Path, signed: float) -> None:
        self._folder = folder
        self._base, self._began = max(floor(folder), signed), time.monotonic()

    def least(self) -> float:
        """The lowest time it can be now."""
        return self._base + time.monotonic() - self._began

    def now(self) -> float:
        """The time by which ends are judged."""
        return max(time.time(), self.least())

    def signed(self, at: float) -> None:
        """A document was signed at that time, so it is at least that late."""
        if at > self.least():
            self._base, self._began = at, time.monotonic()

    def save(self) -> None:
        """Raises the floor of the cache, so that the next start knows what this one knew."""
        raise_floor(self._folder, self.least(), time.time())


def read_file(path: Path, limit: int) -> bytes:
    """At most `limit` bytes of a regular file; raises OSError for all else. O_NONBLOCK: a pipe planted there must not hold up the start."""
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise OSError(errno.EINVAL, "it is no regular file", str(path))
        return os.read(fd, limit)
    finally:
        os.close(fd)


def store(path: Path, raw: bytes) -> bool:
    """Whole or not at all, and whether. A read-only cache stores nothing: the start goes on, the next one needs the registry."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        with os.fdopen(fd, "wb") as stream:
            stream.write(raw)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    except OSError:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        return False
    return True
