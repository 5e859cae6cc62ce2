"""Entitlement documents and revocation lists of one site: taken in, issued by the site's own root, listed, and what they do to rows.

It is a part of the guard (registry/guard.py) beside registry/issuance.py. Documents are judged once, here, and kept byte for byte; the decision reads
columns (artifact/grant.py). A refusal is recorded like a change. Which document counts: docs/format.md section 8.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from typing import Any, NoReturn, cast

from sqlalchemy import Connection, Engine, delete, func, insert, or_, select, update

from artifact import documents as d
from artifact import trust
from artifact.documents import Document, Licence, Revocations
from artifact.errors import AirlockError, Conflict, Denied, Invalid, Mismatch, NotFound
from artifact.grant import PRODUCTION, TIERS, Decision, Principal, date, soon
from artifact.manifest import digest_of
from artifact.store import Call
from registry import leases, people
from registry import tables as t
from registry.audit import Audit
from registry.bodies import Body, life, moment, only, text, texts, whole, word
from registry.database import alone, reading, retried
from registry.desk import Desk, Gate, Refuse, local_office, never
from registry.entitlements import Entitlements
from registry.floor import Floor
from registry.home import Home
from registry.people import Facts
from registry.rows import ensure_org, ignore_duplicates

Found = Document | tuple[str, AirlockError]  # what the keys say of a text: the document, or why it is refused
RIGHTS = ("tier", "models", "actions", "products", "environments", "gpus", "max_keys", "grace")
NEXT_UPDATE = "90d"
LOCAL = "issued here"
_E = select(t.entitlement, t.org.c.name.label("org"), t.org.c.entitlement_id).join(t.org, t.org.c.id == t.entitlement.c.org_id)


class _Undone(Exception):
    """Takes a transaction back because of what it found, so that the refusal is recorded by one of its own."""

    def __init__(self, error: AirlockError) -> None:
        super().__init__()
        self.error = error


def licence_of(body: Body, now: float) -> tuple[str, dict[str, object], float, float]:
    """Organisation, rights, beginning and end of an entitlement that is to be issued; raises Invalid."""
    tier = word(body, "tier", TIERS)
    if "gpus" not in body:
        raise Invalid("gpus is missing", expected="how many GPUs may run at once; 0 gives none", reason="body")
    rights: dict[str, object] = {"tier": tier, "gpus": whole(body, "gpus", d.MAX_COUNT), "max_keys": whole(body, "max_keys", d.MAX_COUNT)}
    rights |= {"models": [*texts(body, "models")], "actions": [*(texts(body, "actions") or d.ACTIONS)], "products": [*texts(body, "products")]}
    held = ("dev", PRODUCTION) if tier == TIERS[-1] else ("dev",)
    rights |= {"environments": [*(texts(body, "environments") or held)], "grace_s": min(life(body, "grace", "0s"), d.MAX_GRACE_S)}
    begins, ends = moment(body, "not_before", now) or now, moment(body, "expires", now, None)
    if not ends:
        raise Invalid("the entitlement has no end", expected="--expires 365d, or 2030-01-31T00:00:00Z", reason="expires")
    return people.check_org(text(body, "org")), rights, begins, ends


def revoked_of(body: Body) -> dict[str, list[str]]:
    """What a revocation list is asked to revoke, per kind; raises Invalid."""
    found = {kind: [*texts(body, kind)] for kind in d.KINDS}
    for kind, values in found.items():
        bad = next((value for value in values if not d.KINDS[kind].match(value)), "")
        if bad:
            raise Invalid(f"{bad[:80]!r} is no {kind}", expected="ids as airlock entitlement list and airlock key list show them", reason=kind)
    if not any(found.values()):
        raise Invalid("nothing is revoked", expected="at least one of " + ", ".join(d.KINDS), reason="body")
    return found


# ---- rows


def revocation_serial(conn: Connection) -> int:
    """The site's revocation serial: the sum of the serials of the lists in force, so that each list that is taken raises it."""
    return int(conn.execute(select(func.coalesce(func.sum(t.revocation_list.c.serial), 0))).scalar_one())


def revoked_kids(conn: Connection) -> set[str]:
    """The signing keys whose documents are refused from now on."""
    return set(conn.execute(select(t.revocation.c.value).where(t.revocation.c.kind == "kid")).scalars())


def settle(conn: Connection, org_id: int, now: float) -> str:
    """Makes the document count that does now, for an organisation whose row is held; its jti where that changed.

    Of each issuer the one with the highest serial that has begun; of several issuers the one that took effect last. What lost is replaced for good.
    """
    e = t.entitlement.c
    current = conn.execute(select(t.org.c.entitlement_id).where(t.org.c.id == org_id)).scalar()
    rows = conn.execute(select(e.id, e.jti, e.issuer, e.serial, e.not_before, e.at, e.replaced_at).where(e.org_id == org_id)).all()
    newest: dict[str, Any] = {}
    for row in rows:
        # What counted once has begun, whatever a clock that was set back says.
        begun = row.not_before <= now or row.id == current or row.replaced_at
        if begun and (row.issuer not in newest or newest[row.issuer].serial < row.serial):
            newest[row.issuer] = row
    if not newest:
        return ""
    best = max(newest.values(), key=lambda row: (max(row.not_before, row.at), row.id))
    lost = [row.id for row in rows if row.id != best.id and row.issuer in newest and row.serial <= newest[row.issuer].serial]
    if lost:
        conn.execute(update(t.entitlement).where(e.id.in_(lost), e.replaced_at == 0).values(replaced_at=now))
    if best.id == current:
        return ""
    conn.execute(update(t.org).where(t.org.c.id == org_id).values(entitlement_id=best.id))
    return str(best.jti)


def entitlement_facts(row: Any, now: float) -> Facts:
    """An entitlement as lists show it; `counts` for the one that its organisation is judged by."""
    counts, last = row.id == row.entitlement_id, row.expires + row.grace_s
    states = (("revoked", row.revoked_at), ("replaced", row.replaced_at and not counts), ("later", not counts), ("expired", last <= now))
    state = next((word_ for word_, is_so in (*states, ("grace", row.expires <= now)) if is_so), "valid")
    facts: Facts = {name: getattr(row, name) for name in ("jti", "org", "issuer", "kid", "serial", "tier", "gpus", "max_keys", "source")}
    facts |= {name: json.loads(getattr(row, name)) for name in ("models", "actions", "products", "environments")}
    facts |= {"issued": date(row.iat), "begins": date(row.not_before), "ends": date(row.expires), "grace_ends": date(last), "imported": date(row.at)}
    return facts | {"counts": counts, "state": state, "revoked": people.moment(row.revoked_at), "replaced": people.moment(row.replaced_at)}


def _outcome(found: Document, state: str, **more: object) -> Facts:
    """What became of a document: applied, later (it takes over when it begins) or known."""
    head = found.head
    org = found.org if isinstance(found, Licence) else ""
    what = "entitlement" if isinstance(found, Licence) else "revocations"
    facts: Facts = {"document": what, "jti": head.jti, "org": org, "issuer": head.issuer, "serial": head.serial, "begins": date(head.begins)}
    return facts | {"ends": date(head.ends), "state": state, **more}


class Intake:
    """Takes documents into a database within the caller's transaction; the importer and the verbs use the same one."""

    def __init__(self, audit: Audit, home: Home, floor: Floor) -> None:
        self._audit, self._home, self._floor = audit, home, floor

    def read(self, tokens: Iterable[str]) -> list[Found]:
        """Documents as far as keys judge them, in the order in which they are taken: lists first, then by serial; raises Mismatch."""
        issuers, out, bad = self._home.issuers(), list[Document](), list[tuple[str, AirlockError]]()
        for token in tokens:
            try:
                out.append(d.read(token, issuers, self._home.instance))
            except Mismatch as error:
                what = f"the document {digest_of(token.encode())} was altered: {error.what}"
                raise Mismatch(what, expected=error.expected, do="fetch it again from its issuer", reason="signature") from error
            except AirlockError as error:
                bad.append((token, error))
        out.sort(key=lambda found: (isinstance(found, Licence), found.head.issuer, found.head.serial))
        return [*out, *bad]

    def take_all(self, conn: Connection, call: Call, found: Iterable[Found], source: str) -> list[Facts]:
        """What became of each, one after the other; a refused one changes nothing but its record."""
        out = []
        for item in found:
            try:
                if isinstance(item, tuple):
                    raise item[1]
                out.append(self.take(conn, call, item, source))
            except (Denied, Conflict, Invalid) as error:
                if error.reason == "database_conflict":
                    raise
                out.append(self.refused(conn, call, item, error, source))
        return out

    def refused(self, conn: Connection, call: Call, item: Found, error: AirlockError, source: str) -> Facts:
        """Records a refusal and returns it as an outcome."""
        digest = digest_of((item[0] if isinstance(item, tuple) else item.head.token).encode("utf-8", "replace"))
        facts: Facts = {"document": "unknown", "state": "refused"} if isinstance(item, tuple) else _outcome(item, "refused")
        owner = str(facts.get("org", ""))
        ref = str(facts.get("jti", "")) or digest
        self._audit.change(conn, call, "document_refused", ref, result="denied", reason=error.reason, owner=owner, source=source)
        return facts | {"digest": digest, "reason": error.reason, "what": str(error)}

    def take(self, conn: Connection, call: Call, found: Document, source: str) -> Facts:
        """Takes one in; raises Denied `expired`, `issuer_revoked`, `revoked`, `serial`, `issuer`, Conflict `document_conflict`, before any change."""
        alone(conn, "documents")  # a list and the document that it revokes come one after the other
        if found.head.iat <= call.now + d.MAX_AHEAD_S:
            call = replace(call, now=max(call.now, found.head.iat))  # it cannot be earlier than what was signed
        facts = self._licence(conn, call, found, source) if isinstance(found, Licence) else self._list(conn, call, found, source)
        self._floor.raise_to(found.head.iat)
        return facts

    def _own(self, found: Document) -> bool:
        return found.head.kid in self._home.keys.public_keys("entitlement")

    def _check(self, conn: Connection, call: Call, found: Document, newest: int) -> None:
        head = found.head
        d.check(found, call.now, revoked_kids(conn))
        if (head.issuer == self._home.instance) != self._own(found):
            raise Denied(f"the key {head.kid} does not sign for the issuer {head.issuer}", expected="another iss", reason="issuer")
        if head.serial < newest:
            words = f"the document has serial {head.serial}, and the one of {head.issuer} here has {newest}"
            raise Denied(words, expected=f"a serial above {newest}", do="ask its issuer for the newest one", reason="serial")
        if head.serial == newest:
            _conflict(f"another document of {head.issuer} with serial {newest} is here already")

    def _licence(self, conn: Connection, call: Call, found: Licence, source: str) -> Facts:
        head, given, e = found.head, found.entitlement, t.entitlement.c
        people.check_org(found.org)
        same = conn.execute(select(e.token).where(e.jti == head.jti)).scalar()
        if same == head.token:
            return _outcome(found, "known")
        if same is not None:
            _conflict(f"another document of the id {head.jti} is here already")
        mine = (t.org.c.name == found.org, e.issuer == head.issuer)
        newest = conn.execute(select(func.max(e.serial)).join(t.org, t.org.c.id == e.org_id).where(*mine)).scalar() or 0
        self._check(conn, call, found, newest)
        if conn.execute(select(t.revocation.c.at).where(t.revocation.c.kind == "jti", t.revocation.c.value == head.jti)).first():
            raise Denied(f"the entitlement {head.jti} was revoked", do="ask its issuer for another one", reason="revoked")
        at = max(self._floor.sure(call.now), head.iat)  # what once counted goes on to count: not by a wall clock that is far ahead
        org_id = ensure_org(conn, found.org, at)
        people.org_of(conn, found.org)
        columns: Facts = {name: json.dumps(getattr(given, name)) for name in ("models", "actions", "products", "environments")}
        columns |= {name: getattr(given, name) for name in ("jti", "serial", "tier", "gpus", "not_before", "expires", "grace_s")}
        columns |= {"org_id": org_id, "issuer": head.issuer, "kid": head.kid, "max_keys": found.max_keys, "iat": head.iat}
        conn.execute(insert(t.entitlement).values(token=head.token, source=source, at=at, **columns))
        began = settle(conn, org_id, at) == head.jti
        facts: Facts = {"owner": found.org, "issuer": head.issuer, "kid": head.kid, "serial": head.serial, "begins": head.begins, "ends": head.ends}
        facts |= {"tier": given.tier, "gpus": given.gpus, "models": [*given.models], "source": source}
        self._audit.change(conn, call, "entitlement_import", head.jti, **facts)
        return _outcome(found, "applied" if began else "later")

    def _list(self, conn: Connection, call: Call, found: Revocations, source: str) -> Facts:
        head, held = found.head, t.revocation_list.c
        row = conn.execute(select(held.serial, held.token).where(held.issuer == head.issuer)).first()
        if row is not None and row.token == head.token:
            return _outcome(found, "known")
        self._check(conn, call, found, row.serial if row else 0)
        if not self._own(found) and set(found.revoked["kid"]) & set(self._home.keys.public_keys("entitlement")):
            raise Denied("the list revokes the root of this site", expected="a list of the site's own root for that", reason="issuer")
        conn.execute(delete(t.revocation_list).where(held.issuer == head.issuer))
        columns = {"iat": head.iat, "next_update": found.next_update, "token": head.token, "at": call.now}
        conn.execute(insert(t.revocation_list).values(issuer=head.issuer, serial=head.serial, **columns))
        rows = [{"kind": k, "value": v, "issuer": head.issuer, "serial": head.serial, "at": call.now} for k, vs in found.revoked.items() for v in vs]
        if rows:
            conn.execute(ignore_duplicates(conn, t.revocation), rows)
        done = self._revoke(conn, call, found)
        facts = {"serial": head.serial, "kid": head.kid, "next_update": found.next_update, "source": source, **done}
        self._audit.change(conn, call, "revocations_import", head.issuer, kids=[*found.revoked["kid"]], **facts)
        return _outcome(found, "applied", **done)

    def _revoke(self, conn: Connection, call: Call, found: Revocations) -> dict[str, int]:
        """What a list does to what is here: entitlements, keys, and the leases under them, of organisations whose rows are held first."""
        e, k = t.entitlement.c, t.api_key.c
        documents = conn.execute(select(e.jti, e.org_id).where(e.jti.in_(found.revoked["jti"]), e.revoked_at == 0)).all()
        keys = conn.execute(select(k.key_id, k.org_id).where(k.key_id.in_(found.revoked["key_id"]), k.revoked_at == 0)).all()
        orgs = sorted({row.org_id for row in (*documents, *keys)})
        names = {o.id: o.name for o in conn.execute(select(t.org).where(t.org.c.id.in_(orgs)).order_by(t.org.c.id).with_for_update(key_share=True))}
        for row in documents:
            conn.execute(update(t.entitlement).where(e.jti == row.jti).values(revoked_at=call.now))
            self._audit.change(conn, call, "entitlement_revoke", row.jti, owner=names[row.org_id], list=found.head.serial)
        for row in keys:
            conn.execute(update(t.api_key).where(k.key_id == row.key_id).values(revoked_at=call.now))
            self._audit.change(conn, call, "key_revoke", row.key_id, owner=names[row.org_id], list=found.head.serial)
        ended = leases.revoke_under(conn, call.now, key_ids=[row.key_id for row in keys], documents=[row.jti for row in documents])
        return {"entitlements": len(documents), "keys": len(keys), "leases": ended}


def _conflict(what: str) -> NoReturn:
    raise Conflict(what, expected="one content for one id and serial", do="ask its issuer for one with a new serial", reason="document_conflict")


class Documents(Desk):
    """The verbs."""

    def __init__(
        self, engine: Engine, entitlements: Entitlements, audit: Audit, gate: Gate = local_office, refuse: Refuse = never, *, home: Home, floor: Floor
    ) -> None:
        super().__init__(engine, entitlements, audit, gate, refuse)
        self._home, self.intake = home, Intake(audit, home, floor)

    def revocation_serial(self) -> int:
        """The site's revocation serial, which leases carry and site-trust.json asks for at least."""
        with reading(self._engine) as conn:
            return revocation_serial(conn)

    def activate(self, now: float) -> list[str]:
        """Lets documents take over whose time has come; the ids of those that count from now on."""
        e, o = t.entitlement.c, t.org.c
        due = select(o.id, o.name).join(t.entitlement, e.org_id == o.id)
        due = due.where(e.not_before <= now, e.replaced_at == 0, or_(o.entitlement_id.is_(None), o.entitlement_id != e.id)).distinct()
        with reading(self._engine) as conn:
            orgs = conn.execute(due).all()
        call, begun = Call(Principal(key_id="site"), Decision(True, "local"), "activate", now), []
        for org in orgs:

            def work(conn: Connection, org: Any = org) -> str:
                people.org_of(conn, org.name)
                jti = settle(conn, org.id, now)
                if jti:
                    self._audit.change(conn, call, "entitlement_begin", jti, owner=org.name)
                return jti

            begun.append(retried(self._engine, work))
        return [jti for jti in begun if jti]

    def _taken(self, call: Call, item: Found, source: str) -> Facts:
        """What became of one document in a transaction of its own; a refusal is recorded, then raised."""

        def work(conn: Connection) -> Facts:
            try:
                if isinstance(item, tuple):
                    raise item[1]
                return self.intake.take(conn, call, item, source)
            except (Denied, Conflict, Invalid, Mismatch) as error:
                raise error if error.reason == "database_conflict" else _Undone(error) from error

        try:
            return retried(self._engine, work)
        except _Undone as undone:
            error = undone.error
        retried(self._engine, lambda conn: self.intake.refused(conn, call, item, error, source))
        raise error

    def take(self, call: Call, body: Body) -> Facts:
        """Takes in the `document`, an entitlement or a revocation list, armoured or bare; the same again changes nothing.

        Raises Denied `issuer_unknown`, `issuer_revoked`, `issuer`, `audience`, `expired`, `revoked`, `serial`, Mismatch, Invalid, Conflict.
        """
        self._site(call)
        only(body, "document")
        token = body.get("document")
        if not isinstance(token, str):
            raise Invalid("document is missing or not text", expected=d.EXPECTED, reason="body")
        item: Found
        try:
            item = d.read(token, self._home.issuers(), self._home.instance)
        except AirlockError as error:
            item = (token, error)
        return self._taken(call, item, "imported")

    def issue(self, call: Call, body: Body) -> Facts:
        """Makes an entitlement of `org` by the site's own root, with the next serial, and takes it in; raises Denied, Invalid."""
        self._site(call)
        only(body, "org", "not_before", "expires", *RIGHTS)
        org, rights, begins, ends = licence_of(body, call.now)

        def work(conn: Connection) -> Facts:
            alone(conn, "documents")
            e = t.entitlement.c
            mine = (t.org.c.name == org, e.issuer == self._home.instance)
            last = conn.execute(select(func.max(e.serial)).join(t.org, t.org.c.id == e.org_id).where(*mine)).scalar() or 0
            site = self._home.instance
            claims = d.entitlement_claims(site, site, org, last + 1, call.now, rights, begins, ends)
            made = d.sign(self._home.entitlement_key(), d.ENTITLEMENT, claims)
            return self.intake.take(conn, call, made, LOCAL) | {"text": d.armour(made.head.token, d.ENTITLEMENT)}

        return self._change(call, org, work)

    def revoke(self, call: Call, body: Body) -> Facts:
        """Makes the next revocation list of the site's own root, with `jti`, `key_id` and `kid` beside what it held, and takes it in."""
        self._site(call)
        only(body, *d.KINDS, "next_update")
        wanted, due = revoked_of(body), moment(body, "next_update", call.now, NEXT_UPDATE)
        key, site = self._home.entitlement_key(), self._home.instance
        if trust.kid(trust.public_pem(key)) in wanted["kid"]:
            raise Conflict("this key signs the list itself", do="airlock site rotate entitlement, then revoke the old one", reason="kid")

        def work(conn: Connection) -> Facts:
            alone(conn, "documents")
            row = conn.execute(select(t.revocation_list).where(t.revocation_list.c.issuer == site)).first()
            before = cast(Revocations, d.unverified(row.token)) if row else None
            claims = d.revocation_claims(site, row.serial + 1 if row else 1, call.now, wanted, before, due or call.now + d.LIST_LIFE_S)
            made = d.sign(key, d.REVOCATIONS, claims)
            return self.intake.take(conn, call, made, LOCAL) | {"text": d.armour(made.head.token, d.REVOCATIONS)}

        return self._change(call, "", work)

    def entitlements(self, call: Call, org: str = "", after: int = 0, limit: int = 100) -> Facts:
        """Entitlements, oldest first: of an organisation for who may look at it, for the site's administrator of all; raises Denied."""
        held = self._gate(call)
        org = org or ("" if held.site else call.principal.org)
        if not held.site:
            self._reader(call, org)
        found = _E.where(t.entitlement.c.id > after)
        with reading(self._engine) as conn:
            rows = conn.execute((found.where(t.org.c.name == org) if org else found).order_by(t.entitlement.c.id).limit(limit)).all()
        return {"items": [entitlement_facts(row, call.now) for row in rows], "after": rows[-1].id if len(rows) == limit else 0}

    def entitlement(self, call: Call, jti: str) -> Facts:
        """One entitlement with its document as it was signed (`text`); raises Denied, NotFound for another organisation's."""
        held = self._gate(call)
        if not held.site:
            self._reader(call, call.principal.org)
        with reading(self._engine) as conn:
            row = conn.execute(_E.where(t.entitlement.c.jti == jti)).first()
        if row is None or not (held.site or row.org == held.audits):
            raise NotFound(f"there is no entitlement {jti[:80]!r}", do="airlock entitlement list", reason="entitlement")
        return entitlement_facts(row, call.now) | {"text": d.armour(row.token, d.ENTITLEMENT)}

    def revocations(self, call: Call) -> Facts:
        """The newest revocation list of each issuer with its document, and the site's revocation serial; raises Denied."""
        self._site(call)
        with reading(self._engine) as conn:
            rows = conn.execute(select(t.revocation_list).order_by(t.revocation_list.c.issuer)).all()
        items = []
        for row in rows:
            revoked: Mapping[str, Collection[str]] = cast(Revocations, d.unverified(row.token)).revoked
            facts = {
                "issuer": row.issuer,
                "serial": row.serial,
                "issued": date(row.iat),
                "next_update": date(row.next_update),
                "imported": date(row.at),
            }
            items.append(facts | {"revoked": {k: [*v] for k, v in revoked.items()}, "text": d.armour(row.token, d.REVOCATIONS)})
        return {"items": items, "serial": sum(row.serial for row in rows)}

    def standing(self, call: Call) -> Facts:
        """What the presented key has now and what of it ends soon, for the runtime and for monitoring; times RFC 3339, empty for none."""
        who, now = call.principal, call.now
        ends: list[tuple[float, float, str]] = [(who.expires, who.expires, "the API key")] if who.expires else []
        held = who.entitlement
        facts: Facts = {"key_id": who.key_id, "org": who.org, "tier": who.tier, "key_ends": people.moment(who.expires), "entitlement": None}
        if held is not None:
            last = held.expires + held.grace_s
            ends.append((held.expires, last, f"the entitlement of {who.org}"))
            shown: Facts = {"jti": held.jti, "serial": held.serial, "ends": date(held.expires), "grace_ends": date(last)}
            facts["entitlement"] = shown | {"revoked_at": people.moment(held.revoked_at)}
        grants = []
        for grant in who.grants:
            last = grant.expires + grant.grace_s if grant.expires else 0.0
            ends += [(grant.expires, last, f"the grant {grant.id} on {', '.join(grant.models)[:200]}")] if grant.expires else []
            rights = {"grant_id": grant.id, "models": [*grant.models], "actions": [*grant.actions]}
            grants.append(rights | {"ends": people.moment(grant.expires), "grace_ends": people.moment(last)})
        warnings = [words for end in sorted(ends) if (words := _warning(*end, now))]
        if held is not None and held.revoked_at:
            warnings.insert(0, f"the entitlement of {who.org} was revoked on {date(held.revoked_at)}")
        return facts | {"grants": grants, "revocation_serial": self.revocation_serial(), "now": date(now), "warnings": warnings}


def _warning(end: float, last: float, what: str, now: float) -> str:
    if end > now:
        return soon(what, end, now)
    return f"{what} expired on {date(end)}" + (f"; grace ends on {date(last)}" if last > now else "")
