"""The Hub's routes that change something: create, preupload, LFS batch and uploads, commit, branches, tags, removal; it words, the guard decides.

Below the Hub door (registry/protocols/huggingface.py), in a file of its own. Bodies are read for nobody who may not push; a file's bytes stream into
an upload like any other door's, and the lines of a commit are taken one after the other, so that no commit is held in memory.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from urllib.parse import urlencode

from artifact import errors
from artifact.card import head_of, hub_warnings, load_yaml
from artifact.manifest import check_digest, check_name, check_path, content_kind, digest_of, parse_json
from artifact.store import Call, Change, File, Poured, Upload
from registry import hub
from registry.exchange import Exchange, Gone
from registry.revising import MAX_CHANGES

LFS_TYPE = "application/vnd.git-lfs+json"
WEIGHT = "application/vnd.cncf.model.weight.v1.raw"
MAX_REGULAR = 10 * 1024 * 1024  # larger files go as LFS whatever they are called, as at the Hub
MAX_LINE = MAX_REGULAR * 4 // 3 + 64 * 1024
LINES = 256 * 1024  # of a commit, how many bytes of lines are put at once
MAX_OBJECTS = 1000
MAX_BODY = 4 * 1024 * 1024
PART = 64 * 1024 * 1024
MAX_PARTS = 1000
MAX_URLS = 50_000  # of one batch: some 20 MiB of an answer, and parts for 3 TB
NO_XET = "This-registry-takes-no-Xet-uploads-yet-set-HF_HUB_DISABLE_XET=1-and-run-again"
_OID = re.compile(r"[0-9a-f]{64}\Z")
_PART = re.compile(r"[0-9]{1,9}\Z")


@dataclass
class _Commit:
    """What was read of a commit so far."""

    title: str = ""
    parent: str | None = None
    seen: bool = False
    changes: list[Change] = field(default_factory=list)


class HubWriter:
    """Answers one exchange; what it raises, the door words."""

    # ---- repositories

    async def validate(self, x: Exchange) -> None:
        """`POST /api/validate-yaml`: whether the head of a model card can be read."""
        await x.call(lambda call: x.guard.ping(call))
        body = parse_json(await x.read_body(MAX_BODY, "the card"), "the card's request")
        content = body.get("content")
        head = head_of(content.encode("utf-8", "replace")) if isinstance(content, str) else None
        said: list[dict[str, str]] = []
        if head is not None:
            try:
                await x.io(lambda: load_yaml(head, "the model card"))
            except errors.Invalid as error:
                said.append({"message": error.what})
        await x.json(200, {"errors": [], "warnings": said})  # a card that cannot be read is an absent one, not a reason to refuse the weights

    async def repos(self, x: Exchange, at: hub.Place) -> None:
        """`POST /api/repos/create`, `DELETE /api/repos/delete`."""
        verb = f"{x.method} {'/'.join(at.parts[2:])}"
        if verb not in ("POST create", "DELETE delete"):
            raise errors.Unsupported(f"{verb[:60]} is not served here", expected="create or delete", reason="not_served")
        await x.call(lambda call: x.guard.ping(call))
        body = parse_json(await x.read_body(64 * 1024, "the request"), "the request")
        name, org, kind = (body.get(key) or default for key, default in (("name", ""), ("organization", ""), ("type", "model")))
        if not isinstance(name, str) or not isinstance(org, str):
            raise errors.Invalid("name and organization are not text", expected='{"name": "m", "organization": "acme"}')
        private = body.get("private") is True or body.get("visibility") == "private"
        if kind != "model":
            raise errors.Unsupported(f"{str(kind)[:20]} repositories are not kept here", expected="model", reason="not_served")

        def work(call: Call) -> str:
            owner = org or ("" if "/" in name else at.org or call.principal.org)
            repo_id = f"{owner}/{name}" if owner else name
            bare = hub.Place(at.prefix, "" if owner.lower() == at.org else at.org, at.parts)
            names = bare.names(repo_id)
            held = x.guard.revisions.first(call, names, 0)
            if verb.startswith("DELETE"):
                x.guard.upkeep.remove(call, {"name": held, "ref": ""})
                return repo_id
            if held.startswith("hf/"):  # there already, or no name of ours at all
                check_name(repo_id.lower())
            try:
                x.guard.revisions.create(call, held, repo_id, private)
            except errors.Conflict as error:
                if error.reason == "exists":
                    error.ids["url"] = f"{x.base_url}{at.prefix}/{repo_id}"
                raise
            return repo_id

        repo_id = await x.call(work)
        await x.json(200, {} if verb.startswith("DELETE") else {"url": f"{x.base_url}{at.prefix}/{repo_id}", "name": repo_id, "id": "0"})

    async def model(self, x: Exchange, at: hub.Place, names: Sequence[str], word: str, ref: str) -> None:
        """What changes one model: preupload, commit, branch and tag."""
        name = await x.call(lambda call: x.guard.revisions.target(call, names))
        ref = hub.ref_of(ref)
        if word == "preupload":
            await self._preupload(x, name, ref)
        elif word == "commit":
            if x.param("create_pr").lower() in ("1", "true"):
                raise errors.Unsupported("pull requests are not kept here", do="commit to a branch", reason="not_served")
            await self._commit(x, at, name, ref)
        elif x.method == "DELETE":
            await x.call(lambda call: self._drop(x, call, name, word, ref))
            await x.json(200, {})
        else:
            await self._point(x, name, word, ref)

    async def _point(self, x: Exchange, name: str, word: str, ref: str) -> None:
        raw = await x.read_body(64 * 1024, "the request")
        body = parse_json(raw or b"{}", "the request")
        made, start = (ref, body.get("startingPoint", "main")) if word == "branch" else (body.get("tag", ""), ref)
        if not isinstance(made, str) or not isinstance(start, str):
            raise errors.Invalid("the ref or its start is not text", expected="names of refs")
        overwrite = body.get("overwrite") is True
        await x.call(lambda call: x.guard.revisions.point(call, name, hub.ref_of(made), word, hub.ref_of(start), overwrite))
        await x.json(200, {})

    @staticmethod
    def _drop(x: Exchange, call: Call, name: str, word: str, ref: str) -> None:
        if ref == "main":
            raise errors.Conflict(
                "main is the branch that every model has", do="delete the repository, or commit what should be there", reason="main"
            )
        if x.guard.revisions.kind(call, name, ref) != word:
            raise errors.NotFound(f"{name} has no {word} {ref[:100]}", reason="revision")
        x.guard.delete(call, name, ref)

    # ---- commits

    async def _preupload(self, x: Exchange, name: str, ref: str) -> None:
        body = parse_json(await x.read_body(MAX_BODY, "the list of files"), "the list of files")
        files = body.get("files")
        if not isinstance(files, list) or len(files) > MAX_OBJECTS or not all(isinstance(f, dict) for f in files):
            raise errors.Invalid("files is no list", expected=f"at most {MAX_OBJECTS} objects with path and size")
        held = await x.call(lambda call: x.guard.revisions.planned(call, name, ref))
        answers, sized = [], []
        for file in files:
            path, size = file.get("path"), file.get("size")
            if not isinstance(path, str) or type(size) is not int or size < 0:
                raise errors.Invalid("a file has no path or size", expected='{"path": "config.json", "size": 7}')
            there = held.get(check_path(path))
            answers.append({"path": path, "uploadMode": _mode(path, size, there), "shouldIgnore": False, "oid": hub.etag(there) if there else None})
            sized.append(File(path, "", size))
        await x.json(200, {"files": answers}, _too_large(sized))

    async def _commit(self, x: Exchange, at: hub.Place, name: str, branch: str) -> None:
        read = _Commit()
        lines: list[bytes] = []
        rest, size = bytearray(), 0
        async for pieces in x.pieces():
            first, *whole = b"".join(pieces).split(b"\n")
            rest += first  # a line of megabytes comes in many pieces, and is not copied for each
            if whole:
                whole, rest = [bytes(rest), *whole[:-1]], bytearray(whole[-1])
            if len(rest) > MAX_LINE or any(len(line) > MAX_LINE for line in whole):
                raise errors.TooLarge("a line of the commit is too long", expected=f"at most {MAX_REGULAR} bytes outside LFS")
            lines += filter(bytes.strip, whole)
            size += sum(map(len, whole))
            if size >= LINES:
                await self._take(x, name, read, lines)
                lines, size = [], 0
        await self._take(x, name, read, [*lines, bytes(rest)])
        if not read.seen:
            raise errors.Invalid("the commit has no header", expected='a first line {"key": "header", "value": {"summary": "…"}}')
        made = await x.call(lambda call: x.guard.commit(call, name, branch, read.parent, read.changes, read.title))
        url = f"{x.base_url}{at.prefix}/{made.display}/commit/{made.commit}"
        headers = _too_large([File(c.path, c.digest, c.size or 0) for c in read.changes])
        await x.json(200, {"success": True, "commitOid": made.commit, "commitUrl": url, "hookOutput": ""}, headers)

    async def _take(self, x: Exchange, name: str, read: _Commit, lines: Sequence[bytes]) -> None:
        def work(call: Call) -> None:
            for line in filter(bytes.strip, lines):
                self._line(x, call, name, read, line)

        if any(line.strip() for line in lines):
            call = await x.call(lambda call: call)  # the key as it is now
            await x.io(lambda: work(call))  # whose bytes are no work for the threads of the lookups

    def _line(self, x: Exchange, call: Call, name: str, read: _Commit, line: bytes) -> None:
        """One line of a commit: its header, or a change, whose bytes are stored at once; raises Invalid, TooLarge."""
        doc = parse_json(line, "a line of the commit", MAX_LINE)
        key, value = doc.get("key"), doc.get("value")
        if not isinstance(value, dict):
            raise errors.Invalid("a line of the commit has no value", expected='{"key": …, "value": {…}}')
        if key == "header":
            summary, parent = value.get("summary", ""), value.get("parentCommit")
            if not isinstance(summary, str) or not (parent is None or isinstance(parent, str)):
                raise errors.Invalid("summary or parentCommit is not text", expected="texts")
            read.title, read.parent, read.seen = summary, parent or None, True
            return
        path = value.get("path")
        if not isinstance(path, str) or len(read.changes) >= MAX_CHANGES:
            raise (
                errors.Invalid("a line of the commit has no path", expected="a path")
                if not isinstance(path, str)
                else errors.TooLarge(f"the commit has more than {MAX_CHANGES} changes", expected=f"at most {MAX_CHANGES}", reason="files")
            )
        if key == "deletedFile":
            read.changes.append(Change(check_path(path)))
        elif key == "deletedFolder":
            read.changes.append(Change(check_path(path.rstrip("/")) + "/"))
        elif key == "file":
            read.changes.append(self._regular(x, call, name, check_path(path), value))
        elif key == "lfsFile":
            oid, size = value.get("oid"), value.get("size")
            if not isinstance(oid, str) or not (size is None or type(size) is int) or value.get("algo", "sha256") != "sha256":
                raise errors.Invalid(f"the line of {path[:200]!r} names no object", expected="algo sha256, oid, size")
            read.changes.append(Change(check_path(path), check_digest(f"sha256:{oid}"), size, True))
        else:
            raise errors.Invalid(f"{str(key)[:40]!r} is no line of a commit", expected="header, file, lfsFile, deletedFile or deletedFolder")

    @staticmethod
    def _regular(x: Exchange, call: Call, name: str, path: str, value: dict[str, object]) -> Change:
        content, encoding = value.get("content"), value.get("encoding", "base64")
        try:
            raw = base64.b64decode(content, validate=True) if isinstance(content, str) and encoding == "base64" else None
        except (binascii.Error, ValueError):
            raw = None
        if raw is None:
            raise errors.Invalid(f"the content of {path[:200]!r} is not base64", expected="base64")
        digest = digest_of(raw)
        upload = x.guard.upload(call, name, digest=digest, size=len(raw))
        upload.write(raw)
        upload.commit(digest, len(raw))
        return Change(path, digest, len(raw))

    # ---- LFS

    async def lfs(self, x: Exchange, at: hub.Place, repo: Sequence[str], rest: Sequence[str]) -> None:
        """What is below `/{id}.git/info/lfs/`: the batch, an object, a part of one, its completion, its verification."""
        verb, tail = x.method, tuple(rest)
        if tail == ("objects", "batch") and verb == "POST":
            await self._batch(x, at, repo)
        elif len(tail) == 3 and tail[0] == "objects" and tail[2] == "verify" and verb == "POST":
            await self._verify(x, hub.names_of(repo), tail[1])
        elif len(tail) in (2, 3) and tail[0] == "objects" and x.param("token"):
            await self._object(x, tail[1], tail[2] if len(tail) == 3 else "")
        else:
            raise errors.NotFound("this registry has no such LFS route", reason="repo")

    async def _batch(self, x: Exchange, at: hub.Place, repo: Sequence[str]) -> None:
        names = hub.names_of(repo)
        name = await x.call(lambda call: x.guard.revisions.target(call, names))
        body = parse_json(await x.read_body(MAX_BODY, "the batch"), "the batch")
        objects, transfers = body.get("objects"), body.get("transfers", ["basic"])
        if body.get("operation") != "upload" or body.get("hash_algo", "sha256") != "sha256":
            raise errors.Unsupported("this LFS operation is not served", expected="upload by sha256; files are read by resolve", reason="not_served")
        if not isinstance(objects, list) or len(objects) > MAX_OBJECTS or not isinstance(transfers, list):
            raise errors.Invalid("objects is no list", expected=f"at most {MAX_OBJECTS} objects with oid and size")
        base = f"{x.base_url}{at.prefix}/{'/'.join(repo)}.git/info/lfs/objects"
        if "multipart" in transfers and sum(map(_parts, objects)) > MAX_URLS:
            raise errors.TooLarge(f"the batch has more than {MAX_URLS} parts", expected="fewer files at once", reason="parts")
        found = await x.call(lambda call: [self._offer(x, call, name, base, entry, "multipart" in transfers) for entry in objects])
        await x.json(200, {"transfer": "basic", "objects": found}, media_type=LFS_TYPE)

    def _offer(self, x: Exchange, call: Call, name: str, base: str, entry: object, multipart: bool) -> dict[str, object]:
        """What a client does about one object: nothing where it is here, else the URLs to put it to."""
        oid, size = (entry.get("oid"), entry.get("size")) if isinstance(entry, dict) else (None, None)
        if not isinstance(oid, str) or not _OID.match(oid) or type(size) is not int or not 0 <= size < 1 << 62:
            raise errors.Invalid("an object has no oid or size", expected="oid of 64 lower-case hex digits, size in bytes")
        told: dict[str, object] = {"oid": oid, "size": size}
        with suppress(errors.NotFound):
            held = x.guard.stat(call, name, f"sha256:{oid}").size
            return told if held == size else told | {"error": {"code": 422, "message": f"{oid} has {held} bytes, not {size}"}}
        token = urlencode({"token": x.guard.revisions.upload_url(call, name, oid, size)})
        put, verify = f"{base}/{oid}", {"href": f"{base}/{oid}/verify"}
        if size <= PART or not multipart:
            return told | {"actions": {"upload": {"href": f"{put}?{token}"}, "verify": verify}}
        chunk = part_size(size)
        urls = {str(n + 1): f"{put}/{n + 1}?{token}" for n in range(_parts(entry))}
        return told | {"actions": {"upload": {"href": f"{put}/complete?{token}", "header": {"chunk_size": str(chunk), **urls}}, "verify": verify}}

    async def _verify(self, x: Exchange, names: Sequence[str], oid: str) -> None:
        def work(call: Call) -> int:
            return x.guard.stat(call, x.guard.revisions.target(call, names), check_digest(f"sha256:{oid}")).size

        size = await x.call(work)
        body = parse_json(await x.read_body(64 * 1024, "the request"), "the request")
        if body.get("oid") != oid or body.get("size") != size:
            raise errors.Mismatch(f"{oid} has {size} bytes here", expected="the oid and size that were uploaded", reason="size")
        await x.json(200, {})

    async def _object(self, x: Exchange, oid: str, part: str) -> None:
        """The bytes of one object, whole or a part of it, or its completion, for who holds its URL."""
        token, request = x.param("token"), str(x.note["request_id"])
        call, name, known, size = await x.sql(lambda: x.guard.revisions.bearer(token, request, x.address))
        x.note["key_id"] = call.principal.key_id
        if known != oid or x.method != ("POST" if part == "complete" else "PUT") or not (part in ("", "complete") or _PART.match(part)):
            raise errors.NotFound("this upload URL is of another object", do="ask for it again", reason="repo")
        if part == "complete":
            await self._complete(x, call, name, oid, size)
        elif part:
            await self._part(x, call, name, oid, size, int(part))
        else:
            length = x.headers.get("content-length", "")
            if length.isdigit() and int(length) != size:
                raise errors.Mismatch(f"the body has {length} bytes", expected=f"{size} bytes", reason="size")
            upload = await x.sql(lambda: x.guard.upload(call, name, digest=f"sha256:{oid}", size=size))
            try:
                await self._pour(x, upload, size)
                await x.io(lambda: upload.commit(f"sha256:{oid}", size))
            except (errors.AirlockError, Gone):  # a whole file is sent again from its start: nobody would go on with this one
                with suppress(errors.AirlockError):
                    await x.io(upload.cancel)
                raise
            await x.json(200, {})

    @staticmethod
    async def _pour(x: Exchange, upload: Poured, size: int) -> None:
        try:
            await x.pour(upload, size)
        except errors.RangeInvalid as error:
            raise errors.Mismatch("the body is longer than it was said to be", expected=f"{size} bytes", reason="size") from error

    @staticmethod
    async def _settle(x: Exchange, upload: Upload, oid: str, size: int) -> None:
        try:
            await x.io(lambda: upload.commit(f"sha256:{oid}", size))
        except errors.AirlockError:
            with suppress(errors.AirlockError):
                await x.io(upload.suspend)
            raise

    async def _part(self, x: Exchange, call: Call, name: str, oid: str, size: int, number: int) -> None:
        """One part, where the upload stands at it or behind it: what is here already is read away, so that any request may come again."""
        chunk = part_size(size)
        lo, hi = (number - 1) * chunk, min(number * chunk, size)
        if not 0 <= lo < size:
            raise errors.NotFound(f"{oid} has no part {number}", reason="repo")
        upload = await x.sql(lambda: x.guard.revisions.part(call, name, oid, size))
        if upload.offset < lo:
            async for _ in x.pieces():  # read away, so that the client sees why
                pass
            raise errors.Conflict(
                f"part {number} comes before {upload.offset} of {lo} bytes", do="send the parts one after the other", reason="order"
            )
        await self._pour(x, _Rest(upload, upload.offset - lo), hi - lo)
        await x.io(upload.suspend)
        await x.answer(200, {"etag": f'"{number}"'})

    async def _complete(self, x: Exchange, call: Call, name: str, oid: str, size: int) -> None:
        await x.read_body(MAX_BODY, "the list of parts")
        with suppress(errors.NotFound):
            if await x.sql(lambda: x.guard.stat(call, name, f"sha256:{oid}").size) == size:  # its answer was lost
                await x.json(200, {})
                return
        upload = await x.sql(lambda: x.guard.revisions.part(call, name, oid, size))
        await self._settle(x, upload, oid, size)
        await x.json(200, {})

    # ---- Xet

    async def no_xet(self, x: Exchange, at: hub.Place, names: Sequence[str], word: str) -> None:
        """The token routes of Xet: the client prints nothing but the URL that failed, so that URL says what to do."""
        if word == "xet-write-token":
            await x.call(lambda call: x.guard.revisions.target(call, names))
            await x.answer(307, {"location": f"{x.base_url}{at.prefix}/api/{NO_XET}"})
            return
        raise errors.NotFound("this registry serves no Xet", do="set HF_HUB_DISABLE_XET=1", reason="revision")


class _Rest(Poured):
    """An upload whose first bytes are here already: they are read and not written again."""

    def __init__(self, upload: Upload, skip: int) -> None:
        self._upload, self._skip = upload, skip

    def expect(self, size: int) -> None:
        """Says how many new bytes come."""
        self._upload.expect(max(0, size - self._skip))

    def write(self, view: bytes | memoryview) -> None:
        """Appends what is new of these bytes."""
        size = memoryview(view).nbytes
        skipped = min(self._skip, size)
        self._skip -= skipped
        if skipped < size:
            self._upload.write(memoryview(view)[skipped:])

    def suspend(self) -> None:
        """Makes the bytes so far durable."""
        self._upload.suspend()


def part_size(size: int) -> int:
    """How long the parts of a file are: 64 MiB, or longer so that there are at most 1,000."""
    step = 1024 * 1024
    return max(PART, -(-size // MAX_PARTS // step) * step)


def _parts(entry: object) -> int:
    """In how many parts the object of a batch comes; 0 of what is none."""
    size = entry.get("size") if isinstance(entry, dict) else None
    return -(-size // part_size(size)) if type(size) is int and size > 0 else 0


def _too_large(files: Sequence[File]) -> dict[str, str]:
    """What clients show their users of files that they would not download again."""
    words = hub_warnings(files)
    return {"x-hf-warning": f"size; {words[0]}"} if words else {}


def _mode(path: str, size: int, there: File | None) -> str:
    """Regular files travel in the commit; weights and what is large as LFS. The Hub keeps a file as it was, and so do we."""
    if there is not None and there.lfs and size:
        return "lfs"
    return "lfs" if size > MAX_REGULAR or content_kind(path) == WEIGHT else "regular"
