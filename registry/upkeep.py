"""The administrator's verbs over what is held: removal and what it frees, history, rollback, immutability, quotas, retention rules, collections.

Each is checked by the guard's own decision before anything is read or changed, and recorded in the transaction of its change. It is a part of the
guard (registry/guard.py) in a file of its own; protocols reach it as `guard.upkeep`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from sqlalchemy import Connection

from artifact.errors import Conflict, Invalid, NotFound, Unavailable
from artifact.grant import Subject, date, model_of, visible
from artifact.manifest import check_name, check_ref, is_digest
from artifact.store import Call
from registry import holdings, terms, upstream
from registry.collector import Collector
from registry.database import retried
from registry.delegation import office
from registry.library import MAX_PAGE, Library
from registry.retention import Rule, removal
from registry.statements import Repo

MAX_QUOTA = 1 << 60
LISTED = 1000
HIDDEN = "a repository that this key does not see"
Allow = Callable[[Call, str, Repo | None, str], Call]
AllowSite = Callable[[Call], Call]


class _Undo(Exception):
    """Takes a dry run's transaction back."""


class Upkeep:
    """Verbs for keys with the action admin; `search` for every key."""

    def __init__(self, library: Library, collector: Collector, allow: Allow, allow_site: AllowSite, listing: Callable[[Call], None]) -> None:
        self._library, self._collector, self._allow, self._allow_site, self._demand_listing = library, collector, allow, allow_site, listing
        self._engine = library.catalog.engine

    def _admin(self, call: Call, name: str) -> tuple[Call, Repo]:
        repo = self._library.catalog.repository(check_name(name))
        call = self._allow(call, name, repo, "admin")
        if repo is None:
            raise NotFound(f"there is no repository {name}", reason="repo")
        return call, repo

    # ---- removal

    def remove(self, call: Call, body: Mapping[str, object]) -> dict[str, object]:
        """Removes a tag, a manifest or a whole repository (`name`, `ref`), or with `dry_run` tells what that would do and free.

        `referrers` takes signatures and the like along, `force` what profiles or an index still name. Raises NotFound, Denied, Conflict.
        """
        call, repo = self._admin(call, _text(body, "name"))
        ref = _text(body, "ref", empty=True)
        dry, along, force = (_flag(body, key) for key in ("dry_run", "referrers", "force"))
        with self._library.catalog.reading() as conn:
            self._pins(conn, repo, force)  # reads the documents before the transaction begins
        out: dict[str, object] = {}

        def work(conn: Connection) -> None:
            out.clear()
            out.update(self._remove(conn, call, repo, ref, along, force))
            if not dry and not force and (out["profiles"] or out["holders"]):
                named = [*_list(out["profiles"]), *_list(out["holders"])][0]
                raise Conflict(f"{named} still names what would go", do="remove that first, or add --force", reason="in_use")
            if dry:
                raise _Undo
            label = f"{repo.name}@{ref}" if ref else repo.name
            self._library.audit.change(conn, call, "delete", label, manifests=len(_list(out["manifests"])), bytes=out["bytes"])

        with suppress(_Undo):
            retried(self._engine, work)
        return out | {"dry_run": dry}

    def unpinned(self, call: Call, repo: Repo | None, digest: str) -> Callable[[Connection, Repo], None]:
        """Checks that no profile names a manifest, and returns that check for the transaction of its removal.

        Both raise Conflict `in_use` with the name of a repository that the caller may see, and Unavailable `pins`.
        """

        def check(conn: Connection, repo: Repo) -> None:
            if not holdings.linked(conn, repo.id, [digest]):
                return
            named = self._told(call, repo, self._pins(conn, repo, False), {digest})
            if named:
                raise Conflict(f"a profile in {named[0]} names {digest}", do="delete that first; an admin may use --force", reason="in_use")

        if repo is not None and is_digest(digest):
            with self._library.catalog.reading() as conn:
                check(conn, repo)  # the documents are read before the transaction begins
        return check

    def _told(self, call: Call, repo: Repo, pins: holdings.Pins, going: set[str]) -> list[str]:
        """The repositories whose profiles name what would go, as this caller may know them."""
        found = {where for (name, digest), by in pins.items() if name == repo.name and digest in going for where in by if where != repo.name}
        known = [beside for where in sorted(found) if (beside := self._library.catalog.repository(where)) and visible(call.principal, beside.subject)]
        return [beside.name for beside in known] + ([HIDDEN] if len(known) < len(found) else [])

    def _pins(self, conn: Connection, repo: Repo, force: bool) -> holdings.Pins:
        """What profiles name in a repository; where one cannot be read, only a removal by force goes on."""
        try:
            return self._collector.profiles.pins(conn, repo)
        except Unavailable as error:
            if not force or error.reason != "pins":
                raise
            return {}

    def _remove(self, conn: Connection, call: Call, repo: Repo, ref: str, along: bool, force: bool) -> dict[str, object]:
        tags, versions = holdings.facts(conn, repo, call.now, {})
        if ref and ref not in {t.name for t in tags} | {v.digest for v in versions}:
            raise NotFound(f"{repo.name} has no {ref[:100]}", do=f"airlock catalog show {repo.name}", reason="manifest")
        wish = removal(tags, versions, ref, referrers=along)
        going = set(wish.versions)
        profiles = self._told(call, repo, self._pins(conn, repo, force), going)
        blobs = holdings.blobs_of(conn, going) if ref else holdings.linked_blobs(conn, repo.id)
        holdings.remove(conn, repo, wish, call.now, call.principal.key_id)
        if not ref:
            holdings.empty(conn, repo.id, call.now)
        freed, until = holdings.freed(conn, repo.id, wish.versions, blobs, call.now)
        facts: dict[str, object] = {"name": repo.name, "ref": ref, "tags": list(wish.tags), "manifests": list(wish.versions)}
        facts |= {"bytes": sum(size for _, size in freed), "blobs": len(freed), "shared_blobs": len(blobs) - len(freed)}
        leased = date(until) if until > call.now else ""
        return facts | {"leased_until": leased, "referrers": list(wish.referrers), "profiles": profiles, "holders": list(wish.holders)}

    # ---- tags

    def history(self, call: Call, name: str, tag: str = "", before: int = 0, limit: int = 100) -> dict[str, object]:
        """Moves and removals of the tags of a repository, newest first; raises NotFound, Denied."""
        call, repo = self._admin(call, name)
        size = max(1, min(limit, MAX_PAGE))
        with self._library.catalog.reading() as conn:
            items = holdings.history(conn, repo.id, tag, before, size)
        return {"name": repo.name, "items": items, "before": items[-1]["id"] if len(items) == size else 0}

    def roll_back(self, call: Call, body: Mapping[str, object]) -> dict[str, object]:
        """Points the tag `tag` of `name` at a manifest `digest` of the repository; raises NotFound, Conflict, Denied."""
        call, repo = self._admin(call, _text(body, "name"))
        tag, digest = check_ref(_text(body, "tag")), _text(body, "digest")

        def work(conn: Connection) -> str:
            before = holdings.roll_back(conn, repo, tag, digest, call.now, call.principal.key_id)
            self._library.audit.change(conn, call, "rollback", f"{repo.name}:{tag}@{digest}", before=before)
            return before

        return {"name": repo.name, "tag": tag, "from": retried(self._engine, work), "to": digest}

    def set_immutable(self, call: Call, body: Mapping[str, object]) -> dict[str, object]:
        """Says whether the tags of `name` may move and go (`immutable`); raises NotFound, Denied."""
        call, repo = self._admin(call, _text(body, "name"))
        on = _flag(body, "immutable")

        def work(conn: Connection) -> None:
            holdings.set_immutable(conn, repo.id, on)
            self._library.audit.change(conn, call, "immutable", repo.name, on=on)

        retried(self._engine, work)
        return {"name": repo.name, "immutable": on}

    # ---- upstreams

    def require(self, call: Call, body: Mapping[str, object]) -> dict[str, object]:
        """Says what the keys of this site need for `name`: `tier`, `product`, empty for none, absent as before; raises NotFound, Denied, Invalid.

        What a bundle said, and what belongs to no organisation, is the site administrator's to change.
        """
        name = check_name(model_of(_text(body, "name")))
        tier, product = (_text(body, key, empty=True) if key in body else None for key in ("tier", "product"))
        call = self._policy(call, name)
        return retried(self._engine, lambda conn: upstream.require(conn, self._library.audit, call, name, tier, product))

    def set_terms(self, call: Call, body: Mapping[str, object]) -> dict[str, object]:
        """Says which `license` of `name` must have been accepted, who did (`accepted_by`), and why the law lets nobody read it here (`blocked`).

        Empty for none, absent as before; the same callers as for `require`, of a block the site's administrator. Raises NotFound, Denied, Invalid.
        """
        name = check_name(model_of(_text(body, "name")))
        given = [terms.check(body[key], key) if key in body else None for key in ("license", "accepted_by", "blocked")]
        call = self._policy(call, name)
        if "blocked" in body:
            call = self._allow_site(call)  # those whom a block stops do not lift it
        return retried(self._engine, lambda conn: terms.set_terms(conn, self._library.audit, call, name, *given))

    def _policy(self, call: Call, name: str) -> Call:
        """The call of who may say what stands before reading a name; raises NotFound, Denied."""
        if not office(call.principal, call.now).site:
            call, repo = self._admin(call, name)
            with self._library.catalog.reading() as conn:
                theirs = bool(repo.subject.org) and upstream.set_by(conn, repo.name) != upstream.IMPORT
            call = call if theirs else self._allow_site(call)
        else:
            call = self._allow_site(call)  # also of names that only their organisation sees: what a vendor asks for is the whole site's
        return call

    def upstreams(self, call: Call, name: str = "", after: int = 0, limit: int = 100) -> dict[str, object]:
        """What bundles told of the upstreams, of one name where it is given: all of it for the site's administrator, else for the auditor of an
        organisation what that may see; a page behind the row `after`. Raises Unauthenticated, Denied.
        """
        self._demand_listing(call)
        mine, org = office(call.principal, call.now), call.principal.org
        if not (mine.site or mine.audits):
            call = self._allow(call, org, Repo(0, org, "", "", Subject(org, org)), "auditor")
        size = max(1, min(limit, MAX_PAGE))
        with self._library.catalog.reading() as conn:
            page = upstream.page(conn, after, size, name)
        names = {str(row["name"]) for row in page}
        seen = {n for n in names if mine.site or ((repo := self._library.catalog.repository(n)) and visible(call.principal, repo.subject))}
        return {"items": [row for row in page if row["name"] in seen], "after": page[-1]["id"] if len(page) == size else 0}

    def search(self, call: Call, text: str, after: str = "", limit: int = 100) -> dict[str, object]:
        """Repositories with `text` in their name that this key may see; `after` is the next cursor; raises Unauthenticated, Invalid."""
        self._demand_listing(call)
        if not 0 < len(text) <= 255:
            raise Invalid("there is no text to search for", expected="1 to 255 characters", reason="q")
        size = max(1, min(limit, MAX_PAGE))
        with self._library.catalog.reading() as conn:
            page = holdings.search(conn, text, after, size, call.principal.org)
        items = [
            {"name": r.name, "display": r.display, "kind": r.kind, "org": r.subject.org, "immutable": r.immutable}
            for r in page
            if visible(call.principal, r.subject)
        ]
        return {"items": items, "after": page[-1].name if len(page) == size else ""}

    # ---- the site's

    def quota(self, call: Call, org: str) -> dict[str, object]:
        """An organisation's bytes and bound; raises NotFound, Denied."""
        self._allow_site(call)
        with self._library.catalog.reading() as conn:
            return holdings.quota_of(conn, org)

    def set_quota(self, call: Call, body: Mapping[str, object]) -> dict[str, object]:
        """Sets the bound of `org` to `bytes` (0: none); raises NotFound, Denied, Invalid."""
        call, org, size = self._allow_site(call), _text(body, "org"), _whole(body, "bytes", MAX_QUOTA)

        def work(conn: Connection) -> dict[str, object]:
            holdings.set_quota(conn, org, size)
            found = holdings.quota_of(conn, org)
            self._library.audit.change(conn, call, "quota", org, bytes=size)
            return found

        return retried(self._engine, work)

    def rules(self, call: Call) -> dict[str, object]:
        """The retention rules; raises Denied."""
        self._allow_site(call)
        with self._library.catalog.reading() as conn:
            return {"items": [rule.as_json() for rule in holdings.rules(conn)]}

    def set_rule(self, call: Call, body: Mapping[str, object]) -> dict[str, object]:
        """Makes or replaces a retention rule, or removes it with `remove`; raises Denied, Invalid, NotFound."""
        call, pattern = self._allow_site(call), _text(body, "pattern")
        globs = body.get("keep_tags", [])
        if not isinstance(globs, list) or not all(isinstance(glob, str) for glob in globs):
            raise Invalid("keep_tags is no list of texts", reason="body")
        last, days, untagged = (_whole(body, key, 1 << 31, absent=0) for key in ("keep_last", "keep_days", "untagged_days"))
        rule = Rule(pattern, last, days, untagged, tuple(globs))
        gone = _flag(body, "remove")

        def work(conn: Connection) -> None:
            if not gone:
                holdings.set_rule(conn, rule, call.now)
            elif not holdings.drop_rule(conn, pattern):
                raise NotFound(f"there is no retention rule for {pattern[:100]}", do="airlock catalog retention", reason="rule")
            self._library.audit.change(conn, call, "retention_rule", pattern, removed=gone, rule={} if gone else rule.as_json())

        retried(self._engine, work)
        return {"removed": pattern} if gone else rule.as_json()

    def collect(self, call: Call, body: Mapping[str, object]) -> dict[str, object]:
        """Starts a collection, or tells with `dry_run` what one would do; raises Denied, Conflict `running`."""
        call = self._allow_site(call)
        if _flag(body, "dry_run"):
            return self._collector.dry_run(call.now).as_json(LISTED)
        self._collector.begin(call.now)
        return self._collector.status()

    def collection(self, call: Call) -> dict[str, object]:
        """The state of the collection; raises Denied."""
        self._allow_site(call)
        return self._collector.status()


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def _text(body: Mapping[str, object], key: str, *, empty: bool = False) -> str:
    value = body.get(key, "" if empty else None)
    if not isinstance(value, str) or len(value) > 512 or not (value or empty) or any(ord(c) < 32 or 0xD800 <= ord(c) <= 0xDFFF for c in value):
        raise Invalid(f"{key} is missing or not text", expected="1 to 512 characters", reason="body")
    return value


def _flag(body: Mapping[str, object], key: str) -> bool:
    value = body.get(key, False)
    if not isinstance(value, bool):
        raise Invalid(f"{key} is not true or false", reason="body")
    return value


def _whole(body: Mapping[str, object], key: str, most: int, absent: int | None = None) -> int:
    value = body.get(key, absent)
    if type(value) is not int or not 0 <= value <= most:
        raise Invalid(f"{key} is no whole number", expected=f"0 to {most}", reason="body")
    return value
