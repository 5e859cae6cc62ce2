"""The stand-in NGC is believed only because the unmodified ngcsdk configures, lists, reads and downloads from it and finds the bytes whole."""

from __future__ import annotations

import datetime
import hashlib
import ipaddress
import json
import os
import random
import ssl
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.tls import authority, leaf
from tests.services.clients import client

FAKE, DRIVER = (Path(__file__).parents[1] / "fakes" / name for name in ("ngc_cloud.py", "ngcsdk_driver.py"))
PERSONAL, SERVICE, FOREIGN = (f"nvapi-{word}{'x' * (64 - len(word))}" for word in ("personal", "service", "foreign"))
LEGACY = "Y2xpZW50OjAwMDAwMDAwLTExMTEtMjIyMi0zMzMzLTQ0NDQ0NDQ0NDQ0NA"
BUNDLE = b'{"mediaType":"application/vnd.dev.sigstore.bundle.v0.3+json","of":"NVIDIA"}'
DEMO = "acme/vision/demo"
pytestmark = pytest.mark.server


@dataclass(frozen=True)
class Ngc:
    """A started stand-in: where its hosts are and what it logged."""

    api: str
    authn: str
    files: str
    nvcr: str
    root: Path
    log: Path
    ca: Path | None = None

    def requests(self, host: str = "") -> list[dict[str, Any]]:
        """The request log so far, of one host or of all."""
        lines = [json.loads(line) for line in self.log.read_text().splitlines()] if self.log.exists() else []
        return [line for line in lines if not host or line["host"] == host]

    def change(self, model: str, version: str = "", **facts: Any) -> None:
        """Sets facts of a model, or of one of its versions."""
        told = json.loads((self.root / "cloud.json").read_text())
        (told["models"][model]["versions"][version] if version else told["models"][model]).update(facts)
        (self.root / "cloud.json").write_text(json.dumps(told))


def contents(weights: int = 3_000_000) -> dict[str, bytes]:
    """Files of a small version: empty, nested, with letters that a URL escapes, and weights."""
    rand = random.Random(7)
    return {
        "README.md": b"---\nlicense: other\ntags: [tiny]\n---\n# Demo\n",
        "config.json": b'{"model_type": "llama"}',
        "empty.txt": b"",
        "model.safetensors": rand.randbytes(weights),
        "sub/deep/ranks 0+1 \u00fc.bin": rand.randbytes(70_000),
    }


def make_model(root: Path, model: str = DEMO, version: str = "1.0", files: dict[str, bytes] | None = None, sums: bool = False, **facts: Any) -> Path:
    """A version of a model in the cloud's folder; with `sums` a checksums.blake3 of its files."""
    from blake3 import blake3

    folder, files = root / "models" / model / version, contents() if files is None else files
    if sums:
        files = files | {"checksums.blake3": "".join(f"{blake3(raw).hexdigest()}  {path}\n" for path, raw in files.items()).encode()}
    for path, raw in files.items() | ({("result.sigstore", BUNDLE)} if facts.get("signed") else set()):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(raw)
    cloud = root / "cloud.json"
    if cloud.exists():
        told = json.loads(cloud.read_text())
    else:
        mine = {"org": "acme", "teams": ["vision"]}
        keys = {PERSONAL: mine | {"type": "PERSONAL_KEY"}, SERVICE: mine | {"type": "SERVICE_KEY"}, LEGACY: mine | {"type": "LEGACY"}}
        told = {"keys": keys | {FOREIGN: {"org": "other", "teams": [], "type": "SERVICE_KEY"}}, "models": {}, "images": {}}
        (root / "models.pem").write_text("-----BEGIN CERTIFICATE-----\nmodels\n")
        (root / "containers.pem").write_text("-----BEGIN PUBLIC KEY-----\ncontainers\n")
    told["models"].setdefault(model, {"versions": {}})["versions"][version] = facts
    cloud.write_text(json.dumps(told))
    return folder


def make_image(root: Path, name: str, layers: list[bytes], tag: str = "1.0", **facts: Any) -> str:
    """An image of these layers in the cloud's folder; returns its digest."""
    folder = root / "images" / name / "blobs"
    folder.mkdir(parents=True, exist_ok=True)

    def put(raw: bytes, media: str) -> dict[str, Any]:
        digest = hashlib.sha256(raw).hexdigest()
        (folder / digest).write_bytes(raw)
        return {"mediaType": media, "digest": f"sha256:{digest}", "size": len(raw)}

    base = "application/vnd.oci.image"
    config = put(
        json.dumps({"architecture": "amd64", "os": "linux", "rootfs": {"type": "layers", "diff_ids": []}}).encode(), f"{base}.config.v1+json"
    )
    put_layers = [put(raw, f"{base}.layer.v1.tar" + ("+gzip" if raw[:2] == b"\x1f\x8b" else "")) for raw in layers]
    manifest = {"schemaVersion": 2, "mediaType": f"{base}.manifest.v1+json", "config": config, "layers": put_layers}
    digest: str = put(json.dumps(manifest).encode(), manifest["mediaType"])["digest"]
    (folder.parent / "tags.json").write_text(json.dumps({tag: digest}))
    told = json.loads((root / "cloud.json").read_text())
    told["images"][name] = facts
    (root / "cloud.json").write_text(json.dumps(told))
    return digest


@contextmanager
def ngc(root: Path, log: Path, *options: str, tls: bool = False) -> Iterator[Ngc]:
    """Starts the stand-in and ends it."""
    argv, ca = [sys.executable, str(FAKE), "--root", str(root), "--log", str(log), *options], None
    if tls:
        now = datetime.datetime.now(datetime.UTC)
        made = authority(root / "ca")
        crt, key = leaf(made, root / "cloud", ipaddress.ip_address("127.0.0.1"), now - datetime.timedelta(1), now + datetime.timedelta(5))
        argv, ca = [*argv, "--cert", str(crt), "--cert-key", str(key)], made.file
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield Ngc(**json.loads(process.stdout.readline()), root=root, log=log, ca=ca)
    finally:
        process.kill()
        process.wait()


def sdk(cloud: Ngc, home: Path, *steps: tuple[str, dict[str, Any]]) -> list[list[Any]]:
    """Outcome and value of each step of the unmodified library."""
    home.mkdir(exist_ok=True)
    env = {"NGC_CLI_API_URL": cloud.api, "NGC_CLI_AUTH_URL": cloud.authn, "REQUESTS_CA_BUNDLE": str(cloud.ca), "NGC_CLI_HOME": str(home)}
    env |= {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1", "PATH": os.environ["PATH"], "HOME": str(home)}
    argv = [str(client("ngcsdk")), "-P", str(DRIVER)]
    done = subprocess.run(argv, input=json.dumps(steps), capture_output=True, text=True, timeout=120, env=env, check=False)
    told = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert told, done.stdout + done.stderr
    out: list[list[Any]] = json.loads(told[0].removeprefix("RESULT "))
    return out


def step(verb: str, *positional: str, **arguments: Any) -> tuple[str, dict[str, Any]]:
    return verb, {"": list(positional), **arguments}


def configure(key: str, **more: str) -> tuple[str, dict[str, Any]]:
    return "configure", {"api_key": key, "org_name": "acme", **more}


def found(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def cloud(tmp_path: Path) -> Iterator[Ngc]:
    make_model(tmp_path / "ngc", signed=True)
    make_model(tmp_path / "ngc", "acme/open")
    make_image(tmp_path / "ngc", "acme/vision/app", [b"layer"])
    with ngc(tmp_path / "ngc", tmp_path / "log", tls=True) as running:
        running.change("acme/open", guest=True)
        yield running


@pytest.mark.parametrize("key", [PERSONAL, SERVICE, LEGACY], ids=["personal", "service", "legacy"])
def test_ngcsdk_downloads_with_each_kind_of_key(cloud: Ngc, tmp_path: Path, key: str) -> None:
    cloud.change(DEMO, "1.0", page=2)
    (tmp_path / "out").mkdir()
    (tmp_path / "some").mkdir()
    team = {} if key == SERVICE else {"team_name": "vision"}
    fetch = [step("download", f"{DEMO}:1.0", destination=str(tmp_path / "out"))]
    fetch.append(step("download", f"{DEMO}:1.0", destination=str(tmp_path / "some"), file_patterns=["*.json"]))
    out = sdk(cloud, tmp_path / "home", configure(key, **team), *fetch)
    assert [o[0] for o in out] == ["ok"] * 3 and [o[1]["status"] for o in out[1:]] == ["Completed"] * 2, out
    assert found(tmp_path / "out" / "demo_v1.0") == contents() and set(found(tmp_path / "some" / "demo_v1.0")) == {"config.json"}
    asked = [f"{e['method']} {e['path']}" for e in cloud.requests("api")]
    assert "GET /v2/org/acme/team/vision/models/demo/1.0/files" in asked and all(e["authorization"] == "" for e in cloud.requests("files"))
    assert {e["authorization"] for e in cloud.requests("authn")} == ({"Basic"} if key == LEGACY else set())


def test_ngcsdk_reads_lists_signature_and_images(cloud: Ngc, tmp_path: Path) -> None:
    out = sdk(
        cloud,
        tmp_path / "home",
        configure(PERSONAL),
        step("info", DEMO),
        step("info", f"{DEMO}:1.0"),
        step("files", f"{DEMO}:1.0"),
        step("list", DEMO),
        step("list", "acme/vision/*"),
        step("signature", f"{DEMO}:1.0", destination=str(tmp_path)),
        step("images", "acme/vision/app"),
        step("image", "acme/vision/app:1.0"),
    )
    assert [o[0] for o in out] == ["ok"] * 9, out
    assert {f["path"] for f in out[3][1]} == set(contents()) and found(tmp_path / "demo_v1.0") == {"result.sigstore": BUNDLE}
    assert "demo" in json.dumps(out[5][1]) and "sha256:" in json.dumps(out[7][1])
    assert not [e for e in cloud.requests() if e["status"] >= 400], [e for e in cloud.requests() if e["status"] >= 400]


def test_ngcsdk_as_a_guest_and_the_refusals_it_reads(cloud: Ngc, tmp_path: Path) -> None:
    out = sdk(cloud, tmp_path / "home", step("download", "acme/open:1.0", destination=str(tmp_path)))
    assert out[0][1]["status"] == "Completed" and found(tmp_path / "open_v1.0") == contents(), out
    assert all(e["guest"] for e in cloud.requests("api"))
    for status, kind in ((402, "NgcAPIError"), (403, "AccessDeniedException"), (412, ""), (451, "")):
        cloud.change(DEMO, refuse={"status": status, "at": "files" if status == 412 else "all", "words": f"because of {status}"})
        out = sdk(cloud, tmp_path / "home", configure(PERSONAL), step("download", f"{DEMO}:1.0", destination=str(tmp_path)))
        assert out[1][0] != "ok" and kind in out[1][0] and f"{status} Response: because of {status}" in out[1][1], out
    out = sdk(cloud, tmp_path / "home", configure(f"nvapi-{'z' * 64}"))
    assert out[0][0] == "AuthenticationException", out


def test_the_second_host_and_nvcr_behave_as_the_references_say(cloud: Ngc) -> None:
    context = ssl.create_default_context(cafile=str(cloud.ca))

    def ask(url: str, **headers: str) -> tuple[int, dict[str, str], bytes]:
        try:
            with urllib.request.urlopen(urllib.request.Request(url, headers=headers), context=context) as answer:
                return answer.status, dict(answer.headers), answer.read()
        except urllib.error.HTTPError as error:
            return error.code, dict(error.headers), error.read()

    listed = json.loads(ask(f"{cloud.api}/v2/org/acme/team/vision/models/demo/1.0/files", Authorization=f"Bearer {PERSONAL}")[2])
    url = listed["urls"][listed["filepath"].index("config.json")]
    assert url.startswith(cloud.files) and ask(url)[2] == contents()["config.json"]
    assert ask(url, Authorization=f"Bearer {PERSONAL}")[0] == 400
    status, headers, body = ask(f"{cloud.nvcr}/v2/")
    assert (status, headers["WWW-Authenticate"]) == (401, f'Bearer realm="{cloud.nvcr}/proxy_auth"') and body.startswith(b"<html>")
    assert ask(f"{cloud.nvcr}/proxy_auth?scope=repository:acme/vision/app:pull")[0] == 403
    assert ask(f"{cloud.api}/v2/catalog/models/public-key")[2].startswith(b"-----BEGIN CERTIFICATE")
