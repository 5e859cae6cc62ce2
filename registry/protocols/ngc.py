"""The NGC API on a listener of its own: the read routes that ngcsdk, NIM containers and the like use; it words answers, the guard decides.

Its paths share `/v2/` with OCI, which is why it needs a listener. The URLs of a listing carry a ticket, since clients send no key to them
(docs/format.md section 8). Nothing here is ever compressed, and no header but Authorization says who calls.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TypeVar
from urllib.parse import parse_qsl

from artifact import errors
from artifact.manifest import check_path
from artifact.store import Call, Content, File
from registry import ngc_shapes as s
from registry import refusals
from registry.exchange import Exchange
from registry.ngc_views import Version

T = TypeVar("T")
PAGE, MOST_PAGE = 100, 1000
MAX_FORM = 64 * 1024
SUMS = "checksums.blake3"
SUMS_WAIT_S = 20.0  # for checksums that are being computed; then the client is asked to come again
TIER = frozenset({"tier_missing", "product_missing", "entitlement_absent", "entitlement_expired"})  # what a subscription would give: 402
LAW = {"license_unaccepted": 412, "legal_block": 451}  # both told as FORBIDDEN: NGC's words for a status have none of their own
BADGE = ("badge",)
TICKET = ("ticket",)
_TABLE: dict[type[errors.AirlockError], tuple[int, str]] = {
    errors.Unauthenticated: (401, "UNAUTHORIZED"),
    errors.Denied: (403, "FORBIDDEN"),
    errors.NotFound: (404, "NOT_FOUND"),
    errors.Unsupported: (405, "METHOD_NOT_ALLOWED"),
    errors.Conflict: (409, "CONFLICT"),
    errors.TooLarge: (413, "INVALID_REQUEST"),
    errors.RangeInvalid: (416, "INVALID_REQUEST"),
    errors.Throttled: (429, "TOO_MANY_REQUESTS"),
    errors.Unavailable: (503, "SERVICE_UNAVAILABLE"),
    errors.Invalid: (400, "INVALID_REQUEST"),
}


class NgcDoor:
    """Dispatches one exchange of the NGC listener; `instance` is told as the server's id."""

    def __init__(self, instance: str) -> None:
        self.instance = instance

    async def __call__(self, x: Exchange) -> None:
        """Answers in NGC's shapes."""
        await x.serve(self._serve(x), lambda error: self._refuse(x, error))

    def _status(self, x: Exchange, code: str = "SUCCESS", words: str = "") -> s.Json:
        out: s.Json = {"statusCode": code, "requestId": x.note["request_id"], "serverId": self.instance}
        return out | ({"statusDescription": words} if words else {})

    async def _refuse(self, x: Exchange, error: errors.AirlockError) -> None:
        status, code = refusals.form(_TABLE, error, (500, "INTERNAL_ERROR"))
        if status == 403 and error.reason in TIER:
            status, code = 402, "PAYMENT_REQUIRED"
        elif error.reason in LAW:
            status = LAW[error.reason]
        headers = {"cache-control": "no-store"} | refusals.headers(status, error)
        if status == 401:
            headers["www-authenticate"] = "Bearer"
        elif status == 405:
            headers["allow"] = error.expected
        await x.json(status, {"requestStatus": self._status(x, code, refusals.words(error))}, headers)

    async def _say(self, x: Exchange, value: s.Json) -> None:
        """An answer that succeeded, with what ends soon in the header that NGC's clients print."""
        await x.json(200, value | {"requestStatus": self._status(x)}, _warned(x))

    # ---- routes

    async def _serve(self, x: Exchange) -> None:
        parts = x.raw_parts
        while parts and not parts[0]:  # a client whose base ends in a slash asks for //v2/…
            parts = parts[1:]
        word = parts[0] if parts else ""
        if parts == ["v3", "keys", "get-caller-info"]:
            await self._caller(x)
            return
        if x.method not in ("GET", "HEAD"):
            raise errors.Unsupported(f"{x.method} is not served here", expected="GET, HEAD")
        if parts == ["token"]:
            token, life = await x.call(x.guard.ngc.token)
            await x.json(200, {"token": token, "access_token": token, "expires_in": life}, {"cache-control": "no-store"})
        elif word == "dl" and len(parts) == 2:
            await self._download(x, parts[1])
        elif parts == ["roles"]:
            services = [{"service": "MODEL"}, {"service": "CONTAINER"}]
            await x.call(x.guard.whoami)
            await self._say(x, {"roles": [{"name": s.READ_ROLE, "allowedActions": services}]})
        elif word == "v2" and len(parts) > 1:
            await self._v2(x, parts[1], parts[2:])
        else:
            await self._overridden(x)

    async def _v2(self, x: Exchange, word: str, rest: list[str]) -> None:
        if word in ("orgs", "users", "products"):
            await self._own(x, [word, *rest])
        elif word == "catalog" and len(rest) == 2 and rest[1] == "public-key":
            await self._public_key(x, rest[0])
        elif word == "search":
            await self._search(x, rest)
        elif word == "org" and len(rest) > 1:
            await self._org(x, rest)
        elif word == "models" and rest:
            if rest[0] == "org" and rest[-1] == "files":  # where a guest's client asks for the URLs
                await self._urls(x, _target([p for i, p in enumerate(rest[1:-2]) if not (i == 1 and p == "team" and len(rest) == 7)]), rest[-2])
            else:
                at = rest.index("versions") if "versions" in rest else len(rest)
                await self._model(x, rest[:at], rest[at:])
        elif word == "repos" and rest:
            at = next((i for i, p in enumerate(rest) if p in ("images", "tags") and i > 1), len(rest))
            await self._image(x, rest[:at], rest[at:])
        else:
            raise _no_route()

    async def _org(self, x: Exchange, rest: list[str]) -> None:
        """What is below one organisation, and maybe one of its teams."""
        if rest[1:] == ["teams"]:
            teams = await x.call(lambda call: x.guard.ngc.teams(call, rest[0]), ask=BADGE)
            await self._page(x, "teams", [*enumerate(teams, 1)], lambda team: {"id": team[0], "name": team[1]})
            return
        owner, below = (rest[:1], rest[1:]) if rest[1] != "team" else ([rest[0], rest[2] if len(rest) > 2 else ""], rest[3:])
        if below[:1] == ["models"] and len(below) > 1:
            await self._model(x, [*owner, below[1]], below[2:])
        elif below[:1] == ["repos"] and len(below) > 1:
            await self._image(x, [*owner, below[1]], below[2:])
        else:
            raise _no_route()

    async def _page(self, x: Exchange, name: str, items: Sequence[T], form: Callable[[T], s.Json], **more: object) -> None:
        here, pages = s.page_of(items, x.number("page-number", 0, 10**9), x.number("page-size", PAGE, MOST_PAGE))
        await self._say(x, {name: [form(item) for item in here], "paginationInfo": pages, **more})

    # ---- the caller itself

    async def _caller(self, x: Exchange) -> None:
        if x.method != "POST":
            raise errors.Unsupported(f"{x.method} is not served here", expected="POST")
        try:
            form = parse_qsl((await x.read_body(MAX_FORM, "the form")).decode("ascii"), max_num_fields=20)
        except ValueError as error:  # UnicodeDecodeError among them
            raise errors.Invalid("the body is no form", expected="credentials=KEY", reason="body") from error
        given = next((v for k, v in form if k == "credentials"), None)
        await self._say(x, await x.call(x.guard.ngc.caller, x.key() or "" if given is None else given, BADGE))

    async def _own(self, x: Exchange, parts: list[str]) -> None:
        if parts == ["orgs"]:
            me = await x.call(x.guard.whoami)
            await self._page(x, "organizations", [me["org"]], lambda org: {"id": 1, "name": org, "displayName": org, "type": "ENTERPRISE"})
        elif parts == ["users", "me"]:
            await self._say(x, await x.call(x.guard.ngc.user, ask=BADGE))
        elif parts == ["products"]:
            products = await x.call(x.guard.ngc.products)
            await self._say(x, {"products": [{"name": product} for product in products]})
        else:
            raise _no_route()

    # ---- models

    async def _model(self, x: Exchange, target: list[str], rest: list[str]) -> None:
        names = s.model_names(_target(target))
        if not rest:
            shown, versions = await x.call(lambda call: x.guard.ngc.model(call, names))
            await self._say(x, {"model": s.model(shown, versions), "modelVersions": []})
        elif rest == ["versions"]:
            shown, versions = await x.call(lambda call: x.guard.ngc.model(call, names))
            await self._page(x, "modelVersions", versions, s.version, model=s.model(shown, versions))
        elif len(rest) == 2 and rest[0] != "versions" and rest[1] == "files":
            await self._urls(x, target, rest[0])
        elif rest[0] == "versions":
            await self._version(x, names, rest[1], rest[2:])
        else:
            raise _no_route()

    async def _version(self, x: Exchange, names: list[str], ref: str, rest: list[str]) -> None:
        views = x.guard.ngc
        if not rest:

            def look(call: Call) -> s.Json:
                found = views.version(call, names, ref)
                facts = found.facts(views.files(found), views.signature(found) is not None)
                return {"model": s.model(found.shown, [facts]), "modelVersion": s.version(facts)}

            await self._say(x, await x.call(look))
        elif rest == ["files"]:

            def listing(call: Call) -> tuple[float, list[File]]:
                found = views.version(call, names, ref)
                return found.revision.at, views.files(found)

            at, files = await x.call(listing)
            await self._page(x, "modelFiles", files, lambda file: s.model_file(file, at))
        elif rest == ["signature"]:
            await self._signature(x, names, ref)
        elif rest == ["files", SUMS]:
            await self._sums(x, names, ref)
        elif rest[0] == "files":
            await self._file(x, names, ref, check_path("/".join(rest[1:])))
        else:
            raise _no_route()

    async def _urls(self, x: Exchange, target: list[str], ref: str) -> None:
        """The URLs of a version's files, all in one page: clients count pages in three ways, and one page fits them all."""
        names, only = s.model_names(_target(target)), x.param("path")

        def work(call: Call) -> tuple[list[File], list[str]]:
            if only:
                found, file = x.guard.ngc.file(call, names, ref, check_path(only))
                files = [file]
            else:
                found = x.guard.ngc.version(call, names, ref)
                files = x.guard.ngc.files(found)
            return files, x.guard.ngc.tickets(call, found.repo.name, [f.digest for f in files])

        files, tickets = await x.call(work)
        pages = {"index": 0, "size": len(files), "totalPages": 1, "totalResults": len(files)}
        urls = [f"{x.base_url}/dl/{ticket}" for ticket in tickets]
        await self._say(x, {"urls": urls, "filepath": [f.path for f in files], "paginationInfo": pages})

    async def _file(self, x: Exchange, names: list[str], ref: str, path: str) -> None:
        def work(call: Call) -> tuple[Version, File, Content]:
            found, file = x.guard.ngc.file(call, names, ref, path)
            return found, file, x.guard.read(call, found.repo.name, file.digest)

        found, file, content = await x.call(work)
        await self._send(x, found.repo.name, file.digest, content, lambda read: x.call(read))

    async def _overridden(self, x: Exchange) -> None:
        """A file by the spellings of NIM_REPOSITORY_OVERRIDE: the last of those that its path may mean tells what is not there."""
        raw, query = x.scope.get("raw_path", b"").split(b"?")[0].decode("latin-1"), x.scope.get("query_string", b"").decode("latin-1")
        meant = s.override(raw, query)
        if not meant:
            raise _no_route()
        for target, ref, path in meant[:-1]:
            with suppress(errors.NotFound, errors.Invalid):
                await self._file(x, s.model_names(_target(target)), ref, check_path(path))
                return
        target, ref, path = meant[-1]
        await self._file(x, s.model_names(_target(target)), ref, check_path(path))

    async def _sums(self, x: Exchange, names: list[str], ref: str) -> None:
        """`checksums.blake3` of a version that came without such a file: one line for each file."""
        with suppress(errors.NotFound):  # the second ask tells what is not there at all
            await self._file(x, names, ref, SUMS)
            return
        end, wait_s = time.monotonic() + SUMS_WAIT_S, 0.05
        while True:
            sums, missing = await x.call(lambda call: x.guard.ngc.checksums(call, names, ref))
            if not missing:
                break
            if time.monotonic() > end:
                raise errors.Unavailable(f"the checksums of {missing} files are being computed", do="ask again", retry_after=30)
            await asyncio.sleep(wait_s)
            wait_s = min(2.0, wait_s * 2)
        text = "".join(f"{value}  {file.path}\n" for file, value in sums)
        await x.answer(200, {"content-type": "text/plain; charset=utf-8", **_warned(x)}, text.encode())

    async def _signature(self, x: Exchange, names: list[str], ref: str) -> None:
        def work(call: Call) -> str:
            found = x.guard.ngc.version(call, names, ref)
            bundle = x.guard.ngc.signature(found)
            if bundle is None:
                raise errors.NotFound(f"{found.shown.id}:{ref} has no signature", reason="signature")
            return x.guard.ngc.tickets(call, found.repo.name, [bundle.digest])[0]

        await self._say(x, {"url": f"{x.base_url}/dl/{await x.call(work)}"})

    async def _public_key(self, x: Exchange, kind: str) -> None:
        if kind not in ("models", "resources", "containers"):
            raise _no_route()
        await x.answer(200, {"content-type": "text/plain; charset=utf-8"}, await x.sql(lambda: x.guard.ngc.public_key(kind)))

    # ---- bytes

    async def _download(self, x: Exchange, text: str) -> None:
        """What a ticket is for, by its key as it is now."""

        def work(call: Call) -> tuple[str, str, Content]:
            ticket = x.guard.ngc.opened(call, text)
            return ticket.name, ticket.digest, x.guard.read(call, ticket.name, ticket.digest)

        name, digest, content = await x.call(work, text, TICKET)
        await self._send(x, name, digest, content, lambda read: x.call(read, text, TICKET))

    async def _send(self, x: Exchange, name: str, digest: str, content: Content, call: Callable[..., object]) -> None:
        async def again(lo: int, hi: int) -> Content:
            part: Content = await call(lambda who: x.guard.read(who, name, digest, lo, hi))  # type: ignore[misc]
            return part

        headers = {"content-type": "application/octet-stream", "etag": f'"{digest.partition(":")[2]}"', **_warned(x)}
        await x.content(content, headers, again)
        await x.served(name, digest)

    # ---- images and search

    async def _image(self, x: Exchange, target: list[str], rest: list[str]) -> None:
        names, views = s.image_names(_target(target)), x.guard.ngc
        repo_tags = await x.call(lambda call: views.image(call, names))
        shown, tags = repo_tags[1], repo_tags[2]
        if not rest:
            last = max(tags, key=lambda tag: float(str(tag["at"])))
            told = (await x.sql(lambda: views.tags([last])))[0]
            times = sorted(float(str(tag["at"])) for tag in tags)
            dates = {"createdDate": s.when(times[0]), "updatedDate": s.when(times[-1])}
            await self._say(x, shown.named() | dates | {"latestTag": last["ref"], "latestImageSize": told["size"], "labels": []})
        elif rest == ["images"]:
            here, pages = s.page_of(tags, x.number("page-number", 0, 10**9), x.number("page-size", PAGE, PAGE))
            await self._say(x, {"images": await x.sql(lambda: views.tags(here)), "paginationInfo": pages})
        elif len(rest) == 2:
            tag = next((tag for tag in tags if tag["ref"] == rest[1]), None)
            if tag is None:
                raise errors.NotFound(f"{shown.id} has no tag {rest[1][:100]!r}", do="list its tags", reason="revision")
            told = (await x.sql(lambda: views.tags([tag])))[0]
            variants = told["architectureVariants"]
            one = variants[0] if isinstance(variants, list) and variants else {}
            layers = {"architecture": one.get("architecture", ""), "fsLayers": [], "schemaVersion": 2}
            await self._say(x, told | ({"name": shown.name} | layers if rest[0] == "images" else {}))
        else:
            raise _no_route()

    async def _search(self, x: Exchange, rest: list[str]) -> None:
        place, org, team = "", "", ""
        if rest[:1] == ["catalog"]:
            place, rest = "catalog", rest[1:]
        elif rest[:2] == ["subscriber", "catalog"]:
            place, rest = "subscriber", rest[2:]
        elif rest[:1] == ["org"] and len(rest) > 1:
            place, org, rest = "org", rest[1], rest[2:]
            if rest[:1] == ["team"] and len(rest) > 1:
                team, rest = rest[1], rest[2:]
        if len(rest) != 2 or rest[0] != "resources":
            raise _no_route()
        kind, asked = rest[1], s.query(x.param("q"))
        items: list[s.Json] = []
        if kind in ("MODEL", "CONTAINER"):
            items = await x.call(lambda call: x.guard.ngc.search(call, place, org, team, kind, asked))
        await self._say(x, s.search_page(kind, items, asked))


def _target(parts: list[str]) -> list[str]:
    """Organisation, maybe team, and name, as the client wrote them; raises NotFound."""
    if not 2 <= len(parts) <= 3:
        raise errors.NotFound(f"{'/'.join(parts)[:100]!r} is no name of an artefact", expected="org/name or org/team/name", reason="name")
    return parts


def _warned(x: Exchange) -> dict[str, str]:
    """What ends soon, in the header whose text NGC's clients print."""
    return {"nv-ngc-response-warning-message": "; ".join(map(s.warning, sorted(x.warnings)[:5]))} if x.warnings else {}


def _no_route() -> errors.NotFound:
    return errors.NotFound("this registry does not serve that route of the NGC API", do="see docs/operations.md, NGC clients", reason="route")
