"""What becomes of one item of a plan: pinned and sized with metadata alone, then fetched, and named; one class for each kind of source.

A job is made only once its item is entitled (mirror/rights.py); it records no name itself.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import suppress

from artifact import copy, model_dir, profile
from artifact.disk import Disk
from artifact.errors import AirlockError, Invalid, NotFound, Unauthenticated
from artifact.manifest import (
    EMPTY_BYTES,
    FACTS_TYPE,
    MANIFEST,
    PROFILES_TYPE,
    Manifest,
    build_manifest,
    content_kind,
    files_of,
    parse_json,
    parse_manifest,
)
from artifact.remote import RemoteRegistry
from artifact.store import Descriptor, File
from mirror import content
from mirror.home import Named
from mirror.plan import Item, load_yaml, read_limited
from mirror.rights import Right
from mirror.sources import huggingface, ngc, oci

LICENSES = "org.opencontainers.image.licenses"
MAX_FACTS = 4 * 1024 * 1024


class Job(ABC):
    """One item, pinned: its bytes and files before any is fetched; `follow`, then `settle` once every item has followed, then `run`."""

    size: int
    files: tuple[File, ...]

    @property
    @abstractmethod
    def received(self) -> int:
        """Bytes that crossed the wire."""

    @abstractmethod
    def run(self, progress: copy.Progress | None) -> list[Named]:
        """Fetches everything and says which names it is to have."""

    def follow(self) -> None:  # noqa: B027 - most items refer to nothing else
        """Finds what the item refers to, where it does."""

    def settle(self) -> None:  # noqa: B027 - most items choose nothing together
        """Decides what depends on the choices of other items."""

    def chosen(self) -> list[dict[str, object]]:
        """What was selected out of the item, for the report."""
        return []


def key_of(item: Item, environ: Mapping[str, str]) -> str:
    """The key in the variable that an item names; raises Unauthenticated."""
    if not item.key_env:
        return ""
    key = environ.get(item.key_env, "")
    if not key:
        raise Unauthenticated(
            f"the variable {item.key_env} for {item.source} is not set", expected="the upstream's key in it", do=f"export {item.key_env}=…"
        )
    if not key.isascii() or not key.isprintable() or " " in key:
        raise Unauthenticated(f"the variable {item.key_env} does not hold a key", expected="one printable word", do=f"set {item.key_env} again")
    return key


class HubJob(Job):
    """One Hub repository at one commit."""

    def __init__(self, granted: Right, key: str, disk: Disk) -> None:
        self._item, self._right, self._disk = granted.item, granted, disk
        self._source = huggingface.HubSource(self._item.base_url, key, self._item.ca_file)
        self._snapshot = self._source.resolve(self._item)
        granted.check_license(self._snapshot.license)
        gate = self._source.admitted(self._snapshot) if self._snapshot.gated else ""
        user = role = ""
        with suppress(AirlockError):  # a Hub that tells nobody's name: the files decide
            user, role = self._source.who()
        self._facts = granted.facts(self._snapshot.license, user, "; ".join(w for w in (user and f"user {user}", role and f"role {role}", gate) if w))
        self.size = sum(f.size for f in self._snapshot.files)
        self.files = tuple(File(f.path, f.digest, f.size) for f in self._snapshot.files)

    @property
    def received(self) -> int:
        """Bytes of files that crossed the wire."""
        return self._source.fetcher.received

    def run(self, progress: copy.Progress | None) -> list[Named]:
        """Fetches, builds the manifests and says which names they are to have."""
        item, shot = self._item, self._snapshot
        files = self._source.fetch(shot, self._disk, progress)
        content.check_model(files, self._disk)
        raw = huggingface.build(shot, files, self._disk)
        digest = self._disk.put(raw)
        upstream = self._facts | {"source": f"hf://{shot.repo_id}@{shot.commit}", "gated": shot.gated, "fetched": int(time.time())}
        refs = dict.fromkeys((item.ref, shot.commit))
        named = [Named(item.name, ref, digest, MANIFEST, shot.repo_id, "model", upstream) for ref in refs]
        if item.profiles:
            built = _build_profiles(item, digest, files, self._disk)
            named += [Named(f"{item.name}/profiles", ref, built, MANIFEST, f"{shot.repo_id}/profiles", "profiles", upstream) for ref in refs]
        return named


class OciJob(Job):
    """One manifest graph of a registry, its profile manifest, and what that refers to."""

    def __init__(self, granted: Right, key: str, disk: Disk) -> None:
        item = self._item = granted.item
        self._right, self._disk = granted, disk
        self._remote = RemoteRegistry(item.base_url, key, ca_file=item.ca_file or None)
        self.source = oci.Metered(self._remote, disk)
        self.root = parse_manifest(self.source.read_manifest(item.repository, item.wanted)[1])
        granted.check_license(_license(self.root, disk))
        self.size = oci.graph_size(self.source, item.repository, self.root.digest)
        self.files = files_of(self.root) if oci.kind_of(self.root) == "model" else ()
        self._profiles = self._find_profiles()
        self._pins: tuple[profile.Pin, ...] = ()

    def follow(self) -> None:
        """Finds what the profiles refer to; their document is fetched for that."""
        item, disk = self._item, self._disk
        if self._profiles:
            repo, manifest = self._profiles
            self._pins = tuple(p for p in oci.pins(self.source, repo, manifest, disk) if (p.name, p.digest) != (item.name, self.root.digest))
            if manifest.digest != self.root.digest:
                self.size += oci.graph_size(self.source, repo, manifest.digest)
            for pin in self._pins:
                with suppress(NotFound):  # an item before this one may still bring it
                    self.size += oci.graph_size(self.source, pin.name, pin.digest) if pin.digest != self.root.digest else 0

    def _find_profiles(self) -> tuple[str, Manifest] | None:
        """The profile manifest with its repository at the upstream: the item itself, or the one beside a model under the same ref."""
        item, kind = self._item, oci.kind_of(self.root)
        if kind == "profiles":
            return item.repository, self.root
        found = oci.find_profiles(self.source, item, item.ref) if kind == "model" else None
        return (f"{item.repository}/profiles", found) if found else None

    @property
    def received(self) -> int:
        """Bytes of blobs and new manifests that crossed the wire."""
        return self.source.received

    def run(self, progress: copy.Progress | None) -> list[Named]:
        """Fetches the graphs and says which names they are to have."""
        item, root = self._item, self.root
        named = self._graph(item.repository, root.digest, item.name, item.ref, progress)
        self._right.check_license(_license(root, self._disk))  # a model's facts layer may tell it, which was fetched only now
        if self._profiles and self._profiles[1].digest != root.digest:
            named += self._graph(self._profiles[0], self._profiles[1].digest, f"{item.name}/profiles", item.ref, progress)
        for pin in self._pins:
            # A reference is a digest, so its ref is that digest: it can move no ref of that name.
            ref = pin.digest
            if pin.digest == root.digest:
                named.append(Named(pin.name, ref, pin.digest, root.media_type, pin.name, oci.kind_of(root), self._upstream(pin.name, root)))
            else:
                named += self._referred(pin, ref, progress)
        if item.profiles and not self._profiles and oci.kind_of(root) == "model":
            built = _build_profiles(item, root.digest, files_of(root), self._disk)
            name = f"{item.name}/profiles"
            named.append(Named(name, item.ref, built, MANIFEST, name, "profiles", named[0].upstream))
        return named

    def _referred(self, pin: profile.Pin, ref: str, progress: copy.Progress | None) -> list[Named]:
        """What a profile refers to, from this upstream or out of staging; raises NotFound saying whose reference it is."""
        try:
            return self._graph(pin.name, pin.digest, pin.name, ref, progress)
        except NotFound as error:
            raise NotFound(
                f"the profiles of {self._item.name} refer to {pin.name}@{pin.digest}, which {self._item.base_url} does not have",
                expected="everything that profiles refer to",
                do="put an item that brings it before this one, then run again",
                reason="reference",
            ) from error

    def _graph(self, repo: str, digest: str, name: str, ref: str, progress: copy.Progress | None) -> list[Named]:
        """Copies one graph; the root is named `ref`, signatures and referrers keep the tags that they have upstream."""
        graph = copy.copy_graph(self.source, repo, digest, self._disk, progress)
        root = oci.check_whole(self._disk, digest)
        content.check_model(files_of(root) if oci.kind_of(root) == "model" else (), self._disk)
        upstream = self._upstream(repo, root)
        named = [Named(name, ref, digest, root.media_type, name, oci.kind_of(root), upstream)]
        for extra, found in graph.extra:
            named.append(Named(name, extra, found.digest, found.media_type, name, "image", upstream))
        return named

    def _upstream(self, repo: str, root: Manifest) -> dict[str, object]:
        host = self._item.base_url.partition("://")[2]
        source = f"oci://{host}/{repo}@{root.digest}"
        return self._right.facts(_license(root, self._disk)) | {"source": source, "gated": False, "fetched": int(time.time())}


class NgcJob(Job):
    """One version of an NGC model."""

    def __init__(self, granted: Right, key: str, disk: Disk) -> None:
        self._item, self._disk = granted.item, disk
        self._source = ngc.NgcSource(self._item, key)
        shot = self._snapshot = self._source.resolve()
        granted.check_license(shot.license)
        org = kind = ""
        with suppress(AirlockError):  # an API that tells nobody's organisation: the files decide
            org, kind = self._source.api.who() if key else ("", "")
        evidence = "; ".join(w for w in (org and f"organisation {org}", kind) if w)
        self._facts = granted.facts(shot.license, org, evidence) | {"source": shot.source, "gated": shot.gated}
        self.size = sum(f.size for f in shot.files)
        self.files = tuple(File(f.path, f.digest, f.size) for f in shot.files)

    @property
    def received(self) -> int:
        """Bytes of files that crossed the wire."""
        return self._source.received

    def run(self, progress: copy.Progress | None) -> list[Named]:
        """Fetches, builds the manifests and says which names they are to have; the signature and NGC's own words are referrers, named by digest."""
        item, shot = self._item, self._snapshot
        files = self._source.fetch(shot, self._disk, progress)
        content.check_model(files, self._disk)
        built = ngc.build(shot, files, self._source.signature(shot), self._disk)
        upstream = self._facts | {"fetched": int(time.time())}
        named = [Named(item.name, ref, built.digest, MANIFEST, shot.model, "model", upstream) for ref in (item.ref, built.commit)]
        if item.profiles:
            made = _build_profiles(item, built.digest, files, self._disk)
            name, shown = f"{item.name}/profiles", f"{shot.model}/profiles"
            named += [Named(name, ref, made, MANIFEST, shown, "profiles", upstream) for ref in (item.ref, built.commit)]
        return named + [Named(item.name, digest, digest, MANIFEST, shot.model, "image", upstream) for digest in built.referrers]


JOBS: dict[str, Callable[[Right, str, Disk], Job]] = {"hf": HubJob, "oci": OciJob, "ngc": NgcJob}


def _license(root: Manifest, disk: Disk) -> str:
    """The licence as the manifest's annotation or a model's facts layer states it; untrusted words, bounded."""
    stated: object = root.annotations.get(LICENSES, "")
    facts = next((b for b in root.layers if b.media_type == FACTS_TYPE), None)
    if not stated and facts and disk.size(facts.digest) is not None:
        stated = parse_json(disk.read(facts.digest, MAX_FACTS), "the facts layer").get("license", "")
    return "".join(c for c in stated if c.isprintable())[:200] if isinstance(stated, str) else ""


def wanted_profiles(item: Item) -> list[dict[str, object]]:
    """The author's list of profiles of an item; raises NotFound, Invalid."""
    if item.profiles is None:
        return []
    doc = load_yaml(read_limited(item.profiles, "the profiles file"), f"the profiles file {item.profiles.name}")
    wanted = doc.get("profiles") if isinstance(doc, dict) else None
    if not isinstance(doc, dict) or not isinstance(wanted, list) or not wanted or set(doc) != {"profiles"}:
        known = ", ".join(profile.AUTHORED)
        raise Invalid(f"{item.profiles.name} holds no profiles", expected=f"profiles: a list of mappings with {known}, and no other key")
    return wanted


def _build_profiles(item: Item, digest: str, files: tuple[File, ...], disk: Disk) -> str:
    """Puts a profile manifest for a model into the store and returns its digest; raises Invalid."""
    weights = sum(f.size for f in files if content_kind(f.path).endswith(".weight.v1.raw"))
    # What cannot be told (no safetensors, a config.json of an engine) leaves the profiles as they are: a runtime then counts weights alone.
    wanted, _ = model_dir.with_facts(wanted_profiles(item), {f.path: disk.path(f.digest) for f in files if "/" not in f.path}, item.name)
    document = profile.build(item.name, digest, wanted, weights)
    layer = Descriptor(PROFILES_TYPE, disk.put(document), len(document))
    disk.put(EMPTY_BYTES)
    return disk.put(build_manifest(PROFILES_TYPE, [layer.as_json()], {}))
