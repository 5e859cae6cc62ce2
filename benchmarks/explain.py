"""What choosing costs: `explain` over 500 profiles on several hosts, selection and table, without and with reading the document.

Profiles are of every engine, precision, size and product that the tables know, with memory facts, so that every rule is asked.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from _table import Report, arguments

from artifact import profile
from runtime import hosts
from runtime.commands.explain import as_text
from runtime.profiles import select

BAR_MS = 50.0
MEMORY = {"weights_bytes": 141_107_412_992, "layers": 80, "kv_heads": 8, "head_dim": 128, "context": 131_072}
GPUS = ("", "H100", "H100_NVL", "A100", "L40S", "B200")


def document(count: int) -> bytes:
    """A profile document of so many profiles."""
    every = itertools.product(("tensorrt_llm", "vllm", "sglang"), ("nvfp4", "fp8", "int4", "bf16"), (1, 2, 4, 8), ("latency", "throughput"), GPUS)
    items: list[dict[str, object]] = []
    for engine, precision, tp, goal, gpu in itertools.islice(every, count):
        tags = {"llm_engine": engine, "precision": precision, "tp": str(tp), "profile": goal} | ({"gpu": gpu} if gpu else {})
        items.append({"tags": tags, "memory": MEMORY})
    return profile.build("bench/model", "sha256:" + "1" * 64, items, 0)


def best_ms(work: Callable[[], object], rounds: int) -> float:
    """The best of the rounds, in milliseconds on the wall; five calls in each."""
    found = []
    for _ in range(rounds * 5):
        began = time.perf_counter()
        work()
        found.append((time.perf_counter() - began) * 1e3)
    return min(found)


def main() -> None:
    """Measures, prints."""
    args = arguments(__doc__.splitlines()[0])
    raw = document(500)
    found = profile.parse(raw).profiles
    report = Report("Explain, 500 profiles", ("host", "selection, ms", "selection and table, ms"))
    worst = 0.0
    for name in ("h100x8", "h100-nvlx8", "a100-40", "l40sx2", "gb10", "cpu"):
        facts = hosts.named(name)
        chosen = best_ms(lambda f=facts: select(found, f), args.rounds)  # type: ignore[misc]
        whole = best_ms(lambda f=facts: as_text(select(found, f), f, "bench"), args.rounds)  # type: ignore[misc]
        worst = max(worst, whole)
        report.row(name, chosen, whole)
    report.row("reading the document of 500", "", best_ms(lambda: profile.parse(raw), args.rounds))
    report.at_most("explain over 500 profiles, the slowest host, ms", worst, BAR_MS)
    report.show(args.json)


if __name__ == "__main__":
    main()
