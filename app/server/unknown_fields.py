"""`--unknown-fields warn`: what no list knows is left out, and named in a response header and in the log."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from app.errors import PestleError, UnknownFieldError
from app.observability.logging import get_logger

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from app.server.exchange import Exchange

HEADER = b"x-pestle-unknown-fields"
_MOST = 32  # fields; more is not a request of this API
_MOST_WORK = 8  # times the body may be decoded to find where a field is unknown

Asked = TypeVar("Asked")
Place = tuple[str | int, ...]

_log = get_logger(__name__)


def decode_without_unknown(body: bytes, decode: Callable[[bytes], Asked], exchange: Exchange) -> Asked:
    """Return the body decoded; fields that nobody knows are left out if the server was told so, else refused.

    Raises what `decode` raises.
    """
    for _ in range(_MOST):
        try:
            asked = decode(body)
        except UnknownFieldError as error:
            if not exchange.warns_of_unknown_fields or not error.path:
                raise
            last = error
            body = _without(body, error, decode)
            name = ".".join(error.path)[:100]
            if name not in exchange.unknown_fields:
                exchange.unknown_fields.append(name)
            continue
        if exchange.unknown_fields:
            _log.warning("fields that nobody knows were left out", extra={"fields": list(exchange.unknown_fields)})
        return asked
    raise last


def header_value(names: list[str]) -> bytes:
    """Return the names as a header may carry them."""
    return ", ".join(name.encode("unicode_escape").decode() for name in names).encode("ascii")


def _without(body: bytes, error: UnknownFieldError, decode: Callable[[bytes], Any]) -> bytes:
    """Return the body without the field that the error is about. Raises the error where that can't be done.

    It says nothing of where in an array the field is, and the same name may be known in the next element. So where
    there are several, each is tried alone.
    """
    try:
        document = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise error from None
    places = list(_places(document, error.path))
    if len(places) > 1:
        places = _unknown_places(document, places, error.path, decode, _MOST_WORK * len(body))
    if not places:
        raise error
    for place in places:
        _holder(document, place).pop(error.path[-1], None)
    return msgspec.json.encode(document)


def _unknown_places(
    document: Any, places: list[Place], path: tuple[str, ...], decode: Callable[[bytes], Any], room: int
) -> list[Place]:
    """Return the places where the field is unknown, as far as `room`, in bytes to decode, suffices."""
    found = []
    for place in places:
        alone = msgspec.json.encode(_narrowed(document, place))
        room -= len(alone)
        if room < 0:
            break
        if _is_unknown(alone, path, decode):
            found.append(place)
    return found


def _places(value: Any, path: tuple[str, ...]) -> Iterator[Place]:
    """Yield the keys and indices that lead to each object which has the path's last name."""
    if isinstance(value, list):
        for index, item in enumerate(value):
            yield from ((index, *place) for place in _places(item, path))
    elif isinstance(value, dict) and path[0] in value:
        if len(path) == 1:
            yield ()
        else:
            yield from ((path[0], *place) for place in _places(value[path[0]], path[1:]))


def _holder(value: Any, place: Place) -> dict[str, Any]:
    for step in place:
        value = value[step]
    found: dict[str, Any] = value
    return found


def _narrowed(value: Any, place: Place, *, in_array: bool = False) -> Any:
    """Return the value with nothing but this place on the way to it; objects in arrays keep what tells their kind."""
    if not place:
        return value
    step, *rest = place
    if isinstance(value, list):
        return [_narrowed(value[int(step)], tuple(rest), in_array=True)]
    others = value if in_array else {}
    return {**others, step: _narrowed(value[step], tuple(rest), in_array=in_array)}


def _is_unknown(body: bytes, path: tuple[str, ...], decode: Callable[[bytes], Any]) -> bool:
    try:
        decode(body)
    except UnknownFieldError as error:
        return error.path == path
    except PestleError:
        return False
    return False
