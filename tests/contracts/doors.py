"""A real registry process over a fresh data directory, with keys of two organisations, for the tests of the doors."""

from __future__ import annotations

import base64
import hashlib
import http.client
import json
import os
import pwd
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from artifact.grant import Grant
from registry.catalog import ensure_org
from registry.home import Home
from registry.settings import Settings
from registry.wiring import open_site
from tests.services import postgres

MANIFEST = "application/vnd.oci.image.manifest.v1+json"
INDEX = "application/vnd.oci.image.index.v1+json"
EMPTY = "application/vnd.oci.empty.v1+json"
KEYS: dict[str, tuple[str, tuple[str, ...], tuple[str, ...], float]] = {
    "acme": ("acme", ("acme/**", "hf/**"), ("pull", "push", "run", "admin"), 86400),
    "reader": ("acme", ("acme/open/*",), ("pull",), 86400),
    "other": ("other", ("other/**",), ("pull", "push"), 86400),
    "expired": ("acme", ("acme/**",), ("pull",), -60),
}


def sha(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


@dataclass
class Answer:
    """One HTTP answer, read whole."""

    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def code(self) -> str:
        return str(self.json()["errors"][0]["code"])


@dataclass
class Door:
    """A running registry and its keys."""

    data: Path
    process: subprocess.Popen[str]
    port: int
    keys: dict[str, str]
    log: Path
    made: set[str] = field(default_factory=set)
    wait_s: float = 30  # for each part of an answer

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=self.wait_s)

    def ask(self, method: str, path: str, body: Any = None, who: str | None = "acme", basic: bool = False, **headers: str) -> Answer:
        given = {k.replace("_", "-"): v for k, v in headers.items()}
        if who:
            key = self.keys[who]
            given["Authorization"] = "Basic " + base64.b64encode(f"$oauthtoken:{key}".encode()).decode() if basic else f"Bearer {key}"
        connection = self.connect()
        try:
            connection.request(method, path, body=body, headers=given, encode_chunked="Transfer-Encoding" in given)
            answer = connection.getresponse()
            return Answer(answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read())
        finally:
            connection.close()

    def blob(self, repo: str, data: bytes, who: str = "acme") -> str:
        found = self.ask("POST", f"/v2/{repo}/blobs/uploads/?digest={sha(data)}", data, who)
        assert found.status == 201, found.body
        return sha(data)

    def image(self, repo: str, ref: str, layers: list[bytes], who: str = "acme", **extra: Any) -> tuple[str, bytes]:
        """Pushes a small artifact and returns its digest and raw manifest."""
        self.blob(repo, b"{}", who)
        doc: dict[str, Any] = {"schemaVersion": 2, "mediaType": MANIFEST, "config": {"mediaType": EMPTY, "digest": sha(b"{}"), "size": 2}}
        doc["layers"] = [{"mediaType": "application/octet-stream", "digest": self.blob(repo, d, who), "size": len(d)} for d in layers]
        raw = json.dumps(doc | extra).encode()
        found = self.ask("PUT", f"/v2/{repo}/manifests/{ref or sha(raw)}", raw, who, Content_Type=MANIFEST)
        assert found.status == 201, found.body
        return sha(raw), raw


def new_site(data: Path, **env: str) -> dict[str, str]:
    """Makes the data directory with the keys above and returns the keys; settings from `env` too.

    With AIRLOCK_TEST_DATABASE=postgresql every site gets a database of the run's PostgreSQL instead of SQLite, by its settings file.
    """
    Home.open(data, create=True)
    if os.environ.get("AIRLOCK_TEST_DATABASE") == "postgresql" and "AIRLOCK_DATABASE" not in env:
        (data / "registry.yaml").write_text(f"database: {postgres.shared().database()}\n")
    keys = {}
    now = time.time()
    with open_site(Settings.load(data, environ={**os.environ, **env}), background=False) as site, site.catalog.writing() as conn:
        for name, (org, models, actions, life) in KEYS.items():
            grant = Grant(models, actions)
            org_id = ensure_org(conn, org, now)
            keys[name] = site.entitlements.add_key(conn, org_id, tier="enterprise", grant=grant, expires=now + life, at=now + min(life, 0) - 1)[1]
    return keys


@contextmanager
def serving(data: Path, keys: dict[str, str], *, user: str | None = None, **env: str) -> Iterator[Door]:
    """Starts `airlock registry serve` on a free port and stops it by SIGTERM; as another user only where the tests run as root."""
    log = data.parent / f"{data.name}.log"
    airlock = Path(sys.executable).parent / "airlock"
    argv = [str(airlock), "registry", "serve", "--data", str(data), "--port", "0"]
    with log.open("a") as err:
        given = {**os.environ, "AIRLOCK_DRAIN_TIMEOUT_S": "2", **env}
        other = {"user": user, "group": pwd.getpwnam(user).pw_gid, "extra_groups": ()} if user else {}
        process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=err, text=True, env=given, **other)
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        assert line.startswith("listening on http://127.0.0.1:"), line + log.read_text()
        yield Door(data, process, int(line.rsplit(":", 1)[1]), keys, log)
    finally:
        process.terminate()
        process.wait(20)
        process.stdout.close()
