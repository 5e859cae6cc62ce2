"""What the demo runs on: steps with seconds and bytes, processes that always end, the closed side's network namespace; knows nothing of the story."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import secrets
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
KEY = re.compile(r"nvapi-[0-9A-Za-z]{20,}")  # what a log must not keep
PYTHON = Path(sys.executable)
BIN = PYTHON.parent
UID = 1000
PR_SET_CHILD_SUBREAPER = 36


class StepFailed(Exception):
    """An assertion of the story does not hold; the text is for a person."""


def demand(truth: bool, text: str) -> None:
    """Raises StepFailed with `text` unless `truth`."""
    if not truth:
        raise StepFailed(text)


def tree_bytes(path: Path) -> int:
    """Bytes of all files under a folder, or of one file."""
    if path.is_file():
        return path.stat().st_size
    return sum(f.stat().st_size for f in path.rglob("*") if f.is_file() and not f.is_symlink())


def human(count: int) -> str:
    """A byte count as a person reads it."""
    value = float(count)
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.2f} GiB"


def free_port() -> int:
    """A TCP port of the loopback that was free a moment ago; none of those from which the kernel takes one for each connection that goes out."""
    while True:
        with socket.socket() as s, contextlib.suppress(OSError):
            s.bind(("127.0.0.1", 20_000 + secrets.randbelow(12_000)))
            return int(s.getsockname()[1])


@dataclass
class Row:
    """One line of the final table."""

    name: str
    seconds: float
    size: int
    ok: bool
    note: str = ""


@dataclass
class Done:
    """How a command ended: status, its output and its errors."""

    code: int
    out: str
    err: str

    @property
    def text(self) -> str:
        """Both streams."""
        return self.out + self.err

    def json(self) -> dict[str, object]:
        """The JSON object that the command printed; raises StepFailed."""
        try:
            answer = json.loads(self.out)
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise StepFailed(f"the command printed no JSON object:\n{self.text[-1500:]}")
        return answer


@dataclass
class Stage:
    """The folder of this run, its table and its processes; use as a context manager, whose end ends every process."""

    folder: Path
    rows: list[Row] = field(default_factory=list)
    running: list[subprocess.Popen[bytes]] = field(default_factory=list)
    inside: list[str] = field(default_factory=list)
    count: int = 0
    shown: list[str] = field(default_factory=list)
    logs: dict[int, Path] = field(default_factory=dict)

    def __enter__(self) -> Stage:
        os.umask(0o022)
        self.folder.mkdir(parents=True)
        (self.folder / "logs").mkdir()
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        return self

    def __exit__(self, *_: object) -> None:
        for process in reversed(self.running):
            self.stop(process)
        for pid in _descendants(os.getpid()):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, 0)[0]:
                pass

    @property
    def is_root(self) -> bool:
        """Whether the demo may change user."""
        return os.geteuid() == 0

    @contextlib.contextmanager
    def step(self, name: str) -> Iterator[Row]:
        """One step: timed, its command shown, its failure kept for the table (and raised); set `.size` and `.note` on what it yields."""
        row = Row(name, 0.0, 0, False)
        self.rows.append(row)
        self.shown.clear()
        begun = time.monotonic()
        try:
            yield row
            row.ok = True
        except StepFailed as error:
            row.note = str(error).splitlines()[0][:160]
            raise
        finally:
            row.seconds = time.monotonic() - begun
            self._say(row)

    def _say(self, row: Row) -> None:
        print(_line(len(self.rows), row), flush=True)
        for command in self.shown:
            print(f"        $ {command}", flush=True)

    def show(self, argv: Sequence[str], env: dict[str, str]) -> None:
        """Remembers the command as a user would type it; secrets are cut."""
        parts = [f"{k}={_veil(k, v)}" for k, v in env.items() if k.startswith(("NIM_", "NGC_", "AIRLOCK_", "HF_E"))]
        text = " ".join([*parts, shlex.join([Path(argv[0]).name, *argv[1:]])])
        self.shown.append(text.replace(str(self.folder) + "/", "").replace(str(ROOT) + "/", ""))

    def run(
        self,
        argv: Sequence[str],
        *,
        env: dict[str, str] | None = None,
        expect: int | None = 0,
        closed: bool = False,
        uid: int = 0,
        quiet: bool = False,
        timeout: float = 600,
    ) -> Done:
        """Runs a command to its end (in the closed side's namespace, as another user, where asked) and demands its exit status."""
        self.count += 1
        extra = env or {}
        if not quiet:
            self.show(argv, extra)
        try:
            done = subprocess.run(
                [*self._wrap(closed, uid), *argv],
                capture_output=True,
                text=True,
                errors="replace",
                env=self._environment(extra, uid),
                cwd=ROOT,
                timeout=timeout,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise StepFailed(f"{KEY.sub('nvapi-…', shlex.join(argv))} did not end in {timeout:.0f} s") from error
        name = "-".join(Path(a).name for a in argv[:3] if not a.startswith("-"))[:40]
        (self.folder / "logs" / f"{self.count:02d}-{name}.log").write_text(
            KEY.sub("nvapi-…", f"exit {done.returncode}\n--- out\n{done.stdout}\n--- err\n{done.stderr}\n")
        )
        if expect is not None and done.returncode != expect:
            raise StepFailed(
                f"{Path(argv[0]).name} {' '.join(argv[1:3])}: exit {done.returncode}, expected {expect}\n{(done.stdout + done.stderr)[-3000:]}"
            )
        return Done(done.returncode, done.stdout, done.stderr)

    def start(
        self, argv: Sequence[str], url: str, *, env: dict[str, str] | None = None, closed: bool = False, uid: int = 0, timeout: float = 60
    ) -> subprocess.Popen[bytes]:
        """Starts a server and waits until `url` answers 200 to 499; raises StepFailed with the end of its log when it ends before."""
        self.count += 1
        extra = env or {}
        self.show(argv, extra)
        log = self.folder / "logs" / f"{self.count:02d}-{'-'.join(Path(a).name for a in argv[:3])[:40]}.log"
        with log.open("wb") as out:
            process = subprocess.Popen(
                [*self._wrap(closed, uid), *argv], stdout=out, stderr=out, env=self._environment(extra, uid), cwd=ROOT, start_new_session=True
            )
        self.running.append(process)
        self.logs[process.pid] = log
        self.wait(process, url, closed=closed, timeout=timeout)
        return process

    def wait(self, process: subprocess.Popen[bytes], url: str, *, closed: bool = False, timeout: float = 60) -> None:
        """Waits until `url` answers below 500; raises StepFailed with the end of the server's log when it ends or stays silent."""
        log = self.logs[process.pid]
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            if process.poll() is not None:
                raise StepFailed(f"{log.stem} ended with {process.returncode}\n{log.read_text(errors='replace')[-3000:]}")
            if self.answers(url, closed):
                return
            time.sleep(0.2)
        raise StepFailed(f"{url} did not answer in {timeout:.0f} s\n{log.read_text(errors='replace')[-3000:]}")

    def answers(self, url: str, closed: bool) -> bool:
        """Whether an HTTP GET of `url`, made from the side asked for, gets an answer below 500."""
        if closed and self.inside:
            probe = [*self.inside, str(PYTHON), "-m", "demo.client", "probe", url]
            return subprocess.run(probe, capture_output=True, cwd=ROOT, check=False).returncode == 0
        return probe_url(url)

    def stop(self, process: subprocess.Popen[bytes], patience: float = 20) -> int:
        """Ends one server: politely, then by force with its whole group."""
        if process.poll() is None:
            process.terminate()
        try:
            return process.wait(patience)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            return process.wait()

    def close_off(self) -> str:
        """Makes the closed side: a network namespace with a loopback and no route; returns why not, or an empty text."""
        user = ["unshare", "-n"] if os.geteuid() == 0 else ["unshare", "-Un", f"--map-user={UID}", "--keep-caps"]
        holder = subprocess.Popen(
            [*user, "sh", "-c", "ip link set lo up && echo up && exec sleep infinity"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        self.running.append(holder)
        assert holder.stdout and holder.stderr
        if holder.stdout.readline().strip() != b"up":
            return holder.stderr.read().decode(errors="replace").strip() or "the namespace could not be made"
        as_user = [] if os.geteuid() == 0 else ["-U", "--preserve-credentials"]
        self.inside = ["nsenter", "-t", str(holder.pid), "-n", *as_user, "--"]
        return ""

    def _wrap(self, closed: bool, uid: int) -> list[str]:
        wrap = list(self.inside) if closed else []
        if uid and os.geteuid() == 0:
            wrap += ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups", "--inh-caps=-all"]
        return wrap

    def _environment(self, extra: dict[str, str], uid: int) -> dict[str, str]:
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("NIM_", "NGC_", "AIRLOCK_", "HF_", "OPENAI_"))}
        home = self.folder / ("closed/home" if uid else "home")
        home.mkdir(parents=True, exist_ok=True)
        if uid and os.geteuid() == 0:
            os.chown(home, uid, uid)
        return {**kept, "HOME": str(home), "PATH": f"{BIN}:{kept.get('PATH', '')}", "NO_PROXY": "127.0.0.1,localhost", **extra}

    def table(self) -> bool:
        """Prints the table; whether every row held."""
        print("\n" + "-" * 110)
        for number, row in enumerate(self.rows, 1):
            print(_line(number, row))
        print("-" * 110)
        return all(row.ok for row in self.rows)


def probe_url(url: str) -> bool:
    """Whether an HTTP GET is answered with a status below 500."""
    try:
        urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=5).close()
    except urllib.error.HTTPError as error:
        return error.code < 500
    except OSError:
        return False
    return True


def _line(number: int, row: Row) -> str:
    size = human(row.size) if row.size else ""
    return f"{'ok  ' if row.ok else 'FAIL'} {number:2d}. {row.name:<62} {row.seconds:7.1f} s {size:>10}  {row.note}"


def _veil(name: str, value: str) -> str:
    return value[:10] + "…" if name.endswith("KEY") and len(value) > 10 else shlex.quote(value)


def _descendants(pid: int) -> list[int]:
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*"):
        with contextlib.suppress(OSError):
            children = [int(c) for c in (task / "children").read_text().split()]
            for child in children:
                found += [*_descendants(child), child]
    return found
