"""Numbers within values that we pass on without a schema of our own."""

from __future__ import annotations

from typing import Any

from app.errors import RequestError

_LEAST, _END = -(2**63), 2**64  # what the processes' frames, and most programs behind them, have room for


def check_integers(value: Any, param: str) -> None:
    """Raise RequestError naming `param` for an integer in it, at any depth, that 64 bits do not hold."""
    rest = [value]
    while rest:
        item = rest.pop()
        if isinstance(item, dict):
            rest.extend(item.values())
        elif isinstance(item, list):
            rest.extend(item)
        elif isinstance(item, int) and not _LEAST <= item < _END:
            raise RequestError(f"'{param}' holds an integer of more than 64 bits: send a smaller one", param=param)
