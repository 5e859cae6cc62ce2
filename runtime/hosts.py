"""Hosts by description: what `explain` judges profiles for where the hardware is not here; data and its checks, no I/O.

Memory is what NVML tells of such cards where a log of one was at hand, else the data sheet's; every described host is idle and marked simulated.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, fields, replace

from artifact.errors import Invalid
from artifact.manifest import parse_json
from runtime.node import Facts, Gpu

MIB = 1 << 20
IN_USE = 600 * MIB  # of an idle GPU, what the driver keeps
RESERVE = 8 << 30  # of unified memory, what is left to the host
MAX_GPUS = 64


@dataclass(frozen=True)
class Card:
    """One product: name, `gpu_device`, compute capability, MiB of memory, NVLinks, and how many of them a bridge joins (0: all of one host)."""

    name: str
    device: str
    capability: tuple[int, int]
    mib: int
    links: int = 0
    bridged: int = 0
    unified: bool = False
    slices: int = 0
    slice_mib: int = 0
    slice_name: str = ""


CARDS: dict[str, Card] = {
    "t4": Card("Tesla T4", "1eb8:10de", (7, 5), 15360),
    "a10g": Card("NVIDIA A10G", "2237:10de", (8, 6), 23028),
    "l4": Card("NVIDIA L4", "27b8:10de", (8, 9), 23034),
    "l40s": Card("NVIDIA L40S", "26b9:10de", (8, 9), 46068),
    "a100-40": Card("NVIDIA A100-SXM4-40GB", "20b0:10de", (8, 0), 40960, 12),
    "a100-80": Card("NVIDIA A100-SXM4-80GB", "20b2:10de", (8, 0), 81920, 12),
    "h100": Card("NVIDIA H100 80GB HBM3", "2330:10de", (9, 0), 81559, 18),
    "h100-pcie": Card("NVIDIA H100 PCIe", "2331:10de", (9, 0), 81559),
    "h100-nvl": Card("NVIDIA H100 NVL", "2321:10de", (9, 0), 95830, 12, bridged=2),
    "h100-mig": Card("NVIDIA H100 80GB HBM3", "2330:10de", (9, 0), 81559, 18, slices=2, slice_mib=40448, slice_name="3g.40gb"),
    "h200": Card("NVIDIA H200", "2335:10de", (9, 0), 143771, 18),
    "b200": Card("NVIDIA B200", "2901:10de", (10, 0), 183359, 18),
    "gb10": Card("NVIDIA GB10", "2e12:10de", (12, 1), 122502, unified=True),
    "rtx-6000-ada": Card("NVIDIA RTX 6000 Ada Generation", "26b1:10de", (8, 9), 49140),
    "rtx-pro-6000": Card("NVIDIA RTX PRO 6000 Blackwell Server Edition", "2bb5:10de", (12, 0), 97887),
    "rtx-5090": Card("NVIDIA GeForce RTX 5090", "2b85:10de", (12, 0), 32607),
}
KEYS = {field.name for field in fields(Gpu)} | {"count"}
_HOST = re.compile(r"([a-z0-9-]+?)(?:x([0-9]{1,2}))?\Z")


def named(text: str) -> Facts:
    """The facts of `h100x8`, `l40s`, `l40sx1,l4x1`, or `cpu`; raises Invalid listing the cards."""
    name = text.strip().lower().replace("_", "-")  # as in a profile's tags: H100_NVL
    if name == "cpu":
        return Facts(cpu=True, simulated=True)
    gpus: list[Gpu] = []
    for part in name.split(","):
        match = _HOST.match(part.strip())
        card = CARDS.get(match[1]) if match else None
        number = int(match[2] or 1) if match else 0
        if card is None or not 0 < number <= MAX_GPUS - len(gpus):
            raise Invalid(
                f"no host is known as {text[:60]!r}",
                expected=f"cpu, or CARDxN such as h100x8 with at most {MAX_GPUS} GPUs in all, of: {', '.join(CARDS)}",
                do="take one of these, or describe it in a JSON file, whose name ends in .json or holds a /",
            )
        for _ in range(number):
            gpus += _gpus(card, len(gpus), len({g.index for g in gpus}))
    return Facts(False, _joined(tuple(gpus)), "as described", "as described", simulated=True)


def _gpus(card: Card, at: int, index: int) -> list[Gpu]:
    uuid, bus = f"GPU-00000000-0000-0000-0000-{index:012d}", f"00000000:{0x10 + index:02X}:00.0"
    total = card.mib * MIB
    free = total - (RESERVE if card.unified else IN_USE)
    notice = (f"unified memory: the host's {card.mib / 1024:.1f} GiB are used, {RESERVE >> 30} GiB of them left to the host",) if card.unified else ()
    board = Gpu(index, uuid, card.name, card.device, card.capability, total, free, bus=bus, unified=card.unified, links=card.links, notices=notice)
    if not card.slices:
        return [board]
    size = card.slice_mib * MIB
    return [
        Gpu(
            index,
            f"MIG-{at + n:08d}",
            f"{card.name} MIG {card.slice_name}",
            card.device,
            card.capability,
            size,
            size,
            bus=bus,
            parent=uuid,
            slice=f"{n + 1}/0",
        )
        for n in range(card.slices)
    ]


def _joined(gpus: tuple[Gpu, ...]) -> tuple[Gpu, ...]:
    """The GPUs with the NVLink peers that a usual host gives them: cards joined by bridges in groups, others all of one kind."""
    groups = {c.name: c.bridged for c in CARDS.values() if c.links}

    def peers(gpu: Gpu) -> tuple[int, ...]:
        size = groups.get(gpu.name, 0)
        alike = [g.index for g in gpus if g.name == gpu.name and g is not gpu and gpu.links]
        return tuple(i for i in alike if not size or i // size == gpu.index // size)

    return tuple(replace(g, peers=peers(g)) for g in gpus)


def parse(raw: bytes) -> Facts:
    """The facts of a described host: {"gpus": [{"name", "device"?, "capability"?: [9, 0], "total", "free"?, "count"?}], "driver"?, "cuda"?}, bytes.

    `{"cpu": true}` is a node without GPUs; what `explain --json` prints as `system` is taken as it is. Raises Invalid, TooLarge.
    """
    doc = parse_json(raw, "the description of the host", 1 << 20)
    system = doc.get("system")
    if isinstance(system, dict):
        doc = dict(system)
    if doc.get("cpu") is True:
        return Facts(cpu=True, simulated=True)
    items = doc.get("gpus")
    if not isinstance(items, list) or not all(isinstance(i, dict) for i in items):
        raise Invalid("the description of the host names no GPUs", expected='{"gpus": [{"name": "NVIDIA L40S", "total": 48305799168, "count": 2}]}')
    gpus: list[Gpu] = []
    for item in items:
        number = _number(item, "count", 1)
        if not 0 < number <= MAX_GPUS - len(gpus):
            raise Invalid(f"the description of the host has more than {MAX_GPUS} GPUs, or none", expected=f"a count from 1 to {MAX_GPUS}")
        for _ in range(number):
            gpus.append(_described(item, len(gpus)))
    return Facts(False, tuple(gpus), _word(doc, "driver", "as described"), _word(doc, "cuda", "as described"), simulated=True)


def _described(item: dict[str, object], index: int) -> Gpu:
    """One GPU; a misspelt or absent size would mean that its memory is not judged."""
    if unknown := sorted(item.keys() - KEYS):
        raise Invalid(f"GPU {index} in the description of the host has {unknown[0][:40]!r}", expected=f"of: {', '.join(sorted(KEYS))}")
    if lacking := [key for key in ("name", "total") if key not in item]:
        raise Invalid(f"GPU {index} in the description of the host has no {lacking[0]}", expected="name, and total in bytes (0: not told)")
    capability = item.get("capability", [0, 0])
    if not isinstance(capability, list) or len(capability) != 2 or not all(type(n) is int and 0 <= n < 100 for n in capability):
        raise Invalid(f"capability of GPU {index} is not two numbers", expected="such as [9, 0]")
    total = _number(item, "total", 0)
    peers = item.get("peers", [])
    return Gpu(
        _number(item, "index", index),
        _word(item, "uuid", f"GPU-00000000-0000-0000-0000-{index:012d}"),
        _word(item, "name", "unknown GPU"),
        _word(item, "device", ""),
        (capability[0], capability[1]),
        total,
        min(total, _number(item, "free", max(0, total - IN_USE))),
        mig=item.get("mig") is True,
        bus=_word(item, "bus", ""),
        parent=_word(item, "parent", ""),
        slice=_word(item, "slice", ""),
        unified=item.get("unified") is True,
        links=_number(item, "links", 0),
        peers=tuple(p for p in peers if type(p) is int) if isinstance(peers, list) else (),
    )


def _number(item: dict[str, object], key: str, default: int) -> int:
    value = item.get(key, default)
    if type(value) is not int or not 0 <= value < 1 << 53:
        raise Invalid(f"{key} in the description of the host is {str(value)[:40]!r}", expected="a whole number, not negative")
    return value


def _word(item: dict[str, object], key: str, default: str) -> str:
    value = item.get(key, default)
    if not isinstance(value, str) or len(value) > 200 or not value.isprintable():
        raise Invalid(f"{key} in the description of the host is no plain text", expected="at most 200 characters")
    return value
