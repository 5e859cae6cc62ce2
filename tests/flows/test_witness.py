"""The audit log before a verifier that is not ours: Go's sumdb/note and sumdb/tlog (tests/witness) open its checkpoints and check its proofs."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import insert

from artifact import tlog
from artifact.evidence import lines
from registry import tables as t
from registry.ledger import Ledger
from registry.sequencer import reader
from registry.wiring import Site
from tests.conftest import ROOT, missing
from tests.site import BACKENDS, running_site

pytestmark = [pytest.mark.full, pytest.mark.server]
GO = ROOT / "build" / "go" / "go" / "bin" / "go"
MODULE = Path("/usr/share/gocode/src/golang.org/x/mod/sumdb/tlog")
SIZES = (1, 5, 250, 513, 1200)


@pytest.fixture(scope="module")
def witness(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program, built from tests/witness without any network."""
    for needed, what in ((GO, "Go (make system-full)"), (MODULE, "golang-golang-x-mod-dev")):
        if not needed.exists():
            missing(f"{what} at {needed}")
    folder = tmp_path_factory.mktemp("witness")
    env = {
        **os.environ,
        "GOCACHE": str(folder / "cache"),
        "GOPATH": str(folder / "go"),
        "GOPROXY": "off",
        "GOFLAGS": "-mod=mod",
        "GOTOOLCHAIN": "local",
    }
    done = subprocess.run([GO, "build", "-o", folder / "witness", "."], cwd=ROOT / "tests" / "witness", env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder / "witness"


@pytest.fixture(scope="module", params=BACKENDS)
def site(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with running_site(tmp_path_factory.mktemp("site"), request.param) as opened:
        yield opened


@pytest.fixture(scope="module")
def case(site: Site) -> dict[str, Any]:
    """A log with a checkpoint at each of some sizes, proofs of entries all over it, and of each checkpoint's growth into each later one."""
    notes: list[str] = []
    book = Ledger(site.engine, site.log)
    for size in SIZES:
        rows = [{"class": "A", "ts": 1.0, "body": json.dumps({"event": "pull", "n": i, "é": "ü"})} for i in range(book.size(), size)]
        with site.catalog.writing() as conn:
            conn.execute(insert(t.audit_pending), rows)
        site.log.settle()
        notes.append(site.log.sign(time.time()))
    note, vkey, head = book.signed(time.time())
    proofs = [json.loads(book.proof(i, note, vkey)) for i in (0, 1, 4, 255, 256, 511, 777, head.size - 1)]
    signed = [(n, tlog.open_checkpoint(n, vkey)) for n in notes]
    steps = []
    with site.catalog.reading() as conn:
        for i, (old, small) in enumerate(signed):
            for new, large in signed[i + 1 :]:
                proof = tlog.consistency(reader(conn), small.size, large.size)
                steps.append({"old": old, "new": new, "proof": [base64.b64encode(node).decode() for node in proof]})
    export = [json.loads(line) for line in lines(head, book.items(head))]
    return {"key": vkey, "proofs": proofs, "steps": steps, "lines": export}


def ask(witness: Path, folder: Path, case: dict[str, Any]) -> subprocess.CompletedProcess[str]:
    (folder / "log").write_text("".join(json.dumps(line) + "\n" for line in case["lines"]))
    (folder / "case").write_text(json.dumps({**{k: v for k, v in case.items() if k != "lines"}, "export": str(folder / "log")}))
    return subprocess.run([witness, folder / "case"], capture_output=True, text=True, timeout=120, check=False)


def test_go_accepts_checkpoints_proofs_and_the_whole_log(witness: Path, case: dict[str, Any], tmp_path: Path) -> None:
    done = ask(witness, tmp_path, case)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"entries {SIZES[-1]} checkpoints {len(SIZES)} proofs 8 steps {len(SIZES) * (len(SIZES) - 1) // 2}\n"


def _places(found: list[dict[str, Any]]) -> dict[int, int]:
    return {line["i"]: n for n, line in enumerate(found) if "i" in line}


def _removed(found: list[dict[str, Any]]) -> None:
    """One entry less, and all behind it and the log's size moved up, as one who has the database would do."""
    del found[_places(found)[600]]
    for line in found:
        if line.get("i", 0) > 600:
            line["i"] -= 1
    found[0]["size"] -= 1


def _reordered(found: list[dict[str, Any]]) -> None:
    at = _places(found)
    one, two = found[at[600]], found[at[601]]
    found[at[600]], found[at[601]] = two | {"i": 600}, one | {"i": 601}


def _altered(found: list[dict[str, Any]]) -> None:
    body = '{"event": "pull", "n": "else"}'
    found[_places(found)[600]] |= {"body": body, "hash": base64.b64encode(tlog.leaf_hash(body.encode())).decode()}


@pytest.mark.parametrize("change", [_removed, _reordered, _altered])
def test_go_refuses_a_changed_log(witness: Path, case: dict[str, Any], tmp_path: Path, change: Callable[[list[dict[str, Any]]], None]) -> None:
    changed = json.loads(json.dumps(case)) | {"proofs": [], "steps": []}
    change(changed["lines"])
    done = ask(witness, tmp_path, changed)
    assert done.returncode == 1 and ("not those that were signed" in done.stderr or "stands behind" in done.stderr), done.stderr


def test_go_refuses_changed_proofs_and_checkpoints(witness: Path, case: dict[str, Any], tmp_path: Path) -> None:
    proof, step = case["proofs"][4], case["steps"][1]
    forged = proof["checkpoint"].replace(f"\n{SIZES[-1]}\n", f"\n{SIZES[-1] - 1}\n")
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"proofs": [proof | {"i": proof["i"] + 1}]}, "invalid transparency proof"),
        ({"proofs": [proof | {"body": "{}", "hash": ""}]}, "invalid transparency proof"),
        ({"proofs": [proof | {"checkpoint": forged}]}, "invalid signature"),
        ({"steps": [step | {"proof": step["proof"][::-1]}]}, "invalid transparency proof"),
        ({"steps": [case["steps"][-1] | {"old": case["steps"][-2]["old"]}]}, "invalid transparency proof"),
    ]
    for part, words in wrong:
        done = ask(witness, tmp_path, case | {"proofs": [], "steps": []} | part)
        assert done.returncode == 1 and words in done.stderr, (part, done.stderr)
