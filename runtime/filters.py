"""The rules that a profile must pass on a node, one function each, in the order in which they are asked: pure, no clock, no network, no GPU call.

A rule answers with the sentence that refuses the profile, or with nothing. The rules are NIM 1.x's (nim-container.md 7.2); memory is engines.md 14.3.
A CPU profile (`device: cpu`, our tag) is eligible only on a node without any NVML library.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from artifact.profile import Profile
from runtime import precision
from runtime.memory import HEADROOM, NO_FACTS, Need, gib, need
from runtime.node import Facts, Gpu, describe
from runtime.settings import GPU_SHARE

MARGIN = 0.02  # kept below what is free when others use the GPU
LEAST_CONTEXT = 2048  # tokens: a context that nobody set is not shortened further than this to make a profile fit
IDENTITY = ("gpu_device", "gpu", "compute_capability", "product_name_regex")
# What of product_name_regex is understood: a prefix of a product name and what must not follow. Any other pattern could run for ever.
_PRODUCT = re.compile(r"\^?([A-Za-z0-9 _.-]*?)(?:\(\?!([A-Za-z0-9 _-]*)\))?(?:\.\*)?\$?\Z")


@dataclass(frozen=True)
class Wanted:
    """What the operator asked for: a pinned id or name, LoRA, no memory gate, the engines that can be started here (None: all), tags that must be
    so, the context length in tokens (0: the profile's or the model's), sequences to plan for, and the share of a GPU's memory to use."""

    pin: str = ""
    lora: bool = False
    relax_memory: bool = False
    engines: frozenset[str] | None = None
    selector: tuple[tuple[str, str], ...] = ()
    max_model_len: int = 0
    sequences: int = 1
    share: float = GPU_SHARE
    absent: tuple[tuple[str, str], ...] = ()  # engines that cannot be started here, and why


@dataclass(frozen=True)
class Verdict:
    """One profile on one node: the rule and sentence that refuse it, or its GPUs, share of their memory, need, and what to say of it.

    `length` is the context in tokens that it must be limited to, 0 where what is wanted fits; `short_by` the missing bytes per GPU.
    """

    profile: Profile
    rule: str = ""
    reason: str = ""
    gpus: tuple[Gpu, ...] = ()
    share: float = GPU_SHARE
    need: Need | None = None
    length: int = 0
    short_by: int = 0
    notes: tuple[str, ...] = ()

    @property
    def budget(self) -> float:
        """Bytes usable on the smallest of its GPUs, 0 where the memory is not told."""
        return self.share * min((g.total for g in self.gpus), default=0)


@dataclass(frozen=True)
class Node:
    """The facts with what all profiles ask of them, worked out once."""

    facts: Facts
    wanted: Wanted

    @cached_property
    def whole(self) -> tuple[Gpu, ...]:
        """The GPUs that are neither slices nor split."""
        return tuple(g for g in self.facts.gpus if not g.mig and not g.parent)

    @cached_property
    def slices(self) -> tuple[Gpu, ...]:
        """The MIG slices."""
        return tuple(g for g in self.facts.gpus if g.parent)

    @cached_property
    def mixed(self) -> bool:
        """Whether the GPUs differ in product."""
        return len({(g.name, g.device) for g in self.facts.gpus}) > 1

    @cached_property
    def words(self) -> dict[str, frozenset[str]]:
        """The family words of each product name."""
        return {g.name: families(g.name) for g in self.facts.gpus}


@dataclass(frozen=True)
class Case:
    """One profile that is judged: its parallelism as numbers (0: not a number), and the node."""

    profile: Profile
    node: Node
    tp: int
    pp: int
    lora: bool

    @property
    def gpus(self) -> int:
        """How many GPUs it takes."""
        return self.tp * self.pp


def judge(profile: Profile, node: Node, lora: bool) -> Verdict:
    """The verdict on one profile: the first rule that refuses it, else the GPUs that it would use."""
    case = Case(profile, node, count(profile.tags.get("tp", "1")), count(profile.tags.get("pp", "1")), lora)
    for name, rule in RULES:
        reason = rule(case)
        if reason:
            return Verdict(profile, name, reason)
    if profile.tags.get("device") == "cpu":
        return Verdict(profile)
    return _place(case)


def _tags(case: Case) -> str:
    t = case.profile.tags
    if not case.gpus:
        return f"its tags tp={t.get('tp', '1')!r} pp={t.get('pp', '1')!r} are not whole numbers from 1 to 4096"
    number = t.get("number_of_gpus")
    if number is not None and count(number) != case.gpus:
        return f"its tags contradict each other: number_of_gpus={number}, but tp x pp is {case.tp} x {case.pp} = {case.gpus}"
    device = t.get("device", "gpu")
    return "" if device in ("cpu", "gpu") else f"its tag device={device!r} is unknown; cpu and gpu are known"


def _selector(case: Case) -> str:
    t = case.profile.tags
    other = [(k, v) for k, v in case.node.wanted.selector if not tag_is(t, k, v)]
    return f"NIM_TAGS_SELECTOR asks for {other[0][0]}={other[0][1]}; it has {t.get(other[0][0], 'none')}" if other else ""


def _device(case: Case) -> str:
    facts = case.node.facts
    if case.profile.tags.get("device") == "cpu":
        return "" if facts.cpu else f"it is for nodes without the NVIDIA library; this node has one and shows {len(facts.gpus)} GPU(s)"
    return f"it needs {case.gpus} GPU(s); this node has no NVIDIA library and so 0 GPUs" if facts.cpu else ""


def _count(case: Case) -> str:
    facts = case.node.facts
    if case.profile.tags.get("device") == "cpu" or len(facts.gpus) >= case.gpus:
        return ""
    hidden = f" ({facts.hidden})" if facts.hidden else ""
    return f"it needs {case.gpus} GPU(s) (tp x pp); {len(facts.gpus)} present{hidden}"


def _lora(case: Case) -> str:
    able = case.profile.tags.get("feat_lora", "false").lower() == "true"
    if case.lora and not able:
        return "it does not support LoRA, but LoRA is enabled (NIM_PEFT_SOURCE)"
    return "it is for LoRA, and LoRA is not enabled (NIM_PEFT_SOURCE is not set)" if able and not case.lora else ""


def _engine(case: Case) -> str:
    engine, able = case.profile.tags.get("llm_engine", ""), case.node.wanted.engines
    if able is None or engine in able:
        return ""
    why = dict(case.node.wanted.absent).get(engine)
    cannot = f"its engine {engine or '(none stated)'} cannot be started here"
    return f"{cannot}: {why}" if why else f"{cannot}; engines of this runtime: {', '.join(sorted(able)) or 'none'}"


def _alike(case: Case) -> str:
    if case.gpus < 2 or not case.node.mixed:
        return ""
    return f"it spreads over {case.gpus} GPUs, which must be alike; this node mixes {describe(case.node.facts.gpus)}"


def _mig(case: Case) -> str:
    node = case.node
    if case.profile.tags.get("device") == "cpu" or len(node.whole) >= case.gpus or (case.gpus == 1 and node.slices):
        return ""
    every = len(node.facts.gpus)
    return f"it needs {case.gpus} whole GPU(s); {every - len(node.whole)} of {every} are split by MIG, and no process spreads over slices"


def _identity(case: Case) -> str:
    t, gpus = case.profile.tags, case.node.facts.gpus
    if t.get("device") == "cpu" or not gpus or not any(tag in t for tag in IDENTITY) or _matching(case):
        return ""
    if "compute_capability" in t or "product_name_regex" in t:
        have = ", ".join(sorted({f"{g.name} ({precision.dotted(g.capability)})" for g in gpus}))
        return f"it is built for {t.get('compute_capability') or t.get('product_name_regex') or 'no product'}; this node has {have}"
    built = " ".join(filter(None, (t.get("gpu"), f"[{t['gpu_device']}]" if "gpu_device" in t else "")))
    have = ", ".join(sorted({f"{g.name} [{g.device}]" for g in gpus}))
    return f"it is built for {'a whole ' if not case.node.whole else ''}{built}; this node has {have}"


def _capability(case: Case) -> str:
    if case.profile.tags.get("device") == "cpu":
        return ""
    t = case.profile.tags
    found = [precision.refusal(t.get("precision", ""), t.get("llm_engine", ""), g.capability) for g in _matching(case)]
    return "" if found.count("") >= case.gpus else next(f for f in found if f)


RULES: tuple[tuple[str, Callable[[Case], str]], ...] = (
    ("tags", _tags),
    ("selector", _selector),
    ("device", _device),
    ("identity", _identity),
    ("gpus", _count),
    ("lora", _lora),
    ("engine", _engine),
    ("alike", _alike),
    ("mig", _mig),
    ("capability", _capability),
)
MEMORY, FREE = "memory", "free"  # the last two rules, which also place the profile


def _matching(case: Case) -> list[Gpu]:
    """The devices that the profile is for: slices only for one GPU and for no profile that was built for a product, whose engine takes all of it."""
    t, node = case.profile.tags, case.node
    if any(tag in t for tag in IDENTITY):
        return [g for g in node.whole if meant_for(t, g, node.words[g.name])]
    return [*node.whole, *node.slices] if case.gpus == 1 else list(node.whole)


def meant_for(tags: dict[str, str], gpu: Gpu, words: frozenset[str] | None = None) -> bool:
    """Whether a profile with these tags was made for this GPU's product, or for any; `words` are the families of its name where they are at hand."""
    if "gpu_device" in tags:
        return tags["gpu_device"].lower().removesuffix(":10de") == gpu.device.lower().removesuffix(":10de")
    if "gpu" in tags:
        return compact(tags["gpu"]) in (families(gpu.name) if words is None else words)
    if "compute_capability" in tags:
        return precision.dotted(gpu.capability) == tags["compute_capability"].strip()
    return product(tags["product_name_regex"], gpu.name) if "product_name_regex" in tags else True


def product(pattern: str, name: str) -> bool:
    """Whether a `product_name_regex` means a product name; patterns beyond a prefix with one negative look-ahead mean none."""
    match = _PRODUCT.match(pattern) if len(pattern) < 200 else None
    if match is None:
        return False
    prefix, banned = match[1], match[2]
    plain = re.sub(r"[ _-]", "-", name)
    wanted = re.sub(r"[ _-]", "-", prefix)
    return plain.startswith(wanted) and not (banned and plain[len(wanted) :].startswith(re.sub(r"[ _-]", "-", banned)))


def compact(text: str) -> str:
    """A product's or tag's name without separators, in lower case."""
    return re.sub(r"[ _-]+", "", text.strip().lower())


def families(name: str) -> frozenset[str]:
    """The compact family words of a product name: `NVIDIA H100 NVL` is h100nvl and not h100, `NVIDIA A100-SXM4-80GB` is a100 and longer."""
    parts = [p for p in re.split(r"[ -]+", name.lower()) if p and p not in ("nvidia", "tesla", "geforce", "quadro")]
    out = {"".join(parts[:n]) for n in range(1, len(parts) + 1)}
    if "nvl" in parts and parts[0] != "nvl":
        out.discard(parts[0])
    return frozenset(out)


def _place(case: Case) -> Verdict:
    """The memory test: what is wanted against the share of the total, then of what is free; a context that nobody set may be shortened for it."""
    profile, wanted, number = case.profile, case.node.wanted, case.gpus
    t = profile.tags
    fit = [g for g in _matching(case) if not precision.refusal(t.get("precision", ""), t.get("llm_engine", ""), g.capability)]
    notes = [n for n in (precision.remark(t.get("precision", ""), fit[0].capability), _apart(fit, number)) if n]
    asked = need(profile, case.tp, case.pp, length=wanted.max_model_len, sequences=wanted.sequences)
    known = [g for g in fit if g.total]
    if asked is None or wanted.relax_memory or len(known) < number:
        why = "memory is not checked (NIM_RELAX_MEM_CONSTRAINTS)" if wanted.relax_memory else "the GPU tells no memory size" if asked else ""
        return Verdict(profile, gpus=_together(fit, number), share=wanted.share, need=asked, notes=(*notes, why) if why else tuple(notes))
    fixed = bool(wanted.max_model_len or profile.options.get("max_model_len") or wanted.sequences > 1)
    demand = asked.total if fixed or not asked.counted else asked.least + asked.kv_of(min(asked.length, LEAST_CONTEXT))
    large = [g for g in known if demand <= wanted.share * g.total]
    if len(large) < number:
        return _too_small(profile, wanted, asked, demand, max(known, key=lambda g: g.total))
    shares = {g: wanted.share if g.free >= wanted.share * g.total else max(0.0, g.free / g.total - MARGIN) for g in large}
    roomy = [g for g in large if demand <= shares[g] * g.total]
    if len(roomy) < number:
        top = max(large, key=lambda g: g.free)
        words = (
            f"compatible, but not runnable due to low free GPU memory: {gib(demand)} GiB per GPU needed, at most {gib(top.free)} GiB free; "
            "stop what else uses the GPU, or set NIM_RELAX_MEM_CONSTRAINTS=1"
        )
        return Verdict(profile, FREE, words, need=asked, short_by=int(demand - shares[top] * top.total))
    used = _together(roomy, number)
    share = int(min(shares[g] for g in used) * 1000) / 1000
    budget = share * min(g.total for g in used)
    return Verdict(profile, gpus=used, share=share, need=asked, length=_limited(asked, budget), notes=(*notes, *_headroom(asked, budget)))


def _limited(asked: Need, budget: float) -> int:
    return asked.longest(budget) if asked.counted and asked.total > budget else 0


def _headroom(asked: Need, budget: float) -> list[str]:
    """The warnings of a KV cache that is short, or that nothing is known of."""
    if not asked.counted:
        return [NO_FACTS]
    left = budget - asked.least
    if asked.total > budget:
        longest = asked.longest(budget)
        return [
            f"KV headroom: {gib(left)} GiB per GPU are left for the KV cache, {asked.sequences} x {asked.length} tokens need {gib(asked.kv)} GiB; "
            f"the context is limited to {longest} tokens"
        ]
    return [f"KV headroom: only {gib(left)} GiB per GPU ({left / budget:.0%}) are left for the KV cache"] if left < HEADROOM * budget else []


def _too_small(profile: Profile, wanted: Wanted, asked: Need, demand: float, top: Gpu) -> Verdict:
    """The refusal with its sum: per GPU what is needed, what is usable, and by how much it is short."""
    usable = wanted.share * top.total
    short = demand - usable
    longest = asked.longest(usable) if asked.counted else 0
    way = f"; with NIM_MAX_MODEL_LEN={longest} it fits" if longest and asked.least <= usable else ""
    parts = asked.words() if demand == asked.total else replace(asked, length=LEAST_CONTEXT).words()
    words = (
        f"it does not fit: {gib(demand)} GiB per GPU needed ({parts}), "
        f"{gib(usable)} GiB usable ({wanted.share:g} of {gib(top.total)} GiB); short by {gib(short)} GiB{way}"
    )
    return Verdict(profile, MEMORY, words, need=asked, short_by=int(short))


def _together(gpus: Sequence[Gpu], number: int) -> tuple[Gpu, ...]:
    """So many of the GPUs, those that NVLink joins first; else the first ones."""
    for first in gpus if number > 1 else ():
        group = [first]
        for other in gpus:
            if len(group) < number and other is not first and all(other.index in g.peers for g in group):
                group.append(other)
        if len(group) == number:
            return tuple(sorted(group, key=lambda g: gpus.index(g)))
    return tuple(gpus[:number])


def _apart(gpus: Sequence[Gpu], number: int) -> str:
    """What to say where GPUs that have NVLink would work together without it."""
    used = _together(gpus, number)
    joined = all(b.index in a.peers for a in used for b in used if a is not b)
    return "" if joined or not any(g.links for g in used) else "no NVLink joins these GPUs all with each other: expect less throughput"


def tag_is(tags: dict[str, str], name: str, value: str) -> bool:
    """Whether a tag has a value, in any of its spellings; tp and pp are 1 where they are absent."""
    have = tags.get(name, "1" if name in ("tp", "pp") else "false" if name == "feat_lora" else "")
    same = precision.named if name == "precision" else str.lower
    return same(have.strip()) == same(value.strip())


def count(text: str) -> int:
    """A tag's whole number from 1 to 4096, else 0."""
    return int(text) if text.isascii() and text.isdigit() and len(text) < 5 and 0 < int(text) <= 4096 else 0


__all__ = ["FREE", "MEMORY", "RULES", "Node", "Verdict", "Wanted", "count", "families", "judge", "meant_for", "product", "tag_is"]
