"""`--unknown-fields warn`: what no list knows is left out, and named in a response header and in the log."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from app.errors import UnknownFieldError
from app.observability.logging import get_logger

if TYPE_CHECKING:
    from collections.abc import Callable

    from app.server.exchange import Exchange

HEADER = b"x-pestle-unknown-fields"
_MOST = 32  # fields; more is not a request of this API

Asked = TypeVar("Asked")

_log = get_logger(__name__)


def decode_without_unknown(body: bytes, decode: Callable[[bytes], Asked], exchange: Exchange) -> Asked:
    """Return the body decoded; fields that nobody knows are left out if the server was told so, else refused.

    Raises what `decode` raises.
    """
    while True:
        try:
            asked = decode(body)
        except UnknownFieldError as error:
            if not exchange.warns_of_unknown_fields or len(exchange.unknown_fields) >= _MOST or not error.path:
                raise
            try:
                document = msgspec.json.decode(body)
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
                raise error from None
            if not _remove(document, error.path):
                raise
            exchange.unknown_fields.append(".".join(error.path)[:100])
            body = msgspec.json.encode(document)
            continue
        if exchange.unknown_fields:
            _log.warning("fields that nobody knows were left out", extra={"fields": list(exchange.unknown_fields)})
        return asked


def header_value(names: list[str]) -> bytes:
    """Return the names as a header may carry them."""
    return ", ".join(name.encode("unicode_escape").decode() for name in names).encode("ascii")


def _remove(value: Any, path: tuple[str, ...]) -> bool:
    """Remove the last name of the path wherever the names before it lead, through arrays too; return whether it was."""
    if isinstance(value, list):
        removed = [_remove(item, path) for item in value]
        return any(removed)
    if not isinstance(value, dict):
        return False
    name, *rest = path
    if rest:
        return name in value and _remove(value[name], tuple(rest))
    return value.pop(name, value) is not value
