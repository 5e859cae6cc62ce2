"""Every reason for which the decision says no: the code for machines, the words for a person, what would make it allowed, the HTTP status.

Here once, so that every door, the runtime and the monitoring say the same thing; docs/operations.md has the same table for people.
It decides nothing.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Reason:
    """The words and the remedy of one code, in which the facts of the case are filled in, and the status at a door."""

    words: str
    remedy: str
    status: int = 403


_NEW_KEY = "ask the administrator for a new key"
_DOCUMENT = "import a newer entitlement with `airlock entitlement import`"
_LEASE = "start once while the registry answers: it gives a new lease"

REASONS: dict[str, Reason] = {
    "key_absent": Reason("no API key was given, or it is not valid here", "pass a key of this registry", 401),
    "key_invalid": Reason("no API key was given, or it is not valid here", "pass a key of this registry", 401),  # nobody is told whether a key exists
    "key_expired": Reason("the API key expired on {at}", _NEW_KEY, 401),
    "key_revoked": Reason("the API key was revoked on {at}", _NEW_KEY, 401),
    "org_closed": Reason("the organisation {org} was closed on {at}", "ask the administrator to open it again", 401),
    "member_disabled": Reason("the account of this key was disabled on {at}", "ask the administrator of {org} to enable it", 401),
    "not_visible": Reason(
        "this key sees no model of that name (absent, or another organisation's)",
        "check the name, or ask for a key of the organisation that owns it",
        404,
    ),
    "no_grant": Reason("no grant of this key covers {name}", "ask for a key granted on '{name}'"),
    "action_missing": Reason("the grant on {name} does not include '{action}'", "ask for a key with action {action}"),
    "grant_not_yet": Reason("the grant on {name} begins on {at}", "wait, or ask for an earlier grant"),
    "grant_expired": Reason("the grant on {name} expired on {at}", "renew the subscription or the grant"),
    "tier_missing": Reason("{name} requires the {tier} tier; {has}", "ask for {ask}"),
    "entitlement_absent": Reason("{org} has no entitlement, and this site requires one for {name}", "import one with `airlock entitlement import`"),
    "entitlement_not_yet": Reason("the entitlement of {org} begins on {at}", "wait, or import one that begins earlier"),
    "entitlement_expired": Reason("the entitlement of {org} expired on {at}", f"renew the subscription, then {_DOCUMENT}"),
    "entitlement_revoked": Reason("the entitlement of {org} was revoked on {at}", f"ask who issued it, then {_DOCUMENT}"),
    "entitlement_models": Reason("the entitlement of {org} does not cover {name}", f"ask for one that does, then {_DOCUMENT}"),
    "entitlement_actions": Reason("the entitlement of {org} does not include '{action}'", f"ask for one that does, then {_DOCUMENT}"),
    "product_missing": Reason(
        "{name} requires the product {product}, which the entitlement of {org} does not hold", f"subscribe to it, then {_DOCUMENT}"
    ),
    "environment": Reason(
        "the grant on {name} is for {environment}, which the entitlement of {org} does not hold",
        "ask for a grant of an environment that it holds, or for a wider entitlement",
    ),
    "profile_not_granted": Reason("no grant on {name} covers the profile {profile}", "choose another profile, or ask for a grant that covers it"),
    "license_unaccepted": Reason(
        "nobody here has accepted the licence {license} of {name}",
        "ask the administrator, who records it with `airlock catalog terms {name} --accepted-by WHO`",
    ),
    "legal_block": Reason("{name} is blocked here by law or contract: {why}", "ask the administrator of this site"),
    "gpus_exceeded": Reason(
        "{wanted} more GPUs are asked for, and {used} of {bound} that {of} gives are in use",
        "stop what is not needed, or ask for more GPUs",
    ),
    "lease_absent": Reason("there is no lease for this model, profile and host", _LEASE),
    "lease_expired": Reason("the lease expired on {at}", _LEASE),
    "lease_revoked": Reason("the lease was revoked on {at}", "ask the administrator why; " + _LEASE),
    "lease_returned": Reason("the lease was returned on {at}, and is not used again", _LEASE),
}
DEAD = frozenset(code for code, reason in REASONS.items() if reason.status == 401)  # of these the key itself is refused, whatever it asks for

# Exit statuses that `airlock doctor` and `airlock runtime` have in common.
EXIT_CODES: dict[str, int] = {
    "key_absent": 20,
    "key_invalid": 21,
    "key_expired": 22,
    "key_revoked": 23,
    "org_closed": 23,
    "member_disabled": 23,
    "not_visible": 24,
    "no_grant": 25,
    "tier_missing": 26,
    "grant_expired": 27,
    "entitlement_expired": 27,
    "cache": 38,
    "connection_refused": 40,
    "dns": 41,
    "tls": 42,
    "timeout": 43,
}
