"""The card for people: FILE.card.md, and a plot of every layer's error beside it. Pure."""

from __future__ import annotations

import collections
import re

from app.models.card import PLOT_SUFFIX, Card
from app.models.card_words import card_rows
from quantize.plot import curves

_LAYER = re.compile(r"blk\.(\d+)\.(.+)")


def page(card: Card) -> str:
    """Return the card as Markdown."""
    lines = [f"# {card.file.name}", "", "| | |", "|---|---|"]
    lines += [f"| {name} | {_cell(value)} |" for name, value in card_rows(card)]
    lines += ["", f"The sha256 ties this card to its file; `{card.file.name}` is another file if it differs."]
    if error_plot(card):
        plot = card.file.name + PLOT_SUFFIX
        lines += ["", f"![relative error of each layer's tensors](<{plot}>)"]
    lines += ["", "Relative error: the root mean square of what changed, divided by that of the weights.", ""]
    lines += ["| tensor | type | shape | bytes | relative error |", "|---|---|---|---:|---:|"]
    for tensor in card.tensors:
        error = "" if tensor.relative_error is None else f"{tensor.relative_error:.4%}"
        shape = " × ".join(map(str, tensor.shape))
        lines.append(f"| {tensor.name} | {tensor.type} | {shape} | {tensor.bytes:,} | {error} |")
    return "\n".join([*lines, ""])


def error_plot(card: Card) -> str | None:
    """Return an SVG of the relative error by layer, a curve for each kind of tensor; None if there is none."""
    named = collections.defaultdict[str, list[tuple[float, float]]](list)
    for tensor in card.tensors:
        match = _LAYER.fullmatch(tensor.name)
        if tensor.relative_error and match:
            named[match[2].removesuffix(".weight")].append((float(match[1]), 100 * tensor.relative_error))
    ordered = {name: sorted(named[name]) for name in sorted(named)}
    return curves(ordered, "layer", "relative error, %") if named else None


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
