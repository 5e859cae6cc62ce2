"""One model file of 4 GiB pulled whole from one server by each door's own client, turns taken: seconds on the wall, the server's CPU.

The clients are the unmodified ones, `hf download`, PyPI's oras and skopeo, and curl on both doors' routes: curl does the least with the bytes,
so that its two lines compare the doors and the others compare what a user waits for.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from _load import GIB, random_file
from _servers import Server, airlock, scratch
from _table import Report, arguments

MODEL, PLACE = "bench/big", "weights.safetensors"
WITHIN = 1.10  # of the OCI door's seconds
ORAS = """
import sys
import oras.client
target, to = sys.argv[1:]
client = oras.client.OrasClient(hostname=target.partition("/")[0], insecure=True, auth_backend="basic")
client.login(username="$oauthtoken", password=sys.stdin.read(), hostname=target.partition("/")[0], tls_verify=False)
client.pull(target=target, outdir=to)
"""


def clients(server: Server, digest: str, to: Path) -> dict[str, tuple[list[str], str]]:
    """Each client's command that leaves the file below `to`, and what it reads from its standard input (the key, where it takes it so)."""
    at, key, programs = f"127.0.0.1:{server.port}", server.auth.removeprefix("Bearer "), Path(sys.executable).parent
    curl = ["curl", "-sSfL", "-H", f"Authorization: {server.auth}", "-o", str(to / PLACE)]
    return {
        "hf download": ([str(programs / "hf"), "download", MODEL, "--revision", "1", "--local-dir", str(to), "--token", key], ""),
        "oras pull": ([sys.executable, "-c", ORAS, f"{at}/{MODEL}:1", str(to)], key),
        "skopeo copy": (
            ["skopeo", "copy", "--src-tls-verify=false", f"--src-creds=$oauthtoken:{key}", f"docker://{at}/{MODEL}:1", f"dir:{to / 'image'}"],
            "",
        ),
        "curl, Hub route": ([*curl, f"http://{at}/{MODEL}/resolve/1/{PLACE}"], ""),
        "curl, OCI route": ([*curl, f"http://{at}/v2/{MODEL}/blobs/{digest}"], ""),
    }


def pull(server: Server, command: list[str], given: str, home: Path) -> tuple[float, float]:
    """Seconds on the wall and CPU-seconds of the server for one pull by one client that keeps nothing of an earlier one."""
    env = {**os.environ, "HOME": str(home), "HF_HOME": str(home / "hf"), "HF_ENDPOINT": f"http://127.0.0.1:{server.port}", "HF_HUB_DISABLE_XET": "1"}
    cpu, begun = server.cpu(), time.perf_counter()
    done = subprocess.run(command, input=given, env=env, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - begun
    if done.returncode:
        raise RuntimeError(f"{command[0]} ended with {done.returncode}: {done.stderr[-1000:]}")
    return seconds, server.cpu() - cpu


def main() -> None:
    """Measures, prints."""
    args = arguments(__doc__.splitlines()[0])
    size = GIB // 4 if args.quick else 4 * GIB
    report = Report("One file by each door's client", ("client", "s", "MB/s", "CPU-s/GiB of the server"))
    best: dict[str, float] = {}
    with scratch() as folder, airlock(folder / "ours") as server:
        source = folder / "model"
        source.mkdir()
        with random_file(source / PLACE, size).open("rb") as file:
            digest = "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()
        env = {**os.environ, "AIRLOCK_KEY": server.auth.removeprefix("Bearer "), "AIRLOCK_REGISTRY": f"http://127.0.0.1:{server.port}"}
        push = [str(Path(sys.executable).parent / "airlock"), "model", "push", str(source), f"{MODEL}:1"]
        subprocess.run(push, env=env, check=True, capture_output=True)
        shutil.rmtree(source)
        for _round in range(args.rounds):
            for name in clients(server, digest, folder):
                to = folder / "pulled"
                to.mkdir()
                command, given = clients(server, digest, to)[name]
                seconds, cpu = pull(server, command, given, to / "home")
                shutil.rmtree(to)
                report.row(name, seconds, f"{size / seconds / 1e6:.0f}", cpu / (size / GIB))
                best[name] = min(seconds, best.get(name, seconds))
    for other in ("oras pull", "skopeo copy"):
        report.at_most(f"seconds of hf download against {other}", best["hf download"] / best[other], WITHIN)
    report.at_most("seconds of the Hub route against the OCI route, curl", best["curl, Hub route"] / best["curl, OCI route"], WITHIN)
    report.show(args.json)


if __name__ == "__main__":
    main()
