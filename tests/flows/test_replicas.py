"""Two server processes over one PostgreSQL and one store: uploads move between them, a killed one loses nothing, and the database may restart."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path

import psycopg
import pytest

from tests.contracts.doors import Answer, Door, new_site, serving, sha
from tests.contracts.stores import s3_url
from tests.services import postgres
from tests.services.postgres import Postgres

pytestmark = pytest.mark.server
CHUNK = 300_000


@contextmanager
def two(data: Path, url: str, **env: str) -> Iterator[tuple[Door, Door]]:
    """Two servers of one site: over one directory, or with bytes in S3 over two that share nothing but the secrets."""
    keys = new_site(data, AIRLOCK_DATABASE=url, **env)
    other = data
    if env.get("AIRLOCK_BLOBS"):
        other = data.with_name("other")
        shutil.copytree(data, other)
    with ExitStack() as stack:
        first = stack.enter_context(serving(data, keys, AIRLOCK_DATABASE=url, **env))
        yield first, stack.enter_context(serving(other, keys, AIRLOCK_DATABASE=url, **env))


@pytest.fixture
def database() -> Iterator[str]:
    """An empty database of the run's PostgreSQL."""
    url = postgres.shared().database()
    yield url
    postgres.shared().drop(url)


@pytest.fixture(params=["file", "s3"])
def pair(tmp_path: Path, database: str, request: pytest.FixtureRequest) -> Iterator[tuple[Door, Door]]:
    """Two servers over the run's PostgreSQL and one directory of blobs or one bucket."""
    env = {"AIRLOCK_BLOBS": s3_url(tmp_path), "AIRLOCK_REDIRECT": "off"} if request.param == "s3" else {}
    with two(tmp_path / "site", database, **env) as doors:
        yield doors


def begin(door: Door, repo: str) -> str:
    """The path of a new upload."""
    answer = door.ask("POST", f"/v2/{repo}/blobs/uploads/", b"")
    assert answer.status == 202, answer.body
    return path_of(answer)


def path_of(answer: Answer) -> str:
    """The path of a Location, which may be absolute."""
    where = answer.headers["location"]
    return "/" + where.split("/", 3)[3] if where.startswith("http") else where


def patch(door: Door, path: str, raw: bytes, lo: int) -> Answer:
    """Sends one piece."""
    return door.ask("PATCH", path, raw, Content_Range=f"{lo}-{lo + len(raw) - 1}", Content_Type="application/octet-stream")


def finish(door: Door, path: str, raw: bytes) -> Answer:
    """Ends an upload under the digest of all its bytes."""
    return door.ask("PUT", f"{path}{'&' if '?' in path else '?'}digest={sha(raw)}", b"")


def eventually(use: Callable[[], Answer], *wanted: int, within: float = 60) -> Answer:
    """The first answer with a wanted status."""
    end = time.monotonic() + within
    while True:
        try:
            answer = use()
            if answer.status in wanted:
                return answer
        except OSError as error:
            answer = Answer(0, {}, str(error).encode())
        assert time.monotonic() < end, (answer.status, answer.body)
        time.sleep(0.1)


def upload_moves(a: Door, b: Door) -> None:
    """Begun on one, killed there, ended on the other."""
    raw = os.urandom(3 * CHUNK)
    path = begin(a, "acme/moved")
    first = patch(a, path, raw[:CHUNK], 0)
    assert first.status == 202, first.body
    path = path_of(first)
    second = patch(b, path, raw[CHUNK : 2 * CHUNK], CHUNK)
    assert second.status == 202, second.body
    path = path_of(second)
    a.process.send_signal(signal.SIGKILL)
    a.process.wait(60)
    third = patch(b, path, raw[2 * CHUNK :], 2 * CHUNK)
    assert third.status == 202, third.body
    done = finish(b, path_of(third), raw)
    assert done.status == 201, done.body
    assert b.ask("GET", f"/v2/acme/moved/blobs/{sha(raw)}").body == raw


def test_an_upload_goes_on_at_the_other_server_when_its_own_is_killed(pair: tuple[Door, Door]) -> None:
    upload_moves(*pair)


def race(a: Door, b: Door, rounds: int = 8) -> None:
    """Both write the same piece of one upload at once: one wins, the other is told; what comes out is what was sent."""
    for n in range(rounds):
        raw = os.urandom(2 * CHUNK)
        path = begin(a, f"acme/race{n}")
        got: list[Answer] = []
        send = partial(patch, path=path, raw=raw[:CHUNK], lo=0)
        threads = [threading.Thread(target=lambda door, send, got: got.append(send(door)), args=(door, send, got)) for door in (a, b)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        statuses = sorted(answer.status for answer in got)
        assert statuses.count(202) == 1 and statuses[1] in (409, 416), [(x.status, x.body) for x in got]
        path = path_of(next(x for x in got if x.status == 202))
        assert a.ask("GET", path).headers["range"] == f"0-{CHUNK - 1}"
        after = patch(b, path, raw[CHUNK:], CHUNK)
        assert after.status == 202, after.body
        assert finish(a, path_of(after), raw).status == 201
        assert b.ask("GET", f"/v2/acme/race{n}/blobs/{sha(raw)}").body == raw


def test_two_servers_that_write_one_upload_at_once(pair: tuple[Door, Door]) -> None:
    race(*pair)


def half_sent(door: Door, path: str, raw: bytes) -> socket.socket:
    """A connection on which half of a piece was sent, and that promises the rest."""
    sock = socket.create_connection(("127.0.0.1", door.port), timeout=120)
    head = f"PATCH {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {door.keys['acme']}\r\nContent-Length: {len(raw)}\r\n"
    sock.sendall((head + f"Content-Range: 0-{len(raw) - 1}\r\n\r\n").encode() + raw[: len(raw) // 2])
    return sock


@pytest.mark.parametrize("pair", ["s3"], indirect=True)
def test_a_server_that_comes_late_harms_nothing(pair: tuple[Door, Door]) -> None:
    a, b = pair
    raw = os.urandom(40 * 1024 * 1024)
    path = begin(a, "acme/late")
    with half_sent(a, path, raw) as slow:
        time.sleep(1)  # so that it has begun to write; where it has not, the rest of it comes later still
        taken = eventually(lambda: patch(b, path, raw, 0), 202)
        slow.sendall(raw[len(raw) // 2 :])
        late = slow.recv(65536).split(b" ", 2)[1]
        assert late in (b"409", b"416")
    assert finish(b, path_of(taken), raw).status == 201
    for door in pair:
        assert door.ask("GET", f"/v2/acme/late/blobs/{sha(raw)}").body == raw


def test_what_one_server_stores_the_other_serves_at_once(pair: tuple[Door, Door]) -> None:
    a, b = pair
    for n in range(10):
        here, there = (a, b) if n % 2 else (b, a)
        digest, raw = here.image("acme/shared", f"v{n}", [os.urandom(1000)])
        assert there.ask("GET", f"/v2/acme/shared/manifests/v{n}").body == raw
        assert there.ask("DELETE", f"/v2/acme/shared/manifests/v{n}").status == 202
        assert here.ask("GET", f"/v2/acme/shared/manifests/v{n}").status == 404
        assert here.ask("GET", f"/v2/acme/shared/manifests/{digest}").body == raw


def test_pushes_of_one_tag_by_two_servers_leave_one_of_them(pair: tuple[Door, Door]) -> None:
    pushed: dict[str, bytes] = {}
    failed: list[object] = []

    def push(door: Door, n: int) -> None:
        try:
            for i in range(5):
                digest, raw = door.image(f"acme/tag{i}", "latest", [f"{n} {i}".encode()])
                pushed[digest] = raw
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=push, args=(pair[n % 2], n)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(180)
    assert failed == []
    for i in range(5):
        found = pair[0].ask("GET", f"/v2/acme/tag{i}/manifests/latest")
        assert found.status == 200 and pushed[found.headers["docker-content-digest"]] == found.body
        assert pair[1].ask("GET", f"/v2/acme/tag{i}/manifests/latest").body == found.body


@contextmanager
def pushing(doors: tuple[Door, ...], stored: dict[str, bytes], seen: list[int]) -> Iterator[None]:
    """Clients that push small blobs all the time; `stored` is what was answered 201, `seen` every status, 0 for a connection that broke."""
    stop = threading.Event()

    def run(door: Door, repo: str) -> None:
        while not stop.is_set():
            raw = os.urandom(2000)
            try:
                answer = door.ask("POST", f"/v2/{repo}/blobs/uploads/?digest={sha(raw)}", raw)
            except TimeoutError:  # a loaded machine: neither stored for certain nor refused
                continue
            except OSError:
                seen.append(0)
                time.sleep(0.05)
                continue
            seen.append(answer.status)
            if answer.status == 201:
                stored[sha(raw)] = raw
            else:
                assert answer.status == 503, answer.body
                assert answer.code and b"database" in answer.body and b"Traceback" not in answer.body, answer.body
                time.sleep(0.05)

    threads = [threading.Thread(target=run, args=(door, "acme/flood")) for door in doors for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join(120)


def wait_for(condition: Callable[[], bool], within: float = 90) -> None:
    """Returns when the condition holds."""
    end = time.monotonic() + within
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_database_that_restarts_under_pushes_loses_nothing(tmp_path: Path) -> None:
    own = Postgres.make(connections=120)
    stored: dict[str, bytes] = {}
    seen: list[int] = []
    try:
        with two(tmp_path / "site", own.database()) as doors:
            with pushing(doors, stored, seen):
                wait_for(lambda: len(stored) > 20)
                for sign in (signal.SIGINT, signal.SIGKILL, signal.SIGINT):
                    own.end(sign)
                    known = len(seen)
                    wait_for(lambda known=known: 503 in seen[known:])
                    assert doors[0].ask("GET", "/v2/acme/flood/tags/list").status == 503
                    own.start()
                    known = len(stored)
                    wait_for(lambda known=known: len(stored) > known + 20)
            assert 0 not in seen and set(seen) == {201, 503}
            for digest, raw in stored.items():
                assert doors[1].ask("GET", f"/v2/acme/flood/blobs/{digest}").body == raw
            for door in doors:
                assert "Traceback" not in door.log.read_text()
    finally:
        own.remove()


def test_a_server_killed_under_pushes_loses_nothing(tmp_path: Path, database: str) -> None:
    stored: dict[str, bytes] = {}
    seen: list[int] = []
    with two(tmp_path / "site", database) as (a, b):
        with pushing((a, b), stored, seen):
            wait_for(lambda: len(stored) > 40)
            a.process.send_signal(signal.SIGKILL)
            known = len(stored)
            wait_for(lambda: len(stored) > known + 40)
        assert 0 in seen and 503 not in seen
        for digest, raw in stored.items():
            assert b.ask("GET", f"/v2/acme/flood/blobs/{digest}").body == raw


def test_connections_that_others_took_are_a_clear_503(tmp_path: Path) -> None:
    own = Postgres.make(connections=30)
    try:
        url = own.database()
        keys = new_site(tmp_path / "site", AIRLOCK_DATABASE=url)
        with serving(tmp_path / "site", keys, AIRLOCK_DATABASE=url) as door:
            with ExitStack() as held:
                first = held.enter_context(psycopg.connect(url, autocommit=True))
                first.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'airlock'")
                with suppress(psycopg.OperationalError):
                    while True:
                        held.enter_context(psycopg.connect(url))
                answer = eventually(lambda: door.ask("GET", "/v2/acme/x/tags/list"), 503)
                assert b"no free connection" in answer.body
            assert eventually(lambda: door.ask("GET", "/v2/acme/x/tags/list"), 404).status == 404
    finally:
        own.remove()
