"""Curves as SVG: several runs in one chart, confidence bands, marks where a run resumed. Pure.

In: series of (x, y). Out: SVG that scales with the page and needs no script, as Markup: names are escaped.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

WIDTH, HEIGHT = 560, 220  # of a chart, in SVG units
LEFT, RIGHT, TOP, BOTTOM = 62, 10, 10, 28
COLOURS = ("#2563eb", "#d97706", "#059669", "#db2777", "#7c3aed", "#475569")
_MOST_POINTS = 400  # of a curve

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Curve:
    """One line of a chart.

    name: for the legend. points: (x, y), x ascending. colour: index into COLOURS, modulo its length. band:
    (x, low, high) around the line. dots: mark every point.
    """

    name: str
    points: Points
    colour: int = 0
    band: Sequence[tuple[float, float, float]] = ()
    dots: bool = False
    dashed: bool = False


@dataclass(frozen=True)
class Frame:
    """The range of values that a chart shows; x and y turn values into SVG units."""

    left: float
    right: float
    low: float
    high: float

    def x(self, value: float) -> float:
        """The horizontal position of a value, in SVG units."""
        span = (self.right - self.left) or 1.0
        return LEFT + (value - self.left) / span * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        """The vertical position of a value, in SVG units from the top."""
        span = (self.high - self.low) or 1.0
        return HEIGHT - BOTTOM - (value - self.low) / span * (HEIGHT - TOP - BOTTOM)


def chart(title: str, curves: Sequence[Curve], marks: Sequence[float] = (), *, unit: str = "step") -> Markup:
    """A `<figure>` with the curves; empty if no curve has a point.

    marks: x of dashed vertical lines, where a run resumed. unit: of x.
    """
    curves = [curve for curve in curves if curve.points]
    if not curves:
        return Markup()
    frame = _frame(curves)
    mark = Markup(
        '<line x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{bottom}" class="mark">'
        "<title>resumed from {unit} {value:g}</title></line>"
    )
    body = _axes(frame, unit)
    body += _join(
        mark.format(x=frame.x(value), top=TOP, bottom=HEIGHT - BOTTOM, unit=unit, value=value)
        for value in marks
        if frame.left <= value <= frame.right
    )
    body += _join(_line(frame, curve, unit) for curve in curves)
    values = [value for _, value in curves[0].points]
    summary = f"last {number(values[-1])}, least {number(min(values))}, most {number(max(values))}"
    caption = Markup("<small>{}</small>").format(summary)
    if len(curves) > 1:
        legend = _join(_legend_entry(curve) for curve in curves)
        caption = Markup('<span class="legend">{}</span>').format(legend)
    return Markup(
        "<figure><figcaption>{title}{caption}</figcaption>"
        '<svg viewBox="0 0 {width} {height}" role="img" aria-label="{label}">{body}</svg></figure>'
    ).format(
        title=title, caption=caption, width=WIDTH, height=HEIGHT, label=f"{title}: {summary}", body=body
    )  # fmt: skip


def number(value: float) -> str:
    """A number with four digits: 1.235, 12.35k, 2M, 1.00e-05."""
    if value == 0:
        return "0"
    if abs(value) >= 10_000 or abs(value) < 0.001:
        for power, sign in ((9, "G"), (6, "M"), (3, "k")):
            if abs(value) >= 10**power:
                return f"{value / 10**power:.4g}{sign}"
        return f"{value:.2e}"
    return f"{value:.4g}"


def _join(parts: Iterable[Markup]) -> Markup:
    return Markup().join(parts)


def _frame(curves: Sequence[Curve]) -> Frame:
    """The range of all curves and bands; from 0 where most of the range would be above 0 anyway."""
    xs = [x for curve in curves for x, _ in curve.points]
    ys = [y for curve in curves for _, y in curve.points]
    ys += [edge for curve in curves for _, low, high in curve.band for edge in (low, high)]
    low, high = min(ys), max(ys)
    if low == high:
        low, high = (0.0, 1.0) if low == 0 else sorted((low * 0.9, low * 1.1))
    if low > 0 and low < 0.4 * high:
        low = 0.0
    return Frame(min(xs), max(xs), low, high)


def _ticks(low: float, high: float, most: int) -> list[float]:
    """At most `most` + 1 round values from `low` to `high`, at steps of 1, 2 or 5 times a power of ten."""
    step = 10.0 ** math.floor(math.log10((high - low) / most)) if high > low else 1.0
    for factor in (1, 2, 5, 10):
        if (high - low) / (step * factor) <= most:
            step *= factor
            break
    first = math.ceil(low / step - 1e-9)
    return [n * step for n in range(first, math.floor(high / step + 1e-9) + 1)]


def _axes(frame: Frame, unit: str) -> Markup:
    """Horizontal grid lines and the labels of both axes."""
    grid = Markup(
        '<line x1="{left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}" class="grid"/>'
        '<text x="{label_x}" y="{label_y:.1f}" text-anchor="end">{label}</text>'
    )
    below = Markup('<text x="{x:.1f}" y="{y}" text-anchor="{anchor}">{label}</text>')
    parts = []
    for value in _ticks(frame.low, frame.high, 5):
        y = frame.y(value)
        ends = {"left": LEFT, "right": WIDTH - RIGHT, "label_x": LEFT - 6, "label_y": y + 4}
        parts.append(grid.format(y=y, label=number(value), **ends))
    for value in _ticks(frame.left, frame.right, 6):
        x = frame.x(value)
        anchor = "end" if x > WIDTH - 30 else "middle"
        parts.append(below.format(x=x, y=HEIGHT - 8, anchor=anchor, label=number(value)))
    parts.append(Markup('<text x="4" y="{}">{}</text>').format(HEIGHT - 8, unit))
    return _join(parts)


def _line(frame: Frame, curve: Curve, unit: str) -> Markup:
    """The band, the line and the dots of a curve; a dot's tooltip shows its exact value."""
    colour = COLOURS[curve.colour % len(COLOURS)]
    every = max(1, math.ceil(len(curve.points) / _MOST_POINTS))
    points = [*curve.points[::every]]
    if points[-1] != curve.points[-1]:
        points.append(curve.points[-1])
    line = Markup('<polyline points="{}" fill="none" stroke="{}" stroke-width="1.6"{}/>').format(
        _path(frame, points), colour, Markup(' stroke-dasharray="5 3"') if curve.dashed else ""
    )
    dot = Markup(
        '<circle cx="{:.1f}" cy="{:.1f}" r="{}" fill="{}"><title>{} {} {:g}: {:.6g}</title></circle>'
    )
    radius = 3 if curve.dots or len(points) == 1 else 1.6
    marked = points if curve.dots or len(points) <= 40 else points[:: math.ceil(len(points) / 40)]
    dots = _join(
        dot.format(frame.x(x), frame.y(y), radius, colour, curve.name, unit, x, y) for x, y in marked
    )
    return _band(frame, curve.band, colour) + line + dots


def _band(frame: Frame, band: Sequence[tuple[float, float, float]], colour: str) -> Markup:
    """The area between low and high; for a single point also a vertical bar, because its area is empty."""
    if not band:
        return Markup()
    edge = [(x, high) for x, _, high in band] + [(x, low) for x, low, _ in reversed(band)]
    area = Markup('<polygon points="{}" fill="{}" opacity="0.15"/>').format(_path(frame, edge), colour)
    if len(band) > 1:
        return area
    x, low, high = band[0]
    bar = Markup(
        '<line x1="{x:.1f}" x2="{x:.1f}" y1="{low:.1f}" y2="{high:.1f}" stroke="{colour}" '
        'opacity="0.4" stroke-width="3"/>'
    )
    return area + bar.format(x=frame.x(x), low=frame.y(low), high=frame.y(high), colour=colour)


def _path(frame: Frame, points: Points) -> str:
    return " ".join(f"{frame.x(x):.1f},{frame.y(y):.1f}" for x, y in points)


def _legend_entry(curve: Curve) -> Markup:
    return Markup('<i style="border-top:3px {} {}"></i>{} ').format(
        "dashed" if curve.dashed else "solid", COLOURS[curve.colour % len(COLOURS)], curve.name
    )
