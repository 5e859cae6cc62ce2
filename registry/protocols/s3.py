"""The S3 API, read only, on a listener of its own: what NIM_REPOSITORY_OVERRIDE=s3://… and S3 clients ask for; it words answers, the guard decides.

An object is a file of a model's revision: the same blob, grants and records as at every other door. Bytes are always sent from here, since S3 clients
follow no redirect to another host. Who calls is told by Signature Version 4 alone (registry/sigv4.py).
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import replace
from email.utils import formatdate

from artifact import errors
from artifact.manifest import is_digest
from artifact.store import Call, Content, File, Revision
from registry import refusals, sigv4
from registry import s3_shapes as s
from registry.exchange import Exchange
from registry.hub import MAX_NAMES

_CODES: dict[str, tuple[int, str]] = {
    "signature_invalid": (403, "SignatureDoesNotMatch"),
    "access_key": (403, "InvalidAccessKeyId"),
    "key_expired": (403, "InvalidAccessKeyId"),
    "key_revoked": (403, "InvalidAccessKeyId"),
    "org_closed": (403, "InvalidAccessKeyId"),
    "member_disabled": (403, "InvalidAccessKeyId"),
    "time_skewed": (403, "RequestTimeTooSkewed"),
    "authorization_malformed": (400, "AuthorizationHeaderMalformed"),
    "region": (400, "AuthorizationHeaderMalformed"),
    "query_malformed": (400, "AuthorizationQueryParametersError"),
    "session_token": (400, "InvalidToken"),
    "payload_hash": (400, "XAmzContentSHA256Mismatch"),
    "uri": (400, "InvalidURI"),
    "argument": (400, "InvalidArgument"),
    "number": (400, "InvalidArgument"),
    "key_length": (400, "KeyTooLongError"),
    "bucket": (404, "NoSuchBucket"),
    "precondition": (412, "PreconditionFailed"),
    "payload_streamed": (501, "NotImplemented"),
    "part": (501, "NotImplemented"),
}
_TABLE: dict[type[errors.AirlockError], tuple[int, str]] = {
    errors.Unauthenticated: (403, "AccessDenied"),
    errors.Denied: (403, "AccessDenied"),
    errors.NotFound: (404, "NoSuchKey"),
    errors.Unsupported: (405, "MethodNotAllowed"),
    errors.Conflict: (409, "OperationAborted"),
    errors.RangeInvalid: (416, "InvalidRange"),
    errors.Throttled: (503, "SlowDown"),
    errors.Unavailable: (503, "ServiceUnavailable"),
    errors.Invalid: (400, "InvalidRequest"),
    errors.TooLarge: (400, "InvalidRequest"),
}
XML = {"content-type": "application/xml"}


class S3Door:
    """Dispatches one exchange of the S3 listener; `instance` is told as the host's id, `bucket` holds the encoded keys of NIM containers."""

    def __init__(self, instance: str, domain: str, region: str, bucket: str) -> None:
        self.instance, self.domain, self.region = instance, domain, region
        self.buckets: dict[str, s.Encoded | s.Plain] = {bucket: s.Encoded(), s.MODELS: s.Plain()}

    async def __call__(self, x: Exchange) -> None:
        """Answers in S3's shapes."""
        await x.serve(self._serve(x), lambda error: self._refuse(x, error))

    def _own(self, x: Exchange, headers: Mapping[str, str] | None = None) -> dict[str, str]:
        return {"x-amz-request-id": x.note["request_id"], "x-amz-id-2": self.instance, **(headers or {})}

    async def _refuse(self, x: Exchange, error: errors.AirlockError) -> None:
        status, code = _CODES.get(error.reason) or refusals.form(_TABLE, error, (500, "InternalError"))
        headers = self._own(x, XML | {"cache-control": "no-store"} | refusals.headers(status, error))
        if status == 405:
            headers["allow"] = "GET, HEAD"
        more = [("Resource", x.path[:1024]), ("RequestId", x.note["request_id"]), ("HostId", self.instance)]
        if error.reason == "region":
            more.insert(0, ("Region", self.region))
            headers["x-amz-bucket-region"] = self.region
        await x.answer(status, headers, s.refusal(code, refusals.words(error), more))

    # ---- who calls, and for what

    async def _serve(self, x: Exchange) -> None:
        raw, query = x.scope.get("raw_path", b"").split(b"?")[0], x.scope.get("query_string", b"")
        bucket, key = s.place(raw, x.headers.get("host", ""), self.domain)
        if x.method not in ("GET", "HEAD"):
            raise errors.Unsupported(f"{x.method} is not served here: this face of the registry only reads", expected="GET, HEAD", reason="method")
        signed = sigv4.parse(x.method, raw, query, x.scope["headers"])
        if signed is not None and signed.region != self.region:
            raise errors.Invalid(f"the region {signed.region[:60]!r} is wrong; expecting {self.region!r}", expected=self.region, reason="region")
        fields = s.fields(query)
        part = next((name for name in sorted(fields) if name in s.PARTS), None)
        if part:
            await x.call(x.guard.whoami, signed)
            raise errors.Unsupported(f"this face of the registry has no {part}", expected="objects and their listings", reason="part")
        if not bucket and not key:
            me = await x.call(x.guard.whoami, signed)
            await x.answer(200, self._own(x, XML), s.buckets(str(me["org"]), list(self.buckets)))
            return
        keys = self.buckets.get(bucket)
        if keys is None:
            await x.call(x.guard.ping, signed)
            raise errors.NotFound(f"there is no bucket {bucket[:100]!r}", expected=", ".join(sorted(self.buckets)), reason="bucket")
        if key:
            await self._object(x, signed, keys.wanted(key))
        else:
            await self._bucket(x, signed, bucket, keys, fields)

    # ---- buckets

    async def _bucket(self, x: Exchange, signed: sigv4.Signed | None, bucket: str, keys: s.Encoded | s.Plain, fields: Mapping[str, str]) -> None:
        headers = self._own(x, XML | {"x-amz-bucket-region": self.region})
        if x.method == "HEAD" or "location" in fields:
            await x.call(x.guard.ping, signed)
            inside = "" if self.region == "us-east-1" else s.text(self.region)  # S3's own word for its first region is none
            await x.answer(200, headers, b"" if x.method == "HEAD" else s.document("LocationConstraint", inside))
            return
        version = 2 if fields.get("list-type") == "2" else 1
        given = fields.get("continuation-token" if version == 2 else "marker", "")
        after = s.behind(given) if version == 2 and given else given or fields.get("start-after", "")
        most = fields.get("max-keys", str(s.MOST_KEYS))
        if not most.isascii() or not most.isdigit() or len(most) > 10:
            raise errors.Invalid("max-keys is not a whole number from 0", expected="for example 1000", reason="argument")
        if fields.get("encoding-type", "url") != "url":
            raise errors.Invalid("the encoding type is not known", expected="url", reason="argument")
        asked = s.Asked(fields.get("prefix", ""), fields.get("delimiter", ""), after, min(int(most), s.MOST_KEYS))
        found = await x.call(lambda call: x.guard.s3.objects(call, keys, asked), signed)
        await x.answer(200, headers, s.listed(bucket, found, asked, url="encoding-type" in fields, version=version, given=given))

    # ---- objects

    async def _object(self, x: Exchange, signed: sigv4.Signed | None, wanted: s.Wanted) -> None:
        def work(call: Call) -> tuple[Revision, File, Content | None]:
            here = replace(call, redirect=False)
            name = x.guard.revisions.first(here, wanted.names)
            revision, file = x.guard.file(here, name, wanted.ref, wanted.path)
            if "if-match" in x.headers and not _matches(x.headers["if-match"], file):
                raise errors.Invalid("the object is another one now", expected=_etag(file), reason="precondition")
            unchanged = x.method == "HEAD" or _matches(x.headers.get("if-none-match", ""), file)
            return revision, file, None if unchanged else x.guard.read(here, name, file.digest)

        revision, file, content = await x.call(work, signed, _ask(wanted))
        headers = self._own(x, {"etag": _etag(file), "last-modified": formatdate(revision.at, usegmt=True), "accept-ranges": "bytes"})
        headers |= {"content-type": "application/octet-stream"}
        if _matches(x.headers.get("if-none-match", ""), file):
            await x.answer(304, headers)
            return
        if file.digest.startswith("sha256:") and x.headers.get("x-amz-checksum-mode", "").upper() == "ENABLED" and "range" not in x.headers:
            raw = bytes.fromhex(file.digest.partition(":")[2])
            headers |= {"x-amz-checksum-sha256": base64.b64encode(raw).decode(), "x-amz-checksum-type": "FULL_OBJECT"}

        def part(call: Call, lo: int, hi: int) -> Content:
            return x.guard.read(replace(call, redirect=False), revision.name, file.digest, lo, hi)

        async def again(lo: int, hi: int) -> Content:
            return await x.call(lambda call: part(call, lo, hi), signed)

        # a head tells what a GET of the same range would, and reads nothing
        await x.content(content or Content(file.digest, "", file.size, 0, file.size), headers, again)
        await x.served(revision.name, file.digest)


def _ask(wanted: s.Wanted) -> tuple[str, ...]:
    """What a request is about, found with its key by one statement; nothing where the version is a digest."""
    names: Sequence[str] = (*wanted.names, *(wanted.names[-1],) * MAX_NAMES)[:MAX_NAMES]
    return () if is_digest(wanted.ref) else ("hub", wanted.ref, wanted.path, *names)


def _etag(file: File) -> str:
    return f'"{file.digest.partition(":")[2]}"'


def _matches(given: str, file: File) -> bool:
    """Whether a list of entity tags holds that of a file (RFC 9110 section 13.1)."""
    tags = [part.strip().removeprefix("W/") for part in given.split(",")]
    return "*" in tags or _etag(file) in tags or _etag(file).strip('"') in tags
