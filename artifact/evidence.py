"""What an auditor is given of the audit log and how it is checked: the export's lines, and the proof of one entry; no database, no network.

Here, in the base, because a machine without a registry must be able to say whether the evidence holds. An export is verified as it streams.
Sources: docs/format.md section 9, RFC 6962, C2SP tlog-checkpoint.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from artifact import tlog
from artifact.errors import AirlockError, Invalid, Mismatch
from artifact.manifest import parse_json

SCHEMA = 1
MAX_LINE = 4 * 1024 * 1024
MAX_CHECKPOINTS = 200_000
Entry = tuple[bytes, str | None]  # the leaf hash, and the body unless it was sealed into an earlier export


@dataclass(frozen=True)
class Head:
    """What an export begins with: the log, the range of entries, what came before them, the checkpoints over them."""

    name: str
    first: int
    size: int
    before: bytes = b""
    checkpoints: tuple[str, ...] = ()


@dataclass
class Finding:
    """What a verification found out: the entries and the newest checkpoint that vouches for them."""

    name: str
    first: int
    size: int
    root: str
    checkpoints: int
    sealed: int = 0
    since: int = 0
    leases: dict[str, int] = field(default_factory=dict)

    def as_json(self) -> dict[str, object]:
        """The finding as a JSON object."""
        return dict(vars(self))


def _b64(raw: bytes) -> str:
    return base64.b64encode(raw).decode()


def _raw(value: object, what: str) -> bytes:
    try:
        return base64.b64decode(str(value), validate=True)
    except (binascii.Error, ValueError) as error:
        raise _broken(f"{what} is not base64") from error


def _broken(what: str) -> Invalid:
    return Invalid(
        f"the evidence cannot be read: {what}", expected="a file as airlock audit wrote it", do="fetch it again from the registry", reason="evidence"
    )


def lines(head: Head, entries: Iterable[Entry]) -> Iterator[bytes]:
    """The lines of an export: the head, its checkpoints, its entries, and a last line that tells that nothing is missing."""
    top = {"schema": SCHEMA, "log": head.name, "first": head.first, "size": head.size, "before": _b64(head.before)}
    seen = hashlib.sha256()
    for line in _lines(top, head.checkpoints, head.first, entries):
        seen.update(line)
        yield line
    yield _line({"end": head.size, "sha256": seen.hexdigest()})


def _lines(top: Mapping[str, object], checkpoints: Sequence[str], first: int, entries: Iterable[Entry]) -> Iterator[bytes]:
    yield _line(top)
    for note in checkpoints:
        yield _line({"checkpoint": note})
    for i, (leaf, body) in enumerate(entries, first):
        yield _line({"i": i, "hash": _b64(leaf)} | ({"body": body} if body is not None else {}))


def _line(doc: Mapping[str, object]) -> bytes:
    return json.dumps(doc, sort_keys=True, separators=(",", ":")).encode() + b"\n"


def verify(source: Iterable[bytes], vkey: str, since: str = "") -> Finding:
    """What an export holds, only if all of it is whole; raises Invalid, Mismatch naming the first entry that is not.

    1 the head; 2 every checkpoint is signed by the pinned key; 3 a kept older checkpoint too, and it is not larger; 4 each entry stands at its
    number and its body has its hash; 5 the root over them is that of each checkpoint on the way; 6 the newest covers all; 7 nothing is missing;
    8 the serials of each organisation's leases have no gap.
    """
    feed = _Feed(source)
    head = _head(feed)
    wanted = _wanted(head, vkey, since)
    log = tlog.Range(head.first, head.before)
    found = Finding(head.name, head.first, head.size, "", len(head.checkpoints), since=tlog.open_checkpoint(since, vkey).size if since else 0)
    vouched = head.first
    while log.size < head.size:
        at = log.size
        found.sealed += _entry(feed.next(), at, log, found)
        if log.size in wanted:
            if log.root() != wanted[log.size]:
                raise Mismatch(
                    f"entries {vouched} to {at} are not those that were signed", expected="the root of the checkpoint", do=_ALTERED, reason="evidence"
                )
            vouched = log.size
    if vouched != head.size:
        raise Mismatch(f"no checkpoint covers entries {vouched} to {head.size - 1}", expected="a signed end", do=_ALTERED, reason="evidence")
    feed.end(head.size)
    found.root = log.root().hex()
    return found


_ALTERED = "keep this file: the log, the export or the checkpoint was altered"


class _Feed:
    """Lines one after the other, hashed as they are read."""

    def __init__(self, source: Iterable[bytes]) -> None:
        self._source = iter(source)
        self._seen = hashlib.sha256()
        self._held: dict[str, object] | None = None
        self.read = 0

    def next(self) -> dict[str, object]:
        """The next line as an object; raises Invalid at the end."""
        if self._held is not None:
            found, self._held = self._held, None
            return found
        raw = next(self._source, b"")
        if not raw.endswith(b"\n"):
            raise _broken(f"it ends within or after line {self.read}")
        self.read += 1
        doc = parse_json(raw, f"line {self.read} of the evidence", MAX_LINE)
        if "end" not in doc:
            self._seen.update(raw)
        return doc

    def back(self, doc: dict[str, object]) -> None:
        """Puts the line that was read last back."""
        self._held = doc

    def end(self, size: int) -> None:
        """Returns only where the last line follows and nothing behind it."""
        doc = self.next()
        if doc.get("end") != size or doc.get("sha256") != self._seen.hexdigest() or next(self._source, b""):
            raise _broken("its last line does not fit what stands before it")


def _number(doc: Mapping[str, object], name: str) -> int:
    value = doc.get(name)
    if type(value) is not int or not 0 <= value <= tlog.MAX_SIZE:
        raise _broken(f"{name} is no number of entries")
    return value


def _head(feed: _Feed) -> Head:
    top = feed.next()
    if top.get("schema") != SCHEMA or not isinstance(top.get("log"), str):
        raise _broken("its first line is another format")
    notes: list[str] = []
    while True:
        doc = feed.next()
        note = doc.get("checkpoint")
        if not isinstance(note, str):
            feed.back(doc)
            break
        notes.append(note)
        if len(notes) > MAX_CHECKPOINTS:
            raise _broken(f"it holds more than {MAX_CHECKPOINTS} checkpoints")
    return Head(str(top["log"]), _number(top, "first"), _number(top, "size"), _raw(top.get("before"), "the head"), tuple(notes))


def _wanted(head: Head, vkey: str, since: str) -> dict[int, bytes]:
    """The roots that must be met on the way, by size; raises Mismatch for a kept checkpoint that is larger than the log."""
    wanted: dict[int, bytes] = {}
    for note in (*head.checkpoints, *([since] if since else [])):
        found = tlog.open_checkpoint(note, vkey)
        if found.size > head.size:
            what = f"the log had {found.size} entries when a checkpoint was signed, and has {head.size} now"
            raise Mismatch(what, expected="a log that only grows", do=_ALTERED, reason="size_regression")
        if wanted.setdefault(found.size, found.root) != found.root:
            raise Mismatch(f"two checkpoints over {found.size} entries contradict each other", expected="one history", do=_ALTERED, reason="fork")
    start = tlog.Range(head.first, head.before)
    if wanted.pop(head.first, start.root()) != start.root() and head.first:
        raise Mismatch(
            f"entries 0 to {head.first - 1} are not those that were signed", expected="the root of the checkpoint", do=_ALTERED, reason="evidence"
        )
    return {size: root for size, root in wanted.items() if size > head.first}


def _entry(doc: Mapping[str, object], at: int, log: tlog.Range, found: Finding) -> int:
    """Takes one entry; 1 where its body was sealed elsewhere."""
    if doc.get("i") != at:
        raise Mismatch(f"entry {at} is missing or stands elsewhere", expected=f"entry {at}", do=_ALTERED, reason="evidence")
    leaf, body = _raw(doc.get("hash"), f"the hash of entry {at}"), doc.get("body")
    if body is not None and (not isinstance(body, str) or tlog.leaf_hash(body.encode("utf-8", "surrogatepass")) != leaf):
        raise Mismatch(
            f"entry {at} was altered: its text does not have its hash", expected="the text as it was recorded", do=_ALTERED, reason="evidence"
        )
    log.append(leaf)
    if body is None:
        found.leases.clear()  # what was sealed may hold leases: counting begins behind it
        return 1
    _lease(str(body), at, found)
    return 0


def _lease(body: str, at: int, found: Finding) -> None:
    if '"lease"' not in body:
        return
    doc = parse_json(body.encode("utf-8", "surrogatepass"), f"entry {at}", MAX_LINE)
    serial, org = doc.get("serial"), str(doc.get("org"))
    if doc.get("event") != "lease" or type(serial) is not int:
        return
    before = found.leases.get(org)
    if before is not None and serial != before + 1:
        raise Mismatch(
            f"entry {at} is lease {serial} of {org}, after lease {before}", expected=f"lease {before + 1}", do=_ALTERED, reason="lease_serial"
        )
    found.leases[org] = serial


# ---- one entry


def proof_of(entry: Entry, index: int, proof: Sequence[bytes], checkpoint: str) -> bytes:
    """The file that proves one entry under a checkpoint."""
    leaf, body = entry
    doc = {"schema": SCHEMA, "i": index, "hash": _b64(leaf), "proof": [_b64(node) for node in proof], "checkpoint": checkpoint}
    return json.dumps(doc | ({"body": body} if body is not None else {}), sort_keys=True, indent=1).encode() + b"\n"


def verify_proof(raw: bytes, vkey: str) -> dict[str, object]:
    """The entry that a proof file vouches for; raises Invalid, Mismatch."""
    doc = parse_json(raw, "the proof", MAX_LINE)
    nodes, note, body = doc.get("proof"), doc.get("checkpoint"), doc.get("body")
    if doc.get("schema") != SCHEMA or not isinstance(nodes, list) or not isinstance(note, str) or len(nodes) > 64:
        raise _broken("it is no proof")
    leaf = _raw(doc.get("hash"), "the hash")
    if body is not None and (not isinstance(body, str) or tlog.leaf_hash(body.encode("utf-8", "surrogatepass")) != leaf):
        raise Mismatch("the entry was altered: its text does not have its hash", expected="the text as it was recorded", reason="evidence")
    checkpoint = tlog.open_checkpoint(note, vkey)
    index = _number(doc, "i")
    tlog.verify_inclusion(leaf, index, checkpoint.size, [_raw(node, "the proof") for node in nodes], checkpoint.root)
    try:
        shown: object = parse_json(str(body).encode(), "the entry", MAX_LINE) if body is not None else None
    except AirlockError:
        shown = body
    return {"index": index, "size": checkpoint.size, "log": checkpoint.origin, "entry": shown}
