"""Our draws against the probabilities; masks, log probabilities, and that no row depends on another."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from app.messages import Sampling
from app.worker.sampling.batch import NO_TOKEN, sample
from app.worker.sampling.edits import apply_mask
from app.worker.sampling.largest import largest
from app.worker.sampling.logprobs import raw_logprobs
from app.worker.sampling.sampler import TokenSampler
from app.worker.sampling.threads import RowThreads

sys.path.insert(0, str(Path(__file__).parent))
from sampler_cases import CASES, HISTORY, LOGITS, VOCABULARY, histories, hostile, ours, realistic


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=0.9, seed=3),
        Sampling(temperature=0.8, top_k=12, top_p=0.9, seed=4),
        Sampling(top_p=0.8, seed=5),
        Sampling(min_p=0.1, temperature=1.5, seed=6),
        Sampling(typical_p=0.7, temperature=0.9, seed=7),
        Sampling(top_k=40, xtc_probability=1.0, xtc_threshold=0.05, seed=8),
        Sampling(xtc_probability=1.0, xtc_threshold=0.05, seed=9),
        Sampling(top_k=30, repeat_penalty=1.3, presence_penalty=0.4, dry_multiplier=0.8, seed=10),
        Sampling(top_k=100, typical_p=0.9, top_p=0.95, min_p=0.01, temperature=1.3, seed=11),
    ],
)
def test_draws_follow_the_distribution(sampling: Sampling) -> None:
    row = (np.random.default_rng(9).standard_normal(400) * 2).astype(np.float32)
    expected = ours(row, sampling, HISTORY % 400)
    assert chi_square_fits(draws_of(row, sampling, 4000), expected)


def test_xtc_strikes_as_often_as_it_should() -> None:
    row = (np.random.default_rng(9).standard_normal(400) * 2).astype(np.float32)
    off, on = (Sampling(top_k=50, xtc_probability=share, xtc_threshold=0.03) for share in (0.0, 1.0))
    expected = 0.7 * ours(row, off, HISTORY[:0]) + 0.3 * ours(row, on, HISTORY[:0])
    some = Sampling(top_k=50, xtc_probability=0.3, xtc_threshold=0.03, seed=2)
    assert chi_square_fits(draws_of(row, some, 4000), expected)
    assert not chi_square_fits(draws_of(row, some, 4000), ours(row, off, HISTORY[:0]))


def draws_of(row: np.ndarray, sampling: Sampling, count: int) -> np.ndarray:
    """Return how often each token is drawn; in batches, as many rows of them with one sampler as one."""
    sampler = TokenSampler(sampling, len(row))
    batch = 50
    drawn: list[int] = []
    for _ in range(count // batch):
        drawn += sample(np.tile(row, (batch, 1)), [sampler] * batch, [(HISTORY % len(row)).astype(np.int32)] * batch)
    return np.bincount(drawn, minlength=len(row))


def chi_square_fits(counts: np.ndarray, probabilities: np.ndarray) -> bool:
    draws = counts.sum()
    if set(np.flatnonzero(counts)) - set(np.flatnonzero(probabilities)):
        return False
    often = probabilities * draws >= 5
    expected = np.append(probabilities[often], probabilities[~often].sum()) * draws
    seen = np.append(counts[often], counts[~often].sum())
    chi_square = ((seen - expected)[expected > 0] ** 2 / expected[expected > 0]).sum()
    freedom = often.sum()
    return bool(chi_square < freedom + 5 * np.sqrt(2 * freedom))


MIXED = list(CASES.values())


@pytest.mark.parametrize("vocabulary", [VOCABULARY, 49_152])
def test_a_row_is_drawn_the_same_whatever_else_is_in_the_batch(vocabulary: int) -> None:
    logits = np.concatenate([realistic(24, vocabulary), hostile(24, vocabulary)])
    ways = [MIXED[index % len(MIXED)] for index in range(48)]

    def samplers() -> list[TokenSampler]:
        return [
            TokenSampler(
                Sampling(**{name: getattr(way, name) for name in way.__struct_fields__} | {"seed": seed}), vocabulary
            )
            for seed, way in enumerate(ways)
        ]

    pasts = histories(48, vocabulary)
    alone = [
        sample(logits[[row]], [sampler], [past])[0]
        for row, (sampler, past) in enumerate(zip(samplers(), pasts, strict=True))
    ]
    together = sample(logits.copy(), samplers(), pasts)
    order = np.random.default_rng(3).permutation(48)
    shuffled = [samplers()[row] for row in order]
    threads = RowThreads(16)
    mixed = sample(logits[order], shuffled, [pasts[row] for row in order], threads=threads)
    assert alone == together
    assert [alone[row] for row in order] == mixed
    assert NO_TOKEN not in alone


def test_different_seeds_and_no_seed_differ() -> None:
    row = realistic(1, VOCABULARY) * np.float32(0.1)

    def draws(seed: int | None) -> list[int]:
        sampler = TokenSampler(Sampling(seed=seed), VOCABULARY)
        return [sample(row.copy(), [sampler], [HISTORY])[0] for _ in range(8)]

    assert draws(1) == draws(1) != draws(2)
    assert draws(None) != draws(None)
    assert draws(-5) == draws(-5)


WAYS = [Sampling(temperature=0), Sampling(), Sampling(top_k=4), Sampling(top_p=0.9), Sampling(typical_p=0.9)]


@pytest.mark.parametrize("sampling", [*WAYS, Sampling(xtc_probability=1)])
def test_rows_without_numbers_are_told_apart(sampling: Sampling) -> None:
    logits = realistic(5, VOCABULARY)
    logits[1, 17] = np.nan
    logits[2] = -np.inf
    logits[3, 5] = np.inf
    samplers = [TokenSampler(sampling, VOCABULARY) for _ in logits]
    details = raw_logprobs(logits, [2] * 5, [False] * 5)
    tokens = sample(logits, samplers, [HISTORY] * 5)
    assert [token == NO_TOKEN for token in tokens] == [False, True, True, True, False]
    assert sample(logits[[2]], samplers[2:3], [HISTORY]) == [NO_TOKEN]
    assert [detail is not None and np.isfinite(detail.log_sum) for detail in details] == [
        True,
        False,
        False,
        False,
        True,
    ]


@pytest.mark.parametrize("sampling", [*WAYS, CASES["everything"]])
def test_what_a_mask_forbids_is_never_drawn(sampling: Sampling) -> None:
    allowed = np.zeros(VOCABULARY, bool)
    allowed[[3, 700, 2084]] = True
    logits = realistic(6, VOCABULARY)
    samplers = [TokenSampler(sampling, VOCABULARY) for _ in logits]
    masks = [allowed, packed(allowed).view(np.int32), packed(allowed), None, allowed[:700], None]
    tokens = sample(logits.copy(), samplers, [HISTORY] * 6, masks)
    assert set(tokens[:3]) <= {3, 700, 2084}
    assert tokens[4] == 3
    free = sample(logits[[3]], [TokenSampler(Sampling(temperature=0), VOCABULARY)], [HISTORY], [None])
    assert free == [int(logits[3].argmax())]


def packed(mask: np.ndarray) -> np.ndarray:
    """Return a mask as bits in whole words of 32, as llguidance makes them."""
    bits = np.packbits(mask, bitorder="little")
    return np.concatenate([bits, np.full(-len(bits) % 4, 255, np.uint8)])


def test_a_mask_equals_minus_infinity() -> None:
    row = LOGITS[0][:100]
    mask = np.random.default_rng(1).random(100) < 0.5
    for form in (mask, packed(mask), packed(mask).view(np.int32), packed(mask).view(np.uint32)):
        masked = row.copy()
        apply_mask(masked, form)
        assert masked.tolist() == np.where(mask, row, -np.inf).tolist()


def test_forbidden_tokens_are_never_drawn() -> None:
    row = np.zeros((1, 300), np.float32)
    row[0, 7], row[0, 8] = 20.0, 19.0
    sampler = TokenSampler(
        Sampling(temperature=0), 300, np.array([7], np.int32), forbidden_early=np.array([8], np.int32), early=12
    )
    drawn = [sample(row.copy(), [sampler], [HISTORY[:length]])[0] for length in (10, 11, 12, 13)]
    assert drawn == [0, 0, 8, 8]


def test_equal_logits_are_taken_by_their_number() -> None:
    row = np.zeros((1, 1000), np.float32)
    row[0, [900, 3, 500]] = 1.0
    assert [ids.tolist() for ids in largest(row, [0], [5])] == [[3, 500, 900, 0, 1]]


@pytest.mark.parametrize("size", [5, 64, 400, 5001])
def test_the_largest_are_found_among_ties(size: int) -> None:
    random = np.random.default_rng(size)
    logits = random.integers(0, 30, (7, size)).astype(np.float32)
    for count in (1, 4, size // 2, size):
        expected = [np.lexsort((np.arange(size), -row))[:count].tolist() for row in logits[1:4]]
        assert [ids.tolist() for ids in largest(logits, [1, 2, 3], [count] * 3)] == expected


def test_logprobs_are_the_log_softmax_of_the_raw_rows() -> None:
    logits = realistic(6, VOCABULARY)
    raw = logits.copy()
    details = raw_logprobs(logits, [5, None, 0, 20, 1, 3], [True, False, True, False, False, False])
    logits[0] = 0  # what bias and penalties do to a row that is edited
    assert details[1] is None
    for row, top in ((0, 5), (2, 0), (3, 20), (4, 1), (5, 3)):
        detail = details[row]
        assert detail is not None
        exact = raw[row].astype(np.float64)
        exact -= np.log(np.exp(exact).sum())
        best = np.argsort(-raw[row], kind="stable")[:top]
        assert [token for token, _ in detail.top] == best.tolist()
        assert [logprob for _, logprob in detail.top] == pytest.approx(exact[best].tolist(), abs=1e-5)
        assert detail.of(123) == pytest.approx(exact[123], abs=1e-5)
