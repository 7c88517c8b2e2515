"""Why a file of Pestle may differ from upstream's: the differences that have a good reason."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from gguf_compare import LAST_PLACE

if TYPE_CHECKING:
    from collections.abc import Iterator

    from gguf_compare import Comparison

# Tensors that may differ in the last bit of an f32, with the reason.
EXPLAINED = {
    re.compile(r"blk\.\d+\.ssm_a"): "upstream takes torch's exp, whose last bit depends on the kind of processor; "
    "Pestle rounds the true value",
}


def differences(result: Comparison) -> Iterator[tuple[str, str | None]]:
    """Yield what differs, and its reason if there is one."""
    for kind, lines in (("key", result.keys), ("tensor", result.tensors)):
        for what, difference in lines.items():
            yield f"{kind} `{what}`: {difference}", _reason(what, difference)
    for line in [*result.layout, *([result.failed] if result.failed else [])]:
        yield line, None


def _reason(what: str, difference: str) -> str | None:
    if not difference.endswith(LAST_PLACE):
        return None
    return next((reason for pattern, reason in EXPLAINED.items() if pattern.fullmatch(what)), None)
