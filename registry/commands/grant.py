"""`airlock grant create|list|revoke|extend`: rights of keys, members, teams and whole organisations."""

from __future__ import annotations

import argparse

from registry.commands.reach import Ask, arguments, everything, given, reached, table, tell
from registry.commands.rights import right_arguments, right_body

EXAMPLES = {
    "create": "airlock grant create --org acme --team research --models 'hf/**' --gpus 8 --expires 365d --data /srv/airlock",
    "list": "airlock grant list --org acme --data /srv/airlock --json",
    "revoke": "airlock grant revoke GRANT_ID --data /srv/airlock",
    "extend": "airlock grant extend GRANT_ID --expires 365d --grace 14d --registry https://registry.example.com",
}
HELPS = ("grant a right to a key, a member, a team or a whole organisation", "list grants", "revoke a grant at once", "give a grant another end")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="airlock grant", description="Rights of this registry.", epilog=f"example: {EXAMPLES['create']}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="|".join(EXAMPLES))
    made = {verb: verbs.add_parser(verb, help=words, epilog=f"example: {EXAMPLES[verb]}") for verb, words in zip(EXAMPLES, HELPS, strict=True)}
    create = made["create"]
    create.add_argument("--org", required=True, help="organisation that has the right, where no key, member or team is named")
    to = create.add_mutually_exclusive_group()
    to.add_argument("--key", default="", help="public id of the key that has it")
    to.add_argument("--member", default="", help="member whose keys have it")
    to.add_argument("--team", default="", help="team whose members' keys have it")
    create.add_argument("--expires", default="never", help="its end: 365d, never (never), or 2030-01-31T00:00:00Z")
    right_arguments(create)
    made["list"].add_argument("--org", default="", help="of one organisation only")
    for verb in ("revoke", "extend"):
        made[verb].add_argument("grant_id", help="public id, as grant list shows it")
    made["extend"].add_argument("--expires", required=True, help="its new end: 365d, never, or 2030-01-31T00:00:00Z")
    made["extend"].add_argument("--grace", help="how long it may still be used behind its end (as it was)")
    for sub in made.values():
        arguments(sub)
    return parser


def main(argv: list[str]) -> int:
    """Runs one verb and returns the exit status."""
    args = _parser().parse_args(argv)
    with reached(args) as ask:
        return {"create": _create, "list": _list, "revoke": _revoke, "extend": _extend}[args.verb](ask, args)


def _create(ask: Ask, args: argparse.Namespace) -> int:
    found = ask("POST", "grants", given(args, "org", "key", "member", "team", "expires") | right_body(args))
    return tell(args, found, str(found["grant_id"]))


def _list(ask: Ask, args: argparse.Namespace) -> int:
    rows = everything(ask, "grants", org=args.org)
    shown = [row | {"to": row["key"] or row["member"] or row["team"] or "everybody"} for row in rows]
    return tell(args, {"items": rows}, table(shown, "grant_id", "org", "to", "models", "actions", "gpus", "environment", "expires", "revoked"))


def _revoke(ask: Ask, args: argparse.Namespace) -> int:
    found = ask("POST", "grants/revoke", {"grant_id": args.grant_id})
    return tell(args, found, f"{args.grant_id} {found['state']}")


def _extend(ask: Ask, args: argparse.Namespace) -> int:
    found = ask("POST", "grants/extend", given(args, "grant_id", "expires", "grace"))
    return tell(args, found, f"{args.grant_id} ends {found['expires'] or 'never'}")
