"""`airlock profile make`: the profiles of a model directory with memory facts, and an estimate for named GPUs; asks no registry, runs nothing."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from artifact import model_dir, profile
from artifact.errors import Invalid
from artifact.model_dir import ModelDir
from artifact.profile import ENGINES
from runtime import hosts
from runtime.derive import items
from runtime.filters import Verdict, Wanted
from runtime.memory import gib
from runtime.profiles import select

GPUS = ("l40s", "a100-40", "a100-80", "h100", "h100-nvl", "b200")
EXAMPLE = """\
example:
  airlock profile make ./llama --gpu h100 --gpu l40s > llama.profiles.json
  airlock model push ./llama acme/llama:1 --profiles llama.profiles.json

The table of estimates is for people and goes to stderr; stdout is what model push, a plan of mirror sync and airlock runtime explain take.
exit codes: 0 made, 2 usage, 3 no model or shard there, 6 a file of it is refused, 11 a limit"""


def main(argv: list[str]) -> int:
    """`airlock profile make DIR`; raises what artifact.errors lists, as exit statuses."""
    parser = argparse.ArgumentParser(
        prog="airlock profile make", description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("dir", type=Path, metavar="DIR", help="directory with config.json and safetensors files")
    parser.add_argument("--engine", default="vllm", choices=ENGINES, help="the engine that runs it (vllm)")
    parser.add_argument("--gpu", action="append", metavar="NAME", help=f"estimate for these ({', '.join(hosts.CARDS)}; default {', '.join(GPUS)})")
    parser.add_argument("--tp", action="append", type=int, metavar="N", help="GPUs that share one copy (1, 2, 4, 8, as the attention heads allow)")
    parser.add_argument("--max-model-len", type=int, default=0, metavar="TOKENS", help="longest context (the model's)")
    parser.add_argument("--cpu", action="store_true", help="a profile for nodes without GPUs too")
    parser.add_argument("--json", action="store_true", help="warnings and estimates beside the profiles, and no table")
    args = parser.parse_args(argv)
    gpus = tuple(args.gpu or GPUS)
    if unknown := [g for g in gpus if g.lower() not in hosts.CARDS]:
        raise Invalid(f"--gpu {unknown[0][:40]!r} is no GPU known here", expected=", ".join(hosts.CARDS), do="name one GPU; --tp says how many")
    found = model_dir.read(args.dir)
    document: dict[str, object] = {"profiles": items(found, args.engine, tuple(args.tp or ()), args.max_model_len, cpu=args.cpu)}
    rows = estimates(document, gpus)
    if args.json:
        document |= {"warnings": found.warnings, "estimates": rows}
    else:
        sys.stderr.write(table(args.dir, found, rows))
    sys.stdout.write(json.dumps(document, indent=2) + "\n")
    return 0


def estimates(document: dict[str, object], gpus: tuple[str, ...]) -> list[dict[str, object]]:
    """For each named GPU and profile: bytes needed and usable per GPU, tokens of context, and what keeps it from running."""
    made = profile.read(json.dumps(document).encode()).profiles
    rows: list[dict[str, object]] = []
    for name in gpus:
        for one in made:
            if one.tags.get("device") == "cpu":
                continue
            verdict = select([one], hosts.named(f"{name}x{one.tags['tp']}"), Wanted()).verdicts[0]
            rows.append(_row(name, verdict))
    return rows


def _row(gpu: str, verdict: Verdict) -> dict[str, object]:
    need = verdict.need
    row: dict[str, object] = {"gpu": gpu, "profile": verdict.profile.description, "fits": not verdict.rule, "reason": verdict.reason}
    if need:
        row |= {"needed": need.total, "weights": need.weights, "kv_cache": need.kv, "usable": int(verdict.budget), "short_by": verdict.short_by}
        row |= {"tokens": verdict.length or need.length, "limited": bool(verdict.length)}
    return row | {"notes": list(verdict.notes)}


def table(top: Path, found: ModelDir, rows: list[dict[str, object]]) -> str:
    """What was read of the directory, and the estimates, for people."""
    config = found.config
    lines = [f"{top}: {config.architecture or 'a model'}, {config.precision}, {gib(config.memory.weights_bytes)} GiB in {len(found.files)} file(s)"]
    if config.quantization:
        q = config.quantization
        kept = (
            f"; {len(q.excluded)} module(s) stay as they were: {', '.join(q.excluded[:5])}{', …' if len(q.excluded) > 5 else ''}"
            if q.excluded
            else ""
        )
        lines.append(f"quantised by {q.method}, {q.bits} bits{f', groups of {q.group_size}' if q.group_size else ''}{kept}")
    lines += [f"warning: {w}" for w in found.warnings]
    lines.append("gpu           profile               GiB/GPU needed of usable   context")
    for row in rows:
        needed, usable = float(str(row.get("needed", 0))), float(str(row.get("usable", 0)))
        sums = f"{gib(needed)} of {gib(usable)}" if row["fits"] else str(row["reason"])
        context = f"{'at most ' if row['limited'] else ''}{row['tokens']} tokens" if row["fits"] and row.get("tokens") else ""
        lines.append(f"{row['gpu']:<13} {row['profile']:<21} {sums:<26} {context}".rstrip())
    return "\n".join(lines) + "\n"
