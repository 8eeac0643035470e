"""Curves as SVG: several runs over each other, bands of confidence, marks where a run went on. Pure.

In: series of (x, y). Out: SVG text that scales with the page and needs no script. Called by the page.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 560, 220  # of a chart, in its own units
LEFT, RIGHT, TOP, BOTTOM = 62, 10, 10, 28
COLOURS = ("#2563eb", "#d97706", "#059669", "#db2777", "#7c3aed", "#475569")
_POINTS = 400  # of a curve at most

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Curve:
    """name: for the legend. band: (x, low, high) around it. dots: mark every point. colour: a number."""

    name: str
    points: Points
    colour: int = 0
    band: Sequence[tuple[float, float, float]] = ()
    dots: bool = False
    dashed: bool = False


@dataclass(frozen=True)
class Frame:
    """The window of a chart; x and y turn values into places."""

    left: float
    right: float
    low: float
    high: float

    def x(self, value: float) -> float:
        span = (self.right - self.left) or 1.0
        return LEFT + (value - self.left) / span * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        span = (self.high - self.low) or 1.0
        return HEIGHT - BOTTOM - (value - self.low) / span * (HEIGHT - TOP - BOTTOM)


def chart(title: str, curves: Sequence[Curve], marks: Sequence[float] = (), unit: str = "step") -> str:
    """A figure; empty text if no curve has a point. marks: x of dashed lines."""
    curves = [curve for curve in curves if curve.points]
    if not curves:
        return ""
    frame = _frame(curves)
    body = _axes(frame, unit)
    body += "".join(
        f'<line x1="{frame.x(x):.1f}" x2="{frame.x(x):.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}" class="mark">'
        f"<title>went on from {unit} {x:g}</title></line>"
        for x in marks
        if frame.left <= x <= frame.right
    )
    body += "".join(_draw(frame, curve, unit) for curve in curves)
    legend = ""
    if len(curves) > 1:
        legend = '<span class="legend">' + "".join(_key(curve) for curve in curves) + "</span>"
    values = [value for _, value in curves[0].points]
    caption = f"last {number(values[-1])}, least {number(min(values))}, most {number(max(values))}"
    label = f"{title}: {caption}"
    return (
        f"<figure><figcaption>{html.escape(title)}{legend or f'<small>{caption}</small>'}</figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{html.escape(label, quote=True)}">{body}</svg></figure>'
    )


def number(value: float) -> str:
    """A number in four digits, as people write it."""
    if value == 0:
        return "0"
    if abs(value) >= 10_000 or abs(value) < 0.001:
        for power, sign in ((9, "G"), (6, "M"), (3, "k")):
            if abs(value) >= 10**power:
                return f"{value / 10**power:.4g}{sign}"
        return f"{value:.2e}"
    return f"{value:.4g}"


def _frame(curves: Sequence[Curve]) -> Frame:
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
    step = 10.0 ** math.floor(math.log10((high - low) / most)) if high > low else 1.0
    for factor in (1, 2, 5, 10):
        if (high - low) / (step * factor) <= most:
            step *= factor
            break
    first = math.ceil(low / step - 1e-9)
    return [n * step for n in range(first, math.floor(high / step + 1e-9) + 1)]


def _axes(frame: Frame, unit: str) -> str:
    parts = []
    for value in _ticks(frame.low, frame.high, 5):
        y = frame.y(value)
        parts.append(
            f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" class="grid"/>'
            f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{number(value)}</text>'
        )
    for value in _ticks(frame.left, frame.right, 6):
        anchor = "end" if frame.x(value) > WIDTH - 30 else "middle"
        parts.append(
            f'<text x="{frame.x(value):.1f}" y="{HEIGHT - 8}" text-anchor="{anchor}">{number(value)}</text>'
        )
    parts.append(f'<text x="4" y="{HEIGHT - 8}">{html.escape(unit)}</text>')
    return "".join(parts)


def _draw(frame: Frame, curve: Curve, unit: str) -> str:
    colour = COLOURS[curve.colour % len(COLOURS)]
    parts = []
    if curve.band:
        edge = [(x, high) for x, _, high in curve.band] + [(x, low) for x, low, _ in reversed(curve.band)]
        around = " ".join(f"{frame.x(x):.1f},{frame.y(y):.1f}" for x, y in edge)
        parts.append(f'<polygon points="{around}" fill="{colour}" opacity="0.15"/>')
        if len(curve.band) == 1:
            x, low, high = curve.band[0]
            parts.append(
                f'<line x1="{frame.x(x):.1f}" x2="{frame.x(x):.1f}" y1="{frame.y(low):.1f}" '
                f'y2="{frame.y(high):.1f}" stroke="{colour}" opacity="0.4" stroke-width="3"/>'
            )
    every = max(1, math.ceil(len(curve.points) / _POINTS))
    points = [*curve.points[::every]]
    if points[-1] != curve.points[-1]:
        points.append(curve.points[-1])
    path = " ".join(f"{frame.x(x):.1f},{frame.y(y):.1f}" for x, y in points)
    dashes = ' stroke-dasharray="5 3"' if curve.dashed else ""
    parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.6"{dashes}/>')
    dots = points if curve.dots or len(points) <= 40 else points[:: math.ceil(len(points) / 40)]
    radius = 3 if curve.dots or len(points) == 1 else 1.6
    parts += [
        f'<circle cx="{frame.x(x):.1f}" cy="{frame.y(y):.1f}" r="{radius}" fill="{colour}">'
        f"<title>{html.escape(curve.name)} {html.escape(unit)} {x:g}: {y:.6g}</title></circle>"
        for x, y in dots
    ]
    return "".join(parts)


def _key(curve: Curve) -> str:
    colour = COLOURS[curve.colour % len(COLOURS)]
    style = "dashed" if curve.dashed else "solid"
    return f'<i style="border-top:3px {style} {colour}"></i>{html.escape(curve.name)} '
