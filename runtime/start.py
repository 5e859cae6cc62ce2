"""The way of every start up to its choice: key check, GPUs, released profiles, profile, lease, weights, in a straight line; none calls the next.

Loads what a step needs when it needs it: `--help` must answer at once, and a refusal must come before anything heavy is imported or fetched.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from artifact.errors import Invalid, NotFound, Unavailable
from artifact.profile import Profile
from runtime.node import Facts
from runtime.settings import GPU_SHARE, Settings

if TYPE_CHECKING:
    from artifact.remote import RemoteRegistry
    from artifact.store import File
    from artifact.trust import SiteTrust
    from runtime import entitlement
    from runtime.profiles import Selection, Wanted
    from runtime.upkeep import Scrub
    from runtime.watch import Watch
    from runtime.weights import ModelDir, Released

log = logging.getLogger("airlock")
FREE = 5  # percent of a GPU's memory in use up to which a NIM lists it as free (0 to 3 were, 7 was not)
MEASURED = 4 << 30  # bytes of weights from which on the read speed is measured at a start


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


def choose(settings: Settings, pin: str, *, any_engine: bool = False) -> Choice:
    """Key check, GPUs, released profiles, choice among those whose engine is installed (or all); raises what each of them raises, in this order."""
    from runtime import profiles

    client, trouble, trust, released = release(settings)
    facts = detect(settings, pinned=bool(pin))
    for line in system(facts):
        log.info(line)
    for gpu in facts.gpus:
        for line in (*gpu.faults, *gpu.notices):
            log.warning("%s: %s", gpu.label, line)
    words = ("with", "support") if settings.lora else ("without", "do not support")
    log.info("Running NIM %s LoRA. Only looking for compatible profiles that %s LoRA.", *words)
    wanted = wanted_of(settings, pin, *engines_here(settings, any_engine=any_engine))
    return Choice(client, trouble, trust, facts, released, profiles.select(released.profiles.profiles, facts, wanted))


def release(settings: Settings) -> tuple[RemoteRegistry, Unavailable | None, SiteTrust, Released]:
    """Key check, trust, and the released profiles, from the registry or the cache; raises what each of them raises, in this order."""
    from runtime import cache, entitlement

    if settings.key or not settings.offline:  # without the registry the lease in the cache is what proves the right
        entitlement.require_key(settings)
    client = remote(settings)
    trouble = entitlement.check_key(client)
    trust = entitlement.read_trust(settings)
    if trouble:
        entitlement.tell(trouble)
    cache.check(settings.cache)
    return client, trouble, trust, _released(client, trouble, settings, trust)


def engines_here(settings: Settings, *, any_engine: bool = False) -> tuple[frozenset[str], tuple[tuple[str, str], ...]]:
    """The engines that can be started here (or all that there is an adapter for), and why the others cannot."""
    from runtime import engines

    absent = {} if any_engine else {name: why for name, why in engines.installed(settings).items() if why}
    return frozenset(engines.names()) - frozenset(absent), tuple(absent.items())


def detect(settings: Settings, *, pinned: bool = False) -> Facts:
    """The node's GPUs, all of which answered; with a pinned profile they are waited for as long as an engine is; raises Unavailable."""
    from runtime import gpus

    return gpus.detect(
        settings.gpu_deadline_s,
        settings.visible_cuda,
        settings.visible_nvidia,
        order=settings.device_order,
        patience_s=settings.start_deadline_s if pinned else 0.0,
        say=log.warning,
    )


def wanted_of(settings: Settings, pin: str, engines: frozenset[str] | None, absent: tuple[tuple[str, str], ...] = ()) -> Wanted:
    """What the settings ask of a profile."""
    from runtime.profiles import Wanted

    return Wanted(
        pin,
        settings.lora,
        settings.relax_memory,
        engines,
        settings.selector,
        settings.max_model_len,
        settings.kv_sequences,
        settings.kv_percent or GPU_SHARE,
        absent,
    )


def remote(settings: Settings) -> RemoteRegistry:
    """A client of this site's registry with the key, or one that asks nobody (AIRLOCK_OFFLINE); raises Invalid without AIRLOCK_REGISTRY."""
    from artifact.remote import RemoteRegistry

    if settings.offline:
        from runtime.offline import Offline

        return Offline(settings.registry or "http://offline", settings.key)
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


def announce(choice: Choice, expect: str = "") -> Profile:
    """Logs the choice and a reason for each other profile; raises NotFound when none fits, Conflict when it is not the expected one."""
    from runtime import profiles

    selection = choice.selection
    for profile, reason in selection.rejected:
        if reason.startswith("it does not support LoRA"):
            log.warning("Profile %s does not support LoRA, but LoRA is enabled. Skipping profile.", profile.id)
    log.info("Detected %d compatible profile(s).", len(selection.order))
    if low := sum(v.rule == profiles.FREE for v in selection.verdicts):
        log.info("Detected additional %d compatible profile(s) that are currently not runnable due to low free GPU memory.", low)
    for verdict in selection.verdicts[: len(selection.order)]:
        log.info("Valid profile: %s (%s) on GPUs %s", verdict.profile.id, verdict.profile.description, [g.index for g in verdict.gpus])
    for profile, reason in selection.rejected:
        log.info("Rejected profile: %s (%s): %s", profile.id, profile.description, reason)
    profile = profiles.require(selection)
    if selection.standing == "pinned":
        log.info("Matched profile_id in manifest from env NIM_MODEL_PROFILE: %s", profile.id)
    log.info("%s: %s", selection.line, selection.why)
    for note in selection.notes:
        log.warning("%s", note)
    profiles.check_expected(selection, expect)
    for key, value in sorted(profile.tags.items()):
        log.info("Profile metadata: %s: %s", key, value)
    return profile


def workspace(choice: Choice, profile: Profile, settings: Settings) -> ModelDir:
    """The verified model directory of a profile; raises what runtime.weights.materialise raises."""
    from runtime import weights

    log.info("Preparing model workspace. This step might download additional files to run the model.")
    began = time.monotonic()
    code = profile.options.get("trust_remote_code", "false").lower() == "true"
    source = choice.remote if settings.download else None
    if source and weights.missing(source, settings.cache, profile.model)[1]:
        log.info("Downloading manifest profile: %s", profile.id)
    made = weights.materialise(source, settings.cache, profile.model, log.info, workers=settings.workers, code=code)
    log.info(
        "Model workspace is now ready. It took %.3f seconds (%d bytes fetched, %d hashed again, %d known by stamp)",
        time.monotonic() - began,
        made.fetched,
        made.hashed,
        made.stamped,
    )
    return made


def watch(choice: Choice, profile: Profile, settings: Settings, made: ModelDir, claims: dict[str, object], fresh: bool) -> Watch:
    """The watch over what a start serves."""
    from runtime import entitlement
    from runtime.watch import Watch

    log.info("Lease %s until %s", claims.get("jti"), entitlement.until(claims))
    return Watch(
        choice.client,
        lease_for(choice, profile, settings),
        lambda: entitlement.read_trust(settings),  # again at each renewal: keys are replaced while models run
        settings.cache / "leases",
        claims,
        every_s=settings.watch_s,
        fresh=fresh,
        receipt={"digest": made.digest, "bytes": made.bytes, "files": made.files},
    )


def scrub(choice: Choice, profile: Profile, settings: Settings, made: ModelDir) -> Scrub:
    """The scrub of what a start serves."""
    from runtime import upkeep, weights

    def repair(file: File) -> None:
        source = choice.client if settings.download and not settings.offline else None  # also one that was away at the start
        weights.again(source, settings.cache, profile.model, made.path, file, log.info)

    return upkeep.Scrub(settings.cache, made.path, made.listed, settings.scrub_bytes_s, repair)


def lease_for(choice: Choice, profile: Profile, settings: Settings) -> entitlement.Choice:
    """What a lease of this start is for."""
    from runtime import entitlement

    uuids = tuple(dict.fromkeys(g.parent or g.uuid for g in choice.selection.gpus))  # slices count as the GPU that they are of
    return entitlement.Choice(settings.model, settings.ref, choice.released.digest, profile.id, uuids, settings.instance, profile.model.digest)


def lease(choice: Choice, profile: Profile, settings: Settings) -> tuple[dict[str, object], bool]:
    """A lease and whether the registry gave it just now; one from the cache where the registry does not answer, at the start or at this step."""
    from runtime import entitlement

    wanted, folder, trouble = lease_for(choice, profile, settings), settings.cache / "leases", choice.trouble
    if trouble is None:
        try:
            return entitlement.obtain_lease(choice.client, wanted, choice.trust, folder), True
        except Unavailable as error:
            entitlement.tell(error)
            trouble = error
    return entitlement.fall_back(trouble, wanted, choice.trust, folder), False


def weighed(choice: Choice, profile: Profile, settings: Settings) -> tuple[int, int, list[Path]]:
    """Bytes of the weights, those of them that have to be fetched (-1: not known), and their files that are here, largest first."""
    from runtime import weights

    if settings.local:
        found = sorted((-path.stat().st_size, path) for path in settings.local.resolve().rglob("*") if path.is_file())
        return profile.weights_bytes, 0, [path.resolve() for _, path in found]
    return *weights.missing(choice.remote, settings.cache, profile.model), weights.largest(settings.cache, profile.model)


def prepare(choice: Choice, profile: Profile, settings: Settings) -> None:
    """The pre-flight of a start, logged; raises Unavailable with the reason of its first failure."""
    from runtime import preflight

    total, missing, files = weighed(choice, profile, settings)
    speed = files if total >= MEASURED else None
    lines = preflight.node_lines(settings, choice.facts, choice.selection.gpus, profile.tags, total, missing, speed)
    for line in lines:
        log.log(logging.INFO if line.state == "ok" else logging.WARNING, "Pre-flight: %s", line.words())
    preflight.require(lines)


def system(facts: Facts) -> list[str]:
    """The lines of SYSTEM INFO, as a NIM prints them."""
    mark = " SIMULATED" if facts.simulated else ""
    if facts.cpu:
        return ["SYSTEM INFO", f"- No NVIDIA library on this node: CPU profiles only{mark}"]
    lines = ["SYSTEM INFO", f"- Driver {facts.driver}, CUDA {facts.cuda}{mark}"]
    used = {gpu: 100 * (gpu.total - gpu.free) // gpu.total if gpu.total else 0 for gpu in facts.gpus}
    for title, some in (("Free", [g for g in facts.gpus if used[g] <= FREE]), ("Non-free", [g for g in facts.gpus if used[g] > FREE])):
        if some or title == "Free":
            lines.append(f"- {title} GPUs:{'' if some else ' <None>'}")
        lines += [f"  -  [{g.device}] ({g.index}) {g.name} {g.uuid} [current utilization: {used[g]}%]" for g in some]
    return lines + ([f"- {facts.hidden}"] if facts.hidden else [])
