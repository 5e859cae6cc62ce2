"""Starts on many GPUs, which a stand-in NVML library shows: one that answers late, an expected profile, a context that is shortened, MIG slices.

The engine's place is taken by a program that writes down how it was called.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.fakes.nvml import HOSTS, LATE, host
from tests.flows.test_runtime_cache import Node, node

pytestmark = pytest.mark.server
__all__ = ["node"]

MEMORY_70B_FP8 = {"weights_bytes": 72_655_052_800, "layers": 80, "kv_heads": 8, "head_dim": 128, "context": 131_072}
TP8 = "vllm-fp8-tp8"


def many(node: Node, nvml: Path, config: str, **more: str) -> dict[str, str]:
    """The node with fp8 profiles for 1, 4 and 8 GPUs, and the environment of a start on that host."""
    node.profiles = [{"tags": {"llm_engine": "vllm", "precision": "fp8", "tp": n}, "memory": MEMORY_70B_FP8} for n in ("1", "4", "8")]
    node.files["config.json"] = b'{"model_type":"llama","quantization_config":{"quant_method":"fp8"}}'
    node.publish()
    path = node.folder / "gpus.cfg"
    path.write_text(config)
    engine = node.folder / "engine" / "bin" / "vllm"
    engine.write_text(f'#!/bin/sh\necho "$@" > {node.folder}/argv\necho "$CUDA_VISIBLE_DEVICES" > {node.folder}/visible\nexec >&2\n' + STOP)
    return {"LD_LIBRARY_PATH": str(nvml), "FAKE_NVML_CONFIG": str(path), "AIRLOCK_GPU_DEADLINE_S": "1"} | more


STOP = "echo 'error: unrecognized arguments: --stand-in'\nexit 2\n"


def test_a_gpu_that_answers_late_ends_the_start_and_is_never_left_out(node: Node, nvml: Path) -> None:
    done = node.run("serve", **many(node, nvml, LATE.format(ms=2500)))
    assert done.returncode == 34, done.stderr
    assert "the last call was nvmlDeviceGetMemoryInfo of GPU 7 (GPU-00000000-0000-0000-0000-000000000007, 00000000:17:00.0)" in done.stderr
    assert not (node.folder / "argv").exists() and not (node.cache / "models").exists()


def test_with_tp8_pinned_the_start_waits_and_takes_tp8(node: Node, nvml: Path) -> None:
    done = node.run("serve", **many(node, nvml, LATE.format(ms=2500), NIM_MODEL_PROFILE=TP8))
    assert "still waiting for nvmlDeviceGetMemoryInfo of GPU 7" in done.stderr and f"({TP8}): pinned: NIM_MODEL_PROFILE names it" in done.stderr
    argv = (node.folder / "argv").read_text()
    assert "--tensor-parallel-size 8" in argv, done.stderr
    assert (node.folder / "visible").read_text().split(",")[7].strip() == "GPU-00000000-0000-0000-0000-000000000007"
    fewer = node.run("serve", **many(node, nvml, host(*["h100-nvl"] * 7), NIM_MODEL_PROFILE=TP8))
    assert fewer.returncode == 30 and "it needs 8 GPU(s) (tp x pp); 7 present" in fewer.stderr


def test_another_profile_than_the_expected_one_ends_before_weights(node: Node, nvml: Path) -> None:
    done = node.run("serve", **many(node, nvml, host(*["h100-nvl"] * 7), AIRLOCK_EXPECT_PROFILE="precision=fp8,tp=8"))
    assert done.returncode == 51 and f"({TP8}): it needs 8 GPU(s) (tp x pp); 7 present" in done.stderr
    assert not (node.folder / "argv").exists() and not (node.cache / "models").exists()


def test_a_context_that_does_not_fit_is_told_and_given_to_the_engine(node: Node, nvml: Path) -> None:
    done = node.run("serve", **many(node, nvml, host("h100")))
    assert "KV headroom: 3.6 GiB per GPU are left for the KV cache" in done.stderr
    assert "--max-model-len 11824" in (node.folder / "argv").read_text()
    refused = node.run("serve", **many(node, nvml, host("h100"), NIM_MAX_MODEL_LEN="131072"))
    assert refused.returncode == 30 and "with NIM_MAX_MODEL_LEN=11824 it fits" in refused.stderr


def test_slices_of_one_gpu_are_leased_as_that_gpu(node: Node, nvml: Path) -> None:
    env = many(node, nvml, HOSTS["h100-migx1"], CUDA_VISIBLE_DEVICES="MIG-00000000-0000-0000-0000-000000000001")
    node.profiles = [{"tags": {"llm_engine": "vllm", "precision": "fp8", "tp": "1"}, "memory": {"weights_bytes": 9 << 30}}]
    node.publish()
    asked: list[list[str]] = []
    lease = node.site.lease
    node.site.lease = lambda body: (asked.append(body["gpu_uuids"]), lease(body))[1]
    node.run("serve", **env)
    assert (node.folder / "visible").read_text().strip() == "MIG-00000000-0000-0000-0000-000000000001"
    assert asked == [["GPU-00000000-0000-0000-0000-000000000000"]]


def test_the_list_keeps_lora_and_low_memory_apart(node: Node, nvml: Path) -> None:
    env = many(node, nvml, host("h100", each="free=20000000000"))
    tags = {"llm_engine": "vllm", "tp": "1"}
    node.profiles = [
        {"tags": tags | {"precision": "bf16"}, "memory": {"weights_bytes": 30 << 30}},
        {"tags": tags | {"precision": "fp8"}, "memory": {"weights_bytes": 9 << 30}},
        {"tags": tags | {"precision": "fp8", "feat_lora": "true"}, "memory": {"weights_bytes": 9 << 30}},
    ]
    node.publish()
    lines = [line.split(" (", 1)[-1] if "(" in line else line for line in node.run("list-model-profiles", **env).stdout.splitlines()]
    at = lines.index("- Compatible with system and runnable:")
    assert lines[at + 1 : at + 4] == ["vllm-fp8-tp1)   <- selected", "  - With LoRA support:", "vllm-fp8-tp1-lora)"]
    assert lines[at + 4] == "- Compatible with system but low memory:" and lines[at + 5].startswith("vllm-bf16-tp1): compatible, but not runnable")
    assert lines[at + 6] == "- Incompatible with system: <None>"
    started = node.run("serve", **env).stderr
    assert "Detected 1 compatible profile(s)." in started and "Detected additional 1 compatible profile(s) that are currently not runnable" in started
    assert "(vllm-fp8-tp1) on GPUs [0]" in started


def test_explain_a_released_model_here_and_for_another_host(node: Node, nvml: Path) -> None:
    env = many(node, nvml, host("h100", each="ecc=2\nthrottle=0x40"))
    here = node.run("explain", "--json", **env)
    out = json.loads(here.stdout)
    assert here.returncode == 0 and out["source"] == "acme/tiny:1" and [p["rule"] for p in out["profiles"]] == [None, "gpus", "gpus"]
    assert out["system"]["simulated"] and out["system"]["gpus"][0]["faults"] == ["2 uncorrected ECC error(s) since the driver was loaded"]
    there = json.loads(node.run("explain", "--json", "--hardware", "h100x8").stdout)
    assert there["selected"] != out["selected"] and len(there["system"]["gpus"]) == 8
    assert not (node.cache / "models").exists()  # nothing is fetched for it
    started = node.run("serve", **env).stderr
    assert "00000000:10:00.0): 2 uncorrected ECC error(s)" in started and "clocks are slowed now: hardware thermal limit" in started
