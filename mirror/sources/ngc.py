"""NGC as a source: one version of a model by the API that NVIDIA's own clients use, and the model manifest of D1 from it (docs/format.md section 3).

The manifest is a pure function of model, version and chosen files, by whichever route they came; what NGC may change of a version without
changing its files travels as a referrer. Every byte is checked against all that NGC tells of it before the version gets a name.
"""

from __future__ import annotations

import contextlib
import fnmatch
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from blake3 import blake3

from artifact import copy
from artifact.card import README, facts_of
from artifact.digest import PIECE
from artifact.disk import Disk
from artifact.errors import AirlockError, Denied, Invalid, Mismatch, NotFound, TooLarge, Unauthenticated
from artifact.manifest import (
    COMMIT,
    EMPTY_BYTES,
    FACTS_TYPE,
    MANIFEST,
    MAX_FILES,
    SOURCE,
    build_manifest,
    build_model,
    canonical_json,
    derived_commit,
    digest_of,
    files_root,
    parse_json,
)
from artifact.store import Descriptor, File
from mirror.hints import Hints
from mirror.ngc_api import Api, quoted
from mirror.ngc_listing import MAX_SUMS, SUMS, RemoteFile, listed, signed, sums_of
from mirror.plan import Item

_T = TypeVar("_T")
SIGSTORE = "application/vnd.dev.sigstore.bundle.v0.3+json"
VERSION_TYPE = "application/vnd.airlock.ngc.version.v1+json"
MAX_SIGNATURE = 4 * 1024 * 1024
MAX_CARD = 64 * 1024 * 1024
MAX_TOLD = 4 * 1024 * 1024
MAX_PAGES = 1000
PAGE = 1000
SLICE = 8 * 1024 * 1024
STREAMS = 8  # of a large file: NGC's own client was measured to be held back by few connections
REFUSED_LISTING = ("400", "401")  # how NGC answers for an organisation whose files its listings do not show ("Org contex missing")
OVER = ("400", "401", "403", "410")  # how object stores answer for a signed URL that is over


@dataclass(frozen=True)
class Snapshot:
    """A version with its chosen files; `told` is its object as NGC gave it, `sums` its checksums.blake3, chosen or not, where it has one."""

    model: str
    version: str
    files: tuple[RemoteFile, ...]
    license: str = ""
    gated: bool = False
    signed: bool = False
    told: bytes = b""
    sums: RemoteFile | None = None

    @property
    def source(self) -> str:
        """The version as the manifest names it."""
        return f"ngc://{self.model}:{self.version}"


class NgcSource:
    """One model of one NGC API with one key."""

    def __init__(self, item: Item, key: str = "") -> None:
        org, *team, model = item.repository.split("/")
        scopes = tuple(f"group/ngc:{scope}" for scope in (org, *(f"{org}/{t}" for t in team)))
        self.api = Api(item.base_url, item.auth_url, key, item.ca_file, scopes)
        owner = quoted(*((org, *team) if self.api.guest else ("org", org, *(part for t in team for part in ("team", t)))))
        below = f"/v2/models/{owner}" if self.api.guest else f"/v2/{owner}/models"
        self._version = f"{below}/{quoted(model, 'versions', item.wanted)}"
        # A guest asks for URLs below a path of another shape (ngcsdk 4.37.0).
        guest = "/v2/models/org/" + quoted(org, *(part for t in team for part in ("team", t)))
        self._signed = f"{guest if self.api.guest else below}/{quoted(model, item.wanted, 'files')}"
        self._item = item
        self._urls: dict[str, str] = {}
        self._by_file = False
        self._lock = threading.Lock()

    @property
    def received(self) -> int:
        """Bytes of files that crossed the wire."""
        return self.api.fetcher.received

    # ---- what there is

    def resolve(self) -> Snapshot:
        """Looks the version up and lists its chosen files; raises NotFound, Denied, Unauthenticated, Invalid, TooLarge, Mismatch, Unavailable."""
        shot, count, files = Snapshot(self._item.repository, self._item.wanted, ()), -1, dict[str, RemoteFile]()
        refusals: list[AirlockError] = []
        with _unless_refused(refusals):
            shot, count = self._facts(shot, self.api.json(self._version, MAX_TOLD))
        with _unless_refused(refusals):
            files = self._listing(count)
        with _unless_refused(refusals):
            self._find_urls(set(files), count)
        if refusals and not self._urls:
            files = self._without_listing(shot, files, count, refusals[0])
        for path in (p for p in self._urls if p not in files):
            files[path] = RemoteFile(path, -1)
        if len({path.casefold() for path in files}) != len(files):
            raise Invalid("two files are the same but for letter case", expected="names that differ on every file system", reason="path")
        sums = dict(self._item.sums)
        files = {path: replace(file, blake3=sums.get(path, file.blake3)) for path, file in files.items()}
        chosen = [file for path, file in sorted(files.items()) if self._chosen(path)]
        absent = sorted(set(self._item.files) - set(files))
        if absent or not chosen:
            what = f"{shot.source} has no file {absent[0]!r}" if absent else f"no file of {shot.source} is chosen"
            raise NotFound(what, expected="files that the version has", do="see allow, ignore and profiles of the item", reason="entry")
        if len(chosen) > MAX_FILES:
            raise TooLarge(f"{len(chosen)} files of {shot.source} are chosen", expected=f"at most {MAX_FILES} files", do="see allow and ignore")
        with ThreadPoolExecutor(STREAMS, thread_name_prefix="ngc") as pool:
            sized = tuple(pool.map(self._sized, chosen))
        return replace(shot, files=sized, sums=self._sized(files[SUMS]) if SUMS in files else None)

    def _facts(self, shot: Snapshot, doc: Mapping[str, object]) -> tuple[Snapshot, int]:
        version, model = (found if isinstance(found := doc.get(key), Mapping) else {} for key in ("modelVersion", "model"))
        state = self.api.word(version.get("status"))
        if state != "UPLOAD_COMPLETE":
            raise Invalid(f"{shot.source} is in the state {state or 'unknown'}", expected="UPLOAD_COMPLETE", do="run again later", reason="upstream")
        terms = model.get("licenseTerms")
        terms = [t for t in terms if isinstance(t, Mapping)] if isinstance(terms, list) else []
        if any(t.get("needsAcceptance") is True for t in terms):
            raise self.api.refusal(412, b"", shot.source)
        count = version.get("totalFileCount")
        told = canonical_json({"model": dict(model), "modelVersion": dict(version)})
        license_ = self.api.word(next((t.get("licenseId") for t in terms), ""), 200)
        shot = replace(shot, license=license_, gated=bool(terms), signed=version.get("isSigned") is True, told=told)
        return shot, count if type(count) is int and count > 0 else -1

    def _listing(self, count: int) -> dict[str, RemoteFile]:
        """The files with sizes and digests."""
        out: dict[str, RemoteFile] = {}

        def take(doc: Mapping[str, object]) -> int:
            entries = doc.get("modelFiles")
            if not isinstance(entries, list):
                raise Invalid(f"the files of {self._version} are no list", expected="modelFiles", reason="upstream")
            for file in map(listed, entries):
                if out.setdefault(file.path, file) != file:
                    raise Invalid(f"NGC lists {file.path!r} twice and differently", expected="each file once", reason="upstream")
            return len(entries)

        self._pages(f"{self._version}/files?page-size={PAGE}", take, lambda: len(out), {count} - {-1})
        return out

    def _find_urls(self, wanted: set[str], count: int) -> None:
        """The signed URLs of the files, as far as NGC lists them."""

        def take(doc: Mapping[str, object]) -> int:
            self._urls |= (pairs := signed(doc))
            return len(pairs)

        # One that no page has is asked for by its path when it is fetched.
        counts = set() if wanted else {count} - {-1}
        self._pages(self._signed, take, lambda: len(self._urls), counts, lambda: bool(wanted) and wanted <= set(self._urls))

    def _pages(
        self, path: str, take: Callable[[Mapping[str, object]], int], have: Callable[[], int], counts: set[int], enough: Callable[[], bool] = bool
    ) -> None:
        """Reads pages until as many came as are told, or nothing new comes: the first page is 0 for some and 1 for others, totals may lie."""
        idle = 0
        for number in range(MAX_PAGES):
            query = f"{'&' if '?' in path else '?'}page-number={number}" if number else ""
            before = have()
            try:
                doc = self.api.json(path + query)
            except (Invalid, NotFound) as error:
                if number and "status" in error.ids:
                    break  # behind the last page
                raise
            got = take(doc)
            info = doc.get("paginationInfo")
            total = info.get("totalResults") if isinstance(info, Mapping) else None
            told = counts | ({total} if type(total) is int and total > 0 else set())
            if enough() or (told and told == {have()}):
                return
            idle = 0 if have() > before else idle + 1
            if not got or idle > 1:
                break
            if have() > MAX_FILES * 10:
                raise TooLarge(f"{path} lists more than {MAX_FILES * 10} files", expected=f"at most {MAX_FILES} chosen ones")
        else:
            raise TooLarge(f"{path} has more than {MAX_PAGES} pages", expected=f"at most {MAX_PAGES}")
        if counts and max(counts) > have():
            raise Invalid(f"NGC lists {have()} of the {max(counts)} files of {path[:200]}", expected="all of them", do="run again", reason="upstream")

    def _without_listing(self, shot: Snapshot, files: dict[str, RemoteFile], count: int, refusal: AirlockError) -> dict[str, RemoteFile]:
        """The files that checksums.blake3 names, each to be had by its own route; raises the listing's refusal where that is refused too, Invalid."""
        try:
            raw = self.api.fetcher.document(self._file(SUMS), MAX_SUMS)
        except AirlockError:
            raise refusal from None
        self._by_file = True
        named = {path: replace(files.get(path, RemoteFile(path, -1)), blake3=value) for path, value in sums_of(raw).items() if path != SUMS}
        named = {SUMS: RemoteFile(SUMS, len(raw), digest_of(raw))} | files | named
        if len(named) == count + 1 and SUMS not in {*files, *self._item.files}:  # made by NGC for its readers, not a file of the version
            del named[SUMS]
        if len(named) < count:
            what = f"{SUMS} and NGC's listing name {len(named)} of the {count} files of {shot.source}"
            raise Invalid(what, expected="all of them", do="run again, or ask for a key that its listing answers", reason="upstream")
        return named

    def _sized(self, file: RemoteFile) -> RemoteFile:
        if file.size >= 0:
            return file
        return replace(file, size=self._on_urls(file.path, lambda path, url: self.api.fetcher.look(path, url)[0]))

    def _chosen(self, path: str) -> bool:
        item = self._item
        if item.files:
            return path in item.files or path in item.also
        return any(fnmatch.fnmatchcase(path, p) for p in item.allow) and not any(fnmatch.fnmatchcase(path, p) for p in item.ignore)

    def _file(self, path: str) -> str:
        return f"{self._version}/files/{quoted(*path.split('/'))}"

    # ---- bytes

    def fetch(self, shot: Snapshot, disk: Disk, progress: copy.Progress | None) -> tuple[File, ...]:
        """Brings every file into the store, verified; what is there is not fetched again; raises Mismatch, Unavailable, Denied, Unauthenticated."""
        proofs, first, sums = _Proofs(disk, shot, self._item.base_url), shot.sums, dict[str, str]()
        digests: dict[str, str] = {}
        if first and first.size > MAX_SUMS:
            raise TooLarge(f"{SUMS} has {first.size} bytes", expected=f"at most {MAX_SUMS}")
        if first:
            digests[SUMS] = self._one(first, disk, proofs, progress if any(f.path == SUMS for f in shot.files) else None, 1)
            sums = sums_of(disk.read(digests[SUMS], MAX_SUMS))
        for f in shot.files:
            if f.blake3 and sums.get(f.path, f.blake3) != f.blake3:
                raise Mismatch(f"{SUMS} gives {f.path!r} another BLAKE3 than is told elsewhere", expected=f.blake3)
        rest = [replace(f, blake3=sums.get(f.path, f.blake3)) for f in shot.files if f.path != SUMS]
        small = [f for f in rest if f.size <= PIECE]
        with ThreadPoolExecutor(4, thread_name_prefix="ngc") as pool:
            waiting = [pool.submit(self._one, f, disk, proofs, progress, 1) for f in small]
            try:
                digests |= {f.path: task.result() for f, task in zip(small, waiting, strict=True)}
            finally:
                pool.shutdown(cancel_futures=True)
        digests |= {f.path: self._one(f, disk, proofs, progress, STREAMS) for f in rest if f.size > PIECE}
        return tuple(File(f.path, digests[f.path], f.size) for f in shot.files)

    def _one(self, file: RemoteFile, disk: Disk, proofs: _Proofs, progress: copy.Progress | None, streams: int) -> str:
        told = bool(file.digest or file.blake3 or not file.size)
        mark = "" if told else self._on_urls(file.path, lambda path, url: self.api.fetcher.look(path, url)[1])
        file = replace(file, mark=mark)
        known = proofs.find(file)
        if known:
            if progress:
                progress.add(file.size)
            return known

        def check(path: Path) -> None:
            if file.blake3 and (found := _blake3(path)) != file.blake3:
                what = f"the bytes of {file.path} have the BLAKE3 {found}"
                raise Mismatch(what, expected=file.blake3, do="the upstream or the path to it is damaged; nothing was kept")

        def ranges(lo: int, hi: int) -> Iterator[bytes]:
            return self._on_urls(file.path, lambda path, url: _begun(self.api.fetcher.stream(path, lo, hi, url, file.size, mark)))

        if file.size == 0:
            digest = disk.put(b"")
        elif file.digest:
            copy.fetch(ranges, file.digest, file.size, disk, progress, streams)
            digest = file.digest
        else:
            if not told and not mark:  # nothing tells whether what an earlier run left is of the same file
                disk.partial(proofs.key(file), file.size, known=False).abort()
            digest = copy.fetch_unknown(ranges, proofs.key(file), file.size, check, disk, progress, streams)
        if file.digest not in ("", digest):
            raise Mismatch(f"{file.path} is listed as empty with another digest", expected=file.digest)
        if file.digest or not file.size:
            check(disk.path(digest))
        proofs.add(file, digest)
        return digest

    def _on_urls(self, path: str, ask: Callable[[str, str], _T]) -> _T:
        """Asks for a file by its own route, or by its signed URL, which is listed again once where it is over."""
        if self._by_file:
            return ask(self._file(path), "")
        url = self._urls.get(path) or self._renew(path, "")
        try:
            return ask(self._file(path), url)
        except (Denied, Unauthenticated, Invalid) as error:
            if error.ids.get("status") not in OVER:
                raise
        return ask(self._file(path), self._renew(path, url))

    def _renew(self, path: str, old: str) -> str:
        """The signed URL of one file, listed anew unless another thread just did."""
        with self._lock:
            if self._urls.get(path, "") != old:
                return self._urls[path]
            pairs = signed(self.api.json(f"{self._signed}?path={quoted(path)}"))
            url = pairs.get(path) or (next(iter(pairs.values())) if len(pairs) == 1 else "")
            if not url:
                raise NotFound(f"NGC gives no URL for {path[:200]!r}", expected="one in urls", do="run again", reason="entry")
            self._urls[path] = url
            return url

    def signature(self, shot: Snapshot) -> bytes:
        """The vendor's signature of the version, result.sigstore byte for byte; empty where it has none; raises as resolve does."""
        if not shot.signed:
            return b""
        url = self.api.json(f"{self._version}/signature").get("url")
        if not isinstance(url, str) or not url:
            raise Invalid(f"NGC gives no URL for the signature of {shot.source}", expected="url", reason="upstream")
        raw = self.api.fetcher.document(f"{self._version}/signature", MAX_SIGNATURE, url)
        parse_json(raw, f"the signature of {shot.source}")
        return raw


class _Proofs:
    """Which stored digest a file of a version had once it was verified by all that NGC told of it: so that a second run fetches and reads nothing."""

    def __init__(self, disk: Disk, shot: Snapshot, endpoint: str) -> None:
        self._disk, self._source, self._hints = disk, [endpoint, shot.source], Hints(disk.root / "ngc-files")

    def key(self, file: RemoteFile) -> str:
        """All that is known of a file, as one digest."""
        return digest_of(canonical_json([*self._source, file.path, file.size, file.digest, file.blake3, file.made, file.mark]))

    def find(self, file: RemoteFile) -> str:
        """The digest of a stored file that was verified; empty where there is none."""
        digest = self._hints.find(self.key(file))
        return digest if digest and self._disk.size(digest) == file.size else ""

    def add(self, file: RemoteFile, digest: str) -> None:
        """Remembers it."""
        self._hints.add(self.key(file), digest)


@dataclass(frozen=True)
class Built:
    """The manifests of a fetched version: the model's own, its derived commit id, and its referrers."""

    digest: str
    commit: str
    referrers: tuple[str, ...]


def build(shot: Snapshot, files: tuple[File, ...], signature: bytes, disk: Disk) -> Built:
    """Puts the manifests of a fetched version into the store; raises TooLarge, Invalid."""
    readme = next((f for f in files if f.path == README and f.size <= MAX_CARD), None)
    facts = facts_of(shot.source, disk.read(readme.digest, MAX_CARD) if readme else b"")
    commit = derived_commit("", files_root(files), shot.version, "")
    disk.put(EMPTY_BYTES)
    raw = build_model(files, Descriptor(FACTS_TYPE, disk.put(facts), len(facts)), {SOURCE: shot.source, COMMIT: commit})
    subject = Descriptor(MANIFEST, disk.put(raw), len(raw))
    about = [(SIGSTORE, signature), (VERSION_TYPE, shot.told)]
    made = [build_manifest(kind, [Descriptor(kind, disk.put(body), len(body)).as_json()], {}, subject) for kind, body in about if body]
    return Built(subject.digest, commit, tuple(map(disk.put, made)))


@contextlib.contextmanager
def _unless_refused(refusals: list[AirlockError]) -> Iterator[None]:
    """Notes that a listing was refused in the way for which there is another route; other errors are raised."""
    try:
        yield
    except (Invalid, Unauthenticated) as error:
        if error.ids.get("status") not in REFUSED_LISTING:
            raise
        refusals.append(error)


def _begun(parts: Iterator[bytes]) -> Iterator[bytes]:
    """The same bytes, once the first of them are here: what refuses the request is raised now."""
    first = next(parts, b"")

    def rest() -> Iterator[bytes]:
        yield first
        yield from parts

    return rest()


def _blake3(path: Path) -> str:
    state, buffer = blake3(max_threads=blake3.AUTO), memoryview(bytearray(SLICE))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            state.update(buffer[:count])
    return str(state.hexdigest())
