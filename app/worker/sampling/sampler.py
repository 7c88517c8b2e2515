"""One sequence's way of drawing: its filters' numbers, what it remembers of its history, its random stream."""

from __future__ import annotations

import enum
import math
import secrets
from typing import TYPE_CHECKING

import numpy as np

from app.worker.sampling.breakers import NO_BREAKERS
from app.worker.sampling.dry import Dry
from app.worker.sampling.penalties import Penalties

if TYPE_CHECKING:
    import numpy.typing as npt

    from app.messages import Sampling
    from app.worker.sampling.breakers import Breakers

    Tokens = npt.NDArray[np.int32]

_SEEDS = 2**64
_XTC_NEEDS = 0.5  # at most: above this, no two tokens can reach the threshold


class Way(enum.IntEnum):
    """How a row's token is found, cheapest first."""

    GREEDY = enum.auto()  # the best of the row
    CANDIDATES = enum.auto()  # filters that look at the best of the row
    WHOLE = enum.auto()  # from all tokens, or by filters of which the first looks at all


class TokenSampler:
    """Draws for one sequence, with its own random stream: what else is in a batch changes nothing."""

    def __init__(
        self,
        sampling: Sampling,
        vocabulary_size: int,
        forbidden: Tokens | None = None,
        *,
        forbidden_early: Tokens | None = None,
        early: int = 0,
        breakers: Breakers = NO_BREAKERS,
    ) -> None:
        """Draw as `sampling` says.

        The `forbidden` tokens (the ends of generation under ignore_eos) are never drawn, and `forbidden_early` not
        while the history is shorter than `early` tokens. `breakers` are DRY's. `edits` says whether logits are changed
        before the filters see them.
        """
        self.temperature = float(np.float32(sampling.temperature))
        self.top_k = sampling.top_k if 0 < sampling.top_k < vocabulary_size else 0
        self.typical_p = float(np.float32(min(sampling.typical_p, 1.0)))
        self.top_p = float(np.float32(min(sampling.top_p, 1.0)))
        self.min_p_margin = math.log(sampling.min_p) if sampling.min_p > 0 else -math.inf
        self.xtc_threshold = float(np.float32(sampling.xtc_threshold))
        self._xtc_probability = sampling.xtc_probability if sampling.xtc_threshold <= _XTC_NEEDS else 0.0
        self.way = self._way()
        self._forbidden = forbidden
        self._forbidden_early = forbidden_early
        self._early = early
        self.bias_ids = np.fromiter(sampling.logit_bias.keys(), np.intp)
        self.biases = np.fromiter(sampling.logit_bias.values(), np.float32)
        self.penalties = Penalties(sampling) if Penalties.wanted(sampling) else None
        self.dry = Dry(sampling, breakers) if Dry.wanted(sampling) else None
        self._random = np.random.Generator(np.random.PCG64(_seed(sampling.seed)))
        self.edits = bool(self.penalties or self.dry or len(self.bias_ids) or forbidden is not None or early)

    def forbidden(self, length: int) -> list[Tokens]:
        """Return what must not be drawn after a history of this length."""
        early = self._forbidden_early if length < self._early else None
        return [tokens for tokens in (self._forbidden, early) if tokens is not None]

    def fraction(self) -> float:
        """Return the next random number in [0, 1)."""
        return self._random.random()

    def xtc_strikes(self) -> bool:
        """Return whether XTC acts on this token; call it once a token, before `fraction`."""
        return self._xtc_probability > 0 and self._random.random() <= self._xtc_probability

    def _way(self) -> Way:
        """Only typical and XTC can drop the best token, which is what temperature 0 would take."""
        if not self.temperature > 0 and self.typical_p == 1 and not self._xtc_probability:
            return Way.GREEDY
        narrow = self.top_p < 1 or self.min_p_margin > -math.inf
        if self.top_k or (narrow and self.typical_p == 1):
            return Way.CANDIDATES
        return Way.WHOLE


def _seed(seed: int | None) -> int:
    return secrets.randbits(64) if seed is None else seed % _SEEDS
