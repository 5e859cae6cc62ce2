"""A registry process as an operator runs it: with its own listener for health and metrics, TLS or not, ended by hand."""

from __future__ import annotations

import http.client
import json
import os
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tests.contracts.doors import Door

LONG_S = 120


def wait_for(wanted: Callable[[], Any], what: str, seconds: float = LONG_S) -> Any:
    """Polls until `wanted` gives something true, and returns it."""
    end = time.monotonic() + seconds
    while True:
        found = wanted()
        if found:
            return found
        assert time.monotonic() < end, f"{what}: not within {seconds} s"
        time.sleep(0.05)


@dataclass
class Operated(Door):
    """A running registry with what it told at its start."""

    told: dict[str, str] | None = None

    @property
    def url(self) -> str:
        assert self.told
        return self.told["listening"]

    def connect(self) -> http.client.HTTPConnection:
        """To the listener as it speaks: with its own certificate trusted, where it has one."""
        return self.secured(self.data / "tls" / "cert.pem") if self.url.startswith("https://") else super().connect()

    def operator(self, path: str) -> tuple[int, str]:
        """Status and text of a path of the operator's listener."""
        assert self.told
        try:
            with urllib.request.urlopen(self.told["metrics"] + path, timeout=30) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def figures(self) -> dict[str, float]:
        """Every sample of /metrics by its name and labels."""
        lines = self.operator("/metrics")[1].splitlines()
        return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if line and not line.startswith("#")}

    def lines(self) -> list[dict[str, Any]]:
        """The log, one object a line."""
        return [json.loads(line) for line in self.log.read_text().splitlines()]

    def secured(self, ca: Path) -> http.client.HTTPSConnection:
        """A connection over TLS that trusts one file."""
        context = ssl.create_default_context(cafile=str(ca))
        return http.client.HTTPSConnection("127.0.0.1", self.port, context=context, timeout=30)

    def ended(self) -> int:
        """Waits for the process and returns its status."""
        return self.process.wait(LONG_S)


@contextmanager
def operated(data: Path, keys: dict[str, str], *argv: str, **env: str) -> Iterator[Operated]:
    """Starts `airlock registry serve --json` on free ports with an operator's listener; kills it at the end if the test did not end it."""
    log = data.parent / f"{data.name}.log"
    given = {k: v for k, v in os.environ.items() if not k.startswith(("AIRLOCK_", "OTEL_"))}
    given |= {"AIRLOCK_METRICS": "127.0.0.1:0", "AIRLOCK_DRAIN_TIMEOUT_S": "300", **env}
    command = [str(Path(sys.executable).parent / "airlock"), "registry", "serve", "--data", str(data), "--port", "0", "--json", *argv]
    with log.open("a") as err:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=err, text=True, env=given)
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        assert line.startswith("{"), line + log.read_text()
        told = json.loads(line)
        yield Operated(data, process, int(urlsplit(told["listening"]).port or 0), keys, log, told=told)
    finally:
        if process.poll() is None:
            process.kill()
        process.wait(20)
        process.stdout.close()
