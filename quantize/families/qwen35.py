"""Qwen3.5, dense and with experts: most layers have linear attention, some full; the text part of the checkpoints.

Layers that predict more than one token (MTP) follow the others. The norms are stored as what they add to 1, except
that of linear attention.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from app.errors import CheckpointError
from app.models.gguf_types import ValueType
from quantize import vocab
from quantize.checkpoint import StoredTensor
from quantize.families.common_keys import set_common_keys
from quantize.families.config import Config
from quantize.families.experts import Experts
from quantize.families.mapping import Want, map_tensors
from quantize.families.qwen import Qwen2Model
from quantize.families.qwen_moe import expert_wants, set_expert_widths, shared_expert_wants
from quantize.header import KeyTable
from quantize.source import Source
from quantize.tensors import TensorSpec, negative_exp, plus_one

_LINEAR, _FULL = "linear_attention", "full_attention"
_VISION = "model.visual."
_MOST_ROWS = 1 << 20  # of one layer's linear attention; beyond that config.json is damaged
_SECTIONS = [11, 11, 10, 0]  # of the rotary positions, where config.json is silent
_MTP_PARTS = {"pre_fc_norm_embedding": "enorm", "pre_fc_norm_hidden": "hnorm", "norm": "shared_head_norm"}


def open(source: Source) -> Qwen35Model:  # noqa: A001 - every family is opened by this name
    """Read config.json. Raises `CheckpointError` that names the field at fault."""
    return (Qwen35MoeModel if source.config["architectures"][0].startswith("Qwen3_5Moe") else Qwen35Model)(source)


@dataclasses.dataclass(frozen=True, slots=True)
class LinearAttention:
    """The sizes of a layer's linear attention: heads of keys, of values, and how wide one of either is."""

    key_heads: int
    value_heads: int
    head_size: int
    kernel: int

    @classmethod
    def read(cls, config: Config) -> LinearAttention:
        """Read config.json. Raises `CheckpointError` for what llama.cpp cannot run."""
        keys, values = config.count("linear_num_key_heads"), config.count("linear_num_value_heads")
        size = config.count("linear_key_head_dim")
        if values % keys:
            raise CheckpointError(
                f"{config.path}: linear_num_value_heads ({values}) is no multiple of linear_num_key_heads ({keys})"
            )
        if config.count("linear_value_head_dim") != size:
            raise CheckpointError(
                f"{config.path}: linear_value_head_dim is not linear_key_head_dim ({size}); llama.cpp needs them equal"
            )
        linear = cls(keys, values, size, config.count("linear_conv_kernel_dim"))
        if 2 * linear.key_rows + linear.value_rows > _MOST_ROWS:
            raise CheckpointError(
                f"{config.path}: linear_num_key_heads {keys}, linear_num_value_heads {values} and "
                f"linear_key_head_dim {size} make more than {_MOST_ROWS} rows"
            )
        return linear

    @property
    def key_rows(self) -> int:
        """How many rows the keys have, and the queries."""
        return self.key_heads * self.head_size

    @property
    def value_rows(self) -> int:
        """How many rows the values have."""
        return self.value_heads * self.head_size

    def order(self) -> list[int]:
        """Return which stored head of values each of ggml's is.

        Stored are together those that share a head of keys; ggml repeats the keys, so that first comes one for each.
        """
        places = np.arange(self.value_heads).reshape(self.key_heads, -1)
        return [int(place) for place in places.T.ravel()]

    def wants(self, target: str, source: str, hidden: int) -> Iterator[Want]:
        """Want a layer's tensors, the heads of values in ggml's order."""
        size, order, rows = self.head_size, self.order(), 2 * self.key_rows + self.value_rows
        first = list(range(2 * self.key_heads))
        heads = np.array([*first, *(len(first) + place for place in order)], dtype=np.intp)
        every = np.arange(size, dtype=np.intp)
        channels = (heads[:, None] * size + every).ravel()
        values = np.array(order, dtype=np.intp)
        columns = (values[:, None] * size + every).ravel()

        qkv, gate = f"{source}.in_proj_qkv.weight", f"{source}.in_proj_z.weight"
        yield _by_heads(f"{target}.attn_qkv.weight", qkv, (rows, hidden), heads, size)
        yield _by_heads(f"{target}.attn_gate.weight", gate, (self.value_rows, hidden), values, size)
        small: dict[str, Any] = {"group": self.value_heads, "take": values}
        for letter, name in (("a", "alpha"), ("b", "beta")):
            stored = f"{source}.in_proj_{letter}.weight"
            yield Want(f"{target}.ssm_{name}.weight", stored, (self.value_heads, hidden), **small)
        yield Want(f"{target}.ssm_a", f"{source}.A_log", (self.value_heads,), **small, changes=(negative_exp,))
        yield Want(f"{target}.ssm_dt.bias", f"{source}.dt_bias", (self.value_heads,), **small)
        kernels, shape = (rows, 1, self.kernel), (rows, self.kernel)
        convolution = f"{source}.conv1d.weight"
        yield Want(f"{target}.ssm_conv1d.weight", convolution, kernels, shape, group=rows, take=channels)
        yield Want(f"{target}.ssm_norm.weight", f"{source}.norm.weight", (size,))
        yield Want(f"{target}.ssm_out.weight", f"{source}.out_proj.weight", (hidden, self.value_rows), columns=columns)


class Qwen35Model(Qwen2Model):
    """A dense Qwen3.5."""

    architecture = "qwen35"
    defaults: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    head_norms = True

    def __init__(self, source: Source) -> None:
        super().__init__(source)
        self.linear = LinearAttention.read(self._config)
        self.interval = self._config.count("full_attention_interval", 4)
        self.kinds: list[str] = []
        self.predicting = 0

    def set_hyper_parameters(self, keys: KeyTable, file_type: int) -> None:
        """Set the architecture's keys and the file type; `tensors` has found the layers that predict more."""
        config, prefix, linear = self._config, self.architecture, self.linear
        set_common_keys(keys, prefix, config, file_type, self.blocks + self.predicting)
        set_expert_widths(keys, prefix, config)
        if self.predicting:
            keys.u32(f"{prefix}.nextn_predict_layers", self.predicting)
        keys.u32(f"{prefix}.ssm.conv_kernel", linear.kernel)
        keys.u32(f"{prefix}.ssm.state_size", linear.head_size)
        keys.u32(f"{prefix}.ssm.group_count", linear.key_heads)
        keys.u32(f"{prefix}.ssm.time_step_rank", linear.value_heads)
        keys.u32(f"{prefix}.ssm.inner_size", linear.value_rows)
        if config.first("layer_types"):
            recurrent = [kind == _LINEAR for kind in self.kinds] + [False] * self.predicting
            keys.array(f"{prefix}.attention.recurrent_layers", ValueType.BOOL, recurrent)
        keys.u32(f"{prefix}.full_attention_interval", self.interval)
        share = config.rope_number("partial_rotary_factor", 0.25)
        if not 0 < share <= 1:
            raise CheckpointError(f"{config.path}: partial_rotary_factor is {share}; it must be above 0, at most 1")
        keys.u32(f"{prefix}.rope.dimension_count", int(self.head_size * share))
        if "mrope_section" not in config.rope_all:
            keys.array(f"{prefix}.rope.dimension_sections", ValueType.INT32, _SECTIONS)

    def set_vocabulary(self, keys: KeyTable) -> None:
        """Set the tokenizer, a byte-level BPE."""
        vocab.set_bpe_vocabulary(keys, self._source, self.vocabulary)

    def tensors(self, stored: Mapping[str, StoredTensor]) -> list[TensorSpec]:
        """Map the text model's tensors, after checking that all are there and that each has its shape."""
        self.predicting = self._count_predicting(stored)
        if self.blocks + self.predicting > len(stored):
            raise CheckpointError(
                f"{self._source.folder}: there are {len(stored)} tensors for {self.blocks} layers and "
                f"{self.predicting} that predict more tokens (mtp_num_hidden_layers)"
            )
        self.kinds = self._kinds()
        wants = self._wants(stored)
        return map_tensors(self._source.folder, stored, wants, ignored=lambda name: name.startswith(_VISION))

    def _count_predicting(self, stored: Mapping[str, StoredTensor]) -> int:
        announced = self._config.fields.get("mtp_num_hidden_layers") and self._config.count("mtp_num_hidden_layers")
        extra = [name.split(".") for name in stored if name.startswith("mtp.")]
        numbers = [int(parts[2]) for parts in extra if parts[1] == "layers" and parts[2].isdecimal()]
        if announced and not extra:
            self._source.notes.append(
                f"config.json speaks of {announced} layers that predict more tokens (mtp_num_hidden_layers); "
                f"the checkpoint has none, nor has the GGUF"
            )
            return 0
        return announced or max(numbers, default=-1) + 1

    def _kinds(self) -> list[str]:
        stated = self._config.fields.get("layer_types")
        if stated is None:
            return [_FULL if (block + 1) % self.interval == 0 else _LINEAR for block in range(self.blocks)]
        if (
            not isinstance(stated, list)
            or len(stated) != self.blocks
            or any(kind not in (_LINEAR, _FULL) for kind in stated)
        ):
            raise CheckpointError(
                f"{self._config.path}: layer_types must say {_LINEAR} or {_FULL} for each of {self.blocks} layers"
            )
        return stated

    def _wants(self, stored: Mapping[str, StoredTensor]) -> Iterator[Want]:
        prefix = "model.language_model." if "model.language_model.embed_tokens.weight" in stored else "model."
        yield from self._head_wants(prefix)
        for block, kind in enumerate(self.kinds):
            yield from self._layer_wants(f"blk.{block}", f"{prefix}layers.{block}", kind, stored)
        for block in range(self.predicting):
            yield from self._layer_wants(f"blk.{self.blocks + block}", f"mtp.layers.{block}", _FULL, stored)
        if self.predicting:
            target = f"blk.{self.blocks}.nextn"
            yield Want(f"{target}.eh_proj.weight", "mtp.fc.weight", (self.hidden, 2 * self.hidden))
            for name, inner in _MTP_PARTS.items():
                yield self._norm(f"{target}.{inner}", f"mtp.{name}")

    def _head_wants(self, prefix: str) -> Iterator[Want]:
        tied = self._source.config.get("tie_word_embeddings")  # the whole model's word counts as the text part's does
        for want in super()._head_wants(prefix):
            if want.target == "output_norm.weight":
                yield dataclasses.replace(want, changes=(plus_one,))
            elif want.target == "output.weight":
                yield dataclasses.replace(want, optional=want.optional or bool(tied))
            else:
                yield want

    def _layer_wants(self, target: str, source: str, kind: str, stored: Mapping[str, StoredTensor]) -> Iterator[Want]:
        yield self._norm(f"{target}.attn_norm", f"{source}.input_layernorm")
        yield self._norm(f"{target}.post_attention_norm", f"{source}.post_attention_layernorm")
        if kind == _LINEAR:
            yield from self.linear.wants(target, f"{source}.linear_attn", self.hidden)
        else:
            yield from self._attention_wants(target, f"{source}.self_attn")
        yield from self._feed_forward_wants(target, f"{source}.mlp", stored)

    def _attention_wants(self, target: str, source: str) -> Iterator[Want]:
        for want in super()._attention_wants(target, source):
            if want.target.endswith(("attn_q.weight", "attn_q.bias")):  # each head's queries, then its gate
                yield dataclasses.replace(want, stored=(2 * want.stored[0], *want.stored[1:]))
            elif want.target.endswith("_norm.weight"):
                yield dataclasses.replace(want, changes=(plus_one,))
            else:
                yield want

    def _norm(self, target: str, source: str) -> Want:
        return Want(f"{target}.weight", f"{source}.weight", (self.hidden,), changes=(plus_one,))


class Qwen35MoeModel(Qwen35Model):
    """A Qwen3.5 with routed experts and one that all tokens share."""

    architecture = "qwen35moe"

    def __init__(self, source: Source) -> None:
        super().__init__(source)
        config = self._config
        self.experts = Experts.read(config, "num_experts", self.hidden, config.count("moe_intermediate_size"))

    def _feed_forward_wants(self, target: str, source: str, stored: Mapping[str, StoredTensor]) -> Iterator[Want]:
        yield from expert_wants(self.experts, target, source, stored)
        yield from shared_expert_wants(self._config, target, source, self.hidden)


def _by_heads(target: str, source: str, shape: tuple[int, int], heads: NDArray[np.intp], size: int) -> Want:
    """Want a matrix whose rows are heads, in this order; each is a part, so that a slab reads no more than itself."""
    if np.array_equal(heads, np.arange(len(heads))):
        return Want(target, source, shape)
    starts = tuple(int(head) * size for head in heads)
    return Want(target, (source,) * len(heads), shape, shape, start=starts)
