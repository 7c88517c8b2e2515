"""What the tests of model families share: tiny checkpoints of any shape, and what must be true of their files."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from app.llama import quantizer
from app.llama.batch import Batch
from app.llama.context import Context
from app.llama.model import Model
from app.models.gguf import Header, read_header
from quantize.pipeline import quantize
from quantize.recipe import RECIPES
from tests.quantize.checkpoints import SMOLLM_SPLITTER, bpe_files, encode, vocabulary_size, write_safetensors

FILES = bpe_files(SMOLLM_SPLITTER)
VOCABULARY = vocabulary_size(FILES)

Arrays = dict[str, NDArray[Any]]
Shapes = dict[str, tuple[int, ...]]


def outer_shapes(hidden: int, *, tied: bool, prefix: str = "model.") -> Shapes:
    """Return the shapes of what most text models have around their layers."""
    found: Shapes = {f"{prefix}embed_tokens.weight": (VOCABULARY, hidden), f"{prefix}norm.weight": (hidden,)}
    return found if tied else {**found, "lm_head.weight": (VOCABULARY, hidden)}


def attention_shapes(block: str, hidden: int, queries: int, keys: int) -> Shapes:
    """Return the shapes of a layer's attention, with so many rows of queries and of keys."""
    rows = {"q": queries, "k": keys, "v": keys}
    found: Shapes = {f"{block}.self_attn.{letter}_proj.weight": (count, hidden) for letter, count in rows.items()}
    return {**found, f"{block}.self_attn.o_proj.weight": (hidden, queries)}


def gated_shapes(name: str, hidden: int, width: int) -> Shapes:
    """Return the shapes of a gated feed-forward network."""
    found: Shapes = {f"{name}.{part}_proj.weight": (width, hidden) for part in ("gate", "up")}
    return {**found, f"{name}.down_proj.weight": (hidden, width)}


def llama_shapes(block: str, hidden: int, width: int, queries: int, keys: int) -> Shapes:
    """Return the shapes of a layer of Llama and of the many that share its names."""
    norms: Shapes = {f"{block}.{norm}_layernorm.weight": (hidden,) for norm in ("input", "post_attention")}
    return norms | attention_shapes(block, hidden, queries, keys) | gated_shapes(f"{block}.mlp", hidden, width)


def random_weights(shapes: Mapping[str, tuple[int, ...]], seed: int = 0) -> Arrays:
    """Return random f32 weights that bf16 holds exactly."""
    random = np.random.default_rng(seed)
    weights: Arrays = {}
    for name, shape in shapes.items():
        values = random.standard_normal(shape, dtype=np.float32) * np.float32(0.1)
        if len(shape) == 1:
            values += 1
        weights[name] = (values.view(np.uint32) & 0xFFFF0000).view(np.float32)
    return weights


def write_checkpoint(folder: Path, config: Mapping[str, Any], weights: Arrays, dtype: str = "BF16") -> Path:
    """Write config.json, a vocabulary of bytes, and the weights: f32 ones as `dtype`, uint8 ones as they are."""
    folder.mkdir(parents=True)
    for name, content in {**FILES, "config.json": {"vocab_size": VOCABULARY, **config}}.items():
        (folder / name).write_text(json.dumps(content), encoding="utf-8")
    write_safetensors(
        folder / "model.safetensors",
        {
            name: ("U8", values.shape, values.tobytes())
            if values.dtype == np.uint8
            else (dtype, values.shape, encode(values, dtype))
            for name, values in sorted(weights.items())
        },
    )
    return folder


def changed_config(folder: Path, **fields: Any) -> Path:
    """Set fields of a config.json; None takes one away."""
    path = folder / "config.json"
    config = {**json.loads(path.read_text(encoding="utf-8")), **fields}
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not None}), encoding="utf-8")
    return folder


def tensor_bytes(header: Header) -> dict[str, bytes]:
    """Return every tensor's bytes, by name."""
    content, start = header.path.read_bytes(), header.data_offset
    return {tensor.name: content[start + tensor.offset :][: tensor.nbytes] for tensor in header.tensors}


def floats(header: Header) -> Arrays:
    """Return the numbers of every f32 and bf16 tensor, in numpy's order of dimensions."""
    raw, arrays = tensor_bytes(header), {}
    for tensor in header.tensors:
        if tensor.type_name == "f32":
            arrays[tensor.name] = np.frombuffer(raw[tensor.name], np.float32).reshape(tensor.shape)
        elif tensor.type_name == "bf16":
            wide = np.frombuffer(raw[tensor.name], np.uint16).astype(np.uint32) << 16
            arrays[tensor.name] = wide.view(np.float32).reshape(tensor.shape)
    return arrays


def rounded(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Round to bf16 and back, to nearest even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)).view(np.float32)


def check_against_llama_cpp(source: Path, folder: Path, types: Iterable[str]) -> Header:
    """Compare our files with what llama.cpp makes of our bf16 file, byte for byte; return the latter's header."""
    quantize(source, "bf16", folder / "bf16.gguf")
    for name in types:
        quantize(source, name, folder / "ours.gguf", threads=2)
        quantizer.quantize_file(folder / "bf16.gguf", folder / "theirs.gguf", RECIPES[name].file_type, threads=2)
        ours, theirs = read_header(folder / "ours.gguf"), read_header(folder / "theirs.gguf")
        assert list(ours.metadata.items()) == list(theirs.metadata.items())
        assert ours.tensors == theirs.tensors
        assert tensor_bytes(ours) == tensor_bytes(theirs), name
        assert ours.path.read_bytes() == theirs.path.read_bytes(), name
    return read_header(folder / "bf16.gguf")


def logits_of(path: Path) -> NDArray[np.float32]:
    """Load a file, decode a few tokens and return the last one's logits, shape (vocabulary,)."""
    with (
        Model(path, device="cpu", gpu_layers=0) as model,
        Context(model, slots=1, context_length=256, batch_size=16, threads=1) as context,
    ):
        batch = Batch(16)
        batch.add(0, 0, np.array([1, 5, 7, 5], np.int32), wants_logits=True)
        return context.decode(batch)[0].copy()
