"""A model directory is data: which of a promoted model's files an engine gets to see, judged by name and by their first bytes; nothing is run.

Pickles run code when they are loaded and are never handed over; code only where the promoted profile says so. What carries a pickle under the name of
data is no mistake, and refuses the start. (CVE-2025-1889, CVE-2025-10155 and their like: scanners that go by the name.)
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import PurePosixPath

from artifact.disk import Disk
from artifact.errors import Invalid
from artifact.model_dir import PICKLES
from artifact.store import File

RUNS_WHEN_LOADED = (*PICKLES, ".joblib", ".dill", ".nemo", ".keras")
CODE = (".py", ".pyc", ".so", ".sh", ".ipynb", ".js", ".dll", ".dylib", ".pth.py")
TEXT = (".json", ".jsonl", ".txt", ".md", ".jinja", ".yaml", ".yml")
HEAD = 4096  # numpy says within it what an array holds
_PROTOCOLS = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


def allowed(files: Iterable[File], disk: Disk, *, code: bool) -> tuple[list[File], list[str]]:
    """The files that an engine may see, and a line for each that stays out; raises Invalid (reason model_content) naming what hides a pickle.

    Every file lies in `disk`, verified. `code`: the promoted profile lets the model's own code run.
    """
    kept: list[File] = []
    out: list[str] = []
    dangerous = False
    for file in files:
        suffix = PurePosixPath(file.path).suffix.lower()
        if suffix in RUNS_WHEN_LOADED:
            out.append(f"{file.path} may be a pickle, which runs code when it is loaded: no engine sees it")
            dangerous = True
        elif suffix in CODE and not code:
            out.append(f"{file.path} is code, and the promoted profile does not say that it may run: no engine sees it")
        else:
            demand_data(file.path, _head(file.digest, disk))
            kept.append(file)
    if dangerous and not any(PurePosixPath(f.path).suffix.lower() in (".safetensors", ".gguf", ".onnx", ".engine") for f in kept):
        raise Invalid(
            f"the model's weights are pickles ({out[0].split(' ', 1)[0]})",
            expected="safetensors, GGUF, ONNX or engines",
            do="convert them on a machine apart, push and promote them again",
            reason="model_content",
        )
    return kept, out


def _head(digest: str, disk: Disk) -> bytes:
    fd = disk.open(digest)
    try:
        return os.pread(fd, HEAD, 0)
    finally:
        os.close(fd)


def demand_data(path: str, head: bytes) -> None:
    """A file's first bytes are not those of a pickle or an archive with one; raises Invalid (reason model_content)."""
    suffix = PurePosixPath(path).suffix.lower()
    if suffix == ".safetensors" and head[8:9] == b"{":
        return  # the length of the header stands first, and may look like anything
    what = ""
    if head[:2] in _PROTOCOLS:
        what = "a pickle"
    elif head[:4] == b"PK\x03\x04":
        what = "a zip archive, as torch writes pickles"
    elif head[:6] == b"\x93NUMPY" and b"|O" in head:
        what = "an array of objects, which numpy keeps as a pickle"
    elif suffix in TEXT and b"\0" in head[:16]:
        what = "no text"
    if what:
        raise Invalid(
            f"{path} of the model is {what}",
            expected=f"what a {suffix or 'plain'} file holds",
            do="find out who made this model; it was promoted with it",
            reason="model_content",
        )
