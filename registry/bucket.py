"""What an S3 store is made of besides the wire: its URL's options, the names of its objects, the cut into parts, the memory that parts may take.

Here and not in registry/blobs/s3.py because all of it is arithmetic and grammar that tests can prove without a server. It must not open a connection.
"""

from __future__ import annotations

import configparser
import io
import re
import shutil
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import IO
from urllib.parse import parse_qsl, urlsplit

from artifact.errors import Invalid, TooLarge, Unavailable
from artifact.manifest import check_digest

MIB = 1024 * 1024
GIB = 1024 * MIB
MAX_PARTS = 10_000  # S3's limit of parts of one object
MIN_PART = 5 * MIB  # S3's smallest part, but for the last one
SPARE_PARTS = 3_000  # short parts that suspended uploads may make before they must wait for a full one
STEPS = ((16 * GIB, 16 * MIB), (144 * GIB, 64 * MIB), (1 << 62, 256 * MIB))  # below this offset, parts of this size
MEMORY = 128 * MIB
READ = 2 * MIB
_LOCATION = re.compile(r"(sha256|sha512)/([0-9a-f]{2})/([0-9a-f]{64}|[0-9a-f]{128})(?:\.g[0-9]{1,9})?(?:\+([0-9a-zA-Z_-]{8,64}))?\Z")
_UPLOAD = re.compile(r"[0-9a-zA-Z_-]{8,64}\Z")
_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]\Z")
_PREFIX = re.compile(r"(?:[A-Za-z0-9._-]+/)*\Z")
_WORDS = {"endpoint", "region", "public", "ca", "credentials", "style", "checksums"}
_EXPECTED = "s3://BUCKET/PREFIX?endpoint=URL&region=NAME&public=URL&ca=FILE&credentials=FILE&style=path|virtual&checksums=off|on"


def hostname(url: str) -> str:
    """The host name of a URL in lower case, without its port; empty for one that cannot be read."""
    try:
        return (urlsplit(url).hostname or "").lower()
    except ValueError:
        return ""


@dataclass(frozen=True)
class Options:
    """Where a bucket is and how to speak to it (docs/operations.md, Object storage)."""

    bucket: str
    prefix: str = ""
    endpoint: str = ""
    region: str = "us-east-1"
    public: str = ""
    ca: str = ""
    credentials: str = ""
    style: str = "path"
    checksums: bool = False
    steps: tuple[tuple[int, int], ...] = STEPS
    copy_limit: int = 5 * GIB  # the largest object that one CopyObject takes
    tries: int = 4
    connect_s: float = 5
    read_s: float = 60

    def beside(self, host: str) -> bool:
        """Whether presigned URLs are of this Host or below it, whatever the ports (Go, net/http, shouldCopyHeaderOnRedirect)."""
        own, asked = hostname(self.public or self.endpoint), hostname("//" + host)
        if own and self.style == "virtual":
            own = f"{self.bucket}.{own}"
        return bool(asked) and (own == asked or own.endswith("." + asked))

    @classmethod
    def parse(cls, url: str) -> Options:
        """The options of an `s3://` URL; raises Invalid, naming what is wrong in it."""
        try:
            parts = urlsplit(url)
        except ValueError as error:
            raise Invalid("the store's URL cannot be read", expected=_EXPECTED) from error
        prefix = parts.path.strip("/") + "/" if parts.path.strip("/") else ""
        if parts.scheme != "s3" or not _BUCKET.match(parts.netloc) or not _PREFIX.match(prefix) or "/../" in f"/{prefix}":
            raise Invalid(f"{url.split('?')[0][:100]!r} names no bucket", expected=_EXPECTED)
        try:
            pairs = parse_qsl(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query), max_num_fields=20)
        except ValueError as error:
            raise Invalid("the options behind ? of the store's URL cannot be read", expected=_EXPECTED) from error
        options = dict(pairs)
        strange = sorted(options.keys() - _WORDS)
        if strange or len(options) != len(pairs):
            raise Invalid(f"the store's URL has an unknown or repeated option {', '.join(strange)[:100]}".rstrip(), expected=_EXPECTED)
        for name in ("endpoint", "public"):
            if options.get(name) and not re.match(r"https?://[^/?#@\s]+/?\Z", options[name]):
                raise Invalid(f"{name} of the store's URL is {options[name][:100]!r}", expected="http://HOST:PORT or https://HOST:PORT")
        style, checksums = options.get("style", "path"), options.get("checksums", "off")
        if style not in ("path", "virtual") or checksums not in ("off", "on"):
            raise Invalid("style or checksums of the store's URL is wrong", expected="style=path or virtual, checksums=off or on")
        if not options.get("credentials"):
            raise Invalid("the store's URL names no file of credentials", expected="&credentials=FILE", do="see docs/operations.md, Object storage")
        return cls(
            parts.netloc,
            prefix,
            options.get("endpoint", "").rstrip("/"),
            options.get("region") or "us-east-1",
            options.get("public", "").rstrip("/"),
            options.get("ca", ""),
            options["credentials"],
            style,
            checksums == "on",
        )


@dataclass(frozen=True)
class Secret:
    """The key pair of one moment."""

    access: str
    secret: str
    token: str | None = None


def read_secret(path: Path) -> Secret:
    """The key pair in an ini file with a section [default], as the AWS tools write it; raises Unavailable without a word of its content."""
    ini = configparser.RawConfigParser()
    try:
        ini.read_string(path.read_text(encoding="utf-8"))
        section = ini["default"]
        return Secret(section["aws_access_key_id"], section["aws_secret_access_key"], section.get("aws_session_token"))
    except OSError as error:
        words = f"the credentials file {path} cannot be read: {error.strerror}"
        raise Unavailable(words, do="let this user read it", reason="s3_credentials") from error
    except (configparser.Error, KeyError, UnicodeDecodeError):
        raise Unavailable(
            f"the credentials file {path} is not understood",
            expected="[default] with aws_access_key_id and aws_secret_access_key",
            reason="s3_credentials",
        ) from None


# ---- names: a location is what the database keeps, a key is what the bucket sees


def location_of(digest: str, generation: int = 0, upload_id: str = "") -> str:
    """The location of a digest's bytes; with an upload id, of the bytes that stay where that upload staged them."""
    algorithm, _, text = check_digest(digest).partition(":")
    return f"{algorithm}/{text[:2]}/{text}" + (f".g{generation}" if generation else "") + (f"+{upload_id}" if upload_id else "")


def is_location(text: str) -> bool:
    """Whether a text has the grammar of a location."""
    return _LOCATION.match(text) is not None


def key_of(location: str) -> str:
    """The key below the prefix at which a location's bytes lie; raises Invalid."""
    found = _LOCATION.match(location)
    if not found:
        raise Invalid(f"{location[:100]!r} is not a location", expected="<algorithm>/<2 hex>/<hex>[.g<generation>][+<upload>]")
    return f"uploads/{found.group(4)}" if found.group(4) else f"blobs/{location}"


def digest_at(location: str) -> str:
    """The digest that a location's bytes must have; raises Invalid."""
    found = _LOCATION.match(location)
    if not found:
        raise Invalid(f"{location[:100]!r} is not a location")
    return f"{found.group(1)}:{found.group(3)}"


def check_upload(upload_id: str) -> str:
    """The upload id, unchanged; raises Invalid."""
    if not _UPLOAD.match(upload_id):
        raise Invalid(f"{upload_id[:80]!r} is not an upload id", expected="8 to 64 letters, digits, - and _")
    return upload_id


# ---- parts


def part_size(offset: int, steps: tuple[tuple[int, int], ...] = STEPS) -> int:
    """The size of the part that begins at `offset`: it grows, so that 10,000 parts are enough for more than a terabyte."""
    return next(size for below, size in steps if offset < below)


def planned(total: int, steps: tuple[tuple[int, int], ...] = STEPS) -> int:
    """How many parts an object of `total` bytes has when all are full."""
    count = offset = 0
    for below, size in steps:
        span = min(total, below) - offset
        if span > 0:
            count += -(-span // size)
            offset += span
    return count


def may_cut(tail: int, parts: int, offset: int, steps: tuple[tuple[int, int], ...] = STEPS) -> bool:
    """Whether a suspended upload may close its unfinished part early: large enough for S3, and enough part numbers remain."""
    return tail >= MIN_PART and parts < planned(offset, steps) + SPARE_PARTS


def next_number(parts: int) -> int:
    """The number of the next part; raises TooLarge behind S3's last one."""
    if parts >= MAX_PARTS:
        raise TooLarge(f"the object needs more than {MAX_PARTS} parts", expected="an object of at most about 1.8 TiB", reason="parts")
    return parts + 1


class Memory:
    """Bytes that all buffers of one store may take together; who gets none goes to disk or reads less, and nobody waits for a client."""

    def __init__(self, total: int = MEMORY) -> None:
        self.total, self._used, self._lock = total, 0, threading.Lock()

    @property
    def used(self) -> int:
        """Bytes that are given out."""
        return self._used

    def take(self, size: int) -> bool:
        """Takes `size` bytes where they are free."""
        with self._lock:
            if self._used + size > self.total:
                return False
            self._used += size
            return True

    def give(self, size: int) -> None:
        """Gives bytes back."""
        with self._lock:
            self._used -= size

    def read_size(self, most: int = READ) -> int:
        """How much one read should fetch now: less, the more is in use, and never nothing."""
        return most if self._used < self.total // 4 else most // 4 if self._used < self.total // 2 else most // 32


class Tail:
    """The unfinished part of one upload: in memory while there is some, then in an unnamed file of the data directory."""

    def __init__(self, memory: Memory, folder: Path) -> None:
        self._memory, self._folder = memory, folder
        self._held = 0
        self._on_disk = False
        self.size = 0
        self.file: IO[bytes] = io.BytesIO()

    def append(self, view: memoryview) -> None:
        """Adds bytes; raises OSError when neither memory nor disk has room, and then holds what it held."""
        if not self._on_disk and not self._memory.take(len(view)):
            self._spill()
        elif not self._on_disk:
            self._held += len(view)
        self.file.seek(self.size)
        self.file.write(view)
        self.file.flush()
        self.size += len(view)

    def _spill(self) -> None:
        file = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115 - lives as long as the tail
        try:
            self.file.seek(0)
            shutil.copyfileobj(self.file, file, MIB)
            file.flush()
        except OSError:
            file.close()
            raise
        self.file.close()
        self.file, self._on_disk = file, True
        self._memory.give(self._held)
        self._held = 0

    def close(self) -> None:
        """Gives everything back."""
        self._memory.give(self._held)
        self._held = 0
        self.file.close()
