"""Draws SVGs: one file, no library, readable in light and dark. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple
from xml.sax.saxutils import escape

_WIDTH, _HEIGHT = 720, 420
_LEFT, _RIGHT, _TOP, _BOTTOM = 80, 150, 24, 56
_ACROSS, _UP = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM
_FLOOR = _HEIGHT - _BOTTOM
_STYLE = (
    "text{font:12px system-ui,sans-serif;fill:#333}line{stroke:#bbb}circle{fill:#2f6f4f}"
    ".note{font-size:10px;fill:#777}polyline{fill:none;stroke-width:1.5}"
    "@media(prefers-color-scheme:dark){text{fill:#ddd}line{stroke:#555}circle{fill:#7fc8a0}.note{fill:#999}}"
)
_FAINTEST = 0.25


class Point(NamedTuple):
    """A named point; `strength`, a number with a unit, is written beside it, and shown by how solid its circle is."""

    name: str
    x: float
    y: float
    strength: float = 1.0
    unit: str = ""


def scatter(points: Sequence[Point], x_unit: str, y_unit: str) -> str:
    """Return an SVG of named points, both axes from 0 on."""
    x_ticks, y_ticks = _ticks(max(point.x for point in points)), _ticks(max(point.y for point in points))
    strongest = max(point.strength for point in points)
    parts = _axes(x_ticks, y_ticks, x_unit, y_unit)
    for name, x, y, strength, unit in points:
        left, top = _LEFT + _ACROSS * x / x_ticks[-1], _FLOOR - _UP * y / y_ticks[-1]
        solid = _FAINTEST + (1 - _FAINTEST) * (strength / strongest if strongest else 1)
        parts.append(f'<circle cx="{left:.1f}" cy="{top:.1f}" r="6" fill-opacity="{solid:.2f}"/>')
        parts.append(f'<text x="{left + 10:.1f}" y="{top + 4:.1f}">{escape(name)}</text>')
        if unit:
            note = escape(f"{strength:.3g} {unit}")
            parts.append(f'<text class="note" x="{left + 10:.1f}" y="{top + 16:.1f}">{note}</text>')
    return "\n".join([*parts, "</svg>\n"])


def curves(named: Mapping[str, Sequence[tuple[float, float]]], x_unit: str, y_unit: str) -> str:
    """Return an SVG of named curves, each of points (x, y) in the order of x; both axes from 0 on."""
    points = [point for curve in named.values() for point in curve]
    x_ticks, y_ticks = _ticks(max(x for x, _ in points)), _ticks(max(y for _, y in points))
    parts = _axes(x_ticks, y_ticks, x_unit, y_unit)
    rows = max(12.0, min(18.0, _UP / max(len(named), 1)))
    for number, (name, curve) in enumerate(named.items()):
        colour = f"hsl({360 * number / len(named):.0f} 60% 48%)"
        places = [(_LEFT + _ACROSS * x / x_ticks[-1], _FLOOR - _UP * y / y_ticks[-1]) for x, y in curve]
        line = " ".join(f"{left:.1f},{top:.1f}" for left, top in places)
        parts.append(f'<polyline points="{line}" style="stroke:{colour}"/>')
        parts += [f'<circle cx="{left:.1f}" cy="{top:.1f}" r="2" style="fill:{colour}"/>' for left, top in places]
        top = _TOP + rows * (number + 1)
        left = _LEFT + _ACROSS + 12
        parts.append(f'<circle cx="{left}" cy="{top - 4:.1f}" r="4" style="fill:{colour}"/>')
        parts.append(f'<text x="{left + 9}" y="{top:.1f}">{escape(name)}</text>')
    return "\n".join([*parts, "</svg>\n"])


def _axes(x_ticks: Sequence[float], y_ticks: Sequence[float], x_unit: str, y_unit: str) -> list[str]:
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}"><style>{_STYLE}</style>']
    for tick in x_ticks:
        left = _LEFT + _ACROSS * tick / x_ticks[-1]
        parts.append(f'<text x="{left:.1f}" y="{_FLOOR + 18}" text-anchor="middle">{tick:g}</text>')
    for tick in y_ticks:
        top = _FLOOR - _UP * tick / y_ticks[-1]
        parts.append(f'<line x1="{_LEFT}" x2="{_LEFT + _ACROSS}" y1="{top:.1f}" y2="{top:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{top + 4:.1f}" text-anchor="end">{tick:g}</text>')
    parts.append(f'<text x="{_LEFT + _ACROSS / 2:.1f}" y="{_HEIGHT - 14}" text-anchor="middle">{escape(x_unit)}</text>')
    parts.append(f'<text x="14" y="{_TOP - 8}">{escape(y_unit)}</text>')
    return parts


def _ticks(largest: float) -> list[float]:
    """Return round numbers from 0 to at least the largest."""
    if largest <= 0:
        return [0.0, 1.0]
    power = 10.0 ** math.floor(math.log10(largest / 4))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor * 5 >= largest)
    return [step * count for count in range(math.ceil(largest / step) + 1)]
