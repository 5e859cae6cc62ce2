"""The bundle on the medium: written by the mirror, read by the importer; TUF decides whether it may enter (docs/format.md section 7).

The only module that knows python-tuf. It must not follow a link, trust a size, or change a receiver's stored state before the caller says that the
content is in. Sources: TUF specification 1.0.31; adr/0003.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from securesystemslib.signer._crypto_signer import CryptoSigner
from securesystemslib.signer._key import SSlibKey
from tuf.api._payload import DelegatedRole, Delegations, MetaFile, Root, Snapshot, TargetFile, Targets, Timestamp
from tuf.api.exceptions import BadVersionNumberError, DownloadError, DownloadHTTPError, ExpiredMetadataError, RepositoryError
from tuf.api.metadata import Metadata
from tuf.api.serialization.json import JSONSerializer
from tuf.ngclient.config import UpdaterConfig
from tuf.ngclient.fetcher import FetcherInterface
from tuf.ngclient.updater import Updater

from artifact import trust
from artifact.errors import Invalid, Mismatch, NotFound, TooLarge
from artifact.manifest import canonical_json
from artifact.medium import (
    ALLOWED,
    CHUNK,
    MAX_INDEX_BYTES,
    RECEIPT,
    ROLE,
    BundleIndex,
    BundleName,
    check_objects,
    check_space,
    copy_object,
    inventory,
    load_index,
    object_path,
    replace_file,
    sync_directories,
)

MAX_LISTED = 10_000
_LIVES = {"root": 3650, "targets": 365, ROLE: 365, "snapshot": 365, "timestamp": 90}
_RENEW = timedelta(days=30)
_COMPACT = JSONSerializer(compact=True)


# ---- keys and root ----


def _signer(path: Path) -> CryptoSigner:
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), None)
    except OSError as error:
        raise NotFound(
            f"the signing key {path.name} is not here", expected=f"a key at {path}", do="bring the key back, or restore the mirror's home"
        ) from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise Invalid(f"{path.name} is no ECDSA key", expected="P-256 PEM")
    return CryptoSigner(key)


def _new_key(path: Path) -> CryptoSigner:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(fd, "wb") as out:
        out.write(trust.generate_key())
    return _signer(path)


def _key(signer: CryptoSigner) -> SSlibKey:
    key = signer.public_key
    if not isinstance(key, SSlibKey):
        raise Invalid("the signing key is of another kind", expected="P-256 PEM")
    return key


def _expires(role: str, now: float) -> datetime:
    return datetime.fromtimestamp(int(now), UTC) + timedelta(days=_LIVES[role])


def create_root(tuf_dir: Path, now: float) -> None:
    """Makes a new sender's keys, `1.root.json` and `1.targets.json`, all or nothing: three offline keys (two must sign), three online ones."""
    work = tuf_dir.with_name(f".{tuf_dir.name}.partial")
    shutil.rmtree(work, ignore_errors=True)
    offline = [_new_key(work / "offline" / f"root-{i}.pem") for i in (1, 2, 3)]
    online = {role: _new_key(work / "online" / f"{role}.pem") for role in (ROLE, "snapshot", "timestamp")}
    root = Root(version=1, expires=_expires("root", now), consistent_snapshot=True)
    for role in ("root", "targets"):
        for signer in offline:
            root.add_key(_key(signer), role)
        root.roles[role].threshold = 2
    for role in ("snapshot", "timestamp"):
        root.add_key(_key(online[role]), role)
    delegated = DelegatedRole(ROLE, [_key(online[ROLE]).keyid], 1, terminating=True, paths=[f"{ROLE}/*"])
    targets = Targets(version=1, expires=_expires("targets", now))
    targets.delegations = Delegations({_key(online[ROLE]).keyid: _key(online[ROLE])}, {ROLE: delegated})
    (work / "metadata").mkdir()
    for name, signed in (("1.root.json", Metadata(root)), ("1.targets.json", Metadata(targets))):
        for signer in offline:
            signed.sign(signer, append=True)
        replace_file(work / "metadata" / name, signed.to_bytes(_COMPACT))
    work.rename(tuf_dir)


# ---- writing ----


@dataclass(frozen=True)
class Written:
    """What a pack did: the bundle's sequence, whether anything was written, objects and bytes copied now, objects and bytes of the whole."""

    sequence: int
    changed: bool
    copied: int
    copied_bytes: int
    objects: int
    objects_bytes: int


def last_index(tuf_dir: Path) -> BundleIndex | None:
    """The newest index that this sender has signed, None before the first."""
    path = tuf_dir / "metadata" / "timestamp.json"
    if not path.exists():
        return None
    sequence = Metadata[Timestamp].from_file(str(path)).signed.version
    return load_index((tuf_dir / f"index.{sequence}.json").read_bytes())


def _sign_next(tuf_dir: Path, sender: str, sequence: int, body: dict[str, object], now: float) -> None:
    """Signs the next sequence in the sender's own directory: the timestamp is the last file, so a cut leaves the previous one in force."""
    metadata = tuf_dir / "metadata"
    raw = canonical_json({"schema": 1, "sender": sender, "sequence": sequence, "created": int(now), **body})
    if len(raw) > MAX_INDEX_BYTES:
        raise TooLarge(
            f"the bundle's index has {len(raw)} bytes", expected=f"at most {MAX_INDEX_BYTES} (about a million objects)", do="pack fewer items"
        )
    replace_file(tuf_dir / f"index.{sequence}.json", raw)
    listed: dict[str, TargetFile] = {}
    if sequence > 1:
        listed = dict(Metadata[Targets].from_file(str(metadata / f"{sequence - 1}.{ROLE}.json")).signed.targets)
    path = f"{ROLE}/{sequence}.json"
    listed[path] = TargetFile(len(raw), {"sha256": hashlib.sha256(raw).hexdigest()}, path)
    for old in sorted(listed, key=lambda p: int(p[len(ROLE) + 1 : -5]))[:-MAX_LISTED]:
        del listed[old]
    role = Metadata(Targets(version=sequence, expires=_expires(ROLE, now), targets=listed))
    role.sign(_signer(tuf_dir / "online" / f"{ROLE}.pem"))
    role_raw = role.to_bytes(_COMPACT)
    targets_raw = (metadata / "1.targets.json").read_bytes()
    meta = {"targets.json": _meta(1, targets_raw), f"{ROLE}.json": _meta(sequence, role_raw)}
    snapshot = Metadata(Snapshot(version=sequence, expires=_expires("snapshot", now), meta=meta))
    snapshot.sign(_signer(tuf_dir / "online" / "snapshot.pem"))
    snapshot_raw = snapshot.to_bytes(_COMPACT)
    stamp = Metadata(Timestamp(version=sequence, expires=_expires("timestamp", now), snapshot_meta=_meta(sequence, snapshot_raw)))
    stamp.sign(_signer(tuf_dir / "online" / "timestamp.pem"))
    replace_file(metadata / f"{sequence}.{ROLE}.json", role_raw)
    replace_file(metadata / f"{sequence}.snapshot.json", snapshot_raw)
    replace_file(metadata / "timestamp.json", stamp.to_bytes(_COMPACT))
    for file in (p for role in (ROLE, "snapshot") for p in metadata.glob(f"*.{role}.json")):
        if int(file.name.split(".", 1)[0]) < sequence:
            file.unlink()  # else the home would grow with the square of its bundles; the indexes stay, receipts speak of them


def _meta(version: int, raw: bytes) -> MetaFile:
    return MetaFile(version, len(raw), {"sha256": hashlib.sha256(raw).hexdigest()})


def _control_files(tuf_dir: Path, index: BundleIndex) -> dict[str, bytes]:
    """The small files of the newest bundle by their path on the medium, the timestamp last."""
    n = index.sequence
    names = [p.name for p in sorted((tuf_dir / "metadata").glob("*.root.json"))] + ["1.targets.json", f"{n}.{ROLE}.json", f"{n}.snapshot.json"]
    out = {f"targets/{ROLE}/{index.digest[7:]}.{n}.json": (tuf_dir / f"index.{n}.json").read_bytes()}
    out |= {f"metadata/{name}": (tuf_dir / "metadata" / name).read_bytes() for name in [*names, "timestamp.json"]}
    return out


def write_bundle(
    directory: Path,
    tuf_dir: Path,
    sender: str,
    names: tuple[BundleName, ...],
    objects: Mapping[str, int],
    upstream: tuple[dict[str, object], ...],
    source: Callable[[str], Path],
    now: float,
    progress: Callable[[int], None] = lambda n: None,
    begin: Callable[[int], None] = lambda n: None,
    documents: tuple[str, ...] = (),
) -> Written:
    """Writes the next bundle onto a medium, or completes the one begun there; a directory without the timestamp, which comes last, is unfinished.

    What is there already is not copied again. Raises Invalid (the directory holds foreign files), Unavailable (space), Mismatch (staging is damaged).
    """
    body: dict[str, object] = {
        "names": [n.as_json() for n in sorted(names, key=lambda n: (n.name, n.ref))],
        "objects": [{"digest": d, "size": objects[d]} for d in sorted(objects)],
        "upstream": list(upstream),
        "documents": list(documents),
    }
    index = last_index(tuf_dir)
    if index is None or not _says(index, body, objects) or _ends_soon(tuf_dir, now):
        _sign_next(tuf_dir, sender, index.sequence + 1 if index else 1, body, now)
        index = last_index(tuf_dir)
    if index is None:
        raise Invalid("the sender's own index cannot be read back", expected="index and timestamp of one sequence", do="restore the mirror's home")
    directory.mkdir(parents=True, exist_ok=True)
    present = inventory(directory, finished=False)
    control = _control_files(tuf_dir, index)
    wanted = {str(object_path(Path(), d)): d for d in index.objects}
    missing = {p: d for p, d in wanted.items() if present.get(p) != index.objects[d]}
    stale = [p for p in present if p not in wanted and p not in control and p != RECEIPT]
    total = sum(index.objects.values())
    if not missing and not stale and all(present.get(p) == len(raw) and (directory / p).read_bytes() == raw for p, raw in control.items()):
        return Written(index.sequence, False, 0, 0, len(wanted), total)
    (directory / "metadata" / "timestamp.json").unlink(missing_ok=True)
    need = sum(index.objects[d] for d in missing.values())
    check_space(directory, need)
    begin(need)
    for path in stale:
        (directory / path).unlink()
    for path, digest in sorted(missing.items()):
        copy_object(source(digest), directory / path, digest, index.objects[digest], progress)
    for path, raw in control.items():
        (directory / path).parent.mkdir(parents=True, exist_ok=True)
        if path.endswith("/timestamp.json"):
            sync_directories(directory)  # everything the timestamp vouches for is on the medium before it appears
        replace_file(directory / path, raw)
    sync_directories(directory)
    return Written(index.sequence, True, len(missing), need, len(wanted), total)


def _says(index: BundleIndex, body: Mapping[str, object], objects: Mapping[str, int]) -> bool:
    same_names = [n.as_json() for n in sorted(index.names, key=lambda n: (n.name, n.ref))] == body["names"]
    same_facts = [list(index.upstream), list(index.documents)] == [body["upstream"], body["documents"]]
    return same_names and same_facts and objects.items() <= index.objects.items()


def _ends_soon(tuf_dir: Path, now: float) -> bool:
    stamp = Metadata[Timestamp].from_file(str(tuf_dir / "metadata" / "timestamp.json")).signed
    return stamp.expires - _RENEW < datetime.fromtimestamp(now, UTC)


# ---- reading ----


class _Medium(FetcherInterface):
    """Serves TUF's client from the medium: plain files of allowed names only, never through a link."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.last = ""

    def _fetch(self, url: str) -> Iterator[bytes]:
        path = url.removeprefix("file:///")
        self.last = path
        if not ALLOWED.match(path):
            raise DownloadHTTPError(f"{path} is no name of a bundle", 404)
        try:
            fd = os.open(self.directory / path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            raise DownloadHTTPError(f"{path} is absent", 404) from error
        with os.fdopen(fd, "rb") as source:
            while chunk := source.read(CHUNK):
                yield chunk


class _Judge:
    """One run of TUF's client over a medium in a scratch state, at a given time."""

    def __init__(self, directory: Path, scratch: Path, root: bytes, now: float) -> None:
        self.medium = _Medium(directory)
        self.scratch = scratch
        config = UpdaterConfig(targets_max_length=8 * 1024 * 1024)
        with self.named():
            self.updater = Updater(
                str(scratch), "file:///metadata/", str(scratch / "targets"), "file:///targets/", fetcher=self.medium, config=config, bootstrap=root
            )
        self.updater._trusted_set.reference_time = datetime.fromtimestamp(now, UTC)  # the clock is an argument; python-tuf is pinned for this line

    @contextlib.contextmanager
    def named(self) -> Iterator[None]:
        """Turns TUF's refusals into ours, naming the file that was read last."""
        try:
            yield
        except ExpiredMetadataError as error:
            raise Invalid(
                f"the bundle has expired: {error}", expected="metadata that is valid now", do="pack it again on the mirror", reason="bundle_expired"
            ) from error
        except DownloadHTTPError as error:
            raise Mismatch(f"the bundle lacks {self.medium.last}", do="copy it again from the mirror", reason="bundle_incomplete") from error
        except (RepositoryError, DownloadError, ValueError) as error:
            raise Mismatch(
                f"{self.medium.last or '1.root.json'} is refused: {error}", expected="the file as the pinned sender signed it", reason="bundle_trust"
            ) from error

    def target(self, path: str) -> TargetFile:
        """Verifies all metadata down to the target's entry; raises Mismatch, Invalid."""
        with self.named():
            found = self.updater.get_targetinfo(path)
        if found is None:
            raise Mismatch(f"no role lists {path}", expected="the index of this bundle", reason="bundle_trust")
        return found

    def version(self, name: str) -> int:
        """The version of verified metadata in the scratch state."""
        return int(Metadata.from_file(str(self.scratch / f"{name}.json")).signed.version)


def open_bundle(directory: Path, state_dir: Path, root: bytes, now: float) -> BundleIndex:
    """The verified index of a bundle, nothing of it stored yet; `commit()` of the result moves the receiver's TUF state.

    Steps: 1 every file on the medium has a name of the format and is a plain file; 2 `1.root.json` is the pinned one, byte for byte;
    3 TUF over the medium alone, under the newest root that this receiver holds; 4 TUF over the receiver's state: versions never go back,
    else the bundle is `older`; 5 no file that no list names; 6 the index, its sender and sequence; 7 each object's size.
    Raises Invalid, Mismatch, NotFound (TUF specification section 5).
    """
    if not directory.is_dir():
        raise NotFound(f"{directory} is no directory", expected="a bundle directory", do="check the path and that the medium is mounted")
    present = inventory(directory)
    if "metadata/timestamp.json" not in present or "metadata/1.root.json" not in present:
        raise Invalid(
            f"{directory} holds no finished bundle",
            expected="metadata/timestamp.json and metadata/1.root.json",
            do="run airlock bundle pack again",
            reason="unfinished",
        )
    if present["metadata/1.root.json"] != len(root) or (directory / "metadata" / "1.root.json").read_bytes() != root:
        raise Mismatch("metadata/1.root.json is not the root that is pinned here", expected="a bundle of the pinned sender", reason="bundle_trust")
    indexes = [p for p in present if p.startswith("targets/")]
    if len(indexes) != 1:
        raise Invalid(f"the bundle holds {len(indexes)} indexes", expected="exactly one", do="copy it again from the mirror", reason="unfinished")
    sequence = int(indexes[0].rsplit(".", 2)[1])
    alone = _scratch(state_dir, "alone", roots_only=True)
    judge = _Judge(directory, alone, root, now)
    entry = judge.target(f"{ROLE}/{sequence}.json")
    older, known, state = _against_state(directory, state_dir, root, now, entry)
    _check_listed(directory, present, judge, sequence, indexes[0])
    with judge.named():
        index_file = judge.updater.download_target(entry, str(alone / "index.json"))
    index = load_index(Path(index_file).read_bytes())
    sender = hashlib.sha256(root).hexdigest()[:16]
    if index.sequence != sequence or index.sender != sender:
        raise Mismatch("the index is of another sender or sequence", expected=f"sender {sender}, sequence {sequence}", reason="bundle_trust")
    check_objects(present, index)
    listed = Metadata[Targets].from_file(str(alone / f"{ROLE}.json")).signed.targets
    numbers = tuple(sorted(int(p[len(ROLE) + 1 : -5]) for p in listed))
    return replace(index, older=older, known=known, listed=numbers, scratch=state or alone, state=state_dir)


def _scratch(state_dir: Path, name: str, roots_only: bool) -> Path:
    """A fresh copy of the receiver's state; the caller holds the import lock, so a fixed name is enough and a killed run leaves no litter."""
    scratch = state_dir.with_name(f".{state_dir.name}.{name}")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True, mode=0o700)
    if (state_dir / "root_history").is_dir():
        shutil.copytree(state_dir / "root_history", scratch / "root_history")
    for path in () if roots_only or not state_dir.is_dir() else state_dir.glob("*.json"):
        shutil.copy(path, scratch / path.name)
    return scratch


def forget_scratch(state_dir: Path) -> None:
    """Removes what open_bundle left beside a receiver's state; after commit() or a refusal."""
    for path in state_dir.parent.glob(f".{state_dir.name}.*"):
        shutil.rmtree(path, ignore_errors=True)


def _against_state(directory: Path, state_dir: Path, root: bytes, now: float, entry: TargetFile) -> tuple[bool, bool, Path | None]:
    """Whether the bundle is older than the state, or known to it, and the state that follows; raises Mismatch for two bundles of one number."""
    if not (state_dir / "timestamp.json").exists():
        return False, False, None
    scratch = _scratch(state_dir, "next", roots_only=False)
    stored = int(Metadata.from_file(str(state_dir / "snapshot.json")).signed.version)
    judge = _Judge(directory, scratch, root, now)
    try:
        judge.updater.refresh()
    except BadVersionNumberError:
        return True, False, None  # the medium was proven consistent by itself: only its age is at fault
    except (RepositoryError, DownloadError):
        with judge.named():
            raise
    known = judge.target(entry.path)
    if known.hashes != entry.hashes:
        raise Mismatch(
            "another bundle of this number was imported before",
            expected="one bundle for each number",
            do="ask the sender: its keys may be in two hands",
            reason="bundle_fork",
        )
    return False, stored == judge.version("snapshot"), scratch


def _check_listed(directory: Path, present: Mapping[str, int], judge: _Judge, sequence: int, index: str) -> None:
    """Every control file on the medium is one that TUF has read, in the exact form that the sender wrote."""
    newest = judge.version("root")
    expected = {f"metadata/{v}.root.json" for v in range(1, newest + 1)} | {"metadata/timestamp.json", index}
    expected |= {f"metadata/{judge.version(role)}.{role}.json" for role in ("snapshot", "targets", ROLE)}
    foreign = sorted(p for p in present if not p.startswith("blobs/") and p not in expected and p != RECEIPT)
    absent = sorted(p for p in expected if p not in present)
    if foreign or absent or judge.version("snapshot") != sequence:
        what = (
            f"{foreign[0]} is named by no list"
            if foreign
            else f"the bundle lacks {absent[0]}"
            if absent
            else f"{index} is not of the snapshot's sequence"
        )
        raise Mismatch(what, expected="exactly the files of one bundle", do="copy it again from the mirror", reason="bundle_incomplete")
    for v in range(1, newest + 1):
        if (directory / f"metadata/{v}.root.json").read_bytes() != (judge.scratch / "root_history" / f"{v}.root.json").read_bytes():
            raise Mismatch(f"metadata/{v}.root.json is not the root that was trusted before", expected="the sender's roots", reason="bundle_trust")
    stamp = (directory / "metadata" / "timestamp.json").read_bytes()
    if Metadata.from_bytes(stamp).to_bytes(_COMPACT) != stamp or any(
        s.signature != s.signature.lower() for s in Metadata.from_bytes(stamp).signatures.values()
    ):
        raise Mismatch(
            "metadata/timestamp.json was altered outside what is signed", expected="the file as the sender wrote it", reason="bundle_trust"
        )
