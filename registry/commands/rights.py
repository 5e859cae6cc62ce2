"""The options of a right, the same for `airlock key create` and `airlock grant create`."""

from __future__ import annotations

import argparse

from registry.commands.reach import commas, given

WORDS = {
    "pull": "reads",
    "create": "pushes new tags and moves none",
    "push": "pushes, moves and deletes",
    "run": "takes leases for the runtime",
    "admin": "does all of it; on ORG/** it administers the organisation, on ** the site",
    "auditor": "lists all of its organisation and its audit rows, without content",
}


def right_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    parser.add_argument("--models", action="append", metavar="PATTERN", help="names: * is one segment, a last ** any rest; repeatable")
    parser.add_argument("--actions", default="pull,run", help="comma-separated (pull,run): " + "; ".join(f"{a} {w}" for a, w in WORDS.items()))
    parser.add_argument("--environment", choices=("dev", "production"), help="what the right is for (production)")
    parser.add_argument("--gpus", type=int, help="GPUs that may run at once under it (no bound of its own)")
    parser.add_argument("--profiles", action="append", metavar="PATTERN", help="profile ids and names that may run (every one); repeatable")
    parser.add_argument("--not-before", help="when it begins: 2030-01-31T00:00:00Z, or a life from now such as 7d")
    parser.add_argument("--grace", help="how long it may still be used behind its end, with a warning: 14d")
    parser.add_argument("--note", default="", help="what it is for, for the list")


def right_body(args: argparse.Namespace) -> dict[str, object]:
    """The fields of the right, as the verbs read them."""
    body = given(args, "models", "environment", "gpus", "profiles", "not_before", "grace", "note")
    return body | ({"actions": commas(args.actions)} if args.models else {})
