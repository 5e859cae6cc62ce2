"""Transfers on real sockets: parallel pieces, faults, resume after kill -9, graphs, pushes that go on, the `model push` command."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from artifact import copy as copy_module
from artifact import disk as disk_module
from artifact import push as push_module
from artifact.copy import Progress, copy_graph, fetch
from artifact.disk import Disk
from artifact.errors import AirlockError, Mismatch, NotFound, Unavailable
from artifact.manifest import INDEX, MANIFEST, parse_manifest
from artifact.push import push_blob
from artifact.remote import RemoteRegistry
from tests.fakes.blobhost import BlobHost
from tests.fakes.registry import registry

SMALL = 1_000_000


@pytest.fixture
def host() -> Iterator[BlobHost]:
    server = BlobHost()
    yield server
    server.close()


@pytest.fixture(autouse=True)
def pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of 1 MB, so that fast tests have many."""
    for module in (copy_module, disk_module, push_module):
        monkeypatch.setattr(module, "PIECE", SMALL)
    for module in (copy_module, push_module):
        monkeypatch.setattr(module, "SMALL", 1000)
    monkeypatch.setattr(copy_module, "CHECKPOINT", 300_000)


def get(host: BlobHost, digest: str, size: int, disk: Disk, workers: int = 4, progress: Progress | None = None) -> Path:
    remote = RemoteRegistry(host.url, timeout_s=5)
    return fetch(lambda lo, hi: remote.stream("a/b", digest, lo, hi), digest, size, disk, progress, workers)


@pytest.mark.slow
@pytest.mark.parametrize("size", [0, 1, 999, 1000, 1001, SMALL, 5 * SMALL + 1])
@pytest.mark.parametrize("workers", [1, 4])
def test_fetch(host: BlobHost, tmp_path: Path, size: int, workers: int) -> None:
    data = os.urandom(size)
    digest, disk = host.add(data), Disk(tmp_path)
    progress = Progress(size, "x", None)
    assert get(host, digest, size, disk, workers, progress).read_bytes() == data
    assert progress.done == size
    asked = len(host.log)
    assert get(host, digest, size, disk, workers, progress).read_bytes() == data
    assert len(host.log) == asked
    assert list((tmp_path / "partial").iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("size", [900, 3 * SMALL])
@pytest.mark.parametrize("fault", ["cut", "short", "503", "wrong_range"])
def test_faults_are_retried_from_where_they_broke(host: BlobHost, tmp_path: Path, fault: str, size: int) -> None:
    data = os.urandom(size)
    digest = host.add(data)
    host.faults = [fault, "", fault, fault]
    progress = Progress(size, "x", None)
    assert get(host, digest, size, Disk(tmp_path), progress=progress).read_bytes() == data
    assert progress.done == size
    if size > SMALL:
        assert len({span for lo, hi in host.sent for span in range(lo // 1000, hi // 1000)}) <= size // 1000
        assert sum(hi - lo for lo, hi in host.sent) <= size


def test_a_server_without_ranges_is_read_as_one_stream(host: BlobHost, tmp_path: Path) -> None:
    data = os.urandom(4 * SMALL + 5)
    digest = host.add(data)
    host.faults = ["", "whole", "whole", "whole", "whole", "whole"]
    assert get(host, digest, len(data), Disk(tmp_path)).read_bytes() == data
    host.add(data + b"x")
    other = "sha256:" + hashlib.sha256(data + b"x").hexdigest()
    host.faults = ["whole"] * 5 + ["cut"] + ["whole"] * 5
    assert get(host, other, len(data) + 1, Disk(tmp_path)).read_bytes() == data + b"x"


@pytest.mark.parametrize("size", [900, 3 * SMALL])
def test_a_flipped_byte_keeps_nothing(host: BlobHost, tmp_path: Path, size: int) -> None:
    digest, disk = host.add(os.urandom(size)), Disk(tmp_path)
    host.faults = ["flip"]
    with pytest.raises(Mismatch):
        get(host, digest, size, disk)
    assert disk.size(digest) is None
    assert not list(tmp_path.rglob("partial/*"))
    assert get(host, digest, size, disk).stat().st_size == size


def test_a_size_beyond_every_disk_is_refused_at_once(host: BlobHost, tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="no room"):
        get(host, "sha256:" + "0" * 64, 1 << 62, Disk(tmp_path))
    assert host.log == []


def test_what_is_refused_for_good_is_not_retried(host: BlobHost, tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        get(host, "sha256:" + "0" * 64, 3 * SMALL, Disk(tmp_path))
    assert len(host.log) <= 4


def test_a_dead_server_is_given_up(host: BlobHost, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copy_module, "ATTEMPTS", 2)
    digest = host.add(os.urandom(3 * SMALL))
    host.faults = ["503"] * 50
    with pytest.raises(Unavailable):
        get(host, digest, 3 * SMALL, Disk(tmp_path))


STALLED = """
import sys, threading
from pathlib import Path
from artifact.copy import fetch
from artifact.digest import PIECE
from artifact.disk import Disk
begun = threading.Barrier(3)
def ranges(lo, hi):
    yield b"0"
    begun.wait()
    threading.Event().wait()
threading.Thread(target=fetch, args=(ranges, "sha256:" + 64 * "a", 2 * PIECE, Disk(Path(sys.argv[1]))), daemon=True).start()
begun.wait()
"""


@pytest.mark.slow
def test_a_program_ends_without_what_a_thread_of_its_own_still_fetches(tmp_path: Path) -> None:
    """As the scrub beside a running model does, which is told to stop while a shard comes again."""
    subprocess.run([sys.executable, "-c", STALLED, str(tmp_path)], check=True, timeout=30)


@pytest.mark.server
def test_kill_minus_nine_fetches_no_durable_byte_again(host: BlobHost, tmp_path: Path) -> None:
    size = 40 * SMALL
    data = os.urandom(size)
    digest = host.add(data)
    host.delay_s = 0.01
    script = (
        "import sys; from pathlib import Path; from artifact import copy, disk; from artifact.remote import RemoteRegistry\n"
        f"copy.PIECE = disk.PIECE = {SMALL}; copy.CHECKPOINT = 300_000; copy.SMALL = 1000\n"
        "r = RemoteRegistry(sys.argv[1])\n"
        f"copy.fetch(lambda lo, hi: r.stream('a/b', '{digest}', lo, hi), '{digest}', {size}, disk.Disk(Path(sys.argv[2])))"
    )
    argv = [sys.executable, "-c", script, host.url, str(tmp_path)]
    for wanted in (5, 12):
        child = subprocess.Popen(argv)
        deadline = time.monotonic() + 30
        while len(host.sent) < wanted and time.monotonic() < deadline:
            time.sleep(0.005)
        assert child.poll() is None
        child.send_signal(signal.SIGKILL)
        child.wait()
        assert Disk(tmp_path).size(digest) is None
    host.delay_s = 0
    subprocess.run(argv, check=True, timeout=60)
    assert Disk(tmp_path).path(digest).read_bytes() == data
    whole = [span for span in host.sent if span[1] - span[0] == SMALL]
    assert len(whole) == len(set(whole))
    assert sum(hi - lo for lo, hi in host.sent) < size + 2 * 4 * SMALL


def image(host: BlobHost, repo: str, *tags: str, layers: int = 3, subject: str = "") -> str:
    def descriptor(data: bytes) -> dict[str, object]:
        return {"mediaType": "application/octet-stream", "digest": host.add(data), "size": len(data)}

    doc: dict[str, object] = {
        "schemaVersion": 2,
        "mediaType": MANIFEST,
        "config": descriptor(b"{}"),
        "layers": [descriptor(os.urandom(1200 * (i + 1))) for i in range(layers)],
    }
    if subject:
        doc["subject"] = {"mediaType": MANIFEST, "digest": subject, "size": 7}
    return host.manifest(repo, doc, *tags)


@pytest.mark.slow
@pytest.mark.parametrize("api", [True, False])
def test_a_graph_is_copied_with_its_signatures(host: BlobHost, tmp_path: Path, api: bool) -> None:
    host.referrers = api
    children = [image(host, "a/b"), image(host, "a/b")]
    entries = [{"mediaType": MANIFEST, "digest": d, "size": len(host.manifests[("a/b", d)][1])} for d in children]
    root = host.manifest("a/b", {"schemaVersion": 2, "mediaType": INDEX, "manifests": entries}, "1")
    signature = image(host, "a/b", f"sha256-{root[7:]}.sig", layers=1)
    referrer = image(host, "a/b", layers=1, subject=children[0])
    disk = Disk(tmp_path)
    copied = copy_graph(RemoteRegistry(host.url), "a/b", "1", disk)
    assert copied.root.digest == root
    assert {d.digest for d in copied.manifests} == {root, *children, signature} | ({referrer} if api else set())
    assert dict(copied.extra)[f"sha256-{root[7:]}.sig"].digest == signature
    assert (referrer in dict(copied.extra)) == api
    for found in copied.manifests:
        manifest = parse_manifest(disk.read(found.digest, 1 << 22))
        assert all(disk.size(d.digest) == d.size for d in (*manifest.own(), *manifest.manifests))
    before = len(host.sent)
    assert copy_graph(RemoteRegistry(host.url), "a/b", "1", disk) == copied
    assert len(host.sent) == before


def test_a_graph_with_a_missing_leaf_stores_no_root(host: BlobHost, tmp_path: Path) -> None:
    root = image(host, "a/b", "1")
    host.blobs.popitem()
    with pytest.raises(NotFound):
        copy_graph(RemoteRegistry(host.url), "a/b", "1", Disk(tmp_path))
    assert Disk(tmp_path).size(root) is None


@pytest.mark.slow
@pytest.mark.parametrize("size", [0, 10, 999, 1001, 3 * SMALL + 7])
def test_push_blob(host: BlobHost, tmp_path: Path, size: int) -> None:
    path = tmp_path / "f"
    path.write_bytes(os.urandom(size))
    digest = "sha256:" + hashlib.sha256(path.read_bytes()).hexdigest()
    progress = Progress(size, "x", None)
    remote = RemoteRegistry(host.url)
    assert push_blob(remote, "a/b", path, digest, size, tmp_path / "state", progress) == size
    assert host.blobs[digest] == path.read_bytes()
    assert progress.done == size
    assert push_blob(remote, "a/b", path, digest, size, tmp_path / "state") == 0
    assert list((tmp_path / "state").iterdir()) == []


@pytest.mark.slow
def test_push_goes_on_after_cuts_and_a_dropped_upload(host: BlobHost, tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(os.urandom(5 * SMALL))
    digest = "sha256:" + hashlib.sha256(path.read_bytes()).hexdigest()
    host.faults = ["", "cut", "cut", ""]
    progress = Progress(0, "x", None)
    push_blob(RemoteRegistry(host.url), "a/b", path, digest, 5 * SMALL, tmp_path / "state", progress)
    assert host.blobs[digest] == path.read_bytes()
    assert progress.done == 5 * SMALL
    first = [int(span.split("-")[0]) for method, _, span, _ in host.log if method == "PATCH"]
    assert first == sorted(set(first))  # never back
    assert first[2] == SMALL + SMALL // 2


@pytest.mark.server
def test_push_is_resumed_by_another_process(host: BlobHost, tmp_path: Path) -> None:
    path, size = tmp_path / "f", 30 * SMALL
    path.write_bytes(os.urandom(size))
    digest = "sha256:" + hashlib.sha256(path.read_bytes()).hexdigest()
    host.delay_s = 0.01
    script = (
        "import sys; from pathlib import Path; from artifact import copy, push; from artifact.remote import RemoteRegistry\n"
        f"push.PIECE = {SMALL}; push.SMALL = 1000\n"
        f"print(push.push_blob(RemoteRegistry(sys.argv[1]), 'a/b', Path(sys.argv[2]), '{digest}', {size}, Path(sys.argv[3])))"
    )
    argv = [sys.executable, "-c", script, host.url, str(path), str(tmp_path / "state")]
    child = subprocess.Popen(argv)
    deadline = time.monotonic() + 30
    while (not host.uploads or len(host.uploads["u0"]) < 7 * SMALL) and time.monotonic() < deadline:
        time.sleep(0.005)
    assert child.poll() is None
    child.send_signal(signal.SIGKILL)
    child.wait()
    host.delay_s, held = 0, -1
    while held != len(host.uploads["u0"]):  # the server reads what was sent to its end
        held = len(host.uploads["u0"])
        time.sleep(0.3)
    assert held < size
    out = subprocess.run(argv, check=True, capture_output=True, text=True, timeout=60)
    assert int(out.stdout) == size - held
    assert host.blobs[digest] == path.read_bytes()


def test_a_file_that_changes_is_refused(host: BlobHost, tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"a" * 3000)
    for size in (2999, 3000):
        with pytest.raises(Mismatch):
            push_blob(RemoteRegistry(host.url), "a/b", path, "sha256:" + "0" * 64, size, tmp_path / "state")


def test_progress_lines() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for stream in (Terminal(), io.StringIO()):
        progress = Progress(2_000_000, "label", stream)
        progress.add(1_000_000)
        assert progress.line(progress._begun + 2) == "label: 1.0/2.0 MB 50% 0.5 MB/s 2 s left"
        progress.close()
        assert stream.getvalue().count("\n") == 1
        assert ("\r" in stream.getvalue()) == isinstance(stream, Terminal)


def push_command(argv: list[str], tmp_path: Path, key: str = "") -> subprocess.CompletedProcess[str]:
    env = {"PATH": os.environ["PATH"], "XDG_STATE_HOME": str(tmp_path / "state"), "AIRLOCK_KEY": key}
    return subprocess.run([sys.executable, "-m", "artifact.cli", "model", "push", *argv], capture_output=True, text=True, env=env, timeout=120)


def model(tmp_path: Path) -> Path:
    top = tmp_path / "m"
    (top / "sub").mkdir(parents=True)
    (top / "model.safetensors").write_bytes(os.urandom(100_000))
    (top / "config.json").write_text("{}")
    (top / "sub" / "empty.txt").write_text("")
    (top / "alias.json").symlink_to("config.json")
    (tmp_path / "p.yaml").write_text("profiles:\n  - tags: {llm_engine: vllm, precision: bf16, tp: 1, device: cpu}\n")
    return top


@pytest.mark.server
def test_model_push_to_the_fake(host: BlobHost, tmp_path: Path) -> None:
    argv = [str(model(tmp_path)), "acme/tiny:1", "--registry", host.url, "--profiles", str(tmp_path / "p.yaml"), "--json"]
    first, second = push_command(argv, tmp_path), push_command(argv, tmp_path)
    assert first.returncode == 0, first.stderr
    report, again = json.loads(first.stdout), json.loads(second.stdout)
    assert report["sent_bytes"] == 100_002
    assert (again["sent_bytes"], again["changed"], again["digest"]) == (0, False, report["digest"])
    manifest = parse_manifest(host.manifests[("acme/tiny", "1")][1])
    paths = [d.annotations.get("org.cncf.model.filepath", "") for d in manifest.layers]
    assert paths == ["alias.json", "config.json", "model.safetensors", "sub/empty.txt", ""]
    profiles = parse_manifest(host.manifests[("acme/tiny/profiles", "1")][1])
    document = json.loads(host.blobs[profiles.layers[0].digest])
    assert document["profiles"][0]["model"] == {"name": "acme/tiny", "digest": report["digest"]}
    assert document["profiles"][0]["weights_bytes"] == 100_000


@pytest.mark.server
@pytest.mark.parametrize(
    ("prepare", "code", "words"),
    [
        (lambda m: (m / "out").symlink_to("/etc/passwd"), 6, "leaves the directory"),
        (lambda m: (m / "dir").symlink_to("sub"), 6, "no plain file"),
        (lambda m: os.mkfifo(m / "pipe"), 6, "no plain file"),
        (lambda m: (m / "a\nb").write_text(""), 6, "not a model file path"),
        (lambda m: (m / os.fsdecode(b"\xff")).write_text(""), 6, "not a model file path"),
        (lambda m: (m / "CONFIG.json").write_text(""), 6, "letter case"),
        (lambda m: shutil.rmtree(m), 3, "not a directory"),
    ],
)
def test_model_push_refuses(host: BlobHost, tmp_path: Path, prepare, code: int, words: str) -> None:  # type: ignore[no-untyped-def]
    top = model(tmp_path)
    prepare(top)
    out = push_command([str(top), "acme/tiny:1", "--registry", host.url], tmp_path)
    assert (out.returncode, "Traceback" in out.stderr) == (code, False), out.stderr
    assert words in out.stderr
    assert host.blobs == {}


@pytest.mark.server
def test_model_push_help_and_mistakes(host: BlobHost, tmp_path: Path) -> None:
    assert "example:" in push_command(["--help"], tmp_path).stdout
    top = str(model(tmp_path))
    (tmp_path / "bad.yaml").write_text("profiles: [")
    for argv, code in (
        ([top, "acme/tiny:1"], 2),
        ([top, "acme/tiny", "--registry", host.url], 6),
        ([top, "acme/tiny/profiles:1", "--registry", host.url], 6),
        ([top, "acme/tiny:1", "--registry", host.url, "--profiles", str(tmp_path / "bad.yaml")], 6),
        ([top, "acme/tiny:1", "--registry", host.url, "--profiles", str(tmp_path / "absent")], 3),
        ([top, "acme/tiny:1", "--registry", "ftp://x"], 6),
    ):
        out = push_command(argv, tmp_path)
        assert (out.returncode, "Traceback" in out.stderr) == (code, False), out.stderr


@pytest.fixture
def debian_registry(tool: Callable[[str], str], tmp_path: Path) -> Iterator[str]:
    tool("docker-registry")
    with registry(tmp_path / "registry") as running:
        yield running.url


@pytest.mark.server
def test_debian_docker_registry_both_ways(debian_registry: str, tmp_path: Path) -> None:
    top = model(tmp_path)
    (top / "big.safetensors").write_bytes(os.urandom(9_000_000))
    argv = [str(top), "acme/tiny:1", "--registry", debian_registry, "--profiles", str(tmp_path / "p.yaml"), "--json"]
    first, second = push_command(argv, tmp_path), push_command(argv, tmp_path)
    assert first.returncode == 0, first.stderr
    assert json.loads(second.stdout)["sent_bytes"] == 0
    disk, remote = Disk(tmp_path / "disk"), RemoteRegistry(debian_registry)
    copied = copy_graph(remote, "acme/tiny", "1", disk)
    assert copied.root.digest == json.loads(first.stdout)["digest"]
    assert copied.extra == ()
    digest = "sha256:" + hashlib.sha256((top / "big.safetensors").read_bytes()).hexdigest()
    assert disk.path(digest).read_bytes() == (top / "big.safetensors").read_bytes()
    with pytest.raises(AirlockError):
        remote.resolve(copy_module.NOBODY_CALL, "acme/tiny", "absent")
