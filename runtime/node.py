"""What a node offers, as plain values: GPUs, driver, what is hidden; found by runtime/gpus.py or described in runtime/hosts.py."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """One GPU or MIG slice as CUDA would offer it: NVML index, UUID, product name, NIM's `gpu_device` text, compute capability, bytes of memory.

    `total` 0: not told. `unified`: the memory is the host's. `mig`: a GPU that is split, itself no device; `parent` and `slice` ("gi/ci") mark a
    slice. `speed`: cores x MHz, what CUDA orders by. `peers`: indices of GPUs that NVLink reaches. `faults` call for a repair, `notices` do not.
    """

    index: int
    uuid: str
    name: str
    device: str
    capability: tuple[int, int] = (0, 0)
    total: int = 0
    free: int = 0
    mig: bool = False
    bus: str = ""
    parent: str = ""
    slice: str = ""
    unified: bool = False
    speed: int = 0
    links: int = 0
    peers: tuple[int, ...] = ()
    faults: tuple[str, ...] = ()
    notices: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """`GPU 3 (GPU-5f3c…, 00000000:1B:00.0)`, what an operator finds it by."""
        return f"GPU {self.index}{':' + self.slice if self.slice else ''} ({', '.join(filter(None, (self.uuid, self.bus)))})"


@dataclass(frozen=True)
class Facts:
    """What the node offers: `cpu` only where no NVML library exists; `simulated` where a stand-in or a description answers."""

    cpu: bool
    gpus: tuple[Gpu, ...] = ()
    driver: str = ""
    cuda: str = ""
    simulated: bool = False
    hidden: str = ""


def describe(gpus: Iterable[Gpu]) -> str:
    """`2x NVIDIA L40S, 1x NVIDIA L4` for sentences."""
    counts: dict[str, int] = {}
    for gpu in gpus:
        counts[gpu.name] = counts.get(gpu.name, 0) + 1
    return ", ".join(f"{n}x {name}" for name, n in counts.items()) or "no GPU"
