"""A start of what this site did not sign: a local model directory, or a manifest of the operator's; only with a reason in words, logged and recorded.

The record goes to the registry's audit log; where that does not answer it stays in the cache and is told by a later start. There is no lease, since
no promoted profile is run; a key that the registry refuses still ends the start. The model's digest is shown with `unsigned:` before it.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import stat
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from artifact import model_dir, nim, profile
from artifact.digest import hash_fd
from artifact.errors import AirlockError, Denied, Invalid, NotFound, TooLarge, Unavailable
from artifact.manifest import MAX_FILES, canonical_json, digest_of
from artifact.profile import Pin, Profile, ProfileSet
from runtime import cache as place
from runtime import content, start
from runtime.derive import items
from runtime.settings import Settings
from runtime.weights import ModelDir, Released

if TYPE_CHECKING:
    from artifact.remote import RemoteRegistry

log = logging.getLogger("airlock")
FOLDER = "unsigned"
MAX_RECORDS, MAX_RECORD = 1000, 4096
NOWHERE = "sha256:" + "0" * 64


def asked(settings: Settings) -> bool:
    """Whether a start is one of these; raises Denied (reason unsigned) where nobody gave the reason."""
    if settings.local is None and settings.manifest is None:
        return False
    if not settings.unsigned:
        what = f"the model directory {settings.local}" if settings.local else f"NIM_MANIFEST_PATH {settings.manifest}"
        raise Denied(
            f"{what} has no signature of this site",
            expected="a promoted model of this site's registry",
            do="push and promote it, or say who decided it and why in AIRLOCK_ALLOW_UNSIGNED",
            reason="unsigned",
        )
    return True


def choose(settings: Settings, *, any_engine: bool = False) -> start.Choice:
    """As start.choose: key check where there is a registry, GPUs, choice among the profiles of the directory or of the operator's manifest."""
    from artifact.trust import SiteTrust
    from runtime import engines, entitlement, profiles
    from runtime.offline import Offline

    client, trouble = start.remote(settings) if settings.registry else Offline("http://offline"), None
    if settings.registry:
        if settings.key or not settings.offline:
            entitlement.require_key(settings)
        trouble = entitlement.check_key(client)
        if trouble:
            entitlement.tell(trouble)
    else:
        trouble = Unavailable("AIRLOCK_REGISTRY is not set", reason="offline")
    log.warning("UNSIGNED: %s is run without this site's signature: %s", settings.local or settings.manifest, settings.unsigned)
    place.check(settings.cache)
    found = from_directory(settings.local, settings) if settings.local else from_manifest(settings, None if trouble else client)
    facts = start.detect(settings, pinned=bool(settings.profile))
    for line in start.system(facts):
        log.info(line)
    absent = {} if any_engine else {name: why for name, why in engines.installed(settings).items() if why}
    able = frozenset(engines.names()) - frozenset(absent)
    selection = profiles.select(found.profiles, facts, start.wanted_of(settings, settings.profile, able, tuple(absent.items())))
    trust = SiteTrust("", {}, {})
    return start.Choice(client, trouble, trust, facts, Released("unsigned", found), selection)


def look(manifest: Path, settings: Settings) -> start.Choice:
    """What of a manifest file would fit this node; nothing is asked, fetched or run, so nobody has to allow it."""
    from artifact.trust import SiteTrust
    from runtime import profiles
    from runtime.offline import Offline

    found, facts = listed(_read(manifest)), start.detect(settings)
    selection = profiles.select(found.profiles, facts, start.wanted_of(settings, settings.profile, None))
    trouble = Unavailable("the registry is not asked", reason="offline")
    return start.Choice(Offline("http://offline"), trouble, SiteTrust("", {}, {}), facts, Released("unsigned", found), selection)


def from_directory(top: Path, settings: Settings) -> ProfileSet:
    """The profiles that a directory's own config gives, or those of NIM_MANIFEST_PATH; raises NotFound, Invalid for what is no data."""
    _walk(top)
    try:
        found = model_dir.read(top)
    except (Invalid, TooLarge) as error:
        error.reason = "model_content"
        raise
    weights = found.config.memory.weights_bytes
    if settings.manifest:
        return profile.read(_read(settings.manifest))
    cpu = not found.config.quantization
    return profile.parse(profile.build("local/model", NOWHERE, items(found, "vllm", (), 0, cpu=cpu), weights))


def from_manifest(settings: Settings, client: RemoteRegistry | None) -> ProfileSet:
    """The profiles of NIM_MANIFEST_PATH, their weights pinned by what the registry has under their names now; raises Unavailable without it."""
    found = listed(_read(settings.manifest or Path()))
    return ProfileSet(found.model, tuple(_pinned(p, settings, client) for p in found.profiles))


def _pinned(one: Profile, settings: Settings, client: RemoteRegistry | None) -> Profile:
    name, version = one.model.name, settings.ref
    if one.model.digest != NOWHERE:
        return one
    if name == "local/model":
        name = settings.model
    if client is None:
        raise Unavailable("a manifest that names weights by version needs the registry", do="start while it answers", reason="offline")
    return replace(one, model=Pin(name, client.read_manifest(name, one.options.get("version", version))[0].digest))


def listed(raw: bytes) -> ProfileSet:
    """The profiles of a profile document, an author's list or a NIM's model manifest; raises Invalid, TooLarge, Unsupported."""
    with suppress(Invalid):
        return profile.read(raw)
    found = []
    for one in nim.parse(raw).profiles:
        places = [p for p in one.places() if p.scheme in ("ngc", "hf")] if one.files else []
        name = places[0].repository if places else "local/model"
        options = {"version": places[0].version} if places and places[0].version else {}
        found.append(Profile(one.id, dict(one.tags), Pin(name, NOWHERE), options=options))
    return ProfileSet("local/model", tuple(found))


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(nim.MAX_BYTES + 1)
    except OSError as error:
        raise NotFound(f"{path} cannot be read: {error.strerror}", expected="a model manifest or a profile document", reason="unsigned") from error


# ---- a local directory


def workspace(settings: Settings, made: Profile, view: Path) -> ModelDir:
    """A directory of links to the files that an engine may see, each hashed; raises Invalid (reason model_content) for what is no data."""
    top = settings.local or Path()
    code = made.options.get("trust_remote_code", "false").lower() == "true"
    names = _walk(top)
    with ThreadPoolExecutor(4) as pool:
        sums = dict(zip(names, pool.map(lambda name: _sum(top, name), names), strict=True))
    total = 0
    view.mkdir()
    for name in names:
        suffix = PurePosixPath(name).suffix.lower()
        if suffix in content.RUNS_WHEN_LOADED or (suffix in content.CODE and not code):
            log.warning("%s of %s is code or a pickle: no engine sees it", name, top)
            continue
        fd = os.open(top / name, os.O_RDONLY | os.O_CLOEXEC)
        try:
            content.demand_data(name, os.pread(fd, content.HEAD, 0))
            total += os.fstat(fd).st_size
        finally:
            os.close(fd)
        (view / name).parent.mkdir(parents=True, exist_ok=True)
        (view / name).symlink_to((top / name).resolve())
    return ModelDir(view, "unsigned:" + digest_of(canonical_json([[n, sums[n]] for n in names])), len(names), total, 0, total, 0)


def _walk(top: Path) -> list[str]:
    """The files of a directory, sorted; raises Invalid for a link that leaves it, what is no file, and names that differ in case alone."""
    found: dict[str, str] = {}
    root = Path(os.path.realpath(top))  # no Path.resolve: it raises RuntimeError for links that go in a circle
    if not root.is_dir():
        raise NotFound(f"{top} is no directory", expected="a model directory that is mounted there", do="check the volume", reason="model_content")
    for folder, folders, names in os.walk(root):
        folders[:] = [f for f in folders if not f.startswith(".")]
        for name in (*names, *(f for f in folders if Path(folder, f).is_symlink())):
            path = Path(folder, name)
            shown = str(path.relative_to(root))
            if not Path(os.path.realpath(path)).is_relative_to(root):
                raise _no_data(f"{shown} is a link that leaves the directory", "files, or links inside it")
            if path.is_dir():
                continue
            if not path.is_file():  # a link to nothing is none either
                raise _no_data(f"{shown} is no plain file", "files")
            if shown.lower() in found:
                raise _no_data(f"{shown} and {found[shown.lower()]} differ in case alone", "names that every file system tells apart")
            found[shown.lower()] = shown
            if len(found) > MAX_FILES:
                raise _no_data(f"there are more than {MAX_FILES} files", "a model directory")
    return sorted(found.values())


def _no_data(what: str, expected: str) -> Invalid:
    return Invalid(f"the model directory: {what}", expected=expected, do="copy it with cp -rL and look at it first", reason="model_content")


def _sum(top: Path, name: str) -> str:
    fd = os.open(top / name, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return hash_fd(fd, 0, os.fstat(fd).st_size)
    finally:
        os.close(fd)


# ---- beside a promoted model


def added(settings: Settings, model: Path) -> dict[str, Path]:
    """What the operator puts beside a model from outside of it, by variable: adapters, a draft model, a chat template."""
    tuned = settings.tuning
    found = {
        "NIM_PEFT_SOURCE": tuned.peft_source,
        "NIM_DRAFT_MODEL_PATH": tuned.draft_model,
        "NIM_CHAT_TEMPLATE": model / tuned.chat_template if tuned.chat_template else None,
    }
    return {name: path for name, path in found.items() if path and not path.resolve().is_relative_to(model.resolve())}


def digest_with(digest: str, outside: Mapping[str, Path]) -> str:
    """The digest of a model together with the bytes that are put beside it; its own where there are none; raises Invalid for what is no data."""
    if not outside:
        return digest
    sums = [[name, shown, _sum(top, shown)] for name, path in sorted(outside.items()) for top, names in [_files(path)] for shown in names]
    return digest_of(canonical_json([digest, sums]))


def _files(path: Path) -> tuple[Path, list[str]]:
    return (path, _walk(path)) if path.is_dir() else (path.parent, [path.name])


# ---- the record


def record(choice: start.Choice, made: Profile, digest: str, settings: Settings, outside: Mapping[str, Path]) -> None:
    """Tells the registry of the start, or notes it in the cache where it does not answer; then tells what was noted there before."""
    fact: dict[str, object] = {
        "model": settings.name_ref,
        "digest": digest_with(digest, outside).removeprefix("unsigned:"),
        "profile": " with ".join((made.description[:100], *outside))[:200],
        "reason": settings.unsigned,
        "host": settings.instance,
        "at": int(time.time()),
    }
    for name, path in outside.items():
        log.warning("UNSIGNED: %s (%s) is used without this site's signature: %s", path, name, settings.unsigned)
    folder = settings.cache / FOLDER
    if not _tell(choice, fact):
        log.warning("the registry does not know of this unsigned start yet; a later one tells it")
        try:
            place.folders(settings.cache, folder)
            place.write(folder / f"{fact['at']}-{secrets.token_hex(4)}.json", json.dumps(fact).encode())
        except (OSError, AirlockError) as error:
            log.warning("the record of this unsigned start cannot be kept in %s: %s", folder, error)
        return
    # Others may have put anything there: what is no file, or no record that the registry takes, holds up nothing.
    for path in sorted(folder.glob("*.json"))[:MAX_RECORDS] if not folder.is_symlink() else ():
        with suppress(OSError, ValueError):
            if _tell(choice, json.loads(_plain(path))):
                path.unlink()


def _plain(path: Path) -> bytes:
    """The bytes of a small plain file; raises OSError, ValueError."""
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise ValueError("no plain file")
        return file.read(MAX_RECORD)


def _tell(choice: start.Choice, fact: Mapping[str, object]) -> bool:
    if choice.trouble:
        return False
    try:
        choice.client.api("POST", "/airlock/v1/unsigned", fact)
    except AirlockError as error:
        log.warning("the registry does not take the record of an unsigned start: %s", error.what)
        return False
    return True


class Mark:
    """What readiness and metrics say of an unsigned model."""

    def warning(self) -> str:
        """One line without names."""
        return "this model, or what was put beside it, has no signature of this site (AIRLOCK_ALLOW_UNSIGNED)"

    def metrics(self) -> list[str]:
        """Lines of Prometheus text."""
        return ["# TYPE airlock_unsigned gauge", "airlock_unsigned 1"]
