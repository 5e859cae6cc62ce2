"""What a receiver says it holds: its receipt names a bundle that it took in whole, and that bundle's index tells the digests.

A receipt is a claim by a key that nobody pinned here. It must not be trusted for anything but leaving bytes out: a wrong one makes a bundle
that the receiver refuses, naming the digest.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from artifact import medium, trust
from artifact.errors import Invalid, NotFound
from artifact.manifest import parse_json
from mirror.home import MirrorHome


def read(path: Path, home: MirrorHome, now: float) -> medium.BundleIndex:
    """The index of the bundle that a receipt confirms; raises Invalid, Mismatch, Denied, NotFound."""
    try:
        doc = parse_json(path.read_bytes(), "the receipt", trust.MAX_DOCUMENT_BYTES)
    except OSError as error:
        raise NotFound(f"the receipt {path} cannot be read: {error.strerror}", expected="receipt.json from a medium that was imported") from error
    key, token = doc.get("key"), doc.get("receipt")
    pem = key.get("pem") if isinstance(key, Mapping) else None
    if not isinstance(pem, str) or not isinstance(token, str):
        raise Invalid("the file is no receipt", expected="receipt.json as airlock bundle import wrote it", reason="receipt")
    claims = trust.verify_jws(token, "receipt+jwt", {trust.kid(pem): pem}, now)
    sequence = claims.get("sequence")
    if claims.get("sub") != f"sender:{home.id}" or type(sequence) is not int:
        raise Invalid("the receipt is of another sender's bundle", expected=f"sender:{home.id}", reason="receipt")
    try:
        index = medium.load_index((home.path / "tuf" / f"index.{sequence}.json").read_bytes())
    except OSError as error:
        raise NotFound(
            f"the receipt confirms bundle {sequence}, which this mirror does not know", do="pack without --receipt", reason="receipt"
        ) from error
    if index.digest != claims.get("index"):
        raise Invalid(f"the receipt confirms another bundle {sequence}", expected=index.digest, do="pack without --receipt", reason="receipt")
    return index


def held(index: medium.BundleIndex, home: MirrorHome) -> set[str]:
    """Every digest that the names of a confirmed bundle reach: its receiver holds them all."""

    def read_staged(digest: str, limit: int) -> bytes | None:
        return home.disk.read(digest, limit) if home.disk.size(digest) is not None else None

    reached = medium.closure([(n.name, n.digest, n.media_type) for n in index.names], read_staged)
    return set(reached.objects()) - set(reached.missing) | set(index.objects)
