"""Token streams through the runtime's front against the same engine asked directly: 16 streams of 2000 tokens/s each, and as fast as they go.

The engine is scripted (benchmarks/_engine.py); client, front and engine are processes of their own. Direct and front take turns in each round.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from _servers import Server, free_port, scratch
from _table import Report, arguments

HERE = Path(__file__).resolve().parent
STREAMS, PER_S, RATIO = 16, 2000, 0.9
BODY = json.dumps({"model": "acme/tiny", "messages": [{"role": "user", "content": "x"}], "stream": True}).encode()
FRONT = """
import sys
from pathlib import Path
from runtime import serve
from runtime.launch import Launch
port, sock, *argv = sys.argv[1:]
settings = serve.ServeSettings("127.0.0.1", int(port), ("acme/tiny",), "ab" * 32, "", "", engine_log=Path(sock + ".log"))
serve.run(settings, Launch((sys.executable, *argv), {"PATH": "/usr/bin:/bin"}, "/health", Path(sock)))
"""


@contextmanager
def served(folder: Path, tokens: int, per_s: float) -> Iterator[tuple[Server, str]]:
    """A front over a scripted engine: the front's own process, and the engine's socket."""
    port, sock = free_port(), str(folder / f"{tokens}-{per_s:.0f}.sock")
    argv = [sys.executable, "-c", FRONT, str(port), sock, str(HERE / "_engine.py"), sock, str(tokens), str(per_s)]
    process = subprocess.Popen(argv, cwd=HERE.parent)
    try:
        asyncio.run(ready(port))
        yield Server("front", port, [process.pid]), sock
    finally:
        process.terminate()
        process.wait(30)


async def ready(port: int) -> None:
    """Returns when the front says so."""
    until = time.monotonic() + 30
    while True:
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"GET /v1/health/ready HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            if b" 200 " in (await reader.read())[:16]:
                return
        except OSError:
            pass
        if time.monotonic() > until:
            raise RuntimeError("the front is not ready")
        await asyncio.sleep(0.05)


async def stream(port: int, sock: str, gaps: list[float]) -> int:
    """One stream read to its end; the tokens in it, and the time between reads."""
    reader, writer = await (asyncio.open_connection("127.0.0.1", port) if port else asyncio.open_unix_connection(sock))
    writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(BODY) + BODY)
    tokens, rest, last = 0, b"", time.perf_counter()
    while data := await reader.read(1 << 16):
        now = time.perf_counter()
        gaps.append((now - last) * 1000)
        last = now
        rest += data
        tokens += rest.count(b'"delta"')
        rest = rest[-6:]
        if b"[DONE]" in data or data.endswith(b"0\r\n\r\n"):
            break
    writer.close()
    return tokens


def measure(port: int, sock: str) -> tuple[float, float, int]:
    """Tokens a second of all streams, the 99th percentile of the time between two reads in ms, and all tokens."""
    gaps: list[float] = []

    async def run() -> int:
        return sum(await asyncio.gather(*(stream(port, sock, gaps) for _ in range(STREAMS))))

    began = time.perf_counter()
    tokens = asyncio.run(run())
    seconds = time.perf_counter() - began
    gaps.sort()
    return tokens / seconds, gaps[int(len(gaps) * 0.99)], tokens


def main() -> None:
    """Measures, prints."""
    args = arguments(__doc__.splitlines()[0])
    report = Report("token streams through the front", ("pace", "way", "tokens/s", "p99 gap ms", "front's CPU us a token"))
    for per_s, tokens in ((PER_S, PER_S * (3 if args.quick else 10)), (0, 20_000 if args.quick else 100_000)):
        best: dict[str, float] = {}
        ratios: list[float] = []
        with scratch() as folder, served(folder, tokens, per_s) as (front, sock):
            for _round in range(args.rounds):
                rates: dict[str, float] = {}
                for name, port in (("direct", 0), ("front", front.port)):
                    before = own(front)
                    rate, gap, count = measure(port, sock)
                    if count != STREAMS * tokens:
                        raise RuntimeError(f"{name}: {count} of {STREAMS * tokens} tokens came")
                    cost = (own(front) - before) / count * 1e6 if name == "front" else 0.0
                    report.row(f"{STREAMS} x {per_s or 'no limit'}", name, f"{rate:.0f}", f"{gap:.1f}", f"{cost:.1f}" if cost else "")
                    rates[name] = rate
                    best[name] = max(best.get(name, 0.0), rate)
                ratios.append(rates["front"] / rates["direct"])
        if per_s:
            report.at_least(f"{STREAMS} streams x {per_s} tokens/s: front against direct, of the same round", max(ratios), RATIO)
        else:
            report.at_least("no limit: front against direct (told, no target of the product)", best["front"] / best["direct"], 0.0)
    report.show(args.json)


def own(front: Server) -> float:
    """CPU-seconds of the front's process alone, without the engine's."""
    fields = Path(f"/proc/{front.pids[0]}/stat").read_text().rpartition(") ")[2].split()
    return (int(fields[11]) + int(fields[12])) / 100


if __name__ == "__main__":
    main()
