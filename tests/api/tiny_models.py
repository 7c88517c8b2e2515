"""Models of random weights that answer at once: nonsense, but of every shape that an answer can have."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import numpy as np

from tests.conftest import PESTLE
from tests.quantize.checkpoints import (
    Shape,
    bpe_files,
    config_of,
    encode,
    make_checkpoint,
    shapes_of,
    vocabulary_size,
    write_safetensors,
)

FILL_IN = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")
BYTES = Shape(layers=2, hidden=64, feed_forward=96, heads=2, key_heads=1, tied=True, dtype="F32")
SENTENCES = Shape(layers=2, hidden=64, feed_forward=96, heads=2, key_heads=1, dtype="F32", vocabulary="spm")


def quantized(checkpoint: Path, out: Path) -> Path:
    """Return the checkpoint as a GGUF in f32: no rounding hides what is computed."""
    command = [*PESTLE, "quantize", str(checkpoint), "--type", "f32", "--out", str(out), "--no-measure"]
    subprocess.run([*command, "--format", "quiet"], check=True, timeout=110)
    return out


def bytes_model(folder: Path) -> Path:
    """Return a model of bytes, with a chat template, BOS not added, and without tokens for filling in."""
    return quantized(make_checkpoint(folder / "Tiny-Bytes-1M-Instruct", BYTES), folder / "Tiny-Bytes-F32.gguf")


def sentences_model(folder: Path) -> Path:
    """Return a SentencePiece model: BOS before every prompt, a space before its first word; no chat template."""
    checkpoint = make_checkpoint(folder / "Tiny-Sentences-1M", SENTENCES)
    return quantized(checkpoint, folder / "Tiny-Sentences-F32.gguf")


def switching_model(folder: Path) -> Path:
    """Return a model of bytes whose template shows documents, and looks at what clients may switch."""
    checkpoint = make_checkpoint(folder / "Tiny-Switching-1M", BYTES)
    settings = checkpoint / "tokenizer_config.json"
    written = json.loads(settings.read_text())
    written["chat_template"] = (
        "{% if enable_thinking %}think:{% endif %}{% for document in documents or [] %}{{ document['text'] }};"
        "{% endfor %}{% for message in messages %}{{ message['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}>{% endif %}"
    )
    settings.write_text(json.dumps(written))
    return quantized(checkpoint, folder / "Tiny-Switching-F32.gguf")


def filling_model(folder: Path) -> Path:
    """Return a model of bytes whose vocabulary has tokens for filling in the middle."""

    files = bpe_files(BYTES.splitter)
    size = vocabulary_size(files)
    flags = {"special": True, "normalized": False, "lstrip": False, "rstrip": False, "single_word": False}
    added = [{"id": size + place, "content": text, **flags} for place, text in enumerate(FILL_IN)]
    files["tokenizer.json"]["added_tokens"] += added
    size += len(added)
    checkpoint = folder / "Tiny-Filling-1M"
    checkpoint.mkdir()
    for name, content in (files | {"config.json": config_of(BYTES, size)}).items():
        (checkpoint / name).write_text(json.dumps(content))
    random = np.random.default_rng(1)
    tensors = {
        name: ("F32", shape, encode(random.standard_normal(shape, dtype=np.float32) * 0.05, "F32"))
        for name, shape in shapes_of(BYTES, size).items()
    }
    write_safetensors(checkpoint / "model.safetensors", tensors)
    return quantized(checkpoint, folder / "Tiny-Filling-F32.gguf")
