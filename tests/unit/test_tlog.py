"""The log's mathematics against RFC 6962's definition written out naively, the reference's vectors, and every change of a valid proof or note."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from artifact import tlog
from artifact.errors import AirlockError, Invalid, Mismatch

ROOTS = """e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855 c00b4d3c929cb5cc316691ed4636f634576f2c9b2954767234c5274e9dde185d
ed692f01f7f6c46930d7ad8f9adad3f9f38b7379cf6a8d2f399a0ba1e914fe25 961d2e2be20f538ffdf56962a86d1bd165498f222684ee4c5e02c1e9f852adc5
5c8dc617d287a4297eb2bcb81b37644b5138e57ad461c657db152109e3fc9fca 2bdbcd79bf92b8dad52ba685f01bef520f0cda04468a13a6bd27bfbeebff64d7
27f629c55e28c78c848084f537a9171f55a615667f24318c9992cab36f6c7d7f 316cc65a242cdebb8795b5d051b4912380e76ed2e4e64dae44a5fd04e7251951
b13f019bd17bf7371b2ac2427a7c3780cab6c4281ff23af529f2ab2e6030cfae"""
RFC_INPUTS = [bytes.fromhex(h) for h in ("", "00", "10", "2021", "3031", "40414243", "5051525354555657", "606162636465666768696a6b6c6d6e6f")]
NOTE = """airgap.example/audit
8
sT8Bm9F79zcbKsJCenw3gMq2xCgf8jr1KfKrLmAwz64=

— airgap.example/audit PutzS6v2mZmyhSD3rTWyM5kM1mXfwNvJlYVzOZRHa8RWyxdd86fkxoVCuqpQ5zoogRIyy50NEh7/nH9eCOjtVPTtVwk=
"""
VKEY = "airgap.example/audit+3eeb734b+AQOhB7/zzhC+HXDdGOdLwJln5NYwm6UNXx3chmQSVTG4"
SEED = Ed25519PrivateKey.from_private_bytes(bytes(range(32))).private_bytes(
    serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
)
LETTERS = [tlog.leaf_hash(bytes([c])) for c in b"ABCDEFGH"]


def naive_root(leaves: Sequence[bytes]) -> bytes:
    """RFC 6962 section 2.1, word for word."""
    if not leaves:
        return hashlib.sha256(b"").digest()
    if len(leaves) == 1:
        return leaves[0]
    k = 1
    while k * 2 < len(leaves):
        k *= 2
    return hashlib.sha256(b"\1" + naive_root(leaves[:k]) + naive_root(leaves[k:])).digest()


def reader(leaves: Sequence[bytes]) -> tlog.Reader:
    return lambda height, index: naive_root(leaves[index << height : (index + 1) << height])


def test_vectors() -> None:
    for size in range(9):
        assert tlog.root_of(LETTERS[:size]).hex() == ROOTS.split()[size]
    assert tlog.root_of([tlog.leaf_hash(raw) for raw in RFC_INPUTS]).hex() == "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328"
    whole = "08a2afecc9feaef6737f055c177a56a363d28a78d7b259b8c5f66b32174f2e7d"
    assert tlog.inclusion(reader(LETTERS), 2, 8)[0].hex() == whole
    steps = [node.hex() for node in tlog.consistency(reader(LETTERS), 3, 8)]
    assert steps[0] == "b563a5e69628743929eddec0ccfeb0745c39577e12a72e84915edd6633cb97f2" and steps[1] == whole and len(steps) == 4
    assert tlog.consistency(reader(LETTERS), 4, 8) == [bytes.fromhex(steps[3])]


@given(st.lists(st.binary(max_size=4), max_size=70))
def test_the_compact_range_is_the_definition(entries: list[bytes]) -> None:
    leaves = [tlog.leaf_hash(entry) for entry in entries]
    found = tlog.Range()
    for leaf in leaves:
        found.append(leaf)
        found = tlog.Range(found.size, found.nodes())  # as it is stored and read again
    assert found.root() == naive_root(leaves) and found.size == len(leaves)


@given(st.integers(1, 300), st.data())
def test_proofs_hold_and_nothing_near_them_does(size: int, data: st.DataObject) -> None:
    leaves = [tlog.leaf_hash(str(i).encode()) for i in range(size)]
    read, root = reader(leaves), naive_root(leaves)
    index, old = data.draw(st.integers(0, size - 1)), data.draw(st.integers(1, size))
    proof, steps = tlog.inclusion(read, index, size), tlog.consistency(read, old, size)
    tlog.verify_inclusion(leaves[index], index, size, proof, root)
    tlog.verify_consistency(old, size, naive_root(leaves[:old]), root, steps)
    wrong = hashlib.sha256(b"wrong").digest()
    for bad in [*_neighbours(proof, wrong)]:
        with pytest.raises(AirlockError):
            tlog.verify_inclusion(leaves[index], index, size, bad, root)
    for bad in [*_neighbours(steps, wrong)]:
        with pytest.raises(AirlockError):
            tlog.verify_consistency(old, size, naive_root(leaves[:old]), root, bad)
    with pytest.raises(AirlockError):
        tlog.verify_inclusion(wrong, index, size, proof, root)
    with pytest.raises(AirlockError):
        tlog.verify_inclusion(leaves[index], index, size, proof, wrong)
    if size > 1:
        with pytest.raises(AirlockError):
            tlog.verify_inclusion(leaves[index], (index + 1) % size, size, proof, root)
    with pytest.raises(AirlockError):
        tlog.verify_consistency(old, size, wrong, root, steps)


def _neighbours(proof: list[bytes], wrong: bytes) -> list[list[bytes]]:
    out = [[*proof, wrong], [wrong, *proof]]
    for i in range(len(proof)):
        out += [proof[:i] + proof[i + 1 :], [*proof[:i], wrong, *proof[i + 1 :]], [*proof[:i], proof[i][:-1], *proof[i + 1 :]]]
    return out


def test_impossible_questions() -> None:
    for call in (
        lambda: tlog.inclusion(reader(LETTERS), 8, 8),
        lambda: tlog.inclusion(reader([]), 0, 0),
        lambda: tlog.consistency(reader(LETTERS), 0, 8),
        lambda: tlog.consistency(reader(LETTERS), 9, 8),
        lambda: tlog.verify_inclusion(LETTERS[0], -1, 8, [], LETTERS[0]),
        lambda: tlog.verify_consistency(9, 8, LETTERS[0], LETTERS[0], []),
        lambda: tlog.Range(3, b"x" * 32),
    ):
        with pytest.raises(Invalid):
            call()
    tlog.verify_consistency(0, 8, tlog.Range().root(), tlog.root_of(LETTERS), [])
    with pytest.raises(Mismatch):
        tlog.verify_consistency(8, 8, LETTERS[0], tlog.root_of(LETTERS), [])


def test_the_note_of_the_reference() -> None:
    assert tlog.verifier_key("airgap.example/audit", SEED) == VKEY
    checkpoint = tlog.Checkpoint("airgap.example/audit", 8, tlog.root_of(LETTERS))
    assert tlog.sign_checkpoint(checkpoint, "airgap.example/audit", SEED) == NOTE
    assert tlog.open_checkpoint(NOTE, VKEY) == checkpoint
    witness = NOTE + "— witness.example " + base64.b64encode(b"1234" + b"x" * 64).decode() + "\n"
    assert tlog.open_checkpoint(witness, VKEY) == checkpoint, "lines of others are passed over"


def test_each_changed_byte_of_a_note_is_refused() -> None:
    for i in range(len(NOTE)):
        for change in ("", "x", "A", "0", "\n", " "):
            bad = NOTE[:i] + change + NOTE[i + 1 :]
            if bad == NOTE:
                continue
            with pytest.raises((Invalid, Mismatch)):
                assert tlog.open_checkpoint(bad, VKEY) == tlog.open_checkpoint(NOTE, VKEY), "never another checkpoint"
                raise Mismatch("the same checkpoint")  # bytes outside what is signed may change nothing
    for bad in ("", "\n\n— ", NOTE * 2000, NOTE.replace("\n8\n", "\n08\n")):
        with pytest.raises((Invalid, Mismatch)):
            tlog.open_checkpoint(bad, VKEY)
    for bad in ("", "a+b+c", VKEY[:-4], VKEY.replace("3eeb734b", "3eeb734c"), VKEY.replace("airgap", "airgep"), "x y" + VKEY):
        with pytest.raises(Invalid):
            tlog.open_checkpoint(NOTE, bad)


def test_keys() -> None:
    other = tlog.new_key()
    checkpoint = tlog.Checkpoint("airgap.example/audit", 8, tlog.root_of(LETTERS))
    note = tlog.sign_checkpoint(checkpoint, "airgap.example/audit", other)
    with pytest.raises(Mismatch):
        tlog.open_checkpoint(note, VKEY)
    assert tlog.open_checkpoint(note, tlog.verifier_key("airgap.example/audit", other)) == checkpoint
    for name in ("", "a b", "a+b", "a\n", "x" * 201):
        with pytest.raises(Invalid):
            tlog.sign_checkpoint(checkpoint, name, SEED)
    with pytest.raises(Invalid):
        tlog.verifier_key("a", b"no key")
