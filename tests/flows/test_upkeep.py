"""Verify, rebuild, backup and restore by their commands on a real site: rot is found and healed, and backups of different days come together."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
from pathlib import Path

import pytest
from sqlalchemy import delete, func, select

from artifact import manifest as m
from artifact.errors import NotFound
from registry import tables as t
from registry.rebuild import Rebuild
from registry.settings import Settings
from registry.wiring import Site, open_site
from tests.conftest import airlock
from tests.contracts.doors import new_site, serving
from tests.services import postgres
from tests.site import call_of, make_key, make_site, push_model, put, running_site

DAMAGED = 7


def reopened(data: Path) -> Site:
    return open_site(Settings.load(data, environ={}), background=False)


def blob_path(data: Path, digest: str, generation: str = "") -> Path:
    text = digest.partition(":")[2]
    return data / "blobs" / "sha256" / text[:2] / (text + generation)


def flip(path: Path) -> None:
    path.chmod(0o644)
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


def said(*argv: str, status: int = 0) -> dict[str, object]:
    done = airlock(*argv, "--json", check=False)
    assert done.returncode == status, done.stderr + done.stdout
    answer = json.loads(done.stdout)
    assert isinstance(answer, dict)
    return answer


@pytest.fixture
def filled(tmp_path: Path) -> tuple[Path, str]:
    """A closed site with one model, and a key of its organisation."""
    with make_site(tmp_path) as site:
        key = make_key(site, "acme")
        push_model(site, call_of(site, key), "acme/tiny", "1")
    return tmp_path / "data", key


def test_verify_quarantines_and_a_push_heals(filled: tuple[Path, str]) -> None:
    data, key = filled
    with reopened(data) as site:
        raw = os.urandom(3000)
        digest = put(site, call_of(site, key), "acme/tiny", raw).digest
    whole = said("registry", "verify", "--data", str(data), "--rate", "1G")
    assert whole["complete"] is True and whole["findings"] == [] and int(str(whole["manifests"])) == 2
    flip(blob_path(data, digest))
    report = said("registry", "verify", "--data", str(data), status=DAMAGED)
    (finding,) = report["findings"]  # type: ignore[misc]
    assert finding["digest"] == digest and finding["repositories"] == ["acme/tiny"] and "digest sha256:" in finding["problem"]
    with reopened(data) as site:
        call = call_of(site, key)
        for verb in (site.guard.stat, site.guard.read):
            with pytest.raises(NotFound, match="failed verification") as refused:
                verb(call, "acme/tiny", digest)
            assert refused.value.reason == "damaged"
        put(site, call, "acme/tiny", raw)  # the same bytes come again
        content = site.guard.read(call, "acme/tiny", digest)
        assert content.path is not None and content.path.read_bytes() == raw and content.path != blob_path(data, digest)
    assert blob_path(data, digest).exists(), "the damaged bytes are kept as evidence"
    assert said("registry", "verify", "--data", str(data))["findings"] == []


def test_restored_bytes_are_served_again(filled: tuple[Path, str]) -> None:
    data, key = filled
    raw = os.urandom(2000)
    with reopened(data) as site:
        digest = put(site, call_of(site, key), "acme/tiny", raw).digest
    path = blob_path(data, digest)
    flip(path)
    said("registry", "verify", "--data", str(data), status=DAMAGED)
    again = said("registry", "verify", "--data", str(data), status=DAMAGED)
    assert "quarantined before" in str(again["findings"])
    path.write_bytes(raw)
    assert said("registry", "verify", "--data", str(data))["healed"] == [digest]
    with reopened(data) as site:
        assert site.guard.read(call_of(site, key), "acme/tiny", digest).total == 2000


def test_verify_goes_on_where_it_stopped(filled: tuple[Path, str]) -> None:
    data, _ = filled
    for option, values in (("--minutes", ("nan", "-1", "0", "inf", "x")), ("--rate", ("nan", "-1", "200X", ""))):
        for value in values:
            wrong = airlock("registry", "verify", "--data", str(data), f"{option}={value}", check=False)
            assert wrong.returncode == 2 and option in wrong.stderr and "expected" in wrong.stderr, (option, value)
    first = said("registry", "verify", "--data", str(data), "--minutes", "0.0000001")
    assert first["complete"] is False
    second = said("registry", "verify", "--data", str(data))
    third = said("registry", "verify", "--data", str(data))
    assert second["complete"] is True and third["complete"] is True
    assert int(str(second["objects"])) <= int(str(third["objects"]))


def test_rebuild_derives_the_index(filled: tuple[Path, str]) -> None:
    data, key = filled
    with sqlite3.connect(data / "registry.db") as db:
        before = {t: sorted(db.execute(f"select * from {t}").fetchall(), key=repr) for t in ("edge", "file", "repo_blob")}
        sizes = sorted(db.execute("select digest, size, location from blob").fetchall())
        for table in ("edge", "file", "repo_blob", "blob_alias", "blob"):
            db.execute(f"delete from {table}")
    db.close()
    report = said("registry", "rebuild", "--data", str(data))
    assert report["adopted"] == len(sizes) and report["repaired"] == 2 and report["missing_count"] == 0
    with sqlite3.connect(data / "registry.db") as db:
        assert sorted(db.execute("select digest, size, location from blob").fetchall()) == sizes
        for table in ("edge", "file"):
            assert sorted(db.execute(f"select * from {table}").fetchall(), key=repr) == before[table]
        assert sorted((r[0], r[1]) for r in db.execute("select repo_id, digest from repo_blob")) == sorted((r[0], r[1]) for r in before["repo_blob"])
    db.close()
    with reopened(data) as site:
        call = call_of(site, key)
        _, page = site.guard.files(call, "acme/tiny", "1")
        for file in page.items:
            content = site.guard.read(call, "acme/tiny", file.digest)  # type: ignore[attr-defined]
            assert content.path is not None and m.digest_of(content.path.read_bytes()) == content.digest
    assert said("registry", "rebuild", "--data", str(data))["repaired"] == 0


def test_a_lost_object_is_named_and_comes_back(filled: tuple[Path, str]) -> None:
    data, key = filled
    raw = os.urandom(1500)
    with reopened(data) as site:
        digest = put(site, call_of(site, key), "acme/tiny", raw).digest
    path = blob_path(data, digest)
    kept = path.with_name("kept")
    path.rename(kept)
    report = said("registry", "rebuild", "--data", str(data), status=DAMAGED)
    assert report["missing"] == {digest: ["acme/tiny"]}
    with reopened(data) as site, pytest.raises(NotFound, match="missing or failed"):
        site.guard.stat(call_of(site, key), "acme/tiny", digest)
    assert said("registry", "verify", "--data", str(data), status=DAMAGED)["complete"] is True  # an object without bytes does not end it
    path.write_bytes(raw[:700])  # an interrupted copy
    cut = said("registry", "rebuild", "--data", str(data), status=DAMAGED)
    assert digest in str(cut["damaged"]) and cut["found_again"] == 0
    path.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    assert said("registry", "rebuild", "--data", str(data), status=DAMAGED)["found_again"] == 0
    with reopened(data) as site, pytest.raises(NotFound, match="missing or failed"):
        site.guard.read(call_of(site, key), "acme/tiny", digest)
    path.unlink()
    kept.rename(path)
    assert said("registry", "rebuild", "--data", str(data))["found_again"] == 1
    with reopened(data) as site:
        assert site.guard.stat(call_of(site, key), "acme/tiny", digest).size == 1500


def test_backup_refuses_and_restore_checks(filled: tuple[Path, str], tmp_path: Path) -> None:
    data, _ = filled
    to = tmp_path / "saved"
    said("registry", "backup", "--data", str(data), "--to", str(to))
    assert (to.stat().st_mode & 0o777, (to / "secrets" / "pepper").stat().st_mode & 0o777) == (0o700, 0o600)
    assert airlock("registry", "backup", "--data", str(data), "--to", str(to), check=False).returncode != 0
    assert airlock("registry", "restore", "--from", str(to), "--data", str(data), check=False).returncode != 0  # a site is there
    assert airlock("registry", "restore", "--from", str(tmp_path), "--data", str(tmp_path / "x"), check=False).returncode != 0
    for name in ("registry.db", "secrets/pepper", "site.json"):
        copy = tmp_path / "altered"
        shutil.copytree(to, copy)
        flip(copy / name)
        done = airlock("registry", "restore", "--from", str(copy), "--data", str(tmp_path / "new"), check=False)
        assert done.returncode == DAMAGED and name in done.stderr and "Traceback" not in done.stderr
        assert not (tmp_path / "new" / "site.json").exists()
        shutil.rmtree(copy)


def test_a_hostile_backup_is_refused(filled: tuple[Path, str], tmp_path: Path) -> None:
    data, _ = filled
    to = tmp_path / "saved"
    said("registry", "backup", "--data", str(data), "--to", str(to))
    victim = tmp_path / "victim"
    victim.write_bytes((to / "site.json").read_bytes())
    victim.chmod(0o644)
    index = json.loads((to / "backup.json").read_text())
    whole: dict[str, dict[str, object]] = index["files"]
    some = whole["site.json"]
    listed: list[dict[str, object]] = [
        {"files": {}},
        {"files": whole | {"../outside": some}},
        {"files": whole | {"/etc/passwd": some}},
        {"files": whole | {"serve.lock": some}},
        {"files": {k: v for k, v in whole.items() if k != "registry.db"}},
        {"files": {k: v for k, v in whole.items() if k != "secrets/pepper"}},
        {"files": whole | {"site.json": {"sha256": some["sha256"], "size": 10**400}}},
        {"files": [1]},
        {"taken": 10**15},
        {"taken": "now"},
        {"database": "other"},
        {"schema": 2},
        {"schema": None},
    ]
    for change in listed:
        (to / "backup.json").write_text(json.dumps(index | change))
        done = airlock("registry", "restore", "--from", str(to), "--data", str(tmp_path / "new"), check=False)
        assert done.returncode != 0 and "Traceback" not in done.stderr, change
        assert not any((tmp_path / "new" / name).exists() for name in ("site.json", "registry.db", "secrets")), change
    (to / "backup.json").write_text(json.dumps(index))
    (to / "trust" / "evil.json").write_text("{}")
    for name in ("site.json", "secrets"):
        (to / name).rename(to / "kept")
        (to / name).symlink_to(victim if name == "site.json" else to / "kept")
        done = airlock("registry", "restore", "--from", str(to), "--data", str(tmp_path / "new"), check=False)
        assert done.returncode == DAMAGED and "plain file" in done.stderr and victim.stat().st_mode & 0o777 == 0o644
        (to / name).unlink()
        (to / "kept").rename(to / name)
    said("registry", "restore", "--from", str(to), "--data", str(tmp_path / "new"))
    assert not (tmp_path / "new" / "trust" / "evil.json").exists() and not (tmp_path / "new" / ".restore").exists()
    assert (tmp_path / "new" / "secrets").stat().st_mode & 0o777 == 0o700


@pytest.mark.server
@pytest.mark.parametrize("store", ["newer", "older"])
def test_drill_with_three_ages(tmp_path: Path, store: str) -> None:
    """Database of Monday, secrets and trust of Tuesday, store of Wednesday or of Sunday: nothing is served wrong, all comes back by a push."""
    data, new = tmp_path / "site" / "data", tmp_path / "new" / "data"
    data.parent.mkdir()
    new.parent.mkdir()
    keys = new_site(data)
    late_raw, monday_raw = os.urandom(3000), os.urandom(5000)
    with serving(data, keys) as door:
        early = door.blob("acme/app", os.urandom(2000))
        shutil.copytree(data / "blobs", tmp_path / "sunday")
        monday = door.blob("acme/app", monday_raw)
        image, _ = door.image("acme/app", "1", [b"layer of monday"])
        said("registry", "backup", "--data", str(data), "--to", str(tmp_path / "monday"))
        door.blob("acme/app", os.urandom(4000))
        said("registry", "backup", "--data", str(data), "--to", str(tmp_path / "tuesday"))
        late = door.blob("acme/app", late_raw)
        shutil.copytree(data / "blobs", tmp_path / "wednesday")
    mixed = tmp_path / "mixed"
    shutil.copytree(tmp_path / "tuesday", mixed)
    shutil.copy(tmp_path / "monday" / "registry.db", mixed / "registry.db")
    done = airlock("registry", "restore", "--from", str(mixed), "--data", str(new), check=False)
    assert done.returncode == DAMAGED and "registry.db" in done.stderr  # a backup is whole or none: its days are mixed by hand, knowingly
    said("registry", "restore", "--from", str(tmp_path / "monday"), "--data", str(new))
    for part in ("secrets", "trust"):
        shutil.rmtree(new / part)
        shutil.copytree(tmp_path / "tuesday" / part, new / part)
    shutil.copytree(tmp_path / ("wednesday" if store == "newer" else "sunday"), new / "blobs", dirs_exist_ok=True)
    missing = 0 if store == "newer" else 3  # the blob of Monday, its layer and the empty config
    report = said("registry", "rebuild", "--data", str(new), status=DAMAGED if missing else 0)
    assert (report["adopted"], report["missing_count"]) == (2 if store == "newer" else 0, missing)
    with serving(new, keys) as door:
        assert door.ask("GET", f"/v2/acme/app/blobs/{early}").status == 200
        assert door.ask("GET", "/v2/acme/app/manifests/1").headers["docker-content-digest"] == image
        found = door.ask("GET", f"/v2/acme/app/blobs/{monday}")
        assert found.body == monday_raw if store == "newer" else (found.status == 404 and "missing or failed" in found.body.decode())
        for digest, raw in ((late, late_raw), (monday, monday_raw)):  # the first one's link is of a later day than the database
            assert door.blob("acme/app", raw) == digest
            assert door.ask("GET", f"/v2/acme/app/blobs/{digest}").body == raw
            assert blob_path(new, digest).exists() and not blob_path(new, digest, ".g1").exists(), "one copy of the bytes"
        assert door.image("acme/app", "1", [b"layer of monday"])[0] == image
    assert said("registry", "verify", "--data", str(new))["findings"] == []


def test_secrets_of_another_site_are_refused(filled: tuple[Path, str], tmp_path: Path) -> None:
    data, _ = filled
    said("registry", "backup", "--data", str(data), "--to", str(tmp_path / "saved"))
    said("registry", "restore", "--from", str(tmp_path / "saved"), "--data", str(tmp_path / "new"))
    (tmp_path / "new" / "secrets" / "pepper").write_bytes(os.urandom(32))
    done = airlock("registry", "rebuild", "--data", str(tmp_path / "new"), check=False)
    assert done.returncode != 0 and "pepper" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.server
def test_postgresql_goes_out_and_back(tmp_path: Path) -> None:
    with running_site(tmp_path, "postgresql") as site:
        key = make_key(site, "acme")
        pushed = push_model(site, call_of(site, key), "acme/tiny", "1")
        server, data = postgres.shared(), tmp_path / "data"
        here = {"AIRLOCK_DATABASE": site.settings.database}
        digest = put(site, call_of(site, key), "acme/tiny", os.urandom(900)).digest
        flip(blob_path(data, digest))
        assert airlock("registry", "verify", "--data", str(data), check=False, **here).returncode == DAMAGED
        for _ in range(2000):
            server.sql("SELECT pg_current_xact_id()")  # the new server has seen fewer transactions than this one
        airlock("registry", "backup", "--data", str(data), "--to", str(tmp_path / "saved"), **here)
    fresh = postgres.Postgres.make()
    url = fresh.database("template0")
    try:
        there, new = {"AIRLOCK_DATABASE": url}, tmp_path / "new"
        refused = airlock("registry", "restore", "--from", str(tmp_path / "saved"), "--data", str(new), check=False)
        assert refused.returncode != 0 and "AIRLOCK_DATABASE" in refused.stderr and not new.exists()
        airlock("registry", "restore", "--from", str(tmp_path / "saved"), "--data", str(new), **there)
        shutil.copytree(data / "blobs", new / "blobs")
        with open_site(Settings.load(new, environ=there), background=False) as again:
            with again.catalog.reading() as conn:
                waiting = conn.execute(select(func.count()).select_from(t.audit_pending)).scalar_one()
            assert again.log.settle() == waiting > 0, "events that waited at the old server go into the log at the new one"
            with again.catalog.writing() as conn:
                for table in (t.edge, t.file, t.repo_blob):
                    conn.execute(delete(table))
            report = Rebuild(again.catalog, again.blobs, again.audit, 86400).run(1.0)
            assert (report.repaired, report.missing_count, report.adopted) == (2, 0, 0)
            call = call_of(again, key)
            assert again.guard.resolve(call, "acme/tiny", "1").digest == pushed.model.digest
            for file in again.guard.files(call, "acme/tiny", "1")[1].items:
                assert again.guard.read(call, "acme/tiny", file.digest).total == file.size  # type: ignore[attr-defined]
    finally:
        fresh.remove()
