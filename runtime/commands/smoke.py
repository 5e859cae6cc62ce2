"""`airlock runtime smoke`: whether what runs is fast enough, at rising concurrency; against a target, a recorded run and the profile's promise."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp

from artifact.errors import AirlockError, Invalid
from artifact.transport import origin
from runtime import console, load, plot, slo
from runtime.settings import EXIT_CODES
from runtime.slo import Level

TEXT = "measure time to first token, time between tokens and tokens per second of a running server, and compare them"
EXAMPLE = """example: airlock runtime smoke --slo ttft_p95_ms=500,tok_s=1000 --levels 1,4,16 --record smoke.json --svg smoke.svg
The target is judged at --at streams (default: the profile's own concurrency, which is measured too, else the last level).
Tokens per second are those of all streams.
Exit: 0 reached; 52 below --slo, or a request failed; 53 worse than --baseline or than the profile's `expected`; 9 nobody answers."""
GIB, MOST = 1 << 30, 4096  # streams
BOUNDS: dict[str, tuple[float, float]] = {
    "each": (1, 1_000_000),
    "max_tokens": (2, 1_000_000_000),
    "prompt_words": (1, 1_000_000),
    "tolerance": (0.001, 10),
    "timeout_s": (1, 86_400),
}


def main(argv: list[str]) -> int:
    """Entry point; returns 0, 52 (below the target), 53 (a regression) or an error's status."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="airlock runtime smoke", description=TEXT, epilog=EXAMPLE, formatter_class=form)
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="base URL of the server (default %(default)s)")
    parser.add_argument("--model", default="", help="default: the first that the server names")
    parser.add_argument("--slo", metavar="NAME=NUMBER,…", help="targets: " + ", ".join(slo.TARGETS))
    parser.add_argument("--levels", default="1,2,4,8", help="streams at once, rising (default %(default)s)")
    parser.add_argument("--at", type=int, default=0, metavar="N", help="the level at which the target is judged")
    parser.add_argument("--each", type=int, default=4, metavar="N", help="requests of each stream (default %(default)s)")
    parser.add_argument("--max-tokens", type=int, default=128, help="tokens of each answer (default %(default)s)")
    parser.add_argument("--prompt-words", type=int, default=64, help="words of each prompt (default %(default)s)")
    parser.add_argument("--stop-early", action="store_true", help="let answers end where the model ends them (for servers without ignore_eos)")
    parser.add_argument("--key-env", default="", metavar="NAME", help="variable with the key of a server that asks for one (default: none is sent)")
    parser.add_argument("--timeout-s", type=float, default=300.0, help="seconds for one request (default %(default)s)")
    parser.add_argument("--baseline", type=Path, metavar="FILE", help="a recorded run to compare with")
    parser.add_argument("--tolerance", type=float, default=0.2, help="what counts as worse than the baseline (default a fifth)")
    parser.add_argument("--record", type=Path, metavar="FILE", help="write this run as JSON")
    parser.add_argument("--svg", type=Path, metavar="FILE", help="draw this run")
    parser.add_argument("--json", action="store_true", help="machine-readable output and errors")
    args = parser.parse_args(argv)
    try:
        return _smoke(args)
    except AirlockError as error:
        return console.failed(error, args.json)


def _smoke(args: argparse.Namespace) -> int:
    levels, targets = _levels(args.levels), {} if args.slo is None else slo.parse_targets(args.slo)
    for name, (least, most) in BOUNDS.items():
        if not least <= (value := getattr(args, name)) <= most:
            raise Invalid(f"--{name.replace('_', '-')} {str(value)[:40]} makes no sense", expected=f"a number from {least} to {most}")
    origin(args.url)
    before = slo.parse(_read(args.baseline)) if args.baseline else []
    for path in filter(None, (args.record, args.svg)):
        if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):  # told before the minutes that a run takes
            raise Invalid(f"{path} cannot be written", expected="a file in a directory that is there")
    more: dict[str, object] = {} if args.stop_early else {"ignore_eos": True}
    if args.key_env and not os.environ.get(args.key_env):
        raise Invalid(f"--key-env {args.key_env[:80]}: the variable is not set", expected="the name of a variable that holds a key")
    # By name only: a key of this site goes to no server that --url happens to name. From the environment, as a command line is seen by all.
    key = os.environ.get(args.key_env, "") if args.key_env else ""
    target = load.Target(args.url.rstrip("/").removesuffix("/v1"), args.model, args.max_tokens, args.prompt_words, more, key, args.timeout_s)
    if args.at and args.at not in levels:
        raise Invalid(f"--at {args.at} is no level of this run", expected="one of " + args.levels, do=f"add {args.at} to --levels")
    found, facts = asyncio.run(_measure(target, levels, args.each, quiet=args.json))
    expected = _expected(facts.get("expected"))
    at = args.at or int(expected.get("concurrency", 0)) or levels[-1]
    judged = next(x for x in found if x.concurrency == at)
    below = slo.missed(judged, targets)
    worse = slo.regressions(found, before, args.tolerance) if before else []
    promised = slo.missed(judged, {k: expected[k] for k in ("ttft_p95_ms", "tok_s") if k in expected}) if expected else []
    said = {"at": at, "targets": targets, "missed": below, "regressions": worse, "below_expected": promised}
    doc = slo.document(found, {**facts, **said})
    for path, text in ((args.record, json.dumps(doc, indent=1) + "\n"), (args.svg, plot.svg(found, before, targets, str(facts["model"])))):
        if path:
            path.write_text(text, encoding="utf-8")
    if args.json:
        print(json.dumps(doc))
    else:
        _tell(found, facts, expected, said, bool(before))
    return EXIT_CODES["slo_missed"] if below else EXIT_CODES["regression"] if worse or promised else 0


def _expected(told: object) -> dict[str, Any]:
    """What a server says that its profile promises; what is no figure or no text of it is left out."""
    found: dict[str, Any] = told if isinstance(told, dict) else {}
    most = {"ttft_p95_ms": 1e12, "tok_s": 1e12, "concurrency": MOST}
    figures = {k: float(v) for k, top in most.items() if isinstance(v := found.get(k), int | float) and not isinstance(v, bool) and 0 < v <= top}
    return figures | {k: v for k in ("hardware", "source") if isinstance(v := found.get(k), str) and v.isprintable()}


def _levels(text: str) -> list[int]:
    parts = text.split(",")
    if not all(re.fullmatch(r"\s*[0-9]{1,9}\s*", p) and 0 < int(p) <= MOST for p in parts) or len(parts) > 32:
        raise Invalid(f"--levels {text[:60]!r}", expected=f"at most 32 numbers of streams from 1 to {MOST}, such as 1,4,16")
    return sorted({int(p) for p in parts})


def _read(path: Path) -> dict[str, object]:
    try:
        doc = json.loads(path.read_bytes())
    except (OSError, *load.NO_JSON) as error:
        raise Invalid(f"the baseline {path} cannot be read: {error}", expected="a file that --record wrote") from error
    return doc if isinstance(doc, dict) else {}


async def _measure(target: load.Target, levels: list[int], each: int, *, quiet: bool) -> tuple[list[Level], dict[str, object]]:
    found, errors, used = list[Level](), list[str](), 0
    async with load.open_session(target) as session:
        if not target.model:
            target = replace(target, model=await load.model_of(session, target))
        facts = await _facts(session, target)
        # What a profile promises, it promises at a concurrency: that one is measured too.
        levels = sorted({*levels, int(_expected(facts.get("expected")).get("concurrency", levels[-1]))})
        await load.one(session, target, 0)  # what is only compiled or filled at the first request is nobody's latency
        for streams in levels:
            samples, seconds = await load.run(session, target, streams, each, 1 + used)
            used += streams * each
            found.append(slo.level(streams, samples, seconds))
            errors += [s.error for s in samples if s.error]
            if not quiet:
                sys.stderr.write(f"{streams} streams: {found[-1].tok_s:.1f} tokens/s, first token p95 {found[-1].ttft_p95_ms:.0f} ms\n")
        facts["gpu_memory"] = await load.memory(session, target)
    facts["errors"] = errors[:5]
    return found, facts


async def _facts(session: aiohttp.ClientSession, target: load.Target) -> dict[str, object]:
    """What was measured: model, and (of a runtime of ours) profile, digest and the profile's own promise."""
    facts: dict[str, object] = {"url": target.base, "model": target.model, "max_tokens": target.max_tokens, "prompt_words": target.prompt_words}
    try:
        told = json.loads(await load.page(session, target, "/v1/metadata"))
    except load.NO_JSON:
        return facts
    if not isinstance(told, dict):
        return facts
    own = told.get("airlock")
    own = own if isinstance(own, dict) else {}
    return facts | {
        "profile": told.get("profile_id"),
        "model_digest": own.get("model_digest"),
        "expected": own.get("expected"),
        "simulated": own.get("simulated"),
    }


def _tell(found: list[Level], facts: dict[str, object], expected: dict[str, object], said: dict[str, object], compared: bool) -> None:
    print(f"{facts['model']} at {facts['url']}, answers of {facts['max_tokens']} tokens")
    print("streams requests failed  ttft p50      p95   p99 ms  itl p50   p95 ms  tokens/s  a stream")
    for x in found:
        cells = f"{x.concurrency:7} {x.requests:8} {x.failed:6} {x.ttft_p50_ms:9.1f} {x.ttft_p95_ms:8.1f} {x.ttft_p99_ms:8.1f}"
        print(f"{cells} {x.itl_p50_ms:8.2f} {x.itl_p95_ms:8.2f} {x.tok_s:9.1f} {x.stream_tok_s:9.1f}")
    memory = facts["gpu_memory"]
    for uuid, kinds in memory.items() if isinstance(memory, dict) else ():
        print(f"GPU {uuid}: " + ", ".join(f"{kind} {kinds[kind] / GIB:.2f} GiB" for kind in ("idle", "peak", "total") if kind in kinds))
    if not memory:
        print("GPU memory: not told by this server's metrics (no GPU, or no runtime of ours)")
    if expected:
        shown = [f"{k} {v:g}" if isinstance(v, float) else f"{k} {v}" for k, v in expected.items() if k != "source"]
        print(f"expected by the profile: {', '.join(shown)} (source: {expected.get('source')})")
    else:
        print("expected: none recorded in this profile")
    if not compared:
        print("baseline: none given")
    for word, lines in (("BELOW TARGET", said["missed"]), ("REGRESSION", said["regressions"]), ("BELOW EXPECTED", said["below_expected"])):
        for line in lines if isinstance(lines, list) else ():
            print(f"{word}: {line}")
    for error in facts["errors"] if isinstance(facts["errors"], list) else ():
        print(f"failed: {error}")
    if said["targets"] and not said["missed"]:
        print(f"target reached at {said['at']} streams")
