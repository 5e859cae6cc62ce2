"""What a sync is entitled to, from the key's record to the closed site: refused before the first byte, carried in the bundle, shown there."""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from artifact.grant import Grant
from artifact.remote import RemoteRegistry
from mirror.home import MirrorHome
from mirror.pack import pack
from registry.catalog import ensure_org
from registry.importer import import_bundle
from registry.settings import Settings
from registry.wiring import open_site
from tests.contracts.doors import new_site, serving
from tests.fakes.registry import registry
from tests.flows.test_fake_hub import TOKEN, Running, hub, make_repo
from tests.flows.test_sync import AIRLOCK, make_home, plan_file, push_image, push_model

pytestmark = pytest.mark.server
NGC = "nvapi-upstream-key-of-a-test-0123456789"
ADA = "Ada Lovelace <ada@example.org>"
ENTERPRISE = {"product": "nv-ai-enterprise", "tier": "enterprise"}


def mirror(home: Path, *argv: str, code: int = 0, **env: str) -> str:
    """One command of the mirror with both keys in their variables; what it printed, the keys never among it."""
    base = {"PATH": os.environ["PATH"], "HOME": str(home.parent), "AIRLOCK_MIRROR": str(home), "HF_TOKEN": TOKEN, "NGC_KEY": NGC}
    done = subprocess.run([str(AIRLOCK), "mirror", *argv], env=base | env, capture_output=True, text=True, timeout=120)
    assert done.returncode == code, (argv, done.returncode, done.stdout, done.stderr)
    assert "Traceback" not in done.stderr and TOKEN not in done.stdout + done.stderr and NGC not in done.stdout + done.stderr
    return done.stdout if done.stdout else done.stderr


def sync(home: Path, plan: Path, code: int = 0) -> list[dict[str, Any]]:
    items: list[dict[str, Any]] = json.loads(mirror(home, "sync", str(plan), "--json", code=code))["items"]
    return items


def bytes_asked(running: Running) -> list[str]:
    return [e["path"] for e in running.requests() if "/resolve/" in e["path"] and e["method"] == "GET"]


def refused(home: Path, plan: Path, reason: str) -> dict[str, Any]:
    (item,) = sync(home, plan, code=4)
    assert (item["status"], item["error"]["error"], item["error"]["reason"]) == ("failed", "denied", reason), item
    assert item["error"]["what"] and item["error"]["do"]
    return dict(item["error"])


def test_a_hub_item_is_refused_before_its_first_byte_until_everything_is_there(tmp_path: Path) -> None:
    meta = {"license": "apache-2.0", "gated": "manual", "accepted": False}
    folder = make_repo(tmp_path / "repos", "Acme/Tiny", **meta)
    home = make_home(tmp_path / "mirror")
    key = ("key", "add", "hub", "--env", "HF_TOKEN", "--source", "hf", "--org", "acme-hub")
    with hub(tmp_path / "repos", tmp_path / "log") as running:
        requires = ENTERPRISE | {"license": "apache-2.0"}
        plan = plan_file(tmp_path, {"source": "hf://acme/tiny", "endpoint": running.endpoint, "key_env": "HF_TOKEN", "requires": requires})
        assert "airlock mirror key add NAME --env HF_TOKEN" in refused(home, plan, "upstream_product")["do"]
        mirror(home, *key, "--tier", "enterprise")
        assert "(account acme-hub) has none" in refused(home, plan, "upstream_product")["what"]
        mirror(home, *key, "--product", "nv-ai-enterprise", "--tier", "developer")
        assert refused(home, plan, "upstream_tier")["expected"] == "tier enterprise"
        mirror(home, *key, "--product", "nv-ai-enterprise", "--tier", "enterprise", "--ends", "2020-01-01")
        assert "ended 2020-01-01T00:00:00Z" in refused(home, plan, "upstream_subscription")["what"]
        mirror(home, *key, "--product", "nv-ai-enterprise", "--tier", "enterprise", "--ends", "2100-01-01", "--key-ends", "2090-01-01")
        refused(home, plan, "upstream_license")
        mirror(home, "accept", "hf://acme/tiny", "--by", ADA, "--license", "mit")
        refused(home, plan, "upstream_license")
        mirror(home, "accept", "hf://Acme/Tiny@main", "--by", ADA, "--license", "apache-2.0", "--evidence", "ticket 17")
        assert not running.requests()  # nothing of this needed the upstream
        refused(home, plan, "gated")
        (folder / "meta.json").write_text(json.dumps(meta | {"no_auth_check": True}))
        refused(home, plan, "gated")
        (folder / "meta.json").write_text(json.dumps(meta | {"accepted": True, "license": "mit"}))
        assert "'mit' now" in refused(home, plan, "upstream_license")["what"]
        assert not bytes_asked(running) and MirrorHome.open(home).names() == []
        (folder / "meta.json").write_text(json.dumps(meta | {"accepted": True, "no_auth_check": True}))
        (item,) = sync(home, plan)
        assert item["upstream"]["evidence"] == "user tester; role read; admitted by HEAD; ticket 17"
    facts = item["upstream"]
    assert (facts["upstream_org"], facts["product"], facts["tier"]) == ("acme-hub", "nv-ai-enterprise", "enterprise")
    assert (facts["accepted_by"], facts["license"], facts["gated"]) == (ADA, "apache-2.0", True)
    assert facts["subscription_end"] == 4102444800 and facts["key_end"] == 3786912000 and time.time() - facts["accepted_at"] < 300


def test_all_items_are_checked_before_the_bytes_of_any(tmp_path: Path) -> None:
    make_repo(tmp_path / "repos", "acme/free")
    make_repo(tmp_path / "repos", "acme/gated", gated="auto")
    make_repo(tmp_path / "repos", "acme/closed", gated="manual", accepted=False)
    home = make_home(tmp_path / "mirror")
    with hub(tmp_path / "repos", tmp_path / "log") as running:
        some = [{"source": f"hf://acme/{name}", "endpoint": running.endpoint, "key_env": "HF_TOKEN"} for name in ("free", "gated", "closed")]
        items = sync(home, plan_file(tmp_path, *some, some[0] | {"ref": "paid", "requires": {"license": "mit"}}), code=4)
        assert [i["status"] for i in items] == ["synced", "synced", "failed", "failed"]
        assert [i["error"]["reason"] for i in items[2:]] == ["gated", "upstream_license"]
        log = [e["path"] for e in running.requests()]
        first = next(n for n, path in enumerate(log) if "/resolve/" in path)
        assert all("/resolve/" in path for path in log[first:]), log
        assert not any("/closed/resolve/" in path for path in log)


def test_an_image_is_refused_before_any_request(tmp_path: Path) -> None:
    home = make_home(tmp_path / "mirror")
    with registry(tmp_path / "upstream") as running:
        push_image(RemoteRegistry(running.url), "nim/engine", "1", 1, 20_000)
        before = running.log.read_text().count('"GET /v2/')
        item = {"source": f"oci://{running.host}/nim/engine:1", "as": "nim/engine", "plain_http": True, "requires": ENTERPRISE | {"license": "nv"}}
        refused(home, plan_file(tmp_path, item), "upstream_product")
        plan = plan_file(tmp_path, item | {"key_env": "NGC_KEY"})
        refused(home, plan, "upstream_product")
        key = ("key", "add", "nvidia", "--env", "NGC_KEY", "--source", "ngc", "--org", "acme", "--product", "nv-ai-enterprise")
        mirror(home, *key, "--tier", "enterprise", "--ends", "2100-01-01")
        refused(home, plan, "upstream_license")
        assert running.log.read_text().count('"GET /v2/') == before
        mirror(home, "accept", f"oci://{running.host}/nim/engine", "--by", ADA, "--license", "nv")
        (done,) = sync(home, plan)
    assert (done["upstream"]["license"], done["upstream"]["accepted_by"], done["upstream"]["tier"]) == ("nv", ADA, "enterprise")


def test_a_licence_that_only_the_bytes_tell_gives_no_name(tmp_path: Path) -> None:
    home = make_home(tmp_path / "mirror")
    with registry(tmp_path / "upstream") as running:
        push_model(RemoteRegistry(running.url), "acme/tiny", "1", b"weights", profiles=False)  # its facts layer says apache-2.0
        source = {"source": f"oci://{running.host}/acme/tiny:1", "as": "acme/tiny", "plain_http": True}
        mirror(home, "accept", source["source"], "--by", ADA, "--license", "mit")
        refused(home, plan_file(tmp_path, source | {"requires": {"license": "mit"}}), "upstream_license")
        assert MirrorHome.open(home).names() == []
        mirror(home, "accept", source["source"], "--by", ADA, "--license", "Apache-2.0")
        (done,) = sync(home, plan_file(tmp_path, source | {"requires": {"license": "Apache-2.0"}}))
    assert (done["upstream"]["license"], done["upstream"]["accepted_by"]) == ("apache-2.0", ADA)


def test_records_and_their_watch(tmp_path: Path) -> None:
    home = make_home(tmp_path / "mirror")
    assert "UNKNOWN" in mirror(home, "check", "--nagios", code=3)
    mirror(home, "key", "add", "nvidia", "--env", "NGC_KEY", "--source", "ngc", "--org", "acme", "--ends", "2100-01-01")
    assert mirror(home, "check", "--nagios").startswith("OK: upstream_subscription nvidia of acme ends in ")
    assert mirror(home, "check", "--nagios", "--warning", "100000", code=1).startswith("WARNING: ")
    mirror(home, "key", "add", "hub", "--env", "HF_TOKEN", "--source", "hf", "--org", "acme-hub", "--key-ends", "2020-01-01T12:00:00+02:00")
    assert "ended 2020-01-01T10:00:00Z" in mirror(home, "check", "--nagios", code=2)
    found = json.loads(mirror(home, "check", "--json"))["items"]
    assert [(i["kind"], i["name"], i["org"], i["ends"]) for i in found] == [
        ("upstream_key", "hub", "acme-hub", "2020-01-01T10:00:00Z"),
        ("upstream_subscription", "nvidia", "acme", "2100-01-01T00:00:00Z"),
    ]
    assert "hub     upstream_key" in mirror(home, "check")
    make_repo(tmp_path / "repos")
    with hub(tmp_path / "repos", tmp_path / "log") as running:
        assert "user tester, role read" in mirror(home, "key", "check", "hub", "--endpoint", running.endpoint)
        mirror(home, "key", "add", "wrong", "--env", "OTHER", "--source", "hf", "--org", "x", OTHER="hf_wrong")
        mirror(home, "key", "check", "wrong", "--endpoint", running.endpoint, code=5, OTHER="hf_wrong")
    mirror(home, "key", "check", "hub", "--endpoint", "http://127.0.0.1:9", code=9)
    assert "another key" in mirror(home, "key", "check", "nvidia", code=5, NGC_KEY="nvapi-another")
    assert "is recorded as hub" in mirror(home, "key", "add", "again", "--env", "HF_TOKEN", "--source", "hf", "--org", "x", code=8)
    assert "tester" in mirror(home, "key", "list") and len(json.loads(mirror(home, "key", "list", "--json"))["items"]) == 3
    mirror(home, "key", "remove", "hub")
    mirror(home, "key", "remove", "hub", code=3)
    for bad in (["--ends", "soon"], ["--ends", "1969-01-01"], ["--product", "a b"], ["--env", "NOT-A-NAME"]):
        mirror(home, "key", "add", "x", "--env", "NGC_KEY", "--source", "ngc", "--org", "acme", *bad, code=6)
    mirror(home, "key", "add", NGC, "--env", "NGC_KEY", "--source", "ngc", "--org", "acme", code=6)
    mirror(home, "accept", "hf://acme/tiny", "--by", " ", code=6)
    mirror(home, "accept", "acme/tiny", "--by", ADA, code=6)
    stored = b"".join(p.read_bytes() for p in home.rglob("*") if p.is_file())
    assert NGC.encode() not in stored and TOKEN.encode() not in stored


def test_what_the_mirror_knew_is_shown_and_changed_at_the_site(tmp_path: Path) -> None:
    make_repo(tmp_path / "repos", "Acme/Tiny", license="mit")
    home = make_home(tmp_path / "mirror")
    mirror(
        home, "key", "add", "hub", "--env", "HF_TOKEN", "--source", "hf", "--org", "acme-hub", "--product", "nv-ai-enterprise", "--tier", "enterprise"
    )
    with hub(tmp_path / "repos", tmp_path / "log") as running:
        sync(home, plan_file(tmp_path, {"source": "hf://acme/tiny", "endpoint": running.endpoint, "key_env": "HF_TOKEN", "requires": ENTERPRISE}))
    opened = MirrorHome.open(home)
    pack(opened, tmp_path / "medium", time.time())
    data = tmp_path / "site"
    keys = new_site(data)
    with open_site(Settings.load(data), background=False) as site:
        site.home.pin_root(opened.root)
        assert import_bundle(site, tmp_path / "medium", time.time())["requires_kept"] == []
        now = time.time()
        with site.catalog.writing() as conn:
            made = {"boss": ("site", Grant(("**",), ("admin",)), "enterprise"), "small": ("acme", Grant(("hf/**",), ("pull",)), "developer")}
            for who, (org, grant, tier) in made.items():
                keys[who] = site.entitlements.add_key(conn, ensure_org(conn, org, now), tier=tier, grant=grant, expires=0.0, at=now - 1)[1]
    name = "hf/acme/tiny"
    with serving(data, keys) as door:

        def run(*argv: str, who: str = "boss", code: int = 0) -> str:
            env = {"PATH": os.environ["PATH"], "AIRLOCK_REGISTRY": door.url, "AIRLOCK_KEY": keys[who]}
            done = subprocess.run([str(AIRLOCK), "catalog", *argv], env=env, capture_output=True, text=True, timeout=120)
            assert done.returncode == code, (argv, done.stdout, done.stderr)
            return done.stdout if code == 0 else done.stderr

        shown = run("show", name)
        assert "requires:   tier enterprise, product nv-ai-enterprise" in shown and "account acme-hub, key " in shown and "licence mit" in shown
        assert "upstream:" not in run("show", name, who="small")
        size = door.ask("GET", "/airlock/v1/audit/checkpoint", who="boss").json()["size"]
        entries = door.ask("GET", f"/airlock/v1/audit/entries?size={size}&limit=1000", who="boss").body
        assert b"require" in entries and b"denied" not in entries  # who may not look does not ask
        assert {row["name"] for row in json.loads(run("show", name, "--json"))["upstream"]} == {name}
        page = door.ask("GET", "/airlock/v1/upstream?limit=1", who="boss").json()
        assert len(page["items"]) == 1 and page["after"] == page["items"][0]["id"]
        assert door.ask("GET", "/airlock/v1/upstream", who="small").status == 403
        assert door.ask("GET", "/airlock/v1/upstream?name=a%00b", who="boss").status == 400
        assert door.ask("GET", f"/v2/{name}/manifests/main", who="small").status == 403
        assert "denied" not in run("require", name, "--tier", "enterprise", "--none", code=6)
        assert "site administrator" in run("require", name, "--none", who="acme", code=4)
        assert run("require", name, "--none") == f"{name} requires nothing\n"
        assert door.ask("GET", f"/v2/{name}/manifests/main", who="small").status == 200
    env = {"PATH": os.environ["PATH"]}
    argv = [str(AIRLOCK), "catalog", "require", name, "--tier", "developer", "--data", str(data), "--json"]
    done = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=120)
    assert json.loads(done.stdout) == {"name": name, "tier": "developer", "product": ""}, done.stderr
    with hub(
        tmp_path / "repos", tmp_path / "log"
    ) as running:  # another revision: the next bundle says enterprise again, the administrator's word stays
        (tmp_path / "repos" / "Acme" / "Tiny" / "more.txt").write_text("more")
        sync(home, plan_file(tmp_path, {"source": "hf://acme/tiny", "endpoint": running.endpoint, "key_env": "HF_TOKEN", "requires": ENTERPRISE}))
    pack(MirrorHome.open(home), tmp_path / "second", time.time())
    argv = [str(AIRLOCK), "bundle", "import", str(tmp_path / "second"), "--data", str(data)]
    done = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and f"{name} keeps what an administrator of this site says" in done.stdout, done.stdout + done.stderr
