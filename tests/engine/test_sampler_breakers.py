"""DRY with the breakers of a real vocabulary, against llama.cpp's own."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from app.llama.model import Model
from app.messages import Sampling
from app.worker.sampling.breakers import BreakerTable
from app.worker.sampling.dry import Dry

sys.path.insert(0, str(Path(__file__).parent))
import llama_chain

TEXT = (
    "The cat sat on the mat: the cat sat on the mat.\nThe cat sat on the mat: the cat sat on the mat, and then *the cat"
)
ENDS = ["", " sat", " sat on the", ":", ' "the cat', "\nThe", "日本語の日本", " naïve naïv"]


@pytest.fixture(scope="module")
def model(default_model: Path) -> Iterator[Model]:
    with Model(default_model, device="cpu") as model:
        yield model


@pytest.fixture(scope="module")
def table(model: Model) -> BreakerTable:
    return BreakerTable(lambda: model.vocabulary.words, model.vocabulary.tokenize)


BREAKERS: list[tuple[str, ...]] = [
    ("\n", ":", '"', "*"),
    (),
    ("the",),
    (" the mat", "cat"),
    ("本語", "ïv"),
    ("mat: the cat sat on the mat, and then",),
    ("<|im_end|>", "tt", "\n\n"),
]


@pytest.mark.parametrize("breakers", BREAKERS)
def test_penalties_equal_llama_cpp(model: Model, table: BreakerTable, breakers: tuple[str, ...]) -> None:
    penalized = 0
    for end in ENDS:
        history = model.vocabulary.tokenize(TEXT + end)
        for allowed, last_n in ((1, -1), (2, 20), (2, -1)):
            sampling = Sampling(
                dry_multiplier=0.3,
                dry_base=1.2,
                dry_allowed_length=allowed,
                dry_penalty_last_n=last_n,
                dry_sequence_breakers=breakers,
            )
            row = np.zeros(model.vocabulary.size, np.float32)
            expected, _ = llama_chain.probabilities(row, sampling, history, model.vocabulary._pointer)
            ids, amounts = Dry(sampling, table.find(breakers)).penalties(history)
            row[ids] -= amounts
            penalized += len(ids)
            np.testing.assert_allclose(row, np.log(expected) - np.log(expected.max()), atol=2e-4)
    assert penalized >= 5


def test_words_are_what_llama_cpp_looks_into(model: Model) -> None:
    words, pieces = model.vocabulary.words, model.vocabulary.pieces
    assert len(words) == model.vocabulary.size
    assert words[model.vocabulary.eos or 0] == b"<|im_end|>"
    assert all(word == piece for word, piece in zip(words, pieces, strict=True) if piece)
