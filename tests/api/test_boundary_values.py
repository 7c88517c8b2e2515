"""Three hundred values just over the edge: each a 400 within 50 ms that names its field."""

from __future__ import annotations

import time
from typing import Any

import msgspec
import pytest

from tests.api.conftest import EdgeServer
from tests.api.wire import CHAT, MODEL, error_of

TEXT = "/v1/completions"
WORDS: list[Any] = ["1", True, [], {}]  # in place of a number
NUMBERS: list[Any] = [1, 0, "true", [], {}]  # in place of true or false
HUGE = 2**63

# What both routes refuse, by field.
COMMON: dict[str, list[Any]] = {
    "temperature": [-0.001, 2.001, 1e308, *WORDS],
    "top_p": [0, -0.1, 1.0001, *WORDS],
    "top_k": [-2, 100_001, 1.5, HUGE, *WORDS],
    "min_p": [-0.01, 1.01, *WORDS],
    "presence_penalty": [-2.01, 2.01, *WORDS],
    "frequency_penalty": [-2.01, 2.01, *WORDS],
    "repeat_penalty": [0, 0.009, 10.01, *WORDS],
    "repetition_penalty": [0, -1, 10.01, *WORDS],
    "repeat_last_n": [-2, 1_000_001, 0.5, *WORDS],
    "typical_p": [0, 1.01, *WORDS],
    "xtc_probability": [-0.01, 1.01, *WORDS],
    "xtc_threshold": [-0.01, 1.01, *WORDS],
    "dry_multiplier": [-0.01, 100.1, *WORDS],
    "dry_base": [0.99, 100.1, *WORDS],
    "dry_allowed_length": [-1, 1_000_001, *WORDS],
    "dry_penalty_last_n": [-2, 1_000_001, *WORDS],
    "dry_sequence_breakers": ["x", [1], [""], ["x" * 41], ["x"] * 0 + ["y"] * 9],
    "logit_bias": [{"a": 1}, {"1": 100.1}, {"1": -100.1}, {"-1": 1}, {"1": "1"}, {str(2**31): 1}, [], "x"],
    "seed": [HUGE, -HUGE - 1, 0.5, *WORDS],
    "stop": [1, ["a"] * 5, [""], "", "x" * 257, [None], {}],
    "n": [0, -1, 9, 1.5, *WORDS],
    "stream": NUMBERS,
    "stream_options": [1, [], {"include_usage": 1}, {"x": 1}, {}],
    "ignore_eos": NUMBERS,
    "cache_prompt": NUMBERS,
    "timings_per_token": NUMBERS,
    "priority": [-1001, 1001, 0.5, *WORDS],
    "min_tokens": [-1, 2**31, *WORDS],
    "stop_token_ids": [[-1], [2**31], [1] * 65, ["1"], 1],
    "max_tokens": [-1, 2**31, 0.5, 0, *WORDS],
    "user": [1, [], {}],
    "model": [1, "", "x" * 513, None],
    "no_such_field": [1],
}
CHAT_ONLY: dict[str, list[Any]] = {
    "messages": [[], "x", {}, 1, None],
    "max_completion_tokens": [0, -1, 2**31, 0.5, *WORDS],
    "logprobs": NUMBERS,
    "top_logprobs": [21, -1, 1, *WORDS],
}
TEXT_ONLY: dict[str, list[Any]] = {
    "prompt": [[], 1, None, {}, [1, "a"], [[]], [-1], [2**31], [1.5], ["a"] * 129],
    "logprobs": [-1, 21, *WORDS],
    "best_of": [0, 21, *WORDS],
    "echo": NUMBERS,
    "suffix": [1, [], {}],
}


def table(path: str, fields: dict[str, list[Any]]) -> list[tuple[str, str, Any]]:
    return [(path, name, value) for name, values in fields.items() for value in values]


CASES = [*table(CHAT, COMMON | CHAT_ONLY), *table(TEXT, COMMON | TEXT_ONLY)]


def body_of(path: str, field: str, value: Any) -> bytes:
    first = {"messages": [{"role": "user", "content": "Hi"}]} if path == CHAT else {"prompt": "Hi"}
    return msgspec.json.encode({"model": MODEL, **first, field: value})


def test_there_are_three_hundred() -> None:
    assert len(CASES) >= 300


def test_each_is_refused_in_time_and_by_name(edge: EdgeServer) -> None:
    """On a machine of one's own each takes a millisecond or two; a busy one is held to the processor's time."""
    wrong, waits = [], []
    for path, field, value in CASES:
        body = body_of(path, field, value)
        started, computed = time.perf_counter(), time.process_time()
        status, _, answer = edge.post(path, body)
        computing, waited = time.process_time() - computed, time.perf_counter() - started
        waits.append(waited)
        param = str(error_of(answer)["param"])
        named = param == field or param.startswith((f"{field}[", f"{field}."))
        if not (status == 400 and named and computing < 0.05):
            wrong.append((path, field, str(value)[:40], status, param, computing))
    assert not wrong
    assert min(waits) < 0.05


@pytest.mark.parametrize("name", ["NaN", "Infinity", "-Infinity", "1e999", "01", "+1", ".5", "0x1"])
def test_numbers_that_json_has_not(edge: EdgeServer, name: str) -> None:
    body = b'{"model":"%s","prompt":"a","temperature":%s}' % (MODEL.encode(), name.encode())
    status, _, answer = edge.post(TEXT, body)
    assert (status, bool(error_of(answer)["message"])) == (400, True)
