"""What a log line may not hold: passwords of URLs, however odd, while names at a digest stay readable."""

from __future__ import annotations

import time

import pytest

from registry.logs import redacted


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("postgresql://u:pw@h/db", "postgresql://[secret]@h/db"),
        ("at postgresql://u:pa/ss@h:5/db?x=1 end", "at postgresql://[secret]@h:5/db?x=1 end"),
        ("postgresql://u:p@ss/w@rd@h/db", "postgresql://[secret]@h/db"),
        ("postgresql://me@corp:p@h/db", "postgresql://[secret]@h/db"),
        ("s3://b/p?endpoint=http://k:se/cr@et@x&region=q", "s3://b/p?endpoint=http://[secret]@x&region=q"),
        ('{"url": "https://u:p/w@h/x", "to": "a@b"}', '{"url": "https://[secret]@h/x", "to": "a@b"}'),
        ("http://h:5000/v2/acme/m@sha256:ab12", "http://h:5000/v2/acme/m@sha256:ab12"),
        ("http://u:p@h/acme/m:1@sha512:ff", "http://[secret]@h/acme/m:1@sha512:ff"),
        ("https://me@h/x", "https://me@h/x"),
        ("https://h/a b:c@d", "https://h/a b:c@d"),
    ],
)
def test_urls_lose_their_passwords_and_nothing_else(text: str, shown: str) -> None:
    assert redacted(text) == shown


@pytest.mark.parametrize("piece", ["://a:", "://a:@", "://", "@", ":@"])
def test_a_hostile_line_costs_no_more_than_its_length(piece: str) -> None:
    began = time.monotonic()
    redacted(piece * 100_000)
    assert time.monotonic() - began < 10  # where the time grows with the square, these are minutes
