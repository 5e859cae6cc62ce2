"""`airlock mirror sync` as a user runs it: from Debian's docker-registry and the stand-in Hub, killed and resumed, and again for nothing."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from artifact.manifest import EMPTY_BYTES, FACTS_TYPE, MANIFEST, PROFILES_TYPE, build_manifest, build_model, digest_of
from artifact.profile import build as build_profiles
from artifact.remote import NOBODY_CALL, RemoteRegistry
from artifact.store import Descriptor, File
from mirror.home import MirrorHome
from mirror.records import Records
from tests.fakes.registry import registry
from tests.flows.test_fake_hub import TOKEN, Running, hub, make_repo

AIRLOCK = Path(sys.executable).parent / "airlock"
PIECE = 64 * 1024 * 1024
SECRET = "airlock-upstream-secret-key-0123456789"
pytestmark = pytest.mark.server


def airlock(*argv: str, home: Path, token: str = "") -> subprocess.CompletedProcess[str]:
    """Runs the console script with an empty environment."""
    return subprocess.run([str(AIRLOCK), *argv], env=_env(home, token), capture_output=True, text=True, timeout=300)


def _env(home: Path, token: str) -> dict[str, str]:
    env = {"PATH": os.environ["PATH"], "HOME": str(home.parent), "AIRLOCK_MIRROR": str(home)}
    return env | ({"HF_TOKEN": token} if token else {})


def plan_file(folder: Path, *items: dict[str, object]) -> Path:
    """Writes a plan (JSON is YAML)."""
    path = folder / "plan.yaml"
    path.write_text(json.dumps({"items": list(items)}))
    return path


def make_home(folder: Path) -> Path:
    """A mirror's home."""
    MirrorHome.init(folder)
    return folder


def staged(home: Path) -> dict[str, int]:
    """What lies in staging under public names."""
    return dict(MirrorHome.open(home).disk.walk())


def synced(plan: Path, home: Path, token: str = TOKEN, code: int = 0) -> dict:
    """One run's report."""
    done = airlock("mirror", "sync", str(plan), "--home", str(home), "--json", home=home, token=token)
    assert done.returncode == code, done.stderr + done.stdout
    assert "Traceback" not in done.stderr and TOKEN not in done.stdout + done.stderr and SECRET not in done.stdout + done.stderr
    return json.loads(done.stdout)


PROFILES = {"profiles": [{"tags": {"llm_engine": "vllm", "precision": "fp32", "tp": "1", "device": "cpu"}, "options": {"task": "embed"}}]}


def test_hub_item_with_profiles(tmp_path: Path) -> None:
    folder = make_repo(tmp_path / "repos", "Acme/Tiny-Llama", license="mit", gated="manual")
    (tmp_path / "p.yaml").write_text(json.dumps(PROFILES))
    home = make_home(tmp_path / "mirror")
    with hub(tmp_path / "repos", tmp_path / "log", "--redirect", "--page", "2") as running:
        item = {"source": "hf://acme/tiny-llama", "endpoint": running.endpoint, "profiles": "p.yaml", "key_env": "HF_TOKEN"}
        plan = plan_file(tmp_path, item)
        report = synced(plan, home)
        before, recorded = staged(home), (home / "names.json").read_bytes()
        mark = len(running.requests())
        again = synced(plan, home)
        assert not [e for e in running.requests()[mark:] if "/resolve/" in e["path"]]
        assert not [e for e in running.requests() if e["host"] == "cdn" and e["authorization"]]
    size = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file() and p.name != "meta.json")
    assert (report["transferred"], report["items"][0]["status"]) == (size, "synced")
    assert (again["transferred"], again["items"][0]["status"], staged(home), (home / "names.json").read_bytes()) == (0, "unchanged", before, recorded)
    names = {(n.name, n.ref): n for n in MirrorHome.open(home).names()}
    commit = next(r for _, r in names if len(r) == 40)
    assert set(names) == {("hf/acme/tiny-llama" + tail, ref) for tail in ("", "/profiles") for ref in ("main", commit)}
    model = names[("hf/acme/tiny-llama", "main")]
    facts = {k: v for k, v in model.upstream.items() if k != "fetched"}
    told = {"source": f"hf://Acme/Tiny-Llama@{commit}", "key_id": Records(MirrorHome.open(home)).key_id(TOKEN), "license": "mit", "gated": True}
    told |= {"upstream_org": "tester", "evidence": "user tester; role read; admitted by auth-check"}
    unknown = {"product": "", "tier": "", "accepted_by": "", "accepted_at": 0, "key_end": 0, "subscription_end": 0}
    assert facts == told | unknown
    assert (model.display, model.kind, names[("hf/acme/tiny-llama/profiles", "main")].kind) == ("Acme/Tiny-Llama", "model", "profiles")
    for path in (p for p in folder.rglob("*") if p.is_file() and p.name != "meta.json"):
        assert before["sha256:" + hashlib.sha256(path.read_bytes()).hexdigest()] == path.stat().st_size


def test_a_mistake_in_the_profiles_shows_before_anything_is_asked(tmp_path: Path) -> None:
    make_repo(tmp_path / "repos")
    (tmp_path / "p.yaml").write_text('{"profiles": [{"tags": {"llm_engine": "vllm"}, "option": {"task": "embed"}}]}')
    with hub(tmp_path / "repos", tmp_path / "log") as running:
        item = {"source": "hf://Acme/Tiny-Llama", "endpoint": running.endpoint, "profiles": "p.yaml"}
        report = synced(plan_file(tmp_path, item), make_home(tmp_path / "mirror"), code=6)
        assert not running.requests()
    assert "unknown keys: option" in report["items"][0]["error"]["what"]


def test_the_digest_is_a_function_of_the_content(tmp_path: Path) -> None:
    make_repo(tmp_path / "repos")
    digests = set()
    for machine in ("one", "two"):
        home = make_home(tmp_path / machine / "mirror")
        with hub(tmp_path / "repos", tmp_path / f"log-{machine}", *(("--redirect",) if machine == "two" else ())) as running:
            spelled = "hf://Acme/Tiny-Llama" if machine == "one" else "hf://acme/tiny-llama@main"
            report = synced(plan_file(tmp_path / machine, {"source": spelled, "endpoint": running.endpoint}), home)
            # HF_TOKEN is set, but the plan names no key: none that lies about on this machine is sent
            assert not [e for e in running.requests() if e["authorization"]]
        digests |= {n["digest"] for n in report["items"][0]["names"]}
        assert report["items"][0]["upstream"]["key_id"] == ""
    assert len(digests) == 1


def push_image(remote: RemoteRegistry, repo: str, tag: str, seed: int, size: int) -> str:
    """A small real image of two random layers."""
    layers = [random.Random(seed + i).randbytes(size) for i in range(2)]
    config = json.dumps({"architecture": "amd64", "os": "linux", "rootfs": {"type": "layers", "diff_ids": [digest_of(b) for b in layers]}}).encode()
    for blob in (config, *layers):
        push_blob(remote, repo, blob)
    descriptors = [{"mediaType": "application/vnd.oci.image.layer.v1.tar", "digest": digest_of(b), "size": len(b)} for b in layers]
    body = {"mediaType": "application/vnd.oci.image.config.v1+json", "digest": digest_of(config), "size": len(config)}
    raw = json.dumps({"schemaVersion": 2, "mediaType": MANIFEST, "config": body, "layers": descriptors}).encode()
    return remote.push(NOBODY_CALL, repo, raw, MANIFEST, refs=(tag,)).digest


def push_blob(remote: RemoteRegistry, repo: str, blob: bytes) -> Descriptor:
    upload = remote.upload(NOBODY_CALL, repo)
    upload.write(blob)
    return upload.commit(digest_of(blob))


def push_model(remote: RemoteRegistry, repo: str, tag: str, weights: bytes, profiles: bool = True) -> str:
    """An own model with its profile manifest beside it."""
    facts = b'{"license":"apache-2.0","schema":1}'
    for blob in (EMPTY_BYTES, weights, facts):
        push_blob(remote, repo, blob)
    files = [File("model.safetensors", digest_of(weights), len(weights))]
    raw = build_model(files, Descriptor(FACTS_TYPE, digest_of(facts), len(facts)), {"dev.airlock.source": f"push://{repo}"})
    digest = remote.push(NOBODY_CALL, repo, raw, MANIFEST, refs=(tag,)).digest
    if profiles:
        document = build_profiles(repo, digest, PROFILES["profiles"], len(weights))  # type: ignore[arg-type]
        for blob in (EMPTY_BYTES, document):
            push_blob(remote, f"{repo}/profiles", blob)
        layer = Descriptor(PROFILES_TYPE, digest_of(document), len(document)).as_json()
        remote.push(NOBODY_CALL, f"{repo}/profiles", build_manifest(PROFILES_TYPE, [layer], {}), MANIFEST, refs=(tag,))
    return digest


def test_oci_items_and_one_that_fails(tmp_path: Path) -> None:
    home = make_home(tmp_path / "mirror")
    with registry(tmp_path / "upstream") as running:
        remote = RemoteRegistry(running.url)
        image = push_image(remote, "library/app", "1.0", 1, 300_000)
        model = push_model(remote, "acme/tiny", "1", random.Random(7).randbytes(500_000))
        plain = {"plain_http": True}
        plan = plan_file(
            tmp_path,
            {"source": f"oci://{running.host}/library/none:1", **plain},
            {"source": f"oci://{running.host}/library/app:1.0", **plain},
            {"source": f"oci://{running.host}/acme/tiny:1", "as": "acme/tiny", **plain},
            {"source": f"oci://{running.host}/library/app@{image}", "as": "library/pinned", **plain},
        )
        report = synced(plan, home, code=3)
        again = synced(plan, home, code=3)
    assert [i["status"] for i in report["items"]] == ["failed", "synced", "synced", "synced"]
    assert [i["status"] for i in again["items"]] == ["failed", "unchanged", "unchanged", "unchanged"] and again["transferred"] == 0
    assert report["items"][0]["error"]["error"] == "not_found" and report["failed"] == 1
    names = {(n.name, n.ref): n for n in MirrorHome.open(home).names()}
    host = running.host.replace(":", "_")
    assert names[(f"{host}/library/app", "1.0")].digest == names[("library/pinned", "latest")].digest == image
    assert names[("acme/tiny", "1")].digest == model and names[("acme/tiny", "1")].upstream["license"] == "apache-2.0"
    assert names[("acme/tiny/profiles", "1")].kind == "profiles" and len(names) == 4
    assert names[("acme/tiny", "1")].upstream["source"] == f"oci://{running.host}/acme/tiny@{model}"


def test_references_signatures_and_indexes_come_along(tmp_path: Path) -> None:
    home = make_home(tmp_path / "mirror")
    with registry(tmp_path / "upstream") as running:
        remote = RemoteRegistry(running.url)
        model = push_model(remote, "acme/tiny", "1", random.Random(9).randbytes(100_000))
        child = push_image(remote, "library/app", "amd64", 3, 50_000)
        size = len(remote.read_manifest("library/app", child)[1])
        index = json.dumps({"schemaVersion": 2, "mediaType": INDEX, "manifests": [{"mediaType": MANIFEST, "digest": child, "size": size}]}).encode()
        root = remote.push(NOBODY_CALL, "library/app", index, INDEX, refs=("multi",)).digest
        signature = push_image(remote, "library/app", f"{root.replace(':', '-')}.sig", 5, 1000)
        report_raw = build_manifest("application/x-report", [], {}, Descriptor(INDEX, root, len(index)))
        push_blob(remote, "library/app", EMPTY_BYTES)
        referrer = remote.push(NOBODY_CALL, "library/app", report_raw, MANIFEST).digest
        listed = {"mediaType": MANIFEST, "digest": referrer, "size": len(report_raw), "artifactType": "application/x-report"}
        fallback = json.dumps({"schemaVersion": 2, "mediaType": INDEX, "manifests": [listed]}).encode()
        remote.push(NOBODY_CALL, "library/app", fallback, INDEX, refs=(root.replace(":", "-"),))
        plan = plan_file(
            tmp_path,
            {"source": f"oci://{running.host}/acme/tiny/profiles:1", "as": "team/only/profiles", "plain_http": True},
            {"source": f"oci://{running.host}/library/app:multi", "plain_http": True},
        )
        report = synced(plan, home)
    assert report["failed"] == 0
    names = {(n.name, n.ref): n.digest for n in MirrorHome.open(home).names()}
    host = running.host.replace(":", "_")
    assert names[("acme/tiny", model)] == model
    assert names[(f"{host}/library/app", "multi")] == root and names[(f"{host}/library/app", f"{root.replace(':', '-')}.sig")] == signature
    assert names[(f"{host}/library/app", referrer)] == referrer
    assert child in staged(home)


def test_a_busy_hub_is_waited_for(tmp_path: Path) -> None:
    make_repo(tmp_path / "repos", "acme/busy")
    home = make_home(tmp_path / "mirror")
    with hub(tmp_path / "repos", tmp_path / "log", "--busy", "3") as running:
        assert synced(plan_file(tmp_path, {"source": "hf://acme/busy", "endpoint": running.endpoint}), home)["failed"] == 0
        assert [e for e in running.requests() if e["status"] == 429]


def test_a_referred_image_from_elsewhere(tmp_path: Path) -> None:
    home = make_home(tmp_path / "mirror")
    with registry(tmp_path / "one") as first, registry(tmp_path / "two") as second:
        images, models = RemoteRegistry(first.url), RemoteRegistry(second.url)
        image = push_image(images, "nim/engine", "1", 11, 20_000)
        digest = push_model(models, "acme/tiny", "1", b"weights" * 1000, profiles=False)
        wanted = [PROFILES["profiles"][0] | {"image": {"name": "nim/engine", "digest": image}}]
        document = build_profiles("acme/tiny", digest, wanted, 7000)  # type: ignore[arg-type]
        for blob in (EMPTY_BYTES, document):
            push_blob(models, "acme/tiny/profiles", blob)
        layer = Descriptor(PROFILES_TYPE, digest_of(document), len(document)).as_json()
        models.push(NOBODY_CALL, "acme/tiny/profiles", build_manifest(PROFILES_TYPE, [layer], {}), MANIFEST, refs=("1",))
        model = {"source": f"oci://{second.host}/acme/tiny:1", "as": "acme/tiny", "plain_http": True}
        alone = synced(plan_file(tmp_path, model), home, code=3)
        assert alone["items"][0]["error"]["reason"] == "reference" and MirrorHome.open(home).names() == []
        both = synced(plan_file(tmp_path, {"source": f"oci://{first.host}/nim/engine:1", "plain_http": True}, model), home)
    assert both["failed"] == 0
    assert ("nim/engine", image) in {(n.name, n.ref) for n in MirrorHome.open(home).names()}


INDEX = "application/vnd.oci.image.index.v1+json"


def _partial_bytes(home: Path) -> int:
    return sum(p.stat().st_blocks * 512 for p in (home / "staging" / "partial").glob("*") if not p.name.endswith(".journal"))


def _whole_pieces(running: Running, path: str, size: int) -> list[int]:
    """How often each whole piece of a file was sent from its first to its last byte.

    The rest behind the last whole piece is not counted: shorter than what is recorded at a time (16 MiB), it is sent again after a kill in it.
    """
    counts = [0] * (size // PIECE)
    for entry in running.requests():
        if entry["path"].endswith("/" + path) and entry["range"]:
            lo = int(entry["range"].removeprefix("bytes=").partition("-")[0])
            if lo % PIECE == 0 and lo // PIECE < len(counts):
                counts[lo // PIECE] += entry["sent"] >= PIECE
    return counts


@pytest.mark.timeout(300)
def test_killed_three_times_resumes(tmp_path: Path) -> None:
    seed = int(os.environ.get("AIRLOCK_TEST_SEED", "0")) or random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    size = 200 * 1024 * 1024
    folder = make_repo(tmp_path / "repos", "acme/big", weights=4)
    with (folder / "model.safetensors").open("wb") as out:
        for i in range(size // PIECE + 1):
            out.write(random.Random(seed + i).randbytes(min(PIECE, size - i * PIECE)))
    # The last one lies beyond what four streams can have in hand unrecorded (16 MiB each), so that something of it is never sent again.
    draw = random.Random(seed)
    marks = [*sorted(draw.sample(range(size // 20, 80 << 20), 2)), draw.randrange(80 << 20, size * 9 // 10)]
    home, whole = make_home(tmp_path / "mirror"), make_home(tmp_path / "unbroken")
    digest = "sha256:" + hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    with hub(tmp_path / "repos", tmp_path / "log", "--redirect", "--throttle", "60000000", "--streams", "2") as running:
        plan = plan_file(tmp_path, {"source": "hf://acme/big", "endpoint": running.endpoint})
        for mark in marks:
            process = subprocess.Popen(
                [str(AIRLOCK), "mirror", "sync", str(plan)], env=_env(home, ""), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
            )
            until = time.monotonic() + 60
            while _partial_bytes(home) < mark and time.monotonic() < until:
                assert process.poll() is None, process.stderr and process.stderr.read()
                time.sleep(0.005)
            assert process.poll() is None and _partial_bytes(home) > 0 and digest not in staged(home), f"seed {seed}: too late for {mark}"
            assert MirrorHome.open(home).names() == []
            process.send_signal(signal.SIGKILL)
            process.communicate()
            assert process.returncode == -signal.SIGKILL
        report = synced(plan, home, token="")
        counts = _whole_pieces(running, "model.safetensors", size)
    with hub(tmp_path / "repos", tmp_path / "log2") as running:
        synced(plan_file(tmp_path, {"source": "hf://acme/big", "endpoint": running.endpoint}), whole, token="")
    print(f"kills at {marks} bytes; last run {report['transferred']} of {size} bytes; whole pieces sent {counts}")
    assert max(counts) <= 1, f"seed {seed}: {counts}"
    assert report["transferred"] < size
    assert staged(home) == staged(whole) and not list((home / "staging" / "partial").iterdir())
    assert [(n.name, n.ref, n.digest) for n in MirrorHome.open(home).names()] == [(n.name, n.ref, n.digest) for n in MirrorHome.open(whole).names()]


def test_no_key_in_the_variable_is_told_by_its_name(tmp_path: Path) -> None:
    home = make_home(tmp_path / "mirror")
    plan = plan_file(tmp_path, {"source": "hf://acme/m", "endpoint": "http://127.0.0.1:9", "key_env": "HF_TOKEN"})
    report = synced(plan, home, token="", code=5)
    assert "HF_TOKEN" in report["items"][0]["error"]["what"]
