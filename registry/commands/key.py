"""`airlock key create|list|revoke`: API keys of a data directory; a key is shown once and stored as an HMAC only."""

from __future__ import annotations

import argparse
import json
import re
import sys
import time

from artifact.errors import Invalid
from artifact.grant import TIERS, Grant, date
from registry.catalog import ensure_org
from registry.people import check_org
from registry.library import local_call
from registry.settings import Settings
from registry.wiring import Site, open_site

UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
MAX_LIFE_S = 3660 * 86400
WORDS = {
    "pull": "reads",
    "create": "pushes new tags and moves none",
    "push": "pushes, moves and deletes",
    "run": "takes leases for the runtime",
    "admin": "does all of it, and owns the site's own names",
    "auditor": "lists all of its organisation and its audit rows, without content",
}


def seconds(text: str) -> float:
    """A life such as `90d`, `12h` or `never` (0) in seconds; raises Invalid."""
    if text == "never":
        return 0.0
    found = re.fullmatch(r"([0-9]{1,9})([smhdw])", text)
    if not found or not 0 < int(found[1]) * UNITS[found[2]] <= MAX_LIFE_S:
        raise Invalid(f"{text[:40]!r} is not a life", expected="a number and s, m, h, d or w (at most ten years), or never", do="--expires 90d")
    return float(int(found[1]) * UNITS[found[2]])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="airlock key", description="API keys of this registry.", epilog="example: airlock key list --data /srv/airlock"
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="create|list|revoke")
    create = verbs.add_parser(
        "create", help="make a key; it is shown once", epilog="example: airlock key create --org acme --tier enterprise --models 'acme/*'"
    )
    create.add_argument("--org", required=True, help="organisation that the key belongs to; made if it is new")
    create.add_argument("--tier", choices=TIERS, default="developer", help="subscription tier (developer)")
    create.add_argument(
        "--models", action="append", required=True, metavar="PATTERN", help="model names: * is one segment, a last ** any rest; repeatable"
    )
    create.add_argument("--expires", default="90d", help="life of the key: 90d, 12h, never (90d)")
    create.add_argument("--actions", default="pull,run", help="comma-separated (pull,run): " + "; ".join(f"{a} {w}" for a, w in WORDS.items()))
    create.add_argument("--note", default="", help="who holds it, for the list")
    show = verbs.add_parser("list", help="list keys by their public facts", epilog="example: airlock key list --data /srv/airlock --json")
    show.add_argument("--org", default="", help="of one organisation only")
    revoke = verbs.add_parser("revoke", help="revoke a key at once", epilog="example: airlock key revoke KEY_ID --data /srv/airlock")
    revoke.add_argument("key_id", help="public id, as key list shows it")
    for verb in (create, show, revoke):
        verb.add_argument("--data", help="data directory (AIRLOCK_DATA)")
        verb.add_argument("--json", action="store_true", help="machine-readable output")
    return parser


def main(argv: list[str]) -> int:
    """Runs one verb and returns the exit status."""
    args = _parser().parse_args(argv)
    verb = {"create": _create, "list": _list, "revoke": _revoke}[args.verb]
    with open_site(Settings.load(args.data)) as site:
        return verb(site, args)


def _create(site: Site, args: argparse.Namespace) -> int:
    now = time.time()
    org, life = check_org(args.org), seconds(args.expires)
    actions = tuple(dict.fromkeys(a.strip() for a in args.actions.split(",") if a.strip()))
    grant = Grant(tuple(dict.fromkeys(args.models)), actions)
    expires = now + life if life else 0.0
    with site.catalog.writing() as conn:
        org_id = ensure_org(conn, org, now)
        key_id, key = site.entitlements.add_key(conn, org_id, tier=args.tier, grant=grant, expires=expires, at=now, note=args.note)
        site.audit.change(
            conn, local_call(now), "key_create", key_id, owner=org, tier=args.tier, models=[*grant.models], actions=[*actions], expires=expires
        )
    if args.json:
        print(json.dumps({"key": key, "key_id": key_id, "org": org, "tier": args.tier, "expires": date(expires) if expires else ""}))
        return 0
    print(key)
    print(f"{key_id} of {org}, tier {args.tier}, expires {date(expires) if expires else 'never'}; the key is not shown again", file=sys.stderr)
    return 0


def _list(site: Site, args: argparse.Namespace) -> int:
    now = time.time()
    rows = site.entitlements.keys(args.org)
    for row in rows:
        row["state"] = _state(row, now)
        for name in ("created", "expires", "revoked_at"):
            at = row[name]
            row[name] = date(at) if isinstance(at, float | int) and at else ""
    if args.json:
        print(json.dumps({"items": rows}))
        return 0
    for row in rows:
        models, actions = row["models"], row["actions"]
        rights = f"{','.join(models) if isinstance(models, list) else ''} [{','.join(actions) if isinstance(actions, list) else ''}]"
        print(f"{row['key_id']}  {row['state']:8} {row['org']}  {row['tier']}  {row['expires'] or 'never'}  {rights}  {row['note']}".rstrip())
    return 0


def _state(row: dict[str, object], now: float) -> str:
    expires = row["expires"]
    if row["revoked_at"]:
        return "revoked"
    return "expired" if isinstance(expires, float | int) and 0 < expires <= now else "active"


def _revoke(site: Site, args: argparse.Namespace) -> int:
    now = time.time()
    with site.catalog.writing() as conn:
        is_new = site.entitlements.revoke(conn, args.key_id, now)
        if is_new:
            site.audit.change(conn, local_call(now), "key_revoke", args.key_id)
    state = "revoked" if is_new else "was revoked before"
    print(json.dumps({"key_id": args.key_id, "state": state}) if args.json else f"{args.key_id} {state}")
    return 0
