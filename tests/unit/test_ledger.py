"""The signed log as auditors use it, on both databases: export, proofs, seals, and a history that was altered or put back."""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import delete, func, insert, select, update

from artifact import tlog
from artifact.commands.audit_verify import main as verify_main
from artifact.errors import Conflict, Denied, Invalid, Mismatch, NotFound
from artifact.evidence import Head, lines, verify, verify_proof
from artifact.store import Call
from registry import tables as t
from registry.commands.audit import _export as export
from registry.commands.audit import main
from registry.ledger import PAGE, Ledger
from registry.sequencer import FILE
from registry.wiring import Site
from tests.site import BACKENDS, SQLITE_ONLY, call_of, make_key, push_model, running_site


@pytest.fixture(params=BACKENDS)
def site(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    with running_site(tmp_path, request.param) as opened:
        if opened.settings.database:
            monkeypatch.setenv("AIRLOCK_DATABASE", opened.settings.database)
        yield opened


def fill(site: Site, count: int, org: str = "acme", at: float = 1.0, **more: object) -> None:
    """Entries of one organisation, a second after the other."""
    rows = []
    for i in range(count):
        body = {"event": "pull", "org": org, "key_id": "key-1", "ref": f"{org}/m@blob", "result": "granted", "n": i, "request_id": f"r-{org}-{i}"}
        rows.append({"class": "B", "ts": at + i, "body": json.dumps(body | more, sort_keys=True)})
    with site.catalog.writing() as conn:
        conn.execute(insert(t.audit_pending), rows)
    site.log.settle()


def ledger(site: Site) -> Ledger:
    return Ledger(site.engine, site.log)


def run(site: Site, *argv: str | Path) -> int:
    return main([argv[0] if isinstance(argv[0], str) else "", *map(str, argv[1:]), "--data", str(site.home.path)])


def exported(site: Site, path: Path) -> tuple[list[bytes], str]:
    """The lines of an export, and the verifier key, by the command."""
    assert run(site, "export", path) == 0
    return path.read_bytes().splitlines(keepends=True), site.log.verifier(1)


@pytest.mark.slow
def test_export_and_verify_by_the_commands(site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fill(site, PAGE + 50)
    kept = site.log.sign(time.time())
    fill(site, PAGE + 300)
    out = tmp_path / "log"
    assert run(site, "export", out, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["digest"] == "sha256:" + hashlib.sha256(out.read_bytes()).hexdigest() and told["size"] >= 2 * PAGE + 350
    assert (out.stat().st_mode & 0o777, [p.name for p in tmp_path.iterdir() if "partial" in p.name]) == (0o600, [])
    (tmp_path / "kept").write_text(kept)
    assert verify_main([str(out), "--key", told["key"], "--since", str(tmp_path / "kept")]) == 0
    assert "it goes on from the kept checkpoint over" in capsys.readouterr().out
    with pytest.raises(Conflict, match="is there already"):
        run(site, "export", out)
    assert run(site, "export", tmp_path / "later", "--first", str(PAGE + 7)) == 0
    found = verify((tmp_path / "later").read_bytes().splitlines(keepends=True), told["key"])
    assert (found.first, found.root) == (PAGE + 7, tlog.open_checkpoint(site.log.newest(), told["key"]).root.hex())
    with pytest.raises(Invalid, match="the log has"):
        run(site, "export", tmp_path / "none", "--first", "1000000")
    assert not (tmp_path / "none").exists()
    assert run(site, "key") == 0 and capsys.readouterr().out.splitlines()[-1] == told["key"]
    assert run(site, "checkpoint") == 0 and tlog.open_checkpoint(capsys.readouterr().out, told["key"]).size >= found.size


@pytest.mark.slow
@pytest.mark.parametrize("how", ["body", "hidden", "leaf", "both", "removed", "last"])
def test_an_altered_database_is_refused(site: Site, tmp_path: Path, how: str) -> None:
    """What one with the database's password and without the key can do to the rows; the kept checkpoint file is removed, as he would."""
    fill(site, 300)
    kept = site.log.sign(time.time())
    size = tlog.open_checkpoint(kept, site.log.verifier(1)).size
    at = 290 if how != "last" else size - 1
    leaf, head = t.audit_leaf.c, t.audit_head.c
    with site.catalog.writing() as conn:
        where = update(t.audit_leaf).where(leaf.idx == at)
        if how in ("body", "both"):
            conn.execute(where.values(body='{"event": "pull", "org": "else"}'))
        if how == "hidden":
            conn.execute(where.values(body=None))
        if how in ("leaf", "both"):
            conn.execute(where.values(leaf_hash=tlog.leaf_hash(b'{"event": "pull", "org": "else"}')))
        if how in ("removed", "last"):
            conn.execute(delete(t.audit_leaf).where(leaf.idx == at))
        if how == "last":
            log = tlog.Range()
            for row in conn.execute(select(leaf.leaf_hash).order_by(leaf.idx)):
                log.append(bytes(row.leaf_hash))
            conn.execute(update(t.audit_head).where(head.id == 1).values(size=log.size, nodes=log.nodes()))
            conn.execute(delete(t.audit_checkpoint).where(t.audit_checkpoint.c.size > log.size))
    (site.home.path / FILE).unlink()
    (tmp_path / "kept").write_text(kept)
    with pytest.raises((Mismatch, Invalid)) as told:
        run(site, "export", tmp_path / "log")
        verify_main([str(tmp_path / "log"), "--key", site.log.verifier(1), "--since", str(tmp_path / "kept")])
    if isinstance(told.value, Mismatch):
        assert int(told.value.ids["index"]) <= at and told.value.exit_code == 7
    assert how not in ("body", "hidden", "removed") or told.value.ids["index"] == "290"


@SQLITE_ONLY
def test_a_database_that_was_put_back(site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fill(site, 10)
    site.log.sign(time.time())
    with site.engine.connect() as conn:
        conn.exec_driver_sql(f"VACUUM INTO '{tmp_path / 'monday.db'}'")
    fill(site, 5)
    (tmp_path / "kept").write_text(site.log.sign(time.time()))
    vkey = site.log.verifier(1)
    site.engine.dispose()
    for suffix in ("", "-wal", "-shm"):
        (site.home.path / f"registry.db{suffix}").unlink(missing_ok=True)
    shutil.copy(tmp_path / "monday.db", site.home.path / "registry.db")
    fill(site, 9, org="else")
    with pytest.raises(Conflict, match="accept-fork") as fork:
        run(site, "export", tmp_path / "log")
    assert fork.value.reason == "audit_fork" and not (tmp_path / "log").exists()
    checkpoint = (site.home.path / FILE).read_text()
    (site.home.path / FILE).unlink()  # what one does who does not want it to be seen: the auditor's own copy tells
    assert run(site, "export", tmp_path / "hidden") == 0
    with pytest.raises(Mismatch) as told:
        verify_main([str(tmp_path / "hidden"), "--key", vkey, "--since", str(tmp_path / "kept")])
    assert told.value.reason in ("fork", "size_regression")
    (site.home.path / FILE).write_text(checkpoint)
    assert run(site, "accept-fork", "--reason", "the disk was lost") == 0
    assert "/2 is the log from now on" in capsys.readouterr().out
    assert run(site, "export", tmp_path / "second") == 0
    with pytest.raises(Mismatch, match="ask why it was begun again"):
        verify_main([str(tmp_path / "second"), "--key", vkey])
    assert verify_main([str(tmp_path / "second"), "--key", site.log.verifier(2)]) == 0
    given_up = [json.loads(json.loads(line)["body"]) for line in (tmp_path / "second").read_bytes().splitlines() if b"audit_fork" in line]
    assert [(row["why"], row["given_up"]) for row in given_up] == [("the disk was lost", checkpoint)]


def test_proofs_by_number_request_and_lease(site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fill(site, 270)
    fill(site, 3, org="other")
    assert run(site, "prove", tmp_path / "a", "--index", "0") == 0
    assert run(site, "prove", tmp_path / "b", "--request-id", "r-other-1") == 0
    capsys.readouterr()
    found = verify_proof((tmp_path / "b").read_bytes(), site.log.verifier(1))
    entry: Any = found["entry"]
    assert (entry["org"], entry["n"]) == ("other", 1)
    assert verify_main([str(tmp_path / "a"), "--key", site.log.verifier(1)]) == 0
    for wrong in (("--request-id", "r-none"), ("--index", "99999")):
        with pytest.raises(NotFound):
            run(site, "prove", tmp_path / "c", *wrong)
    with pytest.raises(Invalid, match="one entry is asked for"):
        run(site, "prove", tmp_path / "c", "--index", "-1")
    with site.catalog.writing() as conn:
        org_id = conn.execute(insert(t.org).values(name="renters", created=1.0)).inserted_primary_key[0]  # type: ignore[index]
        values = {"jti": "ab" * 16, "org_id": org_id, "serial": 1, "key_id": "k", "model": "m", "model_digest": "d", "profile_digest": "p"}
        conn.execute(insert(t.lease).values(values | {"profile_id": "i", "host": "h", "gpus": "[]", "iat": 500.0, "exp": 900.0}))
    fill(site, 1, org="renters", at=500.2, event="lease", jti="ab" * 16, serial=1)
    assert run(site, "prove", tmp_path / "d", "--lease", "ab" * 16) == 0
    shown: Any = verify_proof((tmp_path / "d").read_bytes(), site.log.verifier(1))["entry"]
    assert shown["jti"] == "ab" * 16


@pytest.mark.slow
def test_who_may_read_the_log(site: Site) -> None:
    keys = {
        "admin": make_key(site, "site", "**", actions=("admin",)),
        "surveyor": make_key(site, "site", "**", actions=("auditor",)),
        "auditor": make_key(site, "acme", "acme/**", actions=("auditor",)),
        "user": make_key(site, "acme", "acme/**"),
    }
    fill(site, 3)
    fill(site, 2, org="other", at=100.0)
    span = ("1970-01-01T00:00:01Z", "1970-01-02T00:00:00Z")
    reads: dict[str, Callable[[Call], dict[str, Any]]] = {
        "checkpoint": site.guard.auditor.checkpoint,
        "entries": lambda call: site.guard.auditor.entries(call, 0, 4, 100),
        "own": lambda call: site.guard.auditor.proof(call, request_id="r-acme-1"),
        "others": lambda call: site.guard.auditor.proof(call, request_id="r-other-1"),
        "report": lambda call: site.guard.auditor.report(call, *span),
        "report of other": lambda call: site.guard.auditor.report(call, *span, org="other"),
    }
    refused: dict[str, list[str]] = {who: [] for who in keys}
    answers: dict[tuple[str, str], dict[str, Any]] = {}
    for who, key in keys.items():
        for what, read in reads.items():
            try:
                answers[who, what] = read(call_of(site, key))
            except (Denied, NotFound):
                refused[who].append(what)
    assert refused == {"admin": [], "surveyor": [], "auditor": ["entries", "others", "report of other"], "user": list(reads)}
    assert [row["org"] for row in answers["surveyor", "report"]["pulls"]["rows"]] == ["acme", "other"]
    assert [row["org"] for row in answers["auditor", "report"]["pulls"]["rows"]] == ["acme"]
    number = answers["surveyor", "others"]["index"]
    with pytest.raises(NotFound):
        site.guard.auditor.proof(call_of(site, keys["auditor"]), index=str(number))
    site.log.settle()
    with site.catalog.reading() as conn:
        looks = conn.execute(select(t.audit_leaf.c.ref).where(t.audit_leaf.c.event == "audit", t.audit_leaf.c.result == "granted")).scalars().all()
    assert {"site@export", "site@report", "acme@report", "acme@proof"} <= set(looks)


def test_bad_questions(site: Site) -> None:
    call = call_of(site, make_key(site, "site", "**", actions=("admin",)))
    desk = site.guard.auditor
    fill(site, 3)
    for bad in (("2026-01-01T00:00:00Z", "2026-01-01T00:00:00Z"), ("2024-01-01T00:00:00Z", "2026-01-01T00:00:00Z"), ("", "2026-01-01T00:00:00Z")):
        with pytest.raises(Invalid, match="no period"):
            desk.report(call, *bad)
    with pytest.raises(Invalid, match="from is no time"):
        desk.report(call, "yesterday", "2026-01-01T00:00:00Z")
    for after, size in ((0, 0), (5, 5), (0, 10**12), (7, 2)):
        with pytest.raises(Invalid, match="there are no such entries"):
            desk.entries(call, after, size, 10)
    for query in ({}, {"index": "x"}, {"index": "1" * 30}, {"jti": "a", "index": "1"}, {"request_id": "%"}):
        with pytest.raises(Invalid, match="one entry is asked for"):
            desk.proof(call, **query)


@pytest.mark.slow
def test_ten_thousand_entries_stream_in_little_memory(site: Site, tmp_path: Path) -> None:
    fill(site, 10_000, ref="acme/m@sha256:" + "a" * 64, note="x" * 200)
    book = ledger(site)
    _, vkey, head = book.signed(time.time())

    def peak(until: int) -> int:
        tracemalloc.start()
        for _ in lines(Head(head.name, 0, until), book.items(Head(head.name, 0, until))):
            pass
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    peak(PAGE)
    assert peak(head.size) < peak(2 * PAGE) + 500_000, "as much for 10,000 as for 2,000"
    with (tmp_path / "log").open("wb") as out:
        out.writelines(lines(head, book.items(head)))
    with (tmp_path / "log").open("rb") as file:
        tracemalloc.start()
        assert verify(file, vkey).size == head.size
        assert tracemalloc.get_traced_memory()[1] < 500_000
        tracemalloc.stop()


def test_an_export_of_nothing_is_no_file(site: Site, tmp_path: Path) -> None:
    """It would hold no checkpoint, and be refused like a log that was cut."""
    call = call_of(site, make_key(site, "site", "**", actions=("admin",)))
    top = site.guard.auditor.checkpoint(call)  # looks within a quarter of an hour are counted: nothing is new behind this one
    args = argparse.Namespace(first=top["size"], file=tmp_path / "none", json=True)
    with pytest.raises(Invalid, match="no entry from"):
        export(lambda method, path, body, **query: site.guard.auditor.checkpoint(call, **query), args)
    assert not (tmp_path / "none").exists()


def bodies(site: Site) -> int:
    with site.catalog.reading() as conn:
        return int(conn.execute(select(func.count()).select_from(t.audit_leaf).where(t.audit_leaf.c.body.is_not(None))).scalar_one())


@pytest.mark.slow
def test_sealed_entries_are_in_their_export_alone(site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fill(site, 600, at=1000.0)
    site.log.sign(time.time())
    first = int(head_size(site))
    fill(site, 400, at=5000.0)
    assert run(site, "seal", tmp_path / "old", "--until", "1970-01-01T01:00:00Z", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["first"], told["size"], told["cleared"]) == (0, first, first)
    vkey = site.log.verifier(1)
    with (tmp_path / "old").open("rb") as file:
        whole = verify(file, vkey)
    assert (whole.size, whole.sealed) == (first, 0) and told["digest"] == "sha256:" + hashlib.sha256((tmp_path / "old").read_bytes()).hexdigest()
    with site.catalog.reading() as conn:
        seal = conn.execute(select(t.audit_seal)).mappings().one()
        gone = conn.execute(select(t.audit_leaf).where(t.audit_leaf.c.idx == 5)).mappings().one()
        rows = conn.execute(select(t.audit_leaf.c.body).where(t.audit_leaf.c.event == "audit_seal")).scalars().all()
    assert (seal["size"], seal["digest"]) == (first, told["digest"]) and json.loads(rows[0])["digest"] == told["digest"]
    assert (gone["body"], gone["org"], gone["key_id"], gone["ref"], len(gone["leaf_hash"])) == (None, "", "", "", 32)
    found = verify(exported(site, tmp_path / "new")[0], vkey)
    assert (found.sealed, found.first) == (first, 0)
    assert run(site, "prove", tmp_path / "p", "--index", "5") == 0
    assert verify_proof((tmp_path / "p").read_bytes(), vkey)["entry"] is None
    with pytest.raises(Invalid, match="nothing to seal"):
        run(site, "seal", tmp_path / "again", "--until", "1970-01-01T01:00:00Z")
    assert not (tmp_path / "again").exists()
    assert run(site, "seal", tmp_path / "second", "--until", "1970-01-02") == 0
    with (tmp_path / "second").open("rb") as file:
        assert verify(file, vkey).first == first, "the files follow each other"
    call = call_of(site, make_key(site, "site", "**", actions=("admin",)))
    for org in ("", "acme"):  # whose they were is gone with the text: an organisation's report must not look whole either
        report = site.guard.auditor.report(call, "1970-01-01T00:00:01Z", "1970-01-02T00:00:00Z", org)
        assert report["sealed"] == 1000 and not report["pulls"]["rows"]  # type: ignore[index]


def head_size(site: Site) -> int:
    return ledger(site).size()


def test_a_seal_without_a_good_file_takes_nothing(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(site, 50)
    site.log.sign(time.time())
    before = bodies(site)
    (tmp_path / "there").write_text("mine")
    with pytest.raises(Conflict, match="is there already"):
        run(site, "seal", tmp_path / "there", "--until", "2000-01-01")
    with pytest.raises(OSError):
        run(site, "seal", tmp_path / "no" / "folder", "--until", "2000-01-01")
    with site.catalog.writing() as conn:
        conn.execute(update(t.audit_leaf).where(t.audit_leaf.c.idx == 7).values(body='{"altered": 1}'))
    with pytest.raises(Mismatch, match="entry 7 was altered"):
        run(site, "seal", tmp_path / "altered", "--until", "2000-01-01")
    assert (tmp_path / "there").read_text() == "mine" and bodies(site) >= before
    with site.catalog.reading() as conn:
        assert conn.execute(select(t.audit_seal)).first() is None


_SEAL = """
import os, signal, sys
import registry.ledger
real = registry.ledger.Ledger.clear
calls = []
def clear(self):
    calls.append(1)
    if len(calls) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(self)
registry.ledger.Ledger.clear = clear
from registry.commands.audit import main
main(sys.argv[1:])
"""


@pytest.mark.server
def test_a_seal_killed_behind_its_record_is_finished_by_the_next(site: Site, tmp_path: Path) -> None:
    fill(site, 50)
    site.log.sign(time.time())
    first = head_size(site)
    fill(site, 50, at=10_000.0)
    site.log.sign(time.time())
    argv = [sys.executable, "-c", _SEAL, "seal", str(tmp_path / "one"), "--until", "1970-01-01T01:00:00Z", "--data", str(site.home.path)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=120, cwd=Path(__file__).parents[2], env=dict(os.environ), check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert bodies(site) >= first + 50 and ledger(site).sealed() == first
    with (tmp_path / "one").open("rb") as file:
        assert verify(file, site.log.verifier(1)).size == first
    assert run(site, "seal", tmp_path / "two", "--until", "2000-01-01") == 0
    with site.catalog.reading() as conn:
        left = conn.execute(select(func.min(t.audit_leaf.c.idx)).where(t.audit_leaf.c.body.is_not(None))).scalar()
    assert left == ledger(site).sealed() >= first + 50


@pytest.mark.slow
def test_the_report_of_real_reads(site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    key = make_key(site, "acme", "acme/**")
    call = call_of(site, key)
    pushed = push_model(site, call, "acme/tiny", "1")
    for _ in range(3):
        site.guard.read(call, "acme/tiny", pushed.model.digest)
    site.guard.served(call, "acme/tiny", pushed.model.digest, 1000)
    site.audit.flush()
    with pytest.raises(NotFound):
        site.guard.read(call, "other/secret", "sha256:" + "0" * 64)
    assert run(site, "report", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    (row,) = found["pulls"]["rows"]
    assert (row["org"], row["key_id"], row["name"]) == ("acme", call.principal.key_id, "acme/tiny")
    assert (row["granted"], row["served"], row["served_bytes"], row["verified"]) == (3, 1, 1000, 0)
    assert row["grants"] == [g.id for g in call.principal.grants] and row["digests"] == [pushed.model.digest]
    assert [(d["who"], d["reason"], d["attempts"]) for d in found["denials"]["rows"]] == [
        (call.principal.key_id, found["denials"]["rows"][0]["reason"], 1)
    ]
    assert tlog.open_checkpoint(found["evidence"]["checkpoint"], found["evidence"]["key"]).size == found["evidence"]["size"]
    wish = {"model": "acme/tiny", "ref": "1", "profile_digest": pushed.profiles.digest, "profile_id": pushed.profile_id, "host": "node1"}
    told = site.guard.lease(call, wish | {"gpu_uuids": ["GPU-1", "GPU-2"]})
    claims = json.loads(base64.urlsafe_b64decode(str(told["lease"]).split(".")[1] + "=="))
    site.guard.leasing.verified(call, {"lease": claims["jti"], "digest": pushed.model.digest, "bytes": 5000, "files": 3})
    assert run(site, "report", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    (row,), (licence,) = found["pulls"]["rows"], found["gpus"]["rows"]
    assert (row["verified"], row["verified_bytes"], licence["peak"], licence["hosts"]) == (1, 5000, 2, 1)
    assert licence["licence"] == f"grant {call.principal.grants[0].id}" and found["leases_recorded"] == found["leases_stored"] == 1
    assert run(site, "prove", tmp_path / "lease", "--lease", claims["jti"]) == 0
    capsys.readouterr()
    assert run(site, "report", "--csv") == 0 and capsys.readouterr().out.startswith("org,key_id,name,grants,granted,")
    assert run(site, "report", "--html", tmp_path / "r.html") == 0 and "acme/tiny" in (tmp_path / "r.html").read_text()
    assert run(site, "report") == 0 and "Who pulled what" in capsys.readouterr().out
