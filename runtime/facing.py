"""What of a start its front tells and asks: settings, the memory of its GPUs, and who may call; values only, nothing is started here."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from artifact.errors import Invalid
from artifact.profile import Profile, ProfileSet
from artifact.remote import RemoteRegistry
from runtime import gpus
from runtime.front.callers import Callers
from runtime.front.settings import ServeSettings
from runtime.node import Gpu
from runtime.settings import Settings
from runtime.start import Choice
from runtime.weights import ModelDir

LICENCES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "LICENCE", "LICENCE.txt", "NOTICE")
MAX_LICENCE = 1 << 20
GPU_S = 10.0


def front(settings: Settings, choice: Choice, profile: Profile, made: ModelDir) -> ServeSettings:
    """What the front of this start is told."""
    return ServeSettings(
        settings.host,
        settings.port,
        settings.names,
        profile.id,
        choice.released.digest,
        made.digest,
        model_ref=settings.ref,
        simulated=choice.facts.simulated,
        ready_s=settings.start_deadline_s,
        why=choice.selection.why,
        manifest=manifest(choice.released.profiles),
        license=licence(made.path),
        cache={"model": made.bytes, "fetched": made.fetched, "hashed": made.hashed, "stamped": made.stamped},
        cache_folder=settings.cache,
        expected={k: v for k, v in asdict(profile.expected).items() if v} if profile.expected else {},
        limits=settings.limits,
    )


def manifest(found: ProfileSet) -> str:
    """The profiles as the text that /v1/manifest tells; JSON, which every reader of YAML takes."""
    return json.dumps({"model": found.model, "profiles": [{k: v for k, v in asdict(p).items() if v} for p in found.profiles]}, indent=1)


def licence(model: Path) -> tuple[str, bytes]:
    """Name and text of the licence in a model's directory; empty where there is none that can be read."""
    for name in LICENCES:
        with suppress(OSError), os.fdopen(os.open(model / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as text:
            return name, text.read(MAX_LICENCE)
    return "", b""


def memory(settings: Settings, choice: Choice) -> Callable[[], Sequence[Gpu]] | None:
    """A measurement of the GPUs that this start uses; None on a CPU node."""
    uuids = {g.uuid for g in choice.selection.gpus}
    if not uuids:
        return None

    def measure() -> Sequence[Gpu]:
        found = gpus.detect(GPU_S, settings.visible_cuda, settings.visible_nvidia, order=settings.device_order)
        return [g for g in found.gpus if g.uuid in uuids]

    return measure


def callers(settings: Settings, *, own: bool) -> Callable[[], Callers] | None:
    """The check of callers' keys where AIRLOCK_CALLER_KEYS asks for one; raises Invalid. `own`: the model is the organisation's own."""
    if not settings.caller_keys:
        return None
    if not settings.registry or settings.offline:
        raise Invalid("AIRLOCK_CALLER_KEYS needs a registry that can be asked", do="set AIRLOCK_REGISTRY and unset AIRLOCK_OFFLINE, or unset it")
    ca_file = str(settings.ca_file) if settings.ca_file else None

    def ask(key: str) -> Mapping[str, object]:
        return RemoteRegistry(settings.registry, key, ca_file=ca_file, timeout_s=settings.timeout_s).api("GET", "/airlock/v1/standing")

    return lambda: Callers(ask, settings.model, own=own)
