"""`airlock runtime serve`: check, choose, lease, weights, engine, front, until a signal ends it."""

from __future__ import annotations

import argparse
import ctypes
import os
import secrets
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

from runtime import console, start, tuning
from runtime.settings import Settings

PR_SET_DUMPABLE = 4
TEXT = "check, choose, fetch, start the engine and serve the OpenAI API"


def main(argv: list[str]) -> int:
    """Entry point; returns the documented exit status."""
    parser = console.parser("serve", TEXT)
    parser.add_argument("--host", default="", help="address to serve (AIRLOCK_HOST, default all)")
    parser.add_argument("--port", type=int, default=0, help="port to serve (NIM_HTTP_API_PORT, default 8000)")
    return console.run(parser, argv, serve)


def serve(settings: Settings, args: argparse.Namespace) -> int:
    """`serve`: the whole story, until a signal ends it; the status is the front's."""
    from runtime import engines, unsigned, upkeep

    own = unsigned.asked(settings)
    choice = unsigned.choose(settings) if own else start.choose(settings, settings.profile)
    profile = start.announce(choice, settings.expect_profile)
    engine = engines.load(profile.tags["llm_engine"])
    installation = engine.find(settings)
    tuning.allowed(settings.tuning.passthrough, engine.PASSTHROUGH, profile.tags["llm_engine"])  # told before anything is fetched
    start.prepare(choice, profile, settings)
    from runtime import facing, leases
    from runtime.serve import run
    from runtime.watch import Voices, Watch

    folder = Path(tempfile.mkdtemp(prefix="airlock-"))
    beside: list[Watch | upkeep.Scrub] = []
    try:
        claims, fresh = ({}, False) if own else start.lease(choice, profile, settings)
        made = unsigned.workspace(settings, profile, folder / "model") if settings.local else start.workspace(choice, profile, settings)
        if not own:
            beside.append(start.watch(choice, profile, settings, made, claims, fresh))
        if not settings.local:
            beside.append(start.scrub(choice, profile, settings, made))
        # What the engine compiles and remembers is kept in the cache; where that is read-only it is made again at each start.
        private = settings if os.access(settings.cache, os.W_OK) else replace(settings, cache=folder)
        (private.cache / "home").mkdir(exist_ok=True)
        chosen = choice.selection
        if chosen.length:  # what the memory holds, said in a warning; an engine refuses more than that
            private = replace(private, max_model_len=chosen.length)
        plan = engine.plan(engines.Start(profile, made.path, folder, private, installation, chosen.gpus, chosen.share, secrets.token_urlsafe(32)))
        outside = unsigned.added(settings, made.path)  # the plan has seen that a reason was given for it
        if own or outside:
            unsigned.record(choice, profile, made.digest, settings, outside)
        front = facing.front(settings, choice, profile, made)
        asked = facing.callers(settings, own=leases.own(claims))
        for thread in beside:
            thread.start()
        _conceal()
        with upkeep.holding(made.path):
            return run(
                front, plan, Voices(*beside, *([unsigned.Mark()] if own or outside else [])), asked, facing.memory(settings, choice), chosen.gpus
            )
    finally:
        for thread in beside:
            thread.stop()
        shutil.rmtree(folder, ignore_errors=True)


def _conceal() -> None:
    """Makes /proc/PID/environ, with the key in it, and our memory unreadable for the engine, a process of the same user; prctl(2). Root reads all."""
    ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)
