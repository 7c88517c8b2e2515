"""How many prompt tokens a step may hold, so that streams keep their pace. Pure."""

from __future__ import annotations

LEAST_CHUNK = 32  # tokens of one prompt that are worth a pass over the weights

_SHORT_REST = 64  # tokens of a prompt that are not worth leaving: a pass of their own would cost a tenth more
_LONGEST_SECONDS = 0.25  # what prompts may cost the streams, a cancellation, and whoever comes next
_SHORTEST_SECONDS = 0.05
_STREAM_STEPS = 8  # by default, prompts may take so many times as long as a step of the streams
_LEAST_SHARE = 0.25  # of the target that prompts have in any case: else a slow device would never begin an answer
_WEIGHT_OF_NEWEST = 0.3
_LEAST_MEASURED = 16  # tokens; smaller chunks say more about overhead than about speed


class StepBudget:
    """Follows a target for the time between two tokens of a stream, from measured steps.

    Streams and prompts take turns, so that this time is a step of the streams and one of prompts.
    """

    def __init__(self, itl_target: float | None = None) -> None:
        """Start without a measurement. `itl_target`: seconds; None chooses it from the streams' steps."""
        self._itl_target = itl_target
        self._prompt_token_seconds: float | None = None
        self._stream_seconds: float | None = None

    @property
    def itl_target(self) -> float:
        """The seconds that may pass between two tokens of a stream."""
        if self._itl_target is not None:
            return self._itl_target
        if self._stream_seconds is None:
            return _LONGEST_SECONDS
        return min(max(_STREAM_STEPS * self._stream_seconds, _SHORTEST_SECONDS), _LONGEST_SECONDS)

    def observe_prompts(self, tokens: int, seconds: float) -> None:
        """Learn from a step of prompts that held this many tokens."""
        if tokens >= _LEAST_MEASURED:
            self._prompt_token_seconds = _follow(self._prompt_token_seconds, seconds / tokens)

    def observe_streams(self, seconds: float) -> None:
        """Learn from a step that held one token of each stream."""
        self._stream_seconds = _follow(self._stream_seconds, seconds)

    def prompt_tokens(self) -> int:
        """Return how many prompt tokens the next step of prompts should hold."""
        if self._prompt_token_seconds is None:
            return LEAST_CHUNK
        target = self.itl_target
        seconds = max(target - (self._stream_seconds or 0.0), _LEAST_SHARE * target)
        return max(LEAST_CHUNK, int(seconds / max(self._prompt_token_seconds, 1e-9)))

    def short_rest(self, tokens: int) -> int:
        """Return how many tokens a prompt's end may take a step over its `tokens`; a target that was set is kept."""
        return _SHORT_REST if self._itl_target is None else min(_SHORT_REST, tokens // 2)


def _follow(average: float | None, newest: float) -> float:
    return newest if average is None else average + _WEIGHT_OF_NEWEST * (newest - average)
