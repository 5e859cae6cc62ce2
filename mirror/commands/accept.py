"""`airlock mirror accept SOURCE --by WHO`: records that somebody accepted the licence or the terms of a source, when, and by what that is shown."""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict

from artifact.errors import Invalid
from artifact.grant import date
from artifact.upstream import TEXTS
from mirror.commands.key import home_argument
from mirror.home import MirrorHome
from mirror.records import Acceptance, Records, source_of, words

EXAMPLE = 'example: airlock mirror accept hf://acme/tiny --by "Ada Lovelace <ada@example.org>" --license apache-2.0 --evidence terms.pdf'


def main(argv: list[str]) -> int:
    """Records and prints it; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="airlock mirror accept", description="Record who accepted the licence of a source; no record is ever removed.", epilog=EXAMPLE
    )
    parser.add_argument("source", help="hf://namespace/name, oci://host/name, ngc://org[/team]/model or nim://host/name, whatever its revision")
    parser.add_argument("--by", required=True, metavar='"Name <mail>"', help="who accepted it")
    parser.add_argument("--license", default="", help="the licence, as the plan's requires names it; without it the terms of the source")
    parser.add_argument("--evidence", default="", metavar="FILE|TEXT", help="a file, kept in the home and named by its digest, or words")
    home_argument(parser)
    given = parser.parse_args(argv)
    records = Records(MirrorHome.open(given.home))
    source, by = source_of(given.source), words(given.by.strip(), "--by", TEXTS["accepted_by"])
    if not by:
        raise Invalid("nobody is named", expected='--by "Name <mail>"', reason="records")
    license_ = words(given.license, "--license", TEXTS["license"])
    acceptance = Acceptance(source, license_, by, int(time.time()), records.keep(given.evidence))
    records.accept(acceptance)
    if given.json:
        print(json.dumps(asdict(acceptance) | {"at": date(acceptance.at)}))
        return 0
    print(
        f"{by} accepted {license_ or 'the terms'} of {source} at {date(acceptance.at)}" + (f": {acceptance.evidence}" if acceptance.evidence else "")
    )
    return 0
