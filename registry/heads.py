"""Heads of answers: values that HTTP can carry, and the one header by which every door tells what ends soon; pure."""

from __future__ import annotations

from collections.abc import Collection, Mapping

MOST = 5  # warnings of one answer


def heads(status: int, headers: Mapping[str, str], warnings: Collection[str]) -> list[tuple[bytes, bytes]]:
    """The head of an answer in the form of ASGI; one that refuses carries no warning."""
    out = [(name.lower().encode("latin-1"), _value(value)) for name, value in headers.items()]
    if warnings and status < 400:
        out.append((b"warning", _value(", ".join(map(_warning, sorted(warnings)[:MOST])))))
    return out


def _warning(text: str) -> str:
    """A warning in the one form that is allowed (distribution-spec, Warnings; RFC 7234 section 5.5)."""
    quoted = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'299 - "{quoted}"'


def _value(value: str) -> bytes:
    """A header's value from any text: what HTTP cannot carry becomes a question mark."""
    if value.isascii() and value.isprintable():
        return value.encode("ascii")
    return "".join(c if 32 <= ord(c) < 127 else "?" for c in value).encode("ascii")
