"""Starts an engine under its guardian, watches it, and starts it again where the class of its end allows; it speaks to no client and knows no model.

Every exit that nobody asked for is a crash, status 0 included: vLLM exits 0 a few seconds after its worker was killed.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

import aiohttp

from artifact.errors import Invalid, Unavailable
from runtime import guardian
from runtime.exits import BACKOFF, NEVER, NONE, ONCE, Exit, classify
from runtime.launch import Launch

SOCKET_LIMIT = 107  # sun_path of Linux without its final zero byte
LINE_CAP = 4096
LINES = 4000
LOG_FILE_CAP = 64 << 20
POLL_S = 0.5
STARTING_POLL_S = 0.2  # until it is ready, which is what its users wait for
DEAD_POLLS = 2  # refused or 503 so often in a row: the engine is dead, its process group is torn down at once
SILENT_POLLS = 6  # a health answer may be late under load; this many timeouts in a row are a stall
RESTARTS = 3
BACKOFF_S = 1.0
STEADY_S = 300.0  # an engine that was ready this long starts with a clean count of restarts
COMPLETE = "see that the engine environment is complete and readable for this user"
FORCE_S = guardian.SWEEP_S + 1.0  # what the guardian may take to end everything before its group is killed over its head


def connector(launch: Launch) -> aiohttp.BaseConnector:
    """Connections to the engine, as many as are wanted, over its socket or the loopback interface."""
    return aiohttp.UnixConnector(str(launch.socket), limit=0) if launch.socket else aiohttp.TCPConnector(limit=0)


def free_port() -> int:
    """A port of the loopback interface that is free now; who takes it before the engine does costs one restart (class `port`)."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def prepare(launch: Launch) -> None:
    """Makes the files and links of a launch, readable for this user alone; raises Unavailable."""
    try:
        for path, text in launch.files.items():
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            path.unlink(missing_ok=True)
            with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as out:
                out.write(text)
        for path, target in launch.links.items():
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            path.unlink(missing_ok=True)
            path.symlink_to(target)
    except OSError as e:
        what = f"{e.filename} cannot be made: {e.strerror}"
        raise Unavailable(what, do="see that the temporary directory is writable and not full", reason="engine_failed") from e


class Log:
    """The engine's output: the last lines in memory, each cut at a length, and all of them in a file of bounded size or on stderr."""

    def __init__(self, file: Path | None = None, secret: str = "") -> None:
        self.lines: deque[str] = deque(maxlen=LINES)
        self._path = file
        self._secret = secret.encode()
        self._out: BinaryIO | None = None
        self._written = 0
        self._rest = b""
        if file:
            file.parent.mkdir(parents=True, exist_ok=True)
            self._out = file.open("ab", buffering=0)
            self._written = file.stat().st_size

    def feed(self, data: bytes) -> None:
        """Takes output as it comes; a line without an end is cut, never kept whole."""
        data = self._rest + data
        if self._secret:  # SGLang prints all its settings at start, its key among them
            data = data.replace(self._secret, b"[key]")
        *whole, rest = data.split(b"\n")
        while len(rest) > LINE_CAP + len(self._secret):  # a key that has not come whole is not cut in two
            whole.append(rest[:LINE_CAP])
            rest = rest[LINE_CAP:]
        self._rest = rest
        if whole:
            self._keep([line[:LINE_CAP].rstrip(b"\r") for line in whole])

    def close(self) -> None:
        """Ends the last line and the file."""
        if self._rest:
            self._keep([self._rest[:LINE_CAP]])
            self._rest = b""
        if self._out:
            self._out.close()
            self._out = None

    def text(self) -> str:
        """All kept lines."""
        return "\n".join(self.lines)

    def _keep(self, lines: list[bytes]) -> None:
        """Many lines at once: an engine that floods its log must not take the time of those who are answered."""
        data = b"\n".join(lines) + b"\n"
        self.lines.extend(line.decode("utf-8", "replace") for line in lines[-LINES:])
        # A full disk or a closed stderr must not stop the engine: the kept lines are enough to classify.
        with suppress(OSError, ValueError):
            if self._out is None:
                if self._path is None:
                    sys.stderr.buffer.write(data)
                    sys.stderr.buffer.flush()
                return
            if self._written > LOG_FILE_CAP and self._path:
                self._out.close()
                self._path.replace(self._path.with_name(self._path.name + ".1"))
                self._out = self._path.open("ab", buffering=0)
                self._written = 0
            self._out.write(data)
            self._written += len(data)


class Engine:
    """One engine process and its children, from start to end; start it from the main thread, whose end also ends the engine."""

    def __init__(self, launch: Launch, *, log_file: Path | None = None, ready_s: float = 1200.0, poll_s: float = POLL_S) -> None:
        self.launch = launch
        self.ready = False
        self.pid = 0
        self.log = Log(log_file, launch.key)
        self._ready_s = ready_s
        self._poll_s = poll_s
        self._asked = False
        self._cause = ""
        self._was_ready = False
        self._ready_at = 0.0
        self._over_its_head = False
        self._process: subprocess.Popen[bytes] | None = None
        self._output = -1
        self._exited: asyncio.Future[int] | None = None
        self._closed: asyncio.Future[None] | None = None

    @property
    def steady(self) -> bool:
        """Whether it was ready so long ago that its end says nothing of its start."""
        return self._was_ready and asyncio.get_running_loop().time() - self._ready_at > STEADY_S

    async def start(self) -> None:
        """Starts the process in its own group with exactly the given environment; raises Invalid or Unavailable before or at the start."""
        path, program = self.launch.socket, self.launch.argv[0]
        if path:
            if len(os.fsencode(path)) > SOCKET_LIMIT:
                raise Invalid(f"the socket path {path} is too long", expected=f"at most {SOCKET_LIMIT} bytes", do="set TMPDIR to a shorter directory")
            path.unlink(missing_ok=True)
        if not os.access(program, os.X_OK):
            raise Unavailable(f"the engine {program} does not start: it is absent or not executable", do=COMPLETE, reason="engine_failed")
        prepare(self.launch)
        output, given = os.pipe()
        os.set_blocking(output, False)
        try:
            process = subprocess.Popen(  # noqa: S603 - the adapter's argument vector, no shell
                (sys.executable, "-I", "-S", guardian.__file__, str(os.getpid()), *self.launch.argv),
                env=dict(self.launch.env),
                cwd=self.launch.cwd,
                stdin=subprocess.DEVNULL,
                stdout=given,
                stderr=subprocess.STDOUT,
                process_group=0,
            )
        except OSError as e:
            os.close(output)
            raise Unavailable(f"the engine {program} does not start: {e.strerror}", do=COMPLETE, reason="engine_failed") from e
        finally:
            os.close(given)
        # asyncio's own Process.wait() returns only when the output pipe is closed, which a surviving child holds open: it would hide the exit.
        loop = asyncio.get_running_loop()
        self.pid, self._process, self._output = process.pid, process, output
        self._exited, self._closed = loop.create_future(), loop.create_future()
        handle = os.pidfd_open(process.pid)
        loop.add_reader(handle, self._on_exit, handle)
        loop.add_reader(output, self._on_output)

    def _on_exit(self, handle: int) -> None:
        asyncio.get_running_loop().remove_reader(handle)
        os.close(handle)
        if self._process is not None and self._exited is not None:
            self._kill_rest()  # before its status is taken: until then nobody else can have its number
            self._exited.set_result(self._process.wait())

    def _on_output(self) -> None:
        try:
            data = os.read(self._output, 65536)
        except BlockingIOError:
            return
        if data:
            self.log.feed(data)
            return
        self._close_output()

    def _close_output(self) -> None:
        asyncio.get_running_loop().remove_reader(self._output)
        os.close(self._output)
        if self._closed is not None:
            self._closed.set_result(None)

    async def watch(self, on_ready: Callable[[], None] = lambda: None) -> Exit:
        """Follows a started engine to its end: readiness, health, deadline, exit; leaves no process of its group behind."""
        exited, closed = self._exited, self._closed
        if exited is None or closed is None:
            raise Unavailable("the engine was not started", reason="engine_failed")
        health = asyncio.create_task(self._poll(on_ready))
        try:
            rc = await asyncio.shield(exited)
        finally:
            self.ready = False
            health.cancel()
            if not exited.done():  # we are cancelled
                self._kill_rest()
        # Nothing that the engine started lives now, so the pipe ends; what the kernel does not let go must not hold us up.
        await asyncio.wait([closed, health], timeout=2)
        if not closed.done():
            self._close_output()
        self.log.close()
        return self._verdict(rc)

    async def stop(self, grace_s: float = 10.0) -> None:
        """SIGTERM, wait, then the end of everything that the engine started; returns when the process is gone."""
        self._asked = True
        self.ready = False
        exited = self._exited
        if self._process is None or exited is None or exited.done():
            return
        os.kill(self.pid, signal.SIGTERM)  # Popen would take its status first, and with it the hold on its number
        await asyncio.wait([exited], timeout=grace_s)
        self._force()
        await asyncio.shield(exited)

    def _verdict(self, rc: int) -> Exit:
        if self._cause and not self._asked and (rc == -signal.SIGUSR1 or self._over_its_head):
            # We had it ended: the reason for that is the cause. With any other status it ended by itself just before.
            kind, _, detail = self._cause.partition(": ")
            return Exit(kind, rc, detail, BACKOFF if kind == "engine_died" else NEVER)
        return classify(rc, self.log.text(), asked=self._asked, was_ready=self._was_ready)

    async def _poll(self, on_ready: Callable[[], None]) -> None:
        """Asks the health path until the process ends; bounds are told at DEAD_POLLS and SILENT_POLLS."""
        end = asyncio.get_running_loop().time() + self._ready_s
        bad = silent = 0
        timeout = aiohttp.ClientTimeout(total=5)
        async with aiohttp.ClientSession(connector=connector(self.launch), timeout=timeout, headers=self.launch.headers) as session:
            while True:
                path = (self.launch.alive_path if self._was_ready else "") or self.launch.health_path
                try:
                    async with session.get(self.launch.url(path), headers={"Connection": "close"}, allow_redirects=False) as answer:
                        up = answer.status == 200
                    bad, silent = (0, 0) if up else (bad + 1, silent)
                except TimeoutError:
                    up, silent = False, silent + 1
                except (aiohttp.ClientError, OSError):
                    up, bad = False, bad + 1
                if up and not self._asked and not self._was_ready:
                    self._was_ready = True
                    self._ready_at = asyncio.get_running_loop().time()
                    self.ready = True
                    on_ready()
                if self._was_ready:
                    self.ready = bad == 0 and silent < DEAD_POLLS and not self._asked
                    if bad >= DEAD_POLLS or silent >= SILENT_POLLS:
                        self._end("engine_died: the engine runs but its health check fails")
                        return
                elif asyncio.get_running_loop().time() > end:
                    self._end(f"start_timeout: the engine was not ready within {self._ready_s:.0f} s")
                    return
                await asyncio.sleep(self._poll_s if self._was_ready else min(self._poll_s, STARTING_POLL_S))

    def _end(self, cause: str) -> None:
        if not self._asked:
            self._cause = cause
        self.ready = False
        self._force()

    def _force(self) -> None:
        """Has the guardian end everything at once, and ends its group where it does not answer."""
        if self._process is not None and self._exited is not None and not self._exited.done():
            os.kill(self.pid, signal.SIGUSR1)
            asyncio.get_running_loop().call_later(FORCE_S, self._kill_group)

    def _kill_group(self) -> None:
        if self.pid and self._exited is not None and not self._exited.done():
            self._over_its_head = True
            self._kill_rest()

    def _kill_rest(self) -> None:
        """Ends the guardian's group; of one that ended nothing is left there, unless somebody killed it."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)


class Keeper:
    """Keeps one engine running: restarts with growing pauses where the class of the exit allows it; `ready` is what the front asks."""

    def __init__(self, launch: Launch, *, log_file: Path | None = None, ready_s: float = 1200.0, backoff_s: float = BACKOFF_S) -> None:
        self.launch = launch
        self.restarts = 0
        self._log_file = log_file
        self._ready_s = ready_s
        self._backoff_s = backoff_s
        self._engine: Engine | None = None
        self._stopping = False

    @property
    def ready(self) -> bool:
        """Whether the engine answers now."""
        return self._engine is not None and self._engine.ready

    @property
    def pid(self) -> int:
        """The process id of the running engine, 0 before the first start."""
        return self._engine.pid if self._engine else 0

    async def run(self, say: Callable[[str], None], on_ready: Callable[[], None] = lambda: None) -> Exit:
        """Runs engines until one ends for good; returns why."""
        tries = 0
        tried: set[str] = set()  # the classes that are tried once more
        while True:
            if self.launch.socket is None:
                self.launch = self.launch.moved(free_port())
            engine = self._engine = Engine(self.launch, log_file=self._log_file, ready_s=self._ready_s)
            await engine.start()
            end = await engine.watch(on_ready)
            if self._stopping or end.retry in (NONE, NEVER):
                return end
            if engine.steady:
                tries = 0
                tried.clear()
            pause = self._backoff_s * 2**tries
            if end.retry == ONCE:
                if end.kind in tried:
                    return end
                tried.add(end.kind)
                self.launch, otherwise = _otherwise(self.launch, end)
                say(f"warning: {end.detail}; {otherwise}")
            else:
                tries += 1
                if tries > RESTARTS:
                    return end
            self.restarts += 1
            say(f"engine ended ({end.kind}): {end.detail}; starting it again in {pause:.0f} s")
            await asyncio.sleep(pause)
            if self._stopping:
                return end

    async def stop(self, grace_s: float = 10.0) -> None:
        """Ends the engine and lets run() return."""
        self._stopping = True
        if self._engine:
            await self._engine.stop(grace_s)


def _otherwise(launch: Launch, end: Exit) -> tuple[Launch, str]:
    """What is started after an end of a class that is tried once more, and in words."""
    if end.max_model_len:
        return launch.shortened(end.max_model_len), f"starting with a context of {end.max_model_len} tokens"
    if end.share:
        return launch.smaller(end.share), f"starting with a share of {end.share:.3f}"
    return launch, "trying once more"
