"""What of a NIM profile this registry has: each file that the model manifest names, found as a file of a mirrored model, or told as missing.

Must not: believe that a name is there because the manifest says so, or fetch a file's bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

from artifact.errors import Denied, NotFound
from artifact.layers import Found, Source, find_manifest
from artifact.manifest import COMMIT, Reference, check_name, files_of, is_commit, is_tag, parse_manifest, parse_reference
from artifact.nim import NimFile, NimManifest, NimProfile, NimUri, parse, parse_uri
from artifact.remote import RemoteRegistry
from artifact.store import File


@dataclass(frozen=True)
class Held:
    """One file of a profile: its path in the workspace, where it comes from, the repository here and the stored file; `commit` is a Hub model's."""

    path: str
    at: NimUri
    repo: str
    file: File
    commit: str
    checksums: dict[str, str]


@dataclass(frozen=True)
class Presence:
    """A profile's files that are here, and of each that is not its URI (or path) with the reason."""

    profile: NimProfile
    held: tuple[Held, ...]
    missing: tuple[tuple[str, str], ...]

    @property
    def size(self) -> int:
        """Bytes of the files that are here, each content once."""
        return sum({h.file.digest: h.file.size for h in self.held}.values())

    def check(self, image: str) -> None:
        """Raises NotFound, naming what is missing and how it is brought, unless everything is here."""
        if not self.missing:
            return
        shown = ", ".join(f"{uri} ({why})" for uri, why in self.missing[:10])
        more = f" and {len(self.missing) - 10} more" if len(self.missing) > 10 else ""
        raise NotFound(
            f"profile {self.profile.id} is not whole in this registry: {len(self.missing)} files are missing: {shown}{more}",
            expected="every file that the model manifest names",
            do=f"mirror `source: nim://{image}` with `profiles: [{self.profile.id}]` on the connected side, and import the bundle",
            reason="profile_incomplete",
        )


@dataclass(frozen=True)
class _Model:
    files: dict[str, File]
    commit: str


class Models:
    """The models of one registry as a model manifest names them; each version is asked for once."""

    def __init__(self, remote: RemoteRegistry) -> None:
        self._remote = remote
        self._known: dict[tuple[str, str], _Model | str] = {}

    def of(self, profile: NimProfile) -> Presence:
        """What of a profile is here; raises Unauthenticated, Unavailable."""
        held: list[Held] = []
        missing: list[tuple[str, str]] = []
        for file in profile.files:
            found = self._find(file)
            if isinstance(found, str):
                missing.append((file.uri or file.path, found))
            else:
                held += found
        return Presence(profile, tuple(held), tuple(missing))

    def _find(self, file: NimFile) -> list[Held] | str:
        """One file, or all of a version where the manifest names none of its files; a text says why it is not there."""
        if not file.uri:
            return "the manifest does not say where it comes from"
        at = parse_uri(file.uri)
        if at.scheme not in ("ngc", "hf"):
            return f"nothing is mirrored from {at.scheme}://"
        if not at.version:
            return "the manifest names no version"
        model = self._model(at.repository, at.version)
        if isinstance(model, str):
            return model
        if at.file:
            one = model.files.get(at.file)
            return [Held(file.path, at, at.repository, one, model.commit, file.checksums)] if one else "the mirrored version is without it"
        below = f"{file.path}/" if file.path else ""
        return [Held(below + path, at, at.repository, one, model.commit, {}) for path, one in model.files.items()]

    def _model(self, repo: str, version: str) -> _Model | str:
        if (repo, version) not in self._known:
            try:
                _, raw = self._remote.read_manifest(repo, self._ref(repo, version))
                manifest = parse_manifest(raw)
                files = {file.path: file for file in files_of(manifest)}
                commit = manifest.annotations.get(COMMIT, "")  # whoever pushed it wrote that, and a folder is named by it
                self._known[repo, version] = _Model(files, commit if is_commit(commit) else "")
            except NotFound:
                self._known[repo, version] = f"{repo}:{version} is not here, or this key does not see it"
            except Denied as error:
                self._known[repo, version] = f"this key may not pull {repo}: {error.what}"
        return self._known[repo, version]

    def _ref(self, repo: str, version: str) -> str:
        """What the OCI door knows a version by: itself, or where it is no tag the digest that the catalog has for it; raises NotFound."""
        if is_tag(version):
            return version
        shown = self._remote.api("GET", f"/airlock/v1/catalog/{check_name(repo)}")
        refs = shown.get("refs")
        for row in refs if isinstance(refs, list) else []:
            if row.get("ref") == version:
                return str(row["digest"])
        raise NotFound(f"{repo} has no {version}", reason="revision")


def image_name(text: str, host: str) -> Reference:
    """The image that a person names, with or without this registry's own host before it; raises Invalid."""
    return parse_reference(text.removeprefix(f"{host}/"))


def read_profiles(source: Source, image: Reference, platform: str = "") -> tuple[Found, NimManifest]:
    """An image's model manifest out of its layers, as bytes and parsed; raises what find_manifest and parse raise."""
    found = find_manifest(source, image.name, image.ref, platform)
    return found, parse(found.raw)
