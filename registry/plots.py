"""Plots as inline SVG texts, drawn here so that a report needs no script and no other file; pure, every text in them is escaped."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from html import escape

WIDTH, HEIGHT = 720, 170
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 12, 24
INK, GRID, BLUE, RED = "#444", "#ddd", "#2b6cb0", "#c53030"
COLOURS = ("#c53030", "#d69e2e", "#6b46c1", "#2c7a7b", "#97266d", "#718096")  # told apart in print and by most eyes; the last is for the rest
DAY_S = 86400.0


def nice(most: float) -> float:
    """The end of an axis: the first round number that is not below, whose half is one too."""
    step = 1.0
    while step * 10 <= most:
        step *= 10
    steps = (1.0, 1.6, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0) if step > 1 else (1.0, 2.0, 4.0, 6.0, 8.0, 10.0)
    return next((step * n for n in steps if step * n >= most), step * 10)


def short(value: float) -> str:
    """A number in at most four characters and a unit: 12, 3.4k, 5M."""
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.1f}".removesuffix(".0") + unit
    return f"{value:.0f}"


def _y(value: float, top: float) -> float:
    return TOP + (HEIGHT - TOP - BOTTOM) * (1 - value / top)


def _text(x: float, y: float, words: str, anchor: str = "middle", colour: str = INK) -> str:
    halo = 'stroke="#fff" stroke-width="3" paint-order="stroke"'
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}" {halo}>{escape(words)}</text>'


def _frame(inside: str, top: float, start: float, end: float, title: str, words: str = "") -> str:
    """The plot with its axes: three lines of values, dates below."""
    out = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title, quote=True)}"><title>{escape(title)}</title>']
    for part in (0.0, 0.5, 1.0):
        y = _y(top * part, top)
        out.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="{GRID}"/>')
        if part != 0.5 or top >= 2:
            out.append(_text(LEFT - 5, y + 3.5, short(top * part), "end"))
    days = max(1, round((end - start) / DAY_S))
    every = max(1, -(-days // 10))
    for day in range(0, days, every):
        x = _x(start + day * DAY_S, start, end)
        if x < WIDTH - RIGHT - 36:
            out.append(_text(x, HEIGHT - 8, datetime.fromtimestamp(start + day * DAY_S, UTC).strftime("%d %b"), "start"))
        out.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{HEIGHT - BOTTOM}" y2="{HEIGHT - BOTTOM + 4}" stroke="{INK}"/>')
    return "".join([*out, inside, words, "</svg>"])


def _x(at: float, start: float, end: float) -> float:
    return LEFT + (WIDTH - LEFT - RIGHT) * (at - start) / max(end - start, 1.0)


def _scale(days: Sequence[int]) -> Callable[[int], tuple[float, float]]:
    """Where the bar of a day begins, and its width."""
    slot = (WIDTH - LEFT - RIGHT) / len(days)
    return lambda day: (LEFT + slot * day + slot * 0.1, max(slot * 0.8, 0.5))


def bars(days: Sequence[int], start: float, end: float, title: str) -> str:
    """A bar for each day."""
    top, place = nice(max(days, default=0)), _scale(days)
    out = []
    for day, n in enumerate(days):
        if n:
            x, width = place(day)
            out.append(f'<rect x="{x:.1f}" y="{_y(n, top):.1f}" width="{width:.1f}" height="{_y(0, top) - _y(n, top):.1f}" fill="{BLUE}"/>')
    return _frame("".join(out), top, start, end, title)


def stacked(parts: Sequence[tuple[str, Sequence[int]]], start: float, end: float, title: str) -> str:
    """A bar for each day, made of named parts, the largest first; those behind the fifth are one."""
    shown = list(parts[: len(COLOURS) - 1])
    rest = parts[len(shown) :]
    if rest:
        shown.append((f"{len(rest)} others", [sum(column) for column in zip(*(days for _, days in rest), strict=True)]))
    sums = [sum(column) for column in zip(*(days for _, days in shown), strict=True)]
    top, place = nice(max(sums, default=0)), _scale(sums)
    out = []
    low = [0] * len(sums)
    for (_, days), colour in zip(shown, COLOURS, strict=False):
        for day, n in enumerate(days):
            if n:
                x, width = place(day)
                high = _y(low[day] + n, top)
                out.append(f'<rect x="{x:.1f}" y="{high:.1f}" width="{width:.1f}" height="{_y(low[day], top) - high:.1f}" fill="{colour}"/>')
                low[day] += n
    return _frame("".join(out), top, start, end, title)


def legend(names: Sequence[tuple[str, int]]) -> str:
    """The colours of `stacked` with their names and sums, as HTML."""
    shown = list(names[: len(COLOURS) - 1])
    if len(names) > len(shown):
        shown.append((f"{len(names) - len(shown)} others", sum(n for _, n in names[len(shown) :])))
    spans = [f'<span><i style="background:{c}"></i>{escape(name)} {n:,}</span>' for (name, n), c in zip(shown, COLOURS, strict=False)]
    return f'<p class="legend">{"".join(spans)}</p>'


def steps(course: Sequence[Sequence[float]], bound: int, start: float, until: float, title: str, end: float) -> str:
    """How many were in use up to `until`, as an area of steps, and the bound as a dashed line where there is one; the axis ends at `end`."""
    top = nice(max([bound * 1.05, *(n for _, n in course)], default=0))
    points = []
    for i, (at, n) in enumerate(course):
        after = course[i + 1][0] if i + 1 < len(course) else until
        points += [f"{_x(at, start, end):.1f},{_y(n, top):.1f}", f"{_x(after, start, end):.1f},{_y(n, top):.1f}"]
    ground = f"{_x(until, start, end):.1f},{_y(0, top):.1f} {_x(course[0][0], start, end):.1f},{_y(0, top):.1f}"
    inside = f'<polygon points="{" ".join(points)} {ground}" fill="{BLUE}" fill-opacity=".25"/>'
    inside += f'<polyline points="{" ".join(points)}" fill="none" stroke="{BLUE}" stroke-width="1.5"/>'
    words = ""
    if bound:
        y = _y(bound, top)
        inside += f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="{RED}" stroke-width="1.5" stroke-dasharray="6 4"/>'
        words = _text(WIDTH - RIGHT - 2, y - 4 if y > TOP + 12 else y + 12, f"bought: {bound}", "end", RED)
    return _frame(inside, top, start, end, title, words)
