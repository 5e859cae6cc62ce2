"""The plan says what it means or is refused with the key and the item; canonical names are injective and inside the grammar."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from artifact.errors import AirlockError, Invalid, NotFound, TooLarge
from artifact.manifest import check_name, hub_name
from mirror.plan import Models, Requires, load, parse

HERE = Path("/plans")
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def one(line: str):
    return parse("items:\n  - {" + line + "}\n", HERE).items[0]


def test_a_hub_item() -> None:
    options = 'profiles: p.yaml, allow: ["*.json", sub/], ignore: ["*.bin"], key_env: HF_TOKEN'
    item = one('source: "hf://Acme/Tiny@v1.0", endpoint: "http://127.0.0.1:1/", ' + options)

    assert (item.kind, item.repository, item.wanted, item.ref, item.name) == ("hf", "Acme/Tiny", "v1.0", "v1.0", "hf/acme/tiny")
    assert (item.base_url, item.profiles, item.allow, item.ignore) == ("http://127.0.0.1:1", HERE / "p.yaml", ("*.json", "sub/*"), ("*.bin",))


def test_what_an_item_requires() -> None:
    assert one('source: "hf://a/b"').requires == Requires()
    item = one('source: "oci://nvcr.io/nim/x:1", requires: {product: nv-ai-enterprise, tier: enterprise, license: "NVIDIA AI Product Agreement"}')
    assert item.requires == Requires("nv-ai-enterprise", "enterprise", "NVIDIA AI Product Agreement")


def test_refs_of_hub_items() -> None:
    assert (one('source: "hf://a/b"').wanted, one('source: "hf://a/b"').ref) == ("main", "main")
    pinned = one(f'source: "hf://a/b@{COMMIT}"')
    assert (pinned.wanted, pinned.ref) == (COMMIT, "main")
    assert one(f'source: "hf://a/b@{COMMIT}", ref: stable').ref == "stable"
    assert one('source: "hf://a/b@refs/pr/1"').ref == "refs/pr/1"


def test_oci_items() -> None:
    digest = "sha256:" + "a" * 64
    item = one('source: "oci://127.0.0.1:5001/acme/tiny:1", as: acme/tiny, plain_http: true, key_env: KEY')
    assert (item.base_url, item.repository, item.wanted, item.name, item.ref) == ("http://127.0.0.1:5001", "acme/tiny", "1", "acme/tiny", "1")
    item = one(f'source: "oci://127.0.0.1:5002/library/app@{digest}"')
    assert (item.base_url, item.wanted, item.name, item.ref) == ("https://127.0.0.1:5002", digest, "127.0.0.1_5002/library/app", "latest")
    item = one(f'source: "oci://nvcr.io/nim/meta/llama:1.0@{digest}"')
    assert (item.wanted, item.name, item.ref) == (digest, "nvcr.io/nim/meta/llama", "1.0")


def test_ngc_items() -> None:
    item = one('source: "ngc://Nim/meta/Llama3-8b:hf-1.0+x", allow: ["*.json"]')
    assert (item.kind, item.repository, item.wanted, item.ref) == ("ngc", "Nim/meta/Llama3-8b", "hf-1.0+x", "hf-1.0+x")
    assert (item.name, item.base_url, item.auth_url) == ("ngc/nim/meta/llama3-8b", "https://api.ngc.nvidia.com", "https://authn.nvidia.com")
    item = one('source: "ngc://acme/m:1", endpoint: "https://ngc.example/", ref: stable')
    assert (item.name, item.base_url, item.auth_url, item.ref) == ("ngc/acme/m", "https://ngc.example", "https://ngc.example", "stable")
    assert one('source: "ngc://acme/m:1", endpoint: "https://a.example", auth_endpoint: "https://b.example"').auth_url == "https://b.example"


def test_nim_items() -> None:
    item = one(
        'source: "nim://nvcr.io/nim/meta/llama3-8b-instruct:1.0.3", profiles: [vllm-bf16-tp1, "tp=2"], key_env: NGC_KEY, hub_key_env: HF_TOKEN'
    )
    assert (item.kind, item.base_url, item.repository, item.wanted) == ("nim", "https://nvcr.io", "nim/meta/llama3-8b-instruct", "1.0.3")
    assert (item.name, item.selectors, item.profiles) == ("nvcr.io/nim/meta/llama3-8b-instruct", ("vllm-bf16-tp1", "tp=2"), None)
    assert item.models == Models("https://api.ngc.nvidia.com", "https://authn.nvidia.com", "https://huggingface.co", "HF_TOKEN")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("items: []", "no items"),
        ("items: [{source: 'ngc://acme/m'}]", "names no version of an NGC model"),
        ("items: [{source: 'ngc://acme/m:versions'}]", "names no version of an NGC model"),
        ("items: [{source: 'ngc://a/b/c/d:1'}]", "names no version of an NGC model"),
        ("items: [{source: 'ngc://acme/m:1?file=x'}]", "names no version of an NGC model"),
        ("items: [{source: 'ngc://../m:1'}]", "names no version of an NGC model"),
        ("items: [{source: 'ngc://acme/profiles:1'}]", "reserved"),
        ("items: [{source: 'ngc://acme/m:1', plain_http: true}]", "unknown keys: plain_http"),
        ("items: [{source: 'ngc://acme/m:1', auth_endpoint: 'ftp://x'}]", "endpoint of item 1"),
        ("items: [{source: 'nim://nvcr.io/nim/m:1'}]", "profiles of item 1 is no list of profiles"),
        ("items: [{source: 'nim://nvcr.io/nim/m:1', profiles: p.yaml}]", "profiles of item 1 is no list of profiles"),
        ("items: [{source: 'nim://nvcr.io/nim/m:1', profiles: []}]", "profiles of item 1 is no list of profiles"),
        ("items: [{source: 'nim://nvcr.io/nim/m:1', profiles: [7]}]", "profiles of item 1 is no list of profiles"),
        ("items: [{source: 'nim://nvcr.io/nim/m:1', profiles: [all], hub_key_env: 'hf_secret.x'}]", "hub_key_env of item 1"),
        ("items: [{source: 'nim://nvcr.io/nim/m:1', profiles: [all], allow: [x]}]", "unknown keys: allow"),
        ("[1, 2]", "not a mapping"),
        ("items: [{source: 'hf://a/b', revison: x}]", "item 1 has unknown keys: revison"),
        ("items: [{source: 'hf://a/b', plain_http: true}]", "unknown keys: plain_http"),
        ("items: [{source: 'oci://h/a', endpoint: 'http://x'}]", "unknown keys: endpoint"),
        ("{items: [{source: 'hf://a/b'}], version: 2}", "the plan has unknown keys: version"),
        ("items: [{source: 'hf://a/b'}, {source: 'hf://A/B@main'}]", "items 1 and 2 would both be hf/a/b:main"),
        ("items: [{source: 's3://a/b'}]", "source of item 1"),
        ("items: [{source: 7}]", "source of item 1 is not text"),
        ("items: [{source: 'hf://a/b/c'}]", "not a Hub id"),
        ("items: [{source: 'hf://../b'}]", "not a Hub id"),
        ("items: [{source: 'hf://a/profiles'}]", "reserved"),
        ('items: [{source: "hf://a/b@x\\ny"}]', "source of item 1 is not text"),
        ("items: [{source: 'oci://user:pw@h/a'}]", "host"),
        ("items: [{source: 'oci://h/UP'}]", "not a repository name"),
        ("items: [{source: 'oci://h/a@sha256:12'}]", "not a digest"),
        ("items: [{source: 'oci://h/a:-x'}]", "not a tag"),
        ("items: [{source: 'oci://h/a', as: v2/x}]", "reserved"),
        ("items: [{source: 'oci://h/a', plain_http: 'yes'}]", "plain_http of item 1"),
        ("items: [{source: 'hf://a/b', allow: '*'}]", "allow of item 1"),
        ("items: [{source: 'hf://a/b', endpoint: 'file:///etc'}]", "endpoint of item 1"),
        ("items: [{source: 'hf://a/b', endpoint: 'http://u:secret@h'}]", "endpoint of item 1"),
        ("items: [{source: 'hf://a/b', source: 'hf://a/c'}]", "repeated"),
        ("items: [{source: 'hf://a/b', requires: gold}]", "requires of item 1 is not a mapping"),
        ("items: [{source: 'hf://a/b', requires: {teir: gold}}]", "requires of item 1 has unknown keys: teir"),
        ("items: [{source: 'hf://a/b', requires: {tier: gold}}]", "requires of item 1: the tier"),
        ("items: [{source: 'hf://a/b', requires: {tier: [enterprise]}}]", "requires of item 1: the tier"),
        ("items: [{source: 'hf://a/b', requires: {product: a b}}]", "requires of item 1: the product"),
        ("items: [{source: 'hf://a/b', requires: {product: 7}}]", "requires of item 1: the product"),
        ("items: [{source: 'hf://a/b', requires: {license: [mit]}}]", "license of requires of item 1 is not text"),
        ("items: [{source: 'hf://a/b', requires: {tier: enterprise}}, {source: 'hf://a/b@v1'}]", "items 1 and 2 require different things for hf/a/b"),
        ("a: &x [1]\nitems: *x", "aliases"),
        ("items: !!python/object/apply:os.system ['true']", "YAML"),
        ("items: [", "YAML"),
    ],
)
def test_refused_naming_the_fault(text: str, words: str) -> None:
    with pytest.raises(Invalid) as caught:
        parse(text, HERE)
    assert words in str(caught.value) or words in caught.value.expected
    assert "secret" not in str(caught.value)


def test_known_keys_are_named_and_a_key_in_key_env_is_not_repeated() -> None:
    with pytest.raises(Invalid) as caught:
        one('source: "hf://a/b", revison: x')
    assert all(key in caught.value.expected for key in ("source", "endpoint", "allow", "ignore", "profiles", "key_env", "ref"))
    with pytest.raises(Invalid) as caught:
        one('source: "hf://a/b", key_env: "nvapi-abc.def"')
    assert "nvapi" not in str(caught.value)


def test_files(tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        load(tmp_path / "none.yaml")
    (tmp_path / "big.yaml").write_bytes(b" " * 2_000_000)
    with pytest.raises(TooLarge):
        load(tmp_path / "big.yaml")
    (tmp_path / "bin.yaml").write_bytes(b"\xff\xfe")
    with pytest.raises(Invalid):
        load(tmp_path / "bin.yaml")


@pytest.mark.slow
@given(st.text(max_size=300))
def test_no_text_gives_anything_but_a_plan_or_an_expected_error(text: str) -> None:
    try:
        parse(text, HERE)
    except AirlockError as error:
        assert error.what


def test_hub_names_are_injective_and_in_the_grammar() -> None:
    assert hub_name("sentence-transformers/all-MiniLM-L6-v2") == "hf/sentence-transformers/all-minilm-l6-v2"
    assert hub_name("gpt2") == "hf/gpt2" and hub_name("a/b.c_d__e") == "hf/a/b.c_d__e"
    seen: dict[str, str] = {}
    # "5f" and "x" in the alphabet: spellings of an escape may occur in an id as well
    for letters in itertools.chain.from_iterable(itertools.product(("x", "5f", "2d", "-", ".", "_"), repeat=n) for n in range(1, 6)):
        repo = "".join(letters)
        if "--" in repo or ".." in repo:
            continue
        name = hub_name(repo)
        assert check_name(name) == name and seen.setdefault(name, repo) == repo, (name, repo, seen[name])
