"""The audit log's mathematics: Merkle tree, proofs and signed checkpoints, as Go's sumdb/tlog and sumdb/note read them; bytes in, bytes out.

Here, in the base, because an auditor verifies without a registry. It does no I/O: hashes of stored subtrees come through a function.
Sources: RFC 6962 section 2.1, RFC 9162 section 2.1, C2SP signed-note and tlog-checkpoint.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from artifact.errors import Invalid, Mismatch

HASH = 32
HEIGHT = 8  # a tile holds up to 2**HEIGHT hashes of one level, each the root of so many of the level below
TILE = 1 << HEIGHT
ED25519 = b"\x01"
MAX_NOTE = 64 * 1024
MAX_SIZE = 1 << 62
Reader = Callable[[int, int], bytes]  # (height, index): the root of the leaves [index << height, (index + 1) << height)


def leaf_hash(body: bytes) -> bytes:
    """The hash of one entry (RFC 6962 section 2.1)."""
    return hashlib.sha256(b"\0" + body).digest()


def node_hash(left: bytes, right: bytes) -> bytes:
    """The hash over two subtrees (RFC 6962 section 2.1)."""
    return hashlib.sha256(b"\1" + left + right).digest()


class Range:
    """The compact range of all leaves so far: what a sequencer must remember, at most 62 hashes of 32 bytes."""

    def __init__(self, size: int = 0, nodes: bytes = b"") -> None:
        if size < 0 or len(nodes) != HASH * size.bit_count():
            raise Invalid("the head of the log does not fit its size", expected=f"{size.bit_count()} hashes for {size} entries", reason="log")
        self.size = size
        self._nodes = [nodes[i : i + HASH] for i in range(0, len(nodes), HASH)]

    def append(self, leaf: bytes) -> list[bytes]:
        """Adds one leaf hash; returns the roots of the whole subtrees that end with it, by height."""
        ended, left = [leaf], self.size
        while left & 1:
            ended.append(node_hash(self._nodes.pop(), ended[-1]))
            left >>= 1
        self._nodes.append(ended[-1])
        self.size += 1
        return ended

    def root(self) -> bytes:
        """The root over all leaves; that of none is the hash of nothing."""
        if not self._nodes:
            return hashlib.sha256(b"").digest()
        found = self._nodes[-1]
        for left in reversed(self._nodes[:-1]):
            found = node_hash(left, found)
        return found

    def nodes(self) -> bytes:
        """The hashes as they are stored, the widest subtree first."""
        return b"".join(self._nodes)


def root_of(leaves: Iterable[bytes]) -> bytes:
    """The root over leaf hashes."""
    found = Range()
    for leaf in leaves:
        found.append(leaf)
    return found.root()


def _split(size: int) -> int:
    return 1 << ((size - 1).bit_length() - 1)  # the largest power of two below it


def subtree(read: Reader, lo: int, hi: int) -> bytes:
    """The root over the leaves [lo, hi) of a tree in which they are a node, out of the whole subtrees below it."""
    size = hi - lo
    if size & (size - 1) == 0:
        return read(size.bit_length() - 1, lo // size)
    middle = lo + _split(size)
    return node_hash(subtree(read, lo, middle), subtree(read, middle, hi))


def inclusion(read: Reader, index: int, size: int) -> list[bytes]:
    """The proof that the entry `index` is in the tree of `size` entries (RFC 6962 section 2.1.1); raises Invalid."""
    if not 0 <= index < size:
        raise Invalid(f"there is no entry {index}", expected=f"0 to {size - 1}" if size else "an entry of a log that has one", reason="log")
    proof: list[bytes] = []
    lo, hi = 0, size
    while hi - lo > 1:
        middle = lo + _split(hi - lo)
        if index < middle:
            proof.append(subtree(read, middle, hi))
            hi = middle
        else:
            proof.append(subtree(read, lo, middle))
            lo = middle
    return proof[::-1]


def consistency(read: Reader, old: int, size: int) -> list[bytes]:
    """The proof that the tree of `size` entries begins with that of `old` (RFC 6962 section 2.1.2); raises Invalid."""
    if not 0 < old <= size:
        raise Invalid(f"a log of {size} entries has no beginning of {old}", expected=f"1 to {size}", reason="log")
    proof: list[bytes] = []
    lo, hi, whole = 0, size, True
    while old != hi:
        middle = lo + _split(hi - lo)
        if old <= middle:
            proof.append(subtree(read, middle, hi))
            hi = middle
        else:
            proof.append(subtree(read, lo, middle))
            lo, whole = middle, False
    if not whole:
        proof.append(subtree(read, lo, hi))
    return proof[::-1]


def verify_inclusion(leaf: bytes, index: int, size: int, proof: Sequence[bytes], root: bytes) -> None:
    """Returns only if the leaf hash stands at `index` in the tree of this root (RFC 9162 section 2.1.3.2); raises Mismatch, Invalid."""
    if not 0 <= index < size <= MAX_SIZE:
        raise Invalid(f"entry {index} of {size} cannot be", expected="an index below the size", reason="log")
    at, last, found = index, size - 1, leaf
    for node in proof:
        if len(node) != HASH or last == 0:
            raise _unproven()
        if at & 1 or at == last:
            found = node_hash(node, found)
            while not at & 1 and at:
                at, last = at >> 1, last >> 1
        else:
            found = node_hash(found, node)
        at, last = at >> 1, last >> 1
    if last != 0 or found != root:
        raise _unproven()


def verify_consistency(old: int, size: int, old_root: bytes, root: bytes, proof: Sequence[bytes]) -> None:
    """Returns only if the tree of `root` begins with that of `old_root` (RFC 9162 section 2.1.4.2); raises Mismatch, Invalid."""
    if not 0 <= old <= size <= MAX_SIZE:
        raise Invalid(f"a log of {size} entries cannot begin with {old}", expected="the smaller one first", reason="log")
    if old in (0, size):
        if proof or (old == size and old_root != root) or (old == 0 and old_root != Range().root()):
            raise _unproven()
        return
    rest = list(proof)
    if any(len(node) != HASH for node in rest):
        raise _unproven()
    if old & (old - 1) == 0:
        rest.insert(0, old_root)
    if not rest:
        raise _unproven()
    at, last = old - 1, size - 1
    while at & 1:
        at, last = at >> 1, last >> 1
    first = second = rest[0]
    for node in rest[1:]:
        if last == 0:
            raise _unproven()
        if at & 1 or at == last:
            first, second = node_hash(node, first), node_hash(node, second)
            while not at & 1 and at:
                at, last = at >> 1, last >> 1
        else:
            second = node_hash(second, node)
        at, last = at >> 1, last >> 1
    if last != 0 or first != old_root or second != root:
        raise _unproven()


def _unproven() -> Mismatch:
    return Mismatch(
        "the proof does not hold", expected="a proof over exactly these entries", do="ask for the log again; else it was altered", reason="log"
    )


# ---- checkpoints


@dataclass(frozen=True)
class Checkpoint:
    """What one signature vouches for: the log's name, how many entries, the root over them."""

    origin: str
    size: int
    root: bytes

    def text(self) -> str:
        """The signed text (C2SP tlog-checkpoint)."""
        return f"{self.origin}\n{self.size}\n{base64.b64encode(self.root).decode()}\n"


def _key_id(name: str, public: bytes) -> bytes:
    return hashlib.sha256(name.encode() + b"\n" + ED25519 + public).digest()[:4]


def _check_name(name: str) -> str:
    if not name or len(name) > 200 or any(ch.isspace() or ch == "+" or not ch.isprintable() for ch in name):
        raise Invalid("that cannot name a log", expected="printable text without spaces and +", reason="log")
    return name


def new_key() -> bytes:
    """A new Ed25519 private key as PKCS#8 PEM."""
    return Ed25519PrivateKey.generate().private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())


def _private(pem: bytes) -> Ed25519PrivateKey:
    try:
        key = serialization.load_pem_private_key(pem, None)
    except (ValueError, TypeError) as error:
        raise Invalid("the audit key cannot be read", expected="PKCS#8 PEM of an Ed25519 key without a passphrase", reason="key") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise Invalid("the audit key is of another kind", expected="Ed25519", reason="key")
    return key


def _raw(key: Ed25519PublicKey) -> bytes:
    return key.public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)


def verifier_key(name: str, private_pem: bytes) -> str:
    """The line that auditors pin: name, key id and public key (C2SP signed-note); raises Invalid."""
    public = _raw(_private(private_pem).public_key())
    return f"{_check_name(name)}+{_key_id(name, public).hex()}+{base64.b64encode(ED25519 + public).decode()}"


def name_of(vkey: str) -> str:
    """The log whose checkpoints a verifier key opens; raises Invalid."""
    return _parse_vkey(vkey)[0]


def sign_checkpoint(checkpoint: Checkpoint, name: str, private_pem: bytes) -> str:
    """The checkpoint as a signed note (C2SP signed-note); raises Invalid."""
    key, text = _private(private_pem), checkpoint.text()
    signature = _key_id(_check_name(name), _raw(key.public_key())) + key.sign(text.encode())
    return f"{text}\n— {name} {base64.b64encode(signature).decode()}\n"


def open_checkpoint(note: str, vkey: str) -> Checkpoint:
    """The checkpoint of a note that the pinned verifier key signed; lines of other signers are passed over; raises Invalid, Mismatch."""
    name, public = _parse_vkey(vkey)
    if len(note) > MAX_NOTE or "\n\n— " not in note or not note.endswith("\n"):
        raise Invalid("that is no signed checkpoint", expected="name, size, root, an empty line and signatures", reason="log")
    text, _, signatures = note.rpartition("\n\n— ")
    text += "\n"
    signed = False
    for line in ("— " + signatures)[:-1].split("\n"):
        found = re.fullmatch("— ([^ +\n]+) ([A-Za-z0-9+/=]+)", line)
        if found is None:
            raise Invalid("a signature line of the checkpoint cannot be read", expected="a dash, the name and base64", reason="log")
        raw = _base64(found[2])
        if found[1] != name or raw[:4] != _key_id(name, _raw(public)):
            continue
        try:
            public.verify(raw[4:], text.encode())
        except InvalidSignature as error:
            raise Mismatch("the checkpoint's signature does not verify", expected=f"one by {name}", reason="signature") from error
        signed = True
    if not signed:
        raise Mismatch("the checkpoint is not signed by the pinned key", expected=name, reason="signature")
    found_in = _parse_text(text)
    if found_in.origin != name:
        raise Mismatch("the checkpoint is of another log", expected=name, reason="log")
    return found_in


def _parse_text(text: str) -> Checkpoint:
    lines = text.split("\n")
    if len(lines) < 4 or not re.fullmatch(r"0|[1-9][0-9]{0,18}", lines[1]) or int(lines[1]) > MAX_SIZE:
        raise Invalid("the signed text is no checkpoint", expected="name, size and root, a line each", reason="log")
    root = _base64(lines[2])
    if len(root) != HASH:
        raise Invalid("the checkpoint's root is no hash", expected=f"{HASH} bytes in base64", reason="log")
    return Checkpoint(lines[0], int(lines[1]), root)


def _parse_vkey(vkey: str) -> tuple[str, Ed25519PublicKey]:
    name, _, rest = vkey.strip().partition("+")
    key_id, _, encoded = rest.partition("+")
    raw = _base64(encoded) if re.fullmatch(r"[A-Za-z0-9+/]{44}", encoded) else b""
    if raw[:1] != ED25519 or len(raw) != 33 or key_id != _key_id(_check_name(name), raw[1:]).hex():
        raise Invalid("the verifier key cannot be read", expected="name+hash+key as `airlock audit key` prints it", reason="key")
    return name, Ed25519PublicKey.from_public_bytes(raw[1:])


def _base64(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise Invalid("a text of the log is not base64", expected="standard base64 with padding", reason="log") from error
