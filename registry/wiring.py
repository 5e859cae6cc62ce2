"""Puts the parts of one site together over its data directory, and brings its database to the newest schema; nothing is decided here."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from alembic import command
from alembic.config import Config
from sqlalchemy import Engine
from sqlalchemy.exc import DatabaseError

from artifact.errors import Unavailable
from registry.audit import Audit
from registry.blobs.file import FileBlobs
from registry.catalog import Catalog
from registry.entitlements import Entitlements
from registry.guard import Guard
from registry.home import Home
from registry.library import Library
from registry.settings import Settings
from registry.tables import open_engine, writing

MIGRATIONS = "airlock_migrations"  # the directory migrations/, under this name where it is installed
LOG = logging.getLogger("airlock.registry")


@dataclass(frozen=True)
class Site:
    """The open parts of one registry."""

    settings: Settings
    home: Home
    engine: Engine
    catalog: Catalog
    entitlements: Entitlements
    audit: Audit
    blobs: FileBlobs
    library: Library
    guard: Guard
    inode: int

    def check(self) -> None:
        """Returns while the open database is the one in the data directory; raises Unavailable once it was removed or replaced."""
        if _inode(self.home) != self.inode:
            raise Unavailable("registry.db was removed or replaced under the running server", do="restore it from the backup, then start again")

    def close(self) -> None:
        """Stores the last audit counts and closes the database."""
        try:
            self.audit.close()
        finally:
            self.engine.dispose()

    def __enter__(self) -> Site:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _inode(home: Home) -> int:
    try:
        return home.database_path.stat().st_ino
    except OSError:
        return 0


def _upgrade(engine: Engine) -> None:
    config = Config()
    config.set_main_option("script_location", str(Path(import_module(MIGRATIONS).__path__[0])).replace("%", "%%"))
    with writing(engine) as connection:  # one write transaction: two processes that start at once run the migration once
        config.attributes["connection"] = connection
        command.upgrade(config, "head")


def migrate(settings: Settings) -> None:
    """Brings the database of a data directory to the newest schema; makes it only where there never was one; raises NotFound, Unavailable."""
    home = Home.open(settings.data)
    home.check_database()
    engine = open_engine(settings.database_url)
    try:
        _upgrade(engine)
    except DatabaseError as error:
        raise Unavailable(f"registry.db cannot be used: {str(error.orig)[:200]}", do="restore it from the backup") from error
    finally:
        engine.dispose()
    home.record_database()


def open_site(settings: Settings, *, background: bool = True) -> Site:
    """Opens a site made by `airlock site init` at the newest schema; `background` flushes audit counts every 5 s; raises NotFound, Unavailable."""
    home = Home.open(settings.data)
    migrate(settings)
    engine = open_engine(settings.database_url)
    catalog, entitlements, audit = Catalog(engine), Entitlements(engine, home.pepper()), Audit(engine, home.instance)
    blobs = FileBlobs(settings.data)
    library = Library(catalog, blobs, audit, settings.upload_ttl_s)
    guard = Guard(library, entitlements, audit, home, settings.lease_life_s, settings.lease_grace_s)
    if background:
        library.sweep_uploads(time.time())
        audit.start(lambda error: LOG.error("audit counters could not be stored: %s", type(error).__name__))
    return Site(settings, home, engine, catalog, entitlements, audit, blobs, library, guard, _inode(home))
