"""Nomic's embedding models: BERT with rotary positions, and gated feed-forward layers or a mixture of experts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from app.errors import CheckpointError
from quantize.checkpoint import StoredTensor
from quantize.families.config import Config
from quantize.families.encoder import (
    check_activation,
    class_names,
    head_count,
    linear,
    map_encoder,
    norm,
    read_config,
    set_encoder_keys,
)
from quantize.families.mapping import Want
from quantize.header import KeyTable
from quantize.source import Source
from quantize.tensors import Part, TensorSpec
from quantize.vocab_unigram import is_unigram, set_unigram_vocabulary
from quantize.vocab_wordpiece import set_wordpiece_vocabulary

# what llama.cpp takes for granted; Nomic's own config class has other defaults, so that config.json must say so
_TAKEN_FOR_GRANTED: dict[str, Any] = {
    "causal": False,
    "prenorm": False,
    "rotary_emb_fraction": 1.0,
    "rotary_emb_interleaved": False,
    "rotary_emb_scale_base": None,
}
_TRAINED_POSITIONS = 2048
_CONTEXT_LENGTHS = {8192: 2048, 2048: 512}  # n_positions in config.json → tokens that the model was trained for
_BIASES = ("qkv_proj_bias", "mlp_fc1_bias", "mlp_fc2_bias")  # all of them in a mixture, else none
_MASK = 250001  # of the vocabulary of XLM-RoBERTa
_EXPERTS_BIAS = ".mlp.experts.bias"  # which llama.cpp does not have; upstream leaves it out too
_UNUSED = ("pooler.dense.", "cls.predictions.", "cls.seq_relationship.")


def open(source: Source) -> NomicBertModel:  # noqa: A001 - every family is opened by this name
    """Read config.json. Raises `CheckpointError` that names the field at fault."""
    return NomicBertModel(source)


class NomicBertModel:
    """An embedding model of Nomic's: version 1 or 1.5, or a mixture of experts as version 2 is."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._config = config = read_config(source, {})
        self._moe_period = (
            config.optional_count("moe_every_n_layers") if config.fields.get("moe_every_n_layers") else None
        )
        self.architecture = "nomic-bert" if self._moe_period is None else "nomic-bert-moe"
        self._classes = class_names(config, unnamed=0)
        self.blocks = config.count("n_layer")
        self.hidden = config.count("n_embd")
        self.feed_forward = config.count("n_inner")
        self.vocabulary = config.count("vocab_size")
        self.token_types = config.count("type_vocab_size", 1)
        head_count(config, "n_head", self.hidden)
        mixture = self._moe_period is not None
        check_activation(config, "activation_function", ("gelu",) if mixture else ("swiglu",))
        for name, expected in (_TAKEN_FOR_GRANTED | dict.fromkeys(_BIASES, mixture)).items():
            if config.fields.get(name) != expected:
                found = config.fields.get(name)
                raise CheckpointError(f"{config.path}: {name} is {found!r}; llama.cpp computes with {expected!r}")
        config.fields["n_positions"] = _context_length(config)
        if mixture:
            config.fields["num_experts_per_tok"] = config.count("moe_top_k")

    def set_hyper_parameters(self, keys: KeyTable, file_type: int) -> None:
        """Set the keys of the architecture and the file type."""
        config, prefix = self._config, self.architecture
        set_encoder_keys(keys, prefix, config, self._source, file_type, self.blocks, self._classes)
        if self._moe_period is not None:
            used = keys.values.pop(f"{prefix}.expert_used_count")  # upstream sets it last
            keys.u32(f"{prefix}.moe_every_n_layers", self._moe_period)
            keys.values[f"{prefix}.expert_used_count"] = used

    def set_vocabulary(self, keys: KeyTable) -> None:
        """Set the tokenizer: WordPiece, or the unigrams of XLM-RoBERTa."""
        if is_unigram(self._source):
            mask = None if self._moe_period is None else _MASK
            set_unigram_vocabulary(keys, self._source, self.vocabulary, self.token_types, mask=mask)
            return
        set_wordpiece_vocabulary(keys, self._source, self.vocabulary, self.token_types)

    def tensors(self, stored: Mapping[str, StoredTensor]) -> list[TensorSpec]:
        """Map the encoder's tensors; heads of the training are left out."""
        return map_encoder(
            self._config, stored, self._wants(), blocks=self.blocks, classes=self._classes,
            plain_name=lambda name: name.removeprefix("bert."),
            unused=lambda name: name.startswith(_UNUSED) or name.endswith(_EXPERTS_BIAS),
        )  # fmt: skip

    def _wants(self) -> Iterator[Want]:
        hidden, wide = self.hidden, self.feed_forward
        yield Want("token_embd.weight", "embeddings.word_embeddings.weight", (self.vocabulary, hidden))
        yield Want("token_types.weight", "embeddings.token_type_embeddings.weight", (self.token_types, hidden))
        yield from norm("token_embd_norm", "emb_ln", hidden)
        bias = self._moe_period is not None
        for block in range(self.blocks):
            source, target = f"encoder.layers.{block}", f"blk.{block}"
            yield from norm(f"{target}.attn_output_norm", f"{source}.norm1", hidden)
            yield from norm(f"{target}.layer_output_norm", f"{source}.norm2", hidden)
            yield from linear(f"{target}.attn_qkv", f"{source}.attn.Wqkv", (3 * hidden, hidden), bias=bias)
            yield from linear(f"{target}.attn_output", f"{source}.attn.out_proj", (hidden, hidden), bias=bias)
            if self._moe_period is not None and block % self._moe_period == 1:
                yield from self._experts(f"{source}.mlp", target)
                continue
            yield from linear(f"{target}.ffn_down", f"{source}.mlp.fc2", (hidden, wide), bias=bias)
            if bias:
                yield from linear(f"{target}.ffn_up", f"{source}.mlp.fc1", (wide, hidden))
            else:
                yield from linear(f"{target}.ffn_up", f"{source}.mlp.fc11", (wide, hidden), bias=False)
                yield from linear(f"{target}.ffn_gate", f"{source}.mlp.fc12", (wide, hidden), bias=False)

    def _experts(self, source: str, target: str) -> Iterator[Want]:
        hidden, wide = self.hidden, self.feed_forward
        count = self._config.count(self._config.first("num_local_experts", "num_experts") or "num_experts")
        stored = (count * wide, hidden)
        yield Want(f"{target}.ffn_gate_inp.weight", f"{source}.router.layer.weight", (count, hidden))
        yield Want(f"{target}.ffn_up_exps.weight", f"{source}.experts.mlp.w1", stored, (count, wide, hidden))
        # the way back is stored as the way there is, and wanted turned
        name, shape = f"{source}.experts.mlp.w2", (count, hidden, wide)
        turned = tuple(Part(name, hidden, wide, expert * hidden, stride=hidden) for expert in range(count))
        yield Want(f"{target}.ffn_down_exps.weight", name, stored, shape, parts=turned)


def _context_length(config: Config) -> int:
    stated, trained = config.count("n_positions"), config.count("max_trained_positions", _TRAINED_POSITIONS)
    if trained != _TRAINED_POSITIONS or stated not in _CONTEXT_LENGTHS:
        raise CheckpointError(
            f"{config.path}: n_positions is {stated} and max_trained_positions {trained}; for how many tokens such a "
            f"model was trained is not known"
        )
    return _CONTEXT_LENGTHS[stated]
