"""What `airlock client config` writes, given to the real clients over TLS: skopeo, oras, hf and ngcsdk pull with those files and nothing else."""

from __future__ import annotations

import base64
import json
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import airlock
from tests.contracts.ngc import FILES, fill, new_ngc_site, ngc_serving
from tests.flows.answered import gaps
from tests.flows.test_clients import layout
from tests.operated import Operated, operated
from tests.services.clients import client

pytestmark = pytest.mark.server
DRIVER = Path(__file__).resolve().parent.parent / "fakes" / "ngcsdk_driver.py"
IMAGE = "nvcr.io/nim/meta/app"
ORAS = "import sys, oras.client; print(oras.client.OrasClient(hostname=sys.argv[1]).pull(target=sys.argv[2], outdir=sys.argv[3]))"


@dataclass
class Given:
    """A site, and the folder that the command filled for it."""

    server: Operated
    folder: Path
    digest: str

    @property
    def place(self) -> str:
        return self.server.url.removeprefix("https://")

    def run(self, *argv: str, env_file: str = "", **env: str) -> subprocess.CompletedProcess[str]:
        """A client that knows nothing but the files, its home and what the environment file says."""
        lines = (self.folder / env_file).read_text().splitlines() if env_file else []
        given = {"PATH": "/usr/bin:/bin", "HOME": str(self.folder / "home"), **dict(line.split("=", 1) for line in lines), **env}
        done = subprocess.run(argv, capture_output=True, text=True, timeout=180, env=given, check=False)
        assert not any(key in done.stdout + done.stderr for key in self.server.keys.values())
        return done


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Given]:
    folder = tmp_path_factory.mktemp("config")
    data = folder / "data"
    keys = new_ngc_site(data)
    with ngc_serving(data, keys) as door:
        fill(door, data)
    digest, _raw = layout(folder / "layout")
    with operated(data, keys, AIRLOCK_TLS="self-signed", AIRLOCK_NGC="127.0.0.1:0") as server:
        assert server.told
        ca = data / "tls" / "cert.pem"
        to = ["--registry", server.url, "--ngc", server.told["ngc"], "--ca", str(ca), "--to", str(folder / "out")]
        airlock("client", "config", "podman", "oras", "hf", "ngc", "kubernetes", "containerd", *to, AIRLOCK_KEY=keys["root"])
        found = Given(server, folder / "out", digest)
        push = ["skopeo", "--insecure-policy", "copy", "--preserve-digests", f"--dest-creds=$oauthtoken:{keys['root']}"]
        done = found.run(*push, f"--dest-cert-dir={certs(found)}", f"oci:{folder}/layout:1", f"docker://{found.place}/{IMAGE}:1")
        assert done.returncode == 0, done.stderr
        yield found
        assert gaps(server.log) == [], "a probe that no route took"


def certs(given: Given) -> Path:
    return given.folder / "etc/containers/certs.d" / given.place


def test_skopeo_finds_an_image_by_nvidias_name(given: Given, tmp_path: Path) -> None:
    """registries.conf sends nvcr.io here, auth.json brings the key, certs.d the authority; a user has under ~/.config what a node has in /etc."""
    home = tmp_path / "home"
    shutil.copytree(given.folder / "home", home)
    shutil.copytree(given.folder / "etc/containers", home / ".config/containers", dirs_exist_ok=True)
    argv = ["skopeo", "inspect", "--no-tags", "--format", "{{.Digest}}", f"docker://{IMAGE}:1"]
    done = given.run(*argv, HOME=str(home))
    assert (done.returncode, done.stdout.strip()) == (0, given.digest), done.stderr
    (home / ".config/containers/auth.json").unlink()
    (home / ".docker/config.json").unlink()  # the next place where it looks
    nobody = given.run(*argv, HOME=str(home))
    assert nobody.returncode and "unauthorized" in nobody.stderr, nobody.stderr
    (home / ".config/containers/certs.d" / given.place / "ca.crt").unlink()
    distrusted = given.run(*argv, HOME=str(home))
    assert distrusted.returncode and "certificate signed by unknown authority" in distrusted.stderr, distrusted.stderr


def test_oras_pulls_with_the_key_of_the_file(given: Given, tmp_path: Path) -> None:
    argv = [sys.executable, "-c", ORAS, given.place, f"{given.place}/acme/vision/demo:1.10", str(tmp_path)]
    done = given.run(*argv, env_file="home/oras.env")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "config.json").read_bytes() == FILES["config.json"]


def test_hf_downloads_with_the_environment_file(given: Given, tmp_path: Path) -> None:
    for python in (Path(sys.executable), client("hub-0.36")):
        where = tmp_path / python.parent.parent.name
        done = given.run(str(python.parent / "hf"), "download", "acme/m", "--local-dir", str(where), env_file="home/hf.env")
        assert done.returncode == 0, done.stderr
        assert (where / "model.safetensors").read_bytes() == FILES["model.safetensors"]


def test_ngcsdk_downloads_with_the_environment_file(given: Given, tmp_path: Path) -> None:
    steps: list[Any] = [["download", {"": ["acme/vision/demo:1.10"], "destination": str(tmp_path)}]]
    lines = (given.folder / "home/ngc.env").read_text().splitlines()
    env = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "NGC_CLI_ORG": "acme", "NGC_CLI_TEAM": "vision", **dict(ln.split("=", 1) for ln in lines)}
    argv = [str(client("ngcsdk")), "-P", str(DRIVER)]
    done = subprocess.run(argv, input=json.dumps(steps), capture_output=True, text=True, timeout=120, env=env, check=False)
    assert '"Completed"' in done.stdout, done.stdout + done.stderr
    assert (tmp_path / "demo_v1.10" / "model.safetensors").read_bytes() == FILES["model.safetensors"]


def test_the_kubernetes_secret_holds_the_key_for_every_name(given: Given) -> None:
    doc = yaml.safe_load((given.folder / "home/airlock-pull.yaml").read_text())
    assert (doc["apiVersion"], doc["kind"], doc["type"]) == ("v1", "Secret", "kubernetes.io/dockerconfigjson")
    auths = json.loads(base64.b64decode(doc["data"][".dockerconfigjson"]))["auths"]
    assert set(auths) == {given.place, "nvcr.io", "https://index.docker.io/v1/"}
    assert {base64.b64decode(a["auth"]).decode() for a in auths.values()} == {f"$oauthtoken:{given.server.keys['root']}"}


def test_files_with_the_key_are_for_their_owner_only_and_none_is_replaced(given: Given, tmp_path: Path) -> None:
    key = given.server.keys["root"]
    encoded = base64.b64encode(f"$oauthtoken:{key}".encode()).decode()
    for path in (p for p in given.folder.rglob("*") if p.is_file()):
        text = path.read_text()
        if path.name == "airlock-pull.yaml":
            text = base64.b64decode(yaml.safe_load(text)["data"][".dockerconfigjson"]).decode()
        holds = key in text or encoded in text
        mode = stat.S_IMODE(os.stat(path).st_mode)
        assert mode == (0o600 if holds else 0o644), (path, oct(mode))
    argv = ["client", "config", "hf", "--registry", "https://registry.site", "--to", str(tmp_path)]
    airlock(*argv, AIRLOCK_KEY=key)
    airlock(*argv, AIRLOCK_KEY=key)  # the same again is no change
    again = airlock(*argv, check=False, AIRLOCK_KEY="nvapi-another")
    assert again.returncode == 8 and "is there already" in again.stderr and "nvapi-another" not in again.stderr
    assert key in (tmp_path / "home/hf.env").read_text()


@pytest.mark.parametrize(
    ("argv", "status", "words"),
    [
        (["hf"], 6, "no registry is named"),
        (["hf", "--registry", "registry.site"], 6, "is no URL of a registry"),
        (["hf", "--registry", "https://registry.site/api"], 6, "has a path"),
        (["hf", "--registry", "https://u:p@registry.site"], 6, "is no URL of a registry"),
        (["hf", "--registry", "https://x/\nHF_TOKEN=stolen"], 6, "is no URL of a registry"),
        (["containerd", "--registry", "https://registry.site", "--name", "../../etc"], 6, "is no registry's name"),
        (["containerd", "--registry", "https://registry.site", "--name", ".."], 6, "is no registry's name"),
        (["containerd", "--registry", "https://registry.site", "--ca", "pyproject.toml"], 6, "is no file of certificates"),
        (["ngc", "--registry", "https://registry.site"], 6, "need the NGC listener"),
        (["ngc", "--registry", "https://registry.site", "--ngc", "http://registry.site:8443"], 6, "https only"),
        (["nobody", "--registry", "https://registry.site"], 2, "invalid choice"),
    ],
)
def test_what_makes_no_sense_is_refused(argv: list[str], status: int, words: str) -> None:
    done = airlock("client", "config", *argv, check=False)
    assert done.returncode == status and words in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_an_environment_file_runs_nothing(given: Given, tmp_path: Path) -> None:
    """A shell reads these files: neither a path nor a key may be words to it."""
    folder = tmp_path / "a $(touch ran)"
    folder.mkdir()
    shutil.copy(certs(given) / "ca.crt", folder / "ca.pem")
    site = ["--registry", "https://registry.site", "--ngc", "https://registry.site:8443"]
    for argv in (["hf", *site, "--ca", str(folder / "ca.pem")], ["ngc", *site], ["hf", *site]):
        key = "nvapi-x" if "--ca" in argv else "nvapi-$(touch${IFS}ran)"
        done = airlock("client", "config", *argv, check=False, AIRLOCK_KEY=key)
        assert done.returncode == 6 and "is no bare word" in done.stderr and "IFS" not in done.stdout + done.stderr, done
    assert airlock("client", "config", "containerd", *site, "--ca", str(folder / "ca.pem")).returncode == 0, "no path of the file is told there"


def test_what_is_not_whole_has_no_name(tmp_path: Path) -> None:
    """A disk that is full in the middle of a file, here by a limit, leaves nothing that the next run would stumble over."""
    argv = ["client", "config", "hf", "--registry", "https://registry.site", "--to", str(tmp_path)]
    code = "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))\n"
    code += "from artifact.cli import run; from artifact.commands.client import main; sys.exit(run(main, sys.argv[3:]))"
    done = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 9 and [p for p in tmp_path.rglob("*") if p.is_file()] == [], done.stderr
    airlock(*argv)


def test_without_a_key_nothing_secret_is_made_up() -> None:
    told = json.loads(airlock("client", "config", "podman", "docker", "hf", "--registry", "https://registry.site", "--json").stdout)
    paths = {f["path"]: f["text"] for f in told["files"]}
    assert "home/.docker/config.json" not in paths and "home/.config/containers/auth.json" not in paths
    assert "HF_TOKEN=PUT-THE-KEY-HERE" in paths["home/hf.env"] and any("login" in n["note"] for n in told["notes"])
