"""NIM model manifests: the three published shapes, URIs of every scheme, names of profiles, and where a refusal points."""

from __future__ import annotations

import json
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from artifact.errors import Invalid, NotFound, Unsupported
from artifact.nim import NimFile, NimUri, parse, parse_uri
from tests.contracts.nim_images import SHAPE0, SHAPE1, SHAPE2

QWEN = "ngc://nim/qwen/qwen-2.5-7b-instruct"
LLAMA70 = "ngc://nim/meta/llama3-70b-instruct"


def test_the_wrapped_legacy_shape() -> None:
    found = parse(SHAPE0)
    assert (found.shape, [p.id for p in found.profiles]) == (0, ["MolMIM", "0a1b"])
    assert found.profiles[0].files == (NimFile("ngc://nim/nvidia/molmim:1.3", "models"),), "all of that version"
    assert found.profiles[1].tags == {"backend": "onnx", "precision": "fp16", "batch": "8", "fast": "true"}, "every value is text"
    assert [str(u) for u in found.profiles[0].places()] == ["ngc://nim/nvidia/molmim:1.3"]
    assert found.find("MolMIM").id == "MolMIM" and found.find("onnx-fp16").id == "0a1b"


def test_the_map_of_profiles() -> None:
    found = parse(SHAPE1)
    engine, regex = found.profiles
    assert found.shape == 1 and engine.id.startswith("03fdb4d1") and engine.tags["tp"] == "8"
    assert engine.files == (
        NimFile(f"{LLAMA70}?file=LICENSE.txt", "trtllm_engine/LICENSE.txt"),
        NimFile(f"{LLAMA70}?file=config.json", "trtllm_engine/config.json"),
        NimFile(f"{LLAMA70}:hf?file=config.json", "config.json"),
    )
    assert regex.tags["product_name_regex"] == "^NVIDIA-A10(?!0).*" and regex.files == ()
    assert regex.description == "tensorrt-NVIDIA-A10G_10.0.1_12-fp16"


def test_the_list_of_profiles() -> None:
    found = parse(SHAPE2)
    assert (found.shape, [p.id for p in found.profiles]) == (2, ["ee0d01aa", "1d7b60aa", "c84b2a0a"])
    license_, engine = found.profiles[0].files
    assert license_ == NimFile(f"{QWEN}:hf-bb46c15-jet?file=LICENSE", "LICENSE")
    assert (engine.path, parse_uri(engine.uri).file) == ("trtllm_engine/rank0.engine", "rank0.engine"), "the two names differ"
    assert engine.checksums == {"blake3": "0" * 62 + "ff"}
    assert [u.version for u in found.profiles[0].places()] == ["hf-bb46c15-jet", "a100x1-throughput-precision.bf16-udrspesh5q"]
    assert found.profiles[2].files == ()


def test_json_says_what_yaml_says_and_needs_no_yaml(monkeypatch: pytest.MonkeyPatch) -> None:
    doc = {"schema_version": 2.0, "profiles": [{"id": "a", "tags": {"tp": 1, "lora": True, "x": None}, "workspace": {"files": {}}}]}
    as_yaml = b"schema_version: 2.0\nprofiles:\n- id: a\n  tags: {tp: 1, lora: true, x: null}\n  workspace: {files: {}}\n"
    assert parse(json.dumps(doc).encode()) == parse(as_yaml)
    monkeypatch.setitem(sys.modules, "yaml", None)
    assert parse(json.dumps(doc).encode()).profiles[0].tags == {"tp": "1", "lora": "true", "x": ""}
    with pytest.raises(Unsupported, match=r"airlock\[mirror\]"):
        parse(as_yaml)


def test_both_of_yamls_parsers_read_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    import yaml

    odd = b"a: {tags: {x: ~, y: 'null', z: 'a b', n: 1.0, e: '', t: !name 'q'}}\n"
    fast = [parse(raw) for raw in (SHAPE0, SHAPE1, SHAPE2, odd)]
    assert fast[3].profiles[0].tags == {"x": "", "y": "null", "z": "a b", "n": "1.0", "e": "", "t": "q"}
    monkeypatch.delattr(yaml, "CSafeLoader", raising=False)
    assert [parse(raw) for raw in (SHAPE0, SHAPE1, SHAPE2, odd)] == fast


def test_aliases_stand_for_what_they_name() -> None:
    """PyYAML writes them wherever one object is used twice."""
    found = parse(
        b"schema_version: '2'\nprofiles:\n- {id: a, workspace: {files: &f {x: {uri: 'ngc://a/b:1?file=x'}}}}\n- {id: b, workspace: {files: *f}}\n"
    )
    assert found.profiles[0].files == found.profiles[1].files != ()


@pytest.mark.parametrize(
    ("text", "fields", "repository"),
    [
        (
            "ngc://nim/meta/llama3-8b-instruct:hf?file=config.json",
            ("nim", "meta", "llama3-8b-instruct", "hf", "config.json"),
            "ngc/nim/meta/llama3-8b-instruct",
        ),
        ("ngc://nim/Params:1?file=a/b.bin", ("nim", "", "Params", "1", "a/b.bin"), "ngc/nim/params"),
        ("ngc://nim/nvidia/m:hf-e9f8eff-nim1.5+?file=x", ("nim", "nvidia", "m", "hf-e9f8eff-nim1.5+", "x"), "ngc/nim/nvidia/m"),
        ("ngc://nim/meta/m", ("nim", "meta", "m", "", ""), "ngc/nim/meta/m"),
        ("ngc://nim/meta/m/1.0", ("nim", "meta", "m", "1.0", ""), "ngc/nim/meta/m"),
        ("ngc://nim/meta/models/m/1.0", ("nim", "meta", "m", "1.0", ""), "ngc/nim/meta/m"),
        ("ngc://nim/meta/m:1?file=a%20b?c=d", ("nim", "meta", "m", "1", "a%20b?c=d"), "ngc/nim/meta/m"),
        (
            "hf://meta-llama/Llama-3.1-8B:main?file=config.json",
            ("meta-llama", "", "Llama-3.1-8B", "main", "config.json"),
            "hf/meta-llama/llama-3.1-8b",
        ),
        ("hf://gpt2:refs/pr/1", ("", "", "gpt2", "refs/pr/1", ""), "hf/gpt2"),
        ("s3://bucket/a/b", ("bucket", "", "", "", "a/b"), None),
        ("gs://bucket/a", ("bucket", "", "", "", "a"), None),
        ("modelscope://org/m:v1?file=x", ("org", "", "m", "v1", "x"), None),
        ("local:///opt/nim/x", ("", "", "", "", "opt/nim/x"), None),
    ],
)
def test_uris(text: str, fields: tuple[str, ...], repository: str | None) -> None:
    found = parse_uri(text)
    assert (found.org, found.team, found.model, found.version, found.file) == fields and found.scheme == text.split(":")[0]
    if repository:
        assert found.repository == repository
    else:
        with pytest.raises(Unsupported):
            found.repository  # noqa: B018 - the property raises


BAD_URIS = [
    "",
    "x",
    "ngc:/a/b:1",
    "file:///etc/passwd",
    "http://a/b",
    "ngc://a:1",
    "ngc://a/b/c/d/e/f",
    "ngc://a/../b:1",
    "ngc://a//b:1",
    "ngc://a/b:",
]
BAD_URIS = [u for u in BAD_URIS if u != "ngc://a/b:"] + [
    "ngc://a/b:..",
    "ngc://a/b:1/../2",
    "ngc://a/b:1?x=y",
    "ngc://a/b:1?file=",
    "ngc://a/b:1?file=/x",
]
BAD_URIS += [
    "ngc://a/b:1?file=x/../../y",
    "ngc://a/b:1?file=a\\b",
    "ngc://a/b:1?file=a\nb",
    "ngc://a/b\n:1",
    "hf://a/b/c:1",
    "s3:///key",
    "s3://b/../k",
]
BAD_URIS += ["local://../x", "ngc://a/b:\x001", "ngc://a@b/c:1", "ngc://a/b:1#x?file=..", "ngc://a/b?version=1"]


@pytest.mark.parametrize("text", BAD_URIS)
def test_what_is_no_uri(text: str) -> None:
    with pytest.raises(Invalid) as error:
        parse_uri(text)
    assert str(error.value).isprintable()


PART = st.from_regex(r"[A-Za-z0-9_.\-]{1,12}", fullmatch=True).filter(lambda t: t.strip("."))
FILE = st.lists(
    st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs"), exclude_characters="/\\"), min_size=1, max_size=8), min_size=1, max_size=3
)


@pytest.mark.slow
@given(PART, st.one_of(st.just(""), PART), PART, PART, FILE)
def test_a_uri_goes_round(org: str, team: str, model: str, version: str, file: list[str]) -> None:
    made = NimUri("ngc", org, team, model, version, "/".join(file))
    if any(part in (".", "..") or part.casefold() == ".git" for part in file):
        with pytest.raises(Invalid):
            parse_uri(str(made))
    else:
        assert parse_uri(str(made)) == made


@pytest.mark.parametrize(
    "name",
    ["ee0d01aa", "tensorrt_llm-a100-bf16-tp1-throughput", "trtllm-a100-bf16-tp1-pp1-throughput", "tensorrt_llm-a100-bf16-tp1-throughput-20b2:10de-1"],
)
def test_a_profile_by_its_id_or_either_spelling(name: str) -> None:
    assert parse(SHAPE2).find(name).id == "ee0d01aa"


@pytest.mark.parametrize("name", ["auto", "", "ee0d", "EE0D01AA", "vllm-bf16-tp44"])
def test_a_name_that_no_profile_has(name: str) -> None:
    with pytest.raises(NotFound, match="vllm-bf16-tp4") as error:
        parse(SHAPE2).find(name)
    assert "ee0d01aa" in str(error.value)


def test_a_description_that_two_have() -> None:
    twice = json.dumps({"schema_version": "2", "profiles": [{"id": i, "tags": {"llm_engine": "vllm", "tp": "1"}} for i in "ab"]}).encode()
    with pytest.raises(Invalid, match=r"a \(vllm-tp1\); b \(vllm-tp1\)"):
        parse(twice).find("vllm-tp1")


@pytest.mark.parametrize(
    ("raw", "place"),
    [
        (b"a: {}\na: {}\n", "line 2"),
        (b"a:\n  tags: {tp: [1]}\n", "a.tags.tp"),
        (b"schema_version: '2'\nprofiles:\n- {id: x}\n- {tags: {}, workspace: {}}\n", r"profiles\[1\]"),
        (b"p1: {workspace: {files: {'../x': {uri: 'ngc://a/b:1'}}}}\n", r"p1.workspace.files...\/x"),
        (b"p1: {workspace: {components: [{dst: '', src: {repo_id: a/b:1, files: [x, '../y']}}]}}\n", r"components\[0\].src.files\[1\]"),
        (b"p1: {workspace: {files: {x: {uri: 'ftp://a'}}}}\n", "p1.workspace.files.x"),
    ],
)
def test_a_refusal_names_the_place(raw: bytes, place: str) -> None:
    with pytest.raises(Invalid, match=place):
        parse(raw)


def test_a_profile_that_does_not_say_where_a_file_comes_from() -> None:
    found = parse(b"p: {workspace: {components: [{dst: x, src: {files: [y]}}]}}\n").profiles[0]
    assert found.files == (NimFile("", "x/y"),)
    with pytest.raises(Invalid, match="x/y"):
        found.places()
