"""Entitlements and revocation lists that this mirror carries: armoured files in its home, put into the index of every bundle until they are removed.

It signs and judges nothing: the closed side takes a document in by the issuers that it pinned. It must not change a byte of one.
"""

from __future__ import annotations

from pathlib import Path

from artifact import documents as d
from artifact import trust
from artifact.errors import Conflict, Invalid, NotFound, TooLarge
from artifact.medium import replace_file
from mirror.home import MirrorHome

FOLDER = "documents"


def _path(home: MirrorHome, jti: str) -> Path:
    return home.path / FOLDER / f"{jti}.pem"


def add(home: MirrorHome, text: str, issuer: str = "") -> d.Document:
    """Takes one in, whose signature is compared with the public key of `issuer` where one is given; the same again is a no-op.

    Raises Invalid, Mismatch `signature`, Conflict for another one of the same id, TooLarge.
    """
    found = d.unverified(text)
    if issuer:
        trust.signed_claims(found.head.token, found.head.kind, {trust.kid(issuer): issuer}, d.CLAIMS[found.head.kind])
    with home.lock(FOLDER):
        path, here = _path(home, found.head.jti), listed(home)
        same = next((other for other in here if other.head.jti == found.head.jti), None)
        if same and same.head.token != found.head.token:
            raise Conflict(f"another document of the id {found.head.jti} is here", do=f"airlock mirror document remove {found.head.jti}")
        if not same and len(here) >= d.MAX_DOCUMENTS:
            raise TooLarge(f"{len(here)} documents are here", expected=f"at most {d.MAX_DOCUMENTS}", do="remove those that are over")
        path.parent.mkdir(mode=0o700, exist_ok=True)
        replace_file(path, d.armour(found.head.token, found.head.kind).encode())
    return found


def listed(home: MirrorHome) -> list[d.Document]:
    """The documents of this mirror, by id; raises Invalid for one that was altered beyond reading."""
    out = []
    for path in sorted((home.path / FOLDER).glob("*.pem")):
        try:
            found = d.unverified(path.read_text("ascii", "replace"))
        except Invalid as error:
            raise Invalid(f"{path} is damaged: {error.what}", do="remove the file, and add the document again", reason="document") from error
        if path.stem != found.head.jti:
            raise Invalid(f"{path} holds the document {found.head.jti}", do="remove the file, and add the document again", reason="document")
        out.append(found)
    return out


def remove(home: MirrorHome, jti: str) -> d.Document:
    """Carries one no longer; what a site took in stays there; raises NotFound."""
    with home.lock(FOLDER):
        found = next((other for other in listed(home) if other.head.jti == jti), None)
        if found is None:
            raise NotFound(f"there is no document {jti[:80]!r}", do="airlock mirror document list", reason="document")
        _path(home, jti).unlink()
    return found
