"""The verbs over a model's branches, history and uploads by file, which the Hub door needs beside Files; checked and recorded as the guard's own.

A part of the guard (registry/guard.py) in a file of its own; protocols reach it as `guard.revisions`. Files are uploaded by a client that sends no
key to the URL it was given: such a URL carries a seal over key, repository, object and end, and the key's row is read at each use.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace

from artifact.errors import Conflict, NotFound, Unauthenticated
from artifact.grant import Access, Principal, authenticate, visible
from artifact.manifest import check_ref
from artifact.store import Call, File, Revision, Upload
from registry import catalog as c
from registry.catalog import Repo
from registry.entitlements import Entitlements
from registry.floor import Floor
from registry.home import Home
from registry.library import MAIN, Library, as_revision, demand_model_name, with_oid
from registry.lookup import Sought
from registry.tokens import Seal

PREFIX = "upl1."
PURPOSE = b"AIRLOCK upload url v1"
URL_LIFE_S = 86400
MAX_REFS, MAX_COMMITS = 1000, 10_000
Allow = Callable[[Call, str, Repo | None, str], Call]
AllowPush = Callable[[Call, str], Call]
Recorded = Callable[[Call, str], AbstractContextManager[None]]


class Revisions:
    """Verbs of one guard over its library; holds no state of its own."""

    def __init__(
        self, library: Library, entitlements: Entitlements, home: Home, floor: Floor, allow: Allow, allow_push: AllowPush, recorded: Recorded
    ) -> None:
        self._library, self._catalog, self._entitlements, self._floor = library, library.catalog, entitlements, floor
        self._allow, self._allow_push, self._recorded = allow, allow_push, recorded
        self._seal, self._instance = Seal(PURPOSE, home.pepper(), home.peppers()[1:]), home.instance

    # ---- names

    def first(self, call: Call, names: Sequence[str], default: int = -1) -> str:
        """The first of these names that holds something for this caller, else the default one: what is asked about it then is refused."""
        if isinstance(call, Sought) and call.ask[:1] == ("hub",) and tuple(dict.fromkeys(call.ask[3:])) == tuple(names):
            if call.found is None:
                return names[default]
            if call.found.repo.kind and visible(call.principal, call.found.repo.subject):
                return call.found.repo.name
        for name in names:
            repo = self._catalog.repository(name)
            if repo is not None and repo.kind and visible(call.principal, repo.subject):
                return repo.name
        return names[default]

    def target(self, call: Call, names: Sequence[str]) -> str:
        """The repository of these names that this caller may push to; raises NotFound, Denied."""
        name = self.first(call, names, 0)
        self._allow_push(call, name)
        if self._catalog.repository(name) is None:
            raise NotFound(f"there is no repository {name}", do="create it first", reason="repo")
        return name

    # ---- reading

    def refs(self, call: Call, name: str) -> list[tuple[str, str, str]]:
        """Name, kind (branch or tag) and commit of each ref of a model; `main` is a branch, there wherever a revision is; raises NotFound, Denied."""
        repo = self._catalog.repository(name)
        self._allow(call, name, repo, "list")
        if repo is None:
            return []
        found = [(ref, "branch" if ref == MAIN else kind, commit) for ref, kind, commit in self._catalog.branches(repo.id, MAX_REFS)]
        head = None if any(ref == MAIN for ref, _, _ in found) else self._catalog.locate(repo.name, MAIN)
        return ([(MAIN, "branch", head.commit)] if head is not None and head.commit else []) + found

    def history(self, call: Call, name: str, revision: Revision, limit: int) -> list[tuple[str, str, float]]:
        """Commit, title and time of a revision and its parents, as far as they are here, newest first; raises NotFound, Denied."""
        repo = self._catalog.repository(name)
        self._allow(call, name, repo, "pull")
        known = {commit: (parent, title, at) for commit, parent, title, at in self._catalog.commits(repo.id, MAX_COMMITS)} if repo else {}
        out: list[tuple[str, str, float]] = []
        commit = revision.commit
        while commit in known and len(out) < limit:
            parent, title, at = known.pop(commit)
            out.append((commit, title, at))
            commit = parent
        return out

    def planned(self, call: Call, name: str, branch: str) -> dict[str, File]:
        """The files of a branch by path, for a key that may push to it; raises NotFound, Denied."""
        self._allow_push(call, name)
        found = self._catalog.locate(name, check_ref(branch))
        if found is None or not found.digest:
            if branch == MAIN:
                return {}
            raise NotFound(f"{name} has no branch {branch[:100]}", do="create the branch first", reason="revision")
        files: dict[str, File] = {}
        after = ""
        revision = as_revision(found, branch)
        while page := self._catalog.files(found.manifest_id, "", after, 1000):
            files |= {file.path: with_oid(file) for file in page}
            after = page[-1].path
        return files if revision.commit else {}

    # ---- changing

    def create(self, call: Call, name: str, display: str, private: bool = False) -> Revision | None:
        """Makes a repository with an empty first revision on `main`; none for a key that may only create refs, whose first commit it is.

        An organisation's is always its own; of the site's own names a `private` one is seen by who has a grant on it.
        Raises NotFound, Denied, Conflict `exists` or `name`, Invalid.
        """
        call = self._allow_push(call, name)
        demand_model_name(name)
        if (repo := self._catalog.repository(name)) is not None and repo.kind:
            raise Conflict("You already created this model repo", do="push to it", reason="exists", name=repo.display)

        def work(conn: c.Connection) -> None:
            org = c.owning_org(conn, name)
            visibility = "org" if org else "private" if private else "public"
            c.ensure_repository(conn, name, display=display, org=org, visibility=visibility, at=call.now)
            self._library.audit.change(conn, call, "create", name)

        self._catalog.change(work)
        if call.decision is not None and call.decision.action == "create":
            return None
        with self._recorded(call, name):
            return self._library.commit(call, name, MAIN, None, (), "initial commit")

    def point(self, call: Call, name: str, ref: str, kind: str, start: str, overwrite: bool = False) -> None:
        """Makes a branch or tag that names the revision `start`, or moves it there with `overwrite`; raises NotFound, Denied, Conflict, Invalid."""
        call = self._allow_push(call, name)
        check_ref(ref)
        found = self._catalog.locate(name, start)
        if found is None or not found.digest:
            raise NotFound(f"{name} has no revision {start[:100]}", reason="revision")
        revision = as_revision(found, start)
        own, _ = self._catalog.ref(found.repo.id, ref)
        if own and not overwrite:
            raise Conflict(f"{name} has a ref {ref[:100]} already", do="choose another name, or move it", reason="exists")

        def work(conn: c.Connection) -> None:
            rule = c.Rule(call.decision is not None and call.decision.action == "create", None if overwrite else "")
            c.set_ref(conn, found.repo.id, ref, found.manifest_id, kind=kind, at=call.now, key_id=call.principal.key_id, rule=rule)
            self._library.audit.change(conn, call, "push", f"{name}@{revision.digest}", refs=[ref])

        with self._recorded(call, name):
            self._catalog.change(work)

    def kind(self, call: Call, name: str, ref: str) -> str:
        """Whether a ref is a branch or a tag; raises NotFound, Denied."""
        repo = self._catalog.repository(name)
        self._allow(call, name, repo, "list")
        own, kind = self._catalog.ref(repo.id, check_ref(ref)) if repo else ("", "")
        if not own:
            raise NotFound(f"{name} has no {ref[:100]}", reason="revision")
        return "branch" if ref == MAIN else kind

    # ---- uploads by a URL

    def upload_url(self, call: Call, name: str, oid: str, size: int) -> str:
        """What a URL carries so that a file of this SHA-256 and size can be put into the repository without a key; raises NotFound, Denied."""
        self._allow_push(call, name)
        return self._seal.close(PREFIX, [self._instance, call.principal.key_id, name, oid, size, int(call.now) + URL_LIFE_S])

    def bearer(self, text: str, request_id: str, address: str = "") -> tuple[Call, str, str, int]:
        """The call of such a URL, cut down to pushing into its repository, with name, SHA-256 and size; raises Unauthenticated, which is recorded."""
        now = self._floor.now(time.time())
        try:
            return self._bearer(text, request_id, now)
        except Unauthenticated as error:
            self._library.audit.denied(Call(Principal(), None, request_id, now), "login", "", error.reason, address)
            raise

    def _bearer(self, text: str, request_id: str, now: float) -> tuple[Call, str, str, int]:
        doc = self._seal.open(PREFIX, text)
        holder = self._entitlements.holder(doc[1]) if isinstance(doc, list) and len(doc) == 6 and doc[0] == self._instance else None
        if holder is None or not isinstance(doc, list):
            raise Unauthenticated("this upload URL is not valid here", do="ask for it again", reason="ticket_invalid")
        _, _, name, oid, size, end = doc
        alive = authenticate(holder, now)
        if not alive.allow:
            raise Unauthenticated(alive.words, do=alive.remedy, reason=alive.reason)
        if end <= now:
            raise Unauthenticated("this upload URL expired", do="run the upload again: it goes on where it was", reason="ticket_expired")
        principal = replace(holder, access=(Access("repository", name, ("push",)),))
        return Call(principal, None, request_id, now), name, oid, size

    def part(self, call: Call, name: str, oid: str, size: int) -> Upload:
        """The upload of a file that comes in several requests: one for each key, repository and file, so that a later run goes on with it."""
        allowed = self._allow_push(call, name)
        upload_id = hashlib.sha256("\n".join((call.principal.key_id, name, oid)).encode()).hexdigest()
        with self._recorded(call, name):
            try:
                return self._library.resume(allowed, name, upload_id)
            except NotFound:
                self._library.uploads.begin(allowed, name, digest=f"sha256:{oid}", size=size, algorithm="sha256", upload_id=upload_id)
            return self._library.resume(allowed, name, upload_id)  # which another request may have begun in this moment
