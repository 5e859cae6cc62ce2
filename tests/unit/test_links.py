"""Leases, generations, aliases, quotas, tag history, immutable and conditional refs: what uploads and pushes leave in the tables and in the store."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from sqlalchemy import select

from artifact import manifest as m
from artifact import trust
from artifact.errors import AirlockError, Conflict, Denied, Invalid, Mismatch, NotFound, Unavailable
from artifact.grant import Grant
from artifact.store import Call, Descriptor
from registry import catalog as c
from registry import tables as t
from registry.blobs.file import location_of
from registry.library import MAX_REFERRERS, local_call, pieces_of
from registry.uploads import Uploads
from registry.wiring import Site
from tests.site import BACKENDS, call_of, make_key, put, running_site

R = "acme/app"
LEASE_S = 86400
SIG = "sha256-" + "ab" * 32 + ".sig"


@pytest.fixture(params=BACKENDS)
def site(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Site]:
    with running_site(tmp_path, request.param) as opened:
        yield opened


@pytest.fixture
def call(site: Site) -> Call:
    return call_of(site, make_key(site, "acme"))


def at(call: Call, seconds: float) -> Call:
    return Call(call.principal, None, call.request_id, call.now + seconds)


def sha512(raw: bytes) -> str:
    return "sha512:" + hashlib.sha512(raw).hexdigest()


def all_rows(site: Site, table: object) -> list[dict[str, object]]:
    with site.catalog.reading() as conn:
        return [dict(row) for row in conn.execute(select(table)).mappings()]  # type: ignore[call-overload]


def blob(site: Site, digest: str) -> dict[str, object]:
    return next(row for row in all_rows(site, t.blob) if row["digest"] == digest)


def objects(site: Site) -> list[str]:
    return [location for location, _ in site.library.blobs.walk()]


def image(site: Site, call: Call, ref: str, layer: bytes = b"layer", repo: str = R, **extra: object) -> Descriptor:
    put(site, call, repo, m.EMPTY_BYTES)
    found = put(site, call, repo, layer)
    subject = extra.get("subject")
    raw = m.build_manifest("application/x-test", [found.as_json()], {"n": str(extra.get("n", 1))}, subject)  # type: ignore[arg-type]
    return site.guard.push(call, repo, raw, m.MANIFEST, refs=[ref] if ref else [])


# ---- leases


def test_an_upload_and_a_mount_lease_the_blob(site: Site, call: Call) -> None:
    digest = put(site, call, R, b"leased").digest
    row, until = blob(site, digest), call.now + LEASE_S
    assert row["lease_until"] == row["gc_after"] == until
    assert [x["lease_until"] for x in all_rows(site, t.repo_blob)] == [until]
    assert site.guard.mount(at(call, 100), "acme/second", digest, R) is not None
    row = blob(site, digest)
    assert row["lease_until"] == row["gc_after"] == until + 100
    assert sorted(x["lease_until"] for x in all_rows(site, t.repo_blob)) == [until, until + 100]  # type: ignore[type-var]
    put(site, at(call, 50), R, b"leased")
    assert blob(site, digest)["lease_until"] == until + 100, "a lease never gets shorter"


def test_a_head_leases_again_only_for_who_may_push_and_when_half_is_over(site: Site, call: Call) -> None:
    digest = put(site, call, R, b"headed").digest
    reader = call_of(site, make_key(site, "acme", R, actions=("pull",)))
    site.guard.stat(at(call, LEASE_S * 0.4), R, digest)
    site.guard.stat(at(reader, LEASE_S * 0.9), R, digest)
    assert blob(site, digest)["lease_until"] == call.now + LEASE_S
    site.guard.stat(at(call, LEASE_S * 0.6), R, digest)
    row = blob(site, digest)
    assert row["lease_until"] == row["gc_after"] == call.now + LEASE_S * 1.6
    assert [x["lease_until"] for x in all_rows(site, t.repo_blob)] == [call.now + LEASE_S * 1.6]


def test_a_head_of_what_the_sweep_took_is_a_404(site: Site, call: Call) -> None:
    digest = put(site, call, R, b"swept").digest
    found = site.catalog.find(R, digest)
    assert found is not None
    with site.catalog.writing() as conn:
        conn.execute(t.repo_blob.delete())
        conn.execute(t.blob.delete())
    assert site.library.lease(call, found) is False
    with pytest.raises(NotFound):
        site.guard.stat(call, R, digest)


@pytest.mark.slow
def test_a_manifest_without_links_is_a_candidate_and_one_pushed_again_is_not(site: Site, call: Call) -> None:
    first = image(site, call, "a")
    image(site, call, "a", repo="acme/second")
    raw = b"".join(pieces_of(site.library.read(local_call(0), R, first.digest)))

    def waits() -> object:
        return {x["digest"]: x["gc_after"] for x in all_rows(site, t.manifest)}[first.digest]

    site.guard.delete(at(call, 5), R, first.digest)
    assert waits() is None, "the other repository links it"
    site.guard.delete(at(call, 6), "acme/second", first.digest)
    assert waits() == call.now + 6
    layer = m.digest_of(b"layer")
    assert blob(site, layer)["gc_after"] == call.now + 6
    site.guard.push(at(call, 7), R, raw, m.MANIFEST, refs=["a"])
    assert waits() is None


# ---- generations


def test_bytes_that_wait_for_their_removal_are_not_used_again(site: Site, call: Call) -> None:
    raw = os.urandom(10_000)
    digest = put(site, call, R, raw).digest
    for generation in (1, 2):
        with site.catalog.writing() as conn:  # what the sweep does with a blob that nobody names
            conn.execute(t.repo_blob.delete())
            conn.execute(t.blob.delete())
            c.add_garbage(conn, location_of(digest, generation - 1), len(raw), call.now + 60)
        put(site, call, R, raw)
        assert blob(site, digest)["location"] == location_of(digest, generation)
    for old in (0, 1):
        site.library.blobs.delete(location_of(digest, old))
    assert b"".join(pieces_of(site.library.read(local_call(0), R, digest))) == raw
    put(site, call, R, raw)
    assert objects(site) == [location_of(digest, 2)]


def test_a_sweep_between_publication_and_record_costs_a_copy_and_no_bytes(site: Site, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = os.urandom(10_000)
    digest = m.digest_of(raw)
    record = Uploads._record

    def swept(self: Uploads, *args: object) -> bool:
        monkeypatch.setattr(Uploads, "_record", record)
        with site.catalog.writing() as conn:
            c.add_garbage(conn, location_of(digest), len(raw), call.now + 60)
        return record(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(Uploads, "_record", swept)  # only to do the sweep's write at the worst moment
    put(site, call, R, raw)
    assert blob(site, digest)["location"] == location_of(digest, 1)
    site.library.blobs.delete(location_of(digest))
    assert b"".join(pieces_of(site.library.read(local_call(0), R, digest))) == raw
    assert not list((site.home.path / "partial").iterdir())


def test_two_uploads_of_one_digest_at_once_store_one_object(site: Site, call: Call) -> None:
    raw = os.urandom(200_000)
    uploads = [site.guard.upload(call, repo) for repo in (R, R, "acme/second", "acme/third")]
    errors: list[AirlockError] = []

    def run(index: int) -> None:
        try:
            uploads[index].write(raw)
            uploads[index].commit(m.digest_of(raw))
        except AirlockError as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(uploads))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert errors == [] and objects(site) == [location_of(m.digest_of(raw))]
    assert len(all_rows(site, t.repo_blob)) == 3 and all_rows(site, t.garbage) == []


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["gone", "short"])
@pytest.mark.parametrize("generation", [0, 1, 9])
def test_a_push_heals_a_blob_whose_bytes_are_gone(site: Site, call: Call, damage: str, generation: int) -> None:
    raw = os.urandom(10_000)
    digest = put(site, call, R, raw).digest
    path, place = site.home.path / "blobs" / location_of(digest), site.home.path / "blobs" / location_of(digest, generation)
    path.rename(place)
    with site.catalog.writing() as conn:
        conn.execute(t.blob.update().values(location=location_of(digest, generation)))
    put(site, call, "acme/second", raw)
    assert objects(site) == [location_of(digest, generation)], "bytes that are there are not stored again"
    place.unlink()
    if damage == "short":
        place.write_bytes(raw[:-1])
    put(site, call, "acme/third", raw)
    for repo in (R, "acme/second", "acme/third"):
        assert b"".join(pieces_of(site.guard.read(call, repo, digest))) == raw
    row = blob(site, digest)
    left = {str(garbage["location"]) for garbage in all_rows(site, t.garbage)}
    assert left == {location_of(digest, generation)} - {str(row["location"])}, "what is left at the old place is swept"
    for location in left:
        site.library.blobs.delete(location)
    assert objects(site) == [row["location"]] and b"".join(pieces_of(site.guard.read(call, R, digest))) == raw
    assert not list((site.home.path / "partial").iterdir())


def test_of_two_that_heal_a_blob_both_are_right(site: Site, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = os.urandom(10_000)
    digest = put(site, call, R, raw).digest
    (site.home.path / "blobs" / location_of(digest)).unlink()
    with site.catalog.writing() as conn:
        conn.execute(t.blob.update().values(location=location_of(digest, 9)))
    record = Uploads._record

    def second(self: Uploads, *args: object) -> bool:
        monkeypatch.setattr(Uploads, "_record", record)
        put(site, call, "acme/second", raw)
        return record(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(Uploads, "_record", second)  # only to let the other upload end between this one's publication and its record
    put(site, call, R, raw)
    assert objects(site) == [location_of(digest)] == [blob(site, digest)["location"]]
    assert [row["location"] for row in all_rows(site, t.garbage)] == [location_of(digest, 9)]


def test_a_refused_push_of_lost_bytes_leaves_them_to_the_sweep(site: Site, call: Call) -> None:
    raw = os.urandom(5_000)
    digest = put(site, call, R, raw).digest
    (site.home.path / "blobs" / location_of(digest)).unlink()
    upload = site.guard.upload(call, R)
    upload.write(raw)
    with pytest.raises(Mismatch):
        upload.commit(sha512(raw + b"x"))
    assert objects(site) == [blob(site, digest)["location"]], "a row names what is stored"


# ---- sha512


@pytest.mark.parametrize("announced", [True, False])
@pytest.mark.parametrize("parts", [1, 3])
def test_bytes_pushed_by_sha512_are_kept_once(site: Site, call: Call, announced: bool, parts: int) -> None:
    raw = os.urandom(30_001)
    upload = site.guard.upload(call, R, algorithm="sha512" if announced else "sha256")
    for part in range(parts):
        upload.write(raw[part * 10_001 :] if part == parts - 1 else raw[part * 10_001 : (part + 1) * 10_001])
        if part < parts - 1:
            upload.suspend()
            upload = site.guard.resume(call, R, upload.id)
    assert upload.commit(sha512(raw)) == Descriptor("application/octet-stream", sha512(raw), len(raw))
    own = m.digest_of(raw)
    assert objects(site) == [location_of(own)]
    assert all_rows(site, t.blob_alias) == [{"algorithm": "sha512", "digest": sha512(raw), "blob": own}]
    for digest in (own, sha512(raw)):
        assert site.guard.stat(call, R, digest).digest == digest
        content = site.guard.read(call, R, digest)
        assert content.digest == digest and b"".join(pieces_of(content)) == raw
    with pytest.raises(NotFound):
        site.guard.read(call_of(site, make_key(site, "other")), "other/app", sha512(raw))
    assert site.guard.mount(call, "acme/second", sha512(raw), R) is not None
    assert site.guard.stat(call, "acme/second", sha512(raw)).size == len(raw)


@pytest.mark.parametrize("announced", [True, False])
def test_a_wrong_sha512_keeps_nothing_visible(site: Site, call: Call, announced: bool) -> None:
    raw = os.urandom(5_000)
    upload = site.guard.upload(call, R, algorithm="sha512" if announced else "sha256")
    upload.write(raw)
    with pytest.raises(Mismatch):
        upload.commit(sha512(raw + b"x"))
    assert [all_rows(site, table) for table in (t.upload, t.repo_blob, t.blob_alias)] == [[], [], []]
    assert all(row["lease_until"] == 0 and row["gc_after"] == 0 for row in all_rows(site, t.blob))
    for digest in (m.digest_of(raw), sha512(raw), sha512(raw + b"x")):
        with pytest.raises(NotFound):
            site.guard.stat(call, R, digest)
    with pytest.raises(NotFound):
        site.guard.resume(call, R, upload.id)


def test_a_manifest_by_sha512_names_blobs_by_sha512(site: Site, call: Call) -> None:
    layer = os.urandom(2_000)
    for raw in (m.EMPTY_BYTES, layer):
        upload = site.guard.upload(call, R, algorithm="sha512")
        upload.write(raw)
        upload.commit(sha512(raw))
    config = {"mediaType": m.EMPTY_CONFIG, "digest": sha512(m.EMPTY_BYTES), "size": 2}
    doc = {"schemaVersion": 2, "mediaType": m.MANIFEST, "config": config, "layers": [Descriptor("x/y", sha512(layer), len(layer)).as_json()]}
    raw = m.canonical_json(doc)
    pushed = site.guard.push(call, R, raw, m.MANIFEST, refs=["five"], expect=sha512(raw))
    assert pushed.digest == sha512(raw) == site.guard.resolve(call, R, "five").digest
    assert {(row["child_digest"], row["blob"]) for row in all_rows(site, t.edge)} == {(sha512(b), m.digest_of(b)) for b in (m.EMPTY_BYTES, layer)}
    with pytest.raises(Conflict):
        site.guard.delete(call, R, sha512(layer))
    subject = Descriptor(m.MANIFEST, sha512(raw), len(raw))
    made = image(site, call, "", b"sbom", subject=subject)
    assert [d.digest for d in site.guard.referrers(call, R, sha512(raw)).items if isinstance(d, Descriptor)] == [made.digest]
    with pytest.raises(Mismatch):
        site.guard.push(call, R, raw, m.MANIFEST, expect=sha512(raw + b" "))
    with pytest.raises(Invalid):
        site.guard.push(call, R, m.canonical_json({**doc, "layers": [Descriptor("x/y", sha512(layer), 1).as_json()]}), m.MANIFEST)
    with pytest.raises(NotFound):
        site.guard.push(call, R, m.canonical_json({**doc, "layers": [Descriptor("x/y", sha512(b"none"), 4).as_json()]}), m.MANIFEST)
    site.guard.delete(call, R, sha512(raw))
    site.guard.delete(call, R, sha512(layer))
    with pytest.raises(NotFound):
        site.guard.stat(call, R, m.digest_of(layer))


# ---- refs


@pytest.mark.slow
def test_the_history_of_a_tag(site: Site, call: Call) -> None:
    first, second = image(site, call, "v"), image(site, at(call, 1), "v", n=2)
    image(site, at(call, 2), "v", n=2)  # the same again moves nothing
    site.guard.delete(at(call, 3), R, "v")
    image(site, at(call, 4), "v")
    site.guard.delete(at(call, 5), R, first.digest)
    moves = [(row["old_digest"], row["new_digest"], row["at"]) for row in all_rows(site, t.ref_history)]
    assert moves == [
        ("", first.digest, call.now),
        (first.digest, second.digest, call.now + 1),
        (second.digest, "", call.now + 3),
        ("", first.digest, call.now + 4),
        (first.digest, "", call.now + 5),
    ]
    assert {row["key_id"] for row in all_rows(site, t.ref_history)} == {call.principal.key_id}


def test_immutable_tags_refuse_everybody(site: Site, call: Call) -> None:
    first = image(site, call, "v1")
    admin = call_of(site, make_key(site, "acme", "**", actions=("pull", "push", "admin")))
    with site.catalog.writing() as conn:
        conn.execute(t.repository.update().values(immutable=True))
    image(site, admin, "v1")  # the same manifest is no move
    image(site, admin, "v2", n=2)
    for change in (
        lambda: image(site, admin, "v1", n=3),
        lambda: site.guard.delete(admin, R, "v1"),
        lambda: site.guard.delete(admin, R, first.digest),
    ):
        with pytest.raises(Conflict, match="immutable"):
            change()
    assert site.guard.resolve(admin, R, "v1").digest == first.digest and len(all_rows(site, t.ref_history)) == 2


def index(site: Site, call: Call, ref: str, *children: Descriptor) -> Descriptor:
    doc = {"schemaVersion": 2, "mediaType": m.INDEX, "manifests": [child.as_json() for child in children], "annotations": {"ref": ref}}
    return site.guard.push(call, R, m.canonical_json(doc), m.INDEX, refs=[ref] if ref else [])


def test_what_is_below_an_immutable_tag_refuses_everybody(site: Site, call: Call) -> None:
    leaf, loose, other = image(site, call, "", n=1), image(site, call, "", b"loose", n=2), image(site, call, "", b"other", n=3)
    middle = index(site, call, "", leaf)
    top = index(site, call, "v1", middle)
    free = index(site, call, "", other, loose)
    admin = call_of(site, make_key(site, "acme", "**", actions=("pull", "push", "admin")))
    site.guard.upkeep.set_immutable(admin, {"name": R, "immutable": True})
    for digest in (leaf.digest, middle.digest, other.digest):
        for change in (
            lambda digest=digest: site.guard.delete(call, R, digest),
            lambda digest=digest: site.guard.upkeep.remove(admin, {"name": R, "ref": digest, "force": True}),
        ):
            with pytest.raises(Conflict) as refused:
                change()
            assert refused.value.reason == "immutable"
    for descriptor in (leaf, middle, top):
        assert site.guard.resolve(admin, R, descriptor.digest).size
    assert site.guard.read(admin, R, m.digest_of(b"layer")).total == 5
    done = site.guard.upkeep.remove(admin, {"name": R, "ref": free.digest})
    assert {free.digest, loose.digest, other.digest} == set(done["manifests"]), "an index without a tag goes, with what is below it"  # type: ignore[call-overload]
    site.guard.upkeep.set_immutable(admin, {"name": R, "immutable": False})
    site.guard.delete(call, R, leaf.digest)


def test_bytes_without_a_type_have_their_own_in_every_row(site: Site, call: Call) -> None:
    put(site, call, R, m.EMPTY_BYTES)
    raw = b'{"schemaVersion":2,"config":{"mediaType":"x/y","digest":"%s","size":2},"layers":[]}' % m.EMPTY_DIGEST.encode()
    with pytest.raises(Invalid, match="no mediaType"):
        site.guard.push(call, R, raw, m.DOCKER_MANIFEST)
    with site.catalog.writing() as conn:  # as an older version stored them, and as a bundle may bring them
        repo_id = c.ensure_repository(conn, R)
        found = c.add_manifest(conn, repo_id, raw, m.DOCKER_MANIFEST, refs=("brought",))
    assert found.media_type == site.guard.resolve(call, R, "brought").media_type == m.MANIFEST
    with site.catalog.writing() as conn:
        conn.execute(t.manifest.update().values(media_type=m.DOCKER_MANIFEST))
    assert site.guard.push(call, R, raw, m.MANIFEST, refs=["again"]).media_type == m.MANIFEST
    assert site.guard.resolve(call, R, "brought").media_type == m.MANIFEST


def test_a_create_only_key_moves_no_tag(site: Site, call: Call) -> None:
    maker = call_of(site, make_key(site, "acme", "acme/**", actions=("pull", "create")))
    first = image(site, maker, "v1")
    image(site, maker, "v1")
    with pytest.raises(Denied):
        image(site, maker, "v1", n=2)
    assert site.guard.resolve(call, R, "v1").digest == first.digest
    image(site, call, "v1", n=2)


def test_of_two_conditional_pushes_one_wins(site: Site, call: Call) -> None:
    put(site, call, R, m.EMPTY_BYTES)
    raws = [m.build_manifest("application/x-test", [], {"n": str(n)}) for n in range(9)]
    first = site.guard.push(call, R, raws[0], m.MANIFEST, refs=["v"], over="")
    won: list[str] = []

    def run(raw: bytes) -> None:
        try:
            won.append(site.guard.push(call, R, raw, m.MANIFEST, refs=["v"], over=first.digest).digest)
        except Conflict as error:
            assert error.reason == "moved"

    threads = [threading.Thread(target=run, args=(raw,)) for raw in raws[1:]]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(won) == 1 and site.guard.resolve(call, R, "v").digest == won[0]
    for over in ("", first.digest):
        with pytest.raises(Conflict):
            site.guard.push(call, R, raws[0], m.MANIFEST, refs=["v"], over=over)
    with pytest.raises(Conflict):
        site.guard.push(call, R, raws[0], m.MANIFEST, refs=["new"], over=won[0])
    assert len(all_rows(site, t.ref)) == 1 and len(all_rows(site, t.ref_history)) == 2


# ---- signatures


def signed(site: Site, call: Call, *signers: str, over: str | None = None, ref: str = SIG) -> str:
    """Pushes a `.sig` manifest with a layer of each signer, as cosign does; its digest."""
    put(site, call, R, m.EMPTY_BYTES)
    claim = put(site, call, R, b"the claim that all of them sign")
    layers = [replace(claim, media_type=trust.SIMPLE_SIGNING, annotations={trust.SIGNATURE: signer}).as_json() for signer in signers]
    return site.guard.push(call, R, m.build_manifest("", layers, {}), m.MANIFEST, refs=[ref], over=over).digest


@pytest.mark.slow
def test_a_signature_is_added_and_never_pushed_over(site: Site, call: Call) -> None:
    signed(site, call, "a")
    both = signed(site, call, "a", "b")
    assert signed(site, call, "b", "a") != both, "the order is the signer's own"
    both = signed(site, call, "b", "a")  # the same again
    for signers in (("a",), ("b", "c"), ("c",), ()):
        with pytest.raises(Conflict, match="another signature was added meanwhile") as refused:
            signed(site, call, *signers)
        assert refused.value.reason == "signatures"
        assert site.guard.resolve(call, R, SIG).digest == both
    moves = [row["new_digest"] for row in all_rows(site, t.ref_history)]
    assert len(moves) == 3 and len(all_rows(site, t.manifest)) == 3, "nothing of a refused push is kept"
    one = signed(site, call, "a", over=both)  # who names what it replaces knows what it takes away
    with pytest.raises(Conflict):
        signed(site, call, "b", over=both)
    assert site.guard.resolve(call, R, SIG).digest == one
    site.guard.delete(call, R, SIG)
    assert signed(site, call, "d") == site.guard.resolve(call, R, SIG).digest
    for other in ("v1", SIG.replace(".sig", ".att"), SIG[:-5] + ".sig"):
        signed(site, call, "a", ref=other)
        signed(site, call, "b", ref=other)


def test_of_signers_at_once_each_is_kept_or_told(site: Site, call: Call) -> None:
    put(site, call, R, m.EMPTY_BYTES)
    claim = put(site, call, R, b"the claim that all of them sign")
    refusals: list[str] = []
    begin = threading.Barrier(6)

    def sign(name: str) -> None:
        begin.wait(30)
        while True:
            try:
                held = site.guard.resolve(call, R, SIG).digest
                old = m.parse_manifest(b"".join(pieces_of(site.guard.read(call, R, held))), m.MANIFEST).layers
            except NotFound:
                old = ()
            layers = [*old, replace(claim, media_type=trust.SIMPLE_SIGNING, annotations={trust.SIGNATURE: name})]
            try:
                site.guard.push(call, R, m.build_manifest("", [d.as_json() for d in layers], {}), m.MANIFEST, refs=[SIG])
                return
            except Conflict as error:
                refusals.append(error.reason)

    threads = [threading.Thread(target=sign, args=(f"signer {n}",)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    raw = b"".join(pieces_of(site.guard.read(call, R, site.guard.resolve(call, R, SIG).digest)))
    assert sorted(d.annotations[trust.SIGNATURE] for d in m.parse_manifest(raw, m.MANIFEST).layers) == [f"signer {n}" for n in range(6)]
    assert set(refusals) <= {"signatures"}


# ---- quotas


def test_a_quota_counts_each_blob_of_the_organisation_once(site: Site, call: Call) -> None:
    put(site, call, R, b"x" * 600)
    with site.catalog.writing() as conn:
        conn.execute(t.org.update().where(t.org.c.name == "acme").values(quota_bytes=1000))
    put(site, call, "acme/second", b"x" * 600)
    assert site.guard.mount(call, "acme/third", m.digest_of(b"x" * 600), R) is not None
    before = (objects(site), len(all_rows(site, t.blob)))
    with pytest.raises(Denied, match="has 600 bytes of 1000 allowed, and 401 more") as refused:
        put(site, call, R, b"y" * 401)
    assert refused.value.reason == "quota"
    with pytest.raises(Denied):
        site.guard.upload(call, "acme/new", digest=m.digest_of(b"y" * 401), size=401)
    assert (objects(site), len(all_rows(site, t.blob))) == before and all_rows(site, t.upload) == []
    assert not list((site.home.path / "partial").iterdir())
    other = call_of(site, make_key(site, "other"))
    put(site, other, "other/app", b"z" * 500)
    both = call_of(site, make_key(site, "acme", "**"))
    with site.catalog.writing() as conn:
        conn.execute(t.repository.update().where(t.repository.c.name == "other/app").values(visibility="public"))
    with pytest.raises(Denied):
        site.guard.mount(both, R, m.digest_of(b"z" * 500), "other/app")
    put(site, call, R, b"y" * 400)
    site.guard.delete(call, R, m.digest_of(b"y" * 400))
    put(site, call, R, b"w" * 400)


# ---- referrers


@pytest.mark.parametrize("begun", [None, 8000])
def test_what_a_full_disk_refused_counts_against_no_quota(site: Site, call: Call, monkeypatch: pytest.MonkeyPatch, begun: int | None) -> None:
    admin, statvfs = call_of(site, make_key(site, "acme", "**", actions=("admin",))), os.fstatvfs
    site.guard.upkeep.set_quota(admin, {"org": "acme", "bytes": 10_000})
    upload = site.guard.upload(call, R, size=begun)
    upload.expect(8000)  # type: ignore[attr-defined]
    monkeypatch.setattr(os, "fstatvfs", lambda fd: os.statvfs_result([*statvfs(fd)[:3], 0, 0, *statvfs(fd)[5:10]]))
    for step in (lambda: upload.write(b"x" * 8000), upload.suspend):
        with pytest.raises(Unavailable) as refused:
            step()
        assert refused.value.reason == "disk_full"
    monkeypatch.undo()
    assert site.guard.upkeep.quota(admin, "acme")["used_bytes"] == 0
    again = site.guard.resume(call, R, upload.id)
    again.write(b"y" * 8000)
    assert again.commit(m.digest_of(b"y" * 8000)).size == 8000


@pytest.mark.slow
def test_referrers_come_in_pages_by_number(site: Site, call: Call) -> None:
    subject = image(site, call, "v")
    count = MAX_REFERRERS + 5
    with site.catalog.writing() as conn:
        found = site.catalog.repository(R)
        assert found is not None
        for n in range(count):
            c.add_manifest(conn, found.id, m.build_manifest("t/a" if n % 2 else "t/b", [], {"n": str(n)}, subject), m.MANIFEST)
    for kind, most in (("", count), ("t/a", count // 2)):
        seen: list[str] = []
        after, pages = "", 0
        while pages == 0 or after:
            page = site.guard.referrers(call, R, subject.digest, kind, after)
            seen += [d.digest for d in page.items if isinstance(d, Descriptor)]
            after, pages = page.after, pages + 1
        assert len(seen) == len(set(seen)) == most and seen == sorted(seen) and pages == (2 if most > MAX_REFERRERS else 1)


def test_a_decision_in_grace_says_so_with_the_content(site: Site, call: Call) -> None:
    digest = put(site, call, R, b"graced").digest
    now = time.time()
    with site.catalog.writing() as conn:
        org = c.ensure_org(conn, "acme", now)
        grant = Grant(("acme/**",), ("pull",), expires=now - 100, grace_s=1000)
        key = site.entitlements.add_key(conn, org, tier="developer", grant=grant, expires=0, at=now - 200)[1]
    late = call_of(site, key)
    site.guard.read(late, R, digest)
    assert [text for text in late.warnings if "grace ends" in text]
    site.guard.read(call, R, digest)
    assert not call.warnings


def test_bytes_that_are_sent_again_correct_the_size_of_a_damaged_blob(site: Site, call: Call) -> None:
    digest = put(site, call, R, b"whole").digest
    for state, size in (("missing", 2), ("quarantined", 3), ("unverified", 4)):
        with site.catalog.writing() as conn:
            conn.execute(t.blob.update().where(t.blob.c.digest == digest).values(state=state, size=size, location=""))
        put(site, call, R, b"whole")
        assert (blob(site, digest)["size"], blob(site, digest)["state"]) == (5, "ready")
        found = site.guard.read(call, R, digest)
        assert found.total == 5 and b"".join(pieces_of(found)) == b"whole"
