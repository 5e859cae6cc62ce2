"""The verbs of auditors: the signed log's head, its entries, proofs and reports; a JSON object out, each look recorded.

It is a part of the guard (registry/guard.py). The whole log is the site's: its administrator and who holds `auditor` on `**` read it; the auditor of
an organisation gets proofs and reports of its own rows alone.
"""

from __future__ import annotations

import re
from dataclasses import replace

from artifact import tlog
from artifact.errors import Invalid, NotFound
from artifact.evidence import encode
from artifact.grant import Decision
from artifact.manifest import parse_json
from artifact.store import Call
from registry.audit import Audit
from registry.bodies import moment
from registry.database import reading
from registry.desk import Desk, Gate, Refuse, local_office, never
from registry.entitlements import Entitlements
from registry.gather import report
from registry.ledger import Ledger, page_json
from registry.people import Facts
from registry.report import DAY_S, MAX_DAYS, Period

_ID = re.compile(r"[A-Za-z0-9._-]{1,64}\Z")


class Auditor(Desk):
    """One site's log, as far as a caller may read it."""

    def __init__(self, ledger: Ledger, entitlements: Entitlements, audit: Audit, gate: Gate = local_office, refuse: Refuse = never) -> None:
        super().__init__(ledger.engine, entitlements, audit, gate, refuse)
        self._ledger = ledger

    def _looks(self, call: Call, org: str, what: str) -> None:
        """Returns where the caller may read of this organisation (the whole site: empty); the look is recorded; raises Denied, Unauthenticated."""
        held = self._gate(call)
        whole = held.site or held.surveys
        if not whole and (not org or held.audits != org):
            needs = f"'{org[:100]}/**'" if org else "'**'"
            words = f"this is shown to the auditor of {org[:100] or 'the whole site'}: it needs a grant on {needs} with action auditor"
            self._refuse(call, "audit", org[:100], Decision(False, "action_missing", words, "ask the site's administrator"))
        self._audit.read(replace(call, decision=call.decision or Decision(True, "ok")), org or "site", what, 0, "audit")

    def _own(self, call: Call) -> str:
        """The organisation that a caller's looks are bounded to; empty for who may read all of it."""
        held = self._gate(call)
        return "" if held.site or held.surveys else call.principal.org

    def checkpoint(self, call: Call, first: int = 0) -> Facts:
        """Signs over all that is recorded so far: the checkpoint, the verifier key, the log's name and size, and the range before entry `first`.

        For every auditor. Raises Denied, Invalid, Conflict `audit_fork`, Unavailable.
        """
        self._looks(call, self._own(call), "checkpoint")
        note, vkey, head = self._ledger.signed(call.now)
        if first > head.size:
            raise Invalid(f"the log has {head.size} entries", expected=f"first 0 to {head.size}", reason="log")
        return {
            "log": head.name,
            "size": head.size,
            "checkpoint": note,
            "key": vkey,
            "first": first,
            "before": encode(self._ledger.before(first)),
            "sealed": self._ledger.sealed(),
        }

    def entries(self, call: Call, after: int, size: int, limit: int) -> Facts:
        """A page of the entries from number `after` below `size`, with the checkpoints over them; `after` 0 is the end; raises Denied, Mismatch."""
        self._looks(call, "", "export")
        most = self._ledger.size()
        if not after < size <= most:
            raise Invalid("there are no such entries", expected=f"after below size, which is at most {most}", reason="log")
        return page_json(self._ledger.page(after, size, limit))

    def proof(self, call: Call, index: str = "", request_id: str = "", jti: str = "") -> Facts:
        """The proof of one entry by its number, or of the first of a request or a lease; for an organisation's auditor of its own rows.

        Raises Denied, NotFound, Invalid.
        """
        given = [text for text in (index, request_id, jti) if text]
        if len(given) != 1 or not _ID.match(given[0]) or (index and not re.fullmatch("[0-9]{1,18}", index)):
            raise Invalid("one entry is asked for", expected="index (a number), request_id or jti, one of them", reason="query")
        org = self._own(call)
        self._looks(call, org, "proof")
        note, vkey, _ = self._ledger.signed(call.now)
        found = [int(index)] if index else self._ledger.index_of(request_id=request_id, jti=jti, org=org)
        if not found:
            raise NotFound(f"no entry of the audit log tells of {given[0]}", do="see that the id is whole; sealed entries are in their export")
        proof = parse_json(self._ledger.proof(found[0], note, vkey, org), "the proof")
        return {"index": found[0], "also": found[1:], "proof": proof, "key": vkey}

    def report(self, call: Call, start: str, end: str, org: str = "") -> Facts:
        """The report of a period [from, to), at most 366 days, of the site or one organisation; raises Denied, Invalid (docs/operations.md)."""
        org = org or self._own(call)
        self._looks(call, org, "report")
        times = {"from": start, "to": end}
        period = Period(moment(times, "from", call.now), moment(times, "to", call.now), org, call.now)
        if not 0 < period.start < period.end or period.end - period.start > MAX_DAYS * DAY_S:
            raise Invalid("that is no period", expected=f"from before to, both RFC 3339 in UTC, at most {MAX_DAYS} days apart", reason="period")
        note, vkey, head = self._ledger.signed(call.now)
        with reading(self._engine) as conn:
            found = report(conn, period)
        signed = tlog.open_checkpoint(note, vkey)
        evidence = {"log": head.name, "size": signed.size, "root": signed.root.hex(), "key": vkey, "checkpoint": note}
        facts: Facts = {"organisation": org, "from": period.start, "to": period.end, "made": call.now, "evidence": evidence}
        return facts | found
