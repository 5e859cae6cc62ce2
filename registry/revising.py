"""What a commit makes of a model's files, and the bounds of its words; pure.

Here because the library, which stores a commit, and the Hub door, which reads one, must agree on it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from artifact.errors import Invalid, NotFound, TooLarge
from artifact.manifest import MAX_FILES, check_path, derived_commit, files_root
from artifact.store import Change, File

MAX_CHANGES = 2 * MAX_FILES
MAX_TITLE = 200


@dataclass(frozen=True)
class Head:
    """The revision that a commit goes on from: its commit, its own parent and its files; `own` is the digest that the branch itself names."""

    commit: str = ""
    parent: str = ""
    files: tuple[File, ...] = ()
    own: str = ""


def title_of(text: str) -> str:
    """One printable line of a commit's message."""
    line = next((part for part in text.splitlines() if part.strip()), "").strip()
    return "".join(c if c.isprintable() else " " for c in line)[:MAX_TITLE]


def revised(files: Iterable[File], changes: Sequence[Change]) -> tuple[File, ...]:
    """The files after the changes, sorted by the bytes of their paths: removals first, then what is put.

    Raises NotFound `entry` for what cannot be removed, Invalid for paths that clash on some file system, TooLarge `files`.
    """
    if len(changes) > MAX_CHANGES:
        raise TooLarge(f"the commit has {len(changes)} changes", expected=f"at most {MAX_CHANGES}", reason="files")
    held = {file.path: file for file in files}
    gone = {change.path for change in changes if not change.digest}
    found: set[str] = set()
    for path in list(held):
        hit = gone.intersection((path, *(f"{folder}/" for folder in _folders(path))))
        if hit:
            found |= hit
            del held[path]
    if gone - found:
        missing = min(gone - found)
        raise NotFound(f"there is no {missing[:200]!r} to remove", do="look at the files of the branch again", reason="entry")
    for change in changes:
        if change.digest:
            held[check_path(change.path)] = File(change.path, change.digest, change.size or 0, change.lfs)
    if len(held) > MAX_FILES:
        raise TooLarge(f"the model would have {len(held)} files", expected=f"at most {MAX_FILES} files", reason="files")
    folders = {folder.casefold(): path for path in held for folder in _folders(path)}
    for path in held:
        if path.casefold() in folders:
            raise Invalid(f"{path!r} is a file and a folder of {folders[path.casefold()]!r}", expected="one of the two", reason="path")
    return tuple(sorted(held.values(), key=lambda file: file.path.encode()))


def _folders(path: str) -> list[str]:
    parts = path.split("/")
    return ["/".join(parts[:depth]) for depth in range(1, len(parts))]


def commit_of(parent: str, files: Iterable[File], title: str) -> str:
    """The commit id of these files on this parent (docs/format.md section 3)."""
    return derived_commit(parent, files_root(files), title, "")
