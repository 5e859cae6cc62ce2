"""Bundles altered, mixed, replayed, forged or cut off: refused with the file's name, exit status 7 or 6, and nothing visible (A26-A28, A33)."""

from __future__ import annotations

import fcntl
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import Metadata, Root

from artifact import bundle, medium
from artifact.errors import AirlockError, Conflict, Invalid, Mismatch, NotFound, TooLarge, Unavailable
from artifact.manifest import digest_of
from mirror.home import MirrorHome
from mirror.pack import pack, plan
from registry.home import Home
from registry.importer import import_bundle
from registry.settings import Settings
from registry.wiring import Site, open_site
from tests.unit.test_bundle import located, medium_files, stage_model

NOW = time.time()
AIRLOCK = str(Path(sys.executable).parent / "airlock")


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mirror, its first bundle and an empty site that pins it; each test gets a copy."""
    base = tmp_path_factory.mktemp("template")
    home = MirrorHome.init(base / "mirror")
    stage_model(home, "acme/m", "1", {"config.json": b"{}", "w.safetensors": b"weights" * 1000})
    pack(home, base / "disk", NOW)
    Home.open(base / "site", create=True).pin_root(home.root)
    open_site(Settings(base / "site")).close()
    return base


@pytest.fixture
def mirror(template: Path, tmp_path: Path) -> MirrorHome:
    shutil.copytree(template / "mirror", tmp_path / "mirror")
    return MirrorHome.open(tmp_path / "mirror")


@pytest.fixture
def disk(template: Path, tmp_path: Path) -> Path:
    shutil.copytree(template / "disk", tmp_path / "disk")
    return tmp_path / "disk"


@pytest.fixture
def site(template: Path, tmp_path: Path) -> Iterator[Site]:
    shutil.copytree(template / "site", tmp_path / "site")
    with open_site(Settings(tmp_path / "site")) as opened:
        yield opened


def rows(site: Site) -> dict[str, int]:
    tables = ("repository", "manifest", "ref", "revision", "blob", "repo_blob", "edge", "file", "audit_pending")
    with site.catalog.reading() as conn:
        return {t: conn.exec_driver_sql(f"select count(*) from {t}").scalar_one() for t in tables}


def refused(site: Site, directory: Path, error: type[AirlockError], word: str, now: float = NOW) -> AirlockError:
    """The import is refused naming `word`, and no row, no TUF state and no record of it exists afterwards."""
    before, state = rows(site), sorted(p for p in site.home.path.joinpath("trust").rglob("*") if p.is_file())
    with pytest.raises(error) as caught:
        import_bundle(site, directory, now)
    assert word in str(caught.value), str(caught.value)
    assert rows(site) == before
    assert sorted(p for p in site.home.path.joinpath("trust").rglob("*") if p.is_file() and p.name != ".import.lock") == [
        p for p in state if p.name != ".import.lock"
    ]
    return caught.value


def test_a_flipped_bit_anywhere_is_refused_naming_the_file(disk: Path, site: Site) -> None:
    chance = random.Random(7)
    for name, raw in medium_files(disk).items():
        spots = {0, len(raw) - 1, *(chance.randrange(len(raw)) for _ in range(6))}
        for spot in spots:
            for bit in (0x01, 0x20):
                (disk / name).write_bytes(raw[:spot] + bytes([raw[spot] ^ bit]) + raw[spot + 1 :])
                refused(site, disk, Mismatch, Path(name).name)
        (disk / name).write_bytes(raw)
    assert import_bundle(site, disk, NOW)["imported"] and located(site, "acme/m", "1")


def test_a_lost_cut_or_grown_file_is_refused_naming_it(disk: Path, site: Site) -> None:
    for name, raw in medium_files(disk).items():
        (disk / name).unlink()
        refused(
            site,
            disk,
            AirlockError,
            "no finished bundle" if "timestamp" in name or "root" in name else "indexes" if "targets/" in name else Path(name).name,
        )
        for other in (raw[:-1], raw + b" "):
            (disk / name).write_bytes(other)
            refused(site, disk, Mismatch, Path(name).name)
        (disk / name).write_bytes(raw)
    assert import_bundle(site, disk, NOW)["imported"]


def test_a_sparse_giant_is_refused_by_its_size_unread(disk: Path, site: Site) -> None:
    name = next(n for n in medium_files(disk) if n.startswith("blobs/"))
    os.truncate(disk / name, 1 << 40)
    begun = time.monotonic()
    refused(site, disk, Mismatch, Path(name).name)
    assert time.monotonic() - begun < 5


STRANGERS = [
    "x", ".hidden", "..x", "C:\\x", "Metadata/x", "targets/x.json", "deep/" * 40 + "x", "blobs/sha512/x",
    "metadata/2.root.json.bak", "metadata/02.root.json", "metadata/9.snapshot.json", "metadata/2.root.json",
    "blobs/sha256/zz/" + "0" * 64, "blobs/sha256/00/" + "1" * 64, "blobs/sha256/00/" + "0" * 64, f"blobs/sha256/00/{'0' * 64}.partial",
]  # fmt: skip


def test_a_file_that_no_list_names_is_refused(disk: Path, site: Site, tmp_path: Path) -> None:
    for i, name in enumerate(STRANGERS):
        copy = tmp_path / f"with-stranger-{i}"
        shutil.copytree(disk, copy)
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_bytes(b"x")
        refused(site, copy, AirlockError, "")
    assert import_bundle(site, disk, NOW)["imported"]


@pytest.mark.parametrize("kind", ["file link", "folder link", "link out", "fifo", "folder as file", "dangling"])
def test_links_and_devices_are_refused(disk: Path, site: Site, tmp_path: Path, kind: str) -> None:
    name = next(n for n in medium_files(disk) if n.startswith("blobs/"))
    if kind == "folder link":
        shutil.move(disk / "blobs", tmp_path / "elsewhere")
        (disk / "blobs").symlink_to(tmp_path / "elsewhere")
    elif kind == "link out":
        (disk / "receipt.json").symlink_to("/etc/passwd")
    else:
        shutil.move(disk / name, tmp_path / "moved")
        if kind == "file link":
            (disk / name).symlink_to(tmp_path / "moved")
        elif kind == "dangling":
            (disk / name).symlink_to("nowhere")
        elif kind == "fifo":
            os.mkfifo(disk / name)
        else:
            (disk / name).mkdir()
    refused(site, disk, Invalid, "does not belong to a bundle")


def test_a_receipt_that_is_a_link_is_never_written_through(disk: Path, site: Site, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (disk / "receipt.json").symlink_to(victim)
    refused(site, disk, Invalid, "receipt.json")
    assert victim.read_text() == "mine"


def test_another_senders_bundle_is_refused(disk: Path, site: Site, tmp_path: Path) -> None:
    other = MirrorHome.init(tmp_path / "other")
    stage_model(other, "acme/m", "1", {"w.safetensors": b"evil"})
    pack(other, tmp_path / "theirs", NOW)
    refused(site, tmp_path / "theirs", Mismatch, "1.root.json")
    (tmp_path / "theirs/metadata/1.root.json").write_bytes((disk / "metadata/1.root.json").read_bytes())  # dressed up as ours
    refused(site, tmp_path / "theirs", Mismatch, "timestamp.json")


def test_mixed_halves_of_two_bundles_are_refused(mirror: MirrorHome, disk: Path, site: Site, tmp_path: Path) -> None:
    stage_model(mirror, "acme/m", "1", {"w.safetensors": b"newer"}, commit="b" * 40)
    pack(mirror, tmp_path / "two", NOW)
    for role in ("snapshot", "bundles"):  # the old role file under the new name
        copy = tmp_path / f"mixed-{role}"
        shutil.copytree(tmp_path / "two", copy)
        (copy / f"metadata/2.{role}.json").write_bytes((disk / f"metadata/1.{role}.json").read_bytes())
        refused(site, copy, Mismatch, f"2.{role}.json")
    shutil.copytree(disk, tmp_path / "stamped")
    (tmp_path / "stamped/metadata/timestamp.json").write_bytes((tmp_path / "two/metadata/timestamp.json").read_bytes())
    refused(site, tmp_path / "stamped", Mismatch, "2.snapshot.json")
    shutil.copytree(tmp_path / "two", tmp_path / "blobs-of-one")
    shutil.rmtree(tmp_path / "blobs-of-one/blobs")
    shutil.copytree(disk / "blobs", tmp_path / "blobs-of-one/blobs")
    refused(site, tmp_path / "blobs-of-one", AirlockError, "blobs/")
    assert import_bundle(site, tmp_path / "two", NOW)["imported"]
    served = located(site, "acme/m", "1")
    refused(site, tmp_path / "stamped", Mismatch, "")
    assert located(site, "acme/m", "1") == served


def test_an_expired_bundle_is_refused_and_what_was_served_stays(disk: Path, site: Site, mirror: MirrorHome, tmp_path: Path) -> None:
    refused(site, disk, Invalid, "expired", NOW + 91 * 86400)
    import_bundle(site, disk, NOW)
    stage_model(mirror, "acme/m", "2", {"w.safetensors": b"2"})
    pack(mirror, tmp_path / "two", NOW)
    refused(site, tmp_path / "two", Invalid, "expired", NOW + 91 * 86400)
    assert located(site, "acme/m", "1") and not located(site, "acme/m", "2")


def test_two_bundles_of_one_number_are_a_fork(disk: Path, site: Site, mirror: MirrorHome, tmp_path: Path) -> None:
    shutil.copytree(mirror.path, tmp_path / "twin")
    twin = MirrorHome.open(tmp_path / "twin")
    for home, to, text in ((mirror, "two", b"ours"), (twin, "fork", b"theirs")):
        stage_model(home, "acme/m", "1", {"w.safetensors": text}, commit="c" * 40)
        assert pack(home, tmp_path / to, NOW)["sequence"] == 2
    import_bundle(site, tmp_path / "two", NOW)
    refused(site, tmp_path / "fork", Mismatch, "")


# ---- keys: rotation and too few signatures ----


def signer(path: Path) -> CryptoSigner:
    return bundle._signer(path)


def rotate(mirror: MirrorHome, version: int, signers: list[CryptoSigner], change: Callable[[Root], None]) -> None:
    """Writes `<version>.root.json` into the sender's home, signed by exactly these."""
    metadata = mirror.path / "tuf" / "metadata"
    root = Metadata[Root].from_bytes((metadata / "1.root.json").read_bytes())
    root.signed.version = version
    root.signed.expires = datetime.now(UTC).replace(microsecond=0) + timedelta(days=1000)
    change(root.signed)
    root.signatures.clear()
    for one in signers:
        root.sign(one, append=True)
    (metadata / f"{version}.root.json").write_bytes(root.to_bytes(bundle._COMPACT))


def offline(mirror: MirrorHome, *numbers: int) -> list[CryptoSigner]:
    return [signer(mirror.offline_keys / f"root-{n}.pem") for n in numbers]


def test_root_rotation_by_two_of_three_is_followed_and_by_one_refused(disk: Path, site: Site, mirror: MirrorHome, tmp_path: Path) -> None:
    import_bundle(site, disk, NOW)
    stage_model(mirror, "acme/m", "2", {"w.safetensors": b"2"})
    rotate(mirror, 2, offline(mirror, 1), lambda root: None)
    pack(mirror, tmp_path / "one-of-two", NOW)
    refused(site, tmp_path / "one-of-two", Mismatch, "2.root.json")
    old = signer(mirror.path / "tuf/online/timestamp.pem")
    fresh = CryptoSigner(ec.generate_private_key(ec.SECP256R1()))

    def replaced(root: Root) -> None:
        assert old.public_key is not None and fresh.public_key is not None
        root.revoke_key(old.public_key.keyid, "timestamp")
        root.add_key(fresh.public_key, "timestamp")

    rotate(mirror, 2, offline(mirror, 1, 2), replaced)
    shutil.rmtree(tmp_path / "one-of-two")
    pack(mirror, tmp_path / "old-key", NOW)
    refused(site, tmp_path / "old-key", Mismatch, "timestamp.json")  # the key that was replaced speaks no more
    from cryptography.hazmat.primitives import serialization as s

    pem = fresh._private_key.private_bytes(s.Encoding.PEM, s.PrivateFormat.PKCS8, s.NoEncryption())  # type: ignore[attr-defined]
    (mirror.path / "tuf/online/timestamp.pem").write_bytes(pem)
    stage_model(mirror, "acme/m", "3", {"w.safetensors": b"3"})
    pack(mirror, tmp_path / "new-key", NOW)
    assert import_bundle(site, tmp_path / "new-key", NOW)["imported"] and located(site, "acme/m", "3")
    assert not import_bundle(site, tmp_path / "new-key", NOW)["imported"]


def test_a_root_gap_is_refused(site: Site, mirror: MirrorHome, tmp_path: Path) -> None:
    stage_model(mirror, "acme/m", "2", {"w.safetensors": b"2"})
    rotate(mirror, 3, offline(mirror, 1, 2), lambda root: None)  # v+2 without v+1
    pack(mirror, tmp_path / "gap", NOW)
    refused(site, tmp_path / "gap", Mismatch, "3.root.json")


def test_targets_signed_by_one_of_two_are_refused(site: Site, mirror: MirrorHome, tmp_path: Path) -> None:
    path = mirror.path / "tuf/metadata/1.targets.json"
    targets = json.loads(path.read_bytes())
    targets["signatures"] = targets["signatures"][:1]
    path.write_bytes(bundle.canonical_json(targets))
    stage_model(mirror, "acme/m", "2", {"w.safetensors": b"2"})
    pack(mirror, tmp_path / "weak", NOW)  # the online keys alone cannot make up for it
    refused(site, tmp_path / "weak", Mismatch, "targets.json")


def test_a_key_speaks_only_for_its_own_paths(site: Site, mirror: MirrorHome, tmp_path: Path) -> None:
    path = mirror.path / "tuf/metadata"
    shutil.copy(mirror.path / "tuf/online/snapshot.pem", mirror.path / "tuf/online/bundles.pem")  # a valid key of this sender, but not of this role
    stage_model(mirror, "acme/m", "2", {"w.safetensors": b"2"})
    pack(mirror, tmp_path / "wrong", NOW)
    assert (path / "2.bundles.json").exists()
    refused(site, tmp_path / "wrong", Mismatch, "bundles.json")


# ---- an index that a thief of the online keys could sign ----


def forge(mirror: MirrorHome, to: Path, change: Callable[[dict[str, object]], None], extra: bytes | None = None) -> Path:
    """A correctly signed bundle whose index was altered before it was signed."""
    shutil.rmtree(to, ignore_errors=True)
    wanted, tuf = plan(mirror), mirror.path / "tuf"
    body: dict[str, object] = {
        "names": [n.as_json() for n in wanted.names],
        "objects": [{"digest": d, "size": s} for d, s in wanted.objects.items()],
        "upstream": [],
    }
    change(body)
    sequence = Metadata.from_file(str(tuf / "metadata/timestamp.json")).signed.version + 1
    bundle._sign_next(tuf, mirror.id, sequence, body, NOW)
    raw = (tuf / f"index.{sequence}.json").read_bytes()
    (to / "targets/bundles").mkdir(parents=True)
    (to / f"targets/bundles/{digest_of(raw)[7:]}.{sequence}.json").write_bytes(raw)
    (to / "metadata").mkdir()
    for name in ("1.root.json", "1.targets.json", f"{sequence}.bundles.json", f"{sequence}.snapshot.json", "timestamp.json"):
        shutil.copy(tuf / "metadata" / name, to / "metadata" / name)
    for digest in wanted.objects:
        path = medium.object_path(to, digest)
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(mirror.disk.path(digest), path)
    if extra is not None:
        path = medium.object_path(to, digest_of(extra))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(extra)
    return to


def test_a_signed_but_hostile_index_is_refused(site: Site, mirror: MirrorHome, tmp_path: Path) -> None:
    def name(**more: object) -> Callable[[dict[str, object]], None]:
        return lambda body: body["names"][0].update(more)  # type: ignore[index]

    def objects(change: Callable[[list[dict[str, object]]], None]) -> Callable[[dict[str, object]], None]:
        return lambda body: change(body["objects"])  # type: ignore[arg-type]

    stranger = b"reached by nobody"
    cases: list[tuple[Callable[[dict[str, object]], None], bytes | None]] = [
        *((name(name=n), None) for n in ("../x", "/abs", "a/../b", "A/b", "airlock/x", "v2/x", "", "a//b", "x" * 300, 7)),
        *((name(ref=r), None) for r in ("", "a\nb", "x" * 300, None)),
        *((name(digest=d), None) for d in ("sha256:00", "../../etc/passwd", "sha512:" + "0" * 128)),
        (name(kind="config"), None),
        (name(media_type="text/html"), None),
        (name(display="x" * 301), None),
        (name(display="a\x1b[2Jb"), None),
        (lambda body: body.update(upstream=[{"source": "x" * 20_000}]), None),
        (lambda body: body.update(sequence=99), None),
        (lambda body: body.update(sender="0" * 16), None),
        (lambda body: body.update(schema=2), None),
        (lambda body: body.update(names={}), None),
        (lambda body: body["names"].append(body["names"][0]), None),  # type: ignore[attr-defined,index]
        (objects(lambda o: o.append(o[0])), None),
        (objects(lambda o: o[0].update(size=-1)), None),
        (objects(lambda o: o[0].update(size=True)), None),
        (objects(lambda o: o[0].update(digest="sha256:../../../x")), None),
        (objects(lambda o: o.append({"digest": digest_of(stranger), "size": len(stranger)})), stranger),
        (objects(lambda o: o.pop()), None),
    ]
    for change, extra in cases:
        error = refused(site, forge(mirror, tmp_path / "forged", change, extra), AirlockError, "")
        assert isinstance(error, Invalid | Mismatch | NotFound | TooLarge), error
    assert import_bundle(site, forge(mirror, tmp_path / "forged", lambda body: None), NOW)["imported"]


def test_no_space_is_told_with_both_numbers_before_a_byte(
    disk: Path, site: Site, mirror: MirrorHome, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.statvfs

    def full(path: object) -> os.statvfs_result:
        values = list(real(path)[:10])  # type: ignore[arg-type]
        values[4] = 0
        return os.statvfs_result(values)

    monkeypatch.setattr(os, "statvfs", full)
    refused(site, disk, Unavailable, "0 bytes free, 7")
    with pytest.raises(Unavailable, match="bytes free"):
        pack(mirror, tmp_path / "small", NOW)
    assert not medium_files(tmp_path / "small")


def test_a_database_from_an_older_backup_is_filled_again(disk: Path, site: Site, tmp_path: Path) -> None:
    shutil.copy(tmp_path / "site/registry.db", tmp_path / "backup.db")
    import_bundle(site, disk, NOW)
    site.close()
    for path in (tmp_path / "site").glob("registry.db*"):
        path.unlink()
    shutil.copy(tmp_path / "backup.db", tmp_path / "site/registry.db")
    with open_site(Settings(tmp_path / "site")) as again:
        report = import_bundle(again, disk, NOW)
        assert report["imported"] and report["copied_bytes"] == 0 and located(again, "acme/m", "1")


def test_one_import_at_a_time(disk: Path, site: Site) -> None:
    with (site.home.path / "trust/.import.lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        refused(site, disk, Conflict, "another import")
    assert import_bundle(site, disk, NOW)["imported"]


def test_an_altered_pin_is_noticed(disk: Path, site: Site, mirror: MirrorHome) -> None:
    pin = site.home.trust_dir(mirror.id) / "1.root.json"
    pin.chmod(0o644)
    pin.write_bytes(pin.read_bytes() + b" ")
    with pytest.raises(Invalid, match="altered"):
        import_bundle(site, disk, NOW)


# ---- kill -9 ----


def size_of(path: Path) -> int:
    """Bytes of a file, 0 when its writer has just renamed it away."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def kill_when(argv: list[str], folder: Path, at: int) -> None:
    """Starts a command and kills it once an unfinished file below `folder` has `at` bytes; it must be alive and the file partial then."""
    process = subprocess.Popen([AIRLOCK, *argv], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    end = time.monotonic() + 60
    while time.monotonic() < end:
        if any(size_of(p) >= at for p in folder.rglob("*") if p.parent.name == "partial" or "partial" in p.name):
            break
        assert process.poll() is None, "it ended before the offset was reached"
    assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()


@pytest.mark.server
def test_kill_9_in_pack_and_import_then_the_same_command_again(mirror: MirrorHome, tmp_path: Path) -> None:
    seed = int(os.environ.get("AIRLOCK_SEED", random.randrange(1 << 30)))
    chance = random.Random(seed)
    print(f"seed {seed}")
    size = 256 << 20
    named = stage_model(mirror, "acme/big", "1", {"w.safetensors": os.urandom(size)})
    for _ in range(3):
        kill_when(
            ["bundle", "pack", "--to", str(tmp_path / "cut"), "--home", str(mirror.path)], tmp_path, chance.randrange(1 << 20, size - (32 << 20))
        )
        assert not (tmp_path / "cut/metadata/timestamp.json").exists()
    whole, cut = pack(mirror, tmp_path / "whole", NOW), pack(mirror, tmp_path / "cut", NOW)
    assert whole["sequence"] == cut["sequence"] == 2
    assert {k: digest_of(v) for k, v in medium_files(tmp_path / "whole").items()} == {
        k: digest_of(v) for k, v in medium_files(tmp_path / "cut").items()
    }
    reports = {}
    for which in ("broken", "unbroken"):
        Home.open(tmp_path / which, create=True).pin_root(mirror.root)
        argv = ["bundle", "import", str(tmp_path / "cut"), "--data", str(tmp_path / which), "--json"]
        for _ in range(3 if which == "broken" else 0):
            kill_when(argv, tmp_path / which / "partial", chance.randrange(80 << 20, size - (32 << 20)))
            with open_site(Settings(tmp_path / which)) as opened:
                assert not located(opened, "acme/big", "1") and sum(rows(opened).values()) == 0
        done = subprocess.run([AIRLOCK, *argv], capture_output=True, text=True, check=True)
        reports[which] = json.loads(done.stdout)
    assert reports["broken"]["copied_bytes"] <= reports["unbroken"]["copied_bytes"] - (64 << 20)  # no whole piece is read twice
    trees = []
    for which in ("broken", "unbroken"):
        with open_site(Settings(tmp_path / which)) as opened:
            assert located(opened, "acme/big", "1") == named.digest
            trees.append((rows(opened), {k: digest_of(v) for k, v in medium_files(tmp_path / which / "blobs").items()}))
        assert not [p for p in (tmp_path / which / "partial").iterdir()]
    assert trees[0] == trees[1]


@pytest.mark.server
def test_the_command_says_what_was_altered_and_exits_7(disk: Path, mirror: MirrorHome, tmp_path: Path) -> None:
    Home.open(tmp_path / "site", create=True).pin_root(mirror.root)
    name = max((n for n in medium_files(disk) if n.startswith("blobs/")), key=lambda n: (disk / n).stat().st_size)
    raw = (disk / name).read_bytes()
    (disk / name).write_bytes(raw[:500] + bytes([raw[500] ^ 1]) + raw[501:])
    done = subprocess.run([AIRLOCK, "bundle", "import", str(disk), "--data", str(tmp_path / "site")], capture_output=True, text=True, check=False)
    assert done.returncode == 7 and name in done.stderr and "Traceback" not in done.stderr
    (disk / name).write_bytes(raw)
    done = subprocess.run([AIRLOCK, "bundle", "import", str(disk), "--data", str(tmp_path / "site")], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "imported bundle 1" in done.stdout
