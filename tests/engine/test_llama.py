"""The wrappers around llama.cpp, with the real library and the real model."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

from app.errors import DecodeError, EngineError, ModelLoadError, NoKvSlotError
from app.llama.batch import Batch
from app.llama.context import Context
from app.llama.device import gpu_devices, thread_count
from app.llama.library import LogTail
from app.llama.model import Model, VocabularyModel


def test_the_vocabulary_alone(default_model: Path) -> None:
    with VocabularyModel(default_model) as model:
        vocabulary = model.vocabulary
        text = "Grüße, 世界! 😀 <|im_end|>"
        tokens = model.tokenize(text)
        assert tokens.dtype == np.int32
        assert b"".join(model.token_to_piece(token) for token in tokens.tolist()).decode() == text
        assert len(model.tokenize("<|im_end|>", parse_special=True)) == 1 < len(model.tokenize("<|im_end|>"))
        assert model.token_to_piece(vocabulary.eos or 0) == b""
        assert model.token_to_piece(vocabulary.eos or 0, special=True) == b"<|im_end|>"
        assert vocabulary.token_text(vocabulary.eos or 0) == "<|im_end|>"
        assert vocabulary.eos in vocabulary.eog
        assert vocabulary.size == len(vocabulary.pieces) == 49152
        assert len(model.tokenize("a b" * 5000)) > 5000
        assert (model.architecture, model.trained_context) == ("llama", 8192)
        assert "im_start" in (model.chat_template or "")
        with pytest.raises(EngineError, match="outside the vocabulary"):
            model.token_to_piece(49152)
    with pytest.raises(EngineError, match="closed"):
        model.tokenize("x")
    model.close()


def test_a_file_that_is_no_model_is_explained(tmp_path: Path) -> None:
    path = tmp_path / "broken.gguf"
    path.write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(ModelLoadError, match=r"broken\.gguf"):
        Model(path)
    with pytest.raises(ModelLoadError, match="is not a file"):
        Model(tmp_path / "absent.gguf")


def test_what_llama_cpp_says_is_in_the_error(tmp_path: Path) -> None:
    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    path = tmp_path / "strange.gguf"
    one_entry = text("general.architecture") + struct.pack("<I", 8) + text("nonsense")
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + one_entry + bytes(64))
    with pytest.raises(ModelLoadError, match=r"(?s)cannot load .*strange\.gguf:\n.*unknown model architecture"):
        VocabularyModel(path)


@pytest.mark.skipif(bool(gpu_devices()), reason="this machine has a GPU")
@pytest.mark.parametrize("device", ["cuda", "metal"])
def test_a_device_that_is_not_there_is_named(default_model: Path, device: str) -> None:
    with pytest.raises(ModelLoadError, match=f"make setup ACCEL={device}"):
        Model(default_model, device=device)  # type: ignore[arg-type]


def test_decoding_in_chunks_or_together_gives_the_same_tokens(default_model: Path) -> None:
    with Model(default_model, device="cpu") as model:
        prompt = model.vocabulary.tokenize("The capital of France is")
        with Context(model, slots=2, context_length=300, batch_size=64, threads=2) as context:
            batch = Batch(64)
            batch.add(0, 0, prompt, wants_logits=True)
            whole = context.decode(batch)[0].copy()
            for start, token in enumerate(prompt.tolist()):
                batch.clear()
                batch.add(1, start, np.array([token], np.int32), wants_logits=True)
                single = context.decode(batch)[0].copy()
            assert whole.shape == (model.vocabulary.size,)
            assert whole.argmax() == single.argmax()
            assert model.vocabulary.pieces[int(whole.argmax())] == b" Paris"
            assert np.abs(whole - single).max() < 1.0
            assert [context.memory.length(slot) for slot in (0, 1)] == [len(prompt)] * 2
            assert context.memory.rewind(0, 2)
            assert context.memory.length(0) == 2
            context.memory.clear(1)
            assert context.memory.length(1) == 0
        with pytest.raises(EngineError, match="closed"):
            context.decode(batch)
    assert model.closed


def test_limits_that_would_abort_are_errors(default_model: Path) -> None:
    with (
        Model(default_model, device="cpu") as model,
        Context(model, slots=1, context_length=256, batch_size=32, threads=1) as context,
    ):
        batch = Batch(100)
        batch.add(0, 0, np.full(33, 500, np.int32), wants_logits=True)
        with pytest.raises(DecodeError, match="limits"):
            context.decode(batch)
        with pytest.raises(DecodeError, match="do not fit"):
            batch.add(0, 33, np.full(68, 500, np.int32), wants_logits=False)
        batch.clear()
        batch.add(0, 0, np.array([49_152], np.int32), wants_logits=True)
        with pytest.raises(DecodeError, match="-1: the batch is not valid"):
            context.decode(batch)


def test_streams_are_added_at_once_or_not_at_all() -> None:
    batch, alone = Batch(3), Batch(3)
    batch.add_streams([0, 2, 5], [7, 40, 1], [500, 501, 502])
    for sequence, position, token in ((0, 7, 500), (2, 40, 501), (5, 1, 502)):
        alone.add(sequence, position, np.array([token], np.int32), wants_logits=1)
    assert _content(batch) == _content(alone)
    with pytest.raises(DecodeError, match="4 tokens do not fit into a batch of 3"):
        batch.add_streams([6], [0], [503])
    assert _content(batch) == _content(alone)


def _content(batch: Batch) -> tuple[object, ...]:
    raw = batch.structure
    tokens = [(raw.token[i], raw.pos[i], raw.n_seq_id[i], raw.seq_id[i][0], raw.logits[i]) for i in range(len(batch))]
    return batch.rows, tokens


def test_a_full_cache_is_told(default_model: Path) -> None:
    with (
        Model(default_model, device="cpu") as model,
        Context(model, slots=1, context_length=256, batch_size=64, threads=2) as context,
    ):
        batch = Batch(64)
        for start in range(0, 256, 64):
            batch.clear()
            batch.add(0, start, np.full(64, 500, np.int32), wants_logits=True)
            context.decode(batch)
        batch.clear()
        batch.add(0, 256, np.full(1, 500, np.int32), wants_logits=True)
        with pytest.raises(NoKvSlotError, match="no room"):
            context.decode(batch)
        assert context.memory.length(0) == 256


def test_threads_are_bounded_by_what_we_may_use() -> None:
    assert thread_count(7) == 7
    assert 1 <= thread_count() <= 1024


def test_the_log_keeps_what_matters_once() -> None:
    tail = LogTail()
    tail.write(2, "loading\n")
    for _ in range(3):
        tail.write(4, "bad ")
        tail.write(5, "magic\n")
    assert tail.summary() == "bad magic"
