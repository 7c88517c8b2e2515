"""Falcon-H1: attention and Mamba 2 side by side in every layer, with multipliers that are folded into the weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from app.errors import CheckpointError
from quantize import vocab
from quantize.checkpoint import StoredTensor
from quantize.families.config import Config
from quantize.families.mapping import Want, map_tensors
from quantize.header import KeyTable
from quantize.source import Source
from quantize.tensors import Change, Part, TensorSpec, negative_exp

# what transformers' config class fills in when config.json is silent
_DEFAULTS: dict[str, Any] = {
    "vocab_size": 128000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 8192,
    "rope_theta": 100000.0,
    "mamba_d_ssm": 1024,
    "mamba_n_heads": 128,
    "mamba_d_head": "auto",
    "mamba_n_groups": 1,
    "mamba_d_state": 256,
    "mamba_d_conv": 4,
    "mamba_conv_bias": True,
    "mamba_norm_before_gate": True,
    "mamba_rms_norm": False,
    "hidden_act": "silu",
}


def open(source: Source) -> FalconH1Model:  # noqa: A001 - every family is opened by this name
    """Read config.json. Raises `CheckpointError` that names the field at fault."""
    return FalconH1Model(source)


class FalconH1Model:
    """A Falcon-H1."""

    architecture = "falcon-h1"

    def __init__(self, source: Source) -> None:
        self._source = source
        self._config = config = Config(source, {"falcon_h1": _DEFAULTS})
        self.blocks = config.count("num_hidden_layers")
        self.hidden = config.count("hidden_size")
        self.feed_forward = config.count("intermediate_size")
        self.heads = config.count("num_attention_heads")
        self.key_heads = config.count("num_key_value_heads")
        self.head_size = config.count("head_dim", max(1, self.hidden // self.heads))
        self.vocabulary = config.count("vocab_size")
        self.inner = config.count("mamba_d_ssm")
        self.groups = config.count("mamba_n_groups")
        self.state = config.count("mamba_d_state")
        self.kernel = config.count("mamba_d_conv")
        self.mamba_heads = config.count("mamba_n_heads")
        self._check()
        self.multipliers = _Multipliers(config)
        self.tied = bool(config.fields.get("tie_word_embeddings"))
        if self.tied and self.multipliers.embedding != self.multipliers.output:
            source.notes.append(
                f"the embeddings are the output's too: llama.cpp multiplies logits with embedding_multiplier "
                f"({self.multipliers.embedding:g}) and not with lm_head_multiplier ({self.multipliers.output:g})"
            )

    def set_hyper_parameters(self, keys: KeyTable, file_type: int) -> None:
        """Set the `falcon-h1.*` keys and the file type."""
        config, prefix = self._config, self.architecture
        keys.u32(f"{prefix}.context_length", config.count("max_position_embeddings"))
        keys.u32(f"{prefix}.embedding_length", self.hidden)
        keys.u32(f"{prefix}.feed_forward_length", self.feed_forward)
        keys.u32(f"{prefix}.attention.head_count", self.heads)
        keys.u32(f"{prefix}.block_count", self.blocks)
        keys.u32(f"{prefix}.ssm.conv_kernel", self.kernel)
        keys.u32(f"{prefix}.ssm.inner_size", self.inner)
        keys.u32(f"{prefix}.ssm.state_size", self.state)
        keys.u32(f"{prefix}.ssm.time_step_rank", self.mamba_heads)
        keys.u32(f"{prefix}.ssm.group_count", self.groups)
        keys.f32(f"{prefix}.attention.layer_norm_rms_epsilon", config.number("rms_norm_eps"))
        keys.u32("general.file_type", file_type)
        keys.u32(f"{prefix}.vocab_size", self.vocabulary)
        keys.u32(f"{prefix}.attention.head_count_kv", self.key_heads)
        keys.u32(f"{prefix}.attention.key_length", self.head_size)
        keys.u32(f"{prefix}.attention.value_length", self.head_size)
        keys.f32(f"{prefix}.rope.freq_base", config.rope_number("rope_theta"))

    def set_vocabulary(self, keys: KeyTable) -> None:
        """Set the tokenizer from tokenizer.json."""
        vocab.set_bpe_vocabulary(keys, self._source, self.vocabulary)

    def tensors(self, stored: Mapping[str, StoredTensor]) -> list[TensorSpec]:
        """Map every tensor of the checkpoint, after checking that all are there and that each has its shape."""
        if self.blocks > len(stored):
            raise CheckpointError(
                f"{self._source.folder}: config.json speaks of {self.blocks} layers; there are {len(stored)} tensors"
            )
        return map_tensors(self._source.folder, stored, self._wants())

    def _check(self) -> None:
        config = self._config
        size = config.fields["mamba_d_head"]
        if size not in ("auto", self.inner // self.mamba_heads) or self.inner % self.mamba_heads:
            raise CheckpointError(
                f"{config.path}: mamba_d_ssm ({self.inner}) is not mamba_n_heads ({self.mamba_heads}) times "
                f"mamba_d_head ({size})"
            )
        if self.inner % self.groups:
            raise CheckpointError(
                f"{config.path}: mamba_d_ssm ({self.inner}) is no multiple of mamba_n_groups ({self.groups})"
            )
        if config.rope.get("rope_type") not in {None, "default"}:
            raise CheckpointError(f"{config.path}: llama.cpp's Falcon-H1 has no rope scaling; found {config.rope}")
        if config.fields["hidden_act"] != "silu":
            raise CheckpointError(
                f"{config.path}: hidden_act is {config.fields['hidden_act']!r}; llama.cpp's Falcon-H1 has silu only"
            )
        if not config.fields["mamba_conv_bias"]:
            raise CheckpointError(f"{config.path}: mamba_conv_bias is false; llama.cpp's Mamba needs the bias")
        if config.fields["mamba_rms_norm"] and config.fields["mamba_norm_before_gate"]:
            raise CheckpointError(f"{config.path}: mamba_norm_before_gate: llama.cpp normalizes behind the gate only")

    def _wants(self) -> Iterator[Want]:
        hidden, by, embeddings = self.hidden, self.multipliers, (self.vocabulary, self.hidden)
        yield Want("token_embd.weight", "model.embed_tokens.weight", embeddings, changes=times(by.embedding))
        yield Want("output_norm.weight", "model.final_layernorm.weight", (hidden,))
        yield Want("output.weight", "lm_head.weight", embeddings, changes=times(by.output), optional=self.tied)
        queries, keys = self.heads * self.head_size, self.key_heads * self.head_size
        for block in range(self.blocks):
            source, target = f"model.layers.{block}", f"blk.{block}"
            yield Want(f"{target}.attn_norm.weight", f"{source}.input_layernorm.weight", (hidden,))
            # without an ending, as llama.cpp asks for it
            yield Want(f"{target}.ffn_norm", f"{source}.pre_ff_layernorm.weight", (hidden,))
            for name, inner, shape, factors in (
                ("self_attn.q_proj", "attn_q", (queries, hidden), (by.attention_in,)),
                ("self_attn.k_proj", "attn_k", (keys, hidden), (by.key, by.attention_in)),
                ("self_attn.v_proj", "attn_v", (keys, hidden), (by.attention_in,)),
                ("self_attn.o_proj", "attn_output", (hidden, queries), (by.attention_out,)),
                ("feed_forward.gate_proj", "ffn_gate", (self.feed_forward, hidden), (by.gate,)),
                ("feed_forward.up_proj", "ffn_up", (self.feed_forward, hidden), ()),
                ("feed_forward.down_proj", "ffn_down", (hidden, self.feed_forward), (by.down,)),
            ):
                yield Want(f"{target}.{inner}.weight", f"{source}.{name}.weight", shape, changes=times(*factors))
            yield from self._mamba(f"{source}.mamba", f"{target}.ssm")

    def _mamba(self, source: str, target: str) -> Iterator[Want]:
        inner, heads, mixed = self.inner, self.mamba_heads, self.groups * self.state
        name, ranges = f"{source}.in_proj.weight", (inner, inner, mixed, mixed, heads)
        starts = (0, *np.cumsum(ranges).tolist())
        yield Want(
            f"{target}_in.weight", name, (starts[-1], self.hidden),
            parts=tuple(
                Part(name, rows, self.hidden, start, changes=times(self.multipliers.mamba_in, factor))
                for rows, start, factor in zip(ranges, starts, self.multipliers.mamba, strict=False)
            ),
        )  # fmt: skip
        yield Want(
            f"{target}_out.weight", f"{source}.out_proj.weight", (self.hidden, inner),
            changes=times(self.multipliers.mamba_out),
        )  # fmt: skip
        convolved, kernel = inner + 2 * mixed, self.kernel
        yield Want(f"{target}_conv1d.weight", f"{source}.conv1d.weight", (convolved, 1, kernel), (convolved, kernel))
        yield Want(f"{target}_conv1d.bias", f"{source}.conv1d.bias", (convolved,))
        yield Want(f"{target}_dt.bias", f"{source}.dt_bias", (heads,))
        yield Want(f"{target}_a", f"{source}.A_log", (heads,), (heads, 1), changes=(negative_exp,))
        yield Want(f"{target}_d", f"{source}.D", (heads,), (heads, 1))
        shape, has_norm = (self.groups, inner // self.groups), bool(self._config.fields["mamba_rms_norm"])
        yield Want(f"{target}_norm.weight", f"{source}.norm.weight", (inner,), shape, optional=not has_norm)


class _Multipliers:
    """What the weights, or what they are applied to, are multiplied with."""

    def __init__(self, config: Config) -> None:
        self.embedding, self.output = _number(config, "embedding_multiplier"), _number(config, "lm_head_multiplier")
        self.attention_in = _number(config, "attention_in_multiplier")
        self.attention_out = _number(config, "attention_out_multiplier")
        self.key = _number(config, "key_multiplier")
        self.gate, self.down = _numbers(config, "mlp_multipliers", 2)
        self.mamba_in, self.mamba_out = _number(config, "ssm_in_multiplier"), _number(config, "ssm_out_multiplier")
        self.mamba = _numbers(config, "ssm_multipliers", 5)
        """Of Mamba's input, in the order of its rows: gate, hidden, B, C, dt."""


def _number(config: Config, name: str) -> float:
    return config.finite(name, config.fields.get(name, 1.0))


def _numbers(config: Config, name: str, count: int) -> list[float]:
    stated = config.fields.get(name, [1.0] * count)
    if not isinstance(stated, list) or len(stated) != count:
        raise CheckpointError(f"{config.path}: {name} is {stated!r}; {count} numbers were expected")
    return [config.finite(name, value) for value in stated]


def times(*factors: float) -> tuple[Change, ...]:
    """Return what multiplies weights by one factor after the other, each time rounded; nothing for a factor of 1."""

    def multiply(factor: np.float32, weights: NDArray[np.float32]) -> None:
        with np.errstate(over="ignore"):  # infinity is refused, by the tensor's name, where it is looked for
            weights *= factor

    return tuple(partial(multiply, np.float32(factor)) for factor in factors if factor != 1)
