"""Brings the database to a revision of the schema, one process at a time, and ties it to the site whose secrets it was made with.

Here because servers, commands and tests start with it. It makes no database and no table outside migrations/.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Engine, insert, select, text, update
from sqlalchemy.exc import DBAPIError

from artifact.errors import Conflict, Invalid, Unavailable
from registry import tables as t
from registry.database import reading, writing

MIGRATIONS = "airlock_migrations"  # the directory migrations/, under this name where it is installed
ONE_AT_A_TIME = 0x6169726C6F636B  # the advisory lock of PostgreSQL that a migration holds; any number that is always the same
WAIT_S = 600


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(Path(import_module(MIGRATIONS).__path__[0])).replace("%", "%%"))
    return config


def newest() -> str:
    """The revision that this version of the program works with."""
    return str(ScriptDirectory.from_config(_config()).get_current_head())


def revision_of(engine: Engine) -> str:
    """The revision that the database is at; empty for one without tables; raises Unavailable."""
    with reading(engine) as connection:
        return _revision(connection)


def _revision(connection: Connection) -> str:
    return MigrationContext.configure(connection).get_current_revision() or ""


def _known(revision: str) -> None:
    if revision and revision not in {found.revision for found in ScriptDirectory.from_config(_config()).walk_revisions()}:
        raise Conflict(
            f"the database is at revision {revision[:40]}, which this version does not know",
            expected=f"at most {newest()}",
            do="start the version of Airlock that made it, or restore the backup of before",
            reason="schema",
        )


def move(engine: Engine, revision: str = "head") -> str:
    """Brings the database up or down to a revision and returns where it was; raises Invalid, Conflict for a newer one, Unavailable.

    One transaction: whatever fails leaves the database as it was, and processes that start at once migrate it once.
    """
    target = newest() if revision == "head" else revision
    known = [found.revision for found in ScriptDirectory.from_config(_config()).walk_revisions()]  # newest first
    if target not in known:
        raise Invalid(f"there is no revision {target[:40]!r}", expected=", ".join(reversed(known)))
    before = revision_of(engine)
    _known(before)
    if before == target:
        return before
    config = _config()
    try:
        with writing(engine) as connection:
            if engine.dialect.name == "postgresql":
                for name in ("statement_timeout", "lock_timeout"):
                    connection.execute(text(f"SET LOCAL {name} = {WAIT_S * 1000}"))
                connection.execute(text(f"SELECT pg_advisory_xact_lock({ONE_AT_A_TIME})"))
            before = _revision(connection)
            config.attributes["connection"] = connection
            if before in known and known.index(before) < known.index(target):
                command.downgrade(config, target)
            else:
                command.upgrade(config, target)
    except DBAPIError as error:
        raise Unavailable("the schema could not be changed", do="see the log; restore the backup when it lasts", reason="schema") from error
    return before


def claim(engine: Engine, instance: str, peppers: Sequence[bytes]) -> None:
    """Notes whose database this is, or checks it: keys made under another pepper would all be refused; raises Conflict, Unavailable.

    `peppers` is the current one and those that it replaced: a database that knows one of those learns the current one here.
    """
    check, *older = [hmac.new(pepper, b"AIRLOCK site check", hashlib.sha256).hexdigest() for pepper in peppers]
    found = select(t.site.c.instance, t.site.c.pepper_check)
    with reading(engine) as connection:
        row = connection.execute(found).first()
    if row is None:
        with writing(engine) as connection:
            if engine.dialect.name == "postgresql":
                connection.execute(text(f"SELECT pg_advisory_xact_lock({ONE_AT_A_TIME})"))
            row = connection.execute(found).first()
            if row is None:
                connection.execute(insert(t.site).values(instance=instance, pepper_check=check))
                return
    if row.instance != instance:
        raise Conflict(
            "the database belongs to another site",
            expected=f"instance {row.instance}, and this is {instance}",
            do="give every server process the site.json and secrets/ of one site",
            reason="site",
        )
    if row.pepper_check != check:
        if row.pepper_check in older:
            with writing(engine) as connection:
                connection.execute(update(t.site).where(t.site.c.pepper_check == row.pepper_check).values(pepper_check=check))
            return
        raise Conflict(
            "secrets/pepper is not the one of this database, so no key would be accepted", do="restore secrets/ from the backup", reason="pepper"
        )
