"""LFM2: short convolutions with attention in some layers; dense, or with experts (LFM2 MoE); the text of LFM2-VL."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from app.errors import CheckpointError
from quantize import vocab
from quantize.checkpoint import StoredTensor
from quantize.families.common_keys import set_common_keys
from quantize.families.config import Config
from quantize.families.experts import Experts
from quantize.families.mapping import Want, map_tensors
from quantize.header import KeyTable
from quantize.source import Source
from quantize.tensors import TensorSpec

# what transformers' config classes fill in when config.json is silent
_COMMON: dict[str, Any] = {
    "vocab_size": 65536,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 128000,
    "norm_eps": 1e-5,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
    "conv_L_cache": 3,
}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "lfm2": {
        **_COMMON,
        "hidden_size": 2560,
        "intermediate_size": 12288,
        "block_multiple_of": 256,
        "block_ffn_dim_multiplier": 1.0,
        "block_auto_adjust_ff_dim": True,
    },
    "lfm2_moe": {
        **_COMMON,
        "hidden_size": 2048,
        "intermediate_size": 7168,
        "moe_intermediate_size": 1792,
        "num_dense_layers": 2,
        "num_experts": 32,
        "num_experts_per_tok": 4,
    },
}
_DEFAULTS["lfm2_vl"] = _DEFAULTS["lfm2"]  # whose text_config may leave its own model_type out
# the names that the first LFM2 checkpoints have for what others call otherwise; where both are there, these count
_EARLY_NAMES = {"block_ff_dim": "intermediate_size", "tie_embedding": "tie_word_embeddings"}
_ATTENTION, _CONVOLUTION = "full_attention", "conv"
_TEXT_PREFIX = "model.language_model."
_NOT_TEXT = ("model.vision_tower.", "model.multi_modal_projector.")
_FEED_FORWARD = {"w1": "gate", "w2": "down", "w3": "up"}
_MOST_BLOCKS = 512  # llama.cpp's LLAMA_MAX_LAYERS
_SIGMOID = 2  # llama.cpp's number of the function that turns the router's output into weights


def open(source: Source) -> Lfm2Model:  # noqa: A001 - every family is opened by this name
    """Read config.json. Raises `CheckpointError` that names the field at fault."""
    return Lfm2MoeModel(source) if source.config["architectures"][0] == "Lfm2MoeForCausalLM" else Lfm2Model(source)


class Lfm2Model:
    """A dense LFM2."""

    architecture = "lfm2"

    def __init__(self, source: Source) -> None:
        self._source = source
        self._config = config = Config(source, _DEFAULTS)
        config.fields |= {name: config.fields[early] for early, name in _EARLY_NAMES.items() if early in config.fields}
        if "theta" in config.fields and "rope_parameters" not in config.fields:
            config.rope["rope_theta"] = config.fields["theta"]
        self.blocks = config.count("num_hidden_layers")
        if self.blocks > _MOST_BLOCKS:
            raise CheckpointError(
                f"{config.path}: num_hidden_layers is {self.blocks}; llama.cpp takes at most {_MOST_BLOCKS}"
            )
        self.hidden = config.count("hidden_size")
        self.heads = config.count("num_attention_heads")
        self.key_heads = config.count("num_key_value_heads")
        self.vocabulary = config.count("vocab_size")
        self.kernel = config.count("conv_L_cache")
        if self.heads % self.key_heads or self.hidden % self.heads:
            raise CheckpointError(
                f"{config.path}: hidden_size ({self.hidden}) must be a multiple of num_attention_heads ({self.heads}), "
                f"and that of num_key_value_heads ({self.key_heads})"
            )
        self.head_size = self.hidden // self.heads
        self.feed_forward = self._feed_forward()
        self.experts: Experts | None = None
        self.dense_blocks = self.blocks
        self.has_attention = self._has_attention()
        # llama.cpp knows the layers without attention by their 0 heads
        config.fields["num_key_value_heads"] = [self.key_heads if has else 0 for has in self.has_attention]

    def set_hyper_parameters(self, keys: KeyTable, file_type: int) -> None:
        """Set the architecture's keys and the file type."""
        set_common_keys(keys, self.architecture, self._config, file_type, self.blocks)
        keys.u32("lfm2.vocab_size", self.vocabulary)
        keys.u32("lfm2.shortconv.l_cache", self.kernel)
        keys.u32("lfm2.feed_forward_length", self.feed_forward)

    def set_vocabulary(self, keys: KeyTable) -> None:
        """Set the tokenizer from tokenizer.json."""
        vocab.set_bpe_vocabulary(keys, self._source, self.vocabulary)

    def tensors(self, stored: Mapping[str, StoredTensor]) -> list[TensorSpec]:
        """Map every tensor of the text model, after checking that all are there and that each has its shape."""
        prefix = _TEXT_PREFIX if f"{_TEXT_PREFIX}embed_tokens.weight" in stored else "model."
        return map_tensors(self._source.folder, stored, self._wants(prefix), ignored=self._is_left_out)

    def _is_left_out(self, name: str) -> bool:
        return "text_config" in self._source.config and name.startswith(_NOT_TEXT)

    def _feed_forward(self) -> int:
        size = self._config.count("intermediate_size")
        if not self._config.fields.get("block_auto_adjust_ff_dim", True):
            return size
        size = int(self._config.number("block_ffn_dim_multiplier") * int(2 * size / 3))
        step = self._config.count("block_multiple_of")
        return -(-size // step) * step

    def _has_attention(self) -> list[bool]:
        config = self._config
        kinds, indices = config.fields.get("layer_types"), config.fields.get("full_attn_idxs")
        if kinds is None:
            if not isinstance(indices, list | None):
                raise CheckpointError(f"{config.path}: full_attn_idxs is {indices!r}; a list was expected")
            return [indices is None or block in indices for block in range(self.blocks)]
        known = isinstance(kinds, list) and all(kind in (_ATTENTION, _CONVOLUTION) for kind in kinds)
        if not known or len(kinds) != self.blocks:
            raise CheckpointError(
                f"{config.path}: layer_types is {kinds!r}; {self.blocks} (num_hidden_layers) times "
                f"{_ATTENTION!r} or {_CONVOLUTION!r} was expected"
            )
        return [kind == _ATTENTION for kind in kinds]

    def _wants(self, prefix: str) -> Iterator[Want]:
        embeddings = (self.vocabulary, self.hidden)
        yield Want("token_embd.weight", f"{prefix}embed_tokens.weight", embeddings)
        yield Want("token_embd_norm.weight", f"{prefix}embedding_norm.weight", (self.hidden,))
        tied = bool(self._config.fields.get("tie_word_embeddings"))
        yield Want("output.weight", "lm_head.weight", embeddings, optional=tied)
        for block, has_attention in enumerate(self.has_attention):
            source, target = f"{prefix}layers.{block}", f"blk.{block}"
            yield Want(f"{target}.attn_norm.weight", f"{source}.operator_norm.weight", (self.hidden,))
            yield Want(f"{target}.ffn_norm.weight", f"{source}.ffn_norm.weight", (self.hidden,))
            yield from (self._attention if has_attention else self._convolution)(source, target)
            if self.experts is None or block < self.dense_blocks:
                yield from self._dense(f"{source}.feed_forward", target)
            else:
                yield from _mixture(self.experts, f"{source}.feed_forward", target)

    def _attention(self, source: str, target: str) -> Iterator[Want]:
        hidden, keys = self.hidden, self.key_heads * self.head_size
        for name, inner, rows in (
            ("q_proj", "attn_q", hidden),
            ("k_proj", "attn_k", keys),
            ("v_proj", "attn_v", keys),
            ("out_proj", "attn_output", hidden),
        ):
            yield Want(f"{target}.{inner}.weight", f"{source}.self_attn.{name}.weight", (rows, hidden))
        for letter in "qk":
            name = f"{source}.self_attn.{letter}_layernorm.weight"
            yield Want(f"{target}.attn_{letter}_norm.weight", name, (self.head_size,))

    def _convolution(self, source: str, target: str) -> Iterator[Want]:
        source, target = f"{source}.conv", f"{target}.shortconv"
        hidden, kernel = self.hidden, self.kernel
        yield Want(f"{target}.conv.weight", f"{source}.conv.weight", (hidden, 1, kernel), (hidden, kernel))
        yield Want(f"{target}.in_proj.weight", f"{source}.in_proj.weight", (3 * hidden, hidden))
        yield Want(f"{target}.out_proj.weight", f"{source}.out_proj.weight", (hidden, hidden))

    def _dense(self, source: str, target: str) -> Iterator[Want]:
        shape = (self.feed_forward, self.hidden)
        for name, inner in _FEED_FORWARD.items():
            shape_of = shape[::-1] if inner == "down" else shape
            yield Want(f"{target}.ffn_{inner}.weight", f"{source}.{name}.weight", shape_of)


class Lfm2MoeModel(Lfm2Model):
    """An LFM2 whose layers have experts, but for the first few."""

    architecture = "lfm2moe"

    def __init__(self, source: Source) -> None:
        super().__init__(source)
        config = self._config
        self.expert_feed_forward = config.count("moe_intermediate_size")
        self.experts = Experts.read(config, "num_experts", self.hidden, self.expert_feed_forward)
        dense = config.sizes("num_dense_layers")
        if not isinstance(dense, int):
            raise CheckpointError(f"{config.path}: num_dense_layers is {dense!r}; a number was expected")
        self.dense_blocks = dense
        for name, only in (("norm_topk_prob", True), ("routed_scaling_factor", 1.0), ("use_expert_bias", True)):
            if config.fields.get(name, only) != only:
                raise CheckpointError(
                    f"{config.path}: {name} is {config.fields[name]!r}; llama.cpp computes such models with {only} only"
                )

    def set_hyper_parameters(self, keys: KeyTable, file_type: int) -> None:
        """Set the architecture's keys and the file type."""
        set_common_keys(keys, self.architecture, self._config, file_type, self.blocks)
        keys.u32("lfm2moe.expert_feed_forward_length", self.expert_feed_forward)
        keys.u32("lfm2moe.leading_dense_block_count", self.dense_blocks)
        keys.u32("lfm2moe.expert_gating_func", _SIGMOID)
        keys.u32("lfm2moe.vocab_size", self.vocabulary)
        keys.u32("lfm2moe.shortconv.l_cache", self.kernel)

    def _feed_forward(self) -> int:
        return self._config.count("intermediate_size")


def _mixture(experts: Experts, source: str, target: str) -> Iterator[Want]:
    yield experts.router(target, f"{source}.gate.weight")
    yield Want(f"{target}.exp_probs_b.bias", f"{source}.expert_bias", (experts.count,))
    names = {f"ffn_{inner}_exps": f"{source}.experts.{{}}.{name}.weight" for name, inner in _FEED_FORWARD.items()}
    yield from experts.separate(target, names)
