"""What of a site cannot be made again, into one directory and back: the database, the secrets, the pinned senders; never the objects themselves.

Objects are immutable files or S3 objects under names that never change meaning: any copy of them, of any time, fits any backup, and
registry/rebuild.py says what is missing. A restore writes into an empty place only. The backup holds every secret of the site: keep it as such.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sqlite3
import stat
import subprocess
from collections.abc import Collection
from contextlib import closing
from pathlib import Path
from typing import Any

from sqlalchemy import make_url, text

from artifact.errors import Conflict, Invalid, Mismatch, NotFound, Unavailable
from artifact.manifest import parse_json
from registry.database import is_postgresql, open_engine, writing
from registry.home import DATABASE, SITE
from registry.keyring import FILES, FIRST, PREVIOUS, Keyring
from registry.settings import Settings

INDEX = "backup.json"
DUMP = "registry.pgdump"
SQLITE, POSTGRESQL = "sqlite", "postgresql"
STAGED = ".restore"
SCHEMA = 1
MAX_TIME = 4_000_000_000
BUFFER = 1024 * 1024
KEPT = (SITE, "secrets", "trust")
PARTIAL_SUFFIX = ".partial"
MAX_INDEX_BYTES = 4 * 1024 * 1024
TOOL_TIMEOUT_S = 24 * 3600


def backup(settings: Settings, to: Path, now: float, revision: str) -> dict[str, object]:
    """Writes a consistent backup while the server runs and returns its index; raises Conflict for a used directory, NotFound, Unavailable."""
    if to.exists():
        raise Conflict(f"{to} is there already", expected="a new directory", do="choose another name: a backup is never written over")
    temporary = to.with_name(to.name + PARTIAL_SUFFIX)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(mode=0o700, parents=True)
    try:
        # The database first: what is changed in the files after it (a sender pinned, a bundle noted) is then newer than the rows, never older.
        if is_postgresql(settings.database_url):
            _dump(settings.database_url, temporary / DUMP)
        else:
            _copy_sqlite(settings.data / DATABASE, temporary / DATABASE)
        for name in KEPT:
            _copy(settings.data / name, temporary / name)
        # Again, and last: a secret that was replaced while they were copied lies there by now, maybe as the first.
        _copy(settings.data / "secrets" / PREVIOUS, temporary / "secrets" / PREVIOUS)
        index: dict[str, object] = {"schema": SCHEMA, "taken": int(now), "revision": revision, "database": _kind(settings)}
        files = {str(p.relative_to(temporary)): _facts(p) for p in sorted(temporary.rglob("*")) if p.is_file()}
        _demand_secrets(Keyring(settings.data / "secrets"), files)
        index["files"] = files
        path = temporary / INDEX
        path.write_text(json.dumps(index, indent=1, sort_keys=True) + "\n")
        path.chmod(0o600)
        for entry in [*temporary.rglob("*"), temporary]:
            _sync(entry)
        temporary.rename(to)
        _sync(to.parent)
    except OSError as error:
        raise Unavailable(f"the backup could not be written: {error.strerror}", do=f"free space at {to.parent}, let this user write it") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return index


def _demand_secrets(keys: Keyring, files: Collection[str]) -> None:
    """Raises NotFound where a secret that lies there is none of the files, as one is that is a link: a restore would lack it."""
    lacks = [file for name, file in FILES.items() if not keys.given(name) and not keys.absent(name) and f"secrets/{file}" not in files]
    if lacks:
        do = "put the file itself there, or let AIRLOCK_..._FILE name it"
        raise NotFound(f"{keys.folder} has no plain file {', '.join(lacks)}", expected="files, no links", do=do, reason="secret")


def read_index(source: Path) -> dict[str, Any]:
    """The index of a backup that names all that a site needs, and only plain files inside it; raises NotFound, Invalid."""
    try:
        with (source / INDEX).open("rb") as file:
            raw = file.read(MAX_INDEX_BYTES + 1)
    except OSError as error:
        raise NotFound(f"{source} holds no {INDEX}", expected="a directory that airlock registry backup wrote") from error
    index = parse_json(raw, INDEX, MAX_INDEX_BYTES)
    files, taken, kind = index.get("files"), index.get("taken"), index.get("database")
    whole = isinstance(files, dict) and all(
        isinstance(f, dict) and isinstance(f.get("size"), int) and isinstance(f.get("sha256"), str) for f in files.values()
    )
    if not whole or not isinstance(files, dict) or not isinstance(taken, int) or not 0 <= taken < MAX_TIME or kind not in (SQLITE, POSTGRESQL):
        raise Invalid(f"{source / INDEX} is not a backup's index", expected="the file as it was written")
    if index.get("schema") != SCHEMA:
        raise Invalid(f"the backup is of schema {str(index.get('schema'))[:20]}", expected=str(SCHEMA), do="use the version that wrote it")
    for name in files:
        parts = Path(name).parts
        if name.startswith("/") or not parts or ".." in parts or parts[0] not in (*KEPT, DATABASE, DUMP):
            raise Invalid(f"{INDEX} names {name[:100]!r}, which is no part of a site", expected="site.json, secrets/, trust/ and the database")
    keys = Keyring(source / "secrets")  # what the environment gives need not be in it
    needed = {SITE, DATABASE if kind == SQLITE else DUMP, *(f"secrets/{FILES[name]}" for name in FIRST if not keys.given(name))}
    if missing := sorted(needed - files.keys()):
        raise Invalid(f"{INDEX} does not name {', '.join(missing)}", expected="a whole backup", do="take another one")
    return dict(index)


def restore(source: Path, settings: Settings) -> dict[str, Any]:
    """Puts a backup into an empty data directory (and an empty PostgreSQL database); raises Conflict, Invalid, Mismatch, NotFound, Unavailable."""
    index = read_index(source)
    wanted = _kind(settings)
    if index["database"] != wanted:
        raise Invalid(
            f"the backup is of {index['database']}, and AIRLOCK_DATABASE says {wanted}", expected=str(index["database"]), do="set AIRLOCK_DATABASE"
        )
    data, files = settings.data, index["files"]
    used = [name for name in (*KEPT, DATABASE) if os.path.lexists(data / name)]
    if used:
        raise Conflict(f"{data} holds {', '.join(used)}", expected="a directory without a site; blobs/ may be there", do="restore into a new one")
    staged = data / STAGED
    try:
        data.mkdir(mode=0o700, parents=True, exist_ok=True)
        data.chmod(0o700)
        shutil.rmtree(staged, ignore_errors=True)
        for name in sorted(files):
            _take(source, name, files[name], staged / name)
        (staged / "trust").mkdir(mode=0o700, exist_ok=True)  # empty at a site that pins no sender yet
        if wanted == POSTGRESQL:
            _load(settings.database_url, staged / DUMP)
        for name in (DATABASE, *reversed(KEPT)):  # site.json last: a directory with it is whole
            if (staged / name).exists():
                (staged / name).rename(data / name)
        _sync(data)
    except OSError as error:
        raise Unavailable(f"the restore failed: {error.strerror}", do=f"free space at {data}, empty it, then again") from error
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    return index


def _kind(settings: Settings) -> str:
    return POSTGRESQL if is_postgresql(settings.database_url) else SQLITE


def _take(source: Path, name: str, facts: dict[str, Any], target: Path) -> None:
    """Copies one file of a backup, hashed on the way and reached without any link; raises Mismatch, OSError."""
    altered = Mismatch(f"{name} was altered after the backup", expected=f"SHA-256 {facts['sha256']}", do="copy the backup again", reason="backup")
    target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder = os.open(source, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            for part in Path(name).parts[:-1]:
                inner = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=folder)
                os.close(folder)
                folder = inner
            fd = os.open(Path(name).name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder)
        except OSError as error:
            raise Mismatch(f"{name} is missing in the backup, or no plain file", do="copy the backup again", reason="backup") from error
    finally:
        os.close(folder)
    hasher, left = hashlib.sha256(), int(facts["size"])
    with os.fdopen(fd, "rb") as file, target.open("xb") as out:
        if not stat.S_ISREG(os.fstat(fd).st_mode) or os.fstat(fd).st_size != left:
            raise altered
        while piece := file.read(min(left, BUFFER)):
            hasher.update(piece)
            out.write(piece)
            left -= len(piece)
        out.flush()
        os.fsync(out.fileno())
    target.chmod(0o600)
    if left or hasher.hexdigest() != facts["sha256"]:
        raise altered


def _facts(path: Path) -> dict[str, object]:
    with path.open("rb") as file:
        return {"sha256": hashlib.file_digest(file, "sha256").hexdigest(), "size": path.stat().st_size}


def _copy(source: Path, target: Path) -> None:
    """A file or a tree of plain files, private to this user, without what others are about to write and what they removed since it was listed."""
    try:
        if source.is_dir():
            target.mkdir(mode=0o700, exist_ok=True)
            for entry in sorted(source.iterdir()):
                if not entry.is_symlink() and not entry.name.startswith(".") and not entry.name.endswith(PARTIAL_SUFFIX):
                    _copy(entry, target / entry.name)
            return
        shutil.copyfile(source, target, follow_symlinks=False)
        target.chmod(0o600)
    except FileNotFoundError:
        if os.path.lexists(source):  # what is missing is the backup's own folder
            raise


def _copy_sqlite(source: Path, target: Path) -> None:
    """The database as of one moment, by SQLite's own online backup; raises Unavailable."""
    if not source.is_file():
        raise NotFound(f"{source} is not there", do="airlock site init, or restore a backup")
    try:
        with closing(sqlite3.connect(f"file:{source}?mode=ro", uri=True, timeout=30)) as old, closing(sqlite3.connect(target)) as new:
            old.backup(new, pages=4096)
            new.execute("PRAGMA journal_mode=DELETE")
            found = new.execute("PRAGMA quick_check").fetchone()[0]
    except sqlite3.Error as error:
        raise Unavailable(f"the database cannot be copied: {error}", do="look at its disk; an older backup may be whole") from error
    if found != "ok":
        raise Unavailable(f"the database is damaged: {str(found)[:200]}", do="restore the last whole backup", reason="damaged")
    target.chmod(0o600)


def _tool(name: str) -> str:
    found = shutil.which(name)
    if not found:
        versions = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"), key=lambda p: int(p.parts[-3]) if p.parts[-3].isdigit() else 0)
        found = str(versions[-1]) if versions else ""
    if not found:
        raise Unavailable(f"{name} is not installed here", do="install the PostgreSQL client programs of the server's version", reason="tool")
    return found


def _run(argv: list[str], url: str) -> None:
    """Runs one of PostgreSQL's tools; the password goes by environment, never by argument; raises Unavailable in its words."""
    parsed = make_url(url)
    env = {**os.environ, "PGPASSWORD": parsed.password} if parsed.password else dict(os.environ)
    query = {k: v for k, v in parsed.query.items() if k not in ("pool_size", "password_file")}
    if "password_file" in parsed.query:
        env["PGPASSWORD"] = Path(str(parsed.query["password_file"])).read_text().strip()
    plain = parsed.set(drivername="postgresql", password=None, query=query).render_as_string(hide_password=False)
    try:
        done = subprocess.run([*argv, "--dbname", plain], env=env, capture_output=True, text=True, timeout=TOOL_TIMEOUT_S, check=False)  # noqa: S603 - our own argv
    except subprocess.TimeoutExpired as error:
        raise Unavailable(f"{Path(argv[0]).name} did not end in a day", do="look at the database") from error
    if done.returncode:
        words = done.stderr.strip().splitlines()[-1:] or ["no words"]
        raise Unavailable(f"{Path(argv[0]).name} failed: {words[0][:300]}", do="check the database and the version of its client programs")


def _dump(url: str, target: Path) -> None:
    target.touch(mode=0o600)
    _run([_tool("pg_dump"), "--format=custom", "--no-owner", "--no-privileges", "--file", str(target)], url)


def _load(url: str, source: Path) -> None:
    _run([_tool("pg_restore"), "--exit-on-error", "--single-transaction", "--no-owner", "--no-privileges", str(source)], url)
    engine = open_engine(url)
    try:
        with writing(engine) as conn:  # numbers of the old server's transactions: the new one may be far behind them, and they would wait until then
            names = "SELECT column_name FROM information_schema.columns WHERE table_schema = current_schema AND table_name = 'audit_pending'"
            if "xid" in conn.execute(text(names)).scalars().all():
                conn.execute(text("UPDATE audit_pending SET xid = DEFAULT"))
    finally:
        engine.dispose()


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
