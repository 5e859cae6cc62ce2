"""`airlock audit verify`: whether an export or a proof of the audit log holds under a pinned key, on a machine with the base installation alone."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from artifact.copy import Progress
from artifact.errors import Invalid
from artifact.evidence import MAX_LINE, Finding, verify, verify_proof
from artifact.tlog import MAX_NOTE

EXAMPLE = "airlock audit verify audit-2026.jsonl --key audit.vkey --since checkpoint-2025.txt"


def _text_of(given: str, what: str) -> str:
    """What an option says itself, or the file that it names; raises Invalid."""
    if "\n" in given or "+" in given:
        return given
    with Path(given).open("rb") as file:  # an export named by mistake may have gigabytes
        raw = file.read(MAX_NOTE + 1)
    if len(raw) <= MAX_NOTE:
        with suppress(UnicodeError):
            return raw.decode("utf-8")
    raise Invalid(f"{given[:200]} is no {what}", expected=f"a text file of at most {MAX_NOTE} bytes", reason="file")


def _lines(file: BinaryIO, first: bytes, progress: Progress | None) -> Iterator[bytes]:
    line = first
    while line:
        if progress:
            progress.add(len(line))
        yield line
        line = file.readline(MAX_LINE + 1)


def main(argv: list[str]) -> int:
    """Verifies and prints what was found; raises Mismatch for what does not hold."""
    parser = argparse.ArgumentParser(
        prog="airlock audit verify",
        description="Verify an export of the audit log, or the proof of one entry. Needs no registry, no database and no network.",
        epilog=f"example: {EXAMPLE}; exit 7: it does not hold, and the first bad entry is named",
    )
    parser.add_argument("file", metavar="FILE", help="what airlock audit export, seal or prove wrote")
    parser.add_argument("--key", required=True, metavar="VKEY", help="the log's verifier key as airlock audit key prints it, or a file with it")
    parser.add_argument("--since", default="", metavar="FILE", help="a checkpoint kept from an earlier audit: the log must go on from it")
    parser.add_argument("--json", action="store_true", help="machine-readable output")
    given = parser.parse_args(argv)
    key, since = _text_of(given.key, "verifier key").strip(), _text_of(given.since, "checkpoint") if given.since else ""
    with Path(given.file).open("rb") as file:
        first = file.readline(MAX_LINE + 1)
        if first == b"{\n":  # a proof is written to be read by people too
            return _proof(first + file.read(MAX_LINE + 1), key, since, given.json)
        size = Path(given.file).stat().st_size
        progress = Progress(size, "verify", sys.stderr) if sys.stderr.isatty() and not given.json else None
        try:
            found = verify(_lines(file, first, progress), key, since)
        finally:
            if progress:
                progress.close()
    print(json.dumps({"whole": True, **found.as_json()}) if given.json else _words(found))
    return 0


def _proof(raw: bytes, key: str, since: str, as_json: bool) -> int:
    if since:
        raise Invalid("a proof of one entry says nothing about an earlier log", expected="an export with --since", reason="evidence")
    found = verify_proof(raw, key)
    shown = json.dumps(found["entry"], indent=1, sort_keys=True) if found["entry"] is not None else "its text was sealed into an export"
    print(json.dumps({"whole": True, **found}) if as_json else f"entry {found['index']} of {found['size']} in {found['log']} is proven:\n{shown}")
    return 0


def _words(found: Finding) -> str:
    out = [f"{found.name}: entries {found.first} to {found.size - 1} are whole; {found.checkpoints} checkpoints, root {found.root}"]
    if found.since:
        out.append(f"it goes on from the kept checkpoint over {found.since} entries")
    if found.sealed:
        out.append(f"the texts of {found.sealed} entries were sealed into earlier exports; their hashes are here")
    out += [f"leases of {org}: without a gap up to number {serial}" for org, serial in sorted(found.leases.items())]
    return "\n".join(out)
