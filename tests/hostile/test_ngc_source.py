"""What a hostile NGC, or whoever sits on the way to it, may send to a mirror: A22, A23, A25, A29 and listings that lie."""

from __future__ import annotations

import json
import os
import random
from base64 import b64encode
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from artifact.disk import Partial
from artifact.errors import AirlockError, Invalid
from artifact.manifest import digest_of, files_of, parse_manifest
from mirror.home import MirrorHome
from mirror.ngc_api import Api
from mirror.ngc_listing import sums_of
from mirror.plan import parse
from mirror.sources.ngc import NgcSource
from tests.flows.test_fake_ngc import DEMO, LEGACY, PERSONAL, Ngc, contents, make_image, make_model, ngc
from tests.hostile.test_sync_input import run, spy

pytestmark = pytest.mark.server


def item(cloud: Ngc, **more: Any) -> dict[str, Any]:
    return {"source": f"ngc://{DEMO}:1.0", "endpoint": cloud.api, "auth_endpoint": cloud.authn, "key_env": "KEY"} | more


def refused(tmp_path: Path, what: dict[str, Any], code: str, key: str = PERSONAL) -> dict[str, Any]:
    """The error of an item that must fail and leave neither name nor key behind."""
    home, result = run(tmp_path, what, KEY=key)
    assert result["status"] == "failed" and result["error"]["error"] == code, result
    assert home.names() == [] and key not in json.dumps(result) and "Signature=" not in json.dumps(result)
    return dict(result["error"])


NAMES = ["a/../b", "../x", "/etc/passwd", "a\\b", "a//b", ".git/config", "x/.GIT/hooks", "a\x00b", "x" * 1100, "sub/", "Config.json", "\ud800"]
# In checksums.blake3 `./a` is how some tools write `a`, and what follows the end of a line is another line.
PLACES = [*((name, "sums") for name in NAMES), *((name, "listing") for name in [*NAMES, "./a", "a\nb"])]


@pytest.mark.parametrize(("path", "where"), PLACES)
def test_a29_names(tmp_path: Path, path: str, where: str) -> None:
    make_model(tmp_path / "ngc", sums=True)
    with ngc(tmp_path / "ngc", tmp_path / "log") as cloud:
        if where == "listing":
            cloud.change(DEMO, "1.0", nodes=[{"path": path, "sizeInBytes": 1, "sha256_base64": None}])
        else:
            sums = cloud.root / "models" / DEMO / "1.0" / "checksums.blake3"
            sums.write_bytes(sums.read_bytes() + f"{'ab' * 32}  {path}\n".encode("utf-8", "surrogatepass"))
            cloud.change(DEMO, "1.0", unlisted=True)
        refused(tmp_path, item(cloud), "invalid")
        assert not cloud.requests("files")


@pytest.mark.parametrize(
    ("lies", "code"),
    [
        ({"model.safetensors": {"sha256_base64": "A" * 43 + "="}}, "mismatch"),
        ({"model.safetensors": {"sha256_base64": "../../etc/passwd"}}, "invalid"),
        ({"model.safetensors": {"sha256_base64": 7}}, "invalid"),
        ({"model.safetensors": {"sizeInBytes": 2_999_999}}, "mismatch"),
        ({"model.safetensors": {"sizeInBytes": 2_999_999, "sha256_base64": None}}, "mismatch"),
        ({"model.safetensors": {"sizeInBytes": 3_000_001, "sha256_base64": None}}, "mismatch"),
        ({"model.safetensors": {"sizeInBytes": 0}}, "mismatch"),
        ({"model.safetensors": {"sizeInBytes": -1}}, "invalid"),
        ({"model.safetensors": {"sizeInBytes": "9"}}, "invalid"),
        ({"model.safetensors": {"sizeInBytes": 1 << 62}}, "unavailable"),
        ({"model.safetensors": {"path": "config.json"}}, "invalid"),
    ],
)
def test_sizes_and_digests_that_lie(tmp_path: Path, lies: dict[str, Any], code: str) -> None:
    make_model(tmp_path / "ngc", lies=lies)
    with ngc(tmp_path / "ngc", tmp_path / "log") as cloud:
        refused(tmp_path, item(cloud), code)


@pytest.mark.parametrize("known", [True, False], ids=["sha256", "no-sha256"])
def test_bytes_that_are_not_what_the_checksums_say(tmp_path: Path, known: bool) -> None:
    folder = make_model(tmp_path / "ngc", sums=True, no_sha256=not known)
    good = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    with ngc(tmp_path / "ngc", tmp_path / "log") as cloud:
        for _ in range(2):  # having them in staging by their own digest makes them no better
            assert "BLAKE3" in refused(tmp_path, item(cloud), "mismatch")["what"]
        (folder / "model.safetensors").write_bytes(good)
        assert run(tmp_path, item(cloud), KEY=PERSONAL)[1]["status"] == "synced"


def test_checksums_that_are_not_chosen_hold_all_the_same(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "ngc", sums=True, no_sha256=True)
    good = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    with ngc(tmp_path / "ngc", tmp_path / "log") as cloud:
        chosen = item(cloud, allow=["*.safetensors"])
        assert "BLAKE3" in refused(tmp_path, chosen, "mismatch")["what"]
        (folder / "model.safetensors").write_bytes(good)
        assert run(tmp_path, chosen, KEY=PERSONAL)[1]["status"] == "synced"
        cloud.change(DEMO, "1.0", lies={"checksums.blake3": {"sizeInBytes": 1 << 40}})
        assert run(tmp_path, chosen, KEY=PERSONAL)[1]["error"]["error"] == "too_large"


@pytest.mark.parametrize("how", ["unlisted", "unsigned"])
def test_checksums_that_leave_files_out(tmp_path: Path, how: str) -> None:
    """Where they take a listing's place they must name all that the version has; what a listing named besides is kept."""
    folder = make_model(tmp_path / "ngc", sums=True, **{how: True})
    sums = (folder / "checksums.blake3").read_text().splitlines(keepends=True)
    (folder / "checksums.blake3").write_text("".join(line for line in sums if "model.safetensors" not in line))
    with ngc(tmp_path / "ngc", tmp_path / "log") as cloud:
        if how == "unlisted":
            cloud.change(DEMO, "1.0", count=6)
            assert "5 of the 6 files" in refused(tmp_path, item(cloud), "invalid")["what"]
        else:
            home, result = run(tmp_path, item(cloud), KEY=PERSONAL)
            manifest = parse_manifest(home.disk.read(result["names"][0]["digest"], 1 << 22))
            assert {f.path for f in files_of(manifest)} == {*contents(), "checksums.blake3"}


def test_checksums_that_are_no_file_of_the_version_do_not_become_one(tmp_path: Path) -> None:
    """Both routes give one digest, where the version's own count tells that the listing would leave them out."""
    digests = []
    for name, facts in (("listed", {}), ("unlisted", {"sums": True, "unlisted": True, "count": 5})):
        make_model(tmp_path / name / "ngc", **facts)
        with ngc(tmp_path / name / "ngc", tmp_path / name / "log") as cloud:
            digests.append(run(tmp_path / name, item(cloud), KEY=PERSONAL)[1]["names"][0]["digest"])
    assert digests[0] == digests[1]


def test_more_files_than_a_manifest_holds_are_refused_before_one_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mirror.sources.ngc.MAX_FILES", 4)
    make_model(tmp_path / "ngc")
    with ngc(tmp_path / "ngc", tmp_path / "log") as cloud:
        assert "5 files" in refused(tmp_path, item(cloud), "too_large")["what"] and not cloud.requests("files")


@pytest.mark.parametrize("marked", [True, False], ids=["etag", "no-etag"])
def test_a_file_of_which_nothing_is_told_is_never_made_of_two(tmp_path: Path, marked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What an earlier run left is continued only where its host says that the file is still the same."""
    monkeypatch.setattr("artifact.copy.CHECKPOINT", 1_000_000)
    old, new = (random.Random(seed).randbytes(5_000_000) for seed in (1, 2))
    folder = make_model(tmp_path / "ngc", files={"w.bin": old}, no_sha256=True, unmarked=[] if marked else ["w.bin"])
    with ngc(tmp_path / "ngc", tmp_path / "log") as cloud:
        with monkeypatch.context() as broken:
            write = Partial.write

            def failing(self: Partial, offset: int, view: bytes) -> None:
                if offset > 3_000_000:
                    raise Invalid("killed here")
                write(self, offset, view)

            broken.setattr(Partial, "write", failing)
            assert refused(tmp_path, item(cloud), "invalid")["what"] == "killed here"
        assert any('"to"' in j.read_text() for j in (tmp_path / "mirror" / "staging" / "partial").glob("*.journal"))
        (folder / "w.bin").write_bytes(new)
        home, result = run(tmp_path, item(cloud), KEY=PERSONAL)
        assert result["status"] == "synced"
        (file,) = files_of(parse_manifest(home.disk.read(result["names"][0]["digest"], 1 << 22)))
        assert file.digest == digest_of(new)


@pytest.mark.parametrize(
    ("facts", "code"),
    [
        ({"endless": ["pages"]}, "too_large"),
        ({"html": True}, "invalid"),
        ({"huge": True}, "too_large"),
        ({"endless": ["config.json"]}, "mismatch"),
        ({"encode": ["config.json"]}, "mismatch"),
        ({"encode": ["model.safetensors"]}, "mismatch"),
        ({"cut": {"model.safetensors": 0}}, "unavailable"),
        ({"urls": {"config.json": 7}}, "invalid"),
        ({"urls": {"config.json": "http://127.0.0.1/" + "x" * 20_000}}, "too_large"),
        ({"text": '{"model": {"stars": 1e400}, "modelVersion": {"status": "UPLOAD_COMPLETE"}}'}, "invalid"),
        ({"status": "UPLOAD_PENDING"}, "invalid"),
        ({"strange": {"config.json": 404}}, "not_found"),
        ({"strange": {"config.json": 403}}, "denied"),
    ],
    ids=lambda value: json.dumps(value)[:60] if isinstance(value, dict) else "",
)
def test_a25_answers_without_end_compressed_cut_or_for_people(
    tmp_path: Path, facts: dict[str, Any], code: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("artifact.copy.ATTEMPTS", 2)
    make_model(tmp_path / "ngc", **facts)
    with ngc(tmp_path / "ngc", tmp_path / "log") as cloud:
        refused(tmp_path, item(cloud), code)
        told = json.loads((cloud.root / "cloud.json").read_text())
        told["models"][DEMO]["versions"]["1.0"] = {}
        (cloud.root / "cloud.json").write_text(json.dumps(told))
        assert run(tmp_path, item(cloud), KEY=PERSONAL)[1]["status"] == "synced"


@pytest.mark.parametrize(
    "target",
    ["http://169.254.169.254/latest/meta-data", "file:///etc/passwd", "gopher://127.0.0.1/", "http://user:pw@127.0.0.1/", "http://good\\@evil/",
     "http://[::ffff:169.254.169.254]/", "http://0.0.0.0:1/", "http://224.0.0.1/", "http://[", "//", ""],
)  # fmt: skip
@pytest.mark.parametrize("how", ["signed", "redirect", "signature"])
def test_a23_a24_places_that_are_not_gone_to(tmp_path: Path, target: str, how: str) -> None:
    make_model(tmp_path / "ngc", sums=True, signed=True)
    with ngc(tmp_path / "ngc", tmp_path / "log") as cloud:
        if how == "redirect":
            cloud.change(DEMO, "1.0", unlisted=True, redirect_file={"config.json": target or "http://"})
        else:
            cloud.change(DEMO, "1.0", urls={"config.json" if how == "signed" else "result.sigstore": target or "http://"})
        home, result = run(tmp_path, item(cloud), KEY=PERSONAL)
    assert result["error"]["error"] in ("denied", "invalid", "unavailable") and home.names() == [], result
    assert "pw@" not in json.dumps(result) and PERSONAL not in json.dumps(result)


@pytest.mark.parametrize("how", ["signed", "redirect", "signature"])
def test_a23_no_key_goes_to_another_host(tmp_path: Path, how: str) -> None:
    body = contents()["config.json"]
    sent = {"Content-Range": f"bytes 0-{len(body) - 1}/{len(body)}"}

    def answer(path: str, headers: Any) -> tuple[int, dict[str, str], bytes]:
        if headers.get("Range") == "bytes=0-0":
            return 206, {"Content-Range": f"bytes 0-0/{len(body)}"}, body[:1]
        return (206, sent, body) if headers.get("Range") else (200, {}, body)

    make_model(tmp_path / "ngc", sums=True, signed=how == "signature")
    with spy(answer) as other, ngc(tmp_path / "ngc", tmp_path / "log") as cloud:
        if how == "redirect":
            cloud.change(DEMO, "1.0", unlisted=True, redirect_file={"config.json": f"{other.url}/x?sig=1"})
        else:
            cloud.change(DEMO, "1.0", urls={"config.json" if how == "signed" else "result.sigstore": f"{other.url}/x?sig=1"})
        assert run(tmp_path, item(cloud), KEY=PERSONAL)[1]["status"] == "synced"
        assert other.seen and "authorization" not in {k.lower() for _, headers in other.seen for k in headers}
        assert PERSONAL not in repr(other.seen)


@pytest.mark.parametrize(("body", "code"), [(b"<html>", "invalid"), (b"{" + b" " * 5_000_000 + b"}", "too_large"), (b"[1]", "invalid")])
def test_a_signature_that_is_none(tmp_path: Path, body: bytes, code: str) -> None:
    make_model(tmp_path / "ngc", signed=True)
    with spy(lambda path, headers: (200, {}, body)) as other, ngc(tmp_path / "ngc", tmp_path / "log") as cloud:
        cloud.change(DEMO, "1.0", urls={"result.sigstore": f"{other.url}/x?sig=1"})
        refused(tmp_path, item(cloud), code)


@pytest.mark.parametrize("how", ["signed", "redirect", "signature"])
def test_a23_no_place_without_tls_behind_one_with_it(tmp_path: Path, how: str) -> None:
    make_model(tmp_path / "ngc", sums=True, signed=True)
    with spy() as plain, ngc(tmp_path / "ngc", tmp_path / "log", tls=True) as cloud:
        if how == "redirect":
            cloud.change(DEMO, "1.0", unlisted=True, redirect_file={"config.json": f"{plain.url}/x"})
        else:
            cloud.change(DEMO, "1.0", urls={"config.json" if how == "signed" else "result.sigstore": f"{plain.url}/x"})
        assert refused(tmp_path, item(cloud, ca_file=str(cloud.ca)), "denied")["reason"] == "redirect"
        assert not plain.seen


def test_two_runs_at_once_bring_one_version(tmp_path: Path) -> None:
    """The second waits for the first and has nothing to fetch."""
    make_model(tmp_path / "ngc", no_sha256=True)
    MirrorHome.init(tmp_path / "mirror")
    with ngc(tmp_path / "ngc", tmp_path / "log", "--throttle", "3000000") as cloud, ThreadPoolExecutor(2) as pool:
        results = [r.result()[1] for r in [pool.submit(run, tmp_path, item(cloud), KEY=PERSONAL) for _ in range(2)]]
    assert sorted(r["status"] for r in results) == ["synced", "unchanged"]
    assert sorted(r["transferred"] > 1_000_000 for r in results) == [False, True]


def test_a22_metadata_and_tokens_from_elsewhere_get_neither_request_nor_key(tmp_path: Path) -> None:
    with spy() as elsewhere, spy(lambda path, headers: (302, {"Location": f"{elsewhere.url}/x"}, b"")) as liar:
        for key in (PERSONAL, LEGACY):
            what = {"source": f"ngc://{DEMO}:1.0", "endpoint": liar.url, "auth_endpoint": liar.url, "key_env": "KEY"}
            assert refused(tmp_path, what, "denied", key)["reason"] == "redirect"
        assert not elsewhere.seen


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        ((200, {}, b"not json"), "invalid"),
        ((200, {}, b"[]"), "invalid"),
        ((200, {}, b"[" * 200_000), "invalid"),
        ((200, {}, b'{"modelVersion": 7, "model": []}'), "invalid"),
        ((200, {}, b'{"requestStatus": {"statusCode": "FORBIDDEN", "statusDescription": ["x"]}}'), "invalid"),
        ((200, {}, b'{"model": "' + b"a" * 5_000_000 + b'"}'), "too_large"),
        ((200, {}, b'{"model": [' + b"{}," * 1_000_001 + b"{}]}"), "too_large"),
        ((200, {"Content-Encoding": "gzip"}, b"\x1f\x8b"), "mismatch"),
        ((402, {}, b'{"requestStatus": {"statusCode": "x", "statusDescription": "' + PERSONAL.encode() + b' \\u001b[31m"}}'), "denied"),
        ((451, {}, b"<html>" + b"x" * 1_000_000), "denied"),
        ((503, {}, b""), "unavailable"),
        ((200, {"Content-Length": "5"}, b"{}"), "unavailable"),
    ],
)
def test_a25_metadata_that_cannot_be_read(tmp_path: Path, answer: tuple[int, dict[str, str], bytes], code: str) -> None:
    with spy(lambda path, headers: answer) as server:
        plan = parse(json.dumps({"items": [{"source": f"ngc://{DEMO}:1.0", "endpoint": server.url}]}), tmp_path)
        with pytest.raises(AirlockError) as caught:
            NgcSource(plan.items[0], PERSONAL).resolve()
        assert caught.value.code == code and "\x1b" not in str(caught.value) and PERSONAL not in str(caught.value)


@pytest.mark.parametrize(
    "body",
    [b"{}", b'{"token": 7}', b'{"token": "a\\nb"}', b'{"token": ""}', b'{"token": "a b", "expires_in": 900}', b"<html>", b'{"token": "\\u00e9"}'],
)
def test_tokens_that_are_none(body: bytes) -> None:
    with spy(lambda path, headers: (200, {}, body)) as server:
        with pytest.raises(AirlockError) as caught:
            Api(server.url, server.url, LEGACY).json("/v2/x")
        assert LEGACY not in str(caught.value) and [p.partition("?")[0] for p, _ in server.seen] == ["/token"]


def test_a21_a_token_service_that_repeats_what_it_was_sent(tmp_path: Path) -> None:
    def answer(path: str, headers: Any) -> tuple[int, dict[str, str], bytes]:
        words = {"statusCode": "UNAUTHORIZED", "statusDescription": f"refused: {headers.get('Authorization')}"}
        return 401, {}, json.dumps({"requestStatus": words}).encode()

    with spy(answer) as server:
        what = {"source": f"ngc://{DEMO}:1.0", "endpoint": server.url, "auth_endpoint": server.url, "key_env": "KEY"}
        error = refused(tmp_path, what, "unauthenticated", LEGACY)
        assert b64encode(f"$oauthtoken:{LEGACY}".encode()).decode() not in json.dumps(error)


@pytest.mark.parametrize("raw", [b"x", b"\xff", b"ab  config.json", b"a" * 64 + b"  a\n" + b"b" * 64 + b"  a\n", b"A" * 64 + b"  a"])
def test_checksums_that_are_none(raw: bytes) -> None:
    with pytest.raises(AirlockError):
        sums_of(raw)


def test_json_of_a_model_is_looked_at_here_too(tmp_path: Path) -> None:
    files = contents() | {"model.safetensors.index.json": b'{"weight_map": {"a": "../../x"}}'}
    make_model(tmp_path / "ngc", files=files)
    with ngc(tmp_path / "ngc", tmp_path / "log") as cloud:
        assert refused(tmp_path, item(cloud), "invalid")["reason"] == "path"


def test_a22_a_realm_of_nvcr_elsewhere_gets_no_key(tmp_path: Path) -> None:
    """The realm for a token that ended is not followed, and one at another host is refused."""
    make_model(tmp_path / "ngc")
    make_image(tmp_path / "ngc", "nim/meta/app", [os.urandom(100)])
    with spy() as realm, spy(lambda path, headers: (401, {"WWW-Authenticate": f'Bearer realm="{realm.url}/token"'}, b"<html>")) as nvcr:
        what = {"source": f"oci://127.0.0.1:{nvcr.port}/nim/meta/app:1.0", "plain_http": True, "key_env": "KEY"}
        refused(tmp_path, what, "unsupported")
        assert not realm.seen and MirrorHome.open(tmp_path / "mirror").names() == []
