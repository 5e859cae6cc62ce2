"""Puts the parts of one site together: database and store of bytes by the scheme of their URLs; nothing is decided here."""

from __future__ import annotations

import fcntl
import logging
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import cast

from sqlalchemy import Engine, text

from artifact.errors import Conflict, Invalid, NotFound, Unavailable
from artifact.store import BlobStore
from registry import blobs as backends
from registry import tls
from registry.admission import Policy
from registry.audit import Audit
from registry.catalog import Catalog
from registry.collector import Collector
from registry.database import is_postgresql, open_engine, reading
from registry.documents import Documents
from registry.entitlements import Entitlements
from registry.floor import Floor
from registry.guard import Guard
from registry.home import Home
from registry.library import Library
from registry.schema import claim, move
from registry.sequencer import Sequencer
from registry.settings import Settings

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
    log: Sequencer
    floor: Floor
    documents: Documents
    blobs: BlobStore
    library: Library
    guard: Guard
    collector: Collector
    inode: int

    def check(self) -> None:
        """Returns while the database answers and is the one that was opened; raises Unavailable."""
        if is_postgresql(self.settings.database_url):
            with reading(self.engine) as connection:
                connection.execute(text("SELECT 1"))
        elif _inode(self.home) != self.inode:
            raise Unavailable("registry.db was removed or replaced under the running server", do="restore it from the backup, then start again")

    def close(self) -> None:
        """Stores the last audit counts and closes the database."""
        try:
            self.collector.close()
            self.guard.ngc.close()
            self.entitlements.usage.close()
            self.audit.close()
            self.floor.close(time.time())
            self.log.close()
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


def _engine(settings: Settings) -> Engine:
    url = settings.database_url
    if not is_postgresql(url) and url != Settings(settings.data).database_url:
        raise Invalid("AIRLOCK_DATABASE names another place", expected="postgresql://USER@HOST/NAME, or nothing for SQLite in the data directory")
    return open_engine(url)


def open_blobs(url: str, data: Path) -> BlobStore:
    """The store of a URL, by the module of registry/blobs that its scheme names; raises Invalid, Unavailable."""
    scheme = url.split(":", 1)[0]
    known = sorted(p.stem for folder in backends.__path__ for p in Path(folder).glob("*.py") if re.fullmatch(r"[a-z][a-z0-9]*", p.stem))
    if scheme not in known:
        raise Invalid(f"there is no store {scheme[:40]!r}", expected=" or ".join(f"{name}:…" for name in known), do="check AIRLOCK_BLOBS")
    return cast(BlobStore, import_module(f"{backends.__name__}.{scheme}").open_blobs(url, data))


@contextmanager
def sole_server(settings: Settings) -> Iterator[None]:
    """Holds the data directory for one server process; with PostgreSQL any number may serve; raises Conflict, NotFound."""
    if not settings.data.is_dir():
        raise NotFound(f"{settings.data} is not a data directory", do="airlock site init --data DIR --trust-root FILE")
    if is_postgresql(settings.database_url):
        yield
        return
    lock = os.open(settings.data / "serve.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise Conflict(
                f"another server is using {settings.data}",
                expected="one server process, as its database is SQLite",
                do="stop the other one, or set AIRLOCK_DATABASE to a PostgreSQL that both use",
            ) from error
        yield
    finally:
        os.close(lock)


def migrate(settings: Settings, revision: str = "head") -> str:
    """Brings the database to a revision of the schema and returns where it was.

    SQLite's file is made only where there never was one; raises NotFound, Invalid, Conflict, Unavailable.
    """
    home = Home.open(settings.data)
    own = not is_postgresql(settings.database_url)
    if own:
        home.check_database()
    else:
        home.check_elsewhere()
    engine = _engine(settings)
    try:
        before = move(engine, revision)
    finally:
        engine.dispose()
    home.record_database(elsewhere=not own)
    return before


def open_site(settings: Settings, *, background: bool = True) -> Site:
    """Opens a site made by `airlock site init` at the newest schema; `background` flushes audit counts every 5 s; raises NotFound, Unavailable."""
    migrate(settings)
    home = Home.open(settings.data)
    home = home if home.elsewhere else home.completed()  # of several servers each would make its own: there it is `airlock site init` that does
    engine = _engine(settings)
    claim(engine, home.instance, home.peppers())
    catalog, entitlements, audit = (
        Catalog(engine),
        Entitlements(engine, home.pepper(), home.peppers()[1:], home.keys.next_peppers(), settings.key_prefix),
        Audit(engine, home.instance, log := Sequencer(engine, home.path, home.audit_name, home.audit_key)),
    )
    floor = Floor.load(engine, audit, home.created)
    documents = Documents(engine, entitlements, audit, home=home, floor=floor)
    documents.activate(floor.sure(floor.now(time.time())))
    blobs = open_blobs(settings.blobs_url, settings.data)
    library = Library(catalog, blobs, audit, settings.upload_ttl_s, settings.blob_lease_s)
    policy = Policy(settings.anonymous, settings.token_life_s, settings.redirect, settings.stream_to, settings.entitlements == "required")
    guard = Guard(library, entitlements, audit, home, floor, settings.lease_life_s, settings.lease_grace_s, policy)
    collector = Collector(library, settings.garbage_delay_s, every_s=settings.gc_every_s)
    guard.attach(collector, tls.served(settings))
    guard.open_log(log)
    if background:
        blobs.probe()
        entitlements.usage.start(lambda error: LOG.error("the use of keys could not be stored: %s", type(error).__name__))
        audit.start(lambda error: LOG.error("audit counters could not be stored: %s", type(error).__name__))
    return Site(settings, home, engine, catalog, entitlements, audit, log, floor, documents, blobs, library, guard, collector, _inode(home))
