"""Seconds of pushes, pulls, deletes and mounts on threads beside a collection that never rests, on both databases: nothing lost, nothing left."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import select, text

from artifact.errors import Conflict, NotFound, Unavailable
from registry import tables as t
from registry.collector import Collector
from registry.links import unlink_manifest
from registry.wiring import Site
from tests.site import BACKENDS, call_of, make_key, put, running_site
from tests.soak import DANGLING, Again, Missing, Soak, every

LEASE_S = 3.0
DELAY_S = 2.0
SECONDS = float(os.environ.get("AIRLOCK_SOAK_UNIT_S", "12"))


@pytest.fixture(params=BACKENDS)
def site(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Site]:
    with running_site(tmp_path, request.param) as opened:
        opened.library.blob_lease_s = LEASE_S
        opened.library.uploads.lease_s = LEASE_S
        yield opened


class InProcess:
    """The soak's client over the guard of an open site."""

    def __init__(self, site: Site, key: str) -> None:
        self.site, self.key = site, key

    def has(self, repo: str, digest: str) -> bool:
        try:
            self.site.guard.stat(call_of(self.site, self.key), repo, digest)
        except NotFound:
            return False
        return True

    def put(self, repo: str, data: bytes) -> None:
        put(self.site, call_of(self.site, self.key), repo, data)

    def mount(self, repo: str, digest: str, source: str) -> bool:
        return self.site.guard.mount(call_of(self.site, self.key), repo, digest, source) is not None

    def push(self, repo: str, ref: str, raw: bytes, media_type: str) -> None:
        try:
            self.site.guard.push(call_of(self.site, self.key), repo, raw, media_type, refs=[] if ":" in ref else [ref])
        except NotFound as error:
            raise Missing(error.what) from error
        except (Unavailable, Conflict) as error:
            raise Again(error.what) from error

    def manifest(self, repo: str, ref: str) -> bytes:
        call = call_of(self.site, self.key)
        found = self.site.guard.resolve(call, repo, ref)
        return self.site.guard.read(call, repo, found.digest).data or b""

    def blob(self, repo: str, digest: str) -> bytes:
        content = self.site.guard.read(call_of(self.site, self.key), repo, digest)
        assert content.path is not None
        return content.path.read_bytes()

    def delete(self, repo: str, ref: str) -> None:
        try:
            self.site.guard.delete(call_of(self.site, self.key), repo, ref)
        except NotFound as error:
            raise Missing(error.what) from error
        except Unavailable as error:
            raise Again(error.what) from error


def dangling(site: Site) -> dict[str, int]:
    with site.catalog.reading() as conn:
        found = {words: conn.execute(text(sql)).scalar_one() for words, sql in DANGLING.items()}
        places = conn.execute(select(t.blob.c.location, t.blob.c.size)).all()
    found["blobs without their bytes"] = sum(site.blobs.stat(row.location) != row.size for row in places)
    return {words: n for words, n in found.items() if n}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_soak(site: Site) -> None:
    seed = int(os.environ.get("AIRLOCK_TEST_SEED", random.SystemRandom().randrange(1_000_000)))
    print(f"seed {seed}")
    key = make_key(site, "acme", "acme/**", actions=("pull", "push"))
    clients = [InProcess(site, key) for _ in range(5)]
    soak = Soak(list(clients), seed, LEASE_S)
    collector = Collector(site.library, DELAY_S, batch=7)
    went = 0

    def collect() -> None:
        nonlocal went
        went += collector.run(time.time()).blobs

    with every(0.2, collect, soak.wrong):
        soak.run(SECONDS)
    assert soak.wrong == []
    print(dict(soak.done), f"blobs collected {went}")
    assert soak.check_all() > 0
    assert dangling(site) == {}
    assert went and soak.done["pushed"] and soak.done["deleted"] and soak.done["pulled"]
    late = time.time() + 10 * 86400
    Collector(site.library, 0).run(late, clock_is_right=True)
    assert soak.check_all() > 0, "what is held outlives every lease"
    assert dangling(site) == {}
    soak.delete_all()
    clients[0].put("acme/last", b"last")
    with site.catalog.writing() as conn:  # tags may be gone from manifests that stay linked: untagged, and no rule here
        ids = conn.execute(select(t.repo_manifest.c.repo_id, t.manifest.c.digest).join(t.manifest)).all()
    for repo_id, digest in ids:
        with site.catalog.writing() as conn:
            unlink_manifest(conn, repo_id, digest, time.time())
    Collector(site.library, 0).run(late, clock_is_right=True)
    with site.catalog.reading() as conn:
        for table in (t.blob, t.edge, t.manifest, t.garbage, t.repo_blob, t.file):
            assert conn.execute(select(table).limit(1)).first() is None, f"{table.name} is not empty"
    assert list(site.blobs.walk()) == [], "bytes that nothing names are left in the store"
