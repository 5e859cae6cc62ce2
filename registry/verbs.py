"""Which verb answers which path below /airlock/v1/: the one table of the product's own API; registry/openapi.py describes the same rows.

Here because the door (registry/protocols/admin.py) only reads requests. Each row names a verb of the guard or of one of its parts, which decides and
records for itself: nothing is checked here. To add a route: a row below, its words in registry/routes.py, its description in registry/openapi.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

from artifact.manifest import check_name
from artifact.store import Call
from registry.guard import Guard

MOST = 1 << 62


class Query(Protocol):
    """What a verb may read of a request's query (registry/exchange.py); each raises Invalid for what it does not take."""

    def param(self, name: str, default: str = "") -> str:
        """The first parameter of that name."""

    def number(self, name: str, default: int, most: int) -> int:
        """A whole number, cut at `most`."""

    def cursor(self, name: str) -> str:
        """A listing's start."""


Body = Mapping[str, object]
Answer = dict[str, object]


def limit(q: Query) -> int:
    """How many items a page may have."""
    return max(1, q.number("limit", 100, 1000))


# POST: a JSON object in, a JSON object out, by the whole path below /airlock/v1/.
POSTS: dict[str, Callable[[Guard, Call, Body], Answer]] = {
    "leases": lambda g, call, body: {**g.lease(call, body), "now": int(call.now)},
    "leases/return": lambda g, call, body: g.leasing.give_back(call, body),
    "leases/revoke": lambda g, call, body: g.leasing.revoke(call, body),
    "verified": lambda g, call, body: g.leasing.verified(call, body),
    "unsigned": lambda g, call, body: g.leasing.unsigned(call, body),
    "entitlements": lambda g, call, body: g.documents.take(call, body),
    "entitlements/issue": lambda g, call, body: g.documents.issue(call, body),
    "entitlements/revoke": lambda g, call, body: g.documents.revoke(call, body),
    "remove": lambda g, call, body: g.upkeep.remove(call, body),
    "rollback": lambda g, call, body: g.upkeep.roll_back(call, body),
    "immutable": lambda g, call, body: g.upkeep.set_immutable(call, body),
    "require": lambda g, call, body: g.upkeep.require(call, body),
    "terms": lambda g, call, body: g.upkeep.set_terms(call, body),
    "quota": lambda g, call, body: g.upkeep.set_quota(call, body),
    "retention": lambda g, call, body: g.upkeep.set_rule(call, body),
    "gc": lambda g, call, body: g.upkeep.collect(call, body),
    "orgs": lambda g, call, body: g.roster.create_org(call, body),
    "orgs/open": lambda g, call, body: g.roster.open_org(call, body),
    "orgs/close": lambda g, call, body: g.roster.close_org(call, body),
    "teams": lambda g, call, body: g.roster.create_team(call, body),
    "teams/close": lambda g, call, body: g.roster.close_team(call, body),
    "teams/add": lambda g, call, body: g.roster.join(call, body),
    "teams/remove": lambda g, call, body: g.roster.leave(call, body),
    "members": lambda g, call, body: g.roster.create_member(call, body),
    "members/role": lambda g, call, body: g.roster.set_role(call, body),
    "members/disable": lambda g, call, body: g.roster.disable(call, body),
    "members/enable": lambda g, call, body: g.roster.enable(call, body),
    "keys": lambda g, call, body: g.issuance.create_key(call, body),
    "keys/revoke": lambda g, call, body: g.issuance.revoke_key(call, body),
    "keys/rotate": lambda g, call, body: g.issuance.rotate_key(call, body),
    "keys/s3": lambda g, call, body: g.issuance.s3_secret(call, body),
    "grants": lambda g, call, body: g.issuance.create_grant(call, body),
    "grants/revoke": lambda g, call, body: g.issuance.revoke_grant(call, body),
    "grants/extend": lambda g, call, body: g.issuance.extend_grant(call, body),
}
# GET of exactly this path.
GETS: dict[str, Callable[[Guard, Call, Query], Answer]] = {
    "whoami": lambda g, call, q: g.whoami(call),
    "standing": lambda g, call, q: g.standing(call),
    "leases": lambda g, call, q: g.leasing.leases(call, q.cursor("org"), q.cursor("after"), limit(q), every=q.param("every") == "1"),
    "entitlements": lambda g, call, q: g.documents.entitlements(call, q.cursor("org"), q.number("after", 0, MOST), limit(q)),
    "revocations": lambda g, call, q: g.documents.revocations(call),
    "catalog": lambda g, call, q: g.catalog_list(call, q.cursor("after"), limit(q)),
    "search": lambda g, call, q: g.upkeep.search(call, q.param("q"), q.cursor("after"), limit(q)),
    "audit/checkpoint": lambda g, call, q: g.auditor.checkpoint(call, q.number("first", 0, MOST)),
    "audit/entries": lambda g, call, q: g.auditor.entries(call, q.number("after", 0, MOST), q.number("size", 0, MOST), limit(q)),
    "audit/proof": lambda g, call, q: g.auditor.proof(call, q.cursor("index"), q.cursor("request_id"), q.cursor("jti")),
    "audit/report": lambda g, call, q: g.auditor.report(call, q.cursor("from"), q.cursor("to"), q.cursor("org")),
    "audit": lambda g, call, q: g.recorded(call, q.number("after", 0, MOST), limit(q)),
    "upstream": lambda g, call, q: g.upkeep.upstreams(call, q.cursor("name"), q.number("after", 0, MOST), limit(q)),
    "retention": lambda g, call, q: g.upkeep.rules(call),
    "expiring": lambda g, call, q: g.expiring.expiring(call, q.number("days", 60, MOST), q.cursor("org"), q.cursor("after"), limit(q)),
    "gc": lambda g, call, q: g.upkeep.collection(call),
    "orgs": lambda g, call, q: g.roster.orgs(call, q.cursor("after"), limit(q)),
    "teams": lambda g, call, q: g.roster.teams(call, q.cursor("org"), q.cursor("after"), limit(q)),
    "members": lambda g, call, q: g.roster.members(call, q.cursor("org"), q.cursor("after"), limit(q)),
    "keys": lambda g, call, q: g.issuance.keys(call, q.cursor("org"), q.number("after", 0, MOST), limit(q)),
    "grants": lambda g, call, q: g.issuance.grants(call, q.cursor("org"), q.number("after", 0, MOST), limit(q)),
}
# GET of this word and what follows it: a name, which may hold slashes.
NAMED: dict[str, Callable[[Guard, Call, Query, str], Answer]] = {
    "catalog": lambda g, call, q, name: g.catalog_show(call, check_name(name)),
    "history": lambda g, call, q, name: g.upkeep.history(call, check_name(name), q.param("tag"), q.number("before", 0, MOST), limit(q)),
    "quota": lambda g, call, q, name: g.upkeep.quota(call, name),
    "orgs": lambda g, call, q, name: g.roster.org(call, check_name(name)),
    "entitlements": lambda g, call, q, name: g.documents.entitlement(call, check_name(name)),
    "keys": lambda g, call, q, name: g.issuance.key(call, check_name(name)),
}
