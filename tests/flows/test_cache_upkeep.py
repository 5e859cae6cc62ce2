"""The cache in use: eviction that spares what runs, verification, scrub, several containers on one cache, what an engine sees, no connection."""

from __future__ import annotations

import json
import os
import pickle
import random
import socket
import subprocess
import threading
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from artifact import profile
from artifact.disk import Disk
from artifact.errors import Unavailable
from artifact.manifest import digest_of
from artifact.store import File
from runtime import upkeep
from tests.conftest import ROOT, need_root
from tests.flows.test_runtime_cache import KEY, Node, blobs_asked, node  # noqa: F401 - the fixture

pytestmark = pytest.mark.server


def rot(path: Path, at: int = 1000) -> None:
    """One bit, same size, modification time set back: what a stamp alone would believe, were it not for the change time."""
    before, raw = path.stat(), bytearray(path.read_bytes())
    raw[at] ^= 1
    path.chmod(0o644)
    path.write_bytes(raw)
    path.chmod(0o444)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def second(node: Node, seed: int = 9) -> tuple[str, Path]:  # noqa: F811
    """Another version of the model, brought into the same cache: its digest, and the directory of the one before."""
    first = node.model_dir()
    node.files["model.safetensors"] = random.Random(seed).randbytes(300_000)
    node.publish()
    assert node.run("download-to-cache").returncode == 0
    return node.model_digest, first


def cache(node: Node, *argv: str) -> subprocess.CompletedProcess[str]:  # noqa: F811
    command = [a for a in node.command("cache", *argv) if a not in ("--model", "acme/tiny:1")]
    return subprocess.run(command, env=node.env, capture_output=True, text=True, timeout=60, cwd=ROOT)


def test_what_was_used_longest_ago_goes_and_what_others_share_stays(node: Node) -> None:  # noqa: F811
    assert node.run("download-to-cache").returncode == 0
    before = node.model_digest
    after, old = second(node)
    os.utime(old, (1_700_000_000, 1_700_000_000))
    listed = json.loads(cache(node, "list", "--json").stdout)
    assert [(m["digest"], m["files"], m["bytes"], m["in_use"]) for m in listed["models"]] == [(d, 3, 300_026, False) for d in (after, before)]
    dry = cache(node, "evict", "--keep-bytes", "400K", "--dry-run")
    assert dry.returncode == 0 and f"acme/tiny@{before} would be removed" in dry.stdout and old.is_dir()
    done = cache(node, "evict", "--keep-bytes", "400K", "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["models"] == [f"acme/tiny@{before}"]
    assert not old.exists() and {p.name for p in node.model_dir().iterdir()} == {"config.json", "sub", "model.safetensors"}
    asked = len(blobs_asked(node))
    assert node.run("download-to-cache").returncode == 0 and len(blobs_asked(node)) == asked, "nothing of the model that stayed has to be fetched"


def test_a_model_that_runs_is_spared(node: Node) -> None:  # noqa: F811
    assert node.run("download-to-cache").returncode == 0
    with upkeep.holding(node.model_dir()):
        assert json.loads(cache(node, "list", "--json").stdout)["models"][0]["in_use"] is True
        done = cache(node, "evict", "--keep-bytes", "0")
        assert done.returncode == 48 and "in use: acme/tiny@" in done.stderr and node.model_dir().is_dir()
    assert cache(node, "evict", "--free-bytes", "1").returncode == 0 and node.model_dir().is_dir()
    never = cache(node, "evict", "--free-bytes", "999999T")
    assert never.returncode == 6 and "--free-bytes 999999T is more than its disk has" in never.stderr and node.model_dir().is_dir()
    assert cache(node, "evict", "--keep-bytes", "64K").returncode == 0 and not node.model_dir().exists()
    assert cache(node, "evict").returncode == cache(node, "evict", "--keep-bytes", "1X").returncode == 6


def test_leftovers_go_first_and_a_link_in_the_cache_is_not_followed(node: Node) -> None:  # noqa: F811
    assert node.run("download-to-cache").returncode == 0
    left = node.cache / "partial" / f"sha256-{'a' * 64}"
    left.write_bytes(b"x" * 100_000)
    os.utime(left, (1, 1))
    victim = node.folder / "victim" / ("a" * 12)
    victim.mkdir(parents=True)
    (victim / "precious").write_text("x")
    (node.cache / "models" / "evil").symlink_to(node.folder / "victim")
    total = sum(size for _, size in Disk(node.cache).walk())
    assert cache(node, "evict", "--keep-bytes", str(total - 50_000)).returncode == 0
    assert not left.exists() and node.model_dir().is_dir() and (victim / "precious").exists()
    assert cache(node, "evict", "--keep-bytes", "64K").returncode == 0
    assert not node.model_dir().exists() and (victim / "precious").exists()


def test_verify_finds_what_a_stamp_would_and_repair_lets_it_be_fetched(node: Node) -> None:  # noqa: F811
    assert node.run("download-to-cache").returncode == 0
    assert cache(node, "verify").returncode == 0
    rot(node.blob("model.safetensors"))
    found = cache(node, "verify", "--json")
    assert found.returncode == 39
    (bad,) = json.loads(found.stdout)["damaged"]
    assert bad["file"] == "acme/tiny: model.safetensors" and bad["path"] == str(node.blob("model.safetensors"))
    assert cache(node, "verify", "--repair").returncode == 0 and not node.blob("model.safetensors").exists()
    lacking = cache(node, "verify")
    assert lacking.returncode == 39 and "missing: acme/tiny: model.safetensors\n" in lacking.stdout and "fetched again" in lacking.stderr
    node.blob("model.safetensors").symlink_to("/etc/passwd")
    assert json.loads(cache(node, "verify", "--json").stdout)["missing"] == ["acme/tiny: model.safetensors"]
    node.blob("model.safetensors").unlink()
    assert node.run("download-to-cache").returncode == 0 and cache(node, "verify").returncode == 0
    assert (node.model_dir() / "model.safetensors").read_bytes() == node.files["model.safetensors"]


def scrub(node: Node, repaired: list[str], fails: bool = False) -> upkeep.Scrub:  # noqa: F811
    """The thread over the node's model; a repair writes the right bytes, or fails as a registry that is away does."""
    files = tuple(File(path, digest_of(raw), len(raw)) for path, raw in node.files.items())

    def repair(file: File) -> None:
        if fails:
            raise Unavailable("the registry does not answer", reason="connection_refused")
        disk = Disk(node.cache)
        disk.delete(file.digest)
        disk.put(node.files[file.path])
        disk.link(file.digest, node.model_dir() / file.path)
        repaired.append(file.path)

    return upkeep.Scrub(node.cache, node.model_dir(), files, 50_000_000, repair, first_s=0.0, pass_s=0.05)


def test_the_scrub_finds_damage_beside_a_running_model_tells_it_and_has_it_fetched(node: Node) -> None:  # noqa: F811
    assert node.run("download-to-cache").returncode == 0
    repaired: list[str] = []
    running = scrub(node, repaired)
    running.start()
    try:
        wait(lambda: running.passes > 0)
        assert running.warning() == "" and not repaired
        rot(node.blob("model.safetensors"))
        wait(lambda: repaired == ["model.safetensors"] and running.passes > 2)
    finally:
        running.stop()
    assert "1 file(s) of the weights were damaged on the disk and fetched again; restart" in running.warning()
    assert (node.model_dir() / "model.safetensors").read_bytes() == node.files["model.safetensors"]
    assert 'airlock_scrub_damaged_files{state="repaired"} 1' in running.metrics()


def test_damage_that_cannot_be_repaired_stays_a_warning(node: Node) -> None:  # noqa: F811
    assert node.run("download-to-cache").returncode == 0
    rot(node.blob("sub/vocab.txt"), 0)
    running = scrub(node, [], fails=True)
    running.once()
    assert running.warning() == "1 file(s) of the weights are damaged on the disk and cannot be fetched again"
    slow = upkeep.Scrub(node.cache, node.model_dir(), running.files, 100_000, running.repair)
    began = time.monotonic()
    slow.once()
    assert time.monotonic() - began > 2.5, "300 kB at 100 kB/s"


def wait(true: object, seconds: float = 20.0) -> None:
    until = time.monotonic() + seconds
    while not true():  # type: ignore[operator]
        assert time.monotonic() < until, "not within its time"
        time.sleep(0.02)


def test_several_containers_fill_one_cache_at_one_time(node: Node) -> None:  # noqa: F811
    node.files["model.safetensors"] = random.Random(5).randbytes(20 << 20)
    node.publish()
    started = [subprocess.Popen(node.command("download-to-cache"), env=node.env, stderr=subprocess.PIPE, text=True) for _ in range(4)]
    for child in started:
        _, told = child.communicate(timeout=120)
        assert child.returncode == 0, told
    assert {str(p.relative_to(node.model_dir())): p.read_bytes() for p in node.model_dir().rglob("*") if p.is_file()} == node.files
    assert not [p for p in (node.cache / "partial").iterdir() if not p.name.endswith(".journal")]
    assert not list((node.cache / "models").rglob(".*")), "no half made directory stays"


# ---- what an engine gets to see (A31)


class Evil:
    def __reduce__(self) -> tuple[object, ...]:
        return (os.system, ("touch /tmp/never",))


def test_code_and_pickles_of_a_promoted_model_are_not_handed_over(node: Node) -> None:  # noqa: F811
    node.files |= {"modeling_tiny.py": b"import os\n", "pytorch_model.bin": pickle.dumps(Evil()), "optimizer.pt": b"x"}
    node.publish()
    done = node.run("download-to-cache")
    assert done.returncode == 0, done.stderr
    assert {str(p.relative_to(node.model_dir())) for p in node.model_dir().rglob("*") if p.is_file()} == {
        "config.json",
        "sub/vocab.txt",
        "model.safetensors",
    }
    assert "modeling_tiny.py is code, and the promoted profile does not say that it may run" in done.stderr
    assert "pytorch_model.bin may be a pickle" in done.stderr and "optimizer.pt may be a pickle" in done.stderr
    assert "(0 bytes fetched" in node.run("download-to-cache").stderr, "the second start is warm all the same"


def test_code_is_handed_over_where_the_promoted_profile_says_so(node: Node) -> None:  # noqa: F811
    node.files["modeling_tiny.py"] = b"import os\n"
    if "trust_remote_code" not in profile.OPTIONS:
        pytest.fail("the option that lets code run is gone")
    node.profiles[0]["options"] = {"trust_remote_code": "true"}
    node.publish()
    assert node.run("download-to-cache").returncode == 0
    assert (node.model_dir() / "modeling_tiny.py").read_bytes() == b"import os\n"


def zipped() -> bytes:
    import io

    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(Evil()))
    raw = bytearray(out.getvalue())
    raw[6] |= 1  # the flag "encrypted": scanners pass over it, torch does not look (CVE-2025-10156)
    return bytes(raw)


@pytest.mark.parametrize(
    ("name", "raw", "words"),
    [
        ("tokenizer.json", pickle.dumps(Evil()), "tokenizer.json of the model is a pickle"),
        ("tokenizer.json", zipped(), "tokenizer.json of the model is a zip archive"),
        ("weights.dat", pickle.dumps(Evil(), 2), "weights.dat of the model is a pickle"),
        ("config.json", b"\0" * 64, "config.json of the model is no text"),
    ],
)
def test_a_pickle_under_the_name_of_data_refuses_the_start(node: Node, name: str, raw: bytes, words: str) -> None:  # noqa: F811
    node.files[name] = raw
    node.publish()
    refused = node.run("serve")
    assert refused.returncode == 47 and words in refused.stderr and "Traceback" not in refused.stderr, refused.stderr
    assert not node.model_dir().exists()


def test_weights_that_are_pickles_alone_refuse_the_start(node: Node) -> None:  # noqa: F811
    del node.files["model.safetensors"]
    node.files["pytorch_model.bin"] = pickle.dumps(Evil())
    node.publish()
    refused = node.run("serve")
    assert refused.returncode == 47 and "the model's weights are pickles (pytorch_model.bin)" in refused.stderr


# ---- no connection


@contextmanager
def counting() -> Iterator[tuple[str, list[object]]]:
    """A listener that counts who connects; it answers nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        seen: list[object] = []

        def accept() -> None:
            while True:
                try:
                    connection, peer = server.accept()
                except OSError:
                    return
                seen.append(peer)
                connection.close()

        threading.Thread(target=accept, daemon=True).start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}", seen
        server.shutdown(socket.SHUT_RDWR)


def test_offline_with_a_key_and_complete_files_no_connection_is_opened(node: Node) -> None:  # noqa: F811
    assert node.run("serve").returncode == 36  # fills the cache and takes a lease
    with counting() as (url, seen):
        assert node.run("serve", AIRLOCK_REGISTRY=url).returncode == 36 and seen, "without the switch the listener is asked"
        seen.clear()
        started = node.run("serve", AIRLOCK_REGISTRY=url, AIRLOCK_OFFLINE="1")
        assert started.returncode == 36 and "Lease j1 until" in started.stderr, started.stderr
        assert node.run("list-model-profiles", AIRLOCK_REGISTRY=url, AIRLOCK_OFFLINE="1").returncode == 0
        assert node.run("preflight", AIRLOCK_REGISTRY=url, AIRLOCK_OFFLINE="1").returncode == 0
        assert node.run("serve", AIRLOCK_REGISTRY=url, AIRLOCK_OFFLINE="1", NGC_API_KEY="").returncode == 36, "the stored lease is the proof"
        node.blob("model.safetensors").unlink()
        lacking = node.run("serve", AIRLOCK_REGISTRY=url, AIRLOCK_OFFLINE="1")
        assert lacking.returncode == 39 and "model.safetensors" in lacking.stderr
        next((node.cache / "leases").glob("*.json")).unlink()
        refused = node.run("serve", AIRLOCK_REGISTRY=url, AIRLOCK_OFFLINE="1")
        assert refused.returncode == 45 and "AIRLOCK_OFFLINE is set" in refused.stderr and KEY not in refused.stderr
    assert seen == []


def test_a_warm_start_works_in_a_network_namespace_without_an_interface(node: Node) -> None:  # noqa: F811
    need_root()
    assert node.run("serve").returncode == 36
    argv = ["unshare", "-n", *node.command("serve")]
    env = node.env | {"AIRLOCK_OFFLINE": "1", "AIRLOCK_HOST": "0.0.0.0", "AIRLOCK_REGISTRY": "https://registry.site"}
    done = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.returncode == 36 and "Lease j1 until" in done.stderr, done.stderr


def test_without_downloads_the_registry_is_asked_for_key_and_lease_only(node: Node) -> None:  # noqa: F811
    refused = node.run("serve", NIM_DISABLE_MODEL_DOWNLOAD="1")
    assert refused.returncode in (9, 39) and not [line for line in blobs_asked(node) if digest_of(node.files["model.safetensors"]) in line]
    assert node.run("serve").returncode == 36
    asked = len(blobs_asked(node))
    assert node.run("serve", NIM_DISABLE_MODEL_DOWNLOAD="1").returncode == 36 and len(blobs_asked(node)) == asked
