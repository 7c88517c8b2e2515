"""What Gemma 2 and Gemma 3 share: norms that are stored as what they add to 1, four in a layer, and sliding windows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from app.errors import CheckpointError
from app.models.gguf_types import ValueType
from quantize import vocab
from quantize.checkpoint import StoredTensor
from quantize.families.common_keys import check_limits
from quantize.families.config import Config
from quantize.families.mapping import Want, map_tensors
from quantize.header import KeyTable
from quantize.source import Source
from quantize.tensors import TensorSpec, plus_one
from quantize.vocab_gemma import set_gemma_vocabulary

_NORMS = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
# what comes before `layers.0...`: a text model by itself, one within a multimodal one (of old and of new), a bare one
_PREFIXES = ("model.", "language_model.model.", "model.language_model.", "")


def text_prefix(stored: Mapping[str, StoredTensor]) -> str:
    """Return what the names of the text model's tensors begin with."""
    return next((prefix for prefix in _PREFIXES if f"{prefix}embed_tokens.weight" in stored), _PREFIXES[0])


def sliding_layers(config: Config, blocks: int, period: int) -> list[bool]:
    """Return for each layer whether it looks through a sliding window; by default all but every `period`-th one.

    Raises `CheckpointError` if config.json's layer_types is anything but a list of the two known kinds.
    """
    types = config.fields.get("layer_types")
    if types is None:
        return [(layer + 1) % period != 0 for layer in range(blocks)]
    kinds = {"sliding_attention": True, "full_attention": False}
    if not isinstance(types, list) or len(types) != blocks or not all(kind in kinds for kind in map(str, types)):
        raise CheckpointError(
            f"{config.path}: layer_types is {types!r}; {blocks} times sliding_attention or full_attention was expected"
        )
    return [kinds[kind] for kind in types]


class GemmaModel:
    """A Gemma 2 or 3."""

    defaults: ClassVar[Mapping[str, Mapping[str, Any]]]
    """What transformers' config class fills in when config.json is silent."""
    left_out: ClassVar[tuple[str, ...]]
    """How the names of the tensors begin that are no part of the text model, or copies."""

    architecture: str
    period: int
    """llama.cpp takes every `period`-th layer for one of full attention."""
    long_blocks: int
    """The size of the family that has so many layers scales its attention in a way of its own."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._config = config = Config(source, self.defaults)
        self.blocks = config.count("num_hidden_layers")
        check_limits(config, self.blocks)
        self.hidden = config.count("hidden_size")
        self.feed_forward = config.count("intermediate_size")
        self.heads = config.count("num_attention_heads")
        self.key_heads = config.count("num_key_value_heads")
        self.head_size = config.count("head_dim")
        self.vocabulary = config.count("vocab_size")
        if self.heads % self.key_heads:
            raise CheckpointError(
                f"{config.path}: num_attention_heads ({self.heads}) is no multiple of "
                f"num_key_value_heads ({self.key_heads})"
            )

    def set_vocabulary(self, keys: KeyTable) -> None:
        """Set the tokenizer from tokenizer.model, or from tokenizer.json if that is gone."""
        if (self._source.folder / "tokenizer.model").is_file():
            vocab.set_sentencepiece_vocabulary(keys, self._source, self.vocabulary)
            keys.boolean("tokenizer.ggml.add_space_prefix", False)
        else:
            set_gemma_vocabulary(keys, self._source, self.vocabulary)
            self._source.notes.append(
                "no tokenizer.model: the vocabulary is that of tokenizer.json, written as Gemma 4's; upstream's "
                "converter refuses this"
            )

    def tensors(self, stored: Mapping[str, StoredTensor]) -> list[TensorSpec]:
        """Map every tensor of the text model, after checking that all are there and that each has its shape."""
        if self.blocks > len(stored):
            raise CheckpointError(
                f"{self._source.folder}: config.json speaks of {self.blocks} layers; there are {len(stored)} tensors"
            )
        prefix = text_prefix(stored)
        wants = [*self._outer(prefix), *(want for block in range(self.blocks) for want in self._layer(prefix, block))]
        return map_tensors(self._source.folder, stored, wants, ignored=lambda name: name.startswith(self.left_out))

    def _outer(self, prefix: str) -> Iterator[Want]:
        yield Want("token_embd.weight", f"{prefix}embed_tokens.weight", (self.vocabulary, self.hidden))
        yield Want("output_norm.weight", f"{prefix}norm.weight", (self.hidden,), changes=(plus_one,))

    def _layer(self, prefix: str, block: int) -> Iterator[Want]:
        source, target = f"{prefix}layers.{block}", f"blk.{block}"
        hidden, queries, keys = self.hidden, self.heads * self.head_size, self.key_heads * self.head_size
        for name, inner in _NORMS.items():
            yield Want(f"{target}.{inner}.weight", f"{source}.{name}.weight", (hidden,), changes=(plus_one,))
        for name, inner, shape in (
            ("self_attn.q_proj", "attn_q", (queries, hidden)),
            ("self_attn.k_proj", "attn_k", (keys, hidden)),
            ("self_attn.v_proj", "attn_v", (keys, hidden)),
            ("self_attn.o_proj", "attn_output", (hidden, queries)),
            ("mlp.gate_proj", "ffn_gate", (self.feed_forward, hidden)),
            ("mlp.up_proj", "ffn_up", (self.feed_forward, hidden)),
            ("mlp.down_proj", "ffn_down", (hidden, self.feed_forward)),
        ):
            yield Want(f"{target}.{inner}.weight", f"{source}.{name}.weight", shape)

    def set_window(self, keys: KeyTable) -> None:
        """Set the sliding window, and which layers have it where llama.cpp would not guess that."""
        key = f"{self.architecture}.attention.sliding_window"
        keys.u32(key, self._config.count("sliding_window"))
        stated = sliding_layers(self._config, self.blocks, self._config.count("sliding_window_pattern", self.period))
        if stated != [(layer + 1) % self.period != 0 for layer in range(self.blocks)]:
            # upstream leaves the key out, and llama.cpp then counts by itself
            keys.array(f"{key}_pattern", ValueType.BOOL, stated)
            self._source.notes.append(
                f"full attention is not in every {self.period}th layer: {key}_pattern says so, which upstream's "
                f"converter leaves out"
            )

    def check_scale(self) -> None:
        """Note it if attention is scaled in another way than llama.cpp's."""
        known = self.hidden // self.heads if self.blocks == self.long_blocks else self.head_size
        stated = self._config.number("query_pre_attn_scalar")
        if stated != known:
            self._source.notes.append(
                f"config.json's query_pre_attn_scalar is {stated:g}; llama.cpp has no key for it and takes {known}"
            )
