"""What the benchmarks print: a table, one verdict line for each target, and the same as JSON.

Here so that every file words a miss as plainly as a hit. It measures nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

BAND = 0.30  # two machines of a shared host differ by this much from round to round


@dataclass(frozen=True)
class Verdict:
    """One target with its figure; `close` is a miss inside the noise band."""

    target: str
    figure: float
    bar: float
    at_most: bool

    @property
    def word(self) -> str:
        """met, within noise, or not met."""
        if self.figure <= self.bar if self.at_most else self.figure >= self.bar:
            return "met"
        near = self.figure <= self.bar * (1 + BAND) if self.at_most else self.figure >= self.bar * (1 - BAND)
        return "not met, within the 30 % band" if near else "not met"

    def __str__(self) -> str:
        return f"{self.target}: {self.figure:.2f} ({'at most' if self.at_most else 'at least'} {self.bar:g}) - {self.word}"


@dataclass
class Report:
    """The rows and verdicts of one benchmark file."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]] = field(default_factory=list)
    verdicts: list[Verdict] = field(default_factory=list)

    def row(self, *cells: object) -> None:
        """Adds a row, floats with two digits, and tells it on stderr, as a run takes minutes."""
        self.rows.append(tuple(f"{c:.2f}" if isinstance(c, float) else str(c) for c in cells))
        print(" ; ".join(self.rows[-1]), file=sys.stderr, flush=True)

    def at_most(self, target: str, figure: float, bar: float) -> None:
        """A target that is met by a figure not above the bar."""
        self.verdicts.append(Verdict(target, figure, bar, True))

    def at_least(self, target: str, figure: float, bar: float) -> None:
        """A target that is met by a figure not below the bar."""
        self.verdicts.append(Verdict(target, figure, bar, False))

    def show(self, as_json: bool) -> None:
        """Prints all of it: for people in Markdown, or as one JSON object."""
        where = machine()
        if as_json:
            verdicts = [asdict(v) | {"verdict": v.word} for v in self.verdicts]
            print(json.dumps({"title": self.title, "machine": where, "columns": self.columns, "rows": self.rows, "verdicts": verdicts}))
            return
        print(f"\n### {self.title}\n{where}\n")
        for line in (self.columns, ("---",) * len(self.columns), *self.rows):
            print("| " + " | ".join(line) + " |")
        print()
        for verdict in self.verdicts:
            print(f"- {verdict}")


def machine() -> str:
    """Where and when: processors, memory, load and date, and no name of the host."""
    model = next((line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), "")
    memory = int(Path("/proc/meminfo").read_text().split()[1]) // 1024 // 1024
    load = os.getloadavg()[0]
    day = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    return f"{os.cpu_count()} x {model}, {memory} GiB, Linux {platform.release().split('-')[0]}, load at the end {load:.1f}, {day}"


def arguments(about: str, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The options that every benchmark takes."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--quick", action="store_true", help="a smaller run, for minutes: says whether it works, not how good it is")
    parser.add_argument("--rounds", type=int, default=2, help="rounds, servers taking turns in each (2); the best of each server counts")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the servers end and the folders go with this program
    return parser.parse_args(argv)
