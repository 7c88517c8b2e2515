"""Our filters against llama.cpp's own sampler chain, on the same logits."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from app.messages import Sampling
from app.worker.sampling.batch import sample
from app.worker.sampling.edits import edit
from app.worker.sampling.sampler import TokenSampler

sys.path.insert(0, str(Path(__file__).parent))
import llama_chain
from sampler_cases import CASES, HISTORIES, HISTORY, LOGITS, REALISTIC, ROWS, VOCABULARY, ours, realistic

LIMIT = 1e-5


def same(ours: np.ndarray, theirs: np.ndarray) -> bool:
    return bool(np.abs(ours - theirs).max() <= LIMIT)


def same_but_for_ties(row: np.ndarray, ours: np.ndarray, theirs: np.ndarray) -> bool:
    """Of equal logits at a filter's edge, either may be kept: llama.cpp's sort is not stable."""
    kept, others = (ours > 0) & (theirs == 0), (theirs > 0) & (ours == 0)
    ties = set(row[kept].tolist()) == set(row[others].tolist())
    return ties and bool(np.abs(np.sort(ours) - np.sort(theirs)).max() <= LIMIT)


def cut_by(
    values: np.ndarray, probabilities: np.ndarray, share: float, slack: float, ranks: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return what the least values that make up the share are, and what lies near the last of them."""
    order = np.argsort(values, kind="stable")
    last = min(int(np.searchsorted(probabilities[order].cumsum(), share)), len(order) - 1)
    near = np.abs(values - values[order[last]]) <= slack
    near[order[max(0, last - ranks) : last + ranks + 1]] = True
    return values <= values[order[last]], near


def at_the_edge(row: np.ndarray, sampling: Sampling, tokens: np.ndarray) -> bool:
    """Whether the tokens lie where typical or top-p cut, within a float32's rounding: they may fall on either side."""
    logits = row.astype(np.float64)
    if 0 < sampling.top_k < len(row):
        logits[logits < np.sort(logits)[-sampling.top_k]] = -np.inf
    explained = np.zeros(len(row), bool)
    if sampling.typical_p < 1:
        probabilities = softmax(logits)
        information = -np.log(np.maximum(probabilities, 1e-300))
        distances = np.abs(information - (probabilities * information).sum())
        kept, near = cut_by(distances, probabilities, sampling.typical_p, 3e-5, 2)
        explained |= near
        logits[~(kept | near)] = -np.inf
    if sampling.top_p < 1:
        explained |= cut_by(-logits, softmax(logits), sampling.top_p, 1e-5, 2 + int(explained.sum()))[1]
    if not sampling.temperature:
        return bool(explained[tokens].any())  # of two different best, one is kept by one side only
    return bool(explained[tokens].all())


def softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


@pytest.mark.parametrize("sampling", CASES.values(), ids=CASES.keys())
def test_probabilities_equal_llama_cpp(sampling: Sampling) -> None:
    compared = edges = 0
    for index, (row, history) in enumerate(zip(LOGITS, HISTORIES, strict=True)):
        if sampling.typical_p < 1 and row.max() - row.min() > 80:
            continue  # llama.cpp's entropy is not a number where a probability is 0
        got, (expected, _) = ours(row, sampling, history), llama_chain.probabilities(row, sampling, history)
        compared += 1
        if same(got, expected):
            continue
        edited = row[None].copy()
        edit(edited, [TokenSampler(sampling, len(row))], [history])
        if same_but_for_ties(edited[0], got, expected):
            continue
        edges += index < REALISTIC
        assert at_the_edge(edited[0], sampling, np.flatnonzero((got > 0) != (expected > 0))), index
    assert compared >= 0.85 * ROWS
    assert edges <= 0.02 * REALISTIC


@pytest.mark.parametrize("vocabulary", [49_152, 49_153, 128_256])
@pytest.mark.parametrize("name", ["nothing", "usual", "top_p", "typical", "min_p and xtc", "everything"])
def test_probabilities_of_real_vocabularies(name: str, vocabulary: int) -> None:
    sampling = CASES[name]
    for row in realistic(4, vocabulary, seed=vocabulary):
        expected, _ = llama_chain.probabilities(row, sampling, HISTORY)
        got = ours(row, sampling, HISTORY)
        if not same(got, expected):  # llama.cpp adds up 128,256 float32 one after the other
            assert at_the_edge(row, sampling, np.flatnonzero((got > 0) != (expected > 0)))


def test_typical_stays_right_where_a_probability_is_0() -> None:
    row = realistic(1, 500)[0]
    row[100:] = -np.inf
    fewer = row[:100]
    for sampling in (Sampling(typical_p=0.7), Sampling(typical_p=0.7, top_k=450)):
        got = ours(row, sampling, HISTORY[:0])
        assert same(got[:100], llama_chain.probabilities(fewer, sampling, HISTORY[:0])[0])
        assert not got[100:].any()


def test_greedy_equals_llama_cpp() -> None:
    samplers = [TokenSampler(Sampling(temperature=0), VOCABULARY) for _ in LOGITS]
    assert sample(LOGITS.copy(), samplers, HISTORIES) == [llama_chain.greedy(row) for row in LOGITS]


@pytest.mark.parametrize("filters", [{"top_k": 40, "top_p": 0.9}, {"top_p": 0.95}, {"top_k": 3}, {}])
def test_what_a_grammar_forbids_is_never_drawn(filters: Any) -> None:
    logits = np.full((200, 5000), -np.inf, np.float32)
    allowed = [7, 300, 301, 4999]
    logits[:, allowed] = [0.5, 0.0, -1.0, 2.0]
    sampler = TokenSampler(Sampling(**filters), 5000)
    tokens = sample(logits, [sampler] * len(logits), [np.zeros(1, np.int32)] * len(logits))
    assert set(tokens) <= set(allowed)
    assert len(set(tokens)) > 1
