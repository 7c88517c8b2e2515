"""From a Generate frame to a sequence. What the engine cannot bear is refused here, so that no step ever meets it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from app.errors import ContextLengthError, RequestError
from app.messages import MAX_DRY_BREAKER_BYTES, MAX_DRY_BREAKERS, Generate
from app.worker.detokenizer import Detokenizer
from app.worker.grammar import SequenceGrammar
from app.worker.sampling.breakers import NO_BREAKERS
from app.worker.sampling.dry import Dry
from app.worker.sampling.sampler import TokenSampler
from app.worker.scoring import PromptScore
from app.worker.sequence import Sequence

if TYPE_CHECKING:
    import numpy.typing as npt

    from app.messages import Embed, Sampling
    from app.worker.sampling.breakers import BreakerTable

    Tokens = npt.NDArray[np.int32]

_BYTES_PER_TOKEN = 4
_RANGES = {
    "temperature": (-math.inf, math.inf),
    "top_p": (0, math.inf),
    "min_p": (0, 1),
    "typical_p": (0, math.inf),
    "repeat_penalty": (0, math.inf),
    "presence_penalty": (-math.inf, math.inf),
    "frequency_penalty": (-math.inf, math.inf),
    "xtc_probability": (0, 1),
    "xtc_threshold": (0, 1),
    "dry_multiplier": (0, math.inf),
    "dry_base": (1, math.inf),
    "dry_allowed_length": (0, math.inf),
}


def new_sequence(
    command: Generate | Embed,
    vocabulary_size: int,
    context_length: int,
    eog: Tokens,
    now: float,
    breakers: BreakerTable,
    *,
    can_score: bool = True,
) -> Sequence:
    """Check a request and make its sequence; `eog` are the tokens that `ignore_eos` forbids.

    `can_score`: whether there are rows of logits for log probabilities of prompts.

    Raises ContextLengthError when prompt and answer don't fit into a slot, RequestError for anything else.
    """
    if not isinstance(command, Generate):
        raise RequestError("this model continues text and gives no embeddings", param="model")
    prompt = _prompt_tokens(command.prompt, vocabulary_size)
    if command.max_tokens < 0:
        raise RequestError(f"max_tokens must be at least 0, not {command.max_tokens}", param="max_tokens")
    total = len(prompt) + command.max_tokens
    if total > context_length:
        raise ContextLengthError(
            f"{len(prompt)} prompt tokens and {command.max_tokens} for the answer make {total}, but a slot holds "
            f"{context_length}; shorten the prompt or lower max_tokens"
        )
    if command.prompt_logprobs is not None and not can_score:
        raise RequestError("this context has no rows of logits for prompts", param="logprobs")
    _check_sampling(command.sampling, vocabulary_size)
    _check_ends(command, vocabulary_size)
    tokens = np.empty(total, np.int32)
    tokens[: len(prompt)] = prompt
    return Sequence(
        request=command.request,
        tokens=tokens,
        n_prompt=len(prompt),
        n_tokens=len(prompt),
        arrived=now,
        sampler=_token_sampler(command, vocabulary_size, eog, breakers),
        detokenizer=Detokenizer(command.stop),
        top_logprobs=command.top_logprobs,
        client=command.client,
        scope=command.scope,
        priority=command.priority,
        stop_tokens=frozenset(command.stop_tokens),
        grammar=None if command.grammar is None else SequenceGrammar(command.grammar, command.trigger),
        score=None if command.prompt_logprobs is None else PromptScore(command.prompt_logprobs),
        end_logprobs=command.end_logprobs,
        timings_per_token=command.timings_per_token,
        reuses_prefix=command.reuse_prefix and command.prompt_logprobs is None,
    )


def _token_sampler(command: Generate, vocabulary_size: int, eog: Tokens, breakers: BreakerTable) -> TokenSampler:
    sampling = command.sampling
    return TokenSampler(
        sampling,
        vocabulary_size,
        eog if command.ignore_eos else None,
        forbidden_early=np.concatenate([eog, np.array(command.stop_tokens, np.int32)]),
        early=len(command.prompt) // _BYTES_PER_TOKEN + command.min_tokens if command.min_tokens else 0,
        breakers=breakers.find(sampling.dry_sequence_breakers) if Dry.wanted(sampling) else NO_BREAKERS,
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
    for name, (least, most) in _RANGES.items():
        value = getattr(sampling, name)
        if not math.isfinite(value):
            raise RequestError(f"{name} must be a finite number, not {value}", param=name)
        if not least <= value <= most:
            upper = "" if most == math.inf else f" and at most {most}"
            raise RequestError(f"{name} must be at least {least}{upper}, not {value}", param=name)
    if sampling.repeat_penalty <= 0:
        raise RequestError(f"repeat_penalty must be above 0, not {sampling.repeat_penalty}", param="repeat_penalty")
    for token, bias in sampling.logit_bias.items():
        _check_token(token, vocabulary_size, "logit_bias")
        if math.isnan(bias) or bias == math.inf:
            raise RequestError(f"the bias of token {token} must be a number, not {bias}", param="logit_bias")
    texts = sampling.dry_sequence_breakers
    if len(texts) > MAX_DRY_BREAKERS or not all(1 <= len(text.encode()) <= MAX_DRY_BREAKER_BYTES for text in texts):
        raise RequestError(
            f"dry_sequence_breakers takes at most {MAX_DRY_BREAKERS} texts of 1 to {MAX_DRY_BREAKER_BYTES} bytes",
            param="dry_sequence_breakers",
        )


def _check_ends(command: Generate, vocabulary_size: int) -> None:
    if not 0 <= command.min_tokens <= command.max_tokens:
        raise RequestError(
            f"min_tokens must be from 0 to max_tokens, which is {command.max_tokens}, not {command.min_tokens}",
            param="min_tokens",
        )
    for token in command.stop_tokens:
        _check_token(token, vocabulary_size, "stop_token_ids")


def _check_token(token: int, vocabulary_size: int, param: str) -> None:
    if not 0 <= token < vocabulary_size:
        raise RequestError(f"token {token} is outside the vocabulary of {vocabulary_size}", param=param)
