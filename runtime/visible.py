"""Which GPUs CUDA_VISIBLE_DEVICES, NVIDIA_VISIBLE_DEVICES and CUDA_DEVICE_ORDER leave, in which order: pure (CUDA programming guide, environment
variables; NVIDIA container toolkit, MIG user guide).

NVML ignores all three, so that what an engine would see is worked out here.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from artifact.errors import Invalid
from runtime.node import Gpu

ORDERS = ("FASTEST_FIRST", "PCI_BUS_ID")
_OLD_MIG = re.compile(r"MIG-(GPU-[0-9a-f-]+)/(\d+)/(\d+)\Z")


def narrow(gpus: tuple[Gpu, ...], visible_cuda: str | None, visible_nvidia: str | None, order: str | None = None) -> tuple[Gpu, ...]:
    """The devices that the variables leave, in the order CUDA_VISIBLE_DEVICES gives; raises Invalid for an entry that names none.

    `gpus` are whole and split GPUs and slices as NVML tells them. A split GPU is no device itself: what names it means its slices.
    """
    if order and order.strip() not in ORDERS:
        raise Invalid(f"CUDA_DEVICE_ORDER is {order[:40]!r}", expected=" or ".join(ORDERS), do="correct or unset CUDA_DEVICE_ORDER", reason="gpu")
    boards = [g for g in gpus if not g.parent]
    left: Sequence[Gpu] = gpus
    text = (visible_nvidia or "").strip()
    if text == "none":
        return ()
    # `void` is what the container toolkit sets when it injected the devices itself (CDI). Fewer devices than entries also means that
    # the toolkit has applied the list: the indices in it are the host's and no longer ours.
    if text not in ("", "all", "void"):
        entries = _entries(text)
        if len(_devices(gpus)) > len(entries):
            left = [g for e in entries for g in _find(gpus, boards, e, "NVIDIA_VISIBLE_DEVICES")]
    if visible_cuda is not None:
        entries = _entries(visible_cuda)
        if entries in ([], ["-1"], ["NoDevFiles"]):
            return ()
        parents = {g.parent for g in left}
        ranked = fastest_first([b for b in boards if b in left or b.uuid in parents], order)
        left = [g for e in entries for g in _find(tuple(left), ranked, e, "CUDA_VISIBLE_DEVICES")]
    return _devices(tuple(dict.fromkeys(left)))


def fastest_first(gpus: Sequence[Gpu], order: str | None) -> list[Gpu]:
    """The GPUs in the order in which CUDA counts them: by bus, or without CUDA_DEVICE_ORDER=PCI_BUS_ID the fastest (cores x clock) first."""
    return list(gpus) if (order or "").strip() == "PCI_BUS_ID" else sorted(gpus, key=lambda g: -g.speed)


def _devices(gpus: Sequence[Gpu]) -> tuple[Gpu, ...]:
    """Without the split GPUs whose slices are there: only the slices can be computed on."""
    parents = {g.parent for g in gpus if g.parent}
    return tuple(g for g in gpus if g.uuid not in parents)


def _entries(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _find(gpus: tuple[Gpu, ...], boards: Sequence[Gpu], entry: str, variable: str) -> list[Gpu]:
    """What one entry names: an index, INDEX:SLICE, GPU-UUID (or its beginning), MIG-UUID, or MIG-GPU-UUID/GI/CI as older drivers write it."""
    found: list[Gpu] = []
    number, colon, nth = entry.partition(":")
    old = _OLD_MIG.match(entry)
    if _is_index(number) and int(number) < len(boards):
        board = boards[int(number)]
        slices = [g for g in gpus if g.parent == board.uuid]
        chosen = slices[int(nth) : int(nth) + 1] if _is_index(nth) else []
        found = chosen if colon else slices or [board]
    elif old:
        found = [g for g in gpus if g.parent == old[1] and g.slice == f"{old[2]}/{old[3]}"]
    elif entry.startswith(("GPU-", "MIG-")):
        named = [g for g in gpus if g.uuid.startswith(entry)]
        found = ([g for g in gpus if g.parent == named[0].uuid] or named) if len(named) == 1 else []
    if not found:
        have = ", ".join(f"{g.index}{':' + g.slice if g.slice else ''}={g.uuid}" for g in gpus) or "none"
        raise Invalid(f"{variable} names {entry[:60]!r}, which is no GPU of this node", expected=f"indices or UUIDs of: {have}", reason="gpu")
    return found


def _is_index(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) < 5
