"""A real nginx from the system's package in front of a running registry, with the configuration that docs/operations.md gives to operators.

It imports no project code; one nginx a test, ended by the process that was started.
"""

from __future__ import annotations

import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.conftest import missing, stop

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


def locations(document: Path, app: str, blobs: Path) -> str:
    """The locations of the first nginx block of the operator's document, with its example values replaced by those of a test."""
    block = document.read_text().split("```nginx\n", 1)[1].split("```", 1)[0]
    assert "http://127.0.0.1:5000" in block and "/srv/airlock/blobs/" in block, "the document's example changed"
    return block.replace("http://127.0.0.1:5000", app).replace("/srv/airlock/blobs/", f"{blobs}/")


@contextmanager
def serving(document: Path, app: str, blobs: Path) -> Iterator[str]:
    """The URL of an nginx before `app` that may send files below `blobs`."""
    program = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
    if not program:
        missing("nginx (Debian package nginx-light)")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = int(s.getsockname()[1])
    with tempfile.TemporaryDirectory(prefix="airlock-nginx-") as folder:
        d = Path(folder)
        user = "user root;" if Path("/proc/self").stat().st_uid == 0 else ""  # the blobs belong to whoever runs the tests
        (d / "nginx.conf").write_text(_CONF.format(d=d, port=port, user=user, locations=locations(document, app, blobs)))
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
