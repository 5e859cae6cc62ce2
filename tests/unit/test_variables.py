"""The variables of a NIM: what settings read is what the table says, what the table refuses is refused, and the documentation is the table."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from artifact.errors import Invalid
from runtime.console import JsonLines, cache_place
from runtime.engines import names
from runtime.mounts import Mount
from runtime.settings import DEFAULT_CACHE, ENGINE_PREFIX, INHERITED, from_environment
from runtime.variables import STATES, VARIABLES, judge, known, table
from tests.conftest import ROOT

SECTION_2 = ROOT / "docs" / "nim-variables.md"


class Recording(Mapping[str, str]):
    """An environment that remembers which names were asked for."""

    def __init__(self) -> None:
        self.asked: set[str] = set()

    def __getitem__(self, name: str) -> str:
        self.asked.add(name)
        raise KeyError(name)

    def __iter__(self) -> Iterator[str]:
        return iter(())

    def __len__(self) -> int:
        return 0


def test_what_settings_read_is_what_the_table_calls_supported() -> None:
    environ = Recording()
    from_environment(environ, "acme/tiny:1")
    with pytest.raises(Invalid, match="no model is named"):
        from_environment(environ, "")
    read = environ.asked - {"FAKE_NVML_CONFIG"}  # a stand-in's, not an operator's
    supported = {name for name, row in known().items() if row.state == "supported"}
    engines = {f"{ENGINE_PREFIX}{name.upper()}" for name in names()}  # read by their beginning
    assert engines <= supported and read == supported - engines


def test_every_name_has_one_row_and_one_state() -> None:
    names = [name for row in VARIABLES for name in row.names]
    assert len(names) == len(set(names)) and {row.state for row in VARIABLES} == set(STATES)
    assert not {n for n, row in known().items() if row.state != "supported"} & INHERITED


def test_the_documentation_is_the_table() -> None:
    text = SECTION_2.read_text()
    assert table() in text, "docs/nim-variables.md: write the table again with `from runtime.variables import table; print(table())`"


@pytest.mark.parametrize("name", [n for row in VARIABLES if row.state == "refused" for n in row.names])
def test_a_refused_variable_refuses_and_says_what_to_do(name: str) -> None:
    with pytest.raises(Invalid, match=f"{name} is set") as caught:
        judge({name: "7"})
    assert caught.value.reason == "variable" and caught.value.do
    for value in known()[name].harmless:
        assert judge({name: value}) == [] == judge({name: value.capitalize()})  # a chart writes False


@pytest.mark.parametrize("name", ["NIM_GRPC_API_PORT", "NIM_HEALTH_PORT", "NGC_API_ENDPOINT", "NIM_REPOSITORY_OVERRIDE"])
def test_an_ignored_variable_is_told_with_its_reason(name: str) -> None:
    (line,) = judge({name: "x"})
    assert line == f"{name} is ignored: {known()[name].meaning}"


def test_an_unknown_one_is_told_and_what_kubernetes_adds_is_not() -> None:
    links = {
        "NIM_SERVICE_HOST": "10.0.0.1",
        "NIM_LLM_PORT_8000_TCP_ADDR": "10.0.0.1",
        "NIM_PORT": "tcp://10.0.0.1:8000",
        "NIM_SERVICE_PORT_HTTP": "8000",
    }
    assert judge(links | {"PATH": "/bin", "NIM_SERVER_PORT": "8000"}) == []
    assert "NIM_MODEL_PROFIL is not known here" in judge({"NIM_MODEL_PROFIL": "x"})[0]


@pytest.mark.parametrize(
    ("environ", "name", "ref"),
    [
        ({"AIRLOCK_MODEL": "acme/tiny:1"}, "acme/tiny", "1"),
        ({"NIM_MODEL_NAME": "ngc://nim/Meta/llama3-8b-instruct:FP8-e9f8eff"}, "ngc/nim/meta/llama3-8b-instruct", "FP8-e9f8eff"),
        ({"NIM_MODEL_PATH": "hf://Acme/Tiny:main"}, "hf/acme/tiny", "main"),
        ({"AIRLOCK_MODEL": "acme/tiny", "NIM_MODEL_NAME": "hf://a/b"}, "acme/tiny", "latest"),
        ({"NIM_FT_MODEL": "/models/My-Tuned"}, "local/my-tuned", "local"),
    ],
)
def test_the_model_is_named_as_a_nim_names_it(environ: dict[str, str], name: str, ref: str) -> None:
    found = from_environment(environ, "")
    assert (found.model, found.ref) == (name, ref)
    assert found.local == (Path("/models/My-Tuned") if "NIM_FT_MODEL" in environ else None)


@pytest.mark.parametrize("text", ["s3://bucket/x", "gs://b/x", "modelscope://a/b", "file:///etc"])
def test_a_model_outside_of_the_site_is_refused(text: str) -> None:
    with pytest.raises(Invalid, match="outside of this site"):
        from_environment({"NIM_MODEL_PATH": text}, "")


@pytest.mark.parametrize("text", ["1", "true", "yes", "x" * 301, "a\nb"])
def test_unsigned_needs_a_reason_in_words(text: str) -> None:
    with pytest.raises(Invalid, match="AIRLOCK_ALLOW_UNSIGNED"):
        from_environment({"AIRLOCK_ALLOW_UNSIGNED": text}, "acme/tiny")
    assert from_environment({"AIRLOCK_ALLOW_UNSIGNED": "bench of my own tune, J. Doe"}, "acme/tiny").unsigned.startswith("bench")


def test_selectors_are_one_filter() -> None:
    found = from_environment({"NIM_TAGS_SELECTOR": "precision=fp8, tp=2", "NIM_TENSOR_PARALLEL_SIZE": "4"}, "acme/tiny")
    assert found.selector == (("precision", "fp8"), ("tp", "4"))
    with pytest.raises(Invalid, match="NIM_TAGS_SELECTOR holds 'fp8'"):
        from_environment({"NIM_TAGS_SELECTOR": "fp8"}, "acme/tiny")


def test_the_published_run_lines_mount_is_the_cache() -> None:
    """`-v /opt/nim-cache:/opt/nim/cache` without NIM_CACHE_PATH, as the vendor's page prints it."""
    unset, named = from_environment({}, "acme/tiny"), from_environment({"NIM_CACHE_PATH": "/model-store"}, "acme/tiny")
    root, seed, usual = Mount("/", "overlay", "overlay"), Mount("/opt/nim/cache", "ext4", "/dev/sda1"), Mount(DEFAULT_CACHE, "ext4", "/dev/sda1")
    assert cache_place(unset, (root, seed)).cache == Path("/opt/nim/cache")
    assert cache_place(unset, (root, seed, usual)).cache == cache_place(unset, (root,)).cache == Path(DEFAULT_CACHE)
    assert cache_place(named, (root, seed)).cache == Path("/model-store")


def test_a_log_line_in_json_has_the_keys_of_a_nim() -> None:
    try:
        raise ValueError("boom")
    except ValueError:
        record = logging.getLogger("airlock").makeRecord("airlock", logging.ERROR, "/a/b.py", 7, 'it "broke"\n%s', ("twice",), sys.exc_info())
    line = JsonLines().format(record)
    doc = json.loads(line)
    assert "\n" not in line and list(doc) == ["level", "time", "file_path", "line_number", "message", "exc_info", "stack_info"]
    assert (doc["level"], doc["file_path"], doc["line_number"], doc["message"]) == ("ERROR", "/a/b.py", "7", 'it "broke"\ntwice')
    assert "ValueError: boom" in doc["exc_info"]
