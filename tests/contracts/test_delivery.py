"""Who sends the bytes: the registry itself, the object store by a redirect, or the nginx in front; each proven with the real other side."""

from __future__ import annotations

import http.client
import json
import os
import pwd
import sqlite3
import tempfile
import time
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from artifact.manifest import digest_of
from artifact.remote import NOBODY_CALL, RemoteRegistry
from mirror.home import MirrorHome
from mirror.pack import pack
from registry import tables as t
from registry.collector import STAGED_S
from registry.home import Home
from registry.settings import Settings
from registry.wiring import open_site
from tests.conftest import airlock
from tests.contracts.doors import Answer, Door, new_site, serving, sha
from tests.contracts.stores import s3_store, s3_url, whole
from tests.contracts.test_hub_door import FILES
from tests.contracts.test_hub_door import push as push_files
from tests.contracts.test_upkeep_door import collect
from tests.fakes.unsteady import Unsteady
from tests.flows.test_clients import contents, hf, layout, skopeo
from tests.services import nginx, rgw
from tests.unit.test_bundle import stage_model

pytestmark = pytest.mark.server
ROOT = Path(__file__).resolve().parents[2]
MIB = 1024 * 1024
RAW = os.urandom(17 * MIB + 5)  # more than one part of the default size
REPO = "acme/app"


def fetch(url: str, method: str = "GET", **headers: str) -> Answer:
    """One request without following anything."""
    parts = urllib.parse.urlsplit(url)
    connection = http.client.HTTPConnection(parts.netloc, timeout=60)
    try:
        connection.request(
            method, parts.path + ("?" + parts.query if parts.query else ""), headers={k.replace("_", "-"): v for k, v in headers.items()}
        )
        found = connection.getresponse()
        return Answer(found.status, {k.lower(): v for k, v in found.getheaders()}, found.read())
    finally:
        connection.close()


def outcomes(data: Path) -> set[str]:
    """What the audit log of a stopped registry says became of its pulls."""
    with sqlite3.connect(data / "registry.db") as connection:
        rows = connection.execute(
            "SELECT body FROM audit_pending UNION ALL SELECT body FROM audit_leaf UNION ALL SELECT body FROM audit_count"
        ).fetchall()
    return {body["result"] for body in (json.loads(row[0]) for row in rows) if body["event"] == "pull"} & {"granted", "served"}


def elsewhere(proxy: Unsteady) -> str:
    """The proxy under another host name than the registry's: beside it, nobody is redirected."""
    return proxy.url.replace("127.0.0.1", "localhost")


@pytest.fixture
def proxy() -> Iterator[Unsteady]:
    made = Unsteady(rgw.shared().port)
    yield made
    made.close()


def push(door: Door) -> str:
    """A blob as docker pushes it: POST, PATCH, PUT, the digest only at the end."""
    begun = door.ask("POST", f"/v2/{REPO}/blobs/uploads/")
    assert begun.status == 202, begun.body
    patched = door.ask("PATCH", begun.headers["location"], RAW)
    assert patched.status == 202, patched.body
    joint = "&" if "?" in patched.headers["location"] else "?"
    done = door.ask("PUT", f"{patched.headers['location']}{joint}digest={sha(RAW)}", b"")
    assert done.status == 201, done.body
    return f"/v2/{REPO}/blobs/{sha(RAW)}"


def test_a_pull_is_redirected_to_the_public_endpoint(tmp_path: Path, proxy: Unsteady) -> None:
    env = {"AIRLOCK_BLOBS": s3_url(tmp_path, tls=True, public=elsewhere(proxy))}
    with serving(tmp_path / "data", new_site(tmp_path / "data", **env), **env) as door:
        assert "altered_bytes_refused" in door.log.read_text()  # the probe's line
        path = push(door)
        small = door.blob(REPO, b"small")
        head = door.ask("HEAD", path)
        assert head.status == 200 and int(head.headers["content-length"]) == len(RAW) and "location" not in head.headers
        for raw, where in ((RAW, path), (b"small", f"/v2/{REPO}/blobs/{small}")):
            told = door.ask("GET", where, Range="bytes=1-3")
            assert told.status == 307 and told.headers["location"].startswith(elsewhere(proxy)) and told.body == b""
            assert "X-Amz-Expires=600" in told.headers["location"] and door.keys["acme"] not in told.headers["location"]
            assert fetch(told.headers["location"]).body == raw
            part = fetch(told.headers["location"], Range="bytes=1-3")
            assert part.status == 206 and part.body == raw[1:4]
            assert fetch(told.headers["location"], Range=f"bytes={len(raw)}-").status == 416
            assert fetch(told.headers["location"], "HEAD").status == 403  # so a HEAD must never be sent there
            assert fetch(told.headers["location"], Authorization="Bearer x").status == 400  # so no key may follow
            assert fetch(told.headers["location"].replace("Expires=600", "Expires=601")).status == 403
        assert door.ask("GET", path, who=None).status == 401 and door.ask("GET", path, who="other").status == 404
    assert outcomes(tmp_path / "data") == {"granted"}


def test_a_client_that_would_carry_its_key_along_is_streamed_to(tmp_path: Path, proxy: Unsteady) -> None:
    """Go's http.Client keeps Authorization for the same host name on any port, and for names below it; the store refuses a URL with two proofs."""
    env = {"AIRLOCK_BLOBS": s3_url(tmp_path, public=elsewhere(proxy))}
    with serving(tmp_path / "data", new_site(tmp_path / "data", **env), **env) as door:
        path = push(door)
        for host, status in (("localhost", 200), ("LOCALHOST:5000", 200), ("airlock.example:5000", 307), ("notlocalhost", 307), ("[", 307)):
            found = door.ask("GET", path, Host=host)
            assert found.status == status and (status == 307 or found.body == RAW), host
        assert proxy.count("GET ") == 0


def test_our_client_follows_without_its_key(tmp_path: Path, proxy: Unsteady) -> None:
    env = {"AIRLOCK_BLOBS": s3_url(tmp_path, public=elsewhere(proxy))}
    with serving(tmp_path / "data", new_site(tmp_path / "data", **env), **env) as door:
        push(door)
        remote = RemoteRegistry(door.url, door.keys["acme"])
        assert whole(remote.read(NOBODY_CALL, REPO, sha(RAW), 5)) == RAW[5:]
        assert proxy.count("GET ") >= 1 and all(b"authorization" not in head.lower() for head in proxy.heads)


def test_unmodified_clients_follow_without_their_key(tmp_path: Path, proxy: Unsteady) -> None:
    env = {"AIRLOCK_BLOBS": s3_url(tmp_path, public=elsewhere(proxy))}
    with serving(tmp_path / "data", new_site(tmp_path / "data", **env), **env) as door:
        push_files(door, "hf/acme/m", FILES)
        done = hf(door, tmp_path / "home", "acme", "download", "acme/m", "--local-dir", str(tmp_path / "model"))
        assert done.returncode == 0 and contents(tmp_path / "model") == FILES, done.stdout + done.stderr
        by_hf = proxy.count("GET ")
        digest, _ = layout(tmp_path / "from")
        user, place = f"$oauthtoken:{door.keys['acme']}", f"docker://127.0.0.1:{door.port}/acme/image:1"
        pushed = skopeo("copy", "--preserve-digests", "--dest-tls-verify=false", f"--dest-creds={user}", f"oci:{tmp_path}/from:1", place)
        assert pushed.returncode == 0, pushed.stderr
        pulled = skopeo("copy", "--preserve-digests", "--src-tls-verify=false", f"--src-creds={user}", place, f"oci:{tmp_path}/to:1")
        assert pulled.returncode == 0 and (tmp_path / "to" / "blobs" / "sha256" / digest[7:]).exists(), pulled.stderr
        assert 0 < by_hf < proxy.count("GET ") and all(b"authorization" not in head.lower() for head in proxy.heads)


@pytest.mark.parametrize("off", [{"AIRLOCK_REDIRECT": "off"}, {"AIRLOCK_STREAM_TO": "127.0.0.0/8"}])
def test_bytes_are_streamed_where_a_redirect_is_not_wanted(tmp_path: Path, off: dict[str, str]) -> None:
    env = {"AIRLOCK_BLOBS": s3_url(tmp_path), **off}
    with serving(tmp_path / "data", new_site(tmp_path / "data", **env), **env) as door:
        path = push(door)
        assert door.ask("GET", path).body == RAW
        part = door.ask("GET", path, Range="bytes=5000000-9000000")
        assert part.status == 206 and part.body == RAW[5_000_000:9_000_001]
        assert part.headers["content-range"] == f"bytes 5000000-9000000/{len(RAW)}"
        assert door.ask("GET", path, Range=f"bytes={len(RAW)}-").status == 416
        assert door.ask("GET", path, Range="bytes=-1").body == RAW[-1:]
        digest, raw = door.image(REPO, "v1", [b"layer"])
        assert door.ask("GET", f"/v2/{REPO}/manifests/v1").body == raw and digest == sha(raw)
    assert "served" in outcomes(tmp_path / "data")


def test_another_replica_goes_on_after_kill_9(tmp_path: Path) -> None:
    env = {"AIRLOCK_BLOBS": s3_url(tmp_path), "AIRLOCK_REDIRECT": "off"}
    keys = new_site(tmp_path / "data", **env)
    cut = 9 * MIB + 7
    with serving(tmp_path / "data", keys, **env) as door:
        begun = door.ask("POST", f"/v2/{REPO}/blobs/uploads/")
        patched = door.ask("PATCH", begun.headers["location"], RAW[:cut])
        assert patched.status == 202 and patched.headers["range"] == f"0-{cut - 1}"
        door.process.kill()
        door.process.wait(20)
    with serving(tmp_path / "data", keys, **env) as door:
        status = door.ask("GET", patched.headers["location"])
        assert status.status == 204 and status.headers["range"] == f"0-{cut - 1}"
        place = status.headers["location"]
        done = door.ask("PUT", f"{place}{'&' if '?' in place else '?'}digest={sha(RAW)}", RAW[cut:])
        assert done.status == 201, done.body
        assert door.ask("GET", f"/v2/{REPO}/blobs/{sha(RAW)}").body == RAW


def test_a_store_that_cannot_be_used_refuses_the_start(tmp_path: Path) -> None:
    good = s3_url(tmp_path)
    keys = new_site(tmp_path / "data", AIRLOCK_BLOBS=good)
    for url, words in ((good.replace("/air/", "xx/air/"), "has no bucket"), (good.replace("127.0.0.1", "no-such-host.invalid"), "is not known")):
        with pytest.raises(AssertionError) as told, serving(tmp_path / "data", keys, AIRLOCK_BLOBS=url):
            pass
        assert words in str(told.value) and rgw.SECRET not in str(told.value)


def test_a_store_that_is_down_answers_503_and_recovers_by_itself(tmp_path: Path, proxy: Unsteady) -> None:
    env = {"AIRLOCK_BLOBS": s3_url(tmp_path, endpoint=proxy.url), "AIRLOCK_REDIRECT": "off"}
    with serving(tmp_path / "data", new_site(tmp_path / "data", **env), **env) as door:
        path = push(door)
        proxy.plan("busy", "", 10_000)
        down = door.ask("GET", path)
        assert down.status == 503 and "overloaded" in down.body.decode() and rgw.SECRET not in down.body.decode()
        refused = door.ask("POST", f"/v2/{REPO}/blobs/uploads/?digest={sha(b'new')}", b"new")
        assert refused.status == 503
        proxy.faults.clear()
        assert door.ask("GET", path).body == RAW
        door.blob(REPO, b"new")


def begin(door: Door, raw: bytes) -> tuple[str, str]:
    """An upload of which the first bytes were sent: its id and where it goes on."""
    place = door.ask("PATCH", door.ask("POST", f"/v2/{REPO}/blobs/uploads/").headers["location"], raw).headers["location"]
    return urllib.parse.urlsplit(place).path.rsplit("/", 1)[1], place


def test_a_collection_of_the_server_aborts_abandoned_uploads_in_the_bucket(tmp_path: Path) -> None:
    url, data = s3_url(tmp_path), tmp_path / "data"
    keys = new_site(data, AIRLOCK_BLOBS=url)
    keys["root"] = airlock(
        "key", "create", "--data", str(data), "--org", "acme", "--models", "**", "--actions", "admin", AIRLOCK_BLOBS=url
    ).stdout.strip()
    store = s3_store(url, tmp_path)

    def staged() -> set[str]:
        return {str(item["Key"]).removeprefix("uploads/") for item in store.multiparts("")}

    with serving(data, keys, AIRLOCK_BLOBS=url, AIRLOCK_GC_EVERY_S="0") as door:
        (late, _), (alive, place), (lost, gone) = (begin(door, RAW[: 6 * MIB]) for _ in range(3))
        assert staged() == {late, alive, lost}
        with open_site(Settings.load(data, environ={"AIRLOCK_BLOBS": url}), background=False) as site, site.catalog.writing() as conn:
            conn.execute(t.upload.update().where(t.upload.c.id == late).values(expires=1.0))  # as if a week had passed
            conn.execute(t.upload.delete().where(t.upload.c.id == lost))  # as after the restore of an older database
        report = collect(door)
        assert report["uploads"] == 1 and not report["error"] and staged() == {alive, lost}  # what has no row waits for a day
        assert door.ask("PATCH", gone, b"more").status == 404
        joint = "&" if "?" in place else "?"
        assert door.ask("PUT", f"{place}{joint}digest={sha(RAW)}", RAW[6 * MIB :]).status == 201 and staged() == {lost}
        assert door.ask("GET", f"/v2/{REPO}/blobs/{sha(RAW)}", Host="registry.example").status == 307
    with open_site(Settings.load(data, environ={"AIRLOCK_BLOBS": url}), background=False) as site:
        assert site.collector.run(time.time() + STAGED_S + 60).staging >= 1
    assert staged() == set() and list(store.listing("partial/")) == []


# ---- nginx


@pytest.fixture
def owned() -> Iterator[tuple[Path, dict[str, str]]]:
    """A data directory, and the keys, of the user who runs the registry and nginx."""
    with tempfile.TemporaryDirectory(prefix="airlock-site-", dir="/tmp") as folder:  # pytest's own folders are closed to other users
        Path(folder).chmod(0o755)
        data = Path(folder) / "data"
        keys = new_site(data)
        if os.geteuid() == 0:
            entry = pwd.getpwnam(nginx.owner())
            for path in (data, *data.rglob("*")):
                os.chown(path, entry.pw_uid, entry.pw_gid)
        yield data, keys


@contextmanager
def fronted(data: Path, keys: dict[str, str], workers: str, blobs: Path | None = None) -> Iterator[tuple[Door, str]]:
    """A registry and the URL of the nginx before it, whose workers run as that user and look into that directory."""
    user = nginx.owner() if os.geteuid() == 0 else None
    with (
        serving(data, keys, user=user, AIRLOCK_X_ACCEL="/internal/") as door,
        nginx.serving(ROOT / "docs" / "operations.md", door.url, blobs or data / "blobs", workers) as front,
    ):
        yield door, front


def test_nginx_sends_the_bytes(owned: tuple[Path, dict[str, str]]) -> None:
    with fronted(*owned, nginx.owner()) as (door, front):
        path, key = push(door), {"Authorization": f"Bearer {door.keys['acme']}"}
        inner = door.ask("GET", path)
        assert inner.status == 200 and inner.body == b"" and inner.headers["x-accel-redirect"].startswith("/internal/sha256/")
        full = fetch(front + path, **key)
        assert full.status == 200 and full.body == RAW and "x-accel-redirect" not in full.headers
        assert full.headers["docker-content-digest"] == sha(RAW) and int(full.headers["content-length"]) == len(RAW)
        part = fetch(front + path, Range="bytes=7-99", **key)
        assert part.status == 206 and part.body == RAW[7:100] and part.headers["content-range"] == f"bytes 7-99/{len(RAW)}"
        assert fetch(front + path, Range=f"bytes={len(RAW)}-", **key).status == 416
        again = fetch(front + path, Range="bytes=7-99", If_Range=full.headers["etag"], **key)
        assert again.status == 206 and again.body == RAW[7:100]
        head = fetch(front + path, "HEAD", **key)
        assert head.status == 200 and int(head.headers["content-length"]) == len(RAW) and "x-accel-redirect" not in head.headers
        hexadecimal = sha(RAW)[7:]
        assert fetch(f"{front}/internal/sha256/{hexadecimal[:2]}/{hexadecimal}", **key).status == 404
        for who, status in ((None, 401), ("other", 404)):
            told = door.ask("GET", path, who=who)
            assert told.status == status and "x-accel-redirect" not in told.headers
        digest, raw = door.image(REPO, "v1", [b"layer"])  # an upload through nginx needs its body unbuffered; manifests are small and come from us
        assert fetch(f"{front}/v2/{REPO}/manifests/{digest}", **key).body == raw
        through = Door(door.data, door.process, int(front.rsplit(":", 1)[1]), door.keys, door.log)
        assert push(through) == path and through.blob(REPO, b"by nginx") == sha(b"by nginx")
        assert os.geteuid() or nginx.owner() == "root" or (door.data / "blobs").stat().st_uid == os.stat(f"/proc/{door.process.pid}").st_uid != 0
    assert outcomes(owned[0]) == {"granted"}


def test_an_nginx_that_may_not_read_the_directory_answers_403_without_bytes(owned: tuple[Path, dict[str, str]]) -> None:
    """Its workers are another user, which only root can start; else they look into a directory that is closed to them."""
    data, keys = owned
    closed = data.parent / "closed"
    closed.mkdir(mode=0)
    other, blobs = ("www-data", None) if os.geteuid() == 0 else (nginx.owner(), closed)
    with fronted(data, keys, other, blobs) as (door, front):
        found = fetch(front + push(door), Authorization=f"Bearer {door.keys['acme']}")
        assert found.status == 403 and RAW[:64] not in found.body and len(found.body) < 1000
    closed.chmod(0o700)


def test_without_the_setting_the_header_never_occurs(tmp_path: Path) -> None:
    keys = new_site(tmp_path / "data")
    with serving(tmp_path / "data", keys) as door:
        path = push(door)
        for headers in ({}, {"Range": "bytes=0-5"}, {"X-Accel-Redirect": "/internal/x"}):
            found = door.ask("GET", path, **headers)
            assert found.status in (200, 206) and "x-accel-redirect" not in found.headers and found.body


# ---- the rest of the registry over a bucket


def test_a_bundle_is_imported_into_the_bucket_and_the_index_made_again_from_it(tmp_path: Path) -> None:
    env = {"AIRLOCK_BLOBS": s3_url(tmp_path)}
    mirror = MirrorHome.init(tmp_path / "mirror")
    files = {"config.json": b"{}", "w.safetensors": RAW}
    stage_model(mirror, "hf/acme/m", "main", files)
    pack(mirror, tmp_path / "disk", time.time())
    data = tmp_path / "data"
    new_site(data, **env)
    Home.open(data).pin_root(mirror.root)
    assert json.loads(airlock("bundle", "import", str(tmp_path / "disk"), "--data", str(data), "--json", **env).stdout)["imported"]
    objects = {digest_of(raw) for raw in files.values()}
    with open_site(Settings.load(data, environ=env), background=False) as site:
        held = {site.blobs.digest_of(location): location for location, _ in site.blobs.walk()}
        assert objects <= held.keys() and not any((data / "blobs").rglob("*.*"))
        assert whole(site.blobs.open(held[digest_of(RAW)])) == RAW
    with sqlite3.connect(data / "registry.db") as connection:  # as after a restore of an older database
        for table in ("edge", "file", "repo_blob", "blob_alias", "blob"):
            connection.execute(f"DELETE FROM {table}")
    rebuilt = json.loads(airlock("registry", "rebuild", "--data", str(data), "--json", **env).stdout)
    assert rebuilt["objects"] == rebuilt["adopted"] == len(held) and rebuilt["missing_count"] == 0, rebuilt
    verified = airlock("registry", "verify", "--data", str(data), **env)
    assert verified.returncode == 0, verified.stdout
