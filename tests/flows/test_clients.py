"""Unmodified clients of three ecosystems against one registry process: with a right they succeed, without one they are refused cleanly."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import missing
from tests.contracts.doors import Door, new_site, serving, sha
from tests.contracts.oci_client import EMPTY, IMAGE, Client, descriptor, digest, image
from tests.contracts.test_hub_door import FILES, push
from tests.flows.answered import accessed, gaps

pytestmark = pytest.mark.server
HF = Path(sys.executable).parent / "hf"
MAX_S = 120


@pytest.fixture(scope="module")
def door(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Door]:
    data = tmp_path_factory.mktemp("clients") / "data"
    keys = new_site(data)
    with serving(data, keys) as found:
        push(found, "hf/acme/m", FILES)
        push(found, "acme/own", FILES, ref="1")
        yield found
        assert gaps(found.log) == [], "a probe that no route took"


def run(*argv: str, **env: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "AIRLOCK_"))}
    done = subprocess.run(argv, capture_output=True, text=True, timeout=MAX_S, env={**clean, **env}, check=False)
    assert "Traceback" not in done.stderr.split("huggingface_hub.errors")[0] or "hf" in argv[0], done.stderr
    return done


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file() and ".cache" not in p.parts}


def hf(door: Door, home: Path, who: str | None, *argv: str) -> subprocess.CompletedProcess[str]:
    env = {"HF_ENDPOINT": door.url, "HF_HOME": str(home), "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_UPDATE_CHECK": "1"}
    if who:
        env["HF_TOKEN"] = door.keys[who]
    if door.url.startswith("https://"):
        env["SSL_CERT_FILE"] = str(door.data / "tls" / "cert.pem")
    return run(str(HF), *argv, **env)


@pytest.mark.parametrize(("model", "revision"), [("acme/m", "main"), ("ACME/m", "main"), ("acme/own", "1")])
def test_hf_download(door: Door, tmp_path: Path, model: str, revision: str) -> None:
    done = hf(door, tmp_path / "home", "acme", "download", model, "--revision", revision, "--local-dir", str(tmp_path / "model"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert contents(tmp_path / "model") == FILES


def test_hf_download_into_the_cache_and_verify(door: Door, tmp_path: Path) -> None:
    done = hf(door, tmp_path, "acme", "download", "acme/m")
    assert done.returncode == 0, done.stderr
    again = hf(door, tmp_path, "acme", "download", "acme/m", "model.safetensors")
    assert again.returncode == 0, again.stderr
    checked = hf(door, tmp_path, "acme", "cache", "verify", "acme/m")
    assert checked.returncode == 0, checked.stdout + checked.stderr
    me = hf(door, tmp_path, "acme", "auth", "whoami")
    assert me.returncode == 0 and "acme" in me.stdout


@pytest.mark.parametrize(
    ("who", "model", "words"),
    [
        (None, "acme/m", "401"),
        ("expired", "acme/m", "401"),
        ("other", "acme/m", "Access denied"),
        ("other", "acme/own", "404"),
        ("acme", "acme/none", "404"),
    ],
)
def test_hf_is_refused(door: Door, tmp_path: Path, who: str | None, model: str, words: str) -> None:
    done = hf(door, tmp_path / "home", who, "download", model, "--local-dir", str(tmp_path / "model"))
    said = done.stdout + done.stderr
    assert done.returncode != 0 and (words in said or "not found" in said.lower()), said
    assert not any(p.suffix in (".json", ".safetensors") for p in (tmp_path / "model").rglob("*"))
    assert not any(key in said for key in door.keys.values())


def skopeo(*argv: str) -> subprocess.CompletedProcess[str]:
    if not shutil.which("skopeo"):
        missing("skopeo")
    return run("skopeo", "--insecure-policy", *argv)


def place(door: Door, name: str) -> str:
    return f"docker://127.0.0.1:{door.port}/{name}"


def layout(folder: Path) -> tuple[str, bytes]:
    """An OCI image layout with one image of one layer; returns its manifest's digest and bytes."""
    import gzip
    import io
    import tarfile

    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        info = tarfile.TarInfo("hello")
        info.size = 500_000
        tar.addfile(info, io.BytesIO(os.urandom(500_000)))
    layer = gzip.compress(buffer.getvalue())
    base = "application/vnd.oci.image"
    config = {"architecture": "amd64", "os": "linux", "rootfs": {"type": "layers", "diff_ids": [sha(buffer.getvalue())]}, "config": {}}
    raw_config = json.dumps(config).encode()
    doc = {
        "schemaVersion": 2,
        "mediaType": f"{base}.manifest.v1+json",
        "config": {"mediaType": f"{base}.config.v1+json", "digest": sha(raw_config), "size": len(raw_config)},
        "layers": [{"mediaType": f"{base}.layer.v1.tar+gzip", "digest": sha(layer), "size": len(layer)}],
    }
    raw = json.dumps(doc).encode()
    blobs = folder / "blobs" / "sha256"
    blobs.mkdir(parents=True)
    for data in (layer, raw_config, raw):
        (blobs / sha(data)[7:]).write_bytes(data)
    entry = {"mediaType": doc["mediaType"], "digest": sha(raw), "size": len(raw), "annotations": {"org.opencontainers.image.ref.name": "1"}}
    (folder / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [entry]}))
    (folder / "oci-layout").write_text('{"imageLayoutVersion":"1.0.0"}')
    return sha(raw), raw


def test_skopeo_both_ways(door: Door, tmp_path: Path) -> None:
    digest, raw = layout(tmp_path / "from")
    user = f"$oauthtoken:{door.keys['acme']}"
    pushed = skopeo(
        "copy", "--preserve-digests", "--dest-tls-verify=false", f"--dest-creds={user}", f"oci:{tmp_path}/from:1", place(door, "acme/image:1")
    )
    assert pushed.returncode == 0, pushed.stderr
    assert door.ask("GET", "/v2/acme/image/manifests/1").body == raw
    pulled = skopeo(
        "copy", "--preserve-digests", "--src-tls-verify=false", f"--src-creds={user}", place(door, "acme/image:1"), f"oci:{tmp_path}/to:1"
    )
    assert pulled.returncode == 0, pulled.stderr
    assert (tmp_path / "to" / "blobs" / "sha256" / digest[7:]).read_bytes() == raw
    assert {p.name for p in (tmp_path / "to/blobs/sha256").iterdir()} == {p.name for p in (tmp_path / "from/blobs/sha256").iterdir()}
    shown = skopeo("inspect", "--tls-verify=false", f"--creds={user}", place(door, "acme/image:1"))
    assert shown.returncode == 0 and digest in shown.stdout, shown.stderr
    moved = skopeo(
        "copy",
        "--src-tls-verify=false",
        "--dest-tls-verify=false",
        f"--src-creds={user}",
        f"--dest-creds={user}",
        place(door, "acme/image:1"),
        place(door, "acme/copied:2"),
    )
    assert moved.returncode == 0 and door.ask("GET", "/v2/acme/copied/manifests/2").body == raw, moved.stderr


@pytest.mark.parametrize(("who", "words"), [(None, "key"), ("other", "name unknown"), ("expired", "expired on"), ("reader", "denied")])
def test_skopeo_is_refused(door: Door, tmp_path: Path, who: str | None, words: str) -> None:
    layout(tmp_path / "from")
    creds = f"$oauthtoken:{door.keys[who]}" if who else ""
    source = ["--src-tls-verify=false", *([f"--src-creds={creds}"] if who else ["--src-no-creds"])]
    pulled = skopeo("copy", *source, place(door, "acme/own:1"), f"oci:{tmp_path}/to:1")
    assert pulled.returncode != 0 and words in pulled.stderr, pulled.stderr
    dest = ["--dest-tls-verify=false", *([f"--dest-creds={creds}"] if who else ["--dest-no-creds"])]
    pushed = skopeo("copy", *dest, f"oci:{tmp_path}/from:1", place(door, "acme/refused:1"))
    assert pushed.returncode != 0, pushed.stderr
    assert door.ask("GET", "/v2/acme/refused/tags/list").status == 404
    assert not any(key in pulled.stderr + pushed.stderr for key in door.keys.values())


def requests(door: Door) -> list[dict[str, object]]:
    """The registry's access log."""
    return accessed(door.log)


def test_skopeo_lists_tags_and_deletes(door: Door, tmp_path: Path) -> None:
    layout(tmp_path / "from")
    user = f"--creds=$oauthtoken:{door.keys['acme']}"
    for tag in ("b", "a", "c"):
        pushed = skopeo("copy", "--dest-tls-verify=false", f"--dest-{user[2:]}", f"oci:{tmp_path}/from:1", place(door, f"acme/listed:{tag}"))
        assert pushed.returncode == 0, pushed.stderr
    listed = skopeo("list-tags", "--tls-verify=false", user, place(door, "acme/listed"))
    assert listed.returncode == 0 and json.loads(listed.stdout)["Tags"] == ["a", "b", "c"], listed.stderr
    reader = skopeo("delete", "--tls-verify=false", f"--creds=$oauthtoken:{door.keys['reader']}", place(door, "acme/listed:a"))
    assert reader.returncode and door.ask("GET", "/v2/acme/listed/manifests/a").status == 200
    deleted = skopeo("delete", "--tls-verify=false", user, place(door, "acme/listed:a"))
    assert deleted.returncode == 0, deleted.stderr
    assert [door.ask("GET", f"/v2/acme/listed/manifests/{t}").status for t in "abc"] == [404] * 3  # skopeo deletes the digest behind the tag


def test_skopeo_syncs_a_repository_out_and_in(door: Door, tmp_path: Path) -> None:
    user = f"$oauthtoken:{door.keys['acme']}"
    digests = []
    for tag in ("1", "2"):
        digests.append(layout(tmp_path / tag)[0])
        pushed = skopeo("copy", "--dest-tls-verify=false", f"--dest-creds={user}", f"oci:{tmp_path}/{tag}:1", place(door, f"acme/synced:{tag}"))
        assert pushed.returncode == 0, pushed.stderr
    source = f"127.0.0.1:{door.port}/acme/synced"
    out = skopeo("sync", "--src", "docker", "--dest", "dir", "--src-tls-verify=false", f"--src-creds={user}", source, str(tmp_path / "out"))
    assert out.returncode == 0, out.stderr
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["synced:1", "synced:2"]
    target = f"127.0.0.1:{door.port}/acme/back"
    back = skopeo("sync", "--src", "dir", "--dest", "docker", "--dest-tls-verify=false", f"--dest-creds={user}", str(tmp_path / "out"), target)
    assert back.returncode == 0, back.stderr
    assert [sha(door.ask("GET", f"/v2/acme/back/synced/manifests/{tag}").body) for tag in ("1", "2")] == digests


def test_skopeo_shows_what_is_named_by_sha512(door: Door) -> None:
    """All that skopeo 1.9 can do with such names: it copies them from no registry, since it takes every digest for SHA-256."""
    client, config, layer = Client(door.port, door.keys["acme"]), b'{"architecture":"amd64","os":"linux"}', b"512"
    for data in (config, layer):
        client.blob("acme/long", data, "sha512")
    raw = image(config, [layer], "sha512")
    client.put("acme/long", f"{digest(raw, 'sha512')}?tag=1", raw)
    client.put("acme/long", "2", raw)
    user = f"--creds=$oauthtoken:{door.keys['acme']}"
    for name in (f"docker://127.0.0.1:{door.port}/acme/long@{digest(raw, 'sha512')}", place(door, "acme/long:1"), place(door, "acme/long:2")):
        shown = skopeo("inspect", "--raw", "--tls-verify=false", user, name)
        assert shown.returncode == 0 and shown.stdout.encode() == raw, shown.stderr


ORAS = """
import sys, time, oras.client
time.sleep = lambda _s: None  # the library tries five times with pauses up to 83 s, also when it was refused
action, host, name, user, key, folder, *files = sys.argv[1:]
client = oras.client.OrasClient(hostname=host, insecure=True, auth_backend="basic" if key else "token")
if key:
    client.auth.set_basic_auth(user, key)
if action == "push":
    client.push(target=f"{host}/{name}", files=files, disable_path_validation=True)
elif action == "push-chunks":
    client.push(target=f"{host}/{name}", files=files, disable_path_validation=True, do_chunked=True, chunk_size=1_000_000)
elif action == "attach":
    import oras.oci
    *files, kind, digest, size = files
    subject = oras.oci.Subject("application/vnd.oci.image.manifest.v1+json", digest, int(size))
    client.push(target=f"{host}/{name}", files=files, disable_path_validation=True, subject=subject, manifest_annotations={"kind": kind})
elif action == "tags":
    print(",".join(client.get_tags(f"{host}/{name}")))
else:
    client.pull(target=f"{host}/{name}", outdir=folder)
"""


def oras(door: Door, action: str, name: str, who: str | None, folder: Path, *files: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-c", ORAS, action, f"127.0.0.1:{door.port}", name, "$oauthtoken", door.keys[who] if who else "", str(folder), *files]
    return subprocess.run(argv, capture_output=True, text=True, timeout=MAX_S, cwd=folder, check=False, env={**os.environ, "HOME": str(folder)})


def test_oras_push_and_pull(door: Door, tmp_path: Path) -> None:
    source, target = tmp_path / "from", tmp_path / "to"
    source.mkdir()
    target.mkdir()
    (source / "weights.bin").write_bytes(os.urandom(3_000_000))
    (source / "notes.txt").write_bytes(b"notes")
    pushed = oras(door, "push", "acme/artifact:1", "acme", source, "weights.bin", "notes.txt")
    assert pushed.returncode == 0, pushed.stderr
    pulled = oras(door, "pull", "acme/artifact:1", "acme", target)
    assert pulled.returncode == 0, pulled.stderr
    assert {n: (target / n).read_bytes() for n in ("weights.bin", "notes.txt")} == {
        n: (source / n).read_bytes() for n in ("weights.bin", "notes.txt")
    }


def test_oras_pull_gives_the_model_directory(door: Door, tmp_path: Path) -> None:
    pulled = oras(door, "pull", "acme/own:1", "acme", tmp_path)
    assert pulled.returncode == 0, pulled.stderr
    found = contents(tmp_path)
    assert {k: found.get(k) for k in FILES} == FILES


@pytest.mark.parametrize("who", [None, "other", "expired"])
def test_oras_is_refused(door: Door, tmp_path: Path, who: str | None) -> None:
    (tmp_path / "a.txt").write_text("a")
    pulled = oras(door, "pull", "acme/own:1", who, tmp_path)
    pushed = oras(door, "push", "acme/stolen:1", who, tmp_path, "a.txt")
    assert pulled.returncode != 0 and pushed.returncode != 0
    assert not (tmp_path / "config.json").exists() and door.ask("GET", "/v2/acme/stolen/tags/list").status == 404


def test_oras_pushes_by_chunks_and_lists_tags(door: Door, tmp_path: Path) -> None:
    (tmp_path / "w.bin").write_bytes(os.urandom(3_500_000))
    seen = len(requests(door))
    pushed = oras(door, "push-chunks", "acme/chunks:1", "acme", tmp_path, "w.bin")
    assert pushed.returncode == 0, pushed.stderr
    assert len([e for e in requests(door)[seen:] if e["method"] == "PATCH" and e["status"] == 202]) >= 4
    assert door.ask("GET", f"/v2/acme/chunks/blobs/{sha((tmp_path / 'w.bin').read_bytes())}").body == (tmp_path / "w.bin").read_bytes()
    listed = oras(door, "tags", "acme/chunks", "acme", tmp_path)
    assert listed.stdout.strip() == "1", listed.stderr


def test_oras_attaches_what_the_referrers_api_lists(door: Door, tmp_path: Path) -> None:
    (tmp_path / "w.bin").write_bytes(os.urandom(1000))
    (tmp_path / "sbom.json").write_bytes(b'{"sbom":1}')
    assert oras(door, "push", "acme/attached:1", "acme", tmp_path, "w.bin").returncode == 0
    raw = door.ask("GET", "/v2/acme/attached/manifests/1").body
    done = oras(door, "attach", "acme/attached:sbom", "acme", tmp_path, "sbom.json", "sbom", sha(raw), str(len(raw)))
    assert done.returncode == 0, done.stderr
    client = Client(door.port, door.keys["acme"])
    listed = client.ask("GET", f"/v2/acme/attached/referrers/{sha(raw)}").json()["manifests"]
    attached = door.ask("GET", "/v2/acme/attached/manifests/sbom").body
    assert [(d["digest"], d["annotations"]["kind"]) for d in listed] == [(sha(attached), "sbom")]
    # as `oras attach` does: by digest, without a tag, and it looks at OCI-Subject to know that no fallback tag is needed
    client.blob("acme/attached", b"{}")
    more = image(b"{}", [], config=descriptor(b"{}", EMPTY), artifactType="application/vnd.example.note", subject=descriptor(raw, IMAGE))
    assert client.put("acme/attached", digest(more), more).get("oci-subject") == sha(raw)
    assert len(client.ask("GET", f"/v2/acme/attached/referrers/{sha(raw)}").json()["manifests"]) == 2
    assert door.ask("GET", "/v2/acme/attached/tags/list").json()["tags"] == ["1", "sbom"]
