"""`airlock runtime`: key check, GPUs, profile choice, lease, weights, engine, front, in a straight line; none of these parts calls the next.

Loads what a command needs when it needs it: `--help` must answer at once, and a refusal must come before anything heavy is imported or fetched.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from artifact.errors import AirlockError, Conflict, Invalid, NotFound, Unavailable
from artifact.grant import date
from artifact.profile import Profile
from runtime.settings import Facts, Settings, from_environment

if TYPE_CHECKING:
    from artifact.remote import RemoteRegistry
    from artifact.trust import SiteTrust
    from runtime import entitlement
    from runtime.profiles import Selection
    from runtime.weights import ModelDir, Released

log = logging.getLogger("airlock")
EXAMPLE = "example: NGC_API_KEY=nvapi-… AIRLOCK_REGISTRY=http://registry:5000 AIRLOCK_TRUST=site-trust.json airlock runtime serve --model acme/tiny:1"


@dataclass(frozen=True)
class Choice:
    """What the first half of a start found out: where from, what keeps the registry from answering, under which keys, which profile and why."""

    client: RemoteRegistry
    trouble: Unavailable | None
    trust: SiteTrust
    facts: Facts
    released: Released
    selection: Selection

    @property
    def remote(self) -> RemoteRegistry | None:
        """The registry where it answers."""
        return None if self.trouble else self.client


def choose(settings: Settings, pin: str) -> Choice:
    """Key check, GPUs, released profiles, choice; raises what each of them raises, in this order."""
    from runtime import entitlement, gpus, profiles, weights

    entitlement.require_key(settings)
    remote = _remote(settings)
    trouble = entitlement.check_key(remote)
    trust = entitlement.read_trust(settings)
    if trouble:
        entitlement.tell(trouble)
    weights.check_cache(settings.cache)
    released = _released(remote, trouble, settings, trust)
    facts = gpus.detect(settings.gpu_deadline_s, settings.visible_cuda, settings.visible_nvidia)
    for line in _system(facts):
        log.info(line)
    log.info("Running NIM %s LoRA.", "with" if settings.lora else "without")
    wanted = profiles.Wanted(pin, settings.lora, settings.relax_memory, frozenset({"vllm"}))
    return Choice(remote, trouble, trust, facts, released, profiles.select(released.profiles.profiles, facts, wanted))


def _remote(settings: Settings) -> RemoteRegistry:
    from artifact.remote import RemoteRegistry

    if not settings.registry:
        raise Invalid(
            "AIRLOCK_REGISTRY is not set", expected="the URL of this site's registry, such as http://registry:5000", do="set AIRLOCK_REGISTRY"
        )
    ca_file = str(settings.ca_file) if settings.ca_file else None
    return RemoteRegistry(settings.registry, settings.key, ca_file=ca_file, timeout_s=settings.timeout_s)


def _released(source: RemoteRegistry, trouble: Unavailable | None, settings: Settings, trust: SiteTrust) -> Released:
    from runtime import entitlement, weights

    try:
        return weights.released(None if trouble else source, settings.cache, settings.model, settings.ref, trust.release_keys)
    except Unavailable as error:
        if trouble and error.reason == "unavailable":  # nothing is cached: what keeps the registry from answering is the cause
            raise entitlement.also(trouble, error) from error
        raise
    except NotFound as error:
        if trouble:
            raise
        try:
            source.read_manifest(settings.model, settings.ref)
        except NotFound as missing:
            if missing.reason == "manifest":  # the registry says this only of a name that the key sees
                raise _no_version(source, settings) from error
            raise entitlement.invisible(settings.name_ref) from error
        raise NotFound(
            f"{settings.name_ref} has no profile manifest, so nothing says how to run it",
            expected=f"{settings.model}/profiles:{settings.ref}",
            do="push it with `airlock model push … --profiles FILE`, then promote it",
            reason="no_profiles",
        ) from error


def _no_version(source: RemoteRegistry, settings: Settings) -> NotFound:
    from artifact.remote import NOBODY_CALL

    page = source.refs(NOBODY_CALL, settings.model, limit=20)
    there = ", ".join(map(str, page.items)) + (", …" if page.after else "")
    return NotFound(
        f"{settings.model} has no version {settings.ref}",
        expected=f"one of: {there or 'none yet'}",
        do=f"say --model {settings.model}:VERSION; without one, latest is meant",
        reason="version",
    )


def _announce(choice: Choice) -> Profile:
    """Logs the choice and a reason for each other profile; raises NotFound when none fits."""
    from runtime import profiles

    selection = choice.selection
    log.info("Detected %d compatible profile(s).", len(selection.order))
    for profile, reason in selection.rejected:
        log.info("Rejected profile: %s (%s): %s", profile.id, profile.description, reason)
    profile = profiles.require(selection)
    log.info("%s: %s", selection.line, selection.why)
    for key, value in sorted(profile.tags.items()):
        log.info("Profile metadata: %s: %s", key, value)
    return profile


def _workspace(choice: Choice, profile: Profile, settings: Settings) -> ModelDir:
    from runtime import weights

    log.info("Preparing model workspace. This step might download additional files to run the model.")
    began = time.monotonic()
    made = weights.materialise(choice.remote, settings.cache, profile.model, log.info, workers=settings.workers)
    log.info(
        "Model workspace is now ready. It took %.3f seconds (%d bytes fetched, %d hashed again, %d known by stamp)",
        time.monotonic() - began,
        made.fetched,
        made.hashed,
        made.stamped,
    )
    return made


def serve(settings: Settings, args: argparse.Namespace) -> int:
    """`serve`: the whole story, until a signal ends it; the status is the front's."""
    from runtime import entitlement
    from runtime.engines import vllm

    choice = choose(settings, settings.profile)
    check_port(settings.host, settings.port)
    profile = _announce(choice)
    installation = vllm.find(settings)
    from runtime.serve import ServeSettings, run
    from runtime.watch import Watch

    claims, fresh = _lease(choice, profile, settings)
    log.info("Lease %s until %s", claims.get("jti"), entitlement.until(claims))
    made = _workspace(choice, profile, settings)
    watch = Watch(
        choice.client,
        _wanted(choice, profile, settings),
        lambda: entitlement.read_trust(settings),  # again at each renewal: keys are replaced while models run
        settings.cache / "leases",
        claims,
        every_s=settings.watch_s,
        fresh=fresh,
        receipt={"digest": made.digest, "bytes": made.bytes, "files": made.files},
    )
    folder = Path(tempfile.mkdtemp(prefix="airlock-"))
    try:
        # What the engine compiles and remembers is kept in the cache; where that is read-only it is made again at each start.
        private = settings if os.access(settings.cache, os.W_OK) else replace(settings, cache=folder)
        (private.cache / "home").mkdir(exist_ok=True)
        plan = vllm.launch(
            profile,
            made.path,
            folder / "engine.sock",
            private,
            installation=installation,
            gpus=choice.selection.gpus,
            share=choice.selection.share,
        )
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
        return run(front, plan, watch)
    finally:
        watch.stop()
        shutil.rmtree(folder, ignore_errors=True)


def _wanted(choice: Choice, profile: Profile, settings: Settings) -> entitlement.Choice:
    from runtime import entitlement

    uuids = tuple(g.uuid for g in choice.selection.gpus)
    return entitlement.Choice(settings.model, settings.ref, choice.released.digest, profile.id, uuids, settings.instance, profile.model.digest)


def _lease(choice: Choice, profile: Profile, settings: Settings) -> tuple[dict[str, object], bool]:
    """A lease and whether the registry gave it just now; one from the cache where the registry does not answer, at the start or at this step."""
    from runtime import entitlement

    wanted, folder, trouble = _wanted(choice, profile, settings), settings.cache / "leases", choice.trouble
    if trouble is None:
        try:
            return entitlement.obtain_lease(choice.client, wanted, choice.trust, folder), True
        except Unavailable as error:
            entitlement.tell(error)
            trouble = error
    return entitlement.fall_back(trouble, wanted, choice.trust, folder), False


def return_lease(settings: Settings, args: argparse.Namespace) -> int:
    """`return-lease`: the registry counts its GPUs as free, and no start here uses it again; with the registry away the latter alone."""
    from runtime import entitlement, leases

    entitlement.require_key(settings)
    folder = settings.cache / "leases"
    found = [k for k in leases.kept(folder, settings.model, settings.ref, settings.instance) if not k.told]
    if not found:
        raise NotFound(
            f"{folder} holds no lease of {settings.name_ref} on {settings.instance} that is not returned",
            expected="a lease that a start on this node got",
            do="check --model with its version, NIM_CACHE_PATH and AIRLOCK_INSTANCE",
            reason="lease_absent",
        )
    remote, trouble = _remote(settings), None
    for kept in found:
        at = kept.returned_at or time.time()
        if not leases.mark(kept, returned_at=at, revoked_at=kept.revoked_at):
            what = f"{kept.path} cannot be marked as returned: a later start would use it"
            raise Unavailable(what, expected="a cache that we may write", do=f"remove the file, or make {folder} writable", reason="cache")
        told = "the registry counts its GPUs as free"
        try:
            remote.api("POST", "/airlock/v1/leases/return", {"jti": kept.jti})
        except NotFound:
            told = "the registry does not know it"
        except AirlockError as error:
            trouble, told = error, f"the registry counts its GPUs until {leases.until(kept)}"
        if trouble is None:
            leases.mark(kept, returned_at=at, revoked_at=kept.revoked_at, told=True)
        item = {"jti": kept.jti, "model": kept.name_ref, "returned_at": date(at), "registry": told}
        sys.stdout.write(json.dumps(item) + "\n" if args.json else f"lease {kept.jti} of {kept.name_ref} is returned here; {told}\n")
        if trouble is not None:
            trouble.do = f"{trouble.do}; then say this again, so that the registry knows too"
            raise trouble
    return 0


def check_port(host: str, port: int) -> None:
    """The port can be bound now; raises Conflict (reason port_taken). Before weights and engine: a start of minutes must not end with this."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise Conflict(
                f"port {port} of {host} is not free: {error.strerror}",
                expected="a free port for the API",
                do=f"stop what listens there, or set NIM_HTTP_API_PORT (with Docker: map another one, -p {port + 1}:{port})",
                reason="port_taken",
            ) from error


def download(settings: Settings, args: argparse.Namespace) -> int:
    """`download-to-cache`: the weights of the chosen, the named or all profiles; no lease, since nothing is run."""
    from runtime import profiles

    named = list(args.profiles or [])
    choice = choose(settings, "" if named or args.all else settings.profile)
    everything = choice.released.profiles.profiles
    if args.all:
        wanted = list(everything)
    elif named:
        wanted = [profiles.pinned(everything, pin) for pin in named]
    else:
        wanted = [_announce(choice)]
    for profile in {p.model: p for p in wanted}.values():
        made = _workspace(choice, profile, settings)
        sys.stdout.write(f"{profile.id} {made.digest} {made.path}\n")
    return 0


def list_profiles(settings: Settings, args: argparse.Namespace) -> int:
    """`list-model-profiles`: what fits, what does not and why, as NIM prints it or as JSON."""
    choice = choose(settings, settings.profile)
    sys.stdout.write(_as_json(choice, settings) if args.json else _as_text(choice))
    return 0


def _system(facts: Facts) -> list[str]:
    if facts.cpu:
        return ["SYSTEM INFO", "- No NVIDIA library on this node: CPU profiles only"]
    mark = " SIMULATED" if facts.simulated else ""
    lines = ["SYSTEM INFO", f"- Driver {facts.driver}, CUDA {facts.cuda}{mark}", "- GPUs:" if facts.gpus else "- GPUs: <None>"]
    for gpu in facts.gpus:
        used = 100 * (gpu.total - gpu.free) // gpu.total if gpu.total else 0
        lines.append(f"  -  [{gpu.device}] ({gpu.index}) {gpu.name} {gpu.uuid} [current utilization: {used}%]")
    return lines + ([f"- {facts.hidden}"] if facts.hidden else [])


def _as_text(choice: Choice) -> str:
    selection = choice.selection
    lines = [*_system(choice.facts), "MODEL PROFILES", "- Compatible with system and runnable:" + ("" if selection.order else " <None>")]
    lines += [f"  - {p.id} ({p.description})" + ("   <- selected" if p is selection.selected else "") for p in selection.order]
    refused = [(p, r) for p, r in selection.rejected if p not in selection.order]
    lines.append("- Incompatible with system:" + ("" if refused else " <None>"))
    lines += [f"  - {p.id} ({p.description}): {reason}" for p, reason in refused]
    return "\n".join(lines) + "\n"


def _as_json(choice: Choice, settings: Settings) -> str:
    selection, facts = choice.selection, choice.facts
    reasons = {p.id: reason for p, reason in selection.rejected}

    def shown(profile: Profile) -> dict[str, object]:
        out: dict[str, object] = {
            "profile_id": profile.id,
            "description": profile.description,
            "tags": profile.tags,
            "model_digest": profile.model.digest,
        }
        return out | ({"reason": reasons[profile.id]} if profile.id in reasons else {})

    doc = {
        "model": settings.name_ref,
        "profile_manifest": choice.released.digest,
        "selected": selection.selected.id if selection.selected else None,
        "why": selection.why,
        "compatible": [shown(p) for p in selection.order],
        "incompatible": [shown(p) for p, _ in selection.rejected if p not in selection.order],
        "system": {"cpu": facts.cpu, "simulated": facts.simulated, "driver": facts.driver, "gpus": [vars(g) for g in facts.gpus]},
    }
    return json.dumps(doc, indent=2) + "\n"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="airlock runtime",
        description="Runs a released model on this node: checks key and lease, chooses a profile, verifies the weights, starts the engine.",
        epilog=f"{EXAMPLE}\nExit codes: docs/operations.md, section 'Exit codes of airlock runtime'.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    words = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text in (
        ("serve", "check, choose, fetch, start the engine and serve the OpenAI API"),
        ("download-to-cache", "fetch and verify the weights only"),
        ("list-model-profiles", "show which profiles fit this node, and why others do not"),
        ("return-lease", "give back the lease of a model that no longer runs here"),
    ):
        sub = words.add_parser(name, help=text, description=text, epilog=f"example: airlock runtime {name} --model acme/tiny:1")
        sub.add_argument("--model", required=True, metavar="NAME[:VERSION]")
        sub.add_argument("--json", action="store_true", help="machine-readable output and errors")
        if name == "serve":
            sub.add_argument("--host", default="", help="address to serve (AIRLOCK_HOST, default all)")
            sub.add_argument("--port", type=int, default=0, help="port to serve (NIM_HTTP_API_PORT, default 8000)")
        if name == "download-to-cache":
            sub.add_argument("-p", "--profile", "--profiles", dest="profiles", nargs="+", metavar="ID_OR_DESCRIPTION")
            sub.add_argument("--all", action="store_true", help="the weights of all profiles")
    return parser


COMMANDS: dict[str, Callable[[Settings, argparse.Namespace], int]] = {
    "serve": serve,
    "download-to-cache": download,
    "list-model-profiles": list_profiles,
    "return-lease": return_lease,
}


def main(argv: list[str] | None = None) -> int:
    """Entry point of `airlock runtime`; returns the documented exit status."""
    args = _parser().parse_args(argv)
    port, settings = getattr(args, "port", 0), None
    try:
        if not 0 <= port <= 65535:
            raise Invalid(f"--port {port}", expected="a port from 1 to 65535")
        settings = from_environment(os.environ, args.model, host=getattr(args, "host", ""), port=port)
        _logging(settings.log_level)
        # As process 1 of a container nothing ends us by default; the front sets its own handlers later.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        return COMMANDS[args.command](settings, args)
    except AirlockError as error:
        if settings is not None and args.command == "serve":
            from runtime import entitlement

            entitlement.refuse_kept(settings.cache / "leases", settings.model, settings.ref, settings.instance, error.reason)
        return _failed(error, args.json)
    except OSError as error:
        what = f"{error.strerror or error}: {error.filename or 'a file of the cache'}"
        return _failed(Unavailable(what, expected="a cache and a temporary directory that we may use", reason="cache"), args.json)


def _failed(error: AirlockError, as_json: bool) -> int:
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


if __name__ == "__main__":
    sys.exit(main())
