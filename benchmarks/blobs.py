"""Blob PUT and GET: CPU-seconds of the server per GiB and MB/s beside docker-registry, and behind nginx with X-Accel-Redirect beside nginx alone.

PUT is one blob of 1 GiB with its SHA-256 checked and made durable; GET is 2 GiB from the page cache, whole and in 8 ranges at once. Each round
starts every server anew on an empty folder and removes it: a virtual machine pays for memory that it touches first, which would count against
whoever comes last.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

from _load import GIB, Connection, Figure, measured, pull, pull_in_parts, push, random_file
from _servers import Server, airlock, docker_registry, nginx, scratch
from _table import Report, arguments

OURS, THEIRS, PLAIN, FRONT = "airlock", "docker-registry", "nginx, plain files", "nginx, X-Accel-Redirect <- airlock"
WORKS = ("PUT", "PUT, chunked", "GET, 1 connection", "GET, 8 ranges")


class Best:
    """The figures of all rounds, and the best of each server and work."""

    def __init__(self, report: Report) -> None:
        self.report = report
        self.figures: dict[tuple[str, str], list[Figure]] = {}

    def add(self, round_: int, name: str, work: str, figure: Figure, server: Server) -> None:
        """Keeps a figure and prints it as a row."""
        self.figures.setdefault((name, work), []).append(figure)
        self.report.row(work, name, str(round_), figure.cpu_per_gib, f"{figure.mb_s:.0f}", f"{server.rss_mib(peak=True):.0f}")

    def cpu(self, name: str, work: str) -> float:
        """The least CPU-seconds per GiB."""
        return max(min(f.cpu_per_gib for f in self.figures[name, work]), 0.005)

    def mb_s(self, name: str, work: str) -> float:
        """The most MB/s."""
        return max(f.mb_s for f in self.figures[name, work])


def digest_of(file: Path) -> str:
    """The OCI digest of a file."""
    with file.open("rb") as source:
        return "sha256:" + hashlib.file_digest(source, "sha256").hexdigest()


def put(server: Server, file: Path, chunked: bool) -> Figure:
    """One measured push."""
    digest = digest_of(file)

    def work() -> int:
        with Connection(server) as connection:
            push(connection, "bench/put", file, digest, chunked)
        return file.stat().st_size

    return measured(server, work)


def get(best: Best, round_: int, name: str, server: Server, path: str, size: int) -> None:
    """Both measured ways of reading one object."""

    def one() -> int:
        with Connection(server) as connection:
            return pull(connection, path)

    best.add(round_, name, WORKS[2], measured(server, one), server)
    best.add(round_, name, WORKS[3], measured(server, lambda: pull_in_parts(server, path, size, 8)), server)


def uploads(best: Best, round_: int, start: Callable[[Path], AbstractContextManager[Server]], name: str, size: int) -> None:
    """PUT by Content-Length, then as docker does by chunks, each on an empty server."""
    for work in WORKS[:2]:
        with scratch() as folder, start(folder / "server") as server:
            file = random_file(folder / "source", size)
            best.add(round_, name, work, put(server, file, work == WORKS[1]), server)


def downloads(best: Best, round_: int, start: Callable[[Path], AbstractContextManager[Server]], name: str, size: int) -> None:
    """GET of one large blob; for ours behind nginx too, beside the same file sent by nginx alone."""
    with scratch() as folder, start(folder / "server") as server:
        file = random_file(folder / "source", size)
        digest = digest_of(file)
        with Connection(server) as connection:
            push(connection, "bench/get", file, digest)
        file.unlink()
        path = f"/v2/bench/get/blobs/{digest}"
        get(best, round_, name, server, path, size)
        if name == FRONT:
            return
    if name != OURS:
        return
    with scratch() as folder, airlock(folder / "server", AIRLOCK_X_ACCEL="/internal/") as server:
        file = random_file(folder / "source", size)
        digest = digest_of(file)
        with Connection(server) as connection:
            push(connection, "bench/get", file, digest)
        file.unlink()
        blobs = server.folder / "blobs"
        plain = f"/plain/sha256/{digest[7:9]}/{digest[7:]}"
        with nginx(folder / "nginx", server, blobs) as front:
            get(best, round_, FRONT, front, f"/v2/bench/get/blobs/{digest}", size)
            get(best, round_, PLAIN, front, plain, size)


def main() -> None:
    """Measures, prints."""
    args = arguments(__doc__.splitlines()[0])
    size = GIB // 8 if args.quick else GIB
    report = Report("Blobs", ("work", "server", "round", "CPU-s/GiB", "MB/s", "peak MiB"))
    best = Best(report)
    for round_ in range(1, args.rounds + 1):
        for name, start in ((OURS, airlock), (THEIRS, docker_registry)):
            uploads(best, round_, start, name, size)
            downloads(best, round_, start, name, 2 * size)
    for work, bar in ((WORKS[0], 0.45), (WORKS[2], 1.0), (WORKS[3], 0.5)):
        report.at_most(f"{work}: CPU of airlock / docker-registry", best.cpu(OURS, work) / best.cpu(THEIRS, work), bar)
    report.at_least("PUT: MB/s of airlock / docker-registry", best.mb_s(OURS, WORKS[0]) / best.mb_s(THEIRS, WORKS[0]), 1.8)
    for work in WORKS[2:]:
        report.at_most(f"{work}: CPU behind X-Accel / nginx alone", best.cpu(FRONT, work) / best.cpu(PLAIN, work), 1.0)
    report.show(args.json)


if __name__ == "__main__":
    main()
