"""What another thread, process or container takes away, brings or uses between a look and the next is no failure and no harm."""

from __future__ import annotations

import argparse
import io
import os
import resource
import shutil
import sqlite3
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path, PosixPath

import pytest
from sqlalchemy import delete, select

from artifact import trust
from artifact.disk import Disk
from artifact.errors import Invalid, NotFound, Unavailable
from artifact.manifest import build_model, digest_of
from artifact.store import Descriptor, File
from mirror.home import MirrorHome
from mirror.records import Records
from registry import tables as t
from registry.backup import backup
from registry.blobs.file import FileBlobs, location_of
from registry.home import Home
from registry.keyring import Keyring, pepper_id, write_new
from registry.links import add_blob
from registry.rebuild import Rebuild
from registry.settings import Settings
from runtime import cache as place
from runtime import unsigned, upkeep, weights
from runtime.commands import cache as command
from tests.site import BACKENDS, running_site

AGES_AGO = 1_700_000_000


def stored(blobs: FileBlobs, raw: bytes) -> str:
    writer = blobs.writer("upload-0001")
    writer.write(raw)
    return writer.publish(digest_of(raw))


def test_a_walk_passes_over_what_is_no_folder_of_objects(tmp_path: Path) -> None:
    blobs = FileBlobs(tmp_path)
    assert list(blobs.walk()) == []
    place = stored(blobs, b"abc")
    (tmp_path / "blobs" / ".probe").write_bytes(b"probe")  # there for a moment of each health check
    (tmp_path / "blobs" / "lost+found").mkdir(mode=0o000)
    (tmp_path / "blobs" / "sha256" / "note").write_text("of the operator")
    assert list(blobs.walk()) == [(place, 3)] and place == location_of(digest_of(b"abc"))
    shutil.rmtree(tmp_path / "blobs")
    with pytest.raises(Unavailable, match="blobs is not there"):
        list(blobs.walk())


class Vanishing(PosixPath):
    """A path of which others remove what was prepared, and what an import has judged, as soon as they were looked at."""

    def is_dir(self) -> bool:
        found = super().is_dir()
        if self.parent.name == "next":
            self.unlink()
        elif self.name.startswith(".state."):
            shutil.rmtree(self)
        return found


def test_a_backup_beside_a_rotation_and_an_import(tmp_path: Path) -> None:
    home = Home.open(tmp_path / "data", create=True)
    home.keys.prepare("pepper")
    (home.path / "trust" / "sender" / ".state.alone").mkdir(parents=True)
    (home.path / "trust" / "sender" / ".state.alone" / "root.json").write_text("{}")
    (home.path / "trust" / "sender" / "1.root.json").write_text("{}")
    sqlite3.connect(home.database_path).execute("CREATE TABLE a (b)")
    made = backup(replace(Settings.load(home.path), data=Vanishing(home.path)), tmp_path / "kept", 1_800_000_000, "1")
    secrets = {f"secrets/{name}" for name in ("pepper", "release.pem", "lease.pem", "audit.pem", "entitlement.pem")}
    assert made["files"].keys() == {"registry.db", "site.json", "trust/sender/1.root.json", *secrets}  # type: ignore[attr-defined]


class Replacing(PosixPath):
    """A path of which, once the secrets are listed and the first of them is looked at, somebody replaces the pepper."""

    def is_dir(self) -> bool:
        if self.name == "audit.pem":
            Keyring(Path(self.parent)).rotate("pepper")
        return super().is_dir()


def test_a_backup_holds_the_pepper_that_is_replaced_while_it_is_taken(tmp_path: Path) -> None:
    home = Home.open(tmp_path / "data", create=True)
    sqlite3.connect(home.database_path).execute("CREATE TABLE a (b)")
    old = home.pepper()
    backup(replace(Settings.load(home.path), data=Replacing(home.path)), tmp_path / "kept", 1_800_000_000, "1")
    assert home.pepper() != old
    assert old in Keyring(tmp_path / "kept" / "secrets").previous_peppers(), "the keys in the database would be dead"


@pytest.mark.parametrize("file", ["pepper", "audit.pem"])
def test_a_backup_without_a_secret_that_is_a_link_is_refused(tmp_path: Path, file: str) -> None:
    home = Home.open(tmp_path / "data", create=True)
    sqlite3.connect(home.database_path).execute("CREATE TABLE a (b)")
    linked = home.path / "secrets" / file
    linked.symlink_to(linked.rename(tmp_path / file))
    with pytest.raises(NotFound, match=f"no plain file {file}"):
        backup(Settings.load(home.path), tmp_path / "kept", 1_800_000_000, "1")
    assert {path.name for path in tmp_path.iterdir()} == {"data", file}


class Rotating(PosixPath):
    """A path of which, at the moment that somebody reads the prepared secret, somebody else puts it in place."""

    def read_bytes(self) -> bytes:
        if self.parent.name == "next":
            Keyring(Path(self.parent.parent)).rotate({"pepper": "pepper", "lease.pem": "lease"}[self.name])
        return super().read_bytes()


def test_a_rotation_leaves_no_moment_in_which_a_secret_is_not_known(tmp_path: Path) -> None:
    home = Home.open(tmp_path / "data", create=True)
    old, new = home.pepper(), home.keys.prepare("pepper")
    assert [pepper_id(raw) for raw in replace(home, path=Rotating(home.path)).peppers()] == [new, pepper_id(old)]
    (old_kid,), new_kid = home.keys.public_keys("lease"), home.keys.prepare("lease")
    assert set(replace(home, path=Rotating(home.path)).keys.public_keys("lease")) == {old_kid, new_kid}


class Removing(PosixPath):
    """A path of which the operator removes each file as soon as it was listed."""

    def glob(self, pattern: str) -> Iterator[Path]:
        found = list(super().glob(pattern))
        for path in found:
            path.unlink()
        yield from found


def test_an_issuer_that_is_removed_at_this_moment_vouches_for_nothing(tmp_path: Path) -> None:
    home = Home.open(tmp_path / "data", create=True)
    own = home.issuers()
    pem = trust.public_pem(trust.generate_key())
    home.pin_issuer(pem, trust.spki_sha256(pem).hex())
    assert home.issuers().keys() == {*own, trust.kid(pem)}
    assert replace(home, path=Removing(home.path)).issuers() == own


def test_a_replaced_secret_that_is_removed_at_this_moment_counts_no_more(tmp_path: Path) -> None:
    home = Home.open(tmp_path / "data", create=True)
    old_kid, kid = home.keys.rotate("lease")
    assert home.keys.public_keys("lease").keys() == {old_kid, kid}
    assert replace(home, path=Removing(home.path)).keys.public_keys("lease").keys() == {kid}


class Lost(FileBlobs):
    """A store in which, once bytes were found to be gone, something happens before anybody acts on that."""

    moment: Callable[[], object] | None = None

    def stat(self, location: str) -> int | None:
        found = super().stat(location)
        if found is None and self.moment is not None:
            moment, self.moment = self.moment, None
            moment()
        return found


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_rebuild_reports_nothing_that_was_removed_or_published_meanwhile(tmp_path: Path, backend: str) -> None:
    raw = b"abc" * 1000
    with running_site(tmp_path / "site", backend) as site:
        blobs = Lost(tmp_path / "store")
        place = stored(blobs, raw)
        blobs.delete(place)
        with site.catalog.writing() as conn:
            add_blob(conn, digest_of(raw), len(raw), place)

        def remove() -> None:
            with site.catalog.writing() as conn:
                conn.execute(delete(t.blob))

        for moment, left in ((lambda: stored(blobs, raw), ["ready"]), (remove, [])):
            blobs.delete(place)
            blobs.moment = moment
            assert Rebuild(site.catalog, blobs, site.audit, 86400).run(1.0).missing_count == 0 and blobs.moment is None
            with site.catalog.reading() as conn:
                assert conn.execute(select(t.blob.c.state)).scalars().all() == left


def test_those_who_make_one_secret_at_once_agree_on_the_first(tmp_path: Path) -> None:
    """Threads here, as in the field two containers over one volume: both are process 1."""
    path, start = tmp_path / "secrets" / "pepper", threading.Barrier(8)
    texts = [bytes([65 + i]) * 1_000_000 for i in range(8)]

    def make(raw: bytes) -> None:
        start.wait()
        write_new(path, raw, 0o600)

    for _ in range(5):
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(make, texts))
        assert path.read_bytes() in texts and list(path.parent.iterdir()) == [path]
        path.unlink()


# ---- the mirror's home


def test_one_evidence_that_several_keep_at_once(tmp_path: Path) -> None:
    shown, start = tmp_path / "order.pdf", threading.Barrier(8)
    shown.write_bytes(os.urandom(1_000_000))
    records = Records(MirrorHome.init(tmp_path / "home"))

    def keep() -> str:
        start.wait()
        return records.keep(str(shown))

    with ThreadPoolExecutor(8) as pool:
        kept = {task.result() for task in [pool.submit(keep) for _ in range(8)]}
    assert kept == {f"{digest_of(shown.read_bytes())} order.pdf"}
    assert [path.read_bytes() for path in (tmp_path / "home" / "evidence").iterdir()] == [shown.read_bytes()]


# ---- the runtime's cache, which several containers share


def cached(cache: Path, name: str, raw: bytes, used: float) -> Path:
    """A model in the cache, last used at that time: its directory."""
    disk = Disk(cache)
    file = File("model.safetensors", disk.put(raw), len(raw))
    digest = disk.put(build_model([file], Descriptor("application/json", disk.put(b"{}"), 2), {}))
    folder = cache / "models" / name / digest[7:19]
    disk.link(file.digest, folder / file.path)
    os.utime(folder, (used, used))
    return folder


def at_the_first(moment: Callable[[], object]) -> Callable[[int], bool]:
    """What an eviction asks, once it has listed the models: never enough, and at the first time it happens."""
    waiting = [moment]
    return lambda freed: bool(waiting and waiting.pop()()) and False


def test_two_evictions_at_one_time(tmp_path: Path) -> None:
    old, new = cached(tmp_path, "acme/old", b"old" * 1000, AGES_AGO), cached(tmp_path, "acme/new", b"new" * 1000, AGES_AGO + 1)
    done = upkeep.evict(tmp_path, at_the_first(lambda: shutil.rmtree(old)))
    assert [name.partition("@")[0] for name in done.models] == ["acme/new"] and not done.busy
    assert not new.exists() and list((tmp_path / "models" / "acme").rglob("*.safetensors")) == []


def test_an_eviction_spares_a_model_that_a_start_used_since_it_was_listed(tmp_path: Path) -> None:
    old, new = cached(tmp_path, "acme/old", b"old" * 1000, AGES_AGO), cached(tmp_path, "acme/new", b"new" * 1000, AGES_AGO + 1)
    done = upkeep.evict(tmp_path, at_the_first(lambda: place.touch(old)))
    assert [name.partition("@")[0] for name in done.busy] == ["acme/old"] and old.is_dir() and not new.exists()


def test_an_eviction_leaves_what_a_model_needs_that_a_start_builds_anew_at_this_moment(tmp_path: Path) -> None:
    first, _ = (cached(tmp_path, f"acme/{name}", b"abc" * 1000, AGES_AGO + i) for i, name in enumerate(("first", "second")))
    steps = iter([lambda: None, lambda: first.rename(tmp_path / "aside"), lambda: (tmp_path / "aside").rename(first)])
    done = upkeep.evict(tmp_path, lambda freed: bool(next(steps)()) and False)
    assert [name.partition("@")[0] for name in done.models] == ["acme/second"] and first.is_dir()
    assert Disk(tmp_path).size(digest_of(b"abc" * 1000)) == 3000, "a start without the registry would not find it"


def test_an_eviction_takes_no_hidden_folder_of_a_model_that_stays(tmp_path: Path) -> None:
    model = cached(tmp_path, "acme/tiny", b"abc" * 1000, AGES_AGO)
    (model / ".ipynb_checkpoints").mkdir()
    (model / ".ipynb_checkpoints" / "config.json").hardlink_to(model / "model.safetensors")
    for folder in (model / ".ipynb_checkpoints", model):
        os.utime(folder, (AGES_AGO, AGES_AGO))
    with upkeep.holding(model):
        upkeep.evict(tmp_path, lambda freed: False)
    assert (model / ".ipynb_checkpoints" / "config.json").is_file()
    assert [name.partition("@")[0] for name in upkeep.evict(tmp_path, lambda freed: False).models] == ["acme/tiny"]


def test_what_a_killed_eviction_left_beside_a_model_goes_after_a_day(tmp_path: Path) -> None:
    model = cached(tmp_path, "acme/tiny", b"abc" * 1000, time.time())
    left, young = (model.with_name(f".{model.name}.{i}.old") for i in (1, 2))
    for folder in (left, young):
        (folder / "sub").mkdir(parents=True)
        (folder / "sub" / "only here").write_bytes(b"x" * 5000)
        (folder / "also an object").hardlink_to(model / "model.safetensors")
    os.utime(left, (AGES_AGO, AGES_AGO))
    assert upkeep.evict(tmp_path, lambda freed: freed > 0, dry=True).bytes == 5000 and left.is_dir()
    done = upkeep.evict(tmp_path, lambda freed: freed > 0)
    assert (done.bytes, done.models, left.exists()) == (5000, (), False)
    assert young.is_dir() and (model / "model.safetensors").read_bytes() == b"abc" * 1000


def test_what_was_evicted_since_it_was_listed_is_not_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cached(tmp_path, "acme/old", b"old" * 1000, AGES_AGO)

    class Evicting(io.StringIO):
        """The terminal, which is asked what it is when all objects are listed and none is read."""

        def isatty(self) -> bool:
            upkeep.evict(tmp_path, lambda freed: False)
            return False

    monkeypatch.setattr(sys, "stderr", Evicting())
    assert command.verify(tmp_path, argparse.Namespace(json=False, repair=False)) == 0
    assert "3 object(s) read, 0 damaged" in capsys.readouterr().out


def test_an_object_that_cannot_be_opened_for_want_of_descriptors_is_not_damaged(tmp_path: Path) -> None:
    disk = Disk(tmp_path)
    digest = disk.put(b"abc")
    bound = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, bound[1]))  # what is open stays so
    try:
        with pytest.raises(Unavailable, match="Too many open files"):
            upkeep.damaged(disk, digest, 3)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, bound)
    assert not upkeep.damaged(disk, digest, 3)


@pytest.mark.parametrize("to", ["removed", "model.safetensors"])
def test_a_link_to_nothing_is_no_file_of_a_model(tmp_path: Path, to: str) -> None:
    (tmp_path / "model.safetensors").symlink_to(to)
    with pytest.raises(Invalid, match=r"model\.safetensors is no plain file") as caught:
        unsigned.digest_with(digest_of(b"model"), {"NIM_DRAFT_MODEL_PATH": tmp_path})
    assert caught.value.reason == "model_content"


def test_a_file_that_another_start_found_damaged_is_fetched_again(tmp_path: Path) -> None:
    disk, raw = Disk(tmp_path), b"abc" * 1000
    digest = disk.put(raw)

    class Dropping(place.Stamps):
        """Asked between the look at a file's size and its opening."""

        def holds(self, digest: str, path: Path) -> bool:
            disk.delete(digest)
            return super().holds(digest, path)

    assert weights._present(disk, File("model.safetensors", digest, len(raw)), Dropping(tmp_path / "stamps")) == "absent"
