"""What a hostile or mistaken S3 client sends: every answer has S3's XML, the right code and no 500, and nothing is told that a key may not know."""

from __future__ import annotations

import http.client
import json
import re
import time
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import pytest

from registry.home import Home
from registry.sigv4 import secret_of
from tests.contracts.doors import Answer
from tests.contracts.ngc import FILES, MIRRORED
from tests.contracts.s3 import BUCKET, KEY, OBJECT, S3Door, door, refused, signed

pytestmark = pytest.mark.server
__all__ = ["door"]  # a fixture
EMPTY = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


@pytest.fixture(autouse=True)
def no_throttle(door: S3Door) -> Iterator[None]:
    """Failed logins are slowed down by network: each test begins with a minute of its own where it makes any."""
    yield
    assert not [line for line in door.lines() if line["status"] >= 500 and line["status"] not in (501, 503)]


def send(door: S3Door, path: str, headers: dict[str, str], method: str = "GET", body: Any = None) -> Answer:
    """A request as it is, without what a client library would put right."""
    connection = http.client.HTTPConnection("127.0.0.1", door.port, timeout=30)
    try:
        connection.putrequest(method, path, skip_accept_encoding=True, skip_host="host" in {k.lower() for k in headers})
        for name, value in headers.items():
            connection.putheader(name, value)
        connection.endheaders(body)
        answer = connection.getresponse()
        return Answer(answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read())
    finally:
        connection.close()


def told(found: Answer) -> tuple[int, str]:
    """Status and code of an answer, which must be S3's XML with the request's id."""
    assert found.headers["content-type"] == "application/xml", found
    root = ET.fromstring(found.body)
    assert root.tag == "Error" and root.findtext("RequestId") == found.headers["x-amz-request-id"] and root.findtext("Message")
    return found.status, str(root.findtext("Code"))


def test_the_signer_of_these_tests_is_right(door: S3Door) -> None:
    assert send(door, *signed(door)).body == FILES["config.json"]
    assert send(door, *signed(door, url=60)).body == FILES["config.json"]


@pytest.mark.parametrize(
    ("what", "code"),
    [
        ("signature", "SignatureDoesNotMatch"),
        ("path", "SignatureDoesNotMatch"),
        ("query", "SignatureDoesNotMatch"),
        ("host", "SignatureDoesNotMatch"),
        ("method", "SignatureDoesNotMatch"),
        ("secret", "SignatureDoesNotMatch"),
        ("other site", "SignatureDoesNotMatch"),
        ("unknown", "SignatureDoesNotMatch"),
        ("foreign", "InvalidAccessKeyId"),
    ],
)
def test_an_altered_request(door: S3Door, what: str, code: str) -> None:
    access, secret = door.pair("low")
    pair = {
        "secret": (access, secret[:-1] + ("A" if secret[-1] != "A" else "B")),
        "other site": (access, secret_of(b"\1" * 32, access)),
        "unknown": ("key-0123456789abcdef", secret),
        "foreign": ("AKIDEXAMPLE", secret),
    }.get(what, (access, secret))
    path, headers = signed(door, pair=pair)
    method = "GET"
    if what == "signature":
        headers["Authorization"] = re.sub(r"Signature=(.)", lambda m: f"Signature={'0' if m[1] != '0' else '1'}", headers["Authorization"])
    elif what == "path":
        path = path.replace("config.json", "empty.txt")
    elif what == "query":
        path += "?versionId=1"
    elif what == "host":
        headers["Host"] = "elsewhere.test"
    elif what == "method":
        method = "HEAD"
    found = send(door, path, headers, method)
    if method == "HEAD":
        assert (found.status, found.body) == (403, b"")
    elif found.status != 503:  # one network may guess so often in a minute, whatever the key
        assert told(found) == (403, code)
    else:
        assert told(found) == (503, "SlowDown") and found.headers["retry-after"]


def test_an_expired_and_a_revoked_key_are_told_so_and_only_to_their_holder(door: S3Door) -> None:
    data, now = door.main.data, time.time()
    secret = secret_of(Home.open(data).pepper(), key_id(door, "expired"))
    status, code, words = refused(door.client((key_id(door, "expired"), secret)).get_object, Bucket=BUCKET, Key=KEY)
    assert (status, code) == (403, "InvalidAccessKeyId") and "expired on 20" in words
    made = door.main.ask("POST", "/airlock/v1/keys", json.dumps({"org": "acme", "models": ["ngc/**"], "actions": ["pull"]}), "root").json()
    asked = door.main.ask("POST", "/airlock/v1/keys/s3", json.dumps({"key_id": made["key_id"]}), "root").json()
    client = door.client((asked["key_id"], asked["secret"]))
    path, headers = signed(door, pair=(asked["key_id"], asked["secret"]), url=3600)
    assert client.get_object(Bucket=BUCKET, Key=KEY)["Body"].read() == send(door, path, headers).body == FILES["config.json"]
    assert door.main.ask("POST", "/airlock/v1/keys/revoke", json.dumps({"key_id": made["key_id"]}), "root").status == 200
    status, code, words = refused(client.get_object, Bucket=BUCKET, Key=KEY)
    assert (status, code) == (403, "InvalidAccessKeyId") and "revoked on 20" in words
    assert told(send(door, path, headers)) == (403, "InvalidAccessKeyId"), "a URL that was signed before ends with its key"
    again = door.main.ask("POST", "/airlock/v1/keys/s3", json.dumps({"key_id": made["key_id"]}), "root")
    assert again.status == 409 and time.time() - now < 60


def key_id(door: S3Door, who: str) -> str:
    """The public id of a key, by the database: an expired one tells nobody."""
    import sqlite3

    from registry.settings import Settings
    from registry.wiring import open_site

    with open_site(Settings.load(door.main.data, environ={}), background=False) as site:
        digest = site.entitlements.hmac(door.main.keys[who])
    with sqlite3.connect(f"file:{door.main.data / 'registry.db'}?mode=ro", uri=True) as db:
        return str(db.execute("select key_id from api_key where hmac = ?", (digest,)).fetchone()[0])


@pytest.mark.parametrize("at", [-16 * 60, 16 * 60, -86400 * 400, 86400 * 30])
def test_a_replay_after_the_skew(door: S3Door, at: float) -> None:
    assert told(send(door, *signed(door, at=at))) == (403, "RequestTimeTooSkewed")


@pytest.mark.parametrize("at", [-14 * 60, 14 * 60])
def test_a_clock_that_is_a_little_off(door: S3Door, at: float) -> None:
    assert send(door, *signed(door, at=at)).status == 200


def test_a_signed_url_ends(door: S3Door) -> None:
    assert send(door, *signed(door, url=3600, at=-3500)).status == 200
    assert told(send(door, *signed(door, url=3600, at=-3601))) == (403, "AccessDenied")
    assert told(send(door, *signed(door, url=3600, at=16 * 60))) == (403, "RequestTimeTooSkewed")
    assert told(send(door, *signed(door, url=8 * 86400))) == (400, "AuthorizationQueryParametersError")
    path, headers = signed(door, url=60)
    assert told(send(door, path + "&X-Amz-Expires=600", headers))[0] == 400
    assert told(send(door, path, headers | {"x-amz-acl": "private"})) == (403, "AccessDenied"), "a header that was not signed"


def test_the_wrong_region_and_service(door: S3Door) -> None:
    found = send(door, *signed(door, region="eu-west-1"))
    assert told(found) == (400, "AuthorizationHeaderMalformed") and b"<Region>us-east-1</Region>" in found.body
    path, headers = signed(door)
    headers["Authorization"] = headers["Authorization"].replace("/s3/", "/sts/")
    assert told(send(door, path, headers)) == (400, "AuthorizationHeaderMalformed")


@pytest.mark.parametrize(
    ("authorization", "code"),
    [
        ("AWS key-0123456789abcdef:c2lnbmF0dXJl", "InvalidRequest"),
        ("Bearer nvapi-x", "InvalidRequest"),
        ("Basic eDp5", "InvalidRequest"),
        ("AWS4-ECDSA-P256-SHA256 Credential=x", "InvalidRequest"),
        ("AWS4-HMAC-SHA256", "AuthorizationHeaderMalformed"),
        ("AWS4-HMAC-SHA256 Credential=,SignedHeaders=,Signature=", "AuthorizationHeaderMalformed"),
        (
            "AWS4-HMAC-SHA256 Credential=key-0123456789abcdef/x/us-east-1/s3/aws4_request,SignedHeaders=host,Signature=" + "0" * 64,
            "AuthorizationHeaderMalformed",
        ),
        ("AWS4-HMAC-SHA256 Credential=\u00e9/\u00ff,SignedHeaders=host;\u00e9,Signature=zz", "AuthorizationHeaderMalformed"),
        ("AWS4-HMAC-SHA256 " + "Credential=" + "x" * 20_000 + ",SignedHeaders=host,Signature=0", "AuthorizationHeaderMalformed"),
        ("AWS4-HMAC-SHA256 " + ",".join(f"a{n}=b" for n in range(2000)), "AuthorizationHeaderMalformed"),
        ("", "InvalidRequest"),
    ],
)
def test_other_credentials(door: S3Door, authorization: str, code: str) -> None:
    when = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    found = send(door, OBJECT, {"Authorization": authorization, "x-amz-date": when, "x-amz-content-sha256": EMPTY})
    assert told(found) == (400, code)


def test_no_credentials_and_parts_of_them(door: S3Door) -> None:
    for path in ("/", f"/{BUCKET}", OBJECT, "/models/x", "/elsewhere/x"):
        assert told(send(door, path, {})) in ((403, "AccessDenied"), (404, "NoSuchKey")), path
    path, headers = signed(door)
    for name, code in (("X-Amz-Date", "AccessDenied"), ("X-Amz-Content-SHA256", "XAmzContentSHA256Mismatch")):
        assert told(send(door, path, {k: v for k, v in headers.items() if k.lower() != name.lower()}))[1] == code
    assert told(send(door, path, headers | {"X-Amz-Security-Token": "x"})) == (400, "InvalidToken")
    assert told(send(door, f"{OBJECT}?AWSAccessKeyId=x&Signature=y&Expires=9999999999", {})) == (400, "InvalidRequest")
    assert told(send(door, f"{OBJECT}?X-Amz-Algorithm=AWS4-HMAC-SHA256", {})) == (400, "AuthorizationQueryParametersError")
    twice, _ = signed(door, url=60)
    assert told(send(door, twice, headers)) == (400, "AuthorizationQueryParametersError")


def test_payloads(door: S3Door) -> None:
    path, headers = signed(door)
    for value, status in (("STREAMING-AWS4-HMAC-SHA256-PAYLOAD", 501), ("STREAMING-UNSIGNED-PAYLOAD-TRAILER", 501), ("0" * 64, 400)):
        found = send(door, path, {k: v for k, v in headers.items() if k.lower() != "x-amz-content-sha256"} | {"x-amz-content-sha256": value})
        assert found.status == status and told(found)
    unsigned = signed(door, X_Amz_Content_SHA256="UNSIGNED-PAYLOAD")
    assert send(door, *unsigned).status == 200
    assert send(door, path, headers | {"Content-Length": "3"}, body=b"abc").status in (200, 400), "a body that nobody asked for is read away"


@pytest.mark.parametrize(
    "key",
    [
        "../../etc/passwd",
        "..%2f..%2fetc%2fpasswd",
        "nim%2Fmeta%2Fllama%3Afp16%3Ffile%3D..%2F..%2Fregistry.db",
        "nim%2Fmeta%2Fllama%3Afp16%3Ffile%3D%2Fetc%2Fpasswd",
        "nim%2Fmeta%2F..%2Fmeta%2Fllama%3Afp16%3Ffile%3Dconfig.json",
        "nim%2Fmeta%2Fllama%3Afp16%3Ffile%3Dconfig.json%00",
        "nim%2Fmeta%2Fllama%3A%00%3Ffile%3Dconfig.json",
        "nim%2Fmeta%2Fllama%3Afp16%3Ffile%3D%FF",
        "nim%2Fmeta%2Fllama%3Afp16%3Ffile%3D",
        "%ED%A0%80",
        "\U0001f600",
        "a" * 900,
        "?file=",
        ":?file=x",
        "x:y?file=z",
        "sha256:" + "0" * 64,
    ],
)
def test_path_tricks_in_keys(door: S3Door, key: str) -> None:
    for bucket in (BUCKET, "models"):
        assert told(send(door, *signed(door, f"/{bucket}/{quote(key, safe='')}"))) == (404, "NoSuchKey")
        assert told(send(door, *signed(door, f"/{bucket}/{quote(key, safe='/')}"))) in ((404, "NoSuchKey"), (400, "InvalidURI"))


def test_keys_that_are_no_utf8_or_too_long(door: S3Door) -> None:
    assert told(send(door, f"/{BUCKET}/%FF%FE", {})) == (400, "InvalidURI")
    assert told(send(door, f"/{BUCKET}?prefix=%FF", signed(door, f"/{BUCKET}?prefix=%FF")[1])) == (400, "InvalidURI")
    assert told(send(door, f"/{BUCKET}/{'a' * 4000}", {})) == (400, "KeyTooLongError")
    assert told(send(door, *signed(door, f"//{BUCKET}/x"))) == (404, "NoSuchBucket")


@pytest.mark.parametrize(
    "query",
    [
        "max-keys=-1",
        "max-keys=x",
        "max-keys=99999999999999999999",
        "encoding-type=base64",
        "list-type=2&continuation-token=%21",
        "&".join(["a=b"] * 300),
    ],
)
def test_arguments_of_listings(door: S3Door, query: str) -> None:
    assert told(send(door, *signed(door, f"/{BUCKET}?{query}"))) == (400, "InvalidArgument")


def test_odd_listings_are_answered(door: S3Door) -> None:
    for query in (
        "prefix=%00",
        "delimiter=%F0%9F%98%80",
        "marker=%EF%BF%BF",
        "start-after=zzz&list-type=2",
        "prefix=" + "a" * 3000,
        "delimiter=&prefix=&max-keys=",
    ):
        found = send(door, *signed(door, f"/models?{query}"))
        assert found.status in (200, 400) and ET.fromstring(found.body) is not None, query


def test_headers_without_end(door: S3Door) -> None:
    path, headers = signed(door)
    many = headers | {f"x-more-{n}": "y" * 100 for n in range(90)}
    assert send(door, path, many).status in (200, 400, 431)
    huge = send(door, path, headers | {"x-huge": "y" * 400_000})
    assert huge.status in (200, 400, 431)


def test_an_other_organisations_key_never_gives_its_secret(door: S3Door) -> None:
    mine = door.main.ask("POST", "/airlock/v1/keys/s3", b"{}", "other").json()
    for who in ("low", "acme"):
        found = door.main.ask("POST", "/airlock/v1/keys/s3", json.dumps({"key_id": mine["key_id"]}), who)
        assert found.status in (403, 404) and mine["secret"] not in found.body.decode()
    assert door.main.ask("POST", "/airlock/v1/keys/s3", json.dumps({"key_id": "key-absent"}), "root").status == 404


def test_no_secret_in_log_and_records(door: S3Door) -> None:
    access, secret = door.pair("low")
    path, headers = signed(door, url=60)
    assert send(door, path, headers).status == 200
    assert refused(door.client((access, secret[::-1])).get_object, Bucket=BUCKET, Key=KEY)[0] in (403, 503)
    time.sleep(0.3)
    log = door.main.log.read_text()
    signature = re.search(r"X-Amz-Signature=([0-9a-f]+)", path)
    assert signature and signature[1] not in log and secret not in log and "traceback" not in log.lower()
    rows = door.main.ask("GET", "/airlock/v1/audit?limit=1000", None, "root").body.decode()
    assert "key_s3" in rows and secret not in rows and MIRRORED in rows
