"""Owning a pointer of llama.cpp: freed exactly once, never used afterwards."""

from __future__ import annotations

from typing import Any, Self

from app.errors import EngineError


class Handle:
    """A pointer that llama.cpp gave us and wants back. Close it, or use it as a context manager."""

    def __init__(self, pointer: Any) -> None:
        """Take ownership of a pointer that is not null."""
        self._pointer: Any = pointer

    @property
    def pointer(self) -> Any:
        """The raw pointer. Raises EngineError when the handle is closed: llama.cpp would crash."""
        if self._pointer is None:
            raise EngineError(f"this {type(self).__name__} is closed")
        return self._pointer

    @property
    def closed(self) -> bool:
        """Whether the pointer has been given back."""
        return self._pointer is None

    def close(self) -> None:
        """Give the pointer back; closing again does nothing."""
        pointer, self._pointer = self._pointer, None
        if pointer is not None:
            self._free(pointer)

    def _free(self, pointer: Any) -> None:
        raise NotImplementedError

    def __enter__(self) -> Self:
        """Return the handle itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close."""
        self.close()
