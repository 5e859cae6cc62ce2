"""Starts Debian's docker-registry on a free port with a data directory: an upstream that is not our own server.

with registry(tmp_path / "data") as running: running.url, running.host
"""

from __future__ import annotations

import shutil
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.conftest import find_port

BINARY = "docker-registry"


@dataclass(frozen=True)
class Running:
    """A started registry: its URL, host:port, log file and process."""

    url: str
    host: str
    log: Path
    process: subprocess.Popen[bytes]


@contextmanager
def registry(data: Path, port: int = 0) -> Iterator[Running]:
    """Runs docker-registry until the block ends; the log holds one line for each request."""
    binary = shutil.which(BINARY)
    if binary is None:
        raise RuntimeError(f"{BINARY} is not installed; do: apt-get install docker-registry")
    port = port or find_port()
    data.mkdir(parents=True, exist_ok=True)
    config, log = data / "config.yml", data / "registry.log"
    config.write_text(
        "version: 0.1\n"
        f"storage: {{filesystem: {{rootdirectory: '{data / 'store'}'}}, delete: {{enabled: true}}}}\n"
        f"http: {{addr: '127.0.0.1:{port}'}}\n"
        "log: {accesslog: {disabled: false}, level: info}\n"
    )
    with log.open("ab") as out:
        process = subprocess.Popen([binary, "serve", str(config)], stdout=out, stderr=subprocess.STDOUT)
    try:
        _wait(f"http://127.0.0.1:{port}/v2/", process, log)
        yield Running(f"http://127.0.0.1:{port}", f"127.0.0.1:{port}", log, process)
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    until = time.monotonic() + 20
    while time.monotonic() < until and process.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=2):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.05)
    raise RuntimeError(f"docker-registry did not start: {log.read_text(errors='replace')[-2000:]}")
