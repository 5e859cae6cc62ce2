"""How many statements each writing operation of the doors costs at most: the number stands here, and no size of what is written changes it.

The reads are in tests/unit/test_lookup.py. A number that goes up is a decision, not an accident.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import event, select

from artifact import manifest as m
from registry import tables as t
from registry.wiring import Site
from tests.site import BACKENDS, make_key, running_site
from tests.unit.test_lookup import served

R = "acme/x"
SIG = "sha256-" + "0" * 64 + ".sig"


@pytest.fixture(params=BACKENDS)
def site(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Site]:
    with running_site(tmp_path, request.param) as opened:
        yield opened


class Costs:
    """Asks the application and counts what its threads send to the database for it: all but the one that makes the audit rows of reads durable."""

    def __init__(self, site: Site) -> None:
        self.site, self.key = site, make_key(site, "acme", "acme/**", actions=("pull", "push"))
        self.seen: list[str] = []
        event.listen(site.engine, "before_cursor_execute", self._note)

    def _note(self, _conn: object, _cursor: object, text: str, *_: object) -> None:
        if threading.current_thread().name != "audit-flush":
            self.seen.append(text)

    def ask(self, method: str, path: str, body: bytes = b"", **headers: str) -> tuple[int, int, dict[str, str]]:
        """Status, statements and headers of one request."""
        self.seen.clear()
        status, answered = served(self.site, method, path, self.key, body, **headers)
        return status, len(self.seen), answered

    def bound(self, most: int, status: int, method: str, path: str, body: bytes = b"", **headers: str) -> None:
        """Asserts a request's status and that it cost at most so many statements."""
        found, count, _ = self.ask(method, path, body, **headers)
        assert found == status and count <= most, (method, path, found, count, self.seen)

    def upload(self, repo: str, data: bytes) -> tuple[int, int, int]:
        """Statements of POST, PATCH and PUT, which must succeed."""
        begun, first, headers = self.ask("POST", f"/v2/{repo}/blobs/uploads/")
        sent, second, _ = self.ask("PATCH", headers["location"], data)
        ended, third, _ = self.ask("PUT", f"{headers['location']}?digest={m.digest_of(data)}")
        assert (begun, sent, ended) == (202, 202, 201)
        return first, second, third

    def whole(self, repo: str, data: bytes) -> int:
        """Statements of an upload in one request."""
        status, count, _ = self.ask("POST", f"/v2/{repo}/blobs/uploads/?digest={m.digest_of(data)}", data)
        assert status == 201
        return count


@pytest.fixture
def costs(site: Site) -> Costs:
    found = Costs(site)
    for repo in (R, "acme/y"):  # the first push of a name also makes its repository
        found.whole(repo, b"{}")
    return found


def image(layers: int, note: str) -> tuple[bytes, list[bytes]]:
    blobs = [f"{note} {n}".encode() for n in range(layers)]
    listed: list[dict[str, object]] = [{"mediaType": "a/b", "digest": m.digest_of(raw), "size": len(raw)} for raw in blobs]
    return m.build_manifest("a/b", listed, {"n": note}), blobs


@pytest.mark.slow
@pytest.mark.parametrize("size", [10, 3_000_000])
def test_an_upload(costs: Costs, size: int) -> None:
    data = os.urandom(size)
    for _ in range(2):  # new, and there already
        begun, sent, ended = costs.upload(R, data)
        assert begun <= 3 and sent <= 7 and ended <= 21, (begun, sent, ended)
    assert costs.whole(R, os.urandom(size)) <= 22, costs.seen


def test_a_mount(costs: Costs) -> None:
    costs.whole(R, b"mounted")
    path = f"/v2/acme/y/blobs/uploads/?mount={m.digest_of(b'mounted')}&from="
    costs.bound(12, 201, "POST", path + R)
    costs.bound(6, 202, "POST", path + "acme/none")


@pytest.mark.slow
@pytest.mark.parametrize("layers", [1, 200])
def test_a_manifest(costs: Costs, layers: int) -> None:
    """The blobs of a manifest are looked up and written together, however many there are."""
    raw, blobs = image(layers, "one")
    again, more = image(layers, "two")
    for data in {*blobs, *more}:
        costs.whole(R, data)
    place = f"/v2/{R}/manifests/"
    for most, body in ((15, raw), (17, raw), (17, again)):  # a new one, the same again, and the tag moved
        costs.bound(most, 201, "PUT", place + "1", body, content_type=m.MANIFEST)
    costs.bound(15, 201, "PUT", place + m.digest_of(raw), raw, content_type=m.MANIFEST)
    costs.bound(17, 201, "PUT", place + SIG, raw, content_type=m.MANIFEST)
    costs.bound(17, 409, "PUT", place + SIG, again, content_type=m.MANIFEST)
    costs.bound(7, 202, "DELETE", place + "1")
    # Besides the removal: is it a manifest, do profiles name it (both before the transaction and in it), or an index of an immutable repository?
    costs.bound(12 + 5, 202, "DELETE", place + m.digest_of(again))
    costs.bound(8 + 2, 202, "DELETE", f"/v2/{R}/blobs/{m.digest_of(more[0])}")


@pytest.mark.slow
@pytest.mark.parametrize("files", [1, 200])
def test_a_commit_of_the_hub(costs: Costs, files: int) -> None:
    """What was uploaded before is committed at the same cost, however much it is; each object of a batch is looked up."""
    raws = [f"{files} {n}".encode() for n in range(files)]
    for raw in raws:
        costs.whole(R, raw)
    batch = {"operation": "upload", "objects": [{"oid": m.digest_of(raw)[7:], "size": len(raw)} for raw in raws]}
    costs.bound(6 + files, 200, "POST", f"/{R}.git/info/lfs/objects/batch", json.dumps(batch).encode())
    lines = [{"key": "header", "value": {"summary": "words"}}]
    lines += [{"key": "lfsFile", "value": {"path": f"{n}.bin", "oid": m.digest_of(raw)[7:], "size": len(raw)}} for n, raw in enumerate(raws)]
    body = "\n".join(map(json.dumps, lines)).encode()
    for most in (60, 11):  # of which 44 store the facts layer and the config; what changes nothing stores nothing
        costs.bound(most, 200, "POST", f"/api/models/{R}/commit/main", body)


def test_a_token(costs: Costs) -> None:
    path = "/token?service=x" + "".join(f"&scope=repository:{name}:pull,push" for name in (R, "acme/y"))
    costs.ask("GET", path)  # the first of 15 minutes also writes its audit row
    costs.bound(1 + 2, 200, "GET", path)


def test_a_lease_refreshed(site: Site, costs: Costs) -> None:
    costs.whole(R, b"leased")
    path = f"/v2/{R}/blobs/{m.digest_of(b'leased')}"
    costs.bound(1, 200, "HEAD", path)
    with site.catalog.writing() as conn:
        conn.execute(t.blob.update().values(lease_until=1.0))
        conn.execute(t.repo_blob.update().values(lease_until=1.0))
    costs.bound(3, 200, "HEAD", path)
    with site.catalog.reading() as conn:
        assert min(conn.execute(select(t.repo_blob.c.lease_until).where(t.repo_blob.c.digest == m.digest_of(b"leased"))).scalars()) > 1.0
    costs.bound(1, 200, "HEAD", path)
