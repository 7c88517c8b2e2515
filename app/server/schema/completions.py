"""The request of POST /v1/completions."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from app.errors import RequestError
from app.pool.request import GenerationRequest, InfillPrompt, TextPrompt, TokenPrompt
from app.server.schema.common import CommonRequest, TokenId, TopLogprobs
from app.server.schema.decode import decode
from app.server.schema.fields import COMPLETIONS, refuse_what_would_change_the_answer, without_effect
from app.server.schema.structured import grammar_source

DEFAULT_MAX_TOKENS = 16  # OpenAI's, and vLLM's
MAX_PROMPTS = 128


class CompletionRequest(CommonRequest, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The body; what becomes of each field stands in `fields.COMPLETIONS`."""

    prompt: str | list[str | TokenId | list[TokenId]]
    logprobs: TopLogprobs | None = None
    max_tokens: Annotated[int, Meta(ge=0, le=2**31 - 1)] | None = None
    best_of: Annotated[int, Meta(ge=1, le=20)] | None = None
    echo: bool | None = None
    suffix: str | None = None

    @property
    def candidates(self) -> int:
        """How many answers are made for each prompt; the best `n` of them are returned."""
        return self.best_of or self.n or 1

    def generation_request(self, request_id: str, client: str = "") -> GenerationRequest:
        """Return what to ask the pool for; raises RequestError for a prompt of no known shape."""
        max_tokens = DEFAULT_MAX_TOKENS if self.max_tokens is None else self.max_tokens
        prompts = self._prompts()
        ranks = self.candidates > (self.n or 1)
        return GenerationRequest(
            prompts=[InfillPrompt(prompt, suffix) for prompt in prompts] if (suffix := self.suffix) else [*prompts],
            n=self.candidates,
            max_tokens=max_tokens,
            sampling=self.sampling(),
            stop=self.stops(),
            ignore_eos=self.ignore_eos is True,
            min_tokens=self.least_tokens(max_tokens),
            stop_tokens=self.stop_token_ids or [],
            top_logprobs=0 if ranks and self.logprobs is None else self.logprobs,
            request_id=request_id,
            client=client,
            priority=self.priority or 0,
            grammar=grammar_source(self),
            echo=self.echo is True,
            prompt_logprobs=self.logprobs if self.echo else None,
            end_logprobs=True,
            reuse_prefix=self.cache_prompt is not False,
            timings_per_token=self.timings_per_token is True,
        )

    def names_without_effect(self) -> list[str]:
        """Return the names of the fields that were sent and cannot change the answer."""
        return without_effect(self, COMPLETIONS) + self.nested_without_effect()

    def _prompts(self) -> list[TextPrompt | TokenPrompt]:
        prompt = self.prompt
        if isinstance(prompt, str):
            return [TextPrompt(prompt)]
        if not prompt:
            raise RequestError(f"'prompt' is empty; it takes {COMPLETIONS['prompt'].takes}", param="prompt")
        kind = type(prompt[0])
        for index, item in enumerate(prompt):
            if type(item) is not kind:
                raise RequestError(
                    f"'prompt[{index}]' is of another kind than 'prompt[0]'; it takes {COMPLETIONS['prompt'].takes}",
                    param=f"prompt[{index}]",
                )
            if item == []:
                raise RequestError(f"'prompt[{index}]' is empty: send at least one token id", param=f"prompt[{index}]")
        if kind is int:
            return [TokenPrompt([item for item in prompt if isinstance(item, int)])]
        if len(prompt) > MAX_PROMPTS:
            raise RequestError(f"'prompt' has {len(prompt)} prompts: send at most {MAX_PROMPTS}", param="prompt")
        return [TextPrompt(item) if isinstance(item, str) else TokenPrompt(list(item)) for item in prompt]  # type: ignore[arg-type]


_decoder = msgspec.json.Decoder(CompletionRequest, strict=True)


def decode_completion(body: bytes) -> CompletionRequest:
    """Return the body as a request of which every field is honoured or cannot change the answer.

    Raises RequestError, UnknownFieldError or UnsupportedFieldError, each naming the field.
    """
    request = decode(body, _decoder, COMPLETIONS)
    refuse_what_would_change_the_answer(request, COMPLETIONS)
    request.check_stream_options()
    _check_best_of(request)
    if request.max_tokens == 0 and not request.echo:
        raise RequestError(
            "'max_tokens' is 0, which only goes with \"echo\": true: set it, or send 1 or more", param="max_tokens"
        )
    if request.echo and request.suffix:
        raise RequestError("'echo' does not go with 'suffix': leave one of them out", param="echo")
    return request


def _check_best_of(request: CompletionRequest) -> None:
    wanted = request.n or 1
    if request.best_of is None or request.best_of == wanted:
        return
    if request.best_of < wanted:
        raise RequestError(f"'best_of' is {request.best_of}, less than 'n', which is {wanted}", param="best_of")
    if request.stream:
        raise RequestError(
            "'best_of' above 'n' does not go with \"stream\": true: which answers are best is known at their end",
            param="best_of",
        )
