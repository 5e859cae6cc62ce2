"""Two plots of a run over its concurrency as one SVG text: tokens a second, and time to the first token; pure, every text in it is escaped."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from runtime.slo import Level

WIDTH, HEIGHT, LEFT, TOP, BOTTOM = 720, 220, 60, 26, 28
INK, GRID, BLUE, GREEN, GREY, RED = "#444", "#ddd", "#2b6cb0", "#2c7a7b", "#a0aec0", "#c53030"
Line = tuple[str, str, Sequence[tuple[int, float]]]


def _top(most: float) -> float:
    step = 10.0 ** math.floor(math.log10(most)) if most > 0 else 1.0
    return next(step * n for n in (1, 2, 5, 10) if step * n >= most)


def _panel(y0: int, title: str, lines: Sequence[Line], target: float | None, streams: Sequence[int]) -> list[str]:
    """One plot: lines of (concurrency, value) over a logarithmic axis of concurrency; the target as a red line."""
    top = _top(max([v for _, _, points in lines for _, v in points] + [target or 0.0]))
    low, high = math.log2(min(streams)), math.log2(max(streams))
    bottom, right = y0 + HEIGHT - BOTTOM, WIDTH - 130

    def x(n: int) -> float:
        return LEFT + (right - LEFT) * ((math.log2(n) - low) / (high - low) if high > low else 0.5)

    def y(value: float) -> float:
        return bottom - (HEIGHT - TOP - BOTTOM) * value / top

    out = [f'<text x="{LEFT}" y="{y0 + 14}" fill="{INK}" font-weight="bold">{escape(title)}</text>']
    for part in (0.0, 0.5, 1.0):
        out.append(f'<line x1="{LEFT}" x2="{right}" y1="{y(top * part):.1f}" y2="{y(top * part):.1f}" stroke="{GRID}"/>')
        out.append(f'<text x="{LEFT - 6}" y="{y(top * part) + 4:.1f}" text-anchor="end" fill="{INK}">{top * part:g}</text>')
    out += [f'<text x="{x(n):.1f}" y="{bottom + 16}" text-anchor="middle" fill="{INK}">{n}</text>' for n in streams]
    if target is not None:
        out.append(f'<line x1="{LEFT}" x2="{right}" y1="{y(target):.1f}" y2="{y(target):.1f}" stroke="{RED}" stroke-dasharray="6 4"/>')
        out.append(f'<text x="{right + 6}" y="{y(target) + 4:.1f}" fill="{RED}">target</text>')
    for i, (name, colour, points) in enumerate(lines):
        path = " ".join(f"{x(n):.1f},{y(v):.1f}" for n, v in points)
        out.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        out += [f'<circle cx="{x(n):.1f}" cy="{y(v):.1f}" r="3" fill="{colour}"/>' for n, v in points]
        out.append(f'<text x="{right + 6}" y="{y0 + TOP + 12 + 16 * i}" fill="{colour}">{escape(name)}</text>')
    return out


def svg(levels: Sequence[Level], before: Sequence[Level], targets: dict[str, float], title: str) -> str:
    """The whole picture; `before` is a recorded run, drawn in grey."""
    streams = sorted({found.concurrency for found in (*levels, *before)})

    def points(run: Sequence[Level], name: str) -> list[tuple[int, float]]:
        return [(found.concurrency, float(getattr(found, name))) for found in run]

    rates: list[Line] = [("now", BLUE, points(levels, "tok_s"))]
    waits: list[Line] = [("p50", GREEN, points(levels, "ttft_p50_ms")), ("p95", BLUE, points(levels, "ttft_p95_ms"))]
    if before:
        rates.append(("recorded", GREY, points(before, "tok_s")))
        waits.append(("p95 recorded", GREY, points(before, "ttft_p95_ms")))
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {2 * HEIGHT + 10}" font-family="sans-serif" font-size="12" role="img">'
    body = [*_panel(0, f"tokens per second by streams - {title}", rates, targets.get("tok_s"), streams)]
    body += _panel(HEIGHT + 10, "time to the first token, ms", waits, targets.get("ttft_p95_ms"), streams)
    return "\n".join([head, f"<title>{escape(title)}</title>", f'<rect width="{WIDTH}" height="{2 * HEIGHT + 10}" fill="#fff"/>', *body, "</svg>\n"])
