"""`Registry` over HTTP for mirror, runtime and push: OCI distribution v1.1 and the admin routes of /airlock/v1, synchronous on urllib3.

Must not: decide about trust, believe a digest that a server states without the bytes, or follow an upload to another host.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import IO
from urllib.parse import quote, urlencode, urlsplit

from urllib3.exceptions import HTTPError
from urllib3.response import BaseHTTPResponse

from artifact.digest import new
from artifact.errors import (
    Invalid,
    Mismatch,
    NotFound,
    RangeInvalid,
    Unavailable,
    Unsupported,
)
from artifact.grant import Principal
from artifact.manifest import (
    INDEX,
    MANIFEST_TYPES,
    MAX_MANIFEST_BYTES,
    check_digest,
    check_name,
    check_ref,
    digest_of,
    is_digest,
    is_tag,
    parse_descriptor,
    parse_json,
    parse_manifest,
)
from artifact.store import Call, Content, Descriptor, Page, Registry, Upload
from artifact.transport import CHUNK, ERROR_BYTES, Transport, check_range, clean, joined, origin

NOBODY_CALL = Call(Principal())


class RemoteRegistry(Transport, Registry):
    """One registry at one origin with one key; safe for several threads."""

    # reads

    def read_manifest(self, repo: str, ref: str) -> tuple[Descriptor, bytes]:
        """A manifest's descriptor and raw bytes by tag or digest, the digest computed here; raises NotFound, Mismatch, Invalid."""
        _check(repo, ref)
        response = self.request(
            "GET", f"/v2/{repo}/manifests/{quote(ref, safe=':')}", headers={"Accept": ", ".join(MANIFEST_TYPES)}, scope=f"repository:{repo}:pull"
        )
        stated = response.headers.get("Content-Type", "").split(";")[0].strip()
        raw = self.take(response, MAX_MANIFEST_BYTES)
        digest = digest_of(raw)
        if ref.startswith("sha512:"):
            hasher = new("sha512")
            hasher.update(raw)
            digest = hasher.digest()
        if is_digest(ref) and ref != digest:
            raise Mismatch(f"the manifest {ref} arrived with the digest {digest}", expected=ref, do="the source or the path to it is damaged")
        manifest = parse_manifest(raw, stated if stated in MANIFEST_TYPES else "")
        return Descriptor(manifest.media_type, digest, len(raw), manifest.artifact_type, manifest.annotations), raw

    def resolve(self, call: Call, repo: str, ref: str) -> Descriptor:
        """The manifest that a tag or digest names, from its bytes and not from a header; raises NotFound."""
        return self.read_manifest(repo, ref)[0]

    def blob_size(self, repo: str, digest: str) -> int | None:
        """Bytes of a blob as HEAD states them, None when the registry has none for this caller."""
        _check(repo, check_digest(digest))
        try:
            response = self.request("HEAD", f"/v2/{repo}/blobs/{digest}", scope=f"repository:{repo}:pull")
        except NotFound:
            return None
        length = response.headers.get("Content-Length", "")
        response.release_conn()
        return int(length) if re.fullmatch(r"[0-9]{1,19}", length) else 0

    def stream(self, repo: str, digest: str, lo: int, hi: int) -> Iterator[bytes]:
        """Bytes [lo, hi) of a blob as they arrive; raises Unsupported with reason range_ignored, Unavailable when they break off."""
        _check(repo, check_digest(digest))
        if lo >= hi:
            return
        headers = {"Range": f"bytes={lo}-{hi - 1}"}
        response = self.request("GET", f"/v2/{repo}/blobs/{digest}", headers=headers, scope=f"repository:{repo}:pull")
        try:
            check_range(response.status, response.headers, lo, hi)
            got = 0
            for part in response.stream(CHUNK, decode_content=False):
                got += len(part)
                if got > hi - lo:
                    raise Mismatch(f"more than the {hi - lo} bytes that were asked for", expected=f"bytes {lo}-{hi - 1}", reason="range")
                yield part
            if got != hi - lo:
                raise Unavailable(f"the answer ended after {got} of {hi - lo} bytes", do="try again", reason="short_body")
            response.release_conn()
        except (HTTPError, OSError) as error:
            raise self.broken("the connection broke", self.base_url, error) from None
        finally:
            response.close()  # a connection whose answer was read to its end is back in the pool already

    def read(self, call: Call, repo: str, digest: str, lo: int = 0, hi: int | None = None) -> Content:
        """Bytes [lo, hi) of a blob as chunks; raises NotFound, RangeInvalid."""
        size = self.blob_size(repo, digest)
        if size is None:
            raise NotFound(f"{digest} is not in {repo}", digest=digest)
        end = size if hi is None else hi
        if not 0 <= lo <= end <= size:
            raise RangeInvalid(f"bytes {lo}-{end} of {size}", expected=f"a range inside 0-{size}")
        return Content(digest, "application/octet-stream", size, lo, end, chunks=self.stream(repo, digest, lo, end))

    def list(self, call: Call, prefix: str = "", after: str = "", limit: int = 100) -> Page:
        """Repository names from /v2/_catalog, where the registry has it."""
        query = urlencode({"n": limit, **({"last": after} if after else {})})
        names = self._names(f"/v2/_catalog?{query}", "repositories", "registry:catalog:*")
        return Page(tuple(n for n in names if n.startswith(prefix)), names[-1] if len(names) >= limit else "")

    def refs(self, call: Call, repo: str, after: str = "", limit: int = 100) -> Page:
        """Tag names of a repository; raises NotFound."""
        query = urlencode({"n": limit, **({"last": after} if after else {})})
        names = self._names(f"/v2/{check_name(repo)}/tags/list?{query}", "tags", f"repository:{repo}:pull")
        return Page(names, names[-1] if len(names) >= limit else "")

    def _names(self, path: str, field: str, scope: str) -> tuple[str, ...]:
        doc = parse_json(self.take(self.request("GET", path, scope=scope), MAX_MANIFEST_BYTES), "the listing")
        values = doc.get(field) or []
        if not isinstance(values, Sequence) or not all(isinstance(v, str) for v in values):
            raise Invalid(f"{field} of the listing is not a list of names", expected="strings")
        return tuple(values)

    def referrers(self, call: Call, repo: str, digest: str, kind: str = "", after: str = "") -> Page:
        """Descriptors whose subject is `digest`: the referrers API, else the `sha256-…` fallback tag; empty where there is neither."""
        _check(repo, check_digest(digest))
        query = "?" + urlencode({"artifactType": kind}) if kind else ""
        scope = f"repository:{repo}:pull"
        try:
            response = self.request("GET", f"/v2/{repo}/referrers/{digest}{query}", headers={"Accept": INDEX}, scope=scope)
            raw = self.take(response, MAX_MANIFEST_BYTES)
        except (NotFound, Unsupported):
            try:
                raw = self.read_manifest(repo, digest.replace(":", "-"))[1]
            except NotFound:
                return Page(())
        entries = parse_json(raw, "the referrers").get("manifests")
        if not isinstance(entries, Sequence):
            raise Invalid("the referrers are not an index", expected="an image index")
        found = tuple(parse_descriptor(e, f"referrer {i}") for i, e in enumerate(entries))
        return Page(tuple(d for d in found if not kind or d.artifact_type == kind))

    def api(self, method: str, path: str, body: Mapping[str, object] | None = None) -> dict[str, object]:
        """One call of the admin protocol under /airlock/v1, JSON both ways."""
        if not path.startswith("/airlock/v1/"):
            raise Invalid(f"{path[:80]!r} is not a path of the admin protocol", expected="/airlock/v1/…")
        raw = None if body is None else json.dumps(body).encode()
        headers = {"Accept": "application/json", **({"Content-Type": "application/json"} if raw is not None else {})}
        answer = self.take(self.request(method, path, headers=headers, body=raw, bearer=True), MAX_MANIFEST_BYTES)
        return parse_json(answer, "the answer") if answer else {}

    # writes

    def upload(self, call: Call, repo: str, *, digest: str | None = None, size: int | None = None, algorithm: str = "sha256") -> RemoteUpload:
        """Starts an upload; raises Denied, NotFound."""
        scope = f"repository:{check_name(repo)}:pull,push"
        query = "" if algorithm == "sha256" else "?" + urlencode({"digest-algorithm": algorithm})
        response = self.request("POST", f"/v2/{repo}/blobs/uploads/{query}", headers={"Content-Length": "0"}, scope=scope)
        return RemoteUpload(self, scope, self._location(response), 0)

    def resume(self, call: Call, repo: str, upload_id: str) -> RemoteUpload:
        """Continues an upload by the location it ended with; raises NotFound when the registry has dropped it."""
        scope = f"repository:{check_name(repo)}:pull,push"
        response = self.request("GET", upload_id, scope=scope)
        return RemoteUpload(self, scope, self._location(response, upload_id), stored(response.headers))

    def _location(self, response: BaseHTTPResponse, default: str = "") -> str:
        """The upload's location as a path with query on our own origin."""
        self.take(response, ERROR_BYTES)
        target = joined(self.base_url + "/", response.headers.get("Location") or default)
        if origin(target) != self.origin:
            what = f"the registry places its uploads on {origin(target)[1]}"
            raise Unsupported(what, expected=self.base_url, do="use the URL by which the registry calls itself", reason="location")
        parts = urlsplit(target)
        return parts.path + (f"?{parts.query}" if parts.query else "")

    def push(
        self, call: Call, repo: str, raw: bytes, media_type: str, *, refs: Sequence[str] = (), expect: str | None = None, over: str | None = None
    ) -> Descriptor:
        """Stores a manifest byte for byte under its digest, or under each tag of `refs`; raises Invalid, NotFound for missing blobs, Conflict."""
        check_name(repo)
        if expect is not None or over is not None:
            raise Unsupported("a conditional push", expected="neither `expect` nor `over` over HTTP")
        digest = digest_of(raw)
        for ref in refs or (digest,):
            _check(repo, ref)
            response = self.request(
                "PUT",
                f"/v2/{repo}/manifests/{quote(ref, safe=':')}",
                headers={"Content-Type": media_type},
                body=raw,
                scope=f"repository:{repo}:pull,push",
            )
            stated = response.headers.get("Docker-Content-Digest", digest)
            self.take(response, ERROR_BYTES)
            if stated != digest:
                raise Mismatch(
                    f"the registry stored the manifest as {clean(stated)}", expected=digest, do="use a registry that keeps manifests byte for byte"
                )
        return Descriptor(media_type, digest, len(raw))

    def mount(self, call: Call, repo: str, digest: str, source: str) -> Descriptor | None:
        """Links a blob of `source` into `repo`; None when the registry wants the bytes instead (the upload it offers is cancelled)."""
        _check(repo, check_digest(digest))
        query = urlencode({"mount": digest, "from": check_name(source)})
        scope = f"repository:{repo}:pull,push"
        response = self.request("POST", f"/v2/{repo}/blobs/uploads/?{query}", headers={"Content-Length": "0"}, scope=scope)
        if response.status == 201:
            self.take(response, ERROR_BYTES)
            return Descriptor("application/octet-stream", digest, self.blob_size(repo, digest) or 0)
        RemoteUpload(self, scope, self._location(response), 0).cancel()
        return None

    def delete(self, call: Call, repo: str, ref: str) -> None:
        """Removes a tag or a manifest by digest; raises NotFound, Unsupported."""
        _check(repo, ref)
        self.take(self.request("DELETE", f"/v2/{repo}/manifests/{quote(ref, safe=':')}", scope=f"repository:{repo}:delete"), ERROR_BYTES)


class RemoteUpload(Upload):
    """An upload at a registry; `id` is its current location and changes with every chunk."""

    def __init__(self, remote: RemoteRegistry, scope: str, location: str, offset: int) -> None:
        self._remote, self._scope, self.id, self.offset = remote, scope, location, offset

    def write(self, view: bytes | memoryview) -> None:
        """Sends one chunk at `offset`; raises RangeInvalid when the registry holds another offset, Unavailable when the connection breaks."""
        self.send(bytes(view), len(view))

    def send(self, body: bytes | IO[bytes], length: int) -> None:
        """Sends one chunk of `length` bytes from a reader or from memory; `offset` is then what the registry says it holds."""
        if not length:
            return
        headers = {
            "Content-Type": "application/octet-stream",
            "Content-Length": str(length),
            "Content-Range": f"{self.offset}-{self.offset + length - 1}",
        }
        response = self._remote.request("PATCH", self.id, headers=headers, body=body, scope=self._scope)
        self.id = self._remote._location(response, self.id)
        end = self.offset + length
        self.offset = stored(response.headers) if response.headers.get("Range") else end
        if self.offset > end:
            raise RangeInvalid(f"the registry holds {self.offset} bytes of this upload", expected=f"at most {end}", do="start the upload anew")

    def commit(self, digest: str, size: int | None = None, last: bytes = b"") -> Descriptor:
        """Closes the upload, with a last chunk where it fits into memory; raises Mismatch when the registry computes another digest."""
        target = self.id + ("&" if "?" in self.id else "?") + urlencode({"digest": check_digest(digest)})
        headers = {"Content-Type": "application/octet-stream", "Content-Length": str(len(last))}
        if last and self.offset:
            headers["Content-Range"] = f"{self.offset}-{self.offset + len(last) - 1}"
        self._remote.take(self._remote.request("PUT", target, headers=headers, body=last or None, scope=self._scope), ERROR_BYTES)
        return Descriptor("application/octet-stream", digest, self.offset + len(last))

    def cancel(self) -> None:
        """Drops the upload; one that is gone already is no error."""
        try:
            self._remote.take(self._remote.request("DELETE", self.id, scope=self._scope), ERROR_BYTES)
        except (NotFound, Unsupported):
            return

    def suspend(self) -> None:
        """Nothing to do: the registry keeps the bytes, `id` is what resume needs."""


def _check(repo: str, ref: str) -> None:
    check_name(repo)
    if not is_digest(ref) and not is_tag(check_ref(ref)):
        raise Invalid(f"{ref[:100]!r} is no OCI tag", expected="letters, digits and . _ - (at most 128), or a digest", reason="ref")


def stored(headers: Mapping[str, str]) -> int:
    """How many bytes an upload holds, from `Range: 0-<last byte>`; `0-0` and nothing at all mean none (distribution-spec, chunked push)."""
    match = re.fullmatch(r"(?:bytes=)?0-([0-9]{1,19})", headers.get("Range", "").strip())
    return int(match[1]) + 1 if match and match[1] != "0" else 0
