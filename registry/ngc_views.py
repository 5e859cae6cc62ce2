"""The verbs that NGC's API needs beside those of Registry and Files: who calls, models and images by their NGC names, tickets, sums, signatures.

Each is allowed by the guard's own decision before anything is told. It knows no HTTP; the shapes are those of registry/ngc_shapes.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from artifact.errors import Invalid, NotFound, Unauthenticated
from artifact.grant import READER, Access, Decision, visible
from artifact.manifest import Manifest, is_digest, is_tag, parse_json, parse_manifest
from artifact.store import Call, Descriptor, File, Revision
from registry import ngc_shapes as s
from registry.admission import Admission
from registry.catalog import Located, Repo, blob_locations
from registry.fingerprints import Fingerprints
from registry.home import Home
from registry.library import Library, absent, as_revision, damaged, with_oid
from registry.lookup import Sought
from registry.tickets import LIFE_S, Ticket
from registry.uploads import pieces_of

SIGNATURES = ("application/vnd.dev.sigstore.bundle.v0.3+json", "application/vnd.dev.sigstore.bundle+json;version=0.3")
TOKEN_S = 900  # clients renew five minutes before the end, and take a missing or shorter life for an ended one
MOST_FILES, PAGE = 10_000, 1000
MOST_TAGS = 100  # of an image listing, whose configurations are read for it
MOST_NAMES = 20_000  # that one search looks at
CONFIG_BYTES = 1024 * 1024
Allow = Callable[..., Call]
Seen = Callable[[Call, str, str, int], tuple[list[Repo], str]]


@dataclass(frozen=True)
class Version:
    """One version of a model that the caller may read."""

    repo: Repo
    shown: s.Shown
    located: Located
    revision: Revision

    def facts(self, files: Sequence[File], signed: bool) -> s.Json:
        """What a version's object tells."""
        return {"ref": self.revision.ref, "files": len(files), "bytes": sum(f.size for f in files), "at": self.revision.at, "signed": signed}


class NgcViews:
    """The verbs over one library; `allow` and `seen` are the guard's."""

    def __init__(self, library: Library, admission: Admission, allow: Allow, seen: Seen, home: Home) -> None:
        self._library, self._admission, self._allow, self._seen, self._home = library, admission, allow, seen, home
        self._fingerprints = Fingerprints(library.catalog, library.blobs)

    def close(self) -> None:
        """Ends the thread of the checksums."""
        self._fingerprints.close()

    # ---- who calls

    def caller(self, call: Call) -> s.Json:
        """The key's owner, as the route for it tells."""
        return s.caller(*self._who(call), self._products(call))

    def user(self, call: Call) -> s.Json:
        """The same as users/me tells it."""
        key_id, org, _kind, member, teams = self._who(call)
        return s.user(key_id, org, member, teams)

    def teams(self, call: Call, org: str) -> tuple[str, ...]:
        """The teams of the caller's own organisation that it is in; raises NotFound."""
        _key, own, _kind, _member, teams = self._who(call)
        if org != own:
            raise NotFound(f"this key sees no organisation {org[:100]!r}", expected=own, reason="org")
        return teams

    @staticmethod
    def _who(call: Call) -> tuple[str, str, str, str, tuple[str, ...]]:
        badge = call.badge if isinstance(call, Sought) else None
        who = call.principal
        return who.key_id, who.org, badge.kind if badge else "", badge.member if badge else "", badge.teams if badge else ()

    @staticmethod
    def _products(call: Call) -> tuple[str, ...]:
        return call.principal.entitlement.products if call.principal.entitlement else ()

    products = _products

    def token(self, call: Call) -> tuple[str, int]:
        """A token that reads what its key may read, and its life in seconds; raises Unauthenticated."""
        if call.principal.access is not None:
            raise Unauthenticated("a token is not exchanged for another", do="present the API key", reason="token_invalid")
        access = Access(READER, "ngc", ("pull", "list", "*"))
        token = self._admission.sign(call, (access,), TOKEN_S)
        if call.principal.key_id:
            self._library.audit.read(call.under(Decision(True, "ok")), str(access), "token", 0, "token")
        return token

    # ---- models

    def _named(self, call: Call, names: Sequence[str]) -> tuple[str, Repo | None]:
        """The first of the names that the caller may know of, else the last."""
        repo: Repo | None = None
        for name in names:
            repo = self._library.catalog.repository(name)
            if repo is not None and (repo.subject.visibility == "public" or visible(call.principal, repo.subject)):
                return repo.name, repo
        return names[-1], repo

    def _shown(self, repo: Repo) -> s.Shown | None:
        parts, subject = s.split_name(repo.name), repo.subject
        public = subject.visibility == "public"
        guest = public and self._admission.policy.anonymous and not (subject.requires_tier or subject.requires_product)
        return s.Shown(*parts, repo.display, public, guest, subject.requires_product) if parts else None

    def _read(self, call: Call, names: Sequence[str]) -> tuple[Repo, s.Shown]:
        name, repo = self._named(call, names)
        self._allow(call, name, repo, "pull")
        shown = self._shown(repo) if repo else None
        if repo is None or shown is None:
            raise absent(name, "", None)
        return repo, shown

    def model(self, call: Call, names: Sequence[str]) -> tuple[s.Shown, list[s.Json]]:
        """A model and its versions, the highest first; raises NotFound, Denied."""
        repo, shown = self._read(call, names)
        signed = self._library.catalog.subjects(repo.id, SIGNATURES)
        found = [v | {"signed": v["digest"] in signed} for v in self._library.catalog.details(repo.id, dated=True) if v["commit"]]
        if not found and repo.kind != "model":
            raise NotFound(f"{shown.id} is no model", do="ask for it as an image", reason="repo")
        return shown, s.newest_first(found)

    def version(self, call: Call, names: Sequence[str], ref: str) -> Version:
        """One version, by its ref or commit; raises NotFound, Denied."""
        repo, shown = self._read(call, names)
        found = self._library.catalog.locate(repo.name, ref)
        if found is None or not found.digest:
            raise NotFound(f"{shown.id} has no version {ref[:100]!r}", do="list its versions", reason="revision")
        return Version(repo, shown, found, as_revision(found, ref))

    def files(self, version: Version) -> list[File]:
        """All files of a version that the caller was let see."""
        out: list[File] = []
        while page := self._library.files_page(version.located, "", out[-1].path if out else "", PAGE).items:
            out += [f for f in page if isinstance(f, File)]
            if len(page) < PAGE or len(out) >= MOST_FILES:
                break
        return out

    def file(self, call: Call, names: Sequence[str], ref: str, path: str) -> tuple[Version, File]:
        """One file of a version; raises NotFound, Denied."""
        version = self.version(call, names, ref)
        found = self._library.catalog.file(version.repo.name, version.revision.digest, path)
        if found is None or found.file is None:
            raise NotFound(f"{version.shown.id}:{ref} has no file {path[:200]!r}", do="list its files", reason="entry")
        return version, with_oid(found.file)

    def checksums(self, call: Call, names: Sequence[str], ref: str) -> tuple[list[tuple[File, str]], int]:
        """The files of a version with their BLAKE3, and how many of these are still being computed; raises NotFound, Denied."""
        version = self.version(call, names, ref)
        files = self.files(version)
        known, missing = self._fingerprints.of(f.digest for f in files)
        if missing:
            waited = [f.digest for f in files if f.digest not in known]
            with self._library.catalog.reading() as conn:
                there = blob_locations(conn, waited)
            for digest in waited:
                if digest not in there:
                    raise damaged(version.repo.name, digest)
        return [(f, known.get(f.digest, "")) for f in files], missing

    def signature(self, version: Version) -> Descriptor | None:
        """The sigstore bundle that came with a version: the one layer of a referrer of its manifest; None without one."""
        catalog, repo = self._library.catalog, version.repo
        for kind in SIGNATURES:
            for digest, _size in catalog.referrers(repo.id, version.revision.digest, kind, "", 1):
                for _found, raw in catalog.manifests([digest]):
                    layers = parse_manifest(raw).layers
                    return layers[0] if len(layers) == 1 else None
        return None

    def public_key(self, kind: str) -> bytes:
        """The public key that signatures of a kind verify with, as the operator put it into the data directory; raises NotFound."""
        raw = self._home.vendor_key(kind)
        if raw is None:
            do = f"put the vendor's PEM at trust/vendors/ngc-{kind}.pem of the data directory"
            raise NotFound(f"this registry holds no public key for {kind}", do=do, reason="public_key")
        return raw

    # ---- tickets

    def tickets(self, call: Call, name: str, digests: Iterable[str]) -> list[str]:
        """A download ticket for each object of a repository that the caller was let read."""
        exp = int(call.now) + LIFE_S
        return [self._admission.tickets.sign(Ticket(call.principal.key_id, name, digest, exp)) for digest in digests]

    def opened(self, call: Call, text: str) -> Ticket:
        """What a ticket is for; raises Denied."""
        return self._admission.tickets.verify(text, call.now)

    # ---- images

    def image(self, call: Call, names: Sequence[str]) -> tuple[Repo, s.Shown, list[s.Json]]:
        """An image and its tags, the highest first; raises NotFound, Denied."""
        repo, shown = self._read(call, names)
        refs = [d for d in self._library.catalog.details(repo.id, dated=True) if not d["commit"]]
        named = {str(d["ref"]) for d in refs}
        tags = [d | {"signed": f"{str(d['digest']).replace(':', '-')}.sig" in named} for d in refs if _tags(str(d["ref"]))]
        if not tags:
            raise NotFound(f"{shown.id} is no image", do="ask for it as a model", reason="repo")
        return repo, shown, s.newest_first(tags)

    def tags(self, tags: Sequence[s.Json]) -> list[s.Json]:
        """These tags with size, architectures and whether a signature is attached; at most MOST_TAGS."""
        listed = self._manifests(str(tag["digest"]) for tag in tags[:MOST_TAGS])
        children = [child.digest for manifest in listed.values() for child in manifest.manifests][: MOST_TAGS * 10]
        known = listed | self._manifests(children)
        configs = {d.digest for m in listed.values() for d in m.blobs() if d == m.config}  # what need not be pushed may be another's
        with self._library.catalog.reading() as conn:
            there = blob_locations(conn, sorted(configs))
        out = []
        for tag in tags[:MOST_TAGS]:
            manifest = listed[str(tag["digest"])]
            if manifest.manifests:
                variants = [
                    s.image_variant(d.digest, p, _size(known.get(d.digest))) for d, p in zip(manifest.manifests, _platforms(manifest), strict=True)
                ]
            else:
                place = there.get(manifest.config.digest) if manifest.config else None
                variants = [s.image_variant(manifest.digest, self._platform(place) if place else {}, _size(manifest))]
            size = max((int(str(v["imageSize"])) for v in variants), default=0)
            facts = {"tag": tag["ref"], "digest": tag["digest"], "size": size, "updatedDate": s.when(float(str(tag["at"])))}
            out.append(facts | {"isSigned": tag["signed"], "architectureVariants": variants})
        return out

    def _manifests(self, digests: Iterable[str]) -> dict[str, Manifest]:
        return {d.digest: parse_manifest(raw, d.media_type) for d, raw in self._library.catalog.manifests(digests)}

    def _platform(self, location: str) -> s.Json:
        """Architecture and system of an image's configuration; nothing of what is none."""
        if (self._library.blobs.stat(location) or 0) > CONFIG_BYTES:  # the manifest's own word is not trusted with our memory
            return {}
        try:
            return parse_json(b"".join(pieces_of(self._library.blobs.open(location))), "the configuration")
        except Invalid:
            return {}

    # ---- search

    def search(self, call: Call, place: str, org: str, team: str, kind: str, asked: s.Query) -> list[s.Json]:
        """What a caller sees of one of the three catalogues, which hold nothing twice: public, of its organisation, and the site's other ones."""
        out: list[s.Json] = []
        start = asked.patterns.get("resourceId", "").partition("*")[0].partition("?")[0].partition("[")[0]
        for origin in ("", *s.ORIGINS) if start else ("",):
            after, looked = "", 0
            while looked < MOST_NAMES:
                repos, after = self._page(call, origin + start, after)
                looked += PAGE
                out += [s.found(shown, kind, "", 0.0) for repo in repos if (shown := self._wanted(repo, place, org, team, kind, asked))]
                if not after:
                    break
        return out

    def _page(self, call: Call, prefix: str, after: str) -> tuple[list[Repo], str]:
        if not call.principal.anonymous:
            return self._seen(call, prefix, after, PAGE)
        page = self._library.catalog.repositories(prefix, after, PAGE, "")
        return [repo for repo in page if repo.subject.visibility == "public"], page[-1].name if len(page) == PAGE else ""

    def _wanted(self, repo: Repo, place: str, org: str, team: str, kind: str, asked: s.Query) -> s.Shown | None:
        shown = self._shown(repo)
        if shown is None or repo.kind != ("model" if kind == "MODEL" else "image"):
            return None
        home = "catalog" if shown.public else "org" if repo.subject.org else "subscriber"
        if home != place or (place == "org" and (repo.subject.org != org or (team and shown.team != team))):
            return None
        return shown if asked.takes(shown) else None


def _size(manifest: Manifest | None) -> int:
    return sum(part.size for part in manifest.own()) if manifest else 0


def _platforms(index: Manifest) -> list[s.Json]:
    """The platform of each manifest of an index, empty where it states none."""
    listed = parse_json(index.raw, "the index").get("manifests")
    found = [d.get("platform") if isinstance(d, dict) else None for d in listed] if isinstance(listed, list) else []
    return [p if isinstance(p, dict) else {} for p in found]


def _tags(ref: str) -> bool:
    """Whether a ref is a tag, and not what tools hang onto a digest: a signature, an attestation, a bill of materials."""
    head, _, rest = ref.partition("-")
    return is_tag(ref) and not is_digest(f"{head}:{rest.partition('.')[0]}")
