"""The sequences of a NIM container's hub client against the NGC door: each is answered, in the forms and with the refusals that the container reads.

The container is tests/fakes/nim.py: this says that the sequence is answered, not that a NIM works.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import quote, urlsplit

import pytest
from blake3 import blake3

from tests.conftest import airlock
from tests.contracts.ngc import PLUS, fill, new_ngc_site, ngc_serving
from tests.flows.answered import accessed, gaps
from tests.flows.test_ngcsdk import terms
from tests.operated import Operated, operated

pytestmark = pytest.mark.server
NIM = Path(__file__).resolve().parent.parent / "fakes" / "nim.py"
WEIGHTS = {"config.json": b'{"b":2}', "rank0.engine": os.urandom(400_000), "sub dir/tokenizer+1.json": b"{}", "LICENSE": b""}
ENGINE, PARAMS = "ngc/nim/meta/engine", "ngc/nim/params"
PROFILE = "ee0d01" + "0" * 58
DOMAIN = "s3.airlock.test"
S3 = {"AIRLOCK_S3": "127.0.0.1:0", "AIRLOCK_S3_DOMAIN": DOMAIN, "AIRLOCK_S3_BUCKET": "nim-bucket"}


def manifest(**more: str) -> dict[str, Any]:
    """A profile that takes its files from two versions of two models, one of them without a team; `more` adds files by their URI."""
    uris = {path: f"ngc://nim/meta/engine:fp8-1.0?file={path}" for path in WEIGHTS} | {"params/config.json": "ngc://nim/params:1?file=config.json"}
    sums = {path: blake3(data).hexdigest() for path, data in WEIGHTS.items()} | {"params/config.json": blake3(b'{"p":1}').hexdigest()}
    files: dict[str, dict[str, str]] = {path: {"uri": uri, "checksum": sums[path]} for path, uri in uris.items()}
    files |= {path: {"uri": uri} for path, uri in more.items()}
    return {"schema_version": "2.0", "profiles": [{"id": PROFILE, "tags": {}, "workspace": {"files": files}}]}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Operated]:
    data = tmp_path_factory.mktemp("nim") / "data"
    keys = new_ngc_site(data)
    with ngc_serving(data, keys) as door:
        fill(door, data)
        door.push(ENGINE, "fp8-1.0", WEIGHTS)
        door.push(PARAMS, "1", {"config.json": b'{"p":1}'})
    with operated(data, keys, AIRLOCK_TLS="self-signed", AIRLOCK_NGC="127.0.0.1:0", **S3) as found:
        yield found
        assert gaps(found.log) == [], "a probe that no route took"


def place(server: Operated) -> str:
    assert server.told
    return server.told["ngc"].removeprefix("https://")


def lines(server: Operated) -> list[dict[str, Any]]:
    return accessed(server.log, "ngc")


def start(server: Operated, folder: Path, who: str | None = "low", what: dict[str, Any] | None = None, **env: str) -> tuple[int, str, list[str]]:
    """Exit status, what was printed, and the requests that reached the server with their statuses."""
    file = folder / "model_manifest.json"
    file.write_text(json.dumps(what or manifest()))
    given = {"NGC_API_ENDPOINT": place(server), "NGC_AUTH_ENDPOINT": place(server), "NGC_API_SCHEME": "https", "NIM_MODEL_PROFILE": PROFILE}
    given |= {"NIM_CACHE_PATH": str(folder / "cache"), "NIM_SDK_USE_NATIVE_TLS": "1", "SSL_CERT_FILE": str(server.data / "tls" / "cert.pem")}
    given |= {"NGC_API_KEY": server.keys[who]} if who else {}
    before = len(lines(server))
    done = subprocess.run([sys.executable, "-P", str(NIM), str(file)], capture_output=True, text=True, timeout=120, env=given | env, check=False)
    asked = [f"{line['method']} {'/dl' if line['path'].startswith('/dl/') else line['path']} {line['status']}" for line in lines(server)[before:]]
    return done.returncode, done.stdout + done.stderr, asked


def cached(folder: Path) -> dict[str, bytes]:
    hub = folder / "cache" / "ngc" / "hub"
    return {str(p.relative_to(hub)): p.read_bytes() for p in hub.rglob("*") if p.is_file()} if hub.exists() else {}


WHOLE = {f"models--nim--meta--engine/snapshots/fp8-1.0/{path}": data for path, data in WEIGHTS.items()}
WHOLE |= {"models--nim--params/snapshots/1/config.json": b'{"p":1}'}
LISTS = ["GET /v2/org/nim/team/meta/models/engine/fp8-1.0/files 200", "GET /v2/org/nim/models/params/1/files 200"]


def test_the_sequence_of_the_three_endpoint_variables(server: Operated, tmp_path: Path) -> None:
    status, said, asked = start(server, tmp_path)
    assert (status, cached(tmp_path)) == (0, WHOLE), said
    assert "fetching filemap from: https://" in said
    assert sorted(asked) == sorted(LISTS + ["GET /dl 200"] * 5)


def test_the_listing_by_pages_from_one(server: Operated, tmp_path: Path) -> None:
    status, said, asked = start(server, tmp_path, PLAY_PAGED="1")
    assert (status, cached(tmp_path)) == (0, WHOLE), said
    assert [a for a in asked if "/dl" not in a] == LISTS, "one page is all"


def test_a_key_that_is_exchanged_for_a_token(server: Operated, tmp_path: Path) -> None:
    status, said, asked = start(server, tmp_path, PLAY_TOKEN="1")
    assert (status, cached(tmp_path)) == (0, WHOLE), said
    assert asked.count("GET /token 200") == 2 and all(a.endswith(" 200") for a in asked)


def test_a_version_that_is_no_tag(server: Operated, tmp_path: Path) -> None:
    status, said, _ = start(server, tmp_path, what=manifest(plus=f"ngc://nim/meta/llama:{PLUS}?file=config.json"))
    assert status == 0 and cached(tmp_path)[f"models--nim--meta--llama/snapshots/{PLUS}/config.json"] == b'{"a":1}', said


def test_the_second_credential_variable_comes_first(server: Operated, tmp_path: Path) -> None:
    status, said, _ = start(server, tmp_path, "expired", NGC_CLI_API_KEY=server.keys["low"])
    assert status == 0, said


@pytest.mark.parametrize("kind", ["https", "jfrog"])
@pytest.mark.parametrize("way", ["plain", "once", "twice"])
def test_the_spellings_of_the_repository_override(server: Operated, tmp_path: Path, kind: str, way: str) -> None:
    what = manifest()
    if way == "plain":  # a blank in a path cannot be sent as it is
        del what["profiles"][0]["workspace"]["files"]["sub dir/tokenizer+1.json"]
    status, said, asked = start(server, tmp_path, what=what, NIM_REPOSITORY_OVERRIDE=f"{kind}://{place(server)}/", PLAY_ENCODING=way)
    assert status == 0, said
    assert cached(tmp_path) == {k: v for k, v in WHOLE.items() if way != "plain" or "sub dir" not in k}
    assert all(a.endswith(" 200") for a in asked) and len(asked) == len(cached(tmp_path))


def s3(server: Operated, style: str = "virtual") -> dict[str, str]:
    """The environment of a container whose operator made a bucket of ours its repository."""
    data = ("--data", str(server.data))
    key_id = next(k for k in json.loads(airlock("key", "list", *data, "--json").stdout)["items"] if k["tier"] == "developer")["key_id"]
    pair = dict(line.split("=", 1) for line in airlock("key", "s3", key_id, *data).stdout.splitlines())
    assert server.told and pair["AWS_ACCESS_KEY_ID"] == key_id
    place = f"https://{DOMAIN if style == 'virtual' else '127.0.0.1'}:{server.told['s3'].rpartition(':')[2]}"
    told = {"NIM_REPOSITORY_OVERRIDE": "s3://nim-bucket/", "AWS_ENDPOINT_URL": place, "AWS_REGION": "us-east-1"}
    return pair | told | {"PLAY_STYLE": style, "PLAY_HOST": DOMAIN}


def asked_s3(server: Operated) -> list[dict[str, Any]]:
    return accessed(server.log, "s3")


@pytest.mark.parametrize("style", ["path", "virtual"])
@pytest.mark.parametrize("head", ["", "1"])
def test_the_s3_override(server: Operated, tmp_path: Path, style: str, head: str) -> None:
    before = len(asked_s3(server))
    env = s3(server, style=style) | ({"PLAY_HEAD": head} if head else {})
    status, said, asked = start(server, tmp_path, None, manifest(plus=f"ngc://nim/meta/llama:{PLUS}?file=config.json"), **env)
    assert (status, asked) == (0, []), said
    assert cached(tmp_path) == WHOLE | {f"models--nim--meta--llama/snapshots/{PLUS}/config.json": b'{"a":1}'}
    found = asked_s3(server)[before:]
    assert {line["status"] for line in found} == {200} and len(found) == (12 if head else 6)
    keys = [line["path"].removeprefix("/nim-bucket" if style == "path" else "") for line in found]
    assert all(key.startswith("/nim%2F") and "%3Ffile%3D" in key for key in keys), "the documented key, encoded once more on the wire"


def test_the_s3_override_refuses_as_the_others(server: Operated, tmp_path: Path) -> None:
    env = s3(server)
    for uri, words in (("paid:1", "AccessDenied"), ("absent:1", "NoSuchKey"), ("llama:9", "NoSuchKey")):
        status, said, _ = start(server, tmp_path, None, manifest(x=f"ngc://nim/meta/{uri}?file=config.json"), **env)
        assert status == 1 and words in said and "Traceback" not in said, said
    status, said, _ = start(server, tmp_path, None, **env | {"AWS_SECRET_ACCESS_KEY": "x" * 43})
    assert status == 1 and "SignatureDoesNotMatch" in said


def test_a_refused_key_gets_nothing_by_the_fallback_either(server: Operated, tmp_path: Path) -> None:
    status, said, asked = start(server, tmp_path, "expired", PLAY_PAGED="1")
    assert status == 1 and "Authentication Error" in said and cached(tmp_path) == {}
    assert {a.rpartition(" ")[2] for a in asked} == {"401"} and any("checksums.blake3" in a for a in asked)


@contextmanager
def unlisted(server: Operated, status: int) -> Iterator[tuple[dict[str, str], list[str]]]:
    """A host before the registry that refuses listings in NGC's words and passes on the rest: what leads a container there, and what it was asked."""
    asked: list[str] = []
    ngc = replace(server, port=int(place(server).rpartition(":")[2]))
    refusal = {"requestStatus": {"statusCode": "INVALID_REQUEST", "statusDescription": "Org contex missing"}}

    class Front(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            listing = urlsplit(self.path).path.endswith("/files")
            found = None if listing else ngc.ask("GET", self.path, None, None, Authorization=self.headers["Authorization"])
            self.send_response(found.status if found else status)
            self.end_headers()
            self.wfile.write(found.body if found else json.dumps(refusal).encode())
            asked.append(urlsplit(self.path).path.partition("/models/")[2])

        def log_message(self, *_: object) -> None:
            """The test reads what was asked."""

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Front)
    Thread(target=httpd.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield {"NGC_API_ENDPOINT": f"127.0.0.1:{httpd.server_port}", "NGC_API_SCHEME": "http", "PLAY_PAGED": "1"}, asked
    finally:
        httpd.shutdown()
        httpd.server_close()


@pytest.mark.parametrize("status", [400, 401])
def test_the_fallback_of_a_refused_listing(server: Operated, tmp_path: Path, status: int) -> None:
    """Each model's listing, its sums, then each of its files with the key: the same bytes as by the listing."""
    with unlisted(server, status) as (env, asked):
        code, said, passed = start(server, tmp_path, **env)
    assert (code, cached(tmp_path)) == (0, WHOLE), said
    files = {"engine/versions/fp8-1.0/files": [quote(path) for path in WEIGHTS], "params/versions/1/files": ["config.json"]}
    wanted = [f"{base}/{path}" for base, paths in files.items() for path in ("checksums.blake3", *paths)]
    assert sorted(asked) == sorted(["engine/fp8-1.0/files", "params/1/files", *wanted])
    assert len(passed) == len(wanted) and all(a.endswith(" 200") for a in passed)


TERMS = [
    ({"license": "the vendor's"}, "412 Precondition Failed", "nobody here has accepted"),
    ({"blocked": "a court"}, "451 Unavailable For Legal Reasons", "a court"),
]


@pytest.mark.parametrize(("terms_of", "status", "words"), TERMS)
def test_terms_and_a_block_reach_the_user_by_every_way(server: Operated, tmp_path: Path, terms_of: dict[str, str], status: str, words: str) -> None:
    """Neither is a reason to fall back; what is refused by the listing is refused by the fallback's routes and the overrides; the rest arrives."""
    rest = {path: data for path, data in WHOLE.items() if "params" in path}
    terms(server, ENGINE, **terms_of)
    try:
        with unlisted(server, 400) as (front, _):
            ways = {"listing": {}, "pages": {"PLAY_PAGED": "1"}, "fallback": front}
            ways |= {kind: {"NIM_REPOSITORY_OVERRIDE": f"{kind}://{place(server)}/"} for kind in ("https", "jfrog")}
            for way, env in ways.items():
                (folder := tmp_path / way).mkdir()
                code, said, asked = start(server, folder, **env)
                assert (code, cached(folder)) == (1, rest), (way, said)
                assert f"HTTP status client error ({status}) for url (http" in said and words in said and "Traceback" not in said, (way, said)
                assert way == "fallback" or not any("/versions/" in a for a in asked), (way, asked)
        (folder := tmp_path / "s3").mkdir()
        code, said, _ = start(server, folder, None, **s3(server))
        assert (code, cached(folder)) == (1, rest) and "AccessDenied" in said and words in said, said
    finally:
        terms(server, ENGINE, license="", blocked="")
    (folder := tmp_path / "lifted").mkdir()
    assert start(server, folder)[0] == 0 and cached(folder) == WHOLE


@pytest.mark.parametrize(
    ("who", "uri", "words"),
    [
        (None, "", "requires an API key, but none was found"),
        ("expired", "", "Authentication Error"),
        ("nothing", "ngc://nim/meta/engine:fp8-1.0?file=config.json", "Permission error"),
        ("low", "ngc://nim/meta/paid:1?file=config.json", "(402 Payment Required)"),
        ("low", "ngc://nim/meta/absent:1?file=config.json", "(404 Not Found)"),
        ("low", "ngc://nim/meta/engine:9?file=config.json", "(404 Not Found)"),
    ],
)
def test_refusals_as_the_container_tells_them(server: Operated, tmp_path: Path, who: str | None, uri: str, words: str) -> None:
    what = manifest(x=uri) if uri else manifest()
    status, said, _ = start(server, tmp_path, who, what)
    assert status == 1 and words in said and "Traceback" not in said, said


def test_without_the_native_store_a_private_authority_is_unknown(server: Operated, tmp_path: Path) -> None:
    status, said, asked = start(server, tmp_path, NIM_SDK_USE_NATIVE_TLS="0")
    assert status == 1 and "UnknownIssuer" in said and asked == []
