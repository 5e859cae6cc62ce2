"""The auditors' routes over HTTP: an export page by page into a file that verifies, proofs of what answers said, and who is shown what."""

from __future__ import annotations

import json
import os
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from artifact.evidence import verify, verify_proof
from tests.conftest import AIRLOCK, airlock
from tests.contracts.doors import Door, new_site, serving

pytestmark = pytest.mark.server


@pytest.fixture(scope="module")
def door(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Door]:
    data = tmp_path_factory.mktemp("audit") / "data"
    keys = new_site(data)
    for name, org, models in (("surveyor", "site", "**"), ("auditor", "acme", "acme/**")):
        argv = ("key", "create", "--data", str(data), "--org", org, "--models", models, "--actions", "auditor", "--json")
        keys[name] = json.loads(airlock(*argv).stdout)["key"]
    with serving(data, keys) as found:
        found.image("acme/m", "1", [b"one"])
        for i in range(30):
            found.image("other/m", str(i), [b"two"], who="other")
        yield found
        assert "Traceback" not in found.log.read_text()


def audit(door: Door, who: str, *argv: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    return airlock("audit", *argv, "--registry", door.url, check=check, AIRLOCK_KEY=door.keys[who])


def test_an_export_over_http_while_others_write(door: Door, tmp_path: Path) -> None:
    stop = threading.Event()

    def write() -> None:
        while not stop.is_set():
            door.ask("GET", "/v2/acme/none/manifests/1", who="acme")
            door.image("acme/busy", "1", [os.urandom(10)])

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for turn in range(3):
            told = json.loads(audit(door, "surveyor", "export", str(tmp_path / f"log{turn}"), "--json").stdout)
            with (tmp_path / f"log{turn}").open("rb") as file:
                found = verify(file, told["key"], (tmp_path / "kept").read_text() if turn else "")
            assert found.size == told["size"] > 60 and not found.sealed
            (tmp_path / "kept").write_text(told["checkpoint"])
    finally:
        stop.set()
        writer.join()
    assert airlock("audit", "verify", str(tmp_path / "log2"), "--key", told["key"], "--since", str(tmp_path / "kept")).returncode == 0


def test_the_request_id_of_an_answer_finds_its_entry(door: Door, tmp_path: Path) -> None:
    answer = door.ask("GET", "/v2/acme/m/manifests/1", who="reader")
    pulled = door.ask("GET", "/v2/acme/m/manifests/1", who="acme")
    for who, found in (("reader", answer), ("acme", pulled)):
        file = tmp_path / who
        told = json.loads(audit(door, "auditor", "prove", str(file), "--request-id", found.headers["x-request-id"], "--json").stdout)
        entry: Any = verify_proof(file.read_bytes(), told["key"])["entry"]
        assert entry["request_id"] == found.headers["x-request-id"] and entry["result"] == ("granted" if found.status == 200 else "denied")


def test_who_is_shown_what(door: Door, tmp_path: Path) -> None:
    refused = audit(door, "auditor", "export", str(tmp_path / "log"), check=False)
    assert refused.returncode == 4 and "the auditor of the whole site" in refused.stderr and not (tmp_path / "log").exists()
    assert audit(door, "reader", "key", check=False).returncode == 4
    whole = json.loads(audit(door, "surveyor", "report", "--json").stdout)
    own = json.loads(audit(door, "auditor", "report", "--json").stdout)
    assert {row["org"] for row in own["changes"]["rows"] if "org" in row} <= {"acme"} and own["organisation"] == "acme"
    assert whole["entries"] > own["entries"] > 0 and {row["org"] for row in own["denials"]["rows"]} <= {"acme"}
    assert door.ask("GET", "/airlock/v1/audit/entries?size=3", who="surveyor").json()["after"] == 0
    assert door.ask("GET", "/airlock/v1/audit/entries?size=3", who=None).status == 401
    assert door.ask("POST", "/airlock/v1/audit/entries", b"{}", who="surveyor").status == 405
    html = tmp_path / "r.html"
    audit(door, "auditor", "report", "--html", str(html))
    assert "other/m" not in html.read_text() and "acme/m" in html.read_text()


def test_help_and_usage() -> None:
    said = airlock("audit", "--help").stdout
    assert all(word in said for word in ("export", "verify", "prove", "report", "seal", "accept-fork"))
    for verb in ("export", "checkpoint", "key", "prove", "report", "seal", "accept-fork", "verify"):
        assert "example: airlock audit" in " ".join(airlock("audit", verb, "--help").stdout.split())
    assert subprocess.run([str(AIRLOCK), "audit", "report", "--csv", "none"], capture_output=True, check=False).returncode == 2
