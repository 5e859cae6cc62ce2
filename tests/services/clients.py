"""Environments of clients that do not fit beside the project's own: one a lock file, made once under build/clients and kept while the lock stays."""

from __future__ import annotations

import fcntl
import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MAX_S = 600


def client(name: str) -> Path:
    """The Python of the environment that requirements/NAME.lock describes; made where it is not there or the lock is another."""
    lock, place = ROOT / "requirements" / f"{name}.lock", ROOT / "build" / "clients" / name
    place.parent.mkdir(parents=True, exist_ok=True)
    wanted = hashlib.sha256(lock.read_bytes()).hexdigest()
    stamp, python = place / "lock.sha256", place / "bin" / "python"
    with (place.parent / f"{name}.making").open("w") as making:
        fcntl.flock(making, fcntl.LOCK_EX)  # tests run in several processes
        if not (stamp.exists() and stamp.read_text() == wanted):
            shutil.rmtree(place, ignore_errors=True)
            subprocess.run([sys.executable, "-m", "venv", str(place)], check=True, timeout=MAX_S)
            pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", "-r", str(lock)]
            subprocess.run(pip, check=True, timeout=MAX_S)
            stamp.write_text(wanted)
    return python
