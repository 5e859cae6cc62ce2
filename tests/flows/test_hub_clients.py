"""Unmodified huggingface_hub 2.4, 1.33 and 0.36, each in an environment of its own, against one registry: what they send, and how it is answered."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.contracts.doors import Door, new_site, serving, sha
from tests.contracts.stores import s3_url
from tests.contracts.test_hub_door import COMMIT_ID, push
from tests.fakes.unsteady import Unsteady
from tests.flows.answered import accessed, unanswered
from tests.flows.test_clients import contents
from tests.services.clients import client

pytestmark = pytest.mark.server
DRIVER = Path(__file__).resolve().parent.parent / "fakes" / "hub_driver.py"
MODERN = ("2.4", "1.33")
VERSIONS = (*MODERN, "0.36")
FIFTY = {f"w{n}.safetensors": os.urandom(30_000) for n in range(10)} | {f"c/{n}.json": f'{{"n":{n}}}'.encode() for n in range(40)}
CARD = b"---\nlicense: mit\n---\n# hi\n"
FILES = {"README.md": CARD, "config.json": b'{"a": 1}', "model.safetensors": os.urandom(3_000_000), "sub/x.txt": b"deep"}
OID = r"[0-9a-f]{64}"


@dataclass
class Client:
    """One version of the client with a home of its own; `asked` is what the last run sent and how it was answered."""

    version: str
    door: Door
    home: Path
    asked: list[tuple[str, int]] = field(default_factory=list)

    @property
    def python(self) -> Path:
        return Path(sys.executable) if self.version == "2.4" else client(f"hub-{self.version}")

    endpoint: str = ""  # where it is not the registry itself

    def run(self, *argv: str, who: str | None = "acme", prefix: str = "", **env: str) -> subprocess.CompletedProcess[str]:
        given = {
            "PATH": "/usr/bin:/bin",
            "HOME": str(self.home),
            "HF_HOME": str(self.home / "hf"),
            "HF_ENDPOINT": (self.endpoint or self.door.url) + prefix,
        }
        given |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_UPDATE_CHECK": "1"}
        given |= {"HF_TOKEN": self.door.keys[who]} if who else {}
        before = len(self.lines())
        done = subprocess.run([*argv], capture_output=True, text=True, timeout=180, env=given | env, check=False)
        found = self.lines()[before:]
        self.asked = [(f"{e['method']} {e['path']}", int(e["status"])) for e in found]
        words = "/api/This-registry-takes-no-Xet"  # a path that is a sentence for the client's user
        assert not unanswered(line for line in found if not line["path"].startswith(words)), "a probe that no route took"
        assert not [status for _, status in self.asked if status >= 500] and not any(k in done.stdout + done.stderr for k in self.door.keys.values())
        return done

    def lines(self) -> list[dict[str, Any]]:
        return accessed(self.door.log)

    def play(self, scene: str, prefix: str = "", who: str = "acme", xet: str = "1", **args: Any) -> Any:
        env = {"HF_HUB_DISABLE_XET": xet} if self.version in MODERN else {}
        done = self.run(str(self.python), str(DRIVER), scene, json.dumps(args), prefix=prefix, who=who, **env)
        told = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
        assert told, done.stdout + done.stderr
        return json.loads(told[0].removeprefix("RESULT "))

    def hf(self, *argv: str, **more: Any) -> subprocess.CompletedProcess[str]:
        return self.run(str(self.python.parent / "hf"), *argv, **more)


@pytest.fixture(scope="module")
def door(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Door]:
    data = tmp_path_factory.mktemp("hub") / "data"
    keys = new_site(data)
    with serving(data, keys) as found:
        push(found, "hf/acme/fifty", FIFTY)
        push(found, "acme/open/m", {"config.json": b"{}"}, commit="a" * 40)
        yield found


@pytest.fixture(params=VERSIONS)
def hub(request: pytest.FixtureRequest, door: Door, tmp_path: Path) -> Client:
    return Client(request.param, door, tmp_path)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    for path, data in FILES.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)
    return folder


def plain(asked: list[tuple[str, int]], repo: str) -> list[str]:
    """The sequence with names left out, as the reference writes it."""
    return [f"{re.sub(OID, 'OID', what.replace(repo, 'ID'))} {status}" for what, status in asked]


def test_a_cold_snapshot_costs_no_more_requests_than_at_the_hub(hub: Client) -> None:
    """103 requests for fifty files with hub 1.x and 2.x, 101 with 0.x; warm one by branch and none by commit (the recorded round trips)."""
    folder = hub.play("snapshot", xet="", repo="acme/fifty")
    assert contents(Path(folder)) == FIFTY and {status for _, status in hub.asked} == {200}
    told = [what for what, _ in hub.asked]
    files = [what for what in told if "/resolve/" in what]
    assert len(files) == 100 and all(f"/resolve/{COMMIT_ID}/" in what for what in files) and len([w for w in files if w.startswith("HEAD")]) == 50
    info = "GET /api/models/acme/fifty/revision/"
    fresh = ["GET /api/agent-harnesses", f"{info}main", f"GET /api/models/acme/fifty/tree/{COMMIT_ID}"]
    assert [what for what in told if what not in files] == (fresh if hub.version in MODERN else [f"{info}main"])
    assert len(told) == (103 if hub.version in MODERN else 101)
    first, again = hub.play("warm", xet="", repo="acme/fifty")
    assert first == again == folder
    assert [what for what, _ in hub.asked] == [f"{info}main", *([] if hub.version in MODERN else [info + COMMIT_ID])]  # 0.36 asks about a commit too


def test_hf_upload_and_again(hub: Client, source: Path) -> None:
    """The recorded sequence of an upload; a second run sends no object and makes no commit; what was pushed is there by OCI and for the others."""
    repo = f"acme/up-{hub.version}"
    env = {} if hub.version == "0.36" else {"HF_HUB_DISABLE_XET": "1"}
    done = hub.hf("upload", repo, str(source), ".", "--commit-message", "first", **env)
    assert done.returncode == 0, done.stdout + done.stderr
    lfs = "ID.git/info/lfs/objects"
    wanted = [
        *(["GET /api/agent-harnesses 200"] if hub.version in MODERN else []),
        "POST /api/repos/create 200",
        *["POST /api/validate-yaml 200"] * 2,
        "POST /api/models/ID/preupload/main 200",
        f"POST /{lfs}/batch 200",
        f"PUT /{lfs}/OID 200",
        f"POST /{lfs}/OID/verify 200",
        "POST /api/models/ID/commit/main 200",
    ]
    assert plain(hub.asked, repo) == wanted
    head = hub.door.ask("GET", f"/api/models/{repo}").json()["sha"]
    again = hub.hf("upload", repo, str(source), ".", "--commit-message", "second", **env)
    assert again.returncode == 0 and not [what for what, _ in hub.asked if what.startswith("PUT")]
    assert hub.door.ask("GET", f"/api/models/{repo}").json()["sha"] == head
    manifest = hub.door.ask("GET", f"/v2/{repo}/manifests/main").json()
    assert {d["annotations"]["org.opencontainers.image.title"]: d["digest"] for d in manifest["layers"][:-1]} == {p: sha(d) for p, d in FILES.items()}
    other = Client("2.4", hub.door, hub.home / "other")
    assert contents(Path(other.play("snapshot", repo=repo))) == FILES


@pytest.mark.parametrize("version", MODERN)
def test_an_upload_by_xet_is_refused_in_one_clear_line(door: Door, tmp_path: Path, source: Path, version: str) -> None:
    hub = Client(version, door, tmp_path)
    done = hub.hf("upload", f"acme/xet-{version}", str(source), ".")
    said = [line for line in (done.stdout + done.stderr).splitlines() if "takes-no-Xet" in line]
    assert done.returncode != 0 and len(said) == 1 and "HF_HUB_DISABLE_XET=1" in said[0]


PREFIX = {"2.4": "/v1/hf", "1.33": "/acme", "0.36": ""}


def test_a_model_lives_by_the_library(hub: Client, source: Path) -> None:
    repo = f"acme/life-{hub.version}"
    out = hub.play("publish", prefix=PREFIX[hub.version], repo=repo, folder=str(source))
    kept = ["README.md", "again.safetensors", "config.json", "copy.safetensors", "model.safetensors"]
    assert out["repo"] == repo and out["exists"] == "HfHubHTTPError" and out["stale"] == "HfHubHTTPError"
    assert sorted(out["files"]) == sorted([*kept, "notes/a b.txt"])
    assert (out["branches"], out["tags"], out["dev"]) == (["dev/one", "main"], [["v1", True]], "only here")
    assert (out["commits"], out["title"]) == ([True, True], "more") and out["left"] == ["main"]
    assert sorted(out["sizes"]) == kept and out["sizes"]["copy.safetensors"] == 3_000_000
    assert out["paths"] == ["config.json"] and out["ls"] == kept and out["found"] and out["safetensors"] is True
    assert (out["me"], out["after"]) == ("write", False)
    unanswered = [what for what, status in hub.asked if status not in (200, 409, 412) and "/api/models/" + repo not in what]
    assert not unanswered, unanswered


def test_each_failure_is_the_exception_that_users_know(hub: Client) -> None:
    found = hub.play("failures", repo="acme/fifty", gated="acme/open/m".replace("open/", ""), who="reader")
    assert found["repo"] == "RepositoryNotFoundError" and found["key"] == "HfHubHTTPError"
    assert found["file"] == found["revision"] == "GatedRepoError"  # acme/fifty is seen by this key, and not granted
    assert found["write"] == "HfHubHTTPError" and found["gated"] == "RepositoryNotFoundError"
    mine = hub.play("failures", repo="acme/fifty", gated="acme/none")
    assert mine["file"] in ("EntryNotFoundError", "RemoteEntryNotFoundError") and mine["revision"] == "RevisionNotFoundError"


@pytest.fixture
def proxy(door: Door) -> Iterator[Unsteady]:
    made = Unsteady(door.port)
    yield made
    made.close()


@pytest.mark.full
@pytest.mark.parametrize("version", MODERN)
def test_a_stream_that_is_cut_goes_on_where_it_was(door: Door, tmp_path: Path, proxy: Unsteady, version: str) -> None:
    data = {"big.safetensors": os.urandom(40_000_000)}
    push(door, f"acme/cut-{version}", data, commit="b" * 40)
    proxy.plan("half", r"GET /.*/resolve/")
    hub = Client(version, door, tmp_path, endpoint=proxy.url)
    assert contents(Path(hub.play("snapshot", repo=f"acme/cut-{version}"))) == data
    gets = [status for what, status in hub.asked if what.startswith("GET") and "/resolve/" in what]
    assert gets == [200, 206]


@pytest.mark.full
@pytest.mark.parametrize("version", MODERN)
def test_an_upload_whose_answers_are_lost_is_made_once(door: Door, tmp_path: Path, source: Path, proxy: Unsteady, version: str) -> None:
    proxy.plan("lose_answer", r"PUT /.*/info/lfs/")
    proxy.plan("lose_answer", r"POST /.*/commit/")
    repo, hub = f"acme/lost-{version}", Client(version, door, tmp_path, endpoint=proxy.url)
    runs = [hub.hf("upload", repo, str(source), ".", HF_HUB_DISABLE_XET="1").returncode for _ in range(2)]
    assert runs == [1, 0] and proxy.count("PUT /") == 2  # the client sends an object again by itself, a commit its user
    listed = door.ask("GET", f"/api/models/{repo}/commits/main").json()
    assert len(listed) == 2  # the first, empty one, and the upload's
    assert contents(Path(Client("2.4", door, tmp_path / "other").play("snapshot", repo=repo))) == FILES


@pytest.mark.full
def test_every_version_follows_a_redirect_to_the_object_store(tmp_path: Path) -> None:
    """The key never reaches the store: RGW refuses a request with two proofs."""
    env = {"AIRLOCK_BLOBS": s3_url(tmp_path)}
    env["AIRLOCK_BLOBS"] = env["AIRLOCK_BLOBS"].replace("127.0.0.1", "localhost")
    with serving(tmp_path / "data", new_site(tmp_path / "data", **env), **env) as door:
        push(door, "hf/acme/fifty", FIFTY)
        for version in VERSIONS:
            hub = Client(version, door, tmp_path / version)
            assert contents(Path(hub.play("snapshot", repo="acme/fifty"))) == FIFTY
            gets = [status for what, status in hub.asked if what.startswith("GET") and "/resolve/" in what]
            assert gets == [307] * 50 and {s for w, s in hub.asked if w.startswith("HEAD")} == {200}


@pytest.mark.full
@pytest.mark.parametrize("version", MODERN)
def test_a_large_folder_is_uploaded_in_pieces_and_goes_on(door: Door, tmp_path: Path, version: str) -> None:
    """`hf upload-large-folder`, by workers that hash, send and commit; hub 2.4 lacks it, and has `hf upload`. Again sends what changed."""
    folder, repo = tmp_path / "large", f"acme/large-{version}"
    files = {f"part-{n:03}.safetensors": os.urandom(400_000) for n in range(60)} | {f"c/{n}.json": f'{{"n":{n}}}'.encode() for n in range(90)}
    for path, data in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)
    hub = Client(version, door, tmp_path)
    large = ("upload-large-folder", repo, str(folder), "--repo-type", "model", "--num-workers", "3", "--no-report")
    argv = large if version == "1.33" else ("upload", repo, str(folder), ".")
    done = hub.hf(*argv, HF_HUB_DISABLE_XET="1")
    assert done.returncode == 0, done.stdout + done.stderr
    sent = sum(what.startswith("PUT /") and status == 200 for what, status in hub.asked)
    assert sent == 60 and contents(Path(Client("2.4", door, tmp_path / "other").play("snapshot", repo=repo))) == files
    (folder / "part-000.safetensors").write_bytes(files["part-000.safetensors"][::-1])
    again = hub.hf(*argv, HF_HUB_DISABLE_XET="1")
    assert again.returncode == 0, again.stdout + again.stderr
    assert sum(what.startswith("PUT /") for what, _ in hub.asked) == 1, "only what changed"
