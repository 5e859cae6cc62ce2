"""A Debian 12 as the base of images: debootstrap's tree as one tar under build/base, made once, so that no registry of images is needed."""

from __future__ import annotations

import fcntl
import shutil
import subprocess
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SUITE = "bookworm"
PACKAGES = ("python3", "ca-certificates", "libnuma1")  # the last is what vLLM's CPU build links to
MAX_S = 900


def mirror() -> str:
    """Where this machine's apt takes Debian 12 from; Debian's own address where it tells none."""
    argv = ["apt-get", "indextargets", "--format", "$(REPO_URI)", "Created-By: Packages", f"Suite: {SUITE}", "Component: main"]
    found = subprocess.run(argv, capture_output=True, text=True, check=False).stdout.split()
    return next(iter(found), "http://deb.debian.org/debian")


def base(debootstrap: str) -> Path:
    """The tar, made by root where it is not there yet; raises CalledProcessError with debootstrap's words in `stdout`."""
    place = ROOT / "build" / "base" / f"{SUITE}-{'-'.join(PACKAGES)}.tar"
    place.parent.mkdir(parents=True, exist_ok=True)
    with (place.parent / "making").open("w") as making:
        fcntl.flock(making, fcntl.LOCK_EX)  # tests run in several processes
        if not place.exists():
            tree = Path(tempfile.mkdtemp(prefix="tree-", dir=place.parent))
            try:
                argv = [debootstrap, "--variant=minbase", f"--include={','.join(PACKAGES)}", SUITE, str(tree), mirror()]
                subprocess.run(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True, timeout=MAX_S)
                shutil.rmtree(tree / "var" / "cache" / "apt")
                shutil.rmtree(tree / "var" / "lib" / "apt" / "lists")
                subprocess.run(["tar", "-C", str(tree), "-cf", f"{place}.part", "."], check=True, timeout=MAX_S)
            finally:
                shutil.rmtree(tree, ignore_errors=True)
            Path(f"{place}.part").rename(place)
    return place
