"""One file per engine: its name is the profile's tag `llm_engine`; none imports another, and adding one changes nothing else.

Each has `find(settings) -> Installation` (raises NotFound, reason engine_absent) and `plan(start) -> Launch` (raises Invalid), and starts nothing.
"""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType

from artifact.errors import AirlockError, NotFound
from runtime.launch import Installation, Launch, Start
from runtime.settings import Settings

__all__ = ["Installation", "Launch", "Start", "installed", "load", "names"]


def names() -> tuple[str, ...]:
    """The engines that have a file here."""
    return tuple(sorted(m.name for m in pkgutil.iter_modules(__path__)))


def load(name: str) -> ModuleType:
    """The adapter of that name; raises NotFound (reason engine_absent): a name comes from a profile and never reaches the import otherwise."""
    if name not in names():
        raise NotFound(f"there is no engine {name[:40]!r}", expected=", ".join(names()), reason="engine_absent")
    return importlib.import_module(f"{__name__}.{name}")


def installed(settings: Settings) -> dict[str, str]:
    """For each engine: empty where it can be started here, else why not."""
    found: dict[str, str] = {}
    for name in names():
        try:
            load(name).find(settings)
            found[name] = ""
        except AirlockError as error:
            found[name] = error.what
    return found
