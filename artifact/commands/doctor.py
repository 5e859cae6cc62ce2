"""`airlock doctor`: what of name, network, TLS, proxy, clock, key, redirect and variables is wrong from a client's place, and the fix."""

from __future__ import annotations

import argparse
import json
import os

from artifact.doctor import Case, Doctor, exit_code
from artifact.errors import Invalid
from artifact.surroundings import KEYS, Line

EXAMPLE = "AIRLOCK_KEY=nvapi-… airlock doctor --registry https://registry.site --ngc https://registry.site:8443 --ca ca.crt --model NAME:TAG"


def _seconds(given: str) -> float:
    found = float(given)
    if not 0.1 <= found <= 120:
        raise argparse.ArgumentTypeError("a number of seconds from 0.1 to 120")
    return found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="airlock doctor",
        description="Say what is wrong between this place and a registry, in the order in which a client meets it. Changes nothing.",
        epilog=f"example: {EXAMPLE}\nThe key comes from {', '.join(KEYS)}, the first that is set. Exit codes: docs/operations.md, airlock doctor.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--registry", default=os.environ.get("AIRLOCK_REGISTRY", ""), metavar="URL", help="the registry (AIRLOCK_REGISTRY)")
    parser.add_argument("--ngc", default="", metavar="URL", help="its NGC listener, to be looked at too")
    ca_file = os.environ.get("AIRLOCK_CA_FILE", "")
    parser.add_argument("--ca", default=ca_file, metavar="FILE", help="PEM of the site's authority (AIRLOCK_CA_FILE); else what the system trusts")
    parser.add_argument("--model", default="", metavar="NAME[:TAG]", help="also read a little of this model through each door")
    parser.add_argument("--timeout", type=_seconds, default=5.0, metavar="S", help="seconds for each step (5)")
    parser.add_argument("--json", action="store_true", help="machine-readable output")
    return parser


def _text(lines: list[Line]) -> str:
    width = max(len(line.check) for line in lines)
    out = []
    for line in lines:
        out.append(f"{line.state:4}  {line.check:{width}}  {line.what}")
        out += [f"      {'':{width}}  fix: {line.do}"] if line.do else []
    return "\n".join(out)


def main(argv: list[str]) -> int:
    """Prints a line for each look and returns the code of the first that failed; raises Invalid."""
    given = _parser().parse_args(argv)
    if not given.registry:
        raise Invalid("no registry is named", expected="--registry URL or AIRLOCK_REGISTRY", reason="url")
    key = next((os.environ[name] for name in KEYS if os.environ.get(name)), "").strip()
    case = Case(given.registry, given.ngc, given.ca, key, given.model, os.environ, given.timeout)
    lines = Doctor(case).examine()
    status = exit_code(lines)
    if given.json:
        shown = [{"check": n.check, "state": n.state, "what": n.what, "do": n.do, "reason": n.reason} for n in lines]
        print(json.dumps({"registry": given.registry, "exit_code": status, "lines": shown}))
    else:
        print(_text(lines))
    return status
