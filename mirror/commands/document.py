"""`airlock mirror document add|list|remove`: entitlements and revocation lists that travel in every bundle."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from artifact import trust
from artifact.documents import EXPECTED, Document, Licence
from artifact.errors import NotFound
from artifact.grant import date
from mirror import documents
from mirror.commands.key import home_argument
from mirror.home import MirrorHome

EXAMPLES = {
    "add": "airlock mirror document add acme.pem --issuer issuer.pem.pub",
    "list": "airlock mirror document list --json",
    "remove": "airlock mirror document remove JTI",
}


def main(argv: list[str]) -> int:
    """Runs one of the three; returns the exit status."""
    parser = argparse.ArgumentParser(prog="airlock mirror document", description="Signed documents that travel in every bundle.")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="|".join(EXAMPLES))
    helps = {"add": "carry a document", "list": "what is carried", "remove": "carry a document no longer"}
    made = {verb: verbs.add_parser(verb, help=helps[verb], epilog=f"example: {EXAMPLES[verb]}") for verb in EXAMPLES}
    made["add"].add_argument("file", type=Path, metavar="FILE", help="an entitlement or a revocation list, armoured or bare")
    help_ = "public key of its issuer: a document that this key did not sign would make the closed side refuse every bundle"
    made["add"].add_argument("--issuer", type=Path, metavar="FILE", required=True, help=help_)
    made["remove"].add_argument("jti", help="the id, as document list shows it")
    for sub in made.values():
        home_argument(sub)
    given = parser.parse_args(argv)
    home = MirrorHome.open(given.home)
    if given.verb == "list":
        found = documents.listed(home)
        print(json.dumps({"items": [_facts(x) for x in found]}) if given.json else "\n".join(map(_line, found)) or "no document is carried")
        return 0
    adds = given.verb == "add"
    one = documents.add(home, _read(given.file), _read(given.issuer)) if adds else documents.remove(home, given.jti)
    word = "every bundle carries" if adds else "no bundle carries"
    print(json.dumps(_facts(one)) if given.json else f"{word} {_line(one)}")
    return 0


def _read(path: Path) -> str:
    try:
        with path.open("rb") as source:
            return source.read(2 * trust.MAX_DOCUMENT_BYTES + 1).decode("ascii", "replace")
    except OSError as error:
        raise NotFound(f"{path} cannot be read: {error.strerror}", expected=EXPECTED) from error


def _facts(found: Document) -> dict[str, object]:
    head = found.head
    of = {"document": "entitlement", "org": found.org, "site": found.site} if isinstance(found, Licence) else {"document": "revocations"}
    facts: dict[str, object] = {**of, "jti": head.jti, "issuer": head.issuer, "kid": head.kid, "serial": head.serial}
    return facts | {"begins": date(head.begins), "ends": date(head.ends)}


def _line(found: Document) -> str:
    facts = _facts(found)
    whose = f" of {facts['org']} at {facts['site']}" if "org" in facts else ""
    return f"{facts['document']} {facts['jti']}{whose}, by {facts['issuer']}, serial {facts['serial']}, {facts['begins']} to {facts['ends']}"
