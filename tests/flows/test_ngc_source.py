"""`airlock mirror sync` from the stand-in NGC as a user runs it: each kind of key, every route, pages that lie, URLs that end, a kill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from artifact.manifest import COMMIT, SOURCE, digest_of, files_of, parse_manifest
from mirror.home import MirrorHome
from mirror.sources.ngc import SIGSTORE, VERSION_TYPE
from tests.flows.test_fake_ngc import BUNDLE, DEMO, LEGACY, PERSONAL, SERVICE, Ngc, contents, make_image, make_model, ngc
from tests.flows.test_sync import AIRLOCK, make_home, plan_file, staged

pytestmark = pytest.mark.server
SECRETS = (PERSONAL, SERVICE, LEGACY)


def sync(home: Path, plan: Path, key: str = PERSONAL, code: int = 0, dry: str = "", **env: str) -> dict[str, Any]:
    """One run of the command with a key in NGC_KEY; its report, no key in anything that it printed or kept."""
    given = {"PATH": os.environ["PATH"], "HOME": str(home.parent), "AIRLOCK_MIRROR": str(home), "NGC_KEY": key} | env
    argv = [str(AIRLOCK), "mirror", "sync", str(plan), "--json", *(["--dry-run"] if dry else [])]
    done = subprocess.run(argv, env=given, capture_output=True, text=True, timeout=200)
    assert done.returncode == code, (done.returncode, done.stdout, done.stderr)
    kept = "".join(p.read_text(errors="replace") for p in home.glob("*.json"))
    assert not any(secret in done.stdout + done.stderr + kept for secret in SECRETS) and "Traceback" not in done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def item(cloud: Ngc, model: str = DEMO, version: str = "1.0", **more: Any) -> dict[str, Any]:
    return {"source": f"ngc://{model}:{version}", "endpoint": cloud.api, "auth_endpoint": cloud.authn, "key_env": "NGC_KEY"} | more


def model_of(home: Path, name: str = "ngc/acme/vision/demo", ref: str = "1.0") -> dict[str, bytes]:
    """The files of a mirrored model, out of staging."""
    mirror = MirrorHome.open(home)
    named = next(n for n in mirror.names() if (n.name, n.ref) == (name, ref))
    manifest = parse_manifest(mirror.disk.read(named.digest, 1 << 22))
    return {f.path: mirror.disk.read(f.digest, 1 << 30) for f in files_of(manifest)}


def test_a_version_with_its_signature_and_again_for_nothing(tmp_path: Path) -> None:
    make_model(tmp_path / "ngc", signed=True, sums=True)
    home, files = make_home(tmp_path / "mirror"), contents()
    with ngc(tmp_path / "ngc", tmp_path / "log") as cloud:
        plan = plan_file(tmp_path, item(cloud))
        report = sync(home, plan)
        before, mark = staged(home), len(cloud.requests("files"))
        again = sync(home, plan)
        assert [e["path"] for e in cloud.requests("files")[mark:]] == ["/result.sigstore"]
        assert not [e for e in cloud.requests("files") if e["authorization"]]
        assert {e["authorization"] for e in cloud.requests("api")} == {"Bearer"}
    (first,) = report["items"]
    assert first["status"] == "synced" and again["items"][0]["status"] == "unchanged" and staged(home) == before
    mirrored = model_of(home)
    assert {p: b for p, b in mirrored.items() if p != "checksums.blake3"} == files and b"config.json" in mirrored["checksums.blake3"]
    upstream = first["upstream"]
    assert (upstream["source"], upstream["upstream_org"], upstream["gated"]) == ("ngc://acme/vision/demo:1.0", "acme", False)
    assert upstream["evidence"] == "organisation acme; PERSONAL_KEY" and len(upstream["key_id"]) == 16
    disk = MirrorHome.open(home).disk
    manifests = {n["ref"]: parse_manifest(disk.read(n["digest"], 1 << 22)) for n in first["names"]}
    model = manifests["1.0"]
    assert model.annotations == {SOURCE: "ngc://acme/vision/demo:1.0", COMMIT: next(r for r in manifests if len(r) == 40)}
    referrers = {m.artifact_type: m for ref, m in manifests.items() if ref.startswith("sha256:")}
    assert set(referrers) == {SIGSTORE, VERSION_TYPE} and all(m.subject and m.subject.digest == model.digest for m in referrers.values())
    assert disk.read(referrers[SIGSTORE].layers[0].digest, 1 << 20) == BUNDLE


def test_the_digest_does_not_depend_on_the_route_the_key_or_what_ngc_says_later(tmp_path: Path) -> None:
    make_model(tmp_path / "ngc", sums=True)
    digests = set()
    with ngc(tmp_path / "ngc", tmp_path / "log", "--token-life", "900") as cloud:
        for turn, (key, facts) in enumerate(
            [
                (PERSONAL, {}),
                (SERVICE, {"scan": "SUSPICIOUS", "page": 2, "first_page": 1}),
                (LEGACY, {"no_sha256": True, "page": 1, "overlap": True}),
                (PERSONAL, {"unlisted": True}),
            ]
        ):
            cloud.change(DEMO, "1.0", **facts)
            cloud.change(DEMO, description=f"words of turn {turn}")
            home = make_home(tmp_path / f"mirror-{turn}")
            report = sync(home, plan_file(tmp_path, item(cloud)), key)
            digests.add(next(n["digest"] for n in report["items"][0]["names"] if n["ref"] == "1.0"))
            assert {p: b for p, b in model_of(home).items() if p != "checksums.blake3"} == contents()
        asked = [e["path"] for e in cloud.requests("api") if "/versions/1.0/files/" in e["path"]]
        assert any(p.endswith("checksums.blake3") for p in asked) and any(p.endswith("ranks 0+1 \u00fc.bin") for p in asked)
        assert {e["authorization"] for e in cloud.requests("authn")} == {"Basic"}
        assert not [e for e in cloud.requests("files") if e["authorization"]]
    assert len(digests) == 1


@pytest.mark.parametrize(
    "facts",
    [
        {"page": 2},
        {"page": 2, "first_page": 1},
        {"page": 1, "first_page": 1, "overlap": True},
        {"page": 2, "total": 3},
        {"page": 2, "total": 400},
        {"page": 2, "total": 3, "first_page": 1},
        {"count": 3, "page": 2, "total": 3},
        {"count": 0, "page": 3, "overlap": True, "total": 0},
    ],
    ids=["from-0", "from-1", "overlapping", "total-too-small", "total-too-large", "too-small-from-1", "both-too-small", "no-totals"],
)
def test_pages_that_start_anywhere_and_totals_that_lie(tmp_path: Path, facts: dict[str, Any]) -> None:
    make_model(tmp_path / "ngc", **facts)
    home = make_home(tmp_path / "mirror")
    with ngc(tmp_path / "ngc", tmp_path / "log") as cloud:
        report = sync(home, plan_file(tmp_path, item(cloud)))
        assert report["failed"] == 0 and model_of(home) == contents()


def test_a_listing_that_is_incomplete_is_refused(tmp_path: Path) -> None:
    make_model(tmp_path / "ngc", count=7)
    home = make_home(tmp_path / "mirror")
    with ngc(tmp_path / "ngc", tmp_path / "log") as cloud:
        error = sync(home, plan_file(tmp_path, item(cloud)), code=6)["items"][0]["error"]
        assert "5 of the 7 files" in error["what"]
        cloud.change(DEMO, "1.0", count=5, status="UPLOAD_PENDING")
        assert "UPLOAD_PENDING" in sync(home, plan_file(tmp_path, item(cloud)), code=6)["items"][0]["error"]["what"]


def test_a_file_that_hub_clients_refuse_is_warned_of_and_a_dry_run_fetches_nothing(tmp_path: Path) -> None:
    make_model(tmp_path / "ngc", lies={"model.safetensors": {"sizeInBytes": 60_000_000_000}})
    home = make_home(tmp_path / "mirror")
    with ngc(tmp_path / "ngc", tmp_path / "log") as cloud:
        (planned,) = sync(home, plan_file(tmp_path, item(cloud)), dry="yes")["items"]
        assert (planned["status"], planned["size"], planned["transferred"]) == ("planned", 60_000_070_066, 0)
        assert "model.safetensors has 60000000000 bytes" in planned["warnings"][0]
        assert not cloud.requests("files") and not MirrorHome.open(home).names() and not staged(home)


def test_signed_urls_that_end_are_listed_again(tmp_path: Path) -> None:
    make_model(tmp_path / "ngc", files=contents(5_000_000))
    home = make_home(tmp_path / "mirror")
    with ngc(tmp_path / "ngc", tmp_path / "log", "--url-life", "1.2", "--throttle", "1500000") as cloud:
        plan = plan_file(tmp_path, *(item(cloud, allow=[pattern], ref=ref) for ref, pattern in (("a", "*.safetensors"), ("b", "*.json"))))
        assert sync(home, plan)["failed"] == 0
        assert 403 in {e["status"] for e in cloud.requests("files")}
        assert [e for e in cloud.requests("api") if e["query"].startswith("path=")]
        cloud.change(DEMO, "1.0", strange={"README.md": 403})
        error = sync(home, plan_file(tmp_path, item(cloud)), code=4)["items"][0]["error"]
        assert error["reason"] == "upstream_403"


@pytest.mark.parametrize("facts", [{}, {"unlisted": True}], ids=["listed", "by-file"])
def test_hosts_that_ignore_ranges_or_ask_for_patience(tmp_path: Path, facts: dict[str, Any]) -> None:
    """200 in place of 206 is read as what it is, in one stream where a file has several pieces; 429 is waited for as long as it says."""
    files = contents(70_000_000)
    make_model(tmp_path / "ngc", files=files, sums=True, rangeless=["model.safetensors", "config.json"], busy=["config.json", "README.md"], **facts)
    home = make_home(tmp_path / "mirror")
    with ngc(tmp_path / "ngc", tmp_path / "log") as cloud:
        assert sync(home, plan_file(tmp_path, item(cloud)))["failed"] == 0
        asked = cloud.requests("files")
    assert {p: b for p, b in model_of(home).items() if p != "checksums.blake3"} == files
    assert [e["status"] for e in asked].count(429) == 2
    assert {e["status"] for e in asked if "model.safetensors" in e["path"]} == {200}


def test_a_guest_and_a_token_that_ends_on_the_way(tmp_path: Path) -> None:
    make_model(tmp_path / "ngc", "acme/open")
    make_model(tmp_path / "ngc", page=1)
    home = make_home(tmp_path / "mirror")
    with ngc(tmp_path / "ngc", tmp_path / "log", "--token-life", "0.05") as cloud:
        cloud.change("acme/open", guest=True)
        guest = item(cloud, "acme/open")
        del guest["key_env"]
        assert sync(home, plan_file(tmp_path, guest))["items"][0]["upstream"]["key_id"] == ""
        assert all(e["guest"] and not e["authorization"] for e in cloud.requests("api"))
        assert model_of(home, "ngc/acme/open") == contents()
        assert sync(home, plan_file(tmp_path, item(cloud)), LEGACY)["failed"] == 0
        assert len(cloud.requests("authn")) > 2  # each refused token was exchanged anew


@pytest.mark.parametrize("known", [True, False], ids=["sha256", "no-sha256"])
def test_killed_in_the_middle_it_goes_on(tmp_path: Path, known: bool) -> None:
    weights = 150_000_000
    make_model(tmp_path / "ngc", files=contents(weights), sums=True, no_sha256=not known)
    home = make_home(tmp_path / "mirror")
    with ngc(tmp_path / "ngc", tmp_path / "log", "--throttle", "60000000") as cloud:
        plan = plan_file(tmp_path, item(cloud))
        env = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "AIRLOCK_MIRROR": str(home), "NGC_KEY": PERSONAL}
        process = subprocess.Popen([str(AIRLOCK), "mirror", "sync", str(plan)], env=env, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        journals, until = home / "staging" / "partial", time.monotonic() + 60
        while sum(j.read_text().count('"to"') for j in journals.glob("*.journal")) < 4 and time.monotonic() < until:
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not MirrorHome.open(home).names()
        report = sync(home, plan)
        assert report["transferred"] < weights * 0.8, report["transferred"]
    assert {p: digest_of(b) for p, b in model_of(home).items() if p != "checksums.blake3"} == {p: digest_of(b) for p, b in contents(weights).items()}


REFUSALS = {401: (5, "upstream_401"), 402: (4, "upstream_402"), 403: (4, "upstream_403"), 404: (3, "repo"), 451: (4, "upstream_451")}


def test_refusals_are_told_with_what_to_do(tmp_path: Path) -> None:
    make_model(tmp_path / "ngc")
    home = make_home(tmp_path / "mirror")
    with ngc(tmp_path / "ngc", tmp_path / "log") as cloud:
        cloud.change(DEMO, license={"licenseId": "NVIDIA AI Product Agreement", "licenseVersion": "1"})
        plan = plan_file(tmp_path, item(cloud))
        for status, (code, reason) in REFUSALS.items():
            cloud.change(DEMO, refuse={"status": status, "words": f"legal words of {status} \x1b[31m"})
            error = sync(home, plan, code=code)["items"][0]["error"]
            assert error["reason"] == reason and f"legal words of {status} [31m" in error["what"] and error["do"], error
        cloud.change(DEMO, refuse={"status": 412, "at": "files", "words": "terms"})  # where NGC answers so: at the listing of files
        assert sync(home, plan, code=4)["items"][0]["error"]["reason"] == "upstream_412"
        cloud.change(DEMO, refuse={})
        error = sync(home, plan, code=4)["items"][0]["error"]
        assert error["reason"] == "upstream_412" and "airlock mirror accept" in error["do"]
        assert not cloud.requests("files")
        cloud.change(DEMO, accepted=True)
        facts = sync(home, plan)["items"][0]["upstream"]
        assert (facts["license"], facts["gated"]) == ("NVIDIA AI Product Agreement", True)
        assert sync(home, plan_file(tmp_path, item(cloud)), f"nvapi-{'z' * 64}", 5)["items"][0]["error"]["reason"] == "upstream_401"
        assert sync(home, plan_file(tmp_path, item(cloud, version="9.9")), code=3)["items"][0]["error"]["error"] == "not_found"


def test_what_a_vendor_asks_for_is_asked_of_the_records_first(tmp_path: Path) -> None:
    make_model(tmp_path / "ngc")
    home = make_home(tmp_path / "mirror")
    env = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "AIRLOCK_MIRROR": str(home), "NGC_KEY": PERSONAL}

    def mirror(*argv: str) -> str:
        done = subprocess.run([str(AIRLOCK), "mirror", *argv], env=env, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0 and PERSONAL not in done.stdout + done.stderr, done.stderr
        return done.stdout

    with ngc(tmp_path / "ngc", tmp_path / "log") as cloud:
        requires = {"product": "nv-ai-enterprise", "tier": "enterprise", "license": "NVIDIA AI Product Agreement"}
        plan = plan_file(tmp_path, item(cloud, requires=requires))
        error = sync(home, plan, code=4)["items"][0]["error"]
        assert error["reason"] == "upstream_product" and "--source ngc" in error["do"]
        add = (
            "key",
            "add",
            "nvidia",
            "--env",
            "NGC_KEY",
            "--source",
            "ngc",
            "--org",
            "acme",
            "--product",
            "nv-ai-enterprise",
            "--tier",
            "enterprise",
        )
        mirror(*add, "--ends", "2100-01-01")
        mirror("accept", f"ngc://{DEMO}:2.0", "--by", "Ada <ada@example.org>", "--license", requires["license"])
        assert not cloud.requests()
        facts = sync(home, plan)["items"][0]["upstream"]
        assert (facts["product"], facts["accepted_by"], facts["upstream_org"]) == ("nv-ai-enterprise", "Ada <ada@example.org>", "acme")
        assert "user acme, role PERSONAL_KEY" in mirror("key", "check", "nvidia", "--endpoint", cloud.api)


def test_images_of_nvcr_with_its_realm(tmp_path: Path) -> None:
    make_model(tmp_path / "ngc")
    layers = [os.urandom(200_000), os.urandom(5_000_000)]
    digest = make_image(tmp_path / "ngc", "nim/meta/app", layers)
    make_image(tmp_path / "ngc", "nvidia/free", [b"free"], public=True)
    home = make_home(tmp_path / "mirror")
    with ngc(tmp_path / "ngc", tmp_path / "log") as cloud:
        host = cloud.nvcr.removeprefix("http://")
        base = {"plain_http": True, "key_env": "NGC_KEY"}
        app = base | {"source": f"oci://{host}/nim/meta/app:1.0", "as": "nvcr.io/nim/meta/app"}
        free = {"source": f"oci://{host}/nvidia/free:1.0", "as": "nvcr.io/nvidia/free", "plain_http": True}
        report = sync(home, plan_file(tmp_path, app, free))
        assert report["items"][0]["names"][0]["digest"] == digest and {e["authorization"] for e in cloud.requests("files")} == {""}
        assert {n.name for n in MirrorHome.open(home).names()} == {"nvcr.io/nim/meta/app", "nvcr.io/nvidia/free"}
        told = json.loads((cloud.root / "cloud.json").read_text())
        for status, at, code, reason in (
            (402, "token", 4, "upstream_402"),
            (412, "manifest", 4, "upstream_412"),
            (403, "manifest", 4, "upstream_403"),
        ):
            told["images"]["nim/meta/app"] = {"refuse": {"status": status, "at": at}}
            (cloud.root / "cloud.json").write_text(json.dumps(told))
            error = sync(make_home(tmp_path / f"mirror-{status}"), plan_file(tmp_path, app), code=code)["items"][0]["error"]
            assert error["error"] == "denied" and error["reason"] == reason, error
        gated = dict(app)
        del gated["key_env"]
        told["images"]["nim/meta/app"] = {}
        (cloud.root / "cloud.json").write_text(json.dumps(told))
        error = sync(make_home(tmp_path / "mirror-guest"), plan_file(tmp_path, gated), code=4)["items"][0]["error"]
        assert error["error"] == "denied" and "key_env" in error["do"]


def test_an_expired_token_of_nvcr_is_renewed_at_the_first_realm(tmp_path: Path) -> None:
    """nvcr.io sends the holder of an expired token to another realm, which is of no use: the one that /v2/ names without a token counts."""
    make_model(tmp_path / "ngc")
    make_image(tmp_path / "ngc", "nim/meta/app", [os.urandom(3_000_000 + i) for i in range(4)], life=600)
    home = make_home(tmp_path / "mirror")
    with ngc(tmp_path / "ngc", tmp_path / "log", "--token-life", "0.4", "--throttle", "4000000") as cloud:
        app = {"source": f"oci://{cloud.nvcr.removeprefix('http://')}/nim/meta/app:1.0", "as": "nvcr.io/nim/meta/app", "plain_http": True}
        report = sync(home, plan_file(tmp_path, app | {"key_env": "NGC_KEY"}))
        assert report["failed"] == 0, report
        assert len([e for e in cloud.requests("nvcr") if e["path"] == "/proxy_auth"]) > 1 and not cloud.requests("authn")
