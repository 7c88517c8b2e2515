"""Granite 4: Mamba 2 in most layers and attention in some, or in all; dense, or with experts and a shared one."""

from __future__ import annotations

from collections.abc import Iterator

from app.errors import CheckpointError
from app.models.gguf_types import ValueType
from quantize import vocab
from quantize.families.experts import Experts
from quantize.families.granite import GraniteMoeModel, one_size
from quantize.families.mapping import Want
from quantize.header import KeyTable
from quantize.source import Source
from quantize.tensors import negative_exp

_ATTENTION, _MAMBA = "attention", "mamba"
_HYBRID_CONTEXT = 1 << 20  # what upstream writes for models without rotary positions, which have no limit
_EXPANSION = 2  # the only one that llama.cpp takes


def open(source: Source) -> GraniteHybridModel:  # noqa: A001 - every family is opened by this name
    """Read config.json. Raises `CheckpointError` that names the field at fault."""
    return GraniteHybridModel(source)


class GraniteHybridModel(GraniteMoeModel):
    """A Granite 4. If all of its layers are attention, llama.cpp runs it as a Granite 3."""

    # upstream reads config.json as it is
    defaults = {}  # noqa: RUF012 - as the base class has it

    def __init__(self, source: Source) -> None:
        super().__init__(source)
        config = self._config
        self.has_attention = self._has_attention()
        if not all(self.has_attention):
            self.architecture = "granitehybrid"
        elif self.experts is None:
            self.architecture = "granite"
        rotary = config.fields.get("position_embedding_type") == "rope"
        if rotary != all(self.has_attention):
            raise CheckpointError(
                f"{config.path}: position_embedding_type is {config.fields.get('position_embedding_type')!r}; "
                f"llama.cpp gives such a model rotary positions if all of its layers are attention, and else none"
            )
        if self.experts is None and self.shared_feed_forward != self.feed_forward:
            raise CheckpointError(
                f"{config.path}: without experts shared_intermediate_size ({self.shared_feed_forward}) and "
                f"intermediate_size ({self.feed_forward}) must be the same"
            )
        if config.fields.get("hidden_act", "silu") != "silu":
            raise CheckpointError(
                f"{config.path}: hidden_act is {config.fields['hidden_act']!r}; llama.cpp has silu here"
            )
        self.kernel = config.count("mamba_d_conv")
        self.state = config.count("mamba_d_state")
        self.groups = config.count("mamba_n_groups")
        self.mamba_heads = config.count("mamba_n_heads")
        self.inner = config.count("mamba_expand") * self.hidden
        if not all(self.has_attention):
            self._check_mamba()

    def set_hyper_parameters(self, keys: KeyTable, file_type: int) -> None:
        """Set the keys of the architecture, the file type, the scales, and what Mamba 2 needs."""
        super().set_hyper_parameters(keys, file_type)
        prefix = self.architecture
        keys.u32(f"{prefix}.ssm.conv_kernel", self.kernel)
        keys.u32(f"{prefix}.ssm.state_size", self.state)
        keys.u32(f"{prefix}.ssm.group_count", self.groups)
        keys.u32(f"{prefix}.ssm.inner_size", self.inner)
        keys.u32(f"{prefix}.ssm.time_step_rank", self.mamba_heads)
        if self._config.first("attn_rotary_emb"):
            keys.u32(f"{prefix}.rope.dimension_count", self._config.count("attn_rotary_emb"))
        heads = [self.key_heads if has else 0 for has in self.has_attention]  # 0 is how llama.cpp knows Mamba's layers
        keys.array(f"{prefix}.attention.head_count_kv", ValueType.INT32, heads)
        keys.boolean(f"{prefix}.rope.scaling.finetuned", all(self.has_attention))
        if not all(self.has_attention):
            keys.u32(f"{prefix}.context_length", _HYBRID_CONTEXT)

    def set_vocabulary(self, keys: KeyTable) -> None:
        """Set the tokenizer: SentencePiece if tokenizer.model is there, else byte-level BPE."""
        if (self._source.folder / "tokenizer.model").is_file():
            vocab.set_sentencepiece_vocabulary(keys, self._source, self.vocabulary)
        else:
            vocab.set_bpe_vocabulary(keys, self._source, self.vocabulary)

    def _read_experts(self) -> Experts | None:
        return super()._read_experts() if one_size(self._config, "num_local_experts") else None

    def _has_attention(self) -> list[bool]:
        kinds = self._config.fields.get("layer_types")
        if (
            not isinstance(kinds, list)
            or len(kinds) != self.blocks
            or not all(k in (_ATTENTION, _MAMBA) for k in kinds)
        ):
            raise CheckpointError(
                f"{self._config.path}: layer_types is {kinds!r}; {_ATTENTION!r} or {_MAMBA!r} was expected for each of "
                f"the {self.blocks} layers"
            )
        return [kind == _ATTENTION for kind in kinds]

    def _check_mamba(self) -> None:
        if self.inner != _EXPANSION * self.hidden:
            raise CheckpointError(f"{self._config.path}: mamba_expand is not {_EXPANSION}, which llama.cpp needs")
        if self._config.fields.get("mamba_conv_bias") is False:
            raise CheckpointError(f"{self._config.path}: mamba_conv_bias is false; llama.cpp's Mamba needs the bias")
        if self.inner % self.mamba_heads or self.inner % self.groups:
            raise CheckpointError(
                f"{self._config.path}: mamba_n_heads ({self.mamba_heads}) and mamba_n_groups ({self.groups}) must both "
                f"divide mamba_expand * hidden_size ({self.inner})"
            )

    def _mixer(self, block: int, source: str, target: str) -> Iterator[Want]:
        if self.has_attention[block]:
            yield from super()._mixer(block, source, target)
            return
        source, target = f"{source}.mamba", f"{target}.ssm"
        inner, heads, groups = self.inner, self.mamba_heads, self.groups
        mixed = inner + 2 * groups * self.state
        yield Want(f"{target}_in.weight", f"{source}.in_proj.weight", (inner + mixed + heads, self.hidden))
        yield Want(
            f"{target}_conv1d.weight", f"{source}.conv1d.weight", (mixed, 1, self.kernel), (mixed, self.kernel)
        )  # fmt: skip
        yield Want(f"{target}_conv1d.bias", f"{source}.conv1d.bias", (mixed,))
        yield Want(f"{target}_dt.bias", f"{source}.dt_bias", (heads,))
        yield Want(f"{target}_a", f"{source}.A_log", (heads,), (heads, 1), changes=(negative_exp,))
        yield Want(f"{target}_d", f"{source}.D", (heads,), (heads, 1))
        yield Want(f"{target}_norm.weight", f"{source}.norm.weight", (inner,), (groups, inner // groups))
        yield Want(f"{target}_out.weight", f"{source}.out_proj.weight", (self.hidden, inner))
