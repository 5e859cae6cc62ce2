"""Blob PUT and GET: CPU-seconds of the server per GiB and MB/s beside docker-registry, and behind nginx with X-Accel-Redirect beside nginx alone.

PUT is one blob of 1 GiB with its SHA-256 checked and made durable; GET is 2 GiB from the page cache, whole and in 8 ranges at once. Each round
starts every server anew on an empty folder and removes it: a virtual machine pays for memory that it touches first, which would count against
whoever comes last.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from _load import GIB, Connection, Figure, measured, pull, pull_in_parts, push, random_file
from _servers import Server, airlock, docker_registry, nginx, scratch
from _table import Report, arguments

OURS, THEIRS, PLAIN, FRONT = "airlock", "docker-registry", "nginx, plain files", "nginx, X-Accel-Redirect <- airlock"
TIMES = 3  # each GET, since the clock of a process's CPU time ticks in hundredths
WORKS = ("PUT", "PUT, chunked", "GET, 1 connection", "GET, 8 ranges")

Start = Callable[[Path], AbstractContextManager[Server]]


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


@dataclass(frozen=True)
class Source:
    """A random file to push, made once: every server starts empty, so each stores it anew."""

    file: Path
    digest: str
    size: int

    @classmethod
    def make(cls, file: Path, size: int) -> Source:
        """Writes the file."""
        return cls(file, digest_of(random_file(file, size)), size)

    def push(self, server: Server, repo: str, chunked: bool = False) -> int:
        """Pushes it; returns its size."""
        with Connection(server) as connection:
            push(connection, repo, self.file, self.digest, chunked)
        return self.size


def get(best: Best, round_: int, name: str, server: Server, path: str, size: int) -> None:
    """Both measured ways of reading one object."""

    def one() -> int:
        with Connection(server) as connection:
            return sum(pull(connection, path) for _ in range(TIMES))

    best.add(round_, name, WORKS[2], measured(server, one), server)
    best.add(round_, name, WORKS[3], measured(server, lambda: sum(pull_in_parts(server, path, size, 8) for _ in range(TIMES))), server)


def uploads(best: Best, round_: int, start: Start, name: str, source: Source) -> None:
    """PUT by Content-Length, then as docker does by chunks, each on an empty server."""
    for work in WORKS[:2]:
        with scratch() as folder, start(folder / "server") as server:
            best.add(round_, name, work, measured(server, lambda: source.push(server, "bench/put", work == WORKS[1])), server)  # noqa: B023


def downloads(best: Best, round_: int, start: Start, name: str, source: Source) -> None:
    """GET of one large blob."""
    with scratch() as folder, start(folder / "server") as server:
        source.push(server, "bench/get")
        get(best, round_, name, server, f"/v2/bench/get/blobs/{source.digest}", source.size)


def fronted(best: Best, round_: int, source: Source) -> None:
    """GET of one large blob from ours behind nginx, and of the same file sent by nginx alone."""
    with scratch() as folder, airlock(folder / "server", AIRLOCK_X_ACCEL="/internal/") as server:
        source.push(server, "bench/get")
        with nginx(folder / "nginx", server, server.folder / "blobs") as front:
            get(best, round_, FRONT, front, f"/v2/bench/get/blobs/{source.digest}", source.size)
            get(best, round_, PLAIN, front, f"/plain/sha256/{source.digest[7:9]}/{source.digest[7:]}", source.size)


def main() -> None:
    """Measures, prints."""
    args = arguments(__doc__.splitlines()[0])
    size = GIB // 4 if args.quick else GIB
    report = Report("Blobs", ("work", "server", "round", "CPU-s/GiB", "MB/s", "peak MiB"))
    best = Best(report)
    with scratch() as folder:
        one, two = Source.make(folder / "one", size), Source.make(folder / "two", 2 * size)
        for round_ in range(1, args.rounds + 1):
            for name, start in ((OURS, airlock), (THEIRS, docker_registry)):
                uploads(best, round_, start, name, one)
                downloads(best, round_, start, name, two)
            fronted(best, round_, two)
    for work, bar in ((WORKS[0], 0.45), (WORKS[2], 1.0), (WORKS[3], 0.5)):
        report.at_most(f"{work}: CPU of airlock / docker-registry", best.cpu(OURS, work) / best.cpu(THEIRS, work), bar)
    report.at_least("PUT: MB/s of airlock / docker-registry", best.mb_s(OURS, WORKS[0]) / best.mb_s(THEIRS, WORKS[0]), 1.8)
    for work in WORKS[2:]:
        report.at_most(f"{work}: CPU behind X-Accel / nginx alone", best.cpu(FRONT, work) / best.cpu(PLAIN, work), 1.0)
    report.show(args.json)


if __name__ == "__main__":
    main()
