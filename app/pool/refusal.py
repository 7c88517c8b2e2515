"""A child's refusal as the error that it names."""

from __future__ import annotations

from typing import TYPE_CHECKING

from app import errors

if TYPE_CHECKING:
    from app.messages import Refused


def refusal_error(refused: Refused) -> errors.PestleError:
    """Return the error of app.errors that a child's refusal names; EngineError for a name that is none."""
    named = getattr(errors, refused.error, None)
    if isinstance(named, type) and issubclass(named, errors.PestleError):
        return named(refused.message, param=refused.param)
    return errors.EngineError(f"{refused.error}: {refused.message}")
