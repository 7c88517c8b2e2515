"""POST /v1/completions whole: echo, prompts' log probabilities, best_of, suffix, batches, token prompts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest

from app.llama.batch import Batch
from app.llama.context import Context
from app.llama.model import Model, VocabularyModel
from tests.api import tiny_models
from tests.conftest import ServerFactory

# With a vocabulary of bytes, every letter is a token.
PROMPT = "The capital of France is Paris, and the capital of Italy is"
LONG = "It was a bright cold day in April, and the clocks were striking thirteen. " * 4


@pytest.fixture(scope="module")
def client(bytes_model: Path, serve: ServerFactory) -> Iterator[openai.OpenAI]:
    flags = ("--parallel", "3", "--ctx-size", "512", "--flash-attn", "off")  # its rounding depends on the batch
    with (
        serve(bytes_model, *flags) as running,
        openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0, timeout=100) as client,
    ):
        yield client


@pytest.fixture(scope="module")
def model(client: openai.OpenAI) -> str:
    return client.models.list().data[0].id


@pytest.fixture(scope="module")
def vocabulary(bytes_model: Path) -> Iterator[VocabularyModel]:
    with VocabularyModel(bytes_model) as model:
        yield model


def tokens_of(vocabulary: VocabularyModel, text: str) -> list[int]:
    ids: list[int] = vocabulary.tokenize(text).tolist()
    return ids


class TestEcho:
    def test_text_comes_before_the_answer(self, client: openai.OpenAI, model: str) -> None:
        options: dict[str, Any] = {"model": model, "prompt": PROMPT, "max_tokens": 4, "temperature": 0}
        plain, echoed = client.completions.create(**options), client.completions.create(**options, echo=True)
        assert echoed.choices[0].text == PROMPT + plain.choices[0].text
        assert echoed.choices[0].logprobs is None
        assert echoed.usage == plain.usage or (echoed.usage and echoed.usage.completion_tokens == 4)

    def test_nothing_but_the_prompt(self, client: openai.OpenAI, model: str) -> None:
        answer = client.completions.create(model=model, prompt=PROMPT, max_tokens=0, echo=True)
        (choice,) = answer.choices
        assert (choice.text, choice.finish_reason, choice.logprobs) == (PROMPT, "length", None)
        assert answer.usage is not None
        assert answer.usage.completion_tokens == 0
        assert answer.usage.prompt_tokens > 5

    def test_tokens_become_text(self, client: openai.OpenAI, model: str, vocabulary: VocabularyModel) -> None:
        prompt = tokens_of(vocabulary, PROMPT)
        start = tokens_of(vocabulary, PROMPT[:16])
        answer = client.completions.create(model=model, prompt=[prompt, start], max_tokens=0, echo=True)
        assert [choice.text for choice in answer.choices] == [PROMPT, PROMPT[:16]]

    def test_zero_tokens_only_with_echo(self, client: openai.OpenAI, model: str) -> None:
        with pytest.raises(openai.BadRequestError) as caught:
            client.completions.create(model=model, prompt=PROMPT, max_tokens=0)
        assert caught.value.param == "max_tokens"

    @pytest.mark.parametrize("logprobs", [None, 2])
    @pytest.mark.parametrize("max_tokens", [0, 5])
    def test_the_stream_says_the_same(
        self, client: openai.OpenAI, model: str, logprobs: int | None, max_tokens: int
    ) -> None:
        options: dict[str, Any] = {
            "model": model,
            "prompt": [PROMPT, "Übergröße: 你好"],
            "max_tokens": max_tokens,
            "temperature": 0,
            "echo": True,
            "n": 2,
            "logprobs": logprobs,
        }
        whole = client.completions.create(**options)
        texts = [""] * 4
        fields: list[dict[str, list[Any]]] = [{} for _ in range(4)]
        for chunk in client.completions.create(**options, stream=True):
            (choice,) = chunk.choices
            texts[choice.index] += choice.text
            if choice.logprobs is not None:
                for name, values in choice.logprobs.to_dict().items():
                    assert isinstance(values, list)
                    fields[choice.index].setdefault(name, []).extend(values)
        assert texts == [choice.text for choice in whole.choices]
        for choice, streamed in zip(whole.choices, fields, strict=True):
            assert (choice.logprobs.to_dict() if choice.logprobs else {}) == streamed


class TestLogprobs:
    def test_of_the_prompt_and_the_answer(self, client: openai.OpenAI, model: str) -> None:
        answer = client.completions.create(
            model=model, prompt=PROMPT, max_tokens=3, temperature=0, echo=True, logprobs=2
        )
        logprobs = answer.choices[0].logprobs
        assert logprobs is not None
        assert logprobs.tokens
        assert logprobs.token_logprobs
        assert logprobs.top_logprobs
        assert logprobs.text_offset
        assert answer.usage is not None
        assert len(logprobs.tokens) == answer.usage.total_tokens
        assert "".join(logprobs.tokens) == answer.choices[0].text
        for token, offset in zip(logprobs.tokens, logprobs.text_offset, strict=True):
            assert answer.choices[0].text[offset:].startswith(token)
        assert (logprobs.token_logprobs[0], logprobs.top_logprobs[0]) == (None, None)
        for token, value, top in zip(
            logprobs.tokens[1:], logprobs.token_logprobs[1:], logprobs.top_logprobs[1:], strict=True
        ):
            assert 1 <= len(top) <= 3  # two tokens may be written alike
            assert top[token] == value
            assert max(top.values()) >= value

    def test_the_answer_alone(self, client: openai.OpenAI, model: str) -> None:
        answer = client.completions.create(model=model, prompt=PROMPT, max_tokens=3, temperature=0, logprobs=0)
        logprobs = answer.choices[0].logprobs
        assert logprobs is not None
        assert logprobs.text_offset is not None
        assert logprobs.text_offset[0] == 0
        assert logprobs.top_logprobs is None
        assert len(logprobs.tokens or ()) == 3

    def test_the_end_is_one_of_the_tokens(self, client: openai.OpenAI, model: str, vocabulary: VocabularyModel) -> None:
        rome = tokens_of(vocabulary, "R")[0]
        answer = client.completions.create(
            model=model,
            prompt=PROMPT,
            max_tokens=8,
            temperature=0,
            echo=True,
            logprobs=1,
            extra_body={"stop_token_ids": [rome], "logit_bias": {str(rome): 100}},
        )
        (choice,) = answer.choices
        assert (choice.text, choice.finish_reason) == (PROMPT, "stop")
        assert choice.logprobs is not None
        assert (choice.logprobs.tokens or [])[-1] == "R"
        assert answer.usage is not None
        assert len(choice.logprobs.tokens or []) == answer.usage.total_tokens

    def test_a_prompt_of_one_token(self, client: openai.OpenAI, model: str) -> None:
        answer = client.completions.create(model=model, prompt=[50], max_tokens=0, echo=True, logprobs=3)
        logprobs = answer.choices[0].logprobs
        assert logprobs is not None
        assert logprobs.token_logprobs == [None]

    def test_a_prompt_that_fills_the_slot(self, client: openai.OpenAI, model: str) -> None:
        options: dict[str, Any] = {"model": model, "prompt": [50] * 512, "echo": True, "logprobs": 1}
        answer = client.completions.create(**options, max_tokens=0)
        assert answer.choices[0].logprobs is not None
        assert len(answer.choices[0].logprobs.token_logprobs or []) == 512
        with pytest.raises(openai.BadRequestError) as caught:
            client.completions.create(**options, max_tokens=1)
        assert caught.value.code == "context_length_exceeded"


def direct_loglikelihoods(model_file: Path, tokens: list[int]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Return the log probability of each token but the first, computed without the server."""
    rows = len(tokens)
    with (
        Model(model_file, device="cpu") as model,
        Context(
            model,
            slots=1,
            context_length=1024,
            batch_size=1024,
            threads=2,
            logits_rows=rows,
            flash_attention="off",
        ) as context,
    ):
        batch = Batch(1024)
        batch.add(0, 0, np.array(tokens, np.int32), wants_logits=rows)
        logits = context.decode(batch).astype(np.float64)
    logits -= logits.max(axis=1, keepdims=True)
    logits -= np.log(np.exp(logits).sum(axis=1, keepdims=True))
    scores: np.ndarray[Any, np.dtype[np.float64]] = logits[np.arange(rows - 1), tokens[1:]]
    return scores


def test_loglikelihoods_are_those_of_direct_scoring(
    client: openai.OpenAI, model: str, bytes_model: Path, vocabulary: VocabularyModel
) -> None:
    """As lm-evaluation-harness asks: tokens, one more token drawn, the continuation's log probabilities summed."""
    pairs = [(PROMPT, " Rome"), ("Water boils at", " 100 degrees Celsius."), (LONG, "It was a dark and stormy night.")]
    pairs += [("Q: 2+2? A:", f" {answer}") for answer in ("4", "5", "fish")]
    requests = [
        (tokens_of(vocabulary, context), tokens_of(vocabulary, continuation)) for context, continuation in pairs
    ]
    answer = client.completions.create(
        model=model,
        prompt=[context + continuation for context, continuation in requests],
        max_tokens=1,
        temperature=0,
        logprobs=1,
        echo=True,
        seed=1234,
    )
    for (context, continuation), choice in zip(requests, answer.choices, strict=True):
        assert choice.logprobs is not None
        scores = choice.logprobs.token_logprobs or []
        tops = choice.logprobs.top_logprobs or []
        assert len(scores) == len(context) + len(continuation) + 1
        direct = direct_loglikelihoods(bytes_model, context + continuation)
        assert abs(sum(scores[len(context) : -1]) - direct[len(context) - 1 :].sum()) < 1e-3
        assert np.abs(np.array(scores[1:-1], float) - direct).max() < 1e-3
        assert all(max(top.values()) >= score for score, top in zip(scores[1:], tops[1:], strict=True))


class TestBestOf:
    def test_the_most_probable_come_first(self, client: openai.OpenAI, model: str) -> None:
        options: dict[str, Any] = {
            "model": model,
            "prompt": [PROMPT, "Once upon a time"],
            "max_tokens": 5,
            "temperature": 1.5,
            "seed": 7,
            "logprobs": 0,
        }
        all_of_them = client.completions.create(**options, n=4)
        chosen = client.completions.create(**options, n=2, best_of=4)
        assert [choice.index for choice in chosen.choices] == [0, 1, 2, 3]

        def score(choice: Any) -> float:
            return float(np.mean(choice.logprobs.token_logprobs))

        for prompt in range(2):
            candidates = all_of_them.choices[4 * prompt : 4 * prompt + 4]
            expected = sorted(candidates, key=score, reverse=True)[:2]
            found = chosen.choices[2 * prompt : 2 * prompt + 2]
            assert [choice.text for choice in found] == [choice.text for choice in expected]
        assert chosen.usage is not None
        assert all_of_them.usage is not None
        assert chosen.usage.completion_tokens == all_of_them.usage.completion_tokens

    def test_without_logprobs_in_the_answer(self, client: openai.OpenAI, model: str) -> None:
        answer = client.completions.create(model=model, prompt=PROMPT, max_tokens=2, best_of=3, seed=1)
        assert [choice.logprobs for choice in answer.choices] == [None]

    @pytest.mark.parametrize("change", [{"stream": True, "best_of": 2}, {"n": 3, "best_of": 2}])
    def test_what_cannot_be(self, client: openai.OpenAI, model: str, change: dict[str, Any]) -> None:
        with pytest.raises(openai.BadRequestError) as caught:
            client.completions.create(model=model, prompt=PROMPT, max_tokens=2, **change)
        assert caught.value.param == "best_of"


class TestSuffix:
    def test_refused_without_the_tokens_for_it(self, client: openai.OpenAI, model: str) -> None:
        with pytest.raises(openai.BadRequestError) as caught:
            client.completions.create(model=model, prompt="def f(", suffix="return 1", max_tokens=2)
        assert (caught.value.param, caught.value.code) == ("suffix", "unsupported_parameter")
        assert "vocabulary" in caught.value.message

    def test_empty_asks_for_nothing(self, client: openai.OpenAI, model: str) -> None:
        answer = client.completions.create(model=model, prompt=PROMPT, suffix="", max_tokens=1)
        assert answer.choices[0].finish_reason == "length"

    def test_not_with_echo(self, client: openai.OpenAI, model: str) -> None:
        with pytest.raises(openai.BadRequestError) as caught:
            client.completions.create(model=model, prompt="a", suffix="b", echo=True)
        assert caught.value.param == "echo"


class TestOtherVocabularies:
    def test_bos_and_a_leading_space_are_not_in_the_text(self, sentences_model: Path, serve: ServerFactory) -> None:
        with serve(sentences_model, "--parallel", "1", "--ctx-size", "256") as running:
            client = openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0)
            model = client.models.list().data[0].id
            text = "the quick brown fox"
            answer = client.completions.create(model=model, prompt=text, max_tokens=2, echo=True, logprobs=1)
            client.close()
        (choice,) = answer.choices
        assert choice.text.startswith(text)
        logprobs = choice.logprobs
        assert logprobs is not None
        tokens, offsets = logprobs.tokens or [], logprobs.text_offset or []
        assert (tokens[0], offsets[:2]) == ("<s>", [0, 0])
        assert tokens[1].startswith(" t")
        for token, offset in list(zip(tokens, offsets, strict=True))[2:-2]:
            assert choice.text[offset:].startswith(token)

    def test_filling_in_the_middle(self, filling_model: Path, serve: ServerFactory) -> None:
        with (
            VocabularyModel(filling_model) as vocabulary,
            serve(filling_model, "--parallel", "1", "--ctx-size", "256") as running,
        ):
            client = openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0)
            model = client.models.list().data[0].id
            options: dict[str, Any] = {"model": model, "max_tokens": 8, "temperature": 0}
            before, after = "def f(x):\n    y = ", "\n    return y"
            filled = client.completions.create(prompt=before, suffix=after, **options)
            ids = vocabulary.tokenize(before).tolist()
            of_tokens = client.completions.create(prompt=ids, suffix=after, **options)
            prefix, suffix, middle = (
                vocabulary.tokenize(name, parse_special=True).tolist() for name in tiny_models.FILL_IN
            )
            whole = [*prefix, *ids, *suffix, *vocabulary.tokenize(after).tolist(), *middle]
            written = client.completions.create(prompt=whole, **options)
            client.close()
        assert filled.usage is not None
        assert filled.usage.prompt_tokens == len(whole)
        assert len(prefix) == len(suffix) == len(middle) == 1
        assert filled.choices[0].text == of_tokens.choices[0].text == written.choices[0].text


class TestCacheAndTimings:
    def test_the_cache_is_left_alone_on_demand(self, client: openai.OpenAI, model: str) -> None:
        def cached(**extra: Any) -> int:
            answer = client.completions.create(model=model, prompt=LONG, max_tokens=1, extra_body=extra)
            assert answer.usage is not None
            assert answer.usage.prompt_tokens_details is not None
            return answer.usage.prompt_tokens_details.cached_tokens or 0

        cached()
        assert cached(cache_prompt=True) > 100
        assert cached(cache_prompt=False) == 0

    def test_timings_as_llama_server_has_them(self, client: openai.OpenAI, model: str) -> None:
        names = {"cache_n"} | {
            f"{kind}_{what}" for kind in ("prompt", "predicted") for what in ("n", "ms", "per_token_ms", "per_second")
        }
        options: dict[str, Any] = {"model": model, "prompt": PROMPT, "max_tokens": 4}
        extra = {"timings_per_token": True, "cache_prompt": False}
        whole: Any = client.completions.create(**options, extra_body=extra)
        assert set(whole.timings) == names
        assert whole.timings["predicted_n"] == whole.usage.completion_tokens
        assert whole.timings["prompt_n"] == whole.usage.prompt_tokens
        assert whole.timings["prompt_ms"] > 0
        streamed: list[Any] = list(client.completions.create(**options, stream=True, extra_body=extra))
        assert [chunk.timings["predicted_n"] for chunk in streamed if chunk.choices[0].text][-1] == 4
        assert all(set(chunk.timings) == names for chunk in streamed)
        plain: Any = client.completions.create(**options)
        assert not hasattr(plain, "timings")
        chat: Any = client.chat.completions.create(
            model=model, messages=[{"role": "user", "content": "Hi"}], max_tokens=2, stream=True, extra_body=extra
        )
        assert [set(chunk.timings) for chunk in list(chat)[1:]][-1] == names
