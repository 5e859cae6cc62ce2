"""A whole start as its front tells it, with a real registry and a scripted engine: why this profile, callers' keys, a warm start that asks nobody."""

from __future__ import annotations

import contextlib
import http.client
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT, airlock, stop
from tests.fakes.nvml import host
from tests.flows.test_runtime_cache import Node, node
from tests.flows.test_runtime_watch import CHAT, MODEL, Running, Site, pushed
from tests.operated import wait_for

pytestmark = [pytest.mark.server, pytest.mark.timeout(300)]
__all__ = ["node"]


@pytest.fixture
def site(tmp_path: Path, start_registry: Any) -> Site:
    """A site with one promoted model."""
    return pushed(tmp_path, start_registry(), "90d")


def _ask(running: Running, key: str, path: str = "/v1/chat/completions") -> tuple[int, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", running.port, timeout=30)
    body = {**CHAT, "input": "x"} if path == "/v1/responses" else CHAT
    body = {k: v for k, v in body.items() if path != "/v1/responses" or k != "messages"}
    connection.request("POST", path, json.dumps(body), {"Authorization": f"Bearer {key}"} if key else {})
    answer = connection.getresponse()
    found = json.loads(answer.read())
    connection.close()
    return answer.status, found


def test_the_front_tells_what_was_chosen_and_why(site: Site) -> None:
    with site.serving() as running:
        found = running.ask("GET", "/v1/metadata")[1]
        assert found["airlock"]["selected"] and found["airlock"]["profile_digest"].startswith("sha256:")
        assert found["airlock"]["model_digest"].startswith("sha256:") and found["modelInfo"][0]["shortName"] == MODEL
        told = json.loads(running.ask("GET", "/v1/manifest")[1]["manifest_file"])
        assert told["profiles"][0]["id"] == found["profile_id"]
        assert running.ask("GET", "/v1/license")[0] == 404
        page = running.ask("GET", "/metrics")[1]
        for name in ('airlock_cache_bytes{of="model"}', "airlock_cache_free_bytes", 'airlock_days_left{of="key"}', "airlock_lease_state", "vllm:"):
            assert name in page, page


def test_callers_need_a_key_with_a_grant_to_run_the_model(site: Site) -> None:
    runs = site.server.make_key(models=("acme/*",), actions="run")
    pulls = site.server.make_key(models=("acme/*",), actions="pull")
    other = site.server.make_key(models=("other/*",), actions="run")
    with site.serving(AIRLOCK_CALLER_KEYS="1") as running:
        assert _ask(running, runs)[0] == 200
        for key, status in (("", 401), ("nvapi-" + "x" * 40, 401), (pulls, 403), (other, 403)):
            found, body = _ask(running, key)
            assert found == status and body["error"]["code"] == status and (not key or key not in str(body)), body
        assert running.ask("GET", "/v1/health/ready")[0] == 200 and running.ask("GET", "/v1/models")[0] == 200
        # Responses are their caller's alone: another one with the same rights gets 404.
        mine = _ask(running, runs, "/v1/responses")[1]["id"]
        again = site.server.make_key(models=("acme/*",), actions="run")
        for key, method, more, status in (
            (again, "GET", "", 404),
            (again, "POST", "/cancel", 404),
            (again, "DELETE", "", 404),
            (runs, "GET", "", 200),
            (runs, "POST", "/cancel", 400),  # it ran in the foreground
            (runs, "DELETE", "", 200),
        ):
            connection = http.client.HTTPConnection("127.0.0.1", running.port, timeout=30)
            connection.request(method, f"/v1/responses/{mine}{more}", headers={"Authorization": f"Bearer {key}"})
            assert connection.getresponse().status == status, (method, more)
        smoke = ("runtime", "smoke", "--url", f"http://127.0.0.1:{running.port}", "--levels", "1", "--each", "1", "--slo", "tok_s=0.1")
        assert airlock(*smoke, check=False, AIRLOCK_KEY=runs).returncode == 52  # no key is sent unless its variable is named
        assert airlock(*smoke, "--key-env", "CALLER", check=False, CALLER=runs).returncode == 0
        site.down()
        assert _ask(running, runs)[0] == 200  # known a moment ago
        status, body = _ask(running, "nvapi-" + "y" * 40)
        assert status == 503 and "does not answer" in body["message"]
        assert "nvapi" not in running.log.read_text()


@pytest.mark.parametrize(("variable", "text"), [("AIRLOCK_CALLER_KEYS", "enabled"), ("AIRLOCK_MAX_REQUESTS", "0"), ("AIRLOCK_MAX_BODY_MB", "x")])
def test_a_setting_of_the_front_that_makes_no_sense(site: Site, variable: str, text: str) -> None:
    done = site.run("serve", **{variable: text})
    assert done.returncode == 6 and variable in done.stderr and "Traceback" not in done.stderr


def test_a_warm_leased_start_asks_nobody_and_is_ready_soon_after_its_engine(site: Site) -> None:
    with site.serving():
        pass
    up = site.folder / "up"
    engine = site.folder / "engine" / "bin" / "vllm"
    engine.write_text(engine.read_text().replace('"$@"', f'"$@" --fake-up {up}'))
    before = site.server.log.read_text()
    assert "/airlock/v1/leases" in before  # the log does tell of requests

    def late() -> float:
        return time.time() - float(up.read_text())

    def soon(**env: str) -> bool:
        with site.serving(**env):
            return late() < 1.5  # a second, and half of one for the test's own polling

    with site.serving(AIRLOCK_OFFLINE="1") as running:
        first = late()
        assert running.ask("POST", "/v1/chat/completions", CHAT)[0] == 200
        time.sleep(2.5)  # two looks of the watch
        assert site.server.log.read_text() == before
    # Whatever else the machine does holds up one start, and not each of three.
    assert first < 1.5 or soon(AIRLOCK_OFFLINE="1") or soon(AIRLOCK_OFFLINE="1"), first
    # With the registry: its requests come before the engine's start, and hold up nothing behind it.
    assert soon() or soon() or soon()


ENGINE = """#!/bin/sh
while [ $# -gt 0 ]; do [ "$1" = --uds ] && uds="$2"; shift; done
sed -i 's/^free=.*/free=20000000000/' {config}
exec {python} {fake} serve model --served-model-name acme/tiny --uds "$uds"
"""


def test_the_page_tells_the_gpus_memory_before_the_engine_and_at_its_peak(node: Node, nvml: Path, tmp_path: Path) -> None:
    promise = {"tok_s": 2500, "concurrency": 16, "hardware": "1x H100", "source": "a bench"}
    node.profiles = [{"tags": {"llm_engine": "vllm", "precision": "bf16", "tp": "1"}, "memory": {"weights_bytes": 1 << 30}, "expected": promise}]
    node.files["LICENSE"] = b"Apache License, Version 2.0"
    node.publish()
    config = tmp_path / "gpus.cfg"
    config.write_text(host("h100"))
    program = node.folder / "engine" / "bin" / "vllm"
    program.write_text(ENGINE.format(config=config, python=sys.executable, fake=ROOT / "tests" / "fakes" / "engine.py"))
    log, port = tmp_path / "runtime.log", int(node.env["NIM_HTTP_API_PORT"])
    env = node.env | {"LD_LIBRARY_PATH": str(nvml), "FAKE_NVML_CONFIG": str(config)}
    with log.open("wb") as out:
        process = subprocess.Popen(node.command("serve"), env=env, stdout=out, stderr=out)
    running = Running(process, port, log)

    def told() -> bool:
        assert process.poll() is None, log.read_text()
        with contextlib.suppress(OSError):
            return 'of="peak"} 65520809984' in running.ask("GET", "/metrics")[1]
        return False

    try:
        wait_for(told, "the second look at the GPU", 60)
        wait_for(lambda: running.ask("GET", "/v1/health/ready")[0] == 200, "the engine", 60)
        page = running.ask("GET", "/metrics")[1]
        own = 'airlock_gpu_memory_bytes{gpu="0",uuid="GPU-00000000-0000-0000-0000-000000000000"'
        assert f'{own},of="idle"}} {600 << 20}' in page and f'{own},of="used"}} 65520809984' in page
        found = running.ask("GET", "/v1/metadata")[1]
        assert found["airlock"]["expected"] == promise and found["airlock"]["simulated"] is True
        assert found["licenseInfo"]["content"] == running.ask("GET", "/v1/license")[1]["content"] == "Apache License, Version 2.0"
        done = airlock("runtime", "smoke", "--url", f"http://127.0.0.1:{port}", "--levels", "1,16", "--each", "1", check=False)
        assert "GPU GPU-00000000-0000-0000-0000-000000000000: idle 0.59 GiB, peak 61.02 GiB, total 79.65 GiB" in done.stdout, done
        assert "expected by the profile: ttft" not in done.stdout and "tok_s 2500" in done.stdout and "(source: a bench)" in done.stdout
    finally:
        assert stop(process) == 0, log.read_text()
