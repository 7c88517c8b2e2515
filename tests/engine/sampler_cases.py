"""Logits, histories and ways of drawing that the tests of the sampler share."""

from __future__ import annotations

import numpy as np

from app.messages import Sampling
from app.worker.sampling.batch import distribution
from app.worker.sampling.edits import edit
from app.worker.sampling.sampler import TokenSampler

VOCABULARY = 2085  # no multiple of a group
ROWS = 1000
REALISTIC = 750  # the first of the rows; the others are hostile


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
