"""The one console script: finds the command among the installed packages' entry points and loads nothing else."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points

from artifact.errors import AirlockError, Unavailable

GROUP = "airlock.commands"
USAGE = 2
EXTRAS = {"registry": "registry", "mirror": "mirror", "runtime": "runtime"}


def _commands() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=GROUP)}


def _usage(commands: dict[str, EntryPoint]) -> str:
    words = "\n".join(f"  airlock {name.replace('.', ' ')}" for name in sorted(commands))
    end = "example: airlock catalog list --json\nEach command has --help; exit codes: docs/operations.md."
    return f"usage: airlock COMMAND [...]\n\ncommands:\n{words}\n\n{end}"


def _called(commands: dict[str, EntryPoint], name: str) -> list[str]:
    """The words that a program name stands for: a link called list-model-profiles, or nim_download_to_cache, is that command of the runtime."""
    word = name.replace("_", "-")
    for prefix in ("", "nim-llm-", "nim-"):
        if word.startswith(prefix) and f"runtime.{word.removeprefix(prefix)}" in commands:
            return ["runtime", word.removeprefix(prefix)]
    return []


def _find(commands: dict[str, EntryPoint], argv: list[str]) -> tuple[EntryPoint, list[str]] | None:
    if len(argv) > 1 and f"{argv[0]}.{argv[1]}" in commands:
        return commands[f"{argv[0]}.{argv[1]}"], argv[2:]
    if argv and argv[0] in commands:
        return commands[argv[0]], argv[1:]
    return None


def report(error: AirlockError, as_json: bool) -> int:
    """Prints an expected failure to stderr, as JSON where asked for, and returns its exit status."""
    print(json.dumps(error.as_dict()) if as_json else f"airlock: {error}", file=sys.stderr)
    return error.exit_code


def run(command: Callable[[list[str]], int], argv: list[str]) -> int:
    """Runs one command, mapping expected failures, Ctrl-C and a closed pipe to exit statuses."""
    try:
        return command(argv)
    except AirlockError as error:
        return report(error, "--json" in argv)
    except KeyboardInterrupt:
        print("airlock: interrupted; the same command again resumes", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (OSError, UnicodeError) as error:
        what = error.strerror or str(error) if isinstance(error, OSError) else "an argument or a file name is not valid UTF-8"
        where = error.filename if isinstance(error, OSError) else None
        return report(Unavailable(f"{where}: {what}" if where else what, do="check the path, its permissions and the free space"), "--json" in argv)


def main() -> int:
    """Entry point of `airlock`."""
    commands = _commands()
    argv = [*_called(commands, os.path.basename(sys.argv[0])), *sys.argv[1:]]  # noqa: PTH119 - a name, not a path
    found = _find(commands, argv)
    if found is None:
        family = sorted(n for n in commands if argv and n.startswith(argv[0] + "."))
        shown = {n: commands[n] for n in family} or commands
        wants_help = not argv or argv[-1] in ("-h", "--help")
        print(_usage(shown), file=sys.stdout if wants_help else sys.stderr)
        return 0 if wants_help else USAGE
    point, rest = found
    try:
        command = point.load()
    except ModuleNotFoundError as error:
        extra = EXTRAS.get(point.module.split(".", 1)[0], "dev")
        print(f"airlock: {point.name.replace('.', ' ')} needs the module {error.name}; do: pip install 'airlock[{extra}]'", file=sys.stderr)
        return USAGE
    return run(command, rest)


if __name__ == "__main__":
    sys.exit(main())
