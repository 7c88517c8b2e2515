"""Where a JSON value ends, in a text that grows."""

from __future__ import annotations

import re

_OUTSIDE_STRINGS = re.compile(r'["{}\[\]]')
_INSIDE_STRINGS = re.compile(r'["\\]')


class Brackets:
    """Follows the brackets of one JSON object or array from its first character on."""

    def __init__(self, start: int = 0) -> None:
        """Expect the value at this place of the text."""
        self._at = start
        self._depth = 0
        self._in_string = False

    def end(self, text: str) -> int:
        """Return the place behind the value, or -1 if it isn't there yet. `text` is the earlier text and more."""
        while True:
            found = (_INSIDE_STRINGS if self._in_string else _OUTSIDE_STRINGS).search(text, self._at)
            if found is None:
                self._at = len(text)
                return -1
            character = found[0]
            if character == "\\":
                if found.end() == len(text):
                    self._at = found.start()
                    return -1
                self._at = found.end() + 1
                continue
            self._at = found.end()
            if character == '"':
                self._in_string = not self._in_string
            elif character in "{[":
                self._depth += 1
            else:
                self._depth -= 1
                if self._depth <= 0:
                    return self._at
