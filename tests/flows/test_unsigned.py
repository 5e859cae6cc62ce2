"""Local model directories and manifests of the operator's: refused without a reason, recorded with one, and data or nothing (A29 to A32)."""

from __future__ import annotations

import json
import os
import pickle
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.flows.test_runtime_cache import SEED_LINE, Node, node  # noqa: F401 - the fixture

pytestmark = pytest.mark.server
REASON = "bench of our own tune, J. Doe, ticket 7"
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "torch_dtype": "bfloat16",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
    "vocab_size": 128,
}


def safetensors(header: dict[str, object] | bytes, data: bytes, length: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


GOOD = safetensors({"w": {"dtype": "BF16", "shape": [4, 4], "data_offsets": [0, 32]}}, bytes(32))


@pytest.fixture
def tuned(tmp_path: Path) -> Path:
    top = tmp_path / "Tuned"
    top.mkdir()
    (top / "config.json").write_text(json.dumps(CONFIG))
    (top / "model.safetensors").write_bytes(GOOD)
    return top


def serve(node: Node, top: Path, **env: str) -> subprocess.CompletedProcess[str]:  # noqa: F811
    argv = [sys.executable, "-m", "runtime", "serve"]
    given = node.env | {"NIM_MODEL_PATH": str(top), "AIRLOCK_ALLOW_UNSIGNED": REASON} | env
    return subprocess.run(argv, env={k: v for k, v in given.items() if v}, capture_output=True, text=True, timeout=60, cwd=ROOT)


def records(node: Node) -> list[dict[str, object]]:  # noqa: F811
    return [json.loads(p.read_text()) for p in sorted((node.cache / "unsigned").glob("*.json"))]


def test_without_a_reason_it_is_refused_and_with_one_told_to_the_registry(node: Node, tuned: Path) -> None:  # noqa: F811
    refused = serve(node, tuned, AIRLOCK_ALLOW_UNSIGNED="")
    assert refused.returncode == 46 and "has no signature of this site" in refused.stderr and "AIRLOCK_ALLOW_UNSIGNED" in refused.stderr
    assert not node.site.taken
    begun = int(time.time())
    started = serve(node, tuned)
    assert started.returncode == 36, started.stderr  # the stand-in's refusal: everything before the engine was done
    assert f"UNSIGNED: {tuned} is run without this site's signature: {REASON}" in started.stderr
    ((path, body),) = node.site.taken
    assert path == "unsigned" and body["reason"] == REASON and body["model"] == "local/tuned:local" and int(body["at"]) >= begun
    assert len(str(body["digest"])) == 71 and records(node) == []
    (tuned / "config.json").write_text(json.dumps(CONFIG | {"vocab_size": 129}))
    serve(node, tuned)
    assert node.site.taken[1][1]["digest"] != body["digest"], "the digest is that of the bytes"


def test_where_the_registry_is_away_a_later_start_tells(node: Node, tuned: Path) -> None:  # noqa: F811
    url = node.env["AIRLOCK_REGISTRY"]
    away = serve(node, tuned, AIRLOCK_REGISTRY="http://127.0.0.1:9")
    assert away.returncode == 36 and "a later one tells it" in away.stderr, away.stderr
    assert serve(node, tuned, AIRLOCK_REGISTRY="").returncode == 36 and serve(node, tuned, AIRLOCK_OFFLINE="1").returncode == 36
    assert [r["reason"] for r in records(node)] == [REASON] * 3 and not node.site.taken
    assert serve(node, tuned, AIRLOCK_REGISTRY=url).returncode == 36
    assert len(node.site.taken) == 4 and records(node) == []


def test_what_is_put_beside_a_promoted_model_is_recorded_too(node: Node, tmp_path: Path) -> None:  # noqa: F811
    template = tmp_path / "chat.jinja"
    template.write_text("{{ messages }}")
    more = {"NIM_CHAT_TEMPLATE": str(template)}
    assert node.run("serve", **more).returncode == 46 and not [t for t in node.site.taken if t[0] == "unsigned"]
    started = node.run("serve", **more, AIRLOCK_ALLOW_UNSIGNED=REASON)
    assert started.returncode == 36 and f"UNSIGNED: {template} (NIM_CHAT_TEMPLATE) is used without this site's signature" in started.stderr
    template.write_text("{{ messages[0] }}")
    node.run("serve", **more, AIRLOCK_ALLOW_UNSIGNED=REASON)
    first, second = [body for kind, body in node.site.taken if kind == "unsigned"]
    assert first["reason"] == REASON and first["model"] == "acme/tiny:1" and "with NIM_CHAT_TEMPLATE" in first["profile"]
    assert first["digest"] != second["digest"] and len(str(first["digest"])) == 71


def test_what_others_put_among_the_records_holds_up_nothing(node: Node, tuned: Path) -> None:  # noqa: F811
    folder = node.cache / "unsigned"
    folder.mkdir(parents=True)
    os.mkfifo(folder / "0.json")
    (folder / "1.json").write_text("no JSON")
    (folder / "2.json").symlink_to("/etc/hostname")
    node.site.refused.add("planted")
    (folder / "3.json").write_text('{"reason": "planted"}')
    (folder / "4.json").write_text(json.dumps({"reason": "an older start"}))
    assert serve(node, tuned).returncode == 36
    assert [body["reason"] for _, body in node.site.taken] == [REASON, "an older start"]
    assert sorted(p.name for p in folder.iterdir()) == ["0.json", "1.json", "2.json", "3.json"]


def test_a_refused_key_ends_it_too(node: Node, tuned: Path) -> None:  # noqa: F811
    node.site.state = "revoked"
    refused = serve(node, tuned)
    assert refused.returncode == 23 and SEED_LINE in refused.stderr and not node.site.taken


def test_code_and_pickles_of_the_directory_are_not_handed_over(node: Node, tuned: Path) -> None:  # noqa: F811
    (tuned / "modeling_x.py").write_text("import os")
    (tuned / "optimizer.pt").write_bytes(pickle.dumps({}))
    (tuned / "table.npy").write_bytes(npy("<f4"))  # numbers are data
    started = serve(node, tuned)
    assert (
        started.returncode == 36
        and "modeling_x.py of" in started.stderr
        and "optimizer.pt of" in started.stderr
        and "no engine sees it" in started.stderr
    )


def npy(descr: object) -> bytes:
    """A file of numpy, format 1.0, whose array holds that."""
    text = f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': (1,), }}\n".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + pickle.dumps([{}])


HUGE = struct.pack("<Q", 1 << 63) + b"{}"
CASES: dict[str, tuple[str, bytes, str]] = {
    "A31 pickle named json": ("tokenizer.json", pickle.dumps({"a": 1}), "is a pickle"),
    "A31 objects in npy": ("table.npy", npy("|O"), "table.npy of the model is an array of objects"),
    "A31 objects in a record of npy": ("table.npy", npy([("a", "<f4"), ("b", "|O")]), "table.npy of the model is an array of objects"),
    "A31 pickles alone": ("pytorch_model.bin", pickle.dumps({}), "the weights are pickles"),
    "A32 length of 2^63": ("model.safetensors", HUGE, "model.safetensors"),
    "A32 header of 100 MB and one": ("model.safetensors", safetensors(b"{", b"", 100_000_001), "model.safetensors"),
    "A32 larger than the file": ("model.safetensors", safetensors(b"{}", b"", 5000), "model.safetensors"),
    "A32 no JSON": ("model.safetensors", safetensors(b"hello there", b""), "model.safetensors"),
    "A32 overlap": (
        "model.safetensors",
        safetensors({n: {"dtype": "U8", "shape": [8], "data_offsets": [lo, lo + 8]} for n, lo in (("a", 0), ("b", 4))}, bytes(12)),
        "model.safetensors",
    ),
    "A32 gap": (
        "model.safetensors",
        safetensors({n: {"dtype": "U8", "shape": [8], "data_offsets": [lo, lo + 8]} for n, lo in (("a", 0), ("b", 16))}, bytes(24)),
        "model.safetensors",
    ),
    "A32 product overflow": (
        "model.safetensors",
        safetensors({"a": {"dtype": "F32", "shape": [1 << 40, 1 << 40], "data_offsets": [0, 32]}}, bytes(32)),
        "model.safetensors",
    ),
    "A32 dtype mismatch": (
        "model.safetensors",
        safetensors({"a": {"dtype": "F64", "shape": [4, 4], "data_offsets": [0, 32]}}, bytes(32)),
        "model.safetensors",
    ),
    "A32 trailing zip": ("model.safetensors", GOOD + b"PK\x03\x04" + bytes(50), "model.safetensors"),
    "A29 index that leads out": (
        "model.safetensors.index.json",
        json.dumps({"weight_map": {"w": "../../x.safetensors"}}).encode(),
        "../../x.safetensors",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_no_data_refuses_in_a_second(node: Node, tuned: Path, case: str) -> None:  # noqa: F811
    name, raw, words = CASES[case]
    if name == "pytorch_model.bin":
        (tuned / "model.safetensors").unlink()
    (tuned / name).write_bytes(raw)
    refused = serve(node, tuned)
    assert refused.returncode == 47 and words in refused.stderr and "Traceback" not in refused.stderr and "Traceback" not in refused.stderr, (
        refused.stderr
    )
    assert not node.site.taken, "what does not start is not recorded as started"


@pytest.mark.parametrize("kind", ["link out", "folder link out", "pipe", "case"])
def test_links_pipes_and_names_that_differ_in_case(node: Node, tuned: Path, kind: str) -> None:  # noqa: F811
    if kind == "link out":
        (tuned / "vocab.txt").symlink_to("/etc/hostname")
    elif kind == "folder link out":
        (tuned / "sub").symlink_to("/etc")
    elif kind == "pipe":
        os.mkfifo(tuned / "vocab.txt")
    else:
        (tuned / "Config.json").write_text("{}")
    refused = serve(node, tuned)
    assert refused.returncode == 47 and "the model directory: " in refused.stderr and "Traceback" not in refused.stderr, refused.stderr


def test_a_link_inside_the_directory_is_what_the_hubs_cache_has(node: Node, tuned: Path) -> None:  # noqa: F811
    (tuned / "blobs").mkdir()
    (tuned / "model.safetensors").rename(tuned / "blobs" / "abc")
    (tuned / "model.safetensors").symlink_to("blobs/abc")
    assert serve(node, tuned).returncode == 36


def test_a_manifest_of_the_operators_stands_for_the_released_one(node: Node, tmp_path: Path) -> None:  # noqa: F811
    profiles = [{"id": "mine", "tags": {"llm_engine": "vllm", "precision": "bf16", "tp": "1", "device": "cpu"}}]
    (tmp_path / "own.json").write_text(json.dumps({"profiles": profiles}))
    argv, env = node.command("serve"), node.env | {"NIM_MANIFEST_PATH": str(tmp_path / "own.json")}
    refused = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert refused.returncode == 46 and "NIM_MANIFEST_PATH" in refused.stderr
    started = subprocess.run(argv, env=env | {"AIRLOCK_ALLOW_UNSIGNED": REASON}, capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert started.returncode == 36 and "Selected profile: mine" in started.stderr, started.stderr
    assert node.site.taken[0][1]["digest"] == node.model_digest and (node.model_dir() / "model.safetensors").exists()
