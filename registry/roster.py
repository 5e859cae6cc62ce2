"""The administrator's verbs over organisations, teams and members: a JSON object in, a JSON object out, each recorded in its own transaction.

It is a part of the guard (registry/guard.py) in a file of its own; keys and grants are in registry/issuance.py. What a member may, it has by grants
alone: a role is a grant too, so that the decision needs no second rule. Nothing that the audit names is ever deleted.
"""

from __future__ import annotations

from collections.abc import Callable

from sqlalchemy import Connection, Row

from artifact.errors import NotFound
from artifact.grant import Grant
from artifact.store import Call
from registry import people
from registry.bodies import Body, only, text, word
from registry.database import reading
from registry.delegation import Office, latest
from registry.desk import Desk
from registry.people import Facts

KINDS = ("person", "robot")
ROLES = tuple(people.ROLES)


def page(items: list[Facts], limit: int) -> Facts:
    """A page of named items, and the name behind which the next one begins."""
    return {"items": items, "after": str(items[-1]["name"]) if len(items) == limit else ""}


class Roster(Desk):
    """Organisations, their teams and their members."""

    # ---- organisations

    def create_org(self, call: Call, body: Body) -> Facts:
        """Makes the organisation `name`, shown as `display`; raises Denied, Invalid, Conflict `exists`."""
        self._site(call)
        only(body, "name", "display")
        name, display = people.check_org(text(body, "name")), text(body, "display", "")

        def work(conn: Connection) -> Facts:
            people.create_org(conn, name, display, call.now)
            self._audit.change(conn, call, "org_create", name)
            return people.orgs(conn, "", 1, name)[0]

        return self._change(call, name, work)

    def close_org(self, call: Call, body: Body) -> Facts:
        """Closes the organisation `name`: none of its keys is accepted from now on; raises Denied, NotFound, Conflict `ended`."""
        self._site(call)
        only(body, "name")
        name = text(body, "name")

        def work(conn: Connection) -> Facts:
            people.close_org(conn, people.org_of(conn, name), call.now)
            self._audit.change(conn, call, "org_close", name)
            return people.orgs(conn, "", 1, name)[0]

        return self._change(call, name, work)

    def open_org(self, call: Call, body: Body) -> Facts:
        """Opens the closed organisation `name` again: its keys are accepted as before; raises Denied, NotFound, Conflict `not_ended`."""
        self._site(call)
        only(body, "name")
        name = text(body, "name")

        def work(conn: Connection) -> Facts:
            people.open_again(conn, people.org_of(conn, name))
            self._audit.change(conn, call, "org_open", name)
            return people.orgs(conn, "", 1, name)[0]

        return self._change(call, name, work)

    def orgs(self, call: Call, after: str = "", limit: int = 100) -> Facts:
        """The organisations, for the site's administrator; its own for who may look at that; raises Denied."""
        held = self._gate(call)
        only_one = "" if held.site else self._reader(call, call.principal.org).audits
        with reading(self._engine) as conn:
            return page(people.orgs(conn, after, limit, only_one), limit)

    def org(self, call: Call, name: str) -> Facts:
        """One organisation; raises Denied, NotFound."""
        self._reader(call, name)
        with reading(self._engine) as conn:
            found = people.orgs(conn, "", 1, name) if name else []
        if not found:
            raise NotFound(f"there is no organisation {name[:100]!r}", do="airlock org list", reason="org")
        return found[0]

    # ---- teams

    def teams(self, call: Call, org: str, after: str = "", limit: int = 100) -> Facts:
        """The teams of an organisation with their members; raises Denied, NotFound."""
        org = org or call.principal.org
        self._reader(call, org)
        with reading(self._engine) as conn:
            return page(people.teams(conn, people.org_of(conn, org, held=False).id, after, limit), limit)

    def _team(self, call: Call, body: Body, event: str, change: Callable[[Connection, Row[object], str], None]) -> Facts:
        only(body, "org", "name")
        org, name = text(body, "org", call.principal.org), text(body, "name")
        self._admin(call, org)

        def work(conn: Connection) -> Facts:
            change(conn, people.open_org(conn, org), name)
            self._audit.change(conn, call, event, f"{org}/{name}", owner=org)
            return {"org": org, "name": name}

        return self._change(call, org, work)

    def create_team(self, call: Call, body: Body) -> Facts:
        """Makes the team `name` of `org`; raises Denied, Invalid, NotFound, Conflict `exists`, `org_closed`."""
        return self._team(call, body, "team_create", lambda conn, org, name: people.create_team(conn, org, name, call.now))

    def close_team(self, call: Call, body: Body) -> Facts:
        """Closes the team `name` of `org`; raises Denied, NotFound, Conflict `ended`."""
        return self._team(call, body, "team_close", lambda conn, org, name: people.close_team(conn, org, name, call.now))

    def join(self, call: Call, body: Body) -> Facts:
        """Takes `member` into the team `name` of `org`; raises Denied where the team may more than the caller, NotFound, Conflict `exists`."""
        only(body, "org", "name", "member")
        org, name, who = text(body, "org", call.principal.org), text(body, "name"), text(body, "member")
        held = self._admin(call, org)

        def work(conn: Connection) -> Facts:
            owner = people.open_org(conn, org)
            team, member = people.team_of(conn, owner, name), people.member_of(conn, owner, who)
            self._bounded(held, call.now, people.rights_of(conn, team_id=team.id))
            people.join_team(conn, team, member)
            self._audit.change(conn, call, "team_add", f"{org}/{name}", owner=org, member=who)
            return {"org": org, "name": name, "member": who}

        return self._change(call, org, work)

    def leave(self, call: Call, body: Body) -> Facts:
        """Takes `member` out of the team `name` of `org`; raises Denied, NotFound."""
        only(body, "org", "name", "member")
        org, name, who = text(body, "org", call.principal.org), text(body, "name"), text(body, "member")
        self._admin(call, org)

        def work(conn: Connection) -> Facts:
            people.leave_team(conn, people.org_of(conn, org), name, who)
            self._audit.change(conn, call, "team_remove", f"{org}/{name}", owner=org, member=who)
            return {"org": org, "name": name, "member": who}

        return self._change(call, org, work)

    # ---- members

    def members(self, call: Call, org: str, after: str = "", limit: int = 100) -> Facts:
        """The members of an organisation; raises Denied, NotFound."""
        org = org or call.principal.org
        self._reader(call, org)
        with reading(self._engine) as conn:
            return page(people.members(conn, people.org_of(conn, org, held=False).id, after, limit), limit)

    def create_member(self, call: Call, body: Body) -> Facts:
        """Makes the member `name` of `org`, a person or a robot (`kind`), with a `role`; raises Denied, Invalid, NotFound, Conflict `exists`."""
        only(body, "org", "name", "kind", "role", "note")
        org, name, note = text(body, "org", call.principal.org), text(body, "name"), text(body, "note", "")
        kind, role = word(body, "kind", KINDS, "person"), word(body, "role", ROLES, "member")
        held = self._admin(call, org)

        def work(conn: Connection) -> Facts:
            owner = people.open_org(conn, org)
            people.create_member(conn, owner, name, kind, note, call.now)
            return self._role(conn, call, held, owner, name, role, "member_create", kind=kind)

        return self._change(call, org, work)

    def set_role(self, call: Call, body: Body) -> Facts:
        """Gives the member `name` of `org` another `role`; raises Denied, Invalid, NotFound, Conflict."""
        only(body, "org", "name", "role")
        org, name, role = text(body, "org", call.principal.org), text(body, "name"), word(body, "role", ROLES)
        held = self._admin(call, org)
        return self._change(call, org, lambda conn: self._role(conn, call, held, people.open_org(conn, org), name, role, "member_role"))

    def _role(self, conn: Connection, call: Call, held: Office, owner: Row[object], name: str, role: str, event: str, **more: object) -> Facts:
        member = people.member_of(conn, owner, name)
        expires = 0.0
        if not held.site and people.ROLES[role]:
            expires = latest(held.principal, call.now)
            self._bounded(held, call.now, [Grant((f"{owner.name}/**",), (people.ROLES[role],), expires=expires)])
        grant = people.set_role(conn, owner, member, role, expires, call.now)
        self._audit.change(conn, call, event, f"{owner.name}/{name}", owner=owner.name, role=role, grant=grant, **more)
        return {"org": owner.name, "name": name, "kind": member.kind, "role": role, "grant_id": grant}

    def disable(self, call: Call, body: Body) -> Facts:
        """Disables the member `name` of `org`: none of its keys is accepted from now on; raises Denied, NotFound, Conflict `ended`."""
        only(body, "org", "name")
        org, name = text(body, "org", call.principal.org), text(body, "name")
        self._admin(call, org)

        def work(conn: Connection) -> Facts:
            people.disable_member(conn, people.org_of(conn, org), name, call.now)
            self._audit.change(conn, call, "member_disable", f"{org}/{name}", owner=org)
            return {"org": org, "name": name, "disabled": people.moment(call.now)}

        return self._change(call, org, work)

    def enable(self, call: Call, body: Body) -> Facts:
        """Enables the disabled member `name` of `org` again; raises Denied where it may more than the caller, NotFound, Conflict `not_ended`."""
        only(body, "org", "name")
        org, name = text(body, "org", call.principal.org), text(body, "name")
        held = self._admin(call, org)

        def work(conn: Connection) -> Facts:
            member = people.enable_member(conn, people.open_org(conn, org), name)
            self._bounded(held, call.now, people.rights_of(conn, member_id=member.id))
            self._audit.change(conn, call, "member_enable", f"{org}/{name}", owner=org)
            return {"org": org, "name": name, "disabled": ""}

        return self._change(call, org, work)
