"""Which profile fits this node and why each other one does not: pure, no clock, no network, no GPU call.

The order is NIM 1.x's (nim-container.md 7.1), the memory test is engines.md 14.3; a CPU profile (`device: cpu`, our tag) is eligible only on a node
without any NVML library and ranks last. The choice must never depend on anything but its arguments.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from artifact.errors import Invalid, NotFound
from artifact.profile import Profile
from runtime.node import Facts, Gpu, describe
from runtime.settings import GPU_SHARE

GIB = 1 << 30
OVERHEAD = 2 * GIB  # activations, CUDA context and graphs (engines.md 14.1; an estimate, a setting of the method and no measurement)
MARGIN = 0.02  # kept below what is free when others use the GPU
ENGINE_RANK = {"tensorrt_llm": 0, "vllm": 1, "sglang": 2}
BITS = {"nvfp4": 4, "mxfp4": 4, "int4": 4, "fp8": 8, "int8": 8, "bf16": 16, "fp16": 16, "fp32": 32}
GOAL = {"latency": 0, "balanced": 1, "throughput": 2, "": 1}
SEED_LINE = "No profile found for the detected hardware"


@dataclass(frozen=True)
class Wanted:
    """What the operator asked for: a pinned id or description, LoRA, no memory gate, and the engines that can be started here (None: all)."""

    pin: str = ""
    lora: bool = False
    relax_memory: bool = False
    engines: frozenset[str] | None = None


@dataclass(frozen=True)
class Selection:
    """The choice with its GPUs and memory share, why it won, the eligible ones in order, and a reason for each other profile."""

    selected: Profile | None
    why: str
    gpus: tuple[Gpu, ...]
    share: float
    order: tuple[Profile, ...]
    rejected: tuple[tuple[Profile, str], ...]

    @property
    def line(self) -> str:
        """NIM's line: `Selected profile: <id> (<description>)`."""
        return f"Selected profile: {self.selected.id} ({self.selected.description})" if self.selected else SEED_LINE


@dataclass(frozen=True)
class _Fit:
    profile: Profile
    gpus: tuple[Gpu, ...] = ()
    share: float = GPU_SHARE
    reason: str = ""


def select(profiles: Sequence[Profile], facts: Facts, wanted: Wanted | None = None) -> Selection:
    """Filters and ranks; raises Invalid for a pin that names no profile or two, listing the valid values."""
    wanted = wanted or Wanted()
    named = pinned(profiles, wanted.pin) if wanted.pin else None
    lora = wanted.lora or bool(named and named.tags.get("feat_lora") == "true")
    fits = [_fit(p, facts, wanted, lora) for p in profiles]
    able = sorted((f for f in fits if not f.reason), key=lambda f: sort_key(f.profile))
    refused = [(f.profile, f.reason) for f in sorted((f for f in fits if f.reason), key=lambda f: sort_key(f.profile))]
    order = tuple(f.profile for f in able)
    if named:
        best = next((f for f in able if f.profile is named), None)
        lost = [(f.profile, f"not chosen: NIM_MODEL_PROFILE names {named.description}") for f in able if f.profile is not named]
        why = "NIM_MODEL_PROFILE names it"
    else:
        best = able[0] if able else None
        lost = [(f.profile, _outranked(f.profile, able[0].profile)) for f in able[1:]]
        why = f"first of {len(able)} compatible profile(s) of {len(profiles)}" if len(able) > 1 else f"the only compatible profile of {len(profiles)}"
    if best is None:
        return Selection(None, SEED_LINE, (), 0.0, order, tuple(lost + refused))
    where = f"GPU {', '.join(str(g.index) for g in best.gpus)} ({describe(best.gpus)})" if best.gpus else "the CPU (no NVIDIA library on this node)"
    return Selection(best.profile, f"{why}; on {where}{_memory_words(best, wanted)}", best.gpus, best.share, order, tuple(lost + refused))


def require(selection: Selection) -> Profile:
    """The selected profile; raises NotFound (reason no_profile) with every rejection in its text."""
    if selection.selected:
        return selection.selected
    reasons = "\n".join(f"  - {p.id} ({p.description}): {reason}" for p, reason in selection.rejected)
    raise NotFound(
        f"{SEED_LINE}\n{reasons}",
        expected="hardware that one of these profiles fits",
        do="use more or larger GPUs, a smaller or quantised model, or push a profile for this hardware",
        reason="no_profile",
    )


def sort_key(profile: Profile) -> tuple[object, ...]:
    """NIM 1.x's preference, lowest wins (nim-container.md 7.1), CPU profiles behind all others."""
    t = profile.tags
    optimized = "gpu" in t or "gpu_device" in t
    return (
        1 if t.get("device") == "cpu" else 0,
        0 if optimized else 1,
        ENGINE_RANK.get(t.get("llm_engine", ""), 9),
        BITS.get(t.get("precision", "").lower(), 99),
        GOAL.get(t.get("profile", "").lower(), 1),
        -(_count(t.get("tp", "1")) or 1),
        _count(t.get("pp", "1")) or 1,
        profile.id,
    )


_KEY_WORDS = (
    "a CPU profile ranks last",
    "built for any GPU, a profile for this GPU goes first",
    "engine {have}, which ranks behind {best}",
    "precision {have}, a lower one goes first ({best})",
    "optimised for {have}, {best} goes first",
    "tp {have}, more parallelism goes first ({best})",
    "pp {have}, less goes first ({best})",
    "equal in every rule; the lower id goes first",
)
_KEY_TAGS = ("device", "gpu", "llm_engine", "precision", "profile", "tp", "pp", "")


def _outranked(profile: Profile, best: Profile) -> str:
    pairs = zip(sort_key(profile), sort_key(best), strict=True)
    at = next((i for i, (a, b) in enumerate(pairs) if a != b), len(_KEY_WORDS) - 1)
    tag = _KEY_TAGS[at]
    words = _KEY_WORDS[at].format(have=profile.tags.get(tag, "none"), best=best.tags.get(tag, "none"))
    return f"compatible, but ranked behind {best.description}: {words}"


def pinned(profiles: Sequence[Profile], pin: str) -> Profile:
    """The one profile of that id or description (trtllm-… and tensorrt_llm-… are one); raises Invalid listing the valid values."""
    found = [p for p in profiles if p.id == pin] or [p for p in profiles if _spelling(p.description) == _spelling(pin)]
    valid = ", ".join(f"{p.id} ({p.description})" for p in profiles)
    if len(found) > 1:
        both = ", ".join(p.id for p in found)
        raise Invalid(
            f"NIM_MODEL_PROFILE is {pin[:200]!r}, which is the description of {len(found)} profiles: {both}",
            expected="one id",
            reason="profile_unknown",
        )
    if not found:
        raise Invalid(
            f"NIM_MODEL_PROFILE is {pin[:200]!r}, but no matching profile id or description is in the manifest",
            expected=f"one of: {valid}",
            do="set an id or a description exactly, or unset it for the automatic choice",
            reason="profile_unknown",
        )
    return found[0]


def _spelling(text: str) -> str:
    return re.sub(r"\A(?:trtllm|trt_llm|tensorrt-llm|tensorrtllm)-", "tensorrt_llm-", text.strip().lower())


def _fit(profile: Profile, facts: Facts, wanted: Wanted, lora: bool) -> _Fit:
    """One profile against the node: the GPUs it would use, or the sentence that refuses it."""
    t = profile.tags
    tp, pp = _count(t.get("tp", "1")), _count(t.get("pp", "1"))
    if not tp or not pp:
        return _Fit(profile, reason=f"its tags tp={t.get('tp', '1')!r} pp={t.get('pp', '1')!r} are not whole numbers from 1 to 4096")
    number = t.get("number_of_gpus")
    if number is not None and _count(number) != tp * pp:
        return _Fit(profile, reason=f"its tags contradict each other: number_of_gpus={number}, but tp x pp is {tp} x {pp} = {tp * pp}")
    reason = _hardware(profile, facts, tp * pp) or _features(profile, wanted, lora)
    if reason:
        return _Fit(profile, reason=reason)
    if t.get("device") == "cpu":
        return _Fit(profile)
    return _place(profile, facts, wanted, tp * pp)


def _features(profile: Profile, wanted: Wanted, lora: bool) -> str:
    t = profile.tags
    able = t.get("feat_lora", "false").lower() == "true"
    if lora and not able:
        return "it does not support LoRA, but LoRA is enabled (NIM_PEFT_SOURCE)"
    if able and not lora:
        return "it is for LoRA, and LoRA is not enabled (NIM_PEFT_SOURCE is not set)"
    engine = t.get("llm_engine", "")
    if wanted.engines is not None and engine not in wanted.engines:
        have = ", ".join(sorted(wanted.engines)) or "none"
        return f"its engine {engine or '(none stated)'} cannot be started here; engines of this runtime: {have}"
    return ""


def _hardware(profile: Profile, facts: Facts, need: int) -> str:
    t = profile.tags
    device = t.get("device", "gpu")
    if device not in ("cpu", "gpu"):
        return f"its tag device={device!r} is unknown; cpu and gpu are known"
    if device == "cpu":
        return "" if facts.cpu else f"it is for nodes without the NVIDIA library; this node has one and shows {len(facts.gpus)} GPU(s)"
    if facts.cpu:
        return f"it needs {need} GPU(s); this node has no NVIDIA library and so 0 GPUs"
    if len(facts.gpus) < need:
        hidden = f" ({facts.hidden})" if facts.hidden else ""
        return f"it needs {need} GPU(s) (tp x pp); {len(facts.gpus)} present{hidden}"
    return ""


def _place(profile: Profile, facts: Facts, wanted: Wanted, need: int) -> _Fit:
    kinds = {(g.name, g.device) for g in facts.gpus}
    if need > 1 and len(kinds) > 1:
        return _Fit(profile, reason=f"it spreads over {need} GPUs, which must be alike; this node mixes {describe(facts.gpus)}")
    whole = [g for g in facts.gpus if not g.mig]
    if len(whole) < need:
        return _Fit(profile, reason=f"it needs {need} whole GPU(s); {len(facts.gpus) - len(whole)} of {len(facts.gpus)} are split by MIG")
    t = profile.tags
    matching = [g for g in whole if _identity(t, g)]
    if len(matching) < need:
        built = " ".join(filter(None, (t.get("gpu"), f"[{t['gpu_device']}]" if "gpu_device" in t else "")))
        have = ", ".join(sorted({f"{g.name} [{g.device}]" for g in facts.gpus}))
        return _Fit(profile, reason=f"it is built for {built}; this node has {have}")
    return _memory(profile, matching, wanted, need)


def _identity(tags: dict[str, str], gpu: Gpu) -> bool:
    if "gpu_device" in tags:
        return tags["gpu_device"].lower() == gpu.device.lower()
    if "gpu" in tags:
        return re.sub(r"[ -]+", "_", tags["gpu"].strip().lower()) in families(gpu.name)
    return True


def families(name: str) -> frozenset[str]:
    """The family words a product name answers to: `NVIDIA H100 NVL` is h100_nvl and not h100, `NVIDIA A100-SXM4-80GB` is a100 and longer forms."""
    parts = [p for p in re.split(r"[ -]+", name.lower()) if p and p not in ("nvidia", "tesla", "geforce", "quadro")]
    out = {"_".join(parts[:n]) for n in range(1, len(parts) + 1)}
    if "nvl" in parts and parts[0] != "nvl":
        out.discard(parts[0])
    return frozenset(out)


def _memory(profile: Profile, gpus: list[Gpu], wanted: Wanted, need: int) -> _Fit:
    """The test of engines.md 14.3 without the KV cache: weights over the GPUs plus 2 GiB, against 0.92 of the total and then of what is free."""
    if wanted.relax_memory or not profile.weights_bytes:
        return _Fit(profile, tuple(gpus[:need]))
    demand = profile.weights_bytes / need + OVERHEAD
    known = [g for g in gpus if g.total]  # unified memory: NVML tells no total, so there is nothing to test against
    if not known:
        return _Fit(profile, tuple(gpus[:need]))
    large = [g for g in known if demand <= GPU_SHARE * g.total]
    if len(large) < need:
        top = max(g.total for g in known)
        return _Fit(
            profile,
            reason=f"it does not fit: {_gib(demand)} GiB per GPU needed "
            f"({_gib(profile.weights_bytes)} GiB of weights over {need} GPU(s), plus 2 GiB), "
            f"{_gib(GPU_SHARE * top)} GiB usable ({GPU_SHARE:g} of {_gib(top)} GiB); short by {_gib(demand - GPU_SHARE * top)} GiB",
        )
    shares = [(g, GPU_SHARE if g.free >= GPU_SHARE * g.total else g.free / g.total - MARGIN) for g in large]
    roomy = [(g, s) for g, s in shares if demand <= s * g.total]
    if len(roomy) < need:
        top = max(g.free for g in large)
        return _Fit(
            profile,
            reason=f"compatible, but not runnable due to low free GPU memory: {_gib(demand)} GiB per GPU needed, at most {_gib(top)} GiB free; "
            "stop what else uses the GPU, or set NIM_RELAX_MEM_CONSTRAINTS=1",
        )
    used = roomy[:need]
    return _Fit(profile, tuple(g for g, _ in used), int(min(s for _, s in used) * 1000) / 1000)


def _memory_words(fit: _Fit, wanted: Wanted) -> str:
    if not fit.gpus or not fit.profile.weights_bytes:
        return ""
    if wanted.relax_memory:
        return "; memory not checked (NIM_RELAX_MEM_CONSTRAINTS)"
    demand = fit.profile.weights_bytes / len(fit.gpus) + OVERHEAD
    total = min(g.total for g in fit.gpus)
    return f"; {_gib(demand)} GiB per GPU needed, {_gib(fit.share * total)} GiB usable" if total else "; the GPU tells no memory size"


def _count(text: str) -> int:
    return int(text) if text.isascii() and text.isdigit() and len(text) < 5 and 0 < int(text) <= 4096 else 0


def _gib(value: float) -> str:
    return f"{value / GIB:.1f}"
