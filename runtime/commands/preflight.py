"""`airlock runtime preflight`: key, lease, registry, cache, speed, memory, GPUs, driver and port looked at; nothing is fetched or started."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from artifact.errors import AirlockError, Invalid, Unavailable
from artifact.profile import Profile
from runtime import console, start
from runtime.preflight import Line, node_lines, of_error
from runtime.settings import EXIT_CODES, Settings

if TYPE_CHECKING:
    from artifact.remote import RemoteRegistry
    from runtime.node import Facts, Gpu

TEXT = "look at everything that a start needs; exit 0 where nothing fails, else the code of the first failure"
EXAMPLE = "--model acme/tiny:1 --as 1000:1000 --json"

MAX_GB = 1_000_000


def main(argv: list[str]) -> int:
    """Entry point; returns 0, or the documented exit status of the first failure."""
    parser = console.parser("preflight", TEXT, EXAMPLE)
    parser.add_argument("--as", dest="who", metavar="UID[:GID]", help="who will serve, where that is not the user of this command (default: it is)")
    parser.add_argument("--no-registry", action="store_true", help="leave key, lease and registry out: the node alone")
    parser.add_argument(
        "--weights-gb", type=float, default=0.0, metavar="GB", help="size of weights that this registry does not know (an unmodified NIM)"
    )
    parser.add_argument("--port", type=int, default=0, help="port to serve (NIM_HTTP_API_PORT, default 8000)")
    return console.run(parser, argv, look, named=False)


def look(settings: Settings, args: argparse.Namespace) -> int:
    """Prints a line for each look, `ok`, `warn` or `fail` with its fix; the status is the first failure's."""
    from runtime import cache

    who = _who(args.who)
    if not 0 <= args.weights_gb <= MAX_GB:  # nor is it no number
        raise Invalid(f"--weights-gb {args.weights_gb}", expected=f"gigabytes from 0 to {MAX_GB}")
    cache.answers(settings.cache)
    lines: list[Line] = []
    facts, profile, gpus, total, missing, files = _registry(settings, lines) if not args.no_registry else (*_node(settings, lines), -1, [])
    if not total and args.weights_gb > 0:
        total = int(args.weights_gb * 1e9)
    lines += node_lines(settings, facts, gpus, profile.tags if profile else {}, total, missing, files, who)
    failed = next((line for line in lines if line.state == "fail"), None)
    status = EXIT_CODES.get(failed.reason, failed.exit_code or Unavailable.exit_code) if failed else 0
    if args.json:
        doc: dict[str, object] = {"ok": failed is None, "exit_code": status, "reason": failed.reason if failed else "ok"}
        doc |= {"simulated": bool(facts and facts.simulated), "lines": [vars(line) for line in lines]}
        sys.stdout.write(json.dumps(doc, indent=2) + "\n")
    else:
        sys.stdout.write("".join(line.words() + "\n" for line in lines))
    return status


def _who(text: str | None) -> tuple[int, int]:
    if not text:
        return os.geteuid(), os.getegid()
    uid, _, gid = text.partition(":")
    if not all(part.isascii() and part.isdigit() and len(part) < 10 for part in (uid, gid or uid)):
        raise Invalid(f"--as {text[:40]!r}", expected="UID or UID:GID, such as 1000:1000")
    if os.geteuid() != 0 and int(uid) != os.geteuid():
        raise Invalid(f"--as {text[:40]!r} needs root", expected="root, or our own user", do="run it as the user that will serve")
    return int(uid), int(gid or uid)


def _node(settings: Settings, lines: list[Line]) -> tuple[Facts | None, None, tuple[Gpu, ...], int]:
    try:
        return start.detect(settings), None, (), 0
    except AirlockError as error:
        lines.append(of_error("GPUs", error))
        return None, None, (), 0


def _registry(settings: Settings, lines: list[Line]) -> tuple[Facts | None, Profile | None, tuple[Gpu, ...], int, int, list[Path]]:
    """Key, registry, ends, release and choice; what was found of GPUs, profile, bytes of weights (all, missing; -1: not known) and their files."""
    from runtime import unsigned

    check = "model"
    try:
        own = unsigned.asked(settings)
        check = "key"
        trouble = None if own and not settings.registry else _key(settings, lines)
        if not settings.model:
            return (*_node(settings, lines), -1, [])
        check = "model"
        if not own:
            lines.append(_lease(settings, trouble))
        choice, profile = _choose(settings, own)
        check = "weights"
        weighed = start.weighed(choice, profile, settings)
    except AirlockError as error:
        lines.append(of_error(check, error))
        return (*_node(settings, lines), -1, [])
    words = f"{settings.name_ref} runs with profile {profile.description} ({profile.id[:12]}): {choice.selection.why}"
    lines.append(Line("model", "warn" if own else "ok", f"UNSIGNED, {settings.unsigned}: {words}" if own else words))
    return choice.facts, profile, choice.selection.gpus, *weighed


def _choose(settings: Settings, own: bool) -> tuple[start.Choice, Profile]:
    """What a start chooses, after all for which it refuses the choice."""
    from runtime import engines, profiles, tuning, unsigned

    choice = unsigned.choose(settings) if own else start.choose(settings, settings.profile)
    profile = profiles.require(choice.selection)
    profiles.check_expected(choice.selection, settings.expect_profile)
    name = profile.tags["llm_engine"]
    tuning.allowed(settings.tuning.passthrough, engines.load(name).PASSTHROUGH, name)
    return choice, profile


def _key(settings: Settings, lines: list[Line]) -> Unavailable | None:
    """Key, registry and ends as lines; returns what keeps the registry from answering, raises what refuses the key."""
    from runtime import entitlement

    if settings.key or not settings.offline:
        entitlement.require_key(settings)
    client = start.remote(settings)
    trouble = entitlement.check_key(client)
    if trouble:
        lines.append(Line("registry", "ok" if trouble.reason == "offline" else "warn", f"{trouble.what}; only the cache counts", trouble.do))
    else:
        lines += [Line("key", "ok", "the registry knows it"), Line("registry", "ok", f"{client.base_url} answers"), *_ends(client, settings)]
    return trouble


def _ends(client: RemoteRegistry, settings: Settings) -> list[Line]:
    """What of the key's rights ends when; a registry that does not tell is no failure."""
    from artifact.grant import SOON_S
    from runtime import standing

    try:
        found = standing.parse(client.api("GET", "/airlock/v1/standing"))
    except AirlockError:
        return []
    now = max(time.time(), found.now)
    lines = []
    for end in found.running(settings.model) if settings.model else found.counting():
        if end.over(now):
            lines.append(Line("days left", "fail", end.words(now), "renew it", f"{end.kind}_{'revoked' if end.revoked_at else 'expired'}"))
        elif end.ends or end.revoked_at:
            lines.append(Line("days left", "warn" if end.days(now) * standing.DAY <= SOON_S else "ok", end.words(now), f"it stops {end.stops}"))
    return lines


def _lease(settings: Settings, trouble: Unavailable | None) -> Line:
    """The lease in the cache that ends last."""
    from artifact.grant import decide_lease
    from runtime import leases

    kept = leases.kept(settings.cache / "leases", settings.model, settings.ref, settings.instance)
    newest = max(kept, key=lambda k: k.lease.expires, default=None)
    if newest is None:
        if trouble is None:
            return Line("lease", "ok", "none in the cache; the registry gives one at the start")
        return Line("lease", "fail", "none in the cache, and the registry is not asked or away", "start once while it answers", "lease_absent")
    decision = decide_lease(newest.lease, time.time())
    days = (newest.lease.expires - time.time()) / 86400
    words = f"{newest.jti} until {leases.until(newest)} ({days:.1f} days)"
    if decision.allow:
        return Line("lease", "ok" if decision.reason != "grace" else "warn", words, "" if decision.reason != "grace" else decision.remedy)
    return Line("lease", "warn" if trouble is None else "fail", f"{words}: {decision.words}", decision.remedy, decision.reason)
