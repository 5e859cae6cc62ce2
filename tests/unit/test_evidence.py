"""What an auditor is given: every change of an export or a proof is refused, naming the first entry that nothing vouches for."""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from artifact import tlog
from artifact.commands.audit_verify import main
from artifact.errors import AirlockError, Invalid, Mismatch
from artifact.evidence import Head, lines, proof_of, verify, verify_proof

NAME = "airlock-test"
GOLDEN = Path(__file__).parents[1] / "golden"


@functools.cache
def key() -> bytes:
    return tlog.new_key()


@functools.cache
def vkey(name: str = NAME) -> str:
    return tlog.verifier_key(name, key())


def body(i: int, **more: object) -> str:
    return json.dumps({"event": "pull", "n": i, "org": "acme"} | more, sort_keys=True, separators=(",", ":"))


def seal(i: int, size: int) -> str:
    return body(i, event="audit_seal", first=0, size=size)


BODIES = [body(i) for i in range(40)]


def signed(bodies: list[str], size: int, name: str = NAME) -> str:
    root = tlog.root_of(tlog.leaf_hash(b.encode()) for b in bodies[:size])
    return tlog.sign_checkpoint(tlog.Checkpoint(name, size, root), name, key())


def export(bodies: list[str], at: tuple[int, ...], first: int = 0, sealed: int = 0, name: str = NAME) -> list[bytes]:
    """The lines of an export with checkpoints at these sizes, the last of which covers all."""
    before = tlog.Range()
    for b in bodies[:first]:
        before.append(tlog.leaf_hash(b.encode()))
    items: list[Any] = [signed(bodies, first, name)] if first in at and first else []
    for i in range(first, at[-1]):
        items.append((tlog.leaf_hash(bodies[i].encode()), None if i < sealed else bodies[i]))
        if i + 1 in at:
            items.append(signed(bodies, i + 1, name))
    return list(lines(Head(name, first, at[-1], before.nodes()), items))


def sealed_again(docs: list[dict[str, Any]]) -> list[bytes]:
    """Lines with an end that fits them, as one who alters a file would make it."""
    raw = [json.dumps(d, sort_keys=True, separators=(",", ":")).encode() + b"\n" for d in docs if "end" not in d]
    end = {"end": docs[0]["size"], "sha256": hashlib.sha256(b"".join(raw)).hexdigest()}
    return [*raw, json.dumps(end, sort_keys=True, separators=(",", ":")).encode() + b"\n"]


def entry(i: int, text: str) -> dict[str, Any]:
    return {"i": i, "hash": base64.b64encode(tlog.leaf_hash(text.encode())).decode(), "body": text}


def refused(raw: list[bytes], since: str = "") -> Mismatch:
    with pytest.raises(Mismatch) as told:
        verify(raw, vkey(), since)
    assert "index" in told.value.ids and told.value.exit_code == 7
    return told.value


def test_a_whole_export() -> None:
    found = verify(export(BODIES, (7, 20, 40)), vkey(), signed(BODIES, 20))
    assert (found.size, found.checkpoints, found.since, found.sealed) == (40, 3, 20, 0)
    assert found.root == tlog.root_of(tlog.leaf_hash(b.encode()) for b in BODIES).hex()
    later = verify(export(BODIES, (13, 20, 40), first=13), vkey(), signed(BODIES, 13))
    assert (later.first, later.checkpoints, later.root) == (13, 3, found.root)
    assert verify(lines(Head(NAME, 0, 0), [signed([], 0)]), vkey()).size == 0


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(st.integers(0, 39), st.integers(0, 39), st.sampled_from(["removed", "renumbered", "swapped", "altered", "both", "text_gone"]))
def test_a_changed_log_is_refused_at_its_first_bad_entry(i: int, j: int, how: str) -> None:
    docs = [json.loads(line) for line in export(BODIES, (8, 16, 24, 32, 40))]
    where = {d["i"]: n for n, d in enumerate(docs) if "i" in d}
    exact = i
    if how == "removed":
        del docs[where[i]]
        exact = i if i % 8 != 7 else -1  # of the last one before a checkpoint only the count is known to be wrong
    elif how == "renumbered":  # taken out, and all behind it moved up: only the signatures tell
        del docs[where[i]]
        for d in docs:
            if d.get("i", -1) > i:
                d["i"] -= 1
        exact = -1
    elif how == "swapped":
        if i == j:
            return
        a, b = docs[where[i]], docs[where[j]]
        docs[where[i]], docs[where[j]] = b | {"i": i}, a | {"i": j}
        exact = -1
    elif how == "altered":
        docs[where[i]]["body"] = body(i, org="else")
    elif how == "both":
        docs[where[i]] = entry(i, body(i, org="else"))
        exact = -1
    else:
        docs[where[i]] |= {"body": ""}
    found = int(refused(sealed_again(docs)).ids["index"])
    assert found == exact if exact >= 0 else found == min(i, j if how == "swapped" else i) // 8 * 8, "the first that no signature covers"


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_no_cut_and_no_flipped_byte_passes(data: st.DataObject) -> None:
    raw = export(BODIES[:12], (5, 12))
    whole = b"".join(raw)
    cut = data.draw(st.integers(0, len(whole) - 1))
    flipped = bytearray(whole)
    flipped[cut] ^= data.draw(st.integers(1, 255))
    for changed in (whole[:cut], bytes(flipped), whole + b"{}\n"):
        with pytest.raises(AirlockError):
            verify(changed.splitlines(keepends=True), vkey())


def test_two_forks_and_an_older_checkpoint() -> None:
    other = [*BODIES[:30], *(body(i, org="else") for i in range(30, 40))]
    kept = signed(BODIES, 36)
    told = refused(export(other, (10, 30, 40)), kept)
    assert told.reason == "fork" and 30 <= int(told.ids["index"]) <= 36
    both = [json.loads(line) for line in export(other, (30, 40))]
    both.insert(len(both) - 1, {"checkpoint": signed(BODIES, 40)})
    assert refused(sealed_again(both)).ids["index"] == "40"
    short = refused(export(BODIES, (20,)), kept)
    assert (short.reason, short.ids["index"]) == ("size_regression", "20")
    assert refused(export(BODIES[:12] + BODIES[13:], (10, 39)), signed(BODIES, 20)).reason == "fork"
    with pytest.raises(Invalid, match="begins at entry 30"):
        verify(export(BODIES, (30, 40), first=30), vkey(), signed(BODIES, 20))


def test_only_the_pinned_key_of_the_pinned_log() -> None:
    with pytest.raises(Mismatch, match="expected: airlock-test, whose key is pinned"):
        verify(export(BODIES, (40,), name="airlock-test/2"), vkey())
    stranger = tlog.verifier_key(NAME, tlog.new_key())
    with pytest.raises(Mismatch, match="not signed by the pinned key"):
        verify(export(BODIES, (40,)), stranger)
    with pytest.raises(Mismatch) as told:
        verify([json.dumps(json.loads(export(BODIES, (40,))[0]) | {"log": "\x1b[2J\n"}).encode() + b"\n"], vkey())
    assert told.value.what.isprintable(), "a file steers no terminal"
    unsigned = [json.loads(line) for line in export(BODIES, (20, 40)) if b"checkpoint" not in line]
    assert refused(sealed_again(unsigned)).ids["index"] == "0"


def test_lease_serials_without_a_gap() -> None:
    texts = [body(0), *(body(i, event="lease", serial=i) for i in (1, 2, 3)), body(4, event="lease", serial=9, org="other")]
    assert verify(export(texts, (5,)), vkey()).leases == {"acme": 3, "other": 9}
    told = refused(export([*texts, body(5, event="lease", serial=5)], (6,)))
    assert (told.reason, told.ids["index"]) == ("lease_serial", "5")
    texts = [*texts[:4], body(4), body(5, event="lease", serial=7), seal(6, 5)]
    assert verify(export(texts, (7,), sealed=5), vkey()).leases == {"acme": 7}


def test_a_text_that_is_not_here_was_sealed_or_taken_away() -> None:
    """Its hash alone fits every checkpoint: who may write the database could else hide what an entry says."""
    texts = [*BODIES[:30], seal(30, 25), *BODIES[31:]]
    assert verify(export(texts, (20, 40), sealed=25), vkey()).sealed == 25
    assert verify(export(texts, (40,), sealed=25, first=10), vkey()).sealed == 15
    for sealed, index in ((26, 25), (31, 0), (40, 0)):  # one more than was sealed, and the record of the seal itself
        assert int(refused(export(texts, (20, 40), sealed=sealed)).ids["index"]) == index
    assert int(refused(export(BODIES, (40,), sealed=1)).ids["index"]) == 0
    docs = [json.loads(line) for line in export(texts, (40,), sealed=25)]
    for i in (28, 35):
        del next(d for d in docs if d.get("i") == i)["body"]
    assert int(refused(sealed_again(docs)).ids["index"]) == 28
    many = [json.loads(line) for line in export([body(i) for i in range(2500)], (2500,))]
    for doc in many[1:-2:2]:
        del doc["body"]
    assert int(refused(sealed_again(many)).ids["index"]) == 0


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d[0].update(schema=2),
        lambda d: d[0].update(size=-1),
        lambda d: d[0].update(size=True),
        lambda d: d[0].update(first=41),
        lambda d: d[0].update(before="!"),
        lambda d: d[0].update(before="AAAA"),
        lambda d: d[0].update(log=None),
        lambda d: d[1].update(hash="AAAA"),
        lambda d: d[1].update(hash=5),
        lambda d: d[1].update(body=7),
        lambda d: d[9].update(checkpoint=None),
        lambda d: d.insert(1, {"strange": 1}),
        lambda d: d.append({"strange": 1}),
    ],
)
def test_bad_files_are_told_as_such(change: Callable[[list[dict[str, Any]]], None]) -> None:
    docs = [json.loads(line) for line in export(BODIES, (8, 40))]
    change(docs)
    with pytest.raises((Invalid, Mismatch)):
        verify(sealed_again(docs), vkey())


def prove(index: int, size: int = 40) -> bytes:
    hashes = [tlog.leaf_hash(b.encode()) for b in BODIES]
    nodes = tlog.inclusion(lambda height, at: tlog.root_of(hashes[at << height : (at + 1) << height]), index, size)
    return proof_of((hashes[index], BODIES[index]), index, nodes, signed(BODIES, size))


def test_a_proof_of_one_entry() -> None:
    for index in (0, 7, 39):
        found = verify_proof(prove(index), vkey())
        assert (found["index"], found["size"], found["entry"]) == (index, 40, json.loads(BODIES[index]))
    for change in ({"i": 8}, {"body": body(7, org="else")}, {"proof": []}, {"hash": base64.b64encode(bytes(32)).decode(), "body": BODIES[8]}):
        with pytest.raises(Mismatch):
            verify_proof(json.dumps(json.loads(prove(7)) | change).encode(), vkey())
    for broken in ({"schema": 3}, {"proof": "x"}, {"proof": ["x"]}, {"i": "7"}, {"checkpoint": 1}, {"proof": [""] * 65}):
        with pytest.raises(Invalid):
            verify_proof(json.dumps(json.loads(prove(7)) | broken).encode(), vkey())


def test_the_golden_export() -> None:
    """Written once, byte for byte: later versions must still read it."""
    pinned = (GOLDEN / "audit.vkey").read_text().strip()
    with (GOLDEN / "audit-export.jsonl").open("rb") as file:
        found = verify(file, pinned, (GOLDEN / "audit-checkpoint.txt").read_text())
    assert (found.size, found.checkpoints, found.since, found.sealed, found.leases) == (12, 3, 5, 2, {"acme": 2})
    assert verify_proof((GOLDEN / "audit-proof.json").read_bytes(), pinned)["index"] == 6


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole, kept, proof, pin = (tmp_path / name for name in ("log", "kept", "proof", "vkey"))
    whole.write_bytes(b"".join(export(BODIES, (20, 40))))
    kept.write_text(signed(BODIES, 20))
    proof.write_bytes(prove(7))
    pin.write_text(vkey() + "\n")
    assert main([str(whole), "--key", str(pin), "--since", str(kept), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["since"] == 20
    assert main([str(proof), "--key", vkey()]) == 0 and "entry 7 of 40 in airlock-test is proven" in capsys.readouterr().out
    assert main([str(whole), "--key", vkey()]) == 0 and "entries 0 to 39 are whole; 2 checkpoints" in capsys.readouterr().out
    with pytest.raises(Invalid, match="a proof of one entry"):
        main([str(proof), "--key", vkey(), "--since", str(kept)])
    with pytest.raises(Invalid, match="verifier key cannot be read"):
        main([str(whole), "--key", str(kept)])
    with (tmp_path / "huge").open("wb") as huge:
        huge.truncate(1 << 40)
    with pytest.raises(Invalid, match="is no checkpoint"):
        main([str(whole), "--key", vkey(), "--since", str(tmp_path / "huge")])
    whole.write_bytes(b"".join(export(BODIES[:3] + BODIES[4:], (20, 39))))
    argv = [sys.executable, "-m", "artifact.cli", "audit", "verify", str(whole), "--key", vkey(), "--since", str(kept)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 7 and "entries 0 to 19 are not those" in done.stderr


def test_the_command_needs_the_base_alone() -> None:
    code = "import sys; import artifact.commands.audit_verify; print(sorted({m.split('.')[0] for m in sys.modules}))"
    found = set(json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.replace("'", '"')))
    assert not found & {"sqlalchemy", "fastapi", "uvicorn", "boto3", "tuf", "aiohttp", "registry", "mirror", "runtime"}
