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
MAX_GAPS = 1000  # ranges of missing texts that are told apart
Entry = tuple[bytes, str | None]  # the leaf hash, and the body unless it was sealed into an earlier export
_ALTERED = "keep this file and the kept checkpoint: the log, the export or the checkpoint was altered"


@dataclass(frozen=True)
class Head:
    """What an export begins with: the log, the range of entries [first, size), and the compact range over those before them."""

    name: str
    first: int
    size: int
    before: bytes = b""


@dataclass
class Finding:
    """What a verification found out: the entries, and the root that the newest checkpoint vouches for."""

    name: str
    first: int
    size: int
    root: str = ""
    checkpoints: int = 0
    sealed: int = 0
    since: int = 0
    leases: dict[str, int] = field(default_factory=dict)  # the last lease serial of each organisation

    def as_json(self) -> dict[str, object]:
        """The finding as a JSON object."""
        return dict(vars(self))


def encode(raw: bytes) -> str:
    """Bytes as an export's lines and a proof hold them: standard base64."""
    return base64.b64encode(raw).decode()


def decode(value: object, what: str) -> bytes:
    """The bytes again; raises Invalid."""
    try:
        return base64.b64decode(str(value), validate=True)
    except (binascii.Error, ValueError) as error:
        raise _broken(f"{what} is not base64") from error


def _broken(what: str) -> Invalid:
    return Invalid(
        f"the evidence cannot be read: {what}", expected="a file as airlock audit wrote it", do="fetch it again from the registry", reason="evidence"
    )


def _false(what: str, expected: str, index: int, reason: str = "evidence") -> Mismatch:
    return Mismatch(what, expected=expected, do=_ALTERED, reason=reason, index=index)


def lines(head: Head, items: Iterable[Entry | str]) -> Iterator[bytes]:
    """The lines of an export: the head, each entry, behind it a checkpoint that was signed over it, and a last line: nothing is missing."""
    seen = hashlib.sha256()
    for line in _lines(head, items):
        seen.update(line)
        yield line
    yield _line({"end": head.size, "sha256": seen.hexdigest()})


def _lines(head: Head, items: Iterable[Entry | str]) -> Iterator[bytes]:
    yield _line({"schema": SCHEMA, "log": head.name, "first": head.first, "size": head.size, "before": encode(head.before)})
    index = head.first
    for item in items:
        if isinstance(item, str):
            yield _line({"checkpoint": item})
            continue
        leaf, body = item
        yield _line({"i": index, "hash": encode(leaf)} | ({"body": body} if body is not None else {}))
        index += 1


def _line(doc: Mapping[str, object]) -> bytes:
    return json.dumps(doc, sort_keys=True, separators=(",", ":")).encode() + b"\n"


def verify(source: Iterable[bytes], vkey: str, since: str = "") -> Finding:
    """What an export holds, only if all of it is whole; raises Invalid, Mismatch with the `index` of the first entry that nothing vouches for.

    1 the head is of the pinned key's log; 2 a kept older checkpoint is signed by the key, and not larger; 3 each entry stands at its number and its
    body has its hash; 4 every checkpoint, the kept one too, has the root of the entries before it; 5 the newest covers all; 6 nothing is missing;
    7 the serials of each organisation's leases have no gap; 8 a text that is not here is of a range that an entry `audit_seal` tells of.
    Memory does not grow with the log.
    """
    feed = _Feed(source)
    head = _head(feed.next())
    _demand_log(head, vkey)
    kept = _kept(head, vkey, since)
    log, found = tlog.Range(head.first, head.before), Finding(head.name, head.first, head.size, since=kept.size if kept else 0)
    vouched, seals = head.first, _Seals()
    while True:
        if kept is not None and kept.size == log.size:
            if log.root() != kept.root:
                raise _false(f"entries {vouched} to {log.size - 1} are not those of the kept checkpoint", "one history", vouched, "fork")
            kept = None
        doc = feed.next()
        if "checkpoint" in doc:
            _checkpoint(doc, vkey, log, vouched)
            found.checkpoints, vouched = found.checkpoints + 1, log.size
        elif log.size < head.size:
            found.sealed += _entry(doc, log.size, log, found, seals)
        else:
            break
    feed.end(doc, head.size)
    if vouched != head.size or not found.checkpoints:
        raise _false(f"no checkpoint covers the entries from {vouched}", "a signed end", vouched)
    seals.demand()
    found.root = log.root().hex()
    return found


class _Feed:
    """Lines one after the other, hashed as they are read."""

    def __init__(self, source: Iterable[bytes]) -> None:
        self._source = iter(source)
        self._seen = hashlib.sha256()
        self._read = 0

    def next(self) -> dict[str, object]:
        """The next line as an object; raises Invalid at the end."""
        raw = next(self._source, b"")
        if not raw.endswith(b"\n"):
            raise _broken(f"it ends within or after line {self._read}" if self._read or raw else "it is empty")
        self._read += 1
        doc = parse_json(raw, f"line {self._read} of the evidence", MAX_LINE)
        if "end" not in doc:
            self._seen.update(raw)
        return doc

    def end(self, doc: Mapping[str, object], size: int) -> None:
        """Returns only where this is the last line, and nothing stands behind it."""
        if doc.get("end") != size or doc.get("sha256") != self._seen.hexdigest() or next(self._source, b""):
            raise _broken("its last line does not fit what stands before it")


def _number(doc: Mapping[str, object], name: str) -> int:
    value = doc.get(name)
    if type(value) is not int or not 0 <= value <= tlog.MAX_SIZE:
        raise _broken(f"{name} is no number of entries")
    return value


def _head(top: Mapping[str, object]) -> Head:
    if top.get("schema") != SCHEMA or not isinstance(top.get("log"), str):
        raise _broken("its first line is another format")
    head = Head(str(top["log"]), _number(top, "first"), _number(top, "size"), decode(top.get("before"), "the head"))
    if head.first > head.size:
        raise _broken("it begins behind its end")
    return head


def _demand_log(head: Head, vkey: str) -> None:
    name = tlog.name_of(vkey)
    if head.name != name:
        do = "take the key of that log from its administrator, and ask why it was begun again" if head.name.startswith(f"{name}/") else "name its key"
        raise Mismatch(f"this is the log {head.name[:200]!r}", expected=f"{name}, whose key is pinned", do=do, reason="log")


def _kept(head: Head, vkey: str, since: str) -> tlog.Checkpoint | None:
    """The checkpoint that the auditor kept; raises Mismatch where the log is smaller than it, Invalid where this export begins behind it."""
    if not since:
        return None
    kept = tlog.open_checkpoint(since, vkey)
    if kept.size > head.size:
        what = f"the log had {kept.size} entries when the kept checkpoint was signed, and has {head.size} now"
        raise _false(what, "a log that only grows", head.size, "size_regression")
    if kept.size < head.first:
        what = f"this export begins at entry {head.first}, behind the {kept.size} of the kept checkpoint"
        raise Invalid(what, expected="an export from there on", do="verify the earlier file with it, then this one", reason="evidence")
    return kept


def _checkpoint(doc: Mapping[str, object], vkey: str, log: tlog.Range, vouched: int) -> None:
    signed = tlog.open_checkpoint(str(doc["checkpoint"]), vkey)
    if signed.size != log.size:
        raise _false(f"a checkpoint over {signed.size} entries stands behind entry {log.size - 1}", "one over these", vouched)
    if signed.root != log.root():
        raise _false(f"entries {vouched} to {log.size - 1} are not those that were signed", "the root of the checkpoint", vouched)


class _Seals:
    """Where texts are missing, and up to where the log itself says that they were sealed."""

    def __init__(self) -> None:
        self._gaps: list[tuple[int, int]] = []
        self._told = 0

    def missing(self, at: int) -> None:
        """The entry has no text; of more than MAX_GAPS ranges the last ones are one."""
        if self._gaps and (self._gaps[-1][1] == at or len(self._gaps) >= MAX_GAPS):
            self._gaps[-1] = (self._gaps[-1][0], at + 1)
        else:
            self._gaps.append((at, at + 1))

    def tells(self, doc: Mapping[str, object]) -> None:
        """An entry that may be the record of a seal."""
        size = doc.get("size")
        if doc.get("event") == "audit_seal" and type(size) is int:
            self._told = max(self._told, size)

    def demand(self) -> None:
        """Returns only where every text that is missing was sealed; raises Mismatch."""
        for first, end in self._gaps:
            if end > self._told:
                at = max(first, self._told)
                raise Mismatch(
                    f"the text of entry {at} is not here, and no seal tells of it",
                    expected="an entry audit_seal over it among those behind it",
                    do="export again, should a seal have been made meanwhile; else the text was taken away: keep this file",
                    reason="evidence",
                    index=at,
                )


def _entry(doc: Mapping[str, object], at: int, log: tlog.Range, found: Finding, seals: _Seals) -> int:
    """Takes one entry; 1 where its body was sealed elsewhere."""
    if doc.get("i") != at:
        raise _false(f"entry {at} is missing or stands elsewhere", f"entry {at}", at)
    leaf, body = decode(doc.get("hash"), f"the hash of entry {at}"), doc.get("body")
    if len(leaf) != tlog.HASH:
        raise _broken(f"the hash of entry {at} is none")
    if body is not None and (not isinstance(body, str) or tlog.leaf_hash(body.encode()) != leaf):
        raise _false(f"entry {at} was altered: its text does not have its hash", "the text as it was recorded", at)
    log.append(leaf)
    if body is None:
        found.leases.clear()  # what was sealed may hold leases: counting begins behind it
        seals.missing(at)
        return 1
    if '"audit_seal"' in body:
        seals.tells(parse_json(body.encode(), f"entry {at}", MAX_LINE))
    if '"lease"' in body:
        _lease(parse_json(body.encode(), f"entry {at}", MAX_LINE), at, found)
    return 0


def _lease(doc: Mapping[str, object], at: int, found: Finding) -> None:
    serial, org = doc.get("serial"), str(doc.get("org"))
    if doc.get("event") != "lease" or type(serial) is not int:
        return
    before = found.leases.get(org)
    if before is not None and serial != before + 1:
        raise _false(f"entry {at} is lease {serial} of {org[:100]!r}, after lease {before}", f"lease {before + 1}", at, "lease_serial")
    found.leases[org] = serial


# ---- one entry


def proof_of(entry: Entry, index: int, proof: Sequence[bytes], checkpoint: str) -> bytes:
    """The file that proves one entry under a checkpoint."""
    leaf, body = entry
    doc = {"schema": SCHEMA, "i": index, "hash": encode(leaf), "proof": [encode(node) for node in proof], "checkpoint": checkpoint}
    return json.dumps(doc | ({"body": body} if body is not None else {}), sort_keys=True, indent=1).encode() + b"\n"


def verify_proof(raw: bytes, vkey: str) -> dict[str, object]:
    """The entry that a proof file vouches for; raises Invalid, Mismatch."""
    doc = parse_json(raw, "the proof", MAX_LINE)
    nodes, note, body = doc.get("proof"), doc.get("checkpoint"), doc.get("body")
    if doc.get("schema") != SCHEMA or not isinstance(nodes, list) or not isinstance(note, str) or len(nodes) > 64:
        raise _broken("it is no proof")
    leaf = decode(doc.get("hash"), "the hash")
    if body is not None and (not isinstance(body, str) or tlog.leaf_hash(body.encode()) != leaf):
        raise _false("the entry was altered: its text does not have its hash", "the text as it was recorded", _number(doc, "i"))
    checkpoint = tlog.open_checkpoint(note, vkey)
    index = _number(doc, "i")
    tlog.verify_inclusion(leaf, index, checkpoint.size, [decode(node, "the proof") for node in nodes], checkpoint.root)
    try:
        shown: object = parse_json(str(body).encode(), "the entry", MAX_LINE) if body is not None else None
    except AirlockError:
        shown = body
    return {"index": index, "size": checkpoint.size, "log": checkpoint.origin, "entry": shown}
