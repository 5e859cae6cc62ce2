"""Signature Version 4 against botocore's own signer and AWS's published example, and the secrets of keys."""

from __future__ import annotations

import datetime
from typing import Any

import pytest
from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials
from hypothesis import given
from hypothesis import strategies as st

from artifact.errors import AirlockError, Unauthenticated
from registry.sigv4 import SKEW_S, Signed, parse, secret_of

KEY_ID, SECRET = "key-0123456789abcdef", "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY"
AT = datetime.datetime(2013, 5, 24, tzinfo=datetime.UTC).timestamp()


def example(access: str) -> Signed | None:
    """The GET of AWS's documentation ("Examples: signature calculations in AWS Signature Version 4", GET object), by another access key id."""
    scope, names = "20130524/us-east-1/s3/aws4_request", "host;range;x-amz-content-sha256;x-amz-date"
    signature = "f0e8bdb87c964420e857bd35b5d6ed310bd44f0170aba48dd91039c6036bdb41"
    headers = [
        (b"host", b"examplebucket.s3.amazonaws.com"),
        (b"range", b"bytes=0-9"),
        (b"x-amz-content-sha256", b"e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"),
        (b"x-amz-date", b"20130524T000000Z"),
        (b"authorization", f"AWS4-HMAC-SHA256 Credential={access}/{scope},SignedHeaders={names},Signature={signature}".encode()),
    ]
    return parse("GET", b"/test.txt", b"", headers)


def test_the_published_example() -> None:
    found = example(KEY_ID)
    assert found is not None and (found.key_id, found.region, found.at) == (KEY_ID, "us-east-1", AT)
    found.verify(["other", SECRET], AT + SKEW_S)
    with pytest.raises(Unauthenticated) as caught:
        found.verify(["other"], AT)
    assert caught.value.reason == "signature_invalid"
    for now in (AT - SKEW_S - 1, AT + SKEW_S + 1):
        with pytest.raises(Unauthenticated) as caught:
            found.verify([SECRET], now)
        assert caught.value.reason == "time_skewed"
    assert SECRET not in repr(found) and "f0e8bdb8" not in repr(found)


def test_a_key_id_of_others_is_refused_before_any_look_up() -> None:
    with pytest.raises(Unauthenticated) as caught:
        example("AKIAIOSFODNN7EXAMPLE")
    assert caught.value.reason == "access_key"


TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\r\n\0"), max_size=20)


@pytest.mark.slow
@given(TEXT, st.dictionaries(TEXT.filter(bool), TEXT, max_size=4), TEXT)
def test_what_botocore_signs_is_verified(key: str, params: dict[str, str], value: str) -> None:
    """Any key, query and header value, as botocore escapes and orders them."""
    from urllib.parse import quote, urlsplit

    query = "&".join(f"{quote(k, safe='')}={quote(v, safe='')}" for k, v in params.items() if not k.startswith("X-Amz-"))
    request = AWSRequest("GET", f"http://s3.test:9000/b/{quote(key, safe='/~')}" + (f"?{query}" if query else ""))
    request.headers["x-amz-meta"] = " ".join(value.encode("ascii", "ignore").decode().split())
    S3SigV4Auth(Credentials(KEY_ID, SECRET), "s3", "eu-west-1").add_auth(request)
    at = urlsplit(request.url)
    headers = [(k.lower().encode(), v.encode()) for k, v in request.headers.items()] + [(b"host", b"s3.test:9000"), (b"user-agent", b"x")]
    found = parse("GET", at.path.encode(), at.query.encode(), headers)
    if {"AWSAccessKeyId", "Signature"} & set(params):
        return
    assert found is not None
    found.verify([SECRET], found.at)
    for method, path, asked, sent in (
        ("HEAD", at.path, at.query, headers),
        ("GET", at.path + "x", at.query, headers),
        ("GET", at.path, at.query + "&x=", headers),
        ("GET", at.path, at.query, [(k, b"other" if k == b"host" else v) for k, v in headers]),
    ):
        altered = parse(method, path.encode(), asked.encode(), sent)
        assert altered is not None
        with pytest.raises(Unauthenticated):
            altered.verify([SECRET], altered.at)


@pytest.mark.slow
@given(
    st.binary(max_size=60),
    st.binary(max_size=60),
    st.lists(st.tuples(st.sampled_from([b"authorization", b"x-amz-date", b"host"]), st.binary(max_size=80))),
)
def test_whatever_comes_is_refused_by_our_own_errors(path: bytes, query: bytes, headers: Any) -> None:
    for prefix in (b"", b"AWS4-HMAC-SHA256 Credential=key-0123456789abcdef/"):
        try:
            parse("GET", path, query, [(k, prefix + v if k == b"authorization" else v) for k, v in headers])
        except AirlockError as error:
            assert error.reason


def test_secrets_are_of_one_key_and_one_pepper() -> None:
    made = {secret_of(pepper, key) for pepper in (b"a" * 32, b"b" * 32) for key in (KEY_ID, "key-0123456789abcdee")}
    assert len(made) == 4 and all(len(secret) == 43 and secret.isascii() for secret in made)
    assert secret_of(b"a" * 32, KEY_ID) == secret_of(b"a" * 32, KEY_ID)
