"""The S3 face over HTTP to a real process, by unmodified boto3 in both styles; on files, and on a bucket of a real gateway."""

from __future__ import annotations

import hashlib
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from boto3.s3.transfer import TransferConfig
from botocore.exceptions import ClientError

from tests.contracts.ngc import FILES, GATED, MIRRORED, OWN, PLUS, fill, new_ngc_site
from tests.contracts.s3 import BUCKET, S3Door, key_of, named, refused, s3_serving
from tests.contracts.stores import s3_url
from tests.flows.answered import unanswered

pytestmark = pytest.mark.server
BIG = bytes(range(256)) * 80_000  # 20 MB: several ranges of a multipart download
BIG_MODEL = "ngc/nim/meta/big"


@pytest.fixture(scope="module", params=["file", "bucket"])
def door(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[S3Door]:
    folder = tmp_path_factory.mktemp("s3")
    env = {"AIRLOCK_BLOBS": s3_url(folder)} if request.param == "bucket" else {}
    keys = new_ngc_site(folder / "data", **env)
    with s3_serving(folder / "data", keys, **env) as found:
        fill_env(found, folder / "data", env)
        found.ngc.push(BIG_MODEL, "1", {"weights.bin": BIG})
        yield found


def fill_env(door: S3Door, data: Path, env: dict[str, str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in env.items():
            patch.setenv(name, value)
        fill(door.ngc, data)


@pytest.fixture(autouse=True)
def answered(door: S3Door, request: pytest.FixtureRequest) -> Iterator[None]:
    """No request of boto3 meets what has no route, but for those of the one test that asks for it."""
    before = len(door.lines())
    yield
    assert bool(unanswered(door.lines()[before:])) == (request.function is test_nothing_is_written)


@pytest.fixture(params=["path", "virtual"])
def style(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    named(monkeypatch)
    return str(request.param)


def keys_of(client: Any, bucket: str, **more: Any) -> list[str]:
    pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket, **more)
    return [item["Key"] for found in pages for item in found.get("Contents", [])]


def test_every_file_by_the_key_of_the_override(door: S3Door, style: str) -> None:
    client = door.client("low", style)
    for path, data in FILES.items():
        key = key_of("nim/meta/llama", "fp16", path)
        head, got = client.head_object(Bucket=BUCKET, Key=key), client.get_object(Bucket=BUCKET, Key=key)
        assert got["Body"].read() == data and head["ContentLength"] == len(data)
        assert head["ETag"] == got["ETag"] == f'"{hashlib.sha256(data).hexdigest()}"' and head["LastModified"].year >= 2026
    plus = client.get_object(Bucket=BUCKET, Key=key_of("nim/meta/llama", PLUS, "config.json"))
    assert plus["Body"].read() == FILES["config.json"], "a version that is no tag"


def test_the_same_object_by_the_model_bucket(door: S3Door, style: str) -> None:
    client = door.client("root", style)
    for name, ref in ((MIRRORED, "fp16"), (OWN, "1.10"), ("hf/acme/m", "main")):
        listed = keys_of(client, "models", Prefix=f"{name}:{ref}/")
        assert listed == sorted(f"{name}:{ref}/{path}" for path in FILES)
        for key in listed:
            assert client.get_object(Bucket="models", Key=key)["Body"].read() == FILES[key.partition(f":{ref}/")[2]]


def test_ranges(door: S3Door) -> None:
    client, data = door.client("low"), FILES["model.safetensors"]
    key = key_of("nim/meta/llama", "fp16", "model.safetensors")
    got = client.get_object(Bucket=BUCKET, Key=key, Range="bytes=1000-1999")
    assert got["Body"].read() == data[1000:2000] and got["ContentRange"] == f"bytes 1000-1999/{len(data)}"
    assert got["ResponseMetadata"]["HTTPStatusCode"] == 206
    assert client.get_object(Bucket=BUCKET, Key=key, Range="bytes=-7")["Body"].read() == data[-7:]
    assert refused(client.get_object, Bucket=BUCKET, Key=key, Range=f"bytes={len(data)}-")[:2] == (416, "InvalidRange")
    etag = client.head_object(Bucket=BUCKET, Key=key)["ETag"]
    assert refused(client.get_object, Bucket=BUCKET, Key=key, IfNoneMatch=etag)[0] == 304
    assert refused(client.get_object, Bucket=BUCKET, Key=key, IfMatch='"other"')[:2] == (412, "PreconditionFailed")
    assert client.get_object(Bucket=BUCKET, Key=key, IfMatch=etag)["Body"].read() == data


def test_ranges_at_the_ends_of_objects(door: S3Door) -> None:
    """As S3 has it: a suffix longer than the object is the whole, an empty object has no range, and a head tells what a GET would."""
    client = door.client("low")
    data, key = FILES["config.json"], key_of("nim/meta/llama", "fp16", "config.json")
    size, empty = len(data), key_of("nim/meta/llama", "fp16", "empty.txt")
    for wanted, lo, hi in (
        ("-1", size - 1, size),
        (f"-{size}", 0, size),
        ("-999", 0, size),
        ("0-0", 0, 1),
        (f"{size - 1}-", size - 1, size),
        ("1-999", 1, size),
    ):
        asked = {"Bucket": BUCKET, "Key": key, "Range": f"bytes={wanted}"}
        head, got = client.head_object(**asked), client.get_object(**asked)
        assert got["Body"].read() == data[lo:hi], wanted
        for found in (head, got):
            told = found["ResponseMetadata"]["HTTPStatusCode"], found["ContentRange"], found["ContentLength"], found["ETag"]
            assert told == (206, f"bytes {lo}-{hi - 1}/{size}", hi - lo, f'"{hashlib.sha256(data).hexdigest()}"'), wanted
    for at, ranges, total in ((empty, ("0-", "0-0", "-1", "-0", "5-9"), 0), (key, (f"{size}-", "-0", "99-100"), size)):
        for wanted in ranges:
            for call in (client.get_object, client.head_object):
                with pytest.raises(ClientError) as caught:
                    call(Bucket=BUCKET, Key=at, Range=f"bytes={wanted}")
                told = caught.value.response
                assert told["ResponseMetadata"]["HTTPStatusCode"] == 416, (at, wanted)
                assert told["ResponseMetadata"]["HTTPHeaders"]["content-range"] == f"bytes */{total}"
                assert call == client.head_object or told["Error"]["Code"] == "InvalidRange"
    whole = client.get_object(Bucket=BUCKET, Key=empty)
    assert (whole["ResponseMetadata"]["HTTPStatusCode"], whole["ContentLength"], whole["Body"].read()) == (200, 0, b"")
    assert client.head_object(Bucket=BUCKET, Key=empty)["ResponseMetadata"]["HTTPStatusCode"] == 200


def test_download_file_by_ranges_at_once(door: S3Door, style: str, tmp_path: Path) -> None:
    before = len(door.lines())
    config = TransferConfig(multipart_threshold=1 << 20, multipart_chunksize=6 << 20, max_concurrency=4)
    door.client("low", style).download_file(BUCKET, key_of("nim/meta/big", "1", "weights.bin"), str(tmp_path / "big"), Config=config)
    assert (tmp_path / "big").read_bytes() == BIG
    assert sum(line["status"] == 206 for line in door.lines()[before:]) == 4, "four ranges of 6 MiB"


def test_the_digest_is_checked_by_the_client(door: S3Door) -> None:
    """boto3 asks for a checksum, and is given the SHA-256 that the manifest names."""
    got = door.client("low").get_object(Bucket=BUCKET, Key=key_of("nim/meta/big", "1", "weights.bin"))
    assert got["Body"].read() == BIG and got["ChecksumSHA256"] and got["ChecksumType"] == "FULL_OBJECT"
    part = door.client("low").get_object(Bucket=BUCKET, Key=key_of("nim/meta/big", "1", "weights.bin"), Range="bytes=0-9")
    assert part["Body"].read() == BIG[:10] and "ChecksumSHA256" not in part


def test_presigned_url_needs_no_key(door: S3Door, style: str) -> None:
    client = door.client("low", style)
    url = client.generate_presigned_url("get_object", Params={"Bucket": BUCKET, "Key": key_of("nim/meta/llama", "fp16", "config.json")}, ExpiresIn=60)
    assert "%252F" in url
    with urllib.request.urlopen(url, timeout=30) as answer:
        assert answer.read() == FILES["config.json"]
    listing = client.generate_presigned_url("list_objects_v2", Params={"Bucket": "models", "Prefix": MIRRORED}, ExpiresIn=60)
    with urllib.request.urlopen(listing, timeout=30) as answer:
        assert b"<Key>" + MIRRORED.encode() in answer.read()
    head = client.generate_presigned_url("head_object", Params={"Bucket": BUCKET, "Key": key_of("nim/meta/llama", "fp16", "empty.txt")}, ExpiresIn=60)
    assert urllib.request.urlopen(urllib.request.Request(head, method="HEAD"), timeout=30).headers["content-length"] == "0"


def test_buckets(door: S3Door, style: str) -> None:
    client = door.client("low", style)
    assert [bucket["Name"] for bucket in client.list_buckets()["Buckets"]] == sorted(("models", BUCKET))
    assert client.head_bucket(Bucket=BUCKET)["ResponseMetadata"]["HTTPStatusCode"] == 200
    assert client.get_bucket_location(Bucket=BUCKET)["LocationConstraint"] is None
    assert refused(client.head_bucket, Bucket="elsewhere")[0] == 404
    assert refused(client.list_objects_v2, Bucket="elsewhere")[:2] == (404, "NoSuchBucket")


@pytest.mark.parametrize("call", ["list_objects", "list_objects_v2"])
@pytest.mark.parametrize("size", [1, 3, 1000])
def test_listings_page_as_they_list(door: S3Door, call: str, size: int) -> None:
    client = door.client("root")
    for bucket in (BUCKET, "models"):
        whole = keys_of(client, bucket)
        assert whole == sorted(whole, key=str.encode) and len(set(whole)) == len(whole) > 15
        pages = client.get_paginator(call).paginate(Bucket=bucket, PaginationConfig={"PageSize": size})
        assert [item["Key"] for found in pages for item in found.get("Contents", [])] == whole
        start = whole[len(whole) // 2]
        assert keys_of(client, bucket, StartAfter=start) == whole[len(whole) // 2 + 1 :]


def test_listings_by_prefix_and_delimiter(door: S3Door) -> None:
    client = door.client("root")
    for size in (1, 2, 1000):
        pages = [*client.get_paginator("list_objects_v2").paginate(Bucket="models", Delimiter="/", PaginationConfig={"PageSize": size})]
        assert [p["Prefix"] for found in pages for p in found.get("CommonPrefixes", [])] == ["acme/", "hf/", "ngc/"]
    inside = client.list_objects_v2(Bucket="models", Prefix="ngc/nim/meta/llama:fp16/", Delimiter="/")
    assert [item["Key"].rpartition("/")[2] for item in inside["Contents"]] == ["config.json", "empty.txt", "model.safetensors"]
    assert [item["Prefix"] for item in inside["CommonPrefixes"]] == ["ngc/nim/meta/llama:fp16/sub/"] and inside["KeyCount"] == 4
    encoded = client.list_objects_v2(Bucket=BUCKET, Delimiter="%3A")
    assert "nim%2Fmeta%2Fllama%3A" in [item["Prefix"] for item in encoded["CommonPrefixes"]]
    assert client.list_objects_v2(Bucket=BUCKET, Prefix="nothing").get("Contents") is None
    assert client.list_objects_v2(Bucket=BUCKET, MaxKeys=0)["KeyCount"] == 0


def test_each_key_lists_what_it_may_read(door: S3Door) -> None:
    client = door.client("low")
    listed = keys_of(client, BUCKET) + keys_of(client, "models")
    assert listed and all(key.startswith(("nim%2Fmeta%2F", "ngc/nim/meta/")) for key in listed) and not any("paid" in key for key in listed)
    for bucket in (BUCKET, "models"):
        for key in keys_of(client, bucket):
            assert client.head_object(Bucket=bucket, Key=key)["ContentLength"] >= 0
    assert keys_of(door.client("nothing"), BUCKET) == []


def test_what_may_not_be_read(door: S3Door) -> None:
    low = door.client("low")
    status, code, words = refused(low.get_object, Bucket=BUCKET, Key=key_of("nim/meta/paid", "1", "config.json"))
    assert (status, code) == (403, "AccessDenied") and "requires the enterprise tier" in words
    assert refused(low.get_object, Bucket="models", Key=f"{GATED}:1/config.json")[:2] == (403, "AccessDenied")
    hidden = refused(low.get_object, Bucket="models", Key="other/secret:1/config.json")
    absent = refused(low.get_object, Bucket="models", Key="other/absent:1/config.json")
    assert hidden == absent and hidden[:2] == (404, "NoSuchKey")
    assert refused(low.head_object, Bucket="models", Key="other/secret:1/config.json")[0] == 404
    for key in (key_of("nim/meta/llama", "fp16", "absent"), key_of("nim/meta/llama", "9", "config.json"), "config.json"):
        assert refused(low.get_object, Bucket=BUCKET, Key=key)[:2] == (404, "NoSuchKey")


def test_nothing_is_written(door: S3Door) -> None:
    client, key = door.client("root"), key_of("nim/meta/llama", "fp16", "config.json")
    calls: list[tuple[Any, dict[str, Any]]] = [
        (client.put_object, {"Bucket": BUCKET, "Key": key, "Body": b"x"}),
        (client.delete_object, {"Bucket": BUCKET, "Key": key}),
        (client.delete_objects, {"Bucket": BUCKET, "Delete": {"Objects": [{"Key": key}]}}),
        (client.copy_object, {"Bucket": BUCKET, "Key": key, "CopySource": {"Bucket": BUCKET, "Key": key}}),
        (client.create_multipart_upload, {"Bucket": BUCKET, "Key": key}),
        (client.create_bucket, {"Bucket": "new"}),
        (client.delete_bucket, {"Bucket": BUCKET}),
        (client.put_object_acl, {"Bucket": BUCKET, "Key": key, "ACL": "private"}),
    ]
    for call, given in calls:
        assert refused(call, **given)[:2] == (405, "MethodNotAllowed"), given
    for call, given in ((client.get_object_acl, {"Bucket": BUCKET, "Key": key}), (client.get_bucket_versioning, {"Bucket": BUCKET})):
        assert refused(call, **given)[:2] == (501, "NotImplemented")
    assert client.get_object(Bucket=BUCKET, Key=key)["Body"].read() == FILES["config.json"]


def test_another_region_is_told_which(door: S3Door) -> None:
    """botocore signs again for the region that the refusal names; what does not is told."""
    client, before = door.client("low", region="eu-central-1"), len(door.lines())
    assert client.get_object(Bucket=BUCKET, Key=key_of("nim/meta/llama", "fp16", "config.json"))["Body"].read() == FILES["config.json"]
    assert [line["status"] for line in door.lines()[before:]] == [400, 200]
    status, code, words = refused(client.list_buckets)
    assert (status, code) == (400, "AuthorizationHeaderMalformed") and "expecting 'us-east-1'" in words


def test_no_redirect_is_ever_sent(door: S3Door) -> None:
    assert not [line for line in door.lines() if 300 <= line["status"] < 400 and line["status"] != 304]
