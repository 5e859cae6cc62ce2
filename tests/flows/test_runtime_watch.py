"""Entitlement over the life of a runtime, a real registry, a scripted engine: the five faults, renewal, absence, revocation, return."""

from __future__ import annotations

import contextlib
import datetime
import http.client
import ipaddress
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import AIRLOCK, ROOT, RegistryServer, airlock, find_port, stop
from tests.fakes.tls import authority, leaf, serving_tls
from tests.operated import wait_for

pytestmark = [pytest.mark.server, pytest.mark.timeout(300)]
MODEL = "acme/tiny:1"
CHAT = {"model": "acme/tiny", "messages": [{"role": "user", "content": "hi"}]}
SEED_LINE = "NGC authentication failed"


@dataclass
class Running:
    """A runtime that serves, with its log."""

    process: subprocess.Popen[bytes]
    port: int
    log: Path

    def ask(self, method: str, path: str, body: object = None) -> tuple[int, Any, dict[str, str]]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        try:
            connection.request(method, path, json.dumps(body) if body else None)
            answer = connection.getresponse()
            text = answer.read().decode()
            headers = {k.lower(): v for k, v in answer.getheaders()}
        finally:
            connection.close()
        return answer.status, json.loads(text) if text.startswith("{") else text, headers

    def ready(self) -> dict[str, Any]:
        """The body of readiness, which must be 200."""
        status, body, _ = self.ask("GET", "/v1/health/ready")
        assert status == 200, body
        return dict(body)

    def figure(self, name: str) -> float:
        text = self.ask("GET", "/v1/metrics")[1]
        found = re.search(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)
        assert found, (name, text)
        return float(found[1])


@dataclass
class Site:
    """A registry with one promoted model, and a node to run it on."""

    folder: Path
    server: RegistryServer
    key: str
    key_id: str

    @property
    def cache(self) -> Path:
        return self.folder / "cache"

    def env(self, **more: str) -> dict[str, str]:
        given = {
            "NGC_API_KEY": self.key,
            "AIRLOCK_REGISTRY": self.server.url,
            "AIRLOCK_TRUST": str(self.folder / "site-trust.json"),
            "NIM_CACHE_PATH": str(self.cache),
            "AIRLOCK_ENGINE_VLLM": str(self.folder / "engine"),
            "AIRLOCK_HOST": "127.0.0.1",
            "AIRLOCK_INSTANCE": "node-1",
            "AIRLOCK_WATCH_S": "1",
            "AIRLOCK_TIMEOUT_S": "5",
        }
        return given | more

    def run(self, *argv: str, **more: str) -> subprocess.CompletedProcess[str]:
        return airlock("runtime", *argv, "--model", MODEL, check=False, **self.env(**more))

    def check(self, *argv: str, **more: str) -> subprocess.CompletedProcess[str]:
        return airlock("entitlement", "check", *argv, check=False, **self.env(**more))

    @contextmanager
    def serving(self, **more: str) -> Iterator[Running]:
        port, log = find_port(), self.folder / f"runtime-{time.monotonic_ns()}.log"
        argv = [str(AIRLOCK), "runtime", "serve", "--model", MODEL, "--port", str(port)]
        with log.open("ab") as out:
            process = subprocess.Popen(argv, stdout=out, stderr=out, env={**os.environ, **self.env(**more)})
        found = Running(process, port, log)

        def up() -> bool:
            assert process.poll() is None, log.read_text()
            with contextlib.suppress(OSError):
                return found.ask("GET", "/v1/health/ready")[0] == 200
            return False

        try:
            wait_for(up, "the runtime is ready", 60)
            yield found
            assert stop(process) == 0, log.read_text()
        finally:
            stop(process)

    def lease(self) -> dict[str, Any]:
        (path,) = (self.cache / "leases").glob("*.json")
        return dict(json.loads(path.read_text()))

    def down(self) -> None:
        assert stop(self.server.process, 30) == 0

    def events(self, word: str) -> list[dict[str, Any]]:
        """What the audit log has of one event, asked as its auditor asks."""
        key = self.server.make_key(models=("acme/**",), actions="auditor")
        connection = http.client.HTTPConnection("127.0.0.1", self.server.port, timeout=20)
        connection.request("GET", "/airlock/v1/audit?limit=100", headers={"Authorization": f"Bearer {key}"})
        items = json.loads(connection.getresponse().read())["items"]
        return [i for i in items if i["event"] == word]


def pushed(folder: Path, server: RegistryServer, expires: str) -> Site:
    model = folder / "model"
    model.mkdir()
    (model / "config.json").write_text('{"model_type":"llama"}')
    (model / "model.safetensors").write_bytes(os.urandom(5000))
    tags = {"llm_engine": "vllm", "precision": "bf16", "tp": "1", "device": "cpu"}
    (folder / "profiles.json").write_text(json.dumps({"profiles": [{"tags": tags}]}))
    row = server.make_key_row(models=("acme/*",), actions="pull,push,run", expires=expires)
    given = {"AIRLOCK_KEY": str(row["key"])}
    airlock("model", "push", str(model), MODEL, "--registry", server.url, "--profiles", str(folder / "profiles.json"), **given)
    airlock("promote", MODEL, "--data", str(server.data))
    airlock("site", "trust", "--data", str(server.data), "--to", str(folder / "site-trust.json"))
    engine = folder / "engine" / "bin" / "vllm"
    engine.parent.mkdir(parents=True)
    engine.write_text(f'#!/bin/sh\nexec {sys.executable} {ROOT / "tests" / "fakes" / "engine.py"} "$@"\n')
    engine.chmod(0o755)
    return Site(folder, server, str(row["key"]), str(row["key_id"]))


@pytest.fixture
def site(tmp_path: Path, start_registry: Any) -> Site:
    """A site whose leases live for a minute: they are renewed after nine seconds."""
    return pushed(tmp_path, start_registry(AIRLOCK_LEASE_LIFE_S="60", AIRLOCK_LEASE_GRACE_S="3600"), "90d")


@pytest.fixture
def daily(tmp_path: Path, start_registry: Any) -> Site:
    """A site with the lives that are preset, and a key that ends soon."""
    return pushed(tmp_path, start_registry(), "5d")


# ---- the five faults


@contextmanager
def fault(kind: str, folder: Path) -> Iterator[dict[str, str]]:
    """The settings under which a registry cannot be reached in this way, really."""
    if kind == "connection_refused":
        yield {"AIRLOCK_REGISTRY": f"http://127.0.0.1:{find_port()}"}
    elif kind == "dns":
        yield {"AIRLOCK_REGISTRY": "http://registry.no-such-site.invalid:5000"}
    elif kind == "timeout":
        with socket.create_server(("127.0.0.1", 0)) as silent:
            yield {"AIRLOCK_REGISTRY": f"http://127.0.0.1:{silent.getsockname()[1]}", "AIRLOCK_TIMEOUT_S": "1"}
    else:
        now, day = datetime.datetime.now(datetime.UTC), datetime.timedelta(days=1)
        ours, other = authority(folder / "ours"), authority(folder / "other")
        begin, end = (now - 9 * day, now - day) if kind == "tls-expired" else (now - day, now + day)
        pair = leaf(ours, folder / "server", ipaddress.ip_address("127.0.0.2" if kind == "tls-name" else "127.0.0.1"), begin, end)
        with serving_tls(pair) as port:
            ca = (other if kind == "tls-stranger" else ours).file
            yield {"AIRLOCK_REGISTRY": f"https://127.0.0.1:{port}", "AIRLOCK_CA_FILE": str(ca)}


FAULTS = {
    "connection_refused": (40, "refuses the connection", "AIRLOCK_REGISTRY"),
    "dns": (41, "does not resolve", "AIRLOCK_REGISTRY"),
    "tls-stranger": (42, "signed by an authority that is not trusted here", "AIRLOCK_CA_FILE"),
    "tls-name": (42, "is for another name than 127.0.0.1", "AIRLOCK_REGISTRY"),
    "tls-expired": (42, "has expired", "renew it"),
    "timeout": (43, "did not answer within 1 s", "network"),
}


def test_each_fault_has_its_text_and_its_exit_code_and_a_stored_lease_carries_a_start(daily: Site) -> None:
    texts = set()
    for kind, (status, words, do) in FAULTS.items():
        with fault(kind, daily.folder) as settings:
            for done in (daily.run("serve", **settings), daily.check(**settings), daily.check("--json", **settings)):
                told = done.stdout + done.stderr
                assert done.returncode == status and words in told and do in told and SEED_LINE not in told, (kind, done)
                assert daily.key not in told and "Traceback" not in told
            nagios = daily.check("--nagios", **settings)
            reason = kind.split("-")[0]
            assert nagios.returncode == 3 and nagios.stdout.startswith(f"UNKNOWN: {reason}: ") and nagios.stdout.count("\n") == 1
            texts.add(words)
    assert len(texts) == 6
    with daily.serving() as first:
        assert first.ready()["warning"].startswith("the API key ends on ")
    for kind, (_, words, _) in FAULTS.items():
        with fault(kind, daily.folder) as settings, daily.serving(**settings) as warm:
            log = warm.log.read_text()
            loud = re.search(r"^(\w+) .*" + re.escape(words), log, re.MULTILINE)
            assert loud and loud[1] == ("ERROR" if kind.startswith("tls") else "WARNING"), log
            assert "Lease " in log and warm.ask("POST", "/v1/chat/completions", CHAT)[0] == 200


def in_seconds(seconds: int) -> str:
    return (datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=seconds)).strftime("%Y-%m-%dT%H:%M:%SZ")


def test_an_expired_subscription_is_another_fault_than_all_of_them(daily: Site) -> None:
    """A grant, a key and an entitlement that are over at a registry that answers."""
    data = ("--data", str(daily.server.data))
    airlock("org", "member", "create", "ci", "--org", "acme", "--kind", "robot", *data)
    created = airlock(
        "key", "create", "--org", "acme", "--member", "ci", "--type", "runtime", "--tier", "enterprise", "--expires", "90d", "--json", *data
    )
    robot = str(json.loads(created.stdout)["key"])
    key = ("key", "create", "--org", "acme", "--models", "acme/*", "--actions", "pull,run", "--json", *data)
    short = str(json.loads(airlock(*key, "--expires", in_seconds(20)).stdout)["key"])
    airlock("grant", "create", "--org", "acme", "--member", "ci", "--models", "acme/*", "--actions", "pull,run", "--expires", in_seconds(15), *data)
    airlock("catalog", "require", "acme/tiny", "--tier", "enterprise", *data)
    issue = ("entitlement", "issue", "--org", "acme", "--tier", "enterprise", "--models", "acme/*", "--gpus", "8", *data)
    airlock(*issue, "--expires", in_seconds(15))
    time.sleep(21)
    cases = {
        "key_expired": (22, short, "the API key expired on"),
        "entitlement_expired": (27, daily.key, "the entitlement of acme expired on"),
    }
    for reason, (status, secret, words) in cases.items():
        started = daily.run("serve", NGC_API_KEY=secret)
        assert started.returncode == status and words in started.stderr and SEED_LINE in started.stderr, started
        checked = daily.check("--json", NGC_API_KEY=secret)
        assert (checked.returncode, json.loads(checked.stdout)["reason"]) == (status, reason), checked
        assert daily.check("--nagios", NGC_API_KEY=secret).stdout.startswith("CRITICAL: ")
    airlock(*issue, "--expires", "90d")
    started = daily.run("serve", NGC_API_KEY=robot)
    assert started.returncode == 27 and "the grant on acme/tiny expired on" in started.stderr, started
    checked = daily.check("--model", MODEL, NGC_API_KEY=robot)
    assert checked.returncode == 27 and re.search(r"^grant .* over +pull, run of acme/\*$", checked.stdout, re.MULTILINE), checked
    nagios = daily.check("--nagios", NGC_API_KEY=robot)
    assert nagios.returncode == 2 and nagios.stdout.startswith("CRITICAL: the grant ended on "), nagios


# ---- the watch


def test_a_running_lease_is_renewed_and_an_absent_registry_warns_and_kills_nothing(site: Site) -> None:
    with site.serving() as running:
        first = site.lease()["lease"]
        assert "warning" not in running.ready()
        assert "x-airlock-warning" not in running.ask("POST", "/v1/chat/completions", CHAT)[2]
        wait_for(lambda: running.figure('airlock_lease_renewals_total{result="ok"}') >= 1, "the lease is renewed", 40)
        assert site.lease()["lease"] != first and running.figure('airlock_lease_state{state="valid"}') == 1
        assert 89 < running.figure('airlock_days_left{of="key"}') <= 90 and running.figure("airlock_lease_renewed_timestamp_seconds") > 1e9
        site.down()
        warning = wait_for(lambda: running.ready().get("warning"), "readiness warns", 40)
        assert re.match(r"the lease is not renewed \(connection_refused\); no new start of this model after 20\d\d-\S+Z, unless", warning)
        status, body, headers = running.ask("POST", "/v1/chat/completions", CHAT)
        assert status == 200 and body["choices"] and headers["x-airlock-warning"] == warning
        status, text, headers = running.ask("POST", "/v1/chat/completions", {**CHAT, "stream": True})
        assert status == 200 and "[DONE]" in text and headers["x-airlock-warning"] == warning
        log = running.log.read_text()
        assert log.count("(connection_refused: ") == 1 and "what runs goes on" in log and site.key not in log
        wait_for(lambda: running.figure('airlock_lease_renewals_total{result="failed"}'), "a renewal is due and fails", 40)
        assert not re.search(r"^airlock_(days|lease|start)\S*(acme|node-1|key-)", running.ask("GET", "/metrics")[1], re.MULTILINE)


def test_a_registry_that_comes_back_is_found_again(site: Site, start_registry: Any) -> None:
    with site.serving() as running:
        port = site.server.port
        site.down()
        wait_for(lambda: running.ready().get("warning"), "readiness warns", 40)
        site.server = start_registry(site.server.data, port, AIRLOCK_LEASE_LIFE_S="60")
        wait_for(lambda: not running.ready().get("warning"), "the warning goes", 40)
        wait_for(lambda: running.figure('airlock_lease_renewals_total{result="ok"}') >= 1, "the lease is renewed", 40)
        assert "the registry answers again" in running.log.read_text()


def test_revoked_while_cached(site: Site) -> None:
    with site.serving() as running:
        wait_for(lambda: site.events("verified"), "the receipt is recorded", 40)
        airlock("key", "revoke", site.key_id, "--data", str(site.server.data))
        warning = wait_for(lambda: running.ready().get("warning"), "readiness warns", 40)
        assert "the lease is not renewed (key_revoked); no new start of this model from now on; what runs goes on" in warning
        assert running.ask("POST", "/v1/chat/completions", CHAT)[0] == 200
        assert running.figure('airlock_lease_state{state="refused"}') == 1 and running.figure("airlock_start_days_left") == 0
        assert "(key_revoked): the API key was revoked on " in running.log.read_text()
    assert site.lease()["revoked_at"]
    refused = site.run("serve")
    assert refused.returncode == 23 and SEED_LINE in refused.stderr
    assert site.check().returncode == 23 and site.check("--nagios").stdout.startswith("CRITICAL: key_revoked: ")
    site.down()
    cached = site.run("serve")
    assert cached.returncode == 28 and "the lease was revoked on" in cached.stderr, cached.stderr
    offline = site.check("--model", MODEL, "--cache", str(site.cache))
    assert offline.returncode == 40 and "revoked" in offline.stdout
    critical = site.check("--nagios", "--model", MODEL, "--cache", str(site.cache))
    assert critical.returncode == 2 and critical.stdout.startswith("CRITICAL: connection_refused: "), critical.stdout


def test_an_entitlement_is_revoked_under_a_running_model(site: Site) -> None:
    data = ("--data", str(site.server.data))
    airlock("catalog", "require", "acme/tiny", "--tier", "enterprise", *data)
    issue = (
        "entitlement",
        "issue",
        "--org",
        "acme",
        "--tier",
        "enterprise",
        "--models",
        "acme/*",
        "--gpus",
        "8",
        "--expires",
        "365d",
        "--json",
        *data,
    )
    jti = str(json.loads(airlock(*issue).stdout)["jti"])
    with site.serving() as running:
        assert 364 < wait_for(lambda: running.figure('airlock_days_left{of="entitlement"}'), "the entitlement is known") <= 365
        airlock("entitlement", "revoke", jti, *data)
        # At the next look, not when the lease is due; that look tells first what it saw, then what the renewal was told.
        said = wait_for(lambda: [w for w in [running.ready().get("warning", "")] if "not renewed" in w], "readiness warns", 20)
        assert "the lease is not renewed (entitlement_revoked)" in said[0] and "acme" not in said[0]
        assert running.ask("POST", "/v1/chat/completions", CHAT)[0] == 200
    assert site.run("serve").returncode == 23 and site.check().returncode == 23
    trust = site.folder / "newer-trust.json"
    airlock("site", "trust", *data, "--to", str(trust))
    assert json.loads(trust.read_text())["revocation_serial"] > 0
    site.down()
    marked = site.run("serve")
    assert marked.returncode == 28 and "the lease was revoked on" in marked.stderr
    (path,) = (site.cache / "leases").glob("*.json")
    path.write_text(json.dumps({"lease": json.loads(path.read_text())["lease"]}))  # who takes the mark away meets the pinned serial
    pinned = site.run("serve", AIRLOCK_TRUST=str(trust))
    assert pinned.returncode == 28 and "older than the pinned revocation serial" in pinned.stderr


def test_revoked_while_nothing_runs(site: Site) -> None:
    with site.serving():
        pass
    airlock("key", "revoke", site.key_id, "--data", str(site.server.data))
    assert site.run("serve").returncode == 23
    site.down()
    assert site.run("serve").returncode == 28


def test_the_registry_is_away_for_a_day_and_an_hour_then_for_good(daily: Site) -> None:
    with daily.serving() as running:
        assert running.ready()["status"] == "ready"
    daily.down()
    clock = daily.cache / "leases" / "clock"

    def later(hours: float) -> None:
        clock.write_text(f"{time.time() + hours * 3600:.0f}")  # the lowest time that this cache has seen

    later(25)
    with daily.serving() as graced:
        log = graced.log.read_text()
        assert "grace ends on" in log and "this start is allowed" in log
        wait_for(lambda: "airlock_lease_state" in graced.ask("GET", "/metrics")[1], "the watch looks")
        assert graced.figure('airlock_lease_state{state="grace"}') == 1 and graced.figure('airlock_days_left{of="lease"}') < 0
        assert "the lease is not renewed" in wait_for(lambda: graced.ready().get("warning"), "readiness warns")
    assert int(clock.read_text()) > time.time() + 24 * 3600, "the clock does not go back with the wall"
    listed = daily.check("--model", MODEL, "--cache", str(daily.cache))
    assert listed.returncode == 40 and re.search(r"^lease .* grace +a start of acme/tiny:1 on node-1", listed.stdout, re.MULTILINE), listed.stdout
    later(24 + 72 + 1)
    over = daily.run("serve")
    assert over.returncode == 29 and "the lease expired on" in over.stderr and "grace" in over.stderr
    clock.unlink()  # without it the time is the lease's own, and the wall's: the lease is young again for who owns the host
    assert daily.run("list-model-profiles").returncode == 0


# ---- what is given back


def test_a_returned_lease_is_not_used_again(site: Site) -> None:
    with site.serving():
        pass
    returned = site.run("return-lease")
    assert returned.returncode == 0 and "is returned here; the registry counts its GPUs as free" in returned.stdout, returned.stderr
    assert site.events("lease_return") and site.lease()["told"]
    again = site.run("return-lease")
    assert again.returncode == 28 and "holds no lease of acme/tiny:1 on node-1" in again.stderr
    with site.serving():
        pass
    site.down()
    away = site.run("return-lease")
    assert away.returncode == 40 and "is returned here; the registry counts its GPUs until 20" in away.stdout
    assert "say this again, so that the registry knows too" in away.stderr
    started = site.run("serve")
    assert started.returncode == 28 and "the lease was returned on" in started.stderr


def test_the_registry_is_told_of_a_return_later(site: Site, start_registry: Any) -> None:
    with site.serving():
        pass
    site.down()
    assert site.run("return-lease", "--json").returncode == 40
    site.server = start_registry(site.server.data, site.server.port)
    told = site.run("return-lease", "--json")
    assert told.returncode == 0 and json.loads(told.stdout)["registry"] == "the registry counts its GPUs as free"
    assert len(site.events("lease_return")) == 1


# ---- check


def test_check_says_what_ends_and_what_stops(daily: Site) -> None:
    table = daily.check()
    assert table.returncode == 0, table
    assert re.search(rf"^key +{daily.key_id} +20\S+Z +5\.0 +every pull and every start with this key$", table.stdout, re.MULTILINE), table.stdout
    assert re.search(r"^grant +grant-[0-9a-f]{16} .* pull, push, run of acme/\*$", table.stdout, re.MULTILINE)
    states = {0: ("1", "2"), 1: ("30", "4"), 2: ("30", "7")}
    for state, (warning, critical) in states.items():
        done = daily.check("--nagios", "--warning", critical if state == 0 else warning, "--critical", "1" if state == 0 else critical)
        assert done.returncode == state and re.match(
            rf"(OK|WARNING|CRITICAL): the API key ends on \S+Z, in 4 days: that stops every pull and every start with this key"
            rf" \| 'key {daily.key_id}'=(4\.99|5\.00);",
            done.stdout,
        ), done
    doc = json.loads(daily.check("--json", "--model", MODEL).stdout)
    assert doc["exit_code"] == 0 and doc["error"] is None and {i["kind"] for i in doc["items"]} == {"key", "grant"} and doc["org"] == "acme"
    none = daily.check("--model", "hf/x/y")
    assert none.returncode == 25 and "no grant of this key lets it run hf/x/y" in none.stdout and "pull, push, run of acme/*" in none.stdout
    for argv, env, status in (
        (("--registry", "ftp://x"), {}, 6),
        ((), {"NGC_API_KEY": ""}, 20),
        ((), {"AIRLOCK_REGISTRY": ""}, 6),
        (("--warning", "nan"), {}, 2),
    ):
        wrong = daily.check(*argv, AIRLOCK_KEY="", **env)
        assert wrong.returncode == status and "Traceback" not in wrong.stderr, wrong
    assert daily.check(NGC_API_KEY="", AIRLOCK_KEY=daily.key).returncode == 0
    assert daily.check(NGC_API_KEY="nvapi-" + "x" * 49).returncode == 21
    empty = daily.check("--model", MODEL, "--cache", str(daily.folder / "absent"))
    assert empty.returncode == 28 and "holds no lease of acme/tiny:1" in empty.stdout


def test_the_process_that_runs_out_of_its_key_is_told_at_seven_days(daily: Site) -> None:
    with daily.serving() as running:
        told = wait_for(lambda: re.search(r"^WARNING .*the API key ends on .*$", running.log.read_text(), re.MULTILINE), "the line of the threshold")
        assert re.search(r"in 4 days: that stops every pull and every start with this key; what runs goes on$", told[0])
        time.sleep(3)
        assert running.log.read_text().count("the API key ends on") == 1
        headers = running.ask("GET", "/v1/models")[2]
        assert re.fullmatch(r"the API key ends on \S+Z, in 4 days", headers["x-airlock-warning"])
        running.process.send_signal(signal.SIGTERM)
