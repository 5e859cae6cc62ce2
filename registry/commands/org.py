"""`airlock org …`: organisations of a site, their teams and their members; nothing is deleted, only closed or disabled."""

from __future__ import annotations

import argparse

from registry.commands.reach import Ask, arguments, everything, given, reached, table, tell
from registry.roster import KINDS, ROLES

# Word of a group: what it does, and an example.
_VERBS: dict[str, tuple[str, str]] = {
    "create": ("make an organisation", "airlock org create acme --display 'Acme Inc.' --data /srv/airlock"),
    "list": ("list organisations", "airlock org list --data /srv/airlock --json"),
    "show": ("show one organisation", "airlock org show acme --registry https://registry.example.com"),
    "close": ("close an organisation: no key of it is accepted any more", "airlock org close acme --data /srv/airlock"),
    "open": ("open a closed organisation again", "airlock org open acme --data /srv/airlock"),
}
_TEAM: dict[str, tuple[str, str]] = {
    "create": ("make a team", "airlock org team create research --org acme"),
    "list": ("list teams with their members", "airlock org team list --org acme"),
    "close": ("close a team: its grants give nothing any more", "airlock org team close research --org acme"),
    "add": ("take a member into a team", "airlock org team add research ann --org acme"),
    "remove": ("take a member out of a team", "airlock org team remove research ann --org acme"),
}
_MEMBER: dict[str, tuple[str, str]] = {
    "create": ("make a member, a person or a robot", "airlock org member create ann@acme.example --org acme --role admin"),
    "list": ("list members", "airlock org member list --org acme"),
    "role": ("give a member another role", "airlock org member role ann@acme.example auditor --org acme"),
    "disable": ("disable a member: no key of it is accepted any more", "airlock org member disable ann@acme.example --org acme"),
    "enable": ("enable a disabled member again", "airlock org member enable ann@acme.example --org acme"),
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="airlock org", description="Organisations, teams and members.", epilog=f"example: {_VERBS['create'][1]}")
    words = parser.add_subparsers(dest="verb", required=True, metavar="|".join((*_VERBS, "team", "member")))
    for verb, (text, example) in _VERBS.items():
        sub = words.add_parser(verb, help=text, epilog=f"example: {example}")
        if verb != "list":
            sub.add_argument("name", help="the organisation: one lower-case segment")
        if verb == "create":
            sub.add_argument("--display", default="", help="how it is shown")
        arguments(sub)
    for group, table_ in (("team", _TEAM), ("member", _MEMBER)):
        inner = words.add_parser(group, help=f"{group}s of an organisation", epilog=f"example: {table_['create'][1]}")
        verbs = inner.add_subparsers(dest="word", required=True, metavar="|".join(table_))
        for verb, (text, example) in table_.items():
            sub = verbs.add_parser(verb, help=text, epilog=f"example: {example} --data /srv/airlock")
            sub.add_argument("--org", required=True, help="the organisation")
            if verb != "list":
                sub.add_argument("name", help=f"the {group}")
            _more(group, verb, sub)
            arguments(sub)
    return parser


def _more(group: str, verb: str, sub: argparse.ArgumentParser) -> None:
    if verb in ("add", "remove"):
        sub.add_argument("member", help="the member")
    if group == "member" and verb == "create":
        sub.add_argument("--kind", choices=KINDS, default=KINDS[0], help="a person or a robot (person)")
        sub.add_argument("--role", choices=ROLES, default=ROLES[0], help="what it may about the organisation (member: nothing)")
        sub.add_argument("--note", default="", help="who it is, for the list")
    if group == "member" and verb == "role":
        sub.add_argument("role", choices=ROLES, help="admin: everything on ORG/** and its people; auditor: looks, without content; member: neither")


def main(argv: list[str]) -> int:
    """Runs one verb and returns the exit status."""
    args = _parser().parse_args(argv)
    with reached(args) as ask:
        return _group(ask, args) if args.verb in ("team", "member") else _org(ask, args)


def _org(ask: Ask, args: argparse.Namespace) -> int:
    columns = ("name", "display", "keys", "members", "entitlement", "closed")
    if args.verb == "list":
        rows = everything(ask, "orgs")
        return tell(args, {"items": rows}, table(rows, *columns))
    if args.verb == "show":
        found = ask("GET", f"orgs/{args.name}")
    else:
        found = ask(
            "POST", "orgs" if args.verb == "create" else f"orgs/{args.verb}", given(args, "name", *(["display"] if args.verb == "create" else []))
        )
    return tell(args, found, table([found], *columns))


def _group(ask: Ask, args: argparse.Namespace) -> int:
    path = f"{args.verb}s"
    if args.word == "list":
        rows = everything(ask, path, org=args.org)
        return tell(
            args, {"items": rows}, table(rows, *(("name", "members", "closed") if args.verb == "team" else ("name", "kind", "role", "disabled")))
        )
    fields = [name for name in ("org", "name", "member", "kind", "role", "note") if hasattr(args, name)]
    found = ask("POST", path if args.word == "create" else f"{path}/{args.word}", given(args, *fields))
    return tell(args, found, "  ".join(f"{name} {value}" for name, value in found.items() if value))
