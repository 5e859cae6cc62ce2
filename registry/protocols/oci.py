"""The OCI distribution-spec v1.1 door, `/v2/…`: parses requests, calls the guard, words its answers; no store, no SQL, no decision of its own.

Names hold slashes, so a path is read from its end: the last /blobs/, /manifests/, /tags/list or /referrers/.
`Accept` is ignored: what was pushed is served.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from contextlib import suppress
from urllib.parse import quote

from artifact import errors
from artifact.manifest import INDEX, MAX_MANIFEST_BYTES, check_digest, check_name, digest_of, is_digest, is_name, is_tag, parse_manifest
from artifact.store import Call, Content, Descriptor, Upload
from registry import refusals
from registry.exchange import Exchange
from registry.tokens import challenge

_CHUNK = re.compile(r"(\d{1,18})-(\d{1,18})\Z")
_UPLOAD = re.compile(r"[A-Za-z0-9_-]{1,128}\Z")
_PULLS = ("GET tags", "GET blobs", "GET manifests")
_CHUNK_BYTES = 1024 * 1024  # smaller chunks are taken too, but each is a request of its own
_PAGE, _MOST = 500, 900  # the store gives at most 1,000 a page, and one more is asked for to know whether to go on
_KINDS = {
    "manifest": ("MANIFEST_UNKNOWN", "MANIFEST_INVALID"),
    "blob": ("BLOB_UNKNOWN", "DIGEST_INVALID"),
    "upload": ("BLOB_UPLOAD_UNKNOWN", "BLOB_UPLOAD_INVALID"),
    "": ("NAME_UNKNOWN", "UNSUPPORTED"),
}
_REASONS = {"digest": "DIGEST_INVALID", "name": "NAME_INVALID", "size": "SIZE_INVALID", "manifest_blob": "MANIFEST_BLOB_UNKNOWN"}
_REASONS |= {"repo": "NAME_UNKNOWN", "not_visible": "NAME_UNKNOWN"}
_FORMS = {"immutable": (403, "DENIED"), "moved": (412, "PRECONDITION_FAILED"), "files": (400, "MANIFEST_INVALID")}
_TABLE: dict[type[errors.AirlockError], tuple[int, str]] = {
    errors.Unauthenticated: (401, "UNAUTHORIZED"),
    errors.Denied: (403, "DENIED"),
    errors.Mismatch: (400, "DIGEST_INVALID"),
    errors.Conflict: (409, "CONFLICT"),
    errors.Throttled: (429, "TOOMANYREQUESTS"),
    errors.Unavailable: (503, "UNAVAILABLE"),
    errors.Unsupported: (405, "UNSUPPORTED"),
    errors.RangeInvalid: (416, "BLOB_UPLOAD_INVALID"),
}


def error_form(error: errors.AirlockError, kind: str) -> tuple[int, str]:
    """Status and OCI error code of a failure on a route of that kind (distribution-spec, error codes)."""
    unknown, invalid = _KINDS[kind]
    if error.reason in _FORMS:
        return _FORMS[error.reason]
    if isinstance(error, errors.NotFound):
        return 404, _REASONS.get(error.reason, unknown)
    if isinstance(error, errors.Invalid) or (isinstance(error, errors.Unsupported) and error.reason == "digest"):
        return 400, _REASONS.get(error.reason, invalid)
    if isinstance(error, errors.TooLarge):
        return 413, "MANIFEST_INVALID" if kind == "manifest" else "SIZE_INVALID"
    return refusals.form(_TABLE, error, (500, "UNKNOWN"))


class OciDoor:
    """Dispatches one `/v2/` exchange."""

    async def __call__(self, x: Exchange) -> None:
        """Answers; a client that left gets nothing."""
        kind = ""

        async def work() -> None:
            nonlocal kind
            repo, kind, rest = self._route(x.path)
            await self._serve(x, repo, kind, rest)

        singular = {"uploads": "upload", "manifests": "manifest", "blobs": "blob"}
        await x.serve(work(), lambda error: self._refuse(x, error, singular.get(kind, "")))

    def _route(self, path: str) -> tuple[str, str, str]:
        """Repository, kind and rest of a path; raises Invalid for a name outside the grammar, NotFound for no route."""
        if path in ("/v2", "/v2/"):
            return "", "ping", ""
        if path in ("/v2/_catalog", "/v2/_catalog/"):
            return "", "catalog", ""
        tail = path[len("/v2/") :]
        if tail.endswith("/tags/list"):
            return check_name(tail[: -len("/tags/list")]), "tags", ""
        at, kind = max((tail.rfind(f"/{k}/"), k) for k in ("blobs", "manifests", "referrers"))
        if at < 0:
            raise errors.NotFound("no such route", expected="a path of the OCI distribution specification", reason="repo")
        repo, rest = tail[:at], tail[at + len(kind) + 2 :]
        if kind == "blobs" and (rest == "uploads" or rest.startswith("uploads/")):
            return check_name(repo), "uploads", rest[len("uploads/") :]
        return check_name(repo), kind, rest

    async def _serve(self, x: Exchange, repo: str, kind: str, rest: str) -> None:
        if kind == "uploads":
            route = f"{x.method} uploads" if not rest else f"{x.method} upload"
        else:
            route = f"{'GET' if x.method == 'HEAD' else x.method} {kind}"
        verbs: dict[str, Callable[[Exchange, str, str], Awaitable[None]]] = {
            "GET ping": self._ping,
            "GET catalog": self._catalog,
            "GET tags": self._tags,
            "GET referrers": self._referrers,
            "GET blobs": self._blob,
            "DELETE blobs": self._delete_blob,
            "GET manifests": self._manifest,
            "PUT manifests": self._put_manifest,
            "DELETE manifests": self._delete_manifest,
            "POST uploads": self._begin,
            "PATCH upload": self._patch,
            "PUT upload": self._close,
            "GET upload": self._status,
            "DELETE upload": self._cancel,
        }
        verb = verbs.get(route)
        if verb is None:
            served = [known.split()[0] for known in verbs if known.split()[1] == route.split()[1]]
            served += ["HEAD"] if "GET" in served and kind != "uploads" else []
            raise errors.Unsupported(f"{x.method} is not served here", expected=" or ".join(served), allow=", ".join(served))
        space = x.param("ns") if route in _PULLS else ""
        if space and is_name(f"{space}/{repo}"):  # a mirror asked for another registry's content: kept under that registry's name
            with suppress(errors.NotFound):
                return await verb(x, f"{space}/{repo}", rest)
            if x.started:
                return None
        return await verb(x, repo, rest)

    async def _refuse(self, x: Exchange, error: errors.AirlockError, kind: str) -> None:
        status, code = error_form(error, kind)
        headers = {"docker-distribution-api-version": "registry/2.0"} | refusals.headers(status, error)
        if status == 401:
            failure = {"insufficient_scope": error.reason, "key_absent": ""}.get(error.reason, "invalid_token")
            headers["www-authenticate"] = challenge(x.base_url, self._scope(x), failure)
        if status == 416:
            headers |= {k: error.ids[k] for k in ("location", "range", "docker-upload-uuid") if k in error.ids}
        detail = {"reason": error.reason, "expected": error.expected, "do": error.do}
        await x.json(status, {"errors": [{"code": code, "message": refusals.words(error), "detail": detail}]}, headers)

    def _scope(self, x: Exchange) -> str:
        """The scope that this request needs, as a token request names it (distribution token specification)."""
        repo, kind, _rest = self._route(x.path)
        if not repo:
            return "registry:catalog:*" if kind == "catalog" else ""
        actions = "pull" if x.method in ("GET", "HEAD") else "delete" if x.method == "DELETE" else "pull,push"
        if kind == "uploads" or (kind == "blobs" and x.method == "HEAD"):  # who asks for a blob's presence is about to push, and oras asks once
            actions = "pull,push"
        source = x.param("from") if x.method == "POST" and x.param("mount") else f"{x.param('ns')}/{repo}" if actions == "pull" else ""
        return f"repository:{repo}:{actions}" + (f" repository:{source}:pull" if source and is_name(source) else "")

    async def _ping(self, x: Exchange, _repo: str, _rest: str) -> None:
        await x.call(x.guard.ping)
        await x.json(200, {}, {"docker-distribution-api-version": "registry/2.0"})

    # ---- reading

    async def _catalog(self, x: Exchange, _repo: str, _rest: str) -> None:
        count, last = x.number("n", _PAGE, _MOST), x.cursor("last")
        page = await x.call(lambda call: x.guard.list(call, "", last, count + 1))
        names = [str(n) for n in page.items[:count]]
        await x.json(200, {"repositories": names}, _next("/v2/_catalog", count, names if len(page.items) > count else []))

    async def _tags(self, x: Exchange, repo: str, _rest: str) -> None:
        count, last = x.number("n", _PAGE, _MOST), x.cursor("last")

        def work(call: Call) -> tuple[list[str], bool]:
            found: list[str] = []
            after = last
            while True:
                page = x.guard.refs(call, repo, after, _MOST)
                found += [str(t) for t in page.items if is_tag(str(t))]
                after = page.after
                if not after or len(found) > count:
                    return found[:count], len(found) > count

        tags, more = await x.call(work)
        headers = _next(f"/v2/{repo}/tags/list", count, tags if more else []) | _space(x, repo)
        await x.json(200, {"name": repo, "tags": tags}, headers)

    async def _referrers(self, x: Exchange, repo: str, digest: str) -> None:
        check_digest(digest)
        kind, after = x.param("artifactType"), x.cursor("after")
        try:
            page = await x.call(lambda call: x.guard.referrers(call, repo, digest, kind, after))
            items, onward = [d.as_json() for d in page.items if isinstance(d, Descriptor)], page.after
        except errors.NotFound:  # an unknown name has no referrers; the specification forbids 404 here
            items, onward = [], ""
        headers = {"oci-filters-applied": "artifactType"} if kind else {}
        if onward:
            query = f"after={quote(onward, safe='')}" + (f"&artifactType={quote(kind, safe='')}" if kind else "")
            headers["link"] = f'</v2/{repo}/referrers/{digest}?{query}>; rel="next"'
        await x.json(200, {"schemaVersion": 2, "mediaType": INDEX, "manifests": items}, headers, INDEX)

    async def _blob(self, x: Exchange, repo: str, digest: str) -> None:
        check_digest(digest)
        headers = {"content-type": "application/octet-stream", "docker-content-digest": digest, "etag": f'"{digest}"', **_space(x, repo)}
        ask = ("object", repo, digest)
        if x.method == "HEAD":
            size = (await x.call(lambda call: x.guard.stat(call, repo, digest), ask=ask)).size
            content = Content(digest, "", size, 0, size, data=b"")
        else:
            content = await x.call(lambda call: x.guard.read(call, repo, digest), ask=ask)

        async def again(lo: int, hi: int) -> Content:
            return await x.call(lambda call: x.guard.read(call, repo, digest, lo, hi), ask=ask)

        await x.content(content, headers, again)
        await x.served(repo, digest)

    async def _manifest(self, x: Exchange, repo: str, ref: str) -> None:
        self._check_ref(ref)

        def work(call: Call) -> tuple[Descriptor, Content | None]:
            found = x.guard.resolve(call, repo, ref)
            return found, None if x.method == "HEAD" else x.guard.read(call, repo, found.digest)

        found, content = await x.call(work, ask=("head" if x.method == "HEAD" else "manifest", repo, ref))
        shown = ref if is_digest(ref) else found.digest
        headers = {"content-type": found.media_type, "docker-content-digest": shown, "etag": f'"{shown}"', **_space(x, repo)}
        if content is None:
            await x.answer(200, {**headers, "content-length": str(found.size)})
            return
        x.headers.pop("range", None)

        async def again(_lo: int, _hi: int) -> Content:
            raise errors.Unsupported("manifests are served whole")

        await x.content(content, headers, again)

    @staticmethod
    def _check_ref(ref: str) -> None:
        if ":" in ref:
            check_digest(ref)
        elif not is_tag(ref):
            raise errors.Invalid(f"{ref[:100]!r} is not a tag", expected="at most 128 letters, digits and . _ -", reason="manifest")

    # ---- writing

    async def _put_manifest(self, x: Exchange, repo: str, ref: str) -> None:
        self._check_ref(ref)
        tags = [v for k, v in x.query if k == "tag"] if is_digest(ref) else [ref]
        if len(tags) > 100:
            raise errors.TooLarge(f"{len(tags)} tags in one request", expected="at most 100")
        for tag in tags:
            self._check_ref(tag)
        over = _condition(x)
        await x.call(lambda call: x.guard.demand_push(call, repo))  # a body is read for nobody who may not push
        raw = await x.read_body(MAX_MANIFEST_BYTES, "the manifest")
        stated = x.headers.get("content-type", "").split(";")[0].strip()

        def work(call: Call) -> tuple[Descriptor, str]:
            if is_digest(ref) and digest_of(raw, ref.split(":")[0]) != ref:
                raise errors.Mismatch("the manifest does not match the digest it was pushed under", expected=ref)
            parsed = parse_manifest(raw, stated)
            pushed = x.guard.push(call, repo, raw, parsed.media_type, refs=tags, expect=ref if is_digest(ref) else None, over=over)
            return pushed, parsed.subject.digest if parsed.subject else ""

        pushed, subject = await x.call(work)
        shown = ref if is_digest(ref) else pushed.digest
        headers = {"location": f"/v2/{repo}/manifests/{shown}", "docker-content-digest": shown}
        if subject:
            headers["oci-subject"] = subject
        if is_digest(ref) and tags:
            headers["oci-tag"] = ", ".join(tags)
        await x.answer(201, headers)

    async def _delete_manifest(self, x: Exchange, repo: str, ref: str) -> None:
        self._check_ref(ref)
        await x.call(lambda call: x.guard.delete(call, repo, ref))
        await x.answer(202, {})

    async def _delete_blob(self, x: Exchange, repo: str, digest: str) -> None:
        check_digest(digest)
        await x.call(lambda call: x.guard.delete(call, repo, digest))
        await x.answer(202, {})

    # ---- uploads

    async def _begin(self, x: Exchange, repo: str, _rest: str) -> None:
        digest, mount, source = x.param("digest"), x.param("mount"), x.param("from")
        algorithm = x.param("digest-algorithm") or (digest or mount).partition(":")[0] or "sha256"
        if algorithm not in ("sha256", "sha512"):
            raise errors.Invalid(f"digests of {algorithm[:20]!r} are not kept", expected="sha256 or sha512", reason="digest")
        for given in filter(None, (digest, mount)):
            check_digest(given)
        length = x.headers.get("content-length", "")
        size = int(length) if digest and length.isascii() and length.isdigit() and len(length) < 19 else None

        def work(call: Call) -> Upload | None:
            if mount and source and x.guard.mount(call, repo, mount, check_name(source)) is not None:
                return None
            return x.guard.upload(call, repo, digest=digest or None, size=size, algorithm=algorithm)

        upload = await x.call(work)
        if upload is None:
            await self._created(x, repo, mount)
        elif digest:
            await x.pour(upload)
            await self._commit(x, repo, upload, digest)
        else:
            await x.io(upload.suspend)
            await x.answer(202, self._state(repo, upload) | {"oci-chunk-min-length": str(_CHUNK_BYTES)})

    @staticmethod
    def _state(repo: str, upload: Upload) -> dict[str, str]:
        place = f"/v2/{repo}/blobs/uploads/{upload.id}"
        return {"location": place, "range": f"0-{max(upload.offset - 1, 0)}", "docker-upload-uuid": upload.id}

    @staticmethod
    async def _created(x: Exchange, repo: str, digest: str) -> None:
        await x.answer(201, {"location": f"/v2/{repo}/blobs/{digest}", "docker-content-digest": digest})

    async def _commit(self, x: Exchange, repo: str, upload: Upload, digest: str) -> None:
        try:
            await x.io(lambda: upload.commit(digest))
        except errors.AirlockError:
            with suppress(errors.AirlockError):
                await x.io(upload.suspend)  # what the store did not discard itself can be continued
            raise
        await self._created(x, repo, digest)

    async def _resume(self, x: Exchange, repo: str, upload_id: str) -> Upload:
        if not _UPLOAD.match(upload_id):
            raise errors.NotFound("no such upload", do="start a new one")
        return await x.call(lambda call: x.guard.resume(call, repo, upload_id))

    async def _chunk(self, x: Exchange, repo: str, upload: Upload) -> int | None:
        """The length that Content-Range promises; raises RangeInvalid when it does not begin where the upload stands."""
        text = x.headers.get("content-range")
        if text is None:
            return None
        found = _CHUNK.match(text.strip())
        first, last = (int(found.group(1)), int(found.group(2))) if found else (-1, -1)
        if first != upload.offset or last < first - 1:
            await x.io(upload.suspend)
            raise errors.RangeInvalid("the chunk does not begin where the upload stands", expected=f"{upload.offset}-", **self._state(repo, upload))
        length = x.headers.get("content-length", "")
        if length.isdigit() and int(length) != last - first + 1:
            await x.io(upload.suspend)
            raise errors.Invalid("Content-Length and Content-Range differ", expected=f"{last - first + 1} bytes", reason="size")
        return last - first + 1

    async def _patch(self, x: Exchange, repo: str, upload_id: str) -> None:
        upload = await self._resume(x, repo, upload_id)
        await x.pour(upload, await self._chunk(x, repo, upload))
        await x.io(upload.suspend)
        await x.answer(202, self._state(repo, upload))

    async def _close(self, x: Exchange, repo: str, upload_id: str) -> None:
        digest = check_digest(x.param("digest"))
        upload = await self._resume(x, repo, upload_id)
        await x.pour(upload, await self._chunk(x, repo, upload))
        await self._commit(x, repo, upload, digest)

    async def _status(self, x: Exchange, repo: str, upload_id: str) -> None:
        upload = await self._resume(x, repo, upload_id)
        await x.io(upload.suspend)
        await x.answer(204, self._state(repo, upload))

    async def _cancel(self, x: Exchange, repo: str, upload_id: str) -> None:
        upload = await self._resume(x, repo, upload_id)
        await x.io(upload.cancel)
        await x.answer(204, {})


def _space(x: Exchange, repo: str) -> dict[str, str]:
    """Tells a client that named another registry by `ns` that this is that registry's content (distribution-spec, pulling through proxies)."""
    space = x.param("ns")
    return {"oci-namespace": space} if space and repo.startswith(space + "/") else {}


def _condition(x: Exchange) -> str | None:
    """The digest that the tags must name now, from If-Match; empty for none at all, from If-None-Match; raises Invalid (RFC 9110 section 13.1)."""
    given, none = x.headers.get("if-match"), x.headers.get("if-none-match")
    if none is not None and (none.strip() != "*" or given is not None):
        raise errors.Invalid("only If-None-Match: * is understood, and without If-Match", expected="*, or If-Match with one ETag", reason="condition")
    if given is None:
        return None if none is None else ""
    return check_digest(given.strip().strip('"'))


def _next(path: str, count: int, shown: list[str]) -> dict[str, str]:
    return {"link": f'<{path}?n={count}&last={quote(shown[-1], safe="")}>; rel="next"'} if shown and count else {}
