"""Clients that were written for NIMs, unmodified, against the front over a real vLLM: LangChain's NVIDIA endpoints and LlamaIndex's connectors."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT
from tests.flows.serving import minilm, run_there, served
from tests.flows.test_engine_serving import ANSWER, FLAGS, QUESTION, TIGHT
from tests.services.clients import client

pytestmark = [pytest.mark.full, pytest.mark.engine, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def bases(engine_env: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """The base URLs of a chat and of an embedding model."""
    chat, embed = tmp_path_factory.mktemp("chat"), tmp_path_factory.mktemp("embed")
    run_there(engine_env, "train_llama.py", "--question", QUESTION, "--answer", ANSWER, "--out", str(chat / "model"))
    with (
        served(engine_env, chat, chat / "model", *FLAGS, *TIGHT) as one,
        served(engine_env, embed, minilm(), "--runner", "pooling", "--convert", "embed", "--dtype", "float32") as two,
    ):
        yield one + "/v1", two + "/v1"


def _drive(name: str, script: str, bases: tuple[str, str], folder: Path) -> dict[str, Any]:
    env = {"PATH": os.environ["PATH"], "HOME": str(folder), "NO_PROXY": "*"}
    argv = [str(client(name)), str(ROOT / "tests" / "fakes" / script), *bases, QUESTION]
    done = subprocess.run(argv, capture_output=True, text=True, env=env, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert isinstance(found, dict)
    return found


def _check(found: dict[str, Any]) -> None:
    assert found["answer"] == found["stream"] == ANSWER
    assert found["documents"] == [384] * 3 and any(found["query"])
    assert found["ranked"][0] == "The cat sleeps on the sofa." and len(found["ranked"]) == 2


def test_langchain(bases: tuple[str, str], tmp_path: Path) -> None:
    found = _drive("langchain-nvidia", "langchain_driver.py", bases, tmp_path)
    _check(found)
    assert found["models"] == ["acme/tiny"] and isinstance(found["structured"]["far"], bool) and "404" in found["unknown"]


def test_llamaindex(bases: tuple[str, str], tmp_path: Path) -> None:
    _check(_drive("llama-index-nvidia", "llamaindex_driver.py", bases, tmp_path))
