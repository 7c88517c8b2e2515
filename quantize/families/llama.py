"""The Llama family: Llama 1 to 3, Mistral, SmolLM and SmolLM2, and the many that share their shape."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from app.errors import CheckpointError
from quantize import vocab
from quantize.checkpoint import DTYPE_BYTES, StoredTensor
from quantize.families.config import Config, set_rope_scaling
from quantize.header import KeyTable
from quantize.source import Source
from quantize.tensors import TensorSpec

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

_OUTER = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_INNER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_NOT_WEIGHTS = (".attention.masked_bias", ".attention.bias", ".rotary_emb.inv_freq")


def open(source: Source) -> LlamaModel:  # noqa: A001 - every family is opened by this name
    """Read config.json. Raises `CheckpointError` that names the field at fault."""
    return LlamaModel(source)


class LlamaModel:
    """A model of the Llama family."""

    architecture = "llama"

    def __init__(self, source: Source) -> None:
        self._source = source
        raw = source.config
        self._config = config = Config(
            source.folder / "config.json", _DEFAULTS.get(str(raw.get("model_type")), {}) | _without_nulls(raw)
        )
        if raw.get("quantization_config"):
            raise CheckpointError(f"{config.path}: the weights are quantized already (`quantization_config`)")
        self.blocks = config.count("num_hidden_layers")
        self.hidden = config.count("hidden_size")
        self.feed_forward = config.count("intermediate_size")
        self.heads = config.count("num_attention_heads")
        self.key_heads = config.count("num_key_value_heads", self.heads)
        self.vocabulary = config.count("vocab_size")
        if self.heads % self.key_heads:
            raise CheckpointError(
                f"{config.path}: num_attention_heads ({self.heads}) is no multiple of "
                f"num_key_value_heads ({self.key_heads})"
            )
        # transformers' LlamaConfig always has a head_dim, its MistralConfig only if config.json has one
        self.stated_head_size = config.optional_count("head_dim")
        self.head_size = self.stated_head_size or self.hidden // self.heads
        if self.stated_head_size is None and raw.get("model_type") == "llama":
            self.stated_head_size = self.head_size
        if self.head_size % 2:
            raise CheckpointError(
                f"{config.path}: the head size {self.head_size} is odd; rotary pairs need an even one"
            )

    def set_hyper_parameters(self, keys: KeyTable, file_type: int) -> None:
        """Set the `llama.*` keys and the file type."""
        config = self._config
        keys.u32("llama.block_count", self.blocks)
        keys.u32("llama.context_length", config.count("max_position_embeddings"))
        keys.u32("llama.embedding_length", self.hidden)
        keys.u32("llama.feed_forward_length", self.feed_forward)
        keys.u32("llama.attention.head_count", self.heads)
        keys.u32("llama.attention.head_count_kv", self.key_heads)
        if config.fields.get("is_causal") is False:
            keys.boolean("llama.attention.causal", False)
        set_rope_scaling(keys, self.architecture, config)
        keys.f32("llama.attention.layer_norm_rms_epsilon", config.number("rms_norm_eps"))
        if self.stated_head_size is not None:
            keys.u32("llama.attention.key_length", self.stated_head_size)
            keys.u32("llama.attention.value_length", self.stated_head_size)
        keys.u32("general.file_type", file_type)
        keys.u32("llama.vocab_size", self.vocabulary)
        keys.u32("llama.rope.dimension_count", self.head_size)

    def set_vocabulary(self, keys: KeyTable) -> None:
        """Set the tokenizer: SentencePiece if tokenizer.model is there, else what tokenizer.json holds."""
        vocab.set_llama_vocabulary(keys, self._source, self.vocabulary)

    def tensors(self, stored: Mapping[str, StoredTensor]) -> list[TensorSpec]:
        """Map every tensor of the checkpoint, after checking that all are there and that each has its shape."""
        if self.blocks > len(stored):
            raise CheckpointError(
                f"{self._source.folder}: config.json speaks of {self.blocks} layers; there are {len(stored)} tensors"
            )
        shapes = self._shapes(stored)
        missing = [name for name in shapes if name not in stored]
        if missing:
            raise CheckpointError(f"{self._source.folder}: tensors are missing: {_some(missing)}")
        wanted = [name for name in stored if not name.endswith(_NOT_WEIGHTS)]
        unexpected = [name for name in wanted if name not in shapes]
        if unexpected:
            raise CheckpointError(f"{self._source.folder}: tensors that a Llama does not have: {_some(unexpected)}")
        specs = self._rope_factors()
        for name in wanted:
            tensor, shape = stored[name], shapes[name]
            if tensor.shape != shape:
                raise CheckpointError(
                    f"{tensor.shard}: the tensor {name!r} has shape {tensor.shape}; config.json asks for {shape}"
                )
            if tensor.dtype not in DTYPE_BYTES:
                raise CheckpointError(
                    f"{tensor.shard}: the tensor {name!r} is {tensor.dtype}; {', '.join(DTYPE_BYTES)} are read"
                )
            specs.append(self._spec(name, shape))
        return specs

    def _spec(self, name: str, shape: tuple[int, ...]) -> TensorSpec:
        target = _OUTER.get(name) or _inner_name(name)
        rope_heads = {"attn_q": self.heads, "attn_k": self.key_heads}.get(target.split(".")[-2])
        return TensorSpec(
            name=target,
            shape=shape,
            source=name,
            rope_heads=rope_heads,
            keep_f32=len(shape) <= 1 or target.endswith("_norm.weight"),
        )

    def _shapes(self, stored: Mapping[str, StoredTensor]) -> dict[str, tuple[int, ...]]:
        hidden, queries, keys = self.hidden, self.heads * self.head_size, self.key_heads * self.head_size
        shapes: dict[str, tuple[int, ...]] = {
            "model.embed_tokens.weight": (self.vocabulary, hidden),
            "model.norm.weight": (hidden,),
        }
        if "lm_head.weight" in stored or not self._config.fields.get("tie_word_embeddings"):
            shapes["lm_head.weight"] = (self.vocabulary, hidden)
        matrices = {
            "self_attn.q_proj": (queries, hidden),
            "self_attn.k_proj": (keys, hidden),
            "self_attn.v_proj": (keys, hidden),
            "self_attn.o_proj": (hidden, queries),
            "mlp.gate_proj": (self.feed_forward, hidden),
            "mlp.up_proj": (self.feed_forward, hidden),
            "mlp.down_proj": (hidden, self.feed_forward),
        }
        for block in range(self.blocks):
            prefix = f"model.layers.{block}."
            shapes[f"{prefix}input_layernorm.weight"] = (hidden,)
            shapes[f"{prefix}post_attention_layernorm.weight"] = (hidden,)
            for name, shape in matrices.items():
                shapes[f"{prefix}{name}.weight"] = shape
                announced = self._config.fields.get("mlp_bias" if name.startswith("mlp") else "attention_bias")
                if announced or f"{prefix}{name}.bias" in stored:
                    shapes[f"{prefix}{name}.bias"] = shape[:1]
        return shapes

    def _rope_factors(self) -> list[TensorSpec]:
        scaling = self._config.rope
        if str(scaling.get("rope_type", "")).lower() != "llama3":
            return []
        config = self._config
        base = config.rope_number("rope_theta", 10000.0)
        factor = config.rope_number("factor", 8.0)
        low, high = config.rope_number("low_freq_factor", 1.0), config.rope_number("high_freq_factor", 4.0)
        trained = config.rope_number("original_max_position_embeddings", 8192)
        if low == high or min(base, factor, low, high, trained) <= 0:
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


def _inner_name(name: str) -> str:
    _, _, block, rest = name.split(".", 3)
    stem, _, kind = rest.rpartition(".")
    return f"blk.{block}.{_INNER[stem]}.{kind}"


def _without_nulls(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if value is not None}


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more
