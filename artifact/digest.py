"""The only hashing loop: SHA-256 whose state can be exported, stored and continued by another process, and the fixed piece size.

Why here: hashlib cannot export its state, so a resumed transfer would hash everything again; libcrypto can (docs/adr/0002-sha256-state.md).
Must not: hold a whole object in memory, or give a digest from a state that it cannot prove to be complete.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import struct
from abc import ABC, abstractmethod
from pathlib import Path

from artifact.errors import Invalid, Mismatch, Unsupported

PIECE = 64 * 1024 * 1024
BUFFER = 1024 * 1024
_ALGORITHMS = ("sha256", "sha512")
_HEAD = struct.Struct(">8IQ")
_MAX_BYTES = 1 << 61  # SHA-256 counts bits in 64 bits


class _Context(ctypes.Structure):
    """SHA256_CTX of OpenSSL 1.1 and 3 (openssl/sha.h): 112 bytes, the same on every platform where SHA_LONG is 32 bits."""

    _fields_ = (
        ("h", ctypes.c_uint32 * 8),
        ("low", ctypes.c_uint32),
        ("high", ctypes.c_uint32),
        ("data", ctypes.c_ubyte * 64),
        ("num", ctypes.c_uint32),
        ("md_len", ctypes.c_uint32),
        ("spare", ctypes.c_ubyte * 144),  # never used by the layout above; a library with a larger context must not write past our memory
    )


class _Buffer(ctypes.Structure):
    """Py_buffer of CPython 3.11+, so that read-only views are hashed without a copy."""

    _fields_ = (
        ("buf", ctypes.c_void_p),
        ("obj", ctypes.c_void_p),
        ("len", ctypes.c_ssize_t),
        ("itemsize", ctypes.c_ssize_t),
        ("readonly", ctypes.c_int),
        ("ndim", ctypes.c_int),
        ("format", ctypes.c_void_p),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("suboffsets", ctypes.c_void_p),
        ("internal", ctypes.c_void_p),
    )


class Hasher(ABC):
    """A running digest over bytes [0, offset); `state()` continues it elsewhere."""

    algorithm: str
    offset: int

    @abstractmethod
    def update(self, view: bytes | bytearray | memoryview) -> None:
        """Appends bytes; the interpreter lock is released while they are hashed."""

    @abstractmethod
    def hexdigest(self) -> str:
        """Lower-case hex of the digest so far; the hasher can go on."""

    @abstractmethod
    def state(self) -> bytes:
        """The portable state of bytes [0, offset) (docs/adr/0002), b"" where it cannot be exported."""

    def digest(self) -> str:
        """`sha256:` and hexdigest()."""
        return f"{self.algorithm}:{self.hexdigest()}"


class _Library(Hasher):
    """hashlib: every algorithm, no exportable state."""

    def __init__(self, algorithm: str) -> None:
        self.algorithm = algorithm
        self.offset = 0
        self._hash = hashlib.new(algorithm, usedforsecurity=False)

    def update(self, view: bytes | bytearray | memoryview) -> None:
        self._hash.update(view)
        self.offset += memoryview(view).nbytes

    def hexdigest(self) -> str:
        return self._hash.hexdigest()

    def state(self) -> bytes:
        return b""


class _Crypto(Hasher):
    """SHA-256 of libcrypto through ctypes."""

    algorithm = "sha256"

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        self._context = _Context()
        self.offset = 0
        if library.SHA256_Init(ctypes.byref(self._context)) != 1:
            raise Unsupported("libcrypto refuses SHA-256", expected="a build with SHA256_Init")

    def update(self, view: bytes | bytearray | memoryview) -> None:
        buffer = _Buffer()
        ctypes.pythonapi.PyObject_GetBuffer(ctypes.py_object(view), ctypes.byref(buffer), 0)
        try:
            if buffer.len:
                self._library.SHA256_Update(ctypes.byref(self._context), buffer.buf, buffer.len)
                self.offset += buffer.len
        finally:
            ctypes.pythonapi.PyBuffer_Release(ctypes.byref(buffer))

    def hexdigest(self) -> str:
        copy = _Context.from_buffer_copy(self._context)  # Final clears the context; the caller may go on
        out = (ctypes.c_ubyte * 32)()
        self._library.SHA256_Final(out, ctypes.byref(copy))
        return bytes(out).hex()

    def state(self) -> bytes:
        return _HEAD.pack(*self._context.h, self.offset) + bytes(self._context.data[: self._context.num])

    def load(self, state: bytes) -> None:
        """Takes over a state of state(); raises Invalid."""
        if len(state) < _HEAD.size:
            raise Invalid("the stored hash state is too short", expected=f"at least {_HEAD.size} bytes")
        *chain, count = _HEAD.unpack_from(state)
        rest = state[_HEAD.size :]
        if len(rest) != count % 64 or count >= _MAX_BYTES:
            raise Invalid("the stored hash state contradicts its own length", expected=f"{count % 64} remaining bytes")
        fresh = _Context()
        self._library.SHA256_Init(ctypes.byref(fresh))
        fresh.h[:] = chain
        fresh.low, fresh.high = (count << 3) & 0xFFFFFFFF, (count << 3) >> 32
        ctypes.memmove(fresh.data, rest, len(rest))
        fresh.num = len(rest)
        self._context, self.offset = fresh, count


def _candidates() -> list[str]:
    """Paths and names of libcrypto: first the one that Python's own _hashlib has mapped, then what the loader finds."""
    found: list[str] = []
    try:
        import _hashlib  # noqa: F401 - maps libcrypto, where Python was built with OpenSSL

        for line in Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines():
            path = line.split(maxsplit=5)[-1]
            if "/libcrypto" in path and ".so" in path and path not in found:
                found.append(path)
    except (ImportError, OSError):
        found = []
    return [*found, "libcrypto.so.3", "libcrypto.so.1.1"]


def _probe(library: ctypes.CDLL) -> bool:
    """Whether the library's SHA-256 agrees with hashlib on known vectors and over an export and import at odd offsets."""
    for data in (b"", b"abc", bytes(range(256)) * 5 + b"odd"):
        for cut in {0, 1, 63, 64, 65, 127, len(data)}:
            if cut > len(data):
                continue
            first, second = _Crypto(library), _Crypto(library)
            first.update(data[:cut])
            second.load(first.state())
            second.update(memoryview(data)[cut:])
            want = hashlib.sha256(data).hexdigest()
            if second.hexdigest() != want or second.offset != len(data) or second.hexdigest() != want:
                return False
    chain = struct.unpack(">8I", _Crypto(library).state()[:32])
    return bool(chain[0] == 0x6A09E667 and chain[7] == 0x5BE0CD19)  # FIPS 180-4, 5.3.3: the layout is what we think it is


def _load() -> ctypes.CDLL | None:
    if _Context.spare.offset != 112:
        return None
    for name in _candidates():
        try:
            library = ctypes.CDLL(name)
            for symbol, types in (
                ("SHA256_Init", [ctypes.c_void_p]),
                ("SHA256_Update", [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]),
                ("SHA256_Final", [ctypes.c_void_p, ctypes.c_void_p]),
            ):
                function = getattr(library, symbol)
                function.argtypes, function.restype = types, ctypes.c_int
            if _probe(library):
                return library
        except (OSError, AttributeError, Unsupported, Invalid):
            continue  # absent, without the symbols, or another layout: the next one, then hashlib
    return None


ctypes.pythonapi.PyObject_GetBuffer.argtypes = [ctypes.py_object, ctypes.c_void_p, ctypes.c_int]
ctypes.pythonapi.PyObject_GetBuffer.restype = ctypes.c_int
ctypes.pythonapi.PyBuffer_Release.argtypes = [ctypes.c_void_p]
ctypes.pythonapi.PyBuffer_Release.restype = None
_CRYPTO = _load()


def can_export() -> bool:
    """Whether SHA-256 states can be exported and imported here."""
    return _CRYPTO is not None


def new(algorithm: str = "sha256", state: bytes = b"", offset: int = 0) -> Hasher:
    """A hasher, from an exported state of bytes [0, offset) if one is given; raises Unsupported, Invalid where it cannot continue."""
    if algorithm not in _ALGORITHMS:
        raise Unsupported(f"digest algorithm {algorithm[:40]!r}", expected=" or ".join(_ALGORITHMS))
    if algorithm != "sha256" or _CRYPTO is None:
        if state or offset:
            raise Unsupported(f"no {algorithm} state can be continued here", expected="hashing again from the first byte")
        return _Library(algorithm)
    hasher = _Crypto(_CRYPTO)
    if state:
        hasher.load(state)
    if hasher.offset != offset:
        raise Invalid(f"the stored hash state is of {hasher.offset} bytes", expected=f"a state of {offset} bytes")
    return hasher


def update_fd(hasher: Hasher, fd: int, lo: int, hi: int) -> None:
    """Hashes bytes [lo, hi) of a file; raises Mismatch when the file is shorter."""
    buffer = memoryview(bytearray(min(BUFFER, max(hi - lo, 1))))
    while lo < hi:
        got = os.preadv(fd, [buffer[: min(len(buffer), hi - lo)]], lo)
        if got == 0:
            raise Mismatch(f"the file ends at {lo}", expected=f"{hi} bytes")
        hasher.update(buffer[:got])
        lo += got


def hash_fd(fd: int, lo: int, hi: int, algorithm: str = "sha256") -> str:
    """The digest `sha256:…` of bytes [lo, hi) of an open file; raises Mismatch when the file is shorter."""
    hasher = new(algorithm)
    update_fd(hasher, fd, lo, hi)
    return hasher.digest()
