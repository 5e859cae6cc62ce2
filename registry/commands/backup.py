"""`airlock registry backup` and `restore`: what of a site cannot be made again, out and back."""

from __future__ import annotations

import argparse
import json
import time
from datetime import UTC, datetime
from pathlib import Path

from registry.backup import backup as take
from registry.backup import restore as put_back
from registry.schema import newest
from registry.settings import Settings


def backup(argv: list[str]) -> int:
    """Takes a backup and prints where; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="airlock registry backup",
        description="Write the database, the secrets and the pinned senders into a new directory while the server runs. Objects are copied apart.",
        epilog="example: airlock registry backup --data /srv/airlock --to /backup/airlock-monday && rsync -a /srv/airlock/blobs /backup/",
    )
    parser.add_argument("--data", help="the data directory (env AIRLOCK_DATA)")
    parser.add_argument("--to", type=Path, required=True, help="a directory that is not there yet")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    given = parser.parse_args(argv)
    index = take(Settings.load(given.data), given.to.absolute(), time.time(), newest())
    files = index["files"]
    size = sum(int(f["size"]) for f in files.values()) if isinstance(files, dict) else 0
    if given.json:
        print(json.dumps({"to": str(given.to), "bytes": size} | index))
    else:
        print(f"{given.to}: {len(files) if isinstance(files, dict) else 0} files, {size} bytes, every secret of the site among them: keep it as such")
        print("the objects are not in it: copy blobs/ (or the bucket) at any time, with any tool")
    return 0


def restore(argv: list[str]) -> int:
    """Restores a backup and prints what to do next; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="airlock registry restore",
        description="Put a backup into an empty data directory (and an empty PostgreSQL database, by AIRLOCK_DATABASE).",
        epilog="example: airlock registry restore --from /backup/airlock-monday --data /srv/airlock",
    )
    parser.add_argument("--from", dest="source", type=Path, required=True, help="a directory that airlock registry backup wrote")
    parser.add_argument("--data", help="the new data directory (env AIRLOCK_DATA)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    given = parser.parse_args(argv)
    settings = Settings.load(given.data)
    index = put_back(given.source.absolute(), settings)
    taken = datetime.fromtimestamp(index["taken"], UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    if given.json:
        print(json.dumps({"data": str(settings.data), "taken": taken}))
        return 0
    print(f"{settings.data} is as of {taken}")
    print(f"do: copy the objects to {settings.data / 'blobs'} (not for S3), then: airlock registry rebuild --data {settings.data}")
    print(f"do: keys revoked and names moved after {taken} are as they were then: revoke those keys again, import newer bundles again")
    return 0
