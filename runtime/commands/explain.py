"""`airlock runtime explain`: every profile with its rank or the rule that refused it and by how much, for this node or one that is described."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from artifact import profile
from artifact.errors import Invalid, NotFound, TooLarge
from artifact.manifest import MAX_MANIFEST_BYTES
from artifact.profile import ProfileSet
from runtime import console, hosts, start
from runtime.memory import gib
from runtime.node import Facts
from runtime.profiles import Selection, Verdict, check_expected, select
from runtime.settings import EXIT_CODES, Settings

TEXT = "show every profile: its rank, or the rule that refused it and by how much"
EXAMPLE = "--hardware h100x8 --profiles llama.profiles.json"


def main(argv: list[str]) -> int:
    """Entry point; returns the documented exit status."""
    parser = console.parser("explain", TEXT, EXAMPLE)
    parser.add_argument("--hardware", metavar="HOST|FILE", help="a described host: h100x8, l40sx2, gb10, cpu, … or a JSON file; default: this node")
    parser.add_argument("--profiles", type=Path, metavar="FILE", help="a profile document or a list of profiles in JSON, instead of a released model")
    return console.run(parser, argv, explain, named=False)


def explain(settings: Settings, args: argparse.Namespace) -> int:
    """`explain`: prints the table; 30 where no profile fits, 51 where it is not the expected one."""
    found, source = _profiles(settings, args.profiles)
    elsewhere = args.hardware is not None  # also an empty word, of a variable that is not set: it means no host, and not this node
    facts = described(args.hardware) if elsewhere else start.detect(settings, pinned=bool(settings.profile))
    # For another host nobody knows which engines are installed there: then only the hardware is judged.
    engines, absent = (None, ()) if elsewhere else start.engines_here(settings)
    selection = select(found.profiles, facts, start.wanted_of(settings, settings.profile, engines, absent))
    sys.stdout.write(as_json(selection, facts, source) if args.json else as_text(selection, facts, source))
    check_expected(selection, settings.expect_profile)
    return 0 if selection.selected else EXIT_CODES["no_profile"]


def _profiles(settings: Settings, path: Path | None) -> tuple[ProfileSet, str]:
    if path is None:
        if not settings.model:
            raise Invalid("neither a file nor a model is named", expected="--profiles FILE or --model NAME", do=f"airlock runtime explain {EXAMPLE}")
        return start.release(settings)[3].profiles, settings.name_ref
    return profile.read(_file(path)), path.name


def described(text: str) -> Facts:
    """The facts of a host's name or of the file that describes it; raises Invalid, NotFound, TooLarge."""
    if text.endswith(".json") or "/" in text:
        return hosts.parse(_file(Path(text)))
    return hosts.named(text)


def _file(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_MANIFEST_BYTES + 1)
    except OSError as error:
        raise NotFound(f"{path} cannot be read: {error.strerror}", expected="a JSON file") from error
    if len(raw) > MAX_MANIFEST_BYTES:
        raise TooLarge(f"{path} has more than {MAX_MANIFEST_BYTES} bytes", expected=f"at most {MAX_MANIFEST_BYTES}")
    return raw


def as_text(selection: Selection, facts: Facts, source: str) -> str:
    """The table for people: rank or rule, GiB needed of usable per GPU, name in both spellings, id, and why."""
    reasons = {p.id: reason for p, reason in selection.rejected}
    lines = [*start.system(facts), *(f"- {g.label}: {line}" for g in facts.gpus for line in (*g.faults, *g.notices))]
    lines += [f"MODEL PROFILES of {source}, {len(selection.verdicts)}", "rank  rule        GiB/GPU      profile"]
    for rank, verdict in enumerate(selection.verdicts, 1):
        p = verdict.profile
        names = p.description if p.short == p.description else f"{p.description} = {p.short}"
        chosen = verdict is selection.chosen
        why = f"SELECTED, {selection.standing}" if chosen else reasons.get(p.id, "")
        lines.append(f"{'-' if verdict.rule else rank:>4}  {verdict.rule or '-':<10}  {_numbers(verdict):<11}  {names}  [{p.id[:12]}]  {why}")
        lines += [f"{'':31}{note}" for note in (selection.details if chosen else verdict.notes)]
    return "\n".join([*lines, selection.line]) + "\n"


def _numbers(verdict: Verdict) -> str:
    if verdict.need is None:
        return "-"
    return f"{gib(verdict.need.total)}/{gib(verdict.budget)}" if verdict.budget else gib(verdict.need.total)


def as_json(selection: Selection, facts: Facts, source: str) -> str:
    """The same for scripts; bytes are whole numbers per GPU."""
    reasons = {p.id: reason for p, reason in selection.rejected}
    rows: list[dict[str, object]] = []
    for rank, verdict in enumerate(selection.verdicts, 1):
        p, need = verdict.profile, verdict.need
        row: dict[str, object] = {
            "rank": None if verdict.rule else rank,
            "profile_id": p.id,
            "names": sorted({p.description, p.short}),
            "tags": p.tags,
        }
        row |= {"rule": verdict.rule or None, "reason": reasons.get(p.id, ""), "notes": verdict.notes, "gpus": [g.uuid for g in verdict.gpus]}
        if need:
            row["memory"] = {
                "needed": need.total,
                "usable": int(verdict.budget),
                "short_by": verdict.short_by,
                "weights": need.weights,
                "kv_cache": need.kv,
                "overhead": need.overhead,
                "tokens": need.length,
                "sequences": need.sequences,
                "limited_to_tokens": verdict.length,
            }
        rows.append(row)
    system = {"cpu": facts.cpu, "simulated": facts.simulated, "driver": facts.driver, "cuda": facts.cuda, "gpus": [vars(g) for g in facts.gpus]}
    head = {"source": source, "selected": selection.selected.id if selection.selected else None, "standing": selection.standing, "why": selection.why}
    return json.dumps(head | {"profiles": rows, "system": system}, indent=2) + "\n"
