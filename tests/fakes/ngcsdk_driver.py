"""Drives the unmodified ngcsdk: runs the steps that stdin names, in the ngcsdk's own environment, and prints what each of them gave.

Stdin: a list of [verb, arguments]; stdout: one JSON list of [outcome, value] with outcome "ok" or the name of the exception.
The endpoints and the authority of the certificate come by NGC's own variables, which the library reads when it is imported.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any


def plain(value: Any) -> Any:
    """What a step gave, as JSON."""
    if hasattr(value, "toDict"):
        return value.toDict()
    if isinstance(value, str | int | float | bool | None):
        return value
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, bytes):
        return value.decode()
    try:
        return [plain(item) for item in value]
    except TypeError:
        return {name: plain(getattr(value, name)) for name in vars(value) if not name.startswith("_")} if hasattr(value, "__dict__") else str(value)


def main() -> None:
    """Runs the steps."""
    steps = json.load(sys.stdin)
    from ngcsdk import Client

    client = Client()
    verbs: dict[str, Callable[..., Any]] = {  # looked up at each step: what configure changes is another object
        "configure": client.configure,
        "info": lambda *a, **k: client.registry.model.info(*a, **k),
        "list": lambda *a, **k: list(client.registry.model.list(*a, **k)),
        "files": lambda *a, **k: list(client.registry.model.list_files(*a, **k)),
        "download": lambda *a, **k: client.registry.model.download_version(*a, **k),
        "signature": lambda *a, **k: client.registry.model.download_version_signature(*a, **k),
        "images": lambda *a, **k: list(client.registry.image.list(*a, **k)),
        "image": lambda *a, **k: client.registry.image.info(*a, **k),
    }
    out = []
    for verb, arguments in steps:
        try:
            positional = arguments.pop("", [])
            out.append(["ok", plain(verbs[verb](*positional, **arguments))])
        except BaseException as error:
            out.append([type(error).__name__, str(error)])
    print("RESULT " + json.dumps(out, default=str))


main()
