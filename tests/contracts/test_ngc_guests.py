"""The routes of images that NGC's clients ask for without an organisation in front, as guests and with a key, over HTTP to a real process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import update

from registry import tables as t
from registry.settings import Settings
from registry.wiring import open_site
from tests.contracts.ngc import OWN, NgcDoor, new_ngc_site, ngc_serving, push_image

pytestmark = pytest.mark.server
GUEST = {"X_NGC_Guest_Token": "00000000-0000-4000-8000-000000000000"}
IMAGES = {
    "nvcr.io/nim/meta/app": "public",
    "nvcr.io/nim/meta/inner": "private",
    "acme/team/shown": "public",
    "acme/tool": "public",
    "acme/team/kept": "private",
    "other/kept": "private",
}
PUBLIC = ("nim/meta/app", "acme/team/shown", "acme/tool")
ROUTES = ("", "?resolve-labels=false", "/images", "/images?page-size=1000", "/images/1.0", "/tags/1.0", "/tags/1.1")


def site(folder: Path) -> tuple[Path, dict[str, str]]:
    """A data directory with the images above, public or private, and a model."""
    data = folder / "data"
    keys = new_ngc_site(data)
    with ngc_serving(data, keys) as door:
        for name in IMAGES:
            if name != "other/kept":
                push_image(door, name)
        for tag in ("1.0", "1.1"):
            door.main.image("other/kept", tag, [b"theirs"], "other")
        door.push(OWN, "1.10")
    with open_site(Settings.load(data), background=False) as site, site.catalog.writing() as conn:
        for name, visibility in IMAGES.items():
            done = conn.execute(update(t.repository).where(t.repository.c.name == name).values(visibility=visibility))
            assert done.rowcount == 1
    return data, keys


@pytest.fixture(scope="module")
def door(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NgcDoor]:
    """Where the site lets guests read what is public."""
    with ngc_serving(*site(tmp_path_factory.mktemp("guests")), AIRLOCK_ANONYMOUS="on") as found:
        yield found


def refused(door: NgcDoor, path: str, who: str | None, status: int, code: str) -> str:
    found = door.ask("GET", path, None, who, **({} if who else GUEST))
    told = found.json()["requestStatus"]
    assert (found.status, told["statusCode"]) == (status, code) and told["requestId"] and told["statusDescription"], (path, found.body)
    return str(told["statusDescription"])


@pytest.mark.parametrize("who", [None, "root"])
@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_image(door: NgcDoor, name: str, who: str | None) -> None:
    """Every route answers a guest, and one with a key, as the route below the organisation does one with a key."""
    base, guest = f"/v2/repos/{name}", {} if who else GUEST
    org, *team, last = name.split("/")
    below = f"/v2/org/{org}{f'/team/{team[0]}' if team else ''}/repos/{last}"

    def told(path: str, key: str | None, **more: Any) -> Any:
        return {k: v for k, v in door.get(path, key, **more).items() if k != "requestStatus"}

    for route in ROUTES:
        assert told(base + route, who, **guest) == told(below + route, "root"), route
    info = told(base, who, **guest)
    assert (info["orgName"], info["teamName"], info["name"], info["latestTag"], info["isPublic"]) == (org, "".join(team), last, "1.1", True)
    assert [tag["tag"] for tag in told(f"{base}/images", who, **guest)["images"]] == ["1.1", "1.0"]
    assert told(f"{base}/images/1.0", who, **guest)["architecture"] == "arm64"


@pytest.mark.parametrize("route", ROUTES)
def test_a_private_image(door: NgcDoor, route: str) -> None:
    """A guest is asked for a key; a key that sees it reads it, and to any other one it is as if it were not there."""
    for name in ("nim/meta/inner", "acme/team/kept", "other/kept"):
        refused(door, f"/v2/repos/{name}{route}", None, 401, "UNAUTHORIZED")
        refused(door, f"/v2/repos/{name}{route}", "expired", 401, "UNAUTHORIZED")
    assert door.get(f"/v2/repos/nim/meta/inner{route}", "root") and door.get(f"/v2/repos/acme/team/kept{route}", "acme")
    hidden, absent = (refused(door, f"/v2/repos/{name}{route}", "acme", 404, "NOT_FOUND") for name in ("other/kept", "other/gone"))
    assert hidden == absent == refused(door, f"/v2/repos/acme/team/kept{route}", "nothing", 404, "NOT_FOUND")


def test_what_is_not_there(door: NgcDoor) -> None:
    for who in (None, "root"):
        refused(door, "/v2/repos/nim/meta/app/tags/9", who, 404, "NOT_FOUND")
        refused(door, "/v2/repos/nim/meta/app/images/9", who, 404, "NOT_FOUND")
        refused(door, "/v2/repos/nim/meta/app/images/1.0/layers", who, 404, "NOT_FOUND")
        refused(door, "/v2/repos/nim", who, 404, "NOT_FOUND")
        refused(door, "/v2/repos/a/b/c/d", who, 404, "NOT_FOUND")
    refused(door, "/v2/repos/acme/absent", None, 401, "UNAUTHORIZED")
    refused(door, "/v2/repos/acme/vision/demo", "root", 404, "NOT_FOUND")  # a model is no image
    for method in ("POST", "PUT", "PATCH", "DELETE"):
        found = door.ask(method, "/v2/repos/nim/meta/app", b"{}", None, **GUEST)
        assert (found.status, found.headers["allow"]) == (405, "GET, HEAD")


def test_where_the_site_has_no_guests(tmp_path: Path) -> None:
    with ngc_serving(*site(tmp_path)) as door:
        for route in ROUTES:
            for name in (*PUBLIC, "nim/meta/inner", "acme/absent"):
                refused(door, f"/v2/repos/{name}{route}", None, 401, "UNAUTHORIZED")
            assert door.get(f"/v2/repos/nim/meta/app{route}", "root")
