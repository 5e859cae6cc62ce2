"""A server over SQLite whose disk fills up, whose database another process holds, and beside which a second server is started."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import airlock
from tests.contracts.doors import Door, new_site, serving, sha

pytestmark = pytest.mark.server
LIMIT = 2_000_000


@pytest.fixture
def door(tmp_path: Path) -> Iterator[Door]:
    """One server over SQLite."""
    keys = new_site(tmp_path / "site")
    with serving(tmp_path / "site", keys) as found:
        yield found


def limit(door: Door, size: int) -> None:
    """Lets the server write files of at most that size: what a full disk is to it, without one."""
    resource.prlimit(door.process.pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def test_a_full_disk_is_told_and_nothing_of_it_is_lost(door: Door) -> None:
    limit(door, LIMIT)
    stored: dict[str, bytes] = {}
    end = time.monotonic() + 120
    while True:
        assert time.monotonic() < end, "the database never grew to the limit"
        raw = os.urandom(500)
        answer = door.ask("POST", f"/v2/acme/full/blobs/uploads/?digest={sha(raw)}", raw)
        if answer.status != 201:
            break
        stored[sha(raw)] = raw
    assert answer.status == 503 and b"bytes free" in answer.body and b"free space" in answer.body, answer.body
    assert len(stored) > 3
    for digest, raw in list(stored.items())[-3:]:
        found = door.ask("GET", f"/v2/acme/full/blobs/{digest}")  # a first read writes its audit row: refused, never served unrecorded
        assert (found.status, found.body) == (200, raw) or found.status == 503
    limit(door, resource.RLIM_INFINITY)
    digest, _ = door.image("acme/full", "after", [b"space again"])
    assert door.ask("GET", "/v2/acme/full/manifests/after").headers["docker-content-digest"] == digest
    for known, raw in stored.items():
        assert door.ask("GET", f"/v2/acme/full/blobs/{known}").body == raw
    assert "Traceback" not in door.log.read_text() and '"trace"' not in door.log.read_text()


def test_a_request_waits_while_another_process_holds_the_database(door: Door) -> None:
    code = "import sqlite3, sys; c = sqlite3.connect(sys.argv[1]); c.execute('BEGIN IMMEDIATE'); print('held', flush=True); sys.stdin.read()"
    argv = [sys.executable, "-c", code, str(door.data / "registry.db")]
    known = "/v2/acme/held/blobs/" + door.blob("acme/held", b"known")
    assert door.ask("GET", known).body == b"known"  # from now on a read of it needs no new row
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None and other.stdin is not None and other.stdout.readline() == b"held\n"
        got: list[str] = []
        thread = threading.Thread(target=lambda: got.append(door.blob("acme/held", b"waits")))
        thread.start()
        time.sleep(2)
        assert got == [] and door.ask("GET", known).body == b"known"  # readers are served meanwhile
        other.stdin.close()
        other.wait(60)
        thread.join(60)
    assert got == [sha(b"waits")]


def test_a_second_server_is_refused_and_commands_beside_the_first_work(door: Door) -> None:
    second = airlock("registry", "serve", "--data", str(door.data), "--port", "0", check=False)
    assert second.returncode == 8 and "another server" in second.stderr and "SQLite" in second.stderr
    listed = airlock("key", "list", "--data", str(door.data))
    assert "acme" in listed.stdout
    made = airlock("key", "create", "--data", str(door.data), "--org", "acme", "--models", "acme/**").stdout.strip()
    door.keys["beside"] = made
    door.image("acme/beside", "1", [b"x"])
    assert door.ask("GET", "/v2/acme/beside/manifests/1", who="beside").status == 200
