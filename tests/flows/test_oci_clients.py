"""Unmodified container clients against one registry with auth on: docker, containerd, podman, buildah, umoci and oras push, pull and run.

Each daemon is started by the test over a directory of its own and ended by it; no service of the machine is touched. A machine whose kernel or
rights let a daemon or a container not start fails under CI and is skipped elsewhere, with the client's own words.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import missing
from tests.contracts.doors import Door, new_site, serving, sha
from tests.contracts.oci_client import Client
from tests.flows.answered import accessed, gaps
from tests.flows.test_memory import Peak

pytestmark = [pytest.mark.server, pytest.mark.full, pytest.mark.timeout(900)]
PATHS = "/usr/bin:/usr/sbin:/bin:/sbin:" + os.environ.get("PATH", "")
USER = "$oauthtoken"
SAYS = "hello-from-scratch"
MIB = 1024 * 1024
READY_S, MAX_S = 60, 300


def find(name: str) -> str:
    """Debian's program of that name before any other, since the messages below are those of its versions."""
    found = shutil.which(name, path=PATHS)
    if not found:
        missing(name)
    return str(found)


@pytest.fixture(scope="module")
def door(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Door]:
    data = tmp_path_factory.mktemp("images") / "data"
    with serving(data, new_site(data)) as found:
        yield found
        assert gaps(found.log) == [], "a probe that no route took"


@pytest.fixture(scope="module")
def short() -> Iterator[Path]:
    """A short path: a socket's name has 108 bytes, and daemons put theirs deep."""
    with tempfile.TemporaryDirectory(prefix="alk", dir="/tmp", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def context(short: Path) -> Path:
    """What the image is built of: a static shell that prints one line, and two files that nobody else has."""
    folder = short / "context"
    folder.mkdir()
    busybox = find("busybox")
    (folder / "busybox").write_bytes(Path(busybox).read_bytes())
    (folder / "busybox").chmod(0o755)
    for name in ("a", "b"):
        (folder / name).write_bytes(os.urandom(3_000_000))
    lines = ["FROM scratch", "COPY busybox /bin/busybox", "COPY a /a", "COPY b /b", f'CMD ["/bin/busybox","echo","{SAYS}"]', ""]
    (folder / "Containerfile").write_text("\n".join(lines))
    return folder


class Ran(subprocess.CompletedProcess[str]):
    """A client's end with all it said."""

    @property
    def said(self) -> str:
        return self.stdout + self.stderr


def run(door: Door, home: Path, *argv: str, given: str = "", **env: str) -> Ran:
    """Runs a client with a home of its own; no client may show a key, whatever happens."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("DOCKER_", "CONTAINER", "REGISTRY_", "XDG_"))}
    where = {"PATH": PATHS, "HOME": str(home), "XDG_RUNTIME_DIR": str(home)}
    done = subprocess.run(argv, input=given, capture_output=True, text=True, timeout=MAX_S, env={**clean, **where, **env}, check=False)
    ran = Ran(argv, done.returncode, done.stdout, done.stderr)
    assert not any(key in ran.said for key in door.keys.values())
    if ran.returncode:
        print(f"{Path(argv[0]).name} ended with {ran.returncode}: {ran.said.strip()[-400:]}")
    return ran


def well(ran: Ran) -> str:
    assert ran.returncode == 0, ran.said
    return ran.said


def host(door: Door) -> str:
    return f"127.0.0.1:{door.port}"


def start(argv: list[str], log: Path, ready: Callable[[], bool], what: str) -> subprocess.Popen[bytes]:
    """Starts a daemon and waits until it answers; where it cannot run, says why in its own words."""
    with log.open("wb") as out:
        process = subprocess.Popen(argv, stdout=out, stderr=out, env={**os.environ, "PATH": PATHS})
    end = time.monotonic() + READY_S
    while not ready():
        if process.poll() is not None or time.monotonic() > end:
            stop(process)
            missing(f"{what} that can run here; it said: {log.read_text()[-600:]}")
        time.sleep(0.2)
    return process


def stop(process: subprocess.Popen[bytes]) -> None:
    """Ends a daemon and what it started, in its own process group's order: first politely."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def raw_of(door: Door, repo: str, ref: str, who: str = "acme") -> tuple[bytes, str]:
    """A manifest's bytes and type, read without any of the clients."""
    found = Client(door.port, door.keys[who]).manifest(repo, ref)
    assert found.status == 200, found.body
    return found.body, found.get("content-type")


# ---- docker


@pytest.fixture(scope="module")
def docker(door: Door, short: Path, context: Path) -> Iterator[Callable[..., Ran]]:
    """A function that runs docker against a daemon of its own, with the image bb:1 built."""
    folder, client = short / "d", find("docker")
    folder.mkdir()
    argv = [find("dockerd"), "--host", f"unix://{folder}/s", "--data-root", f"{folder}/data", "--exec-root", f"{folder}/x"]
    argv += ["--pidfile", f"{folder}/pid", "--iptables=false", "--ip6tables=false", "--bridge=none", "--insecure-registry", "127.0.0.0/8"]

    def call(*words: str, who: str = "", given: str = "", **env: str) -> Ran:
        home = folder / f"home-{who}"
        home.mkdir(exist_ok=True)
        return run(door, home, client, *words, given=given, DOCKER_HOST=f"unix://{folder}/s", DOCKER_CONFIG=str(home), **env)

    daemon = start(argv, folder / "log", lambda: (folder / "s").exists() and call("version").returncode == 0, "a docker daemon")
    try:
        built = call("build", "-f", f"{context}/Containerfile", "-t", "bb:1", str(context), DOCKER_BUILDKIT="0")
        if built.returncode:
            missing(f"a docker daemon that can build here; it said: {built.said[-600:]}")
        yield call
    finally:
        stop(daemon)


def test_docker_pushes_pulls_and_runs(door: Door, docker: Callable[..., Ran]) -> None:
    name = f"{host(door)}/acme/docker/bb:1"
    assert "Login Succeeded" in well(docker("login", "-u", USER, "--password-stdin", host(door), given=door.keys["acme"], who="acme"))
    well(docker("tag", "bb:1", name))
    seen = len(accessed(door.log))
    pushed = well(docker("push", name, who="acme"))
    raw, media_type = raw_of(door, "acme/docker/bb", "1")
    found = re.search(r"digest: (sha256:[0-9a-f]{64})", pushed)
    assert found and found[1] == sha(raw) and media_type == "application/vnd.docker.distribution.manifest.v2+json"
    log = accessed(door.log)[seen:]
    puts = [e for e in log if e["method"] == "PUT"]
    assert puts and all(e["status"] == 201 for e in puts), puts
    for layer in json.loads(raw)["layers"]:  # row 22: docker looks for each layer right after it was stored
        heads = [e["status"] for e in log if e["method"] == "HEAD" and str(e["path"]).endswith(layer["digest"])]
        assert heads[-1] == 200 and set(heads) <= {401, 404, 200}, heads
    well(docker("rmi", name))
    well(docker("rmi", "bb:1"))
    assert f"Digest: {sha(raw)}" in well(docker("pull", name, who="acme"))
    well(docker("tag", name, "bb:1"))
    ran = docker("run", "--rm", "--network=none", name)
    if ran.returncode:
        missing(f"a kernel on which docker may run a container; it said: {ran.said[-600:]}")
    assert SAYS in ran.stdout
    by_digest = well(docker("pull", f"{host(door)}/acme/docker/bb@{sha(raw)}", who="acme"))
    assert sha(raw) in by_digest


def test_docker_mounts_layers_between_repositories(door: Door, docker: Callable[..., Ran]) -> None:
    first, second = (f"{host(door)}/acme/docker/{n}:1" for n in ("from", "to"))
    well(docker("login", "-u", USER, "--password-stdin", host(door), given=door.keys["acme"], who="acme"))
    for name in (first, second):
        well(docker("tag", "bb:1", name))
    well(docker("push", first, who="acme"))
    said = well(docker("push", second, who="acme"))
    assert "Mounted from acme/docker/" in said, said
    assert raw_of(door, "acme/docker/from", "1") == raw_of(door, "acme/docker/to", "1")


def test_docker_is_refused_in_our_words(door: Door, docker: Callable[..., Ran]) -> None:
    name = f"{host(door)}/acme/docker/secret:1"
    well(docker("login", "-u", USER, "--password-stdin", host(door), given=door.keys["acme"], who="acme"))
    well(docker("tag", "bb:1", name))
    well(docker("push", name, who="acme"))
    for who in ("other", "reader"):
        well(docker("login", "-u", USER, "--password-stdin", host(door), given=door.keys[who], who=who))
    unseen = docker("pull", name, who="other")
    assert unseen.returncode and "name unknown" in unseen.said, unseen.said
    unentitled = docker("pull", name, who="reader")
    assert unentitled.returncode and "pull access denied" in unentitled.said and "denied: " in unentitled.said, unentitled.said
    assert "requested access to the resource is denied" not in unentitled.said, "the registry's own words are lost"
    nobody = docker("pull", name, who="nobody")
    assert nobody.returncode and re.search("denied|unauthorized", nobody.said), nobody.said
    well(docker("tag", "bb:1", f"{host(door)}/acme/open/tool:1"))
    pushed = docker("push", f"{host(door)}/acme/open/tool:1", who="reader")
    assert pushed.returncode and "denied" in pushed.said, pushed.said
    assert Client(door.port, door.keys["acme"]).manifest("acme/open/tool", "1").status == 404
    wrong = docker("login", "-u", USER, "--password-stdin", host(door), given="nvapi-" + "0" * 58, who="wrong")
    assert wrong.returncode and "unauthorized: " in wrong.said, wrong.said
    late = docker("login", "-u", USER, "--password-stdin", host(door), given=door.keys["expired"], who="wrong")
    assert late.returncode and "expired on" in late.said, late.said


def test_docker_stores_the_key_and_no_refresh_token(door: Door, docker: Callable[..., Ran], short: Path) -> None:
    """With an identity token docker would stop sending the key, and a revoked key would live on."""
    well(docker("login", "-u", USER, "--password-stdin", host(door), given=door.keys["acme"], who="stored"))
    stored = json.loads((short / "d" / "home-stored" / "config.json").read_text())["auths"][host(door)]
    assert stored.get("auth") and "identitytoken" not in stored


# ---- containerd


@pytest.fixture(scope="module")
def ctr(door: Door, short: Path) -> Iterator[Callable[..., Ran]]:
    folder, client = short / "c", find("ctr")
    folder.mkdir()
    argv = [find("containerd"), "--root", f"{folder}/root", "--state", f"{folder}/state", "--address", f"{folder}/s"]

    def call(*words: str) -> Ran:
        return run(door, folder, client, "-a", f"{folder}/s", *words)

    daemon = start(argv, folder / "log", lambda: (folder / "s").exists() and call("version").returncode == 0, "containerd")
    try:
        yield call
    finally:
        stop(daemon)


def creds(door: Door, who: str) -> list[str]:
    return ["--plain-http", "-u", f"{USER}:{door.keys[who]}"]


def test_containerd_pulls_pushes_and_runs(door: Door, ctr: Callable[..., Ran], built: Built) -> None:
    raw = built.push("acme/ctr/from:1")
    source, target = f"{host(door)}/acme/ctr/from:1", f"{host(door)}/acme/ctr/to:1"
    well(ctr("images", "pull", *creds(door, "acme"), source))
    assert sha(raw) in well(ctr("images", "ls"))
    well(ctr("images", "tag", source, target))
    well(ctr("images", "push", *creds(door, "acme"), target))
    assert raw_of(door, "acme/ctr/to", "1")[0] == raw
    ran = ctr("run", "--rm", "--net-host", source, "c1")
    if ran.returncode:
        missing(f"a kernel on which containerd may run a container; it said: {ran.said[-600:]}")
    assert SAYS in ran.stdout


def test_containerd_by_a_hosts_file(door: Door, ctr: Callable[..., Ran], built: Built, tmp_path: Path) -> None:
    """The form that Kubernetes nodes use: a folder per registry instead of flags."""
    built.push("acme/ctr/hosts:1")
    folder = tmp_path / host(door)
    folder.mkdir()
    (folder / "hosts.toml").write_text(f'server = "{door.url}"\n[host."{door.url}"]\n  capabilities = ["pull", "resolve", "push"]\n')
    name = f"{host(door)}/acme/ctr/hosts:1"
    well(ctr("images", "pull", "--hosts-dir", str(tmp_path), "-u", f"{USER}:{door.keys['acme']}", name))


def test_containerd_is_refused(door: Door, ctr: Callable[..., Ran], built: Built) -> None:
    built.push("acme/ctr/secret:1")
    name = f"{host(door)}/acme/ctr/secret:1"
    for who, words in (("other", "not found"), ("reader", "403 Forbidden"), ("expired", "401 Unauthorized")):
        refused = ctr("images", "pull", *creds(door, who), name)
        assert refused.returncode and words in refused.said, refused.said
    nobody = ctr("images", "pull", "--plain-http", name)
    assert nobody.returncode and re.search("authorization|401 Unauthorized", nobody.said), nobody.said
    built.push("acme/open/ctr:1")
    well(ctr("images", "pull", *creds(door, "reader"), f"{host(door)}/acme/open/ctr:1"))
    well(ctr("images", "tag", f"{host(door)}/acme/open/ctr:1", f"{host(door)}/acme/open/ctr:2"))
    pushed = ctr("images", "push", *creds(door, "reader"), f"{host(door)}/acme/open/ctr:2")
    assert pushed.returncode and re.search("denied|403|insufficient_scope|authorization", pushed.said), pushed.said
    assert Client(door.port, door.keys["acme"]).manifest("acme/open/ctr", "2").status == 404


# ---- podman and buildah over one store


class Built:
    """The image built by buildah, in a store that podman reads too."""

    def __init__(self, door: Door, folder: Path, context: Path) -> None:
        self.door, self.folder = door, folder
        self.store = ["--root", f"{folder}/s", "--runroot", f"{folder}/r", "--storage-driver", "vfs"]
        self.home = folder / "home"
        self.home.mkdir(parents=True)
        done = self.buildah("bud", "--isolation", "chroot", "-f", str(context / "Containerfile"), "-t", "bb:1", str(context))
        if done.returncode:
            missing(f"a buildah that can build here; it said: {done.said[-600:]}")

    def buildah(self, *words: str) -> Ran:
        return run(self.door, self.home, find("buildah"), *self.store, *words)

    def podman(self, *words: str, home: Path | None = None, given: str = "") -> Ran:
        return run(self.door, home or self.home, find("podman"), *self.store, "--cgroup-manager=cgroupfs", "--runtime=runc", *words, given=given)

    def skopeo(self, *words: str) -> Ran:
        return run(self.door, self.home, find("skopeo"), "--insecure-policy", *words)

    def push(self, name: str, who: str = "acme", source: str = "bb:1") -> bytes:
        """Pushes by buildah and returns the manifest's bytes as the registry has them."""
        creds = ["--tls-verify=false", "--creds", f"{USER}:{self.door.keys[who]}"]
        well(self.buildah("push", *creds, source, f"docker://{host(self.door)}/{name}"))
        repo, _, tag = name.partition(":")
        return raw_of(self.door, repo, tag)[0]


@pytest.fixture(scope="module")
def built(door: Door, short: Path, context: Path) -> Built:
    return Built(door, short / "b", context)


def test_buildah_pushes_and_pulls(door: Door, built: Built) -> None:
    raw = built.push("acme/buildah/bb:1")
    assert json.loads(raw)["mediaType"] == "application/vnd.oci.image.manifest.v1+json"
    well(built.buildah("rmi", "bb:1"))
    auth = ["--tls-verify=false", "--creds", f"{USER}:{door.keys['acme']}"]
    well(built.buildah("pull", *auth, f"docker://{host(door)}/acme/buildah/bb:1"))
    well(built.buildah("tag", f"{host(door)}/acme/buildah/bb:1", "localhost/bb:1"))
    assert json.loads(built.push("acme/buildah/again:1"))["config"] == json.loads(raw)["config"]
    refused = built.buildah(
        "push", "--tls-verify=false", "--creds", f"{USER}:{door.keys['other']}", "bb:1", f"docker://{host(door)}/acme/buildah/x:1"
    )
    assert refused.returncode and re.search("denied|name unknown|unauthorized", refused.said), refused.said


def test_podman_logs_in_pushes_pulls_and_runs(door: Door, built: Built, tmp_path: Path) -> None:
    name = f"{host(door)}/acme/podman/bb:1"
    well(built.podman("login", "--tls-verify=false", "-u", USER, "--password-stdin", host(door), home=tmp_path, given=door.keys["acme"]))
    well(built.podman("push", "--tls-verify=false", "localhost/bb:1", name, home=tmp_path))
    raw, _ = raw_of(door, "acme/podman/bb", "1")
    well(built.podman("pull", "--tls-verify=false", name, home=tmp_path))
    shown = well(built.podman("inspect", "--format", "{{.Digest}}", name))
    assert sha(raw) in shown, shown
    limits = ["--ulimit", "nofile=1024:1024", "--ulimit", "nproc=4096:4096"]
    ran = built.podman("run", "--rm", "--network=host", *limits, name, home=tmp_path)
    if ran.returncode:
        missing(f"a kernel on which podman may run a container; it said: {ran.said[-600:]}")
    assert SAYS in ran.stdout
    well(built.podman("rmi", name))


@pytest.mark.parametrize(
    ("who", "words"), [("other", "name unknown"), ("reader", "denied: "), ("expired", "expired on"), ("", "key|denied|unauthorized")]
)
def test_podman_is_refused_in_our_words(door: Door, built: Built, tmp_path: Path, who: str, words: str) -> None:
    built.push("acme/podman/secret:1")
    auth = ["--creds", f"{USER}:{door.keys[who]}"] if who else []
    refused = built.podman("pull", "--tls-verify=false", "--quiet", *auth, f"{host(door)}/acme/podman/secret:1", home=tmp_path)
    assert refused.returncode and re.search(words, refused.said), refused.said


# ---- umoci: an image made and unpacked without any daemon


def test_umoci_makes_an_image_that_goes_round(door: Door, built: Built, context: Path, tmp_path: Path) -> None:
    umoci, layout, back = find("umoci"), tmp_path / "layout", tmp_path / "back"
    auth = f"{USER}:{door.keys['acme']}"

    def call(*words: str) -> str:
        return well(run(door, tmp_path, umoci, *words))

    call("init", "--layout", str(layout))
    call("new", "--image", f"{layout}:1")
    call("insert", "--image", f"{layout}:1", str(context / "busybox"), "/bin/busybox")
    call("config", "--image", f"{layout}:1", "--config.cmd", "/bin/busybox")
    well(built.skopeo("copy", "--dest-tls-verify=false", f"--dest-creds={auth}", f"oci:{layout}:1", f"docker://{host(door)}/acme/umoci/bb:1"))
    well(built.skopeo("copy", "--src-tls-verify=false", f"--src-creds={auth}", f"docker://{host(door)}/acme/umoci/bb:1", f"oci:{back}:1"))
    assert "1" in call("ls", "--layout", str(back)).split()
    call("unpack", "--image", f"{back}:1", str(tmp_path / "bundle"))
    assert (tmp_path / "bundle" / "rootfs" / "bin" / "busybox").read_bytes() == (context / "busybox").read_bytes()
    assert (back / "blobs" / "sha256" / sha(raw_of(door, "acme/umoci/bb", "1")[0])[7:]).exists()


# ---- oras: one PUT of a large file (row 23)

ORAS = """
import sys, oras.client
host, name, user, key, file = sys.argv[1:]
client = oras.client.OrasClient(hostname=host, insecure=True, auth_backend="basic")
client.auth.set_basic_auth(user, key)
client.push(target=f"{host}/{name}", files=[file], disable_path_validation=True)
"""


def test_oras_pushes_three_gb_in_one_put_with_little_memory(door: Door, tmp_path: Path) -> None:
    size = 3_000_000_000
    seed = os.urandom(16)
    print(f"seed {seed.hex()}")
    with (tmp_path / "w.bin").open("wb") as f:  # every MiB differs, so that one at a wrong place or twice is another digest
        for at in range(0, size, MIB):
            f.write(hashlib.shake_128(seed + at.to_bytes(8, "big")).digest(min(MIB, size - at)))
    with (tmp_path / "w.bin").open("rb") as f:
        expected = hashlib.file_digest(f, "sha256").hexdigest()
    peak = Peak({"server": door.process.pid})
    peak.start()
    argv = [sys.executable, "-c", ORAS, host(door), "acme/oras/large:1", USER, door.keys["acme"], "w.bin"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=MAX_S, cwd=tmp_path, check=False, env={**os.environ, "HOME": str(tmp_path)})
    peak.ended.set()
    peak.join()
    assert done.returncode == 0, done.stderr
    print(f"3 GB by oras, peak {peak.peaks['server'] / MIB:.0f} MiB")
    assert 10 * MIB < peak.peaks["server"] < 200 * MIB
    raw, _ = raw_of(door, "acme/oras/large", "1")
    layer = json.loads(raw)["layers"][0]
    assert (layer["digest"], layer["size"]) == (f"sha256:{expected}", size)
    (tmp_path / "w.bin").unlink()
