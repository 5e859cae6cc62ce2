"""Neighbours of the attack cases A01 to A05, A09 and A13 to A15, generated: what is refused is refused in form, and nothing of it is kept."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from itertools import pairwise
from typing import Any
from urllib.parse import quote

import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from artifact.manifest import is_digest, is_name
from tests.contracts.doors import EMPTY, INDEX, MANIFEST, Answer, Door, new_site, serving, sha
from tests.hostile.test_oci_input import state, unchanged

pytestmark = pytest.mark.server
R = "acme/app"
CONFIG = {"mediaType": EMPTY, "digest": sha(b"{}"), "size": 2}
DOCKER = "application/vnd.docker.distribution.manifest.v2+json"
LIST = "application/vnd.docker.distribution.manifest.list.v2+json"
VALID = json.dumps({"schemaVersion": 2, "mediaType": MANIFEST, "config": CONFIG, "layers": [], "annotations": {"a": "b"}}).encode()
MANY = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much], print_blob=True)


@pytest.fixture(scope="module")
def door(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Door]:
    data = tmp_path_factory.mktemp("neighbours") / "data"
    keys = new_site(data)
    with serving(data, keys, AIRLOCK_GC_EVERY_S="0") as found:  # what is let go of stays where it is: the tests compare all rows
        found.blob(R, b"{}")
        yield found
        lines = [json.loads(line) for line in found.log.read_text().splitlines() if line.startswith("{")]
        assert not [line for line in lines if line["level"] == "error"], "an unexpected failure was logged"


def refused(found: Answer, *statuses: int) -> None:
    assert found.status in statuses, (found.status, found.body[:500])
    error = found.json()["errors"][0]
    assert error["code"].replace("_", "").isupper() and error["message"] and "Traceback" not in error["message"]


def put(door: Door, raw: bytes, ref: str = "evil", media_type: str = MANIFEST) -> Answer:
    return door.ask("PUT", f"/v2/{R}/manifests/{ref}", raw, Content_Type=media_type)


fields = st.fixed_dictionaries(
    {},
    optional={
        "manifests": st.sampled_from([[], None, {}, [CONFIG], "x"]),
        "layers": st.sampled_from([[], None, [CONFIG], 1]),
        "config": st.sampled_from([CONFIG, None, {}, []]),
    },
)


@MANY
@given(fields=fields, media_type=st.sampled_from([MANIFEST, INDEX, DOCKER, LIST]), stated=st.booleans())
def test_a01_shapes_between_an_index_and_an_image(door: Door, fields: dict[str, Any], media_type: str, stated: bool) -> None:
    index = media_type in (INDEX, LIST)
    fits = set(fields) == ({"manifests"} if index else {"config", "layers"})
    assume(not fits)
    doc = {"schemaVersion": 2, **({"mediaType": media_type} if stated else {}), **fields}
    with unchanged(door):
        refused(put(door, json.dumps(doc).encode(), media_type=media_type), 400)


@settings(MANY, max_examples=6)
@given(over=st.integers(1, 70_000))
@example(over=1)
def test_a02_sizes_just_over_the_limit(door: Door, over: int) -> None:
    raw = VALID.ljust(4 * 1024 * 1024 + over)
    with unchanged(door):
        for body in (raw, iter([raw[:1_000_000], raw[1_000_000:]])):
            headers = {"Transfer_Encoding": "chunked"} if body is not raw else {}
            try:
                found = door.ask("PUT", f"/v2/{R}/manifests/evil", body, Content_Type=MANIFEST, **headers)
            except (BrokenPipeError, ConnectionResetError):  # refused before it was read
                continue
            refused(found, 413)
            assert found.headers["connection"] == "close"


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    raw = bytearray(VALID)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(raw)))
        what = draw(st.sampled_from(["drop", "insert", "replace", "repeat"]))
        piece = draw(
            st.sampled_from([b"{", b"}", b"[", b"]", b'"', b",", b":", b"\\u0000", b"\xff", b"1e999", b"-1", b"null", b"\\ud800", b"0" * 40])
        )
        size = draw(st.integers(1, 30))
        if what == "drop":
            del raw[at : at + size]
        elif what == "insert":
            raw[at:at] = piece
        elif what == "replace":
            raw[at : at + len(piece)] = piece
        else:
            raw[at:at] = raw[at : at + size]
    return bytes(raw)


@settings(MANY, max_examples=150)
@given(raw=mutated())
def test_a03_damaged_json(door: Door, raw: bytes) -> None:
    before = state(door)
    found = put(door, raw, "damaged")
    if found.status == 201:  # damage that leaves a manifest: kept byte for byte
        assert door.ask("GET", f"/v2/{R}/manifests/damaged").body == raw
        assert door.ask("DELETE", f"/v2/{R}/manifests/{sha(raw)}").status == 202
    else:
        refused(found, 400, 404)
        assert state(door) == before


digests = st.one_of(
    st.from_regex(r"(sha256|sha512|SHA256|sha-256|md5|sha384|)[:+_]?[0-9a-fA-F./%]{0,130}", fullmatch=True),
    st.builds(
        lambda algorithm, text, cut: f"{algorithm}:{text[:cut]}",
        st.sampled_from(["sha256", "sha512"]),
        st.text("0123456789abcdef", min_size=129, max_size=129),
        st.sampled_from([0, 1, 63, 65, 127, 129]),
    ),
    st.builds(lambda ch: "sha256:" + "a" * 63 + ch, st.characters(codec="utf-8")),
)


@settings(MANY, max_examples=80)
@given(digest=digests)
def test_a04_almost_digests(door: Door, digest: str) -> None:
    assume(not is_digest(digest) and "/" not in digest)
    text = quote(digest, safe=":")
    with unchanged(door):
        for method in ("GET", "DELETE"):
            refused(door.ask(method, f"/v2/{R}/blobs/{text}"), 400)
        refused(door.ask("GET", f"/v2/{R}/referrers/{text}"), 400)
        if ":" in digest:
            refused(door.ask("GET", f"/v2/{R}/manifests/{text}"), 400, 404)
            refused(door.ask("PUT", f"/v2/{R}/manifests/{text}", VALID, Content_Type=MANIFEST), 400)
        if digest:
            refused(door.ask("POST", f"/v2/{R}/blobs/uploads/?digest={quote(digest)}", b"x"), 400)
            refused(door.ask("POST", f"/v2/{R}/blobs/uploads/?mount={quote(digest)}&from={R}"), 400)


@MANY
@given(
    data=st.binary(max_size=3000),
    cuts=st.lists(st.integers(0, 3000), max_size=3),
    algorithm=st.sampled_from(["sha256", "sha512"]),
    announced=st.sampled_from(["", "?digest-algorithm=sha512", "?digest-algorithm=sha256"]),
)
def test_a05_uploads_that_lie(door: Door, data: bytes, cuts: list[int], algorithm: str, announced: str) -> None:
    wrong = f"{algorithm}:{hashlib.new(algorithm, data + b'lie').hexdigest()}"
    before = state(door)
    place = door.ask("POST", f"/v2/{R}/blobs/uploads/{announced}").headers["location"]
    edges = [0, *sorted(min(c, len(data)) for c in cuts), len(data)]
    for lo, hi in pairwise(edges):
        assert door.ask("PATCH", place, data[lo:hi]).status == 202
    refused(door.ask("PUT", f"{place}?digest={wrong}"), 400)
    refused(door.ask("GET", place), 404)
    held = [f"{name}:{hashlib.new(name, data).hexdigest()}" for name in ("sha256", "sha512")]
    for digest in (wrong, *(held if data != b"{}" else [])):
        assert door.ask("HEAD", f"/v2/{R}/blobs/{digest}").status == 404
    after = state(door)
    for table in ("upload", "repo_blob", "blob_alias", "manifest"):
        assert after[table] == before[table]
    assert not [f for f in after["files"] if "partial" in f]  # type: ignore[attr-defined]


@settings(MANY, max_examples=60)
@given(n=st.one_of(st.integers().map(str), st.text(max_size=20)), last=st.text(max_size=40), path=st.sampled_from(["_catalog", f"{R}/tags/list"]))
def test_a09_listing_bounds(door: Door, n: str, last: str, path: str) -> None:
    door.made or door.made.add(door.image(R, "listed", [b"listed"])[0])
    found = door.ask("GET", f"/v2/{path}?n={quote(n, safe='')}&last={quote(last, safe='')}")
    if found.status == 200:
        items = next(v for v in found.json().values() if isinstance(v, list))
        assert all(item > last for item in items) and (not n or len(items) <= int(n))
    else:
        refused(found, 400)


@settings(MANY, max_examples=60)
@given(first=st.integers(0, 40), length=st.integers(0, 40), closing=st.booleans())
def test_a13_chunks_elsewhere(door: Door, first: int, length: int, closing: bool) -> None:
    place = door.ask("POST", f"/v2/{R}/blobs/uploads/").headers["location"]
    assert door.ask("PATCH", place, b"x" * 20, Content_Range="0-19").status == 202
    data = b"y" * length
    query = f"?digest={sha(b'x' * 20 + data)}" if closing else ""
    found = door.ask("PUT" if closing else "PATCH", place + query, data, Content_Range=f"{first}-{first + length - 1}")
    if first == 20 and length:
        assert found.status == (201 if closing else 202)
    elif first + length == 0 or length == 0:
        assert found.status in (201, 202, 416)  # an empty range has no notation
    else:
        refused(found, 416)
        assert found.headers["range"] == "0-19"
        told = door.ask("GET", place)
        assert (told.status, told.headers["range"]) == (204, "0-19")
    if found.status != 201:
        assert door.ask("DELETE", place).status == 204


names = st.one_of(
    st.text("aA0._-/~@: é%\x00\n", max_size=40),
    st.lists(
        st.sampled_from(["a", "acme", "..", ".", "", ".git", "_a", "a_", "a..b", "a___b", "a--b", "API", "v2", "airlock", "x" * 250]), max_size=5
    ).map("/".join),
)


@settings(MANY, max_examples=80)
@given(name=names)
def test_a14_almost_names(door: Door, name: str) -> None:
    assume(not is_name(name))
    text = quote(name, safe="/@:~")
    assume(f"/v2/{text}" not in ("/v2/",))
    with unchanged(door):
        refused(door.ask("GET", f"/v2/{text}/manifests/1"), 400)
        refused(door.ask("POST", f"/v2/{text}/blobs/uploads/"), 400)
        refused(door.ask("PUT", f"/v2/{text}/manifests/1", VALID, Content_Type=MANIFEST), 400)
        refused(door.ask("POST", f"/v2/{R}/blobs/uploads/?mount={sha(b'{}')}&from={quote(name)}") if name else door.ask("GET", "/v2//tags/list"), 400)


types = st.one_of(
    st.sampled_from(
        [MANIFEST, INDEX, DOCKER, LIST, "application/json", "text/html", "", "*/*", MANIFEST.upper(), MANIFEST + "x", MANIFEST + ",text/html"]
    ),
    st.from_regex(r"[a-z]{1,10}/[a-z.+]{1,20}", fullmatch=True),
)


@MANY
@example(stated=MANIFEST, inside="", parameters="")
@given(stated=types, inside=types, parameters=st.sampled_from(["", "; charset=utf-8", ";x=y"]))
def test_a15_types_that_differ(door: Door, stated: str, inside: str, parameters: str) -> None:
    doc = {"schemaVersion": 2, "mediaType": inside, "config": CONFIG, "layers": [], "note": stated}
    raw = json.dumps(doc).encode()
    before = state(door)
    found = put(door, raw, "typed", stated + parameters)
    if found.status == 201:
        assert inside in (MANIFEST, DOCKER) and stated in (inside, "")
        for accept in (INDEX, "text/html", stated):
            read = door.ask("GET", f"/v2/{R}/manifests/typed", Accept=accept)
            assert (read.headers["content-type"], read.body) == (inside, raw)
        assert door.ask("DELETE", f"/v2/{R}/manifests/{sha(raw)}").status == 202
    else:
        refused(found, 400)
        assert state(door) == before
