"""The engine over both databases: what each failure is called, what recovers by itself, and the schema up and down over rows."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection, insert, select, text, update
from sqlalchemy.engine import Engine
from sqlalchemy.exc import IntegrityError

from artifact.cli import run
from artifact.errors import AirlockError, Conflict, Invalid, Unavailable
from registry import database as d
from registry import schema
from registry import tables as t
from registry.commands.migrate import main
from registry.home import Home
from registry.settings import Settings
from registry.wiring import migrate, open_site, sole_server
from tests.services import postgres
from tests.services.postgres import Postgres
from tests.site import BACKENDS, new_database

SECRET = "s3cr3t-of-the-database"


@pytest.fixture
def url(tmp_path: Path) -> Iterator[str]:
    """A migrated database of the run's PostgreSQL."""
    made = new_database(tmp_path)
    yield made
    postgres.shared().drop(made)


@pytest.fixture
def own() -> Iterator[Postgres]:
    """A server of this test alone, which it may stop and kill."""
    server = Postgres.make(connections=25)
    yield server
    server.remove()


@pytest.fixture(params=BACKENDS)
def empty(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Settings]:
    """A site whose database has no table yet."""
    Home.open(tmp_path / "data", create=True)
    if request.param == "sqlite":
        yield Settings.load(tmp_path / "data", environ={})
        return
    made = postgres.shared().database()
    yield Settings.load(tmp_path / "data", environ={"AIRLOCK_DATABASE": made})
    postgres.shared().drop(made)


def one(engine: Engine) -> int:
    with d.reading(engine) as conn:
        return int(conn.execute(text("SELECT 1")).scalar_one())


def failure(use: Callable[[], object]) -> AirlockError:
    """The error of ours that `use` raises; nothing secret is in it or in what it was made from."""
    with pytest.raises(AirlockError) as caught:
        use()
    assert SECRET not in repr(caught.value) + str(caught.value) + str(caught.value.as_dict())
    return caught.value


def eventually(use: Callable[[], Any], within: float = 60) -> Any:
    """What `use` returns once the database answers again."""
    end = time.monotonic() + within
    while True:
        try:
            return use()
        except Unavailable:
            if time.monotonic() > end:
                raise
        time.sleep(0.05)


@pytest.mark.parametrize("url", ["mysql://a:s3cr3t-of-the-database@h/x", "nonsense", "postgresql://u:s3cr3t-of-the-database@h:port/x", "://", ""])
def test_urls_that_are_no_database(url: str) -> None:
    assert isinstance(failure(lambda: d.open_engine(url)), Invalid)


@pytest.mark.parametrize("size", ["0", "1", "x", "10000", "-1", "٣"])
def test_pool_sizes_that_are_refused(size: str) -> None:
    assert isinstance(failure(lambda: d.open_engine(f"postgresql://u:{SECRET}@h/x?pool_size={size}")), Invalid)


@pytest.mark.server
def test_what_a_connection_that_is_not_made_is_called(own: Postgres, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cases = {
        own.url("absent"): "database_absent",
        own.url("postgres", user="nobody"): "database_credentials",
        f"postgresql://u:{SECRET}@127.0.0.1:1/x": "database_down",
        f"postgresql://u:{SECRET}@no-such-host.invalid/x": "database_down",
        own.url("postgres") + f"?password_file={tmp_path / 'none'}": "database_credentials",
    }
    with caplog.at_level(logging.WARNING):
        for url, reason in cases.items():
            engine = d.open_engine(url)
            error = failure(lambda engine=engine: one(engine))
            assert isinstance(error, Unavailable) and error.reason == reason and error.do
            assert SECRET not in repr(engine) + str(engine.url)
            engine.dispose()
    assert SECRET not in caplog.text and "Connection refused" in caplog.text


@pytest.mark.server
def test_the_password_comes_from_a_file_that_may_change(own: Postgres, tmp_path: Path) -> None:
    own.sql(f"CREATE ROLE airlock LOGIN PASSWORD '{SECRET}'")
    (own.folder / "d" / "pg_hba.conf").write_text("host all postgres all trust\nhost all all all scram-sha-256\n")
    own.end()
    own.start()
    file = tmp_path / "password"
    file.write_text("wrong\n")
    engine = d.open_engine(own.url("postgres", user="airlock") + f"?password_file={file}&sslmode=disable")
    assert failure(lambda: one(engine)).reason == "database_credentials"
    file.write_text(SECRET + "\n")
    assert one(engine) == 1
    engine.dispose()


@pytest.mark.server
def test_a_restarted_and_a_killed_server_come_back_without_a_hand(own: Postgres) -> None:
    engine = d.open_engine(own.url("postgres"))
    own.sql("CREATE TABLE kept (n int)")
    for n, sign in enumerate((signal.SIGINT, signal.SIGKILL)):
        with d.writing(engine) as conn:
            conn.execute(text(f"INSERT INTO kept VALUES ({n})"))
        own.end(sign)
        for use in (lambda: one(engine), lambda: d.retried(engine, lambda conn: conn.execute(text("INSERT INTO kept VALUES (9)")))):
            assert failure(use).reason == "database_down"
        own.start()
        assert eventually(lambda: one(engine)) == 1

    def cut_off() -> None:
        with d.writing(engine) as conn:
            conn.execute(text("INSERT INTO kept VALUES (7)"))
            own.end()
            own.start()
            conn.execute(text("INSERT INTO kept VALUES (8)"))

    assert failure(cut_off).reason == "database_down"
    with d.reading(engine) as conn:
        assert list(conn.execute(text("SELECT n FROM kept ORDER BY n")).scalars()) == [0, 1]
    engine.dispose()


@pytest.mark.server
def test_an_idle_connection_that_the_server_closed_is_never_used(own: Postgres) -> None:
    engine = d.open_engine(own.url("postgres"))
    assert one(engine) == 1
    own.end()
    own.start()
    assert one(engine) == 1  # no failure in between: the first statement after the restart already works
    engine.dispose()


@pytest.mark.server
def test_too_many_connections(own: Postgres) -> None:
    engines = [d.open_engine(own.url("postgres") + "?pool_size=15") for _ in range(2)]
    held = []
    with pytest.raises(Unavailable) as caught:
        for engine in engines * 20:
            context = d.reading(engine)
            context.__enter__().execute(text("SELECT 1"))
            held.append(context)
    assert caught.value.reason == "database_busy"
    for context in held:
        context.__exit__(None, None, None)
    assert one(engines[1]) == 1
    for engine in engines:
        engine.dispose()


@pytest.mark.server
def test_every_connection_of_the_pool_in_use(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(d, "POOL_TIMEOUT_S", 0.2)
    engine = d.open_engine(url + "?pool_size=2")
    with d.reading(engine), d.reading(engine):
        assert failure(lambda: one(engine)).reason == "database_busy"
    assert one(engine) == 1
    engine.dispose()


@pytest.mark.server
@pytest.mark.parametrize(
    ("prepare", "statement", "reason"),
    [
        ("SET default_transaction_read_only = on", "INSERT INTO job (name) VALUES ('x')", "database_read_only"),
        ("SET statement_timeout = 100", "SELECT pg_sleep(60)", "database_busy"),
        ("SELECT 1", "SELECT * FROM no_such_table", "schema"),
        ("SELECT 1", "SELECT pg_terminate_backend(pg_backend_pid())", "database_down"),
        ("CREATE ROLE nobody_{n}; SET ROLE nobody_{n}", "SELECT * FROM job", "database_credentials"),
    ],
)
def test_what_a_refused_statement_is_called(url: str, prepare: str, statement: str, reason: str) -> None:
    engine = d.open_engine(url)

    def use() -> None:
        with engine.connect() as before, before.begin():
            before.execute(text(prepare.replace("{n}", os.urandom(4).hex()).replace("SET ", "SET SESSION ", 1)))
        with d.writing(engine) as conn:  # the pool gives the same connection again
            conn.execute(text(statement))

    assert failure(use).reason == reason
    engine.dispose()


@pytest.mark.server
def test_a_deadlock_is_run_again(url: str) -> None:
    engine = d.open_engine(url)
    with d.writing(engine) as conn:
        conn.execute(insert(t.job), [{"name": "a"}, {"name": "b"}])
    both, runs = threading.Barrier(2), []

    def swap(first: str, second: str) -> None:
        def work(conn: Connection) -> None:
            runs.append(first)
            conn.execute(update(t.job).where(t.job.c.name == first).values(cursor=t.job.c.cursor + first))
            if len(runs) <= 2:
                both.wait(60)
            conn.execute(update(t.job).where(t.job.c.name == second).values(cursor=t.job.c.cursor + first))

        d.retried(engine, work)

    threads = [threading.Thread(target=swap, args=pair) for pair in (("a", "b"), ("b", "a"))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    with d.reading(engine) as conn:
        cursors = list(conn.execute(select(t.job.c.cursor)).scalars())
    assert len(runs) == 3 and [sorted(c) for c in cursors] == [["a", "b"], ["a", "b"]]
    engine.dispose()


@pytest.mark.slow
@pytest.mark.parametrize("value", ["a\0b", "\ud800", 2**63, 2**80])
def test_values_that_no_column_holds_are_the_senders_fault(empty: Settings, value: object) -> None:
    migrate(empty)
    engine = d.open_engine(empty.database_url)

    def use() -> None:
        with d.writing(engine) as conn:
            column = {"quota_bytes": value, "name": "x"} if isinstance(value, int) else {"name": value}
            conn.execute(insert(t.org).values(created=0, **column))

    if value == "a\0b" and engine.dialect.name == "sqlite":
        use()
    else:
        assert isinstance(failure(use), Invalid)
    with d.writing(engine) as conn:
        conn.execute(insert(t.org).values(name="big", created=0, quota_bytes=2**63 - 1))
    with d.reading(engine) as conn:
        assert conn.execute(select(t.org.c.quota_bytes).where(t.org.c.name == "big")).scalar_one() == 2**63 - 1
    engine.dispose()


def test_names_compare_by_bytes(empty: Settings) -> None:
    migrate(empty)
    engine = d.open_engine(empty.database_url)
    names = ["a", "B", "é", "Z", "a-b", "a_b", "ab", "a/b", "\U0001f600", "ÿ"]
    with d.writing(engine) as conn:
        conn.execute(insert(t.org), [{"name": n, "created": 0} for n in names])
    with d.reading(engine) as conn:
        assert list(conn.execute(select(t.org.c.name).order_by(t.org.c.name)).scalars()) == sorted(names, key=str.encode)
        assert list(conn.execute(select(t.org.c.name).where(t.org.c.name > "a-b", t.org.c.name < "b")).scalars())
    engine.dispose()


def fill_0001(engine: Engine) -> None:
    """A row in each table that the next revision changes and in those that refer to them, as the first version wrote them."""
    with d.writing(engine) as conn:
        for statement in (
            "INSERT INTO org (id, name, display, created) VALUES (7, 'acme', 'Acme', 1.5)",
            "INSERT INTO repository (id, name, org_id) VALUES (8, 'acme/x', 7)",
            "INSERT INTO blob (digest, size, location) VALUES ('sha256:b', 5000000000, 'sha256/b')",
            "INSERT INTO repo_blob (repo_id, digest) VALUES (8, 'sha256:b')",
            "INSERT INTO manifest (id, digest, media_type, size, raw) VALUES (9, 'sha256:m', 't', 2, '{}')",
            "INSERT INTO repo_manifest (repo_id, manifest_id) VALUES (8, 9)",
            "INSERT INTO edge (parent_id, child_digest, kind, blob) VALUES (9, 'sha256:b', 'layer', 'sha256:b')",
            "INSERT INTO ref (repo_id, name, manifest_id) VALUES (8, '1', 9)",
            "INSERT INTO garbage (location, delete_after) VALUES ('sha256/g', 9.0)",
            "INSERT INTO api_key (id, key_id, hmac, org_id, tier, created) VALUES (5, 'key-a', 'h', 7, 'developer', 1)",
            "INSERT INTO key_grant (id, api_key_id, models, actions, expires, grace_s) VALUES (11, 5, '[\"acme/*\"]', '[\"pull\"]', 4e9, 7)",
            "INSERT INTO audit_pending (class, ts, body) VALUES ('A', 2.5, '{}')",
        ):
            conn.execute(text(statement))


ROWS = (
    "SELECT o.name, o.display, r.name, m.digest, b.size, f.name, g.delete_after FROM org o JOIN repository r ON r.org_id = o.id "
    "JOIN ref f ON f.repo_id = r.id JOIN manifest m ON m.id = f.manifest_id JOIN edge e ON e.parent_id = m.id "
    "JOIN blob b ON b.digest = e.blob JOIN repo_blob rb ON rb.digest = b.digest AND rb.repo_id = r.id CROSS JOIN garbage g"
)
RIGHTS = (
    "SELECT k.key_id, g.id, g.models, g.expires, g.grace_s, a.ts FROM api_key k JOIN key_grant g ON g.api_key_id = k.id CROSS JOIN audit_pending a"
)


def test_rows_survive_up_down_and_up_again(empty: Settings) -> None:
    migrate(empty, "0001")
    engine = d.open_engine(empty.database_url)
    fill_0001(engine)
    engine.dispose()
    for revision in ("head", "0001", "head"):
        migrate(empty, revision)
        with d.reading(engine) as conn:
            assert [tuple(row) for row in conn.execute(text(ROWS))] == [("acme", "Acme", "acme/x", "sha256:m", 5000000000, "1", 9.0)]
            assert [tuple(row) for row in conn.execute(text(RIGHTS))] == [("key-a", 11, '["acme/*"]', 4e9, 7, 2.5)]
    with d.reading(engine) as conn:
        assert conn.execute(select(t.org.c.quota_bytes)).scalar_one() == 0 and conn.execute(select(t.manifest.c.gc_after)).scalar_one() is None
    with d.writing(engine) as conn:  # keys and foreign keys still hold after the way down and up
        conn.execute(insert(t.org).values(name="next", created=0))
        own = {"grant_id": "grant-x", "org_id": 7, "models": "[]", "actions": "[]"}
        assert conn.execute(insert(t.key_grant).values(team_id=None, **own)).inserted_primary_key == (12,)
    with pytest.raises((IntegrityError, Conflict)), d.writing(engine) as conn:
        conn.execute(insert(t.ref).values(repo_id=999, name="x", manifest_id=9))
    assert schema.revision_of(engine) == schema.newest()
    engine.dispose()
    open_site(empty, background=False).close()


def fill_0003(conn: Connection) -> None:
    """Rows that only the third version has: people, bounds of grants, a document, a revocation list, leases, a log of two leaves."""
    for statement in (
        "INSERT INTO org (id, name, created, closed_at) VALUES (8, 'gone', 1, 40)",
        "INSERT INTO member (id, org_id, name, created, disabled_at) VALUES (1, 7, 'left', 1, 30), (2, 7, 'stays', 1, 0)",
        "INSERT INTO team (id, org_id, name, created) VALUES (1, 7, 'research', 1)",
        "INSERT INTO team_member (team_id, member_id) VALUES (1, 2)",
        "INSERT INTO api_key (id, key_id, hmac, org_id, tier, created, member_id) VALUES (21, 'key-left', 'h1', 7, 'developer', 1, 1), "
        "(22, 'key-stays', 'h2', 7, 'developer', 1, 2), (23, 'key-gone', 'h3', 8, 'developer', 1, NULL), "
        "(24, 'key-listed', 'h4', 7, 'developer', 1, NULL)",
        "INSERT INTO key_grant (id, api_key_id, team_id, models, actions, grant_id, org_id, gpus, profiles, revoked_at) VALUES "
        "(31, 22, NULL, '[\"a/*\"]', '[\"pull\"]', 'g-own', 7, 0, '[]', 0), (32, 22, NULL, '[\"b/*\"]', '[\"run\"]', 'g-gpus', 7, 2, '[]', 0), "
        "(33, 22, NULL, '[\"c/*\"]', '[\"run\"]', 'g-profile', 7, 0, '[\"p\"]', 0), "
        "(34, 22, NULL, '[\"d/*\"]', '[\"pull\"]', 'g-ended', 7, 0, '[]', 9), "
        "(35, NULL, 1, '[\"e/*\"]', '[\"pull\"]', 'g-team', 7, 0, '[]', 0)",
        "INSERT INTO revocation (kind, value, issuer, serial, at) VALUES ('key_id', 'key-listed', 'i', 1, 50)",
        "INSERT INTO entitlement (id, org_id, jti, issuer, kid, serial, tier, models, actions, iat, not_before, expires, token, at) "
        "VALUES (1, 7, 'j', 'i', 'k', 1, 'enterprise', '[]', '[]', 1, 1, 9e9, 't', 1)",
        "UPDATE org SET entitlement_id = 1 WHERE id = 7",
        "INSERT INTO audit_leaf (idx, leaf_hash, body, class, ts) VALUES (0, 'h', '{\"event\":\"first\"}', 'A', 3), "
        "(1, 'h', '{\"event\":\"second\"}', 'B', 4)",
    ):
        conn.execute(text(statement.replace(":", "\\:")))


@pytest.mark.slow
def test_no_right_grows_and_no_event_is_lost_on_the_way_down(empty: Settings) -> None:
    migrate(empty, "0001")
    engine = d.open_engine(empty.database_url)
    fill_0001(engine)
    migrate(empty)
    with d.writing(engine) as conn:
        fill_0003(conn)
    keys = "SELECT key_id, revoked_at FROM api_key WHERE key_id <> 'key-a' ORDER BY key_id"
    grants = "SELECT models FROM key_grant WHERE id > 30 ORDER BY id"
    for revision in ("0002", "head", "0001", "head"):
        migrate(empty, revision)
        with d.reading(engine) as conn:
            assert [tuple(row) for row in conn.execute(text(keys))] == [("key-gone", 40), ("key-left", 30), ("key-listed", 50), ("key-stays", 0)]
            assert list(conn.execute(text(grants)).scalars()) == ['["a/*"]']
            bodies = list(conn.execute(text("SELECT body FROM audit_pending ORDER BY id")).scalars())
            assert bodies == ["{}", '{"event":"first"}', '{"event":"second"}']
            assert [tuple(row) for row in conn.execute(text(ROWS))] == [("acme", "Acme", "acme/x", "sha256:m", 5000000000, "1", 9.0)]
    engine.dispose()
    open_site(empty, background=False).close()


def test_the_command(empty: Settings, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AIRLOCK_DATABASE", empty.database)
    where = ["--data", str(empty.data), "--json"]
    said = []
    for words in ([], [], ["--to", "0001"], ["--to", "head"]):
        assert run(main, [*words, *where]) == 0
        said.append(json.loads(capsys.readouterr().out))
    newest = schema.newest()
    pairs = (("", newest), (newest, newest), (newest, "0001"), ("0001", newest))
    assert said == [{"from": before, "to": after} for before, after in pairs]
    assert run(main, ["--to", "7", *where]) == 6 and "there is no revision" in capsys.readouterr().err


def test_a_newer_database_and_unknown_revisions(empty: Settings) -> None:
    migrate(empty)
    assert isinstance(failure(lambda: migrate(empty, "0000")), Invalid)
    engine = d.open_engine(empty.database_url)
    with d.writing(engine) as conn:
        conn.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    engine.dispose()
    error = failure(lambda: open_site(empty))
    assert isinstance(error, Conflict) and error.reason == "schema" and "9999" in str(error)


@pytest.mark.slow
def test_processes_that_start_at_once_migrate_once(empty: Settings) -> None:
    code = "import sys; from registry.settings import Settings; from registry.wiring import migrate; migrate(Settings.load(sys.argv[1]))"
    env = {**os.environ, "AIRLOCK_DATABASE": empty.database}
    several = [subprocess.Popen([sys.executable, "-c", code, str(empty.data)], cwd="/", env=env) for _ in range(3)]
    assert [p.wait(120) for p in several] == [0, 0, 0]
    open_site(empty, background=False).close()


@pytest.mark.slow
def test_one_server_over_sqlite_and_any_number_over_postgresql(empty: Settings) -> None:
    with sole_server(empty):
        if empty.database:
            with sole_server(empty):
                return
        error = failure(lambda: sole_server(empty).__enter__())
    assert isinstance(error, Conflict) and "SQLite" in str(error)
    with sole_server(empty):
        open_site(empty, background=False).close()  # commands beside the server work


@pytest.mark.server
def test_no_second_database_appears_beside_the_first(tmp_path: Path, url: str) -> None:
    data = tmp_path / "data"
    settings = Settings.load(data, environ={"AIRLOCK_DATABASE": url})
    open_site(settings, background=False).close()
    error = failure(lambda: open_site(Settings.load(data, environ={})))
    assert isinstance(error, Conflict) and error.reason == "database" and not (data / "registry.db").exists()
    Home.open(tmp_path / "lite", create=True)
    open_site(Settings.load(tmp_path / "lite", environ={}), background=False).close()
    assert failure(lambda: open_site(Settings.load(tmp_path / "lite", environ={"AIRLOCK_DATABASE": url}))).reason == "database"
    Home.open(tmp_path / "other", create=True)
    assert failure(lambda: open_site(Settings.load(tmp_path / "other", environ={"AIRLOCK_DATABASE": url}))).reason == "site"
    Home.open(tmp_path / "fresh", create=True)
    assert isinstance(failure(lambda: open_site(Settings.load(tmp_path / "fresh", environ={"AIRLOCK_DATABASE": "sqlite:///x.db"}))), Invalid)


@pytest.mark.slow
def test_sqlite_that_another_process_holds_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(d, "BUSY_TIMEOUT_S", 1)
    Home.open(tmp_path / "data", create=True)
    settings = Settings.load(tmp_path / "data", environ={})
    migrate(settings)
    code = "import sqlite3, sys; c = sqlite3.connect(sys.argv[1]); c.execute('BEGIN EXCLUSIVE'); print('held', flush=True); sys.stdin.read()"
    argv = [sys.executable, "-c", code, str(tmp_path / "data/registry.db")]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None and other.stdin is not None and other.stdout.readline() == b"held\n"
        engine = d.open_engine(settings.database_url)

        def use() -> None:
            with d.writing(engine) as conn:
                conn.execute(insert(t.org).values(name="x", created=0))

        assert isinstance(failure(use), Unavailable)
        other.stdin.close()
        other.wait(60)
        use()
        engine.dispose()
