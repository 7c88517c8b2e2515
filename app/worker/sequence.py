"""One request's life in the worker: its tokens, how many are computed, and when what happened."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from app.messages import Timings

if TYPE_CHECKING:
    import numpy.typing as npt

    from app.worker.detokenizer import Detokenizer
    from app.worker.draft_rate import DraftRate
    from app.worker.grammar import SequenceGrammar
    from app.worker.kv import Slot
    from app.worker.lookup import PromptLookup
    from app.worker.prefix_store import StoredPrefix
    from app.worker.sampling.sampler import TokenSampler
    from app.worker.scoring import PromptScore


@dataclass(slots=True, eq=False)
class Sequence:
    """A prompt and the tokens drawn so far. `n_computed` chases `n_tokens`; when they meet, a token is drawn."""

    request: int
    tokens: npt.NDArray[np.int32]  # room for prompt and answer; [:n_tokens] are there, guesses may follow
    n_prompt: int
    n_tokens: int
    arrived: float
    sampler: TokenSampler
    detokenizer: Detokenizer
    top_logprobs: int | None = None
    client: str = ""  # whose fair share it takes
    scope: str = ""  # within which prefixes are shared
    priority: int = 0  # the lower, the sooner
    stop_tokens: frozenset[int] = frozenset()  # which end the answer as the vocabulary's own ends do
    grammar: SequenceGrammar | None = None
    score: PromptScore | None = None  # log probabilities of the prompt's own tokens are wanted
    end_logprobs: bool = False
    timings_per_token: bool = False
    reuses_prefix: bool = True  # may take from the cache what is there of its prompt
    shown: dict[int, bytes] = field(default_factory=dict)  # control tokens that the text shows, as they are written
    lookup: PromptLookup | None = None  # what its next tokens are guessed from
    draft_rate: DraftRate | None = None
    n_computed: int = 0
    n_cached: int = 0  # prompt tokens that the slot already held
    slot: Slot | None = None
    awaits: Sequence | None = None  # is computing the first `n_awaited` tokens of this one, too
    n_awaited: int = 0
    awaits_state: StoredPrefix | None = None  # is being read from the disk
    admitted: float = 0.0
    first_token: float = 0.0

    @property
    def n_pending(self) -> int:
        """Tokens that are known and not computed."""
        return self.n_tokens - self.n_computed

    @property
    def n_drawn(self) -> int:
        """Tokens of the answer."""
        return self.n_tokens - self.n_prompt

    @property
    def is_full(self) -> bool:
        """Whether the answer has its last token."""
        return self.n_tokens == len(self.tokens)

    @property
    def newest(self) -> int:
        """The last token that is known."""
        return int(self.tokens[self.n_tokens - 1])

    def append(self, token: int) -> None:
        """Add a drawn token."""
        self.tokens[self.n_tokens] = token
        self.n_tokens += 1

    def timings(self, now: float) -> Timings:
        """Return where the time went until `now`, in seconds."""
        admitted = self.admitted or now
        first_token = self.first_token or now
        return Timings(admitted - self.arrived, first_token - admitted, now - first_token)
