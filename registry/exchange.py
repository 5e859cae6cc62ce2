"""One HTTP request as the doors see it: key, query, bounded body, answers by content kind; no route, no error shape of a protocol, no store.

Here because every door must read bodies and send files the same way; the doors may import it, it imports none of them.
"""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import json
import os
import re
import threading
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, MutableMapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from functools import partial
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar, cast
from urllib.parse import parse_qsl, unquote

from artifact.errors import AirlockError, Invalid, RangeInvalid, TooLarge, Unavailable
from artifact.store import Call, Content, Poured
from registry.heads import heads
from registry.intake import take

if TYPE_CHECKING:
    from registry.guard import Guard
    from registry.sigv4 import Signed

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
T = TypeVar("T")

SENDFILE = "airlock.sendfile"
BODY = "airlock.body"
POURING = "airlock.pouring"  # set in the scope while a request receives an upload: the server may end it then, and nothing is lost
LENT = "airlock.lent"  # in the scope, how much of the body was read past receive()
BATCH = 256 * 1024
STALL_S = 60.0
SMALL_BODY_S = 60.0  # for all of a body that is held in memory: a byte a minute must not keep it there
NICE = 5
DISCARD = 8 * 1024 * 1024
_HOST = re.compile(r"(?:[A-Za-z0-9._-]{1,255}|\[[0-9A-Fa-f:.]{2,45}\])(?::\d{1,5})?\Z")
_RANGE = re.compile(r"bytes=(\d{0,19})-(\d{0,19})\Z")


class Gone(Exception):
    """The client went away or stalled; nobody is left to answer."""


def _yield() -> None:
    """Lets the event loop and the lookups go first where processors are short: hashing can wait for some milliseconds, people cannot."""
    with suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)


class Pools:
    """Threads for statements and threads for bytes, apart, so that slow disks never block a lookup."""

    def __init__(self, sql: int = 16, io: int = 8) -> None:
        self.sql = ThreadPoolExecutor(sql, thread_name_prefix="sql")
        self.io = ThreadPoolExecutor(io, thread_name_prefix="io", initializer=_yield)


class Exchange:
    """One request and its answer."""

    def __init__(self, guard: Guard, pools: Pools, scope: Scope, receive: Receive, send: Send, public_url: str = "", x_accel: str = "") -> None:
        self.guard, self.pools, self.scope, self._receive, self._send = guard, pools, scope, receive, send
        self._public_url, self._x_accel = public_url, x_accel
        self.method: str = scope["method"]
        self.path: str = scope["path"]
        self.raw_parts = [unquote(p) for p in scope.get("raw_path", b"").split(b"?")[0].decode("latin-1").split("/")]
        self.headers: dict[str, str] = {}
        for name, value in scope["headers"]:
            self.headers.setdefault(name.decode("latin-1").lower(), value.decode("latin-1"))
        self.note: dict[str, Any] = scope.setdefault("airlock", {"request_id": uuid.uuid4().hex})
        self.body_done = "content-length" not in self.headers and "transfer-encoding" not in self.headers
        self.body_done = self.body_done or self.headers.get("content-length") == "0"
        self.started = False
        self._caller: Call | None = None
        self.warnings: set[str] = set()
        self._sent = 0

    @property
    def query(self) -> list[tuple[str, str]]:
        """The decoded query; raises Invalid."""
        try:
            return parse_qsl(self.scope.get("query_string", b"").decode("latin-1"), keep_blank_values=True, max_num_fields=200, encoding="utf-8")
        except ValueError as error:
            raise Invalid("the query string is not acceptable", expected="at most 200 fields") from error

    def param(self, name: str, default: str = "") -> str:
        """The first query parameter of that name."""
        return next((v for k, v in self.query if k == name), default)

    def number(self, name: str, default: int, most: int) -> int:
        """A whole number from 0 from the query, cut at `most`; raises Invalid."""
        text = self.param(name)
        if not text:
            return default
        if not text.isascii() or not text.isdigit() or len(text) > 18:
            raise Invalid(f"{name} is not a whole number from 0", expected="for example 100", reason="number")
        return min(int(text), most)

    def cursor(self, name: str) -> str:
        """A listing's start behind which to go on; raises Invalid for control characters."""
        text = self.param(name)
        if len(text) > 1024 or any(ord(c) < 32 or ord(c) == 127 or c == "\ufffd" for c in text):
            raise Invalid(f"{name} is not a name", expected="at most 1024 characters without control characters", reason="cursor")
        return text

    @property
    def base_url(self) -> str:
        """The URL by which this client knows us, without a last slash: the configured one, else scheme and host of its own request."""
        if self._public_url:
            return self._public_url.rstrip("/")
        host, server = self.headers.get("host", ""), self.scope.get("server") or ("localhost", None)
        own = f"[{server[0]}]" if ":" in server[0] else server[0]
        return f"{self.scope.get('scheme', 'http')}://{host if _HOST.match(host) else f'{own}:{server[1]}' if server[1] else own}"

    def key(self) -> str | None:
        """The presented key or token: Bearer, or the password of Basic whatever the user; empty for one that cannot be read, None without any."""
        if "authorization" not in self.headers:
            return None
        kind, _, rest = self.headers["authorization"].strip().partition(" ")
        rest = rest.strip()
        if kind.lower() == "bearer" and rest:
            return rest
        if kind.lower() == "basic":
            with suppress(ValueError):  # what is no base64, or no text in it
                _, colon, password = base64.b64decode(rest, validate=True).decode("utf-8").partition(":")
                return password if colon else ""
        return ""

    @property
    def address(self) -> str:
        """The client's address as the server sees it."""
        return str((self.scope.get("client") or ("",))[0])

    async def call(self, verb: Callable[[Call], T], key: str | Signed | None = None, ask: tuple[str, ...] = ()) -> T:
        """Identifies the caller and runs one guarded piece of work, both in one hop to a thread.

        `key` is the credential where the request carries it elsewhere; `ask` what the work is about, found with the key (registry/lookup.py).
        """

        def work() -> T:
            call = self.guard.caller(self.key() if key is None else key, self.note["request_id"], time.time(), self.address, ask)
            self.note["key_id"] = call.principal.key_id
            if call.redirect and "authorization" in self.headers and self.guard.beside_store(self.headers.get("host", "")):
                call = dataclasses.replace(call, redirect=False)
            self._caller = call
            found = verb(call)
            self.warnings |= call.warnings
            return found

        return await self._run(self.pools.sql, work)

    async def sql(self, work: Callable[[], T]) -> T:
        """Runs work for nobody in particular in the statement threads."""
        return await self._run(self.pools.sql, work)

    async def io(self, work: Callable[[], T]) -> T:
        """Runs work on bytes in the byte threads."""
        return await self._run(self.pools.io, work)

    async def _run(self, pool: ThreadPoolExecutor, work: Callable[[], T]) -> T:
        """Runs work in a thread; what made it fail is noted for figures and the access line, in words of ours."""
        try:
            return await asyncio.get_running_loop().run_in_executor(pool, work)
        except AirlockError as error:
            self.note |= {"error": error.code, "reason": error.reason}
            if isinstance(error, Unavailable):
                driver = type(error.__cause__).__module__.split(".")[0]
                self.note["fault"] = "database" if driver in ("sqlite3", "psycopg", "sqlalchemy") else "store"
            raise

    async def pieces(self) -> AsyncIterator[list[bytes]]:
        """The request body as it comes; raises Gone when the client leaves or sends nothing for a stall time."""
        extension = self.scope.get("extensions", {}).get(BODY)
        if extension is not None:
            extension["pieces"] = True
        while not self.body_done:
            try:
                async with asyncio.timeout(STALL_S):
                    message = await self._receive()
            except TimeoutError as error:
                raise Gone("the client sent nothing") from error
            if message["type"] != "http.request":
                raise Gone("the client left")
            self.body_done = not message.get("more_body", False)
            found = message.get("pieces") or ([message["body"]] if message.get("body") else [])
            if found:
                yield found

    async def read_body(self, limit: int, what: str) -> bytes:
        """A small body whole; raises TooLarge while reading, and Gone where it takes too long."""
        if self.headers.get("content-length", "").isdigit() and int(self.headers["content-length"]) > limit:
            raise TooLarge(f"{what} has {self.headers['content-length']} bytes", expected=f"at most {limit}")
        held: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(SMALL_BODY_S):
                async for found in self.pieces():
                    held += found
                    size += sum(map(len, found))
                    if size > limit:
                        raise TooLarge(f"{what} is too large", expected=f"at most {limit} bytes")
        except TimeoutError as error:
            raise Gone("the client took too long") from error
        return b"".join(held)

    async def pour(self, upload: Poured, most: int | None = None) -> None:
        """Streams the body into an upload, hashing and writing in a thread, one batch in flight; suspends it when anything goes wrong."""
        self.scope[POURING] = True
        length = self.headers.get("content-length", "")
        try:
            if length.isascii() and length.isdigit():
                await self.io(lambda: upload.expect(int(length)))
            await self._pour(upload, most)
        except BaseException:  # a cancelled request too keeps the bytes that came
            self.scope[POURING] = False
            with suppress(AirlockError):
                await self.io(upload.suspend)
            raise
        finally:
            self.scope[POURING] = False

    async def _pour(self, upload: Poured, most: int | None) -> None:
        with self.scope.get("extensions", {}).get(BODY, {}).get("lend", nullcontext)() as loan:
            if loan is None:
                await self._pour_pieces(upload, most)
                return
            total = loan.left + sum(map(len, loan.pieces))
            if most is not None and total > most:
                raise RangeInvalid("the body is longer than its Content-Range", expected=f"{most} bytes")
            try:
                whole = await take(loan, upload.write, self._settled, STALL_S)
            finally:
                self.scope[LENT], self.body_done = total - loan.left, loan.left == 0
            if not whole:
                raise Gone("the client left or sent nothing")
            if most is not None and total != most:
                raise Invalid("the body is shorter than its Content-Range", expected=f"{most} bytes", reason="size")

    async def _settled(self, work: Callable[[], T]) -> T:
        """Runs work on bytes and waits for its end even when cancelled, so that nobody touches the upload meanwhile."""
        running = asyncio.ensure_future(self.io(work))
        try:
            return await asyncio.shield(running)
        finally:
            if not running.done():
                await asyncio.wait({running})

    async def _pour_pieces(self, upload: Poured, most: int | None) -> None:
        flying: asyncio.Future[None] | None = None
        batch: list[bytes] = []
        size = total = 0
        try:
            async for found in self.pieces():
                batch += found
                got = sum(map(len, found))
                size, total = size + got, total + got
                if most is not None and total > most:
                    raise RangeInvalid("the body is longer than its Content-Range", expected=f"{most} bytes")
                if size >= BATCH:
                    if flying is not None:
                        await asyncio.shield(flying)
                    flying, batch, size = asyncio.ensure_future(self.io(_writes(upload, batch))), [], 0
        except Gone:
            if flying is not None:
                await flying
            await self._settled(_writes(upload, batch))  # what did arrive need not be sent again
            raise
        finally:
            if flying is not None:
                await asyncio.wait({flying})
        if flying is not None:
            flying.result()
        if batch:
            await self._settled(_writes(upload, batch))
        if most is not None and total != most:
            raise Invalid("the body is shorter than its Content-Range", expected=f"{most} bytes", reason="size")

    async def answer(self, status: int, headers: Mapping[str, str], body: bytes = b"") -> None:
        """A small answer; the rest of an unread request is read away, within a bound, so that the client sees the answer."""
        close = not self.body_done and not await self._discard()
        out = heads(status, headers, self.warnings)
        if status not in (204, 304) and not any(k == b"content-length" for k, _ in out):
            out.append((b"content-length", str(len(body)).encode()))
        if close or status == 413:
            out.append((b"connection", b"close"))
        self.started = True
        await self._send({"type": "http.response.start", "status": status, "headers": out})
        await self._send({"type": "http.response.body", "body": b"" if self.method == "HEAD" else body, "more_body": False})

    async def json(self, status: int, value: object, headers: Mapping[str, str] | None = None, media_type: str = "application/json") -> None:
        """A JSON answer."""
        await self.answer(status, {"content-type": media_type, **(headers or {})}, json.dumps(value, ensure_ascii=False).encode("utf-8", "replace"))

    async def serve(self, work: Awaitable[None], refuse: Callable[[AirlockError], Awaitable[None]]) -> None:
        """Does a door's work; a client that left gets nothing, and `refuse` words an error, unless the answer began: then it is raised."""
        try:
            await work
        except Gone:
            await self.gone()
        except AirlockError as error:
            if self.started:
                raise
            await refuse(error)

    async def gone(self) -> None:
        """Ends an exchange whose client left or stalled; one that only stalled is told so."""
        if not self.started:
            self.body_done = True
            await self.answer(408, {"connection": "close"})

    async def _discard(self) -> bool:
        if "expect" in self.headers:
            return False
        size = 0
        with suppress(Gone, TimeoutError):
            async with asyncio.timeout(5):
                async for found in self.pieces():
                    size += sum(map(len, found))
                    if size > DISCARD:
                        return False
                return True
        return False

    def part(self, total: int) -> tuple[int, int] | None:
        """The one range that was asked for, clamped; None for the whole; raises RangeInvalid (RFC 9110 section 14)."""
        found = _RANGE.match(self.headers.get("range", "").replace(" ", ""))
        if not found or found.group() == "bytes=-":
            return None
        first, last = found.groups()
        if not first:
            lo, hi = max(0, total - int(last)), total
        else:
            lo, hi = int(first), min(total, int(last) + 1 if last else total)
        if lo >= total or hi <= lo:
            raise RangeInvalid("the range does not fit", expected=f"a range within 0-{total - 1}", total=total)
        return lo, hi

    async def content(self, content: Content, headers: Mapping[str, str], again: Callable[[int, int], Awaitable[Content]]) -> None:
        """Sends an object or the asked range of it, or says where it is; `again` reads a part where the store sends by chunks."""
        elsewhere = self._elsewhere(content)
        if elsewhere is not None:
            await self.answer(elsewhere[0], {**headers, **elsewhere[1]})
            return
        status = 200
        span = self.part(content.total) if self.headers.get("if-range", headers.get("etag")) == headers.get("etag") else None
        if span:
            status = 206
            easy = content.path is not None or content.data is not None
            content = dataclasses.replace(content, lo=span[0], hi=span[1]) if easy or self.method == "HEAD" else await again(*span)
        out = {"accept-ranges": "bytes", **headers, "content-length": str(content.hi - content.lo)}
        if span:
            out["content-range"] = f"bytes {span[0]}-{span[1] - 1}/{content.total}"
        if self.method == "HEAD":
            await self.answer(status, out)
        elif content.data is not None:
            await self.answer(status, out, content.data[content.lo : content.hi])
        elif content.path is not None:
            await self._file(status, out, content)
        else:
            await self._chunks(status, out, content)

    def _elsewhere(self, content: Content) -> tuple[int, dict[str, str]] | None:
        """Status and headers where somebody else sends the bytes, ranges included: the object store, or the nginx in front; never for HEAD."""
        if self.method == "HEAD":
            return None
        if content.url is not None:
            return 307, {"location": content.url}
        if content.path is not None and self._x_accel:
            place = "/".join((self._x_accel.rstrip("/"), *content.path.parts[-3:]))  # below blobs/
            return 200, {"accept-ranges": "bytes", "x-accel-redirect": place}
        return None

    async def served(self, repo: str, digest: str) -> None:
        """Counts the bytes that were streamed for the caller of this exchange."""
        call, sent = self._caller, self._sent
        if call is not None and sent:
            await asyncio.get_running_loop().run_in_executor(self.pools.sql, lambda: self.guard.served(call, repo, digest, sent))

    async def _start(self, status: int, headers: Mapping[str, str]) -> None:
        self.started = True
        await self._send({"type": "http.response.start", "status": status, "headers": heads(status, headers, self.warnings)})

    async def _file(self, status: int, headers: Mapping[str, str], content: Content) -> None:
        file = await self.io(lambda: _open(content))
        try:
            await self._start(status, headers)
            lo, hi = content.lo, content.hi
            if hi > lo and SENDFILE in self.scope.get("extensions", {}):
                message: Message = {"type": SENDFILE, "file": file, "offset": lo, "count": hi - lo}
                await self._send(message)
                self._sent = message.get("sent", hi - lo)
                return
            await self._flow(hi - lo, lambda at: os.pread(file.fileno(), min(BATCH, hi - lo - at), lo + at))
        finally:
            file.close()

    async def _chunks(self, status: int, headers: Mapping[str, str], content: Content) -> None:
        chunks = iter(content.chunks or ())
        await self._start(status, headers)
        await self._flow(content.hi - content.lo, lambda _at: next(chunks, b""))

    async def _flow(self, size: int, read: Callable[[int], bytes]) -> None:
        """Sends `size` bytes read in a thread; a short read ends the answer early, which the server turns into a broken connection."""
        left = asyncio.ensure_future(self._leave())
        sent = 0
        try:
            while sent < size and not left.done():
                piece = await self.io(partial(read, sent))
                if not piece:
                    raise Unavailable("the stored object is shorter than its size")
                sent += len(piece)
                await self._send({"type": "http.response.body", "body": piece, "more_body": True})
            self._sent = sent
            if sent == size:
                await self._send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            left.cancel()

    async def _leave(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass


def _writes(upload: Poured, batch: list[bytes]) -> Callable[[], None]:
    def work() -> None:
        for piece in batch:
            upload.write(piece)

    return work


def _open(content: Content) -> BinaryIO:
    assert content.path is not None
    try:
        file = cast(BinaryIO, content.path.open("rb", buffering=0))
    except OSError as error:
        raise Unavailable(
            f"{content.digest} cannot be read", do="restore it from the backup, or import its bundle again", digest=content.digest
        ) from error
    if os.fstat(file.fileno()).st_size < content.hi:
        file.close()
        raise Unavailable(f"{content.digest} is shorter than its size", do="restore the object", digest=content.digest)
    return file
