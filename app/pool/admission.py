"""The one bounded queue: as many sequences as there are slots and places to wait, and a no with a time for the rest."""

from __future__ import annotations

from app.errors import QueueFullError, RequestError

_SHORTEST_RETRY_SECONDS = 1.0
_LONGEST_RETRY_SECONDS = 60.0
_FORGET = 0.98  # weight of the past at each step: about the last 50 steps count
_ASSUMED_ANSWER_TOKENS = 128.0
_STEPS_TO_KNOW = 20
_ANSWERS_TO_KNOW = 4


class Pace:
    """How fast the worker draws tokens, and how long answers are, from what it did lately."""

    def __init__(self) -> None:
        self._tokens = 0.0
        self._seconds = 0.0
        self._answer_tokens = _ASSUMED_ANSWER_TOKENS
        self._answers = 0
        self._prompts = _Rate()
        self._streams = _Rate()

    def step(self, tokens: int, seconds: float, prompt_tokens: int = 0) -> None:
        """Take one engine step: tokens drawn over all sequences, its duration, and the prompts' tokens in it."""
        self._tokens = self._tokens * _FORGET + tokens
        self._seconds = self._seconds * _FORGET + seconds
        if prompt_tokens:
            self._prompts.add(prompt_tokens, seconds)
        elif tokens:
            self._streams.add(1, seconds)

    def answer(self, tokens: int) -> None:
        """Take the length of a finished answer."""
        self._answer_tokens += (tokens - self._answer_tokens) / 8
        self._answers += 1

    @property
    def prompt_token_seconds(self) -> float | None:
        """What a token of a prompt takes to compute; None while too little was seen."""
        return self._prompts.seconds

    @property
    def stream_token_seconds(self) -> float | None:
        """What a stream waits for its next token while no prompts are computed; None while too little was seen."""
        return self._streams.seconds

    @property
    def slot_seconds(self) -> float | None:
        """How often an answer ends, and its slot is free, while all are taken; None while too little was seen."""
        return self.seconds_for(1) if self._answers >= _ANSWERS_TO_KNOW else None

    def seconds_for(self, sequences: int) -> float:
        """Estimate how long the worker needs to draw the answers of so many sequences; 0 before the first step."""
        return sequences * self._answer_tokens * self._seconds / self._tokens if self._tokens else 0.0


class _Rate:
    """Seconds for one of something, from what was seen lately."""

    def __init__(self) -> None:
        self._count = 0.0
        self._seconds = 0.0
        self._steps = 0

    def add(self, count: int, seconds: float) -> None:
        self._count = self._count * _FORGET + count
        self._seconds = self._seconds * _FORGET + seconds
        self._steps += 1

    @property
    def seconds(self) -> float | None:
        return self._seconds / self._count if self._steps >= _STEPS_TO_KNOW else None


class Admission:
    """Permits for sequences. Whoever takes them gives the same number back, once."""

    def __init__(self, slots: int, queue: int) -> None:
        self.pace = Pace()
        self.taken = 0
        self._slots = slots
        self._capacity = slots + queue

    @property
    def waiting(self) -> int:
        """Sequences admitted beyond the slots."""
        return max(self.taken - self._slots, 0)

    def take(self, permits: int) -> None:
        """Take permits for the sequences of one request.

        Raises QueueFullError with the seconds after which to come back, and RequestError for more than ever fit.
        """
        if permits > self._capacity:
            raise RequestError(
                f"this request asks for {permits} sequences (prompts times n), the server holds {self._capacity} at "
                "most; send fewer prompts or a smaller n",
                param="n",
            )
        if self.taken + permits > self._capacity:
            seconds = self.retry_after(permits)
            raise QueueFullError(
                f"the queue is full: {self.taken} of {self._capacity} sequences run or wait; "
                f"try again in {seconds:.0f} s",
                retry_after=seconds,
            )
        self.taken += permits

    def give_back(self, permits: int) -> None:
        """Give permits back."""
        self.taken -= permits

    def ahead(self, permits: int) -> int:
        """Return how many sequences must end before one of the newest `permits` finds a slot."""
        return max(0, self.taken - permits - self._slots + 1)

    @property
    def slots(self) -> int:
        """Sequences that are decoded together."""
        return self._slots

    def retry_after(self, permits: int = 1) -> float:
        """Return the seconds until what waits now, and this request, will have found a slot: 1 to 60."""
        seconds = self.pace.seconds_for(self.waiting + permits)
        return min(max(seconds, _SHORTEST_RETRY_SECONDS), _LONGEST_RETRY_SECONDS)
