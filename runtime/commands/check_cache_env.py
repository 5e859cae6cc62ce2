"""`airlock runtime check-cache-env`: can NIM_CACHE_PATH be used by us, as nim-llm-check-cache-env asks at the start of an image."""

from __future__ import annotations

import argparse
import os
import sys

from artifact.errors import Unavailable
from runtime import cache, console, mounts, preflight
from runtime.settings import Settings

TEXT = "say whether NIM_CACHE_PATH can be written, and what to do where it cannot"


def main(argv: list[str]) -> int:
    """Entry point; returns the documented exit status."""
    return console.run(console.parser("check-cache-env", TEXT, ""), argv, check, named=False)


def check(settings: Settings, args: argparse.Namespace) -> int:
    """Prints what a NIM prints: nothing of note, the warning of a read-only cache, or the error; raises Unavailable (reason cache)."""
    cache.answers(settings.cache)
    line = preflight.cache_lines(settings, mounts.here(), (os.geteuid(), os.getegid()), 0, -1)[0]
    if line.state == "ok":
        sys.stdout.write(f"{line.text}\n")
    elif "mounted read-only" in line.text:
        sys.stderr.write(f"WARNING {settings.cache} is read-only, application may fail if model is not already present in cache\n")
    else:
        raise Unavailable(f"Unable to write to NIM_CACHE_PATH ({settings.cache}): {line.text}", do=line.fix, reason=line.reason)
    return 0
