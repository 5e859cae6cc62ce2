"""Names, references, manifests and model revisions: the grammars of docs/format.md against good and hostile input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from artifact.errors import AirlockError, Invalid, TooLarge
from artifact.manifest import (
    EMPTY_BYTES,
    EMPTY_DIGEST,
    FACTS_TYPE,
    INDEX,
    MANIFEST,
    MAX_FILES,
    MODEL_TYPE,
    build_manifest,
    build_model,
    canonical_json,
    check_name,
    check_path,
    check_ref,
    content_kind,
    derived_commit,
    digest_of,
    files_of,
    files_root,
    parse_json,
    parse_manifest,
    parse_reference,
)
from artifact.store import Descriptor, File

D = "sha256:" + "1" * 64
FACTS = Descriptor(FACTS_TYPE, "sha256:" + "2" * 64, 10)


@pytest.mark.parametrize("name", ["a", "acme/tiny", "hf/a/b.c_d__e--f", "127.0.0.1_5000/lib/app", "nvcr.io/nim/meta/x", "a" * 255])
def test_names(name: str) -> None:
    assert check_name(name) == name


@pytest.mark.parametrize(
    "name",
    [
        "",
        "A",
        "a/",
        "/a",
        "a//b",
        "a/../b",
        "a b",
        "a:b",
        "_a",
        "a_",
        "a___b",
        "a..b",
        "a\n",
        "é",
        "a" * 256,
        "v2",
        "v2/x",
        "api/x",
        "airlock",
        "token/x",
        "a/-b",
    ],
)
def test_names_refused(name: str) -> None:
    with pytest.raises(Invalid):
        check_name(name)


@pytest.mark.parametrize(
    ("ref", "good"), [("main", True), ("refs/pr/1", True), ("é" * 127, True), ("é" * 128, False), ("", False), ("a\x00", False), ("\ud800", False)]
)
def test_refs(ref: str, good: bool) -> None:
    if good:
        assert check_ref(ref) == ref
    else:
        with pytest.raises(Invalid):
            check_ref(ref)


@pytest.mark.parametrize(
    "path", ["", "/a", "a/", "a//b", ".", "..", "a/../b", "./a", ".git", "a/.GIT/b", "a\\b", "a\nb", "a\x7f", "\ud800", "x" * 1025, "é" * 513]
)
def test_paths_refused(path: str) -> None:
    with pytest.raises(Invalid):
        check_path(path)


@pytest.mark.parametrize("path", ["a", "a/b.c", ".gitattributes", "a b", "é", "x" * 1024, "...", "a..b"])
def test_paths(path: str) -> None:
    assert check_path(path) == path


def test_references() -> None:
    assert str(parse_reference("acme/tiny:1")) == "acme/tiny:1"
    assert str(parse_reference("acme/tiny")) == "acme/tiny:latest"
    assert str(parse_reference(f"acme/tiny@{D}")) == f"acme/tiny@{D}"
    for bad in ("acme/tiny@x", "acme/tiny:", ":1", "acme:1/tiny", "acme/tiny@" + D + ":x"):
        with pytest.raises(Invalid):
            parse_reference(bad)


@given(
    st.recursive(st.none() | st.booleans() | st.integers() | st.text(), lambda c: st.lists(c, max_size=3) | st.dictionaries(st.text(), c, max_size=3))
)
def test_canonical_json_is_stable(value: object) -> None:
    try:
        raw = canonical_json(value)
    except UnicodeEncodeError:
        return  # lone surrogates have no UTF-8
    assert canonical_json(json.loads(raw)) == raw


@pytest.mark.parametrize(
    "raw", [b"", b"[]", b"1", b'{"a":1,"a":2}', b'{"a":NaN}', b"\xef\xbb\xbf{}", b"\xff", b"{" * 600, b'{"a":' * 600 + b"1" + b"}" * 600, b"{}x"]
)
def test_hostile_json(raw: bytes) -> None:
    with pytest.raises(Invalid):
        parse_json(raw, "it")


def test_json_has_a_limit() -> None:
    with pytest.raises(TooLarge):
        parse_json(b" " * 101, "it", 100)


@given(st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
def test_no_bytes_make_a_traceback(raw: bytes) -> None:
    try:
        parse_manifest(raw)
    except AirlockError:
        return


LAYER = {"mediaType": "x/y", "digest": D, "size": 1}
GOOD = {"schemaVersion": 2, "mediaType": MANIFEST, "config": LAYER, "layers": [LAYER]}


@pytest.mark.parametrize(
    "change",
    [
        {"schemaVersion": 1},
        {"schemaVersion": "2"},
        {"mediaType": "text/html"},
        {"mediaType": 7},
        {"manifests": []},
        {"mediaType": INDEX},
        {"layers": {}},
        {"layers": [7]},
        {"layers": [{**LAYER, "size": -1}]},
        {"layers": [{**LAYER, "size": True}]},
        {"layers": [{**LAYER, "size": 1.0}]},
        {"layers": [{**LAYER, "digest": "sha256:../x"}]},
        {"layers": [{**LAYER, "digest": D.upper()}]},
        {"layers": [{**LAYER, "annotations": {"a": 1}}]},
        {"config": None},
        {"subject": 7},
        {"annotations": [1]},
        {"annotations": {"a": {}}},
        {"artifactType": ["x"]},
    ],
)
def test_manifests_refused(change: dict[str, object]) -> None:
    parse_manifest(json.dumps(GOOD).encode())
    with pytest.raises(Invalid):
        parse_manifest(json.dumps({**GOOD, **change}).encode())


def test_an_index_and_its_edges() -> None:
    child = {"mediaType": MANIFEST, "digest": D, "size": 1}
    found = parse_manifest(json.dumps({"schemaVersion": 2, "mediaType": INDEX, "manifests": [child], "subject": child}).encode())
    assert ([d.digest for d in found.manifests], found.own()) == ([D], ())
    assert found.subject is not None
    assert found.blobs() == ()
    foreign = {**LAYER, "mediaType": "application/vnd.oci.image.layer.nondistributable.v1.tar"}
    assert len(parse_manifest(json.dumps({**GOOD, "layers": [foreign]}).encode()).blobs()) == 1


def model(*files: File) -> bytes:
    return build_model(files, FACTS, {"dev.airlock.source": "push://acme/tiny"})


def test_a_model_is_a_pure_function_of_its_files() -> None:
    files = [File("b.txt", D, 2), File("a/model.safetensors", D, 3, lfs=True), File("é.json", D, 1), File("B", D, 1)]
    raw = model(*files)
    assert raw == model(*reversed(files))
    found = parse_manifest(raw)
    assert (found.artifact_type, found.media_type, found.digest) == (MODEL_TYPE, MANIFEST, digest_of(raw))
    assert found.config is not None
    assert (found.config.digest, found.config.digest) == (EMPTY_DIGEST, digest_of(EMPTY_BYTES))
    assert [f.path for f in files_of(found)] == ["B", "a/model.safetensors", "b.txt", "é.json"]
    assert [f.lfs for f in files_of(found)] == [False, True, False, False]
    assert found.layers[-1].media_type == FACTS_TYPE


def test_limits_and_clashes_of_a_model() -> None:
    with pytest.raises(TooLarge):
        model(*(File(f"f{i}", D, 1) for i in range(MAX_FILES + 1)))
    with pytest.raises(Invalid):
        model(File("a", D, 1), File("A", D, 1))
    with pytest.raises(Invalid):
        model(File("../a", D, 1))
    with pytest.raises(TooLarge):
        build_manifest("x/y", [], {"a": "x" * (4 * 1024 * 1024)})
    hostile = {**GOOD, "layers": [{**LAYER, "annotations": {"org.cncf.model.filepath": "../../etc/passwd"}}]}
    with pytest.raises(Invalid):
        files_of(parse_manifest(json.dumps(hostile).encode()))


def test_a_layer_has_one_path() -> None:
    def read(**notes: str) -> list[str]:
        names = {"title": "org.opencontainers.image.title", "path": "org.cncf.model.filepath"}
        layer = {**LAYER, "annotations": {names[k]: v for k, v in notes.items()}}
        return [f.path for f in files_of(parse_manifest(json.dumps({**GOOD, "layers": [layer]}).encode()))]

    assert read(title="a") == read(path="a") == read(title="a", path="a") == ["a"] and read() == []
    for notes in ({"title": "a", "path": "b"}, {"title": "a", "path": ""}, {"title": "", "path": "b"}):
        with pytest.raises(Invalid):
            read(**notes)


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("model-00001-of-00002.safetensors", "weight"),
        ("a/b.GGUF", "weight"),
        ("config.json", "weight.config"),
        ("vocab.txt", "weight.config"),
        ("tokenizer.model", "weight.config"),
        ("README.md", "doc"),
        ("LICENSE", "doc"),
        ("modeling_x.py", "code"),
    ],
)
def test_kinds_of_files(path: str, kind: str) -> None:
    assert content_kind(path) == f"application/vnd.cncf.model.{kind}.v1.raw"


def test_commits_come_from_content() -> None:
    one, two = File("a", D, 1), File("b", D, 2)
    assert files_root([one, two]) == files_root([two, one])
    assert files_root([one]) != files_root([two])
    commit = derived_commit("", files_root([one]), "", "")
    assert len(commit) == 40
    assert commit != derived_commit("x", files_root([one]), "", "")


def test_the_document_names_the_limit() -> None:
    text = (Path(__file__).parents[2] / "docs" / "format.md").read_text(encoding="utf-8")
    assert "10,000 files and 4 MiB of manifest" in text
