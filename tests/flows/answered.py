"""Whether every request of a client was answered by a route that we have: a probe that meets none is a gap in a door."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from registry.routes import route

NO_ROUTE = (404, 405, 501)


def unanswered(lines: Iterable[Mapping[str, Any]]) -> list[str]:
    """The requests among access lines that no route of ours took: what a refusal of a known route says is an answer."""
    out = []
    for line in lines:
        unknown = route(line["path"], line.get("door", "")).template.endswith("other")
        if line["status"] in NO_ROUTE and (unknown or line.get("reason") in ("route", "not_served", "method")):
            out.append(f"{line['method']} {line['path']} -> {line['status']}")
    return out
