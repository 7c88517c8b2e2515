"""Our filters against llama.cpp's own sampler chain, on the same logits; our draws against the probabilities."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from app.messages import Sampling
from app.worker.sampling.batch import NO_TOKEN, distribution, sample
from app.worker.sampling.edits import apply_mask, edit
from app.worker.sampling.largest import largest
from app.worker.sampling.logprobs import raw_logprobs
from app.worker.sampling.sampler import TokenSampler
from app.worker.sampling.threads import RowThreads

sys.path.insert(0, str(Path(__file__).parent))
import llama_chain

VOCABULARY = 2085  # no multiple of a group
ROWS = 1000
LIMIT = 1e-5


def realistic(rows: int, vocabulary: int, seed: int = 0) -> np.ndarray:
    """Return logits as models give them: a few tokens far above a broad rest."""
    random = np.random.default_rng(seed)
    logits = random.standard_normal((rows, vocabulary)) * 1.5
    for row in logits:
        best = random.choice(vocabulary, 200, replace=False)
        row[best] += random.uniform(6, 14) - random.uniform(0.8, 3.0) * np.log(np.arange(1, 201))
    return logits.astype(np.float32)


def hostile(rows: int, vocabulary: int, seed: int = 1) -> np.ndarray:
    """Return logits with ties, with minus infinity, huge, flat, and nearly so."""
    random = np.random.default_rng(seed)
    logits = (random.standard_normal((rows, vocabulary)) * 3).astype(np.float32)
    for index, row in enumerate(logits):
        kind = index % 8
        if kind == 0:
            row[:] = np.round(row * 2) / 2
        elif kind == 1:
            row[random.random(vocabulary) < 0.95] = -np.inf
        elif kind == 2:
            row *= 1e4
        elif kind == 3:
            row[:] = row[0]
        elif kind == 4:
            row *= 1e-3
        elif kind == 5:
            row[random.integers(vocabulary)] = 60.0
        elif kind == 6:
            row[:] = np.linspace(-20, 20, vocabulary)[:: 1 if index % 16 < 8 else -1]
        else:
            row -= 500
    return logits


def histories(rows: int, vocabulary: int) -> list[np.ndarray]:
    """Return token histories of 1 to 300 tokens that repeat themselves."""
    random = np.random.default_rng(2)
    phrase = random.integers(0, vocabulary, 9)
    found = []
    for index in range(rows):
        noise = random.integers(0, vocabulary, 300)
        again = np.tile(phrase, 34)[:300]
        mixed = np.where(random.random(300) < (index % 10) / 10, noise, again)
        found.append(mixed[: 1 + index % 300].astype(np.int32))
    return found


REALISTIC = 750  # the first of the rows; the others are hostile
LOGITS = np.concatenate([realistic(REALISTIC, VOCABULARY), hostile(ROWS - REALISTIC, VOCABULARY)])
HISTORIES = histories(ROWS, VOCABULARY)
HISTORY = np.array([1, 5, 5, 7, 42, 42, 42, 300, 1999, 17] * 10, np.int32)


def ours(row: np.ndarray, sampling: Sampling, history: np.ndarray) -> np.ndarray:
    logits, sampler = row[None].copy(), TokenSampler(sampling, len(row))
    edit(logits, [sampler], [history])
    ids, probabilities = distribution(logits, sampler)
    result = np.zeros(len(row))
    result[ids] = probabilities
    return result


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


CASES = {
    "nothing": Sampling(),
    "temperature": Sampling(temperature=0.7),
    "temperature, low": Sampling(temperature=0.05),
    "temperature, high": Sampling(temperature=2.0),
    "top_k": Sampling(top_k=40),
    "top_k over the number of groups": Sampling(top_k=1000),
    "top_k over the vocabulary": Sampling(top_k=100_000),
    "top_k one": Sampling(top_k=1),
    "typical": Sampling(typical_p=0.9),
    "typical, small": Sampling(typical_p=0.2),
    "top_p": Sampling(top_p=0.9),
    "top_p, small": Sampling(top_p=0.01),
    "top_p, large": Sampling(top_p=0.999),
    "min_p": Sampling(min_p=0.05),
    "xtc": Sampling(xtc_probability=1.0, xtc_threshold=0.1),
    "xtc, low threshold": Sampling(xtc_probability=1.0, xtc_threshold=0.02, temperature=0.8),
    "xtc, off": Sampling(xtc_probability=1.0, xtc_threshold=0.51),
    "repeat": Sampling(repeat_penalty=1.3),
    "repeat, short window": Sampling(repeat_penalty=1.3, repeat_last_n=4),
    "repeat, whole slot": Sampling(repeat_penalty=1.1, repeat_last_n=-1),
    "no window": Sampling(repeat_penalty=1.3, repeat_last_n=0),
    "presence": Sampling(presence_penalty=1.5),
    "frequency": Sampling(frequency_penalty=0.5),
    "dry": Sampling(dry_multiplier=0.8),
    "dry, whole slot": Sampling(dry_multiplier=1.2, dry_base=1.1, dry_allowed_length=0, dry_penalty_last_n=-1),
    "bias": Sampling(logit_bias={3: 10.0, 42: -100.0}),
    "usual": Sampling(temperature=0.8, top_k=40, top_p=0.95, min_p=0.05),
    "top_p and min_p": Sampling(temperature=1.4, top_p=0.97, min_p=0.02),
    "top_k and typical": Sampling(top_k=100, typical_p=0.8),
    "typical and top_p": Sampling(typical_p=0.9, top_p=0.8, temperature=0.9),
    "min_p and xtc": Sampling(min_p=0.02, xtc_probability=1.0, xtc_threshold=0.05),
    "everything": Sampling(
        temperature=1.2,
        top_k=200,
        typical_p=0.95,
        top_p=0.9,
        min_p=0.01,
        repeat_penalty=1.2,
        presence_penalty=0.3,
        frequency_penalty=-0.2,
        logit_bias={5: 4.0, 100: 6.0},
        dry_multiplier=0.5,
        xtc_probability=1.0,
        xtc_threshold=0.15,
    ),
    "temperature 0": Sampling(temperature=0.0, top_k=40, repeat_penalty=1.2),
    "temperature 0 and xtc": Sampling(temperature=0.0, min_p=0.01, xtc_probability=1.0),
    "temperature 0, xtc alone": Sampling(temperature=0.0, xtc_probability=1.0),
    "temperature 0 and typical": Sampling(temperature=0.0, typical_p=0.5),
}


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
