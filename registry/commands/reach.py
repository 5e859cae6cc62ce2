"""How `airlock org`, `airlock key` and `airlock grant` reach a site: its data directory here, or its registry over HTTP; the verbs are the same.

Here so that a verb is one row of registry/verbs.py wherever it runs. On the data directory nobody is asked for a key: whoever can write it owns it.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast
from urllib.parse import quote, urlencode

from artifact.remote import RemoteRegistry
from registry import tls
from registry.auditor import Auditor
from registry.documents import Documents
from registry.expiring import Expiring
from registry.guard import Guard
from registry.issuance import Issuance
from registry.leasing import Leasing
from registry.ledger import Ledger
from registry.library import local_call
from registry.roster import Roster
from registry.settings import Settings
from registry.verbs import GETS, NAMED, POSTS
from registry.wiring import Site, open_site

PAGE = 500
Ask = Callable[..., dict[str, Any]]


@dataclass(frozen=True)
class _Parts:
    """The parts of a guard that need no caller's key on the data directory."""

    roster: Roster
    issuance: Issuance
    auditor: Auditor
    documents: Documents
    leasing: Leasing
    expiring: Expiring


class _Given(dict[str, str]):
    """A query as the verbs read it, from the command's own words."""

    def param(self, name: str, default: str = "") -> str:
        return self.get(name, default)

    cursor = param

    def number(self, name: str, default: int, most: int) -> int:
        return min(int(self.get(name) or default), most)


def arguments(parser: argparse.ArgumentParser) -> None:
    """Adds --data, --registry, --ca-file and --json."""
    parser.add_argument("--data", help="data directory (AIRLOCK_DATA)")
    parser.add_argument("--registry", help="URL of the registry instead, with the key in AIRLOCK_KEY (AIRLOCK_REGISTRY)")
    parser.add_argument("--ca-file", default=os.environ.get("AIRLOCK_CA_FILE"), help="CA of the registry's certificate (AIRLOCK_CA_FILE)")
    parser.add_argument("--json", action="store_true", help="machine-readable output")


@contextmanager
def reached(args: argparse.Namespace) -> Iterator[Ask]:
    """The way to ask: `ask(method, path, body, **query)`; raises what the site refuses with."""
    url = args.registry or ("" if args.data or os.environ.get("AIRLOCK_DATA") else os.environ.get("AIRLOCK_REGISTRY", ""))
    if url:
        remote = RemoteRegistry(url, os.environ.get("AIRLOCK_KEY", ""), ca_file=args.ca_file)
        yield lambda method, path, body=None, **query: remote.api(method, _path(path, query), body)
        return
    with open_site(Settings.load(args.data)) as site:
        yield lambda method, path, body=None, **query: _local(site, method, path, body, query)


def _path(path: str, query: Mapping[str, object]) -> str:
    given = {name: value for name, value in query.items() if value}
    return f"/airlock/v1/{quote(path)}" + (f"?{urlencode(given)}" if given else "")


def _local(site: Site, method: str, path: str, body: Mapping[str, object] | None, query: Mapping[str, object]) -> dict[str, Any]:
    desk = (site.engine, site.entitlements, site.audit)
    auditor = Auditor(Ledger(site.engine, site.log), site.entitlements, site.audit)
    leasing = Leasing(*desk, library=site.library, home=site.home, floor=site.floor)
    ends = Expiring(*desk, certificate=tls.served(site.settings))
    parts = cast(Guard, _Parts(Roster(*desk), Issuance(*desk), auditor, site.documents, leasing, ends))
    call, given = local_call(site.floor.now(time.time())), _Given({name: str(value) for name, value in query.items() if value})
    if method == "POST":
        return POSTS[path](parts, call, body or {})
    word, _, rest = path.partition("/")
    return GETS[path](parts, call, given) if path in GETS else NAMED[word](parts, call, given, rest)


def everything(ask: Ask, path: str, **query: object) -> list[dict[str, Any]]:
    """All items of a list, page after page."""
    out: list[dict[str, Any]] = []
    after: object = ""
    while True:
        found = ask("GET", path, None, after=after, limit=PAGE, **query)
        out += found.get("items") or []
        after = found.get("after")
        if not after:
            return out


def tell(args: argparse.Namespace, facts: object, text: str) -> int:
    """Prints an answer, as JSON where that was asked for, and returns the exit status of success."""
    print(json.dumps(facts) if args.json else text)
    return 0


def table(rows: list[dict[str, Any]], *columns: str) -> str:
    """Items as lines of columns; a list is shown with commas between, what is empty as `-`."""
    cells = [tuple(name.upper().replace("_", " ") for name in columns)]
    for row in rows:
        shown = [",".join(map(str, row[c])) if isinstance(row[c], list) else str(row[c]) for c in columns]
        cells.append(tuple(text or "-" for text in shown))
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    return "\n".join("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip() for line in cells)


def given(args: argparse.Namespace, *names: str) -> dict[str, object]:
    """The fields of a body: the options of these names that were set."""
    found = {name: getattr(args, name) for name in names}
    return {name: value for name, value in found.items() if value not in (None, "", [])}


def commas(text: str) -> list[str]:
    """The words of a list with commas between, each once."""
    return list(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))
