"""From a Generate frame to a sequence. What the engine cannot bear is refused here, so that no step ever meets it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from app.errors import ContextLengthError, RequestError
from app.worker.detokenizer import Detokenizer
from app.worker.grammar import SequenceGrammar
from app.worker.sampler import TokenSampler
from app.worker.sequence import Sequence

if TYPE_CHECKING:
    import numpy.typing as npt

    from app.messages import Generate, Sampling

    Tokens = npt.NDArray[np.int32]

_BYTES_PER_TOKEN = 4


def new_sequence(command: Generate, vocabulary_size: int, context_length: int, eog: Tokens, now: float) -> Sequence:
    """Check a request and make its sequence; `eog` are the tokens that `ignore_eos` forbids.

    Raises ContextLengthError when prompt and answer don't fit into a slot, RequestError for anything else.
    """
    prompt = _prompt_tokens(command.prompt, vocabulary_size)
    if command.max_tokens < 1:
        raise RequestError(f"max_tokens must be at least 1, not {command.max_tokens}", param="max_tokens")
    total = len(prompt) + command.max_tokens
    if total > context_length:
        raise ContextLengthError(
            f"{len(prompt)} prompt tokens and {command.max_tokens} for the answer make {total}, but a slot holds "
            f"{context_length}; shorten the prompt or lower max_tokens"
        )
    _check_sampling(command.sampling, vocabulary_size)
    tokens = np.empty(total, np.int32)
    tokens[: len(prompt)] = prompt
    return Sequence(
        request=command.request,
        tokens=tokens,
        n_prompt=len(prompt),
        n_tokens=len(prompt),
        arrived=now,
        sampler=TokenSampler(command.sampling, vocabulary_size, eog if command.ignore_eos else None),
        detokenizer=Detokenizer(command.stop),
        top_logprobs=command.top_logprobs,
        grammar=None if command.grammar is None else SequenceGrammar(command.grammar),
    )


def _prompt_tokens(data: bytes, vocabulary_size: int) -> Tokens:
    if not data or len(data) % _BYTES_PER_TOKEN:
        raise RequestError(f"a prompt of {len(data)} bytes is not a list of int32 tokens", param="prompt")
    prompt = np.frombuffer(data, "<i4")
    outside = prompt[(prompt < 0) | (prompt >= vocabulary_size)]
    if len(outside):
        raise RequestError(f"token {outside[0]} is outside the vocabulary of {vocabulary_size}", param="prompt")
    return prompt


def _check_sampling(sampling: Sampling, vocabulary_size: int) -> None:
    finite = {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "min_p": sampling.min_p,
        "repeat_penalty": sampling.repeat_penalty,
        "presence_penalty": sampling.presence_penalty,
        "frequency_penalty": sampling.frequency_penalty,
    }
    for name, value in finite.items():
        if not math.isfinite(value):
            raise RequestError(f"{name} must be a finite number, not {value}", param=name)
    if not 0 <= sampling.min_p <= 1:
        raise RequestError(f"min_p must be between 0 and 1, not {sampling.min_p}", param="min_p")
    if sampling.repeat_penalty <= 0:
        raise RequestError(f"repeat_penalty must be above 0, not {sampling.repeat_penalty}", param="repeat_penalty")
    for token, bias in sampling.logit_bias.items():
        if not 0 <= token < vocabulary_size:
            raise RequestError(f"token {token} is outside the vocabulary of {vocabulary_size}", param="logit_bias")
        if math.isnan(bias) or bias == math.inf:
            raise RequestError(f"the bias of token {token} must be a number, not {bias}", param="logit_bias")
