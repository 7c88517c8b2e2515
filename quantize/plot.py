"""Draws points as an SVG: one file, no library, readable in light and dark. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from xml.sax.saxutils import escape

_WIDTH, _HEIGHT = 720, 420
_LEFT, _RIGHT, _TOP, _BOTTOM = 80, 150, 24, 56
_STYLE = (
    "text{font:12px system-ui,sans-serif;fill:#333}line{stroke:#bbb}circle{fill:#2f6f4f}"
    "@media(prefers-color-scheme:dark){text{fill:#ddd}line{stroke:#555}circle{fill:#7fc8a0}}"
)


def scatter(points: Sequence[tuple[str, float, float]], x_unit: str, y_unit: str) -> str:
    """Return an SVG of named points (name, x, y), both axes from 0 on."""
    x_ticks, y_ticks = _ticks(max(x for _, x, _ in points)), _ticks(max(y for _, _, y in points))
    width, height = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM
    floor = _HEIGHT - _BOTTOM

    def across(x: float) -> float:
        return _LEFT + width * x / x_ticks[-1]

    def up(y: float) -> float:
        return floor - height * y / y_ticks[-1]

    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}"><style>{_STYLE}</style>']
    parts += [f'<text x="{across(tick):.1f}" y="{floor + 18}" text-anchor="middle">{tick:g}</text>' for tick in x_ticks]
    for tick in y_ticks:
        parts.append(f'<line x1="{_LEFT}" x2="{_LEFT + width}" y1="{up(tick):.1f}" y2="{up(tick):.1f}"/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{up(tick) + 4:.1f}" text-anchor="end">{tick:g}</text>')
    parts.append(f'<text x="{_LEFT + width / 2:.1f}" y="{_HEIGHT - 14}" text-anchor="middle">{escape(x_unit)}</text>')
    parts.append(f'<text x="14" y="{_TOP - 8}">{escape(y_unit)}</text>')
    for name, x, y in points:
        parts.append(f'<circle cx="{across(x):.1f}" cy="{up(y):.1f}" r="4"/>')
        parts.append(f'<text x="{across(x) + 8:.1f}" y="{up(y) + 4:.1f}">{escape(name)}</text>')
    return "\n".join([*parts, "</svg>\n"])


def _ticks(largest: float) -> list[float]:
    """Return round numbers from 0 to at least the largest."""
    if largest <= 0:
        return [0.0, 1.0]
    power = 10.0 ** math.floor(math.log10(largest / 4))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor * 5 >= largest)
    return [step * count for count in range(math.ceil(largest / step) + 1)]
