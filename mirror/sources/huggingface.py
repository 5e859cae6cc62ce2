"""The Hugging Face Hub as a source: huggingface_hub for metadata only, own ranged GETs for bytes, and the model manifest of D1 from both.

The manifest is a pure function of repository, commit and chosen files: what the Hub may change without a commit (tags, counters, gates) never enters
it. Nothing the Hub says is believed beyond its own origin; every byte is checked against the listing before it gets a name.
"""

from __future__ import annotations

import fnmatch
import hashlib
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar
from urllib.parse import quote

import httpx2
from huggingface_hub import HfApi, RepoFile, set_client_factory
from huggingface_hub.errors import HfHubHTTPError

from artifact import copy
from artifact.card import README, facts_of
from artifact.disk import Disk
from artifact.errors import Denied, Invalid, Mismatch, NotFound, TooLarge, Unavailable
from artifact.manifest import COMMIT, EMPTY_BYTES, FACTS_TYPE, MAX_FILES, SOURCE, build_model, check_path, is_commit, is_digest
from artifact.store import Descriptor, File
from mirror.hints import Hints
from mirror.plan import Item
from mirror.web import Fetcher, origin, refusal

_T = TypeVar("_T")
MAX_METADATA = 64 * 1024 * 1024
MAX_NODES = 200_000
MAX_PLAIN = 64 * 1024 * 1024  # the Hub stores nothing above 10 MiB outside LFS
METADATA_SECONDS = 120.0


@dataclass(frozen=True)
class RemoteFile:
    """One file of the listing: its digest if it is LFS, else the git object id that its bytes must have."""

    path: str
    size: int
    digest: str = ""
    git_oid: str = ""


@dataclass(frozen=True)
class Snapshot:
    """A repository pinned to a commit: canonical id, chosen files, and the facts an entitlement audit needs."""

    repo_id: str
    commit: str
    files: tuple[RemoteFile, ...]
    license: str = ""
    gated: bool = False
    private: bool = False
    tags: tuple[str, ...] = field(default_factory=tuple)


class _Bounded(httpx2.BaseTransport):
    """Metadata requests stay on one origin, uncompressed, within bytes and time: a page link elsewhere would carry the key along."""

    def __init__(self, endpoint: str, ca_file: str) -> None:
        self._origin = origin(endpoint)
        self._inner = httpx2.HTTPTransport(verify=ca_file or True)

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        if origin(str(request.url)) != self._origin:
            raise Denied("the Hub sends metadata requests to another host", expected="answers from the endpoint itself", reason="redirect")
        request.headers["Accept-Encoding"] = "identity"
        started, body = time.monotonic(), bytearray()
        response = self._inner.handle_request(request)
        try:
            if response.headers.get("Content-Encoding", "identity").lower() != "identity":
                raise Mismatch("the Hub's metadata came compressed, though identity was asked for", expected="plain JSON", reason="encoding")
            for block in response.stream:  # type: ignore[union-attr]
                body += block
                if len(body) > MAX_METADATA:
                    raise TooLarge(f"the Hub's metadata is longer than {MAX_METADATA} bytes", expected=f"at most {MAX_METADATA}")
                if time.monotonic() - started > METADATA_SECONDS:
                    raise Unavailable(f"the Hub's metadata took more than {METADATA_SECONDS:.0f} s", do="run again later")
        finally:
            response.close()
        return httpx2.Response(response.status_code, headers=response.headers, content=bytes(body), request=request)

    def close(self) -> None:
        self._inner.close()


class HubSource:
    """One Hub endpoint with one key."""

    def __init__(self, endpoint: str, key: str = "", ca_file: str = "") -> None:
        self.endpoint = endpoint
        self._key = key
        self._ca_file = ca_file
        # False, not None: without a key of the plan, no token that lies about on this machine is sent.
        self._api = HfApi(endpoint=endpoint, token=key or False)
        self.fetcher = Fetcher(endpoint, key, ca_file)

    def who(self) -> tuple[str, str]:
        """The user whom the key belongs to and the key's role, by the Hub's whoami-v2; empty without a key; raises as resolve does."""
        if not self._key:
            return "", ""
        found: object = self._ask("the key's user", self._api.whoami)
        name = found.get("name") if isinstance(found, Mapping) else None
        auth = found.get("auth") if isinstance(found, Mapping) else None
        token = auth.get("accessToken") if isinstance(auth, Mapping) else None
        role = token.get("role") if isinstance(token, Mapping) else None
        return self._word(name), self._word(role)

    def _word(self, value: object) -> str:
        """A word of the Hub's as a record may hold it: short, printable and nothing with the key in it."""
        return value[:100] if isinstance(value, str) and value.isprintable() and self._key not in value else ""

    def admitted(self, snapshot: Snapshot) -> str:
        """How a gated repository showed that it admits this key's user; raises Denied `gated`, Unauthenticated, Unavailable."""
        what = f"{snapshot.repo_id}@{snapshot.commit}"
        try:
            self._ask(what, lambda: self._api.auth_check(snapshot.repo_id))
        except NotFound:  # a Hub without that route: asking for a file's head is refused in the same way
            path = snapshot.files[0].path
            self._ask(what, lambda: self._api.file_exists(snapshot.repo_id, path, revision=snapshot.commit))
            return "admitted by HEAD"
        return "admitted by auth-check"

    def resolve(self, item: Item) -> Snapshot:
        """Pins the wanted revision and lists the chosen files; raises NotFound, Denied, Unauthenticated, Invalid, TooLarge, Unavailable."""
        what = f"{item.repository}@{item.wanted}"
        info = self._ask(what, lambda: self._api.model_info(item.repository, revision=item.wanted, timeout=30))
        commit = info.sha
        if not isinstance(commit, str) or not is_commit(commit) or (is_commit(item.wanted) and commit != item.wanted):
            raise Mismatch(f"the Hub names another or no commit for {what}", expected="the 40-hex commit that was asked for")
        same = isinstance(info.id, str) and info.id.isascii() and info.id.casefold() == item.repository.casefold()
        shown = info.id if same else item.repository
        files = self._ask(what, lambda: tuple(self._listing(item, commit)))
        absent = sorted(set(item.files) - {f.path for f in files})
        if absent:
            raise NotFound(f"{what} has no file {absent[0]!r}", expected="the files that the image's profiles name", reason="entry")
        if len(files) > MAX_FILES:
            raise TooLarge(f"{len(files)} files of {what} are chosen", expected=f"at most {MAX_FILES} files", do="see allow and ignore of the item")
        if not files:
            raise Invalid(
                f"no file of {what} is chosen",
                expected="patterns in allow that match something",
                do="see allow and ignore of the item",
                reason="plan",
            )
        card: dict[str, object] = info.card_data.to_dict() if info.card_data else {}  # type: ignore[no-untyped-call]
        tags = tuple(t for t in (info.tags or []) if isinstance(t, str))
        named = card.get("license") or next((t.removeprefix("license:") for t in tags if t.startswith("license:")), "")
        license_ = "".join(c for c in str(named or "") if c.isprintable())[:200]
        return Snapshot(shown, commit, files, license_, bool(info.gated), bool(info.private), tags[:1000])

    def _listing(self, item: Item, commit: str) -> Iterator[RemoteFile]:
        seen: set[str] = set()
        for count, node in enumerate(self._api.list_repo_tree(item.repository, recursive=True, revision=commit)):
            if count >= MAX_NODES:
                raise TooLarge(f"the listing of {item.repository} has more than {MAX_NODES} entries", expected=f"at most {MAX_NODES}")
            if not isinstance(node, RepoFile):
                continue
            # Checked before the patterns: a name that is hostile says enough about the rest.
            path = check_path(node.path)
            if path.casefold() in seen:
                raise Invalid(f"two files are named {path!r} but for letter case", expected="names that differ on every file system", reason="path")
            seen.add(path.casefold())
            if not (path in (*item.files, *item.also) if item.files else _chosen(path, item)):
                continue
            yield _remote_file(path, node)
            if len(seen) > MAX_FILES * 10:
                raise TooLarge(f"{item.repository} has too many files", expected=f"at most {MAX_FILES} chosen ones")

    def fetch(self, snapshot: Snapshot, disk: Disk, progress: copy.Progress | None) -> tuple[File, ...]:
        """Brings every file into the store, verified; what is there is not fetched again; raises Mismatch, Unavailable."""
        oids = _Oids(disk)
        plain = [f for f in snapshot.files if not f.digest]
        with ThreadPoolExecutor(4) as pool:
            digests = dict(zip((f.path for f in plain), pool.map(lambda f: self._plain(snapshot, f, disk, oids, progress), plain), strict=True))
        for file in snapshot.files:
            if file.digest:
                self._lfs(snapshot, file, disk, progress)
        return tuple(File(f.path, f.digest or digests[f.path], f.size, bool(f.digest), f.git_oid) for f in snapshot.files)

    def _lfs(self, snapshot: Snapshot, file: RemoteFile, disk: Disk, progress: copy.Progress | None) -> None:
        path = _resolve_path(snapshot, file)
        if file.size == 0:
            if disk.put(b"") != file.digest:
                raise Mismatch(f"{file.path} is listed as empty with another digest", expected=file.digest)
            return
        copy.fetch(lambda lo, hi: self.fetcher.stream(path, lo, hi), file.digest, file.size, disk, progress)

    def _plain(self, snapshot: Snapshot, file: RemoteFile, disk: Disk, oids: _Oids, progress: copy.Progress | None) -> str:
        known = oids.find(file)
        if known:
            if progress:
                progress.add(file.size)
            return known
        raw = self._whole(_resolve_path(snapshot, file), file.size)
        found = git_oid(raw)
        if found != file.git_oid:
            raise Mismatch(
                f"the bytes of {file.path} have the git object id {found}",
                expected=file.git_oid,
                do="the upstream or the path to it is damaged; nothing was kept",
            )
        digest = disk.put(raw)
        oids.add(file.git_oid, digest)
        if progress:
            progress.add(len(raw))
        return digest

    def _whole(self, path: str, size: int) -> bytes:
        for pause in (0.5, 1.0, 2.0):
            try:
                return self.fetcher.whole(path, size)
            except Unavailable:
                time.sleep(pause)  # a small file is asked for again from its start
        return self.fetcher.whole(path, size)

    def _ask(self, what: str, question: Callable[[], _T]) -> _T:
        set_client_factory(
            lambda: httpx2.Client(transport=_Bounded(self.endpoint, self._ca_file), follow_redirects=True, timeout=30, trust_env=False)
        )
        try:
            return question()
        except HfHubHTTPError as error:
            raise refusal(error.response.status_code, error.response.headers.get("X-Error-Code", ""), what) from error
        except httpx2.HTTPError as error:
            raise Unavailable(
                f"the Hub at {self.endpoint} does not answer: {type(error).__name__}", do="check endpoint and network, then run again"
            ) from error
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise Invalid(
                f"the Hub's answer about {what} cannot be read: {type(error).__name__}", expected="the Hub's documented JSON", reason="upstream"
            ) from error


class _Oids:
    """Which stored digest has which git object id: a hint that is proven again at each use, so that a second run fetches nothing."""

    def __init__(self, disk: Disk) -> None:
        self._disk, self._hints = disk, Hints(disk.root / "git-oids")

    def find(self, file: RemoteFile) -> str:
        """The digest of a stored file with this git object id, empty when there is none."""
        digest = self._hints.find(file.git_oid)
        if not digest or self._disk.size(digest) != file.size:
            return ""
        try:
            return digest if git_oid(self._disk.read(digest, MAX_PLAIN)) == file.git_oid else ""
        except Mismatch:
            self._disk.delete(digest)  # it rotted: fetch it again
            return ""

    def add(self, oid: str, digest: str) -> None:
        """Remembers a pair."""
        self._hints.add(oid, digest)


def build(snapshot: Snapshot, files: tuple[File, ...], disk: Disk) -> bytes:
    """The model manifest of a fetched snapshot, a pure function of repository, commit and files (D1, D2); its parts are put into the store."""
    facts = disk_facts(snapshot, files, disk)
    disk.put(EMPTY_BYTES)
    source = f"hf://{snapshot.repo_id}"
    descriptor = Descriptor(FACTS_TYPE, disk.put(facts), len(facts))
    raw = build_model(files, descriptor, {SOURCE: source, COMMIT: snapshot.commit})
    disk.put(raw)
    return raw


def disk_facts(snapshot: Snapshot, files: tuple[File, ...], disk: Disk) -> bytes:
    """The facts layer: source, and licence, card and tags as the card of this very commit states them."""
    readme = next((f for f in files if f.path == README and f.size <= MAX_PLAIN), None)
    return facts_of(f"hf://{snapshot.repo_id}", disk.read(readme.digest, MAX_PLAIN) if readme else b"")


def _remote_file(path: str, node: RepoFile) -> RemoteFile:
    if type(node.size) is not int or node.size < 0:
        raise Invalid(f"the listing gives no size for {path!r}", expected="whole bytes", reason="upstream")
    if node.lfs:
        digest = f"sha256:{node.lfs.sha256}"
        if not is_digest(digest) or node.lfs.size != node.size:
            raise Invalid(f"the listing gives no proper digest and size for {path!r}", expected="64 hex digits and one size", reason="upstream")
        return RemoteFile(path, node.size, digest)
    if not isinstance(node.blob_id, str) or not is_commit(node.blob_id):
        raise Invalid(f"the listing gives no git object id for {path!r}", expected="40 hex digits", reason="upstream")
    if node.size > MAX_PLAIN:
        raise TooLarge(f"{path!r} has {node.size} bytes outside LFS", expected=f"at most {MAX_PLAIN}")
    return RemoteFile(path, node.size, "", node.blob_id)


def _chosen(path: str, item: Item) -> bool:
    return any(fnmatch.fnmatchcase(path, p) for p in item.allow) and not any(fnmatch.fnmatchcase(path, p) for p in item.ignore)


def _resolve_path(snapshot: Snapshot, file: RemoteFile) -> str:
    return f"/{quote(snapshot.repo_id)}/resolve/{snapshot.commit}/{quote(file.path)}"


def git_oid(raw: bytes) -> str:
    """The git object id of a blob: sha1 over `blob <length>\\0` and the bytes."""
    return hashlib.sha1(b"blob %d\0" % len(raw) + raw, usedforsecurity=False).hexdigest()
