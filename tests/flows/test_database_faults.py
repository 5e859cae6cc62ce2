"""A server whose database is on a full disk (SQLite, PostgreSQL), whose SQLite another process holds, and beside which a second server is started."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from tests.conftest import airlock, missing
from tests.contracts.doors import EMPTY, MANIFEST, Answer, Door, new_site, serving, sha
from tests.services import postgres
from tests.services.postgres import Postgres

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


SMALL = 'mount -t tmpfs -o size=48m,uid="$2",mode=700 none "$1" && shift 2 && exec "$@"'


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A database in a tablespace of 48 MiB, on a server in a mount namespace of its own."""
    if os.geteuid() or not shutil.which("unshare"):
        missing("root and unshare: PostgreSQL gets a small disk of its own")
    server = Postgres.make()
    try:
        server.end()
        space = server.folder / "space"
        space.mkdir()
        owned = postgres._as_owner
        apart = ["unshare", "-m", "sh", "-c", SMALL, "sh", str(space), str(postgres.NOBODY)]
        monkeypatch.setattr(postgres, "_as_owner", lambda *argv: [*apart, *owned(*argv)])
        server.start()
        server.sql(f"CREATE TABLESPACE small LOCATION '{space}'")
        server.sql("CREATE DATABASE small TABLESPACE small")
        yield server.url("small")
    finally:
        server.remove()


def test_a_full_disk_of_postgresql_is_told_and_nothing_of_it_is_lost(tmp_path: Path, small: str) -> None:
    keys = new_site(tmp_path / "site", AIRLOCK_DATABASE=small)
    with serving(tmp_path / "site", keys, AIRLOCK_DATABASE=small) as door, psycopg.connect(small, autocommit=True) as db:
        config = {"mediaType": EMPTY, "digest": door.blob("acme/full", b"{}"), "size": 2}

        def manifest(n: int) -> bytes:
            notes = {str(i): hashlib.shake_128(f"{n} {i}".encode()).hexdigest(2000) for i in range(200)}
            return json.dumps({"schemaVersion": 2, "mediaType": MANIFEST, "config": config, "layers": [], "annotations": notes}).encode()

        def push(n: int) -> Answer:
            return door.ask("PUT", f"/v2/acme/full/manifests/v{n}", manifest(n), Content_Type=MANIFEST)

        assert push(0).status == 201
        db.execute("CREATE TABLE ballast (x bytea)")
        with pytest.raises(psycopg.errors.DiskFull):
            while True:
                db.execute("INSERT INTO ballast SELECT decode(string_agg(md5(random()::text), ''), 'hex') FROM generate_series(1, 20000)")
        stored, n, answer = [0], 1, push(1)
        while answer.status == 201:
            stored, n = [*stored, n], n + 1
            answer = push(n)
        said = answer.json()["errors"][0]
        assert answer.status == 503 and said["detail"]["reason"] == "disk_full" and "free" in said["message"] and "small" not in said["message"], said
        for known in stored:
            found = door.ask("GET", f"/v2/acme/full/manifests/v{known}")  # a first read writes its audit row: refused, never served unrecorded
            assert (found.status, found.body) == (200, manifest(known)) or found.status == 503
        db.execute("DROP TABLE ballast")
        assert push(n).status == 201
        for known in (*stored, n):
            assert door.ask("GET", f"/v2/acme/full/manifests/v{known}").body == manifest(known)
        log = door.log.read_text()
        assert "Traceback" not in log and '"trace"' not in log


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
