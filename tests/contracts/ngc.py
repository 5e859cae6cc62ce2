"""A registry process with the NGC listener, models and keys for the tests of that door and of its clients."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import insert, select, update

from artifact.grant import Grant
from artifact.manifest import COMMIT, FACTS_TYPE, SOURCE, build_manifest, build_model, canonical_json, digest_of
from artifact.store import Descriptor, File
from registry import people
from registry import tables as t
from registry.catalog import ensure_org
from registry.settings import Settings
from registry.wiring import open_site
from tests.contracts.doors import MANIFEST, Answer, Door, new_site, serving, sha

SIGSTORE = "application/vnd.dev.sigstore.bundle.v0.3+json"
BUNDLE = b'{"mediaType":"application/vnd.dev.sigstore.bundle.v0.3+json","of":"the vendor"}'
FILES = {
    "config.json": b'{"a":1}',
    "empty.txt": b"",
    "model.safetensors": os.urandom(3_000_000),
    "sub/deep/ranks 0+1 \u00fc%25.bin": os.urandom(70_000),
}
OWN, MIRRORED, GATED = "acme/vision/demo", "ngc/nim/meta/llama", "ngc/nim/meta/paid"
PLUS = "hf-e9f8eff-nim1.5+"
# name: organisation, tier, patterns, actions, life in seconds
MORE = {
    "root": ("acme", "enterprise", ("**",), ("pull", "push", "run", "admin"), 0.0),
    "low": ("acme", "developer", ("ngc/**",), ("pull",), 0.0),
    "soon": ("acme", "enterprise", ("acme/**",), ("pull",), 7.5 * 86400),
    "nothing": ("acme", "enterprise", ("acme/elsewhere/*",), ("pull",), 0.0),
}


@dataclass
class NgcDoor:
    """The two listeners of one registry; `ask` goes to that of the NGC API."""

    main: Door
    ngc: Door

    @property
    def url(self) -> str:
        return self.ngc.url

    def ask(self, method: str, path: str, body: Any = None, who: str | None = "acme", **headers: Any) -> Answer:
        return self.ngc.ask(method, path, body, who, **headers)

    def get(self, path: str, who: str | None = "acme", **headers: Any) -> Any:
        """The value of an answer that must succeed."""
        found = self.ask("GET", path, None, who, **headers)
        assert found.status == 200, (path, found.status, found.body)
        value = found.json()
        assert value["requestStatus"]["statusCode"] == "SUCCESS" and value["requestStatus"]["requestId"]
        return value

    def bytes_of(self, url: str, **headers: Any) -> Answer:
        """What a URL of a listing gives to a client that sends it no key."""
        assert url.startswith(f"{self.url}/dl/") and url.isascii() and "%" not in url
        return self.ask("GET", url.removeprefix(self.url), None, None, **headers)

    def push(self, name: str, ref: str, files: dict[str, bytes] = FILES, who: str = "root", commit: str = "", **extra: str) -> str:
        """Pushes a model through the OCI door and returns its manifest's digest."""
        facts = canonical_json({"schema": 1})
        for data in [facts, b"{}", *files.values()]:
            self.main.blob(name, data, who)
        listed = [File(path, digest_of(data), len(data)) for path, data in files.items()]
        notes = {SOURCE: f"ngc://{name}", **({COMMIT: commit} if commit else {}), **extra}
        raw = build_model(listed, Descriptor(FACTS_TYPE, digest_of(facts), len(facts)), notes)
        done = self.main.ask("PUT", f"/v2/{name}/manifests/{ref}", raw, who, Content_Type=MANIFEST)
        assert done.status == 201, done.body
        return digest_of(raw)

    def sign(self, name: str, digest: str, who: str = "root") -> None:
        """Attaches a vendor's signature to a model, as a mirror carries it."""
        raw = self.main.ask("GET", f"/v2/{name}/manifests/{digest}", None, who).body
        layer = Descriptor(SIGSTORE, self.main.blob(name, BUNDLE, who), len(BUNDLE))
        bundle = build_manifest(SIGSTORE, [layer.as_json()], {}, subject=Descriptor(MANIFEST, digest, len(raw)))
        done = self.main.ask("PUT", f"/v2/{name}/manifests/{digest_of(bundle)}", bundle, who, Content_Type=MANIFEST)
        assert done.status == 201, done.body

    def lines(self) -> list[dict[str, Any]]:
        """The access lines of the NGC listener so far."""
        found = [json.loads(line) for line in self.main.log.read_text().splitlines() if line.startswith("{")]
        return [line for line in found if line.get("log") == "airlock.access" and line.get("door") == "ngc"]


def new_ngc_site(data: Path, **env: str) -> dict[str, str]:
    """The site of tests/contracts/doors.py with the keys above, and `person`: a personal key of a member in the teams vision and audio."""
    keys, now = new_site(data, **env), time.time()
    with open_site(Settings.load(data, environ={**os.environ, **env}), background=False) as site, site.catalog.writing() as conn:
        for name, (org, tier, models, actions, life) in MORE.items():
            grant = Grant(models, actions)
            keys[name] = site.entitlements.add_key(
                conn, ensure_org(conn, org, now), tier=tier, grant=grant, expires=now + life if life else 0.0, at=now
            )[1]
        acme = people.open_org(conn, "acme")
        people.create_member(conn, acme, "ada", "person", "", now)
        ada = people.member_of(conn, acme, "ada")
        for team in ("vision", "audio", "closed"):
            people.create_team(conn, acme, team, now)
            people.join_team(conn, people.team_of(conn, acme, team), ada)
        people.close_team(conn, acme, "closed", now)
        given = site.entitlements.add_key(
            conn, acme.id, tier="enterprise", grant=Grant(("acme/**",), ("pull",)), expires=0.0, at=now, kind="personal", member_id=ada.id
        )
        keys["person"] = given[1]
    return keys


@contextmanager
def ngc_serving(data: Path, keys: dict[str, str], **env: str) -> Iterator[NgcDoor]:
    """Starts the registry with the NGC listener on a free port."""
    with serving(data, keys, **{"AIRLOCK_NGC": "127.0.0.1:0", **env}) as main:
        assert main.process.stdout is not None
        line = main.process.stdout.readline()
        assert line.startswith("NGC API on http"), line
        yield NgcDoor(main, replace(main, port=int(line.rsplit(":", 1)[1])))


@pytest.fixture(scope="module")
def door(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NgcDoor]:
    """One with the models below, for all tests of a module."""
    data = tmp_path_factory.mktemp("ngc") / "data"
    with ngc_serving(data, new_ngc_site(data)) as found:
        fill(found, data)
        yield found


def fill(door: NgcDoor, data: Path) -> dict[str, str]:
    """Pushes the models that the tests ask for; returns their digests. GATED requires the enterprise tier, MIRRORED is private."""
    digests = {
        "demo:1.0": door.push(OWN, "1.0", FILES | {"old.txt": b"old"}),
        "demo:1.10": door.push(OWN, "1.10"),
        "llama:fp16": door.push(MIRRORED, "fp16"),
        "paid:1": door.push(GATED, "1"),
        "other:1": door.push("other/secret", "1", who="other"),
        "open:1": door.push("acme/open/free", "1"),
        "hub:main": door.push("hf/acme/m", "main", commit="0123456789abcdef0123456789abcdef01234567"),
    }
    door.sign(OWN, digests["demo:1.10"])
    with open_site(Settings.load(data, environ=dict(os.environ)), background=False) as site, site.catalog.writing() as conn:
        change = update(t.repository)
        conn.execute(change.where(t.repository.c.name == GATED).values(requires_tier="enterprise"))
        conn.execute(change.where(t.repository.c.name == "acme/open/free").values(visibility="public"))
        conn.execute(change.where(t.repository.c.name == MIRRORED).values(visibility="private"))
        mirrored = conn.execute(select(t.ref).join(t.repository, t.repository.c.id == t.ref.c.repo_id).where(t.repository.c.name == MIRRORED)).one()
        conn.execute(insert(t.ref).values({**mirrored._mapping, "name": PLUS}))  # a name that is no OCI tag comes with a bundle
    return digests


def push_image(door: NgcDoor, name: str) -> str:
    """Pushes an image of one architecture as 1.0, and an index of it as 1.1; returns the digest of the first."""
    base = "application/vnd.oci.image"
    config = json.dumps({"architecture": "arm64", "os": "linux", "rootfs": {"type": "layers", "diff_ids": []}}).encode()
    door.main.blob(name, config, "root")
    descriptor = {"mediaType": f"{base}.config.v1+json", "digest": sha(config), "size": len(config)}
    digest, raw = door.main.image(name, "1.0", [b"layer of the image"], "root", config=descriptor)
    entry = {"mediaType": MANIFEST, "digest": digest, "size": len(raw), "platform": {"architecture": "arm64", "os": "linux"}}
    index = json.dumps({"schemaVersion": 2, "mediaType": f"{base}.index.v1+json", "manifests": [entry]}).encode()
    done = door.main.ask("PUT", f"/v2/{name}/manifests/1.1", index, "root", Content_Type=f"{base}.index.v1+json")
    assert done.status == 201, done.body
    return digest
