"""The arithmetic of S3 uploads, the names of objects and the options of a store's URL, without a server."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from artifact.errors import Invalid, TooLarge, Unavailable
from artifact.manifest import digest_of
from registry.bucket import (
    GIB,
    MAX_PARTS,
    MIB,
    MIN_PART,
    SPARE_PARTS,
    Memory,
    Options,
    Tail,
    digest_at,
    is_location,
    key_of,
    location_of,
    may_cut,
    next_number,
    part_size,
    planned,
    read_secret,
)
from registry.settings import Settings

DIGEST = digest_of(b"abc")
URL = "s3://models/site/a?endpoint=https://s3.site:8443&region=r1&public=https://out&ca=/ca.pem&credentials=/c.ini&style=virtual&checksums=on"


def test_900_gib_fit_with_room_for_suspended_uploads() -> None:
    assert planned(900 * GIB) + SPARE_PARTS <= MAX_PARTS
    assert part_size(0) == 16 * MIB and part_size(16 * GIB) == 64 * MIB and part_size(900 * GIB) == 256 * MIB
    assert (planned(0), planned(1), planned(16 * MIB), planned(16 * MIB + 1)) == (0, 1, 1, 2)
    assert next_number(0) == 1 and next_number(MAX_PARTS - 1) == MAX_PARTS
    with pytest.raises(TooLarge):
        next_number(MAX_PARTS)


@given(st.lists(st.integers(1, 300 * GIB), min_size=1, max_size=40))
def test_any_suspensions_stay_within_the_parts_of_s3(pieces: list[int]) -> None:
    """Each piece is one request that ends by a sync; the whole is cut to 900 GiB."""
    sent = tail = parts = total = 0
    for piece in pieces:
        left = min(piece, 900 * GIB - total)
        total += left
        while left:
            room = part_size(sent) - tail
            if left < room:
                tail, left = tail + left, 0
            else:
                whole = (left - room) // part_size(sent) + 1 if sent >= 144 * GIB else 1  # the steady state at once, or this would take long
                sent, left, parts, tail = (
                    sent + tail + room + (whole - 1) * part_size(sent),
                    left - room - (whole - 1) * part_size(sent),
                    parts + whole,
                    0,
                )
        if may_cut(tail, parts, total):
            sent, tail, parts = sent + tail, 0, parts + 1
    assert sent + tail == total and parts + 1 <= MAX_PARTS


def test_an_unfinished_part_is_closed_early_only_while_numbers_are_left() -> None:
    assert may_cut(MIN_PART, 0, MIN_PART) and not may_cut(MIN_PART - 1, 0, MIN_PART)
    assert not may_cut(MIN_PART, SPARE_PARTS + 1, MIN_PART)


@given(st.integers(0, 10**6), st.one_of(st.just(""), st.from_regex(r"[0-9a-zA-Z_-]{8,64}", fullmatch=True)))
def test_names_lead_back_to_the_digest(generation: int, upload: str) -> None:
    location = location_of(DIGEST, generation, upload)
    assert is_location(location) and digest_at(location) == DIGEST
    assert key_of(location) == (f"uploads/{upload}" if upload else f"blobs/{location}")


@pytest.mark.parametrize(
    "text", ["", "../a", "sha256/ba/x", location_of(DIGEST) + "+short", location_of(DIGEST) + "+../../etc", location_of(DIGEST) + "\n"]
)
def test_what_is_no_location(text: str) -> None:
    assert not is_location(text)
    with pytest.raises(Invalid):
        key_of(text)
    with pytest.raises(Invalid):
        digest_at(text)


def test_options_of_a_url() -> None:
    found = Options.parse(URL)
    assert (found.bucket, found.prefix, found.endpoint, found.region, found.public) == (
        "models",
        "site/a/",
        "https://s3.site:8443",
        "r1",
        "https://out",
    )
    assert (found.ca, found.credentials, found.style, found.checksums) == ("/ca.pem", "/c.ini", "virtual", True)
    plain = Options.parse("s3://models?credentials=/c.ini")
    assert (plain.prefix, plain.endpoint, plain.region, plain.style, plain.checksums) == ("", "", "us-east-1", "path", False)


@pytest.mark.parametrize(
    "url",
    [
        "s3://models",
        "s3://?credentials=/c",
        "s3://M?credentials=/c",
        "s3://models/../x?credentials=/c",
        "s3://models/a b?credentials=/c",
        "s3://models?credentials=/c&what=1",
        "s3://models?credentials=/c&credentials=/d",
        "s3://models?credentials=/c&style=other",
        "s3://models?credentials=/c&checksums=maybe",
        "s3://models?credentials=/c&endpoint=ftp://x",
        "s3://models?credentials=/c&endpoint=http://user:word@x",
        "s3://models?credentials=/c&public=https://x/y?z",
        "s3://models?nonsense",
    ],
)
def test_options_that_are_refused(url: str) -> None:
    with pytest.raises(Invalid):
        Options.parse(url)


@given(st.text(max_size=200))
def test_any_url_is_understood_or_refused(text: str) -> None:
    for url in (text, "s3://" + text, "s3://models?" + text):
        try:
            Options.parse(url)
        except Invalid:
            continue


@pytest.mark.parametrize(
    "text", ["", "[default]\n", "[other]\naws_access_key_id=a\n", "{}", "[default\n", "[default]\naws_access_key_id=hidden\n", "\0"]
)
def test_credentials_that_are_not_understood_are_not_repeated(tmp_path: Path, text: str) -> None:
    (tmp_path / "c.ini").write_text(text)
    with pytest.raises(Unavailable) as told:
        read_secret(tmp_path / "c.ini")
    assert "hidden" not in str(told.value) and told.value.__cause__ is None
    with pytest.raises(Unavailable):
        read_secret(tmp_path / "absent")


def test_memory_is_never_more_than_it_may_be(tmp_path: Path) -> None:
    memory = Memory(10 * MIB)
    tails = [Tail(memory, tmp_path) for _ in range(3)]
    for _ in range(6):
        for tail in tails:
            tail.append(memoryview(b"x" * MIB))
            assert memory.used <= memory.total
    for tail in tails:
        tail.file.seek(0)
        assert tail.file.read() == b"x" * (6 * MIB) and tail.size == 6 * MIB
        tail.close()
        tail.close()
    assert memory.used == 0 and list(tmp_path.iterdir()) == []


def test_reads_become_smaller_the_more_memory_is_in_use() -> None:
    memory = Memory(8 * MIB)
    sizes = [memory.read_size()]
    for _ in range(8):
        memory.take(MIB)
        sizes.append(memory.read_size())
    assert sizes[0] == 2 * MIB and sizes[-1] == 64 * 1024 and sizes == sorted(sizes, reverse=True)


def test_the_document_tells_every_option() -> None:
    text = (Path(__file__).parents[2] / "docs" / "operations.md").read_text()
    section = text.split("## Object storage", 1)[1].split("\n## ", 1)[0]
    assert all(f"`{word}`" in section for word in ("endpoint", "region", "public", "ca", "credentials", "style", "checksums"))
    assert Settings(Path("/x")).blobs_url == "file:"


@pytest.mark.parametrize(
    ("words", "host", "beside"),
    [
        ("endpoint=http://s3.site:9000", "s3.site:5000", True),
        ("endpoint=http://S3.site:9000", "s3.SITE", True),
        ("endpoint=http://s3.site", "site", True),
        ("endpoint=http://s3.site", "registry.site", False),
        ("endpoint=http://s3.site", "3.site", False),
        ("endpoint=http://10.0.0.1&public=https://registry.site", "registry.site:443", True),
        ("endpoint=http://site&style=virtual", "bucket.site", True),
        ("endpoint=http://[::1]:9000", "[::1]:5000", True),
        ("endpoint=http://s3.site", "", False),
        ("endpoint=http://s3.site", "[", False),
        ("region=eu", "s3.site", False),
    ],
)
def test_a_store_beside_the_registry(words: str, host: str, beside: bool) -> None:
    assert Options.parse(f"s3://bucket/x?credentials=/c&{words}").beside(host) is beside
