"""`airlock catalog list|show NAME`: what a key sees in a registry, over the registry's admin door."""

from __future__ import annotations

import argparse
import json
import os
from typing import Any
from urllib.parse import quote

from artifact.errors import Invalid
from artifact.manifest import check_name
from artifact.remote import RemoteRegistry

_COLUMNS = ("name", "kind", "ref", "digest", "size", "files", "profiles", "promoted")


def _size(value: int) -> str:
    size = float(value)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def _rows(shown: dict[str, Any]) -> list[dict[str, str]]:
    """One row for each ref of a repository; signature tags are no rows, they say that what they sign is promoted."""
    beside = {str(r["ref"]): str(r["digest"]) for r in shown.get("profiles") or []}
    own = {str(r["ref"]): str(r["digest"]) for r in shown.get("refs") or []}
    rows = []
    for ref in shown.get("refs") or []:
        name = str(ref["ref"])
        if name.startswith("sha256-") and name.endswith(".sig"):
            continue
        judged = beside.get(name, "") or (own[name] if shown.get("kind") == "profiles" else "")
        signed = judged.replace(":", "-") + ".sig" in (beside or own)
        row = {"name": str(shown["name"]), "kind": str(shown.get("kind", "")), "ref": name, "digest": str(ref["digest"])}
        row |= {"files": str(ref.get("files") or "-")}
        row["size"] = _size(int(ref.get("bytes") or 0)) if ref.get("files") else "-"  # a manifest's own size would say nothing about an image
        rows.append(row | {"profiles": "yes" if name in beside else "-", "promoted": "yes" if judged and signed else "-"})
    return rows or [{"name": str(shown["name"]), "kind": str(shown.get("kind", ""))}]


def _table(rows: list[dict[str, str]]) -> str:
    cells = [tuple(c.upper() for c in _COLUMNS)]
    cells += [tuple(row.get(c, "-")[: 19 if c == "digest" else None] or "-" for c in _COLUMNS) for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(_COLUMNS))]
    return "\n".join("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip() for line in cells)


def _show(remote: RemoteRegistry, name: str) -> dict[str, Any]:
    return dict(remote.api("GET", f"/airlock/v1/catalog/{check_name(name)}", None))


def _all(remote: RemoteRegistry) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    after = ""
    while True:
        page: dict[str, Any] = remote.api("GET", f"/airlock/v1/catalog?limit=500&after={quote(after, safe='')}", None)
        rows += page.get("items") or []
        after = str(page.get("after") or "")
        if not after:
            return rows


def main(argv: list[str]) -> int:
    """Entry point of `airlock catalog`."""
    parser = argparse.ArgumentParser(
        prog="airlock catalog",
        description="Shows what a key sees in a registry; the key comes from AIRLOCK_KEY.",
        epilog="example: airlock catalog list --registry http://127.0.0.1:5000",
    )
    actions = parser.add_subparsers(dest="action", required=True)
    for action, words in (("list", "every name this key sees"), ("show", "one name in full")):
        example = f"example: airlock catalog {action}{' acme/tiny' if action == 'show' else ''} --registry http://127.0.0.1:5000 --json"
        sub = actions.add_parser(action, help=words, epilog=example)
        if action == "show":
            sub.add_argument("name")
        sub.add_argument("--registry", default=os.environ.get("AIRLOCK_REGISTRY", ""), help="URL of the registry (AIRLOCK_REGISTRY)")
        sub.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args(argv)
    if not args.registry:
        raise Invalid("no registry was given", expected="--registry URL or AIRLOCK_REGISTRY")
    remote = RemoteRegistry(args.registry, os.environ.get("AIRLOCK_KEY", ""))
    if args.action == "list":
        shown = [_show(remote, str(row["name"])) for row in _all(remote)]
        print(json.dumps({"items": shown}, indent=2) if args.json else _table([row for one in shown for row in _rows(one)]))
        return 0
    found = _show(remote, args.name)
    if args.json:
        print(json.dumps(found, indent=2))
        return 0
    for key in ("name", "display", "kind", "org", "visibility", "gated", "entitled"):
        print(f"{key + ':':<12}{found.get(key, '')}")
    if not found.get("entitled"):
        print(f"{'reason:':<12}{found.get('reason', '')}")
    print(_table(_rows(found)))
    return 0
