"""`airlock runtime create-model-store`: a profile's verified weights as a directory of their own, plain or as the Hub's cache."""

from __future__ import annotations

import argparse
import os
import secrets
import shutil
import sys
from pathlib import Path

from artifact.digest import hash_fd
from artifact.disk import Disk
from artifact.errors import Conflict, Unavailable
from artifact.manifest import COMMIT, MAX_MANIFEST_BYTES, is_commit, parse_manifest
from artifact.store import File
from runtime import console, start
from runtime.settings import Settings
from runtime.weights import ModelDir

TEXT = "write the weights of a profile into a directory that other tools read"
DIR_MODE, FILE_MODE = 0o2775, 0o664  # as a NIM and its operator expect them: group 2000 may write


def main(argv: list[str]) -> int:
    """Entry point; returns the documented exit status."""
    parser = console.parser("create-model-store", TEXT, "--model acme/tiny:1 --model-store /model-repo")
    parser.add_argument("-p", "--profile", default="", metavar="ID_OR_DESCRIPTION", help="default: the profile that would be chosen")
    parser.add_argument("-m", "--model-store", type=Path, required=True, metavar="DIR", help="the directory to make; it must be absent or empty")
    parser.add_argument("--model-repo", dest="model", metavar="URI", help="the model as ngc://… or hf://…, in the place of --model")
    parser.add_argument("--layout", choices=("plain", "hub"), default="plain", help="plain files, or what HF_HUB_CACHE holds (links inside)")
    return console.run(parser, argv, create)


def create(settings: Settings, args: argparse.Namespace) -> int:
    """Fetches what is missing, verifies, and writes; the directory appears whole. Raises Conflict where it holds something already."""
    from runtime import profiles

    top: Path = args.model_store.absolute()
    if top.is_symlink() or (top.exists() and (not top.is_dir() or any(top.iterdir()))):
        raise Conflict(f"{top} is there and not empty", expected="a directory that is absent or empty", do="name another one", reason="store")
    choice = start.choose(settings, args.profile or settings.profile, any_engine=True)
    named = args.profile or settings.profile
    profile = profiles.pinned(choice.released.profiles.profiles, named) if named else start.announce(choice, settings.expect_profile)
    made = start.workspace(choice, profile, settings)
    fresh = top.with_name(f".{top.name}.{os.getpid()}.{secrets.token_hex(4)}")
    try:
        fresh.mkdir(parents=True)
        if args.layout == "hub":
            where = _hub(fresh, Disk(settings.cache), profile.model.name, made)
        else:
            for file in made.listed:
                _put(Disk(settings.cache), file, fresh / file.path)
            where = Path()
        for folder in (fresh, *(p for p in fresh.rglob("*") if p.is_dir() and not p.is_symlink())):
            folder.chmod(DIR_MODE)
        if top.exists():
            top.rmdir()
        fresh.rename(top)
    except OSError as error:
        raise Unavailable(f"{top} cannot be made: {error.strerror}", expected="a directory that we may write", reason="cache") from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    sys.stdout.write(f"{profile.id} {made.digest} {top / where}\n")
    return 0


def _hub(top: Path, disk: Disk, name: str, made: ModelDir) -> Path:
    """Blobs, snapshots and refs of one repository, as huggingface_hub keeps them; the snapshot's path below `top`."""
    told = parse_manifest(disk.read(made.digest, MAX_MANIFEST_BYTES)).annotations.get(COMMIT, "")
    commit = told if is_commit(told) else made.digest.split(":", 1)[1][:40]
    repo = Path("models--" + name.removeprefix("hf/").replace("/", "--"))
    for file in made.listed:
        blob = top / repo / "blobs" / file.digest.split(":", 1)[1]
        if not blob.exists():
            _put(disk, file, blob)
        link = top / repo / "snapshots" / commit / file.path
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    (top / repo / "refs").mkdir()
    (top / repo / "refs" / "main").write_text(commit)
    return repo / "snapshots" / commit


def _put(disk: Disk, file: File, target: Path) -> None:
    """A copy of a verified file, hashed as it lies: another tool may write it, and the cache must not change with it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("xb") as out:
        fd = disk.open(file.digest)
        try:
            with os.fdopen(fd, "rb", closefd=False) as source:
                shutil.copyfileobj(source, out, 4 << 20)
        finally:
            os.close(fd)
        out.flush()
        os.fsync(out.fileno())
    with target.open("rb") as back:
        if hash_fd(back.fileno(), 0, file.size, file.digest.split(":", 1)[0]) != file.digest:
            raise Unavailable(f"{target} came out wrong", expected=file.digest, do="look at that disk", reason="weights")
    target.chmod(FILE_MODE)
