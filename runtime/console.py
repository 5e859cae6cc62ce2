"""What the commands of `airlock runtime` share: their options, logging, signals, and how an expected failure is printed and ends."""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import sys
from collections.abc import Callable

from artifact.errors import AirlockError, Invalid, Unavailable
from runtime.settings import Settings, from_environment

Body = Callable[[Settings, argparse.Namespace], int]


def parser(word: str, text: str, example: str = "") -> argparse.ArgumentParser:
    """The parser of one command, with the options that all of them have."""
    codes = "Exit codes: docs/operations.md, section 'Exit codes of airlock runtime'."
    epilog = f"example: airlock runtime {word} {example or '--model acme/tiny:1'}\n{codes}"
    made = argparse.ArgumentParser(
        prog=f"airlock runtime {word}", description=text, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--model", required=True, metavar="NAME[:VERSION]")
    made.add_argument("--json", action="store_true", help="machine-readable output and errors")
    return made


def run(parser: argparse.ArgumentParser, argv: list[str], body: Body) -> int:
    """Parses, reads the environment, and runs the command; expected failures become their lines and exit status."""
    args = parser.parse_args(argv)
    port, settings = getattr(args, "port", 0), None
    try:
        if not 0 <= port <= 65535:
            raise Invalid(f"--port {port}", expected="a port from 1 to 65535")
        settings = from_environment(os.environ, args.model, host=getattr(args, "host", ""), port=port)
        _logging(settings.log_level)
        # As process 1 of a container nothing ends us by default; the front sets its own handlers later.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        return body(settings, args)
    except AirlockError as error:
        if settings is not None and parser.prog.endswith(" serve"):
            from runtime import entitlement

            entitlement.refuse_kept(settings.cache / "leases", settings.model, settings.ref, settings.instance, error.reason)
        return failed(error, args.json)
    except OSError as error:
        what = f"{error.strerror or error}: {error.filename or 'a file of the cache'}"
        return failed(Unavailable(what, expected="a cache and a temporary directory that we may use", reason="cache"), args.json)


def failed(error: AirlockError, as_json: bool) -> int:
    """Prints an expected failure as a NIM does, or as JSON; returns its exit status."""
    from runtime import entitlement

    lines, status = entitlement.report(error)
    text = json.dumps(error.as_dict() | {"lines": lines, "exit_code": status}) if as_json else "\n".join(lines)
    sys.stderr.write(text + "\n")
    return status


def _logging(level: str) -> None:
    logging.basicConfig(
        level="DEBUG" if level == "TRACE" else level, stream=sys.stderr, format="%(levelname)s %(asctime)s %(filename)s:%(lineno)d] %(message)s"
    )
    # The HTTP client logs URLs and retries of its own at this level; ours say it once and with the cause.
    logging.getLogger("urllib3").setLevel(logging.ERROR)
