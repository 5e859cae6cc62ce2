"""Starts what is compared, each on a free loopback port with an empty folder: `airlock registry serve`, Debian's docker-registry, nginx in front.

Here because every benchmark must measure the same servers in the same way: the CPU time and memory of a server's own processes, never the client's.
It sends no load and judges nothing. Servers end with their block.
"""

from __future__ import annotations

import base64
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from artifact.grant import Grant
from registry.catalog import ensure_org
from registry.home import Home
from registry.settings import Settings
from registry.wiring import open_site

TICK = os.sysconf("SC_CLK_TCK")
START_S = 60
ORG = "bench"


@dataclass
class Server:
    """A running server, or several that answer together: where it listens, how a client proves itself, and which processes are its own."""

    name: str
    port: int
    pids: list[int]
    auth: str = ""
    folder: Path = field(default_factory=Path)
    log: Path = field(default_factory=Path)

    def cpu(self) -> float:
        """CPU-seconds of its processes and their children so far."""
        return sum(_cpu(pid) for pid in _family(self.pids))

    def rss_mib(self, peak: bool = False) -> float:
        """Resident memory of its processes in MiB; `peak` since each started, as the kernel counts it (VmHWM)."""
        word = "VmHWM:" if peak else "VmRSS:"
        return sum(_status(pid, word) for pid in _family(self.pids)) / 1024


def _family(pids: list[int]) -> list[int]:
    found = list(pids)
    for pid in found:  # grows while it is walked
        try:
            for task in Path(f"/proc/{pid}/task").iterdir():
                found += [int(p) for p in (task / "children").read_text().split() if int(p) not in found]
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def _cpu(pid: int) -> float:
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    return sum(int(n) for n in text.rpartition(") ")[2].split()[11:13]) / TICK  # utime and stime


def _status(pid: int, word: str) -> int:
    try:
        return next((int(line.split()[1]) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith(word)), 0)
    except (FileNotFoundError, ProcessLookupError):
        return 0


def free_port() -> int:
    """A loopback port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def scratch() -> Iterator[Path]:
    """A folder that goes with the block; AIRLOCK_BENCH_DIR names the disk to be measured, which must not be a memory file system."""
    with tempfile.TemporaryDirectory(prefix="airlock-bench-", dir=os.environ.get("AIRLOCK_BENCH_DIR")) as folder:
        yield Path(folder)


@contextmanager
def _process(argv: list[str], log: Path, env: dict[str, str] | None = None) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("ab") as out:
        process = subprocess.Popen(argv, stdout=out, stderr=out, env={**os.environ, **(env or {})})
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _listening(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    until = time.monotonic() + START_S
    while time.monotonic() < until:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        if process.poll() is not None:
            break
        time.sleep(0.05)
    raise RuntimeError(f"the server did not start: {log.read_text(errors='replace')[-1000:]}")


def _basic(user: str, password: str) -> str:
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


@contextmanager
def airlock(folder: Path, name: str = "airlock", fill: Callable[[str], None] | None = None, **env: str) -> Iterator[Server]:
    """`airlock registry serve` over a site with one key that may push and pull below `bench/`; settings as AIRLOCK_… variables.

    `fill` is given the URL of the database, once it has its tables and the organisation, before the server starts.
    """
    data, log = folder / "data", folder / "airlock.log"
    folder.mkdir(parents=True, exist_ok=True)
    environment = {"AIRLOCK_LOG_LEVEL": "info", "AIRLOCK_DRAIN_TIMEOUT_S": "2", **env}
    settings = Settings.load(data, environ=environment)
    if not data.exists():
        Home.open(data, create=True)
    with open_site(settings, background=False) as site, site.catalog.writing() as conn:
        now = time.time()
        org = ensure_org(conn, ORG, now)
        grant = Grant((f"{ORG}/**",), ("pull", "push"))
        key = site.entitlements.add_key(conn, org, tier="enterprise", grant=grant, expires=now + 86400, at=now)[1]
    if fill is not None:
        fill(settings.database_url)
    port = free_port()
    argv = [sys.executable, "-m", "artifact.cli", "registry", "serve", "--data", str(data), "--port", str(port)]
    with _process(argv, log, environment) as process:
        _listening(port, process, log)
        yield Server(name, port, [process.pid], f"Bearer {key}", data, log)


def _bcrypt(password: str) -> str:
    """The cheapest hash that docker-registry accepts, cost 4: its users pay at least this much."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        import crypt
    return crypt.crypt(password, "$2b$04$" + secrets.token_hex(11))


@contextmanager
def docker_registry(folder: Path, password: bool = False) -> Iterator[Server]:
    """Debian's docker-registry on a directory; `password` turns its htpasswd authentication on."""
    binary = shutil.which("docker-registry")
    if binary is None:
        raise RuntimeError("docker-registry is not installed; do: apt-get install docker-registry")
    folder.mkdir(parents=True, exist_ok=True)
    port, config, log = free_port(), folder / "config.yml", folder / "registry.log"
    auth, header = "", ""
    if password:
        (folder / "htpasswd").write_text(f"bench:{_bcrypt('bench')}\n")
        auth, header = f"auth: {{htpasswd: {{realm: bench, path: '{folder / 'htpasswd'}'}}}}\n", _basic("bench", "bench")
    config.write_text(
        "version: 0.1\n"
        f"storage: {{filesystem: {{rootdirectory: '{folder / 'store'}'}}, delete: {{enabled: true}}}}\n"
        f"http: {{addr: '127.0.0.1:{port}'}}\n{auth}"
        "log: {accesslog: {disabled: false}, level: info}\n"
    )
    with _process([binary, "serve", str(config)], log) as process:
        _listening(port, process, log)
        yield Server("docker-registry" + (" htpasswd" if password else ""), port, [process.pid], header, folder, log)


NGINX = """
daemon off; pid {folder}/nginx.pid; error_log {folder}/error.log; worker_processes 2; {user}
events {{ worker_connections 1024; }}
http {{
  access_log {folder}/access.log; sendfile on; tcp_nopush on;
  client_body_temp_path {folder}/t1; proxy_temp_path {folder}/t2; fastcgi_temp_path {folder}/t3;
  uwsgi_temp_path {folder}/t4; scgi_temp_path {folder}/t5;
  server {{
    listen 127.0.0.1:{port};
    location /plain/ {{ alias {blobs}/; default_type application/octet-stream; }}
    location /internal/ {{ internal; alias {blobs}/; }}
    location / {{
      proxy_pass http://127.0.0.1:{upstream}; proxy_http_version 1.1; proxy_request_buffering off; client_max_body_size 0;
      proxy_set_header Host $http_host; proxy_set_header Connection "";
    }}
  }}
}}
"""


@contextmanager
def nginx(folder: Path, upstream: Server, blobs: Path) -> Iterator[Server]:
    """nginx in front of a server: `/plain/` sends files itself, the rest is passed on and X-Accel-Redirect below `/internal/` is obeyed.

    Counts as one server with its upstream; the pids without the upstream's are the first of `pids`.
    """
    binary = shutil.which("nginx") or "/usr/sbin/nginx"
    folder.mkdir(parents=True, exist_ok=True)
    port, config, log = free_port(), folder / "nginx.conf", folder / "nginx.log"
    user = "user root;" if os.getuid() == 0 else ""
    config.write_text(NGINX.format(folder=folder, port=port, upstream=upstream.port, blobs=blobs, user=user))
    with _process([binary, "-p", str(folder), "-e", str(folder / "error.log"), "-c", str(config)], log) as process:
        _listening(port, process, log)
        yield Server(f"nginx <- {upstream.name}", port, [process.pid, *upstream.pids], upstream.auth, folder, log)
