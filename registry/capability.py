"""What an object store can do, tried on it at start and told as data, since a server's name says nothing about it.

It writes only below `probe/` and removes what it wrote. It decides nothing but whether the store can be used at all.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, Protocol

from artifact.errors import AirlockError, NotFound, Unavailable
from registry.bucket import MIN_PART, Options

_EXISTS = ("PreconditionFailed", "412", "ConditionalRequestConflict")


class Store(Protocol):
    """What a probe needs of the store."""

    options: Options

    def ask(self, verb: str, key: str = "", **more: Any) -> Any:
        """One request about a key."""

    def get(self, key: str, lo: int, hi: int) -> bytes:
        """Bytes of a key's object."""

    def size_of(self, key: str) -> int | None:
        """Size of a key's object."""

    def listing(self, prefix: str, after: str = "") -> Iterator[dict[str, Any]]:
        """Objects below a prefix."""

    def abort(self, key: str, multipart: str) -> None:
        """Ends an unfinished multipart upload."""

    def altered(self, key: str) -> str:
        """The code with which the server refuses bytes that changed after they were signed; empty where it takes them."""


def probe(store: Store) -> dict[str, object]:
    """What the store can do; raises Unavailable, naming the first thing without which no blob can be kept, or what is wrong with the connection."""
    place = f"probe/{uuid.uuid4().hex}"
    try:
        store.ask("head_bucket")
    except NotFound as error:
        where = store.options.endpoint or "AWS"
        raise Unavailable(f"{where} has no bucket {store.options.bucket}", do="create it, or correct AIRLOCK_BLOBS", reason="s3_bucket") from error
    try:
        return {"backend": "s3", "bucket": store.options.bucket, "endpoint": store.options.endpoint, **_basics(store, place), **_extras(store, place)}
    finally:
        with suppress(AirlockError):
            for item in list(store.listing(place)):
                store.ask("delete_object", item["Key"])


def _demand(done: bool, what: str) -> None:
    if not done:
        raise Unavailable(f"the object store cannot {what} as S3 does", do="use another server; see docs/operations.md", reason="s3_basics")


def _basics(store: Store, place: str) -> dict[str, object]:
    raw = os.urandom(1000)
    store.ask("put_object", f"{place}/a", Body=raw)
    _demand(store.get(f"{place}/a", 0, 1000) == raw, "give back what was put")
    _demand(store.get(f"{place}/a", 7, 99) == raw[7:99], "give back a range")
    _demand(store.size_of(f"{place}/a") == 1000, "tell a size")
    _demand([i["Key"] for i in store.listing(place)] == [f"{place}/a"], "list objects")
    store.ask("copy_object", f"{place}/b", CopySource={"Bucket": store.options.bucket, "Key": f"{store.options.prefix}{place}/a"})
    _demand(store.get(f"{place}/b", 0, 1000) == raw, "copy an object")
    long = os.urandom(MIN_PART + 1)
    multipart = str(store.ask("create_multipart_upload", f"{place}/c")["UploadId"])
    try:
        parts = []
        for number, piece in ((1, long[:MIN_PART]), (2, long[MIN_PART:])):
            answer = store.ask("upload_part", f"{place}/c", UploadId=multipart, PartNumber=number, Body=piece)
            parts.append({"PartNumber": number, "ETag": answer["ETag"]})
        told = store.ask("complete_multipart_upload", f"{place}/c", UploadId=multipart, MultipartUpload={"Parts": parts})
    except AirlockError:
        with suppress(AirlockError):
            store.abort(f"{place}/c", multipart)
        raise
    _demand(store.get(f"{place}/c", 0, len(long)) == long, "join parts")
    store.ask("delete_object", f"{place}/c")
    _demand(store.size_of(f"{place}/c") is None, "delete an object")
    proven: dict[str, object] = dict.fromkeys(("put", "get", "range", "list", "copy", "multipart", "delete"), True)
    return proven | {"complete_tells_etag": bool(told.get("ETag"))}


def _extras(store: Store, place: str) -> dict[str, object]:
    """What is good to know and never relied upon."""
    try:
        store.ask("put_object", f"{place}/a", Body=b"x", IfNoneMatch="*")
        conditional = False
    except Unavailable as error:
        conditional = error.ids.get("code") in _EXISTS
    return {"conditional_put": conditional, "altered_bytes_refused": store.altered(f"{place}/d"), "checksums": store.options.checksums}
