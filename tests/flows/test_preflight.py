"""`airlock runtime preflight` and a start against faults that are real: another user's cache, read-only and full mounts, a container's own layer."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT, missing, need_root
from tests.fakes.nvml import host
from tests.flows.test_runtime_cache import SEED_LINE, Node, node  # noqa: F401 - the fixture

pytestmark = pytest.mark.server
LINES = dict[str, tuple[str, str, str]]


def report(done: subprocess.CompletedProcess[str]) -> LINES:
    """State, text and fix by check; the last of each."""
    assert "Traceback" not in done.stderr, done.stderr
    return {line["check"]: (line["state"], line["text"], line["fix"]) for line in json.loads(done.stdout)["lines"]}


def inside(node: Node, script: str, *argv: str, **env: str) -> subprocess.CompletedProcess[str]:  # noqa: F811
    """Runs the command in a mount namespace of its own, behind what `script` mounts there."""
    need_root()
    line = f"set -e\n{script}\nexec {shlex.join(argv)}"
    command = ["unshare", "-m", "--propagation", "private", "sh", "-c", line]
    return subprocess.run(command, env=node.env | env, capture_output=True, text=True, timeout=120, cwd=ROOT)


def test_all_is_well_and_says_what_it_looked_at(node: Node) -> None:  # noqa: F811
    done = node.run("preflight", "--json")
    found = report(done)
    assert done.returncode == 0, done.stdout
    assert set(found) >= {
        "key",
        "registry",
        "lease",
        "model",
        "cache",
        "file system",
        "space",
        "read speed",
        "shared memory",
        "GPUs",
        "driver",
        "port",
    }
    assert "300026 bytes of 300026 bytes have to be fetched" in found["space"][1] and "vllm-cpu-bf16-tp1" in found["model"][1]
    assert not (node.cache / "models").exists(), "it fetches nothing"
    assert node.run("download-to-cache").returncode == 0
    text = node.run("preflight")
    assert text.returncode == 0 and "ok   space: all 300026 bytes of the weights are there" in text.stdout


@pytest.mark.parametrize(("state", "key", "status"), [("ok", "", 20), ("ok", "nvapi-nonsense", 21), ("expired", None, 22), ("revoked", None, 23)])
def test_a_refused_key_is_the_exit_status_and_the_node_is_looked_at_all_the_same(node: Node, state: str, key: str | None, status: int) -> None:  # noqa: F811
    node.site.state = state
    done = node.run("preflight", "--json", **({} if key is None else {"NGC_API_KEY": key}))
    found = report(done)
    assert done.returncode == status and found["key"][0] == "fail" and found["cache"][0] == "ok" and found["port"][0] == "ok"


def test_the_registry_away_counts_only_where_the_cache_lacks_something(node: Node) -> None:  # noqa: F811
    assert node.run("serve").returncode == 36  # fills the cache and takes a lease
    node.site.close()
    done = node.run("preflight", "--json")
    found = report(done)
    assert done.returncode == 0 and found["registry"][0] == "warn" and "j1 until" in found["lease"][1]
    next((node.cache / "leases").glob("*.json")).unlink()
    assert node.run("preflight").returncode == 28


@pytest.fixture
def open_cache() -> Iterator[Path]:
    """A directory of root's that any user reaches; below pytest's own no other user gets, and each new run closes that again."""
    need_root()
    folder = Path(tempfile.mkdtemp(prefix="airlock-cache-", dir="/var/tmp"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


def test_a_cache_of_another_user_is_told_with_the_chown(node: Node, open_cache: Path) -> None:  # noqa: F811
    node.env["NIM_CACHE_PATH"] = str(open_cache)
    done = node.run("preflight", "--as", "1000:1000", "--json")
    state, text, fix = report(done)["cache"]
    assert done.returncode == 38 and state == "fail" and "Permission denied; owner 0:0, mode 0755, serving as 1000:1000" in text, done.stdout
    assert fix == f"on the host: chown 1000:1000 the directory that is mounted at {open_cache}"
    alone = subprocess.run(
        node.command("preflight", "--no-registry"), env=node.env, capture_output=True, text=True, user=1000, group=1000, timeout=60, cwd=ROOT
    )
    if "No module named" in alone.stderr or "Permission denied" in alone.stderr:
        missing("an environment of Python that uid 1000 can run")
    assert alone.returncode == 38 and "serving as 1000:1000" in alone.stdout, alone
    os.chown(open_cache, 1000, 1000)
    good = node.run("preflight", "--as", "1000:1000")
    assert good.returncode == 0, good.stdout
    assert node.run("preflight", "--as", "1000:x").returncode == 6


def test_a_read_only_mount_serves_what_is_complete_and_refuses_what_is_not(node: Node) -> None:  # noqa: F811
    bind = f"mount --bind {node.cache} {node.cache}; mount -o remount,ro,bind {node.cache}"
    node.cache.mkdir()
    empty = inside(node, bind, *node.command("preflight", "--json"))
    assert empty.returncode == 38 and "it is mounted read-only" in report(empty)["cache"][1]
    refused = inside(node, bind, *node.command("serve"))
    assert refused.returncode == 38 and "mounted read-only" in refused.stderr and SEED_LINE not in refused.stderr
    assert node.run("serve").returncode == 36
    full = inside(node, bind, *node.command("preflight", "--json"))
    assert full.returncode == 0 and report(full)["cache"][0] == "warn" and "it is complete and served as it is" in report(full)["cache"][1]
    assert inside(node, bind, *node.command("serve")).returncode == 36


def test_a_disk_that_is_too_small_is_told_before_the_first_byte(node: Node) -> None:  # noqa: F811
    node.cache.mkdir()
    small = f"mount -t tmpfs -o size=200k tmpfs {node.cache}"
    done = inside(node, small, *node.command("preflight", "--json"))
    state, text, fix = report(done)["space"]
    assert done.returncode == 48 and state == "fail" and "300026 bytes of 300026 bytes have to be fetched" in text
    assert "airlock runtime cache evict" in fix
    assert report(done)["file system"][1] == f"tmpfs at {node.cache}"
    refused = inside(node, small, *node.command("serve"))
    assert refused.returncode == 48 and "have to be fetched" in refused.stderr
    assert not [line for line in node.site.log if "/v2/acme/tiny/blobs/" in line and "bytes=" in line and "299" in line]


def test_the_layer_of_a_container_refuses_a_start_and_a_volume_in_it_does_not(node: Node) -> None:  # noqa: F811
    """A root file system as a container has it: overlay over this machine's, with the cache in its upper layer."""
    stage = node.folder / "stage"
    top = f"""mkdir -p {stage}/up {stage}/root
mount -t tmpfs tmpfs {stage}/up
mkdir {stage}/up/u {stage}/up/w
mount -t overlay overlay -o lowerdir=/,upperdir={stage}/up/u,workdir={stage}/up/w {stage}/root || exit 99
mount --bind /proc {stage}/root/proc
mount --bind /dev {stage}/root/dev
mkdir -p {stage}/root/opt/nim/.cache {stage}/root/opt/nim/cache"""
    enter = ["chroot", f"{stage}/root", "env", "-C", str(ROOT), "-u", "NIM_CACHE_PATH"]
    refused = inside(node, top, *enter, *node.command("serve"))
    if refused.returncode == 99:
        missing("a kernel that mounts an overlay over this root")
    assert refused.returncode == 38 and "/opt/nim/.cache is no volume but the container's own layer (overlay)" in refused.stderr, refused.stderr
    assert "-v /opt/nim-cache:/opt/nim/.cache" in refused.stderr
    meant = inside(node, top, *enter, "AIRLOCK_EPHEMERAL_CACHE=1", *node.command("serve"))
    assert meant.returncode == 36, meant.stderr
    volume = f"{top}\nmount -t tmpfs tmpfs {stage}/root/opt/nim/cache"
    published = inside(node, volume, *enter, *node.command("serve"))
    assert published.returncode == 36, published.stderr  # the published run line: -v /opt/nim-cache:/opt/nim/cache
    assert "a volume is mounted at /opt/nim/cache: it is the cache" in published.stderr


def test_before_an_unmodified_nim_it_needs_no_model_and_no_engine(node: Node) -> None:  # noqa: F811
    env = {k: v for k, v in node.env.items() if k != "AIRLOCK_ENGINE_VLLM"}
    argv = [sys.executable, "-m", "runtime", "preflight", "--json", "--weights-gb", "140"]
    done = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=60, cwd=ROOT)
    found = report(done)
    assert done.returncode == 0 and "model" not in found and "for 140.0 GB" in found["read speed"][1]


def test_a_taken_port_is_a_line_with_its_code(node: Node, tmp_path: Path) -> None:  # noqa: F811
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", int(node.env["NIM_HTTP_API_PORT"])))
        taken.listen()
        done = node.run("preflight", "--json")
    assert done.returncode == 37 and report(done)["port"][0] == "fail" and "NIM_HTTP_API_PORT" in report(done)["port"][2]


@pytest.mark.parametrize(
    ("env", "check", "words"),
    [
        ({"AIRLOCK_REGISTRY": ""}, "key", "AIRLOCK_REGISTRY is not set; expected: the URL of this site's registry"),
        ({"AIRLOCK_TRUST": "/etc/passwd"}, "model", "the site trust file is not valid JSON"),
        ({"NIM_MODEL_PROFILE": "auto"}, "model", "expected: one of: "),
        ({"AIRLOCK_EXPECT_PROFILE": "vllm-bf16-tp2"}, "model", "What was expected was not chosen"),
        ({"AIRLOCK_EXPECT_PROFILE": "tp="}, "model", "AIRLOCK_EXPECT_PROFILE holds 'tp='"),
        ({"NIM_PASSTHROUGH_ARGS": "--bogus 1"}, "model", "NIM_PASSTHROUGH_ARGS holds '--bogus'"),
        ({"NIM_MANIFEST_PATH": "/etc/passwd"}, "model", "has no signature of this site"),
        ({"NIM_MANIFEST_PATH": "/etc/passwd", "AIRLOCK_ALLOW_UNSIGNED": "a test"}, "model", "the model manifest has no profile"),
        ({"AIRLOCK_HOST": "192.0.2.1"}, "port", "Cannot assign requested address"),
        ({"NIM_CACHE_PATH": "/etc/passwd"}, "cache", "/etc/passwd is no directory"),
    ],
)
def test_it_ends_with_the_code_that_the_start_ends_with(node: Node, env: dict[str, str], check: str, words: str) -> None:  # noqa: F811
    """What passes the pre-flight and is refused by the start, or with another code, is no pre-flight."""
    looked, started = node.run("preflight", "--json", **env), node.run("serve", **env)
    found = report(looked)
    assert found[check][0] == "fail" and words in found[check][1] and found[check][2], found[check]
    assert looked.returncode == started.returncode == json.loads(looked.stdout)["exit_code"] != 0, (looked.stdout, started.stderr)
    assert "Traceback" not in started.stderr and not (node.cache / "models").exists()


def test_a_directory_that_nobody_signed_is_looked_at_as_it_is_started(node: Node, tmp_path: Path) -> None:  # noqa: F811
    header = json.dumps({"a": {"dtype": "BF16", "shape": [3 << 20], "data_offsets": [0, 6 << 20]}}).encode()
    own = tmp_path / "own"
    own.mkdir()
    (own / "config.json").write_text('{"model_type": "llama", "torch_dtype": "bfloat16"}')
    (own / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * (6 << 20))
    env = {"NIM_MODEL_NAME": str(own), "AIRLOCK_REGISTRY": ""}

    def look(**more: str) -> subprocess.CompletedProcess[str]:
        argv = [sys.executable, "-m", "runtime", "preflight", "--json"]
        return subprocess.run(argv, env=node.env | env | more, capture_output=True, text=True, timeout=60, cwd=ROOT)

    refused = look()
    assert refused.returncode == 46 and report(refused)["model"][0] == "fail" and "AIRLOCK_ALLOW_UNSIGNED" in report(refused)["model"][2]
    done = look(AIRLOCK_ALLOW_UNSIGNED="A. Person, to compare")
    found = report(done)
    assert done.returncode == 0 and found["model"][0] == "warn", done.stdout
    assert found["model"][1].startswith("UNSIGNED, A. Person, to compare: local/own:local runs with profile vllm-cpu-bf16-tp1")
    assert "lease" not in found and "all 6.3 MB of the weights are there" in found["space"][1] and "for 6.3 MB" in found["read speed"][1]


@pytest.mark.parametrize("word", ["preflight", "check-cache-env", "serve"])
def test_a_path_that_is_no_text_is_printed_all_the_same(node: Node, word: str) -> None:  # noqa: F811
    """A path is bytes; a terminal of UTF-8 takes no others."""
    done = node.run(word, NIM_CACHE_PATH=os.fsdecode(os.fsencode(node.cache) + b"\xff"), PYTHONIOENCODING="utf-8:strict")
    assert done.returncode == (36 if word == "serve" else 0) and "Traceback" not in done.stderr, done.stderr
    assert "cache\\udcff can be written" in done.stdout + done.stderr


@pytest.mark.parametrize("host", ["é" * 70, os.fsdecode(b"\xff")])
def test_an_address_that_is_no_name_at_all(node: Node, host: str) -> None:  # noqa: F811
    looked, started = node.run("preflight", "--json", AIRLOCK_HOST=host), node.run("serve", AIRLOCK_HOST=host)
    assert report(looked)["port"][0] == "fail" and "cannot be used: no name of a host" in report(looked)["port"][1], looked.stdout
    assert looked.returncode == started.returncode == 37 and "Traceback" not in started.stderr, started.stderr


@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_what_is_no_file_among_the_weights_is_told_before_the_start(node: Node, kind: str) -> None:  # noqa: F811
    assert node.run("download-to-cache").returncode == 0
    blob = node.blob("model.safetensors")
    blob.unlink()
    blob.symlink_to("/etc/passwd") if kind == "link" else os.mkfifo(blob)
    looked, started = node.run("preflight", "--json"), node.run("serve")
    assert report(looked)["weights"][0] == "fail" and str(blob) in report(looked)["weights"][1], looked.stdout
    assert looked.returncode == started.returncode == 38 and str(blob) in started.stderr, started.stderr


@pytest.mark.parametrize("size", ["inf", "nan", "-5", "1e300"])
def test_a_size_of_weights_that_is_none(node: Node, size: str) -> None:  # noqa: F811
    done = node.run("preflight", "--no-registry", "--weights-gb", size)
    assert done.returncode == 6 and "cause: --weights-gb" in done.stderr and "expected: gigabytes from 0 to 1000000" in done.stderr, done.stderr


def test_a_described_host_is_told_as_one(node: Node, nvml: Path) -> None:  # noqa: F811
    config = node.folder / "gpus.cfg"
    config.write_text(host("h100", each="free=20000000000"))
    env = {"LD_LIBRARY_PATH": str(nvml), "FAKE_NVML_CONFIG": str(config)}
    done = node.run("preflight", "--no-registry", "--json", **env)
    assert json.loads(done.stdout)["simulated"] is True and "(SIMULATED)" in report(done)["driver"][1]
    assert report(done)["GPUs"][0] == "warn" and json.loads(node.run("preflight", "--no-registry", "--json").stdout)["simulated"] is False


HANG = """
import ctypes, os, struct, subprocess, sys, threading
place, looks, *argv = sys.argv[1:]
fd = os.open("/dev/fuse", os.O_RDWR)
options = f"fd={fd},rootmode=40000,user_id=0,group_id=0".encode()
if ctypes.CDLL(None, use_errno=True).mount(b"filer:/export/nim", place.encode(), b"fuse", 6, options):
    sys.exit(99)
def serve():  # a look at the top, and that nothing lies in it; from the first file that is made on, nothing (linux/fuse.h)
    attr = struct.pack("<QQQQQQIIIIIIIIII", 1, 0, 0, 0, 0, 0, 0, 0, 0, 0o40777, 2, 0, 0, 0, 4096, 0)
    told = {26: struct.pack("<IIIIHHIIHHI28x", 7, 23, 65536, 0, 12, 10, 65536, 1, 16, 0, 0), 3: struct.pack("<QII", 0, 0, 0) + attr}
    refused = {1: 2}  # LOOKUP: ENOENT; else ENOSYS
    while True:
        raw = os.read(fd, 1 << 18)
        _, call, number = struct.unpack_from("<IIQ", raw)
        body = told.get(call, b"")
        os.write(fd, struct.pack("<IiQ", 16 + len(body), 0 if body else -refused.get(call, 38), number) + body)
        if call == 1 and b".preflight" in raw:
            return
if looks == "looks":
    threading.Thread(target=serve, daemon=True).start()
done = subprocess.run(argv, timeout=50)
ctypes.CDLL(None).umount2(place.encode(), 2)
sys.exit(done.returncode)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("word", "looks"), [("preflight", ""), ("serve", ""), ("check-cache-env", ""), ("serve", "looks")])
def test_a_file_system_that_never_answers_is_named(node: Node, word: str, looks: str) -> None:  # noqa: F811
    """`looks`: it tells what it is, and never answers a write, as a mount whose server went away a moment ago."""
    need_root()
    if not Path("/dev/fuse").exists():
        missing("/dev/fuse")
    node.cache.mkdir(parents=True)
    argv = ["unshare", "-m", sys.executable, "-c", HANG, str(node.cache), looks, *node.command(word)]
    done = subprocess.run(argv, env=node.env, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 38 and f"{node.cache} did not answer within 20 s: fuse of filer:/export/nim at {node.cache}" in done.stderr, done
