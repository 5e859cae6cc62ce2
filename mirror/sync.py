"""One mirror run: pins every item of a plan, brings its bytes into staging, verified, and only then records its names and its upstream's facts.

An item that fails never stops the others, and never leaves a name behind. The key itself appears nowhere: not in a result, a name or an error.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

from artifact import copy, profile
from artifact.card import hub_warnings
from artifact.disk import Disk
from artifact.errors import AirlockError, Invalid, NotFound, Unauthenticated
from artifact.manifest import (
    EMPTY_BYTES,
    EMPTY_DIGEST,
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
from mirror.home import MirrorHome, Named
from mirror.plan import Item, Plan, load_yaml, read_limited
from mirror.records import Records
from mirror.rights import Right, right
from mirror.sources import huggingface, oci

LICENSES = "org.opencontainers.image.licenses"
MAX_FACTS = 4 * 1024 * 1024


EXIT_CODES = {kind.code: kind.exit_code for kind in AirlockError.__subclasses__()}


@dataclass
class Result:
    """What became of one item."""

    item: Item
    status: str = "failed"
    names: list[Named] = field(default_factory=list)
    received: int = 0
    error: AirlockError | None = None
    warnings: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, object]:
        """The result for the report; an error in its usual form."""
        names = [{"name": n.name, "ref": n.ref, "digest": n.digest, "kind": n.kind} for n in self.names]
        out: dict[str, object] = {"source": self.item.source, "status": self.status, "transferred": self.received, "names": names}
        if self.names:
            out["upstream"] = self.names[0].upstream
        if self.warnings:
            out["warnings"] = self.warnings
        return out | ({"error": self.error.as_dict()} if self.error else {})


def sync(
    home: MirrorHome,
    plan: Plan,
    bar: Callable[[int], copy.Progress] | None = None,
    environ: Mapping[str, str] = os.environ,
    warn: Callable[[str], None] = lambda words: None,
) -> dict[str, object]:
    """Brings all items into the home's staging and returns the report; failures of items are in the report, only those of the home are raised.

    Whether the upstream's entitlement covers it is asked for every item before the first byte of any (mirror/rights.py); an item that it does not
    cover is not fetched.
    """
    results = [Result(item) for item in plan.items]
    jobs: dict[int, _HubJob | _OciJob] = {}
    with home.lock("sync"):
        records, now = Records(home), time.time()
        for i, result in enumerate(results):
            with _failing(result):
                jobs[i] = _job(result.item, home, records, now, environ)
                result.warnings = hub_warnings(jobs[i].files)
            for words in result.warnings:
                warn(words)  # before the first byte
        for i in list(jobs):
            with _failing(results[i]):
                jobs[i].follow()
            if results[i].error:
                del jobs[i]
        progress = bar(sum(job.size for job in jobs.values())) if bar and jobs else None
        try:
            for i, job in jobs.items():
                _run(results[i], job, home, progress)
        finally:
            if progress:
                progress.close()
    failed = sum(r.status == "failed" for r in results)
    return {"items": [r.as_dict() for r in results], "transferred": sum(r.received for r in results), "failed": failed}


@contextmanager
def _failing(result: Result) -> Iterator[None]:
    """Notes what ends an item, so that the others go on."""
    try:
        yield
    except AirlockError as error:
        result.status, result.error, result.names = "failed", error, []


def exit_code(report: Mapping[str, object]) -> int:
    """The exit status for a report: 0, or that of the first failure."""
    items = report["items"]
    failures = [item["error"]["error"] for item in items if "error" in item] if isinstance(items, list) else []
    return EXIT_CODES.get(failures[0], 1) if failures else 0


def _run(result: Result, job: _HubJob | _OciJob, home: MirrorHome, progress: copy.Progress | None) -> None:
    with _failing(result):
        named = job.run(progress)
        for each in named:
            oci.check_whole(home.disk, each.digest)
        before = {(n.name, n.ref): n for n in home.names()}
        result.names = [_steady(n, before.get((n.name, n.ref))) for n in named]
        if any(before.get((n.name, n.ref)) != n for n in result.names):
            home.record(result.names)
            result.status = "synced"
        else:
            result.status = "unchanged"
    result.received = job.received


def _steady(new: Named, old: Named | None) -> Named:
    """The name as recorded before, where nothing but the time differs: a run that brings nothing new changes nothing."""
    if old is None or {**old.upstream, "fetched": 0} != {**new.upstream, "fetched": 0}:
        return new
    return old if (old.digest, old.media_type, old.kind, old.display) == (new.digest, new.media_type, new.kind, new.display) else new


def _key(item: Item, environ: Mapping[str, str]) -> str:
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


def _job(item: Item, home: MirrorHome, records: Records, now: float, environ: Mapping[str, str]) -> _HubJob | _OciJob:
    """What an item needs, pinned and entitled, with metadata alone."""
    if item.profiles:
        profile.build(item.name, EMPTY_DIGEST, _wanted_profiles(item), 0)  # a mistake in it shows before bytes move
    key = _key(item, environ)
    granted = right(item, key, records, now)  # before the upstream is asked for anything
    return _HubJob(granted, key, home.disk) if item.kind == "hf" else _OciJob(granted, key, home.disk)


class _HubJob:
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

    def follow(self) -> None:
        """Nothing: a Hub's repository names nothing else."""

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


class _OciJob:
    """One manifest graph of a registry, its profile manifest, and what that refers to."""

    def __init__(self, granted: Right, key: str, disk: Disk) -> None:
        item = self._item = granted.item
        self._right, self._disk = granted, disk
        self._remote = RemoteRegistry(item.base_url, key, ca_file=item.ca_file or None)
        self._source = oci.Metered(self._remote, disk)
        self._root = parse_manifest(self._source.read_manifest(item.repository, item.wanted)[1])
        granted.check_license(_license(self._root, disk))
        self.size = oci.graph_size(self._source, item.repository, self._root.digest)
        self.files = files_of(self._root) if oci.kind_of(self._root) == "model" else ()
        self._profiles = self._find_profiles()
        self._pins: tuple[profile.Pin, ...] = ()

    def follow(self) -> None:
        """Finds what the profiles refer to; their document is fetched for that."""
        item, disk = self._item, self._disk
        if self._profiles:
            repo, manifest = self._profiles
            self._pins = tuple(p for p in oci.pins(self._source, repo, manifest, disk) if (p.name, p.digest) != (item.name, self._root.digest))
            if manifest.digest != self._root.digest:
                self.size += oci.graph_size(self._source, repo, manifest.digest)
            for pin in self._pins:
                with suppress(NotFound):  # an item before this one may still bring it
                    self.size += oci.graph_size(self._source, pin.name, pin.digest) if pin.digest != self._root.digest else 0

    def _find_profiles(self) -> tuple[str, Manifest] | None:
        """The profile manifest with its repository at the upstream: the item itself, or the one beside a model under the same ref."""
        item, kind = self._item, oci.kind_of(self._root)
        if kind == "profiles":
            return item.repository, self._root
        found = oci.find_profiles(self._source, item, item.ref) if kind == "model" else None
        return (f"{item.repository}/profiles", found) if found else None

    @property
    def received(self) -> int:
        """Bytes of blobs and new manifests that crossed the wire."""
        return self._source.received

    def run(self, progress: copy.Progress | None) -> list[Named]:
        """Fetches the graphs and says which names they are to have."""
        item, root = self._item, self._root
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
        graph = copy.copy_graph(self._source, repo, digest, self._disk, progress)
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


def _license(root: Manifest, disk: Disk) -> str:
    """The licence as the manifest's annotation or a model's facts layer states it; untrusted words, bounded."""
    stated: object = root.annotations.get(LICENSES, "")
    facts = next((b for b in root.layers if b.media_type == FACTS_TYPE), None)
    if not stated and facts and disk.size(facts.digest) is not None:
        stated = parse_json(disk.read(facts.digest, MAX_FACTS), "the facts layer").get("license", "")
    return "".join(c for c in stated if c.isprintable())[:200] if isinstance(stated, str) else ""


def _wanted_profiles(item: Item) -> list[dict[str, object]]:
    """The author's list of profiles of an item; raises NotFound, Invalid."""
    if item.profiles is None:
        return []
    doc = load_yaml(read_limited(item.profiles, "the profiles file"), f"the profiles file {item.profiles.name}")
    wanted = doc.get("profiles") if isinstance(doc, dict) else None
    if not isinstance(doc, dict) or not isinstance(wanted, list) or not wanted or set(doc) != {"profiles"}:
        raise Invalid(
            f"{item.profiles.name} holds no profiles", expected="profiles: a list of mappings with tags, options, id, image, and no other key"
        )
    return wanted


def _build_profiles(item: Item, digest: str, files: tuple[File, ...], disk: Disk) -> str:
    """Puts a profile manifest for a model into the store and returns its digest; raises Invalid."""
    weights = sum(f.size for f in files if content_kind(f.path).endswith(".weight.v1.raw"))
    document = profile.build(item.name, digest, _wanted_profiles(item), weights)
    layer = Descriptor(PROFILES_TYPE, disk.put(document), len(document))
    disk.put(EMPTY_BYTES)
    return disk.put(build_manifest(PROFILES_TYPE, [layer.as_json()], {}))
