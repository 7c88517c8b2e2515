"""Our filters against llama.cpp's own sampler chain, on the same logits."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import pytest

from app.llama.library import load
from app.messages import Sampling
from app.worker.sampler import NO_TOKEN, TokenSampler, largest, logprobs, sample
from app.worker.sampler import block_maxima_of as maxima

VOCABULARY = 5000
HISTORY = np.array([1, 5, 5, 7, 42, 42, 42, 300, 4999, 17] * 10, np.int32)


def rows(count: int, spread: float = 3.0, vocabulary: int = VOCABULARY, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal((count, vocabulary)) * spread).astype(np.float32)


def llama_distribution(row: np.ndarray, sampling: Sampling) -> dict[int, float]:
    """Return what llama.cpp's chain, in the order of its default, leaves of a row."""
    llama = load()
    chain = llama.llama_sampler_chain_init(llama.llama_sampler_chain_default_params())
    biases = (llama.llama_logit_bias * max(len(sampling.logit_bias), 1))(*sampling.logit_bias.items())
    last_n = len(HISTORY) if sampling.repeat_last_n < 0 else sampling.repeat_last_n
    penalties = (sampling.repeat_penalty, sampling.frequency_penalty, sampling.presence_penalty)
    penalizer = llama.llama_sampler_init_penalties(len(row), last_n, *penalties)
    for token in HISTORY.tolist():
        llama.llama_sampler_accept(penalizer, token)
    for sampler in (
        llama.llama_sampler_init_logit_bias(len(row), len(sampling.logit_bias), biases),
        penalizer,
        llama.llama_sampler_init_top_k(sampling.top_k),
        llama.llama_sampler_init_top_p(sampling.top_p, 0),
        llama.llama_sampler_init_min_p(sampling.min_p, 0),
        llama.llama_sampler_init_temp(sampling.temperature),
        llama.llama_sampler_init_dist(1),
    ):
        llama.llama_sampler_chain_add(chain, sampler)
    entries: Any = (llama.llama_token_data * len(row))(
        *((token, logit, 0.0) for token, logit in enumerate(row.tolist()))
    )
    array = llama.llama_token_data_array(entries, len(row), -1, False)
    llama.llama_sampler_apply(chain, ctypes.byref(array))
    result = {array.data[index].id: array.data[index].p for index in range(array.size)}
    llama.llama_sampler_free(chain)
    return {token: probability for token, probability in result.items() if probability > 0}


def our_distribution(row: np.ndarray, sampling: Sampling) -> dict[int, float]:
    row = row.copy()
    sampler = TokenSampler(sampling, len(row))
    if sampler.edits:
        sampler.edit(row, HISTORY)
    ids, probabilities = sampler.distribution(row)
    return dict(zip(ids.tolist(), probabilities.tolist(), strict=True))


CASES = {
    "temperature": Sampling(temperature=0.7),
    "top_k": Sampling(top_k=40),
    "top_k over the number of blocks": Sampling(top_k=1000),
    "top_k over the vocabulary": Sampling(top_k=100_000),
    "top_k one": Sampling(top_k=1),
    "top_p": Sampling(top_p=0.9),
    "top_p small": Sampling(top_p=0.01),
    "min_p": Sampling(min_p=0.05),
    "repeat": Sampling(repeat_penalty=1.3),
    "repeat, short window": Sampling(repeat_penalty=1.3, repeat_last_n=4),
    "repeat, whole slot": Sampling(repeat_penalty=1.1, repeat_last_n=-1),
    "no window": Sampling(repeat_penalty=1.3, repeat_last_n=0),
    "presence": Sampling(presence_penalty=1.5),
    "frequency": Sampling(frequency_penalty=0.5),
    "bias": Sampling(logit_bias={3: 10.0, 42: -100.0}),
    "usual": Sampling(temperature=0.8, top_k=40, top_p=0.95, min_p=0.05),
    "top_p and min_p": Sampling(temperature=1.4, top_p=0.97, min_p=0.02),
    "everything": Sampling(
        temperature=1.2,
        top_k=200,
        top_p=0.9,
        min_p=0.01,
        repeat_penalty=1.2,
        presence_penalty=0.3,
        frequency_penalty=-0.2,
        logit_bias={5: 4.0, 100: 6.0},
    ),
    "greedy": Sampling(temperature=0.0, top_k=40, repeat_penalty=1.2),
}


@pytest.mark.parametrize("spread", [0.5, 3.0, 8.0])
@pytest.mark.parametrize("sampling", CASES.values(), ids=CASES.keys())
def test_probabilities_equal_llama_cpp(sampling: Sampling, spread: float) -> None:
    for row in rows(3, spread):
        theirs, ours = llama_distribution(row, sampling), our_distribution(row, sampling)
        for token in theirs.keys() | ours.keys():
            # A token at the very edge of top-p may fall on either side by rounding.
            assert abs(theirs.get(token, 0.0) - ours.get(token, 0.0)) <= 1e-5, token
        assert sum(ours.values()) == pytest.approx(1.0, abs=1e-5)


def test_a_real_vocabulary_that_is_no_multiple_of_the_block() -> None:
    row = rows(1, vocabulary=49_153)[0]
    row[-1] = 30.0
    sampling = Sampling(temperature=0.8, top_k=40, top_p=0.95)
    assert our_distribution(row, sampling) == pytest.approx(llama_distribution(row, sampling), abs=1e-5)
    assert sample(row[None].copy(), [TokenSampler(Sampling(seed=1), 49_153)], [HISTORY]) == [49_152]


def test_equal_logits_are_taken_by_their_number() -> None:
    row = np.zeros(1000, np.float32)
    assert largest(row, 5, maxima(row[None])[0]).tolist() == [0, 1, 2, 3, 4]


def test_greedy_rows_take_the_best_token() -> None:
    logits = rows(8)
    expected = logits.argmax(axis=1).tolist()
    samplers = [TokenSampler(Sampling(temperature=0), VOCABULARY) for _ in logits]
    assert sample(logits, samplers, [HISTORY] * 8) == expected


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=0.9, seed=3),
        Sampling(temperature=0.8, top_k=12, top_p=0.9, seed=4),
        Sampling(top_p=0.8, seed=5),
        Sampling(min_p=0.1, temperature=1.5, seed=6),
    ],
)
def test_draws_follow_the_distribution(sampling: Sampling) -> None:
    row = rows(1, spread=2.0, vocabulary=400, seed=9)[0]
    expected = our_distribution(row, sampling)
    sampler = TokenSampler(sampling, len(row))
    draws = 4000
    counts = np.bincount([sample(row[None], [sampler], [HISTORY])[0] for _ in range(draws)], minlength=len(row))
    assert set(np.flatnonzero(counts).tolist()) <= expected.keys()
    often = [token for token, probability in expected.items() if probability * draws >= 5]
    rest = draws * (1 - sum(expected[token] for token in often))
    chi_square = sum((counts[token] - draws * expected[token]) ** 2 / (draws * expected[token]) for token in often)
    if rest >= 5:
        chi_square += (draws - sum(counts[token] for token in often) - rest) ** 2 / rest
    freedom = len(often)
    assert chi_square < freedom + 5 * np.sqrt(2 * freedom)


def test_a_seed_gives_the_same_draws_whatever_else_is_in_the_batch() -> None:
    logits = rows(4, spread=1.0)
    sampling = Sampling(temperature=1.0, top_k=50, seed=7)
    alone, in_batch = TokenSampler(sampling, VOCABULARY), TokenSampler(sampling, VOCABULARY)
    others = [TokenSampler(Sampling(top_k=5), VOCABULARY), TokenSampler(Sampling(temperature=0), VOCABULARY)]
    for row in logits:
        expected = sample(row[None].copy(), [alone], [HISTORY])[0]
        batch = np.stack([logits[0], row, logits[1]])
        assert sample(batch, [others[0], in_batch, others[1]], [HISTORY] * 3)[1] == expected


def test_different_seeds_and_no_seed_differ() -> None:
    row = rows(1, spread=0.1)

    def draws(seed: int | None) -> list[int]:
        sampler = TokenSampler(Sampling(seed=seed), VOCABULARY)
        return [sample(row, [sampler], [HISTORY])[0] for _ in range(8)]

    assert draws(1) == draws(1) != draws(2)
    assert draws(None) != draws(None)
    assert draws(-5) == draws(-5)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rows_without_numbers_are_told_apart(temperature: float) -> None:
    logits = rows(4)
    logits[1, 17] = np.nan
    logits[2] = -np.inf
    samplers = [TokenSampler(Sampling(temperature=temperature, top_k=4), VOCABULARY) for _ in logits]
    tokens = sample(logits, samplers, [HISTORY] * 4)
    assert [token == NO_TOKEN for token in tokens] == [False, True, True, False]


def test_forbidden_tokens_are_never_drawn() -> None:
    row = np.zeros((1, 300), np.float32)
    row[0, 7] = 20.0
    sampler = TokenSampler(Sampling(seed=1), 300, np.array([7], np.int32))
    assert all(sample(row.copy(), [sampler], [HISTORY])[0] != 7 for _ in range(50))


def test_logprobs_are_the_log_softmax_of_the_raw_row() -> None:
    row = rows(1)[0]
    expected = row.astype(np.float64) - np.log(np.exp(row.astype(np.float64)).sum())
    log_sum, top = logprobs(row, 5)
    best = np.argsort(-row)[:5]
    assert [token for token, _ in top] == best.tolist()
    assert [logprob for _, logprob in top] == pytest.approx(expected[best].tolist(), abs=1e-5)
    assert float(row[123]) - log_sum == pytest.approx(expected[123], abs=1e-5)


@pytest.mark.parametrize("filters", [{"top_k": 40, "top_p": 0.9}, {"top_p": 0.95}, {"top_k": 3}, {}])
def test_what_a_grammar_forbids_is_never_drawn(filters: Any) -> None:
    logits = np.full((200, 5000), -np.inf, np.float32)
    allowed = [7, 300, 301, 4999]
    logits[:, allowed] = [0.5, 0.0, -1.0, 2.0]
    sampler = TokenSampler(Sampling(**filters), 5000)
    tokens = sample(logits, [sampler] * len(logits), [np.zeros(1, np.int32)] * len(logits))
    assert set(tokens) <= set(allowed)
    assert len(set(tokens)) > 1
