"""A child's refusal as the error that it names."""

from __future__ import annotations

from typing import TYPE_CHECKING

from app import errors

if TYPE_CHECKING:
    from app.messages import Refused


def refusal_error(refused: Refused) -> errors.PestleError:
    """Return the error of app.errors that a child's refusal names."""
    return named_error(refused.error, refused.message, refused.param)


def named_error(name: str, message: str, param: str | None = None) -> errors.PestleError:
    """Return the error of app.errors with this name; EngineError for a name that is none."""
    named = getattr(errors, name, None)
    if isinstance(named, type) and issubclass(named, errors.PestleError):
        return named(message, param=param)
    return errors.EngineError(f"{name}: {message}")
