"""The front of the runtime: NIM's and OpenAI's routes on one port, inference piped byte for byte to the engine's socket.

Only listed routes exist; the engine gets a path from our table, never the client's, and no local path or credential goes back.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import json
import logging
import os
import re
import signal
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import aiohttp
from aiohttp import web

from artifact.errors import Invalid, Unavailable
from runtime.exits import Exit
from runtime.launch import Launch
from runtime.supervisor import Keeper, connector
from runtime.watch import Watch

BODY_LIMIT = 32 << 20
ERROR_LIMIT = 1 << 20  # of an engine's error body that is read to be rewritten
BODY_S = 60.0
REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}\Z")
DONE = b"data: [DONE]"
INFERENCE = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings")
TYPES = {400: "BadRequestError", 401: "AuthenticationError", 404: "NotFoundError", 405: "MethodNotAllowed", 413: "RequestTooLarge"}
Json = dict[str, object]

log = logging.getLogger("airlock.runtime")


@dataclass(frozen=True)
class ServeSettings:
    """What the front is told: address, names of the model (the first is the engine's), what is served, and its time limits."""

    host: str
    port: int
    model_names: tuple[str, ...]
    profile_id: str
    profile_digest: str
    model_digest: str
    drain_s: float = 20.0
    model_ref: str = "latest"
    simulated: bool = False
    idle_s: float = 300.0
    ready_s: float = 1200.0
    backoff_s: float = 1.0
    stop_s: float = 10.0
    engine_log: Path | None = None


def error_body(status: int, message: str, kind: str = "", param: str | None = None) -> Json:
    """One body that OpenAI's clients and both generations of NIM clients read."""
    kind = kind or TYPES.get(status, "InternalServerError" if status >= 500 else "BadRequestError")
    inner: Json = {"message": message, "type": kind, "param": param, "code": status}
    return {"object": "error", **inner, "error": inner}


def failure(status: int, message: str, kind: str = "", param: str | None = None, headers: Mapping[str, str] | None = None) -> web.Response:
    """An error answer in both shapes."""
    return web.json_response(error_body(status, message, kind, param), status=status, headers=headers)


class Refused(Exception):
    """A request that is answered with an error of ours; carries the answer."""

    def __init__(self, status: int, message: str, kind: str = "", param: str | None = None) -> None:
        super().__init__(message)
        self.answer = failure(status, message, kind, param)


def parse_body(raw: bytes) -> Json:
    """The JSON object of a request; raises Refused for anything else."""
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError) as e:
        raise Refused(400, "the body is not valid JSON") from e
    if not isinstance(body, dict):
        raise Refused(400, "the body is not a JSON object")
    return body


def prepare(route: str, body: Json, models: Mapping[str, Mapping[str, object]]) -> tuple[str, bytes | None]:
    """The name that the caller asked for, and the body to send where it must differ from what came; raises Refused.

    `models` says for each name what the engine's body says instead (Launch.models); the first is meant where none is given.
    """
    asked = body.get("model", next(iter(models)))
    if not isinstance(asked, str) or asked not in models:
        shown = str(asked)[:200]
        raise Refused(404, f"The model `{shown}` does not exist. Valid names: {', '.join(models)}.", "NotFoundError", "model")
    changed = any(body.get(k) != v for k, v in models[asked].items())
    body |= models[asked]
    if route == "/v1/embeddings":
        if "encoding_format" in body and body["encoding_format"] is None:
            del body["encoding_format"]
            changed = True
        if body.pop("input_type", None) is not None:
            changed = True
        if "truncate" in body:
            truncate = body.pop("truncate")
            changed = True
            if truncate == "END":
                body["truncate_prompt_tokens"] = -1
            elif truncate not in ("NONE", None):
                raise Refused(400, f"truncate {str(truncate)[:20]!r} is not supported by this engine; use NONE or END", param="truncate")
    return asked, json.dumps(body).encode() if changed else None


def read_error(status: int, raw: bytes, model: str, scrub: Callable[[str], str]) -> web.Response:
    """An engine's error in any of its shapes, as ours."""
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError):
        body = None
    found = body.get("error", body) if isinstance(body, dict) else None
    if status == 404 and isinstance(body, dict) and body.get("detail") == "Not Found":
        return failure(404, f"The model `{model}` does not support this route.", "NotFoundError")
    if isinstance(found, str):
        return failure(status, scrub(found))
    if isinstance(found, dict):
        message = found.get("message") or found.get("detail") or "the engine refused the request"
        kind, param = found.get("type"), found.get("param")
        return failure(status, scrub(str(message)), kind if isinstance(kind, str) else "", param if isinstance(param, str) else None)
    return failure(status, "the engine refused the request")


def renamed(data: bytes, engine_name: str, asked: str) -> bytes:
    """A JSON text with the engine's model name replaced by the one asked for; inside JSON strings the quotes are escaped and never match."""
    old, new = json.dumps(engine_name).encode(), json.dumps(asked).encode()
    for gap in (b"", b" "):
        data = data.replace(b'"model":' + gap + old, b'"model":' + gap + new)
    return data


class Front:
    """The aiohttp application over one kept engine."""

    def __init__(self, settings: ServeSettings, keeper: Keeper, watch: Watch | None = None) -> None:
        self.settings = settings
        self.keeper = keeper
        self.watch = watch
        self.draining = False
        self.in_flight = 0
        self.max_model_len: int | None = None
        self._requests: Counter[tuple[str, int]] = Counter()
        self._began = int(time.time())
        self._session: aiohttp.ClientSession | None = None
        # Longest first, so that a directory never leaves the rest of a longer path behind.
        launch = keeper.launch
        local = (launch.socket, *launch.files, *launch.links, *launch.links.values())
        paths = {a for a in launch.argv if a.startswith("/")} | {str(p) for p in local if p}
        self._paths = sorted(paths, key=len, reverse=True)
        self._version = importlib.metadata.version("airlock")

    @property
    def models(self) -> Mapping[str, Mapping[str, object]]:
        """The names that clients may use, and what the engine's body says for each."""
        names = self.settings.model_names
        return self.keeper.launch.models or {name: {"model": names[0]} for name in names}

    def _engine_name(self, asked: str) -> str:
        return str(self.models[asked]["model"])

    def application(self) -> web.Application:
        """The routes; everything else is 404."""
        app = web.Application(client_max_size=BODY_LIMIT, middlewares=[self._outer])
        get = {
            "/v1/health/live": self._live,
            "/v1/health/ready": self._ready,
            "/v1/models": self._models,
            "/v1/metadata": self._metadata,
            "/v1/version": self._version_info,
            "/metrics": self._metrics,
            "/v1/metrics": self._metrics,
        }
        for path, handler in get.items():
            app.router.add_get(path, handler)
        for path in INFERENCE:
            app.router.add_post(path, self._infer)
        app.cleanup_ctx.append(self._client)
        app.on_response_prepare.append(self._warn)
        return app

    async def _warn(self, request: web.Request, answer: web.StreamResponse) -> None:
        """Every answer, also a stream, says what ends soon or is not renewed."""
        warning = self.watch.warning() if self.watch else ""
        if warning:
            answer.headers["x-airlock-warning"] = warning

    async def _client(self, app: web.Application) -> AsyncIterator[None]:
        launch, timeout = self.keeper.launch, aiohttp.ClientTimeout(total=None, sock_connect=5)
        self._session = aiohttp.ClientSession(
            connector=connector(launch), timeout=timeout, headers=launch.headers, auto_decompress=False, cookie_jar=aiohttp.DummyCookieJar()
        )
        yield
        await self._session.close()

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
        except Refused as e:
            answer = e.answer
        except web.HTTPRequestEntityTooLarge:
            answer = failure(413, f"the body is larger than {BODY_LIMIT} bytes")
            answer.force_close()
        except web.HTTPException as e:
            words = {404: "there is no such route", 405: f"the route does not take {request.method[:20]}"}
            allow = {"Allow": e.headers["Allow"]} if "Allow" in e.headers else None
            answer = failure(e.status, words.get(e.status, e.reason), headers=allow)
        else:
            status = answer.status
        finally:
            if status == 499 and "answer" in locals():
                status = answer.status
            self._requests[(route, status)] += 1
        if not answer.prepared:
            answer.headers["X-Request-Id"] = str(request["id"])
        return answer

    async def _live(self, request: web.Request) -> web.Response:
        return web.json_response({"object": "health.response", "message": "Service is live.", "status": "live"})

    async def _ready(self, request: web.Request) -> web.Response:
        if self.available:
            warning = self.watch.warning() if self.watch else ""
            body = {"object": "health.response", "message": "Service is ready.", "status": "ready"}
            return web.json_response(body | ({"warning": warning} if warning else {}))
        return web.json_response({"object": "health.response", "message": "Service is not ready.", "status": "not_ready"}, status=503)

    @property
    def available(self) -> bool:
        """Whether new requests are taken."""
        return self.keeper.ready and not self.draining

    async def _models(self, request: web.Request) -> web.Response:
        self._demand_engine()
        if self.max_model_len is None:
            await self._learn_length()
        names = self.settings.model_names
        first = names[0]
        data: list[Json] = [
            {
                "id": name,
                "object": "model",
                "created": self._began,
                "owned_by": "airlock",
                "root": first if name in names else name,
                "parent": None if name in names else first,  # an adapter's is the model that it is for
                "max_model_len": self.max_model_len or None,
                "permission": [],
            }
            for name in self.models
        ]
        return web.json_response({"object": "list", "data": data})

    async def _learn_length(self) -> None:
        assert self._session is not None
        with suppress(aiohttp.ClientError, TimeoutError, ValueError, OSError):
            async with self._session.get(self.keeper.launch.url("/v1/models"), timeout=aiohttp.ClientTimeout(total=5)) as answer:
                body = json.loads(await answer.content.read(ERROR_LIMIT))
                entries = body.get("data") if isinstance(body, dict) else None
                entry = entries[0] if isinstance(entries, list) and entries else None
                length = entry.get("max_model_len") if isinstance(entry, dict) else None
                self.max_model_len = length if isinstance(length, int) else 0

    async def _metadata(self, request: web.Request) -> web.Response:
        s = self.settings
        return web.json_response(
            {
                "version": self._version,
                "assetInfo": [],
                "licenseInfo": {},
                "modelInfo": [{"shortName": f"{s.model_names[0]}:{s.model_ref}", "modelUrl": ""}],
                "repository_override": "",
                "selectedModelProfileId": s.profile_id,
                "profile_id": s.profile_id,
                "airlock": {"profile_digest": s.profile_digest, "model_digest": s.model_digest, "simulated": s.simulated},
            }
        )

    async def _version_info(self, request: web.Request) -> web.Response:
        return web.json_response({"release": self._version, "api": self._version, "openapi_spec": "3.1.0"})

    async def _metrics(self, request: web.Request) -> web.Response:
        text = ""
        if self.keeper.ready and self._session:
            with suppress(aiohttp.ClientError, TimeoutError, OSError):
                async with self._session.get(
                    self.keeper.launch.url(self.keeper.launch.metrics_path), timeout=aiohttp.ClientTimeout(total=5)
                ) as answer:
                    if answer.status == 200:
                        text = self.scrub((await answer.read()).decode("utf-8", "replace")).rstrip("\n") + "\n"
        own = ["# TYPE airlock_requests_total counter"]
        own += [f'airlock_requests_total{{route="{route}",status="{status}"}} {n}' for (route, status), n in sorted(self._requests.items())]
        own += ["# TYPE airlock_requests_in_flight gauge", f"airlock_requests_in_flight {self.in_flight}"]
        own += ["# TYPE airlock_engine_ready gauge", f"airlock_engine_ready {int(self.keeper.ready)}"]
        own += ["# TYPE airlock_engine_restarts_total counter", f"airlock_engine_restarts_total {self.keeper.restarts}"]
        own += self.watch.metrics() if self.watch else []
        return web.Response(text=text + "\n".join(own) + "\n", headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})

    def scrub(self, text: str) -> str:
        """The text without the local paths that the engine was started with."""
        for path in self._paths:
            text = text.replace(path, self.settings.model_names[0])
        return text

    def _demand_engine(self) -> None:
        if not self.available:
            why = "the service is stopping" if self.draining else "the engine is not ready; poll /v1/health/ready"
            raise Refused(503, why, "ServiceUnavailable")

    async def _infer(self, request: web.Request) -> web.StreamResponse:
        """One inference request: bounded read, name check, then the pipe."""
        self._demand_engine()
        self.in_flight += 1
        try:
            try:
                async with asyncio.timeout(BODY_S):
                    raw = await request.read()
            except TimeoutError as e:
                raise Refused(408, f"the body did not arrive within {BODY_S:.0f} s", "RequestTimeout") from e
            body = parse_body(raw)
            streamed = body.get("stream") is True
            asked, changed = prepare(request.path, body, self.models)
            return await self._pipe(request, raw if changed is None else changed, asked, streamed)
        finally:
            self.in_flight -= 1

    async def _pipe(self, request: web.Request, body: bytes, asked: str, streamed: bool) -> web.StreamResponse:
        assert self._session is not None
        headers = {"Content-Type": "application/json", "Accept": "*/*", "Accept-Encoding": "identity", "X-Request-Id": str(request["id"])}
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=5, sock_read=self.settings.idle_s if streamed else None)
        upstream: aiohttp.ClientResponse | None = None
        try:
            upstream = await self._session.post(
                self.keeper.launch.url(request.path), data=body, headers=headers, timeout=timeout, allow_redirects=False
            )
            if upstream.status != 200:
                return read_error(upstream.status, await upstream.content.read(ERROR_LIMIT), asked, self.scrub)
            if upstream.content_type == "text/event-stream":
                return await self._stream(request, upstream, asked)
            data = await upstream.read()
            if asked != self._engine_name(asked):
                data = renamed(data, self._engine_name(asked), asked)
            return web.Response(body=data, headers={"Content-Type": upstream.headers.get("Content-Type", "application/json")})
        except TimeoutError as e:
            raise Refused(504, "the engine did not answer in time", "GatewayTimeout") from e
        except (aiohttp.ClientError, OSError) as e:
            if upstream is None and request.transport is None:
                raise
            raise Refused(503, "the engine ended or does not answer; retry later", "ServiceUnavailable") from e
        finally:
            # Closing, not releasing: the engine sees the end of the connection, aborts the request and frees its cache.
            if upstream is not None:
                upstream.close()

    async def _stream(self, request: web.Request, upstream: aiohttp.ClientResponse, asked: str) -> web.StreamResponse:
        """Server-sent events as they come; a stream that does not end with [DONE] gets an error frame instead of it."""
        out = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        out.headers["X-Request-Id"] = str(request["id"])
        await out.prepare(request)
        first = self._engine_name(asked)
        tail = rest = b""
        why = "the engine ended during the answer"
        try:
            async for chunk in upstream.content.iter_any():
                if asked != first:
                    # The name stands in every frame; only whole frames are rewritten, so that it is never cut in two.
                    whole, end, rest = (rest + chunk).rpartition(b"\n\n")
                    chunk = renamed(whole, first, asked) + end
                    if not chunk:
                        continue
                tail = (tail + chunk)[-64:]
                try:
                    await out.write(chunk)
                except (ConnectionError, aiohttp.ClientConnectionResetError):
                    return out
        except TimeoutError:
            why = f"the engine sent nothing for {self.settings.idle_s:.0f} s"
        except (aiohttp.ClientError, OSError):
            pass
        if DONE not in tail:
            frame = b"data: " + json.dumps(error_body(500, why)).encode() + b"\n\n"
            with suppress(ConnectionError, aiohttp.ClientConnectionResetError):
                await out.write((b"" if tail.endswith(b"\n\n") or not tail else b"\n\n") + frame)
            out.force_close()
        with suppress(ConnectionError, aiohttp.ClientConnectionResetError):
            await out.write_eof()
        return out


async def _drain(front: Front, runner: web.AppRunner, keeper: Keeper, task: asyncio.Task[Exit]) -> None:
    """No new requests, the running ones finish within the limit, then the engine, then the port."""
    front.draining = True
    end = asyncio.get_running_loop().time() + front.settings.drain_s
    while front.in_flight and not task.done() and asyncio.get_running_loop().time() < end:
        await asyncio.sleep(0.05)
    await keeper.stop(front.settings.stop_s)
    await asyncio.wait([task], timeout=5)
    # Streams that the engine's end cut still write their error frame.
    end = asyncio.get_running_loop().time() + 2
    while front.in_flight and asyncio.get_running_loop().time() < end:
        await asyncio.sleep(0.02)
    await runner.cleanup()


async def _serve(settings: ServeSettings, launch: Launch, watch: Watch | None) -> int:
    keeper = Keeper(launch, log_file=settings.engine_log, ready_s=settings.ready_s, backoff_s=settings.backoff_s)
    front = Front(settings, keeper, watch)
    runner = web.AppRunner(front.application(), access_log=None, handler_cancellation=True, shutdown_timeout=2.0)
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


def run(settings: ServeSettings, launch: Launch, watch: Watch | None = None) -> int:
    """Serves until SIGTERM or SIGINT, with what the watch says in its answers, and returns 0.

    Raises Unavailable with reason port_taken or engine_failed, Invalid for a bad launch.
    """
    if not settings.model_names:
        raise Invalid("no name to serve the model under", expected="at least one model name")
    return asyncio.run(_serve(settings, launch, watch))
