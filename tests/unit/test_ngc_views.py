"""The verbs below the NGC door over real databases: statements of its hot routes, the background checksums, names that would be one model."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest
from blake3 import blake3
from sqlalchemy import event, select, update

from artifact.errors import Conflict, NotFound
from artifact.grant import Grant
from registry import people
from registry import tables as t
from registry.catalog import ensure_org, ensure_repository
from registry.wiring import Site
from tests.site import BACKENDS, call_of, make_key, push_model, running_site
from tests.unit.test_lookup import served

FORM = "application/x-www-form-urlencoded"
INFO = "/v3/keys/get-caller-info"


@pytest.fixture(params=BACKENDS)
def site(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Site]:
    with running_site(tmp_path, request.param) as opened:
        yield opened


@pytest.fixture
def seen(site: Site) -> list[str]:
    found: list[str] = []
    event.listen(site.engine, "before_cursor_execute", lambda _c, _u, text, *_: found.append(text) if _mine() else None)
    return found


def _mine() -> bool:
    return threading.current_thread().name.startswith("sql")


def test_caller_info_is_one_statement(site: Site, seen: list[str]) -> None:
    now = time.time()
    with site.catalog.writing() as conn:
        org_id = ensure_org(conn, "acme", now)
        org = people.open_org(conn, "acme")
        people.create_member(conn, org, "ada", "person", "", now)
        ada = people.member_of(conn, org, "ada")
        for n in range(30):
            people.create_team(conn, org, f"team-{n}", now)
            people.join_team(conn, people.team_of(conn, org, f"team-{n}"), ada)
        given = {"tier": "developer", "expires": 0.0, "at": now, "kind": "personal", "member_id": ada.id}
        key = site.entitlements.add_key(conn, org_id, grant=Grant(("acme/*",), ("pull",)), **given)[1]
    seen.clear()
    status, _ = served(site, "POST", INFO, "", f"credentials={quote(key)}".encode(), port=3, content_type=FORM)
    assert (status, len(seen)) == (200, 1), seen
    badge = site.guard.caller(key, "r", now, ask=("badge",)).badge  # type: ignore[attr-defined]
    assert (badge.kind, badge.member, len(badge.teams)) == ("personal", "ada", 30)
    seen.clear()
    status, _ = served(site, "POST", INFO, "", b"credentials=nvapi-guess", port=3, content_type=FORM)
    assert status == 401 and not any("api_key" in text for text in seen), "what cannot be a key costs no statement"


@pytest.mark.slow
def test_statements_of_a_download(site: Site, seen: list[str]) -> None:
    key = make_key(site, "acme", "acme/**")
    push_model(site, call_of(site, key), "acme/x", "1", {f"f{n}": os.urandom(10) for n in range(50)})
    ticket = site.guard.ngc.tickets(call_of(site, key), "acme/x", [site.catalog.files(1, "", "", 1)[0].digest])[0]
    site.audit.flush()
    for path, most in (
        ("/v2/org/acme/models/x/1/files", 4),
        ("/v2/org/acme/models/x/versions/1/files?page-size=1000", 4),
        ("/v2/org/acme/models/x/versions/1/files/f1", 6),
        (f"/dl/{ticket}", 1),
    ):
        served(site, "GET", path, key, port=3)  # the first of 15 minutes also writes its audit row
        seen.clear()
        assert served(site, "GET", path, key, port=3)[0] == 200
        assert len(seen) <= most, (path, len(seen), seen)


def sums(site: Site, key: str, name: str) -> dict[str, str]:
    end = time.monotonic() + 30
    while True:
        found, missing = site.guard.ngc.checksums(call_of(site, key), [name], "1")
        if not missing:
            return {file.path: value for file, value in found}
        assert time.monotonic() < end
        time.sleep(0.02)


def test_checksums_are_computed_once_in_the_background(site: Site) -> None:
    key = make_key(site, "acme", "acme/**")
    files = {"a": b"", "b": os.urandom(2_500_000), "c": b"c"}
    push_model(site, call_of(site, key), "acme/x", "1", files)
    push_model(site, call_of(site, key), "acme/y", "1", files | {"d": b"d"})
    found, missing = site.guard.ngc.checksums(call_of(site, key), ["acme/x"], "1")
    assert missing == 3 and {value for _, value in found} == {""}, "no request computes anything"
    assert sums(site, key, "acme/x") == {path: blake3(raw).hexdigest() for path, raw in files.items()}
    assert site.guard.ngc.checksums(call_of(site, key), ["acme/y"], "1")[1] == 1, "what two models share is known"
    with site.catalog.reading() as conn:
        facts = conn.execute(select(t.blob_fact.c.blake3, t.blob_fact.c.git_oid).where(t.blob_fact.c.blake3 != "")).all()
    assert len(facts) >= 3 and all(row.git_oid for row in facts), "the other facts stay"


def test_checksums_of_a_damaged_file_are_refused(site: Site) -> None:
    key = make_key(site, "acme", "acme/**")
    push_model(site, call_of(site, key), "acme/x", "1", {"a": b"only here"})
    with site.catalog.writing() as conn:
        conn.execute(update(t.blob).values(state="damaged"))
    with pytest.raises(NotFound) as caught:
        site.guard.ngc.checksums(call_of(site, key), ["acme/x"], "1")
    assert caught.value.reason == "damaged"


def test_names_that_would_be_one_model_are_refused(site: Site) -> None:
    with site.catalog.writing() as conn:
        ensure_repository(conn, "ngc/acme/x")
        ensure_repository(conn, "hf/acme/x")  # the same name at two origins is two models
        ensure_repository(conn, "acme/y")
    for name in ("acme/x", "ngc/acme/y", "hf/acme/y"):
        with pytest.raises(Conflict), site.catalog.writing() as conn:
            ensure_repository(conn, name)
