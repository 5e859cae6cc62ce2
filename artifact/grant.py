"""Who may pull, push or run what, until when: the one pure decision of registry and runtime; the clock is an argument, there is no I/O here.

The words of a refusal are written here once, so that every door and the runtime say the same thing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime

from artifact.reasons import REASONS

PROFILES = "/profiles"
TIERS = ("developer", "enterprise")
ACTIONS = ("pull", "create", "push", "run", "admin", "auditor")
# What needs no action of its own: stat tells type and size of what is there, list tells names; neither gives bytes.
PARTS = {"stat": ("pull", "create"), "list": ("pull", "create", "auditor")}
# Which of a token's actions open what is asked for (docs/operations.md, Authentication and roles); what is absent here no token opens.
SCOPED: dict[str, tuple[str, ...]] = {"pull": ("pull",), "create": ("push",), "push": ("push",), "delete": ("delete",), "catalog": ("*",)}
GOVERNED = ("pull", "run")  # what an entitlement is about: the rest is the site's own work
PRODUCTION = "production"
SOON_S = 60 * 86400  # from when on a yes warns of its end
MAX_DATE = 253402300799.0  # the last second of the year 9999
READER = "group"  # a token of an NGC client: it reads whatever its key may read, and lists it
SCOPED |= {"stat": ("pull", "push", "list"), "list": ("pull", "push", "list")}


@dataclass(frozen=True)
class Grant:
    """One right: patterns over canonical names of images and models, actions, life in seconds since 1970 (expires 0: never).

    `environment` is dev or production (empty counts as production), `gpus` a bound of its own (0: none),
    `profiles` patterns over the ids and names of profiles (none: every one); `id` is public.
    """

    models: tuple[str, ...]
    actions: tuple[str, ...] = ("pull", "run")
    not_before: float = 0.0
    expires: float = 0.0
    grace_s: int = 0
    id: str = ""
    environment: str = ""
    gpus: int = 0
    profiles: tuple[str, ...] = ()


@dataclass(frozen=True)
class Entitlement:
    """What a signed document gives an organisation, the ceiling over all its grants (docs/format.md section 8); empty tuples of
    products and environments give none of the kind, `gpus` 0 gives no GPU."""

    jti: str
    serial: int
    tier: str
    models: tuple[str, ...]
    actions: tuple[str, ...]
    not_before: float
    expires: float
    grace_s: int = 0
    gpus: int = 0
    products: tuple[str, ...] = ()
    environments: tuple[str, ...] = ()
    revoked_at: float = 0.0


@dataclass(frozen=True)
class Access:
    """What one scope of a token opens: type (repository or registry), name, actions pull, push, delete, list or * (distribution token spec)."""

    kind: str
    name: str
    actions: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.kind}:{self.name}:{','.join(self.actions)}"


@dataclass(frozen=True)
class Principal:
    """A key as the decision sees it, never its secret; key_id is empty for a caller without a key.

    `access` cuts the key's rights down to those of the token that was presented in its place; None is the key itself.
    `anonymous` is a caller without a key where the site lets everybody read what is public.
    `entitlement` is its organisation's document, without which `entitled_only` allows nothing of what belongs to others.
    `grants` are those of the key, of its member, of the member's teams and of its organisation together; `closed_at` is of the
    organisation, `disabled_at` of the member (0: neither).
    """

    key_id: str = ""
    org: str = ""
    tier: str = ""
    expires: float = 0.0
    revoked_at: float = 0.0
    grants: tuple[Grant, ...] = ()
    access: tuple[Access, ...] | None = None
    anonymous: bool = False
    entitlement: Entitlement | None = None
    entitled_only: bool = False
    closed_at: float = 0.0
    disabled_at: float = 0.0


@dataclass(frozen=True)
class Subject:
    """The repository as the decision sees it: canonical name, owning organisation (empty: the site), visibility public, org or private.

    `requires_product` and `requires_tier` are what its vendor asks for; both are empty for own weights. `unaccepted` is the licence that nobody
    has accepted for this site yet, `blocked` why the law lets nobody read it here; both are empty where nothing of the kind stands against it.
    """

    name: str
    org: str = ""
    visibility: str = "org"
    requires_tier: str = ""
    requires_product: str = ""
    unaccepted: str = ""
    blocked: str = ""


@dataclass(frozen=True)
class Decision:
    """The outcome: allow until when, with grace (0: no end), or a reason code with the words for a person and what would make it allowed.

    `ids` names the grant, and the entitlement where one was asked, that allowed it, or that would have but for its end.
    """

    allow: bool
    reason: str
    words: str = ""
    remedy: str = ""
    visible: bool = True
    warning: str = ""
    until: float = 0.0
    action: str = ""
    ids: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class GpuBounds:
    """How many GPUs may be leased: under the grant that allowed the run, and under the organisation's entitlement; None is no bound.

    The first is counted over the unexpired leases of that grant, the second over all leases of the organisation that an entitlement allowed.
    """

    grant: int | None = None
    entitlement: int | None = None


@dataclass(frozen=True)
class Lease:
    """A lease as the decision sees it, whose signature was verified before; `expires` 0 is the past, never without end."""

    expires: float
    grace_s: int = 0
    revoked_at: float = 0.0
    returned_at: float = 0.0


def date(at: float) -> str:
    """Seconds since 1970 as an RFC 3339 UTC text."""
    return datetime.fromtimestamp(min(max(at, 0.0), MAX_DATE), UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def refused(reason: str, ids: dict[str, str] | None = None, **facts: str) -> Decision:
    """The no of a code of artifact/reasons.py, with the facts of the case in its words, and the ids of what did not give it."""
    found = REASONS[reason]
    return Decision(False, reason, found.words.format(**facts), found.remedy.format(**facts), visible=found.status == 403, ids=ids or {})


def model_of(name: str) -> str:
    """The model that a repository belongs to: `<name>/profiles` is decided as `<name>` (docs/format.md, names)."""
    return name[: -len(PROFILES)] if name.endswith(PROFILES) else name


def matches(pattern: str, name: str) -> bool:
    """Whether a grant pattern covers a canonical name: `*` is one segment (also as a part of it), a last `**` is any rest of at least one."""
    want, have = pattern.split("/"), model_of(name).split("/")
    if want[-1] == "**":
        want = want[:-1]
        if len(have) <= len(want):
            return False
        have = have[: len(want)]
    return len(want) == len(have) and all(_segment(w, h) for w, h in zip(want, have, strict=True))


def _segment(pattern: str, text: str) -> bool:
    head, *rest = pattern.split("*")
    if not rest:
        return pattern == text
    if not text.startswith(head):
        return False
    at = len(head)
    for part in rest[:-1]:
        found = text.find(part, at)
        if found < 0:
            return False
        at = found + len(part)
    return len(text) - at >= len(rest[-1]) and text.endswith(rest[-1])


def includes(actions: tuple[str, ...], action: str) -> bool:
    """Whether the actions of a grant give one: push gives create and delete, admin gives all."""
    return action in actions or "admin" in actions or ("push" in actions and action in ("create", "delete"))


def authenticate(principal: Principal, now: float) -> Decision:
    """Whether a key whose HMAC matched is alive, and its organisation and member with it (decisions.md section 5, second row)."""
    if not principal.key_id:
        return refused("key_absent")
    # What was taken back is gone whatever its date says: another server's clock, or ours of then, may be ahead of now.
    ends = (
        ("key_revoked", principal.revoked_at, True),
        ("key_expired", principal.expires, principal.expires <= now),
        ("org_closed", principal.closed_at, True),
        ("member_disabled", principal.disabled_at, True),
    )
    for reason, at, over in ends:
        if at and over:
            return refused(reason, at=date(at), org=principal.org)
    return Decision(True, "ok")


def visible(principal: Principal, subject: Subject) -> bool:
    """Whether the name may be known to exist: public to every valid key, else to its organisation or to a grant that covers it."""
    if subject.visibility == "public":
        return True
    if subject.org and principal.org == subject.org and (subject.visibility == "org" or any("auditor" in g.actions for g in principal.grants)):
        return True
    return any(matches(p, subject.name) for g in principal.grants for p in g.models) and subject.org in ("", principal.org)


def scoped(principal: Principal, kind: str, name: str, action: str) -> bool:
    """Whether the presented token opens this for the caller; a key that was presented itself opens all that its grants do."""
    if principal.access is None:
        return True
    wanted = SCOPED.get(action, ())
    return any((a.kind == READER or (a.kind, a.name) == (kind, name)) and any(w in a.actions for w in wanted) for a in principal.access)


def insufficient(name: str, action: str) -> Decision:
    """The refusal of a token that was not made for this, told to clients so that they ask for another one (RFC 6750 section 3.1)."""
    words = f"the token does not open {name} for '{SCOPED.get(action, (action,))[0]}'"
    return Decision(False, "insufficient_scope", words, "ask the token endpoint again with the scope of the challenge")


def decide(principal: Principal, subject: Subject, action: str, now: float, profile: tuple[str, str] | None = None) -> Decision:
    """Allows `action` (one of ACTIONS, delete, stat or list) on `subject`, or says why not and what would; what is not a complete yes is no.

    `profile` is id and name of the profile that is to run; None asks about the model alone.
    The key's own rights come first, so that a token tells no more and no less than its key; only then the token's scope.
    """
    every = [_ways(principal, subject, part, now, profile)[0] for part in PARTS.get(action, (action,))]
    found = next((d for d in every if d.allow), every[0])
    if found.allow and not scoped(principal, "repository", subject.name, action):
        return insufficient(subject.name, action)
    return replace(found, action=action)


def run_ways(principal: Principal, subject: Subject, now: float, profile: tuple[str, str] | None = None) -> list[Decision]:
    """Every yes to a run, one for each grant that gives it, the widest first, or the one no: one grant's GPUs may be in use, and another's not."""
    ways = _ways(principal, subject, "run", now, profile)
    if ways[0].allow and not scoped(principal, "repository", subject.name, "run"):
        ways = [insufficient(subject.name, "run")]
    return [replace(d, action="run") for d in ways]


def gpu_bounds(principal: Principal, decision: Decision) -> GpuBounds:
    """The bounds of the grant and of the entitlement that a decision to run names; a grant that is gone gives no GPU."""
    if "grant" not in decision.ids:
        grant: int | None = None
    else:
        grant = next((g.gpus or None for g in principal.grants if g.id == decision.ids["grant"]), 0)
    if "entitlement" not in decision.ids:
        return GpuBounds(grant)
    document = principal.entitlement
    return GpuBounds(grant, document.gpus if document and document.jti == decision.ids["entitlement"] else 0)


def decide_gpus(bounds: GpuBounds, wanted: int, of_grant: int, of_entitlement: int) -> Decision:
    """Whether so many more GPUs may be leased beside those in use under the grant and under the entitlement; a CPU node wants none."""
    for bound, used, of in ((bounds.grant, of_grant, "the grant"), (bounds.entitlement, of_entitlement, "the entitlement")):
        if wanted > 0 and bound is not None and used + wanted > bound:
            return refused("gpus_exceeded", wanted=str(wanted), used=str(used), bound=str(bound), of=of)
    return Decision(True, "ok")


def decide_lease(lease: Lease | None, now: float) -> Decision:
    """Whether a verified lease still allows a start, without any registry: returned and revoked ones never do, an expired one within its grace.

    `now` is max(wall clock, floor). The reason is ok, grace (with a warning), lease_absent, lease_returned, lease_revoked or lease_expired.
    """
    if lease is None:
        return refused("lease_absent")
    if lease.returned_at:
        return refused("lease_returned", at=date(lease.returned_at))
    if lease.revoked_at:
        return refused("lease_revoked", at=date(lease.revoked_at))
    last = lease.expires + max(lease.grace_s, 0)
    if last <= now:
        return refused("lease_expired", at=date(lease.expires))
    if lease.expires > now:
        return Decision(True, "ok", until=last)
    return Decision(True, "grace", until=last, warning=f"the lease expired on {date(lease.expires)}; grace ends on {date(last)}")


def decide_open(principal: Principal, subject: Subject, action: str, now: float, profile: tuple[str, str] | None = None) -> Decision:
    """The decision of a site where everybody may read what is public: a living key, or its token, sees no less there than nobody does."""
    decision = decide(principal, subject, action, now, profile)
    if decision.allow or principal.anonymous or not authenticate(principal, now).allow:
        return decision
    nobody = Principal(access=principal.access, anonymous=True, entitled_only=principal.entitled_only)
    public = decide(nobody, subject, action, now)
    # A token that is too narrow for what its key may read is told so: its client asks for another one.
    return public if public.allow or public.reason == "insufficient_scope" else decision


def best(decisions: Sequence[Decision]) -> Decision:
    """The first yes; else that only the token is too narrow, so that the client asks for a wider one; else the first no."""
    for found in (next((d for d in decisions if d.allow), None), next((d for d in decisions if d.reason == "insufficient_scope"), None)):
        if found is not None:
            return found
    return decisions[0]


def _ways(principal: Principal, subject: Subject, action: str, now: float, profile: tuple[str, str] | None) -> list[Decision]:
    """Every yes to one action, the widest first, or the one no."""
    if principal.anonymous:
        return [_public(principal, subject, action, now)]
    alive = authenticate(principal, now)
    if not alive.allow:
        return [alive]
    if not visible(principal, subject):
        return [refused("not_visible")]
    name = model_of(subject.name)
    if subject.blocked and action in GOVERNED:
        return [refused("legal_block", name=name, why=subject.blocked)]
    if action != "auditor" and not _tier_enough(_rank(principal.tier), subject.requires_tier, "dev"):  # listings give no content
        tier, has = subject.requires_tier, f"this key has {principal.tier or 'none'}"
        return [refused("tier_missing", name=name, tier=tier, has=has, ask=f"a key of tier {tier}")]
    grants = _grants(principal, subject, action, now)
    if isinstance(grants, Decision):
        return [grants]
    # An organisation's own weights need no document, and have none over them. What reads no content is the site's own work.
    own = bool(subject.org) and subject.org == principal.org == name.split("/", 1)[0] and not (subject.requires_tier or subject.requires_product)
    governed = action in GOVERNED and not own
    no = _document(principal, subject, action, now) if governed else None
    if no is not None:
        return [no]
    left = _fitting(grants, principal, subject, action, governed, profile)
    if isinstance(left, Decision):
        return [left]
    if subject.unaccepted and action in GOVERNED:
        return [refused("license_unaccepted", name=name, license=subject.unaccepted)]
    document = principal.entitlement if governed else None
    ways = [(_yes(grant, document, principal, name, now), grant.gpus or float("inf")) for grant in left]
    if len(ways) > 1:
        ways.sort(key=lambda way: (way[0].reason == "ok", way[1] if action == "run" else 0, way[0].until or float("inf")), reverse=True)
    return [way[0] for way in ways]


def _public(principal: Principal, subject: Subject, action: str, now: float) -> Decision:
    """What everybody may do without a key, where the site says so: pull what is public and asks for nothing."""
    asks = (subject.requires_tier, subject.requires_product, subject.unaccepted, subject.blocked)
    free = not (any(asks) or principal.entitled_only)
    if not principal.key_id and action == "pull" and subject.visibility == "public" and free:
        return Decision(True, "ok")
    return authenticate(replace(principal, key_id=""), now)


def _rank(tier: str) -> int:
    return TIERS.index(tier) + 1 if tier in TIERS else 0


def _tier_enough(rank: int, requires: str, environment: str) -> bool:
    """Developer is enough for what asks for it in dev, enterprise for all; what asks for a tier that is not known is given to nobody."""
    return not requires or (requires in TIERS and rank >= (1 if requires == "developer" and environment == "dev" else 2))


def _grants(principal: Principal, subject: Subject, action: str, now: float) -> list[Grant] | Decision:
    """The grants that cover the name, give the action and are in their time or grace; else the no of those that came furthest."""
    name = model_of(subject.name)
    whole = action == "auditor" and subject.org != "" and subject.org == principal.org  # an auditor's own organisation, whatever the patterns
    covering = [g for g in principal.grants if any(matches(p, subject.name) for p in g.models) or (whole and "auditor" in g.actions)]
    if not covering:
        return refused("no_grant", name=name)
    able = [g for g in covering if includes(g.actions, action)]
    if not able:
        return refused("action_missing", name=name, action="push" if action == "delete" else action)
    started = [g for g in able if g.not_before <= now]
    if not started:
        return refused("grant_not_yet", name=name, at=date(min(g.not_before for g in able)))
    living = [g for g in started if not g.expires or g.expires + g.grace_s > now]
    last = max(started, key=lambda g: g.expires)
    return living or refused("grant_expired", {"grant": last.id} if last.id else None, name=name, at=date(last.expires))


def _document(principal: Principal, subject: Subject, action: str, now: float) -> Decision | None:
    """Why the organisation's entitlement does not give this, whatever the grant; None where it does, or where none is needed."""
    found, name, org = principal.entitlement, model_of(subject.name), principal.org
    if found is None:
        return refused("entitlement_absent", name=name, org=org) if principal.entitled_only else None
    ids = {"entitlement": found.jti} if found.jti else None
    if found.revoked_at:
        return refused("entitlement_revoked", ids, org=org, at=date(found.revoked_at))
    if found.not_before > now:
        return refused("entitlement_not_yet", ids, org=org, at=date(found.not_before))
    if found.expires + found.grace_s <= now:
        return refused("entitlement_expired", ids, org=org, at=date(found.expires))
    if not any(matches(p, subject.name) for p in found.models):
        return refused("entitlement_models", ids, org=org, name=name)
    if action not in found.actions:
        return refused("entitlement_actions", ids, org=org, action=action)
    if subject.requires_product and subject.requires_product not in found.products:
        return refused("product_missing", ids, org=org, name=name, product=subject.requires_product)
    return None


def _fitting(
    grants: list[Grant], principal: Principal, subject: Subject, action: str, governed: bool, profile: tuple[str, str] | None
) -> list[Grant] | Decision:
    """Those of the grants whose environment and profiles fit what is asked for and what the entitlement holds."""
    name, document = model_of(subject.name), principal.entitlement if governed else None
    if document is not None:
        held = [g for g in grants if (g.environment or PRODUCTION) in document.environments]
        if not held:
            return refused("environment", name=name, org=principal.org, environment=grants[0].environment or PRODUCTION)
        grants = held
    if subject.requires_tier and action != "auditor":
        rank = min(_rank(principal.tier), _rank(document.tier)) if document else _rank(principal.tier)
        enough = [g for g in grants if _tier_enough(rank, subject.requires_tier, g.environment)]
        if not enough:
            return _tier_missing(name, subject.requires_tier, rank, principal, document)
        grants = enough
    if action == "run" and profile is not None:
        named = [g for g in grants if not g.profiles or any(_segment(p, text) for p in g.profiles for text in profile)]
        return named or refused("profile_not_granted", name=name, profile=profile[1] or profile[0])
    return grants


def _tier_missing(name: str, tier: str, rank: int, principal: Principal, document: Entitlement | None) -> Decision:
    """The no to a key whose tier was enough for some grant, but not for those it has, or was cut by the entitlement."""
    has, ask = f"this key has {principal.tier}", "a key of tier enterprise"
    if document is not None and _rank(document.tier) < _rank(principal.tier):
        has, ask = f"the entitlement of {principal.org} gives {document.tier or 'none'}", "an entitlement of tier enterprise"
    if tier == "developer" and rank:
        has, ask = f"{has}, which is not enough for production", f"{ask}, or a grant of environment dev"
    return refused("tier_missing", name=name, tier=tier, has=has, ask=ask)


def _yes(grant: Grant, document: Entitlement | None, principal: Principal, name: str, now: float) -> Decision:
    """The yes of one grant under the document: until the first of their ends, with a warning in grace and before it."""
    ends = [(grant.expires, grant.expires + grant.grace_s, f"the grant on {name}")] if grant.expires else []
    if document is not None:
        ends.append((document.expires, document.expires + document.grace_s, f"the entitlement of {principal.org}"))
    if principal.expires:
        ends.append((principal.expires, principal.expires, "the API key"))
    ids = {"grant": grant.id} if grant.id else {}
    if document is not None:
        ids["entitlement"] = document.jti
    if not ends:
        return Decision(True, "ok", ids=ids)
    until = min(last for _, last, _ in ends)
    end, _, what = min(ends)
    if end <= now:
        return Decision(True, "grace", until=until, warning=f"{what} expired on {date(end)}; grace ends on {date(until)}", ids=ids)
    return Decision(True, "ok", until=until, warning=soon(what, end, now), ids=ids)


def soon(what: str, end: float, now: float) -> str:
    """The warning of what ends within 60 days; empty for what does not (0: never), or has."""
    if not 0 < end - now <= SOON_S:
        return ""
    days = int((end - now) // 86400)
    return f"{what} ends on {date(end)}, in {f'{days} days' if days else 'less than a day'}"
