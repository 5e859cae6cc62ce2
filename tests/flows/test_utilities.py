"""The utilities of a NIM's image under their own names and spellings, and their output as scripts and the operator read it."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.flows.test_preflight import inside
from tests.flows.test_runtime_cache import Node, blobs_asked, node  # noqa: F401 - the fixture
from tests.flows.test_unsigned import REASON

pytestmark = pytest.mark.server
AIRLOCK = Path(sys.executable).parent / "airlock"


def tool(node: Node, name: str, *argv: str, **env: str) -> subprocess.CompletedProcess[str]:  # noqa: F811
    """The command under the name that it has in an image: a link to airlock; the model is named by the image's environment."""
    link = node.folder / "bin" / name
    link.parent.mkdir(exist_ok=True)
    if not link.is_symlink():
        link.symlink_to(AIRLOCK)
    given = node.env | {"AIRLOCK_MODEL": "acme/tiny:1"} | env
    return subprocess.run([str(link), *argv], env=given, capture_output=True, text=True, timeout=60, cwd=ROOT)


def listed(node: Node) -> set[str]:  # noqa: F811
    return {str(p.relative_to(node.model_dir())) for p in node.model_dir().rglob("*") if p.is_file()} if node.model_dir().exists() else set()


@pytest.mark.parametrize("name", ["list-model-profiles", "nim_list_model_profiles"])
def test_the_list_goes_to_a_file_as_json(node: Node, tmp_path: Path, name: str) -> None:  # noqa: F811
    done = tool(node, name, "--output-format", "json", "--output-file", str(tmp_path / "out.json"))
    assert done.returncode == 0 and done.stdout == "", done.stderr
    doc = json.loads((tmp_path / "out.json").read_text())
    assert [p["tags"]["device"] for p in doc["compatible"]] == ["cpu"] and len(doc["compatible"][0]["profile_id"]) == 64
    assert "- Incompatible with system:\n" in tool(node, name).stdout
    lost = tool(node, name, "--output-file", str(tmp_path / "absent" / "out.json"))
    assert lost.returncode == 9 and f"{tmp_path}/absent/out.json cannot be written" in lost.stderr and "cache" not in lost.stderr.split("cause:")[1]


@pytest.mark.parametrize("shape", ["json of a NIM", "profile document"])
def test_a_manifest_file_is_listed_without_key_registry_or_model(node: Node, tmp_path: Path, shape: str) -> None:  # noqa: F811
    tags = {"llm_engine": "vllm", "precision": "bf16", "tp": "1", "pp": "1", "feat_lora": "false"}
    file = tmp_path / "manifest.json"
    workspace = {"files": {"config.json": {"uri": "ngc://nim/meta/llama3-8b-instruct:hf?file=config.json"}}}
    nim = {"a" * 64: {"model": "meta/llama3-8b-instruct", "release": "1.1.2", "tags": tags, "container_url": "", "workspace": workspace}}
    file.write_text(json.dumps(nim if shape == "json of a NIM" else {"profiles": [{"id": "a" * 64, "tags": tags}]}))
    bare = {"AIRLOCK_MODEL": "", "NGC_API_KEY": "", "AIRLOCK_REGISTRY": "", "AIRLOCK_TRUST": ""}
    done = tool(node, "list-model-profiles", "-m", str(file), "--output-format", "json", **bare)
    assert done.returncode == 0, done.stderr
    doc = json.loads(done.stdout)
    assert [p["profile_id"] for p in (*doc["compatible"], *doc["incompatible"])] == ["a" * 64] and not node.site.log


@pytest.mark.parametrize("argv", [["-p", "ID"], ["--profile", "NAME"], ["--profiles", "ID", "NAME"], ["--all"], []])
def test_weights_are_fetched_by_all_spellings(node: Node, argv: list[str]) -> None:  # noqa: F811
    listing = json.loads(tool(node, "list-model-profiles", "--json").stdout)["compatible"][0]
    names = {"ID": listing["profile_id"], "NAME": listing["description"]}
    done = tool(node, "nim_download_to_cache", *(names.get(a, a) for a in argv))
    assert done.returncode == 0, done.stderr
    assert listed(node) == set(node.files) and (listing["profile_id"] in done.stdout or argv == ["--all"])


def test_unknown_profiles_are_told_with_a_nims_words(node: Node) -> None:  # noqa: F811
    done = tool(node, "download-to-cache", "--profiles", "default", "vllm-cpu-bf16-tp1")
    assert done.returncode == 31 and not blobs_asked(node)
    assert "Not all of the provided profiles are supported. Unknown profiles provided: {'default'}" in done.stderr
    assert "All valid profiles: " in done.stderr and "(vllm-cpu-bf16-tp1)" in done.stderr
    assert "no matching profile_id or profile description is found in manifest" in node.run("serve", NIM_MODEL_PROFILE="auto").stderr


def test_lora_and_a_manifest_of_ones_own(node: Node, tmp_path: Path) -> None:  # noqa: F811
    assert tool(node, "download-to-cache", "--lora").returncode == 30, "no profile here supports LoRA"
    file = tmp_path / "own.json"
    file.write_text(json.dumps({"profiles": [{"id": "mine", "tags": {"llm_engine": "vllm", "precision": "bf16", "tp": "1", "device": "cpu"}}]}))
    assert tool(node, "download-to-cache", "-m", str(file)).returncode == 46
    done = tool(node, "download-to-cache", "-m", str(file), AIRLOCK_ALLOW_UNSIGNED=REASON)
    assert done.returncode == 0 and done.stdout.startswith("mine ") and listed(node) == set(node.files), done.stderr


def test_a_model_store_is_plain_files_that_anybody_may_change(node: Node, tmp_path: Path) -> None:  # noqa: F811
    store = tmp_path / "store"
    done = tool(node, "create-model-store", "-p", "vllm-cpu-bf16-tp1", "-m", str(store))
    assert (done.returncode == 0 and done.stdout.split()[2] == str(store) + "/.") or done.stdout.split()[2] == str(store), done.stderr
    assert {str(p.relative_to(store)): p.read_bytes() for p in store.rglob("*") if p.is_file()} == node.files
    assert stat.S_IMODE((store / "sub").stat().st_mode) == 0o2775 and stat.S_IMODE((store / "config.json").stat().st_mode) == 0o664
    (store / "config.json").write_text("{}")
    assert (node.model_dir() / "config.json").read_bytes() == node.files["config.json"], "the cache does not change with it"
    again = tool(node, "create-model-store", "-m", str(store))
    assert again.returncode == 8 and "is there and not empty" in again.stderr
    started = node.run("serve", NIM_MODEL_PATH=str(store), AIRLOCK_ALLOW_UNSIGNED=REASON)  # --model is said, and wins
    assert started.returncode == 36 and "UNSIGNED" not in started.stderr


def test_the_hubs_layout_is_found_by_its_library_offline(node: Node, tmp_path: Path) -> None:  # noqa: F811
    store = tmp_path / "hub"
    done = tool(node, "create-model-store", "--layout", "hub", "--model-store", str(store))
    assert done.returncode == 0, done.stderr
    code = f"from huggingface_hub import snapshot_download; print(snapshot_download('acme/tiny', cache_dir={str(store)!r}, local_files_only=True))"
    found = subprocess.run([sys.executable, "-c", code], env=node.env | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, check=True)
    snapshot = Path(found.stdout.strip())
    assert str(snapshot) == done.stdout.split()[2]
    assert {str(p.relative_to(snapshot)): p.read_bytes() for p in snapshot.rglob("*") if p.is_file()} == node.files


def test_the_cache_check_of_an_image(node: Node) -> None:  # noqa: F811
    node.cache.mkdir()
    assert tool(node, "nim-llm-check-cache-env").returncode == 0
    bind = f"mount --bind {node.cache} {node.cache}; mount -o remount,ro,bind {node.cache}"
    read_only = inside(node, bind, str(node.folder / "bin" / "nim-llm-check-cache-env"))
    assert read_only.returncode == 0
    assert f"{node.cache} is read-only, application may fail if model is not already present in cache" in read_only.stderr
    unusable = tool(node, "nim-llm-check-cache-env", NIM_CACHE_PATH="/proc/nim")
    assert unusable.returncode == 38 and "/proc/nim" in unusable.stderr


def test_log_lines_are_json_where_that_is_asked_for(node: Node) -> None:  # noqa: F811
    done = node.run("download-to-cache", NIM_JSONL_LOGGING="1")
    lines = [json.loads(line) for line in done.stderr.splitlines() if line.startswith("{")]
    assert lines and any(line["message"].startswith("Model workspace is now ready. It took ") for line in lines)
    assert all(list(line) == ["level", "time", "file_path", "line_number", "message", "exc_info", "stack_info"] for line in lines)
    quiet = node.run("download-to-cache", NIM_LOG_LEVEL="ERROR")
    assert quiet.returncode == 0 and "INFO" not in quiet.stderr
    assert node.run("serve", NIM_LOG_LEVEL="LOUD").returncode == 6 and node.run("serve", NIM_MIDDLEWARE_CONFIG_PATH="/x").returncode == 49
    assert os.environ.get("NIM_JSONL_LOGGING") is None
