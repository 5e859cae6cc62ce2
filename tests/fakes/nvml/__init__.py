"""Builds the stand-in libnvidia-ml.so.1 of this folder; imports no project code."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path


def build(folder: Path) -> Path | None:
    """Compiles the library into `folder` and returns it; None where there is no C compiler."""
    compiler = shutil.which("cc")
    if compiler is None:
        return None
    out = folder / "libnvidia-ml.so.1"
    source = Path(__file__).with_name("fake_nvml.c")
    subprocess.run([compiler, "-Wall", "-Werror", "-shared", "-fPIC", "-Wl,-soname,libnvidia-ml.so.1", "-o", out, source], check=True)
    return folder
