"""Clients over HTTP beside collections that never rest, servers killed -9 and started again: nothing that was confirmed is lost, nothing dangles."""

from __future__ import annotations

import base64
import http.client
import json
import os
import random
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest
from sqlalchemy import select, text, union_all

from artifact.errors import Conflict
from registry import tables as t
from registry.collector import Collector
from registry.settings import Settings
from registry.wiring import Site, open_site
from tests.conftest import AIRLOCK, find_port, stop, wait_http
from tests.contracts.doors import new_site
from tests.contracts.stores import s3_url
from tests.services import postgres
from tests.soak import DANGLING, Again, Missing, Soak, sha

LEASE_S = 60
CLIENTS = 8
LARGE = (3, 17 * 1024 * 1024)
CHUNK = 7_000_000  # neither a part of S3 nor a divisor of one
FAST = {"AIRLOCK_BLOB_LEASE_S": str(LEASE_S), "AIRLOCK_GARBAGE_DELAY_S": "10", "AIRLOCK_GC_EVERY_S": "1", "AIRLOCK_REDIRECT": "off"}


class Server:
    """One registry process on a port of its own that may be killed and started again."""

    def __init__(self, data: Path, env: Mapping[str, str], log: Path) -> None:
        self.data, self.env, self.log, self.port = data, {**os.environ, **env}, log, find_port()
        self.process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        argv = [str(AIRLOCK), "registry", "serve", "--data", str(self.data), "--port", str(self.port)]
        with self.log.open("ab") as out:
            process = subprocess.Popen(argv, stdout=out, stderr=out, env=self.env)
        wait_http(f"http://127.0.0.1:{self.port}/healthz", process, self.log, timeout=120)
        return process

    def kill(self) -> None:
        """kill -9, and a new process on the same port."""
        self.process.kill()
        self.process.wait()
        self.process = self._start()


class Http:
    """The soak's client: one of the servers at random for every request."""

    def __init__(self, servers: list[Server], key: str, draw: random.Random) -> None:
        self.servers, self.draw = servers, draw
        self.authorization = "Basic " + base64.b64encode(f"$oauthtoken:{key}".encode()).decode()

    def _ask(self, method: str, path: str, body: bytes = b"", kind: str = "application/octet-stream") -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.draw.choice(self.servers).port, timeout=60)
        try:
            connection.request(method, path, body=body or None, headers={"Authorization": self.authorization, "Content-Type": kind})
            answer = connection.getresponse()
            found = answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()
        except (OSError, http.client.HTTPException) as error:
            raise Again(f"{method} {path}: {type(error).__name__}") from error
        finally:
            connection.close()
        if found[0] >= 500 or found[0] == 429:
            assert found[0] == 503, f"{method} {path} -> {found[0]} {found[2][:500]!r}"
            raise Again(f"{method} {path} -> {found[0]} {found[2][:200]!r}")
        return found

    def has(self, repo: str, digest: str) -> bool:
        status, _, _ = self._ask("HEAD", f"/v2/{repo}/blobs/{digest}")
        assert status in (200, 404), status
        return status == 200

    def put(self, repo: str, data: bytes) -> None:
        if self.draw.random() < 0.5:
            status, _, body = self._ask("POST", f"/v2/{repo}/blobs/uploads/?digest={sha(data)}", data)
        else:
            status, headers, body = self._ask("POST", f"/v2/{repo}/blobs/uploads/")
            assert status == 202, (status, body)
            path = _path(headers["location"])
            step = CHUNK if len(data) > CHUNK else max(len(data), 1)
            for lo in range(0, max(len(data), 1), step):  # each at any server: the end of one piece is staged, and read by the next
                status, headers, body = self._ask("PATCH", path, data[lo : lo + step])
                if status != 202:
                    raise Again(f"PATCH -> {status} {body[:200]!r}")  # of an upload that a killed server holds: begun anew
                path = _path(headers["location"])
            status, _, body = self._ask("PUT", f"{path}{'&' if '?' in path else '?'}digest={sha(data)}")
            if status in (404, 409, 416):
                raise Again(f"PUT -> {status} {body[:200]!r}")
        assert status == 201, (status, body)

    def mount(self, repo: str, digest: str, source: str) -> bool:
        status, headers, body = self._ask("POST", f"/v2/{repo}/blobs/uploads/?mount={digest}&from={source}")
        assert status in (201, 202), (status, body)
        if status == 202:
            self._ask("DELETE", _path(headers["location"]))
        return status == 201

    def push(self, repo: str, ref: str, raw: bytes, media_type: str) -> None:
        status, _, body = self._ask("PUT", f"/v2/{repo}/manifests/{ref}", raw, media_type)
        if status in (400, 404) and b"MANIFEST_BLOB_UNKNOWN" in body:
            raise Missing(body.decode())
        assert status == 201, (status, body)

    def manifest(self, repo: str, ref: str) -> bytes:
        status, _, body = self._ask("GET", f"/v2/{repo}/manifests/{ref}")
        assert status == 200, (repo, ref, status, body)
        return body

    def blob(self, repo: str, digest: str) -> bytes:
        status, _, body = self._ask("GET", f"/v2/{repo}/blobs/{digest}")
        assert status == 200, (repo, digest, status, body)
        return body

    def delete(self, repo: str, ref: str) -> None:
        status, _, body = self._ask("DELETE", f"/v2/{repo}/manifests/{ref}")
        if status == 404:
            raise Missing(body.decode())
        assert status == 202, (status, body)


def _path(location: str) -> str:
    return "/" + location.split("/", 3)[3] if location.startswith("http") else location


@contextmanager
def killing(servers: list[Server], every_s: float, draw: random.Random, wrong: list[str]) -> Iterator[list[int]]:
    """Kills one of the servers every so often; yields how often, as a list of their numbers."""
    done: list[int] = []
    end = threading.Event()

    def loop() -> None:
        try:
            while not end.wait(every_s):
                n = draw.randrange(len(servers))
                servers[n].kill()
                done.append(n)
        except BaseException as error:
            wrong.append(f"kill: {type(error).__name__} {error}")

    thread = threading.Thread(target=loop)
    thread.start()
    try:
        yield done
    finally:
        end.set()
        thread.join()


def collect(site: Site, now: float) -> int:
    """One collection, when the servers' own lets it; returns how many unfinished uploads and staged pieces it removed."""
    end = time.monotonic() + 120
    while True:
        try:
            report = Collector(site.library, 0).run(now, clock_is_right=True)
            return report.uploads + report.staging
        except Conflict:
            assert time.monotonic() < end, "the servers' collection does not end"
        time.sleep(0.2)


def play(data: Path, env: dict[str, str], count: int, seconds: float, kill_every_s: float) -> None:
    """The whole story: soak, look at everything, end every lease, look again, and count what dangles."""
    seed = int(os.environ.get("AIRLOCK_TEST_SEED", time.time_ns() % 1_000_000))
    print(f"seed {seed}, {seconds:.0f} s")
    draw = random.Random(seed)
    keys = new_site(data, **env)
    places = [data]
    for n in range(1, count):
        places.append(data.with_name(f"site{n}") if "AIRLOCK_BLOBS" in env else data)
        if places[-1] != data:
            shutil.copytree(data, places[-1])
    servers = [Server(place, env, data.with_name(f"server{n}.log")) for n, place in enumerate(places)]
    try:
        soak = Soak([Http(servers, keys["acme"], random.Random(seed + n)) for n in range(CLIENTS)], seed, LEASE_S, sizes=(1, 60_000), large=LARGE)
        with killing(servers, kill_every_s, draw, soak.wrong) as kills:
            soak.run(seconds)
        logs = "".join(server.log.read_text()[-3000:] for server in servers)
        assert soak.wrong == [], logs
        tags = soak.check_all()
        settings = Settings.load(data, environ=env)
        with open_site(settings, background=False) as site:
            with site.catalog.reading() as conn:
                both = union_all(select(t.audit_pending.c.body), select(t.audit_leaf.c.body)).subquery()
                events = [json.loads(body) for body in conn.execute(select(both.c.body).where(both.c.body.is_not(None))).scalars()]
            collected = sum(int(event["blobs"]) for event in events if event["event"] == "gc")
            stop(servers[0].process)
            now = time.time()
            halves = sum(collect(site, now + days * 86400) for days in (10, 20, 30))  # every lease is over, and at last that of bytes without a row
            servers[0].process = servers[0]._start()
            assert soak.check_all() == tags
            with site.catalog.reading() as conn:
                found = {words: conn.execute(text(sql)).scalar_one() for words, sql in DANGLING.items()}
                rows = conn.execute(select(t.blob.c.location, t.blob.c.size)).all()
            found["blobs without their bytes"] = sum(site.blobs.stat(row.location) != row.size for row in rows)
            left = len({location for location, _ in site.blobs.walk()} - {row.location for row in rows})
            staged = site.blobs.sweep((), now + 60 * 86400)
        figures = f"kills {len(kills)}, collected {collected}, uploads that kills cut off {halves}, tags {tags}, blobs {len(rows)}"
        print(f"{dict(soak.done)}; {figures}; left over {left}, staged {staged}")
        assert not any(found.values()), found
        assert left == 0, "bytes that nothing names are left in the store"
        assert staged == 0, "pieces of uploads are left in the store"
        assert soak.done["large uploaded"] and tags and len(kills) >= int(seconds / kill_every_s / 2)
        assert collected, f"a run must be longer than the leases of {LEASE_S} s"
        assert "Traceback" not in logs
    finally:
        for server in servers:
            stop(server.process)


@pytest.mark.server
@pytest.mark.timeout(900)
def test_soak_on_sqlite_and_files(tmp_path: Path) -> None:
    play(tmp_path / "site0", dict(FAST), 1, float(os.environ.get("AIRLOCK_SOAK_SHORT_S", "75")), 20)


@pytest.mark.full
@pytest.mark.timeout(3600)
def test_soak_on_postgresql_and_s3_with_two_servers(tmp_path: Path) -> None:
    url = postgres.shared().database()
    try:
        env = {**FAST, "AIRLOCK_DATABASE": url, "AIRLOCK_BLOBS": s3_url(tmp_path)}
        play(tmp_path / "site0", env, 2, float(os.environ.get("AIRLOCK_SOAK_S", "600")), 60)
    finally:
        postgres.shared().drop(url)
