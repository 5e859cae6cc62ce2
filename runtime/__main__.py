"""`airlock runtime WORD …`: finds the command among the files of runtime/commands and loads that one only, so that `--help` answers at once."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import cast

from runtime import commands

EXAMPLE = "example: NGC_API_KEY=nvapi-… AIRLOCK_REGISTRY=http://registry:5000 AIRLOCK_TRUST=site-trust.json airlock runtime serve --model acme/tiny:1"
USAGE = 2


def _words() -> dict[str, str]:
    """Each command word and its module."""
    return {found.name.replace("_", "-"): found.name for found in pkgutil.iter_modules(commands.__path__)}


def _text(module: str) -> str:
    """What a command says of itself: the first sentence of its module, read without loading it."""
    source = Path(commands.__path__[0], f"{module}.py").read_text(encoding="utf-8")
    return (ast.get_docstring(ast.parse(source)) or "").split("\n", 1)[0].partition(": ")[2]


def _usage(words: dict[str, str]) -> str:
    lines = "\n".join(f"  {word:24}{_text(module)}" for word, module in words.items())
    end = f"{EXAMPLE}\nEach command has --help; exit codes: docs/operations.md, section 'Exit codes of airlock runtime'."
    return f"usage: airlock runtime COMMAND [...]\n\ncommands:\n{lines}\n\n{end}\n"


def main(argv: list[str] | None = None) -> int:
    """Entry point of `airlock runtime`; returns the documented exit status."""
    argv = sys.argv[1:] if argv is None else argv
    words = _words()
    if not argv or argv[0] not in words:
        wants_help = bool(argv) and argv[0] in ("-h", "--help")
        (sys.stdout if wants_help else sys.stderr).write(_usage(words))
        return 0 if wants_help else USAGE
    command = cast("Callable[[list[str]], int]", importlib.import_module(f"runtime.commands.{words[argv[0]]}").main)
    return command(argv[1:])


if __name__ == "__main__":
    sys.exit(main())
