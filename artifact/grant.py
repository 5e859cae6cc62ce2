"""Who may pull, push or run what, until when: the one pure decision of registry and runtime; the clock is an argument, there is no I/O here.

The words of a refusal are written here once, so that every door and the runtime say the same thing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime

PROFILES = "/profiles"
TIERS = ("developer", "enterprise")
ACTIONS = ("pull", "create", "push", "run", "admin", "auditor")
# What needs no action of its own: stat tells type and size of what is there, list tells names; neither gives bytes.
PARTS = {"stat": ("pull", "create"), "list": ("pull", "create", "auditor")}
# Which of a token's actions open what is asked for (docs/operations.md, Authentication and roles); what is absent here no token opens.
SCOPED: dict[str, tuple[str, ...]] = {"pull": ("pull",), "create": ("push",), "push": ("push",), "delete": ("delete",), "catalog": ("*",)}
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


@dataclass(frozen=True)
class Subject:
    """The repository as the decision sees it: canonical name, owning organisation (empty: the site), visibility public, org or private.

    `requires_product` and `requires_tier` are what its vendor asks for; both are empty for own weights.
    """

    name: str
    org: str = ""
    visibility: str = "org"
    requires_tier: str = ""
    requires_product: str = ""


@dataclass(frozen=True)
class Decision:
    """The outcome: allow until when (0: no end), or a reason code with the words for a person and what would make it allowed."""

    allow: bool
    reason: str
    words: str = ""
    remedy: str = ""
    visible: bool = True
    warning: str = ""
    until: float = 0.0
    action: str = ""
    ids: dict[str, str] = field(default_factory=dict)


def date(at: float) -> str:
    """Seconds since 1970 as an RFC 3339 UTC text."""
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


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
    """Whether a key whose HMAC matched is alive (decisions.md section 5, second row)."""
    if not principal.key_id:
        return Decision(False, "key_absent", "no API key was given, or it is not valid here", "pass a key of this registry", visible=False)
    if principal.revoked_at and principal.revoked_at <= now:
        words = f"the API key was revoked on {date(principal.revoked_at)}"
        return Decision(False, "key_revoked", words, "ask the administrator for a new key", visible=False)
    if principal.expires and principal.expires <= now:
        words = f"the API key expired on {date(principal.expires)}"
        return Decision(False, "key_expired", words, "ask the administrator for a new key", visible=False)
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
    return any(a.kind == kind and a.name == name and any(w in a.actions for w in wanted) for a in principal.access)


def insufficient(name: str, action: str) -> Decision:
    """The refusal of a token that was not made for this, told to clients so that they ask for another one (RFC 6750 section 3.1)."""
    words = f"the token does not open {name} for '{SCOPED.get(action, (action,))[0]}'"
    return Decision(False, "insufficient_scope", words, "ask the token endpoint again with the scope of the challenge")


def decide(principal: Principal, subject: Subject, action: str, now: float) -> Decision:
    """Allows `action` (one of ACTIONS, delete, stat or list) on `subject`, or says why not and what would; what is not a complete yes is a no.

    The key's own rights come first, so that a token tells no more and no less than its key; only then the token's scope.
    """
    judge = _public if principal.anonymous else _decide
    every = [judge(principal, subject, part, now) for part in PARTS.get(action, (action,))]
    found = next((d for d in every if d.allow), every[0])
    if found.allow and not scoped(principal, "repository", subject.name, action):
        return insufficient(subject.name, action)
    return replace(found, action=action)


def decide_open(principal: Principal, subject: Subject, action: str, now: float) -> Decision:
    """The decision of a site where everybody may read what is public: a living key, or its token, sees no less there than nobody does."""
    decision = decide(principal, subject, action, now)
    if decision.allow or principal.anonymous or not authenticate(principal, now).allow:
        return decision
    public = decide(Principal(access=principal.access, anonymous=True), subject, action, now)
    # A token that is too narrow for what its key may read is told so: its client asks for another one.
    return public if public.allow or public.reason == "insufficient_scope" else decision


def best(decisions: Sequence[Decision]) -> Decision:
    """The first yes; else that only the token is too narrow, so that the client asks for a wider one; else the first no."""
    for found in (next((d for d in decisions if d.allow), None), next((d for d in decisions if d.reason == "insufficient_scope"), None)):
        if found is not None:
            return found
    return decisions[0]


def _public(principal: Principal, subject: Subject, action: str, now: float) -> Decision:
    """What everybody may do without a key, where the site says so: pull what is public and asks for no tier."""
    if not principal.key_id and action == "pull" and subject.visibility == "public" and not subject.requires_tier:
        return Decision(True, "ok")
    return authenticate(replace(principal, key_id=""), now)


def _decide(principal: Principal, subject: Subject, action: str, now: float) -> Decision:
    alive = authenticate(principal, now)
    if not alive.allow:
        return alive
    if not visible(principal, subject):
        words = "this key sees no model of that name (absent, or another organisation's)"
        return Decision(False, "not_visible", words, "check the name, or ask for a key of the organisation that owns it", visible=False)
    if subject.requires_tier == "enterprise" and principal.tier != "enterprise" and action != "auditor":  # listings give no content
        words = f"{model_of(subject.name)} requires the enterprise tier; this key has {principal.tier or 'none'}"
        return Decision(False, "tier_missing", words, "ask for a key of tier enterprise")
    return _grants(principal, subject, action, now)


def _grants(principal: Principal, subject: Subject, action: str, now: float) -> Decision:
    name = model_of(subject.name)
    whole = action == "auditor" and subject.org != "" and subject.org == principal.org  # an auditor's own organisation, whatever the patterns
    covering = [g for g in principal.grants if any(matches(p, name) for p in g.models) or (whole and "auditor" in g.actions)]
    if not covering:
        words = f"no grant of this key covers {name}"
        return Decision(False, "no_grant", words, f"ask for a key granted on '{name}'")
    able = [g for g in covering if includes(g.actions, action)]
    if not able:
        need = "push" if action == "delete" else action
        return Decision(False, "action_missing", f"the grant on {name} does not include '{need}'", f"ask for a key with action {need}")
    started = [g for g in able if g.not_before <= now]
    if not started:
        first = min(g.not_before for g in able)
        return Decision(False, "grant_not_yet", f"the grant on {name} begins on {date(first)}", "wait, or ask for an earlier grant")
    if any(not g.expires for g in started):
        return Decision(True, "ok")
    last = max(g.expires + g.grace_s for g in started)
    ended = max(g.expires for g in started)
    if ended > now:
        return Decision(True, "ok", until=last)
    if last > now:
        return Decision(True, "grace", until=last, warning=f"the grant on {name} expired on {date(ended)}; grace ends on {date(last)}")
    return Decision(False, "grant_expired", f"the grant on {name} expired on {date(ended)}", "renew the subscription or the grant")
