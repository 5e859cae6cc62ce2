"""A model that came over the gap once, pulled by a client of each door: the same bytes, one copy of them; and what one door takes, all show."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sqlite3
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.config import Config
from botocore.exceptions import ClientError

from tests.conftest import RegistryServer, airlock
from tests.contracts.doors import MANIFEST
from tests.contracts.stores import s3_url
from tests.contracts.test_hub_writing import commit, regular
from tests.flows.answered import accessed, unanswered
from tests.flows.story import MODEL, Story, random_model
from tests.flows.test_clients import contents
from tests.flows.test_ngcsdk import Sdk, step
from tests.operated import Operated, operated, wait_for
from tests.services import rgw
from tests.services.clients import client

pytestmark = pytest.mark.server
SIZE = 24 * 1024 * 1024
DOORS = ("oci", "oras", "hub", "ngc", "s3")
# What the user of each client reads of a block: oras, hf and boto3's HEAD keep the reason to themselves, which tests/contracts/test_terms.py reads.
BLOCKED = dict.fromkeys(DOORS, "{name} is blocked here by law or contract: a court") | {
    "oras": "/v2/{name}/manifests/main: Forbidden",
    "hub": "Access denied. Model '{name}' requires approval.",
    "s3": "(403) when calling the HeadObject operation: Forbidden",
}
HF = Path(sys.executable).parent / "hf"
ORAS = """
import sys, oras.client
host, name, key, out = sys.argv[1:]
client = oras.client.OrasClient(hostname=host, tls_verify=False, auth_backend="basic")
client.login(hostname=host, username="$oauthtoken", password=key, tls_verify=False)
client.pull(target=f"{host}/{name}", outdir=out)
"""


@dataclass
class Site:
    """The closed side, with a key for each door and the measure of its store."""

    server: Operated
    files: dict[str, bytes]
    keys: dict[str, dict[str, str]]
    stored: Callable[[], tuple[int, int]]

    @property
    def ca(self) -> Path:
        return self.server.data / "tls" / "cert.pem"

    def place(self, door: str) -> str:
        assert self.server.told
        return self.server.told["listening" if door in ("oci", "oras", "hub") else door]

    def run(self, *argv: str, **env: str) -> subprocess.CompletedProcess[str]:
        clean = {"PATH": os.environ["PATH"], "SSL_CERT_FILE": str(self.ca), "REQUESTS_CA_BUNDLE": str(self.ca), "NO_PROXY": "*"}
        done = subprocess.run(argv, capture_output=True, text=True, timeout=240, env=clean | env, check=False)
        assert not any(key["key"] in done.stdout + done.stderr for key in self.keys.values())
        return done

    def s3(self, who: str = "s3") -> Any:
        pair = json.loads(airlock("key", "s3", self.keys[who]["key_id"], "--data", str(self.server.data), "--json").stdout)
        given = {"aws_access_key_id": pair["key_id"], "aws_secret_access_key": pair["secret"], "region_name": "us-east-1", "verify": str(self.ca)}
        config = Config(signature_version="s3v4", s3={"addressing_style": "path"}, retries={"max_attempts": 1})
        return boto3.client("s3", endpoint_url=self.place("s3"), config=config, **given)

    def ask(self, method: str, path: str, who: str, body: Any = None) -> Any:
        """The value of an answer of our own API."""
        request = urllib.request.Request(f"{self.place('oci')}/airlock/v1/{path}", method=method, data=json.dumps(body).encode() if body else None)
        request.add_header("Authorization", f"Bearer {self.keys[who]['key']}")
        with urllib.request.urlopen(request, timeout=60, context=ssl.create_default_context(cafile=str(self.ca))) as answer:
            return json.load(answer)

    def lines(self) -> list[dict[str, Any]]:
        time.sleep(0.2)
        return accessed(self.server.log)


def pull(site: Site, door: str, name: str, ref: str, out: Path, who: str = "") -> tuple[bool, str]:
    """A model by the client of a door into a folder of its own; whether it succeeded, and what was said."""
    key, host = site.keys[who or door], site.place("oci").removeprefix("https://")
    out.mkdir(parents=True)
    if door == "oci":
        layout = out.parent / f"{out.name}-layout"
        argv = ["skopeo", "--insecure-policy", "copy", "--src-tls-verify=false", f"--src-creds=$oauthtoken:{key['key']}"]
        done = site.run(*argv, f"docker://{host}/{name}:{ref}", f"oci:{layout}:1")
        if done.returncode == 0:
            blobs = layout / "blobs" / "sha256"
            index = json.loads((layout / "index.json").read_text())["manifests"][0]["digest"].partition(":")[2]
            for layer in json.loads((blobs / index).read_text())["layers"]:
                title = layer.get("annotations", {}).get("org.opencontainers.image.title")
                if title:
                    (out / title).parent.mkdir(parents=True, exist_ok=True)
                    (out / title).write_bytes((blobs / layer["digest"].partition(":")[2]).read_bytes())
        return done.returncode == 0, done.stdout + done.stderr
    if door == "oras":
        done = site.run(sys.executable, "-c", ORAS, host, f"{name}:{ref}", key["key"], str(out), HOME=str(out.parent))
        for facts in out.glob("sha256:*"):  # the layer without a title, which oras writes under its digest
            facts.unlink()
        return done.returncode == 0, done.stdout + done.stderr
    if door == "hub":
        env = {"HF_ENDPOINT": site.place("hub"), "HF_HOME": str(out.parent / "hf"), "HF_TOKEN": key["key"], "HF_HUB_DISABLE_UPDATE_CHECK": "1"}
        done = site.run(str(HF), "download", name, "--revision", ref, "--local-dir", str(out), **env)
        return done.returncode == 0, done.stdout + done.stderr
    if door == "ngc":
        home = out.parent / f"{out.name}-home"
        home.mkdir()
        sdk = Sdk(client("ngcsdk"), site.server, site.ca, home)
        told = sdk.run(("configure", {"api_key": key["key"], "org_name": key["org"]}), step("download", f"{name}:{ref}", destination=str(home)))
        folder = home / f"{name.rpartition('/')[2]}_v{ref}"
        if told[1][0] == "ok" and told[1][1]["status"] == "Completed":
            shutil.copytree(folder, out, dirs_exist_ok=True)
            return True, ""
        return False, json.dumps(told)
    s3, prefix = site.s3(who or door), f"{name}:{ref}/"
    try:
        found = s3.list_objects_v2(Bucket="models", Prefix=prefix).get("Contents", [])
        s3.head_object(Bucket="models", Key=f"{prefix}config.json")
        for item in found:
            path = out / item["Key"].removeprefix(prefix)
            path.parent.mkdir(parents=True, exist_ok=True)
            s3.download_file("models", item["Key"], str(path))
    except ClientError as error:
        return False, str(error)
    return True, ""


def on_disk(data: Path) -> Callable[[], tuple[int, int]]:
    def measure() -> tuple[int, int]:
        found = [path.stat() for path in (data / "blobs").rglob("*") if path.is_file()]
        return sum(info.st_blocks * 512 for info in found), len(found)

    return measure


def in_bucket(url: str) -> Callable[[], tuple[int, int]]:
    bucket = url.removeprefix("s3://").partition("/")[0]

    def measure() -> tuple[int, int]:
        pages = rgw.shared().client().get_paginator("list_objects_v2").paginate(Bucket=bucket)
        found = [item for page in pages for item in page.get("Contents", [])]
        return sum(item["Size"] for item in found), len(found)

    return measure


def distinct(data: Path) -> tuple[int, int]:
    """Bytes and number of the distinct blobs that the site holds."""
    with sqlite3.connect(f"file:{data / 'registry.db'}?mode=ro", uri=True) as db:
        size, count = db.execute("select sum(size), count(*) from blob").fetchone()
    return int(size), int(count)


@pytest.fixture(scope="module")
def connected(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path, Path]]:
    """A bundle with the model: its medium, the sender's root, and the model's folder."""
    base = tmp_path_factory.mktemp("connected")
    running: list[RegistryServer] = []

    def start(data: Path) -> RegistryServer:
        airlock("site", "init", "--data", str(data)) if not data.exists() else None
        process = subprocess.Popen(
            [str(Path(sys.executable).parent / "airlock"), "registry", "serve", "--data", str(data), "--port", "0"],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert process.stdout is not None
        port = int(process.stdout.readline().rsplit(":", 1)[1])
        running.append(RegistryServer(f"http://127.0.0.1:{port}", data, base / "log", process, port))  # type: ignore[arg-type]
        return running[-1]

    story = Story(base, random_model(base / "source" / "model", SIZE), start)
    for each in story.steps():
        if each.name == "import":
            break
        story.run(each)
    running[0].process.terminate()
    yield story.medium, next(iter(sorted(story.home.rglob("1.root.json")))), story.model
    for server in running:
        server.process.wait(20)


@pytest.fixture(scope="module", params=["file", "bucket"])
def site(tmp_path_factory: pytest.TempPathFactory, connected: tuple[Path, Path, Path], request: pytest.FixtureRequest) -> Iterator[Site]:
    medium, root, model = connected
    folder = tmp_path_factory.mktemp("closed")
    data = folder / "data"
    airlock("site", "init", "--data", str(data), "--trust-root", str(root))
    measure = on_disk(data)
    if request.param == "bucket":
        url = s3_url(folder)
        (data / "registry.yaml").write_text(f"blobs: {json.dumps(url)}\n")
        measure = in_bucket(url)
    airlock("bundle", "import", str(medium), "--data", str(data))
    keys: dict[str, dict[str, str]] = {}
    rights = {door: ("acme", "acme/**", "pull") for door in DOORS} | {"writer": ("acme", "acme/**", "pull,push,admin,auditor")}
    rights |= {"narrow": ("acme", "acme/elsewhere/*", "pull"), "stranger": ("other", "other/**", "pull"), "root": ("site", "**", "admin")}
    for name, (org, models, actions) in rights.items():
        argv = ("--org", org, "--tier", "enterprise", "--models", models, "--actions", actions, "--data", str(data), "--json")
        keys[name] = json.loads(airlock("key", "create", *argv).stdout)
    env = {"AIRLOCK_TLS": "self-signed", "AIRLOCK_NGC": "127.0.0.1:0", "AIRLOCK_S3": "127.0.0.1:0"}
    with operated(data, {name: key["key"] for name, key in keys.items()}, **env) as server:
        yield Site(server, contents(model), keys, measure)


def test_one_copy_for_five_clients(site: Site, tmp_path: Path) -> None:
    before, (held, blobs) = site.stored(), distinct(site.server.data)
    whole = sum(map(len, site.files.values()))
    assert whole < held < whole + 64 * 1024, "the model's bytes and its documents"
    assert held <= before[0] < held + 8192 * (before[1] + 1), "what is allocated is one copy: at most two blocks of disk more for each object"
    assert blobs <= before[1] <= 2 * blobs, "one object for each blob, beside it at most a small pointer"
    for door in DOORS:
        done, said = pull(site, door, MODEL, "1", tmp_path / door)
        assert done, (door, said)
        assert contents(tmp_path / door) == site.files, door
    assert site.stored() == before and distinct(site.server.data) == (held, blobs), "no door made another one"
    print(f"{whole} bytes of files, {held} in {blobs} blobs, {before[0]} stored in {before[1]} objects before and after")
    assert unanswered(site.lines()) == [], "every probe of every client met a route"


def records(site: Site) -> list[dict[str, Any]]:
    """All that is recorded about the organisation."""
    rows: list[dict[str, Any]] = []
    after = 0
    while True:
        page = site.ask("GET", f"audit?limit=1000&after={after}", "writer")
        rows += page["items"]
        after = page["after"]
        if not after or not page["items"]:
            return rows


def test_each_door_records_the_same_read(site: Site, tmp_path: Path) -> None:
    """The decision before the first byte, by every door; the bytes that were sent from here, where the store did not send them."""
    weights = max(site.files.values(), key=len)
    sent = f"{MODEL}@sha256:{hashlib.sha256(weights).hexdigest()}"
    for door in DOORS:
        assert pull(site, door, MODEL, "1", tmp_path / door)[0]
    # The store has the registry's host name here: only who sends no key to the bytes' URL is sent on to it.
    streaming = {*DOORS} - ({"ngc"} if (site.server.data / "registry.yaml").exists() else set())

    known = {site.keys[door]["key_id"]: door for door in DOORS}

    def doors(rows: list[dict[str, Any]], result: str, *refs: str) -> set[str]:
        return {known[row["key_id"]] for row in rows if row["key_id"] in known and row["result"] == result and row["ref"] in refs}

    def counted() -> set[str]:
        """What was sent is counted, and becomes a row when the window of its counter is over."""
        with sqlite3.connect(f"file:{site.server.data / 'registry.db'}?mode=ro", uri=True) as db:
            return doors([json.loads(body) for (body,) in db.execute("select body from audit_count")], "served", sent)

    assert doors(records(site), "granted", f"{MODEL}@blob") == {*DOORS}
    wait_for(lambda: counted() >= streaming, "what was sent is counted within seconds", 60)
    assert counted() == streaming


@pytest.mark.parametrize("door", DOORS)
def test_each_door_refuses_alike(site: Site, tmp_path: Path, door: str) -> None:
    for who in ("narrow", "stranger"):
        done, said = pull(site, door, MODEL, "1", tmp_path / who, who)
        assert not done and contents(tmp_path / who) == {}, (who, said)


def grown(site: Site, work: Callable[[], object]) -> int:
    """Bytes by which the store grew."""
    before = site.stored()[0]
    work()
    return site.stored()[0] - before


@pytest.mark.parametrize("way", ["hub", "oci"])
def test_what_one_door_takes_the_others_show(site: Site, tmp_path: Path, way: str) -> None:
    """The same weights under another name cost nothing; digests, grants, immutability and records are the name's, whatever the door."""
    name, source = f"acme/by{way}", tmp_path / "source"
    files = site.files | {"note.txt": f"by {way} {time.time()}".encode(), "sub/new.bin": os.urandom(50_000)}
    for path, data in files.items():
        (source / path).parent.mkdir(parents=True, exist_ok=True)
        (source / path).write_bytes(data)
    key = site.keys["writer"]["key"]

    def push(expect: int = 0) -> str:
        if way == "hub":
            env = {"HF_ENDPOINT": site.place("hub"), "HF_HOME": str(tmp_path / "hf"), "HF_TOKEN": key, "HF_HUB_DISABLE_XET": "1"}
            done = site.run(str(HF), "upload", name, str(source), ".", **env)
        else:
            env = {"AIRLOCK_KEY": key, "AIRLOCK_CA_FILE": str(site.ca), "HOME": str(tmp_path), "XDG_STATE_HOME": str(tmp_path / "state")}
            airlock_bin = str(Path(sys.executable).parent / "airlock")
            done = site.run(airlock_bin, "model", "push", str(source), f"{name}:main", "--registry", site.place("oci"), **env)
        assert (done.returncode == 0) == (expect == 0), done.stdout + done.stderr
        return done.stdout + done.stderr

    assert grown(site, push) < 400_000, "the weights were there"
    for door in DOORS:
        done, said = pull(site, door, name, "main", tmp_path / door)
        assert done and {p: d for p, d in contents(tmp_path / door).items() if p != ".gitattributes"} == files, (door, said)
        done, said = pull(site, door, name, "main", tmp_path / f"{door}-narrow", "narrow")
        assert not done, (door, said)
    digests = {
        item["Key"].partition(":main/")[2]: item["ETag"].strip('"')
        for item in site.s3().list_objects_v2(Bucket="models", Prefix=f"{name}:main/")["Contents"]
    }
    assert {path: digests[path] for path in files} == {path: hashlib.sha256(data).hexdigest() for path, data in files.items()}
    assert site.ask("POST", "immutable", "writer", {"name": name, "immutable": True})["immutable"]
    (source / "note.txt").write_bytes(b"changed")
    said = push(expect=1)
    assert "the ref main is immutable here" in said, "the client tells why"
    path = f"/v2/{name}/manifests/main"
    raw = site.server.ask("GET", path, None, "writer").body
    put = site.server.ask("PUT", path, raw + b" ", "writer", Content_Type=MANIFEST)
    assert (put.status, put.code) == (403, "DENIED") and "immutable" in put.json()["errors"][0]["message"]
    made = commit(site.server, name, regular("note.txt", b"changed"), who="writer")
    assert (made.status, made.json()["reason"]) == (409, "immutable") and "immutable" in made.headers["x-error-message"]
    for door in ("hub", "s3"):
        done, said = pull(site, door, name, "main", tmp_path / f"{door}-again")
        assert done and contents(tmp_path / f"{door}-again")["note.txt"] == files["note.txt"], said
    assert site.ask("POST", "terms", "root", {"name": name, "blocked": "a court"})["blocked"]
    for door, words in BLOCKED.items():
        done, said = pull(site, door, name, "main", tmp_path / f"{door}-blocked")
        assert not done and contents(tmp_path / f"{door}-blocked") == {} and words.format(name=name) in said, (door, said)
    assert unanswered(site.lines()) == []
