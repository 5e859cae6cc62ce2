"""The files of `airlock client config` on a node: containerd, its CRI, podman and docker pull `nvcr.io/nim/…` as manifests say it, with TLS and key.

In namespaces of their own (tests/flows/test_tls_clients.py): what is installed below /etc goes with the test, and no name of the internet resolves.
"""

from __future__ import annotations

import base64
import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from tests.conftest import airlock
from tests.flows.answered import gaps
from tests.flows.test_clients import layout
from tests.flows.test_oci_clients import USER, Ran, find, run, short, start, stop, well
from tests.flows.test_tls_clients import PLACE, Apart, apart

pytestmark = [pytest.mark.server, pytest.mark.full, pytest.mark.timeout(600)]
__all__ = ["apart", "short"]  # fixtures
IMAGES = ("nvcr.io/nim/acme/bb:1", "docker.io/library/bb:1")


@pytest.fixture(scope="module")
def digest(apart: Apart, short: Path) -> Iterator[str]:
    """The images' digest, pushed under their names; the keys go into apart.door.keys, so that no client may show one."""
    for who, patterns, actions in (("pusher", ["**"], "push,admin"), ("node", ["nvcr.io/nim/**", "docker.io/**"], "pull")):
        granted = [word for pattern in patterns for word in ("--models", pattern)]
        made = airlock("key", "create", "--data", str(apart.door.data), "--org", "acme", *granted, "--actions", actions, "--json").stdout
        apart.door.keys[who] = json.loads(made)["key"]
    found, _raw = layout(short / "layout")
    for image in IMAGES:
        argv = [find("skopeo"), "--insecure-policy", "copy", "--preserve-digests", f"--dest-creds={USER}:{apart.door.keys['pusher']}"]
        well(apart.run(short, *argv, "--dest-tls-verify=false", f"oci:{short}/layout:1", f"docker://{PLACE}/{image}"))
    yield found
    assert gaps(apart.door.log) == [], "a probe that no route took"


@pytest.fixture(scope="module")
def node(apart: Apart, short: Path, digest: str) -> Path:
    """A home with the files of home/, on a node whose /etc has those of etc/."""
    ca = ["--registry", f"https://{PLACE}", "--ca", str(short / "ca.crt"), "--to", str(short / "out")]
    airlock("client", "config", "containerd", "podman", "docker", "kubernetes", *ca, AIRLOCK_KEY=apart.door.keys["node"])
    well(apart.run(short, "cp", "-r", f"{short}/out/etc/.", "/etc/"))
    return short / "out" / "home"


def test_podman(apart: Apart, short: Path, digest: str, node: Path) -> None:
    store = ["--root", f"{short}/p/s", "--runroot", f"{short}/p/r", "--storage-driver", "vfs", "--cgroup-manager=cgroupfs", "--runtime=runc"]
    podman: Callable[..., Ran] = lambda home, *words: apart.run(home, find("podman"), *store, *words)  # noqa: E731
    nobody = podman(short / "p", "pull", "--quiet", IMAGES[0])
    assert nobody.returncode and "unauthorized" in nobody.said, nobody.said
    for image in IMAGES:
        well(podman(node, "pull", "--quiet", image))
        assert digest in well(podman(node, "inspect", "--format", "{{.Digest}}", image))


def test_docker(apart: Apart, short: Path, digest: str, node: Path) -> None:
    folder = short / "d"
    folder.mkdir()
    argv = [find("dockerd"), "--host", f"unix://{folder}/s", "--data-root", f"{folder}/data", "--exec-root", f"{folder}/x"]
    argv += ["--pidfile", f"{folder}/pid", "--iptables=false", "--ip6tables=false", "--bridge=none"]

    def docker(*words: str) -> Ran:
        return run(apart.door, node, *words, DOCKER_HOST=f"unix://{folder}/s")

    daemon = start(
        apart.argv(*argv), folder / "log", lambda: (folder / "s").exists() and docker(find("docker"), "version").returncode == 0, "a docker daemon"
    )
    try:
        assert docker(find("docker"), "pull", IMAGES[0]).returncode, "docker sends nvcr.io nowhere else, whatever it is told"
        well(docker(str(node / "bin" / "airlock-docker-pull"), *IMAGES))
        for image in IMAGES:
            assert digest in well(docker(find("docker"), "image", "inspect", "--format", "{{.RepoDigests}}", image))
    finally:
        stop(daemon)


@pytest.fixture(scope="module")
def containerd(apart: Apart, short: Path, node: Path) -> Iterator[Path]:
    """The folder of a daemon with the configuration that was generated."""
    folder = short / "c"
    folder.mkdir()
    config = folder / "config.toml"
    dirs = f'version = 2\nroot = "{folder}/root"\nstate = "{folder}/state"\nimports = ["/etc/containerd/airlock.toml"]\n'
    config.write_text(f'{dirs}[grpc]\n  address = "{folder}/s"\n')
    ready = lambda: (folder / "s").exists() and run(apart.door, folder, find("ctr"), "-a", f"{folder}/s", "version").returncode == 0  # noqa: E731
    daemon = start(apart.argv(find("containerd"), "--config", str(config)), folder / "log", ready, "containerd")
    try:
        yield folder
    finally:
        stop(daemon)


def test_containerd(apart: Apart, digest: str, containerd: Path) -> None:
    ctr: Callable[..., Ran] = lambda *words: apart.run(containerd, find("ctr"), "-a", f"{containerd}/s", *words)  # noqa: E731
    pull = ("images", "pull", "--hosts-dir", "/etc/containerd/certs.d")
    nobody = ctr(*pull, IMAGES[0])
    assert nobody.returncode and "may require authorization" in nobody.said, nobody.said
    for image in IMAGES:
        well(ctr(*pull, "-u", f"{USER}:{apart.door.keys['node']}", image))
        assert digest in well(ctr("images", "ls", f"name=={image}"))


def _field(number: int, data: bytes) -> bytes:
    """A length-delimited field of protobuf."""
    size, out = len(data), bytearray([number << 3 | 2])
    while size > 127:
        out.append(size & 127 | 128)
        size >>= 7
    return bytes(out) + bytes([size]) + data


def test_the_cri_of_a_kubernetes_node(apart: Apart, digest: str, containerd: Path, node: Path) -> None:
    """The call that a kubelet makes for a pod that says nvcr.io/nim/…, with the credentials that it takes out of the generated pull secret."""
    if "HTTP2" not in well(apart.run(containerd, find("curl"), "--version")):
        pytest.fail("curl without HTTP/2")
    secret = yaml.safe_load((node / "airlock-pull.yaml").read_text())["data"][".dockerconfigjson"]
    auth = json.loads(base64.b64decode(secret))["auths"]["nvcr.io"]["auth"]
    username, _, password = base64.b64decode(auth).decode().partition(":")

    def pull(*credentials: bytes) -> str:
        body = _field(1, _field(1, IMAGES[0].encode())) + (_field(2, _field(1, credentials[0]) + _field(2, credentials[1])) if credentials else b"")
        (containerd / "request").write_bytes(struct.pack(">BI", 0, len(body)) + body)
        argv = [find("curl"), "-sS", "--http2-prior-knowledge", "--unix-socket", f"{containerd}/s", "-D", "-", "-o", f"{containerd}/answer"]
        argv += ["-H", "content-type: application/grpc", "-H", "te: trailers", "--data-binary", f"@{containerd}/request"]
        return well(apart.run(containerd, *argv, "http://localhost/runtime.v1.ImageService/PullImage"))

    nobody = pull()
    assert "grpc-status: 0" not in nobody and "may require authorization" in nobody, nobody
    assert "grpc-status: 0" in pull(username.encode(), password.encode())
    listed = well(apart.run(containerd, find("ctr"), "-a", f"{containerd}/s", "-n", "k8s.io", "images", "ls", f"name=={IMAGES[0]}"))
    assert digest in listed, listed
