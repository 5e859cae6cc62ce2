"""Weights of one's own: the profiles that are made of a directory are pushed, promoted, explained and served, with nothing written by hand."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import AIRLOCK, airlock, find_port, stop
from tests.flows.serving import run_there
from tests.flows.test_runtime_watch import Running, Site, pushed
from tests.operated import wait_for
from tests.unit.test_model_config import LLAMA, safetensors

pytestmark = [pytest.mark.server, pytest.mark.timeout(600)]

AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "modules_to_not_convert": ["lm_head", "model.layers.0.mlp.gate"]}


@pytest.fixture
def site(tmp_path: Path, start_registry: Any) -> Site:
    """A site, and a node to run its models on."""
    return pushed(tmp_path, start_registry(), "90d")


def _publish(site: Site, model: Path, ref: str, *flags: str) -> None:
    """Profile make, push and promote, as docs/operations.md has them."""
    profiles = site.folder / "made.json"
    profiles.write_text(airlock("profile", "make", str(model), *flags).stdout)
    airlock("model", "push", str(model), ref, "--registry", site.server.url, "--profiles", str(profiles), AIRLOCK_KEY=site.key)
    airlock("promote", ref, "--data", str(site.server.data))


def test_what_is_estimated_of_a_directory_is_what_a_node_estimates_of_its_promoted_profile(site: Site) -> None:
    model = site.folder / "awq"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(LLAMA | {"quantization_config": AWQ}))
    (model / "model.safetensors").write_bytes(safetensors({"w": ("I32", [2, 4096], 32768), "lm_head": ("F16", [4096], 8192)}))
    told = json.loads(airlock("profile", "make", str(model), "--gpu", "l40s", "--tp", "2", "--json").stdout)["estimates"]
    _publish(site, model, "acme/awq:1", "--tp", "2")
    argv = ("runtime", "explain", "--model", "acme/awq:1", "--hardware", "l40sx2", "--json")
    (row,) = json.loads(airlock(*argv, **site.env()).stdout)["profiles"]
    assert row["tags"]["precision"] == "int4" and row["rank"] == 1
    assert [(e["needed"], e["weights"], e["kv_cache"], e["usable"]) for e in told] == [
        tuple(row["memory"][word] for word in ("needed", "weights", "kv_cache", "usable"))
    ]
    assert row["memory"]["weights"] >= 40960 // 2
    fetched = site.folder / "fetched"
    store = ("runtime", "create-model-store", "--model", "acme/awq:1", "--model-store", str(fetched), "-p", row["profile_id"])
    airlock(*store, **site.env())
    kept = json.loads((fetched / "config.json").read_text())["quantization_config"]
    assert kept == AWQ  # the layers that it leaves out reach the engine as the checkpoint spells them


@pytest.mark.full
@pytest.mark.engine
def test_a_made_profile_is_served_by_a_real_engine(site: Site, engine_env: Path) -> None:
    question, answer = "What is the code word of this run?", f"The code word of this run is {secrets.token_hex(4)}."
    model = site.folder / "trained"
    run_there(engine_env, "train_llama.py", "--question", question, "--answer", answer, "--out", str(model))
    _publish(site, model, "acme/own:1", "--cpu", "--tp", "1")
    shutil.rmtree(model)  # what answers came from the registry
    env = site.env(AIRLOCK_ENGINE_VLLM=str(engine_env), VLLM_CPU_KVCACHE_SPACE="1")
    log, port = site.folder / "own.log", find_port()
    with log.open("wb") as out:
        argv = [str(AIRLOCK), "runtime", "serve", "--model", "acme/own:1", "--port", str(port)]
        process = subprocess.Popen(argv, stdout=out, stderr=out, env={**os.environ, **env})
    running = Running(process, port, log)

    def ready() -> bool:
        assert process.poll() is None, log.read_text()[-4000:]
        with contextlib.suppress(OSError):
            return running.ask("GET", "/v1/health/ready")[0] == 200
        return False

    try:
        wait_for(ready, "the engine", 300)
        asked = {"model": "acme/own", "messages": [{"role": "user", "content": question}], "temperature": 0}
        status, found, _ = running.ask("POST", "/v1/chat/completions", asked)
        assert status == 200 and found["choices"][0]["message"]["content"] == answer, found
        told = json.loads(running.ask("GET", "/v1/manifest")[1]["manifest_file"])["profiles"]
        chosen = running.ask("GET", "/v1/metadata")[1]["profile_id"]
        assert len(told) == 2 and [p["tags"].get("device") for p in told if p["id"] == chosen] == ["cpu"]
    finally:
        assert stop(process, 60) == 0, log.read_text()[-4000:]
