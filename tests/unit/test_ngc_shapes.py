"""Names, pages, orders and queries of the NGC API, as values."""

from __future__ import annotations

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from artifact.errors import AirlockError, Invalid, NotFound
from artifact.manifest import is_name, ngc_name
from registry import ngc_shapes as s
from registry.routes import route

PART = st.text("ab0x2d5f-_.", min_size=1, max_size=8)


@given(st.lists(PART, min_size=2, max_size=3), st.lists(PART, min_size=2, max_size=3))
def test_two_ngc_names_are_never_one(one: list[str], other: list[str]) -> None:
    assert is_name(ngc_name(*one))
    assert (ngc_name(*one) == ngc_name(*other)) == (one == other)


def test_short_names_are_never_one() -> None:
    names = ["".join(chars) for n in (1, 2, 3, 4) for chars in itertools.product("ax-_.", repeat=n)]
    assert len({ngc_name("o", name) for name in names}) == len(names)


@pytest.mark.parametrize("parts", [["a"], ["a", "b", "c", "d"], ["a", ""], ["a", "b/c"], ["a", "\u00fc"], ["a", "b" * 129], ["a", "b\n"]])
def test_what_is_no_ngc_name(parts: list[str]) -> None:
    with pytest.raises(Invalid):
        ngc_name(*parts)


def test_names_in_the_order_in_which_they_are_tried() -> None:
    assert s.model_names(["NIM", "meta", "Llama"]) == ["nim/meta/llama", "ngc/nim/meta/llama"]
    assert s.model_names(["nim", "a.-b"]) == ["ngc/nim/a--x2e2d-b"], "what the grammar refuses has an escape only"
    assert s.image_names(["nim", "app"]) == ["nim/app", "nvcr.io/nim/app"]
    assert s.model_names(["v2", "x"]) == ["ngc/v2/x"]
    for parts in (["a", "b/c"], ["a", ""], ["", "b"], ["\u00fc", "b"], ["..", "b/../c"]):
        with pytest.raises(NotFound):
            s.model_names(parts)


def test_the_name_that_a_client_knows() -> None:
    assert s.split_name("ngc/nim/meta/m") == ("nim", "meta", "m") and s.split_name("nvcr.io/nim/m") == ("nim", "", "m")
    assert s.split_name("hf/acme/m") == ("hf", "acme", "m") and s.split_name("acme/a/b/c") is None and s.split_name("m") is None


def test_pages() -> None:
    items: list[s.Json] = [{"n": n} for n in range(5)]
    assert [len(s.page_of(items, index, 2)[0]) for index in range(4)] == [2, 2, 1, 0]
    assert s.page_of(items, 1, 5) == (items, {"index": 0, "size": 5, "totalPages": 1, "totalResults": 5})
    assert s.page_of([], 0, 100)[1]["totalPages"] == 1 and s.page_of(items, 0, 0)[1]["size"] == 1
    assert list(s.page_of(items, 10**9, 2)[0]) == []


def test_versions_by_their_numbers() -> None:
    given = ["1.9", "1.10", "1.10-rc1", "2", "hf", "1.10.1", "fp16-7af2b653", ""]
    assert [v["ref"] for v in s.newest_first([{"ref": ref} for ref in given])] == [
        "2",
        "1.10.1",
        "1.10",
        "1.10-rc1",
        "1.9",
        "hf",
        "fp16-7af2b653",
        "",
    ]


@pytest.mark.parametrize(
    ("path", "query"),
    [
        ("/nim%2Fmeta%2Fm%3Ahf%3Ffile%3Dd%2Fc.json", ""),
        ("/nim%252Fmeta%252Fm%253Ahf%253Ffile%253Dd%252Fc.json", ""),
        ("/nim/meta/m:hf", "file=d/c.json"),
        ("/nim/meta/m:hf", "file=d%2Fc.json"),
        ("//nim/meta/m:hf%3Ffile=d/c.json", ""),
    ],
)
def test_spellings_of_an_override(path: str, query: str) -> None:
    assert (["nim", "meta", "m"], "hf", "d/c.json") in s.override(path, query)


def test_an_override_keeps_plus_and_tries_the_text_with_percent_first() -> None:
    assert s.override("/nim%2Fm%3A1.5%2B%3Ffile%3Da+b", "") == [(["nim", "m"], "1.5+", "a+b")]
    assert [path for _, _, path in s.override("/nim%2Fm%3A1%3Ffile%3Da%2541", "")] == ["a%41", "aA"]
    for path in ("/", "/nim/m", "/nim/m?file=x", "/nim/m:1", "/nim/m:1%3Ffile=", "/%", "/%ff%fe"):
        assert s.override(path, "") == []


def test_a_query() -> None:
    asked = s.query(json.dumps({"query": "resourceId:acme/* AND orgName:acme Demo", "page": 2, "pageSize": 7}))
    assert (asked.patterns, asked.words, asked.page, asked.size) == ({"resourceId": "acme/*", "orgName": "acme"}, ("demo",), 2, 7)
    assert asked.takes(s.Shown("acme", "", "demo")) and not asked.takes(s.Shown("acme", "", "other"))
    assert s.query("").takes(s.Shown("a", "b", "c")) and s.query('{"query":"*"}').takes(s.Shown("a", "b", "c"))
    odd = s.query(json.dumps({"query": 5, "page": -1, "pageSize": "x"}))
    assert (odd.page, odd.size, odd.words) == (0, 100, ())


@given(st.text(max_size=200))
def test_any_query_is_read_or_refused(text: str) -> None:
    try:
        s.query(text).takes(s.Shown("a", "b", "c"))
        s.query(json.dumps({"query": text})).takes(s.Shown("a", "b", "c"))
    except AirlockError:
        pass


@pytest.mark.parametrize(
    ("path", "template"),
    [
        ("/dl/atk1.x.y", "/dl/{ticket}"),
        ("//v2/org/a/team/b/models/m/1/files", "/v2/…/models/{model}/{version}/files"),
        ("/v2/models/a/m/versions/1/files", "/v2/…/models/{model}/versions/{version}/files"),
        ("/v2/org/a/models/m/versions/1/files/d/e", "/v2/…/models/{model}/versions/{version}/files/{path}"),
        ("/v2/org/a/models/m", "/v2/…/models/{model}/…"),
        ("/v2/org/a/repos/i/images", "/v2/…/repos/{image}/…"),
        ("/v2/org/a/teams", "other"),
        ("/nim/m:1", "other"),
    ],
)
def test_figures_name_no_artefact_and_no_ticket(path: str, template: str) -> None:
    assert (route(path, "ngc").door, route(path, "ngc").template) == ("ngc", template)
