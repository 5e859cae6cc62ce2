"""The main job as steps that tests can start, watch, kill and repeat: push, sync, pack, import, runtime pull of one model of random bytes."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sqlite3
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.conftest import AIRLOCK, RegistryServer, airlock

PIECE = 64 * 1024 * 1024
MODEL = "acme/big"


def random_model(folder: Path, size: int) -> Path:
    """A model directory with one file of `size` random bytes, a small one and a profile file beside it."""
    folder.mkdir(parents=True)
    with (folder / "weights.gguf").open("wb") as out:
        left = size
        while left:
            left -= out.write(os.urandom(min(left, 1 << 20)))
    (folder / "config.json").write_text('{"model_type": "random"}')
    tags = {"llm_engine": "vllm", "precision": "bf16", "tp": "1", "device": "cpu"}
    (folder.parent / "profiles.json").write_text(json.dumps({"profiles": [{"tags": tags, "options": {"task": "generate"}}]}))
    return folder


@dataclass
class Step:
    """One command of the story: its arguments, environment, whose write counter moves, and what must not be there before it ends."""

    name: str
    argv: list[str]
    env: dict[str, str]
    unfinished: Callable[[], bool]
    watched: int = 0  # 0: the command itself, else the process whose writes show the progress


@dataclass
class Story:
    """Both sides of the gap in one folder."""

    base: Path
    model: Path
    start: Callable[..., RegistryServer]
    env: dict[str, str] = field(default_factory=dict)
    connected: RegistryServer | None = None
    closed: RegistryServer | None = None

    @property
    def home(self) -> Path:
        return self.base / "mirror"

    @property
    def medium(self) -> Path:
        return self.base / "medium"

    @property
    def data(self) -> Path:
        return self.base / "closed"

    @property
    def cache(self) -> Path:
        return self.base / "cache"

    def steps(self) -> Iterator[Step]:
        """The five steps in order; what a step needs is set up before it is yielded, so run each before taking the next."""
        self.base.mkdir(parents=True, exist_ok=True)
        airlock("mirror", "init", "--home", str(self.home))
        source = self.connected = self.start(self.base / "connected-site")
        key = source.make_key(models=("acme/*",), actions="pull,push")
        env = {"AIRLOCK_KEY": key, "AIRLOCK_UPSTREAM_KEY": key, "XDG_STATE_HOME": str(self.base / "state"), "HOME": str(self.base / "home")}
        profiles = str(self.model.parent / "profiles.json")
        argv = ["model", "push", str(self.model), f"{MODEL}:1", "--registry", source.url, "--profiles", profiles]
        yield Step("push", argv, env, lambda: self._rows(source.data, "ref") == 0, source.process.pid)
        plan = self.base / "plan.yaml"
        item = {"source": f"oci://{source.address}/{MODEL}:1", "as": MODEL, "plain_http": True, "key_env": "AIRLOCK_UPSTREAM_KEY"}
        plan.write_text(json.dumps({"items": [item]}))
        argv = ["mirror", "sync", str(plan), "--home", str(self.home), "--json"]
        yield Step("sync", argv, env, lambda: not self._named(self.home))
        argv = ["bundle", "pack", "--to", str(self.medium), "--home", str(self.home), "--json"]
        yield Step("pack", argv, {}, lambda: not (self.medium / "metadata" / "timestamp.json").exists())
        root = next(iter(sorted(self.home.rglob("1.root.json"))))
        airlock("site", "init", "--data", str(self.data), "--trust-root", str(root))
        argv = ["bundle", "import", str(self.medium), "--data", str(self.data), "--json"]
        yield Step("import", argv, {}, lambda: self._rows(self.data, "ref") == 0)
        airlock("promote", f"{MODEL}:1", "--data", str(self.data))
        closed = self.closed = self.start(self.data)
        trust = self.base / "site-trust.json"
        airlock("site", "trust", "--data", str(self.data), "--to", str(trust))
        env = {
            "NGC_API_KEY": closed.make_key(models=("acme/*",), actions="pull,run"),
            "AIRLOCK_REGISTRY": closed.url,
            "AIRLOCK_TRUST": str(trust),
            "NIM_CACHE_PATH": str(self.cache),
        }
        yield Step(
            "pull",
            ["runtime", "download-to-cache", "--model", f"{MODEL}:1"],
            env,
            lambda: not list(self.cache.glob("models/acme/big/*/weights.gguf")),
        )

    def run(self, step: Step, timeout: float = 600) -> subprocess.CompletedProcess[str]:
        """Runs a step to its end; it must succeed."""
        return airlock(*step.argv, timeout=timeout, **step.env)

    def spawn(self, step: Step, log: Path) -> subprocess.Popen[bytes]:
        """Starts a step in its own process group."""
        with log.open("ab") as out:
            return subprocess.Popen([str(AIRLOCK), *step.argv], stdout=out, stderr=out, env={**os.environ, **step.env}, process_group=0)

    @staticmethod
    def _rows(data: Path, table: str) -> int:
        db = sqlite3.connect(f"file:{data / 'registry.db'}?mode=ro", uri=True)
        try:
            return int(db.execute(f"select count(*) from {table}").fetchone()[0])
        except sqlite3.OperationalError:
            return 0
        finally:
            db.close()

    @staticmethod
    def _named(home: Path) -> bool:
        return any(MODEL in f.read_text() for f in home.rglob("names.json"))


def tree(folder: Path, inside: tuple[str, ...] = ("blobs", "models")) -> dict[str, str]:
    """Relative path to SHA-256 of every public file below the given subfolders."""
    found = {}
    for sub in inside:
        for path in sorted((folder / sub).rglob("*")):
            if path.is_file() and not path.is_symlink():
                with path.open("rb") as f:
                    found[str(path.relative_to(folder))] = hashlib.file_digest(f, "sha256").hexdigest()
    return found


CONTENT = {
    "repository": "select name, kind, visibility from repository order by 1",
    "ref": "select r.name, ref.name, ref.kind, m.digest from ref join repository r on r.id = repo_id join manifest m on m.id = manifest_id"
    " order by 1, 2, 3",
    "manifest": "select digest, media_type, artifact_type, size, raw from manifest order by 1",
    "edge": "select m.digest, child_digest, kind from edge join manifest m on m.id = parent_id order by 1, 2, 3",
    "repo_blob": "select r.name, digest from repo_blob join repository r on r.id = repo_id order by 1, 2",
    "blob": "select digest, size, location from blob order by 1",
    "file": "select m.digest, path, f.digest, f.size, lfs from file f join manifest m on m.id = manifest_id order by 1, 2",
    "upload": "select count(*) from upload",
}


def rows(data: Path) -> dict[str, list[tuple[object, ...]]]:
    """The content of a registry's database, without row ids and times."""
    db = sqlite3.connect(f"file:{data / 'registry.db'}?mode=ro", uri=True)
    try:
        return {table: [tuple(r) for r in db.execute(sql)] for table, sql in CONTENT.items()}
    finally:
        db.close()


def forget(story: Story) -> None:
    """Removes the big folders of a finished story."""
    for folder in (story.home / "staging", story.medium, story.cache, story.data, story.base / "connected-site"):
        shutil.rmtree(folder, ignore_errors=True)
