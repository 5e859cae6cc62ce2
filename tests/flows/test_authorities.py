"""Which variable tells which client of a private authority: each row of artifact.clients.TRUST with it, without, and with those it ignores."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from artifact.clients import TRUST, Trust
from tests.conftest import AIRLOCK, ENGINE, missing
from tests.contracts.ngc import FILES, fill, new_ngc_site, ngc_serving
from tests.flows.test_clients import layout
from tests.flows.test_oci_clients import find
from tests.operated import Operated, operated
from tests.services.clients import client

pytestmark = pytest.mark.server
ROOT = Path(__file__).resolve().parents[2]
FAKES = ROOT / "tests" / "fakes"
Ran = subprocess.CompletedProcess[str]
HUB = """
import sys, huggingface_hub as h
print(h.HfApi().model_info('acme/m').sha)  # first: of all its requests the one that is not tried again for 24 s
h.hf_hub_download('acme/m', 'config.json', local_dir=sys.argv[1])
"""
ORAS = """
import sys, oras.client
c = oras.client.OrasClient(hostname=sys.argv[1])
c.login(hostname=sys.argv[1], username='$oauthtoken', password=sys.argv[2])
print(c.pull(target=sys.argv[1] + '/acme/vision/demo:1.10', outdir=sys.argv[3]))
"""
S3 = """
import sys, boto3, botocore.exceptions, botocore.config
once = botocore.config.Config(retries={'total_max_attempts': 1})
c = boto3.client('s3', endpoint_url=sys.argv[1], aws_access_key_id='k', aws_secret_access_key='s', region_name='r', config=once)
try:
    c.head_object(Bucket='acme', Key='x')
except botocore.exceptions.ClientError as error:
    print('answered', error.response['ResponseMetadata']['HTTPStatusCode'])
"""


@dataclass
class Place:
    """A registry behind a certificate that nobody knows, and a folder for what a client fetches."""

    server: Operated
    folder: Path
    env: dict[str, str]

    def run(self, *argv: str, given: str = "", **more: str) -> Ran:
        """A client with nothing around it but the variables of the case."""
        env = {"PATH": "/usr/bin:/usr/sbin:/bin", "HOME": str(self.folder), "XDG_RUNTIME_DIR": str(self.folder), **more, **self.env}
        done = subprocess.run(argv, input=given, capture_output=True, text=True, timeout=240, env=env, check=False, cwd=self.folder)
        assert self.key not in done.stdout + done.stderr
        return done

    @property
    def key(self) -> str:
        return self.server.keys["root"]

    @property
    def host(self) -> str:
        return self.server.url.removeprefix("https://")

    def hub(self, python: Path, *argv: str) -> Ran:
        quiet = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_UPDATE_CHECK": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        quiet |= {"HF_HUB_ETAG_TIMEOUT": "10", "TRANSFORMERS_VERBOSITY": "error"}
        return self.run(str(python), *argv, HF_ENDPOINT=self.server.url, HF_TOKEN=self.key, **quiet)


def _hub(version: str) -> Callable[[Place], Ran]:
    def call(at: Place) -> Ran:
        python = Path(sys.executable) if version == "2.4" else client(f"hub-{version}")
        return at.hub(python, "-c", HUB, str(at.folder))

    return call


def _engine(*argv: str) -> Callable[[Place], Ran]:
    def call(at: Place) -> Ran:
        if not (ENGINE / "bin" / "python").exists():
            missing(f"the engine environment {ENGINE}")
        return at.hub(ENGINE / "bin" / "python", *argv)

    return call


def _ngcsdk(at: Place) -> Ran:
    assert at.server.told
    url = at.server.told["ngc"]
    steps: list[Any] = [["configure", {"api_key": at.key, "org_name": "acme"}], ["info", {"": ["acme/vision/demo"]}]]
    done = at.run(str(client("ngcsdk")), "-P", str(FAKES / "ngcsdk_driver.py"), given=json.dumps(steps), NGC_CLI_API_URL=url, NGC_CLI_AUTH_URL=url)
    told = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    good = bool(told) and [step[0] for step in json.loads(told[0].removeprefix("RESULT "))] == ["ok", "ok"]
    return Ran(done.args, 0 if good else 1, done.stdout, done.stderr)


def _skopeo(at: Place) -> Ran:
    return at.run(find("skopeo"), "inspect", "--no-tags", "--creds", f"$oauthtoken:{at.key}", f"docker://{at.host}/nvcr.io/nim/meta/app:1")


def _podman(at: Place) -> Ran:
    with tempfile.TemporaryDirectory(prefix="alk", dir="/tmp", ignore_cleanup_errors=True) as short:  # it wants short paths
        store = ["--root", f"{short}/s", "--runroot", f"{short}/r", "--storage-driver", "vfs", "--cgroup-manager=cgroupfs", "--runtime=runc"]
        return at.run(find("podman"), *store, "pull", "--creds", f"$oauthtoken:{at.key}", f"{at.host}/nvcr.io/nim/meta/app:1")


CLIENTS: dict[str, Callable[[Place], Ran]] = {
    "huggingface_hub 2.4": _hub("2.4"),
    "huggingface_hub 1.33": _hub("1.33"),
    "huggingface_hub 0.36": _hub("0.36"),
    "transformers 5.19": _engine(str(FAKES / "hub_library.py"), "config", "acme/bert"),
    "vLLM 0.32, by repository id": _engine(
        "-c", "from vllm.transformers_utils.config import get_config; print(get_config('acme/bert', trust_remote_code=False).model_type)"
    ),
    "ngcsdk 4.37": _ngcsdk,
    "boto3": lambda at: at.run(sys.executable, "-c", S3, at.server.url),
    "curl": lambda at: at.run(find("curl"), "-sS", "-f", f"{at.server.url}/healthz"),
    "skopeo": _skopeo,
    "oras (PyPI)": lambda at: at.run(sys.executable, "-c", ORAS, at.host, at.key, str(at.folder)),
    "podman": _podman,
    "airlock": lambda at: at.run(str(AIRLOCK), "catalog", "list", "--registry", at.server.url, AIRLOCK_KEY=at.key),
}
LONG = {"transformers 5.19", "vLLM 0.32, by repository id", "podman"}
ELSEWHERE = {"docker", "containerd"}  # no variable: /etc alone, tests/flows/test_tls_clients.py


def cases() -> Iterator[Any]:
    for row in TRUST:
        tried = [(v, True) for v in row.works if not v.startswith("/")] + [(v, False) for v in row.ignores] + [("", False)]
        for variable, works in tried if row.client not in ELSEWHERE else ():
            marks = [pytest.mark.full] if row.client in LONG else []
            yield pytest.param(row, variable, works, id=f"{row.client}-{variable or 'nothing'}", marks=marks)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Operated]:
    folder = tmp_path_factory.mktemp("authorities")
    data = folder / "data"
    keys = new_ngc_site(data)
    with ngc_serving(data, keys) as door:
        fill(door, data)
        door.push("acme/bert", "main", {"config.json": b'{"model_type": "bert", "architectures": ["BertModel"]}'})
    layout(folder / "layout")
    with operated(data, keys, AIRLOCK_TLS="self-signed", AIRLOCK_NGC="127.0.0.1:0") as found:
        env = {**os.environ, "SSL_CERT_FILE": str(data / "tls" / "cert.pem"), "HOME": str(folder)}
        image = f"docker://{found.url.removeprefix('https://')}/nvcr.io/nim/meta/app:1"
        argv = [find("skopeo"), "--insecure-policy", "copy", f"--dest-creds=$oauthtoken:{keys['root']}", f"oci:{folder}/layout:1", image]
        subprocess.run(argv, check=True, capture_output=True, timeout=120, env=env)
        yield found


@pytest.mark.parametrize(("row", "variable", "works"), list(cases()))
def test_a_client_is_told_of_the_authority(server: Operated, tmp_path: Path, row: Trust, variable: str, works: bool) -> None:
    at = Place(server, tmp_path, {variable: str(server.data / "tls" / "cert.pem")} if variable else {})
    done = CLIENTS[row.client](at)
    said = done.stdout + done.stderr
    assert (done.returncode == 0) is works, said[-2000:]
    assert works or row.says in said, said[-2000:]
    if works and row.client.startswith("huggingface_hub"):
        assert (tmp_path / "config.json").read_bytes() == FILES["config.json"]


def test_every_row_is_tried_somewhere() -> None:
    assert {row.client for row in TRUST} == set(CLIENTS) | ELSEWHERE


def test_the_document_shows_the_rows_that_are_tried() -> None:
    text = (ROOT / "docs" / "operations.md").read_text().split("### Authorities of clients\n", 1)[1]
    lines = [line for line in text.split("\n\n")[1].splitlines() if line.startswith("|")][2:]
    told = lambda words: ", ".join(f"`{word}`" for word in words) or "-"  # noqa: E731
    assert lines == [f"| {row.client} | {told(row.works)} | {told(row.ignores)} | `{row.says}` |" for row in TRUST]
