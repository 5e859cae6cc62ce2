"""The stand-in Hub is believed only because the unmodified `hf` client downloads from it and finds the bytes whole."""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

FAKE = Path(__file__).parents[1] / "fakes" / "hub.py"
HF = Path(sys.executable).parent / "hf"
TOKEN = "hf_testtokentesttokentesttoken"
pytestmark = pytest.mark.server


@dataclass(frozen=True)
class Running:
    """A started stand-in: where it listens and what it logged."""

    endpoint: str
    cdn: str
    log: Path
    process: subprocess.Popen[str]

    def requests(self) -> list[dict]:
        """The request log so far."""
        return [json.loads(line) for line in self.log.read_text().splitlines()] if self.log.exists() else []


@contextmanager
def hub(root: Path, log: Path, *options: str) -> Iterator[Running]:
    """Starts the stand-in Hub and ends it."""
    argv = [sys.executable, str(FAKE), "--root", str(root), "--port", "0", "--token", TOKEN, "--log", str(log), *options]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        words = process.stdout.readline().split()
        yield Running(words[2], words[4], log, process)
    finally:
        process.kill()
        process.wait()


def make_repo(root: Path, repo_id: str = "Acme/Tiny-Llama", weights: int = 3_000_000, **meta: object) -> Path:
    """A small repository with a card, a nested file and one LFS file of seeded random bytes."""
    folder = root / repo_id
    (folder / "sub").mkdir(parents=True)
    (folder / "README.md").write_text("---\nlicense: mit\ntags: [tiny, test]\n---\n# Tiny\n")
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "sub" / "note with space.txt").write_text("nested")
    (folder / "empty.txt").write_bytes(b"")
    (folder / "model.safetensors").write_bytes(random.Random(repo_id).randbytes(weights))
    if meta:
        (folder / "meta.json").write_text(json.dumps(meta))
    return folder


def hf(endpoint: str, home: Path, *argv: str, token: str = "") -> subprocess.CompletedProcess[str]:
    """Runs the unmodified client with an empty home."""
    env = {"PATH": os.environ["PATH"], "HOME": str(home), "HF_HOME": str(home / "hf"), "HF_ENDPOINT": endpoint}
    if token:
        env["HF_TOKEN"] = token
    return subprocess.run([str(HF), *argv], env=env, capture_output=True, text=True, timeout=120)


def same_files(folder: Path, local: Path) -> None:
    for path in (p for p in folder.rglob("*") if p.is_file() and p.name != "meta.json"):
        assert (local / path.relative_to(folder)).read_bytes() == path.read_bytes(), path


@pytest.mark.parametrize("options", [(), ("--redirect",), ("--page", "2")], ids=["direct", "redirect", "paged"])
def test_hf_download_is_byte_exact(tmp_path: Path, options: tuple[str, ...]) -> None:
    folder = make_repo(tmp_path / "repos")
    with hub(tmp_path / "repos", tmp_path / "log", *options) as running:
        done = hf(running.endpoint, tmp_path, "download", "acme/tiny-llama", "--local-dir", str(tmp_path / "out"), token=TOKEN)
        assert done.returncode == 0, done.stderr
        same_files(folder, tmp_path / "out")
        log = running.requests()
    assert {e["status"] for e in log} <= {200, 302}
    trees = [e for e in log if "/tree/" in e["path"]]
    assert len(trees) > 1 if options == ("--page", "2") else len(trees) == 1
    cdn = [e for e in log if e["host"] == "cdn"]
    assert bool(cdn) == (options == ("--redirect",)) and not any(e["authorization"] for e in cdn)


def test_hf_cache_and_whoami(tmp_path: Path) -> None:
    make_repo(tmp_path / "repos")
    with hub(tmp_path / "repos", tmp_path / "log") as running:
        assert hf(running.endpoint, tmp_path, "download", "Acme/Tiny-Llama", token=TOKEN).returncode == 0
        verified = hf(running.endpoint, tmp_path, "cache", "verify", "Acme/Tiny-Llama", token=TOKEN)
        assert verified.returncode == 0, verified.stdout + verified.stderr
        who = hf(running.endpoint, tmp_path, "auth", "whoami", token=TOKEN)
        assert "tester" in who.stdout, who.stdout + who.stderr


def test_refusals_are_those_of_the_hub(tmp_path: Path) -> None:
    make_repo(tmp_path / "repos", "acme/gated", gated="manual", accepted=False)
    make_repo(tmp_path / "repos", "acme/hidden", private=True)
    with hub(tmp_path / "repos", tmp_path / "log") as running:
        for argv, token, words in (
            (("download", "acme/gated"), TOKEN, "requires approval"),
            (("download", "acme/hidden"), "", "not found"),
            (("download", "acme/none"), TOKEN, "not found"),
            (("download", "acme/gated"), "hf_wrongwrongwrongwrong", "Invalid credentials"),
            (("download", "acme/hidden", "--revision", "nope"), TOKEN, "evision"),
            (("download", "acme/hidden", "nope.txt"), TOKEN, "nope.txt"),
        ):
            done = hf(running.endpoint, tmp_path / "h", *argv, token=token)
            assert done.returncode != 0 and words in done.stdout + done.stderr, (argv, done.stdout, done.stderr)


def test_range_and_the_second_host(tmp_path: Path) -> None:
    folder = make_repo(tmp_path / "repos")
    with hub(tmp_path / "repos", tmp_path / "log", "--redirect") as running:
        url = f"{running.endpoint}/Acme/Tiny-Llama/resolve/main/model.safetensors"
        ask = urllib.request.Request(url, headers={"Range": "bytes=10-19"})
        with urllib.request.urlopen(ask) as answer:  # no Authorization: accepted by the second host
            assert (answer.status, answer.headers["Content-Range"]) == (206, "bytes 10-19/3000000")
            assert answer.read() == (folder / "model.safetensors").read_bytes()[10:20]
        leaky = urllib.request.Request(url, headers={"Authorization": f"Bearer {TOKEN}"})  # urllib carries it along: refused there
        with pytest.raises(urllib.error.HTTPError, match="400"):
            urllib.request.urlopen(leaky)
        log = running.requests()
    assert [e["sent"] for e in log if e["host"] == "cdn" and e["status"] == 206] == [10]
    assert hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest() not in json.dumps(log)
