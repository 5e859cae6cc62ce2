"""`airlock runtime serve`: check, choose, lease, weights, engine, front, until a signal ends it."""

from __future__ import annotations

import argparse
import os
import secrets
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

from runtime import console, start
from runtime.settings import Settings

TEXT = "check, choose, fetch, start the engine and serve the OpenAI API"


def main(argv: list[str]) -> int:
    """Entry point; returns the documented exit status."""
    parser = console.parser("serve", TEXT)
    parser.add_argument("--host", default="", help="address to serve (AIRLOCK_HOST, default all)")
    parser.add_argument("--port", type=int, default=0, help="port to serve (NIM_HTTP_API_PORT, default 8000)")
    return console.run(parser, argv, serve)


def serve(settings: Settings, args: argparse.Namespace) -> int:
    """`serve`: the whole story, until a signal ends it; the status is the front's."""
    from runtime import engines, entitlement, upkeep

    choice = start.choose(settings, settings.profile)
    profile = start.announce(choice, settings.expect_profile)
    engine = engines.load(profile.tags["llm_engine"])
    installation = engine.find(settings)
    start.prepare(choice, profile, settings)
    from runtime.serve import ServeSettings, run
    from runtime.watch import Voices, Watch

    claims, fresh = start.lease(choice, profile, settings)
    start.log.info("Lease %s until %s", claims.get("jti"), entitlement.until(claims))
    made = start.workspace(choice, profile, settings)
    watch = Watch(
        choice.client,
        start.lease_for(choice, profile, settings),
        lambda: entitlement.read_trust(settings),  # again at each renewal: keys are replaced while models run
        settings.cache / "leases",
        claims,
        every_s=settings.watch_s,
        fresh=fresh,
        receipt={"digest": made.digest, "bytes": made.bytes, "files": made.files},
    )
    scrub = start.scrub(choice, profile, settings, made)
    folder = Path(tempfile.mkdtemp(prefix="airlock-"))
    try:
        # What the engine compiles and remembers is kept in the cache; where that is read-only it is made again at each start.
        private = settings if os.access(settings.cache, os.W_OK) else replace(settings, cache=folder)
        (private.cache / "home").mkdir(exist_ok=True)
        chosen = choice.selection
        if chosen.length:  # what the memory holds, said in a warning; an engine refuses more than that
            private = replace(private, max_model_len=chosen.length)
        plan = engine.plan(engines.Start(profile, made.path, folder, private, installation, chosen.gpus, chosen.share, secrets.token_urlsafe(32)))
        front = ServeSettings(
            settings.host,
            settings.port,
            settings.names,
            profile.id,
            choice.released.digest,
            made.digest,
            model_ref=settings.ref,
            simulated=choice.facts.simulated,
            ready_s=settings.start_deadline_s,
        )
        watch.start()
        scrub.start()
        with upkeep.holding(made.path):
            return run(front, plan, Voices(watch, scrub))
    finally:
        scrub.stop()
        watch.stop()
        shutil.rmtree(folder, ignore_errors=True)
