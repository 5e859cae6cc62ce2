"""Which profile fits this node and why each other one does not: pure, no clock, no network, no GPU call.

Filters are in runtime/filters.py; here are the one sort key (NIM 1.x's preference, nim-container.md 7.1), the pin, the expectation, and the words.
The choice must never depend on anything but its arguments.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from artifact.errors import Conflict, Invalid, NotFound
from artifact.profile import Profile
from runtime import precision
from runtime.filters import FREE, MEMORY, Node, Verdict, Wanted, count, judge, meant_for, tag_is
from runtime.memory import gib
from runtime.node import Facts, Gpu, describe
from runtime.tuning import parse_selector

ENGINE_RANK = {"tensorrt_llm": 0, "vllm": 1, "sglang": 2}
GOAL = {"latency": 0, "balanced": 1, "throughput": 2, "": 1}
SEED_LINE = "No profile found for the detected hardware"
# What a NIM 1.x says of the same, word for word: people search for it.
NIM_LINE = (
    "Could not find a profile that is currently runnable with the detected hardware. "
    "Please check the system information below and make sure you have enough free GPUs."
)


@dataclass(frozen=True)
class Selection:
    """The choice, in what sense it is the right one, and a verdict on every profile: those that fit in their order, then the others."""

    chosen: Verdict | None
    standing: str
    details: tuple[str, ...]
    verdicts: tuple[Verdict, ...]
    rejected: tuple[tuple[Profile, str], ...]

    @property
    def selected(self) -> Profile | None:
        """The chosen profile."""
        return self.chosen.profile if self.chosen else None

    @property
    def why(self) -> str:
        """Standing and details in one line."""
        return f"{self.standing}: {'; '.join(self.details)}" if self.chosen else SEED_LINE

    @property
    def gpus(self) -> tuple[Gpu, ...]:
        """The GPUs that it runs on; none on a CPU node."""
        return self.chosen.gpus if self.chosen else ()

    @property
    def share(self) -> float:
        """The share of a GPU's memory that it may use."""
        return self.chosen.share if self.chosen else 0.0

    @property
    def length(self) -> int:
        """The context in tokens that the engine must be limited to, 0: as set."""
        return self.chosen.length if self.chosen else 0

    @property
    def notes(self) -> tuple[str, ...]:
        """What to warn of: a short KV cache, a precision without hardware for it, no NVLink."""
        return self.chosen.notes if self.chosen else ()

    @property
    def order(self) -> tuple[Profile, ...]:
        """The profiles that fit, best first."""
        return tuple(v.profile for v in self.verdicts if not v.rule)

    @property
    def line(self) -> str:
        """NIM's line: `Selected profile: <id> (<description>)`."""
        return f"Selected profile: {self.selected.id} ({self.selected.description})" if self.selected else SEED_LINE


def select(profiles: Sequence[Profile], facts: Facts, wanted: Wanted | None = None) -> Selection:
    """Filters and ranks; raises Invalid for a pin that names no profile or two, or a selector that no profile has, listing the valid values."""
    wanted = wanted or Wanted()
    named = pinned(profiles, wanted.pin) if wanted.pin else None
    lora = wanted.lora or bool(named and named.tags.get("feat_lora") == "true")
    node = Node(facts, wanted)
    verdicts = sorted((judge(p, node, lora) for p in profiles), key=lambda v: (bool(v.rule), sort_key(v)))
    if wanted.selector and profiles and all(v.rule == "selector" for v in verdicts):
        raise _unmatched(profiles, wanted)
    able = [v for v in verdicts if not v.rule]
    refused = [(v.profile, v.reason) for v in verdicts if v.rule]
    if named:
        best = next((v for v in able if v.profile is named), None)
        lost = [(v.profile, f"not chosen: NIM_MODEL_PROFILE names {named.description}") for v in able if v.profile is not named]
        why = "NIM_MODEL_PROFILE names it"
    else:
        best = able[0] if able else None
        lost = [(v.profile, _outranked(v, able[0])) for v in able[1:]]
        why = f"first of {len(able)} compatible profile(s) of {len(profiles)}" if len(able) > 1 else f"the only compatible profile of {len(profiles)}"
    if best is None:
        return Selection(None, "", (), tuple(verdicts), tuple(lost + refused))
    standing = "pinned" if named else _standing(best, verdicts, facts)
    return Selection(best, standing, (why, *_place_words(best)), tuple(verdicts), tuple(lost + refused))


def require(selection: Selection) -> Profile:
    """The selected profile; raises NotFound (reason no_profile) with every rejection in its text."""
    if selection.selected:
        return selection.selected
    reasons = "\n".join(f"  - {p.id} ({p.description}): {reason}" for p, reason in selection.rejected)
    raise NotFound(
        f"{SEED_LINE}\n{NIM_LINE}\n{reasons}",
        expected="hardware that one of these profiles fits",
        do="use more or larger GPUs, a smaller or quantised model, or push a profile for this hardware",
        reason="no_profile",
    )


def check_expected(selection: Selection, expect: str) -> None:
    """The selected profile is the expected one (an id, a name in either spelling, or KEY=VALUE,…); raises Conflict (reason profile_unexpected)."""
    chosen = selection.selected
    if not expect or chosen is None or _means(expect, chosen):
        return
    others = {p.id: reason for p, reason in selection.rejected}
    meant = [v.profile for v in selection.verdicts if _means(expect, v.profile)]
    told = "; ".join(f"{p.id} ({p.description}): {others[p.id]}" for p in meant[:3] if p.id in others)
    raise Conflict(
        f"the selected profile is {chosen.id} ({chosen.description}), and AIRLOCK_EXPECT_PROFILE is {expect[:200]!r}. "
        + (f"What was expected was not chosen: {told}" if told else "No profile of the manifest is what was expected"),
        expected=f"one of: {valid_values([v.profile for v in selection.verdicts])}" if not meant else meant[0].description,
        do="mend what keeps the expected profile from being chosen, pin it with NIM_MODEL_PROFILE, or correct AIRLOCK_EXPECT_PROFILE",
        reason="profile_unexpected",
    )


def _means(text: str, profile: Profile) -> bool:
    if "=" in text:
        return all(tag_is(profile.tags, k, v) for k, v in parse_selector(text, "AIRLOCK_EXPECT_PROFILE"))
    return profile.id == text or profile.answers_to(text)


def sort_key(verdict: Verdict) -> tuple[object, ...]:
    """NIM 1.x's preference, lowest wins (nim-container.md 7.1), behind it CPU profiles and those whose context must be shortened."""
    t = verdict.profile.tags
    return (
        1 if t.get("device") == "cpu" else 0,
        1 if verdict.length else 0,
        0 if "gpu" in t or "gpu_device" in t else 1,
        ENGINE_RANK.get(t.get("llm_engine", ""), 9),
        precision.rank(t.get("precision", "")),
        GOAL.get(t.get("profile", "").lower(), 1),
        -(count(t.get("tp", "1")) or 1),
        count(t.get("pp", "1")) or 1,
        verdict.profile.id,
    )


_KEY_WORDS = (
    "a CPU profile ranks last",
    "its context must be shortened to {length} tokens, one that holds what is wanted goes first",
    "built for any GPU, a profile for this GPU goes first",
    "engine {have}, which ranks behind {best}",
    "precision {have}, a lower one goes first ({best})",
    "optimised for {have}, {best} goes first",
    "tp {have}, more parallelism goes first ({best})",
    "pp {have}, less goes first ({best})",
    "equal in every rule; the lower id goes first",
)
_KEY_TAGS = ("device", "", "gpu", "llm_engine", "precision", "profile", "tp", "pp", "")


def _outranked(verdict: Verdict, best: Verdict) -> str:
    pairs = zip(sort_key(verdict), sort_key(best), strict=True)
    at = next((i for i, (a, b) in enumerate(pairs) if a != b), len(_KEY_WORDS) - 1)
    tag = _KEY_TAGS[at]
    have, other = verdict.profile.tags.get(tag, "none"), best.profile.tags.get(tag, "none")
    return f"compatible, but ranked behind {best.profile.description}: {_KEY_WORDS[at].format(have=have, best=other, length=verdict.length)}"


def _standing(best: Verdict, verdicts: Sequence[Verdict], facts: Facts) -> str:
    """`expected`, or `fallback` with what keeps the better one away: no TensorRT-LLM profile for this GPU, or one that another rule refuses."""
    if facts.cpu or not best.gpus:
        return "expected"
    built = [v for v in verdicts if v.profile.tags.get("llm_engine") == "tensorrt_llm" and v.rule not in ("lora", "selector", "tags")]
    if best.profile.tags.get("llm_engine") != "tensorrt_llm" and built:
        near = [v for v in built if meant_for(v.profile.tags, best.gpus[0])]
        if not near:
            return f"fallback: no tensorrt_llm profile for {_family(best.gpus)} in this manifest"
        first = min(near, key=sort_key)
        if first.rule:
            return f"fallback: {first.profile.description} is refused ({first.reason})"
        if first.length and not best.length:
            return f"fallback: {first.profile.description} would hold {first.length} of the {first.need.length if first.need else 0} tokens wanted"
    kept = [v for v in verdicts if v.rule in (MEMORY, FREE) and sort_key(v) < sort_key(best)]
    if kept:
        first = min(kept, key=sort_key)
        return f"fallback: {first.profile.description} is short by {gib(first.short_by)} GiB per GPU"
    return "expected"


def _family(gpus: Sequence[Gpu]) -> str:
    words = gpus[0].name.replace("-", " ").split() if gpus else []
    parts = [w for w in words if w.upper() not in ("NVIDIA", "TESLA", "GEFORCE", "QUADRO")]
    return " ".join(parts[:2] if "NVL" in parts[1:2] else parts[:1]) or "this GPU"


def pinned(profiles: Sequence[Profile], pin: str) -> Profile:
    """The one profile of that id or name (trtllm-… and tensorrt_llm-… are one); raises Invalid listing the valid values."""
    found = [p for p in profiles if p.id == pin] or [p for p in profiles if p.answers_to(pin)]
    if len(found) > 1:
        both = ", ".join(p.id for p in found)
        raise Invalid(
            f"NIM_MODEL_PROFILE is {pin[:200]!r}, which is the description of {len(found)} profiles: {both}",
            expected="one id",
            reason="profile_unknown",
        )
    if not found:
        raise Invalid(
            f"Environment variable NIM_MODEL_PROFILE is set to {pin[:200]}, but no matching profile_id or profile description is found in manifest",
            expected=f"one of: {valid_values(profiles)}",
            do="set an id or a description exactly, or unset it for the automatic choice",
            reason="profile_unknown",
        )
    return found[0]


def valid_values(profiles: Sequence[Profile]) -> str:
    """Every id with its description, for an error that lists them."""
    return ", ".join(f"{p.id} ({p.description})" for p in profiles)


def _unmatched(profiles: Sequence[Profile], wanted: Wanted) -> Invalid:
    pairs = ",".join(f"{k}={v}" for k, v in wanted.selector)
    return Invalid(
        f"Could not match a profile in manifest: no profile has NIM_TAGS_SELECTOR {pairs[:200]!r}",
        expected=f"tags of one of: {valid_values(profiles)}",
        do="correct or unset NIM_TAGS_SELECTOR",
        reason="profile_unknown",
    )


def _place_words(verdict: Verdict) -> tuple[str, ...]:
    """Where it runs, its memory per GPU in one sum, and what to warn of."""
    if not verdict.gpus:
        return ("on the CPU (no NVIDIA library on this node)",)
    where = ", ".join(f"{g.index}{':' + g.slice if g.slice else ''}" for g in verdict.gpus)
    words = [f"on GPU {where} ({describe(verdict.gpus)})"]
    if verdict.need and verdict.budget:
        words.append(f"{gib(verdict.need.total)} GiB per GPU needed ({verdict.need.words()}), {gib(verdict.budget)} GiB usable")
    return (*words, *verdict.notes)


__all__ = [
    "FREE",
    "SEED_LINE",
    "Selection",
    "Verdict",
    "Wanted",
    "check_expected",
    "pinned",
    "require",
    "select",
    "sort_key",
    "valid_values",
]
