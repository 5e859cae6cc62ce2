"""`airlock runtime cache`: list, verify or evict the models of the cache; no registry is asked."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

from artifact.copy import Progress
from artifact.disk import Disk
from artifact.errors import Invalid, Mismatch, Unavailable
from artifact.grant import date
from runtime import cache as place
from runtime import console
from runtime.mounts import size
from runtime.settings import Settings

TEXT = "what the cache holds, whether its bytes are right, and what may go"
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def main(argv: list[str]) -> int:
    """Entry point; returns the documented exit status."""
    parser = console.parser("cache", TEXT, "evict --keep-bytes 500G")
    parser.add_argument("what", choices=("list", "verify", "evict"), help="list models; hash every byte again; remove the longest unused")
    parser.add_argument("--keep-bytes", metavar="BYTES", help="evict until the cache holds no more than this (K, M, G, T)")
    parser.add_argument("--free-bytes", metavar="BYTES", help="evict until so much is free on its file system")
    parser.add_argument("--dry-run", action="store_true", help="evict: only say what would go")
    parser.add_argument("--repair", action="store_true", help="verify: remove what is damaged; the next start fetches it again")
    return console.run(parser, argv, run, named=False)


def run(settings: Settings, args: argparse.Namespace) -> int:
    """One of the three; raises Mismatch (reason weights) where verify found damage, Unavailable (disk_full) where evict could not give enough."""
    if not settings.cache.is_dir():
        raise Unavailable(f"{settings.cache} is no directory, or not there", expected="a cache", do="set NIM_CACHE_PATH", reason="cache")
    place.check(settings.cache)
    return {"list": listed, "verify": verify, "evict": evict}[args.what](settings.cache, args)


def listed(cache: Path, args: argparse.Namespace) -> int:
    """`list`: models with bytes, files, last use, and whether one runs."""
    import time

    from runtime import upkeep

    now = time.time()
    items = [
        {
            "model": held.name,
            "digest": held.digest,
            "bytes": sum(held.sizes.values()),
            "files": len(held.files),
            "used": date(held.used),
            "in_use": upkeep.in_use(held, now),
            "path": str(held.path),
        }
        for held in reversed(upkeep.models(cache))
    ]
    total = sum(count for _, count in Disk(cache).walk())
    free = shutil.disk_usage(cache).free
    if args.json:
        sys.stdout.write(json.dumps({"models": items, "bytes": total, "free": free}, indent=2) + "\n")
        return 0
    for item in items:
        mark = "  in use" if item["in_use"] else ""
        sys.stdout.write(
            f"{item['model']}@{str(item['digest'])[:19]}  {size(int(str(item['bytes'])))}  {item['files']} files  used {item['used']}{mark}\n"
        )
    sys.stdout.write(f"{len(items)} model(s), {size(total)} in {cache}, {size(free)} free\n")
    return 0


def verify(cache: Path, args: argparse.Namespace) -> int:
    """`verify`: every object against its digest, read from the disk, and the files that a model lacks."""
    from runtime import upkeep

    disk = Disk(cache)
    objects = list(disk.walk())
    models = upkeep.models(cache)
    names = {f.digest: f"{held.name}: {f.path}" for held in models for f in held.files}
    progress = Progress(sum(count for _, count in objects), "verify", sys.stderr)
    bad = [digest for digest, count in objects if upkeep.damaged(disk, digest, count, progress.add) and disk.size(digest) is not None]  # not evicted
    progress.close()
    lacking = sorted({names[digest] for held in models if held.path.is_dir() for digest in held.sizes if disk.size(digest) is None})
    for digest in bad if args.repair else ():
        disk.delete(digest)
    told = [{"digest": digest, "file": names.get(digest, ""), "path": str(disk.path(digest))} for digest in bad]
    if args.json:
        doc = {"objects": len(objects), "damaged": told, "removed": bool(bad and args.repair), "missing": lacking}
        sys.stdout.write(json.dumps(doc, indent=2) + "\n")
    else:
        sys.stdout.write("".join(f"damaged: {t['file'] or t['digest']} ({t['path']})\n" for t in told))
        sys.stdout.write("".join(f"missing: {name}\n" for name in lacking))
        sys.stdout.write(f"{len(objects)} object(s) read, {len(bad)} damaged{' and removed' if bad and args.repair else ''}\n")
    if bad and not args.repair:
        do = "say --repair: it is removed, and the next start fetches it again"
        raise Mismatch(f"{len(bad)} object(s) of the cache are damaged", expected="the bytes of their digests", do=do, reason="weights")
    if lacking and not args.repair:
        what = f"{len(lacking)} file(s) of the models are missing"
        raise Mismatch(what, expected="every file of a model", do="start while the registry answers: it is fetched again", reason="weights")
    return 0


def evict(cache: Path, args: argparse.Namespace) -> int:
    """`evict`: the models used longest ago go, never one that runs."""
    from runtime import upkeep

    if (args.keep_bytes is None) == (args.free_bytes is None):
        raise Invalid("evict needs to know how much", expected="either --keep-bytes or --free-bytes")
    keep, wanted = _bytes(args.keep_bytes), _bytes(args.free_bytes)
    total = sum(count for _, count in Disk(cache).walk())
    disk = shutil.disk_usage(cache)
    if wanted > disk.total:  # else everything would go, and for nothing
        raise Invalid(f"--free-bytes {args.free_bytes} is more than its disk has", expected=f"at most the {size(disk.total)} of {cache}")

    def enough(freed: int) -> bool:
        return total - freed <= keep if args.keep_bytes is not None else disk.free + freed >= wanted

    done = upkeep.evict(cache, enough, dry=args.dry_run)
    verb = "would be removed" if args.dry_run else "removed"
    if args.json:
        sys.stdout.write(json.dumps({"models": done.models, "bytes": done.bytes, "in_use": done.busy, "dry_run": args.dry_run}, indent=2) + "\n")
    else:
        sys.stdout.write("".join(f"{name} {verb}\n" for name in done.models) + f"{size(done.bytes)} {verb}\n")
    if not enough(done.bytes):
        busy = f"; in use: {', '.join(done.busy)}" if done.busy else ""
        raise Unavailable(f"that is not enough{busy}", expected="less to keep", do="stop what runs, or use a larger volume", reason="disk_full")
    return 0


def _bytes(text: str | None) -> int:
    if text is None:
        return 0
    number, unit = (text[:-1], text[-1].upper()) if text and text[-1].isalpha() else (text, "")
    if not (number.isascii() and number.isdigit() and len(number) < 16 and unit in _UNITS):
        raise Invalid(f"{text[:40]!r} is no number of bytes", expected="a whole number, with K, M, G or T behind it")
    return int(number) * _UNITS[unit]
