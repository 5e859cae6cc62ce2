"""The data directory when parts of it are lost: nothing that a backup holds is ever made anew in silence."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from artifact.errors import Unavailable
from registry.commands import key
from registry.home import Home
from registry.settings import Settings
from registry.wiring import migrate, open_site
from tests.site import make_site


def lose(data: Path) -> None:
    for path in data.glob("registry.db*"):
        path.unlink()


def empty(data: Path) -> None:
    lose(data)
    (data / "registry.db").touch()


@pytest.mark.parametrize("damage", [lose, empty])
def test_a_lost_database_is_never_made_anew(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    with make_site(tmp_path) as site:
        settings = site.settings
    damage(settings.data)
    before = sorted(os.listdir(settings.data))
    words = ["create", "--data", str(settings.data), "--org", "acme", "--tier", "developer", "--models", "acme/*", "--expires", "90d"]
    for use in (lambda: open_site(settings), lambda: migrate(settings), lambda: key.main(words)):
        with pytest.raises(Unavailable, match=r"registry\.db is missing") as caught:
            use()
        assert caught.value.do == "restore the backup of the data directory" and caught.value.exit_code == 9
    assert sorted(os.listdir(settings.data)) == before


def test_a_new_home_gets_its_database_once_and_so_does_one_of_an_earlier_version(tmp_path: Path) -> None:
    home = Home.open(tmp_path / "data", create=True)
    assert not home.database
    settings = Settings.load(tmp_path / "data", environ={})
    open_site(settings, background=False).close()
    again = Home.open(tmp_path / "data", create=True)
    assert again.database and (again.instance, again.created) == (home.instance, home.created)
    (tmp_path / "data/site.json").write_text(json.dumps({"schema": 1, "instance": home.instance, "created": home.created}))
    open_site(settings, background=False).close()
    assert Home.open(tmp_path / "data").database and not list((tmp_path / "data").glob(".*"))


def test_a_running_site_sees_that_its_database_was_replaced(tmp_path: Path) -> None:
    with make_site(tmp_path) as site:
        site.check()
        path = site.home.database_path
        raw = path.read_bytes()
        path.rename(path.with_name("moved.db"))
        with pytest.raises(Unavailable):
            site.check()
        path.write_bytes(raw)
        with pytest.raises(Unavailable, match="removed or replaced"):
            site.check()


@pytest.mark.parametrize("size", [0, 31, 33])
def test_a_pepper_of_another_length_is_refused(tmp_path: Path, size: int) -> None:
    home = Home.open(tmp_path / "data", create=True)
    assert len(home.pepper()) == 32
    (tmp_path / "data/secrets/pepper").write_bytes(b"x" * size)
    with pytest.raises(Unavailable, match="pepper") as caught:
        home.pepper()
    assert caught.value.do == "restore secrets/ from the backup"
