"""The Hugging Face Hub door: the routes that huggingface_hub, transformers and vLLM use; it words answers, the guard decides.

Order of names: the id as a canonical name, then `hf/<id>` escaped (docs/format.md section 2); below an organisation's endpoint its own names first.
Nothing here is ever compressed, and nothing tells of Xet. What changes something is in registry/hub_writing.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any
from urllib.parse import quote, urlencode

from artifact import errors
from artifact.grant import includes
from artifact.manifest import FACTS_TYPE, check_path, is_digest, parse_json, parse_manifest
from artifact.store import Call, Content, File, Page, Revision
from registry import hub, refusals
from registry.exchange import Exchange
from registry.hub_writing import HubWriter

_FILES, _PAGE, _FACTS_BYTES = 10_000, 1000, 4 * 1024 * 1024
# What follows a model's id, and how many parts each takes at least; `allow` is what a client may do there.
_WORDS = {
    "revision": (1, "GET, HEAD"),
    "tree": (1, "GET, HEAD"),
    "paths-info": (1, "POST"),
    "refs": (0, "GET, HEAD"),
    "commits": (1, "GET, HEAD"),
    "auth-check": (0, "GET, HEAD"),
    "preupload": (1, "POST"),
    "commit": (1, "POST"),
    "branch": (1, "POST, DELETE"),
    "tag": (1, "POST, DELETE"),
    "xet-read-token": (0, "GET"),
    "xet-write-token": (0, "GET"),
}
_UNSERVED = ("settings", "super-squash", "lfs-files", "discussions", "duplicate", "like", "user-access-request", "safetensors-metadata", "likers")


class HubDoor:
    """Dispatches one Hub exchange."""

    def __init__(self) -> None:
        self.writer = HubWriter()

    async def __call__(self, x: Exchange) -> None:
        """Answers in the Hub's shapes."""
        reading = x.method in ("GET", "HEAD") or "/paths-info/" in x.path
        await x.serve(self._serve(x), lambda error: self._refuse(x, error, reading))

    async def _refuse(self, x: Exchange, error: errors.AirlockError, reading: bool) -> None:
        status, headers = hub.refusal(error, reading)
        words = {"error": refusals.words(error), "reason": error.reason}
        await x.json(status, words | ({"url": error.ids["url"]} if "url" in error.ids else {}), headers)  # that of a repository that exists

    async def _serve(self, x: Exchange) -> None:
        at = hub.place(x.raw_parts[1:])
        parts = at.parts
        if parts[0] != "api":
            await self._content(x, at)
        elif parts[1:2] == ("agent-harnesses",):
            await x.json(200, {"standardEnvVars": [], "harnesses": {}})
        elif parts[1:2] == ("telemetry",):
            await x.answer(200, {})
        elif parts[1:] == ("whoami-v2",):
            await self._whoami(x)
        elif parts[1:] == ("validate-yaml",):
            await self.writer.validate(x)
        elif parts[1:2] == ("repos",):
            await self.writer.repos(x, at)
        elif parts[1:] == ("models",):
            await self._models(x, at)
        elif parts[1:2] == ("models",):
            await self._model(x, at)
        else:
            raise errors.NotFound("this registry has no such route", expected="models", reason="repo")

    async def _model(self, x: Exchange, at: hub.Place) -> None:
        parts = at.parts[2:]
        method = "GET" if x.method == "HEAD" else x.method
        # An id has two parts, else one, else more: a model may be called like a route.
        likely = (2, 1, *range(3, len(parts)))
        where = next((i for i in likely if i < len(parts) and (parts[i] in _WORDS or parts[i] in _UNSERVED)), len(parts))
        names = at.names("/".join(parts[:where]))
        word, rest = (parts[where] if where < len(parts) else ""), parts[where + 1 :]
        if word in _UNSERVED:
            await x.call(lambda call: x.guard.ping(call))
            raise errors.Unsupported(f"{word} is not served here", do="see docs/operations.md for what is", reason="not_served")
        least, allow = _WORDS.get(word, (0, "GET, HEAD"))
        if method not in allow:
            raise errors.Unsupported(f"{x.method} is not served here", expected=allow, allow=allow)
        if len(rest) < least or (word == "tree" and not rest[0]):
            raise errors.NotFound("the revision is missing", reason="revision")
        ref = "/".join(rest)
        if word in ("", "revision"):
            await self._info(x, at, names, ref if word else x.param("revision", "main"))
        elif word == "tree":
            await self._list(x, names, rest)
        elif word == "paths-info":
            await self._paths(x, names, ref)
        elif word == "refs":
            await self._refs(x, names)
        elif word == "commits":
            await self._commits(x, names, ref)
        elif word == "auth-check":
            await x.call(lambda call: self._find(x, call, names, "main"), ask=_ask(names, "main"))
            await x.json(200, {})
        elif word.startswith("xet-"):
            await self.writer.no_xet(x, at, names, word)
        else:
            await self.writer.model(x, at, names, word, ref)

    # ---- names

    def _find(self, x: Exchange, call: Call, names: Sequence[str], ref: str) -> Revision:
        return x.guard.revision(call, x.guard.revisions.first(call, names), hub.ref_of(ref))

    def _files(self, x: Exchange, call: Call, names: Sequence[str], ref: str) -> tuple[Revision, list[File]]:
        revision = self._find(x, call, names, ref)
        items = _all_items(lambda after: x.guard.files(call, revision.name, revision.commit, "", after, _PAGE)[1], _FILES)
        return revision, [f for f in items if isinstance(f, File)]

    # ---- routes

    async def _whoami(self, x: Exchange) -> None:
        def work(call: Call) -> tuple[dict[str, object], str]:
            writes = any(includes(grant.actions, "create") for grant in call.principal.grants)
            return x.guard.whoami(call), "write" if writes else "read"

        me, role = await x.call(work)
        org = str(me.get("org", ""))
        token = {"type": "access_token", "accessToken": {"displayName": me["key_id"], "role": role}}
        user = {"type": "user", "id": me["key_id"], "name": org or me["key_id"], "fullname": org, "email": None, "isPro": False}
        await x.json(200, {**user, "orgs": [{"type": "org", "name": org}] if org else [], "auth": token})

    async def _models(self, x: Exchange, at: hub.Place) -> None:
        """Models that this key sees, a page of names at a time: `search` is a part of the id, `author` its first segment."""
        search, author = x.param("search").casefold(), x.param("author").casefold()
        limit, after = max(1, x.number("limit", 100, _PAGE)), x.cursor("cursor")
        page = await x.call(lambda call: x.guard.catalog_list(call, after, limit))
        items = page["items"] if isinstance(page["items"], list) else []
        shown = [(str(i["display"]).removeprefix("hf/"), i) for i in items if i["kind"] == "model"]
        found = [(i, n) for i, n in shown if search in i.casefold() and author in ("", i.split("/")[0].casefold())]
        headers = {"link": f'<{self._next(x, x.raw_parts, limit, page["after"])}>; rel="next"'} if page["after"] else {}
        same = {"tags": [], "downloads": 0, "likes": 0}
        listed = [{"_id": "0", "id": i, "modelId": i, "private": n["visibility"] != "public", **same} for i, n in found]
        await x.json(200, listed, headers)

    def _facts(self, x: Exchange, call: Call, name: str, digest: str) -> dict[str, Any]:
        """The revision's facts layer (docs/format.md section 3), empty where there is none."""
        manifest = parse_manifest(_bytes(x.guard.read(call, name, digest)))
        layer = next((d for d in manifest.layers if d.media_type == FACTS_TYPE and d.size <= _FACTS_BYTES), None)
        here = replace(call, redirect=False)  # read by the door itself
        return parse_json(_bytes(x.guard.read(here, name, layer.digest)), "the facts") if layer else {}

    async def _info(self, x: Exchange, at: hub.Place, names: Sequence[str], ref: str) -> None:
        blobs = x.param("blobs").lower() == "true"

        def work(call: Call) -> dict[str, object]:
            revision, files = self._files(x, call, names, ref)
            facts = self._facts(x, call, revision.name, revision.digest)
            card = facts.get("card") if isinstance(facts.get("card"), dict) else {}
            tags = facts.get("tags") if isinstance(facts.get("tags"), list) else []
            shown = revision.display or revision.name
            when = hub.when(revision.at)
            out: dict[str, object] = {"_id": "0", "id": shown, "modelId": shown, "author": shown.split("/")[0], "sha": revision.commit}
            out |= {"private": revision.private, "gated": "manual" if revision.gated else False, "disabled": False}
            out |= {"lastModified": when, "createdAt": when, "tags": tags, "downloads": 0, "likes": 0, "cardData": card, "spaces": []}
            out |= {k: card[k] for k in ("pipeline_tag", "library_name") if isinstance(card, dict) and isinstance(card.get(k), str)}
            out["siblings"] = [hub.sibling(f, blobs) for f in files]
            out["usedStorage"] = sum(f.size for f in files)
            return out

        found = await x.call(work, ask=_ask(names, ref))
        await x.json(200, found, _warning(x))

    async def _list(self, x: Exchange, names: Sequence[str], rest: Sequence[str]) -> None:
        ref, prefix = rest[0], "/".join(rest[1:]).strip("/")
        recursive, expand = (x.param(word).lower() in ("true", "1") for word in ("recursive", "expand"))
        limit, start = max(1, x.number("limit", _PAGE, _PAGE)), x.number("cursor", 0, 10**9)
        revision, files = await x.call(lambda call: self._files(x, call, names, ref), ask=_ask(names, ref))
        nodes = hub.tree(files, prefix, recursive)
        if prefix and not nodes:
            raise errors.NotFound(f"no folder {prefix[:200]!r} in this revision", reason="entry", commit=revision.commit)
        headers = {"x-repo-commit": revision.commit}
        if start + limit < len(nodes):  # of the same commit, wherever the branch is by then
            here = [*x.raw_parts[: -len(rest)], revision.commit, *rest[1:]]
            headers["link"] = f'<{self._next(x, here, limit, start + limit)}>; rel="next"'
        page = nodes[start : start + limit]
        await x.json(200, hub.expanded(page, revision) if expand else page, headers)

    @staticmethod
    def _next(x: Exchange, parts: Sequence[str], limit: int, cursor: object) -> str:
        """The absolute URL of the next page, by its decoded path segments, on the base by which the client knows us."""
        keep = [(k, v) for k, v in x.query if k not in ("cursor", "limit")]
        return f"{x.base_url}{'/'.join(quote(part, safe='') for part in parts)}?{urlencode([*keep, ('limit', limit), ('cursor', str(cursor))])}"

    async def _paths(self, x: Exchange, names: Sequence[str], ref: str) -> None:
        await x.call(lambda call: self._find(x, call, names, ref), ask=_ask(names, ref))  # no body is read for who may not see the revision
        raw = await x.read_body(4 * 1024 * 1024, "the list of paths")
        as_json = x.headers.get("content-type", "").startswith("application/json")

        def work(call: Call) -> tuple[str, list[dict[str, object]]]:
            wanted = hub.asked(raw, as_json, _FILES + 10)  # in the thread: megabytes of it would hold up the loop
            revision, files = self._files(x, call, names, ref)
            return revision.commit, [n for n in hub.tree(files, "", True) if n["path"] in wanted]

        commit, nodes = await x.call(work, ask=_ask(names, ref))
        await x.json(200, nodes, {"x-repo-commit": commit})

    async def _refs(self, x: Exchange, names: Sequence[str]) -> None:
        def work(call: Call) -> list[tuple[str, str, str]]:
            name = x.guard.revisions.first(call, names)
            return x.guard.revisions.refs(call, name)

        found = await x.call(work)

        def shown(kind: str, folder: str) -> list[dict[str, str]]:
            listed = [(ref, commit) for ref, of, commit in found if (of == "branch") == (kind == "branch")]
            return [{"name": ref, "ref": f"refs/{folder}/{ref}", "targetCommit": commit} for ref, commit in listed]

        answer: dict[str, object] = {"branches": shown("branch", "heads"), "tags": shown("tag", "tags"), "converts": []}
        await x.json(200, answer | ({"pullRequests": []} if x.param("include_prs") else {}))

    async def _commits(self, x: Exchange, names: Sequence[str], ref: str) -> None:
        def work(call: Call) -> list[tuple[str, str, float]]:
            revision = self._find(x, call, names, ref)
            return x.guard.revisions.history(call, revision.name, revision, _PAGE)

        found = await x.call(work, ask=_ask(names, ref))
        listed = [{"id": c, "title": title, "message": "", "date": hub.when(at), "authors": []} for c, title, at in found]
        await x.json(200, listed, {"x-total-count": str(len(listed))})

    async def _content(self, x: Exchange, at: hub.Place) -> None:
        """What is not below /api: a file of a revision, or an LFS route of a repository."""
        parts = at.parts
        lfs = next((i for i in range(len(parts) - 3) if parts[i].endswith(".git") and parts[i + 1 : i + 3] == ("info", "lfs")), None)
        if lfs is not None:
            await self.writer.lfs(x, at, (*parts[:lfs], parts[lfs].removesuffix(".git")), parts[lfs + 3 :])
            return
        where = next((i for i in range(1, len(parts) - 2) if parts[i] == "resolve"), 0)
        if not where or x.method not in ("GET", "HEAD"):
            raise errors.NotFound("this registry has no such route", reason="repo")
        await self._resolve(x, hub.names_of(parts[:where]), parts[where + 1], "/".join(parts[where + 2 :]))

    async def _resolve(self, x: Exchange, names: Sequence[str], ref: str, path: str) -> None:
        ref = hub.ref_of(ref)
        ask = _ask(names, ref, path)

        def work(call: Call) -> tuple[Revision, File, Content | None]:
            name = x.guard.revisions.first(call, names)
            try:
                revision, file = x.guard.file(call, name, ref, check_path(path))
            except (errors.NotFound, errors.Invalid) as error:
                if error.reason not in ("entry", "path"):
                    raise
                revision = x.guard.revision(call, name, ref)  # of the same row where it was found with the key
                raise errors.NotFound(f"no file {path[:200]!r} in this revision", reason="entry", commit=revision.commit) from error
            return revision, file, None if x.method == "HEAD" else x.guard.read(call, name, file.digest)

        revision, file, content = await x.call(work, ask=ask)
        etag = f'"{hub.etag(file)}"'
        base = path.rsplit("/", 1)[-1].replace('"', "").replace("\\", "")
        headers = _warning(x) | {"x-repo-commit": revision.commit, "etag": etag, "x-linked-etag": etag, "x-linked-size": str(file.size)}
        headers |= {"content-type": "application/octet-stream", "content-disposition": f'inline; filename="{base}";', "accept-ranges": "bytes"}
        if content is None:
            await x.answer(200, headers | {"content-length": str(file.size)})
            return

        async def again(lo: int, hi: int) -> Content:
            return await x.call(lambda call: x.guard.read(call, revision.name, file.digest, lo, hi))

        await x.content(content, headers, again)
        await x.served(revision.name, file.digest)


def _ask(names: Sequence[str], ref: str, path: str = "") -> tuple[str, ...]:
    """What a request is about, found with its key by one statement; nothing where the revision is a digest."""
    try:
        ref = hub.ref_of(ref)
    except errors.NotFound:
        return ()
    padded = (*names, *(names[-1],) * hub.MAX_NAMES)[: hub.MAX_NAMES]
    return () if is_digest(ref) else ("hub", ref, path, *padded)


def _warning(x: Exchange) -> dict[str, str]:
    """What ends soon, in the header that hub clients show their users."""
    return {"x-hf-warning": f"access; {'; '.join(sorted(x.warnings))}"} if x.warnings else {}


def _bytes(content: Content) -> bytes:
    """A small object in memory; raises TooLarge."""
    if content.total > _FACTS_BYTES:
        raise errors.TooLarge("the document is too large", expected=f"at most {_FACTS_BYTES} bytes")
    if content.data is not None:
        return content.data
    if content.path is not None:
        return content.path.read_bytes()
    return b"".join(content.chunks or ())


def _all_items(page_of: Callable[[str], Page], most: int) -> list[Any]:
    """The items of all pages up to a bound."""
    items: list[Any] = []
    after = ""
    while len(items) < most:
        page = page_of(after)
        items += page.items
        after = page.after
        if not after:
            break
    return items[:most]
