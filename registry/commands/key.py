"""`airlock key create|list|revoke|rotate|s3`: API keys of a site; a key is shown once and stored as an HMAC only."""

from __future__ import annotations

import argparse
import json
import sys

from artifact.errors import Invalid
from artifact.grant import TIERS
from registry.bodies import seconds
from registry.commands.reach import Ask, arguments, everything, given, reached, tell
from registry.commands.rights import right_arguments, right_body
from registry.issuance import DEFAULT_LIFE, TYPES

EXAMPLES = {
    "create": "airlock key create --org acme --tier enterprise --models 'acme/*'",
    "list": "airlock key list --data /srv/airlock --json",
    "revoke": "airlock key revoke KEY_ID --data /srv/airlock",
    "rotate": "airlock key rotate KEY_ID --overlap 7d --registry https://registry.example.com",
    "s3": "airlock key s3 KEY_ID --data /srv/airlock",
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="airlock key", description="API keys of this registry.", epilog=f"example: {EXAMPLES['list']}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="|".join(EXAMPLES))
    helps = (
        "make a key; it is shown once",
        "list keys by their public facts",
        "revoke a key at once",
        "make a key's successor; the old one ends later",
        "show what an S3 client signs with as a key; each showing is recorded",
    )
    made = {verb: verbs.add_parser(verb, help=words, epilog=f"example: {EXAMPLES[verb]}") for verb, words in zip(EXAMPLES, helps, strict=True)}
    create = made["create"]
    create.add_argument("--org", required=True, help="organisation that the key belongs to; made if it is new")
    create.add_argument("--tier", choices=TIERS, default="developer", help="subscription tier (developer)")
    create.add_argument("--member", default="", help="member whose key it is: it has that member's rights and its teams'")
    create.add_argument("--type", choices=TYPES, help="personal (a person's), service or runtime; what the member is decides")
    create.add_argument("--expires", default=DEFAULT_LIFE, help="life of the key: 90d, 12h, never (90d), or an end such as 2030-01-31T00:00:00Z")
    right_arguments(create)
    made["list"].add_argument("--org", default="", help="of one organisation only")
    for verb in ("revoke", "rotate"):
        made[verb].add_argument("key_id", help="public id, as key list shows it")
    made["s3"].add_argument("key_id", nargs="?", default="", help="public id (with --registry, the key that is presented)")
    rotate = made["rotate"]
    rotate.add_argument("--overlap", default="7d", help="how long the old key is accepted beside its successor (7d; 0s: not at all)")
    rotate.add_argument("--expires", help="life of the successor (it ends when the old key would have)")
    for sub in (create, rotate):
        sub.add_argument("--prefix", default="", help="what the key begins with: nvapi- or nvapi-WORD- (AIRLOCK_KEY_PREFIX)")
    for sub in made.values():
        arguments(sub)
    return parser


def main(argv: list[str]) -> int:
    """Runs one verb and returns the exit status."""
    args = _parser().parse_args(argv)
    verb = {"create": _create, "list": _list, "revoke": _revoke, "rotate": _rotate, "s3": _s3}[args.verb]
    if args.verb == "create" and not args.models and not args.member:
        raise Invalid("the key is granted nothing", expected="--models PATTERN, or --member NAME", do="--models 'acme/*'", reason="models")
    if args.verb == "create" and not args.expires[:1].isdigit():
        seconds(args.expires)
    with reached(args) as ask:
        return verb(ask, args)


def _shown(args: argparse.Namespace, found: dict[str, object], more: str = "") -> int:
    if args.json:
        print(json.dumps(found))
        return 0
    print(found["key"])
    words = f"{found['key_id']} of {found['org']}, tier {found['tier']}, expires {found['expires'] or 'never'}"
    print(f"{words}; {more}the key is not shown again", file=sys.stderr)
    return 0


def _create(ask: Ask, args: argparse.Namespace) -> int:
    body = given(args, "org", "tier", "member", "type", "expires", "prefix") | right_body(args)
    return _shown(args, ask("POST", "keys", body))


def _rotate(ask: Ask, args: argparse.Namespace) -> int:
    found = ask("POST", "keys/rotate", given(args, "key_id", "overlap", "expires", "prefix"))
    return _shown(args, found, f"{args.key_id} ends {found['old_ends']}; ")


def _list(ask: Ask, args: argparse.Namespace) -> int:
    rows = everything(ask, "keys", org=args.org)
    lines = []
    for row in rows:
        rights = f"{','.join(row['models'])} [{','.join(row['actions'])}]"
        whose = f"{row['org']}{'/' + row['member'] if row['member'] else ''}"
        line = f"{row['key_id']}  {row['state']:8} {whose}  {row['type']}  {row['tier']}  {row['expires'] or 'never'}  {rights}  {row['note']}"
        lines.append(line.rstrip())
    return tell(args, {"items": rows}, "\n".join(lines))


def _revoke(ask: Ask, args: argparse.Namespace) -> int:
    found = ask("POST", "keys/revoke", {"key_id": args.key_id})
    return tell(args, found, f"{args.key_id} {found['state']}")


def _s3(ask: Ask, args: argparse.Namespace) -> int:
    """The pair as the variables that S3 clients read, so that the answer can be a file of an environment."""
    found = ask("POST", "keys/s3", given(args, "key_id"))
    if args.json:
        print(json.dumps(found))
        return 0
    print(f"AWS_ACCESS_KEY_ID={found['key_id']}\nAWS_SECRET_ACCESS_KEY={found['secret']}")
    words = f"expires {found['expires'] or 'never'}; it reads what the key may read, while the key lives"
    print(f"{found['key_id']} of {found['org']}, {words}", file=sys.stderr)
    return 0
