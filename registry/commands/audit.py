"""`airlock audit export|checkpoint|key|prove|report|seal|accept-fork`: the signed log as an auditor and an administrator use it.

`airlock audit verify` is in artifact/commands/audit_verify.py, since it must run where no registry is installed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import secrets
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from artifact.errors import Conflict, Invalid
from artifact.evidence import Entry, Head, decode, lines, verify, verify_proof
from registry.commands.period import span, when
from registry.commands.reach import Ask, arguments, reached, tell
from registry.commands.tables import TABLES, as_csv, as_text
from registry.ledger import PAGE, Ledger, Sealed
from registry.library import local_call
from registry.page import page
from registry.settings import Settings
from registry.wiring import Site, open_site

EXAMPLES = {
    "export": "airlock audit export audit-2026.jsonl --registry https://registry.example.com",
    "checkpoint": "airlock audit checkpoint --data /srv/airlock > checkpoint.txt",
    "key": "airlock audit key --data /srv/airlock > audit.vkey",
    "prove": "airlock audit prove entry-42.json --index 42 --data /srv/airlock",
    "report": "airlock audit report --month 2026-11 --html report.html --data /srv/airlock",
    "seal": "airlock audit seal audit-2025.jsonl --until 2026-01-01 --data /srv/airlock",
    "accept-fork": "airlock audit accept-fork --reason 'disk lost, backup of Monday' --data /srv/airlock",
}
HELPS = (
    "write all entries and checkpoints into a file that airlock audit verify checks",
    "print the newest signed checkpoint, for an auditor to keep",
    "print the verifier key that auditors pin",
    "write the proof that one entry is in the log",
    "who pulled what, GPUs against licences, denials of a period",
    "keep the texts of old entries in an export alone: their hashes stay here",
    "begin another log where the database was put back and cannot be restored",
)


def _parser() -> argparse.ArgumentParser:
    described = "The signed audit log. An export is checked by airlock audit verify, which needs no registry."
    parser = argparse.ArgumentParser(prog="airlock audit", description=described, epilog=f"example: {EXAMPLES['export']}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="|".join((*EXAMPLES, "verify")))
    made = {verb: verbs.add_parser(verb, help=words, epilog=f"example: {EXAMPLES[verb]}") for verb, words in zip(EXAMPLES, HELPS, strict=True)}
    for verb in ("export", "prove", "seal"):
        made[verb].add_argument("file", type=Path, metavar="FILE", help="the file to write; one that is there is never replaced")
    made["export"].add_argument("--first", type=int, default=0, metavar="N", help="begin at this entry (0): those before it are in an earlier export")
    one = made["prove"].add_mutually_exclusive_group(required=True)
    one.add_argument("--index", default="", metavar="N", help="the entry's number")
    one.add_argument("--request-id", default="", metavar="ID", help="the request that it records, as its answer's X-Request-ID said")
    one.add_argument("--lease", default="", metavar="JTI", help="the lease that it records")
    report = made["report"]
    report.add_argument("--month", help="the month, 2026-11 (this month so far)")
    report.add_argument("--from", dest="start", help="instead: from this day or moment on, 2026-11-01 or 2026-11-01T00:00:00Z")
    report.add_argument("--to", dest="end", help="up to this day or moment (now)")
    report.add_argument("--org", default="", help="of one organisation only")
    report.add_argument("--html", type=Path, metavar="FILE", help="write one printable page, replacing the file")
    report.add_argument("--csv", choices=tuple(TABLES), nargs="?", const="pulls", metavar="TABLE", help=f"one table as CSV: {', '.join(TABLES)}")
    made["seal"].add_argument("--until", required=True, help="entries before this day or moment, up to the last checkpoint before it")
    made["accept-fork"].add_argument("--reason", required=True, help="why what was signed is given up, for the new log")
    for verb, sub in made.items():
        if verb in ("seal", "accept-fork"):  # what takes away needs the machine itself
            sub.add_argument("--data", help="data directory (AIRLOCK_DATA)")
            sub.add_argument("--json", action="store_true", help="machine-readable output")
        else:
            arguments(sub)
    return parser


def main(argv: list[str]) -> int:
    """Runs one verb and returns the exit status."""
    args = _parser().parse_args(argv)
    if args.verb in ("seal", "accept-fork"):
        with open_site(Settings.load(args.data), background=False) as site:
            return {"seal": _seal, "accept-fork": _accept_fork}[args.verb](site, args)
    with reached(args) as ask:
        return {"export": _export, "checkpoint": _checkpoint, "key": _key, "prove": _prove, "report": _report}[args.verb](ask, args)


@contextmanager
def _new(path: Path) -> Iterator[BinaryIO]:
    """A file that appears under its name once it is whole and on the disk; raises Conflict where there is one."""
    if path.exists():
        raise Conflict(f"{path} is there already", expected="a new file: evidence is never replaced", do="choose another name", reason="exists")
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600), "wb") as out:
            yield out
            out.flush()
            os.fsync(out.fileno())
        try:
            os.link(partial, path)  # unlike a rename it replaces nothing
        except FileExistsError:
            raise Conflict(f"{path} was made meanwhile", do="choose another name", reason="exists") from None
    finally:
        partial.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _counted(items: Iterable[Entry | str], head: Head, label: str, *, quiet: bool) -> Iterator[Entry | str]:
    """The same, with their number on a terminal."""
    shown = time.monotonic()
    told = sys.stderr.isatty() and not quiet
    at = head.first
    for item in items:
        yield item
        at += not isinstance(item, str)
        if told and time.monotonic() - shown > 0.2:
            shown = time.monotonic()
            print(f"\r\x1b[K{label}: entry {at} of {head.size}", end="", file=sys.stderr, flush=True)
    if told:
        print(f"\r\x1b[K{label}: {at - head.first} entries", file=sys.stderr)


def _write(path: Path, head: Head, items: Iterable[Entry | str]) -> str:
    """Writes an export and returns the SHA-256 of the file."""
    seen = hashlib.sha256()
    with _new(path) as out:
        for line in lines(head, items):
            seen.update(line)
            out.write(line)
    return "sha256:" + seen.hexdigest()


# ---- reading


def _items(ask: Ask, head: Head) -> Iterator[Entry | str]:
    after = head.first
    while after < head.size:
        found = ask("GET", "audit/entries", None, after=after, size=head.size, limit=PAGE)
        notes = {signed["size"]: signed["note"] for signed in found["checkpoints"]}
        for entry in found["items"]:
            yield decode(entry["hash"], f"the hash of entry {entry['i']}"), entry.get("body")
            if entry["i"] + 1 in notes:
                yield str(notes[entry["i"] + 1])
        after = found["after"] or head.size


def _export(ask: Ask, args: argparse.Namespace) -> int:
    if args.first < 0:
        raise Invalid(f"{args.first} is no number of an entry", expected="0 or more", reason="first")
    top = ask("GET", "audit/checkpoint", None, first=args.first)
    head = Head(top["log"], top["first"], top["size"], decode(top["before"], "the range before it"))
    if head.first == head.size:
        raise Invalid(f"there is no entry from {head.first} on yet", expected=f"--first below {head.size}", reason="first")
    digest = _write(args.file, head, _counted(_items(ask, head), head, "export", quiet=args.json))
    facts = {"file": str(args.file), "digest": digest, **{name: top[name] for name in ("log", "first", "size", "key", "checkpoint")}}
    said = f"{args.file}: entries {head.first} to {head.size - 1} of {head.name}, {digest}"
    return tell(args, facts, f"{said}\n{_how(args.file, top['key'])}")


def _how(file: Path, key: str) -> str:
    return f"verify: airlock audit verify {file} --key {key}"


def _checkpoint(ask: Ask, args: argparse.Namespace) -> int:
    top = ask("GET", "audit/checkpoint", None)
    return tell(args, top, str(top["checkpoint"]).removesuffix("\n"))


def _key(ask: Ask, args: argparse.Namespace) -> int:
    top = ask("GET", "audit/checkpoint", None)
    return tell(args, {"log": top["log"], "key": top["key"]}, str(top["key"]))


def _prove(ask: Ask, args: argparse.Namespace) -> int:
    found = ask("GET", "audit/proof", None, index=args.index, request_id=args.request_id, jti=args.lease)
    raw = json.dumps(found["proof"], sort_keys=True, indent=1).encode() + b"\n"
    shown = verify_proof(raw, found["key"])  # nothing is written that does not hold
    with _new(args.file) as out:
        out.write(raw)
    also = f"\nof the same: entries {', '.join(map(str, found['also']))}" if found["also"] else ""
    said = f"{args.file}: entry {shown['index']} of {shown['size']} in {shown['log']}{also}\n{_how(args.file, found['key'])}"
    return tell(args, {"file": str(args.file), "also": found["also"], "key": found["key"], **shown}, said)


def _report(ask: Ask, args: argparse.Namespace) -> int:
    start, end = span(args.month, args.start, args.end, time.time())
    query: dict[str, Any] = {"from": start, "to": end, "org": args.org}
    found = ask("GET", "audit/report", None, **query)
    if args.html:
        partial = args.html.with_name(f".{args.html.name}.{secrets.token_hex(4)}.partial")
        try:
            partial.write_text(page(found), "utf-8")
            partial.replace(args.html)
        finally:
            partial.unlink(missing_ok=True)
    if args.csv:
        sys.stdout.write(as_csv(found, args.csv))
    elif args.json:
        print(json.dumps(found))
    elif args.html:
        print(f"{args.html}: {start} to {end}")
    else:
        print(as_text(found))
    return 0


# ---- taking away


def _seal(site: Site, args: argparse.Namespace) -> int:
    ledger, now = Ledger(site.engine, site.log), site.floor.now(time.time())
    unfinished = ledger.clear()  # of a seal that was killed behind its record
    _, vkey, _ = ledger.signed(now)
    head = ledger.sealable(when(args.until, "--until"))
    digest = _write(args.file, head, _counted(ledger.items(head), head, "seal", quiet=args.json))
    with args.file.open("rb") as file:
        verify(file, vkey)
    with args.file.open("rb") as file:
        if "sha256:" + hashlib.file_digest(file, "sha256").hexdigest() != digest:
            raise Conflict(f"{args.file} changed under this command", do="nothing was removed: seal again into another file", reason="seal")
    call = local_call(now)

    def row(conn: Any, sealed: Sealed) -> None:
        facts = {"first": sealed.first, "size": sealed.size, "digest": sealed.digest, "file": args.file.name[:200]}
        site.audit.change(conn, call, "audit_seal", "", **facts)

    found = ledger.seal(head, args.file, digest, call.principal.key_id, now, row)
    ledger.signed(time.time())
    said = f"{args.file}: entries {found.first} to {found.size - 1}, {digest}\n"
    said += f"the texts of {found.cleared + unfinished} entries are gone from the database; keep the file: without it they are hashes"
    return tell(args, {"file": str(args.file), **found.as_json(), "key": vkey}, said)


def _accept_fork(site: Site, args: argparse.Namespace) -> int:
    call = local_call(site.floor.now(time.time()))

    def row(conn: Any, note: str) -> None:
        site.audit.change(conn, call, "audit_fork", "", given_up=note[:4000], why=args.reason[:500])

    epoch = site.log.accept_fork(row)
    ledger = Ledger(site.engine, site.log)
    note, vkey, head = ledger.signed(time.time())
    said = f"{head.name} is the log from now on; its verifier key, for auditors to pin beside the old one:\n{vkey}"
    return tell(args, {"epoch": epoch, "log": head.name, "key": vkey, "checkpoint": note}, said)
