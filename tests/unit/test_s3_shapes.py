"""Keys of the S3 face and the walk that cuts a listing into pages, against a plain sorted list."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from artifact.errors import AirlockError, NotFound
from registry.s3_shapes import Asked, Encoded, Entry, Node, Plain, Wanted, behind, page, place, refusal, text, token_of

KEYS = ["a/b/1", "a/b/2", "a/b-c/1", "a/b.c/x/y", "a", "b/", "b/1", "b0", "c/d/e/f", "c/d/e/g", "c/d0", "zz", "\u00fc/1", "\U0001f600"]


def tree(keys: list[str], depth: int = 2) -> list[Node]:
    """The keys as nested subtrees, cut behind their slashes."""
    out: dict[str, list[str]] = {}
    leaves: list[Node] = []
    for key in keys:
        parts = key.split("/")
        if depth and len(parts) > 3 - depth:
            out.setdefault("/".join(parts[: 3 - depth]) + "/", []).append(key)
        else:
            leaves.append((key, Entry("", 0, 0.0)))
    nested: list[Node] = [(start, lambda below=below: tree(below, depth - 1)) for start, below in out.items()]  # type: ignore[misc]
    return sorted(leaves + nested, key=lambda node: node[0])


def plain(keys: list[str], asked: Asked) -> list[str]:
    """What a listing holds, by the rules of S3 alone."""
    found: list[str] = []
    for key in sorted(keys):
        if not key.startswith(asked.prefix) or key <= asked.after:
            continue
        rest = key[len(asked.prefix) :]
        told = asked.prefix + rest.partition(asked.delimiter)[0] + asked.delimiter if asked.delimiter and asked.delimiter in rest else key
        if told not in found and told != asked.after:
            found.append(told)
    return found


@pytest.mark.slow
@given(
    st.sampled_from(["", "a", "a/", "a/b", "c/d/", "x", "\u00fc"]),
    st.sampled_from(["", "/", "/b", "-"]),
    st.sampled_from(["", *KEYS, "a/", "c/d/"]),
    st.integers(1, 5),
)
def test_pages_are_those_of_the_plain_list(prefix: str, delimiter: str, after: str, most: int) -> None:
    asked, out = Asked(prefix, delimiter, after, most), []
    for _ in range(50):
        found = page(tree(KEYS), asked)
        assert found.count <= most
        out += sorted([*(key for key, _ in found.keys), *found.groups])
        if not found.more:
            break
        asked = Asked(prefix, delimiter, behind(token_of(found.more)), most)
    assert out == plain(KEYS, Asked(prefix, delimiter, after))


def test_subtrees_that_are_not_asked_for_are_never_opened() -> None:
    def never() -> list[Node]:
        raise AssertionError("opened")

    nodes: list[Node] = [("a/", never), ("b/", lambda: [("b/1", Entry("", 0, 0.0))]), ("c/", never)]
    assert [key for key, _ in page(nodes, Asked("b/")).keys] == ["b/1"]
    assert page(nodes, Asked("", "/")).groups == ["a/", "b/", "c/"]
    assert [key for key, _ in page(nodes[:2], Asked("", "", "a0", 1)).keys] == ["b/1"], "behind a/"


NAMES = st.sampled_from(["ngc/nim/meta/llama", "acme/vision/demo", "ngc/nim/params"])
REFS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=12).filter(lambda ref: "?file=" not in ref)


@pytest.mark.slow
@given(NAMES, REFS, st.lists(st.text("ab%+ \u00fc?=:&.", min_size=1, max_size=8).filter(lambda p: p not in (".", "..")), min_size=1, max_size=3))
def test_keys_name_what_they_were_made_of(name: str, ref: str, parts: list[str]) -> None:
    path = "/".join(parts)
    for keys in (Encoded(), Plain()):
        if isinstance(keys, Encoded) and ref.endswith(tuple("?file="[:n] for n in range(1, 7))):
            continue
        key = keys.start(name, "") + keys.version(ref) + keys.path(path)
        found = keys.wanted(key)
        assert name in found.names and (found.ref, found.path) == (ref, path)


def test_the_documented_key() -> None:
    keys = Encoded()
    wanted = Wanted(("nim/meta/llama3-8b-instruct", "ngc/nim/meta/llama3-8b-instruct"), "hf", "trtllm_engine/rank0.engine")
    for key in (
        "nim%2Fmeta%2Fllama3-8b-instruct%3Ahf%3Ffile%3Dtrtllm_engine%2Frank0.engine",
        "nim/meta/llama3-8b-instruct:hf?file=trtllm_engine/rank0.engine",
        "nim%2Fmeta%2Fllama3%2D8b%2Dinstruct%3Ahf%3Ffile%3Dtrtllm%5Fengine%2Frank0%2Eengine",
    ):
        assert keys.wanted(key) == wanted
    assert keys.start("ngc/nim/meta/llama3-8b-instruct", "") + keys.version("hf") == "nim%2Fmeta%2Fllama3-8b-instruct%3Ahf%3Ffile%3D"


@pytest.mark.parametrize("key", ["", "x", "a/b:c", "a/b:?file=x", "a/b:c?file=", "a/b:c/../x?file=../x", "A B:c/x?file=x", "%ff/b:c?file=x\0"])
def test_keys_that_name_nothing(key: str) -> None:
    for keys in (Encoded(), Plain()):
        with pytest.raises(NotFound):
            keys.wanted(key)


@pytest.mark.parametrize(
    ("path", "host", "domain", "wanted"),
    [
        (b"/b/k/l", "s3.test:9000", "s3.test", ("b", "k/l")),
        (b"/k/l", "b.s3.test:9000", "s3.test", ("b", "k/l")),
        (b"/k", "B.S3.Test.", "s3.test", ("b", "k")),
        (b"/k", "a.b.s3.test", "s3.test", ("a.b", "k")),
        (b"/b/k%252Fl", "127.0.0.1", "s3.test", ("b", "k%2Fl")),
        (b"/b", "[::1]:9000", "", ("b", "")),
        (b"/", "xs3.test", "s3.test", ("", "")),
        (b"", "", "", ("", "")),
    ],
)
def test_where_a_bucket_stands(path: bytes, host: str, domain: str, wanted: tuple[str, str]) -> None:
    assert place(path, host, domain) == wanted


def test_xml_holds_anything() -> None:
    rng = random.Random(1)
    for _ in range(200):
        words = "".join(chr(rng.choice([rng.randrange(0x20), rng.randrange(0xD800, 0xE000), rng.randrange(0x110000)])) for _ in range(20))
        refusal("NoSuchKey", words, [("Resource", words)]).decode()
    assert text("<a&\0>") == "&lt;a&amp;\ufffd&gt;"
    with pytest.raises(AirlockError):
        behind("!")
