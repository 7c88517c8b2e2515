"""The Llama family: Llama 1 to 3, Mistral, SmolLM and SmolLM2, and the many that share their shape."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import numpy as np

from app.errors import CheckpointError
from quantize import vocab
from quantize.checkpoint import StoredTensor
from quantize.families.common_keys import set_common_keys
from quantize.families.config import Config
from quantize.families.mapping import Want, map_tensors
from quantize.header import KeyTable
from quantize.source import Source
from quantize.tensors import TensorSpec, rope_pairs

# what transformers' config classes fill in when config.json is silent
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
    },
    "mistral": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
    },
}


def open(source: Source) -> LlamaModel:  # noqa: A001 - every family is opened by this name
    """Read config.json. Raises `CheckpointError` that names the field at fault."""
    return LlamaModel(source)


class LlamaModel:
    """A model of the Llama family."""

    architecture = "llama"
    defaults: ClassVar[Mapping[str, Mapping[str, Any]]] = _DEFAULTS

    def __init__(self, source: Source) -> None:
        self._source = source
        self._config = config = Config(source, self.defaults)
        self.blocks = config.count("num_hidden_layers")
        self.hidden = config.count("hidden_size")
        self.feed_forward = config.count("intermediate_size")
        self.heads = config.count("num_attention_heads")
        self.key_heads = config.count("num_key_value_heads", self.heads)
        config.fields["num_key_value_heads"] = self.key_heads  # as the config classes do
        self.vocabulary = config.count("vocab_size")
        if self.heads % self.key_heads:
            raise CheckpointError(
                f"{config.path}: num_attention_heads ({self.heads}) is no multiple of "
                f"num_key_value_heads ({self.key_heads})"
            )
        # transformers' LlamaConfig always has a head_dim, its MistralConfig only if config.json has one
        self.head_size = config.optional_count("head_dim") or self.hidden // self.heads
        if config.fields.get("model_type") == "llama":
            config.fields["head_dim"] = self.head_size
        if self.head_size % 2:
            raise CheckpointError(
                f"{config.path}: the head size {self.head_size} is odd; rotary pairs need an even one"
            )

    def set_hyper_parameters(self, keys: KeyTable, file_type: int) -> None:
        """Set the keys of the architecture and the file type."""
        set_common_keys(keys, self.architecture, self._config, file_type, self.blocks)
        keys.u32(f"{self.architecture}.vocab_size", self.vocabulary)
        keys.u32(f"{self.architecture}.rope.dimension_count", self.head_size)

    def set_vocabulary(self, keys: KeyTable) -> None:
        """Set the tokenizer: SentencePiece if tokenizer.model is there, else what tokenizer.json holds."""
        vocab.set_llama_vocabulary(keys, self._source, self.vocabulary)

    def tensors(self, stored: Mapping[str, StoredTensor]) -> list[TensorSpec]:
        """Map every tensor of the checkpoint, after checking that all are there and that each has its shape."""
        if self.blocks > len(stored):
            raise CheckpointError(
                f"{self._source.folder}: config.json speaks of {self.blocks} layers; there are {len(stored)} tensors"
            )
        mapped = map_tensors(self._source.folder, stored, self._wants(), ignored=self._is_left_out)
        return [*self._rope_factors(), *mapped]

    def _is_left_out(self, name: str) -> bool:
        """Tell whether a tensor belongs to another model than the text's: never, where there is none."""
        del name
        return False

    def _wants(self) -> Iterator[Want]:
        hidden = self.hidden
        yield Want("token_embd.weight", "model.embed_tokens.weight", (self.vocabulary, hidden))
        yield Want("output_norm.weight", "model.norm.weight", (hidden,))
        tied = bool(self._config.fields.get("tie_word_embeddings"))
        yield Want("output.weight", "lm_head.weight", (self.vocabulary, hidden), optional=tied)
        for block in range(self.blocks):
            source, target = f"model.layers.{block}", f"blk.{block}"
            yield Want(f"{target}.attn_norm.weight", f"{source}.input_layernorm.weight", (hidden,))
            yield Want(f"{target}.ffn_norm.weight", f"{source}.post_attention_layernorm.weight", (hidden,))
            yield from self._mixer(block, source, target)
            yield from self._feed_forward(source, target)

    def _mixer(self, block: int, source: str, target: str) -> Iterator[Want]:
        """Yield what mixes the tokens of a text: attention, in every block."""
        del block
        hidden, queries, keys = self.hidden, self.heads * self.head_size, self.key_heads * self.head_size
        pairs = {"group": self.head_size, "take": rope_pairs(self.head_size)}
        for name, inner, shape, order in (
            ("q_proj", "attn_q", (queries, hidden), pairs),
            ("k_proj", "attn_k", (keys, hidden), pairs),
            ("v_proj", "attn_v", (keys, hidden), {}),
            ("o_proj", "attn_output", (hidden, queries), {}),
        ):
            yield from self._matrix(f"{target}.{inner}", f"{source}.self_attn.{name}", shape, "attention_bias", order)

    def _feed_forward(self, source: str, target: str) -> Iterator[Want]:
        wide, narrow = (self.feed_forward, self.hidden), (self.hidden, self.feed_forward)
        for name, shape in (("gate", wide), ("up", wide), ("down", narrow)):
            yield from self._matrix(f"{target}.ffn_{name}", f"{source}.mlp.{name}_proj", shape, "mlp_bias", {})

    def _matrix(
        self, target: str, source: str, shape: tuple[int, ...], announcement: str, order: dict[str, Any]
    ) -> Iterator[Want]:
        yield Want(f"{target}.weight", f"{source}.weight", shape, **order)
        announced = self._config.fields.get(announcement)
        yield Want(f"{target}.bias", f"{source}.bias", shape[:1], **order, optional=not announced)

    def _rope_factors(self) -> list[TensorSpec]:
        scaling = self._config.rope
        if str(scaling.get("rope_type", "")).lower() != "llama3":
            return []
        config = self._config
        base = config.rope_number("rope_theta", 10000.0)
        factor = config.rope_number("factor", 8.0)
        low, high = config.rope_number("low_freq_factor", 1.0), config.rope_number("high_freq_factor", 4.0)
        trained = config.rope_number("original_max_position_embeddings", 8192)
        numbers = (base, factor, low, high, trained)
        if low == high or min(numbers) <= 0 or max(numbers) > float(np.finfo(np.float32).max):
            raise CheckpointError(f"{config.path}: impossible rope_scaling {scaling}")
        factors = llama3_rope_factors(self.head_size, base, factor, low, high, trained)
        return [TensorSpec("rope_freqs.weight", (self.head_size // 2,), data=factors.tobytes(), keep_f32=True)]


def llama3_rope_factors(
    head_size: int, base: float, factor: float, low: float, high: float, trained: float
) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    """Return by how much Llama 3.1's scaling slows each rotary pair, f32 (head_size / 2,).

    The arithmetic is float32 with quotients as products with reciprocals, as torch does it upstream, so that the bits
    are the same.
    """
    f32, one = np.float32, np.float32(1)
    factors = np.empty(head_size // 2, dtype=np.float32)
    for pair in range(head_size // 2):
        exponent = f32(2 * pair) / f32(head_size)
        frequency = one / f32(math.pow(float(f32(base)), float(exponent)))
        wavelength = (one / frequency) * f32(2 * math.pi)
        if wavelength < trained / high:
            factors[pair] = one
        elif wavelength > trained / low:
            factors[pair] = f32(factor)
        else:
            smooth = ((one / wavelength) * f32(trained) - f32(low)) / f32(high - low)
            factors[pair] = one / ((one - smooth) / f32(factor) + smooth)
    return factors
