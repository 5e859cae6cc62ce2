"""`airlock nim export`: a profile of a mirrored NIM image as a directory from which the container starts without a network."""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

from artifact.commands.nim import add_site, open_site, size_text
from artifact.copy import Progress
from artifact.errors import Invalid
from artifact.export import GID, UID, Target, export_cache, export_directory
from artifact.presence import Models

EXAMPLE = "airlock nim export /srv/nim-cache nvcr.io/nim/meta/llama-3.1-8b-instruct:1.8.4 vllm-bf16-tp1 --registry https://registry.site"


def _owner(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([0-9]{1,9}):([0-9]{1,9})", text)
    if not match:
        raise Invalid(f"--owner {text[:40]!r} is no owner", expected="UID:GID in numbers", reason="owner")
    return int(match[1]), int(match[2])


def main(argv: list[str]) -> int:
    """Exports one profile; raises NotFound where it is not whole here, Unavailable without room, Conflict where something else is there."""
    parser = argparse.ArgumentParser(
        prog="airlock nim export",
        description="Fill a directory with one profile's files, verified: a NIM cache for a start without a network, or a plain model directory.",
        epilog=f"example: {EXAMPLE}; the key comes from AIRLOCK_KEY; exit 3: not everything is here, 9: no room or no answer (run again: it resumes)",
    )
    parser.add_argument("dir", metavar="DIR", help="for --form cache what is mounted at /opt/nim/.cache; other profiles in it stay")
    parser.add_argument("image", metavar="IMAGE", help="NAME:TAG or NAME@DIGEST, as this registry has it")
    parser.add_argument("profile", metavar="PROFILE", help="its id or its description (airlock nim profiles)")
    parser.add_argument("--form", choices=("cache", "directory"), default="cache", help="cache (default), or a plain model directory")
    parser.add_argument("--owner", default=f"{UID}:{GID}", metavar="UID:GID", help=f"owner of all that is made ({UID}:{GID}); needs root")
    parser.add_argument("--workers", type=int, default=4, choices=range(1, 65), metavar="N", help="streams of one large file (4)")
    add_site(parser)
    args = parser.parse_args(argv)
    uid, gid = _owner(args.owner)
    remote, image, found, manifest = open_site(args)
    presence = Models(remote).of(manifest.find(args.profile))
    presence.check(str(image))
    target = Target(Path(args.dir).resolve(), uid, gid)
    progress = Progress(presence.size, "export", sys.stderr)
    try:
        done = (export_cache if args.form == "cache" else export_directory)(remote, presence, target, progress, args.workers)
    finally:
        progress.close()
    facts = {"image": str(image), "digest": found.image, "profile": presence.profile.id, "description": presence.profile.description}
    facts |= {"form": args.form, "dir": args.dir}
    if args.json:
        owner = {"owner": args.owner, "owned": done.owned}
        print(json.dumps(facts | owner | {"files": done.files, "kept": done.kept, "bytes": presence.size, "fetched": done.fetched}))
        return 0
    print(f"{args.dir}: {done.files} files, {size_text(presence.size)} of profile {presence.profile.id} ({presence.profile.description})")
    if not done.owned:
        print(f"not root, so the files are yours; do: chown -hR {args.owner} {args.dir}")
    where = "mount it at /opt/nim/.cache" if args.form == "cache" else "mount it and name it by NIM_MODEL_NAME (1.x) or NIM_MODEL_PATH (2.x)"
    print(f"{where}; the rest: airlock nim env {image} {presence.profile.id} --way offline --format docker")
    return 0
