"""`airlock runtime download-to-cache`: the weights only, fetched and verified."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from artifact.errors import Invalid
from artifact.profile import Profile
from runtime import console, start, unsigned
from runtime.settings import Settings

TEXT = "fetch and verify the weights only"


def main(argv: list[str]) -> int:
    """Entry point; returns the documented exit status."""
    parser = console.parser("download-to-cache", TEXT)
    parser.add_argument("-p", "--profile", "--profiles", dest="profiles", nargs="+", metavar="ID_OR_DESCRIPTION")
    parser.add_argument("--all", action="store_true", help="the weights of all profiles")
    parser.add_argument("--lora", action="store_true", help="choose among the profiles that support LoRA")
    parser.add_argument("--model-uri", dest="model", metavar="URI", help="the model as ngc://… or hf://…, in the place of --model")
    parser.add_argument("-m", "--manifest-file", type=Path, metavar="FILE", help="profiles of this manifest; needs AIRLOCK_ALLOW_UNSIGNED")
    return console.run(parser, argv, download)


def download(settings: Settings, args: argparse.Namespace) -> int:
    """`download-to-cache`: the weights of the chosen, the named or all profiles; no lease, since nothing is run."""
    from runtime import profiles

    named = list(args.profiles or [])
    settings = replace(settings, lora=settings.lora or args.lora, manifest=args.manifest_file or settings.manifest, local=None)
    if unsigned.asked(settings):
        choice = unsigned.choose(replace(settings, profile="" if named or args.all else settings.profile), any_engine=True)
    else:
        choice = start.choose(settings, "" if named or args.all else settings.profile, any_engine=True)
    everything = choice.released.profiles.profiles
    if args.all:
        wanted = list(everything)
    elif named:
        wanted = [profiles.pinned(everything, pin) for pin in known(everything, named)]
    else:
        wanted = [start.announce(choice, settings.expect_profile)]
    for profile in {p.model: p for p in wanted}.values():
        made = start.workspace(choice, profile, settings)
        sys.stdout.write(f"{profile.id} {made.digest} {made.path}\n")
    return 0


def known(everything: Sequence[Profile], named: Sequence[str]) -> Sequence[str]:
    """The names as they are; raises Invalid (reason profile_unknown) with a NIM's words for those that no profile has."""
    from runtime import profiles

    unknown = [name for name in named if not any(p.id == name or p.answers_to(name) for p in everything)]
    if unknown:
        raise Invalid(
            f"Not all of the provided profiles are supported. Unknown profiles provided: {{{', '.join(repr(name[:200]) for name in unknown)}}}",
            expected=f"All valid profiles: {profiles.valid_values(everything)}",
            reason="profile_unknown",
        )
    return named
