"""What NGC lists of a version's files, read from untrusted answers: entries of the listing, signed URLs, checksums.blake3; no network here.

Each thing is bounded by itself, since what a listing holds is kept in memory until the version is fetched.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping
from dataclasses import dataclass

from artifact.errors import Invalid, TooLarge
from artifact.manifest import MAX_FILES, check_path, is_digest

SUMS = "checksums.blake3"
MAX_SUMS = 16 * 1024 * 1024
MAX_URL = 16 * 1024
MAX_DATE = 64
_SUM = re.compile(r"([0-9a-f]{64})  ?\*?(.+)\Z")


@dataclass(frozen=True)
class RemoteFile:
    """One file as NGC lists it: its digests where they are told; when it was made, and its host's mark, keep bytes of two files of one name apart."""

    path: str
    size: int
    digest: str = ""
    blake3: str = ""
    made: str = ""
    mark: str = ""


def listed(entry: object) -> RemoteFile:
    """One entry of modelFiles; raises Invalid."""
    if not isinstance(entry, Mapping) or not isinstance(entry.get("path"), str):
        raise Invalid("an entry of the listing names no file", expected="path, sizeInBytes and sha256_base64", reason="upstream")
    path, size, made = check_path(entry["path"]), entry.get("sizeInBytes"), entry.get("createdDate")
    if type(size) is not int or not 0 <= size < 1 << 63:
        raise Invalid(f"the listing gives no size for {path!r}", expected="whole bytes", reason="upstream")
    told, digest = entry.get("sha256_base64"), ""
    if told is not None and told != "":
        try:
            digest = f"sha256:{base64.b64decode(told, validate=True).hex()}"
        except (binascii.Error, ValueError, TypeError):
            digest = ""
        if not is_digest(digest):
            raise Invalid(f"the listing gives no proper digest for {path!r}", expected="base64 of 32 bytes", reason="upstream")
    return RemoteFile(path, size, digest, made=made[:MAX_DATE] if isinstance(made, str) else "")


def signed(doc: Mapping[str, object]) -> dict[str, str]:
    """Path to signed URL of a listing of URLs; raises Invalid, TooLarge."""
    urls, paths = doc.get("urls"), doc.get("filepath")
    if not isinstance(urls, list) or not isinstance(paths, list) or len(urls) != len(paths) or not all(isinstance(v, str) for v in [*urls, *paths]):
        raise Invalid("NGC's listing of URLs cannot be read", expected="urls and filepath of one length", reason="upstream")
    if any(len(url) > MAX_URL for url in urls):
        raise TooLarge("NGC lists a URL that is too long", expected=f"at most {MAX_URL} characters", reason="upstream")
    return {check_path(path): url for path, url in zip(paths, urls, strict=True)}


def sums_of(raw: bytes) -> dict[str, str]:
    """Path to BLAKE3 of a checksums.blake3, `<64 hex>  <path>` a line; raises Invalid."""
    out: dict[str, str] = {}
    try:
        lines = raw.decode("utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise Invalid(f"{SUMS} is not UTF-8", expected="lines of a checksum and a path", reason="upstream") from error
    for line in filter(None, lines):
        found = _SUM.match(line)
        if not found:
            raise Invalid(f"{SUMS} holds the line {line[:80]!r}", expected="64 hex digits, two spaces, a path", reason="upstream")
        path = check_path(found[2].removeprefix("./"))
        if out.setdefault(path, found[1]) != found[1]:
            raise Invalid(f"{SUMS} gives {path!r} two checksums", expected="one", reason="upstream")
    if len(out) > MAX_FILES * 10:
        raise TooLarge(f"{SUMS} lists {len(out)} files", expected=f"at most {MAX_FILES} chosen ones")
    return out
