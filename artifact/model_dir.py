"""Reads what a model directory says of itself: its documents and the headers of its safetensors files, never a tensor, a pickle or code.

Links may not leave the directory, and what is no plain file is refused before it is read.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass, replace
from pathlib import Path

from artifact.errors import Invalid, NotFound, TooLarge
from artifact.model_config import CONFIG, INDEX, MAX_CONFIG, MAX_INDEX, MODELOPT, ModelConfig, header_size, read_config, read_index, tensor_bytes

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
MAX_ENTRIES = 20_000


@dataclass(frozen=True)
class ModelDir:
    """A model directory's facts: its config, weights counted in, its weight files, and what to tell of it."""

    config: ModelConfig
    files: tuple[str, ...]
    warnings: tuple[str, ...] = ()


def read(top: Path) -> ModelDir:
    """The facts of a directory with config.json and safetensors files; raises NotFound, Invalid, TooLarge."""
    names = _names(top)
    if CONFIG not in names:
        raise NotFound(f"{top} has no {CONFIG}", expected="a model directory as the Hub and transformers write it")
    config = read_config(_document(top, CONFIG, MAX_CONFIG), _document(top, MODELOPT, MAX_CONFIG) if MODELOPT in names else b"")
    pickles = sorted(n for n in names if n.endswith(PICKLES))
    if INDEX in names:
        files = read_index(_document(top, INDEX, MAX_INDEX))
        absent = [f for f in files if f not in names]
        if absent:
            raise NotFound(f"{absent[0]}, which {INDEX} names, is not there ({len(absent)} of {len(files)} missing)", expected="every shard")
    else:
        files = tuple(sorted(n for n in names if n.endswith(".safetensors")))
    if not files:
        what = f"the weights are pickles ({pickles[0]}), which run code when they are loaded" if pickles else "there are no weights"
        raise Invalid(f"{top}: {what}", expected="safetensors files", do="convert them with safetensors on a machine apart", reason="model_content")
    total = sum(_tensors(top, name) for name in files)
    warnings = [f"{pickles[0]} is a pickle: it is not read, and no engine is told to load it"] if pickles else []
    if config.code:
        warnings.append(
            f"{CONFIG} names code ({config.code[0]}): it is never run, so the engine must know {config.architecture or 'the model'} itself"
        )
    embeds = config.embeds or "modules.json" in names
    return ModelDir(replace(config, memory=replace(config.memory, weights_bytes=total), embeds=embeds), files, tuple(warnings))


def _names(top: Path) -> frozenset[str]:
    try:
        with os.scandir(top) as entries:
            found = []
            for entry in entries:
                found.append(entry.name)
                if len(found) > MAX_ENTRIES:
                    raise TooLarge(f"{top} has more than {MAX_ENTRIES} entries", expected=f"at most {MAX_ENTRIES}")
    except OSError as error:
        raise NotFound(f"{top} cannot be read: {error.strerror}", expected="the model's directory") from error
    return frozenset(found)


def _open(top: Path, name: str) -> int:
    """An open plain file of the directory; raises Invalid. Not blocking, or a FIFO would hold us for ever."""
    path = top / name
    if path.is_symlink() and not path.resolve().is_relative_to(top.resolve()):
        raise Invalid(f"{name} is a link that leaves the directory", expected="files, or links inside it", do="copy with cp -rL first", reason="link")
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise Invalid(f"{name} cannot be read: {error.strerror}", expected="a readable file", reason="link") from error
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise Invalid(f"{name} is no plain file", expected="files only", do="remove it, or copy with cp -rL first", reason="link")
    return fd


def _document(top: Path, name: str, limit: int) -> bytes:
    with open(_open(top, name), "rb") as file:
        raw = file.read(limit + 1)
    if len(raw) > limit:
        raise TooLarge(f"{name} has more than {limit} bytes", expected=f"at most {limit}")
    return raw


def _tensors(top: Path, name: str) -> int:
    """Bytes of the tensors of one file, by its header alone."""
    with open(_open(top, name), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = header_size(file.read(8), size, name)
        return tensor_bytes(file.read(length), size - 8 - length, name)
