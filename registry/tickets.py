"""Download tickets: what a URL carries in place of a key, for clients that send none to it; pure, the clock is an argument.

A ticket is for one operation on one object of one repository, until its end, for the key that asked for it, whose row is read at each use: a revoked
key takes its tickets along.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from artifact.errors import Denied
from registry.tokens import Seal

PREFIX = "atk1."
PURPOSE = b"AIRLOCK download ticket v1"
READ = "read"
LIFE_S = 86400  # a client takes all URLs of a model at once and never asks again: they outlive the transfer


@dataclass(frozen=True)
class Ticket:
    """The key's public id (empty: nobody's), the repository's canonical name, the object's digest, and the end in seconds since 1970."""

    key_id: str
    name: str
    digest: str
    exp: int


class Tickets:
    """Signs under one site's pepper, for that site's instance id only; verifies under `others` too, while a pepper is being replaced."""

    def __init__(self, pepper: bytes, audience: str, others: Iterable[bytes] = ()) -> None:
        self._seal = Seal(PURPOSE, pepper, others)
        self._audience = audience

    def sign(self, ticket: Ticket) -> str:
        """The text of a ticket to read: ASCII that no URL has to escape."""
        return self._seal.close(PREFIX, [self._audience, READ, ticket.key_id, ticket.name, ticket.digest, ticket.exp])

    def verify(self, text: str, now: float) -> Ticket:
        """The ticket that a text is; raises Denied `ticket_invalid` or `ticket_expired`."""
        doc = self._seal.open(PREFIX, text)
        if not isinstance(doc, list) or len(doc) != 6 or doc[:2] != [self._audience, READ]:
            raise Denied("the download ticket is not valid here", do="list the files again", reason="ticket_invalid")
        ticket = Ticket(*doc[2:])
        if ticket.exp <= now:
            raise Denied("the download ticket expired", do="list the files again", reason="ticket_expired")
        return ticket
