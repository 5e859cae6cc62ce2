"""Attack cases A01 to A15 of the registry protocol, as raw bytes on a socket: refused in the protocol's own form, never a 500, and nothing kept."""

from __future__ import annotations

import json
import os
import socket
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from artifact.grant import Grant
from artifact.manifest import build_manifest
from artifact.store import Descriptor
from artifact.trust import SIGNATURE, SIMPLE_SIGNING
from registry import tables
from registry.catalog import ensure_org
from registry.settings import Settings
from registry.wiring import open_site
from tests.contracts.doors import EMPTY, INDEX, MANIFEST, Door, new_site, serving, sha

pytestmark = pytest.mark.server
R = "acme/app"
CONFIG = {"mediaType": EMPTY, "digest": sha(b"{}"), "size": 2}


@pytest.fixture(scope="module")
def door(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Door]:
    data = tmp_path_factory.mktemp("hostile") / "data"
    keys = new_site(data)
    with serving(data, keys, AIRLOCK_GC_EVERY_S="0") as found:  # what is let go of stays where it is: the tests compare all rows
        found.blob(R, b"{}")
        yield found
        lines = [json.loads(line) for line in found.log.read_text().splitlines() if line.startswith("{")]
        assert not [line for line in lines if line["level"] == "error"], "an unexpected failure was logged"


@dataclass
class Raw:
    """An answer as it came, and whether the server closed the connection."""

    status: int
    head: bytes
    body: bytes
    closed: bool

    @property
    def code(self) -> str:
        return str(json.loads(self.body)["errors"][0]["code"])


def send(door: Door, head: str, body: bytes = b"", who: str = "acme", chunked: bool = False) -> Raw:
    """Sends one request byte for byte and reads one answer."""
    lines = f"{head}\r\nHost: x\r\nAuthorization: Bearer {door.keys[who]}\r\n"
    lines += "Transfer-Encoding: chunked\r\n\r\n" if chunked else f"Content-Length: {len(body)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", door.port), timeout=20) as sock:
        sock.sendall(lines.encode("utf-8"))
        if chunked:
            for at in range(0, len(body), 65536):
                part = body[at : at + 65536]
                sock.sendall(b"%x\r\n" % len(part) + part + b"\r\n")
            sock.sendall(b"0\r\n\r\n")
        else:
            sock.sendall(body)
        got = b""
        while b"\r\n\r\n" not in got:
            piece = sock.recv(65536)
            assert piece, got
            got += piece
        start, _, rest = got.partition(b"\r\n\r\n")
        size = next((int(row.split(b":")[1]) for row in start.split(b"\r\n") if row.lower().startswith(b"content-length:")), 0)
        while len(rest) < size and not head.startswith("HEAD"):
            piece = sock.recv(65536)
            assert piece, "the answer is shorter than its length"
            rest += piece
        sock.settimeout(0.05)
        try:
            closed = sock.recv(1) == b""
        except TimeoutError:
            closed = False
        except ConnectionResetError:
            closed = True
    return Raw(int(start.split()[1]), start, rest, closed)


TABLES = ("repository", "manifest", "ref", "ref_history", "repo_manifest", "edge", "blob", "blob_alias", "repo_blob", "upload", "garbage")


def state(door: Door) -> dict[str, object]:
    """Every row that content leaves, and every file of the store: a refused request changes none of it."""
    with closing(sqlite3.connect(f"file:{door.data}/registry.db?mode=ro", uri=True)) as db:
        # Not when the sweep looks again, which it moves at any time itself.
        columns = {table: [c[1] for c in db.execute(f"PRAGMA table_info({table})") if c[1] != "gc_after"] for table in TABLES}
        rows: dict[str, object] = {
            table: sorted(map(repr, db.execute(f"SELECT {', '.join(map(json.dumps, names))} FROM {table}"))) for table, names in columns.items()
        }
    return rows | {"files": sorted(str(p) for folder in ("blobs", "partial") for p in (door.data / folder).rglob("*") if p.is_file())}


@contextmanager
def unchanged(door: Door) -> Iterator[None]:
    """Nothing that is kept differs afterwards."""
    before = state(door)
    yield
    after = state(door)
    assert after == before, {k: (before[k], after[k]) for k in before if before[k] != after[k]}


def put(door: Door, raw: bytes, ref: str = "evil", media_type: str = MANIFEST, chunked: bool = False) -> Raw:
    return send(door, f"PUT /v2/{R}/manifests/{ref} HTTP/1.1\r\nContent-Type: {media_type}", raw, chunked=chunked)


def refused(found: Raw, status: int, *codes: str) -> None:
    assert found.status == status, found
    assert found.code in codes, found
    assert b"Traceback" not in found.body and b"/data" not in found.body


@pytest.mark.parametrize("media_type", [MANIFEST, INDEX])
@pytest.mark.parametrize("fields", [("manifests", "layers", "config"), ("manifests", "layers"), ("manifests", "config")])
def test_a01_a_manifest_that_is_two_things(door: Door, media_type: str, fields: tuple[str, ...]) -> None:
    values: dict[str, Any] = {"manifests": [], "layers": [], "config": CONFIG}
    doc = {"schemaVersion": 2, "mediaType": media_type, **{f: values[f] for f in fields}}
    with unchanged(door):
        refused(put(door, json.dumps(doc).encode(), media_type=media_type), 400, "MANIFEST_INVALID")
    assert send(door, f"GET /v2/{R}/manifests/evil HTTP/1.1").status == 404


def peak(door: Door) -> int:
    text = Path(f"/proc/{door.process.pid}/status").read_text()
    return int(next(line.split()[1] for line in text.splitlines() if line.startswith("VmRSS")))


@pytest.mark.parametrize("chunked", [True, False])
def test_a02_a_manifest_over_the_limit(door: Door, chunked: bool) -> None:
    before = peak(door)
    raw = b"{" + b" " * (4 * 1024 * 1024)
    with unchanged(door):
        for _ in range(5):
            found = put(door, raw, chunked=chunked)
            refused(found, 413, "MANIFEST_INVALID")
            assert found.closed
    assert peak(door) - before < 40_000, "KiB"
    fits = json.dumps({"schemaVersion": 2, "mediaType": MANIFEST, "config": CONFIG, "layers": []}).encode().ljust(4 * 1024 * 1024)
    assert put(door, fits, "fits", chunked=chunked).status == 201
    assert send(door, f"GET /v2/{R}/manifests/fits HTTP/1.1").body == fits


HOSTILE_JSON = {
    "nested": b'{"schemaVersion":2,"x":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "unclosed": b"[" * 100_000,
    "objects": b'{"a":' * 50_000,
    "duplicate": b'{"schemaVersion":2,"mediaType":"%s","config":{"mediaType":"a/b","digest":"%s","digest":"%s","size":2},"layers":[]}'
    % (MANIFEST.encode(), sha(b"{}").encode(), sha(b"").encode()),
    "nan": b'{"schemaVersion":2,"x":NaN}',
    "infinity": b'{"schemaVersion":2,"x":-Infinity}',
    "bom": b"\xef\xbb\xbf{}",
    "utf16": '{"schemaVersion":2}'.encode("utf-16"),
    "bytes": b'{"a":"\xff\xfe"}',
    "empty": b"",
    "list": b"[]",
    "null": b"null",
    "digits": b'{"schemaVersion":2,"size":' + b"9" * 100_000 + b"}",
    "types": json.dumps({"schemaVersion": 2, "mediaType": MANIFEST, "config": 7, "layers": {}}).encode(),
    "sizes": json.dumps({"schemaVersion": 2, "mediaType": MANIFEST, "config": {**CONFIG, "size": -1}, "layers": []}).encode(),
    "bool": json.dumps({"schemaVersion": 2, "mediaType": MANIFEST, "config": {**CONFIG, "size": True}, "layers": []}).encode(),
    "huge": json.dumps({"schemaVersion": 2, "mediaType": MANIFEST, "config": {**CONFIG, "size": 10**30}, "layers": []}).encode(),
    "subject": json.dumps({"schemaVersion": 2, "mediaType": MANIFEST, "config": CONFIG, "layers": [], "subject": "x"}).encode(),
    "notes": json.dumps({"schemaVersion": 2, "mediaType": MANIFEST, "config": CONFIG, "layers": [], "annotations": {"a": 1}}).encode(),
    "surrogate": b'{"schemaVersion":2,"mediaType":"%s","config":%s,"layers":[],"annotations":{"a":"\\ud800"},"artifactType":"\\ud800"}'
    % (MANIFEST.encode(), json.dumps(CONFIG).encode()),
}


@pytest.mark.parametrize("name", sorted(HOSTILE_JSON))
def test_a03_hostile_json(door: Door, name: str) -> None:
    with unchanged(door):
        refused(put(door, HOSTILE_JSON[name]), 400, "MANIFEST_INVALID", "DIGEST_INVALID", "MANIFEST_BLOB_UNKNOWN")


BAD_DIGESTS = [
    "sha256:../../etc/passwd",
    "sha256:..%2f..%2fetc%2fpasswd",
    "sha256:" + "A" * 64,
    "sha256:" + "a" * 63,
    "sha256:" + "a" * 65,
    "sha512:" + "a" * 64,
    "md5:" + "a" * 32,
    "sha256:" + "a" * 64 + "%00",
    "sha256:" + "a" * 64 + "%0a",
    "sha256%253A" + "a" * 64,
    "a" * 64,
    ":",
    "",
]


@pytest.mark.parametrize("digest", BAD_DIGESTS)
def test_a04_digests_outside_the_grammar(door: Door, digest: str) -> None:
    with unchanged(door):
        _a04(door, digest)


def _a04(door: Door, digest: str) -> None:
    for method in ("GET", "DELETE"):
        refused(send(door, f"{method} /v2/{R}/blobs/{digest} HTTP/1.1"), 400, "DIGEST_INVALID", "NAME_INVALID")
    assert send(door, f"HEAD /v2/{R}/blobs/{digest} HTTP/1.1").status == 400
    if ":" in digest:
        assert send(door, f"GET /v2/{R}/manifests/{digest} HTTP/1.1").status in (400, 404)
    refused(send(door, f"GET /v2/{R}/referrers/{digest} HTTP/1.1"), 400, "DIGEST_INVALID", "NAME_INVALID", "UNSUPPORTED")
    if digest:
        refused(send(door, f"POST /v2/{R}/blobs/uploads/?digest={digest} HTTP/1.1", b"x"), 400, "DIGEST_INVALID")
        refused(send(door, f"POST /v2/{R}/blobs/uploads/?mount={digest}&from={R} HTTP/1.1"), 400, "DIGEST_INVALID")


def test_a05_an_upload_that_lies_about_its_digest(door: Door) -> None:
    with unchanged(door):
        _a05(door)


def _a05(door: Door) -> None:
    data, other = os.urandom(100_000), sha(os.urandom(10))
    place = send(door, f"POST /v2/{R}/blobs/uploads/ HTTP/1.1")
    where = next(row.split(b": ")[1].decode() for row in place.head.split(b"\r\n") if row.lower().startswith(b"location"))
    assert send(door, f"PATCH {where} HTTP/1.1", data).status == 202
    refused(send(door, f"PUT {where}?digest={other} HTTP/1.1"), 400, "DIGEST_INVALID")
    for digest in (other, sha(data)):
        assert send(door, f"GET /v2/{R}/blobs/{digest} HTTP/1.1").status == 404
    refused(send(door, f"PUT {where}?digest={sha(data)} HTTP/1.1"), 404, "BLOB_UPLOAD_UNKNOWN")
    store = door.data / "blobs"
    assert not [p for p in store.rglob("*") if p.name.startswith((other[7:], sha(data)[7:]))]


def test_a06_mounts_from_where_the_key_may_not_pull(door: Door) -> None:
    secret = door.blob("other/secret", os.urandom(1000), who="other")
    door.blob("acme/closed/tool", b"closed", who="acme")
    before = state(door)
    for source in ("other/secret", "other/nothing", "acme/none"):
        found = door.ask("POST", f"/v2/{R}/blobs/uploads/?mount={secret}&from={source}")
        assert found.status == 202 and "docker-content-digest" not in found.headers, "the same answer whether it exists or not"
        assert door.ask("DELETE", found.headers["location"]).status == 204
    assert door.ask("HEAD", f"/v2/{R}/blobs/{secret}").status == 404
    assert door.ask("POST", f"/v2/acme/open/x/blobs/uploads/?mount={sha(b'closed')}&from=acme/closed/tool", who="reader").status == 403
    assert state(door) == before


def test_a07_a_blob_deleted_here_and_read_there_stays_deleted_here(door: Door) -> None:
    digest = door.blob(R, b"deleted in one")
    door.blob("acme/second", b"deleted in one")
    assert door.ask("DELETE", f"/v2/{R}/blobs/{digest}").status == 202
    for _ in range(3):
        assert door.ask("GET", f"/v2/acme/second/blobs/{digest}").body == b"deleted in one"
        assert door.ask("GET", f"/v2/{R}/blobs/{digest}").status == door.ask("HEAD", f"/v2/{R}/blobs/{digest}").status == 404
    refused(send(door, f"DELETE /v2/{R}/blobs/{digest} HTTP/1.1"), 404, "BLOB_UNKNOWN")


def test_a08_tags_that_a_key_may_not_move(door: Door) -> None:
    repo, now = "acme/tags/kept", time.time()
    for tag in ("latest", "v1"):
        door.image(repo, tag, [b"first"])
    with open_site(Settings.load(door.data), background=False) as site, site.catalog.writing() as conn:
        grant = Grant(("acme/tags/*",), ("pull", "create"))
        door.keys["maker"] = site.entitlements.add_key(conn, ensure_org(conn, "acme", now), tier="developer", grant=grant, expires=0, at=now)[1]
    digest, raw = door.image(repo, "by-maker", [b"second"], who="maker")
    with unchanged(door):
        for path in ("latest", "v1", f"{digest}?tag=new&tag=v1"):
            moved = door.ask("PUT", f"/v2/{repo}/manifests/{path}", raw, who="maker", Content_Type=MANIFEST)
            assert (moved.status, moved.code) == (403, "DENIED"), path
        for path in (f"manifests/{digest}", "manifests/v1", f"blobs/{sha(b'first')}"):
            assert door.ask("DELETE", f"/v2/{repo}/{path}", who="maker").status == 403, path
    with open_site(Settings.load(door.data), background=False) as site, site.catalog.writing() as conn:
        conn.execute(tables.repository.update().where(tables.repository.c.name == repo).values(immutable=True))
    with unchanged(door):
        for ref in ("latest", "v1"):
            moved = door.ask("PUT", f"/v2/{repo}/manifests/{ref}", raw, Content_Type=MANIFEST)
            assert (moved.status, moved.code) == (403, "DENIED"), "admins too"
            assert door.ask("DELETE", f"/v2/{repo}/manifests/{ref}").status == 403


@pytest.mark.parametrize("path", ["_catalog", f"{R}/tags/list"])
def test_a09_listings_are_bounded(door: Door, path: str) -> None:
    found = door.image(R, "listed", [b"x"])
    assert found
    assert send(door, f"GET /v2/{path}?n=2000000000 HTTP/1.1").status == 200
    assert send(door, f"GET /v2/{path}?n={'9' * 18} HTTP/1.1").status == 200
    for query in ("n=-1", "n=x", "n=1e3", f"n={'9' * 40}", "n=%D9%A3", "last=%00", "last=a%0d%0ab", "last=%ff", "last=" + "a" * 2000):
        assert send(door, f"GET /v2/{path}?{query} HTTP/1.1").status == 400, query
    assert send(door, f"GET /v2/{path}?{'&'.join('a=b' for _ in range(300))} HTTP/1.1").status in (200, 400)


def test_a10_listings_show_a_key_its_own(door: Door) -> None:
    door.image("other/hidden", "1", [b"hidden"], who="other")
    digest, _raw = door.image("acme/shown", "1", [b"shown"])
    for path in ("_catalog", "acme/shown/tags/list", f"acme/shown/referrers/{digest}"):
        assert door.ask("GET", f"/v2/{path}", who=None).status == 401
    for who, other in (("acme", "other/"), ("other", "acme/")):
        names = door.ask("GET", "/v2/_catalog", who=who).json()["repositories"]
        assert names and not [n for n in names if n.startswith(other)]
    hidden = door.ask("GET", "/v2/acme/shown/tags/list", who="other")
    absent = door.ask("GET", "/v2/acme/never/tags/list", who="other")
    assert hidden.status == absent.status == 404 and hidden.body.replace(b"shown", b"never") == absent.body
    none = door.ask("GET", f"/v2/acme/shown/referrers/{digest}", who="other")
    assert (none.status, none.json()["manifests"]) == (200, [])


def false_signatures(door: Door, repo: str, count: int) -> tuple[str, dict[str, str]]:
    """Fills a repository with referrers of one image, past the door for speed; the image's digest and their digests with their artifact types."""
    digest, raw = door.image(repo, "1", [b"signed"])
    subject = Descriptor(MANIFEST, digest, len(raw))
    docs = [build_manifest(f"t/signature{n % 3}", [], {"n": str(n)}, subject) for n in range(count)]
    made = {sha(doc): f"t/signature{n % 3}" for n, doc in enumerate(docs)}
    with open_site(Settings.load(door.data), background=False) as site, site.catalog.writing() as conn:
        link, m = tables.repo_manifest, tables.manifest.c
        rows = [{"digest": sha(doc), "artifact_type": made[sha(doc)], "size": len(doc), "raw": doc} for doc in docs]
        conn.execute(tables.manifest.insert().values(media_type=MANIFEST, subject=digest), rows)
        ids = [row.id for row in conn.execute(select(m.id).where(m.subject == digest))]
        repo_id = conn.execute(select(tables.repository.c.id).where(tables.repository.c.name == repo)).scalar_one()
        conn.execute(link.insert(), [{"repo_id": repo_id, "manifest_id": one, "at": 0.0} for one in ids])
        conn.execute(tables.edge.insert(), [{"parent_id": one, "child_digest": digest, "kind": "subject"} for one in ids])
    return digest, made


def test_a11_many_false_signatures_on_one_subject(door: Door) -> None:
    repo, count = "acme/signed", 10_000
    digest, made = false_signatures(door, repo, count)
    seen: list[str] = []
    path, pages = f"/v2/{repo}/referrers/{digest}", 0
    before, begun = peak(door), time.monotonic()
    while path:
        page = door.ask("GET", path)
        assert page.status == 200 and len(page.body) < 1_000_000 and len(page.json()["manifests"]) <= 1_000
        seen += [d["digest"] for d in page.json()["manifests"]]
        path, pages = page.headers.get("link", "").partition(">")[0].removeprefix("<"), pages + 1
    assert seen == sorted(made) and count / 1_000 <= pages <= 20
    assert peak(door) - before < 40_000, "KiB"
    assert time.monotonic() - begun < 30
    assert door.ask("GET", f"/v2/{repo}/referrers/{digest}?after=%00").status == 400


def test_a12_of_two_writers_of_one_tag_one_wins(door: Door) -> None:
    repo = "acme/raced"
    door.image(repo, "v", [b"begin"])
    etag = door.ask("HEAD", f"/v2/{repo}/manifests/v").headers["etag"]
    made = [door.image(repo, "", [b"writer %d" % n]) for n in range(8)]
    answers: list[tuple[int, str]] = []

    def write(digest: str, raw: bytes) -> None:
        answers.append((door.ask("PUT", f"/v2/{repo}/manifests/v", raw, Content_Type=MANIFEST, If_Match=etag).status, digest))

    threads = [threading.Thread(target=write, args=pair) for pair in made]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(status for status, _ in answers) == [201] + [412] * 7
    assert door.ask("HEAD", f"/v2/{repo}/manifests/v").headers["docker-content-digest"] == dict(answers)[201]


CLAIM = b"what all of them sign"


def signature(held: bytes | None, *signers: str) -> bytes:
    """The `.sig` manifest that a signer pushes: the layers that were there and its own, as cosign makes it."""
    layers = json.loads(held)["layers"] if held else []
    layers += [{"mediaType": SIMPLE_SIGNING, "digest": sha(CLAIM), "size": len(CLAIM), "annotations": {SIGNATURE: s}} for s in signers]
    return json.dumps({"schemaVersion": 2, "mediaType": MANIFEST, "config": CONFIG, "layers": layers}).encode()


def signers_of(door: Door, path: str) -> list[str]:
    return sorted(layer["annotations"][SIGNATURE] for layer in door.ask("GET", path).json()["layers"])


def test_a12_of_two_signers_of_one_tag_none_is_lost(door: Door) -> None:
    """Each reads the tag, waits until all have read it, and pushes: a refused one reads again. `If-Match` is not sent: cosign does not."""
    repo, count = "acme/signers", 4
    digest, _raw = door.image(repo, "v", [b"signed by many"])
    path = f"/v2/{repo}/manifests/{digest.replace(':', '-')}.sig"
    door.blob(repo, CLAIM)
    read = threading.Barrier(count)
    answers: list[tuple[int, str]] = []

    def sign(signer: str) -> None:
        for turn in range(count):
            found = door.ask("GET", path)
            raw = signature(found.body if found.status == 200 else None, signer)
            if not turn:
                read.wait(60)
            pushed = door.ask("PUT", path, raw, Content_Type=MANIFEST)
            answers.append((pushed.status, pushed.body.decode()))
            if pushed.status == 201:
                assert pushed.headers["docker-content-digest"] == sha(raw), "what was pushed is what is kept"
                return

    threads = [threading.Thread(target=sign, args=(f"signer {n}",)) for n in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert signers_of(door, path) == [f"signer {n}" for n in range(count)]
    told = [text for status, text in answers if status != 201]
    assert len(told) >= count - 1 and {status for status, _ in answers} == {201, 409}
    assert all("read the tag again and add yours" in text for text in told)
    with unchanged(door):
        refused(put_at(door, path, signature(None, "alone")), 409, "CONFLICT")
        refused(put_at(door, path, json.dumps({"schemaVersion": 2, "mediaType": INDEX, "manifests": []}).encode(), INDEX), 409, "CONFLICT")
    etag = door.ask("HEAD", path).headers["etag"]
    replaced = door.ask("PUT", path, signature(None, "alone"), Content_Type=MANIFEST, If_Match=etag)
    assert replaced.status == 201 and signers_of(door, path) == ["alone"], "who names what it replaces may"
    assert door.ask("DELETE", path).status == 202
    assert put_at(door, path, signature(None, "anew")).status == 201


def put_at(door: Door, path: str, raw: bytes, media_type: str = MANIFEST) -> Raw:
    return send(door, f"PUT {path} HTTP/1.1\r\nContent-Type: {media_type}", raw)


def test_a13_uploads_of_others_and_chunks_out_of_place(door: Door) -> None:
    place = door.ask("POST", f"/v2/{R}/blobs/uploads/").headers["location"]
    assert door.ask("PATCH", place, b"0123456789", Content_Range="0-9").status == 202
    theirs = place.replace(R, "other/app")
    with unchanged(door):
        for method in ("GET", "PATCH", "PUT", "DELETE"):
            path = f"{theirs}?digest={sha(b'x')}" if method == "PUT" else theirs
            answer = door.ask(method, path, b"x" if method in ("PATCH", "PUT") else None, who="other")
            assert (answer.status, answer.code) == (404, "BLOB_UPLOAD_UNKNOWN"), method
            assert door.ask(method, path.replace("other/app", R), b"x", who="other").status == 404
            assert door.ask(method, path.replace("other/app", "acme/second"), b"x").status == 404
    for span in ("0-9", "5-14", "9-18", "11-20", "10-8", "10", "-1-5", "99999999999999999999-5", "a-b", "٣-٤".encode().decode("latin-1")):
        answer = door.ask("PATCH", place, b"0123456789", Content_Range=span)
        assert (answer.status, answer.headers["range"]) == (416, "0-9"), span
        assert door.ask("PUT", f"{place}?digest={sha(b'x')}", b"0123456789", Content_Range=span).status == 416
    done = door.ask("PUT", f"{place}?digest={sha(b'0123456789ab')}", b"ab", Content_Range="10-11")
    assert done.status == 201 and door.ask("GET", done.headers["location"]).body == b"0123456789ab"


BAD_NAMES = ["..", "a//b", "a/.git", "a" * 256, "a/../b", "%2e%2e%2f", "%252e%252e", "a%2f%2fb", "A/b", "a/b%00", "a/b%0a", "acm%D0%B5/app"]
BAD_NAMES += ["a/", "/a", "-a/b", "a_-b", "api/x", "v2/x", "airlock/x", "a:b/c", "a@b", "a\\b", "%ff/a", "acme/app/", "./acme/app", "a b"]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_a14_names_outside_the_grammar(door: Door, name: str) -> None:
    with unchanged(door):
        _a14(door, name)


def _a14(door: Door, name: str) -> None:
    requests = [("GET", tail, b"") for tail in ("manifests/1", "tags/list", f"blobs/{sha(b'')}", f"referrers/{sha(b'')}")]
    for method, tail, body in (*requests, ("POST", "blobs/uploads/", b""), ("PUT", "manifests/1", b"{}")):
        found = send(door, f"{method} /v2/{name}/{tail} HTTP/1.1", body)
        if " " in name:  # no request line of HTTP at all: refused before a door reads it, and the connection ends
            assert (found.status, found.closed) == (400, True), found
        else:
            refused(found, 400, "NAME_INVALID")


def test_a15_the_stated_type_is_the_stored_type(door: Door) -> None:
    raw = json.dumps({"schemaVersion": 2, "mediaType": MANIFEST, "config": CONFIG, "layers": []}).encode()
    docker = "application/vnd.docker.distribution.manifest.v2+json"
    with unchanged(door):
        for other in (INDEX, docker, "text/html", "application/octet-stream"):
            refused(put(door, raw, "typed", other), 400, "MANIFEST_INVALID")
    assert put(door, raw, "typed").status == 201
    for accept in (INDEX, docker, "text/html", "*/*", ""):
        found = send(door, f"GET /v2/{R}/manifests/typed HTTP/1.1\r\nAccept: {accept}")
        assert found.status == 200 and b"content-type: " + MANIFEST.encode() + b"\r\n" in found.head + b"\r\n" and found.body == raw


def test_garbage_on_the_wire(door: Door) -> None:
    for garbage in (
        b"\x16\x03\x01\x02\x00",
        b"GET\r\n\r\n",
        b"GET /v2/ HTTP/1.1\r\nContent-Length: -5\r\n\r\n",
        b"\x00" * 100,
        b"GET /\xff\xfe HTTP/1.1\r\n\r\n",
    ):
        with socket.create_connection(("127.0.0.1", door.port), timeout=5) as sock:
            sock.sendall(garbage)
            sock.shutdown(socket.SHUT_WR)
            sock.settimeout(3)
            try:
                got = sock.recv(65536)
            except (TimeoutError, ConnectionResetError):
                got = b""
            assert got == b"" or got.startswith((b"HTTP/1.1 400", b"HTTP/1.1 401", b"HTTP/1.1 404")), got
    for target in ("*", "%2Fv2/", "http://x", ""):
        with socket.create_connection(("127.0.0.1", door.port), timeout=5) as sock:
            sock.sendall(f"GET {target} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
            assert sock.recv(65536).startswith(b"HTTP/1.1 400"), target
    both = "POST /v2/acme/app/blobs/uploads/ HTTP/1.1\r\nTransfer-Encoding: chunked"
    assert send(door, both, b"5\r\nabcde\r\n0\r\n\r\n").status == 400  # two framings of one body: request smuggling
    time.sleep(0.1)
    assert send(door, "GET /v2/ HTTP/1.1").status == 200
