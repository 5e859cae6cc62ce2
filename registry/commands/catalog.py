"""`airlock catalog …`: what a key sees in a registry, and what its administrator removes, rolls back and bounds; over the registry's admin door."""

from __future__ import annotations

import argparse
import json
import os
import re
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any
from urllib.parse import quote

from artifact.errors import Denied, Invalid
from artifact.grant import TIERS, date, model_of
from artifact.manifest import check_name, check_ref, is_digest
from artifact.remote import RemoteRegistry

_COLUMNS = ("name", "kind", "ref", "digest", "size", "files", "profiles", "promoted")


def size_text(value: int) -> str:
    """Bytes as a person reads them."""
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
        row["size"] = size_text(int(ref.get("bytes") or 0)) if ref.get("files") else "-"  # a manifest's own size would say nothing about an image
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


def _list(remote: RemoteRegistry, args: argparse.Namespace) -> tuple[object, str]:
    shown = [_show(remote, str(row["name"])) for row in _all(remote)]
    return {"items": shown}, _table([row for one in shown for row in _rows(one)])


def _one(remote: RemoteRegistry, args: argparse.Namespace) -> tuple[object, str]:
    found = _show(remote, args.name)
    lines = [f"{key + ':':<12}{found.get(key, '')}" for key in ("name", "display", "kind", "org", "visibility", "gated", "entitled")]
    if not found.get("entitled"):
        lines.append(f"{'reason:':<12}{found.get('reason', '')}")
    needs = [f"{word} {found[key]}" for word, key in (("tier", "requires_tier"), ("product", "requires_product")) if found.get(key)]
    lines.append(f"{'requires:':<12}{', '.join(needs) or 'nothing'}")
    lines += [f"{word + ':':<12}{found[key]}" for word, key in (("unaccepted", "unaccepted"), ("blocked", "blocked")) if found.get(key)]
    if _auditor(remote):  # of whoever else it would be a denial
        with suppress(Denied):
            found["upstream"] = _pages(remote, f"upstream?name={quote(check_name(args.name), safe='')}")
            lines += [_upstream(row) for row in found["upstream"]]
    return found, "\n".join([*lines, _table(_rows(found))])


def _auditor(remote: RemoteRegistry) -> bool:
    """Whether this key may look at what bundles told of upstreams."""
    standing: dict[str, Any] = remote.api("GET", "/airlock/v1/standing", None)
    return any({"auditor", "admin"} & set(grant["actions"]) for grant in standing["grants"])


def _pages(remote: RemoteRegistry, path: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    after = 0
    while True:
        page: dict[str, Any] = remote.api("GET", f"/airlock/v1/{path}&limit=500&after={after}", None)
        rows += page["items"]
        after = int(page["after"])
        if not after:
            return rows


def _upstream(row: dict[str, Any]) -> str:
    """What the upstream's entitlement was when a ref was fetched, in one line."""
    parts = [f"{row['ref']} from {row['source']}"]
    parts += [f"{word} {row[key]}" for word, key in (("account", "upstream_org"), ("key", "key_id"), ("licence", "license")) if row[key]]
    parts += [f"accepted by {row['accepted_by']} at {date(row['accepted_at'])}"] if row["accepted_by"] else []
    parts += [f"subscription ends {date(row['subscription_end'])}"] if row["subscription_end"] else []
    parts += ["gated"] if row["gated"] else []
    parts += [row["evidence"]] if row["evidence"] else []
    return f"{'upstream:':<12}" + ", ".join(parts)


def _require(remote: RemoteRegistry | None, args: argparse.Namespace) -> tuple[object, str]:
    body: dict[str, object] = {"name": check_name(args.name)}
    body |= {"tier": "", "product": ""} if args.none else {}
    body |= {key: value for key, value in (("tier", args.tier), ("product", args.product)) if value is not None}
    if len(body) == 1 or (args.none and (args.tier or args.product)):
        raise Invalid("nothing was said", expected="--tier, --product or both, or --none alone")
    found: dict[str, Any] = remote.api("POST", "/airlock/v1/require", body) if remote else _required(args.data, body)
    needs = [f"{key} {found[key]}" for key in ("tier", "product") if found[key]]
    return found, f"{found['name']} requires {' and '.join(needs) or 'nothing'}"


def _terms(remote: RemoteRegistry, args: argparse.Namespace) -> tuple[object, str]:
    body: dict[str, object] = {"name": check_name(args.name)}
    given = (("license", args.license), ("accepted_by", args.accepted_by), ("blocked", "" if args.unblock else args.block))
    body |= {key: value for key, value in given if value is not None}
    if len(body) == 1:
        raise Invalid("nothing was said", expected="--license, --accepted-by, --block or --unblock")
    found: dict[str, Any] = remote.api("POST", "/airlock/v1/terms", body)
    accepted = f"accepted by {found['accepted_by']}" if found["accepted_by"] else "not accepted: nobody reads it"
    words = f"licence {found['license']}, {accepted}" if found["license"] else "no licence to accept"
    return found, f"{found['name']}: {words}" + (f"; blocked: {found['blocked']}" if found["blocked"] else "")


def _required(data: str, body: dict[str, Any]) -> dict[str, object]:
    """The same on the data directory itself, as whoever may write there."""
    from registry import upstream  # here, so that what asks a registry over the network starts without a database's modules
    from registry.library import local_call
    from registry.settings import Settings
    from registry.wiring import open_site

    with open_site(Settings.load(data), background=False) as site:
        call, name = local_call(site.floor.now(time.time())), model_of(body["name"])
        return site.catalog.change(lambda conn: upstream.require(conn, site.audit, call, name, body.get("tier"), body.get("product")))


def _search(remote: RemoteRegistry, args: argparse.Namespace) -> tuple[object, str]:
    items: list[Any] = []
    after = ""
    while True:
        page: dict[str, Any] = remote.api("GET", f"/airlock/v1/search?limit=500&q={quote(args.text, safe='')}&after={quote(after, safe='')}", None)
        items += page.get("items") or []
        after = str(page.get("after") or "")
        if not after:
            return {"items": items}, "\n".join(f"{item['name']}  {item['kind']}".rstrip() for item in items)


def split_name(text: str) -> tuple[str, str]:
    """Name and reference of NAME, NAME:TAG or NAME@DIGEST, the reference empty for the first; raises Invalid."""
    name, _, digest = text.partition("@")
    if digest:
        if not is_digest(digest):
            raise Invalid(f"{digest[:100]!r} is not a digest", expected="NAME@sha256:<64 hex>")
        return check_name(name), digest
    head, _, last = text.rpartition("/")
    last, _, tag = last.partition(":")
    return check_name(f"{head}/{last}" if head else last), check_ref(tag) if tag else ""


def _rm(remote: RemoteRegistry, args: argparse.Namespace) -> tuple[object, str]:
    name, ref = split_name(args.name)
    body: dict[str, object] = {"name": name, "ref": ref, "dry_run": args.dry_run, "referrers": args.referrers, "force": args.force}
    found: dict[str, Any] = remote.api("POST", "/airlock/v1/remove", body)
    went = "would go" if args.dry_run else "went"
    lines = [f"{name}:{tag} {went}" for tag in found["tags"]] + [f"{name}@{digest} {went}" for digest in found["manifests"]]
    lines.append(f"this frees {size_text(int(found['bytes']))} in {found['blobs']} blobs; {found['shared_blobs']} blobs are held elsewhere and stay")
    if found["leased_until"] and int(found["blobs"]):
        lines.append(f"not before {found['leased_until']}, the end of the leases of their uploads")
    lines += [f"{name}@{digest} refers to it and stays; --referrers takes it along" for digest in found["referrers"]]
    lines += [f"a profile in {where} names it" for where in found["profiles"]]
    lines += [f"{name}@{digest} is an index that names it" for digest in found["holders"]]
    return found, "\n".join(lines)


def _history(remote: RemoteRegistry, args: argparse.Namespace) -> tuple[object, str]:
    path = f"/airlock/v1/history/{check_name(args.name)}?limit={args.limit}&tag={quote(args.tag, safe='')}"
    found: dict[str, Any] = remote.api("GET", path, None)
    lines = []
    for row in found["items"]:
        was = f"{row['from']}{'' if row['kept'] else ' (gone)'}" if row["from"] else "new"
        lines.append(f"{row['at']}  {row['tag']}  {was} -> {row['to'] or 'removed'}  by {row['key_id'] or '-'}")
    return found, "\n".join(lines)


def _rollback(remote: RemoteRegistry, args: argparse.Namespace) -> tuple[object, str]:
    name, tag = split_name(args.name)
    if not tag or is_digest(tag):
        raise Invalid("no tag was given", expected="NAME:TAG")
    found: dict[str, Any] = remote.api("POST", "/airlock/v1/rollback", {"name": name, "tag": tag, "digest": args.to})
    return found, f"{name}:{tag} names {found['to']} again" + (f", not {found['from']}" if found["from"] else "")


def _immutable(remote: RemoteRegistry, args: argparse.Namespace) -> tuple[object, str]:
    found = remote.api("POST", "/airlock/v1/immutable", {"name": check_name(args.name), "immutable": args.on})
    return found, f"the tags of {args.name} {'neither move nor go' if args.on else 'may move and go'}"


def parse_size(text: str) -> int:
    """Bytes of `500G`, `1.5T`, `1048576`, with K, M, G, T as powers of 1024; raises Invalid."""
    found = re.fullmatch(r"([0-9]{1,15})(?:\.([0-9]{1,3}))?([KMGTP]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    if not found:
        raise Invalid(f"{text[:40]!r} is no size", expected="for example 500G, or 0 for no bound")
    unit = 1 << 10 * " KMGTP".index(found[3].upper() or " ")
    return int(found[1]) * unit + (int(found[2].ljust(3, "0")) * unit // 1000 if found[2] else 0)


def _quota(remote: RemoteRegistry, args: argparse.Namespace) -> tuple[object, str]:
    if args.bytes is None:
        found: dict[str, Any] = remote.api("GET", f"/airlock/v1/quota/{quote(args.org, safe='')}", None)
    else:
        found = remote.api("POST", "/airlock/v1/quota", {"org": args.org, "bytes": parse_size(args.bytes)})
    bound = size_text(int(found["quota_bytes"])) if found["quota_bytes"] else "no bound"
    return found, f"{args.org} uses {size_text(int(found['used_bytes']))} in {found['blobs']} blobs, {bound}"


def _retention(remote: RemoteRegistry, args: argparse.Namespace) -> tuple[object, str]:
    if not args.pattern:
        found: dict[str, Any] = remote.api("GET", "/airlock/v1/retention", None)
        return found, "\n".join(map(_rule, found["items"])) or "no rule: everything is kept"
    body: dict[str, object] = {"pattern": args.pattern, "keep_last": args.keep_last, "keep_days": args.keep_days}
    body |= {"untagged_days": args.untagged_days, "keep_tags": args.keep_tags, "remove": args.remove}
    found = remote.api("POST", "/airlock/v1/retention", body)
    return found, f"no rule for {args.pattern} any more" if args.remove else _rule(found)


def _rule(rule: dict[str, Any]) -> str:
    parts = [f"the {rule['keep_last']} newest tags"] if rule["keep_last"] else []
    parts += [f"tags of the last {rule['keep_days']} days"] if rule["keep_days"] else []
    parts += ["tags like " + " ".join(rule["keep_tags"])] if parts and rule["keep_tags"] else []
    untagged = f"what has no tag for {rule['untagged_days']} days goes" if rule["untagged_days"] else "what has no tag stays"
    return f"{rule['pattern']}: keeps {' and '.join(parts) or 'all tags'}; {untagged}"


def _flags(action: str, sub: argparse.ArgumentParser) -> None:
    """The words and switches of one action."""
    if action in ("show", "rm", "history", "rollback", "immutable", "require", "terms"):
        sub.add_argument("name", help={"rm": "NAME, NAME:TAG or NAME@DIGEST", "rollback": "NAME:TAG"}.get(action))
    if action == "rm":
        sub.add_argument("--dry-run", action="store_true", help="tell what it would free, and what names it; change nothing")
        sub.add_argument("--referrers", action="store_true", help="take signatures and other referrers along")
        sub.add_argument("--force", action="store_true", help="although a profile or an index names it")
    elif action == "history":
        sub.add_argument("tag", nargs="?", default="")
        sub.add_argument("--limit", type=int, default=100, help="at most so many lines (100)")
    elif action == "rollback":
        sub.add_argument("--to", required=True, metavar="DIGEST", help="what the tag shall name again")
    elif action == "immutable":
        switch = sub.add_mutually_exclusive_group(required=True)
        switch.add_argument("--on", action="store_true", help="tags neither move nor go, for nobody")
        switch.add_argument("--off", action="store_true", help="tags may move and go")
    elif action == "require":
        sub.add_argument("--tier", choices=TIERS, help="what its vendor asks for; without it as before")
        sub.add_argument("--product", help="a product that the organisation's entitlement must have; without it as before")
        sub.add_argument("--none", action="store_true", help="nothing: own weights, or a right that is held otherwise")
        sub.add_argument("--data", default="", help="the data directory, in place of a registry")
    elif action == "terms":
        sub.add_argument("--license", metavar="TEXT", help="the licence that somebody must have accepted; '' for none; without it as before")
        sub.add_argument("--accepted-by", metavar="WHO", help="who accepted it; '' takes the acceptance back")
        block = sub.add_mutually_exclusive_group()
        block.add_argument("--block", metavar="WHY", help="nobody reads it: export control, a court, a contract")
        block.add_argument("--unblock", action="store_true", help="take the block away")
    elif action == "search":
        sub.add_argument("text")
    elif action == "quota":
        sub.add_argument("org")
        sub.add_argument("--bytes", metavar="SIZE", help="the new bound, for example 500G; 0 for none")
    elif action == "retention":
        sub.add_argument("pattern", nargs="?", default="", help="names, * for one segment, ** at the end; without it the rules are shown")
        for flag, words in (("keep-last", "newest tags to keep"), ("keep-days", "days to keep a tag"), ("untagged-days", "days to keep untagged")):
            sub.add_argument(f"--{flag}", type=int, default=0, metavar="N", help=f"{words}; 0 keeps everything")
        sub.add_argument("--keep-tags", action="append", default=[], metavar="GLOB", help="tags that always stay")
        sub.add_argument("--remove", action="store_true", help="remove the rule")


_ACTIONS: dict[str, tuple[Callable[[RemoteRegistry, argparse.Namespace], tuple[object, str]], str, str]] = {
    "list": (_list, "every name this key sees", ""),
    "show": (_one, "one name in full", " acme/tiny"),
    "search": (_search, "names with a text in them", " tiny"),
    "rm": (_rm, "remove a tag, a manifest or a whole name (action admin)", " acme/tiny:v1 --dry-run"),
    "history": (_history, "where tags pointed (action admin)", " acme/tiny v1"),
    "rollback": (_rollback, "point a tag at what it named before (action admin)", " acme/tiny:v1 --to sha256:…"),
    "immutable": (_immutable, "whether tags may move and go (action admin)", " acme/tiny --on"),
    "require": (_require, "what product and tier a name requires (administrator of the site)", " nvcr.io/nim/x --tier enterprise"),
    "terms": (
        _terms,
        "a licence to accept, and a block by the law (administrator of the site)",
        " nvcr.io/nim/x --license 'NVIDIA AI Product Agreement'",
    ),
    "quota": (_quota, "an organisation's bytes and bound (administrator of the site)", " acme --bytes 500G"),
    "retention": (_retention, "rules of what old tags go (administrator of the site)", " 'acme/ci/*' --keep-last 10 --untagged-days 7"),
}


def main(argv: list[str]) -> int:
    """Entry point of `airlock catalog`."""
    parser = argparse.ArgumentParser(
        prog="airlock catalog",
        description="Shows what a key sees in a registry, and what its administrator may change; the key comes from AIRLOCK_KEY.",
        epilog="example: airlock catalog list --registry http://127.0.0.1:5000",
    )
    actions = parser.add_subparsers(dest="action", required=True)
    for action, (_, words, example) in _ACTIONS.items():
        sub = actions.add_parser(action, help=words, epilog=f"example: airlock catalog {action}{example} --registry http://127.0.0.1:5000 --json")
        _flags(action, sub)
        sub.add_argument("--registry", default=os.environ.get("AIRLOCK_REGISTRY", ""), help="URL of the registry (AIRLOCK_REGISTRY)")
        sub.add_argument("--ca-file", default=os.environ.get("AIRLOCK_CA_FILE"), help="CA of the registry's certificate (AIRLOCK_CA_FILE)")
        sub.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args(argv)
    if getattr(args, "data", ""):
        found, text = _require(None, args)
    elif not args.registry:
        raise Invalid("no registry was given", expected="--registry URL or AIRLOCK_REGISTRY")
    else:
        remote = RemoteRegistry(args.registry, os.environ.get("AIRLOCK_KEY", ""), ca_file=args.ca_file)
        found, text = _ACTIONS[args.action][0](remote, args)
    print(json.dumps(found, indent=2) if args.json else text)
    return 0
