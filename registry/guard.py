"""The same verbs as the library's, each checked by the pure decision before anything is read or changed: protocols receive only this.

A verb is written out here or it does not exist. Refusals say what decisions section 5 allows: nothing about a name that the caller may not see.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

from artifact.errors import Denied, Invalid, NotFound, Throttled, Unauthenticated
from artifact.grant import PROFILES, Access, Decision, Subject, authenticate, best, date, decide, decide_open, insufficient, scoped, visible
from artifact.manifest import check_name, check_ref
from artifact.reasons import DEAD
from artifact.store import Call, Change, Content, Descriptor, File, Files, Page, Registry, Revision, Upload
from registry.admission import Admission, Policy
from registry.audit import Audit
from registry.auditor import Auditor
from registry.catalog import Located, Repo
from registry.collector import Collector
from registry.delegation import Office, office
from registry.documents import Documents
from registry.entitlements import Entitlements
from registry.expiring import Expiring
from registry.floor import Floor
from registry.home import Home
from registry.issuance import Issuance
from registry.leasing import Leasing
from registry.ledger import Ledger
from registry.library import MAX_PAGE, Library, as_revision, damaged
from registry.lookup import Ask, Lookup, Sought
from registry.ngc_views import NgcViews
from registry.pace import CHANGES, Pace
from registry.revisions import Revisions
from registry.roster import Roster
from registry.rows import owner_of
from registry.s3_views import S3Views
from registry.sequencer import Sequencer
from registry.sigv4 import Signed
from registry.tokens import granted
from registry.upkeep import Upkeep

EVERYTHING = "every.name/of/this/site"  # a name that a grant on `**` covers; no organisation is called like its first segment


class Guard(Registry, Files):
    """Access control over one library; holds no state of its own."""

    def __init__(
        self,
        library: Library,
        entitlements: Entitlements,
        audit: Audit,
        home: Home,
        floor: Floor,
        lease_life_s: int = 86400,
        lease_grace_s: int = 3 * 86400,
        policy: Policy | None = None,
    ) -> None:
        self._library = library
        self._entitlements = entitlements
        self._audit = audit
        self._open = policy is not None and policy.anonymous
        self._pace = Pace(CHANGES)
        self._desk = desk = (library.catalog.engine, entitlements, audit, self._office, self._refuse)
        self.roster, self.issuance, self.documents = Roster(*desk), Issuance(*desk), Documents(*desk, home=home, floor=floor)
        self.revisions = Revisions(library, entitlements, home, floor, self._allow, self._allow_push, self._recorded)
        self.leasing = Leasing(*desk, library=library, home=home, floor=floor, life_s=lease_life_s, grace_s=lease_grace_s)
        self._admission = Admission(entitlements, Lookup(library.catalog.engine), audit, home, policy or Policy(), floor)
        self.ngc = NgcViews(library, self._admission, self._allow, self._seen, home)
        self.s3 = S3Views(library, self._decide, self._seen)

    def caller(self, key_text: str | Signed | None, request_id: str, now: float, address: str = "", ask: Ask = ()) -> Call:
        """The call of a key, token or signature, with what it asks for, by one statement; see registry/admission.py."""
        return self._admission.caller(key_text, request_id, now, address, ask)

    def _locate(self, call: Call, repo: str, ref: str) -> Located | None:
        if isinstance(call, Sought) and ((call.ask[0] in ("manifest", "head") and call.ask[1:] == (repo, ref)) or call.of_hub(repo, ref)):
            return call.found
        return self._library.catalog.locate(repo, ref)

    def _find(self, call: Call, repo: str, digest: str) -> Located | None:
        if isinstance(call, Sought) and call.object(repo, digest):
            return call.found
        return self._library.catalog.find(repo, digest)

    def _file(self, call: Call, repo: str, ref: str, path: str) -> Located | None:
        if isinstance(call, Sought) and (call.ask == ("file", repo, ref, path) or call.of_hub(repo, ref, path)):
            return call.found
        return self._library.catalog.file(repo, ref, path)

    def token(self, call: Call | None, asked: Sequence[Access], request_id: str = "", now: float = 0.0) -> tuple[str, tuple[Access, ...], int]:
        """A token that opens what of `asked` this caller may do, what that is, and its life in seconds; a subset is no error.

        Without a call it is nobody's token, which opens what everybody may read here. Raises Unauthenticated, TooLarge.
        """
        call = call or self._admission.nobody(request_id, now)
        if call.principal.access is not None:
            raise Unauthenticated("a token is not exchanged for another", do="present the API key", reason="token_invalid")
        found: dict[str, Repo | None] = {}
        named = []
        for access in asked:
            with suppress(Invalid):
                repo = self._library.catalog.repository(check_name(access.name)) if access.kind == "repository" else None
                named.append(replace(access, name=repo.name) if repo else access)  # an alias opens what it stands for now
                found[named[-1].name] = repo
        under: set[tuple[str, str]] = set()
        given = granted(named, lambda access, action: self._may(call, access, action, found, under))
        token, life = self._admission.sign(call, given)
        if call.principal.key_id:
            ids = {kind: ",".join(sorted(value for of, value in under if of == kind))[:400] for kind, _ in sorted(under)}
            self._audit.read(replace(call, decision=Decision(True, "ok", ids=ids)), ",".join(map(str, given))[:400], "token", 0, "token")
        return token, given, life

    def _may(self, call: Call, access: Access, action: str, found: Mapping[str, Repo | None], under: set[tuple[str, str]]) -> bool:
        name, repo = access.name, found.get(access.name)
        if access.kind == "registry":
            return name == "catalog" and action == "*" and authenticate(call.principal, call.now).allow
        if name not in found or (action == "delete" and repo is None):
            return False
        decision = self._push_decision(call, name, repo) if action == "push" else self._decide(call, self._subject(call, name, repo), action)
        under |= set(decision.ids.items()) if decision.allow else set()
        return decision.allow

    def attach(self, collector: Collector, certificate: Path | None) -> None:
        """Gives this guard the administrator's verbs over what is held (registry/upkeep.py), and the calendar of what ends."""
        self.expiring = Expiring(*self._desk, certificate=certificate)
        self.upkeep = Upkeep(self._library, collector, self._allow, self._allow_site, self._demand_listing)

    def open_log(self, log: Sequencer) -> None:
        """Gives this guard the auditors' verbs over the signed log (registry/auditor.py)."""
        self.auditor = Auditor(Ledger(self._library.catalog.engine, log), self._entitlements, self._audit, self._office, self._refuse)

    def _office(self, call: Call) -> Office:
        self._demand_alive(call)
        return office(call.principal, call.now)

    def _allow_site(self, call: Call) -> Call:
        """The call of the site's administrator: a key with action admin on every name."""
        decision = decide(call.principal, Subject(EVERYTHING, "", "public"), "admin", call.now)
        if not decision.allow and decision.reason in ("no_grant", "action_missing"):
            words = "this is the site administrator's: it needs a grant on '**' with action admin"
            decision = replace(decision, words=words, remedy="ask for a key with --models '**' --actions admin")
        if not decision.allow:
            self._refuse(call, "admin", "", decision)
        return call.under(decision)

    def ping(self, call: Call) -> None:
        """Returns where the caller presented something that is valid here, be it nobody's token; raises Unauthenticated."""
        if call.principal.anonymous and call.principal.access is None:
            self._demand_alive(call)

    def paced(self, call: Call) -> None:
        """Returns where a living key may send one more change in this minute; raises Unauthenticated, Throttled."""
        self._demand_alive(call)
        wait = self._pace.wait_s(call.principal.key_id, call.now)
        if wait:
            raise Throttled("this key sends too many changes", expected=f"at most {CHANGES} in a minute", do=f"wait {wait} s", retry_after=wait)

    def whoami(self, call: Call) -> dict[str, object]:
        """The public facts of the presented key; `expires` is RFC 3339, empty for never; raises Unauthenticated."""
        self._demand_alive(call)
        who = call.principal
        return {"key_id": who.key_id, "org": who.org, "tier": who.tier, "expires": date(who.expires) if who.expires else ""}

    def _refuse(self, call: Call, action: str, name: str, decision: Decision) -> NoReturn:
        if decision.reason == "insufficient_scope":  # the key may: no denial, the client asks for another token
            raise Unauthenticated(decision.words, do=decision.remedy, reason=decision.reason)
        self._audit.denied(replace(call, decision=decision), action, name, decision.reason)
        if call.principal.anonymous and call.principal.access is not None:
            raise Unauthenticated(decision.words, do=decision.remedy, reason="insufficient_scope")
        if decision.reason in DEAD:
            raise Unauthenticated(decision.words, do=decision.remedy, reason=decision.reason)
        if not decision.visible:
            raise NotFound(decision.words, do=decision.remedy, reason="not_visible")
        raise Denied(decision.words, do=decision.remedy, reason=decision.reason)

    def _decide(self, call: Call, subject: Subject, action: str, profile: tuple[str, str] | None = None) -> Decision:
        return (decide_open if self._open else decide)(call.principal, subject, action, call.now, profile)

    def _allow(self, call: Call, name: str, repo: Repo | None, *actions: str, profile: tuple[str, str] | None = None) -> Call:
        """The call with its decision, allowed by any of `actions` (a run: of that profile); a name that is not there is refused as not visible."""
        subject = repo.subject if repo else Subject(name, org="\0", visibility="private")
        decision = best([self._decide(call, subject, action, profile) for action in actions])
        if decision.allow:
            return call.under(decision)
        self._refuse(call, actions[0], name, decision)

    @contextmanager
    def _recorded(self, call: Call, name: str) -> Iterator[None]:
        """Records what the library refuses by the state that it finds: a ref that exists, a quota."""
        try:
            yield
        except Denied as error:
            self._audit.denied(call, "push", name, error.reason)
            raise

    def _subject(self, call: Call, name: str, found: Repo | None) -> Subject:
        """What a name is decided as: its repository, or that which its first push would make."""
        if found is not None:
            return found.subject
        owner = owner_of(name)
        theirs = owner and owner != call.principal.org
        known = not owner or self._library.catalog.org_exists(owner)
        free = Subject(name, "", "public")
        if theirs and not known and decide(replace(call.principal, access=None), free, "admin", call.now).allow:
            return free
        # What belongs to no organisation is decided as another organisation's, so that a push does not tell which ones there are.
        return Subject(name, owner, "org") if owner else free

    def _push_decision(self, call: Call, name: str, found: Repo | None) -> Decision:
        """Whether this caller may push, or create only; a new name needs an organisation of its first segment, or the action admin."""
        subject = self._subject(call, name, found)
        bare = replace(call.principal, access=None)  # what the key may comes first: a token does not change the words
        decision = best([decide(bare, subject, action, call.now) for action in ("push", "create")])
        admin = decision if subject.org else decide(bare, subject, "admin", call.now)
        if not admin.allow and found is not None:  # the site's own names, mirrored ones among them, are the administrator's
            return admin
        if decision.allow and not admin.allow:
            words = f"there is no organisation {name.split('/', 1)[0]}, and only a key with action admin may push under another first segment"
            return Decision(False, "no_org", words, f"push as {call.principal.org}/…, or ask the administrator")
        if decision.allow and not scoped(call.principal, "repository", subject.name, "push"):
            return insufficient(subject.name, "push")
        return decision

    def _allow_push(self, call: Call, name: str) -> Call:
        """The call allowed to push; what it may push is in its decision's action: everything, or (create) no ref that exists."""
        decision = self._push_decision(call, name, self._library.catalog.repository(check_name(name)))
        if not decision.allow:
            self._refuse(call, "push", name, decision)
        return call.under(decision)

    def demand_push(self, call: Call, repo: str) -> None:
        """Returns where this caller may push or create; raises NotFound, Denied, Unauthenticated."""
        self._allow_push(call, repo)

    def resolve(self, call: Call, repo: str, ref: str) -> Descriptor:
        """The manifest that a tag, commit or digest names, for a key that may pull or push; raises NotFound, Denied."""
        found = self._locate(call, repo, ref)
        self._allow(call, repo, found.repo if found else None, "stat")
        if found is None or not found.digest:
            raise NotFound(f"{repo} has no manifest {ref[:100]}", do="see the tags of the repository", reason="manifest")
        return found.descriptor()

    def beside_store(self, host: str) -> bool:
        """Whether a client that knows us by this Host would carry its key on to the store's URLs."""
        return self._library.blobs.beside(host)

    def stat(self, call: Call, repo: str, digest: str) -> Descriptor:
        """Type and size of a linked blob or manifest without its bytes, for a key that may pull or push; raises NotFound, Denied."""
        found = self._find(call, repo, digest)
        self._allow(call, repo, found.repo if found else None, "stat")
        if found is None or not found.digest:
            raise NotFound(f"{repo} has no blob {digest[:100]}", reason="blob")
        if not found.manifest_id and not found.location:
            raise damaged(repo, digest)  # a 404: whoever pushes sends the bytes again
        if self._library.leasable(call, found) and self._push_decision(call, repo, found.repo).allow and not self._library.lease(call, found):
            raise NotFound(f"{repo} has no blob {digest[:100]}", reason="blob")
        return Descriptor(found.media_type or "application/octet-stream", digest, found.size, found.artifact_type)

    def read(self, call: Call, repo: str, digest: str, lo: int = 0, hi: int | None = None) -> Content:
        """Bytes [lo, hi) of a blob or manifest; the first read is recorded before it returns; raises NotFound, Denied, RangeInvalid, Unavailable."""
        found = self._find(call, repo, digest)
        allowed = self._allow(call, repo, found.repo if found else None, "pull")
        content = self._library.content(repo, digest, found, lo, hi, redirect=call.redirect)
        self._audit.read(allowed, repo, digest if found and found.manifest_id else "blob", content.total)
        return content

    def served(self, call: Call, repo: str, digest: str, size: int) -> None:
        """Counts bytes that the door streamed itself."""
        self._audit.served(call, repo, digest, size)

    def upload(self, call: Call, repo: str, *, digest: str | None = None, size: int | None = None, algorithm: str = "sha256") -> Upload:
        """Starts an upload; raises NotFound, Denied, Unsupported."""
        allowed = self._allow_push(call, repo)
        with self._recorded(call, repo):
            return self._library.upload(allowed, repo, digest=digest, size=size, algorithm=algorithm)

    def resume(self, call: Call, repo: str, upload_id: str) -> Upload:
        """Continues a suspended upload of the same key; raises NotFound, Denied."""
        return self._library.resume(self._allow_push(call, repo), repo, upload_id)

    def push(
        self, call: Call, repo: str, raw: bytes, media_type: str, *, refs: Sequence[str] = (), expect: str | None = None, over: str | None = None
    ) -> Descriptor:
        """Stores a manifest and moves `refs` to it; raises NotFound, Denied, Invalid, Mismatch, Conflict, TooLarge."""
        for ref in refs:
            check_ref(ref)
        allowed = self._allow_push(call, repo)
        with self._recorded(call, repo):
            return self._library.push(allowed, repo, raw, media_type, refs=refs, expect=expect, over=over)

    def mount(self, call: Call, repo: str, digest: str, source: str) -> Descriptor | None:
        """Links a blob of `source`, where this key may pull it; None otherwise, whatever the cause."""
        allowed = self._allow_push(call, repo)
        found = self._library.catalog.repository(source)
        if found is None or not self._decide(call, found.subject, "pull").allow:
            return None
        return self._library.mount(allowed, repo, digest, source)

    def delete(self, call: Call, repo: str, ref: str) -> None:
        """Removes a ref, or a manifest that no profile names, or a blob link; raises NotFound, Denied, Conflict, Unavailable."""
        found = self._library.catalog.repository(repo)
        allowed = self._allow(call, repo, found, "delete")
        self._library.delete(allowed, repo, ref, self.upkeep.unpinned(call, found, ref))

    def _demand_alive(self, call: Call) -> None:
        alive = authenticate(call.principal, call.now)
        if not alive.allow:
            self._refuse(call, "list", "", alive)

    def _demand_listing(self, call: Call) -> None:
        self._demand_alive(call)
        if not scoped(call.principal, "registry", "catalog", "catalog"):
            self._refuse(call, "list", "", insufficient("the catalog", "catalog"))

    def _seen(self, call: Call, prefix: str, after: str, limit: int) -> tuple[list[Repo], str]:
        self._demand_listing(call)
        size = max(0, min(limit, MAX_PAGE))
        out: list[Repo] = []
        while len(out) < size:
            page = self._library.catalog.repositories(prefix, after, size, call.principal.org)
            for repo in page:
                after = repo.name
                if visible(call.principal, repo.subject):
                    out.append(repo)
                    if len(out) == size:
                        return out, after
            if len(page) < size:
                return out, ""
        return out, ""

    def list(self, call: Call, prefix: str = "", after: str = "", limit: int = 100) -> Page:
        """Repository names that this key may see, in byte order; raises Unauthenticated."""
        repos, cursor = self._seen(call, prefix, after, limit)
        return Page(tuple(r.name for r in repos), cursor)

    def refs(self, call: Call, repo: str, after: str = "", limit: int = 100) -> Page:
        """Ref names of a repository; raises NotFound, Denied."""
        found = self._library.catalog.repository(repo)
        self._allow(call, repo, found, "list")
        return self._library.refs_of(repo, found, after, limit)

    def referrers(self, call: Call, repo: str, digest: str, kind: str = "", after: str = "") -> Page:
        """Descriptors whose `subject` is `digest`; raises NotFound, Denied."""
        found = self._library.catalog.repository(repo)
        self._allow(call, repo, found, "list")
        return self._library.referrers_of(repo, found, digest, kind, after)

    def _revision(self, call: Call, repo: str, ref: str, found: Located | None) -> Located:
        self._allow(call, repo, found.repo if found else None, "pull")
        if found is None or not found.digest:
            raise NotFound(f"{repo} has no revision {ref[:100]}", reason="revision")
        return found

    def revision(self, call: Call, repo: str, ref: str) -> Revision:
        """The revision that a branch, tag or commit id names; raises NotFound `not_visible` or `revision`, Denied."""
        return as_revision(self._revision(call, repo, ref, self._locate(call, repo, ref)), ref)

    def file(self, call: Call, repo: str, ref: str, path: str) -> tuple[Revision, File]:
        """One file of a revision; raises NotFound `not_visible`, `revision` or `entry`, Denied."""
        found = self._file(call, repo, ref, path)
        self._allow(call, repo, found.repo if found else None, "pull")
        return self._library.file_of(repo, ref, path, found)

    def files(self, call: Call, repo: str, ref: str, prefix: str = "", after: str = "", limit: int = 1000) -> tuple[Revision, Page]:
        """Files of a revision below `prefix`; raises NotFound `not_visible` or `revision`, Denied."""
        found = self._revision(call, repo, ref, self._locate(call, repo, ref))
        return as_revision(found, ref), self._library.files_page(found, prefix, after, limit)

    def commit(self, call: Call, repo: str, branch: str, parent: str | None, changes: Sequence[Change], title: str = "") -> Revision:
        """Puts a new revision on a branch; raises NotFound, Denied, Conflict, Invalid, TooLarge."""
        check_ref(branch)
        allowed = self._allow_push(call, repo)
        with self._recorded(call, repo):
            return self._library.commit(allowed, repo, branch, parent, changes, title)

    def recorded(self, call: Call, after: int = 0, limit: int = 100) -> dict[str, object]:
        """A page of what is recorded about the key's own organisation, oldest first, for its auditor; `after` 0 is the end; raises Denied."""
        who = call.principal
        decision = decide(who, Subject(who.org, who.org), "auditor", call.now)
        if decision.reason in ("no_grant", "action_missing"):
            decision = replace(decision, words=f"what is recorded about {who.org} is its auditor's", remedy="ask for a key with action auditor")
        if not decision.allow:
            self._refuse(call, "audit", "", decision)
        self._audit.read(call.under(decision), who.org, "audit", 0, "audit")
        items, onward = self._audit.rows(who.org, after, max(1, min(limit, MAX_PAGE)))
        return {"items": items, "after": onward}

    def catalog_list(self, call: Call, after: str = "", limit: int = 100) -> dict[str, object]:
        """A page of what this key may see: items with name, display, kind, org, visibility, gated, entitled; `after` is the next cursor."""
        repos, cursor = self._seen(call, "", after, limit)
        return {"items": [self._summary(call, r) for r in repos], "after": cursor}

    def _summary(self, call: Call, repo: Repo) -> dict[str, object]:
        decision = self._decide(call, repo.subject, "pull")
        facts: dict[str, object] = {"name": repo.name, "display": repo.display, "kind": repo.kind, "org": repo.subject.org}
        facts |= {"requires_tier": repo.subject.requires_tier, "requires_product": repo.subject.requires_product}
        facts |= {"unaccepted": repo.subject.unaccepted, "blocked": repo.subject.blocked}
        return facts | {"visibility": repo.subject.visibility, "gated": repo.gated, "entitled": decision.allow, "reason": decision.reason}

    def catalog_show(self, call: Call, name: str) -> dict[str, object]:
        """A repository's summary, with its refs (digest, type, size, commit, files, bytes) and a model's profiles' refs for who may list them.

        Raises NotFound for a name that the caller does not see.
        """
        self._demand_listing(call)
        found = self._library.catalog.repository(name)
        if found is None or not visible(call.principal, found.subject):
            self._allow(call, name, found, "pull")
        if found is None:
            raise NotFound(f"there is no repository {name}", reason="not_visible")
        beside = None if name.endswith(PROFILES) else self._library.catalog.repository(name + PROFILES)
        return self._summary(call, found) | {"refs": self._details(call, found), "profiles": self._details(call, beside)}

    def _details(self, call: Call, repo: Repo | None) -> Sequence[dict[str, object]]:
        """What is known of a repository's refs, nothing for a caller who may not list them."""
        if repo is None or not self._decide(call, repo.subject, "list").allow:
            return []
        return self._library.catalog.details(repo.id)

    def lease(self, call: Call, body: Mapping[str, object]) -> dict[str, object]:
        """A signed lease for one model, profile and set of GPUs (registry/leasing.py); raises Invalid, NotFound, Denied."""
        return self.leasing.lease(call, body, lambda call, name, repo, profile: self._allow(call, name, repo, "run", profile=profile))

    def standing(self, call: Call) -> dict[str, object]:
        """What the presented key has now and what of it ends soon (registry/documents.py); raises Unauthenticated."""
        self._demand_alive(call)
        return self.documents.standing(call)
