"""Access tokens of this site and the scopes that they are asked with: sign, verify, parse, intersect; pure, the clock is an argument.

Here because the door that issues a token and the guard that meets one must agree. It must not read a key's rights: a token only cuts them down.
A token is `alt1.` + base64url(claims) + `.` + base64url(HMAC-SHA-256 over all before it): ours alone, opaque to clients, with no algorithm to choose.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from artifact.errors import Invalid, TooLarge, Unauthenticated
from artifact.grant import Access

PREFIX = "alt1."
PURPOSE = b"AIRLOCK registry access token v1"
MAX_TOKEN = 16 * 1024
MAX_SCOPES = 20  # a token travels in a header: twenty of the longest names stay under the 8 KiB that proxies take
MAX_SCOPE_TEXT = 16 * 1024
ACTIONS = ("pull", "push", "delete")
_WORD = re.compile(r"[a-z]+(?:\([a-z0-9]+\))?\Z")


@dataclass(frozen=True)
class Claims:
    """What a verified token says: the key it stands for (empty: nobody's), until when, and what it opens."""

    key_id: str
    exp: int
    access: tuple[Access, ...]


class Seal:
    """An authenticated text of ours, `<prefix><base64url JSON>.<base64url HMAC-SHA-256 over all before it>`, under one site's pepper and purpose.

    What was sealed under one of `others` opens too, while a pepper is being replaced.
    """

    def __init__(self, purpose: bytes, pepper: bytes, others: Iterable[bytes] = ()) -> None:
        self._keys = [hmac.new(secret, purpose, hashlib.sha256).digest() for secret in (pepper, *others)]

    @staticmethod
    def _mac(text: str, key: bytes) -> str:
        return _b64(hmac.new(key, text.encode("ascii"), hashlib.sha256).digest())

    def close(self, prefix: str, value: object) -> str:
        """The text that says this JSON value."""
        text = prefix + _b64(json.dumps(value, separators=(",", ":"), ensure_ascii=True).encode("ascii"))
        return f"{text}.{self._mac(text, self._keys[0])}"

    def open(self, prefix: str, text: str) -> object:
        """What was sealed here; None for anything else."""
        if len(text) > MAX_TOKEN or not text.isascii() or not text.startswith(prefix):
            return None
        text, _, mac = text.rpartition(".")
        if not any([hmac.compare_digest(self._mac(text, key), mac) for key in self._keys]):
            return None
        text = text[len(prefix) :]
        try:
            return json.loads(base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)))
        except (ValueError, binascii.Error, RecursionError):
            return None


class Tokens:
    """Signs under one site's pepper, for that site's instance id only; verifies under `others` too, while a pepper is being replaced."""

    def __init__(self, pepper: bytes, audience: str, others: Iterable[bytes] = ()) -> None:
        self._seal = Seal(PURPOSE, pepper, others)
        self._audience = audience

    def sign(self, claims: Claims) -> str:
        """The token of these claims; raises TooLarge."""
        access = [[a.kind, a.name, list(a.actions)] for a in claims.access]
        doc = {"aud": self._audience, "exp": claims.exp, "key": claims.key_id, "access": access}
        token = self._seal.close(PREFIX, doc)
        if len(token) > MAX_TOKEN:
            raise TooLarge(f"the token would have {len(token)} characters", expected=f"at most {MAX_TOKEN}", do="ask for fewer scopes at once")
        return token

    def verify(self, token: str, now: float) -> Claims:
        """The claims of an unexpired token of this site; raises Unauthenticated with reason token_invalid or token_expired."""
        claims = self._claims(self._seal.open(PREFIX, token))
        if claims is None:
            raise Unauthenticated("the token is not valid here", do="ask the token endpoint for a new one", reason="token_invalid")
        if claims.exp <= now:
            raise Unauthenticated("the token expired", do="ask the token endpoint for a new one", reason="token_expired")
        return claims

    def _claims(self, doc: object) -> Claims | None:
        """Our own words again; None for what another version or site signed under the same key."""
        if not isinstance(doc, dict) or set(doc) != {"aud", "exp", "key", "access"} or doc["aud"] != self._audience:
            return None
        if type(doc["exp"]) is not int or not isinstance(doc["key"], str) or not isinstance(doc["access"], list):
            return None
        access = [_access(entry) for entry in doc["access"]]
        found = tuple(a for a in access if a is not None)
        return Claims(doc["key"], doc["exp"], found) if len(found) == len(access) else None


def _access(entry: object) -> Access | None:
    if not isinstance(entry, list) or len(entry) != 3 or not all(isinstance(part, str) for part in entry[:2]) or not isinstance(entry[2], list):
        return None
    if not all(isinstance(action, str) for action in entry[2]):
        return None
    return Access(entry[0], entry[1], tuple(entry[2]))


def _b64(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode("ascii")


def is_token(text: str) -> bool:
    """Whether a presented credential is meant as a token rather than as an API key."""
    return text.startswith(PREFIX)


def parse_scopes(texts: Iterable[str]) -> tuple[Access, ...]:
    """The scopes of a token request, each name once with all its actions; malformed ones and other types are left out: nothing is granted on them.

    The type ends at the first colon, the actions begin behind the last, so that a name may hold a port; `*` is every action.
    Raises Invalid, TooLarge (distribution token specification, scope grammar; RFC 6749 section 3.3 for several in one text).
    """
    merged: dict[tuple[str, str], list[str]] = {}
    size = 0
    for text in texts:
        size += len(text)
        if size > MAX_SCOPE_TEXT:
            raise TooLarge("the scopes are too long", expected=f"at most {MAX_SCOPE_TEXT} characters")
        for part in text.split(" "):
            kind, _, rest = part.partition(":")
            name, colon, actions = rest.rpartition(":")
            if not colon or not name or not _WORD.match(kind):
                continue
            kind = kind.partition("(")[0]
            if kind not in ("repository", "registry"):
                continue
            asked = merged.setdefault((kind, name), [])
            for action in actions.split(","):
                for one in (ACTIONS if kind == "repository" else ("*",)) if action == "*" else (action,):
                    if one in (*ACTIONS, "*") and one not in asked:
                        asked.append(one)
            if len(merged) > MAX_SCOPES:
                raise Invalid(f"more than {MAX_SCOPES} scopes in one request", expected=f"at most {MAX_SCOPES}", do="ask for several tokens")
    return tuple(Access(kind, name, tuple(asked)) for (kind, name), asked in merged.items())


def granted(asked: Iterable[Access], may: Callable[[Access, str], bool]) -> tuple[Access, ...]:
    """What of the asked is allowed, name by name and action by action; who asks for a pull gets at least what the key may list."""
    out = []
    for access in asked:
        wanted = [*access.actions, *(["list"] if "pull" in access.actions else [])]
        actions = tuple(action for action in wanted if may(access, action))
        if actions:
            out.append(Access(access.kind, access.name, actions))
    return tuple(out)


def challenge(base: str, scope: str = "", error: str = "") -> str:
    """The WWW-Authenticate value that sends a client to our token endpoint, on the URL by which it knows us (distribution token specification)."""
    service = base.partition("://")[2]
    parts = [f'realm="{base}/token"', f'service="{service}"', *([f'scope="{scope}"'] if scope else []), *([f'error="{error}"'] if error else [])]
    return "Bearer " + ",".join(parts)
