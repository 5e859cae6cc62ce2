"""The runtime's own start as a user types it, against a stand-in registry over real HTTP, without an engine: refusals, cache, warm start, resume."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from artifact import profile, trust
from artifact.disk import Disk
from artifact.manifest import EMPTY_BYTES, EMPTY_DIGEST, FACTS_TYPE, MANIFEST, PROFILES_TYPE, build_manifest, build_model, canonical_json, digest_of
from artifact.profile import Pin
from artifact.store import Descriptor, File
from runtime import weights
from tests.conftest import find_port, need_root
from tests.fakes.site import Site

pytestmark = pytest.mark.server

KEY = "nvapi-" + "k" * 49
SIZE = 40 * 1024 * 1024
SIGN, LEASES = trust.generate_key(), trust.generate_key()
SEED_LINE = "NGC authentication failed: invalid API key or no entitlement for this NIM"


@dataclass
class Node:
    """A site with one released model, and a machine to start it on."""

    site: Site
    folder: Path
    profiles: list[dict[str, Any]]
    files: dict[str, bytes] = field(default_factory=dict)
    profile_digest: str = ""
    env: dict[str, str] = field(default_factory=dict)

    @property
    def cache(self) -> Path:
        return self.folder / "cache"

    def publish(self, promoted: bool = True) -> None:
        """Puts model, profile manifest and release signature into the site's tables."""
        files = [File(path, digest_of(raw), len(raw)) for path, raw in self.files.items()]
        facts = canonical_json({"schema": 1})
        model = build_model(files, Descriptor(FACTS_TYPE, digest_of(facts), len(facts)), {})
        document = profile.build("acme/tiny", digest_of(model), self.profiles, sum(f.size for f in files))
        layer = Descriptor(PROFILES_TYPE, digest_of(document), len(document))
        manifest = build_manifest(PROFILES_TYPE, [layer.as_json()], {})
        self.profile_digest = digest_of(manifest)
        site = self.site
        site.blobs |= {digest_of(raw): raw for raw in (*self.files.values(), facts, document)} | {EMPTY_DIGEST: EMPTY_BYTES}
        for ref in ("1", digest_of(model)):
            site.manifests["acme/tiny", ref] = (MANIFEST, model)
        for ref in ("1", self.profile_digest):
            site.manifests["acme/tiny/profiles", ref] = (MANIFEST, manifest)
        if promoted:
            made = trust.release_artifacts(SIGN, "acme/tiny/profiles:1", Descriptor(MANIFEST, self.profile_digest, len(manifest)))
            site.blobs |= made.blobs
            site.manifests["acme/tiny/profiles", made.sig_tag] = (MANIFEST, made.sig_manifest)
        site.lease = lambda body: (200, {"lease": trust.sign_jws(LEASES, "lease+jwt", self.claims(body)), "now": int(time.time())})
        self.model_digest = digest_of(model)

    def claims(self, body: dict[str, Any]) -> dict[str, Any]:
        now = int(time.time())
        model = {"name": body["model"], "ref": body["ref"], "digest": self.model_digest}
        out = {"iss": "site-1", "sub": "org:acme", "aud": body["host"], "jti": "j1", "iat": now, "nbf": now - 60, "exp": now + 86400, "model": model}
        return out | {k: body[k] for k in ("profile_digest", "profile_id", "gpu_uuids", "nonce")} | {"revocation_serial": 0}

    def command(self, word: str, *more: str) -> list[str]:
        return [sys.executable, "-m", "runtime", word, "--model", "acme/tiny:1", *more]

    def run(self, word: str, *more: str, **env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(self.command(word, *more), env=self.env | env, capture_output=True, text=True, timeout=60)

    def blob(self, path: str) -> Path:
        name = digest_of(self.files[path])[7:]
        return self.cache / "blobs" / "sha256" / name[:2] / name

    def model_dir(self) -> Path:
        return self.cache / "models" / "acme" / "tiny" / self.model_digest[7:19]


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    site = Site(KEY)
    made = Node(site, tmp_path, [{"tags": {"llm_engine": "vllm", "precision": "bf16", "tp": "1", "device": "cpu"}}])
    made.profiles.append({"tags": {"llm_engine": "vllm", "precision": "bf16", "tp": "2"}})
    made.files = {"config.json": b'{"model_type":"llama"}', "sub/vocab.txt": b"a\nb\n", "model.safetensors": random.Random(7).randbytes(300_000)}
    made.publish()
    pems = {k: [{"kid": trust.kid(p), "pem": p}] for k, p in (("release_keys", trust.public_pem(SIGN)), ("lease_keys", trust.public_pem(LEASES)))}
    (tmp_path / "site-trust.json").write_text(json.dumps({"schema": 1, "instance": "site-1", "revocation_serial": 0, **pems}))
    engine = tmp_path / "engine" / "bin" / "vllm"
    engine.parent.mkdir(parents=True)
    # Stands where an engine is: it ends with a class that is never tried again, so that `serve` returns after everything before the engine.
    engine.write_text("#!/bin/sh\necho 'error: unrecognized arguments: --stand-in' >&2\nexit 2\n")
    engine.chmod(0o755)
    made.env = {k: v for k, v in os.environ.items() if k in ("PATH", "LANG", "HOME")} | {
        "NGC_API_KEY": KEY,
        "AIRLOCK_REGISTRY": site.url,
        "AIRLOCK_TRUST": str(tmp_path / "site-trust.json"),
        "NIM_CACHE_PATH": str(made.cache),
        "AIRLOCK_ENGINE_VLLM": str(tmp_path / "engine"),
        "AIRLOCK_HOST": "127.0.0.1",
        "NIM_HTTP_API_PORT": str(find_port()),
    }
    yield made
    site.close()


def blobs_asked(node: Node) -> list[str]:
    return [line for line in node.site.log if "/v2/acme/tiny/blobs/" in line]


def test_download_makes_a_verified_directory_and_is_warm_the_second_time(node: Node) -> None:
    first = node.run("download-to-cache")
    assert first.returncode == 0, first.stderr
    target = node.model_dir()
    assert first.stdout.split()[1:] == [node.model_digest, str(target)]
    assert {str(p.relative_to(target)): p.read_bytes() for p in target.rglob("*") if p.is_file()} == node.files
    assert all((target / name).stat().st_ino == node.blob(name).stat().st_ino for name in node.files)
    assert "Selected profile: " in first.stderr and "(vllm-cpu-bf16-tp1)" in first.stderr
    assert "it needs 2 GPU(s); this node has no NVIDIA library and so 0 GPUs" in first.stderr
    asked = len(blobs_asked(node))
    again = node.run("download-to-cache")
    assert again.returncode == 0 and len(blobs_asked(node)) == asked
    assert "(0 bytes fetched, 0 hashed again, 300026 known by stamp)" in again.stderr


def test_a_warm_start_asks_for_the_right_alone_and_offline_for_nothing(node: Node) -> None:
    """What is asked while the registry answers is what a revoked key, a taken back release and the GPUs in use are noticed by; no weights."""
    node.run("serve")
    asked = len(node.site.log)
    assert node.run("serve").returncode == 36
    beside = ("/airlock/v1/standing", "/airlock/v1/verified")  # the watch's, which nothing waits for
    warm = [line for line in node.site.log[asked:] if not line.endswith(beside)]
    assert [line.split("/manifests/sha256-")[0] for line in warm] == [
        "GET /airlock/v1/whoami",
        "GET /v2/acme/tiny/profiles/manifests/1",
        "GET /v2/acme/tiny/profiles",
        "POST /airlock/v1/leases",
    ]
    asked = len(node.site.log)
    assert node.run("serve", AIRLOCK_OFFLINE="1").returncode == 36 and len(node.site.log) == asked


def test_the_log_has_a_nims_lines(node: Node) -> None:
    """Those of nimlib and its hub client (field logs of 1.x): scripts and people look for them."""
    first, second = node.run("serve"), node.run("serve", NIM_MODEL_PROFILE="vllm-cpu-bf16-tp1")
    chosen = re.search(r"Selected profile: ([0-9a-f]{64}) \(vllm-cpu-bf16-tp1\)", first.stderr)
    assert chosen, first.stderr
    blob, place = node.blob("config.json"), node.model_dir() / "config.json"
    there = {f'File: config.json found in cache: "{blob}"', f'Skipping download, using cached copy of file: config.json at path: "{place}"'}
    fetched = {f"Downloading manifest profile: {chosen[1]}", f'Downloaded filename: config.json to blob: "{blob}"'}
    pinned = f"Matched profile_id in manifest from env NIM_MODEL_PROFILE: {chosen[1]}"
    both = {"Running NIM without LoRA.", "Detected 1 compatible profile(s).", f"Valid profile: {chosen[1]} (vllm-cpu-bf16-tp1) on GPUs []"}
    both |= {"Profile metadata: llm_engine: vllm", "Preparing model workspace.", "Model workspace is now ready. It took "}
    assert all(line in first.stderr for line in both | fetched) and not any(line in first.stderr for line in there | {pinned}), first.stderr
    assert all(line in second.stderr for line in both | there | {pinned}) and not any(line in second.stderr for line in fetched), second.stderr
    lora = node.run("serve", NIM_PEFT_SOURCE=str(node.folder), AIRLOCK_ALLOW_UNSIGNED="adapters of this test")
    assert "WARNING" in lora.stderr and f"Profile {chosen[1]} does not support LoRA, but LoRA is enabled. Skipping profile." in lora.stderr


def test_a_changed_file_is_noticed_and_fetched_again(node: Node) -> None:
    node.run("download-to-cache")
    blob = node.blob("model.safetensors")
    raw, before = bytearray(blob.read_bytes()), blob.stat()
    raw[1000] ^= 1
    blob.chmod(0o644)
    blob.write_bytes(raw)
    os.utime(blob, ns=(before.st_atime_ns, before.st_mtime_ns))  # the time stamp a forger can set
    asked = len(blobs_asked(node))
    assert node.run("download-to-cache").returncode == 0
    assert len(blobs_asked(node)) == asked + 1
    assert (node.model_dir() / "model.safetensors").read_bytes() == node.files["model.safetensors"]


def test_strangers_in_the_model_directory_are_gone_after_a_start(node: Node) -> None:
    node.run("download-to-cache")
    target = node.model_dir()
    (target / "modeling_evil.py").write_text("x")
    (target / "config.json").unlink()
    (target / "config.json").write_text('{"auto_map":{}}')
    (target / "link").symlink_to("/etc")
    assert node.run("download-to-cache").returncode == 0
    assert {str(p.relative_to(target)) for p in target.rglob("*") if p.is_file()} == set(node.files)
    assert (target / "config.json").read_bytes() == node.files["config.json"]


def outside(node: Node) -> Path:
    """A directory beside the cache whose content must survive every start."""
    victim = node.folder / "victim"
    (victim / "tiny" / node.model_digest[7:19]).mkdir(parents=True)
    (victim / "tiny" / node.model_digest[7:19] / "precious").write_text("x")
    return victim


def untouched(victim: Path) -> bool:
    return [p.name for p in victim.rglob("*") if p.is_file()] == ["precious"] and len(list(victim.rglob("*"))) == 3


@pytest.mark.parametrize("link", ["models/acme", "models", "blobs", "blobs/sha256", "partial", "refs", "leases", "home"])
def test_a_link_in_the_cache_leads_nowhere(node: Node, link: str) -> None:
    victim = outside(node)
    (node.cache / link).parent.mkdir(parents=True)
    (node.cache / link).symlink_to(victim)
    refused = node.run("serve")
    assert refused.returncode == 38 and f"{node.cache / link} in the cache is a symbolic link" in refused.stderr, refused.stderr
    assert "Traceback" not in refused.stderr and untouched(victim)
    assert not [line for line in blobs_asked(node) if any(digest_of(raw) in line for raw in node.files.values())]


def test_a_link_that_replaces_a_folder_of_blobs_is_refused(node: Node) -> None:
    assert node.run("download-to-cache").returncode == 0
    victim, folder = outside(node), node.blob("model.safetensors").parent
    folder.rename(node.folder / "kept")
    folder.symlink_to(victim)
    refused = node.run("download-to-cache")
    assert refused.returncode == 38 and f"{folder} in the cache is a symbolic link" in refused.stderr and untouched(victim)


@pytest.mark.parametrize("kind", ["directory", "pipe"])
def test_what_is_no_file_at_a_blobs_path_is_told_before_anything_is_fetched(node: Node, kind: str) -> None:
    blob = node.blob("model.safetensors")
    blob.parent.mkdir(parents=True)
    blob.mkdir() if kind == "directory" else os.mkfifo(blob)
    refused = node.run("download-to-cache")
    assert refused.returncode == 38 and f"{blob} in the cache is " in refused.stderr, refused.stderr
    assert not [line for line in blobs_asked(node) if any(digest_of(raw) in line for raw in node.files.values())]


def as_user(work: Callable[[], str]) -> str:
    """What `work` says as uid 1000."""
    need_root()
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.setgroups([])
            os.setgid(1000)
            os.setuid(1000)
            os.write(writer, work().encode())
        except BaseException as error:
            os.write(writer, repr(error).encode())
        finally:
            os._exit(0)
    os.close(writer)
    os.waitpid(pid, 0)
    with os.fdopen(reader, "rb") as answer:
        return answer.read().decode()


@pytest.fixture
def others() -> Iterator[tuple[Path, Pin, dict[str, bytes]]]:
    """A cache that root filled and that uid 1000 gets to, a model in it, and the model's files."""
    with tempfile.TemporaryDirectory() as folder:
        top = Path(folder)
        disk, raws = Disk(top), {"config.json": b"{}", "model.safetensors": random.Random(3).randbytes(100_000)}
        files = [File(path, disk.put(raw), len(raw)) for path, raw in raws.items()]
        model = build_model(files, Descriptor(FACTS_TYPE, disk.put(b"{}"), 2), {})
        disk.put(model)
        (top / "models").mkdir()
        for path in (top, *top.rglob("*")):
            path.chmod(0o755 if path.is_dir() else 0o444)
        yield top, Pin("acme/tiny", digest_of(model)), raws


def test_another_users_blobs_are_copied_once_and_verified(others: tuple[Path, Pin, dict[str, bytes]]) -> None:
    top, pin, raws = others
    (top / "models").chmod(0o777)

    def start() -> str:
        said: list[str] = []
        made = weights.materialise(None, top, pin, said.append, show=False)
        wrong = [path for path, raw in raws.items() if (made.path / path).read_bytes() != raw]
        return f"{wrong} {sum('built' in line for line in said)}"

    assert as_user(start) == "[] 1" and as_user(start) == "[] 0"  # not every start copies all weights again
    copied = top / "models" / "acme" / "tiny" / pin.digest[7:19] / "model.safetensors"
    copied.chmod(0o644)
    copied.write_bytes(b"x" * copied.stat().st_size)
    assert as_user(start) == "[] 1"


def test_damage_in_a_cache_that_cannot_be_written_names_the_file(others: tuple[Path, Pin, dict[str, bytes]]) -> None:
    top, pin, raws = others
    blob = Disk(top).path(digest_of(raws["model.safetensors"]))
    blob.write_bytes(b"x" * len(raws["model.safetensors"]))
    told = as_user(lambda: str(weights.materialise(None, top, pin, lambda line: None, show=False)))
    assert "lacks or holds damaged model.safetensors of acme/tiny" in told


def test_stamps_in_a_directory_that_others_can_write_count_nothing(node: Node) -> None:
    node.run("download-to-cache")
    (node.cache / "stamps").chmod(0o770)
    assert "300026 hashed again, 0 known by stamp" in node.run("download-to-cache").stderr


def test_serve_starts_warm_with_the_registry_down_and_only_with_its_lease(node: Node) -> None:
    assert node.run("serve").returncode == 36  # through everything up to the engine, which is the stand-in's refusal
    node.site.close()
    warm = node.run("serve")
    assert warm.returncode == 36, warm.stderr
    assert "this start uses what the cache holds" in warm.stderr and "Lease j1 until" in warm.stderr
    (lease,) = (node.cache / "leases").glob("*.json")
    raw = lease.read_bytes()
    lease.write_bytes(raw.replace(b"e", b"f", 1))
    edited = node.run("serve")
    assert edited.returncode == 28 and SEED_LINE in edited.stderr and "the stored lease is refused" in edited.stderr
    lease.unlink()
    deleted = node.run("serve")
    assert deleted.returncode == 40 and "refuses the connection" in deleted.stderr and "holds no lease" in deleted.stderr
    lease.write_bytes(raw)
    (node.cache / "leases" / "clock").write_text(str(int(time.time()) + 90_000))
    expired = node.run("serve")
    assert expired.returncode == 29 and "the lease expired on" in expired.stderr


def test_a_registry_that_fails_at_the_lease_leaves_the_stored_one(node: Node) -> None:
    given = node.site.lease
    node.site.lease = lambda body: (503, {"reason": "database_down", "what": "the database does not answer"})
    first = node.run("serve")
    assert first.returncode == 9 and "the database does not answer" in first.stderr and "holds no lease" in first.stderr
    node.site.lease = given
    assert node.run("serve").returncode == 36
    node.site.lease = lambda body: (503, {"reason": "database_down", "what": "the database does not answer"})
    warm = node.run("serve")
    assert warm.returncode == 36 and "database_down" in warm.stderr and "Lease j1 until" in warm.stderr


def test_a_warm_start_verifies_the_cached_release_again(node: Node) -> None:
    assert node.run("serve").returncode == 36
    node.site.close()
    (name,) = (node.cache / "refs").glob("*.json")
    doc = json.loads(name.read_bytes())
    name.write_text(json.dumps(doc | {"digest": node.model_digest}))
    other = node.run("serve")
    assert other.returncode == 32 and "no release signature" in other.stderr
    name.write_text(json.dumps(doc))
    node.blob("model.safetensors").unlink()
    lacking = node.run("serve")
    assert lacking.returncode == 39 and "model.safetensors" in lacking.stderr


@pytest.mark.parametrize(
    ("state", "key", "status", "words"),
    [
        ("ok", "", 20, "NGC_API_KEY is not set"),
        ("ok", "nvapi-nonsense", 21, "does not know this API key"),
        ("expired", KEY, 22, "expired on 2026-01-01T00:00:00Z"),
        ("revoked", KEY, 23, "revoked on 2026-01-01"),
        ("foreign", KEY, 24, "this key sees no model of that name (absent, or another organisation's)"),
    ],
)
def test_a_refused_key_ends_before_anything_is_fetched(node: Node, state: str, key: str, status: int, words: str) -> None:
    node.site.state = state
    refused = node.run("serve", NGC_API_KEY=key)
    assert refused.returncode == status, refused.stderr
    assert SEED_LINE in refused.stderr and words in refused.stderr and "Traceback" not in refused.stderr
    assert KEY not in refused.stderr and not blobs_asked(node) and not (node.cache / "blobs").exists()


def test_a_version_that_is_not_there_is_told_with_those_that_are(node: Node) -> None:
    command = [sys.executable, "-m", "runtime", "serve", "--model", "acme/tiny"]
    refused = subprocess.run(command, env=node.env, capture_output=True, text=True, timeout=60)
    assert refused.returncode == 3 and "cause: acme/tiny has no version latest\nexpected: one of: 1\n" in refused.stderr, refused.stderr
    assert SEED_LINE not in refused.stderr and not blobs_asked(node)


def test_an_unpromoted_model_starts_nothing(node: Node) -> None:
    node.site.manifests = {k: v for k, v in node.site.manifests.items() if not k[1].endswith(".sig")}
    refused = node.run("serve")
    assert refused.returncode == 32 and "airlock promote acme/tiny:1" in refused.stderr and not blobs_asked(node)


def test_a_lease_that_is_denied_ends_before_weights(node: Node) -> None:
    node.site.lease = lambda body: (403, {"reason": "action_missing", "what": "the grant on acme/tiny does not include 'run'"})
    refused = node.run("serve")
    assert refused.returncode == 25 and "does not include 'run'" in refused.stderr and not blobs_asked(node)


def test_a_taken_port_is_told_before_weights(node: Node) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", int(node.env["NIM_HTTP_API_PORT"])))
        taken.listen()
        refused = node.run("serve")
    assert refused.returncode == 37 and "is not free: Address already in use" in refused.stderr and not blobs_asked(node)


def test_no_fitting_profile_gives_the_known_line_and_every_reason(node: Node) -> None:
    node.profiles = [
        {"tags": {"llm_engine": "vllm", "precision": "bf16", "tp": "8"}},
        {"tags": {"llm_engine": "tensorrt_llm", "tp": "1", "gpu": "H100"}},
    ]
    node.publish()
    refused = node.run("serve")
    assert refused.returncode == 30 and "No profile found for the detected hardware" in refused.stderr
    assert "it needs 8 GPU(s)" in refused.stderr and "it needs 1 GPU(s)" in refused.stderr and not blobs_asked(node)


def test_a_pin_that_is_a_typo_lists_the_valid_values(node: Node) -> None:
    refused = node.run("serve", NIM_MODEL_PROFILE="vllm-cpu-bf16")
    assert refused.returncode == 31 and "vllm-cpu-bf16-tp1" in refused.stderr


def test_list_model_profiles_as_json(node: Node) -> None:
    listed = node.run("list-model-profiles", "--json")
    doc = json.loads(listed.stdout)
    assert [p["description"] for p in doc["compatible"]] == ["vllm-cpu-bf16-tp1"] and doc["selected"] == doc["compatible"][0]["profile_id"]
    assert doc["incompatible"][0]["reason"].startswith("it needs 2 GPU(s)")


def test_one_h100_changes_the_explained_choice_and_a_broken_driver_ends_it(node: Node, nvml: Path, tmp_path: Path) -> None:
    node.profiles.append({"tags": {"llm_engine": "vllm", "precision": "fp8", "tp": "1", "gpu": "H100"}})
    node.files["config.json"] = b'{"model_type":"llama","quantization_config":{"quant_method":"fp8"}}'
    node.publish()
    config = tmp_path / "gpus.cfg"
    config.write_text("gpu\ntotal=85520809984\nfree=84900000000\ndevice_id=0x233010DE\nmig=0\n")
    env = {"LD_LIBRARY_PATH": str(nvml), "FAKE_NVML_CONFIG": str(config)}
    started = node.run("serve", **env)
    assert started.returncode == 36, started.stderr
    assert "(vllm-h100-fp8-tp1): expected: the only compatible profile of 3; on GPU 0 (1x NVIDIA H100 80GB HBM3)" in started.stderr
    assert "it is for nodes without the NVIDIA library; this node has one and shows 1 GPU(s)" in started.stderr
    assert "it needs 2 GPU(s) (tp x pp); 1 present" in started.stderr and "SIMULATED" in started.stderr
    asked = len(node.site.log)
    config.write_text("init_error=18\n")
    broken = node.run("serve", **env)
    assert broken.returncode == 34 and "NVML failed: " in broken.stderr and "error 18" in broken.stderr
    assert not [line for line in node.site.log[asked:] if "POST" in line]


def test_a_download_that_was_killed_goes_on_where_it_stopped(node: Node) -> None:
    node.files["model.safetensors"] = random.Random(8).randbytes(SIZE)
    node.publish()
    node.site.cut_after = SIZE // 2  # half arrives, then every connection breaks: the client waits and retries, and is killed there
    child = subprocess.Popen(node.command("download-to-cache"), env=node.env, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    journals = node.cache / "partial"
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and not (journals.is_dir() and any(b"part" in p.read_bytes() for p in journals.glob("*.journal"))):
        time.sleep(0.05)
    assert child.poll() is None
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert not node.blob("model.safetensors").exists()
    node.site.cut_after = -1
    node.site.log.clear()
    assert node.run("download-to-cache").returncode == 0
    ranges = [line.rsplit("bytes=", 1)[1] for line in blobs_asked(node) if digest_of(node.files["model.safetensors"]) in line]
    assert ranges and all(int(r.split("-")[0]) > 0 for r in ranges)
    assert (node.model_dir() / "model.safetensors").read_bytes() == node.files["model.safetensors"]
