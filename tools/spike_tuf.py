"""Measures what docs/adr/0003-tuf-bundle.md states: python-tuf carrying 1,000 targets, bundles out of order, a lost one. Prints one line a figure."""

from __future__ import annotations

import hashlib
import resource
import shutil
import tempfile
import time
from pathlib import Path

from tuf.api.metadata import Metadata, TargetFile, Targets

from artifact import bundle, medium
from artifact.errors import AirlockError

COUNT = 1000


def told(what: str, begun: float, more: str = "") -> None:
    print(f"{what:<62} {time.perf_counter() - begun:7.3f} s  {more}")


def main() -> None:
    now = time.time()
    base = Path(tempfile.mkdtemp(prefix="airlock-spike-"))
    try:
        begun = time.perf_counter()
        bundle.create_root(base / "tuf", now)
        told("make root, targets and six keys", begun)
        root = (base / "tuf/metadata/1.root.json").read_bytes()
        sender = hashlib.sha256(root).hexdigest()[:16]

        begun = time.perf_counter()
        listed = {f"bundles/{i}.json": TargetFile(260, {"sha256": f"{i:064x}"}, f"bundles/{i}.json") for i in range(1, COUNT + 1)}
        role = Metadata(Targets(version=1, targets=listed))
        role.sign(bundle._signer(base / "tuf/online/bundles.pem"))
        told(f"one role of {COUNT} targets, made and signed", begun, f"{len(role.to_bytes(bundle._COMPACT))} bytes")

        def write(to: str, content: list[bytes]) -> bundle.Written:
            objects = {}
            for raw in content:
                digest = "sha256:" + hashlib.sha256(raw).hexdigest()
                (base / digest[7:]).write_bytes(raw)
                objects[digest] = len(raw)
            names = tuple(
                medium.BundleName("acme/m", f"v{i}", d, "application/vnd.oci.image.manifest.v1+json") for i, d in enumerate(sorted(objects))
            )
            return bundle.write_bundle(base / to, base / "tuf", sender, names, objects, (), lambda d: base / d[7:], now)

        begun = time.perf_counter()
        for i in range(1, COUNT + 1):
            bundle._sign_next(base / "tuf", sender, i, {"names": [], "objects": [], "upstream": []}, now)
        told(f"{COUNT} bundles signed one after another", begun)

        thousand = [b"object %d" % i for i in range(COUNT)]
        begun = time.perf_counter()
        write("a", thousand)
        size = sum(p.stat().st_size for p in (base / "a/metadata").iterdir())
        told(f"bundle {COUNT + 1} of {COUNT} objects and names written, fsync each", begun, f"metadata {size} bytes, {COUNT + 1} indexes listed")
        write("b", [*thousand, b"b"])
        write("c", [*thousand, b"b", b"c"])

        def read(of: str, what: str) -> None:
            begun = time.perf_counter()
            try:
                index = bundle.open_bundle(base / of, base / "state", root, now)
                index.commit()
                more = f"sequence {index.sequence}, older {index.older}, known {index.known}"
            except AirlockError as error:
                more = f"refused: {error.what[:90]}"
            told(what, begun, more)

        read("a", "first bundle verified")
        read("c", "the one after next (one lost between) verified")
        read("b", "the lost one afterwards, out of order")
        read("a", "the first once more, out of order")
        read("c", "the newest again")
        (base / "c/metadata/timestamp.json").write_bytes((base / "b/metadata/timestamp.json").read_bytes())
        read("c", "newest with the timestamp of the one before (mix)")
        print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024} MiB")
    finally:
        shutil.rmtree(base, ignore_errors=True)


if __name__ == "__main__":
    main()
