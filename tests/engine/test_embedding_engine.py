"""The engine of models that embed or rerank, stepped by hand over the real llama.cpp."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pytest

from app.errors import DecodeError, EngineError, ModelLoadError
from app.llama.batch import Batch
from app.llama.embedding_context import EmbeddingContext
from app.messages import Accepted, Cancel, Embed, Generate, LoadModel, Piece, Refused, Sampling, Step
from app.models.kind import PoolingType
from app.worker.embedding_engine import EmbeddingEngine
from app.worker.embedding_worker import EmbeddingWorker, kind_of
from tests.embedding_models import (
    CAT,
    CLS,
    CONTEXT,
    SEP,
    SIZE,
    write_bert_classifier,
    write_embedder,
    write_reranker,
    write_unpooled,
)

TEXTS = [[CLS, *([CAT, CAT + 1] * length), SEP] for length in (1, 3, 9, 2, 20)]
Send = list[msgspec.Struct]


def tokens(ids: list[int]) -> bytes:
    return np.array(ids, "<i4").tobytes()


class Stepped:
    """A loaded worker and what it published."""

    def __init__(self, model: Path, **settings: Any) -> None:
        self.sent: Send = []
        command = LoadModel(str(model), device="cpu", **{"batch_size": 32, **settings})
        self.worker = EmbeddingWorker(command, kind_of(command), self.sent.append)
        self.engine: EmbeddingEngine = self.worker.engine

    def submit(self, request: int, *inputs: list[int], **more: Any) -> msgspec.Struct:
        self.engine.submit(Embed(request, [tokens(ids) for ids in inputs], **more))
        return self.sent[-1]

    def pieces(self, request: int) -> list[Piece]:
        return [p for step in self.sent if isinstance(step, Step) for p in step.pieces if p.request == request]

    def vectors(self, *inputs: list[int], size: int = SIZE, **more: Any) -> npt.NDArray[np.float32]:
        request = len(self.sent) + 1000
        assert isinstance(self.submit(request, *inputs, **more), Accepted)
        for _ in range(100):
            self.engine.step()
            if found := self.pieces(request):
                assert found[-1].finish_reason == "stop", found[-1].error
                return np.frombuffer(found[-1].vectors or b"", "<f4").reshape(len(inputs), size)
        raise AssertionError("the request doesn't end")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("embedding-models")


@pytest.fixture(scope="module")
def embedder(folder: Path) -> Path:
    return write_embedder(folder)


@pytest.fixture
def stepped(embedder: Path) -> Iterator[Stepped]:
    stepped = Stepped(embedder)
    yield stepped
    stepped.worker.close()


def cosine(one: npt.NDArray[np.float32], other: npt.NDArray[np.float32]) -> float:
    return float(np.sum(one.astype(np.float64) * other, axis=-1).min())


def test_a_batch_gives_what_each_text_gives_alone(stepped: Stepped) -> None:
    together = stepped.vectors(*TEXTS)
    alone = np.concatenate([stepped.vectors(text) for text in TEXTS])
    assert cosine(together, alone) > 1 - 1e-5
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, atol=1e-6)
    others = together @ together.T
    assert others[~np.eye(len(TEXTS), dtype=bool)].max() < 0.9999, "the texts must differ for the comparison to count"
    steps = [step for step in stepped.sent if isinstance(step, Step)]
    assert [step.load.inputs_embedded for step in steps[:3]] == [3, 1, 1]  # 32 tokens, 6, and 42 by themselves
    assert sum(step.load.prompt_tokens_computed for step in steps[:3]) == sum(map(len, TEXTS))


def test_the_pooling_is_the_mean_over_all_tokens(stepped: Stepped, embedder: Path) -> None:
    command = LoadModel(str(embedder), device="cpu", pooling="cls")
    other = Stepped(embedder, pooling="cls")
    try:
        assert kind_of(command).pooling is PoolingType.CLS
        assert cosine(stepped.vectors(TEXTS[1]), other.vectors(TEXTS[1])) < 0.9999
        assert other.worker.hello.fingerprint != stepped.worker.hello.fingerprint
    finally:
        other.worker.close()


def test_dimensions_are_the_first_numbers_of_length_1(stepped: Stepped) -> None:
    whole = stepped.vectors(TEXTS[0])[0].astype(np.float64)
    short = stepped.vectors(TEXTS[0], size=5, dimensions=5)[0]
    np.testing.assert_allclose(short, whole[:5] / np.linalg.norm(whole[:5]), atol=1e-6)


def test_one_at_a_time_the_answer_is_the_same_to_the_bit(embedder: Path) -> None:
    stepped = Stepped(embedder, deterministic=True)
    try:
        together = stepped.vectors(*TEXTS)
        assert all(step.load.inputs_embedded == 1 for step in stepped.sent if isinstance(step, Step))
        for text, vector in zip(reversed(TEXTS), together[::-1], strict=True):
            np.testing.assert_array_equal(stepped.vectors(text)[0], vector)
    finally:
        stepped.worker.close()


def test_a_client_with_one_text_does_not_wait_for_another_with_many(stepped: Stepped) -> None:
    stepped.submit(1, *([TEXTS[2]] * 40), client="many")
    stepped.engine.step()
    stepped.submit(2, TEXTS[0], client="one")
    stepped.engine.step()
    assert [piece.finish_reason for piece in stepped.pieces(2)] == ["stop"]
    assert stepped.pieces(1) == []


def test_cancelled_jobs_compute_no_more(stepped: Stepped) -> None:
    stepped.submit(1, *([TEXTS[2]] * 40))
    stepped.engine.step()
    stepped.engine.submit(Cancel(1))
    stepped.engine.step()
    (piece,) = stepped.pieces(1)
    assert (piece.finish_reason, piece.vectors) == ("cancelled", None)
    last = stepped.sent[-1]
    assert isinstance(last, Step)
    assert (last.load.inputs_embedded, last.load.running) == (0, 0)
    assert cosine(stepped.vectors(TEXTS[0]), stepped.vectors(TEXTS[0])) > 1 - 1e-6


@pytest.mark.parametrize(
    ("inputs", "more", "error", "param"),
    [
        ([], {}, "RequestError", "input"),
        ([[CLS], []], {}, "RequestError", "input[1]"),
        ([[CLS], [-1]], {}, "RequestError", "input[1]"),
        ([[CLS], [CLS] * (CONTEXT + 1)], {}, "ContextLengthError", "input[1]"),
        ([[10_000]], {}, "RequestError", "input[0]"),
        ([[CLS]], {"dimensions": SIZE + 1}, "RequestError", "dimensions"),
    ],
)
def test_what_llama_cpp_could_not_bear_is_refused(
    stepped: Stepped, inputs: list[list[int]], more: dict[str, Any], error: str, param: str
) -> None:
    refused = stepped.submit(1, *inputs, **more)
    assert isinstance(refused, Refused)
    assert (refused.error, refused.param) == (error, param)
    assert stepped.vectors([CLS] * CONTEXT).shape == (1, SIZE)


def test_it_does_not_continue_text(stepped: Stepped) -> None:
    stepped.engine.submit(Generate(1, tokens([CLS]), 5, Sampling()))
    assert isinstance(stepped.sent[-1], Refused)


def test_of_a_batch_that_fails_each_text_is_tried_alone(stepped: Stepped, monkeypatch: pytest.MonkeyPatch) -> None:
    context, real = stepped.worker._context, stepped.worker._context.embed

    def embed(batch: Batch, count: int) -> npt.NDArray[np.float32]:
        if count > 1 or len(batch) == len(TEXTS[2]):
            raise DecodeError("llama_decode returned -2")
        return real(batch, count)

    expected = stepped.vectors(TEXTS[0])
    monkeypatch.setattr(context, "embed", embed)
    stepped.submit(1, TEXTS[0])
    stepped.submit(2, TEXTS[2])
    for _ in range(3):
        stepped.engine.step()
    assert cosine(np.frombuffer(stepped.pieces(1)[0].vectors or b"", "<f4"), expected) > 1 - 1e-6
    assert [piece.finish_reason for piece in stepped.pieces(2)] == ["error"]


def test_a_context_that_fails_again_and_again_ends_the_engine(
    stepped: Stepped, monkeypatch: pytest.MonkeyPatch
) -> None:
    def embed(_batch: Batch, _count: int) -> npt.NDArray[np.float32]:
        raise DecodeError("llama_decode returned -2")

    monkeypatch.setattr(stepped.worker._context, "embed", embed)
    for request in (1, 2, 3):
        stepped.submit(request, TEXTS[0])
    with pytest.raises(EngineError, match="beyond repair"):
        stepped.engine.run()


def test_numbers_that_are_not_finite_are_an_error(stepped: Stepped, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stepped.worker._context, "embed", lambda _batch, count: np.full((count, SIZE), np.nan))
    stepped.submit(1, TEXTS[0])
    stepped.engine.step()
    (piece,) = stepped.pieces(1)
    assert (piece.finish_reason, piece.vectors) == ("error", None)
    assert "not finite" in (piece.error or "")


@pytest.fixture(scope="module")
def reranker(folder: Path) -> Iterator[Stepped]:
    stepped = Stepped(write_reranker(folder))
    yield stepped
    stepped.worker.close()


class TestReranker:
    def test_scores_are_probabilities_or_as_they_are(self, reranker: Stepped) -> None:
        raw = reranker.vectors([0, 5, 2], [0, 9, 2], size=1, activation=False).astype(np.float64)
        np.testing.assert_allclose(reranker.vectors([0, 5, 2], [0, 9, 2], size=1), 1 / (1 + np.exp(-raw)), atol=1e-3)
        assert abs(raw[0] - raw[1]).max() > 1e-3
        assert reranker.worker.hello.capabilities == ["rerank"]

    def test_there_are_no_dimensions(self, reranker: Stepped) -> None:
        refused = reranker.submit(1, [0, 5, 2], dimensions=2)
        assert isinstance(refused, Refused)
        assert refused.param == "dimensions"


class TestKinds:
    @pytest.mark.parametrize(
        ("write", "complaint"),
        [
            (write_unpooled, "--pooling mean, cls or last"),
            (lambda folder: write_bert_classifier(folder, "good", "bad", "ugly"), "tells 3 classes apart"),
            (lambda folder: write_bert_classifier(folder, "relevant"), "pooler"),
        ],
    )
    def test_files_that_are_for_nothing(self, tmp_path: Path, write: Callable[[Path], Path], complaint: str) -> None:
        model = write(tmp_path)
        with pytest.raises(ModelLoadError, match=complaint):
            kind_of(LoadModel(str(model)))
        assert kind_of(LoadModel(str(model), pooling="mean")).pooling is PoolingType.MEAN

    def test_a_generative_model_embeds_if_asked_to(self, default_model: Path) -> None:
        assert kind_of(LoadModel(str(default_model))).generates
        stepped = Stepped(default_model, pooling="last", context_length=64)
        try:
            together = stepped.vectors([504, 3575, 282], [504, 3575], [1, 2, 3, 4], size=576)
            alone = stepped.vectors([504, 3575], size=576)
            assert cosine(together[1], alone[0]) > 0.999
            assert cosine(together[1], together[2]) < 0.99
        finally:
            stepped.worker.close()

    def test_a_file_that_is_none(self, tmp_path: Path) -> None:
        with pytest.raises(ModelLoadError):
            kind_of(LoadModel(str(tmp_path / "none.gguf")))
        (tmp_path / "text.gguf").write_bytes(b"x" * 100)
        with pytest.raises(ModelLoadError, match="does not begin with GGUF"):
            kind_of(LoadModel(str(tmp_path / "text.gguf")))


def test_limits_of_the_context(stepped: Stepped) -> None:
    context: EmbeddingContext = stepped.worker._context
    batch = Batch(context.batch_tokens * 2)
    batch.add(0, 0, np.zeros(context.batch_tokens + 1, np.int32), wants_logits=1)
    with pytest.raises(DecodeError, match="over the context's limits"):
        context.embed(batch, 1)
    batch.clear()
    batch.add(0, 0, np.zeros(1, np.int32), wants_logits=1)
    with pytest.raises(DecodeError, match="over the context's limits"):
        context.embed(batch, context.sequences + 1)
