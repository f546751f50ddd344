"""Drawing: lines -> HTML with an SVG. A browser shows it at once; a plotting library would take seconds.

# one line, steps 1 2 3, values 0 4 2  ->  <path d="M0 980L500 20L1000 500">, labels "1 2 3" (x) and "0 1 2 3 4" (y)

The SVG is stretched over its box, so labels are HTML elements, placed in per cent of the box. curves.js shows the
values under the pointer. Names are not trusted: they are escaped here, and set as text in curves.js.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from grpo.tracking.markup import inert

PALETTE = ("#3b7dd8", "#e8833a", "#2a9d6f", "#c94f7c", "#8a63d2", "#c9a227", "#2aa5b8", "#8c8c8c")
DASHES = ("", "6 4", "2 3", "10 3 2 3")
"""Dash patterns in pixels; the first is a whole line."""
_SIDE = 1000
"""Width and height of the SVG in its own units."""
_MARGIN = 0.02
"""Margin above and below the lines, as a share of the height."""
_FEW = 12
"""Lines of at most this many points also get dots."""


@dataclass(frozen=True)
class Line:
    """One line of a plot."""

    name: str
    steps: np.ndarray
    values: np.ndarray
    """Means over neighbouring steps if there are too many steps to draw."""
    lows: np.ndarray
    highs: np.ndarray
    """Minimum (`lows`) and maximum of those neighbours, so that spikes stay visible."""
    ends: tuple[float, float]
    """First and last step before neighbours were merged."""
    last: float
    """Newest value as it was logged."""
    color: int | None = None
    """Index of its color; None: the place of the line in its plot. Lines of one run have one color in all plots."""
    dash: int = 0
    """Index of its dash pattern, which tells the metrics of one run apart where several runs are shown."""


def plot(title: str, hint: str, lines: Sequence[Line]) -> str:
    """Return a plot with title and hint; an empty frame if there are no lines."""
    head = f"<h4>{inert(title)}</h4><p>{inert(hint)}</p>" if title else ""
    if not lines:
        return f"<section class='curve'>{head}<div class='plot nothing'>nothing yet</div></section>"
    across = (min(line.ends[0] for line in lines), max(line.ends[1] for line in lines))
    up = (min(float(line.lows.min()) for line in lines), max(float(line.highs.max()) for line in lines))
    x_ticks, y_ticks = ticks(*across, whole=True), ticks(*up)
    labels = [f"<i class='y' style='bottom:{_share(at, up, _MARGIN):.2%}'>{text}</i>" for at, text in y_ticks]
    labels += [f"<i class='x' style='left:{_share(at, across):.2%}'>{text}</i>" for at, text in x_ticks]
    grid = "".join(f"M0 {_down(at, up):.0f}H{_SIDE}" for at, _ in y_ticks)
    places = [index if line.color is None else line.color for index, line in enumerate(lines)]
    colors = [PALETTE[place % len(PALETTE)] for place in places]
    paths = "".join(_paths(line, color, across, up) for line, color in zip(lines, colors, strict=True))
    under_pointer = [
        {"name": line.name, "color": color, "steps": _short(line.steps), "values": _short(line.values)}
        for line, color in zip(lines, colors, strict=True)
    ]
    legend = "".join(
        f"<span>{_key_of(line, color)}{inert(line.name) if len(lines) > 1 else 'newest'} "
        f"<b>{readable(line.last)}</b></span>"
        for line, color in zip(lines, colors, strict=True)
    )
    return (
        f"<section class='curve'>{head}<div class='plot'><div class='area' "
        f'data-across="{inert(json.dumps(across))}" data-lines="{inert(json.dumps(under_pointer))}">'
        f"<svg viewBox='0 0 {_SIDE} {_SIDE}' preserveAspectRatio='none' role='img' aria-label=\"{inert(title)}\">"
        f"<path class='grid' d='{grid}'/>{paths}</svg>{''.join(labels)}</div></div><div class='legend'>{legend}</div>"
        "</section>"
    )


def dot(color: int) -> str:
    """Return a dot in the color of a run."""
    return f"<u style='background:{PALETTE[color % len(PALETTE)]}'></u>"


def _key_of(line: Line, color: str) -> str:
    """Return the line's sign in the legend: a dot, or a piece of the dashed line."""
    dash = DASHES[line.dash % len(DASHES)]
    if not dash:
        return f"<u style='background:{color}'></u>"
    return (
        f"<svg class='key' viewBox='0 0 26 4'><path d='M0 2H26' stroke='{color}' stroke-width='3' "
        f"stroke-dasharray='{dash}'/></svg>"
    )


def ticks(low: float, high: float, *, whole: bool = False, most: int = 6) -> list[tuple[float, str]]:
    """Return about `most` round numbers from `low` to `high` with their labels. `whole` = integers, for steps.

    # 0.571 0.612  ->  0.58 0.59 0.60 0.61;   1 85000, whole  ->  20,000 40,000 60,000 80,000
    """
    if high <= low:
        return [(low, readable(low))]
    rough = (high - low) / most
    size = 10.0 ** math.floor(math.log10(rough))
    size *= next(times for times in (1, 2, 5, 10) if times * size >= rough * 0.999)
    if whole:
        size = max(1.0, size)
    places = max(0, -math.floor(math.log10(size) + 1e-9))
    first, last = math.ceil(low / size - 1e-9), math.floor(high / size + 1e-9)
    marks = [index * size for index in range(first, last + 1)]
    return [(mark, f"{mark:,.{places}f}" if places <= 5 else f"{mark:.3g}") for mark in marks]


def readable(value: float) -> str:
    """Format a number with about four digits: 1,234, 0.1234, 1.23e-07."""
    if value == 0 or 1e-4 <= abs(value) < 1000:
        return f"{value:.4g}"
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e7 else f"{value:.2e}"


def _paths(line: Line, color: str, across: tuple[float, float], up: tuple[float, float]) -> str:
    x = np.rint(_share(line.steps, across) * _SIDE).astype(int).tolist()
    y = np.rint(_down(line.values, up)).astype(int).tolist()
    stroke, dash = f"fill='none' stroke='{color}'", DASHES[line.dash % len(DASHES)]
    dashed = f" stroke-dasharray='{dash}'" if dash else ""
    drawn = f"<path {stroke}{dashed} d='M{'L'.join(f'{a} {b}' for a, b in zip(x, y, strict=True))}'/>"
    if len(x) <= _FEW:
        drawn += f"<path class='dots' {stroke} d='{''.join(f'M{a} {b}h0' for a, b in zip(x, y, strict=True))}'/>"
    if np.any(line.highs > line.lows):
        tops, bottoms = (np.rint(_down(edge, up)).astype(int).tolist() for edge in (line.highs, line.lows))
        edge = [*zip(x, tops, strict=True), *zip(x[::-1], bottoms[::-1], strict=True)]
        drawn = f"<path class='band' fill='{color}' d='M{'L'.join(f'{a} {b}' for a, b in edge)}Z'/>" + drawn
    return drawn


def _share(value, within: tuple[float, float], margin: float = 0.0):  # type: ignore[no-untyped-def]
    """Return the position of a number or an array within the limits, 0 to 1; the middle if both limits are equal."""
    low, high = within
    inside = (value - low) / (high - low) if high > low else value * 0 + 0.5
    return margin + (1 - 2 * margin) * inside


def _down(value, up: tuple[float, float]):  # type: ignore[no-untyped-def]
    """Return the y coordinate in units of the SVG, with 0 at the top."""
    return (1 - _share(value, up, _MARGIN)) * _SIDE


def _short(values: np.ndarray) -> list[float]:
    """Round values to five digits."""
    return [float(f"{value:.5g}") if value % 1 else int(value) for value in values.tolist()]
