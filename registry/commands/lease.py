"""`airlock lease list|revoke|return`: which runtimes hold which GPUs until when."""

from __future__ import annotations

import argparse

from registry.commands.reach import Ask, arguments, everything, reached, table, tell

EXAMPLES = {
    "list": "airlock lease list --org acme --data /srv/airlock",
    "revoke": "airlock lease revoke JTI --data /srv/airlock",
    "return": "airlock lease return JTI --registry https://registry.example.com",
}
HELPS = (
    "list the leases that stand now",
    "revoke a lease: it is not renewed, its GPUs count to its end",
    "return a lease for a runtime that is gone: its GPUs are free at once",
)


def main(argv: list[str]) -> int:
    """Runs one verb and returns the exit status."""
    parser = argparse.ArgumentParser(prog="airlock lease", description="Leases of runtimes.", epilog=f"example: {EXAMPLES['list']}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="|".join(EXAMPLES))
    made = {verb: verbs.add_parser(verb, help=words, epilog=f"example: {EXAMPLES[verb]}") for verb, words in zip(EXAMPLES, HELPS, strict=True)}
    made["list"].add_argument("--org", default="", help="of one organisation only")
    made["list"].add_argument("--all", action="store_true", help="those that are over, returned or replaced too")
    for verb in ("revoke", "return"):
        made[verb].add_argument("jti", help="the id, as lease list shows it")
    for sub in made.values():
        arguments(sub)
    args = parser.parse_args(argv)
    with reached(args) as ask:
        return _list(ask, args) if args.verb == "list" else _end(ask, args)


def _list(ask: Ask, args: argparse.Namespace) -> int:
    rows = everything(ask, "leases", org=args.org, every="1" if args.all else "")
    return tell(args, {"items": rows}, table(rows, "jti", "org", "serial", "host", "gpus", "model", "key_id", "ends", "state"))


def _end(ask: Ask, args: argparse.Namespace) -> int:
    found = ask("POST", f"leases/{args.verb}", {"jti": args.jti})
    return tell(args, found, f"{args.jti} {found['state']}")
