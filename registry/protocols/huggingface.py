"""The Hugging Face Hub door: the read routes that huggingface_hub, transformers and vLLM use; it words answers, the guard decides.

Order of names: the id as a canonical name, then `hf/<id>` escaped (docs/format.md section 2). Nothing here is ever compressed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any, TypeVar
from urllib.parse import parse_qsl, quote, urlencode

from artifact import errors
from artifact.manifest import FACTS_TYPE, check_name, check_path, check_ref, hub_name, parse_json, parse_manifest
from artifact.store import Call, Content, File, Revision
from registry.exchange import Exchange, Gone, all_items

T = TypeVar("T")
_FILES, _PAGE, _FACTS_BYTES = 10_000, 1000, 4 * 1024 * 1024
_NAMED = {"repo": "RepoNotFound", "revision": "RevisionNotFound", "entry": "EntryNotFound"}
_STATUS: dict[type[errors.AirlockError], int] = {
    errors.Unauthenticated: 401,
    errors.Denied: 403,
    errors.NotFound: 404,
    errors.Invalid: 400,
    errors.Mismatch: 400,
    errors.Conflict: 409,
    errors.RangeInvalid: 416,
    errors.TooLarge: 413,
    errors.Unsupported: 405,
    errors.Throttled: 429,
    errors.Unavailable: 503,
}


def hub_names(repo_id: str) -> list[str]:
    """The canonical names that a Hub id may mean, in order; raises NotFound for what cannot be an id."""
    found: list[str] = []
    with suppress(errors.Invalid):
        found.append(check_name(repo_id.lower()))
    with suppress(errors.Invalid):
        found.append(hub_name(repo_id))
    if not found or "--" in repo_id:
        raise errors.NotFound(f"{repo_id[:100]!r} is not a model id", expected="namespace/name", reason="repo")
    return found


def _git_sha1(raw: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(raw) + raw, usedforsecurity=False).hexdigest()


def _pointer(file: File) -> bytes:
    return f"version https://git-lfs.github.com/spec/v1\noid {file.digest}\nsize {file.size}\n".encode()


def _as_lfs(file: File) -> bool:
    """Whether a file is shown as LFS: also where its git id is unknown, so that clients can check its sha256."""
    return file.lfs or not file.git_oid


def _node(file: File) -> dict[str, object]:
    out: dict[str, object] = {"type": "file", "path": file.path, "size": file.size, "oid": file.git_oid}
    if _as_lfs(file):
        pointer = _pointer(file)
        out |= {"oid": _git_sha1(pointer), "lfs": {"oid": file.digest.split(":")[1], "size": file.size, "pointerSize": len(pointer)}}
    return out


def _tree(files: list[File], prefix: str, recursive: bool) -> list[dict[str, object]]:
    nodes: list[dict[str, object]] = []
    seen: set[str] = set()
    base = f"{prefix}/" if prefix else ""
    for file in files:
        if not file.path.startswith(base):
            continue
        parts = file.path[len(base) :].split("/")
        for depth in range(1, len(parts) if recursive else min(2, len(parts))):
            folder = base + "/".join(parts[:depth])
            if folder not in seen:
                seen.add(folder)
                oid = hashlib.sha1(folder.encode(), usedforsecurity=False).hexdigest()
                nodes.append({"type": "directory", "path": folder, "size": 0, "oid": oid})
        if recursive or len(parts) == 1:
            nodes.append(_node(file))
    return nodes


def _when(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")


class HubDoor:
    """Dispatches one Hub exchange; `public_url` is the base of the absolute links in listings."""

    def __init__(self, public_url: Callable[[Exchange], str]) -> None:
        self.public_url = public_url

    async def __call__(self, x: Exchange) -> None:
        """Answers in the Hub's shapes."""
        try:
            await self._serve(x)
        except Gone:
            await x.gone()
        except errors.AirlockError as error:
            if x.started:
                raise
            await self._refuse(x, error)

    async def _refuse(self, x: Exchange, error: errors.AirlockError) -> None:
        status = next((s for cls, s in _STATUS.items() if isinstance(error, cls)), 500)
        words = error.what + (f"; {error.do}" if error.do else "")
        headers = {"x-error-message": words}
        if status == 404:
            headers["x-error-code"] = _NAMED.get(error.reason, "RepoNotFound")
            if "commit" in error.ids:
                headers["x-repo-commit"] = error.ids["commit"]
        elif status == 403:
            headers["x-error-code"] = "GatedRepo"
        elif status == 401:  # the exact text keeps clients from turning it into "repository not found"; our words are in the body
            headers |= {"x-error-message": "Invalid credentials in Authorization header", "www-authenticate": "Bearer"}
        elif status == 405:
            headers["allow"] = error.ids.get("allow", "")
        elif status == 429:
            headers["retry-after"] = error.ids["retry_after"]
        elif status == 416 and "total" in error.ids:
            headers["content-range"] = f"bytes */{error.ids['total']}"
        await x.json(status, {"error": words, "reason": error.reason}, headers)

    async def _serve(self, x: Exchange) -> None:
        parts = x.raw_parts[1:]
        method = "GET" if x.method == "HEAD" else x.method
        if parts[0] != "api":
            await self._resolve(x, method, parts)
        elif parts[1:2] == ["agent-harnesses"]:
            await x.json(200, {"standardEnvVars": [], "harnesses": {}})
        elif parts[1:2] == ["telemetry"]:
            await x.answer(200, {})
        elif parts[1:] == ["whoami-v2"]:
            await self._whoami(x)
        elif parts[1:2] == ["models"] and len(parts) > 2:
            await self._model(x, method, parts[2:])
        else:
            raise errors.NotFound("this registry has no such route", expected="models", reason="repo")

    async def _model(self, x: Exchange, method: str, parts: list[str]) -> None:
        words = {"revision": 1, "tree": 1, "paths-info": 1, "refs": 0, "commits": 1, "auth-check": 0}
        at = next((i for i in range(1, len(parts)) if parts[i] in words), len(parts))
        repo_id, word, rest = "/".join(parts[:at]), parts[at] if at < len(parts) else "", parts[at + 1 :]
        if word and len(rest) < words[word]:
            raise errors.NotFound("the revision is missing", reason="revision")
        if (method == "POST") != (word == "paths-info") or method not in ("GET", "POST"):
            allow = "POST" if word == "paths-info" else "GET, HEAD"
            raise errors.Unsupported(f"{x.method} is not served here", expected=allow, allow=allow)
        if word in ("", "revision"):
            await self._info(x, repo_id, "/".join(rest) if word else x.param("revision", "main"))
        elif word == "tree":
            await self._list(x, repo_id, rest[0], "/".join(rest[1:]).strip("/"))
        elif word == "paths-info":
            await self._paths(x, repo_id, "/".join(rest))
        elif word == "refs":
            await self._refs(x, repo_id)
        elif word == "commits":
            revision, _name = await x.call(lambda call: self._find(x, call, repo_id, "/".join(rest)))
            title = f"revision {revision.commit[:12]}"
            entry = {"id": revision.commit, "title": title, "message": "", "date": _when(revision.at), "authors": []}
            await x.json(200, [entry], {"x-total-count": "1"})
        else:
            await x.call(lambda call: self._find(x, call, repo_id, "main"))
            await x.json(200, {})

    # ---- names

    def _each(self, repo_id: str, ask: Callable[[str], T]) -> T:
        """The answer for the first name that exists for this caller."""
        names = hub_names(repo_id)
        for name in names[:-1]:
            try:
                return ask(name)
            except errors.NotFound as error:
                if error.reason in ("revision", "entry"):
                    raise
        return ask(names[-1])

    def _find(self, x: Exchange, call: Call, repo_id: str, ref: str) -> tuple[Revision, str]:
        try:
            check_ref(ref)
        except errors.Invalid as error:
            raise errors.NotFound(f"no revision {ref[:100]!r}", reason="revision") from error
        return self._each(repo_id, lambda name: (x.guard.revision(call, name, ref), name))

    def _files(self, x: Exchange, call: Call, repo_id: str, ref: str) -> tuple[Revision, list[File]]:
        revision, name = self._find(x, call, repo_id, ref)
        items = all_items(lambda after: x.guard.files(call, name, revision.commit, "", after, _PAGE)[1], _FILES)
        return revision, [f for f in items if isinstance(f, File)]

    # ---- routes

    async def _whoami(self, x: Exchange) -> None:
        me = await x.call(x.guard.whoami)
        org = str(me.get("org", ""))
        token = {"type": "access_token", "accessToken": {"displayName": me["key_id"], "role": "read"}}
        user = {"type": "user", "id": me["key_id"], "name": org or me["key_id"], "fullname": org, "email": None, "isPro": False}
        await x.json(200, {**user, "orgs": [{"type": "org", "name": org}] if org else [], "auth": token})

    def _facts(self, x: Exchange, call: Call, name: str, digest: str) -> dict[str, Any]:
        """The revision's facts layer (docs/format.md section 3), empty where there is none."""
        manifest = parse_manifest(_bytes(x.guard.read(call, name, digest)))
        layer = next((d for d in manifest.layers if d.media_type == FACTS_TYPE and d.size <= _FACTS_BYTES), None)
        here = replace(call, redirect=False)  # read by the door itself
        return parse_json(_bytes(x.guard.read(here, name, layer.digest)), "the facts") if layer else {}

    async def _info(self, x: Exchange, repo_id: str, ref: str) -> None:
        blobs = x.param("blobs").lower() == "true"

        def work(call: Call) -> dict[str, object]:
            revision, files = self._files(x, call, repo_id, ref)
            facts = self._facts(x, call, revision.name, revision.digest)
            card = facts.get("card") if isinstance(facts.get("card"), dict) else {}
            tags = facts.get("tags") if isinstance(facts.get("tags"), list) else []
            shown = revision.display or repo_id
            at = _when(revision.at)
            out: dict[str, object] = {"_id": "0", "id": shown, "modelId": shown, "author": shown.split("/")[0], "sha": revision.commit}
            out |= {"private": revision.private, "gated": "manual" if revision.gated else False, "disabled": False}
            out |= {"lastModified": at, "createdAt": at, "tags": tags, "downloads": 0, "likes": 0, "cardData": card, "spaces": []}
            out |= {k: card[k] for k in ("pipeline_tag", "library_name") if isinstance(card, dict) and isinstance(card.get(k), str)}
            out["siblings"] = [_sibling(f, blobs) for f in files]
            out["usedStorage"] = sum(f.size for f in files)
            return out

        await x.json(200, await x.call(work))

    async def _list(self, x: Exchange, repo_id: str, ref: str, prefix: str) -> None:
        recursive = x.param("recursive").lower() in ("true", "1")
        limit, start = max(1, x.number("limit", _PAGE, _PAGE)), x.number("cursor", 0, 10**9)
        revision, files = await x.call(lambda call: self._files(x, call, repo_id, ref))
        nodes = _tree(files, prefix, recursive)
        if prefix and not nodes:
            raise errors.NotFound(f"no folder {prefix[:200]!r} in this revision", reason="entry", commit=revision.commit)
        headers = {"x-repo-commit": revision.commit}
        if start + limit < len(nodes):
            keep = [(k, v) for k, v in x.query if k not in ("cursor", "limit")]
            query = urlencode([*keep, ("limit", limit), ("cursor", start + limit)])
            headers["link"] = f'<{self.public_url(x)}{quote(x.path)}?{query}>; rel="next"'
        await x.json(200, nodes[start : start + limit], headers)

    async def _paths(self, x: Exchange, repo_id: str, ref: str) -> None:
        await x.call(lambda call: self._find(x, call, repo_id, ref))  # a body is read for nobody who may not see the revision
        raw = await x.read_body(4 * 1024 * 1024, "the list of paths")
        as_json = x.headers.get("content-type", "").startswith("application/json")

        def work(call: Call) -> tuple[str, list[dict[str, object]]]:
            wanted = _asked(raw, as_json)  # in the thread: megabytes of it would hold up the loop
            revision, files = self._files(x, call, repo_id, ref)
            return revision.commit, [n for n in _tree(files, "", True) if n["path"] in wanted]

        commit, nodes = await x.call(work)
        await x.json(200, nodes, {"x-repo-commit": commit})

    async def _refs(self, x: Exchange, repo_id: str) -> None:
        def work(call: Call) -> list[dict[str, str]]:
            head, name = self._find(x, call, repo_id, "main")
            out = []
            names = [str(r) for r in all_items(lambda after: x.guard.refs(call, name, after, _PAGE), _PAGE)]
            for ref in names if "main" in names else ["main", *names]:
                commit = head.commit if ref == "main" else x.guard.revision(call, name, ref).commit
                out.append({"name": ref, "commit": commit})
            return out

        found = await x.call(work)
        branches = [{"name": f["name"], "ref": "refs/heads/" + f["name"], "targetCommit": f["commit"]} for f in found if f["name"] == "main"]
        tags = [{"name": f["name"], "ref": "refs/tags/" + f["name"], "targetCommit": f["commit"]} for f in found if f["name"] != "main"]
        answer: dict[str, object] = {"branches": branches, "tags": tags, "converts": []}
        await x.json(200, answer | ({"pullRequests": []} if x.param("include_prs") else {}))

    async def _resolve(self, x: Exchange, method: str, parts: list[str]) -> None:
        at = next((i for i in range(1, len(parts) - 2) if parts[i] == "resolve"), 0)
        if not at or method != "GET":
            raise errors.NotFound("this registry has no such route", reason="repo")
        repo_id, ref, path = "/".join(parts[:at]), parts[at + 1], "/".join(parts[at + 2 :])

        def work(call: Call) -> tuple[Revision, File, str, Content | None]:
            revision, name = self._find(x, call, repo_id, ref)
            try:
                _same, file = x.guard.file(call, name, revision.commit, check_path(path))
            except (errors.NotFound, errors.Invalid) as error:
                raise errors.NotFound(f"no file {path[:200]!r} in this revision", reason="entry", commit=revision.commit) from error
            return revision, file, name, None if x.method == "HEAD" else x.guard.read(call, name, file.digest)

        revision, file, name, content = await x.call(work)
        etag = f'"{file.digest.split(":")[1] if _as_lfs(file) else file.git_oid}"'
        base = path.rsplit("/", 1)[-1].replace('"', "").replace("\\", "")
        headers = {"x-repo-commit": revision.commit, "etag": etag, "x-linked-etag": etag, "x-linked-size": str(file.size)}
        headers |= {"content-type": "application/octet-stream", "content-disposition": f'inline; filename="{base}";', "accept-ranges": "bytes"}
        if content is None:
            content = Content(file.digest, "", file.size, 0, file.size, data=b"")

        async def again(lo: int, hi: int) -> Content:
            return await x.call(lambda call: x.guard.read(call, name, file.digest, lo, hi))

        await x.content(content, headers, again)
        await x.served(name, file.digest)


def _asked(raw: bytes, as_json: bool) -> set[str]:
    """The paths that a client asks for, from JSON or from a form; raises Invalid."""
    if as_json:
        asked = parse_json(raw, "the list of paths").get("paths")
    else:
        try:
            asked = [v for k, v in parse_qsl(raw.decode("utf-8"), max_num_fields=_FILES + 10) if k == "paths"]
        except ValueError as error:
            raise errors.Invalid("the list of paths is not a form", expected="paths=a&paths=b") from error
    listed = asked if isinstance(asked, list) else [asked]
    if not all(isinstance(p, str) for p in listed):
        raise errors.Invalid("paths are not text", expected="a list of strings")
    return set(listed)


def _sibling(file: File, blobs: bool) -> dict[str, object]:
    node = _node(file)
    out: dict[str, object] = {"rfilename": file.path}
    if blobs:
        out |= {"size": file.size, "blobId": node["oid"]}
        if "lfs" in node:
            out["lfs"] = {"sha256": file.digest.split(":")[1], "size": file.size, "pointerSize": len(_pointer(file))}
    return out


def _bytes(content: Content) -> bytes:
    """A small object in memory; raises TooLarge."""
    if content.total > _FACTS_BYTES:
        raise errors.TooLarge("the document is too large", expected=f"at most {_FACTS_BYTES} bytes")
    if content.data is not None:
        return content.data
    if content.path is not None:
        return content.path.read_bytes()
    return b"".join(content.chunks or ())
