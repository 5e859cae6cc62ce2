"""`airlock mirror init`: a new sender with its TUF root; prints what the closed side pins and what must be moved away."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

from mirror.home import MirrorHome

EXAMPLE = "example: airlock mirror init --home /srv/airlock-mirror"


def main(argv: list[str]) -> int:
    """Makes the home and prints the SHA-256 and path of its root; returns the exit status."""
    parser = argparse.ArgumentParser(prog="airlock mirror init", description="Make a mirror's home: staging, TUF root and keys.", epilog=EXAMPLE)
    home_default = os.environ.get("AIRLOCK_MIRROR")
    parser.add_argument("--home", type=Path, default=home_default, required=not home_default, help="the mirror's home (env AIRLOCK_MIRROR)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    given = parser.parse_args(argv)
    home = MirrorHome.init(Path(given.home))
    if given.json:
        facts = {"sender": home.id, "root": str(home.root_file), "sha256": home.root_sha256, "offline_keys": str(home.offline_keys)}
        print(json.dumps(facts))
        return 0
    print(f"sender        {home.id}")
    print(f"trust root    {home.root_file}")
    print(f"SHA-256       {home.root_sha256}")
    print(f"offline keys  {home.offline_keys}/root-1.pem root-2.pem root-3.pem (two of three sign a new root)")
    print("Move the three offline keys to three places away from this machine now; packing needs none of them.")
    print("Carry the trust root to the closed side and compare the SHA-256 on paper: airlock site init --trust-root 1.root.json --sha256 HEX")
    return 0
