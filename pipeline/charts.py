"""Charts as SVG text that takes its colours from the page: line charts and column charts.

Nothing here is scripted, and every label that came from data is escaped.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

POINTS = 300
"""As many as a line needs: more than one a pixel or two cannot be seen."""
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 14, 14, 44


@dataclass(frozen=True)
class Series:
    """A line: its name in the legend and its points (x, y) in order of x."""

    label: str
    points: Sequence[Sequence[float]]


@dataclass(frozen=True)
class Axis:
    """One direction: data range to pixels, linear or logarithmic."""

    low: float
    high: float
    start: float
    end: float
    log: bool

    def __call__(self, value: float) -> float:
        """Pixel of a value."""
        low, high, at = float(self.low), float(self.high), float(value)
        if self.log:
            low, high, at = math.log10(low), math.log10(high), math.log10(at)
        return self.start + (self.end - self.start) * (at - low) / (high - low)

    def ticks(self) -> list[float]:
        """About five round values inside the range; whole decades on a logarithmic axis."""
        if self.log:
            first, last = math.ceil(math.log10(self.low)), math.floor(math.log10(self.high))
            step = max(1, math.ceil((last - first) / 6))
            return [10.0**e for e in range(first, last + 1, step)]
        unit = _round_step((self.high - self.low) / 5)
        first, last = math.ceil(self.low / unit - 1e-9), math.floor(self.high / unit + 1e-9)
        return [i * unit for i in range(first, last + 1)]


def lines(
    series: Sequence[Series],
    *,
    title: str,
    x_label: str,
    y_label: str,
    log: bool = False,
    y_range: tuple[float, float] | None = None,
    mark: float | None = None,
    mark_label: str = "",
    events: Sequence[float] = (),
    width: int = 760,
    height: int = 320,
) -> Markup:
    """A line chart; `log` makes both axes logarithmic and says so, `mark` draws a level across.

    `events` are places on the x axis where something happened.

    Points that an axis has no place for (0 on a logarithmic one) are left out. Returns an empty
    string if nothing is left.
    """
    kept = [
        Series(s.label, [p for p in s.points if not log or (p[0] > 0 and p[1] > 0)]) for s in series
    ]
    xs = [p[0] for s in kept for p in s.points]
    ys = [p[1] for s in kept for p in s.points]
    if not xs:
        return Markup("")
    x = Axis(*_range(xs, log), _LEFT, width - _RIGHT, log)
    y = Axis(*(y_range or _range(ys, log)), height - _BOTTOM, _TOP, log)
    scale = ", logarithmic" * log
    parts = [_frame(x, y, width, height, x_label + scale, y_label + scale)]
    if mark is not None and y.low < mark < y.high:
        level = y(mark)
        parts.append(
            f'<line class="mark" x1="{_LEFT}" x2="{width - _RIGHT}" y1="{level:.1f}"'
            f' y2="{level:.1f}"/><text class="tick" x="{width - _RIGHT}" y="{level - 5:.1f}"'
            f' text-anchor="end">{escape(mark_label)}</text>'
        )
    for event in events:
        if x.low <= event <= x.high:
            at_x = f"{x(event):.1f}"
            parts.append(
                f'<line class="event" x1="{at_x}" x2="{at_x}" y1="{_TOP}" y2="{height - _BOTTOM}"/>'
            )
    for number, line in enumerate(kept):
        if not line.points:
            continue
        path = " ".join(f"{x(p[0]):.1f},{y(p[1]):.1f}" for p in line.points)
        if len(line.points) == 1:
            at = path.split(",")
            parts.append(f'<circle class="dot s{number}" cx="{at[0]}" cy="{at[1]}" r="3"/>')
        parts.append(f'<polyline class="line s{number}" points="{path}"/>')
    return _svg(parts, title, width, height)


def columns(
    bins: Mapping[str, int], *, title: str, x_label: str, width: int = 380, height: int = 200
) -> Markup:
    """A column chart over labelled bins, in the order given; the exact number is a tooltip."""
    if not bins:
        return Markup("")
    top, bottom, left = 22, 40, 6
    tallest = max(max(bins.values()), 1)
    step = (width - 2 * left) / len(bins)
    wide = min(step * 0.82, 56.0)
    every = -(-len(bins) // max(1, int((width - 2 * left) / 44)))
    parts = []
    for number, (label, count) in enumerate(bins.items()):
        middle = left + step * (number + 0.5)
        tall = (height - top - bottom) * count / tallest
        base = height - bottom
        parts.append(
            f'<rect class="column" x="{middle - wide / 2:.1f}" y="{base - tall:.1f}"'
            f' width="{wide:.1f}" height="{tall:.1f}">'
            f"<title>{escape(label)}: {count:,}</title></rect>"
        )
        if len(bins) <= 12:
            parts.append(
                f'<text class="value" x="{middle:.1f}" y="{base - tall - 5:.1f}"'
                f' text-anchor="middle">{short(count)}</text>'
            )
        if number % every == 0:
            parts.append(
                f'<text class="tick" x="{middle:.1f}" y="{base + 14}"'
                f' text-anchor="middle">{escape(label)}</text>'
            )
    parts.append(
        f'<line class="axis" x1="{left}" x2="{width - left}" y1="{height - bottom}"'
        f' y2="{height - bottom}"/><text class="label" x="{width / 2:.0f}" y="{height - 8}"'
        f' text-anchor="middle">{escape(x_label)}</text>'
    )
    return _svg(parts, title, width, height)


def thin(points: Sequence[tuple[float, float]], limit: int = POINTS) -> list[list[float]]:
    """At most `limit` points, each the mean of as many neighbours as the others."""
    size = group_size(len(points), limit)
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [
        [group[-1][0], float(f"{sum(value for _, value in group) / len(group):.6g}")]
        for group in groups
    ]


def group_size(points: int, limit: int = POINTS) -> int:
    """How many neighbours each point that `thin` leaves is the mean of."""
    return max(1, -(-points // limit))


def short(value: float) -> str:
    """A number in at most four characters or so: 2e-4, 950, 12k, 3.4M, 400M."""
    if 0 < abs(value) < 0.001:
        return _exponent(value)
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size * 0.9995:
            scaled = value / size
            return (
                f"{scaled:.0f}{unit}"
                if scaled >= 99.95
                else f"{scaled:.1f}".rstrip("0").rstrip(".") + unit
            )
    return f"{value:.3g}"


def _exponent(value: float) -> str:
    digits, exponent = f"{value:.1e}".split("e")
    return f"{float(digits):g}e{int(exponent)}"


def _frame(x: Axis, y: Axis, width: int, height: int, x_label: str, y_label: str) -> str:
    parts = []
    y_ticks = y.ticks()
    exponents = 0 < max(map(abs, y_ticks), default=0) <= 0.01  # of all, or of none
    for tick in y_ticks:
        at = y(tick)
        parts.append(
            f'<line class="grid" x1="{_LEFT}" x2="{width - _RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>'
            f'<text class="tick" x="{_LEFT - 8}" y="{at + 4:.1f}" text-anchor="end">'
            f"{_exponent(tick) if exponents and tick else short(tick)}</text>"
        )
    for tick in x.ticks():
        at = x(tick)
        parts.append(
            f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="{_TOP}" y2="{height - _BOTTOM}"/>'
            f'<text class="tick" x="{at:.1f}" y="{height - _BOTTOM + 16}" text-anchor="middle">'
            f"{short(tick)}</text>"
        )
    middle = (_TOP + height - _BOTTOM) / 2
    parts.append(
        f'<line class="axis" x1="{_LEFT}" x2="{width - _RIGHT}" y1="{height - _BOTTOM}"'
        f' y2="{height - _BOTTOM}"/>'
        f'<text class="label" x="{(_LEFT + width - _RIGHT) / 2:.0f}" y="{height - 8}"'
        f' text-anchor="middle">{escape(x_label)}</text>'
        f'<text class="label" transform="translate(14 {middle:.0f}) rotate(-90)"'
        f' text-anchor="middle">{escape(y_label)}</text>'
    )
    return "".join(parts)


def _svg(parts: Sequence[str], title: str, width: int, height: int) -> Markup:
    return Markup(
        f'<svg viewBox="0 0 {width} {height}" role="img" style="max-width:{width}px">'
        f"<title>{escape(title)}</title>{''.join(parts)}</svg>"
    )


def _range(values: Sequence[float], log: bool) -> tuple[float, float]:
    low, high = min(values), max(values)
    if log:
        return low, max(high, low * 10)
    if low >= 0 and low < high / 2:
        low = 0.0  # a curve that falls far is read from zero
    pad = (high - low) * 0.05 or abs(high) or 1.0
    return (low if low == 0 else low - pad), high + pad


def _round_step(step: float) -> float:
    power = 10.0 ** math.floor(math.log10(step))
    return next((m * power for m in (1, 2, 5) if step <= m * power * 1.0001), 10 * power)
