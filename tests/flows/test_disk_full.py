"""A server whose disk of blobs is full, beside clients that push: what they are told, what stays, and that it goes on by itself once there is space.

The disk is a small tmpfs in a mount namespace of the server's own, so that nothing else on the machine sees it.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.conftest import missing, stop
from tests.contracts.doors import new_site, sha
from tests.flows.test_store_faults import REPO, Pushers, joined, not_ready, quiet, ready
from tests.operated import Operated, wait_for

pytestmark = pytest.mark.server
MIB = 1024 * 1024
SHELL = 'mount -t tmpfs -o size=32m none "$1" && mkdir -p "$1/blobs" "$1/partial" && exec "$2" registry serve --data "$3" --port 0 --json'


def started(data: Path, *linked: str) -> tuple[subprocess.Popen[str], dict[str, str], Path]:
    """A server whose folders of those names lie on a disk of 32 MiB, its keys, and that disk as it is seen from outside the namespace."""
    if not shutil.which("unshare"):
        missing("unshare")
    keys, disk = new_site(data), data.with_name("disk")
    disk.mkdir()
    for name in linked:
        (data / name).rmdir()
        (data / name).symlink_to(disk / name)
    argv = ["unshare", "-Urm", "sh", "-c", SHELL, "sh", str(disk), str(Path(sys.executable).parent / "airlock"), str(data)]
    with data.with_suffix(".log").open("w") as err:
        env = {**os.environ, "AIRLOCK_METRICS": "127.0.0.1:0"}
        process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=err, text=True, env=env)
    return process, keys, Path(f"/proc/{process.pid}/root{disk}")


@contextmanager
def on_a_small_disk(data: Path) -> Iterator[tuple[Operated, Path]]:
    """The running server and its disk."""
    process, keys, disk = started(data, "blobs", "partial")
    log = data.with_suffix(".log")
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        if not line and ("unshare" in log.read_text() or "mount:" in log.read_text()):
            missing(f"a user namespace with a file system of its own ({log.read_text()[:80]})")
        assert line, log.read_text()
        told = json.loads(line)
        yield Operated(data, process, int(urlsplit(told["listening"]).port or 0), keys, log, told=told), disk
    finally:
        stop(process)
        process.stdout.close()


def test_objects_on_another_disk_than_what_is_staged_refuse_the_start(tmp_path: Path) -> None:
    process, _keys, _disk = started(tmp_path / "data", "blobs")
    assert process.communicate(timeout=60)[0] == "" and process.returncode == 9
    assert "different file systems" in (tmp_path / "data.log").read_text()


def test_a_full_disk_refuses_pushes_only_and_they_go_on_when_there_is_space(tmp_path: Path) -> None:
    with on_a_small_disk(tmp_path / "data") as (server, disk):
        ballast = disk / "ballast"
        ballast.write_bytes(os.urandom(16 * MIB))
        big = os.urandom(4 * MIB)
        _, manifest = server.image(REPO, "v1", [big])
        half = server.ask("PATCH", server.ask("POST", f"/v2/{REPO}/blobs/uploads/").headers["location"], big[::-1][:MIB])
        assert half.status == 202 and server.operator("/readyz")[0] == 200
        pushers = Pushers(server)
        with pushers.running():
            wait_for(lambda: len(pushers.refused) >= 20, "refused pushes")
            last = pushers.refused[-1].body.decode()
            assert "full" in last and "free" in last and str(tmp_path) not in last, last
            not_ready(server)
            for body, path in ((manifest, f"/v2/{REPO}/manifests/v1"), (big, f"/v2/{REPO}/blobs/{sha(big)}")):
                assert server.ask("GET", path).body == body
            more = server.ask("PATCH", half.headers["location"], big[::-1][MIB:])
            assert more.status == 503, more.body
            found = server.ask("GET", half.headers["location"])
            assert (found.status, found.headers["range"]) == (204, f"0-{MIB - 1}"), "what was acknowledged stays, and no more"
            ballast.unlink()
            ready(server)
            pushers.grow(10)
        done = server.ask("PUT", joined(half.headers["location"], sha(big[::-1])), big[::-1][MIB:])
        assert done.status == 201, done.body
        assert pushers.strange == [] and len(pushers.stored) > 20
        for digest, raw in pushers.stored.items():
            assert server.ask("GET", f"/v2/{REPO}/blobs/{digest}").body == raw
        quiet(server)
