"""Reads what a model directory says of itself: its documents and the headers of its safetensors files, never a tensor, a pickle or code.

Links may not leave the directory, and what is no plain file is refused before it is read.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from artifact.errors import AirlockError, Invalid, NotFound, TooLarge
from artifact.model_config import CONFIG, INDEX, MAX_CONFIG, MAX_INDEX, MODELOPT, ModelConfig, header_size, read_config, read_index, tensor_bytes
from artifact.profile import block

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
    return read_files(_names(top), str(top))


def read_files(files: Mapping[str, Path], where: str) -> ModelDir:
    """The facts of a model whose files lie at these paths, by their names in it; raises NotFound, Invalid, TooLarge."""
    if CONFIG not in files:
        raise NotFound(f"{where} has no {CONFIG}", expected="a model directory as the Hub and transformers write it")
    own = _document(files[MODELOPT], MODELOPT, MAX_CONFIG) if MODELOPT in files else b""
    config = read_config(_document(files[CONFIG], CONFIG, MAX_CONFIG), own)
    pickles = sorted(n for n in files if n.endswith(PICKLES))
    if INDEX in files:
        names = read_index(_document(files[INDEX], INDEX, MAX_INDEX))
        absent = [n for n in names if n not in files]
        if absent:
            raise NotFound(f"{absent[0]}, which {INDEX} names, is not there ({len(absent)} of {len(names)} missing)", expected="every shard")
    else:
        names = tuple(sorted(n for n in files if n.endswith(".safetensors")))
    if not names:
        what = f"the weights are pickles ({pickles[0]}), which run code when they are loaded" if pickles else "there are no weights"
        do = "convert them with safetensors on a machine apart" if pickles else "put the weights of the model beside its config.json"
        raise Invalid(f"{where}: {what}", expected="safetensors files", do=do, reason="model_content")
    total = sum(_tensors(files[name], name) for name in names)
    warnings = [f"{pickles[0]} is a pickle: it is not read, and no engine is told to load it"] if pickles else []
    if config.code:
        warnings.append(
            f"{CONFIG} names code ({config.code[0]}): it is never run, so the engine must know {config.architecture or 'the model'} itself"
        )
    embeds = config.embeds or "modules.json" in files
    return ModelDir(replace(config, memory=replace(config.memory, weights_bytes=total), embeds=embeds), names, tuple(warnings))


def with_facts(wanted: list[dict[str, object]], files: Mapping[str, Path], where: str) -> tuple[list[dict[str, object]], str]:
    """An author's profiles with what the model itself tells of memory and quantisation where they do not, and why nothing is told (empty: it is)."""
    # What is no mapping is for the builder to refuse, with its number in the list.
    if not all(isinstance(item, dict) for item in wanted) or all(item.get("memory") for item in wanted):
        return wanted, ""
    try:
        config = read_files(files, where).config
    except AirlockError as error:
        return wanted, f"the profiles tell no memory facts, so a runtime counts weights alone: {error.what}"
    facts = {"memory": block(config.memory), "quantization": block(config.quantization) or None}
    return [{**facts, **{k: v for k, v in item.items() if v is not None}} for item in wanted], ""


def _names(top: Path) -> dict[str, Path]:
    """The entries of a directory; raises NotFound, TooLarge, Invalid for links that leave it."""
    found: dict[str, Path] = {}
    try:
        with os.scandir(top) as entries:
            for entry in entries:
                found[entry.name] = top / entry.name
                if len(found) > MAX_ENTRIES:
                    raise TooLarge(f"{top} has more than {MAX_ENTRIES} entries", expected=f"at most {MAX_ENTRIES}")
    except OSError as error:
        raise NotFound(f"{top} cannot be read: {error.strerror}", expected="the model's directory") from error
    real = Path(os.path.realpath(top))  # no Path.resolve: it raises RuntimeError for links that go in a circle
    for name, path in found.items():
        if path.is_symlink() and not Path(os.path.realpath(path)).is_relative_to(real):
            raise Invalid(
                f"{name} is a link that leaves the directory", expected="files, or links inside it", do="copy with cp -rL first", reason="link"
            )
    return found


def _open(path: Path, name: str) -> int:
    """An open plain file; raises Invalid. Not blocking, or a FIFO would hold us for ever."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise Invalid(f"{name} cannot be read: {error.strerror}", expected="a readable file", reason="link") from error
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise Invalid(f"{name} is no plain file", expected="files only", do="remove it, or copy with cp -rL first", reason="link")
    return fd


def _document(path: Path, name: str, limit: int) -> bytes:
    with open(_open(path, name), "rb") as file:
        raw = file.read(limit + 1)
    if len(raw) > limit:
        raise TooLarge(f"{name} has more than {limit} bytes", expected=f"at most {limit}")
    return raw


def _tensors(path: Path, name: str) -> int:
    """Bytes of the tensors of one file, by its header alone."""
    with open(_open(path, name), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = header_size(file.read(8), size, name)
        return tensor_bytes(file.read(length), size - 8 - length, name)
