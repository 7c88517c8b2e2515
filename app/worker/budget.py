"""How many prompt tokens a step may hold, so that streams keep their pace. Pure."""

from __future__ import annotations

LEAST_CHUNK = 32  # tokens of one prompt that are worth a pass over the weights
_GOOD_CHUNK = 64  # whose multiples llama.cpp's kernels compute the fastest; 48 tokens cost a seventh more each

_SHORT_REST = 64  # tokens of a prompt that are not worth leaving: a pass of their own would cost a tenth more
_LONGEST_SECONDS = 0.25  # what prompts may cost the streams, a cancellation, and whoever comes next
_SHORTEST_SECONDS = 0.05
_STREAM_STEPS = 8  # by default, prompts may take so many times as long as a step of the streams
_STRETCH = 1.25  # of the target, for the last tokens of a prompt
_LEAST_SHARE = 0.25  # of the target that prompts have in any case: else a slow device would never begin an answer
_WEIGHT_OF_NEWEST = 0.3
_LEAST_MEASURED = 16  # tokens; smaller chunks say more about overhead than about speed
_GUESSED_SPEEDUP = 4  # of a prompt's token over a stream's, until one has been measured


class FixedBudget:
    """As much as a batch holds, always: what is computed together then depends on the prompt's length alone."""

    prompt_token_seconds = 0.0  # nobody asks

    def __init__(self, batch_size: int) -> None:
        self._batch_size = batch_size

    def observe_prompts(self, tokens: int, seconds: float) -> None:
        """Learn nothing."""

    def observe_streams(self, seconds: float) -> None:
        """Learn nothing."""

    def prompt_bounds(self, *, undisturbed: bool = False) -> tuple[int, int]:  # noqa: ARG002 - as `StepBudget`
        """Return how many prompt tokens the next step of prompts should hold, and how many to end a prompt with it."""
        return self._batch_size, self._batch_size


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

    @property
    def prompt_token_seconds(self) -> float:
        """The seconds that a token of a prompt takes in a large chunk."""
        if self._prompt_token_seconds is not None:
            return max(self._prompt_token_seconds, 1e-9)
        if self._stream_seconds is not None:
            return max(self._stream_seconds, 1e-9) / _GUESSED_SPEEDUP
        return _LONGEST_SECONDS / LEAST_CHUNK

    def observe_prompts(self, tokens: int, seconds: float) -> None:
        """Learn from a step of prompts that held this many tokens."""
        if tokens >= _LEAST_MEASURED:
            self._prompt_token_seconds = _follow(self._prompt_token_seconds, seconds / tokens)

    def observe_streams(self, seconds: float) -> None:
        """Learn from a step that held one token of each stream."""
        self._stream_seconds = _follow(self._stream_seconds, seconds)

    def prompt_bounds(self, *, undisturbed: bool = False) -> tuple[int, int]:
        """Return how many prompt tokens the next step of prompts should hold, and how many to end a prompt with it.

        `undisturbed`: no stream waits for its next token meanwhile.
        """
        target = max(self.itl_target, _LONGEST_SECONDS) if undisturbed else self.itl_target
        streams = 0.0 if undisturbed else (self._stream_seconds or 0.0)
        tokens = self._tokens_within(target, streams)
        if tokens >= _GOOD_CHUNK or (self._itl_target is None and tokens >= LEAST_CHUNK):
            tokens = max(_GOOD_CHUNK, tokens // _GOOD_CHUNK * _GOOD_CHUNK)
        tokens = max(LEAST_CHUNK, tokens)
        short_rest = self._tokens_within(_STRETCH * target, streams) - tokens
        return tokens, tokens + min(max(short_rest, 0), _SHORT_REST)

    def _tokens_within(self, target: float, streams: float) -> int:
        """Return how many prompt tokens can be computed in what a step of the streams leaves of a time."""
        return int(max(target - streams, _LEAST_SHARE * target) / self.prompt_token_seconds)


def _follow(average: float | None, newest: float) -> float:
    return newest if average is None else average + _WEIGHT_OF_NEWEST * (newest - average)
