"""The facts of the public OCI conformance suite on uploads and mounts: every form for both digest algorithms, with auth on."""

from __future__ import annotations

import hashlib
import os
import re

import pytest

from tests.contracts.doors import Door
from tests.contracts.oci_client import ALGORITHMS, FORMS, Client, Reply, chunks, digest, join, post_only

pytestmark = [pytest.mark.server, pytest.mark.timeout(300)]
SIZES = [0, 1, 2048, 700_001]


def absent(client: Client, repo: str, name: str) -> None:
    for method in ("HEAD", "GET"):
        assert client.ask(method, f"/v2/{repo}/blobs/{name}").status == 404


def made(client: Client, repo: str, done: Reply, data: bytes, name: str) -> None:
    """A 201 is true at once: by HEAD, by its Location, and under its digest."""
    assert done.status == 201, done.body
    assert done.get("docker-content-digest") in (name, "") and done.get("location")
    head = client.ask("HEAD", f"/v2/{repo}/blobs/{name}")
    assert (head.status, head.get("content-length"), head.get("docker-content-digest")) == (200, str(len(data)), name)
    for path in (done.get("location"), f"/v2/{repo}/blobs/{name}"):
        found = client.ask("GET", path)
        assert (found.status, found.body, found.get("content-length")) == (200, data, str(len(data)))


# ---- 4.3 upload


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("form", FORMS)
def test_every_form(client: Client, repo: str, form: str, size: int, algorithm: str) -> None:
    data = os.urandom(size)
    name = digest(data, algorithm)
    made(client, repo, FORMS[form](client, repo, data, name), data, name)
    made(client, repo, FORMS[form](client, repo, data, name), data, name)  # a second push of what is there


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("form", FORMS)
def test_every_form_with_the_algorithm_announced(client: Client, repo: str, form: str, algorithm: str) -> None:
    data = os.urandom(3000)
    name = digest(data, algorithm)
    query = f"{'&' if form == 'post' else '?'}digest-algorithm={algorithm}"
    made(client, repo, FORMS[form](client, repo, data, name, query), data, name)


@pytest.mark.parametrize(("announced", "closed"), [("sha256", "sha512"), ("sha512", "sha256")])
def test_closed_with_another_algorithm_than_announced(client: Client, repo: str, announced: str, closed: str) -> None:
    """Either refused with the digest's code and nothing kept, or true."""
    data = os.urandom(3000)
    done = FORMS["streamed"](client, repo, data, digest(data, closed), f"?digest-algorithm={announced}")
    assert done.status in (201, 400)
    if done.status == 201:
        made(client, repo, done, data, digest(data, closed))
    else:
        assert done.codes == ["DIGEST_INVALID"]
        absent(client, repo, digest(data, closed))


@pytest.mark.parametrize("algorithm", ["md5", "sha1", "sha257", "", "../x"])
def test_an_algorithm_that_is_not_kept(client: Client, repo: str, algorithm: str) -> None:
    refused = client.ask("POST", f"/v2/{repo}/blobs/uploads/?digest-algorithm={algorithm}")
    assert refused.status in ((202, 400) if not algorithm else (400,)), algorithm
    assert algorithm == "" or refused.codes[0] in ("DIGEST_INVALID", "UNSUPPORTED")
    assert client.ask("POST", f"/v2/{repo}/blobs/uploads/?digest={algorithm}:{'0' * 64}", b"x").status == 400


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("form", FORMS)
def test_a_wrong_digest(client: Client, repo: str, form: str, algorithm: str) -> None:
    data, wrong = os.urandom(3000), digest(b"something else" + os.urandom(8), algorithm)
    done = FORMS[form](client, repo, data, wrong)
    assert (done.status, done.codes) == (400, ["DIGEST_INVALID"])
    absent(client, repo, wrong)
    absent(client, repo, digest(data, algorithm))


@pytest.mark.parametrize(
    "text", ["sha256:baddigeststring", "sha256:", "sha256", "sha256:" + "A" * 64, "sha256:" + "0" * 63, "sha512:" + "0" * 64, "x" * 500]
)
def test_a_digest_that_is_none(client: Client, repo: str, text: str) -> None:
    place = client.start(repo)
    for done in (post_only(client, repo, b"abc", text), client.ask("PUT", join(place, digest=text), b"abc")):
        assert (done.status, done.codes) == (400, ["DIGEST_INVALID"])
    assert client.ask("PUT", place, b"abc").status == 400  # none at all
    assert client.ask("GET", f"/v2/{repo}/blobs/{text}").status in (400, 404)


def true_state(client: Client, place: str, stored: int) -> str:
    """Status of an upload: 204 with the last stored byte, where there is one, and the Location to go on at."""
    found = client.ask("GET", place)
    assert found.status == 204 and found.get("location")
    assert re.fullmatch(r"[0-9]+-[0-9]+", found.get("range"))
    assert not stored or found.get("range") == f"0-{stored - 1}"
    return found.get("location")


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("last_by_put", [False, True], ids=["patch", "put"])
def test_chunks_out_of_order(client: Client, repo: str, algorithm: str, last_by_put: bool) -> None:
    data = os.urandom(3000)
    name = digest(data, algorithm)

    def chunk(method: str, place: str, lo: int, hi: int) -> Reply:
        target = join(place, digest=name) if method == "PUT" else place
        return client.ask(method, target, data[lo:hi], [("Content-Range", f"{lo}-{hi - 1}"), ("Content-Type", "application/octet-stream")])

    place = client.start(repo)
    assert chunk("PATCH", place, 1000, 2000).status == 416
    place = true_state(client, place, 0)
    first = chunk("PATCH", place, 0, 1000)
    assert (first.status, first.get("range")) == (202, "0-999")
    place = first.get("location")
    for method in ("PATCH", "PUT"):
        for lo, hi in ((2000, 3000), (0, 1000), (999, 1999), (1001, 2001)):
            refused = chunk(method, place, lo, hi)
            assert (refused.status, refused.codes) == (416, ["BLOB_UPLOAD_INVALID"]), (method, lo)
            place = true_state(client, place, 1000)
    absent(client, repo, name)
    second = chunk("PATCH", place, 1000, 2000)
    assert (second.status, second.get("range")) == (202, "0-1999")
    place = true_state(client, second.get("location"), 2000)
    if last_by_put:
        done = chunk("PUT", place, 2000, 3000)
    else:
        third = chunk("PATCH", place, 2000, 3000)
        assert third.get("range") == "0-2999"
        done = client.ask("PUT", join(third.get("location"), digest=name))
    made(client, repo, done, data, name)
    gone = client.ask("GET", place)
    assert (gone.status, gone.codes) == (404, ["BLOB_UPLOAD_UNKNOWN"])


@pytest.mark.parametrize("value", ["bytes 0-9", "0-9/10", "0", "-9", "9-0", "0-x", "0-99999999999999999999", "a-b"])
def test_a_content_range_that_is_none(client: Client, repo: str, value: str) -> None:
    place = client.start(repo)
    assert client.ask("PATCH", place, b"0123456789", [("Content-Range", value)]).status in (400, 416)
    place = true_state(client, place, 0)
    assert client.ask("PUT", join(place, digest=digest(b"0123456789")), b"0123456789").status == 201


def test_a_chunk_that_lies_about_its_length(client: Client, repo: str) -> None:
    place = client.start(repo)
    for span in ("0-4", "0-99"):
        assert client.ask("PATCH", place, b"0123456789", [("Content-Range", span)]).status in (400, 416)
        assert client.ask("PATCH", place, [b"01234", b"56789"], [("Content-Range", span)]).status in (400, 416)


def test_the_least_chunk_is_said_as_a_number(client: Client, repo: str) -> None:
    opened = client.ask("POST", f"/v2/{repo}/blobs/uploads/")
    assert opened.status == 202 and (not opened.get("oci-chunk-min-length") or int(opened.get("oci-chunk-min-length")) <= 64 << 20)
    data = os.urandom(3 * 1024 * 1024 + 17)
    made(client, repo, chunks(client, repo, data, digest(data)), data, digest(data))


@pytest.mark.parametrize("place", ["{}?digest={}&state=x", "{}?state=x&digest={}", "{}?state=%26&digest={}&other"])
def test_the_digest_stands_anywhere_in_the_query(client: Client, repo: str, place: str) -> None:
    data = os.urandom(100)
    target = client.start(repo)
    target = place.format(target.split("?")[0], digest(data).replace(":", "%3A")) + ("&" + target.split("?")[1] if "?" in target else "")
    made(client, repo, client.ask("PUT", target, data), data, digest(data))


@pytest.mark.parametrize("stored", [0, 1000])
def test_cancel(client: Client, repo: str, stored: int) -> None:
    place = client.start(repo)
    if stored:
        place = client.ask("PATCH", place, b"x" * stored).get("location")
    assert client.ask("DELETE", place).status == 204
    for method, target in (("GET", place), ("PATCH", place), ("PUT", join(place, digest=digest(b"x"))), ("DELETE", place)):
        gone = client.ask(method, target, b"x" if method in ("PATCH", "PUT") else b"")
        assert (gone.status, gone.codes) == (404, ["BLOB_UPLOAD_UNKNOWN"]), method


def test_an_upload_is_of_its_repository_and_its_organisation(client: Client, server: Door, repo: str) -> None:
    place = client.start(repo)
    client.start(f"{repo}/other")
    elsewhere = client.ask("PATCH", place.replace(repo, f"{repo}/other"), b"x")
    assert (elsewhere.status, elsewhere.codes) == (404, ["BLOB_UPLOAD_UNKNOWN"])
    assert Client(server.port, server.keys["other"], client.mode).ask("PATCH", place, b"x").status in (401, 403, 404)
    assert Client(server.port, "", "none").raw("PATCH", place, body=b"x").status == 401
    assert client.ask("PATCH", place, b"abc").get("range") == "0-2"


@pytest.mark.parametrize("name", ["no-such-id", "00000000000000000000000000000000", "..%2F..%2Fetc", "a" * 300])
def test_an_upload_that_never_was(client: Client, repo: str, name: str) -> None:
    client.start(repo)
    gone = client.ask("GET", f"/v2/{repo}/blobs/uploads/{name}")
    assert gone.status in (400, 404) and gone.codes[0] in ("BLOB_UPLOAD_UNKNOWN", "NAME_INVALID", "NAME_UNKNOWN")


# ---- 4.4 cross-repository mount


def usable(client: Client, repo: str, reply: Reply, data: bytes, name: str) -> None:
    """A 202 to a mount is an upload like any other."""
    assert reply.status == 202 and reply.get("location")
    made(client, repo, client.ask("PUT", join(reply.get("location"), digest=name), data), data, name)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_mount(client: Client, repo: str, algorithm: str) -> None:
    data = os.urandom(2000)
    name = client.blob(f"{repo}/from", data, algorithm)
    done = client.ask("POST", f"/v2/{repo}/blobs/uploads/?mount={name.replace(':', '%3A')}&from={repo}%2Ffrom")
    assert done.status in (201, 202)
    if done.status == 202:
        usable(client, repo, done, data, name)
    else:
        made(client, repo, done, data, name)
    assert client.ask("DELETE", f"/v2/{repo}/from/blobs/{name}").status == 202
    assert client.ask("GET", f"/v2/{repo}/blobs/{name}").body == data


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_mount_of_what_is_shared_without_copying(client: Client, repo: str, algorithm: str) -> None:
    """Row 7 of the list of tests: 201, since both repositories are ours and readable."""
    name = client.blob(f"{repo}/from", os.urandom(2000), algorithm)
    assert client.ask("POST", f"/v2/{repo}/blobs/uploads/?from={repo}/from&mount={name}&origin=elsewhere").status == 201


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_mount_of_a_missing_blob(client: Client, repo: str, algorithm: str) -> None:
    data = os.urandom(2000)
    client.blob(f"{repo}/from", b"another")
    for source in (f"{repo}/from", f"{repo}/nowhere"):
        reply = client.ask("POST", f"/v2/{repo}/blobs/uploads/?mount={digest(data, algorithm)}&from={source}")
        assert reply.status == 202
        absent(client, repo, digest(data, algorithm))
    usable(client, repo, reply, data, digest(data, algorithm))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_mount_without_a_source(client: Client, repo: str, algorithm: str) -> None:
    data = os.urandom(2000)
    name = client.blob(f"{repo}/from", data, algorithm)
    reply = client.ask("POST", f"/v2/{repo}/blobs/uploads/?mount={name}")
    assert reply.status in (201, 202)
    if reply.status == 202:
        usable(client, repo, reply, data, name)
    else:
        made(client, repo, reply, data, name)


def test_mount_without_pull_right_says_nothing(client: Client, server: Door, repo: str) -> None:
    """Row 8: a key without pull on the source gets 202, the same for what is there and for what is not."""
    data = os.urandom(2000)
    name = client.blob(repo, data)
    other = Client(server.port, server.keys["other"], client.mode)
    mine = f"other/mounts/{hashlib.sha256(repo.encode()).hexdigest()[:8]}"
    there, missing, nowhere = (
        other.ask("POST", f"/v2/{mine}/blobs/uploads/?mount={asked}&from={source}")
        for asked, source in ((name, repo), (digest(b"missing"), repo), (name, "acme/nowhere-at-all"))
    )
    for reply in (there, missing, nowhere):
        assert reply.status == 202 and reply.body == there.body
        assert {k.lower() for k, _ in reply.headers} == {k.lower() for k, _ in there.headers}
    assert other.ask("HEAD", f"/v2/{mine}/blobs/{name}").status == 404
    anonymous = other.ask("POST", f"/v2/{mine}/blobs/uploads/?mount={name}")
    assert anonymous.status == 202  # without a source the whole store must not be searched for others' blobs
    usable(other, mine, there, data, name)


def test_mount_from_a_name_that_is_none(client: Client, repo: str) -> None:
    for source in ("UPPER/x", "..", "a//b", "%00"):
        assert client.ask("POST", f"/v2/{repo}/blobs/uploads/?mount={digest(b'x')}&from={source}").status in (202, 400)
    assert client.ask("POST", f"/v2/{repo}/blobs/uploads/?mount=sha256:bad&from={repo}").status in (202, 400)
