"""The errors that are part of every interface, named by what the caller can do; each protocol has one table from class to wire form.

An error says what was wrong, what was expected and what to do. It must never hold a secret.
"""

from __future__ import annotations


class AirlockError(Exception):
    """Base of all expected failures; `code` is stable for machines, `exit_code` is the documented exit status of a command."""

    code = "error"
    exit_code = 1

    def __init__(self, what: str, *, expected: str = "", do: str = "", reason: str = "", **ids: object) -> None:
        super().__init__(what)
        self.what = what
        self.expected = expected
        self.do = do
        self.reason = reason or self.code
        self.ids = {k: str(v) for k, v in ids.items()}

    def __str__(self) -> str:
        parts = [self.what]
        if self.expected:
            parts.append(f"expected: {self.expected}")
        if self.do:
            parts.append(f"do: {self.do}")
        return "; ".join(parts)

    def as_dict(self) -> dict[str, object]:
        """The same facts for `--json` and logs."""
        return {"error": self.code, "reason": self.reason, "what": self.what, "expected": self.expected, "do": self.do, "ids": self.ids}


class NotFound(AirlockError):
    """The name, reference or digest does not exist for this caller (it may belong to somebody else)."""

    code = "not_found"
    exit_code = 3


class Denied(AirlockError):
    """The caller is known and may not do this; `reason` is a code of artifact.grant."""

    code = "denied"
    exit_code = 4


class Unauthenticated(AirlockError):
    """No key, or one that proves nothing; `reason` tells absent, invalid, expired or revoked apart where possession is proven."""

    code = "unauthenticated"
    exit_code = 5


class Invalid(AirlockError):
    """The input breaks a grammar, a format or a limit and will never be accepted as it is."""

    code = "invalid"
    exit_code = 6


class Mismatch(AirlockError):
    """Bytes do not match their digest, size or signature; nothing of them was kept."""

    code = "mismatch"
    exit_code = 7


class Conflict(AirlockError):
    """Somebody else changed or holds it; reading again and retrying may succeed."""

    code = "conflict"
    exit_code = 8


class Unavailable(AirlockError):
    """A peer, disk or engine does not answer now; retrying later may succeed."""

    code = "unavailable"
    exit_code = 9


class Throttled(Unavailable):
    """Too many failed logins from one network, or changes of one key, in a minute; `retry_after` seconds are in `ids`."""


class Unsupported(AirlockError):
    """This build, backend or peer does not do that."""

    code = "unsupported"
    exit_code = 10


class TooLarge(AirlockError):
    """A named limit was hit; the text names it."""

    code = "too_large"
    exit_code = 11


class RangeInvalid(AirlockError):
    """A byte range or an upload offset that does not fit the stored state (HTTP 416)."""

    code = "range_invalid"
    exit_code = 6
