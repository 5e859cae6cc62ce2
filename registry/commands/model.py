"""`airlock model push`: a directory of weights becomes one model revision at a registry, one layer per file, with its profile manifest beside it.

It speaks HTTP only, so that it works against any side of the gap. Must not: follow a symlink out of the directory, or change a byte of a file.
"""

from __future__ import annotations

import argparse
import json
import os
import stat
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import yaml

from artifact import model_dir, profile
from artifact.card import hub_warnings
from artifact.copy import Progress
from artifact.digest import hash_fd
from artifact.errors import Invalid, Mismatch, NotFound, TooLarge, Unauthenticated
from artifact.manifest import (
    COMMIT,
    EMPTY_BYTES,
    FACTS_TYPE,
    MANIFEST,
    MAX_FILES,
    PROFILES_TYPE,
    SOURCE,
    build_manifest,
    build_model,
    canonical_json,
    check_path,
    content_kind,
    derived_commit,
    digest_of,
    files_root,
    is_digest,
    is_tag,
    parse_reference,
)
from artifact.push import push_blob
from artifact.remote import NOBODY_CALL, RemoteRegistry
from artifact.store import Descriptor, File

WEIGHT = "application/vnd.cncf.model.weight.v1.raw"
PARALLEL = 3
SKIPPED = (".git", ".cache/huggingface")
PROFILES_BYTES = 1024 * 1024
# besides its own, PyYAML lets through what int(), datetime() and a failed match raise on values such as 2001-13-45, 6,000 digits or `!!timestamp x`
_YAML_FAILURES = (yaml.YAMLError, RecursionError, ValueError, OverflowError, AttributeError, LookupError)
EXAMPLE = """\
example:
  AIRLOCK_KEY=nvapi-… airlock model push ./tiny acme/tiny:1 --registry http://127.0.0.1:5000 --profiles tiny.profiles.yaml

The key needs the action push on NAME. Run again, it transfers nothing; after an interruption it goes on where the registry stands.
exit codes: 0 pushed or already there, 2 usage, 3 no such file or name, 4 denied, 5 no valid key, 6 a name or file is refused,
7 a file changed meanwhile, 9 no answer, 11 a limit, 130 interrupted"""


@dataclass(frozen=True)
class Source:
    """One file to push."""

    path: str
    local: Path
    size: int


def main(argv: list[str]) -> int:
    """`airlock model push DIR NAME:VERSION`; raises what artifact.errors lists, as exit statuses."""
    parser = argparse.ArgumentParser(prog="airlock model", epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="push")
    push = commands.add_parser(
        "push", help="push a directory as a model", description=main.__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    push.add_argument("dir", type=Path, metavar="DIR", help="directory with the model's files")
    push.add_argument("reference", metavar="NAME:VERSION", help="for example acme/tiny:1")
    push.add_argument("--registry", default=os.environ.get("AIRLOCK_REGISTRY", ""), metavar="URL", help="default: AIRLOCK_REGISTRY")
    push.add_argument(
        "--profiles", type=Path, metavar="FILE", help="YAML or JSON: profiles: [{tags, options?, id?, image?, memory?, quantization?, expected?}, …]"
    )
    push.add_argument(
        "--ca-file", metavar="FILE", default=os.environ.get("AIRLOCK_CA_FILE"), help="CA of the registry's certificate (AIRLOCK_CA_FILE)"
    )
    push.add_argument("--json", action="store_true", help="one JSON object on stdout")
    args = parser.parse_args(argv)
    if not args.registry:
        push.error("--registry or AIRLOCK_REGISTRY is needed")
    reference = parse_reference(args.reference, "")
    if is_digest(reference.ref) or not is_tag(reference.ref):
        raise Invalid(f"{args.reference!r} names no version", expected="NAME:VERSION, the version in the OCI tag grammar", reason="ref")
    if reference.name.endswith("/profiles"):
        raise Invalid("the last segment 'profiles' is reserved", expected="the model's own name", reason="name")
    key = os.environ.get("AIRLOCK_KEY", "")
    if not key.isascii() or not key.isprintable():
        raise Unauthenticated("AIRLOCK_KEY holds characters that no key has", expected="the key as it was printed", do="set AIRLOCK_KEY again")
    wanted = _wanted(args.profiles) if args.profiles else []
    remote = RemoteRegistry(args.registry, key, ca_file=args.ca_file)
    begun = time.monotonic()
    report = _Push(remote, reference.name, reference.ref, sys.stderr.isatty()).run(args.dir, wanted)
    report["seconds"] = round(time.monotonic() - begun, 3)
    if args.json:
        print(json.dumps(report))
    else:
        verb = "pushed" if report["sent_bytes"] or report["changed"] else "already there:"
        print(f"{verb} {reference} {report['digest']} ({report['files']} files, {report['bytes']} bytes, {report['sent_bytes']} sent)")
        if report["profiles_digest"]:
            print(f"profiles {reference.name}/profiles:{reference.ref} {report['profiles_digest']}")
    return 0


def _wanted(path: Path) -> list[dict[str, object]]:
    """The author's list of profiles; raises Invalid, NotFound, TooLarge."""
    try:
        raw = path.read_bytes()
        doc = yaml.safe_load(raw.decode("utf-8")) if len(raw) <= PROFILES_BYTES else None
    except OSError as error:
        raise NotFound(f"{path} cannot be read: {error.strerror}", expected="a file with profiles") from error
    except _YAML_FAILURES as error:
        raise Invalid(f"{path} is neither YAML nor JSON: {' '.join(str(error).split())[:200]}", expected="profiles: [{tags: …}]") from error
    if len(raw) > PROFILES_BYTES:
        raise TooLarge(f"{path} has {len(raw)} bytes", expected=f"at most {PROFILES_BYTES}")
    items = doc.get("profiles") if isinstance(doc, dict) else None
    if not isinstance(items, list) or not items or not all(isinstance(i, dict) for i in items):
        raise Invalid(f"{path} holds no list of profiles", expected="profiles: [{tags: {llm_engine: vllm, …}}, …]")
    return items


def walk(top: Path) -> list[Source]:
    """The files of a model directory with their paths; raises Invalid for links that leave it, special files and hostile names, TooLarge."""
    if not top.is_dir():
        raise NotFound(f"{top} is not a directory", expected="the model's directory")
    found: list[Source] = []
    for source in _walk(top.resolve(), top, ""):
        found.append(source)
        if len(found) > MAX_FILES:
            raise TooLarge(f"{top} has more than {MAX_FILES} files", expected=f"at most {MAX_FILES}", reason="files")
    if not found:
        raise Invalid(f"{top} holds no file", expected="at least one file")
    return found


def _walk(real: Path, folder: Path, prefix: str) -> Iterator[Source]:
    try:
        entries = sorted(os.scandir(folder), key=lambda e: os.fsencode(e.name))
    except OSError as error:
        raise Invalid(f"{prefix or folder} cannot be read: {error.strerror}", expected="a readable directory") from error
    for entry in entries:
        name = prefix + entry.name
        if name in SKIPPED:
            continue
        local = Path(entry.path)
        check_path(name)
        if entry.is_dir(follow_symlinks=False):
            yield from _walk(real, local, name + "/")
            continue
        if entry.is_symlink() and not local.resolve().is_relative_to(real):
            raise Invalid(
                f"{name} is a link that leaves the directory", expected="files, or links inside it", do="copy with cp -rL first", reason="link"
            )
        try:
            info = local.stat()
        except OSError as error:
            raise Invalid(f"{name} cannot be read: {error.strerror}", expected="a readable file", reason="link") from error
        if not stat.S_ISREG(info.st_mode):
            raise Invalid(f"{name} is no plain file", expected="files only", do="remove it, or copy with cp -rL first", reason="link")
        yield Source(name, local, info.st_size)


class _Push:
    """One push: hash, transfer, manifest, profiles; every step may be repeated."""

    def __init__(self, remote: RemoteRegistry, name: str, version: str, show: bool) -> None:
        self._remote, self._name, self._version = remote, name, version
        self._stream = sys.stderr if show else None
        base = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")  # noqa: PTH111 - Path.home() raises where there is no home
        self._state = Path(base) / "airlock" / "push"
        self._stop = threading.Event()

    def run(self, top: Path, wanted: list[dict[str, object]]) -> dict[str, object]:
        """Pushes and returns the report."""
        sources = walk(top)
        warnings = hub_warnings(File(source.path, "", source.size) for source in sources)
        for words in warnings:
            print(f"warning: {words}", file=sys.stderr, flush=True)
        files = self._hash(sources)
        facts = canonical_json({"schema": 1, "source": f"push://{self._name}"})
        notes = {SOURCE: f"push://{self._name}", COMMIT: derived_commit("", files_root(files), "", "")}
        raw = build_model(files, Descriptor(FACTS_TYPE, digest_of(facts), len(facts)), notes)
        digest = digest_of(raw)
        weights = sum(f.size for f in files if content_kind(f.path) == WEIGHT)
        wanted, untold = model_dir.with_facts(wanted, {s.path: s.local for s in sources if "/" not in s.path}, str(top))
        if untold:
            print(f"warning: {untold}", file=sys.stderr, flush=True)
        document = profile.build(self._name, digest, wanted, weights) if wanted else b""  # a mistake in it shows before bytes move
        sent = self._transfer(sources, files) if self._at(self._name) != digest else 0
        changed = self._manifest(self._name, raw, [facts, EMPTY_BYTES])
        profiles_digest = ""
        if document:
            layer = Descriptor(PROFILES_TYPE, digest_of(document), len(document))
            manifest = build_manifest(PROFILES_TYPE, [layer.as_json()], {})
            changed = self._manifest(f"{self._name}/profiles", manifest, [document, EMPTY_BYTES]) or changed
            profiles_digest = digest_of(manifest)
        return {
            "name": self._name,
            "version": self._version,
            "digest": digest,
            "commit": notes[COMMIT],
            "profiles_digest": profiles_digest,
            "files": len(files),
            "bytes": sum(f.size for f in files),
            "sent_bytes": sent,
            "changed": changed,
            "warnings": warnings,
        }

    def _hash(self, sources: list[Source]) -> list[File]:
        progress = Progress(sum(s.size for s in sources), "hashing", self._stream)

        def one(source: Source) -> File:
            try:
                fd = os.open(source.local, os.O_RDONLY | os.O_CLOEXEC)
            except OSError as error:
                raise Invalid(f"{source.path} cannot be read: {error.strerror}", expected="a readable file") from error
            try:
                if os.fstat(fd).st_size != source.size:
                    raise Mismatch(f"{source.path} changes while it is read", expected=f"{source.size} bytes", do="push when nothing writes to it")
                digest = hash_fd(fd, 0, source.size)
            finally:
                os.close(fd)
            progress.add(source.size)
            return File(source.path, digest, source.size, content_kind(source.path) == WEIGHT)

        with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
            files = list(pool.map(one, sources))
        progress.close()
        return files

    def _transfer(self, sources: list[Source], files: list[File]) -> int:
        """Every distinct blob once, a few side by side; returns the bytes sent."""
        local = {f.digest: (s.local, f.size) for s, f in zip(sources, files, strict=True)}
        progress = Progress(sum(size for _, size in local.values()), "pushing", self._stream)
        with ThreadPoolExecutor(max_workers=PARALLEL) as pool:
            tasks = [
                pool.submit(push_blob, self._remote, self._name, path, d, size, self._state, progress, self._stop)
                for d, (path, size) in local.items()
            ]
            try:
                sent = sum(task.result() for task in tasks)
            except BaseException:  # Ctrl-C or the first failure ends the others too
                self._stop.set()
                raise
            finally:
                pool.shutdown(cancel_futures=True)
        progress.close()
        return sent

    def _at(self, repo: str) -> str:
        """The digest that the version names now, empty when it names none."""
        try:
            return self._remote.resolve(NOBODY_CALL, repo, self._version).digest
        except NotFound:
            return ""

    def _manifest(self, repo: str, raw: bytes, documents: list[bytes]) -> bool:
        """Pushes a manifest after its small blobs; False when the version names it already."""
        if self._at(repo) == digest_of(raw):
            return False
        for document in documents:
            digest = digest_of(document)
            if self._remote.blob_size(repo, digest) is None:
                self._remote.upload(NOBODY_CALL, repo).commit(digest, len(document), document)
        self._remote.push(NOBODY_CALL, repo, raw, MANIFEST, refs=(self._version,))
        return True
