"""The writer of one S3 object: small ones by one request, larger ones by parts, resumable by any process at the exact offset.

Apart from registry/blobs/s3.py because what must hold here (which bytes are where, at which offset, until when) has nothing to do with how requests
are made. It opens no connection itself; a server's ETag is handed back to the server and believed for nothing else.
"""

from __future__ import annotations

import base64
import errno
import json
import secrets
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from artifact.digest import Hasher, can_export, new
from artifact.errors import Invalid, Mismatch, NotFound, Unavailable, Unsupported
from artifact.manifest import check_digest
from artifact.store import BlobWriter
from registry.bucket import GIB, MIN_PART, Memory, Options, Tail, key_of, location_of, may_cut, next_number, part_size

_LOST = ("InvalidPart", "InvalidPartOrder")
_CORRUPT = ("BadDigest", "XAmzContentSHA256Mismatch")


class Bucket(Protocol):
    """What a writer needs of the store (registry/blobs/s3.py makes it)."""

    options: Options
    memory: Memory
    spool: Path

    def ask(self, verb: str, key: str = "", **more: Any) -> Any:
        """One request about a key."""

    def size_of(self, key: str) -> int | None:
        """Size of a key's object."""

    def pieces(self, key: str, lo: int, hi: int) -> Any:
        """Bytes of a key's object."""

    def listing(self, prefix: str, after: str = "") -> Any:
        """Objects below a prefix."""

    def abort(self, key: str, multipart: str) -> None:
        """Ends an unfinished multipart upload."""

    def erase(self, prefix: str) -> None:
        """Deletes all objects below a prefix."""

    def discard(self, upload_id: str) -> None:
        """Removes what an upload has staged."""


def _gone() -> Mismatch:
    return Mismatch("the staged bytes of this upload are gone", do="start the upload again", reason="upload")


class S3Writer(BlobWriter):
    """One upload; its row keeps `state()`, the bucket keeps the parts and, after sync(), the list of parts and the bytes of the unfinished one."""

    def __init__(self, store: Bucket, upload_id: str, hint: str | None, algorithm: str, offset: int, state: bytes) -> None:
        self._store, self._id, self._algorithm = store, upload_id, algorithm
        self._folder = f"partial/{upload_id}/"
        direct = hint is not None and algorithm == "sha256" and can_export()  # only then is the digest known before the object can be seen
        self._key = key_of(location_of(str(hint))) if direct else f"uploads/{upload_id}"
        self._multipart = ""
        self._parts: list[tuple[str, int]] = []  # ETag and size
        self._saved = self._before = ""  # where the last two syncs lie: the row may still name either
        self._sent = 0
        self._open, self._complete = True, False
        self._tail = Tail(store.memory, store.spool)
        self._hasher: Hasher | None = new(algorithm)  # None: the state could not be continued, so the object is read before it becomes public
        self.offset = 0
        try:
            if offset or state:
                self._continue(state, offset)
        except BaseException:  # nobody else can close it: who asked for this writer gets none
            self._tail.close()
            raise

    # ---- resuming

    def _continue(self, state: bytes, offset: int) -> None:
        try:
            doc = json.loads(state)
            self._key, self._multipart, self._saved, self._before = doc["key"], doc["multipart"], doc["saved"], doc["before"]
            parts, tail, digest_state = int(doc["parts"]), int(doc["tail"]), base64.b64decode(doc["hash"])
        except (ValueError, KeyError, TypeError) as error:
            raise _gone() from error
        try:
            if parts:
                name = f"{self._folder}{self._saved}.parts"
                raw = b"".join(self._store.pieces(name, 0, self._store.size_of(name) or 0))
                self._parts = [(str(etag), int(size)) for etag, size in json.loads(raw)] if raw else []
                self._sent = sum(size for _, size in self._parts)
            self._complete = bool(self._multipart) and self._joined(offset)
            for piece in self._store.pieces(f"{self._folder}{self._saved}.tail", 0, tail):
                self._tail.append(memoryview(piece))
        except NotFound as error:
            raise _gone() from error
        except OSError as error:
            raise self._disk(error) from error
        if len(self._parts) != parts or self._sent + self._tail.size != offset:
            raise _gone()
        self.offset = offset
        self._hasher = self._rehash(digest_state, offset)
        if self._hasher is None and self._key.startswith("blobs/"):
            raise _gone()  # what nobody has verified must not be seen under a digest

    def _joined(self, offset: int) -> bool:
        """Whether the parts are one object already, as after a Complete whose answer was lost; raises Mismatch where there is neither."""
        try:
            self._store.ask("list_parts", self._key, UploadId=self._multipart, MaxParts=1)
        except NotFound as error:
            if self._store.size_of(self._key) != offset:
                raise _gone() from error
            return True
        return False

    def _rehash(self, state: bytes, offset: int) -> Hasher | None:
        if state or not offset:
            with suppress(Unsupported, Invalid):  # exported by another libcrypto
                return new(self._algorithm, state, offset)
        if self._parts:
            return None
        hasher = new(self._algorithm)
        self._tail.file.seek(0)
        while piece := self._tail.file.read(1 << 20):
            hasher.update(piece)
        return hasher

    def _check(self) -> None:
        if not self._open:
            raise NotFound("there is no such upload any more", do="start it again", reason="upload")

    @staticmethod
    def _disk(error: OSError) -> Unavailable:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return Unavailable("the disk of the data directory is full, and so is the memory for parts", do="free space", reason="disk_full")
        return Unavailable(f"a part cannot be kept: {error.strerror}", do="look at the data directory's disk and permissions")

    # ---- writing

    def write(self, view: bytes | memoryview) -> None:
        """Appends and hashes, and sends each part that is full; raises Unavailable, and then holds the bytes up to `offset`."""
        self._check()
        if self._complete:
            raise NotFound("this upload was ended", do="start another one", reason="upload")
        rest = memoryview(view).cast("B")
        while len(rest):
            room = part_size(self._sent, self._store.options.steps) - self._tail.size
            if room <= 0:
                self._flush()
                continue
            piece, rest = rest[:room], rest[room:]
            try:
                self._tail.append(piece)
            except OSError as error:
                raise self._disk(error) from error
            if self._hasher is not None:
                self._hasher.update(piece)
            self.offset += len(piece)

    def _flush(self) -> None:
        """Sends the tail as the next part; raises Unavailable, NotFound when the upload was ended by another, TooLarge."""
        if not self._multipart:
            self._multipart = str(self._store.ask("create_multipart_upload", self._key)["UploadId"])
            if self._key.startswith("blobs/"):  # the key does not tell whose it is, and a sweep must know
                note = json.dumps({"key": self._key, "multipart": self._multipart}).encode()
                self._store.ask("put_object", f"{self._folder}hint+{secrets.token_hex(8)}", Body=note)
        number = next_number(len(self._parts))
        try:
            answer = self._store.ask("upload_part", self._key, UploadId=self._multipart, PartNumber=number, Body=self._tail.file)
        except NotFound as error:
            raise NotFound("there is no such upload any more", do="start it again", reason="upload") from error
        except Unavailable as error:
            if error.ids.get("code") in _CORRUPT:
                self.discard()
                words = "what arrives at the object store is not what was sent"
                raise Unavailable(words, do="look at the network between, then start the upload again", reason="s3_corrupt") from error
            raise
        self._parts.append((str(answer["ETag"]), self._tail.size))
        self._sent += self._tail.size
        self._fresh_tail()

    def _fresh_tail(self) -> None:
        self._tail.close()
        self._tail = Tail(self._store.memory, self._store.spool)

    def sync(self) -> None:
        """Makes all written bytes durable in the bucket; raises Unavailable."""
        self._check()
        if not self._complete and may_cut(self._tail.size, len(self._parts), self.offset, self._store.options.steps):
            self._flush()
        if not self.offset:
            return
        token = secrets.token_hex(8)
        if self._parts:
            self._store.ask("put_object", f"{self._folder}{token}.parts", Body=json.dumps(self._parts).encode())
        if self._tail.size:
            self._store.ask("put_object", f"{self._folder}{token}.tail", Body=self._tail.file)
        if self._before:
            self._store.erase(f"{self._folder}{self._before}.")
        self._before, self._saved = self._saved, token

    def state(self) -> bytes:
        """Where the last sync lies and the hash state of bytes [0, offset)."""
        if not self.offset:
            return b""
        kept = base64.b64encode(self._hasher.state() if self._hasher is not None else b"").decode()
        doc = {"key": self._key, "multipart": self._multipart, "saved": self._saved, "before": self._before}
        return json.dumps({**doc, "parts": len(self._parts), "tail": self._tail.size, "hash": kept}).encode()

    def digest(self) -> str:
        """The digest of the bytes [0, offset); where its state could not be continued, the parts are joined and read; raises Unavailable."""
        if self._hasher is None:
            self._join()
            hasher = new(self._algorithm)
            for piece in self._store.pieces(self._key, 0, self.offset):
                hasher.update(piece)
            self._hasher = hasher
        return self._hasher.digest()

    # ---- publishing

    def publish(self, digest: str, generation: int = 0) -> str:
        """Verifies the digest and makes the object public; raises Mismatch and keeps nothing, NotFound, Unavailable."""
        self._check()
        found = self.digest()
        if found != check_digest(digest) or (self._key.startswith("blobs/") and self._key != key_of(location_of(digest))):
            self.discard()  # also where the bytes are not those that were announced: the key belongs to others
            raise Mismatch(f"the uploaded bytes have digest {found}", expected=digest, do="send them again", reason="digest")
        location = self._existing(digest, generation)  # an existing object is a valid object: one digest, one copy
        if not location and not self._multipart:
            location = location_of(digest, generation)
            self._store.ask("put_object", key_of(location), Body=self._tail.file)
        elif not location:
            location = self._publish_parts(digest, generation)
        with suppress(Unavailable):  # the object is public; what is left over is swept
            self._drop(key_of(location))
        self.close()
        return location

    def _existing(self, digest: str, generation: int) -> str:
        """The location that has this digest already, the same for whoever asks; empty where none has."""
        plain = location_of(digest, generation)
        if self._store.size_of(key_of(plain)) == self.offset:
            return plain
        if self.offset < MIN_PART:
            return ""  # never by parts, so without a pointer
        pointers = sorted(self._store.listing(f"pointers/{plain}+"), key=lambda item: (item["LastModified"], item["Key"]))
        for item in pointers:
            location = str(item["Key"]).removeprefix("pointers/")
            if self._store.size_of(key_of(location)) == self.offset:
                return location
        return ""

    def _publish_parts(self, digest: str, generation: int) -> str:
        self._join()
        if self._key.startswith("blobs/"):
            location = location_of(digest, generation)
            if generation:  # generation 0 waits for its removal, which will take what now lies there
                self._copy(location)
        else:
            own = location_of(digest, generation, self._id)
            note = {"key": self._key, "digest": digest, "size": self.offset}
            self._store.ask("put_object", f"pointers/{own}", Body=json.dumps(note).encode())
            location = self._existing(digest, generation) or own
            if location != own:  # another upload of the same bytes was first: both agree on whose stays
                self._store.ask("delete_object", f"pointers/{own}")
        return location

    def _join(self) -> None:
        """Sends the rest and makes one object of the parts, once; raises Mismatch when another wrote parts of this upload, NotFound, Unavailable.

        A lost answer is recognised by the object: a key is written by one upload, or always with the same bytes.
        """
        if self._complete:
            return
        if self._tail.size:
            self._flush()
        parts = [{"PartNumber": number, "ETag": etag} for number, (etag, _) in enumerate(self._parts, 1)]
        try:
            self._store.ask("complete_multipart_upload", self._key, UploadId=self._multipart, MultipartUpload={"Parts": parts})
        except NotFound as error:
            if self._store.size_of(self._key) != self.offset:
                raise NotFound("there is no such upload any more", do="start it again", reason="upload") from error
        except Unavailable as error:
            if error.ids.get("code") in _LOST:
                self.discard()
                raise Mismatch("two requests wrote this upload at once", do="send the bytes again", reason="upload") from error
            raise
        self._complete = True

    def _copy(self, location: str) -> None:
        """Copies the joined object to another location, by parts where it is too large for one request; raises Unavailable."""
        store, target = self._store, key_of(location)
        where = {"Bucket": store.options.bucket, "Key": store.options.prefix + self._key}
        try:
            if self.offset <= store.options.copy_limit:
                store.ask("copy_object", target, CopySource=where)
                return
            copied: list[dict[str, object]] = []
            step = min(GIB, store.options.copy_limit)
            multipart = str(store.ask("create_multipart_upload", target)["UploadId"])
            for number, lo in enumerate(range(0, self.offset, step), 1):
                bounds = f"bytes={lo}-{min(lo + step, self.offset) - 1}"
                more = {"UploadId": multipart, "PartNumber": number, "CopySource": where, "CopySourceRange": bounds}
                answer = store.ask("upload_part_copy", target, **more)
                copied.append({"PartNumber": number, "ETag": answer["CopyPartResult"]["ETag"]})
            store.ask("complete_multipart_upload", target, UploadId=multipart, MultipartUpload={"Parts": copied})
        except NotFound as error:
            raise Unavailable("an older copy of these bytes was deleted at this moment", do="send them again", reason="s3_copy") from error

    # ---- letting go

    def _drop(self, public: str = "") -> None:
        """Removes all that was staged but for the object at the key that is public now."""
        if self._multipart and not self._complete:
            self._store.abort(self._key, self._multipart)
        elif self._complete and self._key != public:
            self._store.discard(self._id)  # which spares what a pointer names
        if self._multipart or self._saved:
            self._store.erase(self._folder)
        self._multipart, self._parts = "", []

    def discard(self) -> None:
        """Removes the parts and the saved tail, also of an upload that was opened at its start; raises Unavailable."""
        try:
            self._drop()
            self._store.discard(self._id)
        finally:
            self.close()

    def close(self) -> None:
        """Lets go: what was synced stays, what was not is forgotten."""
        if self._open:
            self._open = False
            self._tail.close()
