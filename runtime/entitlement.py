"""May this key start this model here: the key check, the lease, and the words of every refusal; nothing here sees weights or engines.

A lease is verified with the keys of site-trust.json only, whether it came over the wire a second ago or lies in the cache;
one from the wire must also carry this request's nonce, since nothing else in an answer tells a replayed one. Must never print a key, and must never
let a registry that refuses look like one that is down: only the latter falls back to a stored lease.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from artifact.errors import AirlockError, Denied, Invalid, Mismatch, NotFound, TooLarge, Unauthenticated, Unavailable
from artifact.grant import date, decide_lease
from artifact.manifest import canonical_json, digest_of
from artifact.reasons import DEAD, REASONS
from artifact.trust import SiteTrust, verify_jws
from runtime import leases
from runtime.leases import MAX_LEASE, MAX_TIME
from runtime.settings import EXIT_CODES, Settings

SEED_LINE = "NGC authentication failed: invalid API key or no entitlement for this NIM"
NO_KEY_LINE = "The requested operation requires an API key, but none was found"
AUTH_LINE = "Authentication Error"
PERMISSION_LINE = (
    "Permission error: The requested operation requires permissions that the user does not have. "
    "This may be due to the user not being a member of the organization that owns the repo."
)
RIGHT_REASONS = frozenset(REASONS) | {"lease"}
# A no that takes back what was given: of these the leases in the cache are marked, and start nothing any more.
WITHDRAWN = frozenset(REASONS) - {
    *("key_absent", "key_invalid", "key_expired", "grant_expired", "grant_not_yet", "entitlement_expired", "entitlement_not_yet"),
    *("gpus_exceeded", "lease_absent", "lease_expired", "lease_returned"),
}
log = logging.getLogger("airlock")
LEASE_TYPE = "lease+jwt"


class Api(Protocol):
    """The part of artifact.remote.RemoteRegistry that is needed here."""

    def api(self, method: str, path: str, body: Mapping[str, object] | None = None) -> dict[str, object]:
        """One call of /airlock/v1; raises what artifact.remote maps the status to."""


@dataclass(frozen=True)
class Choice:
    """What a lease is for: the model's name, ref and digest, the profile manifest's digest, the profile, its GPUs and this instance."""

    model: str
    ref: str
    profile_digest: str
    profile_id: str
    gpu_uuids: tuple[str, ...]
    host: str
    model_digest: str = ""

    def as_json(self) -> dict[str, object]:
        """The body of POST /airlock/v1/leases."""
        return {
            "model": self.model,
            "ref": self.ref,
            "profile_digest": self.profile_digest,
            "profile_id": self.profile_id,
            "gpu_uuids": sorted(self.gpu_uuids),
            "host": self.host,
        }


def read_trust(settings: Settings) -> SiteTrust:
    """The pinned keys of AIRLOCK_TRUST; raises NotFound, Invalid."""
    do = "write it on the registry's host with `airlock site trust --to FILE` and set AIRLOCK_TRUST to its path"
    if settings.trust is None:
        raise NotFound("AIRLOCK_TRUST is not set", expected="the path of site-trust.json", do=do, reason="trust")
    try:
        raw = settings.trust.read_bytes()
    except OSError as error:
        raise NotFound(f"{settings.trust} cannot be read: {error.strerror}", expected="site-trust.json", do=do, reason="trust") from error
    return SiteTrust.parse(raw)


def require_key(settings: Settings) -> None:
    """There is a key that can be sent at all; raises Unauthenticated with reason key_absent or key_invalid."""
    if not settings.key:
        raise Unauthenticated(
            "NGC_API_KEY is not set", expected="an API key of this registry", do="set NGC_API_KEY in the container's environment", reason="key_absent"
        )
    if not settings.key.isascii() or not settings.key.isprintable() or " " in settings.key:
        raise Unauthenticated("NGC_API_KEY holds characters that no key has", expected="nvapi-…", do="copy the key again", reason="key_invalid")


def check_key(remote: Api) -> Unavailable | None:
    """None when the registry knows the key as alive, the trouble when it does not answer; raises Unauthenticated for every other case."""
    try:
        remote.api("GET", "/airlock/v1/whoami")
    except Unavailable as error:
        return error
    except Unauthenticated as error:
        raise known(error) from error
    return None


def known(error: Unauthenticated) -> Unauthenticated:
    """The refusal of a key that was sent, which is never an absent one."""
    if error.reason in DEAD - {"key_absent", "key_invalid"}:
        return error
    # The registry tells nobody whether an unknown key exists: what it calls absent was sent by us, so here it is invalid.
    return Unauthenticated(
        "the registry does not know this API key",
        expected="a key made by `airlock key create` on this registry",
        do="check NGC_API_KEY for a missing or doubled character, or ask the administrator for a new key",
        reason="key_invalid",
    )


def invisible(name_ref: str) -> NotFound:
    """The one refusal for a model that is absent or another organisation's (decisions.md section 9)."""
    return NotFound(
        f"{name_ref}: this key sees no model of that name (absent, or another organisation's)",
        expected="a model that `airlock catalog list` shows for this key",
        do="check the name, or ask for a key of the organisation that owns it",
        reason="not_visible",
    )


def report(error: AirlockError) -> tuple[list[str], int]:
    """The lines that a failed start prints and its exit status: for a refused key or right the lines a NIM prints, then cause and fix."""
    lines: list[str] = []
    if error.reason in RIGHT_REASONS or isinstance(error, Unauthenticated | Denied):
        lines.append(SEED_LINE)
        if error.reason == "key_absent":
            lines.append(NO_KEY_LINE)
        else:
            lines.append(AUTH_LINE if isinstance(error, Unauthenticated) else PERMISSION_LINE)
    return lines + explained(error), EXIT_CODES.get(error.reason, error.exit_code)


def explained(error: AirlockError) -> list[str]:
    """Cause, expectation and fix of an error, a line each."""
    told = (("cause", error.what), ("expected", error.expected), ("fix", error.do))
    return [f"{name}: {words}" for name, words in told if words]


def obtain_lease(remote: Api, choice: Choice, trust: SiteTrust, folder: Path) -> dict[str, object]:
    """A fresh lease from the registry, verified and stored in `folder`; raises Denied, NotFound, Unauthenticated, Unavailable, Mismatch, Invalid."""
    nonce = secrets.token_hex(16)
    try:
        answer = remote.api("POST", "/airlock/v1/leases", {**choice.as_json(), "nonce": nonce})
    except NotFound as error:
        if error.reason in ("profile", "model"):  # the name is seen, what hangs on it is not there
            raise
        if error.reason == NotFound.code:  # no registry of ours says no without its reason: a proxy before one that is away takes nothing back
            do = "see what answers in the registry's place (AIRLOCK_REGISTRY, a proxy before it)"
            raise Unavailable(error.what, expected="an answer of an Airlock registry", do=do, reason="connection") from error
        raise invisible(f"{choice.model}:{choice.ref}") from error
    except Unauthenticated as error:
        raise known(error) from error
    token, told = answer.get("lease"), answer.get("now")
    if not isinstance(token, str) or len(token) > MAX_LEASE:
        raise Invalid(
            "the registry's answer holds no lease",
            expected="an object with the text `lease`",
            do="update Airlock on one of the sides",
            reason="lease",
        )
    if not isinstance(told, int | float) or isinstance(told, bool) or not 0 <= told < MAX_TIME:
        raise Invalid("the registry's answer holds no time", expected="`now`, seconds since 1970", do="check the registry's clock", reason="lease")
    # Judged by the registry's clock: a container whose own clock is off must not refuse what was signed a moment ago. That clock is told unsigned,
    # so it counts only upward from the floor; the nonce proves that the lease was signed after it was asked for.
    try:
        claims = _verified(token, choice, trust, max(float(told), leases.lowest(folder, _stored_token(folder, choice))))
    except Denied as error:
        do = error.do or f"compare the clocks of the registry and of this node; what this node holds for the lowest time is {folder / 'clock'}"
        raise Denied(f"the registry's lease is refused: {error.what}", expected=error.expected, do=do, reason="lease") from error
    if claims.get("nonce") != nonce:
        raise Mismatch(
            "the registry's answer holds a lease that was not made for this request",
            expected="the nonce of this request among the signed claims",
            do="update Airlock on the registry; where it is up to date, something on the path to it replays old answers",
            reason="lease",
        )
    leases.raise_floor(folder, leases.number(claims, "iat"), 0.0)  # a wall clock ahead of time signed just now is wrong
    leases.keep(lease_file(folder, choice), token)
    return claims


def stored_lease(choice: Choice, trust: SiteTrust, folder: Path) -> dict[str, object]:
    """The lease in the cache for exactly this choice, by a clock that never runs back: until its end, and with a warning within its grace.

    Raises Denied saying what is wrong with it: `lease_absent`, `lease_expired`, `lease_returned`, `lease_revoked`, or `lease`.
    """
    do = "start once while the registry answers: it renews the lease"
    path = lease_file(folder, choice)
    try:
        found = leases.read(path)
        now = max(time.time(), leases.lowest(folder, found.token))
        # Whether it is over says decide_lease, which knows grace and marks; the rest is judged as of the last moment before.
        claims = _verified(found.token, choice, trust, min(now, found.lease.expires - 1))
    except FileNotFoundError as error:
        what = f"the cache holds no lease for {choice.model}:{choice.ref} with this profile, these GPUs and this host"
        raise Denied(what, expected=f"a lease in {folder}", do=do, reason="lease_absent") from error
    except OSError as error:
        what = f"the stored lease {path} cannot be read: {error.strerror}"
        raise Denied(what, expected="a regular file of ours", do=f"remove it; {do}", reason="lease") from error
    except Denied as error:
        raise Denied(f"the stored lease is refused: {error.what}", expected=error.expected, do=do, reason="lease") from error
    except (Invalid, Mismatch, TooLarge) as error:
        raise Denied(f"the stored lease is refused: {error.what}", expected="the lease as the registry signed it", do=do, reason="lease") from error
    decision = decide_lease(found.lease, now)
    if not decision.allow:
        grace = f", and its grace of {found.lease.grace_s} s too" if decision.reason == "lease_expired" and found.lease.grace_s else ""
        what = f"the stored lease is refused: {decision.words}{grace}"
        raise Denied(what, expected="a lease that is valid now", do=decision.remedy, reason=decision.reason)
    if decision.warning:
        log.warning("%s; this start is allowed, no later one is", decision.warning)
    leases.raise_floor(folder, leases.number(claims, "iat"), time.time())
    return claims


def fall_back(trouble: Unavailable, choice: Choice, trust: SiteTrust, folder: Path) -> dict[str, object]:
    """The stored lease, for a start whose registry does not answer; where there is none, raises what keeps it from answering; Denied else."""
    try:
        return stored_lease(choice, trust, folder)
    except Denied as error:
        if error.reason != "lease_absent":
            raise
        raise also(trouble, error) from error


def also(trouble: Unavailable, error: AirlockError) -> Unavailable:
    """The trouble with the registry as the cause of what the cache does not have."""
    return Unavailable(f"{trouble.what}; and {error.what}", expected=trouble.expected, do=trouble.do, reason=trouble.reason)


def tell(trouble: Unavailable) -> None:
    """Logs which fault keeps the registry from answering: one of TLS as an error, since it may be somebody in between."""
    if trouble.reason == "offline":
        log.info("%s; this start uses what the cache holds", trouble.what)
    elif trouble.reason == "tls":
        log.error(
            "TLS: the registry is not trusted (%s); only what the cache holds, and a valid stored lease, are used. %s", trouble.what, trouble.do
        )
    else:
        log.warning("the registry does not answer: %s (%s); this start uses what the cache holds", trouble.reason, trouble.what)


def _verified(token: str, choice: Choice, trust: SiteTrust, now: float) -> dict[str, object]:
    claims = verify_jws(token, LEASE_TYPE, trust.lease_keys, now, choice.host)
    model = claims.get("model")
    model = model if isinstance(model, Mapping) else {}
    told: dict[str, object] = {
        "model": model.get("name"),
        "ref": model.get("ref"),
        "profile_digest": claims.get("profile_digest"),
        "profile_id": claims.get("profile_id"),
        "gpu_uuids": claims.get("gpu_uuids"),
        "host": claims.get("aud"),
        "instance": claims.get("iss"),
    }
    gpus = told["gpu_uuids"]
    told["gpu_uuids"] = sorted(map(str, gpus)) if isinstance(gpus, list) else None
    for name, value in {**choice.as_json(), "instance": trust.instance}.items():
        if told[name] != value:
            raise Denied(f"the lease is for another {name}", expected=str(value), do="start while the registry answers", reason="lease")
    if choice.model_digest and model.get("digest") != choice.model_digest:
        raise Denied("the lease is for other weights", expected=choice.model_digest, do="start while the registry answers", reason="lease")
    serial = claims.get("revocation_serial")
    if type(serial) is not int or serial < trust.revocation_serial:
        raise Denied("the lease is older than the pinned revocation serial", expected=f"serial {trust.revocation_serial} or later", reason="lease")
    return claims


def until(claims: Mapping[str, object]) -> str:
    """When a lease ends, for a log line."""
    return date(leases.number(claims, "exp"))


def lease_file(folder: Path, choice: Choice) -> Path:
    """Where the lease for a choice is kept."""
    return folder / f"{digest_of(canonical_json(choice.as_json()))[7:39]}.json"


def _stored_token(folder: Path, choice: Choice) -> str:
    """The text of the lease in the cache, empty without one."""
    try:
        return leases.read(lease_file(folder, choice)).token
    except (OSError, Invalid, TooLarge):
        return ""


def refuse_kept(folder: Path, model: str, ref: str, host: str, reason: str) -> int:
    """After the registry's no to this model here: no lease of it starts anything, also when the registry is away; how many are marked.

    An end that was reached needs no mark, since the lease has it too; GPUs in use, or another trouble of the moment, take nothing back.
    """
    if reason not in WITHDRAWN:
        return 0
    found = [k for k in leases.kept(folder, model, ref, host) if not k.revoked_at]
    return sum(leases.mark(k, revoked_at=time.time(), returned_at=k.returned_at, told=k.told) for k in found)
