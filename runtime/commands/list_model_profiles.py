"""`airlock runtime list-model-profiles`: what fits this node, what does not and why."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from artifact.errors import Invalid, Unavailable
from artifact.profile import Profile
from runtime import console, start, unsigned
from runtime.profiles import FREE, Wanted, select
from runtime.settings import Settings
from runtime.start import Choice

TEXT = "show which profiles fit this node, and why others do not"


def main(argv: list[str]) -> int:
    """Entry point; returns the documented exit status."""
    parser = console.parser("list-model-profiles", TEXT)
    parser.add_argument("-m", "--manifest-file", type=Path, metavar="FILE", help="profiles of this manifest; no registry is asked, no key needed")
    parser.add_argument("--output-format", choices=("text", "json"), default="text", help="json: as --json")
    parser.add_argument("--output-file", type=Path, metavar="FILE", help="write there and not to the terminal")
    return console.run(parser, argv, list_profiles, named=False)


def list_profiles(settings: Settings, args: argparse.Namespace) -> int:
    """`list-model-profiles`: what fits, what does not and why, as NIM prints it or as JSON."""
    if not (args.manifest_file or settings.model):
        raise Invalid("no model is named", expected="NAME[:VERSION]", do="say --model or --manifest-file, or set AIRLOCK_MODEL")
    choice = unsigned.look(args.manifest_file, settings) if args.manifest_file else start.choose(settings, settings.profile)
    text = _as_json(choice, settings) if args.json or args.output_format == "json" else _as_text(choice, settings)
    if args.output_file:
        _write(args.output_file, text)
    else:
        sys.stdout.write(text)
    return 0


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise Unavailable(f"{path} cannot be written: {error.strerror}", expected="a file in a directory that we may write") from error


def _as_text(choice: Choice, settings: Settings) -> str:
    selection = choice.selection
    lines = [*start.system(choice.facts), "MODEL PROFILES", "- Compatible with system and runnable:" + ("" if selection.order else " <None>")]
    lines += [f"  - {p.id} ({p.description})" + ("   <- selected" if p is selection.selected else "") for p in selection.order]
    # As a NIM, which keeps the other kind apart: what would fit if LoRA were switched the other way.
    other = select([v.profile for v in selection.verdicts if v.rule == "lora"], choice.facts, Wanted(lora=not settings.lora)).order
    lines += [f"  - {'Without' if settings.lora else 'With'} LoRA support:", *(f"    - {p.id} ({p.description})" for p in other)] if other else []
    low = [v for v in selection.verdicts if v.rule == FREE]
    lines += ["- Compatible with system but low memory:", *(f"  - {v.profile.id} ({v.profile.description}): {v.reason}" for v in low)] if low else []
    shown = {p.id for p in (*selection.order, *other, *(v.profile for v in low))}
    refused = [(p, r) for p, r in selection.rejected if p.id not in shown]
    lines.append("- Incompatible with system:" + ("" if refused else " <None>"))
    lines += [f"  - {p.id} ({p.description}): {reason}" for p, reason in refused]
    return "\n".join(lines) + "\n"


def _as_json(choice: Choice, settings: Settings) -> str:
    selection, facts = choice.selection, choice.facts
    reasons = {p.id: reason for p, reason in selection.rejected}

    def shown(profile: Profile) -> dict[str, object]:
        out: dict[str, object] = {
            "profile_id": profile.id,
            "description": profile.description,
            "tags": profile.tags,
            "model_digest": profile.model.digest,
        }
        return out | ({"reason": reasons[profile.id]} if profile.id in reasons else {})

    doc = {
        "model": settings.name_ref if settings.model else choice.released.profiles.model,
        "profile_manifest": choice.released.digest,
        "selected": selection.selected.id if selection.selected else None,
        "why": selection.why,
        "compatible": [shown(p) for p in selection.order],
        "incompatible": [shown(p) for p, _ in selection.rejected if p not in selection.order],
        "system": {"cpu": facts.cpu, "simulated": facts.simulated, "driver": facts.driver, "gpus": [vars(g) for g in facts.gpus]},
    }
    return json.dumps(doc, indent=2) + "\n"
