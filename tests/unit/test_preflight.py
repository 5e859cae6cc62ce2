"""Pre-flight: what the texts of mountinfo, an errno, a speed and the facts of GPUs mean; measured only where a real directory is at hand."""

from __future__ import annotations

import errno
import os
from dataclasses import replace
from pathlib import Path

import pytest

from artifact.errors import Unavailable
from runtime import preflight
from runtime.cache import check
from runtime.mounts import Mount, of, parse, seconds, speed_words
from runtime.node import Facts, Gpu
from runtime.preflight import GIB, Line, cache_lines, driver_line, gpu_lines, measured, memory_line, not_writable, space_line, speed_line
from runtime.settings import EXIT_CODES, Settings, from_environment

# As the kernel writes it: optional fields before the dash, octal escapes, a mount over a mount.
MOUNTINFO = r"""22 1 0:21 / / rw,relatime master:1 - overlay overlay rw,lowerdir=/a:/b,upperdir=/c,workdir=/d
30 22 0:44 / /opt/nim/.cache rw,noatime shared:7 master:3 - nfs4 filer.site:/export/nim rw,vers=4.2,rsize=1048576,sec=sys,addr=10.0.0.2
31 22 259:3 / /mnt/fast\040disk rw,relatime - xfs /dev/nvme0n1p1 rw,attr2
32 22 0:50 / /models ro,relatime - ext4 /dev/sdb1 rw
33 32 0:51 / /models rw,relatime - tmpfs tmpfs rw,size=16384k
nonsense
34 22 0:60 / /kv rw - fuse.glusterfs gluster:/vol rw
"""
MOUNTS = parse(MOUNTINFO)
OVERLAY, NFS = MOUNTS[0], MOUNTS[1]


def settings(cache: Path, **more: str) -> Settings:
    return from_environment({"NIM_CACHE_PATH": str(cache), **more}, "acme/tiny:1")


def test_mountinfo_is_read_as_the_kernel_writes_it() -> None:
    assert len(MOUNTS) == 6 and MOUNTS[2].at == "/mnt/fast disk"
    assert (NFS.kind, NFS.source, NFS.nfs, NFS.network, NFS.layer) == ("nfs4", "filer.site:/export/nim", True, True, False)
    assert OVERLAY.layer and not OVERLAY.network
    assert MOUNTS[3].read_only and not MOUNTS[4].read_only


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/opt/nim/.cache/blobs", "nfs4"),
        ("/opt/nim/.cache", "nfs4"),
        ("/opt/nim/.cache-other", "overlay"),
        ("/opt/nim", "overlay"),
        ("/models/acme", "tmpfs"),  # the later of two mounts on one point is what one sees
        ("/mnt/fast disk/x", "xfs"),
        ("/kv/a", "fuse.glusterfs"),
    ],
)
def test_a_path_lies_on_the_nearest_mount(path: str, kind: str) -> None:
    found = of(path, MOUNTS)
    assert found is not None and found.kind == kind


@pytest.mark.parametrize("fault", [errno.EACCES, errno.EPERM])
def test_nfs_that_refuses_names_root_squash_the_export_and_the_chown(fault: int) -> None:
    line = not_writable(Path("/opt/nim/.cache"), fault, (0, 0, 0o755), (1000, 1000), NFS)
    assert line.state == "fail" and line.reason == "cache"
    assert "root_squash" in line.text and "filer.site:/export/nim" in line.text and "owner 0:0, mode 0755, serving as 1000:1000" in line.text
    assert line.fix == "on filer.site: chown 1000:1000 /export/nim"
    below = not_writable(Path("/opt/nim/.cache/team/a"), fault, (0, 0, 0o755), (0, 0), NFS)
    assert below.fix == "on filer.site: chown 1000:1000 /export/nim/team/a", "root is mapped to nobody: the uid of a NIM is advised"


def test_other_faults_of_writing_are_told_apart() -> None:
    local = Mount("/opt/nim/.cache", "ext4", "/dev/sda1", ("rw",))
    assert not_writable(Path("/c"), errno.EACCES, (0, 0, 0o755), (1000, 1000), local).fix.startswith("on the host: chown 1000:1000")
    assert "root_squash" not in not_writable(Path("/c"), errno.ENOSPC, (0, 0, 0o755), (1000, 1000), NFS).text
    assert not_writable(Path("/c"), errno.EDQUOT, (0, 0, 0o755), (1000, 1000), NFS).reason == "disk_full"
    assert "mounted read-only" in not_writable(Path("/c"), errno.EROFS, (0, 0, 0o755), (1000, 1000), replace(local, options=("ro",))).text


def test_a_slow_disk_is_told_in_minutes_and_what_to_do() -> None:
    """The worked example: 140 GB over a slow NFS."""
    slow, words = speed_words(140_000_000_000, 90e6, NFS)
    assert slow and words == "90 MB/s: 26 min for 140.0 GB; local NVMe is advised"
    assert speed_words(140_000_000_000, 3.2e9, Mount("/", "xfs", "/dev/nvme0n1")) == (False, "3200 MB/s: 44 s for 140.0 GB")
    assert speed_words(600_000_000_000, 5e6, NFS)[1].startswith("5 MB/s: 33.3 h for 600.0 GB")
    assert seconds(1, 0) == float("inf")
    assert (speed_line(10**12, 90e6, NFS).state, speed_line(10**6, 90e6, NFS).state, speed_line(10**6, 0.0, None).state) == ("warn", "ok", "warn")


def test_space_for_what_is_missing() -> None:
    at = Path("/c")
    assert space_line(at, 100 * GIB, 0, 5).state == "ok"
    full = space_line(at, 100 * GIB, 40 * GIB, 10 * GIB)
    assert (full.state, full.reason) == ("fail", "disk_full") and "32.2 GB" in full.fix
    assert space_line(at, 100 * GIB, 40 * GIB, 40 * GIB + 5).state == "warn" and space_line(at, 100 * GIB, 40 * GIB, 50 * GIB).state == "ok"


def test_the_containers_own_layer_is_no_place_for_weights(tmp_path: Path) -> None:
    us = (os.geteuid(), os.getegid())
    found = cache_lines(settings(tmp_path), (OVERLAY,), us, 5, 5)
    assert [(line.check, line.state) for line in found] == [("cache", "ok"), ("file system", "fail"), ("space", "ok")]
    assert "lost with the container" in found[1].text and f"-v /opt/nim-cache:{tmp_path}" in found[1].fix and EXIT_CODES[found[1].reason] == 38
    assert cache_lines(settings(tmp_path, AIRLOCK_EPHEMERAL_CACHE="1"), (OVERLAY,), us, 5, 5)[1].state == "warn"
    assert cache_lines(settings(tmp_path), (OVERLAY,), us, 5, 0)[1].state == "ok", "weights that the image brings are lost with nothing"
    over = Mount(str(tmp_path), "nfs", "filer:/x", ("rw",))
    assert cache_lines(settings(tmp_path), (OVERLAY, over), us, 5, 5)[1] == Line(
        "file system", "warn", f"nfs of filer:/x at {tmp_path}", "a local disk, best NVMe, loads weights faster"
    )


def test_shared_memory_counts_for_several_gpus_only() -> None:
    docker = 64 << 20  # what a container has without --shm-size
    assert memory_line(docker, 1).state == "ok"
    eight = memory_line(docker, 8)
    assert (eight.state, eight.reason) == ("fail", "shared_memory") and "--shm-size=16g" in eight.fix and "8 GPUs need 8 GiB" in eight.text
    assert memory_line(16 * GIB, 8).state == "ok"


def gpu(index: int, name: str = "NVIDIA H100 80GB HBM3", free: int = 79 * GIB, **more: object) -> Gpu:
    return Gpu(index, f"GPU-{index}", name, "2330:10de", (9, 0), 80 * GIB, free, **more)  # type: ignore[arg-type]


def test_gpus_are_healthy_alike_and_free() -> None:
    well = Facts(False, (gpu(0), gpu(1)), "550.54", "12.4")
    assert gpu_lines(well, ()) == [Line("GPUs", "ok", "2x NVIDIA H100 80GB HBM3, healthy, alike and free")]
    ill = gpu_lines(Facts(False, (gpu(0), gpu(1, faults=("uncorrectable memory errors",))), "550.54", "12.4"), ())
    assert [(line.state, line.reason) for line in ill] == [("fail", "gpu")] and "GPU 1 (GPU-1)" in ill[0].text
    mixed = gpu_lines(Facts(False, (gpu(0), gpu(1, "NVIDIA L4")), "550.54", "12.4"), ())
    assert mixed[0].state == "warn" and "1x NVIDIA H100 80GB HBM3, 1x NVIDIA L4" in mixed[0].text
    busy = gpu_lines(Facts(False, (gpu(0), gpu(1, free=20 * GIB)), "550.54", "12.4"), ())
    assert [line.state for line in busy] == ["warn"] and "21.5 GB of 85.9 GB free" in busy[0].text
    assert gpu_lines(Facts(False, (gpu(0), gpu(1, free=20 * GIB))), (gpu(0),))[0].state == "ok", "only those of the choice count"
    assert gpu_lines(Facts(False), ())[0].state == "warn" and gpu_lines(Facts(True), ())[0].state == "ok"


@pytest.mark.parametrize(
    ("cuda", "engine", "state"), [("12.4", "12.8", "warn"), ("12.8", "12.4", "ok"), ("12.4", "13.0", "fail"), ("13.0", "", "ok")]
)
def test_the_driver_against_the_engine(cuda: str, engine: str, state: str) -> None:
    line = driver_line(Facts(False, (gpu(0),), "550.54", cuda), engine)
    assert line.state == state and (state != "fail" or (line.reason == "gpu" and "CUDA 13" in line.fix))
    assert driver_line(Facts(True), "12.8").state == "ok"


def test_the_engines_cuda_is_read_from_its_torch(tmp_path: Path) -> None:
    file = tmp_path / "lib" / "python3.11" / "site-packages" / "torch" / "version.py"
    file.parent.mkdir(parents=True)
    file.write_text(
        "from typing import Optional\n__version__ = '2.9.0+cu128'\ndebug = False\ncuda: Optional[str] = '12.8'\nhip: Optional[str] = None\n"
    )
    assert preflight.engine_cuda(tmp_path) == "12.8"
    file.write_text("__version__ = '2.9.0+cpu'\ncuda: Optional[str] = None\n")
    assert preflight.engine_cuda(tmp_path) == preflight.engine_cuda(None) == ""


@pytest.mark.slow
def test_speed_is_measured_on_files_or_by_writing_and_leaves_nothing(tmp_path: Path) -> None:
    file = tmp_path / "weights"
    file.write_bytes(os.urandom(8 << 20))
    assert measured([file], None) > 1e6
    assert measured([tmp_path / "absent"], None) == 0.0
    assert measured([], tmp_path) > 1e6
    assert [p.name for p in tmp_path.iterdir()] == ["weights"]


def test_the_first_failure_ends_a_start_with_its_reason() -> None:
    lines = [
        Line("a", "ok", ""),
        Line("b", "warn", "x"),
        Line("c", "fail", "too small", "grow it", "shared_memory"),
        Line("d", "fail", "y", "", "cache"),
    ]
    with pytest.raises(Unavailable, match="c: too small") as caught:
        preflight.require(lines)
    assert (caught.value.reason, caught.value.do) == ("shared_memory", "grow it")
    preflight.require(lines[:2])


def test_an_address_that_is_not_ours_is_no_taken_port() -> None:
    line = preflight.port_line("192.0.2.1", 8000)  # of the documentation's own network
    assert (line.state, line.reason) == ("fail", "port_taken") and "cannot be used: Cannot assign requested address" in line.text
    assert "AIRLOCK_HOST" in line.fix and "stop what listens" not in line.fix


def test_a_file_in_the_caches_place_is_told_as_that(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for place in (tmp_path / "file", tmp_path / "file" / "cache"):
        (line,) = cache_lines(settings(place), MOUNTS, (os.geteuid(), os.getegid()), 0, 0)
        assert (line.state, line.reason, line.fix) == ("fail", "cache", "set NIM_CACHE_PATH to one") and line.text == f"{place} is no directory"
        with pytest.raises(Unavailable, match=f"NIM_CACHE_PATH {place} is no directory"):
            check(place)
