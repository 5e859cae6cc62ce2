"""Fixtures for all tests: real processes, real sockets, free ports; nothing here imports what it tests."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import pytest

from tests.fakes import nvml as stand_in

ROOT = Path(__file__).resolve().parent.parent
AIRLOCK = Path(sys.executable).parent / "airlock"
ENGINE = ROOT / "build" / "engines" / "vllm"
READY_S = 60


def missing(what: str) -> NoReturn:
    """Skips for an absent component on a developer's machine; fails under CI, where everything must be there."""
    if os.environ.get("CI"):
        pytest.fail(f"{what} is missing, and CI is set")
    pytest.skip(f"{what} is missing; do: make system-full engine, and test as root")


def need_root() -> None:
    """Skips, or fails under CI, where the tests may neither mount nor become another user."""
    if os.geteuid() != 0:
        missing("root")


def airlock(*argv: str, check: bool = True, timeout: float = 120, **env: str) -> subprocess.CompletedProcess[str]:
    """Runs one airlock command to its end, with extra environment variables."""
    done = subprocess.run([str(AIRLOCK), *argv], capture_output=True, text=True, timeout=timeout, env={**os.environ, **env}, check=False)
    assert not check or done.returncode == 0, f"airlock {' '.join(argv)} -> {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def find_port() -> int:
    """A TCP port of the loopback that was free a moment ago; none of those from which the kernel takes one for each connection that goes out."""
    while True:
        with socket.socket() as s, contextlib.suppress(OSError):
            s.bind(("127.0.0.1", 20_000 + secrets.randbelow(12_000)))
            return int(s.getsockname()[1])


def wait_http(url: str, process: subprocess.Popen[bytes], log: Path, timeout: float = READY_S) -> None:
    """Waits until `url` answers with any HTTP status; fails with the process's log when it ends or stays silent."""
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        assert process.poll() is None, f"the server ended with {process.returncode}:\n{log.read_text()[-4000:]}"
        try:
            urllib.request.urlopen(url, timeout=2).close()
            return
        except urllib.error.HTTPError:
            return
        except OSError:
            time.sleep(0.05)
    pytest.fail(f"{url} did not answer in {timeout} s:\n{log.read_text()[-4000:]}")


def stop(process: subprocess.Popen[bytes], timeout: float = 20) -> int:
    """Ends a process that a test started, first politely, and returns its status."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    try:
        return process.wait(timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


@dataclass
class RegistryServer:
    """A running `airlock registry serve`: its address, data directory, log, and how to make keys."""

    url: str
    data: Path
    log: Path
    process: subprocess.Popen[bytes]
    port: int
    extra: dict[str, str] = field(default_factory=dict)

    @property
    def address(self) -> str:
        """host:port, as OCI clients want it."""
        return self.url.removeprefix("http://")

    def make_key(
        self, org: str = "acme", tier: str = "enterprise", models: tuple[str, ...] = ("**",), expires: str = "90d", actions: str = "pull,push,run"
    ) -> str:
        """Makes an API key through the command line and returns its secret."""
        return str(self.make_key_row(org, tier, models, expires, actions)["key"])

    def make_key_row(
        self, org: str = "acme", tier: str = "enterprise", models: tuple[str, ...] = ("**",), expires: str = "90d", actions: str = "pull,push,run"
    ) -> dict[str, object]:
        """The whole answer of `airlock key create --json`."""
        patterns = [part for m in models for part in ("--models", m)]
        argv = [
            "key",
            "create",
            "--data",
            str(self.data),
            "--org",
            org,
            "--tier",
            tier,
            *patterns,
            "--expires",
            expires,
            "--actions",
            actions,
            "--json",
        ]
        answer = json.loads(airlock(*argv).stdout)
        assert isinstance(answer, dict)
        return answer


@pytest.fixture(scope="session", autouse=True)
def reachable(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Where the tests run as root, what lies above their folders lets other users through: some tests become one, however many workers there are."""
    base = tmp_path_factory.getbasetemp()
    for folder in (base, *base.parents) if os.geteuid() == 0 else ():
        if folder.stat().st_mode & 0o055 != 0o055:
            folder.chmod(folder.stat().st_mode | 0o055)


@pytest.fixture
def free_port() -> int:
    """A free TCP port."""
    return find_port()


@pytest.fixture(scope="session")
def trust_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `1.root.json` of a throw-away mirror, which `site init` pins."""
    home = tmp_path_factory.mktemp("mirror") / "home"
    airlock("mirror", "init", "--home", str(home))
    found = sorted(home.rglob("1.root.json"))
    assert found, f"mirror init made no 1.root.json under {home}"
    return found[0]


@pytest.fixture
def start_registry(tmp_path: Path, trust_root: Path) -> Iterator[Callable[..., RegistryServer]]:
    """A function that starts registries on free ports and fresh data (or the `data` given); all are ended with the test."""
    running: list[RegistryServer] = []

    def start(data: Path | None = None, port: int = 0, **env: str) -> RegistryServer:
        where = data or tmp_path / f"site{len(running)}"
        if not where.exists():
            airlock("site", "init", "--data", str(where), "--trust-root", str(trust_root))
        number = port or find_port()
        log = tmp_path / f"registry-{number}.log"
        argv = [str(AIRLOCK), "registry", "serve", "--data", str(where), "--port", str(number)]
        with log.open("ab") as out:
            process = subprocess.Popen(argv, stdout=out, stderr=out, env={**os.environ, **env})
        server = RegistryServer(f"http://127.0.0.1:{number}", where, log, process, number)
        running.append(server)
        wait_http(server.url + "/healthz", process, log)
        return server

    yield start
    for server in running:
        stop(server.process)


@pytest.fixture(scope="session")
def engine_env() -> Path:
    """The engine environment (`make engine`); AIRLOCK_ENGINE_VLLM overrides the place."""
    path = Path(os.environ.get("AIRLOCK_ENGINE_VLLM", str(ENGINE)))
    if not (path / "bin" / "python").exists():
        missing(f"the engine environment {path}")
    return path


@pytest.fixture(scope="session")
def tool() -> Callable[[str], str]:
    """A function that finds an outside program (skopeo, docker-registry, …), or skips (fails under CI)."""

    def find(name: str) -> str:
        found = shutil.which(name) or shutil.which(name, path=str(AIRLOCK.parent))
        if not found:
            missing(name)
        return found

    return find


@pytest.fixture(scope="session")
def nvml(tool: Callable[[str], str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the stand-in libnvidia-ml.so.1, which a C compiler builds here."""
    return stand_in.build(tool("cc"), tmp_path_factory.mktemp("nvml"))
