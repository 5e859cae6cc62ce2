"""What the verbs over people and over keys share: who may use them, and the transaction in which each is recorded.

A caller is judged before anything is read; what it may not administer is answered alike whether it exists or not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn, TypeVar

from sqlalchemy import Connection, Engine

from artifact.errors import Denied
from artifact.grant import Decision, Grant, Principal
from artifact.store import Call
from registry.audit import Audit
from registry.database import retried
from registry.delegation import Office, above, wider
from registry.entitlements import Entitlements

T = TypeVar("T")
Gate = Callable[[Call], Office]
Refuse = Callable[[Call, str, str, Decision], NoReturn]


def local_office(_call: Call) -> Office:
    """The office of whoever runs a command on the data directory itself: all of it."""
    return Office(Principal(key_id="local"), site=True)


def never(_call: Call, _action: str, _name: str, decision: Decision) -> NoReturn:
    """Refuses without a record, for commands on the data directory, which are never refused but by a defect."""
    raise Denied(decision.words, do=decision.remedy, reason=decision.reason)


class _Wider(Exception):
    """Takes back the transaction of a change that would give more than its author has."""


class Desk:
    """One database with its audit; `gate` says what a caller may do, `refuse` records and raises."""

    def __init__(self, engine: Engine, entitlements: Entitlements, audit: Audit, gate: Gate = local_office, refuse: Refuse = never) -> None:
        self._engine, self._entitlements, self._audit, self._gate, self._refuse = engine, entitlements, audit, gate, refuse

    def _no(self, call: Call, name: str, words: str, remedy: str) -> NoReturn:
        self._refuse(call, "admin", name, Decision(False, "action_missing", words, remedy))

    def _site(self, call: Call) -> Office:
        """The office of the site's administrator; raises Denied, Unauthenticated."""
        held = self._gate(call)
        if not held.site:
            self._no(call, "", "this is the site administrator's: it needs a grant on '**' with action admin", "ask the site's administrator")
        return held

    def _admin(self, call: Call, org: str) -> Office:
        """The office of an administrator of this organisation; raises Denied, Unauthenticated."""
        held = self._gate(call)
        if not held.site and (not org or held.administers != org):
            words = f"the people, keys and grants of {org[:100] or 'an organisation'} are its administrator's"
            self._no(call, org[:100], words, f"ask for a key with action admin on '{org[:100] or 'ORG'}/**'")
        return held

    def _reader(self, call: Call, org: str) -> Office:
        """The office of one who may look at this organisation; raises Denied, Unauthenticated."""
        held = self._gate(call)
        if not held.site and (not org or held.audits != org):
            words = f"the people, keys and grants of {org[:100] or 'an organisation'} are shown to its administrator and its auditor"
            self._no(call, org[:100], words, f"ask for a key with action auditor on '{org[:100] or 'ORG'}/**'")
        return held

    @staticmethod
    def _bounded(held: Office, now: float, grants: list[Grant], ends: float = 0.0, tier: str = "") -> None:
        """Returns where nothing of this is wider than the caller's own rights; raises _Wider, which `_change` refuses with."""
        if held.site:
            return
        found = next((words for g in grants if (words := wider(held.principal, g, now, ends))), "")
        found = found or (above(held.principal, tier, ends) if tier else "")
        if found:
            raise _Wider(found)

    def _change(self, call: Call, org: str, work: Callable[[Connection], T]) -> T:
        """What `work` returns in one transaction, run again where the database ended it for another's sake; raises Denied for what is wider."""
        try:
            return retried(self._engine, work)
        except _Wider as error:  # recorded once the transaction is over: a record of its own would wait for it
            self._no(call, org, f"nobody hands on more than it has: {error}", "ask the site's administrator")
