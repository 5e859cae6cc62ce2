"""The requests of NVIDIA's ModelExpress, as its source makes them, to the NGC door over TLS: each is answered; what may not be had is refused."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.contracts.ngc import FILES, fill, new_ngc_site, ngc_serving
from tests.flows.answered import accessed, gaps
from tests.operated import Operated, operated

pytestmark = pytest.mark.server
CLIENT = Path(__file__).resolve().parent.parent / "fakes" / "modelexpress.py"
P = "/v2/org/acme/team/vision/models/demo"
MANY = {f"w{n:04}.json": str(n).encode() for n in range(501)}
PLAIN = {"config.json": b"{}", "sub/deep/w.bin": os.urandom(100_000), "README.md": b"no", ".hidden": b"no", "logo.png": b"no"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Operated]:
    data = tmp_path_factory.mktemp("mx") / "data"
    keys = new_ngc_site(data)
    with ngc_serving(data, keys) as door:
        fill(door, data)
        door.push("acme/vision/many", "1", MANY)
        door.push("acme/plain", "1", PLAIN)
    with operated(data, keys, AIRLOCK_TLS="self-signed", AIRLOCK_NGC="127.0.0.1:0") as found:
        yield found
        assert gaps(found.log) == [], "a probe that no route took"


def play(server: Operated, folder: Path, name: str, who: str = "acme", **env: str) -> tuple[int, str, list[str]]:
    """Exit status, what was said, and the requests that reached the listener with their statuses."""
    assert server.told
    given = {"NGC_API_ENDPOINT": server.told["ngc"], "NGC_AUTH_ENDPOINT": server.told["ngc"], "NGC_API_KEY": server.keys[who]}
    given |= {"SSL_CERT_FILE": str(server.data / "tls" / "cert.pem"), **env}
    before = len(lines(server))
    argv = [sys.executable, "-P", str(CLIENT), name, str(folder)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=120, env=given, check=False)
    return done.returncode, done.stdout + done.stderr, lines(server)[before:]


def lines(server: Operated) -> list[str]:
    return [f"{line['method']} {'/dl' if line['path'].startswith('/dl/') else line['path']} {line['status']}" for line in accessed(server.log, "ngc")]


def held(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("name", ["ngc://acme/vision/demo:1.10", "acme/vision/demo/1.10", "acme/vision/models/demo/1.10"])
def test_the_listing_and_its_urls(server: Operated, tmp_path: Path, name: str) -> None:
    status, said, asked = play(server, tmp_path, name)
    assert status == 0 and held(tmp_path / "ngc/acme/vision/models/demo/1.10") == FILES, said
    assert sorted(asked) == sorted([f"GET {P}/1.10/files 200", *["GET /dl 200"] * len(FILES)])


def test_a_listing_longer_than_the_page_it_asks_for_is_one_answer(server: Operated, tmp_path: Path) -> None:
    status, said, asked = play(server, tmp_path, "ngc://acme/vision/many:1")
    assert status == 0 and held(tmp_path / "ngc/acme/vision/models/many/1") == MANY, said
    assert [a for a in asked if "/dl" not in a] == ["GET /v2/org/acme/team/vision/models/many/1/files 200"]


def test_the_second_way_by_the_sums(server: Operated, tmp_path: Path) -> None:
    """What it asks for when a listing is refused with 400 or 401: the list of sums, then each file with the key."""
    for _ in range(100):  # the sums are computed behind the push
        status, said, asked = play(server, tmp_path, "acme/plain/1", PLAY_BLOCKED="1")
        if status == 0:
            break
        time.sleep(0.2)
    base = "GET /v2/org/acme/models/plain/versions/1/files"
    wanted = {path: data for path, data in PLAIN.items() if path in ("config.json", "sub/deep/w.bin")}
    assert status == 0 and held(tmp_path / "ngc/acme/models/plain/1") == wanted, said
    assert sorted(asked) == sorted([f"{base}/checksums.blake3 200", *(f"{base}/{path} 200" for path in wanted)])


@pytest.mark.parametrize(("who", "words"), [("expired", "checksum manifest unavailable (401)"), ("nothing", "NGC API returned 403")])
def test_who_may_not_have_it_gets_it_by_neither_way(server: Operated, tmp_path: Path, who: str, words: str) -> None:
    for way in ("0", "1"):
        status, said, asked = play(server, tmp_path, "ngc://acme/vision/demo:1.10", who, PLAY_BLOCKED=way)
        assert status == 1 and (words in said or way == "1") and held(tmp_path) == {}, said
        assert asked and all(a.endswith((" 401", " 403")) for a in asked), asked


def test_a_slash_behind_the_endpoint(server: Operated, tmp_path: Path) -> None:
    """It asks for //v2/… then, and is answered all the same."""
    assert server.told
    status, said, asked = play(server, tmp_path, "ngc://acme/vision/demo:1.10", NGC_API_ENDPOINT=server.told["ngc"] + "/")
    assert status == 0 and f"GET /{P}/1.10/files 200" in asked and held(tmp_path / "ngc/acme/vision/models/demo/1.10") == FILES, said
