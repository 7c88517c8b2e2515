"""How long a client says that it waits, from the headers of its request."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING

from app.errors import RequestError
from app.pool.request import Patience

if TYPE_CHECKING:
    from collections.abc import Mapping

HEADER = "x-request-timeout"
SDK_HEADER = "x-stainless-read-timeout"  # what OpenAI's clients send by themselves

_DURATION = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)\s*(ms|s)?")


def client_patience(headers: Mapping[str, str]) -> Patience | None:
    """Return the shorter of what the two headers say; None when there is neither.

    Raises RequestError for an `x-request-timeout` that is no duration. OpenAI's own header is read as it is understood.
    """
    found = []
    for name in (HEADER, SDK_HEADER):
        if (value := headers.get(name)) is None:
            continue
        if (seconds := _seconds(value)) is not None:
            found.append(Patience(name, seconds))
        elif name == HEADER:
            raise RequestError(
                f"the header {HEADER!r} is {value[:32]!r}: send seconds above 0, as 30 or 2.5s, or 500ms", param=HEADER
            )
    return min(found, key=lambda patience: patience.seconds, default=None)


def _seconds(text: str) -> float | None:
    match = _DURATION.fullmatch(text.strip())
    if match is None:
        return None
    seconds = float(match[1]) / (1000 if match[2] == "ms" else 1)
    return seconds if 0 < seconds < math.inf else None
