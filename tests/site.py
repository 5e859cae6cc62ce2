"""A real site in a temporary directory for unit tests: its keys, and a small model pushed through the guard."""

from __future__ import annotations

import functools
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from artifact import manifest as m
from artifact import profile
from artifact.grant import Grant
from artifact.store import Call, Descriptor, File
from registry.catalog import ensure_org
from registry.home import Home
from registry.settings import Settings
from registry.wiring import Site, open_site
from tests.services import postgres

BACKENDS = ["sqlite", pytest.param("postgresql", marks=pytest.mark.server)]  # for @pytest.fixture(params=BACKENDS)
SQLITE_ONLY = pytest.mark.parametrize("site", ["sqlite"], indirect=True)  # for what only SQLite has, on a fixture `site` of these


@functools.cache
def _template() -> tempfile.TemporaryDirectory[str]:
    """An empty site, made and migrated once a process; tests work on copies, removed with the last reference."""
    folder = tempfile.TemporaryDirectory(prefix="airlock-site-")
    data = Path(folder.name) / "data"
    Home.open(data, create=True)
    open_site(Settings.load(data, environ={}), background=False).close()
    return folder


def _migrated(data: Path, url: str) -> None:
    shutil.rmtree(data, ignore_errors=True)  # of a run that failed half-way
    Home.open(data, create=True)
    open_site(Settings.load(data, environ={"AIRLOCK_DATABASE": url}), background=False).close()


def new_database(path: Path) -> str:
    """The URL of a new, migrated database, and at `path`/data the data directory whose secrets fit it."""
    server = postgres.shared()
    data = server.folder / "site-template"
    name = server.template("site_template", lambda url: _migrated(data, url))
    shutil.copytree(data, path / "data")
    return server.database(name)


def make_site(path: Path, backend: str = "sqlite", **env: str) -> Site:
    """An empty site over SQLite or over a new database of the run's PostgreSQL, with more settings from `env`."""
    if backend == "postgresql":
        env["AIRLOCK_DATABASE"] = new_database(path)
    else:
        shutil.copytree(Path(_template().name) / "data", path / "data")
    return open_site(Settings.load(path / "data", environ=env), background=False)


@contextmanager
def running_site(path: Path, backend: str = "sqlite", **env: str) -> Iterator[Site]:
    """The same, closed at the end and its database removed."""
    site = make_site(path, backend, **env)
    try:
        with site:
            yield site
    finally:
        if backend == "postgresql":
            postgres.shared().drop(site.settings.database)


def make_key(
    site: Site, org: str, *models: str, actions: tuple[str, ...] = ("pull", "push", "run"), tier: str = "developer", expires: float = 0.0
) -> str:
    now = time.time()
    with site.catalog.writing() as conn:
        org_id = ensure_org(conn, org, now)
        grant = Grant(models or (f"{org}/*",), actions)
        return site.entitlements.add_key(
            conn, org_id, tier=tier, grant=grant, expires=expires, at=now if expires == 0 or expires > now else expires - 1
        )[1]


def call_of(site: Site, key: str, now: float | None = None) -> Call:
    return site.guard.caller(key, "request-1", time.time() if now is None else now, "127.0.0.1")


def put(site: Site, call: Call, repo: str, raw: bytes) -> Descriptor:
    upload = site.guard.upload(call, repo)
    upload.write(raw)
    return upload.commit(m.digest_of(raw), len(raw))


@dataclass(frozen=True)
class Pushed:
    name: str
    model: Descriptor
    profiles: Descriptor
    profile_id: str
    files: dict[str, bytes]


def push_model(site: Site, call: Call, name: str, ref: str, files: dict[str, bytes] | None = None, lfs: tuple[str, ...] = ()) -> Pushed:
    files = files or {"config.json": b'{"a":1}', "model.safetensors": os.urandom(5000), "sub/data.txt": b"text"}
    put(site, call, name, m.EMPTY_BYTES)
    facts = put(site, call, name, m.canonical_json({"schema": 1, "source": f"push://{name}"}))
    listed = [File(path, put(site, call, name, raw).digest, len(raw), path in lfs) for path, raw in files.items()]
    raw = m.build_model(listed, Descriptor(m.FACTS_TYPE, facts.digest, facts.size), {m.SOURCE: f"push://{name}"})
    model = site.guard.push(call, name, raw, m.MANIFEST, refs=[ref])
    return Pushed(name, model, *push_profiles(site, call, name, ref, name, model), files)


def push_profiles(site: Site, call: Call, name: str, ref: str, weights: str, model: Descriptor) -> tuple[Descriptor, str]:
    """The profile manifest of `name` with one profile that runs `weights`, and the profile's id."""
    document = profile.build(weights, model.digest, [{"tags": {"llm_engine": "vllm", "precision": "bf16", "tp": "1", "device": "cpu"}}], 5000)
    home = name + "/profiles"
    put(site, call, home, m.EMPTY_BYTES)
    layer = put(site, call, home, document)
    raw = m.build_manifest(m.PROFILES_TYPE, [Descriptor(m.PROFILES_TYPE, layer.digest, layer.size).as_json()], {})
    profiles = site.guard.push(call, home, raw, m.MANIFEST, refs=[ref])
    return profiles, profile.parse(document).profiles[0].id
