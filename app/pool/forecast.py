"""Whether a request can be answered while its client waits: by measured rates, and rather too hopeful than not.

What is not known counts as nothing: how long an answer gets, unless the request says so; what of a prompt may be in the
cache; how far the sequences are that run. So who is refused would have waited in vain.
"""

from __future__ import annotations

import collections
import math
from typing import TYPE_CHECKING

from app.errors import DeadlineTooShortError, DeadlineUnreachableError

if TYPE_CHECKING:
    from app.messages import Generate
    from app.pool.admission import Admission, Pace
    from app.pool.request import GenerationRequest

_TOKEN_BYTES = 4
_REMEMBERED_BYTES = 16 * 1024 * 1024  # of prompts
_REMEMBERED = 1024  # prompts: each is looked at for every forecast
_DOUBT = 0.8  # of an estimate: who waits longer than this is not refused


class SeenPrompts:
    """The newest prompts: of one that begins as they do, the cache may hold so much."""

    def __init__(self) -> None:
        self._prompts: collections.deque[bytes] = collections.deque()
        self._bytes = 0
        self._has_forgotten = False

    def __len__(self) -> int:
        """Return how many prompts are remembered."""
        return len(self._prompts)

    def add(self, prompt: bytes) -> None:
        """Remember a prompt, int32 ids."""
        if self._prompts and self._prompts[-1] == prompt:
            return  # another choice of the same request
        self._prompts.append(prompt)
        self._bytes += len(prompt)
        while len(self._prompts) > 1 and (self._bytes > _REMEMBERED_BYTES or len(self._prompts) > _REMEMBERED):
            self._bytes -= len(self._prompts.popleft())
            self._has_forgotten = True

    def most_cached(self, prompt: bytes) -> int:
        """Return how many tokens of a prompt the cache may hold at most: all, if an earlier one goes on in it.

        All, too, once prompts were forgotten: host memory may keep older ones.
        """
        if self._has_forgotten:
            return len(prompt) // _TOKEN_BYTES
        longest = 0
        for seen in self._prompts:
            common = _common(seen, prompt)
            if common >= max(len(seen) - _TOKEN_BYTES, _TOKEN_BYTES):  # what was answered to that one may be in it, too
                return len(prompt) // _TOKEN_BYTES
            longest = max(longest, common)
        return longest // _TOKEN_BYTES


class Forecast:
    """What a request will take at least."""

    def __init__(self, admission: Admission, *, keeps_on_disk: bool) -> None:
        """Forecast by the rates of `admission`. What a disk keeps from earlier runs is not known here."""
        self.seen = SeenPrompts()
        self._admission = admission
        self._pace: Pace = admission.pace
        self._keeps_on_disk = keeps_on_disk

    def check(self, request: GenerationRequest, sequences: list[Generate]) -> None:
        """Raise DeadlineTooShortError or DeadlineUnreachableError if the client would wait in vain.

        `sequences` are the request's own, which have their permits and are not yet sent.
        """
        patience = request.patience
        if patience is None:
            return
        prompt_tokens, prompts = self._prompts(request, sequences)
        answer_tokens, answers = self._answers(request, sequences)
        own = prompts + answers
        waiting = self._admission.ahead(len(sequences))
        queue = max(0, waiting - 1) * (self._pace.slot_seconds or 0.0)  # the first may end at any moment
        if (own + queue) * _DOUBT <= patience.seconds:
            return
        what = "its first token" if request.streams else "the whole answer"
        parts = [f"{prompts:.1f} s for {prompt_tokens} tokens of the prompt"] if prompts else []
        parts += [f"{answers:.1f} s for {answer_tokens} tokens of the answer"] if answers else []
        parts += [f"{queue:.1f} s behind {waiting} other sequences"] if queue else []
        text = (
            f"{what} would take at least {own + queue:.1f} s ({', '.join(parts)}), and {patience.header} says that "
            f"you wait {patience.seconds:g} s"
        )
        if own * _DOUBT > patience.seconds:
            raise DeadlineTooShortError(f"{text}: wait longer, or ask for less", param=patience.header)
        raise DeadlineUnreachableError(f"{text}: try again later", param=patience.header, retry_after=max(queue, 1.0))

    def _prompts(self, request: GenerationRequest, sequences: list[Generate]) -> tuple[int, float]:
        """Return how many tokens of prompts must be computed in any case, and the seconds for that."""
        rate = self._pace.prompt_token_seconds
        if rate is None or self._keeps_on_disk:
            return 0, 0.0
        fresh = [
            len(sequence.prompt) // _TOKEN_BYTES - self.seen.most_cached(sequence.prompt)
            for sequence in sequences[:: request.n]
        ]
        tokens = min(fresh) if request.streams else max(fresh)
        return tokens, tokens * rate

    def _answers(self, request: GenerationRequest, sequences: list[Generate]) -> tuple[int, float]:
        """Return how many tokens one answer has in any case, and the seconds for all answers' steps."""
        rate = self._pace.stream_token_seconds
        if rate is None or request.streams:
            return 0, 0.0
        tokens = max(sequence.min_tokens for sequence in sequences)
        if request.ignore_eos and not (request.stop or request.stop_tokens or request.grammar or request.tools):
            tokens = max(sequence.max_tokens for sequence in sequences)
        return tokens, tokens * rate * math.ceil(len(sequences) / self._admission.slots)


def _common(left: bytes, right: bytes) -> int:
    """Return how many leading bytes are the same."""
    low, high = 0, min(len(left), len(right))
    if left[:high] == right[:high]:
        return high
    while high - low > 1:
        middle = (low + high) // 2
        if left[low:middle] == right[low:middle]:
            low = middle
        else:
            high = middle
    return low
