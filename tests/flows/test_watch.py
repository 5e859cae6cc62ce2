"""Warnings before an end, and the clock, against real servers: a header at every door, one notice of two servers, a wall clock that jumps."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import delete, insert, select, update

from registry import tables as t
from registry.settings import Settings
from registry.wiring import open_site
from tests.conftest import airlock, missing
from tests.contracts.doors import Door, new_site, serving
from tests.fakes.receiver import receiving
from tests.operated import Operated, operated, wait_for
from tests.services import postgres

pytestmark = pytest.mark.server
DAY = 86400
ROOT = "/airlock/v1"
WARNING = re.compile(r'299 - "[^"]+"(, 299 - "[^"]+")*\Z')


def made(data: Path, *argv: str, **env: str) -> dict[str, Any]:
    """What a command on the data directory prints as JSON."""
    return dict(json.loads(airlock(*argv, "--data", str(data), "--json", **env).stdout))


def key(data: Path, models: str, actions: str, expires: str, **env: str) -> str:
    argv = ("key", "create", "--org", "acme", "--models", models, "--actions", actions, "--expires", expires)
    return str(made(data, *argv, **env)["key"])


# ---- the header


@pytest.fixture(scope="module")
def door(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Door]:
    """A server with a model, and keys that end in 59 and in 61 days, and one whose grant is in grace."""
    data = tmp_path_factory.mktemp("warned") / "data"
    keys = new_site(data)
    keys |= {"soon": key(data, "acme/**", "pull,run,auditor", "59d"), "later": key(data, "acme/**", "pull,run,auditor", "61d")}
    keys["grace"] = key(data, "acme/**", "pull,run,auditor", "never")
    keys["root"] = key(data, "**", "admin", "20d")
    with open_site(Settings.load(data, environ={}), background=False) as site, site.catalog.writing() as conn:
        g, k = t.key_grant.c, t.api_key.c
        graced = select(k.id).where(k.key_id == site.entitlements.principal(keys["grace"]).key_id).scalar_subquery()  # type: ignore[union-attr]
        conn.execute(update(t.key_grant).where(g.api_key_id == graced).values(expires=time.time() - 60, grace_s=DAY))
    with serving(data, keys) as found:
        folder = data.parent / "tiny"
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_bytes(os.urandom(2000))
        env = {**os.environ, "AIRLOCK_KEY": keys["acme"]}
        argv = [str(Path(sys.executable).parent / "airlock"), "model", "push", str(folder), "acme/tiny:1", "--registry", found.url]
        done = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr
        yield found


READS = [
    ("GET", "/v2/acme/tiny/manifests/1"),
    ("HEAD", "/v2/acme/tiny/manifests/1"),
    ("GET", "/v2/acme/tiny/tags/list"),
    ("GET", "/acme/tiny/resolve/main/config.json"),
    ("HEAD", "/acme/tiny/resolve/main/model.safetensors"),
    ("GET", "/api/models/acme/tiny"),
    ("GET", "/api/models/acme/tiny/tree/main"),
    ("GET", f"{ROOT}/catalog/acme/tiny"),
    ("GET", f"{ROOT}/audit"),
]


@pytest.mark.parametrize(("method", "path"), READS)
def test_every_door_warns_in_one_header(door: Door, method: str, path: str) -> None:
    soon = door.ask(method, path, who="soon")
    assert soon.status == 200, soon.body
    assert WARNING.match(soon.headers["warning"]) and re.search(r"the API key ends on .*, in 5[89] days", soon.headers["warning"])
    assert "warning" not in door.ask(method, path, who="later").headers
    graced = door.ask(method, path, who="grace")
    assert graced.status == 200
    if "catalog/" not in path:  # a summary of what may be seen is no use of the grant
        assert "grace ends on" in graced.headers["warning"] and WARNING.match(graced.headers["warning"])


def test_blobs_and_the_administration_warn_too_and_refusals_do_not(door: Door) -> None:
    layers = door.ask("GET", "/v2/acme/tiny/manifests/1", who="soon").json()["layers"]
    for digest in {layer["digest"] for layer in layers}:
        assert "warning" in door.ask("GET", f"/v2/acme/tiny/blobs/{digest}", who="soon").headers
        assert "warning" in door.ask("HEAD", f"/v2/acme/tiny/blobs/{digest}", who="grace").headers
        assert door.ask("GET", f"/v2/acme/tiny/blobs/{digest}", who="grace", Range="bytes=0-0").headers["warning"]
    assert "in 19 days" in door.ask("GET", f"{ROOT}/orgs", who="root").headers["warning"]
    assert "in 19 days" in door.ask("GET", f"{ROOT}/expiring", who="root").headers["warning"]
    assert "warning" not in door.ask("GET", "/v2/acme/nothing/manifests/1", who="soon").headers
    assert "warning" not in door.ask("GET", "/v2/other/x/manifests/1", who="root").headers


# ---- the calendar


def test_the_calendar_over_http_and_on_the_data_directory(door: Door) -> None:
    env = {"AIRLOCK_KEY": door.keys["root"]}
    far = json.loads(airlock("entitlement", "calendar", "--registry", door.url, "--json", **env).stdout)
    here = made(door.data, "entitlement", "calendar")
    assert [i["item"] for i in far["items"]] == [i["item"] for i in here["items"]]
    ends = [i["ends"] for i in far["items"]]
    assert ends == sorted(ends) and {i["kind"] for i in far["items"]} == {"api_key", "grant"}
    text = airlock("entitlement", "calendar", "--registry", door.url, "--days", "30", **env).stdout
    assert text.startswith("KIND") and "api_key" in text and "grace until" in text
    answer = door.ask("GET", f"{ROOT}/expiring?limit=1", who="root").json()
    after = door.ask("GET", f"{ROOT}/expiring?limit=1&after={answer['after'].replace(' ', '%20')}", who="root").json()
    assert answer["items"][0]["item"] != after["items"][0]["item"]
    statuses = {who: door.ask("GET", f"{ROOT}/expiring", who=who).status for who in ("root", "acme", "soon", "reader", "other", "expired")}
    assert statuses == {"root": 200, "acme": 200, "soon": 200, "reader": 403, "other": 403, "expired": 401}
    assert door.ask("GET", f"{ROOT}/expiring", who=None).status == 401
    for bad in ("days=x", "days=-1", "after=x", "limit=x", "org=%00"):
        assert door.ask("GET", f"{ROOT}/expiring?{bad}", who="root").status == 400, bad


AT_ONCE = ("--critical", "-90")


@pytest.mark.parametrize(("given", "state", "word"), [((), 2, "CRITICAL"), (AT_ONCE, 1, "WARNING"), ((*AT_ONCE, "--warning", "-90"), 0, "OK")])
def test_the_calendar_for_monitoring(door: Door, given: tuple[str, ...], state: int, word: str) -> None:
    done = airlock("entitlement", "calendar", "--nagios", *given, "--registry", door.url, check=False, AIRLOCK_KEY=door.keys["root"])
    assert done.returncode == state and done.stdout.startswith(f"{word}: ") and " | ends=" in done.stdout and done.stdout.count("\n") == 1


def test_monitoring_says_unknown_where_nobody_answers() -> None:
    done = airlock("entitlement", "calendar", "--nagios", "--registry", "http://127.0.0.1:1", check=False, AIRLOCK_KEY="x")
    assert done.returncode == 3 and done.stdout.startswith("UNKNOWN: ")


# ---- one notice of two servers


def noted(url: str) -> list[Any]:
    import psycopg

    with psycopg.connect(url) as conn:
        return conn.execute("SELECT kind, item, days, sent_at > 0 FROM notice ORDER BY item, days").fetchall()


def test_two_servers_give_one_notice_and_a_restart_none(tmp_path: Path) -> None:
    url = postgres.shared().database()
    env = {"AIRLOCK_DATABASE": url}
    try:
        keys = new_site(tmp_path / "data", **env)
        key(tmp_path / "data", "acme/**", "pull", "29d", **env)
        with open_site(Settings.load(tmp_path / "data", environ=env), background=False) as site, site.catalog.writing() as conn:
            conn.execute(update(t.api_key).values(created=1.0))  # keys that have lived for long
        with receiving() as receiver, ExitStack() as stack:
            env |= {"AIRLOCK_WEBHOOK": receiver.url}
            for _ in range(2):
                stack.enter_context(serving(tmp_path / "data", keys, **env))
            wait_for(lambda: [row for row in noted(url) if row[3]], "a notice that was sent")
            with serving(tmp_path / "data", keys, **env):
                time.sleep(3)
            sent = [(i["item"], i["threshold"]) for got in receiver.got for i in json.loads(got.body)["items"]]
            rows = noted(url)
        assert len(sent) == len(set(sent)) == len(rows) and all(row[3] for row in rows)
        assert 30 in {row[2] for row in rows}
        lines = [json.loads(line) for line in (tmp_path / "data.log").read_text().splitlines() if '"airlock.watch"' in line]
        logged = [(line["item"], line["threshold"]) for line in lines if "threshold" in line]
        assert sorted(logged) == sorted(sent)
    finally:
        postgres.shared().drop(url)


# ---- the clock


def faked(offset: timedelta) -> dict[str, str]:
    """The environment under which a process sees another wall clock, by libfaketime; its monotonic clock stays true."""
    found = sorted(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"))
    if not found:
        missing("libfaketime")
    seconds = int(offset.total_seconds())
    return {"LD_PRELOAD": str(found[0]), "FAKETIME": f"{seconds:+d}s", "FAKETIME_DONT_FAKE_MONOTONIC": "1", "FAKETIME_NO_CACHE": "1"}


def ready(server: Operated) -> list[str]:
    return list(json.loads(server.operator("/readyz")[1])["warnings"])


def test_a_server_whose_clock_is_moved(tmp_path: Path) -> None:
    data = tmp_path / "data"
    keys = new_site(data)
    keys["month"] = key(data, "acme/**", "pull", "30d")
    ask: Callable[[Operated, str], int] = lambda server, who: server.ask("GET", f"{ROOT}/whoami", who=who).status  # noqa: E731
    with operated(data, keys) as server:
        assert (ask(server, "month"), ask(server, "expired")) == (200, 401) and ready(server) == []
        wait_for(lambda: "airlock_expires_days" in server.operator("/metrics")[1], "figures of what ends")
        figures = server.figures()
        assert 0 < figures['airlock_expires_days{kind="api_key"}'] < 2 and figures['airlock_expired{kind="api_key"}'] == 1
        assert figures["airlock_audit_forked"] == 0 and figures["airlock_clock_behind_seconds"] == 0
        server.process.terminate()
        assert server.ended() == 0
    year = timedelta(days=365)
    with operated(data, keys, **faked(-year)) as server:
        assert (ask(server, "month"), ask(server, "expired")) == (200, 401), "a year back revives nothing"
        assert ready(server) == ["clock_rollback"]
        behind = server.figures()["airlock_clock_behind_seconds"]
        assert 364 * DAY < behind < 366 * DAY
        wait_for(lambda: any(line.get("message") == "the clock was set back" for line in server.lines()), "a log line")
        server.process.terminate()
        assert server.ended() == 0
    with operated(data, keys, **faked(10 * year)) as server:
        assert ask(server, "month") == 401 and ready(server) == ["clock_ahead"]
        server.process.terminate()
        assert server.ended() == 0
    with operated(data, keys) as server:
        assert (ask(server, "month"), ask(server, "expired")) == (200, 401), "ten years ahead ended nothing for ever"
        assert ready(server) == []
        server.process.terminate()
        assert server.ended() == 0
    with open_site(Settings.load(data, environ={}), background=False) as site:
        site.log.settle()
        with site.catalog.reading() as conn:
            found = conn.execute(select(t.audit_leaf.c.body).where(t.audit_leaf.c.event == "clock_rollback")).scalars().all()
        assert len(found) == 1 and abs(site.floor.at - time.time()) < 600
        told = datetime.fromtimestamp(json.loads(str(found[0]))["clock"], UTC)
        assert abs((datetime.now(UTC) - year - told).total_seconds()) < 600


def test_a_site_whose_clock_state_is_deleted_and_set_back(tmp_path: Path) -> None:
    data = tmp_path / "data"
    keys = new_site(data)
    with operated(data, keys) as server:
        assert server.ask("GET", f"{ROOT}/whoami").status == 200
        server.process.terminate()
        assert server.ended() == 0
    with open_site(Settings.load(data, environ={}), background=False) as site, site.catalog.writing() as conn:
        conn.execute(delete(t.clock))
        conn.execute(insert(t.clock).values(name="floor", at=0.0))
    with operated(data, keys, **faked(timedelta(days=-365))) as server:
        assert server.ask("GET", f"{ROOT}/whoami", who="expired").status == 401 and ready(server) == ["clock_rollback"]


def test_a_clock_that_is_right_is_believed_when_somebody_says_so(tmp_path: Path) -> None:
    data = tmp_path / "data"
    new_site(data)
    late = faked(timedelta(days=40))
    for argv, days in (((), 0), (("--clock-is-right", "--dry-run"), 0), (("--clock-is-right",), 40)):
        airlock("gc", "--data", str(data), *argv, check=False, **late)
        with open_site(Settings.load(data, environ={}), background=False) as site:
            assert abs(site.floor.at - time.time() - days * DAY) < 600, argv
