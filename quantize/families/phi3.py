"""Phi-3, Phi-3.5, Phi-4 and Phi-4-mini: queries, keys and values in one matrix, gate and up in another."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from app.errors import CheckpointError
from quantize.checkpoint import StoredTensor
from quantize.families.config import Config
from quantize.families.mapping import Want, map_tensors
from quantize.header import KeyTable
from quantize.source import Source
from quantize.tensors import TensorSpec
from quantize.vocab_phi3 import set_vocab_phi3ulary

# what transformers' config class fills in when config.json is silent
_DEFAULTS: dict[str, dict[str, Any]] = {
    "phi3": {
        "vocab_size": 32064,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "partial_rotary_factor": 1.0,
    }
}
_MOST = float(np.finfo(np.float32).max)
_ROPE_KINDS = {"longrope", "su", "yarn"}  # for Phi-3 the later two are older names of the first


def open(source: Source) -> Phi3Model:  # noqa: A001 - every family is opened by this name
    """Read config.json. Raises `CheckpointError` that names the field at fault."""
    return Phi3Model(source)


class Phi3Model:
    """A model of the Phi-3 family."""

    architecture = "phi3"

    def __init__(self, source: Source) -> None:
        self._source = source
        self._config = config = Config(source, _DEFAULTS)
        self.blocks = config.count("num_hidden_layers")
        self.hidden = config.count("hidden_size")
        self.feed_forward = config.count("intermediate_size")
        self.heads = config.count("num_attention_heads")
        self.key_heads = config.count("num_key_value_heads", self.heads)
        self.vocabulary = config.count("vocab_size")
        self.context = config.count(config.first("n_positions") or "max_position_embeddings")
        self.trained_context = _whole(config, "original_max_position_embeddings")
        if self.heads % self.key_heads or self.hidden % self.heads:
            raise CheckpointError(
                f"{config.path}: hidden_size ({self.hidden}), num_attention_heads ({self.heads}) and "
                f"num_key_value_heads ({self.key_heads}) must each be a multiple of the next"
            )
        self.head_size = self.hidden // self.heads
        if config.optional_count("head_dim") not in {None, self.head_size}:
            raise CheckpointError(
                f"{config.path}: head_dim is {config.fields['head_dim']}; llama.cpp's Phi-3 needs "
                f"hidden_size / num_attention_heads, which is {self.head_size}"
            )
        share = config.rope_number("partial_rotary_factor", 1.0)
        self.rotary_size = int(share * self.hidden) // self.heads
        if not 0 < share <= 1 or self.rotary_size % 2:
            raise CheckpointError(f"{config.path}: partial_rotary_factor is {share}; that leaves no rotary pairs")
        self._factors = _rope_factors(config, self.rotary_size // 2)

    def set_hyper_parameters(self, keys: KeyTable, file_type: int) -> None:
        """Set the `phi3.*` keys and the file type."""
        config, prefix = self._config, self.architecture
        if self._factors:
            keys.f32(f"{prefix}.rope.scaling.attn_factor", self._attention_factor())
            keys.place_after("general.architecture", f"{prefix}.rope.scaling.attn_factor")
        keys.u32(f"{prefix}.context_length", self.context)
        keys.u32(f"{prefix}.rope.scaling.original_context_length", self.trained_context)
        keys.u32(f"{prefix}.embedding_length", self.hidden)
        keys.u32(f"{prefix}.feed_forward_length", self.feed_forward)
        keys.u32(f"{prefix}.block_count", self.blocks)
        keys.u32(f"{prefix}.attention.head_count", self.heads)
        keys.u32(f"{prefix}.attention.head_count_kv", self.key_heads)
        keys.f32(f"{prefix}.attention.layer_norm_rms_epsilon", config.number("rms_norm_eps"))
        keys.u32(f"{prefix}.rope.dimension_count", self.rotary_size)
        keys.f32(f"{prefix}.rope.freq_base", config.rope_number("rope_theta"))
        keys.u32("general.file_type", file_type)
        # 0 tells Phi-4, which has no window, from older files that do not say
        keys.u32(f"{prefix}.attention.sliding_window", config.optional_count("sliding_window") or 0)

    def set_vocabulary(self, keys: KeyTable) -> None:
        """Set the tokenizer: SentencePiece for Phi-3, byte-level BPE for Phi-4."""
        set_vocab_phi3ulary(keys, self._source, self.vocabulary)

    def tensors(self, stored: Mapping[str, StoredTensor]) -> list[TensorSpec]:
        """Map every tensor of the checkpoint, after checking that all are there and that each has its shape."""
        if self.blocks > len(stored):
            raise CheckpointError(
                f"{self._source.folder}: config.json speaks of {self.blocks} layers; there are {len(stored)} tensors"
            )
        factors = [
            TensorSpec(f"rope_factors_{name}.weight", (len(values),), data=values.tobytes(), keep_f32=True)
            for name, values in self._factors.items()
        ]
        return [*factors, *map_tensors(self._source.folder, stored, self._wants())]

    def _attention_factor(self) -> float:
        """Return how much the attention is strengthened beyond the context that the model was first trained with."""
        scale = self.context / self.trained_context
        return math.sqrt(1 + math.log(scale) / math.log(self.trained_context)) if scale > 1 else 1.0

    def _wants(self) -> Iterator[Want]:
        hidden, heads = self.hidden, self.heads + 2 * self.key_heads
        yield Want("token_embd.weight", "model.embed_tokens.weight", (self.vocabulary, hidden))
        yield Want("output_norm.weight", "model.norm.weight", (hidden,))
        tied = bool(self._config.fields.get("tie_word_embeddings"))
        yield Want("output.weight", "lm_head.weight", (self.vocabulary, hidden), optional=tied)
        names: dict[str, tuple[str, tuple[int, ...]]] = {
            "attn_norm": ("input_layernorm", (hidden,)),
            "attn_qkv": ("self_attn.qkv_proj", (heads * self.head_size, hidden)),
            "attn_output": ("self_attn.o_proj", (hidden, hidden)),
            "ffn_norm": ("post_attention_layernorm", (hidden,)),
            "ffn_up": ("mlp.gate_up_proj", (2 * self.feed_forward, hidden)),
            "ffn_down": ("mlp.down_proj", (hidden, self.feed_forward)),
        }
        for block in range(self.blocks):
            for target, (source, shape) in names.items():
                yield Want(f"blk.{block}.{target}.weight", f"model.layers.{block}.{source}.weight", shape)


def _rope_factors(config: Config, pairs: int) -> dict[str, np.ndarray[tuple[int], np.dtype[np.float32]]]:
    """Return by how much each rotary pair is slowed, in long texts and in short ones; nothing without such scaling."""
    kind = config.rope.get("rope_type")
    if not config.rope.get("long_factor"):
        if kind not in {None, "default"}:
            raise CheckpointError(
                f"{config.path}: the rope scaling {kind!r} without a long_factor is not known for Phi-3"
            )
        return {}
    if kind not in _ROPE_KINDS:
        raise CheckpointError(f"{config.path}: the rope scaling {kind!r} is not known for Phi-3; longrope is")
    factors = {}
    for name in ("long", "short"):
        values = config.rope.get(f"{name}_factor")
        if not isinstance(values, list) or len(values) != pairs:
            raise CheckpointError(f"{config.path}: the rope scaling's {name}_factor must be a list of {pairs} numbers")
        numbers = [config.finite(f"rope {name}_factor", value) for value in values]
        if not 0 < min(numbers) <= max(numbers) <= _MOST:
            raise CheckpointError(
                f"{config.path}: the rope scaling's {name}_factor has numbers that cannot slow anything"
            )
        factors[name] = np.array(numbers, dtype=np.float32)
    return factors


def _whole(config: Config, name: str) -> int:
    value = config.rope_number(name)
    if value < 2 or value != int(value):
        raise CheckpointError(f"{config.path}: {name} is {value}; an integer from 2 on was expected")
    return int(value)
