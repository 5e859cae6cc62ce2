"""Commits of a model's files: what they make, what they repeat, whom they refuse, and that two at once both count."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import select

from artifact import manifest as m
from artifact.errors import Conflict, Denied, Invalid, NotFound, TooLarge, Unauthenticated
from artifact.store import Call, Change, Descriptor, File
from registry import tables as t
from registry.revising import revised, title_of
from registry.wiring import Site
from tests.site import BACKENDS, call_of, make_key, put, running_site

R = "acme/m"


@pytest.fixture(params=BACKENDS)
def site(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Site]:
    with running_site(tmp_path, request.param) as opened:
        yield opened


@pytest.fixture
def call(site: Site) -> Call:
    return call_of(site, make_key(site, "acme"))


def change(site: Site, call: Call, path: str, raw: bytes, lfs: bool = False) -> Change:
    return Change(path, put(site, call, R, raw).digest, len(raw), lfs)


def paths(site: Site, call: Call, ref: str = "main") -> list[str]:
    return [f.path for f in site.guard.files(call, R, ref)[1].items if isinstance(f, File)]


def rows(site: Site) -> list[dict[str, object]]:
    with site.catalog.reading() as conn:
        return [json.loads(body) for body in conn.execute(select(t.audit_pending.c.body).order_by(t.audit_pending.c.id)).scalars()]


def test_a_commit_is_a_model_revision_like_any_other(site: Site, call: Call) -> None:
    weights, card = os.urandom(3000), b"---\nlicense: mit\ntags: [a, b]\n---\n# hi"
    changes = [change(site, call, "w.safetensors", weights, True), change(site, call, "README.md", card), change(site, call, "sub/x.txt", b"x")]
    first = site.guard.commit(call, R, "main", None, changes, "first\nand more")
    raw = site.guard.read(call, R, first.digest).data
    assert raw is not None
    facts = m.canonical_json(
        {"schema": 1, "source": f"push://{R}", "license": "mit", "card": {"license": "mit", "tags": ["a", "b"]}, "tags": ["a", "b"]}
    )
    files = [File(c.path, c.digest, c.size or 0, c.lfs) for c in changes]
    commit = m.derived_commit("", m.files_root(files), "first", "")
    notes = {m.SOURCE: f"push://{R}", m.COMMIT: commit, m.TITLE: "first"}
    assert raw == m.build_model(files, m.Descriptor(m.FACTS_TYPE, m.digest_of(facts), len(facts)), notes) and first.commit == commit
    second = site.guard.commit(call, R, "main", first.commit, [Change("sub/x.txt"), change(site, call, "y.txt", b"y")])
    assert paths(site, call) == ["README.md", "w.safetensors", "y.txt"] and paths(site, call, first.commit) == [
        "README.md",
        "sub/x.txt",
        "w.safetensors",
    ]
    assert m.parse_manifest(site.guard.read(call, R, second.digest).data or b"").annotations[m.PARENT] == first.commit
    assert site.guard.resolve(call, R, "main").digest == second.digest  # what the OCI door serves
    repo = site.catalog.repository(R)
    assert repo is not None and [c for c, _, _ in site.guard.revisions.history(call, R, second, 9)] == [second.commit, first.commit]
    pushed = [row for row in rows(site) if row["event"] == "push" and row.get("refs") == ["main"]]
    assert [row["commit"] for row in pushed] == [first.commit, second.commit]


def test_what_changes_nothing_and_what_came_before_is_no_new_commit(site: Site, call: Call) -> None:
    one, two = change(site, call, "a.txt", b"a"), change(site, call, "b.txt", b"b")
    first = site.guard.commit(call, R, "main", None, [one, two], "one")
    assert site.guard.commit(call, R, "main", None, [one, two], "again").commit == first.commit
    second = site.guard.commit(call, R, "main", first.commit, [Change("a.txt")], "less")
    assert site.guard.commit(call, R, "main", first.commit, [Change("a.txt")], "less").commit == second.commit
    assert site.guard.commit(call, R, "main", None, [Change("a.txt")], "less").commit == second.commit
    with pytest.raises(NotFound) as absent:
        site.guard.commit(call, R, "main", second.commit, [Change("a.txt")], "other words")
    assert absent.value.reason == "entry"
    with pytest.raises(Conflict) as moved:
        site.guard.commit(call, R, "main", first.commit, [Change("b.txt")], "less")
    assert moved.value.reason == "moved"
    assert [c for c, _, _ in site.guard.revisions.history(call, R, second, 9)] == [second.commit, first.commit]


@pytest.mark.slow
def test_of_commits_at_once_none_is_lost(site: Site, call: Call) -> None:
    site.guard.commit(call, R, "main", None, [change(site, call, "a.txt", b"a")])
    changes = [change(site, call, f"{n}.txt", f"{n}".encode()) for n in range(4)]
    failed: list[Exception] = []

    def work(one: Change) -> None:
        for _ in range(20):  # of four at once on one branch a slow one may be told to look again
            try:
                site.guard.commit(call, R, "main", None, [one], one.path)
                return
            except Conflict as error:
                failed.append(error)
        raise AssertionError(failed)

    threads = [threading.Thread(target=work, args=(one,)) for one in changes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert paths(site, call) == ["0.txt", "1.txt", "2.txt", "3.txt", "a.txt"] and {e.reason for e in failed if isinstance(e, Conflict)} <= {"moved"}
    head = site.guard.revision(call, R, "main")
    assert len(site.guard.revisions.history(call, R, head, 99)) == 5


@pytest.mark.slow
def test_rules_of_a_push_hold_for_a_commit(site: Site, call: Call) -> None:
    one, two = change(site, call, "a.txt", b"a"), change(site, call, "b.txt", b"b")
    maker = call_of(site, make_key(site, "acme", actions=("create",)))
    first = site.guard.commit(maker, R, "main", None, [one])
    with pytest.raises(Denied) as exists:
        site.guard.commit(maker, R, "main", None, [two])
    assert exists.value.reason == "exists"
    with pytest.raises(Denied):
        site.guard.commit(call_of(site, make_key(site, "acme", actions=("pull",))), R, "main", None, [two])
    with site.catalog.writing() as conn:
        conn.execute(t.repository.update().values(immutable=True))
    with pytest.raises(Conflict) as fixed:
        site.guard.commit(call, R, "main", None, [two])
    assert fixed.value.reason == "immutable"
    with site.catalog.writing() as conn:
        conn.execute(t.repository.update().values(immutable=False))
        conn.execute(t.org.update().where(t.org.c.name == "acme").values(quota_bytes=10))
    with pytest.raises(Denied) as full:
        site.guard.commit(call, R, "main", None, [two])
    assert full.value.reason == "quota" and site.guard.revision(call, R, "main").commit == first.commit and paths(site, call) == ["a.txt"]


def test_what_a_commit_names_is_kept_as_a_ref_is(site: Site, call: Call) -> None:
    one, two = change(site, call, "a.txt", b"a"), change(site, call, "a.txt", b"other")
    first = site.guard.commit(call, R, "main", None, [one])
    facts = put(site, call, R, b"{}")

    def forged(commit: str) -> bytes:
        file = File("a.txt", two.digest, two.size or 0)
        return m.build_model([file], Descriptor(m.FACTS_TYPE, facts.digest, facts.size), {m.SOURCE: f"push://{R}", m.COMMIT: commit})

    maker = call_of(site, make_key(site, "acme", actions=("pull", "create")))
    with pytest.raises(Denied) as exists:
        site.guard.push(maker, R, forged(first.commit), m.MANIFEST, refs=["v2"])
    assert exists.value.reason == "exists"
    for who in (maker, call):  # a ref of that name would answer in the commit's place
        with pytest.raises(Conflict):
            site.guard.push(who, R, forged("ab" * 20), m.MANIFEST, refs=[first.commit])
    site.guard.push(call, R, forged("cd" * 20), m.MANIFEST, refs=["cd" * 20])
    with pytest.raises(Conflict):
        site.guard.revisions.point(call, R, "cd" * 20, "branch", first.commit, overwrite=True)
    with site.catalog.writing() as conn:
        conn.execute(t.repository.update().values(immutable=True))
    with pytest.raises(Conflict) as fixed:
        site.guard.push(call, R, forged(first.commit), m.MANIFEST)
    assert fixed.value.reason == "immutable" and site.guard.revision(call, R, first.commit).digest == first.digest
    with site.catalog.writing() as conn:
        conn.execute(t.repository.update().values(immutable=False))
    made = site.guard.push(call, R, forged(first.commit), m.MANIFEST)
    assert site.guard.revision(call, R, first.commit).digest == made.digest


def test_every_file_of_a_model_is_here(site: Site, call: Call) -> None:
    other = call_of(site, make_key(site, "other"))
    theirs = put(site, other, "other/m", b"theirs")
    facts = put(site, call, R, b"{}")
    layer = Descriptor("application/x.foreign.layer", theirs.digest, theirs.size, annotations={m.TITLE: "w.bin"})
    raw = m.build_manifest(m.MODEL_TYPE, [layer.as_json(), Descriptor(m.FACTS_TYPE, facts.digest, facts.size).as_json()], {})
    with pytest.raises(Invalid):
        site.guard.push(call, R, raw, m.MANIFEST, refs=["v1"])


def test_the_place_of_profiles_takes_no_commit(site: Site, call: Call) -> None:
    with pytest.raises(Invalid):
        site.guard.revisions.create(call, f"{R}/profiles", "profiles")
    with pytest.raises(Invalid):
        site.guard.commit(call, f"{R}/profiles", "main", None, [])
    assert site.catalog.repository(f"{R}/profiles") is None


def test_parts_that_begin_at_once_are_one_upload(site: Site, call: Call) -> None:
    change(site, call, "a.txt", b"a")
    found: list[str] = []
    start = threading.Barrier(4)

    def work() -> None:
        start.wait()
        found.append(site.guard.revisions.part(call, R, "0" * 64, 7).id)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4 and len(set(found)) == 1


def test_only_a_branch_takes_commits(site: Site, call: Call) -> None:
    one, two = change(site, call, "a.txt", b"a"), change(site, call, "b.txt", b"b")
    for absent in ("dev", "0" * 40):
        with pytest.raises(NotFound) as none:
            site.guard.commit(call, R, absent, None, [one])
        assert none.value.reason == "revision"
    first = site.guard.commit(call, R, "main", None, [one])
    site.guard.revisions.point(call, R, "v1", "tag", "main")
    site.guard.revisions.point(call, R, "dev", "branch", first.commit)
    for wrong in ("v1", first.commit):
        with pytest.raises(Invalid):
            site.guard.commit(call, R, wrong, None, [two])
    site.guard.commit(call, R, "dev", first.commit, [two])
    assert paths(site, call) == ["a.txt"] and paths(site, call, "dev") == ["a.txt", "b.txt"] and paths(site, call, "v1") == ["a.txt"]
    assert [(ref, kind) for ref, kind, _ in site.guard.revisions.refs(call, R)] == [("dev", "branch"), ("main", "branch"), ("v1", "tag")]
    with pytest.raises(Conflict):
        site.guard.revisions.point(call, R, "dev", "branch", "main")
    site.guard.revisions.point(call, R, "dev", "branch", "main", overwrite=True)
    assert paths(site, call, "dev") == ["a.txt"]
    with pytest.raises(NotFound) as missing:
        site.guard.commit(call, R, "main", None, [Change("c.txt", m.digest_of(b"never pushed"), 3)])
    assert missing.value.reason == "manifest_blob"
    with pytest.raises(Invalid):
        site.guard.commit(call, R, "main", None, [Change("c.txt", one.digest, 3)])


def test_a_version_pushed_by_oci_goes_on_by_commits(site: Site, call: Call) -> None:
    """What has no branch `main` is its newest revision there; the first commit makes the branch."""
    facts = put(site, call, R, m.canonical_json({"schema": 1}))
    listed = [File("a.txt", put(site, call, R, b"a").digest, 1)]
    put(site, call, R, m.EMPTY_BYTES)
    site.guard.push(call, R, m.build_model(listed, facts.__class__(m.FACTS_TYPE, facts.digest, facts.size), {}), m.MANIFEST, refs=["1"])
    before = site.guard.revision(call, R, "main")
    after = site.guard.commit(call, R, "main", before.commit, [change(site, call, "b.txt", b"b")])
    assert paths(site, call) == ["a.txt", "b.txt"] and paths(site, call, "1") == ["a.txt"]
    assert [c for c, _, _ in site.guard.revisions.history(call, R, after, 9)] == [after.commit, before.commit]


def test_a_new_repository_and_who_may_make_one(site: Site, call: Call) -> None:
    made = site.guard.revisions.create(call, "acme/new", "Acme/New")
    assert made is not None and (made.display, made.name) == ("Acme/New", "acme/new") and site.guard.files(call, "acme/new", "main")[1].items == ()
    with pytest.raises(Conflict) as exists:
        site.guard.revisions.create(call, "acme/new", "acme/new")
    assert exists.value.reason == "exists"
    maker = call_of(site, make_key(site, "acme", "acme/*", actions=("create",)))
    assert site.guard.revisions.create(maker, "acme/other", "acme/other") is None
    with pytest.raises(Denied):
        site.guard.revisions.create(call_of(site, make_key(site, "acme", actions=("pull",))), "acme/third", "acme/third")
    with pytest.raises((NotFound, Denied)):
        site.guard.revisions.create(call, "nobody/x", "nobody/x")


@pytest.mark.slow
def test_a_manifest_above_four_mebibytes_is_refused_by_that_name(site: Site, call: Call) -> None:
    blob = put(site, call, R, b"same").digest
    changes = [Change(f"{'x' * 400}/{n}", blob, 4) for n in range(5000)]
    with pytest.raises(TooLarge, match="the manifest has") as refused:
        site.guard.commit(call, R, "main", None, changes)
    assert refused.value.reason == "files" and "4194304" in refused.value.expected


def test_an_upload_url_is_of_one_object_and_one_living_key(site: Site, call: Call) -> None:
    oid = "a" * 64
    text = site.guard.revisions.upload_url(call, R, oid, 7)
    held, name, known, size = site.guard.revisions.bearer(text, "r")
    assert (name, known, size, held.principal.key_id) == (R, oid, 7, call.principal.key_id)
    put(site, held, R, b"by the url")
    with pytest.raises(Unauthenticated):
        put(site, held, "acme/other", b"elsewhere")  # the key may, its URL does not
    for wrong in ("", "x", text[:-1] + ("A" if text[-1] != "A" else "B"), text.replace("upl1.", "alt1."), text + "é"):
        with pytest.raises(Unauthenticated):
            site.guard.revisions.bearer(wrong, "r")
    with site.catalog.writing() as conn:
        conn.execute(t.api_key.update().where(t.api_key.c.key_id == call.principal.key_id).values(revoked_at=time.time() - 1))
    with pytest.raises(Unauthenticated) as revoked:
        site.guard.revisions.bearer(text, "r")
    assert revoked.value.reason == "key_revoked"
    site.audit.flush()
    assert {row["reason"] for row in rows(site) if row.get("event") == "login"} == {"ticket_invalid", "key_revoked"}


# ---- pure


def files(*names: str) -> list[File]:
    return [File(name, m.EMPTY_DIGEST, 2) for name in names]


def test_removals_come_first_and_folders_take_all_below() -> None:
    held = files("a/b/c.txt", "a/d.txt", "ab.txt", "z.txt")
    after = revised(held, [Change("a/"), Change("z.txt"), Change("a/new.txt", m.EMPTY_DIGEST, 2)])
    assert [f.path for f in after] == ["a/new.txt", "ab.txt"]
    for gone in ("nothing.txt", "nothing/", "a", "ab.txt/"):
        with pytest.raises(NotFound):
            revised(held, [Change(gone)])


@pytest.mark.parametrize("path", ["../x", "/x", "a//b", "a/./b", ".git/config", "a\\b", "a\x00b", "", "a/", "x" * 2000, "\udcff"])
def test_hostile_paths_are_refused(path: str) -> None:
    with pytest.raises((Invalid, NotFound)):
        revised([], [Change(path, m.EMPTY_DIGEST, 2)])


@pytest.mark.parametrize(("one", "two"), [("a", "a/b"), ("A", "a/b"), ("a/B/c", "a/b"), ("x/y/z", "x/Y")])
def test_a_file_is_no_folder(one: str, two: str) -> None:
    with pytest.raises(Invalid, match="a file and a folder"):
        revised(files(one), [Change(two, m.EMPTY_DIGEST, 2)])


def test_ten_thousand_files_and_not_one_more() -> None:
    held = files(*(f"{n}.txt" for n in range(m.MAX_FILES)))
    assert len(revised(held, [])) == 10_000
    with pytest.raises(TooLarge, match="10001 files"):
        revised(held, [Change("more.txt", m.EMPTY_DIGEST, 2)])
    assert len(revised(held, [Change("0.txt"), Change("more.txt", m.EMPTY_DIGEST, 2)])) == 10_000


def test_titles_are_one_bounded_printable_line() -> None:
    assert title_of("\n  a\tb \nc") == "a b" and title_of("x" * 999) == "x" * 200 and title_of("") == ""
