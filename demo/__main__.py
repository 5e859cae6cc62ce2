"""`make demo`: the whole story with real bytes, processes and engine; the test of the main job, and a tour of the commands."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from demo import closed, connected, entitled, refusals
from demo.stage import ROOT, Stage, StepFailed
from demo.world import World

ACTS: tuple[tuple[str, tuple[Callable[[Stage, World], None], ...]], ...] = (
    ("the connected side", (connected.upstreams, connected.train, connected.publish, connected.carry)),
    ("the closed side", (closed.air_gap, closed.receive, closed.llama, closed.minilm, closed.warm)),
    ("what is refused", (refusals.all_of,)),
    ("who is entitled to what", (entitled.all_of,)),
)


def folder() -> Path:
    """The next free demo-out/<n>."""
    out = ROOT / "demo-out"
    out.mkdir(exist_ok=True)
    taken = [int(p.name) for p in out.iterdir() if p.name.isdigit()]
    return out / str(max(taken, default=0) + 1)


ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def interrupted(number: int, frame: FrameType | None) -> None:
    """SIGTERM and a closed terminal end the demo as Ctrl-C does, so that every process ends with it; a second Ctrl-C must not cut that short."""
    for each in ENDING:
        signal.signal(each, signal.SIG_IGN)
    raise KeyboardInterrupt


def main() -> int:
    """Plays the acts; 0 only if every assertion held."""
    for each in ENDING:  # a shell may have set them to be ignored
        signal.signal(each, interrupted)
    begun = time.monotonic()
    with Stage(folder()) as stage:
        w = World(stage)
        failure = ""
        try:
            for title, scenes in ACTS:
                print(f"\n== {title}", flush=True)
                for scene in scenes:
                    scene(stage, w)
        except (StepFailed, OSError) as error:  # OSError: a program of the story is not there
            failure = str(error)
        except KeyboardInterrupt:
            failure = "interrupted"
        held = stage.table() and not failure
    if failure:
        print(failure, file=sys.stderr)
    if not w.air_gap:
        print("AIR GAP NOT PROVEN")
    print(f"{'every assertion held' if held else 'NOT ALL HELD'}; {time.monotonic() - begun:.0f} s; look at {stage.folder.relative_to(ROOT)}")
    return 130 if failure == "interrupted" else (0 if held else 1)


if __name__ == "__main__":
    sys.exit(main())
