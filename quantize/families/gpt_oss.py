"""gpt-oss: a mixture of experts with attention sinks, whose experts are stored as MXFP4, or in bf16."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from app.errors import CheckpointError
from quantize import vocab
from quantize.checkpoint import StoredTensor
from quantize.families.common_keys import set_common_keys
from quantize.families.config import Config
from quantize.families.experts import Experts
from quantize.families.mapping import Want, map_tensors
from quantize.header import KeyTable
from quantize.mxfp4 import BLOCK_WEIGHTS
from quantize.source import Source
from quantize.tensors import Part, TensorSpec

# what transformers' config class fills in when config.json is silent; a null stays one
_DEFAULTS: dict[str, Any] = {
    "num_hidden_layers": 36,
    "num_local_experts": 128,
    "num_experts_per_tok": 4,
    "vocab_size": 201088,
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "head_dim": 64,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "sliding_window": 128,
    "rope_theta": 150000.0,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_scaling": {
        "rope_type": "yarn",
        "factor": 32.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "original_max_position_embeddings": 4096,
    },
}
_KINDS = ("sliding_attention", "full_attention")
_HALVES = ("gate", "up")  # rows of both take turns in a checkpoint


def open(source: Source) -> GptOssModel:  # noqa: A001 - every family is opened by this name
    """Read config.json. Raises `CheckpointError` that names the field at fault."""
    return GptOssModel(source)


class GptOssModel:
    """A gpt-oss."""

    architecture = "gpt-oss"

    def __init__(self, source: Source) -> None:
        self._source = source
        defaults = {name: value for name, value in _DEFAULTS.items() if name not in source.config}
        self._config = config = Config(source, {"gpt_oss": defaults})
        self.blocks = config.count("num_hidden_layers")
        self.hidden = config.count("hidden_size")
        self.heads = config.count("num_attention_heads")
        self.key_heads = config.count("num_key_value_heads", self.heads)
        self.head_size = config.count("head_dim", max(1, self.hidden // self.heads))
        config.fields |= {"num_key_value_heads": self.key_heads, "head_dim": self.head_size}
        self.vocabulary = config.count("vocab_size")
        self.window = config.count("sliding_window")
        self.experts = Experts.read(config, "num_local_experts", self.hidden, config.count("intermediate_size"))
        kinds = config.fields.get("layer_types")
        if kinds is not None and (
            not isinstance(kinds, list) or kinds != [_KINDS[block % 2] for block in range(len(kinds))]
        ):
            raise CheckpointError(f"{config.path}: layer_types must be {' and '.join(_KINDS)} in turn, as in llama.cpp")

    def set_hyper_parameters(self, keys: KeyTable, file_type: int) -> None:
        """Set the `gpt-oss.*` keys and the file type."""
        set_common_keys(keys, self.architecture, self._config, file_type, self.blocks)
        keys.u32("gpt-oss.attention.sliding_window", self.window)
        keys.u32("gpt-oss.expert_feed_forward_length", self.experts.feed_forward)

    def set_vocabulary(self, keys: KeyTable) -> None:
        """Set the tokenizer from tokenizer.json."""
        vocab.set_bpe_vocabulary(keys, self._source, self.vocabulary)

    def tensors(self, stored: Mapping[str, StoredTensor]) -> list[TensorSpec]:
        """Map every tensor of the checkpoint, after checking that all are there and that each has its shape.

        Those that are MXFP4 come first, as upstream writes them.
        """
        if self.blocks > len(stored):
            raise CheckpointError(
                f"{self._source.folder}: config.json speaks of {self.blocks} layers; there are {len(stored)} tensors"
            )
        specs = map_tensors(self._source.folder, stored, self._wants(stored))
        return sorted(specs, key=lambda spec: spec.stored_type is None)

    def _wants(self, stored: Mapping[str, StoredTensor]) -> Iterator[Want]:
        hidden = self.hidden
        yield Want("token_embd.weight", "model.embed_tokens.weight", (self.vocabulary, hidden))
        yield Want("output_norm.weight", "model.norm.weight", (hidden,))
        yield Want("output.weight", "lm_head.weight", (self.vocabulary, hidden))
        queries, keys = self.heads * self.head_size, self.key_heads * self.head_size
        for block in range(self.blocks):
            source, target = f"model.layers.{block}", f"blk.{block}"
            yield Want(f"{target}.attn_norm.weight", f"{source}.input_layernorm.weight", (hidden,))
            yield Want(f"{target}.post_attention_norm.weight", f"{source}.post_attention_layernorm.weight", (hidden,))
            yield Want(f"{target}.attn_sinks.weight", f"{source}.self_attn.sinks", (self.heads,))
            for name, inner, shape in (
                ("q_proj", "attn_q", (queries, hidden)),
                ("k_proj", "attn_k", (keys, hidden)),
                ("v_proj", "attn_v", (keys, hidden)),
                ("o_proj", "attn_output", (hidden, queries)),
            ):
                yield Want(f"{target}.{inner}.weight", f"{source}.self_attn.{name}.weight", shape)
                yield Want(f"{target}.{inner}.bias", f"{source}.self_attn.{name}.bias", shape[:1])
            yield self.experts.router(target, f"{source}.mlp.router.weight")
            yield Want(f"{target}.ffn_gate_inp.bias", f"{source}.mlp.router.bias", (self.experts.count,))
            packed = f"{source}.mlp.experts.down_proj_blocks" in stored
            yield from (self._packed if packed else self._plain)(f"{source}.mlp.experts", target)
            yield from self._biases(f"{source}.mlp.experts", target)

    def _packed(self, source: str, target: str) -> Iterator[Want]:
        """Want experts in MXFP4, whose rows are stored as blocks."""
        count, wide, hidden = self.experts.count, self.experts.feed_forward, self.hidden
        scales = f"{source}.gate_up_proj_scales"
        for half, name in enumerate(_HALVES):
            yield Want(
                f"{target}.ffn_{name}_exps.weight", f"{source}.gate_up_proj_blocks",
                (count, 2 * wide, hidden // BLOCK_WEIGHTS, BLOCK_WEIGHTS // 2), (count, wide, hidden),
                group=2, take=np.array([half]), scales=scales,
            )  # fmt: skip
        yield Want(
            f"{target}.ffn_down_exps.weight", f"{source}.down_proj_blocks",
            (count, hidden, wide // BLOCK_WEIGHTS, BLOCK_WEIGHTS // 2), (count, hidden, wide),
            scales=f"{source}.down_proj_scales",
        )  # fmt: skip

    def _plain(self, source: str, target: str) -> Iterator[Want]:
        """Want experts in plain numbers, whose rows are stored as columns."""
        count, wide, hidden = self.experts.count, self.experts.feed_forward, self.hidden
        name, stride = f"{source}.gate_up_proj", 2 * wide
        for half, target_name in enumerate(_HALVES):
            parts = tuple(
                Part(name, wide, hidden, expert * stride, 2, np.array([half]), stride=stride) for expert in range(count)
            )
            shape = (count, wide, hidden)
            yield Want(f"{target}.ffn_{target_name}_exps.weight", name, (count, hidden, stride), shape, parts=parts)
        name = f"{source}.down_proj"
        parts = tuple(Part(name, hidden, wide, expert * hidden, stride=hidden) for expert in range(count))
        shape = (count, hidden, wide)
        yield Want(f"{target}.ffn_down_exps.weight", name, (count, wide, hidden), shape, parts=parts)

    def _biases(self, source: str, target: str) -> Iterator[Want]:
        count, wide = self.experts.count, self.experts.feed_forward
        name, both = f"{source}.gate_up_proj_bias", 2 * wide
        for half, target_name in enumerate(_HALVES):
            parts = tuple(Part(name, wide, 1, expert * both, 2, np.array([half])) for expert in range(count))
            yield Want(f"{target}.ffn_{target_name}_exps.bias", name, (count, both), (count, wide), parts=parts)
        yield Want(f"{target}.ffn_down_exps.bias", f"{source}.down_proj_bias", (count, self.hidden))
