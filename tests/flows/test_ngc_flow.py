"""From NGC over the gap: synced over TLS, packed, imported, and read by the unmodified ngcsdk, `hf` and skopeo with the upstream's bytes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from blake3 import blake3

from artifact.layers import find_manifest
from artifact.manifest import digest_of, parse_manifest
from artifact.remote import NOBODY_CALL, RemoteRegistry
from mirror.home import MirrorHome
from mirror.sources.ngc import SIGSTORE
from registry.settings import Settings
from registry.wiring import open_site
from tests.contracts.ngc import BUNDLE as SIGNED
from tests.contracts.ngc import FILES, fill, new_ngc_site, ngc_serving
from tests.flows.test_fake_ngc import BUNDLE, DEMO, contents, found, make_image, make_model, ngc
from tests.flows.test_ngc_source import model_of, sync
from tests.flows.test_ngcsdk import Sdk, configure, step
from tests.flows.test_nim import cached, start
from tests.flows.test_nim_source import IDS, MODEL, cloud_with, item, manifest
from tests.flows.test_sync import AIRLOCK, make_home, plan_file
from tests.operated import Operated, operated
from tests.services.clients import client

pytestmark = pytest.mark.server
NIM = "nvcr.io/nim/meta/llama3-8b-instruct"


def mirrored(tmp_path: Path) -> Path:
    """A medium with a signed version, a public one, and a NIM with one profile, fetched over TLS with the stand-in's own authority."""
    root, home = tmp_path / "ngc", make_home(tmp_path / "mirror")
    cloud_with(root, manifest(), sums=True)
    make_model(root, signed=True, sums=True)
    make_model(root, "acme/open")
    make_image(root, "acme/vision/app", [b"a layer"])
    with ngc(root, tmp_path / "log", tls=True) as cloud:
        at = {"endpoint": cloud.api, "auth_endpoint": cloud.authn, "key_env": "NGC_KEY", "ca_file": str(cloud.ca)}
        nim = item(cloud, "vllm-bf16-tp1", ca_file=str(cloud.ca)) | {
            "source": f"nim://{cloud.nvcr.removeprefix('https://')}/nim/meta/llama3-8b-instruct:1.0.3"
        }
        del nim["plain_http"]
        report = sync(home, plan_file(tmp_path, *({"source": f"ngc://{m}:1.0"} | at for m in (DEMO, "acme/open")), nim))
        assert report["failed"] == 0 and not [e for e in cloud.requests("files") if e["authorization"]]
    done = subprocess.run(
        [str(AIRLOCK), "bundle", "pack", "--to", str(tmp_path / "medium"), "--home", str(home), "--json"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return home


def imported(tmp_path: Path, home: Path) -> tuple[Path, dict[str, str]]:
    """A site that took the medium in by its command."""
    data = tmp_path / "site"
    keys = new_ngc_site(data)
    with open_site(Settings.load(data, environ=dict(os.environ)), background=False) as site:
        site.home.pin_root(MirrorHome.open(home).root)
    argv = [str(AIRLOCK), "bundle", "import", str(tmp_path / "medium"), "--data", str(data)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return data, keys


def test_what_ngc_had_every_door_serves(tmp_path: Path) -> None:
    home = mirrored(tmp_path)
    data, keys = imported(tmp_path, home)
    for name in ("home", "sdk"):
        (tmp_path / name).mkdir()
    with operated(data, keys, AIRLOCK_TLS="self-signed", AIRLOCK_NGC="127.0.0.1:0") as server:
        sdk = Sdk(client("ngcsdk"), server, data / "tls" / "cert.pem", tmp_path / "home")
        targets = [f"{DEMO}:1.0", "acme/open:1.0", f"{MODEL}:hf"]
        steps = [step("download", target, destination=str(tmp_path / "sdk")) for target in targets]
        more = [
            step("signature", f"{DEMO}:1.0", destination=str(tmp_path)),
            step("info", f"{DEMO}:1.0"),
            step("image", f"{MODEL}:1.0.3"),
        ]
        out = sdk.run(configure(server, "root"), *steps, *more)
        assert [o[0] for o in out] == ["ok"] * 7 and [o[1]["status"] for o in out[1:4]] == ["Completed"] * 3, out
        got = found(tmp_path / "sdk" / "demo_v1.0")
        sums = got.pop("checksums.blake3").decode()
        assert got == contents() and f"{blake3(got['README.md']).hexdigest()}  README.md" in sums
        assert found(tmp_path / "sdk" / "open_v1.0") == contents()
        assert found(tmp_path / "sdk" / "llama3-8b-instruct_vhf") == {f: contents()[f] for f in ("config.json", "model.safetensors")}
        assert found(tmp_path / "demo_v1.0") == {"result.sigstore": BUNDLE} and '"isSigned": true' in json.dumps(out[5][1])
        assert sdk.unanswered() == []
        by_nim(tmp_path, server, keys["root"], data / "tls" / "cert.pem")
        by_hub(tmp_path, server.url, keys["root"], data / "tls" / "cert.pem")
        by_oci(tmp_path, server.url, keys["root"], data / "tls" / "cert.pem", home)


def test_the_ngc_listener_of_a_registry_is_an_upstream_as_well(tmp_path: Path) -> None:
    """The source, written against the stand-in, reads what the project's own listener says: pages, tickets, digests, the signature."""
    keys = new_ngc_site(tmp_path / "site")
    home = make_home(tmp_path / "mirror")
    with ngc_serving(tmp_path / "site", keys) as door:
        fill(door, tmp_path / "site")
        at = {"endpoint": door.url, "key_env": "NGC_KEY"}
        plan = plan_file(tmp_path, {"source": "ngc://acme/vision/demo:1.10"} | at, {"source": "ngc://acme/vision/demo:1.0", "allow": ["*.json"]} | at)
        whole, part = sync(home, plan, keys["acme"])["items"]
        assert {n["kind"] for n in part["names"]} == {"model", "image"}
        assert sync(home, plan, keys["acme"])["items"][0]["status"] == "unchanged"
        assert sync(home, plan_file(tmp_path, {"source": "ngc://other/secret:1"} | at), keys["acme"], code=3)["failed"] == 1
    assert model_of(home, ref="1.10") == FILES and set(model_of(home)) == {p for p in FILES if p.endswith(".json")}
    disk = MirrorHome.open(home).disk
    found = [parse_manifest(disk.read(n["digest"], 1 << 22)) for n in whole["names"]]
    (signature,) = (m for m in found if m.artifact_type == SIGSTORE)
    assert disk.read(signature.layers[0].digest, 1 << 20) == SIGNED


def by_nim(tmp_path: Path, server: Operated, key: str, ca: Path) -> None:
    """The container's stand-in starts with the manifest as it lies in the image's layers here, and finds all files of the profile."""
    raw = find_manifest(RemoteRegistry(server.url, key, ca_file=str(ca)), NIM, "1.0.3").raw
    assert raw == manifest()
    (tmp_path / "nim").mkdir()
    status, said, _ = start(server, tmp_path / "nim", "root", json.loads(raw), NIM_MODEL_PROFILE=IDS["aa"])
    place = "models--nim--meta--llama3-8b-instruct/snapshots/hf"
    assert (status, cached(tmp_path / "nim")) == (0, {f"{place}/{f}": contents()[f] for f in ("config.json", "model.safetensors")}), said


def by_hub(tmp_path: Path, url: str, key: str, ca: Path) -> None:
    """`hf download` of an organisation's model, below the prefix that NGC's models have here."""
    env = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "HF_HOME": str(tmp_path / "hf"), "HF_ENDPOINT": f"{url}/ngc", "HF_TOKEN": key}
    env |= {"SSL_CERT_FILE": str(ca), "REQUESTS_CA_BUNDLE": str(ca), "NO_PROXY": "127.0.0.1"}
    argv = [str(Path(sys.executable).parent / "hf"), "download", "acme/open", "--revision", "1.0", "--local-dir", str(tmp_path / "hub")]
    done = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert {p: b for p, b in found(tmp_path / "hub").items() if not p.startswith(".cache")} == contents()


def by_oci(tmp_path: Path, url: str, key: str, ca: Path, home: Path) -> None:
    """skopeo has the model's and the image's very manifests; the referrers are those that the mirror attached."""
    names: dict[tuple[str, str], Any] = {(n.name, n.ref): n for n in MirrorHome.open(home).names()}
    model = names["ngc/acme/vision/demo", "1.0"]
    remote = RemoteRegistry(url, key, ca_file=str(ca))
    kinds = {d.artifact_type for d in remote.referrers(NOBODY_CALL, model.name, model.digest).items}
    assert kinds == {"application/vnd.dev.sigstore.bundle.v0.3+json", "application/vnd.airlock.ngc.version.v1+json"}
    if shutil.which("skopeo") is None:
        pytest.fail("skopeo is not installed; do: make system-test")
    (tmp_path / "certs").mkdir()
    shutil.copy(ca, tmp_path / "certs" / "ca.crt")
    for name, ref in ((model.name, "1.0"), (NIM, "1.0.3")):
        place = f"docker://{url.removeprefix('https://')}/{name}:{ref}"
        argv = ["skopeo", "--insecure-policy", "copy", f"--src-cert-dir={tmp_path / 'certs'}", f"--src-creds=$oauthtoken:{key}", place]
        done = subprocess.run([*argv, f"dir:{tmp_path}/{ref}"], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        raw = (tmp_path / ref / "manifest.json").read_bytes()
        assert digest_of(raw) == names[name, ref].digest
