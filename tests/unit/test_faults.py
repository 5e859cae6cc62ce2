"""Each fault of a connection by a real one: a closed port, a name nobody has, real TLS servers, a socket that stays silent, one that hangs up."""

from __future__ import annotations

import datetime
import ipaddress
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from artifact.errors import Unavailable
from artifact.remote import RemoteRegistry
from tests.fakes.tls import authority, leaf, serving_tls

SECRET = "nvapi-" + "s" * 49
PATH = "/airlock/v1/whoami?token=query-that-nobody-may-see"


def fault(url: str, ca: Path | None = None, timeout_s: float = 5.0) -> Unavailable:
    remote = RemoteRegistry(url, SECRET, ca_file=str(ca) if ca else None, timeout_s=timeout_s)
    with pytest.raises(Unavailable) as caught:
        remote.request("GET", PATH, bearer=True)
    told = " ".join((caught.value.what, caught.value.expected, caught.value.do))
    assert SECRET not in told and "query-that" not in told and caught.value.what and caught.value.expected and caught.value.do
    return caught.value


@contextmanager
def listening(answer: bytes | None = None) -> Iterator[int]:
    """A socket that takes connections and says nothing, or says `answer` and hangs up."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        held: list[socket.socket] = []

        def take() -> None:
            while True:
                try:
                    found, _ = server.accept()
                except OSError:
                    return
                held.append(found)
                if answer is not None:
                    found.recv(65536)
                    found.sendall(answer)
                    found.close()

        threading.Thread(target=take, daemon=True).start()
        yield server.getsockname()[1]
        for found in held:
            found.close()


def test_a_closed_port() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    found = fault(f"http://127.0.0.1:{port}")
    assert found.reason == "connection_refused" and f"127.0.0.1:{port} refuses the connection" in found.what and "AIRLOCK_REGISTRY" in found.do


def test_a_name_that_does_not_resolve() -> None:
    found = fault("http://registry.no-such-site.invalid:5000")
    assert found.reason == "dns" and "the name registry.no-such-site.invalid does not resolve" in found.what and "DNS" in found.do


@pytest.mark.slow
def test_nobody_answers_in_time() -> None:
    with listening() as port:
        found = fault(f"http://127.0.0.1:{port}", timeout_s=0.3)
        assert found.reason == "timeout" and f"127.0.0.1:{port} did not answer within 0.3 s" in found.what and "AIRLOCK_TIMEOUT_S" in found.expected
        assert fault(f"https://127.0.0.1:{port}", timeout_s=0.3).reason == "timeout"  # in the handshake it is a time-out too


@pytest.mark.parametrize("answer", [b"", b"nonsense\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n12"])
def test_what_else_breaks_is_a_connection(answer: bytes) -> None:
    with listening(answer) as port:
        remote = RemoteRegistry(f"http://127.0.0.1:{port}", SECRET, timeout_s=5)
        with pytest.raises(Unavailable) as caught:
            remote.api("GET", "/airlock/v1/whoami")
    assert caught.value.reason == "connection"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tls")


NOW = datetime.datetime.now(datetime.UTC)
DAY = datetime.timedelta(days=1)
LOCAL = ipaddress.ip_address("127.0.0.1")


@pytest.mark.parametrize(
    ("case", "words", "do"),
    [
        ("stranger", "signed by an authority that is not trusted here", "AIRLOCK_CA_FILE"),
        ("name", "is for another name than 127.0.0.1", "AIRLOCK_REGISTRY"),
        ("expired", "has expired", "renew it"),
        ("early", "is not valid yet", "clock"),
    ],
)
def test_tls_says_which_of_its_faults(folder: Path, case: str, words: str, do: str) -> None:
    ours, other = authority(folder / f"{case}-ca"), authority(folder / f"{case}-other")
    begin, end = {"expired": (NOW - 9 * DAY, NOW - DAY), "early": (NOW + DAY, NOW + 9 * DAY)}.get(case, (NOW - DAY, NOW + DAY))
    holds = ipaddress.ip_address("127.0.0.2") if case == "name" else LOCAL
    with serving_tls(leaf(ours, folder / case, holds, begin, end)) as port:
        found = fault(f"https://127.0.0.1:{port}", other.file if case == "stranger" else ours.file)
    assert found.reason == "tls" and words in found.what and f"127.0.0.1:{port}" in found.what and do in found.do


def test_tls_with_the_right_authority_is_no_fault(folder: Path) -> None:
    ours = authority(folder / "fine-ca")
    with serving_tls(leaf(ours, folder / "fine", LOCAL, NOW - DAY, NOW + DAY)) as port:
        assert RemoteRegistry(f"https://127.0.0.1:{port}", SECRET, ca_file=str(ours.file)).api("GET", "/airlock/v1/whoami") == {}


def test_tls_without_an_authority_file_a_damaged_one_and_a_plain_server(folder: Path) -> None:
    ours = authority(folder / "files-ca")
    with serving_tls(leaf(ours, folder / "files", LOCAL, NOW - DAY, NOW + DAY)) as port:
        assert "not trusted here" in fault(f"https://127.0.0.1:{port}").what
        absent = fault(f"https://127.0.0.1:{port}", folder / "absent.pem")
        (folder / "damaged.pem").write_text("-----BEGIN CERTIFICATE-----\nnonsense\n-----END CERTIFICATE-----\n")
        (folder / "empty.pem").write_text("")
        damaged = [fault(f"https://127.0.0.1:{port}", folder / f"{name}.pem") for name in ("damaged", "empty")]
    assert absent.reason == "tls" and "the CA file cannot be used (No such file or directory)" in absent.what
    assert all(f.reason == "tls" and "the CA file cannot be used" in f.what for f in damaged), [str(f) for f in damaged]
    with listening(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n") as port:
        plain = fault(f"https://127.0.0.1:{port}", ours.file)
    assert plain.reason == "tls" and "does not speak TLS" in plain.what and "http://" in plain.do
