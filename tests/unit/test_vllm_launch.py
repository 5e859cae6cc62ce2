"""The arguments and the environment of a vLLM start: exact for the CPU, and what must never be in them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from artifact.errors import Invalid, NotFound
from artifact.profile import Pin, Profile
from runtime.engines.vllm import Installation, find, launch
from runtime.node import Gpu
from runtime.settings import from_environment

CPU = Profile("a" * 64, {"llm_engine": "vllm", "precision": "bf16", "tp": "1", "device": "cpu"}, Pin("acme/tiny", "sha256:" + "1" * 64))
GPU = replace(CPU, tags={"llm_engine": "vllm", "precision": "fp16", "tp": "2"})
ENV = {"NGC_API_KEY": "nvapi-secret", "HF_TOKEN": "hf_secret", "PATH": "/bin", "HTTPS_PROXY": "http://user:pw@proxy", "OMP_NUM_THREADS": "2"}
ENV |= {"NIM_CACHE_PATH": "/cache"}
HERE = Installation(Path("/e/bin/vllm"), Path("/e/meta"))
SETTINGS = from_environment(ENV, "acme/tiny:1")


def test_cpu_generate() -> None:
    plan = launch(replace(CPU, options={"max_model_len": "512"}), Path("/cache/m"), Path("/tmp/x/s"), SETTINGS, installation=HERE)
    assert plan.argv == (
        *("/e/bin/vllm", "serve", "/cache/m", "--served-model-name", "acme/tiny", "--uds", "/tmp/x/s"),
        *("--disable-uvicorn-access-log", "--dtype", "bfloat16", "--max-model-len", "512", "--enforce-eager"),
    )
    assert plan.health_path == "/health" and plan.socket == Path("/tmp/x/s")
    for name, value in {
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "PYTHONPATH": "/e/meta",
        "OMP_NUM_THREADS": "2",
    }.items():
        assert plan.env[name] == value


def test_cpu_embed_uses_float32_and_the_pooling_runner() -> None:
    plan = launch(replace(CPU, options={"task": "embed"}), Path("/m"), Path("/s"), SETTINGS, installation=HERE)
    assert " ".join(plan.argv).endswith("--runner pooling --convert embed --dtype float32 --enforce-eager")


def test_gpus_are_named_by_uuid_and_split_as_the_profile_says() -> None:
    gpus = (Gpu(0, "GPU-a", "NVIDIA L4", ""), Gpu(1, "GPU-b", "NVIDIA L4", ""))
    plan = launch(GPU, Path("/m"), Path("/s"), SETTINGS, installation=HERE, gpus=gpus, share=0.48)
    line = " ".join(plan.argv)
    assert "--dtype float16 --tensor-parallel-size 2 --gpu-memory-utilization 0.480" in line and "--enforce-eager" not in line
    assert plan.env["CUDA_VISIBLE_DEVICES"] == "GPU-a,GPU-b" and plan.env["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
    assert "VLLM_CPU_KVCACHE_SPACE" not in plan.env


def test_quantised_checkpoints_speak_for_themselves() -> None:
    assert "auto" in launch(replace(GPU, tags={"llm_engine": "vllm", "precision": "fp8"}), Path("/m"), Path("/s"), SETTINGS, installation=HERE).argv


def test_nothing_secret_or_trusting_reaches_the_engine() -> None:
    plan = launch(CPU, Path("/m"), Path("/s"), SETTINGS, installation=HERE)
    assert not any("trust" in a for a in plan.argv)
    assert "secret" not in repr(plan) and "proxy" not in repr(plan) and "secret" not in repr(SETTINGS)


def test_nim_max_model_len_wins_over_the_profile_and_served_names_are_all_passed() -> None:
    settings = from_environment({**ENV, "NIM_MAX_MODEL_LEN": "256", "NIM_SERVED_MODEL_NAME": "one, two"}, "acme/tiny")
    line = " ".join(launch(replace(CPU, options={"max_model_len": "512"}), Path("/m"), Path("/s"), settings, installation=HERE).argv)
    assert "--max-model-len 256" in line and "--served-model-name one two --uds" in line


@pytest.mark.parametrize("options", [{"task": "--x"}, {"dtype": "auto --trust-remote-code"}, {"max_model_len": "-1"}, {"max_model_len": "٣"}])
def test_options_outside_the_known_words_are_refused(options: dict[str, str]) -> None:
    with pytest.raises(Invalid):
        launch(replace(CPU, options=options), Path("/m"), Path("/s"), SETTINGS, installation=HERE)


def test_a_socket_path_that_linux_cannot_bind_is_refused() -> None:
    with pytest.raises(Invalid, match="too long"):
        launch(CPU, Path("/m"), Path("/" + "s" * 120), SETTINGS, installation=HERE)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("NIM_SERVED_MODEL_NAME", "--trust-remote-code"),
        ("NIM_HTTP_API_PORT", "0"),
        ("NIM_HTTP_API_PORT", "٣"),
        ("NIM_MAX_MODEL_LEN", "-5"),
        ("NIM_KVCACHE_PERCENT", "nan"),
        ("NIM_LOG_LEVEL", "LOUD"),
    ],
)
def test_settings_that_make_no_sense_name_the_variable(name: str, value: str) -> None:
    with pytest.raises(Invalid, match=name):
        from_environment({name: value}, "acme/tiny")


def test_the_engine_environment_is_checked_before_anything_heavy(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="AIRLOCK_ENGINE_VLLM is not set"):
        find(SETTINGS)
    settings = replace(SETTINGS, engine_vllm=tmp_path)
    with pytest.raises(NotFound, match="no vLLM at"):
        find(settings)
    program = tmp_path / "bin" / "vllm"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\n")
    program.chmod(0o644)
    with pytest.raises(NotFound, match="not executable"):
        find(settings)
    program.chmod(0o755)
    assert find(settings) == Installation(program)
