"""Starts an engine, watches it, says in one word why it ended and whether to try again; it speaks to no client and knows no model.

Every exit that nobody asked for is a crash, status 0 included: vLLM exits 0 a few seconds after its worker was killed.
"""

from __future__ import annotations

import asyncio
import ctypes
import dataclasses
import os
import re
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import aiohttp

from artifact.errors import Invalid, Unavailable
from runtime.engines import Launch

SOCKET_LIMIT = 107  # sun_path of Linux without its final zero byte
LINE_CAP = 4096
LINES = 4000
LOG_FILE_CAP = 64 << 20
POLL_S = 0.5
DEAD_POLLS = 2  # refused or 503 so often in a row: the engine is dead, its process group is torn down at once
SILENT_POLLS = 6  # a health answer may be late under load; this many timeouts in a row are a stall
RESTARTS = 3
BACKOFF_S = 1.0
STEADY_S = 300.0  # an engine that was ready this long starts with a clean count of restarts
PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None, use_errno=True)

NEVER, ONCE, BACKOFF, NONE = "never", "once", "back-off", "none"


@dataclass(frozen=True)
class Exit:
    """Why an engine ended: class, status, one sentence for people, what to do next, and the context length that would fit (0: not told)."""

    kind: str
    rc: int
    detail: str
    retry: str
    max_model_len: int = 0


# First match wins; the whole log is searched, as a child prints the cause before the parent's general words.
RULES: tuple[tuple[str, str, str, str], ...] = (
    (r"unrecognized arguments|error: argument", "bad_config", NEVER, "the engine does not know an argument"),
    (r"No package metadata was found for vllm", "bad_config", NEVER, "the engine environment lacks the metadata alias `vllm`: build it again"),
    (r"Unable to find interface for: \[127", "no_loopback", NEVER, "the loopback interface is down (do: ip link set lo up)"),
    (r"estimated maximum model length is (\d+)", "does_not_fit", ONCE, "the context length does not fit into the memory left"),
    (r"No available memory for the cache blocks", "does_not_fit", NEVER, "the weights leave no memory for the KV cache"),
    (r"Free memory on device .* is less than desired GPU memory utilization", "gpu_busy", NEVER, "another process holds memory of the GPU"),
    (r"SafetensorError", "bad_weights", NEVER, "the engine cannot read the weights: a verified file means a wrong artefact"),
    (
        r"HFValidationError|is greater than the derived max_model_len|must be divisible by tensor parallel size|ValidationError",
        "bad_config",
        NEVER,
        "the engine refuses the configuration",
    ),
    (r"\[Errno 98\] Address already in use", "port", ONCE, "the engine's address is in use"),
    (r"CUDA out of memory|OutOfMemoryError", "does_not_fit", NEVER, "the GPU's memory is too small"),
    (r"_C::.*expected at most|quantization.*not supported|not supported.*quantization", "unsupported", NEVER, "this engine build cannot do that"),
)


def classify(rc: int, log: str, *, asked: bool = False, was_ready: bool = False) -> Exit:
    """The class of an exit from its status and the whole kept log; pure."""
    if asked:
        return Exit("stopped", rc, "stopped on request", NONE)
    if rc in (-signal.SIGKILL, 137):
        return Exit("oom_kill", rc, "killed, probably out of memory", BACKOFF)
    if rc == 0 or was_ready:
        return Exit("engine_died", rc, f"the engine ended by itself with status {rc}", BACKOFF)
    if rc == 2:
        return Exit("bad_config", rc, f"the engine refused its arguments: {_last(log)}", NEVER)
    for pattern, kind, retry, words in RULES:
        found = re.search(pattern, log)
        if found:
            length = int(found.group(1)) if found.re.groups and len(found.group(1)) < 10 else 0
            return Exit(kind, rc, f"{words}: {_line_of(log, found.start())}", retry, length)
    return Exit("unknown", rc, f"the engine ended with status {rc}:\n" + "\n".join(log.splitlines()[-40:]), BACKOFF)


def _last(log: str) -> str:
    lines = [line for line in log.splitlines() if "error" in line.lower()] or log.splitlines() or [""]
    return lines[-1].strip()[:500]


def _line_of(log: str, at: int) -> str:
    start = log.rfind("\n", 0, at) + 1
    end = log.find("\n", at)
    return log[start : end if end >= 0 else len(log)].strip()[:500]


class Log:
    """The engine's output: the last lines in memory, each cut at a length, and all of them in a file of bounded size or on stderr."""

    def __init__(self, file: Path | None = None) -> None:
        self.lines: deque[str] = deque(maxlen=LINES)
        self._path = file
        self._out: BinaryIO | None = None
        self._written = 0
        self._rest = b""
        if file:
            file.parent.mkdir(parents=True, exist_ok=True)
            self._out = file.open("ab", buffering=0)
            self._written = file.stat().st_size

    def feed(self, data: bytes) -> None:
        """Takes output as it comes; a line without an end is cut, never kept whole."""
        *whole, rest = (self._rest + data).split(b"\n")
        for line in whole:
            self._add(line)
        while len(rest) > LINE_CAP:
            self._add(rest[:LINE_CAP])
            rest = rest[LINE_CAP:]
        self._rest = rest

    def close(self) -> None:
        """Ends the last line and the file."""
        if self._rest:
            self._add(self._rest)
            self._rest = b""
        if self._out:
            self._out.close()
            self._out = None

    def text(self) -> str:
        """All kept lines."""
        return "\n".join(self.lines)

    def _add(self, line: bytes) -> None:
        kept = line[:LINE_CAP].rstrip(b"\r")
        self.lines.append(kept.decode("utf-8", "replace"))
        # A full disk or a closed stderr must not stop the engine: the kept lines are enough to classify.
        with suppress(OSError, ValueError):
            if self._out is None:
                if self._path is None:
                    sys.stderr.buffer.write(kept + b"\n")
                    sys.stderr.buffer.flush()
                return
            if self._written > LOG_FILE_CAP and self._path:
                self._out.close()
                self._path.replace(self._path.with_name(self._path.name + ".1"))
                self._out = self._path.open("ab", buffering=0)
                self._written = 0
            self._out.write(kept + b"\n")
            self._written += len(kept) + 1


def _tie_to_parent(parent: int) -> Callable[[], None]:
    def tie() -> None:
        # The engine must not outlive us and keep the GPU: the kernel ends it when this process dies, however it dies.
        _LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
        if os.getppid() != parent:
            os._exit(1)

    return tie


class Engine:
    """One engine process and its children, from start to end; start it from the main thread, whose end also ends the engine."""

    def __init__(self, launch: Launch, *, log_file: Path | None = None, ready_s: float = 1200.0, poll_s: float = POLL_S) -> None:
        self.launch = launch
        self.ready = False
        self.pid = 0
        self.log = Log(log_file)
        self._ready_s = ready_s
        self._poll_s = poll_s
        self._asked = False
        self._cause = ""
        self._was_ready = False
        self._process: subprocess.Popen[bytes] | None = None
        self._output = -1
        self._exited: asyncio.Future[int] | None = None
        self._closed: asyncio.Future[None] | None = None

    async def start(self) -> None:
        """Starts the process in its own group with exactly the given environment; raises Invalid or Unavailable before or at the start."""
        path = self.launch.socket
        if len(os.fsencode(path)) > SOCKET_LIMIT:
            raise Invalid(f"the socket path {path} is too long", expected=f"at most {SOCKET_LIMIT} bytes", do="set TMPDIR to a shorter directory")
        with suppress(FileNotFoundError):
            path.unlink()
        output, given = os.pipe()
        os.set_blocking(output, False)
        try:
            process = subprocess.Popen(  # noqa: S603 - the adapter's argument vector, no shell
                self.launch.argv,
                env=dict(self.launch.env),
                cwd=self.launch.cwd,
                stdin=subprocess.DEVNULL,
                stdout=given,
                stderr=subprocess.STDOUT,
                process_group=0,
                preexec_fn=_tie_to_parent(os.getpid()),  # the only way to reach prctl between fork and exec
            )
        except OSError as e:
            os.close(output)
            do = "see that the engine environment is complete and readable for this user"
            raise Unavailable(f"the engine {self.launch.argv[0]} does not start: {e.strerror}", do=do, reason="engine_failed") from e
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
            self._kill_group()
        # Children are dead now, so the pipe ends; one that left the group must not hold us up.
        await asyncio.wait([closed, health], timeout=2)
        if not closed.done():
            self._close_output()
        self.log.close()
        return self._verdict(rc)

    async def stop(self, grace_s: float = 10.0) -> None:
        """SIGTERM, wait, SIGKILL to the whole group; returns when the process is gone."""
        self._asked = True
        self.ready = False
        exited = self._exited
        if self._process is None or exited is None or exited.done():
            return
        self._process.send_signal(signal.SIGTERM)
        await asyncio.wait([exited], timeout=grace_s)
        self._kill_group()
        await asyncio.shield(exited)

    def _verdict(self, rc: int) -> Exit:
        if self._cause and not self._asked:
            kind, _, detail = self._cause.partition(": ")
            found = classify(rc if rc not in (0, -signal.SIGKILL) else 1, self.log.text(), was_ready=self._was_ready)
            # Our own SIGKILL is not an out-of-memory kill: the reason for which we sent it is the cause.
            return dataclasses.replace(found, kind=kind, detail=detail, retry=BACKOFF if kind == "engine_died" else NEVER, rc=rc)
        return classify(rc, self.log.text(), asked=self._asked, was_ready=self._was_ready)

    async def _poll(self, on_ready: Callable[[], None]) -> None:
        """Asks the health path until the process ends; bounds are told at DEAD_POLLS and SILENT_POLLS."""
        end = asyncio.get_running_loop().time() + self._ready_s
        bad = silent = 0
        connector = aiohttp.UnixConnector(str(self.launch.socket), force_close=True)
        async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=5)) as session:
            while True:
                try:
                    async with session.get("http://engine" + self.launch.health_path) as answer:
                        up = answer.status == 200
                    bad, silent = (0, 0) if up else (bad + 1, silent)
                except TimeoutError:
                    up, silent = False, silent + 1
                except (aiohttp.ClientError, OSError):
                    up, bad = False, bad + 1
                if up and not self._asked and not self._was_ready:
                    self._was_ready = True
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
                await asyncio.sleep(self._poll_s)

    def _end(self, cause: str) -> None:
        if not self._asked:
            self._cause = cause
        self.ready = False
        self._kill_group()

    def _kill_group(self) -> None:
        if self.pid:
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
        shortened = moved = False
        while True:
            engine = self._engine = Engine(self.launch, log_file=self._log_file, ready_s=self._ready_s)
            began = asyncio.get_running_loop().time()
            await engine.start()
            end = await engine.watch(on_ready)
            if self._stopping or end.retry in (NONE, NEVER):
                return end
            if asyncio.get_running_loop().time() - began > STEADY_S:
                tries = 0
            pause = self._backoff_s * 2**tries
            if end.kind == "does_not_fit":
                if shortened or not end.max_model_len:
                    return end
                shortened = True
                self.launch = dataclasses.replace(self.launch, argv=_shorten(self.launch.argv, end.max_model_len))
                say(f"warning: the wanted context does not fit; starting with {end.max_model_len} tokens")
            elif end.retry == ONCE:
                if moved:
                    return end
                moved = True
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


def _shorten(argv: tuple[str, ...], length: int) -> tuple[str, ...]:
    if "--max-model-len" in argv:
        at = argv.index("--max-model-len")
        return (*argv[: at + 1], str(length), *argv[at + 2 :])
    return (*argv, "--max-model-len", str(length))
