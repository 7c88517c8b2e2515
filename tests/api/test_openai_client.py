"""OpenAI's own client against a real server with the real model."""

from __future__ import annotations

import asyncio
import urllib.request
from typing import Any

import openai
import pytest

MESSAGES: list[Any] = [{"role": "user", "content": "Name three colours."}]
PROMPT = "The capital of France is"


def test_models(client: openai.OpenAI, model: str) -> None:
    retrieved = client.models.retrieve(model)
    assert (retrieved.id, retrieved.object, retrieved.owned_by) == (model, "model", "pestle")
    assert retrieved.created == client.models.retrieve(model).created
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("org/none:Q4_K_M")
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


class TestChat:
    def test_whole(self, client: openai.OpenAI, model: str) -> None:
        answer = client.chat.completions.create(model=model, messages=MESSAGES, max_tokens=12, temperature=0)
        assert (answer.object, answer.model) == ("chat.completion", model)
        (choice,) = answer.choices
        assert (choice.message.role, choice.finish_reason) == ("assistant", "length")
        assert choice.message.content
        assert answer.usage is not None
        assert (answer.usage.completion_tokens, answer.usage.total_tokens) == (12, answer.usage.prompt_tokens + 12)
        assert answer.usage.prompt_tokens_details is not None
        assert answer.usage.prompt_tokens_details.cached_tokens is not None

    def test_the_stream_says_the_same(self, client: openai.OpenAI, model: str) -> None:
        options: dict[str, Any] = {"model": model, "messages": MESSAGES, "max_completion_tokens": 12, "temperature": 0}
        whole = client.chat.completions.create(**options)
        chunks = list(client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
        assert len({(chunk.id, chunk.created, chunk.model, chunk.object) for chunk in chunks}) == 1
        assert [choice.delta.role for choice in chunks[0].choices] == ["assistant"]
        *middle, last, usage = chunks
        assert all(chunk.usage is None and chunk.choices[0].finish_reason is None for chunk in middle)
        assert (last.choices[0].finish_reason, last.choices[0].delta.content) == ("length", None)
        assert (usage.choices, usage.usage and usage.usage.completion_tokens) == ([], 12)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in middle) == whole.choices[0].message.content

    def test_several_choices_streamed(self, client: openai.OpenAI, model: str) -> None:
        texts, reasons, usages = ["", ""], {}, []
        for chunk in client.chat.completions.create(
            model=model,
            messages=MESSAGES,
            max_tokens=6,
            n=2,
            seed=3,
            stream=True,
            stream_options={"include_usage": True},
        ):
            usages += [chunk.usage] if chunk.usage else []
            for choice in chunk.choices:
                texts[choice.index] += choice.delta.content or ""
                if choice.finish_reason:
                    reasons[choice.index] = choice.finish_reason
        assert all(texts)
        assert set(reasons) == {0, 1}
        assert len(usages) == 1
        assert 2 <= usages[0].completion_tokens <= 12

    def test_the_seed_decides(self, client: openai.OpenAI, model: str) -> None:
        def draw(seed: int) -> str | None:
            answer = client.chat.completions.create(
                model=model, messages=MESSAGES, max_tokens=10, seed=seed, temperature=1.5
            )
            return answer.choices[0].message.content

        assert draw(2**63 - 1) == draw(2**63 - 1)
        assert len({draw(seed) for seed in (-1, 5, 2**40)}) > 1

    def test_logprobs(self, client: openai.OpenAI, model: str) -> None:
        answer = client.chat.completions.create(
            model=model, messages=MESSAGES, max_tokens=5, logprobs=True, top_logprobs=3, temperature=0
        )
        (choice,) = answer.choices
        assert choice.logprobs is not None
        assert choice.logprobs.content is not None
        tokens = choice.logprobs.content
        assert len(tokens) == 5
        assert b"".join(bytes(token.bytes or []) for token in tokens).decode() == choice.message.content
        for token in tokens:
            assert [top.logprob for top in token.top_logprobs] == sorted(
                (top.logprob for top in token.top_logprobs), reverse=True
            )
            assert len(token.top_logprobs) == 3
            assert token.top_logprobs[0].token == token.token
            assert token.logprob <= 0

    def test_streamed_logprobs_are_complete(self, client: openai.OpenAI, model: str) -> None:
        tokens, text = [], ""
        for chunk in client.chat.completions.create(
            model=model, messages=MESSAGES, max_tokens=5, logprobs=True, temperature=0, stream=True
        ):
            text += chunk.choices[0].delta.content or ""
            if chunk.choices[0].logprobs:
                tokens += chunk.choices[0].logprobs.content or []
        assert len(tokens) == 5
        assert "".join(token.token for token in tokens) == text

    def test_stop(self, client: openai.OpenAI, model: str) -> None:
        options: dict[str, Any] = {"model": model, "messages": MESSAGES, "temperature": 0}
        full = client.chat.completions.create(**options, max_tokens=12).choices[0].message.content
        assert full is not None
        stop = full[len(full) // 2 :][:3]
        answer = client.chat.completions.create(**options, max_tokens=12, stop=[stop, "\x00never"]).choices[0]
        assert (answer.message.content, answer.finish_reason) == (full[: full.index(stop)], "stop")

    def test_logit_bias_forbids_a_token(self, client: openai.OpenAI, model: str) -> None:
        options: dict[str, Any] = {"model": model, "prompt": PROMPT, "max_tokens": 1, "temperature": 0}
        first = client.completions.create(**options).choices[0].text
        # every id of the vocabulary's beginning is pushed up by as much: one of them wins
        biased = client.completions.create(**options, logit_bias={"30": 100}).choices[0].text
        assert biased != first

    def test_system_developer_and_parts(self, client: openai.OpenAI, model: str) -> None:
        parts: list[Any] = [{"type": "text", "text": "Say"}, {"type": "text", "text": "yes."}]
        prompts = []
        for role, content in (("system", "Say\nyes."), ("developer", "Say\nyes."), ("system", parts)):
            messages: list[Any] = [{"role": role, "content": content}, *MESSAGES]
            answer = client.chat.completions.create(model=model, messages=messages, max_tokens=4, temperature=0)
            assert answer.usage is not None
            prompts.append((answer.usage.prompt_tokens, answer.choices[0].message.content))
        assert len(set(prompts)) == 1


class TestCompletions:
    def test_string(self, client: openai.OpenAI, model: str) -> None:
        answer = client.completions.create(model=model, prompt=PROMPT, max_tokens=4, temperature=0)
        assert (answer.object, answer.choices[0].finish_reason) == ("text_completion", "length")
        assert "Paris" in answer.choices[0].text

    def test_list_of_strings(self, client: openai.OpenAI, model: str) -> None:
        answer = client.completions.create(model=model, prompt=[PROMPT, "1, 2, 3,"], max_tokens=4, temperature=0, n=2)
        assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
        texts = [choice.text for choice in answer.choices]
        assert "Paris" in texts[0]
        assert "4" in texts[2]
        assert (texts[0], texts[2]) == (texts[1], texts[3])
        assert answer.usage is not None
        assert answer.usage.completion_tokens == 16

    def test_tokens(self, client: openai.OpenAI, model: str) -> None:
        one = client.completions.create(model=model, prompt=[504, 3575, 282], max_tokens=3, temperature=0)
        two = client.completions.create(model=model, prompt=[[504, 3575, 282], [504]], max_tokens=3, temperature=0)
        assert one.usage is not None
        assert two.usage is not None
        assert (one.usage.prompt_tokens, two.usage.prompt_tokens) == (3, 4)
        assert one.choices[0].text == two.choices[0].text
        assert len(two.choices) == 2

    def test_token_outside_the_vocabulary(self, client: openai.OpenAI, model: str) -> None:
        with pytest.raises(openai.BadRequestError) as caught:
            client.completions.create(model=model, prompt=[10_000_000], max_tokens=1)
        assert caught.value.param is not None
        assert caught.value.param.startswith("prompt")

    def test_stream_with_logprobs(self, client: openai.OpenAI, model: str) -> None:
        text, tokens, offsets, reason = "", [], [], None
        for chunk in client.completions.create(
            model=model, prompt=PROMPT, max_tokens=5, temperature=0, logprobs=2, stream=True
        ):
            (choice,) = chunk.choices
            text += choice.text
            reason = choice.finish_reason or reason
            if choice.logprobs:
                tokens += choice.logprobs.tokens or []
                offsets += choice.logprobs.text_offset or []
        assert (len(tokens), reason) == (5, "length")
        assert "".join(tokens) == text
        assert offsets == [len("".join(tokens[:index])) for index in range(5)]

    def test_ignore_eos_goes_on(self, client: openai.OpenAI, model: str) -> None:
        answer = client.completions.create(
            model=model, prompt="Bye.<|im_end|>", max_tokens=24, temperature=0, extra_body={"ignore_eos": True}
        )
        assert answer.usage is not None
        assert answer.usage.completion_tokens == 24


class TestErrors:
    @pytest.mark.parametrize(
        ("changes", "param", "code"),
        [
            ({"temperature": "0.7"}, "temperature", "invalid_value"),
            ({"temperature": 3}, "temperature", "invalid_value"),
            ({"n": 0}, "n", "invalid_value"),
            ({"messages": []}, "messages", "invalid_value"),
            ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content", "invalid_value"),
            ({"tools": [{"type": "custom", "custom": {"name": "f"}}]}, "tools[0].type", "unsupported_parameter"),
            ({"tools": [{"type": "function", "function": {"name": "f g"}}]}, "tools[0].function.name", "invalid_value"),
            ({"tool_choice": "required"}, "tool_choice", "invalid_value"),
            ({"extra_body": {"made_up": 1}}, "made_up", "unknown_parameter"),
            ({"logit_bias": {"99999999": 1}}, "logit_bias", "invalid_value"),
        ],
    )
    def test_bad_requests(
        self, client: openai.OpenAI, model: str, changes: dict[str, Any], param: str, code: str
    ) -> None:
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(**{"model": model, "messages": MESSAGES, **changes})
        assert (caught.value.param, caught.value.code, caught.value.type) == (param, code, "invalid_request_error")
        assert caught.value.response.headers["x-request-id"] == caught.value.request_id

    def test_unknown_model(self, client: openai.OpenAI) -> None:
        with pytest.raises(openai.NotFoundError) as caught:
            client.chat.completions.create(model="gpt-none", messages=MESSAGES)
        assert (caught.value.code, caught.value.param) == ("model_not_found", "model")

    @pytest.mark.parametrize("stream", [False, True])
    def test_prompt_too_long(self, client: openai.OpenAI, model: str, stream: bool) -> None:
        messages: list[Any] = [{"role": "user", "content": "word " * 3000}]
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(model=model, messages=messages, stream=stream)
        assert caught.value.code == "context_length_exceeded"
        assert "2048" in caught.value.message

    def test_answer_too_long(self, client: openai.OpenAI, model: str) -> None:
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(model=model, messages=MESSAGES, max_completion_tokens=100_000)
        assert caught.value.param == "max_completion_tokens"


def test_eight_streams_at_once(server: str, model: str) -> None:
    async def one(client: openai.AsyncOpenAI, number: int) -> str:
        stream = await client.chat.completions.create(
            model=model, messages=MESSAGES, max_tokens=8, seed=number, stream=True
        )
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices])

    async def all_of_them() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0, timeout=100) as client:
            return await asyncio.gather(*(one(client, number) for number in range(8)))

    texts = asyncio.run(all_of_them())
    assert len(texts) == 8
    assert all(texts)


def gauge(server: str, name: str) -> float:
    with urllib.request.urlopen(f"{server}/metrics", timeout=20) as page:
        lines = page.read().decode().splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(f"pestle_{name}{{"))


@pytest.mark.parametrize("stream", [False, True])
def test_leaving_frees_the_slot(server: str, model: str, stream: bool, eventually: Any) -> None:
    async def begin_and_leave() -> None:
        async with openai.AsyncOpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0, timeout=100) as client:
            options: Any = {
                "model": model,
                "messages": MESSAGES,
                "max_tokens": 1500,
                "extra_body": {"ignore_eos": True},
            }
            if stream:
                answer: Any = await client.chat.completions.create(**options, stream=True)
                await anext(aiter(answer))
                await asyncio.to_thread(eventually, lambda: gauge(server, "num_requests_running") == 1, 30)
                await answer.close()
            else:
                task = asyncio.create_task(client.chat.completions.create(**options))
                await asyncio.to_thread(eventually, lambda: gauge(server, "num_requests_running") == 1, 30)
                task.cancel()

    eventually(lambda: gauge(server, "num_requests_running") == 0, 30)
    asyncio.run(begin_and_leave())
    eventually(lambda: gauge(server, "num_requests_running") == 0, 5)
