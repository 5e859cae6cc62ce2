"""The engine over SQLite or PostgreSQL, the two kinds of transaction, and the words for a database that does not answer.

It knows no table. A driver's own text goes to the log, never to a caller: it may name hosts, users and parts of statements.
"""

from __future__ import annotations

import logging
import select
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import psycopg
from sqlalchemy import URL, Connection, Engine, create_engine, event, make_url, text
from sqlalchemy.exc import ArgumentError, DataError, DBAPIError, IntegrityError, InvalidatePoolError, OperationalError, ProgrammingError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from artifact.errors import AirlockError, Conflict, Invalid, Unavailable
from registry.home import free_bytes

BUSY_TIMEOUT_S = 30
POOL = 40  # at least as large as the limiter of the threads that serve requests
MIN_POOL, MAX_POOL = 2, 1000  # an import reads while it writes
CONNECT_TIMEOUT_S = 10
STATEMENT_TIMEOUT_S = 60
POOL_TIMEOUT_S = 15
RECYCLE_S = 1800  # so that connections come back to a server that took over
ATTEMPTS = 5
ADVICE_S = 0.02
LOG = logging.getLogger("airlock.database")
T = TypeVar("T")

# What PostgreSQL's codes mean for whoever asked (PostgreSQL 15 manual, appendix A): the class of two characters, or the whole code.
_BUSY = ("53300", "53200", "53400", "55P03", "57014")
_AGAIN = ("40001", "40P01")
# A refused connection carries no code; libpq says these words in the server's language, so the list is a hint and not a decision.
_REFUSED = (
    (("too many clients", "remaining connection slots", "too many connections"), "too_many"),
    (("authentication failed", "no password supplied", "no pg_hba.conf entry", "role "), "credentials"),
    (("does not exist",), "absent"),
)


def open_engine(url: str) -> Engine:
    """An engine for `sqlite:///FILE` or `postgresql://…`: SQLite with WAL, synchronous FULL and foreign keys; raises Invalid, Unavailable."""
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError) as error:
        raise Invalid("the database's URL cannot be read", expected="postgresql://USER@HOST:PORT/NAME") from error
    backend = parsed.drivername.split("+")[0]
    if backend == "sqlite":
        engine = create_engine(
            parsed,
            pool_size=POOL,
            max_overflow=POOL,
            hide_parameters=True,
            connect_args={"timeout": BUSY_TIMEOUT_S, "check_same_thread": False},
        )
        event.listen(engine, "connect", _configure)
        event.listen(engine, "begin", _begin)
    elif backend in ("postgresql", "postgres"):
        engine = _open_postgresql(parsed)
    else:
        raise Invalid(f"there is no database {backend[:40]!r} here", expected="postgresql://…, or nothing for SQLite in the data directory")
    event.listen(engine, "handle_error", _refuse_values)
    return engine


def _open_postgresql(url: URL) -> Engine:
    """An engine whose pool throws away connections that a restarted server closed, before they are used."""
    query: dict[str, Any] = dict(url.query)
    pool, password_file = query.pop("pool_size", str(POOL)), query.pop("password_file", "")
    if not str(pool).isascii() or not str(pool).isdigit() or not MIN_POOL <= int(pool) <= MAX_POOL:
        raise Invalid("pool_size in AIRLOCK_DATABASE is no number of connections", expected=f"{MIN_POOL} to {MAX_POOL}")
    limits = f"-c statement_timeout={STATEMENT_TIMEOUT_S * 1000} -c lock_timeout={BUSY_TIMEOUT_S * 1000} -c TimeZone=UTC"
    limits += f" -c idle_in_transaction_session_timeout={STATEMENT_TIMEOUT_S * 1000} -c client_encoding=UTF8"
    given: dict[str, Any] = {"connect_timeout": CONNECT_TIMEOUT_S, "application_name": "airlock", "keepalives_idle": 30, "tcp_user_timeout": 30000}
    given |= query | {"options": f"{limits} {query.get('options', '')}".strip()}
    engine = create_engine(
        url.set(drivername="postgresql+psycopg", query={}),
        pool_size=int(pool),
        max_overflow=0,
        pool_timeout=POOL_TIMEOUT_S,
        pool_recycle=RECYCLE_S,
        pool_use_lifo=True,
        isolation_level="READ COMMITTED",
        hide_parameters=True,
        connect_args=given,
    )
    event.listen(engine, "checkout", _fresh)
    if password_file:
        event.listen(engine, "do_connect", lambda _dialect, _record, _args, params: params.update(password=_password(str(password_file))))
    return engine


def _password(path: str) -> str:
    """The password, read at each new connection so that it can be changed without a restart."""
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeError) as error:
        raise Unavailable(f"the database's password file {path} cannot be read", do="let this user read it", reason="database_credentials") from error


def _fresh(connection: psycopg.Connection[Any], _record: object, _proxy: object) -> None:
    """Refuses a pooled connection on which the server has spoken while it was idle, that is said goodbye: no round trip, unlike a ping."""
    try:
        watch = select.poll()
        watch.register(connection.fileno(), select.POLLIN)
        spoke = bool(watch.poll(0))
    except (OSError, psycopg.Error):
        spoke = True
    if spoke:
        raise InvalidatePoolError("the server closed this connection")


def is_postgresql(url: str) -> bool:
    """Whether a database URL is one of PostgreSQL, which several server processes may share."""
    return url.split(":", 1)[0].split("+", 1)[0] in ("postgresql", "postgres")


def _configure(connection: sqlite3.Connection, _record: object) -> None:
    connection.isolation_level = None  # the driver's own implicit BEGIN would be a deferred one
    _to_wal(connection)
    for pragma in ("synchronous=FULL", "foreign_keys=ON", "temp_store=MEMORY"):
        connection.execute(f"PRAGMA {pragma}")


def _to_wal(connection: sqlite3.Connection) -> None:
    """WAL mode, waited for up to BUSY_TIMEOUT_S: SQLite answers two processes that switch one file at once with BUSY, without its busy handler."""
    end = time.monotonic() + BUSY_TIMEOUT_S
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > end:
                raise
        time.sleep(0.02)


def _begin(connection: Connection) -> None:
    if connection.get_execution_options().get("writes"):
        begin = "BEGIN IMMEDIATE"
        try:
            connection.connection.execute(begin)  # on the DBAPI connection: not counted as a statement
        except sqlite3.Error as error:  # SQLAlchemy wraps only what its own cursors raise
            raise OperationalError(begin, None, error) from error


def _refuse_values(context: Any) -> None:
    """Turns the drivers' refusals of a value (a NUL, a lone surrogate, more than 64 bits) into Invalid: they come from input, not from us."""
    if isinstance(context.original_exception, UnicodeError | OverflowError | psycopg.DataError):
        raise Invalid(
            "a text or number of the request cannot be stored",
            expected="text without NUL and lone surrogates, whole numbers below 2^63",
            reason="value",
        ) from context.original_exception


@contextmanager
def reading(engine: Engine) -> Iterator[Connection]:
    """A connection for one read statement, outside any transaction; raises Unavailable when the database does not answer."""
    try:
        with engine.connect() as connection:
            if engine.dialect.name == "postgresql":
                connection = connection.execution_options(isolation_level="AUTOCOMMIT")  # no BEGIN and ROLLBACK on the wire
            yield connection
    except (DBAPIError, PoolTimeout) as error:
        raise _unavailable(engine, error) from _cause(error)


@contextmanager
def writing(engine: Engine) -> Iterator[Connection]:
    """One write transaction, all or nothing; raises Unavailable when the database is locked, full or gone, Conflict when another was faster."""
    try:
        with engine.connect().execution_options(writes=True) as connection, connection.begin():
            yield connection
    except (DBAPIError, PoolTimeout) as error:
        raise _unavailable(engine, error) from _cause(error)


def retried(engine: Engine, work: Callable[[Connection], T]) -> T:
    """What `work` returns in one write transaction, run again from the start when the database ended it for another's sake (a deadlock)."""
    for attempt in range(1, ATTEMPTS + 1):
        try:
            with writing(engine) as connection:
                return work(connection)
        except (Conflict, Unavailable) as error:
            if error.reason != "database_conflict" or attempt == ATTEMPTS:
                raise
            time.sleep(ADVICE_S * attempt)
    raise AssertionError("the last attempt raises")


def alone(connection: Connection, *words: str) -> None:
    """On PostgreSQL waits until no other transaction holds these words, and holds them to the end of this one; a writer of SQLite is alone anyway."""
    if connection.dialect.name == "postgresql":
        connection.execute(text("SELECT pg_advisory_xact_lock(hashtextextended(:words, 0))"), {"words": "\n".join(words)})


def _cause(error: DBAPIError | PoolTimeout) -> BaseException:
    return error if isinstance(error, PoolTimeout) or error.orig is None else error.orig


def _unavailable(engine: Engine, error: DBAPIError | PoolTimeout) -> Exception:
    if isinstance(error, PoolTimeout):
        return Unavailable("every connection to the database is in use", do="retry; raise pool_size when it lasts", reason="database_busy")
    if engine.dialect.name == "postgresql":
        return _postgresql_words(error)
    if isinstance(error, IntegrityError | ProgrammingError):
        return error  # a defect of ours, not a database that does not answer
    cause = str(error.orig)[:200] if error.orig else "no answer"
    code = getattr(error.orig, "sqlite_errorcode", 0) & 0xFF  # the primary code; the upper bits only say where
    if code in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR):
        free = free_bytes(Path(engine.url.database or ".").parent)
        return Unavailable(
            f"the database cannot be written: {cause}; its disk has {free} bytes free",
            do="free space, then the same command again",
            reason="disk_full",
        )
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return Unavailable("another process holds the database", do="retry; stop what holds registry.db", reason="database_busy")
    if code in (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT):
        return Unavailable(f"the database is damaged: {cause}", do="restore it from the backup", reason="damaged")
    return Unavailable(f"the database did not take the statement: {cause}", do="retry; see free space and locks of the data directory")


def _postgresql_words(error: DBAPIError) -> Exception:
    """Our words for a failure that PostgreSQL or the way to it caused; an error of a statement itself is a defect of ours and stays."""
    code = str(getattr(error.orig, "sqlstate", None) or "")
    if code in ("42P01", "42703"):
        return Unavailable("the database is not at this version's schema", do="airlock registry migrate", reason="schema")
    if code == "42501":
        return Unavailable("the database's user may not do this", do="make it the owner of the database", reason="database_credentials")
    if isinstance(error, ProgrammingError | DataError) and code[:2] not in ("25", "3D"):
        return error
    if isinstance(error, IntegrityError):
        if code not in ("23503", "23505"):
            return error
        return Conflict("another request changed the same thing at this moment", do="retry", reason="database_conflict")
    said = str(error.orig)
    LOG.warning("database: %s %s", code or "no answer", said.splitlines()[0][:300] if said else "")
    if code in _AGAIN:
        return Unavailable("the database ended this change for another one's sake", do="retry", reason="database_conflict")
    if code in ("53100", "58030"):
        return Unavailable(
            "the database cannot be written: its disk is full or fails", do="free space at the database, then retry", reason="disk_full"
        )
    if code[:2] == "25":
        return Unavailable("the database takes no changes now", do="name the primary server in AIRLOCK_DATABASE", reason="database_read_only")
    if code in _BUSY:
        return Unavailable("the database is too busy to answer", do="retry", reason="database_busy")
    if code[:2] == "XX":
        return Unavailable("the database is damaged", do="see its log; restore it from the backup", reason="damaged")
    refused = next((kind for words, kind in _REFUSED if not code and any(word in said for word in words)), "")
    return _refused(refused if not code or code[:2] in ("08", "57") else "other")


def _refused(kind: str) -> AirlockError:
    """The error for a connection that was not made, or that ended."""
    if kind == "too_many":
        return Unavailable("the database has no free connection", do="retry; lower pool_size or raise max_connections", reason="database_busy")
    if kind == "credentials":
        return Unavailable("the database refuses this user", do="check user and password of AIRLOCK_DATABASE", reason="database_credentials")
    if kind == "absent":
        return Unavailable("there is no such database on that server", do="createdb NAME, or check AIRLOCK_DATABASE", reason="database_absent")
    if kind == "other":
        return Unavailable("the database did not take the statement", do="retry; see the database's log", reason="database")
    return Unavailable("the database does not answer", do="retry: the connection is made again by itself; see that it runs", reason="database_down")
