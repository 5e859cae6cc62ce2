"""Who is calling: a presented key or token becomes a principal, by one statement, and failed logins are recorded and slowed.

Here so that registry/guard.py is about verbs only. It decides nothing about names and knows no HTTP.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, replace

from artifact.errors import Denied, Invalid, Throttled, Unauthenticated
from artifact.grant import Access, Principal, authenticate, soon
from artifact.store import Call
from registry.audit import Audit, network_of
from registry.entitlements import Entitlements, well_formed
from registry.floor import Floor
from registry.holders import Badge
from registry.home import Home
from registry.lookup import Ask, Found, Lookup, Sought
from registry.pace import FAILED_LOGINS, Pace
from registry.sigv4 import Signed
from registry.tickets import Ticket, Tickets
from registry.tokens import Claims, Tokens, is_token

TICKET: Ask = ("ticket",)
GUESSES = ("key_invalid", "token_invalid", "ticket_invalid", "signature_invalid")  # failed logins; an absent, expired or revoked key is none


@dataclass(frozen=True)
class Policy:
    """Whether everybody may read what is public, the life of a token, who may be sent to the store's own URLs, whether entitlements are a must."""

    anonymous: bool = False
    token_life_s: int = 600
    redirect: bool = True
    stream_to: tuple[str, ...] = ()
    entitled_only: bool = False


class Admission:
    """The entrance of one site; its only state is the count of failed logins."""

    def __init__(self, entitlements: Entitlements, lookup: Lookup, audit: Audit, home: Home, policy: Policy, floor: Floor) -> None:
        self._entitlements, self._lookup, self._audit, self.policy, self._floor = entitlements, lookup, audit, policy, floor
        self._tokens = Tokens(home.pepper(), home.instance, home.peppers()[1:])
        self.tickets = Tickets(home.pepper(), home.instance, home.peppers()[1:])
        self._failed = Pace(FAILED_LOGINS)
        try:
            self._streamed = tuple(ipaddress.ip_network(text) for text in policy.stream_to)
        except ValueError as error:
            raise Invalid("AIRLOCK_STREAM_TO holds what is no network", expected="for example 10.0.0.0/8,fd00::/8", reason="setting") from error

    def caller(self, key_text: str | Signed | None, request_id: str, now: float, address: str, ask: Ask = ()) -> Call:
        """The call of a presented key, token or signature; None is no credential at all, which a site may let read what is public.

        With `ask` the same statement finds what the request is about, for the guard to decide on; with TICKET the text is a download ticket,
        which is refused as Denied ticket_invalid or ticket_expired.
        Raises Unauthenticated with reason key_absent, key_invalid, key_expired, key_revoked, token_invalid, token_expired or
        insufficient_scope, those of registry/sigv4.py, and Throttled.
        """
        now = self._floor.now(now)
        call = Call(Principal(), None, request_id, now, self._redirected(address))
        if key_text is None and self.policy.anonymous:
            return self.nobody(request_id, now, call.redirect)
        try:
            if isinstance(key_text, Signed):
                principal, found = self._signer(key_text, now, ask)
            elif ask == TICKET:
                ticket = self.tickets.verify(key_text or "", now)
                ask = ("object", ticket.name, ticket.digest)
                principal, found = self._bearer(ticket, ask)
            else:
                principal, found = self._principal(key_text or "", now, ask)
            call = replace(call, principal=principal)
            alive = authenticate(call.principal, now)
            if not alive.allow and not call.principal.anonymous:
                raise Unauthenticated(alive.words, do=alive.remedy, reason=alive.reason)
        except (Denied, Unauthenticated) as error:
            self._audit.denied(call, "login", "", error.reason, address)
            wait = self._failed.wait_s(network_of(address), now) if error.reason in GUESSES else 0
            if wait:
                raise Throttled("too many failed logins from this network", do=f"wait {wait} s, then use a valid key", retry_after=wait) from None
            raise
        call.warnings.update(filter(None, (soon("the API key", principal.expires, now),)))
        if ask and not call.principal.anonymous:
            looked = {"badge": found} if isinstance(found, Badge) else {"found": found}
            return Sought(call.principal, None, request_id, now, call.redirect, call.warnings, ask, **looked)
        return call

    def nobody(self, request_id: str, now: float, redirect: bool = False) -> Call:
        """The call of one without a key: it opens what the site lets everybody read, maybe nothing."""
        now = self._floor.now(now)
        who = Principal(anonymous=self.policy.anonymous, entitled_only=self.policy.entitled_only)
        return Call(who, None, request_id, now, redirect)

    def _bearer(self, ticket: Ticket, ask: Ask) -> tuple[Principal, Found]:
        """The key that a ticket stands for as it is now, cut down to reading that repository, and the ticket's object; raises Denied."""
        access = (Access("repository", ticket.name, ("pull",)),)
        if not ticket.key_id:
            return Principal(access=access, anonymous=self.policy.anonymous, entitled_only=self.policy.entitled_only), None
        holder, found = self._holder(ask, key_id=ticket.key_id)
        if holder is None:
            raise Denied("the download ticket is of a key that is gone", do="list the files again", reason="ticket_invalid")
        return replace(holder, access=access), found

    def _signer(self, signed: Signed, now: float, ask: Ask) -> tuple[Principal, Found]:
        """Who holds the key that a request is signed with, as it is now, and what is asked for; raises Unauthenticated."""
        signed.verify(self._entitlements.s3_secrets(signed.key_id), now)
        holder, found = self._holder(ask, key_id=signed.key_id)
        if holder is None:
            raise Unauthenticated("there is no such access key any more", do="ask for a new key", reason="access_key")
        self._entitlements.used(holder.key_id, "", now)
        return holder, found

    def _principal(self, text: str, now: float, ask: Ask) -> tuple[Principal, Found]:
        """Who holds this key, or the key that this token stands for, as it is now, and what is asked for; raises Unauthenticated."""
        absent = authenticate(Principal(), now)
        if not text:
            raise Unauthenticated(absent.words, do=absent.remedy, reason="key_absent")
        if not is_token(text):
            holder, found = self._holder(ask, key=text) if well_formed(text) else (None, None)
            if holder is None:
                raise Unauthenticated(absent.words, do=absent.remedy, reason="key_invalid")
            self._entitlements.used(holder.key_id, text, now)
            return holder, found
        claims = self._tokens.verify(text, now)
        if not claims.key_id and not self.policy.anonymous:
            raise Unauthenticated(absent.words, do=absent.remedy, reason="insufficient_scope")
        if not claims.key_id:
            return Principal(access=claims.access, anonymous=True, entitled_only=self.policy.entitled_only), None
        holder, found = self._holder(ask, key_id=claims.key_id)
        if holder is None:
            raise Unauthenticated(absent.words, do=absent.remedy, reason="token_invalid")
        return replace(holder, access=claims.access), found

    def _holder(self, ask: Ask, *, key: str = "", key_id: str = "") -> tuple[Principal | None, Found]:
        found: Found = None
        if not ask:
            holder = self._entitlements.principal(key) if key else self._entitlements.holder(key_id)
        else:
            for digest in self._entitlements.hmacs(key) if key else (b"",):  # the current pepper's, then those that it replaced
                holder, found = self._lookup.seek(ask, hmac=digest, key_id=key_id)
                if holder is not None:
                    break
        if holder is not None and self.policy.entitled_only:
            holder = replace(holder, entitled_only=True)
        return holder, found

    def sign(self, call: Call, access: tuple[Access, ...], least_s: int = 0) -> tuple[str, int]:
        """A token for the caller's key with this access, and its life in seconds, `least_s` where it would be less; raises TooLarge."""
        life = max(self.policy.token_life_s, least_s)
        return self._tokens.sign(Claims(call.principal.key_id, int(call.now) + life, access)), life

    def _redirected(self, address: str) -> bool:
        """Whether a client at this address may be sent to the store's own URLs."""
        if not self.policy.redirect or not self._streamed:
            return self.policy.redirect
        try:
            ip = ipaddress.ip_address(address)
        except ValueError:
            return False
        ip = getattr(ip, "ipv4_mapped", None) or ip
        return not any(ip in network for network in self._streamed)
