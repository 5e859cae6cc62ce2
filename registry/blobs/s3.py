"""Blobs as objects of one S3 bucket, by boto3, which nothing else imports; proven on Ceph RGW (docs/operations.md, Object storage).

`blobs/<location>` holds what was small or known by digest; a large upload of unknown digest stays where it was staged, `uploads/<upload>`, and an
object `pointers/<location>` tells its digest, so that the index can be rebuilt from the bucket. Nothing that a server says about bytes is believed:
every object was hashed here. It knows no repository, no key of a caller and no SQL, and holds no connection while a client is slow.
"""

from __future__ import annotations

import heapq
import json
import logging
import os
import random
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import boto3
import botocore.session
from botocore.config import Config
from botocore.credentials import CredentialProvider, CredentialResolver, Credentials
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectTimeoutError,
    EndpointConnectionError,
    HTTPClientError,
    ReadTimeoutError,
    SSLError,
)

from artifact.errors import AirlockError, Invalid, NotFound, RangeInvalid, Unavailable
from artifact.store import BlobStore, Content
from registry.bucket import Memory, Options, check_upload, digest_at, is_location, key_of, read_secret
from registry.capability import probe
from registry.multipart import S3Writer

OCTETS = "application/octet-stream"
LOG = logging.getLogger("airlock.s3")
T = TypeVar("T")
_ABSENT = {"NoSuchKey", "NoSuchUpload", "404"}
_REFUSED = {"SignatureDoesNotMatch", "InvalidAccessKeyId", "AccessDenied", "InvalidToken", "ExpiredToken", "403", "401"}
_FULL = {"QuotaExceeded", "InsufficientStorage", "InsufficientCapacity", "XMinioStorageFull", "XMinioAdminBucketQuotaExceeded", "507"}
_CORRUPT = {"BadDigest", "XAmzContentSHA256Mismatch"}
_TOLD = {"upload_part": "ETag", "create_multipart_upload": "UploadId", "head_object": "ContentLength"}  # without it, no answer
_PASSING = ("s3_busy", "s3_timeout", "s3_connection", "s3_corrupt")
_AGAIN = {"InternalError", "ServiceUnavailable", "SlowDown", "RequestTimeout", "OperationAborted"}


def open_blobs(url: str, data: Path) -> S3Blobs:
    """The store of an `s3://` URL; no request is made yet; raises Invalid, and Unavailable for credentials that cannot be read."""
    return S3Blobs(Options.parse(url), data)


class _FileCredentials(Credentials):  # type: ignore[misc]
    """A key pair read again whenever its file changes: every request is signed with what the file says at that moment."""

    def __init__(self, path: Path) -> None:
        self._path, self._seen, self._guard = path, self._stamp(path), threading.Lock()
        first = read_secret(path)
        super().__init__(first.access, first.secret, first.token)

    @staticmethod
    def _stamp(path: Path) -> tuple[int, int, int]:
        try:
            found = path.stat()
        except OSError:
            return (0, 0, 0)
        return (found.st_ino, found.st_mtime_ns, found.st_size)

    def get_frozen_credentials(self) -> Any:
        with self._guard:
            stamp = self._stamp(self._path)
            if stamp != self._seen:
                try:
                    fresh = read_secret(self._path)
                    self.access_key, self.secret_key, self.token, self._seen = fresh.access, fresh.secret, fresh.token, stamp
                except Unavailable as error:  # half written, perhaps: the pair that worked goes on until the file is whole
                    LOG.warning("%s", error)
            return super().get_frozen_credentials()


class _Provider(CredentialProvider):  # type: ignore[misc]
    METHOD = "airlock"

    def __init__(self, credentials: Credentials) -> None:
        super().__init__()
        self._credentials = credentials

    def load(self) -> Credentials:
        return self._credentials


def _translate(error: Exception, doing: str, options: Options) -> AirlockError:
    """What went wrong, in words for the operator; no secret is in any of them."""
    where = options.endpoint or "AWS"
    if isinstance(error, ClientError):
        code = str(error.response.get("Error", {}).get("Code", ""))
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        if code in _ABSENT:
            return NotFound(f"the object store has no such object ({doing})", reason="bytes", code=code)
        if code == "NoSuchBucket":
            return Unavailable(f"{where} has no bucket {options.bucket}", do="create it, or correct AIRLOCK_BLOBS", reason="s3_bucket", code=code)
        if code in _REFUSED:
            words = f"credentials refused by {where} ({doing}: {code})"
            return Unavailable(words, do="correct the credentials file; it is read again by itself", reason="s3_credentials", code=code)
        if code in _FULL or status == 507:
            do = "free space in the object store, or raise the bucket's quota"
            return Unavailable(f"{where} has no room for more ({doing}: {code or status})", do=do, reason="disk_full", code=code)
        if code == "RequestTimeTooSkewed":
            return Unavailable(f"{where} says that this machine's clock is wrong", do="set the clock", reason="s3_clock", code=code)
        if code == "MissingContentLength" and options.checksums:
            words = f"checksums unsupported by {where}"
            return Unavailable(words, do="remove checksums=on from the store's URL", reason="s3_checksums", code=code)
        if code in _CORRUPT:
            return Unavailable(f"bytes reach {where} altered ({doing})", do="look at the network between", reason="s3_corrupt", code=code)
        if status >= 500 or code in _AGAIN:
            words = f"{where} is overloaded or failing ({doing}: {code or status})"
            return Unavailable(words, do="try again later; look at the object store", reason="s3_busy", code=code)
        return Unavailable(f"{where} refused to {doing}: {code or status}", do="look at the object store", reason="s3", code=code)
    if isinstance(error, SSLError):
        do = "set ca=FILE in the store's URL to the authority that signed it"
        return Unavailable(f"the certificate of {where} is not accepted", expected="one signed by a known authority", do=do, reason="s3_tls")
    if isinstance(error, ConnectTimeoutError | ReadTimeoutError):
        return Unavailable(f"{where} did not answer in time ({doing})", do="try again later; look at the object store", reason="s3_timeout")
    if isinstance(error, EndpointConnectionError):
        text = repr(error.kwargs.get("error", ""))
        if "NameResolution" in text or "getaddrinfo" in text or "Name or service" in text:
            return Unavailable(f"the name of {where} is not known", do="correct endpoint= in the store's URL, or the DNS", reason="s3_dns")
    return Unavailable(f"the connection to {where} failed ({doing}: {type(error).__name__})", do="look at the object store", reason="s3_connection")


class S3Blobs(BlobStore):
    """The BlobStore over one bucket; made once a process, used by all threads."""

    def __init__(self, options: Options, data: Path) -> None:
        self.options, self.spool = options, data / "partial"
        self.spool.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.memory = Memory()
        self._credentials = _FileCredentials(Path(options.credentials))
        self.client = self.connect(options.endpoint)
        self._outside = self.connect(options.public) if options.public else self.client

    def connect(self, endpoint: str) -> Any:
        """A client of that endpoint with this store's credentials and no retries of its own."""
        o = self.options
        session = botocore.session.Session()
        session.set_config_variable("config_file", os.devnull)
        session.register_component("credential_provider", CredentialResolver([_Provider(self._credentials)]))
        when = "when_supported" if o.checksums else "when_required"
        config = Config(
            signature_version="s3v4",
            s3={"addressing_style": o.style, "payload_signing_enabled": True},  # so that the server refuses what was altered on the way
            request_checksum_calculation=when,
            response_checksum_validation=when,
            max_pool_connections=32,
            retries={"total_max_attempts": 1},
            connect_timeout=o.connect_s,
            read_timeout=o.read_s,
        )
        try:
            kind = boto3.session.Session(botocore_session=session)
            return kind.client("s3", endpoint_url=endpoint or None, region_name=o.region, verify=o.ca or None, config=config)
        except (BotoCoreError, ValueError) as error:
            raise Invalid(f"the store's URL is not usable: {str(error)[:200]}", do="correct AIRLOCK_BLOBS") from error

    # ---- requests

    def attempt(self, doing: str, work: Callable[[], T]) -> T:
        """Runs one safe request, again after what may pass by itself, with growing pauses; raises NotFound, Unavailable."""
        end = time.monotonic() + 2 * self.options.read_s
        for number in range(1, self.options.tries + 1):
            try:
                return work()
            except (ClientError, BotoCoreError, OSError) as error:
                told = _translate(error, doing, self.options)
                passing = told.reason in _PASSING
                if not passing or number == self.options.tries or time.monotonic() > end:
                    raise told from error
                LOG.warning("%s; once more", told.what)
            time.sleep(0.2 * 2**number * random.uniform(0.5, 1))  # noqa: S311 - spreads retries, guards nothing
        raise AssertionError("unreachable")

    def ask(self, verb: str, key: str = "", **more: Any) -> Any:
        """One request about a key below the prefix; raises NotFound, Unavailable."""
        names = {"Key": self.options.prefix + key} if key else {}

        def work() -> Any:
            body = more.get("Body")
            if body is not None and hasattr(body, "seek"):
                body.seek(0)
            answer = getattr(self.client, verb)(Bucket=self.options.bucket, **names, **more)
            if _TOLD.get(verb, "ResponseMetadata") not in answer:
                raise HTTPClientError(error="the head of the answer was cut off")
            return answer

        return self.attempt(verb.replace("_", " "), work)

    def size_of(self, key: str) -> int | None:
        """Size of a key's object, None when absent."""
        try:
            return int(self.ask("head_object", key)["ContentLength"])
        except NotFound:
            return None

    def get(self, key: str, lo: int, hi: int) -> bytes:
        """Bytes [lo, hi) of a key's object, all of them; raises NotFound, Unavailable."""

        def work() -> bytes:
            bounds = f"bytes={lo}-{hi - 1}"
            answer = self.client.get_object(Bucket=self.options.bucket, Key=self.options.prefix + key, Range=bounds)
            with answer["Body"] as body:
                raw = bytes(body.read(hi - lo + 1))
            if len(raw) != hi - lo:
                raise HTTPClientError(error=f"{len(raw)} of {hi - lo} bytes")
            return raw

        return self.attempt("get object", work) if hi > lo else b""

    def pieces(self, key: str, lo: int, hi: int) -> Iterator[bytes]:
        """The same bytes in pieces, each by a request of its own; a piece is smaller while much memory is in use."""
        while lo < hi:
            size = min(hi - lo, self.memory.read_size())
            held = size if self.memory.take(size) else 0
            try:
                yield self.get(key, lo, lo + size)
            finally:
                self.memory.give(held)
            lo += size

    def listing(self, prefix: str, after: str = "") -> Iterator[dict[str, Any]]:
        """Objects below a prefix in byte order, from behind `after`; `Key` is without the store's own prefix."""
        own = self.options.prefix
        token: dict[str, str] = {"StartAfter": own + after} if after else {}
        while True:
            page = self.ask("list_objects_v2", Prefix=own + prefix, **token)
            for item in page.get("Contents", ()):
                yield {**item, "Key": item["Key"][len(own) :]}
            if not page.get("IsTruncated"):
                return
            token = {"ContinuationToken": page["NextContinuationToken"]}

    def multiparts(self, prefix: str) -> Iterator[dict[str, Any]]:
        """Unfinished multipart uploads below a prefix; `Key` is without the store's own prefix."""
        own = self.options.prefix
        token: dict[str, str] = {}
        while True:
            page = self.ask("list_multipart_uploads", Prefix=own + prefix, **token)
            for item in page.get("Uploads", ()):
                yield {**item, "Key": item["Key"][len(own) :]}
            if not page.get("IsTruncated"):
                return
            token = {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page["NextUploadIdMarker"]}

    def abort(self, key: str, multipart: str) -> None:
        """Ends an unfinished multipart upload; absent is not an error."""
        with suppress(NotFound):
            self.ask("abort_multipart_upload", key, UploadId=multipart)

    def erase(self, prefix: str) -> None:
        """Deletes all objects below a prefix."""
        for item in list(self.listing(prefix)):
            self.ask("delete_object", item["Key"])

    def altered(self, key: str) -> str:
        """The code with which the server refuses bytes that changed after they were signed; empty where it takes them."""
        client = self.connect(self.options.endpoint)

        def alter(request: Any, **_: Any) -> None:
            request.body = b"altered!"

        client.meta.events.register("before-send.s3.PutObject", alter)
        try:
            client.put_object(Bucket=self.options.bucket, Key=self.options.prefix + key, Body=b"original")
        except ClientError as error:
            return str(error.response.get("Error", {}).get("Code", "refused"))
        except (BotoCoreError, OSError) as error:
            raise _translate(error, "probe", self.options) from error
        return ""

    # ---- the contract

    def stat(self, location: str) -> int | None:
        """Size in bytes, None when absent; raises Unavailable."""
        return self.size_of(key_of(location))

    def open(self, location: str, lo: int = 0, hi: int | None = None) -> Content:
        """Bytes [lo, hi) in pieces that are fetched when they are asked for; raises NotFound, RangeInvalid, Unavailable."""
        total = self.stat(location)
        if total is None:
            raise NotFound("the bytes of this object are not in the bucket", do="restore the bucket, or import the bundle again", reason="bytes")
        end = total if hi is None else min(hi, total)
        if not 0 <= lo <= end:
            raise RangeInvalid(f"bytes {lo} to {hi} of an object of {total}", expected="a range inside the object")
        return Content(digest_at(location), OCTETS, total, lo, end, chunks=self.pieces(key_of(location), lo, end))

    def url(self, location: str, ttl_s: int, name: str) -> str | None:
        """A URL that fetches the object for at most 600 s, at the public endpoint where one is set."""
        names = {"Bucket": self.options.bucket, "Key": self.options.prefix + key_of(location), "ResponseContentType": OCTETS}
        if name:
            plain = "".join(c for c in name if c.isascii() and c.isprintable() and c not in '"\\')[:200]
            names["ResponseContentDisposition"] = f'attachment; filename="{plain}"'
        try:
            return str(self._outside.generate_presigned_url("get_object", Params=names, ExpiresIn=max(1, min(ttl_s, 600))))
        except BotoCoreError as error:
            raise _translate(error, "sign a URL", self.options) from error

    def beside(self, host: str) -> bool:
        """Whether presigned URLs are of this host or below it."""
        return self.options.beside(host)

    def writer(self, upload_id: str, digest_hint: str | None = None, *, algorithm: str = "sha256", offset: int = 0, state: bytes = b"") -> S3Writer:
        """Opens or continues an upload, in this process or another's place; raises Mismatch when its staged bytes are gone, Unavailable.

        No lock keeps a second one out: a replica could not see it. Who claimed the row goes on, and parts of two writers never join.
        """
        return S3Writer(self, check_upload(upload_id), digest_hint, algorithm, offset, state)

    def delete(self, location: str) -> None:
        """Removes an object, its pointer first; absent is not an error."""
        key = key_of(location)
        if key.startswith("uploads/"):
            self.ask("delete_object", f"pointers/{location}")
        self.ask("delete_object", key)

    def walk(self, after: str = "") -> Iterator[tuple[str, int]]:
        """Locations with sizes, in byte order, from behind `after`, of both kinds of objects."""

        def locations(folder: str) -> Iterator[tuple[str, int]]:
            for item in self.listing(folder, folder + after if after else ""):
                yield item["Key"][len(folder) :], item["Size"]

        for location, size in heapq.merge(locations("blobs/"), locations("pointers/")):
            if not is_location(location):
                continue
            found = self.stat(location) if "+" in location else size
            if found is not None:
                yield location, found

    def probe(self) -> dict[str, object]:
        """What the store can do, logged and told; raises Unavailable where it cannot be used."""
        found = probe(self)
        LOG.info("object store: %s", json.dumps(found))
        return found

    def staged(self) -> set[str]:
        """Ids of the uploads whose staged objects are public: a pointer names them."""
        return {item["Key"].rsplit("+", 1)[1] for item in self.listing("pointers/") if "+" in item["Key"]}

    def discard(self, upload_id: str) -> None:
        """Removes what an upload that nobody writes has staged; absent is not an error."""
        check_upload(upload_id)
        key = f"uploads/{upload_id}"
        for item in self.multiparts(key):
            if item["Key"] == key:
                self.abort(key, item["UploadId"])
        for hint in self._hints(list(self.listing(f"partial/{upload_id}/hint+"))):
            self.abort(hint["key"], hint["multipart"])
        if self.size_of(key) is not None and upload_id not in self.staged():
            self.ask("delete_object", key)
        self.erase(f"partial/{upload_id}/")

    def _hints(self, found: list[dict[str, Any]]) -> Iterator[dict[str, str]]:
        """What the notes of a listing say; one that is gone since is of an upload that has ended."""
        for item in found:
            with suppress(NotFound):
                yield json.loads(self.get(item["Key"], 0, item["Size"]))

    def sweep(self, keep: Collection[str], older_than: float) -> int:
        """Removes what uploads left behind before `older_than` (seconds since 1970), but for those in `keep`; returns how many things went."""

        def stale(folder: str) -> list[str]:
            found = self.listing(folder)
            return [i["Key"] for i in found if i["LastModified"].timestamp() < older_than and _owner(i["Key"]) not in keep]

        hints = [i for i in self.listing("partial/") if "/hint+" in i["Key"] and _owner(i["Key"]) in keep]
        kept = {hint["multipart"] for hint in self._hints(hints)}
        gone = 0
        for item in [i for folder in ("uploads/", "blobs/", "probe/") for i in self.multiparts(folder)]:
            if item["Initiated"].timestamp() < older_than and item["UploadId"] not in kept and _owner(item["Key"]) not in keep:
                self.abort(item["Key"], item["UploadId"])
                gone += 1
        old = stale("uploads/")
        public = self.staged() if old else set()  # looked at after `old`: what became public meanwhile is seen
        for key in [k for k in old if _owner(k) not in public] + stale("partial/") + stale("probe/"):
            self.ask("delete_object", key)
            gone += 1
        return gone


def _owner(key: str) -> str:
    """The upload id in the key of a staged thing."""
    folder, _, rest = key.partition("/")
    return rest.split("/")[0] if folder in ("uploads", "partial") else ""
