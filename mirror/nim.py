"""A NIM image with exactly the model versions that the chosen profiles of its own manifest name: which profiles, which files, and how many bytes.

The image's manifest is read out of its layers and travels with them as it is. It must not guess: what a profile does not say where to get is refused.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace

from artifact import copy
from artifact.disk import Disk
from artifact.errors import Invalid, NotFound, TooLarge
from artifact.layers import find_manifest
from artifact.manifest import MAX_MANIFEST_BYTES, files_of, is_commit, parse_manifest
from artifact.nim import NimManifest, NimProfile, NimUri, parse, parse_uri
from artifact.store import Descriptor
from mirror.home import MirrorHome, Named
from mirror.jobs import JOBS, Job, OciJob, key_of
from mirror.plan import Item, Models, Requires, ngc_item
from mirror.rights import Right
from mirror.sources.oci import Metered

CHUNK = 1024 * 1024
MAX_VERSIONS = 500  # each costs a few requests
Place = tuple[str, str]  # canonical name and ref
Entitle = Callable[[Item, str], Right]
Bar = Callable[[int], copy.Progress]


def select(manifest: NimManifest, wanted: Iterable[str]) -> tuple[NimProfile, ...]:
    """The profiles that selectors mean, each once, in the manifest's order; raises NotFound with what there is, Invalid.

    A selector is `all`, an id, a description, or tags that all must match: `llm_engine=vllm,tp=2`.
    """
    found: dict[str, NimProfile] = {}
    for word in wanted:
        if word == "all":
            some: Iterable[NimProfile] = manifest.profiles
        elif "=" in word:
            some = _tagged(manifest, word)
        else:
            some = (manifest.find(word),)
        found |= {profile.id: profile for profile in some}
    return tuple(p for p in manifest.profiles if p.id in found)


def _tagged(manifest: NimManifest, word: str) -> list[NimProfile]:
    tags = dict(part.strip().partition("=")[::2] for part in word.split(","))
    found = [p for p in manifest.profiles if all(p.tags.get(name) == value for name, value in tags.items())]
    if not found:
        told = sorted({f"{name}={value}" for p in manifest.profiles for name, value in p.tags.items()})
        listed = "choose of: " + "; ".join(f"{p.id} ({p.description})" for p in manifest.profiles[:50])
        raise NotFound(
            f"no profile of the image has the tags {word[:200]!r}",
            expected=f"tags {', '.join(told)[:2000]}",
            do=listed,
            reason="profile",
        )
    return found


class Choice:
    """What the NIM items of one plan choose together: each version is mirrored with all files that any of them needs, under one digest."""

    def __init__(self, taken: Iterable[Place]) -> None:
        self._taken = set(taken)  # by items of their own
        self._files: dict[Place, dict[str, str]] = {}
        self._whole: set[Place] = set()

    def add(self, place: Place, file: str, blake3: str, source: str) -> None:
        """Wants one file of a version, or with an empty name all of it; raises Invalid where another item or checksum speaks against it."""
        if place in self._taken:
            raise Invalid(
                f"{source} chooses files of {place[0]}:{place[1]}, which is an item of its own",
                expected="one item for each name and ref",
                do="give that item another ref, or take it out of the plan",
                reason="plan",
            )
        if not file:
            self._whole.add(place)
            return
        files = self._files.setdefault(place, {})
        if blake3 and files.get(file, blake3) not in ("", blake3):
            raise Invalid(f"{file[:200]!r} of {place[0]}:{place[1]} is given two checksums", expected="one", reason="nim_manifest")
        files[file] = blake3 or files.get(file, "")

    def of(self, place: Place) -> tuple[tuple[str, ...], tuple[tuple[str, str], ...]]:
        """The files of a version, none where it is wanted whole, and the checksums that are told of them."""
        files = self._files.get(place, {})
        chosen = () if place in self._whole else tuple(sorted(files))
        return chosen, tuple(sorted((path, value) for path, value in files.items() if value))


class NimJob(Job):
    """One NIM image and what its chosen profiles need."""

    def __init__(
        self,
        granted: Right,
        key: str,
        home: MirrorHome,
        choice: Choice,
        entitle: Entitle,
        environ: Mapping[str, str] = os.environ,
        bar: Bar | None = None,
    ) -> None:
        self._right, self._home, self._disk, self._bar = granted, home, home.disk, bar
        self._choice, self._entitle, self._environ = choice, entitle, environ
        self._image = OciJob(granted, key, home.disk)
        self._profiles: tuple[NimProfile, ...] = ()
        self._models: dict[Place, Job] = {}
        self._uris: dict[Place, NimUri] = {}
        self.size, self.files = self._image.size, ()

    @property
    def received(self) -> int:
        """Bytes of blobs, manifests and files that crossed the wire."""
        return self._image.received + sum(job.received for job in self._models.values())

    def follow(self) -> None:
        """Reads the image's model manifest, for which layers are brought into staging, and chooses; raises NotFound, Invalid, Unsupported."""
        self._image.follow()
        item = self._right.item
        found = find_manifest(_Staged(self._image.source, self._disk, self._bar), item.repository, self._image.root.digest)
        self._profiles = select(parse(found.raw), item.selectors)
        wanted: list[tuple[Place, str, str]] = []  # wished for together, at the end: an image that is refused changes nothing for others
        for profile in self._profiles:
            profile.places()  # each file says where it comes from
            for file in profile.files:
                uri = parse_uri(file.uri)
                if not uri.version:
                    raise Invalid(
                        f"profile {profile.id} names no version of {uri.target}", expected="ngc://org/team/model:version", reason="nim_manifest"
                    )
                place = (uri.repository, uri.version)
                self._uris.setdefault(place, uri)
                wanted.append((place, uri.file, file.checksums.get("blake3", "")))
        if len(self._uris) > MAX_VERSIONS:
            raise TooLarge(f"the chosen profiles name {len(self._uris)} versions of models", expected=f"at most {MAX_VERSIONS}", do="choose fewer")
        for place, path, value in wanted:
            self._choice.add(place, path, value, item.source)

    def settle(self) -> None:
        """Pins the versions of all models, with the files that the whole plan chose of them, and those that are in staging under the same name."""
        names = {(n.name, n.ref): n for n in self._home.names() if n.kind == "model"}
        for place, uri in self._uris.items():
            derived = self._derived(uri, place)
            if derived.files and place in names:  # another plan, or an item of its own, had chosen others: an image takes nothing from them
                before = files_of(parse_manifest(self._disk.read(names[place].digest, MAX_MANIFEST_BYTES)))
                derived = replace(derived, also=tuple(f.path for f in before))
            key = key_of(derived, self._environ)
            granted = replace(self._entitle(derived, key), acceptance=self._right.acceptance)
            self._models[place] = JOBS[derived.kind](granted, key, self._disk)
        self.size = self._image.size + sum(job.size for job in self._models.values())
        self.files = tuple(file for job in self._models.values() for file in job.files)

    def _derived(self, uri: NimUri, place: Place) -> Item:
        item, (files, sums) = self._right.item, self._choice.of(place)
        models = item.models or Models("", "", "")
        if uri.scheme == "hf":
            source = f"hf://{uri.target}@{uri.version}"
            made = Item("hf", source, models.hub, uri.target, uri.version, *place, key_env=models.hub_key_env)
            if is_commit(uri.version):
                made = replace(made, ref=uri.version)
        else:
            made = ngc_item(f"ngc://{uri.target}:{uri.version}", item.source, models.ngc, models.auth)
            # What the vendor asks for the image it asks for the models in it.
            made = replace(made, key_env=item.key_env, requires=Requires(item.requires.product, item.requires.tier))
        return replace(made, ca_file=item.ca_file, files=files, sums=sums)

    def run(self, progress: copy.Progress | None) -> list[Named]:
        """Fetches the image and the models and says which names they are to have."""
        named = self._image.run(progress)
        for job in self._models.values():
            named += job.run(progress)
        return named

    def chosen(self) -> list[dict[str, object]]:
        """The chosen profiles with files and bytes, and the versions that were brought for them."""
        sizes = {place: {f.path: f.size for f in job.files} for place, job in self._models.items()}
        out: list[dict[str, object]] = []
        for profile in self._profiles:
            wanted: dict[tuple[Place, str], int] = {}
            for uri in (parse_uri(file.uri) for file in profile.files):
                place = (uri.repository, uri.version)
                there = sizes.get(place, {})
                wanted |= {(place, path): there.get(path, 0) for path in ([uri.file] if uri.file else there)}
            out.append({"profile": profile.id, "description": profile.description, "files": len(wanted), "bytes": sum(wanted.values())})
        return out + [{"model": f"{name}:{ref}", "files": len(of), "bytes": sum(of.values())} for (name, ref), of in sizes.items()]


class _Staged:
    """The image as layers are read from it: a blob is brought into staging first, where the copy of the image finds it again."""

    def __init__(self, source: Metered, disk: Disk, bar: Bar | None) -> None:
        self._source, self._disk, self._bar = source, disk, bar
        self._sizes: dict[str, int] = {}

    def read_manifest(self, repo: str, ref: str) -> tuple[Descriptor, bytes]:
        """A manifest as the source has it, whose blobs' sizes are noted."""
        found = self._source.read_manifest(repo, ref)
        self._sizes |= {blob.digest: blob.size for blob in parse_manifest(found[1]).own()}
        return found

    def stream(self, repo: str, digest: str, lo: int, hi: int) -> Iterator[bytes]:
        """Bytes [lo, hi) of a blob."""
        size = self._sizes[digest]
        progress = self._bar(size) if self._bar and size > copy.SMALL and self._disk.size(digest) is None else None
        try:
            path = copy.fetch(lambda a, b: self._source.stream(repo, digest, a, b), digest, size, self._disk, progress, workers=8)
        finally:
            if progress:
                progress.close()
        with path.open("rb", buffering=0) as blob:
            blob.seek(lo)
            while lo < hi and (part := blob.read(min(CHUNK, hi - lo))):
                lo += len(part)
                yield part
