"""What the commands of `airlock runtime` share: their options, logging, signals, and how an expected failure is printed and ends."""

from __future__ import annotations

import argparse
import io
import json
import logging
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from artifact.errors import AirlockError, Invalid, Unavailable
from runtime import mounts, variables
from runtime.settings import DEFAULT_CACHE, Settings, from_environment

log = logging.getLogger("airlock")
SEED_CACHE = "/opt/nim/cache"  # where published run lines mount the volume; the image's own path has a dot
Body = Callable[[Settings, argparse.Namespace], int]


def parser(word: str, text: str, example: str = "") -> argparse.ArgumentParser:
    """The parser of one command, with the options that all of them have."""
    codes = "Exit codes: docs/operations.md, section 'Exit codes of airlock runtime'."
    epilog = f"example: airlock runtime {word} {example or '--model acme/tiny:1'}\n{codes}"
    made = argparse.ArgumentParser(
        prog=f"airlock runtime {word}", description=text, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--model", default="", metavar="NAME[:VERSION]", help="default: AIRLOCK_MODEL, NIM_MODEL_NAME, NIM_MODEL_PATH")
    made.add_argument("--json", action="store_true", help="machine-readable output and errors")
    return made


def run(parser: argparse.ArgumentParser, argv: list[str], body: Body, *, named: bool = True) -> int:
    """Parses, reads the environment, and runs the command; expected failures become their lines and exit status. Not `named`: without a model too."""
    args = parser.parse_args(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a path may hold bytes that are no text
    port, settings = getattr(args, "port", 0), None
    try:
        if not 0 <= port <= 65535:
            raise Invalid(f"--port {port}", expected="a port from 1 to 65535")
        ignored = variables.judge(os.environ)
        settings = from_environment(os.environ, args.model, host=getattr(args, "host", ""), port=port, named=named)
        _logging(settings.log_level, settings.jsonl)
        for line in ignored:
            log.warning("%s", line)
        settings = cache_place(settings, mounts.here())
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


def cache_place(settings: Settings, there: tuple[mounts.Mount, ...]) -> Settings:
    """NIM_CACHE_PATH as it is; without it the volume that people mount at /opt/nim/cache, where nothing is mounted at NIM's own path."""
    points = {m.at for m in there}
    if not settings.cache_named and DEFAULT_CACHE not in points and SEED_CACHE in points:
        log.info("NIM_CACHE_PATH is not set, and a volume is mounted at %s: it is the cache", SEED_CACHE)
        return replace(settings, cache=Path(SEED_CACHE))
    return settings


class JsonLines(logging.Formatter):
    """A log line as a NIM writes it with NIM_JSONL_LOGGING: one JSON object with its seven keys."""

    def format(self, record: logging.LogRecord) -> str:
        """The line; what cannot be told in JSON is told as text."""
        told = {
            "level": record.levelname,
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S") + f".{int(record.msecs):03d}",
            "file_path": record.pathname,
            "line_number": str(record.lineno),
            "message": record.getMessage(),
            "exc_info": self.formatException(record.exc_info) if record.exc_info else "None",
            "stack_info": str(record.stack_info),
        }
        return json.dumps(told, default=str)


def _logging(level: str, jsonl: bool) -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines() if jsonl else logging.Formatter("%(levelname)s %(asctime)s %(filename)s:%(lineno)d] %(message)s"))
    logging.basicConfig(level="DEBUG" if level == "TRACE" else level, handlers=[handler])
    # The HTTP client logs URLs and retries of its own at this level; ours say it once and with the cause.
    logging.getLogger("urllib3").setLevel(logging.ERROR)
