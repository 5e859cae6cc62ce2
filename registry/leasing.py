"""Leases of runtimes: given under the lock of their organisation, renewed, returned, revoked, listed; what a runtime verified is recorded here.

It is a part of the guard (registry/guard.py) beside registry/issuance.py. How many GPUs may be leased is artifact.grant's to say; they are counted
here, in the transaction that adds to them: two requests at once cannot both take the last one.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable
from dataclasses import replace
from string import hexdigits

from sqlalchemy import Connection, Engine

from artifact.errors import Invalid, NotFound
from artifact.grant import PROFILES, Decision, Principal, Subject, decide_gpus, gpu_bounds, refused, run_ways
from artifact.manifest import PROFILES_TYPE, check_digest, check_name, check_ref, parse_manifest
from artifact.profile import Profile
from artifact.profile import parse as parse_profiles
from artifact.store import Call
from artifact.trust import sign_jws
from registry import leases
from registry.audit import Audit
from registry.bodies import Body, only, text, whole
from registry.catalog import Repo
from registry.database import reading, retried
from registry.desk import Desk, Gate, Refuse, local_office, never
from registry.documents import revocation_serial
from registry.entitlements import Entitlements
from registry.floor import Floor
from registry.holders import caller, principal_of
from registry.home import Home
from registry.leases import Wish
from registry.library import Library
from registry.people import Facts

MAX_PROFILES_BYTES = 4 * 1024 * 1024
MAX_GPUS = 64
MAX_NONCE = 64
MAX_BYTES = 1 << 62
MAX_TIME = 10**11
SKEW_S = 60
_AFTER = re.compile(r"([0-9]{1,18})\.([0-9]{1,18})\Z")
Admit = Callable[[Call, str, Repo | None, tuple[str, str] | None], Call]


class _No(Exception):
    """Takes back the transaction of a lease that is refused in it: its serial is not used up, and the refusal is recorded by another one."""

    def __init__(self, decision: Decision) -> None:
        super().__init__()
        self.decision = decision


def nonce_of(body: Body) -> dict[str, object]:
    """The claim by which a runtime tells that a lease was signed for its request; absent for a runtime that sends none; raises Invalid."""
    if "nonce" not in body:
        return {}
    value = body["nonce"]
    if not isinstance(value, str) or not 0 < len(value) <= MAX_NONCE or not set(value) <= set(hexdigits):
        raise Invalid("nonce is no hexadecimal text", expected=f"1 to {MAX_NONCE} characters of 0-9 and a-f", reason="body")
    return {"nonce": value}


def gpus_of(value: object) -> tuple[str, ...]:
    """The GPUs that a lease is asked for, each once; raises Invalid."""
    if not isinstance(value, list) or len(value) > MAX_GPUS or not all(isinstance(v, str) and 0 < len(v) <= 100 and v.isprintable() for v in value):
        raise Invalid("gpu_uuids is not a list of GPU ids", expected=f"at most {MAX_GPUS} texts, none on a CPU node", reason="body")
    return tuple(dict.fromkeys(value))


class Leasing(Desk):
    """The verbs; `admit` is the guard's: the call allowed to run that name (and profile), or the recorded refusal."""

    def __init__(
        self,
        engine: Engine,
        entitlements: Entitlements,
        audit: Audit,
        gate: Gate = local_office,
        refuse: Refuse = never,
        *,
        library: Library,
        home: Home,
        floor: Floor,
        life_s: int = 86400,
        grace_s: int = 3 * 86400,
    ) -> None:
        super().__init__(engine, entitlements, audit, gate, refuse)
        self._library, self._home, self._floor, self._life_s, self._grace_s = library, home, floor, life_s, grace_s

    def lease(self, call: Call, body: Body, admit: Admit) -> Facts:
        """A signed lease for one model, profile and set of GPUs (docs/format.md section 8); raises Invalid, NotFound, Denied."""
        name, ref = check_name(text(body, "model")), check_ref(text(body, "ref"))
        digest, profile_id, host = check_digest(text(body, "profile_digest")), text(body, "profile_id"), text(body, "host")
        gpus, nonce = gpus_of(body.get("gpu_uuids")), nonce_of(body)
        catalog = self._library.catalog
        repo = catalog.repository(name)
        admit(call, name, repo, None)  # what it may not run at all it is told nothing about
        profile = self._profile(name, digest, profile_id)
        named = (profile.id, profile.description)
        admit(call, name, repo, named)
        model = catalog.locate(profile.model.name, profile.model.digest)
        subjects = [repo.subject] if repo else []
        if profile.model.name != name:
            admit(call, profile.model.name, model.repo if model else None, named)
            subjects += [model.repo.subject] if model else []
        if model is None or not model.digest:
            raise NotFound(f"profile {profile_id[:80]} names {profile.model.name}@{profile.model.digest}, which is not here", reason="model")
        wish = Wish(name, model.digest, digest, profile_id, host, gpus)
        claims: dict[str, object] = {"iss": self._home.instance, "sub": f"org:{call.principal.org}", "aud": host, "grace_s": self._grace_s}
        claims |= {"model": {"name": name, "ref": ref, "digest": model.digest}, "profile_digest": digest, "profile_id": profile_id}
        claims |= {"gpu_uuids": list(gpus), "key_id": call.principal.key_id} | nonce
        try:
            claims = retried(self._engine, lambda conn: self._given(conn, call, wish, subjects, named, claims))
        except _No as no:
            self._refuse(call, "run", name, no.decision)
        return {"lease": sign_jws(self._home.lease_key(), "lease+jwt", claims), "now": call.now}

    def _given(
        self, conn: Connection, call: Call, wish: Wish, subjects: list[Subject], profile: tuple[str, str], claims: dict[str, object]
    ) -> dict[str, object]:
        """The claims of a lease whose row is added under the lock of the organisation, where its key, grants and document are read once more."""
        org_id, serial = leases.hold(conn, call.principal.org)
        who = principal_of(conn.execute(caller("key_id"), {"key_id": call.principal.key_id}).all())
        if who is None:
            raise _No(refused("key_invalid"))
        who = replace(who, access=call.principal.access, entitled_only=call.principal.entitled_only)
        way = self._way(conn, who, org_id, wish, subjects, profile, call.now)
        iat, now = int(self._floor.sure(call.now)), int(call.now)  # what is signed raises a runtime's floor for good
        ends = [int(way.until)] if way.until else []
        exp = min([now + self._life_s, *ends])  # a lease never outlives the key, the grant and the entitlement it was given under
        document = who.entitlement if "entitlement" in way.ids else None
        under: dict[str, str] = {"ent_jti": document.jti if document else "", "grant_id": way.ids.get("grant", "")}
        under["environment"] = next((g.environment or "production" for g in who.grants if g.id == under["grant_id"]), "")
        jti = secrets.token_hex(16)
        leases.add(conn, org_id, serial, wish, jti=jti, key_id=who.key_id, iat=iat, exp=exp, **under)
        more = {"jti": jti, "serial": serial, "profile": wish.profile_id, "gpus": len(wish.gpus), "gpu_uuids": [*wish.gpus], "host": wish.host}
        more |= {"exp": exp, "environment": under["environment"]}
        self._audit.change(conn, replace(call, decision=way), "lease", f"{wish.model}@{wish.model_digest}", **more)
        given = claims | {"jti": jti, "iat": iat, "nbf": iat - SKEW_S, "exp": exp, "renew_after": iat + (exp - now) * 15 // 100}
        given |= under | {"ent_serial": document.serial if document else 0, "lease_serial": serial}
        return given | {"revocation_serial": revocation_serial(conn)}

    def _way(
        self, conn: Connection, who: Principal, org_id: int, wish: Wish, subjects: list[Subject], profile: tuple[str, str], now: float
    ) -> Decision:
        """One yes to the run: a grant with GPUs left for the model and for the weights of its profile, to the first of their ends; raises _No.

        It is counted under the grant with the fewest GPUs, and under the entitlement where either asks for one.
        """
        every = [run_ways(who, subject, now, profile) for subject in subjects]
        no = next((ways[0] for ways in every if not ways[0].allow), None)
        if no is not None:
            raise _No(no)
        under_document = leases.gpus_leased(conn, org_id, now, wish) if wish.gpus else 0
        chosen = [self._free(conn, who, org_id, wish, ways, under_document, now) for ways in every]
        found = min(chosen, key=lambda way: gpu_bounds(who, way).grant or float("inf"))
        ids = {kind: value for way in (*chosen, found) for kind, value in way.ids.items()}
        return replace(found, ids=ids, until=min((way.until for way in chosen if way.until), default=0.0))

    @staticmethod
    def _free(conn: Connection, who: Principal, org_id: int, wish: Wish, ways: list[Decision], under_document: int, now: float) -> Decision:
        """The first of these grants that has GPUs left; raises _No."""
        no: Decision | None = None
        for way in ways:
            under_grant = leases.gpus_leased(conn, org_id, now, wish, grant_id=way.ids["grant"]) if wish.gpus and "grant" in way.ids else 0
            found = decide_gpus(gpu_bounds(who, way), len(wish.gpus), under_grant, under_document)
            if found.allow:
                return way
            no = no or replace(found, ids=way.ids, action="run")
        raise _No(no or refused("no_grant", name=wish.model))

    def _profile(self, name: str, digest: str, profile_id: str) -> Profile:
        """The profile of that id in the profile manifest `digest` of `<name>/profiles`; raises NotFound `profile`, Invalid."""
        home = name + PROFILES
        found = self._library.catalog.find(home, digest)
        unknown = NotFound(f"{home} has no profile manifest {digest}", do="ask again with the manifest that the ref names now", reason="profile")
        if found is None or found.raw is None or found.artifact_type != PROFILES_TYPE:
            raise unknown
        layers = [d for d in parse_manifest(found.raw, found.media_type).layers if d.media_type == PROFILES_TYPE]
        blob = self._library.catalog.find(home, layers[0].digest) if len(layers) == 1 and layers[0].size <= MAX_PROFILES_BYTES else None
        if blob is None or not blob.location:
            raise unknown
        for profile in parse_profiles(self._library.small(blob)).profiles:
            if profile.id == profile_id:
                return profile
        raise NotFound(f"the profile manifest has no profile {profile_id[:80]!r}", do="airlock runtime list-model-profiles", reason="profile")

    # ---- afterwards

    def leases(self, call: Call, org: str = "", after: str = "", limit: int = 100, *, every: bool = False) -> Facts:
        """Leases that stand now, or `every` one: of an organisation for who may look at it, for the site's administrator of all; raises Denied."""
        held = self._gate(call)
        org = org or ("" if held.site else call.principal.org)
        if not held.site:
            self._reader(call, org)
        behind = _AFTER.match(after)
        if after and not behind:
            raise Invalid("after is no cursor of this list", expected="what the page before said", reason="cursor")
        place = (int(behind[1]), int(behind[2])) if behind else (0, 0)
        with reading(self._engine) as conn:
            rows = leases.leases(conn, org, place, limit, living=None if every else call.now)
        onward = f"{rows[-1].org_id}.{rows[-1].serial}" if len(rows) == limit else ""
        return {"items": [leases.lease_facts(row, call.now) for row in rows], "after": onward}

    def give_back(self, call: Call, body: Body) -> Facts:
        """Returns the lease `jti`: its GPUs are free, and nothing starts on it again; its own key or its administrator may; again is no error."""
        return self._end(call, body, "returned_at", "lease_return")

    def revoke(self, call: Call, body: Body) -> Facts:
        """Revokes the lease `jti`: its GPUs count to its end; its administrator may; again is no error; raises Denied, NotFound."""
        return self._end(call, body, "revoked_at", "lease_revoke")

    def _end(self, call: Call, body: Body, column: str, event: str) -> Facts:
        only(body, "jti")
        jti, held = text(body, "jti", most=40), self._gate(call)
        with reading(self._engine) as conn:
            found = leases.lease_of(conn, jti, "" if held.site else call.principal.org)
        if not (column == "returned_at" and found.key_id == call.principal.key_id):
            self._admin(call, found.org)

        def work(conn: Connection) -> Facts:
            new = leases.end(conn, jti, column, call.now)
            if new:
                more = {"owner": found.org, "jti": jti, "serial": found.serial, "host": found.host}
                self._audit.change(conn, call, event, f"{found.model}@{found.model_digest}", **more)
            state = column.removesuffix("_at")
            return {"jti": jti, "state": state if new else f"was {state} before"}

        return self._change(call, found.org, work)

    def unsigned(self, call: Call, body: Body) -> Facts:
        """Records that a runtime runs `model` with the bytes `digest`, which this site did not sign, on `host` since `at` and for what `reason`."""
        only(body, "model", "digest", "profile", "reason", "host", "at")
        self._gate(call)
        digest = check_digest(text(body, "digest"))
        more = {"result": "unsigned", "why": text(body, "reason", most=300), "host": text(body, "host"), "since": whole(body, "at", MAX_TIME)}
        more["profile"] = text(body, "profile")
        ref = f"{text(body, 'model')}@{digest}"

        def work(conn: Connection) -> Facts:
            self._audit.change(conn, call, "unsigned", ref, **more)
            return {"ref": ref}

        return self._change(call, call.principal.org, work)

    def verified(self, call: Call, body: Body) -> Facts:
        """Records a runtime's receipt: under its `lease` it verified the model's `digest`, so many `bytes` in so many `files`.

        Raises NotFound for a lease that is not this key's, Invalid for another digest than the lease's.
        """
        only(body, "lease", "digest", "bytes", "files")
        self._gate(call)
        jti, digest = text(body, "lease", most=40), check_digest(text(body, "digest"))
        size, files = whole(body, "bytes", MAX_BYTES), whole(body, "files", 10_000_000)
        with reading(self._engine) as conn:
            found = leases.lease_of(conn, jti, call.principal.org)
        if found.key_id != call.principal.key_id:
            raise NotFound(f"there is no lease {jti[:80]!r} of this key", do="send the receipt with the key that took the lease", reason="lease")
        if digest != found.model_digest:
            raise Invalid("the lease is for another model", expected=found.model_digest, reason="digest")
        call = replace(call, decision=Decision(True, "ok", ids={k: v for k, v in (("grant", found.grant_id), ("entitlement", found.ent_jti)) if v}))

        def work(conn: Connection) -> Facts:
            more = {"result": "verified", "lease": jti, "bytes": size, "files": files, "host": found.host}
            self._audit.change(conn, call, "verified", f"{found.model}@{digest}", **more)
            return {"lease": jti, "digest": digest}

        return self._change(call, found.org, work)
