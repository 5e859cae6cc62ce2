"""The images, built by docker-compose without a network and run: the registry of the compose file with a real docker client, the runtime with vLLM.

The docker daemon lives in a network namespace of its own that has no way out, so that nothing can be fetched and no port of the machine is used.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT, missing
from tests.flows.test_oci_clients import PATHS, find, start, stop
from tests.services.base import base

pytestmark = [pytest.mark.server, pytest.mark.full, pytest.mark.timeout(1800)]
PARTS = ("registry", "runtime")
MOST_MIB = {"registry": 160, "runtime": 60}  # what an image adds to its base
MAX_S, READY_S = 900, 300
LOCKED = ["--read-only", "--user", "12345:0", "--cap-drop", "ALL", "--security-opt", "no-new-privileges:true", "--tmpfs", "/tmp:exec"]
QUESTION = "What is the code word of this run?"
PROFILES = {"profiles": [{"tags": {"llm_engine": "vllm", "precision": "bf16", "tp": "1", "device": "cpu"}, "options": {"max_model_len": "512"}}]}
ASK = """
import sys, urllib.error, urllib.request
body = sys.argv[2].encode() or None
try:
    answer = urllib.request.urlopen(urllib.request.Request(sys.argv[1], body, {"Content-Type": "application/json"}), timeout=60)
except urllib.error.HTTPError as error:
    answer = error
except OSError as error:
    sys.exit(str(error))
print(answer.status, answer.read().decode())
"""


@dataclass
class Docker:
    """A daemon of this test's own, and what is said to it."""

    folder: Path
    pid: int

    def __call__(self, *words: str, check: bool = True, given: str = "", **env: str) -> subprocess.CompletedProcess[str]:
        """Runs a program of docker against the daemon; a word `compose` in front is docker-compose."""
        program = [find("docker-compose"), "--project-name", "airlock", *words[1:]] if words[0] == "compose" else [find("docker"), *words]
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("DOCKER_", "COMPOSE_", "AIRLOCK_", "NGC_", "NIM_"))}
        ours = {"PATH": PATHS, "DOCKER_HOST": f"unix://{self.folder}/s", "DOCKER_CONFIG": str(self.folder / "client"), "DOCKER_BUILDKIT": "0"}
        done = subprocess.run(
            program, input=given, capture_output=True, text=True, cwd=ROOT, timeout=MAX_S, env={**clean, **ours, **env}, check=False
        )
        assert not check or done.returncode == 0, f"{' '.join(words)} -> {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        return done

    def inspect(self, what: str, path: str) -> Any:
        return json.loads(self("inspect", "--format", f"{{{{json {path}}}}}", what).stdout)

    def within(self, *argv: str) -> subprocess.CompletedProcess[str]:
        """Runs a program of this machine in the daemon's network."""
        whole = [find("nsenter"), f"--net=/proc/{self.pid}/ns/net", *argv]
        return subprocess.run(whole, capture_output=True, text=True, timeout=120, check=False)

    def ask(self, url: str, body: object = None) -> tuple[int, str]:
        """Status and body of a request through a published port; 0 where nothing answers."""
        done = self.within(sys.executable, "-c", ASK, url, json.dumps(body) if body is not None else "")
        status, _, text = done.stdout.partition(" ")
        return int(status or 0), text.strip()

    def wait(self, container: str, ready: Callable[[], bool]) -> None:
        end = time.monotonic() + READY_S
        while not ready():
            running = self.inspect(container, ".State.Running")
            assert running and time.monotonic() < end, self.logs(container)
            time.sleep(0.5)

    def logs(self, container: str) -> str:
        done = self("logs", container)
        return (done.stdout + done.stderr)[-6000:]


@pytest.fixture(scope="module")
def docker() -> Iterator[Docker]:
    """A daemon without a network that has imported Debian as base:1 and built both images by the compose file."""
    if os.geteuid():
        missing("root, which a docker daemon and debootstrap need")
    tar = base(find("debootstrap"))
    subprocess.run(["make", "--silent", "wheels", "REGISTRY_PYTHON=3.11", "RUNTIME_PYTHON=3.11"], cwd=ROOT, check=True, timeout=MAX_S)
    with tempfile.TemporaryDirectory(prefix="alk", dir="/tmp", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        apart = [find("unshare"), "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "sh"]
        argv = [find("dockerd"), "--host", f"unix://{folder}/s", "--data-root", f"{folder}/data", "--exec-root", f"{folder}/x"]

        def answers() -> bool:
            there = (folder / "s").exists()
            return there and Docker(folder, 0)("version", check=False).returncode == 0

        daemon = start([*apart, *argv, "--pidfile", f"{folder}/pid"], folder / "log", answers, "a docker daemon")
        found = Docker(folder, daemon.pid)
        try:
            found("import", "--change", 'ENTRYPOINT ["/bin/false"]', str(tar), "base:1")  # as vendors' bases have an entry point
            bases = {"REGISTRY_BASE": "base:1", "RUNTIME_BASE": "base:1", "ENGINE": "VLLM", "ENGINE_HOME": str(ROOT / "build" / "engines" / "vllm")}
            found("compose", "--profile", "gpu", "build", "--build-arg", "REVISION=of-this-test", **bases)
            yield found
        finally:
            stop(daemon)


@pytest.fixture(scope="module")
def key(docker: Docker) -> Iterator[str]:
    """The registry of the compose file, up and healthy, and a key of it."""
    docker("compose", "run", "--rm", "registry", "airlock", "site", "init")
    docker("compose", "up", "--detach")
    try:
        docker.wait("airlock_registry_1", lambda: bool(docker.inspect("airlock_registry_1", ".State.Health.Status") == "healthy"))
        words = ["--org", "acme", "--tier", "enterprise", "--models", "acme/**", "--expires", "90d", "--actions", "pull,push,run", "--json"]
        yield str(json.loads(docker("compose", "exec", "-T", "registry", "airlock", "key", "create", *words).stdout)["key"])
    finally:
        docker("compose", "down", "--volumes", check=False)


def test_the_images_were_built_without_a_network_and_hold_what_they_say(docker: Docker) -> None:
    routes = docker.within("ip", "route").stdout
    assert routes and "default" not in routes, "the daemon could reach something"
    for part in PARTS:
        image = f"airlock/{part}:0.1.0"
        config = docker.inspect(image, ".Config")
        assert config["User"] == "1000:0" and config["Labels"]["org.opencontainers.image.revision"] == "of-this-test"
        assert config["Labels"]["org.opencontainers.image.title"] == f"airlock-{part}"
        added = docker.inspect(image, ".Size") - docker.inspect("base:1", ".Size")
        assert added < MOST_MIB[part] << 20, f"{part} adds {added >> 20} MiB"
        there = "test ! -e /wheels && airlock --help && find / -xdev -perm -0002 ! -type l ! -perm -1000 ! -path '/proc/*' ! -path '/dev/*'"
        found = docker("run", "--rm", "--network", "none", "--user", "0:0", image, "sh", "-c", there).stdout
        assert "airlock runtime" in found and not re.search(r"^/", found, re.MULTILINE), f"writable for everybody: {found}"
    assert f"AIRLOCK_ENGINE_VLLM={ROOT}/build/engines/vllm" in docker.inspect("airlock/runtime:0.1.0", ".Config.Env")


def test_the_registry_alone_takes_login_push_and_pull(docker: Docker, key: str) -> None:
    login = docker("login", "-u", "$oauthtoken", "--password-stdin", "127.0.0.1:5000", given=key)
    assert "Login Succeeded" in login.stdout
    name = "127.0.0.1:5000/acme/runtime:0.1.0"
    made = docker.inspect("airlock/runtime:0.1.0", ".Id")
    docker("tag", "airlock/runtime:0.1.0", name)
    docker("push", name)
    docker("tag", "airlock/runtime:0.1.0", "kept:1")
    for tag in (name, "airlock/runtime:0.1.0", "kept:1"):
        docker("rmi", tag)
    assert docker("inspect", "kept:1", check=False).returncode, "the image is still there, so a pull would prove nothing"
    docker("compose", "up", "--detach", "--force-recreate")  # what was pushed outlives the container
    docker.wait("airlock_registry_1", lambda: docker.ask("http://127.0.0.1:5000/healthz")[0] == 200)
    pulled = docker("pull", name)
    assert "Digest: sha256:" in pulled.stdout and docker.inspect(name, ".Id") == made
    docker("tag", name, "airlock/runtime:0.1.0")
    assert key not in docker.logs("airlock_registry_1")


def test_the_registry_runs_under_any_uid_of_group_0_and_ends_orderly(docker: Docker) -> None:
    image, volume = "airlock/registry:0.1.0", ["--volume", "other:/var/lib/airlock", "--network", "none"]
    early = docker("run", "--rm", *LOCKED, *volume, image, check=False)
    assert early.returncode == 3 and "/var/lib/airlock/data is not a data directory; do: airlock site init" in early.stderr
    docker("run", "--rm", *LOCKED, *volume, image, "airlock", "site", "init")
    docker("run", "--detach", "--name", "other", *LOCKED, *volume, image)
    try:
        docker.wait("other", lambda: bool(docker.inspect("other", ".State.Health.Status") == "healthy"))
        owner = docker("exec", "other", "stat", "-c", "%u:%g:%a", "/var/lib/airlock/data").stdout
        assert owner == "12345:0:700\n"
        docker("stop", "--time", "30", "other")
        assert docker.inspect("other", ".State.ExitCode") == 0, docker.logs("other")
    finally:
        docker("rm", "--force", "--volumes", "other", check=False)
    stranger = docker("run", "--rm", "--read-only", "--user", "12345:12345", "--network", "none", image, "airlock", "site", "init", check=False)
    assert stranger.returncode and "Permission denied" in stranger.stderr and "Traceback" not in stranger.stderr


def test_the_words_of_a_nim_answer_in_the_runtime(docker: Docker) -> None:
    def run(*words: str, more: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
        return docker("run", "--rm", "--network", "none", *LOCKED, *more, "airlock/runtime:0.1.0", *words, check=False)

    unnamed = run()
    assert unnamed.returncode == 6 and "fix: say --model, or set AIRLOCK_MODEL" in unnamed.stderr
    manifest = ROOT / "tests" / "golden" / "profiles" / "llama-3.1-8b-1.3.json"
    for word in ("list-model-profiles", "nim_list_model_profiles"):
        listed = run(word, "-m", "/m.json", "--output-format", "json", more=("--volume", f"{manifest}:/m.json:ro"))
        assert listed.returncode == 0, listed.stderr
        assert json.loads(manifest.read_text())["profiles"][0]["id"] in listed.stdout
    for word in ("download-to-cache", "nim_download_to_cache", "create-model-store"):
        assert f"usage: airlock runtime {word.removeprefix('nim_').replace('_', '-')}" in run(word, "--help").stdout
    assert "/opt/nim/.cache is read-only" in run("nim-llm-check-cache-env").stderr
    writable = run("nim-llm-check-cache-env", more=("--volume", "fresh:/opt/nim/.cache"))
    assert writable.returncode == 0 and "read-only" not in writable.stderr


@pytest.fixture
def trained(engine_env: Path, tmp_path: Path) -> tuple[Path, str]:
    """A folder with a small model that knows one answer and its profiles, and that answer."""
    answer = f"The code word of this run is {secrets.token_hex(4)}."
    argv = [str(engine_env / "bin" / "python"), str(ROOT / "tests" / "fakes" / "train_llama.py"), "--question", QUESTION, "--answer", answer]
    env = {**os.environ, "PYTHONPATH": str(engine_env / "meta")}
    subprocess.run([*argv, "--out", str(tmp_path / "model")], env=env, check=True, timeout=MAX_S, capture_output=True)
    (tmp_path / "profiles.json").write_text(json.dumps(PROFILES))
    return tmp_path, answer


@pytest.mark.engine
def test_the_runtime_serves_with_vllm_on_the_cpu(docker: Docker, key: str, trained: tuple[Path, str], engine_env: Path) -> None:
    """As the compose file starts it, but for the GPUs; the engine is mounted where a vendor's base holds it."""
    folder, answer = trained
    push = ["airlock", "model", "push", "/in/model", "acme/tiny:1", "--registry", "http://registry:5000", "--profiles", "/in/profiles.json"]
    folder.chmod(0o755)
    place = ["--network", "airlock_default", "--volume", f"{folder}:/in:ro"]
    docker("run", "--rm", *place, "--env", "AIRLOCK_KEY", "--user", "0:0", "airlock/registry:0.1.0", *push, AIRLOCK_KEY=key)
    docker("compose", "exec", "-T", "registry", "airlock", "promote", "acme/tiny:1")
    trust = docker("compose", "exec", "-T", "registry", "sh", "-c", "airlock site trust --to /tmp/t >&2 && cat /tmp/t").stdout
    (folder / "site-trust.json").write_text(trust)
    env = {"AIRLOCK_REGISTRY": "http://registry:5000", "AIRLOCK_MODEL": "acme/tiny:1", "AIRLOCK_TRUST": "/in/site-trust.json", "NGC_API_KEY": key}
    given = [*LOCKED, *place, *(word for name in env for word in ("--env", name)), "--volume", f"{engine_env}:{engine_env}:ro"]
    unmounted = docker("run", "--rm", *given, "airlock/runtime:0.1.0", check=False, **env)
    assert unmounted.returncode == 38 and "the container's own layer (overlay)" in unmounted.stderr, unmounted.stderr
    lines = docker("run", "--rm", *given, "airlock/runtime:0.1.0", "list-model-profiles", **env).stdout
    assert "(vllm-cpu-bf16-tp1)   <- selected" in lines
    more = ["--volume", "weights:/opt/nim/.cache", "--shm-size", "1g", "--publish", "127.0.0.1:8000:8000"]
    docker("run", "--detach", "--name", "runtime", *given, *more, "airlock/runtime:0.1.0", **env)
    try:
        docker.wait("runtime", lambda: docker.ask("http://127.0.0.1:8000/v1/health/live")[0] == 200)
        docker.wait("runtime", lambda: docker.ask("http://127.0.0.1:8000/v1/health/ready")[0] == 200)
        chat = {"model": "acme/tiny", "temperature": 0, "messages": [{"role": "user", "content": QUESTION}]}
        status, text = docker.ask("http://127.0.0.1:8000/v1/chat/completions", chat)
        assert status == 200 and json.loads(text)["choices"][0]["message"]["content"] == answer, text
        docker("stop", "--time", "60", "runtime")
        assert docker.inspect("runtime", ".State.ExitCode") == 0, docker.logs("runtime")
        assert key not in docker.logs("runtime")
    finally:
        docker("rm", "--force", "runtime", check=False)
