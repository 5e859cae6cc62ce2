"""A real nginx from the system's package in front of a running registry, with the configuration that docs/operations.md gives to operators.

It imports no project code; one nginx a test, ended by the process that was started.
"""

from __future__ import annotations

import grp
import os
import pwd
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.conftest import find_port, missing, stop

WAIT_S = 60

_CONF = """daemon off;
worker_processes 1;
pid {d}/nginx.pid;
error_log {d}/error.log;
{user}
events {{ worker_connections 512; }}
http {{
    access_log off;
    client_body_temp_path {d}/t1; proxy_temp_path {d}/t2; fastcgi_temp_path {d}/t3; uwsgi_temp_path {d}/t4; scgi_temp_path {d}/t5;
    server {{
        listen 127.0.0.1:{port};
{locations}
    }}
}}
"""


def owner() -> str:
    """Who runs the registry and nginx's workers in a test: as the document says one user, and not root where that can be helped."""
    own = pwd.getpwuid(os.geteuid()).pw_name
    if own != "root":
        return own
    argv = [str(Path(sys.executable).parent / "airlock"), "--help"]
    try:
        ran = subprocess.run(argv, user="nobody", group="nogroup", extra_groups=[], capture_output=True, timeout=WAIT_S, check=False, cwd="/")
    except OSError:
        return own  # a checkout that nobody else may read
    return own if ran.returncode else "nobody"


def locations(document: Path, app: str, blobs: Path) -> str:
    """The locations of the first nginx block of the operator's document, with its example values replaced by those of a test."""
    block = document.read_text().split("```nginx\n", 1)[1].split("```", 1)[0]
    assert "http://127.0.0.1:5000" in block and "/srv/airlock/blobs/" in block, "the document's example changed"
    return block.replace("http://127.0.0.1:5000", app).replace("/srv/airlock/blobs/", f"{blobs}/")


@contextmanager
def serving(document: Path, app: str, blobs: Path, user: str) -> Iterator[str]:
    """The URL of an nginx before `app` that may send files below `blobs` where `user`, as whom its workers run, may read them."""
    program = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
    if not program:
        missing("nginx (Debian package nginx-light)")
    port = find_port()
    with tempfile.TemporaryDirectory(prefix="airlock-nginx-") as folder:
        d = Path(folder)
        d.chmod(0o755)
        workers = f"user {user} {grp.getgrgid(pwd.getpwnam(user).pw_gid).gr_name};" if os.geteuid() == 0 else ""  # others cannot change it
        (d / "nginx.conf").write_text(_CONF.format(d=d, port=port, user=workers, locations=locations(document, app, blobs)))
        with (d / "out.log").open("wb") as log:
            process = subprocess.Popen([str(program), "-p", folder, "-c", f"{d}/nginx.conf"], stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        try:
            end = time.monotonic() + WAIT_S
            while time.monotonic() < end:
                assert process.poll() is None, (d / "out.log").read_text()
                with suppress(OSError):
                    socket.create_connection(("127.0.0.1", port), timeout=5).close()
                    break
                time.sleep(0.05)
            yield f"http://127.0.0.1:{port}"
        finally:
            stop(process)
