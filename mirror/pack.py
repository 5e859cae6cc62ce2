"""Turns what staging holds into the next bundle: everything that the names reach must be there, or nothing is written.

It fetches nothing and moves no name; the bundle's format and trust are artifact.bundle's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from artifact import bundle, medium
from artifact.errors import Invalid, NotFound
from artifact.upstream import check_fact
from mirror import documents, receipts
from mirror.home import MirrorHome, Named

KINDS = {"model": "model", "profiles": "profiles"}


@dataclass(frozen=True)
class Plan:
    """What a pack would put onto a medium."""

    names: tuple[medium.BundleName, ...]
    objects: dict[str, int]
    upstream: tuple[dict[str, object], ...]
    documents: tuple[str, ...] = ()


def plan(home: MirrorHome) -> Plan:
    """All that staging holds, with the documents of this mirror; raises NotFound naming what staging lacks, Invalid when it holds no name."""
    names = home.names()
    if not names:
        raise Invalid("staging holds no name", expected="at least one synced item", do=f"airlock mirror sync plan.yaml --home {home.path}")

    def read(digest: str, limit: int) -> bytes | None:
        return home.disk.read(digest, limit) if home.disk.size(digest) is not None else None

    reached = medium.closure([(n.name, n.digest, n.media_type) for n in names], read)
    objects = reached.objects()
    missing = dict(reached.missing)
    missing.update({d: "blob" for d, size in objects.items() if home.disk.size(d) != size})
    if missing:
        shown = ", ".join(f"{d} ({what})" for d, what in sorted(missing.items())[:5])
        raise NotFound(
            f"staging lacks {len(missing)} of {len(objects)} objects: {shown}", do="run airlock mirror sync again", reason="missing_objects"
        )
    moved = tuple(medium.BundleName(n.name, n.ref, n.digest, n.media_type, n.display, KINDS.get(n.kind, "image")) for n in names)
    carried = tuple(found.head.token for found in documents.listed(home))
    return Plan(moved, objects, tuple(_upstream(n) for n in names if n.upstream), carried)


def _upstream(named: Named) -> dict[str, object]:
    fact: dict[str, object] = {"name": named.name, "ref": named.ref, "digest": named.digest, **named.upstream}
    check_fact(fact)  # what the closed side would refuse stays here
    return fact


def pack(
    home: MirrorHome,
    directory: Path,
    now: float,
    progress: Callable[[int], None] = lambda n: None,
    begin: Callable[[int], None] = lambda n: None,
    receipt: Path | None = None,
) -> dict[str, object]:
    """Writes the next bundle and reports its sequence, objects and bytes; `changed` false means that nothing was new and nothing was written.

    `begin` is told the bytes to copy, `progress` each number copied. With a receipt, what its receiver holds stays at home.
    Raises NotFound, Invalid, Unavailable, Mismatch, Denied.
    """
    with home.lock("pack"):
        wanted = plan(home)
        held = receipts.held(receipts.read(receipt, home, now), home) if receipt else set()
        objects = {digest: size for digest, size in wanted.objects.items() if digest not in held}
        facts = (wanted.names, objects, wanted.upstream)
        done = bundle.write_bundle(directory, home.path / "tuf", home.id, *facts, home.disk.path, now, progress, begin, wanted.documents)
    return {
        "sequence": done.sequence,
        "changed": done.changed,
        "sender": home.id,
        "directory": str(directory),
        "names": len(wanted.names),
        "documents": len(wanted.documents),
        "objects": done.objects,
        "bytes": done.objects_bytes,
        "copied": done.copied,
        "copied_bytes": done.copied_bytes,
    }
