"""`airlock runtime explain`: golden tables of published lists on each host, described hosts against the stand-in library, the worked example.

The tables are written again by `AIRLOCK_GOLDEN=write pytest tests/unit/test_explain.py`, to be read before they are committed.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from artifact import profile
from artifact.errors import AirlockError, Invalid
from artifact.profile import ProfileSet
from runtime import hosts
from runtime.commands import explain
from runtime.profiles import Selection, Wanted, select
from tests.conftest import ROOT
from tests.fakes.nvml import HOSTS, LATE, host

LISTS = sorted(p.stem for p in (ROOT / "tests/golden/profiles").glob("*.json"))
RUN = "import sys; from runtime.commands.explain import main; sys.exit(main(sys.argv[1:]))"


def profiles(name: str) -> ProfileSet:
    """One list of tests/golden/profiles."""
    return profile.read((ROOT / f"tests/golden/profiles/{name}.json").read_bytes())


def chosen(name: str, described: str, wanted: Wanted | None = None) -> Selection:
    """The selection among a list on a described host."""
    return select(profiles(name).profiles, hosts.named(described), wanted)


@pytest.mark.parametrize("name", LISTS)
def test_golden_tables(name: str) -> None:
    parts = []
    for described in (*HOSTS, "h100x1", "l4x4", "cpu"):
        facts = hosts.named(described)
        table = explain.as_text(select(profiles(name).profiles, facts), facts, f"{name} on {described}")
        parts.append(table)
    text, golden = "\n".join(parts), ROOT / f"tests/golden/explain/{name}.txt"
    if os.environ.get("AIRLOCK_GOLDEN") == "write":
        golden.write_text(text)
    assert golden.read_text() == text


def test_70b_on_one_h100() -> None:
    """FP16 does not fit, by a number; FP8 does, with a warning that little is left for the KV cache."""
    selection = chosen("llama-3.1-70b", "h100x1")
    reasons = {v.profile.description: v for v in selection.verdicts}
    assert reasons["vllm-fp16-tp1"].rule == "memory" and "short by 60.8 GiB" in reasons["vllm-fp16-tp1"].reason
    assert reasons["vllm-fp16-tp1"].short_by == pytest.approx(60.8 * 2**30, rel=0.01)
    assert selection.selected and selection.selected.description == "vllm-fp8-tp1" and selection.length == 11824
    assert selection.notes == (
        "KV headroom: 3.6 GiB per GPU are left for the KV cache, 1 x 131072 tokens need 40.0 GiB; the context is limited to 11824 tokens",
    )
    wanted = Wanted(max_model_len=131072)  # a length that the operator set is not shortened
    refused = {v.profile.description: v for v in chosen("llama-3.1-70b", "h100x1", wanted).verdicts}["vllm-fp8-tp1"]
    assert refused.rule == "memory" and "with NIM_MAX_MODEL_LEN=11824 it fits" in refused.reason
    assert chosen("llama-3.1-70b", "h100x1", Wanted(max_model_len=11824)).length == 0


def test_gb10_and_the_2_0_6_list() -> None:
    """By 1.x's rules the lowest precision wins; 2.0.6 itself took fp8 there (docs/operations.md, Selection)."""
    assert chosen("llama-3.1-8b-2.0.6", "gb10").selected.description == "vllm-nvfp4-tp1"  # type: ignore[union-attr]
    a100 = {v.profile.description: v for v in chosen("llama-3.1-8b-2.0.6", "a100-40").verdicts}
    assert "nvfp4 runs weight-only here: hardware for it begins with compute capability 10.0, this GPU has 8.0" in a100["vllm-nvfp4-tp1"].notes


def run(nvml: Path, tmp_path: Path, config: str, *argv: str, **env: str) -> subprocess.CompletedProcess[str]:
    """`explain` in a process of its own, on a host of the stand-in."""
    (tmp_path / "gpus.cfg").write_text(config)
    env = {"PATH": os.environ["PATH"], "LD_LIBRARY_PATH": str(nvml), "FAKE_NVML_CONFIG": str(tmp_path / "gpus.cfg")} | env
    for engine in ("vllm", "tensorrt_llm", "sglang"):  # programs that are there, so that the hardware alone decides
        for program in ("vllm", "trtllm-serve", "python"):
            (tmp_path / engine / "bin").mkdir(parents=True, exist_ok=True)
            (tmp_path / engine / "bin" / program).write_text("#!/bin/sh\n")
            (tmp_path / engine / "bin" / program).chmod(0o755)
        env[f"AIRLOCK_ENGINE_{engine.upper()}"] = str(tmp_path / engine)
    command = [sys.executable, "-c", RUN, *argv]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, cwd=ROOT)


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in HOSTS if n != "gb10x1"])
def test_a_detected_host_is_judged_as_the_described_one(nvml: Path, tmp_path: Path, name: str) -> None:
    file = str(ROOT / "tests/golden/profiles/llama-3.1-70b.json")
    done = run(nvml, tmp_path, HOSTS[name], "--profiles", file, "--json")
    seen = json.loads(done.stdout)
    facts = hosts.named(name)
    told = json.loads(explain.as_json(select(profiles("llama-3.1-70b").profiles, facts), facts, "x"))
    keys = ("rank", "profile_id", "rule", "reason", "notes", "memory")
    assert [{k: r.get(k) for k in keys} for r in seen["profiles"]] == [{k: r.get(k) for k in keys} for r in told["profiles"]]
    assert seen["system"]["simulated"] and seen["why"] == told["why"] and done.returncode == (0 if told["selected"] else 30)


@pytest.mark.slow
def test_the_worked_example_replayed(nvml: Path, tmp_path: Path) -> None:
    """8x H100 NVL, one of which answers late: the start fails naming it and never takes TP4; with TP8 pinned it waits and takes TP8."""
    argv = ("--profiles", str(ROOT / "tests/golden/profiles/llama-3.1-70b.json"), "--json")
    late = run(nvml, tmp_path, LATE.format(ms=2500), *argv, AIRLOCK_GPU_DEADLINE_S="1")
    told = json.loads(late.stderr.splitlines()[-1])
    assert late.returncode == 34 and late.stdout == ""
    assert "nvmlDeviceGetMemoryInfo of GPU 7 (GPU-00000000-0000-0000-0000-000000000007, 00000000:17:00.0)" in told["what"]
    pin = "trtllm-h100_nvl-fp8-tp8-latency"
    pinned = run(nvml, tmp_path, LATE.format(ms=2500), *argv, AIRLOCK_GPU_DEADLINE_S="1", NIM_MODEL_PROFILE=pin)
    assert pinned.returncode == 0 and "still waiting for nvmlDeviceGetMemoryInfo of GPU 7" in pinned.stderr
    out = json.loads(pinned.stdout)
    best = next(r for r in out["profiles"] if r["profile_id"] == out["selected"])
    assert out["standing"] == "pinned" and pin in best["names"] and len(best["gpus"]) == 8
    seven = run(nvml, tmp_path, host(*["h100-nvl"] * 7), *argv, NIM_MODEL_PROFILE=pin)
    assert seven.returncode == 30 and json.loads(seven.stdout)["selected"] is None
    expected = run(nvml, tmp_path, host(*["h100-nvl"] * 7), *argv, AIRLOCK_EXPECT_PROFILE=pin)
    assert expected.returncode == 51 and "it needs 8 GPU(s) (tp x pp); 7 present" in expected.stderr


@pytest.mark.parametrize(
    ("raw", "names"),
    [
        ({"gpus": [{"name": "NVIDIA L40S", "device": "26b9:10de", "capability": [8, 9], "total": 48305799168, "count": 2}]}, ["NVIDIA L40S"] * 2),
        ({"cpu": True}, []),
        ({"system": {"gpus": [{"name": "X", "total": 5, "uuid": "GPU-x"}], "driver": "1"}}, ["X"]),
    ],
)
def test_a_described_host(raw: dict[str, object], names: list[str]) -> None:
    facts = hosts.parse(json.dumps(raw).encode())
    assert facts.simulated and [g.name for g in facts.gpus] == names


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"[]",
        b"{}",
        b'{"gpus": 1}',
        b'{"gpus": [1]}',
        b'{"gpus": [{"count": 65}]}',
        b'{"gpus": [{"count": 0}]}',
        b'{"gpus": [{"name": "X", "total": -1}]}',
        b'{"gpus": [{"name": "X", "total": 1e9}]}',
        b'{"gpus": [{"name": "X", "total": true}]}',
        b'{"gpus": [{"name": "\\u001b[2J", "total": 1}]}',
        b'{"gpus": [{"name": "X", "total": 1, "capability": [9]}]}',
        b'{"gpus": [{"name": "X", "total": 1, "capability": "9.0"}]}',
        b'{"gpus": [' + b'{"name": "X", "total": 1, "count": 40},' * 2 + b'{"name": "X", "total": 1}]}',
        b"[" * 100000,
    ],
)
def test_a_senseless_description_is_refused(raw: bytes) -> None:
    with pytest.raises(AirlockError):
        hosts.parse(raw)


@pytest.mark.parametrize(
    ("item", "words"),
    [
        ({"name": "X", "memory": 80}, "has 'memory'; expected: of: bus, capability, count,"),
        ({"name": "X"}, "GPU 0 in the description of the host has no total"),
        ({"total": 80}, "has no name"),
    ],
)
def test_a_size_under_another_name_is_not_taken_for_none(item: dict[str, object], words: str) -> None:
    """A GPU without a size fits everything: nothing is measured against it."""
    with pytest.raises(Invalid, match=re.escape(words)):
        hosts.parse(json.dumps({"gpus": [item]}).encode())


@pytest.mark.parametrize("described", [*HOSTS, "l40sx1,l4x2", "cpu"])
def test_what_explain_tells_of_a_host_describes_it(described: str) -> None:
    facts, found = hosts.named(described), profiles("llama-3.1-70b").profiles
    told = explain.as_json(select(found, facts), facts, "x")
    again = hosts.parse(told.encode())
    assert json.loads(explain.as_json(select(found, again), again, "x"))["profiles"] == json.loads(told)["profiles"]


@pytest.mark.parametrize(("text", "number", "name"), [("H100_NVLx2", 2, "NVIDIA H100 NVL"), (" l40sX1 , L4 ", 2, "NVIDIA L40S"), ("CPU", 0, "")])
def test_a_host_is_named_as_people_write_it(text: str, number: int, name: str) -> None:
    found = hosts.named(text).gpus
    assert len(found) == number and (not found or found[0].name == name)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("hardware", "status", "words"),
    [
        ("", 6, "no host is known as ''"),  # a variable of a script that is not set: not this node
        ("8xh100", 6, "take one of these, or describe it in a JSON file"),
        ("/absent/host.json", 3, "/absent/host.json cannot be read"),
        ("/", 3, "/ cannot be read: Is a directory"),
        ("/dev/zero", 11, "has more than"),
        ("/dev/null", 6, "the description of the host is not valid JSON"),
    ],
)
def test_odd_hardware_is_refused_in_words(hardware: str, status: int, words: str) -> None:
    file = str(ROOT / "tests/golden/profiles/llama-3.1-8b-1.3.json")
    command = [sys.executable, "-c", RUN, "--hardware", hardware, "--profiles", file]
    done = subprocess.run(command, env={"PATH": os.environ["PATH"]}, capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.returncode == status and done.stdout == "" and words in done.stderr and "Traceback" not in done.stderr, done


@pytest.mark.parametrize("text", ["h200x0", "h100x65", "h100x8x8", "", "x", "h100,,", "h100x60,h100x5", "../etc"])
def test_an_unknown_host_lists_the_known_ones(text: str) -> None:
    with pytest.raises(Invalid, match="no host is known"):
        hosts.named(text)


def test_a_host_of_two_kinds() -> None:
    assert [g.name for g in hosts.named("l40sx1,l4x2").gpus] == ["NVIDIA L40S", "NVIDIA L4", "NVIDIA L4"]
