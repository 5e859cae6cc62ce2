"""`airlock profile make`: the profiles of a model directory with memory facts, and an estimate for named GPUs; asks no registry, runs nothing."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from artifact import model_dir, profile
from artifact.errors import Invalid
from artifact.model_dir import ModelDir
from artifact.profile import ENGINES, block
from runtime import hosts
from runtime.filters import Verdict, Wanted
from runtime.memory import gib
from runtime.profiles import select

GPUS = ("l40s", "a100-40", "a100-80", "h100", "h100-nvl", "b200")
SIZES = (1, 2, 4, 8)
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
    found = model_dir.read(args.dir)
    document: dict[str, object] = {"profiles": items(found, args.engine, tuple(args.tp or ()), args.max_model_len, cpu=args.cpu)}
    rows = estimates(document, tuple(args.gpu or GPUS))
    if args.json:
        document |= {"warnings": found.warnings, "estimates": rows}
    else:
        sys.stderr.write(table(args.dir, found, rows))
    sys.stdout.write(json.dumps(document, indent=2) + "\n")
    return 0


def items(found: ModelDir, engine: str, sizes: tuple[int, ...], length: int, *, cpu: bool) -> list[dict[str, object]]:
    """The author's list of profiles: one for each number of GPUs, and one for a CPU where it is asked for; raises Invalid."""
    config = found.config
    if not config.precision:
        raise Invalid(
            "config.json tells no dtype and no quantisation", expected="dtype (torch_dtype), or quantization_config", do="add torch_dtype to it"
        )
    wrong = [n for n in sizes if n not in range(1, 65) or (config.heads and config.heads % n)]
    if wrong or not 0 <= length < 1 << 31:
        raise Invalid(
            f"--tp {wrong[0] if wrong else ''} or --max-model-len {length} cannot be", expected=f"a divisor of {config.heads} attention heads"
        )
    every = sizes or tuple(n for n in SIZES if n == 1 or (config.heads and config.heads % n == 0 and not (config.embeds and n > 1)))
    common: dict[str, object] = {"memory": block(config.memory)}
    if config.quantization:
        common["quantization"] = block(config.quantization)
    options = ({"task": "embed"} if config.embeds else {}) | ({"max_model_len": str(length)} if length else {})
    if options:
        common["options"] = options
    tags = {"llm_engine": engine, "precision": config.precision, "pp": "1"} | ({"trtllm_buildable": "true"} if engine == "tensorrt_llm" else {})
    out = [{"tags": {**tags, "tp": str(n)}, **common} for n in every]
    if cpu and config.quantization:
        raise Invalid(f"{config.precision} is not run on a CPU here", expected="a checkpoint of 16 or 32 bit for --cpu", do="leave --cpu out")
    if cpu:
        out.append({"tags": {"llm_engine": "vllm", "precision": config.precision, "tp": "1", "device": "cpu"}, **common})
    return out


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
