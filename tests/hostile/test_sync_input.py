"""What a hostile upstream or path may send to a mirror: attacks A22, A23, A25 and A29, and bytes that are not what the listing says."""

from __future__ import annotations

import http.server
import json
import socket
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from artifact.errors import AirlockError, Denied, Invalid, Mismatch, NotFound, Unavailable
from artifact.manifest import EMPTY_BYTES, MANIFEST, PROFILES_TYPE, build_manifest, canonical_json, digest_of
from artifact.remote import NOBODY_CALL, RemoteRegistry
from artifact.store import Descriptor
from mirror import web
from mirror.home import MirrorHome
from mirror.plan import parse
from mirror.sources.huggingface import HubSource
from mirror.sync import sync
from mirror.web import Fetcher
from tests.fakes.registry import registry
from tests.flows.test_fake_hub import TOKEN, hub, make_repo
from tests.flows.test_sync import push_blob, push_image, push_model

KEY = "airlock-upstream-secret-key-0123456789"


class _Spy(http.server.BaseHTTPRequestHandler):
    """Answers anything with 200 and remembers who asked with what."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.server.seen.append((self.path, dict(self.headers)))  # type: ignore[attr-defined]
        status, headers, body = self.server.answer(self.path, self.headers)  # type: ignore[attr-defined]
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_HEAD = do_POST = do_GET

    def log_message(self, *args: object) -> None:
        """Quiet."""


class Spy:
    """A listening server and what it saw."""

    def __init__(self, server: http.server.ThreadingHTTPServer) -> None:
        self.seen: list[tuple[str, dict[str, str]]] = []
        server.seen, self.port = self.seen, server.server_port  # type: ignore[attr-defined]
        self.url = f"http://127.0.0.1:{self.port}"


class _Quiet(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hangs up on a bomb is what the test wants."""


@contextmanager
def spy(answer=lambda path, headers: (200, {}, b"{}")) -> Iterator[Spy]:
    server = _Quiet(("127.0.0.1", 0), _Spy)
    server.answer = answer  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield Spy(server)
    finally:
        server.shutdown()
        server.server_close()


def run(tmp_path: Path, item: dict[str, object], **environ: str) -> tuple[MirrorHome, dict]:
    """One run over one item in this process."""
    home = MirrorHome.open(tmp_path / "mirror") if (tmp_path / "mirror").exists() else MirrorHome.init(tmp_path / "mirror")
    report = sync(home, parse(json.dumps({"items": [item]}), tmp_path), environ=environ)
    return home, report["items"][0]  # type: ignore[index]


def refused(tmp_path: Path, item: dict[str, object], code: str, *, key: str = TOKEN) -> dict:
    """The error of an item that must fail, leave no name and no key behind."""
    home, result = run(tmp_path, item | {"key_env": "KEY"}, KEY=key)
    assert result["status"] == "failed" and result["error"]["error"] == code, result
    assert home.names() == [] and key not in json.dumps(result)
    return result["error"]


@pytest.mark.server
@pytest.mark.parametrize(
    "path",
    [
        "..%2fx",
        "a/../b",
        "../x",
        "/etc/passwd",
        "a\\b",
        "a//b",
        ".git/config",
        "x/.GIT/hooks",
        "a\x00b",
        "a\nb",
        "x" * 1100,
        "./a",
        "sub/",
        "Config.json",
        "\ud800",
    ],
)
def test_a29_names_of_the_listing(tmp_path: Path, path: str) -> None:
    node = {"type": "file", "path": path, "size": 1, "oid": "0" * 40}
    make_repo(tmp_path / "repos", "acme/evil", nodes=[node])
    with hub(tmp_path / "repos", tmp_path / "log") as running:
        item = {"source": "hf://acme/evil", "endpoint": running.endpoint}
        if path == "..%2fx":  # as a name it is harmless and quoted again on the way out: it can only be absent
            assert refused(tmp_path, item, "not_found")["reason"] == "entry"
        else:
            assert refused(tmp_path, item, "invalid")
        assert not [p for p in tmp_path.rglob("x") if "repos" not in p.parts]


@pytest.mark.server
def test_more_files_than_a_manifest_holds_are_refused_before_one_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mirror.sources.huggingface.MAX_FILES", 2)
    make_repo(tmp_path / "repos", "acme/many")
    with hub(tmp_path / "repos", tmp_path / "log") as running:
        error = refused(tmp_path, {"source": "hf://acme/many", "endpoint": running.endpoint}, "too_large")
        assert "files of acme/many" in error["what"] and not [e for e in running.requests() if "/resolve/" in e["path"]]


@pytest.mark.server
@pytest.mark.parametrize(
    ("lies", "code"),
    [
        ({"model.safetensors": {"sha256": "a" * 64}}, "mismatch"),
        ({"model.safetensors": {"sha256": "../../../../etc/passwd"}}, "invalid"),
        ({"model.safetensors": {"size": 2_999_999}}, "mismatch"),
        ({"model.safetensors": {"size": -1}}, "invalid"),
        ({"model.safetensors": {"size": "9"}}, "invalid"),
        ({"config.json": {"oid": "b" * 40}}, "mismatch"),
        ({"config.json": {"oid": "x"}}, "invalid"),
        ({"config.json": {"size": 3}}, "mismatch"),
        ({"config.json": {"size": 10**12}}, "too_large"),
        ({"empty.txt": {"oid": "c" * 40}}, "mismatch"),
    ],
)
def test_bytes_that_are_not_what_the_listing_says(tmp_path: Path, lies: dict, code: str) -> None:
    make_repo(tmp_path / "repos", "acme/evil", lies=lies)
    with hub(tmp_path / "repos", tmp_path / "log") as running:
        refused(tmp_path, {"source": "hf://acme/evil", "endpoint": running.endpoint}, code)
    wrong = {lie.get("sha256", "") for lie in lies.values()}
    assert not [d for d, _ in MirrorHome.open(tmp_path / "mirror").disk.walk() if d[7:] in wrong]


@pytest.mark.server
def test_a23_page_link_to_another_host_gets_no_request(tmp_path: Path) -> None:
    with spy() as other:
        make_repo(tmp_path / "repos", "acme/evil", next_page=f"{other.url}/api/models/acme/evil/tree/main?cursor=2")
        with hub(tmp_path / "repos", tmp_path / "log") as running:
            refused(tmp_path, {"source": "hf://acme/evil", "endpoint": running.endpoint}, "denied")
        assert other.seen == []


@pytest.mark.server
def test_a23_the_key_stays_at_home(tmp_path: Path) -> None:
    with spy(lambda path, headers: (200, {}, b'{"model_type": "llama"}')) as other:
        make_repo(tmp_path / "repos", "acme/far", redirect={"config.json": f"{other.url}/elsewhere?sig=1"})
        with hub(tmp_path / "repos", tmp_path / "log") as running:
            _, result = run(tmp_path, {"source": "hf://acme/far", "endpoint": running.endpoint, "key_env": "KEY"}, KEY=TOKEN)
        assert result["status"] == "synced", result
        assert [path for path, _ in other.seen] == ["/elsewhere?sig=1"]
        assert "authorization" not in {k.lower() for _, headers in other.seen for k in headers} and TOKEN not in repr(other.seen)


@pytest.mark.server
@pytest.mark.parametrize(
    "target",
    ["http://169.254.169.254/latest/meta-data", "file:///etc/passwd", "gopher://127.0.0.1/", "http://user:pw@127.0.0.1/", "http://good\\@evil/",
     "http://[::ffff:169.254.169.254]/", "http://0.0.0.0:1/", "http://224.0.0.1/"],
)  # fmt: skip
def test_a23_a24_redirects_that_are_not_followed(tmp_path: Path, target: str) -> None:
    make_repo(tmp_path / "repos", "acme/evil", redirect={"config.json": target})
    with hub(tmp_path / "repos", tmp_path / "log") as running:
        home, result = run(tmp_path, {"source": "hf://acme/evil", "endpoint": running.endpoint})
    assert result["error"]["error"] in ("denied", "invalid") and result["error"]["reason"] == "redirect", result
    assert home.names() == []


def test_a23_a_public_https_endpoint_leads_neither_inside_nor_to_http(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {"hub.example": "93.184.216.34", "inside.example": "10.1.2.3", "cdn.example": "93.184.216.35", "loop.example": "127.0.0.1"}
    monkeypatch.setattr(web, "addresses", lambda host, port: [known.get(host, host)])
    fetcher = Fetcher("https://hub.example", KEY)
    for url in (
        "https://inside.example/x",
        "https://loop.example/x",
        "https://10.0.0.1/x",
        "https://[::1]/x",
        "https://[fd00::1]/x",
        "http://cdn.example/x",
    ):
        with pytest.raises(Denied):
            fetcher._pool(web.origin(url), False)
    pool = fetcher._pool(web.origin("https://cdn.example/x"), False)
    assert pool.host == "93.184.216.35" and pool.assert_hostname == "cdn.example"  # type: ignore[attr-defined]


def test_a23_at_most_five_hops() -> None:
    with spy(lambda path, headers: (302, {"Location": f"/{int(path[1:]) + 1}"}, b"")) as loop:
        with pytest.raises(Invalid, match="redirects more than 5 times"):
            Fetcher(loop.url).whole("/0", 10)
        assert len(loop.seen) == 6


@pytest.mark.server
@pytest.mark.parametrize(("flaw", "code"), [("encode", "mismatch"), ("endless", "mismatch")])
@pytest.mark.parametrize("path", ["config.json", "model.safetensors"])
def test_a25_bodies_without_end_or_compressed(tmp_path: Path, flaw: str, code: str, path: str) -> None:
    make_repo(tmp_path / "repos", "acme/evil", **{flaw: [path]})
    with hub(tmp_path / "repos", tmp_path / "log") as running:
        refused(tmp_path, {"source": "hf://acme/evil", "endpoint": running.endpoint}, code)
        (tmp_path / "repos" / "acme" / "evil" / "meta.json").unlink()
        _, result = run(tmp_path, {"source": "hf://acme/evil", "endpoint": running.endpoint})
    assert result["status"] == "synced", result


@pytest.mark.server
def test_a25_a_trickle_is_given_up(tmp_path: Path) -> None:
    make_repo(tmp_path / "repos", "acme/slow", stall=["config.json"])
    with hub(tmp_path / "repos", tmp_path / "log") as running:
        fetcher = Fetcher(running.endpoint, slow_after_s=2.0)
        with pytest.raises(Unavailable, match="too slowly"):
            fetcher.whole("/acme/slow/resolve/main/config.json", 23)


@pytest.mark.server
def test_a25_metadata_bombs() -> None:
    import gzip

    bomb = gzip.compress(b'{"id": "' + b"a" * 10_000_000 + b'"}')
    item = {"source": "hf://acme/m"}
    for answer, code in (
        ((200, {"Content-Encoding": "gzip"}, bomb), "mismatch"),
        ((200, {}, b'{"id": "acme/m", "sha": "' + b"a" * 70_000_000 + b'"}'), "too_large"),
        ((200, {}, b"[" * 200_000), "invalid"),
        ((200, {}, b'{"id": 7, "sha": ["x"]}'), "mismatch"),
        ((200, {}, b"not json"), "invalid"),
        ((404, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "\x1b[31mred"}, b"{}"), "not_found"),
        ((302, {"Location": "http://169.254.169.254/"}, b""), "denied"),
    ):
        with spy(lambda path, headers, answer=answer: answer) as server:
            plan = parse(json.dumps({"items": [item | {"endpoint": server.url}]}), Path("/"))
            from mirror.sources.huggingface import HubSource

            with pytest.raises(AirlockError) as caught:
                HubSource(server.url, KEY).resolve(plan.items[0])
            assert caught.value.code == code and "\x1b" not in str(caught.value) and KEY not in str(caught.value)


@pytest.mark.server
def test_a22_a_realm_elsewhere_gets_neither_request_nor_key(tmp_path: Path) -> None:
    with spy() as realm:
        challenge = {"WWW-Authenticate": f'Bearer realm="{realm.url}/token",service="x"'}
        with spy(lambda path, headers: (401, challenge, b"{}")) as upstream:
            refused(tmp_path, {"source": f"oci://127.0.0.1:{upstream.port}/acme/tiny:1", "plain_http": True}, "unsupported", key=KEY)
        assert realm.seen == []


@pytest.mark.server
def test_a23_oci_blobs_redirected_lose_the_key(tmp_path: Path) -> None:
    blob = b"layer bytes"
    config = {"mediaType": "application/x", "digest": digest_of(blob), "size": len(blob)}
    manifest = canonical_json({"schemaVersion": 2, "mediaType": MANIFEST, "config": config, "layers": []})
    sent = {"Content-Range": f"bytes 0-{len(blob) - 1}/{len(blob)}"}
    with spy(lambda path, headers: (206, sent, blob)) as store:

        def answer(path: str, headers: object) -> tuple[int, dict[str, str], bytes]:
            if "/blobs/" in path:
                return 307, {"Location": f"{store.url}/object"}, b""
            return (200, {"Content-Type": MANIFEST}, manifest) if path.endswith("/manifests/1") else (404, {}, b"{}")

        with spy(answer) as upstream:
            _, result = run(tmp_path, {"source": f"oci://127.0.0.1:{upstream.port}/a/b:1", "plain_http": True, "key_env": "KEY"}, KEY=KEY)
        assert result["status"] == "synced", result
        assert store.seen and "authorization" not in {k.lower() for _, headers in store.seen for k in headers}
        assert any("Authorization" in headers for _, headers in upstream.seen)


@pytest.mark.server
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("model.safetensors.index.json", '{"weight_map": {"a": "model.safetensors", "b": "../../x"}}'),
        ("model.safetensors.index.json", '{"weight_map": {"a": "/etc/shadow"}}'),
        ("sub/model.safetensors.index.json", '{"weight_map": {"a": ["x"], "b": "a\\\\b"}}'),
        ("model.safetensors.index.json", "[" * 100_000),
        ("tokenizer_config.json", '{"chat_template": [{"name": "a/../../b", "template": ""}]}'),
        ("tokenizer_config.json", '{"chat_template": {"../x": ""}}'),
    ],
)
def test_a29_paths_inside_json(tmp_path: Path, name: str, text: str) -> None:
    folder = make_repo(tmp_path / "repos", "acme/evil")
    (folder / name).write_text(text)
    with hub(tmp_path / "repos", tmp_path / "log") as running:
        refused(tmp_path, {"source": "hf://acme/evil", "endpoint": running.endpoint}, "invalid")
        (folder / name).write_text('{"weight_map": {"a": "model.safetensors"}, "chat_template": [{"name": "default", "template": ""}]}')
        _, result = run(tmp_path, {"source": "hf://acme/evil", "endpoint": running.endpoint})
    assert result["status"] == "synced", result


@pytest.mark.server
def test_a29_a_link_in_the_repository_is_only_its_text(tmp_path: Path) -> None:
    """A symlink of a Hub repository arrives as a small file that holds its target: it is stored as bytes and never made a link again."""
    folder = make_repo(tmp_path / "repos", "acme/link")
    (folder / "weights").write_text("/etc/shadow")
    with hub(tmp_path / "repos", tmp_path / "log") as running:
        home, result = run(tmp_path, {"source": "hf://acme/link", "endpoint": running.endpoint})
    assert result["status"] == "synced"
    assert home.disk.read(digest_of(b"/etc/shadow"), 100) == b"/etc/shadow"
    assert not [p for p in (tmp_path / "mirror").rglob("*") if p.is_symlink()]


@pytest.mark.server
def test_a_profile_cannot_move_another_name(tmp_path: Path) -> None:
    with registry(tmp_path / "upstream") as running:
        remote = RemoteRegistry(running.url)
        own = push_model(remote, "good/model", "1", b"good weights", profiles=False)
        push_model(remote, "evil/model", "1", b"evil weights", profiles=False)
        other = push_image(remote, "good/model", "evil", 1, 1000)
        profile = {"id": "x", "tags": {"llm_engine": "vllm"}, "model": {"name": "good/model", "digest": other}}
        document = canonical_json({"schema": 1, "model": "evil/model", "profiles": [profile]})
        for blob in (EMPTY_BYTES, document):
            push_blob(remote, "evil/model/profiles", blob)
        layer = Descriptor(PROFILES_TYPE, digest_of(document), len(document)).as_json()
        remote.push(NOBODY_CALL, "evil/model/profiles", build_manifest(PROFILES_TYPE, [layer], {}), MANIFEST, refs=("1",))
        items = [{"source": f"oci://{running.host}/{n}:1", "as": n, "plain_http": True} for n in ("good/model", "evil/model")]
        home = MirrorHome.init(tmp_path / "mirror")
        report = sync(home, parse(json.dumps({"items": items}), tmp_path))
    assert report["failed"] == 0, report
    refs = {n.ref: n.digest for n in home.names() if n.name == "good/model"}
    assert refs == {"1": own, other: other}


def test_nobody_listens(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    refused(tmp_path, {"source": "hf://acme/m", "endpoint": url}, "unavailable")
    assert issubclass(Unavailable, AirlockError) and issubclass(NotFound, AirlockError) and issubclass(Mismatch, AirlockError)


HOSTILE_USERS = [
    b"[]",
    b'{"name": 7, "auth": {"accessToken": {"role": ["read"]}}}',
    b'{"name": "a\\u001b[2Jb", "auth": "x"}',
    b'{"name": "\\ud800"}',
    json.dumps({"name": f"user of {KEY}", "auth": {"accessToken": {"role": KEY}}}).encode(),
]


@pytest.mark.server
@pytest.mark.parametrize("body", HOSTILE_USERS)
def test_what_a_hub_says_of_a_user_is_kept_only_as_a_short_word(body: bytes) -> None:
    with spy(lambda path, headers: (200, {"Content-Type": "application/json"}, body)) as hub_:
        assert HubSource(f"http://127.0.0.1:{hub_.port}", KEY).who() == ("", "")


@pytest.mark.server
def test_a_gate_that_answers_from_elsewhere_is_not_believed_and_gets_no_key(tmp_path: Path) -> None:
    make_repo(tmp_path / "repos", "acme/tiny", gated="auto")
    with spy() as elsewhere, hub(tmp_path / "repos", tmp_path / "log") as running:

        def answer(path: str, headers: dict[str, str]) -> tuple[int, dict[str, str], bytes]:
            if path.endswith("/auth-check"):
                return 302, {"Location": f"http://127.0.0.1:{elsewhere.port}/yes"}, b""
            with urllib.request.urlopen(running.endpoint + path) as found:  # the rest as the Hub says it
                return 200, {"Content-Type": "application/json"}, found.read()

        with spy(answer) as liar:
            item = {"source": "hf://acme/tiny", "endpoint": f"http://127.0.0.1:{liar.port}"}
            assert refused(tmp_path, item, "denied", key=KEY)["reason"] == "redirect"
        assert not elsewhere.seen and not any("/resolve/" in path for path, _ in liar.seen)
