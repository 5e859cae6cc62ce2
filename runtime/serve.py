"""The front of the runtime: NIM's and OpenAI's routes on one port, inference piped byte for byte to the engine's socket.

Only listed routes exist; the engine gets a path from our table, never the client's, and no local path or credential goes back.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import resource
import signal
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import suppress

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from artifact.errors import Invalid, Unavailable
from runtime.exits import Exit
from runtime.front import responses
from runtime.front.callers import Callers
from runtime.front.controls import Asked, parse_body, prepare, ranked, renamed
from runtime.front.errors import Refused, failure
from runtime.front.figures import TYPE, Figures
from runtime.front.gate import Gate, Held
from runtime.front.pages import Pages
from runtime.front.pipe import Pipe
from runtime.front.settings import ServeSettings
from runtime.front.stored import Stored
from runtime.front.vocabulary import POSTED, RANKING, RESPONSES
from runtime.launch import Launch
from runtime.node import Gpu
from runtime.supervisor import Keeper
from runtime.watch import Voice

BODY_S = 60.0
REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}\Z")
__all__ = ["Front", "ServeSettings", "run"]

log = logging.getLogger("airlock.runtime")


class Front:
    """The aiohttp application over one kept engine; `callers` and `gpus` may be absent."""

    def __init__(
        self,
        settings: ServeSettings,
        keeper: Keeper,
        watch: Voice | None = None,
        callers: Callers | None = None,
        gpus: Callable[[], Sequence[Gpu]] | None = None,
        idle: Sequence[Gpu] = (),
    ) -> None:
        self.settings, self.keeper, self.watch, self.callers = settings, keeper, watch, callers
        self.draining = False
        self.in_flight = 0
        self.gate, self.stored = Gate(settings.limits), Stored(settings.limits)
        self.pipe = Pipe(lambda: keeper.launch, self.scrub, settings.idle_s, settings.answer_s)
        self.pages = Pages(settings, self.pipe, lambda: self.models, lambda: self.available, self._warning)
        self.figures = Figures(settings, self.gate, self.stored, gpus, idle)
        # Longest first, so that a directory never leaves the rest of a longer path behind.
        launch = keeper.launch
        local = (launch.socket, *launch.files, *launch.links, *launch.links.values())
        paths = {a for a in launch.argv if a.startswith("/")} | {str(p) for p in local if p}
        self._paths = sorted(paths, key=len, reverse=True)

    @property
    def models(self) -> Mapping[str, Mapping[str, object]]:
        """The names that clients may use, and what the engine's body says for each."""
        names = self.settings.model_names
        return self.keeper.launch.models or {name: {"model": names[0]} for name in names}

    @property
    def available(self) -> bool:
        """Whether new requests are taken."""
        return self.keeper.ready and not self.draining

    @property
    def busy(self) -> bool:
        """Whether a request is being answered, in the background too."""
        return self.in_flight > 0 or bool(self.stored.running())

    def application(self) -> web.Application:
        """The routes; everything else is 404."""
        app = web.Application(middlewares=[self._outer])
        for path, handler in self.pages.routes().items():
            app.router.add_get(path, handler)
        for path in ("/metrics", "/v1/metrics"):
            app.router.add_get(path, self._metrics)
        for path in POSTED:
            app.router.add_post(path, self._infer)
        app.router.add_get(RESPONSES + "/{id}", self._response)
        app.router.add_delete(RESPONSES + "/{id}", self._response)
        app.router.add_post(RESPONSES + "/{id}/cancel", self._response)
        app.cleanup_ctx.append(self._around)
        app.on_response_prepare.append(self._warn)
        return app

    def _warning(self) -> str:
        return self.watch.warning() if self.watch else ""

    async def _warn(self, request: web.Request, answer: web.StreamResponse) -> None:
        """Every answer, also a stream, says what ends soon or is not renewed."""
        if warning := self._warning():
            answer.headers["x-airlock-warning"] = warning

    async def _around(self, app: web.Application) -> AsyncIterator[None]:
        await self.pipe.open()
        looking = asyncio.create_task(self.figures.watch(self.pipe, lambda: self.keeper.launch, lambda: self.keeper.ready))
        yield
        looking.cancel()
        self.stored.stop()
        await self.pipe.close()

    @web.middleware
    async def _outer(self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]) -> web.StreamResponse:
        """Request id, counting, and one shape for every error; the one place that turns exceptions into answers."""
        given = request.headers.get("X-Request-Id", "")
        request["id"] = given if REQUEST_ID.match(given) else uuid.uuid4().hex
        known = request.match_info.route.resource
        route = known.canonical if known else "other"
        status = 499  # the client went away before an answer
        try:
            answer = await handler(request)
            status = answer.status
        except Refused as e:
            answer, status = e.answer, e.status
            if status in (408, 413):
                answer.force_close()
        except web.HTTPException as e:
            words = {404: "there is no such route", 405: f"the route does not take {request.method[:20]}"}
            allow = {"Allow": e.headers["Allow"]} if "Allow" in e.headers else None
            answer, status = failure(e.status, words.get(e.status, e.reason), headers=allow), e.status
        except Exception as e:  # a fault of ours: told as one, in the shape that clients read
            if isinstance(e, ConnectionError) or request.transport is None:
                raise
            log.exception("the request %s failed by a fault of the front", request["id"])
            answer, status = failure(500, "a fault of the front; its log says more"), 500
        finally:
            self.figures.requests[(route, status)] += 1
        if not answer.prepared:
            answer.headers["X-Request-Id"] = str(request["id"])
        return answer

    def _too_large(self) -> Refused:
        return Refused(413, f"the body is larger than {self.settings.limits.body_bytes} bytes")

    async def _metrics(self, request: web.Request) -> web.Response:
        launch, text = self.keeper.launch, ""
        if self.keeper.ready:
            text = self.scrub((await self.pipe.read(launch.metrics_path)).decode("utf-8", "replace"))
        page = self.figures.page(
            text,
            launch.engine,
            ready=self.keeper.ready,
            restarts=self.keeper.restarts,
            in_flight=self.in_flight,
            slow=self.pipe.slow,
            key=self.watch.metrics() if self.watch else (),
        )
        return web.Response(text=page, headers={"Content-Type": TYPE})

    def scrub(self, text: str) -> str:
        """The text without the local paths that the engine was started with."""
        for path in self._paths:
            text = text.replace(path, self.settings.model_names[0])
        return text

    def _demand_engine(self) -> None:
        if not self.available:
            why = "the service is stopping" if self.draining else "the engine is not ready; poll /v1/health/ready"
            raise Refused(503, why, "ServiceUnavailable", headers={"Retry-After": "5"})

    async def _caller(self, request: web.Request) -> str:
        return await self.callers.check(request.headers.get("Authorization", "")) if self.callers else ""

    async def _infer(self, request: web.Request) -> web.StreamResponse:
        """One inference request: caller, bounded read, checks, a place, then the pipe.

        The place comes after the body: slow senders, however many, take none from the others.
        """
        self._demand_engine()
        owner = await self._caller(request)
        if request.headers.get("Content-Encoding", "identity").lower() != "identity":
            raise Refused(415, "compressed bodies are not taken", "UnsupportedMediaType")
        if (request.content_length or 0) > self.settings.limits.body_bytes:
            raise self._too_large()
        self.gate.check()
        held, began = self.gate.hold(), time.monotonic()
        try:
            asked = self._checked(request.path, await self._read(request, held))
            if request.path == RESPONSES:
                asked = responses.conversation(asked, self.stored, owner)
            self.in_flight += 1
            try:
                if not asked.background:
                    async with self.gate.place():
                        self._demand_engine()  # it may have ended while we waited
                        return await self._answer(request, asked, owner, began)
                # It waits for a place of its own, without a client that could go away; the room of its body is its own too.
                body, task = responses.start(asked, self.stored, owner, lambda: self._in_background(asked, str(request["id"])))
                its, held = held, self.gate.hold()
                task.add_done_callback(lambda _: its.free())
                return web.json_response(body)
            finally:
                self.in_flight -= 1
        finally:
            held.free()

    async def _read(self, request: web.Request, held: Held) -> bytes:
        raw, limit = bytearray(), self.settings.limits.body_bytes
        try:
            async with asyncio.timeout(BODY_S):
                async for chunk in request.content.iter_any():
                    if len(raw) + len(chunk) > limit:
                        raise self._too_large()
                    held.more(len(chunk))
                    raw += chunk
        except TimeoutError as e:
            raise Refused(408, f"the body did not arrive within {BODY_S:.0f} s", "RequestTimeout") from e
        except web.RequestPayloadError as e:
            raise Refused(400, "the body was cut or is no HTTP") from e
        return bytes(raw)

    def _checked(self, path: str, raw: bytes) -> Asked:
        return prepare(path, parse_body(raw), self.models, self.keeper.launch.engine, self.settings.limits.images)

    async def _answer(self, request: web.Request, asked: Asked, owner: str, began: float) -> web.StreamResponse:
        names = (str(asked.body["model"]), asked.model)
        if asked.streamed:
            listening = responses.Listening(asked, self.stored, owner) if request.path == RESPONSES else None
            try:
                return await self.pipe.stream(request, asked.path, asked.body, names, listening, lambda: self.figures.first(time.monotonic() - began))
            finally:
                if listening:
                    listening.close()
        data = await self.pipe.ask(asked.path, asked.body, str(request["id"]), asked.model)
        self.figures.first(time.monotonic() - began)
        if request.path == RESPONSES:
            return web.json_response(responses.keep(data, asked, self.stored, owner))
        if request.path == RANKING:
            data = ranked(data)
        return web.Response(body=renamed(data, *names) if names[0] != names[1] else data, headers={"Content-Type": "application/json"})

    async def _in_background(self, asked: Asked, request_id: str) -> bytes:
        async with self.gate.place():
            self._demand_engine()
            return await self.pipe.ask(asked.path, asked.body, request_id, asked.model)

    async def _response(self, request: web.Request) -> web.Response:
        """A kept response: read, removed, cancelled."""
        owner, key = await self._caller(request), request.match_info["id"]
        if request.method == "DELETE":
            self.stored.remove(key, owner)
            return web.json_response({"id": key, "object": "response.deleted", "deleted": True})
        if request.method == "POST":
            return web.json_response(self.stored.cancel(key, owner))
        if word := next((w for w, value in request.query.items() if value not in ("", "false")), "")[:80]:
            raise Refused(400, f"{word!r} is not supported on GET {RESPONSES}/{{id}}: it gives the whole response", param=word)
        return web.json_response(self.stored.get(key, owner).body)


def _no_http(record: logging.LogRecord) -> bool:
    """Keeps from the log what is no HTTP: aiohttp quotes the bytes, in which a key may stand, under a traceback. The client is told with 400."""
    return not (record.exc_info and isinstance(record.exc_info[1], HttpProcessingError))


async def _drain(front: Front, runner: web.AppRunner, keeper: Keeper, task: asyncio.Task[Exit]) -> None:
    """No new requests, the running ones finish within the limit, then the engine, then the port."""
    front.draining = True
    end = asyncio.get_running_loop().time() + front.settings.drain_s
    while front.busy and not task.done() and asyncio.get_running_loop().time() < end:
        await asyncio.sleep(0.05)
    await keeper.stop(front.settings.stop_s)
    await asyncio.wait([task], timeout=5)
    # Streams that the engine's end cut still write their error frame.
    end = asyncio.get_running_loop().time() + 2
    while front.in_flight and asyncio.get_running_loop().time() < end:
        await asyncio.sleep(0.02)
    await runner.cleanup()


async def _serve(settings: ServeSettings, launch: Launch, make: Callable[[Keeper], Front]) -> int:
    keeper = Keeper(launch, log_file=settings.engine_log, ready_s=settings.ready_s, backoff_s=settings.backoff_s)
    front = make(keeper)
    wire = logging.getLogger("airlock.runtime.wire")
    wire.addFilter(_no_http)
    runner = web.AppRunner(
        front.application(), access_log=None, logger=wire, handler_cancellation=True, shutdown_timeout=2.0, keepalive_timeout=settings.quiet_s
    )
    await runner.setup()
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    try:
        await web.TCPSite(runner, settings.host, settings.port).start()
    except OSError as e:
        await runner.cleanup()
        where = f"{settings.host}:{settings.port}"
        do = "set NIM_HTTP_API_PORT to a free port"
        raise Unavailable(f"cannot listen on {where}: {os.strerror(e.errno or 0)}", do=do, reason="port_taken") from e
    log.info("Listening on http://%s:%d; the engine is starting.", settings.host, settings.port)

    def on_ready() -> None:
        log.info("Service is ready on http://%s:%d", settings.host, settings.port)

    task = asyncio.create_task(keeper.run(log.warning, on_ready))
    waiter = asyncio.create_task(stopping.wait())
    await asyncio.wait([task, waiter], return_when=asyncio.FIRST_COMPLETED)
    asked = stopping.is_set()
    waiter.cancel()
    if asked:
        log.info("Stopping: %d request(s) in flight, at most %.0f s for them.", front.in_flight, settings.drain_s)
    await _drain(front, runner, keeper, task)
    if asked:
        return 0
    ended = task.result()
    do = "see the engine's lines above" if settings.engine_log is None else f"see {settings.engine_log}"
    raise Unavailable(f"the engine ended for good ({ended.kind}): {ended.detail}", do=do, reason="engine_failed")


def run(
    settings: ServeSettings,
    launch: Launch,
    watch: Voice | None = None,
    callers: Callable[[], Callers] | None = None,
    gpus: Callable[[], Sequence[Gpu]] | None = None,
    idle: Sequence[Gpu] = (),
) -> int:
    """Serves until SIGTERM or SIGINT, with what the watch says in its answers, and returns 0.

    `gpus` measures the memory of the GPUs in use, `idle` is what was in use before the engine. Raises Unavailable with reason port_taken or
    engine_failed, Invalid for a bad launch.
    """
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    with suppress(OSError, ValueError):  # each connection is a file, and 1024 are soon used up
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if not settings.model_names:
        raise Invalid("no name to serve the model under", expected="at least one model name")
    return asyncio.run(_serve(settings, launch, lambda keeper: Front(settings, keeper, watch, callers() if callers else None, gpus, idle)))
