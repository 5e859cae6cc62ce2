"""A server whose object store goes away, stalls or is overloaded, beside clients that push and pull: what they are told, and that nothing is lost."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.contracts.doors import Answer, Door, new_site, sha
from tests.contracts.stores import credentials, s3_url
from tests.fakes.unsteady import Unsteady
from tests.operated import LONG_S, Operated, operated, wait_for
from tests.services import rgw

pytestmark = pytest.mark.server
MIB = 1024 * 1024
REPO = "acme/app"
BIG = os.urandom(32 * MIB + 5)  # more than two sockets' buffers hold


@pytest.fixture(scope="module")
def gateway() -> Iterator[rgw.Rgw]:
    """A gateway of this module's own."""
    with rgw.own() as made:
        yield made


@pytest.fixture
def proxy() -> Iterator[Unsteady]:
    """A network between the server and the run's gateway that a test can disturb."""
    made = Unsteady(rgw.shared().port)
    yield made
    made.close()


@contextmanager
def over(data: Path, url: str) -> Iterator[Operated]:
    """A server over a bucket, with patient clients; the store's host name is the server's, so that bytes are streamed."""
    with operated(data, new_site(data, AIRLOCK_BLOBS=url), AIRLOCK_BLOBS=url) as server:
        server.wait_s = LONG_S
        yield server


def joined(place: str, digest: str) -> str:
    return f"{place}{'&' if '?' in place else '?'}digest={digest}"


def push(door: Door, raw: bytes) -> str:
    """A blob as docker pushes it, and its path."""
    patched = door.ask("PATCH", door.ask("POST", f"/v2/{REPO}/blobs/uploads/").headers["location"], raw)
    done = door.ask("PUT", joined(patched.headers["location"], sha(raw)), b"")
    assert done.status == 201, done.body
    return f"/v2/{REPO}/blobs/{sha(raw)}"


class Pushers:
    """Clients that push small blobs without a pause: what was confirmed, what was refused, what was neither."""

    def __init__(self, door: Door) -> None:
        self.door, self.over = door, threading.Event()
        self.stored: dict[str, bytes] = {}
        self.refused: list[Answer] = []
        self.strange: list[object] = []

    def _push(self) -> None:
        while not self.over.is_set():
            raw = os.urandom(random.randrange(1, 60_000))
            try:
                answer = self.door.ask("POST", f"/v2/{REPO}/blobs/uploads/?digest={sha(raw)}", raw)
            except OSError as error:
                self.strange.append(error)
                continue
            if answer.status == 201:
                self.stored[sha(raw)] = raw
            elif answer.status == 503:
                self.refused.append(answer)
            else:
                self.strange.append((answer.status, answer.body))

    @contextmanager
    def running(self) -> Iterator[None]:
        """Three of them, until the block ends."""
        threads = [threading.Thread(target=self._push) for _ in range(3)]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self.over.set()
            for thread in threads:
                thread.join(LONG_S)

    def grow(self, count: int) -> None:
        """Waits until so many more were confirmed."""
        wanted = len(self.stored) + count
        wait_for(lambda: len(self.stored) >= wanted, f"{count} more confirmed pushes")


def told(answer: Answer, words: str) -> None:
    """A 503 with a sentence, what to do, and no secret."""
    text = answer.body.decode()
    assert answer.status == 503 and words in text and "look at the object store" in text and rgw.SECRET not in text, (answer.status, text)


def not_ready(server: Operated) -> None:
    """/readyz names the store, and nothing else, while the process goes on living."""

    def refused() -> str:
        status, text = server.operator("/readyz")
        return text if status == 503 else ""

    checks = json.loads(wait_for(refused, "not ready"))["checks"]
    assert checks.pop("store") != "ok" and checks == {"draining": "ok", "database": "ok"}, checks
    assert server.operator("/healthz")[0] == 200


def ready(server: Operated) -> None:
    wait_for(lambda: server.operator("/readyz")[0] == 200, "ready again")


def quiet(server: Operated) -> None:
    """No fault of the store is one of ours."""
    log = server.log.read_text()
    assert "Traceback" not in log and '"trace"' not in log and server.process.poll() is None


class SlowPull:
    """A pull of which a client has read the first bytes, and the rest later."""

    def __init__(self, door: Door, path: str) -> None:
        self.sock = socket.socket()
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        self.sock.settimeout(LONG_S)
        self.sock.connect(("127.0.0.1", door.port))
        self.sock.sendall(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {door.keys['acme']}\r\n\r\n".encode())
        self.parts: list[bytes] = []
        while sum(map(len, self.parts)) < MIB:
            self.parts.append(self.sock.recv(MIB))
        assert self.parts[0].startswith(b"HTTP/1.1 200")

    def body(self) -> bytes:
        """What came up to where the connection ended."""
        with self.sock, suppress(ConnectionResetError):
            while part := self.sock.recv(MIB):
                self.parts.append(part)
        return b"".join(self.parts).partition(b"\r\n\r\n")[2]


@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGKILL])
def test_a_gateway_that_ends_under_pushes_and_pulls_loses_nothing(gateway: rgw.Rgw, tmp_path: Path, sign: signal.Signals) -> None:
    url = f"s3://{gateway.bucket()}/air?endpoint={gateway.http}&credentials={credentials(tmp_path)}"
    with over(tmp_path / "data", url) as server:
        path, pushers = push(server, BIG), Pushers(server)
        _, manifest = server.image(REPO, "v1", [b"layer"])
        half = server.ask("PATCH", server.ask("POST", f"/v2/{REPO}/blobs/uploads/").headers["location"], BIG[::-1][: 9 * MIB])
        assert half.status == 202 and server.operator("/readyz")[0] == 200
        with pushers.running():
            pushers.grow(5)
            pull = SlowPull(server, path)
            gateway.end(sign)
            not_ready(server)
            wait_for(lambda: len(pushers.refused) >= 3, "refused pushes")
            told(pushers.refused[-1], f"the connection to {gateway.http} failed")
            told(server.ask("GET", path), "failed")
            assert server.ask("GET", f"/v2/{REPO}/manifests/v1").body == manifest and server.ask("HEAD", path).status == 200  # of the database
            assert server.ask("GET", path, Host="registry.example").status == 307  # signed without the store, which the client then finds away
            came = pull.body()
            assert 0 < len(came) < len(BIG) and BIG.startswith(came), "a pull under way is cut, never ended with other bytes"
            gateway.begin()
            ready(server)
            pushers.grow(5)
        cut = wait_for(lambda: [line for line in server.lines() if line.get("cut")], "the access line of the cut pull")[0]
        assert (cut["status"], cut["reason"], "failed" in cut["cut"]) == (200, "s3_connection", True)
        assert server.figures()['airlock_errors_total{source="internal"}'] == 0 < server.figures()['airlock_errors_total{source="store"}']
        assert pushers.strange == [] and server.ask("GET", path, Range=f"bytes={len(came)}-").body == BIG[len(came) :]
        found = server.ask("GET", half.headers["location"])
        assert found.status == 204 and found.headers["range"] == f"0-{9 * MIB - 1}"
        done = server.ask("PUT", joined(found.headers["location"], sha(BIG[::-1])), BIG[::-1][9 * MIB :])
        assert done.status == 201, done.body
        for digest, raw in pushers.stored.items():
            assert server.ask("GET", f"/v2/{REPO}/blobs/{digest}").body == raw
        quiet(server)


def during(server: Operated, work: Callable[[], Answer], other: Callable[[], Answer]) -> tuple[Answer, Answer]:
    """Two requests at once."""
    with ThreadPoolExecutor(2) as pool:
        one, two = pool.submit(work), pool.submit(other)
        return one.result(), two.result()


def fresh(server: Operated) -> tuple[bytes, Callable[[], Answer]]:
    """A new blob and the push of it."""
    raw = os.urandom(50_000)
    return raw, lambda: server.ask("POST", f"/v2/{REPO}/blobs/uploads/?digest={sha(raw)}", raw)


@pytest.mark.parametrize(("kind", "words"), [("busy", "is overloaded or failing"), ("lose_request", "failed")])
def test_a_store_that_answers_503_or_drops_requests_is_told_and_passes(tmp_path: Path, proxy: Unsteady, kind: str, words: str) -> None:
    url = s3_url(tmp_path, endpoint=proxy.url)
    with over(tmp_path / "data", url) as server:
        path = push(server, BIG)
        raw, send = fresh(server)
        proxy.plan(kind, "", 1_000_000)
        for answer in during(server, lambda: server.ask("GET", path), send):
            told(answer, words)
        not_ready(server)
        assert server.ask("GET", f"/v2/{REPO}/blobs/{sha(raw)}").status == 404  # what was refused is not there
        proxy.faults.clear()
        ready(server)
        assert send().status == 201 and server.ask("GET", path).body == BIG
        quiet(server)


def test_a_slow_store_makes_clients_wait_and_nothing_fails(tmp_path: Path, proxy: Unsteady) -> None:
    url = s3_url(tmp_path, endpoint=proxy.url)
    with over(tmp_path / "data", url) as server:
        raw, send = fresh(server)
        first = server.blob(REPO, b"first")
        proxy.plan("slow", "", 1_000_000)
        pulled, pushed = during(server, lambda: server.ask("GET", f"/v2/{REPO}/blobs/{first}"), send)
        assert pulled.body == b"first" and pushed.status == 201
        not_ready(server)
        proxy.faults.clear()
        ready(server)
        assert server.ask("GET", f"/v2/{REPO}/blobs/{sha(raw)}").body == raw
        quiet(server)


def test_a_store_without_room_refuses_pushes_only_and_they_go_on_when_there_is_room(tmp_path: Path) -> None:
    bucket = rgw.shared().bucket()
    with over(tmp_path / "data", s3_url(tmp_path, bucket=bucket)) as server:
        path = push(server, BIG)
        half = server.ask("PATCH", server.ask("POST", f"/v2/{REPO}/blobs/uploads/").headers["location"], BIG[::-1][: 9 * MIB])
        assert half.status == 202
        rgw.shared().quota(bucket, 48 * MIB)
        stored: dict[str, bytes] = {}

        def refused() -> Answer | None:
            raw = os.urandom(MIB)
            answer = server.ask("POST", f"/v2/{REPO}/blobs/uploads/?digest={sha(raw)}", raw)
            stored.update({sha(raw): raw} if answer.status == 201 else {})
            return answer if answer.status != 201 else None

        answer = wait_for(refused, "a refused push")
        said = answer.json()["errors"][0]
        assert answer.status == 503 and said["detail"]["reason"] == "disk_full" and "no room" in said["message"], said
        assert "quota" in said["message"] and rgw.SECRET not in said["message"]
        assert server.ask("GET", path).body == BIG and server.operator("/healthz")[0] == 200
        rgw.shared().quota(bucket, 0)
        wait_for(lambda: refused() is None, "a push that is taken")
        done = server.ask("PUT", joined(server.ask("GET", half.headers["location"]).headers["location"], sha(BIG[::-1])), BIG[::-1][9 * MIB :])
        assert done.status == 201, done.body
        for digest, raw in stored.items():
            assert server.ask("GET", f"/v2/{REPO}/blobs/{digest}").body == raw
        quiet(server)


@pytest.mark.full
def test_a_store_that_stalls_is_told_after_its_time(tmp_path: Path, proxy: Unsteady) -> None:
    """Each request to the store waits twice for a minute; a push makes two before it gives up."""
    url = s3_url(tmp_path, endpoint=proxy.url)
    with over(tmp_path / "data", url) as server:
        path = push(server, BIG)
        raw, send = fresh(server)
        proxy.plan("hang", "", 1_000_000)
        server.wait_s = 600
        for answer in during(server, lambda: server.ask("GET", path), send):
            assert answer.status == 503 and rgw.SECRET not in answer.body.decode()
            assert "did not answer in time" in answer.body.decode() or "failed" in answer.body.decode()
        not_ready(server)
        proxy.faults.clear()
        ready(server)
        assert send().status == 201 and server.ask("GET", path).body == BIG and server.ask("GET", f"/v2/{REPO}/blobs/{sha(raw)}").body == raw
        quiet(server)
