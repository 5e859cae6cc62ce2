"""Builds the stand-in libnvidia-ml.so.1 of this folder, and writes its configuration for well-known hosts; imports no project code.

Figures are nvidia-smi's and NVML's of such cards where a log of one was at hand, else the data sheet's.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

MIB = 1 << 20
# name, device id, compute capability, MiB of memory (0: NVML tells none), cores, MHz, NVLinks
CARDS: dict[str, tuple[str, str, str, int, int, int, int]] = {
    "h100": ("NVIDIA H100 80GB HBM3", "0x233010DE", "9.0", 81559, 16896, 1980, 18),
    "h100-nvl": ("NVIDIA H100 NVL", "0x232110DE", "9.0", 95830, 16896, 1785, 12),
    "a100-40": ("NVIDIA A100-SXM4-40GB", "0x20B010DE", "8.0", 40960, 6912, 1410, 12),
    "a100-80": ("NVIDIA A100-SXM4-80GB", "0x20B210DE", "8.0", 81920, 6912, 1410, 12),
    "l40s": ("NVIDIA L40S", "0x26B910DE", "8.9", 46068, 18176, 2520, 0),
    "b200": ("NVIDIA B200", "0x290110DE", "10.0", 183359, 18944, 1965, 18),
    "gb10": ("NVIDIA GB10", "0x2E1210DE", "12.1", 0, 6144, 2418, 0),
    "rtx-6000-ada": ("NVIDIA RTX 6000 Ada Generation", "0x26B110DE", "8.9", 49140, 18176, 3105, 0),
}


def build(compiler: str, folder: Path) -> Path:
    """Compiles the library into `folder` and returns it."""
    out = folder / "libnvidia-ml.so.1"
    source = Path(__file__).with_name("fake_nvml.c")
    subprocess.run([compiler, "-Wall", "-Werror", "-shared", "-fPIC", "-Wl,-soname,libnvidia-ml.so.1", "-o", out, source], check=True)
    return folder


def host(*cards: str, last: str = "", each: str = "") -> str:
    """The configuration of a host with these cards, idle; `each` and `last` are more lines for every and for the last GPU.

    H100 NVL cards are bridged in pairs; the others reach all of their kind. `h100-mig` is an H100 split into two slices of 3g.40gb.
    """
    lines = ["driver=550.163.01", "cuda=12040"]
    for i, card in enumerate(cards):
        name, device, capability, mib, cores, clock, links = CARDS[card.removesuffix("-mig")]
        total, free = mib * MIB, (mib - 600) * MIB if mib else 0
        lines += ["gpu", f"name={name}", f"device_id={device}", f"cc={capability}", f"total={total}", f"free={free}"]
        lines += [f"cores={cores}", f"clock={clock}", f"nvlinks={links}", f"ecc={0 if links or mib > 40000 else -1}"]
        if card == "h100-nvl":
            lines.append(f"peers={i ^ 1}")
        if card.endswith("-mig"):
            lines += ["mig=1", *(f"mig_slice=MIG-0000000{i}-0000-0000-0000-00000000000{n},40448,{n + 1},0,{name} MIG 3g.40gb" for n in range(2))]
        lines += each.splitlines()
    return "\n".join(lines + last.splitlines()) + "\n"


HOSTS = {
    "h100x8": host(*["h100"] * 8),
    "h100-nvlx8": host(*["h100-nvl"] * 8),
    "a100-40x1": host("a100-40"),
    "a100-80x1": host("a100-80"),
    "l40sx2": host("l40s", "l40s"),
    "b200x1": host("b200"),
    "gb10x1": host("gb10"),
    "rtx-6000-adax1": host("rtx-6000-ada"),
    "h100-migx1": host("h100-mig"),
}
LATE = host(*["h100-nvl"] * 8, last="delay_call=nvmlDeviceGetMemoryInfo\ndelay_ms={ms}")
BROKEN = host(*["h100"] * 8, last="error=15\nerror_call=nvmlDeviceGetMemoryInfo")
