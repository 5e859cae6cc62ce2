"""The verbs that the S3 face needs beside those of Registry and Files: what a caller may read, as the sorted tree of a bucket's keys.

A part of the guard (registry/guard.py) in a file of its own; it tells nothing that the guard's own decision does not let the caller pull.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

from artifact.grant import Decision, Subject
from artifact.store import Call, File
from registry.catalog import Repo
from registry.library import Library
from registry.s3_shapes import Asked, Entry, Node, Page, page

MOST_NAMES, NAMES, REFS, FILES = 20_000, 1000, 1000, 10_000
Decide = Callable[[Call, Subject, str], Decision]
Seen = Callable[[Call, str, str, int], tuple[list[Repo], str]]


class Keys(Protocol):
    """How a bucket spells its keys (registry/s3_shapes.py)."""

    def within(self, prefix: str) -> str:
        """What the names of all repositories whose keys begin with `prefix` begin with."""

    def start(self, name: str, display: str) -> str:
        """What the keys of a repository begin with; empty for none."""

    def version(self, ref: str) -> str:
        """What follows for a ref; empty for none."""

    def path(self, path: str) -> str:
        """What follows for a file."""


class S3Views:
    """The verbs over one library; `decide` and `seen` are the guard's."""

    def __init__(self, library: Library, decide: Decide, seen: Seen) -> None:
        self._catalog, self._decide, self._seen = library.catalog, decide, seen

    def objects(self, call: Call, keys: Keys, asked: Asked) -> Page:
        """A page of the keys that this caller may read; raises Unauthenticated."""
        named: dict[str, Repo] = {}
        for repo in self._repos(call, keys.within(asked.prefix)):
            start = keys.start(repo.name, repo.display)
            if start and (start.startswith(asked.prefix) or asked.prefix.startswith(start)):
                named.setdefault(start, repo)  # the name itself comes before `ngc/…`, as in reading
        return page(((start, self._versions(repo, start, keys)) for start, repo in sorted(named.items())), asked)

    def _repos(self, call: Call, prefix: str) -> list[Repo]:
        """Models that the caller may pull, of the first MOST_NAMES names behind a prefix; those of their own names before the mirrored ones."""
        found: list[Repo] = []
        after, looked = "", 0
        while looked < MOST_NAMES:
            if call.principal.anonymous:
                repos = self._catalog.repositories(prefix, after, NAMES, "")
                after = repos[-1].name if len(repos) == NAMES else ""
            else:
                repos, after = self._seen(call, prefix, after, NAMES)
            looked += NAMES
            found += [repo for repo in repos if repo.kind == "model" and self._decide(call, repo.subject, "pull").allow]
            if not after:
                break
        return sorted(found, key=lambda repo: repo.name.startswith("ngc/"))

    def _versions(self, repo: Repo, start: str, keys: Keys) -> Callable[[], Iterator[Node]]:
        def below() -> Iterator[Node]:
            refs = [ref for ref, _, _ in self._catalog.branches(repo.id, REFS)]
            for text, ref in sorted((start + told, ref) for ref in refs if (told := keys.version(ref))):
                yield text, self._files(repo, ref, text, keys)

        return below

    def _files(self, repo: Repo, ref: str, start: str, keys: Keys) -> Callable[[], Iterator[Node]]:
        def below() -> Iterator[Node]:
            found = self._catalog.locate(repo.name, ref)
            files: list[File] = self._catalog.files(found.manifest_id, "", "", FILES) if found and found.manifest_id else []
            at = found.at if found else 0.0
            yield from sorted((start + keys.path(f.path), Entry(f.digest.partition(":")[2], f.size, at)) for f in files)

        return below
