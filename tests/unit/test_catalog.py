"""Names, manifests, files, uploads and links over a real database and a real store."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import select

from artifact import manifest as m
from artifact.errors import Conflict, Denied, Invalid, Mismatch, NotFound, RangeInvalid, TooLarge, Unavailable, Unsupported
from artifact.store import Call, Content, Descriptor, File
from registry import catalog as c
from registry import tables as t
from registry.home import Home
from registry.library import lfs_pointer_oid, local_call
from registry.settings import Settings
from registry.wiring import Site, migrate, open_site
from tests.site import BACKENDS, SQLITE_ONLY, call_of, make_key, push_model, put, running_site


@pytest.fixture(params=BACKENDS)
def site(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Site]:
    with running_site(tmp_path, request.param) as opened:
        make_key(opened, "acme")
        yield opened


def bytes_of(content: Content) -> bytes:
    if content.data is not None:
        return content.data
    assert content.path is not None
    return content.path.read_bytes()[content.lo : content.hi]


def rows(site: Site, table: object) -> int:
    with site.catalog.reading() as conn:
        return len(conn.execute(select(table)).all())  # type: ignore[call-overload]


def image(site: Site, call: Call, repo: str, *layers: bytes, subject: Descriptor | None = None, kind: str = "application/x-test") -> bytes:
    put(site, call, repo, m.EMPTY_BYTES)
    found = [put(site, call, repo, raw) for raw in layers]
    return m.build_manifest(kind, [d.as_json() for d in found], {"n": "1"}, subject)


def test_migrations_make_the_tables_of_the_code(site: Site) -> None:
    with site.engine.connect() as conn:
        found = compare_metadata(MigrationContext.configure(conn, opts={"compare_type": True}), t.metadata)
    # The one column that only PostgreSQL has: by it the audit log knows which rows are settled.
    assert [change for change in found if change[0] != "remove_column" or change[3].name != "xid"] == []


@SQLITE_ONLY
def test_pragmas(site: Site) -> None:
    with site.engine.connect() as conn:
        wanted = {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1}
        assert {name: conn.exec_driver_sql(f"PRAGMA {name}").scalar_one() for name in wanted} == wanted


@pytest.mark.slow
def test_migrate_again_and_from_two_processes(tmp_path: Path) -> None:
    Home.open(tmp_path / "data", create=True)
    settings = Settings.load(tmp_path / "data", environ={})
    code = "import sys; from registry.settings import Settings; from registry.wiring import migrate; migrate(Settings.load(sys.argv[1]))"
    both = [subprocess.Popen([sys.executable, "-c", code, str(settings.data)], cwd="/") for _ in range(2)]
    assert [p.wait(60) for p in both] == [0, 0]
    migrate(settings)


def test_no_data_directory(tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        open_site(Settings.load(tmp_path / "none", environ={}))
    with pytest.raises(Invalid):
        Settings.load(environ={})
    with pytest.raises(Invalid):
        Settings.load(tmp_path, environ={"AIRLOCK_PORT": "x"})


def test_the_library_refuses_an_undecided_call(site: Site) -> None:
    undecided = call_of(site, make_key(site, "acme"))
    for use in (
        lambda: site.library.resolve(undecided, "acme/x", "1"),
        lambda: site.library.upload(undecided, "acme/x"),
        lambda: site.library.list(undecided),
    ):
        with pytest.raises(Denied):
            use()


def test_push_resolve_and_read(site: Site) -> None:
    call = local_call(time.time())
    key = call_of(site, make_key(site, "acme"))
    pushed = push_model(site, key, "acme/tiny", "1")
    assert site.library.resolve(call, "acme/tiny", "1").digest == pushed.model.digest
    assert site.library.resolve(call, "acme/tiny", pushed.model.digest).digest == pushed.model.digest
    raw = bytes_of(site.library.read(call, "acme/tiny", pushed.model.digest))
    assert m.digest_of(raw) == pushed.model.digest
    for path, body in pushed.files.items():
        revision, file = site.library.file(call, "acme/tiny", "1", path)
        assert revision.digest == pushed.model.digest and file.size == len(body)
        assert bytes_of(site.library.read(call, "acme/tiny", file.digest)) == body
        assert file.git_oid == hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()
    assert bytes_of(site.library.read(call, "acme/tiny", file.digest, 1, 3)) == body[1:3]
    with pytest.raises(RangeInvalid):
        site.library.read(call, "acme/tiny", file.digest, len(body) + 1)
    found = site.catalog.repository("acme/tiny")
    assert found is not None and (found.kind, found.subject.org, found.subject.visibility) == ("model", "acme", "org")
    assert (beside := site.catalog.repository("acme/tiny/profiles")) is not None and beside.kind == "profiles"


def test_lfs_files_are_known_by_their_pointer(site: Site) -> None:
    key = call_of(site, make_key(site, "acme"))
    push_model(site, key, "acme/tiny", "1", {"model.safetensors": b"x" * 1000}, lfs=("model.safetensors",))
    _, file = site.library.file(local_call(0), "acme/tiny", "1", "model.safetensors")
    pointer = f"version https://git-lfs.github.com/spec/v1\noid {file.digest}\nsize 1000\n".encode()
    assert file.lfs and file.git_oid == lfs_pointer_oid(file.digest, 1000) == hashlib.sha1(b"blob %d\0" % len(pointer) + pointer).hexdigest()


@pytest.mark.slow
def test_revisions_by_version_commit_and_main(site: Site) -> None:
    key = call_of(site, make_key(site, "acme"))
    first = push_model(site, key, "acme/tiny", "1")
    later = Call(key.principal, None, "r", key.now + 5)
    second = push_model(site, later, "acme/tiny", "2")
    call = local_call(time.time())
    one, two = (site.library.revision(call, "acme/tiny", ref) for ref in ("1", "2"))
    assert (one.digest, two.digest) == (first.model.digest, second.model.digest) and one.commit != two.commit
    assert site.library.revision(call, "acme/tiny", one.commit).digest == one.digest
    assert site.library.revision(call, "acme/tiny", "main").digest == two.digest
    assert site.library.refs(call, "acme/tiny").items == ("1", "2")
    with pytest.raises(NotFound) as caught:
        site.library.revision(call, "acme/tiny", "3")
    assert caught.value.reason == "revision"
    with pytest.raises(NotFound) as caught:
        site.library.file(call, "acme/tiny", "1", "absent")
    assert caught.value.reason == "entry"
    with pytest.raises(NotFound) as caught:
        site.library.revision(call, "acme/none", "1")
    assert caught.value.reason == "repo"


def test_pages_of_files_are_in_byte_order(site: Site) -> None:
    key = call_of(site, make_key(site, "acme"))
    names = ["a.txt", "a/b.txt", "a/c.txt", "ab.txt", "Z.txt", "é.txt", "a_b.txt", "a%b.txt"]
    push_model(site, key, "acme/tiny", "1", {n: n.encode() for n in names})
    call, seen, after = local_call(0), [], ""
    while True:
        _, page = site.library.files(call, "acme/tiny", "1", "", after, 3)
        seen += [f.path for f in page.items if isinstance(f, File)]
        after = page.after
        if not after:
            break
    assert seen == sorted(names, key=str.encode)
    _, page = site.library.files(call, "acme/tiny", "1", "a/")
    assert [f.path for f in page.items if isinstance(f, File)] == ["a/b.txt", "a/c.txt"]


def test_a_missing_child_refuses_everything(site: Site) -> None:
    call = call_of(site, make_key(site, "acme"))
    raw = image(site, call, "acme/one", b"layer")
    before = [rows(site, table) for table in (t.manifest, t.edge, t.ref, t.repository)]
    with pytest.raises(NotFound) as caught:
        site.guard.push(call, "acme/two", raw, m.MANIFEST, refs=["1"])  # the blobs are in another repository
    assert caught.value.reason == "manifest_blob"
    assert [rows(site, table) for table in (t.manifest, t.edge, t.ref, t.repository)] == before
    index = m.canonical_json({"schemaVersion": 2, "mediaType": m.INDEX, "manifests": [Descriptor(m.MANIFEST, m.digest_of(raw), len(raw)).as_json()]})
    with pytest.raises(NotFound):
        site.guard.push(call, "acme/one", index, m.INDEX, refs=["1"])
    child = site.guard.push(call, "acme/one", raw, m.MANIFEST)
    assert site.guard.push(call, "acme/one", index, m.INDEX, refs=["1"]).digest == m.digest_of(index)
    assert site.guard.resolve(call, "acme/one", child.digest).size == len(raw)


def test_stated_digest_and_type_must_fit(site: Site) -> None:
    call = call_of(site, make_key(site, "acme"))
    raw = image(site, call, "acme/one", b"layer")
    with pytest.raises(Mismatch):
        site.guard.push(call, "acme/one", raw, m.MANIFEST, expect=m.digest_of(b"other"))
    with pytest.raises(Invalid):
        site.guard.push(call, "acme/one", raw, m.DOCKER_MANIFEST)
    for bad in (b"", b"[]", b"{", b'{"schemaVersion":1}', b"\xff", b'{"a":1,"a":2}'):
        with pytest.raises(Invalid):
            site.guard.push(call, "acme/one", bad, m.MANIFEST)
    head = b'{"schemaVersion":2,"config":{"mediaType":"x","digest":"' + m.EMPTY_DIGEST.encode()
    rest = b'","size":2},"layers":[],'
    texts = (b'"artifactType":"\\ud800"}', b'"artifactType":"a\\u0000b"}', b'"annotations":{"org.opencontainers.image.title":"\\u0000"}}')
    for bad in (*(head + rest + text for text in texts), head + b'","size":' + b"9" * 30 + b'},"layers":[]}'):
        with pytest.raises(Invalid):
            site.guard.push(call, "acme/one", bad, m.MANIFEST)
    with pytest.raises(Invalid) as caught:
        site.guard.push(call, "acme/one", raw.replace(b'"size":5', b'"size":6'), m.MANIFEST)
    assert "states 6 bytes" in str(caught.value)
    with pytest.raises(TooLarge):
        site.guard.push(call, "acme/one", b"{" + b" " * m.MAX_MANIFEST_BYTES, m.MANIFEST)
    with pytest.raises(Mismatch):
        site.guard.push(call, "acme/one", raw, m.MANIFEST, expect="sha512:" + "a" * 128)
    for ref in ("", "a\nb", "x" * 256, m.digest_of(raw)):
        with pytest.raises(Invalid):
            site.guard.push(call, "acme/one", raw, m.MANIFEST, refs=[ref])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["v2/x", "api/x", "airlock/x", "Acme/x", "acme//x", "acme/../x", "acme/x/", "", "a" * 256])
def test_names_that_are_refused(site: Site, name: str) -> None:
    call = local_call(0)
    with pytest.raises(Invalid):
        site.library.upload(call, name)


def test_one_name_at_the_hub_door(site: Site) -> None:
    with site.catalog.writing() as conn:
        c.ensure_repository(conn, "hf/acme/x", visibility="public")
        with pytest.raises(Conflict):
            c.ensure_repository(conn, "acme/x")


def test_a_signature_that_comes_first_does_not_name_the_kind(site: Site) -> None:
    call = call_of(site, make_key(site, "acme"))
    site.guard.push(call, "acme/tiny/profiles", image(site, call, "acme/tiny/profiles", b"sig", kind=c.IMAGE_CONFIGS[0]), m.MANIFEST, refs=["sig"])
    push_model(site, call, "acme/tiny", "1")
    site.guard.push(call, "acme/tiny", image(site, call, "acme/tiny", b"sbom"), m.MANIFEST)
    assert [r.kind for r in site.catalog.repositories("", "", 10, "acme")] == ["model", "profiles"]


def test_referrers(site: Site) -> None:
    call = call_of(site, make_key(site, "acme"))
    subject = site.guard.push(call, "acme/one", image(site, call, "acme/one", b"layer"), m.MANIFEST, refs=["1"])
    kinds = ["application/x-sig", "application/x-sbom"]
    for kind in kinds:
        raw = image(site, call, "acme/one", kind.encode(), subject=Descriptor(m.MANIFEST, subject.digest, subject.size), kind=kind)
        site.guard.push(call, "acme/one", raw, m.MANIFEST)
    found = [d for d in site.guard.referrers(call, "acme/one", subject.digest).items if isinstance(d, Descriptor)]
    assert {d.artifact_type for d in found} == set(kinds) and all(d.annotations == {"n": "1"} for d in found)
    assert len(site.guard.referrers(call, "acme/one", subject.digest, kinds[0]).items) == 1
    assert site.guard.referrers(call, "acme/one", m.digest_of(b"none")).items == ()


def test_delete(site: Site) -> None:
    call = call_of(site, make_key(site, "acme"))
    pushed = push_model(site, call, "acme/tiny", "1")
    _, file = site.guard.file(call, "acme/tiny", "1", "config.json")
    with pytest.raises(Conflict):
        site.guard.delete(call, "acme/tiny", file.digest)
    site.guard.delete(call, "acme/tiny", "1")
    with pytest.raises(NotFound):
        site.guard.resolve(call, "acme/tiny", "1")
    assert site.guard.resolve(call, "acme/tiny", pushed.model.digest).digest == pushed.model.digest
    with pytest.raises(Conflict, match="a profile in acme/tiny/profiles"):
        site.guard.delete(call, "acme/tiny", pushed.model.digest)
    site.guard.delete(call, "acme/tiny/profiles", pushed.profiles.digest)
    site.guard.delete(call, "acme/tiny", pushed.model.digest)
    site.guard.delete(call, "acme/tiny", file.digest)
    for digest in (pushed.model.digest, file.digest):
        with pytest.raises(NotFound):
            site.guard.read(call, "acme/tiny", digest)
        with pytest.raises(NotFound):
            site.guard.delete(call, "acme/tiny", digest)
    with site.catalog.reading() as conn:
        assert conn.execute(select(t.blob.c.gc_after).where(t.blob.c.digest == file.digest)).scalar_one() is not None


def test_immutable_refs_stay(site: Site) -> None:
    call = call_of(site, make_key(site, "acme"))
    raw = image(site, call, "acme/one", b"layer")
    site.guard.push(call, "acme/one", raw, m.MANIFEST, refs=["1"])
    with site.catalog.writing() as conn:
        conn.execute(t.repository.update().values(immutable=True))
    site.guard.push(call, "acme/one", raw, m.MANIFEST, refs=["1"])
    with pytest.raises(Conflict):
        site.guard.push(call, "acme/one", image(site, call, "acme/one", b"other"), m.MANIFEST, refs=["1"])


def test_upload_resumes_after_a_restart(site: Site) -> None:
    key = make_key(site, "acme")
    raw = os.urandom(100_001)
    upload = site.guard.upload(call_of(site, key), "acme/one")
    upload.write(raw[:33])
    upload.suspend()
    upload_id = upload.id
    with open_site(site.settings, background=False) as again:
        for lo, hi in ((33, 70_000), (70_000, len(raw))):
            upload = again.guard.resume(call_of(again, key), "acme/one", upload_id)
            assert upload.offset == lo
            upload.write(raw[lo:hi])
            upload.suspend()
        upload = again.guard.resume(call_of(again, key), "acme/one", upload_id)
        assert upload.commit(m.digest_of(raw), len(raw)).size == len(raw)
        with pytest.raises(NotFound):
            again.guard.resume(call_of(again, key), "acme/one", upload_id)
    assert bytes_of(site.guard.read(call_of(site, key), "acme/one", m.digest_of(raw))) == raw


def test_an_upload_belongs_to_its_key_and_repository(site: Site) -> None:
    upload = site.guard.upload(call_of(site, make_key(site, "acme")), "acme/one")
    upload.write(b"abc")
    upload.suspend()
    other = call_of(site, make_key(site, "acme"))
    for call, repo, upload_id in ((other, "acme/one", upload.id), (other, "acme/two", upload.id), (other, "acme/one", "nothing-00")):
        with pytest.raises(NotFound):
            site.guard.resume(call, repo, upload_id)


def test_take_over_of_an_upload(site: Site) -> None:
    call = call_of(site, make_key(site, "acme"))
    first = site.guard.upload(call, "acme/one")
    first.write(b"abc")
    second = site.guard.resume(call, "acme/one", first.id)
    with pytest.raises(Conflict):
        second.write(b"x")  # the first request is still writing
    first.suspend()
    with pytest.raises(RangeInvalid):
        second.write(b"x")  # it read offset 0, which is history
    third = site.guard.resume(call, "acme/one", first.id)
    third.write(b"def")
    assert third.commit(m.digest_of(b"abcdef"), 6).size == 6


def test_an_upload_of_which_the_bytes_are_gone_is_unknown(site: Site) -> None:
    call = call_of(site, make_key(site, "acme"))
    upload = site.guard.upload(call, "acme/one")
    upload.write(b"abc")
    upload.suspend()
    site.blobs.discard(upload.id)
    again = site.guard.resume(call, "acme/one", upload.id)
    with pytest.raises(NotFound) as caught:
        again.commit(m.digest_of(b"abc"))
    assert caught.value.reason == "upload" and rows(site, t.upload) == 0


@pytest.mark.slow
def test_text_that_no_database_holds(site: Site) -> None:
    call = call_of(site, make_key(site, "acme"))
    push_model(site, call, "acme/tiny", "1")
    for bad in ("\ud800", "a\0b"):
        for use in (lambda b=bad: site.guard.resolve(call, "acme/tiny", b), lambda b=bad: site.guard.resolve(call, b, "1")):
            with pytest.raises(NotFound):
                use()
        with pytest.raises(NotFound):
            site.guard.file(call, "acme/tiny", "1", bad)


@SQLITE_ONLY
def test_a_damaged_database_is_unavailable(site: Site) -> None:
    site.close()
    (site.settings.data / "registry.db").write_bytes(b"not a database, but long enough to be read as one" * 100)
    for path in site.settings.data.glob("registry.db-*"):
        path.unlink()
    with pytest.raises(Unavailable) as caught:
        open_site(site.settings)
    assert caught.value.do == "restore it from the backup" and caught.value.reason == "damaged"


@SQLITE_ONLY
def test_a_full_disk_is_told_with_the_free_bytes(site: Site) -> None:
    with pytest.raises(Unavailable, match=r"its disk has \d+ bytes free") as caught, site.catalog.writing() as conn:
        conn.exec_driver_sql("PRAGMA max_page_count=1")  # as SQLite has it: no page beyond those that are there
        conn.execute(t.audit_pending.insert().values(**{"class": "a", "ts": 0, "body": "x" * 10_000_000}))
    assert caught.value.reason == "disk_full" and caught.value.do == "free space, then the same command again"


def test_failed_and_cancelled_uploads_leave_nothing(site: Site) -> None:
    call = call_of(site, make_key(site, "acme"))
    upload = site.guard.upload(call, "acme/one")
    upload.write(b"abc")
    with pytest.raises(Mismatch):
        upload.commit(m.digest_of(b"abd"))
    upload = site.guard.upload(call, "acme/one")
    upload.write(b"abc")
    with pytest.raises(Mismatch):
        upload.commit(m.digest_of(b"abc"), 4)
    upload = site.guard.upload(call, "acme/one")
    upload.write(b"abc")
    upload.suspend()
    upload.cancel()
    site.guard.upload(call, "acme/one").cancel()
    with pytest.raises(Unsupported):
        site.guard.upload(call, "acme/one", algorithm="md5")
    assert rows(site, t.upload) == rows(site, t.blob) == 0
    assert list((site.settings.data / "partial").iterdir()) == []


def test_uploads_that_nobody_continues_are_swept(site: Site) -> None:
    call = call_of(site, make_key(site, "acme"))
    kept, left = site.guard.upload(call, "acme/one"), site.guard.upload(call, "acme/one")
    for upload in (kept, left):
        upload.write(b"abc")
    left.suspend()
    assert site.library.sweep_uploads(call.now + 6 * 86400) == 0
    assert site.library.sweep_uploads(call.now + 8 * 86400) == 1  # the other one is being written
    assert rows(site, t.upload) == 1
    assert kept.commit(m.digest_of(b"abc")).size == 3
    assert list((site.settings.data / "partial").iterdir()) == []


def test_two_pushes_of_one_digest_are_one_object(site: Site) -> None:
    raw = os.urandom(200_000)
    calls = [call_of(site, make_key(site, org)) for org in ("acme", "beta")]
    threads = [threading.Thread(target=put, args=(site, call, f"{call.principal.org}/x", raw)) for call in calls for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(list(site.blobs.walk())) == 1 and rows(site, t.blob) == 1 and rows(site, t.repo_blob) == 2


def test_empty_blob(site: Site) -> None:
    call = call_of(site, make_key(site, "acme"))
    found = put(site, call, "acme/one", b"")
    assert found.size == 0 and bytes_of(site.guard.read(call, "acme/one", found.digest)) == b""


def test_repositories_without_a_manifest_are_not_listed(site: Site) -> None:
    call = call_of(site, make_key(site, "acme"))
    put(site, call, "acme/one", b"x")
    assert site.guard.list(call).items == ()
    push_model(site, call, "acme/tiny", "1")
    assert site.guard.list(call).items == ("acme/tiny", "acme/tiny/profiles")


def test_the_catalog_of_a_repository_is_json(site: Site) -> None:
    key = call_of(site, make_key(site, "acme"))
    pushed = push_model(site, key, "acme/tiny", "1")
    shown = json.loads(json.dumps(site.guard.catalog_show(key, "acme/tiny")))
    assert pushed.model.digest in json.dumps(shown)
    found = site.catalog.repository("acme/tiny")
    assert found is not None
    only = json.loads(json.dumps(site.catalog.details(found.id)))
    assert [(r["ref"], r["files"], r["bytes"]) for r in only] == [("1", 3, sum(map(len, pushed.files.values())))]


@pytest.mark.slow
def test_ten_thousand_files(site: Site) -> None:
    call = call_of(site, make_key(site, "acme"))
    put(site, call, "acme/big", m.EMPTY_BYTES)
    blob, facts = put(site, call, "acme/big", b"x"), put(site, call, "acme/big", b'{"schema":1}')
    listed = [File(f"f{i:05}", blob.digest, 1) for i in range(10_000)]
    raw = m.build_model(listed, Descriptor(m.FACTS_TYPE, facts.digest, facts.size), {})
    site.guard.push(call, "acme/big", raw, m.MANIFEST, refs=["1"])
    _, page = site.guard.files(call, "acme/big", "1", "", "f09997")
    assert [f.path for f in page.items if isinstance(f, File)] == ["f09998", "f09999"]
