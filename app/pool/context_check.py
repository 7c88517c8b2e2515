"""Prompt and answer must fit into one slot: checked before anything is computed, with the numbers in the message."""

from __future__ import annotations

import sys
from array import array

from app.errors import ContextLengthError, RequestError
from app.pool.request import ChatPrompt, GenerationRequest, Prompt

_TOKEN_BYTES = 4
_MOST_ENTRIES = 1_000_000  # log probabilities of prompts in an answer: some 300 MB


def answer_tokens(prompt: Prompt, prompt_bytes: bytes, context_length: int, request: GenerationRequest) -> int:
    """Return the most tokens that the answer to this prompt may have.

    Raises RequestError for a prompt without tokens, ContextLengthError when it doesn't fit or leaves no room for what
    was asked for.
    """
    prompt_tokens = len(prompt_bytes) // _TOKEN_BYTES
    param = prompt_param(prompt)
    if not prompt_tokens:
        raise RequestError(f"{param!r} has no tokens, and this model begins from nothing only with one", param=param)
    room = context_length - prompt_tokens
    if room < (request.max_tokens != 0):
        raise ContextLengthError(
            f"this model's maximum context length is {context_length} tokens, and {param!r} has {prompt_tokens} "
            f"tokens, which leaves no room for an answer; shorten {param!r}",
            param=param,
        )
    if request.max_tokens is None:
        return room
    if request.max_tokens > room:
        raise ContextLengthError(
            f"this model's maximum context length is {context_length} tokens, and you asked for "
            f"{prompt_tokens + request.max_tokens}: {prompt_tokens} in {param!r} and {request.max_tokens} in the "
            f"answer; shorten {param!r}, or set {request.max_tokens_param!r} to {room} or less",
            param=request.max_tokens_param,
        )
    return request.max_tokens


def check_scored(prompts: list[bytes], request: GenerationRequest) -> None:
    """Raise RequestError when the prompts' own log probabilities would be more than one answer can hold."""
    if request.prompt_logprobs is None:
        return
    entries = sum(map(len, prompts)) // _TOKEN_BYTES * (request.prompt_logprobs + 1) * request.n
    if entries > _MOST_ENTRIES:
        raise RequestError(
            f"'logprobs' and 'echo' make {entries} log probabilities of these prompts, the limit is {_MOST_ENTRIES}: "
            "send fewer or shorter prompts, fewer choices, or a lower 'logprobs'",
            param="logprobs",
        )


def token_prompt(tokens: list[int], vocabulary_size: int, param: str = "prompt") -> bytes:
    """Return token ids as the frames carry them. Raises RequestError for an id outside the vocabulary."""
    check_ids(tokens, vocabulary_size, param)
    return token_bytes(tokens)


def token_bytes(tokens: list[int]) -> bytes:
    """Return token ids as the frames carry them: int32, little-endian."""
    ids = array("i", tokens)
    if sys.byteorder == "big":
        ids.byteswap()
    return ids.tobytes()


def check_ids(tokens: list[int], vocabulary_size: int, param: str) -> None:
    """Raise RequestError when one of the ids is not in the vocabulary."""
    if tokens and not (min(tokens) >= 0 and max(tokens) < vocabulary_size):
        wrong = next(token for token in tokens if not 0 <= token < vocabulary_size)
        raise RequestError(
            f"token id {wrong} in {param!r} is outside the vocabulary: ids go from 0 to {vocabulary_size - 1}",
            param=param,
        )


def prompt_param(prompt: Prompt) -> str:
    """Return the field of the HTTP request that the prompt came in."""
    return "messages" if isinstance(prompt, ChatPrompt) else "prompt"
