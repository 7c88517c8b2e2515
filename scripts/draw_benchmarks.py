"""Draw the times of docs/benchmarks.md, upstream's against Pestle's, as docs/quantization.svg.

    python scripts/draw_benchmarks.py [--page docs/benchmarks.md] [--model NAME] [--out docs/quantization.svg]

The figures come from the table that scripts/bench_quantize.py writes; the model is the last one in it. Ends with 2 if
there is no such table.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple
from xml.sax.saxutils import escape

from bench_quantize import HEADING

_UPSTREAM = re.compile(r"([\d.]+) \(([\d.]+) \+ ([\d.]+)\)")
_WIDTH, _LEFT, _RIGHT, _TOP = 760, 230, 70, 58
_BAR, _STEP = 14, 44  # heights: of a bar, of a type's two bars and the space below them
_STYLE = (
    "text{font:12px system-ui,sans-serif;fill:#333}.title{font-size:14px;font-weight:600}.note{fill:#777}"
    ".convert{fill:#b9b9b9}.quantize{fill:#8d8d8d}.pestle{fill:#2f6f4f}"
    "@media(prefers-color-scheme:dark){text{fill:#ddd}.note{fill:#999}.convert{fill:#5d5d5d}.quantize{fill:#858585}"
    ".pestle{fill:#7fc8a0}}"
)


class Times(NamedTuple):
    """Seconds that a type took: upstream's two steps, and Pestle."""

    type_name: str
    convert: float
    quantize: float
    pestle: float


def main() -> int:
    """Run from the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--page", type=Path, default=Path("docs/benchmarks.md"))
    parser.add_argument("--model", help="as the table names it")
    parser.add_argument("--out", type=Path, default=Path("docs/quantization.svg"))
    asked = parser.parse_args()
    measured = read_times(asked.page.read_text(encoding="utf-8"))
    model = asked.model or next(reversed(measured), "")
    if not measured.get(model):
        print(f"{asked.page}: no times of {model or 'any model'} under {HEADING!r}", file=sys.stderr)
        return 2
    asked.out.write_text(draw(model, measured[model]), encoding="utf-8")
    return 0


def read_times(page: str) -> dict[str, list[Times]]:
    """Return the times of each model in the table, in its order."""
    section = page.partition(f"{HEADING}\n")[2].partition("\n## ")[0]
    times: dict[str, list[Times]] = {}
    for line in section.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) > 3 and (upstream := _UPSTREAM.fullmatch(cells[2])):
            row = Times(cells[1], float(upstream[2]), float(upstream[3]), float(cells[3]))
            times.setdefault(cells[0], []).append(row)
    return times


def draw(model: str, rows: Sequence[Times]) -> str:
    """Return an SVG that is readable on light and on dark paper: two bars for each type."""
    longest = max(row.convert + row.quantize for row in rows)
    scale = (_WIDTH - _LEFT - _RIGHT) / max(longest, *(row.pestle for row in rows))
    height = _TOP + _STEP * len(rows)
    says = f"Seconds to quantize {model}, upstream against Pestle"
    bars = (part for place, row in enumerate(rows) for part in _bars(row, _TOP + _STEP * place, scale))
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" role="img">'
    head += f"<title>{escape(says)}</title><style>{_STYLE}</style>"
    return "\n".join([head, *_legend(model), *bars, "</svg>\n"])


def _legend(model: str) -> Iterator[str]:
    yield f'<text class="title" x="8" y="18">{escape(model)}: seconds from safetensors to GGUF</text>'
    left = 8
    for kind, words in (("convert", "convert_hf_to_gguf.py"), ("quantize", "llama-quantize"), ("pestle", "Pestle")):
        yield f'<rect class="{kind}" x="{left}" y="30" width="10" height="10"/>'
        yield f'<text class="note" x="{left + 15}" y="39">{words}</text>'
        left += 35 + 7 * len(words)


def _bars(row: Times, top: int, scale: float) -> Iterator[str]:
    first, second, ours = (value * scale for value in (row.convert, row.quantize, row.pestle))
    upstream = row.convert + row.quantize
    yield f'<text x="{_LEFT - 10}" y="{top + _BAR + 5}" text-anchor="end">{escape(row.type_name)}</text>'
    yield f'<rect class="convert" x="{_LEFT}" y="{top}" width="{first:.1f}" height="{_BAR}"/>'
    yield f'<rect class="quantize" x="{_LEFT + first:.1f}" y="{top}" width="{second:.1f}" height="{_BAR}"/>'
    yield f'<text class="note" x="{_LEFT + first + second + 6:.1f}" y="{top + _BAR - 3}">{upstream:.1f} s</text>'
    yield f'<rect class="pestle" x="{_LEFT}" y="{top + _BAR + 2}" width="{ours:.1f}" height="{_BAR}"/>'
    said = f"{row.pestle:.1f} s, {upstream / row.pestle:.1f} times as fast"
    yield f'<text x="{_LEFT + ours + 6:.1f}" y="{top + 2 * _BAR - 1}">{said}</text>'


if __name__ == "__main__":
    sys.exit(main())
