"""What is checked of a request when its prompts' tokens are known."""

from __future__ import annotations

import pytest

from app.errors import RequestError
from app.messages import Sampling
from app.pool.context_check import check_scored
from app.pool.request import GenerationRequest, TokenPrompt


def scored(prompt_logprobs: int | None, n: int = 1) -> GenerationRequest:
    return GenerationRequest(
        prompts=[TokenPrompt([1])],
        n=n,
        max_tokens=1,
        sampling=Sampling(),
        stop=[],
        ignore_eos=False,
        top_logprobs=None,
        request_id="r",
        prompt_logprobs=prompt_logprobs,
    )


def test_log_probabilities_of_prompts_are_bounded() -> None:
    prompts = [bytes(4 * 8000)] * 5  # 40,000 tokens
    check_scored(prompts, scored(20))
    check_scored(prompts * 1000, scored(None))
    with pytest.raises(RequestError, match="make 1680000 log probabilities") as caught:
        check_scored(prompts, scored(20, n=2))
    assert caught.value.param == "logprobs"
