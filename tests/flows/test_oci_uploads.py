"""Uploads that are killed, doubled, large or parallel, against a real registry process: nothing lost, nothing kept twice, memory small."""

from __future__ import annotations

import hashlib
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.contracts.doors import Door, new_site, serving
from tests.contracts.oci_client import ALGORITHMS, FORMS, WAIT_S, Client, Reply, descriptor, digest, image, join, parse
from tests.flows.test_memory import Peak

pytestmark = [pytest.mark.server, pytest.mark.timeout(600)]
MIB = 1024 * 1024
LIMIT = 200 * MIB
R = "acme/uploads"


@pytest.fixture(scope="module")
def door(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Door]:
    data = tmp_path_factory.mktemp("uploads") / "data"
    with serving(data, new_site(data)) as found:
        yield found


def client_of(door: Door) -> Client:
    return Client(door.port, door.keys["acme"])


def kill(door: Door) -> None:
    """Ends the server as the kernel would when it runs out of memory."""
    door.process.send_signal(signal.SIGKILL)
    door.process.wait(30)


class Sending:
    """A request whose body is sent piece by piece, by hand."""

    def __init__(self, client: Client, method: str, target: str, length: int) -> None:
        self.method = method
        head = [f"{method} {join(target)} HTTP/1.1", "Host: registry", "Connection: close", f"Content-Length: {length}"]
        head += [f"{k}: {v}" for k, v in client.authorization(method, target)]
        self.sock = socket.create_connection(("127.0.0.1", client.port), timeout=WAIT_S)
        self.sock.sendall("\r\n".join([*head, "", ""]).encode())

    def send(self, data: bytes) -> None:
        self.sock.sendall(data)

    def answer(self) -> Reply:
        found = bytearray()
        with self.sock:
            while piece := self.sock.recv(MIB):
                found += piece
        return parse(bytes(found), self.method)


def stored(client: Client, place: str) -> int:
    """Bytes that the server says it has of an upload; nothing at all and one byte are both `0-0`, and the tests store more."""
    found = client.ask("GET", place)
    assert found.status == 204, found
    at = int(found.get("range").split("-")[1])
    return at + 1 if at else 0


def eventually(what: Callable[[], bool]) -> None:
    end = time.monotonic() + WAIT_S
    while not what():
        assert time.monotonic() < end
        time.sleep(0.05)


def objects(data: Path, name: str) -> list[Path]:
    """Files of the store that hold a blob of this digest, under any generation."""
    return [p for p in (data / "blobs").rglob("*") if p.is_file() and name.partition(":")[2] in p.name]


def files(data: Path) -> list[Path]:
    return [p for p in (data / "blobs").rglob("*") if p.is_file()]


# ---- row 24: killed at 60 per cent


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_chunks_go_on_after_the_server_was_killed(tmp_path: Path, algorithm: str) -> None:
    data = os.urandom(10 * MIB)
    name, keys, at = digest(data, algorithm), new_site(tmp_path / "data"), 6 * MIB
    with serving(tmp_path / "data", keys) as first:
        client = client_of(first)
        place = client.start(R, f"?digest-algorithm={algorithm}")
        for lo in range(0, at, MIB):
            place = client.ask("PATCH", place, data[lo : lo + MIB], [("Content-Range", f"{lo}-{lo + MIB - 1}")]).get("location")
        kill(first)
    with serving(tmp_path / "data", keys) as second:
        client = client_of(second)
        assert client.ask("GET", place).get("range") == f"0-{at - 1}"
        assert client.ask("HEAD", f"/v2/{R}/blobs/{name}").status == 404
        for lo in range(at, len(data), MIB):
            place = client.ask("PATCH", place, data[lo : lo + MIB], [("Content-Range", f"{lo}-{lo + MIB - 1}")]).get("location")
        done = client.ask("PUT", join(place, digest=name))
        assert done.status == 201, done.body
        assert client.ask("GET", done.get("location")).body == data
    assert len(files(tmp_path / "data")) == 1


def test_a_stream_goes_on_after_the_server_was_killed_inside_it(tmp_path: Path) -> None:
    """The server dies in the middle of one PATCH: what it says it has afterwards is true, whatever it is, and the rest completes it."""
    data = os.urandom(20 * MIB)
    name, keys = digest(data), new_site(tmp_path / "data")
    with serving(tmp_path / "data", keys) as first:
        client = client_of(first)
        place = client.ask("PATCH", client.start(R), data[: 2 * MIB]).get("location")
        sending = Sending(client, "PATCH", place, 18 * MIB)
        sending.send(data[2 * MIB : 12 * MIB])
        eventually(lambda: sum(p.stat().st_size for p in (tmp_path / "data" / "partial").iterdir()) > 8 * MIB)
        kill(first)
        sending.sock.close()
    with serving(tmp_path / "data", keys) as second:
        client = client_of(second)
        at = stored(client, place)
        assert 2 * MIB <= at <= 12 * MIB
        moved = client.ask("PATCH", place, data[at:], [("Content-Range", f"{at}-{len(data) - 1}")])
        assert (moved.status, moved.get("range")) == (202, f"0-{len(data) - 1}")
        done = client.ask("PUT", join(moved.get("location"), digest=name))
        assert done.status == 201 and client.ask("GET", done.get("location")).body == data


def test_a_put_that_died_with_the_server_left_nothing_that_is_served(tmp_path: Path) -> None:
    data = os.urandom(10 * MIB)
    name, keys = digest(data), new_site(tmp_path / "data")
    with serving(tmp_path / "data", keys) as first:
        client = client_of(first)
        sending = Sending(client, "PUT", join(client.start(R), digest=name), len(data))
        sending.send(data[: 6 * MIB])
        eventually(lambda: any(p.stat().st_size for p in (tmp_path / "data" / "partial").iterdir()))
        kill(first)
        sending.sock.close()
    with serving(tmp_path / "data", keys) as second:
        client = client_of(second)
        assert client.ask("HEAD", f"/v2/{R}/blobs/{name}").status == 404 and not files(tmp_path / "data")
        assert FORMS["post-put"](client, R, data, name).status == 201
        assert client.ask("GET", f"/v2/{R}/blobs/{name}").body == data


def test_a_client_that_was_killed_goes_on(door: Door) -> None:
    """The client dies at 60 per cent of one PATCH, and another process of it goes on from what GET says."""
    client, data = client_of(door), os.urandom(10 * MIB)
    place = client.start(R)
    sending = Sending(client, "PATCH", place, len(data))
    sending.send(data[: 6 * MIB])
    sending.sock.close()
    eventually(lambda: client.ask("GET", place).get("range") == f"0-{6 * MIB - 1}")
    done = client.ask("PUT", join(place, digest=digest(data)), data[6 * MIB :], [("Content-Range", f"{6 * MIB}-{len(data) - 1}")])
    assert done.status == 201 and client.ask("GET", done.get("location")).body == data


# ---- row 25: two pushes of one new blob at once


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("repos", [(R, R), (R, "acme/uploads/other")], ids=["one repository", "two repositories"])
def test_two_pushes_of_one_new_blob(door: Door, algorithm: str, repos: tuple[str, str]) -> None:
    """Both are under way before either ends; both get 201, and the store holds the bytes once."""
    client, data = client_of(door), os.urandom(3 * MIB)
    name = digest(data, algorithm)
    before = len(files(door.data))
    both = [Sending(client, "PUT", join(client.start(repo), digest=name), len(data)) for repo in repos]
    for half in (data[:MIB], data[MIB:-1]):
        for one in both:
            one.send(half)
    for one in both:
        one.send(data[-1:])
    assert [one.answer().status for one in both] == [201, 201]
    assert len(objects(door.data, digest(data))) == 1 and len(files(door.data)) == before + 1
    for repo in repos:
        assert client.ask("GET", f"/v2/{repo}/blobs/{name}").body == data


def test_many_pushes_of_one_new_blob_in_every_form(door: Door) -> None:
    data = os.urandom(700_001)
    before, forms = len(files(door.data)), [*FORMS.values()] * 3
    gate = threading.Barrier(len(forms))

    def push(at: int) -> int:
        client = client_of(door)
        gate.wait(WAIT_S)
        name = digest(data, ALGORITHMS[at % 2])
        return forms[at](client, f"{R}/many{at % 3}", data, name).status

    with ThreadPoolExecutor(len(forms)) as pool:
        assert list(pool.map(push, range(len(forms)))) == [201] * len(forms)
    assert len(objects(door.data, digest(data))) == 1 and len(files(door.data)) == before + 1
    for at in range(3):
        assert client_of(door).ask("GET", f"/v2/{R}/many{at}/blobs/{digest(data)}").body == data


# ---- row 23: memory


def test_one_gib_in_one_put(door: Door) -> None:
    """The peak of the server's memory, sampled 20 times a second, stays under 200 MiB; reading it back too."""
    client, block, count = client_of(door), os.urandom(MIB - 8), 1024
    hasher = hashlib.sha256()
    for i in range(count):
        hasher.update(i.to_bytes(8, "big") + block)
    name = f"sha256:{hasher.hexdigest()}"
    peak = Peak({"server": door.process.pid})
    peak.start()
    began = time.monotonic()
    sending = Sending(client, "PUT", join(client.start(R), digest=name), count * MIB)
    for i in range(count):
        sending.send(i.to_bytes(8, "big") + block)
    assert sending.answer().status == 201
    wrote = time.monotonic() - began
    asked = Sending(client, "GET", f"/v2/{R}/blobs/{name}", 0)
    total = 0
    with asked.sock:
        while piece := asked.sock.recv(MIB):
            total += len(piece)
    peak.ended.set()
    peak.join()
    print(f"1 GiB put in {wrote:.1f} s, peak {peak.peaks['server'] / MIB:.0f} MiB")
    assert total > count * MIB
    assert 10 * MIB < peak.peaks["server"] < LIMIT
    assert client.ask("DELETE", f"/v2/{R}/blobs/{name}").status == 202


# ---- row 22: HEAD at once after PUT


def test_every_head_after_a_put_finds_it(door: Door) -> None:
    """As docker does: several layers at once, each looked for right after its 201, then the manifest over all of them."""

    def push(worker: int) -> list[bytes]:
        client, layers = client_of(door), [os.urandom(20_000 + worker) for _ in range(12)]
        for at, layer in enumerate(layers):
            name = digest(layer)
            assert FORMS["streamed" if at % 2 else "post"](client, R, layer, name).status == 201
            head = client.ask("HEAD", f"/v2/{R}/blobs/{name}")
            assert (head.status, head.get("content-length")) == (200, str(len(layer)))
        raw = image(layers[0], layers[1:])
        client.put(R, f"worker{worker}", raw)
        assert client.manifest(R, f"worker{worker}", "HEAD").get("docker-content-digest") == digest(raw)
        subject = image(layers[0], [], subject=descriptor(raw, "application/vnd.oci.image.manifest.v1+json"))
        client.put(R, digest(subject), subject)
        assert len(client.ask("GET", f"/v2/{R}/referrers/{digest(raw)}").json()["manifests"]) == 1
        return layers

    with ThreadPoolExecutor(8) as pool:
        pushed = [layer for layers in pool.map(push, range(8)) for layer in layers]
    assert all(len(objects(door.data, digest(layer))) == 1 for layer in pushed)
    assert "Traceback" not in door.log.read_text()
