"""Download tickets: what was signed here for this operation opens, until its end; anything else is refused as no ticket."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from artifact.errors import Denied
from registry.tickets import PREFIX, PURPOSE, Ticket, Tickets
from registry.tokens import Claims, Seal, Tokens

PEPPER, SITE = b"p" * 32, "site-1"
TICKET = Ticket("key-0123456789abcdef", "ngc/nim/meta/m", "sha256:" + "0" * 64, 1000)
DESK = Tickets(PEPPER, SITE)


def reason(desk: Tickets, text: str, now: float = 0.0) -> str:
    with pytest.raises(Denied) as caught:
        desk.verify(text, now)
    return caught.value.reason


def test_a_ticket_opens_until_its_end() -> None:
    text = DESK.sign(TICKET)
    assert re.fullmatch(r"[A-Za-z0-9_.-]+", text) and DESK.verify(text, 999.9) == TICKET
    assert reason(DESK, text, 1000.0) == "ticket_expired"


@given(st.text(max_size=60), st.text(max_size=60), st.text(max_size=80), st.integers(1, 2**40))
def test_whatever_is_signed_comes_back(key_id: str, name: str, digest: str, exp: int) -> None:
    ticket = Ticket(key_id, name, digest, exp)
    assert DESK.verify(DESK.sign(ticket), 0.0) == ticket


@given(st.integers(0, 400), st.sampled_from("A9_-.x"))
def test_one_changed_character_is_no_ticket(at: int, other: str) -> None:
    text = DESK.sign(TICKET)
    at %= len(text)
    changed = text[:at] + other + text[at + 1 :]
    if changed != text:
        assert reason(DESK, changed) == "ticket_invalid"


@given(st.text(max_size=300))
def test_any_text_is_refused(text: str) -> None:
    assert reason(DESK, text) == reason(DESK, PREFIX + text) == "ticket_invalid"


def test_of_another_site_pepper_or_purpose() -> None:
    for desk in (Tickets(PEPPER, "site-2"), Tickets(b"q" * 32, SITE)):
        assert reason(desk, DESK.sign(TICKET)) == "ticket_invalid"
    assert reason(DESK, Tokens(PEPPER, SITE).sign(Claims("key-1", 1000, ()))) == "ticket_invalid"
    other = Seal(b"another purpose", PEPPER).close(PREFIX, [SITE, "read", "k", "n", "d", 1000])
    assert reason(DESK, other) == "ticket_invalid"


def test_of_another_operation_or_form() -> None:
    seal = Seal(PURPOSE, PEPPER)
    for value in ([SITE, "write", "k", "n", "d", 1000], [SITE, "read", "k", "n", "d"], {}, None, "x"):
        assert reason(DESK, seal.close(PREFIX, value)) == "ticket_invalid"


def test_a_replaced_pepper_opens_and_signs_no_more() -> None:
    moved = Tickets(b"q" * 32, SITE, [PEPPER])
    assert moved.verify(DESK.sign(TICKET), 0.0) == TICKET and reason(DESK, moved.sign(TICKET)) == "ticket_invalid"
