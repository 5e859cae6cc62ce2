"""Where an import puts bytes: beside what waits for its removal, and into a store that is not the data directory; fallback tags become referrers."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import select

from artifact.errors import Conflict
from artifact.manifest import INDEX, MANIFEST, Reference, build_manifest, canonical_json, digest_of
from artifact.store import Descriptor
from mirror.home import MirrorHome, Named
from mirror.pack import pack
from registry import catalog as c
from registry import tables as t
from registry.blobs.file import FileBlobs, location_of
from registry.home import Home
from registry.importer import import_bundle
from registry.library import local_call, pieces_of
from registry.promote import promote
from registry.scrub import Scrub
from registry.settings import Settings
from registry.wiring import Site, open_site
from tests.unit.test_bundle import located, stage_model

NOW = time.time()
WEIGHTS = b"weights" * 1000


@pytest.fixture
def mirror(tmp_path: Path) -> MirrorHome:
    return MirrorHome.init(tmp_path / "mirror")


@pytest.fixture
def site(tmp_path: Path, mirror: MirrorHome) -> Iterator[Site]:
    Home.open(tmp_path / "site", create=True).pin_root(mirror.root)
    with open_site(Settings(tmp_path / "site"), background=False) as opened:
        yield opened


def content(site: Site, name: str, ref: str, path: str) -> bytes:
    _, file = site.library.file(local_call(NOW), name, ref, path)
    return b"".join(pieces_of(site.library.read(local_call(NOW), name, file.digest)))


def let_go(site: Site) -> list[str]:
    """What the sweep does with content that nobody names: rows go at once, bytes later; the locations."""
    with site.catalog.writing() as conn:
        locations = list(conn.execute(select(t.blob.c.location)).scalars())
        for table in (t.ref, t.revision, t.repo_manifest, t.edge, t.file, t.manifest, t.repo_blob, t.blob_fact, t.blob):
            conn.execute(table.delete())
        for location in locations:
            c.add_garbage(conn, location, 1, NOW + 60)
    return locations


def test_what_waits_for_its_removal_is_stored_beside_it(mirror: MirrorHome, site: Site, tmp_path: Path) -> None:
    stage_model(mirror, "acme/m", "1", {"w.safetensors": WEIGHTS})
    pack(mirror, tmp_path / "disk", NOW)
    import_bundle(site, tmp_path / "disk", NOW)
    old = let_go(site)
    assert import_bundle(site, tmp_path / "disk", NOW)["imported"]
    for location in old:
        site.library.blobs.delete(location)
    assert content(site, "acme/m", "1", "w.safetensors") == WEIGHTS
    assert promote(site, Reference("acme/m", "1"), NOW)["changed"]
    with site.catalog.reading() as conn:
        held = {row.digest: row.location for row in conn.execute(select(t.blob.c.digest, t.blob.c.location))}
    assert {location for digest, location in held.items() if location_of(digest) in old} == {location + ".g1" for location in old}


def test_a_sweep_in_the_middle_ends_the_import_and_the_next_one_works(mirror: MirrorHome, site: Site, tmp_path: Path) -> None:
    stage_model(mirror, "acme/m", "1", {"w.safetensors": WEIGHTS})
    pack(mirror, tmp_path / "disk", NOW)
    import_bundle(site, tmp_path / "disk", NOW)
    let_go(site)
    with site.catalog.writing() as conn:
        waiting = list(conn.execute(select(t.garbage.c.location)).scalars())
        conn.execute(t.garbage.delete())

    def between(_bytes: int) -> None:  # called when the plan is made and before the rows are
        with site.catalog.writing() as conn:
            for location in waiting:
                c.add_garbage(conn, location, 1, NOW + 60)
            conn.execute(t.blob.delete())

    uploads = site.library.uploads
    place = uploads.generation
    uploads.generation = lambda digest: (place(digest), between(0))[0]  # type: ignore[method-assign, func-returns-value]
    with pytest.raises(Conflict, match="let go of"):
        import_bundle(site, tmp_path / "disk", NOW)
    uploads.generation = place  # type: ignore[method-assign]
    assert located(site, "acme/m", "1") == ""
    assert import_bundle(site, tmp_path / "disk", NOW)["imported"] and content(site, "acme/m", "1", "w.safetensors") == WEIGHTS


def test_import_into_a_store_elsewhere(mirror: MirrorHome, site: Site, tmp_path: Path) -> None:
    site.library.blobs = site.library.uploads.blobs = FileBlobs(tmp_path / "elsewhere")
    stage_model(mirror, "acme/m", "1", {"w.safetensors": WEIGHTS, "config.json": b"{}"})
    pack(mirror, tmp_path / "disk", NOW)
    report = import_bundle(site, tmp_path / "disk", NOW)
    assert report["imported"] and content(site, "acme/m", "1", "w.safetensors") == WEIGHTS
    assert not [p for p in (tmp_path / "site" / "blobs").rglob("*") if p.is_file()], "what was copied on the way is gone"
    assert promote(site, Reference("acme/m", "1"), NOW)["changed"]
    let_go(site)
    with site.catalog.writing() as conn:
        conn.execute(t.garbage.delete())
    again = import_bundle(site, tmp_path / "disk", NOW)
    assert again["imported"] and content(site, "acme/m", "1", "config.json") == b"{}"


@pytest.mark.slow
@pytest.mark.parametrize("harm", ["rot", "gone", "short", "missing", "moved", "size"])
def test_the_bundle_that_brought_it_heals_what_was_damaged(mirror: MirrorHome, site: Site, tmp_path: Path, harm: str) -> None:
    stage_model(mirror, "acme/m", "1", {"w.safetensors": WEIGHTS})
    pack(mirror, tmp_path / "disk", NOW)
    import_bundle(site, tmp_path / "disk", NOW)
    assert not import_bundle(site, tmp_path / "disk", NOW)["imported"]
    digest = digest_of(WEIGHTS)
    path, changes = tmp_path / "site" / "blobs" / location_of(digest), {}
    path.chmod(0o600)
    if harm == "rot":
        path.write_bytes(WEIGHTS[:-1] + b"!")
        assert [f.digest for f in Scrub(site.catalog, site.library.blobs, site.audit).run(NOW).findings] == [digest]
    elif harm == "short":
        path.write_bytes(WEIGHTS[:-1])
    elif harm == "size":
        path.write_bytes(WEIGHTS[:-1])
        changes = {"size": len(WEIGHTS) - 1}
    elif harm == "moved":  # to a place of a generation that nothing new is stored under, and lost there
        changes = {"location": location_of(digest, 30)}
        path.unlink()
    else:
        path.unlink()
        changes = {"location": "", "state": "missing"} if harm == "missing" else {}
    with site.catalog.writing() as conn:
        if changes:
            conn.execute(t.blob.update().where(t.blob.c.digest == digest).values(changes))
    assert import_bundle(site, tmp_path / "disk", NOW)["imported"]
    assert content(site, "acme/m", "1", "w.safetensors") == WEIGHTS
    with site.catalog.reading() as conn:
        row = conn.execute(select(t.blob).where(t.blob.c.digest == digest)).one()
        waiting = set(conn.execute(select(t.garbage.c.location)).scalars())
    assert (row.state, row.size) == ("ready", len(WEIGHTS)) and row.location not in waiting
    assert waiting == {"rot": {location_of(digest)}, "moved": {location_of(digest, 30)}}.get(harm, set())
    assert not import_bundle(site, tmp_path / "disk", NOW)["imported"]


def test_fallback_tags_of_a_bundle_are_referrers(mirror: MirrorHome, site: Site, tmp_path: Path) -> None:
    stage_model(mirror, "acme/m", "1", {"w.safetensors": WEIGHTS})
    model = mirror.names()[0]
    subject = Descriptor(MANIFEST, model.digest, len(mirror.disk.read(model.digest, 1 << 20)))
    entries = []
    for kind in ("t/sbom", "t/signature"):
        layer = Descriptor("x/y", mirror.disk.put(kind.encode()), len(kind))
        raw = build_manifest(kind, [layer.as_json()], {"from": "elsewhere"}, subject)
        entries.append(Descriptor(MANIFEST, mirror.disk.put(raw), len(raw), kind))
    index = canonical_json({"schemaVersion": 2, "mediaType": INDEX, "manifests": [e.as_json() for e in entries]})
    tag = model.digest.replace(":", "-")
    mirror.record([Named("acme/m", tag, mirror.disk.put(index), INDEX)])
    pack(mirror, tmp_path / "disk", NOW)
    import_bundle(site, tmp_path / "disk", NOW)
    call = local_call(NOW)
    found = [d for d in site.library.referrers(call, "acme/m", model.digest).items if isinstance(d, Descriptor)]
    assert sorted((d.digest, d.artifact_type, d.annotations["from"]) for d in found) == sorted(
        (e.digest, e.artifact_type, "elsewhere") for e in entries
    )
    assert site.library.resolve(call, "acme/m", tag).media_type == INDEX
    only = site.library.referrers(call, "acme/m", model.digest, "t/sbom").items
    assert [d.digest for d in only if isinstance(d, Descriptor)] == [entries[0].digest]
