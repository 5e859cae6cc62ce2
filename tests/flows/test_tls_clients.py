"""The lines that a first start with TLS prints, done to the letter: docker, podman, skopeo, containerd and curl then trust this registry.

In namespaces of its own: docker trusts every registry on 127.0.0.0/8 unasked, so the server gets another address, on a loopback that nobody
else sees; and what is installed below /etc lands in a layer above it that goes with the test.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from artifact.clients import TRUST
from tests.conftest import missing
from tests.contracts.doors import Door, new_site
from tests.flows.test_clients import layout
from tests.flows.test_oci_clients import USER, Ran, find, run, short, start, stop, well

pytestmark = [pytest.mark.server, pytest.mark.full, pytest.mark.timeout(600)]
__all__ = ["short"]  # a fixture
HOST, PORT = "198.51.100.7", 5443
PLACE = f"{HOST}:{PORT}"
UNKNOWN = next(row.says for row in TRUST if row.client == "docker")  # all of them say so
APART = """
ip link set lo up && ip addr add "$2/32" dev lo && mkdir "$1/upper" "$1/work" &&
mount -t overlay none -o "lowerdir=/etc,upperdir=$1/upper,workdir=$1/work" /etc && echo ready && exec sleep 3600
"""


@dataclass
class Apart:
    """A network and an /etc of their own, the registry that runs there, and what it printed."""

    pid: int
    door: Door
    told: list[str]

    def argv(self, *words: str) -> list[str]:
        return [find("nsenter"), "-t", str(self.pid), "-n", "-m", "--", *words]

    def run(self, home: Path, *words: str, given: str = "", **env: str) -> Ran:
        return run(self.door, home, *self.argv(*words), given=given, **env)

    def printed(self, who: str) -> str:
        """The command of one line, up to the remark behind it."""
        line = next(text for text in self.told if text.startswith(who + " "))
        return re.split(r"\s{3,}\(|, and ", line.removeprefix(who).strip())[0]

    def trust(self, home: Path, who: str) -> None:
        well(self.run(home, "sh", "-c", f"cd {home} && {self.printed(who)}"))


@pytest.fixture(scope="module")
def apart(short: Path) -> Iterator[Apart]:
    if os.geteuid() or not shutil.which("nsenter"):
        missing("root and nsenter: the clients read what they trust below /etc")
    data = short / "data"
    keys = new_site(data)
    with ExitStack() as stack:
        argv = ["unshare", "-nm", "--propagation", "private", "sh", "-c", APART, "sh", str(short), HOST]
        holder = stack.enter_context(subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
        stack.callback(holder.kill)
        assert holder.stdout is not None
        said = holder.stdout.readline()
        if said != "ready\n":
            missing(f"a kernel with namespaces and overlay mounts; it said: {said[:200]}")
        log = short / "server.log"
        command = ["nsenter", "-t", str(holder.pid), "-n", "--", str(Path(sys.executable).parent / "airlock"), "registry", "serve"]
        env = {**os.environ, "AIRLOCK_TLS": "self-signed", "AIRLOCK_HOST": HOST, "PYTHONUNBUFFERED": "1"}
        with log.open("w") as err:
            server = subprocess.Popen([*command, "--data", str(data), "--port", str(PORT)], stdout=subprocess.PIPE, stderr=err, text=True, env=env)
        stack.callback(stop, server)
        assert server.stdout is not None
        told: list[str] = []
        while not told or not told[-1].startswith("airlock"):  # the last line of what is printed about trust
            line = server.stdout.readline()
            assert line, log.read_text()
            told.append(line.rstrip("\n"))
        shutil.copy(data / "tls" / "cert.pem", short / "ca.crt")
        yield Apart(holder.pid, Door(data, server, PORT, keys, log), told)


@pytest.fixture(scope="module")
def image(apart: Apart, short: Path) -> str:
    """The digest of acme/tls/bb:1, pushed by skopeo after the line for podman was done; before that the push is refused."""
    digest, _raw = layout(short / "layout")
    creds = f"--dest-creds={USER}:{apart.door.keys['acme']}"
    argv = [find("skopeo"), "--insecure-policy", "copy", "--preserve-digests", creds, f"oci:{short}/layout:1", f"docker://{PLACE}/acme/tls/bb:1"]
    distrusted = apart.run(short, *argv)
    assert distrusted.returncode and UNKNOWN in distrusted.said, distrusted.said
    apart.trust(short, "podman")
    well(apart.run(short, *argv))
    return digest


def test_docker(apart: Apart, short: Path, image: str) -> None:
    folder = short / "d"
    folder.mkdir()
    argv = [find("dockerd"), "--host", f"unix://{folder}/s", "--data-root", f"{folder}/data", "--exec-root", f"{folder}/x"]
    argv += ["--pidfile", f"{folder}/pid", "--iptables=false", "--ip6tables=false", "--bridge=none"]

    def docker(*words: str, given: str = "") -> Ran:
        return run(apart.door, folder, find("docker"), *words, given=given, DOCKER_HOST=f"unix://{folder}/s", DOCKER_CONFIG=str(folder))

    daemon = start(apart.argv(*argv), folder / "log", lambda: (folder / "s").exists() and docker("version").returncode == 0, "a docker daemon")
    try:
        login = ("login", "-u", USER, "--password-stdin", PLACE)
        distrusted = docker(*login, given=apart.door.keys["acme"])
        assert distrusted.returncode and UNKNOWN in distrusted.said, distrusted.said
        apart.trust(short, "docker")
        well(docker(*login, given=apart.door.keys["acme"]))
        assert image in well(docker("pull", f"{PLACE}/acme/tls/bb:1"))
        well(docker("tag", f"{PLACE}/acme/tls/bb:1", f"{PLACE}/acme/tls/docker:1"))
        well(docker("push", f"{PLACE}/acme/tls/docker:1"))
    finally:
        stop(daemon)


def test_podman(apart: Apart, short: Path, image: str) -> None:
    store = ["--root", f"{short}/p/s", "--runroot", f"{short}/p/r", "--storage-driver", "vfs", "--cgroup-manager=cgroupfs", "--runtime=runc"]
    podman: Callable[..., Ran] = lambda *words: apart.run(short, find("podman"), *store, *words)  # noqa: E731
    well(podman("pull", "--quiet", "--creds", f"{USER}:{apart.door.keys['acme']}", f"{PLACE}/acme/tls/bb:1"))
    assert image in well(podman("inspect", "--format", "{{.Digest}}", f"{PLACE}/acme/tls/bb:1"))


def test_containerd(apart: Apart, short: Path, image: str) -> None:
    folder = short / "c"
    folder.mkdir()
    argv = [find("containerd"), "--root", f"{folder}/root", "--state", f"{folder}/state", "--address", f"{folder}/s"]
    ctr: Callable[..., Ran] = lambda *words: apart.run(folder, find("ctr"), "-a", f"{folder}/s", *words)  # noqa: E731
    daemon = start(apart.argv(*argv), folder / "log", lambda: (folder / "s").exists() and ctr("version").returncode == 0, "containerd")
    try:
        pull = ("images", "pull", "--hosts-dir", "/etc/containerd/certs.d", "-u", f"{USER}:{apart.door.keys['acme']}", f"{PLACE}/acme/tls/bb:1")
        distrusted = ctr(*pull)
        assert distrusted.returncode and UNKNOWN in distrusted.said, distrusted.said
        apart.trust(short, "containerd")
        at = next(n for n, text in enumerate(apart.told) if text.startswith("containerd "))
        hosts = "\n".join(text.strip() for text in apart.told[at + 1 : at + 4])
        assert hosts.startswith("server = ") and "\nca = " in hosts
        well(apart.run(short, "sh", "-c", f"cat > /etc/containerd/certs.d/{PLACE}/hosts.toml", given=hosts + "\n"))
        well(ctr(*pull))
        assert image in well(ctr("images", "ls"))
    finally:
        stop(daemon)


def test_curl_and_the_fingerprint(apart: Apart, short: Path) -> None:
    find("curl")
    assert "ok" in well(apart.run(short, "sh", "-c", f"cd {short} && {apart.printed('curl')} -sS")).lower()
    shown = well(apart.run(short, "sh", "-c", f"cd {short} && {apart.printed('copy').partition('compare: ')[2]}"))
    assert shown.strip().rpartition("=")[2] in "\n".join(apart.told)
