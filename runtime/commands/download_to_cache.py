"""`airlock runtime download-to-cache`: the weights only, fetched and verified."""

from __future__ import annotations

import argparse
import sys

from runtime import console, start
from runtime.settings import Settings

TEXT = "fetch and verify the weights only"


def main(argv: list[str]) -> int:
    """Entry point; returns the documented exit status."""
    parser = console.parser("download-to-cache", TEXT)
    parser.add_argument("-p", "--profile", "--profiles", dest="profiles", nargs="+", metavar="ID_OR_DESCRIPTION")
    parser.add_argument("--all", action="store_true", help="the weights of all profiles")
    return console.run(parser, argv, download)


def download(settings: Settings, args: argparse.Namespace) -> int:
    """`download-to-cache`: the weights of the chosen, the named or all profiles; no lease, since nothing is run."""
    from runtime import profiles

    named = list(args.profiles or [])
    choice = start.choose(settings, "" if named or args.all else settings.profile, any_engine=True)
    everything = choice.released.profiles.profiles
    if args.all:
        wanted = list(everything)
    elif named:
        wanted = [profiles.pinned(everything, pin) for pin in named]
    else:
        wanted = [start.announce(choice, settings.expect_profile)]
    for profile in {p.model: p for p in wanted}.values():
        made = start.workspace(choice, profile, settings)
        sys.stdout.write(f"{profile.id} {made.digest} {made.path}\n")
    return 0
