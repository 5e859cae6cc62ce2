"""A real PostgreSQL from the system's packages for tests: one server a worker, one database a test, made from a migrated template.

It imports no project code and touches no server that it did not start. As root it runs the server under another uid, which PostgreSQL demands.
"""

from __future__ import annotations

import atexit
import fcntl
import functools
import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psycopg

from tests.conftest import find_port, missing

NOBODY = 65534
WAIT_S = 60
TMP = Path("/tmp")  # the socket's path may take 107 bytes, so the folder must be a short one
OPTIONS = "-c listen_addresses=127.0.0.1 -c fsync=off -c full_page_writes=off -c shared_buffers=32MB"


def programs() -> Path:
    """Where initdb and pg_ctl are: the newest version's folder, as Debian has it, or the one on PATH."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda p: float(p.parts[4]))
    on_path = shutil.which("initdb")
    if not found and not on_path:
        missing("PostgreSQL's server (package postgresql)")
    return found[-1].parent if found else Path(str(on_path)).parent


def _as_owner(*argv: str | Path) -> list[str]:
    """The command as a user whom PostgreSQL accepts."""
    plain = [str(a) for a in argv]
    return ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", *plain] if os.geteuid() == 0 else plain


def _run(*argv: str | Path, cwd: Path) -> None:
    """One of PostgreSQL's own commands to its end; what it says goes to a file, since a server that it leaves behind would hold a pipe open."""
    with (cwd / "commands.log").open("ab") as log:
        done = subprocess.run(_as_owner(*argv), stdout=log, stderr=log, stdin=subprocess.DEVNULL, cwd=cwd, timeout=WAIT_S, check=False)
    assert done.returncode == 0, f"{argv[0]} ended with {done.returncode}:\n{(cwd / 'commands.log').read_text()[-2000:]}"


@dataclass
class Postgres:
    """One server over a folder of its own; it may be stopped, killed and started again on the same data."""

    folder: Path
    port: int

    @classmethod
    def make(cls, *, connections: int = 300) -> Postgres:
        """A fresh server that is running; the caller ends it by remove()."""
        folder = Path(tempfile.mkdtemp(prefix="airlock-pg-", dir=TMP))
        if os.geteuid() == 0:
            os.chown(folder, NOBODY, NOBODY)
        _run(programs() / "initdb", "-D", folder / "d", "-A", "trust", "-U", "postgres", "--no-sync", "-E", "UTF8", "--locale=C", cwd=folder)
        with (folder / "d" / "postgresql.auto.conf").open("a") as conf:
            conf.write(f"max_connections = {connections}\n")
        server = cls(folder, find_port())
        server.start()
        return server

    def start(self) -> None:
        """Starts it on its port and waits until it accepts connections."""
        options = f"-p {self.port} -k {self.folder} " + OPTIONS
        _run(programs() / "pg_ctl", "-D", self.folder / "d", "-o", options, "-l", self.folder / "log", "-w", "start", cwd=self.folder)

    @property
    def pid(self) -> int:
        """The postmaster's process id; 0 when it is not running."""
        try:
            return int((self.folder / "d" / "postmaster.pid").read_text().split("\n", 1)[0])
        except (FileNotFoundError, ValueError):
            return 0

    def end(self, sign: signal.Signals = signal.SIGINT) -> None:
        """Ends it by pid: SIGINT is PostgreSQL's fast shutdown, SIGKILL a crash; waits until it is gone."""
        pid = self.pid
        if not pid:
            return
        family = [pid, *_children_of(pid)]  # children see the postmaster's death and leave; only then is the shared memory free
        with suppress(ProcessLookupError):
            os.kill(pid, sign)
        end = time.monotonic() + WAIT_S
        while time.monotonic() < end and any(map(_alive, family)):
            time.sleep(0.02)
        if sign == signal.SIGKILL:
            for lock in (self.folder / "d" / "postmaster.pid", self.folder / f".s.PGSQL.{self.port}.lock"):
                lock.unlink(missing_ok=True)  # they name a pid that a process nobody waited for may still hold

    def remove(self) -> None:
        """Ends it and removes its folder."""
        self.end()
        shutil.rmtree(self.folder, ignore_errors=True)

    def url(self, database: str, user: str = "postgres") -> str:
        """The URL of one of its databases."""
        return f"postgresql://{user}@127.0.0.1:{self.port}/{database}"

    def sql(self, statement: str, database: str = "postgres") -> None:
        """One statement by the superuser, outside a transaction."""
        with psycopg.connect(self.url(database), autocommit=True) as connection:
            connection.execute(statement.encode())

    def database(self, template: str = "template1") -> str:
        """The URL of a new database, a copy of a template."""
        name = f"t{uuid.uuid4().hex[:16]}"
        with self._lock():  # two copies of one template at once would fail
            self.sql(f'CREATE DATABASE "{name}" TEMPLATE "{template}"')
        return self.url(name)

    def drop(self, url: str) -> None:
        """Removes a database that `database` made, whoever is still connected."""
        self.sql(f'DROP DATABASE IF EXISTS "{url.rsplit("/", 1)[1]}" WITH (FORCE)')

    def template(self, name: str, fill: Callable[[str], None]) -> str:
        """The name of a database that `fill(url)` made, once a run, for copies by `database`."""
        assert re.fullmatch(r"[a-z0-9_]+", name)
        with self._lock():
            done = self.folder / f"template-{name}"
            if not done.exists():
                self.sql(f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)')
                self.sql(f'CREATE DATABASE "{name}"')
                fill(self.url(name))
                done.touch()
        return name

    @contextmanager
    def _lock(self) -> Iterator[None]:
        with (self.folder / "lock").open("a") as held:
            fcntl.flock(held, fcntl.LOCK_EX)
            yield


def _alive(pid: int) -> bool:
    """Whether a process runs; one that ended but that nobody waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in ("Z", "X")
    except (FileNotFoundError, ProcessLookupError, IndexError):
        return False


def _children_of(pid: int) -> list[int]:
    """The processes that a process started."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError, IndexError):
                if (entry / "stat").read_text().rsplit(")", 1)[1].split()[1] == str(pid):
                    found.append(int(entry.name))
    return found


@contextmanager
def _ledger() -> Iterator[dict[str, dict[str, object]]]:
    """The servers of this user's running tests, under a lock: the worker's pid to folder and port."""
    path = TMP / f"airlock-postgres-{os.geteuid()}.json"
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        text = file.read()
        known: dict[str, dict[str, object]] = json.loads(text) if text else {}
        yield known
        file.seek(0)
        file.truncate()
        file.write(json.dumps(known))


def _end(entry: dict[str, object]) -> None:
    Postgres(Path(str(entry["folder"])), int(str(entry["port"]))).remove()


@functools.cache
def shared() -> Postgres:
    """The server of this worker: snapshots see the transactions of all databases of a server, and the log waits for each, be it a vacuum's."""
    with _ledger() as known:
        for pid in [pid for pid in known if not _alive(int(pid))]:  # a killed run cleans up nothing itself
            _end(known.pop(pid))
        made = Postgres.make()
        known[str(os.getpid())] = {"folder": str(made.folder), "port": made.port}
    atexit.register(_leave, os.getpid())
    made.sql("ALTER SYSTEM SET autovacuum = off")
    made.sql("SELECT pg_reload_conf()")
    return made


def _leave(pid: int) -> None:
    if os.getpid() != pid:  # a forked child ends without the say of its parent
        return
    with _ledger() as known:
        if str(pid) in known:
            _end(known.pop(str(pid)))
