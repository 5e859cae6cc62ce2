"""`airlock nim profiles`, `export` and `env` against a real registry, and starts from what was exported.

The container is tests/fakes/nim.py: this says that its sequence is answered from the tree, not that a NIM works.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from blake3 import blake3

from tests.conftest import missing, need_root
from tests.contracts.ngc import FILES, PLUS, fill, new_ngc_site, ngc_serving
from tests.contracts.nim_images import PLACE, SHAPE1, Entry, nim_layers, push_image, tar
from tests.flows.answered import gaps
from tests.flows.test_fake_ngc import contents
from tests.flows.test_ngc_flow import NIM as NIM_IMAGE
from tests.flows.test_ngc_flow import imported, mirrored
from tests.operated import Operated, operated, wait_for

pytestmark = pytest.mark.server
AIRLOCK = str(Path(sys.executable).parent / "airlock")
NIM = Path(__file__).resolve().parent.parent / "fakes" / "nim.py"
IMAGE = "nvcr.io/nim/meta/llama:1.8.4"
WEIGHTS = random.Random(7).randbytes(40_000_000)
ENGINE = {"config.json": b'{"b":2}', "rank0.engine": WEIGHTS, "sub dir/tokenizer+1.json": b"{}", "LICENSE": b"", "copy.bin": b'{"b":2}'}
COMMIT = "0123456789abcdef0123456789abcdef01234567"
WHOLE, OTHER, LACKING, HUB = (letter * 64 for letter in "abcd")
PROFILES: dict[str, dict[str, str]] = {
    WHOLE: {path: f"ngc://nim/meta/engine:fp8-1.0?file={path}" for path in ENGINE if path != "rank0.engine"}
    | {"trtllm_engine/rank0.engine": "ngc://nim/meta/engine:fp8-1.0?file=rank0.engine"}
    | {"params/config.json": f"ngc://nim/meta/llama:{PLUS}?file=config.json"},
    OTHER: {
        "config.json": f"ngc://nim/meta/llama:{PLUS}?file=config.json",
        "model.safetensors": f"ngc://nim/meta/llama:{PLUS}?file=model.safetensors",
    },
    LACKING: {"config.json": "ngc://nim/meta/engine:fp8-1.0?file=config.json", "x": "ngc://nim/meta/absent:1?file=x"},
    HUB: {"config.json": "hf://acme/M:main?file=config.json", "w/model.safetensors": f"hf://acme/M:{COMMIT}?file=model.safetensors"},
}
TAGS = {WHOLE: ("tensorrt_llm", "2"), OTHER: ("vllm", "1"), LACKING: ("vllm", "4"), HUB: ("sglang", "1")}


def manifest() -> dict[str, Any]:
    """What the image's manifest says, with the sum of one file."""
    out = []
    for name, files in PROFILES.items():
        engine, tp = TAGS[name]
        listed: dict[str, dict[str, str]] = {path: {"uri": uri} for path, uri in files.items()}
        if name == WHOLE:
            listed["trtllm_engine/rank0.engine"]["checksum"] = blake3(WEIGHTS).hexdigest()
        tags = {"llm_engine": engine, "precision": "fp8", "tp": tp, "pp": "1"}
        out.append({"id": name, "tags": tags, "workspace": {"files": listed}})
    return {"schema_version": "2.0", "profiles": out}


RAW = b"# shipped as it is\n" + yaml.safe_dump(manifest(), sort_keys=False).encode()


OLD = b"""whole:
  tags: {backend: triton, precision: fp16}
  workspace: !workspace
    components:
    - {dst: 'models/', src: {repo_id: 'nim/meta/engine:fp8-1.0'}}
    - {dst: '', src: {repo_id: 'ngc://nim/meta/llama:fp16', files: [!name 'config.json', !name 'sub/deep/ranks 0+1 \xc3\xbc%25.bin']}}
clash:
  tags: {backend: onnx}
  workspace: !workspace
    components:
    - {dst: '', src: {repo_id: 'nim/meta/engine:fp8-1.0', files: [config.json]}}
    - {dst: '', src: {repo_id: 'nim/meta/llama:fp16', files: [config.json]}}
unknown:
  tags: {backend: pytorch}
  workspace: !workspace
    components:
    - {dst: a, src: {repo_id: nim/meta/engine, files: [config.json]}}
    - {dst: b, src: {files: [x]}}
    - {dst: c, src: {repo_id: 's3://bucket/key'}}
    - {dst: d, src: {repo_id: 'nim/meta/engine:fp8-1.0', files: [none.bin]}}
"""


ODD = b"""odd:
  workspace: {components: [{dst: '', src: {repo_id: 'hf://acme/odd:main'}}]}
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Operated]:
    data = tmp_path_factory.mktemp("nim") / "data"
    keys = new_ngc_site(data)
    with ngc_serving(data, keys) as door:
        fill(door, data)
        door.push("ngc/nim/meta/engine", "fp8-1.0", ENGINE)
        push_image(door.main, *IMAGE.split(":"), nim_layers(RAW))
        push_image(door.main, "nvcr.io/nim/meta/old", "1", nim_layers(OLD))
        door.push("hf/acme/odd", "main", {"blobs": b"x", "config.json": b"{}"}, commit="..")
        push_image(door.main, "nvcr.io/nim/meta/odd", "1", nim_layers(ODD))
        push_image(door.main, "nvcr.io/nim/meta/native", "1", [tar(Entry("x"))], config={"Labels": {LABEL: "native-v1"}})
    places = {"AIRLOCK_NGC": "127.0.0.1:0", "AIRLOCK_S3": "127.0.0.1:0"}
    with operated(data, keys, AIRLOCK_TLS="self-signed", **places) as found:
        yield found
        assert gaps(found.log) == [], "a probe that no route took"


LABEL = "com.nvidia.nim.model_download_protocol"


def authority(server: Operated) -> str:
    return str(server.data / "tls" / "cert.pem")


def site(server: Operated, who: str = "root") -> dict[str, str]:
    """The environment of whoever works at this site."""
    plain = {k: v for k, v in os.environ.items() if not k.startswith("AIRLOCK_")}
    return plain | {"AIRLOCK_KEY": server.keys[who], "AIRLOCK_REGISTRY": server.url, "AIRLOCK_CA_FILE": authority(server)}


def command(server: Operated, *words: str, who: str = "root", **more: Any) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([AIRLOCK, "nim", *words], env=site(server, who), capture_output=True, text=True, timeout=120, check=False, **more)
    assert "Traceback" not in done.stderr and server.keys[who] not in done.stdout + done.stderr
    return done


def exported(server: Operated, folder: Path, profile: str = WHOLE, *more: str, **run: Any) -> dict[str, Any]:
    done = command(server, "export", str(folder), IMAGE, profile, "--json", *more, **run)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def start(folder: Path, profile: str = WHOLE, inside: dict[str, Any] | None = None, **env: str) -> subprocess.CompletedProcess[str]:
    """The container on a site without a network, and as the user whom it runs as."""
    what = folder.parent / "model_manifest.json"
    what.write_text(json.dumps(inside or manifest()))
    fake = folder.parent / "nim.py"
    shutil.copy(NIM, fake)
    given = {"NIM_MODEL_PROFILE": profile, "NIM_CACHE_PATH": str(folder), "PLAY_WATCH": "1", **env}
    user: dict[str, Any] = {"user": 1000, "group": 2000, "extra_groups": []} if os.geteuid() == 0 else {}
    for parent in folder.parents[:3] if user else ():  # the test's own folders are root's alone
        parent.chmod(parent.stat().st_mode | 0o055)
    argv = [shutil.which("python3", path="/usr/bin:/usr/local/bin") or sys.executable, "-P", str(fake), str(what)]
    found = next(str(p) for p in map(Path, sys.path) if (p / "blake3").is_dir())
    return subprocess.run(argv, capture_output=True, text=True, timeout=60, env=given | {"PYTHONPATH": found}, check=False, **user)


def served(done: subprocess.CompletedProcess[str]) -> dict[str, str]:
    assert done.returncode == 0, done.stderr + done.stdout
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {line["file"]: line["sha256"] for line in lines}


def wanted() -> dict[str, str]:
    data = {path: ENGINE[path] for path in ENGINE if path != "rank0.engine"} | {
        "trtllm_engine/rank0.engine": WEIGHTS,
        "params/config.json": b'{"a":1}',
    }
    return {path: hashlib.sha256(raw).hexdigest() for path, raw in data.items()}


def test_the_profiles_of_a_mirrored_image_and_what_is_here(server: Operated) -> None:
    done = command(server, "profiles", IMAGE, "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert {p["id"]: p["here"] for p in told["profiles"]} == {WHOLE: True, OTHER: True, LACKING: False, HUB: True}
    missing = told["profiles"][2]["missing"]
    assert [m["uri"] for m in missing] == ["ngc://nim/meta/absent:1?file=x"] and "is not here" in missing[0]["reason"]
    assert told["manifest"] == "/opt/nim/etc/default/model_manifest.yaml" and told["shape"] == 2
    table = command(server, "profiles", f"{server.url.removeprefix('https://')}/{IMAGE}").stdout
    assert "tensorrt_llm-fp8-tp2" in table and "1 of 2 files missing" in table and table.count("whole") == 3


def test_the_manifest_is_shipped_as_it_is(server: Operated) -> None:
    done = subprocess.run([AIRLOCK, "nim", "profiles", IMAGE, "--manifest"], capture_output=True, env=site(server), check=True)
    assert done.stdout == RAW


@pytest.mark.parametrize(("image", "words"), [("nvcr.io/nim/meta/none:1", "not"), ("nvcr.io/nim/meta/native:1", "native-v1")])
def test_images_without_a_manifest(server: Operated, image: str, words: str) -> None:
    done = command(server, "profiles", image)
    assert done.returncode == 3 and words in done.stderr


@pytest.mark.full
def test_an_image_of_real_tools_with_a_whiteout(server: Operated, tmp_path: Path) -> None:
    """umoci builds it layer by layer, skopeo pushes it: an older manifest below, the newer above it, and in a second image both hidden."""
    layout, old, new = tmp_path / "layout", tmp_path / "old.yaml", tmp_path / "new.yaml"
    old.write_bytes(SHAPE1)
    new.write_bytes(RAW)
    rootless = ["--rootless"] if os.geteuid() else []

    def well(*argv: str) -> None:
        done = subprocess.run(argv, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr

    def insert(image: str, *words: str) -> None:
        well("umoci", "insert", *rootless, "--image", f"{layout}:{image}", *words)

    well("umoci", "init", "--layout", str(layout))
    well("umoci", "new", "--image", f"{layout}:both")
    for file in (old, new):
        insert("both", str(file), f"/{PLACE}")
    well("umoci", "tag", "--image", f"{layout}:both", "hidden")
    insert("hidden", "--whiteout", f"/{PLACE}")
    well("umoci", "tag", "--image", f"{layout}:hidden", "opaque")
    insert("opaque", str(old), f"/{PLACE}")
    (tmp_path / "empty").mkdir()
    insert("opaque", "--opaque", str(tmp_path / "empty"), "/opt/nim/etc")
    creds = f"$oauthtoken:{server.keys['root']}"
    for name in ("both", "hidden", "opaque"):
        target = f"docker://{server.url.removeprefix('https://')}/acme/built:{name}"
        well("skopeo", "copy", "--dest-tls-verify=false", f"--dest-creds={creds}", f"oci:{layout}:{name}", target)
    done = subprocess.run([AIRLOCK, "nim", "profiles", "acme/built:both", "--manifest"], capture_output=True, env=site(server), check=True)
    assert done.stdout == RAW
    for name in ("hidden", "opaque"):
        refused = command(server, "profiles", f"acme/built:{name}")
        assert refused.returncode == 3 and "has no model manifest" in refused.stderr


def test_a_container_starts_from_the_exported_cache_alone(server: Operated, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    told = exported(server, cache, "trtllm-fp8-tp2-pp1")
    assert (told["profile"], told["files"], told["kept"]) == (WHOLE, 6, 0) and told["fetched"] >= len(WEIGHTS)
    before = len(server.lines())
    done = start(cache)
    assert served(done) == wanted() and "a connection was opened" not in done.stderr
    assert len(server.lines()) == before, "it asked the registry"
    links = [p for p in cache.rglob("*") if p.is_symlink()]
    assert len(links) == 6 and all(not Path(os.readlink(p)).is_absolute() and p.resolve(strict=True).is_file() for p in links)
    blobs = cache / "ngc/hub/models--nim--meta--engine/blobs"
    assert {p.name for p in blobs.iterdir()} == {hashlib.md5(raw).hexdigest() for raw in ENGINE.values()}, "one content, one blob"
    assert (cache / "ngc/hub/tmp").is_dir() and not (cache / ".airlock-export").exists()


def test_the_tree_survives_a_copy_with_its_links(server: Operated, tmp_path: Path) -> None:
    exported(server, tmp_path / "cache")
    subprocess.run(["cp", "-a", str(tmp_path / "cache"), str(tmp_path / "carried")], check=True)
    shutil.rmtree(tmp_path / "cache")
    assert served(start(tmp_path / "carried")) == wanted()


def test_owner_and_modes(server: Operated, tmp_path: Path) -> None:
    need_root()
    cache = tmp_path / "cache"
    told = exported(server, cache, umask=0o077)
    assert told["owned"] and told["owner"] == "1000:2000"
    for path in [cache, *cache.rglob("*")]:
        found = path.lstat()
        assert (found.st_uid, found.st_gid) == (1000, 2000), path
        if stat.S_ISDIR(found.st_mode):
            assert stat.S_IMODE(found.st_mode) == 0o2775, path
        elif stat.S_ISREG(found.st_mode):
            assert stat.S_IMODE(found.st_mode) == 0o664, path
    other = tmp_path / "other"
    assert exported(server, other, OTHER, "--owner", "0:0")["owner"] == "0:0" and other.stat().st_gid == 0


def test_a_directory_of_others_keeps_its_owner_and_mode(server: Operated, tmp_path: Path) -> None:
    need_root()
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o1777)
    (shared / "theirs").write_text("x")
    exported(server, shared, OTHER)
    assert (shared.stat().st_uid, stat.S_IMODE(shared.stat().st_mode)) == (0, 0o1777) and (shared / "ngc").stat().st_uid == 1000
    assert (shared / "theirs").stat().st_uid == 0


def test_a_commit_that_is_none_names_no_folder(server: Operated, tmp_path: Path) -> None:
    """Whoever pushes a model writes its annotations."""
    done = command(server, "export", str(tmp_path / "cache"), "nvcr.io/nim/meta/odd:1", "odd")
    assert done.returncode == 0, done.stderr
    repo = tmp_path / "cache" / "huggingface" / "hub" / "models--acme--odd"
    assert {p.name for p in repo.iterdir()} == {"blobs", "refs", "snapshots"} and (repo / "refs" / "main").read_text() == "main"
    assert (repo / "snapshots" / "main" / "config.json").read_bytes() == b"{}"


def test_whoever_is_not_root_is_told_what_to_do(server: Operated, tmp_path: Path) -> None:
    need_root()
    for parent in (tmp_path, *tmp_path.parents[:2]):
        parent.chmod(parent.stat().st_mode | 0o055)
    mine = tmp_path / "mine"
    mine.mkdir()
    os.chown(mine, 1001, 1001)
    ca = tmp_path / "ca.crt"
    shutil.copy(authority(server), ca)
    code = (  # the modules are read as root, whom alone a test environment may belong to
        "import os, sys, yaml, blake3, encodings.idna; from artifact.cli import run; from artifact.commands.nim_export import main\n"
        "os.setgroups([]); os.setgid(1001); os.setuid(1001); sys.exit(run(main, sys.argv[1:]))"
    )
    argv = [sys.executable, "-c", code, str(mine / "cache"), IMAGE, OTHER, "--ca-file", str(ca)]
    done = subprocess.run(argv, env=site(server), capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert f"chown -hR 1000:2000 {mine}/cache" in done.stdout and (mine / "cache").stat().st_uid == 1001


def test_a_second_profile_comes_beside_the_first_and_nothing_is_fetched_twice(server: Operated, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    exported(server, cache)
    told = exported(server, cache, OTHER)
    assert (told["files"], told["kept"]) == (2, 1) and told["fetched"] == 3_000_000, "the shared file is there"
    again = exported(server, cache)
    assert (again["kept"], again["fetched"]) == (6, 0)
    assert served(start(cache)) == wanted() and set(served(start(cache, OTHER))) == {"config.json", "model.safetensors"}


def test_a_damaged_file_is_made_whole(server: Operated, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    exported(server, cache, OTHER)
    hit = next(p for p in cache.rglob("model.safetensors")).resolve()
    hit.write_bytes(b"\0" * hit.stat().st_size)
    assert exported(server, cache, OTHER)["kept"] == 1
    assert set(served(start(cache, OTHER))) == {"config.json", "model.safetensors"}


def test_a_plain_directory(server: Operated, tmp_path: Path) -> None:
    model = tmp_path / "model"
    exported(server, model, WHOLE, "--form", "directory")
    assert served(start(model, NIM_MODEL_PATH=str(model))) == wanted() == served(start(model, NIM_MODEL_NAME=str(model)))
    assert not [p for p in model.rglob("*") if p.is_symlink()] and [p.name for p in tmp_path.glob(".airlock*")] == []
    assert exported(server, model, WHOLE, "--form", "directory")["kept"] == 6
    (model / "config.json").unlink()
    done = command(server, "export", str(model), IMAGE, WHOLE, "--form", "directory")
    assert done.returncode == 8 and "with other content" in done.stderr


def test_an_older_shape_with_a_whole_version_below_a_folder(server: Operated, tmp_path: Path) -> None:
    done = command(server, "export", str(tmp_path / "model"), "nvcr.io/nim/meta/old:1", "triton-fp16", "--form", "directory")
    assert done.returncode == 0, done.stderr
    found = {str(p.relative_to(tmp_path / "model")): p.read_bytes() for p in (tmp_path / "model").rglob("*") if p.is_file()}
    odd = "sub/deep/ranks 0+1 \u00fc%25.bin"
    assert found == {f"models/{path}": raw for path, raw in ENGINE.items()} | {"config.json": b'{"a":1}', odd: FILES[odd]}
    told = json.loads(command(server, "profiles", "nvcr.io/nim/meta/old:1", "--json").stdout)
    reasons = " ".join(m["reason"] for m in next(p for p in told["profiles"] if p["id"] == "unknown")["missing"])
    assert told["shape"] == 1 and all(word in reasons for word in ("no version", "where it comes from", "from s3://", "is without it"))


def test_two_files_of_one_name_fit_into_a_cache_alone(server: Operated, tmp_path: Path) -> None:
    words = ("export", str(tmp_path / "x"), "nvcr.io/nim/meta/old:1", "clash")
    done = command(server, *words, "--form", "directory")
    assert done.returncode == 6 and "--form cache" in done.stderr and not (tmp_path / "x").exists()
    assert command(server, *words).returncode == 0 and len([p for p in (tmp_path / "x").rglob("config.json") if p.is_symlink()]) == 2


def test_a_profile_that_is_not_whole_is_refused_with_the_way_to_bring_it(server: Operated, tmp_path: Path) -> None:
    done = command(server, "export", str(tmp_path / "cache"), IMAGE, LACKING)
    assert done.returncode == 3 and not (tmp_path / "cache").exists()
    assert "ngc://nim/meta/absent:1?file=x" in done.stderr and f"source: nim://{IMAGE}" in done.stderr
    unknown = command(server, "export", str(tmp_path / "cache"), IMAGE, "auto")
    assert unknown.returncode == 3 and WHOLE in unknown.stderr and "vllm-fp8-tp4" in unknown.stderr


def test_a_key_that_sees_less(server: Operated, tmp_path: Path) -> None:
    done = command(server, "export", str(tmp_path / "cache"), IMAGE, WHOLE, who="nothing")
    assert done.returncode in (3, 4) and not (tmp_path / "cache").exists()


def test_kill_9_leaves_nothing_that_looks_whole_and_the_next_run_goes_on(server: Operated, tmp_path: Path) -> None:
    """Killed as soon as the big file has begun to arrive, again and again, each time a little later."""
    cache = tmp_path / "cache"
    argv = [AIRLOCK, "nim", "export", str(cache), IMAGE, WHOLE, "--workers", "1"]
    ended, kept = False, 0
    for i in range(8):
        child = subprocess.Popen(argv, env=site(server), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        if i == 0:
            wait_for(lambda: list((cache / ".airlock-export" / "partial").glob("*")) if cache.exists() else [], "the big file begins")
        time.sleep(0.05 * i)
        ended = child.poll() is not None
        child.send_signal(signal.SIGKILL)
        child.wait(20)
        if ended:
            break
        kept += (cache / ".airlock-export").exists()
        done = start(cache)
        if done.returncode == 0:
            assert served(done) == wanted(), "whole is whole"
    assert kept, "it was never killed in the middle"
    assert exported(server, cache)["files"] == 6
    assert served(start(cache)) == wanted() and not (cache / ".airlock-export").exists()


def test_no_room_is_told_before_anything_is_fetched(server: Operated, tmp_path: Path) -> None:
    need_root()
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "none", str(small)], check=False, capture_output=True).returncode:
        missing("a kernel that mounts")
    try:
        done = command(server, "export", str(small / "cache"), IMAGE, WHOLE)
        assert done.returncode == 9 and "are free" in done.stderr
        assert sum(p.stat().st_blocks for p in small.rglob("*") if p.is_file()) * 512 < 100_000
        shutil.rmtree(small / "cache")
        done = command(server, "export", str(small), IMAGE, OTHER, "--form", "directory")
        assert done.returncode == 6 and "is a mount" in done.stderr, "told before anything is fetched"
    finally:
        subprocess.run(["umount", str(small)], check=True)


@pytest.mark.parametrize("planted", ["ngc", "ngc/hub/models--nim--meta--engine", ".airlock-export"])
def test_a_link_that_lies_in_the_target_is_not_followed(server: Operated, tmp_path: Path, planted: str) -> None:
    elsewhere, cache = tmp_path / "elsewhere", tmp_path / "cache"
    elsewhere.mkdir()
    (cache / planted).parent.mkdir(parents=True)
    (cache / planted).symlink_to(elsewhere)
    done = command(server, "export", str(cache), IMAGE, WHOLE)
    assert done.returncode == 6 and "is a link" in done.stderr and list(elsewhere.iterdir()) == []


def test_the_hub_form_is_one_that_the_hub_client_reads(server: Operated, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    exported(server, cache, HUB)
    code = (
        "import sys; from huggingface_hub import hf_hub_download as get\n"
        "for name, rev in (('config.json', 'main'), ('model.safetensors', sys.argv[2])):\n"
        "    print(get('acme/M', name, revision=rev, cache_dir=sys.argv[1], local_files_only=True))\n"
    )
    hub = cache / "huggingface" / "hub"
    done = subprocess.run([sys.executable, "-c", code, str(hub), COMMIT], capture_output=True, text=True, check=False, env={"HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.splitlines()[0]).read_bytes() == b'{"a":1}'


def test_a_nim_that_came_over_the_gap(tmp_path: Path) -> None:
    """Mirrored from NGC's stand-in by its profile, packed, imported, exported: the container starts with what the image's own manifest says."""
    data, keys = imported(tmp_path, mirrored(tmp_path))
    with operated(data, keys, AIRLOCK_TLS="self-signed") as here:
        image = f"{NIM_IMAGE}:1.0.3"
        done = command(here, "export", str(tmp_path / "cache"), image, "vllm-bf16-tp1", "--json")
        assert done.returncode == 0, done.stderr
        told = json.loads(done.stdout)
        raw = subprocess.run([AIRLOCK, "nim", "profiles", image, "--manifest"], capture_output=True, env=site(here), check=True).stdout
        refused = [p for p in json.loads(command(here, "profiles", image, "--json").stdout)["profiles"] if not p["here"]]
    found = served(start(tmp_path / "cache", told["profile"], json.loads(raw)))
    assert found and set(found.values()) <= {hashlib.sha256(content).hexdigest() for content in contents().values()}
    assert refused, "profiles that were not chosen are not here, and told so"


def test_two_exports_into_one_directory_do_not_meet(server: Operated, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    first = subprocess.Popen(
        [AIRLOCK, "nim", "export", str(cache), IMAGE, WHOLE], env=site(server), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        wait_for(lambda: list((cache / ".airlock-export" / "partial").glob("*")) if cache.exists() else [], "the first has begun")
        first.send_signal(signal.SIGSTOP)
        done = command(server, "export", str(cache), IMAGE, OTHER)
        assert done.returncode == 8 and "another export" in done.stderr
    finally:
        first.send_signal(signal.SIGCONT)
        assert first.wait(60) == 0
    assert served(start(cache)) == wanted()


# ---- what a container is started with


def container(server: Operated, text: str, secrets: dict[str, str]) -> dict[str, str]:
    """What docker makes of an --env-file: a bare name is taken from outside; the mount of the authority's file is played by its own path."""
    pairs = [line.split("=", 1) if "=" in line else [line, secrets[line]] for line in text.splitlines()]
    env = dict(pairs)
    assert (
        len(env) == len(pairs)
        and env.pop("REQUESTS_CA_BUNDLE") == env.pop("AWS_CA_BUNDLE") == env["SSL_CERT_FILE"] == "/etc/ssl/certs/airlock-ca.pem"
    )
    return env | {"SSL_CERT_FILE": authority(server)}


def played(folder: Path, env: dict[str, str]) -> dict[str, str]:
    """A start of the container with an environment, as fetched files by their place in the cache."""
    what = folder / "model_manifest.json"
    what.write_text(json.dumps(manifest()))
    given = env | {"NIM_CACHE_PATH": str(folder / "cache")}
    done = subprocess.run([sys.executable, "-P", str(NIM), str(what)], capture_output=True, text=True, timeout=60, env=given, check=False)
    assert done.returncode == 0, done.stderr
    hub = folder / "cache" / "ngc" / "hub"
    return {str(p.relative_to(hub)): hashlib.sha256(p.read_bytes()).hexdigest() for p in hub.rglob("*") if p.is_file()}


def told(server: Operated, way: str, profile: str = WHOLE, form: str = "env", *more: str) -> str:
    assert server.told
    trusted = "site-ca" if form.startswith("nim") else authority(server)  # in Kubernetes a config map
    words = ("--way", way, "--format", form, "--ngc", server.told["ngc"], "--s3", server.told["s3"], "--ca", trusted)
    done = command(server, "env", IMAGE, profile, *words, *more)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_environment_starts_the_container_by_the_ngc_listener(server: Operated, tmp_path: Path) -> None:
    found = played(tmp_path, container(server, told(server, "ngc"), {"NGC_API_KEY": server.keys["root"]}))
    assert sorted(found.values()) == sorted(wanted().values())


def test_the_environment_starts_the_container_by_the_s3_override(server: Operated, tmp_path: Path) -> None:
    shown = subprocess.run([AIRLOCK, "key", "s3"], env=site(server), capture_output=True, text=True, check=True).stdout
    pair = dict(line.split("=", 1) for line in shown.splitlines() if line.startswith("AWS_"))
    env = container(server, told(server, "s3"), pair)
    assert env["NIM_REPOSITORY_OVERRIDE"] == "s3://nim/"
    assert sorted(played(tmp_path, env | {"PLAY_STYLE": "path"}).values()) == sorted(wanted().values())


def test_the_environment_leads_the_hub_client_here(server: Operated, tmp_path: Path) -> None:
    env = container(server, told(server, "hf", HUB), {"HF_TOKEN": server.keys["root"]})
    code = "import sys; from huggingface_hub import hf_hub_download as get; print(get('acme/M', 'config.json', cache_dir=sys.argv[1]))"
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0 and Path(done.stdout.strip()).read_bytes() == b'{"a":1}', done.stderr


@pytest.mark.parametrize("form", ["docker", "nimcache", "nimservice"])
def test_every_other_format_says_the_same(server: Operated, form: str) -> None:
    env = dict(line.split("=", 1) for line in told(server, "ngc").splitlines() if "=" in line)
    text = told(server, "ngc", WHOLE, form)
    if form == "docker":
        assert all(f"-e {name}={value}" in text for name, value in env.items()) and "-e NGC_API_KEY \\" in text
    else:
        spec = yaml.safe_load(text)["spec"]
        found = {e["name"]: e["value"] for e in spec["env"]}
        assert {k: v for k, v in found.items() if "CA" not in k and "CERT" not in k} == {
            k: v for k, v in env.items() if "CA" not in k and "CERT" not in k
        }
    shown = json.loads(told(server, "ngc", WHOLE, form, "--json"))
    assert shown["text"] + "\n" == text and shown["secrets"] == ["NGC_API_KEY"]


def test_no_environment_for_what_is_not_whole_here(server: Operated) -> None:
    done = command(server, "env", IMAGE, LACKING, "--ngc", "https://x")
    assert done.returncode == 3 and "ngc://nim/meta/absent:1?file=x" in done.stderr
