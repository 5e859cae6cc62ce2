"""What a log line may not hold: passwords and secrets of URLs, however odd, while names at a digest stay readable."""

from __future__ import annotations

import json
import logging
import time

import pytest

from registry.logs import ACCESS, JsonLines, redacted


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
        ("http://h/t?password=hunter2&scope=x", "http://h/t?password=[secret]&scope=x"),
        ("/x?a=1&api_Key=hunter2;b&z=2 end", "/x?a=1&api_Key=[secret]&z=2 end"),
        ("postgresql://u@h/d?sslpassword=hun'ter2", "postgresql://u@h/d?sslpassword=[secret]"),
        (
            "http://s/b?X-Amz-Credential=AK%2F1&X-Amz-Date=1&X-Amz-Signature=0f&x-amz-security-token=q",
            "http://s/b?X-Amz-Credential=[secret]&X-Amz-Date=1&X-Amz-Signature=[secret]&x-amz-security-token=[secret]",
        ),
        ("http://s/b?AWSAccessKeyId=AK&Signature=short&Expires=1", "http://s/b?AWSAccessKeyId=[secret]&Signature=[secret]&Expires=1"),
        ('{"path": "/v2/a?token=hunter2", "status": 404}', '{"path": "/v2/a?token=[secret]", "status": 404}'),
        ("/v2/acme/keys/tags?n=1&last=tokens", "/v2/acme/keys/tags?n=1&last=tokens"),
        ("a key=1 and token=2 of no URL", "a key=1 and token=2 of no URL"),
    ],
)
def test_urls_lose_their_passwords_and_nothing_else(text: str, shown: str) -> None:
    assert redacted(text) == shown


def test_the_access_line_of_a_path_with_a_secret_in_it() -> None:
    line = json.dumps({"method": "GET", "path": "/v2/a?X-Amz-Signature=hunter2&access_token=hunter2", "status": 404})
    shown = json.loads(JsonLines().format(logging.LogRecord(ACCESS, logging.INFO, "", 0, line, None, None)))
    assert (shown["path"], shown["status"]) == ("/v2/a?X-Amz-Signature=[secret]&access_token=[secret]", 404)
    record = logging.LogRecord("any", logging.ERROR, "", 0, "GET %s failed", ("http://h/x?secret=hunter2",), None)
    assert json.loads(JsonLines().format(record))["message"] == "GET http://h/x?secret=[secret] failed"


@pytest.mark.parametrize("piece", ["://a:", "://a:@", "://", "@", ":@", "?", "?key", "key", "?key="])
def test_a_hostile_line_costs_no_more_than_its_length(piece: str) -> None:
    began = time.process_time()
    redacted(piece * 100_000)
    assert time.process_time() - began < 10  # where the time grows with the square, these are minutes
