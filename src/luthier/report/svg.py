"""Small line charts as SVG that stands in a page, with the same in words for who cannot see them."""

from __future__ import annotations

import math
from collections.abc import Sequence

from luthier.page import text
from luthier.report.blocks import Plot, Series

_WIDTH, _HEIGHT = 720, 230
_LEFT, _RIGHT, _TOP, _BASE = 70, 12, 26, 190
_NAME = 22  # characters of a name in the picture
_POINTS = 400
"""Of a line with more points, what of each stretch is lowest and highest is drawn."""


def chart(plot: Plot, number: int) -> str:
    """A plot.

    Args:
        plot: has at least one point.
        number: of the plot in its page, for the ids.
    """
    guides = [Series(plot.diagonal, [(0.0, 0.0), (1.0, 1.0)])] if plot.diagonal else []
    lines = [*plot.series, *guides]
    xs = [x for one in lines for x, _ in one.points]
    ys = [y for one in lines for _, y in one.points]
    ticks = nice_ticks(min(ys), max(ys))
    low, high = min(ticks[0], min(ys)), max(ticks[-1], max(ys))
    left, right = min(xs), max(xs)

    def across(x: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * ((x - left) / (right - left) if right > left else 0.5)

    def down(y: float) -> float:
        return _BASE - (_BASE - _TOP) * ((y - low) / (high - low) if high > low else 0.5)

    parts = [
        f'<title id="t{number}">{text(plot.title)}</title><desc id="d{number}">{text(". ".join(plot.told()))}</desc>'
    ]
    for tick in ticks:
        y = f"{down(tick):.1f}"
        parts.append(f'<path class="axis" d="M{_LEFT} {y}H{_WIDTH - _RIGHT}"/>')
        parts.append(
            f'<text class="dim" x="{_LEFT - 8}" y="{down(tick) + 4:.1f}" text-anchor="end">{text(_short(tick))}</text>'
        )
    for tick in nice_ticks(left, right, 6):
        if left <= tick <= right and (guides or tick == int(tick)):
            x, shown = f"{across(tick):.1f}", f"{tick:g}" if guides else f"{int(tick):,}"
            parts.append(f'<text class="dim" x="{x}" y="{_BASE + 18}" text-anchor="middle">{shown}</text>')
    parts.append(
        f'<text class="dim" x="{_WIDTH - _RIGHT}" y="{_HEIGHT - 4}" text-anchor="end">{text(plot.along)}</text>'
    )
    begin = _LEFT
    for place, one in enumerate(lines):
        name = one.name if len(one.name) <= _NAME else f"{one.name[: _NAME - 1]}…"
        kind = f"curve c{place % 3}"
        points = [f"{across(x):.1f},{down(y):.1f}" for x, y in thinned(one).points]
        if len(points) > 1:
            parts.append(f'<polyline class="{kind}" points="{" ".join(points)}"/>')
        if len(points) <= 40 and one not in guides:
            at = (point.split(",") for point in points)
            parts += [f'<circle class="dot c{place % 3}" cx="{x}" cy="{y}" r="3"/>' for x, y in at]
        parts.append(f'<path class="{kind}" d="M{begin} 10h24"/><text x="{begin + 30}" y="14">{text(name)}</text>')
        begin += 46 + 8 * len(name)
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" height="{_HEIGHT}" role="img" '
        f'aria-labelledby="t{number} d{number}">{"".join(parts)}</svg>'
    )


def nice_ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers from ``low`` or below to about ``high``, at most so many."""
    span = high - low or abs(high) or 1.0
    raw = span / max(1, most - 1)
    power = 10 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= raw * (1 - 1e-9))
    first = math.floor(low / step + 1e-9)
    last = max(first + 1, math.ceil(high / step - 1e-9))
    return [round(number * step, 12) for number in range(first, last + 1)]


def thinned(series: Series) -> Series:
    """The lowest and the highest point of each stretch of a long line, in their order, so that no spike is lost."""
    points = series.points
    if len(points) <= _POINTS:
        return series
    size = math.ceil(len(points) / (_POINTS // 2))
    kept: list[tuple[float, float]] = []
    for begin in range(0, len(points), size):
        stretch: Sequence[tuple[float, float]] = points[begin : begin + size]
        kept += sorted({min(stretch, key=lambda p: p[1]), max(stretch, key=lambda p: p[1])})
    return Series(series.name, kept)


def _short(value: float) -> str:
    """A label of an axis."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 10 * size or (abs(value) >= size and size > 1e3):
            return f"{value / size:g}{letter}"
    return f"{value:g}" if value == 0 or abs(value) >= 1e-3 else f"{value:.2g}"
