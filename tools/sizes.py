"""Fails where a file or a function grew past the size that one reads in one go; run by `make lint`, never at run time."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

FILE, FUNCTION = 400, 80
TEST_FILE, TEST_FUNCTION = 600, 120


def limits(path: Path) -> tuple[int, int]:
    """The largest file (non-blank lines) and function (lines) allowed for a path; tests get more."""
    return (TEST_FILE, TEST_FUNCTION) if "tests" in path.parts else (FILE, FUNCTION)


def check(path: Path) -> list[str]:
    """One line per breach in one Python file."""
    try:
        text = path.read_text(encoding="utf-8")
        tree = ast.parse(text)
    except (UnicodeDecodeError, SyntaxError) as error:
        return [f"{path}: no Python in UTF-8: {error}"]
    largest, longest = limits(path)
    found = []
    lines = sum(1 for line in text.splitlines() if line.strip())
    if lines > largest:
        found.append(f"{path}: {lines} non-blank lines, at most {largest}")
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > longest:
                found.append(f"{path}:{node.lineno}: {node.name} has {length} lines, at most {longest}")
    return found


def main(argv: list[str]) -> int:
    """Checks every Python file under the given folders; 1 when one is too large, 2 when there is none."""
    files = sorted(f for root in map(Path, argv) for f in ([root] if root.is_file() else root.rglob("*.py")))
    if not files:
        print("usage: sizes.py FOLDER..., with Python files in them", file=sys.stderr)
        return 2
    found = [line for f in files for line in check(f)]
    print("\n".join(found) if found else f"sizes: {len(files)} files within the limits")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
