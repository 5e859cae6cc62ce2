"""The bundle from staging to store: what is written, what a second run does, order, loss, set merge of signatures, promotion."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from artifact import bundle, medium, trust
from artifact.errors import Conflict, Invalid, Mismatch, NotFound
from artifact.manifest import (
    COMMIT,
    EMPTY_BYTES,
    FACTS_TYPE,
    MANIFEST,
    PROFILES_TYPE,
    SOURCE,
    Reference,
    build_manifest,
    build_model,
    canonical_json,
    digest_of,
    parse_manifest,
)
from artifact.profile import build
from artifact.store import Descriptor, File
from mirror.home import MirrorHome, Named
from mirror.pack import pack
from registry.home import Home
from registry.importer import import_bundle
from registry.promote import promote
from registry.settings import Settings
from registry.wiring import Site, open_site

NOW = time.time()


def stage_model(home: MirrorHome, name: str, ref: str, files: dict[str, bytes], commit: str = "a" * 40) -> Named:
    """A model revision with its profile manifest, as sync would stage it."""
    disk = home.disk
    disk.put(EMPTY_BYTES)
    facts = canonical_json({"schema": 1, "source": f"hf://{name}"})
    layers = [File(path, disk.put(raw), len(raw), lfs=path.endswith(".safetensors")) for path, raw in files.items()]
    raw = build_model(layers, Descriptor(FACTS_TYPE, disk.put(facts), len(facts)), {SOURCE: f"hf://{name}", COMMIT: commit})
    digest = disk.put(raw)
    document = build(name, digest, [{"tags": {"llm_engine": "vllm", "precision": "bf16", "tp": "1"}}], 1)
    profiles = build_manifest(PROFILES_TYPE, [Descriptor(PROFILES_TYPE, disk.put(document), len(document)).as_json()], {})
    upstream: dict[str, object] = {"source": f"hf://{name}@{commit}", "key_id": "", "license": "mit", "gated": False, "fetched": 1}
    named = Named(name, ref, digest, MANIFEST, name.title(), "model", upstream)
    home.record([named, Named(f"{name}/profiles", ref, disk.put(profiles), MANIFEST, "", "profiles")])
    return named


@pytest.fixture
def mirror(tmp_path: Path) -> MirrorHome:
    return MirrorHome.init(tmp_path / "mirror")


@pytest.fixture
def site(tmp_path: Path, mirror: MirrorHome) -> Iterator[Site]:
    Home.open(tmp_path / "site", create=True).pin_root(mirror.root)
    with open_site(Settings(tmp_path / "site")) as opened:
        yield opened


def located(site: Site, name: str, ref: str) -> str:
    found = site.catalog.locate(name, ref)
    return found.digest if found else ""


def audit_rows(site: Site, event: str) -> list[dict[str, object]]:
    with site.catalog.reading() as conn:
        rows = [json.loads(r[0]) for r in conn.exec_driver_sql("select body from audit_pending order by id")]
    return [r for r in rows if r["event"] == event]


def medium_files(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


def test_pack_writes_the_format_and_a_second_run_writes_nothing(mirror: MirrorHome, tmp_path: Path) -> None:
    stage_model(mirror, "hf/acme/m", "main", {"config.json": b"{}", "w.safetensors": b"w" * 3_000_000})
    first = pack(mirror, tmp_path / "disk", NOW)
    files = medium_files(tmp_path / "disk")
    assert first["changed"] and first["sequence"] == 1 and first["objects"] == len([f for f in files if f.startswith("blobs/")])
    metadata = {f for f in files if f.startswith("metadata/")}
    assert metadata == {f"metadata/{n}.json" for n in ("1.root", "timestamp", "1.snapshot", "1.targets", "1.bundles")}
    (index,) = (f for f in files if f.startswith("targets/"))
    assert index == f"targets/bundles/{digest_of(files[index])[7:]}.1.json"
    for name, raw in files.items():
        assert not name.startswith("blobs/") or digest_of(raw)[7:] == name.rsplit("/", 1)[1]
    doc = json.loads(files[index])
    assert doc["sender"] == mirror.id and doc["upstream"][0]["license"] == "mit" and canonical_json(doc) == files[index]
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "disk").rglob("*")}
    again = pack(mirror, tmp_path / "disk", NOW + 100)
    assert not again["changed"] and again["sequence"] == 1 and again["copied"] == 0
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "disk").rglob("*")} == before


def test_pack_refuses_a_gap_and_a_foreign_directory(mirror: MirrorHome, tmp_path: Path) -> None:
    with pytest.raises(Invalid):
        pack(mirror, tmp_path / "disk", NOW)
    named = stage_model(mirror, "acme/m", "1", {"w.safetensors": b"w"})
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter.txt").write_text("mine")
    with pytest.raises(Invalid, match="letter"):
        pack(mirror, tmp_path / "home", NOW)
    assert [p.name for p in (tmp_path / "home").iterdir()] == ["letter.txt"]
    mirror.disk.delete(digest_of(b"w"))
    with pytest.raises(NotFound, match=digest_of(b"w")):
        pack(mirror, tmp_path / "disk", NOW)
    mirror.disk.delete(named.digest)
    with pytest.raises(NotFound, match=named.digest):
        pack(mirror, tmp_path / "disk", NOW)
    assert not (tmp_path / "disk").exists()


def test_pack_of_damaged_staging_leaves_an_unfinished_directory_and_then_completes_it(mirror: MirrorHome, tmp_path: Path) -> None:
    stage_model(mirror, "acme/m", "1", {"w.safetensors": b"weights"})
    path = mirror.disk.path(digest_of(b"weights"))
    path.chmod(0o644)
    path.write_bytes(b"Weights")
    with pytest.raises(Mismatch, match=digest_of(b"weights")):
        pack(mirror, tmp_path / "disk", NOW)
    with pytest.raises(Invalid, match="no finished bundle"):
        bundle.open_bundle(tmp_path / "disk", tmp_path / "state", mirror.root, NOW)
    path.write_bytes(b"weights")
    assert pack(mirror, tmp_path / "disk", NOW)["sequence"] == 1
    assert bundle.open_bundle(tmp_path / "disk", tmp_path / "state", mirror.root, NOW).sequence == 1


def test_import_makes_everything_visible_once(mirror: MirrorHome, site: Site, tmp_path: Path) -> None:
    files = {"config.json": b"{}", "w.safetensors": b"w" * 3_000_000}
    named = stage_model(mirror, "hf/acme/m", "main", files)
    packed = pack(mirror, tmp_path / "disk", NOW)
    counted: list[int] = []
    report = import_bundle(site, tmp_path / "disk", NOW, counted.append)
    assert report["imported"] and not report["older"] and report["copied_bytes"] == sum(counted) and report["objects"] == packed["objects"]
    assert located(site, "hf/acme/m", "main") == named.digest == located(site, "hf/acme/m", "a" * 40)
    found = site.catalog.file("hf/acme/m", "main", "w.safetensors")
    assert found is not None and found.file is not None and found.file.digest == digest_of(files["w.safetensors"])
    assert (tmp_path / "site" / "blobs" / "sha256" / found.file.digest[7:9] / found.file.digest[7:]).read_bytes() == files["w.safetensors"]
    assert found.repo.display == "Hf/Acme/M" and found.repo.subject.visibility == "public"
    assert len(audit_rows(site, "bundle_import")) == 1
    (fact,) = audit_rows(site, "upstream")
    assert fact["upstream"]["license"] == "mit"  # type: ignore[index]
    again = import_bundle(site, tmp_path / "disk", NOW)
    assert not again["imported"] and again["copied"] == 0 and len(audit_rows(site, "bundle_import")) == 1
    receipt = json.loads((tmp_path / "disk" / "receipt.json").read_text())
    claims = trust.verify_jws(receipt["receipt"], "receipt+jwt", site.home.site_trust().release_keys, NOW)
    assert (claims["iss"], claims["sub"], claims["sequence"]) == (site.home.instance, f"sender:{mirror.id}", 1)


@pytest.mark.slow
def test_bundles_out_of_order_and_one_lost(mirror: MirrorHome, site: Site, tmp_path: Path) -> None:
    digests = []
    for i in (1, 2, 3, 4):
        digests.append(stage_model(mirror, "acme/m", "latest", {"w.safetensors": b"%d" % i}, commit=str(i) * 40).digest)
        assert pack(mirror, tmp_path / f"disk{i}", NOW)["sequence"] == i
    assert import_bundle(site, tmp_path / "disk1", NOW)["lost"] == []
    third = import_bundle(site, tmp_path / "disk3", NOW)
    assert third["lost"] == [2] and located(site, "acme/m", "latest") == digests[2]
    second = import_bundle(site, tmp_path / "disk2", NOW)
    assert second["older"] and second["imported"] and located(site, "acme/m", "latest") == digests[2]  # names never go back
    assert located(site, "acme/m", digests[1]) == digests[1]  # but its content is there
    assert not import_bundle(site, tmp_path / "disk2", NOW)["imported"]
    assert import_bundle(site, tmp_path / "disk4", NOW)["lost"] == [] and located(site, "acme/m", "latest") == digests[3]
    assert not import_bundle(site, tmp_path / "disk1", NOW)["imported"]


def test_a_gap_is_refused_naming_the_digest_unless_the_store_holds_it(mirror: MirrorHome, site: Site, tmp_path: Path) -> None:
    stage_model(mirror, "acme/m", "1", {"w.safetensors": b"weights"})
    names = tuple(medium.BundleName(n.name, n.ref, n.digest, n.media_type, n.display, n.kind) for n in mirror.names())
    objects = medium.closure([(n.name, n.digest, n.media_type) for n in names], mirror.disk.read).objects()
    delta = {d: s for d, s in objects.items() if d != digest_of(b"weights")}
    bundle.write_bundle(tmp_path / "disk", mirror.path / "tuf", mirror.id, names, delta, (), mirror.disk.path, NOW)
    with pytest.raises(NotFound, match=digest_of(b"weights")):
        import_bundle(site, tmp_path / "disk", NOW)
    assert not located(site, "acme/m", "1")
    (tmp_path / "site" / "blobs" / "sha256").mkdir(parents=True, exist_ok=True)
    shutil.copytree(mirror.disk.path(digest_of(b"weights")).parent, tmp_path / "site" / "blobs" / "sha256" / digest_of(b"weights")[7:9])
    assert import_bundle(site, tmp_path / "disk", NOW)["imported"]


@pytest.mark.slow
def test_promote_signs_once_and_a_later_import_keeps_both_signatures(mirror: MirrorHome, site: Site, tmp_path: Path) -> None:
    stage_model(mirror, "acme/m", "1", {"w.safetensors": b"weights"})
    profiles = mirror.names()[1]
    vendor = trust.generate_key()
    raw = mirror.disk.read(profiles.digest, 1 << 20)
    subject = Descriptor(MANIFEST, profiles.digest, len(raw))
    pack(mirror, tmp_path / "one", NOW)
    import_bundle(site, tmp_path / "one", NOW)
    done = promote(site, Reference("acme/m", "1"), NOW)
    assert done["changed"] and done["digest"] == profiles.digest
    assert not promote(site, Reference("acme/m", "1"), NOW + 1)["changed"] and len(audit_rows(site, "promote")) == 1
    theirs = trust.release_artifacts(vendor, "acme/m/profiles:1", subject)
    for blob in theirs.blobs.values():
        mirror.disk.put(blob)
    tag, referrer = mirror.disk.put(theirs.sig_manifest), mirror.disk.put(theirs.referrer_manifest)
    mirror.record([Named(profiles.name, theirs.sig_tag, tag, MANIFEST), Named(profiles.name, referrer, referrer, MANIFEST)])
    pack(mirror, tmp_path / "two", NOW)
    import_bundle(site, tmp_path / "two", NOW)
    found = site.catalog.find("acme/m/profiles", located(site, "acme/m/profiles", theirs.sig_tag))
    assert found is not None and found.raw is not None and len(parse_manifest(bytes(found.raw)).layers) == 2
    assert site.catalog.repository("acme/m/profiles") is not None
    for keys in (site.home.site_trust().release_keys, {"v": trust.public_pem(vendor)}):
        trust.verify_release(
            bytes(found.raw), lambda d: (tmp_path / "site/blobs/sha256" / d[7:9] / d[7:]).read_bytes(), keys, "acme/m/profiles:1", subject.digest
        )
    assert not import_bundle(site, tmp_path / "two", NOW)["imported"] and not promote(site, Reference("acme/m", "1"), NOW)["changed"]
    referrers = site.catalog.referrers(found.repo.id, profiles.digest, "", "", 10)
    assert len(referrers) == 2 and referrer in {r[0] for r in referrers}
    with pytest.raises(NotFound):
        promote(site, Reference("acme/m", "2"), NOW)
    with pytest.raises(NotFound):
        promote(site, Reference("acme/other", "1"), NOW)


def test_a_receipt_leaves_out_what_its_receiver_holds(mirror: MirrorHome, site: Site, tmp_path: Path) -> None:
    stage_model(mirror, "acme/m", "1", {"w.safetensors": b"weights" * 1000, "config.json": b"{}"})
    pack(mirror, tmp_path / "one", NOW)
    import_bundle(site, tmp_path / "one", NOW)
    receipt = tmp_path / "one" / "receipt.json"
    newer = stage_model(mirror, "acme/m", "2", {"w.safetensors": b"weights" * 1000, "config.json": b'{"v": 2}'}, commit="b" * 40)
    packed = pack(mirror, tmp_path / "two", NOW, receipt=receipt)
    assert packed["objects"] == 4 and not medium.object_path(tmp_path / "two", digest_of(b"weights" * 1000)).exists()
    assert import_bundle(site, tmp_path / "two", NOW)["imported"] and located(site, "acme/m", "2") == newer.digest
    other = MirrorHome.init(tmp_path / "other")
    stage_model(other, "acme/m", "1", {"w.safetensors": b"w"})
    with pytest.raises(Invalid, match="another sender"):
        pack(other, tmp_path / "three", NOW, receipt=receipt)
    document = json.loads(receipt.read_text())
    document["receipt"] = document["receipt"][:-4] + "AAAA"
    receipt.write_text(json.dumps(document))
    with pytest.raises(Mismatch):
        pack(mirror, tmp_path / "three", NOW, receipt=receipt)


def test_timestamp_is_renewed_before_it_ends(mirror: MirrorHome, tmp_path: Path) -> None:
    stage_model(mirror, "acme/m", "1", {"w.safetensors": b"w"})
    pack(mirror, tmp_path / "disk", NOW)
    assert not pack(mirror, tmp_path / "disk", NOW + 59 * 86400)["changed"]
    renewed = pack(mirror, tmp_path / "disk", NOW + 61 * 86400)
    assert renewed["changed"] and renewed["sequence"] == 2 and renewed["copied"] == 0
    assert bundle.open_bundle(tmp_path / "disk", tmp_path / "state", mirror.root, NOW + 120 * 86400).sequence == 2


def test_homes_refuse_to_be_made_twice_or_to_pin_another(mirror: MirrorHome, tmp_path: Path) -> None:
    with pytest.raises(Conflict):
        MirrorHome.init(mirror.path)
    with pytest.raises(NotFound):
        MirrorHome.open(tmp_path / "absent")
    with pytest.raises(NotFound):
        Home.open(tmp_path / "absent")
    home = Home.open(tmp_path / "site", create=True)
    assert home.pin_root(mirror.root, mirror.root_sha256.upper()) == home.pin_root(mirror.root) == mirror.root_sha256
    with pytest.raises(Conflict):
        home.pin_root(MirrorHome.init(tmp_path / "other").root)
    with pytest.raises(Mismatch):
        home.pin_root(mirror.root, "0" * 64)
    assert Home.open(tmp_path / "site", create=True).instance == home.instance
    secrets = tmp_path / "site" / "secrets"
    assert [(p.name, oct(p.stat().st_mode & 0o777)) for p in sorted(secrets.iterdir())] == [
        (n, "0o600") for n in ("audit.pem", "entitlement.pem", "lease.pem", "pepper", "release.pem")
    ]
    assert oct((tmp_path / "site").stat().st_mode & 0o777) == "0o700" == oct(secrets.stat().st_mode & 0o777)


@pytest.mark.slow
@pytest.mark.parametrize("inside", [False, True])
def test_profiles_of_another_model_are_not_signed(mirror: MirrorHome, site: Site, tmp_path: Path, inside: bool) -> None:
    """The document names another model as its own (`inside`: only one of its profiles does, and the store lacks that model)."""
    stage_model(mirror, "acme/m", "1", {"w.safetensors": b"weights"})
    digest = stage_model(mirror, "acme/n", "1", {"w.safetensors": b"others"}).digest
    document = build("acme/n", digest, [{"tags": {"llm_engine": "vllm"}}], 1)
    if inside:
        document = document.replace(b'"model":"acme/n"', b'"model":"acme/m"')
    layer = Descriptor(PROFILES_TYPE, mirror.disk.put(document), len(document))
    raw = build_manifest(PROFILES_TYPE, [layer.as_json()], {})
    mirror.record([Named("acme/m/profiles", "1", mirror.disk.put(raw), MANIFEST, "", "profiles")])
    pack(mirror, tmp_path / "one", NOW)
    import_bundle(site, tmp_path / "one", NOW)
    if inside:
        assert promote(site, Reference("acme/m", "1"), NOW)["models"] == [f"acme/n@{digest}"]  # another model of this store may be named
        with site.catalog.writing() as conn:
            conn.exec_driver_sql("UPDATE repository SET name = 'acme/moved' WHERE name = 'acme/n'")
    with pytest.raises(Invalid, match="acme/n"):
        promote(site, Reference("acme/m", "1"), NOW)
