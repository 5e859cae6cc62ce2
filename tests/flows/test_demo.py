"""The demo's own promises, without its story: every process ends with it however it is interrupted; a gap that was not made is not called one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT

pytestmark = pytest.mark.server

DRIVER = """
import sys
from pathlib import Path
import demo.__main__ as main
from demo import closed, stage
main.ROOT = Path(sys.argv[1])
FAMILY = "trap '' TERM; (trap '' TERM; setsid sleep 1234.5) & python3 -m http.server --bind 127.0.0.1 $0 & wait"

def family(s, w):
    with s.step("a server that ignores SIGTERM, with a child that left its group"):
        s.start(["sh", "-c", FAMILY, str(w.api_port)], w.api)
        (Path(sys.argv[1]) / "up").touch()
        s.run(["sleep", "60"])

main.ACTS = (("one act", ({"family": family, "air_gap": closed.air_gap}[sys.argv[2]],)),)
sys.exit(main.main())
"""


def environment(**more: str) -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if k != "CI"} | more


def in_folder(folder: Path) -> list[int]:
    """Processes that have the run's folder in their command line or environment."""
    found = []
    for proc in Path("/proc").glob("[0-9]*"):
        try:
            words = (proc / "cmdline").read_bytes()
            home = (proc / "environ").read_bytes()
        except OSError:
            continue
        if os.fsencode(folder) in words + home:
            found.append(int(proc.name))
    return found


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_every_process_ends_with_it_also_when_it_is_interrupted_twice(tmp_path: Path, how: signal.Signals) -> None:
    argv = [sys.executable, "-c", DRIVER, str(tmp_path), "family"]
    with subprocess.Popen(argv, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        end = time.monotonic() + 30
        while not (tmp_path / "up").exists() and process.poll() is None and time.monotonic() < end:
            time.sleep(0.05)
        assert len(in_folder(tmp_path)) >= 5, "the family is not up"
        process.send_signal(how)
        time.sleep(1)  # it waits now for the server that does not end
        process.send_signal(signal.SIGINT)
        said, _ = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "FAIL  1. a server that ignores SIGTERM" in said and "NOT ALL HELD" in said
    assert not in_folder(tmp_path)


@pytest.mark.parametrize(("ci", "status"), [("", 0), ("1", 1)])
def test_a_gap_that_could_not_be_made_is_told_and_fails_under_ci(tmp_path: Path, ci: str, status: int) -> None:
    refuses = tmp_path / "bin" / "unshare"
    refuses.parent.mkdir()
    refuses.write_text("#!/bin/sh\necho 'unshare: not permitted' >&2\nexit 1\n")
    refuses.chmod(0o755)
    env = environment(PATH=f"{refuses.parent}:{os.environ['PATH']}", **({"CI": ci} if ci else {}))
    argv = [sys.executable, "-c", DRIVER, str(tmp_path), "air_gap"]
    done = subprocess.run(argv, cwd=ROOT, env=env, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == status, done.stdout + done.stderr
    assert "\nAIR GAP NOT PROVEN\n" in done.stdout and "unshare: not permitted" in done.stdout + done.stderr
    assert ("FAIL" in done.stdout) == bool(ci) and "Traceback" not in done.stderr
