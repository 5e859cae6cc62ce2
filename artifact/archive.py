"""A layer's tar as a stream of entries: unpacked, parsed and bounded while it is read; no I/O of its own.

Must not: use a library's unpacker on foreign archives, believe a size before the bytes are there, or keep more than a block and a header in memory.
"""

from __future__ import annotations

import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

from artifact.errors import Invalid, TooLarge, Unsupported
from artifact.store import Descriptor

BLOCK = 512
SLICE = 64 * 1024
MAX_ENTRIES = 2_000_000  # of one layer
MAX_NAME = 64 * 1024
MAX_EXTENSION = 1024 * 1024  # bytes of one PAX header
MAX_EXTENSIONS = 16  # headers that stand before one entry
FREE_BYTES = 1024 * 1024 * 1024  # what a layer may unpack to whatever its size
MAX_RATIO = 200
_GZIP, _ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"


@dataclass
class Head:
    """A tar header with what the extensions before it said; `sparse` content is not what the file holds."""

    kind: bytes
    name: str
    target: str
    size: int
    sparse: bool = False


def parts_of(name: str) -> tuple[str, ...]:
    """A name's parts from the image's root, which an absolute one begins at too; raises Invalid for `..`, which would leave it."""
    if ".." in (parts := name.split("/")) or "\0" in name:
        raise Invalid(f"a layer has an entry named {name[:200]!r}", expected="a name without ..", reason="layer")
    return tuple(part for part in parts if part not in ("", "."))


def entries(reader: Reader) -> Iterator[tuple[Head, tuple[str, ...]]]:
    """Headers in order; whoever takes one reads or skips its content before the next."""
    while (head := _head(reader)) is not None:
        yield head, parts_of(head.name)


def _head(reader: Reader) -> Head | None:
    """The next entry's header with its extensions (PAX, GNU long names), None at the end; raises Invalid for what is no sound tar."""
    pax: dict[str, str] = {}
    long_name = long_target = ""
    for _ in range(MAX_EXTENSIONS + 1):
        block = reader.block()
        if block is None:
            if pax or long_name or long_target:
                raise reader.bad("ends behind the name of an entry")
            return None
        try:
            info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except tarfile.HeaderError as error:
            raise reader.bad(f"has a header that is none ({error})") from None
        if info.size < 0:
            raise reader.bad("has an entry of negative size")
        if info.type in (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK):
            text = reader.extension(info.size, MAX_NAME).rstrip(b"\0").decode("utf-8", "surrogateescape")
            long_name, long_target = (text, long_target) if info.type == tarfile.GNUTYPE_LONGNAME else (long_name, text)
        elif info.type in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE):
            pax |= _pax(reader.extension(info.size, MAX_EXTENSION), reader)
        elif info.type == tarfile.XGLTYPE:
            told = _pax(reader.extension(info.size, MAX_EXTENSION), reader)
            if told.keys() & {"path", "linkpath", "size"}:
                raise reader.bad("names all its entries at once")
        else:
            return _told(info, block, pax, long_name, long_target, reader)
    raise reader.bad(f"has more than {MAX_EXTENSIONS} headers before one entry")


def _told(info: tarfile.TarInfo, block: bytes, pax: dict[str, str], long_name: str, long_target: str, reader: Reader) -> Head:
    size = info.size
    if "size" in pax:
        if not (pax["size"].isascii() and pax["size"].isdigit() and len(pax["size"]) < 20):
            raise reader.bad("has an entry whose size is no number")
        size = int(pax["size"])
    sparse = info.type == tarfile.GNUTYPE_SPARSE or any(key.startswith("GNU.sparse.") for key in pax)
    if info.type == tarfile.GNUTYPE_SPARSE:
        more, count = block[482], 0
        while more:  # maps of the holes, which lie before the content
            extra, count = reader.block(), count + 1
            if extra is None or count > MAX_EXTENSION // BLOCK:
                raise reader.bad("has a sparse file without an end of its map")
            more = extra[504]
    if info.type in (tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE):
        size = 0  # such have no content, whatever their header says
    name = pax.get("GNU.sparse.name") or pax.get("path") or long_name or info.name
    target = pax.get("linkpath") or long_target or info.linkname
    return Head(info.type, name, target, size, sparse)


def _pax(raw: bytes, reader: Reader) -> dict[str, str]:
    """Records `length key=value\\n` of a PAX header (POSIX.1-2001 pax)."""
    out: dict[str, str] = {}
    at = 0
    while at < len(raw) and raw[at]:
        digits, blank, _ = raw[at : at + 8].partition(b" ")
        length = int(digits) if blank and digits.isdigit() else 0
        record = raw[at : at + length]
        key, equals, value = record[len(digits) + 1 : -1].partition(b"=")
        if length < len(digits) + 4 or len(record) != length or record[-1:] != b"\n" or not equals:
            raise reader.bad("has a PAX header that is none")
        out[key.decode("utf-8", "surrogateescape")] = value.decode("utf-8", "surrogateescape")
        at += length
    return out


class Reader:
    """Exact reads from a stream of pieces."""

    def __init__(self, parts: Iterator[bytes], digest: str) -> None:
        self._parts, self._digest = parts, digest
        self._have, self._at = b"", 0

    def bad(self, what: str) -> Invalid:
        """The refusal of this layer."""
        return Invalid(
            f"the layer {self._digest} {what}", expected="a sound tar archive", do="pull the image again, or tell its maker", reason="layer"
        )

    def take(self, count: int) -> bytes:
        """Exactly `count` bytes; raises Invalid where the archive ends before."""
        out = bytearray()
        while len(out) < count:
            if not self._more():
                raise self.bad("is truncated")
            step = min(count - len(out), len(self._have) - self._at)
            out += self._have[self._at : self._at + step]
            self._at += step
        return bytes(out)

    def skip(self, count: int) -> None:
        """Passes over `count` bytes; raises Invalid where the archive ends before."""
        if self._over(count):
            raise self.bad("is truncated")

    def pad(self, size: int) -> None:
        """Passes over the rest of the last block of content; where the archive ends in it that is its end, as umoci's and to Go's reader."""
        self._over(-size % BLOCK)

    def block(self) -> bytes | None:
        """The next header block, None where the archive ends: with blocks of zeros, or between two entries."""
        if not self._more():
            return None
        block = self.take(BLOCK)
        if block.count(0) != BLOCK:
            return block
        if self._more() and self.take(BLOCK).count(0) != BLOCK:
            raise self.bad("has things behind its end")
        return None

    def extension(self, size: int, limit: int) -> bytes:
        """The content of a header that belongs to the next one."""
        if size > limit:
            raise TooLarge(f"the layer {self._digest} has a header of {size} bytes", expected=f"at most {limit}")
        raw = self.take(size)
        self.pad(size)
        return raw

    def drain(self) -> None:
        """Reads to the end, which is what checks the layer's digest."""
        self._have, self._at = b"", 0
        for _ in self._parts:
            pass

    def _over(self, count: int) -> int:
        """Passes over at most `count` bytes and says how many of them are not there."""
        while count > 0 and self._more():
            step = min(count, len(self._have) - self._at)
            self._at += step
            count -= step
        return count

    def _more(self) -> bool:
        while self._at >= len(self._have):
            part = next(self._parts, None)
            if part is None:
                return False
            self._have, self._at = part, 0
        return True


def unpacked(parts: Iterator[bytes], layer: Descriptor) -> Iterator[bytes]:
    """A layer's tar in pieces of bounded size, whatever it is packed with: its first bytes say that, as they do to docker and containerd."""
    first = b""
    while len(first) < 4 and (part := next(parts, None)) is not None:
        first += part
    if first.startswith(_ZSTD):
        what = f"the layer {layer.digest} is packed with zstd"
        raise Unsupported(what, expected="gzip or plain tar", do="have the image pushed with gzip layers", reason="zstd")
    limit = max(FREE_BYTES, MAX_RATIO * layer.size)
    source = _whole(first, parts)
    have = 0
    for piece in _gunzip(source, layer) if first.startswith(_GZIP) else source:
        have += len(piece)
        if have > limit:
            raise TooLarge(f"the layer {layer.digest} unpacks to more than {limit} bytes", expected=f"at most {MAX_RATIO} times its size")
        yield piece


def _whole(first: bytes, parts: Iterator[bytes]) -> Iterator[bytes]:
    if first:
        yield first
    yield from parts


def _gunzip(parts: Iterator[bytes], layer: Descriptor) -> Iterator[bytes]:
    """All members of a gzip file (RFC 1952); zeros behind the last are padding."""
    member, members, padded = zlib.decompressobj(31), 1, False
    try:
        for part in parts:
            for lo in range(0, len(part), SLICE):
                data = part[lo : lo + SLICE]
                while data:
                    if member.eof:
                        if not data.strip(b"\0"):
                            padded = True
                            break
                        if padded:
                            raise zlib.error("things behind its end")
                        member, members = zlib.decompressobj(31), members + 1
                        if members > MAX_ENTRIES:
                            raise TooLarge(f"the layer {layer.digest} has more than {MAX_ENTRIES} gzip members", expected=f"at most {MAX_ENTRIES}")
                    out = member.decompress(data, 4 * SLICE)
                    data = member.unused_data if member.eof else member.unconsumed_tail
                    if out:
                        yield out
        while not member.eof and (out := member.decompress(b"", 4 * SLICE)):
            yield out
        if not member.eof:
            raise zlib.error("it ends in the middle")
    except zlib.error as error:
        raise Invalid(
            f"the layer {layer.digest} is no sound gzip file: {error}", expected="gzip", do="pull the image again", reason="layer"
        ) from None
